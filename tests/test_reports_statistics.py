"""The arithmetic of the tables, against figures from statistics' textbooks and by hand."""

import random
import warnings

import pytest
from scipy.stats import studentized_range

from reports.parts import round_parts
from reports.statistics import equivalent, errors_of_rows, paired_ratio, sight, summarise, tied_with_best


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


@pytest.mark.parametrize(
    ("rows", "freedom", "errors"), [(2, 4, 2.776), (3, 6, 4.339 / 2**0.5), (10, 20, 5.008 / 2**0.5)]
)
def test_the_best_of_several_equal_rows_leads_by_as_much_as_tables_of_the_studentized_range_say(rows, freedom, errors):
    assert errors_of_rows(freedom, rows) == pytest.approx(errors, abs=5e-4)


@pytest.mark.parametrize("freedom", [1.0, 1.2, 2.5, 3.9, 7.3, 41.7])
def test_between_whole_degrees_of_freedom_the_studentized_range_is_interpolated(freedom):
    exact = studentized_range.ppf(0.95, 6, freedom) / 2**0.5
    assert 0.999 < errors_of_rows(freedom, 6) / exact < (1.02 if freedom < 2 else 1.005)


@pytest.mark.parametrize("unit", [1e-200, 1.0, 1e200])
def test_rows_of_any_scale_are_told_apart_alike(unit):
    rows = {"a": [8.0, 8.1, 8.3], "b": [7.9, 8.0, 8.2], "c": [1.0, 1.1, 1.2], "still": [8.0, 8.0, 8.0]}
    scaled = {name: [unit * value for value in values] for name, values in rows.items()}
    assert tied_with_best(scaled) == {"a", "b", "still"}
    assert sight(scaled["a"], scaled["b"], 4).least / unit == pytest.approx(sight(rows["a"], rows["b"], 4).least)


def equal_rows(chance, rows, seeds):
    return {f"m{row}": [chance.gauss(0.8, 0.01) for _ in range(seeds)] for row in range(rows)}


def test_of_many_equal_methods_hardly_ever_one_is_called_worse_than_the_best():
    chance, reports = random.Random(0), 60
    wrong = sum(len(tied_with_best(equal_rows(chance, 10, 5))) < 10 for _ in range(reports))
    assert wrong / reports <= 0.15  # by Welch's test of each alone half of them


def test_of_many_methods_that_are_two_points_behind_hardly_ever_one_is_called_as_good():
    chance, reports, wrong = random.Random(0), 100, 0
    for _ in range(reports):
        made = equal_rows(chance, 11, 5)
        best = [0.02 + score for score in made.pop("m0")]
        wrong += any(equivalent(values, best, rows=11) for values in made.values())
    assert wrong / reports <= 0.08  # uncorrected a quarter


@pytest.mark.parametrize("rows", [2, 5])
def test_what_seeds_can_see_is_where_the_test_begins_to_tell_rows_apart(rows):
    best = [0.80, 0.81, 0.83]
    others = {f"m{row}": best for row in range(rows - 1)}
    least = sight(best, best, rows).least
    for share, tied in ((0.99, True), (1.01, False)):
        low = [score - share * least for score in best]
        assert ("low" in tied_with_best({"low": low, **others})) == tied


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
