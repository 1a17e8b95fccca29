"""Training and evaluation mode of a network: as the network itself sets it, with what is frozen at rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_LEADERS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def set_mode(model: nn.Module, training: bool) -> None:
    """Set a network to training or evaluation mode, by its own `train`.

    The statistics of a normalisation whose weights are all frozen are frozen, too: it stays in evaluation mode.
    """
    leader = _LEADERS.get(model)
    if leader is None:
        model.train(training)
        for layer in model.modules():
            if training and is_frozen_norm(layer):
                layer.eval()
        return
    with in_mode(leader, training):
        modes = {name: layer.training for name, layer in leader.named_modules()}
    for name, layer in model.named_modules():
        layer.training = modes.get(name, training)


def freeze_statistics(model: nn.Module) -> None:
    """Let every BatchNorm of a network that is in training mode normalise by its running statistics, and keep them."""
    for layer in model.modules():
        if isinstance(layer, _NormBase) and layer.track_running_stats:
            layer.eval()


def obey_modes_of(model: nn.Module, leader: nn.Module) -> None:
    """Let the layers of a network be in the modes that those of the same names have in another.

    For a graph of a network's layers, which knows nothing of the `train` of the network.
    """
    _LEADERS[model] = leader


def is_frozen_norm(layer: nn.Module) -> bool:
    """Return whether a layer keeps statistics beside weights of which none is trained (`requires_grad` is False)."""
    weights = list(layer.parameters(recurse=False))
    return isinstance(layer, _NormBase) and bool(weights) and not any(p.requires_grad for p in weights)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set a network and all its layers to training or evaluation mode; restore each layer's own mode at the end."""
    before = {layer: layer.training for layer in model.modules()}
    set_mode(model, training)
    try:
        yield
    finally:
        for layer, mode in before.items():
            layer.training = mode
