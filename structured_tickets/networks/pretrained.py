"""ImageNet weights: from timm, or from a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from structured_tickets.base.errors import DataError, first_line
from structured_tickets.base.text_tables import counted, few
from structured_tickets.networks.hosted import bare, of_the_data
from structured_tickets.networks.hugging_face import is_of_transformers, renamed
from structured_tickets.networks.input_statistics import Statistics, wanted_statistics
from structured_tickets.networks.registry import ModelSpec, spec_of
from structured_tickets.networks.weight_files import NOT_LEARNED, WeightFile, Weights, read_weight_file, weights_for

log = logging.getLogger("rsst.models")

WHERE_IT_FITS = "where it fits"


def load_pretrained_weights(
    model: nn.Module,
    spec: ModelSpec,
    file: str | Path | None = None,
    with_classifier: bool | str = False,
    key: str | None = None,
) -> Statistics | None:
    """Load ImageNet weights, or those of a file, into `model`; by default its classifier stays as it was.

    The log says where in the file they were found, and what was not taken. Patch and position embeddings are resampled
    to the model's patch and image size by timm.

    Args:
        spec: The model's row: the timm model to fetch when no file is given, and the classifier's name.
        file: A local checkpoint (`.safetensors`, `.pth`), read without unpickling code.
        with_classifier: Load the classifier too; its classes must then be the model's. `WHERE_IT_FITS`: or else it
            starts fresh.
        key: Where in the file the weights are, if it has several.

    Returns:
        Mean and standard deviation of the images that the weights want; None where that is not known.

    Raises:
        DataError: No weights can be had, or they do not fit the model.
    """
    found = chosen = None
    if file is not None:
        source, found = str(file), read_weight_file(file, f"cannot read weights from {file}")
        chosen = weights_for(_names_of(model, spec, with_classifier is True), found, key)
        weights = _in_own_names(model, chosen.state, source)
    elif spec.pretrained is not None:
        source, weights = spec.pretrained, _weights_from_timm(spec.pretrained)
    else:
        raise DataError("no ImageNet weights are published for this model. Give a file with --pretrained")
    heads = set() if with_classifier is True else _heads(model, spec, weights)
    if with_classifier == WHERE_IT_FITS:
        heads = {head for head in heads if not _fits(model, head, weights)}
    extra = _load(model, weights, source, heads)
    if found and chosen:
        _report(found, chosen, extra)
    left_out = {*extra, *of_the_data(model)}
    taken = [name for name in weights if name not in left_out and _layer(name) not in heads]
    kinds = _other_types(model, {name: weights[name] for name in taken})
    where = f" ({chosen.where})" if chosen else ""
    log.info("loaded %d tensors from %s%s%s", len(taken), source, where, f", converted from {kinds}" if kinds else "")
    for head in sorted(heads):
        log.info("%s", _about_a_head(model, head, weights))
    if heads and with_classifier == WHERE_IT_FITS:
        log.warning("round 0 is judged with a classifier that nothing has trained: its accuracy is that of chance")
    wanted = wanted_statistics(model, spec, found, chosen)
    if wanted is None:
        log.warning(
            "%s does not say how its images were normalised. The mean and standard deviation of the training images "
            "are used. If the weights want others, save them in the same file, as lists under the keys mean and std",
            source,
        )
        return None
    log.info("images are normalised by mean %s and standard deviation %s: %s", *map(_shown, wanted[0]), wanted[1])
    return wanted[0]


def load_initial_weights(model: nn.Module, file: str | Path, key: str | None = None) -> None:
    """Load the weights that `--init` names, all of the network's; normalisation constants stay the data set's own.

    Args:
        key: Where in the file the weights are, if it has several.

    Raises:
        DataError: The file cannot be read, or holds another network.
    """
    if not Path(file).is_file():  # a pipe would be waited for without end
        raise DataError(f"--init {file}: not a file")
    found = read_weight_file(file, f"--init {file}: not a readable state dict")
    chosen = weights_for((name for name, _ in model.named_parameters()), found, key)
    of_data = of_the_data(model)
    state = {name: value for name, value in chosen.state.items() if name not in of_data}
    own = model.state_dict()
    wrong = sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
    extra: list[str] = []
    heads = _other_heads(model, state)
    if wrong and all(_layer(name) in heads for name in wrong):
        there, here = (int(values[f"{min(heads)}.weight"].shape[0]) for values in (state, own))
        raise DataError(
            f"--init {file}: its classifier {min(heads)} has {counted(there, 'class')}, not {here:,}. To start with "
            "a fresh classifier, give the file with --pretrained and --prune_type pt"
        )
    if not wrong:
        missing, unexpected = model.load_state_dict(state, strict=False)
        extra = [name for name in unexpected if not _is_needed(name, of_data)]
        wrong = sorted(name for name in [*unexpected, *missing] if _is_needed(name, of_data))
    if wrong:
        raise DataError(f"--init {file}: these weights belong to another network (first difference: {wrong[0]})")
    _report(found, chosen, extra)
    kinds = _other_types(model, state)
    converted = f", converted from {kinds}" if kinds else ""
    log.info("loaded initial weights from %s (%s)%s", file, chosen.where, converted)


def _is_needed(name: str, of_data: frozenset[str]) -> bool:
    """True if a tensor is more than a count or an index, with which a network starts anyway.

    Args:
        of_data: Names of the data set's mean and deviation.
    """
    return name not in of_data and name.rpartition(".")[2] not in NOT_LEARNED


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _in_own_names(model: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the weights of a file in the names, and forms, that the network or its library knows."""
    if is_of_transformers(bare(model)):
        return renamed(bare(model), state, source)
    import timm.models

    known = not state.keys().isdisjoint(model.state_dict())
    return state if known else timm.models.clean_state_dict(state)  # of a format that timm converts


def _names_of(model: nn.Module, spec: ModelSpec, with_classifier: bool) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    return names if with_classifier else [name for name in names if _layer(name) != spec.classifier]


def _heads(model: nn.Module, spec: ModelSpec, weights: Mapping[str, Tensor]) -> set[str]:
    """The classifier, and other layers that have a row for each class, of which the file has others."""
    return _other_heads(model, weights) | ({spec.classifier} if spec.classifier else set())


def _fits(model: nn.Module, head: str, weights: Mapping[str, Tensor]) -> bool:
    """True if the weights have all of a layer's parameters, in its shapes."""
    own = model.get_submodule(head).named_parameters(prefix=head)
    return all(name in weights and weights[name].shape == value.shape for name, value in own)


def _other_heads(model: nn.Module, weights: Mapping[str, Tensor]) -> set[str]:
    """Layers with as many outputs as the classifier whose weights differ from those of a file in this number alone."""
    own = {name: value for name, value in model.state_dict().items() if name.endswith(".weight") and value.ndim > 1}
    classifier = own.get(f"{spec_of(model).classifier}.weight")
    if classifier is None:
        return set()
    return {
        _layer(name)
        for name, value in own.items()
        if name in weights
        and value.shape[0] == classifier.shape[0] != weights[name].shape[:1].numel()
        and weights[name].shape[1:] == value.shape[1:]
    }


def _load(model: nn.Module, weights: Mapping[str, Tensor], source: str, heads: set[str]) -> list[str]:
    """Load all but the heads and the normalisation; return tensors of parts that the network does not have.

    Raises:
        DataError: Some are missing, or others of the network's own parts are there.
    """
    from timm.models import vision_transformer

    of_data, network = of_the_data(model), bare(model)
    left = {k: v for k, v in weights.items() if k not in of_data and _layer(k) not in heads}
    try:
        if isinstance(network, vision_transformer.VisionTransformer):
            left = vision_transformer.checkpoint_filter_fn(left, network)
        missing, unexpected = model.load_state_dict(left, strict=False)
    except Exception as error:  # timm takes a name or a shape for a format, and converts it whatever it is
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise DataError(f"the weights of {source} do not fit the model: {reason}") from error
    missing = [name for name in missing if _is_needed(name, of_data) and _layer(name) not in heads]
    parts = {name.partition(".")[0] for name in model.state_dict()}
    foreign = [name for name in unexpected if name.partition(".")[0] in parts and _is_needed(name, of_data)]
    if missing or foreign:
        raise DataError(
            f"the weights of {source} do not fit the model: missing {_first(missing)}, unexpected {_first(unexpected)}"
        )
    return list(unexpected)


def _report(found: WeightFile, chosen: Weights, extra: Sequence[str]) -> None:
    """Say what else is in the file: other weights of the network, tensors that it has no use for, other objects."""
    if chosen.others:
        others = " or ".join(f"--pretrained_key {other}" for other in chosen.others if other)
        log.warning(
            "%s holds weights of this network more than once. Taking those under %s. For the others, add %s",
            found.file,
            chosen.place or "its top level",
            others,
        )
    if left := [*chosen.left, *extra]:
        log.warning("%s: not used, because the network has no such part: %s", found.file, few(left))
    if found.unread:
        log.info("%s: left unread, because only tensors are loaded: %s", found.file, few(found.unread))


def _about_a_head(model: nn.Module, head: str, weights: Mapping[str, Tensor]) -> str:
    said = f"the classifier {head} starts fresh"
    own, there = model.state_dict().get(f"{head}.weight"), weights.get(f"{head}.weight")
    if own is None or there is None:
        return f"{said}: there is none in the file"
    if own.shape != there.shape:
        return f"{said}: it has {counted(there.shape[0], 'class')} in the file and {own.shape[0]:,} here"
    return f"{said}. To take it from the file, add --fc"


def _other_types(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Number types of the weights that are converted into those of the network."""
    own = model.state_dict()
    pairs = ((value, own.get(name)) for name, value in weights.items())
    kinds = {str(v.dtype) for v, o in pairs if o is not None and o.is_floating_point() and o.dtype != v.dtype}
    return " and ".join(sorted(kind.removeprefix("torch.") for kind in kinds))


def _first(names: Sequence[str]) -> str:
    return f"{list(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shown(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.3f}" for value in values) + ")"


def _weights_from_timm(timm_name: str) -> dict[str, Tensor]:
    import timm
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # without a network it would say so with each of some twenty attempts
    try:
        return {k: v.clone() for k, v in timm.create_model(timm_name, pretrained=True).state_dict().items()}
    except Exception as error:  # the hub client's errors share no base class
        reason = first_line(error)
        raise DataError(
            f"cannot fetch ImageNet weights {timm_name} ({reason}). Download them elsewhere and give the file "
            f"with --pretrained"
        ) from error
