"""What is trained, as rows of data: the published set-ups, and tiny ones that rehearse them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.models import SIZES, Size
from membench.planning.workload import Workload

GIB = 1 << 30
EVERY_METHOD: dict[str, dict[str, Any]] = {
    "*": {"lr": 1e-6},  # random weights stay finite whatever the method does with it
    "lomo": {"clip_norm": None},  # as its paper's memory is given
    "badam": {"order": "ascending"},  # so that blocks at even distances stand for the cycle
}
REFERENCE = "adamw"
# With these, both sides keep the same in low precision; our other methods would keep masters that the peers don't.
RACED_IN_BF16 = ("badam", "lomo", "lomo-clipped", "adalomo")


@dataclass(frozen=True)
class Budget:
    """A question to the planner: the largest batch of a method on a card of `total_bytes` (None: this one)."""

    workload: str
    method: str
    total_bytes: int | None


@dataclass(frozen=True)
class Program:
    """Everything that a session does.

    Attributes:
        workloads: by the origin of their set-up; each method is measured on each.
        metered: (workload, methods) for the comparison with the meter.
        budgets: see `Budget`.
        race: the model of the races, in fp32 except for `RACED_IN_BF16`.
    """

    workloads: dict[str, Workload]
    metered: tuple[str, tuple[str, ...]]
    budgets: tuple[Budget, ...]
    race: Size


# BAdam, Table 2: Llama 3-8B, batch 2, 728 tokens, each layer checkpointed. GaLore, Table 11: LLaMA 1B, 256 tokens.
BADAMS = Workload("llama3-8b", 2, 728, checkpointing=True)
GALORES = Workload("llama-1b", 1, 256)
TINY = Workload("llama-tiny", 2, 16, dtype="float32", device="cpu")

PROGRAMS = {
    "full": Program(
        {"badam": BADAMS, "galore": GALORES},
        ("galore", ("adamw", "badam", "lora", "galore", "lomo")),
        (
            Budget("badam", "badam", 24 * GIB),  # the card of BAdam's paper
            Budget("galore", "galore", 16 * GIB),
            Budget("galore", "adamw", None),
        ),
        replace(SIZES["500m"], device="cuda"),
    ),
    "tiny": Program(
        {"badam": replace(TINY, checkpointing=True), "galore": TINY},
        ("galore", ("adamw", "badam")),
        (Budget("galore", "badam", GIB),),
        SIZES["tiny"],
    ),
}
