"""Cross entropy of each token of a causal language model, without an fp32 copy of all its logits."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tasks.models.loss_chunks import IGNORED, ChunkedForward

PIECES = 16  # of the logits are computed with in turn; of a fixed number, so that memory is linear in the batch


def token_losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross entropy of each token's prediction of the next, (batch, tokens) fp32; 0 without a label.

    The negative log-probability of the next token. If the model computes its loss in pieces (`loss_chunks`), so are
    these.

    Args:
        model: a causal language model of transformers.
        inputs: `input_ids` and `attention_mask` (batch, tokens).
        labels: the ids, or `IGNORED`, (batch, tokens).
    """
    if isinstance(model.forward, ChunkedForward):
        return model(**inputs, labels=labels, use_cache=False).token_losses.view(labels.shape)
    logits = model(**inputs, use_cache=False).logits  # (batch, tokens, vocabulary)
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten()).view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy in fp32 of logits (tokens, vocabulary) and targets (tokens,), in any dtype of the logits.

    torch's own keeps the log-softmax of all logits in fp32, and its backward pass makes two more tensors as large.
    This keeps the logits, which exist anyway, and makes one tensor in their dtype: their gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normalizers = torch.cat([piece.float().logsumexp(1) for piece in logits.chunk(PIECES)])  # (tokens,)
        ctx.save_for_backward(logits, targets, normalizers)
        chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return torch.where(targets == IGNORED, 0.0, normalizers - chosen.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        grad = grad.masked_fill(targets == IGNORED, 0.0)[:, None]
        normalizers, indices = normalizers[:, None], targets.clamp(min=0)[:, None]
        found = torch.empty_like(logits)
        rows = zip(*(whole.chunk(PIECES) for whole in (found, logits, normalizers, indices, grad)), strict=True)
        for into, piece, normalizer, index, share in rows:
            softmax = (piece.float() - normalizer).exp_()
            into.copy_(softmax.mul_(share).scatter_add_(1, index, -share))
        return found, None
