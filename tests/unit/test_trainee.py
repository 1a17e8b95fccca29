"""Training at real size is training under the mask."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.networks import MICRO, SMALL
from helpers.structures import random_structure
from torch import nn

from structured_tickets.networks import MODELS, build_model
from structured_tickets.networks.layers import Normalize
from structured_tickets.pruning.masks import MaskPair, current_key, refill_key
from structured_tickets.training.epoch import Passer, train
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.trainee import IDLE, ON_CARDS, Trainee

STEPS = 20
SETTINGS = SimpleNamespace(
    print_freq=10**6,
    block_loss_grad=False,
    epochs=1,
    RST_schedule="x",
    reg_granularity_prune=0.02,
    exponents=4,
    reg_horizon="documents",
    reg_guard=False,
    reg_upper_limit=1.0,
)


def batches(dtype, size=4, count=STEPS):
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.rand(size, 3, 16, 16, generator=draw).to(dtype), torch.randint(0, 10, (size,), generator=draw))
        for _ in range(count)
    ]


def network(arch, dtype=torch.float64):
    torch.manual_seed(0)
    model = build_model(arch, 10, 16)
    model.normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    return model.to(dtype)


def mask_pair(model, seed, share):
    """A structure, and an element-wise mask that leaves some of the dropped units nothing at all."""
    parameters = dict(model.named_parameters())
    structure = random_structure(model, seed, share)
    draw = torch.Generator().manual_seed(seed + 1)
    alive = random_structure(model, seed + 2, 0.5)
    current = {}
    for name, mask in structure.items():
        spared = (torch.rand(mask.shape, generator=draw) < 0.7).float() if parameters[name].ndim > 1 else torch.ones(1)
        current[name] = torch.maximum(mask, alive[name]) * spared
    return MaskPair({current_key(n): m for n, m in current.items()}, {refill_key(n): m for n, m in structure.items()})


def trained(model, pair, struct, optimizer, compact, data, took_up=None, lr=0.01, widths=None):
    """The whole network and its trainee after training on the batches."""
    model = copy.deepcopy(model)
    held = pair.structure if struct == "refill" else pair.alive
    build = lambda m: OPTIMIZERS[optimizer].build(m, lr if optimizer == "sgd" else 1e-3, 0.9, 0.05)  # noqa: E731
    trainee = Trainee(model, held, build, lambda m: None, compact, widths)
    if took_up:
        trainee.load_optimizer_state(took_up)
    current, refill = (trainee.cut(m) for m in ({n: pair.current[n] for n in held}, pair.structure))
    passer = Passer(
        SETTINGS,
        {current_key(n): m for n, m in current.items()},
        {refill_key(n): m for n, m in refill.items()},
        held=trainee.held,
    )
    pruner = Pruner(trainee.model, SETTINGS, passer) if struct == "rsst" else None
    train(1, data, trainee.model, nn.CrossEntropyLoss(), trainee.optimizer, 0, passer, pruner)
    trainee.write_back()
    return model, trainee


def differences(one, other, held):
    """Largest difference of each parameter, and of each optimizer state where nothing is held at zero."""
    names = [n for n, _ in one[0].named_parameters()]
    weights = dict(other[0].named_parameters())
    found = {n: float((p.detach() - weights[n].detach()).abs().max()) for n, p in one[0].named_parameters()}
    ours, theirs = (t.optimizer_state() for _, t in (one, other))
    order = [i for g in ours["param_groups"] for i in g["params"]]
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    plain = [n for n in names if weights[n].ndim < 2 or n.endswith(("pos_embed", "cls_token"))]
    of = names if len(ours["param_groups"]) == 1 else [n for n in names if n not in plain] + plain
    for name, index in zip(of, order, strict=True):
        for key, value in ours["state"][index].items():
            gap = (value - theirs["state"][index][key]).abs()
            found[f"{name} {key}"] = float((gap * held.get(name, 1.0)).max() if gap.ndim else gap)
    return found


# Deep networks of thin layers multiply a rounding error by ten in every step at this rate, float64 or not.
STEADY = (*MICRO, "res20s", "res56s", "vit_tiny")
# At every change the networks of the tests with all optimizers and methods, and each small one with one of each in turn.
LONG = ("res56s", "res18", "resnet12")
TWENTY_STEPS = [
    pytest.param(a, o, s, marks=[pytest.mark.slow] * (a not in MICRO and (a in LONG or i % 4 != 2 * k + j)))
    for i, a in enumerate((*MICRO, *SMALL))
    for j, o in enumerate(OPTIMIZERS)
    for k, s in enumerate(("refill", "rsst"))
]


@pytest.mark.parametrize("arch, optimizer, struct", TWENTY_STEPS)
def test_twenty_steps_at_real_size_and_under_the_mask_agree(arch, optimizer, struct):
    """In float64, where rounding cannot hide or feign a difference."""
    model, data = network(arch), batches(torch.float64, count=STEPS if arch in STEADY else 2)
    pair = mask_pair(model, 3, 0.5)
    held = pair.structure if struct == "refill" else pair.alive
    masked = trained(model, pair, struct, optimizer, False, data)
    compact = trained(model, pair, struct, optimizer, True, data)
    share = compact[1].share
    assert masked[1].model is masked[0] and compact[1].model is not compact[0] and share < 0.9
    computed = sum(p.numel() for n, p in compact[1].model.named_parameters() if not n.startswith(IDLE))
    assert computed == pytest.approx(share * sum(p.numel() for p in model.parameters()))
    assert max(differences(compact, masked, held).values()) <= 1e-6
    start = model.state_dict()
    assert any((v - start[n]).abs().max() > 1e-3 for n, v in masked[0].state_dict().items())


FOR_CARDS = [
    pytest.param(a, o, s, marks=[pytest.mark.slow] * (a not in MICRO))
    for a, o, s in (
        *((a, o, s) for a in MICRO for o in OPTIMIZERS for s in ("refill", "rsst")),
        ("res20s", "sgd", "rsst"),
        ("vit_tiny", "adamw", "rsst"),
        ("res18", "adamw", "refill"),
        ("densenet12", "sgd", "refill"),
    )
    if a in MODELS
]


@pytest.mark.parametrize("arch, optimizer, struct", FOR_CARDS)
def test_twenty_steps_agree_with_the_widths_for_cards(arch, optimizer, struct):
    model, data = network(arch), batches(torch.float64, count=STEPS if arch in STEADY else 2)
    pair = mask_pair(model, 3, 0.5)
    masked = trained(model, pair, struct, optimizer, False, data)
    compact = trained(model, pair, struct, optimizer, True, data, widths=ON_CARDS)
    assert (compact[1].model is compact[0]) == ((arch, struct) == ("micro_cnn", "rsst"))  # 9 of 16 filters are 16 there
    held = pair.structure if struct == "refill" else pair.alive
    assert max(differences(compact, masked, held).values()) <= 1e-6


@pytest.mark.parametrize("arch", [pytest.param(a, marks=[pytest.mark.slow] * (a not in MICRO)) for a in STEADY])
def test_in_float32_too(arch):
    """A fresh ResNet learns slowly here: at 0.01 rounding alone moves it by more, the same network in float64 too."""
    model, data = network(arch, torch.float32), batches(torch.float32, 32)
    pair = mask_pair(model, 3, 0.5)
    lr = 0.01 if MODELS[arch].spec.family == "vit" else 1e-4
    both = [trained(model, pair, "refill", "sgd", compact, data, lr=lr)[0] for compact in (False, True)]
    for (name, ours), theirs in zip(both[1].named_parameters(), both[0].parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-4, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_can_be_taken_up_by_the_other_kind(optimizer):
    model, data = network("micro_cnn"), batches(torch.float64)
    pair = mask_pair(model, 3, 0.5)
    through = trained(model, pair, "rsst", optimizer, False, data)
    for kinds in ((True, True), (True, False), (False, True)):
        first = trained(model, pair, "rsst", optimizer, kinds[0], data[:10])
        second = trained(first[0], pair, "rsst", optimizer, kinds[1], data[10:], first[1].optimizer_state())
        # Lambda starts again in the second half, so that the runs are compared with each other.
        reference = trained(model, pair, "rsst", optimizer, False, data[:10])
        reference = trained(reference[0], pair, "rsst", optimizer, False, data[10:], reference[1].optimizer_state())
        assert max(differences(second, reference, pair.alive).values()) <= 1e-6
    assert max(differences(through, reference, pair.alive).values()) > 1e-3


def test_a_network_without_anything_to_cut_is_trained_itself():
    model = network("res20s")
    for held in ({}, {n: torch.ones_like(p) for n, p in model.named_parameters() if p.ndim > 1}):
        build = lambda m: OPTIMIZERS["sgd"].build(m, 0.1, 0.9, 0.0)  # noqa: E731
        trainee = Trainee(model, held, build, lambda m: None)
        assert trainee.model is model and trainee.share == 1
