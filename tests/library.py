"""What the tests of the library's cases share: a method on a tiny model, and what a model is, from outside."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import optimizers
from optimizers import MemoryEfficientOptimizer
from optimizers.contract import Subject, build_model, train

every_method = pytest.mark.parametrize("method", optimizers.available())


def subject(method: str, **more: Any) -> Subject:
    cls = optimizers.get(method)
    return Subject(cls, {**cls.example, **more})


def trained(method: str, steps: int = 4, **more: Any) -> tuple[nn.Module, MemoryEfficientOptimizer]:
    model = build_model()
    optimizer = subject(method, **more).build(model)
    train(model, optimizer, steps)
    return model, optimizer


def same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def description(model: nn.Module) -> dict[str, Any]:
    parts = {
        name: (type(m), list(m._modules), list(m._parameters), sorted(vars(m))) for name, m in model.named_modules()
    }
    hooks = {
        name: [len(value) for key, value in sorted(vars(m).items()) if key.endswith("hooks")]
        for name, m in model.named_modules()
    }
    parameters = {
        name: (
            id(p),
            p.requires_grad,
            p.grad is None,
            p.grad_dtype,
            len(p._post_accumulate_grad_hooks or ()),
            p.detach().clone(),
        )
        for name, p in model.named_parameters()
    }
    return {"parts": parts, "hooks": hooks, "parameters": parameters}


def unlike(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before if not same(before[key], after[key])]


TOKENS = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))


def config(kind: Any, **given: Any) -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return kind(**{**shape, "num_key_value_heads": 4, **tokens, "use_cache": False, **given})


def build(configuration: Any, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind.from_config(configuration).train()


def tiny_mamba() -> Any:
    return build(transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4))


def gemma3() -> Any:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 60, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    images = {"mm_tokens_per_image": 4, "image_token_index": 50, "boi_token_index": 51, "eoi_token_index": 52}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    both = {"text_config": {**text, **special}, "vision_config": {**vision, "image_size": 28, "patch_size": 14}}
    return build(transformers.Gemma3Config(**both, **images), transformers.AutoModelForImageTextToText)


def steps(model: Any, optimizer: MemoryEfficientOptimizer, tokens: torch.Tensor, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
