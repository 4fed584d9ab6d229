"""A task of SuperGLUE at work: model, batches, loss and scores. What differs between the eight is in a `Benchmark`."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from . import metrics, superglue_data
from .checks import check_given
from .encoding import Encoder
from .models import Source, check_fit
from .rows import Row
from .superglue_examples import Choice, Example, examples
from .tokenization import load_tokenizer, train_tokenizer

TRAINING_CHOICES = 2  # of a multiple choice in training: one right candidate, the others wrong ones
EVALUATION_BATCH = 64  # sequences
TOKENIZER_EXAMPLES = 2000  # that a tokenizer is trained on, at most

Predictions = Sequence[int]


@dataclass(frozen=True)
class Benchmark:
    """A data set: how its lines become examples, and how predictions are scored."""

    folder: str  # in the official release
    make: Callable[[Row], Iterator[Any]]
    metric: type[metrics.InMemory]
    columns: Callable[[Predictions, Sequence[Any]], dict[str, list]]  # of the metric
    headline: str = "accuracy"
    classes: int | None = 2  # None: multiple choice
    diagnostics: tuple["Benchmark", ...] = ()
    prefix: str = ""  # of a diagnostic's metrics

    def score(self, predictions: Predictions, of: Sequence[Any]) -> dict[str, float]:
        computed = self.metric().compute(**self.columns(predictions, of))
        return {f"{self.prefix}{key}": value for key, value in computed.items()}


class Data:
    """All examples of a task, from one source.

    Raises:
        ValueError: a file is missing or empty, or one of its lines is wrong.
    """

    def __init__(self, row: Benchmark, data: str):
        held = superglue_data.held(data)
        self._digest = hashlib.sha256()
        self.train = self._read(row, data, "train")
        self.validation = self._read(row, data, "val")
        self.diagnostics = {one: self._read(one, data, "test") for one in row.diagnostics if one.folder in held}
        self.sha256 = self._digest.hexdigest()

    def _read(self, row: Benchmark, data: str, split: str) -> list[Any]:
        lines = superglue_data.read(data, row.folder, split)
        self._digest.update(lines.sha256.encode())
        return examples(lines, row.make)

    def texts(self) -> Iterator[str]:
        """Texts of the training examples, for a tokenizer."""
        for example in self.train[:TOKENIZER_EXAMPLES]:
            yield example.first
            yield from _second_texts(example)


_demo = functools.lru_cache(maxsize=None)(Data)  # generated, so it can't change; a folder's files can


def _second_texts(example: Example | Choice) -> list[str]:
    if isinstance(example, Example):
        return [example.second]
    return [example.filled(index) for index in range(len(example.candidates))]


class SuperGlueTask:
    """One of the eight tasks. See `tasks.create` for the arguments and `tasks.Task` for what it offers."""

    higher_is_better = True

    def __init__(
        self,
        name: str,
        row: Benchmark,
        *,
        model: str,
        tokenizer: str | None,
        data: str,
        batch_size: int,
        sequence_length: int,
        seed: int,
        dtype: str,
        trust_remote_code: bool,
    ):
        check_given(batch_size=batch_size, seed=seed, dtype=dtype)
        self.name, self.row = name, row
        self.headline = self.row.headline
        self.batch_size, self.seed, self.dtype = batch_size, seed, dtype
        self.source = Source(model, trust_remote_code)
        self.from_scratch = self.source.from_scratch
        self.data = (_demo if data == "demo" else Data)(self.row, data)
        # a query that has no right or no wrong candidate teaches nothing
        self.train = [example for example in self.data.train if isinstance(example, Example) or _trainable(example)]
        self.train_size = len(self.train)
        self.tokenizer, said = self._tokenizer(tokenizer)
        skeleton = self.source.skeleton(self.kind, **self._settings)
        check_fit(model, skeleton, tokenizer=self.tokenizer, sequence_length=sequence_length)
        self.encoder = Encoder(self.tokenizer, skeleton, sequence_length)
        self.provenance = {
            "data": data,
            "data_revision": superglue_data.HUB_REVISION if data == "hub" else None,
            "data_sha256": self.data.sha256,
            "model_revision": self.source.revision,
            "tokenizer": said,
            "attention": skeleton.config._attn_implementation,
        }

    @property
    def kind(self) -> Any:
        """The auto class of transformers that builds the model."""
        if self.row.classes is None:
            return transformers.AutoModelForMultipleChoice
        return transformers.AutoModelForSequenceClassification

    @property
    def _settings(self) -> dict[str, int]:
        settings = {} if self.row.classes is None else {"num_labels": self.row.classes}
        if self.source.config.to_dict().get("pad_token_id") is None:  # a causal model needs it to find the last token
            settings["pad_token_id"] = self.tokenizer.pad_token_id
        return settings

    @functools.cached_property
    def head(self) -> tuple[str, ...]:
        """Outermost modules of which the checkpoint has nothing, e.g. ("classifier",)."""
        return self.source.head(self.kind, **self._settings)

    def _tokenizer(self, name: str | None) -> tuple[Any, str]:
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
        tokenizer = train_tokenizer(self.data.texts(), size)
        return tokenizer, f"byte-level BPE trained on the task's training data, {len(tokenizer)} entries"

    def build_model(self) -> nn.Module:
        """A new model on the CPU, the same for the same model and seed."""
        return self.source.build(self.kind, self.seed, self.dtype, **self._settings)

    # ---- training

    def batch(self, step: int) -> dict[str, Tensor]:
        """The training batch of a step: `batch_size` examples, of epochs that are shuffled one by one.

        `input_ids`, `attention_mask` and, for models that use them, `token_type_ids` are (batch, sequence) int64, for
        multiple choice (batch, choices, sequence); `labels` is (batch,) int64.
        """
        first = step * self.batch_size
        chosen = [self.train[self._position(index)] for index in range(first, first + self.batch_size)]
        if self.row.classes is not None:
            inputs = self.encoder.batch([(example.first, example.second) for example in chosen])
            return inputs | {"labels": torch.tensor([example.label for example in chosen])}
        rng = np.random.default_rng((self.seed, step))
        picked = [_pick(choice, rng) for choice in chosen]
        pairs = [
            (choice.first, choice.filled(i)) for choice, (some, _) in zip(chosen, picked, strict=True) for i in some
        ]
        inputs = {
            key: rows.view(self.batch_size, TRAINING_CHOICES, -1) for key, rows in self.encoder.batch(pairs).items()
        }
        return inputs | {"labels": torch.tensor([label for _, label in picked])}

    def _position(self, index: int) -> int:
        epoch, place = divmod(index, self.train_size)
        return int(_shuffled(self.seed, epoch, self.train_size)[place])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The model's own loss, cross entropy: a scalar."""
        return model(**batch).loss

    # ---- evaluation

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The official metrics on the validation set, and for RTE those of the diagnostic sets that the source has.

        Runs on the model's device, in evaluation mode, without gradients or random numbers.
        """
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                scores = self.row.score(self._predict(model, self.data.validation), self.data.validation)
                for diagnostic, of in self.data.diagnostics.items():
                    scores |= diagnostic.score(self._predict(model, of), of)
        finally:
            model.train(training)
        return scores

    def _predict(self, model: nn.Module, of: Sequence[Any]) -> list[int]:
        pairs = [(example.first, second) for example in of for second in _second_texts(example)]
        logits = self._logits(model, pairs)
        if self.row.classes is not None:
            return logits.argmax(dim=1).tolist()
        candidates = logits[:, 0].split([len(choice.candidates) for choice in of])
        return [int(scores.argmax()) for scores in candidates]

    def _logits(self, model: nn.Module, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """One row a pair, fp32: (pairs, classes), or (pairs, 1) for multiple choice."""
        device = next(model.parameters()).device
        lengths = [self.encoder.tokens(*pair).shape[1] for pair in pairs]
        order = sorted(range(len(pairs)), key=lengths.__getitem__)  # so that a batch has little padding
        logits: dict[int, Tensor] = {}
        for start in range(0, len(order), EVALUATION_BATCH):
            some = order[start : start + EVALUATION_BATCH]
            inputs = self.encoder.batch([pairs[index] for index in some], lengths[some[-1]])
            if self.row.classes is None:
                inputs = {key: rows.unsqueeze(1) for key, rows in inputs.items()}  # one choice at a time
            rows = model(**{key: rows.to(device) for key, rows in inputs.items()}).logits.float().cpu()
            logits |= dict(zip(some, rows, strict=True))
        return torch.stack([logits[index] for index in range(len(pairs))])


@functools.lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _trainable(choice: Choice) -> bool:
    return bool(choice.right and choice.wrong)


def _pick(choice: Choice, rng: np.random.Generator) -> tuple[list[int], int]:
    """Candidates to train on, and the place of the right one among them."""
    wrong = choice.wrong
    others = rng.choice(wrong, TRAINING_CHOICES - 1, replace=len(wrong) < TRAINING_CHOICES - 1)
    label = int(rng.integers(TRAINING_CHOICES))
    picked = [int(index) for index in others]
    picked.insert(label, int(rng.choice(choice.right)))
    return picked, label
