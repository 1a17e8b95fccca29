"""Messages, help texts and documents in plain words: one format of numbers, right plurals, one word for one thing."""

from __future__ import annotations

import re

import pytest
from helpers.commands import ROOT
from helpers.pages import page
from helpers.words import NUMBER, docstrings, faults_of_message, faults_of_numbers, messages, prose, replaced_words

from structured_tickets.base.text_tables import counted

MODULES = sorted([*(ROOT / "structured_tickets").rglob("*.py"), *ROOT.glob("*.py")])
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
GENERATED = ("cookbook.md", "zoo.md")  # made by programs, with what these print

# Module -> parts of its texts that may be as they are: words of others (the original documents, torch), and texts that
# wait for other changes of their modules.
KEPT = {
    "pruning_utils.py": ("remain weight",),  # the documents' line
    "structured_tickets/features/tables.py": ("squeeze",),  # torch's operation
    "structured_tickets/sweeps/slurm.py": ("last=$((SLURM_ARRAY_TASK_ID",),  # a shell script
}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_messages_are_in_plain_words(module):
    kept = KEPT.get(str(module.relative_to(ROOT)), ())
    texts = [(line, text) for line, text in messages(module.read_text()) if not any(part in text for part in kept)]
    found = {f"line {line}: {text}": faults for line, text in texts if (faults := faults_of_message(text))}
    assert found == {}


def starts_with_a_question(text: str) -> bool:
    """True of a docstring whose first line names no result, but asks for one."""
    return re.match(r"(?:What|Whether|How|Which|Where|Who\w*|Of|Else)\b", text) is not None


def test_docstrings_begin_with_a_verb_or_a_noun():
    texts = {f"{m}:{n}": text for m in MODULES for n, text in docstrings(m.read_text())}
    assert len(texts) > 500
    assert [f"{place}: {text}" for place, text in texts.items() if starts_with_a_question(text)] == []
    ((_, text),) = docstrings('def f():\n    """Whether it is so."""')
    assert starts_with_a_question(text) and not starts_with_a_question("Return whether it is so.")


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_documents_are_in_plain_words(document):
    lines = [] if document.name in GENERATED else prose(document).splitlines()
    found = {line: faults for line in lines if (faults := [*faults_of_numbers(line), *replaced_words(line)])}
    assert found == {}


def test_most_messages_are_read():
    """The tests above would pass if none were."""
    counts = [len(list(messages(module.read_text()))) for module in MODULES]
    assert sum(counts) > 1000 and sum(map(bool, counts)) > 100


FAULTY = {
    'log.info("%d epochs done", n)': "counted",
    'log.info(f"{args.epochs} epochs done")': "counted",
    'raise DataError(f"{len(files)} file(s) are missing")': "plural in brackets",
    'log.info("1 rounds left")': "plural after 1",
    'log.info("%.1f %% of the parameters", share)': "write 83.5%",
    'log.info(f"{share:.1f} % of the parameters")': "write 83.5%",
    'log.info("1.2k images read")': "write 1,200",
    'log.info(f"{macs:.1f}M MACs read")': "write 4.1 M",
    'log.info(f"{mean:.1f} +- {deviation:.1f} points")': "write ±",
    'raise RunError("this; that; and the other")': "semicolon",
    'raise RunError("stopped; the same command continues")': "run the same command again",
    'parser.add_argument("--x", help="--gpu is not read here")': "ignored",
}

RIGHT = (
    'log.info("finished %s", counted(n, "round"))',
    'log.info(f"{share:.1%} of the parameters, {macs / 1e6:,.1f} M MACs")',
    'log.info("epoch %d of %d", epoch, epochs)',
    'parser.add_argument("--x", help="what to do; a: this; b: that; c: the other")',
    'def f():\n    """Goes on where it was broken off; 1 rounds; 5 %."""',
    'raise DataError(f"{part} images of class {name} look different")',
)


@pytest.mark.parametrize("code", FAULTY)
def test_a_fault_of_a_message_is_found(code):
    (said,) = [fault for _, text in messages(code) for fault in faults_of_message(text)]
    assert FAULTY[code] in said


@pytest.mark.parametrize("code", RIGHT)
def test_a_right_message_has_none(code):
    assert [fault for _, text in messages(code) for fault in faults_of_message(text)] == []


@pytest.mark.parametrize("noun", ["epoch", "class", "process", "batch", "run", "CUDA device"])
def test_counted_things_have_the_plural_that_they_need(noun):
    plural = {"class": "classes", "process": "processes", "batch": "batches"}.get(noun, f"{noun}s")
    assert [counted(n, noun) for n in (0, 1, 1000)] == [f"0 {plural}", f"1 {noun}", f"1,000 {plural}"]


def test_values_in_a_message_are_told_from_its_words():
    ((_, text),) = messages('f"{count:,} of {name}: {share:.0%} at %d"')
    assert text == f"{NUMBER} of …: {NUMBER}% at {NUMBER}"


def test_blocks_of_code_in_a_document_are_passed_over(tmp_path):
    (tmp_path / "page.md").write_text("Half of it, 50 %.\n\n    95 % |####|\n\n```\n1 epochs\n```\nThe run goes on.\n")
    text = prose(tmp_path / "page.md")
    assert [*faults_of_numbers(text), *replaced_words(text)] == ["'0 %': `83.5 %`: write 83.5%", "'goes on': continue"]


TERMS = (
    "unit, structured, element-wise, round, dense network, kept, pruned, L1 mask, structure, regroup, criterion, rate, "
    "density, rewind, ticket, final network, Refill, RSST, penalty, lambda, doomed, dead, faded out, doomed left, "
    "hardened, control, initial weights, held at zero, removed, setting"
)


def test_the_glossary_explains_the_projects_own_words():
    terms = " ".join(row[0] for row in page(ROOT / "docs" / "glossary.md").rows())
    for word in TERMS.split(", "):
        assert re.search(rf"\b{word}\b", terms), word
