"""Run a user's Python file with the modules beside it, whatever other modules of the same names are loaded.

`import utils` in a user's file means the `utils.py` beside it, at any time, in a forward pass too; the program's own
`utils` is not touched. So the modules of a folder are loaded into a package of their own, and the code of the folder
imports by a function that looks there first.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

PROGRAM = __name__.partition(".")[0]


class _Loader(SourceFileLoader):
    """Loads a module whose import statements go through a function."""

    def __init__(self, name: str, path: str, import_: Any) -> None:
        super().__init__(name, path)
        self._builtins = {**vars(builtins), "__import__": import_}

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self._builtins
        super().exec_module(module)


class OwnImports(MetaPathFinder):
    """The modules in the folder of a user's file, and in the folder of the package that the file belongs to.

    Args:
        file: Path of the file.
    """

    def __init__(self, file: Path) -> None:
        self.file, folder = file.resolve(), file.resolve().parent
        root = next(p for p in (folder, *folder.parents) if not (p / "__init__.py").is_file() or p == p.parent)
        self.folders = [str(p) for p in dict.fromkeys((folder, root))]
        self.package = f"user_folder_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
        inside = ".".join(self.file.relative_to(root).with_suffix("").parts)
        self.name = f"{self.package}.{inside}" if root != folder else f"user_model_{self.file.stem}"

    def load(self) -> ModuleType:
        """Return the file as a module, run anew, with all that it imports from its folder.

        Raises:
            FileNotFoundError: There is no such file.
        """
        for name in [n for n in sys.modules if n == self.package or n.startswith(f"{self.package}.")]:
            del sys.modules[name]
        sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "package", "") != self.package]
        sys.meta_path.insert(0, self)
        folder = ModuleType(self.package)
        folder.__path__ = self.folders
        sys.modules[self.package] = folder
        if self.name.startswith(self.package):
            return importlib.import_module(self.name)
        spec = spec_from_file_location(self.name, self.file, loader=self._loader(self.name, str(self.file)))
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[self.name] = module  # dataclasses and pickles look their module up there
        spec.loader.exec_module(module)
        return module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module in the folder, with this object's imports; None for all others."""
        if not fullname.startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = self._loader(fullname, spec.loader.path)
        return spec

    def _loader(self, name: str, path: str) -> _Loader:
        return _Loader(name, path, self._import)

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        """Do what the import statement does, with the modules of the folder first."""
        top = name.partition(".")[0]
        if level or not self._has(top):
            return builtins.__import__(name, globals, locals, fromlist, level)
        found = builtins.__import__(f"{self.package}.{name}", globals, locals, fromlist, 0)
        return found if fromlist else sys.modules[f"{self.package}.{top}"]

    def _has(self, top: str) -> bool:
        """Return whether a module lies in the folder; one that is loaded from there already is not loaded twice.

        A folder without `__init__.py` is a package only if nothing else has its name.
        """
        loaded = getattr(sys.modules.get(top), "__file__", None)
        places = [Path(folder) / top for folder in self.folders]
        files = [file for p in places for file in (p.with_name(f"{top}.py"), p / "__init__.py") if file.is_file()]
        if files:
            return top != PROGRAM and str(files[0]) != loaded
        elsewhere = [p for p in sys.path if p not in self.folders]
        named = any(p.is_dir() and any(p.glob("*.py")) for p in places)
        return named and top not in sys.modules and PathFinder.find_spec(top, elsewhere) is None


@contextmanager
def searched_first(folder: Path) -> Iterator[None]:
    """Search a folder for modules before all others, for code that imports by `importlib`."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        with suppress(ValueError):  # the code may have taken it away
            sys.path.remove(str(folder.resolve()))
