"""Stochastic depth: `--drop_path`."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again

from structured_tickets.base.errors import UsageError
from structured_tickets.networks import build_model
from structured_tickets.networks.vision_transformer import drop_branches
from structured_tickets.runs.folder import RunFolder
from structured_tickets.settings.flags import parse_args

IMAGES = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
WORDS = {"arch": "micro_vit", "drop_path": 0.5, "optimizer": "adamw", "lr": 1e-3, "precision": "fp32"}


def network(rate=0.6):
    torch.manual_seed(0)
    model = build_model("micro_vit", 10, 8)
    drop_branches(model, rate)
    return model.train()


def test_chances_grow_from_block_to_block():
    model = build_model("vit_tiny", 10, 32)
    drop_branches(model, 0.2)
    chances = [block.drop_path1.drop_prob for block in model.blocks]
    assert chances == pytest.approx([0.2 * k / (len(chances) - 1) for k in range(len(chances))])
    assert [block.drop_path2.drop_prob for block in model.blocks] == chances
    assert model.state_dict().keys() == build_model("vit_tiny", 10, 32).state_dict().keys()


@torch.no_grad()
def test_a_branch_is_left_out_for_some_images_and_scaled_for_the_others():
    model = network()
    block = model.blocks[-1]
    x = torch.rand(512, 5, block.norm1.normalized_shape[0])
    torch.manual_seed(3)
    branch = block.attn(block.norm1(x))
    dropped = block.drop_path1(branch)
    whole = dropped.abs().amax((1, 2)) > 0
    assert abs(float(whole.float().mean()) - 0.4) < 0.08
    torch.testing.assert_close(dropped[whole], branch[whole] / 0.4)


@torch.no_grad()
def test_evaluation_leaves_nothing_out():
    model, plain = network().eval(), network(0.0).eval()
    assert torch.equal(model(IMAGES), plain(IMAGES))
    assert not torch.equal(model.train()(IMAGES), plain(IMAGES))


@torch.no_grad()
def test_the_short_way_through_the_last_block_leaves_out_the_same():
    model, outputs = network(), []
    for short in (False, True):
        torch.manual_seed(4)
        model.class_token_only = short
        outputs.append(model(IMAGES))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_run_at_real_size_trains_the_same_network(tmp_path):
    words = {**WORDS, "vit_structured": True, "vit_prune_target": "both", "struct": "refill", "epochs": 2}
    ends = []
    for compact in ("true", "false"):
        assert run(*tiny(tmp_path / compact, **words, compact_training=compact)) == 0
        ends.append(RunFolder.load(RunFolder(tmp_path / compact).checkpoint(1)).state_dict)
    for name, value in ends[0].items():
        if "qkv.bias" not in name:  # a key's bias has a gradient of nothing but rounding
            torch.testing.assert_close(value, ends[1][name], rtol=1e-2, atol=1e-3, msg=name)


def test_a_run_that_is_stopped_in_the_middle_goes_on(tmp_path, monkeypatch):
    words = {**WORDS, "epochs": 3}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 1
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


@pytest.mark.parametrize("arch", ["res20s", "timm/vit_tiny_patch16_224"])
def test_other_networks_are_refused(arch):
    with pytest.raises(UsageError, match=r"argument --drop_path: .* is not one of this program's Vision Transformers"):
        parse_args([f"--arch={arch}", "--drop_path=0.1"])
