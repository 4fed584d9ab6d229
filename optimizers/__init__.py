"""Memory-efficient methods of training, one a file; each is a `torch.optim.Optimizer` built from the model."""

from .adamw import AdamW
from .badam import BAdam
from .base import MemoryEfficientOptimizer
from .blockllm import BlockLLM
from .registry import available, create, get, register, resolve
from .sgd import SGD

__all__ = [
    "SGD",
    "AdamW",
    "BAdam",
    "BlockLLM",
    "MemoryEfficientOptimizer",
    "available",
    "create",
    "get",
    "register",
    "resolve",
]
