"""Units (channels, heads, neurons, blocks), and the slices of parameters that are kept or pruned with each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PARAMETERS = frozenset(("weight", "bias", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"))
"""Names that parameters have in the layers which own them; all but the first two in `nn.MultiheadAttention`."""


@dataclass(frozen=True)
class Slice:
    """Positions along one axis of one parameter that belong to each unit.

    A convolution of 4 filters, one filter a unit: `Slice("conv", 0, tensor([[0], [1], [2], [3]]))`.

    Attributes:
        layer: Name of the module that owns the parameter.
        axis: Axis of the parameter along which the units lie.
        index: int64 [units, width]; row u holds the positions of unit u.
        param: One of `PARAMETERS`.
        ranked: True if global L1 ranks the parameter's entries. Normalisation weights and biases are not ranked: they
            only follow their unit.
    """

    layer: str
    axis: int
    index: Tensor
    param: str = "weight"
    ranked: bool = True

    @property
    def name(self) -> str:
        """Full name of the parameter, as in `model.named_parameters()`."""
        return f"{self.layer}.{self.param}"

    def spread(self, kept: Tensor, like: Tensor) -> Tensor:
        """Turn one flag per unit (bool [units]) into a 0/1 mask of `like`'s shape; positions in no unit are 1."""
        line = torch.ones(like.shape[self.axis], dtype=torch.float32, device=like.device)
        line[self.index.to(like.device).flatten()] = kept.to(line).repeat_interleave(self.index.shape[1])
        shape = [1] * like.ndim
        shape[self.axis] = -1
        return line.view(shape).expand(like.shape).contiguous()

    def units_with_weights(self, mask: Tensor) -> Tensor:
        """Return which units have a one in the parameter's mask: bool [units], on the CPU."""
        others = [d for d in range(mask.ndim) if d != self.axis]
        ones = mask.sum(dim=others) if others else mask
        return (ones > 0).cpu()[self.index].any(dim=1)


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind in one place of the network, and all slices that belong to them.

    Attributes:
        writers: Of a stream, how many of its first slices compute it. 0: the units are not those of a stream, and the
            first slice computes them.
    """

    name: str
    kind: str
    slices: tuple[Slice, ...]
    writers: int = 0

    @property
    def root(self) -> Slice:
        """First slice of the group."""
        return self.slices[0]

    @property
    def computing(self) -> tuple[Slice, ...]:
        """Slices whose layers compute the units: criteria on feature maps score their outputs."""
        return self.slices[: max(1, self.writers)]

    @property
    def weighed(self) -> tuple[Slice, ...]:
        """Slices that criteria on weights score: the first one; of a stream, all that global L1 ranks."""
        return tuple(s for s in self.slices if s.ranked) if self.writers else self.slices[:1]

    @property
    def units(self) -> int:
        """Number of units."""
        return self.root.index.shape[0]


def parameter_of(model: nn.Module, name: str) -> Tensor:
    """Return the trainable tensor behind a parameter's name, `<name>_orig` while torch's pruning masks it."""
    layer, _, param = name.rpartition(".")
    module = model.get_submodule(layer)
    masked = getattr(module, f"{param}_orig", None)
    return getattr(module, param) if masked is None else masked


def parameter_name(key: str) -> str:
    """Return the name of the parameter that a mask's key means.

    Args:
        key: The name itself (`<layer>.weight`), the layer alone for its weight, as the documented functions return it,
            or torch's name of the mask (`<layer>.weight_mask`).
    """
    if key.endswith("_mask"):
        return key.removesuffix("_mask")
    return key if key.rpartition(".")[2] in PARAMETERS and "." in key else f"{key}.weight"


def ranked_names(model: nn.Module, groups: Iterable[UnitGroup]) -> list[str]:
    """Return the names of the parameters that global L1 ranks (the prunable layers' weights), in module order."""
    wanted: dict[str, dict[str, None]] = {}
    for part in (s for g in groups for s in g.slices if s.ranked):
        wanted.setdefault(part.layer, {})[part.name] = None
    return [name for layer, _ in model.named_modules() for name in wanted.get(layer, {})]


def rows(layer: str, units: int, param: str = "weight", ranked: bool = True) -> Slice:
    """Return a slice with one unit per position of a parameter's first axis."""
    return Slice(layer, 0, torch.arange(units).unsqueeze(1), param, ranked)


def kinds(groups: Sequence[UnitGroup]) -> list[str]:
    """Return the kinds of unit that occur, in order of appearance."""
    return list(dict.fromkeys(g.kind for g in groups))


def kept_units(group: UnitGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """Return which units have a one in the masks (by parameter name) of what computes them: bool [units]."""
    return torch.stack([s.units_with_weights(masks[s.name]) for s in group.computing]).any(0)


def masks_of_units(
    groups: Iterable[UnitGroup], kept: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the masks (by parameter name) that keep exactly these units.

    Args:
        kept: Group name -> bool [units]; groups that are not named keep all.
        like: Parameter name -> a tensor of its shape.

    Returns:
        0/1 masks of all slices of the groups. An entry that any group prunes is 0, whatever other groups keep.
    """
    masks: dict[str, Tensor] = {}
    for group in groups:
        flags = kept.get(group.name, torch.ones(group.units, dtype=torch.bool))
        for part in group.slices:
            mask = part.spread(flags, like[part.name])
            masks[part.name] = masks[part.name] * mask if part.name in masks else mask
    return masks
