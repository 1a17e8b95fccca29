"""Small operations of all layers made at once: the bits of layers that make their own, by fewer operations."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.networks import MICRO
from helpers.steps import Case, assert_same, seen_in_steps, with_a_whole_recipe
from helpers.watchers import Numbers, waiting
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

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


OTHERS = {
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


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("name", OTHERS)
def test_networks_of_all_kinds_compute_the_same(name, precision):
    torch.manual_seed(0)
    own = OTHERS[name]()
    other, images = copy.deepcopy(own), torch.rand(3, 4, 3, 8, 8)
    together = Together(own)
    for batch in images:
        results = []
        for network, joint in ((own, together), (other, None)):
            network.zero_grad()
            x = batch.clone().requires_grad_()
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
        assert output.dtype == theirs[0].dtype and torch.equal(output, theirs[0]) and torch.equal(of_images, theirs[1])
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
    assert not together._lower and not together._counted and len(together._wanted) == 4


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
