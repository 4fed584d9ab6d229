"""The tables that can be reproduced, as data: the runs of each, and where their figures stand in the paper.

What the papers print is in `reports/published`, as is the set-up of the tables that can be planned. Everything else is
in `RECIPES`: a table is a row there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from membench.config.declare import declared
from membench.config.errors import UserError
from membench.config.options import WorkloadOptions
from reports import published
from reports.names import suggestion

Values = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Runs with the same settings: options of `membench compare`, beyond those of its profile where there is one.

    Attributes:
        rows: the label in the published table, by method.
        given: the options.
        name: tells parts with the same rows apart.
        examples: of the training data, where `given` or the profile counts epochs.
        choices: sequences of an example.
    """

    rows: Mapping[str, str]
    given: Values
    name: str = ""
    examples: int = 0
    choices: int = 1


@dataclass(frozen=True)
class Column:
    """A column of a published table: `figure` (a key of `comparison.FIGURES`) of the runs of a part."""

    name: str
    figure: str
    part: str = ""


@dataclass(frozen=True)
class Target:
    """A published table to compare with.

    Attributes:
        table: its name in `reports.published`.
        columns: those that runs have figures for.
        over: compare ratios to this row's figures: they are of other hardware.
        labels: what the published table calls a row, where that differs.
    """

    table: str
    columns: tuple[Column, ...]
    over: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How a table is made.

    Attributes:
        parts: its runs.
        targets: what they are compared with, the table itself first.
        tiny: options that replace those of the parts at scale tiny.
        learns: train on data and score; otherwise time and meter steps on random tokens with random weights.
        tiny_parts: how many parts there are at scale tiny; None: all.
        architecture: the built-in configuration to plan a pretrained model with.
        downloads: what is fetched from the hub, with sizes.
        notes: what isn't comparable.
    """

    parts: tuple[Part, ...]
    targets: tuple[Target, ...]
    tiny: Values
    learns: bool = False
    tiny_parts: int | None = None
    architecture: str | None = None
    downloads: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _planned(name: str, steps: int, more: Mapping[str, Values]) -> tuple[Part, ...]:
    """A part for each row that the published table says how to plan; `more` are hyper-parameters by method."""
    table = published.load(name)
    shared = {key: value for key, value in table["plan"].items() if key in declared(WorkloadOptions)}
    parts = []
    for row in table["rows"]:
        plan = row["plan"]
        method = plan["method"]
        own = {**_STEADY, **more.get(method, {}), **plan.get("set", {})}
        given = {**shared, **plan.get("setup", {}), "steps": steps, "hyperparameters": {method: own}}
        parts.append(Part({method: row["label"]}, {**given, "model": f"config:{shared['model']}"}))
    return tuple(parts)


def _columns(name: str) -> tuple[Column, ...]:
    """The columns of a table that can be planned."""
    table = published.load(name)
    figures = [table["plan"]["total"] if one == "total" else one for one in table["plan"]["figures"]]
    return tuple(Column(column, figure) for column, figure in zip(table["columns"], figures, strict=True) if figure)


_STEADY = {"lr": 1e-6}  # random weights stay finite with it, whatever the method does
_TINY_SHAPE: Values = {"batch_size": 2, "sequence_length": 16, "dtype": "float32", "steps": 2}
_TINY_STEPS: Values = {
    **_TINY_SHAPE,
    "model": "config:llama-tiny",
    "hyperparameters": {"badam": {"switch_every": 1}, "galore": {"rank": 8}},
}


def _badam_table_2() -> Recipe:
    """Memory of Llama 3-8B and, from Table 3, the times of a step's phases."""
    times = ("forward, h", "backward, h", "update, s")
    return Recipe(
        _planned("badam-table-2", 96, {"badam": {"switch_every": 3}}),  # once through its 32 blocks
        (
            Target("badam-table-2", _columns("badam-table-2")),
            Target(
                "badam-table-3",
                tuple(Column(f"8B {time}", f"{time.partition(',')[0]}_seconds") for time in times),
                over="LoRA, rank 8",
                labels={"LoRA, rank 8": "LoRA"},
            ),
        ),
        _TINY_STEPS,
        notes=(
            "Times are medians of steps of 2 x 728 tokens, the paper's of an epoch of shorter texts on an RTX 3090; so "
            "only ratios are compared. BAdam changes its block after 3 steps, to visit all: an update in three makes "
            "new states, in the paper one in a hundred.",
        ),
    )


def _lomo_table_1() -> Recipe:
    return Recipe(
        _planned("lomo-table-1", 8, {}),
        (Target("lomo-table-1", _columns("lomo-table-1")),),
        _TINY_STEPS,
    )


def _galore_table_11() -> Recipe:
    """Each method with and without its update in the backward pass."""
    methods: dict[str, tuple[str, Values]] = {
        "adamw": ("AdamW", {"master_weights": False}),
        "adafactor": ("Adafactor", {}),
        "adamw8bit": ("8-bit Adam", {}),
        "galore": ("8-bit GaLore", {"rank": 512, "states": "8bit"}),
    }
    shared = {"model": "config:llama-1b", "batch_size": 1, "sequence_length": 256, "dtype": "bfloat16", "steps": 24}
    parts = tuple(
        Part({method: label}, {**shared, "hyperparameters": {method: {**_STEADY, **own, "in_backward": inside}}}, name)
        for name, inside in {"": False, "in backward": True}.items()
        for method, (label, own) in methods.items()
    )
    names = {"": "", "in backward": ", update in backward"}
    return Recipe(
        parts,
        (
            Target("galore-table-11", tuple(Column(f"total{end}", _PROCESS, part) for part, end in names.items())),
            Target(
                "galore-table-11",
                tuple(Column(f"tokens/s{end}", "tokens_per_second", part) for part, end in names.items()),
                over="AdamW",
            ),
        ),
        _TINY_STEPS,
        notes=(
            "The paper gives no dtypes: here weights, gradients and states are bfloat16. Its Adafactor is larger than "
            "that of two factored moments: it may keep a first moment, which ours doesn't.",
            "Tokens/s depend on the card, which isn't given: only ratios are compared. Ours are of a median step, "
            "without the subspaces that GaLore chooses every 200 steps, and without fused kernels for 8 bits.",
        ),
    )


_PROCESS = "estimated_total_bytes"

_SUPERGLUE = {  # column: task, examples to train on, sequences of an example
    "BoolQ": ("boolq", 9427, 1),
    "COPA": ("copa", 400, 2),
    "WSC": ("wsc", 554, 1),
    "RTE": ("rte", 2490, 1),
    "MultiRC": ("multirc", 27_243, 1),
    "WiC": ("wic", 5428, 1),
}


def _badam_table_11() -> Recipe:
    rows = {"adamw": "Adam", "lora": "LoRA", "badam": "BAdam"}
    return Recipe(
        tuple(
            Part(rows, {"profile": "paper", "task": f"superglue/{task}"}, column, examples, choices)
            for column, (task, examples, choices) in _SUPERGLUE.items()
        ),
        (Target("badam-table-11", tuple(Column(column, "score", column) for column in _SUPERGLUE)),),
        {**_TINY_SHAPE, "model": "config:roberta-tiny", "data": "demo"},
        learns=True,
        tiny_parts=1,
        architecture="config:roberta-large",
        downloads=(
            "FacebookAI/roberta-large: 1.4 GB of weights, 3 MB of tokenizer",
            "aps/super_glue, six tasks: 7 MB",
        ),
        notes=(
            "Scores are those of the official validation set; the paper carves its test set out of that, and has other "
            "splits (MultiRC: 5,100 examples, here all 27,243 answers). Both have one seed.",
            "MultiRC: here the mean of F1 over answers and exact match, of which the paper doesn't say which it has.",
        ),
    )


_C4_BYTES_PER_TOKEN = 305e9 / 156e9  # the compressed files of C4's `en`, and their T5 tokens (arXiv 1910.10683)
_C4_TOKENS = {"60M": 10_000, "130M": 20_000, "350M": 60_000, "1B": 100_000}  # column: steps of 512 x 256 tokens


def _galore_table_2() -> Recipe:
    rows = {"adamw": "full", "galore": "GaLore", "lora": "LoRA"}
    tokens = {size: steps * 512 * 256 for size, steps in _C4_TOKENS.items()}
    return Recipe(
        tuple(
            Part(rows, {"profile": "paper", "task": "c4", "model": f"config:llama-{size.lower()}"}, size)
            for size in tokens
        ),
        (Target("galore-table-2", tuple(Column(size, "perplexity", size) for size in tokens)),),
        {
            **_TINY_SHAPE,
            "model": "config:llama-tiny",
            "tokenizer": None,
            "data": "demo",
            "gradient_accumulation_steps": 2,
            "options": {"validation_tokens": 512},
        },
        learns=True,
        tiny_parts=1,
        downloads=(
            "allenai/c4, streamed by each run: "
            + ", ".join(f"{size} {count * _C4_BYTES_PER_TOKEN / 1e9:.1f} GB" for size, count in tokens.items()),
            "google-t5/t5-base: 2 MB of tokenizer",
        ),
        notes=(
            "One learning rate for full training and LoRA, the likeliest of five; the paper takes the best of them.",
            "ReLoRA and the low-rank factorisation aren't among the methods, so these rows have no figure of ours.",
        ),
    )


RECIPES = {
    "badam-table-2": _badam_table_2,
    "badam-table-11": _badam_table_11,
    "galore-table-2": _galore_table_2,
    "galore-table-11": _galore_table_11,
    "lomo-table-1": _lomo_table_1,
}


def find(name: str, scale: str) -> Recipe:
    """The recipe of a table, at scale "paper" or "tiny".

    Raises:
        UserError: that table can't be reproduced.
    """
    if name not in RECIPES:
        raise UserError(f"there is no reproduction {name!r}. {suggestion(name, RECIPES)}")
    recipe = RECIPES[name]()
    return recipe if scale == "paper" else _tiny(recipe)


def _tiny(recipe: Recipe) -> Recipe:
    parts = tuple(replace(part, given=_overlaid(part.given, recipe.tiny)) for part in recipe.parts[: recipe.tiny_parts])
    return replace(recipe, parts=parts, downloads=(), architecture=None)


def _overlaid(given: Values, above: Values) -> Values:
    """`above` wins; of hyper-parameters, one by one, for the methods that are there."""
    methods = given.get("hyperparameters", {})
    changed = above.get("hyperparameters", {})
    merged = {name: {**own, **changed.get(name, {})} for name, own in methods.items()}
    return {**given, **above, "hyperparameters": merged}
