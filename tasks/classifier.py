"""Classifiers of texts: what SuperGLUE and one's own data share - model, tokenizer, batches and predictions."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from .encoding import Encoder
from .models import Source, check_fit
from .tokenization import load_tokenizer, train_tokenizer

EVALUATION_BATCH = 64  # sequences


@dataclass(frozen=True, slots=True)
class Example:
    """A text or a pair of texts with a class."""

    first: str
    second: str  # "" for a single text
    label: int
    group: str = ""  # of what is scored together: MultiRC's answers to a question, AX-g's pairs


class Classifier:
    """A model that classifies texts, or chooses one of several; its tokenizer; its inputs and outputs.

    Args:
        classes: how many there are; None for multiple choice.
        texts: what to train a tokenizer on, if the model is a built-in one that has none.
        model: see `tasks.create`.
        tokenizer: see `tasks.create`.
        sequence_length: tokens of a sequence.
        seed: of what is random in the weights.
        dtype: of the weights.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: the model can't classify, the tokenizer is missing, or they and the sequences don't fit together.
    """

    def __init__(
        self,
        classes: int | None,
        texts: Callable[[], Iterable[str]],
        *,
        model: str,
        tokenizer: str | None,
        sequence_length: int,
        seed: int,
        dtype: str,
        trust_remote_code: bool,
    ):
        self.classes, self.seed, self.dtype = classes, seed, dtype
        self.source = Source(model, trust_remote_code)
        self.tokenizer, self._tokenizer_said = self._tokenizer(tokenizer, texts)
        skeleton: Any = self.source.skeleton(self.kind, **self._settings)
        check_fit(model, skeleton, tokenizer=self.tokenizer, sequence_length=sequence_length)
        self.encoder = Encoder(self.tokenizer, skeleton, sequence_length)
        self._attention: str = skeleton.config._attn_implementation

    @property
    def from_scratch(self) -> bool:
        return self.source.from_scratch

    @property
    def kind(self) -> Any:
        """The auto class of transformers that builds the model."""
        if self.classes is None:
            return transformers.AutoModelForMultipleChoice
        return transformers.AutoModelForSequenceClassification

    @property
    def _settings(self) -> dict[str, int]:
        settings = {} if self.classes is None else {"num_labels": self.classes}
        if self.source.config.to_dict().get("pad_token_id") is None:  # a causal model needs it to find the last token
            settings["pad_token_id"] = self.tokenizer.pad_token_id
        return settings

    @functools.cached_property
    def head(self) -> tuple[str, ...]:
        """Outermost modules of which the checkpoint has nothing, e.g. ("classifier",)."""
        return self.source.head(self.kind, **self._settings)

    @property
    def provenance(self) -> dict[str, str | None]:
        """The model's part of `tasks.Task.provenance`."""
        return {
            "model_revision": self.source.revision,
            "tokenizer": self._tokenizer_said,
            "attention": self._attention,
        }

    def _tokenizer(self, name: str | None, texts: Callable[[], Iterable[str]]) -> tuple[Any, str]:
        if name is None and not self.from_scratch:
            name = self.source.own_tokenizer
        if name is not None:
            return load_tokenizer(name, self.source.trust_remote_code)
        size = self.source.configuration.own_vocabulary
        if size is None:
            raise ValueError(
                f"{self.source.name} has no tokenizer of its own: give --tokenizer with a folder or an id of the hub "
                f"(RoBERTa's is FacebookAI/roberta-base)"
            )
        tokenizer = train_tokenizer(texts(), size)
        return tokenizer, f"byte-level BPE trained on the task's training data, {len(tokenizer)} entries"

    def build_model(self) -> nn.Module:
        """A new model on the CPU, the same for the same model and seed."""
        return self.source.build(self.kind, self.seed, self.dtype, **self._settings)

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, for models that use them, `token_type_ids` (examples, sequence) int64, and
        `labels` (examples,) int64."""
        inputs = self.encoder.batch([(example.first, example.second) for example in examples])
        return inputs | {"labels": torch.tensor([example.label for example in examples])}

    def predict(self, model: nn.Module, examples: Sequence[Example]) -> list[int]:
        """The most probable class of each."""
        return self.logits(model, [(one.first, one.second) for one in examples]).argmax(dim=1).tolist()

    @torch.no_grad()
    def logits(self, model: nn.Module, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """One row a pair of texts, fp32: (pairs, classes), or (pairs, 1) for multiple choice.

        Runs on the model's device, in evaluation mode, without random numbers.
        """
        training = model.training
        model.eval()
        try:
            return self._logits(model, pairs)
        finally:
            model.train(training)

    def _logits(self, model: nn.Module, pairs: Sequence[tuple[str, str]]) -> Tensor:
        device = next(model.parameters()).device
        lengths = [self.encoder.tokens(*pair).shape[1] for pair in pairs]
        order = sorted(range(len(pairs)), key=lengths.__getitem__)  # so that a batch has little padding
        logits: dict[int, Tensor] = {}
        for start in range(0, len(order), EVALUATION_BATCH):
            some = order[start : start + EVALUATION_BATCH]
            inputs = self.encoder.batch([pairs[index] for index in some], lengths[some[-1]])
            if self.classes is None:
                inputs = {key: rows.unsqueeze(1) for key, rows in inputs.items()}  # one choice at a time
            rows = model(**{key: rows.to(device) for key, rows in inputs.items()}).logits.float().cpu()
            logits |= dict(zip(some, rows, strict=True))
        return torch.stack([logits[index] for index in range(len(pairs))])


def position(seed: int, index: int, count: int) -> int:
    """Which of `count` examples comes at place `index` of an endless stream: epochs, each in an order of its own."""
    epoch, place = divmod(index, count)
    return int(_shuffled(seed, epoch, count)[place])


@functools.lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
