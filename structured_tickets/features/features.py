"""Features of a network, numbered: what makes each zero, what needs it, and which have to go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

OTHER = -1
"""Label of a number that belongs to no feature."""
ZERO = 0
"""Label of a number that is always zero."""
LOGITS = "it is one of the logits"
"""Why what comes out of a network stays."""
UNREAD = "no layer reads it, and it is no logit"
"""Why what a network computes besides stays, such as the logits of a second head while it trains."""
READ_ELSEWHERE = "other code computes with the layer's weights or bias, too"
"""Why what a layer reads and gives stays where code counts on all of its numbers."""
NEVER, IN_ROWS, ALWAYS = range(3)
"""How far features that stay can be zeros: not at all; where a layer gives them; also in what is computed of them."""


@dataclass(frozen=True)
class Through:
    """Features that are made of others, pair by pair: zero where all their sources are.

    Attributes:
        sources, features: int64 [pairs].
        nonzero: True if they are not even zero then.
    """

    sources: Tensor
    features: Tensor
    nonzero: bool = False


@dataclass(frozen=True)
class Both:
    """Products: zero where one factor is. All int64 [pairs]."""

    one: Tensor
    other: Tensor
    features: Tensor


@dataclass(frozen=True)
class Gate:
    """Normalised channels: zero where weight and bias are, whatever they are made of.

    Attributes:
        sources, features: int64 [pairs].
        places: Entry of the parameters for each pair: int64 [pairs].
        parameters: Names of weight and bias; none if there are none, and nothing is zero.
    """

    sources: Tensor
    features: Tensor
    places: Tensor
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """A call of a layer that multiplies features by a weight matrix and adds them up.

    Attributes:
        weight, bias: Names of the parameters; the bias may be empty.
        columns: Feature that each column of the weight reads, int64 [columns]; `OTHER` if it is none.
        rows: Feature that each row computes, int64 [rows].
        axes: Of rows and columns in the weight.
        inside: The layer itself computes it, and not another module with the layer's weights.
        grouped: True if rows read some of the columns each, all of which are kept whole.
        depthwise: True if row r reads feature r of `columns`, and the weight has no axis for columns.
        computed: The weights are computed of the parameter, filter by filter: of all its columns.
        beside: Names of other parameters of which they are, that have an entry for each row.
    """

    weight: str
    bias: str
    columns: Tensor
    rows: Tensor
    axes: tuple[int, int] = (0, 1)
    depthwise: bool = False
    inside: bool = True
    grouped: bool = False
    computed: bool = False
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Padding:
    """Features that are always zero, put before and after others.

    Attributes:
        module: Name of the module whose code does it.
        before, after: int64 [zeros].
        line: All features that there are along the axis then: int64 [positions].
    """

    module: str
    before: Tensor
    after: Tensor
    line: Tensor


@dataclass(frozen=True)
class Parts:
    """Features along an axis that is divided into parts of given sizes.

    Attributes:
        module: Name of the module whose code does it.
        sizes: Number of positions of each part.
        labels, axis: What is divided.
        line: The feature of each position along the axis: int64 [positions].
    """

    module: str
    sizes: tuple[int, ...]
    labels: Tensor
    axis: int
    line: Tensor


Event = Through | Both | Gate | Contraction


class Features:
    """All features that were found, in the order in which they are computed.

    Attributes:
        count: Their number; they are numbered from 1.
        heads: Those that products of matrices of features gave: weights of attention.
        events: How they are computed.
        paddings: Those that are always zero.
        parts: Those that are divided into parts of given sizes.
        called_otherwise: Weights of layers that are also called with features along other axes than theirs.
    """

    def __init__(self) -> None:
        self.count = 0
        self.events: list[Event] = []
        self.heads: list[Tensor] = []
        self.paddings: list[Padding] = []
        self.parts: list[Parts] = []
        self.called_otherwise: set[str] = set()
        self._named: dict[str, int] = {}
        self._pairs: list[Tensor] = []
        self._inside: list[Tensor] = []
        self._whole: list[tuple[Tensor, str, int]] = []
        self._placed: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self._computed: list[Tensor] = []
        self._found: dict[bool, Tensor] = {}

    def new(self, number: int, name: str = "") -> Tensor:
        """Number new features: int64 [number]. Of the same name, the same are returned again."""
        first = self._named.get(name) if name else None
        if first is None:
            first, self.count = self.count + 1, self.count + number
            if name:
                self._named[name] = first
        return torch.arange(first, first + number)

    def new_numbers(self, number: int, name: str) -> Tensor:
        """Number the features that are the numbers of a parameter: int64 [number]."""
        found = self.new(number, name)
        self._numbers.append(found[[0, -1]])
        return found

    def computed_of(self, sources: Tensor, number: int) -> Tensor:
        """Number new features that are computed of others: int64 [number]; of numbers of parameters, they are such."""
        found = self.new(number)
        if number and self.are_numbers(sources, computed=True):
            self._computed.append(found[[0, -1]])
        return found

    def are_numbers(self, labels: Tensor, computed: bool = False) -> bool:
        """Return whether all features among these labels are numbers of parameters.

        Args:
            computed: Or computed of such alone.
        """
        found = labels[labels > 0]
        known = torch.zeros_like(found, dtype=torch.bool)
        for first, last in (*self._numbers, *(self._computed if computed else [])):
            known |= (found >= first) & (found <= last)
        return bool(known.all())

    def join(self, one: Tensor, other: Tensor, layer: bool = False) -> None:
        """Features, pair by pair, that can only be removed together; numbers that are no features are left out.

        Args:
            layer: They are what a layer reads and what it gives: the layer could put one in the place of the other.
        """
        one, other = torch.broadcast_tensors(one, other)
        both = (one > 0) & (other > 0) & (one != other)
        if bool(both.any()):
            pairs = self._inside if layer else self._pairs
            pairs.append(torch.stack([one[both], other[both]]).unique(dim=1))
            self._found.clear()

    def keep_whole(self, features: Tensor, why: str, zeros: int = NEVER) -> None:
        """Features that cannot be removed.

        Args:
            zeros: Whether they can be zeros in their places, though.
        """
        found = features[features > 0].unique()
        if len(found):
            self._whole.append((found, why, zeros))

    def keep_in_place(self, features: Tensor) -> None:
        """Features whose places in tensors have to stay; they can be zeros, which nothing computes."""
        self._placed.append(features[features > 0].unique())

    @property
    def reasons(self) -> list[tuple[Tensor, str]]:
        """Return what cannot be removed, and why."""
        return [(features, why) for features, why, _ in self._whole]

    def sets(self, layers: bool) -> Tensor:
        """Number of the set of features that each belongs to: int64 [count + 1]; the first entry is unused.

        Args:
            layers: With those that only layers join, the sets are units: features that are there together or not at
                all. Without, they are wires: positions that are there together in all tensors.
        """
        found = self._found.get(layers)
        if found is None or len(found) <= self.count:
            parts = [torch.empty(2, 0, dtype=torch.long), *self._pairs, *(self._inside if layers else [])]
            pairs = torch.cat(parts, dim=1)
            found = self._found[layers] = _connected(pairs, self.count + 1)
        return found

    def whole(self, layers: bool, zeros: int = ALWAYS + 1) -> Tensor:
        """Return which sets cannot be removed: bool [sets].

        Args:
            zeros: Those that can be zeros so far, or farther, are left out.
        """
        return self._flagged(layers, [features for features, _, possible in self._whole if possible < zeros])

    def there(self, layers: bool = False) -> Tensor:
        """Return which wires, or units, stay in tensors, whatever is removed: bool [sets]."""
        return self._flagged(layers, [*(features for features, *_ in self._whole), *self._placed])

    def _flagged(self, layers: bool, lines: list[Tensor]) -> Tensor:
        sets = self.sets(layers)
        flags = torch.zeros(int(sets.max()) + 1, dtype=torch.bool)
        for features in lines:
            flags[sets[features]] = True
        return flags

    def alive(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return which features can be other than zero under masks (parameter name -> 0/1): bool [count + 1]."""
        flags = torch.zeros(self.count + 1, dtype=torch.bool)
        for event in self.events:
            if isinstance(event, Through):
                value = torch.ones_like(event.sources, dtype=torch.bool) if event.nonzero else flags[event.sources]
                flags[event.features[value]] = True
            elif isinstance(event, Both):
                flags[event.features[flags[event.one] & flags[event.other]]] = True
            elif isinstance(event, Gate):
                flags[event.features[_left_of_any(masks, event.parameters, event.places)]] = True
            else:
                kept = _left(masks, event.weight, event.axes[0], len(event.rows))
                kept = kept | (_left(masks, event.bias, 0, len(event.rows)) if event.bias else False)
                flags[event.rows[kept]] = True
        return flags

    def needed(self, masks: Mapping[str, Tensor], alive: Tensor) -> Tensor:
        """Return which features the logits depend on, of those that are alive: bool [count + 1]."""
        flags = torch.zeros(self.count + 1, dtype=torch.bool)
        for features, *_ in self._whole:
            flags[features] = True
        for event in reversed(self.events):
            if isinstance(event, Contraction):
                if event.grouped:
                    continue
                wanted = flags[event.rows] & alive[event.rows]
                if event.depthwise:
                    read = wanted & _left(masks, event.weight, event.axes[0], len(event.rows))
                elif event.computed:
                    read = wanted.any().expand(len(event.columns))
                else:
                    read = _columns_read(masks, event, wanted)
                flags[event.columns[read & (event.columns > 0)]] = True
            elif isinstance(event, Both):
                wanted = flags[event.features] & alive[event.one] & alive[event.other]
                flags[event.one[wanted]] = flags[event.other[wanted]] = True
            else:
                flags[event.sources[flags[event.features] & alive[event.features]]] = True
        return flags & alive


def sets_of(one: Tensor, other: Tensor) -> Tensor:
    """Number, from 0, of the connected set that each pair of features belongs to: int64 [pairs]."""
    nodes, pairs = torch.stack([one, other]).unique(return_inverse=True)
    return _connected(pairs, len(nodes))[pairs[0]] if len(nodes) else torch.empty(0, dtype=torch.long)


def _connected(pairs: Tensor, count: int) -> Tensor:
    """Number of the set of each node, of those that pairs (int64 [2, pairs]) connect: int64 [count]."""
    one, other = pairs.numpy()
    edges = coo_matrix(([True] * len(one), (one, other)), shape=(count, count))
    return torch.from_numpy(connected_components(edges, directed=False)[1]).long()


def _left(masks: Mapping[str, Tensor], name: str, axis: int, size: int) -> Tensor:
    """Positions along an axis at which a mask leaves something: bool [size]; all where there is no mask."""
    mask = masks.get(name)
    if mask is None:
        return torch.ones(size, dtype=torch.bool)
    return mask.movedim(axis, 0).reshape(size, -1).any(1).cpu()


def _left_of_any(masks: Mapping[str, Tensor], names: tuple[str, ...], places: Tensor) -> Tensor:
    """Return which entries the mask of one of these parameters leaves: bool [places]; all, if one has no mask."""
    if not names or any(name not in masks for name in names):
        return torch.ones_like(places, dtype=torch.bool)
    return torch.stack([masks[name].flatten().bool().cpu() for name in names]).any(0)[places]


def _columns_read(masks: Mapping[str, Tensor], event: Contraction, wanted: Tensor) -> Tensor:
    mask = masks.get(event.weight)
    if mask is None:
        return torch.full((len(event.columns),), bool(wanted.any()))
    rows, columns = event.axes
    matrix = mask.movedim((rows, columns), (0, 1)).flatten(2).any(2) if mask.ndim > 2 else mask.movedim(rows, 0).bool()
    return matrix[wanted.to(mask.device)].any(0).cpu()
