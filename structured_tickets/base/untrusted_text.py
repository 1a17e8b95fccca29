"""Parse JSON and YAML from untrusted sources: plain values only, with limits on nesting and on expansion by aliases."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

ASKS_FOR = re.compile(r"tag:yaml\.org,2002:(python/\S+?)'")
MOST_VALUES = 100_000  # of a YAML file, with what its aliases repeat
MOST_ENTRIES = 10**4  # of a mapping with what it merges: older PyYAMLs double them at each level of `<<: [*a, *a]`
DEEPEST = 50
LARGEST = 1e18  # figures and sums can do with it


class _Loader(yaml.SafeLoader):
    """Plain values only, each key once, merges that stay small, and nothing so deep that reading it takes minutes."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"more than {DEEPEST} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) and key.value != "<<" else None
            if name in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            seen |= {name} - {None}
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_ENTRIES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MOST_ENTRIES} entries", node.start_mark)


def parse_json(text: str) -> Any:
    """Raises: ValueError, if it is no JSON, or is nested without end."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML file, as plain values only.

    Raises:
        ValueError: It is no YAML, names a class to be built, is nested without end, unfolds to too many values, or
            has a key twice (of which PyYAML would take the last, silently).
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _unfolded(node, {}) > MOST_VALUES:
                raise ValueError(f"its aliases unfold to more than {MOST_VALUES:,} values")
            return _constructed(loader, node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise ValueError("it is nested too deeply, or holds itself") from error
    except yaml.constructor.ConstructorError as error:
        if tag := ASKS_FOR.search(str(error)):
            raise ValueError(f"it asks for {tag[1]}, which could run code. The file was not loaded") from error
        raise ValueError(" ".join(str(error).split())) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _constructed(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML does not look before it converts.
        raise ValueError(f"a value is not what its tag says ({error})") from error


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values of a node; values that are named several times count each time."""
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(node)]


def check(holds: bool, wanted: str) -> None:
    """Raises: ValueError, unless it holds."""
    if not holds:
        raise ValueError(f"{wanted} should be there")


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and is_words(list(value))


def is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def is_number(value: Any) -> bool:
    """Return whether a number is finite, and not absurd."""
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= LARGEST
