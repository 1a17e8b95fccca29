"""Somebody else's network as the program holds it: the images' normalisation in front of it, the notes beside it.

The network itself stays as it was made: its class, `forward`, `train`, hooks, attributes and layers.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from structured_tickets.networks.registry import ModelSpec, change_notes, spec_of

SHARED = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""What a host has in common with its network, so that each sees what the other puts there."""
PLACE = "_place_of_normalize"
NETWORK = "_hosted_network"


def logits_of(output: Any) -> Any:
    """Return the logits among what a network gives.

    They are the first of several outputs, which some networks give while they train, and `logits` of an object that
    has them under this name, as networks of transformers give.
    """
    if isinstance(output, Tensor | fx.Proxy):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(output, tuple | list) and not hasattr(output, "logits"):
        return output[0] if output else output
    return getattr(output, "logits", output)


class Hosted(nn.Module):
    """A network behind a layer that normalises images; its layers and parameters have the names that they have in it.

    So masks, units, state dicts and exports know nothing of the host. Made by `hosted`.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if NETWORK not in vars(self):
                raise
            return getattr(bare(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "__dict__" and name in bare(self)._modules:  # a layer of the network that is replaced
            setattr(bare(self), name, value)
            self._modules[name] = bare(self)._modules[name]
        else:
            super().__setattr__(name, value)

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The network's own mode."""
        return bare(self).training

    @training.setter
    def training(self, mode: bool) -> None:
        bare(self).training = mode

    def forward(self, images: Any) -> Any:
        """Return the logits [batch, classes] of images [batch, 3, height, width] in [0, 1]: see `logits_of`."""
        network, place = bare(self), normalize_place(self)
        if not spec_of(self).side_by_side:
            images = images.contiguous()
        if place not in network._modules:
            images = self._modules[place](images)  # type: ignore[misc]
        # While a graph is traced, a call of a module is noted as one, and this one is no part of the host.
        output = network._call_impl(images) if isinstance(images, fx.Proxy) else network(images)
        return logits_of(output)

    def train(self, mode: bool = True) -> Hosted:
        """Set the mode as the network itself does."""
        bare(self).train(mode)
        for layer in self._own_layers():
            layer.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        bare(self)._apply(fn, recurse)
        for layer in self._own_layers() if recurse else ():
            layer._apply(fn)
        return self

    def _own_layers(self) -> Iterator[nn.Module]:
        return (m for n, m in self._modules.items() if n not in bare(self)._modules and m is not None)

    def _get_name(self) -> str:
        return type(bare(self)).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Hosted:
        memo |= copies_of_computed(bare(self))
        host = memo[id(self)] = _empty_host(type(bare(self)))
        host.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[arg-type]
        return host

    def __reduce__(self) -> tuple:
        return _empty_host, (type(bare(self)),), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self)[NETWORK] = state[NETWORK]
        super().__setstate__(state)
        _join(self)


@functools.cache
def _host_of(network: type[nn.Module]) -> type[Hosted]:
    """A class of hosts that has the name of the network's class, which messages show."""
    return type(network.__name__, (Hosted,), {"__module__": network.__module__, "__doc__": network.__doc__})


def _empty_host(network: type[nn.Module]) -> Hosted:
    kind = _host_of(network)  # type: ignore[arg-type]
    return kind.__new__(kind)


def _join(host: Hosted) -> None:
    """Let a host see the parameters, buffers and layers of its network."""
    network = bare(host)
    for name in SHARED:
        vars(host)[name] = vars(network)[name]
    own = {n: m for n, m in host._modules.items() if n not in network._modules}
    first = isinstance(network, nn.Sequential)  # where state dicts of its networks have always had it
    vars(host)["_modules"] = {**own, **network._modules} if first else {**network._modules, **own}


def hosted(network: nn.Module, spec: ModelSpec, normalizes: bool = False) -> Hosted:
    """Return a host of the network, whose normalisation does nothing until `put_normalize`.

    Args:
        spec: Notes on the network.
        normalizes: The network calls a layer `normalize` of its own on the images; what is put goes there.
    """
    host, mode = _empty_host(type(network)), network.training
    vars(host)[NETWORK] = network
    nn.Module.__init__(host)
    host.training = mode
    change_notes(host, spec)
    vars(host)[PLACE] = "normalize" if normalizes else free_name(network, "normalize")
    if not normalizes:
        host._modules[vars(host)[PLACE]] = nn.Identity()
    _join(host)
    return host


def copies_of_computed(network: nn.Module) -> dict[int, Tensor]:
    """Return copies of the tensors that a network keeps of its forward passes: by identity, as `deepcopy` takes them.

    Torch refuses to copy what has a gradient's history.
    """
    found: dict[int, Tensor] = {}
    waiting: list[Any] = [value for m in network.modules() for value in vars(m).values()]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if not value.is_leaf:
                found[id(value)] = value.detach().clone()
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return found


@contextmanager
def left_as_it_is(model: nn.Module) -> Iterator[None]:
    """Restore what a network keeps beside its layers, while a copy of it is traced.

    A hook that is defined inside a method is shared with all copies, and writes into the network itself: what it sees
    of a traced copy are no tensors.
    """
    modules = dict.fromkeys([*model.modules(), *bare(model).modules()])
    hooks = [h for m in modules for table in (m._forward_hooks, m._forward_pre_hooks) for h in table.values()]
    around = [value for h in hooks for cell in getattr(h, "__closure__", None) or () for value in _content_of(cell)]
    modules |= dict.fromkeys(m for value in around if isinstance(value, nn.Module) for m in value.modules())
    attributes = [(vars(m), dict(vars(m))) for m in modules]
    values = [*around, *(v for own, _ in attributes for n, v in own.items() if n not in SHARED)]
    contents = [(v, copy.copy(v)) for v in _containers(values)]
    try:
        yield
    finally:
        for own, before in (*attributes, *contents):
            own.clear()
            own.extend(before) if isinstance(own, list | deque) else own.update(before)


def _content_of(cell: Any) -> list[Any]:
    """Return what a variable around a function holds, if it has got a value."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _containers(values: Iterable[Any]) -> list[Any]:
    """Return what can grow or shrink among values, and within such."""
    found: dict[int, Any] = {}
    waiting = [v for v in values if isinstance(v, dict | list | set | deque)]
    while waiting:
        value = waiting.pop()
        if id(value) not in found:
            found[id(value)] = value
            inside = value.values() if isinstance(value, dict) else value
            waiting += [v for v in inside if isinstance(v, dict | list | set | deque)]
    return list(found.values())


def free_name(network: nn.Module, name: str) -> str:
    """Return a name for a new layer of a network, of which it has no layer, parameter or buffer yet."""
    taken = {*network._modules, *network._parameters, *network._buffers}
    while name in taken:
        name += "_"
    return name


def bare(model: nn.Module) -> nn.Module:
    """Return the network itself, without a host."""
    return vars(model).get(NETWORK, model)


def normalize_place(model: nn.Module) -> str:
    """Return the name of the layer that normalises the images of a network."""
    return vars(model).get(PLACE, "normalize")


def normalize_of(model: nn.Module) -> Any:
    """Return the layer that normalises the images of a network."""
    return model.get_submodule(normalize_place(model))


def put_normalize(model: nn.Module, layer: nn.Module) -> None:
    """Let a layer normalise the images of a network."""
    setattr(model, normalize_place(model), layer)


def of_the_data(model: nn.Module) -> frozenset[str]:
    """Return those names of a network's state dict that are the data set's mean and deviation, and no weights."""
    return frozenset(f"{normalize_place(model)}.{name}" for name in ("mean", "std"))


def is_hosted(model: nn.Module) -> bool:
    """Return whether a network has a host, so that notes on it can be changed."""
    return isinstance(model, Hosted)
