"""The name that `structured_tickets` had for networks at their real size until version 0.1; gone in version 0.3."""

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from structured_tickets.export.deployed import save
from structured_tickets.interface.files import load
from structured_tickets.shrinking import cuts
from structured_tickets.shrinking import shrink as _shrinking
from structured_tickets.shrinking.kept_units import kept_units_of, structure_of

__all__ = ["expand", "kept_units_of", "load", "save", "shrink", "structure_of"]

warnings.warn(
    "the module compact goes in version 0.3: use structured_tickets.load (and .shrink, .save)",
    DeprecationWarning,
    stacklevel=2,
)


def shrink(model: nn.Module, masks: Mapping[str, Tensor], lanes: int = 1) -> nn.Module:
    """Return the network of `structured_tickets.shrinking.shrink.shrink`, with its cuts as `.cuts`."""
    small, kept = _shrinking.shrink(model, masks, lanes)
    small.cuts = kept  # type: ignore[assignment]
    return small


def expand(small: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole network's state dict, as `structured_tickets.shrinking.cuts.expand` does."""
    return cuts.expand(cuts.Shrunk(small, small.cuts), state)  # type: ignore[arg-type]
