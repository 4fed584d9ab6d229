"""Tiny models as folders with a config.json, for the tests of the planner."""

import json
from pathlib import Path
from typing import Any

from membench.memory.breakdown import levels
from membench.planning.blueprint import Blueprint
from membench.planning.simulate import Simulation
from membench.planning.workload import Workload

TINY = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 300}
LLAMA = {"model_type": "llama", **TINY, "num_key_value_heads": 2, "max_position_embeddings": 512}
GEMMA = {"model_type": "gemma2", **TINY, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
ROBERTA = {"model_type": "roberta", **TINY, "max_position_embeddings": 130, "type_vocab_size": 1}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 128}
LARGE_VOCABULARY = {**LLAMA, "vocab_size": 20_000}
MISTRAL = {**LLAMA, "model_type": "mistral", "max_position_embeddings": 400, "sliding_window": 64}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}
MODELS = {
    "llama": LLAMA,
    "large-vocabulary": LARGE_VOCABULARY,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "gemma": GEMMA,
    "roberta": ROBERTA,
    "gpt2": GPT2,
}


def blueprint(path: Path, name: str, depth: int, **given: Any) -> Blueprint:
    """Of a tiny model, with a batch of 3 x 24, planned for the CPU, where tests meter real steps."""
    usual = {"batch_size": 3, "sequence_length": 24, "dtype": "float32", "device": "cpu"}
    return Blueprint(Workload(folder(path, name, depth), **usual | given))


def folder(path: Path, name: str, depth: int, **given: Any) -> str:
    """A folder with the configuration of a tiny model of `depth` layers; its name."""
    values = {**MODELS[name], **given, "n_layer" if name == "gpt2" else "num_hidden_layers": depth}
    where = path / f"{name}-{depth}"
    where.mkdir(exist_ok=True)
    (where / "config.json").write_text(json.dumps(values))
    return str(where)


def at_peak(simulation: Simulation) -> list[int]:
    """Bytes of everything, and of each part, at the peak."""
    by_part = levels(simulation.trace)
    sizes = by_part[by_part.sum(1).argmax()]
    return [int(sizes.sum()), *sizes.tolist()]


def maxima(simulation: Simulation) -> list[int]:
    """Bytes of everything, and of each part, at their own maximum."""
    by_part = levels(simulation.trace)
    return [int(by_part.sum(1).max()), *by_part.max(0).tolist()]
