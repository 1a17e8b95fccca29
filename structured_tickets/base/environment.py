"""What a run ran on: versions, machine, code and data."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from structured_tickets.base.secrets_in_text import redacted


def describe_environment(words: Sequence[str], device: torch.device, precision: str) -> dict[str, Any]:
    """Versions, device, git commit and command, as plain values. Holds no environment variable.

    Args:
        words: The command line that the program was given.
    """
    packages = ("torch", "torchvision", "timm", "numpy", "wandb")
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": ["main_imp_fillback.py", *map(redacted, words)],
        "python": platform.python_version(),
        "packages": {p: _version(p) for p in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "commit": _commit(),
    }


def numerics(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on besides settings and data: kernels, processor, threads."""
    cuda = device.type == "cuda"
    return {
        "packages": {p: _version(p) for p in ("torch", "torchvision", "timm", "numpy")},
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "program": PROGRAM,
        "kernels": "deterministic" if torch.are_deterministic_algorithms_enabled() else "fastest",
    }


def _program_digest() -> str:
    """A hash of the source code that a run may execute."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


PROGRAM = _program_digest()  # when it is imported: files that are edited later are not what runs


def _processor() -> str:
    """The processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit, with + where files differ from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
        head, changes = (
            subprocess.run(c, cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changes.strip() else "")
