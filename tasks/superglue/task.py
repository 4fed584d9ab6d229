"""A SuperGLUE task: model, batches, loss and scores. What differs between the eight tasks is in a `Benchmark`."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks import metrics
from tasks.base import Kind
from tasks.data.order import batch_positions
from tasks.data.rows import Row
from tasks.data.tally import Tally
from tasks.models.arguments import TaskArguments
from tasks.models.classifier import Classifier, Example, sample
from tasks.superglue import data as superglue_data
from tasks.superglue.examples import NEEDLESS, Choice, examples

TRAINING_CHOICES = 2  # per multiple-choice example in training: one right candidate, the others wrong
TOKENIZER_EXAMPLES = 2000  # the most a tokenizer is trained on

Predictions = Sequence[int]


@dataclass(frozen=True)
class Benchmark:
    """A data set: how its lines become examples, and how predictions are scored."""

    folder: str  # in the official release
    make: Callable[[Row], Iterator[Any]]
    metric: type[metrics.InMemory]
    columns: Callable[[Predictions, Sequence[Any]], dict[str, list]]  # for the metric
    headline: str = "accuracy"
    names: tuple[str, ...] | None = ("False", "True")  # of the classes; None: multiple choice
    diagnostics: tuple["Benchmark", ...] = ()
    prefix: str = ""  # of a diagnostic's metrics

    @property
    def classes(self) -> int | None:
        return None if self.names is None else len(self.names)

    def score(self, predictions: Predictions, of: Sequence[Any]) -> dict[str, float]:
        """The metrics of `predictions` for the examples `of`."""
        computed = self.metric().compute(**self.columns(predictions, of))
        return {f"{self.prefix}{key}": value for key, value in computed.items()}


class Data:
    """All examples of a task, from one source.

    Raises:
        ValueError: a file is missing or empty, or more than half of its lines can't be used.
    """

    def __init__(self, row: Benchmark, data: str):
        held = superglue_data.available_in(data)
        self._digest = hashlib.sha256()
        self.tally = Tally(needless=NEEDLESS)
        self.train = self._read(row, data, "train")
        self.validation = self._read(row, data, "val")
        self.diagnostics = {one: self._read(one, data, "test") for one in row.diagnostics if one.folder in held}
        self.sha256 = self._digest.hexdigest()

    def _read(self, row: Benchmark, data: str, split: str) -> list[Any]:
        file = superglue_data.read(data, row.folder, split)
        self._digest.update(file.sha256.encode())
        return examples(file, row.make, self.tally)

    def texts(self) -> Iterator[str]:
        """Texts of the training examples, for a tokenizer."""
        for example in self.train[:TOKENIZER_EXAMPLES]:
            yield example.first
            yield from _second_texts(example)


_demo = functools.lru_cache(maxsize=None)(Data)  # generated, so it can't change, unlike a folder's files


def _second_texts(example: Example | Choice) -> list[str]:
    if isinstance(example, Example):
        return [example.second]
    return [example.filled(index) for index in range(len(example.candidates))]


class SuperGlueTask:
    """One of the eight tasks. See `tasks.create` for the arguments and `tasks.Task` for the interface."""

    higher_is_better = True
    kind: Kind = "classification"

    def __init__(self, name: str, row: Benchmark, given: TaskArguments):
        self.name, self.row = name, row
        self.headline = self.row.headline
        self.batch_size, self.seed = given.batch_size, given.seed
        self.data = (_demo if given.data == "demo" else Data)(self.row, given.data)
        # a query without a right candidate, or without a wrong one, teaches nothing
        self.train = [example for example in self.data.train if isinstance(example, Example) or _trainable(example)]
        self.train_size = len(self.train)
        self.classifier = Classifier(row.names, self.data.texts, given, pairs=any(map(_has_second, self.train)))
        self.from_scratch = self.classifier.from_scratch
        revision = superglue_data.HUB_REVISION if given.data == "hub" else None
        self._of_data = {"data": given.data, "data_revision": revision, "data_sha256": self.data.sha256}

    @property
    def identity(self) -> dict[str, str | None]:
        """See `tasks.HasIdentity`."""
        return self.classifier.identity(self._of_data)

    @functools.cached_property
    def provenance(self) -> dict[str, str | None]:
        """See `tasks.Task.provenance`."""
        return self.classifier.provenance(self._of_data, self.data.tally.notes, self._texts())

    def _texts(self) -> list[tuple[str, str]]:
        """Some of the training texts, as they are encoded."""
        return [(one.first, second) for one in sample(self.train) for second in _second_texts(one)]

    def lengths(self) -> list[int]:
        """See `tasks.HasLengths`."""
        return self.classifier.lengths(self._texts())

    @property
    def tokenizer(self) -> Any:
        """The configuration of transformers."""
        return self.classifier.tokenizer

    @property
    def head(self) -> tuple[str, ...]:
        """See `tasks.Task.head`."""
        return self.classifier.head

    def build_model(self) -> nn.Module:
        """A new model on the CPU; the same for the same model and seed."""
        return self.classifier.build_model()

    # ---- training

    def batch(self, step: int) -> dict[str, Tensor]:
        """The training batch of a step: `batch_size` examples; each epoch is shuffled separately.

        `input_ids`, `attention_mask` and, for models that use them, `token_type_ids` are (batch, sequence) int64, for
        multiple choice (batch, choices, sequence); `labels` is (batch,) int64.
        """
        chosen = [self.train[place] for place in batch_positions(self.seed, step, self.batch_size, self.train_size)]
        if self.row.classes is not None:
            return self.classifier.batch(chosen)
        # each query has a draw of its own, so that micro-batches are the rows of the one batch
        first = step * self.batch_size
        picked = [
            _pick(choice, np.random.default_rng((self.seed, place))) for place, choice in enumerate(chosen, first)
        ]
        pairs = [
            (choice.first, choice.filled(i)) for choice, (some, _) in zip(chosen, picked, strict=True) for i in some
        ]
        inputs = self.classifier.encoder.batch(pairs)
        inputs = {key: rows.view(self.batch_size, TRAINING_CHOICES, -1) for key, rows in inputs.items()}
        return inputs | {"labels": torch.tensor([label for _, label in picked])}

    def largest_batch(self) -> dict[str, Tensor]:
        """See `tasks.HasLargestBatch`: all batches have the same shape."""
        return self.classifier.largest(self.batch(0), self._texts())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The model's own loss, cross entropy: a scalar."""
        return model(**batch).loss

    # ---- evaluation

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The official metrics on the validation set, and for RTE those of the diagnostic sets that the source has.

        Runs on the model's device, in evaluation mode, without gradients or random numbers.
        """
        scores = self.row.score(self._predict(model, self.data.validation), self.data.validation)
        for diagnostic, of in self.data.diagnostics.items():
            scores |= diagnostic.score(self._predict(model, of), of)
        return scores

    @property
    def validation_size(self) -> int:
        """See `tasks.HasValidation`; answers to one question of MultiRC count once."""
        groups = self.row.columns([0] * len(self.data.validation), self.data.validation).get("groups")
        return len(set(groups)) if groups else len(self.data.validation)

    @functools.cached_property
    def constant_score(self) -> float:
        """See `tasks.HasValidation`: always the same class or, of candidates, always the one at the same place."""
        of = self.data.validation
        answers = self.row.classes or min(len(choice.candidates) for choice in of)
        return max(self.row.score([answer] * len(of), of)[self.headline] for answer in range(answers))

    def _predict(self, model: nn.Module, of: Sequence[Any]) -> list[int]:
        if self.row.classes is not None:
            return self.classifier.predict(model, of)
        pairs = [(choice.first, second) for choice in of for second in _second_texts(choice)]
        candidates = self.classifier.logits(model, pairs)[:, 0].split([len(choice.candidates) for choice in of])
        return [int(scores.argmax()) for scores in candidates]


def _has_second(example: Example | Choice) -> bool:
    return isinstance(example, Choice) or bool(example.second)


def _trainable(choice: Choice) -> bool:
    return bool(choice.right and choice.wrong)


def _pick(choice: Choice, rng: np.random.Generator) -> tuple[list[int], int]:
    """Candidates to train on, and the position of the right one among them."""
    wrong = choice.wrong
    others = rng.choice(wrong, TRAINING_CHOICES - 1, replace=len(wrong) < TRAINING_CHOICES - 1)
    label = int(rng.integers(TRAINING_CHOICES))
    picked = [int(index) for index in others]
    picked.insert(label, int(rng.choice(choice.right)))
    return picked, label
