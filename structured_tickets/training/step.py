"""A training step, and the judging of a batch, as functions without arguments that never wait for the device.

Run as they are, they are the loops of every device. On CUDA a `Recording` replays them instead: it records which
operations run, on which addresses, so nothing in them may depend on a Python number that changes from step to step,
nor on a value that the host would have to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _NormBase

from structured_tickets.base.distributed import World
from structured_tickets.data.loader import even_sizes
from structured_tickets.data.mixing import COLUMNS
from structured_tickets.networks.precision import exact_type
from structured_tickets.networks.together import together_of
from structured_tickets.training.forward import counts, forward
from structured_tickets.training.meter import Meter
from structured_tickets.training.optimization import (
    reads_numbers_on_the_device,
    set_learning_rate,
    with_momentum_from_zero,
)
from structured_tickets.training.penalty.act import apply_reg
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.recording import TOGETHER
from structured_tickets.training.tables import LR, PULL, SHARE, Batches, numbers_of_steps

Loader = Iterable[tuple[Tensor, Tensor]]


class Step:
    """A training step of one network: forward, backward, penalty, optimizer, held masks, sums.

    Attributes:
        source: The batches of an epoch.
        at: int64 [1]: number of the step in its epoch.
        table: Learning rate, pull and share of each step; see `numbers_of_steps`.
        together: Makes small operations of all layers at once; None: each layer makes its own.
        mixes: How each batch is mixed; see `Mixing.drawn`.
        lr, pull, share: The numbers of this step.
        sums: [3]: see `Meter`.
        bad: float32 []: 1 from the first step on whose loss was not finite. Then weights stay as they are.
        bad_steps: []: the number of steps of the epoch since then, that one included.
        skip: float32 []: 1 if this step may not change a weight: `bad`, or a gradient overflowed (see `LossScale`).
    """

    name = "the step"

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: optim.Optimizer,
        passer: Any,
        pruner: Pruner | None,
        source: Batches,
        batches: int,
        together: bool = False,
    ) -> None:
        """Args: `together`: make small operations of all layers at once, as suits steps that are recorded."""
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.together = together_of(model) if together else None
        taught = together and passer.distillation is not None
        self._of_teacher = together_of(passer.distillation.teacher) if taught else None
        self.passer, self.pruner, self.source, self.batches = passer, pruner, source, batches
        device = next(model.parameters()).device
        sums = exact_type(device)
        # Fused kernels read a learning rate of this type; on CPUs it gives the bits of a Python number.
        number = torch.float64 if device.type == "cpu" else torch.float32
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.table = torch.zeros(batches, 3, dtype=number, device=device)
        self._numbers = torch.zeros(1, 3, dtype=number, device=device)
        self.lr, self.pull, self.share = (self._numbers[0, column] for column in (LR, PULL, SHARE))
        self.sums = torch.zeros(3, dtype=sums, device=device)
        self.bad = torch.zeros((), dtype=torch.float32, device=device)
        self.skip = self.bad if passer.scale is None else torch.zeros_like(self.bad)
        self.bad_steps = torch.zeros((), dtype=sums, device=device)
        self.mixes = torch.zeros(batches, COLUMNS, dtype=sums, device=device)
        self._parameters = list(model.parameters())
        self._zeros: dict[int, Tensor] = {}
        self._reads_tensors = passer.rate is not None and reads_numbers_on_the_device(optimizer)
        with_momentum_from_zero(optimizer)
        self._began_at = self.addresses()

    def once(self) -> None:
        """Make the step whose number `at` is, and count it."""
        passer = self.passer
        torch.index_select(self.table, 0, self.at, out=self._numbers)
        image, target = self.source.fetch(self.at)
        wanted = target
        if (mixing := passer.mixing) is not None:
            sizes = self._sizes(len(target) - mixing.ahead) if mixing.ahead else ()
            image, target, wanted = mixing.mixed(image, target, self.mixes.index_select(0, self.at)[0], sizes)
        self.optimizer.zero_grad()
        seen = [self._learn(part, len(target)) for part in self._parts(image, target, wanted)]
        self._give_unreached_zeros()
        with torch.no_grad():
            self._count(seen[0] if len(seen) == 1 else torch.stack(seen).sum(0))
            self._unscale()
            self._clip()
            self._penalise()
        if self._reads_tensors or passer.scale is None or not self.skip:
            self.optimizer.step()
        if passer.scale is not None:
            passer.scale.update()
        if passer.held is not None:
            passer.held.apply()
        if passer.average is not None:
            passer.average.follow(self.share)
        self.at.add_(1)

    def _parts(self, *batch: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """A batch, or what this process has of each part of it: parts go through the network one after another."""
        sizes = self._sizes(len(batch[0]))
        return [batch] if len(sizes) == 1 else zip(*(values.split(sizes) for values in batch), strict=True)

    def _sizes(self, own: int) -> list[int]:
        """Return how many of a batch's images, of which this process has `own`, it has of each part."""
        most, world = self.passer.at_once, self.passer.world
        if not most:
            return [own]
        whole = even_sizes(world.images_of_all(own), most)
        return [count // world.size + (world.rank < count % world.size) for count in whole]

    def _learn(self, part: Sequence[Tensor], of: int) -> Tensor:
        """Add the gradients of some of a batch's `of` images; return what they count: see `Meter`."""
        (image, target, wanted), passer, world = part, self.passer, self.passer.world
        network = passer.network or self.model
        settings = (self.criterion, image, wanted, passer.precision, self.together)
        output, loss = forward(self.model, network, world, *settings)
        if passer.distillation is not None and len(target):
            loss = passer.distillation.added_to(loss, output, image, passer.precision, self._of_teacher)
        world.backward(loss if passer.scale is None else passer.scale.scaled(loss), len(target), of)
        with torch.no_grad():
            return counts(loss, output, target, self.sums.dtype)

    def _give_unreached_zeros(self) -> None:
        """No gradient would mean no decay and no penalty; parameters that the loss does not depend on get both."""
        unreached = [p for p in self._parameters if p.grad is None and p.requires_grad]
        for parameter in unreached:
            if id(parameter) not in self._zeros:
                self._zeros[id(parameter)] = torch.zeros_like(parameter)
            parameter.grad = self._zeros[id(parameter)]
        if unreached:  # the penalty of the last step is in them
            torch._foreach_zero_([self._zeros[id(p)] for p in unreached])

    def _count(self, own: Tensor) -> None:
        step = self.passer.world.total(own)
        self.sums.add_(step)
        self.bad.copy_((step[0] - step[0] + self.bad) != 0)  # the difference is 0, or NaN if a number is not finite
        self.bad_steps.add_(self.bad)

    def _unscale(self) -> None:
        if (scale := self.passer.scale) is not None:
            scale.unscale([p.grad for p in self._parameters if p.grad is not None])
            self.skip.copy_(torch.maximum(self.bad, scale.found))

    def _clip(self) -> None:
        """Scale down the gradient of the loss alone: the penalty comes on top of it."""
        if (most := getattr(self.passer.args, "clip_grad", None)) is not None:
            nn.utils.clip_grad_norm_(self._parameters, most, foreach=True)

    def _penalise(self) -> None:
        """As `apply_reg` does, with the number of this step."""
        if self.pruner is None:
            return
        if not self.pruner.is_plain:
            apply_reg(self.pruner, self.model, self.passer)
            return
        if getattr(self.passer.args, "block_loss_grad", False):
            self.pruner.block_gradient()
        self.pull.addcmul_(self.pull, self.skip, value=-1)
        self.pruner.pull(self.pull, self.passer.decoupled)

    @contextmanager
    def epoch(self, epoch: int, meter: Meter) -> Iterator[None]:
        """Stand at the beginning of an epoch, or where `meter` has got to in it; at the end, hand the sums to `meter`.

        Meanwhile the optimizer has its learning rate and `skip` from here, where it can read them on the device.
        """
        rate = self.passer.rate
        numbers = numbers_of_steps(rate, self.pruner, epoch, self.batches, self._pace(), self.passer.average)
        self.table.copy_(numbers.to(self.table.dtype))
        if self.passer.mixing is not None:
            self.mixes.copy_(self.passer.mixing.drawn(epoch, self.batches).to(self.mixes.dtype))
        self.at.fill_(meter.steps)
        self.sums.copy_(meter.sums)
        self.bad.zero_()
        self.bad_steps.zero_()
        meter.sums, first = self.sums, meter.steps
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if self._reads_tensors:
            self.optimizer.found_inf, self.optimizer.grad_scale = self.skip, None  # type: ignore[attr-defined]
            for group in groups:
                group["lr"] = self.lr
        try:
            yield
        finally:
            meter.sums = self.sums.clone()
            if self._reads_tensors:
                del self.optimizer.found_inf, self.optimizer.grad_scale  # type: ignore[attr-defined]
                for group, before in zip(groups, rates, strict=True):
                    group["lr"] = rate.at(epoch, meter.steps - 1) if meter.steps > first else before

    def set_learning_rate(self, lr: float) -> None:
        """For optimizers that take a Python number only."""
        if not self._reads_tensors:
            set_learning_rate(self.optimizer, lr)

    def first_bad(self) -> int | None:
        """Return the number, from 0, of the step of this epoch whose loss was not finite first; None: there is none.

        The host waits for the device.
        """
        since = int(self.bad_steps)
        return int(self.at) - since if since else None

    def left(self, epoch: int) -> int:
        """Return how many whole batches are left of a round, at least; `epoch`, from 0, is the current one."""
        rate = self.passer.rate
        return self.source.usual * max(1, rate.epochs - epoch) - self.passer.meter.steps if rate else 0

    def _pace(self) -> Any:
        passer = self.passer
        if not passer.decoupled:
            return None
        if not passer.paced:
            return lambda lr: 1.0
        return (lambda lr: lr / passer.rate.base) if passer.rate else (lambda lr: passer.lr_share)

    def addresses(self) -> list[int]:
        """The places of all that a step changes."""
        return [t.data_ptr() for tensors in self.changes().values() for t in tensors]

    def is_at_home(self) -> bool:
        """Return whether parameters and buffers still lie where they lay when this was made."""
        own = [*self.model.parameters(), *self.model.buffers()]
        return self._began_at[: len(own)] == [t.data_ptr() for t in own]

    def changes(self) -> dict[str, list[Tensor]]:
        """All that a step changes, by kind."""
        kinds: dict[str, list[Tensor]] = {
            "weights": [p.detach() for p in self.model.parameters()],
            "buffers": list(self.model.buffers()),
        }
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    kinds.setdefault(f"optimizer's {key}", []).append(value)
        if self.passer.average is not None:
            kinds["average"] = self.passer.average.values
        kinds["sums"] = [self.sums]
        kinds["place"] = [self.at, self.bad, self.bad_steps, self._numbers, self.skip]
        if (scale := self.passer.scale) is not None:
            kinds["place"] += [scale.scale, scale.calm, scale.found]
        return kinds

    def obstacle(self) -> str:
        """The reason why the step cannot be recorded, as far as it is known beforehand; "" if there is none."""
        passer, optimizer = self.passer, self.optimizer
        if passer.world.size > 1:
            return TOGETHER
        if self.pruner is not None and not self.pruner.is_plain:
            return "the penalty's strengths have been read or changed weight by weight"
        if not self._reads_tensors:
            return f"{type(optimizer).__name__} is not one of torch's fused optimizers, or sets its own learning rate"
        if any(isinstance(m, _NormBase) and m.momentum is None and m.training for m in self.model.modules()):
            return "a BatchNorm without momentum counts its batches on the host"
        return ""

    def stay_as_it_is(self) -> bool:
        """See `Recordable`."""
        before, self.together, self._of_teacher = self.together or self._of_teacher, None, None
        return before is not None

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """See `Recordable`."""
        before, self.together, self._of_teacher = (self.together, self._of_teacher), None, None
        yield
        self.together, self._of_teacher = before

    def forget_gradients(self) -> None:
        """So that a recording makes its own."""
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def being_recorded(self) -> Iterator[None]:
        """While it lasts, Adam and AdamW let themselves be recorded, which they refuse otherwise."""
        groups = [group for group in self.optimizer.param_groups if "capturable" in group]
        before = [group["capturable"] for group in groups]
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group, was in zip(groups, before, strict=True):
                group["capturable"] = was


class Evaluation:
    """The judging of one batch, in evaluation mode.

    Attributes: as those of `Step`.
    """

    name = "the evaluation"

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        world: World,
        precision: torch.dtype,
        source: Batches,
        together: bool = False,
    ) -> None:
        self.model, self.criterion, self.world, self.precision = model, criterion, world, precision
        self.together = together_of(model) if together else None
        self.source = source
        device = next(model.parameters()).device
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.sums = torch.zeros(3, dtype=exact_type(device), device=device)
        self._began_at = self.addresses()

    @torch.no_grad()
    def once(self) -> None:
        """Judge the batch whose number `at` is, and count it."""
        image, target = self.source.fetch(self.at)
        settings = (self.criterion, image, target, self.precision, self.together)
        output, loss = forward(self.model, self.model, self.world, *settings)
        self.sums.add_(counts(loss, output, target, self.sums.dtype))
        self.at.add_(1)

    def begin(self) -> None:
        """Stand at the first batch, with nothing counted."""
        self.at.zero_()
        self.sums.zero_()

    def addresses(self) -> list[int]:
        """The places of parameters and buffers."""
        return [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]

    def is_at_home(self) -> bool:
        """See `Step`."""
        return self._began_at == self.addresses()

    def changes(self) -> dict[str, list[Tensor]]:
        """See `Step`."""
        return {"sums": [self.sums], "place": [self.at]}

    def obstacle(self) -> str:
        """See `Step`."""
        return TOGETHER if self.world.size > 1 else ""

    def stay_as_it_is(self) -> bool:
        """See `Recordable`."""
        before, self.together = self.together, None
        return before is not None

    @contextmanager
    def as_it_is(self) -> Iterator[None]:
        """See `Recordable`."""
        before, self.together = self.together, None
        yield
        self.together = before

    def forget_gradients(self) -> None:
        """There are none."""

    def being_recorded(self) -> nullcontext:
        """Nothing has to be let."""
        return nullcontext()
