"""What a run prints of a regrouping: a header, a line for each kind of unit and a summary; each layer if asked."""

from __future__ import annotations

import re

import pytest
from helpers.commands import VIT, run, tiny
from helpers.images import few_images

BLOCK = "\nLayer: blocks.0.attn.qkv\n"
HEADER = "[ViT Head + MLP Quasi-Structured Pruning]"
LINE = (
    r"Attention Head Pruning: keeping (\d+)/(\d+) heads in \d+ layers, original sparsity [\d.]+%, new sparsity [\d.]+%"
)


@pytest.mark.parametrize("more, blocks", [({}, False), ({"verbose": True}, True)])
def test_a_round_prints_a_line_for_each_kind_and_the_log_has_every_layer(more, blocks, tmp_path, monkeypatch, capsys):
    few_images(monkeypatch)
    words = {**VIT, "arch": "vit_tiny", "struct": "rsst", "rate": 0.4, "rate_mode": "round", "pruning_times": 2}
    assert run(*tiny(tmp_path, **words, **more)) == 0
    said, written = capsys.readouterr().err, (tmp_path / "log.txt").read_text()
    assert said.count(HEADER) == said.count("Summary:") == 1, "once for each round that trains under its masks"
    assert written.count(HEADER) == written.count("Summary:") == 2, "and of the others in the log"
    first = re.search(LINE, said)
    assert first and first[0] in written and int(first[1]) < int(first[2]) == 27
    assert re.search(r"MLP Neuron Pruning: keeping [\d,]+/3,456 neurons", said)
    assert (BLOCK in said) == blocks and BLOCK in written and re.search(r"Keeping \d/3 heads: \[\d", written)


def test_masks_of_single_weights_have_no_header(tmp_path, monkeypatch, capsys):
    few_images(monkeypatch)
    assert run(*tiny(tmp_path, struct="imp", pruning_times=2)) == 0
    said = capsys.readouterr().err
    assert "Quasi-Structured" not in said and "keeping" not in said and "Summary:" not in said


def test_a_quiet_run_prints_none_of_it(tmp_path, monkeypatch, capsys):
    few_images(monkeypatch)
    assert run(*tiny(tmp_path, struct="rsst", pruning_times=2, quiet=True)) == 0
    assert "Quasi-Structured" not in capsys.readouterr().err
    assert "[Channel-level Quasi-Structured Pruning]" in (tmp_path / "log.txt").read_text()
