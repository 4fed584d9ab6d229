"""Memory-efficient methods of training, one a file; each is a `torch.optim.Optimizer` built from the model."""

from optimizers.adafactor import Adafactor
from optimizers.adalomo import AdaLomo
from optimizers.adamw import AdamW
from optimizers.badam import BAdam
from optimizers.base import MemoryEfficientOptimizer
from optimizers.blockllm import BlockLLM
from optimizers.galore import GaLore
from optimizers.hft import HFT
from optimizers.lisa import LISA
from optimizers.lomo import LOMO
from optimizers.lora import LoRA
from optimizers.muon import Muon
from optimizers.qlora import QLoRA
from optimizers.registry import available, create, get, in_use, register, resolve
from optimizers.sgd import SGD

__all__ = [
    "HFT",
    "LISA",
    "LOMO",
    "SGD",
    "AdaLomo",
    "Adafactor",
    "AdamW",
    "BAdam",
    "BlockLLM",
    "GaLore",
    "LoRA",
    "MemoryEfficientOptimizer",
    "Muon",
    "QLoRA",
    "available",
    "create",
    "get",
    "in_use",
    "register",
    "resolve",
]
