"""What a folder of records tells after its data, its model or its study were changed."""

import json

import pytest
from reports_factory import make_failure, make_record
from suites import check

from membench.runs.progress import summarize
from reports import studies, tables
from reports.at_memory import at_memory

CHANGED = {
    "data": {"environment__data_sha256": "old"},
    "model": {"environment__model_revision": "old"},
    "task": {"environment__task_code": "old"},
    "tokenizer": {"environment__tokenizer": "old"},
    "headline": {"headline": "f1", "metrics": {"accuracy": 0.5, "f1": 0.9}},
    "direction": {"higher_is_better": False},
}
NAMED = {  # what has a name that a reader knows
    "tokenizer": ("tokenizer old", "tokenizer new"),
    "headline": ("headline f1", "headline accuracy"),
    "direction": ("headline accuracy (less is better)", "headline accuracy"),
}
NOW = {
    "environment__data_sha256": "new",
    "environment__model_revision": "new",
    "environment__tokenizer": "new",
    "environment__task_code": "new",
    "environment__created": "2026-11-28",
}


def _setups(records) -> list[tuple[str | None, set[str]]]:
    setups = json.loads(tables.render(records, "json"))["setups"]
    return [(setup["conditions"]["version"], {row["method"] for row in setup["summary"]}) for setup in setups]


@pytest.mark.parametrize("what", CHANGED)
def test_runs_from_before_a_change_of_data_model_or_tokenizer_share_no_table_with_those_after_it(what):
    after = [make_record(method=name, **NOW) for name in ("adamw", "badam")]
    changed = {"metrics": {"accuracy": 0.9}, **NOW, "environment__created": "2026-11-27", **CHANGED[what]}
    before = make_record(method="lora", **changed)
    old, new = NAMED.get(what, (f"{what} before the latest change", None))
    assert sorted(_setups([before, *after]), key=str) == sorted([(old, {"lora"}), (new, {"adamw", "badam"})], key=str)
    words = studies.recommend([before, *after], [])
    assert [": badam" in words_ or ": adamw" in words_ for words_ in words].count(True) == 1  # not lora over all
    assert at_memory([before, *after], 1 << 33).count(f"- {old}\n") == 1


def test_tasks_have_data_of_their_own_and_what_is_unknown_splits_nothing():
    runs = [
        make_record(task=f"superglue/{name}", **{**NOW, "environment__data_sha256": name}) for name in ("cb", "rte")
    ]
    unknown = make_failure(method="badam", task="superglue/cb", headline=None)
    assert _setups([*runs, unknown]) == [(None, {"adamw", "badam"})]
    older = make_record(task="superglue/cb", method="lora", **CHANGED["headline"])
    assert ("headline accuracy", {"adamw", "badam"}) in _setups([*runs, unknown, older])


def test_a_folder_that_was_renamed_holds_the_same_data():
    before = make_record(training__data="data/old", **{**NOW, "environment__created": "2026-11-27"})
    after = make_record(method="badam", training__data="data/new", **NOW)
    (setup,) = json.loads(tables.render([before, after], "json"))["setups"]
    assert setup["conditions"]["data"] == "data/new"  # as it is called now
    assert {row["method"] for row in setup["summary"]} == {"adamw", "badam"}
    edited = make_record(method="lora", training__data="data/old", **{**NOW, "environment__data_sha256": "edited"})
    assert len(_setups([before, after, edited])) == 2


def test_older_runs_of_several_tasks_stay_together():
    def made(created, **changes):
        given = {**NOW, "environment__created": created, **changes}
        return [make_record(task=f"superglue/{name}", **given) for name in ("cb", "rte")]

    setups = json.loads(tables.render([*made("1", environment__model_revision="old"), *made("2")], "json"))["setups"]
    assert [(one["conditions"]["version"], one["tasks"]) for one in setups] == [
        ("model before the latest change", ["superglue/cb", "superglue/rte"]),
        (None, ["superglue/cb", "superglue/rte"]),
    ]


@pytest.mark.parametrize(("visited", "of", "shown"), [(242, 243, "99.6%"), (1, 243, "0.4%"), (2, 3, "67%")])
def test_blocks_that_were_not_visited_are_not_rounded_away(visited, of, shown):
    badam = make_record(method="badam", block_coverage=visited / of, hyperparameters__switch_every=1)
    text = tables.render([make_record(), badam])
    assert f" {shown}  1 ok" in text and f"badam {shown} with switch_every 1" in text


def test_a_note_stands_where_there_is_what_it_explains():
    def said(**changes):
        runs = [make_record(method=method, **changes) for method in ("adamw", "badam")]
        return tables.render(runs, tables=["summary", "memory", "quality"])

    assert "tokens/s: all tokens" in said() and "tokens/s" not in said(environment__jobs=2)
    assert "± how far chance" in said(constant_score=0.4, validation_examples=9)
    assert "±" not in said(constant_score=0.4)


@pytest.mark.parametrize("what", ["whole", "missing", "beside others", "failed"])
def test_speeds_of_unequal_runs_are_said_not_to_compare(what):
    runs = [make_record(method=method, task=f"t/{task}") for method in ("adamw", "badam") for task in "ab"]
    if what == "beside others":
        runs[-1]["environment"]["jobs"] = 2
    if what in ("missing", "failed"):
        lost = runs.pop()
    if what == "failed":
        runs.append(make_failure(method="badam", task=lost["task"]))
    for table in ("summary", "throughput"):
        said = "only ratios of speeds compare" in tables.render(runs, tables=[table])
        assert said == (what != "whole")


def test_one_is_not_many():
    heading = tables.render([make_record(training__steps=1, environment__threads=1)]).splitlines()[1]
    assert heading.startswith("1 step of 16 x 64") and heading.endswith("cpu, 1 thread")
    assert "Tuning: 1 trial of each method" in tables.render([make_record()], trials=[make_record(seed=9)])
    drawn_once = make_record(method="hft", block_coverage=0.5, hyperparameters__switch_every=None)
    assert "hft 50% with switch_every none" in tables.render([drawn_once])


def test_a_saving_is_of_the_seeds_that_have_a_reference():
    runs = [make_record(), *(make_record(method="badam", seed=seed) for seed in range(3))]
    assert [one.seeds for one in check(runs, runs, "saving").findings if one.metric == "saving"] == [(0,)]


@pytest.mark.parametrize(
    ("score", "shown"),
    [(0.8125, "0.812"), (12.346, "12.35"), (1234567.0, "1,234,567.00"), (2.2097e23, "2.21e+23"), (4.25e-5, "4.25e-05")],
)
def test_scores_of_any_size_are_told_apart_and_take_no_more_room_than_others(score, shown):
    runs = [make_record(metrics={"loss": score}, headline="loss", higher_is_better=False)]
    assert f"  {shown}  " in tables.render(runs)
    assert f" {shown.replace(',', '')} " in at_memory(runs, 1 << 33)
    assert f": {shown.replace(',', '')} loss in 100.0 MiB" in studies.recommend(runs, [])[0]
    assert f"loss {shown.replace(',', '')}, peak" in summarize(runs[0])


def test_trials_of_a_study_before_its_file_was_changed_are_rows_of_their_own(tmp_path):
    scores = {100: {1e-4: 0.9, 1e-3: 0.5}, 200: {1e-3: 0.7, 1e-2: 0.6}}
    trials = [
        make_record(seed=1, training__steps=steps, hyperparameters={"lr": lr}, metrics={"accuracy": score})
        for steps, found in scores.items()
        for lr, score in found.items()
    ]
    rows = {row["training"]: row for row in studies.sensitivity(trials)}
    assert {told: (row["trials"], row["chosen"]["lr"], row["best"]) for told, row in rows.items()} == {
        "steps=100": (2, 1e-4, 0.9),
        "steps=200": (2, 1e-3, 0.7),
    }
    text = tables.render([make_record(training__steps=200)], trials=trials)
    assert "Tuning: 2 trials" in text and "steps=100" in text
    assert "steps=" not in tables.render([make_record()], trials=trials[:2])  # of one training nothing is said


def test_t_the_line_of_a_run_that_failed_is_one_line_whatever_its_error_is():
    run = make_failure("failed", "one\ntwo \x1b[31m\u202ethree")
    assert summarize(run).endswith("failed: one two \\x1b[31m\\u202ethree")
