"""Flags that do not go together, or that a run does not read: what the user is told before anything begins."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from structured_tickets.base.errors import UsageError
from structured_tickets.networks import MODELS, family_of
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.methods import METHODS
from structured_tickets.pruning.rules import kinds_of
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.penalty.schedules import SCHEDULES, clock_from


def check(args: argparse.Namespace) -> None:
    """Raises: UsageError, for flags that do not go together, and files that are not there."""
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


def prunes_units(args: argparse.Namespace) -> bool:
    """Whether whole units are dropped."""
    regroups = METHODS[args.struct].regroups and (args.vit_structured or family_of(args.arch) != "vit")
    return bool(args.regroup or regroups)


def prunes_heads_or_neurons(args: argparse.Namespace) -> bool:
    """Whether units of a Transformer are dropped."""
    return prunes_units(args) and family_of(args.arch) != "cnn"


# Flags that only some runs read: (flags, whether this run reads them, where they are read).
_READ_WHERE: tuple[tuple[tuple[str, ...], Callable[[argparse.Namespace], bool], str], ...] = (
    (("vit_structured",), lambda a: METHODS[a.struct].regroups, "with --struct refill or rsst (else: --regroup)"),
    (("regroup",), lambda a: not METHODS[a.struct].regroups, "by methods that do not regroup anyway"),
    (("vit_prune_target",), prunes_heads_or_neurons, "with --vit_structured or --regroup"),
    (
        ("sorting_mode",),
        lambda a: prunes_heads_or_neurons(a) and a.vit_prune_target != "block",
        "with --vit_structured or --regroup, for heads and neurons",
    ),
    (
        ("mlp_prune_ratio",),
        lambda a: prunes_heads_or_neurons(a) and "neuron" in kinds_of(a.vit_prune_target),
        "with --vit_structured or --regroup, and --vit_prune_target mlp or both",
    ),
    (
        ("block_prune_ratio",),
        lambda a: prunes_heads_or_neurons(a) and "block" in kinds_of(a.vit_prune_target),
        "with --vit_structured or --regroup, and --vit_prune_target block",
    ),
    (
        ("min_units",),
        lambda a: prunes_units(a) and (family_of(a.arch) == "cnn" or a.vit_prune_target != "block"),
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
        lambda a: a.struct == "rsst" and a.rsst_dead == "zero" and prunes_units(a),
        "by --struct rsst with --rsst_dead zero, where whole units are pruned (for a ViT, --vit_structured)",
    ),
    (
        ("reg_target",),
        lambda a: a.struct == "rsst" and a.rsst_dead == "zero" and prunes_units(a),
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
    (("criteria",), lambda a: prunes_units(a) or a.struct == "refill", "where whole units are pruned (--regroup)"),
    (("control_of",), lambda a: a.control != "none", "with --control"),
    (("rewind_epoch",), lambda a: a.prune_type == "rewind_lt", "with --prune_type rewind_lt"),
    (("fc",), lambda a: a.prune_type == "pt" or a.vit_pretrained, "with --prune_type pt or --vit_pretrained"),
    (
        ("criteria_batches",),
        lambda a: METHODS[a.struct].reads_batches or (prunes_units(a) and CRITERIA[a.criteria].reads != "weights"),
        "by criteria l1, l2 and saliency, and by --struct snip and grasp",
    ),
    (("decreasing_lr",), lambda a: a.lr_schedule == "multistep", "with --lr_schedule multistep"),
)


def warnings_about(args: argparse.Namespace, explicit: set[str]) -> list[str]:
    """Sentences about what has no effect, or a bad one. `explicit`: names of the flags that were given."""
    multistep, rsst = args.lr_schedule == "multistep", args.struct == "rsst"
    late = [m for m in args.decreasing_lr if multistep and m >= args.epochs]
    early = [m for m in args.decreasing_lr if multistep and m < min(args.warmup, args.epochs)]
    peak = _peak_strength(args)
    step = peak if args.penalty == "decoupled" else args.lr * peak / (1 - args.momentum)
    rules = (
        (late, f"--decreasing_lr: epoch {', '.join(map(str, late))} is not reached in --epochs {args.epochs}"),
        (early, f"--decreasing_lr: epoch {', '.join(map(str, early))} lies inside the warm-up and has no effect"),
        (args.warmup >= args.epochs, f"--warmup {args.warmup} is not over within --epochs {args.epochs}"),
        (
            rsst and step > 1 and not (args.penalty == "gradient" and OPTIMIZERS[args.optimizer].adaptive),
            f"the penalty may be unstable: it takes up to {step:.3g} of a weight in a step (above 1; it is lr * lambda "
            "/ (1 - momentum), or lambda if decoupled); lower --lr or --reg_upper_limit",
        ),
        (
            args.preset == "as_documented" and rsst,
            "--preset as_documented is the documents' literal text: its penalty hardly acts (docs/deviations.md)",
        ),
    )
    unread = [f"--{flag} is only read {where}: it has no effect here" for flag, where in unread_flags(args, explicit)]
    return [message for holds, message in rules if holds] + unread


def unread_flags(args: argparse.Namespace, explicit: Iterable[str]) -> list[tuple[str, str]]:
    """Those of the explicit flags that this run does not read, and where they are read."""
    rows = ((flag, where) for flags, reads, where in _READ_WHERE if not reads(args) for flag in flags)
    return [(flag, where) for flag, where in rows if flag in set(explicit)]


def _peak_strength(args: argparse.Namespace) -> float:
    """The largest lambda that the schedule can reach within a round of many steps."""
    return clock_from(args).strength(args.epochs - 1, 999, 1000)
