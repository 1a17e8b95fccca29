"""`structured_tickets.regroup`: rank weights by global L1, score units, and keep the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from structured_tickets.base.errors import BadType, BadValue
from structured_tickets.interface.arguments import natural, one_of, share
from structured_tickets.interface.foreign import OwnParameters, in_plain_words, twin_of, undisturbed, unwrapped
from structured_tickets.interface.masks import Masks, require_masks
from structured_tickets.interface.units import Units, require_same, require_units
from structured_tickets.pruning.criteria import CRITERIA, CRITERIA_BATCHES
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.rules import SORTING_MODES, RoundRules
from structured_tickets.unit_groups.kinds import FILTER, STREAM, kind_of
from structured_tickets.unit_groups.unit import parameter_of

RATE_MODES = ("round", "target")
Batches = Iterable[Any]


def regroup(
    model: nn.Module,
    units: Units,
    rate: float,
    criterion: str = "magnitude",
    *,
    batches: Batches | None = None,
    previous: Masks | None = None,
    rate_mode: str = "round",
    mlp_rate: float | None = None,
    block_rate: float | None = None,
    kinds: Sequence[str] | None = None,
    sorting: str | None = None,
    min_units: int = 0,
    round_units: int = 1,
    criterion_batches: int = CRITERIA_BATCHES,
) -> Masks:
    """Decide which units stay, by the weights that the network has now.

    All prunable weights are ranked by their size, and the share `rate` of them is pruned (Frankle and Carbin 2019);
    then units are scored, and the best of them kept whole (regrouping: Chen et al. 2022, "Coarsening the granularity").
    A layer keeps as many channels as its element-wise mask has weights for, and the share 1 - rate of its heads or
    neurons: rounded down, at least one. No model and no global random generator is changed.

    Args:
        units: What `structured_tickets.units(model, ...)` returned.
        rate: Share to prune, in [0, 1): of the prunable weights, and of heads, neurons and blocks.
        criterion: Score of a unit. "magnitude": sum of its absolute weights. "remain": how many of its weights the
            ranking kept. "l1", "l2": mean absolute, or root mean square, output. "saliency": mean absolute product of
            output and gradient of the cross-entropy (Molchanov et al. 2017).
        batches: (images, labels) pairs, such as a data loader, for "saliency"; for "l1" and "l2" images will do.
        previous: Masks of the round before, for iterative pruning. What they held at zero stays pruned.
        rate_mode: `rate` is a share of what the rounds before have left ("round"), or of all ("target").
        mlp_rate, block_rate: Share of the neurons, or blocks, to prune; default: `rate`.
        kinds: Kinds of unit to prune ("channel", "head", "neuron", "block"); default: all but blocks.
        sorting: For heads and neurons. "layer-wise" (default): each layer keeps the same share. "global": the best of
            the whole network stay; a layer may lose all.
        min_units: Units that every layer keeps at least.
        round_units: Every layer keeps a multiple of so many channels, neurons or features of heads, such as 8 or 16,
            which processors compute at once; over the network the total stays that of the rule.
        criterion_batches: Number of batches to read.

    Raises:
        BadType: An argument is of the wrong type (a TypeError).
        BadValue: A value is out of range, without effect, or of another network; batches are missing (a ValueError).
    """
    network = unwrapped(model)
    require_same(require_units(units), network, "the units")
    chosen = _kinds(units, kinds, previous)
    counts = {"sorting": sorting, "min_units": min_units, "round_units": round_units}
    _check_effect(chosen, mlp_rate=mlp_rate, block_rate=block_rate, **counts)
    rates = share(rate, "rate"), rate_mode, mlp_rate, block_rate
    rules = _rules(units, chosen, rates, (criterion, criterion_batches), **counts)
    return _decided(network, units, rules, batches, previous)


@dataclass(frozen=True)
class _Rules(RoundRules):
    """The rules of a round after rounds whose rates may have been others.

    Attributes:
        fractions: Kind of unit -> share of its units that the rounds before have left, as their rates say.
    """

    fractions: Mapping[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        return {kind: 1 - (1 - ratio) * self.fractions.get(kind, 1.0) for kind, ratio in super().ratios.items()}

    def share(self, rate: float, state: int) -> float:
        return rate


def _rules(
    units: Units,
    kinds: tuple[str, ...],
    rates: tuple[float, str, float | None, float | None],
    scores: tuple[str, int],
    **counts: Any,
) -> _Rules:
    """The arguments of `regroup`, checked, as rules of a round."""
    rate, rate_mode, mlp_rate, block_rate = rates
    criterion, batches = scores
    sorting = SORTING_MODES[0] if counts["sorting"] is None else counts["sorting"]
    return _Rules(
        struct="rsst",
        rate=rate,
        rate_mode=one_of(rate_mode, RATE_MODES, "rate_mode"),
        criteria=one_of(criterion, tuple(CRITERIA), "criterion"),
        targets=kinds,
        mlp_prune_ratio=rate if mlp_rate is None else share(mlp_rate, "mlp_rate"),
        block_prune_ratio=rate if block_rate is None else share(block_rate, "block_rate"),
        sorting_mode=one_of(sorting, SORTING_MODES, "sorting"),
        min_units=natural(counts["min_units"], "min_units"),
        round_units=natural(counts["round_units"], "round_units", least=1),
        channel_units=STREAM if any(g.writers for g in units) else FILTER,
        criteria_batches=natural(batches, "criterion_batches", least=1),
    )


def _decided(network: nn.Module, units: Units, rules: _Rules, batches: Batches | None, previous: Masks | None) -> Masks:
    before = None
    if previous is not None:
        before, fractions = previous.pair, previous.fractions if rules.rate_mode == "round" else {}
        rules = replace(rules, struct=_method_of(network, previous), fractions=fractions)
    groups = tuple(g for g in units if g.kind in rules.targets)
    with undisturbed(network, batches), in_plain_words():
        twin = twin_of(network, bool(units.attention))
        weights = {n: v.detach() for n, v in twin.state_dict().items()}
        found = _read(batches, rules.criteria, rules.criteria_batches, twin)
        pair = decide(twin, groups, rules, 0, ranked=weights, trained=weights, previous=before, batches=found)
    return Masks(units, groups, pair, {kind: 1 - gone for kind, gone in rules.ratios.items()})


def _kinds(units: Units, wanted: Sequence[str] | None, previous: Masks | None) -> tuple[str, ...]:
    """The kinds of unit to prune, in the order in which the network has them."""
    if isinstance(wanted, str) or not isinstance(wanted, Sequence | set | None):
        raise BadType('kinds: give a list of kinds of unit, such as ["head", "neuron"]')
    for kind in wanted or ():
        one_of(kind, units.kinds, f"kinds: {units.network} has no such units")
    before = None if previous is None else require_masks(previous, "previous").pruned_kinds
    chosen = tuple(k for k in units.kinds if k in (wanted if wanted is not None else before or _but_blocks(units)))
    if not chosen:
        raise BadValue("kinds: name at least one kind of unit")
    if previous is not None and before is not None:
        if previous.units.names != units.names:
            raise BadValue("previous: masks of other units; give those that regroup made of these")
        if chosen != before:
            raise BadValue(f"kinds: the round before pruned {' and '.join(before)}s; prune the same in this one")
    return chosen


def _but_blocks(units: Units) -> Sequence[str]:
    return [kind for kind in units.kinds if not kind_of(kind).holds_units] or units.kinds


NOTHING = {"min_units": 0, "round_units": 1}
"""Argument -> the value that asks for nothing; None where it is not named."""
READ_BY = {
    "mlp_rate": ("neuron",),
    "block_rate": ("block",),
    "sorting": ("head", "neuron"),
    "min_units": ("channel", "head", "neuron"),
    "round_units": ("channel", "head", "neuron"),
}
"""Argument -> kinds of unit on which it has an effect."""


def _check_effect(chosen: Sequence[str], **given: object) -> None:
    """Raises: BadValue, for an argument that has no effect on these kinds of unit."""
    for name, value in given.items():
        if value not in (None, NOTHING.get(name)) and not set(READ_BY[name]) & set(chosen):
            wanted = " or ".join(f"{kind}s" for kind in READ_BY[name])
            raise BadValue(f"{name}: has no effect here, since no {wanted} are pruned; leave it out")


def _method_of(network: nn.Module, previous: Masks) -> str:
    """The method under which the round was trained: "refill" if all is zero that the masks before have pruned."""
    own: Any = OwnParameters(network)
    weights = ((parameter_of(own, n).detach(), m) for n, m in previous.pair.structure.items())
    return "rsst" if any(bool((w[m.to(w.device) == 0] != 0).any()) for w, m in weights) else "refill"


def _read(batches: Batches | None, criterion: str, count: int, twin: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The first batches, in the network's number type; none if the criterion reads only weights.

    Raises:
        BadType: They are not (images, labels) pairs.
        BadValue: There are none.
    """
    reads = CRITERIA[criterion].reads
    if reads == "weights":
        return []
    if not isinstance(batches, Iterable):
        said = "missing" if batches is None else f"a {type(batches).__name__}, not a data loader"
        raise (BadValue if batches is None else BadType)(
            f"batches: {said}; criterion {criterion!r} needs {_wanted(reads == 'gradients')}"
        )
    like = next(p for p in twin.parameters() if p.is_floating_point())
    pairs = [_pair(item, labels_too=reads == "gradients") for item in islice(batches, count)]
    if not pairs:
        raise BadValue(f"batches: empty; criterion {criterion!r} needs at least one batch of images")
    return [(images.to(like), labels) for images, labels in pairs]


def _wanted(labels_too: bool) -> str:
    return "(images, labels) pairs" if labels_too else "images, or (images, labels) pairs"


def _pair(item: Any, labels_too: bool) -> tuple[Tensor, Tensor]:
    images, labels = (*item, None)[:2] if isinstance(item, tuple | list) and item else (item, None)
    if not isinstance(images, Tensor) or (labels_too and not isinstance(labels, Tensor)):
        raise BadType(f"batches: an item is a {type(item).__name__}; give {_wanted(labels_too)} of tensors")
    return images, labels if isinstance(labels, Tensor) else torch.zeros(len(images), dtype=torch.int64)
