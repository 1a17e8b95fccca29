"""Checks of the interface's arguments, each with one line that says what is allowed."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Sequence
from typing import Any

from structured_tickets.base.errors import BadType, BadValue


def one_of(value: Any, allowed: Sequence[str], name: str) -> str:
    """Return the value if it is one of these.

    Raises:
        BadType: It is not a string.
        BadValue: It is another one.
    """
    if not isinstance(value, str):
        raise BadType(f"{name}: {value!r} is a {type(value).__name__}, not one of {', '.join(allowed)}")
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise BadValue(f"{name}: {value!r} is not one of {', '.join(allowed)}{hint}")
    return value


def _number(value: Any, name: str, allowed: str) -> float:
    """Return the value as a float.

    Raises:
        BadType: It is not a number.
    """
    if isinstance(value, bool | str):
        raise BadType(f"{name}: {value!r} is a {type(value).__name__}, not {allowed}")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadType(f"{name}: a {type(value).__name__}, not {allowed}") from error


def share(value: Any, name: str) -> float:
    """Return a share to prune, in [0, 1).

    Raises:
        BadType: It is not a number.
        BadValue: It lies outside.
    """
    found = _number(value, name, "a number in [0, 1)")
    if not 0 <= found < 1:
        raise BadValue(f"{name}: {value} is not a number in [0, 1)")
    return found


def positive(value: Any, name: str, infinite: bool = False) -> float:
    """Return a number above 0.

    Args:
        infinite: Allow infinity, too.

    Raises:
        BadType: It is not a number.
        BadValue: It is not above 0, or not finite.
    """
    found = _number(value, name, "a number above 0")
    if not (found > 0 and (infinite or math.isfinite(found))):
        raise BadValue(f"{name}: {value} is not a number above 0")
    return found


def flag(value: Any, name: str, or_none: bool = False) -> Any:
    """Return True or False, or None where that is allowed.

    Raises:
        BadType: It is something else.
    """
    if isinstance(value, bool) or (or_none and value is None):
        return value
    raise BadType(f"{name}: {value!r} is not True{', False or None' if or_none else ' or False'}")


def natural(value: Any, name: str, least: int = 0) -> int:
    """Return a whole number of at least `least`.

    Raises:
        BadType: It is not a whole number.
        BadValue: It is less.
    """
    if isinstance(value, bool):
        raise BadType(f"{name}: {value!r} is not a whole number")
    try:
        found = operator.index(value)
    except TypeError as error:
        raise BadType(f"{name}: {value!r} is a {type(value).__name__}, not a whole number") from error
    if found < least:
        raise BadValue(f"{name}: {found} is not a whole number of at least {least}")
    return found
