"""Fields of a checkpoint, and their checks against a network. Checkpoints are untrusted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from structured_tickets.base.errors import DataError
from structured_tickets.base.randomness import are_random_states
from structured_tickets.base.text_tables import counted
from structured_tickets.base.untrusted_tensors import is_state
from structured_tickets.data.fingerprint import is_record
from structured_tickets.pruning.masks import MaskPair
from structured_tickets.runs.rows import EPOCH_NUMBERS, JUDGED, ROUND_NUMBERS
from structured_tickets.training.loss_scale import is_state as is_scale

LARGEST = 2**53  # up to here, numbers of JSON and of tables are exact

Check = Callable[[Any], bool]


def check_fields(fields: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose fields are not what a run writes.

    Raises:
        ValueError: The message names the field.
    """
    for name, (is_fine, wanted) in (FIELDS | LATER_FIELDS).items():
        if name in LATER_FIELDS and name not in fields:
            continue
        if name not in fields:
            raise ValueError(f"it has no {name}")
        if not is_fine(fields[name]):
            raise ValueError(f"its {name} is not {wanted}")


def check_shapes(
    state: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]], pairs: Sequence[MaskPair | None]
) -> None:
    """Refuse weights and masks of a checkpoint that are not of one network.

    Args:
        state: Weights by name; nothing is compared with none.
        others: Further weights, by the field's name; empty ones are fine.
        pairs: Masks of the network; None for none.

    Raises:
        ValueError: The message names a weight.
    """
    wanted = {name: value.shape for name, value in state.items()}
    masks = {f"masks ({k})": pair.current for k, pair in enumerate(pairs) if pair is not None}
    named = {**others, **masks}
    for field, values in named.items():
        is_mask = field not in others
        found = {name: value.shape for name, value in values.items()}
        compared = found.keys() if is_mask else found.keys() | wanted.keys()
        wrong = [name for name in compared if found.get(name) != wanted.get(name)] if wanted and found else []
        if wrong:
            raise ValueError(f"its {field} do not fit its weights (first difference: {min(wrong)})")


def check_fits(
    state: Mapping[str, Tensor], saved: Mapping[str, Any], model: nn.Module, optimizer: optim.Optimizer
) -> None:
    """Refuse a checkpoint that is not of this network.

    Args:
        state: Its weights; empty: nothing is checked.
        saved: State of its optimizer, which trained the whole network; or empty.
        optimizer: A new one of `model`, with its parameters in the order of `saved`.

    Raises:
        DataError: The message names the first difference.
    """
    own, found = ({n: v.shape for n, v in s.items()} for s in (model.state_dict(), state))
    wrong = [n for n in own.keys() | found.keys() if own.get(n) != found.get(n)] if found else []
    if wrong:
        raise DataError(f"the checkpoint holds another network's weights (first difference: {min(wrong)})")
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in saved.get("state", {}).items():
        parameter = parameters[number] if number < len(parameters) else None
        shapes = [v.shape for v in entries.values() if isinstance(v, Tensor) and v.ndim]
        if parameter is None or any(shape != parameter.shape for shape in shapes):
            where = number if parameter is None else names[parameter]
            raise DataError(f"the checkpoint holds another network's optimizer state (at {where})")
    groups = [len(group["params"]) for group in saved.get("param_groups", ())]
    if groups and groups != [len(group["params"]) for group in optimizer.param_groups]:
        theirs = counted(sum(groups), "parameter")
        raise DataError(f"the checkpoint's optimizer has {theirs}, the network {len(parameters)}")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and abs(value) <= LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float)


def _is_list_of(is_fine: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(is_fine, value))


def _is_dict_of(is_fine: Check) -> Check:
    return lambda value: (
        isinstance(value, dict) and all(isinstance(k, str) for k in value) and all(map(is_fine, value.values()))
    )


def _is_setting(value: Any) -> bool:
    return _is_plain(value) or _is_list_of(_is_plain)(value)


def _is_cell(value: Any) -> bool:
    """True for a cell of a row: a value, or numbers by name."""
    return _is_plain(value) or _is_dict_of(lambda v: _is_number(v) or _is_list_of(_is_number)(v))(value)


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.uint8, torch.bool, torch.float32)


def _is_row(numbers: Sequence[str]) -> Check:
    """Return a check for rows with numbers under these names, and numbers or nothing where a row may lack them."""

    def is_row(row: Any) -> bool:
        return (
            _is_dict_of(_is_cell)(row)
            and all(_is_number(row.get(name)) for name in numbers)
            and all(row.get(name) is None or _is_number(row[name]) for name in JUDGED)
        )

    return is_row


def _is_optimizer(value: Any) -> bool:
    if value == {}:
        return True
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and all(_is_count(k) and isinstance(v, dict) for k, v in value["state"].items())
        and _is_list_of(lambda g: isinstance(g, dict) and _is_list_of(_is_count)(g.get("params")))(
            value.get("param_groups")
        )
    )


def _is_about_round_0(value: Any) -> bool:
    """Its address becomes a folder's name."""
    address = value.get("address", "") if isinstance(value, dict) else None
    return isinstance(address, str) and bool(re.fullmatch(r"[0-9a-f]*", address))


_are_masks = _is_dict_of(_is_mask)
_WEIGHTS = (is_state, "tensors by name")
_MASKS = (_are_masks, "masks by name")
_COUNT = (_is_count, "a whole number")
_WORD = (lambda value: isinstance(value, str), "a word")

# Field of a checkpoint -> whether a value can be one, and what it should be.
FIELDS: dict[str, tuple[Check, str]] = {
    "args": (_is_dict_of(_is_setting), "settings by name"),
    "data": _WORD,
    "state": _COUNT,
    "epoch": _COUNT,
    "step": _COUNT,
    "partial": (_is_dict_of(_is_number), "numbers by name"),
    "state_dict": _WEIGHTS,
    "optimizer": (_is_optimizer, "the state of an optimizer"),
    "init_weight": _WEIGHTS,
    "dense_weight": _WEIGHTS,
    "current_mask": _MASKS,
    "refill_mask": _MASKS,
    "reg_lambda": (_is_number, "a number"),
    "best_sa": (lambda v: _is_list_of(_is_number)(v) and len(v) == 3, "three numbers"),
    "doomed_norm": (_is_number, "a number"),
    "faded": (_is_dict_of(_is_list_of(_is_count)), "units by group"),
    "following": (lambda v: v == {} or (_is_dict_of(_are_masks)(v) and {*v} == {"current", "refill"}), "two masks"),
    "rng": (are_random_states, "states of random generators"),
    "history": (_is_list_of(_is_row(EPOCH_NUMBERS)), "a list of epochs, each with its numbers"),
    "rounds": (_is_list_of(_is_row(ROUND_NUMBERS)), "a list of rounds, each with its numbers"),
    "precision": _WORD,
    "tracker_id": (lambda v: isinstance(v, str) and bool(re.fullmatch(r"[\w-]{1,64}", v)), "a short word"),
    "classes": (_is_list_of(_WORD[0]), "a list of names"),
    "round_0": (_is_about_round_0, "the address of a dense round"),
}
# Fields that older checkpoints lack.
LATER_FIELDS: dict[str, tuple[Check, str]] = {
    "start_weight": _WEIGHTS,
    "contents": (is_record, "a description of the data"),
    "processes": _COUNT,
    "sources": (_is_dict_of(_WORD[0]), "hashes by file"),
    "teacher": (lambda value: isinstance(value, str), "a text"),
    "followed": (lambda value: isinstance(value, bool), "true or false"),
    "average": _WEIGHTS,
    "loss_scale": (is_scale, "the state of a loss scale"),
    "other_rng": (_is_list_of(are_random_states), "states of random generators"),
}
