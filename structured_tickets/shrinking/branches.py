"""Remove pruned heads and neurons of a transformer; with the last of them the branch, down to its bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from structured_tickets.networks.attention import SelfAttention
from structured_tickets.shrinking.cuts import Cuts, cut_layer
from structured_tickets.shrinking.inserted_layers import Constant
from structured_tickets.shrinking.kept_units import used_units
from structured_tickets.unit_groups.unit import UnitGroup


def remove_units(model: nn.Module, groups: Sequence[UnitGroup], masks: Mapping[str, Tensor]) -> Cuts:
    """Remove the units whose outgoing weights are all masked, in place.

    Args:
        masks: Parameter name -> 0/1. The weights must be masked already.

    Returns:
        Kept positions of each parameter that is smaller now.
    """
    cuts: Cuts = {}
    for group in groups:
        readers = [s for s in group.slices if s.axis == 1]
        kept = used_units(group, masks)
        if not readers or bool(kept.all()):
            continue
        branch, _, _ = group.root.layer.rpartition(".")
        if not branch and not bool(kept.any()):  # the network itself cannot be replaced, and one masked unit adds zero
            kept[0] = True
        if bool(kept.any()):
            _narrow_branch(model, branch, group, kept, cuts)
        else:
            _replace_branch(model, branch, readers[0].layer)
    return cuts


def _narrow_branch(model: nn.Module, branch: str, group: UnitGroup, kept: Tensor, cuts: Cuts) -> None:
    for part in group.slices:
        layer: Any = model.get_submodule(part.layer)
        positions = {part.axis: part.index[kept].flatten().sort().values}
        tensors = ("weight",) if part.axis else ("weight", "bias")
        cut_layer(layer, part.layer, dict.fromkeys(tensors, positions), cuts)
        layer.out_features, layer.in_features = layer.weight.shape
    attention: Any = model.get_submodule(branch)
    if hasattr(attention, "num_heads"):
        attention.num_heads = int(kept.sum())
        attention.attn_dim = attention.num_heads * (group.root.index.shape[1] // 3)


def _replace_branch(model: nn.Module, branch: str, last: str) -> None:
    parent, _, name = branch.rpartition(".")
    paired = isinstance(model.get_submodule(branch), SelfAttention)
    layer: Any = model.get_submodule(last)
    constant = Constant(last.removeprefix(f"{branch}."), layer.out_features, layer.bias, paired)
    setattr(model.get_submodule(parent), name, constant)
