"""A causal language model's loss over pieces of the sequence: the logits of the whole sequence never exist.

With a vocabulary of 128,256 the logits of 2 x 1024 tokens take 1 GiB in fp32, and several times that in the backward
pass. Each piece's logits are dropped after its forward pass and recomputed in its backward pass, at the cost of one
extra multiplication by the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

IGNORED = -100  # the label of a token that the loss leaves out
PROBE = (2, 8)  # sequences and tokens on which both losses are compared


@dataclass
class ChunkedOutput(ModelOutput):
    """What a model returns if there are labels: no logits.

    Attributes:
        loss: mean cross entropy over the tokens that have a label.
        token_losses: cross entropy of each token's prediction of the next, of all sequences, (batch x tokens,) fp32; 0
            without a label.
    """

    loss: Tensor | None = None
    token_losses: Tensor | None = None


def compute_loss_in_chunks(model: nn.Module, chunks: int) -> None:
    """From now on `model(..., labels=labels)` computes its loss over `chunks` pieces of its tokens.

    Loss and gradients are those of the whole sequence except for the order of summation; in low precision the head's
    gradient is rounded once per piece. Without labels the model returns all logits, as before.

    Raises:
        ValueError: it isn't a causal language model of transformers whose loss is the mean cross entropy of its logits.
    """
    forward = ChunkedForward(model, _decoder(model), chunks)
    if _has_values(model):
        _check_equal(model, forward)
    model.forward = forward


class ChunkedForward:
    """Replaces a model's `forward`: the model's own up to the head, then its own head on each piece in turn.

    The decoder is made to return what it computed before, so anything a model does to its logits (scaling,
    soft-capping) is done by the model itself.

    Args:
        model: of transformers.
        decoder: the part before the head.
        chunks: number of pieces of the sequence.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, chunks: int):
        self.whole, self.decoder, self.chunks = model.forward, decoder, chunks

    def __call__(
        self, *args: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **given: Any
    ) -> Any:
        if labels is None:
            return self.whole(*args, **given)
        output = self._decode(*args, **given)
        targets = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        # of all sequences together, so that a piece isn't a copy: (tokens, width)
        hidden = output.last_hidden_state.flatten(0, 1).chunk(self.chunks)
        pieces = zip(hidden, targets.flatten().chunk(self.chunks), strict=True)
        losses = [checkpoint(self._losses, type(output), *piece, use_reentrant=False) for piece in pieces]
        token_losses = torch.cat(losses)  # not a view of it, which FSDP warns of
        # a Trainer gives the number of all micro-batches, and then doesn't divide by theirs
        items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return ChunkedOutput(loss=token_losses.sum() / items, token_losses=token_losses)

    def _decode(self, *args: Any, **given: Any) -> Any:
        """The decoder's output; the head gets an empty sequence."""
        found: list[Any] = []
        compute = self.decoder.forward

        def cut(*args: Any, **given: Any) -> Any:
            found.append(compute(*args, **given))
            return type(found[0])(last_hidden_state=found[0].last_hidden_state[:, :0])

        with _replaced(self.decoder, cut):
            self.whole(*args, **given)
        return found[0]

    def _losses(self, kind: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of each token of a piece, (tokens,), from its hidden states (tokens, width)."""
        with _replaced(self.decoder, lambda *_, **__: kind(last_hidden_state=hidden[None])):
            logits = self.whole(input_ids=targets[None]).logits[0]  # (tokens, vocabulary)
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replace `forward` within this context."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _decoder(model: nn.Module) -> nn.Module:
    """The part before the head. Raises ValueError like `compute_loss_in_chunks`."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(f"{name} isn't a causal language model: it has no logits of a sequence to compute in pieces")
    if model.loss_function is not ForCausalLMLoss or getattr(model.config, "output_router_logits", False):
        raise ValueError(f"{name} has a loss of its own, which can't be computed in pieces of the sequence")
    decoder: nn.Module = model.get_decoder()
    decoder = model.base_model if decoder is model else decoder
    if decoder is model:
        raise ValueError(f"{name} doesn't separate its decoder from its head, so its loss can't be computed in pieces")
    return decoder


def _has_values(model: nn.Module) -> bool:
    return not any(isinstance(p, FakeTensor) or p.is_meta for p in model.parameters())


@torch.no_grad()
def _check_equal(model: Any, forward: ChunkedForward) -> None:
    """Compare the model's own loss with that in pieces on a few tokens."""
    like = next(model.parameters())
    entries = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(PROBE[0] * PROBE[1], device=like.device).view(PROBE) % entries
    training = model.training
    model.eval()  # without dropout, and so without random numbers
    own, ours = (float(f(input_ids=tokens, labels=tokens, use_cache=False).loss) for f in (model.forward, forward))
    model.train(training)
    tolerance = 1e-5 if like.dtype == torch.float32 else 1e-2
    if not abs(own - ours) <= tolerance * abs(own):
        raise ValueError(f"{type(model).__name__} has a loss of its own: {own:.6f} where it is {ours:.6f} in pieces")
