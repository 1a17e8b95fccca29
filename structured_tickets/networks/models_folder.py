"""A network that `--arch NAME` finds as `models/NAME.py`: which function or class of the file makes it.

The file is read here, not run, and without torch: the command line looks names up.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
TAKES = "num_classes"
OURS = ("__init__", "resnets", "vit")  # import paths of the documents, which make no network of their own

Maker = ast.FunctionDef | ast.ClassDef


def file_in_models(name: str) -> Path | None:
    """`models/<name>.py` in the working directory, else in the checkout of this program; None if there is neither."""
    if not re.fullmatch(r"[\w-]+", name):
        return None
    folders = [Path.cwd(), *([CHECKOUT] if (CHECKOUT / "main_imp_fillback.py").is_file() else [])]
    files = [(folder / "models" / f"{name}.py").resolve() for folder in folders]
    ours = {CHECKOUT / "models" / f"{own}.py" for own in OURS}
    return next((file for file in files if file.is_file() and file not in ours), None)


def maker_in(file: Path) -> str:
    """Name of the function or class that makes the network of a file.

    That is the one decorated with `register_model`, else the one called as the file, else the only function that takes
    `num_classes`, else the only such class.

    Raises:
        ValueError: There is none, or none of several can be preferred; the message says what to write.
    """
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as Python: {str(error).splitlines()[0]}") from error
    makers = [n for n in tree.body if isinstance(n, Maker) and not n.name.startswith("_")]
    taking = [n for n in makers if _takes_classes(n)]
    choices: tuple[Iterable[Maker], ...] = (
        (n for n in makers if any(map(_registers, n.decorator_list))),
        (n for n in makers if _letters(n.name) == _letters(file.stem)),
        (n for n in taking if isinstance(n, ast.FunctionDef)),
        (n for n in taking if isinstance(n, ast.ClassDef)),
    )
    for choice in choices:
        names = [n.name for n in choice]
        if len(names) == 1:
            return names[0]
        if names:
            shown = ", ".join(names)
            raise ValueError(f"{file} has several networks ({shown}). Choose one of them with --arch {file}:{names[0]}")
    raise ValueError(f"{file} has no function or class that takes {TAKES}. Add one that makes the network")


def _letters(name: str) -> str:
    return re.sub(r"[_-]", "", name).lower()


def _takes_classes(node: Maker) -> bool:
    if isinstance(node, ast.ClassDef):
        own = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return any(map(_takes_classes, own))
    return any(a.arg == TAKES for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))


def _registers(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return getattr(called, "id", getattr(called, "attr", "")) == "register_model"
