"""`structured-tickets doctor`: what it finds, what it says is missing, and that it works where nothing else does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch
from helpers.commands import ROOT

from structured_tickets import __version__
from structured_tickets.networks.precision import choose_precision, name_of
from structured_tickets.programs import doctor
from structured_tickets.runs import setup
from structured_tickets.runs.setup import choose_device


def told(capsys, *words):
    """Exit status, output and the lines on the error stream."""
    capsys.readouterr()
    status = doctor.main(list(words))
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


def test_a_sound_machine_is_ready(capsys):
    status, out, err = told(capsys)
    assert (status, err) == (0, []) and out.splitlines()[-1] == "ready: nothing that is needed is missing"
    assert __version__ in out and sys.executable in out and f"torch {torch.__version__.partition('+')[0]}" in out
    native = choose_precision("auto", choose_device(0)) == torch.bfloat16
    assert ("bfloat16    native" if native else "bfloat16    not native") in re.sub(r"(?<=bfloat16) +", "    ", out)
    assert max(map(len, out.splitlines())) < 200, "a line holds no more than one can read"


def test_machines_read_the_same(capsys):
    status, out, _ = told(capsys, "--json", "--data", "/nowhere")
    found = json.loads(out)
    assert status == 0 and found["problems"] == []
    device = choose_device(0)
    assert found["computing"]["device"] == str(device)
    assert found["computing"]["precision"] == name_of(choose_precision("auto", device))
    assert found["computing"]["threads"] == torch.get_num_threads()
    assert found["structured-tickets"]["version"] == __version__
    assert found["needed"]["torch"]["version"] == torch.__version__.partition("+")[0]
    assert found["machine"]["memory_bytes"] > found["machine"]["free_memory_bytes"] > 0
    assert found["folders"]["images"] == {"path": "/nowhere", "exists": False, "writable": False, "free_bytes": None}


def test_what_is_needed_is_what_gets_installed():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    assert [f"{name}>={oldest}" for name, oldest in doctor.needed().items()] == lines


def test_an_installed_package_asks_its_metadata_what_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKOUT", None)
    lines = ["torch>=2.6", "PyYAML>=6.0", 'ray>=2.40; extra == "ray"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines if name == "structured-tickets" else None)
    assert doctor.needed() == {"torch": "2.6", "PyYAML": "6.0"}

    def unknown(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", unknown)
    status, out, err = told(capsys)
    assert (status, out, len(err)) == (1, "", 1) and "never installed" in err[0]


def test_optional_parts_are_the_extras():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {k: [re.split("[>=]", line)[0] for line in v] for k, v in project["optional-dependencies"].items()}
    del extras["dev"]
    assert extras == {extra: list(part.packages) for extra, part in doctor.OPTIONAL.items()}


def test_an_optional_part_that_is_missing_is_no_error(monkeypatch, capsys):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in ("ray", "onnxscript") else real(name))
    monkeypatch.setattr(doctor, "has_cpp_compiler", lambda: False)
    status, out, _ = told(capsys)
    assert status == 0
    (ray,) = [line for line in out.splitlines() if line.startswith("  ray ")]
    assert "sweep --executor ray" in ray and ray.endswith("missing: pip install ray")
    (onnx,) = [line for line in out.splitlines() if line.startswith("  onnx ")]
    assert "onnxruntime 1" in onnx and onnx.endswith("missing: pip install onnxscript")
    assert "missing: install g++ or clang++" in out


def test_what_is_missing_too_old_or_broken_is_named_in_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    needed = {"no_such_package": "1.0", "numpy": "99.1", "torch": "2.6", "broken_package": "3"}
    monkeypatch.setattr(doctor, "needed", lambda: needed)
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: "3.1" if name == "broken_package" else real(name))
    status, out, err = told(capsys)
    assert status == 1 and "ready" not in out and "unknown until the packages below are sound" in out
    assert err == [
        f"error: missing or broken: no_such_package (not installed), numpy ({real('numpy')} is older than 99.1), "
        "broken_package (cannot be imported: libcudart.so: cannot open). To install what is needed: "
        "pip install 'no_such_package>=1.0' 'numpy>=99.1' 'broken_package>=3'"
    ]
    status, out, again = told(capsys, "--json")
    assert status == 1 and again == err and len(json.loads(out)["problems"]) == 3


def test_a_run_can_do_without_wandb(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "wandb" else "99.1")
    status, out, err = told(capsys)
    assert status == 0 and not err and "wandb (not installed: results are saved locally only)" in out
    assert out.rstrip().endswith("ready: nothing that is needed is missing") and "bfloat16" in out


@pytest.mark.parametrize(
    "version, oldest, fits",
    [("2.14.1", "2.6", True), ("2.6.0a0+git1", "2.6", True), ("2.5.9", "2.6", False), ("0.10", "0.9", True)],
)
def test_versions_are_compared_as_numbers(version, oldest, fits, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: version)
    assert (doctor._looked_at("numpy", oldest)["problem"] == "") == fits


def test_a_device_that_cannot_compute_is_an_error(monkeypatch, capsys):
    def found(gpu):
        warnings.warn("the driver is too old\n(found version 1)", stacklevel=1)
        return torch.device("meta")  # computes nothing, as a GPU for which torch has no kernels

    monkeypatch.setattr(setup, "choose_device", found)
    status, out, err = told(capsys)
    assert status == 1 and len(err) == 1 and err[0].startswith("error: missing or broken: meta (")
    assert "the driver is too old" in out and "pip install" not in err[0]


def test_folders_are_tried_and_left_as_they_were(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    _, out, _ = told(capsys, "--data", "photos")
    assert "decoded images are kept in .decoded" in out and "runs are written here" in out
    assert [p.name for p in tmp_path.rglob("*")] == ["photos"]

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    status, out, _ = told(capsys, "--data", "photos")
    assert status == 0 and "decoded images are not kept" in out and "give --save_dir" in out


def test_no_environment_variable_is_shown(monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "HOME_TOKEN", "CXX", "CUDA_VISIBLE_DEVICES_OLD"):
        monkeypatch.setenv(name, f"value-of-{name}-0123456789")
    for words in ([], ["--json"]):
        _, out, err = told(capsys, *words)
        assert "value-of" not in out and not err
    assert doctor.main(["--data", "value-of-WANDB_API_KEY-0123456789"]) == 2


@pytest.mark.parametrize("words", [["--jsno"], ["more"], ["--data"]])
def test_a_wrong_command_is_one_line(words, capsys):
    status, out, err = told(capsys, *words)
    assert (status, out, len(err)) == (2, "", 1)


def test_without_a_single_package_it_says_what_to_install():
    """Python's own modules alone: -S leaves site-packages out."""
    command = [sys.executable, "-S", "-m", "structured_tickets", "doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Python" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: missing or broken: torch (not installed), torchvision (not installed)")
    assert "pip install 'torch>=2.6' 'torchvision>=0.21'" in line
