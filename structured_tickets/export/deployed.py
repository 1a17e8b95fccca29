"""Write and read a smaller network that can be used without the run that it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from structured_tickets.base.atomic_files import write_atomically
from structured_tickets.base.errors import DataError, UsageError, first_line
from structured_tickets.base.untrusted_text import check, is_mapping, is_words, parse_json
from structured_tickets.networks import build_model, runs_a_file
from structured_tickets.networks.hosted import put_normalize
from structured_tickets.networks.layers import Normalize, channels_side_by_side
from structured_tickets.networks.registry import note_channel_units
from structured_tickets.pruning.usable_units import note_what_had_units
from structured_tickets.shrinking.kept_units import structure_of
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.unit_groups.kinds import CHANNEL_UNITS, FILTER

FORMAT = 1
LARGEST_IMAGE = 4096  # pixels a side: a file must not make a network that fills the memory


def save(network: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Write `model.safetensors` and `config.json` into a folder that exists.

    Args:
        config: `arch`, `classes`, `image_size`, `kept` (see `kept_units_of`), and whatever else is worth knowing.
    """
    tensors = {n: v.detach().cpu().contiguous().clone() for n, v in network.state_dict().items()}
    write_atomically(safetensors.torch.save(tensors), folder / "model.safetensors")
    write_atomically(json.dumps({"format": FORMAT, **config}, indent=1) + "\n", folder / "config.json")


def load(folder: str | Path, arch: str | None = None) -> nn.Module:
    """Return the network that `save` wrote, in eval mode. No code from the files is run.

    It takes images [batch, 3, size, size] in [0, 1] and gives logits.

    Args:
        arch: The network, `file.py:factory`, if it comes from a user's file, whose code is run.

    Raises:
        DataError: A file is missing, damaged, or of another version or model.
    """
    folder = Path(folder)
    try:
        config = _config(folder / "config.json")
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        if runs_a_file(config["arch"]) and arch is None:
            raise DataError(f"the network in {folder} comes from {config['arch']}: give that as `arch` to run its code")
        with torch.random.fork_rng(devices=[]):
            model = build_model(arch or config["arch"], len(config["classes"]), config["image_size"])
        put_normalize(model, Normalize((0.0,) * 3, (1.0,) * 3))
        note_channel_units(model, config.get("channel_units", FILTER), (3, config["image_size"], config["image_size"]))
        network = _of_these_shapes(model, config, tensors)
        network.load_state_dict(tensors)
    except (OSError, ValueError, RuntimeError, UsageError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot read the network in {folder}: {first_line(error)}") from error
    return channels_side_by_side(network.eval())


def _of_these_shapes(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return the network of which the tensors are: that of the units kept, in one of the ways of making it smaller."""
    shapes = {n: v.shape for n, v in tensors.items()}
    note_what_had_units(model, config["kept"], config.get("followed", False))
    structure = structure_of(model, config["kept"])
    found = shrink(model, structure).network  # which way is the faster one can be judged otherwise here
    for spread in (0, 1, 2):
        if {n: v.shape for n, v in found.state_dict().items()} != shapes:
            found = shrink(model, structure, spread=spread).network
    return found


def _config(file: Path) -> dict[str, Any]:
    """Return what `save` wrote beside the tensors.

    Raises:
        DataError: Another version of this program wrote it.
        ValueError: It is not what `save` writes.
    """
    config = parse_json(file.read_text())
    check(is_mapping(config), "a network's description")
    if config.get("format") != FORMAT:
        raise DataError(f"{file.parent} was written by another version of this program")
    size, kept = config.get("image_size"), config.get("kept")
    check(isinstance(config.get("followed", False), bool), "true or false as followed")
    check(isinstance(config.get("arch"), str), "a network's name as arch")
    check(config.get("channel_units", FILTER) in CHANNEL_UNITS, f"one of {', '.join(CHANNEL_UNITS)} as channel_units")
    check(is_words(config.get("classes")), "names as classes")
    check(isinstance(size, int) and 0 < size <= LARGEST_IMAGE, "a number of pixels as image_size")
    check(is_mapping(kept) and all(isinstance(units, list) for units in kept.values()), "lists of units as kept")
    check(all(type(unit) is int for units in kept.values() for unit in units), "whole numbers as units")
    return config
