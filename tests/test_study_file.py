"""A study's file: what it may say, the same budget for all, and a sentence for each mistake."""

import pytest

from membench.config.errors import UserError
from membench.config.study_file import beyond, load, parse_shard

GOOD = """
optimizers = "badam,blockllm"
task = "superglue/cb"
seeds = [0, 1]
models = ["config:roberta-tiny", "config:gpt2-tiny"]
memory = ["60MiB", "8GiB"]

[tune]
lr = [1e-4, 1e-3, 1e-2, 1e-1]
budget = 4

[badam]
weight_decay = 0.1
tune = {lr = [1e-3, 1e-2, 1e-1], switch_every = [5, 10, 20]}
"""


def read(tmp_path, text, **given):
    path = tmp_path / "study.toml"
    path.write_text(text)
    return load(str(path), given)


def test_a_study_is_a_comparison_for_each_model_with_grids_beside_it(tmp_path):
    study = read(tmp_path, GOOD, out="there")
    assert [settings.model for settings in study.settings] == ["config:roberta-tiny", "config:gpt2-tiny"]
    assert study.settings[0].out == "there" and study.settings[0].hyperparameters["badam"]["weight_decay"] == 0.1
    assert (study.budget, study.tuning_seed, study.memory_bytes) == (4, 2, (60 << 20, 8 << 30))


def test_every_method_gets_the_same_number_of_trials(tmp_path):
    study = read(tmp_path, GOOD)
    assert study.trials("blockllm") == [{"lr": rate} for rate in (1e-4, 1e-3, 1e-2, 1e-1)]
    trials = study.trials("badam")  # 4 of 9 points, that have all values
    assert (
        len(trials) == 4
        and {t["lr"] for t in trials} == {1e-3, 1e-2, 1e-1}
        and {t["switch_every"] for t in trials} == {5, 10, 20}
    )
    assert trials == study.trials("badam")


def test_values_may_be_chosen_on_other_data_than_is_scored(tmp_path):
    assert read(tmp_path, GOOD).tuning_data is None
    assert read(tmp_path, GOOD.replace("budget = 4", 'budget = 4\ndata = "apart"')).tuning_data == "apart"
    with pytest.raises(UserError, match=r"tune\.data must be a file or folder in the task's format, not 3"):
        read(tmp_path, GOOD.replace("budget = 4", "budget = 4\ndata = 3"))


def test_methods_that_share_a_grid_try_the_same_points_of_it(tmp_path):
    study = read(tmp_path, GOOD.replace("budget = 4", "budget = 2"))
    assert study.trials("blockllm") == study.trials("lora") == study.trials("lora:rank=4") != []
    assert len({study.trials("galore")[0]["lr"], study.trials("galore")[1]["lr"]}) == 2


def test_a_grid_smaller_than_the_budget_leaves_trials_for_beyond_its_edge_or_is_refused(tmp_path):
    study = read(tmp_path, GOOD.replace("budget = 4", "budget = 5"))
    assert len(study.trials("blockllm")) == 4
    study = read(tmp_path, GOOD.replace("lr = [1e-4, 1e-3, 1e-2, 1e-1]", "lr = [1e-4, 1e-3]"))
    with pytest.raises(UserError, match="blockllm: its grid has 2 points, but each method is tuned with 4 trials"):
        study.trials("blockllm")


@pytest.mark.parametrize(
    ("values", "best", "further"),
    [
        ([1e-4, 1e-3, 1e-2], 1e-2, 0.1),
        ([1e-4, 1e-3, 1e-2], 1e-4, 1e-5),
        ([1e-4, 1e-3, 1e-2], 1e-3, None),
        ([50, 100, 200], 200, 400),
        ([50, 100, 200], 50, 25),
        ([0.0, 0.1, 0.2], 0.2, 0.3),
        ([1, 2, 3], 1, None),  # half of it, rounded
        ([1e-4, 1e-3], 1e-3, None),
        (["ascending", "random"], "random", None),
    ],
)
def test_a_choice_at_the_edge_is_moved_one_step_beyond(values, best, further):
    tried = [{"order": "random", "lr": value} for value in values]
    chosen = beyond(tried, {"order": "random", "lr": best})
    assert chosen == (None if further is None else {"order": "random", "lr": further})


def test_a_method_with_nothing_to_tune_is_refused(tmp_path):
    study = read(tmp_path, GOOD.replace("lr = [1e-4, 1e-3, 1e-2, 1e-1]\n", ""))
    with pytest.raises(UserError, match=r"blockllm has nothing to tune: add tune = .* to \[blockllm\]"):
        study.trials("blockllm")


def test_without_tune_nothing_is_tuned(tmp_path):
    assert read(tmp_path, "task = 'superglue/cb'\n").budget == 0


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("budget = 4", "", "tune needs both values to try and a budget"),
        ("budget = 4", "budget = 'x'", "tune.budget must be a whole number of at least 0, not 'x'"),
        ("budget = 4", "budget = 4\nseed = 1", "tune.seed 1 is one of the seeds that count"),
        ("lr = [1e-4, 1e-3, 1e-2, 1e-1]", "lr = 1e-3", "tune.lr must be a list of values to try, not 0.001"),
        ("tune = {lr", "tune = {budget = 3, lr", "badam.tune.budget must be the same for all methods"),
        ("memory = [", "memory = ['x', ", "memory: x: give a number and a unit"),
        ("memory = [", "memory = ['24', ", "memory: 24 is only 24 bytes: give a unit, such as 24GiB"),
        ("memory = [", "memory = [8, ", "memory: 8 is only 8 bytes: give a unit, such as 24GiB"),
        ("lr = [1e-4, 1e-3,", "lr = [1e-4, 0.0001,", "tune.lr has 0.0001 twice: give each value once"),
        ("models = [", "model = 'x'\nmodels = [", "give either model or models, not both"),
        ("seeds = ", "sedes = ", "unknown key 'sedes'. Did you mean 'seeds'?"),
        ("optimizers", "= 1", "not valid TOML"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_file(tmp_path, old, new, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert words in str(caught.value) and str(tmp_path / "study.toml") in str(caught.value)


def test_a_shard_is_one_of_so_many_parts():
    assert parse_shard("2/8") == (2, 8)
    for text in ("0/8", "9/8", "2", "a/b", "/"):
        with pytest.raises(UserError, match=f"--shard {text}: write PART/PARTS"):
            parse_shard(text)
