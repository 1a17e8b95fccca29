"""Stochastic depth: `--drop_path`."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again

from structured_tickets.base.errors import UsageError
from structured_tickets.networks import build_model
from structured_tickets.networks.stochastic_depth import drop_branches
from structured_tickets.runs.folder import RunFolder
from structured_tickets.settings.flags import parse_args
from structured_tickets.shrinking.shrink import shrink

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


@pytest.mark.parametrize("arch", ["res20s", "res56s", "wrn32", "res18", "res50"])
@torch.no_grad()
def test_branches_of_residual_blocks_are_left_out(arch):
    """With a chance of 1, all that is left of the last block is its shortcut; evaluation and names stay as they are."""
    torch.manual_seed(0)
    model = build_model(arch, 10, 16)
    plain = copy.deepcopy(model)
    drop_branches(model, 1.0)
    blocks = [block for block in model.modules() if hasattr(block, "drop_path")]
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx(torch.linspace(0, 1, len(blocks)).tolist())
    assert len(blocks) == {"res20s": 9, "res56s": 27, "wrn32": 15, "res18": 8, "res50": 16}[arch]
    assert model.state_dict().keys() == plain.state_dict().keys()
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.eval()(images), plain.eval()(images))
    seen = {}
    blocks[-1].register_forward_hook(lambda block, args, output: seen.update(came=args[0], went=output))
    model.train()(images)
    assert torch.equal(seen["went"], seen["came"].relu())


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


@pytest.mark.parametrize(
    "more",
    [{"vit_structured": True, "vit_prune_target": "both"}, {"arch": "micro_cnn", "optimizer": "sgd", "lr": 0.01}],
)
def test_a_run_at_real_size_trains_the_same_network(more, tmp_path):
    words = {**WORDS, **more, "struct": "refill", "epochs": 2}
    ends = []
    for compact in ("true", "false"):
        assert run(*tiny(tmp_path / compact, **words, compact_training=compact)) == 0
        ends.append(RunFolder.load(RunFolder(tmp_path / compact).checkpoint(1)).state_dict)
    for name, value in ends[0].items():
        if not name.endswith(("qkv.bias", "running_mean", "running_var")):  # a key's bias has a gradient of rounding
            torch.testing.assert_close(value, ends[1][name], rtol=1e-2, atol=1e-3, msg=name)


def test_a_smaller_network_is_as_large_with_branches_that_are_left_out():
    """Normalised tensors that are added keep the channels that cost no time, also where they may be left out before."""
    sizes, draw = set(), torch.Generator().manual_seed(0)
    kept = [(torch.rand(16, generator=draw) < 0.8).float() for _ in range(3)]
    for rate in (0.0, 0.3):
        model, masks = build_model("res20s", 10, 16), {}
        if rate:
            drop_branches(model, rate)
        for k, flags in enumerate(kept):
            masks[f"layer1.{k}.conv2.weight"] = flags.view(16, 1, 1, 1).expand(16, 16, 3, 3)
            masks |= {f"layer1.{k}.bn2.{name}": flags for name in ("weight", "bias")}
        sizes.add(sum(p.numel() for p in shrink(model, masks, lanes=16).network.parameters()))
    assert len(sizes) == 1


def test_a_run_that_is_stopped_in_the_middle_goes_on(tmp_path, monkeypatch):
    words = {**WORDS, "epochs": 3}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 1
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


@pytest.mark.parametrize("arch", ["vgg16_bn", "timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_other_networks_are_refused(arch):
    with pytest.raises(
        UsageError, match=r"argument --drop_path: .* is not one of this program's Vision Transformers or "
    ):
        parse_args([f"--arch={arch}", "--drop_path=0.1"])
