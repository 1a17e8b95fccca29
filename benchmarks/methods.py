"""Every network with every method, for real, on a small budget: the tables of docs/methods.md.

    python -m benchmarks.methods --data PHOTOS --out RUNS

PHOTOS is an image folder (`train/<class>/*`, `test/<class>/*`), of which each run takes the first few images of a
class. What has been run is kept in RUNS, and not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from structured_tickets.pruning.methods import METHODS
from structured_tickets.networks import MODELS

MAIN = Path(__file__).resolve().parent.parent / "main_imp_fillback.py"


@dataclass(frozen=True)
class Budget:
    """How much a network is trained.

    Attributes:
        images: Training images of each class; half as many test images, at most 50.
        epochs: Of each of the two rounds.
        batch: Images in a batch.
    """

    images: int
    epochs: int
    batch: int

    def __str__(self) -> str:
        return f"{self.images}, {self.epochs}"


SMALL, MEDIUM, LARGE = Budget(200, 8, 64), Budget(60, 5, 32), Budget(30, 3, 30)
BUDGETS = {
    "res18": MEDIUM,
    "resnet12": MEDIUM,
    "vgg16_bn": MEDIUM,
    "vit_small_imagenet": MEDIUM,
    "vit_base_imagenet": MEDIUM,
    "res50": LARGE,
    "densenet161": LARGE,
    "vit_small": LARGE,
    "vit_base": LARGE,
    "vit_large_imagenet": LARGE,
}
COMMON = "--dataset imagefolder --pruning_times 2 --warmup 1 --decreasing_lr , --wandb disabled --quiet"
FAMILIES = {
    "cnn": "--optimizer sgd --lr 0.05 --rate 0.4 --penalty decoupled",
    "vit": "--optimizer adamw --lr 5e-4 --weight_decay 0.05 --rate 0.3 --rate_mode round --vit_prune_target both",
}
COMPARED = ("res20s", "vit_tiny")
PRUNERS = tuple(name for name, method in METHODS.items() if not method.regroups)

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One command.

    Attributes:
        regroup: Whether a pruner's mask becomes whole units.
    """

    arch: str
    struct: str
    regroup: bool = False

    @property
    def name(self) -> str:
        return "_".join([self.arch, self.struct, *(["regroup"] if self.regroup else [])])

    @property
    def budget(self) -> Budget:
        return BUDGETS.get(self.arch, SMALL)

    def words(self, photos: Path, folder: Path) -> list[str]:
        """Its command line."""
        family, units = MODELS[self.arch].spec.family, METHODS[self.struct].regroups or self.regroup
        flags = [
            "--arch",
            self.arch,
            "--struct",
            self.struct,
            *COMMON.split(),
            *FAMILIES[family].split(),
            "--epochs",
            str(self.budget.epochs),
            "--batch_size",
            str(self.budget.batch),
            "--data",
            str(photos),
            "--save_dir",
            str(folder),
        ]
        flags += ["--criteria", "magnitude"] if METHODS[self.struct].regroups else ["--regroup"] if units else []
        flags += ["--vit_structured"] if family == "vit" and METHODS[self.struct].regroups else []
        return flags + (["--admm_epochs", str(self.budget.epochs)] if self.struct == "admm" else [])


def runs(archs: Sequence[str]) -> Iterator[Run]:
    """Small networks first, so that a table is there early."""
    ordered = sorted(archs, key=lambda arch: (-BUDGETS.get(arch, SMALL).images, list(MODELS).index(arch)))
    for arch in ordered:
        yield from (Run(arch, struct) for struct in ("refill", "rsst"))
    for arch in (a for a in COMPARED if a in archs):
        yield from (Run(arch, struct, regroup) for regroup in (False, True) for struct in PRUNERS)


def few_images(data: Path, out: Path, budget: Budget) -> Path:
    """An image folder with the first images of each class."""
    photos = out / f"photos_{budget.images}"
    if not photos.is_dir():
        making = photos.with_suffix(".tmp")
        shutil.rmtree(making, ignore_errors=True)
        for part, count in (("train", budget.images), ("test", min(50, budget.images // 2))):
            for folder in sorted(p for p in (data / part).iterdir() if p.is_dir()):
                (making / part / folder.name).mkdir(parents=True)
                for file in sorted(folder.iterdir())[:count]:
                    shutil.copy(file, making / part / folder.name)
        making.rename(photos)
    return photos


def outcome(run: Run, data: Path, out: Path) -> list[Row] | None:
    """The rows of a run's two rounds, run now if they are not there; None if it failed."""
    kept = out / f"{run.name}.json"
    if not kept.is_file():
        folder, began = out / run.name, time.perf_counter()
        command = [sys.executable, str(MAIN), *run.words(few_images(data, out, run.budget), folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        minutes = (time.perf_counter() - began) / 60
        if done.returncode:
            print(
                f"{run.name}: exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr
            )
            return None
        with (folder / "summary.csv").open() as file:
            rows = [{**row, "minutes": minutes, "command": " ".join(command[1:])} for row in csv.DictReader(file)]
        kept.write_text(json.dumps(rows, indent=1) + "\n")
        shutil.rmtree(folder)  # the checkpoints of the largest network take gigabytes
        print(f"{run.name}: {minutes:.1f} min", file=sys.stderr, flush=True)
    return json.loads(kept.read_text())


def line(run: Run, method: str, row: Row) -> list[str]:
    """A row of the table. RSST is judged by its hardened accuracy."""
    val, test = (row[f"hardened_{part}_accuracy"] or row[f"{part}_accuracy"] for part in ("val", "test"))
    units = ", ".join("{}/{} {}s".format(*counts, kind) for kind, counts in json.loads(row["kept_units"]).items())
    squeeze = f"{float(row['squeeze_ratio']):.2g}" if row["squeeze_ratio"] else ""
    return [
        run.arch,
        method,
        str(run.budget),
        f"{float(row['density']):.1f}",
        units,
        f"{int(row['parameters']):,}",
        f"{int(row['macs']) / 1e6:,.1f} M",
        f"{float(val):.1f}",
        f"{float(test):.1f}",
        squeeze,
    ]


HEAD = [
    "network",
    "method",
    "images of a class, epochs",
    "density %",
    "units",
    "parameters",
    "MACs",
    "val",
    "test",
    "squeeze",
]
TITLES = {"refill": "Refill", "rsst": "RSST"}


def tables(archs: Sequence[str], data: Path, out: Path) -> str:
    """Both tables, in Markdown; a run that failed leaves its row out."""
    found = {run: rows for run in runs(archs) if (rows := outcome(run, data, out))}
    lines: list[list[str]] = []
    for arch in archs:
        for struct in ("refill", "rsst"):
            rows = found.get(Run(arch, struct))
            if rows and struct == "refill":
                lines.append(line(Run(arch, struct), "dense", rows[0]))
            lines += [line(Run(arch, struct), TITLES[struct], rows[1])] if rows else []
    pruned = []
    for run, rows in found.items():
        if run.struct in PRUNERS:
            pruned.append(line(run, run.struct + (", regrouped" if run.regroup else ""), rows[1]))
    return "\n\n".join(harness.table(HEAD, part) for part in (lines, pruned) if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS", help="image folder")
    parser.add_argument("--out", type=Path, required=True, metavar="RUNS", help="folder for what has been run")
    parser.add_argument("--archs", nargs="+", choices=MODELS, default=list(MODELS), help="networks")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(tables(args.archs, args.data, args.out))


if __name__ == "__main__":
    main()
