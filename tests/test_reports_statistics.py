"""The arithmetic of the tables, against figures from statistics' textbooks and by hand."""

import random
import warnings

import pytest

from reports.parts import round_parts
from reports.statistics import paired_ratio, summarise, tied_with_best


def test_a_single_value_has_no_deviation():
    assert summarise([0.5]) == (0.5, None, 1)


def test_the_deviation_is_that_of_a_sample():
    assert summarise([1.0, 2.0, 3.0, 4.0]).deviation == pytest.approx(1.2910, abs=1e-4)  # sqrt(5 / 3)


@pytest.mark.parametrize(
    ("shift", "tied"),
    [(0.0, True), (2.2, True), (2.4, False), (9.0, False)],  # of 4 degrees of freedom the 5 % point is t = 2.776
)
def test_tied_is_what_welchs_test_can_not_tell_apart(shift, tied):
    best, other = [1.0, 2.0, 3.0], [1.0 - shift, 2.0 - shift, 3.0 - shift]  # t = shift / sqrt(2 / 3)
    assert tied_with_best({"best": best, "other": other}) == ({"best", "other"} if tied else {"best"})


def test_less_may_be_better():
    assert tied_with_best({"a": [1.0, 1.1], "b": [9.0, 9.1]}, higher_is_better=False) == {"a"}


def test_a_single_run_is_neither_tied_nor_told_apart():
    assert tied_with_best({"best": [0.9, 0.8], "single": [0.85]}) == {"best"}
    assert tied_with_best({"best": [0.9], "others": [0.8, 0.81]}) == set()
    assert tied_with_best({}) == set()


def test_runs_without_any_spread_are_compared_as_they_are_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tied_with_best({"a": [0.5, 0.5], "b": [0.5, 0.5], "c": [0.4, 0.4]}) == {"a", "b"}
        assert tied_with_best({"a": [0.5, 0.5], "d": [0.3, 0.31]}) == {"a"}


def test_a_paired_ratio_is_a_geometric_mean_over_what_both_have():
    assert paired_ratio({"a": 2.0, "b": 8.0, "c": 5.0}, {"a": 1.0, "b": 1.0, "d": 1.0}) == pytest.approx(4.0)
    assert paired_ratio({"a": 2.0}, {"b": 1.0}) is None
    assert paired_ratio({"a": 2.0, "b": 3.0}, {"a": 0.0, "b": 1.0}) == pytest.approx(3.0)


def test_rounded_parts_add_up_and_none_is_off_by_a_unit():
    chance = random.Random(0)
    for _ in range(2000):
        unit = chance.choice([1, 7, 1 << 20])
        parts = [chance.choice([0, 1, unit // 2, chance.randrange(9 * unit)]) for _ in range(5)]
        rounded = round_parts(parts, unit)
        assert abs(sum(rounded) * unit - sum(parts)) * 2 <= unit
        assert all(abs(whole * unit - part) < unit for whole, part in zip(rounded, parts, strict=True))


def test_the_largest_remainders_go_up():
    assert round_parts([14, 16, 10, 0, 0], 10) == [1, 2, 1, 0, 0]
    assert round_parts([4, 4, 4], 10) == [1, 0, 0]
