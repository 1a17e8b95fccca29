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
from structured_tickets.shrinking.effort import CARD, PROCESSOR, effort_of
from structured_tickets.shrinking.in_place import shrink_in_place
from structured_tickets.shrinking.inserted_layers import INSERTED
from structured_tickets.shrinking.kept_units import filled_up
from structured_tickets.unit_groups.find import features_of, is_transformer, unit_groups
from structured_tickets.unit_groups.unit import parameter_name, parameter_of

SLOW = 0.6
"""Share of the time of the whole network: where the smallest one takes longer, another may be faster."""
WORTH_IT = 30_000
"""Parameters of a network of which it matters by how much it is faster. A smaller one is to be no slower."""
BETTER = 0.95
"""Share of the time of a smaller network that a larger one must not exceed."""
NOTHING_REMOVED = {True: 0.9, False: 0.97}
"""The same of one from which nothing is removed, for a very small network and for others."""


def shrink(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    lanes: int = 1,
    image: Sequence[int] | None = None,
    spread: int | None = None,
    fills: bool = False,
) -> Shrunk:
    """Return a smaller network that computes what the masked one does, up to rounding. The model is not changed.

    Units that are masked as a whole are removed, with the weights that only they feed; other zeros remain.

    Args:
        masks: Parameter -> 0/1, under any key that `parameter_name` knows.
        lanes: 1 gives the smallest network. 16 may give a little larger and faster one: see `remove_channels`.
        image: (channels, height, width) of the images that the network takes; default: what its notes say.
        spread: 0 gives the smallest network. 1: no channels are put in their places among zeros, layers compute the
            zeros. 2: neither are channels taken out, layers read them all. Default: 0, or what is faster by an estimate
            where 0 takes about as long as the whole network (a very small one: longer), whose notes tell the images.
        fills: Layers keep whole lanes: some units of zeros, too, where those that are kept are no multiple. The
            estimate is one for cards, and made in any case; without notes of the images, `spread` is 1.

    Raises:
        ValueError: A mask does not fit the model.
        UsageError: The units of the network cannot be followed.
    """
    masks = masks_by_parameter(model, masks)
    if not masks:
        return Shrunk(masked_copy(model, masks), {})
    if fills:
        model = masked_copy(model, masks)
        masks = filled_up(model, masks, lanes)
    known = spec_of(model).image
    if fills and spread is None and known is None:
        spread = 1
    smallest = _smaller(model, masks, lanes, image, spread or 0, fills)
    if spread is not None or known is None:
        return smallest
    if not any(isinstance(m, INSERTED) for m in smallest.network.modules()):
        return smallest
    machine = CARD if fills else PROCESSOR
    best, whole = effort_of(smallest.network, known, machine), effort_of(model, known, machine)
    small = sum(p.numel() for p in model.parameters()) < WORTH_IT
    if best <= (1 if small else SLOW) * whole and not fills:
        return smallest
    found = smallest
    for more in (1, 2):
        other = _smaller(model, masks, lanes, image, more, fills)
        if other.cuts:
            effort, enough = effort_of(other.network, known, machine), BETTER if best < BETTER * whole else 1
        else:
            other, effort, enough = Shrunk(masked_copy(model, masks), {}), whole, NOTHING_REMOVED[small]
        if effort < best * enough:
            found, best = other, effort
    return found


def _smaller(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    lanes: int,
    image: Sequence[int] | None,
    spread: int,
    fills: bool,
) -> Shrunk:
    small = masked_copy(model, masks)
    following = features_of(model, image)
    if following is not None:
        return shrink_in_place(small, masks, following, image or spec_of(model).image or (), spread)
    if is_transformer(model):
        shrunk = Shrunk(small, remove_units(small, unit_groups(model), masks))
    else:
        shrunk = remove_channels(small, masks, lanes, spread, fills)
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


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy whose weights are masked and plain, also where torch's pruning masks those of the model."""
    pruned = [(layer, key) for layer, m in model.named_modules() for key in _masked_by_torch(m)]
    values = (getattr(model.get_submodule(layer), param) for layer, param in pruned)
    small = copy.deepcopy(model, {id(v): v.detach().clone() for v in values})  # torch copies no computed tensors
    for layer, param in pruned:
        prune.remove(small.get_submodule(layer), param)
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = parameter_of(small, name)
            parameter.mul_(mask.to(parameter.device))
    return small


def _masked_by_torch(layer: nn.Module) -> list[str]:
    """Return the parameters of a layer that `torch.nn.utils.prune` masks; others, too, keep a `weight_orig`."""
    hooks = [h for h in layer._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]
    return [hook._tensor_name for hook in hooks]
