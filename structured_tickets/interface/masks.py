"""The result of `structured_tickets.regroup`: the weights and units that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from structured_tickets.base.errors import BadType, BadValue
from structured_tickets.base.text_tables import counted, text_table
from structured_tickets.interface.foreign import OwnParameters, unwrapped
from structured_tickets.interface.units import Units, on_the_right, ranked, require_same
from structured_tickets.pruning.masks import HeldMask, MaskPair, count_ones
from structured_tickets.unit_groups.unit import UnitGroup, kept_units, kinds


@dataclass(frozen=True, eq=False, repr=False)
class Masks:
    """The L1 mask and the structure of a network; made by `structured_tickets.regroup`.

    `print(masks)` shows how many units stay in each layer. The masks are float tensors of the parameters' shapes, 1
    where kept and 0 where pruned, by parameter name; do not write into them. A weight is, by its two masks,

    * kept by both;
    * *doomed*: kept element-wise, pruned by the structure: `Penalty` shrinks it;
    * *dead*: pruned by both: `Penalty` holds it at zero;
    * *refilled*: pruned element-wise, kept by the structure, since its unit stays.

    The weights and biases of BatchNorms, and biases, are in the masks, too: they go with their unit.

    Attributes:
        units: The units that were regrouped, all of the network's.
        groups: The groups of the kinds that were pruned.
        pair: Both masks, by the names that `units` has for parameters.
        fractions: Kind of unit -> share in (0, 1] that is left after all rounds, as their rates say.
    """

    units: Units
    groups: tuple[UnitGroup, ...]
    pair: MaskPair
    fractions: Mapping[str, float]

    def __post_init__(self) -> None:
        wrong = next((n for n, m in self.pair.structure.items() if tuple(m.shape) != self.units.shapes.get(n)), None)
        if wrong is not None:
            raise BadValue(f"masks are those of another network: {wrong}")

    @property
    def elements(self) -> dict[str, Tensor]:
        """The element-wise mask: parameter name -> 0/1."""
        return self._named(self.pair.current)

    @property
    def structure(self) -> dict[str, Tensor]:
        """The structured mask, in which every unit is kept or pruned as a whole: parameter name -> 0/1."""
        return self._named(self.pair.structure)

    @property
    def doomed(self) -> dict[str, Tensor]:
        """Weights that are kept element-wise and pruned by the structure: parameter name -> bool."""
        return self._named(self.pair.doomed)

    @property
    def dead(self) -> dict[str, Tensor]:
        """Weights that are pruned by both: parameter name -> bool."""
        return self._named(self.pair.dead)

    @property
    def refilled(self) -> dict[str, Tensor]:
        """Weights that are pruned element-wise and kept by the structure: parameter name -> bool."""
        return self._named(self.pair.refilled)

    def _named(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.units.own_name(n): m for n, m in masks.items()}

    @property
    def density(self) -> float:
        """Share in [0, 1] of the prunable weights that the structure keeps."""
        return self._share(self.pair.structure)

    def _share(self, masks: Mapping[str, Tensor]) -> float:
        names = ranked(self.groups)
        return count_ones(masks, names) / sum(masks[n].numel() for n in names)

    @property
    def kept(self) -> dict[str, list[int]]:
        """Indices of the units that stay, ascending, by the name of their group."""
        return {g.name: self._flags(g).nonzero().flatten().tolist() for g in self.groups}

    def _flags(self, group: UnitGroup) -> Tensor:
        return kept_units(group, self.pair.structure)

    def apply_(self, model: nn.Module) -> None:
        """Set all weights outside the structure to zero, in place (Refill; it also hardens what `Penalty` trained).

        To train under a hard structure, call it before training and after every `optimizer.step()`.

        Raises:
            BadType: It is not a network (a TypeError).
            BadValue: It is another network (a ValueError).
        """
        network = unwrapped(model)
        require_same(self.units, network, "the masks")
        HeldMask(OwnParameters(network), self.pair.structure).apply()  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Return all that `from_state_dict` needs, as tensors and plain values that load with `weights_only=True`."""
        return {
            "elements": dict(self.pair.current),
            "structure": dict(self.pair.structure),
            "kinds": list(self.pruned_kinds),
            "fractions": dict(self.fractions),
        }

    @classmethod
    def from_state_dict(cls, units: Units, state: Mapping[str, Any]) -> Masks:
        """Return the masks that `state_dict` was called on.

        Args:
            units: Those of the same network.

        Raises:
            BadValue: The state is incomplete, or one of another network's masks (a ValueError).
        """
        try:
            pair = MaskPair(state["elements"], state["structure"])
            groups = tuple(g for g in units if g.kind in state["kinds"])
            return cls(units, groups, pair, dict(state["fractions"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise BadValue(f"not a state of masks: {type(error).__name__}: {error}") from error

    @property
    def pruned_kinds(self) -> tuple[str, ...]:
        """The kinds of unit that were pruned."""
        return tuple(kinds(self.groups))

    def __repr__(self) -> str:
        return f"<Masks of {self.units.network}: {100 * self.density:.1f}% kept>"

    def __str__(self) -> str:
        kept, units = [int(self._flags(g).sum()) for g in self.groups], [g.units for g in self.groups]
        names, found = [[g.name, g.kind] for g in self.groups], [g.kind for g in self.groups]
        for kind in self.pruned_kinds:
            names.append([f"all {kind}s", kind])
            for numbers in (kept, units):
                numbers.append(sum(n for n, k in zip(numbers, found, strict=False) if k == kind))
        columns = [on_the_right([f"{n:,}" for n in numbers]) for numbers in (kept, units)]
        rows = [[*name, *row] for name, row in zip(names, zip(*columns, strict=True), strict=True)]
        return f"{text_table(['layer', 'kind', 'kept', 'of'], rows)}\n\n{self._shares_in_words()}"

    def _shares_in_words(self) -> str:
        pair, weights = self.pair, sum(self.pair.structure[n].numel() for n in ranked(self.groups))
        doomed, dead = (self._share({n: m.float() for n, m in masks.items()}) for masks in (pair.doomed, pair.dead))
        parts = {"kept": self.density, "doomed": doomed, "dead": dead}
        return f"{counted(weights, 'prunable weight')}: " + ", ".join(
            f"{100 * part:.1f}% {word}" for word, part in parts.items()
        )


def require_masks(masks: object, what: str = "masks") -> Masks:
    """Raises: BadType, if it is something else."""
    if not isinstance(masks, Masks):
        raise BadType(f"{what} is a {type(masks).__name__}, not what structured_tickets.regroup returns")
    return masks
