"""Classification of your own texts, or pairs of texts, into the classes that occur in your data.

`--data` is a file of JSON lines or a table (csv, tsv) with `text`, optionally `text2`, and `label`; or a folder with
such files for train and val. A single file is split by the hash of its texts. `demo` is made up.
"""

import functools
from collections import Counter
from typing import Any

from torch import Tensor, nn

from tasks.base import Kind
from tasks.classify.data import find, read
from tasks.data.order import batch_positions
from tasks.metrics import Classification as Metric
from tasks.models.arguments import TaskArguments
from tasks.models.classifier import Classifier

NAME = "classify"
TOKENIZER_EXAMPLES = 20_000  # the most a tokenizer is trained on


def names() -> tuple[str, ...]:
    """The family is a single task."""
    return ("",)


def available_in(data: str) -> tuple[str, ...]:
    """Its task, from any source. Raises ValueError for an unknown one."""
    if data != "demo":
        find(data)
    return names()


def create(name: str, **given: Any) -> "Classification":
    """Build it; see `tasks.create`."""
    return Classification(TaskArguments(**given))


class Classification:
    """Texts with classes of your own. See `tasks.Task` for the interface."""

    name, headline, higher_is_better = NAME, "accuracy", True
    kind: Kind = "classification"

    def __init__(self, given: TaskArguments):
        self.batch_size, self.seed = given.batch_size, given.seed
        self.data = read(given.data)
        self.train_size = len(self.data.train)
        self.classifier = Classifier(
            list(map(str, self.data.labels)),
            lambda: (text for one in self.data.train[:TOKENIZER_EXAMPLES] for text in (one.first, one.second)),
            given,
            pairs=any(one.second for one in [*self.data.train, *self.data.validation]),
        )
        self.from_scratch = self.classifier.from_scratch
        self._of_data = {"data": given.data, "data_revision": None, "data_sha256": self.data.sha256}

    @property
    def identity(self) -> dict[str, str | None]:
        """See `tasks.HasIdentity`."""
        return self.classifier.identity(self._of_data)

    @functools.cached_property
    def provenance(self) -> dict[str, str | None]:
        """See `tasks.Task.provenance`."""
        texts = [(one.first, one.second) for one in self.data.train]
        return self.classifier.provenance(self._of_data, self.data.notes, texts)

    def lengths(self) -> list[int]:
        """See `tasks.HasLengths`."""
        return self.classifier.lengths([(one.first, one.second) for one in self.data.train])

    @property
    def tokenizer(self) -> Any:
        """The configuration of transformers."""
        return self.classifier.tokenizer

    @property
    def head(self) -> tuple[str, ...]:
        """See `tasks.Task.head`."""
        return self.classifier.head

    def build_model(self) -> nn.Module:
        """A new model on the CPU, the same for the same model and seed; its configuration names the classes."""
        return self.classifier.build_model()

    def batch(self, step: int) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, for models that use them, `token_type_ids` (batch, sequence) int64, and
        `labels` (batch,) int64; each epoch is shuffled separately."""
        places = batch_positions(self.seed, step, self.batch_size, self.train_size)
        return self.classifier.batch([self.data.train[place] for place in places])

    def largest_batch(self) -> dict[str, Tensor]:
        """See `tasks.HasLargestBatch`: all batches have the same shape."""
        return self.classifier.largest(self.batch(0), [(one.first, one.second) for one in self.data.train])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The model's own loss, cross entropy: a scalar."""
        return model(**batch).loss

    @property
    def validation_size(self) -> int:
        """See `tasks.HasValidation`."""
        return len(self.data.validation)

    @property
    def constant_score(self) -> float:
        """See `tasks.HasValidation`: the share of the most frequent class."""
        return max(Counter(one.label for one in self.data.validation).values()) / self.validation_size

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`accuracy` and `macro_f1` on the validation set."""
        references = [one.label for one in self.data.validation]
        predictions = self.classifier.predict(model, self.data.validation)
        return Metric().compute(predictions=predictions, references=references)
