"""A page about a run, a sweep or a folder of runs, with its figures and tables as files."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from structured_tickets.base.commands import name_in_help
from structured_tickets.base.console import exit_status, start_logging
from structured_tickets.base.secrets_in_text import refuse_secrets
from structured_tickets.settings.argument_types import OneLineParser, architecture, path, truth


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Raises: UsageError."""
    parser = OneLineParser(prog=name_in_help("report"), description=__doc__, allow_abbrev=False)
    folders = "folder of a run, of a sweep, or that holds runs; the runs of several are compared"
    parser.add_argument("paths", metavar="DIR", nargs="+", type=path, help=folders)
    place = "default: DIR/report, for several folders report_output_<hash> here"
    parser.add_argument("--out", type=path, metavar="DIR", help=place)
    parser.add_argument(
        "--latency",
        type=truth,
        default=True,
        metavar="BOOL",
        help="measure the latency of each round's network on this machine (default: true)",
    )
    parser.add_argument(
        "--arch",
        type=architecture,
        action="append",
        default=[],
        metavar="FILE.py:FACTORY",
        help="network of the runs, if it comes from your own file (its code will be run); once for each network",
    )
    parser.add_argument("--quiet", action="store_true", help="print only the path of the page, and warnings")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (see `errors`)."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _default_folder(paths: Sequence[Path]) -> Path:
    """Return the folder of the report; the same folders in any order have the same."""
    places = sorted({str(path.resolve()) for path in paths})
    if len(places) == 1:
        return paths[0] / "report"
    return Path(f"report_output_{hashlib.sha256(json.dumps(places).encode()).hexdigest()[:8]}")


def _run(words: Sequence[str]) -> str:
    refuse_secrets(words)
    args = parse_args(words)
    start_logging(args.quiet, verbose=False)
    found = importlib.import_module("structured_tickets.reports.collection").collect(*args.paths)
    page, latency = (
        importlib.import_module("structured_tickets.reports.page"),
        importlib.import_module("structured_tickets.reports.latency"),
    )
    out = args.out or _default_folder(args.paths)
    page.make_folder(out)
    times = latency.measured(found, out, args.arch) if args.latency else {}
    return str(page.write(page.build(found, times, latency.BATCH), out))
