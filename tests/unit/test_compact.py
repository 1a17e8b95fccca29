"""A shrunk network computes what the masked one does."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from helpers.networks import LARGE, SMALL
from helpers.structures import random_structure
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compact import Constant, cut_value, expand, shrink
from counting import cost_of
from models import MODELS, build_model
from models.layers import Normalize
from models.registry import ModelSpec
from models.vision_transformer import frugal, set_fused_attention
from unit_groups import unit_groups
from units import kinds


def build(arch):
    torch.manual_seed(0)
    model = build_model(arch, 10, 32)
    model.normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    return speaking(model)


def speaking(model):
    """The model with normalisations that have something to say, in eval mode."""
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
    """What is left of a whole network's state dict in the shrunk network."""
    return {n: cut_value(state[n], small.cuts.get(n, {})) for n in small.state_dict()}


WHOLE = {arch: build(arch) for arch in SMALL}
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", WHOLE)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), stem=st.booleans(),
       lanes=st.sampled_from([1, 8, 16]))  # fmt: skip
@torch.no_grad()
def test_the_shrunk_network_is_the_masked_one(arch, seed, share, stem, lanes):
    model = WHOLE[arch]
    masks = random_structure(model, seed, share, stem and MODELS[arch].spec.family == "cnn")
    small = shrink(model, masks, lanes)
    wanted = masked_logits(model, masks, IMAGES)
    assert furthest(small(IMAGES), wanted) <= 1e-5
    with frugal(small):
        assert furthest(small(IMAGES), wanted) <= 1e-5
    if share < 0.9:
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", [a for a in LARGE if a != "vit_large_imagenet"])
@torch.no_grad()
def test_the_large_ones_too(arch):
    model = build(arch)
    masks = random_structure(model, 3, 0.4)
    assert furthest(shrink(model, masks)(IMAGES), masked_logits(model, masks, IMAGES)) <= 1e-5


@pytest.mark.parametrize("arch", WHOLE)
def test_what_was_cut_can_be_put_back(arch):
    model = WHOLE[arch]
    masks = random_structure(model, 5, 0.5)
    small = shrink(model, masks)
    state = {n: v * masks[n] if n in masks else v for n, v in model.state_dict().items()}
    names = small.state_dict().keys()
    assert names <= state.keys()
    left = cut_state(state, small)
    for name, value in small.state_dict().items():
        assert torch.equal(value, left[name]), name
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    whole = expand(small, state)
    for name, value in cut_state(whole, small).items():
        assert torch.equal(value, small.state_dict()[name])
    assert whole.keys() == state.keys()
    for name, value in state.items():
        assert whole[name].shape == value.shape
        moved = (whole[name] != value).sum()
        assert moved <= (small.state_dict()[name].numel() if name in names else 0)


@pytest.mark.parametrize("arch", WHOLE)
@pytest.mark.parametrize("share", [0.34, 0.67])
def test_the_counted_cost_of_a_mask_is_that_of_the_shrunk_network(arch, share):
    """By torch's own counter; the runner's reads masks only."""
    model = WHOLE[arch]
    masks = random_structure(model, 7, share)
    small = copy.deepcopy(shrink(model, masks))
    set_fused_attention(small, fused=False)
    with FlopCounterMode(display=False) as counter:
        small(IMAGES[:1])
    cost = cost_of(model, unit_groups(model), masks, 32)
    assert cost.parameters == sum(p.numel() for p in small.parameters())
    assert cost.macs == counter.get_total_flops() / 2


def test_shrinking_leaves_the_model_alone_and_empty_branches_give_their_bias():
    model = WHOLE["vit_tiny"]
    before = {n: v.clone() for n, v in model.state_dict().items()}
    masks = random_structure(model, 0, 0.0)
    small = shrink(model, masks)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert sum(isinstance(m, Constant) for m in small.modules()) == 18
    assert "blocks.0.attn.proj.bias" in small.state_dict() and "blocks.0.attn.qkv.bias" not in small.state_dict()
    assert kinds(unit_groups(model)) == ["head", "neuron"]


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "googlenet"]
)
@torch.no_grad()
def test_channels_are_followed_through_every_kind_of_layer(name):
    """Depth-wise and grouped convolutions, concatenations, shuffled channels, normalisations in front."""
    own = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = speaking(getattr(torchvision.models, name)(num_classes=10, **own))
    model.spec = ModelSpec(name, "conv1", "fc")
    images = torch.rand(2, 3, 64, 64)
    for share in (0.0, 0.3, 0.7):
        masks = random_structure(model, 1, share)
        small = shrink(model, masks)
        assert (small(images) - masked_logits(model, masks, images)).abs().max() <= 1e-5
        convolutions = [sum(m.weight.numel() for m in n.modules() if isinstance(m, nn.Conv2d)) for n in (small, model)]
        assert convolutions[0] < share * convolutions[1] + 40_000
