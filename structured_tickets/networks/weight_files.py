"""Files of weights as trainers write them: where in the file the weights of a network are, under whatever names.

Trainers put the state dict under keys of their own, wrap the network (`module.`, `_orig_mod.`, `model.`), and keep
averaged weights, a teacher or an optimizer beside it. So a file is taken as one list of tensors, each with its full
name: keys and the name in the state dict, with dots between. A place in the file is what full names begin with where
they end in the network's own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from structured_tickets.base.errors import DataError, first_line
from structured_tickets.base.stand_ins import StandIn
from structured_tickets.base.untrusted_tensors import load_foreign_tensors
from structured_tickets.base.weights import effective_state

DEEPEST = 16  # keys, one within the other

# What counters, older versions of layers and averages leave in state dicts: no network needs it from a file.
NOT_LEARNED = frozenset(
    ["attn_mask", "n_averaged", "num_batches_tracked", "relative_position_index", "total_ops", "total_params"]
)

# Words in a place whose weights are a second choice: averages over the steps before, and those that follow a teacher.
SECOND = frozenset(["average", "averaged", "avg", "ema", "polyak", "shadow", "slow", "student", "swa", "target"])
LAST = frozenset(["init", "initial", "optimizer"])


@dataclass(frozen=True)
class WeightFile:
    """Contents of a file of weights.

    Attributes:
        tensors: By full name.
        keys: Full name -> the keys that lead to the dictionary with the tensor, with dots between.
        settings: Dictionaries of other values, by their keys.
        unread: Classes of objects that were left unread.
    """

    file: Path
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    settings: dict[str, Mapping[Any, Any]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weights:
    """The weights of a network, as a file has them.

    Attributes:
        state: By the network's own names, as far as it has them.
        where: The place in words, for the log.
        place: What the full names begin with.
        others: Other places with weights of the same network, under the same key if one was given.
        left: Full names of tensors of the same dictionary that are in no such place.
    """

    state: dict[str, Tensor]
    where: str
    place: str
    others: tuple[str, ...]
    left: tuple[str, ...]


def read_weight_file(file: str | Path, failure: str) -> WeightFile:
    """Read a file of tensors without running its code.

    Args:
        failure: What messages begin with.

    Raises:
        DataError: It is unreadable, holds no tensors, or holds a network as an object of its class.
    """
    path = Path(file)
    if not path.is_file():  # a pipe would be waited for without end
        raise DataError(f"{failure}: there is no such file")
    if path.suffix == ".safetensors":
        tensors = _safetensors(path, failure)
        return WeightFile(path, tensors, dict.fromkeys(tensors, ""))
    found, unread = load_foreign_tensors(path, failure)
    tensors, keys, settings, networks = _flattened(found)
    tensors = _unmasked(tensors)
    keys = {name: keys.get(name, keys.get(f"{name}_orig", "")) for name in tensors}
    if not tensors and networks:
        raise DataError(f"{failure}: {_about_a_network(path, *networks[0])}")
    if not tensors:
        arrays = any(name.endswith(".ndarray") for name in unread)
        hint = ", only arrays of NumPy. Save a dictionary of tensors (torch.from_numpy)" if arrays else ""
        raise DataError(f"{failure}: it holds no state dict{hint}")
    return WeightFile(path, tensors, keys, settings, tuple(unread))


def _safetensors(path: Path, failure: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"{failure}: {first_line(error)}") from error


def _about_a_network(path: Path, keys: tuple[Any, ...], name: str) -> str:
    inside = "".join(f"[{key!r}]" for key in keys)
    line = f"torch.save(torch.load({str(path)!r}, weights_only=False){inside}.state_dict(), 'weights.pth')"
    return (
        f"it holds a whole network ({name}), which cannot be loaded without running its code. If you trust it, make a "
        f"file of its weights, in Python and where its code can be imported: import torch; {line}"
    )


Networks = list[tuple[tuple[Any, ...], str]]


def _flattened(found: Any) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Mapping[Any, Any]], Networks]:
    """Tensors by full name, the keys of each, dictionaries with settings, and networks by their keys.

    A dictionary that is there several times counts once, at the first place: a file can make many of a few. What lies
    deeper than trainers put anything is left out, for the same reason.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    settings: dict[str, Mapping[Any, Any]] = {}
    networks: Networks = []
    seen: set[int] = set()
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), found)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, StandIn):
            if value.is_network:
                networks.append((path, value.name))
                continue
            value = value.state
        if not isinstance(value, Mapping | list | tuple) or id(value) in seen or len(path) > DEEPEST:
            continue
        seen.add(id(value))
        where = ".".join(map(str, path))
        pairs = list(value.items() if isinstance(value, Mapping) else enumerate(value))
        pairs = [(key, inner) for key, inner in pairs if isinstance(key, str | int)]
        if isinstance(value, Mapping):
            settings[where] = value
        for key, inner in pairs:
            if isinstance(inner, Tensor) and isinstance(key, str):
                full = f"{where}.{key}" if where else key
                tensors.setdefault(full, inner)
                keys.setdefault(full, where)
        waiting += [((*path, key), inner) for key, inner in reversed(pairs) if not isinstance(inner, Tensor)]
    return tensors, keys, settings, networks


def _unmasked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, weights that torch's pruning has masked (`X_orig`, `X_mask`) as `X`, their product."""
    pairs = [(value, tensors.get(f"{n[:-5]}_mask")) for n, value in tensors.items() if n.endswith("_orig")]
    whole = all(mask is not None and mask.shape == value.shape for value, mask in pairs)
    return effective_state(tensors) if pairs and whole else tensors


def weights_for(own: Iterable[str], found: WeightFile, key: str | None = None) -> Weights:
    """Choose the weights of a network in a file.

    Args:
        own: Names of the parameters that are wanted.
        key: Where they are to be taken from: a part of a place.

    Raises:
        DataError: There are none under this key.
    """
    names = frozenset(own)
    counts = _places(names, found)
    best = max(counts.values(), default=0)
    places = [place for place, count in counts.items() if count == best]
    if not places:  # other names: what loads them can convert them, or say what differs
        places = [Counter(found.keys.values()).most_common(1)[0][0]]
    wanted = [place for place in counts if f".{key}." in f".{place}."] if key else places
    if not wanted:
        there = ", ".join(place or "(top level)" for place in places)
        said = f"{found.file} has no weights of this network under {key}. It has them under: {there}"
        raise DataError(f"argument --pretrained_key: {said}")
    wanted = [place for place in wanted if counts[place] == max(counts[p] for p in wanted)]
    place = min(wanted, key=_preference)  # of equals the first one
    return _weights_at(place, [p for p in wanted if p != place], places, found, names)


def _places(own: frozenset[str], found: WeightFile) -> Counter[str]:
    """Beginning of full names -> how many of them end in a name of the network's own; in the order of the file."""
    counts: Counter[str] = Counter()
    longest = max(map(len, own), default=0)
    for name in found.tensors:
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        near = [start for start in starts if len(name) - start <= longest]  # names can be of megabytes
        counts.update(name[: max(0, start - 1)] for start in near if name[start:] in own)
    return counts


def _preference(place: str) -> int:
    words = set(re.split(r"[._\W\d]+", place.lower()))
    return 2 if words & LAST else 1 if words & SECOND else 0


def _weights_at(
    place: str, others: Sequence[str], places: Sequence[str], found: WeightFile, own: frozenset[str]
) -> Weights:
    start = f"{place}." if place else ""
    under = [name for name in found.tensors if name.startswith(start)]
    keys = {found.keys[name] for name in under if name.removeprefix(start) in own} or {place}
    names = [name for name in under if found.keys[name] in keys]  # not what lies deeper, beside the network's own
    key = next(iter(keys)) if len(keys) == 1 else place
    prefix = place.removeprefix(key).removeprefix(".")
    parts = [f"key {key}"] if key else []
    parts += [f"prefix {prefix}. taken off"] if prefix else []
    known = tuple(f"{other}." for other in [*places, place] if other)
    left = [n for n in found.tensors if found.keys[n] in keys and not n.startswith(known)] if place else []
    state = {name.removeprefix(start): found.tensors[name] for name in names}
    return Weights(state, ", ".join(parts) or "top level of the file", place, tuple(others), tuple(left))
