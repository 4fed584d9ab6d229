"""What a GPU's kernels keep, where torch's code for a CPU keeps something else.

Fake tensors are on the CPU: fake ones on a GPU need a build of torch with CUDA, and without a GPU their backward pass
fails. So torch would choose a CPU's kernels for them, and these are replaced:

- `scaled_dot_product_attention` (ATen/native/transformers/cuda/sdp_utils.cpp): flash attention, the memory-efficient
  kernel and cuDNN's all keep their output, the logarithm of each row's sum in fp32 and what dropout needs to be done
  again, but no attention weights, with or without dropout. Plans have cuDNN's, which torch prefers on an H100 or B200.
  The memory-efficient one, which others take if there is a mask or the dtype is fp32, rounds rows up to 32 tokens.
- Dropout keeps a mask of one byte per value, rather than one in the values' dtype (ATen/native/Dropout.cpp).
- Layer norm keeps its statistics in fp32, whatever the dtype (`QuickFakeTensorMode`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from membench.planning.fake import QuickFakeTensorMode

_aten = torch.ops.aten
_dropout = functional.dropout
_ALIGNED_BYTES = 16  # the fused kernels take heads whose size is a multiple of it


@contextmanager
def fake_tensors(device: str) -> Iterator[QuickFakeTensorMode]:
    """Within this context tensors are fake, and computed as on a `device`: "cpu", or "cuda" (of 2020 or later)."""
    on_gpu = device != "cpu"
    with _replaced() if on_gpu else nullcontext(), QuickFakeTensorMode(on_gpu=on_gpu) as fake:
        yield fake


@contextmanager
def _replaced() -> Iterator[None]:
    before = functional.scaled_dot_product_attention, functional.dropout
    functional.scaled_dot_product_attention, functional.dropout = attention, dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = before


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`, by CUDA's fused kernel where torch takes it."""
    if not training or inplace or not 0 < p < 1:
        return _dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, training)[0]


def attention(
    query: Tensor,  # (batch, heads, queries, head size)
    key: Tensor,  # (batch, heads or a divisor of them, keys, head size)
    value: Tensor,  # (batch, as many as of the keys, keys, size of the output)
    attn_mask: Tensor | None = None,  # expands to (batch, heads, queries, keys)
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # (batch, heads, queries, size of the output)
    """`torch.nn.functional.scaled_dot_product_attention`, by a fused kernel where CUDA has one."""
    inputs, mask = (query, key, value), _added(attn_mask, query.dtype)
    if query.dim() != 4 or any(one.shape[-1] * one.itemsize % _ALIGNED_BYTES for one in inputs):
        return torch._scaled_dot_product_attention_math(
            *inputs, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    keeps = torch.is_grad_enabled() and any(one.requires_grad for one in inputs)
    if mask is not None and mask.requires_grad:  # cuDNN's has no gradient for it
        mask = mask.expand(*query.shape[:3], key.shape[2])
        return _aten._scaled_dot_product_efficient_attention(*inputs, mask, keeps, dropout_p, is_causal, scale=scale)[0]
    return _aten._scaled_dot_product_cudnn_attention(*inputs, mask, keeps, dropout_p, is_causal, False, scale=scale)[0]


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores for a mask of the positions that count."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    nothing: Any = torch.scalar_tensor(-math.inf, dtype=dtype, device=mask.device)
    return torch.where(mask, 0.0, nothing)
