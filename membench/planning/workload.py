"""What to plan: a model, the shape of its batches, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from membench.config.options import WorkloadOptions
from membench.training.activations import offloading
from optimizers.shared.sharded import has_values
from tasks.models import language
from tasks.models.preference import Preference

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Workload(WorkloadOptions):
    """A model and a training step on it, without the method.

    Attributes:
        model: a built-in configuration (NAME or config:NAME), a folder or file with a config.json, or a hub id.
        batch_size: sequences per step; for "dpo" pairs of them.
        sequence_length: tokens per sequence.
        gradient_accumulation_steps: micro-batches into which they are split.
        dtype: of the weights.
        checkpointing: recompute each layer in the backward pass (not re-entrant).
        checkpointing_every: only every Nth layer.
        loss_chunks: number of pieces of the sequence in which the logits are computed.
        offload_activations: keep them in host memory until the backward pass.
        attention: transformers' name of the implementation: "sdpa", "eager"; None: its choice for the model.
        gpus: ranks that train together; batches are those of each.
        strategy: how they share the model: "fsdp2", "replicate".
        trust_remote_code: run code that comes with a model on the hub.
        task: "dpo" for its loss and its batches; None for the model's own loss.
        loss: a key of `LOSSES`, if there is no task.
        device: "cuda" for what the kernels of a GPU keep, whatever makes the plan; "cpu" for what those of a CPU do.
    """

    loss: str = "model"
    device: str = "cuda"

    @property
    def shards(self) -> int:
        """Over how many GPUs the model is sharded."""
        return self.gpus if self.strategy == "fsdp2" else 1

    @property
    def micro_batch_size(self) -> int:
        """Sequences (for "dpo" pairs of them) that are computed at a time."""
        return self.batch_size // self.gradient_accumulation_steps

    def with_size(self, option: str, at: int) -> Workload:
        """With other micro-batches ("micro_batch_size"), as many as before, or another "sequence_length"."""
        if option == "micro_batch_size":
            return replace(self, batch_size=at * self.gradient_accumulation_steps)
        return replace(self, sequence_length=at)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss as the transformers model computes it today."""
    return model(**batch).loss


def shifted_copy_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The causal loss of transformers up to 4.44 (2024): one more fp32 copy of the logits, shifted by one token."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float()  # (batch, tokens, vocabulary)
    shifted = logits[..., :-1, :].contiguous()
    labels = batch["labels"][..., 1:].contiguous()
    return nn.functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels.view(-1))


PACKED = "packed"  # several texts in a sequence, which a mask of each pair of tokens keeps apart
LOSSES: dict[str, Loss] = {"model": model_loss, "shifted-copy": shifted_copy_loss, PACKED: language.loss}
OF_TASKS: dict[str, Loss] = {"dpo": Preference().loss}


def loss_function(workload: Workload) -> Loss:
    """The loss of a training step."""
    loss = OF_TASKS[workload.task] if workload.task else LOSSES[workload.loss]
    return offloading(loss) if workload.offload_activations else loss


def tokens_shape(workload: Workload) -> tuple[int, int]:
    """(sequences, tokens) of a micro-batch; "dpo" has two sequences for each preference."""
    sequences = 2 * workload.micro_batch_size if workload.task == "dpo" else workload.micro_batch_size
    return sequences, workload.sequence_length


def make_batch(workload: Workload, tokens: Tensor, classes: int | None) -> Batch:
    """A micro-batch of `tokens` (batch, tokens): a mask like them, and labels of tokens or (with classes) of texts.

    For "dpo" that of a preference: the reference's log-probability of each sequence.
    """
    sequences, device = len(tokens), tokens.device
    mask = torch.ones_like(tokens)
    if has_values(tokens) and workload.sequence_length > 1:
        mask[0, -1] = 0  # transformers drops a mask of all ones, unless it can't see the values
    if workload.task == "dpo":
        reference = torch.zeros(sequences, device=device)
        return {"input_ids": tokens, "attention_mask": mask, "targets": tokens.clone(), "reference": reference}
    labels = tokens.clone() if classes is None else torch.zeros(sequences, dtype=torch.long, device=device)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    if workload.loss == PACKED:
        batch["position_ids"] = torch.arange(workload.sequence_length, device=device).expand_as(tokens).contiguous()
    return batch
