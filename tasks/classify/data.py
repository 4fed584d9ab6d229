"""Reading your own labelled texts: `text`, `label` and, for pairs, `text2`, as JSON lines or as a table."""

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from pathlib import Path

from tasks.data import files
from tasks.data.files import File
from tasks.data.rows import Row, RowError, listed, short
from tasks.data.tally import Errors, Tally
from tasks.models.classifier import Example
from tasks.superglue import demo as superglue_demo

TRAIN, VALIDATION = ("train",), ("val", "validation", "valid", "dev")  # names of files, without their endings
VALIDATION_SHARE = 0.1  # of the texts, if there is a single file

KINDS = {bool: "true or false", int: "a whole number", str: "text"}

NUMBER = re.compile(r"[+-]?\d{1,20}(\.\d{1,20})?")

Label = bool | int | str


@dataclass(frozen=True)
class Labelled:
    """An example as written in a file."""

    where: str  # "my.csv, line 3"
    first: str
    second: str  # "" for a single text
    label: Label

    @property
    def is_held_out(self) -> bool:
        """Is it in the validation set, if one file serves for both? Equal texts are on the same side."""
        digest = hashlib.sha256(f"{self.first}\0{self.second}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64 < VALIDATION_SHARE


@dataclass(frozen=True)
class Data:
    """All examples of a source.

    Attributes:
        labels: the classes in order; an example holds the index of its class.
        sha256: of the files.
        notes: what a reader of the results must know.
    """

    train: list[Example]
    validation: list[Example]
    labels: tuple[Label, ...]
    sha256: str
    notes: tuple[str, ...] = ()


def find(data: str) -> tuple[Path, Path | None, list[Path]]:
    """The training file, the validation file (if the folder has one), and the files that aren't used.

    Raises:
        ValueError: there are none, or it isn't clear which to use.
    """
    if data == "hub":
        raise ValueError("classify has no data set on the hub: give --data a file with text and label, or a folder")
    found = files.find(data, files.ROWS, "'demo'")
    if Path(data).is_file():
        return found[0], None, []
    train, validation = _called(data, found, TRAIN), _called(data, found, VALIDATION)
    if train is None:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{data}: there is no train.jsonl or train.csv, only {names}: give one of them as --data")
    return train, validation, [file for file in found if file not in (train, validation)]


def _called(data: str, found: Sequence[Path], names: Sequence[str]) -> Path | None:
    fitting = [file for file in found if file.name.partition(".")[0] in names]
    if len(fitting) > 1:
        raise ValueError(
            f"{data}: {fitting[0].name} and {fitting[1].name} could both be {names[0]}: keep only one of them"
        )
    return fitting[0] if fitting else None


def read(data: str) -> Data:
    """All examples of `data`: "demo", a file, or a folder with train and val files; one file is split by its texts.

    Raises:
        ValueError: a file is missing or can't be read, more than half of its rows can't be used, or nothing can be
            learned from the rest.
    """
    if data == "demo":
        return _demo()
    train_file, validation_file, unused = find(data)
    tally = Tally()
    train = _of_one_kind(_labelled_in(File.at(train_file), tally), tally)
    if validation_file is None:
        validation = [one for one in train if one.is_held_out]
        train = [one for one in train if not one.is_held_out]
        _check_split(train_file, train, validation, tally)
    else:
        validation = _labelled_in(File.at(validation_file), tally)
    labels = _labels(train, tally.notes)
    validation = _of_known(validation, labels, validation_file or train_file, tally)
    used = [train_file] if validation_file is None else [train_file, validation_file]
    notes = (
        *(f"{file.name} isn't used" for file in unused),
        *files.passed_over(data, files.ROWS),
        *_alike(labels),
        *_seen(train, validation),
        *tally.notes,
    )
    return Data(_examples(train, labels), _examples(validation, labels), labels, files.sha256(used), notes)


@functools.cache
def _demo() -> Data:
    """The demo of CommitmentBank (SuperGLUE), in the form of a user's own sentence pairs."""
    splits = [_demo_file(split) for split in ("train", "val")]
    train, validation = (_labelled_in(split, Tally()) for split in splits)
    labels = _labels(train)
    sha256 = hashlib.sha256("".join(split.sha256 for split in splits).encode()).hexdigest()
    return Data(_examples(train, labels), _examples(validation, labels), labels, sha256)


def _demo_file(split: str) -> File:
    rows = [json.loads(line) for line in superglue_demo.lines("CB", split)]
    texts = [{"text": row["premise"], "text2": row["hypothesis"], "label": row["label"]} for row in rows]
    return File(f"demo {split}", "".join(f"{json.dumps(row)}\n" for row in texts).encode())


def _labelled_in(file: File, tally: Tally) -> list[Labelled]:
    return list(tally.use(file.where, file.rows(), _labelled))


def _labelled(row: Row) -> Labelled:
    second, label = row.text("text2") if row.has("text2") else "", row.plain("label")
    label = label.strip() if isinstance(label, str) else label  # "text, label" is how many write a table
    one = Labelled(row.where, row.text("text"), second, label)
    if not one.first.strip():
        raise RowError(row.where, "'text' is empty")
    if one.label == "":
        raise RowError(row.where, "'label' is empty")
    return one


def _of_one_kind(examples: Sequence[Labelled], tally: Tally) -> list[Labelled]:
    """The examples whose label has the most common type: text, whole number, or true and false."""
    kind = Counter(type(one.label) for one in examples).most_common(1)[0][0]
    for one in examples:
        if type(one.label) is not kind:
            tally.leave_out(
                RowError(one.where, f"'label' isn't {KINDS[kind]}, as most are", f", but {short(one.label)}")
            )
    return [one for one in examples if type(one.label) is kind]


def _of_known(examples: Sequence[Labelled], labels: Sequence[Label], path: Path, tally: Tally) -> list[Labelled]:
    """The validation examples whose labels also occur in training."""
    errors, known = Errors(), []
    for one in examples:
        if any(one.label == label and type(one.label) is type(label) for label in labels):
            known.append(one)
            continue
        reason = f"no training example has the label {short(one.label)}"
        error = RowError(one.where, reason, f": there are {listed(map(short, labels))}")
        errors.add(error)
        tally.leave_out(error)
    errors.check(str(path), len(examples), "validation example")
    return known


def _labels(examples: Sequence[Labelled], notes: Sequence[str] = ()) -> tuple[Label, ...]:
    """The classes, in order. Raises ValueError, with the notes on what was left out, if there are fewer than two."""
    labels = tuple(sorted({one.label for one in examples}))
    if len(labels) < 2:
        first = examples[0]
        raise ValueError(
            f"{first.where}: every example has the label {short(first.label)}, so there is nothing to learn"
            + "".join(f"; {note}" for note in notes)
        )
    return labels


def _alike(labels: Sequence[Label]) -> Iterator[str]:
    """A note on classes that may be one."""
    for _, some in groupby(sorted(labels, key=_folded), key=_folded):
        names = [short(label) for label in some]
        if len(names) > 1:
            yield f"{' and '.join(names)} are different classes"


def _seen(train: Sequence[Labelled], validation: Sequence[Labelled]) -> Iterator[str]:
    """A note on validation examples whose text is trained on: their score tells nothing of others."""
    trained = {(one.first, one.second) for one in train}
    count = sum((one.first, one.second) in trained for one in validation)
    if count:
        yield f"{count:,} of {len(validation):,} validation examples are also trained on"


def _folded(label: Label) -> str:
    """What stays of a label without capitals, spaces, forms of the same characters, and characters that aren't seen."""
    text = "".join(one for one in unicodedata.normalize("NFKC", str(label)) if unicodedata.category(one) != "Cf")
    folded = " ".join(text.casefold().split())
    return folded if NUMBER.fullmatch(folded) is None else str(Decimal(folded).normalize())


def _check_split(path: Path, train: Sequence[Labelled], validation: Sequence[Labelled], tally: Tally) -> None:
    if not train or not validation:
        raise ValueError(
            f"{path}: of {len(train) + len(validation)} examples, {len(validation)} are in the validation set, which "
            f"is {VALIDATION_SHARE:.0%} of the texts by hash: give more, or a folder with train and val files"
            + "".join(f"; {note}" for note in tally.notes)
        )


def _examples(found: Sequence[Labelled], labels: Sequence[Label]) -> list[Example]:
    index = {label: number for number, label in enumerate(labels)}
    return [Example(one.first, one.second, index[one.label]) for one in found]
