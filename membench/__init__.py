"""membench: measure what memory-efficient training methods need, how fast they are and how well they learn.

    plan = membench.plan("llama3-8b", ["badam", "lora"], batch_size=2, sequence_length=1024)
    runs = membench.compare(["badam", "blockllm"], task="superglue/rte", steps=50)
    membench.report(runs)

See `membench.api` for everything. Nothing heavy is imported before it is used.
"""

from importlib import import_module

TYPE_CHECKING = False  # `typing` could be a user's file in the current folder, which still comes first here
if TYPE_CHECKING:
    from typing import Any

    from membench.api import (
        MemoryUsage,
        Plan,
        PlanRow,
        check,
        compare,
        explore,
        load_records,
        measure_memory,
        plan,
        report,
        to_frame,
    )
    from membench.config.errors import UserError
    from membench.training.hf_trainer import MethodTrainer

__version__ = "0.1.0"

__all__ = [
    "MemoryUsage",
    "MethodTrainer",
    "Plan",
    "PlanRow",
    "UserError",
    "__version__",
    "check",
    "compare",
    "explore",
    "load_records",
    "measure_memory",
    "plan",
    "report",
    "to_frame",
]

_ELSEWHERE = {"MethodTrainer": "membench.training.hf_trainer", "UserError": "membench.config.errors"}


def __getattr__(name: str) -> "Any":
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "membench.api")), name)


def __dir__() -> "list[str]":
    return sorted({*globals(), *__all__})
