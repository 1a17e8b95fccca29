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
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

DIGITS = 16  # of a hash

_LOCK = threading.RLock()  # what is imported is the same for all threads


class _Folder:
    """What is imported from a user's folder.

    Args:
        search: Where absolute imports look: the file's own folder, and the one that holds its package.
    """

    def __init__(self, search: Sequence[Path]) -> None:
        self.search = tuple(search)
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
            self._owned[top] = not taken and any(_has_module(folder, top) for folder in self.search)
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
                self.modules |= {n: m for n, m in list(sys.modules.items()) if self.owns(_top(n)) and self._made(n)}
                clashing = {_top(name) for name in others}
                for name in [n for n in self.modules if _top(n) in clashing]:
                    sys.modules.pop(name, None)
                sys.modules.update(others)

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
        self.folder.sources[Path(self.path)] = hashlib.sha256(source).hexdigest()[:DIGITS]
        module.__dict__["__builtins__"] = self.folder.builtins
        exec(self.source_to_code(source, self.path), module.__dict__)


_FOLDERS: dict[tuple[Path, ...], _Folder] = {}


@contextmanager
def imported(file: str | Path) -> Iterator[ModuleType]:
    """Run a user's file and give its module; within, imports find what lies beside the file.

    A file with relative imports is run as a module of the package that its folder is, else as a module on its own.

    Raises:
        Exception: Whatever the code raises.
    """
    path = Path(file).resolve()
    depth = _package_depth(path)
    package = path.parts[len(path.parts) - 1 - depth : -1]
    folder = _folder_of(path, depth)
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
    try:
        folder = _folder_of(path, _package_depth(path))
    except (OSError, SyntaxError, ValueError):  # it was changed since
        return {}
    root = folder.search[-1]
    here = {p: digest for p, digest in folder.sources.items() if p.is_relative_to(root)}
    return {p.relative_to(root).as_posix(): digest for p, digest in sorted(here.items())}


def _folder_of(path: Path, depth: int) -> _Folder:
    search = (path.parent, path.parents[depth]) if depth else (path.parent,)
    return _FOLDERS.setdefault(search, _Folder(search))


def _package_depth(path: Path) -> int:
    """Number of packages that a file is in, one inside the other; 0 if it has no relative imports, and needs none.

    Raises:
        SyntaxError, ValueError: It is not Python.
        OSError: It cannot be read.
    """
    nodes = ast.walk(ast.parse(path.read_bytes(), str(path)))
    level = max((node.level for node in nodes if isinstance(node, ast.ImportFrom)), default=0)
    if not level:
        return 0
    said = 0
    while (path.parents[said] / "__init__.py").is_file() and said < len(path.parents) - 1:
        said += 1
    return min(max(level, said), len(path.parents) - 1)


def _has_module(folder: Path, name: str) -> bool:
    if (folder / f"{name}.py").is_file() or next(folder.glob(f"{name}.*.so"), None) is not None:
        return True
    inside = folder / name
    return inside.is_dir() and any(next(inside.glob(p), None) for p in ("*.py", "*/*.py"))


def _top(name: str) -> str:
    return name.partition(".")[0]


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]
    except OSError:
        return ""
