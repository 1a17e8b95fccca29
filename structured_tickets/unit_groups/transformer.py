"""Units of transformers: attention heads, MLP neurons, and whole branches (blocks)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from structured_tickets.networks.registry import spec_of
from structured_tickets.unit_groups.operations import is_mlp_of_torchvision
from structured_tickets.unit_groups.unit import Slice, UnitGroup, parameter_of, rows

PER_HEAD = {"qkv", "proj", "gate", "q_norm", "k_norm"}
"""Layers of an attention that treat every head by itself (the norms: all heads alike)."""


def vit_groups(model: nn.Module, prune_patch_embed: bool = False, blocks: bool = False) -> list[UnitGroup]:
    """Return all that can be pruned in a ViT: heads, neurons and, if asked for, whole blocks and the patch embedding.

    What the notes on the network name as staying whole is left out.

    Args:
        prune_patch_embed: Include the patch embedding, which is pruned weight by weight.
        blocks: Include attention and MLP branches as units of their own, over those that they contain.
    """
    spec = spec_of(model)
    found = head_groups(model) + neuron_groups(model) + (block_groups(model) if blocks else [])
    groups = [g for g in found if spec.has_units and g.name not in spec.whole]
    if prune_patch_embed and groups:
        stem = spec.stem
        groups.append(UnitGroup(stem, "patch", (rows(stem, parameter_of(model, f"{stem}.weight").shape[0]),)))
    return groups


def is_vit_model(model: nn.Module) -> bool:
    """True if the network has attention layers with a joint qkv projection."""
    return bool(_attention_layers(model))


def head_groups(model: nn.Module) -> list[UnitGroup]:
    """Return one group per attention layer. Head h owns its rows of q, k and v in `qkv`, and its columns of `proj`."""
    return [_heads_of(name, attention) for name, attention in _attention_layers(model).items()]


def _heads_of(name: str, attention: Any) -> UnitGroup:
    heads = int(attention.num_heads)
    dim = attention.proj.in_features // heads
    columns = torch.arange(heads * dim).view(heads, dim)
    qkv = torch.cat([columns + part * heads * dim for part in range(3)], dim=1)
    gate = [Slice(f"{name}.gate", 0, columns)] if isinstance(getattr(attention, "gate", None), nn.Linear) else []
    return UnitGroup(f"{name}.qkv", "head", (Slice(f"{name}.qkv", 0, qkv), *gate, Slice(f"{name}.proj", 1, columns)))


def _attention_layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if _has_separate_heads(m)}


def _has_separate_heads(module: Any) -> bool:
    """True for attention with a joint qkv projection, in which only a head's own columns of `proj` read it.

    False if heads are mixed, normalised together, or own other parameters (a table of position biases, for example).
    """
    layers = (getattr(module, name, None) for name in ("qkv", "proj"))
    joint = all(isinstance(layer, nn.Linear) for layer in layers) and hasattr(module, "num_heads")
    others = {name.partition(".")[0] for name, _ in module.named_parameters()} - PER_HEAD
    return joint and not others


def neuron_groups(model: nn.Module) -> list[UnitGroup]:
    """Return one group per MLP. Neuron n owns row n of the first layer (`fc1`) and column n of the second (`fc2`).

    In a gated MLP it owns its gate's row as well.
    """
    groups = []
    for name, mlp in model.named_modules():
        first, last = _mlp_slices(f"{name}." if name else "", mlp)
        if first:
            groups.append(UnitGroup(first[0].layer, "neuron", (*first, last)))
    return groups


def _mlp_slices(prefix: str, mlp: Any) -> tuple[list[Slice], Slice]:
    """Return the slices of an MLP's first layers and of the one that reads them; no first ones if it is no known MLP.

    Args:
        prefix: The MLP's name with a dot, or nothing.
    """
    names = ("0", "3") if is_mlp_of_torchvision(mlp) else ("fc1", "fc2")
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
    """Return one group of one unit per attention branch and per MLP: all its weights, those of its last layer first.

    A branch whose block is pruned adds the bias of that layer and nothing else.
    """
    groups = [_block_of(model, group) for group in head_groups(model) + neuron_groups(model)]
    order = {name: k for k, (name, _) in enumerate(model.named_modules())}
    return sorted(groups, key=lambda g: order[g.name])


def _block_of(model: nn.Module, group: UnitGroup) -> UnitGroup:
    """Return the branch of a group of heads or neurons as one unit."""
    *first, last = dict.fromkeys(s.layer for s in group.slices)
    sizes = {layer: parameter_of(model, f"{layer}.weight").shape[0] for layer in (last, *first)}
    slices = tuple(Slice(layer, 0, torch.arange(size).unsqueeze(0)) for layer, size in sizes.items())
    return UnitGroup(last.rpartition(".")[0], "block", slices)
