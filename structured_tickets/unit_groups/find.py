"""The unit groups of any network: heads, neurons and blocks of transformers; for other networks, channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.ops import MLP

from structured_tickets.networks.registry import spec_of
from structured_tickets.unit_groups.channels import channel_groups
from structured_tickets.unit_groups.unit import Slice, UnitGroup, parameter_of, rows

SEPARATE = {"qkv", "proj", "gate", "q_norm", "k_norm"}
"""Layers of an attention that treat every head by itself (the norms: all heads alike)."""


def unit_groups(model: nn.Module, prune_stem: bool = False, blocks: bool = False) -> list[UnitGroup]:
    """The unit groups of any network; of a ViT with its `blocks` as units too, if asked for."""
    return vit_groups(model, prune_stem, blocks) if is_transformer(model) else channel_groups(model, prune_stem)


def is_transformer(model: nn.Module) -> bool:
    """Whether the network has heads or MLP neurons: then its convolutions are left as they are.

    Not so where the only MLPs are a classifier's, or weigh channels (squeeze and excitation): such are parts of CNNs.
    """
    return is_vit_model(model) or _mixes_features(model, neuron_groups(model))


def _mixes_features(model: nn.Module, groups: Sequence[UnitGroup]) -> bool:
    """Whether an MLP gives as many features as it takes, and has no fewer in between."""
    layers = [[parameter_of(model, s.name) for s in g.slices] for g in groups]
    return any(last.shape[0] == first.shape[1] <= last.shape[1] for first, *_, last in layers)


def _attention_layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if _has_separate_heads(m)}


def _has_separate_heads(module: Any) -> bool:
    """Attention with a joint qkv projection, in which every head only speaks through its own columns of `proj`.

    Not so where heads are mixed, normalised together, or own parameters besides (a table of position biases, say).
    """
    layers = (getattr(module, name, None) for name in ("qkv", "proj"))
    joint = all(isinstance(layer, nn.Linear) for layer in layers) and hasattr(module, "num_heads")
    others = {name.partition(".")[0] for name, _ in module.named_parameters()} - SEPARATE
    return joint and not others


def is_vit_model(model: nn.Module) -> bool:
    """Whether the network has attention layers with a joint qkv projection."""
    return bool(_attention_layers(model))


def head_groups(model: nn.Module) -> list[UnitGroup]:
    """One group per attention layer. Head h owns its rows of q, k and v in `qkv`, and its columns of `proj`."""
    groups = []
    for name, attention in _attention_layers(model).items():
        heads = int(attention.num_heads)
        dim = attention.proj.in_features // heads
        columns = torch.arange(heads * dim).view(heads, dim)
        qkv = torch.cat([columns + part * heads * dim for part in range(3)], dim=1)
        gate = [Slice(f"{name}.gate", 0, columns)] if isinstance(getattr(attention, "gate", None), nn.Linear) else []
        slices = (Slice(f"{name}.qkv", 0, qkv), *gate, Slice(f"{name}.proj", 1, columns))
        groups.append(UnitGroup(f"{name}.qkv", "head", slices))
    return groups


def neuron_groups(model: nn.Module) -> list[UnitGroup]:
    """One group per MLP. Neuron n owns row n of the first layer (`fc1`) and column n of the second (`fc2`).

    In a gated MLP it owns its gate's row as well.
    """
    groups = []
    for name, mlp in model.named_modules():
        first, last = _mlp_slices(f"{name}." if name else "", mlp)
        if first:
            groups.append(UnitGroup(first[0].layer, "neuron", (*first, last)))
    return groups


def _mlp_slices(prefix: str, mlp: Any) -> tuple[list[Slice], Slice]:
    """The slices of an MLP's first layers and of the one that reads them; no first ones if it is not a known MLP.

    Args:
        prefix: The MLP's name with a dot, or nothing.
    """
    names = ("0", "3") if isinstance(mlp, MLP) else ("fc1", "fc2")
    first, last = (getattr(mlp, n, None) for n in names)
    if not isinstance(last, nn.Linear) or not isinstance(getattr(mlp, "norm", None), nn.Identity | None):
        return [], rows(prefix, 0)
    hidden = last.in_features
    layers = {names[0]: first, "fc1_g": getattr(mlp, "fc1_g", None), "fc1_x": getattr(mlp, "fc1_x", None)}
    sizes = {n: m.out_features for n, m in layers.items() if isinstance(m, nn.Linear)}
    parts = []
    if sizes in ({names[0]: hidden}, {"fc1_g": hidden, "fc1_x": hidden}):
        parts = [rows(f"{prefix}{n}", hidden) for n in sizes]
    elif sizes == {"fc1": 2 * hidden} and getattr(mlp, "chunk_dim", None) == -1:  # values, then their gates
        parts = [Slice(f"{prefix}fc1", 0, torch.arange(2 * hidden).view(2, hidden).T.contiguous())]
    return parts, Slice(f"{prefix}{names[1]}", 1, torch.arange(hidden).unsqueeze(1))


def block_groups(model: nn.Module) -> list[UnitGroup]:
    """One group of one unit per attention branch and per MLP: all its weights, the layer that speaks for it first.

    Without them the branch adds the bias of that layer and nothing else.
    """
    groups = []
    for group in head_groups(model) + neuron_groups(model):
        *first, last = dict.fromkeys(s.layer for s in group.slices)
        sizes = {layer: parameter_of(model, f"{layer}.weight").shape[0] for layer in (last, *first)}
        slices = tuple(Slice(layer, 0, torch.arange(size).unsqueeze(0)) for layer, size in sizes.items())
        groups.append(UnitGroup(last.rpartition(".")[0], "block", slices))
    order = {name: k for k, (name, _) in enumerate(model.named_modules())}
    return sorted(groups, key=lambda g: order[g.name])


def vit_groups(model: nn.Module, prune_patch_embed: bool = False, blocks: bool = False) -> list[UnitGroup]:
    """All that can be pruned in a ViT: heads, neurons and, if asked for, whole blocks and the patch embedding.

    Args:
        prune_patch_embed: Include the patch embedding, which is pruned weight by weight.
        blocks: Include attention and MLP branches as units of their own, over those that they contain.
    """
    groups = head_groups(model) + neuron_groups(model) + (block_groups(model) if blocks else [])
    if prune_patch_embed and groups:
        stem = spec_of(model).stem
        groups.append(UnitGroup(stem, "patch", (rows(stem, parameter_of(model, f"{stem}.weight").shape[0]),)))
    return groups
