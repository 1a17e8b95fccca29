"""Networks of other libraries and of users: built, normalised once, pruned, trained, cut and exported, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.commands import ROOT, run, tiny
from timm.layers import Mlp
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torchvision.models import VisionTransformer

import main_imp_fillback
from structured_tickets.base.errors import DataError, UsageError
from structured_tickets.export.deployed import load
from structured_tickets.networks import build_model, spec_of
from structured_tickets.networks.attention import with_separate_heads
from structured_tickets.networks.building import parse_arch
from structured_tickets.networks.first_pass import spec_of_layers
from structured_tickets.networks.kernels import set_fused_attention
from structured_tickets.networks.layers import Normalize, channels_side_by_side, normalised
from structured_tickets.programs import export
from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.shrinking.cuts import Shrunk
from structured_tickets.shrinking.inserted_layers import FEW, PIXELS, Constant, Place
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.shrinking.trial import check_units
from structured_tickets.unit_groups.channels import channel_groups
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.transformer import head_groups, neuron_groups
from structured_tickets.unit_groups.unit import kinds, masks_of_units

OWN = ROOT / "examples" / "my_model.py"
SISTERS = ROOT / "tests" / "helpers" / "small_sisters.py"

# The smallest of each family that ends in seconds, with the kinds of unit that are found in it.
NETWORKS = {
    "timm/vit_tiny_patch16_224": (32, ["head", "neuron"]),
    "timm/deit_tiny_distilled_patch16_224": (32, ["head", "neuron"]),
    "timm/eva02_tiny_patch14_224": (28, ["neuron"]),
    "timm/swin_tiny_patch4_window7_224": (56, ["neuron"]),
    "timm/resnet18": (32, ["channel"]),
    "timm/mobilenetv3_small_050": (32, ["channel"]),
    "torchvision/squeezenet1_1": (32, ["channel"]),
    "torchvision/regnet_y_400mf": (32, ["channel"]),
    "torchvision/efficientnet_b0": (32, ["channel"]),
    "torchvision/googlenet": (32, ["channel"]),
    "torchvision/mnasnet0_5": (32, ["channel"]),
    "torchvision/convnext_tiny": (32, ["neuron"]),
    f"{OWN}:net": (32, ["channel"]),
    f"{SISTERS}:swin": (56, ["neuron"]),
    f"{SISTERS}:convnext": (32, ["neuron"]),
}
BIG = ("timm/swin_tiny_patch4_window7_224", "torchvision/convnext_tiny", "timm/twins_svt_small", "timm/nest_tiny")


# Their gates, groups and concatenations are in MobileNetV3, Grouped and SqueezeNet too.
LONG = ("torchvision/efficientnet_b0", "torchvision/regnet_y_400mf", "torchvision/googlenet")


def big_are_slow(archs, others=()):
    """Parameters of a test: networks above 15 million weights, which have a small sister, need not run every time."""
    slow = (*BIG, *others)
    return [pytest.param(a, marks=[pytest.mark.slow] * (a in slow), id=a.rpartition("/")[2]) for a in archs]


@pytest.mark.parametrize("arch", big_are_slow(NETWORKS, LONG))
def test_units_are_known_silent_and_can_be_cut(arch):
    torch.manual_seed(0)
    size, expected = NETWORKS[arch]
    model = build_model(arch, 10, size)
    groups = unit_groups(model)
    assert kinds(groups) == expected
    check_units(model, groups, size)
    layers = {part.layer for g in groups for part in g.slices if part.ranked}
    weights = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) >= 0.3 * len(weights) and not layers & {spec_of(model).stem, spec_of(model).classifier}


@pytest.mark.parametrize("arch", big_are_slow(NETWORKS))
@torch.no_grad()
def test_images_are_normalised_once_and_the_stem_sees_them(arch):
    size = NETWORKS[arch][0]
    torch.manual_seed(0)
    model = build_model(arch, 10, size).eval()
    images = torch.rand(2, 3, size, size)
    plain = model(Normalize((0.5,) * 3, (0.25,) * 3)(images))
    model.normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(model(images), plain)


class Grouped(nn.Module):
    """Two grouped convolutions with a shuffle between them, and a squeeze with a product."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 12, 1, groups=2)
        self.norm = nn.BatchNorm2d(12)
        self.two = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.gate = nn.Conv2d(12, 12, 1)
        self.three = nn.Conv2d(24, 6, 1)
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        y = self.norm(self.one(self.conv1(self.normalize(x)))).relu()
        y = y.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
        z = y * self.gate(self.two(y).mean((2, 3), keepdim=True)).sigmoid()
        return self.fc(self.three(torch.cat([y, z], 1)).relu().mean((2, 3)))


@torch.no_grad()
def test_grouped_depthwise_shuffled_gated_and_concatenated_channels():
    torch.manual_seed(0)
    model = Grouped().eval()
    groups = {g.name: g for g in channel_groups(model)}
    slices = {name: {(p.name, p.axis) for p in g.slices} for name, g in groups.items()}
    assert {("one.weight", 0), ("norm.weight", 0), ("two.weight", 0)} <= slices["one"]
    assert "two" not in groups, "a depth-wise filter is of the channel that it filters"
    check_units(model, list(groups.values()), 8)
    images, parameters = torch.rand(2, 3, 8, 8), dict(model.named_parameters())
    before = model(images)
    for name, group in groups.items():
        kept = {name: torch.arange(group.units) != 1}
        masks = masks_of_units([group], kept, parameters)
        after = functional_call(model, {n: parameters[n] * m for n, m in masks.items()}, (images,))
        assert not torch.equal(after, before), name


class Counting(nn.Module):
    """The number of channels itself enters the result."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize: nn.Module = nn.Identity()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 8, 3)
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        y = self.conv2(self.conv1(self.normalize(x)))
        return self.fc(self.conv3(y / y.shape[1]).mean((2, 3)))


@torch.no_grad()
def test_channels_that_are_counted_stay_where_they_are_counted():
    torch.manual_seed(0)
    model = Counting().eval()
    groups = channel_groups(model)
    assert {g.name for g in groups} == {"conv2", "conv3"}
    check_units(model, groups, 16)
    masks = masks_of_units(groups, {g.name: torch.arange(8) < 2 for g in groups}, dict(model.named_parameters()))
    small = shrink(model, masks).network
    assert small.conv2.weight.shape[0] == 2 and small.conv3.weight.shape[:2] == (2, 8)


def test_a_network_whose_units_hang_together_in_an_unknown_way_is_refused(monkeypatch):
    """As if cutting a channel had moved the others."""
    model = Grouped()
    monkeypatch.setattr(
        "structured_tickets.shrinking.trial.shrink", lambda model, masks, **_: Shrunk(copy.deepcopy(model), {})
    )
    with pytest.raises(UsageError, match=r"without some of its units differs from the masked network by .* coupled"):
        check_units(model, channel_groups(model), 8)


class Deciding(Grouped):
    """Asks its input which way to go."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_a_network_that_decides_by_its_input_is_refused():
    with pytest.raises(UsageError, match="the channels of Deciding cannot be followed"):
        channel_groups(Deciding())


FILES = {
    "list": ("def net(num_classes):\n    return [1]\n", "gives a list, not a torch.nn.Module"),
    "raises": (
        "def net(num_classes):\n    raise ValueError('no weights')\n",
        "cannot be built: ValueError: no weights",
    ),
    "syntax": ("def net(:\n", "cannot be built: SyntaxError"),
    "other": ("def nett(num_classes):\n    return 1\n", "(did you mean "),
    "shape": (
        "from torch import nn\ndef net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))\n",
        "gives (2, 3) for two images, not logits (2, 10)",
    ),
    "size": (
        "from torch import nn\ndef net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(7, 10))\n",
        "cannot take images of 8 pixels",
    ),
    "twice": (
        """from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.normalize = nn.Identity()
        self.fc = nn.Linear(192, 10)
    def forward(self, x):
        return self.fc(self.normalize(self.normalize(x)).flatten(1))
def net(num_classes):
    return Net()
""",
        "calls its `normalize` 2 times",
    ),
    "deciding": (
        """from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 10)
    def forward(self, x):
        x = self.conv(self.stem(x))
        return self.fc((x if x.sum() > 0 else -x).mean((2, 3)))
def net(num_classes):
    return Net()
""",
        "the channels of Net cannot be followed: its forward pass cannot be recorded",
    ),
    "dense": (
        "from torch import nn\ndef net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n",
        "has no layers that can be pruned",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_with_a_users_file_is_said_in_a_line(name, tmp_path, capsys):
    text, message = FILES[name]
    (tmp_path / "mine.py").write_text(text)
    assert run(*tiny(tmp_path / "run", arch=f"{tmp_path / 'mine.py'}:net")) == 2
    error = capsys.readouterr().err
    assert "argument --arch: " in error and message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arch, message",
    [
        ("timm/vit_tiny_patch16_225", "did you mean timm/vit_tiny_patch16_224"),
        ("torchvision/resnet19", "did you mean torchvision/resnet1"),
        ("torchvision/deeplabv3_resnet50", "there is no torchvision/deeplabv3_resnet50"),
        ("res20", "did you mean res20s"),
        ("resnet18", "timm/resnet18 or torchvision/resnet18?"),
        ("net.py", "does not say which function of it makes the network: net.py:NAME"),
        ("nowhere.py:net", "no such file: nowhere.py"),
        ("timm/vit_tiny_patch16_224", "Try another --image_size"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(arch, message, tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", arch=arch)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "struct, more",
    [
        ("refill", {}),
        ("rsst", {"penalty": "decoupled"}),
        pytest.param("snip", {"regroup": True}, marks=pytest.mark.slow),
    ],
)
def test_the_worked_example_trains_prunes_resumes_and_exports(struct, more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = tiny(tmp_path / "run", arch="examples/my_model.py:net", struct=struct, **more)
    assert run(*words, "--pruning_times", 1) == 0
    monkeypatch.chdir(tmp_path)
    words = tiny(tmp_path / "run", arch=f"{OWN}:net", struct=struct, **more)
    assert run(*words) == 0, "the same file by its full name is the same network"
    assert "continuing" in capsys.readouterr().err
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "--arch" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "out"), "--quiet", "--arch", f"{OWN}:net"]
    assert export.main([str(tmp_path / "run"), *out]) == 0
    with pytest.raises(DataError, match="give that as `arch` to run its code"):
        load(tmp_path / "out")
    small, whole = load(tmp_path / "out", f"{OWN}:net"), build_model(f"{OWN}:net", 10, 8)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in whole.parameters())
    assert small(torch.rand(2, 3, 8, 8)).shape == (2, 10)


HEADS_AND_NEURONS = {"vit_structured": True, "vit_prune_target": "both"}


@pytest.mark.parametrize(
    "arch, size, more",
    [
        ("timm/test_vit", 16, HEADS_AND_NEURONS),
        pytest.param("torchvision/squeezenet1_1", 32, {}, marks=pytest.mark.slow),
        pytest.param("timm/vit_tiny_patch16_224", 16, HEADS_AND_NEURONS, marks=pytest.mark.slow),
        pytest.param("torchvision/mobilenet_v3_small", 32, {}, marks=pytest.mark.slow),
    ],
)
def test_a_librarys_network_goes_through_a_whole_run(arch, size, more, tmp_path, capsys):
    words = tiny(tmp_path, arch=arch, image_size=size, struct="refill", optimizer="adamw", lr=1e-3, **more)
    assert run(*words) == 0
    assert export.main([str(tmp_path), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    small = load(tmp_path / "out")
    assert small(torch.rand(2, 3, size, size)).shape == (2, 10)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in build_model(arch, 10, size).parameters())


def test_building_leaves_the_search_path_and_the_librarys_class_alone():
    import sys

    import timm

    before = list(sys.path)
    build_model(f"{OWN}:net", 10, 8)
    build_model("timm/resnet18", 10, 32)
    assert sys.path == before
    assert not hasattr(timm.create_model("resnet18"), "normalize")


@pytest.mark.parametrize("text", ["res20s", "timm/x", "torchvision/y"])
def test_parse_arch_keeps_names(text):
    assert parse_arch(text) == text


def test_a_copy_of_an_external_network_is_independent():
    model = build_model(f"{OWN}:net", 10, 8)
    other = copy.deepcopy(model)
    other.normalize = Normalize((0.1,) * 3, (1.0,) * 3)
    assert isinstance(model.normalize, nn.Identity)


def test_a_run_is_not_exported_as_another_network(tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", arch=f"{OWN}:net", struct="refill", pruning_times=1)) == 0
    assert export.main([str(tmp_path / "run"), "--quiet", "--arch", "res20s"]) == 2
    assert "argument --arch: res20s is not the network of this run" in capsys.readouterr().err


ODD = """
import torch
import torch.nn.functional as F
from torch import nn


def layers(*names):
    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.stem, self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
            self.n, self.m = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.up = nn.ConvTranspose2d(8, 8, 2, 2)
            self.h, self.k = nn.Conv2d(8, num_classes, 1), nn.Conv2d(8, num_classes, 1)
            self.fc = nn.Linear(8, num_classes)
            self.prepare()

        def prepare(self):
            pass

    return Net


class Shared(layers()):
    def forward(self, x):
        x = self.n(self.b(self.a(self.stem(x)))).relu()
        return self.fc(self.c(self.m(self.b(x)).relu()).mean((2, 3)))


class Tied(layers()):
    def prepare(self):
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.fc(self.b(self.a(self.stem(x)).relu()).mean((2, 3)))


class Normed(layers()):
    def prepare(self):
        nn.utils.weight_norm(self.b)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(self.stem(x)).relu())).mean((2, 3)))


class Unused(layers()):
    def forward(self, x):
        return self.fc(self.b(self.a(self.stem(x)).relu()).mean((2, 3)))


class Functional(layers()):
    def forward(self, x):
        x = F.conv2d(self.a(self.stem(x)), self.b.weight, self.b.bias, padding=1)
        return self.fc(self.c(x.relu()).mean((2, 3)))


class Keywords(layers()):
    def forward(self, x):
        x = torch.cat(tensors=(self.a(input=self.stem(x)),), dim=1)
        return self.fc(input=self.b(x).mean((2, 3)))


class TwoHeads(layers()):
    def forward(self, x):
        x = self.a(self.stem(x)).relu()
        return self.h(x).mean((2, 3)) + self.k(self.b(x)).mean((2, 3))


class Upwards(layers()):
    def forward(self, x):
        x = self.a(self.stem(x)).relu()
        return self.fc(self.b(torch.cat((x, self.up(F.max_pool2d(x, 2))), 1)[:, :8]).mean((2, 3)))


class Floats(layers()):
    def forward(self, x):
        x = self.b(self.a(self.stem(x)).relu().float())
        return self.fc(F.relu6(x * self.c(x).mean((2, 3), keepdim=True).sigmoid()).mean((2, 3)))
"""
REFUSED_OR_RIGHT = ("Keywords", "Normed")
RIGHT = ("Unused", "Functional", "TwoHeads", "Upwards", "Floats", "Shared", "Tied")


# Of those that are pruned one, with a gate and a clipped activation, goes through SynFlow at every change.
ODD_CASES = [
    pytest.param(n, s, marks=[pytest.mark.slow] * (s == "synflow" and n in RIGHT and n != "Floats"))
    for n in (*REFUSED_OR_RIGHT, *RIGHT)
    for s in ("refill", "synflow")
]


@pytest.mark.parametrize("name, struct", ODD_CASES)
def test_an_odd_network_is_pruned_rightly_or_refused_in_a_line(name, struct, tmp_path, capsys):
    (tmp_path / "odd.py").write_text(ODD)
    words = tiny(tmp_path / "run", arch=f"{tmp_path / 'odd.py'}:{name}", struct=struct, regroup=struct == "synflow")
    status = run(*words)
    error = capsys.readouterr().err
    assert "Traceback" not in error and not (name in RIGHT and status), error
    if status:
        assert status == 2 and "argument --arch: " in error
        return
    command = [str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--quiet"]
    assert export.main([*command, "--arch", f"{tmp_path / 'odd.py'}:{name}"]) == 0, "cut and masked network agree"


def test_layers_whose_outputs_are_the_logits_stay_whole(tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    model = build_model(f"{tmp_path / 'odd.py'}:TwoHeads", 10, 8)
    assert {g.name for g in unit_groups(model)} == {"a", "b"}


def test_macs_of_transposed_convolutions_and_of_layers_that_are_called_again():
    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + super().forward(x)

    model = Net(nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 2, 2, 2), nn.Conv2d(2, 1, 1))
    assert cost_of(model, {}, 8).macs == 2 * (64 * 4 * 3 * 9 + 64 * 4 * 2 * 4 + 256 * 2)


ATTENTION = [
    "timm/mobilevit_xxs",
    "timm/twins_svt_small",
    "timm/nest_tiny",
    "timm/vit_tiny_patch16_224",
    f"{SISTERS}:twins",
    f"{SISTERS}:nest",
]


class Products(TorchFunctionMode):
    macs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            self.macs += query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def counted_macs(model, size=64):
    """Of convolutions, linear layers and attention, as they are called, and of what puts channels in their places."""
    model = channels_side_by_side(copy.deepcopy(model))
    set_fused_attention(model.eval(), True)
    macs = []

    def count(layer, args, output):
        macs.append(output.numel() * layer.weight[0].numel())

    def placed(place, args, output):
        side_by_side = place.axis == 1 and args[0].is_contiguous(memory_format=torch.channels_last)
        if place.around is None and side_by_side and args[0].shape[1] <= FEW and args[0][0, 0].numel() >= PIXELS:
            macs.append(output.numel() * args[0].shape[1])

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    handles += [m.register_forward_hook(placed) for m in model.modules() if isinstance(m, Place)]
    with Products() as products:
        model(torch.rand(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return sum(macs) + products.macs


@pytest.mark.parametrize("arch", big_are_slow(ATTENTION))
def test_macs_count_windows_and_patches_that_lie_along_the_batch_axis(arch):
    torch.manual_seed(0)
    model = build_model(arch, 10, 64)
    groups, parameters = unit_groups(model), dict(model.named_parameters())
    assert cost_of(model, {}, 64).macs == counted_macs(model)
    heads = [g for g in groups if g.kind == "head" and g.units > 1]
    masks = masks_of_units(groups, {g.name: torch.arange(g.units) > 0 for g in heads}, parameters)
    if "nest" not in arch and "twins" not in arch:  # their heads cannot be cut, which is found out before a run
        assert heads and cost_of(model, masks, 64).macs == counted_macs(shrink(model, masks).network)


class OnLastAxis(nn.Module):
    """An MLP on [batch, height, width, features], as in torchvision's Swin."""

    def __init__(self):
        super().__init__()
        self.stem, self.mlp, self.head = nn.Conv2d(3, 4, 2, 2), Mlp(4, 8), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.mlp(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("criterion", ["l1", "l2", "saliency"])
def test_features_of_a_linear_layer_are_on_the_last_axis_of_images_too(criterion):
    model = OnLastAxis()
    groups = neuron_groups(model)
    with torch.no_grad():
        model.mlp.fc1.weight[5] *= 50
    state, images = model.state_dict(), torch.rand(4, 3, 32, 32)
    evidence = collect_evidence(model, groups, state, {}, criterion, [(images, torch.arange(4))])
    scores = CRITERIA[criterion].score(evidence, groups[0].root)
    assert scores.shape == (8,) and int(scores.argmax()) == 5


@pytest.mark.parametrize(
    "arch, branch",
    [
        ("torchvision", "encoder_layer_0"),
        (f"{SISTERS}:twins", "blocks.0.0"),
        pytest.param("timm/twins_svt_small", "blocks.0.0", marks=pytest.mark.slow),
    ],
    ids=["torchvision", "small_sisters.py:twins", "twins_svt_small"],
)
@torch.no_grad()
def test_a_branch_without_heads_is_cut_whatever_it_is_called_with(arch, branch):
    """torchvision's blocks pass on three tensors and take a pair; Twins' pass on the image's size."""
    torch.manual_seed(0)
    if arch == "torchvision":
        model = with_separate_heads(VisionTransformer(32, 16, 2, 2, 16, 16, num_classes=10))
        nn.init.normal_(model.heads.head.weight)
        model = normalised(model)
    else:
        model = build_model(arch, 10, 64)
    model.eval()
    groups, parameters = head_groups(model), dict(model.named_parameters())
    gone = {g.name: torch.zeros(g.units, dtype=torch.bool) for g in groups if branch in g.name}
    size = 32 if arch == "torchvision" else 64
    masks, images = masks_of_units(groups, gone, parameters), torch.rand(2, 3, size, size)
    wanted = functional_call(model, {n: parameters[n] * m for n, m in masks.items()}, (images,))
    small = shrink(model, masks).network
    assert len(gone) == 1 and any(isinstance(m, Constant) for m in small.modules())
    assert torch.allclose(small(images), wanted, atol=1e-5)


def conv(inputs, outputs, **more):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **more), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Users(nn.Module):
    """Stem, something, head: what is between differs."""

    def __init__(self, **layers):
        super().__init__()
        self.stem, self.a = conv(3, 16), conv(16, 32)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.b, self.fc = conv(32, 24), nn.Linear(24, 10)

    def forward(self, x):
        return self.fc(self.b(self.between(self.stem(x))).mean((2, 3)))


class Subtracts(Users):
    def __init__(self):
        super().__init__(other=conv(16, 32))

    def between(self, x):
        return self.a(x) - self.other(x)


class WeighsChannels(Users):
    """Squeeze and excitation by linear layers, and by an index that is not known."""

    def __init__(self):
        super().__init__(fc1=nn.Linear(32, 8), fc2=nn.Linear(8, 32))

    def between(self, x):
        x = self.a(x)
        return x * self.fc2(self.fc1(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


class NormalisesGroups(Users):
    def __init__(self):
        super().__init__(norm=nn.GroupNorm(4, 32))

    def between(self, x):
        return self.norm(self.a(x)).relu()


class NoScale(Users):
    def __init__(self):
        super().__init__(norm=nn.BatchNorm2d(32, affine=False))

    def between(self, x):
        return self.norm(self.a(x)).relu()


class ManyGroups(Users):
    def __init__(self):
        super().__init__(grouped=nn.Conv2d(32, 32, 3, padding=1, groups=4))

    def between(self, x):
        return self.grouped(self.a(x)).relu()


class Enlarges(Users):
    def __init__(self):
        super().__init__(norm=nn.PReLU(32), up=nn.Upsample(scale_factor=2))

    def between(self, x):
        return self.up(nn.functional.softplus(self.norm(self.a(x))))


class Digits(nn.Module):
    """PyTorch's own first example: two convolutions, and a classifier that looks like an MLP of a ViT."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, 1), nn.Conv2d(16, 32, 3, 1)
        self.fc1, self.fc2 = nn.Linear(32 * 4, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv2(self.conv1(x).relu()).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


class Mixer(nn.Module):
    """An MLP at the very top."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = (
            nn.Conv2d(3, 16, 2, 2),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 10),
        )

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + self.fc2(self.fc1(x).relu())).mean(1))


@pytest.mark.parametrize(
    "net", [Subtracts, WeighsChannels, NormalisesGroups, NoScale, ManyGroups, Enlarges, Digits, Mixer]
)
@pytest.mark.parametrize("kept", [0.8, 0.3])
@torch.no_grad()
def test_what_is_counted_of_any_network_is_what_is_left_of_it(net, kept):
    torch.manual_seed(0)
    model = normalised(net()).eval()
    model.spec = spec_of_layers(model, "net", 10, [])
    groups = unit_groups(model)
    check_units(model, groups, 8)
    flags = {g.name: torch.rand(g.units) < kept for g in groups}
    masks = masks_of_units(groups, flags, dict(model.named_parameters()))
    small = shrink(model, masks).network
    for network, these in ((model, {}), (small, masks)):
        found = cost_of(model, these, 8)
        assert (found.parameters, found.macs) == (
            sum(p.numel() for p in network.parameters()),
            counted_macs(network, 8),
        )


def test_cnns_are_known_whatever_their_linear_layers_are_called():
    for net, kinds_found in ((Digits, ["channel"]), (WeighsChannels, ["channel"]), (Mixer, ["neuron"])):
        model = normalised(net())
        model.spec = spec_of_layers(model, "net", 10, [])
        assert kinds(unit_groups(model)) == kinds_found


def test_stem_and_classifier_are_the_first_and_last_that_are_called(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.head, self.mid, self.stem = nn.Linear(12, classes), nn.Conv2d(8, 10, 3), nn.Conv2d(3, 8, 3)\n"
        "        self.last = nn.Conv2d(10, 12, 3)\n"
        "    def forward(self, x):\n"
        "        return self.head(self.last(self.mid(self.stem(x)).relu()).relu().mean((2, 3)))\n"
        "def net(num_classes):\n"
        "    return Net(num_classes)\n"
    )
    model = build_model(f"{tmp_path / 'net.py'}:net", 10, 8)
    assert (spec_of(model).stem, spec_of(model).classifier) == ("stem", "head")
    assert [g.root.layer for g in unit_groups(model)] == ["mid", "last"]


@pytest.mark.parametrize("struct", ["refill", "snip", "grasp", "synflow"])
def test_a_convolution_that_the_loss_does_not_see_is_worth_nothing(struct, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.stem, self.a, self.aux = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1)\n"
        "        self.head = nn.Linear(16, classes)\n"
        "    def forward(self, x):\n"
        "        x = self.a(self.stem(x)).relu()\n"
        "        self.aux(x)\n"
        "        return self.head(x.mean((2, 3)))\n"
        "def net(num_classes):\n"
        "    return Net(num_classes)\n"
    )
    words = {"arch": f"{tmp_path / 'net.py'}:net", "struct": struct, "lr": 0.01, "pruning_times": 2}
    assert run(*tiny(tmp_path / "run", **words, criteria="saliency" if struct == "refill" else None)) == 0


@torch.no_grad()
def test_an_mlp_without_units_gives_its_bias_whatever_its_width():
    torch.manual_seed(0)
    for bias in (True, False):
        mlp = nn.Sequential()
        mlp.fc1, mlp.fc2 = nn.Linear(6, 12), nn.Linear(12, 8, bias=bias)
        constant = Constant("fc2", 8, mlp.fc2.bias)
        wanted = mlp.fc2(torch.zeros(2, 5, 12))
        assert torch.equal(constant(torch.rand(2, 5, 6)), wanted)


@torch.no_grad()
def test_an_mlp_of_the_network_itself_keeps_one_neuron_that_adds_nothing():
    torch.manual_seed(0)
    model = normalised(Mixer()).eval()
    groups, parameters, images = unit_groups(model), dict(model.named_parameters()), torch.rand(2, 3, 8, 8)
    masks = masks_of_units(groups, {g.name: torch.zeros(g.units, dtype=torch.bool) for g in groups}, parameters)
    wanted = functional_call(model, {n: parameters[n] * m for n, m in masks.items()}, (images,))
    small = shrink(model, masks).network
    torch.testing.assert_close(small(images), wanted)
    assert [n for n, _ in small.named_children()] == [n for n, _ in model.named_children()]
    assert small.fc1.weight.shape == (1, 16) and cost_of(model, masks, 8).macs == counted_macs(small, 8)


@pytest.mark.parametrize(
    "arch",
    [
        "file",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ("timm/test_vit", "timm/vit_tiny_patch16_224")),
    ],
)
def test_unstructured_rsst_is_said_to_squeeze_nothing_whoevers_the_vit_is(arch, tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "from timm.models.vision_transformer import VisionTransformer\n"
        "def vit(num_classes, img_size):\n"
        "    return VisionTransformer(img_size, 4, embed_dim=48, depth=2, num_heads=3, num_classes=num_classes)\n"
    )
    arch = f"{tmp_path / 'net.py'}:vit" if arch == "file" else arch
    for more, count in (({}, 1), ({"vit_structured": True}, 0), ({"struct": "imp"}, 0)):
        words = tiny(tmp_path / "run", arch=arch, image_size=16, **more)
        assert main_imp_fillback.main([*words, "--dry_run"]) == 0
        printed = capsys.readouterr()
        assert printed.err.count("RSST without --vit_structured prunes single weights") == count
        known = bool(more.get("vit_structured"))
        assert ("rounds (exact)" in printed.out) is False, "only heads are targets: MLPs keep their element-wise masks"
        both = main_imp_fillback.main([*words, "--dry_run", "--vit_prune_target", "both"])
        assert both == 0 and ("rounds (exact)" in capsys.readouterr().out) is known


@pytest.mark.parametrize(
    "arch, percent",
    [
        (f"{SISTERS}:with_a_table", 17),
        (f"{SISTERS}:alexnet", None),  # its linear layers have neurons
        (f"{OWN}:net", None),
        pytest.param("torchvision/alexnet", None, marks=pytest.mark.slow),
        pytest.param("torchvision/resnet18", None, marks=pytest.mark.slow),
    ],
    ids=["with_a_table", "small_sisters.py:alexnet", "my_model.py:net", "alexnet", "resnet18"],
)
def test_a_network_of_which_little_can_be_pruned_is_warned_of(arch, percent, tmp_path, capsys):
    assert main_imp_fillback.main([*tiny(tmp_path / "run", arch=arch, image_size=64), "--dry_run"]) == 0
    error = capsys.readouterr().err
    assert error.count(" of the parameters are in layers that can be pruned. ") == (percent is not None)
    assert error.count(f"only {percent}% of the parameters are in layers") == (percent is not None)


class AddsOneChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.one = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 1, 1)
        self.conv3, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 10)

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.fc(self.conv3(x + self.one(x)).relu().mean((2, 3)))


def test_a_channel_that_is_added_to_all_others_is_followed():
    torch.manual_seed(0)
    model = normalised(AddsOneChannel())
    check_units(model, channel_groups(model), 8)


@pytest.mark.parametrize("channels, groups", [(8, 4), (4, 4)])
def test_parameters_are_those_of_the_cut_network_where_convolutions_are_grouped(channels, groups):
    """Their groups have to stay equally large: nothing of them is cut, their biases neither."""
    torch.manual_seed(0)
    grouped = nn.Conv2d(channels, 8, 3, groups=groups)
    model = normalised(Chain([nn.Conv2d(3, channels, 3), grouped, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1)]))
    groups = channel_groups(model)
    kept = {groups[0].name: torch.arange(8) < 5}
    masks = masks_of_units(groups, kept, dict(model.named_parameters()))
    small = shrink(model, masks).network
    assert cost_of(model, masks, 8).parameters == sum(p.numel() for p in small.parameters())


class Chain(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.conv1, *rest = layers
        self.rest, self.fc = nn.Sequential(*rest), nn.Linear(6, 10)

    def forward(self, x):
        return self.fc(self.rest(self.conv1(x)).relu().mean((2, 3)))
