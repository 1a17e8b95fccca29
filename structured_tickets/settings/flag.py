"""A flag of the runner: the values that it takes, the runs that read it, and what it decides."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from structured_tickets.settings.argument_types import truth
from structured_tickets.settings.conditions import Condition


@dataclass(frozen=True)
class Scope:
    """The things that a flag decides.

    Attributes:
        run: Runs with different values are different runs: they have different folders, and none continues another.
        round_0: The dense round depends on the value. A flag that is wrongly said not to be read there makes runs share
            the wrong dense round; one that is wrongly said to be read only costs training time.
        sweep: Sweeps with different values are different sweeps.
        axis: The value may differ between the runs of a sweep.
        dense: The job that trains the dense round for runs of a sweep is given the flag.
        compared: A report compares runs by the value.
        own: A sweep sets the flag for each of its runs, or has no use for it; its command may not give it.
    """

    run: bool = False
    round_0: bool = False
    sweep: bool = False
    axis: bool = False
    dense: bool = False
    compared: bool = False
    own: bool = False


EVERY_ROUND = Scope(run=True, round_0=True, sweep=True, axis=True, dense=True, compared=True)
AFTER_ROUND_0 = Scope(run=True, sweep=True, axis=True, compared=True)
WEIGHTS_FILE = Scope(run=True, sweep=True, axis=True, dense=True, compared=True)  # round 0: what the file holds counts
IMAGES = Scope(sweep=True, dense=True)  # where they are; what they show is compared by itself
LENGTH = Scope(axis=True, compared=True)  # how far a run goes, not which run it is
LAST_DIGITS = Scope(dense=True, compared=True)  # the same results up to rounding, in another time
MACHINE = Scope(dense=True)  # what a process uses and keeps
SETTINGS = Scope(sweep=True, dense=True)  # a file of other flags, which decide
LABEL = Scope(sweep=True, axis=True, dense=True, compared=True)  # a name for other flags, which decide
NOTHING = Scope()  # how a run is watched; what stands for other flags
SWEEPS_OWN = Scope(own=True)


@dataclass(frozen=True)
class Flag:
    """A flag of the runner.

    Attributes:
        name: The flag without its dashes, and the attribute of the parsed arguments.
        help: Help text as argparse formats it: `%%` for a percent sign.
        scope: What the flag decides.
        type: Text -> value; `truth` makes a switch, which means true without a value.
        default: The value where the command line does not name the flag. A text is parsed by `type`.
        choices: The texts that are allowed.
        metavar: The name of the value in the help text.
        bare: The flag takes no value; it is false unless it is given.
        derived: Arguments -> the value where neither the command line nor its preset names the flag, and for `auto`.
        read: Which runs read the flag; None: all.
        example: The flag with a value, as in a command; only for flags that most runs set.
    """

    name: str
    help: str
    scope: Scope
    type: Callable[[str], Any] | None = None
    default: Any = None
    choices: Collection[str] | None = None
    metavar: str | None = None
    bare: bool = False
    derived: Callable[[argparse.Namespace], Any] | None = None
    read: Condition | None = None
    example: str = ""

    def add_to(self, group: Any) -> None:
        """Add the flag to a parser, or to a group of its flags."""
        if self.bare:
            group.add_argument(f"--{self.name}", action="store_true", help=self.help)
            return
        switch = {"nargs": "?", "const": True} if self.type is truth else {}
        value = {"type": self.type, "default": self.default, "choices": self.choices, "metavar": self.metavar}
        group.add_argument(f"--{self.name}", help=self.help, **value, **switch).example = self.example

    @property
    def parsed_default(self) -> Any:
        """The value that the parser gives where the command line does not name the flag."""
        if self.bare:
            return False
        return self.type(self.default) if self.type and isinstance(self.default, str) else self.default
