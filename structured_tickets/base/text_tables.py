"""Plain text for people: aligned tables, counted things, and numbers that look the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts: 1 run, 2,000 runs, 3 classes."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith(('s', 'batch')) else 's'}"


def millions(number: float) -> str:
    """Return a number of operations as all messages and tables show it: 12.4 M."""
    return f"{number / 1e6:,.1f} M"


def file_sizes(counts: Sequence[int]) -> list[str]:
    """Return the sizes of files to be compared, all in the largest unit in which different ones look different.

    They are in MB if the largest has at least one and the smallest a tenth: 1.1 MB, 0.5 MB; else in kB: 284.3 kB.
    """
    units = [("MB", 1e6, ".1f"), ("kB", 1e3, ".1f"), ("bytes", 1, ".0f")]
    for unit, size, form in units if max(counts) >= 1e6 and min(counts) >= 1e5 else units[1:]:
        shown = [f"{count / size:,{form}} {unit}" for count in counts]
        if len(set(shown)) == len(set(counts)):
            break
    return shown


def gigabytes(count: float) -> str:
    """Return a number of bytes of memory or disk: 16.8 GB."""
    return f"{count / 1e9:,.1f} GB"


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are: a, b, c and 4 more."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Columns as wide as their widest cell, on the left, or on the right as suits numbers."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    place = str.rjust if right else str.ljust
    return "\n".join("  ".join(place(c, w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def few(names: Sequence[str]) -> str:
    """Return the first names of many, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
