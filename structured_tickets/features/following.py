"""Follow features through a recorded forward pass: each number of each tensor is labelled with the one it belongs to.

Rearrangements are carried out on the labels, in whatever way they are written, so that no pattern has to be recognised.
What other operations do with labels stands in `tables`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from structured_tickets.features.calls import Call, LayerCall, packet
from structured_tickets.features.computed_weights import computed_filters
from structured_tickets.features.exported import Program
from structured_tickets.features.features import (
    LOGITS,
    READ_ELSEWHERE,
    UNREAD,
    Contraction,
    Features,
    Gate,
    Parts,
    Through,
)
from structured_tickets.features.labels import compact, plain, shortened, varying
from structured_tickets.features.parts_of_weights import parts_of_weights
from structured_tickets.features.rules_of_axes import taken_axes
from structured_tickets.features.rules_of_numbers import combined, mixed
from structured_tickets.features.tables import (
    BY_NUMBER,
    BY_PLACE,
    CHECKS,
    COMPOSED,
    IN_PARTS,
    LAYERS,
    PARTS,
    RANDOM,
    REARRANGEMENTS,
    RULES,
    SHAPING,
    SLOTS,
)


@dataclass
class Following:
    """Features of a network, and where they meet.

    Attributes:
        features: All of them.
        calls: What was called with labels, in order: each layer with the labels that it read and those that it gave.
        tensors: Labels that a tensor had from which features are to be removed: whatever is removed, what is left has
            to be a tensor again.
        fixed: Labels of tensors of which something is taken by its place along an axis: nothing can go along that.
        unknown: Operations without a rule -> how often they are called with features.
        read: Parameters of which logits are computed by other code than a layer's.
        parameters: Parameters and buffers that are no layer's, of which each number is a feature: int64 of their shape.
        noted: What others have found out about these features, so that they need not do it again.
    """

    features: Features = field(default_factory=Features)
    calls: list[LayerCall] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    fixed: list[tuple[Tensor, int]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    read: set[str] = field(default_factory=set)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    noted: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def read_elsewhere(self) -> set[str]:
        """Return parameters of layers that other code reads, too: it counts on all of their numbers."""
        owned = {n for e in self.features.events if isinstance(e, Contraction) for n in (e.weight, e.bias) if n}
        owned |= {n for e in self.features.events if isinstance(e, Gate) for n in e.parameters}
        return owned & (self.read | self.features.called_otherwise)

    def keep_what_is_read_elsewhere(self) -> None:
        """Keep what layers read and give whose parameters other code reads, too."""
        found = self.read_elsewhere
        for event in self.features.events if found else ():
            if isinstance(event, Contraction) and not found.isdisjoint((event.weight, event.bias)):
                self.features.keep_whole(torch.cat([event.columns, event.rows]), READ_ELSEWHERE)
            elif isinstance(event, Gate) and not found.isdisjoint(event.parameters):
                self.features.keep_whole(torch.cat([event.sources, event.features]), READ_ELSEWHERE)

    def follow(self, program: Program) -> None:
        """Follow an image, which belongs to no feature, through a network."""
        _Interpreter(self, program).run()

    def keep_what_makes_no_tensor(self) -> None:
        """Keep in their places those features without which a tensor would be no rectangle of numbers.

        In each tensor, the sets of features that can leave it must lie one after another along a single axis, of which
        no part is taken by its place.
        """
        sets_of = self.features.sets(layers=False)
        features = self.features
        checks = [(t, None) for t in self.tensors if t.numel()] + [(t, a) for t, a in self.fixed if t.numel()]
        while True:
            there, found = features.there(), False
            for labels, axis in checks:
                small = compact(labels)
                sets = torch.where(small > 0, sets_of[small.clamp(min=0)], 0)
                sets = torch.where(there[sets] | (small <= 0), -1, sets)
                lying = [a for a in range(sets.ndim) if bool((sets != sets.narrow(a, 0, 1)).any())]
                if len(lying) > 1 or axis in lying:
                    features.keep_in_place(small[sets >= 0])
                    found = True
            if not found:
                return


class _Interpreter:
    def __init__(self, following: Following, program: Program) -> None:
        self.following, self.program = following, program
        self.env: dict[fx.Node, Any] = {}
        self.values: dict[fx.Node, Any] = {}  # of what depends on nothing that is trained or seen
        self.names: dict[fx.Node, str] = {}
        self.filters = computed_filters(program)
        self.leading = _leading_to_logits(program.graph.graph)
        self.behind = {n for f in self.filters.values() for n in (f.weight, *f.beside)}
        self.parts = parts_of_weights(program)
        self.behind |= {program.parameters[part.whole.name] for part in self.parts.values()}

    def run(self) -> None:
        for node in self.program.graph.graph.nodes:
            self._run_node(node)
            if node.op == "call_function" and not node.users and not _is_in_place(node):
                self._keep(node, UNREAD)

    def _run_node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "get_attr":
            self.env[node] = None  # a graph within the graph
        elif node.op == "output":
            for source in node.all_input_nodes:
                self._keep(source, LOGITS)
        else:
            self._call(node)

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.program.parameters:
            self.names[node] = self.program.parameters[node.name]
        value: Any = node.meta.get("val")
        number = isinstance(value, Tensor) and value.dtype.is_floating_point
        if node.name in self.program.constants and not (number and node in self.names):
            self.values[node] = self.program.constants[node.name]
        self.env[node] = self._unlabelled(node)
        if not number or node not in self.names or self.names[node] in self.behind:
            return
        if any(user in self.leading and not _holds(user, node) for user in node.users):
            self.following.read.add(self.names[node])
            if 1 < value.numel() <= LARGEST:
                self.env[node] = self._numbered(self.names[node], value.shape)

    def _numbered(self, name: str, shape: torch.Size) -> Tensor:
        features = self.following.features
        if name not in self.following.parameters:
            labels = features.new_numbers(shape.numel(), name)
            features.events.append(Through(labels, labels, nonzero=True))
            self.following.parameters[name] = labels.view(shape)
        return self.following.parameters[name]

    def _unlabelled(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return plain(value.shape)
        if isinstance(value, tuple | list):
            return [plain(v.shape) if isinstance(v, Tensor) else v for v in value]
        return value

    def _keep(self, source: fx.Node, why: str) -> None:
        for labels in _flat(self.env.get(source)):
            if isinstance(labels, Tensor):
                self.following.features.keep_whole(labels, why)

    def _call(self, node: fx.Node) -> None:
        if packet(node.target).startswith("wrap_with_"):
            self._within(node)
            return
        if all(source in self.values for source in node.all_input_nodes) and self._compute(node):
            self.env[node] = self._unlabelled(node)
            return
        self.env[node] = self._followed(node)
        if _is_in_place(node) and node.args and isinstance(node.args[0], fx.Node):
            self._written(node, node.args[0], self.env[node])

    def _within(self, node: fx.Node) -> None:
        """Run a graph within the graph, such as one under another autocast."""
        place = next(k for k, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        inner: Any = self.program.graph.get_submodule(str(node.args[place].target))  # type: ignore[union-attr]
        self._share(inner.graph.find_nodes(op="placeholder"), node.args[place + 1 :])  # type: ignore[arg-type]
        for own in inner.graph.nodes:
            if own.op == "output":
                self.env[node] = fx.map_arg(own.args[0], self.env.get)
            elif own.op not in ("placeholder", "get_attr"):
                self._call(own)

    def _share(self, own: Sequence[fx.Node], sources: Sequence[fx.Node]) -> None:
        """Let the inputs of a graph within the graph be what these nodes are."""
        for node, source in zip(own, sources, strict=True):
            for table in (self.env, self.values, self.names):
                if source in table:
                    table[node] = table[source]  # type: ignore[index]

    def _followed(self, node: fx.Node) -> Any:
        labelled = [labels for s in node.all_input_nodes for labels in _flat(self.env.get(s))]
        if not any(isinstance(labels, Tensor) and bool((labels > 0).any()) for labels in labelled) and not self._writes(
            node
        ):
            return self._unlabelled(node)
        name = packet(node.target)
        if name in CHECKS:
            return None
        call = self._call_of(node)
        weight = node.args[1] if len(node.args) > 1 else None
        call.part = self.parts.get(weight) if isinstance(weight, fx.Node) else None
        try:
            rule = RULES.get(name)
            if node.target is operator.getitem:
                found = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
            elif name == "cat" and (joined := self._joined(node, call)) is not None:
                found = joined
            elif name in REARRANGEMENTS:
                found = self._rearranged(call, name)
            elif rule is not None:
                found = rule(call)
            else:
                found = self._in_steps(node)
        except (RuntimeError, LookupError, TypeError, ValueError):
            found = None
        if found is None:
            self.following.unknown[name] += 1
            for source in node.all_input_nodes:
                self._keep(source, f"it is not known what {name} does with it")
            return self._unlabelled(node)
        if call.made is not None and call.made.layer:
            self.following.calls.append(call.made)
        found = (
            [shortened(f) if isinstance(f, Tensor) else f for f in found]
            if isinstance(found, list)
            else shortened(found)
        )
        self._check_shape(node, found)
        self.following.tensors += [f for f in _flat(found) if isinstance(f, Tensor)]
        return found

    def _call_of(self, node: fx.Node) -> Call:
        own, inside = self.following, self.program.is_of_its_layer
        return Call(node, self._labels, self._name, inside, own.features, own.tensors, self.filters.get(node))

    def _in_steps(self, node: fx.Node) -> Any:
        """Follow an operation through those by which torch computes it; None if it is none of these."""
        target: Any = node.target
        if not isinstance(target, OpOverload) or not target.has_kernel_for_dispatch_key(COMPOSED):
            return None
        sources = node.all_input_nodes
        values = [source.meta["val"] for source in sources]
        if not all(isinstance(value, Tensor) for value in values):
            return None

        def compute(*tensors: Tensor) -> Any:
            at = dict(zip(sources, tensors, strict=True))
            return target(*fx.map_arg(node.args, at.__getitem__), **fx.map_arg(node.kwargs, at.__getitem__))

        like = [torch.empty(value.shape, dtype=value.dtype) for value in values]
        try:
            inner = make_fx(compute, tracing_mode="fake")(*like)
        except Exception:  # whatever an operation makes of tensors without values: it stays unknown
            return None
        if inner.graph.find_nodes(op="get_attr"):
            return None
        steps = [own for own in inner.graph.nodes if own.op == "call_function"]
        if any(own.target is target for own in steps):
            return None
        self._share(inner.graph.find_nodes(op="placeholder"), sources)
        for own in steps:
            self._call(own)
        outcome: Any = inner.graph.output_node().args[0]
        found = fx.map_arg(outcome, self.env.__getitem__)
        return list(found) if isinstance(found, tuple | list) else found

    def _check_shape(self, node: fx.Node, found: Any) -> None:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and tuple(found.shape) != tuple(value.shape):
            raise AssertionError(
                f"{node.format_node()}: labels of shape {tuple(found.shape)}, not {tuple(value.shape)}"
            )

    def _writes(self, node: fx.Node) -> bool:
        """Return whether a call makes features out of what has none: a layer with weights."""
        return packet(node.target) in LAYERS

    def _rearranged(self, call: Call, name: str) -> Any:
        node = call.node
        if name in BY_NUMBER or name in BY_PLACE:
            self._taken_apart(call, name)
        if name in SHAPING:
            return self.env[node.args[0]].reshape(node.meta["val"].shape)  # type: ignore[index]
        args: Any = fx.map_arg(node.args, self._literal)
        words: Any = fx.map_arg(node.kwargs, self._literal)
        target: Any = node.target
        found = target(*args, **words)
        return list(found) if isinstance(found, tuple | list) else found

    def _joined(self, node: fx.Node, call: Call) -> Tensor | None:
        """Labels of tensors that are put one after another across the axis of their features: these become the same."""
        sources: Any = call.argument(0, "tensors")
        parts: list[Any] = [self.env[s] for s in sources]
        axis = call.argument(1, "dim", 0) % parts[0].ndim
        if all(set(varying(p)) <= {axis} for p in parts):
            return None
        parts = [mixed(call, p, [axis], "it lies along two axes") if axis in varying(p) else p for p in parts]
        found = parts[0].narrow(axis, 0, 1)
        for part in parts[1:]:
            found = shortened(combined(call, found, part.narrow(axis, 0, 1), product=False, shape=found.shape))
        return found.expand(node.meta["val"].shape)

    def _taken_apart(self, call: Call, name: str) -> None:
        """Keep what is taken by its place along an axis of features, unless the axis is divided into parts."""
        node = call.node
        if any(source not in self.values for source in node.all_input_nodes[1:]):
            raise ValueError("places that depend on the image")
        labels: Tensor = self.env[node.args[0]]  # type: ignore[index]
        for axis in set(taken_axes(node, labels)) & set(varying(labels)):
            parts = node.args[1] if name in BY_NUMBER else 0
            if name == "split" and isinstance(node.args[1], int):
                parts = -(-labels.shape[axis] // node.args[1])
            if parts and isinstance(parts, int) and labels.shape[axis] % parts == 0:
                self.following.tensors.append(labels.unflatten(axis, (parts, -1)))
            elif name in IN_PARTS and isinstance(node.args[1], list | tuple) and len(varying(labels)) == 1:
                line, sizes = compact(labels).flatten(), tuple(node.args[1])
                self.following.features.parts.append(Parts(call.module, sizes, labels, axis, line))
            elif not _takes_all(node, labels.shape[axis]):
                self.following.fixed.append((labels, axis))

    def _literal(self, node: fx.Node) -> Any:
        if node in self.values and not isinstance(self.env.get(node), list):
            value = self.values[node]
            if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32, torch.bool, torch.uint8):
                return value
        return self.env[node]

    def _labels(self, node: fx.Node) -> Any:
        return self.env[node]

    def _name(self, node: Any) -> str:
        if not isinstance(node, fx.Node):
            return ""
        return self.names.get(self.parts[node].whole if node in self.parts else node, "")

    def _compute(self, node: fx.Node) -> bool:
        """Compute what depends on nothing that is trained or seen; False if that is random or cannot be done."""
        if packet(node.target) in RANDOM or not callable(node.target):
            return False
        args: Any = fx.map_arg(node.args, self.values.__getitem__)
        words: Any = fx.map_arg(node.kwargs, self.values.__getitem__)
        words = {k: "cpu" if k == "device" else v for k, v in words.items()}
        try:
            with torch.no_grad():
                self.values[node] = node.target(*args, **words)
        except Exception:  # whatever it is, it can be done without
            return False
        return True

    def _written(self, node: fx.Node, target: fx.Node, found: Any) -> None:
        """Show what is written into a tensor in those that it is a view of."""
        before = self.env.get(target)
        self.values.pop(target, None)
        if not _equal(before, found) and self._has_other_views(target):
            self._keep_written(target, found)
            found = self.env[target]
        self.env[target] = found
        while _is_view(target) and isinstance(target.args[0], fx.Node):
            view, target = target, target.args[0]
            self.values.pop(target, None)
            if _equal(before, found):
                return
            before = self.env.get(target)
            whole = None if self._has_other_views(target, view) else self._with_part(node, view, before, found)
            if whole is not None:
                self.env[target] = found = whole
                self.following.tensors.append(whole)
                continue
            self._keep_written(target, found)

    def _keep_written(self, target: fx.Node, found: Any) -> None:
        """Keep what a tensor held and what is written into it; nothing is assumed of what it holds then."""
        self._keep(target, "a part of it is written to")
        for labels in _flat(found):
            self.following.features.keep_whole(labels, "it is written into a part of a tensor")
        self.env[target] = self._unlabelled(target)

    def _has_other_views(self, tensor: fx.Node, view: fx.Node | None = None) -> bool:
        """True if a tensor has another view, taken before, that is still read: its labels would be those of before."""
        others = [u for u in tensor.users if u is not view and u in self.env and _is_view(u)]
        return any(user not in self.env for other in others for user in other.users)

    def _with_part(self, node: fx.Node, view: fx.Node, labels: Any, found: Any) -> Tensor | None:
        """Return the labels of a tensor into a part of which something is written; None if it is no part along an axis.

        Where features lie along this axis, each gets its place, and places stay. Else old and new ones go together.
        """
        if packet(view.target) not in PARTS or not isinstance(labels, Tensor) or not isinstance(found, Tensor):
            return None
        given: Any = view.args[1] if len(view.args) > 1 else 0
        axis = given % labels.ndim
        part = shortened(found.unsqueeze(axis) if found.ndim < labels.ndim else found)
        if axis in varying(labels) or axis in varying(part):
            whole = labels.clone(memory_format=torch.contiguous_format)
            place: Any = view.target
            place(whole, *view.args[1:], **view.kwargs).copy_(found)
            whole = shortened(whole)
            self.following.fixed.append((whole, axis))
            return whole
        one, other = labels.narrow(axis, 0, 1), part.narrow(axis, 0, 1)
        both = combined(self._call_of(node), one, other, product=False, shape=one.shape)
        return shortened(both).expand(labels.shape)


LARGEST = 1_000_000
"""Numbers of a parameter that is followed number by number. One of a single number is as good as a constant."""


def _is_in_place(node: fx.Node) -> bool:
    name = packet(node.target)
    return name.endswith("_") and not name.endswith("__")


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _is_view(node: fx.Node) -> bool:
    """True for a call whose outcome may share memory with what it is given."""
    return getattr(node.target, "is_view", False) is True


def _leading_to_logits(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of which the first of the outputs is computed, or which write into what it is computed of."""
    outputs: Any = graph.output_node().args[0]
    wanted = [outputs[0] if isinstance(outputs, tuple | list) else outputs]
    found: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if not isinstance(node, fx.Node) or node in found:
            continue
        found.add(node)
        wanted += node.all_input_nodes
        for user in node.users:  # a view may be written to
            if user.op == "call_function" and (_is_in_place(user) or _is_view(user)):
                wanted.append(user)
    return found


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _holds(user: fx.Node, parameter: fx.Node) -> bool:
    slots = SLOTS.get(packet(user.target), ())
    places = [k for k, a in enumerate(user.args) if a is parameter]
    return bool(places) and all(k in slots for k in places)  # in none, if it is one of a list


def _takes_all(node: fx.Node, size: int) -> bool:
    """True for a slice of everything."""
    places: Any = (*node.args[2:5], *(None,) * 3)
    start, end, step = places[:3]
    return packet(node.target) == "slice" and not start and (end is None or end >= size) and step in (None, 1)
