"""What RSST's penalty and held masks add to a training step."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import nn

from structured_tickets.data.loader import BatchLoader
from benchmarks import harness
from structured_tickets.settings.interpret import rules_from
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.pruning.masks import HeldMask
from structured_tickets.networks import MODELS, build_model
from structured_tickets.networks.layers import Normalize
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.settings.flags import parse_args
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.held import held_masks
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.training.epoch import Passer, apply_reg, train, update_reg
from structured_tickets.networks.precision import choose_precision
from structured_tickets.runs.setup import choose_device, choose_kernels, prepare_for_speed
from structured_tickets.base.weights import cloned_state

GOAL = 1.02


def steps(
    arch: str, optimizer_name: str, batch: tuple[torch.Tensor, torch.Tensor], device: torch.device
) -> dict[str, Callable[[], object]]:
    """The same step of the same network without and with the round's penalty and held masks; and these alone."""
    structured = ["--vit_structured", "--vit_prune_target", "both"] if MODELS[arch].spec.family == "vit" else []
    args = parse_args(
        ["--arch", arch, "--criteria", "magnitude", "--rate", "0.3", "--optimizer", optimizer_name, *structured]
    )
    torch.manual_seed(0)
    model = build_model(arch, 10, batch[0].shape[-1])
    model.normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    model.to(device)
    precision = choose_precision("auto", device)
    prepare_for_speed(model, precision)
    groups, weights = unit_groups(model), cloned_state(model)
    rules = rules_from(args, groups)
    pair = decide(model, groups, rules, 0, ranked=weights, trained=weights, previous=None, batches=[])
    optimizer = OPTIMIZERS[optimizer_name].build(model, 0.01, 0.9, 1e-4)
    held = HeldMask(model, held_masks(pair, rules))
    passers = [
        Passer(args, pair.current, pair.refill, held=h, decoupled=args.penalty == "decoupled", precision=precision)
        for h in (None, held)
    ]
    pruner = Pruner(model, args, passers[1])
    criterion = nn.CrossEntropyLoss()
    count = [0]

    def penalty_alone() -> None:
        count[0] += 1  # lambda moves with every step, as it does in a round
        update_reg(passers[1], pruner, model, 1, count[0] % 1000, 1000)
        apply_reg(pruner, model, passers[1])
        held.apply()

    return {
        "without": lambda: train(1, [batch], model, criterion, optimizer, 0, passers[0], None),
        "with": lambda: train(1, [batch], model, criterion, optimizer, 0, passers[1], pruner),
        "penalty and masks alone": penalty_alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["vit_tiny", "res20s"])
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--gpu", type=int, default=0)
    args = parser.parse_args()
    device = choose_device(args.gpu)
    choose_kernels(deterministic=False)
    print(harness.describe_machine(device))
    n = args.batch_size
    data = ImageSet(torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (n,)))
    batch = next(iter(BatchLoader(data, n, device, augment=True)))
    rows = []
    for arch in args.arch:
        for optimizer in args.optimizer:
            times = harness.alternate(steps(arch, optimizer, batch, device), args.rounds, device)
            alone = [a / w for a, w in zip(times["penalty and masks alone"], times["without"], strict=True)]
            share = 1 + statistics.median(alone)
            rows.append(
                [
                    arch,
                    optimizer,
                    harness.spread(harness.ratios(times, "with", "without"), 3),
                    harness.spread([1e3 * s for s in times["penalty and masks alone"]]),
                    f"{share:.4f}",
                    f"<= {GOAL}: {harness.verdict(share <= GOAL)}",
                ]
            )
    print(harness.table(["model", "optimizer", "step with / without", "alone, ms", "1 + alone / step", "goal"], rows))


if __name__ == "__main__":
    main()
