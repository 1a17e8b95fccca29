"""Where a module keeps the numbers of zeros that its forward pass puts around channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from structured_tickets.features.features import Padding


def settable(model: nn.Module, padding: Padding) -> Iterator[tuple[Any, str, tuple[int, ...]]]:
    """Attributes that can say how many zeros there are: module, attribute, and what it says before these two numbers.

    These are tuples and lists whose last two numbers are those of the zeros before and after, such as the `padding` of
    `nn.ZeroPad3d` or that of a module of somebody's own.
    """
    try:
        module = model.get_submodule(padding.module)
    except AttributeError:
        return
    wanted = (len(padding.before), len(padding.after))
    for attribute, value in vars(module).items():
        if "pad" in attribute and isinstance(value, tuple | list) and tuple(value[-2:]) == wanted:
            yield module, attribute, tuple(value[:-2])
