"""Pretraining of causal language models on text with C4's protocol (Raffel et al., 2020, arXiv 1910.10683).

`demo` is the documentation of Python's standard library, a file or folder holds documents of your own, and `hub`
streams `allenai/c4`. The score is the perplexity on held-out documents. With a pretrained model this is continual
pretraining.
"""

import functools
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn

from tasks.base import Kind
from tasks.c4.corpus import SUFFIXES, Corpus, Documents, cut
from tasks.c4.stream import BLOCK, Reader, Stream, text_of
from tasks.data import files, hub
from tasks.data.files import find
from tasks.data.held_out import hash_of
from tasks.models import language
from tasks.models.arguments import TaskArguments
from tasks.models.language import LanguageModel

NAME = "c4"
HUB_ID = "allenai/c4"
HUB_CONFIG = "en"
HUB_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"


def names() -> tuple[str, ...]:
    """The family is a single task."""
    return ("",)


def available_in(data: str) -> tuple[str, ...]:
    """Its task, from any source. Raises ValueError for an unknown one."""
    if data not in ("demo", "hub"):
        find(data, SUFFIXES, "'demo' nor 'hub'")
    return names()


def create(name: str, *, validation_tokens: int = 16_384, **given: Any) -> "Pretraining":
    """Build it; see `tasks.create`.

    Args:
        name: "".
        validation_tokens: the most tokens of held-out documents to score on.
        given: as for `tasks.create`.
    """
    return Pretraining(TaskArguments(**given), validation_tokens)


class Pretraining:
    """Documents as the tokenizer begins them, joined with end-of-text tokens and packed into full sequences.

    See `tasks.Task` for the interface.
    """

    name, headline, higher_is_better = NAME, "perplexity", False
    kind: Kind = "language"

    def __init__(self, given: TaskArguments, validation_tokens: int):
        data, sequence_length = given.data, given.sequence_length
        if sequence_length < 2:
            raise ValueError(
                f"sequence_length {sequence_length} is too short: each token is predicted from those before it"
            )
        self.batch_size = given.batch_size
        source: Local | Hub = Hub() if data == "hub" else Local(data)
        self.language = LanguageModel(given, texts=source.training, data_sha256=source.digest)
        self.from_scratch = self.language.from_scratch
        self.data: Corpus | Stream
        self.data, self.validation = source.split(self.language, sequence_length, given.seed, validation_tokens)
        self._of_data = {"data": data, "data_revision": source.revision, "data_sha256": source.sha256}
        self._notes = source.notes
        self._scorer = language.Scorer()

    @property
    def identity(self) -> dict[str, str | None]:
        """See `tasks.HasIdentity`."""
        return self.language.identity(self._of_data)

    @functools.cached_property
    def provenance(self) -> dict[str, str | None]:
        """See `tasks.Task.provenance`."""
        tokens = None if isinstance(self.data, Stream) else self.data.tokens
        return self.language.provenance(self._of_data, self._notes, tokens)

    @property
    def tokenizer(self) -> Any:
        """The configuration of transformers."""
        return self.language.tokenizer

    @property
    def head(self) -> tuple[str, ...]:
        """See `tasks.Task.head`."""
        return self.language.head

    @property
    def train_size(self) -> int:
        """Sequences per epoch. Raises ValueError for a stream, whose length is unknown."""
        if isinstance(self.data, Stream):
            raise ValueError("the number of sequences in streamed data is unknown: give --steps instead of --epochs")
        return self.data.train_size

    def build_model(self) -> nn.Module:
        """A new model on the CPU; the same for the same model and seed."""
        return self.language.build_model()

    def batch(self, step: int) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (all ones) and `labels` (the same ids), each (batch, sequence) int64."""
        first = step * self.batch_size
        rows = [self.data.sequence(index) for index in range(first, first + self.batch_size)]
        return language.full_batch(np.stack(rows))

    def largest_batch(self) -> dict[str, Tensor]:
        """See `tasks.HasLargestBatch`: no batch has padding."""
        return self.batch(0)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy of all tokens of a sequence but the first, a scalar."""
        return language.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss`, `perplexity` and `token_accuracy` on the held-out sequences, every token weighted equally."""
        return self._scorer.score(model, language.full_batches(self.validation))

    def remember_scores(self) -> None:
        """See `tasks.ComparesScores`."""
        self._scorer.remember()

    @property
    def validation_size(self) -> int:
        """See `tasks.HasValidation`: sequences."""
        return len(self.validation)

    @property
    def constant_score(self) -> float:
        """See `tasks.HasValidation`."""
        return self.language.guess

    def state_dict(self) -> dict[str, Any]:
        """The losses before training, and a stream's position."""
        position = self.data.state_dict() if isinstance(self.data, Stream) else {}
        return {**position, "before": self._scorer.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self._scorer.before = state.get("before")
        if isinstance(self.data, Stream):
            self.data.load_state_dict(state)


class Local:
    """The demo's documents, or those of a file or folder: all are tokenised before training."""

    revision = None

    def __init__(self, data: str):
        self.documents = Documents(data)
        self.sha256: str | None = self.documents.sha256
        self.digest = self.documents.sha256
        self.notes: list[str] = []

    def training(self) -> Iterator[str]:
        return self.documents.training()

    def split(self, language: LanguageModel, length: int, seed: int, tokens: int) -> tuple[Corpus, np.ndarray]:
        """The training sequences, and at most `tokens` tokens for validation as (sequences, length)."""
        corpus = Corpus(
            self.documents, language.documents, language.fingerprint, end=language.end, length=length, seed=seed
        )
        data = self.documents.data
        of_folder = [] if data == "demo" else [*files.held_out(data, SUFFIXES), *files.passed_over(data, SUFFIXES)]
        self.notes = [*of_folder, *corpus.notes]
        return corpus, corpus.validation(tokens)


class Hub:
    """`allenai/c4`, streamed. The first of its validation documents are held out; training skips copies of them."""

    revision, sha256 = HUB_REVISION, None
    digest = f"{HUB_ID} {HUB_CONFIG} {HUB_REVISION}"
    notes: tuple[str, ...] = ()

    def training(self) -> Iterator[str]:
        """Texts for a tokenizer, without the documents that are held out first."""
        held_out = set(map(hash_of, islice(map(text_of, open_hub("validation")), BLOCK)))
        return (text for text in map(text_of, open_hub("train")) if hash_of(text) not in held_out)

    def split(self, language: LanguageModel, length: int, seed: int, tokens: int) -> tuple[Stream, np.ndarray]:
        """See `Local.split`."""
        validation, held_out = _first(map(text_of, open_hub("validation")), language, max(tokens, length))
        stream = Stream(
            functools.partial(open_hub, "train"),
            language.documents,
            skip=lambda text: hash_of(text) in held_out,
            end=language.end,
            length=length,
            seed=seed,
        )
        return stream, cut(validation, length)


def _first(documents: Iterator[str], language: LanguageModel, tokens: int) -> tuple[np.ndarray, set[bytes]]:
    """The first `tokens` tokens, and the hashes of the documents that were read for them."""
    ids: list[int] = []
    hashes: set[bytes] = set()
    while len(ids) < tokens and (some := list(islice(documents, BLOCK))):
        hashes |= set(map(hash_of, some))
        for one in language.documents(some):
            ids += [*one, language.end]
    return np.array(ids[:tokens]), hashes


def open_hub(split: str) -> Reader:
    """A split of `allenai/c4`, from its beginning. Raises ValueError if the hub can't be reached."""
    return hub.load(HUB_ID, HUB_CONFIG, split=split, revision=HUB_REVISION, way_out="a file or folder", streaming=True)
