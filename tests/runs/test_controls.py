"""Controls: as large as the ticket, other than it, and reproducible."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs, equal
from helpers.interruptions import stopped_again_and_again

from structured_tickets.networks import build_model
from structured_tickets.pruning.controls import controlled
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.methods import CONTROLS
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.pruning.shares import kept_per_group
from structured_tickets.runs.folder import RunFolder
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import kept_units

REAL = [c for c in CONTROLS if c != "none"]
RULES = RoundRules("rsst", 0.4, "round", "magnitude")
NETWORKS = {"res20s": ("channel",), "mobilenet": ("channel",), "vit_tiny": ("head", "neuron")}
MATCHED = {**NETWORKS, "micro_vit": ("head", "neuron")}


def found(arch, targets, struct="rsst", rounds=1, **rules):
    """A network, its groups, and the masks of each of so many rounds (all of the initial weights)."""
    torch.manual_seed(1)
    model = build_model(arch, 10, 16)
    groups = unit_groups(model, blocks="block" in targets)
    weights = {n: v.detach() for n, v in model.state_dict().items()}
    rules = dataclasses.replace(RULES, struct=struct, targets=targets, mlp_prune_ratio=0.4, **rules)
    pairs, previous = [], None
    for k in range(rounds):
        previous = decide(model, groups, rules, k, ranked=weights, trained=weights, previous=previous, batches=[])
        pairs.append(previous)
    return model, groups, pairs


def control(kind, pair, model, groups, targets, seed=0, state=0):
    return controlled(kind, pair, model, groups, targets, seed=seed, state=state, image_size=16)


def same(one, other):
    return equal(one.current, other.current) and equal(one.refill, other.refill)


@pytest.mark.parametrize("kind", ["random_structure", "permute"])
@pytest.mark.parametrize("arch", NETWORKS)
def test_a_permuted_ticket_keeps_its_counts_and_its_units_whole(arch, kind):
    model, groups, (pair,) = found(arch, NETWORKS[arch])
    other = control(kind, pair, model, groups, NETWORKS[arch])
    assert not equal(other.refill, pair.refill) and same(other, control(kind, pair, model, groups, NETWORKS[arch]))
    assert not same(other, control(kind, pair, model, groups, NETWORKS[arch], seed=1))
    assert kept_per_group(groups, other) == kept_per_group(groups, pair)
    for field in ("doomed", "dead", "refilled"):
        ours, theirs = getattr(other, field), getattr(pair, field)
        assert {n: int(m.sum()) for n, m in ours.items()} == {n: int(m.sum()) for n, m in theirs.items()}, field
    for group in groups:
        flags = kept_units(group, other.structure)
        for part in group.slices:
            lines = other.structure[part.name].movedim(part.axis, 0)[part.index].flatten(1)
            assert torch.equal(lines.bool().any(1), flags) and torch.equal(lines.bool().all(1), flags), part.name


@pytest.mark.parametrize("kind, nested", [("permute", True), ("random_structure", False)])
def test_one_order_for_all_rounds_or_a_new_one_each_time(kind, nested):
    model, groups, pairs = found("res20s", ("channel",), "refill", rounds=2)
    first, second = (control(kind, p, model, groups, ("channel",), state=k) for k, p in enumerate(pairs))
    assert all(bool((second.structure[n] <= m).all()) for n, m in pairs[0].structure.items()) is False
    lost = [bool((second.structure[n] > m).any()) for n, m in first.structure.items()]
    assert not any(lost) if nested else any(lost)


@pytest.mark.parametrize("kind", ["random_structure", "permute"])
def test_without_units_weights_are_shuffled_within_their_layers(kind):
    model, groups, (pair,) = found("vit_tiny", (), "imp", structured=False)
    other = control(kind, pair, model, groups, ())
    assert equal(other.structure, {n: other.current[n] for n in other.structure})
    for part in {p.name: p for g in groups for p in g.slices if p.ranked}.values():
        ours, theirs = other.structure[part.name], pair.structure[part.name]
        assert int(ours.sum()) == int(theirs.sum()) and not torch.equal(ours, theirs)


def test_blocks_change_places():
    model, groups, (pair,) = found("vit_tiny", ("block",), "refill", block_prune_ratio=0.4)
    others = [control("random_structure", pair, model, groups, ("block",), seed=s) for s in range(5)]
    blocks = [g for g in groups if g.kind == "block"]
    counts = [sum(int(kept_units(g, p.structure).sum()) for g in blocks) for p in (pair, *others)]
    assert len(set(counts)) == 1 and 0 < counts[0] < len(blocks)
    assert not all(same(o, pair) for o in others)


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=[pytest.mark.slow] * (a in ("mobilenet", "vit_tiny"))) for a in MATCHED]
)
@torch.no_grad()
def test_the_small_dense_network_has_the_macs_of_the_ticket_and_is_narrowed_alike(arch):
    model, groups, (pair,) = found(arch, MATCHED[arch])
    dense = control("small_dense", pair, model, groups, MATCHED[arch])
    macs, wanted = (cost_of(model, p.structure, 16).macs for p in (dense, pair))
    assert abs(macs - wanted) < 0.03 * wanted
    assert equal(dense.structure, {n: dense.current[n] for n in dense.structure}), "nothing is doomed"
    for kind in MATCHED[arch]:
        counts = [kept_per_group(groups, dense)[g.name] for g in groups if g.kind == kind]
        assert all(len({kept for kept, units in counts if units == size}) == 1 for size in {u for _, u in counts})
        assert max(kept / units for kept, units in counts) - min(kept / units for kept, units in counts) < 0.07
    for group in groups:
        flags = kept_units(group, dense.structure)
        assert bool(flags[0]) and not bool(flags.int().diff().clamp(min=0).any()), "the first units"


def test_reinit_has_the_masks_of_the_ticket():
    model, groups, (pair,) = found("res20s", ("channel",))
    assert control("reinit", pair, model, groups, ("channel",)) is pair


@pytest.fixture(scope="module")
def tickets(tmp_path_factory, finished_run):
    """Method -> the folder of its finished run."""
    folders = {s: tmp_path_factory.mktemp(s) / "run" for s in ("refill", "rsst", "imp")}
    return {s: finished_run(folder, struct=s, pruning_times=3) for s, folder in folders.items()}


def state(folder, k):
    return RunFolder.load(folder / f"{k}checkpoint.pth.tar")


@pytest.mark.parametrize("struct", ["refill", "rsst", "imp"])
@pytest.mark.parametrize("kind", REAL)
def test_a_control_run_begins_after_the_dense_round_of_its_ticket(kind, struct, tickets, tmp_path):
    source = tickets[struct]
    assert run(*tiny(tmp_path, struct=struct, pruning_times=3, control=kind, control_of=source)) == 0
    assert not (tmp_path / "1diverged.pth.tar").exists()
    rows, theirs = (list(csv.DictReader((f / "summary.csv").open())) for f in (tmp_path, source))
    assert len(rows) == 3 and rows[0] == theirs[0], "round 0 is the ticket's"
    ours, its = ([state(folder, k) for k in range(3)] for folder in (tmp_path, source))
    assert equal(ours[1].init_weight, its[1].init_weight) is not CONTROLS[kind].fresh
    assert not equal(ours[1].state_dict, its[1].state_dict)
    assert equal(ours[1].masks.current, its[1].masks.current) is (kind == "reinit")
    for k in (1, 2):
        pair = ours[k].masks
        if kind != "small_dense":
            assert rows[k]["density"] == theirs[k]["density"]
        elif struct != "imp":
            assert float(rows[k]["macs"]) == pytest.approx(float(theirs[k]["macs"]), rel=0.1)
        held = pair.alive if struct == "rsst" else pair.structure
        assert all(not ours[k].state_dict[n][m == 0].any() for n, m in held.items())


@pytest.mark.parametrize("kind", ["reinit", "small_dense"])
def test_a_control_sees_the_images_as_its_ticket_does(kind, tmp_path):
    """Also where a user's network has a normalisation of its own, which is the data set's as soon as there is one."""
    net = tmp_path / "net.py"
    net.write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Norm(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('mean', torch.full((1, 3, 1, 1), 0.5))\n"
        "        self.register_buffer('std', torch.full((1, 3, 1, 1), 0.25))\n"
        "    def forward(self, x):\n"
        "        return (x - self.mean) / self.std\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.normalize, self.conv1, self.conv2 = Norm(), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)\n"
        "        self.fc = nn.Linear(16, classes)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.conv2(self.conv1(self.normalize(x)).relu()).relu().mean((2, 3)))\n"
        "def net(num_classes):\n"
        "    return Net(num_classes)\n"
    )
    words = {"arch": f"{net}:net", "struct": "refill", "lr": 0.01}
    assert run(*tiny(tmp_path / "ticket", **words)) == 0
    assert run(*tiny(tmp_path / "control", **words, control=kind, control_of=tmp_path / "ticket")) == 0
    ours, its = (state(tmp_path / name, 1) for name in ("control", "ticket"))
    for weights in ("state_dict", "init_weight"):
        for name in ("normalize.mean", "normalize.std"):
            assert torch.equal(getattr(ours, weights)[name], getattr(its, weights)[name]), (weights, name)


def test_a_control_run_goes_on_bit_for_bit(tickets, tmp_path, monkeypatch):
    words = {"struct": "rsst", "pruning_times": 3, "control": "random_structure", "control_of": tickets["rsst"]}
    assert run(*tiny(tmp_path / "whole", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 4, lambda _: tiny(tmp_path / "broken", **words)) >= 2
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


def test_the_ticket_is_found_in_its_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*tiny(None)) == 0
    assert run(*tiny(None, control="permute")) == 0
    assert len(list(tmp_path.rglob("summary.csv"))) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"control_of": "nowhere"}, "the run to compare with does not exist"),
        ({"struct": "refill"}, "has another --struct. Only --control may differ"),
        ({"pruning_times": 4}, "has finished 3 of 4 rounds"),
        ({"rate": 0.3}, "has another --mlp_prune_ratio, --rate. Only --control may differ"),
    ],
)
def test_a_control_needs_the_very_run_that_it_is_compared_with(changes, message, tickets, tmp_path, capsys):
    words = {"struct": "rsst", "pruning_times": 3, "control": "permute", "control_of": tickets["rsst"]}
    assert run(*tiny(tmp_path / "run", **{**words, **changes})) == 2
    error = capsys.readouterr().err
    assert "argument --control: " in error and message in error


def test_two_controls_do_not_share_a_folder(tickets, tmp_path, capsys):
    words = {"struct": "rsst", "pruning_times": 3, "control_of": tickets["rsst"]}
    assert run(*tiny(tmp_path, control="permute", **words)) == 0
    assert run(*tiny(tmp_path, control="reinit", **words)) == 2
    assert "argument --control: the run in this folder used permute, not reinit" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{}, {"dry_run": True}])
def test_a_control_without_its_ticket_is_refused_and_nothing_is_written(more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*tiny(None, control="reinit", **more)) == 2
    assert "; first run the same command without --control" in capsys.readouterr().err
    assert run(*tiny(None, resume=True)) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_small_dense_network_is_not_warned_of_a_weak_penalty(tmp_path, capsys):
    words = {"struct": "rsst", "pruning_times": 3, "penalty": "gradient"}
    assert run(*tiny(tmp_path / "ticket", **words)) == 0
    assert "the penalty is too weak" in capsys.readouterr().err
    words["control_of"] = tmp_path / "ticket"
    assert run(*tiny(tmp_path / "dense", control="small_dense", **words)) == 0
    assert "the penalty is too weak" not in capsys.readouterr().err
    assert run(*tiny(tmp_path / "other", control="permute", **words)) == 0
    assert "the penalty is too weak" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["reinit", "small_dense"])
def test_new_initial_weights_have_to_be_new(kind, tmp_path, capsys):
    (tmp_path / "seeded.py").write_text("""
import torch
from torch import nn


def net(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
""")
    words = {"arch": f"{tmp_path / 'seeded.py'}:net", "struct": "refill"}
    assert run(*tiny(tmp_path / "ticket", **words)) == 0
    assert run(*tiny(tmp_path / "control", control=kind, control_of=tmp_path / "ticket", **words)) == 2
    assert "has fixed initial weights" in capsys.readouterr().err
