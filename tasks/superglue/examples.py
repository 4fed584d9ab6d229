"""From a line of SuperGLUE's official files to the examples in it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tasks.data.files import File
from tasks.data.rows import Row, RowError, short
from tasks.data.tally import Tally
from tasks.models.classifier import Example

GAP = "@placeholder"  # ReCoRD's own mark for what is to be filled in
ENTAILED = ("entailment", "not_entailment")
# Official fields that carry nothing for a model: numbers, sources, what AX-b's pairs are about, where answers are.
ABOUT = ("logic", "knowledge", "lexical-semantics", "predicate-argument-structure")
NEEDLESS = frozenset({"idx", "version", "source", "start", "end", *ABOUT})


@dataclass(frozen=True, slots=True)
class Choice:
    """A text and a second one with a gap, for which one of several candidates must be chosen."""

    first: str
    template: str  # contains GAP
    candidates: tuple[str, ...]
    right: tuple[int, ...]  # indices of the candidates that are right
    answers: tuple[str, ...]  # the right answers as written in the data

    def filled(self, index: int) -> str:
        """The second text with candidate `index` in the gap."""
        return self.template.replace(GAP, self.candidates[index])

    @property
    def wrong(self) -> tuple[int, ...]:
        """Indices of the candidates that are not right."""
        return tuple(index for index in range(len(self.candidates)) if index not in self.right)


def examples(file: File, make: Callable[[Row], Iterator[Example | Choice]], tally: Tally) -> list[Example | Choice]:
    """All examples in a file's lines; the tally notes what happens to the lines.

    Raises:
        ValueError: more than half of them can't be used.
    """
    return [example for some in tally.use(file.where, file.rows(), lambda row: list(make(row))) for example in some]


# ---- one function per data set


def boolq(row: Row) -> Iterator[Example]:
    """A yes/no question about a passage."""
    yield Example(row.text("passage"), row.text("question"), row.label(False, True))


def entailment(*labels: str, first: str = "premise", second: str = "hypothesis") -> Callable[[Row], Iterator[Example]]:
    """For CB, RTE and the diagnostic sets, which differ in their labels and the names of the two texts."""

    def make(row: Row) -> Iterator[Example]:
        yield Example(row.text(first), row.text(second), row.label(*labels))

    return make


def ax_g(row: Row) -> Iterator[Example]:
    """The pairs have an id in the official file; the hub's rows lack it, but a pair differs only in one pronoun."""
    premise, hypothesis = row.text("premise"), row.text("hypothesis")
    pair = re.sub(r"\b(he|she|him|her|his|hers)\b", "#", f"{premise} | {hypothesis}", flags=re.IGNORECASE)
    group = str(row.integer("pair_id")) if row.has("pair_id") else pair
    yield Example(premise, hypothesis, row.label(*ENTAILED), group)


def copa(row: Row) -> Iterator[Choice]:
    """Which alternative is the cause or the effect of a premise?"""
    asked = ("What was the cause of this?", "What happened as a result?")[row.label("cause", "effect", name="question")]
    candidates, right = (row.text("choice1"), row.text("choice2")), row.label(0, 1)
    yield Choice(row.text("premise"), f"{asked} {GAP}", candidates, (right,), (candidates[right],))


def multirc(row: Row) -> Iterator[Example]:
    """Is an answer to a question about a passage right?"""
    passage = row.row("passage")
    for number, question in enumerate(passage.rows("questions")):
        for answer in question.rows("answers"):
            second = f"{question.text('question')} {answer.text('text')}"
            yield Example(passage.text("text"), second, answer.label(0, 1), f"{row.where}, {number}")


def record(row: Row) -> Iterator[Choice]:
    """Which entity of a passage fills the gap in a query?"""
    passage = row.row("passage")
    text = passage.text("text")
    candidates = tuple(sorted({_entity(text, entity) for entity in passage.rows("entities")}))
    for query in row.rows("qas"):
        template = query.text("query")
        if GAP not in template:
            raise RowError(query.where, f"the query has no {GAP}", f": {short(template)}")
        answers = tuple(sorted({answer.text("text") for answer in query.rows("answers")}))
        right = tuple(index for index, candidate in enumerate(candidates) if candidate in answers)
        yield Choice(_without_highlights(text), template, candidates, right, answers)


def _entity(text: str, span: Row) -> str:
    start, end = span.integer("start"), span.integer("end")  # the end is inclusive
    if not 0 <= start <= end < len(text):
        raise RowError(span.where, "the span isn't inside the passage", f": {start}..{end} of {len(text)} characters")
    return text[start : end + 1]


def _without_highlights(passage: str) -> str:
    """ReCoRD's summary points as separate sentences."""
    return re.sub(r"\s*@highlight\s*", " ", re.sub(r"(?<![.?!\"'])\n@highlight", ".\n@highlight", passage))


def wic(row: Row) -> Iterator[Example]:
    """Does a word mean the same in two sentences?"""
    first, second = (_mark_characters(row, number) for number in (1, 2))
    yield Example(first, f"{second} {row.text('word')}", row.label(False, True))


def _mark_characters(row: Row, number: int) -> str:
    text, start, end = row.text(f"sentence{number}"), row.integer(f"start{number}"), row.integer(f"end{number}")
    if not 0 <= start < end <= len(text):
        raise RowError(row.where, f"start{number} and end{number} aren't inside sentence{number}", f": {start}, {end}")
    return f"{text[:start]}* {text[start:end]} *{text[end:]}"


def wsc(row: Row) -> Iterator[Example]:
    """Does a pronoun refer to a noun? Both are marked in the text."""
    words, target = row.text("text").split(), row.row("target")
    _mark_words(words, target, "span1", "*")
    _mark_words(words, target, "span2", "#")
    yield Example(" ".join(words), "", row.label(False, True))


def _mark_words(words: list[str], target: Row, span: str, mark: str) -> None:
    """Put `mark` before and after the span, inside its first and last words, so that other words keep their places."""
    start = target.integer(f"{span}_index")
    last = start + max(len(target.text(f"{span}_text").split()), 1) - 1
    if not 0 <= start < len(words):
        raise RowError(target.where, f"{span}_index isn't one of the text's words", f": {start} of {len(words)}")
    last = min(last, len(words) - 1)  # some official spans are longer than what they mark
    words[start] = f"{mark} {words[start]}"
    words[last] = f"{words[last]} {mark}"
