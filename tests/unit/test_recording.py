"""Recordings, on a stand-in for CUDA graphs: when they are made, proved, replayed and given up, and what is said."""

from __future__ import annotations

import copy
import logging
import random

import numpy
import pytest
import torch
from helpers.commands import run, tiny
from helpers.fake_graphs import FakeGraphs
from helpers.steps import Case, Dropping, assert_same
from torch import nn

from structured_tickets.base.distributed import ALONE, World
from structured_tickets.base.errors import MachineError, UsageError
from structured_tickets.data.loader import BatchLoader
from structured_tickets.training import recording
from structured_tickets.training.epoch import validate_together
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.recording import Recorder, Recording, disagreement, recorder_for

LONG = 20  # epochs: more than 50 steps are left at the beginning
STEPS = ["watched", "capture", "replay"]


@pytest.fixture(autouse=True)
def _nothing_has_failed_or_been_said(monkeypatch):
    monkeypatch.setattr(Recording, "failed", "")
    monkeypatch.setattr(recording, "_SAID", set())


def recorded(graphs=None, insists=False, **words):
    """A case whose steps are recorded, and the stand-in; batches of 8, four of them and a short one."""
    graphs = graphs or FakeGraphs()
    return Case(recorder=Recorder(graphs, insists), images=36, **{"epochs": LONG, **words}), graphs


def recording_of(case) -> Recording:
    (found,) = [r for r in case.passer.recorder._recordings.values() if r.body.name == "the step"]
    return found


@pytest.mark.parametrize("handed_in", [False, True])
@pytest.mark.parametrize("arch, optimizer", [("micro_cnn", "sgd"), ("micro_vit", "adamw"), ("dropping", "adamw")])
def test_recorded_epochs_have_the_bits_of_eager_ones(arch, optimizer, handed_in, monkeypatch):
    """Three steps as they are, then the capture, its proof, and replays; the short batch at the end as it is."""
    if handed_in:
        monkeypatch.setattr("structured_tickets.training.epoch.can_be_resident", lambda *_: False)
    if arch == "dropping":  # which draws on the host here; on a card it draws there
        monkeypatch.setattr(recording, "host_random_states", dict)
    case, graphs = recorded(arch=arch, optimizer=optimizer)
    eager = Case(arch, optimizer, images=36, epochs=LONG)
    for each in (case, eager):
        torch.manual_seed(5)
        each.train(epochs=[0, 1])
    assert graphs.events == [*STEPS, *["replay", "keep close"] * 4]
    assert_same(case.values(), eager.values())


def test_adamw_is_capturable_while_it_is_captured_and_never_else():
    seen = []
    look = lambda step: seen.append({g["capturable"] for g in step.optimizer.param_groups})  # noqa: E731
    case, _ = recorded(FakeGraphs(while_captured=look), optimizer="adamw")
    case.train(epochs=[0, 1])
    assert seen == [{True}] and not any(g["capturable"] for g in case.optimizer.param_groups)


def test_gradients_of_the_warm_up_are_not_there_when_a_step_is_captured(monkeypatch):
    seen, real = [], FakeGraphs.capture

    def capture(self, body):
        seen.extend(p.grad for p in body.__self__.model.parameters())
        return real(self, body)

    monkeypatch.setattr(FakeGraphs, "capture", capture)
    case, _ = recorded()
    case.train(epochs=[0])
    assert seen and all(gradient is None for gradient in seen)


class Draws(Dropping):
    """Draws on the host, as layer drop of some libraries does."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        self.draw()
        return super().forward(x)


def as_case(model, **words):
    """A recorded case with another network."""
    case, graphs = recorded(arch="dropping", **words)
    case.model.__class__, case.model.draw = type(model), getattr(model, "draw", None)
    return case, graphs


def said(caplog):
    return [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]


HOST = {"Python": random.random, "NumPy": numpy.random.rand, "torch": lambda: torch.randperm(2)}


@pytest.mark.parametrize("generator", HOST)
def test_a_network_that_draws_on_the_host_is_not_recorded(generator, caplog):
    """On a CPU, torch's generator also draws dropout; there, any draw of the network is one on the host."""
    case, graphs = as_case(Draws(HOST[generator]))
    case.model.drop.p = 0.0
    with caplog.at_level(logging.INFO, "rsst"):
        case.train(epochs=[0, 1])
    assert "capture" not in graphs.events
    (words,) = said(caplog)
    assert words == (
        f"the step is not recorded as a CUDA graph: the network draws from the random numbers of {generator} on the "
        "host. Its kernels start one by one"
    )


def no_momentum(case):
    for layer in case.model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None


def plain_optimizer(case):
    case.optimizer.param_groups[0]["fused"] = False


def no_rate(case):
    case.passer.rate = None


def read_strengths(case):
    case.pruner.advance(LONG, 0, 1)
    assert case.pruner.reg
    case.pruner.advance = lambda *place: None  # lambda stands still


OBSTACLES = {
    "a BatchNorm without momentum counts its batches on the host": no_momentum,
    "SGD is not one of torch's fused optimizers, or sets its own learning rate": plain_optimizer,
    "the penalty's strengths have been read or changed weight by weight": read_strengths,
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_is_known_beforehand_is_said_once(reason, caplog):
    case, graphs = recorded()
    OBSTACLES[reason](case)
    with caplog.at_level(logging.INFO, "rsst"):
        case.train(epochs=[0, 1])
    assert graphs.events == [] and recording_of(case).body.together is None
    assert said(caplog) == [f"the step is not recorded as a CUDA graph: {reason}. Its kernels start one by one"]


def test_a_learning_rate_of_the_callers_is_not_frozen():
    """A scheduler of torch's writes it between two calls."""
    case, graphs = recorded()
    no_rate(case)
    case.train(epochs=[0, 1])
    assert graphs.events == []


def test_several_processes_are_not_recorded():
    case, _ = recorded()
    case.train(epochs=[0])
    case.passer.world = World(0, 2, 0)
    body = recording_of(case).body
    assert body.obstacle() == "several processes train together"


SEEN = {
    "a step waits for the device (net.py:7)": {"waits": "net.py:7"},
    "there is not enough free memory for it beside the network": {"memory": 100, "free": 149},
}


@pytest.mark.parametrize("reason", SEEN)
def test_what_is_seen_while_it_warms_up_is_in_the_way(reason, caplog):
    case, graphs = recorded(FakeGraphs(**SEEN[reason]))
    with caplog.at_level(logging.INFO, "rsst"):
        case.train(epochs=[0, 1])
    assert graphs.events == ["watched"]
    assert said(caplog) == [f"the step is not recorded as a CUDA graph: {reason}. Its kernels start one by one"]
    enough, graphs = recorded(FakeGraphs(memory=100, free=150))
    enough.train(epochs=[0])
    assert "capture" in graphs.events


def test_a_recording_has_to_pay():
    case, graphs = recorded(epochs=12)
    case.train(epochs=[0])  # 4 whole batches in each of 12 epochs: 48
    assert graphs.events == [] and "fewer than 50" in recording_of(case).given_up
    insisting, graphs = recorded(epochs=12, insists=True)
    insisting.train(epochs=[0])
    assert graphs.events == STEPS


def test_what_cannot_be_captured_is_not_tried_again(caplog):
    case, graphs = recorded(FakeGraphs(fails=RuntimeError("operation not permitted\nmore")))
    eager = Case(images=36, epochs=LONG)
    with caplog.at_level(logging.INFO, "rsst"):
        case.train(epochs=[0, 1])
    eager.train(epochs=[0, 1])
    assert graphs.events == ["watched", "capture"] and not graphs.alive
    assert "recording failed (operation not permitted). Its" in said(caplog)[0]
    assert_same(case.values(), eager.values())
    another, graphs = recorded()
    another.train(epochs=[0])
    assert graphs.events == []


def slowly(step):
    with torch.no_grad():
        step.model.fc.weight.add_(1e-2)


def one_bit(step):
    with torch.no_grad():
        step.model.fc.weight.mul_(1 + 2**-20)


def not_counting(step):
    step.at.sub_(1)


WRONG = {"weights": slowly, "place": not_counting}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_replay_that_gives_something_else_is_not_trusted(optimizer, kind, caplog):
    case, graphs = recorded(FakeGraphs(spoils=WRONG[kind]), optimizer=optimizer)
    eager = Case(optimizer=optimizer, images=36, epochs=LONG)
    with caplog.at_level(logging.INFO, "rsst"):
        case.train(epochs=[0, 1])
    eager.train(epochs=[0, 1])
    assert graphs.events == [*STEPS, "close 1", *STEPS[1:], "close 1"] and not graphs.alive
    assert f"its replay gave other {kind} than the step itself" in said(caplog)[0]
    assert [r.levelname for r in caplog.records if "CUDA graph" in r.getMessage()] == ["WARNING"]
    assert_same(case.values(), eager.values())


def test_small_operations_are_made_at_once_only_if_the_step_agrees_with_that_of_single_ones(caplog):
    """Else another recording follows, of the step that makes them one by one."""
    case, graphs = recorded(FakeGraphs(spoils=lambda step: slowly(step) if step.together else None))
    eager = Case(images=36, epochs=LONG)
    with caplog.at_level(logging.INFO, "rsst"):
        case.train(epochs=[0, 1])
    eager.train(epochs=[0, 1])
    again = [*STEPS, "close 1", *STEPS[1:]]
    assert graphs.events[: len(again)] == again and {*graphs.events[len(again) :]} == {"replay", "keep close"}
    assert said(caplog) == [] and recording_of(case).graph is not None
    assert_same(case.values(), eager.values())


@pytest.mark.parametrize("exact", [False, True])
def test_with_deterministic_kernels_every_bit_counts(exact, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: exact)
    case, graphs = recorded(FakeGraphs(spoils=one_bit))
    case.train(epochs=[0])
    assert graphs.events == [*STEPS, *["close 1"] * exact]


def test_what_is_compared():
    ones = {"weights": [torch.ones(100)], "sums": [torch.ones(3)], "place": [torch.ones(1)]}
    moved = {"weights": [torch.full((100,), 0.9)], "sums": [torch.full((3,), 101.0)], "place": [torch.full((1,), 2.0)]}
    assert disagreement(ones, moved, moved, True) == disagreement(ones, moved, moved, False) == ""
    for kind, close, far in (("weights", 5e-5, 5e-4), ("sums", 5.0, 50.0)):
        for gap, exact, wanted in ((close, False, ""), (close, True, kind), (far, False, kind)):
            other = {**moved, kind: [moved[kind][0] + gap]}
            assert disagreement(ones, other, moved, exact) == wanted
    adaptive = {"optimizer's exp_avg": [torch.ones(2)]}
    loose = {**moved, "weights": [moved["weights"][0] + 5e-3]}
    assert disagreement(ones, loose, moved, False) == "weights"
    assert disagreement(ones | adaptive, loose | adaptive, moved | adaptive, False) == ""
    lost = {**moved, "weights": [torch.full((100,), torch.nan)]}
    assert disagreement(ones, lost, moved, False) == "weights"


REFUSED = {"a step waits": FakeGraphs(waits="net.py:7"), "recording failed": FakeGraphs(fails=RuntimeError("no"))}


@pytest.mark.parametrize("reason", REFUSED)
def test_whoever_insists_gets_an_error(reason):
    case, _ = recorded(REFUSED[reason], insists=True)
    with pytest.raises(UsageError, match=rf"--step: graph is not possible, because {reason}.*Use --step auto"):
        case.train(epochs=[0])


def test_graphs_need_a_card():
    cpu, card, two = torch.device("cpu"), torch.device("cuda"), World(0, 2, 0)
    with pytest.raises(MachineError, match="--step: graph needs a CUDA device, but the network is on cpu"):
        recorder_for(cpu, "graph")
    with pytest.raises(UsageError, match="--step: graph is not possible, because several processes train together"):
        recorder_for(card, "graph", two)
    for arguments in ((cpu, "auto"), (card, "eager"), (card, "auto", two)):
        assert recorder_for(*arguments).graphs is None


def test_a_run_that_cannot_be_recorded_leaves_no_folder(tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", step="graph")) == 2
    assert "error: argument --step: graph needs a CUDA device, but the network is on cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluations_are_recorded_beside_the_step_and_end_with_it():
    case, graphs = recorded()
    loader, recorder = BatchLoader(case.data, 8, case.device), case.passer.recorder

    def judge(recorder):
        return validate_together(loader, case.model, case.criterion, ALONE, torch.float32, recorder)

    for epoch in range(3):
        case.train(epochs=[epoch])
        assert judge(recorder) == judge(None)
    assert graphs.events.count("capture") == 2 and len(graphs.alive) == 2
    recorder.close()
    assert graphs.events[-1] == "close 2" and not graphs.alive
    assert all(p.grad is None for p in case.model.parameters())


def test_another_network_ends_all_recordings_of_the_one_before():
    case, graphs = recorded()
    case.train(epochs=[0])
    assert len(graphs.alive) == 1
    case.optimizer = OPTIMIZERS["sgd"].build(case.model, 0.05, 0.9, 0.0)
    case.train(epochs=[1])
    assert graphs.events.count("capture") == 2 and graphs.events.count("close 1") == 1 and len(graphs.alive) == 1


def test_a_state_of_the_optimizer_that_was_loaded_meanwhile_is_recorded_anew():
    """It lies elsewhere then; the recording would go on with the old one."""
    case, graphs = recorded()
    case.train(epochs=[0])
    case.train(epochs=[1])
    assert graphs.events.count("capture") == 1
    case.optimizer.load_state_dict(copy.deepcopy(case.optimizer.state_dict()))
    case.train(epochs=[2])
    assert graphs.events.count("capture") == 2 and len(graphs.alive) == 1


def test_a_run_gives_up_its_recordings_when_the_network_becomes_another_one(monkeypatch, tmp_path):
    """After each round, and when units have faded out."""
    made = []

    def recorder(device, step, world):
        made.append(FakeGraphs())
        return Recorder(made[-1], insists=True)

    monkeypatch.setattr("structured_tickets.runs.round.recorder_for", recorder)
    assert run(*tiny(tmp_path, pruning_times=2, epochs=3, batch_size=16)) == 0
    assert len(made) >= 2
    for graphs in made:
        assert not graphs.alive and graphs.events[-1].startswith("close")
        assert graphs.events.count("capture") == 3  # the step, and two evaluations
