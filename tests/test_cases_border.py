"""Cases of the border where errors become sentences, and of settings that were passed over in silence."""

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from operator import itemgetter

import pytest
from architectures import ARCHITECTURES
from letters import folder, labelled, letters
from reports_factory import make_failure, make_record
from test_cli import ROOT, call

import membench
from membench.config import errors
from membench.config.errors import UserError, about_file
from membench.config.settings import resolve
from membench.config.study_file import load
from membench.planning.blueprint import Blueprint
from membench.planning.planner import method_values
from membench.planning.workload import Workload
from membench.runs import compare as compare_module
from membench.runs import processes
from membench.runs.prepare import prepare
from membench.runs.run_folder import Folder
from membench.training import checkpoint
from reports import record, tables

CB = ("--task", "superglue/cb", "--optimizers", "badam", "--steps", "2", "--threads", "1", "--dry-run")


def expect_a_sentence(result, *words, code=2):
    got, _, said = result
    assert got == code, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    for word in words:
        assert word in said, said


def toml(tmp_path, text):
    path = tmp_path / "file.toml"
    path.write_text(text)
    return str(path)


# ---- N12: settings that were passed over in silence


@pytest.mark.parametrize("option", ["--save", "--out", "--config", "--data", "--model", "--profile"])
@pytest.mark.parametrize("blank", ["", " "])
def test_n12_an_option_without_text_is_named(option, blank):
    expect_a_sentence(call("compare", *CB, option, blank), f"{option} is empty")


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--model", "roberta-tiny", "--optimizers", ""),
        ("plan", "--model=", "--optimizers", "badam"),
        ("report", ""),
        ("check", "a", "b", "--only="),
        ("study", ""),
    ],
)
def test_n12_so_is_one_of_any_command(arguments):
    expect_a_sentence(call(*arguments), " is empty: give a value, or leave it out")


def test_n12_an_empty_text_in_a_file_is_named(tmp_path):
    path = toml(tmp_path, 'save = ""')
    expect_a_sentence(call("compare", *CB, "--config", path), path, "save is empty")


def test_n12_two_spellings_of_an_option_are_one_too_many(tmp_path):
    path = toml(tmp_path, "batch-size = 8\nbatch_size = 16")
    expect_a_sentence(call("compare", *CB, "--config", path), path, "batch_size is there twice")


@pytest.mark.parametrize("flag", ["--set", "--option"])
def test_n12_a_value_that_is_given_twice_is_not_guessed_at(flag):
    expect_a_sentence(call("compare", *CB, flag, "a=1", flag, "a=2"), flag, "given twice")


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("compare", ["--lr", "1e-3", "--learning-rate", "1e-4"], "--learning-rate/--lr is given 2 times: give it"),
        ("compare", ["--checkpointing", "--no-checkpointing"], "--checkpointing/--no-checkpointing is given 2 times"),
        ("plan", ["--gpus", "1", "--gpus", "2", "--gpus=3"], "--gpus is given 3 times"),
        ("report", ["a", "--format", "csv", "--format", "html"], "--format is given 2 times"),
        ("compare", ["--set", "badam.lr=1", "--set", "badam.lr=2"], "--set badam.lr is given twice"),
    ],
)
def test_n12_of_an_option_that_is_given_twice_the_last_one_does_not_win(command, given, words):
    expect_a_sentence(call(command, *given), words)


def test_n12_in_a_list_of_a_file_a_text_is_no_number(tmp_path):
    words = "file.toml: seeds must be a list of whole numbers, not [0, '1']"
    expect_a_sentence(call("compare", *CB, "--config", toml(tmp_path, 'seeds = [0, "1"]')), words)
    assert resolve({"seeds": "0,1"}).seeds == (0, 1)


@pytest.mark.parametrize("value", [1.7, -3.0])
def test_a_share_of_examples_is_between_0_and_1(value):
    for place in (
        {"metrics": {"accuracy": value}},
        {"initial_metrics": {"accuracy": value}},
        {"constant_score": value},
    ):
        with pytest.raises(
            ValueError, match=f"a.json: 'accuracy' in '{next(iter(place))}' is a share, between 0 and 1"
        ):
            record.check(make_record(**place), "a.json")
    record.check(make_record(task="mine:Task", metrics={"accuracy": value}), "a.json")  # whatever its scale is


def test_n12_a_name_twice_in_a_record_is_not_guessed_at(tmp_path):
    text = json.dumps(make_record())
    (tmp_path / "a.json").write_text(f'{text[:-1]}, "seed": 7}}')
    assert record.read(tmp_path).problems == [f"{tmp_path / 'a.json'}: an object has 'seed' twice."]


def test_a_mark_at_the_beginning_of_a_toml_file_is_no_character(tmp_path):
    path = toml(tmp_path, "\ufeffsteps = 3\nepochs = 1")
    expect_a_sentence(call("compare", "--config", path), "give either steps or epochs, not both")


def test_a_mark_at_the_beginning_of_a_record_is_no_character(tmp_path):
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(make_record()))
    assert record.read(tmp_path).records == [make_record()] and not record.read(tmp_path).problems


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("plan", "--model", "roberta-tiny", "--budget", "8"), "--budget"),
        (("report", ".", "--at-memory", "8"), "--at-"),
    ],
)
def test_w9_gigabytes_without_their_unit_are_not_taken_for_bytes(arguments, flag):
    expect_a_sentence(call(*arguments), flag, "8 is only 8 bytes: give a unit, such as 24GiB")


@pytest.mark.parametrize("command", [("plan", "--model", "roberta-tiny"), ("explore", "--models", "roberta-tiny")])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("rank=3", "--set rank: none of badam has"),
        ("lora.rnk=3", "lora has no hyper-parameter 'rnk'. Did you mean 'rank'"),
    ],
)
def test_n12_a_hyper_parameter_that_no_method_has_is_refused_by_whatever_plans(command, given, words, tmp_path):
    out = ("--out", str(tmp_path / "fit.html")) if command[0] == "explore" else ()
    expect_a_sentence(call(*command, "--optimizers", "badam", "--set", given, *out), words)


PLAN = ("plan", "--model", "roberta-tiny", "--optimizers", "sgd")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((*PLAN, "--against", "badam-table-2"), "--against doesn't use --model, --optimizers: "),
        ((*PLAN, "--why", "sgd", "--format", "json"), "--why doesn't use --format: "),
        ((*PLAN, "--why", "sgd", "--export", "trl"), "--why doesn't use --export: "),
        ((*PLAN, "--export", "trl", "--format", "json"), "--export doesn't use --format: "),
        ((*PLAN, "--attention", "flash"), "--attention must be one of sdpa, eager or none, not 'flash'"),
    ],
)
def test_n12_what_a_plan_would_not_use_is_refused(given, words):
    expect_a_sentence(call(*given), words)


STUDY = 'optimizers = ["badam"]\nreference = false\ntask = "superglue/cb"\nsteps = 2\nthreads = 1\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('save = "models"', "save: a study keeps no models"),
        ("[badam]\nlr = 1\ntune = {lr = [1, 2]}\n[tune]\nbudget = 1", "badam.lr has a value and is tuned"),
        ("[badam]\nlr = 1\n[tune]\nlr = [1, 2]\nbudget = 1", "badam.lr has a value and is tuned"),
        ("[tune]\nlr = [1, 2]\nbudget = 100000", "tune.budget must be at most"),
        ('[badam]\ntune = {lr = ["x"]}\n[tune]\nbudget = 1', "badam.lr must be a number, not 'x'"),
        ("[badam]\ntune = {nope = [1]}\n[tune]\nbudget = 1", "badam has no hyper-parameter 'nope'"),
        ("[badam]\ntune = {lr = [-1.0]}\n[tune]\nbudget = 1", "lr must be a finite number of at least 0"),
        (
            "[badam]\ntune = {lr = [1]}\n[lora]\ntune = {rank = [1]}\n[tune]\nbudget = 1",
            "[lora] has a tune that no method",
        ),
        ("[badam]\ntune = {lr = [1]}\n[tune]\nbudget = 1\nrank = [1]", "[tune] has values to try that no method"),
        ("seeds = [0, 1, 0]", "--seeds has 0 twice"),
        ('learning_rate = 0.1\n["*"]\nlr = 0.2', "the learning rate of all methods is given twice"),
        (
            "[badam]\ntune = {lr = [1]}\n[tune]\nbudget = 1\nseed = 2147483648",
            "tune.seed must be at most 2147483647, not 2147483648",
        ),
    ],
)
def test_n12_a_study_refuses_before_it_runs_what_it_would_pass_over_or_stop_at(tmp_path, text, words):
    expect_a_sentence(call("study", toml(tmp_path, STUDY + text), "--dry-run"), words)


def test_the_seed_of_tuning_is_none_of_the_seeds_even_if_the_largest_is_taken(tmp_path):
    tuned = f"{STUDY}[badam]\ntune = {{lr = [1]}}\n[tune]\nbudget = 1\n"
    for seeds, free in (("[0, 4]", 5), ("[0, 2147483647]", 1), ("[2147483647]", 0)):
        assert load(toml(tmp_path, f"seeds = {seeds}\n{tuned}"), {}).tuning_seed == free


@pytest.mark.parametrize(
    "given", [("plan", "--model", "llama-tiny", "--optimizers", "sgd"), ("compare", "--task", "c4", "--dry-run")]
)
def test_a_loss_has_no_more_pieces_than_tokens(given):
    sizes = ("--batch-size", "4", "--gradient-accumulation-steps", "2", "--sequence-length", "16")
    expect_a_sentence(call(*given, *sizes, "--loss-chunks", "33"), "--loss-chunks 33: 2 x 16 tokens have at most 32")
    assert call(*given, *sizes, "--loss-chunks", "32")[0] == 0


def test_n12_of_a_large_grid_only_what_is_tried_is_made(tmp_path):
    values = [n / 1000 for n in range(1, 1001)]
    study = load(
        toml(tmp_path, f"{STUDY}[tune]\nlr = {values}\nweight_decay = {values}\neps = {values}\nbudget = 3"), {}
    )
    points = study.trials("badam")
    assert len(points) == 3 and all(list(point) == ["lr", "weight_decay", "eps"] for point in points)
    huge = "".join(f"x{n} = {values}\n" for n in range(30))
    with pytest.raises(ValueError, match="can be drawn from"):
        load(toml(tmp_path, f"{STUDY}[tune]\nbudget = 3\n{huge}"), {}).trials("badam")


# ---- N4: what suits the demo alone


OF_THE_DEMO = {"badam": ("switch_every", 10), "blockllm": ("sparsity", 0.7), "lomo": ("clip_norm", 1.0)}


@pytest.fixture(scope="module")
def real_model(tmp_path_factory):
    return str(folder(tmp_path_factory.mktemp("models") / "bert", ARCHITECTURES["bert"].build(), letters()))


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """Texts of 9 to 99 letters, each a token, and one that is longer by far."""
    texts = [f"{'a' * (n % 91)} museum {n % 2}" for n in range(200)] + ["a" * 4000]
    return labelled(tmp_path_factory.mktemp("data") / "own.jsonl", texts)


def prepared(**given):
    return prepare(resolve({"optimizers": list(OF_THE_DEMO), "steps": 2, "threads": 1, "device": "cpu", **given}))


def test_n4_the_demo_has_its_own_values():
    runs = {run.method: run for run in prepared(task="superglue/cb")}
    assert all(runs[method].hyperparameters[key] == value for method, (key, value) in OF_THE_DEMO.items())
    assert runs["badam"].training.sequence_length == 32


def test_n4_they_reach_neither_a_real_model_nor_own_data_and_plan_has_the_same_ones(real_model, own_data):
    workload = Workload(model=real_model, batch_size=2, sequence_length=8)
    for given in ({"task": "superglue/cb", "model": real_model}, {"task": "classify", "data": own_data}):
        for run in prepared(**given)[1:]:
            key, value = OF_THE_DEMO[run.method]
            planned = method_values(Blueprint(workload), run.method, {})
            assert run.hyperparameters[key] == planned[key] != value
            if "model" in given:
                assert run.hyperparameters == planned


def test_n4_sequences_hold_nearly_all_texts_and_what_is_cut_is_said(real_model, own_data):
    run = prepared(task="classify", data=own_data, tokenizer=real_model, optimizers="badam")[0]
    assert 64 < run.training.sequence_length <= 128 and run.training.sequence_length % 32 == 0
    assert "0.6% of the texts are cut" in run.environment["notes"]
    short = prepared(task="classify", data=own_data, model=real_model, optimizers="badam")[0]
    assert short.training.sequence_length == 64  # all that this model takes
    asked = prepared(task="classify", data=own_data, tokenizer=real_model, optimizers="badam", sequence_length=40)[0]
    assert asked.training.sequence_length == 40


def test_n4_a_plan_is_of_no_longer_sequences_than_the_model_takes(real_model):
    code, output, _ = call("plan", "--model", real_model, "--optimizers", "lomo", "--dtype", "float32")
    assert code == 0 and "1 x 64 tokens" in output


# ---- T: tracebacks, and sentences that say too little


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch-size", "12345678901234567890"), ("--batch-size must be at most",)),
        (("--threads", "1" * 23), ("--threads must be at most",)),
        (("--steps", "abc"), ("--steps must be a whole number", "'abc'")),
        (("--log-to", "wand"), ("--log-to must be a list of some of tensorboard, trackio, wandb, mlflow or none",)),
        (("--epochs", "1e"), ("--epochs must be a number", "'1e'")),
        (("--optimizers", ".x:Y"), ("method '.x:Y'", "importing .x fails")),
        (("--task", "builtins:print"), ("task 'builtins:print' can't be made",)),
        (("--set", "badam.lr=1e999"), ("badam.lr must be finite",)),
        (("--set", "badam.lr=" + "9" * 400), ("badam.lr must be a number",)),
        (("--set", "badam.seed=" + "9" * 400), ("badam.seed must be finite",)),
        (("--out", "a" * 5000), ("--out 'aaa", "too long")),
        (("--set", "badam.lr=" + "[" * 5000), ("badam.lr must be a number",)),
    ],
)
def test_t_a_value_that_nothing_can_be_done_with_is_named(arguments, words):
    others = [one for pair in zip(CB[:-1:2], CB[1::2], strict=True) if pair[0] != arguments[0] for one in pair]
    expect_a_sentence(call("compare", *others, "--dry-run", *arguments), *words)


def test_t_a_table_in_place_of_an_option_is_no_method(tmp_path):
    path = toml(tmp_path, "[out]\na = 1")
    expect_a_sentence(call("compare", *CB, "--config", path), path, "out is an option and can't be a table")


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 5000, 'a = "\ud83d"'])
def test_t_a_file_that_is_no_toml_is_named(tmp_path, text):
    path = tmp_path / "file.toml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    expect_a_sentence(call("compare", *CB, "--config", str(path)), str(path), "not valid TOML")


MODULES = {
    "syntax": ("def", "SyntaxError"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "divides": ("1 / 0", "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("option", ["optimizers", "task"])
def test_t_a_users_module_that_fails_is_told_in_a_sentence(tmp_path, monkeypatch, name, option):
    code, words = MODULES[name]
    (tmp_path / f"module_that_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=rf"module_that_{name}.* fails: {words}"):
        prepare(resolve({"steps": 1, option: f"module_that_{name}:Thing"}))


def test_t_a_users_code_that_ends_the_process_is_told_in_a_sentence(monkeypatch):
    def die(*_, **__):
        return processes.Outcome("failed", error="the process ended early, with exit code 3", died=True)

    monkeypatch.setattr(processes, "call", die)
    expect_a_sentence(call("compare", *CB), "can't be prepared: the process ended early, with exit code 3")


OWN_TASK = """
class Task:
    name, headline, higher_is_better, from_scratch, train_size, head = "mine", "score", True, True, 10, ()
    def __init__(self, **given): {init}
    @property
    def provenance(self): {provenance}
    def build_model(self): {model}
    def batch(self, step): ...
    def loss(self, model, batch): ...
    def evaluate(self, model): ...
"""


@pytest.mark.parametrize(
    "fault", [{"init": "None.x"}, {"provenance": "1 / 0"}, {"model": "{}[1]"}, {"init": "raise SystemExit"}]
)
def test_t_what_a_users_task_throws_is_told_with_its_line(tmp_path, monkeypatch, fault):
    module = f"task_{abs(hash(str(fault)))}"
    whole = {"init": "pass", "provenance": "return {'data': 'x'}", "model": "pass", **fault}
    path = tmp_path / f"{module}.py"
    path.write_text(OWN_TASK.format(**whole))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises((ValueError, SystemExit)) as caught:
        prepare(resolve({"task": f"{module}:Task", "optimizers": "badam", "steps": 1, "threads": 1}))
    assert "raise SystemExit" in str(fault) or f"{path}:" in str(caught.value)


@pytest.mark.parametrize("option", ["optimizers", "task"])
def test_t_so_is_what_comes_with_an_installed_package(tmp_path, monkeypatch, option):
    module = f"installed_{option}"
    (tmp_path / f"{module}.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(errors, "_LIBRARIES", [*errors._LIBRARIES, str(tmp_path)])
    with pytest.raises(UserError, match=rf"IndexError: .*{module}.py:"):
        prepare(resolve({"task": "superglue/cb", "steps": 1, "threads": 1, option: f"{module}:Thing"}))


INSTALLED = """
import torch
class Thing(torch.optim.Optimizer):
    def __init__(self, params=None, **given):
        [][0]
"""


def test_t_a_fault_of_ours_shows_where_and_how_to_report_it(monkeypatch):
    monkeypatch.setattr(compare_module, "compare", itemgetter("ours"))  # of settings, which have no items
    code, _, errors = call("compare", *CB)
    assert code == 70
    assert "Traceback" in errors and "TypeError: " in errors and "Please report it" in errors.splitlines()[-1]


def test_t_a_traceback_is_shown_of_any_error_that_it_is_asked_for():
    for place in (("--traceback", "compare", "--steps", "x"), ("compare", "--steps", "x", "--traceback")):
        code, _, errors = call(*place)
        assert code == 2 and "Traceback" in errors and errors.splitlines()[-1].startswith("error: --steps")


def test_t_a_launcher_that_says_half_of_it_is_told_once_and_nothing_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [one for one in CB if one != "--dry-run"]
    expect_a_sentence(call("compare", *arguments, "--out", str(tmp_path)), "RANK isn't set: start membench by torchrun")
    assert not list(tmp_path.iterdir())


def full(*_):
    raise OSError(28, "No space left on device")


def test_t_a_full_disk_is_told_with_the_file_and_leaves_no_half_of_one(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    record.write(make_record(), runs)
    monkeypatch.setattr(os, "fsync", full)
    page = tmp_path / "page.html"
    result = call("report", str(runs), "--format", "json", "--out", str(page))
    expect_a_sentence(result, f"{page}: can't be written: No space left on device; make room there")
    result = call("check", str(runs), str(runs), "--update")
    assert result[0] == 2 and "No space left on device" in result[2]
    with pytest.raises(ValueError, match="checkpoint .* can't be written"):
        checkpoint.save({"step": 1}, tmp_path / "checkpoints" / "a.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "runs"]
    assert len(list(runs.iterdir())) == 1 and not list((tmp_path / "checkpoints").iterdir())


def test_t_a_run_whose_record_finds_no_room_in_its_folder_is_kept_elsewhere(tmp_path, monkeypatch):
    runs, elsewhere, sync = Folder(tmp_path / "runs"), tmp_path / "elsewhere", os.fsync
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    monkeypatch.setattr(os, "fsync", lambda file: full() if not list(elsewhere.iterdir()) else sync(file))
    made = make_record()
    with pytest.raises(UserError, match=f"No space left.*its record is kept in {elsewhere}.*: move it to {runs.path}"):
        runs.write(made)
    (kept,) = elsewhere.glob("membench-*/*.json")  # a new folder: its name could be somebody's link to another file
    kept.rename(runs.path / kept.name)
    assert runs.finished(made["run_id"]) == made


def test_t_a_lock_that_is_a_link_leaves_what_it_leads_to_as_it_is(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".lock").symlink_to("mine")
    with (
        pytest.raises(UserError, match=r"^--out .*\.lock: Too many levels of symbolic links"),
        Folder(tmp_path).locked(),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_t_a_run_whose_record_finds_no_room_anywhere_is_told_to_be_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*its record is lost.*\.json: can't be written: No space"):
        Folder(tmp_path / "runs").write(make_record())


def test_t_of_two_paths_the_one_in_the_way_is_named(tmp_path):
    """What is renamed is a name of ours, which nobody gave."""
    (tmp_path / "draft").mkdir()
    (tmp_path / "run").touch()
    with pytest.raises(OSError) as raised:
        (tmp_path / "draft").rename(tmp_path / "run")
    assert about_file(raised.value) == f"{tmp_path / 'run'}: Not a directory"


def test_t_output_that_nothing_takes_is_told(tmp_path):
    record.write(make_record(), tmp_path)
    with open("/dev/full", "w") as full_device:
        done = subprocess.run(
            [sys.executable, "-m", "membench", "report", str(tmp_path)],
            cwd=ROOT,
            stdout=full_device,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2 and done.stderr.startswith("error: the output can't be written: No space left")
    assert done.stderr.count("\n") == 1


ODD_NAMES = {
    "escape": "\x1b[31mred\x1b[0m",
    "surrogate": "half \ud83d",
    "newline": "two\nlines",
    "formula": "=cmd|' /C calc'!A0",
    "direction": "abc\u202edef",
    "zero": "a\x00b",
}


@pytest.mark.parametrize("format", [*tables.FORMATS])
@pytest.mark.parametrize("name", ODD_NAMES)
def test_t_names_of_a_record_neither_end_nor_break_a_report(tmp_path, name, format):
    odd = ODD_NAMES[name]
    made = make_record(method=odd, model=odd, hyperparameters={odd: odd}, task=f"superglue/{odd}", run_id="odd")
    (tmp_path / "a.json").write_text(json.dumps(made))
    found = record.read(tmp_path)
    text = tables.render(found.records, format)
    assert not found.problems and text.encode()
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    if format == "csv":
        rows = list(csv.reader(io.StringIO(text)))
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "@"))]
    if format == "plain":  # no name begins a line of its own
        plain = make_record(method="x", model="x", hyperparameters={"x": "x"}, task="superglue/x")
        assert len(text.splitlines()) == len(tables.render([plain], format).splitlines())


@pytest.mark.parametrize(
    "change",
    [
        {"memory__peak_allocated_bytes": 0},
        {"memory__process_peak_bytes": 10**400},
        {"seed": 10**400},
        {"hyperparameters": {"lr": 10**400}},
        {"environment": {"device_name": ["list"]}},
        {"environment": {"threads": {}}},
        {"environment": {"created": 3}},
    ],
)
def test_t_an_odd_value_of_one_record_costs_the_report_no_other(tmp_path, change):
    record.write(make_record(), tmp_path)
    (tmp_path / "odd.json").write_text(json.dumps(make_record(run_id="odd", **change)))
    code, output, errors = call("report", str(tmp_path))
    assert code == 1 and "adamw" in output and errors.startswith(f"{tmp_path}/odd.json: ") and errors.count("\n") == 1


def test_t_a_pipe_in_place_of_a_record_is_named_and_not_waited_for(tmp_path):
    record.write(make_record(), tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    code, output, said = call("report", str(tmp_path))
    assert said == f"{tmp_path}/pipe.json: can't be read: it is a pipe or a device, not a file.\n"
    assert code == 1 and "adamw" in output


def test_t_neither_a_closed_output_nor_a_deleted_folder_is_a_fault(tmp_path):
    gone = tmp_path / "gone"
    script = (
        f'mkdir "{gone}" && cd "{gone}" && rmdir "{gone}" && exec "{sys.executable}" -m membench compare --dry-run >&-'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: the current folder has been deleted: change to another one\n"


# ---- W9: small ones


def test_w9_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    record.write(make_record(), tmp_path)
    command = [sys.executable, "-m", "membench", "report", str(tmp_path)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == "" and done.returncode in (1, 141)


def test_w9_one_fault_of_many_files_is_told_once(tmp_path):
    record.write(make_record(), tmp_path)
    for number in range(76):
        (tmp_path / f"x{number:02}.json").write_text("{}")
    code, output, errors = call("report", str(tmp_path))
    assert code == 1 and "adamw" in output
    assert errors.count("\n") == 1 and "x00.json" in errors and "75 more" in errors


def test_w9_pandas_reads_csv(tmp_path):
    pandas = pytest.importorskip("pandas")
    runs = [make_record(), make_record(method="badam"), make_record(method="lora", seed=1)]
    frame = pandas.read_csv(io.StringIO(tables.render(runs, "csv", tables.TABLES)))
    assert set(frame["table"]) == set(tables.TABLES)
    assert frame[frame["table"] == "memory"]["peak_allocated_bytes"].tolist() == [100 * 2**20] * 3


def test_pandas_reads_back_from_csv_what_the_records_hold(tmp_path):
    pandas = pytest.importorskip("pandas")
    runs = [make_record(), make_record(method="badam", seed=3, metrics={"accuracy": 0.1 + 0.2, "f1": 1 / 3})]
    runs += [make_failure(method="lora", error='two\nlines, "quoted"'), make_record(method="x", task="c4")]
    text = tables.render(runs, "csv")
    read = pandas.read_csv(io.StringIO(text), float_precision="round_trip").set_index("run_id")
    held = membench.to_frame(runs).set_index("run_id")
    assert set(read.columns) == set(held.columns) and len(read) == len(runs)
    for run_id, row in held.iterrows():
        for name, value in row.items():
            seen = read.loc[run_id, name]
            if isinstance(value, list):
                assert json.loads(seen) == value
            else:
                assert seen == value or (pandas.isna(seen) and pandas.isna(value)), name
