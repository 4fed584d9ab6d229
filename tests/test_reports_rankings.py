"""Rankings at equal memory and to a target: who fits, who is best of those, who was first, and who never was."""

import csv
import io
import json

import pytest
from reports_factory import MIB, make_failure, make_record
from suites import run

from reports import at_memory, studies, to_target


def within(records, mib):
    (setup,) = json.loads(at_memory.at_memory(records, mib * MIB, "json"))["setups"]
    return {row["method"]: row for row in setup["at_memory"]}


def test_the_budget_is_named_as_it_was_given():
    runs = [run(peak=100)]
    for given, named in ((6.5, "within 6.5 MiB, by"), (100, "within 100 MiB, by"), (8192, "within 8,192 MiB, by")):
        assert named in at_memory.at_memory(runs, int(given * MIB), "plain")


def ranked(rows):
    return [row["method"] for row in sorted(rows.values(), key=lambda row: row["rank"] or 99) if row["rank"]]


def test_methods_rank_by_what_they_reach_among_those_that_fit():
    runs = [run(score=0.9, peak=100), run(method="badam", score=0.7, peak=50), run(method="lora", score=0.8, peak=60)]
    assert ranked(within(runs, 100)) == ["adamw", "lora", "badam"]
    rows = within(runs, 60)
    assert ranked(rows) == ["lora", "badam"]
    assert (rows["lora"]["left_bytes"], rows["adamw"]["remark"]) == (0, "40.0 MiB missing")


def test_a_method_counts_with_its_best_configuration_that_fits():
    runs = [
        run(score=0.9, peak=100, training__batch_size=16),
        run(score=0.8, peak=60, training__batch_size=8),
        run(score=0.7, peak=40, training__batch_size=4),
        run(method="badam", score=0.75, peak=50, hyperparameters={"lr": 1}),
        run(method="badam", score=0.85, peak=50, hyperparameters={"lr": 2}),
    ]
    rows = within(runs, 70)
    assert (rows["adamw"]["mean"], rows["adamw"]["configuration"]) == (0.8, "batch_size=8")
    assert (rows["badam"]["mean"], ranked(rows)) == (0.85, ["badam", "adamw"])
    assert within(runs, 45)["adamw"]["mean"] == 0.7
    assert "Of several configurations (2 of badam, 3 of adamw)" in at_memory.at_memory(runs, 70 * MIB)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"training__sequence_length": 128}, "sequences of 128 tokens"),
        ({"training__options": {"validation_tokens": 512}}, "validation_tokens=512"),
        ({"training__batch_size": 4, "validation_examples": 49}, "49 examples"),
    ],
)
def test_scores_on_other_examples_are_of_rankings_of_their_own_that_say_on_which(change, told):
    lm = {"headline": "perplexity", "higher_is_better": False, "validation_examples": 64}
    runs = [run(**{**lm, "metrics": {"perplexity": 20.0}}), run(**{**lm, "metrics": {"perplexity": 9.0}, **change})]
    found = at_memory.rankings(runs, 1000 * MIB)
    assert sorted(ranking.rows[0]["mean"] for ranking in found) == [9, 20]
    assert any(told in ranking.heading[0] for ranking in found)
    assert len({ranking.heading[0] for ranking in found}) == 2


def test_of_the_same_examples_a_sequence_length_is_a_configuration():
    runs = [run(score=0.7, validation_examples=64), run(score=0.8, validation_examples=64, training__sequence_length=9)]
    assert within(runs, 1000)["adamw"]["configuration"] == "sequence_length=9"


def test_the_hungriest_task_must_fit_and_what_the_allocator_reserved_counts():
    runs = [run(task=1, peak=50), run(task=2, peak=80), run(1, "sgd", peak=10, memory__peak_reserved_bytes=90 * MIB)]
    rows = within([*runs, run(2, "sgd", peak=10)], 70)
    assert not rows["adamw"]["fits"] and not rows["sgd"]["fits"]
    assert rows["sgd"]["needs_bytes"] == 90 * MIB


def test_that_a_process_on_a_gpu_takes_more_than_its_allocator_is_said_of_a_budget():
    on_gpu = run(peak=10, memory__peak_reserved_bytes=90 * MIB, environment__device="cuda")
    assert "half a GiB or more for its CUDA context" in at_memory.at_memory([on_gpu], 100 * MIB)
    assert "half a GiB or more for its CUDA context" in studies.recommend([on_gpu], [100 * MIB])[0]
    assert "CUDA" not in at_memory.at_memory([run(peak=10)], 100 * MIB) + studies.recommend([on_gpu], [])[0]


def test_what_a_gpus_allocator_reserved_is_not_held_against_the_peak_of_a_run_on_a_cpu():
    on_gpu = run(1, "sgd", peak=10, memory__peak_reserved_bytes=90 * MIB, environment__device="cuda")
    rows = within([run(1, peak=50, environment__device="cpu"), on_gpu], 70)
    assert rows["sgd"]["needs_bytes"] == 10 * MIB and not rows["sgd"]["needs_reserved"]
    assert within([on_gpu], 70)["sgd"]["needs_bytes"] == 90 * MIB


def test_a_method_without_every_task_or_that_ran_out_of_memory_ranks_nowhere():
    runs = [run(task=1), run(task=2), run(1, "badam"), make_failure(method="lora", task="superglue/t1")]
    rows = within(runs, 1000)
    assert ranked(rows) == ["adamw"]
    assert rows["badam"]["remark"] == "not run on every task" and rows["lora"]["remark"] == "out of memory"
    rows = within([run(task=1), run(task=2), run(1, "badam", seed=0), run(2, "badam", seed=1)], 1000)
    assert rows["badam"]["remark"] == "no seed has every task"


def test_rows_that_seeds_cannot_tell_apart_are_tied():
    runs = [run(seed=s, score=0.8 + 0.01 * s) for s in range(3)]
    runs += [run(method="badam", seed=s, score=0.805 + 0.01 * s) for s in range(3)]
    runs += [run(method="sgd", seed=s, score=0.3 + 0.01 * s) for s in range(3)]
    rows = within(runs, 1000)
    assert [rows[name]["tied_with_best"] for name in ("adamw", "badam", "sgd")] == [True, True, False]


def test_where_less_is_better_the_least_ranks_first():
    def lm(method, value):
        return run(method=method, metrics={"perplexity": value}, headline="perplexity", higher_is_better=False)

    assert ranked(within([lm("adamw", 20.0), lm("galore", 18.0)], 1000)) == ["galore", "adamw"]


def curve(method, seed, values, seconds=1.0):
    history = [
        {
            "step": 10 * i,
            "tokens": 1000 * i,
            "seconds": seconds * i,
            "loss": 1.0,
            "learning_rate": 0.1,
            "metrics": {"accuracy": v},
        }
        for i, v in enumerate(values, 1)
    ]
    return make_record(
        method=method, seed=seed, history=history, metrics={"accuracy": values[-1]}, training__evaluate_every=10
    )


def race(records, target=0.8):
    (setup,) = json.loads(to_target.to_target(records, "accuracy", target, "json"))["setups"]
    return {row["method"]: row for row in setup["to_target"]}


def test_the_first_time_that_the_target_was_seen_counts_in_seconds_and_tokens():
    runs = [curve("adamw", 0, [0.5, 0.8, 0.7], seconds=5), curve("badam", 0, [0.5, 0.7, 0.9], seconds=1)]
    rows = race(runs)
    assert (rows["adamw"]["seconds"], rows["adamw"]["tokens"], rows["adamw"]["step"]) == (10, 2000, 20)
    assert (rows["badam"]["rank_by_seconds"], rows["badam"]["rank_by_tokens"]) == (1, 2)


def test_runs_that_shared_their_device_are_ranked_by_tokens_alone():
    shared = curve("badam", 0, [0.9])
    shared["environment"]["jobs"] = 4
    rows = race([curve("adamw", 0, [0.5, 0.9]), shared])
    assert rows["badam"]["seconds"] is rows["badam"]["rank_by_seconds"] is None
    assert rows["badam"]["rank_by_tokens"] == 1 and rows["adamw"]["rank_by_seconds"] == 1


def test_what_has_no_seconds_takes_no_rank_by_them_from_others():
    shared = [curve("badam", seed, [0.9]) for seed in (0, 1)]
    for one in shared:
        one["environment"]["jobs"] = 4
    rows = race([*shared, curve("adamw", 0, [0.5, 0.9]), curve("adamw", 1, [0.5, 0.6])])
    assert (rows["adamw"]["rank_by_seconds"], rows["adamw"]["rank_by_tokens"]) == (1, 2)


def test_a_race_says_which_times_are_left_out_and_which_are_too_long():
    shared, slowed = curve("adamw", 0, [0.5, 0.9]), curve("badam", 0, [0.5, 0.9])
    shared["environment"]["jobs"] = 4
    slowed["time"] |= {"train_seconds": 10.0, "waited_seconds": 3.5}
    text = to_target.to_target([shared, slowed], "accuracy", 0.8)
    assert "Speeds of runs that may have shared a device with others are left out" in text
    assert "Slowed by waiting for processors: badam (1 of 1 run) for up to 35% of its time." in text
    text = to_target.to_target([curve("adamw", 0, [0.5, 0.9])], "accuracy", 0.8)
    assert "Speeds" not in text and "Slowed" not in text


def test_equals_share_a_rank():
    rows = race([curve("adamw", 0, [0.9]), curve("badam", 0, [0.9]), curve("sgd", 0, [0.1, 0.9])])
    assert [rows[name]["rank_by_tokens"] for name in ("adamw", "badam", "sgd")] == [1, 1, 3]


def test_a_run_that_never_reaches_it_is_shown_as_such():
    runs = [
        curve("adamw", 0, [0.5, 0.8]),
        curve("adamw", 1, [0.5, 0.6]),
        curve("badam", 0, [0.9]),
        curve("badam", 1, [0.8]),
    ]
    rows = race([*runs, curve("sgd", 0, [0.1, 0.3, 0.2])])
    assert (rows["adamw"]["reached"], rows["adamw"]["runs"], rows["badam"]["rank_by_seconds"]) == (1, 2, 1)
    assert (rows["sgd"]["reached"], rows["sgd"]["seconds"], rows["sgd"]["best"]) == (0, None, 0.3)
    text = to_target.to_target([*runs, curve("sgd", 0, [0.1, 0.3])], "accuracy", 0.8)
    assert "never" in text and "1 of 2" in text and "Evaluated every 10 steps" in text


def test_where_less_is_better_the_target_is_an_upper_bound():
    runs = [curve("adamw", 0, [0.9, 0.5])]
    runs[0] |= {"higher_is_better": False}
    assert race(runs, 0.6)["adamw"]["step"] == 20


@pytest.mark.parametrize(("metric", "more"), [("exact_match", True), ("val_loss", False), ("rmse", False)])
def test_of_another_metric_than_the_headline_its_name_tells_the_direction(metric, more):
    run = curve("adamw", 0, [0.5, 0.9])
    for point, value in zip(run["history"], (0.2, 0.4), strict=True):
        point["metrics"][metric] = value
    run["metrics"][metric] = 0.4
    text = to_target.to_target([run], metric, 0.3)
    assert f"{metric} of 0.3 or {'more' if more else 'less'}" in text and ("   20" in text) == more


def test_an_unknown_metric_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match=r"No run has a metric 'acuracy'. Did you mean 'accuracy'\? Available: accuracy"
    ):
        to_target.to_target([run()], "acuracy", 0.8)


@pytest.mark.parametrize("format", ["plain", "markdown", "latex", "csv", "json"])
def test_rankings_come_in_every_format(format):
    runs = [run(), run(method="badam", peak=50)]
    for text in (at_memory.at_memory(runs, 60 * MIB, format), to_target.to_target(runs, "accuracy", 0.5, format)):
        assert "badam" in text
    (row, *_) = csv.DictReader(io.StringIO(at_memory.at_memory(runs, 60 * MIB, "csv")))
    assert (row["method"], row["needs_bytes"]) == ("badam", str(50 * MIB))
