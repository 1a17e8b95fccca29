"""The documents' worked examples and figures."""

from __future__ import annotations

import re

import pytest
import torch

from pruning_utils import regroup
from structured_tickets.networks import build_model
from structured_tickets.pruning.budgets import budget
from structured_tickets.pruning.evidence import Evidence
from structured_tickets.pruning.masks import MaskPair, l1_mask
from structured_tickets.unit_groups.unit import Slice, UnitGroup
from vit_pruning_utils import extract_mask_vit, prune_model_custom_fillback_vit_by_head, pruning_model_vit
from vit_pruning_utils_head_mlp import prune_model_custom_fillback_vit_head_and_mlp

TEN = torch.tensor([0.8, 0.1, 0.5, 0.7, 0.05, 0.6, 0.9, 0.4, 0.02, 0.3])


def test_ten_weights_the_doomed_are_7_and_9():
    """Document 001 says [7]; by its own formula index 9 is alive and outside the structure too."""
    current = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 0, 1])
    refill = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0, 0, 0])
    doomed = MaskPair({"a.weight_mask": current}, {"a": refill}).doomed["a.weight"]
    assert doomed.nonzero().flatten().tolist() == [7, 9]


def test_ten_weights_its_mask_is_three_pruned_and_its_structure_the_best_five():
    """The text says 20 %, its mask removes three of ten; of the seven left it keeps five by magnitude."""
    current = l1_mask({"a.weight": TEN}, None, 7)["a.weight"]
    assert current.tolist() == [1, 0, 1, 1, 0, 1, 1, 1, 0, 1]
    single = UnitGroup("a", "neuron", (Slice("a", 0, torch.arange(10).unsqueeze(1)),))
    evidence = Evidence({"a.weight": TEN * current}, {})
    refill = regroup([single], {"a.weight_mask": current}, evidence, "magnitude", {"neuron": lambda *_: {"a": 5}})
    assert refill["a"].tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 0, 0]
    assert TEN[refill["a"] == 1].sort(descending=True).values.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])


def test_heads_50_60_30_keep_1_and_0_and_squeeze_the_thirty():
    """Document 001, the example per head: 64 weights a head, 50, 60 and 30 of them left."""
    current = torch.zeros(3, 64)
    for head, count in enumerate((50, 60, 30)):
        current[head, :count] = 1
    current = current.view(192, 1)
    group = UnitGroup("qkv", "head", (Slice("qkv", 0, torch.arange(192).view(3, 64)),))
    masks = {"qkv.weight_mask": current}
    rules = {"head": budget("layer-wise", ratio=0.3)}
    refill = regroup([group], masks, Evidence({}, masks), "remain", rules)
    assert [int(h.sum()) for h in refill["qkv"].view(3, 64)] == [64, 64, 0]
    doomed = MaskPair(masks, refill).doomed["qkv.weight"].view(3, 64)
    assert doomed.sum(1).tolist() == [0, 0, 30]


@pytest.fixture(scope="module")
def pruned_vit():
    torch.manual_seed(0)
    model = build_model("vit_tiny", 100, 32)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    pruning_model_vit(model, 0.2)
    return model, extract_mask_vit(model.state_dict()), weights


def test_figures_of_heads_and_neurons_at_30_percent(pruned_vit):
    model, masks, weights = pruned_vit
    refill = prune_model_custom_fillback_vit_head_and_mlp(
        model, masks, None, weights, weights, "magnitude", 0.3, 0.3, return_mask_only=True
    )
    parts = {p: [m for n, m in refill.items() if p in n] for p in (".attn.", ".mlp.")}
    total = {p: sum(m.numel() for m in ms) for p, ms in parts.items()}
    gone = {p: sum(int((m == 0).sum()) for m in ms) for p, ms in parts.items()}
    assert (total[".attn."], gone[".attn."], len(parts[".attn."])) == (1_327_104, 442_368, 18)
    assert (total[".mlp."], gone[".mlp."], len(parts[".mlp."])) == (1_327_104, 400_896, 18)
    everything = sum(total.values())
    assert (
        f"{100 * sum(gone.values()) / everything:.2f} {everything / (everything - sum(gone.values())):.2f}"
        == "31.77 1.47"
    )


def test_console_blocks_are_the_documents(pruned_vit, caplog, monkeypatch):
    import logging

    model, masks, weights = pruned_vit
    monkeypatch.setattr(logging.getLogger("rsst"), "propagate", True)
    with caplog.at_level(logging.DEBUG, logger="rsst"):
        prune_model_custom_fillback_vit_head_and_mlp(
            model, masks, None, weights, weights, "magnitude", 0.3, 0.3, return_mask_only=True
        )
        prune_model_custom_fillback_vit_by_head(
            model, masks, None, weights, weights, "magnitude", 0.3, return_mask_only=True
        )
    text = "\n".join(r.getMessage() for r in caplog.records)
    for line in (
        "Part 1: Attention Head Pruning",
        "Part 2: MLP Neuron Pruning",
        "Layer: blocks.0.attn.qkv",
        "  Shape: torch.Size([576, 192])",
        "  Num heads: 3, Head dim: 64, Embed dim: 192",
        "  Keeping 268/384 neurons",
        "  New sparsity: 33.33% (head-level)",
        "  New sparsity: 30.21% (neuron-level)",
        "  Total masks generated: 36",
        "  Attention layers: 18",
        "  MLP layers: 18",
        "  Overall sparsity: 31.77%",
        "  Mode: RSST (mask only)",
        "[ViT Head-level Quasi-Structured Pruning]",
        "  Criteria: magnitude",
    ):
        assert line in text, line
    assert re.search(
        r"  Head importance: \[\d+\.\d+ \d+\.\d+ \d+\.\d+\]\n  Keeping 2/3 heads: \[\d \d\]\n  Original", text
    )
