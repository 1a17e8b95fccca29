"""float16: the loss is scaled so that gradients are neither zero nor infinite, and nothing in a step waits for that."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.commands import run, tiny
from helpers.fake_graphs import FakeGraphs
from helpers.interruptions import stopped_again_and_again
from helpers.steps import Case, assert_same
from helpers.watchers import Numbers, waiting
from torch import nn

from structured_tickets.base.errors import DivergedError, Interrupted
from structured_tickets.networks.precision import choose_precision
from structured_tickets.runs.checkpoint_schema import LATER_FIELDS
from structured_tickets.training import loss_scale, step
from structured_tickets.training.loss_scale import FIRST, LossScale, is_state
from structured_tickets.training.meter import Meter
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.recording import Recorder

HALF = torch.float16
CPU = torch.device("cpu")


def gradients_of(scale, factor):
    """Gradients of a layer in float16, of a loss times a factor."""
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 2), torch.rand(3, 4)
    with torch.autocast("cpu", HALF):
        loss = layer(x).float().square().mean() * factor
    (scale.scaled(loss) if scale else loss).backward()
    gradients = [p.grad for p in layer.parameters()]
    if scale:
        scale.unscale(gradients)
    return gradients


def test_small_gradients_are_there_with_a_scale_and_zero_without():
    plain, scaled, wanted = gradients_of(None, 1e-8), gradients_of(LossScale(CPU), 1e-8), gradients_of(None, 1.0)
    assert all((g == 0).all() for g in plain)
    for ours, exact in zip(scaled, wanted, strict=True):
        torch.testing.assert_close(ours, exact * 1e-8, rtol=0.02, atol=1e-11)


def test_the_scale_falls_at_an_overflow_and_grows_again(monkeypatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    scale, seen = LossScale(CPU), []
    for gradient in (1.0, math.inf, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0):
        scale.unscale([torch.tensor([gradient])])
        scale.update()
        seen.append(float(scale.scale) / FIRST)
    assert seen == [1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5]
    assert scale.state() == {"scale": FIRST / 2, "calm": 1}
    assert LossScale(CPU, scale.state()).state() == scale.state()
    assert not scale.is_exhausted() and LossScale(CPU, {"scale": 2.0**-15, "calm": 0}).is_exhausted()


class AfterSome:
    """A signal after so many steps."""

    signal = None

    def __init__(self, steps):
        self.left = steps

    def obey(self, where):
        self.left -= 1
        if self.left == 0:
            raise Interrupted(where, 15)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_whose_gradients_overflow_is_left_out(optimizer, decoupled, fused, monkeypatch):
    case, other = (Case(optimizer=optimizer, decoupled=decoupled, precision=HALF) for _ in range(2))
    for each in (case, other):
        for group in each.optimizer.param_groups:
            group["fused"] = fused
    real = LossScale.unscale

    def overflowing(self, gradients):
        ((_, body),) = case.passer.recorder._kept.values() or [(None, None)]
        if self is case.passer.scale and int(body.at) == 2:
            gradients[0].flatten()[0] = math.inf
        real(self, gradients)

    monkeypatch.setattr(LossScale, "unscale", overflowing)
    case.train(epochs=[0])
    other.passer.stop = AfterSome(2)
    with pytest.raises(Interrupted):
        other.train(epochs=[0])
    weights = dict(other.model.named_parameters())
    for name, value in case.model.named_parameters():
        assert torch.equal(value, weights[name]), name
    assert case.passer.scale.state() == {"scale": FIRST / 2, "calm": 0}
    assert other.passer.scale.state() == {"scale": FIRST, "calm": 2}
    case.train(epochs=[1])
    assert not torch.equal(case.model.fc.weight, weights["fc.weight"])


def test_gradients_that_always_overflow_end_the_run(monkeypatch):
    case = Case(precision=HALF)
    case.passer.scale = LossScale(CPU, {"scale": 2.0**-12, "calm": 0})
    real = LossScale.unscale

    def overflowing(self, gradients):
        gradients[0].fill_(math.inf)
        real(self, gradients)

    monkeypatch.setattr(LossScale, "unscale", overflowing)
    with pytest.raises(DivergedError, match="gradients became NaN or infinite at every loss scale by round 1, epoch 0"):
        case.train(epochs=[0])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_in_a_scaled_step_waits_or_is_frozen(optimizer, monkeypatch):
    case, seen, real = Case(optimizer=optimizer, precision=HALF, images=32), [], step.Step.once

    def once(self):
        with waiting() as found, Numbers() as numbers:
            real(self)
        seen.append((found, numbers.calls))

    monkeypatch.setattr(step.Step, "once", once)
    case.train(epochs=[0, 1])
    assert all(found == [] for found, _ in seen) and all(calls == seen[1][1] for _, calls in seen[1:])


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_epoch_continues_with_its_scale(at, monkeypatch):
    monkeypatch.setattr(loss_scale, "INTERVAL", 2)  # so that it grows within the epoch, and overflows
    through, first, second = (Case(precision=HALF, images=36) for _ in range(3))
    through.train(epochs=[1])
    first.passer.stop = AfterSome(at)
    with pytest.raises(Interrupted):
        first.train(epochs=[1])
    second.model.load_state_dict(first.model.state_dict())
    second.trainee.load_optimizer_state(first.trainee.optimizer_state())
    second.passer.scale = LossScale(CPU, first.passer.scale.state())
    second.passer.meter = Meter.start(CPU, first.passer.meter.reached())
    second.train(epochs=[1], start=at)
    assert second.passer.scale.state() == through.passer.scale.state() == {"scale": 2 * FIRST, "calm": 0}
    assert_same(second.values(), through.values())


def test_scaled_steps_are_recorded():
    graphs = FakeGraphs()
    case, eager = (Case(precision=HALF, images=36, epochs=20, recorder=Recorder(g)) for g in (graphs, None))
    for each in (case, eager):
        each.train(epochs=[0, 1])
    assert graphs.events.count("replay") == 5
    assert_same(case.values(), eager.values())
    assert case.passer.scale.state() == eager.passer.scale.state() == {"scale": FIRST, "calm": 10}


def test_a_run_continues_with_its_scale(tmp_path, monkeypatch):
    """Interrupted every few steps, with two rounds and a scale that changes all the time."""
    monkeypatch.setattr(loss_scale, "INTERVAL", 3)
    words = {"precision": "fp16", "pruning_times": 2, "epochs": 2}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    times = stopped_again_and_again(monkeypatch, 5, lambda turn: tiny(tmp_path / "parts", **words))
    assert times > 1
    ends = [torch.load(tmp_path / n / "1checkpoint.pth.tar", weights_only=True) for n in ("through", "parts")]
    assert ends[0]["loss_scale"] == ends[1]["loss_scale"] and ends[0]["loss_scale"]["scale"] > FIRST
    assert ends[0]["precision"] == "float16"
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name


HOSTILE = [
    {"scale": 0.0, "calm": 0},
    {"scale": -1.0, "calm": 0},
    {"scale": math.inf, "calm": 0},
    {"scale": math.nan, "calm": 0},
    {"scale": 1.0, "calm": -1},
    {"scale": 1.0, "calm": 10**9},
    {"scale": 1.0, "calm": True},
    {"scale": 1.0},
    {"scale": "1", "calm": 0},
    {"scale": 1.0, "calm": 0, "more": 1},
    [],
    None,
]


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_a_checkpoint_with_another_scale_is_refused(value):
    assert not LATER_FIELDS["loss_scale"][0](value)


def test_scales_that_are_written_are_accepted():
    assert is_state({}) and is_state(LossScale(CPU).state()) and is_state({"scale": 2.0**-20, "calm": 1999})


CARDS = {  # capability, native bfloat16 -> auto
    "H100": ((9, 0), True, torch.bfloat16),
    "A100": ((8, 0), True, torch.bfloat16),
    "T4": ((7, 5), False, HALF),
    "V100": ((7, 0), False, HALF),
    "P100": ((6, 0), False, torch.float32),
}


@pytest.mark.parametrize("card", CARDS)
def test_auto_is_the_fastest_type_of_a_card(card, monkeypatch):
    capability, native, wanted = CARDS[card]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda", 0)) == wanted
    assert choose_precision("auto", torch.device("mps")) == torch.float32
    assert choose_precision("fp16", CPU) == HALF
