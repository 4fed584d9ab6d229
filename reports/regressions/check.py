"""A whole check: pair the records, look at every metric, and sum up."""

from collections.abc import Collection
from dataclasses import dataclass

from reports.names import counted
from reports.record import Found
from reports.regressions import exact, findings, quality, throughput
from reports.regressions.findings import Finding, exit_code
from reports.regressions.metric import Metric, Suite, is_reference
from reports.regressions.pairing import Pair, PairedRow, RowKey, changed_hyperparameters, left_out, pair, place
from reports.regressions.thresholds import Thresholds


@dataclass(frozen=True)
class Check:
    """What came of a check: findings, the gravest first, and what a reader should know beside them."""

    findings: list[Finding]
    rows: dict[RowKey, PairedRow]
    notes: list[str]
    counts: tuple[int, int]  # runs of the baseline and of the candidate
    thresholds: Thresholds

    @property
    def regressions(self) -> list[Finding]:
        """The findings that fail the check: regressions, missing and failed runs, what can't be compared."""
        return [finding for finding in self.findings if exit_code([finding])]

    @property
    def code(self) -> int:
        """0: fine; 1: a regression; 3: not comparable; 4: a run failed."""
        return exit_code(self.findings)


METRICS = {metric.name: metric for metric in (*exact.METRICS, quality.METRIC, throughput.METRIC)}
ALWAYS = "runs"  # how runs ended is looked at whatever is asked for


def check(
    baseline: Found, candidate: Found, thresholds: Thresholds, metrics: Collection[str] = tuple(METRICS)
) -> Check:
    """Compare two sets of records, in `metrics` alone; how runs ended is always looked at."""
    rows = pair(baseline.records, candidate.records)
    suite = Suite(rows, _references(rows, thresholds.reference), thresholds)
    found = [Finding("runs", findings.UNREADABLE, text) for text in (*baseline.problems, *candidate.problems)]
    if not any(row.pairs or row.refused for row in rows.values()):
        found.append(Finding("runs", findings.INCOMPARABLE, "the two have no run in common"))
    wanted = [metric for name, metric in METRICS.items() if name in (ALWAYS, *metrics)]
    found += [finding for metric in wanted for finding in metric.judge(suite)]
    found.sort(key=lambda finding: findings.VERDICTS.index(finding.verdict))
    counts = (len(baseline.records), len(candidate.records))
    notes = [*_notes(suite, wanted), *_left_out(baseline, candidate)]
    return Check(found, rows, notes, counts, thresholds)


def _left_out(baseline: Found, candidate: Found) -> list[str]:
    sides = {"baseline": left_out(baseline.records), "candidate": left_out(candidate.records)}
    told = " and ".join(f"{count} of the {side}" for side, count in sides.items() if count)
    return [f"Older runs of the same configuration are left out: {told}."] if told else []


def _references(rows: dict[RowKey, PairedRow], name: str) -> dict[str, Pair]:
    return {place(pair): pair for row in rows.values() if is_reference(row, name) for pair in row.pairs.values()}


def _notes(suite: Suite, metrics: list[Metric]) -> list[str]:
    relative = [metric.name for metric in metrics if metric.relative]
    others = [pair for row in suite.others.values() for pair in row.pairs.values()]
    alone = [pair for pair in others if place(pair) not in suite.references]
    unmatched = [pair for pair in others if _lacks_only_the_reference(pair, suite.references.get(place(pair)))]
    name, what = suite.thresholds.reference, " and ".join(relative)
    whys = ((alone, f"No run of {name} to compare with"), (unmatched, f"{name} didn't end well on both sides"))
    notes = [
        f"{why} beside {counted(len(pairs), 'run')}: no check of {what} there."
        for pairs, why in whys
        if relative and pairs
    ]
    notes += [
        f"{what} are relative to {chosen}, the last of {name}'s configurations."
        for chosen in _chosen(suite)
        if relative
    ]
    notes += [note for metric in metrics for note in metric.notes(suite)]
    return notes + _changed_hyperparameters(suite.rows)


def _chosen(suite: Suite) -> list[str]:
    """The reference's rows that other runs are compared with though there are more of the same place."""
    rows: dict[str, list[str]] = {}
    for key, row in suite.rows.items():
        for both in row.pairs.values() if is_reference(row, suite.thresholds.reference) else ():
            rows.setdefault(place(both), []).append(key.method)
    used = {place(pair) for row in suite.others.values() for pair in row.pairs.values()}
    return list(dict.fromkeys(names[-1] for where, names in rows.items() if len(names) > 1 and where in used))


def _lacks_only_the_reference(pair: Pair, reference: Pair | None) -> bool:
    """Whether both runs ended well, and the reference's beside them didn't, as where a full AdamW doesn't fit."""
    return reference is not None and _ended_well(pair) and not _ended_well(reference)


def _ended_well(pair: Pair) -> bool:
    return all(run["status"] == "ok" for run in pair)


def _changed_hyperparameters(rows: dict[RowKey, PairedRow]) -> list[str]:
    """One note for each change that a method's rows have in common."""
    tasks: dict[tuple[str, str], dict[str, None]] = {}
    for key, row in rows.items():
        for both in row.pairs.values():
            for change in changed_hyperparameters(*both):
                tasks.setdefault((key.method, change), {})[key.task] = None
    return [
        f"{method}: {change} on {', '.join(where) if len(where) < 3 else f'{len(where)} tasks'}; compared all the same."
        for (method, change), where in tasks.items()
    ]
