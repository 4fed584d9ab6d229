"""Does the batch that the plan calls the largest run, and the next larger one fail?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.on_gpu.card import Card
from benchmarks.on_gpu.methods import MEMORY_STEPS, Bench, turns
from membench.planning.workload import Workload
from tasks.models.damage import is_out_of_memory

MOST_TRIES = 5


def check(card: Card, workload: Workload, method: str, total_bytes: int, planned: int) -> dict[str, Any]:
    """Try the planned batch and its neighbours on a card of `total_bytes`.

    Returns:
        total_bytes, planned_batch.
        tries: {batch: did it run?}, until a batch runs whose next one doesn't.
        largest_batch: that batch; None if none was found in `MOST_TRIES`, or if nothing limits the memory.
        outside_bytes: what the process holds outside the allocator's segments.
    """
    tries: dict[int, bool] = {}
    with card.smaller(total_bytes):
        batch = planned
        while card.on_gpu and batch > 0 and len(tries) < MOST_TRIES and batch not in tries:
            tries[batch] = runs(card, replace(workload, batch_size=batch), method)
            batch += 1 if tries[batch] else -1
    found = [size for size, ran in tries.items() if ran and tries.get(size + 1) is False]
    return {
        "total_bytes": total_bytes,
        "planned_batch": planned,
        "tries": {str(size): ran for size, ran in tries.items()},
        "largest_batch": found[0] if found else None,
        "outside_bytes": card.outside_bytes(),
    }


def runs(card: Card, workload: Workload, method: str) -> bool:
    """Do a few steps on the largest selection succeed?"""
    try:
        bench = Bench(card, workload, method, {})
        next(turns(bench.optimizer, card))
        bench.steps(MEMORY_STEPS)
        card.wait()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
