"""Find the units of any network: heads, neurons and blocks of transformers; channels of all others.

Three ways are tried. Attention and MLPs in the form of timm's are known by their layers. Channels are found in the
graph of the network's modules, if every operation in it is known. Where that does not do, features are followed through
the operations that run (`features.following`), which takes seconds, however they are written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.conv import _ConvNd

from structured_tickets.base.errors import UsageError
from structured_tickets.features.attributes import settable, sizes_of_parts
from structured_tickets.features.exported import program_of
from structured_tickets.features.following import Following
from structured_tickets.networks.registry import ModelSpec, origin_of, spec_of
from structured_tickets.unit_groups.channels import channel_groups as channels_of_modules
from structured_tickets.unit_groups.from_features import channels_of, linear_units, neurons_of, why_layers_stay
from structured_tickets.unit_groups.kinds import STREAM
from structured_tickets.unit_groups.streams import streams_of
from structured_tickets.unit_groups.transformer import is_vit_model, neuron_groups, vit_groups
from structured_tickets.unit_groups.unit import UnitGroup, parameter_of, ranked_names

LITTLE = 0.5
"""Share of the weights of layers: where fewer are in units that are found easily, others are looked for."""
NEXT_TO_NOTHING = 0.05
"""Share of these weights: where following features finds no more than this besides, it is not worth it."""
_followed: WeakKeyDictionary[object, dict[tuple, Following | UsageError | None]] = WeakKeyDictionary()
"""What a network has in common with its copies -> shapes of the tensors of one -> its features."""


def unit_groups(model: nn.Module, prune_stem: bool = False, blocks: bool = False) -> list[UnitGroup]:
    """Return the unit groups of any network.

    Args:
        prune_stem: Include the first layer (stem convolution or patch embedding).
        blocks: Include the attention and MLP branches of a transformer as units too.

    Raises:
        UsageError: The units of the network cannot be followed.
    """
    if _is_told_by_layers(model) or not spec_of(model).has_units:
        return vit_groups(model, prune_stem, blocks)
    following = features_of(model)
    spec = spec_of(model)
    linear = [] if following is None else linear_units(model, following, spec)
    if not _is_transformer(model, linear):
        return channel_groups(model, prune_stem)
    found = [] if following is None else linear_units(model, following, spec, convolutions=True)
    return [g for g in found if g.name not in spec.whole]


def channel_groups(
    model: nn.Module, conv1: bool = False, spec: ModelSpec | None = None, image: Sequence[int] | None = None
) -> list[UnitGroup]:
    """Return one group per convolution: see `channels.channel_groups`.

    Args:
        conv1, spec: See there.
        image: (channels, height, width) of the images that the network takes; default: what its notes say.

    Raises:
        UsageError: The network's forward pass cannot be followed, or two layers have the same weights.
    """
    following = features_of(model, image)
    if following is None:
        return channels_of_modules(model, conv1, spec)
    spec = spec or spec_of(model)
    if spec_of(model).channel_units == STREAM:
        return [g for g in streams_of(model, following, spec, conv1) if g.name not in spec_of(model).whole]
    return channels_of(model, following, spec, conv1) + neurons_of(model, following, spec)


def is_transformer(model: nn.Module, image: Sequence[int] | None = None) -> bool:
    """True if the units of the network are heads and MLP neurons; its convolutions are not pruned then.

    False if its only MLPs are a classifier or weigh channels (squeeze and excitation): such are parts of CNNs. True,
    too, of a network without any units, as noted on it: nothing in its graph has to be followed then.
    """
    if _is_told_by_layers(model) or not spec_of(model).has_units:
        return True
    try:
        following = features_of(model, image)
    except UsageError:
        return False
    return following is not None and _is_transformer(model, linear_units(model, following, spec_of(model)))


def _is_transformer(model: nn.Module, groups: Sequence[UnitGroup]) -> bool:
    return any(g.kind == "head" for g in groups) or _mixes_features(model, groups)


def _is_told_by_layers(model: nn.Module) -> bool:
    return not spec_of(model).followed and _is_known_transformer(model)


def _is_known_transformer(model: nn.Module) -> bool:
    return is_vit_model(model) or _mixes_features(model, neuron_groups(model))


def _mixes_features(model: nn.Module, groups: Sequence[UnitGroup]) -> bool:
    """True if an MLP gives as many features as it takes, and has no fewer in between."""
    layers = [[parameter_of(model, s.name) for s in g.slices] for g in groups]
    return any(last.shape[0] == first.shape[1] <= last.shape[1] for first, *_, last in layers)


def features_of(model: nn.Module, image: Sequence[int] | None = None) -> Following | None:
    """Return the features of a network whose units are not found more easily, or are streams; None for others.

    Args:
        image: (channels, height, width) of the images that the network takes; default: what its notes say.

    Raises:
        UsageError: They cannot be followed.
    """
    spec = spec_of(model)
    if _is_told_by_layers(model) or not spec.has_units:
        return None
    known, asked = _followed.setdefault(origin_of(model), {}), spec.followed or spec.channel_units == STREAM
    key = (asked, *_what_tells_copies_apart(model))
    if key not in known:
        try:
            known[key] = _needed_following(model, image or spec.image, asked)
        except UsageError as error:
            known[key] = error
    found = known[key]
    if isinstance(found, UsageError):
        raise found
    return found


def reasons_of_layers(model: nn.Module) -> dict[str, str]:
    """Return why what layers compute cannot be removed, as far as following features has shown: layer -> in words."""
    try:
        following = features_of(model)
    except UsageError:
        return {}
    return {} if following is None else why_layers_stay(following)


def _what_tells_copies_apart(model: nn.Module) -> tuple:
    """Names and shapes of all tensors: a copy from which something was removed has others."""
    return tuple((n, v.shape) for n, v in (*model.named_parameters(), *model.named_buffers()))


def _needed_following(model: nn.Module, image: Sequence[int] | None, asked: bool) -> Following | None:
    """Follow a network whose modules do not tell enough, or whose notes ask for it."""
    if asked and image is not None:
        return _follow(model, image)
    reason: Exception | None = None
    easy = 0.0
    try:
        if image is None:
            return None
        copied = copy.deepcopy(model)  # tracing runs its code, which may take notes
        easy = share_in_units(copied, channels_of_modules(copied, sure=True))
        if easy >= LITTLE and _share_of_other_convolutions(copied) <= NEXT_TO_NOTHING:
            return None
    except Exception as error:  # whatever the network's code, or the names that it gives its layers, lead to
        if image is None:
            if isinstance(error, UsageError):
                return None
            raise
        reason = error
    try:
        following = _follow(model, image)
    except UsageError as error:
        if reason is None:  # the easy way found something
            return None
        raise error from reason
    spec = spec_of(model)
    if reason is None and not _is_transformer(model, linear_units(model, following, spec)):
        found = channels_of(model, following, spec, stem=False) + neurons_of(model, following, spec)
        return following if share_in_units(model, found) > easy + NEXT_TO_NOTHING else None
    return following


def _follow(model: nn.Module, image: Sequence[int]) -> Following:
    """Raises: UsageError, if the network's forward pass cannot be recorded."""
    following = Following()
    for training in (False, True):
        following.follow(program_of(model, image, training))
    for padding in following.features.paddings:
        if not any(settable(model, padding)):
            for zeros in (padding.before, padding.after):
                following.features.keep_whole(zeros, "zeros are added by their number")
    following.fixed += [(p.labels, p.axis) for p in following.features.parts if not any(sizes_of_parts(model, p))]
    following.keep_what_is_read_elsewhere()
    following.keep_what_makes_no_tensor()
    return following


def _share_of_other_convolutions(model: nn.Module) -> float:
    """Return the share of the weights in convolutions that are not found easily: transposed ones, of other axes."""
    layers = [m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear)]
    sizes = [sum(p.numel() for p in m.parameters(recurse=False)) for m in layers]
    others = [s for s, m in zip(sizes, layers, strict=True) if not isinstance(m, nn.Conv2d | nn.Linear)]
    return sum(others) / max(1, sum(sizes))


def share_in_units(model: nn.Module, groups: Iterable[UnitGroup]) -> float:
    """Return the share of the weights of layers that are in layers which groups own weights of."""
    names = ranked_names(model, groups)
    layers = [m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear)]
    weights = sum(p.numel() for m in layers for n, p in m.named_parameters(recurse=False) if n.startswith("weight"))
    return sum(parameter_of(model, name).numel() for name in names) / max(1, weights)
