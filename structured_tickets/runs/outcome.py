"""Results of a finished run: its final network and its summary."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from torch import nn

from structured_tickets.base.commands import typed
from structured_tickets.base.text_tables import counted
from structured_tickets.networks import runs_a_file
from structured_tickets.pruning.masks import hardened_state, pruning_state
from structured_tickets.runs.rows import Row, seconds_of
from structured_tickets.runs.state import RunState


def final_network(model: nn.Module, run: RunState) -> dict[str, Any]:
    """Return the weights of the round that `run` has ended, hardened, under torch's pruning keys: `ticket.pth.tar`.

    They are those that were judged; averaged ones are beside them.

    Args:
        model: The run's network.
    """
    structure = run.structure
    hard = hardened_state(model, run.judged, structure)
    others = {"ema_state_dict": hardened_state(model, run.average, structure)} if run.average else {}
    return {
        "arch": run.args["arch"],
        "round": run.state,
        "state_dict": pruning_state(hard, structure),
        "args": run.args,
        **others,
    }


def how_to_export(args: argparse.Namespace, folder: Path, last: Row) -> str:
    """Return the command that writes the last round's network at its real size."""
    own = ["--arch", args.arch] if runs_a_file(args.arch) else []
    command = f"{typed('export')} {shlex.join([str(folder), *own])}"
    return f"next: {command}\n      writes it at its real size ({counted(last['parameters'], 'parameter')})"


def result_of(run: RunState, is_control: bool) -> dict[str, Any]:
    """Return how much was done, and in what time: `result.json`.

    Args:
        is_control: Round 0 was another run's.
    """
    shared, first = bool(run.round_0.get("shared")), seconds_of(r for r in run.history if r["round"] == 0)
    others = first if shared or is_control else 0.0
    return {
        "rounds": len(run.rounds),
        "seconds": seconds_of(run.history) - others,
        "seconds_of_round_0": first,
        "round_0_is_shared": shared,
        "round_0_address": run.round_0.get("address", ""),
    }
