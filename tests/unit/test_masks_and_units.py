"""The nouns: slices, groups, masks. Answers small enough for mental arithmetic."""

from __future__ import annotations

import pytest
import torch
from helpers.networks import SMALL, MiniVGG

from structured_tickets.networks import build_model
from structured_tickets.pruning.masks import (
    HeldMask,
    MaskPair,
    apply_masks,
    by_parameter,
    check_mask,
    count_ones,
    effective_state,
    effective_weight,
    l1_mask,
    pruning_state,
    remove_masks,
    top_mask,
)
from structured_tickets.unit_groups.channels import channel_groups
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import Slice, UnitGroup, kept_units, ranked_names
from vit_pruning_utils import head_groups, neuron_groups, vit_groups

LARGER = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("densenet161", "vit_small")]


@pytest.mark.parametrize("arch", [*SMALL, *LARGER])
def test_no_position_belongs_to_two_units_and_a_groups_own_layer_is_all_its(arch):
    model = build_model(arch, 10, 32)
    owned: dict = {}
    for group in unit_groups(model):
        for part in group.slices:
            size = model.get_parameter(part.name).shape[part.axis]
            assert part.index.shape[0] == group.units and int(part.index.max()) < size
            owned.setdefault((part.name, part.axis), []).extend(part.index.flatten().tolist())
        assert sorted(group.root.index.flatten().tolist()) == list(range(model.get_parameter(group.root.name).shape[0]))
    assert all(len(set(places)) == len(places) for places in owned.values())


def test_a_channel_is_its_filter_and_the_batchnorm_behind_it():
    groups = {g.name: g for g in channel_groups(build_model("res20s", 10, 32))}
    assert [s.name for s in groups["layer2.0.conv1"].slices] == [
        "layer2.0.conv1.weight",
        "layer2.0.bn1.weight",
        "layer2.0.bn1.bias",
    ]
    assert "conv1" not in groups
    assert "conv1" in {g.name for g in channel_groups(build_model("res20s", 10, 32), conv1=True)}


def test_a_convolution_without_batchnorm_takes_its_bias_along():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3, bias=False))
    assert [[s.name for s in g.slices] for g in channel_groups(model)] == [["0.weight", "0.bias"], ["2.weight"]]


def test_a_head_owns_rows_of_q_k_and_v_and_columns_of_proj():
    model = build_model("vit_tiny", 10, 32)
    group = head_groups(model)[0]
    qkv, proj = group.slices
    assert group.units == 3
    assert qkv.index[1].tolist() == [*range(64, 128), *range(256, 320), *range(448, 512)]
    assert (proj.axis, proj.index[2].tolist()) == (1, list(range(128, 192)))


def test_a_neuron_owns_a_row_of_fc1_and_a_column_of_fc2():
    fc1, fc2 = neuron_groups(build_model("vit_tiny", 10, 32))[0].slices
    assert (fc1.axis, fc2.axis) == (0, 1)
    assert fc1.index.shape == fc2.index.shape == (384, 1)


def test_spread_turns_flags_into_a_mask_of_whole_units():
    part = Slice("layer", 1, torch.tensor([[0, 2], [1, 3]]))
    assert part.spread(torch.tensor([True, False]), torch.empty(2, 4)).tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]


def test_ranked_names_come_in_module_order_and_leave_normalisation_out():
    names = ranked_names(model := build_model("res20s", 10, 32), channel_groups(model))
    assert names[:2] == ["layer1.0.conv1.weight", "layer1.0.conv2.weight"]
    assert len(names) == 18
    vit = build_model("vit_tiny", 10, 32)
    assert len(ranked_names(vit, vit_groups(vit))) == 36
    assert ranked_names(vit, vit_groups(vit, prune_patch_embed=True))[0] == "patch_embed.proj.weight"


def test_kept_units_reads_the_mask_of_the_first_slice():
    group = UnitGroup("layer", "neuron", (Slice("layer", 0, torch.tensor([[0], [1], [2]])),))
    assert kept_units(group, {group.root.name: torch.tensor([[0, 0], [0, 1], [1, 1]])}).tolist() == [False, True, True]


def test_l1_keeps_an_exact_count_and_of_ties_the_first():
    weights = {"a.weight": torch.tensor([1.0, -2.0, 2.0]), "b.weight": torch.tensor([[2.0, -0.5]])}
    mask = l1_mask(weights, None, 2)
    assert (mask["a.weight"].tolist(), mask["b.weight"].tolist()) == ([0, 1, 1], [[0, 0]])


def test_l1_never_keeps_the_dead_not_even_a_large_one():
    weights, alive = {"a.weight": torch.tensor([9.0, 0.0, 1.0])}, {"a.weight": torch.tensor([0.0, 1.0, 1.0])}
    assert l1_mask(weights, alive, 2)["a.weight"].tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="only 2 are alive"):
        l1_mask(weights, alive, 3)


def test_top_mask_minds_the_sign():
    assert top_mask({"a": torch.tensor([-9.0, 1.0, 0.0])}, None, 1)["a"].tolist() == [0, 1, 0]


def test_a_mask_refuses_what_is_not_a_mask():
    with pytest.raises(ValueError, match=r"m\['a'\] holds values other than 0 and 1"):
        check_mask({"a": torch.tensor([0.5])}, "m")
    with pytest.raises(TypeError, match="is a list"):
        check_mask({"a": [1]})  # type: ignore[dict-item]


def test_a_mask_pair_refuses_masks_of_different_things():
    ones = torch.ones(2)
    with pytest.raises(ValueError, match="different parameters"):
        MaskPair({"a.weight_mask": ones}, {"b": ones})
    with pytest.raises(ValueError, match="different shapes"):
        MaskPair({"a.weight_mask": ones}, {"a": torch.ones(3)})


def test_doomed_dead_and_refilled():
    pair = MaskPair({"a.weight_mask": torch.tensor([0.0, 0, 1, 1])}, {"a": torch.tensor([0.0, 1, 0, 1])})
    assert pair.dead["a.weight"].tolist() == [True, False, False, False]
    assert pair.refilled["a.weight"].tolist() == [False, True, False, False]
    assert pair.doomed["a.weight"].tolist() == [False, False, True, False]
    assert pair.alive["a.weight"].tolist() == [0, 1, 1, 1]


def test_names_of_masks():
    masks = {"a.b.weight_mask": 1, "a.b": 2, "c.bias": 3, "c.bias_mask": 4}
    assert set(by_parameter(masks)) == {"a.b.weight", "c.bias"}  # type: ignore[arg-type]


def test_effective_weights_of_plain_and_masked_states():
    state = {"a.weight_orig": torch.tensor([2.0, 3.0]), "a.weight_mask": torch.tensor([1.0, 0.0]), "b": torch.ones(1)}
    assert effective_weight(state, "a.weight").tolist() == [2, 0]
    assert set(effective_state(state)) == {"a.weight", "b"}
    with pytest.raises(KeyError, match="no weights for c"):
        effective_weight(state, "c")


def test_pruning_state_saves_the_keys_of_torch_pruning():
    plain = {"a.weight": torch.tensor([2.0, 0.0]), "b": torch.ones(1)}
    saved = pruning_state(plain, {"a.weight": torch.tensor([1.0, 0.0])})
    assert list(saved) == ["a.weight_orig", "a.weight_mask", "b"]
    assert torch.equal(effective_state(saved)["a.weight"], plain["a.weight"])


def test_apply_and_remove_masks():
    model = MiniVGG()
    mask = torch.ones_like(model.features[0].weight)
    mask[3] = 0
    apply_masks(model, {"features.0.weight": mask})
    assert model.features[0].weight[3].abs().sum() == 0
    assert "features.0.weight_orig" in model.state_dict()
    remove_masks(model, ["features.0.weight", "features.4.weight"])
    assert "features.0.weight" in model.state_dict()
    assert model.features[0].weight[3].abs().sum() == 0
    with pytest.raises(ValueError, match="has shape"):
        apply_masks(model, {"features.0.weight": torch.ones(2)})


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_held_entries_stay_zero_through_momentum_and_decay(optimizer):
    layer = torch.nn.Linear(4, 4)
    mask = torch.eye(4)
    held = HeldMask(layer_in := torch.nn.Sequential(layer), {"0.weight": mask, "0.bias": torch.ones(4)})
    assert held.names == ["0.weight"]
    assert held.broken() == ["0.weight"]
    held.apply()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    step = optimizer(layer_in.parameters(), lr=0.1, weight_decay=0.1, **options)
    for _ in range(5):
        step.zero_grad()
        layer(torch.randn(3, 4)).square().sum().backward()
        step.step()
        held.apply()
    assert held.broken() == []
    assert bool((layer.weight.detach()[mask == 1] != 0).all())


@pytest.mark.parametrize("values", ["continuous", "few", "sorted", "periodic", "outliers"])
def test_among_many_weights_exactly_the_largest_stay(values):
    n = 600_000
    scores = {
        "continuous": lambda: torch.randn(n).abs(),
        "few": lambda: torch.randint(0, 3, (n,)).float(),
        "sorted": lambda: torch.arange(n).float(),
        "periodic": lambda: (torch.arange(n) % 9 == 0).float() * torch.rand(n),
        "outliers": lambda: torch.cat([torch.full((9,), 1e9), torch.zeros(n - 9)]),
    }[values]()
    for keep in (1, 5, 1000, n // 3, n - 1, n):
        best = torch.zeros(n)
        best[scores.sort(descending=True, stable=True).indices[:keep]] = 1
        assert torch.equal(top_mask({"a": scores}, None, keep)["a"], best)


def test_ones_are_counted_exactly_in_large_masks():
    size = 2**24 + 1
    assert count_ones({"a": torch.ones(1).expand(size)}, ["a"]) == size
