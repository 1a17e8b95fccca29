"""Write the final network of a round without its pruned units: safetensors and JSON, ONNX, torch.export."""

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
    parser.add_argument("--round", type=count(0), help="round to export (default: the last finished one)")
    parser.add_argument(
        "--best",
        action="store_true",
        help="use the weights with the best validation accuracy of the round, not the last ones",
    )
    parser.add_argument("--out", type=path, metavar="DIR", help="default: RUN_DIR/export/round_<k>")
    parser.add_argument(
        "--round_to",
        type=count(1),
        default=1,
        metavar="N",
        help="keep extra units so that each layer has a multiple of N",
    )
    parser.add_argument("--onnx", action="store_true", help="also write model.onnx, and check it with ONNX Runtime")
    parser.add_argument("--pt2", action="store_true", help="also write model.pt2 (torch.export)")
    parser.add_argument(
        "--arch",
        type=architecture,
        metavar="FILE.py:FACTORY",
        help="network of the run, if it comes from your own file (its code will be run)",
    )
    parser.add_argument("--quiet", action="store_true", help="print only the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status (see `errors`)."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(words: Sequence[str]) -> str:
    refuse_secrets(words)
    args = parse_args(words)
    start_logging(args.quiet, verbose=False)
    importlib.import_module("structured_tickets.export.request").refuse(
        args.run, args.round, args.best, args.arch, args.onnx
    )
    ticket_files = importlib.import_module("structured_tickets.export.ticket")
    return ticket_files.export(args.run, args.round, args.best, args.out, args.round_to, args.onnx, args.pt2, args.arch)
