"""The model, the data and the loss of every race: a Llama with random weights on random tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from membench.planning.blueprint import default_dtype


@dataclass(frozen=True)
class Size:
    """A model and its batches; the full size has D = 8, as in the published measurements of BAdam's backward pass."""

    width: int
    mlp: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int  # per example
    rank: int  # of GaLore and LoRA
    device: str = "cpu"
    dtype: str = "float32"


SIZES = {
    "500m": Size(width=2048, mlp=5504, layers=8, heads=32, vocabulary=32_000, batch=4, tokens=256, rank=128),
    "100m": Size(width=960, mlp=2560, layers=8, heads=15, vocabulary=8192, batch=1, tokens=32, rank=128),
    "small": Size(width=256, mlp=688, layers=4, heads=4, vocabulary=1024, batch=1, tokens=32, rank=32),
    "tiny": Size(width=32, mlp=64, layers=3, heads=2, vocabulary=64, batch=2, tokens=8, rank=4),
}


def build(size: Size) -> nn.Module:
    """The model, in training mode; the same weights every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.tokens,
        tie_word_embeddings=False,
        use_cache=False,
    )
    dtype = default_dtype(getattr(torch, size.dtype))
    with torch.random.fork_rng(devices=[]), torch.device(size.device), dtype:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).train()


def batch(size: Size, step: int) -> dict[str, Tensor]:
    """Token ids (batch, tokens): a function of `step`."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(size.vocabulary, (size.batch, size.tokens), generator=generator)
    return {"input_ids": tokens.to(size.device)}


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token."""
    return model(**inputs, labels=inputs["input_ids"]).loss
