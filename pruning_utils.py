"""The documents' pruning functions for convolutional networks, and the nouns of the algorithm in one place.

Every function here is a thin caller of `units`, `masks`, `criteria` and `regroup`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from structured_tickets.pruning import regroup as package
from structured_tickets.pruning.budgets import BUDGETS, Budget, budget, kept_count
from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.pruning.criteria import CRITERIA, CRITERIA_BATCHES
from structured_tickets.pruning.elementwise import complete_mask, masks_of_groups
from structured_tickets.pruning.evidence import Evidence
from structured_tickets.pruning.masks import (
    Mask,
    MaskPair,
    apply_masks,
    as_refill,
    by_parameter,
    count_ones,
    effective_state,
    l1_mask,
    own_mask,
    remove_masks,
)
from structured_tickets.pruning.oneshot import prune_admm, prune_grasp, prune_omp, prune_rp, prune_snip, prune_synflow
from structured_tickets.unit_groups.find import channel_groups
from structured_tickets.unit_groups.unit import Slice, UnitGroup, parameter_of, ranked_names

__all__ = [
    "BUDGETS",
    "CRITERIA",
    "Evidence",
    "Mask",
    "MaskPair",
    "Slice",
    "UnitGroup",
    "budget",
    "channel_groups",
    "check_sparsity",
    "extract_main_weight",
    "extract_mask",
    "kept_count",
    "prune_admm",
    "prune_grasp",
    "prune_model_custom",
    "prune_model_custom_fillback",
    "prune_omp",
    "prune_rp",
    "prune_snip",
    "prune_synflow",
    "pruning_model",
    "pruning_model_random",
    "regroup",
    "remove_prune",
]

log = logging.getLogger("rsst.pruning")


def pruning_model(model: nn.Module, px: float, conv1: bool = False) -> None:
    """Global L1 over all convolutions: mask the share `px` of what is left, smallest magnitudes first.

    Args:
        px: Share in [0, 1] of the weights still unmasked; the count is rounded to the nearest, halves to even.
        conv1: Include the stem convolution.
    """
    prune_by_magnitude(model, ranked_names(model, channel_groups(model, conv1)), px)


def prune_by_magnitude(model: nn.Module, names: Sequence[str], px: float) -> None:
    """Put the named parameters under torch's pruning so that the share `px` of what is left goes, by global L1."""
    alive = {n: own_mask(model, n) for n in names}
    left = count_ones(alive, names)
    weights = {n: parameter_of(model, n) for n in names}
    apply_masks(model, l1_mask(weights, alive, left - round(px * left)))


def pruning_model_random(model: nn.Module, px: float) -> None:
    """Like `pruning_model`, with a random order (torch's global generator) in place of magnitudes."""
    names = ranked_names(model, channel_groups(model))
    alive = {n: own_mask(model, n) for n in names}
    left = count_ones(alive, names)
    order = {n: torch.rand_like(alive[n]) for n in names}
    apply_masks(model, l1_mask(order, alive, left - round(px * left)))


def check_sparsity(model: nn.Module, conv1: bool = True) -> float:
    """Report and return the percentage of convolution weights that are not zero.

    Args:
        conv1: Count the stem convolution too.
    """
    remaining = remaining_percent(model, ranked_names(model, channel_groups(model, conv1)))
    log.info("* remain weight = %.4f %%", remaining)
    return remaining


def remaining_percent(model: nn.Module, names: Sequence[str]) -> float:
    """100 * (1 - zeros / all) over the named parameters, masks applied."""
    values = [parameter_of(model, n).detach() * own_mask(model, n) for n in names]
    return 100 * sum(int(v.count_nonzero()) for v in values) / sum(v.numel() for v in values)


def remove_prune(model: nn.Module, conv1: bool = True) -> None:
    """Make masked convolutions (and the BatchNorms masked with them) plain again; masked weights become zeros."""
    remove_masks(model, [s.name for g in channel_groups(model, conv1) for s in g.slices])


def extract_mask(state_dict: Mapping[str, Tensor]) -> Mask:
    """The masks in a state dict, as copies: `"<layer>.weight_mask"` -> 0/1."""
    return {k: v.detach().clone() for k, v in state_dict.items() if k.endswith("_mask")}


def extract_main_weight(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a state dict under their plain names, unmasked, as copies."""
    return {k.removesuffix("_orig"): v.detach().clone() for k, v in state_dict.items() if not k.endswith("_mask")}


def prune_model_custom(model: nn.Module, mask_dict: Mapping[str, Tensor], conv1: bool = False) -> None:
    """Put every convolution under its mask.

    Args:
        mask_dict: `"<layer>.weight_mask"` -> 0/1. Masks of other parameters of the units (BatchNorm) apply too.
        conv1: Include the stem convolution.

    Raises:
        KeyError: A convolution has no mask.
    """
    apply_masks(model, masks_of_groups(channel_groups(model, conv1), mask_dict))


def regroup(
    groups: Sequence[UnitGroup],
    current_mask: Mapping[str, Tensor],
    evidence: Evidence,
    criterion: str,
    budgets: Mapping[str, Budget],
) -> Mask:
    """Turn an element-wise mask into a structure, under the documents' keys: see the package's function of that name.

    Args:
        current_mask: `"<layer>.weight_mask"` -> 0/1, for every parameter of the groups.

    Returns:
        `"<layer>"` -> 0/1.
    """
    return as_refill(package.regroup(groups, by_parameter(current_mask), evidence, criterion, budgets))


def refill_masks(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    mask_dict: Mapping[str, Tensor],
    trained_weight: Mapping[str, Tensor],
    criteria: str,
    budgets: Mapping[str, Budget],
    train_loader: Iterable[tuple[Tensor, Tensor]] | None,
    batches: int = CRITERIA_BATCHES,
) -> Mask:
    """Evidence from the trained weights, then `regroup`. Nothing that is given is changed.

    Raises:
        ValueError: No such criterion, or it needs images and there are none.
    """
    if criteria not in CRITERIA:
        raise ValueError(f"criteria {criteria!r}: choose from {', '.join(CRITERIA)}")
    current = complete_mask(model, groups, mask_dict)
    scored = [g for g in groups if g.kind in budgets]
    evidence = collect_evidence(model, scored, trained_weight, current, criteria, train_loader, batches)
    return as_refill(package.regroup(groups, current, evidence, criteria, budgets))


def judged_weights(model: nn.Module, trained_weight: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The plain weights by which units are judged: those that are given, else the model's own."""
    return effective_state(model.state_dict() if trained_weight is None else trained_weight)


def restart_under_masks(model: nn.Module, init_weight: Mapping[str, Tensor] | None, refill_mask: Mask) -> nn.Module:
    """Refill's last step: all initial weights back, copied, and the structure as torch pruning masks.

    Raises:
        ValueError: There are no initial weights.
    """
    if init_weight is None:
        raise ValueError("Refill restarts the network: init_weight is required unless return_mask_only")
    names = [n.removesuffix("_orig") for n, _ in model.named_parameters() if n.endswith("_orig")]
    remove_masks(model, names)
    model.load_state_dict({k: v.clone() for k, v in effective_state(init_weight).items()}, strict=False)
    apply_masks(model, by_parameter(refill_mask))
    return model


def prune_model_custom_fillback(
    model: nn.Module,
    mask_dict: Mapping[str, Tensor],
    conv1: bool = False,
    criteria: str = "remain",
    train_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    init_weight: Mapping[str, Tensor] | None = None,
    trained_weight: Mapping[str, Tensor] | None = None,
    return_mask_only: bool = False,
    strict: bool = True,
    fillback_rate: float = 0.0,
) -> nn.Module | Mask:
    """Regroup an element-wise mask into whole channels; Refill also restarts the network under it.

    Args:
        mask_dict: `"<layer>.weight_mask"` -> 0/1.
        criteria: A row of `CRITERIA`.
        train_loader: (images, labels), read by criteria on feature maps.
        init_weight: State to restart from; required unless `return_mask_only`.
        trained_weight: State to judge the units by (plain or pruning keys); the model's own if None.
        return_mask_only: RSST: return the mask and leave the model as it is.
        strict: Refuse a `trained_weight` that lacks entries of the model; otherwise the model's own fill in.
        fillback_rate: Share in [0, 1] of the channels that would go, kept all the same.

    Returns:
        `{"<layer>": mask}`, BatchNorm entries included, or the restarted model.

    Raises:
        KeyError: A mask or (strict) a trained weight is missing.
        TypeError: `criteria` stands in the place of `conv1`, as document 004 has it.
        ValueError: Unknown criterion, missing `init_weight`, or a criterion without the images that it reads.
    """
    if isinstance(conv1, str):
        raise TypeError(
            f"conv1 is {conv1!r}, not True or False: name what follows mask_dict, as in "
            f"prune_model_custom_fillback(model, mask_dict, criteria={conv1!r}, fillback_rate=0.0)"
        )
    groups = channel_groups(model, conv1)
    own = effective_state(model.state_dict())
    trained = judged_weights(model, trained_weight)
    missing = sorted(own.keys() - trained.keys())
    if strict and missing:
        raise KeyError(f"trained_weight has no weights for {missing[0]}")
    trained = own | trained
    rule = {"channel": budget("density", fillback_rate=fillback_rate)}
    refill = refill_masks(model, groups, mask_dict, trained, criteria, rule, train_loader)
    if return_mask_only:
        return refill
    return restart_under_masks(model, init_weight, refill)
