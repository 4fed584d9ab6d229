"""The check of scores: the headline of each row, of all rows together and of each method's."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

from scipy.special import bdtrc

from reports.names import counted
from reports.regressions import findings
from reports.regressions.evidence import SHARES, Judgement, Row, judge, sharing_seeds, together
from reports.regressions.findings import Finding
from reports.regressions.measured import VERDICTS, Measured, finding, p_words, why
from reports.regressions.metric import Metric, Suite, arrow
from reports.regressions.noise import Noise, noises, of_examples
from reports.regressions.pairing import Pair, PairedRow, RowKey
from reports.setups import score
from reports.statistics import point

_SHARES_OF_EXAMPLES = ("accuracy", "exact_match", "em")  # of other scores an example's part is between 0 and 1 at most
_PRESUMED = 50  # examples, at least, where a record doesn't say: the smallest task of SuperGLUE has 56
_OF_SEEDS = 2.0  # points, by which a score was seen to scatter with its seed beside what its examples explain
_STRIKING = 0.05  # a sign test below it is worth saying, though a single seed proves nothing
_UNKNOWN = "a score without bounds"
_LARGEST_LOGARITHM = 700.0  # of a float, about


def quality(suite: Suite) -> Iterator[Finding]:
    """Figures are as the task scores, changes in points: less than 0 is worse."""
    limits = suite.thresholds
    margin, points = limits.quality_points, f"{limits.quality_points:g} points"
    measured, rows = _measured(suite)
    for key, judged in judge(rows, margin, limits.false_alarms * SHARES["rows"], lambda key: key.task).items():
        reason = why(judged, points, _one_seed(suite.rows[key]), _UNKNOWN)
        found = finding("quality", key, measured[key], judged, _change(measured[key], suite.rows[key], judged), reason)
        exploded = _exploded(measured[key], suite.rows[key], limits.explosion_times)
        yield replace(found, verdict=findings.REGRESSION, reason=exploded) if exploded else found
    yield from _together(rows, limits.false_alarms)


def _measured(suite: Suite) -> tuple[dict[RowKey, Measured], dict[RowKey, Row]]:
    """The scores of each row that has any, and what it is judged by."""
    measured = {key: found for key, row in suite.rows.items() if (found := _scores(row))}
    return measured, {key: _row(found, suite.rows[key]) for key, found in measured.items()}


def _one_seed(row: PairedRow) -> str:
    examples = _examples(row)
    return f"one seed of {examples} examples" if examples else f"one seed, presumably of {_PRESUMED} examples or more"


def _scores(row: PairedRow) -> Measured | None:
    ok = _ok(row)
    if not ok:
        return None
    found = Measured()
    values = {seed: [score(run) for run in pair] for seed, pair in ok.items()}
    everything = [value for both in values.values() for value in both]
    unit, higher, ratios = point(everything), _more_is_better(row), _have_ratios(everything)
    for seed, (old, new) in values.items():
        less = 100 * (math.log(old) - math.log(new) if ratios else (old - new) / (abs(old) or 1))
        found.add(seed, old, new, (new - old) / unit if higher else less)
    return found


def _more_is_better(row: PairedRow) -> bool:
    return bool(next(iter(_ok(row).values()))[0]["higher_is_better"])


def _have_ratios(scores: Iterable[float]) -> bool:
    """Scores of which less is better are compared by the logarithm of their ratio.

    In percent, seeds that all exploded (10 to 300, to 1000) would scatter so much that no test calls them worse.
    """
    return all(score > 0 for score in scores)


def _change(found: Measured, row: PairedRow, judged: Judgement) -> float:
    """The mean change in points; where less is better in percent, not its logarithm."""
    if _more_is_better(row) or not _have_ratios([*found.before.values(), *found.after.values()]):
        return judged.mean
    return -100 * math.expm1(min(-judged.mean / 100, _LARGEST_LOGARITHM))


def _exploded(found: Measured, row: PairedRow, times: float) -> str:
    """Which seeds are so many times worse that none needs a test, which can't show one of three; "" if none is."""
    worst = max(found.before.values())
    seeds = [seed for seed, score in found.after.items() if score > times * worst > 0]
    if _more_is_better(row) or not seeds:
        return ""
    told = ", ".join(f"{found.before[seed]:.4g} -> {found.after[seed]:.4g} in seed {seed}" for seed in seeds)
    return f"exploded: {told}; more than {times:g} times the baseline's worst"


def _ok(row: PairedRow) -> dict[int, Pair]:
    return {seed: pair for seed, pair in sorted(row.pairs.items()) if all(run["status"] == "ok" for run in pair)}


def _examples(row: PairedRow) -> int | None:
    """How many were scored in every run; None if any record doesn't say."""
    counts = [run.get("validation_examples") or 0 for pair in _ok(row).values() for run in pair]
    return min(counts) or None


def _row(found: Measured, row: PairedRow) -> Row:
    run = next(iter(_ok(row).values()))[0]
    scores = sorted({*found.before.values(), *found.after.values()})
    within = _more_is_better(row) and scores[0] >= 0 and scores[-1] <= 1
    examples, unit = _examples(row), point(scores)
    gaps = [(after - before) / unit for before, after in pairwise(scores)]
    most = 100 / (examples or _PRESUMED)  # points, of an example
    step = most if within and examples else min([*gaps, most])
    floor = step**2 / 6  # of a difference between two rounded scores
    if not within:
        return Row(found.differences, floor=floor if _more_is_better(row) else 0.0)
    scored = examples or (_PRESUMED if len(found.differences) == 1 else None)
    return Row(found.differences, _bound(found, scored, run["headline"]) if scored else None, floor)


def _bound(found: Measured, examples: int, headline: str) -> Noise:
    """Of the row's least certain seed: of its examples, and of the seed itself, on both sides."""
    both = zip(found.before.values(), found.after.values(), strict=True)
    is_share = headline in _SHARES_OF_EXAMPLES
    least = max(of_examples(*pair, examples, is_share=is_share).variance for pair in both)
    return Noise(least + 2 * _OF_SEEDS**2)


def _together(rows: dict[RowKey, Row], alpha: float) -> Iterator[Finding]:
    """All rows (under an empty name) and, if there are several methods, each one's."""
    if len(rows) < 2:
        return
    methods = dict.fromkeys(key.method for key in rows)
    by_method = {method: [row for key, row in rows.items() if key.method == method] for method in methods}
    families = {"all": {"": list(rows.values())}, "methods": by_method if len(methods) > 1 else {}}
    for name, groups in families.items():
        shared = {who: sharing_seeds(several) for who, several in groups.items()}
        merged = {who: row for who, several in shared.items() if len(several) > 1 and (row := together(several))}
        for who, judged in judge(merged, 0, alpha * SHARES[name]).items():
            yield _group_finding(who, shared[who], judged, len(groups[who]) - len(shared[who]))


def _group_finding(method: str, rows: list[Row], judged: Judgement, apart: int) -> Finding:
    worse, better = (sum(sign * row.mean < 0 for row in rows) for sign in (1, -1))
    text = f"{worse} of {len(rows)} rows{f' of {method}' if method else ''} are worse, {better} better; "
    text += f"{judged.mean:+.2f} points on average; "
    text += f"without {counted(apart, 'row')} of other seeds; " if apart else ""
    verdict = VERDICTS.get(judged.verdict, findings.FINE)
    if judged.seeds == 1:
        text += "one seed, whose noise all rows may share" + (f": {p_words(judged, 'methods')}" if judged.p else "")
        striking = min(_sign_test(worse, better), _sign_test(better, worse)) < _STRIKING
        verdict = findings.INCONCLUSIVE if striking and verdict == findings.FINE else verdict
    else:
        text += f"t-test over {judged.seeds} seeds: {p_words(judged, 'methods')}"
    return Finding("quality", verdict, text, method=method, change=judged.mean, p=judged.p)


def _sign_test(these: int, those: int) -> float:
    """That as many of all or more are on this side by chance."""
    return float(bdtrc(these - 1, these + those, 0.5)) if these else 1.0


def _notes(suite: Suite) -> list[str]:
    return _bounded_notes(suite) + _unbounded_notes(suite)


def _unbounded_notes(suite: Suite) -> list[str]:
    """That a row of one seed passes whatever became of it, if neither bounds nor other rows tell its noise."""
    _, rows = _measured(suite)
    noise = noises({key: row.differences for key, row in rows.items()}, lambda key: key.task)
    unknown = [key for key, row in rows.items() if row.bound is None and noise[key] is None]
    if not unknown:
        return []
    less = not all(_more_is_better(suite.rows[key]) for key in unknown)
    times = f", unless it is {suite.thresholds.explosion_times:g} times the baseline's" if less else ""
    return [
        f"One seed alone of {counted(len(unknown), 'row')} whose scores have no bounds: nothing tells their noise, so "
        f"that no change of them is called a regression{times}. Give three seeds."
    ]


def _bounded_notes(suite: Suite) -> list[str]:
    alone = [row for row in suite.rows.values() if len(_ok(row)) == 1]
    alone = [row for row in alone if (found := _scores(row)) and _row(found, row).bound]
    if not alone:
        return []
    unknown = sum(_examples(row) is None for row in alone)
    presumed = f" (of {unknown}, whose records have no such number, of {_PRESUMED})" if unknown else ""
    return [
        f"One seed alone of {counted(len(alone), 'row')}: the noise of such scores is taken for that of as many "
        f"examples{presumed} and of a seed, by which they scatter by {_OF_SEEDS:g} points at most as a rule. Several "
        "seeds tell more, and smaller changes."
    ]


METRIC = Metric(
    "quality",
    quality,
    "{:.4g}".format,
    "{:+.2f} points".format,
    (("score", arrow("{:.4g}".format)),),
    notes=_notes,
)
