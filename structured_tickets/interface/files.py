"""`structured_tickets.save` and `load`: a shrunk network as files."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from structured_tickets.base.atomic_files import write_atomically
from structured_tickets.base.errors import BadValue, DataError, StorageError, UsageError, first_line
from structured_tickets.base.untrusted_text import check, is_mapping, parse_json
from structured_tickets.export import deployed
from structured_tickets.interface.architectures import Bounded, build, comes_from_a_file, named
from structured_tickets.interface.foreign import plain_copy, random_images, undisturbed, unwrapped
from structured_tickets.interface.rebuild import Way, is_same, rebuilt
from structured_tickets.interface.ticket import Ticket
from structured_tickets.unit_groups.kinds import CHANNEL_UNITS, FILTER

log = logging.getLogger("rsst")

FORMAT = 2  # 1 is what the program `export` writes
SLACK = 10**7  # numbers
MOST_FOR_ITS_FILE = 1000  # parameters of the dense network for each number in the file


def save(small: nn.Module, folder: str | Path) -> None:
    """Write a network that `shrink` made, as trained since, into `model.safetensors` and `config.json`.

    Where its architecture can be built by a name (the runner's own networks, timm's and torchvision's, with the usual
    arguments), the configuration says so, and it is tried out on the spot: the network is built again from what is to
    be written, and has to have the same layers and give the same logits. Of another architecture only the name of its
    class is noted; a line of the log says so, and `load` then needs `model`. No code and no pickle is written.

    Args:
        small: Wrapped in DistributedDataParallel or torch.compile, too. Must have the layers that `shrink` gave it.
        folder: Made if it is not there; files of those two names in it are replaced.

    Raises:
        BadType: `small` is not a network (a TypeError).
        BadValue: It did not come from `shrink` or `load` (a ValueError).
        StorageError: The folder cannot be written.
    """
    network = unwrapped(small)
    ticket = vars(network).get("structured_ticket")
    if not isinstance(ticket, Ticket):
        raise BadValue(f"this {type(network).__name__} did not come from structured_tickets.shrink: shrink it first")
    tensors = {n: v.detach().cpu().contiguous().clone() for n, v in network.state_dict().items()}
    config = {
        "format": FORMAT,
        "network": {"class": ticket.network},
        "image": list(ticket.image),
        "classes": ticket.classes,
        "heads": ticket.heads,
        "way": dict(ticket.way),
        "channels_last": _is_channels_last(network),
        "shapes": ticket.shapes,
        "kept": ticket.kept,
    }
    with undisturbed(network):
        way = _way_that_works(network, ticket, config, tensors)
    if way is None:
        log.info("%s cannot be built by a name: load it with load(%r, model=...)", ticket.network, str(folder))
    else:
        config["network"] = {"class": ticket.network, **way}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}") from error
    write_atomically(safetensors.torch.save(tensors), folder / "model.safetensors")
    write_atomically(json.dumps(config, indent=1) + "\n", folder / "config.json")


def _is_channels_last(network: nn.Module) -> bool:
    images = [p for p in network.parameters() if p.ndim == 4]
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in images)


def _way_that_works(
    network: nn.Module, ticket: Ticket, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """The first way to build a network of which the smaller copy, with these tensors, is the same; None without one."""
    twin = plain_copy(network).cpu().eval()
    images = random_images(ticket.image, twin)
    for way in ticket.ways:
        try:
            for described in named(way, ticket.classes, ticket.shapes):
                # A user's file is run as it has been before, to build the very network.
                arch = described["name"] if described["library"] == "structured_tickets" else None
                again = rebuilt(build(described, ticket.classes, arch), config, tensors)
                if is_same(again, twin, images):
                    return described
        except Exception as error:  # whatever another library raises for arguments that it does not take
            log.debug("%s is not built by %s: %s", ticket.network, way, first_line(error))
    return None


def load(
    folder: str | Path,
    arch: str | None = None,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """Return the network that `save`, or the program `export`, wrote; on the CPU, in eval mode.

    Nothing is unpickled, and no code of the files is run. What `export` wrote takes images with values in [0, 1]; what
    `save` wrote takes what it took before.

    Args:
        arch: The network, `file.py:factory`, if it comes from a user's file; that file's code is run.
        model: The dense network that was shrunk, or a function that makes it, if it cannot be built by a name; only its
            architecture matters. It is not changed.

    Raises:
        DataError: A file is missing, damaged, of another version, or it needs `arch` or `model`.
        BadType: `model` is neither a network nor a function that makes one (a TypeError).
        BadValue: `model` is another network than the one that was saved (a ValueError).
    """
    folder = Path(folder)
    with _reading(folder):
        config = parse_json((folder / "config.json").read_text())
        check(is_mapping(config), "a network's description")
    if "network" not in config:
        if model is not None:
            raise BadValue(f"model: {folder} was written by export and says which network it is; leave model out")
        return deployed.load(folder, arch)
    with _reading(folder):
        _check_config(config, folder)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        most = MOST_FOR_ITS_FILE * sum(v.numel() for v in tensors.values())
        check(_numbers(config) <= SLACK + most, "no more weights than a network of this size has had")
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.device("cpu"):
        dense = _dense(config, folder, arch, model)
        with _reading(folder, given=model is not None):
            return rebuilt(dense, config, tensors)


@contextmanager
def _reading(folder: Path, given: bool = False) -> Iterator[None]:
    """Raise a DataError of one line for whatever is wrong with files that may come from anybody.

    Args:
        given: The network was given by the caller, who is told if it is another one.
    """
    try:
        yield
    except DataError:
        raise
    except BadValue as error:
        if given:
            raise
        raise DataError(f"cannot read the network in {folder}: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError, UsageError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot read the network in {folder}: {first_line(error)}") from error


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raises: ValueError, if it is not what `save` writes; DataError, if another version wrote it."""
    if config.get("format") != FORMAT:
        raise DataError(f"{folder} was written by another version of this program")
    network: Any = config.get("network")
    shapes: Any = config.get("shapes")
    kept: Any = config.get("kept")
    check(is_mapping(network) and isinstance(network.get("class"), str), "the class of a network")
    check(_are_lengths(config.get("image"), 3), "three whole numbers as image")
    check(_are_lengths([config.get("classes")], 1), "a number of classes")
    check(type(config.get("heads")) is bool and type(config.get("channels_last")) is bool, "true or false as heads")
    way: Any = config.get("way", {})
    check(is_mapping(way) and way.keys() <= set(Way._fields), "how units were found")
    check(type(way.get("followed", False)) is bool, "true or false as followed")
    check(way.get("channel_units", FILTER) in tuple(CHANNEL_UNITS), "filter or stream as channel_units")
    check(is_mapping(shapes) and all(_are_lengths(shape) for shape in shapes.values()), "shapes")
    check(is_mapping(kept) and all(n in shapes and is_mapping(axes) for n, axes in kept.items()), "axes as kept")
    for name, axes in kept.items():
        known = [str(axis) for axis in range(len(shapes[name]))]
        check(all(axis in known for axis in axes), f"axes of {name}")
        check(all(_are_lengths(positions, least=0) for positions in axes.values()), f"positions of {name}")


def _numbers(config: Mapping[str, Any]) -> int:
    """Numbers in the tensors of the dense network, as the file says."""
    return sum(math.prod(shape) for shape in config["shapes"].values())


def _are_lengths(value: Any, count: int | None = None, least: int = 1) -> bool:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        return False
    return all(type(n) is int and least <= n < 2**31 for n in value) or (least == 1 and value == [])


def _dense(
    config: Mapping[str, Any], folder: Path, arch: str | None, model: nn.Module | Callable[[], nn.Module] | None
) -> nn.Module:
    """A network of the architecture that was shrunk, whatever its weights."""
    network = config["network"]
    if model is not None:
        return _given(model)
    if "library" not in network:
        raise DataError(
            f"{folder} holds a {network['class']}, which cannot be built by a name: call load with model=..., "
            "that network or a function that makes it"
        )
    if arch is not None and not comes_from_a_file(network):
        raise BadValue(f"arch: {folder} says which network it is; leave arch out")
    with _reading(folder), Bounded(SLACK + 4 * _numbers(config)):
        return build(network, config["classes"], arch)


def _given(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    made = model if isinstance(model, nn.Module) or not callable(model) else model()
    return plain_copy(unwrapped(made)).cpu()
