"""The Hugging Face Trainer on several processes: replicas without a wrapper, and checkpoints of FSDP2's shards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env, save_fsdp_model
from torch import nn
from transformers import Trainer

from membench.training.parallel import whole
from optimizers import MemoryEfficientOptimizer

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # files of a checkpoint, as in a stock Trainer's without FSDP


class TrainerOnProcesses(Trainer):
    """A `Trainer` whose `method` works under `torchrun` and `accelerate launch`, with FSDP2 or as replicas.

    Raises:
        ValueError: DeepSpeed was asked for, or FSDP where accelerate would ignore it, as on CPUs.
    """

    method: MemoryEfficientOptimizer | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, but replicas get no `DistributedDataParallel`: the method itself averages gradients."""
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        if self.is_deepspeed_enabled:
            raise ValueError("MethodTrainer can't use DeepSpeed, which updates by itself: use fsdp=True, FSDP2")
        asked = self.args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
        if asked and self._has_replicas():
            raise ValueError(
                f"FSDP was asked for, but accelerate doesn't shard with {accelerator.distributed_type.value}: leave it "
                "out (fsdp, accelerate's configuration), and the processes train replicas"
            )
        accelerator.clip_grad_norm_ = self._averaging_first(accelerator.clip_grad_norm_)
        if self._has_replicas():
            accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)

    def _has_replicas(self) -> bool:
        return self.accelerator.distributed_type.value.startswith("MULTI_")

    def _averaging_first(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(clip)
        def clip_averaged(*args: Any, **given: Any) -> Any:
            if self.method is not None and not self.method.in_backward:
                self.method.average_gradients()
            return clip(*args, **given)

        return clip_averaged

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`; replicas of the model start equal and stay so."""
        optimizer = super().create_optimizer(model)
        if self.method is not None and self._has_replicas() and not self.method.is_data_parallel:
            self.method.data_parallel()
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.method is not None and self.method.adds_parameters and (state_dict is None or self.is_fsdp_enabled):
            state_dict = whole(self.method.finished_state_dict())
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in `Trainer`; of shards, whole tensors: torch's way drops what it finds no gradients for."""
        if self.method is None or not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_fsdp_model(self.accelerator.state.fsdp_plugin, self.accelerator, self.model, output_dir)
        state = whole(self.method.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER))
            torch.save(self._scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.method is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint, OPTIMIZER)
        if not path.exists():  # where a stock Trainer begins a new state and a new schedule, without a word
            raise ValueError(
                f"{checkpoint} has no {OPTIMIZER}, so training can't go on from it: it isn't a checkpoint that "
                "MethodTrainer saved, or save_only_model was set. To train its model anew, load it by from_pretrained"
            )
        if not self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        self.method.load_state_dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        self._scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER), weights_only=True))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in `Trainer`; None, which isn't logged, where no gradients are left to measure: theirs isn't 0."""
        if self.method is not None and (self.method.in_backward or self.method.asks_losses):
            return None
        return super()._get_grad_norm(model, grad_norm)

    @property
    def _scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        assert self.lr_scheduler is not None  # there is one once there is an optimizer
        return self.lr_scheduler
