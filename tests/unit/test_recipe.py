"""What a training recipe consists of: schedules, and what an optimizer does with gradients and decay."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again
from helpers.steps import Case
from helpers.watchers import waiting
from torch import nn

from structured_tickets.runs.folder import RunFolder
from structured_tickets.settings.flags import parse_args
from structured_tickets.settings.interpret import optimizer_from, warnings_of_warmup
from structured_tickets.sweeps.search import scaled
from structured_tickets.training.optimization import OPTIMIZERS, LearningRate
from structured_tickets.training.rounds import learning_rate_of

RECIPE = {"nesterov": True, "no_decay_on_bias_and_norm": True, "clip_grad": 0.5, "weight_decay": 0.01}
RECIPE |= {"lr_schedule": "onecycle", "warmup_steps": 3, "warmup": None}


def rates(rate, epochs, steps):
    return [rate.at(epoch, i) for epoch in range(epochs) for i in range(steps)]


@pytest.mark.parametrize("warmup", [1, 3])
def test_onecycle_is_torchs(warmup):
    epochs, steps = 10, 4
    ours = rates(LearningRate(0.4, epochs, steps, warmup, "onecycle"), epochs, steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    total = epochs * steps
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total, pct_start=warmup * steps / total)
    wanted = []
    for _ in range(total):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(wanted) < total:
            theirs.step()
    assert ours == pytest.approx(wanted, rel=1e-9)
    assert max(ours) == ours[warmup * steps - 1] == pytest.approx(0.4)


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "linear", "onecycle"])
def test_without_a_warm_up_a_schedule_begins_at_its_peak(schedule):
    assert LearningRate(0.4, 3, 5, 0, schedule).at(0, 0) == pytest.approx(0.4)


def test_linear_falls_in_equal_steps():
    ours = rates(LearningRate(1.0, 3, 2, 1, "linear"), 3, 2)
    assert ours == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "linear", "onecycle"])
def test_a_warm_up_in_steps_is_one_in_epochs(schedule):
    in_epochs = LearningRate(0.3, 6, 5, 2, schedule, (1, 4))
    in_steps = LearningRate(0.3, 6, 5, 0, schedule, (1, 4), warmup_steps=10)
    assert rates(in_epochs, 6, 5) == rates(in_steps, 6, 5)
    shorter = LearningRate(0.3, 6, 5, 0, "cosine", warmup_steps=3)
    assert rates(shorter, 1, 5)[:4] == pytest.approx([0.1, 0.2, 0.3, 0.3])


def test_the_flags_reach_the_schedule():
    args = parse_args(["--lr=0.2", "--epochs=4", "--lr_schedule=linear", "--warmup_steps=7"])
    rate = learning_rate_of(args, 0, 5)
    assert rate == LearningRate(0.2, 4, 5, 20, "linear", args.decreasing_lr, 7)
    assert rate.at(0, 6) == pytest.approx(0.2) and rate.at(3, 4) < 0.02
    assert scaled(["--epochs=120", "--warmup_steps=300"], 40)["warmup_steps"] == 100
    assert [w for w in parse_args(["--warmup=3", "--warmup_steps=7"]).warnings if "--warmup" in w]


def test_a_warm_up_in_steps_that_takes_up_the_round_gets_a_warning():
    said = warnings_of_warmup(parse_args(["--warmup_steps=40", "--epochs=4"]), 10)
    assert said == ["--warmup_steps 40 takes up the whole round (40 steps). Use a shorter warm-up"]
    assert warnings_of_warmup(parse_args(["--warmup_steps=39", "--epochs=4"]), 10) == []
    assert warnings_of_warmup(parse_args([]), 1) == []


def test_nesterov_is_torchs():
    """Two steps of the plain formula: v = m v + g, w -= lr (g + m v)."""
    args = parse_args(["--nesterov", "--lr=0.1", "--momentum=0.9", "--weight_decay=0"])
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = optimizer_from(args, layer)
    w, v = torch.zeros(1, 2), torch.zeros(1, 2)
    for g in (torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])):
        layer.weight.grad = g.clone()
        optimizer.step()
        v = 0.9 * v + g
        w = w - 0.1 * (g + 0.9 * v)
    torch.testing.assert_close(layer.weight.detach(), w)


@pytest.mark.parametrize("optimizer, spared", [("sgd", True), ("sgd", False), ("adamw", True)])
def test_biases_and_norms_are_spared_from_decay(optimizer, spared):
    words = ["--lr=0.1", "--weight_decay=0.5", f"--optimizer={optimizer}"]
    words += ["--no_decay_on_bias_and_norm"] if spared and optimizer == "sgd" else []
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.ones_(model[0].bias)
    made = optimizer_from(parse_args(words), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == ({"0.weight"} if spared else {"0.weight", "0.bias", "1.weight"})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_too_long_is_scaled_down_to_the_limit(optimizer):
    """The gradient of the loss: the penalty comes on top of it, at its full strength."""
    seen = {}
    for most in (None, 1e-3, 1e3):
        case = Case(optimizer=optimizer, images=8, clip_grad=most, epochs=1)
        real, norms = case.optimizer.step, []

        def step(real=real, case=case, norms=norms):
            doomed = case.pruner.doomed
            gradients = {n: p.grad.clone() for n, p in case.model.named_parameters()}
            pulls = {n: case.pruner.clock.strength(0, 0, 1) * doomed[n] * case.model.get_parameter(n) for n in doomed}
            norms.append(gradients | {n: gradients[n] - pull.detach() for n, pull in pulls.items()})
            return real()

        case.optimizer.step = step
        case.train(epochs=[0])
        seen[most] = norms[0]
    length = {k: float(torch.stack([g.norm() for g in v.values()]).norm()) for k, v in seen.items()}
    assert length[None] > 0.1 and length[1e3] == pytest.approx(length[None], rel=1e-5)
    assert length[1e-3] == pytest.approx(1e-3, rel=1e-3)
    for name, value in seen[None].items():
        torch.testing.assert_close(seen[1e-3][name], value * 1e-3 / length[None], rtol=1e-2, atol=1e-7)


def test_clipping_does_not_wait():
    case = Case("dropping", clip_grad=0.1)
    case.train(epochs=[0])
    with waiting() as found:
        case.train(epochs=[1])
    without = Case("dropping")
    without.train(epochs=[0])
    with waiting() as usual:
        without.train(epochs=[1])
    assert found == usual


def test_a_recipe_continues_at_every_step(tmp_path, monkeypatch):
    words = {**RECIPE, "struct": "rsst", "epochs": 3, "prune_type": "lrr"}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 2
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_recipe_at_real_size_trains_the_same_network(optimizer, tmp_path):
    words = {**RECIPE, "struct": "refill", "criteria": "magnitude", "precision": "fp32", "optimizer": optimizer}
    words |= {"lr": 1e-3} if optimizer == "adamw" else {}
    ends = []
    for compact in ("true", "false"):
        assert run(*tiny(tmp_path / compact, compact_training=compact, **words)) == 0
        ends.append(RunFolder.load(tmp_path / compact / "1checkpoint.pth.tar").state_dict)
    for name, value in ends[0].items():
        if not name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4, msg=name)
