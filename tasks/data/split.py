"""Items to train on and items held out, read from a demo, files or the hub."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from tasks.data import files, hub
from tasks.data.files import File
from tasks.data.held_out import HELD_OUT, is_chosen
from tasks.data.rows import Row, RowError
from tasks.data.tally import Tally

T = TypeVar("T")


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub."""

    id: str
    revision: str | None = None  # None: the latest; the record has a digest of what was read
    config: str | None = None
    train: str = "train"
    test: str | None = None  # the split to hold out


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What rows become.

    Attributes:
        what: the items' name in messages, "conversations".
        make: an item of a row; raises RowError for a row that it can't use.
        name: a hash that identifies an item; its first 8 bytes decide whether the item is held out.
        demo: rows made by us.
        hub: data sets of the hub by short name.
    """

    what: str
    make: Callable[[Row, Tally], T]
    name: Callable[[T], bytes]
    demo: Callable[[], Iterable[dict[str, Any]]]
    hub: Mapping[str, HubSet]


@dataclass
class Split(Generic[T]):
    """Both sides, and what was left out."""

    what: str
    training: list[T] = field(default_factory=list)
    held_out: list[T] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    repeated: int = 0  # training items that are also held out
    sha256: str = ""
    revision: str | None = None
    of_folder: list[str] = field(default_factory=list)  # notes on which of its files are held out, or aren't read

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know."""
        repeated = f"{self.repeated:,} training {self.what} left out, since they are held out too"
        return [*self.of_folder, *self.tally.notes, *([repeated] if self.repeated else [])]


class Part(NamedTuple):
    """Rows that belong together: a file, or a split of a data set on the hub."""

    where: str
    rows: Iterable[Row | RowError]


def check_source(kind: Kind[T], data: str) -> None:
    """Raises ValueError if `data` isn't a source."""
    if data != "demo" and data not in kind.hub:
        files.find(data, files.ROWS, f"'demo' nor one of the hub's ({', '.join(kind.hub)})")


def read(kind: Kind[T], data: str) -> Split[T]:
    """All items of a source.

    The held-out items are a separate split if there is one - the hub's, or files in a folder named accordingly
    (test.jsonl, gsm8k_test.jsonl) - and otherwise chosen by the hash of each item.

    Raises:
        ValueError: a file is missing or can't be read, more than half of its rows can't be used, the hub can't be
            reached, or one side of the split is empty.
    """
    check_source(kind, data)
    training, test, revision = _parts(kind, data)
    made = Split[T](kind.what, revision=revision)
    if data != "demo" and data not in kind.hub:
        made.of_folder = [*files.held_out(data, files.ROWS), *files.passed_over(data, files.ROWS)]
    found, held_out = named(kind, training, made.tally), named(kind, test or (), made.tally)
    if test is None:
        # in the order of their hashes, so that the first ones are a sample of all
        chosen = _chosen({name[:8] for name, _ in found})
        held_out = sorted((pair for pair in found if pair[0][:8] in chosen), key=lambda pair: pair[0])
        found = [pair for pair in found if pair[0][:8] not in chosen]
    apart = {name for name, _ in held_out}
    made.held_out = [one for _, one in held_out]
    made.training = [one for name, one in found if name not in apart]
    made.repeated = len(found) - len(made.training)
    made.sha256 = hashlib.sha256(b"".join([*(name for name, _ in found), b"|", *(n for n, _ in held_out)])).hexdigest()
    for side, some in (("training", made.training), ("held-out", made.held_out)):
        if not some:
            given = f"one in {HELD_OUT} is held out, give more" + "".join(f"; {note}" for note in made.notes)
            raise ValueError(f"data {data!r} has no {side} {kind.what}: {given}")
    return made


def _chosen(starts: set[bytes]) -> set[bytes]:
    """The first 8 bytes of what to hold out: one in so many, or one of so few that none is."""
    return {start for start in starts if is_chosen(start)} or set(sorted(starts)[:1] if len(starts) > 1 else ())


def named(kind: Kind[T], parts: Iterable[Part], tally: Tally) -> list[tuple[bytes, T]]:
    """The items, and the hash of each."""
    return [
        (kind.name(one), one)
        for where, rows in parts
        for one in tally.use(where, rows, lambda row: kind.make(row, tally))
    ]


def _parts(kind: Kind[T], data: str) -> tuple[Iterable[Part], Iterable[Part] | None, str | None]:
    """Training rows, held-out rows if they are separate, and the revision."""
    if data == "demo":
        return [Part("demo", (Row(f"demo, item {n}", row) for n, row in enumerate(kind.demo(), 1)))], None, None
    if data in kind.hub:
        known = kind.hub[data]
        test = [_from_hub(known, known.test)] if known.test else None
        return [_from_hub(known, known.train)], test, known.revision
    paths = files.find(data, files.ROWS, "'demo'")
    apart = files.named_as_tests(paths)
    return _of(path for path in paths if path not in apart), _of(apart) if apart else None, None


def _of(paths: Iterable[Path]) -> Iterator[Part]:
    return (Part(str(path), File.at(path).rows()) for path in paths)


def _from_hub(known: HubSet, split: str) -> Part:
    rows = hub.load(known.id, known.config, split=split, revision=known.revision, way_out="a file or folder")
    return Part(known.id, (Row(f"{known.id}, row {number}", row) for number, row in enumerate(rows, 1)))
