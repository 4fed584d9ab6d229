"""The tables of a session on a GPU, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.races import RACES
from reports.table import NOTHING, Table

Record = dict[str, Any]


def finished(document: Record, prefix: str) -> dict[str, Record]:
    """The parts that succeeded, by the rest of their names."""
    parts = {name: part for name, part in document["parts"].items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): part for name, part in parts.items() if part["status"] == "ok"}


def memory(document: Record, workload: str) -> Table:
    """Planned against measured, or that it doesn't fit."""
    headers = ["method", "with", "planned", "requested", "error", "allocated", "planned reserved", "reserved", "error "]
    notes = [
        "Planned: the peak of membench plan. Requested: the allocator's peak without rounding. Requested and reserved "
        "are without libraries' workspaces, which plans don't count. Error: planned over requested, and planned "
        "reserved over reserved.",
        "With: settings other than the method's defaults, chosen because the defaults don't fit the card by plan.",
    ]
    measured = finished(document, f"methods/{workload}/")
    again = document.get("replanned", {"plans": {}})
    if again["plans"]:
        versions = ", ".join(f"{package} {number}" for package, number in again["versions"].items())
        left = [name for name in measured if f"{workload}/{name}" not in again["plans"]]
        but = f", but for {', '.join(left)}, whose code has changed" if left else ""
        notes.append(f"Planned again since, with {versions}{but}.")
    cells = [_memory_row(name, part, again["plans"].get(f"{workload}/{name}", {})) for name, part in measured.items()]
    return Table("Memory at the peak, GiB", headers, cells, {"method", "with"}, notes)


def _memory_row(method: str, part: Record, again: Record) -> list[str]:
    planned = part["planned"]
    if planned is None:
        smallest = min(row["estimated_total_bytes"] for row in part["too_large"])
        return [method, "", f"{gib(smallest)} at least: not tried", *[NOTHING] * 6]
    planned = planned | again
    requested = without(part["peak_requested_bytes"], part["workspace_bytes"])
    reserved = without(part["peak_reserved_bytes"], part["workspace_bytes"])
    return [
        method,
        said(planned["given"]),
        gib(planned["peak_allocated_bytes"]),
        gib(requested),
        error(planned["peak_allocated_bytes"], requested),
        gib(part["peak_allocated_bytes"]),
        gib(planned["peak_reserved_bytes"]),
        gib(reserved),
        error(planned["peak_reserved_bytes"], reserved),
    ]


def times(document: Record, workload: str) -> Table:
    """Milliseconds of a step's phases, and the step over the reference's."""
    measured = {
        name: part for name, part in finished(document, f"methods/{workload}/").items() if part["planned"] is not None
    }
    reference = measured.get(document["reference"])
    setup = document["workloads"][workload]
    tokens = setup["batch_size"] * setup["sequence_length"]
    cells = [
        [name, *(milliseconds(part[f"{phase}_seconds"]) for phase in ("forward", "backward", "update"))]
        + [milliseconds(step_seconds(part)), _over(part, reference), f"{tokens / step_seconds(part):,.0f}"]
        for name, part in measured.items()
    ]
    headers = ["method", "forward", "backward", "update", "step", f"/ {document['reference']}", "tokens/s"]
    notes = ["Medians of a few steps after two; the mean over blocks if they are trained in turn."]
    if reference and reference["planned"]["given"]:
        notes.append(f"{document['reference']}: with {said(reference['planned']['given'])}.")
    again = finished(document, f"again/{workload}/").get(document["reference"])
    if reference and again:
        notes.append(f"{document['reference']}, repeated at the end: {_over(again, reference)} of its first time.")
    return Table("Time of a step, ms", headers, cells, {"method"}, notes)


def blocks(measured: dict[str, Record]) -> Iterator[Table]:
    """The blocks of a method that trains them in turn, and what a change of block or subspace costs."""
    for method, part in measured.items():
        visits = part.get("visits", [])
        if len(visits) < 2:
            continue
        cells = [
            [_short(visit["selection"]), gib(visit["peak_requested_bytes"])]
            + [milliseconds(visit[f"{phase}_seconds"]) for phase in ("forward", "backward", "update")]
            + [milliseconds(visit["switch_seconds"]), milliseconds(visit["first_update_seconds"])]
            for visit in visits
        ]
        headers = ["trained", "requested GiB", "forward ms", "backward ms", "update ms", "switch ms", "first update ms"]
        notes = ["First update: the one right after a switch."]
        if not part.get("waits_for_switches"):
            notes.append("Switch: until its work was started, in this session, not until the card had done it.")
        yield Table(method, headers, cells, {"trained"}, notes)


def _short(selection: str | None) -> str:
    return NOTHING if selection is None else selection if len(selection) < 50 else f"{selection[:47]}..."


def race(document: Record) -> Table:
    """Ours over the peers'."""
    raced = finished(document, "race/")
    cells = [
        [name, part["peer"], part["dtype"], ratio(part["update_ratio"]), ratio(part["step_ratio"])]
        + [f"{part['our_peak_bytes'] / part['their_peak_bytes']:.3f}"]
        + [NOTHING if RACES[name].same_weights is None else f"{part['largest_difference']:.1e}"]
        for name, part in raced.items()
    ]
    unequal = ", ".join(name for name, part in raced.items() if not part["same_work"])
    headers = ["method", "peer", "in", "update time", "step time", "peak memory", "largest difference"]
    notes = [
        "Ours over theirs, as in the races on a CPU (benchmarks/README.md): medians of paired ratios with 95 % "
        "confidence intervals; memory by our meter; the largest difference of any weight after all steps, of "
        "those that compute the same.",
        *([f"No race, since the two do different things: {unequal}."] if unequal else []),
    ]
    return Table("Races", headers, cells, {"method", "peer", "in"}, notes)


def meter(document: Record) -> Table:
    """Metered steps against plain ones."""
    cells = [
        [name, gib(part["metered_bytes"])]
        + [
            gib(without(part[key], part["workspace_bytes"]))
            for key in ("peak_requested_bytes", "plain_requested_bytes")
        ]
        + [error(part["metered_bytes"], without(part["peak_requested_bytes"], part["workspace_bytes"]))]
        + [milliseconds(part["plain_seconds"]), milliseconds(part["metered_seconds"])]
        + [f"{part['metered_seconds'] / part['plain_seconds']:.2f}"]
        for name, part in finished(document, "meter/").items()
    ]
    headers = [
        "method",
        "metered",
        "requested",
        "requested, plain",
        "error",
        "plain ms",
        "metered ms",
        "metered / plain",
    ]
    notes = ["Metered steps against what the allocator was asked for in the same steps and in plain ones, GiB."]
    return Table("The meter", headers, cells, {"method"}, notes)


def largest(document: Record) -> Table:
    """The batch that a plan calls the largest, and whether it runs."""
    cells = [
        [*name.split("/"), str(part["planned_batch"]), str(part["largest_batch"] or NOTHING)]
        + [", ".join(f"{size} {'ran' if ran else 'did not'}" for size, ran in part["tries"].items())]
        for name, part in finished(document, "largest/").items()
    ]
    headers = ["set-up", "method", "card", "planned", "largest", "tried"]
    notes = ["Smaller cards: the allocator is limited to what they would leave it."]
    return Table("The largest batch", headers, cells, {"set-up", "method", "card", "tried"}, notes)


def missing(document: Record) -> Table:
    """Parts that were skipped or failed, and why."""
    parts = document["parts"].items()
    cells = [
        [name, part["status"].replace("_", " "), part.get("reason") or part.get("error", "")]
        for name, part in parts
        if part["status"] != "ok"
    ]
    return Table("Not measured", ["part", "", "why"], cells, {"part", "", "why"})


def promises(document: Record) -> Table:
    """Checks of the contract that failed on the device."""
    seen = finished(document, "promises/")
    cells = [[name, check, text] for name, part in seen.items() for check, text in part["broken"].items()]
    total = sum(part["checks"] for part in seen.values())
    notes = [f"Out of {total} checks of {len(seen)} methods (`optimizers.contract`) on the device."]
    return Table(
        "Promises broken", ["method", "check", "what it says"], cells, {"method", "check", "what it says"}, notes
    )


# ---- figures


def step_seconds(part: Record) -> float:
    """Seconds of a whole step."""
    return sum(part[f"{phase}_seconds"] for phase in ("forward", "backward", "update"))


def _over(part: Record, reference: Record | None) -> str:
    return NOTHING if reference is None else f"{step_seconds(part) / step_seconds(reference):.2f}"


def without(size: int | None, workspace: int | None) -> int | None:
    """Bytes without a workspace."""
    return None if size is None else size - (workspace or 0)


def gib(size: int | None) -> str:
    """Bytes as text, in GiB."""
    return NOTHING if size is None else f"{size / (1 << 30):.2f}"


def error(planned: int, seen: int | None) -> str:
    """The relative error of a plan, as text."""
    return NOTHING if not seen else f"{planned / seen - 1:+.1%}"


def milliseconds(seconds: float | None) -> str:
    """Seconds as text, in milliseconds."""
    return NOTHING if seconds is None else f"{1000 * seconds:.1f}"


def ratio(given: dict[str, float] | None) -> str:
    """A paired ratio with its interval, as text."""
    return NOTHING if given is None else f"{given['median']:.2f} [{given['low']:.2f}, {given['high']:.2f}]"


def said(given: dict[str, Any]) -> str:
    """Hyper-parameters in words."""
    return ", ".join(f"{key}={value}" for key, value in given.items())
