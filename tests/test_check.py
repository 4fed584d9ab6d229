"""`membench check`, row by row: what is a regression and what isn't, with figures worked by hand."""

import math

import pytest
from reports_factory import MIB, make_failure, make_record
from scipy import stats
from suites import check, run

from membench.commands import baseline
from reports import record
from reports.record import Found
from reports.regressions import evidence, quality, thresholds
from reports.regressions.check import METRICS
from reports.regressions.check import check as judge
from reports.regressions.findings import Finding
from reports.regressions.metric import Metric, arrow
from reports.regressions.noise import noises
from reports.regressions.render import render


def verdicts(result, *metrics):
    """Verdict by metric, of all that isn't fine."""
    return {
        (finding.metric, finding.method): finding.verdict
        for finding in result.findings
        if finding.verdict != "fine" and (not metrics or finding.metric in metrics)
    }


def only(result, metric, method=None):
    (finding,) = [
        finding
        for finding in result.findings
        if finding.metric == metric and finding.task and method in (None, finding.method)
    ]
    return finding


def seeds(scores, **changes):
    return [run(seed=seed, score=score, **changes) for seed, score in enumerate(scores)]


# Memory


@pytest.mark.parametrize(
    ("mib", "verdict", "code"),
    [
        (100, "fine", 0),
        (101, "fine", 0),
        (100.9, "fine", 0),
        (101.1, "regression", 1),
        (99.1, "fine", 0),
        (98.9, "improved", 0),
    ],
)
def test_memory_beyond_one_percent_either_way_is_flagged_and_only_more_is_failed(mib, verdict, code):
    result = check([run(peak=100)], [run(peak=mib)])
    assert (only(result, "memory").verdict, result.code) == (verdict, code)


def test_memory_of_the_worst_seed_decides_and_the_part_that_grew_is_named():
    before = [run(seed=seed, peak=100) for seed in range(3)]
    after = [run(seed=0, peak=100), run(seed=1, peak=110), run(seed=2, peak=90)]
    finding = only(check(before, after), "memory")
    assert (finding.verdict, finding.before, finding.after) == ("regression", 100 * MIB, 110 * MIB)
    assert finding.change == pytest.approx(0.1) and finding.reason == "weights +10.0 MiB"


def test_a_peak_of_0_is_unknown():
    nothing = dict.fromkeys([f"{part}_bytes" for part in ("weights", "gradients", "optimizer_state")], 0)
    empty = run(
        memory__peak_allocated_bytes=0, memory__at_peak={**nothing, "activations_bytes": 0, "temporaries_bytes": 0}
    )
    result = check([empty], [run()])
    assert (only(result, "memory").verdict, result.code) == ("unknown", 0)


# Savings


def test_a_saving_that_is_lost_is_a_regression_though_the_bytes_are_the_same():
    before = [run(peak=100), run(method="badam", peak=91)]
    after = [run(peak=91), run(method="badam", peak=91)]
    result = check(before, after)
    assert verdicts(result) == {("memory", "adamw"): "improved", ("saving", "badam"): "regression"}
    assert only(result, "saving").reason == "saved 9.0% of adamw's peak, now nothing"
    assert result.code == 1


def test_without_a_reference_savings_and_speeds_are_not_judged_and_it_says_so():
    result = check([run(method="badam", peak=91, speed=100)], [run(method="badam", peak=91, speed=1)])
    assert result.code == 0 and not verdicts(result)
    assert any(
        note.startswith("No run of adamw to compare with beside 1 run: no check of saving and throughput there.")
        for note in result.notes
    )
    other = check(
        [run(method="sgd"), run(method="badam", peak=50)],
        [run(method="sgd"), run(method="badam", peak=50)],
        reference="sgd",
    )
    assert only(other, "saving").before == 0.5


def test_of_a_references_several_configurations_the_one_that_is_compared_with_is_said():
    def side(*rates):
        adamw = [run(peak=200 * (1 + rate), hyperparameters={"lr": rate}) for rate in rates]
        return [*adamw, run(method="badam", peak=100)]

    assert not any("configurations" in note for note in check(side(0.5), side(0.5)).notes)
    result = check(side(0.25, 0.5), side(0.25, 0.5))
    said = "saving and throughput are relative to adamw lr=0.5, the last of adamw's configurations."
    assert said in result.notes and only(result, "saving").before == pytest.approx(2 / 3)


def test_a_reference_that_did_not_end_well_is_said_too():
    side = [make_failure(task="superglue/t0"), *(run(method="badam", seed=seed) for seed in range(2))]
    both = [*side, make_failure(task="superglue/t0", seed=1)]
    assert (
        "adamw didn't end well on both sides beside 2 runs: no check of saving and throughput there."
        in check(both, both).notes
    )


# Throughput


def test_speed_is_judged_as_a_ratio_to_the_reference_of_the_same_run():
    before = [run(speed=1000), run(method="badam", speed=1600)]
    slower_machine = [run(speed=400), run(method="badam", speed=640)]
    assert not verdicts(check(before, slower_machine))
    slower_method = [run(speed=1000), run(method="badam", speed=1100)]  # 1.6 -> 1.1: 31% less
    result = check(before, slower_method)
    assert verdicts(result) == {("throughput", "badam"): "regression"}
    assert only(result, "throughput").change == pytest.approx(1.1 / 1.6 - 1)
    within = [run(speed=1000), run(method="badam", speed=1300)]
    assert not verdicts(check(before, within))


def test_speeds_of_runs_that_shared_their_device_are_said_not_to_be_checked():
    side = [run(environment__jobs=2), run(method="badam", environment__jobs=2)]
    (note,) = [note for note in check(side, side).notes if note.startswith("Speeds")]
    assert note.startswith("Speeds of 1 run aren't checked: they, or those beside them, may have shared a device")


def test_speeds_of_other_machines_are_shown_and_never_failed():
    before = [
        run(speed=1000, environment__device_name="A"),
        run(method="badam", speed=1600, environment__device_name="A"),
    ]
    after = [
        run(speed=1000, environment__device_name="B"),
        run(method="badam", speed=100, environment__device_name="B"),
    ]
    result = check(before, after)
    assert result.code == 0
    assert "Speeds are from other machines (A, 2 threads -> B, 2 threads): shown, not checked." in result.notes


def side(*machines):
    """A run of adamw and one of badam, each on a machine."""
    return [
        run(method=method, environment__device_name=name)
        for method, name in zip(("adamw", "badam"), machines, strict=True)
    ]


@pytest.mark.parametrize(
    ("before", "after", "checked", "said"),
    [
        (side(None, None), side("A", "A"), True, None),  # what isn't known is no difference
        (side("A", "A"), side("A", "A"), True, None),
        (
            side("A", "B"),
            side("A", "B"),
            False,
            "of 1 run are from other machines (A, 2 threads and B, 2 threads -> A,",
        ),
        (side("A", "A"), side("A", "B"), False, "of 1 run are from other machines (A, 2 threads -> A, 2 threads and B"),
    ],
)
def test_it_says_of_no_speed_that_it_is_not_checked_which_is_and_of_each_that_is_not(before, after, checked, said):
    result = check(before, after)
    assert any(finding.metric == "throughput" for finding in result.findings) == checked
    notes = [note for note in result.notes if "other machines" in note]
    assert notes == [] if said is None else said in notes[0]


def test_what_an_old_record_lacks_is_as_it_was_meant():
    """The fields of a later version keep no run from its reference's, nor make two of one."""
    later = {"training__final_fraction": 0.0, "training__options": {}}
    mixed = [run(**later), run(method="badam", peak=50)]
    assert only(check(mixed, mixed), "saving").before == 0.5
    again = [run(environment__created="2026-01-01", peak=200), run(**later, environment__created="2026-02-01")]
    result = check(again, [run()])
    assert (only(result, "memory").before, result.code) == (100 * MIB, 0)


def test_a_run_that_does_not_say_when_it_was_made_is_not_the_newest():
    of_two = [run(environment__created="2026-02-01", peak=100), run(environment__created=None, peak=200)]
    for several in (of_two, of_two[::-1]):
        assert only(check(several, [run()]), "memory").before == 100 * MIB


@pytest.mark.parametrize("name", ["device", "data_sha256", "tokenizer", "model_revision", "threads"])
def test_runs_of_one_training_on_two_devices_or_data_are_rows_of_their_own(name):
    """The one made first wasn't looked at: its peak could double, and a folder in another order didn't compare."""
    one, other = (1, 2) if name == "threads" else ("one", "other")

    def side(peaks, order=(one, other), methods=("adamw", "badam")):
        return [
            run(
                method=method,
                peak=peaks[value],
                **{f"environment__{name}": value},
                environment__created=f"2026-01-0{day}",
            )
            for method in methods
            for day, value in enumerate(order, 1)
        ]

    before = side({one: 100, other: 300})
    result = check(before, side({one: 200, other: 300}), "memory")
    worse = [finding for finding in result.findings if finding.verdict == "regression"]
    assert {(finding.method, finding.before) for finding in worse} == {
        (f"adamw {name}={one}", 100 * MIB),
        (f"badam {name}={one}", 100 * MIB),
    }
    assert check(before, side({one: 100, other: 300}, order=(other, one))).code == 0
    halved = side({one: 100, other: 300}, methods=["adamw"]) + side({one: 50, other: 150}, methods=["badam"])
    assert [finding.before for finding in check(halved, halved, "saving").findings if finding.before] == [0.5, 0.5]


def test_older_runs_of_one_configuration_are_left_out_and_counted():
    several = [run(environment__created=f"2026-0{month}-01") for month in (1, 2, 3)]
    assert "Older runs of the same configuration are left out: 2 of the baseline." in check(several, [run()]).notes


def test_a_peak_without_its_parts_is_compared_and_nothing_is_named():
    def stopped(peak):
        sizes = {"peak_allocated_bytes": peak, "at_peak": None, "maximum": None}
        lost = {"peak_reserved_bytes": None, "process_peak_bytes": None}
        return make_failure("diverged", "nan", task="superglue/t0", memory={**sizes, **lost})

    finding = only(check([stopped(100)], [stopped(200)]), "memory")
    assert (finding.verdict, finding.reason) == ("regression", "")


def test_speeds_of_runs_that_shared_a_device_are_not_judged():
    shared = [run(speed=1000, environment__jobs=4), run(method="badam", speed=100, environment__jobs=4)]
    result = check([run(speed=1000), run(method="badam", speed=1600)], shared)
    assert result.code == 0 and not [one for one in result.findings if one.metric == "throughput"]


def test_a_speed_of_0_is_unknown():
    before = [run(speed=0), run(method="badam", speed=1600)]
    assert check(before, [run(speed=1000), run(method="badam", speed=100)]).code == 0


# Quality


@pytest.mark.parametrize(
    ("score", "verdict"), [(0.79, "fine"), (0.75, "inconclusive"), (0.72, "regression"), (0.88, "improved")]
)
def test_one_seed_is_judged_by_the_noise_of_so_many_examples_and_it_says_so(score, verdict):
    many = {"validation_examples": 2000}
    finding = only(check([run(score=0.8, **many)], [run(score=score, **many)]), "quality")
    shares = (1600 + 2000 * score + 2) / 4004  # of both sides together, two more right and two more wrong
    of_seeds = 0.02  # on each side
    p = stats.norm.cdf(-abs(score - 0.8) / math.sqrt(2 * shares * (1 - shares) / 2000 + 2 * of_seeds**2))
    assert (finding.verdict, finding.p) == (verdict, pytest.approx(p))
    shown = "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
    assert finding.reason.startswith(f"one seed of 2000 examples: {shown}, level 0.02; margin 2 points")


def test_one_seed_of_an_unknown_number_of_examples_is_only_failed_for_a_collapse():
    result = check([run(score=0.8)], [run(score=0.7)])
    assert (only(result, "quality").verdict, result.code) == ("inconclusive", 0)
    assert "whose records have no such number, of 50" in "".join(result.notes)
    assert check([run(score=0.8)], [run(score=0.3)]).code == 1


def test_one_seed_of_a_score_without_bounds_is_not_judged():
    lost = {"headline": "perplexity", "higher_is_better": False}
    result = check([run(metrics={"perplexity": 20.0}, **lost)], [run(metrics={"perplexity": 90.0}, **lost)])
    finding = only(result, "quality")
    assert (finding.verdict, finding.p, result.code) == ("inconclusive", None, 0)
    assert finding.reason == "one seed, and a score without bounds: nothing tells the noise"
    assert not any("noise of such scores is bounded" in note for note in result.notes)
    (note,) = [note for note in result.notes if note.startswith("One seed alone of 1 row whose scores have no bounds")]
    assert note.endswith("a regression, unless it is 10 times the baseline's. Give three seeds.")
    assert render(result, "terminal", ("main", "branch")).startswith("No regression shown (1 inconclusive")


def test_where_less_is_better_more_is_a_regression_in_percent():
    def perplexity(value):
        scores = [value, 1.1 * value, 1.2 * value + 0.001]
        return [
            run(seed=seed, metrics={"perplexity": score}, headline="perplexity", higher_is_better=False)
            for seed, score in enumerate(scores)
        ]

    worse, better = check(perplexity(20.0), perplexity(20.5)), check(perplexity(20.0), perplexity(19.5))
    assert only(worse, "quality").verdict == "regression"
    assert only(worse, "quality").change == pytest.approx(-2.5, abs=0.01)
    assert only(better, "quality").verdict == "improved"
    assert check(perplexity(20.0), perplexity(20.3)).code == 0


def perplexities(values):
    return [
        run(seed=seed, metrics={"perplexity": value}, headline="perplexity", higher_is_better=False)
        for seed, value in enumerate(values)
    ]


def test_perplexities_that_all_explode_are_a_regression_however_unlike_they_became():
    before, after = [10.0, 10.1, 9.9], [90.0, 40.0, 95.0]
    logs = [math.log(b / a) for b, a in zip(before, after, strict=True)]
    finding = only(check(perplexities(before), perplexities(after)), "quality")
    assert finding.verdict == "regression"  # percents scatter so much that a test of them says p = .03
    assert finding.p == pytest.approx(stats.ttest_1samp(logs, 0, alternative="less").pvalue)
    assert finding.change == pytest.approx(-100 * math.expm1(-sum(logs) / 3))
    assert check(perplexities([1e-300]), perplexities([1e300])).code == 1


@pytest.mark.parametrize(("before", "after"), [([10.0, 10.1, 9.9], [10.0, 990.0, 9.9]), ([10.1], [990.0])])
def test_one_seed_whose_perplexity_explodes_fails_whatever_the_others_say(before, after):
    result = check(perplexities(before), perplexities(after))
    assert result.code == 1 and only(result, "quality").reason.startswith("exploded: 10.1 -> 990 in seed ")
    assert check(perplexities(before), perplexities(after), explosion_times=100).code == 0
    assert check(perplexities([10.0, 99.0, 9.9]), perplexities([10.0, 10.1, 990.0])).code == 0  # as the baseline does


def test_scores_of_which_less_is_better_may_be_0():
    assert check(perplexities([0.0, 0.0, 0.0]), perplexities([0.5, 0.5, 0.5])).code == 1
    assert check(perplexities([0.5, 0.5, 0.5]), perplexities([0.0, 0.0, 0.0])).code == 0


def test_scores_up_to_100_have_points_of_1():
    assert only(check([run(score=80.0)], [run(score=78.5)]), "quality").change == pytest.approx(-1.5)
    assert check(seeds([80.0, 81.0, 82.0]), seeds([77.5, 78.4, 79.6])).code == 1


def test_scores_up_to_10_have_points_of_a_tenth():
    assert only(check([run(score=6.5)], [run(score=6.3)]), "quality").change == pytest.approx(-2)
    assert check(seeds([6.5, 6.6, 6.4]), seeds([5.0, 5.2, 4.9])).code == 1


def test_over_seeds_a_drop_beyond_the_margin_is_a_regression_if_a_paired_test_says_so():
    before, after = [0.80, 0.82, 0.78, 0.81, 0.79, 0.80, 0.83], [0.76, 0.79, 0.74, 0.76, 0.76, 0.76, 0.80]
    finding = only(check(seeds(before), seeds(after)), "quality")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    oracle = stats.ttest_1samp(differences, 0, alternative="less").pvalue  # of one row, nothing to correct
    assert finding.verdict == "regression" and finding.p == pytest.approx(oracle)
    assert finding.reason.startswith("paired t-test over 7 seeds")


def test_a_drop_that_seeds_do_not_agree_on_is_inconclusive_and_not_failed():
    result = check(seeds([0.8] * 4), seeds([0.9, 0.6, 0.85, 0.7]))
    assert (only(result, "quality").verdict, result.code) == ("inconclusive", 0)


def test_a_drop_within_the_margin_is_fine_however_sure():
    before = [0.80, 0.81, 0.79, 0.80, 0.81, 0.79, 0.80, 0.80]
    after = [score - 0.01 - 0.0001 * number for number, score in enumerate(before)]
    assert only(check(seeds(before), seeds(after)), "quality").verdict == "fine"


def test_several_seeds_never_hide_what_each_of_them_would_have_shown():
    before, after = [0.8, 0.8], [0.66, 0.5]  # the seeds disagree: the t-test alone says nothing
    assert check(seeds(before, validation_examples=1000), seeds(after, validation_examples=1000)).code == 1
    assert check(seeds(before), seeds(after)).code == 0


def test_one_row_among_others_is_judged_at_a_level_for_all_of_them():
    noise = [0.01, -0.01, 0.008, -0.012, 0.015, -0.006, 0.009, -0.011, 0.012, -0.007]
    many = {"validation_examples": 1000}
    before = [run(task=number, **many) for number in range(11)]

    def after(drop):
        rows = [run(task=number, score=0.8 + noise[number], **many) for number in range(10)]
        return [*rows, run(task=10, score=0.8 - drop, **many)]

    def last(drop):
        found = check(before, after(drop), "quality").findings
        return next(f for f in found if f.task.endswith("t10") and f.metric == "quality")

    assert last(0.2).verdict == "regression" and last(0.2).reason.endswith("level 0.02 for 11 rows; margin 2 points")
    assert last(0.08).verdict == "inconclusive" and last(0.08).p < 0.2


def suite_of(shift, seeds=range(3)):
    noise = [0.0004, 0.0, -0.0003]
    return [
        run(task=task, method=f"m{method}", seed=seed, score=0.8 + shift + noise[seed] + 0.0001 * task * bool(shift))
        for task in range(7)
        for method in range(5)
        for seed in seeds
    ]


def test_every_row_slightly_worse_is_a_regression_though_no_single_row_is():
    after = [
        made | {"metrics": {"accuracy": made["metrics"]["accuracy"] + 2e-5 * n}}
        for n, made in enumerate(suite_of(-0.005))
    ]
    result = check(suite_of(0), after, "quality")
    bad = [finding for finding in result.findings if finding.verdict == "regression"]
    assert result.code == 1 and bad and not any(finding.task for finding in bad)
    assert any(finding.reason.startswith("35 of 35 rows are worse") for finding in bad)


def test_a_row_of_other_seeds_does_not_keep_the_others_from_being_judged_together():
    def moved(runs):
        row = (runs[0]["task"], runs[0]["method"])
        return [made | {"seed": made["seed"] + 100 * ((made["task"], made["method"]) == row)} for made in runs]

    result = check(moved(suite_of(0)), moved(suite_of(-0.005)), "quality")
    (found,) = [one for one in result.findings if one.metric == "quality" and not one.task and not one.method]
    assert found.verdict == "regression" and found.reason.startswith("34 of 34 rows are worse")
    assert "without 1 row of other seeds" in found.reason


def test_of_one_seed_every_row_slightly_worse_is_said_but_not_failed():
    result = check(suite_of(0, [0]), suite_of(-0.005, [0]), "quality")
    (everything,) = [finding for finding in result.findings if not finding.task and not finding.method]
    assert (everything.verdict, result.code) == ("inconclusive", 0)
    assert "35 of 35 rows are worse" in everything.reason and "noise all rows may share" in everything.reason


# The statistics, against other sources


def test_holm_is_the_textbook_example():
    assert evidence.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )


def noise_of(rows):
    return noises({key: dict(enumerate(values)) for key, values in rows.items()}, lambda key: key)


def test_rows_alike_lend_each_other_freedom_and_a_noisy_row_keeps_its_own():
    rng = stats.norm(scale=1)
    alike = {number: list(rng.rvs(3, random_state=number)) for number in range(40)}
    moderated = noise_of(alike).values()
    assert all(noise.freedom > 6 and 0.3 < noise.variance < 3 for noise in moderated)
    noise = noise_of({**alike, "loud": [30.0, -30.0, 0.0]})
    assert noise["loud"].variance > 15**2 and noise[0].variance < 9
    assert noise_of({"alone": [1.0, 2.0, 4.0]})["alone"].freedom == 2


def test_rows_that_share_their_noise_count_once():
    rng = stats.norm(scale=1)
    shared = list(rng.rvs(3, random_state=1))
    rows = {number: [value + 0.01 * number for value in shared] for number in range(40)}
    assert all(noise.freedom == pytest.approx(2, abs=0.1) for noise in noise_of(rows).values())


def test_the_sign_test_is_the_binomial_tail():
    assert quality._sign_test(3, 1) == pytest.approx(stats.binomtest(3, 4, alternative="greater").pvalue)


# Rows without a partner, and those that can't be compared


def test_new_and_missing_rows_have_verdicts_of_their_own():
    result = check([run(), run(method="lora")], [run(), run(method="lisa")])
    assert verdicts(result, "runs") == {("runs", "lora"): "missing", ("runs", "lisa"): "new"}
    assert result.code == 1
    assert check([run(), run(method="lora")], [run()], missing="report").code == 0
    assert check([run()], [run(), run(method="lisa")]).code == 0


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "diverged"])
def test_a_run_that_ends_badly_where_it_did_not_before_is_exit_code_4(status):
    bad = make_failure(status, "It went wrong.", method="badam", task="superglue/t0")
    result = check([run(), run(method="badam")], [run(), bad])
    assert verdicts(result) == {("runs", "badam"): status} and result.code == 4
    assert check([run()], [run(), bad]).code == 4  # new
    assert verdicts(check([run(), bad], [run(), run(method="badam")]), "runs") == {("runs", "badam"): "improved"}
    known = check([run(), bad], [run(), bad])
    assert known.code == (4 if status == "failed" else 0)  # running out of memory is a result


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training__steps": 200}, "steps: 100 -> 200"),
        ({"training__batch_size": 8}, "batch_size: 16 -> 8"),
        ({"training__data": "hub"}, "data: demo -> hub"),
        ({"training__max_grad_norm": 1.0}, "max_grad_norm: null -> 1.0"),
        ({"environment__device": "cuda"}, "device: cpu -> cuda"),
        ({"parameters": 2_000_000}, "parameters: 1000000 -> 2000000"),
        ({"metrics": {"f1": 0.8}, "headline": "f1"}, "headline: accuracy -> f1"),
        ({"model": "gpt2"}, "model: config:roberta-tiny -> gpt2"),
        ({"validation_examples": 56}, "validation_examples: 277 -> 56"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_difference_named(change, words):
    before, other = run(validation_examples=277), run(task=1)
    result = check([before, other], [run(**{"validation_examples": 277, **change}), other])
    (finding,) = [finding for finding in result.findings if finding.verdict == "incomparable"]
    assert words in finding.reason and result.code == 3
    assert any(
        finding.task.endswith("t1") and finding.metric == "memory" for finding in result.findings
    )  # the others are


def test_a_count_of_0_is_no_difference():
    assert check([run(parameters=0)], [run()]).code == 0


def test_the_same_data_in_another_folder_compare():
    def at(folder, digest):
        return run(training__data=folder, environment__data_sha256=digest)

    assert check([at("/a", "1234")], [at("/b", "1234")]).code == 0
    assert check([at("/a", "1234")], [at("/a", "5678")]).code == 3


def test_two_sides_without_a_run_in_common_do_not_compare():
    result = check([run(task=1)], [run(task=2)])
    assert result.code == 3
    assert any(finding.reason == "the two have no run in common" for finding in result.findings)


def test_of_several_exit_codes_not_comparable_comes_before_failed_before_regression():
    regression = ([run(task=1, peak=100)], [run(task=1, peak=200)])
    failed = ([run(task=2)], [make_failure("failed", "No.", task="superglue/t2")])
    refused = ([run(task=3)], [run(task=3, training__steps=7)])
    sides = [sum((pair[side] for pair in (regression, failed, refused)), []) for side in (0, 1)]
    assert check(*sides).code == 3
    assert check(regression[0] + failed[0], regression[1] + failed[1]).code == 4
    assert check(*regression).code == 1


def test_other_hyperparameters_compare_and_are_named():
    result = check([run(hyperparameters={"lr": 0.1})], [run(hyperparameters={"lr": 0.2})])
    assert result.code == 0 and "adamw: lr: 0.1 -> 0.2 on superglue/t0; compared all the same." in result.notes


def test_runs_of_several_hyperparameters_or_trainings_pair_with_their_own():
    def sweep(peaks):
        return [run(hyperparameters={"lr": lr}, peak=peak) for lr, peak in peaks.items()]

    result = check(sweep({0.1: 100, 0.2: 50}), sweep({0.2: 50, 0.1: 100, 0.3: 70}))
    assert verdicts(result) == {("runs", "adamw lr=0.3"): "new"}
    batches = [run(training__batch_size=size, peak=peak) for size, peak in ((8, 50), (16, 100))]
    result = check(batches, batches[::-1])
    assert not verdicts(result) and {key.method for key in result.rows} == {"adamw batch_size=8", "adamw batch_size=16"}


def test_of_two_runs_of_one_configuration_the_last_one_made_counts():
    old, new = run(peak=100, environment__created="2026-01-01"), run(peak=200, environment__created="2026-02-01")
    assert check([run(peak=200)], [new, old]).code == 0


def test_a_file_that_is_no_record_is_a_verdict_and_the_others_are_judged():
    result = judge(Found([run()], []), Found([run()], ["x.json: malformed JSON."]), thresholds.load())
    assert verdicts(result) == {("runs", ""): "unreadable"} and result.code == 3
    assert only(result, "memory").verdict == "fine"


def test_only_the_metrics_asked_for_are_judged():
    result = check([run(peak=100, score=0.8)], [run(peak=100, score=0.1)], "memory", "saving")
    assert result.code == 0 and {finding.metric for finding in result.findings} == {"runs", "memory"}


def test_a_new_metric_is_a_row_of_one_table(monkeypatch):
    def seconds(suite):
        for key, row in suite.rows.items():
            (old, new) = (run["time"]["train_seconds"] for run in row.pairs[0])
            yield Finding("seconds", "regression" if new > old else "fine", "", *key, (0,), old, new, new - old)

    shown = ("{:.0f} s".format, "{:+.0f} s".format, (("train s", arrow("{:.0f}".format)),))
    monkeypatch.setitem(METRICS, "seconds", Metric("seconds", seconds, *shown))
    result = judge(
        Found([run(time__train_seconds=10.0)], []),
        Found([run(time__train_seconds=12.0)], []),
        thresholds.load(),
        METRICS,
    )
    assert result.code == 1 and verdicts(result) == {("seconds", "adamw"): "regression"}
    text = " ".join(render(result, "terminal", ("a", "b")).split())
    assert "regression seconds superglue/t0 adamw 10 s 12 s +2 s" in text and "10 -> 12" in text
    assert 'testsuite name="seconds"' in render(result, "junit", ("a", "b"))


# Thresholds


def test_the_default_thresholds_are_the_commented_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(thresholds.default_text())
    assert thresholds.load(path) == thresholds.load()
    path.write_text("quality_points = 5\n")
    assert thresholds.load(path).quality_points == 5 and thresholds.load(path).memory_percent == 1.0
    assert all("#" in block for block in thresholds.default_text().split("\n\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("qualty_points = 1", "unknown key 'qualty_points'. Did you mean 'quality_points'?"),
        ("quality_points = 'two'", "quality_points must be a number of at least 0, not 'two'"),
        ("memory_percent = -1", "memory_percent must be a number of at least 0, not -1"),
        ("memory_percent = true", "memory_percent must be a number of at least 0, not True"),
        ("false_alarms = 0.7", "false_alarms must lie between 0 and 0.5"),
        ("throughput_percent = 100", "throughput_percent must be below 100"),
        ("explosion_times = 0.5", "explosion_times must be at least 1, not 0.5"),
        ("missing = 'ignore'", "missing must be one of fail, report, not 'ignore'"),
        ("reference = 3", "reference must be a text, not 3"),
        ("= 3", "not valid TOML"),
    ],
)
def test_a_wrong_threshold_is_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "limits.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{path}: ") as caught:
        thresholds.load(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_check_says_nothing_that_is_not_finite():
    result = check(seeds([0.8, 0.8, 0.8]), seeds([0.7, 0.7, 0.7]))
    assert all(math.isfinite(finding.p or 0) for finding in result.findings) and result.code == 1


def test_a_baseline_that_is_replaced_while_it_is_read_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    place, parse = tmp_path / "baseline", record._parse
    old, new = ([make_record(seed=seed, metrics__accuracy=score) for seed in range(3)] for score in (0.5, 0.75))
    baseline.replace(place, old)
    waiting = [new]

    def parse_and_be_late(path):
        found = parse(path)
        if waiting:
            baseline.replace(place, waiting.pop())
        return found

    monkeypatch.setattr(record, "_parse", parse_and_be_late)
    found = record.read(place)
    assert [one["metrics"]["accuracy"] for one in found.records] == [0.75] * 3 and not found.problems
