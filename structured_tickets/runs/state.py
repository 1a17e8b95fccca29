"""The state of a run: all that it needs to continue as if it had never stopped."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from structured_tickets.pruning.masks import Mask, MaskPair, as_current, as_refill
from structured_tickets.runs.rows import Row

VERSION = 1


@dataclass
class RunState:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        state: The round, from 0.
        epoch: Epochs of it that are done.
        step: Batches of the next epoch that are done (0 but after an interruption), with their `partial` sums.
        state_dict: The model, masked parameters under torch's pruning keys.
        init_weight: Initial weights; every round rewinds to them.
        start_weight: Weights that the round began with, where they are not the initial ones; else empty.
        dense_weight: Weights at the end of round 0, kept for methods that rank them again; else empty.
        masks: What the round trains under; None in round 0.
        reg_lambda: The penalty strength last applied.
        best_sa: Best validation accuracy of the round, in percent, and the test accuracy of that epoch.
        doomed_norm: Norm of the doomed weights when the round began.
        faded: Unit group -> its doomed units that have faded out in this round and are held at zero since.
        following: The masks that the finished round decided for the next; None before.
        history: A row per epoch; `rounds`: a row per finished round.
        args: The settings of the run.
        data: Fingerprint of the images and labels; `contents`: what is known of them, see `describe_data`.
        precision: Type of matrix products that the run began with.
        tracker_id: Name of the run for trackers, drawn once.
        classes: Names of the classes, in the order of the logits.
        round_0: Where a `--dense_store` has this run's round 0 (`address`), whether it came from there (`shared`), and
            what its bits depend on besides the settings (`numerics`); empty without a store.
        sources: Hashes of the code of a user's network that the run began with, by file.
        teacher: Digest of the weights of `--distill FILE`; "" without one.
        followed: The notes on the network say that its features are followed (`ModelSpec`).
        loss_scale: State of the loss scale of the round, for float16; else empty.
        average: Moving average of the weights of the round, under their plain names; empty without `--ema`.
        processes: How many processes trained it; `other_rng`: random states of all of them but the first.
    """

    args: dict[str, Any]
    data: str
    state: int = 0
    epoch: int = 0
    step: int = 0
    partial: dict[str, float] = field(default_factory=dict)
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    init_weight: dict[str, Tensor] = field(default_factory=dict)
    start_weight: dict[str, Tensor] = field(default_factory=dict)
    dense_weight: dict[str, Tensor] = field(default_factory=dict)
    masks: MaskPair | None = None
    reg_lambda: float = 0.0
    best_sa: list[float] = field(default_factory=lambda: [-1.0, -1.0, -1.0])
    doomed_norm: float = 0.0
    faded: dict[str, list[int]] = field(default_factory=dict)
    following: MaskPair | None = None
    rng: dict[str, Any] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
    rounds: list[Row] = field(default_factory=list)
    precision: str = ""
    tracker_id: str = field(default_factory=lambda: secrets.token_hex(4))
    classes: list[str] = field(default_factory=list)
    round_0: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    other_rng: list[dict[str, Any]] = field(default_factory=list)
    contents: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    followed: bool = False
    teacher: str = ""
    loss_scale: dict[str, float] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    version: int = VERSION

    @property
    def begun_with(self) -> dict[str, Tensor]:
        """The weights that the round began with."""
        return self.start_weight or self.init_weight

    @property
    def judged(self) -> dict[str, Tensor]:
        """The weights whose accuracy counts: the averaged ones with `--eval_ema`."""
        return self.average if self.average and self.args.get("eval_ema") else self.state_dict

    @property
    def structure(self) -> Mask:
        """The structure that the round trains under, by parameter name; empty in round 0."""
        return self.masks.structure if self.masks else {}


def fields_of(run: RunState) -> dict[str, Any]:
    """Return the state as plain values, under the field names of a checkpoint, masks under the documents' keys."""
    fields = {name: getattr(run, name) for name in RunState.__dataclass_fields__ if name != "masks"}
    masks = _keyed(run.masks)
    return fields | {
        "current_mask": masks.get("current", {}),
        "refill_mask": masks.get("refill", {}),
        "following": _keyed(run.following),
    }


def state_from(fields: Mapping[str, Any]) -> RunState:
    """Return the state that `fields_of` gave; fields that are not known are left out.

    Raises:
        TypeError, ValueError: The masks are none.
    """
    known = {k: v for k, v in fields.items() if k in RunState.__dataclass_fields__}
    current, refill = fields.get("current_mask", {}), fields.get("refill_mask", {})
    known["masks"] = pair_from({"current": current, "refill": refill})
    known["following"] = pair_from(fields.get("following", {}))
    return RunState(**known)


def _keyed(pair: MaskPair | None) -> dict[str, Mask]:
    return {} if pair is None else {"current": as_current(pair.current), "refill": as_refill(pair.refill)}


def packed_pair(pair: MaskPair) -> dict[str, Any]:
    """Return two masks as bytes, under the documents' keys: what `masks/round_<k>.pt` holds."""
    return packed(_keyed(pair))


def pair_from(masks: Mapping[str, Any]) -> MaskPair | None:
    """Return the pair of the masks `current` and `refill`, packed or not; None where both are empty.

    Raises:
        TypeError, ValueError: They are no masks, or not of the same parameters.
    """
    current, refill = (unpacked(masks.get(name, {})) for name in ("current", "refill"))
    return MaskPair(current, refill) if current or refill else None


def packed(masks: Mapping[str, Any]) -> dict[str, Any]:
    """Return masks, nested or not, as bytes: a quarter of the space on disk."""
    return {k: v.to(torch.uint8) if isinstance(v, Tensor) else packed(v) for k, v in masks.items()}


def unpacked(masks: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `packed`."""
    return {k: v.float() if isinstance(v, Tensor) else unpacked(v) for k, v in masks.items()}
