"""Cards by name, with what a process can use of their memory.

The size is what PyTorch calls a card's total capacity. It is less than nvidia-smi's total, by what the driver keeps for
itself and for error correction: where neither a run of ours nor a message of PyTorch's tells, 2.2% less, which is more
than the cards below that are known both ways lose (an H100 .6%, an RTX 4090 1.5%). Prices change by the week and the
country, so the cards are in order of memory.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from membench.config.units import parse_memory
from reports.names import suggestion
from reports.table import GIB, MIB

KEPT = 0.022  # of nvidia-smi's total


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: for `--budget`.
        usable_bytes: what a process can use, its CUDA context included.
        source: of the size.
        bfloat16: does it compute in bf16? CUDA's from compute capability 8.0 on do; older ones only imitate it.
    """

    name: str
    usable_bytes: int
    source: str
    bfloat16: bool = True

    def computes_in(self, dtype: str) -> bool:
        return self.bfloat16 or dtype != "bfloat16"


def _seen(name: str, gib: float, source: str) -> Card:
    """A card whose capacity PyTorch told."""
    return Card(name, int(gib * GIB), f"PyTorch's message in {source}")


def _listed(name: str, mib: int, source: str = "github.com/modal-labs/modal-client/pull/2797") -> Card:
    """A card of which nvidia-smi's total is known."""
    return Card(name, int(mib * MIB * (1 - KEPT)), f"nvidia-smi in {source}, less {KEPT:.1%}")


CARDS = tuple(
    sorted(
        [
            _seen("rtx3080", 9.78, "github.com/zai-org/CogVideo/issues/34"),
            _listed("t4", 15360)._replace(bfloat16=False),
            _listed("l4", 23034),
            _listed("a10", 23028),
            _seen("rtx3090", 23.70, "github.com/GaoLii/DSP/issues/10"),
            _seen("rtx4090", 23.64, "github.com/ali-vilab/VGen/issues/104"),
            _seen("a100-40g", 39.50, "github.com/TianheWu/CoSeR/issues/10"),
            _listed("l40s", 46068),
            _listed("a100-80g", 81920),
            Card("h100", 85_017_493_504, "PyTorch's figure in benchmarks/results/h100.json"),
            _listed("rtx5090", 32607, "github.com/noonghunna/club-3090/issues/1229"),
            Card("h200", int(139.8 * GIB), "PyTorch's figure in public logs; nvidia-smi says 143771 MiB"),
            Card("b200", int(178.35 * GIB), "CUDA's figure in github.com/pytorch/ao/pull/4002"),
        ],
        key=lambda card: card.usable_bytes,
    )
)


def find(name: str) -> Card | None:
    """The card called `name`, however it is written ("RTX 4090", "A100 80GB"); None if there is none."""
    return next((card for card in CARDS if _plain(card.name) == _plain(name)), None)


def _plain(name: str) -> str:
    return re.sub(
        r"[^a-z0-9]|(?<=\d)gb$|^nvidia|geforce", "", name.lower().replace("80gb", "80g").replace("40gb", "40g")
    )


def smallest(size_bytes: int, dtype: str) -> str | None:
    """The name of the first card that holds `size_bytes` and computes in `dtype`; None if none does."""
    able = (card.name for card in CARDS if card.usable_bytes >= size_bytes and card.computes_in(dtype))
    return next(able, None)


def budget_bytes(text: str) -> int:
    """Bytes of a card's name, or of a size such as "24GiB".

    Raises:
        ValueError: it is neither.
    """
    card = find(text)
    if card is not None:
        return card.usable_bytes
    try:
        return parse_memory(text)
    except ValueError as error:
        if re.match(r"\s*\d", text) or not re.search(r"[a-zA-Z]\d|\d.*[a-zA-Z]", text):
            raise
        raise ValueError(
            f"{text}: no card is called so. {suggestion(text.lower(), [card.name for card in CARDS])}"
        ) from error
