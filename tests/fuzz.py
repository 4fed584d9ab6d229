"""Seeded damage: to files of rows in every format, and to folders of models."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2.5, 1e308, float("nan"), "", " ", "x", "\ud83d", "\x00", "</s>", "<|im_end|>", "\u2028"),
    *([], [[]], [None], {}, {"a": 1}, [{"role": "dog", "content": 3}], [{"from": None}], "9" * 400),
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252", "utf-32")


def rows_for(kind: str, random: Random) -> list[dict[str, Any]]:
    """Good rows of a kind of task, in one of its formats."""
    count = random.randint(1, 60)
    if kind == "c4":
        return [{"text": f"the {n}th museum is open. " * random.randint(1, 9)} for n in range(count)]
    if kind == "classify":
        return [
            {"text": f"museum {n}", "text2": "so?" if n % 2 else "", "label": f"class {n % 3}"} for n in range(count)
        ]
    question, answer = {"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello!"}
    said = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    formats: list[dict[str, Any]] = [
        {"instruction": "Say it.", "input": "", "output": "It.", "system": "Be kind.", "history": [["a", "b"]]},
        {"messages": [question, answer, question, answer]},
        {"conversations": said, "system": "Be kind."},
        {"prompt": "Hi", "completion": "Hello!"},
        {"instruction": "Hi", "context": "there", "response": "Hello!", "category": "x"},
        {"prompt": [question], "chosen": [answer], "rejected": [answer]},
    ]
    row = random.choice(formats)
    return [{**row, "id": n} for n in range(count)]


def damaged_file(kind: str, folder: Path, random: Random) -> Path:
    """A file of rows with something wrong in it (or nothing)."""
    rows = rows_for(kind, random)
    for _ in range(random.choice((0, 1, 1, 3, 9))):
        _spoil(rows, random)
    suffixes = [".jsonl", ".json", ".csv", ".tsv", *([".txt"] if kind == "c4" else [])]
    suffix = random.choice(suffixes)
    content = WRITERS[suffix](rows, random).encode(random.choice(("utf-8", "utf-8", *ENCODINGS)), errors="replace")
    for _ in range(random.choice((0, 0, 1, 2, 4))):
        content = random.choice(BYTES)(content, random)
    packed = random.random() < 0.2
    path = folder / f"damaged{suffix}{'.gz' if packed and random.random() < 0.8 else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    if random.random() < 0.1:
        path.write_bytes(random.choice(BYTES)(path.read_bytes(), random))
    return path


def _spoil(rows: list[Any], random: Random) -> None:
    place = random.randrange(len(rows))
    row = rows[place]
    if not isinstance(row, dict) or not row or random.random() < 0.15:
        rows[place] = random.choice(ODD_VALUES)
        return
    name = random.choice(list(row))
    if random.random() < 0.2:
        del row[name]
    elif isinstance(row[name], list) and row[name] and random.random() < 0.6:
        inner = row[name] = [dict(one) if isinstance(one, dict) else one for one in row[name]]
        _spoil(inner, random)
    else:
        rows[place] = {**row, name: random.choice(ODD_VALUES)}


def _json_lines(rows: list[Any], random: Random) -> str:
    end = random.choice(("\n", "\n", "\r\n", "\n\n"))
    return "".join(json.dumps(row, ensure_ascii=random.random() < 0.9) + end for row in rows)


def _array(rows: list[Any], random: Random) -> str:
    return json.dumps(rows, indent=random.choice((None, 2)))


def _table(rows: list[Any], random: Random) -> str:
    delimiter = random.choice(",,,\t;")
    kept = [row for row in rows if isinstance(row, dict)] or [{"text": "x"}]
    lines = [list(kept[0]), *([str(value) for value in row.values()] for row in kept)]
    if random.random() < 0.2:
        lines[0].append(random.choice(lines[0]))
    return "\n".join(delimiter.join(cells) for cells in lines)


def _text(rows: list[Any], random: Random) -> str:
    return random.choice(("\n\n", "\n", " ", "")).join(str(row) for row in rows)


WRITERS: dict[str, Callable[[list[Any], Random], str]] = {
    ".jsonl": _json_lines,
    ".json": _array,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _text,
}


def _flip(content: bytes, random: Random) -> bytes:
    place = random.randrange(len(content) + 1)
    return content[:place] + random.randbytes(random.choice((1, 1, 40))) + content[place + 1 :]


def _cut(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _remove(content: bytes, random: Random) -> bytes:
    first = random.randrange(len(content) + 1)
    return content[:first] + content[first + random.choice((1, 20)) :]


def _insert(content: bytes, random: Random) -> bytes:
    odd = (
        b'"',
        b"\n",
        b"\r",
        b"\t",
        b",",
        b"\x00",
        b"\xff\xfe",
        b"[" * 3000,
        b'{"a":' * 3000,
        b"\xef\xbb\xbf",
        b"x" * 200_000,
    )
    place = random.choice((0, random.randrange(len(content) + 1)))
    return content[:place] + random.choice(odd) + content[place:]


def _again(content: bytes, random: Random) -> bytes:
    return content + content[random.randrange(len(content) + 1) :]


BYTES: tuple[Callable[[bytes, Random], bytes], ...] = (_flip, _cut, _remove, _insert, _again)


# ---- folders

ODD_SETTINGS: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 3, 7, 2.5, 1e9, -1e9, "x", "nope", ""),
    *([], {}, [1, 2], {"a": 1}),
)


def damage_folder(path: Path, random: Random) -> None:
    """Replace values of a folder's configurations, or bytes of any of its files."""
    for _ in range(random.choice((1, 1, 2, 3))):
        file = random.choice(sorted(path.iterdir()))
        if file.name.endswith(".json") and random.random() < 0.7:
            _damage_json(file, random)
        elif random.random() < 0.1:
            file.unlink()
        else:
            file.write_bytes(random.choice(BYTES)(file.read_bytes(), random))


def _damage_json(file: Path, random: Random) -> None:
    try:
        values = json.loads(file.read_text())
    except ValueError:
        return
    if isinstance(values, dict) and values:
        values[random.choice(sorted(values))] = random.choice(ODD_SETTINGS)
        file.write_text(json.dumps(values))
