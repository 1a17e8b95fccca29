"""Structured lottery tickets: find, in a network, the smaller one that trains as well.

In a training loop of your own:

    import structured_tickets as st

    units = st.units(model, example_image)                           # channels, heads, neurons, blocks: print(units)
    masks = st.regroup(model, units, rate=0.3)                       # which of them stay: print(masks)
    penalty = st.Penalty(model, masks, steps=len(loader) * epochs)   # RSST; call penalty.step() after backward
    small = st.shrink(model, masks)                                  # really smaller, the same function
    st.save(small, "ticket/")
    small = st.load("ticket/")

Errors are exceptions with one clear line: subclasses of `structured_tickets.base.errors.RunError`, and of ValueError,
TypeError or RuntimeError where a caller would expect those. Nothing is printed; the logger is "rsst".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structured_tickets.interface.examine import units
    from structured_tickets.interface.files import load, save
    from structured_tickets.interface.masks import Masks
    from structured_tickets.interface.penalty import Penalty
    from structured_tickets.interface.regrouping import regroup
    from structured_tickets.interface.shrink import shrink
    from structured_tickets.interface.units import Units

__all__ = ["Masks", "Penalty", "Units", "__version__", "load", "regroup", "save", "shrink", "units"]
__version__ = "0.2.0"

_HOMES = {
    "Masks": "masks",
    "Penalty": "penalty",
    "Units": "units",
    "load": "files",
    "regroup": "regrouping",
    "save": "files",
    "shrink": "shrink",
    "units": "examine",
}
"""Name -> its module in `structured_tickets.interface`, which loads torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.interface.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
