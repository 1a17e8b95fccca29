"""Streams as units: whole across all layers that write or read them, silent when dropped, really removed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.func import functional_call

from structured_tickets.networks import build_model
from structured_tickets.networks.registry import ModelSpec, change_notes, note_channel_units
from structured_tickets.pruning.budgets import density_budget
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.evidence import Evidence, FeatureStatistics
from structured_tickets.pruning.masks import count_ones
from structured_tickets.pruning.regroup import score_units
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import kept_units, masks_of_units, parameter_of, ranked_names

IMAGE = (3, 16, 16)


def conv(given, out, size=3, stride=1, **more):
    return nn.Sequential(
        nn.Conv2d(given, out, size, stride, padding=size // 2, bias=False, **more), nn.BatchNorm2d(out), nn.ReLU()
    )


class Net(nn.Module):
    """A stem of 8 channels, what a subclass puts in the middle, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.fc = nn.Linear(self.build(), 5)

    def forward(self, x):
        return self.fc(self.middle(self.stem(x)).mean((2, 3)))


class Residual(Net):
    def build(self):
        self.a, self.b, self.c = conv(8, 12), conv(12, 8), conv(8, 8)
        return 8

    def middle(self, x):
        x = x + self.b(self.a(x))
        return F.relu(x + self.c(x))  # the last one reads and writes the same stream


class Dense(Net):
    def build(self):
        self.norm, self.a, self.last = nn.BatchNorm2d(8), conv(8, 4), nn.BatchNorm2d(12)
        return 12

    def middle(self, x):
        return F.relu(self.last(torch.cat([x, self.a(F.relu(self.norm(x)))], 1)))


class Squeezed(Net):
    """Depth-wise, with a gate, and a biased layer without a normalisation."""

    def build(self):
        self.up, self.deep, self.down = conv(8, 16, 1), conv(16, 16, groups=16), nn.Conv2d(16, 8, 1)
        self.less, self.more = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        return 8

    def middle(self, x):
        y = self.deep(self.up(x))
        gate = torch.sigmoid(self.more(F.relu(self.less(y.mean((2, 3), keepdim=True)))))
        return x + self.down(y * gate)


class Dropping(Residual):
    """Images leave out a branch at random, as timm has it, in whose code new tensors are drawn."""

    def __init__(self):
        super().__init__()
        self.drop = DropPath(0.2)

    def middle(self, x):
        x = x + self.drop(self.b(self.a(x)))
        return F.relu(x + self.drop(F.rrelu(self.c(x), training=self.training)))


class Larger(Net):
    """Depth-wise and transposed: more pixels of the same channels."""

    def build(self):
        self.a, self.larger, self.b = conv(8, 8), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), conv(8, 8)
        return 8

    def middle(self, x):
        x = F.relu(self.larger(x + self.a(x)))
        return x + self.b(x)


class Padded(Net):
    """Zeros around channels; how many stands in an attribute."""

    def build(self):
        self.a, self.b = conv(8, 12, stride=2), conv(12, 12)
        self.say()
        return 12

    def say(self):
        self.padding = (1, 3)

    def pads(self):
        return self.padding

    def middle(self, x):
        y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.pads()))
        return F.relu(self.b(self.a(x)) + y)


class Fixed(Padded):
    """How many zeros there are is written into the code."""

    def say(self):
        pass

    def pads(self):
        return 1, 3


class Counted(Fixed):
    """How many zeros there are is computed."""

    def middle(self, x):
        y = self.b(self.a(x))
        more = y.shape[1] - x.shape[1]
        return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, more - 1)))


class Classifier(Net):
    """Hidden layers behind flattened pixels."""

    def build(self):
        self.a = conv(8, 6, stride=4)
        self.hidden = nn.Linear(6 * 16, 10)
        return 10

    def middle(self, x):
        return F.relu(self.hidden(self.a(x).flatten(1)))[:, :, None, None]


class Scaled(Net):
    """One number for all channels, and one added to them."""

    def build(self):
        self.a, self.scale, self.shift = conv(8, 12), nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.b = conv(12, 8)
        return 8

    def middle(self, x):
        return x + self.b(self.a(x) * self.scale + self.shift)


NETWORKS = (Residual, Dropping, Dense, Squeezed, Larger, Padded, Fixed, Counted, Classifier, Scaled)


@torch.no_grad()
def built(make):
    """A network whose units are streams, with normalisations that look trained."""
    torch.manual_seed(0)
    network = make().eval()
    if not hasattr(network, "spec"):
        change_notes(network, ModelSpec(make.__name__, "stem.0", "fc", ""))
    note_channel_units(network, "stream", IMAGE)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.3, 0.3)
        norm.running_mean.uniform_(-0.3, 0.3)
    return network


def half(groups, seed=0):
    draw = torch.Generator().manual_seed(seed)
    kept = {g.name: torch.rand(g.units, generator=draw) < 0.5 for g in groups}
    return {n: flags if bool(flags.any()) else ~flags for n, flags in kept.items()}


@torch.no_grad()
def logits(network, values=None):
    images = torch.rand(3, *IMAGE, generator=torch.Generator().manual_seed(1))
    return network(images) if values is None else functional_call(network, values, (images,))


@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_a_dropped_stream_is_silent_and_really_gone(make):
    network = built(make)
    groups, own = unit_groups(network), dict(network.named_parameters())
    kept = half(groups)
    masks = masks_of_units(groups, kept, own)
    values = {n: own[n] * m for n, m in masks.items()}
    wanted = logits(network, values)
    # what belongs to dropped units can be anything but its input columns, and nothing else notices
    disturbed = dict(values)
    for group in groups:
        gone = {group.name: kept[group.name]}
        for part in group.slices:
            if part.axis == 0:
                outside = 1 - part.spread(gone[group.name], own[part.name])
                inside = torch.ones_like(own[part.name]) if own[part.name].ndim == 1 else masks[part.name].amax(0)
                disturbed[part.name] = disturbed[part.name] + outside * inside * torch.randn_like(own[part.name])
    torch.testing.assert_close(logits(network, disturbed), wanted)
    small = shrink(network, masks, image=IMAGE).network
    torch.testing.assert_close(logits(small), wanted, rtol=1e-4, atol=1e-5)
    assert type(small) is make and {n for n, _ in small.named_modules()} == {n for n, _ in network.named_modules()}
    left = sum(int(masks[n].sum()) if n in masks else p.numel() for n, p in own.items())
    assert sum(p.numel() for p in small.parameters()) == left


def test_which_streams_there_are():
    counts = {make: sorted(g.units for g in unit_groups(built(make))) for make in NETWORKS}
    assert counts[Residual] == counts[Dropping] == [8, 12]
    assert counts[Dense] == [4]  # the stem alone writes the other one: it stays, as its weights are not ranked
    assert counts[Squeezed] == [4, 8, 16]
    assert counts[Larger] == [8]
    assert counts[Padded] == [4, 8, 12]  # four channels are not in the first stream, and go by themselves
    assert counts[Fixed] == counts[Counted] == [8, 12]  # those four stay
    assert counts[Classifier] == [6, 10]
    assert counts[Scaled] == [8, 12]


def test_all_parts_of_a_stream_are_its_own():
    network = built(Residual)
    stream = next(g for g in unit_groups(network) if g.units == 8)
    places = {(s.name, s.axis, s.ranked) for s in stream.slices}
    weights = {("b.0.weight", 0, True), ("c.0.weight", 0, True), ("c.0.weight", 1, True), ("a.0.weight", 1, True)}
    follow = {("stem.0.weight", 0, False), ("fc.weight", 1, False)}
    norms = {(f"{n}.1.{p}", 0, False) for n in ("stem", "b", "c") for p in ("weight", "bias")}
    assert places == weights | follow | norms
    assert [s.name for s in stream.computing] == ["b.0.weight", "c.0.weight"]
    assert ("stem.0.weight", 0, True) in {
        (s.name, s.axis, s.ranked) for g in unit_groups(network, prune_stem=True) for s in g.slices
    }
    for group in unit_groups(network):
        for part in group.slices:
            assert len(part.index.flatten().unique()) == part.index.numel()


def test_a_stream_is_scored_by_the_mean_of_its_members():
    network = built(Residual)
    groups = unit_groups(network)
    stream = next(g for g in groups if g.units == 8)
    weights = {n: v.detach() for n, v in network.state_dict().items()}
    ones = {s.name: torch.ones_like(weights[s.name]) for g in groups for s in g.slices}
    found = score_units(groups, Evidence(weights, ones), "magnitude")[stream.name]
    a, b, c = (weights[f"{n}.0.weight"].abs().double() for n in "abc")
    wanted = (a.sum((0, 2, 3)) + b.sum((1, 2, 3)) + c.sum((1, 2, 3)) + c.sum((0, 2, 3))) / 4
    torch.testing.assert_close(found, wanted)
    features = {n: FeatureStatistics(torch.rand(v), torch.rand(v)) for n, v in (("a.0", 12), ("b.0", 8), ("c.0", 8))}
    found = score_units(groups, Evidence(weights, ones, features), "l1")[stream.name]
    torch.testing.assert_close(found, (features["b.0"].absolute + features["c.0"].absolute) / 2)


def test_a_stream_keeps_what_all_its_writers_have_weights_for():
    network = built(Residual)
    groups = unit_groups(network)
    masks = {s.name: torch.ones_like(parameter_of(network, s.name)) for g in groups for s in g.slices}
    masks["b.0.weight"][2:] = 0  # a quarter of 864 weights is left, and all 576 of the other writer
    counts = density_budget(groups, {}, masks)
    stream = next(g for g in groups if g.units == 8)
    assert counts[stream.name] == int(8 * (864 / 4 + 576) / (864 + 576))
    assert counts[next(g.name for g in groups if g.units == 12)] == 12
    assert kept_units(stream, masks).all()  # the other writer has weights left of each


@pytest.mark.parametrize("struct", ["refill", "rsst"])
@pytest.mark.parametrize("mode", ["round", "target"])
def test_each_round_takes_the_same_share_of_the_units(struct, mode):
    network = built(lambda: build_model("res20s", 10, 16))
    groups = unit_groups(network)
    draw, pair = torch.Generator().manual_seed(0), None  # the same numbers in all layers: L1 prunes all alike
    weights = {n: torch.rand(v.shape, generator=draw) for n, v in network.state_dict().items()}
    for state, share in enumerate((0.7, 0.49, 0.343)):
        rate = 0.3 if mode == "round" else 1 - share
        rules = RoundRules(struct, rate, mode, "magnitude", channel_units="stream")
        pair = decide(network, groups, rules, state, ranked=weights, trained=weights, previous=pair, batches=[])
        kept = sum(int(kept_units(g, pair.structure).sum()) for g in groups) / sum(g.units for g in groups)
        assert kept == pytest.approx(share, abs=0.03)
        names = ranked_names(network, groups)
        assert count_ones(pair.structure, names) == pytest.approx(
            share**2 * sum(weights[n].numel() for n in names), rel=0.15
        )
        if struct == "refill":
            weights = {n: v * pair.structure.get(n, 1.0) for n, v in weights.items()}


def test_zeros_around_channels_are_fewer_in_the_smaller_network():
    network = built(Padded)
    groups = unit_groups(network)
    kept = {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
    alone = next(g for g in groups if g.units == 4)
    kept[alone.name][[0, 3]] = False
    small = shrink(network, masks_of_units(groups, kept, dict(network.named_parameters())), image=IMAGE).network
    assert small.padding == (0, 2) and network.padding == (1, 3) and small.fc.in_features == 10


def test_the_networks_of_the_documents_can_be_cut_in_streams():
    network = built(lambda: build_model("res20s", 10, 16))
    streams = [g.units for g in unit_groups(network) if len(g.slices) > 4]
    assert streams == [16, 16, 32]  # channels of all three stages, of the last two, of the last alone
