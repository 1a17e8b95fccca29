"""Which channel is which: a network run on tags in place of numbers.

Rearrangements (splitting, concatenating, shuffling, slicing) move tags about as they move channels, whatever way they
are written, so that nobody has to know the patterns.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from structured_tickets.base.errors import UsageError, first_line

OTHER = -1.0
"""Tag of a channel that is none of those that are followed."""
ZERO = 0.0
"""Tag of a channel that is always zero (padding)."""

ZERO_STAYS_ZERO = frozenset(
    {
        StochasticDepth,
        DropPath,
        nn.Tanh,
        nn.Mish,
        torch.tanh,
        "tanh",
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.SiLU,
        nn.GELU,
        nn.Hardswish,
        nn.Identity,
        nn.Dropout,
        nn.Dropout2d,
        nn.ELU,
        nn.MaxPool2d,
        nn.AvgPool2d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveMaxPool2d,
        torch.relu,
        F.relu,
        F.relu6,
        F.leaky_relu,
        F.silu,
        F.gelu,
        F.hardswish,
        F.dropout,
        F.max_pool2d,
        F.elu,
        F.avg_pool2d,
        F.adaptive_avg_pool2d,
        F.adaptive_max_pool2d,
        "relu",
        "relu_",
        "contiguous",
        "clone",
    }
)
"""Modules, functions and methods that work on each channel by itself, keep its place and leave zeros zero."""

REARRANGING = frozenset(
    {
        torch.cat,
        torch.concat,
        torch.chunk,
        torch.split,
        torch.flatten,
        torch.transpose,
        torch.permute,
        torch.reshape,
        torch.stack,
        torch.unbind,
        torch.squeeze,
        torch.unsqueeze,
        torch.channel_shuffle,
        F.channel_shuffle,
        torch.unflatten,
        torch.narrow,
        torch.swapaxes,
        torch.movedim,
        torch.concatenate,
        torch.tensor_split,
        nn.Flatten,
        nn.ChannelShuffle,
        nn.Unflatten,
        "chunk",
        "split",
        "view",
        "reshape",
        "transpose",
        "permute",
        "flatten",
        "squeeze",
        "unsqueeze",
        "unbind",
        "expand",
        "unflatten",
        "narrow",
        "swapaxes",
        "movedim",
        "tensor_split",
    }
)
"""What only moves channels about."""


CONSTANT = re.compile(r"(?<=_tensor_constant)\d+")
SINGLE = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
"""Layers whose channels could not be told apart if they were called again."""
LEAVES = (nn.Conv2d, nn.BatchNorm2d, StochasticDepth, DropPath)


class Tracer(fx.Tracer):
    """Convolutions and normalisations are leaves, also those that other libraries derive from torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> fx.GraphModule:
    """The graph of a network's forward pass, over the network's own layers.

    Raises:
        UsageError: It depends on its input in a way that cannot be written down as a graph.
    """
    modes, own_names = {m: m.training for m in model.modules()}, set(vars(model))
    try:
        graphs = [Tracer().trace(model.train(mode)) for mode in (not model.training, model.training)]
    except Exception as error:  # whatever the network's code does with a value that is not a tensor
        reason = first_line(error)
        raise _not_followed(model, f"is no fixed graph ({reason})") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    other, own = (fx.GraphModule(model, graph) for graph in graphs)
    for name in set(vars(model)) - own_names:  # constants, which the tracer leaves on the network
        delattr(model, name)
    layers = dict(model.named_modules())
    calls = Counter(str(n.target) for n in own.graph.nodes if n.op == "call_module")
    twice = [n for n, times in calls.items() if times > 1 and isinstance(layers[n], SINGLE)]
    if twice:
        raise _not_followed(model, f"calls {twice[0]} more than once")
    if CONSTANT.sub("", other.code) != CONSTANT.sub("", own.code):
        raise _not_followed(model, "reads self.training; layers such as nn.Dropout may, the network itself may not")
    return own


def _not_followed(model: nn.Module, reason: str) -> UsageError:
    name = type(model).__name__
    return UsageError(f"argument --arch: the channels of {name} cannot be followed: its forward pass {reason}")


def is_plain_conv(module: object) -> bool:
    """A convolution of torch's own: filter by filter, its weights as they are."""
    own = module._parameters if type(module) is nn.Conv2d else {}
    return "weight" in own or (
        "weight_orig" in own and hasattr(module, "weight_mask")
    )  # the latter under torch's pruning


def is_silent_norm(module: object) -> bool:
    """A batch normalisation that gives zero where weight and bias are zero (an activation may be part of it)."""
    if type(module) is nn.BatchNorm2d:
        return True
    act = getattr(module, "act", None)
    if not isinstance(module, nn.BatchNorm2d) or not isinstance(act, nn.Module):
        return False
    with torch.no_grad():
        return bool((act(torch.zeros(1, 1, 1, 1)) == 0).all())


def is_depthwise(conv: object) -> bool:
    """A convolution with one filter a channel."""
    return isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels > 1


class ChannelTags(fx.Interpreter):
    """Runs a graph on tags: float64 [1, channels, 1, 1] for feature maps, whatever shape between rearrangements.

    Subclasses say what a module or function makes of tags, by `tags_of`. Sizes that the network reads off its tensors
    are those of one image of one pixel.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.layers = dict(network.named_modules())

    def run_on(self, channels: int = 3) -> None:
        """Follow an image of so many channels, none of which has a tag."""
        self.run(torch.full((1, channels, 1, 1), OTHER, dtype=torch.float64))

    def tags_of(self, node: fx.Node, called: Any, tags: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What comes out of a module, function or method (by name) that does more than rearrange.

        Args:
            called: The module, function or name.
            tags: The first tensor that goes in.
        """
        raise NotImplementedError

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        if n.op == "get_attr":
            value = super().run_node(n)
            return torch.full(value.shape, OTHER, dtype=torch.float64) if isinstance(value, Tensor) else value
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        called = self.layers[str(n.target)] if n.op == "call_module" else n.target
        value = self._outcome(n, called, args, kwargs)
        pixels = isinstance(value, Tensor) and value.ndim == 4 and value.shape[2:] != (1, 1)
        return torch.full_like(value[:, :, :1, :1], OTHER) if pixels else value  # pixels have become channels, or so

    def _outcome(self, node: fx.Node, called: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        if not tensors or called in ("size", "dim") or called is getattr:
            return self._really(node, args, kwargs)
        kind = type(called) if isinstance(called, nn.Module) else called
        try:
            if is_rearrangement(node, called) or called in ("contiguous", "clone"):
                return self.rearranged(node, called, self._really(node, *_without_pixels(called, args, kwargs)))
            if kind in ZERO_STAYS_ZERO:
                return self.passed_on(node, tensors[0])
            return self.tags_of(node, called, tensors[0], args, kwargs)
        except (RuntimeError, IndexError, TypeError):  # a fixed image size is part of the network's code
            return torch.full_like(tensors[0], OTHER)

    def passed_on(self, node: fx.Node, tags: Tensor) -> Tensor:
        """What comes out where each channel is worked on by itself and zeros stay zero."""
        return tags

    def rearranged(self, node: fx.Node, called: Any, value: Any) -> Any:
        """What comes out of a rearrangement that gives these tags."""
        return value

    def _really(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        return getattr(self, node.op)(node.target, args, kwargs)


def is_rearrangement(node: fx.Node, called: Any) -> bool:
    """Whether a call moves channels about and does nothing else to them."""
    kind = type(called) if isinstance(called, nn.Module) else called
    if kind in REARRANGING or getattr(called, "__name__", "") == "getitem":
        return True
    if kind is F.pad:
        zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
        return bool(len(node.args) == 2 and zeros)
    return kind in ("mean", torch.mean) and averages_pixels(node)


def passes_on(node: fx.Node, called: Any) -> bool:
    """Whether a call keeps each channel what it is: moved about, or worked on by itself."""
    kind = type(called) if isinstance(called, nn.Module) else called
    return is_rearrangement(node, called) or kind in ZERO_STAYS_ZERO


def averages_pixels(node: fx.Node) -> bool:
    """Whether a mean is taken over pixels only."""
    words = [*node.args[1:], *node.kwargs.values()]
    axes: Any = words[0] if words else None
    return isinstance(axes, tuple | list) and all(a in (2, 3, -1, -2) for a in axes)


def _without_pixels(called: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The same rearrangement of tensors whose images have one pixel."""
    if called is F.pad:
        return (args[0], [0, 0, 0, 0, *args[1][4:]]), kwargs
    if getattr(called, "__name__", "") == "getitem" and isinstance(args[0], Tensor) and isinstance(args[1], tuple):
        return (args[0], args[1][:2]), kwargs
    return args, kwargs


def _flat(values: tuple | list) -> list[Any]:
    out: list[Any] = []
    for value in values:
        out += _flat(value) if isinstance(value, tuple | list) else [value]
    return out


def new_tags(count: int, first: float) -> Tensor:
    """Tags `first`, `first` + 1, ... of a feature map: [1, count, 1, 1]."""
    return torch.arange(first, first + count, dtype=torch.float64).view(1, -1, 1, 1)
