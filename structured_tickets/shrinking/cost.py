"""Parameters and multiply-accumulate operations (MACs) of the network that runs, as torch's own counter sees them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from structured_tickets.base.modes import in_mode
from structured_tickets.networks.kernels import encoders_in_steps, uncompiled
from structured_tickets.networks.layers import channels_side_by_side
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.unit_groups.kinds import KINDS

OVERLAPPING = tuple(name for name, kind in KINDS.items() if kind.holds_units or kind.by_weight)
"""Kinds of unit that own nothing that is not counted with another kind, or weight by weight."""


@dataclass(frozen=True)
class Cost:
    """Size of a network.

    Attributes:
        parameters: Number of values that are trained, or frozen.
        macs: Multiply-accumulates for one image: of convolutions, linear and recurrent layers, of attention's products,
            and of what puts few channels of large images back in their places, which else takes none.
    """

    parameters: int
    macs: int


def image_shape(image: int | Sequence[int]) -> tuple[int, ...]:
    """Return (channels, height, width) of images that are given by these, or by the side of square ones in colour."""
    return (3, image, image) if isinstance(image, int) else tuple(image)


def cost_of(model: nn.Module, masks: Mapping[str, Tensor], image: int | Sequence[int]) -> Cost:
    """Count parameters and MACs of the network that `shrink` makes of the model, in the layout in which it runs.

    Weights that are pruned one by one are still there, and counted: nothing that runs skips them.

    Args:
        masks: As for `shrink`; empty for the whole network.
        image: Its height and width, in pixels, or its shape: see `image_shape`.

    Raises:
        ValueError: A mask does not fit the model.
    """
    shape = image_shape(image)
    small = shrink(model, masks, image=shape).network if masks else copy.deepcopy(model)
    return _counted(channels_side_by_side(small).requires_grad_(False), shape)


@torch.no_grad()
def _counted(network: nn.Module, image: Sequence[int]) -> Cost:
    """Run a network, of which nothing needs a gradient, on one image of this shape in evaluation mode, and count."""
    like = next(network.parameters())
    images = torch.ones(1, *image, device=like.device, dtype=like.dtype)
    with FlopCounterMode(display=False) as counter, in_mode(network, training=False), _in_counted_operations(network):
        network(images)
    return Cost(sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)


@contextmanager
def _in_counted_operations(network: nn.Module) -> Iterator[None]:
    """Let attention, recurrent and compiled layers run as products of matrices, which the counter knows."""
    recurrent = any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in network.modules())
    with ExitStack() as stack:
        stack.enter_context(encoders_in_steps())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(uncompiled())
        if recurrent:  # else one operation of oneDNN's, which is not counted
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # setting the flags warns of hardware that is not there
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield
