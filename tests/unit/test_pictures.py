"""Pictures show what the tables say."""

from __future__ import annotations

import pytest
from helpers.commands import VIT, tiny
from PIL import Image

import main_imp_fillback
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.pictures import kept_units_figure

pytestmark = pytest.mark.pictures


@pytest.mark.parametrize("arch, last", [("micro_vit", 1), pytest.param("vit_tiny", 8, marks=pytest.mark.slow)])
def test_a_run_draws_its_kept_units(arch, last, tmp_path):
    words = {**VIT, "arch": arch, "rate_mode": "round", "criteria": "magnitude"}
    assert main_imp_fillback.main(tiny(tmp_path, **words)) == 0
    with Image.open(tmp_path / "kept_units.png") as picture:
        assert min(picture.size) > 300
    assert (tmp_path / "kept_units.svg").read_text().count(f"blocks.{last}.mlp.fc1") >= 1
    rounds = RunFolder(tmp_path).newest_run().rounds
    heads, neurons = kept_units_figure(rounds).axes
    assert (heads.get_ylabel(), neurons.get_ylabel()) == ("heads kept", "neurons kept")
    for axes, part in ((heads, "attn.qkv"), (neurons, "mlp.fc1")):
        drawn = [[bar.get_height() for bar in bars] for bars in axes.containers]
        assert drawn == [[kept for name, kept in row["kept_per_layer"].items() if part in name] for row in rounds]


def test_many_rounds_name_the_first_and_the_last():
    rounds = [
        {"round": k, "kept_units": {"channel": [20, 20]}, "kept_per_layer": {"a": 10, "b": 10 - k}} for k in range(9)
    ]
    (axes,) = kept_units_figure(rounds).axes
    assert axes.get_legend_handles_labels()[1] == ["0", "8"]


def test_the_layers_of_a_deep_network_go_on_in_the_next_line():
    layers = {f"layer{k}.conv": 8 for k in range(100)}
    rounds = [{"round": 0, "kept_units": {"channel": [800, 800]}, "kept_per_layer": layers}]
    lines = kept_units_figure(rounds).axes
    assert [len(axes.containers[0]) for axes in lines] == [34, 34, 32]
    assert [t.get_text() for axes in lines for t in axes.get_xticklabels()] == list(layers)
    assert len({axes.get_xlim() for axes in lines}) == 1, "bars are equally wide"
