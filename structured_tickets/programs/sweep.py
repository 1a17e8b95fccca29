"""Many runs: a grid of settings over seeds, run side by side. Run the same command again to continue."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from structured_tickets.base.atomic_files import lock, write_atomically
from structured_tickets.base.commands import name_in_help, python_words, typed
from structured_tickets.base.console import exit_status, log_to_file, start_logging, started_by_torchrun
from structured_tickets.base.errors import RunError, StorageError, UsageError
from structured_tickets.base.secrets_in_text import refuse_secrets
from structured_tickets.base.text_tables import counted, text_table
from structured_tickets.settings.argument_types import (
    NONNEGATIVE,
    PARALLEL,
    POSITIVE,
    OneLineParser,
    count,
    path,
    truth,
)
from structured_tickets.settings.words import words_of
from structured_tickets.sweeps.executors import check_executor
from structured_tickets.sweeps.file import read_file
from structured_tickets.sweeps.grid import MOST_RUNS, Job, Plan, Spec, grouped, plan
from structured_tickets.sweeps.job_process import Outcome
from structured_tickets.sweeps.live_view import title_of
from structured_tickets.sweeps.schedule import AUTO, carry_out
from structured_tickets.sweeps.slurm import write_scripts

if TYPE_CHECKING:
    from structured_tickets.sweeps.search import Ready

log = logging.getLogger("rsst")

EXAMPLES = """examples:
  {sweep} --grid struct=rsst,refill criteria=magnitude,l1 rate=0.2,0.4 seed=0,1,2 \\
      --dataset digits --arch vit_tiny --vit_structured --vit_prune_target both --epochs 25 --pruning_times 3
  {sweep} --file sweep.yaml --executor ray --address auto
  {report} sweep_output_1a2b3c4d

A file holds `flags:` (flag: value), `grid:` (flag: [values], or a list of such grids) and `list:` (runs by themselves).
Run the same command again to continue: finished runs are kept, interrupted ones continue."""


def build_parser() -> argparse.ArgumentParser:
    """The sweep's own flags; all others are the runner's."""
    parser = OneLineParser(
        prog=name_in_help("sweep"),
        description=__doc__,
        allow_abbrev=False,
        epilog=EXAMPLES.format(sweep=typed("sweep"), report=typed("report")),
        usage=f"%(prog)s (--grid FLAG=VALUES ... | --file FILE) [options] [flags of {name_in_help('run')}]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add in (_add_what, _add_where, _add_search):
        add(parser)
    parser.add_argument("--quiet", action="store_true", help="only warnings and the final tables")
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--grid",
        nargs="+",
        default=[],
        metavar="FLAG=VALUES",
        action="extend",
        help="FLAG=VALUE,VALUE: every combination of values is a run. If a value contains commas, separate the values "
        "by semicolons: vit_prune_target='head;head,mlp'",
    )
    what.add_argument("--file", type=path, help="YAML with flags, grid and list")
    what.add_argument("--out", type=path, metavar="DIR", help="folder of the sweep (default: named after the grid)")
    what.add_argument(
        "--share_round_0",
        type=truth,
        default=True,
        metavar="BOOL",
        help="train each dense round once, for all runs that begin with it (default: true)",
    )
    what.add_argument("--dry_run", action="store_true", help="list the runs, and start none")


def _add_where(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where to run it")
    where.add_argument(
        "--executor",
        choices=("local", "ray", "slurm"),
        default="local",
        help="local: processes on this machine (default); ray: a Ray cluster; slurm: write batch scripts for Slurm",
    )
    where.add_argument(
        "--jobs",
        type=count(1, PARALLEL),
        metavar="N",
        help="runs at a time (local: one for each GPU, else for each core; slurm: all)",
    )
    where.add_argument(
        "--jobs_per_gpu",
        type=runs_on_a_gpu,
        metavar="N",
        help="runs at a time on each GPU (ray, slurm: too); auto: local, one more as long as all together get faster",
    )
    where.add_argument(
        "--mps",
        action="store_true",
        help="local: start NVIDIA's MPS for the sweep, by which runs on one GPU compute at once, not in turns",
    )
    where.add_argument(
        "--threads",
        type=count(1, PARALLEL),
        default=1,
        metavar="N",
        help="CPU threads per run (default: 1). Results can differ in the last digits between thread counts",
    )
    where.add_argument(
        "--retries",
        type=count(0),
        default=2,
        metavar="N",
        help="how many times a killed run is restarted (default: 2)",
    )
    where.add_argument(
        "--address", default="auto", help="ray: address of the cluster (default: auto, the cluster on this machine)"
    )
    where.add_argument("--gpus_per_run", type=NONNEGATIVE, metavar="N", help="ray: GPUs per run (default: 0)")
    where.add_argument("--slurm_options", default="", metavar="WORDS", help="slurm: e.g. '--partition=gpu --time=60'")


def _add_search(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("search")
    search.add_argument(
        "--search",
        action="store_true",
        help="search instead of running the whole grid (successive halving with Optuna): all settings start with few "
        "epochs, the best third continues with three times as many",
    )
    search.add_argument(
        "--density",
        type=POSITIVE,
        metavar="PERCENT",
        help="search: largest share of the prunable weights that a round may keep",
    )
    search.add_argument(
        "--macs", type=POSITIVE, metavar="MILLIONS", help="search: largest number of MACs per image, in millions"
    )
    search.add_argument("--rungs", type=count(1), default=3, help="search: number of epoch budgets (default: 3)")


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, Spec]:
    """The sweep's own arguments, and what is to be run.

    Raises:
        UsageError: One line that names the flag.
        DataError: The file cannot be read.
    """
    args, flags = build_parser().parse_known_args(_normalised(argv))
    from_file = read_file(args.file) if args.file else {}
    grids = from_file.get("grid") or []
    grids = [*(grids if isinstance(grids, list) else [grids]), *([_grid_of(args.grid)] if args.grid else [])]
    spec = Spec((*words_of(from_file.get("flags") or {}), *flags), tuple(grids), tuple(from_file.get("list") or ()))
    if not spec.count:
        raise UsageError("argument --grid: nothing to run. Give --grid FLAG=VALUES ... or --file FILE")
    if spec.count > MOST_RUNS:
        raise UsageError(f"argument --grid: more than {MOST_RUNS:,} combinations. Use a smaller grid")
    refuse_secrets([*spec.flags, *(word for settings in spec.combinations() for word in words_of(settings))])
    _check_sharing(args)
    if not args.search and (args.density or args.macs):
        raise UsageError("argument --density, --macs: only used with --search")
    if args.search and args.executor == "slurm":
        raise UsageError("argument --search: cannot be combined with --executor slurm, which only writes scripts")
    if args.search and not (args.density or args.macs):
        raise UsageError("argument --search: needs a budget: --density PERCENT or --macs MILLIONS")
    try:
        args.slurm_options = shlex.split(args.slurm_options)
    except ValueError as error:
        raise UsageError(f"argument --slurm_options: {error}") from error
    args.out = args.out or Path(f"sweep_output_{spec.digest()}")
    args.out = args.out.resolve()
    return args, spec


def runs_on_a_gpu(text: str) -> int | str:
    """`auto`, or a number of runs."""
    return AUTO if text == AUTO else count(1, PARALLEL)(text)


def _check_sharing(args: argparse.Namespace) -> None:
    """Raises: UsageError."""
    if args.jobs_per_gpu and args.jobs and args.executor == "local":
        raise UsageError("argument --jobs_per_gpu: cannot be combined with --jobs. Use one of the two")
    if args.jobs_per_gpu and args.gpus_per_run is not None:
        raise UsageError("argument --jobs_per_gpu: cannot be combined with --gpus_per_run. Use one of the two")
    if args.jobs_per_gpu == AUTO and args.executor != "local":
        raise UsageError(f"argument --jobs_per_gpu: {AUTO} needs --executor local. Give a number")
    if args.mps and args.executor != "local":
        raise UsageError("argument --mps: only used with --executor local")


def _normalised(argv: Sequence[str]) -> list[str]:
    """Flags with `_` for `-`; options for sbatch, which look like flags, as one word with their own."""
    words: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if words and words[-1] == "--slurm_options":
            words[-1] += f"={word}"
        elif word.startswith("--"):
            words.append(f"--{name[2:].replace('-', '_')}{equals}{value}")
        else:
            words.append(word)
    return words


def _grid_of(words: Sequence[str]) -> dict[str, list[str]]:
    grid = {}
    for word in words:
        key, equals, values = word.partition("=")
        parts = [v.strip() for v in values.split(";" if ";" in values else ",") if v.strip()]
        if not equals or not parts:
            raise UsageError(f"argument --grid: {word!r} is not FLAG=VALUE,VALUE,...")
        if key in grid:
            raise UsageError(f"argument --grid: {key} is given twice")
        grid[key.removeprefix("--").replace("-", "_")] = list(dict.fromkeys(parts))
    return grid


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; returns its exit status: that of the runner (see `errors`), 1 if a run has failed."""
    return exit_status(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


class SweepFailed(RunError):
    """Some of the runs have failed; the others are finished."""


def _run(words: list[str]) -> str:
    refuse_secrets(words)
    if started_by_torchrun():
        raise UsageError(f"{name_in_help('sweep')} is not started by torchrun: it starts processes of its own")
    args, spec = parse_args(words)
    start_logging(args.quiet, verbose=False)
    if args.search:
        check_executor(args)
        return _search(args, spec, words)
    wanted = plan(spec, args.out, args.share_round_0)
    if args.dry_run:
        return describe(wanted)
    check_executor(args)
    jobs = [grouped(job, args.out.name) for job in wanted.jobs]
    with locked(args.out):
        log_to_file(args.out / "sweep.log")
        for note in [*wanted.notes, *runs_of_other_sweeps(args.out, jobs)]:
            log.info("%s", note)
        write_record(args.out, words, spec, jobs)
        if args.executor == "slurm":
            script = write_scripts(
                jobs, args.out, args.out.name, args.threads, args.jobs, args.slurm_options, args.jobs_per_gpu or 1
            )
            return f"bash {shlex.quote(str(script))}"
        outcomes = carry_out(jobs, args)
        return conclude(jobs, outcomes, args.out)


def _search(args: argparse.Namespace, spec: Spec, words: Sequence[str]) -> str:
    from structured_tickets.sweeps.search import prepared, search

    ready = prepared(args, spec)
    if args.dry_run:
        return describe_search(ready)
    with locked(args.out):
        log_to_file(args.out / "sweep.log")
        found = search(args, ready)
        write_record(args.out, words, spec, found.jobs, {"density": args.density, "macs": args.macs})
        text = [found.table, *([f"report: {typed('report')} {_shorter(args.out)}"] if found.jobs else [])]
        if found.failed:
            said = f"{counted(found.failed, 'setting')} failed. See the logs in {args.out / 'logs'}"
            raise SweepFailed(said, output="\n\n".join(text))
        return "\n\n".join(text)


def describe_search(ready: Ready) -> str:
    """Return the text of `--search --dry_run`: the settings, and the epochs that the search may give them."""
    table = text_table(["setting"], [[" ".join(f"{k}={v}" for k, v in s.items())] for s in ready.settings])
    epochs = ", ".join(map(str, ready.budgets))
    settings, runs = counted(len(ready.settings), "setting"), counted(ready.seeds, "run")
    return f"{table}\n{settings}, {runs} each; epochs per round: {epochs}"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The sweep's folder, made, and kept for this process.

    Raises:
        StorageError: The folder cannot be made.
        UsageError: A sweep is running there.
    """
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {out}: {error.strerror}") from error
    with lock(out / "lock") or nullcontext() as file:
        if file is None:
            raise UsageError(f"argument --out: another sweep is running in {out}")
        yield


def runs_of_other_sweeps(out: Path, jobs: Sequence[Job]) -> list[str]:
    """A sentence if the folder holds runs that are not in this sweep."""
    others = {p.parent.name for p in out.glob("runs/*/args.yaml")} - {job.name for job in jobs}
    runs = counted(len(others), "run")
    return [f"{out} holds {runs} of other sweeps. Reports leave them out"] if others else []


def write_record(
    out: Path, words: Sequence[str], spec: Spec, jobs: Sequence[Job], limits: Mapping[str, float | None] | None = None
) -> None:
    """`sweep.json`: the command, every job, and the limits of a search, for reports."""
    (out / "outcomes.json").unlink(missing_ok=True)  # those of an older record
    record = {
        "command": [*python_words("sweep"), *words],
        "axes": list(dict.fromkeys([*spec.axes, *(key for job in jobs for key in job.settings)])),
        "jobs": [{**vars(j), "folder": str(j.folder.relative_to(out))} for j in jobs],
        "limits": limits,
    }
    write_atomically(json.dumps(record, indent=1) + "\n", out / "sweep.json")


def describe(wanted: Plan) -> str:
    """Return the text of `--dry_run`: the plan as a table."""
    rows = [["dense" if j.dense else "run", title_of(j), str(j.all_epochs), j.name] for j in wanted.jobs]
    runs = sum(not j.dense for j in wanted.jobs)
    sums = f"{counted(runs, 'run')}, {counted(len(wanted.jobs) - runs, 'dense round')} that they share"
    return "\n".join([text_table(["kind", "settings", "epochs", "folder"], rows), *wanted.notes, sums])


def conclude(jobs: Sequence[Job], outcomes: Mapping[str, Outcome], out: Path) -> str:
    """The tables at the end.

    Raises:
        SweepFailed: A run has failed; the tables are its output.
    """
    summarise: Callable[[Path], str] = importlib.import_module(
        "structured_tickets.reports.sweep_tables"
    ).printed_summary
    ends = {name: {"status": o.status, "reason": o.reason} for name, o in outcomes.items()}
    write_atomically(json.dumps(ends, indent=1) + "\n", out / "outcomes.json")
    text = [summarise(out)]
    if offline := sorted(out.glob("runs/*/wandb/offline-run-*")):
        text.append(
            f"offline: {counted(len(offline), 'WandB run')}. To upload: "
            f"wandb sync {_shorter(out)}/runs/*/wandb/offline-run-*"
        )
    if any(o.fine for job in jobs if not job.dense for o in [outcomes[job.name]]):
        text.append(f"report: {typed('report')} {_shorter(out)}")
    failed = [(job, outcomes[job.name]) for job in jobs if not outcomes[job.name].fine]
    if failed:
        rows = [[title_of(job), "-" if o.status is None else str(o.status), o.reason] for job, o in failed]
        table = text_table(["failed", "status", "why"], rows)
        said = f"{len(failed)} of {counted(len(jobs), 'job')} failed. See the logs in {out / 'logs'}"
        raise SweepFailed(said, output="\n\n".join([*text, table]))
    return "\n\n".join(text)


def _shorter(path: Path) -> str:
    near = os.path.relpath(path)
    return shlex.quote(near if len(near) < len(str(path)) else str(path))
