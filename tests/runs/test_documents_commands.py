"""Every command, flag, default and file of the original documents, read from them: it works, or a departure is noted."""

from __future__ import annotations

import re
import subprocess

import pytest
from helpers.commands import ROOT, flags, run
from helpers.custom_model import CUSTOM_MODEL
from helpers.images import few_images

from structured_tickets.runs.read import read_result
from structured_tickets.settings.flag_table import FLAGS
from structured_tickets.settings.flags import parse_args

DOCUMENTS = ROOT.parent / "shared" / "documents"
TEXTS = {path.name: path.read_text() for path in sorted(DOCUMENTS.glob("00*.md"))}
pytestmark = pytest.mark.skipif(not TEXTS, reason="the documents lie beside the checkout, not in it")

# In place of programs: the words of each command, one after the other.
WORDS = r"python() { printf '%s\n' " + '"$@"' + r"; printf '%s\n' ----; }"
MAIN = "main_imp_fillback.py"
BUDGET = {
    "dataset": "micro_digits",
    "image_size": 8,
    "epochs": 1,
    "pruning_times": 2,
    "batch_size": 16,
    "warmup": 0,
    "decreasing_lr": 1,
    "criteria_batches": 1,
    "wandb": "disabled",
    "keep_checkpoints": 1,
}
SIZES = {"vgg16_bn": 32}  # pixels at least


def shell_blocks(text):
    """Its blocks of shell, without comments and abbreviations."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines = [re.sub(r"\s+#.*|^#.*", "", line) for line in block.splitlines()]
        yield "\n".join(line.replace(" ...", "") for line in lines)


def commands_of(text):
    """The words of its commands; loops run, and flags that stand alone belong to the document's first long command."""
    found: list[list[str]] = []
    for block in shell_blocks(text):
        script = block if not block.startswith("--") else f"python {MAIN} --alone {block}"
        words = ["bash", "-c", f"{WORDS}\nPATH=\n{script}"]
        said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
        found += [part.split("\n")[:-1] for part in said.split("----\n") if part]
    runs = [words[1:] for words in found if words[0] == MAIN]
    longest = next((words for words in runs if len(words) > 12), [])
    return [[*longest, *words[1:]] if words[:1] == ["--alone"] else words for words in runs]


COMMANDS = [words for text in TEXTS.values() for words in commands_of(text)]
TOGETHER = {" ".join(words): words for words in COMMANDS}  # some stand in two places
OFTEN = 6  # every so many of them is run at every change


def test_the_commands_are_found():
    named = {words[words.index("--exp_name") + 1] for words in COMMANDS if "--exp_name" in words}
    assert len(COMMANDS) == 29 and len(named) == 13
    assert {"vit_rsst_head30_test", "vit_head30_saliency", "vit_head_rate0.5"} <= named
    assert ["--arch", "my_model", "--dataset", "cifar100"] in COMMANDS


@pytest.fixture
def with_my_model(tmp_path, monkeypatch):
    """A working directory with the file of document 004, section 2.4."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "my_model.py").write_text(CUSTOM_MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", TOGETHER.values(), ids=range(len(TOGETHER)))
def test_every_command_is_understood_and_reads_all_its_flags(words, with_my_model):
    args = parse_args(words)
    said = [text for text in args.warnings if "has no effect in this run" in text]
    if args.vit_prune_target == "head" and "--mlp_prune_ratio" in words:  # of the command that a line alone changes
        said = [text for text in said if not text.startswith("--mlp_prune_ratio")]
    assert not said


@pytest.mark.parametrize(
    "words",
    [pytest.param(w, marks=[pytest.mark.slow] * (k % OFTEN > 0)) for k, w in enumerate(TOGETHER.values())],
    ids=range(len(TOGETHER)),
)
def test_every_command_runs(words, with_my_model, monkeypatch):
    few_images(monkeypatch)
    arch = parse_args(words).arch
    budget = {**BUDGET, "image_size": SIZES.get(arch, BUDGET["image_size"]), "save_dir": with_my_model / "run"}
    assert run(*words, *flags(**budget)) == 0
    assert read_result(with_my_model / "run")["rounds"] == 2


def test_every_flag_is_one():
    for name, text in TEXTS.items():
        for flag in re.findall(r"--([A-Za-z]\w+)", text):
            assert flag in FLAGS, f"{name} names --{flag}"


def test_every_default_of_document_004_is_the_programs():
    rows = re.findall(r"^\| `--(\w+)` \| (\S+) \|", TEXTS["004.md"], re.MULTILINE)
    assert len(rows) == 15
    slips = {"batch_size": 128}  # document 004 says 3128, its commands 128
    for flag, said in rows:
        expected = slips.get(flag, said.strip("'"))
        assert str(FLAGS[flag].parsed_default) in (str(expected), f"{expected}.0"), flag


def test_every_file_that_the_documents_name_is_there_or_a_departure_says_where():
    departures = (ROOT / "docs" / "deviations.md").read_text()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name, text in TEXTS.items():
        for file in re.findall(r"\w[\w/]*\.(?:py|sh|md)\b", text):
            there = file in tracked or any(path.endswith(f"/{file}") for path in tracked)
            assert there or f"`{file}`" in departures, f"{name} names {file}"
