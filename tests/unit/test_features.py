"""Networks whose units only following their features finds: right ones, silent when pruned, and really removed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from helpers.structures import masked
from torch import nn

from structured_tickets.base.errors import UsageError
from structured_tickets.networks.registry import ModelSpec
from structured_tickets.shrinking.inserted_layers import INSERTED
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.unit_groups.find import features_of, reasons_of_layers, unit_groups
from structured_tickets.unit_groups.unit import masks_of_units


def conv(given, out, size=3, **more):
    return nn.Sequential(
        nn.Conv2d(given, out, size, padding=size // 2, bias=False, **more), nn.BatchNorm2d(out), nn.SiLU()
    )


class Cnn(nn.Module):
    """A stem, what a subclass puts in the middle, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = conv(3, 8), nn.Linear(12, 5)
        self.build()

    def forward(self, x):
        return self.fc(self.middle(self.stem(x)).mean((2, 3)))


class Listed(Cnn):
    """Parts in a list, split and put together again."""

    def build(self):
        self.first, self.parts = conv(8, 16), nn.ModuleList([conv(8, 8), conv(8, 8)])
        self.last = conv(32, 12, 1)

    def middle(self, x):
        y = list(self.first(x).chunk(2, 1))
        for part in self.parts:
            y.append(part(y[-1]))
        return self.last(torch.cat(y, 1))


class Upwards(Cnn):
    """A layer that widens before a normalisation of two tensors side by side."""

    def build(self):
        self.down, self.up, self.skip = (
            nn.Conv2d(8, 16, 3, 2, 1),
            nn.ConvTranspose2d(16, 24, 2, 2),
            nn.Conv2d(8, 10, 3, 1, 1),
        )
        self.norm, self.last = nn.BatchNorm2d(34), nn.Conv2d(34, 12, 3, padding=1)

    def middle(self, x):
        return self.last(self.norm(torch.cat([self.up(self.down(x).relu()), self.skip(x).relu()], 1)).relu())


class Unfolded(Cnn):
    """Pixels become channels by slices."""

    def build(self):
        self.a, self.skip, self.norm = nn.Conv2d(8, 6, 3, 1, 1), nn.Conv2d(8, 10, 3, 2, 1), nn.BatchNorm2d(34)
        self.last = nn.Conv2d(34, 12, 3, padding=1)

    def middle(self, x):
        y = self.a(x).relu()
        u = torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2], y[..., ::2, 1::2], y[..., 1::2, 1::2]], 1)
        return self.last(self.norm(torch.cat([u, self.skip(x).relu()], 1)).relu())


class Sounds(Cnn):
    """Rows of pixels as points in time: convolutions of one axis, one of them filter by filter."""

    def build(self):
        self.a, self.norm = nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.deep, self.b = nn.Conv1d(16, 16, 3, padding=1, groups=16), nn.Conv1d(16, 12, 1)

    def middle(self, x):
        return self.b(self.deep(self.norm(self.a(x.mean(3))).relu()).relu()).relu()[..., None]


class Clips(Cnn):
    """Convolutions of three axes, down and up again."""

    def build(self):
        self.a, self.norm, self.up = nn.Conv3d(8, 16, 3, 2, 1), nn.BatchNorm3d(16), nn.ConvTranspose3d(16, 10, 2, 2)
        self.b = nn.Conv3d(10, 12, 3, padding=1)

    def middle(self, x):
        clip = x.unsqueeze(2).expand(-1, -1, 2, -1, -1)
        return self.b(self.up(self.norm(self.a(clip)).relu()).relu()).relu().amax(2)


class Elsewhere(Cnn):
    """Code that reads the weights of layers, too: of a convolution, and of a normalisation."""

    def build(self):
        self.a, self.b, self.c = conv(8, 16), conv(16, 16), nn.Conv2d(16, 12, 3, padding=1)
        self.last = nn.Conv1d(12, 12, 1)

    def middle(self, x):
        y = self.c(self.b(self.a(x))) * self.c.weight.square().mean() + self.b[1].weight.mean()
        return self.last(y.flatten(2)).relu()[..., None]


class Written(Cnn):
    """Parts of tensors that are written to: rows of pixels, and channels among zeros."""

    def build(self):
        self.a, self.b, self.c = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 12, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Conv1d(12, 12, 1)

    def middle(self, x):
        y = self.norm(self.a(x)).relu()
        y[:, :, 0] = self.b(x)[:, :, 0].relu()
        y[..., -1].mul_(0.5)
        shifted = torch.zeros_like(y)
        shifted[:, :4, 1:], shifted[:, 4:] = y[:, :4, :-1], y[:, 4:]
        return self.last(self.c(shifted).relu().flatten(2)).relu()[..., None]


class Constant(Cnn):
    """Channels written into zeros that are made for them; before and after a view of these was taken."""

    def build(self):
        self.a, self.b, self.c = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.last = nn.Conv1d(12, 12, 1)

    def middle(self, x):
        place, early = torch.zeros(len(x), 16, *x.shape[2:]), torch.zeros(len(x), 12, *x.shape[2:])
        place[:, :6], place[:, 6:] = self.a(x).relu(), self.b(x).relu()
        view = early[:, :]
        early[:, :] = self.c(place.relu()).relu()
        return self.last(view.flatten(2)).relu()[..., None]


class Aside(Cnn):
    """A penalty on the weights of a layer, as a second output."""

    def build(self):
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.last = nn.Conv1d(12, 12, 1)

    def middle(self, x):
        return self.last(self.b(self.a(x).relu()).relu().flatten(2)).relu()[..., None]

    def forward(self, x):
        logits = super().forward(x)
        return (logits, self.a.weight.square().sum()) if self.training else logits


class TwoWays(Cnn):
    """A layer that is called with channels, and with heads of channels as images."""

    def build(self):
        self.a, self.deep = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.b, self.c, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 12, 1), nn.Conv1d(12, 12, 1)

    def middle(self, x):
        heads = self.deep(self.a(x).relu().reshape(-1, 4, *x.shape[2:])).reshape(len(x), -1, *x.shape[2:])
        y = torch.cat([heads, self.deep(self.b(x).relu())], 1)
        return self.last(self.c(y.relu()).relu().flatten(2)).relu()[..., None]


class Made(Cnn):
    """A linear layer whose weights are computed, beside layers without a bias."""

    def build(self):
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.Conv2d(16, 12, 1, bias=False)
        self.weights, self.last = nn.Linear(12, 144, bias=False), nn.Conv1d(12, 12, 1, bias=False)

    def middle(self, x):
        y = self.b(self.a(x).relu()).relu()
        mixed = F.linear(y.mean((2, 3)), self.weights.weight.mean(1).view(12, 12))
        return (self.last(y.flatten(2)) * (1 + mixed.tanh())[..., None]).relu()[..., None]


class InGroups(Cnn):
    """A grouped convolution between others, and a depth-wise one, behind a list."""

    def build(self):
        self.a, self.b, self.c, self.d = conv(8, 16), conv(16, 24, groups=4), conv(24, 24, groups=24), conv(24, 12, 1)

    def middle(self, x):
        y = [self.a(x)]
        for layer in (self.b, self.c, self.d):
            y.append(layer(y[-1])) if len(y[0]) else None
        return y[-1]


class Noisy(Cnn):
    """Asks whether it trains."""

    def build(self):
        self.a, self.b = conv(8, 16), conv(16, 12)

    def middle(self, x):
        x = F.dropout(self.a(x), 0.1, self.training)
        if self.training:
            x = x * (torch.rand(len(x), 1, 1, 1) > 0.1)
        return self.b(x)


class Called(Cnn):
    """A layer is called twice, with a normalisation of its own each time."""

    def build(self):
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 12, 1)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def middle(self, x):
        return self.b(self.second(self.a(self.first(self.a(x)).relu())).relu())


class Gates(Cnn):
    """A gated linear unit, a slope for each channel, a gain for each channel."""

    def build(self):
        self.a, self.glu, self.b, self.slopes = conv(8, 32), nn.GLU(1), conv(16, 10), nn.PReLU(10)
        self.gain, self.c = nn.Parameter(torch.rand(10, 1, 1)), conv(10, 12)

    def middle(self, x):
        return self.c(self.slopes(self.b(self.glu(self.a(x)))) * self.gain)


class Scaled(Cnn):
    """A product is added in the same operation, and what is computed is looked at."""

    def build(self):
        self.a, self.c, self.gain = conv(8, 16), conv(16, 12), nn.Parameter(torch.rand(16, 1, 1))

    def middle(self, x):
        x = self.a(x)
        torch._assert(x.shape[1] > 0, "no channels")
        return self.c(torch.addcmul(x, x, self.gain))


class Standardised(nn.Conv2d):
    """Each filter is shifted and scaled before it is used, and has a gain."""

    def __init__(self, *args, **words):
        super().__init__(*args, **words)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = self.gain * w / (w.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Together(nn.Conv2d):
    """All filters are divided by the same number."""

    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias, self.stride, self.padding)


class Computed(Cnn):
    """Weights are computed, of one layer's filters together."""

    def build(self):
        self.a, self.b = Standardised(8, 16, 3, padding=1), Standardised(16, 16, 3, padding=1, groups=16)
        self.c, self.d = Together(16, 10, 1), Standardised(10, 12, 3, padding=1, bias=False)

    def middle(self, x):
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


class Attention(nn.Module):
    """As it is written by hand."""

    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1) @ v
        return self.out(x.transpose(1, 2).reshape(batch, tokens, -1))


class Fixed(Attention):
    """The head's size is taken from the width of what comes in: fewer heads would get larger ones."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(24, 72)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.query(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Biased(Attention):
    """A table with a bias for each distance and head, in which some places do not see others."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.rand(9, 4))
        self.register_buffer("unseen", torch.zeros(1, 1, 5, 5).index_fill(3, torch.tensor([4]), -2.0))

    def bias(self):
        return self.table

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value))
        far = torch.arange(n)[:, None] - torch.arange(n) + n - 1
        bias = self.bias()[far.flatten()].view(n, n, -1).permute(2, 0, 1).unsqueeze(0) + self.unseen
        x = F.scaled_dot_product_attention(q, k, v, bias)
        return self.out(x.transpose(1, 2).reshape(b, n, -1))


class Resized(Biased):
    """The table is made for other images, but for its last two rows."""

    def bias(self):
        other = F.interpolate(self.table[:-2].T[None], size=7, mode="linear")[0].T
        square = F.interpolate(self.table[:-2].T.view(1, -1, 7, 1), size=(7, 1), mode="bilinear").flatten(2)[0].T
        return torch.cat([(other + square) / 2, self.table[-2:]])


class Grouped(nn.Module):
    """Two heads of queries share keys and values; the width of queries is that of what comes in."""

    def __init__(self):
        super().__init__()
        self.query, self.out = nn.Linear(24, 48), nn.Linear(24, 24)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (t.reshape(b, n, -1, 6).transpose(1, 2) for t in self.query(x).split([c, 12, 12], -1))
        x = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        return self.out(x.transpose(1, 2).reshape(b, n, -1))


class Gated(nn.Module):
    """One number in two gates what another gives, or a filter of it: parts whose sizes stand in an attribute."""

    def __init__(self):
        super().__init__()
        self.sizes = (32, 20, 12)
        self.into, self.deep = nn.Linear(24, 64), nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.out = nn.Linear(32, 24)

    def forward(self, x):
        gate, plain, filtered = torch.split(self.into(x), self.sizes, -1)
        filtered = self.deep(filtered.transpose(1, 2)).transpose(1, 2)
        return self.out(F.gelu(gate) * torch.cat((plain, filtered), -1))


class Turned(Attention):
    """Queries and keys are turned by angles that depend on places; biases are put together outside of their layer."""

    def __init__(self):
        super().__init__()
        self.query, self.first, self.last = nn.Linear(24, 72, bias=False), *(nn.Parameter(torch.rand(24)) for _ in "qv")
        self.register_buffer("none", torch.zeros(24))
        self.register_buffer("periods", torch.rand(3) + 0.5)

    def turned(self, x):
        angles = torch.arange(5)[:, None] / self.periods.repeat(2)
        one, other = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-other, one], -1) * angles.sin()

    def forward(self, x):
        b, n, _ = x.shape
        bias = torch.cat((self.first, self.none, self.last))
        q, k, v = F.linear(x, self.query.weight, bias).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.out(x.transpose(1, 2).reshape(b, n, -1))


class Placed(Attention):
    """What queries find at each distance, by numbers that all heads share (SAM); heads are images of a batch."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.rand(5, 5, 6))

    def forward(self, x):
        b, n, _ = x.shape
        parts = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k, v = (part.reshape(b * self.heads, n, -1) for part in parts)
        bias = torch.einsum("bnc,nmc->bnm", q, self.places)
        x = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        return self.out(x.view(b, self.heads, n, -1).transpose(1, 2).reshape(b, n, -1))


class Adapted(Attention):
    """What a small layer gives is added to a part of the queries, keys and values (LoRA)."""

    def __init__(self):
        super().__init__()
        self.query, self.down, self.up = nn.Linear(24, 72), nn.Linear(24, 3), nn.Linear(3, 24)

    def forward(self, x):
        b, n, _ = x.shape
        together = self.query(x)
        together[..., :24] += self.up(self.down(x))
        q, k, v = together.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(b, n, -1))


class Filtered(Attention):
    """Keys and values are filtered and normalised, each head as an image of its own (MViT)."""

    def __init__(self):
        super().__init__()
        self.filter, self.norm = nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        k, v = (self.filter(t.flatten(0, 1).transpose(1, 2)).transpose(1, 2) for t in (k, v))
        k, v = (self.norm(t).view(b, self.heads, n, -1) for t in (k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(b, n, -1))


class Summed(Attention):
    """In Einstein's notation, with keys and queries that are taken together by a fixed matrix (Performer)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("drawn", torch.rand(6, 7))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1) for f in (self.query, self.key, self.value))
        q, k = (torch.einsum("bnhd,dm->bhnm", t, self.drawn).relu() + 0.01 for t in (q, k))
        x = torch.einsum("bhnm,bhmd->bhnd", q, torch.einsum("bhnm,bnhd->bhmd", k, v))
        return self.out(torch.einsum("bhnd->bnhd", x).reshape(b, n, -1))


class Slanted(Attention):
    """Products of matrices are added to a bias in one call (BLOOM), and queries are turned as complex numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("far", -(torch.arange(5)[:, None] - torch.arange(5)).abs() / 4)

    def turned(self, x):
        turns = torch.polar(torch.ones(5, 3), torch.arange(5)[:, None] * torch.tensor([1.0, 0.3, 0.1]))
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * turns).flatten(-2)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k = (self.turned(t).flatten(0, 1) for t in (q, k))
        x = torch.baddbmm(self.far, q, k.transpose(1, 2), alpha=0.4).view(b, -1, n, n).softmax(-1) @ v.cumsum(2)
        return self.out(x.transpose(1, 2).reshape(b, n, -1))


class WithoutKeyBias(Turned):
    """The biases of keys are made of those of values (Swin V2)."""

    def forward(self, x):
        b, n, _ = x.shape
        bias = torch.cat((self.first, torch.zeros_like(self.last), self.last))
        q, k, v = F.linear(x, self.query.weight, bias).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v * torch.ones_like(v))
        return self.out(x.transpose(1, 2).reshape(b, n, -1))


class Response(nn.Module):
    """Each neuron is divided by the mean length of all."""

    def __init__(self):
        super().__init__()
        self.into, self.gain, self.out = nn.Linear(24, 40), nn.Parameter(torch.rand(40)), nn.Linear(40, 24)

    def forward(self, x):
        x = F.gelu(self.into(x))
        length = x.norm(dim=1, keepdim=True)
        return self.out(x + self.gain * x * (length / (length.mean(-1, keepdim=True) + 1e-6)))


class Spatial(nn.Module):
    """Half of the neurons are normalised together and mixed over places, and gate the other half."""

    def __init__(self):
        super().__init__()
        self.into, self.norm, self.places, self.out = (
            nn.Linear(24, 80),
            nn.LayerNorm(40),
            nn.Linear(5, 5),
            nn.Linear(40, 24),
        )

    def forward(self, x):
        plain, gate = F.gelu(self.into(x)).chunk(2, -1)
        return self.out(plain * self.places(self.norm(gate).transpose(1, 2)).transpose(1, 2))


class ViT(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        self.embed, self.token = nn.Conv2d(3, 24, 4, 4), nn.Parameter(torch.rand(1, 1, 24))
        self.place, self.mixers = nn.Parameter(torch.rand(1, 5, 24)), nn.ModuleList([attention(), attention()])
        self.norms = nn.ModuleList([nn.LayerNorm(24) for _ in range(4)])
        self.wide, self.narrow = (nn.ModuleList([nn.Linear(*s) for _ in range(2)]) for s in ((24, 40), (40, 24)))
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        for k, mixer in enumerate(self.mixers):
            x = x + mixer(self.norms[2 * k](x))
            x = x + self.narrow[k](F.gelu(self.wide[k](self.norms[2 * k + 1](x))))
        return self.fc(x[:, 0])


class Hybrid(nn.Module):
    """Convolutions with a residual stream of their own, then a transformer."""

    def __init__(self):
        super().__init__()
        self.embed, self.widen, self.narrow, self.down = (
            conv(3, 8),
            conv(8, 20, 1),
            conv(20, 8),
            conv(8, 24, 4, stride=4),
        )
        self.mixer, self.norm, self.fc = Attention(), nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.embed(x)
        x = self.down(x + self.narrow(self.widen(x))).flatten(2).transpose(1, 2)
        return self.fc(self.norm(x + self.mixer(x))[:, 0])


CNNS = {
    Listed: {"first.0", "parts.0.0", "parts.1.0", "last.0"},
    Upwards: {"down", "up", "skip", "last"},
    Unfolded: {"a", "skip", "last"},
    Sounds: {"a", "b"},
    Clips: {"a", "up", "b"},
    Elsewhere: {"a.0", "last"},
    Written: {"a", "b", "c", "last"},
    Constant: {"a", "b", "c", "last"},
    Aside: {"a", "b", "last"},
    TwoWays: {"a", "b", "c", "last"},
    Made: {"a", "b", "last"},
    InGroups: {"a.0", "b.0", "d.0"},
    Noisy: {"a.0", "b.0"},
    Called: {"a", "b"},
    Gates: {"a.0", "b.0", "c.0"},
    Scaled: {"a.0", "c.0"},
    Computed: {"a", "d"},
}
NETWORKS = [
    *CNNS,
    ViT,
    *(functools.partial(ViT, kind) for kind in (Fixed, Biased, Resized, Grouped, Gated, Turned)),
    *(functools.partial(ViT, kind) for kind in (Summed, Slanted, WithoutKeyBias, Placed, Filtered, Adapted)),
    Hybrid,
]


def made(build):
    """A network as after some training: normalisations that shift, statistics that are no longer those of new ones."""
    torch.manual_seed(0)
    model = build()
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.LayerNorm)):
        for name, low in (("weight", 0.5), ("bias", -0.4), ("running_mean", -0.3), ("running_var", 0.5)):
            if getattr(norm, name, None) is not None:
                getattr(norm, name).data.uniform_(low, low + 0.7)
    stem = "stem.0" if isinstance(model, Cnn) else "embed.0" if isinstance(model, Hybrid) else "embed"
    model.spec = ModelSpec(type(model).__name__, stem, "fc", "", image=(3, 8, 8), followed=isinstance(model, Hybrid))
    return model


def pruned(model, share=0.5):
    """Masks that keep some units of each group, and the units."""
    groups, draw = unit_groups(model), torch.Generator().manual_seed(1)
    kept = {g.name: torch.rand(g.units, generator=draw) < share for g in groups}
    for flags in kept.values():
        flags[0], flags[-1] = True, False
    return groups, kept, masks_of_units(groups, kept, dict(model.named_parameters()))


def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", CNNS)
def test_the_channels_of_a_cnn_are_found_by_what_it_does(kind):
    model = made(kind)
    assert features_of(model) is not None, "its modules tell enough"
    assert {g.name for g in unit_groups(model)} == CNNS[kind]


def test_why_layers_stay_is_known():
    why = reasons_of_layers(made(Elsewhere))
    assert why["c"] == "other code computes with the layer's weights or bias, too"
    assert "a.0" not in why


def test_operations_that_are_looked_up_in_tables_are_known():
    assert not features_of(made(Scaled)).unknown and not features_of(made(Gates)).unknown


def test_a_normalisation_belongs_to_the_channel_that_it_normalises():
    found = {
        g.name: {(s.layer, tuple(s.index.flatten().tolist())) for s in g.slices} for g in unit_groups(made(Upwards))
    }
    assert ("norm", tuple(range(24, 34))) in found["skip"] and not any(layer == "norm" for layer, _ in found["down"])
    found = {g.name: {s.layer: s.index.tolist() for s in g.slices} for g in unit_groups(made(Unfolded))}
    assert found["a"]["norm"] == [[k, k + 6, k + 12, k + 18] for k in range(6)]
    assert found["skip"]["norm"] == [[24 + k] for k in range(10)]


def test_heads_and_neurons_are_found_by_what_is_computed():
    groups = {g.name: g for g in unit_groups(made(ViT))}
    assert [(g.kind, g.units) for g in groups.values()] == [("head", 4), ("head", 4), ("neuron", 40), ("neuron", 40)]
    head = groups["mixers.0.query"]
    assert {s.layer for s in head.slices} == {f"mixers.0.{n}" for n in ("query", "key", "value", "out")}
    assert head.slices[-1].axis == 1 and head.slices[0].index[1].tolist() == list(range(6, 12))


@pytest.mark.parametrize("kind", [Summed, Slanted, WithoutKeyBias, Placed, Filtered])
def test_heads_are_found_through_steps_that_others_write(kind):
    model = made(functools.partial(ViT, kind))
    assert not features_of(model).unknown
    assert [g.units for g in unit_groups(model) if g.kind == "head"] == [4, 4]


@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_without_pruned_units_it_computes_the_same_and_stays_the_users_module(build, training):
    model = made(build).train(training)
    _, _, masks = pruned(model)
    small = shrink(model, masks, spread=0).network
    whole = masked(model, masks)
    assert type(small) is type(model) and small.training == training
    left = sum(p.numel() if build is InGroups else int(p.count_nonzero()) for p in whole.parameters())
    assert sum(p.numel() for p in small.parameters()) <= left - (build is InGroups), "groups stay whole"
    torch.manual_seed(3)
    wanted = whole(images())
    if build is Noisy and training:
        return  # how many numbers dropout draws depends on how many there are
    torch.manual_seed(3)
    torch.testing.assert_close(small(images()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CNNS)
@torch.no_grad()
def test_nothing_moves_when_a_pruned_unit_is_disturbed(kind):
    """The entries of a normalisation too, and none but those are zero."""
    model = made(kind).eval()
    groups, kept, masks = pruned(model)
    whole = masked(model, masks)
    before = whole(images())
    readers = {n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)}
    assert before.isfinite().all() and readers
    small = shrink(whole, masks, spread=0)
    for name, axes in small.cuts.items():
        layer, _, param = name.rpartition(".")
        transposed = isinstance(model.get_submodule(layer), nn.ConvTranspose2d | nn.ConvTranspose3d)
        for axis, index in axes.items():
            gone = torch.ones(whole.state_dict()[name].shape[axis], dtype=torch.bool)
            gone[index] = False
            columns = param == "weight" and axis == (0 if transposed else 1)
            if columns or param in ("running_mean", "running_var"):
                whole.state_dict()[name].movedim(axis, 0)[gone] += 1.0
    torch.testing.assert_close(whole(images()), before, rtol=1e-4, atol=1e-5)
    assert {g.name for g in groups} == kept.keys()


def test_a_head_that_the_forward_pass_does_not_let_go_is_only_not_computed():
    model = made(lambda: ViT(Fixed))
    _, kept, masks = pruned(model)
    small = shrink(model, masks, spread=0).network
    left = int(kept["mixers.0.query"].sum())
    assert small.mixers[0].heads == 4 and small.mixers[0].out.weight.shape == (24, 6 * left)
    assert made(ViT).mixers[0].heads == 4 and small.wide[0].weight.shape[0] == int(kept["wide.0"].sum())
    _, kept, masks = pruned(free := made(ViT))
    assert shrink(free, masks, spread=0).network.mixers[0].heads == int(kept["mixers.0.query"].sum())


@pytest.mark.parametrize("attention", [Biased, Resized])
def test_a_head_takes_its_column_of_a_table_of_biases_with_it(attention):
    model = made(lambda: ViT(attention))
    groups, kept, masks = pruned(model)
    assert [(g.kind, g.units) for g in groups][:2] == [("head", 4)] * 2
    small = shrink(model, masks, spread=0).network
    assert small.mixers[0].table.shape == (9, int(kept["mixers.0.query"].sum()))


def test_a_group_of_heads_that_share_keys_is_one_unit_that_is_not_computed():
    model = made(lambda: ViT(Grouped))
    groups, _, masks = pruned(model)
    head = groups[0]
    assert (head.kind, head.units) == ("head", 2)
    assert [(s.layer, s.axis, s.index.shape[1]) for s in head.slices] == [
        ("mixers.0.query", 0, 24),
        ("mixers.0.out", 1, 12),
    ]
    small = shrink(model, masks, spread=0).network
    assert small.mixers[0].query.weight.shape == (24, 24) and small.mixers[0].out.weight.shape == (24, 12)


@pytest.mark.parametrize("kind", [Response, Spatial])
@torch.no_grad()
def test_neurons_whose_places_stay_are_not_computed(kind):
    model = made(lambda: ViT(kind)).eval()
    groups, kept, masks = pruned(model)
    group = groups[0]
    assert [(s.name, s.index.flatten().tolist(), s.ranked) for s in group.slices] == [
        (f"mixers.0.{name}", list(range(40)), name.endswith("weight"))
        for name in ("into.weight", "into.bias", "out.weight")
    ]
    network, left = shrink(model, masks, spread=0).network, int(kept[group.name].sum())
    small, into = network.mixers[0], model.mixers[0].into
    assert small.into.out_features == into.out_features - 40 + left and small.out.in_features == left
    for found in (network, shrink(model, masks).network):
        torch.testing.assert_close(found(images()), masked(model, masks)(images()), rtol=1e-4, atol=1e-5)


class Pooled(Cnn):
    """The classifier has a layer whose numbers are normalised together."""

    def build(self):
        self.a, self.fc = conv(8, 12), nn.Sequential(nn.Linear(12, 30), nn.LayerNorm(30), nn.SiLU(), nn.Linear(30, 5))

    def middle(self, x):
        return self.a(x)


@torch.no_grad()
def test_rows_of_a_linear_layer_before_a_normalisation_are_not_computed():
    model = made(Pooled).eval()
    model.spec = ModelSpec("Pooled", "stem.0", "fc.3", "", image=(3, 8, 8), followed=True)
    groups, kept, masks = pruned(model)
    assert [g.name for g in groups] == ["a.0", "fc.0"]
    small = shrink(model, masks, spread=0).network
    assert small.fc[0].out_features == int(kept["fc.0"].sum())
    torch.testing.assert_close(small(images()), masked(model, masks)(images()), rtol=1e-4, atol=1e-5)


def test_convolutions_in_front_of_a_transformer_have_neurons():
    groups = {g.name: g for g in unit_groups(made(Hybrid))}
    assert {n: (g.kind, g.units) for n, g in groups.items()} == {"mixer.query": ("head", 4), "widen.0": ("neuron", 20)}
    assert [(s.layer, s.axis) for s in groups["widen.0"].slices] == [("widen.0", 0), ("narrow.0", 1)]


def test_what_is_divided_into_parts_is_divided_into_smaller_ones():
    model = made(lambda: ViT(Gated))
    groups, kept, masks = pruned(model)
    assert [(g.name, g.units) for g in groups[:2]] == [("mixers.0.into", 20), ("mixers.0.into#2", 12)]
    assert groups[0].root.index[0].tolist() == [0, 32] and groups[1].root.index[0].tolist() == [20, 52]
    small = shrink(model, masks, spread=0).network.mixers[0]
    plain, filtered = (int(kept[g.name].sum()) for g in groups[:2])
    assert small.sizes == (plain + filtered, plain, filtered) and small.into.out_features == 2 * (plain + filtered)
    assert not any(isinstance(m, INSERTED) for m in small.modules()) and model.mixers[0].sizes == (32, 20, 12)


def test_heads_that_are_turned_take_their_biases_with_them():
    model = made(lambda: ViT(Turned))
    groups, kept, masks = pruned(model)
    assert [(g.kind, g.units) for g in groups][:2] == [("head", 4)] * 2
    small, left = shrink(model, masks, spread=0).network.mixers[0], int(kept["mixers.0.query"].sum())
    assert small.query.weight.shape == (18 * left, 24) and small.first.shape == small.none.shape == (6 * left,)
    assert small.heads == left and small.periods.shape == (3,)


def test_what_is_cut_keeps_the_memory_layout_in_which_it_trains_faster():
    model = made(Listed).to(memory_format=torch.channels_last)
    _, _, masks = pruned(model)
    small = shrink(model, masks, spread=0).network
    weights = [m.weight for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


class Sorted(Cnn):
    """An operation that nothing is known of."""

    def build(self):
        self.a, self.b, self.c = conv(8, 16), conv(16, 16), conv(16, 12)

    def middle(self, x):
        y = self.a(x)
        return self.c(self.b(y.sort(dim=1).values) + y.cumsum(1))


@torch.no_grad()
def test_what_an_unknown_operation_reads_stays_whole():
    model = made(Sorted).eval()
    following = features_of(model)
    assert "sort" in following.unknown
    _, kept, masks = pruned(model)
    small = shrink(model, masks, spread=0).network
    torch.testing.assert_close(small(images()), masked(model, masks)(images()), rtol=1e-4, atol=1e-5)
    assert small.c[0].weight.shape[1] == int(kept["b.0"].sum()) or small.c[0].weight.shape[1] == 16


class Deciding(Cnn):
    def build(self):
        self.a = conv(8, 12)

    def middle(self, x):
        return self.a(x if x.sum() > 0 else -x)


def test_a_network_that_decides_by_its_images_is_refused_in_a_line():
    with pytest.raises(
        UsageError, match="the channels of Deciding cannot be followed: its forward pass cannot be recorded"
    ):
        unit_groups(made(Deciding))


def test_no_random_number_is_drawn_and_nothing_is_left_on_the_network():
    model = made(Noisy)
    before, attributes = torch.get_rng_state(), set(vars(model))
    state = copy.deepcopy(model.state_dict())
    unit_groups(model)
    assert torch.equal(torch.get_rng_state(), before) and set(vars(model)) == attributes
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items()) and model.training
