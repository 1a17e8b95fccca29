"""The house: which folder may import which, how long functions are, and that every module can be imported alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT

PACKAGE = ROOT / "structured_tickets"

# Ground floor first: a folder imports only itself and folders named before it.
FLOORS = (
    "base",
    "networks",
    "data",
    "features",
    "unit_groups",
    "shrinking",
    "pruning",
    "training",
    "settings",
    "runs",
    "export",
    "interface",
    "reports",
    "sweeps",
    "programs",
)
LONGEST = 60  # lines of a function
WIDEST = 26  # entries of the root that `ls` shows

FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [p for p in ROOT.rglob("*.py") if not {".venv", "build"} & set(p.relative_to(ROOT).parts)]
ROOT_MODULES = {p.stem for p in ROOT.glob("*.py")} | {"models", "reg_pruner_files", "benchmarks", "tests"}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, in functions and for type checkers, too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] in FLOORS else None


def test_every_folder_has_its_floor():
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()} == set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_a_folder_imports_only_floors_below_it(floor):
    below = FLOORS[: FLOORS.index(floor) + 1]
    for file in (PACKAGE / floor).rglob("*.py"):
        upwards = {m for m in imported(file) if floor_of(m) is not None and floor_of(m) not in below}
        assert not upwards, f"{file.relative_to(ROOT)} imports {sorted(upwards)}"


def test_the_package_imports_nothing_of_the_root():
    for file in FILES:
        outside = {m.split(".")[0] for m in imported(file)} & ROOT_MODULES
        assert not outside, f"{file.relative_to(ROOT)} imports {outside}"


def test_a_base_module_knows_nothing_of_pruning():
    for file in (PACKAGE / "base").glob("*.py"):
        assert {floor_of(m) for m in imported(file)} <= {None, "base"}, file.name


def test_no_modules_import_each_other_in_a_circle():
    """Imports at the top of a file; those inside functions wait until they are called."""
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
    tops = {}
    for name, file in modules.items():
        nodes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ImportFrom) and n.module]
        found = {n.module for n in nodes} | {f"{n.module}.{a.name}" for n in nodes for a in n.names}
        tops[name] = {m for m in found if m in modules and m != name}
    done: set[str] = set()
    while ready := {m for m, needs in tops.items() if m not in done and needs <= done}:
        done |= ready
    assert not modules.keys() - done


ALONE = """
import importlib, os, sys
import torch, torchvision, timm, safetensors.torch, sklearn, matplotlib.figure, numpy, yaml, tqdm
failed = []
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(name, repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    failed += [name] * (os.waitpid(child, 0)[1] != 0)
sys.exit(", ".join(failed) or 0)
"""


@pytest.mark.slow
def test_every_module_can_be_imported_first():
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in FILES]
    names = [name for name in names if not name.endswith("__main__")]
    names += ["pruning_utils", "vit_pruning_utils", "vit_pruning_utils_head_mlp", "dataset", "utils", "models.vit"]
    names += ["models.resnets", "reg_pruner_files.reg_pruner", "reg_pruner_files.schedules", "main_imp_fillback"]
    done = subprocess.run([sys.executable, "-c", ALONE, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short_and_the_formatter_decides(file):
    text = file.read_text()
    assert "fmt: " + "skip" not in text and "fmt: " + "off" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < LONGEST, f"{node.name} has more than {LONGEST} lines"


def test_only_the_console_prints():
    """There secrets are taken out, and of several processes the first speaks."""
    for file in FILES:
        if file == PACKAGE / "base" / "console.py":
            continue
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), file.name


def test_the_root_is_a_hall_not_a_store():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    entries = {line.split("/")[0] for line in tracked.splitlines()}
    shown = {name for name in entries if not name.startswith(".")}
    assert len(shown) <= WIDEST, sorted(shown)
