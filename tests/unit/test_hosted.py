"""A user's network stays as it was made; its host normalises in front of it and keeps the notes."""

from __future__ import annotations

import copy
import importlib.util
import pickle

import pytest
import torch
from helpers.commands import ROOT
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

from structured_tickets.base.errors import UsageError
from structured_tickets.base.modes import in_mode, obey_modes_of, set_mode
from structured_tickets.networks import build_model, spec_of
from structured_tickets.networks.hosted import bare, normalize_of, normalize_place, of_the_data, put_normalize
from structured_tickets.networks.kernels import set_fused_attention
from structured_tickets.networks.layers import Normalize
from structured_tickets.pruning.masks import in_place_of
from structured_tickets.unit_groups.tracing import traced

FILE = ROOT / "tests" / "helpers" / "users_networks.py"
NETWORKS = (
    "plain",
    "shifted",
    "listed",
    "normalizes_features",
    "scales_images",
    "remembers",
    "frozen",
    "helped",
    "vit",
)


def own(factory):
    """The network as the user's file makes it, from seed 0."""
    spec = importlib.util.spec_from_file_location("as_the_user_has_it", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return getattr(module, factory)(10)


def held(factory):
    torch.manual_seed(0)
    return build_model(f"{FILE}:{factory}", 10, 8)


def logits(outcome):
    return outcome[0] if isinstance(outcome, tuple) else outcome


@pytest.mark.parametrize("factory", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_the_network_that_trains_is_the_users(factory, training):
    theirs, model, images = own(factory), held(factory), torch.rand(4, 3, 8, 8)
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    put_normalize(model, normalize)
    found = model.train(training)(images)
    assert torch.equal(found, logits(theirs.train(training)(normalize(images))))


@pytest.mark.parametrize("factory", NETWORKS)
def test_class_attributes_hooks_and_modes_are_as_they_were(factory):
    theirs, network = own(factory), bare(held(factory))
    assert type(network).__name__ == type(theirs).__name__ and type(network).__bases__ != (type(theirs),)
    for (name, layer), (_, before) in zip(network.named_modules(), theirs.named_modules(), strict=True):
        assert vars(layer).keys() == vars(before).keys(), name
        assert layer.training == before.training and len(layer._forward_hooks) == len(before._forward_hooks), name
    assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in theirs.parameters()]
    if factory == "remembers":
        assert (network.calls, network.seen, network.names) == (0, {}, ["a", "b"])


@pytest.mark.parametrize("factory", NETWORKS)
def test_names_are_the_users_with_the_images_constants_beside_them(factory):
    theirs, model = own(factory), held(factory)
    put_normalize(model, Normalize((0.4,) * 3, (0.2,) * 3))
    names = [n for n in model.state_dict() if n not in of_the_data(model)]
    assert names == list(theirs.state_dict()) and of_the_data(model) <= model.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    first = next(iter(model.state_dict()))
    assert (first in of_the_data(model)) == (factory == "listed"), "where files of these networks have always had it"


def test_images_are_normalised_where_the_network_says_or_in_front():
    for factory, place in (("plain", "normalize"), ("normalizes_images", "normalize"), ("scales_images", "normalize_")):
        assert normalize_place(held(factory)) == place
    model = held("normalizes_images")
    put_normalize(model, Normalize((0.4,) * 3, (0.2,) * 3))
    assert isinstance(bare(model).normalize, Normalize) and normalize_of(model) is bare(model).normalize
    assert isinstance(bare(held("scales_images")).normalize, nn.BatchNorm2d)
    assert isinstance(bare(held("normalizes_features")).normalize, nn.LayerNorm)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("factory", ["shifted", "plain", "normalizes_images"])
@torch.no_grad()
def test_a_copy_is_the_same_network_and_independent(twin, factory):
    model, images = held(factory).eval(), torch.rand(2, 3, 8, 8)
    other = twin(model)
    assert torch.equal(other(images), model(images)) and spec_of(other) == spec_of(model)
    assert type(other) is type(model) and type(bare(other)) is type(bare(model)) and bare(other) is not bare(model)
    for parameter in other.parameters():
        parameter.zero_()
    put_normalize(other, Normalize((0.4,) * 3, (0.2,) * 3))
    assert all(p.any() for n, p in model.named_parameters() if n.endswith("weight"))
    assert torch.equal(logits(bare(other)(images)), other(images)), "the copy's host and network share their weights"
    assert isinstance(normalize_of(model), nn.Identity)


@torch.no_grad()
def test_what_is_changed_through_the_host_changes_the_network():
    model, images = held("shifted").eval(), torch.rand(2, 3, 8, 8)
    before = model(images)
    louder = functional_call(model, {"gain": torch.full((1,), 6.0)}, (images,))
    torch.testing.assert_close(louder, 2 * before)
    model.load_state_dict(model.state_dict() | {"gain": torch.full((1,), 6.0)})
    torch.testing.assert_close(model(images), 2 * before)
    setattr(model, "5", nn.Linear(12, 10).requires_grad_(False).double().float())
    assert bare(model)[5] is model.get_submodule("5")
    prune.l1_unstructured(model.get_submodule("1.0"), "weight", 0.5)
    assert float((bare(model)[1][0].weight == 0).float().mean()) >= 0.5
    assert {p.dtype for p in bare(model.double()).parameters()} == {torch.float64}


def test_a_graph_and_an_exported_program_have_the_users_names():
    model, images = held("shifted").eval(), torch.rand(2, 3, 8, 8)
    graph = traced(model)
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(graph(images), model(images))
    program = torch.export.export(model, (images,), strict=False)
    assert program.state_dict.keys() == model.state_dict().keys()
    torch.testing.assert_close(program.module()(images), model(images))


def test_a_layer_that_is_made_later_has_the_weights_of_the_seed():
    theirs = own("lazy")
    torch.manual_seed(1)
    theirs(torch.rand(2, 3, 8, 8, generator=torch.Generator()))
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location("as_the_user_has_it", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    wanted = module.lazy(10)
    wanted(torch.rand(2, 3, 8, 8, generator=torch.Generator()))
    assert torch.equal(bare(held("lazy")).head.weight, wanted.head.weight)


@pytest.mark.parametrize(
    "body, message",
    [
        ("net = nn.Identity()", "gives a network without parameters"),
        ("net = nn.Linear(3, 3); net.lock = __import__('threading').Lock()", "cannot be copied (TypeError"),
        ("net = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))", "TorchScript"),
        (
            "net = type('Net', (nn.Sequential,), {'get_extra_state': lambda self: 'notes', 'set_extra_state': print})"
            "(nn.Flatten(), nn.Linear(192, 10))",
            "has _extra_state in its state dict",
        ),
        (
            "net = type('Net', (nn.Sequential,), {'forward': lambda self, x: {'y': 1} if self.training else "
            "nn.Sequential.forward(self, x)})(nn.Flatten(), nn.Linear(192, 10))",
            "gives dict for two images while it trains",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_in_a_line(body, message, tmp_path):
    (tmp_path / "net.py").write_text(
        f"import torch\nfrom torch import nn\ndef net(num_classes):\n    {body}\n    return net\n"
    )
    with pytest.raises(UsageError, match="argument --arch: ") as found:
        build_model(f"{tmp_path / 'net.py'}:net", 10, 8)
    assert message in str(found.value) and "\n" not in str(found.value)


def modes(model):
    return {n: layer.training for n, layer in model.named_modules()}


def test_modes_are_those_of_the_users_train_and_frozen_statistics_rest():
    model = held("frozen")
    graph = traced(copy.deepcopy(model))
    for training in (True, False, True):
        set_mode(model, training)
        at_rest = {n for n, mode in modes(model).items() if not mode}
        if training:
            assert at_rest == {"stem", "stem.0", "stem.1", "stem.2", "late.1", "one.1"}
        obey_modes_of(graph, model)
        with in_mode(model, not training):
            set_mode(graph, training)
            assert {n for n, mode in modes(graph).items() if not mode} == at_rest & modes(graph).keys()
            assert modes(model)["two.1"] is not training, "the network itself is left in its mode"


def test_a_users_own_choice_of_kernel_is_kept():
    model = held("vit")
    bare(model).blocks[0].attn.fused_attn = False
    set_fused_attention(model, True)
    assert bare(model).blocks[0].attn.fused_attn is False
    ours = build_model("vit_tiny", 10, 8)
    set_fused_attention(ours, False)
    assert not any(block.attn.fused_attn for block in ours.blocks)


@pytest.mark.parametrize("factory", ["vit_that_shares", "shifted", "frozen"])
@torch.no_grad()
def test_values_can_take_the_place_of_the_weights(factory):
    model, other, images = held(factory).eval(), held(factory).eval(), torch.rand(2, 3, 8, 8)
    for parameter in other.parameters():
        parameter.mul_(2)
    found = functional_call(model, in_place_of(model, other.state_dict()), (images,))
    torch.testing.assert_close(found, other(images))
