"""Every registered network: its shapes, stems and sizes, and a library's network behind a normalisation layer."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from helpers.networks import LARGE, REGISTERED
from torch import fx, nn

from structured_tickets.base.errors import UsageError
from structured_tickets.networks import MODELS, build_model
from structured_tickets.networks.layers import Normalize, normalised
from structured_tickets.networks.pretrained import load_pretrained_weights

BIG = ("vit_base", "vit_base_imagenet", "vit_large_imagenet")
VITS = [a for a in REGISTERED if MODELS[a].spec.family == "vit"]
CNNS = [a for a in REGISTERED if a not in VITS]
SMALL_NETWORKS = [
    pytest.param(a, size, marks=[pytest.mark.slow] * (a in LARGE))
    for a, size in [(a, 32) for a in REGISTERED if a not in BIG] + [(a, 64) for a in CNNS]
]
CONSTANTS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))

MILLIONS_AT_224 = {
    "mobilenet": 4_231_976,
    "res18": 11_689_512,
    "res50": 25_557_032,
    "densenet161": 28_681_000,
    "shufflenet_v2_x1_0": 2_278_604,
    "vit_small_imagenet": 22_050_664,
    "vit_base_imagenet": 86_567_656,
    "vit_large_imagenet": 304_326_632,
}
"""Published sizes for ImageNet's 1,000 classes: torchvision's and timm's tables; MobileNet v1 with its BatchNorms."""

SIZES_AT_32 = {"vgg16_bn": 14_774_436, "resnet12": 8_048_100, "wrn32": 1_872_132, "shufflenet_v2_x1_0": 1_356_104}
"""For 100 classes; the reference values have those of the others."""


def on_paper(arch, classes=100, size=32):
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build_model(arch, classes, size)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def image(size, n=2):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch, size", SMALL_NETWORKS)
@torch.no_grad()
def test_finite_logits_of_images_that_are_normalised_once(arch, size):
    torch.manual_seed(0)
    model = build_model(arch, 10, size).eval()
    calls = []
    constants = Normalize(*CONSTANTS)
    constants.register_forward_hook(lambda *_: calls.append(1))
    outside = model(Normalize(*CONSTANTS)(image(size)))
    model.normalize = constants
    logits = model(image(size))
    assert logits.shape == (2, 10) and bool(logits.isfinite().all()) and float(logits.std()) > 0
    assert len(calls) == 1
    torch.testing.assert_close(logits, outside)


@pytest.mark.parametrize("arch", REGISTERED)
@pytest.mark.parametrize("size", [32, 224])
def test_stem_and_classifier_are_the_first_and_last_layer(arch, size):
    model = on_paper(arch, 7, size)
    spec = MODELS[arch].spec
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert model.spec is spec and layers[0][0] == spec.stem and layers[-1][0] == spec.classifier
    assert layers[0][1].in_channels == 3 and layers[-1][1].out_features == 7


@pytest.mark.parametrize("arch", MILLIONS_AT_224)
def test_published_sizes_at_224_pixels(arch):
    assert parameters(on_paper(arch, 1000, 224)) == MILLIONS_AT_224[arch]


@pytest.mark.parametrize("arch", SIZES_AT_32)
def test_sizes_at_32_pixels(arch):
    assert parameters(on_paper(arch)) == SIZES_AT_32[arch]


@pytest.mark.parametrize(
    "arch, name",
    [("res18", "resnet18"), ("res50", "resnet50"), ("densenet161",) * 2, ("shufflenet_v2_x1_0",) * 2],
)
def test_above_64_pixels_it_is_torchvisions_network(arch, name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    ours = on_paper(arch, 1000, 65)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    del ours.normalize
    assert str(ours) == str(theirs)


@torch.no_grad()
def test_at_224_pixels_the_logits_are_torchvisions():
    model = build_model("res18", 10, 224).eval()
    assert model.conv1.kernel_size == (7, 7) and isinstance(model.maxpool, nn.MaxPool2d)
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    theirs.load_state_dict(model.state_dict())
    assert torch.equal(model(image(224, 1)), theirs(image(224, 1)))


@pytest.mark.parametrize("arch", CNNS)
def test_up_to_64_pixels_the_stem_keeps_the_resolution(arch):
    for size in (32, 64):
        stem = on_paper(arch, size=size).get_submodule(MODELS[arch].spec.stem)
        assert stem.stride == (1, 1) and stem.kernel_size == (3, 3) and stem.padding == (1, 1)
    strided = on_paper(arch, size=224).get_submodule(MODELS[arch].spec.stem).stride == (2, 2)
    assert strided == (arch in ("res18", "res50", "mobilenet", "densenet161", "shufflenet_v2_x1_0"))


@torch.no_grad()
def last_resolution(model, size):
    """Height of what the last convolution makes."""
    heights = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: heights.append(out.shape[-1]))
    model(torch.empty(1, 3, size, size, device="meta"))
    return heights[-1]


@pytest.mark.parametrize(
    "arch, at_32, at_64, at_224",
    [
        ("res18", 4, 8, 7),
        ("res50", 4, 8, 7),
        ("vgg16_bn", 2, 4, 14),
        ("mobilenet", 2, 4, 7),
        ("densenet161", 4, 8, 7),
        ("shufflenet_v2_x1_0", 4, 8, 7),
        ("resnet12", 4, 8, 28),
        ("wrn32", 8, 16, 56),
    ],
)
def test_how_often_the_resolution_is_halved(arch, at_32, at_64, at_224):
    found = [last_resolution(on_paper(arch, size=size).eval(), size) for size in (32, 64, 224)]
    assert found == [at_32, at_64, at_224]


def test_vgg_has_its_fifth_pool_above_64_pixels_only():
    for size, pools in ((32, 4), (64, 4), (65, 5)):
        assert sum(isinstance(m, nn.MaxPool2d) for m in on_paper("vgg16_bn", size=size).modules()) == pools


@pytest.mark.parametrize(
    "arch, layer, std",
    [
        ("res18", "conv1", (2 / (64 * 9)) ** 0.5),
        ("res50", "conv1", (2 / (64 * 9)) ** 0.5),
        ("densenet161", "features.conv0", (2 / 27) ** 0.5),
        ("shufflenet_v2_x1_0", "conv1.0", (1 / (3 * 27)) ** 0.5),
        ("vgg16_bn", "features.0", (2 / (64 * 9)) ** 0.5),
        ("vgg16_bn", "classifier", 0.01),
        ("wrn32", "conv1", (2 / (32 * 9)) ** 0.5),
        ("wrn32", "layer2.0.downsample.0", (2 / 64) ** 0.5),
        ("wrn32", "fc", 0.01),
        ("resnet12", "layer1.conv1", (2 / (1.01 * 64 * 9)) ** 0.5),
    ],
)
@torch.no_grad()
def test_initial_weights_of_the_layers_that_are_ours(arch, layer, std):
    torch.manual_seed(0)
    module = build_model(arch, 100, 32).get_submodule(layer)
    noise = 4 / (2 * module.weight.numel()) ** 0.5
    assert float(module.weight.std()) == pytest.approx(std, rel=noise)
    assert abs(float(module.weight.mean())) < 4 * std / module.weight.numel() ** 0.5
    assert module.bias is None or not module.bias.any()


def test_wrn32_is_resnet32_twice_as_wide_with_projections():
    model = on_paper("wrn32")
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [5, 5, 5]
    assert [stage[0].conv2.out_channels for stage in (model.layer1, model.layer2, model.layer3)] == [32, 64, 128]
    shortcuts = [n for n, _ in model.named_modules() if n.endswith("downsample.0")]
    assert shortcuts == ["layer2.0.downsample.0", "layer3.0.downsample.0"]


@pytest.mark.parametrize("arch, size", [("vit_small_imagenet", 72), ("vgg16_bn", 8), ("resnet12", 12)])
def test_sizes_that_a_network_cannot_take_are_refused(arch, size):
    with pytest.raises(UsageError, match=f"{arch} .*--image_size"):
        build_model(arch, 10, size)


@pytest.mark.slow
@torch.no_grad()
def test_timms_imagenet_weights_give_timms_logits(tmp_path):
    """So epsilon, activation and pooling are the same; the weights come from a file, as they do without a network."""
    theirs = timm.create_model("vit_small_patch16_224").eval()
    nn.init.normal_(theirs.head.weight, 0, 0.1)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    model = build_model("vit_small_imagenet", 1000, 224).eval()
    assert model.spec.pretrained in timm.list_pretrained("vit_small_patch16_224*")
    load_pretrained_weights(model, model.spec, tmp_path / "vit.pth", with_classifier=True)
    torch.testing.assert_close(model(image(224, 1)), theirs(image(224, 1)))
    assert model.norm.eps == 1e-6 and on_paper("vit_small").norm.eps == 1e-5


@pytest.mark.parametrize("arch", VITS)
def test_rows_name_weights_that_timm_publishes(arch):
    name = MODELS[arch].spec.pretrained
    assert name is None or timm.is_model_pretrained(name)


@pytest.fixture
def network():
    """A library's network behind a normalisation that does something, and the library's alone with the same weights."""
    plain = torchvision.models.resnet18(num_classes=5).eval()
    model = normalised(copy.deepcopy(plain))
    model.normalize = Normalize(*CONSTANTS)
    return model, plain


@torch.no_grad()
def test_normalised_comes_first_and_changes_no_name():
    plain = torchvision.models.resnet18(num_classes=5).eval()
    keys = list(plain.state_dict())
    expected = plain(Normalize(*CONSTANTS)(image(32)))
    model = normalised(plain)
    assert model is plain and isinstance(model.normalize, nn.Identity) and list(model.state_dict()) == keys
    model.normalize = Normalize(*CONSTANTS)
    torch.testing.assert_close(model(image(32)), expected)
    assert normalised(model) is model and isinstance(model.normalize, Normalize)
    torch.testing.assert_close(model(image(32)), expected)


def test_normalised_leaves_the_librarys_class_alone(network):
    model, plain = network
    library = torchvision.models.ResNet
    assert type(plain) is library and library.__subclasses__().count(type(model)) == 1
    assert type(model) is not library and isinstance(model, library) and type(model).__name__ == "ResNet"
    assert type(normalised(torchvision.models.resnet18())) is type(model)
    assert not hasattr(library, "normalize") and not hasattr(torchvision.models.resnet18(), "normalize")


def test_a_sequential_cannot_be_normalised_afterwards():
    with pytest.raises(TypeError, match="Sequential"):
        normalised(nn.Sequential(nn.Linear(2, 2)))


@torch.no_grad()
def test_a_normalised_network_can_be_copied(network):
    model, _ = network
    twin = copy.deepcopy(model)
    assert type(twin) is type(model) and torch.equal(twin(image(32)), model(image(32)))
    twin.normalize = nn.Identity()
    twin.conv1.weight.zero_()
    assert isinstance(model.normalize, Normalize) and bool(model.conv1.weight.any())


@torch.no_grad()
@pytest.mark.parametrize("arch", ["res18", "vgg16_bn", "densenet161", "shufflenet_v2_x1_0"])
def test_a_trace_holds_the_normalisation(arch):
    model = build_model(arch, 10, 32).eval()
    nodes = list(fx.symbolic_trace(model).graph.nodes)
    assert [n.target for n in nodes if n.op == "call_module"][:2] == ["normalize", model.spec.stem]
    model.normalize = Normalize(*CONSTANTS)
    torch.testing.assert_close(fx.symbolic_trace(model)(image(32)), model(image(32)))


@pytest.mark.slow
@torch.no_grad()
def test_a_normalised_network_can_be_exported_and_compiled(network):
    model, _ = network
    expected = model(image(32))
    torch.testing.assert_close(torch.export.export(model, (image(32),)).module()(image(32)), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image(32)), expected)
