"""What a command line asks for, as values that know nothing of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import nn, optim

from structured_tickets.base.errors import UsageError
from structured_tickets.networks import MODELS
from structured_tickets.pruning.methods import METHODS
from structured_tickets.pruning.rules import TARGET_KINDS, RoundRules, kinds_of
from structured_tickets.shrinking.trial import check_units
from structured_tickets.training.optimization import OPTIMIZERS, LearningRate
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.kinds import KINDS, kind_of
from structured_tickets.unit_groups.unit import UnitGroup, kinds, parameter_of, ranked_names

LITTLE = 0.5  # of the parameters


def groups_from(args: argparse.Namespace, model: nn.Module, image_size: int) -> list[UnitGroup]:
    """The unit groups that the arguments ask for.

    Raises:
        UsageError: The network has none, or not the kinds that are to be pruned.
    """
    groups = unit_groups(model, args.conv1, any(KINDS[k].holds_units for k in kinds_of(args.vit_prune_target)))
    found, rules = kinds(groups), rules_from(args, groups)
    if not groups:
        raise UsageError(f"argument --arch: {args.arch} has no layers that can be pruned")
    if args.vit_structured and "channel" in found:
        raise UsageError(
            f"argument --vit_structured: {args.arch} has no attention heads. Choose a ViT, or omit this flag"
        )
    missing = [kind for kind in rules.targets if rules.structured and kind not in found]
    if missing:
        choices = [target for target, row in TARGET_KINDS.items() if set(row) <= set(found)]
        raise UsageError(
            f"argument --vit_prune_target: {args.arch} has no {missing[0]}s that can be pruned, only "
            f"{', '.join(f'{kind}s' for kind in found)}. Choose {' or '.join(choices)}"
        )
    if args.arch not in MODELS:
        check_units(model, groups, image_size)
    return groups


def rules_from(args: argparse.Namespace, groups: Sequence[UnitGroup]) -> RoundRules:
    """The pruning rules that the arguments ask for."""
    is_cnn = "channel" in kinds(groups)
    structured = args.regroup or (METHODS[args.struct].regroups and (args.vit_structured or is_cnn))
    targets = ("channel",) if is_cnn else kinds_of(args.vit_prune_target)
    found: dict[str, Any] = {"structured": structured, "targets": targets}
    named = (field.name for field in fields(RoundRules) if field.name not in found)
    return RoundRules(**{name: getattr(args, name) for name in named}, **found)


def warnings_for(rules: RoundRules, model: nn.Module, groups: Sequence[UnitGroup]) -> list[str]:
    """Sentences about rules that this network makes pointless, or that reach little of it."""
    said = _warnings_of_few_units(rules, groups)
    reached = sum(parameter_of(model, name).numel() for name in ranked_names(model, groups))
    share = reached / sum(p.numel() for p in model.parameters())
    if share < LITTLE:
        said.append(
            f"only {share:.0%} of the parameters are in layers that can be pruned. Rates and densities refer to these "
            "parameters only"
        )
    if rules.method.squeezes and not rules.structured:
        said.append(
            "RSST without --vit_structured prunes single weights by magnitude and penalises nothing. Add "
            "--vit_structured, or use --struct imp"
        )
    return said


def _warnings_of_few_units(rules: RoundRules, groups: Sequence[UnitGroup]) -> list[str]:
    ranked = [g for g in groups if rules.structured and g.kind in rules.targets and not kind_of(g.kind).holds_units]
    spared = [g for g in ranked if g.units <= rules.min_units]
    if not spared:
        return []
    return [
        f"--min_units {rules.min_units}: nothing will be pruned in {len(spared)} of {len(ranked)} layers, because they "
        "have no more units than that"
    ]


def optimizer_from(args: argparse.Namespace, model: nn.Module) -> optim.Optimizer:
    return OPTIMIZERS[args.optimizer].build(model, args.lr, args.momentum, args.weight_decay)


def learning_rate_from(args: argparse.Namespace, steps: int) -> LearningRate:
    """The learning rate of a round with so many steps in an epoch."""
    return LearningRate(args.lr, args.epochs, steps, args.warmup, args.lr_schedule, args.decreasing_lr)


def loss_from(args: argparse.Namespace) -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
