"""Checks of what is exact: how runs ended, peak memory, and what a method saves against the reference."""

from collections.abc import Iterator
from fractions import Fraction

from reports.parts import PARTS
from reports.record import Record, how_it_ended
from reports.regressions import findings
from reports.regressions.findings import Finding
from reports.regressions.metric import Metric, Suite, arrow
from reports.regressions.pairing import PairedRow, RowKey, place
from reports.regressions.thresholds import Thresholds
from reports.table import mib


def runs(suite: Suite) -> Iterator[Finding]:
    """Runs that have no counterpart, can't be compared, or didn't end well."""
    for key, row in suite.rows.items():
        yield from _runs(key, row, suite.thresholds)


def _runs(key: RowKey, row: PairedRow, thresholds: Thresholds) -> Iterator[Finding]:
    verdicts: dict[tuple[str, str], list[int]] = {}
    for seed, verdict, reason in _each_run(row):
        verdicts.setdefault((verdict, reason), []).append(seed)
    for (verdict, reason), seeds in verdicts.items():
        fatal = verdict != findings.MISSING or thresholds.missing == "fail"
        yield Finding("runs", verdict, reason, *key, tuple(sorted(seeds)), fatal=fatal)


def _each_run(row: PairedRow) -> Iterator[tuple[int, str, str]]:
    for seed, differences in row.refused.items():
        yield seed, findings.INCOMPARABLE, "; ".join(differences)
    for seed in row.missing:
        yield seed, findings.MISSING, "only the baseline has it"
    for seed, run in row.new.items():
        ok = run["status"] == "ok"
        yield seed, *((findings.NEW, "the baseline lacks it") if ok else (run["status"], f"new: {run['error']}"))
    for seed, (old, new) in row.pairs.items():
        yield seed, *_ended(old, new)


def _ended(old: Record, new: Record) -> tuple[str, str]:
    if new["status"] == "ok":
        return (findings.FINE, "") if old["status"] == "ok" else (findings.IMPROVED, f"{_words(old)} in the baseline")
    if how_it_ended(new) == how_it_ended(old) != "failed":  # known: running out of memory is a result, as is a refusal
        return findings.FINE, f"{_words(new)}, as in the baseline"
    return new["status"], new["error"]


def _words(run: Record) -> str:
    return how_it_ended(run).replace("_", " ")


def peak(run: Record) -> int:
    """Bytes; 0 is unknown."""
    return (run["memory"] or {}).get("peak_allocated_bytes") or 0


def memory(suite: Suite) -> Iterator[Finding]:
    """Peak memory of each row, in the seed in which it changed most for the worse; bytes, and a share of them."""
    for key, row in suite.rows.items():
        yield from _memory(key, row, suite.thresholds)


def _memory(key: RowKey, row: PairedRow, thresholds: Thresholds) -> Iterator[Finding]:
    known = [
        (Fraction(peak(new), peak(old)) - 1, seed) for seed, (old, new) in row.pairs.items() if peak(old) and peak(new)
    ]
    if not known:
        if row.pairs and any(new["status"] == "ok" for _, new in row.pairs.values()):
            yield Finding("memory", findings.UNKNOWN, "a peak of 0 or none is unknown", *key)
        return
    change, seed = max(known)
    least, least_seed = min(known)
    tolerance = _exactly(thresholds.memory_percent) / 100
    if change <= tolerance and least < -tolerance:
        change, seed = least, least_seed
    old, new = row.pairs[seed]
    verdict = _verdict(change, tolerance)
    reason = "" if old == new or not change else _moved(old, new)
    seeds = tuple(sorted(seed for _, seed in known))
    yield Finding("memory", verdict, reason, *key, seeds, peak(old), peak(new), float(change))


def _exactly(limit: float) -> Fraction:
    """A limit as it was written: a rise of exactly 1 % isn't beyond 1 %, whatever floating point makes of it."""
    return Fraction(str(limit))


def _verdict(rise: Fraction, tolerance: Fraction) -> str:
    if rise > tolerance:
        return findings.REGRESSION
    return findings.IMPROVED if rise < -tolerance else findings.FINE


def _moved(old: Record, new: Record) -> str:
    """Which parts of the peak changed, the largest change first; "" where a run doesn't say."""
    sides = [run["memory"]["at_peak"] for run in (new, old)]
    if None in sides:
        return ""
    parts = [(part.of(sides[0]) - part.of(sides[1]), part.words) for part in PARTS]
    told = sorted((part for part in parts if part[0]), key=lambda part: -abs(part[0]))
    return ", ".join(f"{name} {'+' if size > 0 else '-'}{mib(abs(size))} MiB" for size, name in told)


def saving(suite: Suite) -> Iterator[Finding]:
    """What each method saves of the reference's peak, a share averaged over the seeds that both have."""
    for key, row in suite.others.items():
        yield from _saving(key, row, suite)


def _saving(key: RowKey, row: PairedRow, suite: Suite) -> Iterator[Finding]:
    thresholds = suite.thresholds
    shares: dict[int, tuple[Fraction, ...]] = {}  # by seed, of baseline and candidate
    for seed, pair in row.pairs.items():
        reference = suite.references.get(place(pair))
        if reference and all(map(peak, (*pair, *reference))):
            shares[seed] = tuple(
                1 - Fraction(peak(run), peak(other)) for run, other in zip(pair, reference, strict=True)
            )
    if not shares:
        return
    before, after = (sum(side) / len(shares) for side in zip(*shares.values(), strict=True))
    verdict = _verdict(before - after, _exactly(thresholds.saving_points) / 100)
    figures = float(before), float(after), float(after - before)
    reason = f"saved {figures[0]:.1%} of {thresholds.reference}'s peak, now {_now(figures[1])}" if figures[2] else ""
    yield Finding("saving", verdict, reason, *key, tuple(sorted(shares)), *figures)


def _now(share: float) -> str:
    return f"{share:.1%}" if share > 0 else "nothing" if share == 0 else f"nothing: it needs {-share:.1%} more"


METRICS = (
    Metric("runs", runs),
    Metric("memory", memory, lambda size: f"{mib(size)} MiB", "{:+.2%}".format, (("peak MiB", arrow(mib)),)),
    Metric(
        "saving",
        saving,
        "{:.1%}".format,
        lambda share: f"{100 * share:+.1f} points",
        (("saving", arrow("{:.1%}".format)),),
        relative=True,
    ),
)
