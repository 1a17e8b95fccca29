"""Heads of torch's own attention, however it is called, and heads whose keys and values are shared."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.structures import masked
from torch import nn

from structured_tickets.features.calls import Part
from structured_tickets.features.exported import program_of
from structured_tickets.features.parts_of_weights import parts_of_weights
from structured_tickets.networks.registry import ModelSpec
from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.shrinking.cuts import Cuts, cut_layer
from structured_tickets.shrinking.fewer_heads import FewerHeads, let_attention_have_fewer_heads
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import masks_of_units, parameter_name

WIDTH, HEADS, IMAGE = 24, 4, (3, 8, 8)


class Net(nn.Module):
    """Tokens, what a subclass does with them, and a classifier."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.fc = nn.Conv2d(3, WIDTH, 2, 2), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        self.build()

    def forward(self, x):
        return self.fc(self.mix(self.norm(self.embed(x).flatten(2).transpose(1, 2))).mean(1))


class Itself(Net):
    """Attention of a sequence to itself."""

    first, weights, bias = True, False, True

    def build(self):
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=self.first, bias=self.bias)

    def mix(self, x):
        y = x if self.first else x.transpose(0, 1)
        y = self.attention(y, y, y, need_weights=self.weights)[0]
        return x + (y if self.first else y.transpose(0, 1))


class SequenceFirst(Itself):
    first, bias = False, False


class Weights(Itself):
    weights = True


class Causal(Itself):
    def mix(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return x + self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


class Learned(Net):
    """Learned queries read an image."""

    def build(self):
        self.queries, self.attention = (
            nn.Parameter(torch.randn(1, 3, WIDTH)),
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        )

    def mix(self, x):
        return self.attention(self.queries.expand(len(x), -1, -1), x, x)[0]


class OtherWidths(Net):
    """Keys and values of other widths than the queries."""

    def build(self):
        self.memory = nn.Linear(WIDTH, 16)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=16, vdim=16, batch_first=True)

    def mix(self, x):
        y = self.memory(x)
        return x + self.attention(x, y, y, need_weights=False)[0]


class Encoder(Net):
    """Torch's encoder, which has an operation of its own for a layer where no gradient is wanted."""

    def build(self):
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def mix(self, x):
        return self.encoder(x)


class Padded(Itself):
    """Some tokens are read by none."""

    weights = True

    def mix(self, x):
        lengths = x.square().sum(2)
        return x + self.attention(x, x, x, key_padding_mask=lengths < lengths.mean(1, keepdim=True))[0]


class OwnMasks(Itself):
    """Numbers of its own that are added to the attention of each head."""

    def build(self):
        super().build()
        self.register_buffer("added", torch.randn(HEADS, 16, 16))

    def mix(self, x):
        mask = self.added.repeat(len(x), 1, 1)
        return x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class PaddedEncoder(Net):
    """Torch's encoder, which hands on tokens without those that are masked where no gradient is wanted."""

    def build(self):
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def mix(self, x):
        masked = torch.arange(x.shape[1]).expand(len(x), -1) >= x.shape[1] - 1
        return self.encoder(x, src_key_padding_mask=masked) * ~masked[..., None]


class Decoder(Net):
    def build(self):
        self.queries = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True)

    def mix(self, x):
        return self.decoder(self.queries.expand(len(x), -1, -1), x)


class Shared(Net):
    """Two heads of queries share keys and values, as torch's operation has it."""

    def build(self):
        self.query, self.both, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def mix(self, x):
        q, k, v = (
            t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for t in (self.query(x), *self.both(x).chunk(2, -1))
        )
        return x + self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


HEADS_OF = {
    Itself: [4],
    SequenceFirst: [4],
    Weights: [4],
    Causal: [4],
    Learned: [4],
    OtherWidths: [4],
    Encoder: [4],
    Padded: [4],
    OwnMasks: [4],
    PaddedEncoder: [4],
    Decoder: [4, 4],
    Shared: [2],
}


def made(kind):
    torch.manual_seed(0)
    model = kind()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.3, 0.8)
    model.spec = ModelSpec(kind.__name__, "embed", "fc", "", image=IMAGE, followed=True)
    return model.eval()


def images():
    return torch.rand(4, *IMAGE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", HEADS_OF)
@torch.no_grad()
def test_heads_are_found_and_removed(kind):
    model = made(kind)
    before = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    groups = unit_groups(model)
    assert [g.units for g in groups if g.kind == "head"] == HEADS_OF[kind]
    kept = {g.name: torch.arange(g.units) % 2 == 1 for g in groups}
    masks = masks_of_units(groups, kept, dict(model.named_parameters()))
    small = shrink(model, masks).network.eval()
    torch.testing.assert_close(small(images()), masked(model, masks)(images()), rtol=1e-4, atol=1e-5)
    wanted = [m for m in small.modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(wanted) == sum(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    for attention in wanted:
        assert type(attention) is FewerHeads and attention.num_heads == 2 and attention.kept_heads == (1, 3)
        assert attention.out_proj.weight.shape == (WIDTH, WIDTH // 2) and attention.out_proj.in_features == WIDTH // 2
    sizes = [sum(p.numel() for p in n.parameters()) for n in (model, small)]
    assert sizes[1] <= sizes[0] - sum(int((m == 0).sum()) for m in masks.values())
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before[0].items())
    assert [type(m) for m in model.modules()] == before[1]


@pytest.mark.parametrize("kind", [Itself, Encoder, Decoder])
def test_a_network_with_fewer_heads_trains_as_the_masked_one(kind):
    model = made(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    groups = unit_groups(model)
    kept = {g.name: torch.arange(g.units) % 2 == 1 for g in groups}
    masks = masks_of_units(groups, kept, dict(model.named_parameters()))
    small, whole = shrink(model, masks), masked(model, masks)
    for network in (small.network, whole):
        network.train()(images()).square().sum().backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in small.network.named_parameters():
        slope = wanted[name].grad
        for axis, index in small.cuts.get(name, {}).items():
            slope = slope.index_select(axis, index)
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-3, atol=1e-5)


def narrowed(first):
    """Torch's attention of three heads of which the second is zero, and the same without it."""
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(12, 3, batch_first=first).eval()
    nn.init.uniform_(whole.in_proj_bias)
    rows = (torch.arange(36) % 12 // 4 != 1).nonzero().flatten()
    columns, cuts = rows[:8], Cuts()
    small = copy.deepcopy(whole)
    cut_layer(small, "x", {"in_proj_weight": {0: rows}, "in_proj_bias": {0: rows}}, cuts)
    cut_layer(small.out_proj, "x.out_proj", {"weight": {1: columns}}, cuts)
    let_attention_have_fewer_heads(nn.ModuleDict({"x": small}), cuts)
    with torch.no_grad():
        whole.out_proj.weight[:, 4:8] = 0
    return whole, small


PADDING = torch.arange(5) > torch.tensor([[3], [2]])
CASES = [
    {},
    {"need_weights": False},
    {"key_padding_mask": PADDING},
    {"key_padding_mask": PADDING, "need_weights": False, "attn_mask": torch.arange(5) > torch.arange(3)[:, None] + 1},
    {"attn_mask": torch.linspace(-1, 1, 15).view(3, 5), "average_attn_weights": False},
    {"attn_mask": torch.linspace(-2, 2, 2 * 3 * 15).view(6, 3, 5), "need_weights": False},
]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("more", CASES)
@torch.no_grad()
def test_fewer_heads_give_what_torchs_attention_gives(more, first):
    whole, small = narrowed(first)
    assert small.num_heads == 2 and small.heads_before == 3
    draw = torch.Generator().manual_seed(3)
    queries, memory = (torch.rand(2, n, 12, generator=draw) for n in (3, 5))
    q, m = (queries, memory) if first else (queries.transpose(0, 1), memory.transpose(0, 1))
    wanted, found = whole(q, m, m, **more), small(q, m, m, **more)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert (found[1] is None) == (wanted[1] is None)
    if more.get("average_attn_weights") is False:
        torch.testing.assert_close(found[1], wanted[1][:, [0, 2]])
    if not more:  # one sequence without a batch
        torch.testing.assert_close(
            small(queries[0], memory[0], memory[0])[0], whole(queries[0], memory[0], memory[0])[0]
        )


def test_what_criteria_read_of_torchs_attention_are_its_projections():
    model = made(Itself)
    groups, before = unit_groups(model), {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
    batch = (images(), torch.tensor([0, 1, 2, 3]))
    found = collect_evidence(model, groups, model.state_dict(), {}, "saliency", [batch]).features["attention"]
    with torch.no_grad():
        tokens = model.norm(model.embed(batch[0]).flatten(2).transpose(1, 2))
        wanted = F.linear(tokens, model.attention.in_proj_weight, model.attention.in_proj_bias)
    torch.testing.assert_close(found.absolute, wanted.double().abs().mean((0, 1)), rtol=1e-5, atol=1e-6)
    assert found.saliency.shape == (3 * WIDTH,) and bool((found.saliency > 0).all())
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == before


def test_rows_of_a_projection_are_known_where_only_linear_layers_use_them():
    program = program_of(made(Learned), IMAGE, training=False)
    parts = [p for n, p in parts_of_weights(program).items() if "weight" in p.whole.name]
    assert [(p.start, p.total) for p in parts] == [(0, 72), (24, 72)] and all(isinstance(p, Part) for p in parts)
    program = program_of(made(OtherWidths), IMAGE, training=False)
    assert parts_of_weights(program) == {}  # the bias is one parameter, and the weights are three


@pytest.mark.parametrize(
    "key, name",
    [
        ("a.in_proj_weight", "a.in_proj_weight"),
        ("a.in_proj_weight_mask", "a.in_proj_weight"),
        ("a", "a.weight"),
        ("weight", "weight.weight"),
    ],
)
def test_keys_of_masks_name_parameters_of_torchs_attention_too(key, name):
    assert parameter_name(key) == name
