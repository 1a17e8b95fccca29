"""The moving average of the weights: `--ema`."""

from __future__ import annotations

import csv

import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again
from helpers.steps import Case
from helpers.watchers import waiting
from torch import nn

from structured_tickets.export.ticket import read_ticket
from structured_tickets.runs.folder import RunFolder, load_safely
from structured_tickets.settings.flags import parse_args
from structured_tickets.training.averaging import Average, share_of_a_step

WORDS = {"ema": 0.9, "epochs": 3, "struct": "rsst", "precision": "fp32"}


def averaged(decay=0.9, **words):
    case = Case(**words)
    case.average = case.passer.average = Average(case.model, decay, 0, {})
    return case


def test_the_average_is_the_closed_form():
    """Of w after each step: sum over t of (1 - d_t) w_t times all later d; and of the start, all d."""
    case, decay = averaged(), 0.6
    case.average.decay = decay
    name = next(n for n, _ in case.model.named_parameters())
    seen = [case.model.state_dict()[name].clone().double()]
    real = case.average.follow

    def follow(share):
        seen.append(case.model.state_dict()[name].clone().double())
        real(share)

    case.average.follow = follow
    case.train()
    d = [min(decay, (1 + t) / (10 + t)) for t in range(1, len(seen))]
    wanted, left = torch.zeros_like(seen[0]), 1.0
    for value, own in zip(reversed(seen[1:]), reversed(d), strict=True):
        wanted, left = wanted + left * (1 - own) * value, left * own
    wanted += left * seen[0]
    assert len(seen) == 10 and d[0] == 2 / 11 and d[-1] == 10 / 19
    torch.testing.assert_close(case.average.state()[name].double(), wanted, rtol=1e-5, atol=1e-7)


def test_the_share_of_a_step():
    assert share_of_a_step(0.99, 1) == pytest.approx(9 / 11) and share_of_a_step(0.5, 1000) == 0.5
    average = Average(nn.Linear(1, 1), 0.9, 4, {})
    assert average.share(4, 0, 10) == share_of_a_step(0.9, 1) and average.share(5, 2, 10) == share_of_a_step(0.9, 13)


def test_statistics_are_averaged_and_counts_are_not():
    case = averaged()
    case.train()
    own, state = case.model.state_dict(), case.average.state()
    counts = [n for n in own if n.endswith("num_batches_tracked")]
    assert counts and all(torch.equal(state[n], own[n]) for n in counts)
    means = [n for n in own if n.endswith("running_mean")]
    assert means and not any(torch.equal(state[n], own[n]) for n in means)


def test_nothing_else_changes():
    """What trains is bit for bit what trains without an average, and none of it waits for the device."""
    plain, case = Case(), averaged()
    with waiting() as usual:
        plain.train()
    with waiting() as found:
        case.train()
    assert found == usual
    assert all(torch.equal(v, case.values()[n]) for n, v in plain.values().items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_held_weights_are_zero_in_the_average_and_a_smaller_network_has_the_same(optimizer):
    whole, small = (averaged(compact=compact, dead_units=True, optimizer=optimizer) for compact in (False, True))
    for case in (whole, small):
        case.train()
    assert small.model is not small.whole
    ours, theirs = (case.trainee.whole_state(case.average.state()) for case in (small, whole))
    held = dict(whole.trainee._held)
    assert held and all(not (theirs[n] * (1 - m)).any() and not (ours[n] * (1 - m)).any() for n, m in held.items())
    for name, _ in whole.model.named_parameters():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_state_goes_into_a_smaller_network_and_back():
    case = averaged(compact=True, dead_units=True)
    case.train()
    state = case.trainee.whole_state(case.average.state())
    again = Average(case.model, 0.9, 0, case.trainee.cut_state(state))
    assert all(torch.equal(a, b) for a, b in zip(again.values, case.average.values, strict=True))


def test_a_tensor_with_two_names_has_one_average():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    average = Average(model, 0.9, 0, {})
    with torch.no_grad():
        model[0].weight.add_(1)
    average.follow(torch.tensor(0.25))
    state = average.state()
    assert len(average.values) == 3 and torch.equal(state["1.weight"], state["0.weight"])
    assert not torch.equal(state["0.weight"], model[0].weight)
    again = Average(model, 0.9, 0, {n: v for n, v in state.items() if n != "1.weight"})
    assert torch.equal(again.state()["1.weight"], state["0.weight"])
    with again.in_place():
        assert torch.equal(model[1].weight, state["0.weight"])


def test_in_place_of_the_weights_for_a_while():
    case = averaged()
    case.train()
    before = {n: (v.clone(), v.data_ptr()) for n, v in case.model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), case.average.in_place():
        own = case.model.state_dict()
        assert all(torch.equal(own[n], v) for n, v in case.average.state().items())
        raise ZeroDivisionError
    after = case.model.state_dict()
    assert all(torch.equal(after[n], v) and after[n].data_ptr() == place for n, (v, place) in before.items())


@pytest.mark.parametrize("judged", [False, True])
def test_what_is_judged_saved_and_exported(judged, tmp_path):
    assert run(*tiny(tmp_path / "run", **WORDS, eval_ema=judged, pruning_times=2)) == 0
    with (tmp_path / "run" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    state = RunFolder.load(RunFolder(tmp_path / "run").checkpoint(1))
    doomed = state.structure
    assert doomed and any((state.average[n] * (1 - m)).any() for n, m in doomed.items()), "doomed ones fade in it, too"
    assert all(row["ema_test_accuracy"] for row in rows)
    if judged:
        assert rows[0]["ema_test_accuracy"] == rows[0]["test_accuracy"]
        assert rows[1]["ema_test_accuracy"] == rows[1]["hardened_test_accuracy"]
    chosen = state.average if judged else state.state_dict
    ticket = read_ticket(tmp_path / "run")
    name = next(iter(doomed))
    wanted = chosen[name] * doomed[name]
    assert torch.equal(ticket.masked.state_dict()[name], wanted)
    saved = load_safely(tmp_path / "run" / "ticket.pth.tar")
    assert torch.equal(saved["state_dict"][f"{name}_orig"] * saved["state_dict"][f"{name}_mask"], wanted)
    assert torch.equal(saved["ema_state_dict"][name], state.average[name] * doomed[name])


def test_a_round_starts_its_average_anew_from_its_own_weights(tmp_path, monkeypatch):
    seen = []
    real = Average.__init__

    def made(self, model, decay, first, values):
        seen.append((decay, first, dict(values)))
        real(self, model, decay, first, values)

    monkeypatch.setattr(Average, "__init__", made)
    assert run(*tiny(tmp_path / "run", **WORDS, fade_out=0)) == 0
    assert seen == [(0.9, 0, {})] * 2


def test_a_run_that_is_stopped_in_the_middle_goes_on(tmp_path, monkeypatch):
    words = {**WORDS, "eval_ema": True, "prune_type": "lrr", "fade_out": 0.5}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 2
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


def test_without_it_nothing_is_kept(tmp_path):
    assert run(*tiny(tmp_path / "run", pruning_times=1)) == 0
    state = RunFolder.load(RunFolder(tmp_path / "run").checkpoint(0))
    assert state.average == {} and state.rounds[0]["ema_val_accuracy"] is None
    assert "ema_state_dict" not in load_safely(tmp_path / "run" / "ticket.pth.tar")
    assert parse_args(["--eval_ema"]).warnings == ["--eval_ema has no effect in this run: it is only used with --ema"]


def test_units_that_fade_out_are_zero_in_the_average(tmp_path):
    assert run(*tiny(tmp_path / "run", **{**WORDS, "epochs": 6, "fade_out": 0.5, "pruning_times": 2})) == 0
    state = RunFolder.load(RunFolder(tmp_path / "run").checkpoint(1))
    assert state.faded
    layer = next(iter(state.faded))
    weight = state.average[f"{layer}.weight"]
    assert all(not weight[unit].any() for unit in state.faded[layer])
    kept = [k for k in range(len(weight)) if state.structure[f"{layer}.weight"][k].any()]
    assert kept and all(weight[unit].any() for unit in kept)
