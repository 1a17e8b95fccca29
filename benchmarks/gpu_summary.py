"""The results of scripts/gpu_check.sh as one page and one file of JSON."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import as_table

LAST_LINES = 15
TIMED_OUT = ("124", "137")  # exit statuses of `timeout`


def verdict(status: str) -> str:
    """Return a status of `parts.tsv` in words."""
    if status == "0":
        return "ok"
    if status in TIMED_OUT:
        return "out of time"
    return f"FAILED (exit status {status})" if status.isdecimal() else status


def read_parts(folder: Path) -> list[dict[str, Any]]:
    """Return name, verdict, seconds, limit and command of each part, in the order in which they ran."""
    names = ("part", "result", "seconds", "limit", "command")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in (folder / "parts.tsv").read_text().splitlines()]
    return [row | {"result": verdict(row["result"])} for row in rows]


def last_lines(file: Path) -> str:
    """Return the end of a log."""
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    return "\n".join(f"    {line}" for line in lines[-LAST_LINES:])


def accuracies(folder: Path) -> list[dict[str, Any]]:
    """Return the last round of each run that has finished one, in percent with two digits."""
    names = ("density", "val_accuracy", "test_accuracy", "hardened_test_accuracy", "squeeze_ratio")
    found = []
    for file in sorted(folder.glob("runs/*/summary.csv")):
        with file.open(newline="") as text:
            rows = list(csv.DictReader(text))
        if rows:
            values = {name: f"{float(rows[-1][name]):.2f}" if rows[-1][name] else "" for name in names}
            found.append({"run": file.parent.name, "rounds": len(rows)} | values)
    return found


def summary(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the page in Markdown, and the same as values."""
    parts = read_parts(folder)
    files = [file for file in sorted(folder.glob("*.json")) if file.stem != "summary"]
    results = {file.stem: json.loads(file.read_text()) for file in files}
    machine = {k: v for k, v in next(iter(results.values()), {}).items() if k != "parts"}
    tables: dict[str, Any] = {name: rows for result in results.values() for name, rows in result["parts"].items()}
    runs = accuracies(folder)
    text = ["# Check on this machine", machine.get("machine", "No benchmark has run."), "## Parts"]
    text.append(as_table([{k: row[k] for k in ("part", "result", "seconds", "limit")} for row in parts]))
    if runs:
        text += ["## Whole runs", as_table(runs)]
    for name, rows in tables.items():
        text += [f"## {name}", as_table(rows)]
    for row in parts:
        if row["result"] == "out of time" or row["result"].startswith("FAILED"):
            text += [f"## Log of {row['part']}", f"`{row['command']}`", last_lines(folder / f"{row['part']}.log")]
    return "\n\n".join(text) + "\n", {"machine": machine, "parts": parts, "runs": runs, "benchmarks": tables}


def main() -> None:
    folder = Path(sys.argv[1])
    page, values = summary(folder)
    (folder / "summary.md").write_text(page)
    (folder / "summary.json").write_text(json.dumps(values, indent=1))
    bad = [row["part"] for row in values["parts"] if row["result"].startswith(("FAILED", "out of"))]
    print(f"{folder / 'summary.md'}: {len(values['parts'])} parts, failed: {', '.join(bad) or 'none'}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
