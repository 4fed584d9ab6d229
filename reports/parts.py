"""The parts of memory, a row each: what the meter sorts by, what records and plans hold, what tables and plots show."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Sizes = Mapping[str, Any]  # bytes by field; None where a run didn't get as far as to know


class Part(NamedTuple):
    """What memory is needed for.

    Attributes:
        name: in records and plans `NAME_bytes` are its bytes.
        word: in tables.
        colour: of its bars, a name in `figures.style`.
        meaning: what is sorted into it; the meter says how.
        lasting: it is there all the time, whatever the batch is.
        later: records that were made before it was known lack it, and had nothing of it.
    """

    name: str
    word: str
    colour: str
    meaning: str
    lasting: bool = False
    later: bool = False

    @property
    def field(self) -> str:
        return f"{self.name}_bytes"

    @property
    def words(self) -> str:
        """Its name in a sentence."""
        return self.name.replace("_", " ")

    def of(self, sizes: Sizes) -> int:
        """Its bytes among `sizes`; what isn't there, or isn't known, is nothing."""
        return sizes.get(self.field) or 0


# In the order of their numbers in a trace
PARTS = (
    Part("weights", "weights", "blue", "parameters and buffers of the model", lasting=True),
    Part(
        "unsharded_weights",
        "unsharded",
        "sky",
        "weights that FSDP2 gathers from all ranks, until it drops them",
        later=True,
    ),
    Part("gradients", "gradients", "vermilion", "what autograd accumulates into `.grad`", lasting=True),
    Part("optimizer_state", "states", "green", "tensors of the optimizer, fp32 masters among them", lasting=True),
    Part("activations", "activations", "orange", "kept for the backward pass, and the inputs"),
    Part("communication", "communication", "yellow", "buffers that collectives read or write", later=True),
    Part("temporaries", "temporaries", "pink", "everything else"),
)
WEIGHTS, UNSHARDED_WEIGHTS, GRADIENTS, OPTIMIZER_STATE, ACTIVATIONS, COMMUNICATION, TEMPORARIES = range(len(PARTS))

FIELDS = tuple(part.field for part in PARTS)
LASTING = tuple(number for number, part in enumerate(PARTS) if part.lasting)


def shown(rows: Iterable[Sizes]) -> list[Part]:
    """The parts to show of some rows: one that came later only where there is something of it."""
    rows = list(rows)
    return [part for part in PARTS if not part.later or any(part.of(row) for row in rows)]


def round_parts(parts: Sequence[int], unit: int) -> list[int]:
    """Round non-negative parts to whole units so that they add up to their rounded sum (largest remainders go up)."""
    whole = [part // unit for part in parts]
    missing = (2 * sum(parts) + unit) // (2 * unit) - sum(whole)
    by_remainder = sorted(range(len(parts)), key=lambda index: -(parts[index] % unit))
    for index in by_remainder[:missing]:
        whole[index] += 1
    return whole
