"""The command line of the runner, made from the table of its flags."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from structured_tickets.base.commands import name_in_help, typed
from structured_tickets.base.console import start_logging
from structured_tickets.base.secrets_in_text import refuse_secrets
from structured_tickets.settings.argument_types import OneLineParser
from structured_tickets.settings.flag_rules import check, warnings_about
from structured_tickets.settings.flag_table import FLAGS, GROUPS, PRESETS
from structured_tickets.settings.recipes import RECIPES
from structured_tickets.settings.words import words_from

EXAMPLES = """examples:
  {command} --dataset digits --image_size 8 --arch vit_tiny --struct rsst --vit_structured \\
      --vit_prune_target both --rate 0.3 --rate_mode round --pruning_times 3 --epochs 20 --optimizer adamw --lr 1e-3 \\
      --warmup 2 --lr_schedule cosine
  {command} --dataset imagefolder --data photos --arch res20s --struct refill --rate 0.4 \\
      --pruning_times 3 --epochs 20 --lr 0.05 --warmup 1 --lr_schedule cosine
"""


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all flags, in the groups of the table."""
    parser = OneLineParser(
        prog=name_in_help("run"),
        usage="%(prog)s [--FLAG VALUE] ...",  # all flags would fill a page before the first one is explained
        allow_abbrev=False,
        epilog=EXAMPLES.format(command=typed("run")),
        description="Find structured lottery tickets. Each round trains the network, prunes weights by global L1, "
        "regroups the mask into whole units (channels, heads, neurons or blocks) and rewinds to the initial weights.",
        formatter_class=_HelpFormatter,
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            flag.add_to(group)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag with its default, unless that is none or its text says it; the examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default in (None, ()) or "(default: " in (action.help or "")
        text = action.help if said else super()._get_help_string(action)
        example = getattr(action, "example", "")
        return f"{text}\nexample: {example}" if example else text

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap the text, and keep an example on a line of its own."""
        return [line for part in text.split("\n") for line in super(_HelpFormatter, self)._split_lines(part, width)]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check a command line; `-` is accepted for `_` in flags.

    The result also has `warnings` (list of sentences), `explicit` (names of the flags that were given), `named` (those,
    and what a file, preset or recipe names) and `words` (the command line itself).

    Raises:
        UsageError: One line that names the flag, the value and what is allowed.
    """
    words = [_underscored(w) for w in argv]
    beneath, explicit = _beneath(words), _named_in(words)
    args = _parsed(words, beneath)
    check(args)
    args.named = sorted(explicit | beneath.keys())
    args.warnings, args.explicit, args.words = warnings_about(args, explicit), sorted(explicit), list(argv)
    return args


def _parsed(words: Sequence[str], beneath: Mapping[str, Any]) -> argparse.Namespace:
    """Parse words over values by name, and fill in what follows from them."""
    parser, bare = build_parser(), [flag.name for flag in FLAGS.values() if flag.bare]
    off = {f"--{name}=false": name for name in bare if f"--{name}=false" in words}
    on = {f"--{name}=true": f"--{name}" for name in bare}
    parser.set_defaults(**{**beneath, **dict.fromkeys(off.values(), False)})
    args = parser.parse_args([on.get(word, word) for word in words if word not in off])
    _derive(args, _named_in(words) | beneath.keys())
    return args


def begin(words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command line that is about to be carried out; the log starts with their verbosity.

    Raises:
        UsageError: They are wrong, or hold a secret, which the run would write down.
    """
    refuse_secrets(words)
    args = parse_args(words)
    start_logging(args.quiet, args.verbose)
    return args


def _derive(args: argparse.Namespace, given: Collection[str]) -> None:
    """Fill in the values that follow from other flags. `given`: flags that something names: see `_beneath`."""
    for flag in FLAGS.values():
        if flag.derived and (flag.name not in given or getattr(args, flag.name) == "auto"):
            setattr(args, flag.name, flag.derived(args))


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _named_in(words: Sequence[str]) -> set[str]:
    return {word[2:].split("=")[0] for word in words if word.startswith("--")}


def _beneath(words: Sequence[str]) -> dict[str, Any]:
    """Values by name, over which the words win: those of their `--config`, then of `--preset` and `--recipe`.

    Raises:
        UsageError: The file of `--config` is none, or has a value that is not allowed.
    """
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "recipe", "config"):
        parser.add_argument(f"--{name}", default="")
    asked = parser.parse_known_args(words)[0]
    values = _in_file(words_from(asked.config)) if asked.config else {}
    return values | PRESETS.get(asked.preset, {}) | _of_recipe(asked.recipe)


def _in_file(words: Sequence[str]) -> dict[str, Any]:
    """Values by name that the words of a file name, or its recipe and preset.

    A value that follows from the others is left out: it has to follow from those that are given beside the file.
    """
    kept, beneath = list(words), _beneath(words)
    for flag in FLAGS.values():
        if flag.derived and flag.name in _named_in(kept):
            fewer = [word for word in kept if word[2:].split("=")[0] != flag.name]
            if getattr(_parsed(fewer, beneath), flag.name) == getattr(_parsed(kept, beneath), flag.name):
                kept = fewer
    found = vars(_parsed(kept, beneath))
    return beneath | {name: found[name] for name in _named_in(kept)}


def _of_recipe(name: str) -> dict[str, Any]:
    """Values of all flags that any recipe sets: one replaces another as a whole, that of a file too."""
    if name not in RECIPES:
        return {}
    every = dict.fromkeys(flag for recipe in RECIPES.values() for flag in recipe.flags)
    return {flag: FLAGS[flag].parsed_default for flag in every} | RECIPES[name].flags
