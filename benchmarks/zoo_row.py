"""One network of the zoo, measured: accepted or why not, the numbers that are reported and those that are true."""

from __future__ import annotations

import copy
import importlib
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.export.deployed import load, save
from structured_tickets.networks.external import build_external
from structured_tickets.networks.hosted import bare, put_normalize
from structured_tickets.networks.layers import Normalize, channels_side_by_side
from structured_tickets.networks.registry import spec_of
from structured_tickets.pruning.masks import Mask
from structured_tickets.pruning.usable_units import UsableUnits, usable_units
from structured_tickets.runs.launch import is_about_memory
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.shrinking.kept_units import kept_units_of
from structured_tickets.shrinking.shrink import masked_copy, shrink
from structured_tickets.unit_groups.unit import UnitGroup, masks_of_units

SIDES = (32, 64, 96, 128, 160, 192, 224, 240, 256)
CLASSES, BATCH, SECONDS, MOST_TURNS = 10, 16, 1.5, 400
NOT_FINISHED = "not finished in time"
Note = Callable[[dict[str, Any]], None]


def measure(name: str, note: Note, also: Collection[str] = ()) -> None:
    """Measure a network.

    Args:
        name: As `--arch` takes it.
        note: Called with parts of the row as soon as they are known.
        also: Names of `MORE` to try besides, and "torch_pruning": whether that can make the network smaller.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with _refusals(note, "build"):
        model = _smallest_images(name, note)
    with _refusals(note, "units"):
        small, masks = _prune(model, note)
    for word in (w for w in MORE if w in also):
        note({word: _tried(lambda word=word: MORE[word](model, small, masks))})  # type: ignore[misc]
    if "torch_pruning" in also:
        note({"torch_pruning": {"said": NOT_FINISHED}})
        note({"torch_pruning": _torch_pruning(copy.deepcopy(bare(model)), spec_of(model).image[1])})  # type: ignore


@contextmanager
def _refusals(note: Note, where: str) -> Iterator[None]:
    """Note an error, and go no further."""
    try:
        yield
    except UsageError as error:
        note({"outcome": "refused", "where": where, "reason": str(error)})
        raise SystemExit from error
    except Exception as error:
        if is_about_memory(error):
            note({"outcome": "stopped", "stopped": f"not enough memory: {first_line(error)}"})
        else:
            note({"outcome": "traceback", "where": where, "reason": _last_lines(error)})
        raise SystemExit from error


def _last_lines(error: Exception) -> str:
    own = [f for f in traceback.extract_tb(error.__traceback__) if "structured_tickets" in f.filename]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
    return f"{type(error).__name__} at {place}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"


def _smallest_images(name: str, note: Note) -> nn.Module:
    """Build a network for the smallest images that it takes."""
    sizes = ("cannot take images", "cannot be trained on images", "cannot be built")
    for side in SIDES:
        torch.manual_seed(0)
        try:
            model = build_external(name, CLASSES, side)
        except UsageError as error:
            if side == SIDES[-1] or not any(words in str(error) for words in sizes):
                raise
            continue
        note({"side": side, "parameters": sum(p.numel() for p in model.parameters())})
        return model
    raise AssertionError


def _prune(model: nn.Module, note: Note) -> tuple[nn.Module, Mask]:
    """Find units, remove half of them, and note what comes of it; return the smaller network."""
    side = spec_of(model).image[1]  # type: ignore[index]
    began = time.process_time()
    usable = usable_units(model, side, needed=True)
    note({"outcome": "accepted", "seconds": time.process_time() - began})
    groups = [g for g in usable.groups if g.kind != "row"]
    note({"share": share_in_units(model, groups), "units": _counted_units(groups), "whole": _whole(usable)})
    _randomise(model)
    masks = random_half(model, groups)
    with _refusals(note, "numbers"):
        small = channels_side_by_side(shrink(model, masks).network.eval())
        dense = channels_side_by_side(copy.deepcopy(model).eval())
        for word, network, pruned in (("dense", dense, {}), ("half", small, masks)):
            reported, counted = cost_of(model, pruned, side), independent_count(network, side)
            note({word: {"reported": [reported.parameters, reported.macs], "counted": list(counted)}})
        note({"gap": relative_difference(model, small, masks, side)})
    with _refusals(note, "time"):
        note({"times": times(dense, small, side)})
    return small, masks


def _counted_units(groups: Sequence[UnitGroup]) -> dict[str, int]:
    kinds = dict.fromkeys(g.kind for g in groups)
    return {kind: sum(g.units for g in groups if g.kind == kind) for kind in kinds}


def _whole(usable: UsableUnits) -> dict[str, int]:
    """Return why layers stay whole -> of how many layers that is said."""
    reasons = list(usable.whole.values())
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


def share_in_units(model: nn.Module, groups: Sequence[UnitGroup]) -> float:
    """Return the share of a network's weights (parameters of two axes or more) that belong to units."""
    parameters = dict(model.named_parameters())
    gone = {g.name: torch.zeros(g.units, dtype=torch.bool) for g in groups}
    masks = masks_of_units(groups, gone, parameters)
    owned = sum(int((m == 0).sum()) for m in masks.values() if m.ndim > 1)
    return owned / max(1, sum(p.numel() for p in parameters.values() if p.ndim > 1))


def random_half(model: nn.Module, groups: Sequence[UnitGroup]) -> Mask:
    """Return masks without half of the units of each group, chosen at random."""
    draw, kept = torch.Generator().manual_seed(0), {}
    for group in groups:
        kept[group.name] = torch.zeros(group.units, dtype=torch.bool)
        kept[group.name][torch.randperm(group.units, generator=draw)[: max(1, group.units // 2)]] = True
    return masks_of_units(groups, kept, dict(model.named_parameters()))


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Draw numbers in the places of those with which a new network hides mistakes: all alike, or zeros."""
    draw = torch.Generator().manual_seed(1)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point() or not value.numel():
            continue
        noise = torch.rand(value.shape, generator=draw)
        statistics_of_norm = name.endswith(("running_mean", "running_var"))
        if not statistics_of_norm and (
            not isinstance(value, nn.Parameter) or bool((value != value.flatten()[0]).any())
        ):
            continue
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.copy_(0.5 + noise)
        else:
            value.copy_((noise - 0.5) * (0.6 if value.ndim < 2 else (12 / max(1, value[0].numel())) ** 0.5))


@torch.no_grad()
def independent_count(network: nn.Module, side: int) -> tuple[int, int]:
    """Count parameters, and multiply-accumulates for one image while the network runs."""
    network = copy.deepcopy(network).requires_grad_(False)  # else the counter looks for gradients
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    mkldnn = torch.backends.mkldnn.flags(enabled=not any(isinstance(m, nn.RNNBase) for m in network.modules()))
    try:
        with sdpa_kernel(SDPBackend.MATH), mkldnn, FlopCounterMode(display=False) as counter:
            network(torch.rand(1, 3, side, side))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    unique = {id(p): p.numel() for p in network.parameters()}
    return sum(unique.values()), counter.get_total_flops() // 2


@torch.no_grad()
def relative_difference(model: nn.Module, small: nn.Module, masks: Mask, side: int) -> float:
    """Return by how much the compact network's logits differ from the masked one's, relative to the largest."""
    model.eval()
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(2))
    wanted = masked_copy(model, masks)(images)
    return float((small(images) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


@torch.no_grad()
def times(dense: nn.Module, small: nn.Module, side: int) -> dict[str, float]:
    """Return the processor time (ms) of each network for a batch, in turns, and the median ratio of a turn."""
    images = torch.rand(BATCH, 3, side, side).contiguous(memory_format=torch.channels_last)
    spent: dict[str, list[float]] = {"dense": [], "small": []}
    began = time.perf_counter()
    while len(spent["small"]) < 5 or (time.perf_counter() - began < SECONDS and len(spent["small"]) < MOST_TURNS):
        for word, network in (("dense", dense), ("small", small)):
            start = time.process_time()
            network(images)
            spent[word].append(1e3 * (time.process_time() - start))
    seconds = {word: some[1:] for word, some in spent.items()}
    ratios = [b / a for a, b in zip(seconds["dense"], seconds["small"], strict=True)]
    medians = {word: statistics.median(some) for word, some in seconds.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def _tried(action: Callable[[], object]) -> str:
    """Return "yes", or why not."""
    try:
        action()
    except Exception as error:  # whatever an exporter raises
        return _last_lines(error)
    return "yes"


def _images_of(model: nn.Module) -> Tensor:
    return torch.rand(2, *spec_of(model).image or (), generator=torch.Generator().manual_seed(3))


def _export(model: nn.Module, small: nn.Module, masks: Mask) -> None:
    torch.export.export(small, (_images_of(model),))


def _onnx(model: nn.Module, small: nn.Module, masks: Mask) -> None:
    torch.onnx.export(copy.deepcopy(small), (_images_of(model),), dynamo=True, verbose=False)


def _saved(model: nn.Module, small: nn.Module, masks: Mask) -> None:
    """Save a compact network as `export.py` does, read it again, and compare the logits."""
    spec, images = spec_of(model), _images_of(model)
    put_normalize(model, Normalize((0.0,) * 3, (1.0,) * 3))
    small, kept = shrink(model, masks).network.eval(), kept_units_of(model, masks)
    config = {"arch": spec.name, "classes": list(map(str, range(CLASSES))), "image_size": images.shape[-1]}
    config["followed"] = spec.followed
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save(small, {**config, "kept": kept}, Path(folder))
        torch.testing.assert_close(load(folder, spec.name)(images), small(images), rtol=1e-3, atol=1e-4)


MORE: dict[str, Callable[[nn.Module, nn.Module, Mask], None]] = {
    "torch_export": _export,
    "saved": _saved,
    "onnx": _onnx,
}
"""What else can be tried with the whole and the smaller network, and the masks between them."""


HEADS: tuple[dict[str, Any], ...] = (
    {},
    {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5},
)
"""How torch-pruning is told to treat attention: to make heads narrower, or to remove whole ones."""


def _torch_pruning(network: nn.Module, side: int) -> dict[str, Any]:
    """Return what torch-pruning makes of a network whose layers it is to halve.

    It is called as in its examples for networks of timm: with the classifier ignored, the number of heads of each layer
    `qkv`, and that and the size of a head set in the attention layers afterwards; with both ways of treating heads.

    Returns:
        `said`: "yes" if the smaller network runs, or why not. Then also `share` of the parameters that is left, and
        `gap`: by how much its logits differ from those of the whole network with zeros in the places of what is gone.
    """
    network.eval()
    _randomise(network)
    found: list[dict[str, Any]] = []
    for how in HEADS:
        row: dict[str, Any] = {}
        row["said"] = _tried(lambda how=how, row=row: _pruned_by_theirs(copy.deepcopy(network), side, how, row))  # type: ignore[misc]
        found.append(row)
    ran = [row for row in found if row["said"] == "yes"]
    return min(ran, key=lambda row: row["gap"]) if ran else found[0]


def _pruned_by_theirs(network: nn.Module, side: int, how: dict[str, Any], row: dict[str, Any]) -> None:
    """Raises: what torch-pruning or the smaller network raises; AssertionError, if nothing is removed."""
    tp = importlib.import_module("torch_pruning")
    masked, whole = copy.deepcopy(network), sum(p.numel() for p in network.parameters())
    attention: list[Any] = [m for m in network.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]
    pruner = tp.pruner.BasePruner(
        network,
        torch.rand(1, 3, side, side),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES],
        num_heads={m.qkv: m.num_heads for m in attention},
        **how,
    )
    twins = {id(m): masked.get_submodule(n) for n, m in network.named_modules()}
    left: dict[int, Tensor] = {}  # of each layer, which of its outputs are there when the next group is looked for
    for group in pruner.step(interactive=True):
        gone: dict[int, set[int]] = {}
        for member, index in group:
            number = id(member.target.module)
            if "in_channels" not in member.handler.__name__ and number in twins:
                there = left.setdefault(number, torch.arange(_outputs(twins[number])))
                _set_to_zero(twins[number], there[torch.as_tensor(index)])
                gone.setdefault(number, set()).update(map(int, index))
        group.prune()
        for number, places in gone.items():
            left[number] = left[number][[k not in places for k in range(len(left[number]))]]
    for layer in attention:
        layer.num_heads = pruner.num_heads[layer.qkv]
        rows = layer.qkv.weight.shape[0]
        layer.head_dim, layer.attn_dim = rows // (3 * layer.num_heads), rows // 3
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits, wanted = network(images), masked(images)
    assert tuple(logits.shape) == (2, CLASSES), "other logits"
    row["share"] = sum(p.numel() for p in network.parameters()) / whole
    assert row["share"] < 1, "nothing was removed"
    row["gap"] = float((logits - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _outputs(layer: nn.Module) -> int:
    """Return how many features a layer gives."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    first = next(layer.parameters(recurse=False), None)
    return 0 if first is None else first.shape[int(transposed)]


@torch.no_grad()
def _set_to_zero(layer: nn.Module, index: Tensor) -> None:
    """Set what a layer gives at these places to zero."""
    if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
        rows = index[:, None] + torch.arange(3) * layer.embed_dim
        for value in (layer.in_proj_weight, layer.in_proj_bias):
            if value is not None:
                value.index_fill_(0, rows.flatten(), 0)
        _set_to_zero(layer.out_proj, index)
        return
    for name, value in layer.named_parameters(recurse=False):
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd) and name == "weight"
        value.index_fill_(int(transposed), index, 0)
