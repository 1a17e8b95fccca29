"""How long the program takes to say what it can do, or has to do, and what it imports for that.

python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import harness

ROOT = Path(__file__).resolve().parent.parent
MAIN = "main_imp_fillback.py"
RUN = shlex.split(
    "--dataset digits --image_size 8 --arch vit_tiny --struct rsst --vit_structured --vit_prune_target both "
    "--rate 0.3 --rate_mode round --criteria magnitude --pruning_times 1 --epochs 1 --batch_size 64 --optimizer adamw "
    "--warmup 0 --lr_schedule cosine --wandb disabled"
)
GOALS = {"--help": 0.4, "a finished run again": 1.0, "--resume on nothing": 1.0, "another --lr": 1.0, "--dry_run": 8.0}
IMPORTS = (
    "structured_tickets.settings.flags",
    "torch",
    "torchvision",
    "timm",
    "sklearn.datasets",
    "scipy.stats",
    "matplotlib.figure",
    "wandb",
    "transformers",
    "ray",
)


def command(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)


def actions(home: Path) -> dict[str, Callable[[], object]]:
    """What is timed; a run has finished in `home`."""
    folder = ["--save_dir", str(home)]
    return {
        "--help": lambda: command(MAIN, "--help"),
        "--criterai l1": lambda: command(MAIN, "--criterai", "l1"),
        "a finished run again": lambda: command(MAIN, *RUN, *folder),
        "--resume on nothing": lambda: command(MAIN, *RUN, "--save_dir", str(home / "none"), "--resume"),
        "another --lr": lambda: command(MAIN, *RUN, *folder, "--lr", "0.5"),
        "--dry_run": lambda: command(MAIN, *RUN, "--pruning_times", "3", "--dry_run"),
        "import torch": lambda: command("-c", "import torch"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    cpu = torch.device("cpu")
    print(harness.describe_machine(cpu))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "run"
        command(MAIN, *RUN, "--save_dir", str(home))
        times = harness.alternate(actions(home), args.rounds, cpu, 1)
    rows = []
    for name, seconds in times.items():
        reached = harness.verdict(statistics.median(seconds) <= GOALS[name]) if name in GOALS else ""
        rows.append([name, harness.spread(seconds), f"<= {GOALS[name]} s: {reached}" if reached else ""])
    print(harness.table(["command", "seconds", "goal"], rows))
    installed = [name for name in IMPORTS if find_spec(name.split(".")[0])]
    imports = {name: lambda name=name: command("-c", f"import {name}") for name in installed}
    times = harness.alternate({"python": lambda: command("-c", ""), **imports}, args.rounds, cpu, 1)
    print(harness.table(["import", "seconds"], [[name, harness.spread(seconds)] for name, seconds in times.items()]))


if __name__ == "__main__":
    main()
