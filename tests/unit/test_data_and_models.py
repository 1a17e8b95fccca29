"""Batches; models by their names; what they cost; optimizers."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers.networks import SMALL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import main_imp_fillback
from structured_tickets.base.errors import DataError, MachineError, UsageError
from structured_tickets.base.randomness import mixed_seed
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.data.loader import BatchLoader, crop_and_flip
from structured_tickets.networks import MODELS, build_model, precision, register_model
from structured_tickets.networks.kernels import set_fused_attention
from structured_tickets.networks.layers import Normalize
from structured_tickets.networks.precision import choose_precision, precision_of
from structured_tickets.networks.pretrained import load_pretrained_weights
from structured_tickets.networks.vit import vit_small
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.pruning.shares import kept_per_kind
from structured_tickets.runs.setup import choose_device, setup_model_dataset
from structured_tickets.settings.flags import parse_args
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.training.optimization import OPTIMIZERS, LearningRate
from structured_tickets.unit_groups.find import unit_groups


def test_crop_and_flip_by_hand():
    image = torch.arange(1, 5, dtype=torch.uint8).view(1, 1, 2, 2)
    still = crop_and_flip(image, torch.tensor([[1, 1]]), torch.tensor([False]), 1)
    shifted = crop_and_flip(image, torch.tensor([[0, 1]]), torch.tensor([False]), 1)
    mirrored = crop_and_flip(image, torch.tensor([[1, 1]]), torch.tensor([True]), 1)
    assert still.flatten().tolist() == [1, 2, 3, 4]
    assert shifted.flatten().tolist() == [0, 0, 1, 2]
    assert mirrored.flatten().tolist() == [2, 1, 4, 3]


def batches(loader):
    return [(x.clone(), y.clone()) for x, y in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_batches_are_a_function_of_seed_round_and_epoch():
    data = ImageSet(torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20))

    def epoch(seed, state, number, start=0):
        loader = BatchLoader(data, 6, torch.device("cpu"), augment=True, flip=True, seed=seed)
        loader.seek(state, number, start)
        return batches(loader)

    first = epoch(0, 1, 2)
    assert [len(y) for _, y in first] == [6, 6, 6, 2]
    assert torch.cat([y for _, y in first]).sort().values.tolist() == list(range(20))
    assert same(first, epoch(0, 1, 2))
    assert same(first[2:], epoch(0, 1, 2, start=2))
    for other in (epoch(1, 1, 2), epoch(0, 2, 2), epoch(0, 1, 3), epoch(2**31, 1, 2)):
        assert not same(first, other)
    assert len({mixed_seed(s, r, e) for s in range(5) for r in range(5) for e in range(5)}) == 125


def test_evaluation_batches_are_plain():
    data = ImageSet(torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8), torch.arange(5))
    loader = BatchLoader(data, 2, torch.device("cpu"))
    assert len(loader) == 3
    assert torch.equal(torch.cat([x for x, _ in loader]), data.images / 255)
    fixed = BatchLoader(data, 2, torch.device("cpu"), augment=True).fixed_batches(2)
    assert [len(y) for _, y in fixed] == [2, 2]
    assert all(torch.equal(x[0] * 255, data.images[y[0]].float()) for x, y in fixed)


@pytest.mark.parametrize("arch", SMALL)
def test_every_model_normalises_exactly_once(arch):
    model = build_model(arch, 10, 32).eval()
    x = torch.rand(2, 3, 32, 32)
    constants = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    with torch.no_grad():
        outside = model(constants(x))
        model.normalize = constants
        torch.testing.assert_close(model(x), outside)
    assert model.spec.name == arch


def test_registering_a_name_twice_is_refused():
    with pytest.raises(ValueError, match="two models"):
        register_model("res20s", stem="conv1", classifier="fc", family="cnn")(lambda: None)


def test_setup_reads_documented_arguments_only():
    from types import SimpleNamespace

    args = SimpleNamespace(arch="res20s", dataset="digits", data="data", batch_size=32, seed=0)
    model, train, val, test = setup_model_dataset(args)
    assert isinstance(model.normalize, Normalize)
    assert model.fc.out_features == 10 and len(train) == 41 and len(val) and len(test)
    again = setup_model_dataset(args)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_precision_and_device():
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) == torch.float32 and choose_precision("bf16", cpu) == torch.bfloat16
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    assert choose_device(-1) == cpu and choose_device(0, "cpu") == cpu


def test_a_device_that_is_asked_for_is_there_or_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for kind, name in (("cuda", "CUDA"), ("mps", "mps")):
        with pytest.raises(MachineError, match=f"argument --device: .*{name} device"):
            choose_device(0, kind)
    with pytest.raises(MachineError, match="argument --gpu: must be at least 0 with --device cuda"):
        choose_device(-1, "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(0, "mps") == torch.device("mps") and choose_device(0) == torch.device("cpu")


@pytest.mark.parametrize("size, chosen", [(8, torch.float32), (16, torch.bfloat16)])
def test_bfloat16_is_left_where_a_stride_meets_one_pixel(size, chosen, monkeypatch):
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    model = build_model("mobilenet", 10, size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, said = precision_of(model, "auto", torch.device("cpu"), size)
    assert found == chosen and (said is None) == (size == 16)
    if said:
        assert said.startswith("at --image_size 8, layers.11.conv1 has a stride and sees one pixel")
        assert precision_of(model, "fp32", torch.device("cpu"), size) == (torch.float32, None)
        asked, warning = precision_of(model, "bf16", torch.device("cpu"), size)
        assert asked == torch.bfloat16 and warning.endswith("Use --precision fp32, or larger images")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class ForTwo(nn.Module):
    """Takes no single image, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 3, 2, 1), 0

    def forward(self, images):
        self.calls += 1
        return self.conv(images).mean((2, 3)) / (1 / (len(images) - 1))


def test_the_choice_of_a_precision_sees_two_images_and_leaves_the_network_as_it_was(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    model = ForTwo()
    assert precision_of(model, "auto", torch.device("cpu"), 8) == (torch.bfloat16, None) and model.calls == 0


def imagenet_vit(**changes):
    return timm.create_model("vit_small_patch16_224", num_classes=7, depth=12, **changes)


def test_pretrained_weights_from_a_file_are_resampled(tmp_path):
    source = imagenet_vit()
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model = vit_small(10, 32)
    head = model.head.weight.clone()
    load_pretrained_weights(model, model.spec, tmp_path / "vit.pth")
    assert torch.equal(model.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    assert torch.equal(model.head.weight, head)
    assert model.pos_embed.shape == (1, 65, 384) and model.patch_embed.proj.weight.shape[-1] == 4


def test_pretrained_weights_never_fail_silently(tmp_path, monkeypatch):
    model = vit_small(10, 32)
    torch.save({k: v for k, v in imagenet_vit().state_dict().items() if "blocks.3" not in k}, tmp_path / "part.pth")
    with pytest.raises(DataError, match=r"do not fit the model: missing \['blocks\.3"):
        load_pretrained_weights(model, model.spec, tmp_path / "part.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot read weights"):
        load_pretrained_weights(model, model.spec, tmp_path / "junk.pth")

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DataError, match="cannot fetch ImageNet weights vit_small_patch16_224"):
        load_pretrained_weights(model, model.spec)
    assert main_imp_fillback.main(["--arch", "vit_small", "--vit_pretrained", "--dataset", "digits"]) == 3
    with pytest.raises(DataError, match="no ImageNet weights are published"):
        load_pretrained_weights(build_model("vit_tiny", 10, 32), MODELS["vit_tiny"].spec)


def structure_of(arch, rate):
    model = build_model(arch, 10, 32)
    groups = unit_groups(model)
    targets = ("head", "neuron") if arch.startswith("vit") else ("channel",)
    rules = RoundRules("refill", rate, "target", "magnitude", targets=targets, mlp_prune_ratio=rate)
    weights = dict(model.state_dict())
    return model, groups, decide(model, groups, rules, 0, ranked=weights, trained=weights, previous=None, batches=[])


@pytest.mark.parametrize("arch", SMALL)
def test_macs_of_the_dense_network_are_torchs(arch):
    model = build_model(arch, 10, 32).eval()
    set_fused_attention(model, fused=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    cost = cost_of(model, {}, 32)
    assert cost.macs == counter.get_total_flops() / 2
    assert cost.parameters == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_cost_of_a_vit_structure_is_that_of_the_smaller_network():
    model, _, pair = structure_of("vit_tiny", 0.3)
    cost = cost_of(model, pair.structure, 32)
    smaller = build_model("vit_tiny", 10, 32)
    for block in smaller.blocks:
        block.attn = timm.layers.Attention(192, num_heads=2, attn_head_dim=64, qkv_bias=True)
        block.attn.fused_attn = False
        block.mlp = timm.layers.Mlp(192, 268, 192)
    with FlopCounterMode(display=False) as counter:
        smaller.eval()(torch.rand(1, 3, 32, 32))
    assert cost.parameters == sum(p.numel() for p in smaller.parameters())
    assert cost.macs == counter.get_total_flops() / 2


def test_cost_of_a_resnet_structure_leaves_out_inputs_that_nothing_feeds():
    model, groups, pair = structure_of("res20s", 0.5)
    cost = cost_of(model, pair.structure, 32)
    conv2 = model.layer3[2].conv2
    kept = kept_per_kind(groups, pair)["channel"]
    masks = pair.structure
    fed = masks["layer3.2.conv1.weight"].flatten(1).any(1)
    alone = int((masks["layer3.2.conv2.weight"] * fed.view(1, -1, 1, 1)).sum())
    assert alone < int(masks["layer3.2.conv2.weight"].sum()) < conv2.weight.numel()
    dense = cost_of(model, {}, 32)
    assert kept[0] < kept[1]
    filters = sum(int(m.sum()) for n, m in masks.items() if ".conv" in n)
    assert cost.parameters < dense.parameters - (267264 - filters)
    assert cost.macs < dense.macs * 0.5


def test_a_row_of_zeros_alone_stays():
    model = build_model("vit_tiny", 10, 32)
    mask = torch.ones_like(model.blocks[0].mlp.fc1.weight)
    mask[:100] = 0
    whole = cost_of(model, {}, 32).parameters
    columns = torch.ones_like(model.blocks[0].mlp.fc2.weight)
    both = {"blocks.0.mlp.fc1.weight": mask, "blocks.0.mlp.fc2.weight": columns}
    for masks in ({"blocks.0.mlp.fc1.weight": mask}, both):
        assert whole == cost_of(model, masks, 32).parameters, "its bias is heard"
    columns[:, :100] = 0
    assert whole - cost_of(model, both, 32).parameters == 100 * (192 + 192 + 1), "nobody hears it"


def test_counting_leaves_the_model_alone():
    model, _, pair = structure_of("res20s", 0.5)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost_of(model, pair.structure, 32)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_the_cosine(name):
    model = build_model("vit_tiny", 10, 8)
    optimizer = OPTIMIZERS[name].build(model, 0.1, 0.8, 0.05)
    count = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert count == sum(p.numel() for p in model.parameters())
    if name == "adamw":
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
        assert optimizer.param_groups[0]["betas"][0] == 0.8
    rate = LearningRate(0.1, 10, 5, 2, "cosine")
    assert rate.at(1, 4) == 0.1 == rate.at(2, 0)
    assert rate.at(6, 0) == pytest.approx(0.05)
    assert rate.at(9, 4) < 0.002


def test_arguments_reach_the_parser_as_the_registry_has_them():
    for arch in MODELS:
        assert parse_args(["--arch", arch]).arch == arch
    with pytest.raises(UsageError):
        parse_args(["--arch", "nothing"])


def test_weights_that_are_pruned_one_by_one_are_still_computed_with():
    model = build_model("micro_cnn", 10, 8)
    mask = torch.ones_like(model.layer1[0].conv1.weight)
    mask[:, 0, 0, 0] = 0
    assert cost_of(model, {}, 8) == cost_of(model, {"layer1.0.conv1.weight": mask}, 8)


def test_recurrent_layers_and_torchs_attention_are_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.rows = nn.Conv2d(3, 8, 2, 2), nn.LSTM(8, 16, batch_first=True)
            self.attention, self.fc = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

        def forward(self, x):
            x = self.rows(self.stem(x).flatten(2).transpose(1, 2))[0]
            return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))

    tokens = 16
    stem, rows = tokens * 8 * 3 * 4, tokens * 4 * 16 * (8 + 16)
    attention = tokens * 16 * 16 * 4 + 2 * tokens * tokens * 16
    assert cost_of(Net(), {}, 8).macs == stem + rows + attention + 16 * 5
