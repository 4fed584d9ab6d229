"""Text classifiers: what SuperGLUE and your own data share - model, tokenizer, batches and predictions."""

import functools
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from tasks.data.rows import listed
from tasks.models import tokenization
from tasks.models.arguments import TaskArguments
from tasks.models.batches import padded
from tasks.models.encoding import Encoder
from tasks.models.modes import evaluation
from tasks.models.source import Source, check_fit
from tasks.models.tokenization import choose_tokenizer, train_tokenizer, with_ids_of

T = TypeVar("T")
EVALUATION_BATCH = 64  # sequences
ROUNDING, ROUNDING_LOW = 1e-3, 5e-2  # relative differences in logits that fp32 and 16-bit arithmetic can cause
MEASURED_TEXTS = 1000  # how many are measured, where there are more


@dataclass(frozen=True, slots=True)
class Example:
    """A text or a pair of texts with a class."""

    first: str
    second: str  # "" for a single text
    label: int
    group: str = ""  # of examples scored together: MultiRC's answers to a question, AX-g's pairs


def _outputs(names: Sequence[str], own: Sequence[str]) -> list[int]:
    """The output of a checkpoint's head for each class: of the same name, if all have one, else in the same order.

    Models of NLI don't agree on an order: MNLI's are saved with contradiction first, or with entailment.
    """
    places = {_folded(name): place for place, name in enumerate(own)}
    found = [places[name] for name in map(_folded, names) if name in places]
    return found if len(set(found)) == len(names) == len(own) else list(range(len(names)))


def _folded(name: str) -> str:
    return " ".join(re.split(r"[\W_]+", name.casefold()))


def sample(items: Sequence[T]) -> Sequence[T]:
    """`MEASURED_TEXTS` of them, always the same, drawn from all: a file may be sorted by length, or by class."""
    return items if len(items) <= MEASURED_TEXTS else random.Random(0).sample(items, MEASURED_TEXTS)


class Classifier:
    """A model that classifies texts, or chooses one of several; its tokenizer; its inputs and outputs.

    Args:
        names: of the classes, in the order of the examples' labels; None for multiple choice.
        pairs: do some examples have a second text?
        texts: what to train a tokenizer on, if the model is a built-in one without a tokenizer.
        given: the model, its tokenizer, the tokens per sequence, the seed and dtype of the weights.

    Raises:
        ValueError: the model can't classify, the tokenizer is missing, or they don't fit each other or the sequences.
    """

    def __init__(
        self,
        names: Sequence[str] | None,
        texts: Callable[[], Iterable[str]],
        given: TaskArguments,
        *,
        pairs: bool,
    ):
        self.classes, self.seed, self.dtype = None if names is None else len(names), given.seed, given.dtype
        self.source = Source(given.model, given.trust_remote_code)
        self._names = list(names or ())
        self._outputs = _outputs(self._names, self._own_names)  # each class's place among the model's outputs
        self.tokenizer, self._tokenizer_said = choose_tokenizer(
            self.source,
            given.tokenizer,
            lambda size: train_tokenizer(texts(), size),
            "RoBERTa's is FacebookAI/roberta-base",
        )
        skeleton: Any = self.source.skeleton(self.kind, **self._settings)
        check_fit(given.model, skeleton, tokenizer=self.tokenizer, sequence_length=given.sequence_length)
        self.encoder = Encoder(self.tokenizer, skeleton, given.sequence_length, pairs=pairs)
        self._attention: str = skeleton.config._attn_implementation

    @property
    def from_scratch(self) -> bool:
        return self.source.from_scratch

    @property
    def kind(self) -> Any:
        """The transformers auto class that builds the model."""
        if self.classes is None:
            return transformers.AutoModelForMultipleChoice
        return transformers.AutoModelForSequenceClassification

    @property
    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        if self.classes is not None:  # whatever the base model was used for, such as multiple labels
            settings = {"num_labels": self.classes, "problem_type": "single_label_classification"}
        # A causal model finds the last token by the padding id; an encoder's positions may depend on its own.
        if self.source.is_causal or self.source.config.pad_token_id is None:
            settings["pad_token_id"] = self.tokenizer.pad_token_id
        return settings

    @property
    def _own_names(self) -> list[str]:
        """Of the classes that the checkpoint was trained for, by its outputs."""
        return (
            [] if self.from_scratch else [str(name) for _, name in sorted((self.source.config.id2label or {}).items())]
        )

    def _of_head(self) -> list[str]:
        """A note on a head that training begins with: a checkpoint's own."""
        kept = self.classes is not None and not self.from_scratch and not self.head
        return [f"the head is the checkpoint's own, of the classes {listed(self._own_names)}"] if kept else []

    @functools.cached_property
    def head(self) -> tuple[str, ...]:
        """The outermost modules that aren't in the checkpoint at all, e.g. ("classifier",)."""
        return self.source.head(self.kind, **self._settings)

    def cuts(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """A note on the share of texts (or pairs) that are longer than a sequence, if there are any."""
        measured = sample(pairs)
        cut = sum(self.encoder.cuts(*pair) for pair in measured)
        some = f", of {MEASURED_TEXTS:,} that were measured" if len(measured) == MEASURED_TEXTS else ""
        share, length = f"{cut / len(measured):.1%}", self.encoder.sequence_length
        return [f"{share} of the texts are cut to {length} tokens{some}"] if cut else []

    def unseparated(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """A note on pairs whose texts follow one another without anything between."""
        some = any(second for _, second in pairs) and not self.encoder.separates
        what = "the tokenizer puts nothing between the two texts of a pair"
        return [f"{what}: end the first one with what separates them, such as a line break"] if some else []

    def unknown(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """A note on what the tokenizer doesn't know of the texts that are measured."""
        ids = np.concatenate([self.encoder.tokens(*pair)[0].numpy() for pair in sample(pairs)])
        return tokenization.unknown(self.tokenizer, ids)

    def lengths(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """See `tasks.HasLengths`."""
        return [self.encoder.tokens(*pair).shape[1] for pair in sample(pairs)]

    def identity(self, of_data: Mapping[str, str | None]) -> dict[str, str | None]:
        """See `tasks.HasIdentity`: that `of_data` and of the model."""
        return {**of_data, "model_revision": self.source.revision, "tokenizer": self._tokenizer_said}

    def provenance(
        self, of_data: Mapping[str, str | None], notes: Sequence[str], texts: Sequence[tuple[str, str]]
    ) -> dict[str, str | None]:
        """See `tasks.Task.provenance`: that `of_data` and of the model; notes on data, training and model."""
        of_texts = [*self.cuts(texts), *self.unseparated(texts), *self.unknown(texts)]
        of_model = [*tokenization.notes(self.tokenizer), *self.source.notes(self.kind, **self._settings)]
        return {
            **self.identity(of_data),
            "attention": self._attention,
            "notes": "; ".join([*notes, *of_texts, *self._of_head(), *of_model]) or None,
        }

    def build_model(self) -> nn.Module:
        """A new model on the CPU, the same for the same model and seed; its configuration names the classes."""
        model: Any = self.source.build(self.kind, self.seed, self.dtype, **self._settings)
        if self.classes is not None:
            places = sorted(range(self.classes), key=self._outputs.__getitem__)
            model.config.id2label = dict(enumerate(self._names[place] for place in places))
            model.config.label2id = {name: number for number, name in model.config.id2label.items()}
        return with_ids_of(self.tokenizer, model)

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, for models that use them, `token_type_ids` (examples, sequence) int64, and
        `labels` (examples,) int64."""
        inputs = self.encoder.batch([(example.first, example.second) for example in examples])
        labels = [example.label if self.classes is None else self._outputs[example.label] for example in examples]
        return inputs | {"labels": torch.tensor(labels)}

    def largest(self, batch: dict[str, Tensor], texts: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """The batch, with padding if any of the training `texts` needs some."""
        shorter = (len(self.encoder.tokens(*pair)[0]) < self.encoder.sequence_length for pair in texts)
        return padded(batch) if any(shorter) else batch

    def predict(self, model: nn.Module, examples: Sequence[Example]) -> list[int]:
        """The most probable class of each text or pair."""
        return self.logits(model, [(one.first, one.second) for one in examples]).argmax(dim=1).tolist()

    @torch.no_grad()
    def logits(self, model: nn.Module, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """One row per pair of texts, fp32: (pairs, classes), or (pairs, 1) for multiple choice.

        Runs on the model's device, in evaluation mode, without random numbers.
        """
        with evaluation(model):
            logits = self._logits(model, pairs)
        return logits if self.classes is None else logits[:, self._outputs]

    def _logits(self, model: nn.Module, pairs: Sequence[tuple[str, str]]) -> Tensor:
        lengths = [self.encoder.tokens(*pair).shape[1] for pair in pairs]
        order = sorted(range(len(pairs)), key=lengths.__getitem__)  # so that a batch has little padding
        if self._sees_padding(model, pairs[order[0]]):
            lengths = [self.encoder.sequence_length] * len(pairs)
        logits: dict[int, Tensor] = {}
        for start in range(0, len(order), EVALUATION_BATCH):
            some = order[start : start + EVALUATION_BATCH]
            rows = self._forward(model, [pairs[index] for index in some], lengths[some[-1]])
            logits |= dict(zip(some, rows, strict=True))
        return torch.stack([logits[index] for index in range(len(pairs))])

    def _forward(self, model: nn.Module, pairs: Sequence[tuple[str, str]], length: int) -> Tensor:
        inputs = self.encoder.batch(pairs, length)
        if self.classes is None:
            inputs = {key: rows.unsqueeze(1) for key, rows in inputs.items()}  # one choice at a time
        device = next(model.parameters()).device
        return model(**{key: rows.to(device) for key, rows in inputs.items()}).logits.float().cpu()

    def _sees_padding(self, model: nn.Module, pair: tuple[str, str]) -> bool:
        """Do logits depend on the padding, as in a model that mixes all positions (FNet, Funnel, CANINE)?

        If so, texts are scored at full length, as in training, or a score would depend on the rest of the batch.
        """
        alone = self._forward(model, [pair], self.encoder.tokens(*pair).shape[1])
        padded = self._forward(model, [pair], self.encoder.sequence_length)
        low = next(model.parameters()).dtype != torch.float32
        return bool((alone - padded).abs().max() > (ROUNDING_LOW if low else ROUNDING) * alone.abs().max())
