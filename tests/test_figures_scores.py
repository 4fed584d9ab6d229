"""Scores during training and performance profiles, of histories whose figures are known."""

import pytest
from reports_factory import make_record

from reports import figures, page
from reports.figures import profiles, scores
from reports.setups import group


def curve(method, task, values, seed=0, every=10):
    names = ("step", "tokens", "seconds", "loss", "learning_rate", "metrics")
    points = [(every * i, 900 * every * i, i, 1.0, 0.1, {"accuracy": v}) for i, v in enumerate(values, 1)]
    history = [dict(zip(names, point, strict=True)) for point in points]
    return make_record(method=method, task=f"t/{task}", seed=seed, history=history, metrics={"accuracy": values[-1]})


def test_a_score_is_the_mean_over_seeds_at_the_steps_that_all_were_evaluated_at():
    runs = [curve("adamw", "a", [0.5, 0.7, 0.9]), curve("adamw", "a", [0.6, 0.8], seed=1)]
    line = scores.seen(group(runs)[0], "adamw", "t/a")
    assert line == ([10, 20], [9000, 18000], [1, 2], [pytest.approx(0.55), pytest.approx(0.75)])


def test_a_profile_is_the_share_of_tasks_within_so_many_times_the_fewest_tokens():
    runs = [
        *(curve("adamw", "a", [0.5, 0.8, 0.8, 0.8]), curve("badam", "a", [0.5, 0.6, 0.7, 0.8])),
        *(curve("adamw", "b", [0.5, 0.6, 0.7, 0.7]), curve("badam", "b", [0.9, 0.9, 0.9, 0.9])),
        *(curve("lora", "a", [0.1, 0.1, 0.1, 0.1]), curve("lora", "b", [0.1, 0.1, 0.1, 0.9])),
    ]
    (setup,) = group(runs)  # targets: .8 and .9
    assert profiles.ratios(setup) == {"adamw": [1, float("inf")], "badam": [2, 1], "lora": [float("inf"), 4]}
    (plot,) = figures.draw(setup)["profiles"]
    assert "badam first on 50% of 2 tasks, reached the target on 100%" in plot.alt
    html = page.render(runs)
    assert "Score against tokens" in html and "performance profiles, as in AlgoPerf" in html


def test_without_evaluations_on_the_way_there_are_no_such_plots():
    (setup,) = group([make_record(method=m, task=f"t/{t}") for m in ("adamw", "badam") for t in "ab"])
    drawn = figures.draw(setup)
    assert not drawn["profiles"] and not drawn["score_by_step"] and not drawn["score_by_tokens"]
