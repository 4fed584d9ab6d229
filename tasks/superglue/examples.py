"""From a line of SuperGLUE's official files to the examples in it. A wrong line is an error that names the place."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tasks.data.json_lines import Lines, Row, parse, short
from tasks.models.classifier import Example

GAP = "@placeholder"  # ReCoRD's own mark for what is to be filled in
ENTAILED = ("entailment", "not_entailment")


@dataclass(frozen=True, slots=True)
class Choice:
    """A text and a second one with a gap, for which one of several candidates is to be chosen."""

    first: str
    template: str  # contains GAP
    candidates: tuple[str, ...]
    right: tuple[int, ...]  # indices of the candidates that are right
    answers: tuple[str, ...]  # the right answers as the data has them

    def filled(self, index: int) -> str:
        """The second text with candidate `index` in the gap."""
        return self.template.replace(GAP, self.candidates[index])

    @property
    def wrong(self) -> tuple[int, ...]:
        """Indices of the candidates that are not right."""
        return tuple(index for index in range(len(self.candidates)) if index not in self.right)


def examples(lines: Lines, make: Callable[[Row], Iterator[Example | Choice]]) -> list[Example | Choice]:
    """All examples of a file. Raises ValueError at the first line that is wrong."""
    return [example for line in lines.lines for example in make(parse(line))]


# ---- one function a data set


def boolq(row: Row) -> Iterator[Example]:
    yield Example(row.text("passage"), row.text("question"), row.label(False, True))


def entailment(*labels: str, first: str = "premise", second: str = "hypothesis") -> Callable[[Row], Iterator[Example]]:
    """For CB, RTE and the diagnostic sets, which differ in their labels and in what the two texts are called."""

    def make(row: Row) -> Iterator[Example]:
        yield Example(row.text(first), row.text(second), row.label(*labels))

    return make


def ax_g(row: Row) -> Iterator[Example]:
    """The pairs have an id in the official file; the hub's rows lack it, but a pair differs in one pronoun only."""
    premise, hypothesis = row.text("premise"), row.text("hypothesis")
    pair = re.sub(r"\b(he|she|him|her|his|hers)\b", "#", f"{premise} | {hypothesis}", flags=re.IGNORECASE)
    group = str(row.integer("pair_id")) if "pair_id" in row.value else pair
    yield Example(premise, hypothesis, row.label(*ENTAILED), group)


def copa(row: Row) -> Iterator[Choice]:
    asked = ("What was the cause of this?", "What happened as a result?")[row.label("cause", "effect", name="question")]
    candidates, right = (row.text("choice1"), row.text("choice2")), row.label(0, 1)
    yield Choice(row.text("premise"), f"{asked} {GAP}", candidates, (right,), (candidates[right],))


def multirc(row: Row) -> Iterator[Example]:
    passage = row.row("passage")
    for number, question in enumerate(passage.rows("questions")):
        for answer in question.rows("answers"):
            second = f"{question.text('question')} {answer.text('text')}"
            yield Example(passage.text("text"), second, answer.label(0, 1), f"{row.where}, {number}")


def record(row: Row) -> Iterator[Choice]:
    passage = row.row("passage")
    text = passage.text("text")
    candidates = tuple(sorted({_entity(text, entity) for entity in passage.rows("entities")}))
    for query in row.rows("qas"):
        template = query.text("query")
        if GAP not in template:
            raise ValueError(f"{query.where}: the query has no {GAP}: {short(template)}")
        answers = tuple(sorted({answer.text("text") for answer in query.rows("answers")}))
        right = tuple(index for index, candidate in enumerate(candidates) if candidate in answers)
        yield Choice(_without_highlights(text), template, candidates, right, answers)


def _entity(text: str, span: Row) -> str:
    start, end = span.integer("start"), span.integer("end")  # the end is inclusive
    if not 0 <= start <= end < len(text):
        raise ValueError(f"{span.where}: the span {start}..{end} isn't inside the passage of {len(text)} characters")
    return text[start : end + 1]


def _without_highlights(passage: str) -> str:
    """ReCoRD's summary points as sentences of their own."""
    return re.sub(r"\s*@highlight\s*", " ", re.sub(r"(?<![.?!\"'])\n@highlight", ".\n@highlight", passage))


def wic(row: Row) -> Iterator[Example]:
    first, second = (_mark_characters(row, number) for number in (1, 2))
    yield Example(first, f"{second} {row.text('word')}", row.label(False, True))


def _mark_characters(row: Row, number: int) -> str:
    text, start, end = row.text(f"sentence{number}"), row.integer(f"start{number}"), row.integer(f"end{number}")
    if not 0 <= start < end <= len(text):
        raise ValueError(f"{row.where}: start{number} {start} and end{number} {end} aren't inside sentence{number}")
    return f"{text[:start]}* {text[start:end]} *{text[end:]}"


def wsc(row: Row) -> Iterator[Example]:
    words, target = row.text("text").split(), row.row("target")
    _mark_words(words, target, "span1", "*")
    _mark_words(words, target, "span2", "#")
    yield Example(" ".join(words), "", row.label(False, True))


def _mark_words(words: list[str], target: Row, span: str, mark: str) -> None:
    """Put `mark` before and after the span, inside its first and last word, so that the others keep their places."""
    start = target.integer(f"{span}_index")
    last = start + max(len(target.text(f"{span}_text").split()), 1) - 1
    if not 0 <= start < len(words):
        raise ValueError(f"{target.where}: {span}_index {start} isn't one of the text's {len(words)} words")
    last = min(last, len(words) - 1)  # some official spans are longer than what they mark
    words[start] = f"{mark} {words[start]}"
    words[last] = f"{words[last]} {mark}"
