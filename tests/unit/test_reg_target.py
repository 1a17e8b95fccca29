"""`--reg_target unit`: all of a doomed unit fades out together, what L1 had removed from it included."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import run, tiny
from helpers.networks import MiniVGG
from helpers.structures import RULES, settings

from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.held import doomed_whole
from structured_tickets.pruning.masks import MaskPair
from structured_tickets.runs.folder import RunFolder
from structured_tickets.training.epoch import Passer
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import Slice, UnitGroup, kept_units, rows

UNITS = ("channel",)


def small_pair():
    """Four units of two weights and a bias: kept; doomed with both weights, with one, and with none."""
    group = UnitGroup("conv", "channel", (rows("conv", 4), rows("norm", 4, "bias", ranked=False)))
    current = {
        "conv.weight": torch.tensor([[1.0, 0], [1, 1], [0, 1], [0, 0]]),
        "norm.bias": torch.tensor([1.0, 1, 1, 0]),
    }
    refill = {
        "conv.weight": torch.tensor([[1.0, 1], [0, 0], [0, 0], [0, 0]]),
        "norm.bias": torch.tensor([1.0, 0, 0, 0]),
    }
    return [group], MaskPair(current, refill)


def test_by_hand():
    groups, pair = small_pair()
    whole = doomed_whole(groups, pair, UNITS)
    assert whole.doomed["conv.weight"].int().tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
    assert pair.doomed["conv.weight"].int().tolist() == [[0, 0], [1, 1], [0, 1], [0, 0]]
    assert whole.dead["conv.weight"].int().tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    assert whole.doomed["norm.bias"].int().tolist() == [0, 1, 1, 0]
    assert torch.equal(whole.structure["conv.weight"], pair.structure["conv.weight"])
    assert whole.refilled["conv.weight"].int().tolist() == [[0, 1], [0, 0], [0, 0], [0, 0]]


def test_kinds_that_are_not_pruned_are_left_alone():
    groups, pair = small_pair()
    assert torch.equal(doomed_whole(groups, pair, ("head",)).current["conv.weight"], pair.current["conv.weight"])


def test_in_a_network_doomed_units_are_doomed_in_every_weight_and_follow_one_lambda():
    model = MiniVGG()
    groups = unit_groups(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    pair = decide(model, groups, RULES, 0, ranked=weights, trained=weights, previous=None, batches=[])
    whole = doomed_whole(groups, pair, UNITS)
    seen = 0
    for group in groups:
        inside = kept_units(group, pair.structure)
        for part in group.slices:
            doomed = whole.doomed[part.name].movedim(part.axis, 0)[part.index].flatten(1)
            gone = (~inside) & kept_units(group, pair.current)
            assert bool(doomed[gone].all()) and not bool(doomed[~gone].any()), part.name
            seen += int(gone.sum()) * (part.param == "bias")
    assert seen > 4, "BatchNorm's and the convolutions' biases too"
    args = settings(exponents=1)
    pruner = Pruner(model, args, Passer(args, whole.current, whole.refill))
    pruner.strength = 0.25
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pruner.shrink(1.0)
    for name, value in model.named_parameters():
        expected = (
            torch.where(whole.doomed[name], 0.75 * before[name], before[name]) if name in whole.doomed else before[name]
        )
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)


def test_a_run_lets_them_live_and_fade(tmp_path):
    """With a constant decoupled lambda of all, every doomed weight ends at the same share of where it began, or below."""
    words = {
        "struct": "rsst",
        "penalty": "decoupled",
        "epochs": 3,
        "fade_out": 0,
        "compact_training": "false",
        "lr": 0.02,
    }
    for target in ("weight", "unit"):
        assert run(*tiny(tmp_path / target, reg_target=target, **words)) == 0
    states = {t: RunFolder.load(tmp_path / t / "1checkpoint.pth.tar") for t in ("weight", "unit")}
    masks = [s.masks for s in states.values()]
    assert all(torch.equal(m, masks[1].structure[n]) for n, m in masks[0].structure.items()), "one decision"
    alive = {t: sum(int((s.state_dict[n] != 0).sum()) for n in masks[0].structure) for t, s in states.items()}
    assert alive["unit"] > alive["weight"], "weights that L1 removed from doomed units live again"
    ratios = [s.rounds[-1]["squeeze_ratio"] for s in states.values()]
    assert all(0 < r < 1 for r in ratios)


@pytest.mark.parametrize("words", [{"struct": "refill"}, {"struct": "imp"}])
def test_unread_it_says_so(words, tmp_path, capsys):
    assert run(*tiny(tmp_path, reg_target="unit", pruning_times=1, **words)) == 0
    assert "--reg_target" in capsys.readouterr().err


def test_slices_across_the_second_axis_come_along():
    """A unit's weights in the next layer are of the unit too."""
    group = UnitGroup("fc1", "neuron", (rows("fc1", 2), Slice("fc2", 1, torch.tensor([[0], [1]]))))
    current = {"fc1.weight": torch.tensor([[1.0], [1.0]]), "fc2.weight": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}
    refill = {"fc1.weight": torch.tensor([[1.0], [0.0]]), "fc2.weight": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}
    whole = doomed_whole([group], MaskPair(current, refill), ("neuron",))
    assert whole.doomed["fc2.weight"].int().tolist() == [[0, 1], [0, 1]]


def test_where_dead_weights_are_free_what_is_unread_changes_nothing(tmp_path):
    """Neither --reg_target nor --fade_out is read with --rsst_dead free, as the warnings say."""
    words = {"rsst_dead": "free", "penalty": "decoupled", "epochs": 2}
    found = []
    for name, other in (("plain", {}), ("unit", {"reg_target": "unit"}), ("fade", {"fade_out": 0.9})):
        assert run(*tiny(tmp_path / name, **words, **other)) == 0
        found.append(RunFolder.load(tmp_path / name / "1checkpoint.pth.tar").state_dict)
    assert all(torch.equal(found[0][n], state[n]) for state in found[1:] for n in found[0])
