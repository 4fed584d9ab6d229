"""membench: measure what memory-efficient training methods need, how fast they are and how well they learn."""

from importlib import import_module

TYPE_CHECKING = False  # `typing` may be somebody's own file in the current folder, which still comes first here
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_EXPORTS = {"MethodTrainer": "membench.training.hf_trainer"}  # imported when they are used: torch takes seconds

__all__ = ["MethodTrainer", "__version__"]


def __getattr__(name: str) -> "Any":
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
