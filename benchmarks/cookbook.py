"""What people want to do, as commands that run as they stand: writes docs/cookbook.md.

    python -m benchmarks.cookbook --data PHOTOS > docs/cookbook.md

PHOTOS is an image folder (`train/<class>/*`, `test/<class>/*`), of which some images of each class are used.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.methods import MEDIUM, few_images
from benchmarks.original_commands import indented

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 140


@dataclass(frozen=True)
class Step:
    """Commands, and what there is to know before them.

    Attributes:
        shown: Lines of the end of what is printed, at most.
    """

    text: str
    commands: str
    shown: int = 12


PHOTOS = "--dataset imagefolder --data photos"
MAIN = "python main_imp_fillback.py"
SHORT = "--epochs 8 --warmup 1 --decreasing_lr 5,7"
DIGITS = (
    "--dataset digits --image_size 8 --arch vit_tiny --vit_structured --vit_prune_target both --rate_mode round \\\n"
    "    --criteria magnitude --pruning_times 2 --epochs 3 --batch_size 64 --optimizer adamw --lr 1e-3 --warmup 1 \\\n"
    "    --lr_schedule cosine"
)

TASKS: dict[str, list[Step]] = {
    "Prune a network that I have": [
        Step(
            "The network is one of timm's with weights in a file. Here the file is trained first; yours is there already.",
            f"{MAIN} {PHOTOS} --arch timm/resnet10t --pruning_times 1 \\\n    {SHORT} --lr 0.05 --save_dir trained --quiet",
        ),
        Step(
            "`--round_0 given` judges the network of the file and does not train it. Refill then cuts units off, and "
            "`--prune_type finetune` trains the rest from the weights that it has, with a schedule of its own.",
            f"{MAIN} {PHOTOS} --arch timm/resnet10t --pretrained trained/ticket.pth.tar \\\n"
            "    --round_0 given --prune_type finetune --finetune_epochs 8 --finetune_lr 0.02 --lr_schedule cosine \\\n"
            "    --struct refill --rate 0.3 --pruning_times 2 --save_dir pruned --quiet\n"
            "python export.py pruned",
        ),
        Step(
            "Your own module is `--arch FILE.py:FUNCTION`, where the function takes the number of classes: "
            "[networks.md](networks.md). `--dry_run` says what of it can be pruned, and what stays whole and why. For a "
            "training loop of your own there is the library: [examples/own_loop.py](../examples/own_loop.py) is a whole program.",
            f"{MAIN} {PHOTOS} --arch examples/my_model.py:net --rate 0.4 --pruning_times 2 --dry_run",
            30,
        ),
    ],
    "Train a Vision Transformer from nothing": [
        Step(
            "`--recipe vit` stands for AdamW, mixup, CutMix, AutoAugment, random erasing and stochastic depth "
            "([table](methods.md#recipes)); `--ema 0.99 --eval_ema` judges averaged weights. Here in 4 epochs, at 16 pixels; "
            "leave out `--epochs`, `--warmup` and `--image_size`, and it is 300 epochs at the images' own size.",
            f"{MAIN} {PHOTOS} --arch vit_tiny --image_size 16 --recipe vit --ema 0.99 --eval_ema --pruning_times 1 \\\n"
            "    --epochs 4 --warmup 1 --save_dir vit --quiet",
        ),
        Step(
            "The network of a file, here that one, teaches another that becomes smaller: `--distill FILE`. `--distill dense` takes "
            "the run's own round 0, and `ARCH@FILE` a network of another kind.",
            f"{MAIN} {PHOTOS} --arch vit_tiny --image_size 16 --recipe vit --distill vit/ticket.pth.tar \\\n"
            "    --struct rsst --vit_structured --vit_prune_target both --criteria magnitude --rate 0.3 --pruning_times 2 \\\n"
            "    --epochs 4 --warmup 1 --save_dir taught --quiet",
        ),
    ],
    "Compare two methods": [
        Step(
            "The same budget, several seeds, and both methods side by side. The last table is of means over seeds.",
            f"python sweep.py --grid struct=rsst,refill rate=0.4 seed=0,1,2 --out compared \\\n    {DIGITS} --quiet",
            16,
        ),
        Step(
            "Paired tests over seeds, curves and all numbers as files. Open `compared/report/index.html`.",
            "python report.py compared --quiet",
        ),
        Step(
            "Before you claim anything of a structure: the same network with a random structure of the same size.",
            f"python sweep.py --grid struct=rsst rate=0.4 control=none,random_structure seed=0,1,2 --out controls \\\n"
            f"    {DIGITS} --quiet",
            16,
        ),
    ],
    "Half of the size, for deployment": [
        Step(
            "Streams as units, in whole lanes of the processor: nothing has to be put back into its place, so that time falls "
            "with the MACs. A channel takes its outputs and the inputs of its readers along, so that 0.3 of the channels are "
            'half of the weights. `export.py` checks each file against the masked network and measures; `--onnx` needs `pip install ".[onnx]"`.',
            f"{MAIN} {PHOTOS} --arch res20s --struct refill \\\n"
            f"    --channel_units stream --round_units 8 --rate 0.3 --pruning_times 2 \\\n    {SHORT} --lr 0.05 --save_dir half --quiet\n"
            "python export.py half --onnx --pt2",
        ),
        Step(
            "What is deployed is a folder of safetensors and JSON, an ONNX file, or a program of torch.export.",
            "python - <<'END'\n"
            "import torch\n"
            "import structured_tickets as st\n"
            'small = st.load("half/export/round_1")\n'
            'print(sum(p.numel() for p in small.parameters()), "parameters,", small(torch.rand(1, 3, 32, 32)).shape)\n'
            "END\n"
            "ls half/export/round_1",
        ),
    ],
    "On a cluster": [
        Step(
            "A sweep for Slurm: scripts for each stage, and the command that submits them. The same command without "
            "`--executor` prints the tables when all is done. Ray: `--executor ray`.",
            f"python sweep.py --grid struct=rsst,refill seed=0,1 --out cluster --executor slurm \\\n"
            f"    --slurm_options '--partition=gpu --time=120' \\\n    {DIGITS}\n"
            "ls cluster/slurm",
            20,
        ),
        Step(
            "One run on several cards, or here two processes: each has its share of every batch, and the ticket is the one "
            "that a single process finds.",
            f"torchrun --standalone --nproc_per_node=2 main_imp_fillback.py {PHOTOS} --arch res20s \\\n"
            "    --rate 0.4 --pruning_times 2 --epochs 2 --warmup 1 --decreasing_lr 1 --save_dir together --quiet",
        ),
    ],
    "Reproduce a run from its folder": [
        Step(
            "`env.json` has the command, the versions and the commit, `args.yaml` every setting.",
            "python - <<'END'\n"
            "import json, shlex\n"
            'run = json.load(open("half/env.json"))\n'
            'print(shlex.join(["python", *run["command"]]))\n'
            "END",
        ),
        Step(
            "`--config` takes these settings; what is given beside it wins. In another folder they give the same bits on the same "
            "kind of machine.",
            f"{MAIN} --config half/args.yaml --save_dir again --quiet\n"
            "python - <<'END'\n"
            "import torch\n"
            'one, other = (torch.load(f"{run}/ticket.pth.tar", weights_only=True)["state_dict"] for run in ("half", "again"))\n'
            'print("the same bits:", all(torch.equal(value, other[name]) for name, value in one.items()))\n'
            "END",
        ),
    ],
}


def workplace(photos: Path, folder: Path) -> Path:
    """A folder with the checkout's files and some photographs, in which the commands leave what they make."""
    place = folder / "checkout"
    place.mkdir()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in dict.fromkeys(line.split("/")[0] for line in listed.splitlines()):
        (place / name).symlink_to(ROOT / name)
    (place / "photos").symlink_to(few_images(photos, folder, MEDIUM))
    return place


def run(step: Step, place: Path) -> tuple[str, float]:
    """What the commands printed, both streams, and the seconds that they took.

    Raises:
        SystemExit: They failed.
    """
    began = time.perf_counter()
    said = harness.printed_by(step.commands, place, {"PYTHONPATH": str(place), "WANDB_MODE": "disabled"})
    return re.sub(re.escape(str(place)) + "/?", "", said).strip(), time.perf_counter() - began


def page(photos: Path, folder: Path) -> str:
    """The cookbook, in Markdown."""
    place = workplace(photos, folder)
    parts = [INTRODUCTION.format(where=harness.describe_machine(torch.device("cpu")))]
    for task, steps in TASKS.items():
        parts.append(f"## {task}")
        for step in steps:
            printed, seconds = run(step, place)
            lines = printed.splitlines()
            left_out = ["..."] * (len(lines) > step.shown)
            ending = "\n".join([*left_out, *lines[-step.shown :]])
            parts.append(
                f"{textwrap.fill(step.text, WIDTH)}\n\n{indented(step.commands)}\n\nprints ({seconds:.0f} s)\n\n{indented(ending)}"
            )
    return "\n\n".join(parts)


INTRODUCTION = (
    """# Cookbook

By task: commands that run as they stand in the checkout, beside a folder `photos` with `train/<class>/*` and `test/<class>/*`, and what
they printed. Here `photos` has """
    + f"{MEDIUM.images} training images of each of CIFAR-10's ten classes"
    + """, so that each command ends soon: **the accuracies mean
nothing**. With images of your own, take more `--epochs` and a schedule that fits them. `python -m benchmarks.cookbook --data photos` ran
all of it, beside other programs, and wrote this page: {where}.

The commands of the original documents are in [original_commands.md](original_commands.md)."""
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS", help="image folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(page(args.data.resolve(), Path(folder)))


if __name__ == "__main__":
    main()
