"""Flags that do not go together, or that a run does not read: what the user is told before anything begins."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from structured_tickets.base.errors import UsageError
from structured_tickets.base.text_tables import counted
from structured_tickets.networks import MODELS, family_of
from structured_tickets.pruning.methods import CONTROLS
from structured_tickets.settings.conditions import penalty_before
from structured_tickets.settings.flag_table import FLAGS
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.penalty.expected import GRADIENT
from structured_tickets.training.penalty.schedules import clock_from
from structured_tickets.training.rounds import FINETUNE, GIVEN, epochs_of
from structured_tickets.training.teachers import DENSE, NONE, parts_of

Rules = Sequence[tuple[Any, str]]  # true if a rule is broken, and what is said then


def check(args: argparse.Namespace) -> None:
    """Raises: UsageError, for flags that do not go together, and files that are not there."""
    for broken, message in (
        *_about_the_network(args),
        *_about_rounds(args),
        *_about_the_rest(args),
        *_about_files(args),
    ):
        if broken:
            raise UsageError(message)


def _about_the_network(args: argparse.Namespace) -> Rules:
    family = family_of(args.arch)
    known = MODELS.get(args.arch)
    return (
        (
            args.vit_structured and family == "cnn",
            f"argument --vit_structured: {args.arch} has no attention heads. Choose a ViT, or omit this flag",
        ),
        (
            args.drop_path and (known is None or not known.spec.branches),
            f"argument --drop_path: {args.arch} is not one of this program's Vision Transformers or ResNets. "
            "Use --drop_path 0",
        ),
        (args.vit_pretrained and family == "cnn", f"argument --vit_pretrained: {args.arch} is not a ViT"),
        (
            args.vit_pretrained and not args.pretrained and (known is None or known.spec.pretrained is None),
            f"argument --vit_pretrained: no ImageNet weights fit {args.arch}. Give a file with --pretrained",
        ),
        (
            args.prune_type == "pt" and not (args.pretrained or args.vit_pretrained),
            "argument --prune_type: pt needs weights: --pretrained FILE, or --vit_pretrained",
        ),
        (
            args.pretrained and args.prune_type != "pt" and not args.vit_pretrained and args.round_0 != GIVEN,
            "argument --pretrained: only used with --round_0 given, --prune_type pt or --vit_pretrained",
        ),
    )


def _about_rounds(args: argparse.Namespace) -> Rules:
    return (
        (
            args.prune_type == "rewind_lt" and args.rewind_epoch >= args.epochs,
            f"argument --rewind_epoch: a round has only epochs 0 to {args.epochs - 1} (--epochs {args.epochs}). "
            "Choose one of them",
        ),
        (
            args.tail_epochs and args.prune_type == "lt",
            "argument --tail_epochs: cannot be combined with --prune_type lt, whose rounds start with weights that "
            "nothing has trained. Use rewind_lt or lrr",
        ),
        (
            args.tail_epochs and args.prune_type == FINETUNE,
            "argument --tail_epochs: cannot be combined with --prune_type finetune. Use --finetune_epochs",
        ),
        (
            args.nesterov and args.optimizer == "sgd" and not args.momentum,
            "argument --nesterov: needs --momentum above 0",
        ),
        (
            args.round_0 == GIVEN and not (args.pretrained or args.vit_pretrained),
            "argument --round_0: given needs the weights of a trained network: --pretrained FILE",
        ),
        (
            args.round_0 == GIVEN and args.prune_type == "rewind_lt",
            "argument --round_0: given cannot be combined with --prune_type rewind_lt, since round 0 has no epochs to "
            "return to. Use finetune or lrr",
        ),
        (
            (args.tail_epochs or 0) > args.epochs,
            f"argument --tail_epochs: a round has only {counted(args.epochs, 'epoch')} (--epochs)",
        ),
        (
            (args.tail_epochs or args.prune_type == FINETUNE) and CONTROLS[args.control].fresh,
            f"argument --control: {args.control} cannot be combined with --tail_epochs or --prune_type finetune: it "
            "trains a new network, for which their schedule is too short. Use random_structure",
        ),
    )


def _about_the_rest(args: argparse.Namespace) -> Rules:
    return (
        (
            args.init and (args.prune_type == "pt" or args.vit_pretrained or args.round_0 == GIVEN),
            "argument --init: cannot be combined with pretrained weights. Use one of the two",
        ),
        (
            args.control != "none" and args.pruning_times < 2,
            "argument --control: needs at least --pruning_times 2, because round 0 is the dense network",
        ),
        (
            args.control == "small_dense" and args.struct == "rsst" and args.rsst_dead == "free",
            "argument --control: small_dense cannot be combined with --rsst_dead free, which would train the whole "
            "network",
        ),
        (
            args.tensorboard and find_spec("tensorboard") is None,
            "argument --tensorboard: needs the package tensorboard (pip install tensorboard)",
        ),
        (
            args.repeated_augment > max(1, args.batch_size * args.accumulate // 2),
            f"argument --repeated_augment: {args.repeated_augment} times leaves one image in a batch of "
            f"{counted(args.batch_size * args.accumulate, 'image')}. Use at most half of --batch_size",
        ),
        (args.quiet and args.verbose, "argument --quiet: cannot be combined with --verbose"),
    )


def _about_files(args: argparse.Namespace) -> Rules:
    return (
        (
            args.distill not in (NONE, DENSE) and not Path(parts_of(args.distill)[1]).is_file(),
            f"argument --distill: no such file: {parts_of(args.distill)[1]}. Or: none, dense",
        ),
        (
            args.pretrained and not Path(args.pretrained).is_file(),
            f"argument --pretrained: no such file: {args.pretrained}",
        ),
        (
            args.checkpoint and not Path(args.checkpoint).is_file(),
            f"argument --checkpoint: no such file: {args.checkpoint}",
        ),
    )


def warnings_about(args: argparse.Namespace, explicit: set[str]) -> list[str]:
    """Sentences about what has no effect, or a bad one. `explicit`: names of the flags that were given."""
    multistep, rsst = args.lr_schedule == "multistep", args.struct == "rsst"
    trains_dense = args.round_0 != GIVEN or args.prune_type != FINETUNE  # a round by --epochs, --warmup and --lr
    multistep = multistep and trains_dense
    late = [m for m in args.decreasing_lr if multistep and m >= args.epochs]
    warmup = args.warmup if args.warmup_steps is None and trains_dense else 0
    early = [m for m in args.decreasing_lr if multistep and m < min(warmup, args.epochs)]
    peak = _peak_strength(args)
    way = penalty_before(args) if args.penalty == "auto" else args.penalty
    lr = (args.finetune_lr or args.lr / 10) if args.prune_type == FINETUNE else args.lr
    step = lr * peak / (1 - args.momentum) if way == GRADIENT else peak
    rules = (
        (
            late and "decreasing_lr" in explicit,
            f"--decreasing_lr: no effect at {', '.join(map(str, late))}: each round ends after "
            f"{counted(args.epochs, 'epoch')} (--epochs)",
        ),
        (
            early and explicit & {"decreasing_lr", "warmup"},
            f"--decreasing_lr: no effect at {', '.join(map(str, early))}: the warm-up ends at epoch {args.warmup}",
        ),
        (
            late == list(args.decreasing_lr) != [] and "decreasing_lr" not in explicit,
            f"the learning rate does not fall within a round of {counted(args.epochs, 'epoch')}: --decreasing_lr is "
            f"{','.join(map(str, late))} unless it is given. Give epochs below {args.epochs}, or --lr_schedule cosine",
        ),
        (
            warmup >= args.epochs,
            f"--warmup {args.warmup} takes up the whole round (--epochs {args.epochs}). Use a shorter warm-up",
        ),
        (
            rsst and step > 1 + 1e-9 and not (way == GRADIENT and OPTIMIZERS[args.optimizer].adaptive),
            f"the penalty may be unstable: one step can change a doomed weight by {step:.3g} times its size (stable: "
            "at most 1). Lower --reg_upper_limit, or --lr unless the penalty is decoupled",
        ),
        (
            args.rate_mode == "target" and args.pruning_times > 2 and args.rate > 0,
            f"--rate_mode target: rounds 1 to {args.pruning_times - 1} all have the same density, because --rate is a "
            "share of the original network. For a network that becomes smaller in every round, use --rate_mode round",
        ),
        (
            args.preset == "as_documented" and rsst,
            "--preset as_documented: with these original settings the penalty has almost no effect (see "
            "docs/deviations.md)",
        ),
    )
    unread = [
        f"--{flag} has no effect in this run: it is only used {where}" for flag, where in unread_flags(args, explicit)
    ]
    return [message for holds, message in rules if holds] + unread


def unread_flags(args: argparse.Namespace, explicit: Iterable[str]) -> list[tuple[str, str]]:
    """Those of the explicit flags that this run does not read, in the table's order, and where they are read."""
    given = set(explicit)
    return [(f.name, f.read.where) for f in FLAGS.values() if f.name in given and f.read and not f.read.holds(args)]


def _peak_strength(args: argparse.Namespace) -> float:
    """The largest lambda that the schedule can reach within a round of many steps."""
    return clock_from(args).strength(epochs_of(args, 1)[-1], 999, 1000)
