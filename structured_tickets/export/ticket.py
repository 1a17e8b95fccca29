"""Export a round's network at its real size, compared with the masked one."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from structured_tickets.base.atomic_files import write_atomically
from structured_tickets.base.errors import DataError, RunError, StorageError, UsageError
from structured_tickets.base.measured_time import TOO_NOISY
from structured_tickets.base.text_tables import counted, file_sizes, millions, text_table
from structured_tickets.export.deployed import LARGEST_IMAGE, load, save
from structured_tickets.export.latency import REPEATS, latencies, why_slower
from structured_tickets.export.request import require_confirmation, require_onnx, require_round
from structured_tickets.networks import build_model, sources_of
from structured_tickets.networks.hosted import normalize_of, put_normalize
from structured_tickets.networks.layers import Normalize, channels_side_by_side
from structured_tickets.networks.registry import note_channel_units
from structured_tickets.pruning.masks import hardened_state
from structured_tickets.pruning.usable_units import note_what_had_units
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.read import runs_within
from structured_tickets.runs.same_run import warn_of_changed_code
from structured_tickets.runs.state import RunState
from structured_tickets.settings.conditions import channel_units_of
from structured_tickets.shrinking.cost import Cost, cost_of
from structured_tickets.shrinking.kept_units import kept_units_of, structure_of
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.unit_groups.kinds import STREAM

log = logging.getLogger("rsst")

TOLERANCE = 1e-4  # of the logits, relative to the largest (or to 1)
LATENCY_BATCHES = (1, 64)
SLOWER = 1.05  # times the latency of the dense network; less is noise


class ExportError(RunError):
    """A network that was to be written does not compute what the masked network does."""


@dataclass(frozen=True)
class Ticket:
    """A round's final network.

    Attributes:
        run: State of the run after the round.
        masked: The network at full size, with everything outside the structure at zero.
        structure: Parameter name -> 0/1; empty for the dense network.
    """

    run: RunState
    masked: nn.Module
    structure: dict[str, Tensor]


def read_ticket(folder: Path, state: int | None = None, best: bool = False, arch: str | None = None) -> Ticket:
    """Return the final network of a round of the run in `folder`.

    Args:
        state: The round; by default the last that is finished.
        best: Take the weights of the round's best epoch instead of its last.
        arch: The network, `file.py:factory`, of a run whose network comes from a user's file.

    Raises:
        DataError: There is no such run, round or file.
        UsageError: The network comes from a user's file, and `arch` does not name it, or names another.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a run folder")
    run_folder = RunFolder(folder)
    path = require_round(folder, _last_round(run_folder) if state is None else state, best)
    run = RunFolder.load(path)
    model = _network(run, arch, path)
    put_normalize(model, Normalize((0.0,) * 3, (1.0,) * 3))
    groups = run.rounds[-1].get("kept_per_layer") if run.rounds else None
    if groups and isinstance(groups, dict):  # the first runs did not note them
        note_what_had_units(model, groups, run.followed)
    structure = run.structure
    weights = hardened_state(model, run.judged, structure)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        if arch is None:
            raise DataError(f"{path} does not hold the weights of {run.args['arch']}") from error
        raise UsageError(f"argument --arch: {arch} is not the network of this run") from error
    return Ticket(run, model.eval(), structure)


def _last_round(run_folder: RunFolder) -> int:
    newest = run_folder.newest_run()
    if newest is None or not newest.rounds:
        raise DataError(f"{run_folder.path} holds no finished round{runs_within(run_folder.path)}")
    return int(newest.rounds[-1]["round"])


def _network(run: RunState, arch: str | None, file: Path) -> nn.Module:
    """Build the run's network. A user's file is only run if `arch` names it: the checkpoint may be from anyone."""
    named, size = run.args.get("arch"), run.args.get("image_size")
    if not isinstance(named, str) or not isinstance(size, int) or not 0 < size <= LARGEST_IMAGE:
        raise DataError(f"{file} names no network, or no size of its images")
    require_confirmation(named, arch)
    model = build_model(arch or named, len(run.classes), size)
    note_channel_units(model, channel_units_of(run.args), (3, size, size))
    warn_of_changed_code(run.sources, sources_of(arch or named), "The exported network is that of the changed code")
    return model


def export(
    folder: Path,
    state: int | None = None,
    best: bool = False,
    out: Path | None = None,
    multiple: int = 1,
    onnx: bool = False,
    pt2: bool = False,
    arch: str | None = None,
) -> str:
    """Write a round's network at its real size; return the table of what became smaller.

    Args:
        state, best, arch: See `read_ticket`.
        out: Folder to write to; by default one within `folder`.
        multiple: Keep extra units so that each layer has a multiple of this.
        onnx, pt2: Write these forms too.

    Raises:
        ExportError: A written form computes something else than the masked network; its file is removed.
        UsageError: ONNX is wanted, and its packages are not installed.
    """
    if onnx:
        require_onnx()
    ticket = read_ticket(folder, state, best, arch)
    size = ticket.run.args["image_size"]
    kept = kept_units_of(ticket.masked, ticket.structure, multiple)
    structure = structure_of(ticket.masked, kept)
    small = shrink(ticket.masked, structure).network.eval()
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = ticket.masked(images)
        require_same_logits("the compact network", small(images), wanted)
    out = out or _within(folder / "export", f"round_{ticket.run.state}")
    out.mkdir(parents=True, exist_ok=True)
    save(small, _description(ticket, kept, wanted.shape[1]), out)
    with torch.no_grad():
        require_same_logits("model.safetensors, read back", load(out, arch)(images), wanted)
    if onnx:
        _write(out / "model.onnx", _write_onnx, _run_onnx, small, images, wanted)
    if pt2:
        _write(out / "model.pt2", _write_pt2, _run_pt2, small, images, wanted)
    rows = _measure(ticket, structure, small, out / "model.safetensors", size)
    write_atomically(json.dumps(rows, indent=1) + "\n", out / "export.json")
    log.info("wrote %s", out)
    why = _why_slower(rows, small, ticket.masked)
    if why:
        log.warning("%s", _advice(ticket, kept, small, rows, multiple))
    return _table(rows) + (why or _why_as_large(rows, structure))


def _why_as_large(rows: list[dict], structure: Mapping[str, Tensor]) -> str:
    """Return a line for the table about a network that loses units, and no parameters; empty if it does not."""
    dense, _, compact = rows
    if compact["parameters"] < dense["parameters"] or all(bool(m.all()) for m in structure.values()):
        return ""
    return (
        "\nnothing is removed: what is left would have to be put in its places among zeros, which takes longer than to "
        "compute these, by an estimate. For a smaller network, prune with --channel_units stream"
    )


def _why_slower(rows: list[dict], small: nn.Module, whole: nn.Module) -> str:
    """Return a line for the table about a compact network that is slower than the dense one; empty if it is not."""
    dense, _, compact = rows
    slower = [f"batch {batch}" for batch in LATENCY_BATCHES if _is_slower(compact, dense, batch)]
    noisy = any(row[f"noise_batch_{LATENCY_BATCHES[-1]}"] > TOO_NOISY for row in (dense, compact))
    if noisy or compact["parameters"] == dense["parameters"] or f"batch {LATENCY_BATCHES[-1]}" not in slower:
        return ""
    return f"\ncompact is slower than dense ({', '.join(slower)}): {why_slower(small, whole)}"


def _is_slower(compact: dict, dense: dict, batch: int) -> bool:
    """Return whether one is slower than the other, by more than the spread of either's times."""
    (now, noise), (before, noise_before) = (
        (row[f"latency_ms_batch_{batch}"], row[f"noise_batch_{batch}"]) for row in (compact, dense)
    )
    return now > SLOWER * before and now - before > max(now * noise, before * noise_before)


def _advice(ticket: Ticket, kept: dict[str, list[int]], small: nn.Module, rows: list[dict], multiple: int) -> str:
    """Return what to do about a compact network that is slower than the dense one, with the best that there is."""
    dense, _, compact = rows
    batch = LATENCY_BATCHES[-1]
    before, now = (row[f"latency_ms_batch_{batch}"] for row in (dense, compact))
    names, networks = ["smallest"], [small]
    for more in (m for m in (8, 16) if m != multiple):
        units = kept_units_of(ticket.masked, ticket.structure, more)
        if units != kept:
            names.append(f"--round_to {more}")
            networks.append(shrink(ticket.masked, structure_of(ticket.masked, units)).network.eval())
    images = ticket.run.args["image_size"]
    found = latencies([channels_side_by_side(copy.deepcopy(n)) for n in networks], batch, images)
    seconds, name = min((time.median, name) for time, name in zip(found, names, strict=True))
    best = f" {name} is the fastest here ({1e3 * seconds:.1f} ms)." if name != "smallest" else ""
    args = ticket.run.args
    suits = channel_units_of(args) == STREAM and args.get("round_units", 1) != 1
    otherwise = "" if suits else " For a faster network, prune with --channel_units stream --round_units 8"
    return (
        f"the compact network is slower than the dense one: {now:.1f} ms instead of {before:.1f} for "
        f"{counted(batch, 'image')}.{best}{otherwise}"
    ).removesuffix(".")


def _description(ticket: Ticket, kept: dict[str, list[int]], classes: int) -> dict[str, Any]:
    """Return what `save` writes about a network with so many classes."""
    normalize = normalize_of(ticket.masked)
    return {
        "arch": ticket.run.args["arch"],
        "image_size": ticket.run.args["image_size"],
        "round": ticket.run.state,
        "classes": ticket.run.classes or [str(k) for k in range(classes)],
        "mean": normalize.mean.flatten().tolist(),
        "std": normalize.std.flatten().tolist(),
        "kept": kept,
        "channel_units": channel_units_of(ticket.run.args),
        **({"followed": True} if ticket.run.followed else {}),
        "settings": ticket.run.args,
    }


def _within(folder: Path, name: str) -> Path:
    """Return the path of a folder within a run's folder, which may be from anyone.

    Raises:
        StorageError: It is a link, which could lead anywhere.
    """
    for path in (folder, folder / name):
        if path.is_symlink():
            raise StorageError(f"{path} is a link, which is not followed; name a folder by --out")
    return folder / name


def require_same_logits(what: str, found: Tensor, wanted: Tensor) -> None:
    """Raise ExportError if the logits differ by more than rounding."""
    difference = float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    if not difference <= TOLERANCE:
        raise ExportError(f"{what} differs from the masked network by {difference:.2g}. The file was deleted")


def _write(
    path: Path,
    write: Callable[[nn.Module, Tensor, Path], None],
    run: Callable[[Path, Tensor], Tensor],
    small: nn.Module,
    images: Tensor,
    wanted: Tensor,
) -> None:
    write(copy.deepcopy(small), images, path)
    try:
        require_same_logits(path.name, run(path, images), wanted)
        require_same_logits(f"{path.name} with one image", run(path, images[:1]), wanted[:1])
    except ExportError:
        path.unlink()
        raise


def _write_onnx(small: nn.Module, images: Tensor, path: Path) -> None:
    torch.onnx.export(
        small,
        (images,),
        str(path),
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_pt2(small: nn.Module, images: Tensor, path: Path) -> None:
    program = torch.export.export(small, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)


def _run_pt2(path: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(path).module()(images)


def _measure(ticket: Ticket, structure: dict[str, Tensor], small: nn.Module, file: Path, size: int) -> list[dict]:
    """Return a row each for the dense, the masked and the compact network."""
    dense, cut = (cost_of(ticket.masked, masks, size) for masks in ({}, structure))
    whole = {n: v.contiguous().clone() for n, v in ticket.masked.state_dict().items()}
    dense_bytes, cut_bytes = len(safetensors.torch.save(whole)), file.stat().st_size
    dense_network = copy.deepcopy(ticket.masked)
    dense_network.load_state_dict(ticket.run.state_dict)
    networks = [channels_side_by_side(copy.deepcopy(n)) for n in (dense_network, ticket.masked, small)]
    rows = [_row("dense", dense, dense_bytes), _row("masked", dense, dense_bytes), _row("compact", cut, cut_bytes)]
    for batch in LATENCY_BATCHES:
        for row, seconds in zip(rows, latencies(networks, batch, size), strict=True):
            row[f"latency_ms_batch_{batch}"] = 1e3 * seconds.median
            row[f"noise_batch_{batch}"] = seconds.noise
    return rows


def _row(network: str, cost: Cost, size_on_disk: int) -> dict[str, Any]:
    return {
        "network": network,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "bytes": size_on_disk,
        "threads": torch.get_num_threads(),
    }


def _table(rows: list[dict]) -> str:
    head = ["network", "parameters", "MACs", "file", *(f"batch {b}" for b in LATENCY_BATCHES)]
    lines = []
    for row, size in zip(rows, file_sizes([row["bytes"] for row in rows]), strict=True):
        times = [_time(row[f"latency_ms_batch_{b}"], row[f"noise_batch_{b}"]) for b in LATENCY_BATCHES]
        lines.append([row["network"], f"{row['parameters']:,}", millions(row["macs"]), size, *times])
    threads = counted(rows[0]["threads"], "thread")
    said = f"latency: median of {REPEATS} measurements; ± holds the middle half of them (fp32, {threads})"
    return f"{text_table(head, lines, right=True)}\n{said}"


def _time(milliseconds: float, noise: float) -> str:
    """Return a cell of the table: 12.4 ms ±3%."""
    return f"{milliseconds:.1f} ms {'(too noisy to tell)' if noise > TOO_NOISY else f'±{noise:.0%}'}"
