"""What can be known from the command line and the run folder is said before torch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers.commands import REAL, ROOT, flags, run, tiny

from structured_tickets.runs.at_once import known_at_once
from structured_tickets.settings.flags import parse_args

SLOW = ("torch", "timm", "torchvision", "sklearn", "matplotlib", "wandb", "scipy", "pandas")


def loaded_by(words, expected=0):
    """The program's output, and which slow packages a process that starts afresh has loaded in the end."""
    code = (
        "import sys, main_imp_fillback\n"
        "status = main_imp_fillback.main(sys.argv[1:])\n"
        f"print(status, [p for p in {SLOW} if p in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    *said, last = done.stderr.splitlines()
    status, _, packages = last.partition(" ")
    assert int(status) == expected
    return done.stdout, "\n".join(said), json.loads(packages.replace("'", '"'))


def test_a_finished_run_a_wrong_setting_and_nothing_to_resume_load_nothing(tmp_path, capsys):
    words = flags(**{**REAL, "arch": "res20s", "save_dir": tmp_path / "run", "pruning_times": 2})
    assert run(*words) == 0
    table = capsys.readouterr().out
    out, said, packages = loaded_by(words)
    assert out == table and "nothing to do: the run in" in said and "has finished 2 rounds" in said and not packages
    _, said, packages = loaded_by([*words, "--lr", "0.02"], expected=2)
    assert "argument --lr: the run in this folder used 0.05, not 0.02" in said and not packages
    _, said, packages = loaded_by(["--resume", "--save_dir", tmp_path / "nowhere"], expected=2)
    assert "argument --resume: no run to continue in" in said and not packages


def test_a_cnn_on_digits_loads_no_library_that_it_does_not_need(tmp_path):
    words = flags(**{**REAL, "arch": "res20s", "save_dir": tmp_path / "run", "dry_run": True})
    assert loaded_by(words)[2] in (["torch"], ["torch", "scipy"])


def test_a_run_that_has_something_to_do_is_not_known(tmp_path):
    folder = tmp_path / "run"
    words = tiny(folder)
    assert known_at_once(parse_args(words)) is None and not folder.exists()
    assert run(*words) == 0
    assert "100.00" in known_at_once(parse_args(words))
    assert known_at_once(parse_args(tiny(folder, pruning_times=3))) is None
    assert known_at_once(parse_args([*words, "--dry_run"])) is None
    for name in ("ticket.pth.tar", "args.yaml", "result.json", "1checkpoint.pth.tar", "summary.csv"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        if name != "1checkpoint.pth.tar":  # there is the one before
            assert known_at_once(parse_args(words)) is None, name
        (folder / name).write_bytes(kept)
    for damage in (b"", b"[1, 2", b"{rounds: x}\n"):
        for name in ("args.yaml", "result.json"):
            kept = (folder / name).read_bytes()
            (folder / name).write_bytes(damage)
            assert known_at_once(parse_args(words)) is None, (name, damage)
            (folder / name).write_bytes(kept)


@pytest.mark.parametrize("size, known", [("1", True), ("2", False)])
def test_several_processes_have_to_agree(size, known, tmp_path, monkeypatch, capsys):
    words = tiny(tmp_path / "run")
    assert run(*words) == 0
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr("structured_tickets.runs.launch.run", lambda args: "launched")
    capsys.readouterr()
    assert run(*words) == 0
    assert ("launched" in capsys.readouterr().out) != known
