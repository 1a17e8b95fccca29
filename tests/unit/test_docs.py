"""What the documentation says of the tests is there."""

from __future__ import annotations

import re

import pytest
from helpers.commands import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}
NAMES = {name for text in SOURCES.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
FILES = {str(path.relative_to(ROOT)) for path in SOURCES}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document):
    for word, dots in re.findall(r"(?<![\w/.])(test_\w+)(?!\w*\.\w)(\.\.\.)?", document.read_text()):
        found = any(name.startswith(word) for name in NAMES) if dots else word in NAMES
        assert found or f"{word}.py" in {name.rpartition("/")[2] for name in FILES}, f"{document.name} names {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_of_tests_that_a_document_names_exists(document):
    for word in re.findall(r"tests/[\w/]+\.py", document.read_text()):
        assert word in FILES, f"{document.name} names {word}"


def test_names_of_tests_are_found():
    assert len(NAMES) > 500


def test_the_worked_example_is_the_quick_start():
    """One command in two files."""
    script = (ROOT / "scripts" / "quickstart.sh").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^exec \S+python (main_imp_fillback.py .*) \"\$@\"$", script, re.MULTILINE)
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text().replace("\\\n", ""))
    assert f"python {' '.join(command.split())} " in readme
