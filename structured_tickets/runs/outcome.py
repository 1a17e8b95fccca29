"""What a finished run leaves behind: its final network, and its result."""

from __future__ import annotations

from typing import Any

from structured_tickets.pruning.masks import pruning_state
from structured_tickets.runs.rows import seconds_of
from structured_tickets.runs.state import RunState


def final_network(run: RunState) -> dict[str, Any]:
    """Return the weights of the round that `run` has ended, hardened, under torch's pruning keys: `ticket.pth.tar`."""
    structure = run.structure
    hard = {n: v * structure[n] if n in structure else v for n, v in run.state_dict.items()}
    return {
        "arch": run.args["arch"],
        "round": run.state,
        "state_dict": pruning_state(hard, structure),
        "args": run.args,
    }


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
