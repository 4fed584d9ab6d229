"""Ways to save activations, for any method: recompute them, split the sequence, or offload them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from membench.config.options import TrainingOptions, WorkloadOptions
from membench.training.checkpointing import checkpoint_layers
from tasks.models.loss_chunks import compute_loss_in_chunks

if TYPE_CHECKING:
    from membench.training.loop import Batch, Loss


def set_up_activations(model: nn.Module, options: TrainingOptions | WorkloadOptions) -> None:
    """Make a new model checkpoint its layers and compute its loss in pieces, as `options` say.

    Raises:
        ValueError: the model doesn't support it, or an option needs another one.
    """
    every = options.checkpointing_every
    if options.checkpointing:
        checkpoint_layers(model, every)
    elif every > 1:
        raise ValueError(f"--checkpointing-every {every} says which layers are checkpointed: add --checkpointing")
    if options.loss_chunks > 1:
        try:
            compute_loss_in_chunks(model, options.loss_chunks)
        except ValueError as error:
            raise ValueError(f"--loss-chunks: {error}") from error


def check_pieces(options: TrainingOptions | WorkloadOptions, *, of_pairs: bool) -> None:
    """Raises ValueError if the loss is to be computed in more pieces than a process's micro-batch has tokens.

    An example `of_pairs` is two sequences.
    """
    processes = options.processes if isinstance(options, TrainingOptions) else 1  # a plan's batch is that of each GPU
    sequences = options.batch_size // options.gradient_accumulation_steps // processes * (2 if of_pairs else 1)
    tokens = sequences * options.sequence_length
    if options.loss_chunks > tokens:
        raise ValueError(
            f"--loss-chunks {options.loss_chunks}: {sequences} x {options.sequence_length} tokens have at most "
            f"{tokens} pieces: give fewer"
        )


def offloading(loss: Loss) -> Loss:
    """The same loss, with activations kept in host memory until the backward pass."""

    def offloaded(model: nn.Module, batch: Batch) -> Tensor:
        with OffloadedActivations(model):
            return loss(model, batch)

    return offloaded


class Layout(NamedTuple):
    """A tensor's layout, without its values."""

    size: torch.Size
    stride: list[int]
    dtype: torch.dtype

    def empty(self, device: torch.device | None = None, *, pin_memory: bool = False) -> Tensor:
        """A new tensor with this layout."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device, pin_memory=pin_memory)


class OnHost(NamedTuple):
    """A tensor moved to the host; for a fake one, only its layout."""

    values: Tensor | None
    layout: Layout
    device: torch.device


class OffloadedActivations(torch.autograd.graph.saved_tensors_hooks):
    """Within this context, what autograd saves goes to pinned host memory, until the backward pass asks for it.

    Like torch's `save_on_cpu`, except that weights aren't copied: they stay on the device anyway, or FSDP gathers them
    again. Fake tensors are all on the CPU: those that would be on the host are dropped.
    """

    def __init__(self, model: nn.Module):
        kept = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        super().__init__(lambda t: t if _storage(t) in kept or _is_weight(t) else _to_host(t), _from_host)


def _is_weight(tensor: Tensor) -> bool:
    """Is it a parameter, or a view of one? FSDP's gathered weights aren't among the model's until its layer runs."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _to_host(tensor: Tensor) -> OnHost:
    layout = Layout(tensor.shape, _dense_stride(tensor), tensor.dtype)
    values = None
    if not isinstance(tensor, FakeTensor):
        values = layout.empty(pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
    return OnHost(values, layout, tensor.device)


def _dense_stride(tensor: Tensor) -> list[int]:
    """Strides of a copy without gaps, with dimensions in the same order: kernels then take the same path as before."""
    stride, step = [0] * tensor.dim(), 1
    for dimension in sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), -d)):
        stride[dimension], step = step, step * tensor.shape[dimension]
    return stride


def _from_host(saved: Any) -> Tensor:
    if not isinstance(saved, OnHost):
        return saved
    if saved.values is None:
        return saved.layout.empty(saved.device)
    return saved.values.to(saved.device, non_blocking=True)
