"""scripts/gpu_check.sh: its parts, their limits, what it says without a card, and the page that it makes of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from shutil import which

import pytest
from helpers.commands import ROOT

from benchmarks import gpu_summary

SCRIPT = ROOT / "scripts" / "gpu_check.sh"

# Stands in for Python: says how many cards there are, fails or sleeps where it is told to, and leaves the summary to
# the real one.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    *benchmarks.gpu_summary*) exec {python} "$@" ;;
    *device_count*) echo "$CARDS" ;;
    *"import pytest"*) exit "${{NO_PYTEST:-0}}" ;;
    *mem_get_info*) echo 1 ;;
    *export.py*) echo "about to fail"; exit 3 ;;
    *"res20s --struct rsst"*) exec sleep 30 ;;
    *) printf '%s\\n' "$*" ;;
esac
"""


SHORT = """#!/usr/bin/env bash
shift 3 # -k 10 LIMIT
exec {timeout} -k 1 2 "$@"
"""


@pytest.fixture
def check(tmp_path):
    """Run the script with stand-ins for Python and for `timeout`, which waits for 2 s.

    The call returns the finished process and the rows of the table of parts, by name.
    """
    tools = {"python": STAND_IN.format(python=sys.executable), "timeout": SHORT.format(timeout=which("timeout"))}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*words, **environment):
        env = {**os.environ, "PYTHON": str(tmp_path / "python"), "CARDS": "0", **environment}
        env["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", SCRIPT, "--out", tmp_path / "out", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
        file = tmp_path / "out" / "parts.tsv"
        lines = file.read_text().splitlines() if file.exists() else []
        return done, {line.split("\t")[0]: line.split("\t")[1:] for line in lines}

    return run


def test_without_a_card_its_parts_are_named_and_do_not_fail(check, tmp_path):
    done, table = check("--device", "cpu")
    without = {name for name, row in table.items() if row[0] == "no card"}
    assert without == {"eager", "recorded", "rest", "processes"}
    failed = {name: row[0] for name, row in table.items() if row[0] not in ("0", "no card")}
    assert failed == {"export": "3", "run_rsst_res20s": "124"}
    assert done.returncode == 1 and "failed: run_rsst_res20s, export" in done.stdout
    assert list(table)[-1] == "benchmarks", "what fails does not stop what follows"
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "## Log of export" in page and "    about to fail" in page and "out of time" in page
    assert "--device cpu" in table["run_rsst_vit_tiny"][-1] and "--jobs 1 2" in table["benchmarks"][-1]
    values = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {row["part"]: row["result"] for row in values["parts"]}["export"] == "FAILED (exit status 3)"


@pytest.mark.parametrize("cards, missing", [("1", {"processes"}), ("2", set())])
def test_with_a_card_all_parts_run_within_eight_minutes(check, cards, missing):
    done, table = check(CARDS=cards)
    assert {name for name, row in table.items() if "card" in row[0]} == missing
    in_turn = ("export", "processes", "benchmarks")
    at_once = {name: int(row[2]) for name, row in table.items() if name not in in_turn}
    assert len(at_once) == 8
    rest = sum(int(row[2]) for name, row in table.items() if name not in at_once)
    assert rest + max(at_once.values()) <= 480
    assert "-m cuda" in table["recorded"][-1] and "--device cuda" in table["benchmarks"][-1]
    assert "--mps" not in table["benchmarks"][-1] and done.returncode == 1
    assert "ok" in done.stdout


def test_networks_are_compiled_from_the_start_where_there_is_a_card(check, tmp_path):
    """One after another, beside the tests; what is found is kept where the benchmark looks for it."""
    check("--device", "cpu")
    assert not (tmp_path / "out" / "compile_ahead.log").exists()
    check(CARDS="1")
    lines = (tmp_path / "out" / "compile_ahead.log").read_text().splitlines()
    chosen = [re.search(r"--parts compiled .*--arch (\S+) --compiled (\S+)", line).groups() for line in lines]
    assert chosen == [(arch, whose) for arch in ("res20s", "vit_tiny") for whose in ("theirs", "all")]
    assert "TORCHINDUCTOR_CACHE_DIR=$out/compiled" in SCRIPT.read_text()


def test_mps_is_started_only_when_asked(check):
    _, table = check("--mps", CARDS="1")
    assert table["benchmarks"][-1].endswith("--jobs 1 8 --mps")


def test_without_pytest_the_rest_runs(check):
    _, table = check(CARDS="1", NO_PYTEST="1")
    assert {name for name, row in table.items() if row[0] == "no pytest"} == {"eager", "recorded", "rest"}
    assert table["benchmarks"][0] == "0"


def test_a_card_that_is_not_there_is_an_error(check):
    done, table = check()
    assert done.returncode == 2 and not table and "--device cpu" in done.stderr


def test_every_test_on_a_card_is_in_a_part():
    """The two words with which the script divides them leave none out, and take none twice."""
    text = SCRIPT.read_text()
    one, other = re.findall(r'test_on_cuda.py -k "(.*)"', text)
    assert other == " and ".join(f"not {word}" for word in one.split(" or "))


def test_rows_of_the_summary(tmp_path):
    (tmp_path / "parts.tsv").write_text("machine\t0\t1\t10\tdoctor\nsteps\t137\t9\t9\tbench\nrest\tno card\t0\t1\tx\n")
    (tmp_path / "steps.json").write_text(json.dumps({"machine": "a card", "parts": {"steps": [{"images/s": 5}]}}))
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    head = "round,density,val_accuracy,test_accuracy,hardened_test_accuracy,squeeze_ratio,kept_units"
    (folder / "summary.csv").write_text(f'{head}\n0,100,50.123,49,,,"{{""a"": [1, 2]}}"\n1,60.5,51,48.5,48,0.01,x\n')
    page, values = gpu_summary.summary(tmp_path)
    assert [row["result"] for row in values["parts"]] == ["ok", "out of time", "no card"]
    assert values["runs"] == [
        {"run": "one", "rounds": 2, "density": "60.50", "val_accuracy": "51.00", "test_accuracy": "48.50"}
        | {"hardened_test_accuracy": "48.00", "squeeze_ratio": "0.01"}
    ]
    assert "a card" in page and "## steps" in page and "| images/s |" in page and "## Log of steps" in page
