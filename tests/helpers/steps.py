"""A network with all that trains it, for tests of the training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

from helpers.structures import random_structure
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.data.loader import BatchLoader
from structured_tickets.data.mixing import Mixing
from structured_tickets.networks import build_model
from structured_tickets.networks.layers import Normalize
from structured_tickets.pruning.masks import MaskPair, as_current, as_refill
from structured_tickets.runs.setup import choose_kernels
from structured_tickets.training import step as steps
from structured_tickets.training.averaging import Average
from structured_tickets.training.distillation import Distillation, as_teacher
from structured_tickets.training.epoch import Passer, train
from structured_tickets.training.loss_scale import LossScale
from structured_tickets.training.optimization import OPTIMIZERS, LearningRate
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.recording import Recorder
from structured_tickets.training.trainee import Trainee

EPOCHS = 3
SETTINGS = {
    "print_freq": 10**6,
    "block_loss_grad": False,
    "epochs": EPOCHS,
    "RST_schedule": "exp_custom_exponents",
    "reg_granularity_prune": 0.3,
    "exponents": 4,
    "reg_horizon": "state",
    "reg_guard": False,
    "reg_upper_limit": 1.0,
}


class Dropping(nn.Module):
    """Two convolutions with BatchNorm and dropout, and a weight that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(16, 10)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.norm(self.conv(x)).relu())
        return self.fc(self.norm2(self.conv2(x)).relu().mean((2, 3)))


def network(arch: str) -> nn.Module:
    torch.manual_seed(0)
    if arch == "dropping":
        return Dropping()
    model = build_model(arch, 10, 8)
    model.normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    return model


def random_pair(model: nn.Module, dead_units: bool) -> MaskPair:
    """Masks with doomed, dead and kept weights.

    Args:
        dead_units: Whole units are dead, so that there is something to cut: enough for networks with whole lanes, too.
    """
    draw = torch.Generator().manual_seed(3)
    if isinstance(model, Dropping):
        weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
        refill = {n: (torch.rand(p.shape, generator=draw) < 0.6).float() for n, p in weights.items()}
    else:
        refill = random_structure(model, 3, 0.25 if dead_units else 0.5)
    outside = random_structure(model, 5, 0.25) if dead_units else {n: torch.ones_like(m) for n, m in refill.items()}
    current = {}
    for name, mask in refill.items():
        spared = (torch.rand(mask.shape, generator=draw) < 0.5).float() if mask.ndim > 1 else torch.ones_like(mask)
        current[name] = torch.maximum(mask, spared * outside[name])
    return MaskPair(current, refill)


class Case:
    """Made twice with the same arguments, it is twice the same.

    Attributes:
        whole: The network; `model` is the one that trains.
        loader: Batches of 8 of 8 x 8 pixels; 20 images make two and a short one.
    """

    def __init__(
        self,
        arch: str = "micro_cnn",
        optimizer: str = "sgd",
        decoupled: bool = False,
        compact: bool = False,
        images: int = 20,
        device: str = "cpu",
        recorder: Recorder | None = None,
        precision: torch.dtype = torch.float32,
        dead_units: bool | None = None,
        **flags: object,
    ) -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self.args, base = SimpleNamespace(**SETTINGS | flags), 0.05 if optimizer == "sgd" else 1e-3
        self.whole = network(arch)
        pair = random_pair(self.whole, compact if dead_units is None else dead_units)
        pair = MaskPair(*({n: m.to(self.device) for n, m in half.items()} for half in (pair.current, pair.refill)))
        self.whole.to(self.device)
        build = lambda m: OPTIMIZERS[optimizer].build(m, base, 0.9, 0.05)  # noqa: E731
        self.trainee = Trainee(self.whole, pair.alive, build, lambda m: None, compact)
        self.model, self.optimizer = self.trainee.model, self.trainee.optimizer
        draw = torch.Generator().manual_seed(1)
        photos = torch.randint(0, 256, (images, 3, 8, 8), dtype=torch.uint8, generator=draw)
        self.data = ImageSet(photos, torch.randint(0, 10, (images,), generator=draw))
        self.loader = BatchLoader(self.data, 8, self.device, augment=True, flip=True)
        current, refill = self.trainee.cut(pair.current), self.trainee.cut(pair.refill)
        self.passer = Passer(
            self.args,
            as_current(current),
            as_refill(refill),
            held=self.trainee.held,
            rate=LearningRate(base, self.args.epochs, len(self.loader), 1, "multistep", (2,)),
            decoupled=decoupled,
            recorder=recorder or Recorder(),
            precision=precision,
            scale=LossScale(self.device) if precision == torch.float16 else None,
        )
        self.pruner = Pruner(self.model, self.args, self.passer)
        self.criterion: nn.Module = nn.CrossEntropyLoss()

    def train(self, loop=train, epochs=range(EPOCHS), start: int = 0) -> list[torch.Tensor]:
        """Some epochs; returns the sums of each.

        Args:
            start: Batches of the first epoch that are done.
        """
        sums = []
        for epoch in epochs:
            self.loader.seek(1, epoch, start)
            start = 0
            arguments = (self.model, self.criterion, self.optimizer, epoch, self.passer, self.pruner)
            result = loop(1, self.loader, *arguments)
            sums.append(getattr(result, "sums", result))
        return sums

    def values(self) -> dict[str, torch.Tensor]:
        """Weights, statistics and the optimizer's state, as copies."""
        found = {k: v.clone() for k, v in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{index} {k}": v.clone() for k, v in state.items()}
        return found


def seen_in_steps(case, make, epochs=range(2)):
    """What a mode (`make()` -> context) sees in each step, one by one."""
    seen, real = [], steps.Step.once

    def once(step):
        with make() as found:
            real(step)
        seen.append(found)

    steps.Step.once = once
    try:
        case.train(epochs=epochs)
    finally:
        steps.Step.once = real
    return seen


def with_a_whole_recipe(case: Case) -> Case:
    """The same with everything that a recipe can have: mixed and augmented images, a teacher, parts, an average."""
    case.loader.policy, case.loader.erasing, case.loader.repeats = "rand", 0.5, 2
    passer = case.passer
    passer.mixing, passer.at_once = Mixing(1.0, 1.0, 10, 8, 0, 1), 3
    teacher = as_teacher(network("micro_cnn").to(case.device))
    passer.distillation = Distillation(teacher, 0.5, 2.0, "kl")
    passer.average = Average(case.model, 0.9, 0, {})
    case.args.clip_grad = 1.0
    return case


@contextmanager
def kernels_that_repeat_themselves(device: str = "cuda") -> Iterator[None]:
    """On a card, whose process has to be started with CUBLAS_WORKSPACE_CONFIG=:4096:8. On a CPU all of them do."""
    if device == "cuda":
        choose_kernels(deterministic=True)
    try:
        yield
    finally:
        if device == "cuda":
            choose_kernels(deterministic=False)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """All bits agree."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
