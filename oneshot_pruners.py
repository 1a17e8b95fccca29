"""One-shot pruners: score every convolution weight once, keep the best; each returns `"<layer>.weight_mask"` -> 0/1.

The model that is given is left as it was, except by `prune_admm`, which trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn, optim
from torch.func import functional_call

from masks import Mask, count_ones, current_key, effective_state, in_place_of, own_mask, top_mask
from units import channel_groups, parameter_of, ranked_names

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]

GRASP_TEMPERATURE = 200
SYNFLOW_ROUNDS = 100
ADMM_EPOCHS = 20
ADMM_RHO = 0.01


def _prunable(model: nn.Module) -> list[str]:
    return ranked_names(model, channel_groups(model))


def _keep(model: nn.Module, scores: Mapping[str, Tensor], rate: float) -> Mask:
    """Remove the share `rate` of the weights that are not masked yet, the lowest scores first."""
    alive = {n: own_mask(model, n) for n in scores}
    left = count_ones(alive, scores)
    return {current_key(n): m for n, m in top_mask(scores, alive, left - round(left * rate)).items()}


def _leaves(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A private copy of the model's state for `functional_call`, and its leaves that want a gradient."""
    values = {k: v.detach().clone() for k, v in effective_state(model.state_dict()).items()}
    leaves = {n: values[n].requires_grad_() for n in names}
    return in_place_of(model, values), leaves


def _gradients(
    model: nn.Module, batches: Batches, loss: Loss, state: dict[str, Tensor], leaves: dict[str, Tensor],
    temperature: float = 1.0,
) -> list[Tensor]:  # fmt: skip
    """Gradient of the loss summed over the batches, with respect to `leaves`."""
    device = next(model.parameters()).device
    total = [torch.zeros_like(leaf) for leaf in leaves.values()]
    for images, labels in batches:
        output = functional_call(model, state, (images.to(device),)) / temperature
        parts = torch.autograd.grad(loss(output, labels.to(device)), list(leaves.values()))
        total = [t + p for t, p in zip(total, parts, strict=True)]
    return total


def prune_snip(model: nn.Module, train_loader: Batches, loss: Loss, rate: float) -> Mask:
    """SNIP: |gradient * weight|, the gradient summed over the loader (Lee et al. 2019, eq. 5)."""
    state, leaves = _leaves(model, _prunable(model))
    gradients = _gradients(model, train_loader, loss, state, leaves)
    return _keep(model, {n: (g * w).detach().abs() for (n, w), g in zip(leaves.items(), gradients, strict=True)}, rate)


def prune_grasp(model: nn.Module, train_loader: Batches, loss: Loss, rate: float) -> Mask:
    """GraSP: remove the weights with the largest -w * Hg, which hinder the gradient flow (Wang et al. 2020, eq. 8)."""
    state, leaves = _leaves(model, _prunable(model))
    batches = list(train_loader)
    flow = [g.detach() for g in _gradients(model, batches, loss, state, leaves, GRASP_TEMPERATURE)]
    product = [torch.zeros_like(leaf) for leaf in leaves.values()]
    device = next(model.parameters()).device
    for images, labels in batches:
        output = functional_call(model, state, (images.to(device),)) / GRASP_TEMPERATURE
        slopes = torch.autograd.grad(loss(output, labels.to(device)), list(leaves.values()), create_graph=True)
        inner = sum((s * f).sum() for s, f in zip(slopes, flow, strict=True))
        parts = torch.autograd.grad(inner, list(leaves.values()))  # type: ignore[arg-type]
        product = [t + p for t, p in zip(product, parts, strict=True)]
    return _keep(model, {n: (w * h).detach() for (n, w), h in zip(leaves.items(), product, strict=True)}, rate)


def prune_synflow(model: nn.Module, train_loader: Batches, loss: Loss, rate: float) -> Mask:
    """SynFlow: 100 rounds of |gradient * weight| of the summed output of the all-positive network on ones.

    Data-free: `train_loader` only tells the input's shape, `loss` is not used (Tanaka et al. 2020, algorithm 1).
    """
    names = _prunable(model)
    shape = next(iter(train_loader))[0].shape[1:]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    values = {
        k: v.detach().abs().double() if v.is_floating_point() else v.detach()
        for k, v in effective_state(model.state_dict()).items()
    }
    ones = torch.ones(1, *shape, dtype=torch.float64, device=values[names[0]].device)
    masks = {n: own_mask(model, n).double() for n in names}
    total = count_ones(masks, names)
    for k in range(1, SYNFLOW_ROUNDS + 1):
        leaves = {n: (values[n] * masks[n]).requires_grad_() for n in names}
        output = functional_call(model, in_place_of(model, values | leaves), (ones,)).sum()
        gradients = torch.autograd.grad(output, list(leaves.values()))
        scores = {n: (g * w).detach().abs() for (n, w), g in zip(leaves.items(), gradients, strict=True)}
        last = total - round(total * rate)
        keep = last if k == SYNFLOW_ROUNDS else round(total * (1 - rate) ** (k / SYNFLOW_ROUNDS))
        masks = {n: m.double() for n, m in top_mask(scores, masks, keep).items()}
    for module, mode in modes.items():
        module.training = mode
    return {current_key(n): m.float() for n, m in masks.items()}


def prune_omp(model: nn.Module, train_loader: Batches, loss: Loss, rate: float) -> Mask:
    """One-shot magnitude pruning: |weight|. Reads no data."""
    state = effective_state(model.state_dict())
    return _keep(model, {n: state[n].abs() for n in _prunable(model)}, rate)


def prune_rp(model: nn.Module, train_loader: Batches, loss: Loss, rate: float) -> Mask:
    """Random pruning, from torch's global generator: the baseline. Reads no data."""
    return _keep(model, {n: torch.rand_like(parameter_of(model, n)) for n in _prunable(model)}, rate)


def prune_admm(model: nn.Module, train_loader: Batches, loss: Loss, rate: float, optimizer: optim.Optimizer) -> Mask:
    """ADMM: train towards the nearest network of the wanted sparsity, then cut (Zhang et al. 2018, section 3).

    Alternates 20 epochs of `optimizer` on loss + rho/2 * ||W - Z + U||^2 with Z = projection of W + U onto the wanted
    number of non-zeros and U += W - Z. The model is trained by this.
    """
    weights = {n: parameter_of(model, n) for n in _prunable(model)}
    dual = {n: torch.zeros_like(w) for n, w in weights.items()}
    target = _project(model, {n: w.detach() for n, w in weights.items()}, rate)
    device = next(model.parameters()).device
    for _ in range(ADMM_EPOCHS):
        for images, labels in train_loader:
            distance = sum((w - target[n] + dual[n]).square().sum() for n, w in weights.items())
            objective = loss(model(images.to(device)), labels.to(device)) + ADMM_RHO / 2 * distance
            optimizer.zero_grad()
            objective.backward()
            optimizer.step()
        target = _project(model, {n: w.detach() + dual[n] for n, w in weights.items()}, rate)
        dual = {n: dual[n] + w.detach() - target[n] for n, w in weights.items()}
    return _keep(model, {n: w.detach().abs() for n, w in weights.items()}, rate)


def _project(model: nn.Module, values: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    masks = _keep(model, {n: v.abs() for n, v in values.items()}, rate)
    return {n: v * masks[current_key(n)] for n, v in values.items()}
