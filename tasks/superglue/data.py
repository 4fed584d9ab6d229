"""Reading SuperGLUE (Wang et al., 2019, arXiv 1905.00537) from one of three sources.

`demo` is generated, a folder holds the official release (`BoolQ/train.jsonl`, `BoolQ/val.jsonl`, ...,
`AX-b/AX-b.jsonl`), and `hub` is `aps/super_glue`, whose rows are converted back to the official format. All three give
lines of JSON, so what follows - checking a line, turning it into examples - is written once, in `examples.py`.
"""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tasks.data import hub
from tasks.data.files import File
from tasks.superglue import demo

HUB_ID = "aps/super_glue"
HUB_REVISION = "3de24cf8022e94f4ee4b9d55a6f539891524d646"
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
DIAGNOSTICS = ("AX-b", "AX-g")  # one file, named like the folder; evaluation only
FOLDERS = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC", *DIAGNOSTICS)


def file_name(folder: str, split: str) -> str:
    """The file's path in the official release: "RTE/train.jsonl", "AX-b/AX-b.jsonl"."""
    return f"{folder}/{folder if folder in DIAGNOSTICS else split}.jsonl"


def read(data: str, folder: str, split: str) -> File:
    """Read one file of a source.

    Args:
        data: "demo", "hub" or the path of a folder.
        folder: a member of `FOLDERS`.
        split: "train", "val", or "test" for a diagnostic set.

    Raises:
        ValueError: the file is missing or can't be read, or the hub can't be reached.
    """
    name = file_name(folder, split)
    if data == "demo":
        return File(f"demo {name}", "".join(f"{line}\n" for line in demo.lines(folder, split)).encode())
    if data == "hub":
        return File(f"{HUB_ID} {name}", _from_hub(folder, split))
    path = Path(data) / name
    if not path.is_file():
        raise ValueError(f"{path} is missing; it is part of the official release's {folder} folder")
    return File.at(path)


def available_in(data: str) -> tuple[str, ...]:
    """Which of `FOLDERS` a source has.

    Raises:
        ValueError: `data` is neither "demo" nor "hub" nor a folder that has any of them.
    """
    if data in ("demo", "hub"):
        return FOLDERS
    found = tuple(folder for folder in FOLDERS if os.path.isdir(os.path.join(data, folder)))
    if not found:
        raise ValueError(
            f"data {data[:100]!r} is neither 'demo' nor 'hub' nor a folder in the layout of the official SuperGLUE "
            f"release: {', '.join(FOLDERS[:-2])} with train.jsonl and val.jsonl each, as in RTE/train.jsonl"
        )
    return found


# ---- the hub


def _from_hub(folder: str, split: str) -> bytes:
    config = {"WSC": "wsc.fixed", "AX-b": "axb", "AX-g": "axg"}.get(folder, folder.lower())
    rows = hub.load(HUB_ID, config, split=HUB_SPLITS[split], revision=HUB_REVISION, way_out="a folder")
    official = OFFICIAL.get(folder, _named_labels)(rows)
    return "".join(json.dumps(row) + "\n" for row in official).encode()


def _named_labels(rows: Any) -> Iterator[dict]:
    """Class numbers become what is in the official files: names, or true and false."""
    names = rows.features["label"].names
    values = {"False": False, "True": True, "choice1": 0, "choice2": 1}
    for row in rows:
        name = names[row["label"]]
        yield row | {"label": values.get(name, name)}


def _wsc(rows: Any) -> Iterator[dict]:
    keys = ("span1_index", "span1_text", "span2_index", "span2_text")
    for row in _named_labels(rows):
        yield {"text": row["text"], "target": {key: row[key] for key in keys}, "label": row["label"], "idx": row["idx"]}


def _multirc(rows: Iterable[dict]) -> Iterator[dict]:
    """Rows per answer become rows per passage."""
    for passage, of_passage in groupby(rows, key=lambda row: row["idx"]["paragraph"]):
        text, questions = "", []
        for question, of_question in groupby(of_passage, key=lambda row: row["idx"]["question"]):
            answers = list(of_question)
            text = answers[0]["paragraph"]
            questions.append(
                {
                    "question": answers[0]["question"],
                    "answers": [{"text": a["answer"], "label": a["label"], "idx": a["idx"]["answer"]} for a in answers],
                    "idx": question,
                }
            )
        yield {"passage": {"text": text, "questions": questions}, "idx": passage}


def _record(rows: Iterable[dict]) -> Iterator[dict]:
    """Rows per query become rows per passage. The hub's spans exclude their end, the official ones include it."""
    for passage, of_passage in groupby(rows, key=lambda row: row["idx"]["passage"]):
        queries = list(of_passage)
        spans = queries[0]["entity_spans"]
        entities = [{"start": s, "end": e - 1} for s, e in zip(spans["start"], spans["end"], strict=True)]
        qas = [
            {"query": q["query"], "answers": [{"text": text} for text in q["answers"]], "idx": q["idx"]["query"]}
            for q in queries
        ]
        yield {"passage": {"text": queries[0]["passage"], "entities": entities}, "qas": qas, "idx": passage}


OFFICIAL = {"WSC": _wsc, "MultiRC": _multirc, "ReCoRD": _record}
