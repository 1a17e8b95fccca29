"""Attributes that hold numbers of channels with which a forward pass computes: of zeros around them, and of parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from structured_tickets.features.features import Padding, Parts


def settable(model: nn.Module, padding: Padding) -> Iterator[tuple[Any, str, tuple[int, ...]]]:
    """Attributes that can say how many zeros there are: module, attribute, and what it says before these two numbers.

    These are tuples and lists whose last two numbers are those of the zeros before and after, such as the `padding` of
    `nn.ZeroPad3d` or that of a module of somebody's own.
    """
    wanted = (len(padding.before), len(padding.after))
    for module, attribute, value in _of(model, padding.module):
        if "pad" in attribute and isinstance(value, tuple | list) and tuple(value[-2:]) == wanted:
            yield module, attribute, tuple(value[:-2])


def sizes_of_parts(model: nn.Module, parts: Parts) -> Iterator[tuple[Any, str]]:
    """Attributes that can say how large parts are: tuples and lists of just these sizes."""
    for module, attribute, value in _of(model, parts.module):
        if isinstance(value, tuple | list) and tuple(value) == parts.sizes:
            yield module, attribute


def _of(model: nn.Module, name: str) -> Iterator[tuple[Any, str, Any]]:
    """Module, attribute and value of all attributes of a module; none if there is no such module."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return
    for attribute, value in list(vars(module).items()):
        yield module, attribute, value
