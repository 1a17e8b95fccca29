"""Every network with every method and every criterion: one decision and one training step at real size.

One batch of four images at 16 pixels (vit_*_imagenet: their patch). Element-wise masks do not depend on the criterion, so
they are made once a network and method. Networks above 15 million weights: all methods with one criterion, and all
criteria with one method; of the largest, only the two methods that regroup, since a smaller sister goes through the rest,
and vit_large_imagenet (304 million) is left out.

At every change run all combinations of the two networks of the tests, and of the small ones all pairs: every network
with every criterion and with every method, and every method with every criterion. The largest two of the small ones are
left out of the pairs but for one case with each of the methods that regroup.
"""

from __future__ import annotations

import copy
import gc
import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.networks import LARGE, MICRO, SMALL
from torch import nn

from structured_tickets.networks import MODELS, build_model
from structured_tickets.pruning import decide as rounds
from structured_tickets.pruning import oneshot as oneshot_pruners
from structured_tickets.pruning.budgets import kept_count
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.held import held_masks
from structured_tickets.pruning.masks import by_parameter, count_ones, current_key, refill_key
from structured_tickets.pruning.methods import METHODS
from structured_tickets.pruning.oneshot import Admm
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.training.epoch import Passer, train
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.trainee import Trainee
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import ranked_names

RATE = 0.4
BATCH = (torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4))
SETTINGS = SimpleNamespace(
    print_freq=10**6,
    block_loss_grad=False,
    epochs=1,
    RST_schedule="x",
    reg_granularity_prune=0.5,
    exponents=4,
    reg_horizon="documents",
    reg_guard=False,
    reg_upper_limit=1.0,
)
CASES = [(a, s, c) for a in (*MICRO, *SMALL) for s in METHODS for c in CRITERIA]
LARGEST = ("vit_base", "vit_base_imagenet", "densenet161")
HUGE = [
    (a, s, c)
    for a in LARGE
    if a != "vit_large_imagenet"
    for s in METHODS
    for c in CRITERIA
    if (c == "magnitude" and (METHODS[s].regroups or a not in LARGEST)) or (s == "refill" and a not in LARGEST)
]
# A Latin square: with the next network or method the criterion is the next.
LARGEST_OF_SMALL = ("resnet12", "res18")  # of more than 5 million weights
PAIRS = {
    (a, s, tuple(CRITERIA)[(i + k) % len(CRITERIA)])
    for i, a in enumerate(SMALL)
    for k, s in enumerate(METHODS)
    if a not in LARGEST_OF_SMALL or METHODS[s].regroups
}
TIERED = [
    case if case[0] in MICRO or case in PAIRS else pytest.param(*case, marks=pytest.mark.slow) for case in CASES + HUGE
]
NETWORKS: dict = {}
MASKS: dict = {}


def network(arch):
    if arch not in NETWORKS:
        for kept in (NETWORKS, MASKS):
            kept.clear()  # one network at a time: the large ones fill the memory
        gc.collect()
        torch.manual_seed(0)
        model = build_model(arch, 10, 16)
        NETWORKS[arch] = (model, unit_groups(model))
    return NETWORKS[arch]


@pytest.fixture(autouse=True)
def _once_for_all_criteria(monkeypatch):
    """Three rounds of SynFlow are as good a test as a hundred here."""
    monkeypatch.setattr(oneshot_pruners, "SYNFLOW_ROUNDS", 3)
    real = rounds.prune_once

    def prune_once(model, weights, names, rules, *rest):
        key = rules.struct
        if key not in MASKS:
            MASKS[key] = real(model, weights, names, rules, *rest)
        return {n: m.clone() for n, m in MASKS[key].items()}

    monkeypatch.setattr(rounds, "prune_once", prune_once)


def positions(part, mask):
    """A mask by unit: [units, entries]."""
    return mask.movedim(part.axis, 0)[part.index].flatten(1)


def one_step(model, pair, held, squeezes):
    """The whole network after one step at its real size."""
    model = copy.deepcopy(model)
    trainee = Trainee(model, held, lambda m: torch.optim.SGD(m.parameters(), 0.01), lambda m: None)
    current, refill = (trainee.cut(by_parameter(m)) for m in (pair.current, pair.refill))
    passer = Passer(
        SETTINGS,
        {current_key(n): m for n, m in current.items()},
        {refill_key(n): m for n, m in refill.items()},
        held=trainee.held,
    )
    pruner = Pruner(trainee.model, SETTINGS, passer) if squeezes else None
    train(1, [BATCH], trainee.model, nn.CrossEntropyLoss(), trainee.optimizer, 0, passer, pruner)
    trainee.write_back()
    return dict(model.named_parameters()), trainee.share


def test_all_pairs_run_at_every_change():
    assert {case[1:] for case in PAIRS} == set(itertools.product(METHODS, CRITERIA))
    smaller = [a for a in SMALL if a not in LARGEST_OF_SMALL]
    for which, rows in (((0, 1), METHODS), ((0, 2), CRITERIA)):
        pairs = {tuple(case[k] for k in which) for case in PAIRS if case[0] in smaller}
        assert pairs == set(itertools.product(smaller, rows))
    largest = [case[:2] for case in PAIRS if case[0] in LARGEST_OF_SMALL]
    assert sorted(largest) == sorted(itertools.product(LARGEST_OF_SMALL, ("refill", "rsst"))), "one case each"


@pytest.mark.parametrize("arch, struct, criterion", TIERED)
def test_one_decision_and_one_step(arch, struct, criterion):
    model, groups = network(arch)
    is_vit = MODELS[arch].spec.family == "vit"
    targets = ("head", "neuron") if is_vit else ("channel",)
    rules = RoundRules(struct, RATE, "round", criterion, targets=targets, mlp_prune_ratio=RATE, criteria_batches=1)
    weights = {n: v.detach() for n, v in model.state_dict().items()}
    admm = Admm(lambda m: torch.optim.SGD(m.parameters(), 0.01), lambda _: [BATCH], 1, 0.01)
    pair = decide(model, groups, rules, 0, ranked=weights, trained=weights, previous=None, batches=[BATCH], admm=admm)

    names = ranked_names(model, groups)
    total = sum(weights[n].numel() for n in names)
    current = by_parameter(pair.current)
    assert count_ones(current, names) == total - round(RATE * total)
    for group in groups:
        flags = [positions(part, pair.structure[part.name]) for part in group.slices]
        kept = flags[0].bool().any(1)
        assert all(torch.equal(f, kept.float().unsqueeze(1).expand_as(f)) for f in flags), group.name
        ones = int(current[group.root.name].sum(dtype=torch.float64))
        density_rule = max(1, ones * group.units // current[group.root.name].numel())
        assert int(kept.sum()) == (kept_count(group.units, RATE) if is_vit else density_rule), group.name

    squeezes = METHODS[struct].squeezes
    held = held_masks(pair, rules)
    after, share = one_step(model, pair, held, squeezes)
    assert set(held) == {part.name for g in groups for part in g.slices}
    assert all(not after[n].detach()[m == 0].any() for n, m in held.items())
    moved = [bool((after[n].detach() != weights[n])[m != 0].any()) for n, m in held.items() if bool(m.any())]
    assert sum(moved) > len(moved) / 2
    assert any(bool((p.detach() != weights[n]).any()) for n, p in after.items() if n not in held), "nothing is free"
    doomed = sum(int(d.sum()) for d in pair.doomed.values())
    assert doomed > 0 if squeezes else share < 0.9
