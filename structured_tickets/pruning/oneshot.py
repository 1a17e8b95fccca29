"""One-shot pruners: score every prunable weight of a network once, keep the best.

`PRUNERS` holds them for the runner; the documents' functions `prune_<name>` are thin callers. The model that is given
is left as it was, except by `prune_admm`, which trains it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.overrides import TorchFunctionMode

from structured_tickets.base.errors import UsageError
from structured_tickets.base.modes import freeze_statistics, in_mode, set_mode
from structured_tickets.base.text_tables import counted
from structured_tickets.networks.kernels import fused_attention, uncompiled
from structured_tickets.networks.precision import computing
from structured_tickets.pruning.masks import (
    Mask,
    as_current,
    called_with,
    count_ones,
    effective_state,
    in_place_of,
    own_mask,
    top_mask,
)
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import parameter_of, ranked_names

log = logging.getLogger("rsst")

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]

GRASP_TEMPERATURE = 200
SYNFLOW_ROUNDS = 100
ADDED = ("bias", "running_mean")
ADMM_EPOCHS = 20
ADMM_RHO = 0.01


@dataclass(frozen=True)
class Admm:
    """Settings of ADMM's training.

    Attributes:
        epochs: How often weights and their projection take turns.
        rho: Strength of the pull towards the projection, at least 0.
        optimizer: Model -> its optimizer.
        batches: Epoch, from 0 -> the training batches.
        load: What the last call of `save` was given, or nothing; a training that was broken off goes on from there.
        save: Called after every epoch.
        precision: Number type of matrix products; in place of float16, float32.
        freeze_bn: BatchNorm keeps its statistics.
    """

    optimizer: Callable[[nn.Module], optim.Optimizer]
    batches: Callable[[int], Batches]
    epochs: int = ADMM_EPOCHS
    rho: float = ADMM_RHO
    load: Callable[[], dict[str, Any]] = dict
    save: Callable[[dict[str, Any]], None] = lambda _: None
    precision: torch.dtype = torch.float32
    freeze_bn: bool = False


@dataclass(frozen=True)
class Task:
    """Everything that a one-shot pruner is given.

    Attributes:
        model: The network; its own weights are not looked at.
        weights: The state dict that is scored, under plain names.
        names: Parameters that are pruned.
        keep: How many of their weights stay.
        batches: (images, labels) of the training set.
        loss: (logits, labels) -> scalar.
        alive: Parameter name -> 0/1; what is 0 is gone already. None: everything is a candidate.
        seed: Of the random pruner.
        admm: How ADMM trains.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    names: Sequence[str]
    keep: int
    batches: Batches = ()
    loss: Loss = field(default_factory=nn.CrossEntropyLoss)
    alive: Mask | None = None
    seed: int = 0
    admm: Admm | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def best(self, scores: Mapping[str, Tensor]) -> Mask:
        """The weights with the highest scores, of equals the first: a mask by parameter name, on the CPU."""
        return {n: m.cpu() for n, m in top_mask(scores, self.alive, self.keep).items()}

    def leaves(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A private copy of the state for `functional_call`, and its leaves that want a gradient."""
        values = {k: v.detach().clone().to(self.device) for k, v in self.weights.items()}
        leaves = {n: values[n].requires_grad_() for n in self.names}
        return in_place_of(self.model, values), leaves


def _slopes(value: Tensor, leaves: Mapping[str, Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Gradients, of zero for weights that the value does not depend on."""
    return torch.autograd.grad(value, list(leaves.values()), create_graph=create_graph, materialize_grads=True)


def _gradients(
    task: Task, state: dict[str, Tensor], leaves: dict[str, Tensor], temperature: float = 1.0
) -> list[Tensor]:
    """Gradient of the loss summed over the batches, with respect to `leaves`."""
    total = [torch.zeros_like(leaf) for leaf in leaves.values()]
    for images, labels in task.batches:
        output = called_with(task.model, state, (images.to(task.device),)) / temperature
        parts = _slopes(task.loss(output, labels.to(task.device)), leaves)
        total = [t + p for t, p in zip(total, parts, strict=True)]
    return total


def _snip(task: Task) -> Mask:
    """|gradient * weight| (Lee et al. 2019, eq. 5)."""
    with _mode(task.model, training=True):
        state, leaves = task.leaves()
        gradients = _gradients(task, state, leaves)
    return task.best({n: (g * w).detach().abs() for (n, w), g in zip(leaves.items(), gradients, strict=True)})


def _grasp(task: Task) -> Mask:
    """Remove the weights with the largest -w * Hg, which hinder the gradient flow (Wang et al. 2020, eq. 8)."""
    with _mode(task.model, training=True), fused_attention(task.model, False):
        return task.best(grasp_scores(task))


def grasp_scores(task: Task) -> dict[str, Tensor]:
    """w * Hg of each weight, g the gradient of the loss at a temperature of 200, H its Hessian; the higher stays."""
    state, leaves = task.leaves()
    flow = [g.detach() for g in _gradients(task, state, leaves, GRASP_TEMPERATURE)]
    product = [torch.zeros_like(leaf) for leaf in leaves.values()]
    for images, labels in task.batches:
        output = called_with(task.model, state, (images.to(task.device),)) / GRASP_TEMPERATURE
        loss = task.loss(output, labels.to(task.device))
        slopes = _slopes(loss, leaves, create_graph=True)
        inner = sum((s * f).sum() for s, f in zip(slopes, flow, strict=True))
        parts = _slopes(inner, leaves)  # type: ignore[arg-type]
        product = [t + p for t, p in zip(product, parts, strict=True)]
    return {n: (w * h).detach() for (n, w), h in zip(leaves.items(), product, strict=True)}


def _synflow(task: Task) -> Mask:
    """100 rounds, each keeping the same share of what is left, without data (Tanaka et al. 2020, algorithm 1)."""
    alive = task.alive or {n: torch.ones_like(task.weights[n]) for n in task.names}
    masks = {n: m.double().to(task.device) for n, m in alive.items()}
    shape = next(iter(task.batches))[0].shape[1:]
    left = count_ones(masks, task.names)
    with _mode(task.model, training=False), fused_attention(task.model, True), _Linear():
        for k in range(1, SYNFLOW_ROUNDS + 1):
            keep = round(left * (task.keep / left) ** (k / SYNFLOW_ROUNDS)) if task.keep else 0
            keep = max(task.keep, keep) if k < SYNFLOW_ROUNDS else task.keep
            scores = synflow_scores(task, masks, shape)
            silent = [n for n, s in scores.items() if bool(masks[n].any()) and not bool(s.any())]
            if k == 1 and silent:
                log.warning(
                    "SynFlow: nothing flows through %d of %s, such as %s. They lose all weights first",
                    len(silent),
                    counted(len(scores), "layer"),
                    silent[0],
                )
            masks = {n: m.double() for n, m in top_mask(scores, masks, keep).items()}
    return {n: m.float().cpu() for n, m in masks.items()}


def synflow_scores(task: Task, masks: Mapping[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
    """|gradient * weight| of the summed output of the all-positive network for an image of ones, float64.

    What is added to a signal (biases, running means) is left out, as it is zero in a network that has just been
    initialised. Else it would feed the layers behind it, and those before it could be emptied.

    Args:
        masks: Parameter name -> float64 0/1.
        shape: Of an image.

    Raises:
        UsageError: The scores are not finite.
    """
    values = {k: v.detach().to(task.device) for k, v in task.weights.items()}
    for name, value in values.items():
        if value.is_floating_point():
            values[name] = torch.zeros_like(value).double() if name.endswith(ADDED) else value.abs().double()
    leaves = {n: (values[n] * masks[n]).requires_grad_() for n in task.names}
    ones = torch.ones(1, *shape, dtype=torch.float64, device=task.device)
    output = called_with(task.model, in_place_of(task.model, values | leaves), (ones,)).sum()
    gradients = _slopes(output, leaves)
    scores = {n: (g * w).detach().abs() for (n, w), g in zip(leaves.items(), gradients, strict=True)}
    if not all(bool(s.isfinite().all()) for s in scores.values()):
        raise UsageError(
            f"SynFlow: the flow through {type(task.model).__name__} is not finite; choose another --struct"
        )
    return scores


def _omp(task: Task) -> Mask:
    """One-shot magnitude pruning: |weight|. Reads no data."""
    return task.best({n: task.weights[n].detach().abs() for n in task.names})


def _random(task: Task) -> Mask:
    """The baseline. Reads no data; at every density the same order."""
    draw = torch.Generator().manual_seed(task.seed)
    return task.best({n: torch.rand(task.weights[n].shape, generator=draw) for n in task.names})


def _admm(task: Task) -> Mask:
    """Train a copy towards the nearest network of the wanted sparsity, then cut."""
    assert task.admm is not None
    model = copy.deepcopy(task.model)
    with torch.no_grad():
        model.load_state_dict({k: v.to(task.device) for k, v in task.weights.items()})
    return train_by_admm(model, task, task.admm)


def train_by_admm(model: nn.Module, task: Task, admm: Admm) -> Mask:
    """Train `model` by ADMM (Zhang et al. 2018, section 3); returns the mask of its largest weights.

    Alternates epochs on loss + rho/2 * ||W - Z + U||^2 with Z = projection of W + U onto the wanted number of non-zeros
    and U += W - Z.
    """
    set_mode(model, True)
    if admm.freeze_bn:
        freeze_statistics(model)
    weights = {n: parameter_of(model, n) for n in task.names}
    # Small gradients are zero in float16, and the distance below has a gradient that must not be scaled with theirs.
    precision = torch.float32 if admm.precision == torch.float16 else admm.precision
    dual = {n: torch.zeros_like(w) for n, w in weights.items()}
    target = _project(task, {n: w.detach() for n, w in weights.items()})
    optimizer = admm.optimizer(model)
    done = admm.load()
    if done:
        model.load_state_dict(done["state_dict"])
        optimizer.load_state_dict(done["optimizer"])
        dual, target = ({n: v.to(task.device) for n, v in done[k].items()} for k in ("dual", "target"))
    for epoch in range(done.get("epochs", 0), admm.epochs):
        loss = torch.zeros(())
        for images, labels in admm.batches(epoch):
            with computing(model, precision):
                output = model(images.to(task.device))
            distance = sum((w - target[n] + dual[n]).square().sum() for n, w in weights.items())
            loss = task.loss(output.float(), labels.to(task.device))
            objective = loss + admm.rho / 2 * distance
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
        target = _project(task, {n: w.detach() + dual[n] for n, w in weights.items()})
        dual = {n: dual[n] + w.detach() - target[n] for n, w in weights.items()}
        far = sum(float((w.detach() - target[n]).square().sum()) for n, w in weights.items())
        norm = sum(float(w.detach().square().sum()) for w in weights.values())
        log.info(
            "ADMM epoch %3d of %d: loss %.4f, %.1f%% of the weights' norm to be cut",
            epoch,
            admm.epochs,
            float(loss.detach()),
            100 * (far / norm) ** 0.5,
        )
        admm.save(
            {
                "epochs": epoch + 1,
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "dual": dual,
                "target": target,
            }
        )
    return task.best({n: w.detach().abs() for n, w in weights.items()})


def _project(task: Task, values: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = task.best({n: v.abs() for n, v in values.items()})
    return {n: v * masks[n].to(v.device) for n, v in values.items()}


PRUNERS: dict[str, Callable[[Task], Mask]] = {
    "snip": _snip,
    "grasp": _grasp,
    "synflow": _synflow,
    "omp": _omp,
    "random": _random,
    "admm": _admm,
}
"""Name -> what makes a mask (by parameter name) of a task."""


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All layers in one mode, uncompiled; buffers are not the model's own, since `functional_call` is used."""
    with in_mode(model, training), uncompiled():
        yield


class _Linear(TorchFunctionMode):
    """While it is on, a network of positive weights is linear in a positive image, and so are its layers.

    ReLU's relatives are the identity. A normalisation scales and shifts, as BatchNorm does in eval mode: dividing by a
    layer's own size would make the flow through all that is in front of it zero in sum. Attention averages its queries,
    keys and values over the tokens: softmax hides the scale of queries and keys, so that they would have no score and
    go first. A gate (sigmoid) is 1, which it would be for so large a signal, and yet grows with what makes it.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _averaging_attention(*args[:3])
        if func in NORMS and not (func is F.batch_norm and args[1] is not None):
            named = dict(zip(NORMS[func], args, strict=False)) | kwargs
            return _scaled(args[0], named.get("weight"), named.get("bias"), func not in (F.layer_norm, F.rms_norm))
        if func in IDENTITIES or (
            func is F.hardtanh and (args[1] if len(args) > 1 else kwargs.get("min_val", -1)) == 0
        ):
            return args[0]
        if func in GATES:
            value = args[0].detach()
            return torch.where(value > 0, args[0] / value.where(value > 0, 1), 1)
        outcome = func(*args, **kwargs)
        return outcome.detach() if func in SOFTMAX else outcome


# The functions that `_Linear` replaces; of a normalisation, the names of its arguments.
NORMS: dict[Any, tuple[str, ...]] = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias"),
    F.rms_norm: ("input", "normalized_shape", "weight"),
    F.group_norm: ("input", "num_groups", "weight", "bias"),
    F.instance_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),  # without running statistics
}
IDENTITIES = (F.gelu, F.silu, F.hardswish, F.mish, F.relu6, Tensor.float, Tensor.half, Tensor.bfloat16)
GATES = (torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, F.hardsigmoid)
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


def _averaging_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    total = values.mean(-2, keepdim=True)
    if queries.shape[-1] == keys.shape[-1] == values.shape[-1]:
        total = total + queries.mean(-2, keepdim=True) + keys.mean(-2, keepdim=True)
    return total.expand(*queries.shape[:-1], -1)


def _scaled(value: Tensor, weight: Tensor | None, bias: Tensor | None, channels_first: bool) -> Tensor:
    if channels_first:
        shape = (-1, *[1] * (value.ndim - 2))
        weight, bias = (v if v is None else v.view(shape) for v in (weight, bias))
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _by_rate(
    model: nn.Module, batches: Batches, loss: Loss | None, rate: float, make: Callable[[Task], Mask], seed: int = 0
) -> Mask:
    """The documents' interface: remove the share `rate` of the weights that are not masked yet."""
    names = ranked_names(model, unit_groups(model))
    alive = {n: own_mask(model, n) for n in names}
    left = count_ones(alive, names)
    weights = effective_state(model.state_dict())
    task = Task(model, weights, names, left - round(left * rate), batches, loss or nn.CrossEntropyLoss(), alive, seed)
    device = next(model.parameters()).device
    return as_current({n: m.to(device) for n, m in make(task).items()})


def prune_snip(model: nn.Module, train_loader: Batches, loss: Loss, rate: float) -> Mask:
    """SNIP: |gradient * weight|, the gradient summed over the loader (Lee et al. 2019, eq. 5).

    Returns:
        `"<layer>.weight_mask"` -> 0/1, the share `rate` of the prunable weights at 0. So do the functions below.
    """
    return _by_rate(model, train_loader, loss, rate, _snip)


def prune_grasp(model: nn.Module, train_loader: Batches, loss: Loss, rate: float) -> Mask:
    """GraSP: remove the weights with the largest -w * Hg, which hinder the gradient flow (Wang et al. 2020, eq. 8)."""
    return _by_rate(model, list(train_loader), loss, rate, _grasp)


def prune_synflow(model: nn.Module, train_loader: Batches, loss: Loss | None, rate: float) -> Mask:
    """SynFlow: 100 rounds of |gradient * weight| of the summed output of the all-positive network on ones.

    Data-free: `train_loader` only tells the input's shape, `loss` is not used (Tanaka et al. 2020, algorithm 1).
    """
    return _by_rate(model, train_loader, loss, rate, _synflow)


def prune_omp(model: nn.Module, train_loader: Batches, loss: Loss | None, rate: float) -> Mask:
    """One-shot magnitude pruning: |weight|. Reads no data."""
    return _by_rate(model, train_loader, loss, rate, _omp)


def prune_rp(model: nn.Module, train_loader: Batches, loss: Loss | None, rate: float) -> Mask:
    """Random pruning, from torch's global generator: the baseline. Reads no data."""
    return _by_rate(model, train_loader, loss, rate, _random, int(torch.randint(2**31, ())))


def prune_admm(model: nn.Module, train_loader: Batches, loss: Loss, rate: float, optimizer: optim.Optimizer) -> Mask:
    """ADMM: train the model towards the nearest network of the wanted sparsity, then cut (see `train_by_admm`)."""
    admm = Admm(lambda _: optimizer, lambda _: train_loader)
    return _by_rate(model, train_loader, loss, rate, lambda task: train_by_admm(model, task, admm))
