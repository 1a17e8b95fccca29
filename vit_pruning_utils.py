"""The documents' pruning functions for Vision Transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from pruning_utils import (
    extract_mask,
    judged_weights,
    prune_by_magnitude,
    refill_masks,
    remaining_percent,
    restart_under_masks,
)
from structured_tickets.networks.registry import spec_of
from structured_tickets.pruning.budgets import budget
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.elementwise import complete_mask, refill_rows
from structured_tickets.pruning.masks import (
    Mask,
    apply_masks,
    as_refill,
    by_parameter,
    own_mask,
    remove_masks,
)
from structured_tickets.pruning.regroup_text import banner, summary
from structured_tickets.unit_groups.transformer import (
    block_groups,
    head_groups,
    is_vit_model,
    neuron_groups,
    vit_groups,
)
from structured_tickets.unit_groups.unit import parameter_of, ranked_names

__all__ = [
    "block_groups",
    "check_sparsity_vit",
    "extract_mask_vit",
    "head_groups",
    "is_vit_model",
    "neuron_groups",
    "prune_model_custom_fillback_vit",
    "prune_model_custom_fillback_vit_by_head",
    "prune_model_custom_vit",
    "pruning_model_vit",
    "refill_rows",
    "remove_prune_vit",
    "vit_groups",
]

log = logging.getLogger("rsst.pruning")


def pruning_model_vit(model: nn.Module, px: float, prune_patch_embed: bool = False) -> None:
    """Global L1 over qkv, proj, fc1 and fc2 of all blocks: mask the share `px` of what is left.

    Args:
        px: Share in [0, 1] of the weights still unmasked; the count is rounded to the nearest, halves to even.
        prune_patch_embed: Include the patch embedding.
    """
    prune_by_magnitude(model, ranked_names(model, vit_groups(model, prune_patch_embed)), px)


def prune_model_custom_vit(model: nn.Module, mask_dict: Mapping[str, Tensor]) -> None:
    """Put every prunable layer under its mask (`"<layer>.weight_mask"` -> 0/1).

    Raises:
        KeyError: A prunable layer has no mask.
    """
    groups = vit_groups(model, prune_patch_embed=f"{spec_of(model).stem}.weight_mask" in mask_dict)
    apply_masks(model, complete_mask(model, groups, mask_dict))


def extract_mask_vit(state_dict: Mapping[str, Tensor]) -> Mask:
    """The masks in a state dict, as copies: `"<layer>.weight_mask"` -> 0/1."""
    return extract_mask(state_dict)


def remove_prune_vit(model: nn.Module, prune_patch_embed: bool = False) -> None:
    """Make masked layers plain again; masked weights become zeros."""
    remove_masks(model, ranked_names(model, vit_groups(model, prune_patch_embed)))


def check_sparsity_vit(model: nn.Module, prune_patch_embed: bool = False) -> float:
    """Report every prunable layer's zeros; return the percentage of weights that remain."""
    names = ranked_names(model, vit_groups(model, prune_patch_embed))
    remaining = remaining_percent(model, names)
    log.info("%s\n[ViT Sparsity Report]\n%s", "=" * 80, "-" * 80)
    zeros = total = 0
    for name in names:
        value = parameter_of(model, name).detach() * own_mask(model, name)
        count = value.numel() - int(value.count_nonzero())
        zeros, total = zeros + count, total + value.numel()
        layer = name.removesuffix(".weight")
        log.info("%-50s | Sparsity: %6.2f%% | Zeros: %8d/%8d", layer, 100 * count / value.numel(), count, value.numel())
    log.info("%s\nTotal zeros: %d / %d", "-" * 80, zeros, total)
    log.info("Overall sparsity: %.2f%%\nRemaining weights: %.2f%%\n%s", 100 - remaining, remaining, "=" * 80)
    return remaining


def prune_model_custom_fillback_vit(
    model: nn.Module,
    mask_dict: Mapping[str, Tensor],
    train_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    trained_weight: Mapping[str, Tensor] | None = None,
    init_weight: Mapping[str, Tensor] | None = None,
    criteria: str = "l1",
    fillback_rate: float = 0.0,
    return_mask_only: bool = False,
) -> nn.Module | Mask:
    """Element-wise ViT pruning: `refill_rows`, and unless `return_mask_only` the initial weights under that mask."""
    if criteria not in CRITERIA:
        raise ValueError(f"criteria {criteria!r}: choose from {', '.join(CRITERIA)}")
    trained = judged_weights(model, trained_weight)
    refill = as_refill(refill_rows(model, vit_groups(model), mask_dict, trained, criteria, fillback_rate, train_loader))
    return refill if return_mask_only else restart_under_masks(model, init_weight, refill)


def prune_model_custom_fillback_vit_by_head(
    model: nn.Module,
    mask_dict: Mapping[str, Tensor],
    train_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    trained_weight: Mapping[str, Tensor] | None = None,
    init_weight: Mapping[str, Tensor] | None = None,
    criteria: str = "l1",
    prune_ratio: float = 0.2,
    return_mask_only: bool = False,
) -> nn.Module | Mask:
    """Regroup attention into whole heads, the same share in each block; MLPs keep their element-wise mask.

    Args:
        mask_dict: `"<layer>.weight_mask"` -> 0/1.
        train_loader: (images, labels), read by criteria on feature maps.
        trained_weight: State to judge the heads by (plain or pruning keys); the model's own if None.
        init_weight: State to restart from; required unless `return_mask_only`.
        prune_ratio: Share of the heads that goes, in [0, 1]; one head per block stays at least.
    """
    rule = {"head": budget("layer-wise", ratio=prune_ratio)}
    trained = judged_weights(model, trained_weight)
    groups = vit_groups(model)
    log.debug("%s", banner(["head"], criteria, {"Prune Ratio": prune_ratio}, refill=not return_mask_only))
    refill = refill_masks(model, groups, mask_dict, trained, criteria, rule, train_loader)
    log.debug("%s", summary(groups, by_parameter(refill)))
    return refill if return_mask_only else restart_under_masks(model, init_weight, refill)
