"""Instruction tuning of causal language models: conversations whose answers are learned.

`demo` asks about Python's standard library; a `.json` or `.jsonl` file (or a folder of them) holds your own
conversations, in any format of `formats.py`; short names (alpaca-gpt4, gsm8k, ...) stand for data sets on the hub.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from tasks.base import Kind
from tasks.data import cache
from tasks.data.order import batch_positions
from tasks.instruct import conversations, gsm8k, templates
from tasks.instruct.examples import Examples, collate, fit, pack
from tasks.instruct.formats import Conversation
from tasks.instruct.prompts import Encoded, alpaca, encode
from tasks.models import language
from tasks.models.arguments import TaskArguments
from tasks.models.batches import padded
from tasks.models.language import LanguageModel
from tasks.models.modes import evaluation

NAME = "instruct"


def names() -> tuple[str, ...]:
    """The family is a single task."""
    return ("",)


def available_in(data: str) -> tuple[str, ...]:
    """Its task, from any source. Raises ValueError for an unknown one."""
    conversations.check_source(data)
    return names()


def create(
    name: str, *, packing: bool = False, validation_examples: int = 200, answer_tokens: int = 256, **given: Any
) -> "Tuning":
    """Build it; see `tasks.create`.

    Args:
        name: "".
        packing: put several examples into a sequence, without attention between them.
        validation_examples: the most held-out conversations to score on.
        answer_tokens: the most tokens in a generated answer (GSM8K).
        given: as for `tasks.create`.
    """
    return Tuning(TaskArguments(**given), packing, validation_examples, answer_tokens)


class Tuning:
    """A loss on answers only. See `tasks.Task` for the interface."""

    name = NAME
    kind: Kind = "language"

    def __init__(self, given: TaskArguments, packing: bool, validation_examples: int, answer_tokens: int):
        if min(validation_examples, answer_tokens) < 1:
            raise ValueError("the options validation_examples and answer_tokens must be at least 1")
        self.batch_size, self.length, self.seed = given.batch_size, given.sequence_length, given.seed
        self.packing, self.answer_tokens = packing, answer_tokens
        read = conversations.read(given.data)
        scored = read.held_out[:validation_examples]
        self.language = LanguageModel(
            given,
            texts=lambda: ("".join(text for text, _ in alpaca(one)) for one in read.training),
            data_sha256=f"instruct {read.sha256}",
        )
        self.from_scratch, self.tokenizer = self.language.from_scratch, self.language.tokenizer
        self.train = self._fit(given.data, read, read.training, "training")
        self.validation = self._fit(given.data, read, scored, "held-out")
        if packing:
            self.language.check_packing(int(self.train.lengths.max()))
        self.references = [scored[number].answer for number in self.validation.kept]
        self.groups = pack(self.train.lengths, self.length) if packing else [[n] for n in range(len(self.train))]
        self.train_size = len(self.groups)
        self.has_numbers = all(gsm8k.MARK in answer for answer in self.references)
        self.headline, self.higher_is_better = ("exact_match", True) if self.has_numbers else ("perplexity", False)
        self.validation_size = len(self.validation)
        self._of_data = {"data": given.data, "data_revision": read.revision, "data_sha256": read.sha256}
        sides = (("training", self.train, len(read.training)), ("held-out", self.validation, len(scored)))
        of_sides = (note for side in sides for note in _notes(*side))
        self._notes = [*read.notes, *templates.notes(self.tokenizer), *of_sides, *self._short_of_positions()]
        self._scorer = language.Scorer()

    def _fit(self, data: str, read: conversations.Conversations, some: list[Conversation], side: str) -> Examples:
        what = ("examples, 5", data, read.sha256, side, str(len(some)), self.language.fingerprint, str(self.length))
        examples = fit(cache.digest(*what), lambda tally: encode(some, self.tokenizer, tally), self.length)
        if not len(examples):
            raise ValueError(
                f"none of the {len(some):,} {side} conversations has its answer within sequence_length {self.length}"
                + "".join(f"; {note}" for note in examples.notes)
            )
        return examples

    def lengths(self) -> list[int]:
        """See `tasks.HasLengths`: packed rows are full."""
        return [self.length] if self.packing else self.train.lengths.tolist()

    @property
    def identity(self) -> dict[str, str | None]:
        """See `tasks.HasIdentity`."""
        return self.language.identity(self._of_data)

    @functools.cached_property
    def provenance(self) -> dict[str, str | None]:
        """See `tasks.Task.provenance`."""
        return self.language.provenance(self._of_data, self._notes, self.train.tokens)

    @property
    def head(self) -> tuple[str, ...]:
        """See `tasks.Task.head`."""
        return self.language.head

    def build_model(self) -> nn.Module:
        """A new model on the CPU; the same for the same model and seed."""
        return templates.stopping(self.tokenizer, self.language.build_model())

    def batch(self, step: int) -> dict[str, Tensor]:
        """The training batch of a step; each epoch is shuffled separately; see `examples.collate`."""
        chosen = [self.groups[place] for place in batch_positions(self.seed, step, self.batch_size, self.train_size)]
        rows = [[self.train[number] for number in group] for group in chosen]
        return collate(rows, self.length, self.tokenizer.pad_token_id, packed=self.packing)

    def largest_batch(self) -> dict[str, Tensor]:
        """See `tasks.HasLargestBatch`: all batches have the same shape."""
        batch = self.batch(0)
        return padded(batch) if (self.train.lengths < self.length).any() else batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy of the answers' tokens, a scalar."""
        return language.loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """`loss`, `perplexity` and `token_accuracy` on held-out answers, every token weighted equally.

        For GSM8K also `exact_match`, the share of generated answers that end in the right number.
        """
        scores = self._scorer.score(model, self._validation_batches())
        if self.has_numbers:
            scores["exact_match"] = self._exact_match(model)
        return scores

    def remember_scores(self) -> None:
        """See `tasks.ComparesScores`."""
        self._scorer.remember()

    def state_dict(self) -> dict[str, Any]:
        """The losses before training."""
        return {"before": self._scorer.before}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue with them; None: a checkpoint of a time when there were none."""
        self._scorer.before = (state or {}).get("before")

    @property
    def constant_score(self) -> float:
        """See `tasks.HasValidation`: of GSM8K the share of the most frequent number."""
        if not self.has_numbers:
            return self.language.guess
        return max(Counter(map(gsm8k.final_number, self.references)).values()) / self.validation_size

    def _validation_batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches of examples of similar length, so that there is little padding."""
        order = np.argsort(-self.validation.lengths, kind="stable")
        while len(order):
            length = int(self.validation.lengths[order[0]])
            some, order = np.split(order, [max(1, language.EVALUATION_TOKENS // length)])
            rows = [[self.validation[number]] for number in some]
            yield collate(rows, length, self.tokenizer.pad_token_id, packed=False)

    def _short_of_positions(self) -> Iterator[str]:
        """A note on answers that can't have `answer_tokens` tokens."""
        most = (self.language.positions or math.inf) - self.answer_tokens
        short = sum(len(prompt) > most for prompt in self._prompts()) if self.has_numbers else 0
        if short:
            yield (
                f"{short:,} of {self.validation_size:,} answers are written to fewer than {self.answer_tokens} tokens, "
                f"since the model has {self.language.positions:,} positions"
            )

    def _prompts(self) -> list[list[int]]:
        return [_prompt(self.validation[number]) for number in range(len(self.validation))]

    def _exact_match(self, model: nn.Module) -> float:
        with evaluation(model):
            written = gsm8k.generate(model, self.tokenizer, self._prompts(), self.answer_tokens)
        return gsm8k.exact_match(written, self.references)


def _prompt(example: Encoded) -> list[int]:
    """The tokens before the last answer."""
    tokens, answers = example
    last = len(answers) - int(np.argmax(~answers[::-1]))  # where the last run of answer tokens begins
    return tokens[:last].tolist()


def _notes(side: str, examples: Examples, given: int) -> Iterator[str]:
    yield from (f"{side}: {note}" for note in examples.notes)
    if examples.cut:
        yield f"{examples.cut:,} of {given:,} {side} answers cut at the end to fit the sequence"
    if examples.unfit:
        yield f"{examples.unfit:,} {side} conversations left out, since no answer fits"
