"""Command lines of the programs: scripts of a checkout, or sub-commands of the installed package."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

PACKAGE = "structured_tickets"
COMMAND = "structured-tickets"
SCRIPTS = {"run": "main_imp_fillback.py", "sweep": "sweep.py", "report": "report.py", "export": "export.py"}

_ABOVE = Path(__file__).resolve().parents[2]
CHECKOUT = _ABOVE if (_ABOVE / SCRIPTS["run"]).is_file() else None
"""Folder of the checkout that this code lies in; None if it is installed, without the scripts beside it."""


def python_words(program: str, from_any_folder: bool = False) -> list[str]:
    """Return the words after `python` that start a program the way this process was started.

    Args:
        program: A sub-command.
        from_any_folder: Name a script by its whole path, not as one types it in the checkout.
    """
    if CHECKOUT is None or program not in SCRIPTS or _started_as_sub_command():
        return ["-m", PACKAGE, program]
    script = SCRIPTS[program]
    return [str(CHECKOUT / script) if from_any_folder else script]


def import_path() -> dict[str, str]:
    """Return PYTHONPATH as other processes need it to import this code; nothing where Python finds it by itself."""
    if _ABOVE.name in ("site-packages", "dist-packages"):
        return {}
    places = [str(_ABOVE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(places))}


def name_in_help(program: str) -> str:
    """Return the program's name for its usage line: `report.py`, `structured-tickets report` or `python -m ...`."""
    words = python_words(program)
    if words[0] != "-m":
        return words[0]
    return f"{COMMAND} {program}" if _start().name == COMMAND else shlex.join(["python", *words])


def typed(program: str) -> str:
    """Return the start of a command line that runs the program in the user's shell."""
    words = python_words(program)
    if words[0] != "-m":
        return shlex.join(["python", *words])
    if _start().name == COMMAND:
        return f"{shlex.quote(_as_found(COMMAND, _start()))} {program}"
    return shlex.join([_as_found("python", Path(sys.executable)), *words])


def _as_found(name: str, file: Path) -> str:
    """Return the bare name if the shell finds the program of this file's folder by it, else the file's path."""
    found = shutil.which(name)
    return name if found and Path(found).parent == file.absolute().parent else str(file)


def _start() -> Path:
    return Path(sys.argv[0] if sys.argv else "")


def _started_as_sub_command() -> bool:
    start = _start()
    return start.name == COMMAND or (start.name == "__main__.py" and start.parent.name == PACKAGE)
