"""A network's forward pass as the graph of operations that `torch.export` records while it runs on an image."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.base.modes import in_mode
from structured_tickets.networks.hosted import left_as_it_is
from structured_tickets.networks.kernels import encoders_in_steps


@dataclass(frozen=True)
class Program:
    """Operations on tensors whose shapes are known: control flow, modules and sizes are gone.

    Attributes:
        graph: Nodes call operations of `torch.ops.aten`; each has its outcome's shape in `meta["val"]`.
        parameters: Node of a parameter or buffer -> its name in the network.
        constants: Node of another tensor that the network holds -> its value.
        first: Every name of a parameter or buffer -> its first one.
    """

    graph: fx.GraphModule
    parameters: Mapping[str, str]
    constants: Mapping[str, Tensor]
    first: Mapping[str, str]

    def is_of_its_layer(self, node: fx.Node, parameter: str) -> bool:
        """Return whether an operation is the forward pass of the module that owns a parameter, and not another's."""
        stack: Any = node.meta.get("nn_module_stack") or {"": ("", None)}
        path = list(stack.values())[-1][0]
        return self.first.get(f"{path}.{parameter.rpartition('.')[2]}") == parameter


def first_names(model: nn.Module) -> dict[str, str]:
    """Name of each parameter and buffer -> the name that comes first, where modules share them."""
    first: dict[int, str] = {}
    both = (model.named_parameters, model.named_buffers)
    named = [(n, t) for tensors in both for n, t in tensors(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def program_of(model: nn.Module, image: Sequence[int], training: bool) -> Program:
    """Record what a network does with two images (one alone cannot be normalised by batch).

    The network is not changed, and no random number is drawn.

    Args:
        image: (channels, height, width).
        training: In training mode, or in evaluation mode.

    Raises:
        UsageError: What the network does depends on the values of an image, or its code fails.
    """
    network = copy.deepcopy(model)  # its code may note what it has seen
    like = next(network.parameters())
    images = torch.zeros(2, *image, device=like.device, dtype=like.dtype)
    try:
        with (
            encoders_in_steps(),
            in_mode(network, training),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            left_as_it_is(model),
            redirect_stdout(io.StringIO()),  # torch shows a graph of which it gives up
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            exported = torch.export.export(network, (images,), strict=False)
    except Exception as error:  # whatever the network's code does with a value that is not there
        name = type(model).__name__
        raise UsageError(
            f"argument --arch: the channels of {name} cannot be followed: its forward pass cannot be recorded "
            f"({first_line(error)})"
        ) from error
    signature = exported.graph_signature
    first = first_names(model)
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    _erase_what_nobody_reads(exported.graph_module.graph, tensors)
    names = {node: first.get(name, name) for node, name in tensors.items()}
    held: Any = {node: exported.constants[name] for node, name in signature.inputs_to_lifted_tensor_constants.items()}
    buffers = dict(model.named_buffers())
    held |= {node: buffers[name] for node, name in signature.inputs_to_buffers.items() if name in buffers}
    constants = {n: v.detach().cpu().clone() for n, v in held.items() if isinstance(v, Tensor)}
    return Program(exported.graph_module, names, constants, first)


def _erase_what_nobody_reads(graph: fx.Graph, tensors: Collection[str]) -> None:
    """Erase what a module returns and nobody reads, but not layers: the smaller network calls them, too.

    Args:
        tensors: Nodes of parameters and buffers.
    """
    for node in reversed(graph.nodes):
        reads = any(source.name in tensors for source in node.all_input_nodes)
        if node.op == "call_function" and not node.users and not reads and not node.is_impure():
            graph.erase_node(node)
