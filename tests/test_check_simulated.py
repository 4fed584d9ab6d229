"""Suites with a known truth: how often `membench check` is wrong. The rates are printed (pytest -s)."""

import random

import pytest
from suites import check, rate, run, suite

NUMBER = 200  # simulated suites a case


def report(what: str, share: float) -> float:
    print(f"\n{what}: {share:.1%} of {NUMBER} suites are called a regression")
    return share


@pytest.mark.parametrize(
    ("noise", "rows"),
    [
        (0.0, {}),
        pytest.param(0.2, {}, marks=pytest.mark.slow),
        (0.6, {}),
        pytest.param(2.0, {}, marks=pytest.mark.slow),
        pytest.param(0.6, {"seeds": 3}, marks=pytest.mark.slow),
        pytest.param(2.0, {"seeds": 3}, marks=pytest.mark.slow),
        (0.6, {"tasks": 5, "methods": 1}),
        (1.0, {"tasks": 3, "methods": 2}),
        (2.0, {"tasks": 2, "methods": 1, "seeds": 3}),
    ],
)
def test_without_a_change_at_most_one_suite_in_twenty_is_called_a_regression(noise, rows):
    def sides(rng):
        same = {"noise": noise, "jitter": 0.05, **rows}
        return suite(rng, **same), suite(rng, **same)

    assert report(f"no change, noise {noise} of a score, 5% of a speed, {rows}", rate(NUMBER, sides)) <= 0.05


def test_rows_of_unlike_noise_keep_the_rate_where_seeds_tell_it():
    def side(rng):
        return [
            run(task, f"m{method}", seed, 0.8 + rng.gauss(0, deviation) / 100)
            for task, deviation in enumerate([0.3, 0.5, 0.8, 1.0, 1.5, 3.0, 6.0])
            for method in range(5)
            for seed in range(3)
        ]

    assert (
        report("no change, noise 0.3 to 6 by task, 3 seeds", rate(NUMBER // 2, lambda rng: (side(rng), side(rng))))
        <= 0.05
    )


def test_a_uniform_drop_within_the_margin_is_caught():
    def sides(rng):
        return suite(rng, seeds=3), suite(rng, seeds=3, shift=-1.8)

    assert report("a uniform drop of 1.8 points, noise 0.6 of each side, 3 seeds", rate(NUMBER // 4, sides)) >= 0.99


def test_a_drop_of_one_method_alone_is_caught():
    def sides(rng):
        before, after = suite(rng, tasks=8, noise=0.4, seeds=3), suite(rng, tasks=8, noise=0.4, seeds=3)
        for made in after:
            made["metrics"]["accuracy"] -= 0.015 * (made["method"] == "m3")
        return before, after

    assert report("a drop of 1.5 points of one method in five, 3 seeds", rate(NUMBER // 2, sides)) >= 0.9


def test_one_row_that_needs_a_tenth_more_memory_is_always_caught():
    def sides(rng):
        before, after = suite(rng), suite(rng)
        grown = rng.choice(after)
        more = grown["memory"]["peak_allocated_bytes"] // 10
        grown["memory"]["peak_allocated_bytes"] += more
        grown["memory"]["at_peak"]["weights_bytes"] += more
        return before, after

    assert report("one row of 35 needs 10% more memory", rate(NUMBER // 4, sides)) == 1


@pytest.mark.parametrize("drift", [0.76, 1.24])
def test_a_machine_that_is_faster_or_slower_throughout_is_never_a_regression(drift):
    def sides(rng):
        same = suite(rng, noise=0)
        return same, suite(rng, noise=0, drift=drift)

    assert report(f"all speeds times {drift}", rate(NUMBER // 4, sides)) == 0


def test_a_method_that_lost_half_of_its_speed_is_caught():
    rng = random.Random(1)
    before, after = suite(rng, noise=0, jitter=0.03), suite(rng, noise=0, jitter=0.03, drift=0.8)
    for made in after:
        made["time"]["tokens_per_second"] *= 0.5 if made["method"] == "m2" else 1
    found = [finding for finding in check(before, after).findings if finding.verdict == "regression"]
    assert {(finding.metric, finding.method) for finding in found} == {("throughput", "m2")}
    assert len(found) == 7  # on every task
