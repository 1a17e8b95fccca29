"""Show what the programs find on this machine: versions, devices, number type, optional parts, and what is missing."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from structured_tickets import __version__
from structured_tickets.base.commands import CHECKOUT, COMMAND, name_in_help
from structured_tickets.base.console import exit_status
from structured_tickets.base.environment import commit, has_cpp_compiler, processor, version_of
from structured_tickets.base.errors import RunError, first_line
from structured_tickets.base.secrets_in_text import refuse_secrets
from structured_tickets.base.text_tables import counted, gigabytes, text_table
from structured_tickets.settings.argument_types import OneLineParser, path
from structured_tickets.sweeps.executors import cores_here


@dataclass(frozen=True)
class Part:
    """An optional part: its packages, and the commands that need it."""

    packages: tuple[str, ...]
    use: str


# By the extra that installs it (pyproject.toml).
OPTIONAL = {
    "onnx": Part(("onnx", "onnxruntime", "onnxscript"), "export --onnx"),
    "search": Part(("optuna",), "sweep --search"),
    "ray": Part(("ray",), "sweep --executor ray"),
    "tensorboard": Part(("tensorboard",), "run --tensorboard"),
    "hf": Part(("pyarrow", "transformers"), "data sets in parquet files, --arch hf/NAME"),
}
COMPILER = "run --compile on a processor"
MODULES = {"pillow": "PIL", "PyYAML": "yaml", "scikit-learn": "sklearn"}  # others are imported by their own name
DISPENSABLE = {"wandb": "results are saved locally only"}  # needed by no run: what is different without
WIDTH = 100


class NotReady(RunError):
    """Something that every run needs is missing or broken."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Raises: UsageError."""
    parser = OneLineParser(prog=name_in_help("doctor"), description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--data", type=path, default=Path("data"), metavar="DIR", help="folder of images (default: data)"
    )
    parser.add_argument("--json", action="store_true", help="the same for machines")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0, or 1 if something that is needed is missing or broken (others: see `errors`)."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(words: Sequence[str]) -> str:
    refuse_secrets(words)
    args = parse_args(words)
    found = examined(args.data)
    text = json.dumps(found, indent=1) if args.json else as_text(found)
    if found["problems"]:
        raise NotReady(_advice(found), output=text)
    return text


def examined(data: Path) -> dict[str, Any]:
    """Look at everything; returns plain values, without any of an environment variable.

    Args:
        data: Folder of images, which need not exist.
    """
    packages = {name: _looked_at(name, oldest) for name, oldest in needed().items()}
    bad = {name: p["problem"] for name, p in packages.items() if p["problem"]}
    problems = [f"{name} ({problem})" for name, problem in bad.items() if name not in DISPENSABLE]
    computing = {} if problems else _computing()
    if computing.get("problem"):
        problems.append(f"{computing['device']} ({computing['problem']})")
    return {
        COMMAND: {"version": __version__, "commit": commit(), "folder": str(Path(__file__).resolve().parents[2])},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "machine": _machine(),
        "computing": computing,
        "needed": packages,
        "optional": {extra: _optional(part) for extra, part in OPTIONAL.items()},
        "cpp_compiler": has_cpp_compiler(),
        "folders": {"here": _folder(Path()), "images": _folder(data)},
        "problems": problems,
    }


def needed() -> dict[str, str]:
    """Return the packages that every run needs, each with its oldest version.

    Raises:
        NotReady: This is a copy of the package alone, which does not say what it needs.
    """
    found = (re.fullmatch(r"([\w.-]+)>=([\d.]+)", line.strip()) for line in _requirements())
    return {match[1]: match[2] for match in found if match}


def _requirements() -> list[str]:
    if CHECKOUT is not None:
        return (CHECKOUT / "requirements.txt").read_text().splitlines()
    try:
        return metadata.requires(COMMAND) or []
    except metadata.PackageNotFoundError:
        raise NotReady(f"{Path(__file__).parents[1]} is a copy that was never installed; install it by pip") from None


def _looked_at(name: str, oldest: str) -> dict[str, Any]:
    """The package's version, and what is wrong with it: nothing, if the problem is empty."""
    version = version_of(name)
    try:
        importlib.import_module(MODULES.get(name, name))
        problem = f"{version} is older than {oldest}" if version and _numbers(version) < _numbers(oldest) else ""
    except Exception as error:  # of whatever kind: this is what a doctor is for
        problem = f"cannot be imported: {first_line(error)}" if version else "not installed"
    return {"version": version, "oldest": oldest, "problem": problem}


def _numbers(version: str) -> list[int]:
    leading = re.match(r"[\d.]*\d", version)
    return [int(part) for part in leading[0].split(".")] if leading else []


def _optional(part: Part) -> dict[str, Any]:
    versions = {name: version_of(name) for name in part.packages}
    return {"use": part.use, "versions": versions, "missing": [n for n, version in versions.items() if version is None]}


def _machine() -> dict[str, Any]:
    total, free = _memory()
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "cores_of_this_process": len(cores_here()),
        "memory_bytes": total,
        "free_memory_bytes": free,
    }


def _memory() -> tuple[int, int | None]:
    """Bytes of the machine and, where the system tells, bytes that are free or can be made so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        free = re.search(r"^MemAvailable: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        free = None
    return total, 1024 * int(free[1]) if free else None


def _computing() -> dict[str, Any]:
    """The device of a run, whether it computes, and in what number type; torch has to be sound."""
    import torch

    from structured_tickets.networks.precision import choose_precision, name_of
    from structured_tickets.runs.setup import choose_device

    with warnings.catch_warnings(record=True) as said:  # why a GPU cannot be used
        warnings.simplefilter("always")
        device = choose_device(0)
        gpus = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    try:
        problem = "" if torch.ones(2, device=device).sum().item() == 2 else "computes wrong sums"
    except RuntimeError as error:
        problem = first_line(error)
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": name_of(choose_precision("auto", device)),
        "cuda": torch.version.cuda,
        "gpus": [{"name": g.name, "bytes": g.total_memory, "capability": f"{g.major}.{g.minor}"} for g in gpus],
        "warnings": [first_line(w.message) for w in said if isinstance(w.message, Warning)],
        "problem": problem,
    }


def _folder(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        return {"path": str(folder.resolve()), "exists": False, "writable": False, "free_bytes": None}
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
        writable = True
    except OSError:
        writable = False
    free = shutil.disk_usage(folder).free
    return {"path": str(folder.resolve()), "exists": True, "writable": writable, "free_bytes": free}


# As text


def as_text(found: Mapping[str, Any]) -> str:
    """Return what a person reads, from what `examined` returns."""
    parts = [_head(found), _section("machine", _machine_rows(found)), _needed_text(found["needed"])]
    parts += [_section("optional", _optional_rows(found)), _section("folders", _folder_rows(found["folders"]))]
    return "\n\n".join([*parts, *([] if found["problems"] else ["ready: nothing that is needed is missing"])])


def _head(found: Mapping[str, Any]) -> str:
    own, python = found[COMMAND], found["python"]
    name, edited = (own["commit"] or "")[:12], (own["commit"] or "").endswith("+")
    commit_text = f", commit {name}{' and later edits' if edited else ''}" if name else ""
    rows = [["Python", f"{python['version']}, {python['executable']}"]]
    return text_table([COMMAND, f"{own['version']}{commit_text}, {own['folder']}"], rows)


def _section(title: str, rows: Sequence[Sequence[str]]) -> str:
    return text_table([title, *[""] * (len(rows[0]) - 1)], [[f"  {name}", *cells] for name, *cells in rows])


def _machine_rows(found: Mapping[str, Any]) -> list[list[str]]:
    machine = found["machine"]
    own = machine["cores_of_this_process"]
    free = machine["free_memory_bytes"]
    return [
        ["system", machine["system"]],
        ["processor", machine["processor"]],
        ["cores", f"{machine['cores']}" + (f", {own} for this process" if own != machine["cores"] else "")],
        ["memory", gigabytes(machine["memory_bytes"]) + (f", {gigabytes(free)} free" if free is not None else "")],
        *_computing_rows(found["computing"]),
    ]


def _computing_rows(computing: Mapping[str, Any]) -> Iterator[list[str]]:
    if not computing:
        yield ["device", "unknown until the packages below are sound"]
        return
    torch = f"torch is built for CUDA {computing['cuda']}" if computing["cuda"] else "torch is built without CUDA"
    yield ["GPUs", f"{len(computing['gpus']) or 'none'}; {torch}"]
    for k, gpu in enumerate(computing["gpus"]):
        yield [f"cuda:{k}", f"{gpu['name']}, {gigabytes(gpu['bytes'])}, compute capability {gpu['capability']}"]
    for warning in computing["warnings"]:
        yield ["warning", warning]
    yield ["device", f"{computing['device']}, {counted(computing['threads'], 'thread')} on the processor"]
    native = computing["precision"] == "bfloat16"
    yield ["bfloat16", f"{'native' if native else 'not native'}: --precision auto is {computing['precision']}"]


def _needed_text(packages: Mapping[str, Mapping[str, Any]]) -> str:
    words = [
        f"{name} ({_without(name, p['problem'])})" if p["problem"] else f"{name} {p['version']}"
        for name, p in packages.items()
    ]
    text = ", ".join(word.replace(" ", "\0") for word in words)  # lines break between packages alone
    wrapped = textwrap.fill(text, WIDTH, break_on_hyphens=False).replace("\0", " ")
    return "needed\n" + textwrap.indent(wrapped, "  ")


def _without(name: str, problem: str) -> str:
    return f"{problem}: {DISPENSABLE[name]}" if name in DISPENSABLE else problem


def _optional_rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for extra, part in found["optional"].items():
        have = ", ".join(f"{name} {version}" for name, version in part["versions"].items() if version)
        missing = f"missing: pip install {' '.join(part['missing'])}" if part["missing"] else ""
        rows.append([extra, part["use"], "; ".join(filter(None, (have, missing)))])
    compiler = "found" if found["cpp_compiler"] else "missing: install g++ or clang++"
    return [*rows, ["C++ compiler", COMPILER, compiler]]


def _folder_rows(folders: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    here, images = folders["here"], folders["images"]
    runs = "runs are written here" if here["writable"] else "cannot be written: give --save_dir"
    kept = "decoded images are kept in .decoded"
    cache = kept if images["writable"] else "cannot be written: decoded images are not kept"
    return [
        ["working", here["path"], f"{runs}, {gigabytes(here['free_bytes'])} free"],
        ["images", images["path"], cache if images["exists"] else "no such folder (digits need none)"],
    ]


def _advice(found: Mapping[str, Any]) -> str:
    needed = {name: p for name, p in found["needed"].items() if name not in DISPENSABLE}
    wrong = [f"'{name}>={p['oldest']}'" for name, p in needed.items() if p["problem"]]
    install = f". To install what is needed: pip install {' '.join(wrong)}" if wrong else ""
    return f"missing or broken: {', '.join(found['problems'])}{install}"
