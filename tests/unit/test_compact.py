"""A shrunk network computes what the masked one does."""

from __future__ import annotations

import copy
import functools
import importlib

import pytest
import torch
import torchvision
from helpers.networks import LARGE, MICRO, SMALL
from helpers.structures import random_structure
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pruning_utils import extract_mask, prune_model_custom_fillback, pruning_model, remove_prune
from structured_tickets.networks import MODELS, build_model
from structured_tickets.networks.kernels import frugal, set_fused_attention
from structured_tickets.networks.layers import Normalize, channels_side_by_side
from structured_tickets.networks.registry import ModelSpec
from structured_tickets.pruning.masks import by_parameter
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.shrinking.cuts import cut_value, expand
from structured_tickets.shrinking.inserted_layers import Constant, Place
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import kinds
from vit_pruning_utils import pruning_model_vit, remove_prune_vit
from vit_pruning_utils_head_mlp import prune_model_custom_fillback_vit_head_and_mlp


def build(arch):
    torch.manual_seed(0)
    model = build_model(arch, 10, 32)
    model.normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    return with_used_norms(model)


def with_used_norms(model):
    """The model in eval mode, with normalisations that look trained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
            for value in (module.bias, module.running_mean):
                nn.init.uniform_(value, -0.5, 0.5)
    return model.eval()


def masked_logits(model, masks, images):
    state = model.state_dict()
    state = {n: v * masks[n] if n in masks else v for n, v in state.items()}
    return torch.func.functional_call(model, state, (images,))


def furthest(logits, wanted):
    """The largest difference, in parts of the largest logit where that is above 1: rounding grows with it."""
    return (logits - wanted).abs().max() / wanted.abs().max().clamp_min(1)


def cut_state(state, small):
    """What the smaller network has kept of a whole network's state dict."""
    return {n: cut_value(state[n], small.cuts.get(n, {})) for n in small.network.state_dict()}


@functools.cache
def whole(arch, stem=False):
    """A network, which nobody may change, and its groups of units."""
    model = whole(arch)[0] if stem else build(arch)
    return model, unit_groups(model, stem)


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check_shrunk(arch, seed, share, stem, lanes):
    model, groups = whole(arch, stem and MODELS[arch].spec.family == "cnn")
    masks = random_structure(model, seed, share, groups=groups)
    small = shrink(model, masks, lanes).network
    wanted = masked_logits(model, masks, IMAGES)
    assert furthest(small(IMAGES), wanted) <= 1e-5
    with frugal(small):
        assert furthest(small(IMAGES), wanted) <= 1e-5
    if share < 0.9:
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("share, stem, lanes", [(0.0, True, 8), (0.1, False, 16), (0.5, True, 1), (1.0, False, 8)])
@pytest.mark.parametrize("arch", SMALL)
def test_the_shrunk_network_is_the_masked_one_at_every_share(arch, share, stem, lanes):
    check_shrunk(arch, 0, share, stem, lanes)


@pytest.mark.parametrize("arch", [*MICRO, *(pytest.param(a, marks=pytest.mark.slow) for a in SMALL)])
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    stem=st.booleans(),
    lanes=st.sampled_from([1, 8, 16]),
)
def test_the_shrunk_network_is_the_masked_one(arch, seed, share, stem, lanes):
    check_shrunk(arch, seed, share, stem, lanes)


def test_a_depthwise_layer_to_which_no_channel_comes():
    check_shrunk("shufflenet_v2_x1_0", 1, 0.1, False, 1)  # found by the drawn ones


@pytest.mark.slow
@pytest.mark.parametrize("arch", [a for a in LARGE if a != "vit_large_imagenet"])
@torch.no_grad()
def test_the_large_ones_too(arch):
    model = build(arch)
    masks = random_structure(model, 3, 0.4)
    assert furthest(shrink(model, masks).network(IMAGES), masked_logits(model, masks, IMAGES)) <= 1e-5


@pytest.mark.parametrize("arch", SMALL)
def test_what_was_cut_can_be_put_back(arch):
    model, groups = whole(arch)
    masks = random_structure(model, 5, 0.5, groups=groups)
    small = shrink(model, masks)
    state = {n: v * masks[n] if n in masks else v for n, v in model.state_dict().items()}
    names = small.network.state_dict().keys()
    assert names <= state.keys()
    left = cut_state(state, small)
    for name, value in small.network.state_dict().items():
        assert torch.equal(value, left[name]), name
    with torch.no_grad():
        for parameter in small.network.parameters():
            parameter.add_(1)
    expanded = expand(small, state)
    for name, value in cut_state(expanded, small).items():
        assert torch.equal(value, small.network.state_dict()[name])
    assert expanded.keys() == state.keys()
    for name, value in state.items():
        assert expanded[name].shape == value.shape
        moved = (expanded[name] != value).sum()
        assert moved <= (small.network.state_dict()[name].numel() if name in names else 0)


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("share", [0.34, 0.67])
def test_the_counted_cost_of_a_mask_is_that_of_the_shrunk_network(arch, share):
    """In the layout in which it runs, in which channels are put in their places by products."""
    model, groups = whole(arch)
    masks = random_structure(model, 7, share, groups=groups)
    small = channels_side_by_side(copy.deepcopy(shrink(model, masks).network))
    set_fused_attention(small, fused=False)
    with FlopCounterMode(display=False) as counter:
        small(IMAGES[:1])
    cost = cost_of(model, masks, 32)
    assert cost.parameters == sum(p.numel() for p in small.parameters())
    assert cost.macs == counter.get_total_flops() / 2


def named(masks, style):
    """The same masks under the keys of torch's pruning, or as the documented functions return them."""
    return {f"{n}_mask" if style == "torch" else n.removesuffix(".weight"): m for n, m in masks.items()}


@pytest.mark.parametrize("style", ["torch", "documents"])
@pytest.mark.parametrize("arch", MICRO)
def test_masks_fit_under_every_key(arch, style):
    model, groups = whole(arch)
    masks = random_structure(model, 2, 0.5, groups=groups)
    wanted, found = shrink(model, masks), shrink(model, named(masks, style))
    assert found.cuts.keys() == wanted.cuts.keys() != set()
    for name, value in wanted.network.state_dict().items():
        assert torch.equal(value, found.network.state_dict()[name]), name
    assert cost_of(model, named(masks, style), 32) == cost_of(model, masks, 32)


@pytest.mark.parametrize("arch", MICRO)
def test_what_the_documented_functions_return_can_be_shrunk(arch):
    """Masks alone, and a model that torch's pruning holds under them."""
    model = copy.deepcopy(whole(arch)[0])
    state = {n: v.clone() for n, v in model.state_dict().items()}
    prune, settings = pruning_model, {"fillback_rate": 0.0}
    fillback = prune_model_custom_fillback
    if arch == "micro_vit":
        prune, settings = pruning_model_vit, {"head_prune_ratio": 0.4, "mlp_prune_ratio": 0.5}
        fillback = prune_model_custom_fillback_vit_head_and_mlp
    prune(model, 0.5)
    given = {"criteria": "magnitude", "train_loader": None, "trained_weight": state, "init_weight": state, **settings}
    masks = extract_mask(model.state_dict())
    refill = fillback(model, masks, return_mask_only=True, **given)
    wanted = masked_logits(whole(arch)[0], by_parameter(refill), IMAGES)
    (remove_prune if arch == "micro_cnn" else remove_prune_vit)(model)
    model.load_state_dict(state)
    small = shrink(model, refill).network
    assert furthest(small(IMAGES), wanted) <= 1e-5
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    held = fillback(model, masks, **given)
    assert any(n.endswith("_orig") for n, _ in held.named_parameters())
    before = {n: v.clone() for n, v in held.state_dict().items()}
    again = shrink(held, extract_mask(held.state_dict())).network
    for name, value in small.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert all(torch.equal(v, before[n]) for n, v in held.state_dict().items())
    assert sorted(n for n, _ in again.named_parameters()) == sorted(n for n, _ in small.named_parameters())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"layer9.weight": torch.ones(2)}, "has no parameter layer9.weight"),
        ({"layer9": torch.ones(2)}, r"no parameter layer9.weight \(mask 'layer9'\)"),
        ({"conv1.weight": torch.ones(16, 3)}, r"conv1.weight has shape \(16, 3, 3, 3\), its mask \(16, 3\)"),
        ({"conv1": torch.ones(16, 3, 3, 3), "conv1.weight_mask": torch.ones(16, 3, 3, 3)}, "two masks of conv1.weight"),
    ],
)
def test_masks_that_do_not_fit_are_refused_in_a_line(wrong, said):
    model, _ = whole("micro_cnn")
    for use in (lambda: shrink(model, wrong), lambda: cost_of(model, wrong, 32)):
        with pytest.raises(ValueError, match=said) as error:
            use()
        assert "\n" not in str(error.value)


def test_the_old_module_gives_a_network_that_holds_its_cuts():
    model, groups = whole("micro_cnn")
    masks = random_structure(model, 1, 0.5, groups=groups)
    with pytest.warns(DeprecationWarning, match="goes in version 0.3"):
        old = importlib.reload(importlib.import_module("compact"))
    small, wanted = old.shrink(model, masks), shrink(model, masks)
    assert torch.equal(small(IMAGES), wanted.network(IMAGES))
    state = model.state_dict()
    assert all(torch.equal(v, expand(wanted, state)[n]) for n, v in old.expand(small, state).items())


def test_shrinking_leaves_the_model_alone_and_empty_branches_give_their_bias():
    model, groups = whole("vit_tiny")
    before = {n: v.clone() for n, v in model.state_dict().items()}
    masks = random_structure(model, 0, 0.0, groups=groups)
    small = shrink(model, masks).network
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert sum(isinstance(m, Constant) for m in small.modules()) == 18
    assert "blocks.0.attn.proj.bias" in small.state_dict() and "blocks.0.attn.qkv.bias" not in small.state_dict()
    assert kinds(groups) == ["head", "neuron"]


@pytest.mark.parametrize(
    "name, classifier",
    [
        ("resnet18", None),
        ("mobilenet_v2", None),
        pytest.param("densenet121", None, marks=pytest.mark.slow),
        ("shufflenet_v2_x0_5", None),
        ("googlenet", None),
        ("vgg11_bn", 32),
        pytest.param("vgg11_bn", None, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_channels_are_followed_through_every_kind_of_layer(name, classifier):
    """Depth-wise and grouped convolutions, concatenations, shuffled channels, normalisations in front.

    VGG's classifier has 120 million weights unless a smaller one is put in its place.
    """
    own = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    with torch.device("meta" if classifier else "cpu"):
        model = getattr(torchvision.models, name)(num_classes=10, **own)
    if classifier:
        model.classifier = nn.Sequential(nn.Linear(512 * 49, classifier), nn.ReLU(), nn.Linear(classifier, 10))
        model.to_empty(device="cpu").apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    with_used_norms(model)
    model.spec = ModelSpec(name, "conv1", "fc")
    images = torch.rand(2, 3, 64, 64)
    for share in (0.0, 0.3, 0.7):
        masks = random_structure(model, 1, share)
        small = shrink(model, masks).network
        assert (small(images) - masked_logits(model, masks, images)).abs().max() <= 1e-5
        convolutions = [sum(m.weight.numel() for m in n.modules() if isinstance(m, nn.Conv2d)) for n in (small, model)]
        assert convolutions[0] < share * convolutions[1] + 40_000


@pytest.mark.parametrize("axis", [1, -1])
def test_channels_of_which_none_is_left_are_all_zeros(axis):
    none = torch.zeros(2, 0, 3, 3) if axis == 1 else torch.zeros(2, 3, 0)
    found = Place(torch.arange(0), 6, axis)(none)
    assert found.shape == ((2, 6, 3, 3) if axis == 1 else (2, 3, 6)) and not bool(found.any())
