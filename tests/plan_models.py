"""Tiny models as folders with a config.json, for the tests of the planner."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import optimizers
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


# ---- drawn by chance

ODD = {"vocab_size": 131, "intermediate_size": 51, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 32}  # kernels want rows of whole 16 bytes
KINDS: dict[str, dict[str, Any]] = {  # those that differ in what they make in a step
    "llama": {"attention_bias": True},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "olmoe": {**EXPERTS, "num_experts": 3, "norm_topk_prob": True},
    "mixtral": {**EXPERTS, "num_local_experts": 3},
    "gpt_oss": {**EXPERTS, "num_local_experts": 3, "head_dim": 8, "sliding_window": 4},
    "gpt_neox": {"use_parallel_residual": False, "hidden_dropout": 0.1},
    "phi3": {"resid_pdrop": 0.1},
    "opt": {"ffn_dim": 51, "word_embed_proj_dim": 16},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "bert": {"hidden_dropout_prob": 0.1},
    "roberta": {"type_vocab_size": 1, "hidden_dropout_prob": 0.0},
}
CHOICES: dict[str, tuple[Any, ...]] = {  # of options on which bytes depend; those that are true or false are taken, too
    "rank": (1, 3, 200),
    "update_every": (1, 2),
    "layers": (1, 2),
    "samples": (1, 2),
    "sparsity": (0.3, 0.9),
    "rows": (4,),
    "states": ("full", "8bit"),
    "projection_bits": (4, 8),
    "weights": ("full", "8bit"),
    "base": ("full", "nf4"),
    "momentum": (0.0, 0.9),
    "block": ("layer", "sublayer", "matrix"),
    "reset": ("sampled", "all", "none"),
    "variant": ("lora", "dora", "pissa", "lora-fa", "vera"),
    "projection": ("std", "reverse_std", "left", "right", "full"),
    "scale_type": ("channel", "tensor"),
}


def drawn(
    seed: int, path: Path, methods: Sequence[str], depths: Sequence[int] = (1, 2)
) -> tuple[Blueprint, str, dict[str, Any]]:
    """A model of odd sizes, a step on it, and one of `methods` with some of its options; the same for a seed."""
    random = Random(seed)
    kind, heads, method = random.choice([*KINDS]), random.choice((2, 3, 4)), random.choice(methods)
    shape = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_hidden_layers": random.choice(depths)}
    shape |= {"num_key_value_heads": random.choice((1, heads)), "tie_word_embeddings": random.random() < 0.5}
    (path / "config.json").write_text(json.dumps({"model_type": kind, **ODD, **shape, **KINDS[kind]}))
    given = drawn_options(random, method)
    parts, micro_batch = 1 if given.get("in_backward") else random.choice((1, 1, 2)), random.choice((1, 2, 3))
    checkpointing = random.random() < 0.5
    step: dict[str, Any] = {
        "batch_size": parts * micro_batch,
        "gradient_accumulation_steps": parts,
        "sequence_length": random.choice((2, 7, 13, 16)),
        "dtype": random.choice(("float32", "float32", "float32", "bfloat16")),
        "checkpointing": checkpointing,
        "checkpointing_every": random.choice((1, 2)) if checkpointing else 1,
    }
    b = Blueprint(Workload(str(path), device="cpu", **step))
    if b.is_causal:
        levers = {"task": random.choice((None, None, "dpo")), "loss_chunks": random.choice((1, 2, 3, 40))}
        b = b.with_workload(**levers)
    return b, method, given


def drawn_options(random: Random, method: str, choices: Mapping[str, tuple[Any, ...]] = CHOICES) -> dict[str, Any]:
    """Some options of a method: those that have `choices`, or are true or false."""
    known = optimizers.resolve(method)
    options = {
        name: choices.get(name, (True, False) if isinstance(value, bool) else ()) for name, value in known.items()
    }
    given = {name: random.choice(values) for name, values in options.items() if values and random.random() < 0.5}
    if given.get("stochastic_rounding") and "master_weights" in known:
        given["master_weights"] = False
    return given
