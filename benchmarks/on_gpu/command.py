"""The command: `python benchmarks/gpu.py --out gpu.json --minutes 6`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optimizers
from benchmarks.on_gpu import card, largest, meter, methods, plans, promises, races
from benchmarks.on_gpu.journal import Broken, Journal, Part
from benchmarks.on_gpu.workloads import GIB, PROGRAMS, RACED_IN_BF16, REFERENCE, Budget, Program

THE_CARD = "the card"  # ends the name of a plan for this card's own memory
FIRST = ("adamw", "badam", "lora", "galore", "lomo", "blockllm", "lisa", "hft")  # the most important, on each workload


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all parts for which there is time; returns 0 if none of those begun failed."""
    options = parse(arguments)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # so that nvidia-smi and CUDA mean the same card
    journal = Journal(options.out, options.minutes, options.resume)
    try:
        session = Session(options, journal)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    if options.plan_only:
        session.make_plans()
        return 0
    try:
        for part in session.parts():
            record = journal.do(part)
            say(f"{journal.seconds_left:5.0f} s left  {part.name}: {_line(record)}")
    except Broken as error:
        say(f"the process can't continue, starting another one: {error}")
        session.planner.stop()
        again = [argument for argument in sys.argv[1:] if argument != "--resume"]
        os.execv(sys.executable, [sys.executable, sys.argv[0], *again, "--resume"])
    finally:
        session.planner.stop()
    statuses = [record["status"] for record in journal.parts.values()]
    say(", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses))) + f": {options.out}")
    return int("failed" in statuses)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON; rewritten after each part")
    parser.add_argument("--minutes", type=float, default=9.0, help="in total; what doesn't fit is left out (9)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--model", choices=PROGRAMS, default="full", help="tiny: a rehearsal, in seconds")
    parser.add_argument("--methods", metavar="NAMES", help="adamw,badam,... (default: all)")
    parser.add_argument(
        "--only", default="", metavar="TEXTS", help="parts with one of these in their name: methods/badam/,race"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps per method (5)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3), help="processes that plan")
    parser.add_argument("--plan-only", action="store_true", help="only make the plans; needs --card-gib, but no GPU")
    parser.add_argument("--card-gib", type=float, help="the card's usable memory (default: as the driver says)")
    parser.add_argument("--plans", type=Path, metavar="FILE", help="from --plan-only, with the same versions")
    parser.add_argument("--commit", help="of the code, for the record")
    parser.add_argument("--resume", action="store_true", help="continue FILE")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.model == "full":
        parser.error("--device cpu is for --model tiny: the full models would take days")
    known = optimizers.available()
    names = options.methods.split(",") if options.methods else [*FIRST, *(n for n in known if n not in FIRST)]
    options.methods = names
    for name in names:
        if name not in known:
            parser.error(f"unknown method {name!r}; there are {', '.join(known)}")
    return options


class Session:
    """The parts in order of importance, and the plans with which they are compared.

    Raises:
        ValueError: the journal is of another card or of other models.
    """

    def __init__(self, options: argparse.Namespace, journal: Journal):
        self.options, self.journal = options, journal
        self.card = card.Card(options.device)
        self.program: Program = PROGRAMS[options.model]
        self.total_bytes = self._total_bytes()
        self.planner = plans.Plans(options.workers)
        about = {"workloads": self._workloads(), "total_bytes": self.total_bytes}
        if any(journal.document.get(name, now) != now for name, now in about.items()):
            raise ValueError(f"--resume {journal.path}: it is of another card or of other models: give another --out")
        journal.document |= about
        journal.document["reference"] = REFERENCE
        journal.document["planned_with"] = card.versions()
        journal.document.setdefault("plans", self._made_before())
        self._begin_plans()

    def _total_bytes(self) -> int | None:
        if self.options.card_gib is not None:
            return int(self.options.card_gib * GIB)
        # after an error of the card the driver may be silent for a while
        return (driver_total_bytes() if self.card.on_gpu else None) or self.journal.document.get("total_bytes")

    def _workloads(self) -> dict[str, Any]:
        return {name: asdict(one) for name, one in self.program.workloads.items()}

    def _made_before(self) -> dict[str, Any]:
        """The plans in a file, but for those that would be others today, on this card."""
        if self.options.plans is None:
            return {}
        before = json.loads(self.options.plans.read_text(encoding="utf-8"))
        for package in ("torch", "transformers"):
            theirs, ours = before["planned_with"][package], card.versions()[package]
            if theirs != ours:
                say(f"{self.options.plans} was made with {package} {theirs}, this is {ours}: all is planned again")
                return {}
        if before["workloads"] != self._workloads():
            say(f"{self.options.plans} is of other models: all is planned again")
            return {}
        made = before["plans"]
        same_card = before.get("total_bytes") == self.total_bytes
        kept = {name: plan for name, plan in made.items() if same_card or self._holds_here(name, plan)}
        if len(kept) < len(made):
            say(f"{self.options.plans} is of another card: {len(made) - len(kept)} of {len(made)} are planned again")
        return kept

    def _holds_here(self, name: str, made: Any) -> bool:
        """Would this plan for another card be the same for this one?"""
        if isinstance(made, list):
            return all(row["fits"] == plans.fits(row, self.total_bytes) for row in made)
        return not name.endswith(THE_CARD)

    def make_plans(self) -> None:
        """Make all plans, and nothing on the device."""
        for name, *_ in self._plans():
            if not self._is_needed(name):
                continue
            try:
                self._planned(name)
                say(f"planned {name}")
            except Exception as error:  # its part will fail in the same way, and keep the traceback
                say(f"{name}: {error}")
            self.journal.save()
        self.planner.stop()

    def _begin_plans(self) -> None:
        """Start the plans in the order in which they are needed, before anything here talks to the GPU."""
        made = self.journal.document["plans"]
        for name, work, *arguments in self._plans():
            if self._is_needed(name) and name not in made:
                self.planner.begin(name, work, *arguments)

    def _planned(self, name: str) -> Any:
        made = self.journal.document["plans"]
        if name not in made:
            made[name] = self.planner.result(name)
        return made[name]

    def _plans(self) -> Iterator[tuple[Any, ...]]:
        for workload, method in self._methods():
            yield (
                f"methods/{workload}/{method}",
                plans.fitting,
                self.program.workloads[workload],
                method,
                self.total_bytes,
            )
        for budget in self._budgets():
            workload = self.program.workloads[budget.workload]
            total = budget.total_bytes or self.total_bytes
            if self._has(total):
                yield _largest_name(budget), plans.planned_batch, workload, budget.method, total

    def _has(self, total_bytes: int | None) -> bool:
        """Can a card of so many bytes be tried on this one? A rehearsal tries nothing."""
        return self.total_bytes is None or (total_bytes or 0) <= self.total_bytes

    def _methods(self) -> Iterator[tuple[str, str]]:
        """First the most important methods on all workloads, then the others."""
        first = [name for name in self.options.methods if name in FIRST]
        for group in (first, [name for name in self.options.methods if name not in FIRST]):
            for workload in self.program.workloads:
                yield from ((workload, method) for method in group)

    def _budgets(self) -> list[Budget]:
        known = self.options.methods
        return [b for b in self.program.budgets if b.method in known and (b.total_bytes or self.total_bytes)]

    def parts(self) -> Iterator[Part]:
        """The requested ones."""
        for part in self._parts():
            if self._is_wanted(part.name) or part.name == "conditions":
                yield part

    def _is_wanted(self, name: str) -> bool:
        return any(text in name for text in self.options.only.split(","))

    def _is_needed(self, plan: str) -> bool:
        """Does a requested part need the plan of this name? The reference's is needed twice."""
        again = plan.replace("methods/", "again/", 1) if plan.endswith(f"/{REFERENCE}") else plan
        return self._is_wanted(plan) or self._is_wanted(again)

    def _parts(self) -> Iterator[Part]:
        yield Part("conditions", lambda: card.conditions(self.card, self.options.commit))
        yield Part("ceilings", lambda: card.ceilings(self.card))
        measured = [self._method(*pair) for pair in self._methods()]
        metered = [self._meter(name) for name in self.program.metered[1] if name in self.options.methods]
        budgets = [self._largest(budget) for budget in self._budgets()]
        raced = [self._race(name) for name in races.names(self.options.methods)]
        # one of each kind early: then a session that is cut short has seen them all
        count = 2 * sum(name in FIRST for name in self.options.methods)
        yield from (*measured[:count], *metered[:1], *budgets[:1], *raced[:2])
        yield from (*measured[count:], *raced[2:], *budgets[1:], *metered[1:])
        if REFERENCE in self.options.methods:
            yield self._method(next(iter(self.program.workloads)), REFERENCE, again=True)
        yield Part("conditions at the end", card.nvidia_smi)
        for method in self.options.methods:
            yield Part(f"promises/{method}", lambda name=method: promises.check(self.card, name))

    def _method(self, workload: str, method: str, again: bool = False) -> Part:
        def work() -> dict[str, Any]:
            rows = self._planned(f"methods/{workload}/{method}")
            planned = rows[-1]
            record = {"planned": planned, "too_large": rows[:-1] if planned["fits"] else rows}
            if not planned["fits"]:
                return {**record, "planned": None}
            steps, setup = self.options.steps, self.program.workloads[workload]
            return {**record, **methods.measure(self.card, setup, method, planned["given"], steps)}

        name = f"{'again' if again else 'methods'}/{workload}/{method}"
        return Part(name, work, expected_seconds=6.0, limit_seconds=60.0)

    def _meter(self, method: str) -> Part:
        workload = self.program.workloads[self.program.metered[0]]
        return Part(f"meter/{method}", lambda: meter.compare(self.card, workload, method, self.options.steps))

    def _largest(self, budget: Budget) -> Part:
        workload, name = self.program.workloads[budget.workload], _largest_name(budget)

        def work() -> dict[str, Any]:
            total = budget.total_bytes or self.total_bytes
            if not self._has(total):
                return {"status": "skipped", "reason": "this card has less"}
            planned = self._planned(name)
            return largest.check(self.card, workload, budget.method, total, planned)

        return Part(name, work, expected_seconds=12.0, limit_seconds=60.0)

    def _race(self, method: str) -> Part:
        def work() -> dict[str, Any]:
            if not races.installed(method):
                return {"status": "skipped", "reason": f"{races.PACKAGES[method]} isn't installed"}
            dtype = "bfloat16" if self.card.on_gpu and method in RACED_IN_BF16 else "float32"
            return races.race(method, replace(self.program.race, dtype=dtype), 2 * self.options.steps)

        return Part(f"race/{method}", work, expected_seconds=8.0, limit_seconds=45.0)


def _largest_name(budget: Budget) -> str:
    size = THE_CARD if budget.total_bytes is None else f"{budget.total_bytes >> 30} GiB"
    return f"largest/{budget.workload}/{budget.method}/{size}"


def driver_total_bytes() -> int | None:
    """The GPU's usable memory, from the driver: this process must not talk to the GPU before it has forked."""
    said = card.nvidia_smi()
    sizes = [said.get(key, "").split(" ")[0] for key in ("memory.total", "memory.reserved")]
    return (int(sizes[0]) - int(sizes[1])) << 20 if all(size.isdecimal() for size in sizes) else None


def _line(record: dict[str, Any]) -> str:
    """A part's outcome on one line."""
    if record["status"] != "ok":
        return f"{record['status']}: {record.get('error') or record.get('reason')}"
    shown = {key: value for key, value in record.items() if isinstance(value, int | float | str)}
    planned = record.get("planned")
    if isinstance(planned, dict):
        shown = {"planned_bytes": planned["peak_allocated_bytes"], **shown}
    return ", ".join(f"{key} {_short(value)}" for key, value in shown.items() if key != "status")


def _short(value: int | float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)
