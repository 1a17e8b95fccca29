"""Networks as users write them, as a file of a user: for `--arch <this file>:NAME`."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Plain(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = conv(3, 8), conv(8, 12), conv(12, 12), nn.Linear(12, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.stem(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def plain(num_classes: int) -> nn.Module:
    return Plain(num_classes)


class Counting(Plain):
    """Its forward pass holds the number of channels of one stream: what is left of that has to be put in its place."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.mix, self.width = conv(12, 12), 12

    def features(self, x: Tensor) -> Tensor:
        y = self.two(self.one(self.stem(x)))
        y = y + self.mix(y).flatten(2).reshape(len(y), self.width, *y.shape[2:])
        return y.mean((2, 3))


def counting(num_classes: int) -> nn.Module:
    return Counting(num_classes)


class Shifted(nn.Sequential):
    """A Sequential with a forward pass, a parameter and a buffer of its own."""

    def __init__(self, classes: int) -> None:
        super().__init__(conv(3, 8), conv(8, 12), conv(12, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.append(nn.Linear(12, classes))
        self.gain = nn.Parameter(torch.full((1,), 3.0))
        self.register_buffer("shift", torch.full((1,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.shift) * self.gain


def shifted(num_classes: int) -> nn.Module:
    return Shifted(num_classes)


def listed(num_classes: int) -> nn.Module:
    """A Sequential as it comes."""
    return nn.Sequential(
        conv(3, 8), conv(8, 12), conv(12, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)
    )


class NormalizesFeatures(Plain):
    """`normalize` is a layer of features, `spec` and `classes` are the user's own."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.normalize, self.spec, self.classes = nn.LayerNorm(12), {"gain": 2.0}, classes

    def forward(self, x: Tensor) -> Tensor:
        return self.spec["gain"] * self.head(self.normalize(self.features(x)))[:, : self.classes]


def normalizes_features(num_classes: int) -> nn.Module:
    return NormalizesFeatures(num_classes)


class NormalizesImages(Plain):
    """`normalize` is called on the images: the place for the data set's mean and deviation."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.normalize = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.normalize(x))


def normalizes_images(num_classes: int) -> nn.Module:
    return NormalizesImages(num_classes)


class ScalesImages(NormalizesImages):
    """`normalize` is called on the images, and learned."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.normalize = nn.BatchNorm2d(3)


def scales_images(num_classes: int) -> nn.Module:
    return ScalesImages(num_classes)


class Idle(Plain):
    """A layer has the name that the program gives to weights that wait."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.idle = conv(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.idle(self.two(self.one(self.stem(x)))).mean((2, 3)))


def idle(num_classes: int) -> nn.Module:
    return Idle(num_classes)


class Remembers(Plain):
    """Counts its calls, keeps an activation by a hook of its own, and has an attribute of each common sort."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.calls, self.seen, self.names = 0, {}, ["a", "b"]
        self.two.register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.seen["two"] = output

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last_features = self.features(x)
        return self.head(self.last_features)


def remembers(num_classes: int) -> nn.Module:
    return Remembers(num_classes)


class Lazy(Plain):
    """Its head is made when it first sees features."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.head = nn.LazyLinear(classes)


def lazy(num_classes: int) -> nn.Module:
    return Lazy(num_classes)


class Frozen(Plain):
    """Frozen are the stem, and a convolution that reads what is pruned; the stem's statistics rest by its own `train`."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.late, self.last = conv(12, 12), conv(12, 12)
        self.stem.requires_grad_(False)
        self.late.requires_grad_(False)

    def features(self, x: Tensor) -> Tensor:
        return self.last(self.late(self.two(self.one(self.stem(x))))).mean((2, 3))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.stem.eval()
        self.one[1].eval()
        return self


def frozen(num_classes: int) -> nn.Module:
    return Frozen(num_classes)


def all_frozen(num_classes: int) -> nn.Module:
    return Frozen(num_classes).requires_grad_(False)


def frozen_backbone(num_classes: int) -> nn.Module:
    network = Plain(num_classes).requires_grad_(False)
    network.head.requires_grad_(True)
    return network


class Deciding(Plain):
    """Looks at its images to choose a way, which no graph can write down."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.mean()) < 2 else -x)


def deciding(num_classes: int) -> nn.Module:
    return Deciding(num_classes)


class Helped(Plain):
    """Gives a second classifier's logits too while it trains."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.helper = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.features(x)
        return (self.head(x), self.helper(x)) if self.training else self.head(x)


def helped(num_classes: int) -> nn.Module:
    return Helped(num_classes)


class Attention(nn.Module):
    """By the width of its input over the number of heads."""

    def __init__(self, width: int, heads: int = 3) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        x = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = Mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, classes)
        self.blocks = nn.Sequential(Block(width), Block(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def vit(num_classes: int) -> nn.Module:
    return Vit(num_classes)


def kept_vit(num_classes: int) -> nn.Module:
    """The size of a head is an attribute."""

    class Kept(Attention):
        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, _ = x.shape
            qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, 8).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(batch, tokens, -1))

    network = Vit(num_classes)
    for block in network.blocks:
        block.attn = Kept(24)
    return network


class DecidingVit(Vit):
    """Looks at its images to choose a way, so that its features cannot be followed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.mean()) < 2 else -x)


def vit_that_decides(num_classes: int) -> nn.Module:
    return DecidingVit(num_classes)


class Looped(Vit):
    """One block under three names."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.blocks = nn.Sequential(*[self.blocks[0]] * 3)


def looped(num_classes: int) -> nn.Module:
    return Looped(num_classes)


class Pyramid(Plain):
    """Pools a map in squares of several sizes, side by side."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.head = nn.Linear(12 * 5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.stem(x)))
        return self.head(torch.cat([F.adaptive_avg_pool2d(x, k).flatten(1) for k in (1, 2)], 1))


def pyramid(num_classes: int) -> nn.Module:
    return Pyramid(num_classes)


class Placing(Plain):
    """A layer has the name of one that the program inserts."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.place_1, self.select_1 = conv(12, 12), conv(12, 12)

    def features(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.stem(x)))
        x = x + self.place_1(x)
        return (x + self.select_1(x)).mean((2, 3))


def placing(num_classes: int) -> nn.Module:
    return Placing(num_classes)


class Output(dict):
    """Logits beside other things, as networks of some libraries give them."""

    logits = property(lambda self: self["logits"])


class Described(Plain):
    def forward(self, x: Tensor) -> Output:
        x = self.features(x)
        return Output(hidden=x, logits=self.head(x))


def described(num_classes: int) -> nn.Module:
    return Described(num_classes)


def vit_of_torch(num_classes: int) -> nn.Module:
    """Attention by torch's own layer."""
    return _of_torch(Vit(num_classes))


def vit_of_torch_that_decides(num_classes: int) -> nn.Module:
    return _of_torch(DecidingVit(num_classes))


def _of_torch(network: nn.Module) -> nn.Module:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.MultiheadAttention(24, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(x, x, x, need_weights=False)[0]

    for block in network.blocks:
        block.attn = Own()
    return network


def vit_that_shares(num_classes: int) -> nn.Module:
    """Two blocks with the weights of one MLP."""
    network = Vit(num_classes)
    one, other = (block.mlp for block in network.blocks)
    other.fc1.weight, other.fc2.weight = one.fc1.weight, one.fc2.weight
    return network


class FreezesItself(Plain):
    """Freezes a layer when it is told to train."""

    def train(self, mode: bool = True) -> nn.Module:
        self.one.requires_grad_(False)
        return super().train(mode)


def freezes_itself(num_classes: int) -> nn.Module:
    return FreezesItself(num_classes)


class NamedGraph(Plain):
    """A layer has a name that graphs of torch's want for themselves."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.graph = conv(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.graph(self.two(self.one(self.stem(x)))).mean((2, 3)))


def named_graph(num_classes: int) -> nn.Module:
    return NamedGraph(num_classes)


class WideHead(nn.Module):
    """A CNN most of whose weights are in the linear layers of its classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.one = conv(3, 8), conv(8, 12)
        self.wide = nn.Sequential(nn.Linear(12 * 4, 64), nn.ReLU(), nn.Linear(64, 40), nn.ReLU())
        self.head = nn.Linear(40, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.one(self.stem(x)), 2)
        return self.head(self.wide(x.flatten(1)))


def wide_head(num_classes: int) -> nn.Module:
    return WideHead(num_classes)


class FilteredMlp(Mlp):
    """Layers as an MLP names them, with a depth-wise convolution between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.filter = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        side = int(tokens**0.5)
        x = self.fc1(x).transpose(1, 2).reshape(batch, -1, side, side)
        return self.fc2(F.gelu(self.filter(x).flatten(2).transpose(1, 2)))


class SeparateAttention(nn.Module):
    """One layer for queries, another for keys and values."""

    def __init__(self, width: int, heads: int = 3) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q(x).reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).reshape(batch, tokens, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


def filtered_mlps(num_classes: int) -> nn.Module:
    """A transformer whose layers have the names that tell of attention and MLPs, and do something else besides."""
    network = Vit(num_classes)
    for block in network.blocks:
        block.mlp, block.attn = FilteredMlp(24, 48), SeparateAttention(24)
    return network


class Viewing(Plain):
    """Takes a view of its feature maps, as tutorials do: that works in one memory layout only."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.head = nn.Linear(12 * 4, num_classes)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.one(self.stem(x)), 2)
        return self.head(x.view(x.size(0), -1))


def viewing(num_classes: int) -> nn.Module:
    return Viewing(num_classes)


class Video(Plain):
    """A convolution over three axes among others."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.first = nn.Conv3d(1, 3, (3, 3, 3), padding=(0, 1, 1))

    def forward(self, x):
        return super().forward(self.first(x.unsqueeze(1)).squeeze(2))


def video(num_classes: int) -> nn.Module:
    return Video(num_classes)


class SecondHead(Plain):
    """Gives the logits of a second head while it trains."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.aux = nn.Linear(12, num_classes)

    def forward(self, x):
        x = self.one(self.stem(x))
        logits = self.head(self.two(x).mean((2, 3)))
        return (logits, self.aux(x.mean((2, 3)))) if self.training else logits


def second_head(num_classes: int) -> nn.Module:
    return SecondHead(num_classes)


class Noisy(Plain):
    """Calls a layer in training mode alone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.gate = nn.Conv2d(12, 12, 1)

    def forward(self, x):
        x = self.two(self.one(self.stem(x)))
        return self.head((x * self.gate(x).tanh() if self.training else x).mean((2, 3)))


def noisy(num_classes: int) -> nn.Module:
    return Noisy(num_classes)


class Watched(Plain):
    """Keeps what it computes, by a hook that knows the network from the variables around it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.seen: dict = {}

        def note(layer, inputs, output):
            self.seen["one"] = output

        self.one.register_forward_hook(note)


def watched(num_classes: int) -> nn.Module:
    return Watched(num_classes)


class Generating(Plain):
    """The weights of a convolution are what other layers compute."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.code, self.maker = nn.Parameter(torch.randn(6)), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 12 * 12))

    def forward(self, x):
        x = F.conv2d(self.one(self.stem(x)), self.maker(self.code).view(12, 12, 1, 1))
        return self.head(x.mean((2, 3)))


def generating(num_classes: int) -> nn.Module:
    return Generating(num_classes)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation, as its authors wrote it."""

    def forward(self, x):
        rows = self.weight.view(self.weight.size(0), -1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
        return F.conv2d(x, rows.view_as(self.weight), self.bias, self.stride, self.padding)


def standardised(num_classes: int) -> nn.Module:
    network = Plain(num_classes)
    network.stem[0], network.one[0] = StandardisedConv(3, 8, 3, padding=1), StandardisedConv(8, 12, 3, padding=1)
    return network


def spectral(num_classes: int) -> nn.Module:
    network = Plain(num_classes)
    nn.utils.spectral_norm(network.one[0])
    return network


class Recurrent(Plain):
    """Reads channels as a sequence."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.order, self.head = nn.GRU(12, 6, batch_first=True), nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.one(self.stem(x)).flatten(2).transpose(1, 2)
        spread, mean = torch.std_mean(self.order(x)[0], 1)
        return self.head(spread + mean)


def recurrent(num_classes: int) -> nn.Module:
    return Recurrent(num_classes)


class Scaled(Plain):
    """Makes a constant while it runs."""

    def forward(self, x):
        return super().forward(x * torch.tensor(2.0))


def scaled(num_classes: int) -> nn.Module:
    return Scaled(num_classes)


class Strict(Plain):
    """Insists on its layout, and keeps what it sees in a table within a table, by a hook with an unset variable."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.seen: dict = {"inside": defaultdict(list)}

        def note(layer, inputs, output):
            self.seen["inside"]["one"].append(output)
            if layer is None:
                print(later)

        self.one.register_forward_hook(note)
        if num_classes < 0:
            later = 0

    def forward(self, x):
        assert x.is_contiguous()
        return super().forward(x)


def strict(num_classes: int) -> nn.Module:
    return Strict(num_classes)


class Upwards(Plain):
    """Has transposed convolutions, whose rows are what they read."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.up, self.wide, self.head = (
            nn.ConvTranspose2d(8, 6, 2),
            nn.ConvTranspose2d(6, 12, 2),
            nn.Linear(12, num_classes),
        )

    def forward(self, x):
        return self.head(self.wide(self.up(self.stem(x)).relu()).mean((2, 3)))


def upwards(num_classes: int) -> nn.Module:
    return Upwards(num_classes)


class Routed(nn.Module):
    """Sends each image to the experts that it chooses, in a loop over those that are chosen by any."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(192, 12), nn.Linear(12, 3), nn.Linear(12, num_classes)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        x = self.first(x.flatten(1))
        choice, found = self.gate(x).argmax(1), torch.zeros_like(x)
        for k in choice.unique().tolist():
            found[choice == k] = self.experts[k](x[choice == k])
        return self.head(found)


def routed(num_classes: int) -> nn.Module:
    return Routed(num_classes)


class Padded(nn.Module):
    """Torch's encoder with a mask of tokens that are there for nothing."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 24, 2, 2), nn.Linear(24, num_classes)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, batch_first=True), 1)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        masked = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=x.device)
        masked[:, -2:] = True
        tokens = self.encoder(tokens, src_key_padding_mask=masked)
        return self.head((tokens * ~masked[..., None]).mean(1))


def padded(num_classes: int) -> nn.Module:
    return Padded(num_classes)


class Overwriting(Plain):
    """Writes over what a layer needs for its gradient."""

    def forward(self, x):
        y = self.one(self.stem(x)).clone()
        y[:, :6] = self.two(y)[:, :6]
        return self.head(y.mean((2, 3)))


def overwriting(num_classes: int) -> nn.Module:
    return Overwriting(num_classes)
