"""The network that a mask describes, at its real size: `shrink` cuts away what is masked, `expand` puts it back.

A Vision Transformer loses heads and neurons, and with the last of them the branch, down to its bias. A convolutional
network loses channels wherever `channel_flow` finds that they are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structured_tickets.base.errors import DataError
from structured_tickets.networks import spec_of
from structured_tickets.networks.attention import SelfAttention
from structured_tickets.shrinking.channels import Cuts, Follower
from structured_tickets.unit_groups.find import is_transformer, unit_groups
from structured_tickets.unit_groups.unit import UnitGroup, masks_of_units


class Constant(nn.Module):
    """What a branch without units still gives: the bias of its last layer.

    Args:
        layer: Name of that layer, under which the bias stays.
        width: How many features it gives.
        paired: Whether the branch gives a pair, as torch's attention does; the second is None.
    """

    def __init__(self, layer: str, width: int, bias: Tensor | None, paired: bool = False) -> None:
        super().__init__()
        last = nn.Module()
        last.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        self.add_module(layer, last)
        self.layer, self.width, self.paired = layer, width, paired

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        """[batch, ..., any] -> [batch, ..., width], whatever else the branch was told."""
        bias = self.get_submodule(self.layer).bias
        shape = (*x.shape[:-1], self.width)
        value = x.new_zeros(shape) if bias is None else bias.to(x.dtype).expand(shape)  # type: ignore[operator]
        return (value, None) if self.paired else value


def shrink(model: nn.Module, masks: Mapping[str, Tensor], lanes: int = 1) -> nn.Module:
    """A copy of the model without what the masks leave at zero; the same function of its input, up to rounding.

    Args:
        masks: Parameter name -> 0/1. Units that are masked whole are cut, and what only they fed; other zeros stay.
        lanes: See `Follower`: with 1 the network is as small as it can be, with 16 it is a little larger and faster.

    Returns:
        A smaller network with the same parameter names. Its `.cuts` say what was kept of each.
    """
    small: Any = copy.deepcopy(model)
    parameters = dict(small.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask.to(parameters[name].device))
    if not is_transformer(model):
        follower = Follower(small, masks, lanes)
        small, cuts = follower.follow(), follower.cuts
        small.spec, small.precision = spec_of(model), vars(model).get("precision", torch.float32)
    else:
        cuts = _cut_branches(small, unit_groups(model), masks)
    small.train(model.training)
    small.cuts = cuts
    return small


def expand(small: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole network's state dict again: the shrunk network's values, and those of `state` where it has none."""
    cuts: Cuts = small.cuts  # type: ignore[assignment]
    own = small.state_dict()
    whole = {name: value.detach().clone() for name, value in state.items()}
    return {n: put_back(own[n], v, cuts.get(n, {})) if n in own else v for n, v in whole.items()}


def cut_value(whole: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept positions (axis -> int64) of a tensor, in their order; the tensor itself if nothing is cut."""
    for axis, index in kept.items():
        whole = whole.index_select(axis, index.to(whole.device))
    return whole


def put_back(small: Tensor, whole: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Write what `cut_value` took to its places in `whole`, in place; returns `whole`."""
    if not kept:
        return whole.copy_(small.detach())
    lines = [kept.get(axis, torch.arange(size)).to(whole.device) for axis, size in enumerate(whole.shape)]
    whole[torch.meshgrid(*lines, indexing="ij")] = small.detach().to(whole)
    return whole


def _cut_branches(model: nn.Module, groups: Sequence[UnitGroup], masks: Mapping[str, Tensor]) -> Cuts:
    """Cut the units that speak to nobody: those whose entries in the layer that reads them are masked."""
    cuts: Cuts = {}
    for group in groups:
        readers = [s for s in group.slices if s.axis == 1]
        kept = speaking_units(group, masks)
        if not readers or bool(kept.all()):
            continue
        branch, _, _ = group.root.layer.rpartition(".")
        if not bool(kept.any()):
            _replace_branch(model, branch, readers[0].layer)
            continue
        for part in group.slices:
            positions = part.index[kept].flatten().sort().values
            _cut_linear(model.get_submodule(part.layer), part.layer, part.axis, positions, cuts)
        attention: Any = model.get_submodule(branch)
        if hasattr(attention, "num_heads"):
            attention.num_heads = int(kept.sum())
            attention.attn_dim = attention.num_heads * (group.root.index.shape[1] // 3)
    return cuts


def _replace_branch(model: nn.Module, branch: str, last: str) -> None:
    parent, _, name = branch.rpartition(".")
    paired = isinstance(model.get_submodule(branch), SelfAttention)
    layer: Any = model.get_submodule(last)
    constant = Constant(last.removeprefix(f"{branch}."), layer.out_features, layer.bias, paired)
    setattr(model.get_submodule(parent), name, constant)


def _cut_linear(layer: Any, name: str, axis: int, positions: Tensor, cuts: Cuts) -> None:
    params = ["weight"] if axis or layer.bias is None else ["weight", "bias"]
    for param in params:
        value = getattr(layer, param)
        cut = value.detach().index_select(axis, positions.to(value.device))
        setattr(layer, param, nn.Parameter(cut, value.requires_grad))
        cuts.setdefault(f"{name}.{param}", {})[axis] = positions
    layer.out_features, layer.in_features = layer.weight.shape


def kept_units_of(model: nn.Module, masks: Mapping[str, Tensor], multiple: int = 1) -> dict[str, list[int]]:
    """Unit group -> which of its units the masks leave, ascending.

    Args:
        multiple: Keep more, up to the next multiple of this: those with the largest weights, of equals the first.
    """
    parameters = dict(model.named_parameters())
    kept = {}
    for group in unit_groups(model, f"{spec_of(model).stem}.weight" in masks):
        if group.kind == "patch":  # which is pruned weight by weight
            continue
        root = group.root
        alive = speaking_units(group, masks)
        missing = min(-int(alive.sum()) % multiple, group.units - int(alive.sum()))
        weight = parameters[root.name].detach().abs().cpu()
        size = weight.sum([d for d in range(weight.ndim) if d != root.axis])[root.index].sum(1)
        best = torch.sort(size.where(~alive, -1.0), descending=True, stable=True).indices[:missing]
        alive[best] = True
        kept[group.name] = alive.nonzero().flatten().tolist()
    return kept


def speaking_units(group: UnitGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """Units that somebody listens to: bool [units]. A neuron whose own row is zero still passes its bias on."""
    listened = [s for s in group.slices if s.axis == 1] or [group.root]
    heard = [s.units_with_weights(masks[s.name]) for s in listened if s.name in masks]
    return torch.stack(heard).any(0) if len(heard) == len(listened) else torch.ones(group.units, dtype=torch.bool)


def structure_of(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The masks (by parameter name) that leave exactly these units of each group.

    Raises:
        DataError: The model has no such group or unit.
    """
    parameters = dict(model.named_parameters())
    groups = unit_groups(model, spec_of(model).stem in kept)
    left = {g.name: torch.zeros(g.units, dtype=torch.bool) for g in groups}
    for group in groups:
        units = kept.get(group.name)
        if units is None or any(not 0 <= u < group.units for u in units):
            raise DataError(f"the kept units do not fit the model: {group.name} has {group.units} units")
        left[group.name][list(units)] = True
    return masks_of_units(groups, left, parameters)
