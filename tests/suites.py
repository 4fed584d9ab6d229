"""Simulated suites for the tests of `membench check`: two sides of a comparison whose truth is known."""

import random
from collections.abc import Callable
from typing import Any

from reports_factory import MIB, make_record

from reports.record import Found
from reports.regressions import thresholds
from reports.regressions.check import Check
from reports.regressions.check import check as judge

PARTS = ("weights", "gradients", "optimizer_state", "activations", "temporaries")
DEFAULTS = thresholds.load()
_GOOD = make_record()


def run(
    task: int = 0,
    method: str = "adamw",
    seed: int = 0,
    score: float = 0.8,
    peak: float = 100,
    speed: float = 9000,
    **changes: Any,
) -> dict[str, Any]:
    """A record with this score, peak (MiB; all beyond four MiB are weights) and speed (tokens a second)."""
    parts = {f"{part}_bytes": MIB for part in PARTS[1:]} | {"weights_bytes": round((peak - 4) * MIB)}
    measured = {
        "task": f"superglue/t{task}",
        "method": method,
        "seed": seed,
        "metrics": {"accuracy": score},
        "memory": {**_GOOD["memory"], "peak_allocated_bytes": sum(parts.values()), "at_peak": parts},
        "time": {**_GOOD["time"], "tokens_per_second": speed},
    }
    return (
        make_record(**{**measured, **changes}) if changes else {**_GOOD, **measured}
    )  # quicker, for thousands of them


def suite(
    rng: random.Random,
    *,
    tasks: int = 7,
    methods: int = 5,
    seeds: int = 1,
    noise: float = 0.6,
    shift: float = 0,
    drift: float = 1,
    jitter: float = 0,
) -> list[dict[str, Any]]:
    """One side: scores around 80 points, shifted, with a standard deviation of `noise` points; speeds times `drift`,
    each with a relative `jitter`."""
    return [
        run(
            task,
            "adamw" if method == 0 else f"m{method}",
            seed,
            0.8 + rng.gauss(shift, noise) / 100,
            100 - 9 * method,
            9000 * (1 + method) * drift * (1 + rng.gauss(0, jitter)),
        )
        for task in range(tasks)
        for method in range(methods)
        for seed in range(seeds)
    ]


def check(baseline: list[dict[str, Any]], candidate: list[dict[str, Any]], *metrics: str, **limits: Any) -> Check:
    tolerated = thresholds.Thresholds(**{**vars(DEFAULTS), **limits})
    given = {"metrics": metrics} if metrics else {}
    return judge(Found(baseline, []), Found(candidate, []), tolerated, **given)


def rate(number: int, sides: Callable[[random.Random], tuple[list, list]], seed: int = 0) -> float:
    """The share of simulated suites that are called a regression."""
    rng = random.Random(seed)
    return sum(check(*sides(rng)).code == 1 for _ in range(number)) / number
