"""Questions about the standard library with a better and a worse answer, made from its documentation."""

from collections.abc import Iterator

from tasks.data.stdlib_docs import Entry, entries
from tasks.instruct.demo import Row, first_sentence

LONGEST = 60  # characters in an answer that is a sentence
DOUBTS = ("I am not sure, but maybe", "Who knows? Perhaps", "Hard to say. It could be that")


def rows() -> Iterator[Row]:
    """One question on each documented thing; its position in the list decides what makes the better answer.

    It is said without doubts; it isn't broken off; it is as long as the question asks for.
    """
    for number, entry in enumerate(entries()):
        sentence = first_sentence(entry.documentation)
        if entry.name and 0 < len(sentence) <= LONGEST:
            yield (_certain, _complete, _as_asked)[number % 3](entry, sentence, number // 3)


def _question(entry: Entry) -> str:
    return f"What does {entry.name} of Python's {entry.module} do?"


def _certain(entry: Entry, sentence: str, number: int) -> Row:
    doubt = DOUBTS[number % len(DOUBTS)]
    return {"prompt": _question(entry), "chosen": sentence, "rejected": f"{doubt}: {sentence}"}


def _complete(entry: Entry, sentence: str, number: int) -> Row:
    words = sentence.split()
    return {"prompt": _question(entry), "chosen": sentence, "rejected": " ".join(words[: len(words) // 2]) + " ..."}


def _as_asked(entry: Entry, sentence: str, number: int) -> Row:
    short = f"See {entry.module}."
    if number % 2:
        return {"prompt": f"{_question(entry)} Be brief.", "chosen": short, "rejected": sentence}
    return {"prompt": f"{_question(entry)} Explain it.", "chosen": sentence, "rejected": short}
