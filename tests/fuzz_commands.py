"""Seeded mistakes in what a command is given: its arguments, its TOML file, the records it reads."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz import BYTES, ODD_VALUES
from reports_factory import make_record

from membench.commands.plan import PlanOptions
from membench.config.declare import declared
from membench.config.settings import Settings
from reports import record
from reports.regressions import thresholds

ODD_TEXTS = (
    *("", " ", "0", "-1", "1e999", "nan", "-inf", "9" * 23, "2147483648", "0.5", "1_000", "٣", "x", "é", "\udcff"),
    *("a" * 5000, "..", "/dev/null", "/dev/full", "/proc/self/mem", "/", "~", "[" * 2000, "{", "=", "a=b", "a.b=c"),
    *(
        "badam.lr=nan",
        "badam.lr=1e999",
        "badam.betas=0.9",
        "*.lr=1",
        "lr=",
        ".x:Y",
        "builtins:print",
        "os:sep",
        "a:b:c",
    ),
    *("lora:rank=x", "lora:rank=8:rank=9", "lora:", ":", ",", "badam,,lora", "all,all", "0,0", "0,-1", "true", "none"),
    *("24", "24GiB", "-24GiB", "1e9TiB", "0GiB", "a\nb", "\x1b[31m", "a\x00b", "--", "-x", "1/0", "9/8", "accuracy="),
    *("superglue/nope", "superglue", "c4", "instruct", "classify", "config:nope", "config:", "roberta-tiny", "gpt2"),
    *("paper", "hub", "cuda:99", "meta", "float16", "bfloat16", "html", "csv", "memory,nope", "packing=maybe"),
)
BASES: tuple[tuple[str, ...], ...] = (
    ("compare", "--optimizers", "badam", "--task", "superglue/cb", "--steps", "2", "--threads", "1"),
    ("compare", "--optimizers", "lora", "--task", "c4", "--steps", "2", "--threads", "1", "--no-reference"),
    ("plan", "--model", "roberta-tiny", "--optimizers", "badam,lora", "--batch-size", "2", "--sequence-length", "16"),
    ("report", "RECORDS", "--format", "json"),
    ("check", "RECORDS", "RECORDS", "--format", "json"),
    ("list", "methods"),
)
OPTIONS = {"compare": declared(Settings), "plan": declared(PlanOptions)}
FLAGS = {
    "report": ("--format", "--out", "--at-memory", "--to-target"),
    "check": ("--format", "--thresholds", "--only", "--print-thresholds"),
    "list": ("--help",),
}


def odd_arguments(records: Path, random: Random) -> list[str]:
    """A command line with one to three mistakes (or none, if what is odd elsewhere is right here)."""
    command, *given = (str(records) if word == "RECORDS" else word for word in random.choice(BASES))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        given = random.choice(MISTAKES)(command, given, random)
    return [command, *given, *(["--dry-run"] if command == "compare" else [])]


def _flags(command: str) -> list[str]:
    known = [flag for one in OPTIONS.get(command, {}).values() for flags in one.flags for flag in flags.split("/")]
    return [flag for flag in known if flag not in ("--verify", "--dry-run")] or list(FLAGS[command])


def _replace(command: str, given: list[str], random: Random) -> list[str]:
    place = random.randrange(len(given) + 1)
    return [*given[:place], random.choice(ODD_TEXTS), *given[place + 1 :]]


def _add(command: str, given: list[str], random: Random) -> list[str]:
    flag, value = random.choice(_flags(command)), random.choice(ODD_TEXTS)
    return [*given, *random.choice(([flag], [flag, value], [flag, value], [flag, value], [f"{flag}={value}"]))]


def _misspell(command: str, given: list[str], random: Random) -> list[str]:
    flag = random.choice(_flags(command))
    place = random.randrange(2, len(flag))
    return [*given, flag[:place] + flag[place + 1 :], "1"]


def _drop(command: str, given: list[str], random: Random) -> list[str]:
    place = random.randrange(len(given) + 1)
    return given[:place] + given[place + 1 :]


MISTAKES: tuple[Callable[[str, list[str], Random], list[str]], ...] = (_replace, _replace, _add, _add, _misspell, _drop)

# ---- files of settings

ODD_TOML = (
    *(
        '""',
        '"x"',
        "0",
        "-1",
        "2.5",
        "1e400",
        "nan",
        "inf",
        "true",
        "[]",
        "[[]]",
        '["x", 1]',
        "{}",
        "{a = 1}",
        "1979-05-27",
    ),
    *("9" * 30, "[0, 0]", '"all"', '"1GiB"', '"config:roberta-tiny"', '"superglue/nope"', "[1e-3, 1e-2]", "0x7fffffff"),
)
_OF_STUDY = ("models", "memory", "tune", "options", "badam", "nobody", "tune.lr", "tune.budget", "tune.seed")
_OF_METHOD = ("badam.lr", "badam.tune", "badam.nope", "badam.betas", "options.packing", '"a b"', "lora.rank")
GOOD_TOML = {
    "optimizers": '["badam"]',
    "task": '"superglue/cb"',
    "steps": "2",
    "threads": "1",
    "reference": "false",
    "memory": '"1GiB"',
}


def odd_toml(path: Path, random: Random) -> str:
    """A file of a study, or of options, with mistakes in it."""
    keys = [*declared(Settings), *_OF_STUDY, *_OF_METHOD, *GOOD_TOML]
    values = dict(GOOD_TOML)
    if random.random() < 0.6:
        del values["memory"]
    for _ in range(random.choice((1, 1, 2, 3))):
        values[random.choice(keys)] = random.choice(ODD_TOML)
    lines = [f"{key.replace('_', '-') if random.random() < 0.1 else key} = {value}" for key, value in values.items()]
    if random.random() < 0.1:
        lines.append(random.choice(lines))
    return _write(path, lines, random)


def odd_thresholds(path: Path, random: Random) -> str:
    """A file of limits of `membench check` with mistakes in it."""
    lines = thresholds.default_text().splitlines()
    place = random.choice([number for number, line in enumerate(lines) if " = " in line])
    lines[place] = f"{lines[place].partition(' = ')[0]} = {random.choice(ODD_TOML)}"
    if random.random() < 0.2:
        lines.append(random.choice(lines))
    return _write(path, lines, random)


def _write(path: Path, lines: list[str], random: Random) -> str:
    content = "\n".join(lines).encode()
    if random.random() < 0.25:
        content = random.choice(BYTES)(content, random)
    path.write_bytes(content)
    return str(path)


# ---- records

ODD_FIELDS: tuple[Any, ...] = (*ODD_VALUES, 10**400, 2**63, -(2**63), "\x1b[31mred", "two\nlines", "=1+1", "a" * 9000)


def odd_records(folder: Path, random: Random) -> None:
    """A folder of a good record and of one to three that something is wrong with."""
    record.write(make_record(), folder)
    for number in range(random.randint(1, 3)):
        made = make_record(method=random.choice(("badam", "lora")), seed=number)
        for _ in range(random.choice((0, 1, 1, 2, 5))):
            _spoil(made, random)
        content = json.dumps(made).encode()
        if random.random() < 0.3:
            content = random.choice(BYTES)(content, random)
        (folder / f"odd-{number}.json").write_bytes(content)


def _spoil(place: Any, random: Random) -> None:
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if not keys:
        return
    key = random.choice(keys)
    if isinstance(place[key], dict | list) and random.random() < 0.7:
        _spoil(place[key], random)
    elif random.random() < 0.2:
        del place[key]
    else:
        place[key] = random.choice(ODD_FIELDS)
