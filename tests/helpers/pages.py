"""Pages of Markdown, taken apart: headings, links, tables, blocks of code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MARK = "\0"  # stands in the prose where a block of code was


@dataclass
class Page:
    """`prose` is what is not code, with a mark for each block; `blocks` are those blocks."""

    prose: str
    blocks: list[str]

    def links(self) -> list[str]:
        """Targets of links and pictures, other than addresses on the web."""
        found = re.findall(r"\]\(([^)\s]+)\)", self.prose)
        return [link for link in found if not re.match(r"https?://", link)]

    def anchors(self) -> set[str]:
        """The names under which its headings can be linked, made as GitHub makes them."""
        found: list[str] = []
        for heading in re.findall(r"^#+ +(.+)$", self.prose, re.MULTILINE):
            slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
        return set(found)

    def section(self, title: str) -> Page:
        """What follows this heading of the second level, up to the next one."""
        parts = re.split(r"^## +(.+)$", self.prose, flags=re.MULTILINE)
        text = parts[parts.index(title) + 1]
        return Page(text, [self.blocks[int(k)] for k in re.findall(rf"^{MARK}(\d+)$", text, re.MULTILINE)])

    def rows(self) -> list[list[str]]:
        """The cells of all rows of its tables, headings and rules left out."""
        lines = re.findall(r"^\|(.+)\|$", self.prose, re.MULTILINE)
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
        rules = {k for k, row in enumerate(cells) if all(re.fullmatch(":?-+:?", cell) for cell in row)}
        return [row for k, row in enumerate(cells) if k not in rules and k + 1 not in rules]


@cache
def page(path: Path) -> Page:
    """Read a page; blocks of code are fenced by backticks, or indented by four spaces after an empty line."""
    prose: list[str] = []
    blocks: list[list[str]] = []
    inside = ""
    for line in path.read_text().splitlines():
        begins = _kind(line, prose[-1] if prose else "")
        if inside == "fence":
            inside = "" if begins == "fence" else inside
            blocks[-1] += [line] if inside else []
        elif begins == "fence" or (begins == "indent" and inside != "indent"):
            prose.append(f"{MARK}{len(blocks)}")
            blocks.append([line[4:]] if begins == "indent" else [])
            inside = begins
        elif inside == "indent" and line.startswith("    "):
            blocks[-1].append(line[4:])
        else:
            inside = ""
            prose.append(line)
    return Page("\n".join(prose), ["\n".join(lines) for lines in blocks])


def _kind(line: str, before: str) -> str:
    if line.startswith("```"):
        return "fence"
    return "indent" if line.startswith("    ") and not before.strip() else ""
