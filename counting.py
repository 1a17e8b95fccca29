"""Parameters and multiply-accumulate operations (MACs) that a structure leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from channel_tags import is_depthwise
from models.vision_transformer import fused_attention
from units import UnitGroup

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


@dataclass(frozen=True)
class _Use:
    """A layer's calls for one image.

    Attributes:
        positions: How many.
        live_inputs: Which input features ever differ from zero.
        products: Multiply-accumulates of all heads' attention, if the layer makes queries, keys and values.
    """

    positions: int
    live_inputs: Tensor
    products: int = 0


def cost_of(model: nn.Module, groups: Sequence[UnitGroup], masks: Mapping[str, Tensor], image_size: int) -> Cost:
    """Count what the masks (by parameter name) leave of the model.

    A weight counts if its mask is 1 and its input can be other than zero: inputs that only dropped channels feed are
    gone as well. Weights that are pruned one by one are counted as if hardware could skip them.
    """
    kept = {g.name: _live_units(g, masks) for g in groups if g.root.name in masks and g.kind not in OVERLAPPING}
    widths = {g.root.layer: g.root.index.numel() // 3 for g in groups if g.kind == "head"}
    uses, others = _uses(model, masks, image_size, widths)
    modules = dict(model.named_modules())
    macs = others + _attention_macs(groups, kept, uses)
    saved = 0
    for layer, use in uses.items():
        weight = modules[layer].weight  # type: ignore[union-attr]
        pairs = masks.get(f"{layer}.weight", torch.ones_like(weight)).detach().cpu()
        if _is_grouped(modules[layer]):  # its groups have to stay equally large
            pairs = torch.ones_like(pairs)
        elif pairs.shape[1] == len(use.live_inputs):
            pairs = pairs * use.live_inputs.view(1, -1, *[1] * (pairs.ndim - 2))
        left = int(pairs.count_nonzero())
        macs += use.positions * left
        saved += pairs.numel() - left
    saved += _dropped_vectors(model, groups, kept, masks)
    return Cost(sum(p.numel() for p in model.parameters()) - saved, macs)


def _is_grouped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and not is_depthwise(layer)


def _live_units(group: UnitGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """Units of which any slice has a weight left: a row of zeros alone still passes its bias on. bool [units]."""
    flags = [part.units_with_weights(masks[part.name]) for part in group.slices if part.ranked and part.name in masks]
    return torch.stack(flags).any(dim=0)


def _dropped_vectors(
    model: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> int:
    """Biases and normalisation entries that go with dropped units."""
    gone: dict[tuple[str, str], int] = {}
    for group in groups:
        for part in group.slices:
            if group.name not in kept or part.axis != 0:
                continue
            width = int((~kept[group.name]).sum()) * part.index.shape[1]
            layer, bias = model.get_submodule(part.layer), f"{part.layer}.bias"
            if part.param == "bias" or not part.ranked:
                gone[group.name, part.name] = width
            elif getattr(layer, "bias", None) is not None and not _is_grouped(layer):
                gone[group.name, bias] = width
    return sum(gone.values())


def _attention_macs(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], uses: Mapping[str, _Use]) -> int:
    total = 0
    for group in (g for g in groups if g.kind == "head"):
        heads = int(kept[group.name].sum()) if group.name in kept else group.units
        total += heads * uses[group.root.layer].products // group.units
    return total


def _uses(
    model: nn.Module, masks: Mapping[str, Tensor], image_size: int, widths: Mapping[str, int]
) -> tuple[dict[str, _Use], int]:
    """Run an all-positive network on one image of ones and watch what reaches each layer.

    Windows or patches of the image that lie along the batch axis count like others.

    With every weight at its mask, every normalisation harmless and every bias of a live channel positive, a feature
    is zero exactly if nothing live feeds it. Networks with LayerNorm have no such inputs: there all count as live.

    Args:
        widths: Layers that make queries, keys and values -> width of all heads.

    Returns:
        Layer -> what it is used for; the multiply-accumulates of attention that has no such layer.
    """
    found: dict[str, _Use] = {}
    attention = _Attention()
    state = _positive_state(model, masks)
    residual_norms = any(isinstance(m, nn.LayerNorm) for m in model.modules())

    def watch(layer: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            features = (args[0] if args else kwargs["input"]).detach()
            channels_first = isinstance(module, _ConvNd)
            axis = 1 if channels_first else -1
            live = features.movedim(axis, -1).flatten(0, -2).ne(0).any(0)
            positions = output.numel() // output.shape[axis]
            if channels_first and module.transposed:  # every weight meets every input position
                live, positions = torch.ones_like(live), features.numel() // features.shape[1]
            live = torch.ones_like(live).cpu() if residual_norms else live.cpu()
            before = found.get(layer, _Use(0, torch.zeros_like(live)))  # a layer may be called again
            found[layer] = _Use(before.positions + positions, before.live_inputs | live)
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
            functional_call(model, state, (torch.ones(1, 3, image_size, image_size, device=device),))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    for layer, width in widths.items():
        # Attention that is written out is taken for one of all positions to each other.
        products = attention.products.get(layer, 2 * found[layer].positions ** 2 * width)
        found[layer] = replace(found[layer], products=products)
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


def _positive_state(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        mask = masks[name].to(value.device) if name in masks else torch.ones_like(value)
        if name.endswith((".running_mean", "normalize.mean")):
            state[name] = torch.zeros_like(value)
        elif value.ndim > 1 and name.endswith("weight"):
            state[name] = mask / (value.numel() / value.shape[0])
        else:
            state[name] = mask.to(value.dtype)
    return state
