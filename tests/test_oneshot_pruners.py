"""One-shot pruners against networks small enough to work out by hand, and their defining properties."""

from __future__ import annotations

import pytest
import torch
from golden_data import MiniVGG
from torch import nn

import pruning_utils
from masks import effective_state

BATCHES = [(torch.rand(6, 3, 16, 16), torch.arange(6)) for _ in range(2)]
LOSS = nn.CrossEntropyLoss()
SIMPLE = ["prune_snip", "prune_grasp", "prune_synflow", "prune_omp", "prune_rp"]


def ones(masks):
    return sum(int(m.sum()) for m in masks.values())


@pytest.mark.parametrize("name", SIMPLE)
@pytest.mark.parametrize("rate", [0.0, 0.004, 0.3, 0.95])
def test_counts_are_exact_and_the_model_is_left_alone(name, rate):
    model = MiniVGG().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    masks = getattr(pruning_utils, name)(model, BATCHES, LOSS, rate)
    total = sum(m.numel() for m in masks.values())
    assert list(masks) == [f"features.{k}.weight_mask" for k in (0, 4, 8, 11)]
    assert total == 5976 and ones(masks) == total - round(total * rate)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training


@pytest.mark.parametrize("name", SIMPLE)
def test_a_masked_model_loses_a_share_of_what_is_left(name):
    model = MiniVGG()
    pruning_utils.pruning_model(model, 0.5)
    before = pruning_utils.extract_mask(model.state_dict())
    masks = getattr(pruning_utils, name)(model, BATCHES, LOSS, 0.5)
    assert ones(masks) == round(ones(before) / 2)
    assert all(bool((masks[k] <= before[k]).all()) for k in masks)


class OneConv(nn.Module):
    """Two weights on one pixel: output = (w0 * x, w1 * x)."""

    def __init__(self, weights):
        super().__init__()
        self.stage = nn.Conv2d(1, len(weights), 1, bias=False)
        self.stage.weight.data = torch.tensor(weights).view(-1, 1, 1, 1)

    def forward(self, x):
        return self.stage(x).flatten(1)


def test_snip_is_gradient_times_weight():
    """Loss 0.5 * (w0 - 3)^2 + 0.5 * (w1 - 2.1)^2 at w = (1, 2): |g * w| = (2, 0.2)."""
    batch = [(torch.ones(1, 1, 1, 1), torch.tensor([[3.0, 2.1]]))]
    loss = lambda output, target: 0.5 * (output - target).square().sum()  # noqa: E731
    masks = pruning_utils.prune_snip(OneConv([1.0, 2.0]), batch, loss, 0.5)
    assert masks["stage.weight_mask"].flatten().tolist() == [1, 0]


def test_grasp_keeps_the_sign():
    """Loss w0^2 / 2 + 5 * w1 + w1^2 / 2 at w = (0.5, -2): w * Hg = (0.25, -6). Undo the temperature of 200 first."""
    batch = [(torch.ones(1, 1, 1, 1), torch.zeros(1))]

    def loss(output, target):
        w = 200 * output
        return (w[:, 0].square() / 2 + 5 * w[:, 1] + w[:, 1].square() / 2).sum()

    masks = pruning_utils.prune_grasp(OneConv([0.5, -2.0]), batch, loss, 0.5)
    assert masks["stage.weight_mask"].flatten().tolist() == [1, 0], "the larger product is negative and goes"


def test_grasp_score_is_a_hessian_vector_product():
    """Against central differences of the gradient, on a smooth network."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten()).double()
    batch = [(torch.rand(4, 1, 3, 3, dtype=torch.float64), torch.randint(0, 2, (4,)))]
    names = ["0.weight", "2.weight"]

    def gradient(weights):
        output = torch.func.functional_call(model, {**dict(model.named_parameters()), **weights}, (batch[0][0],))
        loss = LOSS(output / 200, batch[0][1])
        return dict(zip(names, torch.autograd.grad(loss, [weights[n] for n in names]), strict=True))

    at = {n: model.get_parameter(n).detach().clone().requires_grad_() for n in names}
    flow, step = gradient(at), 1e-2
    near = [gradient({n: (at[n] + s * step * flow[n]).detach().requires_grad_() for n in names}) for s in (1, -1)]
    scores = {n: at[n].detach() * (near[0][n] - near[1][n]) / (2 * step) for n in names}
    flat = torch.cat([s.flatten() for s in scores.values()])
    keep = len(flat) - round(len(flat) * 0.4)
    expected = torch.zeros_like(flat)
    expected[flat.argsort(descending=True)[:keep]] = 1
    masks = pruning_utils.prune_grasp(model, batch, LOSS, 0.4)
    assert torch.equal(torch.cat([masks[f"{n}_mask"].flatten() for n in names]).double(), expected)


def test_synflow_needs_no_data_and_avoids_layer_collapse():
    model = MiniVGG()
    model.features[8].weight.data *= 1e-3
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()  # flow is conserved in networks without biases
    magnitude = pruning_utils.prune_omp(model, BATCHES, LOSS, 0.9)
    synflow = pruning_utils.prune_synflow(model, BATCHES, LOSS, 0.9)
    assert magnitude["features.8.weight_mask"].sum() == 0
    assert all(m.sum() > 0 for m in synflow.values())
    other = [(torch.rand(1, 3, 16, 16), torch.arange(1))]
    again = pruning_utils.prune_synflow(model, other, None, 0.9)
    assert all(torch.equal(synflow[k], again[k]) for k in synflow)


def test_omp_is_magnitude_and_rp_is_not():
    model = MiniVGG()
    omp, rp = (getattr(pruning_utils, n)(model, [], LOSS, 0.5) for n in ("prune_omp", "prune_rp"))
    state = effective_state(model.state_dict())
    kept = torch.cat([state[k.removesuffix("_mask")].abs()[m == 1] for k, m in omp.items()])
    gone = torch.cat([state[k.removesuffix("_mask")].abs()[m == 0] for k, m in omp.items()])
    assert kept.min() >= gone.max()
    assert any(not torch.equal(omp[k], rp[k]) for k in omp)
    torch.manual_seed(1)
    one = pruning_utils.prune_rp(model, [], LOSS, 0.5)
    torch.manual_seed(1)
    assert all(torch.equal(one[k], m) for k, m in pruning_utils.prune_rp(model, [], LOSS, 0.5).items())


def test_admm_draws_the_weights_to_be_cut_towards_zero():
    torch.manual_seed(0)
    model = MiniVGG()
    state = effective_state(model.state_dict())
    before = pruning_utils.prune_omp(model, [], LOSS, 0.5)
    norm = sum(float(state[k.removesuffix("_mask")][m == 0].square().sum()) for k, m in before.items())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    masks = pruning_utils.prune_admm(model, BATCHES * 3, LOSS, 0.5, optimizer)
    trained = model.state_dict()
    left = sum(float(trained[k.removesuffix("_mask")][m == 0].square().sum()) for k, m in masks.items())
    assert ones(masks) == 2988 and left < 0.6 * norm
    assert all(bool(torch.isfinite(v).all()) for v in trained.values())


def test_random_pruning_is_exact():
    model = MiniVGG()
    pruning_utils.pruning_model_random(model, 0.25)
    assert ones(pruning_utils.extract_mask(model.state_dict())) == 5976 - round(5976 * 0.25)
    assert pruning_utils.check_sparsity(model) == pytest.approx(75)
