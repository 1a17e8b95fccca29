"""Parameters and multiply-accumulate operations (MACs) that a structure leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from structured_tickets.networks.vision_transformer import fused_attention
from structured_tickets.shrinking.channels import Cuts
from structured_tickets.shrinking.shrink import cut_value, shrink
from structured_tickets.unit_groups.operations import is_depthwise
from structured_tickets.unit_groups.unit import UnitGroup

# Kinds of unit that own nothing that is not counted with another kind, or weight by weight.
OVERLAPPING = ("patch", "block")


@dataclass(frozen=True)
class Cost:
    """What a network costs once everything that is masked is gone.

    Attributes:
        parameters: Trainable numbers that are left, biases of dropped units excluded.
        macs: Multiply-accumulates for one image: convolutions, linear layers, and attention's two products.
    """

    parameters: int
    macs: int


@dataclass
class _Use:
    """A layer's calls for one image.

    Attributes:
        positions: How many.
        products: Multiply-accumulates of all heads' attention, if the layer makes queries, keys and values.
    """

    positions: int = 0
    products: int = 0


def cost_of(model: nn.Module, groups: Sequence[UnitGroup], masks: Mapping[str, Tensor], image_size: int) -> Cost:
    """Count what the masks (by parameter name) leave of the model: of the network that `compact.shrink` makes of it.

    Weights that are pruned one by one are counted as if hardware could skip them.
    """
    small = shrink(model, masks) if masks else model
    cuts: Cuts = vars(small).get("cuts", {})
    layers, parameters = dict(small.named_modules()), dict(small.named_parameters())
    skipped = {
        name: mask.numel() - int(mask.count_nonzero())
        for name, mask in ((n, cut_value(m, cuts.get(n, {}))) for n, m in masks.items() if n in parameters)
        if not _is_grouped(layers[name.rpartition(".")[0]])  # its groups have to stay equally large
    }
    widths = {
        g.root.layer: parameters[g.root.name].shape[0] // 3
        for g in groups
        if g.kind == "head" and g.root.name in parameters
    }
    uses, macs = _uses(small, image_size, widths)
    for layer, use in uses.items():
        weight = f"{layer}.weight"
        macs += use.products + use.positions * (layers[layer].weight.numel() - skipped.get(weight, 0))  # type: ignore
    return Cost(sum(p.numel() for p in parameters.values()) - sum(skipped.values()), macs)


def _is_grouped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and not is_depthwise(layer)


def _uses(model: nn.Module, image_size: int, widths: Mapping[str, int]) -> tuple[dict[str, _Use], int]:
    """Run the network on one image and watch each layer.

    Windows or patches of the image that lie along the batch axis count like others.

    Args:
        widths: Layers that make queries, keys and values -> width of all heads.

    Returns:
        Layer -> what it is used for; the multiply-accumulates of attention that has no such layer.
    """
    found: dict[str, _Use] = {}
    attention = _Attention()

    def watch(layer: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            features = args[0] if args else kwargs["input"]
            channels = output.shape[1 if isinstance(module, _ConvNd) else -1]
            positions = output.numel() // channels
            if isinstance(module, _ConvNd) and module.transposed:  # every weight meets every input position
                positions = features.numel() // features.shape[1]
            found.setdefault(layer, _Use()).positions += positions  # a layer may be called again
            if layer in widths:
                attention.layer = layer

        return hook

    layers = [n for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)]
    handles = [model.get_submodule(n).register_forward_hook(watch(n), with_kwargs=True) for n in layers]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        device = next(model.parameters()).device
        eager = torch.compiler.set_stance("force_eager")  # compiled code would pass the hooks by
        with torch.no_grad(), eager, fused_attention(model, True), attention:
            model(torch.ones(1, 3, image_size, image_size, device=device))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    for layer, width in widths.items():
        # Attention that is written out is taken for one of all positions to each other.
        found[layer].products = attention.products.get(layer, 2 * found[layer].positions ** 2 * width)
    return found, attention.products.get("", 0)


class _Attention(TorchFunctionMode):
    """While it is on, counts the multiply-accumulates of attention's two products.

    Attributes:
        layer: The one whose queries, keys and values are next; empty after they have met.
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
