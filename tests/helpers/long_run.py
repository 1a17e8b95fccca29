"""Started by test_long_runs: the program, noting after every round what it holds.

Arguments: a file for the notes (JSON lines: memory, descriptors, threads, bytes on disk), then the program's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import experiment
import main_imp_fillback
from reporter import Reporter

torch.set_num_threads(1)
experiment.draw_kept_units = lambda *_: None
notes, tell = Path(sys.argv[1]), Reporter.round


def noting(self: Reporter, row: dict, rounds: list) -> None:
    tell(self, row, rounds)
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    held = [len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task")]  # noqa: PTH208
    disk = sum(p.stat().st_size for p in self.folder.glob("*.tar"))
    with notes.open("a") as file:
        file.write(json.dumps([memory, *held, disk]) + "\n")


Reporter.round = noting  # type: ignore[method-assign]
sys.exit(main_imp_fillback.main(sys.argv[2:]))
