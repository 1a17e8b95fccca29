"""The name that `structured_tickets` had for networks at their real size until version 0.1; gone in version 0.3."""

import warnings

from structured_tickets.export.deployed import load, save
from structured_tickets.shrinking.shrink import expand, kept_units_of, shrink, structure_of

__all__ = ["expand", "kept_units_of", "load", "save", "shrink", "structure_of"]

warnings.warn("the module compact is now structured_tickets.shrinking.shrink", DeprecationWarning, stacklevel=2)
