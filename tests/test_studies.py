"""The studies in the repository: their pages are what their records say, and small."""

import json
import re
from typing import Any

import pytest
from reports_factory import make_record

from membench.config.defaults import LEARNING_RATES
from membench.config.study_file import load
from reports.record import read
from reports.setups import group, heading
from studies import data, gradients, pages, rates, records, seeds
from tasks.c4.corpus import Documents


def test_no_page_is_stale():
    assert pages.stale() == [], "make them again: make studies"


@pytest.mark.parametrize("study", pages.all_studies(), ids=lambda study: study.name)
def test_a_study_says_of_its_model_as_many_weights_as_its_records(study):
    said = re.findall(r"([\d.]+)M\s+weights", study.words["asked"])
    assert set(said) <= {f"{run['parameters'] / 1e6:.1f}" for run in study.finals}


def test_all_records_together_are_small():
    found = list(pages.HERE.rglob("*.json"))
    assert found and sum(path.stat().st_size for path in found) < 8_000_000


@pytest.mark.parametrize("path", sorted(pages.HERE.rglob("*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_study_file_is_one(path):
    if path.name != "words.toml":
        assert load(str(path), {}).settings


def test_packed_records_are_records_with_fewer_points(tmp_path):
    record = make_record()
    entry = {**record["history"][0], "metrics": None}
    history = [{**entry, "step": n, "loss": 1 / 3} for n in range(1, 1001)]
    history[500]["gradient_norm"] = 0.123456789
    history[-1]["metrics"] = record["metrics"]
    (tmp_path / "one.json").write_text(json.dumps({**record, "history": history}))
    found = records.unpack(records.pack([tmp_path], tmp_path / "out" / "records.json"))
    kept = found[0]["history"]
    assert 30 <= len(kept) <= 35 and kept[-1]["step"] == 1000
    assert kept[0]["loss"] == 0.333333
    assert next(one for one in kept if one["step"] == 501)["gradient_norm"] == 0.123457
    assert {**found[0], "history": 0} == {**record, "history": 0}, "the rest is as it was"
    assert records.unpack(tmp_path / "none.json") == []


def test_what_is_no_record_is_not_packed(tmp_path):
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(ValueError, match=r"one\.json: schema version None is unknown"):
        records.pack([tmp_path], tmp_path / "records.json")


def tracked(seed: int, batch_size: int, norms: list[float]) -> dict:
    record = make_record(seed=seed)
    entry = record["history"][0]
    history = [{**entry, "step": step, "gradient_norm": norm} for step, norm in enumerate(norms, 1)]
    training = {**record["training"], "batch_size": batch_size, "track": "gradient_norm"}
    return {**record, "training": training, "history": history}


def test_the_level_of_a_gradient_is_its_mean_over_the_last_quarter_for_each_batch_size():
    runs = [
        tracked(0, 4, [9, 9, 9, 9, 9, 9, 2, 4]),
        tracked(1, 4, [9, 9, 9, 9, 9, 9, 4, 6]),
        tracked(0, 16, [8, 8, 8, 1]),
    ]
    found = gradients.levels(runs)
    assert found == {runs[0]["method"]: {4: [3, 5], 16: [1]}}
    assert gradients.table(found).cells == [[runs[0]["method"], "4.000 ± 1.414 (2)", "1.000 (1)"]]
    assert gradients.levels([make_record()]) == {}


def test_the_answer_names_nobody_twice():
    levels = {"adamw": {4: [1.0]}, "badam": {4: [2.0]}, "lomo": {4: [3.0]}}
    (said,) = gradients.answer(levels)
    assert said.endswith("lowest adamw at 1.000 (1), highest lomo at 3.000 (1).")
    (said,) = gradients.answer(levels | {"adamw": {4: [2.5]}})
    assert said.endswith("lowest badam at 2.000 (1), highest lomo at 3.000 (1), beside them adamw at 2.500 (1).")


def test_the_answer_compares_the_smallest_batch_with_the_largest():
    levels = {"adamw": {4: [2.0, 4.0], 16: [9.0], 64: [1.5]}, "badam": {4: [4.0], 64: [3.0, 3.4]}, "lomo": {4: [1.0]}}
    said = gradients.answer(levels)[-1]
    assert said.startswith("Batch 64 ends at 0.50 (adamw) to 0.80 (badam) of batch 4's level;")
    assert said.endswith("that would be 0.25.")


def test_the_pages_show_what_the_records_hold():
    study = next(one for one in pages.all_studies() if one.name == "pretraining")
    text = pages.page(study)
    assert len(study.finals) == len(read(pages.HERE / "pretraining" / "records.json").records) >= 16
    for record in study.finals:
        assert f"| {record['method']} " in text
    assert "not run" in text, "what is missing is said"


def test_plots_of_two_data_sets_have_files_of_their_own():
    study = next(one for one in pages.all_studies() if one.name == "instruct")
    made = [
        {
            **one,
            "training": {**one["training"], "data": data},
            "environment": {**one["environment"], "data_sha256": data},
        }
        for data in ("a.json", "b.json")
        for one in study.finals
    ]
    both = study._replace(finals=[one for one in made if one["headline"] == "perplexity"])
    (first, files), (second, others) = pages.draw(both).items()
    assert "data: a.json" in first and "data: b.json" in second and len(files) == len(others) == 2
    assert not files.keys() & others.keys()
    assert all(f"({file})" in pages.page(both) for file in [*files, *others])


def test_texts_to_pretrain_on_are_made_as_the_studies_trained_on_them(shared_data, tmp_path, monkeypatch):
    """Whatever rules come later for files whose names say that they are held out."""
    monkeypatch.chdir(tmp_path)
    data.main([str(shared_data / name) for name in ("superglue", "pretrain", "instruct")])
    for name, folder in (("pretraining", "data/pretrain"), ("stochastic", "data/pretrain-apart")):
        (trained_on,) = {run["environment"]["data_sha256"] for run in read(pages.HERE / name / "records.json").records}
        assert Documents(folder).sha256 == trained_on, name


def test_a_ranking_that_hangs_on_one_seed_is_told():
    scores = {"badam": [0.9, 0.5, 0.5], "lora": [0.6, 0.6, 0.6], "sgd": [0.1, 0.1, 0.1]}
    runs = [
        make_record(method=method, seed=seed, metrics={"score": value}, headline="score")
        for method, by_seed in scores.items()
        for seed, value in enumerate(by_seed)
    ]
    assert list(seeds.ranking(runs)) == ["badam", "lora", "sgd"]
    assert seeds.survival(runs) == (
        "Leaving one seed out: badam stays first in 2 of 3 cases (otherwise lora); Kendall's tau between "
        "the ranking of 3 methods and the whole one is 0.33 to 1.00."
    )
    assert seeds.survival([run for run in runs if run["seed"] < 2]) is None
    alike = seeds.survival([{**run, "metrics": {"score": 0.5}} for run in runs])
    assert alike == "All methods score alike, so none is first.", "there is no ranking"


def test_of_methods_that_are_first_with_the_same_score_all_are_named_in_any_order():
    runs = [
        make_record(method=method, seed=seed, metrics={"accuracy": score + 0.2 * (method == "x" and seed == 0)})
        for method, score in (("badam", 0.8), ("adamw", 0.8), ("x", 0.75))
        for seed in range(3)
    ]
    for given in (runs, runs[::-1]):
        assert (seeds.survival(given) or "").startswith(
            "Leaving one seed out: x stays first in 2 of 3 cases (otherwise adamw and badam)"
        )
    tied = [{**run, "metrics": {"accuracy": 0.8 if run["method"] != "x" else 0.5}} for run in runs]
    assert (seeds.survival(tied) or "").startswith("Leaving one seed out: adamw and badam stay first in 3 of 3 cases;")
    lost = [run if run["seed"] == 0 else {**run, "status": "failed", "error": "it broke"} for run in tied]
    assert "stay first in 2 of 3 cases (otherwise none)" in (seeds.survival(lost) or "")


def test_a_ranking_is_of_one_set_up_and_of_methods_that_have_all_tasks_in_it():
    def of(method: str, seed: int, value: float, **changes: Any) -> dict:
        return make_record(method=method, seed=seed, metrics={"accuracy": value}, **changes)

    short = [of(method, seed, value) for method, value in (("badam", 0.9), ("lora", 0.6)) for seed in range(3)]
    long = [{**run, "training": {**run["training"], "steps": 200}, "metrics": {"accuracy": 0.7}} for run in short[3:]]
    told = pages._survivals([*short, *long])  # lora alone was trained for longer, which is no ranking
    assert told == [f"{'; '.join(heading(group(short)[0]))}: {seeds.survival(short)}"]
    once = [of(method, 0, 0.5, task="superglue/cb") for method in ("badam", "lora")]
    beside = [of("sgd", seed, 0.1) for seed in range(3)]  # in the ranking only where the others lack a task, too
    assert "ranking of 2 methods" in (seeds.survival([*short, *once, *beside]) or "")


def at_rate(lr: float, score: float, seed: int = 0, method: str = "badam", task: str = "superglue/cb") -> dict:
    record = make_record(seed=seed, method=method, task=task)
    metrics = {**record["metrics"], record["headline"]: score}
    return {**record, "hyperparameters": {**record["hyperparameters"], "lr": lr}, "metrics": metrics}


@pytest.mark.parametrize(
    ("means", "rate"),
    [
        ([0.5, 0.6, 0.55, 0.5], 2),
        ([0.5, 0.595, 0.6, 0.591], 3),  # three that can't be told apart: the middle one
        ([0.5, 0.6, 0.595, 0.5], 3),  # two: the larger
        ([0.6, 0.5, 0.601, 0.595], 4),  # not neighbours
        ([0.6, 0.5, 0.5, 0.5], 1),
        ([0.6, 0.6, 0.5, 0.55], 4),  # the same scores at two rates: those of an untrained model
    ],
)
def test_a_default_rate_is_the_best_on_average_over_tasks_or_the_middle_of_those_as_good(means, rate):
    tasks = (("superglue/cb", 0.1), ("superglue/rte", -0.1))
    trials = [at_rate(lr, mean + more, task=task) for lr, mean in enumerate(means, 1) for task, more in tasks]
    assert rates.chosen(trials) == {"badam": rate}


def test_the_defaults_of_narrow_models_are_those_that_the_encoders_trials_choose():
    found = rates.chosen(records.unpack(pages.HERE / "encoder" / "trials.json"))
    assert len(found) > 20
    for method, rate in found.items():
        assert rates.default(method) == rate, method


def test_how_far_a_default_rate_is_behind_the_best_is_told():
    default = LEARNING_RATES["badam"].narrow
    runs = [at_rate(lr, score, seed) for lr, score in ((default, 0.5), (1e-5, 0.56)) for seed in (0, 1)]
    found = rates.scores(runs)
    assert rates.behind("badam", found["badam"]) == pytest.approx(0.06)
    assert "0 of 1 methods" in rates.answer(found) and "badam by 6.0 points" in rates.answer(found)
    (row,) = rates.table(found).cells
    assert row[:2] == ["badam", f"{default:g}"] and row[3:5] == ["1e-05", "6.0"]
    assert rates.answer(rates.scores(runs[:2])).startswith("At their default 1 of 1 methods score within 5 points")
