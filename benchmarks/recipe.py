"""What each part of a training recipe adds to a step: augmentation, optimizer, teacher; over the plain step."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch

from benchmarks import harness
from benchmarks.gpu_loops import PENALTY, SIZE, Ours, network, photos
from structured_tickets.data.mixing import Mixing
from structured_tickets.data.policies import NONE, POLICIES
from structured_tickets.networks import MODELS
from structured_tickets.networks.stochastic_depth import drop_branches
from structured_tickets.runs.setup import choose_device, choose_kernels
from structured_tickets.training.averaging import Average
from structured_tickets.training.distillation import Distillation, as_teacher

GOAL = 1.10  # times the plain step, for the whole recipe but the teacher


def parts_of(arch: str, device: torch.device) -> dict[str, Callable[[Ours], None]]:
    """Name of a part -> what makes a loop have it."""
    clipped = SimpleNamespace(**vars(PENALTY), clip_grad=1.0)
    teacher = as_teacher(copy.deepcopy(network(arch, device)))

    def mix(mixup: float, cutmix: float) -> Callable[[Ours], None]:
        return lambda loop: setattr(loop.passer, "mixing", Mixing(mixup, cutmix, 10, SIZE, 0, 0))

    def augment(policy: str) -> Callable[[Ours], None]:
        return lambda loop: setattr(loop.loader, "policy", policy)

    return {
        "--mixup": mix(1.0, 0.0),
        "--cutmix": mix(0.0, 1.0),
        "--mixup --cutmix": mix(1.0, 1.0),
        "--random_erasing": lambda loop: setattr(loop.loader, "erasing", 0.25),
        **{f"--auto_augment {policy}": augment(policy) for policy in POLICIES if policy != NONE},
        "--ema": lambda loop: setattr(loop.passer, "average", Average(loop.model, 0.999, 0, {})),
        "--drop_path": lambda loop: drop_branches(loop.model, 0.1),
        "--clip_grad": lambda loop: setattr(loop.passer, "args", clipped),
        "--distill dense": lambda loop: setattr(loop.passer, "distillation", Distillation(teacher, 0.9, 4.0, "kl")),
    }


def loops_of(arch: str, batch: int, steps: int, device: torch.device) -> dict[str, Ours]:
    """The plain loop, one for each part, and one with all of them but the teacher."""
    data, parts = photos(batch * steps, device), parts_of(arch, device)
    special = {"nesterov": True, "decay_matrices_only": True}
    loops = {"plain": Ours(arch, data, batch, "auto")}
    for name, add in parts.items():
        loops[name] = Ours(arch, data, batch, "auto")
        add(loops[name])
    loops["--nesterov --no_decay_on_bias_and_norm"] = Ours(arch, data, batch, "auto", momentum=special)
    loops["all but the teacher"] = Ours(arch, data, batch, "auto", momentum=special)
    for name in ("--mixup --cutmix", "--random_erasing", "--auto_augment cifar", "--ema", "--drop_path", "--clip_grad"):
        if name in parts:
            parts[name](loops["all but the teacher"])
    return loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["res20s", "vit_tiny"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="of a pass, which is what is timed")
    parser.add_argument("--rounds", type=int, default=7, help="turns")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    device = choose_device(0, args.device)
    choose_kernels(deterministic=False)
    rows = []
    for arch in args.arch:
        loops = loops_of(arch, args.batch_size, args.steps, device)
        times = harness.alternate({name: loop.train for name, loop in loops.items()}, args.rounds, device)
        for name in loops:
            ratios = harness.ratios(times, name, "plain")
            goal = f"<= {GOAL}: {harness.verdict(sorted(ratios)[len(ratios) // 2] <= GOAL)}"
            rows.append([arch, name, harness.spread(ratios), goal if name == "all but the teacher" else ""])
    print(harness.describe_machine(device))
    print(f"\n{harness.table(['model', 'part', 'step / plain step', 'goal'], rows)}")


if __name__ == "__main__":
    main()
