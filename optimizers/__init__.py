"""Memory-efficient methods of training, one a file; each is a `torch.optim.Optimizer` built from the model."""

from .adamw import AdamW
from .base import MemoryEfficientOptimizer
from .registry import available, create, get, register, resolve
from .sgd import SGD

__all__ = ["SGD", "AdamW", "MemoryEfficientOptimizer", "available", "create", "get", "register", "resolve"]
