"""A tiny random instance of each architecture that people fine-tune, and what is known of it from its paper or code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

LAYERS, WIDTH, INNER, HEADS, VOCABULARY, LENGTH, BATCH = 3, 32, 48, 4, 40, 10, 6


@dataclass(frozen=True)
class Architecture:
    """How to build it, and its layers as counted by hand.

    Attributes:
        model: class of transformers with its loss.
        config: of the tiny instance.
        layers: the list of its layers.
        attention: matrices of a layer's attention, by their names in the layer.
        mlp: matrices of the rest of the layer.
        norms: of a layer.
        tied: input and output embeddings are one tensor.
    """

    model: Callable[[Any], nn.Module]
    config: Callable[..., Any]
    layers: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    norms: int = 2
    tied: bool = False

    @property
    def is_causal(self) -> bool:
        return not self.head

    @property
    def head(self) -> tuple[str, ...]:
        """What fine-tuning adds to an encoder."""
        return HEADS_OF.get(self.model.__name__, ())

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Always with the same weights; large enough ones that a few steps teach it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.model(self.config()).to(dtype).train()

    def batch(self) -> dict[str, Tensor]:
        """Sequences to learn by heart, one of them padded."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, LENGTH // 2 :] = 0
        labels = tokens.where(mask == 1, -100) if self.is_causal else torch.arange(BATCH) % 2
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


HEADS_OF = {
    "RobertaForSequenceClassification": ("classifier",),
    "BertForSequenceClassification": ("classifier",),
    "DistilBertForSequenceClassification": ("pre_classifier", "classifier"),
}


def _llama(kind: Any, **given: Any) -> Callable[[], Any]:
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    own = {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": VOCABULARY, "use_cache": False}
    return lambda: kind(**shape, **own, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **given)


def _encoder(kind: Any, **given: Any) -> Callable[[], Any]:
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    own = {"max_position_embeddings": 64, "vocab_size": VOCABULARY, "initializer_range": 0.2}
    return lambda: kind(**shape, **own, **dropout, **given)


def _gpt2() -> Any:
    shape = {"n_embd": WIDTH, "n_inner": INNER, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    own = {"vocab_size": VOCABULARY, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2Config(**shape, **dropout, **own, initializer_range=0.2)


def _gpt_neox() -> Any:
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    own = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "use_cache": False, "use_parallel_residual": True}
    return transformers.GPTNeoXConfig(**shape, **own, bos_token_id=1, eos_token_id=2, initializer_range=0.2)


def _distilbert() -> Any:
    shape = {"dim": WIDTH, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": HEADS, "max_position_embeddings": 64}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    return transformers.DistilBertConfig(**shape, **dropout, vocab_size=VOCABULARY, initializer_range=0.2)


SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OF_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
BERT_MLP = ("intermediate.dense", "output.dense")

ARCHITECTURES = {
    "llama": Architecture(
        transformers.LlamaForCausalLM, _llama(transformers.LlamaConfig), "model.layers", SEPARATE, GATED
    ),
    "qwen2": Architecture(
        transformers.Qwen2ForCausalLM,
        _llama(transformers.Qwen2Config, tie_word_embeddings=True),
        "model.layers",
        SEPARATE,
        GATED,
        tied=True,
    ),
    "gemma2": Architecture(
        transformers.Gemma2ForCausalLM,
        _llama(transformers.Gemma2Config, head_dim=8, sliding_window=4),
        "model.layers",
        SEPARATE,
        GATED,
        norms=4,  # before and after attention and MLP
        tied=True,
    ),
    "mistral": Architecture(
        transformers.MistralForCausalLM,
        _llama(transformers.MistralConfig, sliding_window=4),
        "model.layers",
        SEPARATE,
        GATED,
    ),
    "gpt2": Architecture(
        transformers.GPT2LMHeadModel,
        _gpt2,
        "transformer.h",
        ("attn.c_attn", "attn.c_proj"),  # one Conv1D for queries, keys and values
        ("mlp.c_fc", "mlp.c_proj"),
        tied=True,
    ),
    "gpt-neox": Architecture(
        transformers.GPTNeoXForCausalLM,
        _gpt_neox,
        "gpt_neox.layers",
        ("attention.query_key_value", "attention.dense"),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "roberta": Architecture(
        transformers.RobertaForSequenceClassification,
        _encoder(transformers.RobertaConfig, type_vocab_size=1),
        "roberta.encoder.layer",
        OF_BERT,
        BERT_MLP,
    ),
    "bert": Architecture(
        transformers.BertForSequenceClassification,
        _encoder(transformers.BertConfig),
        "bert.encoder.layer",
        OF_BERT,
        BERT_MLP,
    ),
    "distilbert": Architecture(
        transformers.DistilBertForSequenceClassification,
        _distilbert,
        "distilbert.transformer.layer",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ("ffn.lin1", "ffn.lin2"),
    ),
}
