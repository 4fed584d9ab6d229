"""Whatever a command is given: it is done, or refused in one sentence; no traceback, no hang, nothing is lost."""

import signal
from contextlib import contextmanager
from random import Random

import pytest
from fuzz_commands import odd_arguments, odd_records, odd_thresholds, odd_toml
from reports_factory import make_record
from test_cli import call

from reports import record

QUICK = {"arguments": 30, "toml": 30, "records": 20}  # what a fast test tries; the slow one tries the rest of 500
MOST_SECONDS, LONGEST_SENTENCE = 60, 2000


@contextmanager
def within_a_minute():
    """An interrupt where something hangs."""

    def stop(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expect_done_or_refused(arguments, *codes):
    """The exit code: one of `codes`, or 2 with a sentence (click's own may have lines of usage above it)."""
    with within_a_minute():
        code, _, errors = call(*arguments)
    shown = (arguments, code, errors[-3000:])
    assert code in (*codes, 2), shown
    assert "Traceback" not in errors and "fault of membench" not in errors, shown
    if code == 2:
        ours = errors.startswith("error: ") and errors.count("\n") == 1 and len(errors) < LONGEST_SENTENCE
        assert ours or "Error: " in errors, shown
    return code


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "runs"
    for method in ("adamw", "badam"):
        record.write(make_record(method=method), folder)
    return folder


def try_arguments(number, runs, tmp_path):
    expect_done_or_refused(odd_arguments(runs, Random(f"arguments {number}")), 0, 1, 3)


def try_toml(number, runs, tmp_path):
    random = Random(f"toml {number}")
    path = odd_toml(tmp_path / "file.toml", random)
    line = random.choice((("study", path), ("study", path), ("compare", "--config", path)))
    expect_done_or_refused((*line, "--out", str(runs), "--dry-run"), 0)
    limits = odd_thresholds(tmp_path / "limits.toml", random)
    expect_done_or_refused(("check", str(runs), str(runs), "--thresholds", limits), 0, 1)


def try_records(number, runs, tmp_path):
    random = Random(f"records {number}")
    folder = tmp_path / f"records-{number}"
    odd_records(folder, random)
    before = content(folder)
    format = random.choice(("plain", "markdown", "csv", "json", "latex"))
    ranking = random.choice(((), (), ("--at-memory", "1GiB"), ("--to-target", "accuracy=0.4")))
    code, output, errors = call("report", str(folder), "--format", format, *ranking)
    assert code in (0, 1) and "adamw" in output and "Traceback" not in errors, (number, code, errors)
    sides = random.choice(((runs, folder), (folder, runs), (folder, folder)))
    expect_done_or_refused(("check", *map(str, sides), "--format", random.choice(("terminal", "junit"))), 0, 1, 3, 4)
    assert content(folder) == before


KINDS = {"arguments": try_arguments, "toml": try_toml, "records": try_records}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of its own: what is odd may name a file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_odd_is_done_or_refused_in_a_sentence(kind, runs, elsewhere):
    finished = content(runs)
    for number in range(QUICK[kind]):
        KINDS[kind](number, runs, elsewhere)
    assert content(runs) == finished


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_so_are_five_hundred_of_them(kind, runs, elsewhere):
    finished = content(runs)
    for number in range(QUICK[kind], 500):
        KINDS[kind](number, runs, elsewhere)
    assert content(runs) == finished
