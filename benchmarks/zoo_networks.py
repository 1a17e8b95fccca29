"""The networks of the zoo: the smallest of each family of timm, torchvision's classifiers, and users' files."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision.models
from timm.models import _registry
from torchvision.models import _api

from structured_tickets.networks.user_files import imported

HUGGING_FACE = ("vit", "deit", "beit", "swin", "convnext", "resnet")
"""Types of Hugging Face, in the sizes that they have by default: configurations by name would have to be downloaded."""


def names_of_networks(cache: Path, cases: Path | None) -> list[str]:
    """Return all names, as `--arch` takes them.

    Args:
        cache: File that notes the smallest network of each of timm's families, which takes minutes to find.
        cases: A folder with files of users, each factory of which is a network.
    """
    return [*_of_timm(cache), *_of_torchvision(), *_of_hugging_face(), *(_of_files(cases) if cases else [])]


def family_of(name: str) -> str:
    """Return timm's module, torchvision's, or the file that a network comes from."""
    library, _, rest = name.partition("/")
    if library == "timm":
        return f"timm: {_registry._model_to_module.get(rest, '?')}"
    if library == "torchvision":
        return f"torchvision: {_api.BUILTIN_MODELS[rest].__module__.rpartition('.')[2]}"
    return f"file: {Path(name.rpartition(':')[0]).stem}" if ":" in name else library


def _of_timm(cache: Path) -> list[str]:
    if not cache.exists():
        cache.write_text(json.dumps(_smallest_of_each_family(), indent=1) + "\n")
    return [f"timm/{name}" for name in json.loads(cache.read_text()).values()]


def _smallest_of_each_family() -> dict[str, str]:
    """Return module of timm's -> its network with the fewest parameters, of those that are not there for tests."""
    smallest = {}
    for module, names in sorted(_registry._module_to_models.items()):
        sizes = {n: _parameters_of(n) for n in sorted(names) if not n.startswith("test_")}
        smallest[module] = min(sizes, key=lambda name, sizes=sizes: sizes[name])  # type: ignore[misc]
        print(f"{module}: {smallest[module]}", file=sys.stderr, flush=True)
    return smallest


def _parameters_of(name: str) -> float:
    """Count the parameters of a network of timm's without memory for them; infinite if it cannot be built so."""
    with _linspace_on_cpu(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return sum(p.numel() for p in timm.create_model(name, num_classes=10).parameters())
        except Exception:  # whatever it makes of tensors without values
            return float("inf")


class _linspace_on_cpu:  # noqa: N801
    """Let networks read rates of dropping from `torch.linspace` while all other tensors have no values."""

    def __enter__(self) -> None:
        self.own: Callable[..., Any] = torch.linspace
        torch.linspace = lambda *args, **words: self.own(*args, **{**words, "device": "cpu"})  # type: ignore

    def __exit__(self, *_: object) -> None:
        torch.linspace = self.own  # type: ignore[assignment]


def _of_torchvision() -> list[str]:
    return [f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models)]


def _of_hugging_face() -> list[str]:
    return [f"hf/{name}" for name in HUGGING_FACE]


def _of_files(folder: Path) -> list[str]:
    files = [f for f in sorted(folder.rglob("*.py")) if "num_classes" in f.read_text()]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = pool.map(_factories, files, chunksize=1)
    return [f"{file}:{name}" for file, names in zip(files, found, strict=True) for name in names]


def _factories(file: Path) -> list[str]:
    """Return the names of a file's functions and classes that take `num_classes`; the file is run."""
    with imported(str(file)) as module:
        own = {n: v for n, v in vars(module).items() if not n.startswith("_") and callable(v)}
        return [n for n, v in own.items() if _first_argument(v) == "num_classes"]


def _first_argument(function: Callable[..., Any]) -> str:
    try:
        return next(iter(inspect.signature(function).parameters), "")
    except ValueError:  # some types of Python's own have none
        return ""
