"""Batch scripts for Slurm: an array for each stage of a sweep, and a script that submits them in order."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from structured_tickets.base.atomic_files import write_atomically
from structured_tickets.base.commands import python_words
from structured_tickets.sweeps.grid import Job

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=1-{count}{at_once}
#SBATCH --cpus-per-task={cores}
#SBATCH --output={output}
{options}# {lines}. Submitting it again continues {runs}.
set -euo pipefail
export OMP_NUM_THREADS={threads} MKL_NUM_THREADS={threads}
cd {cwd}
{start}
"""
ONE = """command=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {jobs})
eval "exec $command\""""
SEVERAL = """last=$((SLURM_ARRAY_TASK_ID * {together}))
status=0 running=()
trap 'kill -TERM "${{running[@]}}" 2>/dev/null' INT TERM # they save their state
while IFS= read -r command; do
    eval "exec $command" &
    running+=("$!")
done < <(sed -n "$((last - {together} + 1)),${{last}}p" {jobs})
for run in "${{running[@]}}"; do wait "$run" || status=$?; done
wait # for those that were told to end
exit "$status\""""


def stages_of(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs in stages: each needs only jobs of stages before it."""
    stage: dict[str, int] = {}
    for job in jobs:  # in an order in which they can be carried out
        stage[job.name] = max((stage[name] + 1 for name in job.after if name in stage), default=0)
    return [[j for j in jobs if stage[j.name] == k] for k in range(max(stage.values(), default=-1) + 1)]


def write_scripts(
    jobs: Sequence[Job],
    out: Path,
    name: str,
    threads: int,
    at_once: int | None,
    options: Sequence[str],
    together: int = 1,
) -> Path:
    """Write `stage_<k>.sbatch`, their lists of commands and `submit.sh` to `out/slurm`; returns the last.

    Args:
        at_once: Tasks of an array that may run at the same time; None leaves it to Slurm.
        options: Further options of sbatch.
        together: Runs that a task starts at once, on one GPU.
    """
    folder, program = out / "slurm", [sys.executable, *python_words("run", from_any_folder=True)]
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    folder.mkdir(parents=True, exist_ok=True)
    lines, waits = ["#!/usr/bin/env bash", "set -euo pipefail"], ""
    for k, stage in enumerate(stages_of(jobs)):
        script = folder / f"stage_{k}.sbatch"
        lines_of_stage = "".join(f"{shlex.join([*program, *job.words])}\n" for job in stage)
        # Tasks that are still queued read their line when they begin: another sweep here must have another list.
        commands = folder / f"stage_{k}.{hashlib.sha256(lines_of_stage.encode()).hexdigest()[:8]}.jobs"
        write_atomically(lines_of_stage, commands)
        tasks = -(-len(stage) // together)
        text = SCRIPT.format(
            name=f"{plain}_{k}",
            count=tasks,
            cores=threads * together,
            lines="Line number SLURM_ARRAY_TASK_ID of the list is this task's job"
            if together == 1
            else f"Each {together} lines of the list are a task's jobs",
            runs="its run" if together == 1 else "its runs",
            start=(ONE if together == 1 else SEVERAL).format(jobs=shlex.quote(str(commands)), together=together),
            at_once=f"%{at_once}" if at_once else "",
            threads=threads,
            options="".join(f"#SBATCH {shlex.quote(o)}\n" for o in options),
            cwd=shlex.quote(str(Path.cwd())),
            output=shlex.quote(str(out / "logs" / "%x-%A_%a.log")),
        )
        write_atomically(text, script)
        # "any": a job whose round 0 or ticket failed says so by itself, and must not hold up the others.
        lines.append(f"id_{k}=$(sbatch --parsable {waits}{shlex.quote(str(script))})")
        lines.append(f'echo "stage {k}: {tasks} tasks, job ${{id_{k}%%;*}}"')
        waits = f'--dependency=afterany:"${{id_{k}%%;*}}" '
    (out / "logs").mkdir(exist_ok=True)
    write_atomically("\n".join(lines) + "\n", folder / "submit.sh")
    return folder / "submit.sh"
