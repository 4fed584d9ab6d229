"""The Hugging Face Trainer for methods that need a say in the backward pass.

Most methods work in a stock one: `Trainer(model, ..., optimizers=(BAdam(model, lr=1e-5), None))`. Those that update
inside the backward pass (`in_backward`) or must see the loss (`needs_loss`: BlockLLM, clipped LOMO) need this one: it
calls `optimizer.backward(loss)` and refuses the arguments that would silently do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from optimizers import MemoryEfficientOptimizer


class MethodTrainer(Trainer):
    """A `Trainer` that lets the method compute the gradients: `MethodTrainer(..., optimizers=(LOMO(model), None))`.

    Args:
        As of `Trainer`; `optimizers` must hold a `MemoryEfficientOptimizer`.

    Raises:
        TypeError: `optimizers` holds none.
        ValueError: the arguments ask for what the method can't do: gradient accumulation or clipping by the trainer for
            a method that updates inside the backward pass, fp16 loss scaling for either kind.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.optimizer, MemoryEfficientOptimizer):
            raise TypeError(
                "MethodTrainer needs optimizers=(method, scheduler or None) with a method of membench, "
                f"not {type(self.optimizer).__name__}; for a stock optimizer use transformers.Trainer"
            )
        self.method = self.optimizer
        check_arguments(self.method, self.args)
        self.accelerator.backward = self._backward

    def _backward(self, loss: torch.Tensor, **_: Any) -> None:
        self.method.backward(loss)


def check_arguments(method: MemoryEfficientOptimizer, args: TrainingArguments) -> None:
    """Refuse arguments of a Trainer that `method` can't honour.

    Raises:
        ValueError: names the argument, its value and the way out.
    """
    name = type(method).__name__
    if args.fp16:
        raise ValueError(f"{name} computes its own gradients, which fp16 loss scaling can't reach: use bf16=True")
    if not method.in_backward:
        return
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"{name} updates inside the backward pass, so gradient_accumulation_steps must be 1, "
            f"not {args.gradient_accumulation_steps}: use a larger per_device_train_batch_size"
        )
    if args.max_grad_norm:
        raise ValueError(
            f"{name} updates inside the backward pass, where max_grad_norm={args.max_grad_norm} can't reach the "
            "gradients: set max_grad_norm=0 (LOMO clips by itself: clip_norm)"
        )
