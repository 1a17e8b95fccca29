"""The network that masks describe, at its real size: `shrink` removes what they prune.

A transformer loses heads and neurons, and with the last of them the branch, down to its bias (`branches`). A CNN loses
channels wherever they are found to be zero (`channels`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from structured_tickets.networks.registry import spec_of
from structured_tickets.shrinking.branches import remove_units
from structured_tickets.shrinking.channels import remove_channels
from structured_tickets.shrinking.cuts import Shrunk
from structured_tickets.shrinking.in_place import shrink_in_place
from structured_tickets.unit_groups.find import features_of, is_transformer, unit_groups
from structured_tickets.unit_groups.unit import parameter_name, parameter_of


def shrink(model: nn.Module, masks: Mapping[str, Tensor], lanes: int = 1, image: Sequence[int] | None = None) -> Shrunk:
    """Return a smaller network that computes what the masked one does, up to rounding. The model is not changed.

    Units that are masked as a whole are removed, with the weights that only they feed; other zeros remain.

    Args:
        masks: Parameter -> 0/1, under any key that `parameter_name` knows.
        lanes: 1 gives the smallest network. 16 may give a little larger and faster one: see `remove_channels`.
        image: (channels, height, width) of the images that the network takes; default: what its notes say.

    Raises:
        ValueError: A mask does not fit the model.
        UsageError: The units of the network cannot be followed.
    """
    masks = masks_by_parameter(model, masks)
    small = _masked_copy(model, masks)
    following = features_of(model, image)
    if following is not None:
        return shrink_in_place(small, masks, following, image or spec_of(model).image or ())
    if is_transformer(model):
        shrunk = Shrunk(small, remove_units(small, unit_groups(model), masks))
    else:
        shrunk = remove_channels(small, masks, lanes)
    shrunk.network.train(model.training)
    return shrunk


def masks_by_parameter(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same masks by parameter name, once it is sure that they fit the model.

    Raises:
        ValueError: The model has no such parameter, or one of another shape, or two masks are of one parameter.
    """
    name_of_model, found = type(model).__name__, {}
    own = {n.removesuffix("_orig"): p.shape for n, p in model.named_parameters()}
    for key, mask in masks.items():
        name = parameter_name(key)
        if name not in own:
            raise ValueError(f"the masks do not fit {name_of_model}: it has no parameter {name} (mask {key!r})")
        if mask.shape != own[name]:
            shapes = f"{name} has shape {tuple(own[name])}, its mask {tuple(mask.shape)}"
            raise ValueError(f"the masks do not fit {name_of_model}: {shapes}")
        if name in found:
            raise ValueError(f"there are two masks of {name}, the second as {key!r}")
        found[name] = mask
    return found


def _masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy whose weights are masked and plain, also where torch's pruning masks those of the model."""
    pruned = [(layer, key[:-5]) for layer, m in model.named_modules() for key in m._parameters if key.endswith("_orig")]
    values = (getattr(model.get_submodule(layer), param) for layer, param in pruned)
    small = copy.deepcopy(model, {id(v): v.detach().clone() for v in values})  # torch copies no computed tensors
    for layer, param in pruned:
        prune.remove(small.get_submodule(layer), param)
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = parameter_of(small, name)
            parameter.mul_(mask.to(parameter.device))
    return small
