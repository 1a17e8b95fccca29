"""The words by which a teacher is asked for. Needs no torch."""

from pathlib import Path

NONE, DENSE = "none", "dense"
KINDS = {
    "kl": "the teacher's probabilities, softened by --distill_temperature (Hinton et al. 2015)",
    "hard": "its answer, as if it were the label (DeiT)",
}


def parts_of(text: str) -> tuple[str, str]:
    """Return architecture and file of a teacher, FILE or ARCH@FILE; the first is empty for the network's own.

    An @ in the name of a file that is there, or behind a / (no architecture begins with one), is a part of the name.
    """
    arch, at, file = text.partition("@")
    is_place = text.startswith("/") and ".py:" not in arch
    return ("", text) if not at or is_place or Path(text).is_file() else (arch, file)
