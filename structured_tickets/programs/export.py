"""Write the ticket of a run at its real size: model.safetensors and config.json, ONNX, torch.export."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from structured_tickets.base.commands import name_in_help
from structured_tickets.base.console import exit_status, start_logging
from structured_tickets.base.secrets_in_text import refuse_secrets
from structured_tickets.settings.argument_types import OneLineParser, architecture, count, path


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Raises: UsageError."""
    parser = OneLineParser(prog=name_in_help("export"), description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN_DIR", type=path, help="folder of the run")
    parser.add_argument("--round", type=count(0), help="which round (default: the last that is finished)")
    parser.add_argument("--best", action="store_true", help="its weights of best validation accuracy, not its last")
    parser.add_argument("--out", type=path, metavar="DIR", help="default: RUN_DIR/export/round_<k>")
    parser.add_argument(
        "--round_to", type=count(1), default=1, metavar="N", help="keep more units, up to a multiple of N in each layer"
    )
    parser.add_argument("--onnx", action="store_true", help="also model.onnx, compared with ONNX Runtime's outputs")
    parser.add_argument("--pt2", action="store_true", help="also model.pt2, by torch.export")
    parser.add_argument(
        "--arch",
        type=architecture,
        metavar="FILE.py:FACTORY",
        help="the network, if the run's comes from your own file",
    )
    parser.add_argument("--quiet", action="store_true", help="only the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (see `errors`)."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(words: Sequence[str]) -> str:
    refuse_secrets(words)
    args = parse_args(words)
    start_logging(args.quiet, verbose=False)
    ticket_files = importlib.import_module("structured_tickets.export.ticket")
    return ticket_files.export(args.run, args.round, args.best, args.out, args.round_to, args.onnx, args.pt2, args.arch)
