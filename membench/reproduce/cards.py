"""The cards to say which a table needs, smallest first; figures are those of their data sheets."""

from dataclasses import dataclass

from reports.table import GIB

UTILISATION = 0.4  # of a card's peak: what training reaches that waits neither for data nor for the host


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as its maker calls it.
        usable_bytes: of its memory, what the driver leaves.
        tflops: dense peak by dtype of the weights; products of fp32 matrices are computed in fp32, torch's default.
    """

    name: str
    usable_bytes: int
    tflops: dict[str, float]


def _card(name: str, gib: float, bfloat16: float, float32: float) -> Card:
    return Card(name, int(gib * GIB), {"bfloat16": bfloat16, "float32": float32})


CARDS = (
    _card("RTX 3090 (24 GB)", 23.6, 71, 35.6),
    _card("A100 (40 GB)", 39.4, 312, 19.5),
    _card("L40S (48 GB)", 44.4, 362, 91.6),
    _card("H100 (80 GB)", 79.1, 989, 67),
    _card("H200 (141 GB)", 139.8, 989, 67),
    _card("B200 (180 GB)", 178.3, 2250, 75),
)


def smallest(size_bytes: int) -> Card | None:
    """The first card that has as much; None if none has."""
    return next((card for card in CARDS if card.usable_bytes >= size_bytes), None)


def hours(flops: float, dtype: str, card: Card) -> float:
    """Of so many operations, at the assumed utilisation."""
    return flops / (card.tflops[dtype] * 1e12 * UTILISATION) / 3600
