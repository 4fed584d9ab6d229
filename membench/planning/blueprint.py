"""A model that can be built with any depth, on fake tensors: no weights are ever read."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from membench.planning.layers import kinds, simulated_depths
from membench.planning.workload import Batch, Workload, make_batch, tokens_shape
from membench.training.activations import set_up_activations
from optimizers.shared.matrices import expert_tensors
from optimizers.shared.sharded import has_values
from tasks.base import Kind
from tasks.models.damage import said_in_a_sentence
from tasks.models.encoding import has_token_types
from tasks.models.loading import quiet
from tasks.models.source import (
    CONFIGURATIONS,
    DTYPES,
    PREFIX,
    UNKNOWN_TO_KIND,
    Source,
    kept_in_fp32,
    longest_stated,
    without_dropout,
)

CONFIG_FILE = "config.json"


class Blueprint:
    """The configuration of a workload's model, and how to build it.

    Raises:
        ValueError: there is no such model, or it isn't a language model known to transformers.
    """

    def __init__(self, workload: Workload):
        self.workload = workload
        parts = workload.gradient_accumulation_steps
        if workload.batch_size % parts:
            raise ValueError(
                f"--batch-size {workload.batch_size} can't be split into {parts} equal micro-batches: choose a multiple"
            )
        if workload.gpus == 1 and workload.strategy != "fsdp2":
            raise ValueError(f"--strategy {workload.strategy} is for several GPUs: also give --gpus")
        self.source = Source(source_name(self.workload.model), self.workload.trust_remote_code)
        self.depth = self._layers()
        # By what is planned: two depths that tell this one, whatever the batch and the sequence; none if none do.
        self.telling: dict[Hashable, tuple[int, ...]] = {}
        if workload.task and not self.is_causal:
            raise ValueError(
                f"--task {workload.task} trains causal language models: {workload.model!r} is an encoder "
                f"({self.source.config.model_type})"
            )

    def with_workload(self, **changes: Any) -> Blueprint:
        """The blueprint of a changed workload; if the model doesn't change, what is known about the model is kept."""
        if not set(changes) <= {"batch_size", "sequence_length", "gpus", "loss_chunks"}:
            return Blueprint(replace(self.workload, **changes))
        return self._with(replace(self.workload, **changes))

    def with_size(self, option: str, at: int) -> Blueprint:
        """The blueprint with batches of another size: see `Workload.with_size`."""
        return self._with(self.workload.with_size(option, at))

    def _with(self, workload: Workload) -> Blueprint:
        other = copy.copy(self)
        other.workload = workload
        return other

    @property
    def longest_sequence(self) -> int | None:
        """How many tokens the model has positions for; None if it doesn't say."""
        return longest_stated(self.source.config, self.skeleton)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model with its own depth, without values."""
        with torch.device("meta"):
            return self.build(self.depth)

    @property
    def parameters(self) -> int:
        """Number of weights in the model."""
        return sum(p.numel() for p in self.skeleton.parameters())

    @property
    def fused_weights(self) -> int:
        """Number of weights in fused experts: tensors of several matrices."""
        return sum(p.numel() for p in expert_tensors(self.skeleton))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The depths to simulate: a few if layers repeat and shallower models have the same ones, else its own."""
        listed = self._per_layer()
        own = list(kinds(self.skeleton, listed).values())
        depths = simulated_depths(own)
        if len(own) != self.depth or len(depths) == 1:
            return (self.depth,)
        cut = {name: values[: depths[-1]] for name, values in listed.items()}
        try:
            with torch.device("meta"):
                shallower = kinds(self.build(depths[-1]), cut)
        except ValueError:  # there is no model of fewer layers: something else says how many there are
            return (self.depth,)
        return depths if list(shallower.values()) == own[: depths[-1]] else (self.depth,)

    @cached_property
    def shallowest(self) -> int:
        """The least depth with layers of all kinds."""
        alike = len(set(kinds(self.skeleton, self._per_layer()).values())) == 1
        return 1 if alike else self.depths[0]

    @property
    def is_causal(self) -> bool:
        """Does the loss predict the next token? Encoders, and models such as T5, classify the sequence instead."""
        kind = self.source.config.model_type
        classifies = kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        return kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and (
            kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not classifies
        )

    @property
    def task_kind(self) -> Kind:
        """The kind of a task that has this workload."""
        if self.workload.task == "dpo":
            return "preference"
        return "language" if self.is_causal else "classification"

    @property
    def kind(self) -> Any:
        """The auto class that builds the model."""
        if self.is_causal:
            return transformers.AutoModelForCausalLM
        return transformers.AutoModelForSequenceClassification

    @cached_property
    def head(self) -> tuple[str, ...]:
        """Name patterns of what fine-tuning adds to the checkpoint: an encoder's classifier."""
        return () if self.is_causal else classifier(self.source.skeleton(self.kind))

    def build(self, depth: int) -> nn.Module:
        """The model with `depth` layers, in training mode; call it inside a `FakeTensorMode`.

        Raises:
            ValueError: the model doesn't support the workload's options for activations.
        """
        with default_dtype(DTYPES[self.workload.dtype]), quiet(), no_values_for_none():
            model = self._new(depth)
            for name in kept_in_fp32(model, DTYPES[self.workload.dtype]):
                module, _, own = name.rpartition(".")
                tensor = getattr(model.get_submodule(module), own)
                tensor.data = tensor.data.float()
        set_up_activations(model, self.workload)
        return model.train()

    @property
    def attention(self) -> str:
        """The implementation of attention that transformers chooses."""
        config: Any = self.skeleton.config
        return str(config._attn_implementation)

    def _new(self, depth: int) -> Any:
        way_out = "one that `membench list models` names, a folder or a hub id"
        values, attention = self.source.config.to_dict(), self.workload.attention
        try:
            with said_in_a_sentence("model", self.workload.model, way_out, values=values):
                try:
                    return self._of_config(depth, attention)
                except ValueError:
                    if attention is None:
                        raise
                    self._of_config(depth, None)  # fails again, unless it was for the attention
        except ValueError as error:
            if UNKNOWN_TO_KIND in str(error):
                raise self.source.unsuitable(self.kind) from error
            raise
        raise ValueError(
            f"--attention {attention}: transformers has no such implementation for {self.workload.model!r} "
            f"({self.source.config.model_type}): leave it out"
        )

    def _of_config(self, depth: int, attention: str | None) -> Any:
        return self.kind.from_config(
            self.config(depth),
            dtype=DTYPES[self.workload.dtype],  # a checkpoint has its own in its configuration
            attn_implementation=attention,
            trust_remote_code=self.workload.trust_remote_code,
        )

    def batch(self, device: str | None = None, generator: torch.Generator | None = None) -> Batch:
        """A micro-batch of the workload; on a `device` of random tokens, the same ones unless a `generator` is given.

        With equal tokens a GPU is faster, and most experts have none; padding's have no gradient. A text to classify
        ends like the model's texts.
        """
        shape = tokens_shape(self.workload)
        if device is None:
            tokens = torch.zeros(shape, dtype=torch.long)
        else:
            generator = generator or torch.Generator("cpu").manual_seed(0)
            drawn = torch.randint(len(self._words), shape, generator=generator, device="cpu")  # whatever the default
            tokens = self._words[drawn].to(device)
        batch = make_batch(self.workload, tokens, None if self.is_causal else 2)
        end = getattr(self.source.config, "eos_token_id", None)
        if device is not None and not self.is_causal and isinstance(end, int):
            batch["input_ids"][:, -1] = end
        if not self.is_causal and has_token_types(self.source.config):
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch

    @cached_property
    def _words(self) -> Tensor:
        """The ids of tokens for which the configuration has no special use."""
        vocabulary = getattr(self.source.config.get_text_config(), "vocab_size", 1)
        special = set(_special(self.source.config.to_dict()))
        return torch.tensor([token for token in range(vocabulary) if token not in special] or [0], device="cpu")

    def config(self, depth: int) -> Any:
        """The configuration with `depth` layers, and its per-layer lists cut to match."""
        config = type(self.source.config).from_dict(self.source.config.to_dict())
        if depth != self.depth:
            per_layer = self._per_layer()
            config.num_hidden_layers = depth
            for name, values in per_layer.items():
                setattr(config, name, values[:depth])
        config.use_cache = False
        if self.workload.task == "dpo":
            config.update(without_dropout(config))
        return config

    def _layers(self) -> int:
        try:
            depth = self.source.config.num_hidden_layers
            if not isinstance(depth, int) or depth < 1:
                raise ValueError(
                    f"model {self.workload.model!r} has num_hidden_layers {depth!r} in its configuration: "
                    "give a number of at least 1"
                )
            return depth
        except AttributeError:
            kind = self.source.config.model_type
            raise ValueError(
                f"model {self.workload.model!r} ({kind}) doesn't say its number of layers: "
                "only models of text are planned"
            ) from None

    def _per_layer(self) -> dict[str, list[Any]]:
        """What the configuration lists per layer, such as the types of attention."""
        depth = self.source.config.num_hidden_layers
        values = self.source.config.to_dict()
        return {key: value for key, value in values.items() if isinstance(value, list) and len(value) == depth}


def _special(config: dict[str, Any]) -> Iterator[int]:
    """The ids in what a configuration calls `..._token_id` or the like, its parts' among them."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif str(name).endswith(("token_id", "token_index")):
            yield from value if isinstance(value, list) else [value]


def source_name(model: str) -> str:
    """The name that `tasks.models.source.Source` takes."""
    if model in CONFIGURATIONS:
        return PREFIX + model
    if model.startswith(PREFIX):
        return model
    path = Path(model)
    if "/" not in model and not path.exists() and difflib.get_close_matches(model.lower(), CONFIGURATIONS, cutoff=0.75):
        return PREFIX + model  # misspelt: refused with the right name, without asking the hub
    return str(path.parent) if path.name == CONFIG_FILE and path.is_file() else model


def classifier(model: nn.Module) -> tuple[str, ...]:
    """The outermost modules with parameters that the bare model doesn't have."""
    prefix = model.base_model_prefix
    return tuple(
        name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Builds in `dtype`: fake parameters can't be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def no_values_for_none() -> Iterator[None]:
    """Inside a `FakeTensorMode`, builds without first values of weights, which may depend on what was drawn."""
    initialize = PreTrainedModel.initialize_weights
    if not has_values(torch.empty(0)):
        PreTrainedModel.initialize_weights = lambda self, *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = initialize  # type: ignore[method-assign]


def within_positions(workload: Workload) -> Workload:
    """The same with sequences no longer than the model has positions for: where no length was asked for."""
    longest = Blueprint(workload).longest_sequence or workload.sequence_length
    return replace(workload, sequence_length=min(longest, workload.sequence_length))
