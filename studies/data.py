"""The data of the studies, cut from published files: `python -m studies.data SUPERGLUE PRETRAIN INSTRUCT`.

Makes `data/` in the current folder, which the study files name:

    data/superglue          CB, RTE and COPA as published; of BoolQ and MultiRC the first thousand examples of each part
    data/superglue-tuning   the same without their validation examples: instead the last of the training examples,
                            so that no value is chosen on what is scored afterwards
    data/pretrain-apart, data/instruct    as given; so of the texts to pretrain on those are held out whose names say so
    data/pretrain           the same texts, all to be trained on: under names that say nothing
"""

import json
import shutil
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HELD_OUT = {"CB": 50, "RTE": 277, "COPA": 80, "BoolQ": 250, "MultiRC": 250}  # examples to choose values on
NAMES = {"wikitext2_test.txt": "wikitext2_1.txt", "wikitext2_valid.txt": "wikitext2_2.txt"}
MOST = {"BoolQ": 1_000, "MultiRC": 1_000}  # examples of a part


def main(arguments: Sequence[str]) -> None:
    """Write all of `data/`."""
    superglue, pretrain, instruct = map(Path, arguments)
    for task, held_out in HELD_OUT.items():
        train, validation = (
            _first(_rows(superglue / task / f"{part}.jsonl"), MOST.get(task)) for part in ("train", "val")
        )
        _write(Path("data/superglue") / task, train, validation)
        _write(Path("data/superglue-tuning") / task, *_split(train, held_out))
    for source, name in ((pretrain, "pretrain-apart"), (instruct, "instruct")):
        shutil.copytree(source, Path("data") / name, dirs_exist_ok=True)
    Path("data/pretrain").mkdir(exist_ok=True)
    for file in pretrain.iterdir():
        shutil.copyfile(file, Path("data/pretrain") / NAMES.get(file.name, file.name))


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _examples(row: Row) -> int:
    """Of MultiRC, a row is a passage with many questions and answers."""
    passage = row.get("passage")
    return sum(len(question["answers"]) for question in passage["questions"]) if isinstance(passage, dict) else 1


def _first(rows: list[Row], most: int | None) -> list[Row]:
    """As many whole rows as have at most that many examples."""
    return [
        row for row, count in zip(rows, accumulate(map(_examples, rows)), strict=True) if most is None or count <= most
    ]


def _split(rows: list[Row], held_out: int) -> tuple[list[Row], list[Row]]:
    """Without the last rows, and these: they have at least `held_out` examples."""
    count = next(n for n in range(1, len(rows)) if sum(map(_examples, rows[-n:])) >= held_out)
    return rows[:-count], rows[-count:]


def _write(folder: Path, train: list[Row], validation: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("val", validation)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
