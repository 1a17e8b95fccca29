"""Vision Transformers: attention heads and MLP neurons regrouped together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from pruning_utils import judged_weights, refill_masks, restart_under_masks
from structured_tickets.pruning.budgets import budget
from structured_tickets.pruning.masks import Mask, by_parameter
from structured_tickets.pruning.regroup_text import banner, summary
from vit_pruning_utils import vit_groups

log = logging.getLogger("rsst.pruning")


def prune_model_custom_fillback_vit_head_and_mlp(
    model: nn.Module,
    mask_dict: Mapping[str, Tensor],
    train_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    trained_weight: Mapping[str, Tensor] | None = None,
    init_weight: Mapping[str, Tensor] | None = None,
    criteria: str = "l1",
    head_prune_ratio: float = 0.2,
    mlp_prune_ratio: float = 0.2,
    return_mask_only: bool = False,
    sorting_mode: str = "layer-wise",
) -> nn.Module | Mask:
    """Regroup an element-wise mask into whole heads and whole neurons.

    Args:
        mask_dict: `"<layer>.weight_mask"` -> 0/1.
        train_loader: (images, labels), read by criteria on feature maps.
        trained_weight: State to judge the units by (plain or pruning keys); the model's own if None.
        init_weight: State to restart from; required unless `return_mask_only`.
        init_weight: State to restart from unless `return_mask_only`.
        head_prune_ratio: Share of the heads that goes, in [0, 1].
        mlp_prune_ratio: Share of the neurons that goes, in [0, 1].
        sorting_mode: "layer-wise": that share in each block, one unit stays at least; "global": that share of all
            units of the kind, so that a block may lose all of them.

    Returns:
        `{"<layer>": mask}` for RSST (`return_mask_only`), else the model at its initial weights under the masks.
    """
    rules = {
        "head": budget(sorting_mode, ratio=head_prune_ratio),
        "neuron": budget(sorting_mode, ratio=mlp_prune_ratio),
    }
    ratios = {"Head Prune Ratio": head_prune_ratio, "MLP Prune Ratio": mlp_prune_ratio}
    groups = vit_groups(model)
    log.debug("%s", banner(["head", "neuron"], criteria, ratios, refill=not return_mask_only))
    refill = refill_masks(
        model, groups, mask_dict, judged_weights(model, trained_weight), criteria, rules, train_loader
    )
    log.debug("%s", summary(groups, by_parameter(refill)))
    return refill if return_mask_only else restart_under_masks(model, init_weight, refill)
