"""Criteria: from evidence about a trained network to one score per unit; the higher stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

from masks import effective_state, effective_weight, in_place_of
from units import Slice, UnitGroup

CRITERIA_BATCHES = 4


@dataclass(frozen=True)
class FeatureStatistics:
    """Means over batch and positions of one layer's own output f, one entry per output feature: [features].

    Attributes:
        absolute: Mean of |f|.
        square: Mean of f squared.
        saliency: Mean of |f * dLoss/df|; None unless gradients were asked for.
    """

    absolute: Tensor
    square: Tensor
    saliency: Tensor | None = None


@dataclass(frozen=True)
class Evidence:
    """All that a criterion may see.

    Attributes:
        weights: The trained state dict (plain or pruning keys).
        current_mask: `"<layer>.weight_mask"` -> 0/1.
        features: Layer -> statistics of its output; empty unless the criterion reads them.
    """

    weights: Mapping[str, Tensor]
    current_mask: Mapping[str, Tensor]
    features: Mapping[str, FeatureStatistics] = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    Attributes:
        score: (evidence, slice) -> float64 [units].
        reads: "weights", "features" or "gradients": what has to be collected first.
        summary: One line for the help text.
    """

    score: Callable[[Evidence, Slice], Tensor]
    reads: str
    summary: str


CRITERIA: dict[str, Criterion] = {}


def _criterion(name: str, reads: str, summary: str) -> Callable[[Callable[[Evidence, Slice], Tensor]], Callable]:
    def add(score: Callable[[Evidence, Slice], Tensor]) -> Callable[[Evidence, Slice], Tensor]:
        CRITERIA[name] = Criterion(score, reads, summary)
        return score

    return add


def _along_axis(values: Tensor, part: Slice) -> Tensor:
    """Sum a parameter over all axes but the slice's: float64 [positions]."""
    others = [d for d in range(values.ndim) if d != part.axis]
    return values.sum(dim=others, dtype=torch.float64) if others else values.double()


def _per_unit(positions: Tensor, part: Slice) -> Tensor:
    """[positions] -> [units, width]."""
    return positions[part.index.to(positions.device)]


@_criterion("remain", "weights", "how many weights of the unit L1 kept")
def _remain(evidence: Evidence, part: Slice) -> Tensor:
    return _per_unit(_along_axis(evidence.current_mask[f"{part.name}_mask"], part), part).sum(dim=1)


@_criterion("magnitude", "weights", "sum of the unit's absolute trained weights")
def _magnitude(evidence: Evidence, part: Slice) -> Tensor:
    return _per_unit(_along_axis(effective_weight(evidence.weights, part.name).abs(), part), part).sum(dim=1)


@_criterion("l1", "features", "mean absolute output of the unit")
def _l1(evidence: Evidence, part: Slice) -> Tensor:
    return _per_unit(evidence.features[part.layer].absolute, part).mean(dim=1)


@_criterion("l2", "features", "root mean square output of the unit")
def _l2(evidence: Evidence, part: Slice) -> Tensor:
    return _per_unit(evidence.features[part.layer].square, part).mean(dim=1).sqrt()


@_criterion("saliency", "gradients", "mean absolute product of output and loss gradient of the unit")
def _saliency(evidence: Evidence, part: Slice) -> Tensor:
    saliency = evidence.features[part.layer].saliency
    if saliency is None:
        raise ValueError("saliency needs evidence that was collected with gradients")
    return _per_unit(saliency, part).mean(dim=1)


def collect_evidence(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    weights: Mapping[str, Tensor],
    current_mask: Mapping[str, Tensor],
    criterion: str,
    batches: Iterable[tuple[Tensor, Tensor]] | None,
    count: int = CRITERIA_BATCHES,
) -> Evidence:
    """Gather what `criterion` reads about the network with `weights` in place; the model keeps no trace of it.

    The network runs in eval mode and single precision. Saliency takes the cross-entropy of each batch.

    Args:
        weights: State dict to put in place of the model's own.
        batches: (images, labels); only the first `count` are read. Not read at all by weight criteria.

    Raises:
        KeyError: No such criterion.
        ValueError: The criterion reads feature maps and there is no batch.
    """
    if CRITERIA[criterion].reads == "weights":
        return Evidence(weights, current_mask)
    layers = list(dict.fromkeys(g.root.layer for g in groups))
    with_gradients = CRITERIA[criterion].reads == "gradients"
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        taken = [(x.to(device), y.to(device)) for x, y in islice(batches or [], count)]
    if not taken:
        raise ValueError(f"criterion {criterion!r} reads feature maps: it needs at least one batch of images")
    with _evaluating(model, weights) as state:
        parts = [_statistics(model, state, layers, x, y, with_gradients) for x, y in taken]
    return Evidence(weights, current_mask, {layer: _mean([p[layer] for p in parts]) for layer in layers})


@contextmanager
def _evaluating(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Eval mode, and a state to run the model with; afterwards every module's mode and masked weight are as before."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield in_place_of(model, {n: w.detach() for n, w in effective_state(weights).items()})
    finally:
        for module, mode in modes.items():
            module.training = mode
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, prune.BasePruningMethod):
                    hook(module, None)


def _statistics(
    model: nn.Module, state: dict[str, Tensor], layers: Sequence[str], images: Tensor, labels: Tensor, gradients: bool
) -> dict[str, FeatureStatistics]:
    outputs: dict[str, Tensor] = {}

    def recorder(layer: str) -> Callable:
        def record(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            outputs[layer] = output
            return output.clone()  # what follows may work in place

        return record

    handles = [model.get_submodule(layer).register_forward_hook(recorder(layer)) for layer in layers]
    try:
        with torch.set_grad_enabled(gradients):
            logits = functional_call(model, state, (images.detach().clone().requires_grad_(gradients),))
    finally:
        for handle in handles:
            handle.remove()
    if not gradients:
        return {layer: _summary(outputs[layer], None) for layer in layers}
    loss = nn.functional.cross_entropy(logits, labels)
    slopes = torch.autograd.grad(loss, [outputs[layer] for layer in layers])
    return {layer: _summary(outputs[layer], slope) for layer, slope in zip(layers, slopes, strict=True)}


def _summary(output: Tensor, slope: Tensor | None) -> FeatureStatistics:
    """Reduce [batch, features, height, width] or [batch, tokens, features] to one value per feature."""
    output = output.detach()
    others = [d for d in range(output.ndim) if d != (1 if output.ndim == 4 else output.ndim - 1)]

    def mean(values: Tensor) -> Tensor:
        return values.double().mean(dim=others).cpu()

    saliency = None if slope is None else mean((output * slope).abs())
    return FeatureStatistics(mean(output.abs()), mean(output.square()), saliency)


def _mean(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    def average(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).mean(dim=0)

    slopes = [p.saliency for p in parts if p.saliency is not None]
    return FeatureStatistics(
        average([p.absolute for p in parts]), average([p.square for p in parts]), average(slopes) if slopes else None
    )
