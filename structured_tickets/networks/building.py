"""From what `--arch` says to a network: a row of `MODELS`, another library's network, or a user's own."""

from __future__ import annotations

import difflib
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING

from structured_tickets.networks.models_folder import file_in_models, maker_in
from structured_tickets.networks.registry import MODELS

if TYPE_CHECKING:
    from torch import nn

LIBRARIES = ("timm/", "torchvision/", "hf/")
SLIP = 0.9  # names that are as alike differ by a letter or two


def build_model(name: str, num_classes: int, img_size: int) -> nn.Module:
    """Build the model `name` (see `parse_arch`), freshly initialised from torch's global generator.

    Raises:
        UsageError: There is no such network, or it does not fit images of this size.
    """
    if name not in MODELS:
        from structured_tickets.networks.external import build_external

        return build_external(name, num_classes, img_size)
    build = MODELS[name].build
    if "img_size" in inspect.signature(build).parameters:
        return build(num_classes, img_size=img_size)
    return build(num_classes)


def parse_arch(text: str) -> str:
    """A name for `build_model`: a row of `MODELS`, `timm/<name>`, `torchvision/<name>`, `hf/<name>`, `file.py:factory`.

    The path of a file or, after `hf/`, of a folder becomes absolute, and the name of a file in `models/` becomes its
    path with the function or class that makes the network. Whether another library has the network shows when
    it is built.

    Raises:
        ValueError: It is none of these; the message says what is wrong.
    """
    if text.startswith("hf/") and os.path.isfile(os.path.join(text[3:], "config.json")):  # noqa: PTH113, PTH118
        return f"hf/{Path(text[3:]).resolve()}"
    dropped = None if _is_own(text) else file_in_models(text)
    if dropped is not None:
        return f"{dropped}:{maker_in(dropped)}"
    if text in MODELS or text.startswith(LIBRARIES):
        return text
    file, _, factory = text.rpartition(":")
    if text.endswith(".py"):
        raise ValueError(f"{text!r} does not say which function of it makes the network: {text}:NAME")
    if not file.endswith(".py"):
        slip = difflib.get_close_matches(text, MODELS, 1, cutoff=SLIP)
        near = slip or difflib.get_close_matches(text, MODELS, 1, cutoff=0.5)
        others = "" if slip else f", timm/{text} or torchvision/{text}"
        hint = f" (did you mean {near[0]}{others}?)" if near else ""
        raise ValueError(
            f"{text!r} is not one of {', '.join(MODELS)}, timm/NAME, torchvision/NAME, hf/NAME, FILE.py:FACTORY, the "
            f"name of a file in models/{hint}"
        )
    if not os.path.isfile(file):  # noqa: PTH113 (a Path would not answer for a name that is too long)
        raise ValueError(f"no such file: {file}")
    return f"{Path(file).resolve()}:{factory}"


def _is_own(name: str) -> bool:
    """True for a network of this package, which no file in `models/` takes the place of."""
    return name in MODELS and MODELS[name].build.__module__.startswith(f"{__package__}.")


def sources_of(arch: str) -> dict[str, str]:
    """Return hashes of the code that built this network from a user's file, by file; empty for all other networks."""
    if not runs_a_file(arch):
        return {}
    from structured_tickets.networks import user_files

    return user_files.sources_of(arch.rpartition(":")[0])


def runs_a_file(arch: str) -> bool:
    """Return whether building this network runs code of a user's file."""
    return arch not in MODELS and not arch.startswith(LIBRARIES)


def family_of(arch: str) -> str | None:
    """The family of a row of `MODELS`; None for other networks, which have to be built first."""
    return MODELS[arch].spec.family if arch in MODELS else None
