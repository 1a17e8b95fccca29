"""Networks of a user's file that start from the same weights whatever the seed of the run is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from structured_tickets.base.randomness import mixed_seed, random_states, restore_random_states, seed_everything

STREAM = 20261126  # no run draws from a seed that is mixed with it


def starts_the_same(model: nn.Module, build: Callable[[], nn.Module], seed: int) -> str:
    """Say why a network starts from the same weights whatever the seed is; "" if the seed decides.

    The network is built a second time, from another seed. All random generators are left as they were found.

    Args:
        model: The network, just built by `build` after `seed_everything(seed)`: nothing may have been drawn since.
    """
    before, found = random_states(), torch.initial_seed()
    try:
        other = mixed_seed(seed, STREAM)
        seed_everything(other)
        twin, again = build(), torch.initial_seed()
    except Exception:  # a user's code that cannot run twice; the run needs it once
        return ""
    finally:
        restore_random_states(before)
    # A module beside the file that sets the seed when it is imported has done so already, for good.
    sets_it = found != seed and again in (found, other)
    if not sets_it and not _equal(model, twin):
        return ""
    return f"the code sets torch's seed to {found} itself" if found != seed else "the code does not draw them"


def _equal(model: nn.Module, twin: nn.Module) -> bool:
    ours, theirs = model.state_dict(), twin.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
