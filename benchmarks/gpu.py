"""Training steps on a card: an ordinary loop, a good engineer's, and the runner's own, eager and recorded."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.compact import random_structure, share_of_macs
from benchmarks.gpu_loops import Ours, batches_of, good_engineer, network, photos, plain_loop
from benchmarks.step import operations_per_step
from structured_tickets.base.errors import first_line
from structured_tickets.base.weights import cloned_state, digest_of
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.networks import MODELS
from structured_tickets.runs.setup import choose_device, choose_kernels
from structured_tickets.sweeps.mps import daemon_answers, own_daemon

Row = dict[str, Any]

PEAK = (torch.bfloat16, torch.float32)  # types of matrix products, the faster of which is the limit of a device
GOALS = (  # loop, base, how many times as fast; at batch 128
    ("ours recorded", "plain", 4.0),
    ("ours recorded", "good engineer", 1.2),
)
STARTS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


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


def loops_of(arch: str, data: ImageSet, batch: int, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Name of a loop -> what makes it: a call, or an `Ours`."""
    on_card: dict[str, Callable[[], Any]] = {
        "plain, data on the card": lambda: plain_loop(arch, data, batch, on_card=True),
        "ours recorded, fp32": lambda: Ours(arch, data, batch, "auto", "fp32"),
        "ours recorded": lambda: Ours(arch, data, batch, "auto"),
    }
    theirs: dict[str, Callable[[], Any]] = {"good engineer": lambda: good_engineer(arch, data, batch, compiled=True)}
    own: dict[str, Callable[[], Any]] = {"ours compiled": lambda: Ours(arch, data, batch, "auto", compiled=True)}
    found: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_loop(arch, data, batch, on_card=False),
        "good engineer, not compiled": lambda: good_engineer(arch, data, batch, compiled=False),
        "ours eager, fp32": lambda: Ours(arch, data, batch, "eager", "fp32"),
        "ours eager": lambda: Ours(arch, data, batch, "eager"),
    }
    if data.labels.device.type == "cuda":
        found |= on_card
    found |= {"none": {}, "theirs": theirs, "all": theirs | own}[args.compiled]
    return {name: make for name, make in found.items() if not args.loops or name in args.loops}


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


def launches_and_idle(call: Callable[[], object], steps: int, device: torch.device) -> Row:
    """Starts of work in a step, and the share of the time in which the card does nothing, as torch's profiler sees it.

    A replayed graph is one start, whatever is in it. The profiler slows the host, so that the idle share is an upper
    limit for loops that the host holds up.
    """
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        seconds = harness.timed(call, device)
    events = found.key_averages()
    launches = sum(e.count for e in events if e.key.startswith(STARTS))
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time_total for e in kernels) / 1e6
    return {"launches a step": round(launches / steps), "idle %": round(100 * max(0.0, 1 - busy / seconds), 1)}


def step_rows(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """A row for each loop; those of a network and a batch size are timed in turns on the same images."""
    limit, rows = max(harness.matrix_limit(dtype, device, args.limit_size) for dtype in PEAK), []
    for arch in args.arch:
        for batch in args.batch_size:
            rows += _step_rows(arch, batch, limit, args, device)
    return rows


def _step_rows(arch: str, batch: int, limit: float, args: argparse.Namespace, device: torch.device) -> list[Row]:
    data, rows = photos(batch * args.steps, device), []
    work = operations_per_step(network(arch, device), *batches_of(data, batch)[0])
    own: dict[str, Any] = {}
    loops: dict[str, Loop] = {}
    with kept(own):
        for name, make in loops_of(arch, data, batch, args).items():
            try:
                own[name] = make()
                loops[name] = warmed_up(own[name], device)
            except (RuntimeError, ImportError) as error:  # memory, or no compiler
                rows.append({"model": arch, "batch": batch, "loop": name, "remark": first_line(error)[:100]})
        times = timed_in_turns({name: loop.call for name, loop in loops.items()}, args.seconds, device)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            row: Row = {"model": arch, "batch": batch, "loop": name, "images/s": round(len(data) / median)}
            for base in ("plain", "good engineer"):
                if base in times:
                    row[f"times {base}"] = harness.spread(harness.ratios(times, base, name))
            row |= {"of the limit %": round(100 * work * args.steps / median / limit, 1)}
            row |= launches_and_idle(loops[name].call, args.steps, device)
            row |= {"first s": round(loops[name].first, 1), "remark": loops[name].remark}
            rows.append(row | {"goal": _goal(times, name, batch, device)})
    return rows


def _goal(times: harness.Times, name: str, batch: int, device: torch.device) -> str:
    """Say which goals are set for a loop on a card, and whether they are reached."""
    if device.type != "cuda" or batch != 128:
        return ""
    said = []
    for loop, base, goal in GOALS:
        if loop == name and base in times:
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
    """A step of a network of which half of the units are held at zero: whole, and cut out."""
    rows = []
    for arch in args.arch:
        batch = args.batch_size[-1]
        data, model = photos(batch * args.steps, device), network(arch, device)
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
        row = {"model": arch, "batch": batch, "recorded": recorded, "MACs": round(share, 3)}
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
                alone = rows[-len(args.jobs)].get("images/s", 0.0)
                rows += _sharing_rows(arch, [jobs for jobs in args.jobs if jobs > 1], args, device, alone)
    return rows


def _sharing_rows(
    arch: str, numbers: Sequence[int], args: argparse.Namespace, device: torch.device, alone: float = 0.0
) -> list[Row]:
    """`alone`: images per second of one run; 0 to take them from the first number of runs."""
    rows: list[Row] = []
    for jobs in numbers:
        rates = _together(arch, jobs, args, device)
        if not rates:
            rows.append({"model": arch, "runs": jobs, "remark": "a process has failed"})
            continue
        alone = alone or sum(rates) / jobs
        row = {"model": arch, "batch": args.batch_size[0], "runs": jobs, "images/s": round(sum(rates))}
        row |= {"times one": round(sum(rates) / alone, 2), "MPS": "yes" if daemon_answers() else "no"}
        goal = f">= 3: {harness.verdict(sum(rates) / alone >= 3)}" if jobs == 8 and device.type == "cuda" else ""
        rows.append(row | {"goal": goal})
    return rows


def _together(arch: str, jobs: int, args: argparse.Namespace, device: torch.device) -> list[float]:
    """Images per second of each process, all of them warm before the first is timed; empty if one has failed."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--parts", "one", "--arch", arch, "--device", device.type]
    words += ["--batch_size", str(args.batch_size[0]), "--steps", str(args.steps), "--seconds", str(args.seconds)]
    running = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(jobs)]
    ready = [(p.stdout.readline() if p.stdout else "").strip() == "ready" for p in running]
    rates = []
    for process in running:
        if all(ready) and process.stdin:
            process.stdin.write("go\n")
            process.stdin.flush()
    for process in running:
        if not all(ready):
            process.kill()
        out, _ = process.communicate()
        rates += [float(out.split()[-1])] if process.returncode == 0 and out.split() else []
    return rates if len(rates) == jobs else []


def one_of_several(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Say "ready" when warm, wait for a line, then train for some seconds and print the images per second."""
    data = photos(args.batch_size[0] * args.steps, device)
    call, passes = warmed_up(Ours(args.arch[0], data, args.batch_size[0], "auto"), device).call, 0
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    while time.perf_counter() - began < args.seconds:
        harness.timed(call, device)
        passes += 1
    print(passes * len(data) / (time.perf_counter() - began), flush=True)
    return []


PARTS: dict[str, Callable[[argparse.Namespace, torch.device], list[Row]]] = {
    "steps": step_rows,
    "agreement": agreement_rows,
    "penalty": penalty_rows,
    "compact": compact_rows,
    "epoch": epoch_rows,
    "sharing": sharing_rows,
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
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "one"], default=list(PARTS))
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["res20s", "vit_tiny"])
    parser.add_argument("--batch_size", nargs="+", type=int, default=[128])
    parser.add_argument("--steps", type=int, default=64, help="training steps of a pass, which is what is timed")
    parser.add_argument("--seconds", type=float, default=5, help="for which the fastest loop is timed")
    parser.add_argument("--jobs", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="runs at once")
    parser.add_argument(
        "--mps", action="store_true", help="try runs at once with MPS, too: starts its daemon meanwhile"
    )
    parser.add_argument("--loops", nargs="+", default=[], help="names of loops (default: all that run here)")
    compiled = "loops whose network torch.compile compiles, half a minute each: all, the good engineer's (theirs), none"
    parser.add_argument("--compiled", choices=("all", "theirs", "none"), default="all", help=compiled)
    parser.add_argument("--limit_size", type=int, default=4096, help="of the matrices whose product is the limit")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = choose_device(0, args.device)
    choose_kernels(deterministic=False)
    if args.parts == ["one"]:
        one_of_several(args, device)
        return
    about = machine(device)
    print(about["machine"])
    results: dict[str, list[Row]] = {}
    for part in args.parts:
        results[part] = PARTS[part](args, device)
        print(f"\n{part}\n\n{as_table(results[part])}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({**about, "parts": results}, indent=1))


if __name__ == "__main__":
    main()
