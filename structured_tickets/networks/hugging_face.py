"""Image classifiers of Hugging Face's transformers: of a type's default size, or as a `config.json` says.

Nothing is fetched, and no code that lies beside a configuration is run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structured_tickets.base.errors import DataError, UsageError, first_line

MISSING = 'needs the package transformers, which is not installed: pip install ".[hf]"'


def from_hugging_face(name: str, num_classes: int, img_size: int) -> nn.Module:
    """Build an image classifier with random weights.

    Args:
        name: A type of model (`vit`, `swin`, ...), a folder that holds a `config.json`, or the name of a model on the
            hub whose configuration has been downloaded before.

    Raises:
        UsageError: There is none of this name, it does not take images of this size, or transformers is not installed.
    """
    arch = f"hf/{name}"
    config = _config(name)
    config.num_labels = num_classes
    if hasattr(config, "image_size"):
        config.image_size = img_size
    _require_fitting_images(config, arch, img_size)
    try:
        return _class_of(config, arch)(config).float()
    except UsageError:
        raise
    except Exception as error:  # whatever its code makes of the settings
        raise UsageError(f"argument --arch: {arch} cannot be built: {first_line(error)}") from error


def renamed(network: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return weights under the names that they have in a network of transformers, whatever version wrote them.

    Tensors of other shapes than the network's stay as they are. What the network has no part for loses the name of the
    network's trunk, so that it is not taken for a piece of one of the trunk's parts.

    Raises:
        DataError: They are in a form that transformers does not know.
    """
    model: Any = network
    try:
        loaded, said = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=dict(state),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    except Exception as error:  # whatever it makes of the tensors
        raise DataError(f"the weights of {source} do not fit the model: {first_line(error)}") from error
    others = {key[0] if isinstance(key, tuple) else key for key in said["mismatched_keys"]}
    own = loaded.state_dict()
    taken = {n: v for n, v in own.items() if n not in others and n not in said["missing_keys"]}
    prefix = str(model.base_model_prefix)
    trunk = getattr(model, prefix, None)
    parts = set(trunk._modules) | set(trunk._parameters) if isinstance(trunk, nn.Module) else set()
    left = {}
    for key in said["unexpected_keys"]:
        rest = key.removeprefix(f"{prefix}.")
        part = rest.partition(".")[0]
        left[key if part in parts else rest] = state.get(key, torch.empty(0))
    return taken | {n: state[n] for n in others if n in state} | left


def is_of_transformers(network: nn.Module) -> bool:
    """Return whether a network is one of transformers', without importing it."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(network).__mro__
    )


def _imported() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"argument --arch: hf/NAME {MISSING}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _types() -> Mapping[str, Any]:
    """Type of model -> name of the class that classifies images, or a tuple of such names."""
    _imported()
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    return MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES


def _config(name: str) -> Any:
    transformers, types = _imported(), _types()
    arch = f"hf/{name}"
    if name in types:
        return transformers.AutoConfig.for_model(name)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"argument --arch: {arch}: the folder {folder} has no config.json")
    if not folder.is_dir() and "/" not in name:
        near = difflib.get_close_matches(name, types, 3, cutoff=0.4)
        hint = f" (did you mean {', '.join(f'hf/{n}' for n in near)}?)" if near else ""
        raise UsageError(f"argument --arch: there is no {arch}{hint}")
    try:
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the file holds
        if folder.is_dir():
            raise UsageError(
                f"argument --arch: {arch}: its config.json cannot be read ({first_line(error)})"
            ) from error
        raise UsageError(
            f"argument --arch: {arch} is neither a folder nor a model whose configuration was downloaded before. Save "
            "its config.json in a folder, and give --arch hf/FOLDER"
        ) from error


def _class_of(config: Any, arch: str) -> Any:
    """Return the class that classifies images: that which the configuration names, if there are several."""
    import transformers

    names = _types().get(config.model_type, ())
    names = (names,) if isinstance(names, str) else tuple(names)
    wanted = [n for n in names if n in (config.architectures or ())] or list(names)
    if not wanted:
        raise UsageError(f"argument --arch: {arch} is of type {config.model_type}, which does not classify images")
    return getattr(transformers, wanted[0])


def _require_fitting_images(config: Any, arch: str, img_size: int) -> None:
    """Refuse images that are smaller than a patch, or that are too small for windows of a fixed size."""
    patch, window = getattr(config, "patch_size", None), getattr(config, "window_size", None)
    if not isinstance(patch, int):
        return
    if img_size < patch:
        raise UsageError(f"{arch} cuts images into patches of {patch} pixels: --image_size {img_size} is too small")
    if config.model_type == "swin" and isinstance(window, int):
        halvings = 2 ** (len(config.depths) - 1)
        if math.ceil(math.ceil(img_size / patch) / halvings) < window:
            raise UsageError(
                f"{arch} has windows of {window} by {window} patches, more than its last maps have with --image_size "
                f"{img_size}: {patch * halvings * window} or more, or a smaller window_size in its config.json"
            )
