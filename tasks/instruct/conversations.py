"""Conversations to tune on, in the formats that they are published in, from the demo, files or the hub.

A row's format is recognised by its fields: Alpaca's `instruction`, `input` (may be missing) and `output`; chat's
`messages` of `role` and `content`; ShareGPT's `conversations` of `from` and `value`; `question` and `answer` (GSM8K).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tasks.data import files
from tasks.data.held_out import HELD_OUT, is_chosen
from tasks.data.json_lines import Row
from tasks.instruct import demo

ASSISTANT = "assistant"
SHAREGPT = {"human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "system": "system"}
FORMATS = "instruction and output; messages; conversations; question and answer"


class Message(NamedTuple):
    """One turn."""

    role: str  # system | user | assistant
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns, of which the assistant's are to be learned."""

    messages: tuple[Message, ...]
    context: str = ""  # Alpaca's input, which belongs to the first user message

    @property
    def answer(self) -> str:
        """The last of the assistant's turns."""
        return self.messages[-1].content


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub."""

    id: str
    revision: str | None = None  # None: the latest; the record has a digest of what was read
    config: str | None = None
    test: str | None = None  # a split that is held out


HUB = {
    "alpaca-gpt4": HubSet("vicgalle/alpaca-gpt4"),
    "alpaca": HubSet("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017"),
    "openhermes-2.5": HubSet("teknium/OpenHermes-2.5", "05c3557e57b6dd1d0e0cb8369ba53b43e15fd10b"),
    "mathinstruct": HubSet("TIGER-Lab/MathInstruct", "b4fdc323a7be1379c9c7c0b67b1de72dfee2111a"),
    "gsm8k": HubSet("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", config="main", test="test"),
}
HUB["hub"] = HUB["alpaca-gpt4"]


@dataclass
class Conversations:
    """Both sides of the split, and what was left out."""

    training: list[Conversation] = field(default_factory=list)
    held_out: list[Conversation] = field(default_factory=list)
    without_answer: int = 0
    repeated: int = 0  # training conversations that are held out as well
    sha256: str = ""
    revision: str | None = None

    @property
    def notes(self) -> list[str]:
        counts = {
            "conversations without an answer": self.without_answer,
            "training conversations that are among the held-out ones": self.repeated,
        }
        return [f"{count:,} {what} left out" for what, count in counts.items() if count]


def check_source(data: str) -> None:
    """Raises ValueError where `data` is no source."""
    if data != "demo" and data not in HUB:
        files.find(data, files.JSON, f"'demo' nor one of the hub's ({', '.join(HUB)})")


def read(data: str) -> Conversations:
    """All conversations of a source.

    What is held out is a split of its own where there is one - the hub's, or files of a folder that are called like it
    (test.jsonl, gsm8k_test.jsonl) - or else decided by a hash of each conversation.

    Raises:
        ValueError: a file is missing, empty or malformed, a row has none of the known formats, the hub can't be
            reached, or one side of the split is empty.
    """
    check_source(data)
    training, test, revision = _rows(data)
    made = Conversations(revision=revision)
    found, held_out = _named(training, made), _named(test or (), made)
    if test is None:
        # in the order of their hashes: the first of them are a sample of all
        held_out = sorted((pair for pair in found if is_chosen(pair[0])), key=lambda pair: pair[0])
        found = [pair for pair in found if not is_chosen(pair[0])]
    apart = {name for name, _ in held_out}
    made.held_out = [one for _, one in held_out]
    made.training = [one for name, one in found if name not in apart]
    made.repeated = len(found) - len(made.training)
    made.sha256 = hashlib.sha256(b"".join([*(name for name, _ in found), b"|", *(n for n, _ in held_out)])).hexdigest()
    for side, some in (("training", made.training), ("held-out", made.held_out)):
        if not some:
            raise ValueError(f"data {data!r} has no {side} conversations: one of {HELD_OUT} is held out, give more")
    return made


def _named(rows: Iterable[Row], made: Conversations) -> list[tuple[bytes, Conversation]]:
    """The conversations with an answer, and a hash of each; the others are counted."""
    found = []
    for row in rows:
        one = conversation(row)
        if one is None:
            made.without_answer += 1
        else:
            found.append((hashlib.sha256(json.dumps([one.messages, one.context]).encode()).digest(), one))
    return found


def _rows(data: str) -> tuple[Iterable[Row], Iterable[Row] | None, str | None]:
    """Training rows, held-out rows where they are apart, and the revision."""
    if data == "demo":
        return (Row(f"demo, item {n}", row) for n, row in enumerate(demo.rows(), 1)), None, None
    if data in HUB:
        known = HUB[data]
        test = _from_hub(known, known.test) if known.test else None
        return _from_hub(known, "train"), test, known.revision
    paths = files.find(data, files.JSON, "'demo'")
    apart = [path for path in paths if _is_test(path)] if len(paths) > 1 else []
    return _of(path for path in paths if path not in apart), _of(apart) if apart else None, None


def _of(paths: Iterable[Path]) -> Iterator[Row]:
    return (row for path in paths for row in files.rows(path))


def _is_test(path: Path) -> bool:
    return re.search(r"(^|[_.-])(test|val|valid|validation|dev|eval)([_.-])", path.name) is not None


def _from_hub(known: HubSet, split: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(known.id, known.config, split=split, revision=known.revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"can't load {known.id} from the hub: {reason}; --data also takes a file or folder") from error
    return (Row(f"{known.id}, row {number}", row) for number, row in enumerate(rows, 1))


def conversation(row: Row) -> Conversation | None:
    """A row's conversation up to its last answer; None where there is no answer.

    Raises:
        ValueError: the row is in none of the known formats; with its place.
    """
    fields = row.value
    if "messages" in fields:
        return _answered([Message(one.text("role"), one.text("content")) for one in row.rows("messages")])
    if "conversations" in fields:
        return _answered([Message(_role(one), one.text("value")) for one in row.rows("conversations")])
    if "instruction" in fields and "output" in fields:
        context = row.text("input") if fields.get("input") is not None else ""
        return _answered([Message("user", row.text("instruction")), Message(ASSISTANT, row.text("output"))], context)
    if "question" in fields and "answer" in fields:
        return _answered([Message("user", row.text("question")), Message(ASSISTANT, row.text("answer"))])
    raise ValueError(f"{row.where}: no known format ({FORMATS}) has the fields {', '.join(fields) or '(none)'}")


def _role(one: Row) -> str:
    name = one.text("from")
    if name not in SHAREGPT:
        raise ValueError(f"{one.where}: 'from' must be one of {', '.join(SHAREGPT)}, got {name!r}")
    return SHAREGPT[name]


def _answered(messages: list[Message], context: str = "") -> Conversation | None:
    answers = [number for number, one in enumerate(messages) if one.role == ASSISTANT and one.content.strip()]
    return Conversation(tuple(messages[: answers[-1] + 1]), context) if answers else None
