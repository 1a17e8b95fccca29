"""One-shot pruners against networks small enough to work out by hand, and their defining properties."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.networks import MiniVGG
from torch import nn

import pruning_utils
from structured_tickets.base.errors import UsageError
from structured_tickets.networks import build_model
from structured_tickets.networks.kernels import fused_attention
from structured_tickets.networks.vision_transformer import VisionTransformer
from structured_tickets.pruning.masks import count_ones, effective_state
from structured_tickets.pruning.oneshot import PRUNERS, Admm, Task, grasp_scores, synflow_scores, train_by_admm
from structured_tickets.pruning.oneshot import _Linear as Linear
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import ranked_names

_DRAW = torch.Generator().manual_seed(0)
BATCHES = [(torch.rand(6, 3, 16, 16, generator=_DRAW), torch.arange(6)) for _ in range(2)]
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


def task_of(model, keep_share=0.5, **more):
    names = ranked_names(model, unit_groups(model))
    weights = {k: v.detach() for k, v in model.state_dict().items()}
    keep = round(keep_share * sum(weights[n].numel() for n in names))
    batches = [(torch.rand(4, 3, 16, 16), torch.arange(4)) for _ in range(2)]
    return Task(model, weights, names, keep, batches, **more)


def micro_vit():
    return VisionTransformer(10, 16, 8, 24, 2, 3, 2)


NETWORKS = {
    "minivgg": MiniVGG,
    "micro_cnn": lambda: build_model("micro_cnn", 10, 16),
    "res20s": lambda: build_model("res20s", 10, 16),
    "vit": micro_vit,
}


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("network", ["minivgg", "micro_cnn", "vit", pytest.param("res20s", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_restored_exactly(network, pruner, training):
    """Weights, buffers, modes, hooks and switches, with other weights scored than the network's own."""
    model = NETWORKS[network]().train(training)
    admm = Admm(lambda m: torch.optim.SGD(m.parameters(), 0.1), lambda _: BATCHES, 1)
    task = task_of(model, admm=admm)
    weights = {k: v * 1.5 if v.is_floating_point() else v for k, v in task.weights.items()}
    before, given = ({k: v.clone() for k, v in d.items()} for d in (model.state_dict(), weights))
    switches = [(m.training, getattr(m, "fused_attn", None), len(m._forward_hooks)) for m in model.modules()]
    task = Task(model, weights, task.names, task.keep, task.batches, admm=admm)
    mask = PRUNERS[pruner](task)
    assert list(mask) == task.names and count_ones(mask, mask) == task.keep
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, given[k]) for k, v in weights.items())
    assert switches == [(m.training, getattr(m, "fused_attn", None), len(m._forward_hooks)) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("pruner", [p for p in PRUNERS if p != "admm"])
def test_gone_weights_do_not_come_back(pruner):
    task = task_of(micro_vit())
    alive = {n: (torch.rand(task.weights[n].shape) < 0.7).float() for n in task.names}
    keep = count_ones(alive, alive) // 2
    mask = PRUNERS[pruner](Task(task.model, task.weights, task.names, keep, task.batches, alive=alive))
    assert count_ones(mask, mask) == keep and all(bool((m <= alive[n]).all()) for n, m in mask.items())


class Chain(nn.Module):
    """Three 1x1 convolutions of one channel: their product."""

    def __init__(self, *weights):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 2, 1, bias=False) if k == 0 else nn.Conv2d(2, 1, 1, bias=False) for k in range(2))
        )
        for layer, value in zip(self.layers, weights, strict=True):
            layer.weight.data.copy_(torch.tensor(value).view_as(layer.weight))

    def forward(self, x):
        return self.layers(x).flatten(1)


def test_synflow_by_hand():
    """Output of ones: |1||-4| + |2||0.5|, so a path scores the product of its weights, in both layers alike."""
    model = Chain([1.0, 2.0], [-4.0, 0.5])
    names = ["layers.0.weight", "layers.1.weight"]
    task = Task(model, {k: v.detach() for k, v in model.state_dict().items()}, names, 2)
    ones = {n: torch.ones_like(task.weights[n]).double() for n in names}
    scores = synflow_scores(task, ones, torch.Size([1, 1, 1]))
    assert scores["layers.0.weight"].flatten().tolist() == [4, 1] == scores["layers.1.weight"].flatten().tolist()
    batches = [(torch.rand(2, 1, 1, 1), torch.zeros(2))]
    mask = PRUNERS["synflow"](Task(model, task.weights, names, 2, batches))
    assert mask["layers.0.weight"].flatten().tolist() == [1, 0] == mask["layers.1.weight"].flatten().tolist()
    magnitude = PRUNERS["omp"](Task(model, task.weights, names, 2))
    assert magnitude["layers.0.weight"].flatten().tolist() == [0, 1], "which cuts the network in two"


def test_synflow_conserves_the_sum_of_each_layers_scores():
    """Tanaka et al. 2020, theorem 1, for activations through zero; what is added to the signal plays no part."""
    torch.manual_seed(0)
    model = MiniVGG()
    for parameter in model.parameters():
        parameter.data = torch.rand_like(parameter) - 0.5
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    task = task_of(model.eval())
    names = [*task.names, "classifier.weight"]
    task = Task(model, task.weights, names, 100)
    ones = {n: torch.ones_like(task.weights[n]).double() for n in names}
    sums = [float(v.sum()) for v in synflow_scores(task, ones, torch.Size([3, 16, 16])).values()]
    with torch.no_grad():
        positive = copy.deepcopy(model).double().eval()
        for name, value in positive.state_dict().items():
            value.zero_() if name.endswith(("bias", "running_mean")) else value.abs_()
        output = float(positive(torch.ones(1, 3, 16, 16, dtype=torch.float64)).sum())
    assert sums == pytest.approx([output] * 5, rel=1e-9)


@pytest.mark.parametrize("keep", [60, 20, 8])
def test_synflow_leaves_a_path_through_every_layer_where_others_collapse(keep):
    """Tanaka et al. 2020, section 6: down to the very last weights."""
    torch.manual_seed(0)
    model = MiniVGG().eval()
    for layer, scale in ((0, 1.0), (4, 0.05), (8, 1.0), (11, 20.0)):
        model.features[layer].weight.data *= scale
    task = task_of(model)
    task = Task(model, task.weights, task.names, keep, task.batches)
    smallest = {p: min(int(m.sum()) for m in PRUNERS[p](task).values()) for p in ("synflow", "snip", "omp")}
    assert smallest["synflow"] > 0 == smallest["omp"], smallest
    assert smallest["synflow"] >= smallest["snip"]
    mask = PRUNERS["synflow"](task)
    ones = {n: m.double() for n, m in mask.items()}
    assert all(bool(v.any()) for v in synflow_scores(task, ones, torch.Size([3, 16, 16])).values()), "still connected"


def test_synflow_reads_batchnorm_in_eval_mode_and_no_image():
    torch.manual_seed(0)
    model = build_model("micro_cnn", 10, 16)
    task = task_of(model)
    scored = []
    for training, scale in ((True, 1.0), (False, 9.0)):
        model.train(training)
        batches = [(scale * torch.rand(2, 3, 16, 16), torch.arange(2))]
        scored.append(PRUNERS["synflow"](Task(model, task.weights, task.names, task.keep, batches)))
    assert all(torch.equal(scored[0][n], scored[1][n]) for n in task.names)


@pytest.mark.parametrize(
    "network", ["vit", pytest.param("vit_small", marks=pytest.mark.slow), "timm/deit_tiny_distilled_patch16_224"]
)
def test_synflow_conserves_the_scores_of_a_transformers_layers_too(network):
    """Every layer of a branch carries the same, and what the branches carry adds up to the output."""
    torch.manual_seed(0)
    model = micro_vit() if network == "vit" else build_model(network, 10, 16)
    task = task_of(model.eval())
    ones = {n: torch.ones_like(task.weights[n]).double() for n in task.names}
    with Linear(), fused_attention(model, True):
        scores = synflow_scores(task, ones, torch.Size([3, 16, 16]))
    sums = {n: float(v.sum()) for n, v in scores.items()}
    assert all(torch.equal(v > 0, task.weights[n] != 0) for n, v in scores.items())
    for block in {n.split(".")[1] for n in sums}:
        mine = {n.partition(f"blocks.{block}.")[2]: v for n, v in sums.items() if n.startswith(f"blocks.{block}.")}
        assert mine["attn.qkv.weight"] == pytest.approx(mine["attn.proj.weight"], rel=1e-9)
        assert mine["mlp.fc1.weight"] == pytest.approx(mine["mlp.fc2.weight"], rel=1e-9)
    wide = scores["blocks.0.attn.qkv.weight"].sum(1).view(3, -1).sum(1)
    assert float(wide.max() / wide.min()) < 3, "queries, keys and values count alike"


def test_synflow_of_a_network_without_bounds_is_refused(monkeypatch):
    model = micro_vit()
    task = task_of(model)
    weights = {n: v * 1e300 if v.is_floating_point() else v for n, v in task.weights.items()}
    with pytest.raises(UsageError, match="the flow through VisionTransformer is not finite"):
        PRUNERS["synflow"](Task(model, weights, task.names, task.keep, task.batches))


def test_grasp_equals_a_finite_difference_on_a_transformer():
    """Keeping the highest w * Hg is removing the highest -w * Hg (Wang et al. 2020, eq. 8)."""
    torch.manual_seed(5)
    model = micro_vit().double()
    task = task_of(model)
    task = Task(model, task.weights, task.names, task.keep, [(x.double(), y) for x, y in task.batches])

    def gradient(weights):
        state = {**task.weights, **weights}
        losses = [LOSS(torch.func.functional_call(model, state, (x,)) / 200, y) for x, y in task.batches]
        return dict(zip(weights, torch.autograd.grad(sum(losses), list(weights.values())), strict=True))

    at = {n: task.weights[n].clone().requires_grad_() for n in task.names}
    flow, step = gradient(at), 0.05
    near = [gradient({n: (at[n] + s * step * flow[n]).detach().requires_grad_() for n in at}) for s in (1, -1)]
    with fused_attention(model, False):
        scores = grasp_scores(task)
    for name, score in scores.items():
        expected = task.weights[name] * (near[0][name] - near[1][name]) / (2 * step)
        torch.testing.assert_close(score, expected, rtol=2e-3, atol=1e-5 * float(expected.abs().max()))


def test_grasp_prefers_what_feeds_the_gradient():
    """Removing the kept half lowers the squared gradient norm more than removing the other half, to first order."""
    torch.manual_seed(0)
    model = micro_vit().double()
    task = task_of(model)
    task = Task(model, task.weights, task.names, task.keep, [(x.double(), y) for x, y in task.batches])
    with fused_attention(model, False):
        scores = grasp_scores(task)
    mask = PRUNERS["grasp"](task)

    def norm(pruned):
        weights = {n: (w * (1 - 1e-3 * pruned[n])).detach().requires_grad_() for n, w in at.items()}
        state = {**task.weights, **weights}
        losses = [LOSS(torch.func.functional_call(model, state, (x,)) / 200, y) for x, y in task.batches]
        return sum(float(g.square().sum()) for g in torch.autograd.grad(sum(losses), list(weights.values())))

    at = {n: task.weights[n] for n in task.names}
    whole = norm({n: torch.zeros_like(m) for n, m in mask.items()})
    assert norm({n: 1 - m for n, m in mask.items()}) > norm(mask)
    total = sum(float(s.sum()) for s in scores.values())
    everything = norm({n: torch.ones_like(m) for n, m in mask.items()})
    assert everything - whole == pytest.approx(-1e-3 * 2 * total, rel=0.02), "d|g|^2 = -2 * w * Hg"


def test_admm_by_hand():
    """Two weights (1, 0.5), one to stay, no loss, rate 0.1, rho 1: each epoch w -= 0.1 * (w - z + u)."""
    model = OneConv([1.0, 0.5])
    names = ["stage.weight"]
    batch = [(torch.ones(1, 1, 1, 1), torch.zeros(1))]
    loss = lambda output, target: 0 * output.sum()  # noqa: E731
    task = Task(model, {k: v.detach() for k, v in model.state_dict().items()}, names, 1, (), loss)
    admm = Admm(lambda m: torch.optim.SGD(m.parameters(), 0.1), lambda _: batch, epochs=2, rho=1.0)
    mask = train_by_admm(model, task, admm)
    # z = (1, 0), u = 0: w = (1, 0.45); z = (1, 0), u = (0, 0.45): w = 0.45 - 0.1 * (0.45 + 0.45) = 0.36
    assert model.stage.weight.flatten().tolist() == pytest.approx([1.0, 0.36])
    assert mask["stage.weight"].flatten().tolist() == [1, 0]


def test_admm_trains_in_training_mode_and_goes_on_from_where_it_was_broken_off():
    torch.manual_seed(0)
    start = MiniVGG()
    saved = []
    task = task_of(start)

    def admm(epochs, load):
        return Admm(
            lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9),
            lambda _: task.batches,
            epochs,
            0.1,
            load,
            lambda v: saved.append(copy.deepcopy(v)),
        )

    whole = copy.deepcopy(start).eval()
    expected = train_by_admm(whole, task, admm(4, dict))
    assert [s["epochs"] for s in saved] == [1, 2, 3, 4]
    assert not torch.equal(whole.features[1].running_mean, start.features[1].running_mean)
    again = copy.deepcopy(start)
    mask = train_by_admm(again, task, admm(4, lambda: saved[1]))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert all(torch.equal(m, mask[n]) for n, m in expected.items())


def test_random_masks_of_a_seed_are_nested_and_uniform():
    task = task_of(MiniVGG())
    masks = [
        PRUNERS["random"](Task(task.model, task.weights, task.names, k, seed=s))
        for k, s in ((4000, 0), (2000, 0), (2000, 1))
    ]
    assert all(bool((masks[1][n] <= m).all()) for n, m in masks[0].items())
    assert any(not torch.equal(masks[2][n], m) for n, m in masks[1].items())
    for name, m in masks[1].items():
        assert float(m.mean()) == pytest.approx(2000 / 5976, abs=4 * (0.22 / m.numel()) ** 0.5), name


def test_snip_sums_the_gradient_over_the_batches():
    """Of two batches with opposite gradients for a weight nothing is left, and it goes."""
    batches = [(torch.ones(1, 1, 1, 1), torch.tensor([[t, 1.0]])) for t in (3.0, -1.0)]
    loss = lambda output, target: 0.5 * (output - target).square().sum()  # noqa: E731
    mask = pruning_utils.prune_snip(OneConv([1.0, 1.5]), batches, loss, 0.5)
    assert mask["stage.weight_mask"].flatten().tolist() == [0, 1]


@pytest.mark.parametrize(
    "arch",
    [
        "timm/mobilenetv2_050",
        "timm/efficientnet_lite0",
        "timm/mobilenetv3_small_050",
        pytest.param("torchvision/efficientnet_b0", marks=pytest.mark.slow),
    ],
)
def test_synflow_sees_through_clipped_activations_and_gates(arch, monkeypatch):
    monkeypatch.setattr("structured_tickets.pruning.oneshot.SYNFLOW_ROUNDS", 5)
    torch.manual_seed(0)
    model = build_model(arch, 10, 32)
    task = task_of(model)
    images = [(torch.rand(2, 3, 32, 32), torch.arange(2))]
    mask = PRUNERS["synflow"](Task(model, task.weights, task.names, 2 * task.keep // 5, images))
    assert all(bool(m.any()) for m in mask.values())


def test_synflow_says_where_nothing_flows(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("rsst"), "propagate", True)
    model = MiniVGG()
    model.features[9].weight.data.zero_()
    PRUNERS["synflow"](task_of(model))
    assert "nothing flows through 4 of 4 layers, such as features.0.weight" in caplog.text


def test_synflow_through_norms_over_whole_images_and_activations_that_are_clipped_on_both_sides():
    """A LayerNorm over [channels, rows, columns] scales entry by entry; a hardtanh that lets negative values by stays."""
    torch.manual_seed(0)
    value, weight = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.rand(3, 4, 4, dtype=torch.float64)
    with Linear():
        assert torch.equal(nn.functional.layer_norm(value, (3, 4, 4), weight), value * weight)
        assert torch.equal(nn.functional.hardtanh(3 * value), (3 * value).clamp(-1, 1))
        assert torch.equal(nn.functional.hardtanh(3 * value, 0, 6), 3 * value)
        assert torch.equal(nn.functional.group_norm(value, 3, weight[:, 0, 0]), value * weight[:, :1, :1])
