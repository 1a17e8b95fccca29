"""What the documentation names is there: tests, files, places in pages, commands, flags, papers, versions."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import ROOT
from helpers.pages import page

import structured_tickets
from structured_tickets.settings.flags import build_parser, parse_args

README, CHINESE, CONTRIBUTING = ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md"
DOCUMENTS = [README, CHINESE, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}
NAMES = {name for text in SOURCES.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
FILES = {str(path.relative_to(ROOT)) for path in SOURCES}

COLUMNS = {"test_accuracy", "test_at_best_val"}  # of summary.csv, which are no tests

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@each_document
def test_every_test_that_a_document_names_exists(document):
    for word, dots in re.findall(r"(?<![\w/.])(test_\w+)(?!\w*\.\w)(\.\.\.)?", document.read_text()):
        found = any(name.startswith(word) for name in NAMES) if dots else word in NAMES | COLUMNS
        assert found or f"{word}.py" in {name.rpartition("/")[2] for name in FILES}, f"{document.name} names {word}"


@each_document
def test_every_file_of_tests_that_a_document_names_exists(document):
    for word in re.findall(r"tests/[\w/]+\.py", document.read_text()):
        assert word in FILES, f"{document.name} names {word}"


def test_names_of_tests_are_found():
    assert len(NAMES) > 500


@each_document
def test_every_link_leads_to_a_file_and_a_place_in_it(document):
    for link in page(document).links():
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in page(target).anchors(), f"{document.name} links to {link}"


def test_links_and_places_are_found():
    """The test above would pass if none were."""
    assert len(page(README).links()) > 20
    assert {"how-a-run-prunes---struct", "controls---control"} <= page(ROOT / "docs" / "methods.md").anchors()
    assert "自己的数据与模型" in page(CHINESE).anchors()


def test_the_figure_of_lambda_shows_the_schedules_of_today():
    from benchmarks.schedules import figure

    assert (ROOT / "docs" / "schedules.svg").read_text() == figure() + "\n"


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 170


def without_comments(path: Path) -> list[str]:
    """The blocks of code of a page; comments are in its language."""
    return [re.sub(r"[ \t]+# .*$", "", block, flags=re.MULTILINE) for block in page(path).blocks]


def test_the_chinese_readme_has_the_same_commands():
    assert without_comments(CHINESE) == without_comments(README)


def test_the_worked_example_is_the_quick_start():
    """One command in two files."""
    script = (ROOT / "scripts" / "quickstart.sh").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^exec \S+python (main_imp_fillback.py .*) \"\$@\"$", script, re.MULTILINE)
    readme = re.sub(r"\s+", " ", README.read_text().replace("\\\n", ""))
    assert f"python {' '.join(command.split())} " in readme


def runner_commands(path: Path) -> list[list[str]]:
    """The flags of every command of the runner that a page writes out; of a shell's loop the first line only."""
    lines = "\n".join(page(path).blocks).replace("\\\n", " ").splitlines()
    found = [shlex.split(line)[2:] for line in lines if line.startswith("python main_imp_fillback.py ")]
    return [words for words in found if "..." not in words]


@each_document
def test_every_command_of_the_runner_is_one(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # a page's commands before have written it
    monkeypatch.setattr("structured_tickets.settings.flags.words_from", lambda file: [])
    for words in runner_commands(document):
        parse_args(words)


def test_commands_of_the_runner_are_found():
    assert len(runner_commands(README)) == 2
    assert len(runner_commands(ROOT / "docs" / "original_commands.md")) > 20


def default_in_words(value: object) -> str | None:
    """A default as docs/usage.md writes it; None where it may say anything."""
    if value is None or value == () or value is False:
        return None
    if isinstance(value, bool):
        return "true"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_the_page_of_flags_has_each_flag_with_its_default():
    said = {row[0].strip("`"): row[1] for row in page(ROOT / "docs" / "usage.md").rows() if row[0].startswith("`--")}
    flags = {action.option_strings[-1]: action.default for action in build_parser()._actions if action.dest != "help"}
    assert said.keys() == flags.keys()
    for flag, default in flags.items():
        words = default_in_words(default)
        assert words is None or said[flag].startswith(f"`{words}`"), f"{flag}: {said[flag]!r} is {words}"


def test_what_can_be_added_is_where_the_table_says():
    rows = page(CONTRIBUTING).section("Where to add things").rows()
    assert len(rows) > 10
    for thing, place in rows:
        words = [word.strip("@") for word in re.findall(r"`([^`]+)`", place) if "<" not in word]
        paths = [place_of(word) for word in words if "/" in word]
        assert paths, thing
        texts = "\n".join(
            file.read_text() for path in paths for file in ([path] if path.is_file() else path.glob("*.py"))
        )
        for name in {name for word in words if "/" not in word for name in word.split(".")}:
            assert re.search(rf"\b{name}\b", texts), f"{thing}: {name} is not there"


def place_of(name: str) -> Path:
    """A file or folder that CONTRIBUTING.md names, in the package or beside it."""
    found = [path for path in (ROOT / "structured_tickets" / name, ROOT / name) if path.exists()]
    assert found, f"{name} does not exist"
    return found[0]


def file_tree() -> dict[str, str]:
    """The file tree of CONTRIBUTING.md: path -> comment."""
    (block,) = page(CONTRIBUTING).section("The file tree").blocks
    found, folder = {}, ""
    for indent, names, comment in re.findall(r"^( *)(\S.*?) {2,}(.+)$", block, re.MULTILINE):
        folder = folder if indent else names
        found |= {(folder if indent else "") + name.rstrip("/"): comment for name in names.split(", ")}
    return found


def test_the_file_tree_is_that_of_the_repository():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in tracked}
    rooms = {"/".join(n.split("/")[:2]) for n in tracked if n.startswith("structured_tickets/") and n.count("/") > 1}
    assert set(file_tree()) == top | rooms


def test_the_hooks_before_a_commit_are_the_checks_of_the_test_command():
    script = (ROOT / "scripts" / "test.sh").read_text()
    ((repository,),) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text()).values()
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert repository["repo"] == "local" and {hook["language"] for hook in repository["hooks"]} == {"system"}
    assert entries == re.findall(r"^(\.venv/bin/(?:ruff|mypy)[\w .-]*?)(?: >.*)?$", script, re.MULTILINE)


CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_papers_of_the_methods_are_cited():
    named = set(re.findall(r"([A-Z]\w+) (?:et al\.|and [A-Z]\w+) (\d{4})", (ROOT / "docs" / "methods.md").read_text()))
    cited = {(paper["authors"][0]["family-names"], str(paper["year"])) for paper in CITATION["references"]}
    assert len(named) > 10
    assert cited == named


def test_there_is_one_version():
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert structured_tickets.__version__ == CITATION["version"] == newest


def test_the_python_of_the_readme_makes_a_smaller_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in page(README).blocks if "import structured_tickets" in block]
    images = torch.rand(2, 3, 224, 224)
    names = {"loader": [(images, torch.tensor([0, 1]))], "epochs": 1}
    exec(block, names)
    model, small = names["model"].eval(), names["small"].eval()
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        wanted = structured_tickets.shrink(model, names["masks"])(images)
        assert torch.allclose(small(images), wanted, atol=1e-5)
