"""The methods that a run can follow (what each ranks, and what it does with the structure), and their controls."""

from __future__ import annotations

from dataclasses import dataclass

SQUEEZE_GOAL = 0.05  # norm of the doomed weights after a round / before it; above it hardening may cost accuracy


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        pruner: A row of `oneshot_pruners.PRUNERS`, or "l1": global L1 over what the round could train.
        ranks: Whose weights it ranks: "trained" (those of the round that has ended: prune, rewind, repeat), or for
            one-shot pruners, at every density anew, "initial" (the ticket's) or "dense" (round 0's when it ended).
        regroups: Whether its mask is always turned into whole units; else only with `--regroup`.
        squeezes: Whether what is outside the structure fades out instead of being cut.
        reads_batches: Whether it looks at images.
        summary: One line for the help text.
    """

    pruner: str
    ranks: str
    summary: str
    regroups: bool = False
    squeezes: bool = False
    reads_batches: bool = False

    @property
    def one_shot(self) -> bool:
        """Return whether masks do not depend on the round before."""
        return self.ranks != "trained"


METHODS: dict[str, Method] = {
    "refill": Method("l1", "trained", "prune whole units at once, then train the rest", regroups=True),
    "rsst": Method("l1", "trained", "shrink whole units to zero by a growing penalty", regroups=True, squeezes=True),
    "imp": Method("l1", "trained", "iterative magnitude pruning, weight by weight"),
    "omp": Method("omp", "dense", "one-shot magnitude pruning after the dense round"),
    "snip": Method("snip", "initial", "|gradient * weight| before training", reads_batches=True),
    "grasp": Method("grasp", "initial", "gradient flow before training", reads_batches=True),
    "synflow": Method("synflow", "initial", "synaptic flow before training, without data"),
    "random": Method("random", "initial", "a random mask before training"),
    "admm": Method("admm", "dense", "ADMM training towards sparsity after the dense round"),
}


@dataclass(frozen=True)
class Control:
    """A row of `CONTROLS`: with what a ticket is compared.

    Attributes:
        summary: One line for the help text.
        fresh: Whether each round starts from other initial weights than the ticket's.
        masks: "same", "redrawn" (permuted anew in every round), "permuted" (by one order for all rounds), or "narrow"
            (those of a dense network).
    """

    summary: str
    fresh: bool = False
    masks: str = "same"


CONTROLS: dict[str, Control] = {
    "none": Control("the ticket itself"),
    "reinit": Control("the ticket's masks with new initial weights", fresh=True),
    "random_structure": Control("random masks with as many kept units per layer, redrawn every round", masks="redrawn"),
    "permute": Control(
        "the ticket's masks shuffled within each layer, in the same order in all rounds", masks="permuted"
    ),
    "small_dense": Control(
        "a dense network with the ticket's MACs, all layers narrowed by the same share", fresh=True, masks="narrow"
    ),
}
