"""What a run notes of the program that it is: its files, its commit, its command; and how other processes find it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT

from structured_tickets.base import commands, environment
from structured_tickets.base.environment import program_digest

# The digest of the program


@pytest.fixture
def package(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(ROOT / "structured_tickets", tmp_path / "copy", ignore=ignored))


def test_one_byte_of_any_file_makes_another_program(package):
    whole, files = program_digest(package), [p for p in package.rglob("*") if p.is_file()]
    assert len(files) > 80 and whole == environment.PROGRAM
    for file in files:
        content = file.read_bytes()
        changed = bytes([content[0] ^ 1]) + content[1:] if content else b"0"
        file.write_bytes(changed)
        assert program_digest(package) != whole, f"{file.name} is not in it"
        file.write_bytes(content)
    assert program_digest(package) == whole


def test_names_and_places_of_files_are_part_of_the_program(package):
    seen = {program_digest(package)}
    file = package / "base" / "errors.py"
    for name in ("base/errors_.py", "errors_.py", "data/errors_.py"):
        file = file.rename(package / name)
        seen.add(program_digest(package))
    (package / "empty.py").touch()
    seen.add(program_digest(package))
    assert len(seen) == 5


def test_where_one_file_ends_is_part_of_the_program(tmp_path):
    for name, contents in {"a": ("12", "3"), "b": ("1", "23"), "c": ("123", "")}.items():
        (tmp_path / name).mkdir()
        for file, content in zip(("x.py", "y.py"), contents, strict=True):
            (tmp_path / name / file).write_text(content)
    assert len({program_digest(tmp_path / name) for name in "abc"}) == 3


def test_what_is_no_part_of_the_program_changes_nothing(package):
    whole = program_digest(package)
    (package / "base" / "__pycache__").mkdir()
    (package / "base" / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"0")
    (package / "base" / ".errors.py.swp").write_bytes(b"0")
    os.utime(package / "base" / "errors.py", (0, 0))
    assert program_digest(package) == whole
    assert program_digest(package.rename(package.parent / "elsewhere")) == whole


# The commit


def test_an_installed_package_takes_no_other_repository_s_commit_for_its_own(monkeypatch, tmp_path):
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path)
    assert len(environment.commit()) == 40
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(environment, "CHECKOUT", tmp_path / "inside")
    assert environment.commit() is None
    monkeypatch.setattr(environment, "CHECKOUT", None)
    assert environment.commit() is None


# How the programs are started

INSTALLED = "/home/me/env/lib/python3.12/site-packages"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """`started(argv0, checkout, path)`: this process as if it had been started so."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "structured-tickets"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python3"))

    def start(argv0, checkout=None, active=True):
        monkeypatch.setattr(sys, "argv", [str(argv0), "--flag"])
        monkeypatch.setattr(commands, "CHECKOUT", checkout)
        monkeypatch.setenv("PATH", str(tmp_path / "bin") if active else "/nowhere")
        return tmp_path / "bin"

    return start


@pytest.mark.parametrize("argv0", ["main_imp_fillback.py", "/repo/sweep.py", "/usr/bin/pytest", "-c", ""])
def test_a_checkout_names_its_scripts(started, argv0):
    started(argv0, Path("/repo"), active=False)
    assert commands.python_words("run") == ["main_imp_fillback.py"]
    assert commands.python_words("run", from_any_folder=True) == ["/repo/main_imp_fillback.py"]
    assert commands.name_in_help("sweep") == "sweep.py" and commands.typed("report") == "python report.py"
    assert commands.python_words("doctor") == ["-m", "structured_tickets", "doctor"]


@pytest.mark.parametrize("checkout", [None, Path("/repo")])
@pytest.mark.parametrize("active", [True, False])
def test_the_command_names_itself(started, checkout, active):
    place = started("", checkout, active) / "structured-tickets"
    started(place, checkout, active)
    assert commands.python_words("run", from_any_folder=True) == ["-m", "structured_tickets", "run"]
    assert commands.name_in_help("run") == "structured-tickets run"
    assert commands.typed("report") == ("structured-tickets report" if active else f"{place} report")


@pytest.mark.parametrize(
    "argv0, checkout", [(f"{INSTALLED}/structured_tickets/__main__.py", Path("/repo")), ("-c", None)]
)
@pytest.mark.parametrize("active", [True, False])
def test_the_module_names_itself_with_the_python_that_runs(started, argv0, checkout, active):
    place = started(argv0, checkout, active)
    assert commands.python_words("run", from_any_folder=True) == ["-m", "structured_tickets", "run"]
    assert commands.name_in_help("run") == "python -m structured_tickets run"
    python = "python" if active else str(place / "python3")
    assert commands.typed("report") == f"{python} -m structured_tickets report"


def test_another_main_is_not_taken_for_the_package_s(started):
    started("/env/site-packages/pytest/__main__.py", Path("/repo"))
    assert commands.python_words("run") == ["main_imp_fillback.py"]


def test_a_run_notes_the_command_that_started_it(started):
    started("/env/bin/structured-tickets")
    found = environment.describe_environment(["--rate", "0.3"], torch.device("cpu"), "float32")
    assert found["command"] == ["-m", "structured_tickets", "run", "--rate", "0.3"]


@pytest.mark.parametrize(
    "folder, before, after",
    [
        ("/repo", "", "/repo"),
        ("/repo", "/a:/repo:/b", "/repo:/a:/b"),
        ("/target", "/a", "/target:/a"),
        (INSTALLED, "", None),
        ("/usr/lib/python3/dist-packages", "/a", None),
    ],
)
def test_other_processes_are_told_where_the_code_is_unless_python_finds_it(folder, before, after, monkeypatch):
    monkeypatch.setattr(commands, "_ABOVE", Path(folder))
    monkeypatch.setenv("PYTHONPATH", before)
    assert commands.import_path() == ({} if after is None else {"PYTHONPATH": after})
