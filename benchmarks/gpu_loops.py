"""The loops that `benchmarks.gpu` times: the ordinary one, a good engineer's, and the runner's, eager and recorded."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks import plain
from structured_tickets.base.distributed import ALONE
from structured_tickets.base.untrusted_tensors import save_atomically
from structured_tickets.base.weights import cloned_state
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.data.loader import BatchLoader
from structured_tickets.networks import build_model
from structured_tickets.networks.layers import Normalize
from structured_tickets.networks.precision import choose_precision
from structured_tickets.pruning.masks import Mask
from structured_tickets.runs.setup import prepare_for_speed
from structured_tickets.training.epoch import Passer, train, validate_together
from structured_tickets.training.loss_scale import LossScale
from structured_tickets.training.optimization import OPTIMIZERS, LearningRate
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.recording import Recorder, recorder_for
from structured_tickets.training.trainee import Trainee

SIZE = 32
EPOCHS = 10**6  # of a round: the learning rate and lambda of the timed steps hardly change
PENALTY = SimpleNamespace(
    print_freq=10**9,
    block_loss_grad=False,
    epochs=EPOCHS,
    RST_schedule="x",
    reg_granularity_prune=1.0,
    reg_horizon="epoch",
    reg_upper_limit=1e-4,
)


def photos(count: int, device: torch.device) -> ImageSet:
    """Made up images: uint8 [count, 3, 32, 32]."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw)
    return ImageSet(images.to(device), torch.randint(0, 10, (count,), generator=draw).to(device))


def batches_of(data: ImageSet, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of float images, ready for a loop that only computes."""
    assert isinstance(data.images, Tensor)
    pairs = zip(data.images.split(size), data.labels.split(size), strict=True)
    return [(images.float() / 255, labels) for images, labels in pairs]


def network(arch: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(arch, 10, SIZE)
    model.normalize = Normalize(plain.MEAN, plain.STD)
    return model.to(device)


def plain_loop(arch: str, data: ImageSet, batch: int, on_card: bool) -> Callable[[], object]:
    """The ordinary loop in float32; batches are ready, in the memory of the host or on the card."""
    device = data.labels.device
    model, criterion = network(arch, device), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    ready = batches_of(data, batch)
    batches = ready if on_card else [(x.cpu(), y.cpu()) for x, y in ready]
    return lambda: plain.train(batches, model, criterion, optimizer)


def good_engineer(arch: str, data: ImageSet, batch: int, compiled: bool) -> Callable[[], object]:
    """Lower precision, channels-last, a fused optimizer, data on the card, no waits, and torch's own CUDA graphs."""
    device = data.labels.device
    model = network(arch, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    criterion, precision = nn.CrossEntropyLoss(), choose_precision("auto", device)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    called = torch.compile(model, mode=mode) if compiled else model
    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches_of(data, batch)]
    seen = torch.zeros((), dtype=torch.long, device=device)
    lower = precision != torch.float32
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)

    def call() -> None:
        model.train()
        for images, labels in batches:
            with torch.autocast(device.type, precision if lower else torch.bfloat16, enabled=lower):
                output = called(images)
                loss = criterion(output.float(), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.add_((output.argmax(1) == labels).sum())

    return call


class Ours:
    """The runner's own loop, as a round makes it: images on the card, crops and mirrorings.

    Args:
        step: A row of `optimization.STEPS`, which `recorder_for` takes.
        held: What is held at zero, by parameter name; `compact`: cut it out.
        doomed: Whether everything else outside a random structure is under RSST's penalty.
        momentum: Flags of SGD.
    """

    def __init__(
        self,
        arch: str,
        data: ImageSet,
        batch: int,
        step: str,
        precision: str = "auto",
        held: Mask | None = None,
        compact: bool = False,
        structure: Mask | None = None,
        compiled: bool = False,
        momentum: dict[str, bool] | None = None,
    ) -> None:
        device = data.labels.device
        self.precision, self.criterion = choose_precision(precision, device), nn.CrossEntropyLoss()
        whole = network(arch, device)
        prepare = functools.partial(prepare_for_speed, precision=self.precision, compiled=compiled)
        prepare(whole)
        build = functools.partial(OPTIMIZERS["sgd"].build, **(momentum or {}))
        self.trainee = Trainee(whole, held or {}, lambda m: build(m, 0.01, 0.9, 1e-4), prepare, compact)
        self.model, self.loader = self.trainee.model, BatchLoader(data, batch, device, augment=True, flip=True)
        self.plain_order = BatchLoader(data, batch, device)
        self.recorder: Recorder = recorder_for(device, step)
        alive = {n: torch.ones_like(m) for n, m in (structure or {}).items()}
        self.passer = Passer(
            PENALTY,
            alive,
            structure or {},
            held=self.trainee.held,
            rate=LearningRate(0.01, EPOCHS, len(self.loader)),
            precision=self.precision,
            scale=LossScale(device) if self.precision == torch.float16 else None,
            recorder=self.recorder,
        )
        self.pruner = Pruner(self.model, PENALTY, self.passer) if structure else None

    def train(self) -> float:
        """One pass over the images; returns the mean loss."""
        meter = train(0, self.loader, self.model, self.criterion, self.trainee.optimizer, 0, self.passer, self.pruner)
        return meter.mean_loss

    def judge(self) -> float:
        """Accuracy of one pass over the images, in percent."""
        return validate_together(self.plain_order, self.model, self.criterion, ALONE, self.precision, self.recorder)

    def save(self) -> None:
        """Write a checkpoint as a run does: weights and the optimizer's state, to a file that is then forgotten."""
        state = {"state_dict": cloned_state(self.model), "optimizer": self.trainee.optimizer_state()}
        with tempfile.TemporaryDirectory() as folder:
            save_atomically(state, Path(folder, "checkpoint"))

    @property
    def recorded(self) -> str:
        """Whether the step is recorded, or why not."""
        if self.recorder.graphs is None:
            return "no"
        return next(("yes" if r.graph else r.given_up or "not yet" for r in self.recorder.recordings()), "not yet")
