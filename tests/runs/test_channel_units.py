"""Whole runs whose channels are streams, and whose widths are whole lanes."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.commands import ROOT, VIT, run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again
from helpers.networks import micro_cnn
from torch.utils.flop_counter import FlopCounterMode

import structured_tickets as st
from structured_tickets.base.errors import BadValue
from structured_tickets.export.deployed import load
from structured_tickets.programs import export
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.runs.folder import RunFolder
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import kept_units

STREAM = {"channel_units": "stream", "precision": "fp32"}


def last_row(folder):
    return RunFolder(folder).newest_run().rounds[-1]


def macs_of(network):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.ones(1, 3, 8, 8))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("struct", ["refill", "rsst"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_a_run_reports_is_what_is_exported(struct, criterion, tmp_path, capsys):
    more = {"rate": 0.3, "round_units": 8, "pruning_times": 3}
    words = tiny(tmp_path / "run", struct=struct, criteria=criterion, **STREAM, **more)
    assert run(*words) == 0
    row = last_row(tmp_path / "run")
    kept = row["kept_per_layer"].values()
    assert all(n % 8 == 0 for n in kept) and sum(kept) < 80
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    small = load(tmp_path / "out")
    assert sum(p.numel() for p in small.parameters()) == row["parameters"] and macs_of(small) == row["macs"]
    assert type(small).__name__ == "MicroResNet" and "structured_tickets" not in repr(small)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["channel_units"] == "stream"


def test_an_interrupted_run_is_the_same(tmp_path, monkeypatch):
    more = {"reg_target": "unit", "fade_out": 0.9, "epochs": 3, "decreasing_lr": 9, "pruning_times": 3}
    squeezed = {"penalty": "decoupled", "RST_schedule": "x", "reg_horizon": "documents"}
    squeezed |= {"reg_granularity_prune": 0.05, "reg_upper_limit": 0.5}
    words = {"criteria": "magnitude", **STREAM, **more, **squeezed}
    assert run(*tiny(tmp_path / "whole", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 13, lambda _: tiny(tmp_path / "parts", **words)) > 2
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("control", ["permute", "random_structure", "small_dense"])
def test_controls_keep_as_much(control, tmp_path):
    words = {"struct": "refill", "criteria": "magnitude", "rate": 0.3, **STREAM}
    assert run(*tiny(tmp_path / "ticket", **words)) == 0
    assert run(*tiny(tmp_path / "control", **words, control=control, control_of=tmp_path / "ticket")) == 0
    ours, theirs = last_row(tmp_path / "ticket"), last_row(tmp_path / "control")
    if control == "small_dense":
        assert theirs["macs"] == pytest.approx(ours["macs"], rel=0.1)
    else:
        assert (theirs["macs"], theirs["parameters"]) == (ours["macs"], ours["parameters"])
        assert theirs["kept_per_layer"] == ours["kept_per_layer"]


@pytest.mark.parametrize("struct", ["imp", "snip", "synflow"])
def test_element_wise_methods_regroup_streams_or_say_that_it_has_no_effect(struct, tmp_path, capsys):
    words = {"struct": struct, "rate": 0.5, **STREAM}
    assert run(*tiny(tmp_path / "plain", **words)) == 0
    assert "--channel_units has no effect in this run" in capsys.readouterr().err
    assert run(*tiny(tmp_path / "regrouped", **words, regroup=True)) == 0
    assert "--channel_units" not in capsys.readouterr().err
    assert last_row(tmp_path / "regrouped")["macs"] < last_row(tmp_path / "plain")["macs"]


def test_widths_of_a_transformer(tmp_path, capsys):
    words = {**VIT, "rate": 0.3, "rate_mode": "round", "round_units": 8, "criteria": "magnitude"}
    assert run(*tiny(tmp_path / "run", **words, channel_units="stream")) == 0
    assert "--channel_units has no effect in this run" in capsys.readouterr().err
    kept = last_row(tmp_path / "run")["kept_per_layer"]
    assert all(count % 8 == 0 for name, count in kept.items() if "fc1" in name)


def test_auto_is_a_number_that_the_run_notes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert run(*tiny(tmp_path / "run", round_units="auto", gpu=-1)) == 0
    assert RunFolder(tmp_path / "run").newest_run().args["round_units"] == 8


@pytest.mark.parametrize("value, said", [("0", "at least 1"), ("some", "at least 1"), ("2000", "at most 1024")])
def test_wrong_widths_are_refused_in_a_line(value, said, tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", round_units=value)) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and not (tmp_path / "run").exists()


def test_a_users_network_stays_his_own(tmp_path, capsys):
    arch = f"{ROOT / 'examples' / 'my_model.py'}:net"
    words = {"arch": arch, "struct": "refill", "criteria": "magnitude", "rate": 0.3, **STREAM}
    assert run(*tiny(tmp_path / "run", **words)) == 0
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--arch", arch]) == 0
    small = load(tmp_path / "out", arch=arch)
    assert macs_of(small) == last_row(tmp_path / "run")["macs"] and "structured_tickets" not in repr(small)


def test_streams_that_stay_are_known_to_the_export(tmp_path):
    arch = f"{ROOT / 'tests' / 'helpers' / 'users_networks.py'}:counting"
    assert run(*tiny(tmp_path / "run", arch=arch, struct="refill", criteria="magnitude", **STREAM)) == 0
    assert set(last_row(tmp_path / "run")["kept_per_layer"]) == {"one.0"}
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--arch", arch]) == 0
    assert macs_of(load(tmp_path / "out", arch=arch)) == last_row(tmp_path / "run")["macs"]


def test_streams_in_a_training_loop_of_ones_own(tmp_path):
    network = micro_cnn()
    units = st.units(network, (3, 8, 8), channel_units="stream")
    filters = st.units(network, (3, 8, 8))
    assert [g.units for g in units] == [16, 16, 32, 16] and [g.units for g in filters] == [16, 16, 32, 32]
    masks = st.regroup(network, units, rate=0.4, round_units=8)
    kept = [int(kept_units(g, masks.pair.structure).sum()) for g in units]
    assert all(n % 8 == 0 for n in kept) and sum(kept) == 48
    again = st.regroup(network, units, rate=0.4, previous=masks, round_units=8)
    assert sum(int(kept_units(g, again.pair.structure).sum()) for g in units) < 48
    small = st.shrink(network, masks)
    st.save(small, tmp_path / "ticket")
    found = st.load(tmp_path / "ticket")
    images = torch.rand(2, 3, 8, 8)
    masks.apply_(network)
    torch.testing.assert_close(found(images), network.eval()(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadValue, match="channel_units"):
        st.units(network, (3, 8, 8), channel_units="streams")
    assert len(unit_groups(network)) == 4  # nothing was noted on the network itself


def test_the_plan_says_how_many_channels_a_layer_gives_and_what_the_first_layer_of_a_vit_has(tmp_path, capsys):
    words = ["--dataset=digits", "--image_size=8", "--struct=refill", "--rate=0.5", "--pruning_times=2", "--dry_run"]
    assert run(*words, "--arch=res20s", "--channel_units=stream", "--drop_path=0.1") == 0
    said = capsys.readouterr().out
    assert " 18,432  64 channels" in said and "layer3.0.conv2" in said and "400/400 channels" in said
    assert run(*words, "--arch=vit_tiny", "--vit_structured", "--conv1") == 0
    assert ", 192/192 patch features" in capsys.readouterr().out
