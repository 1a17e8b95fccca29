"""Training and evaluation throughput of the runner against an ordinary loop: same network, same batches, in turns."""

from __future__ import annotations

import argparse
import copy
import statistics
from functools import partial
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from structured_tickets.data.loader import BatchLoader
from benchmarks import harness, plain
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.networks import MODELS, build_model
from structured_tickets.networks.layers import Normalize
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.epoch import Passer, train, validate_together
from structured_tickets.base.distributed import ALONE
from structured_tickets.networks.precision import choose_precision
from structured_tickets.runs.setup import choose_device, choose_kernels, prepare_for_speed

STEPS = 4  # that are timed together
GOALS = {  # (model, what, precision): times the plain loop
    ("vit_tiny", "step", "auto"): 3.0,
    ("res20s", "step", "auto"): 2.5,
    ("vit_tiny", "step", "fp32"): 1.0,
    ("res20s", "step", "fp32"): 1.4,
    ("vit_tiny", "evaluation", "auto"): 2.5,
    ("res20s", "evaluation", "auto"): 2.5,
}


def operations_per_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> int:
    """Floating-point operations of a forward and backward pass: two for each multiply-accumulate."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        nn.functional.cross_entropy(model(images), labels).backward()
    return counter.get_total_flops()


def variants(
    arch: str, loader: BatchLoader, plain_loader: object, wanted: list[str], device: torch.device
) -> dict[str, dict[str, Callable[[], object]]]:
    """What to time: part ("step", "epoch", "evaluation") -> loop -> action. Parts work on the same images."""
    torch.manual_seed(0)
    model, criterion = build_model(arch, 10, loader.image_size), nn.CrossEntropyLoss()
    batches = [(x.contiguous(), y) for x, y in loader][:STEPS]
    ordinary = copy.deepcopy(model).to(device)
    optimizer = plain.optimizer_for(ordinary)
    test = BatchLoader(loader.data, loader.batch_size, device)
    parts: dict[str, dict[str, Callable[[], object]]] = {
        "step": {"plain": lambda: plain.train(batches, ordinary, criterion, optimizer)},
        "epoch": {"plain": lambda: plain.train(plain_loader, ordinary, criterion, optimizer)},  # type: ignore[arg-type]
        "evaluation": {"plain": lambda: plain.validate(plain_loader, ordinary)},  # type: ignore[arg-type]
    }
    for name in wanted:
        ours = copy.deepcopy(model).to(device)
        ours.normalize = Normalize(plain.MEAN, plain.STD)
        ours.to(device)
        precision, _, compiled = name.partition("+")
        dtype = choose_precision(precision, device)
        prepare_for_speed(ours, dtype, bool(compiled))
        for part, data in (("step", batches), ("epoch", loader)):
            parts[part][name] = _training(ours, data, criterion, dtype)
        judge = partial(validate_together, test, ours, criterion, ALONE, dtype)
        parts["evaluation"][name] = judge
    return parts


def _training(model: nn.Module, data: object, criterion: nn.Module, precision: torch.dtype) -> Callable[[], object]:
    optimizer = OPTIMIZERS["sgd"].build(model, 0.01, 0.9, 1e-4)
    passer = Passer(SimpleNamespace(print_freq=10**6, block_loss_grad=False), precision=precision)
    return lambda: train(0, data, model, criterion, optimizer, 0, passer, None)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["vit_tiny", "res20s"])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8, help="batches of an epoch")
    parser.add_argument("--rounds", type=int, default=8, help="turns")
    parser.add_argument("--precision", nargs="+", default=["fp32", "auto"], help="fp32, bf16, auto; +compile compiles")
    parser.add_argument("--gpu", type=int, default=0)
    args = parser.parse_args()
    device = choose_device(args.gpu)
    choose_kernels(deterministic=False)
    print(harness.describe_machine(device))
    limits = {t: harness.matrix_limit(t, device) for t in (torch.float32, torch.bfloat16)}
    print("matrix products: " + ", ".join(f"{v / 1e9:.0f} GFLOP/s in {str(t)[6:]}" for t, v in limits.items()))
    count = args.batches * args.batch_size
    photos, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (count,))
    data = ImageSet(photos, labels)
    rows = []
    for arch in args.arch:
        loader = BatchLoader(data, args.batch_size, device, augment=True, flip=True)
        ordinary = plain.loader(photos, labels, args.batch_size, train=True)
        x, y = next(iter(loader))
        operations = operations_per_step(build_model(arch, 10, 32).to(device), x.contiguous(), y)
        for part, loops in variants(arch, loader, ordinary, args.precision, device).items():
            images = STEPS * args.batch_size if part == "step" else count
            times = harness.alternate(loops, args.rounds if part != "epoch" else max(3, args.rounds // 2), device)
            for name, seconds in times.items():
                dtype = torch.float32 if name == "plain" else choose_precision(name.partition("+")[0], device)
                rate = operations / (3 if part == "evaluation" else 1) * images / args.batch_size
                limit = [rate / s / limits[dtype] for s in seconds]
                faster = harness.ratios(times, "plain", name)
                goal = GOALS.get((arch, part, name))
                judged = "" if goal is None else f">= {goal}: {harness.verdict(statistics.median(faster) >= goal)}"
                rows.append(
                    [
                        arch,
                        part,
                        name,
                        f"{images / statistics.median(seconds):.0f}",
                        harness.spread(faster),
                        f"{100 * statistics.median(limit):.0f} %",
                        judged,
                    ]
                )
    print(harness.table(["model", "what", "loop", "images/s", "times plain", "of the limit", "goal"], rows))


if __name__ == "__main__":
    main()
