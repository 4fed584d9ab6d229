"""The page to explore plans: what each method needs at any batch and sequence, on which card. Its script computes it
from polynomials and traces; without one, it shows the table of one choice."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from reports.page.content import Cell
from reports.page.sheet import fill
from reports.table import GIB, MIB, apart_text

Document = Mapping[str, Any]
FIRST_MODEL, FIRST_CARD = "llama3-8b", "rtx4090"  # shown at first, where they are there


class Choice(NamedTuple):
    """What a reader has chosen."""

    model: Mapping[str, Any]
    setting: Mapping[str, Any]
    batch: int
    sequence: int
    card: Mapping[str, Any]


@dataclass
class Need:
    """What a method needs: bytes.

    Attributes:
        phase: of the peak.
        parts: at the peak, which they add up to.
        reserved: by the allocator; None where only the script can tell.
    """

    phase: str
    parts: list[int]
    reserved: int | None

    @property
    def peak(self) -> int:
        return sum(self.parts)


@dataclass
class View:
    """One choice as words and a table."""

    said: str
    sure: str
    unit: str
    headers: list[Cell]
    rows: list[list[Cell]]
    refused: list[str]


def render(document: Document) -> str:
    """The page of a document of `membench explore`."""
    methods = {row["method"].split()[0] for setting in document["settings"] for row in setting["rows"]}
    chosen = first(document)
    start = {
        "model": chosen.model["name"],
        "dtype": chosen.setting["dtype"],
        "checkpointing": chosen.setting["checkpointing"],
        "batch": chosen.batch,
        "sequence": chosen.sequence,
        "cards": [chosen.card["name"]],
    }
    data = json.dumps({**document, "start": start}, separators=(",", ":"), allow_nan=False)
    return fill(
        "fit.html",
        ["report.css", "fit.css"],
        ["common.js", "allocator.js", "fit.js"],
        document=document,
        data=data.replace("<", "\\u003c"),
        methods=len(methods),
        view=view(document, chosen),
        conditions=conditions(document),
    )


def first(document: Document) -> Choice:
    """The choice to begin with."""
    models, settings, cards = document["models"], document["settings"], document["cards"]
    model = next((model for model in models if model["name"] == FIRST_MODEL), models[0])
    setting = next(one for one in settings if one["model"] == model["planned_as"])
    card = next((card for card in cards if card["name"] == FIRST_CARD), cards[0])
    return Choice(model, setting, 1, min(setting["first"], model["longest"]), card)


def need(document: Document, choice: Choice, row: Mapping[str, Any]) -> Need:
    """What a method needs at the choice's batch and sequence."""
    summits = row["single" if choice.batch == 1 else "several"]
    found = [[_value(part, choice) for part in one["parts"]] for one in summits]
    highest = max(range(len(found)), key=lambda number: sum(found[number]))  # the first of them
    at_first = (choice.batch, choice.sequence) == (1, choice.setting["first"])
    return Need(summits[highest]["phase"], found[highest], row["reserved"] if at_first else None)


def _value(coefficients: Sequence[int], choice: Choice) -> int:
    b, s = choice.batch, choice.sequence
    return sum(map(int.__mul__, coefficients, (1, s, s * s, b, b * s, b * s * s)))


def view(document: Document, choice: Choice) -> View:
    """What the page says without a script."""
    model, setting, card = choice.model, choice.setting, choice.card
    needs = [(row["method"], need(document, choice, row)) for row in setting["rows"]]
    needs.sort(key=lambda item: item[1].reserved or item[1].peak)
    unit, name = (MIB, "MiB") if all(one.peak < GIB for _, one in needs) else (GIB, "GiB")
    words = ["method", card["name"], "total", "peak", *(part["word"] for part in document["parts"]), "peak in"]
    weights = model["parameters"]
    said = [
        f"{model['name']}, {f'{weights:,}' if weights < 10**8 else f'{weights / 1e9:.3g} billion'} weights in "
        f"{setting['dtype']}",
        f"{choice.batch} x {choice.sequence:,} tokens",
        "gradient checkpointing" if setting["checkpointing"] else "no checkpointing",
        f"{model['attention']} attention",
    ]
    return View(
        f"{', '.join(said)}; {card['name']}: {card['bytes'] / GIB:.2f} GiB.",
        "All figures are those of “membench plan”, to the byte.",
        name,
        [Cell(word, word in ("method", card["name"], "peak in")) for word in words],
        [_cells(document, choice, method, one, unit) for method, one in needs],
        [f"{method}: {why}" for method, why in setting["refused"].items()],
    )


def _cells(document: Document, choice: Choice, method: str, one: Need, unit: int) -> list[Cell]:
    def shown(size: int) -> str:
        return f"{size / unit:,.2f}"

    room, least = choice.card["bytes"], one.peak + document["context_bytes"]
    total = least if one.reserved is None else one.reserved + document["context_bytes"]
    more = "more than " if one.reserved is None else ""
    if least > room:
        fits = f"no, {more}{apart_text(total - room, unit)} missing"
    elif one.reserved is None:
        fits = "perhaps"
    else:
        fits = (
            f"yes, {apart_text(room - total, unit)} left"
            if total <= room
            else f"perhaps, {apart_text(total - room, unit)} short"
        )
    size = more + shown(total)
    sizes = [size, shown(one.peak), *map(shown, one.parts)]
    return [Cell(method, True), Cell(fits, True), *map(Cell, sizes), Cell(one.phase, True)]


def conditions(document: Document) -> list[str]:
    """How the figures were made, and how exact they are."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return [
        f"Planned with {versions}: each method's own code, its training step and the meter on tensors without values, "
        "as “membench plan” does; the methods' own values for fine-tuning, no gradient accumulation, one device.",
        "Peak and parts: for each method polynomials in batch and sequence, learned from steps on shallow models and "
        "checked against others; equal to a plan's to the byte at every batch and sequence of the page.",
        f"Total: with what PyTorch's allocator reserves and {document['context_bytes'] / GIB:.2g} GiB for the CUDA "
        "context. It follows no rule between sizes, so the page replays the plan's own allocations with the sizes that "
        "they take at the choice, on a model of the allocator: equal to a plan's to the byte as well.",
        "Fits: “tightly” where a card holds the peak, but not all that the allocator would keep: it then gives back "
        "what it holds unused, which takes time at each step.",
        "Attention is what transformers chooses for the model: sdpa, by a GPU's fused kernels, keeps no attention "
        "weights, with or without dropout; eager does.",
        "What a kernel allocates and frees inside one operation (SVD, QR, cuBLAS) isn't counted.",
        "Cards: what PyTorch calls their total capacity; “membench plan --budget NAME” takes their names.",
    ]
