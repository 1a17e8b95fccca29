"""Every method as a whole run: what its masks keep, what they depend on, and that it goes on bit for bit."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
import yaml
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs, equal
from helpers.images import few_images
from helpers.interruptions import stopped_again_and_again
from helpers.networks import MICRO

from structured_tickets.export import ticket as ticket_files
from structured_tickets.export.deployed import load
from structured_tickets.networks import build_model
from structured_tickets.programs import export
from structured_tickets.pruning import oneshot as oneshot_pruners
from structured_tickets.pruning.masks import by_parameter, count_ones
from structured_tickets.pruning.methods import METHODS
from structured_tickets.pruning.shares import kept_per_kind
from structured_tickets.runs import epochs as epochs_of_runs
from structured_tickets.runs import experiment
from structured_tickets.runs.folder import RunFolder
from structured_tickets.training.epoch import train
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import ranked_names

RATE, ROUNDS = 0.4, 3
TRANSFORMER = {"optimizer": "adamw", "lr": 0.001, "rate_mode": "round", "batch_size": 16, "precision": "fp32"}
NETWORKS = {
    "micro_cnn": {"batch_size": 16},
    "micro_vit": TRANSFORMER,
    "res20s": {"batch_size": 256},
    "vit_tiny": TRANSFORMER,
}
TRANSFORMERS = ("micro_vit", "vit_tiny")
ARCHS = [a if a in MICRO else pytest.param(a, marks=pytest.mark.slow) for a in NETWORKS]
BEFORE_TRAINING = [m for m, row in METHODS.items() if row.ranks == "initial"]
UNREGROUPED = [m for m, row in METHODS.items() if not row.regroups]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    """Few images but for a CNN that users train, and a fast SynFlow."""
    monkeypatch.setattr(oneshot_pruners, "SYNFLOW_ROUNDS", 5)
    if "res20s" not in request.node.name:
        few_images(monkeypatch)


def words(folder, struct, arch="micro_cnn", regroup=False, **more):
    settings = {
        "struct": struct,
        "arch": arch,
        "rate": RATE,
        "pruning_times": ROUNDS,
        "admm_epochs": 1,
        "regroup": regroup,
        **NETWORKS[arch],
    }
    regroups = regroup or METHODS[struct].regroups
    if arch in TRANSFORMERS and regroups:
        settings |= {"vit_prune_target": "both", "vit_structured": METHODS[struct].regroups}
    return tiny(folder, **{**settings, **more})


def state(folder, k):
    return RunFolder.load(folder / f"{k}checkpoint.pth.tar")


def masks_decided(folder, k):
    """What the run decided when round k had ended: current, refill, by parameter name."""
    following = state(folder, k).following
    return following.current, following.refill


def network(arch):
    torch.manual_seed(0)
    model = build_model(arch, 10, 8)
    return model, unit_groups(model)


CASES = [(s, r) for s in METHODS for r in (False, True) if not (r and METHODS[s].regroups)]


def _every_case_once():
    """Each method on one of the small networks, in turn, and regrouped on the other; the rest is slow."""
    for k, (struct, regroup) in enumerate(CASES):
        for arch in NETWORKS:
            often = arch == MICRO[(k + regroup) % 2] or (METHODS[struct].regroups and arch in MICRO)
            yield pytest.param(struct, regroup, arch, marks=[] if often else pytest.mark.slow)


@pytest.mark.parametrize("struct, regroup, arch", list(_every_case_once()))
def test_three_rounds_start_from_the_ticket_and_have_the_density_of_the_rate(
    arch, struct, regroup, tmp_path, monkeypatch
):
    starts = []

    def watching(k, loader, model, *rest):
        starts.append({n: v.clone() for n, v in model.state_dict().items()})
        return train(k, loader, model, *rest)

    monkeypatch.setattr(epochs_of_runs, "train", watching)
    assert run(*words(tmp_path, struct, arch, regroup, compact_training="false")) == 0
    model, groups = network(arch)
    names = ranked_names(model, groups)
    ticket = torch.load(tmp_path / "init.pth.tar", weights_only=True)
    left = total = sum(ticket[n].numel() for n in names)
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert len(starts) == len(rows) == ROUNDS
    for k in range(ROUNDS):
        saved = state(tmp_path, k)
        assert equal(saved.init_weight, ticket)
        held = {}
        if k:
            pair = saved.masks
            held = pair.alive if struct == "rsst" else pair.structure
            assert count_ones(by_parameter(pair.current), names) == left
            if regroup or METHODS[struct].regroups:
                assert any(not torch.equal(by_parameter(pair.current)[n], pair.structure[n]) for n in names)
            else:
                assert equal(by_parameter(pair.current), pair.structure)
                assert float(rows[k]["density"]) == pytest.approx(100 * left / total, abs=1e-9)
            assert json.loads(rows[k]["kept_units"]) == {m: list(v) for m, v in kept_per_kind(groups, pair).items()}
            assert count_ones(pair.structure, names) == pytest.approx(float(rows[k]["density"]) / 100 * total, abs=0.5)
        left -= round(RATE * left)
        assert float(rows[k]["remain_weight_after"]) == pytest.approx(100 * left / total, abs=1e-9)
        for name, value in starts[k].items():
            assert torch.equal(value, ticket[name] * held[name] if name in held else ticket[name]), (k, name)
        for name, mask in held.items():
            assert not saved.state_dict[name][mask == 0].any()


# At every change each method with one of the two networks of the tests, in turn.
TAKEN_IN_TURN = [
    pytest.param(a, s, marks=[pytest.mark.slow] * (a != MICRO[k % 2]))
    for k, s in enumerate(BEFORE_TRAINING)
    for a in NETWORKS
]


@pytest.mark.parametrize("arch, struct", TAKEN_IN_TURN)
def test_masks_made_before_training_do_not_depend_on_what_was_trained(arch, struct, tmp_path):
    for name, epochs, lr in (("a", 1, 0.001), ("b", 2, 0.02)):
        assert run(*words(tmp_path / name, struct, arch, epochs=epochs, lr=lr)) == 0
    for k in range(ROUNDS):
        assert equal(state(tmp_path / "a", k).following, state(tmp_path / "b", k).following)
    assert not equal(state(tmp_path / "a", 1).state_dict, state(tmp_path / "b", 1).state_dict)


@pytest.mark.parametrize("struct", ["omp", "admm"])
def test_masks_made_after_the_dense_round_depend_on_it_alone(struct, tmp_path, monkeypatch):
    """The second run trains another way from round 1 on."""
    assert run(*words(tmp_path / "a", struct)) == 0

    def spoilt(k, loader, model, *rest):
        meter = train(k, loader, model, *rest)
        with torch.no_grad():
            for parameter in model.parameters() if k else ():
                parameter.mul_(1.5)
                parameter.add_(torch.randn_like(parameter))
        return meter

    monkeypatch.setattr(epochs_of_runs, "train", spoilt)
    monkeypatch.setattr("structured_tickets.pruning.masks.HeldMask.broken", lambda self: [])
    assert run(*words(tmp_path / "b", struct, compact_training="false")) == 0
    for k in range(ROUNDS):
        assert equal(state(tmp_path / "a", k).following, state(tmp_path / "b", k).following), k
    assert not equal(state(tmp_path / "a", 1).state_dict, state(tmp_path / "b", 1).state_dict)


@pytest.mark.parametrize("struct", ["omp", "random"])
def test_their_masks_are_nested(struct, tmp_path):
    assert run(*words(tmp_path, struct)) == 0
    first, second = (masks_decided(tmp_path, k)[0] for k in (0, 1))
    assert all(bool((second[n] <= first[n]).all()) for n in first)
    assert any(bool((second[n] < first[n]).any()) for n in first)


def test_omp_and_imp_agree_on_the_first_mask_and_then_part(tmp_path):
    for struct in ("omp", "imp"):
        assert run(*words(tmp_path / struct, struct)) == 0
    for k, same in ((0, True), (1, False)):
        assert equal(state(tmp_path / "omp", k).following, state(tmp_path / "imp", k).following) is same


def test_random_masks_differ_from_seed_to_seed(tmp_path):
    for seed in (0, 1):
        assert run(*words(tmp_path / str(seed), "random", seed=seed, pruning_times=1)) == 0
    assert not equal(state(tmp_path / "0", 0).following, state(tmp_path / "1", 0).following)


@pytest.mark.parametrize(
    "struct, regroup",
    [("snip", False), ("omp", True), ("admm", False), pytest.param("synflow", True, marks=pytest.mark.slow)],
)
def test_stopped_again_and_again_it_ends_bit_for_bit_the_same(struct, regroup, tmp_path, monkeypatch):
    more = {"admm_epochs": 2, "batch_size": 6}
    assert run(*words(tmp_path / "whole", struct, regroup=regroup, **more)) == 0
    command = lambda _: words(tmp_path / "broken", struct, regroup=regroup, **more)  # noqa: E731
    assert stopped_again_and_again(monkeypatch, 6 if struct == "admm" else 3, command) >= 2
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("after", [0, 1])
def test_stopped_while_admm_trains_it_goes_on_and_ends_the_same(after, tmp_path, monkeypatch, capsys):
    more = {"admm_epochs": 3, "batch_size": 6}
    assert run(*words(tmp_path / "whole", "admm", **more)) == 0
    real = experiment.StopRequest.obey
    stops = []

    def obey(self, where):
        stops.append(where == f"while ADMM trained after round {after}")
        if sum(stops) == 5:  # in the second of three epochs of three batches
            self.signal = 15
        real(self, where)

    monkeypatch.setattr(experiment.StopRequest, "obey", obey)
    assert run(*words(tmp_path / "broken", "admm", **more)) == 143
    assert (
        f"stopped while ADMM trained after round {after}. The state is saved; run the same command again to continue"
        in capsys.readouterr().err
    )
    assert (tmp_path / "broken" / "progress.pth.tar").exists()
    assert run(*words(tmp_path / "broken", "admm", **more)) == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")
    assert not (tmp_path / "broken" / "progress.pth.tar").exists()


@pytest.mark.parametrize(
    "arch, struct, regroup",
    [
        ("micro_cnn", "imp", False),
        ("micro_cnn", "snip", True),
        ("micro_vit", "omp", False),
        ("micro_vit", "random", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("res20s", "imp", False),
                ("res20s", "snip", True),
                ("vit_tiny", "omp", False),
                ("vit_tiny", "random", True),
            )
        ),
    ],
)
def test_the_exported_network_is_the_masked_one(arch, struct, regroup, tmp_path, capsys):
    assert run(*words(tmp_path / "run", struct, arch, regroup, pruning_times=2, rate=0.8)) == 0
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    ticket = ticket_files.read_ticket(tmp_path / "run")
    small, images = load(tmp_path / "out"), torch.rand(3, 3, 8, 8)
    for name, mask in ticket.structure.items():
        assert not ticket.masked.get_parameter(name).detach()[mask == 0].any()
    with torch.no_grad():
        assert (small(images) - ticket.masked(images)).abs().max() <= 1e-4
    whole, left = (sum(p.numel() for p in m.parameters()) for m in (ticket.masked, small))
    assert left < whole if regroup else left <= whole
    if regroup:
        assert left == RunFolder(tmp_path / "run").newest_run().rounds[-1]["parameters"]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("struct", METHODS)
def test_a_dry_run_prints_the_density_of_every_round(arch, struct, tmp_path, capsys):
    assert run(*words(tmp_path / "run", struct, arch, dry_run=True)) == 0
    plan = capsys.readouterr().out
    densities = [float(found) for found in re.findall(r"^ +\d+ +([\d.]+)%  ", plan, re.MULTILINE)]
    assert len(densities) == ROUNDS and densities[0] == 100
    if not METHODS[struct].regroups:
        assert densities == [100.0, 60.0, 36.0]
    assert densities[0] > densities[1] > densities[2] > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "struct, given, criterion",
    [
        *((s, {"regroup": True}, "remain") for s in UNREGROUPED),
        ("imp", {}, "l1"),
        ("refill", {}, "l1"),
        ("rsst", {}, "l1"),
        ("snip", {"regroup": True, "criteria": "l2"}, "l2"),
    ],
)
def test_regrouping_asks_the_pruner_unless_told_otherwise(struct, given, criterion, tmp_path):
    assert run(*words(tmp_path, struct, pruning_times=1, **given)) == 0
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["criteria"] == criterion
