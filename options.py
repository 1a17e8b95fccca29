"""The command line: one parser, its checks, and the sentences that a wrong flag gets."""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from criteria import CRITERIA, CRITERIA_BATCHES
from dataset import DATASETS, IMAGE_STORES
from errors import UsageError
from methods import CONTROLS, METHODS
from models import MODELS, family_of, parse_arch
from optimization import LR_SCHEDULES, OPTIMIZERS
from reg_pruner_files.schedules import SCHEDULES, clock_from
from rules import SORTING_MODES, TARGET_KINDS, kinds_of

PRESETS: dict[str, dict[str, Any]] = {
    "as_documented": {
        "rank_weights": "initial",
        "rsst_dead": "free",
        "reg_horizon": "epoch",
        "reg_guard": True,
    },
}

# Flags that do not change what a run computes (or, for pruning_times, only how far it goes).
NOT_IDENTITY = frozenset(
    {
        "data",
        "save_dir",
        "control_of",
        "exp_name",
        "resume",
        "checkpoint",
        "print_freq",
        "workers",
        "compile",
        "compact_training",
        "deterministic",
        "image_store",
        "gpu",
        "pruning_times",
        "dense_store",
        "keep_checkpoints",
        "dry_run",
        "wandb",
        "wandb_group",
        "wandb_tags",
        "tensorboard",
        "quiet",
        "verbose",
        "preset",
    }
)

# Flags that are read only after round 0. A flag that is missing here costs a sweep some time; a wrong one, its truth.
AFTER_ROUND_0 = frozenset(
    {
        "struct", "rate", "rate_mode", "criteria", "criteria_batches", "rank_weights", "fillback_rate", "min_units",
        "conv1", "regroup", "admm_epochs", "admm_rho", "control", "vit_structured", "vit_prune_target",
        "mlp_prune_ratio", "block_prune_ratio", "sorting_mode", "RST_schedule", "reg_granularity_prune", "exponents",
        "reg_horizon", "reg_guard", "reg_upper_limit", "penalty", "block_loss_grad", "rsst_dead", "reg_target",
        "fade_out",
    }
)  # fmt: skip

EXAMPLES = """examples:
  python main_imp_fillback.py --dataset digits --arch vit_tiny --struct rsst --vit_structured
  python main_imp_fillback.py --dataset imagefolder --data photos --arch res20s --struct refill --rate 0.4
"""


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line each, with the nearest flag for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises: UsageError, for `--flag=--` too, which argparse before Python 3.13 takes for an empty list."""
        for word in args or ():
            flag, _, value = word.partition("=")
            if word.startswith("--") and value == "--":
                raise UsageError(f"argument {flag}: '--' is not a value")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises: UsageError, for words that are no flags too."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UsageError(self._unrecognized(unknown))
        return found

    def _unrecognized(self, words: Sequence[str]) -> str:
        known = [o for a in self._actions for o in a.option_strings]
        flags = [w.split("=")[0] for w in words if len(w.split("=")[0].strip("-")) > 1 and w.startswith("-")]
        near = [difflib.get_close_matches(flag, known, 1) for flag in flags]
        hints = [f"{flag}: did you mean {n[0]}?" for flag, n in zip(flags, near, strict=True) if n]
        return "; ".join([f"unrecognized arguments: {' '.join(map(shlex.quote, words))}", *hints])

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        near = difflib.get_close_matches(value, action.choices, 1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(action.choices)}{hint}")


def _number(kind: Callable[[str], Any], allowed: str, test: Callable[[Any], bool]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or (isinstance(value, float) and math.isnan(value)) or not test(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    return parse


def count(least: int, most: int = 10**9) -> Callable[[str], Any]:
    """A parser of whole numbers. What is beyond a thousand million would overflow somewhere, much later."""
    return _number(int, f"a whole number of at least {least} and at most {most}", lambda v: least <= v <= most)


_COUNT, _NATURAL = count(1), count(0)
PARALLEL = 1024  # processes or threads: as many are really started, and more would bring a machine down
_SHARE = _number(float, "a number in [0, 1)", lambda v: 0 <= v < 1)
_CLOSED_SHARE = _number(float, "a number in [0, 1]", lambda v: 0 <= v <= 1)
POSITIVE = _number(float, "a number above 0", lambda v: 0 < v < math.inf)
NONNEGATIVE = _number(float, "a number of at least 0", lambda v: 0 <= v < math.inf)
_LIMIT = _number(float, "a number above 0, or inf", lambda v: v > 0)
_SIZE = _number(int, "a multiple of 4 of at least 8 and at most 16384", lambda v: 8 <= v <= 2**14 and v % 4 == 0)
_SEED = _number(int, "a whole number in [0, 4294967295]", lambda v: 0 <= v < 2**32)
_GPU = _number(int, "a whole number", lambda v: abs(v) < 2**31)


def truth(text: str) -> bool:
    """A parser of true and false."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


def _rounds_to_keep(text: str) -> int | None:
    return None if text.lower() in ("all", "none") else int(count(1)(text))


def _milestones(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = (-1,)
    if any(not 0 <= v <= 10**9 for v in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of epochs such as 91,136")
    return values


def path_text(text: str) -> str:
    """A parser of the name of a file or folder, which need not exist."""
    try:
        os.stat(text)  # noqa: PTH116 (a Path would not take an empty name for what it is)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be the name of a file") from None
    except OSError as error:
        if not text or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = error.strerror if text else "it is empty"
            raise argparse.ArgumentTypeError(f"{text!r} cannot be the name of a file: {reason}") from None
    return text


def path(text: str) -> Path:
    """A parser of the name of a file or folder, which need not exist, as a `Path`."""
    return Path(path_text(text))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _arch(text: str) -> str:
    try:
        return parse_arch(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _targets(text: str) -> str:
    """The targets in the table's order; all of what a row stands for becomes that row."""
    try:
        kinds = kinds_of(text)
    except KeyError as error:
        near = difflib.get_close_matches(error.args[0], TARGET_KINDS, 1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        rows = ", ".join(TARGET_KINDS)
        raise argparse.ArgumentTypeError(f"{error.args[0]!r} is not one of {rows}{hint}") from None
    names = {row: target for target, row in TARGET_KINDS.items()}
    return names.get(kinds) or ",".join(names[kind,] for kind in kinds)


def _rows(table: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {summary}" for name, summary in table).replace("%", "%%")


def build_parser() -> argparse.ArgumentParser:
    """The parser, its flags in groups; choices and help come from the tables that implement them."""
    parser = OneLineParser(
        prog="main_imp_fillback.py",
        allow_abbrev=False,
        epilog=EXAMPLES,
        description="Find structured lottery tickets: train, prune globally by L1, regroup into whole units, rewind.",
        formatter_class=_HelpFormatter,
    )
    adders = (_add_data, _add_model, _add_training, _add_pruning, _add_comparisons, _add_vit, _add_rsst, _add_output)
    for add in (*adders, _add_tracking):
        add(parser)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag with its default; the examples as they are written."""


def _flag(group: Any, name: str, help: str) -> None:
    group.add_argument(f"--{name}", action="store_true", help=help)


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
        type=_SIZE,
        metavar="PIXELS",
        help="side of the images that the model sees (None: the data set's own)",
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
        type=_arch,
        metavar="NAME",
        help=f"network: {', '.join(MODELS)}; timm/NAME or torchvision/NAME; your own: FILE.py:FACTORY, called with "
        "num_classes (and img_size, if it takes it)",
    )
    group.add_argument(
        "--init",
        type=path_text,
        metavar="FILE",
        help="initial weights: loaded if the file exists, else written there (None: the run folder)",
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
    group.add_argument("--epochs", type=_COUNT, default=120, help="epochs of a round")
    group.add_argument("--batch_size", type=_COUNT, default=128, help="images in a batch, of all processes together")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="adamw suits a ViT trained from nothing")
    group.add_argument("--lr", type=POSITIVE, default=0.01, help="learning rate after the warm-up")
    group.add_argument("--momentum", type=_SHARE, default=0.9, help="momentum of SGD, beta 1 of AdamW")
    group.add_argument("--weight_decay", type=NONNEGATIVE, default=1e-4, help="weight decay (AdamW: decoupled)")
    group.add_argument("--warmup", type=_NATURAL, default=20, help="epochs of linear warm-up")
    group.add_argument(
        "--lr_schedule",
        choices=LR_SCHEDULES,
        default="multistep",
        help="multistep: times 0.1 at each of --decreasing_lr; cosine: falls to 0",
    )
    group.add_argument(
        "--decreasing_lr", type=_milestones, default="91,136", metavar="EPOCHS", help="multistep's epochs"
    )
    group.add_argument("--label_smoothing", type=_SHARE, default=0.0, help="share of the label spread over all classes")
    group.add_argument(
        "--seed", type=_SEED, default=0, help="everything random comes from it; 0 is a seed like any other"
    )
    group.add_argument(
        "--gpu",
        type=_GPU,
        default=0,
        help="CUDA device; the CPU where there is none, or with -1. Under torchrun each process has its own",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of matrix products and convolutions; auto: bf16 where the processor has it, else fp32 (never TF32)",
    )
    group.add_argument(
        "--compact_training",
        type=truth,
        nargs="?",
        const=True,
        default=True,
        help="train without the units that are held at zero: the same numbers up to rounding, in less time and memory",
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
        "--pruning_times", type=_COUNT, default=20, metavar="ROUNDS", help="rounds, the dense one included"
    )
    group.add_argument("--rate", type=_SHARE, default=0.2, help="share pruned by global L1, and share of heads")
    group.add_argument(
        "--rate_mode",
        choices=("round", "target"),
        help="rate is a share of what is left, or of the original (None: target with --vit_structured)",
    )
    group.add_argument(
        "--prune_type",
        choices=("lt", "pt", "rewind_lt"),
        default="lt",
        help="rewind to: initial weights; a pretrained backbone; the weights of --rewind_epoch",
    )
    group.add_argument("--rewind_epoch", type=_NATURAL, default=24, help="epoch of round 0 that rewind_lt returns to")
    group.add_argument(
        "--criteria",
        choices=CRITERIA,
        default="l1",
        help=_rows((n, c.summary) for n, c in CRITERIA.items()) + ". With --regroup, remain unless another is given",
    )
    group.add_argument(
        "--criteria_batches",
        type=_COUNT,
        default=CRITERIA_BATCHES,
        help="fixed batches that criteria on feature maps, SNIP and GraSP look at",
    )
    group.add_argument("--rank_weights", choices=("trained", "initial"), default="trained", help="what global L1 ranks")
    group.add_argument(
        "--fillback_rate",
        type=_CLOSED_SHARE,
        default=0.0,
        help="share of what would go that is kept (not by rsst)",
    )
    group.add_argument("--min_units", type=_NATURAL, default=0, help="units that every layer keeps at least")
    _flag(group, "conv1", "prune the stem too (first convolution; of a ViT the patch embedding, weight by weight)")
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help="as_documented: " + " ".join(f"{k}={v}" for k, v in PRESETS["as_documented"].items()),
    )


def _add_comparisons(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("one-shot pruners and controls")
    _flag(group, "regroup", "turn the mask of any method into whole units")
    group.add_argument("--admm_epochs", type=_COUNT, default=20, help="epochs of ADMM before each mask")
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
        help="folder of the finished run that --control compares with (None: where the same command without --control "
        "puts it)",
    )


def _add_vit(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ViT")
    _flag(group, "vit_structured", "prune whole heads and neurons; without it ViTs are pruned weight by weight")
    group.add_argument(
        "--vit_prune_target",
        type=_targets,
        default="head",
        metavar="UNITS",
        help="which units: head, mlp, both of them, block (whole attention and MLP branches), or several with commas",
    )
    group.add_argument("--mlp_prune_ratio", type=_SHARE, help="share of neurons (None: --rate)")
    group.add_argument("--block_prune_ratio", type=_SHARE, help="share of blocks (None: --rate)")
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
    group.add_argument("--exponents", type=POSITIVE, default=4, help="power in exp_custom_exponents")
    group.add_argument(
        "--reg_horizon", choices=("state", "epoch"), default="state", help="what K counts: a round or an epoch"
    )
    group.add_argument(
        "--reg_guard",
        type=truth,
        nargs="?",
        const=True,
        default=False,
        help="raise lambda only while delta * batch < 1, as the documents have it",
    )
    group.add_argument("--reg_upper_limit", type=_LIMIT, default=1.0, help="cap on lambda; inf for none")
    group.add_argument(
        "--penalty",
        choices=("auto", "gradient", "decoupled"),
        default="auto",
        help="gradient: add lambda * w to it; decoupled: w *= 1 - lambda * lr / peak lr; auto: gradient "
        "for sgd, decoupled for adamw",
    )
    group.add_argument(
        "--block_loss_grad",
        type=truth,
        nargs="?",
        const=True,
        default=False,
        help="doomed weights follow the penalty alone, not the loss",
    )
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
        type=_SHARE,
        default=0.01,
        metavar="SHARE",
        help="after an epoch, leave out the doomed units whose weights' norm is at most this share of the layer's when "
        "the round began (per weight); 0: never",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--save_dir", type=path_text, metavar="DIR", help="run folder (None: named after the settings)")
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
        type=_rounds_to_keep,
        metavar="ROUNDS",
        help="bound the disk space: keep checkpoints of only so many last rounds, and of round 0; masks and metrics "
        "stay (None: of all rounds)",
    )
    group.add_argument(
        "--print_freq", type=_COUNT, default=200, metavar="BATCHES", help="batches between lines in the log"
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
    group.add_argument("--exp_name", metavar="NAME", help="name of the run at WandB (None: made from the settings)")
    group.add_argument("--wandb_group", metavar="NAME", help="group of the run at WandB; sweeps set it to their name")
    group.add_argument("--wandb_tags", metavar="TAG,...", type=_words, default=(), help="tags of the run at WandB")
    _flag(group, "tensorboard", "also TensorBoard's event files, in tensorboard/ of the run folder")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check a command line; `-` is accepted for `_` in flags.

    The result also has `warnings` (list of sentences) and `explicit` (names of the flags that were given).

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
        whole_heads = args.vit_structured or (args.regroup and family_of(args.arch) == "vit")
        args.rate_mode = "target" if whole_heads else "round"
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
    _check(args, explicit)
    args.warnings, args.explicit = _warnings(args, explicit), sorted(explicit)
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


def _check(args: argparse.Namespace, explicit: set[str]) -> None:
    family = family_of(args.arch)
    known = MODELS.get(args.arch)
    rules = (
        (
            args.vit_structured and family == "cnn",
            f"argument --vit_structured: {args.arch} has no heads; choose a ViT or leave the flag out",
        ),
        (args.vit_pretrained and family == "cnn", f"argument --vit_pretrained: {args.arch} is not a ViT"),
        (
            args.vit_pretrained and not args.pretrained and (known is None or known.spec.pretrained is None),
            f"argument --vit_pretrained: no ImageNet weights fit {args.arch}; give a file by --pretrained",
        ),
        (
            args.prune_type == "pt" and not (args.pretrained or args.vit_pretrained),
            "argument --prune_type: pt needs weights: --pretrained FILE, or --vit_pretrained",
        ),
        (
            args.pretrained and args.prune_type != "pt" and not args.vit_pretrained,
            "argument --pretrained: only read by --prune_type pt or --vit_pretrained",
        ),
        (
            args.prune_type == "rewind_lt" and args.rewind_epoch >= args.epochs,
            f"argument --rewind_epoch: {args.rewind_epoch} is never reached in --epochs {args.epochs}; give less",
        ),
        (
            args.init and (args.prune_type == "pt" or args.vit_pretrained),
            "argument --init: not together with pretrained weights, which it would replace",
        ),
        (
            args.control != "none" and args.pruning_times < 2,
            "argument --control: needs --pruning_times 2 at least: round 0 is the dense network's",
        ),
        (
            args.control == "small_dense" and args.struct == "rsst" and args.rsst_dead == "free",
            "argument --control: small_dense has no use for --rsst_dead free, which would train the whole network",
        ),
        (
            args.tensorboard and find_spec("tensorboard") is None,
            "argument --tensorboard: needs the package tensorboard (pip install tensorboard)",
        ),
        (args.quiet and args.verbose, "argument --quiet: not together with --verbose"),
        (
            args.pretrained and not Path(args.pretrained).is_file(),
            f"argument --pretrained: no such file: {args.pretrained}",
        ),
        (
            args.checkpoint and not Path(args.checkpoint).is_file(),
            f"argument --checkpoint: no such file: {args.checkpoint}",
        ),
    )
    for broken, message in rules:
        if broken:
            raise UsageError(message)


def _prunes_units(args: argparse.Namespace) -> bool:
    regroups = METHODS[args.struct].regroups and (args.vit_structured or family_of(args.arch) != "vit")
    return bool(args.regroup or regroups)


def _prunes_heads_or_neurons(args: argparse.Namespace) -> bool:
    return _prunes_units(args) and family_of(args.arch) != "cnn"


# Flags that only some runs read: (flags, whether this run reads them, where they are read).
_READ_WHERE: tuple[tuple[tuple[str, ...], Callable[[argparse.Namespace], bool], str], ...] = (
    (("vit_structured",), lambda a: METHODS[a.struct].regroups, "with --struct refill or rsst (else: --regroup)"),
    (("regroup",), lambda a: not METHODS[a.struct].regroups, "by methods that do not regroup anyway"),
    (("vit_prune_target",), _prunes_heads_or_neurons, "with --vit_structured or --regroup"),
    (
        ("sorting_mode",),
        lambda a: _prunes_heads_or_neurons(a) and a.vit_prune_target != "block",
        "with --vit_structured or --regroup, for heads and neurons",
    ),
    (
        ("mlp_prune_ratio",),
        lambda a: _prunes_heads_or_neurons(a) and "neuron" in kinds_of(a.vit_prune_target),
        "with --vit_structured or --regroup, and --vit_prune_target mlp or both",
    ),
    (
        ("block_prune_ratio",),
        lambda a: _prunes_heads_or_neurons(a) and "block" in kinds_of(a.vit_prune_target),
        "with --vit_structured or --regroup, and --vit_prune_target block",
    ),
    (
        ("min_units",),
        lambda a: _prunes_units(a) and (family_of(a.arch) == "cnn" or a.vit_prune_target != "block"),
        "where channels, heads or neurons are pruned (--regroup; for a ViT under refill and rsst, --vit_structured)",
    ),
    (
        (
            "RST_schedule",
            "reg_granularity_prune",
            "reg_guard",
            "reg_upper_limit",
            "penalty",
            "block_loss_grad",
            "rsst_dead",
        ),
        lambda a: a.struct == "rsst",
        "with --struct rsst",
    ),
    (
        ("fade_out",),
        lambda a: a.struct == "rsst" and a.rsst_dead == "zero" and _prunes_units(a),
        "by --struct rsst with --rsst_dead zero, where whole units are pruned (for a ViT, --vit_structured)",
    ),
    (
        ("reg_target",),
        lambda a: a.struct == "rsst" and a.rsst_dead == "zero" and _prunes_units(a),
        "by --struct rsst with --rsst_dead zero, where whole units are pruned (for a ViT, --vit_structured)",
    ),
    (
        ("exponents",),
        lambda a: a.struct == "rsst" and a.RST_schedule == "exp_custom_exponents",
        "by --struct rsst with --RST_schedule exp_custom_exponents",
    ),
    (
        ("reg_horizon",),
        lambda a: a.struct == "rsst" and SCHEDULES[a.RST_schedule].cyclic,
        "by --struct rsst with the exp_custom schedules",
    ),
    (
        ("fillback_rate",),
        lambda a: a.struct == "refill" or (a.struct != "rsst" and a.regroup),
        "with --struct refill, or with --regroup",
    ),
    (("admm_epochs", "admm_rho"), lambda a: a.struct == "admm", "with --struct admm"),
    (("rank_weights",), lambda a: METHODS[a.struct].pruner == "l1", "with --struct refill, rsst or imp"),
    (("criteria",), lambda a: _prunes_units(a) or a.struct == "refill", "where whole units are pruned (--regroup)"),
    (("control_of",), lambda a: a.control != "none", "with --control"),
    (("rewind_epoch",), lambda a: a.prune_type == "rewind_lt", "with --prune_type rewind_lt"),
    (("fc",), lambda a: a.prune_type == "pt" or a.vit_pretrained, "with --prune_type pt or --vit_pretrained"),
    (
        ("criteria_batches",),
        lambda a: METHODS[a.struct].reads_batches or (_prunes_units(a) and CRITERIA[a.criteria].reads != "weights"),
        "by criteria l1, l2 and saliency, and by --struct snip and grasp",
    ),
    (("decreasing_lr",), lambda a: a.lr_schedule == "multistep", "with --lr_schedule multistep"),
)


def _warnings(args: argparse.Namespace, explicit: set[str]) -> list[str]:
    multistep, rsst = args.lr_schedule == "multistep", args.struct == "rsst"
    late = [m for m in args.decreasing_lr if multistep and m >= args.epochs]
    early = [m for m in args.decreasing_lr if multistep and m < min(args.warmup, args.epochs)]
    peak = _peak_strength(args)
    step = peak if args.penalty == "decoupled" else args.lr * peak / (1 - args.momentum)
    rules = (
        (late, f"--decreasing_lr: epoch {', '.join(map(str, late))} is not reached in --epochs {args.epochs}"),
        (early, f"--decreasing_lr: epoch {', '.join(map(str, early))} lies inside the warm-up and has no effect"),
        (args.warmup >= args.epochs, f"--warmup {args.warmup} is not over within --epochs {args.epochs}"),
        (rsst and step > 1 and not (args.penalty == "gradient" and OPTIMIZERS[args.optimizer].adaptive),
         f"the penalty may be unstable: it takes up to {step:.3g} of a weight in a step (above 1; it is lr * lambda "
         "/ (1 - momentum), or lambda if decoupled); lower --lr or --reg_upper_limit"),
        (rsst and family_of(args.arch) == "vit" and not _prunes_units(args),
         "without --vit_structured RSST has nothing to squeeze: this is unstructured magnitude pruning"),
        (args.preset == "as_documented" and rsst,
         "--preset as_documented is the documents' literal text: its penalty hardly acts (docs/deviations.md)"),
    )  # fmt: skip
    unread = [f"--{flag} is only read {where}: it has no effect here" for flag, where in unread_flags(args, explicit)]
    return [message for holds, message in rules if holds] + unread


def unread_flags(args: argparse.Namespace, explicit: Iterable[str]) -> list[tuple[str, str]]:
    """Those of the explicit flags that this run does not read, and where they are read."""
    rows = ((flag, where) for flags, reads, where in _READ_WHERE if not reads(args) for flag in flags)
    return [(flag, where) for flag, where in rows if flag in set(explicit)]


def _peak_strength(args: argparse.Namespace) -> float:
    """The largest lambda that the schedule can reach within a round of many steps."""
    return clock_from(args).strength(args.epochs - 1, 999, 1000)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as plain values, for `args.yaml`, checkpoints and trackers."""
    plain = {k: v for k, v in vars(args).items() if k not in ("warnings", "explicit")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def identity_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, as far as they are not the parser's defaults.

    So a flag that is added later does not make strangers of older runs.
    """
    defaults = settings_of(build_parser().parse_args([]))
    return {k: v for k, v in settings.items() if k not in NOT_IDENTITY and v != defaults.get(k)}


def identity_of_round_0(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that decide what round 0 computes, as far as they are not the parser's defaults.

    Files of initial weights are not among them: what they hold counts. Nor are the kernels' flags, see `numerics`.
    """
    unread = AFTER_ROUND_0 | {"init", "pretrained"}
    return {k: v for k, v in identity_of(settings_of(args)).items() if k not in unread}


def default_run_folder(args: argparse.Namespace) -> str:
    """`<dataset>_<struct>_output_<arch>_<...>_<hash>`: the same settings give the same folder, others another."""
    identity = identity_of(settings_of(args))
    if args.dataset == "imagefolder":
        identity["data"] = str(Path(args.data).resolve())
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    tied = (args.vit_structured or args.regroup) and _prunes_heads_or_neurons(args)
    target = [args.vit_prune_target] if tied else []
    target += ["regroup"] if args.regroup else []
    criterion = [args.criteria] if _prunes_units(args) or args.struct == "refill" else []
    control = [args.control] if args.control != "none" else []
    parts = [_short(args.arch), *target, *criterion, f"rate{args.rate:g}", *control, f"seed{args.seed}", digest]
    return f"{args.dataset}_{args.struct}_output_{'_'.join(parts)}"


def _short(arch: str) -> str:
    """A network's name without the folders of its file, fit for a file name."""
    return re.sub(r"[^\w.-]+", "-", Path(arch).name if ":" in arch else arch)


def tracker_name(args: argparse.Namespace, time_stamp: str) -> str:
    """The documents' run name for WandB."""
    if args.exp_name:
        return str(args.exp_name)
    parts = [args.struct, _short(args.arch), args.dataset]
    if args.struct == "rsst":
        parts += [f"sched_{args.RST_schedule}", f"reg_{args.reg_granularity_prune}"]
        parts += [f"exp{args.exponents:g}"] if args.RST_schedule == "exp_custom_exponents" else []
    elif args.struct == "refill":
        parts.append(f"fill_{args.fillback_rate}")
    parts += [f"crit_{args.criteria}", f"rate_{args.rate}"]
    parts += ["pretrained"] if args.pretrained or args.vit_pretrained else []
    parts += [f"struct_{args.vit_prune_target}"] if args.vit_structured else []
    parts += ["regroup"] if args.regroup else []
    parts += [args.control] if args.control != "none" else []
    return "_".join([*parts, time_stamp])
