"""The time that the compact network of each round takes here, measured in turns."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from structured_tickets.base.atomic_files import write_atomically
from structured_tickets.base.errors import DataError, RunError
from structured_tickets.base.measured_time import MeasuredTime
from structured_tickets.base.text_tables import counted, few
from structured_tickets.base.untrusted_text import is_mapping, is_number, parse_json
from structured_tickets.networks import runs_a_file
from structured_tickets.reports.runs import Collection, Run

log = logging.getLogger("rsst")

BATCH = 64
REPEATS = 9
CACHE = "latency.json"


def measured(collection: Collection, folder: Path, archs: Sequence[str] = ()) -> dict[tuple[str, int], MeasuredTime]:
    """(run, round) -> milliseconds of a forward pass of `BATCH` images in float32.

    Networks with the same units in each layer are measured once. What was measured is kept in `folder`; with other
    versions, another processor or number of threads all is measured anew.

    Args:
        archs: The networks, `file.py:factory`, of runs whose network comes from a user's file; no other file is run.
    """
    import torch

    from structured_tickets.base.environment import numerics

    here = {k: v for k, v in numerics(torch.device("cpu")).items() if k != "program"} | {"batch": BATCH}
    known: dict[str, MeasuredTime] = _cached(folder / CACHE, here)
    wanted = {_shape(run, state): (run, state) for run in collection.runs for state in range(len(run.rounds))}
    missing = {shape: place for shape, place in wanted.items() if shape not in known}
    if missing:
        log.info("measuring the latency of %s", counted(len(missing), "network"))
        known |= _measure(missing, archs)
        kept = {"where": here, "milliseconds": {shape: astuple(time) for shape, time in known.items()}}
        write_atomically(json.dumps(kept, indent=1) + "\n", folder / CACHE)
    places = (
        (run.name, state, known.get(_shape(run, state))) for run in collection.runs for state in range(len(run.rounds))
    )
    return {(name, state): value for name, state, value in places if value is not None}


def _cached(path: Path, here: dict[str, Any]) -> dict[str, MeasuredTime]:
    try:
        found = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    if not is_mapping(found) or found.get("where") != here or not is_mapping(found.get("milliseconds")):
        return {}
    return {shape: MeasuredTime(*values) for shape, values in found["milliseconds"].items() if _is_a_time(values)}


def _is_a_time(values: Any) -> bool:
    """Return whether this is a median between two quartiles; an earlier version wrote the median only."""
    if not isinstance(values, list) or len(values) != 3 or not all(map(is_number, values)):
        return False
    median, low, high = values
    return bool(0 < low <= median <= high)


def _shape(run: Run, state: int) -> str:
    """Return what the time depends on."""
    row = run.rounds[state]
    whole = run.args.get("struct") in ("refill", "rsst") or run.args.get("regroup")
    kept = row["kept_per_layer"] if whole else run.rounds[0]["kept_per_layer"]
    arch, dataset, size = (run.args.get(name) for name in ("arch", "dataset", "image_size"))
    file = Path(str(arch).rpartition(":")[0])
    code = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
    return json.dumps([arch, code, dataset, size, list(kept.values())])


def confirmed(named: Iterable[str], archs: Sequence[str]) -> dict[str, str]:
    """Return network that runs have noted -> the `--arch` by which the user means it; others are left out.

    It is the same, or one of the same name in another folder, or the only one that is left for the only one.
    """
    own = list(dict.fromkeys(name for name in named if runs_a_file(name)))
    found = {name: name for name in own if name in archs}
    for name in (n for n in own if n not in found):
        alike = [a for a in archs if a not in own and a.rpartition("/")[2] == name.rpartition("/")[2]]
        found |= {name: alike[0]} if alike else {}
    left, free = [n for n in own if n not in found], [a for a in archs if a not in found.values()]
    return found | ({left[0]: free[0]} if len(left) == len(free) == 1 else {})


def _measure(places: dict[str, tuple[Run, int]], archs: Sequence[str]) -> dict[str, MeasuredTime]:
    """Milliseconds of each network. All are measured in turns, so that a busy moment slows down every one."""
    from structured_tickets.export.latency import latencies
    from structured_tickets.export.ticket import read_ticket
    from structured_tickets.networks.layers import channels_side_by_side
    from structured_tickets.runs.folder import RunFolder
    from structured_tickets.shrinking.shrink import shrink

    networks: dict[str, tuple[Any, int]] = {}
    there = {shape: (r, k) for shape, (r, k) in places.items() if RunFolder(r.folder).checkpoint(k).is_file()}
    if gone := len(places) - len(there):
        log.warning("no latency of %s, whose checkpoints are not kept", counted(gone, "network"))
    named = [run.args.get("arch", "") for run, _ in there.values()]
    known = confirmed(named, archs)
    for arch in dict.fromkeys(name for name in named if runs_a_file(name) and name not in known):
        log.warning("no latency of a network from your file, whose code would be run. Confirm with --arch %s", arch)
    failed: dict[tuple[str, str], list[str]] = {}
    for shape, (run, state) in there.items():
        arch = run.args.get("arch", "")
        if runs_a_file(arch) and arch not in known:
            continue
        try:
            ticket = read_ticket(run.folder, state, arch=known.get(arch))
        except (DataError, RunError) as error:
            failed.setdefault((run.name, str(error)), []).append(str(state))
            continue
        small = shrink(ticket.masked, ticket.structure).network.eval()
        networks[shape] = channels_side_by_side(small), ticket.run.args["image_size"]
    for (name, reason), states in failed.items():
        rounds = f"round{'s' * (len(states) > 1)} {few(states)}"
        log.warning("no latency of %s, %s: %s", name, rounds, reason)
    found: dict[str, MeasuredTime] = {}
    for size in {size for _, size in networks.values()}:
        alike = {shape: network for shape, (network, side) in networks.items() if side == size}
        seconds = latencies(list(alike.values()), BATCH, size, REPEATS)
        found |= {shape: time.scaled(1e3) for shape, time in zip(alike, seconds, strict=True)}
    return found
