"""Time over MACs of smaller networks, by what a channel is as a unit and by the multiples that widths are.

    python -m benchmarks.widths

Structures are those of a round: element-wise ranking, regrouping and budgets as in a run, of random weights, at the
rate that leaves the share of MACs that is asked for.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from structured_tickets.base.environment import numbers_at_once
from structured_tickets.networks import build_model
from structured_tickets.networks.precision import choose_precision
from structured_tickets.networks.registry import note_channel_units
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.masks import Mask
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.runs.setup import choose_device, choose_kernels, prepare_for_speed
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.trainee import Trainee
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import UnitGroup, kept_units, kinds

NETWORKS = ("res20s", "res56s", "res18", "timm/convnext_atto", "vit_tiny")
RATES = 19  # that are tried
GOALS = {"evaluation": 1.25, "training": 1.35}
Action = Callable[[], object]


def network(arch: str, channel_units: str, size: int) -> nn.Module:
    """A network with weights of which L1 takes as many in each layer."""
    torch.manual_seed(0)
    model = build_model(arch, 10, size)
    note_channel_units(model, channel_units, (3, size, size))
    return model


def structure(
    model: nn.Module, groups: list[UnitGroup], channel_units: str, multiple: int, macs: float, size: int
) -> Mask:
    """Masks that leave about this share of the MACs."""
    draw = torch.Generator().manual_seed(0)
    weights = {n: torch.rand(p.shape, generator=draw) for n, p in model.named_parameters()}
    dense, found = cost_of(model, {}, size).macs, dict[float, Mask]()
    targets = tuple(k for k in kinds(groups) if k in ("channel", "head", "neuron"))
    for step in range(RATES):
        rate = (step + 1) / (RATES + 1)
        rules = RoundRules(
            "refill",
            rate,
            "target",
            "magnitude",
            targets=targets,
            mlp_prune_ratio=rate,
            channel_units=channel_units,
            round_units=multiple,
        )
        pair = decide(model, groups, rules, 0, ranked=weights, trained=weights, previous=None, batches=[])
        found[cost_of(model, pair.structure, size).macs / dense] = pair.structure
    return found[min(found, key=lambda share: abs(share - macs))]


def widths(groups: list[UnitGroup], masks: Mapping[str, Tensor]) -> str:
    """Kept counts of the first groups."""
    counts = [f"{int(kept_units(g, masks).sum())}/{g.units}" for g in groups[:4]]
    return " ".join(counts) + (" ..." if len(groups) > 4 else "")


def passes(
    model: nn.Module, masks: Mask, batch: int, size: int, precision: torch.dtype, device: torch.device
) -> tuple[Action, Action]:
    """A forward pass in evaluation mode, and a training step, of the network at its real size."""
    trainee = Trainee(
        copy.deepcopy(model).to(device),
        masks,
        lambda net: OPTIMIZERS["sgd"].build(net, 0.01, 0.9, 1e-4),
        lambda net: prepare_for_speed(net, precision),
        bool(masks),
    )
    images = torch.rand(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)

    @torch.no_grad()
    def evaluate() -> None:
        trainee.model.eval()
        with autocast:
            trainee.model(images)

    def step() -> None:
        trainee.model.train()
        with autocast:
            loss = F.cross_entropy(trainee.model(images).float(), labels)
        trainee.optimizer.zero_grad()
        loss.backward()
        trainee.optimizer.step()

    return evaluate, step


def rows(arch: str, args: argparse.Namespace, device: torch.device) -> list[list[str]]:
    """A row for each kind of unit, multiple and batch."""
    precision, size = choose_precision(args.precision, device), args.image_size
    variants: dict[str, tuple[nn.Module, Mask, float, str]] = {}
    for channel_units in ("filter", "stream"):
        model = network(arch, channel_units, size)
        groups = unit_groups(model)
        if "channel" not in kinds(groups) and channel_units == "stream":
            continue
        for multiple in dict.fromkeys((1, 8, numbers_at_once(args.gpu))):
            masks = structure(model, groups, channel_units, multiple, args.macs, size)
            share = cost_of(model, masks, size).macs / cost_of(model, {}, size).macs
            variants[f"{channel_units} {multiple}"] = model, masks, share, widths(groups, masks)
    found = []
    for batch in args.batches:
        dense = passes(network(arch, "filter", size), {}, batch, size, precision, device)
        small = {
            name: passes(model, masks, batch, size, precision, device) for name, (model, masks, *_) in variants.items()
        }
        times = []
        for k in range(2):
            actions = {"dense": dense[k], **{name: both[k] for name, both in small.items()}}
            times.append(harness.alternate(actions, args.turns, device))
        for name, (_, _, share, kept) in variants.items():
            over = [[t / share for t in harness.ratios(seconds, name, "dense")] for seconds in times]
            found.append([arch, str(batch), name, f"{share:.3f}", kept, *map(harness.spread, over)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=(64, 128))
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--macs", type=float, default=0.38, help="share of the MACs that is left")
    parser.add_argument("--precision", default="fp32", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--gpu", type=int, default=0)
    args = parser.parse_args()
    device = choose_device(args.gpu)
    choose_kernels(deterministic=False)
    harness.keep_memory()
    print(harness.describe_machine(device))
    head = ["network", "batch", "units", "MACs", "kept", *(f"{mode}, time over MACs" for mode in GOALS)]
    lines = [line for arch in args.arch for line in rows(arch, args, device)]
    print(f"\n{harness.table(head, lines)}\n")
    for arch in args.arch:
        for k, (mode, goal) in enumerate(GOALS.items()):
            own = [float(line[5 + k].split()[0]) for line in lines if line[0] == arch]
            print(f"{arch}, {mode}: best {min(own):.2f}, goal {goal}: {harness.verdict(min(own) <= goal)}")


if __name__ == "__main__":
    main()
