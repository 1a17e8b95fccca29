"""The kinds of unit that a network can have: how they are called, and what sets one apart. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A row of `KINDS`.

    Attributes:
        title: As the documents' console blocks call it.
        heading: Of its part of a regrouping.
        layers: What the summary of a regrouping calls its layers; empty where they are layers of other kinds, too.
        holds_units: Its units are made of units of other kinds, and each is a layer of its own: it is ranked over the
            whole network, by scores per weight, and changes places with units of the same shape only.
        by_weight: It is only pruned weight by weight, never as a whole.
        word: How one of them is called in tables and sentences; empty: by the row's name.
    """

    title: str
    heading: str = ""
    layers: str = ""
    holds_units: bool = False
    by_weight: bool = False
    word: str = ""


FILTER, STREAM = "filter", "stream"
CHANNEL_UNITS = {
    FILTER: "each filter of a convolution by itself",
    STREAM: "a channel of all tensors that are added or normalised together, with everything that writes or reads it",
}
"""What a channel is, as a unit."""

KINDS: dict[str, Kind] = {
    "channel": Kind("Channel", "Channel Pruning", "Convolution layers"),
    "head": Kind("Head", "Attention Head Pruning", "Attention layers"),
    "neuron": Kind("MLP", "MLP Neuron Pruning", "MLP layers"),
    "block": Kind("Block", "Block Pruning", holds_units=True),
    "patch": Kind("Patch", by_weight=True, word="patch feature"),
    "row": Kind("Row", layers="Layers pruned weight by weight", by_weight=True),
}


def kind_of(name: str) -> Kind:
    """Return a row of `KINDS`; for a name that has none, a kind of that title that nothing sets apart."""
    return KINDS.get(name, Kind(name.capitalize(), name, name))


def word_of(kind: str) -> str:
    """Return how a unit of a kind is called; with an s, several of them."""
    return kind_of(kind).word or kind
