"""`--prune_type lrr`: rounds that go on with the weights that the round before has trained."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs, equal
from helpers.interruptions import stopped_again_and_again
from runs.test_controls import control, found

from structured_tickets.pruning.controls import controlled
from structured_tickets.pruning.held import continued
from structured_tickets.runs import epochs
from structured_tickets.runs.folder import RunFolder
from structured_tickets.training.epoch import train
from structured_tickets.unit_groups.unit import kept_units

LRR = {"prune_type": "lrr", "pruning_times": 3, "epochs": 2}


def test_what_could_train_goes_on_and_what_was_held_begins_anew():
    trained, anew = {"w": torch.tensor([1.0, 0.0, 3.0]), "mean": torch.tensor([5.0])}, {"w": torch.tensor([7.0, 8, 9])}
    start = continued(trained, anew, {"w": torch.tensor([1.0, 0.0, 1.0])})
    assert start["w"].tolist() == [1, 8, 3] and start["mean"].tolist() == [5]
    assert start["mean"] is not trained["mean"] and trained["w"].tolist() == [1, 0, 3]
    assert continued(trained, {}, {})["w"].tolist() == [1, 0, 3]


def starts_and_ends(folder, monkeypatch, **settings):
    """Weights at the start and the end of each round, and its masks."""
    starts = []

    def watching(state, loader, model, criterion, optimizer, epoch, passer, pruner):
        if epoch == 0:
            starts.append({k: v.clone() for k, v in model.state_dict().items()})
        return train(state, loader, model, criterion, optimizer, epoch, passer, pruner)

    monkeypatch.setattr(epochs, "train", watching)
    assert run(*tiny(folder, compact_training="false", **{**LRR, **settings})) == 0
    saved = [RunFolder.load(folder / f"{k}checkpoint.pth.tar") for k in range(LRR["pruning_times"])]
    return starts, saved


@pytest.mark.parametrize("struct", ["refill", "rsst", "imp", "snip"])
def test_every_round_starts_from_what_the_last_one_trained(struct, tmp_path, monkeypatch):
    """Dead weights stay zero, doomed ones are squeezed on from where they are, and all others go on."""
    starts, saved = starts_and_ends(tmp_path, monkeypatch, struct=struct, criteria="magnitude", rate=0.4)
    ticket = saved[0].init_weight
    for before, start, now in zip(saved, starts[1:], saved[1:], strict=False):
        lives = lambda pair: pair.alive if struct == "rsst" else pair.structure  # noqa: E731
        assert equal(now.init_weight, ticket), "the ticket is still known"
        moved = 0
        for name, value in start.items():
            expected = before.state_dict[name]
            if before.masks and name in before.masks.current:
                expected = torch.where(lives(before.masks)[name] == 1, expected, ticket[name])
            if name in now.masks.current:
                expected = expected * lives(now.masks)[name]
            assert torch.equal(value, expected), name
            moved += int((value != 0).logical_and(value != ticket[name]).sum())
        assert moved > 1000
        doomed = now.masks.doomed
        if struct == "rsst":
            assert any(bool(start[n][d.bool()].any()) for n, d in doomed.items()), "doomed weights are still there"


@pytest.mark.parametrize("value", ["initial", "zero"])
def test_what_lives_again_starts_with_its_initial_value_or_zero(value, tmp_path, monkeypatch):
    """A squeeze that is next to nothing, so that units come back of which L1 had removed weights."""
    weak = {"criteria": "saliency", "rate": 0.5, "rate_mode": "target", "reg_granularity_prune": 1e-6, "lr": 0.3}
    weak |= {"penalty": "gradient", "refill_from": value}
    starts, saved = starts_and_ends(tmp_path, monkeypatch, struct="rsst", **weak)
    back = {n: (saved[1].masks.alive[n] == 0) & (m == 1) for n, m in saved[2].masks.alive.items()}
    assert sum(int(b.sum()) for b in back.values()) > 100
    for name, places in back.items():
        expected = saved[0].init_weight[name][places] if value == "initial" else torch.zeros(int(places.sum()))
        assert torch.equal(starts[2][name][places], expected)


@pytest.mark.parametrize("struct", ["refill", "rsst"])
def test_it_continues_bit_for_bit(struct, tmp_path, monkeypatch):
    settings = {**LRR, "struct": struct, "criteria": "l2", "rate": 0.4}
    assert run(*tiny(tmp_path / "whole", **settings)) == 0
    assert stopped_again_and_again(monkeypatch, 4, lambda _: tiny(tmp_path / "broken", **settings)) >= 3
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


def test_units_fade_out_by_what_the_round_began_with(tmp_path, monkeypatch):
    settings = {**LRR, "struct": "rsst", "rate": 0.4, "penalty": "direct", "fade_out": 0.5, "epochs": 4}
    assert run(*tiny(tmp_path / "whole", **settings)) == 0
    saved = RunFolder.load(tmp_path / "whole" / "2checkpoint.pth.tar")
    assert saved.faded and not equal(saved.begun_with, saved.init_weight)
    assert stopped_again_and_again(monkeypatch, 7, lambda _: tiny(tmp_path / "broken", **settings)) >= 2
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


def test_round_0_is_that_of_lt(tmp_path, capsys):
    store = tmp_path / "store"
    assert run(*tiny(tmp_path / "lt", struct="refill", epochs=2, pruning_times=1, dense_store=store)) == 0
    assert run(*tiny(tmp_path / "alone", **LRR, struct="rsst")) == 0
    assert run(*tiny(tmp_path / "taker", **LRR, struct="rsst", dense_store=store)) == 0
    assert "reusing round 0 from" in capsys.readouterr().err
    assert_same_runs(tmp_path / "alone", tmp_path / "taker")


def test_a_random_structure_draws_from_units_that_are_trained():
    """In a ticket that goes on, units that are gone never come back; nor do they in what it is compared with."""
    model, groups, pairs = found("res20s", ("channel",), "rsst", rounds=3)
    own = None
    for k, pair in enumerate(pairs):
        words = {"seed": 0, "state": k, "image_size": 16, "within": own}
        drawn = controlled("random_structure", pair, model, groups, ("channel",), **words)
        assert not equal(drawn.structure, pair.structure)
        for group in groups:
            kept, wanted = kept_units(group, drawn.structure), kept_units(group, pair.structure)
            assert int(kept.sum()) == int(wanted.sum())
            if own is not None:
                assert not bool((kept & ~kept_units(group, own.structure)).any()), group.name
                assert not bool((kept_units(group, drawn.current) & ~kept_units(group, own.alive)).any()), group.name
        own = drawn
    again = control("random_structure", pairs[2], model, groups, ("channel",), state=2)
    assert not equal(again.structure, own.structure)


@pytest.mark.parametrize("kind", ["random_structure", "reinit"])
def test_controls_go_on_too_but_for_those_with_weights_of_their_own(kind, tmp_path, monkeypatch):
    assert run(*tiny(tmp_path / "ticket", **LRR, struct="refill", rate=0.4)) == 0
    words = {"struct": "refill", "rate": 0.4, "control": kind, "control_of": tmp_path / "ticket"}
    starts, saved = starts_and_ends(tmp_path / "control", monkeypatch, **words)
    name = "layer2.0.conv1.weight"
    for k, start in enumerate(starts, 1):
        mask = saved[k].masks.structure[name]
        begun = saved[k].init_weight if kind == "reinit" else saved[k - 1].state_dict
        assert torch.equal(start[name], begun[name] * mask), k
