"""What a check found: one verdict on one metric of one row, in words and figures."""

from dataclasses import dataclass

# verdicts, the gravest first
INCOMPARABLE = "incomparable"
UNREADABLE = "unreadable"
FAILED = "failed"
OUT_OF_MEMORY = "out_of_memory"
DIVERGED = "diverged"
REGRESSION = "regression"
MISSING = "missing"
INCONCLUSIVE = "inconclusive"
UNKNOWN = "unknown"  # a figure isn't there, or has nothing to be compared with
NEW = "new"
IMPROVED = "improved"
UNJUDGED = "unjudged"  # a figure that tells nothing, and hardly changed
FINE = "fine"
VERDICTS = (
    *(INCOMPARABLE, UNREADABLE, FAILED, OUT_OF_MEMORY, DIVERGED, REGRESSION, MISSING),
    *(INCONCLUSIVE, UNKNOWN, NEW, IMPROVED, UNJUDGED, FINE),
)
QUIET = (UNJUDGED, FINE)  # not worth a look

# exit codes, of several the first
CODES = {
    3: (INCOMPARABLE, UNREADABLE),
    4: (FAILED, OUT_OF_MEMORY, DIVERGED),
    1: (REGRESSION, MISSING),
}


@dataclass(frozen=True)
class Finding:
    """A verdict. `task`, `method` and `model` are empty where it is about several rows.

    `before`, `after` and `change` are figures of the metric, raw: `METRICS` of `check` say in which units.
    """

    metric: str
    verdict: str
    reason: str
    task: str = ""
    method: str = ""
    model: str = ""
    seeds: tuple[int, ...] = ()
    before: float | None = None
    after: float | None = None
    change: float | None = None
    p: float | None = None
    fatal: bool = True  # False: a missing run that is only to be reported


def exit_code(findings: list[Finding]) -> int:
    """0 if nothing is wrong, else 3 (not comparable), 4 (a run failed) or 1 (a regression), the first that applies."""
    grave = {finding.verdict for finding in findings if finding.fatal}
    return next((code for code, verdicts in CODES.items() if grave & set(verdicts)), 0)
