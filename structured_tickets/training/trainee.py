"""The network that a round trains, at its real size, with the optimizer and the masks that fit it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn, optim

from structured_tickets.base.modes import obey_modes_of
from structured_tickets.networks.hosted import free_name
from structured_tickets.pruning.masks import HeldMask, Mask
from structured_tickets.shrinking.cuts import Shrunk, cut_value, put_back
from structured_tickets.shrinking.shrink import shrink

IDLE = "idle"


class Widths(NamedTuple):
    """Arguments of `shrink` that suit a kind of device."""

    lanes: int
    fills: bool
    spread: int | None


ON_PROCESSORS = Widths(16, False, None)
"""16 numbers (float32) are in a vector register, and as many channels in a block of the kernels."""
ON_CARDS = Widths(8, True, None)
"""Tensor cores take bfloat16 and float16 in multiples of 8 channels (NVIDIA, "Convolutional Layers User's Guide").

Putting channels in their places takes kernels of its own, which move all numbers once more, where a convolution that
also computes the zeros often takes hardly longer: see `effort.CARD`.
"""


class Trainee:
    """A network with some weights held at zero; if `compact`, without the units that are zero.

    Weights of a kept filter that read a removed channel are not held, but have no place in the smaller network. They
    are stored as extra parameters, in one long axis of a layer `idle`, so that weight decay and penalty still act on
    them; nothing computes with them. Frozen parameters stay frozen, and layers are in the modes that the whole network
    gives them.

    Attributes:
        whole: The network at full size; its weights are as they were until `write_back`.
        model: The one that trains: another, or `whole` itself where nothing can be cut.
        optimizer: Of `model`.
        held: Holds zeros in `model`.
    """

    def __init__(
        self,
        whole: nn.Module,
        held: Mask,
        build_optimizer: Callable[[nn.Module], optim.Optimizer],
        prepare: Callable[[nn.Module], None],
        compact: bool = True,
        widths: Widths | None = None,
    ) -> None:
        """Args: `widths`: default: those for the network's device."""
        self.whole, self._held, self._build = whole, held, build_optimizer
        whole.zero_grad()
        HeldMask(whole, held).apply()
        widths = widths or (ON_CARDS if next(whole.parameters()).is_cuda else ON_PROCESSORS)
        small, self._cuts = shrink(whole, held, **widths._asdict()) if compact and held else Shrunk(whole, {})
        self._sizes = {n: p.shape for n, p in small.named_parameters()}
        cut = [n for n, p in whole.named_parameters() if self._sizes.get(n) != p.shape]
        self.model = small if cut else whole
        places = ((n, self._places_left(n)) for n in cut)
        self._idle = {n: left for n, left in places if bool(left.any())}
        self._home = free_name(self.model, IDLE)
        if cut:
            self._keep_the_ways_of_the_whole()
            self._set_idle_weights_aside()
            prepare(self.model)
        self.optimizer = build_optimizer(self.model)
        self.held = HeldMask(self.model, self.cut(held))

    def _keep_the_ways_of_the_whole(self) -> None:
        """Freeze what is frozen in the whole network; a graph of its layers takes their modes from it, too."""
        trained = {n: p.requires_grad for n, p in self.whole.named_parameters()}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trained.get(name, True))
        if isinstance(self.model, fx.GraphModule):
            obey_modes_of(self.model, self.whole)

    def _set_idle_weights_aside(self) -> None:
        parameters, home = dict(self.whole.named_parameters()), nn.Module()
        setattr(self.model, self._home, home)
        for name in self._idle:
            layer, param = self._idle_name(name).split(".")[1:]
            if layer not in home._modules:
                home.add_module(layer, nn.Module())
            piece = self._pieces(name, parameters[name].detach())[self._idle_name(name)]
            home.get_submodule(layer).register_parameter(param, nn.Parameter(piece, parameters[name].requires_grad))

    def _idle_name(self, name: str) -> str:
        """Return the name of what is idle of a parameter: `idle./<layer>.<parameter>`, the layer with / for its dots.

        So whatever the layers of a network are called, nothing else has the name, and it ends as that of the whole.
        """
        layer, _, param = name.rpartition(".")
        return f"{self._home}./{layer.replace('.', '/')}.{param}"

    @property
    def share(self) -> float:
        """Parameters that are computed with, over those of the whole network, in (0, 1]."""
        return sum(s.numel() for s in self._sizes.values()) / sum(p.numel() for p in self.whole.parameters())

    def _places_left(self, name: str) -> Tensor:
        """Neither held nor computed with: bool, of the whole parameter's shape."""
        whole = self.whole.get_parameter(name)
        alive = self._held[name].to(whole.device) != 0 if name in self._held else torch.ones_like(whole).bool()
        computed = torch.zeros_like(alive)
        if name in self._sizes:
            put_back(alive.new_ones(self._sizes[name]), computed, self._cuts.get(name, {}))
        return alive & ~computed

    def _pieces(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """A tensor of the whole parameter's shape as `model` has it: what is computed with, and what is idle."""
        pieces = {}
        if name in self._sizes:
            pieces[name] = cut_value(value, self._cuts.get(name, {}))
        if name in self._idle:
            line, others = value[self._idle[name].to(value.device)], [1] * (value.ndim - 1)
            pieces[self._idle_name(name)] = line.view(-1, *others)  # optimizers tell vectors from the rest
        return pieces

    def _join(self, name: str, pieces: Mapping[str, Tensor], whole: Tensor) -> None:
        """The inverse of `_pieces`, in place."""
        if name in pieces:
            put_back(pieces[name], whole, self._cuts.get(name, {}))
        if name in self._idle:
            whole[self._idle[name]] = pieces[self._idle_name(name)].detach().flatten()

    def cut(self, masks: Mapping[str, Tensor]) -> Mask:
        """Masks of the whole network (by parameter name) as masks of `model`."""
        if self.model is self.whole:
            return dict(masks)
        return {piece: value for n, m in masks.items() for piece, value in self._pieces(n, m).items()}

    def cut_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the whole network as one of `model`."""
        if self.model is self.whole:
            return dict(state)
        statistics = {
            n: cut_value(state[n], self._cuts.get(n, {})) for n, _ in self.model.named_buffers() if n in state
        }
        return statistics | self.cut({n: state[n] for n, _ in self.whole.named_parameters()})

    @torch.no_grad()
    def whole_state(self, reached: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `cut_state`; what `model` lacks is as in `whole`."""
        if self.model is self.whole:
            return {name: value.detach().clone() for name, value in reached.items()}
        state = {name: value.detach().clone() for name, value in self.whole.state_dict().items()}
        for name, value in state.items():
            self._join(name, reached, value)
        return state

    @torch.no_grad()
    def write_back(self) -> None:
        """Give `whole` the weights and statistics that `model` has reached."""
        if self.model is not self.whole:
            reached = self.model.state_dict()
            for name, value in self.whole.state_dict().items():
                self._join(name, reached, value)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state dict, as if it had trained the whole network."""
        if self.model is self.whole:
            return self.optimizer.state_dict()
        own = {n: self.optimizer.state[p] for n, p in self.model.named_parameters() if p in self.optimizer.state}
        outer = self._build(self.whole)
        for name, parameter in self.whole.named_parameters():
            for key, value in next(iter(own.values()), {}).items() if parameter.requires_grad else ():
                outer.state[parameter][key] = copy.deepcopy(value)
                if _is_per_weight(value):
                    outer.state[parameter][key] = torch.zeros_like(parameter)
                    self._join(name, {n: s[key] for n, s in own.items()}, outer.state[parameter][key])
        _copy_settings(self.optimizer, outer)
        return outer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """The inverse of `optimizer_state`."""
        if self.model is self.whole:
            self.optimizer.load_state_dict(state)
            return
        outer = self._build(self.whole)
        outer.load_state_dict(state)
        _copy_settings(outer, self.optimizer)
        whole = dict(self.whole.named_parameters())
        names = {self._idle_name(name): name for name in self._idle}
        for piece, parameter in self.model.named_parameters():
            name = names.get(piece, piece)
            for key, value in outer.state[whole[name]].items():
                part = self._pieces(name, value)[piece] if _is_per_weight(value) else value
                self.optimizer.state[parameter][key] = _laid_out_like(parameter, part)


def _copy_settings(source: optim.Optimizer, target: optim.Optimizer) -> None:
    """Learning rate and the like, group by group."""
    for theirs, ours in zip(source.param_groups, target.param_groups, strict=True):
        ours |= {k: v for k, v in theirs.items() if k != "params"}


def _laid_out_like(parameter: Tensor, value: Any) -> Any:
    """A copy, in the memory layout of the weights, which fused optimizers take for granted."""
    return torch.empty_like(parameter).copy_(value) if _is_per_weight(value) else copy.deepcopy(value)


def _is_per_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
