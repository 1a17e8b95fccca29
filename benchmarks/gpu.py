"""Training steps on a card: an ordinary loop, a good engineer's, and the runner's own, eager and recorded."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.compact import random_structure, share_of_macs
from benchmarks.gpu_loops import SIZE, Ours, batches_of, network, photos
from benchmarks.gpu_workers import COMPILED, LOOPS, ON_CARDS, Compiling, Job, Worker
from benchmarks.gpu_workers import warmed_up as warmed_up_workers
from benchmarks.step import operations_per_step
from structured_tickets.base.errors import first_line
from structured_tickets.base.weights import cloned_state, digest_of
from structured_tickets.networks import MODELS
from structured_tickets.runs.setup import choose_device, choose_kernels
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.sweeps.mps import daemon_answers, own_daemon

Row = dict[str, Any]

PEAK = (torch.bfloat16, torch.float32)  # types of matrix products, the faster of which is the limit of a device
GOALS = (("plain", 4.0), ("good engineer", 1.2))  # base, how many times as fast the better of JUDGED is; at batch 128
JUDGED = ("ours recorded", "ours compiled")
PROFILED = ("plain", "good engineer", "ours eager", *JUDGED)
BESIDE = ("plain", "ours recorded")  # what the compiled loops are timed with


@dataclass(frozen=True)
class Loop:
    """Something that is timed.

    Attributes:
        call: One pass over the images, which need not wait for the device.
        first: Seconds of making it and of the first passes: choosing kernels, compiling, capturing.
        remark: Of the runner's loops: whether the step is recorded, or why not.
    """

    call: Callable[[], object]
    first: float
    remark: str = ""


def loops_of(device: torch.device, args: argparse.Namespace) -> list[str]:
    """Names of the loops that are timed here and not compiled."""
    left_out = COMPILED + (() if device.type == "cuda" else ON_CARDS)
    return [name for name in args.loops or LOOPS if name not in left_out]


def compiled_jobs(args: argparse.Namespace) -> list[Job]:
    """The loops that are compiled, of each network."""
    chosen = {"none": (), "theirs": ("good engineer",), "all": COMPILED}[args.compiled]
    names = [name for name in chosen if name in (args.loops or LOOPS)]
    return [Job(arch, name, args.batch_size[0], args.steps, args.device) for arch in args.arch for name in names]


def warmed_up(loop: Any, device: torch.device) -> Loop:
    """Let a loop, or an `Ours`, make two passes.

    Raises:
        RuntimeError: It does not run here (memory, a missing compiler).
    """
    call = loop.train if isinstance(loop, Ours) else loop
    first = harness.timed(lambda: [call(), call()], device)
    return Loop(call, first, loop.recorded if isinstance(loop, Ours) else "")


@contextmanager
def kept(loops: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Give up all that these loops have recorded or compiled, at the end and together: graphs share memory."""
    try:
        yield loops
    finally:
        for loop in loops.values():
            if isinstance(loop, Ours):
                loop.recorder.close()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()


def turns_for(calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> int:
    """Turns of all loops, so that the fastest is timed for about so many seconds."""
    fastest = min(harness.timed(call, device) for call in calls.values())
    return max(3, min(200, round(seconds / fastest)))


def timed_in_turns(calls: Mapping[str, Callable[[], object]], seconds: float, device: torch.device) -> harness.Times:
    """Time loops that are warm."""
    return harness.alternate(calls, turns_for(calls, seconds, device), device, warmup=0)


def step_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """A row for each loop, in a process each; those of a network and a batch size are timed in turns."""
    limit = max(harness.matrix_limit(dtype, device, args.limit_size) for dtype in PEAK)
    for batch in args.batch_size:
        yield from _rows_of_batch(batch, loops_of(device, args), limit, args, device)


def large_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The same for large batches."""
    smaller = {"batch_size": args.large_batch_size, "steps": max(2, args.steps // 8)}
    return step_rows(argparse.Namespace(**vars(args) | smaller), device)


def compiled_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """The same for the loops that have been compiled meanwhile, beside others."""
    if args.compiling is None:
        return
    limit = max(harness.matrix_limit(dtype, device, args.limit_size) for dtype in PEAK)
    names = [name for name in BESIDE if device.type == "cuda" or name not in ON_CARDS]
    ready = args.compiling.answers()
    yield from _rows_of_batch(args.batch_size[0], names, limit, args, device, (args.compiling.workers, ready))


def _rows_of_batch(
    batch: int,
    names: Sequence[str],
    limit: float,
    args: argparse.Namespace,
    device: torch.device,
    more: tuple[Mapping[Any, Worker], Mapping[Any, Row]] = ({}, {}),
) -> Iterator[Row]:
    """`more`: workers that are warm, by network and loop, and what they answered."""
    jobs = [Job(arch, name, batch, args.steps, device.type) for arch in args.arch for name in names]
    workers = {(job.arch, job.loop): Worker(job) for job in jobs}
    try:
        first = warmed_up_workers(workers) | dict(more[1])
        for arch in args.arch:
            own = {loop: worker for (of, loop), worker in {**workers, **more[0]}.items() if of == arch}
            yield from _step_rows(arch, batch, own, {name: first[arch, name] for name in own}, limit, args, device)
    finally:
        for worker in workers.values():
            worker.close()


def _step_rows(
    arch: str,
    batch: int,
    workers: dict[str, Worker],
    first: dict[str, Row],
    limit: float,
    args: argparse.Namespace,
    device: torch.device,
) -> list[Row]:
    times = timed_workers(workers, args.seconds)
    rows: list[Row] = []
    work = operations_per_step(network(arch, device), *batches_of(photos(batch, device), batch)[0])
    for name, worker in workers.items():
        row: Row = {"model": arch, "batch": batch, "loop": name}
        if name in times:
            median = statistics.median(times[name])
            row["images/s"] = round(batch * args.steps / median)
            for base in ("plain", "good engineer"):
                if base in times:
                    row[f"times {base}"] = harness.spread(harness.ratios(times, base, name))
            row |= {"of the limit %": round(100 * work * args.steps / median / limit, 1)}
            row |= {"first s": round(first[name]["first"], 1)}
            row |= worker.asked("profile") if name in PROFILED else {}
        rows.append(row | {"remark": worker.remark or first[name].get("remark", "")})
        rows[-1]["goal"] = _goal(times, name, batch, device) if name in times else ""
    return rows


def timed_workers(workers: Mapping[str, Worker], seconds: float) -> harness.Times:
    """Seconds of passes, worker after worker, in so many turns that the fastest is timed for about so long.

    A worker that dies meanwhile has none.
    """
    once = {name: worker.asked("time") for name, worker in workers.items()}
    alive = [name for name, answer in once.items() if answer]
    fastest = min((once[name]["seconds"] for name in alive), default=1.0)
    times: harness.Times = {name: [] for name in alive}
    for _ in range(max(3, min(200, round(seconds / fastest)))):
        for name in alive:
            if answer := workers[name].asked("time"):
                times[name].append(answer["seconds"])
    turns = max(map(len, times.values()), default=0)
    return {name: values for name, values in times.items() if len(values) == turns}


def _goal(times: harness.Times, name: str, batch: int, device: torch.device) -> str:
    """Say which goals are set for the better of the recorded loops on a card, and whether they are reached."""
    best = min((loop for loop in JUDGED if loop in times), key=lambda loop: statistics.median(times[loop]), default="")
    if device.type != "cuda" or batch != 128 or name != best:
        return ""
    said = []
    for base, goal in GOALS:
        if base in times:
            reached = statistics.median(harness.ratios(times, base, name)) >= goal
            said.append(f">= {goal} {base}: {harness.verdict(reached)}")
    return "; ".join(said)


def _judged(value: float, most: float, holds: bool) -> str:
    """Say whether a number is low enough, where a goal is set for it; `holds`: it is."""
    return f"<= {most}: {harness.verdict(value <= most)}" if holds else ""


def agreement_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Two passes, eager and recorded, with kernels that repeat themselves: all bits of the weights have to agree."""
    rows = []
    choose_kernels(deterministic=True)
    try:
        for arch in args.arch:
            batch = args.batch_size[0]
            data = photos(batch * args.steps + batch // 2, device)
            with kept({step: Ours(arch, data, batch, step) for step in ("eager", "auto")}) as ours:
                losses = {step: [one.train() for _ in range(2)][-1] for step, one in ours.items()}
                digests = {step: digest_of(cloned_state(one.model)) for step, one in ours.items()}
                row = {"model": arch, "batch": batch, "recorded": ours["auto"].recorded}
            row |= {"loss": round(losses["auto"], 4)}
            rows.append(row | {"same bits": "yes" if digests["eager"] == digests["auto"] else "NO"})
    finally:
        choose_kernels(deterministic=False)
    return rows


def penalty_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """A step under RSST's penalty and held masks over one without."""
    rows = []
    for arch in args.arch:
        batch = args.batch_size[0]
        data = photos(batch * args.steps, device)
        structure = random_structure(network(arch, device), 0.5)
        loops = {
            "without": Ours(arch, data, batch, "auto"),
            "with": Ours(arch, data, batch, "auto", structure=structure),
        }
        with kept(loops):
            calls = {name: warmed_up(one, device).call for name, one in loops.items()}
            recorded = loops["with"].recorded
            ratio = harness.ratios(timed_in_turns(calls, args.seconds, device), "with", "without")
        row = {
            "model": arch,
            "batch": batch,
            "recorded": recorded,
            "with / without": harness.spread(ratio, 3),
        }
        rows.append(row | {"goal": _judged(statistics.median(ratio), 1.02, device.type == "cuda")})
    return rows


def compact_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """A step of a network of which half of the units are held at zero: whole, and cut out.

    `MACs` is the share of the structure, `computed` that of the network that trains: with zeros that fill its lanes.
    """
    rows = []
    for arch in args.wide_arch:
        batch, steps = args.large_batch_size[0], max(2, args.steps // 8)
        data, model = photos(batch * steps, device), network(arch, device)
        masks = random_structure(model, 0.5)
        loops = {
            "dense": Ours(arch, data, batch, "auto"),
            "masked": Ours(arch, data, batch, "auto", held=masks),
            "compact": Ours(arch, data, batch, "auto", held=masks, compact=True),
        }
        with kept(loops):
            calls = {name: warmed_up(one, device).call for name, one in loops.items()}
            recorded = loops["compact"].recorded
            times, share = timed_in_turns(calls, args.seconds, device), share_of_macs(model, masks)
            computed = cost_of(loops["compact"].model, {}, SIZE).macs / cost_of(model, {}, SIZE).macs
        row = {"model": arch, "batch": batch, "recorded": recorded, "MACs": round(share, 3)}
        row |= {"computed": round(computed, 3)}
        row |= {
            f"{name} / dense": harness.spread(harness.ratios(times, name, "dense")) for name in ("masked", "compact")
        }
        over = statistics.median(harness.ratios(times, "compact", "dense")) / share
        rows.append(
            row | {"over MACs": round(over, 2), "goal": _judged(over, 1.3, device.type == "cuda" and arch == "res18")}
        )
    return rows


def epoch_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The parts of an epoch as a run makes it: steps with a short last batch, evaluation, and a saved checkpoint."""
    rows, batch = [], args.batch_size[0]
    for arch in args.arch:
        for step in ("eager", "auto") if device.type == "cuda" else ("eager",):
            with kept({"": Ours(arch, photos(batch * args.steps + batch // 2, device), batch, step)}) as loops:
                ours = loops[""]
                warmed_up(ours, device)
                warmed_up(ours.judge, device)
                row = {"model": arch, "batch": batch, "step": step, "recorded": ours.recorded}
                for name, part in {"training": ours.train, "evaluation": ours.judge, "checkpoint": ours.save}.items():
                    seconds = statistics.median(harness.timed(part, device) for _ in range(3))
                    row[f"{name} ms"] = round(1000 * seconds, 1)
            rows.append(row)
    return rows


def sharing_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Several runs at once on one device, each a process: their images per second together, over those of one.

    With `--mps`, those of several a second time, with a daemon of NVIDIA's multi-process service.
    """
    rows: list[Row] = []
    for arch in args.arch:
        rows += _sharing_rows(arch, args.jobs, args, device)
        if args.mps:
            with own_daemon():
                several = [jobs for jobs in args.jobs if jobs > 1]
                rows += _sharing_rows(arch, several, args, device, rows[-len(args.jobs)].get("images/s", 0.0))
    return rows


def _sharing_rows(
    arch: str, numbers: Sequence[int], args: argparse.Namespace, device: torch.device, alone: float = 0.0
) -> list[Row]:
    """`alone`: images per second of one run; 0 to take them from the first number of runs."""
    loop = "ours recorded" if device.type == "cuda" else "ours eager"
    batch, rows = args.batch_size[0], []
    workers = [Worker(Job(arch, loop, batch, args.steps, device.type)) for _ in range(max(numbers, default=0))]
    try:
        for worker in workers:
            worker.tell("warm")
        warm = [worker.answer() for worker in workers]
        for jobs in numbers:
            row: Row = {"model": arch, "batch": batch, "runs": jobs, "MPS": "yes" if daemon_answers() else "no"}
            for worker in workers[:jobs]:
                worker.tell(f"rate {args.seconds}")
            rates = [worker.answer().get("rate", 0.0) for worker in workers[:jobs]]
            if not all(rates):
                rows.append(row | {"remark": next(worker.remark for worker in workers if worker.remark)})
                continue
            alone = alone or sum(rates) / jobs
            goal = f">= 3: {harness.verdict(sum(rates) / alone >= 3)}" if jobs == 8 and device.type == "cuda" else ""
            row |= {"images/s": round(sum(rates)), "times one": round(sum(rates) / alone, 2)}
            rows.append(row | {"remark": warm[0].get("remark", ""), "goal": goal})
    finally:
        for worker in workers:
            worker.close()
    return rows


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[Row]]] = {
    "steps": step_rows,
    "sharing": sharing_rows,
    "penalty": penalty_rows,
    "compact": compact_rows,
    "epoch": epoch_rows,
    "agreement": agreement_rows,
    "compiled": compiled_rows,
    "large": large_rows,
}


def as_table(rows: Sequence[Row]) -> str:
    """Rows with the columns that any of them has, in the order in which they come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return harness.table(names, [[str(row.get(name, "")) for name in names] for row in rows])


def machine(device: torch.device) -> Row:
    """The device, and the software that computes on it."""
    found: Row = {"machine": harness.describe_machine(device), "device": str(device)}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"card": about.name, "memory GiB": round(about.total_memory / 2**30, 1), "MPS": daemon_answers()}
        found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        found |= {"capability": f"{about.major}.{about.minor}", "cards": torch.cuda.device_count()}
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["res20s", "vit_tiny"])
    parser.add_argument("--batch_size", nargs="+", type=int, default=[128])
    parser.add_argument("--wide_arch", nargs="+", choices=MODELS, default=["res18", "vit_small"], help="of compact")
    parser.add_argument(
        "--large_batch_size", nargs="+", type=int, default=[512, 2048], help="of large; of compact the first"
    )
    parser.add_argument("--steps", type=int, default=64, help="training steps of a pass, which is what is timed")
    parser.add_argument("--seconds", type=float, default=5, help="for which the fastest loop is timed")
    parser.add_argument("--jobs", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="runs at once")
    parser.add_argument(
        "--mps", action="store_true", help="try runs at once with MPS, too: starts its daemon meanwhile"
    )
    parser.add_argument("--loops", nargs="+", default=[], help="names of loops (default: all that run here)")
    compiled = "loops whose network torch.compile compiles, beside the other parts: all, the good engineer's (theirs)"
    parser.add_argument("--compiled", choices=("all", "theirs", "none"), default="all", help=f"{compiled}, none")
    parser.add_argument(
        "--compile_limit", type=float, default=270, help="seconds from the start that compiling may take"
    )
    parser.add_argument("--limit_size", type=int, default=4096, help="of the matrices whose product is the limit")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = choose_device(0, args.device)
    choose_kernels(deterministic=False)
    args.device = device.type
    jobs = compiled_jobs(args) if "compiled" in args.parts else []
    args.compiling = Compiling(jobs, args.compile_limit) if jobs else None
    try:
        _all_parts(args, device)
    finally:
        if args.compiling is not None:
            args.compiling.close()


def _write(results: Row, file: Path | None) -> None:
    """After each row: whoever is short of time has what was measured."""
    if file is not None:
        file.write_text(json.dumps(results, indent=1))


def _all_parts(args: argparse.Namespace, device: torch.device) -> None:
    about = machine(device)
    print(about["machine"])
    results: dict[str, list[Row]] = {}
    failed: list[str] = []
    for part in args.parts:
        results[part] = []
        try:
            for row in PARTS[part](args, device):
                results[part].append(row)
                _write({**about, "parts": results}, args.json)
        except Exception as error:  # of whatever kind: the other parts are of use without it
            failed.append(part)
            results[part].append({"remark": f"{type(error).__name__}: {first_line(error)}"[:160]})
        print(f"\n{part}\n\n{as_table(results[part])}", flush=True)
        _write({**about, "parts": results}, args.json)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
