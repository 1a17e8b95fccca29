"""Which tests run: those that are not marked `slow` always, the others in parts."""

from __future__ import annotations

import zlib

import pytest


def tier(text: str) -> tuple[int, int]:
    """Which part of the slow tests, and of how many parts: (0, 1) is all of them, (0, 0) none.

    Raises:
        UsageError: pytest's, if it is none of the choices.
    """
    if text in ("fast", "all"):
        return (0, int(text == "all"))
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise pytest.UsageError(f"--tier is fast, all or K/N with K from 0 to N-1, not {text!r}")
    return (int(part), int(parts))


def runs_in(nodeid: str, part: int, parts: int) -> bool:
    """Whether a slow test is in this part; the same in each session, whatever other tests there are."""
    return parts > 0 and zlib.crc32(nodeid.encode()) % parts == part


def chosen(items, part: int, parts: int) -> tuple[list, list]:
    """The tests that run, and those that are left out."""
    runs, left_out = [], []
    for item in items:
        wanted = "slow" not in item.keywords or runs_in(item.nodeid, part, parts)
        (runs if wanted else left_out).append(item)
    return runs, left_out
