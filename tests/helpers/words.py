"""What is wrong with the words of a message or a document: the commonest faults, each found by a pattern."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

NUMBER, TEXT = "█", "…"  # what stands for a value that is put into a message

NOUN = (
    "batch|block|byte|channel|checkpoint|class|combination|core|device|epoch|file|folder|group|head|image|job|label|"
    "layer|line|minute|network|neuron|parameter|process|round|row|run|second|seed|setting|step|thread|unit|value|"
    "weight"
)
PLURAL = rf"(?:(?!in |of |and )[a-z-]+ )?(?:{NOUN})e?s\b(?![/'])"
COUNTS = rf"count|number|(?:\w+_)?(?:{NOUN})e?s"  # names of values that are numbers of something

# The word -> what to write instead. Where the words come from: docs/glossary.md, and the rules for messages.
REPLACED = {
    r"same command continues": "run the same command again to continue",
    r"(?:goes|go|going|went) on(?! to )": "continue",
    r"broken off": "interrupted",
    r"(?:taken|taking) up": "continued, or reused",
    r"(?:begun|begins|begin|beginning) again": "restarted",
    r"(?:is|are) not read": "ignored, or not used",
    r"nothing of it": "the file was not loaded",
    r"(?:lives|live) again": "is restored",
    r"squeezed?(?: on)?": "penalise; `doomed left` for what is left",
    r"squeezing": "penalise",
    r"living weights?": "weights that are not zero",
    r"(?:cannot|can not) be had": "is missing, or the download failed",
    r"does not suffice": "is not enough",
    r"(?:no|any|some|every)body": "a user, a process, or a file",
    r"whoever": "the process, or the user",
    r"strangers?": "another run",
    r"in vain": "without an answer",
    r"left alone": "not pruned, or kept",
    r"what is wanted": "expected",
    r"does not say so": "name the reason",
}

FAULTS = {
    r"\w\(s\)": "a plural in brackets: use text_tables.counted",
    rf"(?<![\d.,–/=^+*█-])(?<!most )(?<!least )(?<!than )█ {PLURAL}": "`1 epochs`, if it is 1: use text_tables.counted",
    rf"(?<![\d.,–/=^+*\w-])1 (?:{NOUN})(?<!class)(?<!process)e?s\b(?!')": "a plural after 1",
    r"[\d█] %": "`83.5 %`: write 83.5%",
    r"(?<![\w.])[\d.]*[\d█]k\b": "`1.2k`: write 1,200",
    r"[\d█]M\b": "`4.1M`: write 4.1 M",
    r"[\d█] \+- ?[\d█]": "`+-`: write ±",
}


def faults_of_numbers(text: str) -> list[str]:
    """Say what is wrong with the numbers of a text, and the nouns that they count."""
    return [f"{found[0]!r}: {why}" for pattern, why in FAULTS.items() for found in re.finditer(pattern, text)]


def replaced_words(text: str) -> list[str]:
    """Return the words of a text for which the project has others, with what to write instead."""
    plain = re.sub(r"`[^`]*`", "``", text).replace("squeeze and", "")  # excitation: gates
    return [
        f"{found[0]!r}: {better}"
        for word, better in REPLACED.items()
        for found in re.finditer(rf"\b{word}\b", plain, re.IGNORECASE)
    ]


def chained(text: str) -> list[str]:
    """Return the complaint about more than two clauses with semicolons between; choices (`name: what it does`) may be many."""
    clauses = re.findall(r"; (?![\w./|^█…-]+: )", text)
    return ["more than one semicolon: write sentences"] if len(clauses) > 1 else []


def faults_of_message(text: str) -> list[str]:
    """Return all that is wrong with a message, with NUMBER and TEXT for what is put into it."""
    return [*faults_of_numbers(text), *replaced_words(text), *chained(text)]


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Yield the texts of a module that have several words, with their lines, but for docstrings.

    All of them: a message may be put together far from where it is raised, logged or printed, or be a help text.
    """
    tree = ast.parse(source)
    passed_over = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        if id(node) in passed_over:
            continue
        if isinstance(node, ast.JoinedStr):
            passed_over |= {id(part) for part in node.values}
            text = "".join(map(_as_shown, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = _as_shown(node)
        else:
            continue
        if len(text.split()) > 1:
            yield node.lineno, text


def _as_shown(part: ast.expr) -> str:
    """Return a part of a message with stand-ins for the values that are put into it."""
    if isinstance(part, ast.Constant):
        text = re.sub(r"%(?:\(\w+\))?[-+ ]?[\d.]*[dfg]", NUMBER, str(part.value))
        return re.sub(r"%(?:\(\w+\))?[-\d]*[sr]", TEXT, text).replace("%%", "%")
    assert isinstance(part, ast.FormattedValue)
    how = ast.unparse(part.format_spec) if part.format_spec else ""
    name = getattr(part.value, "id", getattr(part.value, "attr", ""))
    is_count = isinstance(part.value, ast.Call) and getattr(part.value.func, "id", "") in ("len", "sum", "max", "min")
    is_number = is_count or re.search(r"[,dfg%]'$", how) or re.fullmatch(COUNTS, name)
    return (NUMBER if is_number else TEXT) + ("%" if how.endswith("%'") else "")


def prose(page: Path) -> str:
    """Return a Markdown page without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the docstrings of a module, its classes and functions, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text
