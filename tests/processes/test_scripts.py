"""The scripts: they can be started as programs, find their Python, and the documents' own need no pytest."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.commands import ROOT

DOCUMENTED = [ROOT / "tests" / "test_vit_quasi_structured.py", ROOT / "tests" / "test_head_mlp_pruning.py"]
SCRIPTS = sorted((ROOT / "scripts").iterdir())
PROGRAMS = [ROOT / f"{name}.py" for name in ("main_imp_fillback", "sweep", "report", "export")]
WITHOUT_PYTEST = "import runpy, sys; sys.modules['pytest'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"


def without_environment(**more):
    """The surroundings of a shell in which no environment is active."""
    return {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON")} | more


@pytest.mark.parametrize("file", [*SCRIPTS, *DOCUMENTED, *PROGRAMS], ids=lambda path: path.name)
def test_it_can_be_started_as_a_program(file):
    assert os.access(file, os.X_OK) and file.read_text().startswith("#!/usr/bin/env ")
    kept = subprocess.run(["git", "ls-files", "-s", file], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert not kept or kept.startswith("100755"), "git keeps the run bit"


@pytest.mark.parametrize("file", DOCUMENTED, ids=lambda path: path.stem)
def test_the_documents_scripts_run_without_pytest(file, tmp_path):
    words = [sys.executable, "-c", WITHOUT_PYTEST, file]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("✓ 所有测试通过！\n  1. ✓ 全局L1剪枝（element-wise）正常\n")
    assert ("压缩率: 1.47x" in done.stdout) == (file == DOCUMENTED[1])


def test_a_script_runs_the_python_that_was_installed_for_it():
    tell = ROOT / "scripts" / "python.sh"
    own = ROOT / ".venv" / "bin" / "python"
    chosen = [
        (without_environment(), str(own) if own.exists() else "python"),
        (without_environment(VIRTUAL_ENV="/mine"), "python"),
        (without_environment(CONDA_PREFIX="/mine"), "python"),
        (without_environment(PYTHON="/my/python"), "/my/python"),
    ]
    for env, expected in chosen:
        assert subprocess.run([tell], env=env, capture_output=True, text=True, check=True).stdout == f"{expected}\n"


def test_the_documents_integration_script_starts_by_itself():
    """`./run_head_mlp_test.sh`, in the folder where it lies; the plan instead of training, on data that are there."""
    words = ["./run_head_mlp_test.sh", "--dry_run", "--dataset", "digits", "--quiet", "--wandb", "disabled"]
    env = without_environment(PYTHON=sys.executable)
    done = subprocess.run(words, cwd=ROOT / "scripts", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "18/27 heads, 2412/3456 neurons" in done.stdout
