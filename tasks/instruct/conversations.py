"""Conversations to tune on, from the demo, files or the hub, and which of them are held out."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tasks.data import files, hub
from tasks.data.files import File
from tasks.data.held_out import HELD_OUT, is_chosen
from tasks.data.rows import Row, RowError
from tasks.data.tally import Tally
from tasks.instruct import demo
from tasks.instruct.formats import Conversation, conversation


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub."""

    id: str
    revision: str | None = None  # None: the latest; the record has a digest of what was read
    config: str | None = None
    test: str | None = None  # the split to hold out


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
    tally: Tally = field(default_factory=Tally)
    repeated: int = 0  # training conversations that are also held out
    sha256: str = ""
    revision: str | None = None

    @property
    def notes(self) -> list[str]:
        repeated = f"{self.repeated:,} training conversations left out, since they are held out too"
        return [*self.tally.notes, *([repeated] if self.repeated else [])]


class Part(NamedTuple):
    """Rows that belong together: a file, or a split of a data set on the hub."""

    where: str
    rows: Iterable[Row | RowError]


def check_source(data: str) -> None:
    """Raises ValueError if `data` isn't a source."""
    if data != "demo" and data not in HUB:
        files.find(data, files.ROWS, f"'demo' nor one of the hub's ({', '.join(HUB)})")


def read(data: str) -> Conversations:
    """All conversations of a source.

    The held-out conversations are a separate split if there is one - the hub's, or files in a folder named accordingly
    (test.jsonl, gsm8k_test.jsonl) - and otherwise chosen by a hash of each conversation.

    Raises:
        ValueError: a file is missing or can't be read, more than half of its rows can't be used, the hub can't be
            reached, or one side of the split is empty.
    """
    check_source(data)
    training, test, revision = _parts(data)
    made = Conversations(revision=revision)
    found, held_out = _named(training, made.tally), _named(test or (), made.tally)
    if test is None:
        # in the order of their hashes, so that the first ones are a sample of all
        held_out = sorted((pair for pair in found if is_chosen(pair[0])), key=lambda pair: pair[0])
        found = [pair for pair in found if not is_chosen(pair[0])]
    apart = {name for name, _ in held_out}
    made.held_out = [one for _, one in held_out]
    made.training = [one for name, one in found if name not in apart]
    made.repeated = len(found) - len(made.training)
    made.sha256 = hashlib.sha256(b"".join([*(name for name, _ in found), b"|", *(n for n, _ in held_out)])).hexdigest()
    for side, some in (("training", made.training), ("held-out", made.held_out)):
        if not some:
            given = f"one in {HELD_OUT} is held out, give more" + "".join(f"; {note}" for note in made.notes)
            raise ValueError(f"data {data!r} has no {side} conversations: {given}")
    return made


def _named(parts: Iterable[Part], tally: Tally) -> list[tuple[bytes, Conversation]]:
    """The conversations, and a hash of each."""
    return [
        (_hash(one), one)
        for where, rows in parts
        for one in tally.use(where, rows, lambda row: conversation(row, tally))
    ]


def _hash(one: Conversation) -> bytes:
    turns = [[role, content] if learned else [role, content, "context"] for role, content, learned in one.messages]
    return hashlib.sha256(json.dumps([turns, one.context]).encode()).digest()


def _parts(data: str) -> tuple[Iterable[Part], Iterable[Part] | None, str | None]:
    """Training rows, held-out rows if they are separate, and the revision."""
    if data == "demo":
        return [Part("demo", (Row(f"demo, item {n}", row) for n, row in enumerate(demo.rows(), 1)))], None, None
    if data in HUB:
        known = HUB[data]
        test = [_from_hub(known, known.test)] if known.test else None
        return [_from_hub(known, "train")], test, known.revision
    paths = files.find(data, files.ROWS, "'demo'")
    apart = [path for path in paths if _is_test(path)] if len(paths) > 1 else []
    return _of(path for path in paths if path not in apart), _of(apart) if apart else None, None


def _of(paths: Iterable[Path]) -> Iterator[Part]:
    return (Part(str(path), File.at(path).rows()) for path in paths)


def _is_test(path: Path) -> bool:
    return re.search(r"(^|[_.-])(test|val|valid|validation|dev|eval)([_.-])", path.name) is not None


def _from_hub(known: HubSet, split: str) -> Part:
    rows = hub.load(known.id, known.config, split=split, revision=known.revision, way_out="a file or folder")
    return Part(known.id, (Row(f"{known.id}, row {number}", row) for number, row in enumerate(rows, 1)))
