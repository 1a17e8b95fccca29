"""The words by which an augmentation is asked for. Needs no torch."""

NONE = "none"
POLICIES = {
    NONE: "nothing",
    "trivial": "one operation of any strength (TrivialAugment)",
    "rand": "two of medium strength (RandAugment)",
    "cifar": "AutoAugment's policies for CIFAR-10",
}


def slots_of(policy: str) -> int:
    """Return how many operations an image goes through."""
    return {NONE: 0, "trivial": 1}.get(policy, 2)
