"""The documents' worked examples and figures."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch

from main_imp_fillback import apply_reg, train, update_reg
from pruning_utils import extract_mask, prune_model_custom_fillback, pruning_model, regroup, remove_prune
from reg_pruner_files import reg_pruner
from structured_tickets.networks import build_model
from structured_tickets.pruning.budgets import budget
from structured_tickets.pruning.evidence import Evidence
from structured_tickets.pruning.masks import MaskPair, l1_mask
from structured_tickets.unit_groups.unit import Slice, UnitGroup
from vit_pruning_utils import (
    extract_mask_vit,
    prune_model_custom_fillback_vit,
    prune_model_custom_fillback_vit_by_head,
    pruning_model_vit,
    remove_prune_vit,
)
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


# Document 004, section 4: flags and nothing else.
FLAGS = {
    "pruning_times": 20,
    "rate": 0.2,
    "prune_type": "lt",
    "struct": "rsst",
    "fillback_rate": 0.0,
    "criteria": "magnitude",
    "RST_schedule": "exp_custom_exponents",
    "reg_granularity_prune": 1.0,
    "exponents": 4,
    "block_loss_grad": False,
    "epochs": 3,
    "batch_size": 4,
    "lr": 0.01,
    "warmup": 20,
    "rewind_epoch": 24,
}
BATCHES = [(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(k)), torch.arange(4)) for k in range(5)]


class PlainPasser:
    """What the documents call a passer: an object with attributes."""


def after_round_0(arch, **flags):
    """Documents 001 and 004, steps 2 to 4: the network at its initial weights again, and the masks in a passer."""
    args, passer = SimpleNamespace(**{**FLAGS, **flags}), PlainPasser()
    model = build_model(arch, 10, 16)
    initialization = copy.deepcopy(model.state_dict())
    train_weight = {k: v.clone() for k, v in model.state_dict().items()}
    given = {"train_loader": BATCHES, "trained_weight": train_weight, "init_weight": initialization}
    if arch.startswith("vit"):
        pruning_model_vit(model, args.rate)
        passer.current_mask = extract_mask_vit(model.state_dict())
        passer.refill_mask = prune_model_custom_fillback_vit_by_head(
            model, mask_dict=passer.current_mask, criteria=args.criteria, return_mask_only=True
        )
        remove_prune_vit(model)
    else:
        pruning_model(model, args.rate, conv1=False)
        passer.current_mask = extract_mask(model.state_dict())
        passer.refill_mask = prune_model_custom_fillback(
            model,
            mask_dict=passer.current_mask,
            criteria=args.criteria,
            fillback_rate=0.0,
            return_mask_only=True,
            **given,
        )
        remove_prune(model, conv1=False)
    model.load_state_dict(initialization)
    passer.args = args
    return model, args, passer


@pytest.mark.parametrize("arch", ["res20s", "vit_tiny"])
@pytest.mark.parametrize("block_loss_grad", [False, True])
def test_the_library_flow_of_the_documents(arch, block_loss_grad):
    """`Pruner(model, args, passer)`, then `update_reg` and `apply_reg` in each batch, as document 004 writes them."""
    model, args, passer = after_round_0(arch, block_loss_grad=block_loss_grad)
    pruner = reg_pruner.Pruner(model, args, passer)
    assert pruner.doomed and ("layer1.0.bn1.bias" in pruner.doomed) == (arch == "res20s")
    optimizer, criterion = torch.optim.SGD(model.parameters(), args.lr), torch.nn.CrossEntropyLoss()
    strengths, state = [], 1
    for _ in range(args.epochs):
        for i, (image, target) in enumerate(BATCHES):
            loss = criterion(model(image), target)
            optimizer.zero_grad()
            loss.backward()
            before = {n: p.grad.clone() for n, p in model.named_parameters() if n in pruner.doomed}
            update_reg(passer, pruner, model, state, i, len(BATCHES))
            model = apply_reg(pruner, model, passer)
            strengths.append(pruner.strength)
            for name, gradient in before.items():
                doomed, weight = pruner.doomed[name].bool(), model.get_parameter(name)
                own = pruner.strength * weight.detach() + (0 if block_loss_grad else gradient)
                torch.testing.assert_close(weight.grad, torch.where(doomed, own, gradient))
            optimizer.step()
    assert strengths == sorted(strengths) and strengths[-1] == pytest.approx(1), "the epochs are counted"


def test_the_documents_condition_sets_lambda_at_the_first_batch_of_each_epoch():
    model, args, passer = after_round_0("vit_tiny", RST_schedule="x")
    pruner = reg_pruner.Pruner(model, args, passer)
    strengths = []
    for _ in range(3):
        for i in range(5):
            if passer.args.reg_granularity_prune * i < 1:
                update_reg(passer, pruner, model, 1, i, 5)
            strengths.append(round(pruner.strength, 6))
    assert strengths == [*[round(1 / 15, 6)] * 5, *[round(6 / 15, 6)] * 5, *[round(11 / 15, 6)] * 5]


def test_an_epoch_of_the_documents_needs_settings_and_masks_only():
    model, args, passer = after_round_0("res20s", RST_schedule="x", lr=0.1)
    pruner = reg_pruner.Pruner(model, args, passer)
    before = pruner.doomed_norm()
    optimizer, criterion = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9), torch.nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        train(1, BATCHES, model, criterion, optimizer, epoch, passer, pruner)
    assert pruner.strength == pytest.approx(1) and pruner.doomed_norm() < 0.5 * before


def test_the_pruners_own_methods():
    """Document 004, section 6.3: `_update_reg`, `apply_reg` and `prune`."""
    model, args, passer = after_round_0("res20s", epochs=2)
    pruner = reg_pruner.Pruner(model, args, passer)
    model(BATCHES[0][0]).sum().backward()
    gradient = model.layer1[0].conv1.weight.grad.clone()
    pruner._update_reg(4, 10)
    pruner.apply_reg()
    assert pruner.strength == pytest.approx(pruner.clock.strength(0, 4, 10)) and pruner.strength > 0
    moved = model.layer1[0].conv1.weight.grad != gradient
    assert torch.equal(moved, pruner.doomed["layer1.0.conv1.weight"].bool() & moved) and bool(moved.any())

    pruner = reg_pruner.Pruner(model, args, passer)
    optimizer = torch.optim.SGD(model.parameters(), args.lr)
    assert pruner.prune(BATCHES, torch.nn.CrossEntropyLoss(), optimizer) is model
    assert pruner.strength == pytest.approx(1) and pruner.doomed_norm() == 0
    assert bool((model.layer1[0].conv1.weight[passer.refill_mask["layer1.0.conv1"] == 1] != 0).all())


def test_a_round_without_a_structure_dooms_nothing():
    model, args, passer = after_round_0("res20s")
    passer.refill_mask = None
    assert reg_pruner.Pruner(model, args, passer).doomed == {}


def test_masks_of_other_layers_are_still_refused():
    model, args, passer = after_round_0("res20s")
    del passer.current_mask["layer1.0.conv1.weight_mask"]
    with pytest.raises(ValueError, match=r"the masks cover different parameters: \['layer1.0.conv1.weight'\]"):
        reg_pruner.Pruner(model, args, passer)


def test_the_documents_order_of_arguments_ends_in_what_to_write():
    model, _, passer = after_round_0("res20s")
    with pytest.raises(
        TypeError, match=r"name what follows mask_dict.*criteria='magnitude', fillback_rate="
    ) as refused:
        prune_model_custom_fillback(model, passer.current_mask, "magnitude", 0.1)
    assert "\n" not in str(refused.value)


def test_refill_without_initial_weights_says_so():
    model, _, passer = after_round_0("vit_tiny")
    for function in (prune_model_custom_fillback_vit, prune_model_custom_fillback_vit_by_head):
        with pytest.raises(ValueError, match="init_weight is required"):
            function(model, passer.current_mask, criteria="magnitude")
