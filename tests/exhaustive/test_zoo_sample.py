"""A sample of the networks of `benchmarks.zoo`: accepted, right numbers, right outputs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from helpers.commands import ROOT

from benchmarks import zoo

FILE = ROOT / "tests" / "helpers" / "users_networks.py"
SAMPLE = (
    f"{FILE}:wide_head",
    pytest.param("timm/mobilenetv2_035", marks=pytest.mark.slow),
    pytest.param("timm/convnext_zepto_rms", marks=pytest.mark.slow),
    pytest.param("timm/ghostnet_050", marks=pytest.mark.slow),
    pytest.param("timm/pvt_v2_b0", marks=pytest.mark.slow),
    pytest.param("torchvision/alexnet", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_network_is_accepted_with_right_numbers_and_outputs(name, tmp_path, capsys):
    row = zoo.row_of(name, 280, 16, ["torch_export", "saved"])
    assert row["outcome"] == "accepted" and row["share"] >= zoo.LITTLE, row
    assert row["half"]["reported"] == row["half"]["counted"] != row["dense"]["counted"]
    assert row["dense"]["reported"] == row["dense"]["counted"] and row["gap"] <= zoo.OFF
    assert row["torch_export"] == row["saved"] == "yes" and not zoo.numbers_are_wrong(row)
    file = tmp_path / "zoo.jsonl"
    file.write_text(json.dumps(row) + "\n")
    zoo.table(SimpleNamespace(file=file, whole=True))
    assert f"| {zoo._name(row)} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, seconds, outcome, said",
    [(f"{FILE}:none", 60, "refused", "no "), (f"{FILE}:plain", 0, "stopped", "not finished after 0 s")],
)
def test_whatever_becomes_of_a_network_is_a_row(name, seconds, outcome, said):
    row = zoo.row_of(name, seconds, 16, [])
    assert row["outcome"] == outcome and said in (row.get("reason") or row["stopped"])


def test_networks_that_have_a_line_are_not_measured_again(tmp_path, monkeypatch):
    file, seen = tmp_path / "zoo.jsonl", []
    file.write_text(json.dumps({"name": "one"}) + "\n")
    monkeypatch.setattr(zoo, "row_of", lambda name, *_: seen.append(name) or {"name": name, "outcome": "x", "took": 0})
    zoo.run(SimpleNamespace(file=file, names=["one", "other"], seconds=1, gigabytes=1, also=[]))
    assert seen == ["other"] and [r["name"] for r in zoo.read(file)] == ["one", "other"]
