"""Stand-ins for objects in a file whose classes are not loaded, so that the tensors beside them can be read.

Trainers keep settings, histories and paths beside the weights. None of their classes is imported and nothing of them is
called: torch's reader of weights alone is given a class of this module for each name that it does not know. What Python
itself has is refused, but for classes that hold plain values: nothing else of it is in a file that means well.
"""

from __future__ import annotations

import re
import sys
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from typing import Any

# Classes of Python that hold values, or what may be called later, and do nothing when they are made.
PLAIN = frozenset(
    [f"builtins.{n}" for n in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "slice", "str")]
    + [f"builtins.{n}" for n in ("Ellipsis", "NotImplemented", "bytearray", "complex", "range", "set", "tuple", "type")]
    + ["argparse.Namespace", "types.SimpleNamespace", "functools.partial"]
    + [f"collections.{n}" for n in ("ChainMap", "UserDict", "UserList", "defaultdict", "deque")]
    + [f"datetime.{n}" for n in ("date", "datetime", "time", "timedelta", "timezone")]
    + [f"{m}.{n}" for m in ("pathlib", "pathlib._local") for n in ("Path", "PosixPath", "PurePath", "PurePosixPath")]
    + [f"{m}.{n}" for m in ("pathlib", "pathlib._local") for n in ("PureWindowsPath", "WindowsPath")]
    + ["decimal.Decimal", "fractions.Fraction", "uuid.UUID", "ipaddress.IPv4Address"]
)
MOST = 100  # different classes in a file
MODULES = sys.stdlib_module_names | set(IMPORT_MAPPING)  # the latter as files of torch name them: as Python 2 did

REFUSED = re.compile(r"GLOBAL (\S+) was not an allowed")
MISUSED = re.compile(r"stand_in_(\d+)'")


class StandIn:
    """An object of a class that is not loaded.

    Attributes:
        name: The class.
        state: Its attributes, if they came as a dictionary; else empty.
    """

    name = ""
    state: dict[Any, Any]

    def __new__(cls, *args: object) -> Any:
        made = object.__new__(cls)
        made.state = {}  # here, because a file can make objects without initialising them
        return made

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    @property
    def is_network(self) -> bool:
        """True if the object is a `torch.nn.Module`."""
        return {"_parameters", "_modules"} <= self.state.keys()


class _StandInDict(StandIn):
    def __new__(cls, *args: object) -> Any:
        return OrderedDict()


class _StandInList(StandIn):
    def __new__(cls, *args: object) -> Any:
        return []


class StandIns:
    """Those of one file: they become known one by one, as its reader stumbles over the names.

    Attributes:
        classes: Name of a class -> what stands for it.
    """

    def __init__(self) -> None:
        self.classes: dict[str, type[StandIn]] = {}

    def learn(self, error: Exception) -> bool:
        """Take in what made the reader fail; False if there is nothing that would let it go on."""
        said = str(error)
        if match := REFUSED.search(said):
            name = match[1] if "." in match[1] else f"builtins.{match[1]}"  # torch leaves this word out
            if not may_stand_in(name) or name in self.classes or len(self.classes) == MOST:
                return False
            self._add(name, StandIn)
            return True
        if match := MISUSED.search(said):  # it is filled like a list or a dictionary
            name = list(self.classes)[int(match[1])]
            if self.classes[name].__base__ is not StandIn:
                return False
            self._add(name, _StandInList if "append" in said else _StandInDict)
            return True
        return False

    def _add(self, name: str, kind: type[StandIn]) -> None:
        number = list(self.classes).index(name) if name in self.classes else len(self.classes)
        self.classes[name] = type(f"stand_in_{number}", (kind,), {"name": name})


def may_stand_in(name: str) -> bool:
    """True if files that mean well hold objects of this class: no function of Python's, which would run something."""
    return name in PLAIN or name.partition(".")[0] not in MODULES
