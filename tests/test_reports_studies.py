"""What a study concludes: every word of it is read off the records."""

from reports_factory import MIB, make_failure
from suites import run

from reports import page, studies, tables
from reports.page import content
from reports.setups import group


def trials(method, scores, key="lr"):
    return [
        run(method=method, seed=9, score=score, hyperparameters={key: value})
        if score is not None
        else make_failure("diverged", "nan", method=method, seed=9, task="superglue/t0", hyperparameters={key: value})
        for value, score in scores.items()
    ]


def seeds(method, score, peak, speed=9000):
    return [run(method=method, seed=s, score=score + 0.001 * (s + 1), peak=peak, speed=speed) for s in range(3)]


def test_the_best_trial_is_chosen_and_of_equals_the_first():
    assert studies.best(trials("badam", {0.1: 0.5, 0.2: 0.8, 0.3: 0.8})) == 1
    assert studies.best(trials("badam", {0.1: None, 0.2: 0.1})) == 1
    assert studies.best(trials("badam", {0.1: None, 0.2: None})) == 0
    less = [made | {"higher_is_better": False} for made in trials("badam", {0.1: 0.5, 0.2: 0.2, 0.3: 0.8})]
    assert studies.best(less) == 1


def test_sensitivity_has_best_median_worst_what_was_chosen_and_whether_at_the_edge():
    made = studies.sensitivity(
        trials("badam", {0.1: 0.5, 0.2: 0.8, 0.3: 0.7, 0.4: None}) + trials("lora", {1: 0.6, 2: 0.7, 3: 0.9})
    )
    badam, lora = made
    assert (badam["best"], badam["median"], badam["worst"], badam["trials"], badam["ended_badly"]) == (
        0.8,
        0.7,
        0.5,
        4,
        1,
    )
    assert badam["chosen"] == {"lr": 0.2} and badam["at_edge"] == [] and lora["at_edge"] == ["lr"]


def test_of_equal_trials_the_one_was_chosen_that_the_runs_have_whatever_the_order():
    """A folder gives its records by their names: by that the first of equals was said to be chosen, but wasn't used."""
    made = trials("badam", {0.3: 0.8, 0.1: 0.8, 0.2: 0.5})
    finals = [run(method="badam", seed=s, score=0.7, hyperparameters={"lr": 0.1}) for s in range(2)]
    for tried in (made, made[::-1]):
        (row,) = studies.sensitivity(tried, finals)
        assert row["chosen"] == {"lr": 0.1} and row["at_edge"] == ["lr"]
    (row,) = studies.sensitivity(trials("badam", {0.3: 0.8, 0.1: 0.8, 0.2: 0.8}), finals)
    assert row["at_edge"] == []  # none beyond can be better for what tells nothing


def test_trials_of_different_seeds_are_no_tuning_of_one_budget():
    """A study whose seeds are extended tunes on another seed, or on one that counts by now."""
    first = trials("badam", {0.1: 0.9, 0.2: 0.5})
    later = [made | {"seed": 10, "run_id": f"{made['run_id']}10"} for made in trials("badam", {0.1: 0.6, 0.2: 0.8})]
    made = studies.sensitivity(first + later)
    assert [(row["training"], row["trials"], row["chosen"], row["best"]) for row in made] == [
        ("seed=9", 2, {"lr": 0.1}, 0.9),
        ("seed=10", 2, {"lr": 0.2}, 0.8),
    ]
    assert [row["training"] for row in studies.sensitivity(first)] == [""]


def test_the_recommendation_is_the_method_shown_to_be_as_good_that_needs_least():
    finals = [
        *seeds("adamw", 0.80, 100),
        *seeds("badam", 0.798, 60, 18000),
        *seeds("lora", 0.5, 40),
        *seeds("hft", 0.9, 200),
    ]
    (limited,) = studies.recommend(finals, [120 * MIB])
    assert limited.startswith("For 120 MiB (superglue/t0")
    assert (
        ": badam, because of 2 shown to score within 2 points of the best it needs least memory: 0.800 ± 0.001 (3) "
        "accuracy in 60" in limited
    )
    assert ", at 2.00 times the speed of adamw." in limited
    assert "As good: adamw 0.802 ± 0.001 (3), 100.0 MiB." in limited
    assert "Behind: lora 0.502 ± 0.001 (3), 40.0 MiB." in limited and "Out: hft (80.0 MiB missing)." in limited


def test_a_speed_of_runs_that_other_work_slowed_is_nowhere_named_without_that():
    finals = [*seeds("adamw", 0.80, 100), *seeds("badam", 0.798, 60, 18000)]
    assert "lowed by other work" not in page.render(finals)
    for made in finals[:3]:
        made["time"] |= {"train_seconds": 10.0, "waited_seconds": 4.0}
    (said,) = studies.recommend(finals, [120 * MIB])
    assert ", at 2.00 times the speed of adamw (not to be relied on: other work slowed adamw)." in said
    (fastest,) = [one for one in content.of(group(finals)[0])["cards"] if one["title"] == "Fastest"]
    assert fastest["tied"] == "Slowed by other work: adamw"


def test_the_recommendation_names_the_configuration_and_that_it_was_chosen_by_its_score():
    finals = [
        *(run(method="badam", score=score, peak=50, hyperparameters={"lr": lr}) for lr, score in ((1, 0.7), (2, 0.8))),
        run(score=0.6, peak=90, hyperparameters={"lr": 3}),
        *(run(method="lora", peak=99, hyperparameters={"lr": lr}) for lr in (4, 5)),
    ]
    (sentence,) = studies.recommend(finals, [95 * MIB])
    assert ": badam (lr=2), because it scores best: 0.800 accuracy" in sentence
    assert "Not comparable, of one seed: adamw 0.600" in sentence
    assert "Out: lora (lr=4; 4.0 MiB missing). Of several configurations (2 of badam, 2 of lora)" in sentence
    (small,) = studies.recommend(finals[2:3], [])
    assert "configurations" not in small


def test_one_budget_each_or_none_at_all():
    finals = [run(score=0.9, peak=100), run(method="badam", score=0.8, peak=60)]
    small, none, free = (*studies.recommend(finals, [70 * MIB, 10 * MIB]), *studies.recommend(finals, []))
    assert "badam, because nothing else fits" in small and "nothing fits. Out: badam (50.0 MiB missing)" in none
    assert free.startswith("Without a limit of memory") and "adamw, because it scores best" in free
    assert "Note on adamw: one seed. Not comparable, of one seed: badam 0.800, 60.0 MiB." in free


def test_a_comparison_in_a_studys_folder_leaves_the_study_its_budgets():
    asked = run(environment__memory_budgets=[200 * MIB], environment__created="2026-01-01T00:00:00")
    compared = run(method="badam", environment__created="2026-01-02T00:00:00")
    assert studies.budgets_of([asked, compared]) == [200 * MIB] and studies.budgets_of([compared]) == []
    without = run(environment__memory_budgets=[], environment__created="2026-01-03T00:00:00")  # of a changed file
    assert studies.budgets_of([asked, compared, without]) == []


def test_nothing_else_is_said_to_lack_what_it_has():
    """Without a limit all fits: what isn't recommended lacks something else, or isn't there."""

    def said(*others, tasks=(0,)):
        (sentence,) = studies.recommend([*(run(task) for task in tasks), *others], [])
        return sentence.partition("because ")[2].partition(":")[0]

    lost = {"status": "diverged", "error": "nan", "method": "badam", "task": "superglue/t0"}
    guess = {"constant_score": 0.5, "validation_examples": 277}
    assert said() == "nothing else was run"
    assert said(make_failure(**lost)) == "nothing else finished its runs"
    assert said(run(method="badam"), tasks=(0, 1)) == "nothing else finished its runs"
    assert said(run(method="badam", score=0.5, **guess)) == "nothing else is above chance"
    (nobody,) = studies.recommend([make_failure(**lost)], [])
    assert nobody.endswith(": nothing finished its runs. Out: badam (diverged).")
    limited = studies.recommend([run(), run(method="lora", peak=999), make_failure(**lost)], [200 * MIB])[0]
    assert "adamw, because nothing else fits and finished its runs: " in limited


def test_a_task_that_is_ranked_apart_is_named():
    less = {"headline": "perplexity", "higher_is_better": False}
    finals = [run(0), run(1, metrics={"perplexity": 3.0}, **less)]
    first, second = studies.recommend(finals, [])
    assert first.startswith("Without a limit of memory (superglue/t0 - ")
    assert second.startswith("Without a limit of memory (superglue/t1 - ")


def test_what_cannot_run_is_called_refused_as_in_the_tables():
    finals = [run(), make_failure("failed", "can't: it has no linear layers", method="lora", task="superglue/t0")]
    assert "Out: lora (refused)." in studies.recommend(finals, [])[0]


def test_what_ran_out_of_memory_is_out():
    finals = [run(), make_failure(method="lora", task="superglue/t0")]
    assert "Out: lora (out of memory)." in studies.recommend(finals, [])[0]


def test_the_text_states_the_budget_of_tuning():
    tuned = trials("adamw", {0.1: 0.5, 0.2: 0.8, 0.15: 0.1})
    text = tables.render([run(environment__memory_budgets=[200 * MIB])], trials=tuned)
    assert "\n\n\nTuning: 3 trials of each method on each task, on validation data, on a seed of its own (9)" in text
    assert "For 200 MiB (superglue/t0" in text
    page_text = page.render([run()], trials=tuned)
    assert "Which method to use" in page_text and "How much tuning mattered" in page_text and "lr=0.2" in page_text
    assert "lr=0.2" in text and "at the edge" in text and "Recommendation" in text
