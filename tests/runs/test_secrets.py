"""Keys and passwords of the environment are written nowhere, and commands that hold one are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers.commands import REAL, ROOT, TINY, flags, tiny
from helpers.fake_wandb import fake_wandb
from helpers.programs import start_server
from helpers.sweeps import small_job

import main_imp_fillback
from structured_tickets.base.secrets_in_text import redacted, secrets_of
from structured_tickets.programs import export, report, sweep
from structured_tickets.sweeps import job_process

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_plantedTokenValue123456",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYPLANTED",
    "DB_PASSWORD": "correcthorsebattery",
    "WANDB_BASE_URL": "http://somebody:planted4url@127.0.0.1:9",
}
NETRC = "planted8netrc1234567890abcdef1234567890ab"
VALUES = [*PLANTED.values(), NETRC, "planted4url"]
IMPATIENT = """
import sys
from structured_tickets.runs import trackers as tracker
tracker.INIT_SECONDS, tracker.FINISH_SECONDS = 2, 4
import {0}, helpers.networks
sys.exit({0}.main(sys.argv[1:]))
"""


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / ".netrc").write_text(f"machine 127.0.0.1 login user password {NETRC}\n")
    (folder / ".netrc").chmod(0o600)
    return folder


@pytest.fixture
def server():
    """What jobs are forked from; it is shared, and so must not be started where secrets are planted."""
    start_server()


@pytest.fixture
def planted(home, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(home))


def carried_out(program, words, cwd, mode):
    """The program with real trackers, which do not wait for long."""
    modules = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = {**os.environ, "WANDB_MODE": mode, "OMP_NUM_THREADS": "1", "PYTHONPATH": modules}
    command = [sys.executable, "-c", IMPATIENT.format(program), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200, check=False)


def leaks(*texts_and_folders) -> list[str]:
    """Where a planted value is."""
    found = []
    for place in texts_and_folders:
        files = [p for p in place.rglob("*") if p.is_file()] if isinstance(place, Path) else []
        assert files or isinstance(place, str)
        contents = [(str(p), p.read_bytes()) for p in files] or [(place, place.encode())]
        found += [f"{name}: {v}" for name, content in contents for v in VALUES if v.encode() in content]
    return found


def test_a_run_that_finds_no_server_writes_no_secret_down(planted, tmp_path):
    words = tiny("run", wandb="online", tensorboard=True, pruning_times=1, verbose=True)
    done = carried_out("main_imp_fillback", words, tmp_path, "online")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").iterdir()) and list((tmp_path / "run" / "tensorboard").iterdir())
    assert leaks(tmp_path / "run", done.stdout, done.stderr) == []


def with_environment(environment, carry_out, task):
    """A job has the sweep's environment, but not where it is forked from a server that was there before."""
    os.environ.update(environment)
    carry_out(task)


@pytest.mark.parametrize("arch", ["micro_cnn", pytest.param("res20s", marks=pytest.mark.slow)])
def test_a_sweep_writes_no_secret_down(arch, server, planted, tmp_path, monkeypatch, capfd):
    """In a process of its own, where only networks that the tests have not made are known; in this one, at every change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # executors change it
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"rate": None, "pruning_times": 1, "wandb": "offline", "tensorboard": True}
    words = [*flags(**{**(TINY if arch == "micro_cnn" else REAL), "arch": arch, **settings}), "--grid", "seed=0"]
    if arch == "micro_cnn":
        with monkeypatch.context() as patch:
            patch.setattr(job_process, "_child", partial(with_environment, dict(os.environ), small_job))
            assert sweep.main([*words, "--out", "s"]) == 0
        said = []
    else:
        done = carried_out("sweep", [*words, "--out", "s"], tmp_path, "offline")
        assert done.returncode == 0, done.stdout + done.stderr
        said = [done.stdout, done.stderr]
    assert sweep.main([*words, "--out", "slurm", "--executor", "slurm"]) == 0
    assert report.main(["s", "--latency", "false"]) == 0
    assert list(tmp_path.glob("s/logs/*.log")) and list(tmp_path.glob("s/runs/*/wandb/offline-run-*"))
    assert leaks(tmp_path / "s", tmp_path / "slurm", *said, *capfd.readouterr()) == []


def test_what_a_library_says_when_it_fails_is_redacted(planted, tmp_path, monkeypatch, capsys):
    def init(**kwargs):
        raise RuntimeError(" and ".join(["invalid API key", *VALUES]))

    fake_wandb(monkeypatch, init)
    assert main_imp_fillback.main(tiny(tmp_path / "run", wandb="online", pruning_times=1)) == 0
    out, err = capsys.readouterr()
    assert "WandB failed (invalid API key and ***" in err and "and ***" in (tmp_path / "run" / "log.txt").read_text()
    assert leaks(tmp_path / "run", out, err) == []


@pytest.mark.parametrize(
    "value", ["https://somebody:planted4url@host/x", "key-{WANDB_API_KEY}", "{DB_PASSWORD}", "s3://k:{HF_TOKEN}@b"]
)
def test_a_command_that_holds_a_secret_is_refused(value, planted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    value = value.format(**PLANTED)
    base = flags(**{**TINY, "rate": None})
    (tmp_path / "sweep.yaml").write_text(json.dumps({"flags": {"data": value}, "grid": {"seed": [0, 1]}}))
    (tmp_path / "list.yaml").write_text(json.dumps({"list": [{"dataset": "digits", "init": value}]}))
    commands = [
        *((main_imp_fillback, tiny("run", **{name: value})) for name in ("data", "init", "exp_name", "wandb_tags")),
        (main_imp_fillback, [*tiny("run"), f"--data={value}"]),
        (main_imp_fillback, [*tiny("run"), f"--daat={value}"]),
        (sweep, [*base, "--grid", "seed=0,1", "--data", value, "--out", "s"]),
        (sweep, [*base, "--grid", f"data={value}"]),
        (sweep, ["--file", "sweep.yaml", "--out", "s"]),
        (sweep, ["--file", "list.yaml"]),
        (sweep, ["--file", "sweep.yaml", "--executor", "slurm", "--out", "s"]),
        (report, [value]),
        (export, ["run", "--out", value]),
    ]
    for program, words in commands:
        assert program.main(words) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and "contains a password or an API key" in err and leaks(out or "-", err) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "list.yaml", "sweep.yaml"]


def test_ordinary_values_are_no_secrets(tmp_path):
    nothing = {"NETRC": str(tmp_path / "none")}
    ordinary = {
        "TOKENIZERS_PARALLELISM": "parallel1",
        "KEYBOARD": "qwertz-12345",
        "SORT_KEY": "accuracy",
        "SECRET_BACKEND": "kubernetes",
        "SSH_KEY": "/home/somebody/.ssh/id_rsa",
        "API_TOKEN_FILE": "./token-12345",
        "CACHE_KEY": "2024.10.01",
        "KEY": "a1b2c3",
        "PASSWORD": "short",
        "MONKEY": "a1b2c3d4e5",
        "LC_CREDENTIALS": str(tmp_path),
        "TOKEN_TYPE": "Bearer",
        "X_KEY": "key-value-store",
    }
    assert secrets_of(ordinary | nothing) == []
    secret = {
        "openai_api_key": "sk-abcDEF123",
        "MY_SECRET_2": "a1b2c3d4",
        "DB_PASSWD": "letters only",
        "APP_CREDENTIALS": "u:p4ssw0rd",
    }
    assert sorted(secrets_of(secret | nothing)) == sorted(secret.values())
    texts = [
        "http://127.0.0.1:8080/a@b",
        "ssh://git@host/x",
        "a: b@c",
        "vit_prune_target=head,mlp",
        "file.py:factory",
        "12:30 x@y",
    ]
    assert [redacted(text) for text in texts] == texts
    assert redacted("at https:/a:b1@c/d and ftp://:p@h") == "at https:/a:***@c/d and ftp://:***@h"


def test_the_longer_of_two_secrets_is_hidden_whole(monkeypatch):
    monkeypatch.setenv("A_KEY", "abc123def456")
    monkeypatch.setenv("B_KEY", "abc123def456ghi789")
    assert redacted("x abc123def456ghi789 y") == "x *** y"
