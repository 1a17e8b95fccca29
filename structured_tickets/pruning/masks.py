"""Masks: which weights global L1 kept (`current_mask`) and which the structure keeps (`refill_mask`).

Both are plain dicts of float 0/1 tensors by parameter name (`"<layer>.weight"`, `"<layer>.bias"`). The documents' keys,
`"<layer>.weight_mask"` in a current mask and `"<layer>"` in a refill mask, are for files and for the documents'
functions: `by_parameter` reads them, `as_current` and `as_refill` write them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

from structured_tickets.base.weights import effective_state, effective_weight  # noqa: F401 (masks' own vocabulary)
from structured_tickets.features.exported import first_names
from structured_tickets.unit_groups.unit import parameter_name, parameter_of

Mask = dict[str, Tensor]

SAMPLE = 65_536


def current_key(name: str) -> str:
    """`layer.weight` -> its key in a current mask."""
    return f"{name}_mask"


def refill_key(name: str) -> str:
    """`layer.weight` -> its key in a refill mask."""
    return name.removesuffix(".weight")


def by_parameter(mask: Mapping[str, Tensor]) -> Mask:
    """Return the same tensors under the names of the parameters that they mask, whatever keys the mask has."""
    return {parameter_name(key): value for key, value in mask.items()}


def as_current(mask: Mapping[str, Tensor]) -> Mask:
    """Return a mask by parameter name under the keys of the documents' current mask."""
    return {current_key(name): value for name, value in mask.items()}


def as_refill(mask: Mapping[str, Tensor]) -> Mask:
    """Return a mask by parameter name under the keys of the documents' refill mask."""
    return {refill_key(name): value for name, value in mask.items()}


def check_mask(mask: Mapping[str, Tensor], what: str = "mask") -> None:
    """Refuse what is not a mask.

    Raises:
        TypeError: An entry is not a tensor.
        ValueError: An entry holds anything but 0 and 1; the message names it.
    """
    for key, value in mask.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{what}[{key!r}] is a {type(value).__name__}, not a tensor")
        if not bool(((value == 0) | (value == 1)).all()):
            raise ValueError(f"{what}[{key!r}] holds values other than 0 and 1")


@dataclass(frozen=True)
class MaskPair:
    """The two masks that one round hands to the next, by parameter name; keys of the documents are taken, too.

    Attributes:
        current: What global L1 kept.
        refill: What the structure keeps; the same parameters and shapes.

    Raises:
        ValueError: On construction, if the two do not cover the same parameters and shapes.
    """

    current: Mask
    refill: Mask

    def __post_init__(self) -> None:
        check_mask(self.current, "current_mask")
        check_mask(self.refill, "refill_mask")
        current, refill = by_parameter(self.current), by_parameter(self.refill)
        if current.keys() != refill.keys():
            raise ValueError(f"the masks cover different parameters: {sorted(current.keys() ^ refill.keys())[:3]}")
        wrong = [n for n in current if current[n].shape != refill[n].shape]
        if wrong:
            raise ValueError(f"the masks of {wrong[0]} have different shapes")
        object.__setattr__(self, "current", current)
        object.__setattr__(self, "refill", refill)

    def _where(self, current: int, refill: int) -> Mask:
        return {n: (m == current) & (self.refill[n] == refill) for n, m in self.current.items()}

    @property
    def doomed(self) -> Mask:
        """Alive today, outside the structure: what RSST squeezes. bool, by parameter name."""
        return self._where(1, 0)

    @property
    def dead(self) -> Mask:
        """Outside both masks. bool, by parameter name."""
        return self._where(0, 0)

    @property
    def refilled(self) -> Mask:
        """Pruned by L1, brought back because its unit stays. bool, by parameter name."""
        return self._where(0, 1)

    @property
    def structure(self) -> Mask:
        """The refill mask."""
        return self.refill

    @property
    def alive(self) -> Mask:
        """All but the dead weights, as a 0/1 mask by parameter name."""
        return {n: 1 - dead.float() for n, dead in self.dead.items()}


def in_place_of(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain `values` under the keys that the model has now, masked or not, for `torch.func.functional_call`.

    Raises:
        KeyError: A value is missing; the message names it.
    """
    state = {}
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for key, own in model.state_dict().items():
        if key not in names:  # another name of a shared parameter, which must be given once
            continue
        if key.endswith("_mask"):
            state[key] = torch.ones_like(own)
        else:
            state[key] = effective_weight(values, key.removesuffix("_orig")).to(own.device)
    return state


def called_with(model: nn.Module, state: Mapping[str, Tensor], args: tuple) -> Any:
    """Call a model with other parameters and buffers, whatever its modules share.

    `torch.func.functional_call` alone leaves a module that is there under several names without its parameters.

    Args:
        state: First name of each parameter and buffer -> what to use instead.
    """
    places: dict[tuple[int, str], str] = {}
    first = first_names(model)
    for name in first:
        layer, _, param = name.rpartition(".")
        places.setdefault((id(model.get_submodule(layer)), param), name)
    values = {name: state[first[name]] for name in places.values() if first[name] in state}
    return functional_call(model, values, args, tie_weights=False)


def pruning_state(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `effective_state`: masked parameters under the keys with which torch's pruning saves them."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in masks:
            out[f"{name}_orig"], out[f"{name}_mask"] = value, masks[name]
        else:
            out[name] = value
    return out


def hardened_state(model: nn.Module, state: Mapping[str, Tensor], structure: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of plain weights with zeros outside a structure, under all names of a shared parameter.

    Args:
        structure: First name of a parameter -> 0/1.
    """
    first = {n.removesuffix("_orig"): owner.removesuffix("_orig") for n, owner in first_names(model).items()}
    owner = {name: first.get(name, name) for name in state}
    return {n: v * structure[owner[n]] if owner[n] in structure else v for n, v in state.items()}


def top_mask(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor] | None, keep: int) -> Mask:
    """Keep exactly the `keep` best-scored entries of all tensors together, among those that are alive.

    Ties go to the entry that comes first (order of `scores`, then row-major).

    Args:
        scores: Parameter name -> score of each entry.
        alive: Parameter name -> 0/1; entries at 0 are never kept. None: all are candidates.
        keep: How many to keep.

    Returns:
        A new mask by parameter name.

    Raises:
        ValueError: `keep` exceeds the number of candidates, or a score is not a number.
    """
    flat = torch.cat([s.detach().flatten() for s in scores.values()])
    if bool(flat.isnan().any()):
        raise ValueError("cannot rank weights that are not a number")
    candidates = flat.numel()
    if alive is not None:
        living = torch.cat([alive[n].to(s.device).flatten() for n, s in scores.items()]) != 0
        flat, candidates = torch.where(living, flat, -torch.inf), int(living.sum())
    if keep > candidates:
        raise ValueError(f"cannot keep {keep} weights: only {candidates} are alive")
    kept = _best(flat, keep)
    parts = kept.split([s.numel() for s in scores.values()])
    return {n: part.view(s.shape).clone() for part, (n, s) in zip(parts, scores.items(), strict=True)}


def _best(flat: Tensor, keep: int) -> Tensor:
    """0/1 for the `keep` largest, of equals the first: what a stable sort would give, in linear time."""
    if keep <= 0:
        return torch.zeros_like(flat)
    worst = _kth_largest(flat, keep)
    kept = (flat > worst).float()
    kept[(flat == worst).nonzero().flatten()[: keep - int(kept.sum(dtype=torch.float64))]] = 1
    return kept


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    """The k-th largest value, k from 1. A sample brackets it, so that only the few values in between are ranked."""
    n = flat.numel()
    if n > 4 * SAMPLE:
        sample = flat[:: n // SAMPLE].sort(descending=True).values
        place, margin = k / n * len(sample), 4 * math.sqrt(len(sample))
        high = sample[max(0, int(place - margin))]
        low = sample[min(len(sample) - 1, int(place + margin))]
        above = int((flat > high).sum())
        between = flat[(flat >= low) & (flat <= high)]
        if above < k <= above + len(between):  # else the sample was not like the rest
            return between.kthvalue(len(between) - (k - above) + 1).values
    return flat.kthvalue(n - k + 1).values


def l1_mask(weights: Mapping[str, Tensor], alive: Mapping[str, Tensor] | None, keep: int) -> Mask:
    """Global L1: `top_mask` of the magnitudes."""
    return top_mask({n: w.detach().abs().float() for n, w in weights.items()}, alive, keep)


def count_ones(mask: Mapping[str, Tensor], names: Iterable[str]) -> int:
    """Number of ones of a mask (by parameter name) over the named parameters."""
    return sum(int(mask[n].count_nonzero()) for n in names)  # a sum of floats is exact up to 2 ** 24 only


def own_mask(model: nn.Module, name: str) -> Tensor:
    """The mask under which torch's pruning holds a parameter; ones where it holds none."""
    layer, _, param = name.rpartition(".")
    held = getattr(model.get_submodule(layer), f"{param}_mask", None)
    return torch.ones_like(parameter_of(model, name)) if held is None else held


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put parameters under masks by `torch.nn.utils.prune`; masks that are already there stay in force too."""
    for name, mask in masks.items():
        layer, _, param = name.rpartition(".")
        module = model.get_submodule(layer)
        value = parameter_of(model, name)
        if mask.shape != value.shape:
            raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(value.shape)}")
        prune.custom_from_mask(module, param, mask.to(value.device))


def remove_masks(model: nn.Module, names: Iterable[str]) -> None:
    """Make masked parameters plain again, zeros included. Parameters that are not masked are left alone."""
    for name in names:
        layer, _, param = name.rpartition(".")
        module = model.get_submodule(layer)
        if hasattr(module, f"{param}_orig"):
            prune.remove(module, param)


class HeldMask:
    """Holds entries of a model's parameters at exactly zero while an optimizer moves them."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        held = {n: m for n, m in masks.items() if not bool(m.all())}
        self.names = list(held)
        self.parameters = [parameter_of(model, n) for n in held]
        self.masks = [torch.empty_like(p).copy_(held[n]) for n, p in zip(held, self.parameters, strict=True)]

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the held entries; to be called after every step of the optimizer."""
        if self.parameters:
            torch._foreach_mul_(self.parameters, self.masks)

    def broken(self) -> list[str]:
        """Names of parameters in which a held entry is not zero."""
        triples = zip(self.names, self.parameters, self.masks, strict=True)
        return [n for n, p, m in triples if bool((p.detach()[m == 0] != 0).any())]
