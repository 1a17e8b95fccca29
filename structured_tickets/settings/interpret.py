"""Turn a command line into values that know nothing of it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn, optim

from structured_tickets.base.errors import UsageError
from structured_tickets.base.text_tables import counted, some_of
from structured_tickets.networks.registry import spec_of
from structured_tickets.pruning.budgets import kept_count
from structured_tickets.pruning.methods import CONTROLS, METHODS
from structured_tickets.pruning.rules import TARGET_KINDS, RoundRules, kinds_of
from structured_tickets.pruning.usable_units import FROZEN, UsableUnits, in_words, usable_units
from structured_tickets.settings.conditions import channel_units_of, penalty_before
from structured_tickets.settings.flag_table import PENALTY_CHOSEN
from structured_tickets.training.optimization import OPTIMIZERS, LearningRate
from structured_tickets.training.penalty.expected import WAYS, expected_squeeze, way_of_acting
from structured_tickets.training.penalty.schedules import SCHEDULES, clock_from
from structured_tickets.training.rounds import GIVEN
from structured_tickets.unit_groups.find import is_transformer
from structured_tickets.unit_groups.kinds import FILTER, KINDS, kind_of
from structured_tickets.unit_groups.unit import UnitGroup, kinds, parameter_of, ranked_names

LITTLE = 0.5  # of the parameters
MUCH = 0.5  # of a round


def units_from(args: argparse.Namespace, model: nn.Module, image_size: int) -> UsableUnits:
    """Find the units that the arguments ask for.

    Raises:
        UsageError: The network has none, or not the kinds that are to be pruned; or nothing of it is trained.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            f"argument --arch: all parameters of {args.arch} are {FROZEN}. Leave some of them to be trained"
        )
    needed = _are_units_needed(args, is_transformer(model))
    usable = usable_units(
        model,
        image_size,
        needed=needed,
        stem=args.conv1,
        blocks=any(KINDS[k].holds_units for k in kinds_of(args.vit_prune_target)),
    )
    if not usable.groups:
        raise UsageError(
            f"argument --arch: {args.arch} has no layers that can be pruned{_what_to_change(usable, needed)}"
        )
    if args.vit_structured and "channel" in kinds(usable.groups):
        raise UsageError(
            f"argument --vit_structured: {args.arch} has no attention heads. Choose a ViT, or omit this flag"
        )
    _check_targets(args, usable.groups)
    return usable


def _are_units_needed(args: argparse.Namespace, transformer: bool) -> bool:
    """Return whether whole units are to be pruned; if masks are element-wise, nothing has to be removed."""
    regroups = args.regroup or (METHODS[args.struct].regroups and (args.vit_structured or not transformer))
    return regroups or CONTROLS[args.control].masks == "narrow"


def _what_to_change(usable: UsableUnits, needed: bool) -> str:
    """Return the end of a sentence about a network without layers to prune."""
    if frozen := [layer for layer, reason in usable.whole.items() if reason == FROZEN]:
        return f". {FROZEN[0].upper()}{FROZEN[1:]}: {some_of(frozen)}. Unfreeze the layers that are to be pruned"
    if not needed:
        return ": it has no convolution or linear layer with a weight of its own, besides the first and the last one"
    said = "".join(f". Of its layers {line}" for line in in_words(usable.whole, ""))
    return (
        " as whole units, which are the channels of convolutions, attention heads and MLP neurons"
        f"{said}. To prune its weights one by one, use --struct imp"
    )


def _check_targets(args: argparse.Namespace, groups: Sequence[UnitGroup]) -> None:
    """Refuse kinds of unit of which the network has none; warn if it has some of those that are asked for.

    Raises:
        UsageError: It has none of them; the message says what to choose instead.
    """
    rules, found = rules_from(args, groups), [kind for kind in kinds(groups) if not kind_of(kind).by_weight]
    missing = [kind for kind in rules.targets if rules.structured and kind not in found]
    if not missing:
        return
    only = f", only {', '.join(f'{kind}s' for kind in found)}" if found else ""
    words = f"{args.arch} has no {missing[0]}s that can be pruned{only}"
    if set(missing) < set(rules.targets):
        args.warnings.append(f"--vit_prune_target {args.vit_prune_target}: {words}")
        return
    choices = [target for target, row in TARGET_KINDS.items() if set(row) <= set(found)]
    choice = f"Choose {' or '.join(choices)}" if choices else "To prune weights one by one, omit --vit_structured"
    raise UsageError(f"argument --vit_prune_target: {words}. {choice}")


def rules_from(args: argparse.Namespace, groups: Sequence[UnitGroup]) -> RoundRules:
    """The pruning rules that the arguments ask for."""
    is_cnn = "channel" in kinds(groups)
    structured = args.regroup or (METHODS[args.struct].regroups and (args.vit_structured or is_cnn))
    targets = ("channel",) if is_cnn else kinds_of(args.vit_prune_target)
    units = channel_units_of(vars(args)) if is_cnn else FILTER
    found: dict[str, Any] = {"structured": structured, "targets": targets, "channel_units": units}
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
    if spec_of(model).outputs > 1:
        said.append(
            f"the network gives {spec_of(model).outputs} outputs while it trains. The first one is taken for the "
            "logits, and nothing is learned from the others"
        )
    if rules.method.regroups and not rules.structured:
        if rules.method.squeezes:
            does = "RSST without --vit_structured prunes single weights by magnitude and penalises nothing"
        else:
            does = "Refill without --vit_structured prunes single weights, which hardly makes the network smaller"
        said.append(f"{does}. Add --vit_structured --vit_prune_target both, or use --struct imp")
    return said


def _warnings_of_few_units(rules: RoundRules, groups: Sequence[UnitGroup]) -> list[str]:
    ranked = [g for g in groups if rules.structured and g.kind in rules.targets and not kind_of(g.kind).holds_units]
    spared = [g for g in ranked if g.units <= rules.min_units]
    if not spared:
        return []
    return [
        f"--min_units {rules.min_units}: nothing will be pruned in {len(spared)} of {counted(len(ranked), 'layer')}, "
        "because they have no more units than that"
    ]


def warnings_of_fillback(rules: RoundRules, groups: Sequence[UnitGroup], rounds: int) -> list[str]:
    """A sentence for each kind of unit of which `--fillback_rate` keeps none, because it is less than one unit."""
    if not rules.structured or rules.method.squeezes or not rules.fillback_rate or "channel" in rules.targets:
        return []
    said, without = [], replace(rules, fillback_rate=0.0)
    for kind in rules.targets:
        sizes = [g.units for g in groups if g.kind == kind]
        everywhere = rules.sorting_mode == "global" or kind_of(kind).holds_units
        if not sizes or _kept(rules, kind, sizes, everywhere, rounds) != _kept(
            without, kind, sizes, everywhere, rounds
        ):
            continue
        acts = _kept(rules, kind, sizes, True, rounds) != _kept(without, kind, sizes, True, rounds)
        number = counted(sum(sizes) if everywhere else max(sizes), kind)
        said.append(
            f"--fillback_rate {rules.fillback_rate:g} keeps no {kind} that would be pruned without it: of {number} "
            f"{'in the network' if everywhere else 'in a layer'}, it is less than one. "
            + ("Use --sorting_mode global, or omit the flag" if acts and not everywhere else "Omit the flag")
        )
    return said


def _kept(rules: RoundRules, kind: str, sizes: Sequence[int], everywhere: bool, rounds: int) -> list[list[int]]:
    """Return the number of kept units of a kind, by round and by layer, or in the network."""
    pools = [sum(sizes)] if everywhere else sizes
    ratios = [rules.share(rules.ratios[kind], k) * (1 - rules.fillback_rate) for k in range(rounds - 1)]
    return [[kept_count(units, ratio) for units in pools] for ratio in ratios]


def settle_penalty(args: argparse.Namespace, rules: RoundRules, rate: LearningRate) -> None:
    """Replace `--penalty auto` by how the penalty acts in rounds of this length.

    The arguments also say from now on whether it was chosen here.
    """
    vars(args)[PENALTY_CHOSEN] = args.penalty == "auto"
    if args.penalty != "auto":
        return
    if rules.method.squeezes and rules.structured:
        adaptive = OPTIMIZERS[args.optimizer].adaptive
        args.penalty = way_of_acting(clock_from(args), rate, args.momentum, adaptive)
    else:
        args.penalty = penalty_before(args)


def about_the_penalty(args: argparse.Namespace, rate: LearningRate) -> str:
    """Return a sentence on how the penalty acts, and why, where that was chosen and is not the usual way."""
    usual = penalty_before(args)
    if not vars(args)[PENALTY_CHOSEN] or args.penalty == usual:
        return ""
    left = expected_squeeze(clock_from(args), rate, args.momentum, usual)
    return (
        f"penalty: {args.penalty} ({WAYS[args.penalty]}). In rounds this short, --penalty {usual} would leave about "
        f"{left:.0%} of each doomed weight"
    )


def warnings_of_lambda(args: argparse.Namespace, batches: int) -> list[str]:
    """Sentences about a schedule that is no choice: another one gives the same lambda, or the cap makes it a constant.

    Args:
        batches: Number of batches in an epoch.
    """
    clock, said = clock_from(args), []
    curve, others = clock.curve(batches), [name for name in SCHEDULES if name != clock.schedule]
    same = [n for n in others if _are_close(replace(clock, schedule=n).curve(batches), curve)]
    if same:
        names = " and ".join([", ".join(same[:-1])] * (len(same) > 1) + same[-1:])
        said.append(f"--RST_schedule {clock.schedule}: lambda is the same as with {names} in this run")
    capped = clock.capped_share(batches)
    if capped > MUCH:
        said.append(
            f"--reg_upper_limit {clock.upper_limit:g} caps lambda for {capped:.0%} of each round, so that it is the "
            "same constant whatever the schedule. Use a lower --reg_granularity_prune, or a higher --reg_upper_limit"
        )
    return said


def warnings_of_warmup(args: argparse.Namespace, batches: int) -> list[str]:
    """A sentence if the warm-up, counted in steps, takes up a whole round; `batches`: of an epoch."""
    steps = args.epochs * batches
    if args.warmup_steps is None or args.warmup_steps < steps or args.round_0 == GIVEN:
        return []
    return [
        f"--warmup_steps {args.warmup_steps} takes up the whole round ({counted(steps, 'step')}). Use a shorter warm-up"
    ]


def _are_close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(one, other, strict=True))


def optimizer_from(args: argparse.Namespace, model: nn.Module) -> optim.Optimizer:
    special = {"nesterov": args.nesterov, "decay_matrices_only": args.no_decay_on_bias_and_norm}
    return OPTIMIZERS[args.optimizer].build(model, args.lr, args.momentum, args.weight_decay, **special)


def loss_from(args: argparse.Namespace) -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
