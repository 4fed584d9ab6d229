"""The check of speeds: tokens a second of each row, relative to the reference method of the same run."""

import math
from collections.abc import Iterator
from typing import Any

from reports.names import counted
from reports.record import Record, has_true_times, tokens_per_second, undue_waiting
from reports.regressions import findings
from reports.regressions.evidence import SHARES, Row, judge
from reports.regressions.findings import Finding
from reports.regressions.measured import Measured, finding, why
from reports.regressions.metric import Metric, Suite, arrow
from reports.regressions.noise import Noise
from reports.regressions.pairing import Pair, PairedRow, RowKey, place

FEWEST_STEPS = 10  # of a speed that is judged
BUSY, AT_REST = 1.0, 0.25  # spreads of step times: above is a busy machine, below is none
_REPEATED = Noise(0.1**2)  # of the logarithm of a ratio: repeated runs of the same code differed by up to 20 %
_SAME_MACHINE = ("device_name", "threads")  # of the environment: speeds of two machines have no common ratio


def throughput(suite: Suite) -> Iterator[Finding]:
    """Each row's speed, divided by the reference's on the same task and seed of the same side; changes are shares."""
    limits = suite.thresholds
    percent = f"{limits.throughput_percent:g}%"
    margin = -math.log1p(-limits.throughput_percent / 100)
    measured = {key: found for key, row in suite.others.items() if (found := _ratios(row, suite.references))}
    for key, (ratios, unfit) in measured.items():
        if not ratios.differences:
            yield _unfit_finding(key, suite.others[key], suite.references, unfit, margin)
    rows = {key: Row(one.differences, _REPEATED) for key, (one, _) in measured.items() if one.differences}
    judged = judge(rows, margin, limits.false_alarms * SHARES["throughput"], lambda key: key.task)
    for key, one in judged.items():
        reason = why(one, percent, "one seed, against what repeated runs differ by", "")
        yield finding("throughput", key, measured[key][0], one, math.expm1(one.mean), reason)


def _ratios(row: PairedRow, references: dict[str, Pair]) -> tuple[Measured, str] | None:
    """Ratios of the seeds that can be judged, and why the last of the others can't; None without any to look at."""
    found, unfit = Measured(), ""
    for seed, pair in sorted(row.pairs.items()):
        reference = references.get(place(pair))
        if reference is None or not _one_machine([*pair, *reference]) or not all(map(speed, (*pair, *reference))):
            continue
        if reason := _unfit(pair, reference):
            unfit = reason
        else:
            _add(found, seed, pair, reference)
    return (found, unfit) if found.differences or unfit else None


def _add(found: Measured, seed: int, pair: Pair, reference: Pair) -> None:
    before, after = (speed(run) / speed(other) for run, other in zip(pair, reference, strict=True))
    found.add(seed, before, after, math.log(after / before))


def _unfit(pair: Pair, reference: Pair) -> str:
    """Why a speed says nothing about the code: too few steps, or a machine that did something else."""
    steps = min(_steps(run) for run in (*pair, *reference))
    if steps < FEWEST_STEPS:
        return f"{steps:g} steps are too few to judge a speed by (at least {FEWEST_STEPS})"
    if waited := max(map(undue_waiting, (*pair, *reference))):
        return f"the machine was busy: a run waited for processors for {waited:.0%} of its time"
    busy = [spread for both in (pair, reference) if (spread := _busy(*both))]
    return f"the machine was busy: times of a step spread by {max(busy):.0%} of their median" if busy else ""


def _steps(run: Record) -> float:
    """Those that were timed; of older records all of them."""
    return _time(run, "timed_steps") or run["training"]["steps"] or math.inf


def _busy(old: Record, new: Record) -> float:
    """The larger spread of step times if it shows a busy machine, else 0.

    A method may have longer steps and shorter ones by itself (BAdam's blocks): it does on both sides, so that a spread
    is suspicious if it is twice that of the other side.
    """
    less, more = sorted(_time(run, "step_spread") or 0.0 for run in (old, new))
    return more if more > BUSY or (more > AT_REST and more > 2 * less) else 0.0


def _time(run: Record, name: str) -> Any:
    return (run["time"] or {}).get(name)


def _unfit_finding(key: RowKey, row: PairedRow, references: dict[str, Pair], reason: str, margin: float) -> Finding:
    """What isn't judged is shown all the same, and is worth a look if it changed by more than the margin."""
    found = Measured()
    for seed, pair in sorted(row.pairs.items()):
        if (reference := references.get(place(pair))) and all(map(speed, (*pair, *reference))):
            _add(found, seed, pair, reference)
    change = sum(found.differences.values()) / len(found.differences)
    before, after = (sum(side.values()) / len(side) for side in (found.before, found.after))
    verdict = findings.UNKNOWN if abs(change) > margin else findings.UNJUDGED
    seeds = tuple(found.differences)
    return Finding("throughput", verdict, reason, *key, seeds, before, after, math.expm1(change))


def speed(run: Record) -> float:
    """Tokens a second; 0 is unknown, as of a run whose times tell nothing."""
    return has_true_times(run) and _time(run, "tokens_per_second") or 0


def _one_machine(runs: list[Record]) -> bool:
    """Whether all of them come from one kind of machine, as far as is known."""
    return all(len({run["environment"].get(name) for run in runs} - {None}) < 2 for name in _SAME_MACHINE)


def _notes(suite: Suite) -> list[str]:
    return _machine_notes(suite) + _unfit_notes(suite) + _shared_notes(suite)


def _machine_notes(suite: Suite) -> list[str]:
    """The machines of the runs whose speeds aren't checked, since they or the reference's are from several."""
    pairs = [
        (pair, suite.references.get(place(pair), ())) for row in suite.rows.values() for pair in row.pairs.values()
    ]
    apart = [[*pair, *reference] for pair, reference in pairs if not _one_machine([*pair, *reference])]
    if not apart:
        return []
    sides = [" and ".join(sorted({_machine(run) for runs in apart for run in runs[side::2]})) for side in (0, 1)]
    where, machines = "" if len(apart) == len(pairs) else f" of {counted(len(apart), 'run')}", " -> ".join(sides)
    return [f"Speeds{where} are from other machines ({machines}): shown, not checked."]


def _unfit_notes(suite: Suite) -> list[str]:
    counts: dict[str, int] = {}
    for row in suite.others.values():
        found = _ratios(row, suite.references)
        if found and not found[0].differences:
            counts[found[1]] = counts.get(found[1], 0) + 1
    return [f"Speeds of {counted(count, 'row')} are shown, not checked: {reason}." for reason, count in counts.items()]


def _shared_notes(suite: Suite) -> list[str]:
    """How many runs have no ratio since times that it needs tell nothing."""
    pairs = [(pair, suite.references.get(place(pair))) for row in suite.others.values() for pair in row.pairs.values()]
    complete = [[*pair, *reference] for pair, reference in pairs if reference]
    several = [runs for runs in complete if all(map(_was_timed, runs)) and not all(map(has_true_times, runs))]
    if not several:
        return []
    why = "they, or those beside them, may have shared a device with others, or went on on other processes"
    return [f"Speeds of {counted(len(several), 'run')} aren't checked: {why}."]


def _was_timed(run: Record) -> bool:
    return bool(_time(run, "tokens_per_second"))


def _machine(run: Record) -> str:
    name, threads = (run["environment"].get(name) for name in _SAME_MACHINE)
    return f"{name or 'an unknown machine'}, {counted(threads or '?', 'thread')}"


def _speeds(row: PairedRow, finding: Finding | None) -> str:
    """Absolute, of all seeds together as a report has them: a reader wants them, no verdict rests on them."""
    told = [tokens_per_second(filter(speed, side)) for side in zip(*row.pairs.values(), strict=True)]
    return " -> ".join("?" if one is None else f"{one:,.0f}" for one in told)


METRIC = Metric(
    "throughput",
    throughput,
    "{:.2f} x".format,
    "{:+.1%}".format,
    (("tokens/s", _speeds), ("ratio", arrow("{:.2f}".format))),
    relative=True,
    notes=_notes,
)
