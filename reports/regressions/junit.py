"""A check as JUnit XML, the form that CI systems show: a suite for each metric, a case for each row."""

import re
import xml.etree.ElementTree as ET

from reports.regressions import findings
from reports.regressions.check import METRICS, Check
from reports.regressions.findings import Finding

_FAILURES = (findings.REGRESSION, findings.MISSING)
_ERRORS = (*findings.CODES[3], *findings.CODES[4])
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(check: Check) -> str:
    """The XML text."""
    root = ET.Element("testsuites", {"name": "membench check", **_totals(check.findings)})
    for metric in METRICS:
        found = [finding for finding in check.findings if finding.metric == metric]
        if found:
            suite = ET.SubElement(root, "testsuite", {"name": metric, **_totals(found)})
            for finding in found:
                _add_case(suite, finding)
    if check.notes:
        ET.SubElement(root[-1], "system-out").text = _text("\n".join(check.notes))
    ET.indent(root, " ")
    return ET.tostring(root, encoding="unicode", xml_declaration=False)


def _totals(found: list[Finding]) -> dict[str, str]:
    kinds = [_kind(finding) for finding in found]
    counts = {"tests": len(found), **{f"{kind}s": kinds.count(kind) for kind in ("failure", "error")}}
    return {name: str(count) for name, count in (counts | {"skipped": kinds.count("skipped")}).items()} | {"time": "0"}


def _kind(finding: Finding) -> str:
    if finding.verdict in _ERRORS:
        return "error"
    if finding.verdict in _FAILURES and finding.fatal:
        return "failure"
    return "skipped" if finding.verdict in (findings.UNKNOWN, findings.INCONCLUSIVE, findings.UNJUDGED) else ""


def _add_case(suite: ET.Element, finding: Finding) -> None:
    what = " ".join(filter(None, (finding.task, finding.method, finding.model))) or "all rows together"
    seeds = f" seeds {','.join(map(str, finding.seeds))}" if finding.seeds else ""
    case = ET.SubElement(suite, "testcase", classname=f"membench.{finding.metric}", name=_text(what + seeds), time="0")
    kind, figures = _kind(finding), ""
    if finding.before is not None:
        figures = f"baseline {finding.before:.6g}, candidate {finding.after:.6g}. "
    text = _text(figures + finding.reason)
    if kind in ("failure", "error"):
        problem = ET.SubElement(
            case, kind, type=finding.verdict, message=text.splitlines()[0] if text else finding.verdict
        )
        problem.text = text
    elif kind == "skipped":
        ET.SubElement(case, kind, message=f"{finding.verdict}: {text}")
    elif text and finding.verdict != findings.FINE:
        ET.SubElement(case, "system-out").text = f"{finding.verdict}: {text}"


def _text(text: str) -> str:
    """Without the letters that XML can't hold at all, escaped or not."""
    return _NOT_XML.sub("?", text)
