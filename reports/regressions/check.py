"""A whole check: pair the records, look at every metric, and sum up."""

from collections.abc import Collection
from dataclasses import dataclass

from reports.record import Found
from reports.regressions import exact, findings, uncertain
from reports.regressions.exact import References, place
from reports.regressions.findings import METRICS, Finding, exit_code
from reports.regressions.pairing import Row, RowKey, changed_hyperparameters, pair
from reports.regressions.thresholds import Thresholds


@dataclass(frozen=True)
class Check:
    """What came of a check: findings, the gravest first, and what a reader should know beside them."""

    findings: list[Finding]
    rows: dict[RowKey, Row]
    notes: list[str]
    counts: tuple[int, int]  # runs of the baseline and of the candidate
    thresholds: Thresholds

    @property
    def code(self) -> int:
        """0: fine; 1: a regression; 3: not comparable; 4: a run failed."""
        return exit_code(self.findings)


def check(baseline: Found, candidate: Found, thresholds: Thresholds, metrics: Collection[str] = METRICS) -> Check:
    """Compare two sets of records, in `metrics` alone; how runs ended is always looked at."""
    rows = pair(baseline.records, candidate.records)
    references = _references(rows, thresholds.reference)
    found = [Finding("runs", findings.UNREADABLE, text) for text in (*baseline.problems, *candidate.problems)]
    if not any(row.pairs or row.refused for row in rows.values()):
        found.append(Finding("runs", findings.INCOMPARABLE, "the two have no run in common"))
    for key, row in rows.items():
        found += exact.runs(key, row, thresholds)
        found += exact.memory(key, row, thresholds) if "memory" in metrics else []
        if "saving" in metrics and not _is_reference(row, thresholds.reference):
            found += exact.saving(key, row, references, thresholds)
    others = {key: row for key, row in rows.items() if not _is_reference(row, thresholds.reference)}
    found += uncertain.quality(rows, thresholds) if "quality" in metrics else []
    found += uncertain.throughput(others, references, thresholds) if "throughput" in metrics else []
    found.sort(key=lambda finding: findings.VERDICTS.index(finding.verdict))
    counts = (len(baseline.records), len(candidate.records))
    return Check(found, rows, _notes(rows, references, thresholds, metrics), counts, thresholds)


def _is_reference(row: Row, reference: str) -> bool:
    runs = [run for pair in row.pairs.values() for run in pair]
    return bool(runs) and runs[0]["method"] == reference


def _references(rows: dict[RowKey, Row], name: str) -> References:
    return {place(pair): pair for row in rows.values() if _is_reference(row, name) for pair in row.pairs.values()}


def _notes(
    rows: dict[RowKey, Row], references: References, thresholds: Thresholds, metrics: Collection[str]
) -> list[str]:
    notes = []
    name = thresholds.reference
    relative = [metric for metric in ("saving", "throughput") if metric in metrics]
    others = [pair for row in rows.values() if not _is_reference(row, name) for pair in row.pairs.values()]
    alone = [pair for pair in others if place(pair) not in references]
    if relative and alone:
        what = " and ".join(relative)
        notes.append(f"No run of {name} to compare with beside {len(alone)} runs: {what} of these isn't checked.")
    pairs = [pair for row in rows.values() for pair in row.pairs.values()]
    if "throughput" in metrics and (machines := uncertain.other_machines(pairs)):
        notes.append(f"Speeds are from other machines ({' -> '.join(machines)}): shown, not checked.")
    if "quality" in metrics and any(len(row.pairs) == 1 for row in rows.values()):
        points = f"{thresholds.quality_points:g} points"
        notes.append(
            f"Rows of one seed: no test over seeds, a margin of {points} alone, beyond the noise between rows."
        )
    return notes + _changed_hyperparameters(rows)


def _changed_hyperparameters(rows: dict[RowKey, Row]) -> list[str]:
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
