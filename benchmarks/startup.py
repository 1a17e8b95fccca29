"""How long the program takes to say what it can do: `--help` and a misspelt flag, against importing torch alone."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import harness

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.4


def command(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    cpu = torch.device("cpu")
    print(harness.describe_machine(cpu))
    actions = {
        "--help": lambda: command("main_imp_fillback.py", "--help"),
        "--criterai l1": lambda: command("main_imp_fillback.py", "--criterai", "l1"),
        "import torch": lambda: command("-c", "import torch"),
    }
    times = harness.alternate(actions, args.rounds, cpu, 1)
    goal = harness.verdict(statistics.median(times["--help"]) <= GOAL)
    rows = [[name, harness.spread(s), f"<= {GOAL} s: {goal}" if name == "--help" else ""] for name, s in times.items()]
    print(harness.table(["command", "seconds", "goal"], rows))


if __name__ == "__main__":
    main()
