"""Evidence from a network at work: its layers' outputs and gradients, collected without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune

from structured_tickets.base.modes import in_mode
from structured_tickets.networks.kernels import uncompiled
from structured_tickets.networks.precision import exact_type
from structured_tickets.pruning.criteria import CRITERIA, CRITERIA_BATCHES
from structured_tickets.pruning.evidence import Evidence, FeatureStatistics
from structured_tickets.pruning.masks import called_with, effective_state, in_place_of
from structured_tickets.shrinking.fewer_heads import projections_noted
from structured_tickets.unit_groups.unit import UnitGroup


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
    layers = list(dict.fromkeys(s.layer for g in groups for s in g.computing))
    with_gradients = CRITERIA[criterion].reads == "gradients"
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        taken = [(x.to(device), y.to(device)) for x, y in islice(batches or [], count)]
    if not taken:
        raise ValueError(f"criterion {criterion!r} reads feature maps: it needs at least one batch of images")
    with _evaluating(model, weights) as state:
        parts = [_statistics(model, state, layers, x, y, with_gradients) for x, y in taken]
    images = [len(x) for x, _ in taken]
    return Evidence(weights, current_mask, {layer: _mean([p[layer] for p in parts], images) for layer in layers})


@contextmanager
def _evaluating(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Eval mode, and a state to run the model with; afterwards every module's mode and masked weight are as before."""
    plain = uncompiled()  # compiled code would pass the hooks by
    try:
        with in_mode(model, False), plain, torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield in_place_of(model, {n: w.detach() for n, w in effective_state(weights).items()})
    finally:
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, prune.BasePruningMethod):
                    hook(module, None)


def _statistics(
    model: nn.Module, state: dict[str, Tensor], layers: Sequence[str], images: Tensor, labels: Tensor, gradients: bool
) -> dict[str, FeatureStatistics]:
    outputs: dict[str, list[Tensor]] = {}
    named = {model.get_submodule(layer): layer for layer in layers}
    attention = [m for m in named if isinstance(m, nn.MultiheadAttention)]

    def note(module: nn.Module, parts: list[Tensor]) -> list[Tensor]:
        own = parts if len(parts) == 1 or module.in_proj_weight is not None else parts[:1]
        for part in own:
            if gradients and not part.requires_grad:  # of parameters alone, which are held
                part.requires_grad_()
        outputs[named[module]] = own
        return [part.clone() for part in parts]  # what follows may work in place

    def record(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return note(module, [output])[0]

    handles = [m.register_forward_hook(record) for m in named if m not in attention]
    try:
        with torch.set_grad_enabled(gradients), projections_noted(model, attention, note):
            logits = called_with(model, state, (images.detach().clone().requires_grad_(gradients),))
    finally:
        for handle in handles:
            handle.remove()
    for module, layer in named.items():  # evaluation need not call what training does: then it gives nothing
        outputs[layer] = outputs.get(layer) or [_nothing(module, images)]
    every = [part for layer in layers for part in outputs[layer]]
    slopes: Sequence[Tensor | None] = [None] * len(every)
    if gradients:
        loss = nn.functional.cross_entropy(logits, labels)
        slopes = torch.autograd.grad(loss, every, materialize_grads=True, allow_unused=True)
    slope_of = {id(part): slope for part, slope in zip(every, slopes, strict=True)}
    found = {}
    for module, layer in named.items():
        own = [_summary(part, slope_of[id(part)], _features_last(module, part)) for part in outputs[layer]]
        found[layer] = own[0] if len(own) == 1 else _side_by_side(own)
    return found


def _nothing(layer: nn.Module, images: Tensor) -> Tensor:
    """Zeros in the place of what a layer gives: [1, features], with axes for pixels of a convolution."""
    names = ("out_channels", "out_features", "num_features", "embed_dim")
    own: Any = vars(layer)
    features = next((own[n] for n in names if n in own), None) or len(next(layer.parameters()))
    if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
        features *= 3
    zeros = images.new_zeros(1, features, *[1] * (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0))
    return zeros.requires_grad_(torch.is_grad_enabled() and images.is_floating_point())


def _side_by_side(parts: Sequence[FeatureStatistics]) -> FeatureStatistics:
    """The statistics of features that lie one after another."""
    slopes = [p.saliency for p in parts if p.saliency is not None]
    absolute, square = (torch.cat([getattr(p, word) for p in parts]) for word in ("absolute", "square"))
    return FeatureStatistics(absolute, square, torch.cat(slopes) if slopes else None)


def _features_last(layer: nn.Module, output: Tensor) -> bool:
    """Return whether the features are an output's last axis: of linear layers, also on [.., height, width]."""
    if isinstance(layer, _ConvNd | _BatchNorm):
        return False
    return isinstance(layer, nn.Linear) or output.ndim != 4


def _summary(output: Tensor, slope: Tensor | None, features_last: bool) -> FeatureStatistics:
    """Reduce [batch, features, height, width] or [batch, .., features] to one value per feature."""
    output = output.detach()
    others = [d for d in range(output.ndim) if d != (output.ndim - 1 if features_last else 1)]

    def mean(values: Tensor) -> Tensor:
        exact = values.to(exact_type(values.device))
        return (exact.mean(dim=others) if others else exact).cpu().double()  # torch takes no axes for all of them

    saliency = None if slope is None else mean((output * slope).abs())
    return FeatureStatistics(mean(output.abs()), mean(output.square()), saliency)


def _mean(parts: Sequence[FeatureStatistics], images: Sequence[int]) -> FeatureStatistics:
    """The statistics of all batches, of so many images each: every image counts the same.

    The gradients are those of a batch's mean loss: the fewer images it has, the larger they are.
    """

    def average(values: Sequence[Tensor], power: int = 1) -> Tensor:
        shares = torch.tensor([float(n) ** power for n in images], dtype=torch.float64)
        return torch.tensordot(shares / shares.sum(), torch.stack(list(values)), 1)

    slopes = [p.saliency for p in parts if p.saliency is not None]
    return FeatureStatistics(
        average([p.absolute for p in parts]), average([p.square for p in parts]), average(slopes, 2) if slopes else None
    )
