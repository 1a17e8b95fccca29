"""A compact network that would be slower than the whole one computes zeros instead of moving channels."""

from __future__ import annotations

import pytest
import torch
from helpers.structures import masked
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from structured_tickets.networks.registry import ModelSpec
from structured_tickets.shrinking.effort import CARD, effort_of
from structured_tickets.shrinking.inserted_layers import INSERTED, Place, Select
from structured_tickets.shrinking.shrink import WORTH_IT, shrink
from structured_tickets.unit_groups.find import features_of, unit_groups
from structured_tickets.unit_groups.unit import masks_of_units

IMAGE = (3, 8, 8)


def conv(given, out, size=1, **more):
    return nn.Sequential(nn.Conv2d(given, out, size, padding=size // 2, bias=False, **more), nn.BatchNorm2d(out))


class Residual(nn.Module):
    """Blocks of an expansion, a depth-wise convolution and a projection, whose outcomes are added up."""

    def __init__(self, width=32, blocks=6):
        super().__init__()
        self.stem, self.fc = conv(3, width, 3), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(width, 64), nn.ReLU(), conv(64, 64, 3, groups=64), nn.ReLU(), conv(64, width))
            for _ in range(blocks)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.relu().mean((2, 3)))


class Listed(Residual):
    """The same, in a way that only following its features understands."""

    def forward(self, x):
        x, parts = self.stem(x), []
        for block in self.blocks:
            parts = list(block(x).chunk(2, 1))
            x = x + torch.cat([*parts], 1)
        return self.fc(x.relu().mean((2, 3)))


def made(kind):
    torch.manual_seed(0)
    model = kind().eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for name, low in (("weight", 0.5), ("bias", -0.4), ("running_mean", -0.3), ("running_var", 0.5)):
            getattr(norm, name).data.uniform_(low, low + 0.7)
    model.spec = ModelSpec(kind.__name__, "stem.0", "fc", "", image=IMAGE)
    return model


def half(model):
    draw, groups = torch.Generator().manual_seed(1), unit_groups(model)
    kept = {g.name: torch.randperm(g.units, generator=draw) < g.units // 2 for g in groups}
    return masks_of_units(groups, kept, dict(model.named_parameters()))


def inserted(network):
    return [m for m in network.modules() if isinstance(m, INSERTED)]


@pytest.mark.parametrize("kind", [Residual, Listed])
@torch.no_grad()
def test_layers_compute_zeros_where_moving_channels_would_take_longer(kind):
    model = made(kind)
    assert (features_of(model) is None) == (kind is Residual)
    masks, images = half(model), torch.rand(4, *IMAGE)
    wanted = masked(model, masks)(images)
    smallest, chosen = shrink(model, masks, spread=0).network, shrink(model, masks).network
    assert inserted(smallest) and not inserted(chosen)
    assert effort_of(chosen, IMAGE) < effort_of(smallest, IMAGE)
    assert sum(p.numel() for p in chosen.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    for network in (smallest, chosen, shrink(model, masks, spread=1).network):
        torch.testing.assert_close(network(images), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Residual, Listed])
@torch.no_grad()
def test_layers_keep_whole_lanes_for_a_card(kind):
    model, draw = made(kind), torch.Generator().manual_seed(1)
    groups = unit_groups(model)
    kept = {g.name: torch.rand(g.units, generator=draw) < 0.3 for g in groups}
    masks, images = masks_of_units(groups, kept, dict(model.named_parameters())), torch.rand(4, *IMAGE)
    small, wide = (shrink(model, masks, 8, spread=1, fills=fills).network for fills in (False, True))
    convolutions = [[m for m in n.modules() if isinstance(m, nn.Conv2d)] for n in (small, wide)]
    widths = [{w for m in layers for w in (m.in_channels, m.out_channels)} - {3} for layers in convolutions]
    assert any(w % 8 for w in widths[0]) and not any(w % 8 for w in widths[1]) and {16, 24} <= widths[1]
    for one, other in zip(*convolutions, strict=True):
        assert one.out_channels <= other.out_channels <= one.out_channels + 7 or other.out_channels == 32
    assert not inserted(wide)
    torch.testing.assert_close(wide(images), masked(model, masks)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Residual, Listed])
@torch.no_grad()
def test_on_a_card_the_way_is_chosen_by_an_estimate_for_cards(kind):
    """Without notes of the images, layers compute the zeros."""
    model = made(kind)
    masks, images = half(model), torch.rand(4, *IMAGE)
    ways = [shrink(model, masks, 8, spread=spread, fills=True).network for spread in (0, 1, 2)]
    efforts = [effort_of(network, IMAGE, CARD) for network in ways]
    chosen = shrink(model, masks, 8, fills=True).network
    assert effort_of(chosen, IMAGE, CARD) <= min(effort_of(model, IMAGE, CARD), efforts[0])
    if kind is Residual:
        model.spec = ModelSpec(kind.__name__, "stem.0", "fc", "")
        plain = shrink(model, masks, 8, fills=True).network
        assert [p.shape for p in plain.parameters()] == [p.shape for p in ways[1].parameters()]
    for network in (*ways, chosen):
        torch.testing.assert_close(network(images), masked(model, masks)(images), rtol=1e-4, atol=1e-5)


def test_the_estimate_for_cards_counts_bytes_and_multiplications():
    layer, per_number, per_multiplication = nn.Conv2d(64, 20, 1), 2 / 2_700, 2 / 450_000
    numbers, weights = 64 + 20, 64 * 20 + 20
    wanted = (2_000 + per_number * weights) / 128 + per_number * numbers + per_multiplication * 64 * 24
    assert effort_of(layer, (64, 1, 1), CARD) == pytest.approx(wanted)


@torch.no_grad()
def test_units_are_filled_up_where_torch_masks_the_weights():
    model = made(Residual)
    masks, images = half(model), torch.rand(4, *IMAGE)
    wanted = masked(model, masks)(images)
    layer = model.blocks[0][2][0]
    prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight))
    small = shrink(model, masks, 8, spread=1, fills=True).network
    torch.testing.assert_close(small(images), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_compute_no_more_zeros_than_a_sum_needs():
    """All that is added has the channels that any part of it has, and no others."""
    model = made(Residual)
    groups = unit_groups(model, True)
    last = [g for g in groups if g.name.endswith(".4.0") or g.name == "stem.0"]
    assert len(last) == 7
    kept = {g.name: torch.isin(torch.arange(32), torch.tensor([k, k + 1, 20])) for k, g in enumerate(last)}
    masks, images = masks_of_units(groups, kept, dict(model.named_parameters())), torch.rand(4, *IMAGE)
    small = shrink(model, masks, spread=1).network
    assert {small.get_submodule(g.root.layer).out_channels for g in last} == {9}
    assert not inserted(small) and small.get_submodule("fc").in_features == 9
    torch.testing.assert_close(small(images), masked(model, masks)(images), rtol=1e-4, atol=1e-5)


class Joined(Residual):
    """What is added consists of parts that other layers compute."""

    def __init__(self):
        super().__init__(32, 0)
        self.one = nn.ModuleList(conv(32, 16, 3) for _ in range(3))
        self.other = nn.ModuleList(conv(32, 16) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for one, other in zip(self.one, self.other, strict=True):
            x = x + torch.cat([one(x), other(x)], 1)
        return self.fc(x.relu().mean((2, 3)))


@pytest.mark.parametrize("fills", [False, True])
@torch.no_grad()
def test_layers_that_compute_parts_of_a_sum_compute_their_zeros_too(fills):
    model = made(Joined)
    masks, images = half(model), torch.rand(4, *IMAGE)
    small = shrink(model, masks, 8, spread=1, fills=fills).network
    assert not inserted(small) and inserted(shrink(model, masks, spread=0).network)
    torch.testing.assert_close(small(images), masked(model, masks)(images), rtol=1e-4, atol=1e-5)


class Tiny(Residual):
    """Layers so small that moving channels takes longer than computing them."""

    def __init__(self):
        super().__init__(8, 0)
        self.blocks = nn.ModuleList(conv(8, 8) for _ in range(4))


@torch.no_grad()
def test_a_very_small_network_is_no_slower_by_the_estimate():
    model = made(Tiny)
    assert sum(p.numel() for p in model.parameters()) < WORTH_IT
    masks, images = half(model), torch.rand(4, *IMAGE)
    smallest, chosen = shrink(model, masks, spread=0).network, shrink(model, masks).network
    assert effort_of(smallest, IMAGE) > effort_of(model, IMAGE) >= effort_of(chosen, IMAGE)
    torch.testing.assert_close(chosen(images), masked(model, masks)(images), rtol=1e-4, atol=1e-5)


class Heavy(Residual):
    """Wide layers on images of a single pixel: what takes time are their weights."""

    def __init__(self):
        super().__init__(256, 0)
        self.stem = nn.Sequential(nn.Conv2d(3, 256, 8, bias=False), nn.BatchNorm2d(256))
        self.blocks = nn.ModuleList(nn.Sequential(conv(256, 256), nn.ReLU(), conv(256, 256)) for _ in range(4))


@torch.no_grad()
def test_channels_are_moved_where_the_weights_that_are_saved_take_longer():
    model = made(Heavy)
    masks, images = half(model), torch.rand(4, *IMAGE)
    chosen, smallest, zeros = (shrink(model, masks, spread=spread).network for spread in (None, 0, 1))
    sizes = [sum(p.numel() for p in n.parameters()) for n in (chosen, smallest, zeros)]
    assert inserted(chosen) and sizes[0] == sizes[1] < 0.8 * sizes[2]
    assert effort_of(chosen, IMAGE) < 0.85 * effort_of(model, IMAGE)
    torch.testing.assert_close(chosen(images), masked(model, masks)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer, effort",
    [
        (nn.Conv2d(64, 32, 1), (59_500 + 0.68 * (64 * 32 + 32)) / 16 + 0.1 * (64 + 32) + 0.0079 * 64 * 32),
        (nn.Conv2d(64, 24, 1), (59_500 + 0.68 * (64 * 24 + 24)) / 16 + 0.1 * (64 + 24) + 0.0079 * 64 * 32),
        (nn.Conv2d(64, 64, 1, groups=64, bias=False), (59_500 + 0.68 * 64) / 16 + 0.1 * 128 + 0.0079 * 64),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 32)),
            (2 * 3_000 + 6_500 + 0.27 * (64 * 32 + 32)) / 16 + 0.09 * 96 + 0.018 * 64 * 32,
        ),
    ],
)
def test_weights_take_time_by_themselves(layer, effort):
    assert effort_of(layer, (64, 1, 1)) == pytest.approx(effort)


@torch.no_grad()
def test_without_an_image_in_its_notes_the_smallest_network_is_made():
    model = made(Residual)
    model.spec = ModelSpec("Residual", "stem.0", "fc", "")
    masks = half(model)
    smallest, small = (shrink(model, masks, spread=s).network for s in (0, None))
    assert [p.shape for p in smallest.parameters()] == [p.shape for p in small.parameters()] and inserted(small)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_are_taken_in_the_layout_in_which_they_lie(layout):
    x = torch.rand(2, 6, 3, 3).contiguous(memory_format=layout)
    found = Select(torch.tensor([0, 2, 5]), 6)(x)
    assert torch.equal(found, x[:, [0, 2, 5]]) and found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("places", [[0, 2, 5], [1, 2, 3]])
def test_features_are_put_in_their_places_along_the_last_axis(places):
    x: Tensor = torch.rand(2, 4, 3)
    found = Place(torch.tensor(places), 6, -1)(x)
    assert torch.equal(found[..., places], x) and float(found.abs().sum()) == pytest.approx(float(x.abs().sum()))


@pytest.mark.parametrize("few, side, macs", [(8, 16, 8 * 24 * 256), (8, 15, 0), (20, 16, 0)])
def test_few_channels_of_large_images_are_placed_by_a_product_and_others_taken_from_their_places(few, side, macs):
    x = torch.rand(2, few, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    places = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:few].sort().values
    with FlopCounterMode(display=False) as counter:
        found = Place(places, 24)(x)
    assert counter.get_total_flops() == 2 * 2 * macs
    assert torch.equal(found[:, places], x) and int(found.count_nonzero()) == int(x.count_nonzero())
    assert found.is_contiguous(memory_format=torch.channels_last)
    (found * found.detach()).sum().backward()
    torch.testing.assert_close(x.grad, x.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_placed_channels_have_gradients_too(layout):
    x = torch.rand(2, 3, 2, 2, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    place = Place(torch.tensor([0, 2, 5]), 7)
    assert torch.autograd.gradcheck(place, (x,)) and torch.autograd.gradgradcheck(place, (x,))
    assert torch.equal(torch.export.export(place, (x.detach(),)).module()(x), place(x))


@pytest.mark.parametrize("layout", ["last", torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("few", [[1, 4, 5], [0, 1, 2, 3, 4, 5], []])
def test_heads_are_moved_as_blocks_with_the_same_values_and_gradients(layout, few):
    channels = (torch.tensor(few, dtype=torch.long)[:, None] * 16 + torch.arange(16)).flatten()
    axis, shape = (-1, (2, 3, 96)) if layout == "last" else (1, (2, 96, 3, 5))
    many = torch.rand(shape, dtype=torch.float64)
    many = many if axis == -1 else many.contiguous(memory_format=layout)
    many.requires_grad_()
    select, place = Select(channels, 96, axis), Place(channels, 96, axis)
    assert select.block % 16 == place.block % 16 == 0
    taken = select(many)
    assert torch.equal(taken, many.index_select(axis, channels))
    put = place(taken)
    there = torch.zeros(96, dtype=torch.float64).index_fill(0, channels, 1.0)
    there = there if axis == -1 else there[:, None, None]
    assert torch.equal(put, many * there)
    assert torch.autograd.gradcheck(lambda x: place(select(x)), (many,), fast_mode=True)
    exported = torch.export.export(nn.Sequential(select, place), (many.detach(),)).module()
    assert torch.equal(exported(many), put)


@pytest.mark.parametrize("first", [0, 3, 40])
def test_channels_that_lie_side_by_side_but_at_other_places_than_whole_blocks_are_moved_one_by_one(first):
    channels = torch.cat([torch.arange(16) + first, torch.tensor([first + 20])])
    many = torch.rand(2, 3, 68)
    select, place = Select(channels, 68, -1), Place(channels, 68, -1)
    assert select.block == place.block == 1
    assert torch.equal(select(many), many[..., channels])
    assert torch.equal(place(select(many))[..., channels], many[..., channels])
