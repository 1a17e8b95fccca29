"""The environment of a run: versions, machine, code and data. Needs no package, but torch for torch's own numbers."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structured_tickets.base.commands import CHECKOUT, COMMAND, python_words
from structured_tickets.base.secrets_in_text import redacted

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy")


def describe_environment(words: Sequence[str], device: torch.device, precision: str) -> dict[str, Any]:
    """Versions, device, git commit and command, as plain values. Holds no environment variable.

    Args:
        words: The command line that the program was given.
    """
    import torch

    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [*python_words("run"), *map(redacted, words)],
        "python": platform.python_version(),
        "packages": {p: version_of(p) for p in (*PACKAGES, "wandb", COMMAND)},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "commit": commit(),
    }


def numerics(device: torch.device) -> dict[str, Any]:
    """Return all that the last bits of a result depend on besides settings and data: kernels, processor, threads."""
    import torch

    cuda = device.type == "cuda"
    return {
        "packages": {p: version_of(p) for p in PACKAGES},
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "program": PROGRAM,
        "kernels": "deterministic" if torch.are_deterministic_algorithms_enabled() else "fastest",
    }


def program_digest(package: Path) -> str:
    """Return a hash of the names and contents of a package's files, wherever the package lies.

    Left out is what Python and editors leave there: bytecode and hidden files.
    """
    digest = hashlib.sha256()
    for name, file in sorted(_files_of(package)):
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _files_of(package: Path) -> Iterator[tuple[str, Path]]:
    for file in package.rglob("*"):
        name = file.relative_to(package)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if file.is_file() and not hidden:
            yield name.as_posix(), file


PROGRAM = program_digest(Path(__file__).resolve().parents[1])
"""Taken when this is imported: files that are edited later are not what runs."""


def processor() -> str:
    """The processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def numbers_at_once(gpu: int) -> int:
    """Widths of layers should be multiples of this, so that no lane of the device stays empty.

    16 where the processor has registers of 512 bits; else 8, which is also what tensor cores want in 16 bits.

    Args:
        gpu: Number of the CUDA device; negative: the processor computes.
    """
    import torch

    on_gpu = gpu >= 0 and torch.cuda.is_available()
    return 16 if not on_gpu and "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_cpp_compiler() -> bool:
    """True if torch.compile can find a compiler for processors: the one that CXX names, g++ or clang++."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def commit() -> str | None:
    """The checked-out commit, with + where files differ from it; None outside a git checkout of this project.

    An installed package can lie in a folder of somebody else's repository, whose commit would mean nothing.
    """
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return None
    try:
        commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
        head, changes = (
            subprocess.run(c, cwd=CHECKOUT, capture_output=True, text=True, timeout=10, check=True).stdout
            for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changes.strip() else "")
