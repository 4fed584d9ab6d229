"""What is to be planned: a model, the shape of its batches, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from membench.config.options import WorkloadOptions
from membench.training.activations import offloading

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Workload(WorkloadOptions):
    """A model and a training step on it, without the method.

    Attributes:
        model: a built-in configuration (NAME or config:NAME), a folder or file with a config.json, or an id of the hub.
        batch_size: sequences a step.
        sequence_length: tokens each.
        dtype: of the weights.
        checkpointing: recompute each layer in the backward pass (not re-entrant).
        checkpointing_every: only every so manieth layer.
        loss_chunks: pieces of the sequence that the logits are computed in.
        offload_activations: they wait for the backward pass in the host's memory.
        attention: implementation, as transformers calls it: "sdpa", "eager"; None: its choice for the model.
        trust_remote_code: run code that comes with a model of the hub.
        loss: a key of `LOSSES`.
    """

    loss: str = "model"


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss as the model of transformers computes it today."""
    return model(**batch).loss


def shifted_copy_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The causal loss of transformers up to 4.44 (2024): one more fp32 copy of the logits, shifted by one token."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits.float()  # (batch, tokens, vocabulary)
    shifted = logits[..., :-1, :].contiguous()
    labels = batch["labels"][..., 1:].contiguous()
    return nn.functional.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels.view(-1))


LOSSES: dict[str, Loss] = {"model": model_loss, "shifted-copy": shifted_copy_loss}


def loss_function(workload: Workload) -> Loss:
    """The loss of a training step."""
    loss = LOSSES[workload.loss]
    return offloading(loss) if workload.offload_activations else loss


def make_batch(workload: Workload, classes: int | None, device: str | None = None) -> Batch:
    """A micro-batch: token ids and a mask (batch, tokens), and labels, of tokens or (with classes) of sequences."""
    tokens = torch.zeros(workload.batch_size, workload.sequence_length, dtype=torch.long, device=device)
    mask = torch.ones_like(tokens)
    if device is not None and workload.sequence_length > 1:
        mask[0, -1] = 0  # transformers leaves a mask of ones out, unless it can't see the values
    labels = tokens.clone() if classes is None else torch.zeros(workload.batch_size, dtype=torch.long, device=device)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}
