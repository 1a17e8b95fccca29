"""Networks at their real size against the dense ones: latency, training, memory; beside what torch-pruning cuts."""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from structured_tickets.data.loader import BatchLoader
from benchmarks import harness
from structured_tickets.pruning.budgets import kept_count
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.pruning.masks import Mask
from structured_tickets.networks import MODELS, build_model
from structured_tickets.networks.layers import Normalize
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.training.trainee import ON_PROCESSORS, Trainee
from structured_tickets.training.epoch import Passer, train
from structured_tickets.unit_groups.unit import UnitGroup, masks_of_units
from structured_tickets.networks.precision import choose_precision
from structured_tickets.runs.setup import choose_device, choose_kernels, prepare_for_speed

SIZE, LATENCY_BATCH, TRAIN_BATCH = 32, 64, 128
VIT_GONE, CNN_GONE = (1 / 3, 2 / 3), (1 / 2,)
GOALS = {"vit": {"latency": 1.15, "epoch": 1.2}, "cnn": {"latency": 1.3, "epoch": 1.4}}  # times the ratio of MACs


def network(arch: str, precision: torch.dtype, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(arch, 10, SIZE)
    model.normalize = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    model.to(device)
    prepare_for_speed(model, precision)
    return model


def random_structure(model: nn.Module, gone: float, only: Callable[[UnitGroup], bool] = lambda group: True) -> Mask:
    """Masks without the share `gone` of the units of each group, chosen at random."""
    draw, groups = torch.Generator().manual_seed(0), list(filter(only, unit_groups(model)))
    kept = {g.name: torch.zeros(g.units, dtype=torch.bool) for g in groups}
    for flags in kept.values():
        flags[torch.randperm(len(flags), generator=draw)[: kept_count(len(flags), gone)]] = True
    return masks_of_units(groups, kept, {n: p.cpu() for n, p in model.named_parameters()})


def share_of_macs(model: nn.Module, masks: Mask) -> float:
    return cost_of(model, masks, SIZE).macs / cost_of(model, {}, SIZE).macs


def times_macs(seconds: harness.Times, name: str, share: float) -> tuple[str, str, float]:
    """Time over the dense network's, that over the share of MACs, and the median of the latter."""
    slower = harness.ratios(seconds, name, "dense")
    over = [s / share for s in slower]
    return harness.spread(slower), harness.spread(over), statistics.median(over)


def latency_rows(arch: str, gone: float, turns: int, device: torch.device) -> list[list[str]]:
    """The dense network, and the compact one as it is exported and as it trains, in eval mode."""
    model = network(arch, torch.float32, device).eval()
    masks, images = random_structure(model, gone), torch.rand(LATENCY_BATCH, 3, SIZE, SIZE, device=device)
    networks = {"dense": model, "smallest": shrink(model, masks).network.eval()}
    if MODELS[arch].spec.family == "cnn":
        networks["in lanes"] = shrink(model, masks, ON_PROCESSORS.lanes).network.eval()
    with torch.no_grad():
        actions = {name: (lambda net=net: net(images)) for name, net in networks.items()}  # type: ignore[misc]
        seconds = harness.alternate(actions, turns, device, warmup=4)
    share, goal = share_of_macs(model, masks), GOALS[MODELS[arch].spec.family]["latency"]
    rows = []
    for name in list(networks)[1:]:
        slower, over, median = times_macs(seconds, name, share)
        judged = f"<= {goal}: {harness.verdict(median <= goal)}"
        rows.append([arch, f"{gone:.2f}", name, f"{share:.3f}", slower, over, judged])
    return rows


def _loader(batches: int, device: torch.device) -> BatchLoader:
    count = batches * TRAIN_BATCH
    photos, labels = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8), torch.randint(0, 10, (count,))
    return BatchLoader(ImageSet(photos, labels), TRAIN_BATCH, device, augment=True, flip=True)


def training(
    model: nn.Module, masks: Mask, compact: bool, loader: BatchLoader, precision: torch.dtype = torch.float32
) -> Callable[[], object]:
    """One epoch of a copy of the model under the masks, at real size or not."""
    trainee = Trainee(
        copy.deepcopy(model),
        masks,
        lambda net: OPTIMIZERS["sgd"].build(net, 0.01, 0.9, 1e-4),
        lambda net: prepare_for_speed(net, precision),
        compact,
    )
    passer = Passer(SimpleNamespace(print_freq=10**6, block_loss_grad=False), held=trainee.held, precision=precision)
    criterion = nn.CrossEntropyLoss()
    return lambda: train(0, loader, trainee.model, criterion, trainee.optimizer, 0, passer, None)


def epoch_rows(arch: str, gone: float, turns: int, batches: int, device: torch.device) -> list[list[str]]:
    rows = []
    for name in ("fp32", "bf16"):
        precision = choose_precision(name, device)
        model, loader = network(arch, precision, device), _loader(batches, device)
        masks = random_structure(model, gone)
        actions = {
            "dense": training(model, {}, False, loader, precision),
            "masked": training(model, masks, False, loader, precision),
            "compact": training(model, masks, True, loader, precision),
        }
        seconds = harness.alternate(actions, turns, device)
        share, goal = share_of_macs(model, masks), GOALS[MODELS[arch].spec.family]["epoch"]
        slower, over, median = times_macs(seconds, "compact", share)
        judged = f"<= {goal}: {harness.verdict(median <= goal)}" if name == "fp32" else ""
        masked = harness.spread(harness.ratios(seconds, "masked", "dense"))
        rows.append([arch, f"{gone:.2f}", name, f"{share:.3f}", masked, slower, over, judged])
    return rows


def peak_megabytes(arch: str, gone: float, kind: str, device: torch.device) -> float:
    """Peak memory of a process that trains for three batches, or only starts ("idle")."""
    if kind == "idle":
        return harness.peak_megabytes(device)
    model, loader = network(arch, torch.float32, device), _loader(3, device)
    masks = random_structure(model, gone)
    training(model, masks if kind != "dense" else {}, kind == "compact", loader)()
    return harness.peak_megabytes(device)


def memory_row(arch: str, gone: float, gpu: int) -> list[str]:
    """Each kind of training in a process of its own, less what an idle one of the same imports takes."""
    peaks = {}
    for kind in ("idle", "dense", "masked", "compact"):
        command = [sys.executable, "-m", "benchmarks.compact", "--gpu", str(gpu)]
        command += ["--measure_memory", arch, str(gone), kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[kind] = float(done.stdout)
    used = {kind: peak - peaks["idle"] for kind, peak in peaks.items() if kind != "idle"}
    ratio = used["compact"] / used["masked"]
    megabytes = [f"{used[k]:.0f}" for k in ("dense", "masked", "compact")]
    return [arch, f"{gone:.2f}", *megabytes, f"{ratio:.2f}", f"< 1: {harness.verdict(ratio < 1)}"]


def cut_by_torch_pruning(model: nn.Module, masks: Mask) -> nn.Module:
    """The same units removed by torch-pruning: inner channels over its dependency graph; heads and neurons by hand."""
    import torch_pruning as tp  # noqa: PLC0415 (all else here runs without it)

    small: nn.Module = copy.deepcopy(model)
    groups = [g for g in unit_groups(model) if g.root.name in masks]
    if any(g.kind == "channel" for g in groups):
        images = torch.rand(1, 3, SIZE, SIZE, device=next(model.parameters()).device)
        graph = tp.DependencyGraph().build_dependency(small, example_inputs=images)
    for group in groups:
        dropped = ~group.root.units_with_weights(masks[group.root.name])
        root = small.get_submodule(group.root.layer)
        if group.kind == "channel":
            graph.get_pruning_group(root, tp.prune_conv_out_channels, dropped.nonzero().flatten().tolist()).prune()
            continue
        last = group.slices[1]
        tp.prune_linear_out_channels(root, group.root.index[dropped].flatten().tolist())
        tp.prune_linear_in_channels(small.get_submodule(last.layer), last.index[dropped].flatten().tolist())
        if group.kind == "head":
            attention = small.get_submodule(group.root.layer.rpartition(".")[0])
            attention.num_heads = int((~dropped).sum())  # type: ignore[assignment]
            attention.attn_dim = attention.num_heads * attention.head_dim  # type: ignore
    return small


def _is_cut_alike(group: UnitGroup) -> bool:
    """Whether both cut the unit: not a filter that others add to, of which torch-pruning would cut all or none."""
    return group.kind != "channel" or group.name.endswith("conv1")


def torch_pruning_row(arch: str, gone: float, turns: int, device: torch.device) -> list[str]:
    model = network(arch, torch.float32, device).eval()
    masks = random_structure(model, gone, _is_cut_alike)
    images = torch.rand(LATENCY_BATCH, 3, SIZE, SIZE, device=device)
    removing = harness.alternate(
        {"ours": lambda: shrink(model, masks), "theirs": lambda: cut_by_torch_pruning(model, masks)}, 3, device, 1
    )
    networks = {"ours": shrink(model, masks).network, "theirs": cut_by_torch_pruning(model, masks)}
    with torch.no_grad():
        gap = float((networks["ours"](images) - networks["theirs"](images)).abs().max())
        actions = {name: (lambda net=net: net(images)) for name, net in networks.items()}  # type: ignore[misc]
        seconds = harness.alternate(actions, turns, device, warmup=4)
    steps = {name: training(net, {}, False, _loader(2, device)) for name, net in networks.items()}
    trained = harness.alternate(steps, turns, device)
    latency, step = (harness.ratios(s, "ours", "theirs") for s in (seconds, trained))
    not_slower = all(statistics.quantiles(part, n=4)[0] <= 1 for part in (latency, step))
    cut = [statistics.median(removing[k]) for k in ("ours", "theirs")]
    verdict = f"1 within the spread: {harness.verdict(not_slower)}"
    return [
        arch,
        f"{gone:.2f}",
        f"{gap:.0e}",
        harness.spread(latency),
        harness.spread(step),
        f"{1e3 * cut[0]:.0f} / {1e3 * cut[1]:.0f} ms",
        verdict,
    ]


HEADS = {
    "latency": ["model", "units gone", "compact", "MACs", "time / dense", "over MACs", "goal"],
    "epoch": ["model", "units gone", "precision", "MACs", "masked / dense", "compact / dense", "over MACs", "goal"],
    "memory": ["model", "units gone", "dense, MB", "masked, MB", "compact, MB", "compact / masked", "goal"],
    "torch-pruning": ["model", "units gone", "largest gap", "latency / theirs", "training / theirs", "cutting", "goal"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["vit_tiny", "vit_small", "res20s", "res56s"])
    parser.add_argument("--parts", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batches", type=int, default=3, help="batches of an epoch")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--measure_memory", nargs=3, metavar=("ARCH", "GONE", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = choose_device(args.gpu)
    choose_kernels(deterministic=False)
    if args.measure_memory:
        arch, gone, kind = args.measure_memory
        print(peak_megabytes(arch, float(gone), kind, device))
        return
    harness.keep_memory()
    print(harness.describe_machine(device))
    cases = [(arch, gone) for arch in args.arch for gone in (VIT_GONE if arch.startswith("vit") else CNN_GONE)]
    rows: dict[str, Callable[[str, float], list[list[str]]]] = {
        "latency": lambda arch, gone: latency_rows(arch, gone, args.turns, device),
        "epoch": lambda arch, gone: epoch_rows(arch, gone, args.turns, args.batches, device),
        "memory": lambda arch, gone: [memory_row(arch, gone, args.gpu)],
        "torch-pruning": lambda arch, gone: [torch_pruning_row(arch, gone, args.turns, device)],
    }
    for part in args.parts:
        lines = [line for arch, gone in cases for line in rows[part](arch, gone)]
        print(f"\n{part}\n\n{harness.table(HEADS[part], lines)}", flush=True)


if __name__ == "__main__":
    main()
