"""KEY=VALUE as users write it: options of a task, and hyper-parameters of one method or all."""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from membench.config.errors import UserError
from membench.config.values import parse

ALL_METHODS = "*"  # the key for hyper-parameters that go to every method that has them


def parse_options(assignments: Iterable[str]) -> dict[str, Any]:
    """`packing=true`, for the task."""
    return _pairs("--option", "packing=true", assignments)


def parse_slurm(assignments: Iterable[str]) -> dict[str, Any]:
    """`partition=gpu`, for sbatch."""
    return _pairs("--slurm", "partition=gpu", assignments)


def _pairs(flag: str, example: str, assignments: Iterable[str]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UserError(f"{flag} {text}: write KEY=VALUE ({example})")
        if key.strip() in pairs:
            raise UserError(f"{flag} {key.strip()} is given twice: give it once")
        pairs[key.strip()] = parse(value)
    return pairs


def parse_hyperparameters(assignments: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`badam.switch_every=50` for one method; `weight_decay=0` for all methods that have it."""
    methods: dict[str, dict[str, Any]] = {}
    for text in assignments:
        target, equals, value = text.partition("=")
        method, dot, key = target.strip().rpartition(".")
        if not equals or bool(dot) != bool(method.strip()) or not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise UserError(f"--set {text}: write METHOD.KEY=VALUE (badam.switch_every=50), or KEY=VALUE for all")
        values = methods.setdefault(method or ALL_METHODS, {})
        if key in values:
            raise UserError(f"--set {target.strip()} is given twice: give it once")
        values[key] = parse(value)
    return methods


def base(method: str) -> str:
    """`lora` from `lora:rank=16`, without importing the registry of methods."""
    return ":".join(itertools.takewhile(lambda part: "=" not in part, method.split(":")))


def unused_hyperparameters(
    given: Mapping[str, Mapping[str, Any]], methods: Collection[str], where: str = "--set"
) -> list[str]:
    """A sentence for each method with hyper-parameters that are `given`, `where`, and that no run takes.

    The method isn't among `methods`, or those of them that it is have other values in their names, as lora:rank=4 has.
    """
    told = []
    for method, values in given.items():
        users = [name for name in methods if method in (name, base(name))]
        unused = [f"{method}.{key}" for key in values if all(f":{key}=" in name for name in users)]
        if unused and method != ALL_METHODS:
            why = f"another is in the name of {', '.join(users)}" if users else f"the methods are {', '.join(methods)}"
            told.append(f"{where} {', '.join(unused)} isn't used: {why}")
    return told
