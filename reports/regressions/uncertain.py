"""Checks of what is partly noise: scores, and speeds relative to the reference method of the same run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from reports.record import Record
from reports.regressions import findings
from reports.regressions.evidence import SHARES, Judgement, Together, judge, judge_together
from reports.regressions.findings import Finding
from reports.regressions.metric import Metric, Suite, arrow
from reports.regressions.pairing import Pair, PairedRow, RowKey, place
from reports.setups import score
from reports.statistics import summarise

_VERDICTS = {"worse": findings.REGRESSION, "better": findings.IMPROVED}
_SAME_MACHINE = ("device_name", "threads")  # of the environment: speeds of two machines have no common ratio


@dataclass
class _Measured:
    """Values of one row by seed, and their differences, turned so that less than 0 is worse."""

    before: list[float]
    after: list[float]
    differences: list[float]
    seeds: list[int]


def quality(suite: Suite) -> Iterator[Finding]:
    """The headline of each row, then of all rows together and of each method's.

    Figures are as the task scores, changes in points: less than 0 is worse.
    """
    thresholds = suite.thresholds
    measured = {key: found for key, row in suite.rows.items() if (found := _scores(row))}
    differences = {key: found.differences for key, found in measured.items()}
    margin, alpha = thresholds.quality_points, thresholds.false_alarms
    judged = judge(differences, margin, alpha * SHARES["quality"])
    for key, judgement in judged.items():
        yield _finding("quality", key, measured[key], judgement, judgement.mean, _why(judgement, f"{margin:g} points"))
    groups = _groups({key: judgement.mean for key, judgement in judged.items()})
    for name, together in judge_together(groups, alpha * SHARES["groups"]).items():
        yield Finding(
            "quality",
            _VERDICTS.get(together.verdict, findings.FINE),
            _together(name, together),
            method=name,
            change=together.mean,
            p=together.mean_p,
        )


def _groups(means: dict[RowKey, float]) -> dict[str, list[float]]:
    """The means of all rows (under an empty name) and, if there are several methods, of each one's."""
    methods = dict.fromkeys(key.method for key in means)
    groups = {"": list(means.values())}
    if len(methods) > 1:
        groups |= {method: [mean for key, mean in means.items() if key.method == method] for method in methods}
    return {name: values for name, values in groups.items() if len(values) > 1}


def _scores(row: PairedRow) -> _Measured | None:
    ok = {seed: pair for seed, pair in sorted(row.pairs.items()) if all(run["status"] == "ok" for run in pair)}
    if not ok:
        return None
    before, after = ([score(pair[side]) for pair in ok.values()] for side in (0, 1))
    scale = 100.0 if max(map(abs, [*before, *after])) <= 1 else 1.0
    pairs = zip(before, after, strict=True)
    if next(iter(ok.values()))[0]["higher_is_better"]:
        differences = [_rounded(scale * (new - old)) for old, new in pairs]
    else:
        differences = [_rounded(100 * (old - new) / (abs(old) or 1)) for old, new in pairs]
    return _Measured(before, after, differences, list(ok))


def _rounded(difference: float) -> float:
    """Without the last bits of a subtraction, which are no difference."""
    return round(difference, 9)


def _finding(
    metric: str, key: RowKey, measured: _Measured, judgement: Judgement, change: float, reason: str
) -> Finding:
    return Finding(
        metric,
        _VERDICTS.get(judgement.verdict, judgement.verdict),
        reason,
        *key,
        tuple(measured.seeds),
        summarise(measured.before).mean,
        summarise(measured.after).mean,
        change,
        judgement.p,
    )


def _why(judgement: Judgement, margin: str) -> str:
    """How a verdict came about, in words."""
    if not judgement.mean and not judgement.noise:
        return ""
    seeds = "one seed" if judgement.seeds == 1 else f"{judgement.seeds} seeds"
    if judgement.p is None:
        return f"{seeds}: margin of {margin} alone"
    p = "p < 0.0001" if judgement.p < 1e-4 else f"p = {judgement.p:.2g}"
    if judgement.seeds == 1:
        words = f"one seed: margin of {margin} alone; against the noise between rows {p}"
    else:
        words = f"paired t-test over {seeds}: {p}, margin {margin}"
    return words + ("; can't be told from noise" if judgement.verdict == "inconclusive" else "")


def _together(name: str, together: Together) -> str:
    whose = f"rows of {name}" if name else "rows"
    text = f"{together.worse} of {together.rows} {whose} are worse, {together.better} better; "
    text += f"{together.mean:+.2f} points on average; sign test p = {together.sign_p:.2g}"
    return text + ("" if together.mean_p is None else f", paired mean p = {together.mean_p:.2g}")


def throughput(suite: Suite) -> Iterator[Finding]:
    """Tokens a second of each row, divided by the reference's on the same task and seed of the same side.

    The change is a share.
    """
    thresholds = suite.thresholds
    measured = {key: found for key, row in suite.others.items() if (found := _ratios(row, suite.references))}
    margin = -math.log1p(-thresholds.throughput_percent / 100)
    differences = {key: found.differences for key, found in measured.items()}
    judged = judge(differences, margin, thresholds.false_alarms * SHARES["throughput"])
    for key, judgement in judged.items():
        reason = _why(judgement, f"{thresholds.throughput_percent:g}%")
        yield _finding("throughput", key, measured[key], judgement, math.expm1(judgement.mean), reason)


def _ratios(row: PairedRow, references: dict[str, Pair]) -> _Measured | None:
    found = _Measured([], [], [], [])
    for seed, pair in sorted(row.pairs.items()):
        reference = references.get(place(pair))
        if reference is None or not _one_machine([*pair, *reference]) or not all(map(speed, (*pair, *reference))):
            continue
        before, after = (speed(run) / speed(other) for run, other in zip(pair, reference, strict=True))
        found.before.append(before)
        found.after.append(after)
        found.differences.append(_rounded(math.log(after / before)))
        found.seeds.append(seed)
    return found if found.seeds else None


def speed(run: Record) -> float:
    """Tokens a second; 0 is unknown."""
    return (run["time"] or {}).get("tokens_per_second") or 0


def _one_machine(runs: list[Record]) -> bool:
    """Whether all of them come from one kind of machine, as far as is known."""
    return all(len({run["environment"].get(name) for run in runs} - {None}) < 2 for name in _SAME_MACHINE)


def _machine_notes(suite: Suite) -> list[str]:
    """The machines of both sides, where they differ."""
    pairs = [pair for row in suite.rows.values() for pair in row.pairs.values()]
    sides = [sorted({_machine(pair[side]) for pair in pairs}) for side in (0, 1)]
    if sides[0] == sides[1]:
        return []
    machines = " -> ".join(" and ".join(side) for side in sides)
    return [f"Speeds are from other machines ({machines}): shown, not checked."]


def _seed_notes(suite: Suite) -> list[str]:
    if all(len(row.pairs) != 1 for row in suite.rows.values()):
        return []
    points = f"{suite.thresholds.quality_points:g} points"
    return [f"Rows of one seed: no test over seeds, a margin of {points} alone, beyond the noise between rows."]


def _machine(run: Record) -> str:
    name, threads = (run["environment"].get(name) for name in _SAME_MACHINE)
    return f"{name or 'an unknown machine'}, {threads or '?'} threads"


def _speeds(row: PairedRow, finding: Finding | None) -> str:
    """Absolute, of one seed: a reader wants them, no verdict rests on them."""
    pair = next(iter(row.pairs.values()))
    before, after = (f"{speed(run):,.0f}" if speed(run) else "?" for run in pair)
    return f"{before} -> {after}"


METRICS = (
    Metric(
        "quality",
        quality,
        "{:.4g}".format,
        "{:+.2f} points".format,
        (("score", arrow("{:.4g}".format)),),
        notes=_seed_notes,
    ),
    Metric(
        "throughput",
        throughput,
        "{:.2f} x".format,
        "{:+.1%}".format,
        (("tokens/s", _speeds), ("ratio", arrow("{:.2f}".format))),
        relative=True,
        notes=_machine_notes,
    ),
)
