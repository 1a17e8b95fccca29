"""The command line of the runner: its flags, in groups, with what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from structured_tickets.base.commands import name_in_help, typed
from structured_tickets.data.catalog import DATASETS, IMAGE_STORES
from structured_tickets.networks import MODELS
from structured_tickets.pruning.criteria import CRITERIA, CRITERIA_BATCHES
from structured_tickets.pruning.methods import CONTROLS, METHODS
from structured_tickets.pruning.rules import SORTING_MODES, kinds_of
from structured_tickets.settings.argument_types import (
    CLOSED_SHARE,
    COUNT,
    GPU,
    LIMIT,
    NATURAL,
    NONNEGATIVE,
    PARALLEL,
    POSITIVE,
    ROUNDS,
    SEED,
    SHARE,
    SIZE,
    OneLineParser,
    architecture,
    count,
    milestones,
    path_text,
    prune_targets,
    rounds_to_keep,
    truth,
    word_list,
)
from structured_tickets.settings.flag_rules import check, warnings_about
from structured_tickets.training.optimization import LR_SCHEDULES, OPTIMIZERS
from structured_tickets.training.penalty.schedules import SCHEDULES

PRESETS: dict[str, dict[str, Any]] = {
    "as_documented": {
        "rank_weights": "initial",
        "rsst_dead": "free",
        "reg_horizon": "epoch",
        "reg_guard": True,
    },
}

EXAMPLES = """examples:
  {command} --dataset digits --arch vit_tiny --struct rsst --vit_structured
  {command} --dataset imagefolder --data photos --arch res20s --struct refill --rate 0.4
"""


def _rows(table: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {summary}" for name, summary in table).replace("%", "%%")


def build_parser() -> argparse.ArgumentParser:
    """The parser, its flags in groups; choices and help come from the tables that implement them."""
    parser = OneLineParser(
        prog=name_in_help("run"),
        allow_abbrev=False,
        epilog=EXAMPLES.format(command=typed("run")),
        description="Find structured lottery tickets: train, prune globally by L1, regroup into whole units, rewind.",
        formatter_class=_HelpFormatter,
    )
    adders = (_add_data, _add_model, _add_training, _add_pruning, _add_comparisons, _add_vit, _add_rsst, _add_output)
    for add in (*adders, _add_tracking):
        add(parser)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag with its default, unless that is none or its text says it; the examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default in (None, ()) or "(default: " in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def _flag(group: Any, name: str, help: str) -> None:
    group.add_argument(f"--{name}", action="store_true", help=help)


def _switch(group: Any, name: str, default: bool, help: str) -> None:
    """A flag that takes true or false; without either it means true."""
    group.add_argument(f"--{name}", type=truth, nargs="?", const=True, default=default, help=help)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=path_text,
        default="data",
        metavar="DIR",
        help="folder of the data set (for CIFAR also an .npz file)",
    )
    group.add_argument(
        "--dataset", default="cifar100", choices=DATASETS, help=_rows((n, d.summary) for n, d in DATASETS.items())
    )
    group.add_argument(
        "--image_size",
        type=SIZE,
        metavar="PIXELS",
        help="side of the images that the model sees (default: the data set's own)",
    )
    group.add_argument(
        "--image_store", choices=IMAGE_STORES, default="auto", help="image files: " + _rows(IMAGE_STORES.items())
    )
    group.add_argument(
        "--workers", type=count(0, PARALLEL), default=4, help="threads or processes that decode image files"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--arch",
        default="res20s",
        type=architecture,
        metavar="NAME",
        help=f"network: {', '.join(MODELS)}; timm/NAME or torchvision/NAME; your own: FILE.py:FACTORY, called with "
        "num_classes (and img_size, if it takes it)",
    )
    group.add_argument(
        "--init",
        type=path_text,
        metavar="FILE",
        help="initial weights: loaded if the file exists, else written there (default: the run folder)",
    )
    group.add_argument(
        "--pretrained",
        type=path_text,
        metavar="FILE",
        help="weights file for --prune_type pt or --vit_pretrained (.safetensors, .pth)",
    )
    _flag(group, "fc", "with --prune_type pt: take the classifier from the file too, instead of a fresh one")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training (of each round)")
    group.add_argument("--epochs", type=COUNT, default=120, help="epochs of a round")
    group.add_argument("--batch_size", type=COUNT, default=128, help="images in a batch, of all processes together")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="adamw suits a ViT trained from nothing")
    group.add_argument("--lr", type=POSITIVE, default=0.01, help="learning rate after the warm-up")
    group.add_argument("--momentum", type=SHARE, default=0.9, help="momentum of SGD, beta 1 of AdamW")
    group.add_argument("--weight_decay", type=NONNEGATIVE, default=1e-4, help="weight decay (AdamW: decoupled)")
    group.add_argument("--warmup", type=NATURAL, default=20, help="epochs of linear warm-up")
    group.add_argument(
        "--lr_schedule",
        choices=LR_SCHEDULES,
        default="multistep",
        help="multistep: times 0.1 at each of --decreasing_lr; cosine: falls to 0",
    )
    group.add_argument(
        "--decreasing_lr", type=milestones, default="91,136", metavar="EPOCHS", help="multistep's epochs"
    )
    group.add_argument("--label_smoothing", type=SHARE, default=0.0, help="share of the label spread over all classes")
    group.add_argument(
        "--seed", type=SEED, default=0, help="everything random comes from it; 0 is a seed like any other"
    )
    group.add_argument(
        "--gpu",
        type=GPU,
        default=0,
        help="CUDA device; the CPU where there is none, or with -1. Under torchrun each process has its own",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of matrix products and convolutions; auto: bf16 where the processor has it, else fp32 (never TF32)",
    )
    _switch(
        group,
        "compact_training",
        True,
        "train without the units that are held at zero: the same numbers up to rounding, in less time and memory",
    )
    _flag(
        group,
        "compile",
        "compile the network by torch.compile: a minute or two of waiting, then faster steps; with --compact_training "
        "again whenever the network becomes another",
    )
    _flag(group, "deterministic", "only kernels that give the same bits every time (CUDA: slower; CPUs have no others)")


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--struct",
        choices=METHODS,
        default="rsst",
        help=_rows((n, m.summary) for n, m in METHODS.items())
        + ". The first two prune whole units, the others weight by weight unless --regroup",
    )
    group.add_argument(
        "--pruning_times", type=ROUNDS, default=20, metavar="ROUNDS", help="rounds, the dense one included"
    )
    group.add_argument("--rate", type=SHARE, default=0.2, help="share pruned by global L1, and share of heads")
    group.add_argument(
        "--rate_mode",
        choices=("round", "target"),
        help="rate is a share of what is left, or of the original (default: target with --vit_structured, else round)",
    )
    group.add_argument(
        "--prune_type",
        choices=("lt", "pt", "rewind_lt"),
        default="lt",
        help="rewind to: initial weights; a pretrained backbone; the weights of --rewind_epoch",
    )
    group.add_argument("--rewind_epoch", type=NATURAL, default=24, help="epoch of round 0 that rewind_lt returns to")
    group.add_argument(
        "--criteria",
        choices=CRITERIA,
        default="l1",
        help=_rows((n, c.summary) for n, c in CRITERIA.items()) + ". With --regroup, remain unless another is given",
    )
    group.add_argument(
        "--criteria_batches",
        type=COUNT,
        default=CRITERIA_BATCHES,
        help="fixed batches that criteria on feature maps, SNIP and GraSP look at",
    )
    group.add_argument("--rank_weights", choices=("trained", "initial"), default="trained", help="what global L1 ranks")
    group.add_argument(
        "--fillback_rate",
        type=CLOSED_SHARE,
        default=0.0,
        help="share of what would go that is kept (not by rsst)",
    )
    group.add_argument("--min_units", type=NATURAL, default=0, help="units that every layer keeps at least")
    _flag(group, "conv1", "prune the stem too (first convolution; of a ViT the patch embedding, weight by weight)")
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help="as_documented: " + " ".join(f"{k}={v}" for k, v in PRESETS["as_documented"].items()),
    )


def _add_comparisons(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("one-shot pruners and controls")
    _flag(group, "regroup", "turn the mask of any method into whole units")
    group.add_argument("--admm_epochs", type=COUNT, default=20, help="epochs of ADMM before each mask")
    group.add_argument("--admm_rho", type=NONNEGATIVE, default=0.01, help="ADMM's pull towards the sparse network")
    group.add_argument(
        "--control",
        choices=CONTROLS,
        default="none",
        help="instead of the ticket: " + _rows((n, c.summary) for n, c in CONTROLS.items()),
    )
    group.add_argument(
        "--control_of",
        type=path_text,
        metavar="DIR",
        help="folder of the finished run that --control compares with (default: where the same command without "
        "--control puts it)",
    )


def _add_vit(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ViT")
    _flag(group, "vit_structured", "prune whole heads and neurons; without it ViTs are pruned weight by weight")
    group.add_argument(
        "--vit_prune_target",
        type=prune_targets,
        default="head",
        metavar="UNITS",
        help="which units: head, mlp, both of them, block (whole attention and MLP branches), or several with commas",
    )
    group.add_argument("--mlp_prune_ratio", type=SHARE, help="share of neurons (default: --rate)")
    group.add_argument("--block_prune_ratio", type=SHARE, help="share of blocks (default: --rate)")
    group.add_argument(
        "--sorting_mode",
        choices=SORTING_MODES,
        default="layer-wise",
        help="rank units within each block, or all units of the network together",
    )
    _flag(group, "vit_pretrained", "start from ImageNet weights (timm, or the file of --pretrained)")


def _add_rsst(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("RSST")
    group.add_argument(
        "--RST_schedule",
        choices=SCHEDULES,
        default="exp_custom_exponents",
        help="lambda after n updates of K; " + _rows((n, s.summary) for n, s in SCHEDULES.items()),
    )
    group.add_argument("--reg_granularity_prune", type=POSITIVE, default=1.0, help="delta in those formulas")
    group.add_argument("--exponents", type=POSITIVE, default=4.0, help="power in exp_custom_exponents")
    group.add_argument(
        "--reg_horizon",
        choices=("state", "epoch"),
        default="state",
        help="what K counts: the updates of a round (state) or of an epoch",
    )
    _switch(group, "reg_guard", False, "raise lambda only while delta * batch < 1, as the documents have it")
    group.add_argument("--reg_upper_limit", type=LIMIT, default=1.0, help="cap on lambda; inf for none")
    group.add_argument(
        "--penalty",
        choices=("auto", "gradient", "decoupled"),
        default="auto",
        help="gradient: add lambda * w to it; decoupled: w *= 1 - lambda * lr / peak lr; auto: gradient "
        "for sgd, decoupled for adamw",
    )
    _switch(group, "block_loss_grad", False, "doomed weights follow the penalty alone, not the loss")
    group.add_argument(
        "--rsst_dead",
        choices=("zero", "free"),
        default="zero",
        help="weights outside both masks: held at zero, or trained like the others",
    )
    group.add_argument(
        "--reg_target",
        choices=("weight", "unit"),
        default="weight",
        help="penalise the living weights outside the structure, or its units whole: what L1 removed of them lives "
        "again, and is squeezed with the rest",
    )
    group.add_argument(
        "--fade_out",
        type=SHARE,
        default=0.01,
        metavar="SHARE",
        help="after an epoch, leave out the doomed units whose weights' norm is at most this share of the layer's when "
        "the round began (per weight); 0: never",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--save_dir", type=path_text, metavar="DIR", help="run folder (default: named after the settings)"
    )
    _flag(group, "resume", "insist on continuing: an error if the run folder holds nothing to continue")
    group.add_argument(
        "--checkpoint",
        type=path_text,
        metavar="FILE",
        help="continue from this checkpoint if the run folder holds none",
    )
    group.add_argument(
        "--dense_store",
        type=path_text,
        metavar="DIR",
        help="take round 0 from this folder if a run with the same model, data, seed and training flags has left it "
        "there, bit for bit what training it would give; else train it and leave it there (networks from your own file "
        "always train it)",
    )
    group.add_argument(
        "--keep_checkpoints",
        type=rounds_to_keep,
        metavar="ROUNDS",
        help="bound the disk space: keep checkpoints of only so many last rounds, and of round 0; masks and metrics "
        "stay (default: of all rounds)",
    )
    group.add_argument(
        "--print_freq", type=COUNT, default=200, metavar="BATCHES", help="batches between lines in the log"
    )
    _flag(group, "dry_run", "print the plan and train nothing")
    _flag(group, "quiet", "only warnings and the final table")
    _flag(group, "verbose", "every layer's decision at every round")


def _add_tracking(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tracking")
    group.add_argument(
        "--wandb",
        choices=("auto", "online", "offline", "disabled"),
        default="auto",
        help="auto: online where a key is configured, else local files only",
    )
    group.add_argument("--exp_name", metavar="NAME", help="name of the run at WandB (default: made from the settings)")
    group.add_argument("--wandb_group", metavar="NAME", help="group of the run at WandB; sweeps set it to their name")
    group.add_argument("--wandb_tags", metavar="TAG,...", type=word_list, default=(), help="tags of the run at WandB")
    _flag(group, "tensorboard", "also TensorBoard's event files, in tensorboard/ of the run folder")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check a command line; `-` is accepted for `_` in flags.

    The result also has `warnings` (list of sentences), `explicit` (names of the flags that were given) and `words` (the
    command line itself).

    Raises:
        UsageError: One line that names the flag, the value and what is allowed.
    """
    parser = build_parser()
    words = [_underscored(w) for w in argv]
    probe, _ = _preset_parser().parse_known_args(words)
    parser.set_defaults(**PRESETS.get(probe.preset or "", {}))
    args = parser.parse_args(words)
    explicit = {w[2:].split("=")[0] for w in words if w.startswith("--")}
    if args.rate_mode is None:
        args.rate_mode = "target" if args.vit_structured else "round"
    if args.regroup and "criteria" not in explicit and not METHODS[args.struct].regroups:
        args.criteria = "remain"  # the pruner's own word: how many weights of a unit it kept
    if args.mlp_prune_ratio is None:
        args.mlp_prune_ratio = args.rate
    if args.block_prune_ratio is None and "block" in kinds_of(args.vit_prune_target):
        args.block_prune_ratio = args.rate  # only then: it would make strangers of older runs
    if args.penalty == "auto":
        args.penalty = "decoupled" if OPTIMIZERS[args.optimizer].adaptive else "gradient"
    if args.image_size is None:
        args.image_size = DATASETS[args.dataset].image_size
    for name in ("init", "pretrained", "control_of", "dense_store"):
        if getattr(args, name):
            setattr(args, name, str(Path(getattr(args, name)).resolve()))
    check(args)
    args.warnings, args.explicit, args.words = warnings_about(args, explicit), sorted(explicit), list(argv)
    return args


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _preset_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    return parser
