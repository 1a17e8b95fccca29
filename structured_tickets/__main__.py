"""Structured lottery tickets: find, in a network, the smaller one that trains as well."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from structured_tickets import __version__
from structured_tickets.base.commands import COMMAND
from structured_tickets.base.console import exit_status
from structured_tickets.base.errors import UsageError
from structured_tickets.settings.argument_types import OneLineParser

PROGRAMS = {
    "run": "find structured tickets in one network: train, prune, regroup into whole units, rewind, repeat",
    "sweep": "many runs: a grid of settings over seeds, or a search among them",
    "report": "a page with figures and tables about a run, a sweep or a folder of runs",
    "export": "the network of a round at its real size, as safetensors, ONNX or torch.export",
    "doctor": "versions, device, number type, and what is missing on this machine",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of everything that comes before a sub-command."""
    commands = "\n".join(f"  {name:<8}{does}" for name, does in PROGRAMS.items())
    parser = OneLineParser(
        prog=COMMAND,
        usage=f"{COMMAND} [--help | --version] COMMAND ...",
        description=__doc__,
        epilog=f"commands:\n{commands}\n\n{COMMAND} COMMAND --help explains the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{COMMAND} {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=PROGRAMS, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns its exit status (see `errors`), 2 if there is none."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in PROGRAMS:
        program = importlib.import_module(f"structured_tickets.programs.{words[0]}")
        return int(program.main(words[1:]))
    if not words:
        build_parser().print_help(sys.stderr)
        return UsageError.exit_code
    return exit_status(lambda: _refuse(words))


def _refuse(words: Sequence[str]) -> str:
    """Raises: UsageError, unless the words ask for help or the version, which end the program."""
    command = build_parser().parse_args(words).command
    raise UsageError(f"the command comes first: {COMMAND} {command} ...")


if __name__ == "__main__":
    sys.exit(main())
