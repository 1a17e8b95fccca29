"""Networks of other people, one after another: which are accepted, whether numbers are right, and what is faster.

`run FILE.jsonl` adds a line for each network that the file has none of, `table FILE.jsonl` prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import harness, zoo_networks, zoo_row

ALSO = ("torch_export", "onnx", "saved", "torch_pruning")
OFF, SLOWER, LITTLE = 1e-4, 1.05, 0.5
Row = dict[str, Any]


def run(args: argparse.Namespace) -> None:
    """Measure the networks that the file has no line of."""
    file: Path = args.file
    done = {row["name"] for row in read(file)} if file.exists() else set()
    names = args.names or zoo_networks.names_of_networks(file.with_suffix(".families.json"), args.cases)
    for name in [n for n in names if n not in done]:
        row = row_of(name, args.seconds, args.gigabytes, args.also)
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{row['took']:5.0f} s  {name}: {in_short(row)}", flush=True)


def row_of(name: str, seconds: float, gigabytes: float, also: Sequence[str]) -> Row:
    """Measure a network in a process of its own, so that whatever happens there becomes a row."""
    context = multiprocessing.get_context("fork")  # the parent has imported torch, and uses one thread
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(name, theirs, gigabytes, also))
    row: Row = {"name": name, "family": zoo_networks.family_of(name)}
    began = time.monotonic()
    child.start()
    theirs.close()
    ended = _collect(mine, row, began + seconds)
    child.kill() if not ended else None
    child.join()
    if not ended and row.get("torch_pruning", {}).get("said") != zoo_row.NOT_FINISHED:
        row["stopped"] = f"not finished after {seconds:.0f} s"
    elif ended and child.exitcode:
        row["stopped"] = f"the process ended with status {child.exitcode}"
    row.setdefault("outcome", "stopped" if "stopped" in row else "nothing")
    return {**row, "took": time.monotonic() - began}


def _collect(parts: Connection, row: Row, deadline: float) -> bool:
    """Add what the process sends to the row until it ends; False if the time is over before."""
    while (left := deadline - time.monotonic()) > 0 and parts.poll(left):
        try:
            row.update(parts.recv())
        except EOFError:
            return True
    return False


def _measure(name: str, parts: Connection, gigabytes: float, also: Sequence[str]) -> None:
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    harness.keep_memory()
    zoo_row.measure(name, parts.send, also)


def read(file: Path) -> list[Row]:
    """Return the rows of a file; of several of one network the last."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line]
    return list({row["name"]: row for row in rows}.values())


def numbers_are_wrong(row: Row) -> bool:
    """True if parameters or MACs of the whole or the halved network are reported wrongly."""
    return any(row[word]["reported"] != row[word]["counted"] for word in ("dense", "half") if word in row)


SUMS: dict[str, Callable[[Row], bool]] = {
    "accepted": lambda row: row["outcome"] == "accepted",
    f"accepted, at least {LITTLE:.0%} of the weights in units": lambda row: row.get("share", 0) >= LITTLE,
    "refused": lambda row: row["outcome"] == "refused",
    "tracebacks": lambda row: row["outcome"] == "traceback",
    "stopped (time, memory, crash)": lambda row: "stopped" in row,
    "wrong parameters or MACs": numbers_are_wrong,
    f"outputs off by more than {OFF:g}": lambda row: not row.get("gap", 0) <= OFF,
    f"compact network slower by more than {SLOWER - 1:.0%}": lambda row: row.get("times", {}).get("ratio", 0) > SLOWER,
    "`torch.export` fails": lambda row: row.get("torch_export", "yes") != "yes",
    "ONNX fails": lambda row: row.get("onnx", "yes") != "yes",
    "saved and read again: fails": lambda row: row.get("saved", "yes") != "yes",
    "torch-pruning: accepted": lambda row: row.get("torch_pruning", {}).get("said") == "yes",
    "torch-pruning: accepted, same logits": lambda row: row.get("torch_pruning", {}).get("gap", 1) <= OFF,
}
"""What is counted of all rows."""
TRIED = dict(zip(list(SUMS)[-5:], (*ALSO, ALSO[-1]), strict=True))
"""Those that are only known of rows where it was tried -> the key of the outcome."""
FAULTS = list(SUMS)[4:-2]


def in_short(row: Row) -> str:
    """Describe a row in a line of a log."""
    times = row.get("times", {})
    words = [row["outcome"], f"share {row.get('share', 0):.2f}", *(n for n in FAULTS if SUMS[n](row))]
    told = row.get("reason") or row.get("stopped") or f"time {times.get('ratio', 0):.2f}, gap {row.get('gap', 0):.1e}"
    return f"{'; '.join(words)}: {told}"


HEAD = ["network", "side", "units", "in units", "params", "MACs", "half: params", "half: MACs", "gap", "time", "find s"]


def table(args: argparse.Namespace) -> None:
    """Print sums, then a row for each network, then what is refused or goes wrong."""
    rows = read(args.file)
    sums = [[name, _sum(rows, name)] for name in SUMS]
    print(harness.table(["of", f"{len(rows)} networks"], sums))
    accepted = [r for r in rows if r["outcome"] == "accepted"]
    print("\n" + harness.table(HEAD, [_cells(row) for row in accepted]))
    others = [[_name(r), r["outcome"], _reason(r)] for r in rows if r["outcome"] != "accepted" or "reason" in r]
    print("\n" + harness.table(["network", "outcome", "reason"], others))
    print("\n" + harness.table(["wrong", "networks"], _wrong(rows)))
    theirs = [_of_theirs(row) for row in rows if "torch_pruning" in row]
    if theirs:
        print("\n" + harness.table(["network", "torch-pruning", "params left", "gap"], theirs))
    if args.whole:
        print("\n" + harness.table(["layers stay whole because", "layers", "networks"], _whole(rows)))


def _sum(rows: Sequence[Row], name: str) -> str:
    """Return how many rows are so; of those where it was tried, if not of all."""
    known = [row for row in rows if TRIED.get(name, "name") in row]
    found = str(sum(map(SUMS[name], known)))
    return found if len(known) == len(rows) else f"{found} of {len(known)} tried"


def _wrong(rows: Sequence[Row]) -> list[list[str]]:
    found = {name: [_name(r) for r in rows if SUMS[name](r)] for name in FAULTS}
    return [[name, ", ".join(names)] for name, names in found.items() if names]


def _whole(rows: Sequence[Row]) -> list[list[str]]:
    layers: Counter[str] = Counter()
    networks: dict[str, list[str]] = {}
    for row in rows:
        layers.update(row.get("whole", {}))
        for reason in row.get("whole", {}):
            networks.setdefault(reason, []).append(_name(row))
    return [[reason, str(n), ", ".join(networks[reason][:8])] for reason, n in layers.most_common()]


def _name(row: Row) -> str:
    library, _, rest = row["name"].rpartition("/")
    return rest if ":" in rest else f"{library.rpartition('/')[2]}/{rest}"


def _reason(row: Row) -> str:
    return str(row.get("reason") or row.get("stopped", "")).replace("|", "\\|")


def _of_theirs(row: Row) -> list[str]:
    found = row["torch_pruning"]
    numbers = [f"{found['share']:.0%}", f"{found['gap']:.0e}"] if "gap" in found else ["", ""]
    return [_name(row), str(found["said"]).replace("|", "\\|"), *numbers]


def _cells(row: Row) -> list[str]:
    units = ", ".join(f"{n} {kind}s" for kind, n in row.get("units", {}).items())
    cells = [_name(row), str(row["side"]), units, f"{row.get('share', 0):.0%}"]
    for word in ("dense", "half"):
        reported, counted = (row.get(word, {}).get(k) for k in ("reported", "counted"))
        cells += ["", ""] if reported is None else [_number(a, b) for a, b in zip(reported, counted, strict=True)]
    gap, times = row.get("gap"), row.get("times", {})
    cells += ["" if gap is None else f"{gap:.0e}", f"{times['ratio']:.2f}" if times else ""]
    return [*cells, f"{row.get('seconds', 0):.0f}"]


def _number(reported: int, counted: int) -> str:
    wrong = "" if reported == counted else f" (really {counted / 1e6:.2f} M)"
    return f"{reported / 1e6:.2f} M{wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(required=True)
    runs = parts.add_parser("run")
    runs.add_argument("file", type=Path, help="a line of JSON for each network")
    runs.add_argument("names", nargs="*", help="networks as --arch takes them (default: all)")
    runs.add_argument("--cases", type=Path, help="folder with files of users, each factory of which is a network")
    runs.add_argument("--seconds", type=float, default=300, help="time for one network")
    runs.add_argument("--gigabytes", type=float, default=12, help="memory for one network")
    runs.add_argument("--also", nargs="*", choices=ALSO, default=["torch_export", "saved"], help="what else to try")
    runs.set_defaults(action=run)
    tables = parts.add_parser("table")
    tables.add_argument("file", type=Path)
    tables.add_argument("--whole", action="store_true", help="also why layers stay whole")
    tables.set_defaults(action=table)
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()
