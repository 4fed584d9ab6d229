"""Adafactor: Adam with a factored second moment and no first (Shazeer & Stern, ICML 2018, arXiv 1804.04235)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_choice
from optimizers.registry import register
from optimizers.shared.factored import check_factored, chunks_of, rms, subtract, update_moments
from optimizers.shared.masters import exact_dtype


@register("adafactor")
class Adafactor(MemoryEfficientOptimizer):
    """Adafactor (Algorithms 4 and 5): each weight has its own rate, computed from row and column averages alone.

    For a matrix W (m, n) with gradient G, at its step t, with b = 1 - t^decay_rate:

        R = b R + (1 - b) mean over columns of G^2      (m,)
        C = b C + (1 - b) mean over rows of G^2         (n,)
        U = G / sqrt(V),  V = R C / mean(R)
        W = W - rate U / max(1, RMS(U) / clip_threshold)

    A vector keeps its whole second moment as V; a tensor with more dimensions is factored over the last two. Two rules
    go by this name:

    - `rule="transformers"`, what the Hugging Face Trainer runs: `transformers.Adafactor` with `relative_step=False` and
      `scale_parameter=False`. The rate is `lr`, so steps have Adam's size; eps_1 is added to G^2.
    - `rule="torch"`, `torch.optim.Adafactor` and, except for where eps_1 goes, the paper: the rate is
      min(lr, 1 / sqrt(t)) max(eps_2, RMS(W)), relative to the weights; sqrt(V) and mean(R) are at least eps_1.

    Weight decay is decoupled: W shrinks by lr weight_decay W.

    Trains everything. Keeps, in fp32, m + n values for an (m, n) matrix and n for a vector of length n; low-precision
    weights are updated in fp32 arithmetic. No temporary is larger than 64 MiB (or one slice along the first dimension);
    the packages make several as large as the weights.

    Args:
        model: the model to train.
        lr: learning rate; with `rule="torch"` relative to the weights' RMS (torch's default is 1e-2).
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        decay_rate: exponent of the second moment's decay rate, below 0.
        eps: (eps_1, eps_2). None for eps_1 means 1e-30 with rule "transformers", fp32's machine epsilon with "torch".
            eps_2, a lower bound on the weights' RMS, is used by "torch" only.
        clip_threshold: updates with a larger RMS are scaled down to it.
        rule: "transformers" or "torch".
        in_backward: update inside the backward pass, so that only one gradient exists at a time.

    Raises:
        ValueError: a value is out of range.
    """

    summary = "Adam with row and column averages instead of a full second moment, and no first moment"
    paper = "Shazeer & Stern, ICML 2018, arXiv 1804.04235"
    trains = "everything"
    keeps = "4 (m + n) B per m x n matrix, 4 B per weight of a vector"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 1e-2}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        decay_rate: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        clip_threshold: float = 1.0,
        rule: str = "transformers",
        in_backward: bool = False,
    ):
        check_choice("rule", rule, tuple(RULES))
        check_factored(decay_rate, eps, clip_threshold)
        self.rule = RULES[rule]
        eps = (self.rule.eps if eps[0] is None else eps[0], eps[1])
        defaults = {"lr": lr, "weight_decay": weight_decay, "decay_rate": decay_rate, "eps": eps}
        super().__init__(model, {**defaults, "clip_threshold": clip_threshold}, in_backward=in_backward)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p, g in zip(params, grads, strict=True):
            state = self.state[p]
            if not state:
                state |= _initial_state(p)
            state["step"] += 1
            self._update_one(state, chunks_of(p, g), group)

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return _initial_state(torch.empty(p.shape, dtype=p.dtype, device="meta"))

    def _update_one(self, state: dict[str, Any], chunks: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        rule, eps, count = self.rule, group["eps"][0], sum(weight.numel() for weight, _ in chunks)
        grads = [grad for _, grad in chunks]
        rate = rule.rate([weight for weight, _ in chunks], state["step"], group)
        moments = [state[name] for name in ("row", "column", "second") if name in state]
        _update_moments(moments, grads, rule.added(eps), 1.0 - state["step"] ** group["decay_rate"])
        factors = _cut(rule.factors(moments, eps), grads)
        update_rms = rms((rule.scaled(g, *fs, eps=eps) for g, fs in zip(grads, factors, strict=True)), count)
        rate = rate / (update_rms / group["clip_threshold"]).clamp(min=1.0)
        for (weight, grad), fs in zip(chunks, factors, strict=True):
            step = rule.scaled(grad, *fs, eps=eps).mul_(rate)
            subtract(weight, step, 1.0 - group["lr"] * group["weight_decay"] if group["weight_decay"] else None)


class TransformersRule:
    """`transformers.Adafactor` as the Trainer uses it: the rate is `lr`; eps_1 is added to squared gradients."""

    eps = 1e-30

    @staticmethod
    def rate(weights: list[Tensor], step: int, group: dict[str, Any]) -> float | Tensor:
        return group["lr"]

    @staticmethod
    def added(eps: float) -> float:
        return eps

    @staticmethod
    def factors(moments: list[Tensor], eps: float) -> list[Tensor]:
        """1 / sqrt(R / mean(R)) and 1 / sqrt(C), or 1 / sqrt(V) for a vector."""
        row, *column = moments
        return [(row / row.mean(-1, keepdim=True)).rsqrt_(), column[0].rsqrt()] if column else [row.rsqrt()]

    @staticmethod
    def scaled(g: Tensor, row: Tensor, column: Tensor | None = None, *, eps: float) -> Tensor:
        """U of a piece."""
        return g * row if column is None else (g * column.unsqueeze(-2)).mul_(row.unsqueeze(-1))


class TorchRule:
    """`torch.optim.Adafactor`: the rate is relative to the weights; sqrt(V) and mean(R) are at least eps_1."""

    eps = torch.finfo(torch.float32).eps

    @staticmethod
    def rate(weights: list[Tensor], step: int, group: dict[str, Any]) -> float | Tensor:
        count = sum(weight.numel() for weight in weights)
        size = rms((_exact(weight) for weight in weights), count)
        return size.clamp(min=group["eps"][1]) * min(group["lr"], 1.0 / math.sqrt(step))

    @staticmethod
    def added(eps: float) -> float:
        return 0.0

    @staticmethod
    def factors(moments: list[Tensor], eps: float) -> list[Tensor]:
        """R / mean(R) and C, or V for a vector."""
        row, *column = moments
        return [row / row.mean(-1, keepdim=True).clamp_(min=eps), *column] if column else [row]

    @staticmethod
    def scaled(g: Tensor, row: Tensor, column: Tensor | None = None, *, eps: float) -> Tensor:
        """U of a piece."""
        v = row.clone() if column is None else row.unsqueeze(-1) * column.unsqueeze(-2)
        return v.clamp_(min=eps * eps).rsqrt_().mul_(g)


RULES: dict[str, type[TransformersRule] | type[TorchRule]] = {"transformers": TransformersRule, "torch": TorchRule}


def _initial_state(p: Tensor) -> dict[str, Any]:
    zeros = functools.partial(torch.zeros, dtype=exact_dtype(p), device=p.device)
    if p.dim() < 2:
        return {"step": 0, "second": zeros(p.numel())}
    return {"step": 0, "row": zeros(p.shape[:-1]), "column": zeros(p.shape[:-2] + p.shape[-1:])}


def _exact(t: Tensor) -> Tensor:
    return t.to(exact_dtype(t))


def _update_moments(moments: list[Tensor], grads: list[Tensor], eps: float, decay: float) -> None:
    """Update R and C, or V for a vector, in place: moving averages."""
    if len(moments) == 2:
        update_moments(moments[0], moments[1], grads, eps, decay)
    else:
        squares = torch.cat([grad.to(moments[0].dtype).square() for grad in grads])
        moments[0].lerp_(squares.add_(eps), 1.0 - decay)


def _cut(factors: list[Tensor], grads: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """The factors for each piece of a gradient; all pieces of a matrix share the column factors."""
    sizes = [len(grad) for grad in grads]
    if factors[-1].dim() == 1 and len(factors) == 2:
        return [(row, factors[1]) for row in factors[0].split(sizes)]
    return list(zip(*(factor.split(sizes) for factor in factors), strict=True))
