"""Gradients of several batches that make one step: `--accumulate`."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again
from helpers.steps import Case
from torch import nn

from structured_tickets.data.mixing import Mixing
from structured_tickets.runs.folder import RunFolder
from structured_tickets.settings.flags import parse_args
from structured_tickets.training import step as steps
from structured_tickets.training.distillation import Distillation, as_teacher


def case(at_once, arch="micro_vit", **words):
    made = Case(arch, images=20, **words)
    made.passer.at_once = at_once
    return made


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(optimizer):
    """A network without BatchNorm, the short last batch included: 3 + 3 + 2 images, and 2 + 2, instead of 8 and 4."""
    whole, parts = case(0, optimizer=optimizer), case(3, optimizer=optimizer)
    sums = whole.train(), parts.train()
    assert [s.tolist()[1:] for s in sums[0]] == [s.tolist()[1:] for s in sums[1]]
    torch.testing.assert_close(torch.stack(sums[0]), torch.stack(sums[1]), rtol=1e-5, atol=1e-5)
    for name, value in whole.values().items():
        if optimizer == "adamw" and "qkv.bias" in name:  # a key's bias has a gradient of nothing but rounding
            continue
        torch.testing.assert_close(parts.values()[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_with_a_teacher_and_mixed_images_too():
    made = [case(0), case(3)]
    for one in made:
        one.passer.mixing = Mixing(0.5, 0.5, 10, 8, 0, 1)
        one.passer.distillation = Distillation(as_teacher(Case("micro_cnn").whole), 0.5, 2.0, "kl")
        one.train()
    for name, value in made[0].values().items():
        torch.testing.assert_close(made[1].values()[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_gradients_are_the_mean_over_the_whole_batch(monkeypatch):
    """By hand: y = w x, squared error, images 1 .. 8: the slope is the mean of 2 (w x - 0) x."""
    made, seen = case(3), []

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

        def forward(self, x):
            seen.append(len(x))
            return x[:, 0, 0, :1] * self.w

    class Square(nn.Module):
        def forward(self, output, target):
            return output.double().square().mean()

    class Source:
        whole, usual = True, 1

        def fetch(self, at):
            return torch.arange(1.0, 9.0, dtype=torch.float64).view(8, 1, 1, 1), torch.zeros(8, dtype=torch.long)

    net = Linear()
    made.passer.held, made.passer.rate, made.passer.network = None, None, None
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    step = steps.Step(net, Square(), optimizer, made.passer, None, Source(), 1)
    step.once()
    xs = torch.arange(1.0, 9.0, dtype=torch.float64)
    assert seen == [3, 3, 2]
    assert net.w.grad.item() == pytest.approx((2 * 0.5 * xs * xs).mean().item(), rel=1e-12)
    assert step.sums.tolist() == pytest.approx([(0.5 * xs).square().sum().item(), 8, 8])


def test_a_run_accumulates(tmp_path):
    """Steps of 64 images in parts of 16: learning rate and lambda of each step are those of batches of 64."""
    assert run(*tiny(tmp_path / "parts", batch_size=16, accumulate=4, precision="fp32")) == 0
    assert run(*tiny(tmp_path / "whole", batch_size=64, precision="fp32")) == 0
    parts, whole = (RunFolder.load(RunFolder(tmp_path / name).checkpoint(1)) for name in ("parts", "whole"))
    for column in ("lr", "reg_lambd"):
        assert [row[column] for row in parts.history] == [row[column] for row in whole.history]
    assert parts.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], rel=0.5)
    assert parts.history[0]["loss"] != whole.history[0]["loss"], "BatchNorm sees 16 images at once"


def test_a_run_that_is_stopped_in_the_middle_goes_on(tmp_path, monkeypatch):
    words = {"batch_size": 8, "accumulate": 3, "epochs": 3}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 1
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


def test_criteria_see_as_many_images_part_by_part():
    loader = case(0).loader
    whole = loader.fixed_batches(2)
    loader.parts = 2  # of the same batches
    parts = loader.fixed_batches(2)
    assert [len(y) for _, y in whole] == [8, 8] and [len(y) for _, y in parts] == [4] * 4
    assert torch.equal(torch.cat([x for x, _ in whole]), torch.cat([x for x, _ in parts]))


def test_the_flag():
    assert parse_args(["--accumulate=4"]).accumulate == 4 and parse_args([]).accumulate == 1
