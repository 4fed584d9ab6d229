"""Settings: four layers, one meaning for each key, and a clear refusal of everything else."""

import os
from typing import Literal

import pytest

from membench.config.declare import declared
from membench.config.defaults import hyperparameters
from membench.config.errors import UserError
from membench.config.options import TrainingOptions
from membench.config.profiles import FAMILIES, SUPERGLUE, note
from membench.config.settings import resolve
from membench.config.units import steps_of
from membench.config.values import convert, parse


def config(tmp_path, text: str) -> str:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return str(path)


def test_the_command_line_wins_over_the_file_over_the_profile_over_the_defaults(tmp_path):
    file = config(tmp_path, 'steps = 7\nbatch-size = 3\ndata = "folder"\n')
    settings = resolve({"batch_size": 5}, file)
    assert settings.batch_size == 5
    assert (settings.steps, settings.data) == (7, "folder")
    assert settings.schedule == "linear" and resolve({}).sequence_length == SUPERGLUE["demo"].values["sequence_length"]
    assert settings.checkpoint_every == 500


def test_the_profile_can_come_from_the_file(tmp_path):
    settings = resolve({}, config(tmp_path, 'profile = "paper"'))
    assert (settings.batch_size, settings.epochs, settings.data) == (16, 32.0, "hub")
    assert settings.hyperparameters["badam"] == {"lr": 1e-5, "weight_decay": 0.01, "switch_every": 100}


def test_what_is_not_a_result_at_scale_says_so():
    demo = SUPERGLUE["demo"].values
    assert "not a result about the methods at scale" in note(["superglue"], "demo", demo["model"], demo["data"])
    assert "made-up" not in note(["superglue"], "demo", demo["model"], "folder")


def test_a_comparison_is_of_one_family_of_tasks():
    with pytest.raises(UserError, match="superglue and other belong to different task families"):
        resolve({"task": "superglue/rte,other"})
    assert resolve({"task": "mine/one,mine/two"}).steps == SUPERGLUE["demo"].values["steps"]


def test_epochs_count_their_steps_in_the_decimals_in_which_they_are_written():
    assert [steps_of(1.1, 10, 1), steps_of(0.07, 100, 1), steps_of(0.14, 100, 2)] == [11, 7, 7]
    assert [steps_of(1.0, 950, 4), steps_of(1.0, 952, 4), steps_of(0.001, 10, 4)] == [238, 238, 1]


def test_steps_replace_the_epochs_of_a_lower_layer():
    settings = resolve({"profile": "paper", "steps": 3})
    assert (settings.steps, settings.epochs) == (3, None)
    with pytest.raises(UserError, match="either steps or epochs"):
        resolve({"steps": 3, "epochs": 1.0})


def test_hyperparameters_are_merged_one_by_one(tmp_path):
    file = config(tmp_path, "[badam]\nswitch_every = 20\nlr = 2e-5\n")
    settings = resolve({"profile": "paper", "hyperparameters": ["badam.lr=3e-5", "weight_decay=0"]}, file)
    assert settings.hyperparameters["badam"] == {"lr": 3e-5, "switch_every": 20}  # no decay: the command line's word
    assert settings.hyperparameters["*"] == {"weight_decay": 0}


def test_the_options_of_a_task_come_from_the_command_line_over_the_file(tmp_path):
    file = config(tmp_path, "[options]\npacking = false\nanswer_tokens = 9\n")
    settings = resolve({"task": "instruct", "options": ["packing=true"]}, file)
    assert settings.options == {"packing": True, "answer_tokens": 9}
    with pytest.raises(UserError, match=r"--option packing: write KEY=VALUE"):
        resolve({"options": ["packing"]})
    with pytest.raises(UserError, match="options must be a table"):
        resolve({}, config(tmp_path, "options = 3"))


def test_a_profile_may_differ_by_model():
    paper = resolve({"task": "c4", "profile": "paper"})
    larger = resolve({"task": "c4", "profile": "paper", "model": "config:llama-1b"})
    # GaLore, Table 2: steps and ranks by size; 512 sequences of 256 tokens, cosine to a tenth
    assert (paper.model, paper.steps, paper.hyperparameters["galore"]["rank"]) == ("config:llama-60m", 10_000, 128)
    assert (larger.steps, larger.hyperparameters["galore"]["rank"]) == (100_000, 512)
    assert (larger.batch_size, larger.sequence_length, larger.final_fraction) == (512, 256, 0.1)
    assert "GaLore's protocol" in note(["c4"], "paper", "config:llama-1b", "hub")


def test_a_users_own_method_can_be_set():
    given = resolve({"hyperparameters": ["mypackage.module:MyMethod.lr=0.1"]}).hyperparameters
    assert given["mypackage.module:MyMethod"] == {"lr": 0.1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"learning_rate": -1e-3}, "--learning-rate must be finite and at least 0, not -0.001"),
        ({"learning_rate": float("nan")}, "--learning-rate must be finite and at least 0, not nan"),
        ({"batch_size": -1}, "--batch-size must be at least 1, not -1"),
        ({"threads": 0}, "--threads must be at least 1 and below 10000, not 0"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm must be finite and more than 0, not 0.0"),
        ({"evaluate_every": 0}, "--evaluate-every must be at least 1, not 0"),
        ({"warmup_fraction": 1.0}, "--warmup-fraction must be at least 0 and below 1"),
        ({"checkpoint_every": -5}, "--checkpoint-every must be at least 0, not -5"),
        ({"dtype": "float64"}, "--dtype must be one of float32, bfloat16, not 'float64'"),
        ({"autocast": "float16"}, "--autocast must be one of bfloat16 or none, not 'float16'"),
        ({"profile": "papr"}, "Did you mean 'paper'"),
        ({"seeds": "0,x"}, "--seeds must be a list of whole numbers, not '0,x'"),
        ({"seeds": "-1"}, "--seeds must be at least 0 and below 2147483648, not -1"),
        ({"optimizers": ","}, "--optimizers is empty: give at least one"),
        ({"gradient_accumulation_steps": 3}, "--batch-size 16 .* can't be split into 3"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_it_must_be(given, message):
    with pytest.raises(UserError, match=message):
        resolve(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "unknown key 'stepz'. Did you mean 'steps'?"),
        ('steps = "many"', "steps must be a whole number or none, not 'many'"),
        ("steps = 2.5", "steps must be a whole number or none, not 2.5"),
        ("steps = true", "steps must be a whole number or none, not True"),
        ("steps = ", "not valid TOML"),
        ("hyperparameters = 3", "unknown key 'hyperparameters'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        resolve({}, config(tmp_path, text))
    assert "settings.toml" in str(error.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"--config nowhere\.toml: can't be read: No such file"):
        resolve({}, "nowhere.toml")


@pytest.mark.parametrize("text", ["badam", "badam.lr", "=3", "badam.=3", "lr 3"])
def test_an_assignment_without_key_or_value_is_refused(text):
    with pytest.raises(UserError, match=r"write METHOD\.KEY=VALUE"):
        resolve({"hyperparameters": [text]})


def test_an_output_folder_must_be_able_to_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            resolve({"out": str(path)})
    assert resolve({"out": str(tmp_path / "new" / "folder")}).out
    assert not (tmp_path / "new").exists()


def test_an_output_folder_must_be_writable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # to root nothing is forbidden
    with pytest.raises(UserError, match="no permission to write"):
        resolve({"out": str(tmp_path / "new")})


@pytest.mark.parametrize(
    ("text", "value"),
    [("50", 50), ("1e-5", 1e-5), (".1", 0.1), ("True", True), ("false", False), ("none", None), ("random", "random")]
    + [("0.9,0.95", (0.9, 0.95)), ("[1, 2]", [1, 2]), ("a.b,c", "a.b,c"), ("'5'", "5"), ("-1", -1)],
)
def test_text_means_the_value_that_it_looks_like(text, value):
    assert parse(text) == value
    assert type(parse(text)) is type(value)


@pytest.mark.parametrize(
    ("value", "annotation", "converted"),
    [
        (1, float, 1.0),
        (None, int | None, None),
        (3, int | None, 3),
        ([0.9, 1], tuple[float, float], (0.9, 1.0)),
        ("head", tuple[str, ...], ("head",)),
        ("head, norm", tuple[str, ...], ("head", "norm")),
        ("0,1", tuple[int, ...], (0, 1)),
        ("a", Literal["a", "b"], "a"),
        ("all-linear", str | tuple[str, ...], "all-linear"),
        (1, float | tuple[float, float], 1.0),
    ],
)
def test_a_value_becomes_what_the_annotation_wants(value, annotation, converted):
    result = convert(value, annotation)
    assert result == converted
    assert type(result) is type(converted)


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        ("x", int, "a whole number"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        (1, bool, "true or false"),
        (2.5, int | None, "a whole number or none"),
        ((0.9,), tuple[float, float], "2 values"),
        (("a", 1), tuple[str, ...], "a list of texts"),
        ("c", Literal["a", "b"], "one of a, b"),
    ],
)
def test_a_value_that_does_not_fit_is_told_what_it_must_be(value, annotation, words):
    with pytest.raises(TypeError, match=words):
        convert(value, annotation)


def values(method, given=None, **settings):
    defaults = {"learning_rate": None, "seed": 0, "from_scratch": False, "head": ("classifier",)}
    return hyperparameters(method, given or {}, **{**defaults, **settings})


def test_a_learning_rate_comes_from_the_method_over_all_methods_over_the_table():
    assert values("badam")["lr"] == 2e-5
    assert values("badam", from_scratch=True)["lr"] == 8e-4
    assert [values("badam", from_scratch=True, kind=k)["lr"] for k in ("classification", "language")] == [8e-4, 2e-3]
    assert values("adamw", kind="language")["lr"] == values("adamw")["lr"] == 2e-5
    assert values("badam", learning_rate=3e-4)["lr"] == 3e-4
    assert values("badam", {"*": {"lr": 4e-4}}, learning_rate=3e-4)["lr"] == 4e-4
    assert values("badam", {"badam": {"lr": 5e-4}, "*": {"lr": 4e-4}})["lr"] == 5e-4


def test_lomo_is_clipped_where_it_fine_tunes_a_language_model_unless_asked_otherwise():
    def clipped(given=None, **settings):
        made = values("lomo", given and {"lomo": given}, **{"kind": "language", **settings})
        return made["clip_norm"], made["clip_value"]

    assert clipped() == (1.0, None)
    assert clipped({"clip_norm": 0.5}) == (0.5, None)
    assert clipped({"clip_norm": None}) == clipped({"clip_norm": "none"}) == (None, None)
    assert clipped({"clip_value": 0.1}) == (None, 0.1)
    assert clipped({"clip_value": None}) == clipped({"clip_value": "none"}) == (1.0, None)
    assert clipped(from_scratch=True) == clipped(kind="classification") == clipped(kind="preference") == (None, None)


def test_pretrained_models_narrower_than_512_get_larger_rates_and_random_weights_do_not():
    assert [values("adamw", width=width)["lr"] for width in (384, 511, 512, 1024, None)] == [
        6e-5,
        6e-5,
        2e-5,
        2e-5,
        2e-5,
    ]
    assert [values("badam", width=width)["lr"] for width in (384, 1024)] == [6e-4, 2e-5]
    assert values("badam", width=384, from_scratch=True)["lr"] == values("badam", from_scratch=True)["lr"]
    assert [values("muon", width=width)["adamw_lr"] for width in (384, 1024)] == [6e-5, 2e-5]
    assert values("badam", {"badam": {"lr": 5e-4}}, width=384)["lr"] == 5e-4


def test_a_variant_may_have_defaults_of_its_own_however_it_is_chosen():
    for method, given in (("lora:variant=vera", {}), ("lora", {"lora": {"variant": "vera"}})):
        assert [values(method, given)[key] for key in ("lr", "rank")] == [4e-3, 256]
    assert values("lora:variant=vera:rank=8:lr=0.1")["rank"] == 8
    assert [values("lora:variant=dora")[key] for key in ("lr", "rank")] == [2e-4, 8]


def test_random_weights_have_their_embeddings_trained_unless_told_otherwise():
    assert values("badam")["train_embeddings"] is False
    assert values("badam", from_scratch=True)["train_embeddings"] is True
    assert values("badam", {"badam": {"train_embeddings": False}}, from_scratch=True)["train_embeddings"] is False


def test_a_new_head_is_always_trained_whatever_else_is():
    assert values("badam")["always_train"] == ("classifier",)
    assert values("badam", {"badam": {"always_train": ("pooler",)}})["always_train"] == ("classifier", "pooler")
    assert "always_train" not in values("adamw")


def test_values_in_a_methods_name_are_read_like_others():
    assert values("badam:always_train=norm", head=())["always_train"] == ("norm",)
    assert values("badam:always_train=a,b")["always_train"] == ("classifier", "a", "b")
    rate = values("badam:lr=1")["lr"]
    assert rate == 1 and isinstance(rate, float)
    with pytest.raises(UserError, match=r"badam.switch_every must be a whole number, not 5\.5"):
        values("badam:switch_every=5.5")


def test_the_seed_reaches_the_methods_that_draw():
    assert values("badam", seed=5)["seed"] == 5
    assert "seed" not in values("adamw", seed=5)


def test_hyperparameters_must_exist_and_have_the_right_type():
    with pytest.raises(ValueError, match="Did you mean 'switch_every'"):
        values("badam", {"badam": {"switch_evry": 3}})
    with pytest.raises(UserError, match="badam.switch_every must be a whole number, not 'often'"):
        values("badam", {"badam": {"switch_every": "often"}})
    assert "switch_every" not in values("adamw", {"*": {"switch_every": 3}})


@pytest.mark.parametrize("profile", ["demo", "paper"])
def test_what_is_said_of_all_methods_replaces_what_a_profile_says_of_one(profile):
    given = {"profile": profile, "learning_rate": 3e-4}
    settings = resolve({**given, "hyperparameters": ["weight_decay=0.5", "badam.lr=7e-4"]})
    for method in ("adamw", "blockllm"):
        assert not {"lr", "weight_decay"} & set(settings.hyperparameters.get(method, {}))
    assert settings.hyperparameters["badam"]["lr"] == 7e-4
    assert settings.hyperparameters["*"] == {"weight_decay": 0.5} and settings.learning_rate == 3e-4


def test_the_help_names_the_families_whose_schedule_is_cosine():
    said = declared(TrainingOptions)["schedule"].option.help
    cosine = [name for name in FAMILIES if resolve({"task": name}).schedule == "cosine"]
    names = f"{', '.join(cosine[:-1])} and {cosine[-1]}"
    assert said == f"linear, cosine or constant; by default linear, for {names} cosine."
