"""The rounds of a run as text. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from structured_tickets.base.text_tables import millions, text_table
from structured_tickets.runs.rows import EMA, Row
from structured_tickets.unit_groups.kinds import word_of


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def rounds_table(rounds: Sequence[Row]) -> str:
    """The rounds of a run as a text table."""
    kinds = list(rounds[0]["kept_units"]) if rounds else []
    averaged = EMA if any(row.get(EMA[0]) is not None for row in rounds) else ()
    head = [
        "round",
        "density %",
        *(f"{word_of(k)}s" for k in kinds),
        "params",
        "MACs",
        "train",
        "val",
        "test",
        "hard val",
        "hard test",
        *(f"ema {name.split('_')[1]}" for name in averaged),
        "doomed left",
    ]
    lines = []
    for row in rounds:
        squeeze = row["squeeze_ratio"]
        lines.append(
            [
                str(row["round"]),
                f"{row['density']:.2f}",
                *("{}/{}".format(*row["kept_units"][k]) for k in kinds),
                f"{row['parameters']:,}",
                millions(row["macs"]),
                *(
                    _percent(row.get(k))
                    for k in (
                        "accuracy",
                        "val_accuracy",
                        "test_accuracy",
                        "hardened_val_accuracy",
                        "hardened_test_accuracy",
                        *averaged,
                    )
                ),
                "-" if squeeze is None else f"{squeeze:.2g}",
            ]
        )
    return text_table(head, lines, right=True)
