"""A check as people, pull requests, CI systems and programs read it, and the command that prints it."""

import json
import os
import re
import sys
from pathlib import Path

import junitparser
import pytest
from reports_factory import make_failure, make_record
from suites import check, run

from membench.cli import main
from membench.runs.run_folder import Folder
from reports import record
from reports.regressions import render

NAMES = ("main", "pull request")
FINDINGS = (
    [run(score=0.8), run(method="badam", peak=91), run(method="lora")],
    [run(score=0.45), run(method="badam", peak=100), run(method="lisa"), make_failure("failed", "Boom.", method="hft")],
)


def call(capsys, *arguments):
    """The command in this process: exit code, stdout, stderr."""
    path, argv = list(sys.path), sys.argv
    sys.argv = ["membench", "check", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as exit:
            main()
    finally:
        sys.path[:], sys.argv = path, argv
    return exit.value.code or 0, *capsys.readouterr()


def folder(path, *records):
    for made in records:
        record.write(make_record(**{**made, "run_id": f"{made['method']}-{made['seed']}-{made['task'][-2:]}"}), path)
    return path


@pytest.fixture
def two(tmp_path):
    same = [run(), run(method="badam", peak=91)]
    return folder(tmp_path / "baseline", *same), folder(tmp_path / "candidate", *same)


# What is printed


def test_the_speeds_of_a_row_are_those_of_all_its_seeds_together_as_in_a_report():
    """Not of the seed that was read first: beside a ratio of all of them, that is a contradiction."""
    side = [run(seed=seed, speed=speed) for seed, speed in enumerate((1000, 4000))]
    for one, seconds in zip(side, (30, 10), strict=True):
        one["time"]["train_seconds"] = seconds
    text = render.render(check(side, side[::-1]), "terminal", NAMES)
    assert "1,750 -> 1,750" in text  # 1000 x 30 and 4000 x 10 tokens in 40 s


def test_the_terminal_says_the_verdict_first_and_names_what_to_look_at():
    lines = render.render(check(*FINDINGS), "terminal", NAMES).splitlines()
    assert lines[0].startswith("A RUN FAILED (1 failed, ")
    assert lines[1] == "baseline: main, 3 runs; candidate: pull request, 4 runs"
    told = [line for line in lines if re.match(r"(regression|failed|missing|new) ", line)]
    assert [line.split()[0] for line in told] == ["failed", "regression", "regression", "regression", "missing", "new"]
    assert "Boom." in told[0]
    (badam,) = [line for line in told if "badam" in line and "memory" in line]
    assert re.search(r"91.0 MiB +100.0 MiB +\+9.89%", badam)


def test_absolute_speeds_are_shown():
    text = render.render(check([run(speed=9000)], [run(speed=4000)]), "terminal", NAMES)
    assert "9,000 -> 4,000" in text and text.startswith("Fine: no regression")


def test_markdown_has_tables_that_render_and_names_that_stay_text():
    hostile = run(method="<script>|`x`\n\x1b[31m", peak=200)
    text = render.render(check([{**hostile, "memory": run()["memory"]}], [hostile]), "markdown", NAMES)
    assert "<script>" not in text and "\x1b" not in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
        assert re.fullmatch(r"[|:-]+", table[1])


def test_a_terminal_gets_no_codes_from_names():
    text = render.render(check([run(method="a\x1b[2J")], [run(method="a\x1b[2J", peak=200)]), "terminal", NAMES)
    assert "\x1b" not in text


def test_junit_is_read_back_by_junitparser_with_every_verdict():
    result = check(*FINDINGS)
    suites = junitparser.JUnitXml.fromstring(render.render(result, "junit", NAMES))
    assert [suite.name for suite in suites] == ["runs", "memory", "saving", "quality", "throughput"]
    assert sum(suite.tests for suite in suites) == suites.tests == len(result.findings)
    verdicts = [case.result[0].type for suite in suites for case in suite if case.is_failure or case.is_error]
    assert sorted(verdicts) == ["failed", "missing", "regression", "regression", "regression"]
    assert (suites.failures, suites.errors) == (4, 1)


def test_junit_holds_any_text():
    bad = make_failure("failed", "\x00 <b> & \ud800 \x1b", method="badam")
    text = render.render(check([run(), run(method="x")], [run(), bad]), "junit", NAMES)
    (case,) = [case for suite in junitparser.JUnitXml.fromstring(text) for case in suite if case.is_error]
    assert "<b> &" in case.result[0].message


def test_json_has_findings_thresholds_and_the_figures_of_each_seed():
    document = json.loads(render.render(check(*FINDINGS), "json", NAMES))
    assert document["exit_code"] == 4 and document["thresholds"]["memory_percent"] == 1.0
    (row,) = [row for row in document["rows"] if row["method"] == "badam"]
    assert row["seeds"]["0"]["candidate"]["peak_allocated_bytes"] == 100 << 20
    assert {"metric", "verdict", "reason", "before", "after", "change"} <= set(document["findings"][0])


def test_of_many_rows_only_those_with_something_to_say_are_listed():
    before = [run(task=number) for number in range(200)]
    after = [run(task=number, peak=150 if number == 7 else 100) for number in range(200)]
    text = render.render(check(before, after), "terminal", NAMES)
    assert len(text.splitlines()) < 40 and "of 200 rows" in text


# The command


def test_the_same_runs_are_fine(capsys, two):
    code, stdout, stderr = call(capsys, *two)
    assert (code, stderr) == (0, "") and stdout.startswith("Fine")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"peak": 100}, 1),
        ({"training__steps": 9}, 3),
        ({"status": "failed", "error": "Boom."}, 4),
    ],
)
def test_exit_codes_say_what_is_wrong(capsys, two, changes, code):
    folder(two[1], run(method="badam", **{"peak": 91, **changes}))
    assert call(capsys, *two)[0] == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "juint"], "--format juint: there is no such format. Did you mean 'junit'?"),
        (["--only", "memroy"], "--only memroy: there is no such check. Did you mean 'memory'?"),
        (["--only", ","], "--only is empty"),
        (["--thresholds", "nowhere.toml"], "nowhere.toml: can't be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, two, arguments, words):
    code, stdout, stderr = call(capsys, *two, *arguments)
    assert (code, stdout) == (2, "") and stderr.startswith(f"error: {words}") and stderr.count("\n") == 1


def test_a_place_without_records_is_refused(capsys, two, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, words in ((tmp_path / "empty", "there are no records"), (tmp_path / "gone", "no such file or folder")):
        code, _, stderr = call(capsys, two[0], place)
        assert code == 2 and words in stderr


@pytest.mark.parametrize("content", ["", '{"schema": 1, "run_id": ', json.dumps({**make_record(), "schema": 2})])
def test_what_is_no_record_is_named_the_others_are_judged_and_the_code_is_3(capsys, two, content):
    (two[1] / "broken.json").write_text(content)
    code, stdout, _ = call(capsys, *two)
    assert code == 3 and stdout.startswith("NOT COMPARABLE (1 unreadable")
    assert "broken.json" in stdout and re.search(r"memory +2", stdout)


def test_thresholds_of_a_file_are_used_and_the_default_ones_are_printed(capsys, two, tmp_path):
    folder(two[1], run(method="badam", peak=100))
    code, stdout, _ = call(capsys, "--print-thresholds")
    assert code == 0
    limits = tmp_path / "limits.toml"
    limits.write_text(
        stdout.replace("memory_percent = 1.0", "memory_percent = 20").replace("points = 1.0", "points = 20")
    )
    assert call(capsys, *two)[0] == 1
    assert call(capsys, *two, "--thresholds", limits)[0] == 0


def test_only_some_checks_are_made(capsys, two):
    folder(two[1], run(method="badam", peak=91, score=0.1))
    assert call(capsys, *two)[0] == 1
    assert call(capsys, *two, "--only", "memory,saving")[0] == 0


# Accepting a candidate


def test_update_makes_the_candidate_the_baseline_and_leaves_other_files(capsys, two):
    folder(two[1], run(method="badam", peak=100), run(method="lisa"))
    folder(two[0], run(method="lora"))
    (two[0] / "README").write_text("ours")
    (two[0] / "logs").mkdir()
    (two[0] / "logs" / "x.json").write_text("{}")
    code, stdout, stderr = call(capsys, *two, "--update")
    assert code == 0 and stdout.startswith("REGRESSION") and "updated, 3 runs" in stderr
    assert record.load_folder(two[0]) == record.load_folder(two[1])
    assert (two[0] / "README").read_text() == "ours" and (two[0] / "logs" / "x.json").exists()
    assert sorted(os.listdir(two[0].parent)) == ["baseline", "candidate"]  # nothing is left behind
    assert call(capsys, *two)[0] == 0


def test_update_keeps_links_as_they_are_wherever_they_lead(capsys, two):
    """A link to the folder itself was followed without end, and one to another place became a copy of it."""
    for name, target in {"latest": ".", "gone": "/nowhere", "round": "round", "README": "/etc/hostname"}.items():
        (two[0] / name).symlink_to(target)
    assert call(capsys, *two, "--update")[0] == 0
    links = {path.name: os.readlink(path) for path in two[0].iterdir() if path.is_symlink()}
    assert links == {"latest": ".", "gone": "/nowhere", "round": "round", "README": "/etc/hostname"}
    assert record.load_folder(two[0]) == record.load_folder(two[1])


def test_update_names_what_cannot_be_copied_and_leaves_the_baseline(capsys, two):
    before = record.load_folder(two[0])
    os.mkfifo(two[0] / "pipe")
    folder(two[1], run(method="badam", peak=100))
    code, _, stderr = call(capsys, *two, "--update")
    assert code == 2 and f"{two[0] / 'pipe'} can't be copied into the new baseline" in stderr
    assert record.load_folder(two[0]) == before and not list(two[0].parent.glob(".*"))


def test_update_loses_no_record_to_another_of_its_name(capsys, two, tmp_path):
    several = tmp_path / "several.json"
    several.write_text(json.dumps([run(run_id="one", seed=seed) for seed in (0, 1)]))
    code, _, stderr = call(capsys, tmp_path / "new", several, "--update")
    assert code == 2 and "not updated: 2 records have the run_id 'one'" in stderr and not (tmp_path / "new").exists()
    assert call(capsys, tmp_path / "new.json", several, "--update")[0] == 0
    assert len(record.read(tmp_path / "new.json").records) == 2


@pytest.mark.parametrize("name", ["../other", "a/b", ".hidden", "", ".."])
def test_update_writes_no_record_where_nobody_looks_for_it(capsys, two, tmp_path, name):
    (tmp_path / "odd.json").write_text(json.dumps([run(run_id=name)]))
    code, _, stderr = call(capsys, tmp_path / "new", tmp_path / "odd.json", "--update")
    assert code == 3 and f"'run_id' must be the name of a file, not {name!r}" in stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["new/baseline.json", "new/baseline"])
def test_update_makes_the_first_baseline_as_a_file_or_a_folder(capsys, two, tmp_path, name):
    assert call(capsys, tmp_path / name, two[1], "--update")[0] == 0
    assert record.read(tmp_path / name).records == record.load_folder(two[1])
    assert call(capsys, tmp_path / name, two[1])[0] == 0
    assert call(capsys, tmp_path / name, two[1], "--update")[0] == 0


def test_what_an_update_that_was_killed_has_left_gets_into_no_baseline(capsys, two, tmp_path):
    """In a container processes have the same numbers again and again."""
    record.write(make_record(run_id="left"), tmp_path / f".new.{os.getpid()}.tmp")
    assert call(capsys, tmp_path / "new", two[1], "--update")[0] == 0
    assert record.load_folder(tmp_path / "new") == record.load_folder(two[1])


@pytest.mark.parametrize("name", ["real.json", "real"])
def test_update_of_a_link_updates_what_it_leads_to(capsys, two, tmp_path, name):
    real, link = tmp_path / "elsewhere" / name, tmp_path / f"link{Path(name).suffix}"
    real.parent.mkdir()
    call(capsys, real, two[1], "--update")
    folder(two[1], run(method="badam", peak=100))
    link.symlink_to(real)
    assert call(capsys, link, two[1], "--update")[0] == 0
    assert link.is_symlink() and record.read(real).records == record.load_folder(two[1])
    assert os.listdir(real.parent) == [name] and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("part", ["", "-1-of-2"])
def test_update_waits_for_who_makes_runs_in_either_folder(capsys, two, number, part):
    """A record written while the folder is copied would be lost, and a candidate without its last runs isn't one."""
    before = record.load_folder(two[0])
    with Folder(two[number]).locked(part):
        code, _, stderr = call(capsys, *two, "--update")
        assert code == 2 and f"{two[number]}: process {os.getpid()} is writing there; wait for it" in stderr
        assert call(capsys, *two)[0] != 2  # to look at is free
    assert record.load_folder(two[0]) == before
    assert call(capsys, *two, "--update")[0] == 0


def test_update_accepts_nothing_that_is_not_whole(capsys, two):
    before = record.load_folder(two[0])
    (two[1] / "broken.json").write_text("{")
    code, _, stderr = call(capsys, *two, "--update")
    assert code == 3 and "not updated" in stderr and "broken.json" in stderr
    (two[1] / "broken.json").unlink()
    folder(two[1], make_failure("failed", "Boom."))
    assert call(capsys, *two, "--update")[0] == 4
    assert record.load_folder(two[0]) == before


@pytest.mark.slow
def test_two_thousand_records_a_side_are_judged_in_seconds(two, capsys):
    import time

    line = {"step": 1, "tokens": 900, "seconds": 0.02, "loss": 0.7, "learning_rate": 1e-4, "metrics": None}
    for side in two:
        for number in range(2000):
            made = run(task=number // 20, method=f"m{number % 20}", score=0.8, history=[line] * 120)
            (side / f"{number}.json").write_text(json.dumps(made))
    start = time.process_time()
    assert call(capsys, *two)[0] == 0
    assert time.process_time() - start < 24  # 2.5 on a machine that does nothing else
