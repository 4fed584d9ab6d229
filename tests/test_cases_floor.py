"""What scores are worth where the truth is known: at chance, of few examples, of two seeds far apart and six close."""

import math
import random
import statistics

import pytest
from reports_factory import MIB
from suites import run

import tasks
from reports import at_memory, floors, page, rows, studies, tables
from reports.floors import Floor
from reports.setups import group
from reports.statistics import sight, wilson
from reports.winners import winners
from tasks.models.language import standard_error

SHARE = {"constant_score": 0.5, "validation_examples": 277}


def seeds_of(method, scores, peak=100, **changes):
    return [run(method=method, seed=seed, score=score, peak=peak, **changes) for seed, score in enumerate(scores)]


def everything_said(runs, *pages):
    """Tables, a ranking, a recommendation and `pages`, and whoever wins anything."""
    texts = [tables.render(runs), at_memory.at_memory(runs, 999 * MIB), *studies.recommend(runs, []), *pages]
    return texts, {name: winner.best for name, winner in winners(group(runs)[0]).items()}


CHANCE = {"adamw": [0.51, 0.53, 0.52], "badam": [0.55, 0.54, 0.555], "mezo": [0.49, 0.50, 0.51]}


def test_where_all_score_at_chance_nobody_is_the_best_tied_or_recommended():
    runs = [made for method, scores in CHANCE.items() for made in seeds_of(method, scores, **SHARE)]
    texts, best = everything_said(runs, page.render(runs))
    assert best == {}
    for text in texts:
        assert "o method is above chance" in text and "(0.500 ± 0.059, 277 examples)" in text
    assert not any("*" in text for text in texts[:2]) and "★" not in texts[3] and "because" not in texts[2]


def test_what_does_not_fit_and_learned_is_not_denied():
    """`No method is above chance` stood below a row of 0.7 that lacked some memory."""
    runs = seeds_of("adamw", [0.70, 0.71], 200, **SHARE) + seeds_of("badam", [0.50, 0.51], 100, **SHARE)
    text = at_memory.at_memory(runs, 150 * MIB)
    assert "0.705 ± 0.007 (2)" in text and "No method" not in text
    assert "Not above chance on t0 (0.500 ± 0.059, 277 examples): badam." in text
    within, anywhere = studies.recommend(runs, [150 * MIB, 50 * MIB])
    assert ": none that fits is above chance (0.500 ± 0.059, 277 examples). What fits: badam 0.505" in within
    assert "nothing fits" in anywhere
    assert ": no method is above chance (" in studies.recommend(runs[2:], [150 * MIB])[0]


def test_a_single_example_is_no_plural():
    assert Floor(score=0.5, examples=1).words == "0.500, 1 example"
    assert Floor(score=0.5, examples=2000).words == "0.500, 2,000 examples"


def test_a_method_at_chance_wins_nothing_though_it_needs_least_and_is_no_tie():
    runs = [*seeds_of("adamw", [0.70, 0.71, 0.72], 200, **SHARE), *seeds_of("mezo", [0.50, 0.9, 0.25], 50, **SHARE)]
    texts, best = everything_said(runs)
    assert best == {"memory": "adamw", "speed": "adamw", "score": "adamw"}
    for text in texts[:2]:
        assert "Not above chance on t0 (0.500 ± 0.059, 277 examples): mezo." in text and text.count(")*") <= 2
    assert ": adamw, because nothing else is above chance: " in texts[2]
    assert "Not above chance (0.500 ± 0.059, 277 examples): mezo 0.550" in texts[2]


def perplexities_of(method, scores):
    known = {"headline": "perplexity", "higher_is_better": False}
    runs = [run(method=method, seed=seed, **known) for seed, _ in enumerate(scores)]
    for made, score in zip(runs, scores, strict=True):
        made["metrics"] = {"perplexity": score, "loss_change_standard_error": 0.01}
        made["initial_metrics"] = {"perplexity": 5.8}
    return runs


def test_a_mean_of_runs_that_learned_and_one_that_exploded_is_told_to_be_one():
    runs = [*perplexities_of("adamw", [5.1, 5.2]), *perplexities_of("lomo", [5.0, 2797.574])]
    exploded = "lomo on t0: 1 of 2 runs ended worse than before training (seed 1: 2,797.57)."
    text = tables.render(runs)
    assert exploded in text and "adamw on t0:" not in text and exploded in page.render(runs)
    both = [*perplexities_of("adamw", [5.1, 5.2]), *perplexities_of("lomo", [2797.0, 2797.5])]
    assert "ended worse" not in tables.render(both), "its mean is of what it does"
    little = [*perplexities_of("adamw", [5.1, 5.2]), *perplexities_of("lomo", [5.0, 5.85])]
    assert "ended worse" not in tables.render(little), "worse by chance"


@pytest.mark.parametrize(("score", "above"), [(0.66, False), (0.67, True)])
def test_of_36_examples_a_score_below_two_thirds_is_chance(score, above):
    runs = seeds_of("adamw", [score] * 6, constant_score=0.5, validation_examples=36)
    text = tables.render(runs)
    assert ("No method is above chance on t0 (0.500 ± 0.163, 36 examples)." in text) != above
    assert (wilson(score, 36)[0] > 0.5) == above  # the test ends where Wilson's interval begins
    assert f"36 (± {0.148 if score == 0.66 else 0.147})" in text


def test_two_seeds_far_apart_tie_and_say_how_little_they_see():
    runs = seeds_of("adamw", [0.511, 0.520], 200) + seeds_of("badam", [0.35, 0.406], 100)
    texts, best = everything_said(runs, page.render(runs))
    assert "Ties: 2 seeds can't see less than 0.32 on t0; 6 would see 0.056." in texts[0]
    assert ": adamw, because it scores best" in texts[2]  # badam needs less, but nobody knows that it is as good
    assert "badam 0.378 ± 0.040 (2), 100.0 MiB (2 seeds can't see less than 0.32; 6 would see 0.056)." in texts[2]
    assert "2 seeds can&#39;t see less than 0.32; 6 would see 0.056" in texts[3] and best["score"] == "adamw"


def test_six_seeds_that_lie_close_tell_a_small_difference():
    near = [0.001 * step for step in (-3, -2, -1, 1, 2, 3)]
    runs = seeds_of("adamw", [0.80 + e for e in near], 200, **SHARE)
    runs += seeds_of("badam", [0.79 + e for e in near], 100, **SHARE)
    text = tables.render(runs)
    assert "Ties" not in text and "0.790 ± 0.002 (6)*" not in text and "0.800 ± 0.002 (6)*" in text
    (said,) = studies.recommend(runs, [])
    assert ": badam, because of 2 shown to score within 2 points of the best it needs least memory" in said


def test_a_perplexity_is_held_against_guessing_and_against_the_model_before_training():
    shared = {"headline": "perplexity", "higher_is_better": False, "constant_score": 512.0, "validation_examples": 32}
    made = {"perplexity": 480.0, "loss_standard_error": 0.05}
    runs = [run(method=method, metrics=made, **shared) for method in ("adamw", "badam")]
    assert "No method is better than guessing on t0 (512.00 ± 47.79, 32 examples)." in tables.render(runs)
    runs = [one | {"initial_metrics": {"perplexity": 470.0}} for one in runs]
    assert "No method is better than before training on t0 (470.00 ± 43.87, 32 examples)." in tables.render(runs)
    text = tables.render([*runs, run(method="lora", metrics=made | {"perplexity": 90.0}, **shared)])
    assert "Not better than before training on t0 (470.00 ± 43.87, 32 examples): adamw, badam." in text


def test_what_few_sequences_leave_a_perplexity_is_of_its_own_runs_not_of_one_that_exploded():
    def lm(method, value, error):
        made = {"perplexity": value, "loss_standard_error": error}
        return run(method=method, headline="perplexity", higher_is_better=False, metrics=made, validation_examples=64)

    (setup,) = group([lm("adamw", 20.0, 0.06), lm("lomo", 1e4, 1.5)])
    widths = {row["method"]: row["half_width"] for row in rows.quality(setup)}
    assert widths["adamw"] == pytest.approx(20 * math.sinh(1.96 * 0.06), rel=1e-3)
    assert "64 (± 2.36)" in tables.render([*setup.finished("adamw").values(), *setup.finished("lomo").values()])


def test_methods_that_begin_with_a_changed_model_leave_the_floor_at_the_one_that_was_given():
    shared = {"headline": "perplexity", "higher_is_better": False, "metrics": {"perplexity": 6.0}}
    begun = {("adamw", 0): 5.8, ("lora", 0): 5.8, ("qlora", 0): 7.1, ("adamw", 1): 5.9, ("qlora", 1): 7.2}
    runs = [run(method=m, seed=s, **shared, initial_metrics={"perplexity": v}) for (m, s), v in begun.items()]
    assert "Before training: t0 perplexity 5.850." in tables.render(runs)
    assert floors.of(runs).score == pytest.approx(5.85)


def test_a_perplexity_is_paired_by_sequence_with_that_before_training_and_each_method_by_its_own_change():
    shared = {"headline": "perplexity", "higher_is_better": False, "initial_metrics": {"perplexity": 470.0}}
    made = {"perplexity": 460.0, "loss_standard_error": 0.05}
    runs = [
        run(method=method, metrics=made | {"loss_change_standard_error": error}, **shared)
        for method, error in (("adamw", 0.005), ("badam", 0.02))
    ]
    text = tables.render(runs)
    assert "Not better than before training on t0 (470.00 ± 11.37): badam." in text
    several, alone = (" ".join(one.split()) for one in (text, tables.render(runs[:1])))
    assert "(95%), on average of the methods" in several and "on average of the methods" not in alone


def test_the_average_has_the_mean_floor_and_as_little_noise_as_independent_tasks():
    runs = [run(task, m, s, 0.52, **SHARE) for task in range(4) for m in ("adamw", "badam") for s in (0, 1)]
    assert "on average (0.500 ± 0.029)" in tables.render(runs)  # .0589 / sqrt(4)


def test_records_that_know_no_floor_are_ranked_as_they_are():
    runs = seeds_of("adamw", [0.5, 0.51, 0.52]) + seeds_of("badam", [0.1, 0.11, 0.12])
    texts, best = everything_said(runs)
    assert best["score"] == "adamw" and not any("floor" in text or "chance" in text.lower() for text in texts[:3])


@pytest.mark.parametrize(
    ("name", "model"), [("superglue/copa", "roberta-tiny"), ("c4", "llama-tiny"), ("instruct", "llama-tiny")]
)
def test_every_task_knows_its_floor_and_its_examples(name, model):
    given = {"batch_size": 2, "sequence_length": 64, "seed": 0, "dtype": "float32"}
    task = tasks.create(name, data="demo", model=f"config:{model}", **given)
    assert isinstance(task, tasks.HasValidation)
    if name == "superglue/copa":
        first = sum(choice.right == (0,) for choice in task.data.validation) / 300
        assert task.validation_size == 300 and task.constant_score == pytest.approx(max(first, 1 - first))
    else:
        assert task.validation_size == len(task.validation) and task.constant_score == len(task.tokenizer)


@pytest.mark.parametrize("before", [{"constant_score": -0.2}, {"initial_metrics": {"r2": -0.3}}])
def test_a_score_that_may_be_less_than_nothing_is_no_share(before):
    """Of R² nobody knows how far few examples take it: there is a floor, and no width of it."""
    runs = seeds_of("adamw", [0.6, 0.62], headline="r2", validation_examples=100, **before)
    runs = [one | {"metrics": {"r2": one["metrics"]["accuracy"]}} for one in runs]
    text = tables.render(runs)
    assert "floor     -0." in text and "adamw     0.610 ± 0.014 (2)*\n" in text and "examples  100\n" in text
    assert text.endswith("\nfloor: guessing, or the model before training if that is better.")


@pytest.mark.parametrize("count", range(2, 30))
def test_more_seeds_are_said_to_see_less(count):
    steady, scattered = [0.5] * count, [0.5 + 0.01 * (-1) ** step for step in range(count)]
    for pair in ([steady, scattered], [scattered, scattered]):
        found = sight(*pair)
        assert found.more > count and found.then < found.least


# What the intervals and the powers promise


def covered(shares, examples, draws, rng):
    """How often the interval of a share holds the truth."""
    truths = [rng.choice(shares) for _ in range(draws)]
    found = [wilson(sum(rng.random() < p for _ in range(examples)) / examples, examples) for p in truths]
    return sum(low <= p <= high for p, (low, high) in zip(truths, found, strict=True)) / draws


def covered_perplexity(sequences, draws, rng):
    """The same of the perplexity of sequences of unequal lengths, whose losses differ."""
    held = 0
    for _ in range(draws):
        counts = [rng.randint(8, 64) for _ in range(sequences)]
        sums = [count * (3 + rng.gauss(0, 0.5)) for count in counts]
        made = {"perplexity": math.exp(sum(sums) / sum(counts)), "loss_standard_error": standard_error(sums, counts)}
        found = run(headline="perplexity", higher_is_better=False, metrics=made)
        held += abs(made["perplexity"] - math.exp(3)) <= floors.half_width(math.exp(3), [found], [found])
    return held / draws


def changed(sequences, draws, rng, change=0.0):
    """How often training that changes the loss by `change` is called better and worse than before, by chance alone."""
    better = worse = 0
    for _ in range(draws):
        counts = [rng.randint(8, 64) for _ in range(sequences)]
        before = [count * (3 + rng.gauss(0, 0.5)) for count in counts]
        after = [one + count * rng.gauss(change, 0.1) for one, count in zip(before, counts, strict=True)]
        errors = {
            "loss_standard_error": standard_error(after, counts),
            "loss_change_standard_error": standard_error([a - b for a, b in zip(after, before, strict=True)], counts),
        }
        first, last = (math.exp(sum(sums) / sum(counts)) for sums in (before, after))
        made = {"metrics": {"perplexity": last, **errors}, "initial_metrics": {"perplexity": first}}
        runs = [run(headline="perplexity", higher_is_better=False, constant_score=512.0, **made)]
        floor = floors.of_row(floors.of(runs), runs)
        better += floor.beaten_by(last)
        worse += floor.beaten_by(first * first / last)  # as far on the other side
    return better / draws, worse / draws


def power(deviation, draws, rng):
    """How often six seeds of each see what two said that they would."""
    pairs = [[0.0, deviation * 2**0.5]] * 2  # two seeds with that deviation
    then = sight(*pairs).then
    seen = 0
    for _ in range(draws):
        one, other = ([rng.gauss(mean, deviation) for _ in range(6)] for mean in (0, then))
        found = sight(one, other)
        seen += abs(statistics.fmean(one) - statistics.fmean(other)) > found.least
    return seen / draws


def test_the_intervals_hold_about_what_they_say():
    rng = random.Random(0)
    assert 0.91 < covered([0.5, 0.7, 0.9], 36, 600, rng) < 0.99
    assert 0.91 < covered_perplexity(48, 300, rng) < 0.99
    assert 0.74 < power(0.02, 600, rng) < 0.86
    better, worse = changed(48, 400, rng)
    assert 0.02 < better + worse < 0.09
    assert changed(48, 50, rng, change=-0.05)[0] > 0.8  # a fifth of that is what a perplexity alone leaves to chance


@pytest.mark.slow
@pytest.mark.parametrize("examples", [36, 56, 277, 1000])
def test_95_percent_intervals_hold_the_truth_in_93_to_97_percent(examples):
    rng = random.Random(1)
    shares = [0.5 + 0.01 * step for step in range(46)]
    of_shares, of_losses = covered(shares, examples, 20_000, rng), covered_perplexity(examples, 4000, rng)
    print(f"\n{examples} examples: Wilson {of_shares:.1%}, perplexity {of_losses:.1%}")
    assert 0.93 <= of_shares <= 0.97 and 0.93 <= of_losses <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [36, 277])
def test_what_training_did_not_change_is_called_changed_in_about_5_percent(sequences):
    better, worse = changed(sequences, 8000, random.Random(3))
    print(f"\n{sequences} sequences: better {better:.1%}, worse {worse:.1%}")
    assert 0.015 <= better <= 0.035 and 0.015 <= worse <= 0.035


@pytest.mark.slow
def test_six_seeds_see_what_they_are_said_to_see_in_four_cases_of_five():
    seen = power(0.02, 20_000, random.Random(2))
    print(f"\n6 seeds: {seen:.1%}")
    assert 0.78 <= seen <= 0.82


def test_of_many_methods_of_one_seed_that_guess_hardly_ever_one_is_above_chance():
    rng, wrong = random.Random(0), 0
    for _ in range(60):
        right = [sum(rng.random() < 0.5 for _ in range(100)) for _ in range(20)]
        runs = [
            run(method=f"m{n}", score=count / 100, constant_score=0.5, validation_examples=100)
            for n, count in enumerate(right)
        ]
        wrong += "no method is above chance" not in studies.recommend(runs, ())[0]
    assert wrong / 60 <= 0.1  # 42 % by the margin of a single method
    said = " ".join(tables.render(runs).split())
    assert "(95%), of several methods with one seed any of theirs." in said and "floor 0.500 ± 0.151" in said
    assert "any of theirs" not in " ".join(tables.render(runs[:1]).split())
