"""What happens between two rounds: global L1 over all weights, and the regroup of heads and neurons, by criterion."""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks import harness
from structured_tickets.pruning.budgets import budget
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.evidence import Evidence, FeatureStatistics
from structured_tickets.pruning.masks import MaskPair, l1_mask
from structured_tickets.networks import MODELS, build_model
from structured_tickets.pruning.regroup import regroup
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import ranked_names
from structured_tickets.runs.setup import choose_device
from structured_tickets.base.weights import cloned_state

GOAL = 0.3


def made_up_features(weights: dict[str, torch.Tensor], layers: list[str]) -> dict[str, FeatureStatistics]:
    """Random statistics in the shape of collected ones: collecting them is a forward pass, which is not timed here."""
    return {
        n: FeatureStatistics(*(torch.rand(weights[f"{n}.weight"].shape[0]).double() for _ in range(3))) for n in layers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=[n for n, m in MODELS.items() if m.spec.family == "vit"], default="vit_base")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gpu", type=int, default=-1)
    args = parser.parse_args()
    device = choose_device(args.gpu)
    print(harness.describe_machine(device))
    torch.manual_seed(0)
    model = build_model(args.arch, 10, 32)
    groups, weights = unit_groups(model), cloned_state(model)
    names = ranked_names(model, groups)
    ranked = {n: weights[n].to(device) for n in names}
    total = sum(w.numel() for w in ranked.values())
    kinds = {k: sum(g.units for g in groups if g.kind == k) for k in ("head", "neuron")}
    print(f"{args.arch}: {kinds['head']} heads, {kinds['neuron']:,} neurons, {total:,} ranked weights")
    current = l1_mask(ranked, None, round(0.7 * total))
    evidence = Evidence(weights | ranked, current, made_up_features(weights, [g.root.layer for g in groups]))
    rules = {k: budget("global", ratio=0.3) for k in kinds}
    actions = {c: lambda c=c: regroup(groups, current, evidence, c, rules) for c in CRITERIA}  # type: ignore[misc]
    times = harness.alternate(actions, args.rounds, device)
    rows = [
        [f"regroup, {c}", harness.spread(s, 3), f"<= {GOAL} s: {harness.verdict(statistics.median(s) <= GOAL)}"]
        for c, s in times.items()
    ]
    refill = regroup(groups, current, evidence, "magnitude", rules)
    others = {
        "global L1": lambda: l1_mask(ranked, None, round(0.7 * total)),
        "masks checked and paired": lambda: MaskPair(current, refill).doomed,
    }
    for name, seconds in harness.alternate(others, args.rounds, device).items():
        rows.append([name, harness.spread(seconds, 3), ""])
    print(harness.table(["part", "seconds", "goal"], rows))


if __name__ == "__main__":
    main()
