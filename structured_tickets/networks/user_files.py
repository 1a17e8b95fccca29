"""A user's Python file, and the modules beside it: imported under their own names, whatever else has these names.

A folder may have a `utils.py`, `models/` or `errors.py`, as this program or another user's folder has. So the modules
of a folder are put in place while its code imports, and modules of the same names that were there come back afterwards.
Imports inside functions, which run later (in a forward pass), find them again: they go through an `__import__` of the
folder, which stands in the `__builtins__` of its modules. The search path is as before when nothing of this is running.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

DIGITS = 16  # of a hash

_TEXTS: WeakKeyDictionary[ModuleType, str] = WeakKeyDictionary()  # module -> hash of the text that was run
_LOCK = threading.RLock()  # what is imported is the same for all threads


class _Folder:
    """Modules that are imported from a user's folder.

    Args:
        own: Where absolute imports look: the file's own folder, and the one that holds its package.
        further: Where they look then: folders of the project around. A folder without `__init__.py` is no package
            there: it may be the clone of a library.
    """

    def __init__(self, own: Sequence[Path], further: Sequence[Path]) -> None:
        self.own, self.search = tuple(own), (*own, *further)
        self.modules: dict[str, ModuleType] = {}
        self.sources: dict[Path, str] = {}  # file -> hash of the text that was run
        self.builtins = {**vars(builtins), "__import__": self._import}
        self._owned: dict[str, bool] = {}

    def owns(self, top: str) -> bool:
        """True if the folder has a module or package of this name.

        Modules of Python that are loaded stay Python's, and this program's package stays its own.
        """
        if top not in self._owned:
            taken = top in sys.stdlib_module_names and top in sys.modules and not self._made(top)
            taken |= top == __name__.partition(".")[0]
            self._owned[top] = not taken and any(_has_module(f, top, f in self.own) for f in self.search)
        return self._owned[top]

    def _made(self, name: str) -> bool:
        """True if a loaded module comes from the folder, whoever has imported it."""
        module = sys.modules[name]
        places = [getattr(module, "__file__", None) or "", *(getattr(module, "__path__", None) or ())]
        found = [Path(p).relative_to(f).parts[:1] for p in places for f in self.search if Path(p).is_relative_to(f)]
        return any(_top(parts[0]) == _top(name) for parts in found if parts)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Let imports find the folder's modules, before any others of their names."""
        with _LOCK:
            others = {n: m for n, m in list(sys.modules.items()) if self.owns(_top(n)) and not self._made(n)}
            for name in others:
                del sys.modules[name]
            sys.modules.update(self.modules)
            sys.meta_path.insert(0, self)  # type: ignore[arg-type]
            paths = [str(folder) for folder in self.search]
            sys.path[:0] = paths
            try:
                yield
            finally:
                sys.meta_path.remove(self)  # type: ignore[arg-type]
                for path in paths:
                    sys.path.remove(path)
                self._note({n: m for n, m in list(sys.modules.items()) if self.owns(_top(n)) and self._made(n)})
                clashing = {_top(name) for name in others}
                for name in [n for n in self.modules if _top(n) in clashing]:
                    sys.modules.pop(name, None)
                sys.modules.update(others)

    def _note(self, modules: dict[str, ModuleType]) -> None:
        self.modules |= modules
        for module in modules.values():
            if file := getattr(module, "__file__", None):
                self.sources[Path(file)] = _TEXTS.setdefault(module, _digest(Path(file)))

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Find one of the folder's modules (Python's protocol of finders)."""
        if not self.owns(_top(name)):
            return None
        spec = PathFinder.find_spec(name, [str(f) for f in self.search] if path is None else path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(self, name, spec.loader.path)
        return spec

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """`__import__` of the folder's modules."""
        package = str((globals or {}).get("__package__") or "")
        if not (level and package) and not self.owns(_top(name)):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        whole = importlib.util.resolve_name("." * level + name, package) if level else name
        known = self.modules.get(whole if fromlist or level else _top(name))
        if known is not None and whole in self.modules and all(hasattr(known, n) for n in fromlist or ()):
            return known  # a forward pass that imports, imports often
        with self.first():
            return builtins.__import__(name, globals, locals, fromlist or (), level)

    def forget_if_changed(self) -> None:
        """Import the folder's modules anew if the file of one is not what was run."""
        if any(_digest(file) != digest for file, digest in self.sources.items()):
            ours = [n for n, m in self.modules.items() if isinstance(getattr(m.__spec__, "loader", None), _Loader)]
            for name in ours:  # others were imported by the program around
                if sys.modules.get(name) is self.modules.pop(name):
                    del sys.modules[name]
            self.sources.clear()
        self._owned.clear()

    def run(self, file: Path, name: str) -> ModuleType:
        """Run a file of the folder as a module of this name."""
        loader = _Loader(self, name, str(file))
        spec = importlib.util.spec_from_file_location(name, file, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickles look their module up there
        loader.exec_module(module)
        return module


class _Loader(SourceFileLoader):
    """Runs a file's text as it is now, without caches of its code, and notes its hash."""

    def __init__(self, folder: _Folder, name: str, path: str) -> None:
        super().__init__(name, path)
        self.folder = folder

    def exec_module(self, module: ModuleType) -> None:
        source = self.get_data(self.path)
        _TEXTS[module] = hashlib.sha256(source).hexdigest()[:DIGITS]
        self.folder.sources[Path(self.path)] = _TEXTS[module]
        module.__dict__["__builtins__"] = self.folder.builtins
        exec(self.source_to_code(source, self.path), module.__dict__)


_FOLDERS: dict[tuple[Path, ...], _Folder] = {}
_RUN: dict[Path, _Folder] = {}  # file -> the folder with which it was run last


@contextmanager
def imported(file: str | Path) -> Iterator[ModuleType]:
    """Run a user's file and give its module; within, imports find what lies beside the file.

    A file with relative imports is run as a module of the package that its folder is, else as a module on its own.

    Raises:
        Exception: Whatever the code raises.
    """
    path = Path(file).resolve()
    depth, whole = _package_depths(path)
    package = path.parts[len(path.parts) - 1 - depth : -1]
    folder = _RUN[path] = _folder_of(path, depth, whole)
    with _LOCK:
        folder.forget_if_changed()
        with folder.first():
            if package:
                importlib.import_module(".".join(package))
            yield folder.run(path, ".".join([*package, path.stem]) if package else f"user_model_{path.stem}")


def sources_of(file: str | Path) -> dict[str, str]:
    """Return hashes of the texts that were run in a user's folder: path within the folder -> hash.

    The file's own is among them; empty if it was not imported in this process.
    """
    path = Path(file).resolve()
    if path not in _RUN:
        return {}
    folder = _RUN[path]
    return {os.path.relpath(p, folder.own[-1]).replace(os.sep, "/"): d for p, d in sorted(folder.sources.items())}


def _folder_of(path: Path, depth: int, whole: int) -> _Folder:
    own = [path.parent, *([path.parents[depth]] if depth else [])]
    further = [path.parents[whole]] if whole else []
    further += [Path.cwd()] if path.is_relative_to(Path.cwd()) else []
    further = [folder for folder in dict.fromkeys(further) if folder not in own]
    return _FOLDERS.setdefault((*own, *further), _Folder(own, further))


def _package_depths(path: Path) -> tuple[int, int]:
    """Number of packages that a file has to be in for its relative imports, one inside the other, and that it is in.

    Raises:
        SyntaxError, ValueError: It is not Python.
        OSError: It cannot be read.
    """
    most = len(path.parents) - 1
    whole = 0
    while whole < most and (path.parents[whole] / "__init__.py").is_file():
        whole += 1
    nodes = ast.walk(ast.parse(path.read_bytes(), str(path)))
    level = max((node.level for node in nodes if isinstance(node, ast.ImportFrom)), default=0)
    return min(max(level, whole), most) if level else 0, whole


def _has_module(folder: Path, name: str, without_init: bool) -> bool:
    if (folder / f"{name}.py").is_file() or next(folder.glob(f"{name}.*.so"), None) is not None:
        return True
    inside = folder / name
    if (inside / "__init__.py").is_file() or not without_init:
        return (inside / "__init__.py").is_file()
    return inside.is_dir() and any(next(inside.glob(p), None) for p in ("*.py", "*/*.py"))


def _top(name: str) -> str:
    return name.partition(".")[0]


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]
    except OSError:
        return ""
