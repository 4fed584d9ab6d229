"""What the runs of a table need: the smallest card that holds each by plan, the hours there, the downloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import nn

from membench.config.declare import typed
from membench.config.defaults import hyperparameters
from membench.config.errors import UserError
from membench.config.settings import Settings, resolve
from membench.config.units import steps_of
from membench.planning.blueprint import Blueprint
from membench.planning.planner import Job, carry_out, method_values
from membench.planning.workload import Workload
from membench.reproduce.cards import UTILISATION, Card, hours, smallest
from membench.reproduce.recipes import Part, Recipe
from membench.reproduce.steps import on_random_tokens, workload_of
from membench.training.build import from_scratch
from reports.table import Row, Table, gib
from tasks.models.source import PREFIX


@dataclass(frozen=True)
class Need:
    """A run to make.

    Attributes:
        part: that it belongs to.
        method: the one method of `settings`.
        settings: of the comparison, or of the steps.
        plan: the planner's row for its largest micro-batch; None where it wasn't planned.
        flops: of all its training steps, if everything is trained.
    """

    part: Part
    method: str
    settings: Settings
    plan: Row | None = None
    flops: float = 0.0

    @property
    def label(self) -> str:
        """Of the row in the published table."""
        return self.part.rows[self.method]

    @property
    def card(self) -> Card | None:
        """The smallest that holds it."""
        return smallest(self.plan["estimated_total_bytes"]) if self.plan else None

    @property
    def steps(self) -> int:
        """Updates."""
        if self.settings.steps is not None:
            return self.settings.steps
        return steps_of(self.settings.epochs or 0, self.part.examples, self.settings.batch_size)


def of(recipe: Recipe, given: Mapping[str, Any]) -> list[Need]:
    """The runs of a recipe in order, not yet planned; `given` are options of how they are carried out."""
    return [
        Need(part, method, _settings(recipe, {**part.given, **given, "optimizers": method, "reference": False}))
        for part in recipe.parts
        for method in part.rows
    ]


def _settings(recipe: Recipe, given: Mapping[str, Any]) -> Settings:
    if recipe.learns:
        return resolve(given)
    return on_random_tokens(Settings(**typed(Settings, {**given, "profile": "paper"})))


def planned(recipe: Recipe, needs: Sequence[Need]) -> list[Need]:
    """The same with their plans; those of one method on one model share that of the largest batch.

    Raises:
        UserError: one can't be planned.
    """
    workloads = [_workload(recipe, need) for need in needs]
    largest: dict[tuple[str, str, str], int] = {}
    for number, (need, workload) in enumerate(zip(needs, workloads, strict=True)):
        key = _key(need)
        if key not in largest or workload.batch_size > workloads[largest[key]].batch_size:
            largest[key] = number
    jobs = [_job(recipe, needs[number], workloads[number]) for number in largest.values()]
    plans = dict(zip(largest, map(_row, carry_out(jobs)), strict=True))
    return [
        replace(need, plan=plans[_key(need)], flops=_flops(need, workload))
        for need, workload in zip(needs, workloads, strict=True)
    ]


def _key(need: Need) -> tuple[str, str, str]:
    settings = need.settings
    return need.method, settings.model, repr((settings.hyperparameters, settings.checkpointing))


def _workload(recipe: Recipe, need: Need) -> Workload:
    settings = need.settings
    workload = workload_of(replace(settings, model=recipe.architecture or settings.model), need.part.choices)
    return replace(workload, device="cpu" if settings.device == "cpu" else "cuda")


def _job(recipe: Recipe, need: Need, workload: Workload) -> Job:
    blueprint, given = Blueprint(workload), need.settings.hyperparameters
    if not (recipe.learns and need.settings.model.startswith(PREFIX)):
        return Job(workload, need.method, method_values(blueprint, need.method, given))
    head = blueprint.source.head(blueprint.kind)
    values = hyperparameters(
        need.method, given, learning_rate=None, seed=0, from_scratch=True, head=head, kind="language"
    )
    return Job(workload, need.method, from_scratch(need.method, values, blueprint.skeleton))


def _row(made: Any) -> Row:
    if made.plan is None:
        raise UserError(f"{made.job.method} can't be planned: {made.refused}")
    return made.plan.row


def _flops(need: Need, workload: Workload) -> float:
    """Six a weight and token, two more where layers are recomputed (Kaplan et al., 2020, arXiv 2001.08361)."""
    tokens = need.steps * need.settings.batch_size * need.part.choices * workload.sequence_length
    return (8 if workload.checkpointing else 6) * _multiplied(workload.model) * tokens


@lru_cache
def _multiplied(name: str) -> int:
    """How many weights a model multiplies by: not those that it only looks up."""
    model: Any = Blueprint(Workload(name)).skeleton
    table: nn.Embedding = model.get_input_embeddings()
    looked_up = 0 if model.config.tie_word_embeddings else table.weight.numel()
    return sum(p.numel() for p in model.parameters()) - looked_up


def table(recipe: Recipe, needs: Sequence[Need]) -> Table:
    """What each run needs, and all together; of planned ones."""
    named = any(need.part.name for need in needs)
    cells = [[need.label, *([need.part.name] if named else []), f"{need.steps:,}", *_cells(need)] for need in needs]
    headers = ["", *(["part"] if named else []), "steps", "GiB by plan", "smallest card", "time there"]
    return Table("What it needs", headers, cells, {"", "part", "smallest card"}, _notes(recipe, needs))


def _cells(need: Need) -> list[str]:
    assert need.plan is not None
    size = gib(need.plan["estimated_total_bytes"])
    if need.card is None:
        return [size, "none", "-"]
    return [size, need.card.name, duration(hours(need.flops, need.settings.dtype, need.card))]


def _notes(recipe: Recipe, needs: Sequence[Need]) -> list[str]:
    cards = [need.card for need in needs]
    held = [card for card in cards if card is not None]
    whole = max(held, key=lambda card: card.usable_bytes, default=None)
    notes = []
    if whole is not None:
        total = sum(hours(need.flops, need.settings.dtype, whole) for need in needs if need.card)
        most = "all of it" if len(held) == len(cards) else "all but what no card holds"
        notes.append(f"{most[0].upper()}{most[1:]} takes one {whole.name}, {duration(total)} of training steps there.")
    notes.append(
        "Times: 6 operations a weight and token (8 with checkpointing) as if everything were trained, at "
        f"{UTILISATION:.0%} of the card's peak; loading, scoring and metering come on top."
    )
    downloads = "; ".join(recipe.downloads) or "none, the weights are random"
    return [*notes, f"Downloads: {downloads}."]


def duration(in_hours: float) -> str:
    """Hours as text: minutes if there are few, days if there are many."""
    if in_hours < 1:
        return f"{max(1, round(in_hours * 60))} min"
    return f"{in_hours:,.1f} h" if in_hours < 100 else f"{in_hours:,.0f} h"
