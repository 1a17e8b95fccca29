"""Round 0 is trained once: what is taken from the store is what training would have given, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.commands import ROOT, VIT, run
from helpers.commands import tiny as with_all_images
from helpers.comparison import assert_same_runs, equal
from helpers.images import few_images
from helpers.interruptions import stopped_again_and_again

from structured_tickets.runs.folder import RunFolder
from structured_tickets.settings.flag import AFTER_ROUND_0
from structured_tickets.settings.flag_table import FLAGS
from structured_tickets.settings.flags import parse_args
from structured_tickets.settings.identity import identity_of_round_0
from structured_tickets.training import epoch as training

# For each flag that round 0 is said not to read: a network where it is read, and another value.
OTHERS = {
    "struct": ({}, "snip"),
    "rate": ({}, 0.7),
    "rate_mode": ({}, "target"),
    "criteria": ({}, "saliency"),
    "criteria_batches": ({}, 3),
    "rank_weights": ({}, "initial"),
    "refill_from": ({"prune_type": "lrr"}, "zero"),
    "tail_epochs": ({"prune_type": "lrr"}, 1),
    "finetune_epochs": ({"prune_type": "finetune"}, 2),
    "finetune_lr": ({"prune_type": "finetune"}, 0.3),
    "fillback_rate": ({"struct": "refill"}, 0.5),
    "min_units": ({}, 5),
    "conv1": ({}, True),
    "regroup": ({"struct": "imp"}, True),
    "admm_epochs": ({"struct": "admm"}, 2),
    "admm_rho": ({"struct": "admm"}, 0.5),
    "control": ({}, None),
    "vit_structured": ({"arch": "micro_vit"}, True),
    "vit_prune_target": (VIT, "head"),
    "mlp_prune_ratio": (VIT, 0.7),
    "block_prune_ratio": ({**VIT, "vit_prune_target": "head,block"}, 0.6),
    "sorting_mode": (VIT, "global"),
    "RST_schedule": ({}, "x"),
    "reg_granularity_prune": ({}, 0.1),
    "exponents": ({}, 2),
    "reg_horizon": ({}, "epoch"),
    "reg_guard": ({}, True),
    "reg_upper_limit": ({}, 0.1),
    "penalty": ({}, "gradient"),  # in rounds this short it would be decoupled
    "block_loss_grad": ({}, True),
    "rsst_dead": ({}, "free"),
    "reg_target": ({}, "unit"),
    "fade_out": ({}, 0.5),
    "channel_units": ({}, "stream"),
    "round_units": ({}, 4),
    "exp_name": ({}, "mine"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    few_images(monkeypatch)


def tiny(save_dir, **settings):
    """Six steps an epoch, of few images."""
    return with_all_images(save_dir, **{"batch_size": 3, **settings})


def dense(folder):
    return RunFolder.load(folder / "0checkpoint.pth.tar")


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """The dense round that a command line leaves, trained once for each command line."""
    found = {}

    def dense_run(settings):
        words = tuple(tiny(None, **settings, pruning_times=1))
        if words not in found:
            folder = tmp_path_factory.mktemp("dense")
            assert run(*words, "--save_dir", folder) == 0
            found[words] = dense(folder)
        return found[words]

    return dense_run


def test_another_value_is_tried_for_every_flag_that_round_0_is_said_not_to_read():
    assert set(OTHERS) == {flag.name for flag in FLAGS.values() if flag.scope == AFTER_ROUND_0}


@pytest.mark.parametrize("flag", sorted(OTHERS.keys() - {"control"}))
def test_flags_that_round_0_is_said_not_to_read_do_not_change_it(flag, dense_run):
    base, value = OTHERS[flag]
    settings = (base, {**base, flag: value})
    one, other = (dense_run(each) for each in settings)
    assert one.args[flag] != other.args[flag]
    for field in ("state_dict", "init_weight", "optimizer", "best_sa"):
        assert equal(getattr(one, field), getattr(other, field)), field
    ours, theirs = (identity_of_round_0(parse_args(tiny("x", **each))) for each in settings)
    assert ours == theirs


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"lr": 0.04},
        {"epochs": 2},
        {"batch_size": 128},
        {"optimizer": "adamw"},
        {"arch": "res56s"},
        {"prune_type": "rewind_lt", "rewind_epoch": 0},
        {"image_size": 16},
        {"label_smoothing": 0.1},
    ],
)
def test_flags_that_round_0_reads_have_another_address(change):
    assert identity_of_round_0(parse_args(tiny("x"))) != identity_of_round_0(parse_args(tiny("x", **change)))


@pytest.mark.parametrize(
    "settings",
    [
        {"struct": "rsst"},
        {"struct": "refill", "criteria": "magnitude"},
        {"struct": "imp", "rate": 0.2},
        {"struct": "rsst", "prune_type": "rewind_lt", "rewind_epoch": 1},
    ],
)
def test_a_shared_round_0_gives_the_same_run(settings, tmp_path, capsys):
    store, settings = tmp_path / "store", {"epochs": 2, "pruning_times": 3, **settings}
    giver = {
        "struct": "refill",
        "criteria": "saliency",
        "rate": 0.7,
        **{k: v for k, v in settings.items() if "rewind" in k or k == "prune_type"},
    }
    assert run(*tiny(tmp_path / "giver", **{**giver, "epochs": 2, "pruning_times": 1}, dense_store=store)) == 0
    assert run(*tiny(tmp_path / "alone", **settings)) == 0
    assert run(*tiny(tmp_path / "taker", **settings, dense_store=store)) == 0
    assert "reusing round 0 from" in capsys.readouterr().err
    assert_same_runs(tmp_path / "alone", tmp_path / "taker")
    best = [RunFolder.load(tmp_path / d / "0model_SA_best.pth.tar").state_dict for d in ("alone", "taker")]
    assert equal(*best)
    alone, taker = result(tmp_path / "alone"), result(tmp_path / "taker")
    assert taker["round_0_is_shared"] and not alone["round_0_is_shared"]
    assert taker["seconds_of_round_0"] > 0
    rows = [json.loads(line) for line in (tmp_path / "taker" / "metrics.jsonl").read_text().splitlines()]
    assert taker["seconds"] == pytest.approx(sum(r["seconds"] for r in rows if r["round"]))
    assert len(list(store.iterdir())) == 1


def test_a_run_that_takes_round_0_can_be_stopped_anywhere(tmp_path, monkeypatch):
    store = tmp_path / "store"
    assert run(*tiny(tmp_path / "giver", pruning_times=1, dense_store=store)) == 0
    assert run(*tiny(tmp_path / "alone", pruning_times=3)) == 0
    stops = stopped_again_and_again(
        monkeypatch, 3, lambda _: tiny(tmp_path / "taker", pruning_times=3, dense_store=store)
    )
    assert stops > 2
    assert_same_runs(tmp_path / "alone", tmp_path / "taker")


def test_a_giver_that_was_stopped_gives_the_same(tmp_path, monkeypatch):
    store = tmp_path / "store"
    giver = tiny(tmp_path / "giver", epochs=3, pruning_times=1, dense_store=store)
    with monkeypatch.context() as patch:
        assert stopped_again_and_again(patch, 4, lambda _: giver) > 2
    assert run(*tiny(tmp_path / "alone", epochs=3)) == 0
    assert run(*tiny(tmp_path / "taker", epochs=3, dense_store=store)) == 0
    assert result(tmp_path / "taker")["round_0_is_shared"]
    assert_same_runs(tmp_path / "alone", tmp_path / "taker")


def test_round_0_of_other_weights_is_not_taken(tmp_path):
    """The address holds the weights themselves, not the name of the file that they came from."""
    store, init = tmp_path / "store", tmp_path / "init.pt"
    assert run(*tiny(tmp_path / "one", pruning_times=1, dense_store=store, init=init)) == 0
    state = torch.load(init, weights_only=True)
    torch.save({k: v * 0.9 if k.endswith("conv1.weight") else v for k, v in state.items()}, init)
    assert run(*tiny(tmp_path / "two", dense_store=store, init=init)) == 0
    assert not result(tmp_path / "two")["round_0_is_shared"]
    assert len(list(store.iterdir())) == 2


def test_another_number_of_threads_has_another_address(tmp_path):
    store = tmp_path / "store"
    assert run(*tiny(tmp_path / "one", pruning_times=1, dense_store=store)) == 0
    torch.set_num_threads(2)
    try:
        assert run(*tiny(tmp_path / "two", dense_store=store)) == 0
    finally:
        torch.set_num_threads(1)
    assert not result(tmp_path / "two")["round_0_is_shared"]


@pytest.mark.parametrize("file", ["0checkpoint.pth.tar", "0model_SA_best.pth.tar"])
def test_a_damaged_entry_is_not_taken_and_is_replaced(file, tmp_path, capsys):
    store = tmp_path / "store"
    assert run(*tiny(tmp_path / "one", pruning_times=1, dense_store=store)) == 0
    (entry,) = store.iterdir()
    (entry / file).write_bytes(b"junk")
    assert run(*tiny(tmp_path / "two", dense_store=store)) == 0
    assert "Training round 0 again" in capsys.readouterr().err
    assert not result(tmp_path / "two")["round_0_is_shared"]
    assert equal(dense(tmp_path / "one").state_dict, RunFolder.load(entry / "0checkpoint.pth.tar").state_dict)
    assert run(*tiny(tmp_path / "three", dense_store=store)) == 0
    assert result(tmp_path / "three")["round_0_is_shared"]
    assert [p.name for p in store.iterdir()] == [entry.name], "no draft is left"


def test_what_was_partly_computed_otherwise_is_not_left(tmp_path, monkeypatch):
    """One epoch by one thread, one by two, one by one again: the address would be right, the bits are not."""
    store, threads = tmp_path / "store", iter([1, 2, 1, 1])

    def command(turn):
        torch.set_num_threads(next(threads))
        return tiny(tmp_path / "run", epochs=3, pruning_times=1, dense_store=store)

    try:
        assert stopped_again_and_again(monkeypatch, 5, command) == 3
    finally:
        torch.set_num_threads(1)
    assert not store.exists()


def test_a_network_from_a_users_file_is_always_trained(tmp_path):
    settings = {
        "arch": f"{ROOT / 'examples' / 'my_model.py'}:net",
        "pruning_times": 1,
        "dense_store": tmp_path / "store",
    }
    assert run(*tiny(tmp_path / "one", **settings)) == 0
    assert not (tmp_path / "store").exists()


def test_what_others_took_is_not_touched_by_what_they_do(tmp_path):
    store = tmp_path / "store"
    assert run(*tiny(tmp_path / "one", pruning_times=1, dense_store=store)) == 0
    (entry,) = store.iterdir()
    before = (entry / "0model_SA_best.pth.tar").read_bytes()
    (tmp_path / "one" / "0model_SA_best.pth.tar").open("r+b").write(b"junk")
    assert (entry / "0model_SA_best.pth.tar").read_bytes() == before


def test_a_diverged_round_0_is_not_left(tmp_path):
    assert run(*tiny(tmp_path / "one", lr=1e30, pruning_times=1, dense_store=tmp_path / "store")) == 4
    assert not (tmp_path / "store").exists()


def test_training_is_really_skipped(tmp_path, monkeypatch):
    store, seen = tmp_path / "store", []
    assert run(*tiny(tmp_path / "one", pruning_times=1, dense_store=store)) == 0
    real = training.train

    def watching(state, *rest):
        seen.append(state)
        return real(state, *rest)

    monkeypatch.setattr("structured_tickets.runs.epochs.train", watching)
    assert run(*tiny(tmp_path / "two", dense_store=store)) == 0
    assert seen == [1]
