"""One row per model: how to build it, and which of its layers are never pruned.

Modules that register models import torch only when they build one, so that the command line can list them at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from structured_tickets.base.errors import UsageError

if TYPE_CHECKING:
    from torch import fx, nn


@dataclass(frozen=True)
class ModelSpec:
    """Notes on a network: all that the algorithms may know without knowing its layers.

    A network that is registered carries it as `.spec`; of others, their host keeps it (`networks.hosted`).

    Attributes:
        stem: Name of the first layer (stem convolution or patch embedding), left dense unless asked for.
        classifier: Name of the last layer, never pruned; started afresh by `--prune_type pt`.
        family: "cnn" (units are channels), "vit" (units are heads and MLP neurons), or "" where only its layers tell.
        pretrained: Name of the timm model whose ImageNet weights fit this one, if any.
        branches: True if branches of it can be left out at random (`stochastic_depth`).
        whole: Attention layers and MLPs (their first layers' names) whose units cannot be removed.
        has_units: False if no units are removed from the network, only weights one by one.
        image: (channels, height, width) of the images that it was built for; None if its layers tell enough without.
        outputs: Number of outputs while it trains, of which the first are the logits.
        side_by_side: False if its forward pass cannot compute with channels side by side in memory (channels last), as
            one that takes `view` of a feature map: then images and weights stay as it was written for.
        channel_units: What a channel is as a unit: a row of `unit_groups.kinds.CHANNEL_UNITS`.
        followed: True if its features are followed although its layers, or the graph of its modules, seem to tell its
            units: these could not be removed.
    """

    name: str = ""
    stem: str = "conv1"
    classifier: str = "fc"
    family: str = "cnn"
    pretrained: str | None = None
    branches: bool = False
    whole: frozenset[str] = frozenset()
    has_units: bool = True
    outputs: int = 1
    side_by_side: bool = True
    followed: bool = False
    image: tuple[int, int, int] | None = None
    channel_units: str = "filter"


@dataclass(frozen=True)
class ModelEntry:
    """A registered model: its row and the function that builds it."""

    spec: ModelSpec
    build: Callable[..., nn.Module]


MODELS: dict[str, ModelEntry] = {}
ORIGIN = "_origin_of_the_network"
ROW = "_row_of_the_network"
"""Attribute of a host under which it keeps the row of its network."""
AS_IT_IS = "_layout_stays_as_it_is"


def register_model(
    name: str, *, stem: str, classifier: str, family: str, pretrained: str | None = None, branches: bool = False
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Add a model to `MODELS` under `name`; the model that is built carries its row as `.spec`.

    The decorated function takes the number of classes first and, if its size depends on it, `img_size`.
    """
    spec = ModelSpec(name, stem, classifier, family, pretrained, branches or family == "vit")

    def decorate(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in MODELS and _place_of(MODELS[name].build) != _place_of(build):  # a user's file is run again and again
            raise ValueError(f"two models are registered as {name!r}")

        @functools.wraps(build)
        def build_with_spec(*args: object, **kwargs: object) -> nn.Module:
            model = build(*args, **kwargs)
            model.spec = spec  # type: ignore[assignment]
            return model

        MODELS[name] = ModelEntry(spec, build_with_spec)
        return build_with_spec

    return decorate


def _place_of(build: Callable[..., nn.Module]) -> tuple[str, str]:
    return build.__module__, build.__qualname__


class Origin:
    """Facts that all copies of a network have in common."""

    def __copy__(self) -> Origin:
        return self

    def __deepcopy__(self, memo: object) -> Origin:
        return self


def origin_of(model: nn.Module) -> Origin | nn.Module:
    """Return what a network shares with its copies, if there are notes on it; any other is its own."""
    return _notes(model).get(ORIGIN, model)


def spec_of(model: nn.Module) -> ModelSpec:
    """Return the row of a registered or hosted network; the documents' names (`conv1`, `fc`) for any other."""
    spec = _notes(model).get(ROW, vars(model).get("spec"))
    return spec if isinstance(spec, ModelSpec) else ModelSpec()


def _notes(model: nn.Module) -> dict[str, Any]:
    """Return where notes on a network are kept, which its copies get."""
    own = vars(model)
    is_graph = any(kind.__name__ == "GraphModule" for kind in type(model).__mro__)
    return own["meta"] if is_graph and isinstance(own.get("meta"), dict) else own  # torch copies nothing else of graphs


def takes_channels_side_by_side(model: nn.Module) -> bool:
    """Return what the notes on a network, or on the one that a graph was traced of, say: see `ModelSpec`."""
    return spec_of(model).side_by_side and not _notes(model).get(AS_IT_IS, False)


def note_layout_of(model: nn.Module, graph: fx.GraphModule) -> None:
    """Note on a graph that was traced of a network how that computes."""
    graph.meta[AS_IT_IS] = not takes_channels_side_by_side(model)  # torch copies `meta` with a graph, and no attributes


def change_notes(model: nn.Module, spec: ModelSpec) -> None:
    """Replace what is noted on a network."""
    _notes(model).setdefault(ORIGIN, Origin())
    _notes(model)[ROW] = spec


def forget_notes(model: nn.Module) -> None:
    """Drop what `change_notes` has noted on a network."""
    for name in (ORIGIN, ROW):
        _notes(model).pop(name, None)


def note_channel_units(model: nn.Module, channel_units: str, image: tuple[int, int, int]) -> None:
    """Note on a network what a channel is as a unit, and (channels, height, width) of its images."""
    if channel_units != spec_of(model).channel_units:
        change_notes(model, replace(spec_of(model), channel_units=channel_units, image=image))


def require_size(name: str, img_size: int, at_least: int = 1, multiple_of: int = 1) -> None:
    """Refuse images (of `img_size` pixels a side) that the model `name` cannot take.

    Raises:
        UsageError: They are too small, or cannot be cut into patches.
    """
    if img_size < at_least:
        raise UsageError(f"{name} needs an --image_size of at least {at_least}, not {img_size}")
    if img_size % multiple_of:
        raise UsageError(f"{name} needs an --image_size divisible by {multiple_of}, not {img_size}")
