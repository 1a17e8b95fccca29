"""The installed package, away from the checkout: what the wheel holds, and its commands in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.commands import ROOT, flags

from structured_tickets import __version__
from structured_tickets.base.environment import PROGRAM

pytestmark = pytest.mark.timeout(600)

SETTINGS = {
    "dataset": "digits",
    "image_size": 8,
    "arch": "small_cnn.py:small_cnn",
    "rate": 0.4,
    "epochs": 1,
    "warmup": 0,
    "decreasing_lr": 1,
    "pruning_times": 2,
    "batch_size": 256,
    "criteria_batches": 1,
    "wandb": "disabled",
}
HOOK = "import sys, setuptools.build_meta as hooks; print(getattr(hooks, sys.argv[1])(sys.argv[2]))"


def sources(target: Path) -> Path:
    """A copy of what packages are built from: building leaves folders where it is done, and finds older ones there."""
    target.mkdir()
    for entry in ROOT.iterdir():
        if entry.is_file() and not entry.name.startswith("."):
            shutil.copy(entry, target)
        elif (entry / "__init__.py").exists() or entry.name in ("examples", "benchmarks"):
            shutil.copytree(entry, target / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def built(hook: str, source: Path, out: Path) -> Path:
    """What a build front end makes of the sources, with the setuptools that is here: nothing is fetched."""
    words = [sys.executable, "-c", HOOK, hook, str(out)]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    return built("build_wheel", sources(place / "source"), place)


class Installed:
    """An environment with the wheel alone, which borrows all other packages of this one, and an empty folder to work in.

    Attributes:
        bin: The environment's commands.
        here: The folder; it lies in somebody else's git repository.
    """

    def __init__(self, wheel: Path, place: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "env"], check=True)
        self.bin, self.here = place / "env" / "bin", place / "here"
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
        (packages,) = (place / "env" / "lib").glob("python*/site-packages")
        borrowed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
        (packages / "borrowed.pth").write_text("\n".join(borrowed))
        subprocess.run(["git", "init", "-q", place], check=True)
        somebody = ["-c", "user.name=a", "-c", "user.email=a"]
        subprocess.run(["git", *somebody, "commit", "-q", "--allow-empty", "-m", "a"], cwd=place, check=True)
        self.here.mkdir()
        shutil.copy(ROOT / "tests" / "helpers" / "small_cnn.py", self.here)

    def __call__(self, *words, status=0) -> SimpleNamespace:
        """Run one of the environment's commands in the folder."""
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [self.bin / words[0], *map(str, words[1:])]
        done = subprocess.run(command, cwd=self.here, env=env, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == status, done.stderr
        return done


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    found = contents(wheel)
    info = f"structured_tickets-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in found} == {"structured_tickets", info}
    package = {p for p in (ROOT / "structured_tickets").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {n for n in found if not n.startswith(info)} == {str(p.relative_to(ROOT)) for p in package}
    assert found[f"{info}/top_level.txt"].split() == [b"structured_tickets"]
    metadata = found[f"{info}/METADATA"].decode()
    assert re.findall(r"^Requires-Python: (.*)$", metadata, re.MULTILINE) == [">=3.10"]
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    listed = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    assert sorted(needed) == sorted(listed)
    extras = set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE))
    assert extras == {"onnx", "ray", "search", "tensorboard", "hf", "dev"}


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    archive = built("build_sdist", sources(tmp_path / "source"), tmp_path)
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert contents(built("build_wheel", source, tmp_path)) == contents(wheel)


def test_the_command_answers(installed):
    assert installed("structured-tickets", "--version").stdout == f"structured-tickets {__version__}\n"
    named = installed("python", "-m", "structured_tickets", "--help").stdout
    assert all(f"  {name} " in named for name in ("run", "sweep", "report", "export", "doctor"))
    assert installed("structured-tickets", "run", "--help").stdout.startswith("usage: structured-tickets run ")
    wrong = installed("structured-tickets", "exprot", status=2)
    assert wrong.stdout == "" and wrong.stderr.endswith("(did you mean export?)\n") and wrong.stderr.count("\n") == 1
    assert installed("structured-tickets", status=2).stderr.startswith("usage: structured-tickets ")


# Several programs in one process: importing torch takes longer than all that they do.
ONE_AFTER_ANOTHER = """
import json, sys
from structured_tickets.__main__ import main
for words in json.loads(sys.argv[1]):
    if main(words):
        sys.exit(f"{words[0]} failed")
places = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
print(json.dumps({"path": sys.path, "modules": {k: v for k, v in places.items() if v}}))
"""


def test_the_programs_run_away_from_the_checkout(installed):
    run = flags(**SETTINGS, save_dir="tiny")
    words = [["run", *run, "--quiet"], ["report", "tiny", "--quiet", "--latency=false"], ["export", "tiny", "--quiet"]]
    words = [[*each, *(["--arch", SETTINGS["arch"]] if each[0] == "export" else [])] for each in words]
    done = installed("python", "-c", ONE_AFTER_ANOTHER, json.dumps([*words, ["doctor"]]))
    out = done.stdout.splitlines()
    seen = json.loads(out[-1])
    tiny = installed.here / "tiny"
    assert (tiny / "report" / "index.html").stat().st_size > 10_000 and "tiny/report/index.html" in out
    assert (tiny / "export" / "round_1" / "model.safetensors").is_file()
    noted = json.loads((tiny / "env.json").read_text())
    assert noted["command"] == ["-m", "structured_tickets", "run", *run, "--quiet"]
    assert noted["commit"] is None and noted["packages"]["structured-tickets"] == __version__
    assert "ready: nothing that is needed is missing" in out and str(installed.bin.parent) in done.stdout
    borrowed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    places = [*seen["path"], *seen["modules"].values()]
    ours = [p for p in places if Path(p).is_relative_to(ROOT) and not any(Path(p).is_relative_to(b) for b in borrowed)]
    assert ours == [] and "main_imp_fillback" not in seen["modules"]
    package = [p for name, p in seen["modules"].items() if name.partition(".")[0] == "structured_tickets"]
    assert len(package) > 50 and all(Path(p).is_relative_to(installed.bin.parent) for p in package)


def test_it_is_the_same_program(installed):
    code = "from structured_tickets.base.environment import PROGRAM; print(PROGRAM)"
    assert installed("python", "-c", code).stdout.strip() == PROGRAM


@pytest.mark.slow
def test_each_command_runs_by_itself_and_the_next_one_is_named(installed):
    run = flags(**SETTINGS, save_dir="alone")
    assert "hard test" in installed("structured-tickets", "run", *run).stdout
    assert "finished" in installed("python", "-m", "structured_tickets", "run", *run).stderr
    page = installed("structured-tickets", "report", "alone", "--quiet").stdout.strip()
    assert "python -m structured_tickets run --dataset digits" in (installed.here / page).read_text()
    written = installed("structured-tickets", "export", "alone", "--arch", SETTINGS["arch"], "--onnx")
    assert (installed.here / "alone" / "export" / "round_1" / "model.onnx").is_file(), written.stderr
    doctor = json.loads(installed("structured-tickets", "doctor", "--json").stdout)
    assert doctor["structured-tickets"]["commit"] is None and doctor["problems"] == []
    assert Path(doctor["structured-tickets"]["folder"]).is_relative_to(installed.bin.parent)


DECOY = "raise SystemExit('a checkout in the working directory is not what runs')\n"


@pytest.mark.slow
def test_a_sweep_runs_the_installed_program_whatever_lies_in_the_working_directory(installed):
    decoy = installed.here / "structured_tickets"
    decoy.mkdir()
    if sys.version_info >= (3, 11):  # an older Python cannot be told to leave the working directory alone
        (decoy / "__init__.py").write_text(DECOY)
    try:
        words = ["--grid", "struct=rsst,refill", "--out", "swept", "--jobs", "2", *flags(**SETTINGS)]
        done = installed("structured-tickets", "sweep", *words)
    finally:
        shutil.rmtree(decoy)
    hint = done.stdout.strip().splitlines()[-1]
    assert hint == f"report: {installed.bin / 'structured-tickets'} report swept"
    for folder in (installed.here / "swept" / "runs").iterdir():
        assert json.loads((folder / "env.json").read_text())["command"][:3] == ["-m", "structured_tickets", "run"]
    assert len(list((installed.here / "swept" / "runs").iterdir())) == 2
    shown = subprocess.run(
        hint.removeprefix("report: "), shell=True, cwd=installed.here, capture_output=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    page = (installed.here / "swept" / "report" / "index.html").read_text()
    assert "python -m structured_tickets sweep --grid struct=rsst,refill" in page


@pytest.mark.slow
def test_scripts_for_slurm_run_the_installed_program(installed):
    words = ["--grid", "seed=0", "--out", "queued", "--executor", "slurm", *flags(**SETTINGS)]
    installed("structured-tickets", "sweep", *words)
    (commands,) = (installed.here / "queued" / "slurm").glob("*.jobs")
    (line,) = commands.read_text().splitlines()
    assert line.startswith(f"{installed.bin / 'python'} -m structured_tickets run --")
    done = subprocess.run(line, shell=True, cwd=installed.here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((installed.here / "queued").glob("runs/*/result.json"))) == 1
