"""How fast the cards are of which we say which a table needs; what they hold is in `planning.cards`."""

from membench.planning import cards
from membench.planning.cards import Card

UTILISATION = 0.4  # of a card's peak: what training reaches that waits neither for data nor for the host

# Dense peak of the data sheets, by dtype of the weights; fp32 matrices are multiplied in fp32, as torch does by default
_TFLOPS: dict[str, dict[str, float]] = {
    "rtx3090": {"bfloat16": 71, "float32": 35.6},
    "a100-40g": {"bfloat16": 312, "float32": 19.5},
    "l40s": {"bfloat16": 362, "float32": 91.6},
    "h100": {"bfloat16": 989, "float32": 67},
    "h200": {"bfloat16": 989, "float32": 67},
    "b200": {"bfloat16": 2250, "float32": 75},
}
CARDS = [card for card in cards.CARDS if card.name in _TFLOPS]  # smallest first


def smallest(size_bytes: int) -> Card | None:
    """The first card that has as much; None if none has."""
    return next((card for card in CARDS if card.usable_bytes >= size_bytes), None)


def hours(flops: float, dtype: str, card: Card) -> float:
    """Of so many operations, at the assumed utilisation."""
    return flops / (_TFLOPS[card.name][dtype] * 1e12 * UTILISATION) / 3600
