"""The documents' example commands, each run on a small budget: writes docs/original_commands.md.

    python -m benchmarks.original_commands --data PHOTOS > docs/original_commands.md

PHOTOS is an image folder (`train/<class>/*`, `test/<class>/*`); the commands' data sets are replaced by a part of it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks import harness
from benchmarks.methods import LARGE, few_images

ROOT = Path(__file__).resolve().parent.parent

# Every command is run as it is written: a shell function adds the small budget, and of a flag given twice the last counts.
PREAMBLE = """
python() {
    case "$1" in
        main_imp_fillback.py) command python "$@" $FEW --save_dir "$(mktemp -d "$OUT/run.XXXX")" ;;
        *) command python "$@" ;;
    esac
}
"""
FEW = "--epochs 2 --pruning_times 2 --batch_size 30 --warmup 1 --decreasing_lr 1 --wandb disabled --quiet"


@dataclass(frozen=True)
class Recipe:
    """A command of the documents, and what there is to say about it.

    Attributes:
        data: "photos", "tiny-imagenet" (the same photographs in that set's layout), or "" for commands without data.
    """

    title: str
    text: str
    note: str = ""
    data: str = "photos"


VIT = "python main_imp_fillback.py --arch vit_tiny --dataset cifar100"
BOTH = f"{VIT} --struct rsst --vit_structured --vit_prune_target both --criteria magnitude"

RECIPES: dict[str, list[Recipe]] = {
    "Quick start: heads of a ViT (document 002)": [
        Recipe("The tests", "python tests/test_vit_quasi_structured.py", "the document's script, in `tests/`", ""),
        Recipe(
            "RSST, recommended",
            f"""{VIT} \\
    --struct rsst --vit_structured --criteria magnitude --rate 0.3 --pruning_times 20 --epochs 80 --batch_size 128 \\
    --reg_granularity_prune 1.0 --RST_schedule exp_custom_exponents --exponents 4 --exp_name vit_rsst_head30_test""",
        ),
        Recipe(
            "Refill",
            f"""{VIT} \\
    --struct refill --vit_structured --criteria magnitude --fillback_rate 0.1 --rate 0.3 --pruning_times 20 --epochs 80 \\
    --exp_name vit_refill_head30_test""",
        ),
        Recipe(
            "Unstructured",
            f"{VIT} --struct rsst --rate 0.3 --exp_name vit_unstructured_30",
            "`--struct imp` says what it is",
        ),
        Recipe("Structured", f"{VIT} --struct rsst --vit_structured --rate 0.3 --exp_name vit_structured_head30"),
        Recipe("Less memory", f"{VIT} --struct rsst --vit_structured --batch_size 64"),
        Recipe(
            "All criteria",
            """for criteria in remain magnitude l1 l2 saliency; do
    python main_imp_fillback.py --arch vit_tiny --struct rsst --vit_structured --criteria $criteria --rate 0.3 \\
        --exp_name vit_head30_${criteria}
done""",
            "the same loop: `scripts/sweep_criteria.sh`",
        ),
        Recipe(
            "Several rates",
            """for rate in 0.2 0.3 0.4 0.5; do
    python main_imp_fillback.py --arch vit_tiny --struct rsst --vit_structured --rate $rate \\
        --exp_name vit_head_rate${rate}
done""",
            "three heads a block: 0.2 and 0.3 drop one, 0.4 and 0.5 two. The same loop: `scripts/sweep_rates.sh`",
        ),
        Recipe(
            "ResNet-20 and ViT-Tiny",
            """python main_imp_fillback.py --arch res20s --dataset cifar100 --struct rsst --rate 0.3
python main_imp_fillback.py --arch vit_tiny --dataset cifar100 --struct rsst --vit_structured --rate 0.3""",
            "with settings that suit each of them: `scripts/resnet_vs_vit.sh`",
        ),
    ],
    "Heads and neurons (document 003)": [
        Recipe("The tests", "python tests/test_head_mlp_pruning.py", "", ""),
        Recipe(
            "The integration script", "PYTHON=python bash scripts/run_head_mlp_test.sh $FEW --save_dir $OUT/head_mlp"
        ),
        Recipe(
            "Basic command",
            f"""{BOTH} \\
    --rate 0.3 --mlp_prune_ratio 0.3 --pruning_times 20 --epochs 80 --batch_size 128 \\
    --reg_granularity_prune 1.0 --RST_schedule exp_custom_exponents --exponents 4""",
        ),
        Recipe("Higher compression", f"{BOTH} --rate 0.5 --mlp_prune_ratio 0.5"),
        Recipe("Asymmetric", f"{BOTH} --rate 0.3 --mlp_prune_ratio 0.4"),
        Recipe("Heads alone", f"{VIT} --struct rsst --vit_structured --vit_prune_target head --rate 0.3"),
        Recipe(
            "Neurons alone, the document's way round",
            f"{BOTH} --rate 0.0 --mlp_prune_ratio 0.3",
            "the rate of 0 switches L1 off as well",
        ),
        Recipe("Neurons alone", f"{VIT} --struct rsst --vit_structured --vit_prune_target mlp --rate 0.3"),
        Recipe("Recommended", f"{BOTH} --rate 0.3 --mlp_prune_ratio 0.3 --pruning_times 20 --epochs 80"),
    ],
    "The whole project (document 004)": [
        Recipe(
            "RSST",
            """python main_imp_fillback.py --dataset cifar100 --arch res20s --struct rsst --criteria l1 \\
    --pruning_times 20 --rate 0.2 --RST_schedule exp_custom_exponents --exponents 4 --reg_granularity_prune 1.0 \\
    --epochs 120 --batch_size 128 --lr 0.01""",
        ),
        Recipe(
            "Refill",
            """python main_imp_fillback.py --dataset cifar100 --arch res20s --struct refill --criteria magnitude \\
    --fillback_rate 0.1 --pruning_times 20 --rate 0.2 --epochs 120""",
        ),
        Recipe("ResNet-18", "python main_imp_fillback.py --arch res18 --dataset tiny-imagenet", "", "tiny-imagenet"),
        Recipe("VGG-16", "python main_imp_fillback.py --arch vgg16_bn --dataset cifar100"),
        Recipe("MobileNet", "python main_imp_fillback.py --arch mobilenet --dataset cifar10"),
        Recipe(
            "A model of your own",
            "python main_imp_fillback.py --arch examples/my_model.py:net --dataset cifar100",
            "instead of editing `utils.py`: a file and the function in it that builds the network",
        ),
    ],
    "What the documents name without a command": [
        *(
            Recipe(
                f"{name}", f"python main_imp_fillback.py --arch res20s --dataset cifar10 --struct {struct} --rate 0.5"
            )
            for name, struct in (
                ("SNIP", "snip"),
                ("GraSP", "grasp"),
                ("SynFlow", "synflow"),
                ("OMP", "omp"),
                ("Random", "random"),
            )
        ),
        Recipe(
            "ADMM",
            "python main_imp_fillback.py --arch res20s --dataset cifar10 --struct admm --rate 0.5 --admm_epochs 2",
        ),
        Recipe(
            "A pruner's mask as whole heads and neurons",
            f"{VIT} --struct snip --regroup --vit_prune_target both --rate 0.3",
        ),
        Recipe(
            "Growing regularisation of whole units",
            "python main_imp_fillback.py --arch res20s --dataset cifar10 --struct rsst --reg_target unit --rate 0.4",
        ),
        Recipe(
            "A ticket and its controls",
            "PYTHON=python bash scripts/ticket_vs_controls.sh --arch res20s --struct refill $FEW",
        ),
        Recipe(
            "A ticket at its real size",
            f"""{VIT} --struct refill --vit_structured --vit_prune_target both
python export.py $(ls -td $OUT/run.* | head -1) --quiet""",
        ),
    ],
}


def tiny_imagenet(photos: Path, folder: Path) -> Path:
    """The photographs in Tiny-ImageNet's layout, enlarged to 64 pixels."""
    lines: list[str] = []
    (folder / "val" / "images").mkdir(parents=True)
    for part in ("train", "test"):
        for files in sorted((photos / part).iterdir()):
            for k, file in enumerate(sorted(files.iterdir())):
                name = f"{files.name}_{k}.JPEG"
                place = folder / "train" / files.name / "images" if part == "train" else folder / "val" / "images"
                place.mkdir(parents=True, exist_ok=True)
                Image.open(file).resize((64, 64)).save(place / name)
                lines += [f"{name}\t{files.name}\t0\t0\t63\t63\n"] if part == "test" else []
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(sorted(p.name for p in (folder / "train").iterdir())) + "\n")
    return folder


def run(recipe: Recipe, data: dict[str, str], out: Path) -> str:
    """What the command printed, both streams.

    Raises:
        SystemExit: It failed.
    """
    environment = {"OUT": str(out), "FEW": f"{data.get(recipe.data, '')} {FEW}"}
    said = harness.printed_by(PREAMBLE + recipe.text, ROOT, environment)
    return re.sub(re.escape(str(out)) + r"\S*", "RUN", said).strip()


def indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def page(photos: Path, out: Path) -> str:
    """The page, in Markdown."""
    few = few_images(photos, out, LARGE)
    data = {
        "photos": f"--dataset imagefolder --data {few}",
        "tiny-imagenet": f"--data {tiny_imagenet(few, out / 'tiny-imagenet-200')}",
    }
    parts = [INTRODUCTION]
    for heading, recipes in RECIPES.items():
        parts.append(f"## {heading}")
        for recipe in recipes:
            printed = run(recipe, data, out)
            note = f" ({recipe.note})" if recipe.note else ""
            parts.append(f"**{recipe.title}**{note}\n\n{indented(recipe.text)}\n\nprinted\n\n{indented(printed)}")
    return "\n\n".join(parts)


INTRODUCTION = f"""# The original documents' commands

The documents' example commands, each with what it printed. `python -m benchmarks.original_commands --data PHOTOS` ran them and wrote
this page. To each command was added, so that it ends in seconds on a CPU,

    --dataset imagefolder --data PHOTOS {FEW}

with {LARGE.images} training images and {min(50, LARGE.images // 2)} test images of each of CIFAR-10's ten classes; for
Tiny-ImageNet the same photographs, enlarged, in that set's layout. **So the accuracies mean nothing here**: what counts is
that every command does what its document says. Two epochs are too few for the penalty, which the warnings say.
Without what was added the commands run as they are documented."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS", help="image folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(page(args.data, Path(folder)))


if __name__ == "__main__":
    main()
