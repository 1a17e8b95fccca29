"""Why a layer with weights has no units."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from structured_tickets.networks.layers import CONVOLUTIONS, TRANSPOSED
from structured_tickets.networks.registry import ModelSpec
from structured_tickets.unit_groups.unit import UnitGroup, parameter_of

FIRST = "first layer"
CLASSIFIER = "classifier: its outputs are the logits"
LINEAR = "linear layer of a convolutional network, where only channels are units"
TORCHS_ATTENTION = (
    "torch's own attention, whose heads cannot be removed. Write it with two linear layers qkv and proj, and the "
    "number of heads in num_heads"
)
ALWAYS = (FIRST, CLASSIFIER, LINEAR)
"""Beginnings of reasons that hold for every network."""


def weights_of(group: UnitGroup) -> set[str]:
    """Return the layers whose weights the group's units own."""
    return {s.layer for s in group.slices if s.ranked}


def layers_of(model: nn.Module, group: UnitGroup) -> set[str]:
    """Return the layers whose weights the group's units own, under all their names."""
    own = {id(parameter_of(model, s.name)) for s in group.slices if s.ranked}
    named = model.named_parameters(remove_duplicate=False)
    return weights_of(group) | {name.rpartition(".")[0] for name, value in named if id(value) in own}


def left_alone(
    model: nn.Module,
    spec: ModelSpec,
    groups: Sequence[UnitGroup],
    transformer: bool,
    uncalled: Collection[str] = (),
    stem: str = "",
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the layers of a network that no group owns the weights of: layer -> the reason, in words.

    Args:
        uncalled: Layers that are not called in a forward pass.
        stem: What is said of the first layer besides.
        known: What following the network's features has shown: layer -> the reason.
    """
    pruned = {s.layer for g in groups for s in g.slices}.union(*(layers_of(model, g) for g in groups))
    kinds = _ConvNd | nn.Linear | nn.MultiheadAttention
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n not in pruned}
    first = FIRST + ("" if transformer else stem)
    reasons = {n: (known or {}).get(n) or _reason(m, transformer) for n, m in layers.items()}
    reasons |= dict.fromkeys((n for n in layers if n in uncalled), "not called in a forward pass")
    torchs = [n for n, m in layers.items() if isinstance(m, nn.MultiheadAttention)]
    inside = tuple(f"{n}." for n in torchs)
    reasons = {n: r for n, r in reasons.items() if not n.startswith(inside)} | dict.fromkeys(torchs, TORCHS_ATTENTION)
    return reasons | {n: reason for n, reason in ((spec.classifier, CLASSIFIER), (spec.stem, first)) if n in layers}


def _reason(layer: nn.Module, transformer: bool) -> str:
    if transformer:
        return "part of neither an attention layer nor an MLP whose units can be told apart"
    if isinstance(layer, nn.Linear):
        return LINEAR
    if type(layer) not in (*CONVOLUTIONS, *TRANSPOSED):
        return f"{type(layer).__name__}: only channels of torch's own convolutions, not parametrized ones, are found"
    if type(layer) is not nn.Conv2d:
        return f"{type(layer).__name__}: its channels were not looked for, or others go with them"
    return "its outputs are added up to the logits, or no layer reads them"
