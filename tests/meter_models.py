"""Small models and training steps for the tests of the memory meter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from membench.training.loop import training_step
from membench.training.metering import meter_cycle

BATCH = 4


def roberta(**given: Any) -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=66,
        **given,
    )
    return transformers.RobertaForSequenceClassification(config)


def llama(**given: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        use_cache=False,
        **given,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(**given: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=300,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        **given,
    )
    return transformers.GPT2LMHeadModel(config)


def build(
    make: Callable[..., nn.Module], dtype: torch.dtype = torch.float32, checkpointing: bool | None = None, **given: Any
) -> nn.Module:
    """A model in training mode; `checkpointing` is None, or whether it is re-entrant."""
    torch.manual_seed(0)
    with default_dtype(dtype):
        model = make(**given).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Builds in `dtype`: fake parameters can't be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def text_batch(step: int, *, classes: bool, length: int = 32) -> dict[str, Tensor]:
    """Random tokens, one sequence padded: transformers leaves a mask of ones out, unless it is fake."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(3, 300, (BATCH, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, length // 2 :] = 0
    labels = torch.randint(0, 2, (BATCH,), generator=generator) if classes else tokens.clone()
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def text_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def input_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The sum of the outputs: its backward pass allocates one scalar before the model's own."""
    return model(batch["input"]).sum()


def meter(model: nn.Module, optimizer: Any, *inputs: Tensor, **given: Any) -> dict[str, Any]:
    """The report on two steps a selection, each with a fresh copy of `inputs` as micro-batches."""
    return meter_cycle(model, optimizer, input_loss, lambda step: [{"input": x.clone()} for x in inputs], **given)


def train(model: nn.Module, optimizer: Any, batches: list[dict[str, Tensor]], loss_fn: Any) -> None:
    """Steps that nobody meters."""
    for batch in batches:
        training_step(model, optimizer, loss_fn, [batch], phase=lambda name: nullcontext())
