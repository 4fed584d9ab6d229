"""Memory-efficient methods of training, one a file; each is a `torch.optim.Optimizer` built from the model."""

from .adalomo import AdaLomo
from .adamw import AdamW
from .badam import BAdam
from .base import MemoryEfficientOptimizer
from .blockllm import BlockLLM
from .galore import GaLore
from .hft import HFT
from .lisa import LISA
from .lomo import LOMO
from .lora import LoRA
from .registry import available, create, get, register, resolve
from .sgd import SGD

__all__ = [
    "HFT",
    "LISA",
    "LOMO",
    "SGD",
    "AdaLomo",
    "AdamW",
    "BAdam",
    "BlockLLM",
    "GaLore",
    "LoRA",
    "MemoryEfficientOptimizer",
    "available",
    "create",
    "get",
    "register",
    "resolve",
]
