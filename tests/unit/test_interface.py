"""The Python interface: on networks of libraries and of users, without a trace, and refused in one clear line."""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import logging
import pickle
import random
import subprocess
import sys

import numpy
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.models as tv
from helpers import users_networks
from helpers.commands import ROOT
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import structured_tickets as st
from structured_tickets.base.errors import DataError, RunError
from structured_tickets.export import deployed
from structured_tickets.interface.foreign import image_shape, random_images
from structured_tickets.networks import build_model
from structured_tickets.networks.attention import with_separate_heads
from structured_tickets.networks.external import build_external
from structured_tickets.networks.layers import Normalize, channels_side_by_side
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.pruning.usable_units import usable_units
from structured_tickets.shrinking.inserted_layers import Place
from structured_tickets.shrinking.kept_units import kept_units_of, structure_of
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.training.penalty.schedules import SCHEDULES, Clock


class Mine(nn.Module):
    """A user's network: a stem, a residual block with a depth-wise convolution, a classifier; nothing is registered."""

    def __init__(self, channels=3, width=8):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.wide = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.back = nn.Conv2d(2 * width, width, 1)
        self.last = nn.Linear(width, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.last((x + self.back(self.deep(self.norm2(self.wide(x)).relu()))).mean((2, 3)))


def vit(**more):
    return timm.create_model(
        "deit_tiny_patch16_224",
        **{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_classes": 5} | more,
    )


NETWORKS = {
    "mine": (Mine, (3, 9, 7), ["channel"]),
    "gray": (lambda: Mine(1), (1, 8, 8), ["channel"]),
    "mobilenet": (
        lambda: tv.MobileNetV2(5, 0.25, inverted_residual_setting=[[1, 8, 1, 1], [2, 16, 2, 2]]),
        (3, 32, 32),
        ["channel"],
    ),
    "densenet": (lambda: tv.DenseNet(4, (2, 2), 8, 2, num_classes=5), (3, 32, 32), ["channel"]),
    "deit": (vit, (3, 32, 32), ["head", "neuron", "block"]),
    "torchvision_vit": (lambda: tv.VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=5), (3, 16, 16), None),
}


def used(model):
    """As after some training: normalisations that shift, logits that differ."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                low = 0.5 if name.endswith(("running_var", "norm.weight", "norm2.weight")) else -0.2
                value.copy_(torch.rand(value.shape, generator=draw) * 0.6 + low)
    return model


@functools.cache
def made(name):
    torch.manual_seed(0)
    return used(NETWORKS[name][0]())


@functools.cache
def units_of(name):
    return st.units(made(name), NETWORKS[name][1])


def build(name):
    """A network of its own, the same each time, and the shape of its images."""
    return copy.deepcopy(made(name)), NETWORKS[name][1]


@functools.cache
def masks_of(name, rate, **more):
    return st.regroup(made(name), units_of(name), rate, **more)


def examined(name, rate=0.4, kinds=None):
    """A network of its own, and masks for it."""
    return build(name)[0], masks_of(name, rate, kinds=kinds)


def logits(model, shape):
    was = model.training
    with torch.no_grad():
        found = model.eval()(random_images(shape, model))
    model.train(was)
    return found


class Snapshot:
    """All that a function could have changed: bits, gradients, modes, hooks, attributes, random generators."""

    def __init__(self, model):
        self.before = self.of(model)

    @staticmethod
    def of(model):
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return {
            "state": {n: v.clone() for n, v in model.state_dict().items()},
            "memory": {n: v.data_ptr() for n, v in model.state_dict().items()},
            "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
            "trains": {n: p.requires_grad for n, p in model.named_parameters()},
            "modes": {n: m.training for n, m in model.named_modules()},
            "hooks": {n: [len(getattr(m, h)) for h in hooks] for n, m in model.named_modules()},
            "attributes": {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()},
            "torch": torch.get_rng_state(),
            "numpy": numpy.random.get_state()[1].copy(),
            "python": random.getstate(),
            "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        }

    def same(self, model):
        return _equal(self.before, self.of(model))


def _equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(numpy.array_equal(a, b)) if isinstance(a, numpy.ndarray) else a == b


# The package itself


def test_importing_the_package_loads_no_torch_and_all_names_are_there():
    code = (
        "import sys, structured_tickets as st; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "assert st.__version__ == '0.2.0' and set(st.__all__) <= set(dir(st)); "
        "assert {'units', 'regroup', 'Penalty', 'shrink', 'save', 'load', 'Units', 'Masks'} <= set(st.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert all(callable(getattr(st, name)) for name in st.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        st.prune  # noqa: B018


def test_compact_says_what_it_is_called_now():
    sys.modules.pop("compact", None)
    with pytest.warns(DeprecationWarning, match=r"structured_tickets\.load"):
        import compact
    assert compact.load is st.load and callable(compact.shrink)


# Units


@pytest.mark.parametrize("name", NETWORKS)
def test_units_are_found_and_the_network_keeps_no_trace(name):
    model, shape = build(name)
    expected = NETWORKS[name][2]
    assert expected is None or list(st.units(model, shape).kinds) == expected
    model.train()
    images = torch.rand(2, *shape)
    model(images).sum().backward()
    next(model.parameters()).requires_grad = False
    before = Snapshot(model)
    units = st.units(model, images)
    masks = st.regroup(model, units, 0.3)
    st.shrink(model, masks)
    assert before.same(model)
    assert len(units) == len(units.groups) == len(list(units)) and units[units.names[0]] is units.groups[0]
    assert 0 < masks.density < 1


def test_the_table_says_what_is_coupled_and_what_is_left_alone_and_why():
    units = units_of("mine")
    lines = str(units).splitlines()
    assert lines[0].split() == ["layer", "kind", "units", "weights", "pruned", "together", "with"]
    assert lines[1].split() == ["wide", "channel", "16", "272", "norm2,", "deep"]  # 8 * 16 and 9 * 16 weights
    assert lines[2].split() == ["back", "channel", "8", "128"]
    assert "Mine: 24 channels, with 400 of " in str(units)
    assert units.left_alone == {
        "first": "first layer (stem=True prunes it, too)",
        "last": "classifier: its outputs are the logits",
    }
    assert repr(units) == "<Units of Mine: 24 channels>"
    with pytest.raises(KeyError, match="no units called 'bck'"):
        units["bck"]
    assert "back" in units and "bck" not in units


def test_the_table_of_a_transformer():
    text = str(units_of("deit"))
    for row in (
        "blocks.0.attn.qkv  head    3  9,216 blocks.0.attn.proj (columns)",
        "blocks.1.mlp.fc1   neuron 192 18,432 blocks.1.mlp.fc2 (columns)",
        "blocks.1.mlp       block   1  18,432 all of blocks.1.mlp",
        "patch_embed.proj first layer",
        "head classifier: its outputs are the logits",
    ):
        assert row.split() in [line.split() for line in text.splitlines()]
    assert "VisionTransformer: 6 heads, 384 neurons, 4 blocks, with 55,296 of" in text


def test_stem_and_exclude():
    model, shape = build("mine")
    assert st.units(model, shape, stem=True).names == ("first", "wide", "back")
    units = st.units(model, shape, exclude=["wide"])
    assert units.names == ("back",) and units.left_alone["wide"] == units.left_alone["deep"] == "left out by exclude"
    deit, _ = build("deit")
    units = st.units(deit, exclude=["blocks.0", "blocks.1.mlp"])
    assert units.names == ("blocks.1.attn.qkv", "blocks.1.attn")
    with pytest.raises(ValueError, match="stem: the patch embedding"):
        st.units(deit, stem=True)
    with pytest.raises(ValueError, match="exclude: Mine has no units in 'wid'"):
        st.units(model, shape, exclude=["wid"])
    with pytest.raises(TypeError, match="give a list"):
        st.units(model, shape, exclude="wide")


def test_the_image_may_be_one_a_batch_a_shape_or_known_to_the_network():
    model, shape = build("mine")
    batch = torch.zeros(1, *shape, dtype=torch.uint8)
    for image in (torch.rand(shape), torch.rand(4, *shape), shape, list(shape), batch):
        assert image_shape(image, model) == shape
    assert image_shape(None, made("deit")) == NETWORKS["deit"][1]
    assert image_shape(None, made("torchvision_vit")) == (3, 16, 16)
    assert image_shape(None, timm.create_model("test_efficientnet")) == (3, 160, 160)
    with pytest.raises(ValueError, match="Mine does not say which images it takes"):
        st.units(model)
    with pytest.raises(ValueError, match=r"has shape \(9, 7\)"):
        st.units(model, torch.rand(9, 7))
    with pytest.raises(TypeError, match="example_image is a str"):
        st.units(model, "photo.jpg")
    with pytest.raises(ValueError, match=r"Mine cannot take images of shape \(1, 8, 8\)"):
        st.units(model, (1, 8, 8))


class Branching(Mine):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class TwoOutputs(Mine):
    def forward(self, x):
        return super().forward(x), x


class Tied(Mine):
    def __init__(self):
        super().__init__()
        self.again = nn.Conv2d(16, 8, 1)
        self.again.weight = self.back.weight

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.wide(x)
        return self.last((self.back(x) + self.again(x)).mean((2, 3)))


class Unforgettable(Mine):
    def __init__(self):
        super().__init__()
        self.generator = (n for n in range(3))


REFUSED = {
    "branch": (
        Branching,
        ValueError,
        "the channels of Branching cannot be followed: its forward pass cannot be recorded",
    ),
    "two outputs": (TwoOutputs, ValueError, r"TwoOutputs gives tuple for 2 images, not logits \[2, classes\]"),
    "uncopyable": (Unforgettable, ValueError, r"Unforgettable cannot be copied \(TypeError: .*generator"),
    "nothing": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)),
        ValueError,
        "Sequential has no layers that can be pruned",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), ValueError, "parameters without values"),
    "meta": (lambda: Mine().to("meta"), ValueError, "parameters without values"),
    "empty": (nn.Identity, ValueError, "Identity has no parameters"),
    "no module": (lambda: 3, TypeError, "model is a int, not a torch.nn.Module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_cannot_be_pruned_is_refused_in_one_line(name):
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as refused:
        st.units(make(), (3, 8, 8))
    assert isinstance(refused.value, RunError) and "\n" not in str(refused.value) and "--" not in str(refused.value)


class Spectral(Mine):
    """Names that the program uses for its own networks mean something else here."""

    def __init__(self):
        super().__init__()
        self.spec, self.normalize, self.cuts, self.meta = nn.BatchNorm2d(3), nn.Hardswish(), 3, "mine"

    def forward(self, x):
        return super().forward(self.normalize(self.spec(x)))


def test_no_attribute_of_a_users_network_is_in_the_way(tmp_path):
    model = Spectral()
    units = st.units(model, (3, 8, 8))
    assert units.names == ("wide", "back") and units.left_alone["last"].startswith("classifier")
    small = st.shrink(model, st.regroup(model, units, 0.4))
    st.save(small, tmp_path)
    assert torch.equal(logits(st.load(tmp_path, model=Spectral), (3, 8, 8)), logits(small, (3, 8, 8)))
    assert channels_side_by_side(model).meta == "mine"


@pytest.mark.parametrize("computed", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("name", ["back", "last"])
def test_a_layer_whose_weights_are_computed_stays_whole_and_gets_what_it_reads(computed, name):
    model, images = used(Mine()), torch.rand(2, 3, 8, 8)
    computed(model.get_submodule(name))
    model.train()
    model(images)  # older normalisations compute their weights anew
    units = st.units(model.eval(), images)
    assert units.names == (("wide",) if name == "back" else ("wide", "back"))
    masks = st.regroup(model, units, 0.5)
    small = st.shrink(model, masks)
    masks.apply_(model)
    assert torch.allclose(small(images), model(images), atol=1e-6)
    assert small.wide.weight.shape[0] < 16 and small.get_submodule(name).weight.shape[0] == (8 if name == "back" else 5)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        return self.last((x + self.conv(x)).mean((2, 3)))


def test_weights_between_two_units_of_a_stream_are_counted_once():
    units = st.units(Residual(), (3, 8, 8), channel_units="stream")
    assert units.names == ("conv",) and units.weights_of(units["conv"]) == units.prunable == 8 * 8 * 9


def test_tied_layers_of_a_transformer_are_pruned_together_or_left_out(tmp_path):
    model, _ = build("deit")
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    units = st.units(model)
    assert "blocks.0.mlp.fc1" in units and "blocks.1.mlp.fc1" not in {*units.names, *units.left_alone}
    masks = st.regroup(model, units, 0.4)
    small = st.shrink(model, masks)
    masks.apply_(model)
    torch.testing.assert_close(logits(small, (3, 32, 32)), logits(model, (3, 32, 32)))
    st.save(small, tmp_path)
    for network in (small, st.load(tmp_path, model=model)):
        assert network.blocks[1].mlp.fc1.weight is network.blocks[0].mlp.fc1.weight
    for excluded in (["blocks.1.mlp.fc1"], ["blocks.0.mlp", "blocks.1.mlp"]):
        others = st.units(model, exclude=excluded)
        assert "blocks.0.attn.qkv" in others and not [n for n in others.names if "mlp" in n]
        assert {others.left_alone[f"blocks.{k}.mlp.fc1"] for k in (0, 1)} == {"left out by exclude"}
    by_name = st.shrink(model, masks.structure)
    assert by_name.blocks[1].mlp.fc1.weight is by_name.blocks[0].mlp.fc1.weight


SAME_AS_RUNS = [
    "vit",
    "looped",
    "pyramid",
    "placing",
    "viewing",
    "standardised",
    "vit_that_shares",
    "filtered_mlps",
    "upwards",
    "padded",
    "counting",
]


@pytest.mark.parametrize("name", SAME_AS_RUNS)
def test_networks_of_users_have_the_units_that_runs_find(name, tmp_path):
    model = used(getattr(users_networks, name)(10))
    hosted = build_external(f"{ROOT / 'tests' / 'helpers' / 'users_networks.py'}:{name}", 10, 8)
    wanted = {s.name for g in usable_units(hosted, 8, needed=True).groups for s in g.slices if s.ranked}
    units = st.units(model, (3, 8, 8))
    assert {s.name for g in units for s in g.slices if s.ranked} == wanted
    masks = st.regroup(model, units, 0.5)
    small = st.shrink(model, masks)
    assert vars(small).keys() <= vars(model).keys() | {"structured_ticket"} or isinstance(small, torch.fx.GraphModule)
    by_name = st.shrink(model, masks.structure, (3, 8, 8))
    st.save(small, tmp_path)
    again = st.load(tmp_path, model=model)
    masks.apply_(model)
    for network in (small, by_name, again):
        assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(logits(network, (3, 8, 8)), logits(model, (3, 8, 8)), rtol=1e-4, atol=1e-5)


class Reads(nn.Module):
    """A question that is learned, and attention that looks for its answer in an image."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32)
        self.question, self.last = nn.Parameter(torch.rand(1, 1, 32)), nn.Linear(32, 5)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        x = self.norm(self.conv(self.stem(x).relu())).relu().flatten(2).transpose(1, 2)
        return self.last(self.attention(self.question.expand(len(x), -1, -1), x, x, need_weights=False)[0][:, 0])


@pytest.mark.parametrize("channel_units", ["filter", "stream"])
def test_what_the_masks_prune_is_gone_whatever_a_channel_is(channel_units, tmp_path):
    model = used(Reads())
    units = st.units(model, (3, 8, 8), channel_units=channel_units)
    assert "attention" in units and "stem" not in units
    masks = st.regroup(model, units, 0.5)
    small = st.shrink(model, masks)
    by_name = st.shrink(model, masks.structure, (3, 8, 8))
    st.save(small, tmp_path)
    again = st.load(tmp_path, model=model)
    masks.apply_(model)
    for network in (small, by_name, again):
        assert network.attention.in_proj_weight.shape[0] == 48
        torch.testing.assert_close(logits(network, (3, 8, 8)), logits(model, (3, 8, 8)), rtol=1e-4, atol=1e-5)


def test_a_network_whose_heads_are_put_in_their_places_is_saved_and_pruned_again(tmp_path):
    model = used(users_networks.vit(10))
    small = st.shrink(model, st.regroup(model, st.units(model, (3, 8, 8)), 0.5))
    assert any(isinstance(m, Place) for m in small.modules())
    masks = st.regroup(small, st.units(small, (3, 8, 8)), 0.4)
    smaller = st.shrink(small, masks)
    st.save(smaller, tmp_path)
    again = st.load(tmp_path, model=small)
    masks.apply_(small)
    for network in (smaller, again):
        assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in small.parameters())
        torch.testing.assert_close(logits(network, (3, 8, 8)), logits(small, (3, 8, 8)), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_removed_stays_whole_and_the_reason_is_said():
    model = users_networks.vit_that_decides(10)
    units = st.units(model, (3, 8, 8))
    assert units.kinds == ("neuron", "block")
    assert units.left_alone["blocks.0.attn.qkv"].startswith("its heads cannot be removed")


def test_hooks_of_the_user_do_not_run_and_stay():
    model, shape = build("mine")
    calls = []
    model.back.register_forward_hook(lambda *_: calls.append("forward"))
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.back.weight.register_hook(lambda gradient: calls.append("gradient"))
    units = st.units(model, shape)
    batches = [(torch.rand(2, *shape), torch.tensor([0, 1]))]
    masks = st.regroup(model, units, 0.3, "saliency", batches=batches)
    small = st.shrink(model, masks)
    assert calls == []
    small(torch.rand(2, *shape)).sum().backward()
    assert calls == []
    model(torch.rand(2, *shape)).sum().backward()
    assert calls == ["before", "forward", "gradient"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["mine", "deit"])
def test_other_number_types(name, dtype):
    model, shape = build(name)
    model.to(dtype).eval()
    batches = [(torch.rand(4, *shape), torch.arange(4))]
    units = st.units(model, shape)
    masks = st.regroup(model, units, 0.4, "saliency", batches=batches)
    small = st.shrink(model, masks)
    assert {p.dtype for p in small.parameters()} == {dtype}
    masks.apply_(model)
    found, wanted = logits(small, shape), logits(model, shape)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= (1e-12 if dtype == torch.float64 else 0.02) * wanted.abs().max()
    penalty = st.Penalty(small_copy := copy.deepcopy(model), masks, 3)
    small_copy.train()
    small_copy(torch.rand(2, *shape, dtype=dtype)).sum().backward()
    penalty.step()


def test_surroundings_do_not_matter():
    """Autocast, inference mode, no gradients, another default type: the same units and masks, and afterwards as before."""
    model, shape = build("mine")
    batches = [(torch.rand(4, *shape), torch.arange(4))]

    def all_of_it():
        units = st.units(model, shape)
        masks = st.regroup(model, units, 0.4, "saliency", batches=batches)
        return units, masks, st.shrink(model, masks)

    units, masks, small = all_of_it()
    for surroundings in (
        (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()),
        (torch.no_grad(), torch.device("meta")),
    ):
        with surroundings[0], surroundings[1]:
            before = Snapshot(model)
            other = all_of_it()
            assert before.same(model)
        assert str(other[0]) == str(units) and _equal(other[1].structure, masks.structure)
        assert _equal(other[2].state_dict(), small.state_dict())
        other[2].train()(torch.rand(2, *shape)).sum().backward()


def test_wrapped_networks_are_those_inside():
    model, shape = build("mine")
    units = st.units(nn.DataParallel(model), shape)
    masks = st.regroup(torch.compile(model, backend="eager"), units, 0.4)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    small = st.shrink(averaged, masks)
    masks.apply_(nn.DataParallel(model))
    torch.testing.assert_close(logits(small, shape), logits(model, shape))


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel_training_but_no_sharded_parameters(alone):
    from torch.distributed.fsdp import fully_shard

    model, masks = examined("mine", 0.5)
    images, parallel = torch.rand(4, 3, 9, 7), nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    penalties = []
    for network in (model, parallel):
        penalties.append(trained(network, masks, 3, torch.optim.SGD(network.parameters(), 0.01), images))
    assert _equal(dict(model.state_dict()), dict(parallel.module.state_dict()))
    assert penalties[0].squeeze == penalties[1].squeeze < 1
    fully_shard(model)
    for refused in (lambda: st.units(model, (3, 9, 7)), lambda: st.Penalty(model, masks, 3)):
        with pytest.raises(ValueError, match=r"the parameters of .*Mine are sharded \(FSDP\)"):
            refused()


def test_a_network_that_was_shrunk_can_be_pruned_again_or_says_how(tmp_path):
    model, masks = examined("mine", 0.5)
    small = st.shrink(model, masks)
    smaller = st.shrink(small, st.regroup(small, st.units(small, (3, 9, 7)), 0.5))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())
    model, masks = examined("deit", 0.5)
    small = st.shrink(model, masks)
    smaller = st.shrink(small, st.regroup(small, st.units(small), 0.5))
    st.save(smaller, tmp_path)
    with pytest.raises(DataError, match="cannot be built by a name"):
        st.load(tmp_path)
    again = st.load(tmp_path, model=small)
    assert torch.equal(logits(again, (3, 32, 32)), logits(smaller, (3, 32, 32)))


def test_networks_under_torchs_own_pruning():
    model, shape = build("mine")
    prune.l1_unstructured(model.wide, "weight", 0.5)
    prune.l1_unstructured(model.back, "weight", 0.5)
    before = Snapshot(model)
    units = st.units(model, shape)
    masks = st.regroup(model, units, 0.7)
    small = st.shrink(model, masks)
    assert before.same(model) and "wide.weight" in small.state_dict()
    st.Penalty(model, masks, 3)
    masks.apply_(model)
    torch.testing.assert_close(logits(small, shape), logits(model, shape))


# Regroup


@pytest.mark.parametrize("name", ["mine", "deit", "torchvision_vit"])
@pytest.mark.parametrize("criterion", ["magnitude", "saliency"])
def test_two_rounds_of_masks_are_those_of_the_runner(name, criterion):
    (model, shape), units = build(name), units_of(name)
    batches = [(torch.rand(6, *shape), torch.arange(6) % 5) for _ in range(2)]
    groups = [g for g in units if g.kind != "block"]
    reference = with_separate_heads(copy.deepcopy(model))
    masks = pair = None
    for state in range(2):
        masks = st.regroup(model, units, 0.3, criterion, batches=batches, previous=masks, criterion_batches=2)
        rules = RoundRules(
            "rsst",
            0.3,
            "round",
            criterion,
            targets=tuple(dict.fromkeys(g.kind for g in groups)),
            mlp_prune_ratio=0.3,
            criteria_batches=2,
        )
        weights = reference.state_dict()
        pair = decide(reference, groups, rules, state, ranked=weights, trained=weights, previous=pair, batches=batches)
        assert _equal(masks.pair.current, pair.current) and _equal(masks.pair.structure, pair.structure)
    own = dict(model.named_parameters())
    assert all(own[n].shape == m.shape for n, m in masks.structure.items())


def test_the_heads_of_torchs_attention_are_pruned_under_its_own_names():
    model, masks = examined("torchvision_vit", kinds=("head",))
    name = "encoder.layers.encoder_layer_0.self_attention"
    assert {f"{name}.in_proj_weight", f"{name}.out_proj.weight"} <= masks.structure.keys()
    assert masks.kept[f"{name}.qkv"] in ([0], [1])
    kept = masks.kept[f"{name}.qkv"][0]
    row = masks.structure[f"{name}.in_proj_weight"].view(3, 2, 8, 16)
    assert row[:, kept].all() and not row[:, 1 - kept].any()
    masks.apply_(model)
    head = model.get_submodule(name).in_proj_weight.view(3, 2, 8, 16)
    assert not head[:, 1 - kept].any() and head[:, kept].all()


class Asks(nn.Module):
    """Attention that also wants its weights: its heads are left alone, its MLP is not."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        y, weights = self.attention(x, x, x)
        return self.head((x + y + self.mlp(x)).mean(1) + weights.sum())


def test_attention_that_is_used_otherwise_is_left_alone():
    units = st.units(Asks(), (3, 8, 8))
    assert units.kinds == ("neuron", "block") and units.attention == ()
    assert units.left_alone["attention"].startswith("torch's own attention, whose heads cannot be removed. Write it")
    assert "attention.out_proj" not in units.left_alone


def test_a_rate_of_each_kind_the_sorting_and_the_least_number_of_units():
    model, units = build("deit")[0], units_of("deit")
    masks = st.regroup(model, units, 0.5, mlp_rate=0.25, kinds=["head", "neuron"])
    counts = {name: len(kept) for name, kept in masks.kept.items()}
    assert set(counts.values()) == {1, 144} and len(counts) == 4
    masks = st.regroup(model, units, 0.25, block_rate=0.5, kinds=["block"])
    assert sum(map(len, masks.kept.values())) == 2 and masks.pruned_kinds == ("block",)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight *= 0.01
        model.blocks[1].attn.proj.weight *= 0.01
    kept = st.regroup(model, units, 0.5, kinds=["head"], sorting="global").kept
    assert {n: len(k) for n, k in kept.items()} == {"blocks.0.attn.qkv": 3, "blocks.1.attn.qkv": 0}
    kept = st.regroup(model, units, 0.5, kinds=["head"], sorting="global", min_units=1).kept
    assert {n: len(k) for n, k in kept.items()} == {"blocks.0.attn.qkv": 2, "blocks.1.attn.qkv": 1}


def test_rates_of_rounds_multiply_or_are_of_all():
    model, first = examined("deit", 0.5)
    second = st.regroup(model, first.units, 0.25, previous=first)
    assert first.fractions == {"head": 0.5, "neuron": 0.5} and second.fractions == {"head": 0.375, "neuron": 0.375}
    assert {len(k) for n, k in second.kept.items() if "fc1" in n} == {72}
    target = st.regroup(model, first.units, 0.75, previous=first, rate_mode="target")
    assert {len(k) for n, k in target.kept.items() if "fc1" in n} == {48}


def test_after_a_round_under_a_hard_structure_only_its_weights_are_ranked():
    """Refill: what lies outside the structure is zero; a weight that L1 removed and the structure brought back competes."""
    model, first = examined("mine", 0.5)
    first.apply_(model)
    second = st.regroup(model, first.units, 0.01, previous=first)
    outside = {n: m == 0 for n, m in first.structure.items()}
    assert all(not second.elements[n][gone].any() for n, gone in outside.items() if n.endswith("e.weight"))
    brought_back = [(second.elements[n] == 1) & flags for n, flags in first.refilled.items()]
    assert any(bool(flags.any()) for flags in brought_back)


def test_batches_are_read_without_a_trace_from_any_loader():
    (model, shape), units = build("mine"), units_of("mine")
    data = TensorDataset(torch.rand(20, *shape), torch.arange(20) % 5)
    loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    states = loader.generator.get_state(), Snapshot(model)
    masks = st.regroup(model, units, 0.4, "l2", batches=loader)
    assert torch.equal(loader.generator.get_state(), states[0]) and states[1].same(model)
    assert _equal(st.regroup(model, units, 0.4, "l2", batches=loader).structure, masks.structure)
    images = [(x,) for x, _ in [data[:8]]]
    alone = st.regroup(model, units, 0.4, "l1", batches=images)
    assert _equal(alone.structure, st.regroup(model, units, 0.4, "l1", batches=[data[:8]]).structure)
    endless = ((torch.rand(2, *shape), torch.zeros(2, dtype=torch.long)) for _ in iter(int, 1))
    st.regroup(model, units, 0.4, "saliency", batches=endless)


WRONG = {
    "rate": ({"rate": 1.0}, ValueError, r"rate: 1.0 is not a number in \[0, 1\)"),
    "rate_nan": ({"rate": float("nan")}, ValueError, "rate: nan is not"),
    "rate_text": ({"rate": "0.3"}, TypeError, "rate: '0.3' is a str"),
    "rate_none": ({"rate": None}, TypeError, "rate: a NoneType"),
    "criterion": (
        {"criterion": "magnitud"},
        ValueError,
        r"criterion: 'magnitud' is not one of .* \(did you mean 'magn",
    ),
    "criterion_type": ({"criterion": 3}, TypeError, "criterion: 3 is a int"),
    "mode": ({"rate_mode": "rounds"}, ValueError, "rate_mode: 'rounds' is not one of round, target"),
    "kinds": ({"kinds": ["head"]}, ValueError, "kinds: Mine has no such units: 'head' is not one of channel"),
    "kinds_text": ({"kinds": "channel"}, TypeError, "kinds: give a list"),
    "kinds_none": ({"kinds": []}, ValueError, "kinds: name at least one"),
    "mlp": ({"mlp_rate": 0.2}, ValueError, "mlp_rate: has no effect here, since no neurons are pruned"),
    "block": ({"block_rate": 0.2}, ValueError, "block_rate: has no effect here"),
    "sorting": ({"sorting": "global"}, ValueError, "sorting: has no effect here, since no heads or neurons"),
    "min_units": ({"min_units": -1}, ValueError, "min_units: -1 is not a whole number of at least 0"),
    "min_units_type": ({"min_units": 1.5}, TypeError, "min_units: 1.5 is a float"),
    "no batches": ({"criterion": "l1"}, ValueError, r"batches: missing; criterion 'l1' needs images, or \(images"),
    "empty": ({"criterion": "l1", "batches": []}, ValueError, "batches: empty"),
    "not batches": ({"criterion": "l1", "batches": 3}, TypeError, "batches: a int, not a data loader"),
    "no labels": ({"criterion": "saliency", "batches": [torch.rand(2, 3, 9, 7)]}, TypeError, "an item is a Tensor"),
    "texts": ({"criterion": "l1", "batches": ["a"]}, TypeError, "an item is a str"),
    "units": ({"units": "all"}, TypeError, "units is a str, not what structured_tickets.units returns"),
    "model": ({"model": None}, TypeError, "model is a NoneType"),
    "previous": ({"previous": {}}, TypeError, "previous is a dict, not what structured_tickets.regroup returns"),
    "other": ({"model": Mine(width=16)}, ValueError, "the units are those of another network: first.weight has shape"),
    "more": ({"model": nn.Sequential()}, ValueError, "Sequential has no parameters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_regrouping_is_said_in_one_line(name):
    model, _ = build("mine")
    given, kind, message = WRONG[name]
    with pytest.raises(kind, match=message) as refused:
        st.regroup(**{"model": model, "units": units_of("mine"), "rate": 0.3} | given)
    assert isinstance(refused.value, RunError) and "\n" not in str(refused.value) and "--" not in str(refused.value)


def test_previous_masks_have_to_be_of_the_same_units():
    model, masks = examined("deit", kinds=("head",))
    with pytest.raises(ValueError, match="the round before pruned heads; prune the same"):
        st.regroup(model, masks.units, 0.3, kinds=["neuron"], previous=masks)
    assert st.regroup(model, masks.units, 0.3, previous=masks).pruned_kinds == ("head",)
    with pytest.raises(ValueError, match="masks of other units"):
        st.regroup(model, st.units(model, exclude=["blocks.0"]), 0.3, previous=masks)


# Masks


def test_every_weight_is_kept_doomed_dead_or_refilled():
    model, masks = examined("mine", 0.5)
    assert masks.structure.keys() == masks.elements.keys() <= dict(model.named_parameters()).keys()
    doomed = 0
    for name, whole in masks.structure.items():
        kept = (whole == 1) & (masks.elements[name] == 1)
        parts = [kept, masks.doomed[name], masks.dead[name], masks.refilled[name]]
        assert torch.equal(torch.stack(parts).sum(0), torch.ones(whole.shape, dtype=torch.int64))
        doomed += int(masks.doomed[name].sum())
    assert doomed > 0
    prunable = ["wide.weight", "deep.weight", "back.weight"]
    kept = sum(int(masks.structure[n].sum()) for n in prunable)
    assert masks.density == kept / sum(masks.structure[n].numel() for n in prunable)
    channels = masks.kept["wide"]
    assert all(bool(masks.structure["norm2.bias"][c]) == (c in channels) for c in range(16))
    lines = str(masks).splitlines()
    assert lines[1].split() == ["wide", "channel", str(len(channels)), "16"]
    assert lines[3].split() == ["all", "channels", "channel", str(len(channels) + len(masks.kept["back"])), "24"]
    assert lines[-1].startswith(f"400 prunable weights: {100 * masks.density:.1f}% kept, ")
    assert repr(masks) == f"<Masks of Mine: {100 * masks.density:.1f}% kept>"


def test_masks_can_be_saved_and_applied_to_no_other_network(tmp_path):
    model, masks = examined("deit")
    torch.save(masks.state_dict(), tmp_path / "masks.pt")
    again = st.Masks.from_state_dict(st.units(model), torch.load(tmp_path / "masks.pt", weights_only=True))
    assert str(again) == str(masks) and _equal(again.elements, masks.elements) and again.fractions == masks.fractions
    assert str(pickle.loads(pickle.dumps(masks))) == str(copy.deepcopy(masks)) == str(masks)
    other, shape = build("mine")
    with pytest.raises(ValueError, match="masks are those of another network"):
        st.Masks.from_state_dict(st.units(other, shape), masks.state_dict())
    with pytest.raises(ValueError, match="not a state of masks"):
        st.Masks.from_state_dict(masks.units, {"elements": {}})
    with pytest.raises(ValueError, match=r"the masks are those of another network: .* is missing in this Mine"):
        masks.apply_(other)
    with pytest.raises(TypeError, match="model is a NoneType"):
        masks.apply_(None)


def test_refill_holds_everything_outside_the_structure_at_zero():
    model, masks = examined("mine", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    masks.apply_(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(4, 3, 9, 7)).square().sum().backward()
        optimizer.step()
        masks.apply_(model)
    own = dict(model.named_parameters())
    assert all(not own[n][m == 0].any() and own[n][m == 1].all() for n, m in masks.structure.items())


# Penalty


def trained(model, masks, steps, optimizer, images, *, penalty=None, **more):
    """The penalty after so many steps on these images."""
    penalty = penalty or st.Penalty(model, masks, steps, **more)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        penalty.step()
        optimizer.step()
    return penalty


def all_zero(model, dead):
    own = dict(model.named_parameters())
    return all(not own[n].detach()[flags].any() for n, flags in dead.items())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dead_weights_stay_exactly_zero_and_doomed_ones_fade_whatever_the_optimizer(name):
    """The optimizer has state of before, with momentum for weights that are dead now."""
    model, masks = examined("mine", 0.5)
    optimizer, images = OPTIMIZERS[name](model.parameters()), torch.rand(4, 3, 9, 7)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    assert not all_zero(model, masks.dead)
    penalty = st.Penalty(model, masks, 30)
    assert all_zero(model, masks.dead) and penalty.squeeze == 1 and penalty.strength == 0
    for k in range(30):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        penalty.step()
        optimizer.step()
        assert all_zero(model, masks.dead), k
    assert penalty.decoupled is (name != "sgd") and penalty.strength == 1
    assert penalty.squeeze < (0.7 if name == "sgd" else 0.05)
    own = dict(model.named_parameters())
    assert all(own[n].detach()[kept].all() for n, kept in ((n, m == 1) for n, m in masks.structure.items()))


def test_the_gradient_moves_by_lambda_times_weight_where_doomed_and_only_there():
    model, masks = examined("mine", 0.5)
    penalty, images = st.Penalty(model, masks, 4, strength=0.5, decoupled=False), torch.rand(4, 3, 9, 7)
    clock = Clock("exp_custom_exponents", delta=0.5)
    for k in range(6):
        model.zero_grad()
        model(images).square().mean().backward()
        before = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
        penalty.step()
        strength = clock.strength(0, min(k, 3), 4)
        assert penalty.strength == strength, "after the last step lambda stays as it is"
        for name, parameter in model.named_parameters():
            weight, gradient = before[name]
            assert torch.equal(parameter, weight)
            doomed, dead = (m.get(name, torch.zeros_like(weight)) for m in (masks.doomed, masks.dead))
            wanted = (gradient + strength * weight * doomed).where(~dead.bool(), torch.zeros(()))
            torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-7)
            assert torch.equal(parameter.grad[(doomed + dead) == 0], gradient[(doomed + dead) == 0])
    assert strength == 0.5


def test_decoupled_weights_shrink_by_lambda_and_the_place_of_the_learning_rate():
    """From the first step on, in a plain loop and where the optimizer calls back for the gradients."""
    strengths = [Clock("exp_custom_exponents", delta=0.5).strength(0, k, 2) for k in range(2)]
    for calls_back in (False, True):
        model, masks = examined("mine", 0.5)
        optimizer = torch.optim.Adam(model.parameters(), 0.0)
        optimizer.param_groups[0] |= {"initial_lr": 0.4, "lr": 1e-30}
        penalty = st.Penalty(model, masks, 2, strength=0.5)
        doomed, start = masks.doomed["wide.weight"], model.wide.weight.detach().clone()
        wanted = start[doomed]
        for strength, lr in zip(strengths, (1e-30, 0.2), strict=True):
            optimizer.param_groups[0]["lr"] = lr
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            if calls_back:
                optimizer.step(lambda penalty=penalty: penalty.step())
            else:
                penalty.step()
                optimizer.step()
            wanted = wanted * (1 - strength * lr / 0.4)
            torch.testing.assert_close(model.wide.weight[doomed], wanted, msg=str((calls_back, lr)))
        assert penalty.decoupled is True


def test_doomed_weights_follow_the_penalty_alone_if_asked():
    model, masks = examined("mine", 0.5)
    penalty = st.Penalty(model, masks, 1, block_gradient=True, decoupled=False)
    model(torch.rand(2, 3, 9, 7)).sum().backward()
    penalty.step()
    doomed = masks.doomed["wide.weight"]
    torch.testing.assert_close(model.wide.weight.grad[doomed], model.wide.weight.detach()[doomed])


def test_it_is_the_penalty_of_the_runner():
    """The same optimizer, images and masks in the runner's training loop: the same weights, bit for bit."""
    from types import SimpleNamespace

    from structured_tickets.pruning.masks import HeldMask
    from structured_tickets.training.epoch import Passer, train
    from structured_tickets.training.penalty.reg_pruner import Pruner

    model, masks = examined("mine", 0.5)
    batches = [(torch.rand(4, 3, 9, 7), torch.arange(4)) for _ in range(6)]
    args = SimpleNamespace(
        RST_schedule="exp_custom_exponents",
        reg_granularity_prune=1.0,
        exponents=4.0,
        epochs=1,
        reg_horizon="state",
        reg_guard=False,
        reg_upper_limit=1.0,
        block_loss_grad=False,
        print_freq=100,
    )
    theirs, ours = copy.deepcopy(model), model.train()
    held = HeldMask(theirs, masks.pair.alive)
    held.apply()
    passer = Passer(args, masks.pair.current, masks.pair.refill, held=held)
    sgd = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9)
    train(1, batches, theirs, nn.CrossEntropyLoss(), sgd, 0, passer, Pruner(theirs, args, passer))
    optimizer, penalty = torch.optim.SGD(ours.parameters(), 0.05, momentum=0.9), st.Penalty(ours, masks, 6)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(ours(images), labels).backward()
        penalty.step()
        optimizer.step()
    assert _equal(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_goes_on_from_its_state_bit_for_bit(optimizer):
    model, masks = examined("mine", 0.5)
    images = torch.rand(4, 3, 9, 7)

    def make(parameters):
        made = OPTIMIZERS[optimizer](parameters)
        made.register_step_post_hook(lambda o, *_: o.param_groups[0].update(lr=0.9 * o.param_groups[0]["lr"]))
        return made

    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    wanted = trained(whole, masks, 8, make(whole.parameters()), images)
    first, sgd = st.Penalty(parts, masks, 8), make(parts.parameters())
    trained(parts, masks, 5, sgd, images, penalty=first)
    file = io.BytesIO()
    torch.save({"penalty": first.state_dict(), "model": parts.state_dict(), "optimizer": sgd.state_dict()}, file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = copy.deepcopy(model)
    again.load_state_dict(state["model"])
    sgd = make(again.parameters())
    sgd.load_state_dict(state["optimizer"])
    second = st.Penalty(again, masks, 8)
    second.load_state_dict(state["penalty"])
    assert second.strength == first.strength and second.squeeze == first.squeeze
    trained(again, masks, 3, sgd, images, penalty=second)
    assert _equal(dict(again.state_dict()), dict(whole.state_dict()))
    assert (second.squeeze, second.strength, second.done) == (wanted.squeeze, wanted.strength, 8)
    with pytest.raises(ValueError, match="was made for 8 steps, not 9"):
        st.Penalty(again, masks, 9).load_state_dict(state["penalty"])
    with pytest.raises(ValueError, match="not a state of a Penalty"):
        second.load_state_dict({"done": 3})


def test_accumulated_and_scaled_gradients_give_the_same_as_plain_ones():
    model, masks = examined("mine", 0.5)
    model.eval()  # normalisations do not look at the batch
    images = torch.rand(4, 3, 9, 7)
    models = [copy.deepcopy(model) for _ in range(3)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in models]
    penalties = [st.Penalty(m, masks, 3) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        models[0](images).square().mean().backward()
        penalties[0].step()
        optimizers[0].step()
        for half in images.split(2):
            (models[1](half).square().mean() / 2).backward()
        penalties[1].step()
        optimizers[1].step()
        scaler.scale(models[2](images).square().mean()).backward()
        scaler.unscale_(optimizers[2])
        penalties[2].step()
        scaler.step(optimizers[2])
        scaler.update()
    for other in models[1:]:
        for name, value in models[0].state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_under_autocast_and_without_a_gradient_for_some():
    """A branch that the loss does not reach is penalised, too."""
    model, masks = examined("mine", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    penalty = st.Penalty(model, masks, 20)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model.norm(model.first(torch.rand(2, 3, 9, 7))).sum().backward()
            model.back.weight.grad = torch.zeros_like(model.back.weight)
            penalty.step()
        optimizer.step()
    assert penalty.squeeze < 0.95 and all_zero(model, masks.dead)
    assert model.wide.weight.dtype == torch.float32


def test_frozen_weights_fade_too_and_may_be_thawed():
    model, masks = examined("mine", 0.5)
    model.wide.weight.requires_grad = model.norm2.weight.requires_grad = False
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    penalty = st.Penalty(model, masks, 12)
    trained(model, masks, 6, optimizer, torch.rand(4, 3, 9, 7), penalty=penalty)
    doomed = masks.doomed["wide.weight"]
    before = model.wide.weight.detach()[doomed].clone()
    model.wide.weight.requires_grad = True
    optimizer.add_param_group({"params": [model.wide.weight]})
    trained(model, masks, 1, optimizer, torch.rand(4, 3, 9, 7), penalty=penalty)
    assert model.wide.weight.grad is not None and not torch.equal(model.wide.weight[doomed], before)
    assert all_zero(model, masks.dead)


def test_a_network_that_has_moved_to_another_number_type_is_penalised_on():
    model, masks = examined("mine", 0.5)
    penalty = st.Penalty(model, masks, 3)
    model.double()
    sgd, images = torch.optim.SGD(model.parameters(), 0.1), torch.rand(4, 3, 9, 7, dtype=torch.float64)
    trained(model, masks, 3, sgd, images, penalty=penalty)
    assert all_zero(model, masks.dead) and penalty.squeeze < 1


def test_only_optimizers_of_the_network_count():
    model, masks = examined("mine", 0.5)
    penalty, other = st.Penalty(model, masks, 3), nn.Linear(2, 2)
    other(torch.rand(1, 2)).sum().backward()
    torch.optim.Adam(other.parameters()).step()
    assert penalty.decoupled is None
    trained(model, masks, 1, torch.optim.SGD(model.parameters(), 0.1), torch.rand(2, 3, 9, 7), penalty=penalty)
    assert penalty.decoupled is False


def test_a_new_penalty_takes_the_place_of_the_old_one_and_no_hook_is_left():
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    gc.collect()
    hooks = lambda: len(_global_optimizer_post_hooks) + len(_global_optimizer_pre_hooks)  # noqa: E731
    before = hooks()
    model, masks = examined("mine", 0.5)
    old = st.Penalty(model, masks, 3)
    new = st.Penalty(model, st.regroup(model, masks.units, 0.2, previous=masks), 3)
    assert hooks() == before + 2
    with pytest.raises(RuntimeError, match="this penalty has ended"):
        old.step()
    with pytest.raises(RuntimeError, match=r"there are no gradients: call step\(\) after loss.backward\(\)"):
        new.step()
    del new
    gc.collect()
    assert hooks() == before
    third = st.Penalty(model, masks, 3)
    third.release()
    with torch.no_grad():
        model.wide.weight.fill_(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model(torch.rand(2, 3, 9, 7)).sum().backward()
    optimizer.step()
    assert model.wide.weight.all() and hooks() == before


BAD_PENALTIES = {
    "steps": ({"steps": 0}, ValueError, "steps: 0 is not a whole number of at least 1"),
    "steps_type": ({"steps": 2.5}, TypeError, "steps: 2.5 is a float"),
    "strength": ({"strength": 0}, ValueError, "strength: 0 is not a number above 0"),
    "schedule": ({"schedule": "exp_costum"}, ValueError, r"schedule: .* \(did you mean 'exp_custom'"),
    "limit": ({"limit": -1}, ValueError, "limit: -1 is not a number above 0"),
    "exponents": ({"exponents": "4"}, TypeError, "exponents: '4' is a str"),
    "no exponents": ({"schedule": "x", "exponents": 2}, ValueError, "exponents: has no effect with schedule 'x'"),
    "decoupled": ({"decoupled": "yes"}, TypeError, "decoupled: 'yes' is not True, False or None"),
    "masks": ({"masks": {}}, TypeError, "masks is a dict"),
    "model": ({"model": Mine(width=16)}, ValueError, "the masks are those of another network"),
}


@pytest.mark.parametrize("name", BAD_PENALTIES)
def test_what_is_wrong_with_a_penalty_is_said_in_one_line(name):
    model, masks = examined("mine", 0.5)
    given, kind, message = BAD_PENALTIES[name]
    with pytest.raises(kind, match=message) as refused:
        st.Penalty(**{"model": model, "masks": masks, "steps": 3} | given)
    assert isinstance(refused.value, RunError) and "\n" not in str(refused.value)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_no_limit(schedule):
    model, masks = examined("mine", 0.5)
    power = {"exponents": 2} if SCHEDULES[schedule].reads_exponents else {}
    penalty = st.Penalty(model, masks, 3, schedule=schedule, strength=0.3, limit=float("inf"), **power)
    for k in range(3):
        model(torch.rand(2, 3, 9, 7)).sum().backward()
        penalty.step()
        clock = Clock(schedule, 0.3, 2, upper_limit=float("inf"))
        assert penalty.strength == clock.strength(0, k, 3)
    assert penalty.strength == pytest.approx(0.3), "all end at the strength that was asked for"


def test_the_heads_of_torchs_attention_fade():
    model, masks = examined("torchvision_vit", 0.5)
    sgd, images = torch.optim.AdamW(model.parameters(), 1e-3), torch.rand(2, 3, 16, 16)
    penalty = trained(model, masks, 20, sgd, images)
    assert penalty.squeeze < 0.05 and all_zero(model, masks.dead)
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in masks.doomed


# Shrink


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rate", [0.4, pytest.param(0.8, marks=pytest.mark.slow)])
def test_the_small_network_is_the_hardened_one(name, rate):
    model, masks = examined(name, rate)
    shape = NETWORKS[name][1]
    small, hard = st.shrink(model, masks), copy.deepcopy(model)
    masks.apply_(hard)
    torch.testing.assert_close(logits(small, shape), logits(hard, shape), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert type(small).__name__ == type(model).__name__
    small.train()(torch.rand(4, *shape)).sum().backward()
    assert any(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("name", ["mine", "deit"])
def test_modes_and_what_trains_are_kept_layer_by_layer(name):
    model, masks = examined(name, 0.4)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm))
    layer = next(n for n, m in model.named_modules() if m is frozen)
    frozen.eval().requires_grad_(False)
    small = st.shrink(model, masks)
    for network in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert network.training and not network.get_submodule(layer).training
        assert [n for n, p in network.named_parameters() if not p.requires_grad] == [f"{layer}.weight", f"{layer}.bias"]
    assert not st.shrink(model.eval(), masks).training


def test_masks_as_the_documented_functions_return_them():
    from pruning_utils import extract_mask, prune_model_custom_fillback, pruning_model

    model, shape = build("mine")
    model.conv1, model.fc = model.first, model.last  # the documents' names of what is not pruned
    pruned = copy.deepcopy(model)
    pruning_model(pruned, 0.5)
    current = extract_mask(pruned.state_dict())
    weights = model.state_dict()
    refill = prune_model_custom_fillback(
        copy.deepcopy(model), current, False, "magnitude", None, weights, weights, return_mask_only=True
    )
    assert "back" in refill
    hard, shrunk = build("mine")[0], {}
    for keys in ("{}", "{}.weight", "{}.weight_mask"):
        masks = {keys.format(n) if "." not in n else n: m for n, m in refill.items()}
        shrunk[keys] = st.shrink(build("mine")[0], masks, shape)
    with torch.no_grad():
        for name, mask in refill.items():
            hard.get_parameter(name if "." in name else f"{name}.weight").mul_(mask)
    for small in shrunk.values():
        torch.testing.assert_close(logits(small, shape), logits(hard, shape), rtol=1e-4, atol=1e-5)
        assert _equal(small.state_dict(), shrunk["{}"].state_dict())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in hard.parameters())


def test_a_single_masked_weight_stays_zero_where_nothing_can_be_removed():
    model, shape = build("mine")
    mask = torch.ones_like(model.wide.weight)
    mask[0, 0] = 0
    small = st.shrink(model, {"wide": mask}, shape)
    assert small.wide.weight.shape == model.wide.weight.shape and small.wide.weight[0, 0] == 0
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.wide.weight.mul_(mask)
    torch.testing.assert_close(logits(small, shape), logits(masked, shape))


BAD_MASKS = {
    "type": ([1], TypeError, "masks is a list, neither what regroup returns nor a mapping"),
    "values": ({"wide": torch.full((16, 8, 1, 1), 0.5)}, ValueError, "holds values other than 0 and 1"),
    "no tensor": ({"wide": [1]}, TypeError, r"masks\['wide'\] is a list, not a tensor"),
    "unknown": ({"wider": torch.ones(2)}, ValueError, "the masks do not fit Mine: it has no parameter wider.weight"),
    "shape": ({"wide": torch.ones(2)}, ValueError, r"the masks do not fit Mine: wide.weight has shape \(16, 8, 1, 1\)"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_what_is_wrong_with_masks_is_said_in_one_line(name):
    model, shape = build("mine")
    masks, kind, message = BAD_MASKS[name]
    with pytest.raises(kind, match=message) as refused:
        st.shrink(model, masks, shape)
    assert isinstance(refused.value, RunError) and "\n" not in str(refused.value)


def test_a_network_with_other_weights_or_another_function_is_refused():
    model, masks = examined("mine")
    with pytest.raises(ValueError, match="the masks are those of another network"):
        st.shrink(Mine(width=16), masks)
    with pytest.raises(ValueError, match="the channels of Branching cannot be followed"):
        st.shrink(Branching(), masks)
    with torch.no_grad():
        model.last.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="Mine gives logits that are not finite"):
        st.shrink(model, masks)


def test_what_would_compute_something_else_is_refused(monkeypatch):
    model, masks = examined("mine")
    from structured_tickets.shrinking import shrink as real_size
    from structured_tickets.shrinking.cuts import Shrunk

    monkeypatch.setattr(real_size, "shrink", lambda model, masks, **_: Shrunk(Mine(), {}))
    with pytest.raises(ValueError, match="Mine cannot be made smaller: without the pruned units its logits differ by"):
        st.shrink(model, masks)


# Save and load


FACTORIES = {
    "mine": Mine,
    "gray": lambda: Mine(1),
    "mobilenet": NETWORKS["mobilenet"][0],
    "densenet": NETWORKS["densenet"][0],
    "torchvision_vit": NETWORKS["torchvision_vit"][0],
    "deit": None,  # known by its name
}


def test_weights_that_two_layers_share_are_cut_in_both(tmp_path):
    model, shape = used(Tied()), (3, 8, 8)
    masks = st.regroup(model, st.units(model, shape), 0.5)
    small = st.shrink(model, masks)
    masks.apply_(model)
    assert small.back.weight is small.again.weight and small.back.weight.numel() < model.back.weight.numel()
    torch.testing.assert_close(logits(small, shape), logits(model, shape))


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_a_network_comes_back_bit_for_bit(name, dtype, tmp_path, caplog):
    model, masks = examined(name, 0.4)
    shape, factory = NETWORKS[name][1], FACTORIES[name]
    small = st.shrink(model.to(dtype), masks)
    optimizer = torch.optim.SGD(small.parameters(), 0.01)
    small.train()(torch.rand(4, *shape, dtype=dtype)).square().sum().backward()
    optimizer.step()
    before = Snapshot(small)
    with caplog.at_level(logging.INFO, "rsst"):
        st.save(small, tmp_path / "new" / "ticket")
    assert before.same(small) and sorted(p.name for p in tmp_path.rglob("*")) == [
        "config.json",
        "model.safetensors",
        "new",
        "ticket",
    ]
    assert ("cannot be built by a name: load it with load(" in caplog.text) is (factory is not None)
    if factory is not None:
        with pytest.raises(
            DataError, match=r"cannot be built by a name: call load with model=\.\.\., that network or a"
        ):
            st.load(tmp_path / "new" / "ticket")
    state = torch.get_rng_state()
    for given in (factory, factory and factory()):
        again = st.load(tmp_path / "new" / "ticket", model=given)
        assert not again.training
        assert torch.equal(logits(again, shape), logits(small, shape))
        assert _equal(again.state_dict(), small.state_dict())
    assert factory is not None or torch.equal(torch.get_rng_state(), state)
    st.save(again, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "new" / "ticket" / file).read_bytes()


BY_NAME = {
    "torchvision": (lambda: tv.squeezenet1_1(num_classes=5), (3, 32, 32)),
    "timm": (lambda: timm.create_model("test_efficientnet", num_classes=5, in_chans=1), (1, 32, 32)),
    "timm_vit": (lambda: timm.create_model("test_vit", num_classes=5, img_size=64, global_pool="avg"), (3, 64, 64)),
    "ours": (lambda: build_model("micro_cnn", 5, 8), (3, 8, 8)),
    "resnet18": (lambda: tv.resnet18(num_classes=5), (3, 32, 32)),
}


@pytest.mark.parametrize("name", [n if n.startswith("t") else pytest.param(n, marks=pytest.mark.slow) for n in BY_NAME])
def test_networks_of_libraries_are_built_by_their_name(name, tmp_path):
    make, shape = BY_NAME[name]
    torch.manual_seed(0)
    model = make()
    masks = st.regroup(model, st.units(model, shape), 0.5)
    small = copy.deepcopy(st.shrink(model, masks))
    st.save(small, tmp_path)
    again = st.load(tmp_path)
    assert torch.equal(logits(again, shape), logits(small, shape))
    assert sum(p.numel() for p in again.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())


def test_what_the_program_has_exported_is_loaded_too(tmp_path):
    torch.manual_seed(0)
    model = build_model("micro_cnn", 5, 8)
    kept = kept_units_of(model, st.regroup(model, st.units(model, (3, 8, 8)), 0.5).structure)
    model.normalize = Normalize((0.1,) * 3, (0.5,) * 3)
    small = shrink(model, structure_of(model, kept)).network.eval()
    config = {"arch": "micro_cnn", "image_size": 8, "classes": list("abcde"), "kept": kept}
    deployed.save(small, config, tmp_path)
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(st.load(tmp_path)(images), small(images))
    with pytest.raises(ValueError, match="was written by export and says which network it is; leave model out"):
        st.load(tmp_path, model=model)
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 1, "arch": "mine.py:net"}))
    with pytest.raises(DataError, match=r"the network in .* comes from mine\.py:net: give that as `arch`"):
        st.load(tmp_path)


def test_a_network_of_a_users_file_is_built_only_if_that_is_confirmed(tmp_path):
    """The runner's own networks know where they are from."""
    torch.manual_seed(0)
    arch = f"{ROOT / 'examples' / 'my_model.py'}:net"
    model = build_model(arch, 5, 16)
    small = st.shrink(model, st.regroup(model, st.units(model, (3, 16, 16)), 0.5))
    st.save(small, tmp_path)
    with pytest.raises(DataError, match=r"comes from .*my_model\.py:net: give that as `arch` to run its code"):
        st.load(tmp_path)
    assert torch.equal(logits(st.load(tmp_path, arch), (3, 16, 16)), logits(small, (3, 16, 16)))
    model, masks = examined("deit")
    st.save(st.shrink(model, masks), tmp_path)
    with pytest.raises(ValueError, match="says which network it is; leave arch out"):
        st.load(tmp_path, arch)


def test_arguments_that_change_no_shape_are_not_lost(tmp_path):
    """Dropout that a name would not bring back: the network then has to be given."""
    model = vit(proj_drop_rate=0.5)
    small = st.shrink(model, st.regroup(model, st.units(model), 0.4))
    st.save(small, tmp_path)
    with pytest.raises(DataError, match="cannot be built by a name"):
        st.load(tmp_path)
    assert st.load(tmp_path, model=lambda: vit(proj_drop_rate=0.5)).blocks[0].mlp.drop1.p == 0.5


def test_memory_layout_and_copies_are_kept(tmp_path):
    model, masks = examined("mine")
    small = st.shrink(model.to(memory_format=torch.channels_last), masks)
    assert not small.first.weight.is_contiguous()
    small = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(small))))
    st.save(nn.DataParallel(small), tmp_path)
    again = st.load(tmp_path, model=Mine)
    assert again.first.weight.stride() == small.first.weight.stride()
    assert torch.equal(logits(again, (3, 9, 7)), logits(small, (3, 9, 7)))


def test_only_what_was_shrunk_can_be_saved_and_only_its_network_given(tmp_path):
    model, masks = examined("mine")
    with pytest.raises(ValueError, match=r"this Mine did not come from structured_tickets\.shrink"):
        st.save(model, tmp_path / "ticket")
    with pytest.raises(TypeError, match="model is a str"):
        st.save("model", tmp_path / "ticket")
    assert not (tmp_path / "ticket").exists()
    st.save(st.shrink(model, masks), tmp_path / "ticket")
    with pytest.raises(ValueError, match=r"another network was saved: the first difference is in first\.weight"):
        st.load(tmp_path / "ticket", model=Mine(width=16))
    with pytest.raises(TypeError, match="model is a int"):
        st.load(tmp_path / "ticket", model=3)
    with pytest.raises(DataError, match="cannot read the network in"):
        st.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        st.save(st.shrink(model, masks), tmp_path / "file")


def test_what_was_changed_after_shrinking_needs_the_network(tmp_path):
    model = BY_NAME["timm_vit"][0]()
    small = st.shrink(model, st.regroup(model, st.units(model), 0.5))
    small.fc_norm = nn.Identity()
    st.save(small, tmp_path)
    with pytest.raises(DataError, match="cannot be built by a name"):
        st.load(tmp_path)


HOSTILE = {
    "no json": lambda c: "{",
    "a list": lambda c: "[]",
    "deep": lambda c: "[" * 100_000,
    "format": lambda c: json.dumps(c | {"format": 99}),
    "class": lambda c: json.dumps(c | {"network": {}}),
    "library": lambda c: json.dumps(c | {"network": {"class": "a", "library": "os", "name": "system"}}),
    "hub": lambda c: json.dumps(
        c | {"network": {"class": "a", "library": "timm", "name": "hf-hub:timm/test_vit", "arguments": {}}}
    ),
    "argument": lambda c: json.dumps(c | {"network": c["network"] | {"arguments": {"checkpoint_path": "/etc/passwd"}}}),
    "pool": lambda c: json.dumps(c | {"network": c["network"] | {"arguments": {"global_pool": "__import__('os')"}}}),
    "huge": lambda c: json.dumps(c | {"network": c["network"] | {"arguments": {"depth": 10**9}}}),
    "wide": lambda c: json.dumps(c | {"network": c["network"] | {"arguments": {"embed_dim": 12288, "depth": 200}}}),
    "true": lambda c: json.dumps(c | {"network": c["network"] | {"arguments": {"depth": True}}}),
    "shape": lambda c: json.dumps(c | {"shapes": c["shapes"] | {"head.bias": [10**9, 10**9]}}),
    "negative": lambda c: json.dumps(c | {"shapes": c["shapes"] | {"head.bias": [-5]}}),
    "kept": lambda c: json.dumps(c | {"kept": {"blocks.0.mlp.fc2.weight": {"1": [10**6]}}}),
    "axis": lambda c: json.dumps(c | {"kept": {"blocks.0.mlp.fc2.weight": {"7": [0]}}}),
    "parameter": lambda c: json.dumps(c | {"kept": {"nonesuch": {"0": [0]}}}),
    "text": lambda c: json.dumps(c | {"kept": {"blocks.0.mlp.fc2.weight": {"1": ["0"]}}}),
    "all": lambda c: json.dumps(c | {"kept": {}}),
    "image": lambda c: json.dumps(c | {"image": [3, 10**12, 32]}),
    "classes": lambda c: json.dumps(c | {"classes": 0}),
    "heads": lambda c: json.dumps(c | {"heads": "yes"}),
    "users file": lambda c: json.dumps(
        c | {"network": {"class": "a", "library": "structured_tickets", "name": "evil.py:net", "image_size": 32}}
    ),
    "unknown": lambda c: json.dumps(
        c | {"network": {"class": "a", "library": "structured_tickets", "name": "nonesuch", "image_size": 32}}
    ),
    "torchvision": lambda c: json.dumps(
        c | {"network": {"class": "a", "library": "torchvision", "name": "deeplabv3_resnet50", "image_size": 32}}
    ),
}


def test_shrink_tries_the_images_that_it_is_given_with_masks_too():
    model, masks = examined("mine")
    assert st.shrink(model, masks).structured_ticket.image == (3, 9, 7)
    assert st.shrink(model, masks, torch.zeros(2, 3, 12, 10)).structured_ticket.image == (3, 12, 10)
    with pytest.raises(ValueError, match="example_image has shape"):
        st.shrink(model, masks, (9, 7))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, masks = examined("deit", 0.4)
    st.save(st.shrink(model, masks), folder)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(name, saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(HOSTILE[name](config))
    with pytest.raises(DataError) as refused:
        st.load(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_damaged_tensors_are_refused(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    good = (saved / "model.safetensors").read_bytes()

    class Bomb:
        def __reduce__(self):
            return (tmp_path / "ran").mkdir, ()

    for content in (b"", good[:-9], pickle.dumps(Bomb())):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(DataError, match="cannot read the network"):
            st.load(tmp_path)
    assert not (tmp_path / "ran").exists()
