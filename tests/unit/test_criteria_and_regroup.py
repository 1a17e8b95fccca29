"""Criteria judge each unit by its own evidence; regrouping is exact, all or nothing, and changes no input."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from helpers.networks import MiniVGG
from hypothesis import given, settings
from hypothesis import strategies as st

import pruning_utils
from pruning_utils import regroup
from structured_tickets.networks import MODELS, build_model
from structured_tickets.networks.vision_transformer import VisionTransformer
from structured_tickets.pruning.budgets import BUDGETS, budget, global_budget, kept_count, layer_wise_budget
from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.evidence import Evidence
from structured_tickets.pruning.masks import MaskPair, effective_state
from structured_tickets.pruning.regroup import best_units, score_units
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.unit_groups.channels import channel_groups
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import Slice, UnitGroup, rows
from vit_pruning_utils import head_groups, neuron_groups, prune_model_custom_fillback_vit, vit_groups
from vit_pruning_utils_head_mlp import prune_model_custom_fillback_vit_head_and_mlp


def micro_vit():
    return VisionTransformer(10, 32, 8, 24, 2, 3, 2)


def full_masks(model):
    return {f"{n}_mask": torch.ones_like(p) for n, p in model.named_parameters()}


def scores_of(model, groups, criterion, batch):
    evidence = collect_evidence(model, groups, model.state_dict(), full_masks(model), criterion, [batch])
    return score_units(groups, evidence, criterion)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "remain"])
def test_permuting_a_layers_channels_permutes_its_scores_and_no_others(criterion, images_and_labels):
    model = MiniVGG()
    groups = channel_groups(model)
    before = scores_of(model, groups, criterion, images_and_labels)
    order = torch.randperm(16)
    other = copy.deepcopy(model)
    conv, norm, following = other.features[4], other.features[5], other.features[8]
    for tensor in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data = tensor.data[order]
    following.weight.data = following.weight.data[:, order]
    after = scores_of(other, groups, criterion, images_and_labels)
    torch.testing.assert_close(after["features.4"], before["features.4"][order], rtol=1e-4, atol=1e-9)
    for name in ("features.0", "features.8", "features.11"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("criterion", ["l1", "l2"])
@pytest.mark.parametrize("kind", ["channel", "head", "neuron"])
def test_a_unit_that_speaks_ten_times_louder_comes_first(criterion, kind, images_and_labels):
    model = MiniVGG() if kind == "channel" else micro_vit()
    groups = {"channel": channel_groups, "head": head_groups, "neuron": neuron_groups}[kind](model)
    group, unit = groups[1], groups[1].units - 1
    layer = model.get_submodule(group.root.layer)
    with torch.no_grad():
        layer.weight[group.root.index[unit]] *= 10
        layer.bias[group.root.index[unit]] *= 10
    scores = scores_of(model, groups, criterion, images_and_labels)[group.name]
    assert int(scores.argmax()) == unit


@pytest.mark.parametrize("criterion", CRITERIA)
def test_collecting_evidence_leaves_no_trace(criterion, images_and_labels):
    for model, groups in ((MiniVGG(), channel_groups(MiniVGG())), (micro_vit(), vit_groups(micro_vit()))):
        model.train()
        model.get_submodule(groups[0].root.layer).eval()
        masked = groups[1].root.name
        pruning_utils.apply_masks(model, {masked: torch.ones_like(model.get_parameter(masked))})
        weights = {k: v + 0.01 if v.is_floating_point() else v for k, v in effective_state(model.state_dict()).items()}
        states = ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()])
        live, generator = model.get_submodule(groups[1].root.layer).weight.clone(), torch.get_rng_state()
        kept = {k: v.clone() for k, v in weights.items()}
        collect_evidence(model, groups, weights, full_masks(model), criterion, [images_and_labels])
        assert all(torch.equal(v, states[0][k]) for k, v in model.state_dict().items())
        assert [m.training for m in model.modules()] == states[1]
        assert all(p.grad is None for p in model.parameters())
        assert all(not m._forward_hooks for m in model.modules())
        assert torch.equal(model.get_submodule(groups[1].root.layer).weight, live)
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(torch.equal(weights[k], kept[k]) for k in kept)


def test_evidence_is_about_the_weights_that_are_given(images_and_labels):
    """Not about the model as it stands (defect D9)."""
    model, trained = MiniVGG(), MiniVGG()
    groups = channel_groups(model)
    direct = scores_of(trained, groups, "l1", images_and_labels)
    evidence = collect_evidence(model, groups, trained.state_dict(), {}, "l1", [images_and_labels])
    for name, scores in score_units(groups, evidence, "l1").items():
        torch.testing.assert_close(scores, direct[name])


def test_feature_criteria_say_when_they_have_no_images():
    model = MiniVGG()
    with pytest.raises(ValueError, match="needs at least one batch"):
        collect_evidence(model, channel_groups(model), model.state_dict(), {}, "l1", None)


def test_only_the_first_batches_are_read(images_and_labels):
    served = []

    def batches():
        while True:
            served.append(1)
            yield images_and_labels

    model = MiniVGG()
    collect_evidence(model, channel_groups(model), model.state_dict(), {}, "l1", batches(), 2)
    assert len(served) == 2


def test_of_equals_the_lower_index_stays():
    assert best_units(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]


@pytest.mark.parametrize("units, ratio, kept", [(384, 0.3, 268), (3, 0.3, 2), (3, 0.34, 1), (10, 0.8, 2), (3, 0.99, 1)])
def test_kept_count(units, ratio, kept):
    assert kept_count(units, ratio) == kept


def groups_of(sizes):
    return [UnitGroup(f"g{i}", "neuron", (rows(f"g{i}", n),)) for i, n in enumerate(sizes)]


def test_layer_wise_counts_spare_the_minimum_where_there_are_as_many():
    groups = groups_of([10, 3, 2])
    for least, kept in ((0, (3, 1, 1)), (2, (3, 2, 2)), (5, (5, 3, 2))):
        counts = layer_wise_budget(groups, {}, {}, ratio=0.7, min_units=least)
        assert tuple(counts.values()) == kept and list(counts) == ["g0", "g1", "g2"]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5), st.floats(0, 0.99), st.integers(0, 3), st.integers(0, 10**6)
)
def test_global_counts_are_exact_and_spare_the_minimum(sizes, ratio, least, seed):
    groups = groups_of(sizes)
    draw = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.randint(0, 4, (g.units,), generator=draw).double() for g in groups}
    counts = global_budget(groups, scores, {}, ratio=ratio, min_units=least)
    floor = sum(min(least, n) for n in sizes)
    assert sum(counts.values()) == max(kept_count(sum(sizes), ratio), floor)
    assert all(min(least, g.units) <= counts[g.name] <= g.units for g in groups)


def test_global_sorting_takes_the_best_of_the_whole_network_and_may_empty_a_layer():
    groups = groups_of([2, 2])
    scores = {"g0": torch.tensor([1.0, 2.0]), "g1": torch.tensor([5.0, 6.0])}
    assert global_budget(groups, scores, {}, ratio=0.5) == {"g0": 0, "g1": 2}
    assert global_budget(groups, scores, {}, ratio=0.5, min_units=1) == {"g0": 1, "g1": 1}
    assert layer_wise_budget(groups, scores, {}, ratio=0.9) == {"g0": 1, "g1": 1}


@pytest.mark.parametrize("filled, fillback, kept", [(8, 0.0, 2), (11, 0.0, 2), (8, 0.5, 3), (0, 0.0, 1), (8, 1.0, 4)])
def test_density_budget(filled, fillback, kept):
    """4 units of 4 weights: `int(num + (4 - num) * fillback)` stay, at least one."""
    mask = (torch.arange(16) < filled).float().view(4, 4)
    assert BUDGETS["density"](groups_of([4]), {}, {"g0.weight": mask}, fillback_rate=fillback) == {"g0": kept}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from(["layer-wise", "global"]), st.floats(0, 0.95))
def test_units_are_all_or_nothing_and_slices_agree(seed, sorting, ratio):
    draw = torch.Generator().manual_seed(seed)
    heads = Slice("qkv", 0, torch.arange(12).view(3, 2, 2).transpose(0, 1).reshape(2, 6))
    groups = [UnitGroup("qkv", "head", (heads, Slice("proj", 1, torch.arange(4).view(2, 2)))), *groups_of([5])]
    shapes = {"qkv": (12, 4), "proj": (4, 4), "g0": (5, 3)}
    current = {f"{n}.weight_mask": torch.randint(0, 2, s, generator=draw).float() for n, s in shapes.items()}
    before = {k: v.clone() for k, v in current.items()}
    rules = {k: budget(sorting, ratio=ratio) for k in ("head", "neuron")}
    refill = regroup(groups, current, Evidence({}, current), "remain", rules)
    for group in groups:
        flags = []
        for part in group.slices:
            lines = refill[part.layer].movedim(part.axis, 0)[part.index].flatten(1)
            assert torch.equal(lines.amin(1), lines.amax(1))
            flags.append(lines[:, 0].tolist())
        assert all(f == flags[0] for f in flags)
    assert all(torch.equal(current[k], before[k]) for k in before)
    assert not {v.data_ptr() for v in refill.values()} & {v.data_ptr() for v in current.values()}


def test_a_kind_without_a_budget_keeps_its_elementwise_mask():
    current = {"g0.weight_mask": torch.eye(3)}
    refill = regroup(groups_of([3]), current, Evidence({}, current), "remain", {})
    assert torch.equal(refill["g0"], torch.eye(3))
    refill["g0"].zero_()
    assert torch.equal(current["g0.weight_mask"], torch.eye(3))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_deciders_change_nothing_that_they_are_given(criterion, images_and_labels):
    cases = (
        (
            MiniVGG(),
            lambda m, k: pruning_utils.prune_model_custom_fillback(
                m,
                k,
                criteria=criterion,
                train_loader=[images_and_labels],
                trained_weight=trained,
                init_weight=initial,
                return_mask_only=True,
            ),
        ),
        (
            micro_vit(),
            lambda m, k: prune_model_custom_fillback_vit_head_and_mlp(
                m, k, [images_and_labels], trained, initial, criterion, 0.3, 0.3, return_mask_only=True
            ),
        ),
        (
            micro_vit(),
            lambda m, k: prune_model_custom_fillback_vit(
                m, k, [images_and_labels], trained, initial, criterion, 0.5, return_mask_only=True
            ),
        ),
    )
    for model, call in cases:
        trained = {k: v.clone() for k, v in model.state_dict().items()}
        initial = {k: v.clone() for k, v in model.state_dict().items()}
        masks = {f"{n}_mask": (torch.rand_like(p) > 0.3).float() for n, p in model.named_parameters() if p.ndim > 1}
        given_values = [trained, initial, masks, model.state_dict()]
        copies = [{k: v.clone() for k, v in d.items()} for d in given_values]
        refill = call(model, masks)
        for values, saved in zip(given_values, copies, strict=True):
            assert values.keys() == saved.keys()
            assert all(torch.equal(values[k], saved[k]) for k in saved)
        held = {v.data_ptr() for values in given_values for v in values.values()}
        assert not held & {v.data_ptr() for v in refill.values()}


def test_refill_restarts_from_copies_of_the_initial_weights(images_and_labels):
    """Training on must not move the initial weights that were given (defect D7)."""
    model = MiniVGG()
    initial = {k: v.clone() + 0.5 if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}
    saved = {k: v.clone() for k, v in initial.items()}
    trained = model.state_dict()
    pruning_utils.pruning_model(model, 0.5)
    masks = pruning_utils.extract_mask(model.state_dict())
    model = pruning_utils.prune_model_custom_fillback(
        model, masks, criteria="magnitude", init_weight=initial, trained_weight=trained
    )
    kept = model.features[4].weight_mask == 1
    assert torch.equal(model.features[4].weight_orig[kept], saved["features.4.weight"][kept])
    assert bool((model.features[4].weight[~kept] == 0).all())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.nn.functional.cross_entropy(model(images_and_labels[0]), images_and_labels[1]).backward()
    optimizer.step()
    assert all(torch.equal(initial[k], saved[k]) for k in saved)
    assert set(pruning_utils.extract_mask(model.state_dict())) >= {"features.4.weight_mask", "features.5.bias_mask"}
    pruning_utils.remove_prune(model)
    assert not pruning_utils.extract_mask(model.state_dict())


def test_wrong_calls_are_named():
    model = MiniVGG()
    with pytest.raises(ValueError, match="criteria 'l3': choose from remain"):
        pruning_utils.prune_model_custom_fillback(model, full_masks(model), criteria="l3", return_mask_only=True)
    with pytest.raises(ValueError, match="init_weight is required"):
        pruning_utils.prune_model_custom_fillback(model, full_masks(model))
    with pytest.raises(KeyError, match=r"no entry features\.0\.weight_mask"):
        pruning_utils.prune_model_custom(model, {})
    with pytest.raises(KeyError, match="no weights for"):
        pruning_utils.prune_model_custom_fillback(model, full_masks(model), trained_weight={}, return_mask_only=True)
    pruning_utils.prune_model_custom_fillback(
        model, full_masks(model), trained_weight={}, return_mask_only=True, strict=False
    )


@pytest.mark.parametrize("arch", [a for a, e in MODELS.items() if a in ("res20s", "vit_tiny")])
@torch.no_grad()
def test_a_dropped_unit_is_inert(arch):
    """Whatever its weights, biases and BatchNorm are, a dropped unit changes no logit."""
    model = build_model(arch, 10, 32).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.bias.uniform_(-1, 1)
    groups = unit_groups(model)
    targets = ("channel",) if arch == "res20s" else ("head", "neuron")
    rules = RoundRules("refill", 0.5, "target", "magnitude", targets=targets, mlp_prune_ratio=0.5)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    pair = decide(model, groups, rules, 0, ranked=weights, trained=weights, previous=None, batches=[])
    pruning_utils.apply_masks(model, pair.structure)
    x = torch.rand(2, 3, 32, 32)
    expected = model(x)
    assert any(bool((m == 0).any()) for m in pair.structure.values())
    for name, mask in pair.structure.items():
        layer, _, param = name.rpartition(".")
        module = model.get_submodule(layer)
        getattr(module, f"{param}_orig")[mask == 0] = 7.0
        dropped = (mask.flatten(1) == 0).all(1) if mask.ndim > 1 else mask == 0
        if mask.ndim > 1 and getattr(module, "bias", None) is not None:
            module.bias[dropped] = 5.0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean[dropped] = 3.0
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_masks_of_several_rounds_nest_for_refill_and_shrink_exactly():
    model = build_model("res20s", 10, 32)
    groups = unit_groups(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    for struct in ("refill", "rsst"):
        rules = RoundRules(struct, 0.4, "round", "magnitude")
        pair, left = None, 267264
        for state in range(3):
            following = decide(model, groups, rules, state, ranked=weights, trained=weights, previous=pair, batches=[])
            left -= round(0.4 * left)
            ones = sum(int(m.sum()) for k, m in following.current.items() if ".conv" in k)
            assert ones == left
            if pair is not None and struct == "refill":
                assert all(bool((following.structure[n] <= pair.structure[n]).all()) for n in pair.structure)
            assert isinstance(following, MaskPair)
            pair = following


SIGNATURES = {
    ("pruning_utils", "pruning_model"): "model, px, conv1=False",
    ("pruning_utils", "check_sparsity"): "model, conv1=True",
    ("pruning_utils", "remove_prune"): "model, conv1=True",
    ("pruning_utils", "extract_mask"): "state_dict",
    ("pruning_utils", "extract_main_weight"): "state_dict",
    ("pruning_utils", "prune_model_custom"): "model, mask_dict, conv1=False",
    ("pruning_utils", "prune_model_custom_fillback"): (
        "model, mask_dict, conv1=False, criteria='remain', train_loader=None, init_weight=None, trained_weight=None, "
        "return_mask_only=False, strict=True, fillback_rate=0.0"
    ),
    ("pruning_utils", "pruning_model_random"): "model, px",
    ("pruning_utils", "prune_snip"): "model, train_loader, loss, rate",
    ("pruning_utils", "prune_grasp"): "model, train_loader, loss, rate",
    ("pruning_utils", "prune_synflow"): "model, train_loader, loss, rate",
    ("pruning_utils", "prune_omp"): "model, train_loader, loss, rate",
    ("pruning_utils", "prune_rp"): "model, train_loader, loss, rate",
    ("pruning_utils", "prune_admm"): "model, train_loader, loss, rate, optimizer",
    ("pruning_utils", "regroup"): "groups, current_mask, evidence, criterion, budgets",
    ("vit_pruning_utils", "is_vit_model"): "model",
    ("vit_pruning_utils", "pruning_model_vit"): "model, px, prune_patch_embed=False",
    ("vit_pruning_utils", "prune_model_custom_vit"): "model, mask_dict",
    ("vit_pruning_utils", "check_sparsity_vit"): "model, prune_patch_embed=False",
    ("vit_pruning_utils", "extract_mask_vit"): "state_dict",
    ("vit_pruning_utils", "remove_prune_vit"): "model, prune_patch_embed=False",
    ("vit_pruning_utils", "prune_model_custom_fillback_vit"): (
        "model, mask_dict, train_loader=None, trained_weight=None, init_weight=None, criteria='l1', fillback_rate=0.0, "
        "return_mask_only=False"
    ),
    ("vit_pruning_utils", "prune_model_custom_fillback_vit_by_head"): (
        "model, mask_dict, train_loader=None, trained_weight=None, init_weight=None, criteria='l1', prune_ratio=0.2, "
        "return_mask_only=False"
    ),
    ("vit_pruning_utils_head_mlp", "prune_model_custom_fillback_vit_head_and_mlp"): (
        "model, mask_dict, train_loader=None, trained_weight=None, init_weight=None, criteria='l1', head_prune_ratio=0.2, "
        "mlp_prune_ratio=0.2, return_mask_only=False, sorting_mode='layer-wise'"
    ),
    ("main_imp_fillback", "train"): "state, train_loader, model, criterion, optimizer, epoch, passer, pruner",
    ("main_imp_fillback", "validate"): "val_loader, model, criterion",
    ("main_imp_fillback", "update_reg"): "passer, pruner, model, state, i, j",
    ("main_imp_fillback", "apply_reg"): "pruner, model, passer",
    ("main_imp_fillback", "main"): "argv=None",
    ("reg_pruner_files.reg_pruner", "Pruner"): "model, args, passer",
    ("utils", "setup_model_dataset"): "args",
    ("dataset", "cifar10_dataloaders"): "batch_size=128, data_dir='data'",
    ("dataset", "cifar100_dataloaders"): "batch_size=128, data_dir='data'",
    ("dataset", "tiny_imagenet_dataloaders"): "batch_size=128, data_dir='data'",
    ("models.vit", "vit_tiny"): "num_classes=100, img_size=32, pretrained=False",
    ("models.vit", "vit_small"): "num_classes=100, img_size=32, pretrained=False",
    ("models.vit", "vit_base"): "num_classes=100, img_size=32, pretrained=False",
    ("models.resnets", "resnet20"): "number_class=10",
    ("models.resnets", "resnet56"): "number_class=10",
}


@pytest.mark.parametrize("place", SIGNATURES, ids=".".join)
def test_fixed_names_and_signatures(place):
    import importlib

    function = getattr(importlib.import_module(place[0]), place[1])
    parameters = inspect.signature(function).parameters.values()
    plain = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert plain == SIGNATURES[place]


@pytest.mark.parametrize("sorting", ["layer-wise", "global"])
def test_of_what_l1_removed_whole_the_best_comes_back_and_what_was_cut_comes_last(sorting):
    """Units 0 and 1 were cut, the others trained; of the others L1 has left weights of unit 3 only."""
    weights = {"g0.weight": torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0]).view(5, 1).expand(5, 4)}
    current = {"g0.weight_mask": (torch.arange(5) == 3).float().view(5, 1).repeat(1, 4)}
    for count, expected in ((1, [3]), (2, [3, 4]), (3, [2, 3, 4]), (4, [0, 2, 3, 4])):
        rules = {"neuron": budget(sorting, ratio=1 - count / 5)}
        refill = regroup(groups_of([5]), current, Evidence(weights, current), "magnitude", rules)
        assert refill["g0"].any(1).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_image_counts_the_same_whatever_its_batch(criterion):
    model = build_model("res20s", 10, 16)
    groups, state = channel_groups(model), model.state_dict()
    images, labels = torch.rand(9, 3, 16, 16), torch.arange(9)
    current = {f"{s.name}_mask": torch.ones_like(state[s.name]) for g in groups for s in g.slices}
    halves = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    one, two = (
        score_units(groups, collect_evidence(model, groups, state, current, criterion, batches), criterion)
        for batches in ([(images, labels)], halves)
    )
    for name, scores in one.items():
        assert torch.allclose(two[name] / two[name].sum(), scores / scores.sum(), rtol=1e-4), name
