"""Memory-efficient training methods, one per file; each is a `torch.optim.Optimizer` built from the model."""

from optimizers.adafactor import Adafactor
from optimizers.adalomo import AdaLomo
from optimizers.adam_mini import AdamMini
from optimizers.adamw import AdamW
from optimizers.adamw8bit import AdamW8bit
from optimizers.apollo import APOLLO
from optimizers.badam import BAdam
from optimizers.base import MemoryEfficientOptimizer
from optimizers.blockllm import BlockLLM
from optimizers.fira import Fira
from optimizers.galore import GaLore
from optimizers.hft import HFT
from optimizers.lisa import LISA
from optimizers.lomo import LOMO
from optimizers.lora import LoRA
from optimizers.mezo import MeZO
from optimizers.muon import Muon
from optimizers.qlora import QLoRA
from optimizers.registry import available, create, expand, get, in_use, module_of, register, resolve, split
from optimizers.scale import SCALE
from optimizers.sgd import SGD
from optimizers.sinkgd import SinkGD
from optimizers.welore import WeLore

__all__ = [
    "APOLLO",
    "HFT",
    "LISA",
    "LOMO",
    "SCALE",
    "SGD",
    "AdaLomo",
    "Adafactor",
    "AdamMini",
    "AdamW",
    "AdamW8bit",
    "BAdam",
    "BlockLLM",
    "Fira",
    "GaLore",
    "LoRA",
    "MeZO",
    "MemoryEfficientOptimizer",
    "Muon",
    "QLoRA",
    "SinkGD",
    "WeLore",
    "available",
    "create",
    "expand",
    "get",
    "in_use",
    "module_of",
    "register",
    "resolve",
    "split",
]
