"""A plan (`membench plan`) as text: what each method needs, what fits, and why."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from reports import formats
from reports.names import batch_text, printable
from reports.parts import PARTS, Part, round_parts, shown
from reports.table import GIB, MIB, NOTHING, Column, Row, Table, apart_text, budget_mib, gib, lay_out, size_text

FORMATS = ("table", "json", "markdown", "html")

_PARTS = "parts: what there is at the moment of the peak; they add up to it."
_RESERVED = (
    "reserved: an estimate of what PyTorch's allocator holds, from a model of it; total: with {context} GiB for "
)
_RESERVED += "the process's own CUDA context."
_TIGHTLY = "tightly: only since the allocator gives back what it holds unused, which takes time at each step."
_LITTLE = "Where less than {context} GiB is left, count on running out: kernels and the context may take more."
_FORMULA = "formula: the method's paper's, for M weights, D layers, width m and rank r; it leaves out activations and "
_FORMULA += "temporaries."
_SHARDED_FORMULA = (
    "formula: ZeRO-3's, for M weights, D layers and N GPUs (the paper's; BAdam's README); it leaves out buffers, "
)
_SHARDED_FORMULA += "activations and temporaries."
_NEEDED = "GPUs needed: the fewest of 1, 2, 4, ... 64 with this budget, planned with this batch on each."
_CARDS = "smallest card: of those listed, by memory (`--budget` takes their names); prices aren't compared."
_INSIDE = "What a kernel allocates and frees inside one operation (SVD, QR, cuBLAS) isn't counted."
_KERNELS = "Activations are what a GPU's kernels keep: of sdpa, no attention weights, with or without dropout."
_ON_CPU = "{methods}: the model's steps depend on values, so real ones were metered on a CPU, whose kernels keep more."
_UNKNOWN = "Larger batches, sequences and models aren't looked for there: they would need as much of this machine."
_LARGEST = "largest batch, longest sequence: those that run at all, perhaps only tightly, as the allocator gives back "
_LARGEST += "what it holds unused at each step; smaller ones are faster."
_FUSED = "{methods}: {weights} are in fused experts, no linear modules: without adapters, and in {dtype}."
_WORST = "Planned at the worst, below which a run may stay far: {methods}."
_MODELS = "largest model: of the built-in ones, with this batch and sequence."


def render(document: dict[str, Any], format: str) -> str:
    """A plan's document in one of the `FORMATS`."""
    if format == "json":
        rows = [{key: value for key, value in row.items() if key != "modules"} for row in document["rows"]]
        return json.dumps({**document, "rows": rows}, indent=1, allow_nan=False)
    limits = [_limits(document)] if any(row["limits"] for row in document["rows"]) else []
    tables = [_memory(document), _where(document), *limits]
    section = (heading(document), tables, _remarks(document))
    return {"markdown": formats.markdown, "html": formats.html}.get(format, formats.plain)([section])


def heading(document: dict[str, Any]) -> list[str]:
    """What was planned, in a line."""
    setup = document["setup"]
    words = [
        f"{setup['model']}, {_weights(document['parameters'])} in {setup['dtype']}",
        f"{batch_text(setup['batch_size'], setup['sequence_length'], setup['task'])}{_pieces(setup)}",
        *([setup["task"]] if setup["task"] else []),
        *levers(setup),
        *([f"on each of {setup['gpus']} GPUs ({setup['strategy']})"] if setup["gpus"] > 1 else []),
        f"{setup['attention']} attention",
    ]
    words += [f"budget {budget_text(document)}"] if document["budget_bytes"] else []
    return [", ".join(words)]


def _pieces(setup: Mapping[str, Any]) -> str:
    count = setup["gradient_accumulation_steps"]
    return f" in {count} micro-batches" if count > 1 else ""


def _weights(count: int) -> str:
    return f"{count:,} weights" if count < 10**8 else f"{count / 1e9:.3g} billion weights"


def levers(setup: Mapping[str, Any]) -> list[str]:
    """What is done about activations."""
    every, chunks = setup["checkpointing_every"], setup["loss_chunks"]
    layers = f" of one layer in {every}" if every > 1 else ""
    words = [f"gradient checkpointing{layers}" if setup["checkpointing"] else "no checkpointing"]
    words += [f"loss in {chunks} pieces"] if chunks > 1 else []
    return [*words, "activations offloaded"] if setup["offload_activations"] else words


def _unit(rows: list[Row]) -> tuple[int, str]:
    """In what to print sizes: MiB if all peaks are below a GiB."""
    small = all(row["peak_allocated_bytes"] < GIB for row in rows)
    return (MIB, "MiB") if small and rows else (GIB, "GiB")


def _memory(document: dict[str, Any]) -> Table:
    unit, name = _unit(document["rows"])
    parts = shown(row["at_peak"] for row in document["rows"])
    columns: list[Column] = [
        ("method", lambda row: row["method"]),
        ("peak", lambda row: _rounded(row, parts, unit)[0]),
        *((part.word, _part(part, parts, unit)) for part in parts),
        ("reserved", lambda row: f"{row['peak_reserved_bytes'] / unit:,.2f}"),
        ("total", lambda row: f"{row['estimated_total_bytes'] / unit:,.2f}"),
    ]
    columns.append(("smallest card", lambda row: row["smallest_card"] or "none"))
    if document["budget_bytes"]:
        columns.append(("fits", lambda row: _fits(row, unit)))
        if _is_sharded(document):
            columns.append(("GPUs needed", _gpus))
    context = gib(document["context_bytes"])
    notes = [_PARTS, _RESERVED.format(context=context), _CARDS]
    notes += [_TIGHTLY] if any(map(_is_tight, document["rows"])) else []
    notes += [_NEEDED] if document["budget_bytes"] and _is_sharded(document) else []
    return lay_out(f"Memory at the peak, {name}", document["rows"], columns, {"method", "smallest card", "fits"}, notes)


def _is_tight(row: Row) -> bool:
    """Does it fit only tightly, as it is or as advised?"""
    told = row if row["fits"] else row["advice"]
    return told is not None and told["left_bytes"] < 0


def _is_sharded(document: Mapping[str, Any]) -> bool:
    return document["setup"]["gpus"] > 1 and document["setup"]["strategy"] == "fsdp2"


def _gpus(row: Row) -> str:
    return str(row["gpus_needed"] or "more than 64")


def _part(part: Part, parts: list[Part], unit: int) -> Callable[[Row], str]:
    return lambda row: _rounded(row, parts, unit)[1 + parts.index(part)]


def _rounded(row: Row, parts: list[Part], unit: int) -> list[str]:
    """The peak and its parts, rounded so that they add up."""
    sizes = [part.of(row["at_peak"]) * 100 for part in parts]
    hundredths = round_parts(sizes, unit)
    return [f"{value / 100:,.2f}" for value in (sum(hundredths), *hundredths)]


def _fits(row: Row, unit: int) -> str:
    """And how much is left or missing, in the table's unit."""
    left = row["left_bytes"]
    if row["fits"] and left < 0:
        return "yes, tightly"
    return f"yes, {apart_text(left, unit)} left" if row["fits"] else f"no, {apart_text(-left, unit)} missing"


def budget_text(document: Mapping[str, Any]) -> str:
    """As it was given: hundredths of a GiB are too coarse for one below it."""
    size = document["budget_bytes"]
    return f"{gib(size)} GiB" if size >= GIB else f"{budget_mib(size)} MiB"


def unit_of(budget: int | None) -> int:
    """In what to say what is left or missing of it: what it is said in itself."""
    return MIB if budget is not None and budget < GIB else GIB


def _where(document: dict[str, Any]) -> Table:
    unit, name = _unit(document["rows"])
    columns: list[Column] = [
        ("method", lambda row: row["method"]),
        ("peak in", lambda row: row["peak_phase"]),
        ("most of it in", lambda row: row["peak_module"] or "(model)"),
        ("training", lambda row: row["peak_selection"] or "all that it trains"),
        ("million weights", lambda row: f"{row['trained_weights'] / 1e6:,.1f}"),
        ("formula", lambda row: row["formula"] or NOTHING),
        (name, lambda row: NOTHING if row["formula_bytes"] is None else f"{row['formula_bytes'] / unit:,.2f}"),
    ]
    left = {"method", "peak in", "most of it in", "training", "formula"}
    notes = [_SHARDED_FORMULA if _is_sharded(document) else _FORMULA]
    return lay_out("Where the peak is, and what is trained then", document["rows"], columns, left, notes)


def _limits(document: dict[str, Any]) -> Table:
    batch, tokens = document["setup"]["batch_size"], document["setup"]["sequence_length"]
    columns: list[Column] = [
        ("method", lambda row: row["method"]),
        (f"largest batch of {tokens} tokens", lambda row: _limit(row, "batch")),
        (f"longest sequence at batch {batch}", lambda row: _limit(row, "sequence")),
        ("largest model", lambda row: _limit(row, "model")),
    ]
    title = f"What fits into {budget_text(document)}"
    return lay_out(title, document["rows"], columns, {"method", "largest model"}, [_LARGEST, _MODELS])


def _limit(row: Row, name: str) -> str:
    if row["limits"] is None:
        return NOTHING
    limit = row["limits"][name]
    return f"{limit:,}" if limit and isinstance(limit, int) else limit or "none"


def _remarks(document: dict[str, Any]) -> list[str]:
    refused = [f"{method} can't be planned: {why}" for method, why in document["refused"].items()]
    on_cpu = [row["method"] for row in document["rows"] if row["kernels"] == "cpu"]
    kernels = [_KERNELS] if len(on_cpu) < len(document["rows"]) else []
    kernels += [_ON_CPU.format(methods=_listed(on_cpu))] if on_cpu else []
    kernels += [_UNKNOWN] if document["budget_bytes"] and on_cpu else []
    return [*verdict(document), *advice(document), *refused, *_worst(document), *_fused(document), *kernels, _INSIDE]


def _worst(document: dict[str, Any]) -> list[str]:
    """Whose bytes depend on more than the model and the batch, and on what."""
    methods: dict[str, list[str]] = {}
    for row in document["rows"]:
        if row.get("varies_with"):
            methods.setdefault(row["varies_with"], []).append(row["method"])
    each = [f"{_listed(names)} (by {what})" for what, names in methods.items()]
    return [_WORST.format(methods="; ".join(each))] if each else []


def _fused(document: dict[str, Any]) -> list[str]:
    """What methods with adapters neither adapt nor hold in 4 bits, which is most of a mixture of experts."""
    methods = [row["method"] for row in document["rows"] if row["fused_weights"]]
    known = {"methods": _listed(methods), "dtype": document["setup"]["dtype"]}
    sizes = {row["fused_weights"] for row in document["rows"] if row["fused_weights"]}
    return [_FUSED.format(weights=_weights(size), **known) for size in sizes]


def advice(document: dict[str, Any]) -> list[str]:
    """What to use on the budget, what would fit with which options, and what nothing helps: all of it planned."""
    budget, rows = document["budget_bytes"], document["rows"]
    if not budget:
        return []
    unit = unit_of(budget)
    by_room = sorted((row for row in rows if row["fits"]), key=lambda row: -row["left_bytes"])
    helped = sorted((row for row in rows if row["advice"]), key=lambda row: len(row["advice"]["options"]))
    lost = [row for row in rows if not row["fits"] and not row["advice"]]
    sentences = [f"On {budget_text(document)} use {_listed(_room(row, unit) for row in by_room)}."] if by_room else []
    if any(0 <= row["left_bytes"] < document["context_bytes"] for row in by_room):
        sentences.append(_LITTLE.format(context=gib(document["context_bytes"])))
    sentences += [f"{row['method']} would fit with {_change(row['advice'], unit)}." for row in helped]
    if lost:
        missing = _listed(f"{row['method']} ({size_text(-row['left_bytes'], unit)} missing)" for row in lost)
        sentences.append(f"No option tried makes these fit: {missing}.")
    if _is_sharded(document):
        needed = _listed(f"{row['method']} {_gpus(row)}" for row in rows)
        sentences.append(f"GPUs of {budget_text(document)} that each needs: {needed}.")
    return sentences


def _room(row: Row, unit: int) -> str:
    if row["limits"] is None:
        return f"{row['method']} ({_left(row, unit)})"
    batch, chunked = row["limits"]["batch"], row["limits"]["in_chunks"]
    more = f", {chunked['batch']:,} with --loss-chunks {chunked['loss_chunks']}" if chunked else ""
    return f"{row['method']} ({_left(row, unit)}, batch {batch:,}{more})"


def _left(row: Mapping[str, Any], unit: int) -> str:
    return f"{size_text(row['left_bytes'], unit)} left" if row["left_bytes"] >= 0 else "tightly"


def _change(advice: Mapping[str, Any], unit: int) -> str:
    without = f"; {'; '.join(advice['without'])}" if advice["without"] else ""
    return f"{' '.join(advice['options'])} ({_left(advice, unit)}{without})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def verdict(document: dict[str, Any]) -> list[str]:
    """If nothing fits: how much is missing, and whether the weights alone are too large."""
    rows, budget = document["rows"], document["budget_bytes"]
    if not budget or not rows or any(row["fits"] for row in rows):
        return []
    unit, nearest = unit_of(budget), min(rows, key=lambda row: row["estimated_total_bytes"])
    sentence = (
        f"Nothing fits into {budget_text(document)}: {nearest['method']} comes nearest, with "
        f"{size_text(nearest['estimated_total_bytes'], unit)}; {size_text(-nearest['left_bytes'], unit)} are missing."
    )
    least = min(rows, key=lambda row: row["at_peak"]["weights_bytes"])  # qlora's are in 4 bits
    weights = least["at_peak"]["weights_bytes"]
    if weights + document["context_bytes"] > budget:
        sentence += f" The weights alone take {size_text(weights, unit)} at least ({least['method']})."
    return [sentence]


def why(document: dict[str, Any], method: str) -> str:
    """A method's peak as a tree: components, and the modules in them, by what each holds; then what fits a budget."""
    row = next(row for row in document["rows"] if row["method"] == method)
    peak, (unit, unit_name) = row["peak_allocated_bytes"], _unit([row])
    branches = list(_branches(row, peak))
    width = max(len(name) for name, _ in branches) + 2
    training = f", training {row['peak_selection']}" if row["peak_selection"] else ""
    lines = [
        *heading(document),
        "",
        f"{method}: {peak / unit:,.2f} {unit_name} at the peak, in the {row['peak_phase']} phase{training}",
        f"{'':{width}}{unit_name:>8} {'share':>6}   of which",
        *(f"{name:{width}}{_shares(parts, peak, unit)}" for name, parts in branches),
        "",
        "Modules that hold less than a thousandth are left out; * stands for all layers.",
        *verdict(document),
        *advice(document),
    ]
    return "\n".join(map(printable, lines))  # a model's name, and those of its modules, are anybody's


def _branches(row: Row, peak: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Components and, indented, their modules, the largest first."""
    for component, parts in _by_size(row["components"], 1):
        yield component, parts
        for module, held in _by_size(row["modules"].get(component, {}), peak / 1000):
            yield f"    {module or '(model)'}", held


def _by_size(table: dict[str, dict[str, int]], least: float) -> list[tuple[str, dict[str, int]]]:
    held = [(name, parts) for name, parts in table.items() if sum(parts.values()) >= least]
    return sorted(held, key=lambda item: -sum(item[1].values()))


def _shares(parts: dict[str, int], peak: int, unit: int) -> str:
    size = sum(parts.values())
    held = sorted(((part.of(parts), part.word) for part in PARTS), reverse=True)
    words = ", ".join(f"{word} {part / unit:,.2f}" for part, word in held if part >= peak / 10_000)
    return f"{f'{size / unit:,.2f}':>8} {size / peak:>6.1%}   {words}".rstrip()
