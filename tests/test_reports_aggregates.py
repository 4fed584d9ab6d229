"""What a figure over runs is - mean, median, maximum, ratio of sums -, told apart by runs of which one is far from the
others; and which runs it is over, told apart by seeds that lack a task."""

import json
import math

import pytest
from reports_factory import MIB, make_failure, make_record
from suites import run

from reports import at_memory, studies, tables, to_target
from reports.figures import bars, pareto
from reports.setups import group
from reports.winners import winners

OUTLIER = (0.2, 0.8, 0.8)  # mean .6, median .8, standard deviation of a sample .3464


def document(records):
    (setup,) = json.loads(tables.render(records, "json"))["setups"]
    return setup


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def scored(task, seed, score, **changes):
    return make_record(task=f"x/{task}", seed=seed, metrics={"accuracy": score}, **changes)


# ---- over seeds


def test_a_score_is_the_mean_over_seeds_with_the_deviation_of_a_sample_not_the_median():
    row = only(document([scored("a", seed, score) for seed, score in enumerate(OUTLIER)])["quality"])
    assert (row["mean"], row["standard_deviation"], row["n"]) == (pytest.approx(0.6), pytest.approx(0.34641), 3)


@pytest.mark.parametrize("phase", ["forward", "backward", "update"])
def test_the_time_of_a_phase_is_the_mean_over_runs_of_the_medians_that_they_have(phase):
    records = [make_record(seed=seed, **{f"time__{phase}_seconds": value}) for seed, value in enumerate(OUTLIER)]
    assert only(document(records)["throughput"])[f"{phase}_seconds"] == pytest.approx(0.6)


def test_the_share_of_weights_that_were_trained_is_the_mean_over_runs():
    records = [make_record(seed=s, trained_fraction=v, block_coverage=v) for s, v in enumerate(OUTLIER)]
    assert only(document(records)["summary"])["trained_fraction"] == pytest.approx(0.6)
    assert bars.covered(group(records)[0], "adamw") == (pytest.approx(0.6), pytest.approx(0.6))


def test_the_score_before_training_is_the_mean_over_the_runs_that_have_one():
    records = [scored("a", s, 0.9) | {"initial_metrics": {"accuracy": v}} for s, v in enumerate(OUTLIER)]
    records.append(scored("a", 3, 0.9))
    assert only(document(records)["quality"])["before_training"] == pytest.approx(0.6)


def test_a_score_on_a_benchmark_is_the_mean_over_seeds():
    entry = {"standard_errors": {}, "fewshot": 5, "limit": 1, "chat_template": False, "version": "1", "harness": "1"}
    records = [
        make_record(seed=s) | {"benchmarks": {"b": {"scores": {"acc": v}, **entry}}} for s, v in enumerate(OUTLIER)
    ]
    row = only(document(records)["benchmarks"])
    assert (row["mean"], row["standard_deviation"]) == (pytest.approx(0.6), pytest.approx(0.34641))


def test_tokens_per_second_are_of_all_tokens_and_all_seconds_not_a_mean_of_speeds():
    speeds = [(100.0, 1.0), (100.0, 1.0), (1000.0, 8.0)]
    records = [
        make_record(seed=s, time__tokens_per_second=speed, time__train_seconds=seconds)
        for s, (speed, seconds) in enumerate(speeds)
    ]
    assert only(document(records)["throughput"])["tokens_per_second"] == pytest.approx(820.0)  # mean 400, median 100


def test_a_ratio_of_speeds_is_the_geometric_mean_of_the_pairs():
    records = [make_record(seed=s, time__tokens_per_second=100.0) for s in range(3)]
    records += [make_record(method="badam", seed=s, time__tokens_per_second=v) for s, v in enumerate((100, 100, 800))]
    ratio = only(document(records)["throughput"], method="badam")["tokens_per_second_ratio"]
    assert ratio == pytest.approx(2.0)  # mean 3.33, median 1, ratio of sums 3.33


def test_a_peak_is_the_largest_over_runs():
    records = [run(seed=s, peak=peak) for s, peak in enumerate((100, 300, 110))]
    assert only(document(records)["memory"])["peak_allocated_bytes"] == 300 * MIB


def curve(seed, step):
    """Reaches the target at `step`."""
    point = {"tokens": 7 * step, "seconds": 2.0 * step, "loss": 1.0, "learning_rate": 0.1}
    history = [
        {"step": 1, **point, "metrics": {"accuracy": 0.1}},
        {"step": step, **point, "metrics": {"accuracy": 0.9}},
    ]
    return make_record(seed=seed, history=history, metrics={"accuracy": 0.9})


def test_the_way_to_a_target_is_the_median_over_the_runs_that_reached_it():
    records = [curve(seed, step) for seed, step in enumerate((10, 12, 95))]
    records.append(make_record(seed=3, metrics={"accuracy": 0.2}))
    (setup,) = json.loads(to_target.to_target(records, "accuracy", 0.8, "json"))["setups"]
    row = only(setup["to_target"])
    assert (row["step"], row["seconds"], row["tokens"], row["reached"], row["runs"]) == (12, 24.0, 84, 3, 4)


def test_the_middle_of_trials_is_their_median():
    trials = [run(seed=9, score=score, hyperparameters={"lr": n}) for n, score in enumerate((0.1, 0.7, 0.8, 0.9, 0.75))]
    (row,) = studies.sensitivity(trials)
    assert (row["best"], row["median"], row["worst"]) == (0.9, 0.75, 0.1)


def test_what_a_budget_must_hold_is_the_hungriest_run_and_the_score_the_mean():
    records = [run(seed=s, peak=peak, score=v) for s, (peak, v) in enumerate(zip((50, 90, 60), OUTLIER, strict=True))]
    (setup,) = json.loads(at_memory.at_memory(records, 100 * MIB, "json"))["setups"]
    row = only(setup["at_memory"])
    assert row["needs_bytes"] == 90 * MIB
    assert (row["mean"], row["standard_deviation"]) == (pytest.approx(0.6), pytest.approx(0.34641))


# ---- over tasks: of complete seeds alone


def test_an_average_over_tasks_is_a_mean_in_each_seed():
    records = [scored(task, 0, score) for task, score in zip("abc", OUTLIER, strict=True)]
    assert only(document(records)["quality"], task="average")["mean"] == pytest.approx(0.6)


INCOMPLETE = [("a", 0, 0.5), ("b", 0, 0.7), ("a", 1, 0.7), ("b", 1, 0.9), ("a", 2, 0.0), ("b", 3, 0.0)]


def test_a_seed_that_lacks_a_task_counts_in_no_average():
    records = [scored(*one) for one in INCOMPLETE]
    average = only(document(records)["quality"], task="average")
    assert (average["mean"], average["n"]) == (pytest.approx(0.7), 2)  # .6 and .8
    assert average["standard_deviation"] == pytest.approx(math.sqrt(0.02))
    summary = only(document(records)["summary"])
    assert (summary["score_mean"], summary["score_n"]) == (pytest.approx(0.7), 2)


def test_nor_in_a_ranking_within_a_budget():
    records = [scored(*one) for one in INCOMPLETE]
    (setup,) = json.loads(at_memory.at_memory(records, 1000 * MIB, "json"))["setups"]
    row = only(setup["at_memory"])
    assert (row["mean"], row["n"]) == (pytest.approx(0.7), 2)


def test_a_seed_whose_run_of_a_task_went_wrong_is_as_incomplete():
    records = [scored(*one) for one in INCOMPLETE]
    records += [make_failure("diverged", "nan", task="x/b", seed=2), make_failure("failed", "no", task="x/a", seed=3)]
    average = only(document(records)["quality"], task="average")
    assert (average["mean"], average["n"]) == (pytest.approx(0.7), 2)


def test_where_no_seed_has_all_tasks_the_average_is_of_the_tasks_means_of_no_seed_and_ranks_nowhere():
    records = [scored("a", 0, 0.2), scored("a", 1, 0.4), scored("a", 2, 0.9), scored("b", 3, 0.9)]
    average = only(document(records)["quality"], task="average")
    assert (average["mean"], average["standard_deviation"], average["n"]) == (pytest.approx(0.7), None, 0)
    lower = [{**scored(task, seed, 0.1 + 0.01 * seed), "method": "badam"} for task in "ab" for seed in (0, 1)]
    (setup,) = group([*records, *lower])
    assert winners(setup)["score"].best == "badam" and "(0) averaged over tasks of different" in tables.render(
        [*records, *lower]
    )
    assert pareto.left_out(setup, "average") == ["adamw"]
