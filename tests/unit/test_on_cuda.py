"""What only a card can show: recorded steps, resumes, number types, criteria and shrunk networks on a CUDA device."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from helpers.commands import run, tiny
from helpers.interruptions import stopped_again_and_again
from helpers.steps import Case, assert_same, kernels_that_repeat_themselves, with_a_whole_recipe
from helpers.structures import random_structure
from torch import nn

from structured_tickets.base.distributed import ALONE
from structured_tickets.base.errors import Interrupted
from structured_tickets.base.weights import cloned_state
from structured_tickets.data.loader import BatchLoader
from structured_tickets.networks import build_model
from structured_tickets.networks.precision import choose_precision
from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.regroup import score_units
from structured_tickets.runs.setup import choose_kernels
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.training import step as steps
from structured_tickets.training.epoch import validate_together
from structured_tickets.training.loss_scale import LossScale
from structured_tickets.training.meter import Meter
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.recording import Recording, recorder_for
from structured_tickets.unit_groups.find import unit_groups

pytestmark = pytest.mark.cuda

CARD = torch.device("cuda", 0)
TYPES = [torch.float32, torch.bfloat16, torch.float16]
NETWORKS = ["micro_cnn", "micro_vit", "dropping", "res20s", "vit_tiny"]


@pytest.fixture
def deterministic():
    with kernels_that_repeat_themselves():
        yield


@pytest.fixture(autouse=True)
def _as_in_a_run(monkeypatch):
    """Full float32, and no recording of the test before."""
    choose_kernels(deterministic=False)
    monkeypatch.setattr(Recording, "failed", "")
    yield
    gc.collect()


def cases(arch="micro_cnn", optimizer="sgd", **words):
    """The same twice: recorded, and eager."""
    words = {"images": 68, "epochs": 20, "device": "cuda", **words}
    return [Case(arch, optimizer, recorder=recorder_for(CARD, step), **words) for step in ("graph", "eager")]


def graph_of(case):
    (found,) = [r for r in case.passer.recorder.recordings() if r.body.name == "the step"]
    return found.graph


def trained(case, epochs=(0, 1, 2)):
    torch.manual_seed(5)
    sums = case.train(epochs=epochs)
    return sums, case.values(), torch.cuda.get_rng_state()


EXACT = [
    (arch, optimizer, decoupled, compact)
    for arch in NETWORKS
    for optimizer in OPTIMIZERS
    for decoupled in (False, True)
    for compact in (False, True)
    if not (arch == "dropping" and compact)  # nothing can be cut out of it
    and (arch in ("micro_cnn", "micro_vit", "dropping") or (compact and decoupled == (optimizer == "adamw")))
]


@pytest.mark.parametrize("arch, optimizer, decoupled, compact", EXACT)
def test_a_deterministic_graph_gives_the_bits_of_the_eager_step(arch, optimizer, decoupled, compact, deterministic):
    """Weights, statistics, the optimizer's state, sums, and how far the random generator is."""
    graph, eager = cases(arch, optimizer, decoupled=decoupled, compact=compact)
    ours, theirs = trained(graph), trained(eager)
    assert graph_of(graph) is not None and not eager.passer.recorder.recordings()
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    assert_same(ours[1], theirs[1])
    assert torch.equal(ours[2], theirs[2])
    graph.passer.recorder.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("arch", ["micro_cnn", "micro_vit"])
def test_a_graph_of_a_whole_recipe_gives_the_bits_of_the_eager_step(arch, optimizer, deterministic):
    graph, eager = map(with_a_whole_recipe, cases(arch, optimizer, compact=True))
    ours, theirs = trained(graph), trained(eager)
    assert graph_of(graph) is not None
    assert_same(ours[1], theirs[1])
    assert_same(graph.passer.average.state(), eager.passer.average.state())
    graph.passer.recorder.close()


@pytest.mark.parametrize("precision", TYPES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("arch", ["micro_cnn", "micro_vit"])
def test_a_graph_learns_as_the_eager_step_in_every_number_type(arch, optimizer, precision, deterministic):
    graph, eager = cases(arch, optimizer, precision=precision)
    ours, theirs = trained(graph), trained(eager)
    assert graph_of(graph) is not None
    assert_same(ours[1], theirs[1])
    if precision == torch.float16:
        assert graph.passer.scale.state() == eager.passer.scale.state()
    graph.passer.recorder.close()


@pytest.mark.parametrize("arch", ["micro_cnn", "micro_vit", "dropping"])
def test_with_the_fastest_kernels_they_agree_within_rounding(arch):
    """Of shallow networks; deep ones of thin layers multiply a rounding error by ten in every step."""
    graph, eager = cases(arch)
    ours, theirs = trained(graph, [0]), trained(eager, [0])
    assert graph_of(graph) is not None
    for name, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][name], rtol=5e-2, atol=5e-3)
    graph.passer.recorder.close()


@pytest.mark.parametrize("precision", TYPES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("arch", ["micro_cnn", "micro_vit", "dropping"])
def test_no_step_makes_the_host_wait(arch, optimizer, precision, monkeypatch):
    """As the driver sees it: torch raises an error at each operation that waits."""
    _, case = cases(arch, optimizer, precision=precision)
    case.train(epochs=[0])
    real, seen = steps.Step.once, []

    def once(step):
        torch.cuda.set_sync_debug_mode("error")
        try:
            real(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.append(step)

    monkeypatch.setattr(steps.Step, "once", once)
    case.train(epochs=[1])
    assert len(seen) == 9


def test_what_waits_is_seen_by_the_driver():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(2, device=CARD).nonzero()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("at", [2, 4, 6])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_recorded_epoch_continues_at_every_step(at, optimizer, deterministic):
    """Before it is recorded, while it is, and afterwards; with dropout, in a process that records anew."""

    class Stop:
        signal, left = None, at

        def obey(self, where):
            self.left -= 1
            if not self.left:
                raise Interrupted(where, 15)

    through, first, second = (cases("dropping", optimizer)[0] for _ in range(3))
    _, wanted, _ = trained(through, [1])
    torch.manual_seed(5)
    first.passer.stop = Stop()
    with pytest.raises(Interrupted):
        first.train(epochs=[1])
    random = torch.cuda.get_rng_state()
    second.model.load_state_dict(first.model.state_dict())
    second.trainee.load_optimizer_state(first.trainee.optimizer_state())
    second.passer.meter = Meter.start(CARD, first.passer.meter.reached())
    torch.cuda.set_rng_state(random)
    second.train(epochs=[1], start=at)
    assert_same(second.values(), wanted)
    for case in (through, first, second):
        case.passer.recorder.close()


def test_networks_that_follow_each_other_are_recorded_and_leave_no_memory():
    held = []
    for _ in range(5):
        graph, _ = cases("micro_cnn")
        graph.train(epochs=[0, 1])
        assert graph_of(graph) is not None
        graph.passer.recorder.close()
        del graph, _
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[1]


def test_evaluations_are_recorded():
    graph, _ = cases("micro_cnn")
    loader = BatchLoader(graph.data, 8, CARD)
    for epoch in range(3):
        graph.train(epochs=[epoch])
        common = (loader, graph.model, graph.criterion, ALONE, torch.float32)
        assert validate_together(*common, graph.passer.recorder) == validate_together(*common)
    assert [r.body.name for r in graph.passer.recorder.recordings() if r.graph] == ["the step", "the evaluation"]
    graph.passer.recorder.close()


def test_compact_training_is_training_under_the_mask():
    ends = []
    for compact in (False, True):
        graph, _ = cases("micro_cnn", compact=compact, dead_units=True)
        held = {n: m.cpu() for n, m in zip(graph.trainee.held.names, graph.trainee.held.masks, strict=True)}
        graph.train(epochs=[0])
        graph.trainee.write_back()
        ends.append(cloned_state(graph.whole))
        assert held and (graph.model is not graph.whole) == compact
        graph.passer.recorder.close()
    for name, value in ends[0].items():
        if not name.endswith(("running_mean", "running_var")):  # of removed channels
            torch.testing.assert_close(value, ends[1][name], rtol=5e-2, atol=2e-3)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("arch", ["res20s", "vit_tiny"])
def test_a_criterion_gives_the_scores_that_it_gives_on_the_processor(arch, criterion):
    torch.manual_seed(0)
    model = build_model(arch, 10, 32)
    groups, state = unit_groups(model), cloned_state(model)
    alive = {n: torch.ones_like(p) for n, p in state.items() if p.ndim > 1}
    batch = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))
    scores = []
    for device in ("cpu", CARD):
        there = copy.deepcopy(model).to(device)
        evidence = collect_evidence(there, groups, state, alive, criterion, [tuple(part.to(device) for part in batch)])
        scores.append(score_units(groups, evidence, criterion))
    for name, wanted in scores[0].items():
        torch.testing.assert_close(scores[1][name].cpu(), wanted.cpu(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("arch", ["res20s", "vit_tiny"])
def test_a_shrunk_network_gives_the_logits_of_the_masked_one(arch):
    torch.manual_seed(0)
    model = build_model(arch, 10, 32).to(CARD).eval()
    masks = {n: m.to(CARD) for n, m in random_structure(model, 3, 0.5).items()}
    images = torch.rand(8, 3, 32, 32, device=CARD)
    small = shrink(model, {n: m.cpu() for n, m in masks.items()}).network
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
        torch.testing.assert_close(small(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["micro_cnn", "micro_vit"])
def test_a_run_that_is_stopped_again_and_again_is_the_run(arch, tmp_path, monkeypatch, deterministic):
    """The whole program, recorded, with two rounds; the checkpoints of the end agree bit for bit."""
    words = {"arch": arch, "step": "graph", "deterministic": True, "epochs": 2, "batch_size": 16, "device": "cuda"}
    words |= {"vit_structured": True} if arch == "micro_vit" else {}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 11, lambda turn: tiny(tmp_path / "parts", **words)) > 1
    ends = [torch.load(tmp_path / n / "1checkpoint.pth.tar", weights_only=True) for n in ("through", "parts")]
    assert_same(ends[0]["state_dict"], ends[1]["state_dict"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_in_every_number_type_learns(precision, tmp_path):
    words = {"precision": precision, "device": "cuda", "step": "graph", "epochs": 6, "batch_size": 16}
    assert run(*tiny(tmp_path, **words)) == 0
    end = torch.load(tmp_path / "1checkpoint.pth.tar", weights_only=True)
    assert end["history"][-1]["loss"] < 0.8 * end["history"][0]["loss"]


def test_the_automatic_number_type_computes():
    precision = choose_precision("auto", CARD)
    graph, _ = cases("micro_cnn", precision=precision)
    assert (graph.passer.scale is not None) == (precision == torch.float16) == isinstance(graph.passer.scale, LossScale)
    first, *_, last = graph.train(epochs=range(6))
    assert float(last[0]) < float(first[0])
    graph.passer.recorder.close()


def test_another_loss_and_a_strong_penalty_are_recorded_too(deterministic):
    """With a learning rate and a lambda that change in every step."""
    graph, eager = cases("dropping", "adamw", reg_granularity_prune=0.9)
    graph.criterion = eager.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    ours, theirs = trained(graph, [0, 1]), trained(eager, [0, 1])
    assert graph_of(graph) is not None
    assert_same(ours[1], theirs[1])
    graph.passer.recorder.close()
