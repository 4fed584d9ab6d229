"""Questions and answers about the standard library, made from its documentation, in Alpaca's format."""

import re
from collections.abc import Iterator

from tasks.data.stdlib_docs import Entry, entries

LONGEST = 160  # characters in an answer that is a sentence

Row = dict[str, str]


def rows() -> Iterator[Row]:
    """One question on each documented thing; its position in the list decides the kind of question."""
    for number, entry in enumerate(entries()):
        sentence = first_sentence(entry.documentation)
        if entry.name and 0 < len(sentence) <= LONGEST:
            yield (_arguments, _purpose, _name)[number % 3](entry, sentence)


def first_sentence(text: str) -> str:
    """The first sentence of a documentation, or its first paragraph, on one line."""
    return " ".join(re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip())[0].split())


def _kind(entry: Entry) -> str:
    return "class" if entry.arguments is None else "function"


def _purpose(entry: Entry, sentence: str) -> Row:
    return {"instruction": f"What does {entry.name} of Python's {entry.module} do?", "input": "", "output": sentence}


def _arguments(entry: Entry, sentence: str) -> Row:
    if entry.arguments is None:
        return _purpose(entry, sentence)
    question = f"Which arguments does {entry.name} of Python's {entry.module} take?"
    answer = ", ".join(entry.arguments) or "None."
    return {"instruction": question, "input": sentence, "output": answer}


def _name(entry: Entry, sentence: str) -> Row:
    question = f"Which {_kind(entry)} of Python's {entry.module} is this?"
    return {"instruction": question, "input": sentence, "output": entry.name}
