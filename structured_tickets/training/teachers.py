"""The words by which a teacher is asked for. Needs no torch."""

NONE, DENSE = "none", "dense"
KINDS = {
    "kl": "the teacher's probabilities, softened by --distill_temperature (Hinton et al. 2015)",
    "hard": "its answer, as if it were the label (DeiT)",
}


def parts_of(text: str) -> tuple[str, str]:
    """Return architecture and file of a teacher, FILE or ARCH@FILE; the first is empty for the network's own."""
    arch, at, file = text.partition("@")
    return (arch, file) if at else ("", text)
