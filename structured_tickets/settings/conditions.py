"""Conditions under which runs read a flag: tests on the arguments, and the words that tell a user about them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from structured_tickets.networks import family_of
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.methods import METHODS
from structured_tickets.pruning.rules import kinds_of
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.penalty.expected import DECOUPLED, GRADIENT
from structured_tickets.training.rounds import FINETUNE
from structured_tickets.training.teachers import NONE
from structured_tickets.unit_groups.kinds import FILTER, STREAM


@dataclass(frozen=True)
class Condition:
    """The runs that read a flag.

    Attributes:
        holds: Arguments, all of them settled -> True if this run reads the flag.
        where: The end of "it is only used ...".
    """

    holds: Callable[[argparse.Namespace], bool]
    where: str


def prunes_units(args: argparse.Namespace) -> bool:
    """True if whole units are pruned."""
    regroups = METHODS[args.struct].regroups and (args.vit_structured or family_of(args.arch) != "vit")
    return bool(args.regroup or regroups)


def prunes_transformer_units(args: argparse.Namespace) -> bool:
    """True if heads, neurons or blocks are pruned."""
    return prunes_units(args) and family_of(args.arch) != "cnn"


def prunes_kind(args: argparse.Namespace, *kinds: str) -> bool:
    """True if units of one of these kinds are pruned: head, neuron, block."""
    return prunes_transformer_units(args) and not set(kinds).isdisjoint(kinds_of(args.vit_prune_target))


def counts_units_by_layer(args: argparse.Namespace) -> bool:
    """True if units are pruned of which a layer has several: channels, heads or neurons."""
    return prunes_kind(args, "head", "neuron") or (prunes_units(args) and family_of(args.arch) == "cnn")


def prunes_channels(args: argparse.Namespace) -> bool:
    """True if whole channels are pruned, as far as the name of the network tells."""
    return prunes_units(args) and family_of(args.arch) != "vit"


def channel_units_of(settings: Mapping[str, Any]) -> str:
    """Return what a channel is, as a unit, in a run of these settings, which may be those of an earlier version."""
    wanted = settings.get("channel_units", FILTER)
    return STREAM if wanted == STREAM and prunes_channels(argparse.Namespace(**settings)) else FILTER


def shrinks_units(args: argparse.Namespace) -> bool:
    """True if RSST's penalty acts on whole units, beside which weights are held at zero."""
    return args.struct == "rsst" and args.rsst_dead == "zero" and prunes_units(args)


def penalty_of_flags(args: argparse.Namespace) -> str:
    """Return how the penalty acts where the flags do not say it: "auto", which also asks for the length of a round."""
    return penalty_before(args) if args.preset == "as_documented" else "auto"


def penalty_before(args: argparse.Namespace) -> str:
    """Return what `--penalty auto` meant before 0.2, however short the rounds."""
    return DECOUPLED if OPTIMIZERS[args.optimizer].adaptive else GRADIENT


def reads_batches(args: argparse.Namespace) -> bool:
    """True if the method, or the criterion that ranks its units, looks at images."""
    ranks_by_images = prunes_units(args) and CRITERIA[args.criteria].reads != "weights"
    return METHODS[args.struct].reads_batches or ranks_by_images


WITH_RSST = Condition(lambda a: a.struct == "rsst", "with --struct rsst")
WITH_TEACHER = Condition(lambda a: a.distill != NONE, "with --distill")
WITH_SGD = Condition(lambda a: a.optimizer == "sgd", "with --optimizer sgd")
WITH_FINETUNING = Condition(lambda a: a.prune_type == FINETUNE, "with --prune_type finetune")
WITH_ADMM = Condition(lambda a: a.struct == "admm", "with --struct admm")
WHERE_UNITS_SHRINK = Condition(
    shrinks_units,
    "with --struct rsst --rsst_dead zero, when whole units are pruned (for a ViT: --vit_structured)",
)
