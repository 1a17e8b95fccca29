"""Parts of the programs' command lines: a parser with errors of one line, and types of values."""

from __future__ import annotations

import argparse
import difflib
import errno
import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from structured_tickets.base.errors import UsageError
from structured_tickets.networks import parse_arch
from structured_tickets.pruning.rules import TARGET_KINDS, kinds_of
from structured_tickets.training.teachers import DENSE, NONE, parts_of

CLOSE = 0.75  # how much of two flags' names has to be the same for one to be a misspelling of the other


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line each, with the nearest flag for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises: UsageError, for `--flag=--` too, which argparse before Python 3.13 takes for an empty list."""
        for word in args or ():
            flag, _, value = word.partition("=")
            if word.startswith("--") and value == "--":
                raise UsageError(f"argument {flag}: '--' is not a value")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises: UsageError, for words that are no flags too."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UsageError(self._unrecognized(unknown))
        return found

    def _unrecognized(self, words: Sequence[str]) -> str:
        known = [o.strip("-") for a in self._actions for o in a.option_strings]
        flags = [w.split("=")[0] for w in words if len(w.split("=")[0].strip("-")) > 1 and w.startswith("-")]
        near = {flag: difflib.get_close_matches(flag.strip("-"), known, 1, CLOSE) for flag in flags}
        hints = [f"{flag}: did you mean --{found[0]}?" for flag, found in near.items() if found]
        hints += [] if flags and all(near.values()) else [f'"{self.prog} --help" lists all flags']
        return ". ".join([f"unrecognized arguments: {' '.join(map(shlex.quote, words))}", *hints])

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        near = difflib.get_close_matches(value, action.choices, 1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(action.choices)}{hint}")


def number(kind: Callable[[str], Any], allowed: str, test: Callable[[Any], bool]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or (isinstance(value, float) and math.isnan(value)) or not test(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


def count(least: int, most: int = 10**9) -> Callable[[str], Any]:
    """A parser of whole numbers. What is beyond a thousand million would overflow somewhere, much later."""
    return number(int, f"a whole number of at least {least} and at most {most}", lambda v: least <= v <= most)


COUNT, NATURAL = count(1), count(0)
ROUNDS = count(1, 1000)  # at the smallest rates that mean anything, next to nothing is left long before
PARALLEL = 1024  # processes or threads: as many are really started, and more would bring a machine down
SHARE = number(float, "a number in [0, 1), such as 0.3 for 30%", lambda v: 0 <= v < 1)
CLOSED_SHARE = number(float, "a number in [0, 1]", lambda v: 0 <= v <= 1)
POSITIVE = number(float, "a number above 0", lambda v: 0 < v < math.inf)
NONNEGATIVE = number(float, "a number of at least 0", lambda v: 0 <= v < math.inf)
LIMIT = number(float, "a number above 0, or inf", lambda v: v > 0)
SIZE = number(int, "a multiple of 4 of at least 8 and at most 16384", lambda v: 8 <= v <= 2**14 and v % 4 == 0)
SEED = number(int, "a whole number in [0, 4294967295]", lambda v: 0 <= v < 2**32)
GPU = number(int, "a whole number", lambda v: abs(v) < 2**31)


def truth(text: str) -> bool:
    """A parser of true and false."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def rounds_to_keep(text: str) -> int | None:
    return None if text.lower() in ("all", "none") else int(count(1)(text))


def lanes(text: str) -> int | str:
    """A parser of auto, or of a whole number of lanes."""
    return "auto" if text.lower() == "auto" else int(count(1, 1024)(text))


def milestones(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = (-1,)
    if any(not 0 <= v <= 10**9 for v in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of epochs such as 91,136")
    return values


def path_text(text: str) -> str:
    """A parser of the name of a file or folder, which need not exist."""
    try:
        os.stat(text)  # noqa: PTH116 (a Path would not take an empty name for what it is)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be the name of a file") from None
    except OSError as error:
        if not text or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = error.strerror if text else "it is empty"
            raise argparse.ArgumentTypeError(f"{text!r} cannot be the name of a file: {reason}") from None
    return text


def resolved_path(text: str) -> str:
    """A parser of the name of a file or folder, which need not exist, as an absolute one."""
    return str(Path(path_text(text)).resolve())


def teacher(text: str) -> str:
    """A parser of a teacher: none, dense, FILE or ARCH@FILE, the file as an absolute one."""
    if text in (NONE, DENSE):
        return text
    arch, file = parts_of(text)
    return f"{architecture(arch)}@{resolved_path(file)}" if arch else resolved_path(file)


def path(text: str) -> Path:
    """A parser of the name of a file or folder, which need not exist, as a `Path`."""
    return Path(path_text(text))


def word_list(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def architecture(text: str) -> str:
    try:
        return parse_arch(path_text(text) if text else text)  # it may be a file, and is a part of a folder's name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def prune_targets(text: str) -> str:
    """The targets in the table's order; all of what a row stands for becomes that row."""
    try:
        kinds = kinds_of(text)
    except KeyError as error:
        near = difflib.get_close_matches(error.args[0], TARGET_KINDS, 1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        rows = ", ".join(TARGET_KINDS)
        raise argparse.ArgumentTypeError(f"{error.args[0]!r} is not one of {rows}{hint}") from None
    names = {row: target for target, row in TARGET_KINDS.items()}
    return names.get(kinds) or ",".join(names[kind,] for kind in kinds)
