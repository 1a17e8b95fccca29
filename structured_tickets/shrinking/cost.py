"""Parameters and multiply-accumulate operations (MACs) that a structure leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from structured_tickets.base.modes import in_mode
from structured_tickets.networks.vision_transformer import fused_attention
from structured_tickets.shrinking.cuts import Cuts, Shrunk, cut_value
from structured_tickets.shrinking.shrink import masks_by_parameter, shrink
from structured_tickets.unit_groups.kinds import KINDS
from structured_tickets.unit_groups.operations import is_depthwise
from structured_tickets.unit_groups.unit import UnitGroup

OVERLAPPING = tuple(name for name, kind in KINDS.items() if kind.holds_units or kind.by_weight)
"""Kinds of unit that own nothing that is not counted with another kind, or weight by weight."""


@dataclass(frozen=True)
class Cost:
    """Size of a network without everything that is masked.

    Attributes:
        parameters: Number of trainable values that are left, biases of pruned units excluded.
        macs: Multiply-accumulates for one image: convolutions, linear layers, and attention's two products.
    """

    parameters: int
    macs: int


def image_shape(image: int | Sequence[int]) -> tuple[int, ...]:
    """Return (channels, height, width) of images that are given by these, or by the side of square ones in colour."""
    return (3, image, image) if isinstance(image, int) else tuple(image)


def cost_of(
    model: nn.Module, groups: Sequence[UnitGroup], masks: Mapping[str, Tensor], image: int | Sequence[int]
) -> Cost:
    """Count parameters and MACs of the network that `shrink` makes of the model.

    Weights that are pruned one by one are counted as if hardware could skip them.

    Args:
        masks: As for `shrink`; empty for the whole network.
        image: Its height and width, in pixels, or its shape: see `image_shape`.

    Raises:
        ValueError: A mask does not fit the model.
    """
    small, cuts = shrink(model, masks, image=image_shape(image)) if masks else Shrunk(model, {})
    skipped = _zeros_left(small, masks_by_parameter(model, masks), cuts)
    heads = {g.root.layer for g in groups if g.kind == "head"}
    parameters = sum(p.numel() for p in small.parameters()) - sum(skipped.values())
    return Cost(parameters, _macs(small, heads, skipped, image_shape(image)))


def _zeros_left(small: nn.Module, masks: Mapping[str, Tensor], cuts: Cuts) -> dict[str, int]:
    """Return how many masked weights the smaller network still has: parameter name -> number."""
    layers, names = dict(small.named_modules()), {n for n, _ in small.named_parameters()}
    left = {n: cut_value(mask, cuts.get(n, {})) for n, mask in masks.items() if n in names}
    return {
        name: mask.numel() - int(mask.count_nonzero())
        for name, mask in left.items()
        if not _is_grouped(layers[name.rpartition(".")[0]])  # its groups have to stay equally large
    }


def _is_grouped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and not is_depthwise(layer)


def _macs(network: nn.Module, heads: set[str], skipped: Mapping[str, int], image: Sequence[int]) -> int:
    """Return the multiply-accumulates for one image.

    Args:
        heads: Layers that make queries, keys and values.
        skipped: Parameter name -> number of its entries that are not counted.
    """
    layers: dict[str, Any] = {n: m for n, m in network.named_modules() if isinstance(m, _ConvNd | nn.Linear)}
    positions, products = _use(network, layers, heads & layers.keys(), image)
    weights = {n: layers[n].weight.numel() - skipped.get(f"{n}.weight", 0) for n in positions}
    return sum(products.values()) + sum(positions[n] * weights[n] for n in positions)


def _use(
    network: nn.Module, layers: Mapping[str, Any], heads: Collection[str], image: Sequence[int]
) -> tuple[Counter[str], dict[str, int]]:
    """Run the network on one image, and leave it as it was.

    Windows or patches of the image that lie along the batch axis count like others.

    Returns:
        Layer -> positions at which it is computed; layer of `heads` (or nothing, for attention without such a layer)
        -> multiply-accumulates of attention's two products.
    """
    positions: Counter[str] = Counter()
    attention = _AttentionProducts()

    def watch(name: str) -> Callable:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            positions[name] += _positions(layer, args[0] if args else kwargs["input"], output)  # of every call
            if name in heads:
                attention.layer = name

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    like = next(network.parameters())
    eager = torch.compiler.set_stance("force_eager")  # compiled code would pass the hooks by
    try:
        with in_mode(network, training=False), torch.no_grad(), eager, fused_attention(network, True), attention:
            network(torch.ones(1, *image, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    # Attention that is written out is taken for one of all positions to each other.
    written_out = {n: 2 * positions[n] ** 2 * (layers[n].out_features // 3) for n in heads}
    return positions, written_out | attention.products


def _positions(layer: nn.Module, features: Tensor, output: Tensor) -> int:
    """Return at how many positions all weights of a layer are multiplied in one call."""
    if isinstance(layer, _ConvNd) and layer.transposed:  # every weight meets every input position
        return features.numel() // features.shape[1]
    return output.numel() // output.shape[1 if isinstance(layer, _ConvNd) else -1]


class _AttentionProducts(TorchFunctionMode):
    """Count the multiply-accumulates of attention's two products while it is on.

    Attributes:
        layer: Layer that made the last queries, keys and values; empty once attention has used them.
        products: Such a layer, or nothing for attention without one -> multiply-accumulates of all heads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = ""
        self.products: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            times = query.shape[:-1].numel() * key.shape[-2]
            before = self.products.get(self.layer, 0)
            self.products[self.layer] = before + times * (query.shape[-1] + value.shape[-1])
            self.layer = ""
        return func(*args, **(kwargs or {}))
