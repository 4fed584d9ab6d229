"""Plans of several methods on one model, side by side: what `membench plan` prints, as data."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

import optimizers
from membench.config.defaults import check_targets, hyperparameters
from membench.config.errors import explain
from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.memory.garbage import collected_by_hand
from membench.planning.advice import Advice, advise
from membench.planning.blueprint import Blueprint
from membench.planning.budget import Limits, find_limits
from membench.planning.cards import smallest
from membench.planning.formulas import facts, formula
from membench.planning.gpus import needed
from membench.planning.method import Plan, plan_method
from membench.planning.simulate import chooses
from membench.planning.workload import Workload
from membench.training.activations import check_pieces
from tasks.models.source import check_positions

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels that no plan runs

Given = Mapping[str, Mapping[str, Any]]  # hyper-parameters by method
Report = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One method to plan; `values` are all its hyper-parameters."""

    workload: Workload
    method: str
    values: dict[str, Any]
    budget_bytes: int | None = None


@dataclass
class Planned:
    """A plan, what fits into the budget and with what the method would if it doesn't; or why it can't be planned.

    What fits besides isn't looked for where real steps must be made."""

    job: Job
    plan: Plan | None
    limits: Limits | None = None
    advice: Advice | None = None
    refused: str | None = None
    gpus_needed: int | None = None
    fits: bool | None = None


def plan(
    workload: Workload,
    methods: Sequence[str],
    given: Given,
    *,
    budget_bytes: int | None = None,
    report: Report = lambda method: None,
) -> dict[str, Any]:
    """The plans of `methods` as one JSON document.

    Args:
        workload: the model and the training step.
        methods: names of `optimizers`.
        given: hyper-parameters that differ from fine-tuning's defaults, by method ("*": all methods that have them).
        budget_bytes: of the GPU, to say what fits.
        report: called with the name of each method whose plan is made.

    Returns:
        setup, parameters, budget_bytes, context_bytes, rows (one per method), refused {method: why}.

    Raises:
        ValueError: an unknown model, method or hyper-parameter; or all methods refuse.
    """
    check_targets(methods, given)
    blueprint = Blueprint(workload)
    check_pieces(workload, of_pairs=workload.task == "dpo")
    check_positions(workload.model, blueprint.skeleton, workload.sequence_length)
    longest = blueprint.longest_sequence
    if longest is not None and workload.sequence_length > longest:
        raise ValueError(
            f"--sequence-length {workload.sequence_length} is more than the {longest} positions of {workload.model}: "
            f"give at most {longest}"
        )
    attention = blueprint.attention  # this also loads the model's code, before processes fork
    jobs = [Job(workload, name, method_values(blueprint, name, given), budget_bytes) for name in methods]
    planned = list(carry_out(jobs, report))
    if planned and planned[0].refused and all(one.refused for one in planned):
        raise ValueError(planned[0].refused)
    return {
        "setup": {**asdict(workload), "attention": attention, "auto_class": blueprint.kind.__name__},
        "parameters": blueprint.parameters,
        "budget_bytes": budget_bytes,
        "context_bytes": CUDA_CONTEXT_BYTES,
        "rows": [row(one, blueprint) for one in planned if one.plan],
        "refused": {one.job.method: one.refused for one in planned if one.refused},
    }


def method_values(blueprint: Blueprint, method: str, given: Given) -> dict[str, Any]:
    """All hyper-parameters of `method` on pretrained weights: a new head is always trained, embeddings if asked."""
    return hyperparameters(
        method,
        given,
        learning_rate=None,
        seed=0,
        from_scratch=False,
        head=blueprint.head,
        kind=blueprint.task_kind,
        width=blueprint.source.width,
    )


def carry_out(jobs: Sequence[Job], report: Report = lambda method: None) -> Iterator[Planned]:
    """The jobs' plans in order, made on all cores that this process may use; `report(method)` after each."""
    with collected_by_hand():
        workers = min(len(jobs), cores())
        if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
            for job in jobs:
                yield _carry_out(job)
                report(job.method)
            return
        # One thread each: a fork lacks the threads that its parent's tensors may have started, and would wait for them
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, fork, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            made: dict[int, Future[Planned]] = {}
            for number in sorted(range(len(jobs)), key=lambda number: not _takes_long(jobs[number])):
                made[number] = pool.submit(_carry_out, jobs[number])
                made[number].add_done_callback(partial(_tell, report, jobs[number].method))
            for number, job in enumerate(jobs):
                planned = made[number].result()
                # autograd's threads, which this process may have started, aren't in a fork: torch then refuses
                yield _carry_out(job) if planned.refused and NO_FORK in planned.refused else planned


NO_FORK = "fork-based multiprocessing"  # in what torch says


def _takes_long(job: Job) -> bool:
    """Is the model's whole depth most likely simulated? At the end the other cores would wait for such a job."""
    return chooses(optimizers.get(job.method))


def _tell(report: Report, method: str, done: Future[Planned]) -> None:
    report(method)


def _carry_out(job: Job) -> Planned:
    blueprint = Blueprint(job.workload)
    try:
        made = plan_method(blueprint, job.method, job.values)
        limits, advice, gpus, fits = None, None, None, None
        if job.budget_bytes:
            if not made.of_values:  # the largest that fits would need as much of this machine
                limits = find_limits(made, blueprint, job.values, job.budget_bytes)
            fits = made.fits_in(job.budget_bytes)
            if not fits:
                advice = advise(made, blueprint, job.values, job.budget_bytes)
            if job.workload.shards > 1:
                gpus = needed(made, blueprint, job.values, job.budget_bytes)
    except ValueError as error:
        return Planned(job, None, refused=str(error))
    except Exception as error:  # from whatever code comes with a model or method: the other rows continue
        return Planned(job, None, refused=explain(error))
    return Planned(job, made.without_trace(), limits, advice, gpus_needed=gpus, fits=fits)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if "sched_getaffinity" in vars(os) else os.cpu_count() or 1


def row(planned: Planned, blueprint: Blueprint) -> dict[str, Any]:
    """A row of the JSON: the plan's own, the paper's formula, and what fits the budget."""
    made, job = planned.plan, planned.job
    assert made is not None
    paper = formula(optimizers.split(job.method)[0], facts(blueprint, blueprint.parameters), job.values)
    budget, total = job.budget_bytes, made.row["estimated_total_bytes"]
    return {
        **made.row,
        "hyperparameters": job.values,
        "smallest_card": smallest(total, job.workload.dtype),
        "fits": planned.fits,
        "left_bytes": None if budget is None else budget - total,
        "limits": asdict(planned.limits) if planned.limits else None,
        "advice": asdict(planned.advice) if planned.advice else None,
        "gpus_needed": planned.gpus_needed,
        "formula": paper[0] if paper else None,
        "formula_bytes": paper[1] if paper else None,
        "varies_with": optimizers.get(job.method).varies_with or None,
        "fused_weights": blueprint.fused_weights if optimizers.get(job.method).only_linear else 0,
        "simulated_depths": list(made.depths),
        "modules": made.modules,
    }
