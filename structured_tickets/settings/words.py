"""Settings as words of the command line, and back from the file in which a run has written them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structured_tickets.base.errors import UsageError, first_line
from structured_tickets.settings.flag_table import FLAGS, LAMBDA_FOLLOWS, PENALTY_CHOSEN
from structured_tickets.settings.identity import as_understood_now, is_penalty_chosen

HELP = "help"  # the one flag that every parser has


def words_of(settings: Mapping[str, Any], source: str = "--grid", off: bool = False) -> list[str]:
    """Convert settings to command-line words. None omits a flag; true adds one without a value, false omits it.

    Args:
        source: The flag by which they came, for messages.
        off: False turns a flag off that something else may have turned on.

    Raises:
        UsageError: There is no such flag, or the value does not fit.
    """
    words: list[str] = []
    for key, value in settings.items():
        require_flag(key, source)
        if value is None:
            continue
        if key == HELP or FLAGS[key].bare:
            is_on = _truth(key, value, source)
            words += [f"--{key}"] if is_on else [f"--{key}=false"] * off
        else:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            words += [f"--{key}={text}"]
    return words


def require_flag(key: str, source: str) -> None:
    """Raises: UsageError, if the runner has no such flag."""
    if key not in FLAGS and key != HELP:
        near = difflib.get_close_matches(key, [*FLAGS, HELP], 1)
        raise UsageError(f"argument {source}: no such flag: {key}" + (f" (did you mean {near[0]}?)" if near else ""))


def _truth(key: str, value: Any, source: str) -> bool:
    found = {"true": True, "false": False}.get(str(value).lower())
    if found is None:
        raise UsageError(f"argument {source}: {key} is true or false, not {value!r}")
    return found


def words_from(file: str) -> list[str]:
    """Return the settings of `args.yaml`, or of a file like it, as words.

    Where the run lies is left out, and so is a penalty that nobody had chosen: a run of another length chooses anew.

    Raises:
        UsageError: It cannot be read, or names what is no flag.
    """
    from structured_tickets.base.untrusted_text import is_mapping, parse_yaml  # what reads YAML may not be installed

    try:
        found = parse_yaml(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"argument --config: cannot read {file} ({first_line(error)})") from error
    if not is_mapping(found):
        raise UsageError(f"argument --config: {file} does not hold settings. Expected: args.yaml of a run, or the like")
    settings = as_understood_now(found) if "save_dir" in found else dict(found)  # else no run has written it
    if "penalty" in settings and PENALTY_CHOSEN in settings and is_penalty_chosen(settings):
        del settings["penalty"]
    return words_of({k: v for k, v in settings.items() if not _is_of_one_run(k)}, "--config")


def _is_of_one_run(name: str) -> bool:
    """Return whether a setting says where and how a run was carried out: one that repeats it is not in its place."""
    own = name in FLAGS and FLAGS[name].scope.own and name != "control_of"
    return own or name in ("config", LAMBDA_FOLLOWS, PENALTY_CHOSEN)
