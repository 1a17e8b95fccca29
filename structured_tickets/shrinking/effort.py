"""Estimate how long a network computes, from what it does: calls, numbers that are moved, multiplications."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from structured_tickets.base.modes import in_mode
from structured_tickets.networks.kernels import encoders_in_steps
from structured_tickets.networks.layers import channels_side_by_side

IMAGES = 16
"""Images of a batch: they share the calls and the weights."""


class Cost(NamedTuple):
    """Time (ns) that an operation takes: to begin, for each number read or written, each weight, each multiplication.

    Fitted to the time that each operation took in 46 networks, whole and smaller ones: 16 images, float32, one core of
    an AMD EPYC with AVX-512, in a process that keeps its memory.
    """

    call: float
    number: float
    weight: float = 0.06
    multiplication: float = 0.0


VIEW, PYTHON = 3_000, 2_500
"""Time (ns) that a view takes, and that a module's Python code takes for each other operation."""
OTHERWISE = Cost(3_000, 0.06)
"""Cost of an operation that is not in the table."""
IN_PLACE = Cost(2_000, 0.03)
LINEAR = Cost(4_000, 0.09, 0.27, 0.018)
ATTENTION = Cost(5_000, 0.5, multiplication=0.02)
COSTS = {
    "convolution": Cost(57_000, 0.1, 0.68, 0.0079),  # puts its weights in another order before it computes
    "mkldnn_rnn_layer": Cost(57_000, 9.0),
    "addmm": LINEAR,
    "mm": LINEAR,
    "bmm": LINEAR._replace(number=0.34),
    "baddbmm": LINEAR._replace(number=0.34),
    "_scaled_dot_product_flash_attention_for_cpu": ATTENTION,
    "native_batch_norm": Cost(15_000, 0.09, 1.0),
    "native_layer_norm": Cost(8_000, 0.25),
    "gelu": Cost(6_500, 0.21),
    "silu": Cost(6_500, 0.21),
    "_softmax": Cost(12_000, 0.3),
    "max_pool2d_with_indices": Cost(14_000, 0.32),
    "mean": Cost(30_000, 0.05),
    "linalg_vector_norm": Cost(5_000, 0.95),
    "var": Cost(5_000, 6.0),
    "median": Cost(5_000, 6.0),
    "index": Cost(8_000, 2.3),
    "index_select": Cost(8_000, 0.1),
    "constant_pad_nd": Cost(11_000, 0.07),
    "cat": Cost(7_000, 0.075),
    "add_": IN_PLACE,
    "relu_": IN_PLACE,
    "hardtanh_": IN_PLACE,
    "_fft_c2c": Cost(5_000, 1.3),
}
"""The same of operations by their names in `torch.ops.aten`."""
LANES = 16
"""Outputs that a convolution computes together, whether there are that many or not."""


class Machine(NamedTuple):
    """A kind of machine that an estimate is for.

    Attributes:
        costs, otherwise: Cost of operations by their names, and of those without a name in the table.
        call: Time (ns) that each operation takes besides, and a view.
        images: Of a batch: they share calls and weights.
        lanes: Outputs that a convolution computes together.
    """

    costs: Mapping[str, Cost]
    otherwise: Cost
    call: tuple[float, float]
    images: int
    lanes: int


PROCESSOR = Machine(COSTS, OTHERWISE, (PYTHON, VIEW), IMAGES, LANES)

PER_NUMBER, PER_MULTIPLICATION, KERNEL = 2 / 2_700, 2 / 450_000, 2_000
"""Time (ns) that a card takes to move two bytes, at 2.7 TB/s, and to multiply and add, at 450 TFLOP/s; and a kernel."""
_MOVED = Cost(0, PER_NUMBER, PER_NUMBER)
CARD = Machine(
    {
        **{name: _MOVED._replace(multiplication=PER_MULTIPLICATION) for name in ("convolution", "addmm", "mm", "bmm")},
        "native_batch_norm": _MOVED._replace(number=1.5 * PER_NUMBER),  # reads its input twice
        "index_select": _MOVED._replace(number=3 * PER_NUMBER),  # its threads read numbers that do not lie together
        "index": _MOVED._replace(number=3 * PER_NUMBER),
    },
    _MOVED,
    (KERNEL, 0),
    128,
    8,
)
"""A large card of 2023 or later with recorded steps in bfloat16. Taken from its data sheet, not measured."""


class _Meter(TorchDispatchMode):
    """Add up the effort of all operations.

    Args:
        weights: Where the memory of parameters begins.
    """

    def __init__(self, weights: Collection[int], machine: Machine) -> None:
        super().__init__()
        self.weights, self.machine, self.effort = weights, machine, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, (costs, otherwise, (call, view), images, lanes) = kwargs or {}, self.machine
        out = func(*args, **kwargs)
        if func.is_view:
            self.effort += view / images
            return out
        kind, cost = func._overloadpacket, costs.get(func._overloadpacket.__name__, otherwise)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        weights = sum(t.numel() for t in tensors if _memory_of(t) in self.weights)
        moved = sum(t.numel() for t in tensors) - weights
        self.effort += (call + cost.call + cost.weight * weights) / images + cost.number * moved
        if kind in flop_registry:
            multiplications = flop_registry[kind](*args, **kwargs, out_val=out) / 2
            if kind is torch.ops.aten.convolution:
                multiplications *= _in_lanes(lanes, *args)
            self.effort += cost.multiplication * multiplications
        return out


def _in_lanes(lanes: int, images: Tensor, weight: Tensor, *more: Any) -> float:
    """Return how many outputs a convolution computes for each that there is."""
    *_, transposed, _, groups = more
    outputs = weight.shape[1] if transposed else weight.shape[0] // groups
    together = groups if outputs == weight.shape[1] == 1 else outputs
    return -(-together // lanes) * lanes / together


def _memory_of(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


@torch.no_grad()
def effort_of(network: nn.Module, image: Sequence[int], machine: Machine = PROCESSOR) -> float:
    """Return about how long (ns) a network takes for one image of a batch, on the processor of `Cost` or another one.

    The machine is not measured: the same network has the same effort everywhere.

    Args:
        image: (channels, height, width).
    """
    network = channels_side_by_side(copy.deepcopy(network))
    like = next(network.parameters())
    images = torch.ones(1, *image, device=like.device, dtype=like.dtype)
    weights = {_memory_of(p) for p in network.parameters()}
    with in_mode(network, training=False), encoders_in_steps(), _Meter(weights, machine) as meter:
        network(images)
    return meter.effort
