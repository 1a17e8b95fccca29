"""Load tensor files from untrusted sources: never run code from them, and check declared sizes before use."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from structured_tickets.base.atomic_files import replacing
from structured_tickets.base.errors import DataError, first_line
from structured_tickets.base.stand_ins import StandIns
from structured_tickets.base.text_tables import counted

CODE = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")


OLD_NETWORK = "Only persistent_load of storage is allowed"  # torch's older format names the code of networks
FRAMED = "Unsupported operand 149"  # what begins a pickle of protocol 4 or later

CODE_BY_FORMAT = {"TorchScript": "a TorchScript archive", "legacy .tar format": "of a format that torch 0.4 gave up"}


def load_tensors(path: Path, failure: str) -> Any:
    """`torch.load` without unpickling code.

    Args:
        failure: What a message begins with, such as "cannot read the checkpoint run/0checkpoint.pth.tar".

    Raises:
        DataError: The file is not one of tensors and plain values, or claims more values than it holds.
    """
    return _load(path, failure, None)


def load_foreign_tensors(path: Path, failure: str) -> tuple[Any, list[str]]:
    """Read a file of another program, without unpickling code: objects beside its tensors become `StandIn`s.

    Returns:
        What the file holds, and the names of the classes that were left unread.

    Raises:
        DataError: As `load_tensors`; also if the file would call functions of Python.
    """
    unread = StandIns()
    found = _load(path, failure, unread)
    return found, list(unread.classes)


def _load(path: Path, failure: str, unread: StandIns | None) -> Any:
    try:
        _check_archive(path)
        found = _tensors_of(path, unread)
        _refuse_false_claims(found)
    except Exception as error:  # torch raises a wide family for damaged files
        raise DataError(f"{failure}: {_reason(error)}") from error
    return found


def _tensors_of(path: Path, unread: StandIns | None) -> Any:
    """Raises: Exception, of many kinds, for damaged files, and for objects that nothing may stand for."""
    while True:
        also: list[Any] = [(kind, name) for name, kind in unread.classes.items()] if unread else []
        try:
            with torch.serialization.safe_globals(also), warnings.catch_warnings(action="ignore"):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if unread is None or not unread.learn(error):
                raise


def _reason(error: Exception) -> str:
    said = str(error)
    if code := CODE.search(said):
        return f"it contains {code[1]}, which could run code. The file was not loaded"
    if kind := next((kind for words, kind in CODE_BY_FORMAT.items() if words in said), None):
        return f"it is {kind}, which could run code. The file was not loaded"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if OLD_NETWORK in said:
        return (
            "it holds a network as an object, which cannot be loaded without running its code. If you trust it, save "
            "its weights instead, in Python and where its code can be imported: torch.save(torch.load(FILE, "
            "weights_only=False).state_dict(), 'weights.pth')"
        )
    if FRAMED in said:
        return "it is pickled in a newer form than torch's own. Save it again by torch.save, without pickle_protocol"
    if isinstance(error, pickle.UnpicklingError | EOFError):
        return "it is not a file of tensors and plain values. The file was not loaded"
    return first_line(error)


def _check_archive(path: Path) -> None:
    """Compare check sums, which torch does not; and a few megabytes can unpack to terabytes, where torch packs nothing.

    Raises:
        ValueError: A check sum is wrong, or something is packed.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = sum(entry.file_size for entry in archive.infolist())
            if content > path.stat().st_size:
                raise ValueError(
                    f"it has {counted(path.stat().st_size, 'byte')}, but would unpack to {content:,}. The file was not "
                    "loaded"
                )
            if damaged := archive.testzip():
                raise ValueError(f"it is damaged (at {damaged})")


def _refuse_false_claims(found: Any) -> None:
    """A view of a few bytes can claim to be terabytes: harmless until it is copied.

    Raises:
        ValueError: A tensor has fewer values than it claims, or is of a kind that no network's weights are.
    """
    seen, left = set(), [found]
    while left:  # no recursion: containers may be nested without end, or hold themselves
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple | set):
            left += value
        elif isinstance(value, Tensor):
            _check_plain(value)


def _check_plain(value: Tensor) -> None:
    kind = value.device.type if value.device.type != "cpu" else str(value.layout).removeprefix("torch.")
    if kind != "strided" or value.is_quantized or value.is_nested or type(value) not in (Tensor, nn.Parameter):
        raise ValueError(f"it contains a tensor that is not a plain one ({kind}). The file was not loaded")
    claimed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if claimed > held:
        raise ValueError(
            f"a tensor claims {counted(claimed, 'byte')}, but the file has {held:,}. The file was not loaded"
        )


def is_state(value: Any) -> bool:
    """True if a value is a state dict: tensors by name."""
    return (
        isinstance(value, dict)
        and all(isinstance(name, str) for name in value)
        and all(isinstance(tensor, Tensor) for tensor in value.values())
    )


def as_state_dict(found: Any, failure: str) -> dict[str, Tensor]:
    """Return a value if it is a state dict: tensors by name.

    Raises:
        DataError: It is not.
    """
    if not isinstance(found, dict) or not is_state(found):
        raise DataError(f"{failure}: it holds no state dict")
    return found


def save_atomically(value: Any, path: Path) -> None:
    """`torch.save` to a temporary name, then rename: the file is whole, or it is the one before.

    Raises:
        StorageError: The folder cannot be written.
    """
    with replacing(path) as file:
        sink = _Sink(file)
        torch.save(value, sink)  # type: ignore[arg-type]
        if sink.error is not None:
            raise sink.error


class _Sink:
    """A file for `torch.save`, which ends the process if writing raises: the error is kept instead."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            if self.error is None:
                self.file.write(content)
        except OSError as error:
            self.error = error
        return memoryview(content).nbytes

    def flush(self) -> None:
        """Left to the file."""
