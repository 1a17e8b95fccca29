"""RSST: which weights are doomed, what the penalty adds, how lambda grows, and what is left in the end."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.networks import MICRO, SMALL, MiniVGG
from helpers.structures import RULES, settings

from structured_tickets.networks import MODELS, build_model
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.decide import decide, rank_and_prune
from structured_tickets.pruning.held import faded_units, held_masks
from structured_tickets.pruning.masks import HeldMask, MaskPair, current_key, refill_key
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.pruning.shares import shares
from structured_tickets.training.epoch import Passer, apply_reg, hardened, train, update_reg, validate
from structured_tickets.training.optimization import LearningRate
from structured_tickets.training.penalty.expected import DECOUPLED, DIRECT, GRADIENT, expected_squeeze, way_of_acting
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.penalty.schedules import HORIZONS, SCHEDULES, Clock
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import ranked_names


@pytest.fixture
def doomed_model():
    """A small network after round 0: its masks, and a pruner for round 1."""
    model = MiniVGG()
    groups = unit_groups(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    pair = decide(model, groups, RULES, 0, ranked=weights, trained=weights, previous=None, batches=[])
    args = settings()
    passer = Passer(args, pair.current, pair.refill)
    return model, pair, passer, Pruner(model, args, passer)


def test_the_doomed_are_the_alive_outside_the_structure_and_there_are_some(doomed_model):
    _, pair, _, pruner = doomed_model
    assert set(pruner.doomed) >= {"features.4.weight", "features.5.weight", "features.5.bias"}
    for name, doomed in pruner.doomed.items():
        expected = (pair.structure[name] == 0) & (pair.current[name] == 1)
        assert torch.equal(doomed.bool(), expected)


def test_the_gradient_moves_by_exactly_lambda_times_weight_and_only_there(doomed_model):
    model, _, passer, pruner = doomed_model
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    update_reg(passer, pruner, model, 1, 7, 10)
    apply_reg(pruner, model, passer)
    strength = pruner.strength
    assert strength == pytest.approx(math.expm1((8 / 20) ** 4) / (math.e - 1))
    for name, parameter in model.named_parameters():
        doomed = pruner.doomed.get(name, torch.zeros_like(parameter))
        penalised = torch.addcmul(before[name], torch.full_like(parameter, strength), parameter.detach())
        assert torch.equal(parameter.grad, torch.where(doomed.bool(), penalised, before[name]))


def test_block_loss_grad_replaces_the_gradient_of_doomed_weights_only(doomed_model):
    model, _, passer, pruner = doomed_model
    passer.args.block_loss_grad = True
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update_reg(passer, pruner, model, 1, 9, 10)
    apply_reg(pruner, model, passer)
    for name, parameter in model.named_parameters():
        doomed = pruner.doomed.get(name, torch.zeros_like(parameter)).bool()
        assert torch.equal(parameter.grad[~doomed], torch.ones_like(parameter)[~doomed])
        assert torch.equal(parameter.grad[doomed], (pruner.strength * parameter.detach())[doomed])


def test_decoupled_the_weight_shrinks_and_the_gradient_is_left_alone(doomed_model):
    model, _, passer, pruner = doomed_model
    passer.decoupled, passer.lr_share = True, 0.5
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update_reg(passer, pruner, model, 1, 9, 10)
    apply_reg(pruner, model, passer)
    for name, parameter in model.named_parameters():
        doomed = pruner.doomed.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * pruner.strength * doomed))
        assert bool((parameter.grad == 1).all())


def test_reg_is_zero_off_the_doomed_and_named_by_layer(doomed_model):
    model, pair, passer, pruner = doomed_model
    update_reg(passer, pruner, model, 1, 0, 10)
    assert pruner.reg["features.4"].shape == model.features[4].weight.shape
    for key, values in pruner.reg.items():
        name = key if key.endswith(".bias") else f"{key}.weight"
        assert set(values[pair.doomed[name]].tolist()) == {torch.tensor(pruner.strength).item()}
        assert not values[~pair.doomed[name]].any()
        assert not pruner.reg_[key][~pair.doomed[name]].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lambda_follows_the_closed_form_up_to_its_cap(schedule):
    delta, epochs, batches = 0.1, 3, 4
    formulas = {
        "x": lambda p: delta * p,
        "x^2": lambda p: delta * p**2,
        "x^3": lambda p: delta * p**3,
        "exp": lambda p: delta / (math.e - 1) * (math.exp(p) - 1),
        "exp_custom": lambda p: delta / (math.e - 1) * (math.exp(p) - 1),
        "exp_custom_exponents": lambda p: delta / (math.e - 1) * (math.exp(p**4) - 1),
        "early": lambda p: 9 * delta * p**2 if 3 * p < 1 else delta,
    }
    for limit in (0.05, math.inf):
        for epoch in range(epochs):
            for i in range(batches):
                progress = {"state": (epoch * batches + i + 1) / (epochs * batches), "epoch": (i + 1) / batches}
                for horizon, p in progress.items():
                    clock = Clock(schedule, delta, 4, epochs, horizon, upper_limit=limit)
                    expected = min(limit, formulas[schedule](p))
                    assert clock.strength(epoch, i, batches) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_grows_from_nothing_to_delta_at_the_defaults(schedule):
    """With delta and cap 1, four of them were the constant 1."""
    curve = [Clock(schedule, epochs=10).strength(e, i, 20) for e in range(10) for i in range(20)]
    assert curve == sorted(curve) and curve[0] < 0.01 and curve[-1] == pytest.approx(1)
    assert Clock(schedule, epochs=10).capped_share(20) == 0


def test_schedules_are_different_but_for_two_names_of_one():
    curves = {name: tuple(round(v, 6) for v in Clock(name, epochs=4).curve(25)) for name in SCHEDULES}
    assert curves["exp"] == curves["exp_custom"] and len(set(curves.values())) == len(SCHEDULES) - 1


def test_the_documents_letter_has_no_horizon_for_four_schedules():
    delta, epochs, batches = 0.1, 2, 3
    formulas = {
        "x": lambda raw: raw,
        "x^2": lambda raw: raw**2,
        "x^3": lambda raw: raw**3,
        "exp": math.exp,
    }
    assert set(formulas) == {name for name, schedule in SCHEDULES.items() if schedule.literal}
    for name in SCHEDULES:
        clock = Clock(name, delta, 4, epochs, "documents", upper_limit=math.inf)
        each = Clock(name, delta, 4, epochs, "epoch", upper_limit=math.inf)
        for epoch in range(epochs):
            for i in range(batches):
                raw = (epoch * batches + i + 1) * delta
                expected = formulas[name](raw) if name in formulas else each.strength(epoch, i, batches)
                assert clock.strength(epoch, i, batches) == pytest.approx(expected)


def test_over_a_round_lambda_rises_to_its_full_value_and_an_epoch_horizon_starts_again():
    whole, each = (Clock("exp_custom_exponents", epochs=3, horizon=h) for h in ("state", "epoch"))
    curve = [whole.strength(e, i, 4) for e in range(3) for i in range(4)]
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(1)
    assert each.strength(1, 0, 4) == each.strength(0, 0, 4) < each.strength(0, 3, 4) == pytest.approx(1)


def test_the_documents_guard_stops_lambda_early():
    clock = Clock("exp_custom_exponents", 1.0, 4, 1, horizon="documents", guard=True)
    assert len({clock.strength(0, i, 391) for i in range(391)}) == 1
    assert clock.strength(0, 390, 391) < 1e-10
    assert Clock("x", 0.25, horizon="documents", guard=True, upper_limit=9).strength(0, 390, 391) == 1


def test_schedules_never_overflow():
    for horizon in HORIZONS:
        assert Clock("exp", 1.0, horizon=horizon, upper_limit=math.inf, epochs=100).strength(99, 999, 1000) < math.inf
        assert Clock("x^3", 1e200, horizon=horizon, upper_limit=5).strength(0, 0, 10) == 5


def test_rsst_holds_the_dead_and_refill_all_but_the_structure():
    pair = MaskPair({"a.weight_mask": torch.tensor([0.0, 0, 1, 1])}, {"a": torch.tensor([0.0, 1, 0, 1])})
    free = RoundRules("rsst", 0.4, "round", "l1", rsst_dead="free")
    refill = RoundRules("refill", 0.4, "round", "l1")
    assert held_masks(pair, RULES)["a.weight"].tolist() == [0, 1, 1, 1]
    assert held_masks(pair, refill)["a.weight"].tolist() == [0, 1, 0, 1]
    assert held_masks(pair, free) == held_masks(None, refill) == {}
    part = shares(pair, ["a.weight"], RULES)
    assert (part.zero, part.squeezed, part.kept) == (25, 25, 50)
    assert shares(pair, ["a.weight"], free).zero == 0
    assert shares(pair, ["a.weight"], refill).zero == 50


def test_the_doomed_fade_out_while_the_others_live_and_hardening_changes_nothing(doomed_model):
    model, pair, passer, pruner = doomed_model
    batches = [(torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))) for _ in range(20)]
    passer.args.epochs, passer.args.reg_upper_limit = 4, 1.0
    pruner.clock = Clock("exp_custom", epochs=4)
    passer.held = HeldMask(model, pair.alive)
    passer.held.apply()
    before = pruner.doomed_norm()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    criterion = torch.nn.CrossEntropyLoss()
    for epoch in range(4):
        train(1, batches, model, criterion, optimizer, epoch, passer, pruner)
        assert passer.held.broken() == []
    assert pruner.doomed_norm() < 0.05 * before
    soft = validate(batches, model, criterion)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with hardened(model, pair.structure):
        assert not model.features[4].weight[pair.structure["features.4.weight"] == 0].any()
        assert validate(batches, model, criterion) == pytest.approx(soft, abs=5)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_as_documented_lets_the_dead_train_and_barely_squeezes(doomed_model):
    """The documents' literal text: what it does, so that nobody mistakes it for the method."""
    model, _, passer, _ = doomed_model
    args = settings(reg_horizon="documents", reg_guard=True)
    pruner = Pruner(model, args, passer)
    strengths = set()
    for epoch in range(3):
        passer.epoch = epoch
        for i in range(391):
            update_reg(passer, pruner, model, 1, i, 391)
            strengths.add(pruner.strength)
    assert max(strengths) < 1e-10


def test_the_shares_of_rate_over_rounds():
    target, cumulative = (RoundRules("rsst", 0.3, mode, "l1") for mode in ("target", "round"))
    assert [target.share(0.3, k) for k in range(3)] == [0.3] * 3
    assert [cumulative.share(0.3, k) for k in range(3)] == pytest.approx([0.3, 0.51, 0.657])


@pytest.mark.parametrize("struct", ["refill", "rsst"])
@pytest.mark.parametrize("target, kinds", [("head", ("head",)), ("mlp", ("neuron",)), ("both", ("head", "neuron"))])
@pytest.mark.parametrize("sorting", ["layer-wise", "global"])
def test_vit_rounds_keep_what_the_rules_say(struct, target, kinds, sorting):
    from structured_tickets.networks.vision_transformer import VisionTransformer
    from structured_tickets.pruning.shares import kept_per_kind

    model = VisionTransformer(10, 32, 8, 24, 2, 3, 2)
    groups = unit_groups(model)
    rules = RoundRules(struct, 0.34, "round", "magnitude", targets=kinds, mlp_prune_ratio=0.25, sorting_mode=sorting)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    pair, neurons = None, [36, 27, 20]
    for state in range(3):
        pair = decide(model, groups, rules, state, ranked=weights, trained=weights, previous=pair, batches=[])
        kept = kept_per_kind(groups, pair)
        if "neuron" in kinds:
            assert kept["neuron"][0] == (
                2 * neurons[state] if sorting == "layer-wise" else int(96 * 0.75 ** (state + 1))
            )
        if "head" in kinds:
            layer_wise, everywhere = [2, 2, 2], [3, 2, 1]
            assert kept["head"][0] == (layer_wise if sorting == "layer-wise" else everywhere)[state]
        if target == "mlp":
            assert kept["head"][0] > 0
        names = ranked_names(model, groups)
        weights = {n: v * held_masks(pair, rules).get(n, torch.ones_like(v)) for n, v in weights.items()}
        assert all(n in pair.structure for n in names)


@pytest.fixture(scope="module")
def tiny_rounds():
    """Per model: the model, and per criterion the masks after a round 0."""
    made: dict = {}

    def make(arch, criterion):
        if arch not in made:
            made.clear()  # one network at a time: the large ones fill the memory
            made[arch] = (build_model(arch, 10, 16), {})
        model, pairs = made[arch]
        if criterion not in pairs:
            targets = ("head", "neuron") if MODELS[arch].spec.family == "vit" else ("channel",)
            rules = RoundRules("rsst", 0.4, "round", criterion, targets=targets, mlp_prune_ratio=0.4)
            weights = {k: v.detach() for k, v in model.state_dict().items()}
            batches = [(torch.rand(4, 3, 16, 16), torch.arange(4))]
            pairs[criterion] = decide(
                model, unit_groups(model), rules, 0, ranked=weights, trained=weights, previous=None, batches=batches
            )
        return model, pairs[criterion]

    return make


# At every change every criterion with the two networks of the tests, and every small network but two with one criterion.
LONG = ("res18", "resnet12")
EVERY_MODEL = [
    pytest.param(a, c, marks=[pytest.mark.slow] * (a not in MICRO and (a in LONG or i % len(CRITERIA) != k)))
    for i, a in enumerate((*MICRO, *SMALL))
    for k, c in enumerate(CRITERIA)
]


@pytest.mark.parametrize("arch, criterion", EVERY_MODEL)
def test_every_model_criterion_and_schedule_runs_a_tiny_round(arch, criterion, tiny_rounds):
    model, pair = tiny_rounds(arch, criterion)
    batch = (torch.rand(4, 3, 16, 16), torch.arange(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for schedule in SCHEDULES:
        args = settings(RST_schedule=schedule, epochs=1, reg_upper_limit=0.5)
        passer = Passer(args, pair.current, pair.refill, decoupled=True)
        pruner = Pruner(model, args, passer)
        before = pruner.doomed_norm()
        train(1, [batch], model, torch.nn.CrossEntropyLoss(), optimizer, 0, passer, pruner)
        assert pruner.strength == 0.5, "one batch is the whole round: lambda is at its full value, the cap"
        assert pruner.doomed_norm() == pytest.approx(0.5 * before) and before > 0


def test_dead_weights_do_not_come_back_whatever_is_ranked():
    """Initial weights (`--rank_weights initial`) are not zero where the trained ones are."""
    ranked = {"a.weight": torch.tensor([9.0, 1.0, 2.0, 3.0])}
    pair = MaskPair({"a.weight": torch.tensor([0.0, 1, 1, 1])}, {"a.weight": torch.tensor([0.0, 0, 1, 1])})
    assert rank_and_prune(ranked, ["a.weight"], RULES, pair)["a.weight"].tolist() == [0, 0, 1, 1]


def test_a_unit_has_faded_out_when_its_living_weights_have():
    """Small against the layer at the round's start; weights that L1 has removed neither help nor count."""
    model = build_model("res20s", 10, 16)
    group = next(g for g in unit_groups(model) if g.name == "layer1.0.conv1")
    initial = {n: v.clone() for n, v in model.state_dict().items()}
    masks = {s.name: torch.ones_like(initial[s.name]) for s in group.slices}
    refill = {n: m.clone() for n, m in masks.items()}
    for mask in refill.values():
        mask[2:8] = 0
    masks["layer1.0.conv1.weight"][5] = 0
    masks["layer1.0.conv1.weight"][5, 0, 0, 0] = 1
    masks["layer1.0.conv1.weight"][6] = 0
    pair = MaskPair({current_key(n): m for n, m in masks.items()}, {refill_key(n): m for n, m in refill.items()})

    def faded(**factors):
        weights = {n: v * pair.alive.get(n, 1.0) for n, v in initial.items()}
        for unit, factor in factors.items():
            for name in masks:
                weights[name][int(unit[1:])] *= factor
        return faded_units([group], pair, weights, initial, 0.01).get(group.name, [])

    assert faded() == []
    assert faded(u0=0.0, u1=0.001) == [], "units that stay do not fade out, however small"
    assert faded(u3=0.001, u4=0.1, u5=0.5) == [3]
    assert faded(u4=0.03) == [], "the share is one of the weights, not of their squares"
    assert faded(u5=0.001) == [5], "one living weight is as good as many"
    weights = {n: v.clone() for n, v in initial.items()}
    weights["layer1.0.conv1.weight"][3] *= 0.001
    assert faded_units([group], pair, weights, initial, 0.01) == {}, "its BatchNorm still speaks"


def test_what_the_penalty_alone_would_leave_is_known_beforehand():
    rate = LearningRate(0.1, 2, 3)
    clock = Clock("x", 1.0, horizon="documents", upper_limit=0.5)
    assert expected_squeeze(clock, rate, 0.9, GRADIENT) == pytest.approx(0.5**6)
    assert expected_squeeze(clock, rate, 0.9, DECOUPLED) == pytest.approx(0.5**6)
    assert expected_squeeze(clock, rate, 0.5, GRADIENT) == pytest.approx(0.9**6)
    steep = Clock("x", 1.0, horizon="documents", upper_limit=9)
    assert expected_squeeze(steep, rate, 0.9, GRADIENT) == 0
    falling = LearningRate(0.1, 2, 3, schedule="multistep", milestones=(1,))
    assert expected_squeeze(clock, falling, 0.9, DECOUPLED) == pytest.approx(0.5**3 * 0.95**3)
    assert expected_squeeze(clock, falling, 0.9, DIRECT) == pytest.approx(0.5**6)


@pytest.mark.parametrize(
    "clock, rate, adaptive, way",
    [
        (Clock("x", 1.0, epochs=2), LearningRate(0.1, 2, 3), False, GRADIENT),
        (Clock("x", 1.0, epochs=2), LearningRate(0.1, 2, 3), True, DECOUPLED),
        (Clock("x", 1.0, epochs=20), LearningRate(0.01, 20, 10), False, GRADIENT),  # long enough
        (Clock("x", 1.0, epochs=2), LearningRate(0.01, 2, 3), False, DECOUPLED),
        (Clock("x^3", 1.0, epochs=2), LearningRate(0.01, 2, 3, schedule="multistep", milestones=(1,)), False, DIRECT),
        (Clock("x^3", 1.0, epochs=2), LearningRate(0.01, 2, 3, schedule="multistep", milestones=(1,)), True, DIRECT),
        (
            Clock("x", 0.01, epochs=2),
            LearningRate(0.2, 2, 3),
            False,
            GRADIENT,
        ),  # none does; in the gradient it leaves least
        (Clock("x", 1.5, epochs=2, upper_limit=2.0), LearningRate(0.001, 2, 3), False, GRADIENT),  # signs would change
    ],
)
def test_short_rounds_squeeze_directly_and_long_ones_in_the_gradient(clock, rate, adaptive, way):
    assert way_of_acting(clock, rate, 0.9, adaptive) == way
