"""Several processes that train one network (torchrun): who they are, and what they tell each other.

Every process does the same steps on its share of each batch. The first one reads, decides and writes; the others are
told. A program that torchrun has not started is a world of one, and pays nothing for any of this.
"""

from __future__ import annotations

import io
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from structured_tickets.base.console import rank_here, started_by_torchrun
from structured_tickets.base.errors import PeerLostError, RunError, first_line

# The others wait while the first one decides, and ADMM trains meanwhile. Whoever has died is noticed by torchrun.
PATIENCE = timedelta(hours=24)
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: This one's number, from 0.
        size: How many there are.
        local_rank: This one's number on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def join() -> World:
        """The world that torchrun has started this process in, or one of its own.

        Raises:
            PeerLostError: The others cannot be reached.
        """
        rank, size = rank_here(), int(os.environ.get("WORLD_SIZE", "1")) if started_by_torchrun() else 1
        if size == 1:
            return World()
        # The gradient of an expanded parameter (class token); it costs a copy of a few numbers.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with _talking():
            store, _, _ = next(dist.rendezvous("env://", rank, size))
            dist.init_process_group(
                backend, store=own_names(store, rank, size), rank=rank, world_size=size, timeout=PATIENCE
            )
        return World(rank, size, int(os.environ["LOCAL_RANK"]))

    def leave(self) -> None:
        """Say goodbye; what is still under way is given up."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """True for rank 0, which reads, decides and writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return values
        values = values.clone()
        with _talking():
            dist.all_reduce(values)
        return values

    def highest(self, values: Tensor) -> Tensor:
        """The largest of all processes, entry by entry."""
        if self.size == 1:
            return values
        values = values.clone()
        with _talking():
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def backward(self, loss: Tensor, images: int, of: int) -> None:
        """Backward pass of the mean loss of some of this process's images, counted as the share of the batch they are.

        After those of all its images the gradients are those of the mean over the whole batch (`parallel` takes the
        mean over processes).

        Args:
            of: Images of the batch that this process has.
        """
        whole = self.images_of_all(of)
        if self.size * images != whole:
            loss = loss * (self.size * images / whole)
        loss.backward()

    def images_of_all(self, images: int) -> int:
        """Return how many images all processes have together."""
        return int(self.total(torch.tensor(images))) if self.size > 1 else images

    def share(self, value: Any) -> Any:
        """Return the value of rank 0 (tensors and plain values); what the others pass is ignored."""
        if self.size == 1:
            return value
        packed = _pack(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(packed)])
        with _talking():
            dist.broadcast(length, 0)
            packed = packed if self.is_first else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(packed, 0)
        return value if self.is_first else _unpack(packed)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank: tensors and plain values."""
        if self.size == 1:
            return [value]
        packed = _pack(value)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with _talking():
            dist.all_gather(lengths, torch.tensor([len(packed)]))
            longest = int(max(lengths))
            padded = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(padded, F.pad(packed, (0, longest - len(packed))))
        return [_unpack(p[: int(n)]) for p, n in zip(padded, lengths, strict=True)]

    def check_agreement(self, what: str, digest: str) -> None:
        """Compare what should be the same in all processes, by its hash.

        Raises:
            RunError: It is not; the message names `what` and the processes.
        """
        digests = self.gather(digest)
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            named = f"{'rank' if len(others) == 1 else 'ranks'} {', '.join(map(str, others))}"
            raise RunError(f"the processes differ in {what}: not equal to rank 0: {named}")

    def parallel(self, model: nn.Module, images: Tensor) -> nn.Module:
        """Wrap a network for its forward pass, so that gradients become the mean over all processes.

        Args:
            images: A few, to find out by whether the logits depend on all parameters.
        """
        if self.size == 1:
            return model
        leaves_out = leaves_parameters_out(model, images)
        with warnings.catch_warnings(), _talking():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions call `broadcast_buffers` otherwise
            # Statistics of BatchNorm are the same everywhere already.
            return nn.parallel.DistributedDataParallel(
                model,
                device_ids=[images.device] if images.device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=leaves_out,
            )

    def over_whole_batches(self, model: nn.Module, counts: bool = True) -> AbstractContextManager[Any]:
        """While it lasts, BatchNorm in training mode takes its statistics over the shares of all processes.

        Args:
            counts: Whether what this process computes is part of the batch.
        """
        return _WholeBatches(counts) if self.size > 1 and has_batchnorm(model) else nullcontext()


ALONE = World()


def own_names(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Return a part of the store, with a key prefix that is unique to this launch attempt.

    torchrun reuses one store for all attempts, so restarted ranks would read the addresses of ended ones (pytorch issue
    135712), and its count of restarts may differ between machines. Rank 0 draws a name and sends it to every rank that
    asks, until all have confirmed it.
    """
    mine = secrets.token_hex(8)
    if rank:
        store.set(f"hello {rank}", mine)
        name = store.get(f"welcome {mine}").decode()  # waits for it
        store.set(f"{name} {rank}", "here")
        return dist.PrefixStore(name, store)
    missing = list(range(1, size))
    while missing:
        for other in missing:
            if store.check([f"hello {other}"]):  # a predecessor's, perhaps: then another follows
                store.set(f"welcome {store.get(f'hello {other}').decode()}", mine)
        missing = [other for other in missing if not store.check([f"{mine} {other}"])]
        time.sleep(POLL_SECONDS)
    return dist.PrefixStore(mine, store)


def has_batchnorm(model: nn.Module) -> bool:
    """Return whether the result of an image depends on the others of its batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def leaves_parameters_out(model: nn.Module, images: Tensor) -> bool:
    """Return whether the logits do not depend on some trainable parameters. The model is left as it was."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        logits = torch.func.functional_call(model, {**parameters, **buffers}, (images,))
    slopes = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
    return any(slope is None for slope in slopes)


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_about_peers(error):
            raise lost(error) from error
        raise


def lost(error: Exception) -> PeerLostError:
    """An error of the collective operations, as one line."""
    reason = first_line(error)
    return PeerLostError(f"lost another process of this run ({reason}). Run the same command again to continue")


def is_about_peers(error: Exception) -> bool:
    """Return whether an error comes from the collective operations, which have no error class of their own on CPUs."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def _pack(value: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpack(packed: Tensor) -> Any:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)


class _WholeBatches(TorchFunctionMode):
    """Replaces BatchNorm in training mode wherever a network calls it; torch's own SyncBatchNorm is for GPUs only."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        return _batch_norm(self.counts, **given) if given.get("training") else func(*args, **kwargs)


def _batch_norm(
    counts: bool,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    channels = input.shape[1]
    weight = input.new_ones(channels) if weight is None else weight
    bias = input.new_zeros(channels) if bias is None else bias
    output, mean, squares, count = _Normalised.apply(input, weight, bias, eps, counts)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((squares / (count - 1)).to(running_var.dtype), momentum)
    return output


class _Normalised(torch.autograd.Function):
    """(x - mean) / std * weight + bias, mean and standard deviation being those of all processes' x together.

    Ioffe and Szegedy (2015), algorithm 1; means and squares of shares are joined by the formula of Chan et al. (1979),
    which does not cancel. A share that does not count is normalised, and changes nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, counts: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        values, others, exact = x.to(kind), [d for d in range(x.ndim) if d != 1], torch.float64
        count = x.numel() // x.shape[1] if counts else 0
        mean = values.mean(others, dtype=exact)
        squares = (values - _along(mean.to(kind), x)).square().sum(others, dtype=exact) * counts
        own = torch.cat([mean.new_tensor([count]), mean, squares])
        shares = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, own)
        if sum(int(share[0]) for share in shares) <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
        sizes, means, parts = torch.stack(shares).split([1, len(mean), len(mean)], dim=1)
        total = sizes.sum()
        mean = (sizes * means).sum(0) / total
        squares = parts.sum(0) + (sizes * (means - mean).square()).sum(0)
        scale = (squares / total + eps).rsqrt().to(kind)
        normal = (values - _along(mean.to(kind), x)) * _along(scale, x)
        ctx.save_for_backward(normal, weight, scale, total)
        ctx.counts = counts
        output = (normal * _along(weight.to(kind), x) + _along(bias.to(kind), x)).to(x.dtype)
        ctx.mark_non_differentiable(mean, squares, total)
        return output, mean, squares, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        normal, weight, scale, total = ctx.saved_tensors
        values, others = slope.to(normal.dtype), [d for d in range(slope.ndim) if d != 1]
        exact = torch.float64
        own = torch.stack([values.sum(others, dtype=exact), (values * normal).sum(others, dtype=exact)])
        sums = own.clone()
        dist.all_reduce(sums)
        means = (sums / total).to(values.dtype)
        centred = values - _along(means[0], slope) - normal * _along(means[1], slope)
        inner = (centred * _along(scale * weight.to(normal.dtype), slope) * ctx.counts).to(slope.dtype)
        return inner, own[1].to(weight.dtype), own[0].to(weight.dtype), None, None


def _along(values: Tensor, x: Tensor) -> Tensor:
    """One value for each channel, in a shape that goes with x [batch, channels, ...]."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
