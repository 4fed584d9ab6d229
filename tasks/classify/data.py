"""Reading one's own classified texts: `text`, `label` and, for pairs, `text2`, as JSON lines or as a table."""

import csv
import functools
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.data import files
from tasks.data.json_lines import Lines, Row, lines_of, parse, short
from tasks.models.classifier import Example
from tasks.superglue import demo as superglue_demo

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*files.JSON, *DELIMITERS)
TRAIN, VALIDATION = ("train",), ("val", "validation", "valid", "dev")  # names of files, without their endings
VALIDATION_SHARE = 0.1  # of a single file's texts

Label = bool | int | str


@dataclass(frozen=True)
class Labelled:
    """An example as it stands in a file."""

    where: str  # "my.csv, line 3"
    first: str
    second: str  # "" for a single text
    label: Label

    @property
    def is_held_out(self) -> bool:
        """Is it of the validation set, where there is one file for both? Equal texts are on one side."""
        digest = hashlib.sha256(f"{self.first}\0{self.second}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64 < VALIDATION_SHARE


@dataclass(frozen=True)
class Data:
    """All examples of a source.

    Attributes:
        labels: the classes in their order; an example has the index of its own.
        sha256: of the files.
        notes: what a reader of the results must know.
    """

    train: list[Example]
    validation: list[Example]
    labels: tuple[Label, ...]
    sha256: str
    notes: tuple[str, ...] = ()


def find(data: str) -> tuple[Path, Path | None, list[Path]]:
    """The files of training and (in a folder that has one) validation, and those that aren't used.

    Raises:
        ValueError: there are none, or it isn't clear which.
    """
    if data == "hub":
        raise ValueError("classify has no data set on the hub: give --data a file with text and label, or a folder")
    found = files.find(data, SUFFIXES, "'demo'")
    if Path(data).is_file():
        return found[0], None, []
    train, validation = _called(data, found, TRAIN), _called(data, found, VALIDATION)
    if train is None:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{data}: no file is called train.jsonl or train.csv, there are {names}: give one as --data")
    return train, validation, [file for file in found if file not in (train, validation)]


def _called(data: str, found: Sequence[Path], names: Sequence[str]) -> Path | None:
    fitting = [file for file in found if file.name.partition(".")[0] in names]
    if len(fitting) > 1:
        raise ValueError(f"{data}: {fitting[0].name} and {fitting[1].name} are both for {names[0]}: leave one of them")
    return fitting[0] if fitting else None


def read(data: str) -> Data:
    """All examples of `data`: "demo", a file, or a folder with train and val files; one file is split by its texts.

    Raises:
        ValueError: a file is missing, empty or malformed, or its examples can't be learned from; with file and line.
    """
    if data == "demo":
        return _demo()
    train_file, validation_file, unused = find(data)
    train = [_labelled(row) for row in _rows(train_file)]
    if validation_file is None:
        validation = [one for one in train if one.is_held_out]
        train = [one for one in train if not one.is_held_out]
        _check_split(train_file, train, validation)
        labels = _labels(train + validation)
    else:
        validation = [_labelled(row) for row in _rows(validation_file)]
        labels = _labels(train)
        _check_known(validation, labels)
    used = [train_file] if validation_file is None else [train_file, validation_file]
    notes = tuple(f"{file.name} isn't used" for file in unused)
    return Data(_examples(train, labels), _examples(validation, labels), labels, files.sha256(used), notes)


@functools.cache
def _demo() -> Data:
    """The demo of CommitmentBank (SuperGLUE), as somebody's own pairs of sentences."""
    splits = [_demo_lines(split) for split in ("train", "val")]
    train, validation = ([_labelled(parse(line)) for line in split.lines] for split in splits)
    labels = _labels(train)
    sha256 = hashlib.sha256("".join(split.sha256 for split in splits).encode()).hexdigest()
    return Data(_examples(train, labels), _examples(validation, labels), labels, sha256)


def _demo_lines(split: str) -> Lines:
    rows = [json.loads(line) for line in superglue_demo.lines("CB", split)]
    texts = [{"text": row["premise"], "text2": row["hypothesis"], "label": row["label"]} for row in rows]
    return lines_of(f"demo {split}", "".join(f"{json.dumps(row)}\n" for row in texts).encode())


def _rows(path: Path) -> Iterator[Row]:
    return _table(path, DELIMITERS[path.suffix]) if path.suffix in DELIMITERS else files.rows(path)


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    """The rows of a table with a header, as objects of texts. Blank lines are none."""
    reader = csv.reader(io.StringIO(files.text(path), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{path}, line {start}", reader.line_num + 1  # a quoted cell may go over lines
            if not header:
                header = _header(where, cells)
            elif cells and len(cells) != len(header):
                raise ValueError(f"{where}: {len(cells)} cells, but the header names {len(header)} columns")
            elif cells:
                yield Row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a valid table ({error})") from error


def _header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    for name in ("text", "label"):
        if names.count(name) != 1:
            raise ValueError(f"{where}: the header must name one column {name!r}, it has {', '.join(names)}")
    return names


def _labelled(row: Row) -> Labelled:
    second = row.text("text2") if row.value.get("text2") is not None else ""
    one = Labelled(row.where, row.text("text"), second, row.plain("label"))
    if not one.first.strip():
        raise ValueError(f"{row.where}: 'text' is empty")
    if one.label == "":
        raise ValueError(f"{row.where}: 'label' is empty")
    return one


def _labels(examples: Sequence[Labelled]) -> tuple[Label, ...]:
    """The classes, in their order. Raises ValueError where they aren't of one kind, or fewer than two."""
    first = examples[0]
    for one in examples:
        if type(one.label) is not type(first.label):
            raise ValueError(
                f"{one.where}: the label {short(one.label)} isn't of the same kind as {short(first.label)} of "
                f"{first.where}: labels are all texts, or all whole numbers"
            )
    labels = tuple(sorted({one.label for one in examples}))
    if len(labels) < 2:
        raise ValueError(
            f"{first.where}: every example has the label {short(first.label)}, so there is nothing to learn"
        )
    return labels


def _check_split(path: Path, train: Sequence[Labelled], validation: Sequence[Labelled]) -> None:
    if not train or not validation:
        raise ValueError(
            f"{path}: of {len(train) + len(validation)} examples, {len(validation)} fall to the validation set, which "
            f"is {VALIDATION_SHARE:.0%} of the texts by their hash: give more, or a folder with train and val files"
        )


def _check_known(validation: Sequence[Labelled], labels: Sequence[Label]) -> None:
    for one in validation:
        if not any(one.label == label and type(one.label) is type(label) for label in labels):
            known = ", ".join(map(short, labels))
            raise ValueError(f"{one.where}: no training example has the label {short(one.label)}: there are {known}")


def _examples(found: Sequence[Labelled], labels: Sequence[Label]) -> list[Example]:
    index = {label: number for number, label in enumerate(labels)}
    return [Example(one.first, one.second, index[one.label]) for one in found]
