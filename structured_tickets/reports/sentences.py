"""Sentences about runs besides their numbers: weak penalties, time that was saved."""

from __future__ import annotations

from structured_tickets.base.text_tables import counted
from structured_tickets.pruning.methods import SQUEEZE_GOAL
from structured_tickets.reports.runs import Collection


def weak_penalties(collection: Collection) -> list[str]:
    """A sentence if runs have hardened weights that had not faded out; else none."""
    ratios = [
        ratio for run in collection.runs for row in run.rounds[-1:] if (ratio := row.get("squeeze_ratio")) is not None
    ]
    weak = sum(ratio > SQUEEZE_GOAL for ratio in ratios)
    if not weak:
        return []
    share = f"{100 * SQUEEZE_GOAL:.0f}%"
    return [
        f"In {weak} of {counted(len(ratios), 'RSST run')} the penalty was weak: more than {share} of the norm of the "
        "doomed weights was left in the last round, and hardening cuts it off. Train longer, or use --penalty auto."
    ]


def time_saved(collection: Collection) -> list[str]:
    """A sentence on what the shared round 0 has saved; none if nothing was shared."""
    results = [run.result for run in (*collection.runs, *collection.dense) if run.result]
    taken = [r["seconds_of_round_0"] for r in results if r["round_0_is_shared"]]
    given = [run.result["seconds"] for run in collection.dense if run.result]
    if not taken or not given:
        return []
    spent, saved = sum(r["seconds"] for r in results), sum(taken) - sum(given)
    times = f"{counted(len(given), 'time')} instead of {len(taken)}"
    return [
        f"round 0 was trained {times}: {saved:.0f} s of training saved, {spent:.0f} s spent "
        f"({100 * saved / (spent + saved):.0f}% less)"
    ]
