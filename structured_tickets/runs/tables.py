"""The rounds of a run as text. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from structured_tickets.base.text_tables import millions, text_table
from structured_tickets.runs.rows import Row


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def rounds_table(rounds: Sequence[Row]) -> str:
    """The rounds of a run as a text table."""
    kinds = list(rounds[0]["kept_units"]) if rounds else []
    head = [
        "round",
        "density %",
        *(f"{k}s" for k in kinds),
        "params",
        "MACs",
        "train",
        "val",
        "test",
        "hard val",
        "hard test",
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
                    _percent(row[k])
                    for k in (
                        "accuracy",
                        "val_accuracy",
                        "test_accuracy",
                        "hardened_val_accuracy",
                        "hardened_test_accuracy",
                    )
                ),
                "-" if squeeze is None else f"{squeeze:.2g}",
            ]
        )
    return text_table(head, lines, right=True)
