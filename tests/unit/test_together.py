"""Small operations of all layers made at once: the bits of layers that make their own, by fewer operations."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.networks import MICRO
from helpers.steps import Case, assert_same, seen_in_steps, with_a_whole_recipe
from helpers.watchers import Numbers, waiting
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from structured_tickets.base.distributed import ALONE
from structured_tickets.data.loader import BatchLoader
from structured_tickets.networks.together import Together, together_of
from structured_tickets.training.epoch import judged_by
from structured_tickets.training.recording import Recorder

LOWER = [torch.bfloat16, torch.float16]


@pytest.fixture
def ahead(monkeypatch):
    """Steps are made as those that are recorded, and run as they are."""
    monkeypatch.setattr(Recorder, "is_ahead", property(lambda _: True))


CASES = [
    pytest.param(arch, precision, compact, marks=[pytest.mark.slow] * (arch in ("res20s", "vit_tiny")))
    for arch in (*MICRO, "dropping", "res20s", "vit_tiny")
    for precision in (torch.float32, *LOWER)
    for compact in (False, True)
    if not (compact and arch == "dropping")
]


@pytest.mark.parametrize("arch, precision, compact", CASES)
def test_epochs_have_the_same_bits(arch, precision, compact, monkeypatch):
    sums, values = [], []
    for together in (False, True):
        monkeypatch.setattr(Recorder, "is_ahead", property(lambda _, own=together: own))
        case = Case(arch, "adamw", compact=compact, precision=precision)
        torch.manual_seed(7)
        sums.append([*case.train(), judged_by(BatchLoader(case.data, 8, case.device), *_judging(case)).sums])
        values.append(case.values())
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))
    assert_same(*values)


def _judging(case: Case) -> tuple:
    return case.model, case.criterion, ALONE, case.passer.precision, case.passer.recorder


@pytest.mark.parametrize("arch", MICRO)
def test_a_whole_recipe_has_the_same_bits(arch, monkeypatch):
    values = []
    for together in (False, True):
        monkeypatch.setattr(Recorder, "is_ahead", property(lambda _, own=together: own))
        case = with_a_whole_recipe(Case(arch, precision=torch.bfloat16))
        case.train()
        values.append(case.values())
    assert_same(*values)


@pytest.mark.parametrize("arch", ["res20s", "vit_tiny"])
def test_no_weight_is_converted_by_itself_and_no_batch_counted(arch, ahead):
    """The first step makes things; in the others, what is left to convert is images, activations and losses."""
    case = Case(arch, images=32, precision=torch.bfloat16)
    _, *seen = seen_in_steps(case, Numbers)
    weights = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in case.model.modules())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in case.model.modules())
    for numbers in seen:
        names = [name for name, _ in numbers.calls]
        # one for all weights, and one for all of their gradients
        assert names.count("aten._foreach_copy_.default") == 2
        assert names.count("aten._foreach_add_.Scalar") == (1 if norms else 0)
        assert names.count("aten.add_.Tensor") <= 3 and names.count("aten._to_copy.default") < 3.5 * weights
        if norms:
            assert names.count("aten._to_copy.default") <= 5 and norms == 19


def test_no_weight_of_a_teacher_is_converted_by_itself(ahead):
    case = with_a_whole_recipe(Case("micro_vit", images=32, precision=torch.bfloat16))
    case.passer.at_once = 0
    *_, numbers = seen_in_steps(case, Numbers)
    assert [name for name, _ in numbers.calls].count("aten._foreach_copy_.default") == 3


@pytest.mark.parametrize("arch", MICRO)
def test_nothing_waits_and_nothing_is_frozen(arch, ahead):
    case = Case(arch, images=32, precision=torch.bfloat16)
    _, *seen = (numbers.calls for numbers in seen_in_steps(case, Numbers))
    assert all(calls == seen[0] for calls in seen)
    for found in seen_in_steps(Case(arch, images=32, precision=torch.bfloat16), waiting):
        assert not found


class Shared(nn.Module):
    """One layer called twice, with its BatchNorm; weights that other code reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.norm(self.conv(x)))).mean((2, 3))
        return self.fc(x) + x @ functional.normalize(self.fc.weight).T


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.other = nn.MultiheadAttention(8, 2, kdim=3, vdim=3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        wide = functional.pad(x, (0, 5))
        return (self.own(wide, wide, wide)[0] + self.other(wide, x, x)[0]).mean(1)


class InPartExact(nn.Module):
    """Autocast is off for one layer, or has another type."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.conv, self.exact, self.dtype = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), dtype

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3)).float()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return self.exact(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.conv, self.conv2, self.reentrant = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return checkpoint(self.conv2, x, use_reentrant=self.reentrant).mean((2, 3))


class Frozen(nn.Module):
    """Some weights are not trained, some are constants, and some layers are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)
        self.conv.requires_grad_(False)
        self.register_buffer("kernel", torch.rand(4, 1, 3, 3))
        self.often = 0

    def forward(self, x: Tensor) -> Tensor:
        self.often += 1
        x = functional.conv2d(self.conv(x), self.kernel, groups=4)
        x = self.conv2(x) if self.often % 2 else x
        with torch.no_grad():
            rest = self.fc(x.mean((2, 3)))
        return self.fc(weight_only(x)) + rest


def weight_only(x: Tensor) -> Tensor:
    return x.mean((2, 3)) * 2


class Counting(nn.Module):
    """Reads how many batches a BatchNorm has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.seen = nn.BatchNorm2d(3), []

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        self.seen.append(int(self.norm.num_batches_tracked))
        return self.norm(x).mean((2, 3))


class Changing(nn.Module):
    """Changes a weight before it is used, in one of the ways that people have."""

    def __init__(self, change) -> None:
        super().__init__()
        self.fc, self.last, self.change = nn.Linear(192, 5), nn.Linear(5, 4), change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self.fc)
        return self.last(self.fc(x.flatten(1)))


@torch.no_grad()
def normalized(layer):
    layer.weight.copy_(functional.normalize(layer.weight, dim=1))


def renormalized(layer):
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.5)


@torch.no_grad()
def clamped(layer):
    layer.weight.clamp_(-0.05, 0.05)


def halved(layer):
    layer.weight.data.mul_(0.5)


def frozen_and_thawed(layer):
    layer.requires_grad_(not layer.weight.requires_grad)


@torch.no_grad()
def halved_with_others(layer):
    torch._foreach_mul_([layer.weight, layer.bias], 0.5)


class Following(nn.Module):
    """A second branch follows the first; prototypes that the network moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 4), nn.Linear(192, 4).requires_grad_(False)
        self.register_buffer("places", torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for own, other in zip(self.second.parameters(), self.first.parameters(), strict=True):
                own.mul_(0.9).add_(other, alpha=0.1)
            self.places.mul_(0.9).add_(x[:, 0, :4, :4].mean(0), alpha=0.1)
        x = x.flatten(1)
        return functional.linear(self.first(x), self.places) + self.second(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fc = nn.Parameter(torch.rand(16, 192) / 10), nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.fc(functional.linear(x, self.weight).relu() @ self.weight)


class WithGradients(nn.Module):
    """Takes gradients of weights in its own pass."""

    def __init__(self, further: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.further = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), further

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        with torch.enable_grad():
            own = self.fc(x.detach()).float().square().mean()
            (slope,) = torch.autograd.grad(own, self.fc.weight, create_graph=self.further)
        return functional.linear(x, self.fc.weight - 0.1 * slope)


class Vectorized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(192, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.vmap(self.fc)(x.flatten(1)))


class ReadTogether(nn.Module):
    """Reads the counts of two BatchNorms in a list, and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.norm(x)).mean((2, 3))
        counts = torch.stack([self.norm.num_batches_tracked, self.norm2.num_batches_tracked]).sum()
        return x / counts + torch.clamp(input=self.norm.num_batches_tracked, min=1)


class Saving(nn.Module):
    """A checkpoint that keeps the products of matrices and computes the rest anew."""

    def __init__(self, normalized: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.norm = nn.BatchNorm1d(16) if normalized else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        kept = partial(create_selective_checkpoint_contexts, products)
        inner = lambda t: self.third(self.norm(self.second(t.float())).relu().float())  # noqa: E731
        return checkpoint(inner, self.first(x.flatten(1)), use_reentrant=False, context_fn=kept)


class Hooked(nn.Module):
    """The weights of a second output, which the loss does not reach, have a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(192, 4), nn.Linear(192, 4)
        self.other.weight.register_hook(lambda g: g.clamp(-1, 1))
        self.fc.weight.register_hook(lambda g: g * 2)

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["second"] = self.other(x.flatten(1)).detach()
        return self.fc(x.flatten(1))


class Again(nn.Module):
    """A decoder layer that is called several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x.flatten(2).transpose(1, 2), (0, 5))
        y = x
        for _ in range(3):
            y = self.layer(y, x)
        return y.mean(1)


class Coarse(Tensor):
    """Weights that are rounded where they are used."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is functional.linear:
            x, weight, bias = (a.as_subclass(Tensor) for a in args)
            return functional.linear(x, (weight * 16).round() / 16, bias)
        return super().__torch_function__(func, types, args, kwargs or {})


class Exact(Tensor):
    """Images on which layers compute in float32."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
        if func is functional.linear:
            with torch.autocast("cpu", enabled=False):
                return func(args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class OfAnotherKind(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.fc, self.last, self.weights = nn.Linear(192, 5), nn.Linear(5, 4), weights
        if weights:
            self.fc.weight = nn.Parameter(self.fc.weight.detach().as_subclass(Coarse))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.last(self.fc(x if self.weights else x.as_subclass(Exact)).as_subclass(Tensor))


class ByAnotherName(nn.Module):
    """Changes a weight, and reads a count, by tensors of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(192), nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        if "names" not in self.__dict__ or self.names[0].data_ptr() != self.fc.weight.data_ptr():
            self.__dict__["names"] = self.fc.weight.data, self.norm.num_batches_tracked.detach()
        self.names[0].mul_(0.9)
        return self.fc(self.norm(x.flatten(1))) / float(self.names[1])


class FrozenTrunk(nn.Module):
    """Torch's encoder in evaluation mode, which is one kernel for each layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.trunk = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).requires_grad_(False).eval()
        self.norm, self.fc = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x.flatten(2).transpose(1, 2), (0, 5))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x = self.trunk(x)
        return self.fc(self.norm(x.mean(1)))


class WithoutCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(192, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        with torch.autocast("cpu", torch.get_autocast_dtype("cpu"), cache_enabled=False):
            return self.fc(self.fc(self.fc(x)))


class MadeForInference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 4)
        with torch.inference_mode():
            self.register_buffer("places", torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            places = functional.linear(torch.eye(4), self.places)
        return self.fc(x.flatten(1)) @ places


OTHERS = {
    "lazy layers": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.LazyLinear(4)),
    "selective checkpoints": lambda: Saving(False),
    "selective checkpoints with counts": lambda: Saving(True),
    "hooks on weights": Hooked,
    "a decoder called again": Again,
    "weights of another kind": lambda: OfAnotherKind(True),
    "images of another kind": lambda: OfAnotherKind(False),
    "aliases": ByAnotherName,
    "a frozen encoder": FrozenTrunk,
    "autocast without its cache": WithoutCache,
    "buffers made for inference": MadeForInference,
    **{
        f"{change.__name__} weights": lambda change=change: Changing(change)
        for change in (normalized, renormalized, clamped, halved, halved_with_others, frozen_and_thawed)
    },
    "branches that follow": Following,
    "tied weights": Tied,
    "gradients of weights": lambda: WithGradients(False),
    "gradients of weights that are differentiated": lambda: WithGradients(True),
    "counts that are read together": ReadTogether,
    "a vectorized layer": Vectorized,
    "layers called twice": Shared,
    "torch's attention": Attention,
    "one layer in float32": lambda: InPartExact(None),
    "one layer in float16": lambda: InPartExact(torch.float16),
    "checkpoints": lambda: Checkpointed(False),
    "reentrant checkpoints": lambda: Checkpointed(True),
    "frozen weights": Frozen,
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Flatten()),
    "batches that are counted": Counting,
    "one-dimensional layers": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 2, 3), nn.Flatten()
    ),
}


def twice(make):
    """The same network two times: copies would lose the hooks of weights."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(make())
    return found


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_all_kinds_compute_the_same(name, precision):
    own, other = twice(OTHERS[name])
    images = torch.rand(3, 4, 3, 8, 8)
    together = Together(own)
    for batch in images:
        results = []
        for network, joint in ((own, together), (other, None)):
            network.zero_grad()
            x = batch.clone().requires_grad_()
            torch.manual_seed(0)  # lazy layers draw when they are called
            with torch.autocast("cpu", precision):
                if joint is None:
                    output = network(x)
                else:
                    with joint.a_pass():
                        output = network(x)
            output.float().square().sum().backward()
            gradients = {n: p.grad for n, p in network.named_parameters()}
            results.append((output, x.grad, gradients, dict(network.state_dict())))
        (output, of_images, gradients, state), theirs = results
        assert output.dtype == theirs[0].dtype and torch.equal(output, theirs[0])
        assert of_images is theirs[1] is None or torch.equal(of_images, theirs[1])
        assert {n for n, g in gradients.items() if g is None} == {n for n, g in theirs[2].items() if g is None}
        for name_of, gradient in gradients.items():
            assert gradient is None or torch.equal(gradient, theirs[2][name_of]), name_of
        assert_same(state, theirs[3])
    if name == "batches that are counted":
        assert own.seen == other.seen == [1, 3, 5]


def test_layers_keep_their_own_weights(ahead):
    """Nothing of a pass stays: neither in the layers, nor in memory."""
    net = Shared()
    together, before = Together(net), dict(net.named_parameters())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), together.a_pass():
            net(torch.rand(2, 3, 8, 8))
            assert net.conv.weight is before["conv.weight"]
    assert not together._lower and not together._counted
    assert {id(p) for p in (net.conv.weight, net.conv.bias, net.fc.bias)} < {*together._wanted} - together._apart
    assert id(net.fc.weight) in together._apart


def test_a_pass_that_fails_leaves_nothing():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(5, 2))
    together = Together(net)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), together.a_pass():
        net(torch.rand(3, 4))
    assert not together._counted and torch.equal(torch.rand(2) * 0, torch.zeros(2))


class Compiled(nn.Module):
    """A part of it is compiled, and a function that it calls."""

    def __init__(self) -> None:
        super().__init__()
        part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.part, self.fc = torch.compile(part, backend="eager", fullgraph=True), nn.Linear(4, 4)
        self.function = torch.compile(functional.linear, backend="eager", fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x).mean((2, 3))
        return self.fc(x) + self.function(x, self.fc.weight)


def test_compiled_parts_are_compiled_once():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    net, other = Compiled(), Compiled()
    other.load_state_dict(net.state_dict())
    together, images = Together(net), torch.rand(4, 2, 3, 8, 8)
    for batch in images:
        with torch.autocast("cpu", torch.bfloat16):
            with together.a_pass():
                output = net(batch)
            assert torch.equal(output, other(batch))
    assert_same(net.state_dict(), other.state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4, "two for each network"


def test_compiled_networks_are_left_alone():
    net = Shared()
    assert isinstance(together_of(net), Together)
    net.compile()
    assert together_of(net) is None


def test_attention_that_is_one_kernel_in_evaluation_is_left_alone():
    net = Attention().eval()
    together = Together(net)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), together.a_pass():
            net(torch.rand(2, 3, 4, 4))
    assert not together._wanted


def test_most_weights_of_attention_are_converted_together():
    net = Attention()
    together = Together(net)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), together.a_pass():
            net(torch.rand(2, 3, 4, 4))
            found = {*together._lower}
    names = {n for n, p in net.named_parameters() if id(p) in found}
    assert names == {"own.in_proj_weight", "own.in_proj_bias", "own.out_proj.weight", "own.out_proj.bias"}


def test_a_step_that_is_not_recorded_converts_layer_by_layer(ahead):
    case = Case("micro_vit", images=32, precision=torch.bfloat16)
    case.train(epochs=[0])
    (_, step), *_ = case.passer.recorder._kept.values()
    assert step.together is not None
    step.stay_as_it_is()
    *_, numbers = seen_in_steps(case, Numbers, epochs=[1])
    assert "aten._foreach_copy_.default" not in [name for name, _ in numbers.calls]
