"""The blocks of weights that Adam-mini gives one second moment: heads of queries and keys, neurons, tokens, norms.

They are the dense blocks on the diagonal of a transformer's Hessian (Zhang et al., ICLR 2025, arXiv 2406.16793,
Algorithm 3). Parts are recognised by module type; queries and keys by the exact name of their module, since nothing
else distinguishes them from values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.shared.masters import exact_dtype
from optimizers.shared.matrices import input_dims
from optimizers.shared.norms import norm_of

Runs = tuple[tuple[int, int], ...]  # (how many blocks, outputs of each)

QUERIES_OR_KEYS: tuple[str, ...] = ("q_proj", "k_proj", "query", "key", "q_lin", "k_lin", "q", "k", "wq", "wk")
QUERIES_OR_KEYS += ("to_q", "to_k", "q_attn", "linear_q", "linear_k", "query_global", "key_global")
QUERIES_OR_KEYS += ("query_proj", "key_proj", "pos_query_proj", "pos_key_proj")  # DeBERTa's
QUERIES_OR_KEYS += ("q_proj_weight", "k_proj_weight")  # of torch's attention whose keys have a width of their own
SIDE_BY_SIDE = ("c_attn", "qkv_proj", "qkv", "Wqkv", "in_proj_weight")  # all queries, all keys, all values
BY_HEAD = ("query_key_value",)  # for each head of keys: its queries, the key, the value
HEAD_SIZE = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")  # as attention modules call it
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")


@dataclass(frozen=True)
class Partition:
    """How a tensor is cut into blocks of consecutive outputs (neurons, tokens).

    Attributes:
        averaged: the dimensions that aren't outputs.
        runs: how many consecutive blocks of how many outputs.
        repeats: how often the runs are repeated.
    """

    averaged: tuple[int, ...]
    runs: Runs
    repeats: int = 1

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return self.repeats * sum(count for count, _ in self.runs)

    def mean_squares(self, g: Tensor) -> Tensor:
        """The mean of each block's squared entries, (blocks,) in fp32 or better."""
        if self.averaged:
            averaged = math.prod(g.shape[d] for d in self.averaged)
            squares = norm_of(g, dim=self.averaged).square_().div_(averaged).flatten()
        else:
            squares = g.to(exact_dtype(g)).square().flatten()
        if self._is_fine:
            return squares
        pieces = squares.view(self.repeats, -1).split([count * size for count, size in self.runs], 1)
        means = [piece.unflatten(1, run).mean(-1) for piece, run in zip(pieces, self.runs, strict=True)]
        return torch.cat(means, 1).flatten()

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Repeat each block's value for all its outputs, to be broadcast over a tensor of `shape`."""
        if not self._is_fine:
            pieces = values.view(self.repeats, -1).split([count for count, _ in self.runs], 1)
            spread = [piece.repeat_interleave(size, 1) for piece, (_, size) in zip(pieces, self.runs, strict=True)]
            values = torch.cat(spread, 1)
        return values.reshape([1 if d in self.averaged else size for d, size in enumerate(shape)])

    @property
    def _is_fine(self) -> bool:
        return all(size == 1 for _, size in self.runs)


def partitions(model: nn.Module) -> dict[nn.Parameter, Partition]:
    """The partition of every parameter; for a tied one, that of its first occurrence.

    A block is a head of a query or key matrix, a neuron (output) of any other matrix, a token of an embedding, an entry
    of a bias, or a whole norm. The size of a head comes from the attention module or else the model's configuration;
    without either, queries and keys are cut by neuron.
    """
    found: dict[nn.Parameter, Partition] = {}
    _collect(model, "", None, vars(model).get("config"), found)
    return found


def _collect(
    module: nn.Module, name: str, attention: nn.Module | None, config: Any, found: dict[nn.Parameter, Partition]
) -> None:
    if "attention" in type(module).__name__.lower():
        attention = module
    for own, p in module.named_parameters(recurse=False):
        if p not in found:
            part = name if own == "weight" else own
            is_vector = p.dim() < 2 or "bias" in own  # experts have their biases in one tensor
            found[p] = _vector(own, p) if is_vector else _matrix(module, part, p, attention, config)
    for child_name, child in module.named_children():
        _collect(child, child_name, attention, config, found)


def _vector(name: str, p: Tensor) -> Partition:
    return Partition((), ((p.numel(), 1),) if "bias" in name else ((1, p.numel()),))


def _matrix(module: nn.Module, name: str, p: Tensor, attention: nn.Module | None, config: Any) -> Partition:
    averaged = input_dims(module, p)
    outputs = math.prod(size for d, size in enumerate(p.shape) if d not in averaged)
    size = None if attention is None else _said(attention, config, HEAD_SIZE)
    if attention is not None and size and outputs % size == 0:
        if name in QUERIES_OR_KEYS:
            return Partition(averaged, ((outputs // size, size),))
        if name in SIDE_BY_SIDE + BY_HEAD:
            joint = 2 if hasattr(attention, "q_attn") else 3  # GPT-2's cross-attention has its queries apart
            key_heads = _said(attention, config, KEY_HEADS) or outputs // (joint * size)
            return _fused(averaged, outputs, size, key_heads, name in BY_HEAD)
    return Partition(averaged, ((outputs, 1),))


def _fused(averaged: tuple[int, ...], outputs: int, size: int, key_heads: int, by_head: bool) -> Partition:
    """The runs of a joint matrix of queries, keys and values: heads, but neurons for the values."""
    repeats = key_heads if by_head else 1
    values = (key_heads if not by_head else 1) * size
    return Partition(averaged, (((outputs // repeats - values) // size, size), (values, 1)), repeats)


def _said(attention: nn.Module, config: Any, names: tuple[str, ...]) -> int | None:
    """The number that the attention module, or else the configuration, has under the first of `names`."""
    known = {**(config.to_dict() if config is not None else {}), **vars(attention)}
    return next((known[name] for name in names if isinstance(known.get(name), int)), None)
