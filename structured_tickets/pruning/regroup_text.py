"""The documents' console blocks about a regrouping, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from structured_tickets.base.text_tables import counted
from structured_tickets.pruning.masks import Mask, MaskPair
from structured_tickets.pruning.shares import kept_per_kind
from structured_tickets.unit_groups.kinds import kind_of
from structured_tickets.unit_groups.unit import UnitGroup, kinds


def sparsity_percent(masks: Mapping[str, Tensor]) -> float:
    """Share of zeros over all given masks, in percent."""
    total = sum(m.numel() for m in masks.values())
    return 100 * (1 - sum(float(m.sum(dtype=m.dtype)) for m in masks.values()) / total) if total else 0.0


def ratio_labels(ratios: Mapping[str, float]) -> dict[str, float]:
    """Shares by kind of unit as the documents label them."""
    if len(ratios) == 1:
        return {"Prune Ratio": next(iter(ratios.values()))}
    return {f"{kind_of(kind).title} Prune Ratio": ratio for kind, ratio in ratios.items()}


def banner(targets: Sequence[str], criteria: str, ratios: Mapping[str, float], refill: bool) -> str:
    """The block that opens a regrouping. `targets` are the kinds of unit; `ratios` maps a label to a share."""
    name = " + ".join(kind_of(t).title for t in targets)
    title = "ViT Head-level" if list(targets) == ["head"] else f"ViT {name}"
    if "channel" in targets:
        title = "Channel-level"
    lines = ["=" * 80, f"[{title} Quasi-Structured Pruning]", f"  Criteria: {criteria}"]
    lines += [f"  {label}: {value}" for label, value in ratios.items()]
    lines += [f"  Mode: {'Refill (apply mask)' if refill else 'RSST (mask only)'}", "=" * 80]
    return "\n".join(lines)


def part_heading(number: int, kind: str) -> str:
    return f"\nPart {number}: {kind_of(kind).heading} ({kind.capitalize()}-level Structured)\n" + "-" * 80


def group_block(group: UnitGroup, scores: Tensor, kept: Tensor, current_mask: Mapping[str, Tensor]) -> str:
    """One unit group: what it is, how its units score, which of them stay."""
    root = group.root
    mask = current_mask[root.name]
    after = root.spread(kept, mask)
    lines = [f"\nLayer: {root.layer}", f"  Shape: {mask.shape}"]
    best = scores.argsort(descending=True, stable=True)[: int(kept.sum())].tolist()
    if group.kind == "head":
        lines.append(f"  Num heads: {group.units}, Head dim: {root.index.shape[1] // 3}, Embed dim: {mask.shape[1]}")
        lines.append(f"  Head importance: [{' '.join(f'{s:.6g}' for s in scores.tolist())}]")
    chosen = f": [{' '.join(map(str, best))}]" if group.kind == "head" else ""
    lines.append(f"  Keeping {len(best)}/{group.units} {group.kind}s{chosen}")
    lines.append(f"  Original sparsity: {sparsity_percent({'': mask}):.2f}%")
    lines.append(f"  New sparsity: {sparsity_percent({'': after}):.2f}% ({group.kind}-level)")
    return "\n".join(lines)


def kind_lines(groups: Sequence[UnitGroup], pair: MaskPair, targets: Sequence[str]) -> str:
    """A line for each kind of unit: what stays of it, and how sparse its layers were and are."""
    counts, lines = kept_per_kind(groups, pair), []
    for kind in (k for k in kinds(groups) if k in targets):
        names = list(dict.fromkeys(s.name for g in groups if g.kind == kind for s in g.slices if s.ranked))
        before, after = (sparsity_percent({n: m[n] for n in names}) for m in (pair.current, pair.refill))
        kept, units = counts[kind]
        of = f"{counted(len(names), 'layer')}, original sparsity {before:.2f}%, new sparsity {after:.2f}%"
        lines.append(f"{kind_of(kind).heading}: keeping {kept:,}/{counted(units, kind)} in {of}")
    return "\n".join(lines)


def summary(groups: Sequence[UnitGroup], refill: Mask) -> str:
    """Counts of masks and the overall sparsity of the prunable weights."""
    ranked = {
        k: list(dict.fromkeys(s.name for g in groups if g.kind == k for s in g.slices if s.ranked))
        for k in kinds(groups)
        if not kind_of(k).holds_units
    }
    names = [n for of_kind in ranked.values() for n in of_kind]
    lines = ["=" * 80, "Summary:", f"  Total masks generated: {len(names)}"]
    lines += [f"  {kind_of(kind).layers}: {len(of_kind)}" for kind, of_kind in ranked.items()]
    lines.append(f"  Overall sparsity: {sparsity_percent({n: refill[n] for n in names}):.2f}%")
    return "\n".join([*lines, "=" * 80])
