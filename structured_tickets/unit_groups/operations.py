"""Operations that tracing and channel removal know. To support another one, add it to the table that describes it.

An entry is a type of module, a function, or a name: of a tensor method, or `library.Type` of a library's module. An
operation that is in no table is allowed: it gets all channels, and nothing is assumed of what comes out.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from structured_tickets.networks.layers import CONVOLUTIONS

COPIES = frozenset({"contiguous", "clone"})
"""Gives the same numbers in the same places."""

ZERO_STAYS_ZERO = COPIES | {
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Mish,
    nn.Hardswish,
    nn.Tanh,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    "torchvision.StochasticDepth",
    "timm.DropPath",
    torch.relu,
    torch.tanh,
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.silu,
    F.gelu,
    F.hardswish,
    F.dropout,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    "relu",
    "relu_",
    "tanh",
}
"""Works on each channel by itself, keeps its place, and gives zeros for a channel of zeros."""

ZERO_BECOMES_NONZERO = frozenset({nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid"})
"""Works on each number by itself, and gives something else than zero for a zero."""

CONCATENATIONS = frozenset({torch.cat, torch.concat})
"""Puts the channels of several tensors one after another; channels that are removed before stay removed."""

FLATTENINGS = frozenset({torch.flatten, "flatten"})
"""Joins axes from the one that its first argument names."""

RESHAPES = frozenset({torch.reshape, "reshape", "view"})
"""Gives the same numbers in the same order another shape, which its arguments name."""

REARRANGING = (
    CONCATENATIONS
    | FLATTENINGS
    | RESHAPES
    | {
        nn.Flatten,
        nn.Unflatten,
        nn.ChannelShuffle,
        operator.getitem,
        torch.concatenate,
        torch.stack,
        torch.chunk,
        torch.split,
        torch.tensor_split,
        torch.unbind,
        torch.narrow,
        torch.transpose,
        torch.permute,
        torch.swapaxes,
        torch.movedim,
        torch.squeeze,
        torch.unsqueeze,
        torch.unflatten,
        torch.channel_shuffle,
        F.channel_shuffle,
        "chunk",
        "split",
        "tensor_split",
        "unbind",
        "narrow",
        "transpose",
        "permute",
        "swapaxes",
        "movedim",
        "squeeze",
        "unsqueeze",
        "unflatten",
        "expand",
    }
)
"""Moves channels to other places, or repeats or leaves out some, and computes nothing."""

MEANS = frozenset({torch.mean, "mean"})
"""Averages over the axes that its arguments name."""

ADDITIONS = frozenset({operator.add, operator.iadd, torch.add})
"""Adds two tensors: a channel of the sum is zero where both summands are."""

PRODUCTS = frozenset({operator.mul, operator.imul, torch.mul})
"""Multiplies two tensors: a channel of the product is zero where either factor is."""

SIZES = frozenset({getattr, "size", "dim"})
"""Reads a tensor's shape or another attribute: what comes out is no feature map."""

KEEPS_NUMBER = (
    ZERO_BECOMES_NONZERO
    | ADDITIONS
    | PRODUCTS
    | MEANS
    | {
        nn.Softmax,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.InstanceNorm2d,
        nn.LocalResponseNorm,
        nn.ConstantPad2d,
        nn.ZeroPad2d,
        nn.ReflectionPad2d,
        nn.Upsample,
        nn.PReLU,
        torch.softmax,
        torch.exp,
        torch.sum,
        torch.sqrt,
        operator.truediv,
        operator.sub,
        F.softmax,
        F.layer_norm,
        F.group_norm,
        F.interpolate,
        F.pad,
        F.normalize,
        F.softplus,
        "softmax",
        "sum",
        "exp",
        "sub",
        "div",
    }
)
"""Gives as many channels as it takes, or none."""

CALLED_ONCE = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
"""Layers that own channels, derived ones too. A network that calls one twice is refused: its channels have two uses."""

LEFT_OUT = frozenset({"torchvision.StochasticDepth", "timm.DropPath"})
"""Layers that leave their input out at random."""
LEAVES = frozenset({nn.Conv2d, nn.BatchNorm2d}) | LEFT_OUT
"""Layers, derived ones too, that are one call in a traced graph, whatever they call themselves."""
LIBRARIES = ("timm.layers", "torchvision.ops")
"""Of whose modules the tables have names: these libraries take seconds to import, and not all networks need them."""


def kind_of(called: Any) -> Any:
    """Return the entry of the tables that describes a module, a function or the name of a method."""
    return _entry_of(type(called)) if isinstance(called, nn.Module) else called


def _entry_of(kind: type) -> Any:
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}" if kind.__module__.startswith(LIBRARIES) else kind


def is_leaf(module: nn.Module) -> bool:
    """True for a layer of `LEAVES`."""
    return not LEAVES.isdisjoint(map(_entry_of, type(module).__mro__))


def is_mlp_of_torchvision(module: object) -> bool:
    """True for torchvision's own MLP, or what is derived from it."""
    return "torchvision.MLP" in map(_entry_of, type(module).__mro__)


def is_rearrangement(node: fx.Node, called: Any) -> bool:
    """True if a call moves channels to other places and does nothing else to them."""
    kind = kind_of(called)
    if kind is F.pad:
        return pads_with_zeros(node)
    return kind in REARRANGING or (kind in MEANS and averages_pixels(node))


def keeps_channels(node: fx.Node, called: Any) -> bool:
    """True if a call moves channels to other places, or works on each by itself."""
    return is_rearrangement(node, called) or kind_of(called) in ZERO_STAYS_ZERO


def pads_with_zeros(node: fx.Node) -> bool:
    """True if a call of `F.pad` adds zeros, and gives the numbers of them as its second argument."""
    zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
    return len(node.args) == 2 and bool(zeros)


def averages_pixels(node: fx.Node) -> bool:
    """True if a mean is taken over pixels only."""
    words = _words(node)
    axes: Any = words[0] if words else None
    return isinstance(axes, tuple | list) and all(a in (2, 3, -1, -2) for a in axes)


def keeps_channel_order(node: fx.Node, called: Any) -> bool:
    """True if a call averages or selects pixels, or lays them out channel after channel: channels keep their order."""
    words = _words(node)
    if called is operator.getitem:
        return _selects_pixels(words[0])
    if called in RESHAPES:
        return bool(len(words) == 2 and words[1] == -1)
    if called in FLATTENINGS:
        return words[:1] == [1]
    if called in MEANS:
        return averages_pixels(node)
    return isinstance(called, nn.Flatten) and called.start_dim == 1


def _selects_pixels(index: Any) -> bool:
    """True for an index that takes all images and channels and slices of the other axes."""
    slices = isinstance(index, tuple) and len(index) >= 2 and all(isinstance(i, slice) for i in index)
    return slices and all(i == slice(None) for i in index[:2])


def _words(node: fx.Node) -> list[Any]:
    """Return all arguments of a call but its first."""
    return [*node.args[1:], *node.kwargs.values()]


def is_plain_conv(module: object, kinds: Collection[type[nn.Module]] = (nn.Conv2d,)) -> bool:
    """True for a convolution of torch's own, plain or under torch's pruning: its filters are its weights."""
    own = module._parameters if isinstance(module, nn.Module) and type(module) in kinds else {}
    return "weight" in own or ("weight_orig" in own and hasattr(module, "weight_mask"))


def is_depthwise(conv: object) -> bool:
    """True for a convolution with one filter per channel."""
    return isinstance(conv, CONVOLUTIONS) and conv.groups == conv.in_channels == conv.out_channels > 1


def is_prunable_norm(module: object, kinds: tuple[type[nn.Module], ...] = (nn.BatchNorm2d,)) -> bool:
    """True for a batch normalisation that gives zero where weight and bias are zero, an activation in it included."""
    if type(module) in kinds:
        return True
    act = getattr(module, "act", None)
    if not isinstance(module, kinds) or not isinstance(act, nn.Module):
        return False
    with torch.no_grad():
        return bool((act(torch.zeros(1, 1, 1, 1)) == 0).all())
