"""--save: what was trained is an ordinary model of transformers, with its record beside it."""

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from architectures import ARCHITECTURES
from commands import DATA
from letters import folder as model_folder
from letters import letters
from safetensors import SafetensorError

import optimizers
import tasks
from membench.config.errors import UserError
from membench.config.settings import resolve
from membench.runs import model_card, processes
from membench.runs import model_folder as model_folder_module
from membench.runs.compare import Workplace, compare
from membench.runs.model_folder import Models
from membench.runs.prepare import prepare
from membench.runs.processes import Outcome
from membench.runs.progress import create_display
from membench.runs.run_folder import Folder
from membench.training.execute import save
from reports import record
from tasks.models.loading import FOLDER

TINY = {"steps": 6, "batch_size": 4, "sequence_length": 24, "threads": 1, "quiet": True, "task": "superglue/cb"}
TINY |= {"optimizers": "lora", "reference": False, "data": DATA}


@pytest.fixture(scope="module", autouse=True)
def server():
    processes.start_server()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A comparison whose models are saved: its settings, and its only record."""
    folder = tmp_path_factory.mktemp("saved")
    settings = resolve(
        {**TINY, "out": str(folder / "runs"), "save": str(folder / "models"), "hyperparameters": ["lora.lr=0.01"]}
    )
    assert compare(settings) == 0
    return settings, record.load_folder(settings.out)[0]


def cb():
    return tasks.create("superglue/cb", model="config:roberta-tiny", data=DATA, batch_size=4, sequence_length=24)


def load(folder: Path):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_saved_model_gives_the_same_logits_as_the_finished_one(tmp_path):
    task = cb()
    model, batch = task.build_model(), task.batch(0)
    optimizer = optimizers.create("lora", model, lr=1e-2, always_train=task.head)
    for step in range(3):
        optimizer.backward(task.loss(model, task.batch(step)))
        optimizer.step()
        optimizer.zero_grad()
    finished = optimizer.finish().eval()
    save(finished, task, tmp_path / "model")
    again = load(tmp_path / "model").eval()
    assert torch.equal(again(**batch).logits, finished(**batch).logits)
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in task.build_model().named_parameters()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    example = task.train[0]
    assert tokenizer(example.first, example.second).input_ids == task.tokenizer(example.first, example.second).input_ids


def test_a_saved_tokenizer_pads_and_cuts_as_it_did_before_the_training(tmp_path):
    first = cb()
    save(first.build_model(), first, tmp_path / "left")
    settings = tmp_path / "left" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "padding_side": "left"}))
    given = {"model": str(tmp_path / "left"), "data": DATA, "batch_size": 4, "sequence_length": 24}
    task = tasks.create("superglue/cb", **given)
    task.batch(0)  # of texts that are cut to 24 tokens
    save(task.build_model(), task, tmp_path / "again")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").padding_side == "left"
    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert len(alone.encode("a text of many tokens " * 20).ids) > 100


def test_a_saved_model_scores_what_its_record_says(saved):
    settings, made = saved
    models = Path(settings.save)
    assert record.load_folder(models) == [made]
    assert cb().evaluate(load(models / made["run_id"])) == made["metrics"]
    assert {path.name for path in models.iterdir()} == {made["run_id"], f"{made['run_id']}.json"}


def test_a_saved_model_has_a_card_of_what_it_is(saved):
    settings, made = saved
    card = (Path(settings.save) / made["run_id"] / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\ntags: ["membench", "lora"]\n---\n')
    assert "# config:roberta-tiny after lora on superglue/cb" in card
    assert f"| accuracy (validation) | {made['metrics']['accuracy']:.4g} |" in card
    assert "6 steps of 4 x 24 tokens" in card and "lr=0.01" in card and made["run_id"] in card


def test_a_card_shows_a_models_name_as_text_whatever_it_is(saved):
    made = {**saved[1], "model": "a\n---\n![b](https://c.d/e.png) <img> | f"}
    lines = model_card.card(made).splitlines()
    assert lines.count(
        "---"
    ) == 2 and "| model before | a\\\\n---\\\\n!\\[b](https://c.d/e.png) \\<img\\> \\| f" in "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "revision", "base"),
    [
        ("FacebookAI/roberta-base", "e2da8e2f", 'base_model: "FacebookAI/roberta-base"\n'),
        ("FacebookAI/roberta-base@main", "e2da8e2f", 'base_model: "FacebookAI/roberta-base"\n'),
        ("gpt2", "607a30d7", 'base_model: "gpt2"\n'),
        ("models/mine", f"{FOLDER}0123", None),  # a folder, though it could be a hub id
        ("smollm2-135m", f"{FOLDER}0123", None),
    ],
)
def test_the_card_names_a_model_of_the_hub_as_the_hub_does_and_no_folder(saved, name, revision, base):
    made = saved[1]
    environment = {**made["environment"], "model_revision": revision}
    given = {**made, "model": name, "training": {**made["training"], "weights": "pretrained"}}
    card = model_card.card({**given, "environment": environment})
    assert base in card if base else "base_model" not in card


def test_what_is_saved_is_not_made_twice_and_what_is_missing_is_made_again(saved, capsys):
    settings, made = saved
    model = Path(settings.save) / made["run_id"]
    assert compare(settings) == 0
    assert "1 of 1 runs are already in" in capsys.readouterr().out
    weights = load(model).state_dict()
    shutil.rmtree(model)
    assert compare(settings) == 0
    assert "1 of these have no model in" in capsys.readouterr().out
    again = load(model).state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_a_run_without_a_result_leaves_no_model(tmp_path, capsys):
    out = str(tmp_path / "both")
    settings = resolve({**TINY, "optimizers": "sgd", "out": out, "save": out, "hyperparameters": ["sgd.lr=1e30"]})
    assert compare(settings) == 1
    kept = [path for path in Path(out).iterdir() if path.name not in (".lock", "logs")]
    assert [path.suffix for path in kept] == [".json"]
    capsys.readouterr()
    assert compare(settings) == 1  # a diverged run is a result, with no model to wait for
    assert "made again" not in capsys.readouterr().out


def test_what_an_interrupted_run_left_is_no_model_and_in_nobodys_way(tmp_path, saved, monkeypatch):
    models, made, task = Models(tmp_path, tmp_path), saved[1], cb()
    draft = models.draft(made["run_id"])
    with monkeypatch.context() as patched:
        patched.setattr(type(task.tokenizer), "save_pretrained", lambda *_: sys.exit())  # killed meanwhile
        with pytest.raises(SystemExit):
            save(task.build_model(), task, draft)
    assert not draft.exists() and not models.has(made["run_id"])
    (left,) = tmp_path.iterdir()
    (left / "model-00002-of-00003.safetensors").write_bytes(b"half")
    save(task.build_model(), task, draft)
    assert [path.name for path in tmp_path.iterdir()] == [draft.name]
    models.end(made)
    assert models.has(made["run_id"]) and not draft.exists()
    assert not list(models.model(made["run_id"]).glob("model-*"))


def test_a_model_that_was_being_replaced_when_its_command_was_killed_does_not_pass_for_a_saved_one(
    tmp_path, saved, monkeypatch
):
    """Of a run that is made again, such as one for another --out."""
    models, made, task = Models(tmp_path, tmp_path), saved[1], cb()
    for killed in (False, True):
        save(task.build_model(), task, models.draft(made["run_id"]))
        with monkeypatch.context() as patched, suppress(SystemExit):
            if killed:
                patched.setattr(shutil, "rmtree", remove_weights_and_die)
            models.end(made)
    assert not models.has(made["run_id"]) or load(models.model(made["run_id"]))
    save(task.build_model(), task, models.draft(made["run_id"]))
    models.end(made)
    assert {path.name for path in tmp_path.iterdir()} == {made["run_id"], f"{made['run_id']}.json"}


def remove_weights_and_die(folder, **_):
    (folder / "model.safetensors").unlink()
    sys.exit()


def test_of_a_run_that_died_while_it_saved_its_model_nothing_is_left(tmp_path, saved):
    models, made = Models(tmp_path, tmp_path), saved[1]
    half = models.draft(made["run_id"]).with_name(f"{models.draft(made['run_id']).name}.half")
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    models.end({**made, "status": "failed"})
    assert not list(tmp_path.iterdir())


def test_two_commands_that_save_the_same_run_into_one_folder_are_not_in_each_others_way(tmp_path, saved):
    made, task = saved[1], cb()
    first, second = (Models(tmp_path, tmp_path / out) for out in ("a", "b"))
    save(task.build_model(), task, first.draft(made["run_id"]))
    second.end({**made, "status": "diverged"})  # with no model to keep
    first.end(made)
    assert first.has(made["run_id"])
    assert {path.name for path in tmp_path.iterdir()} == {made["run_id"], f"{made['run_id']}.json"}


@pytest.mark.parametrize("name", ["{}", "{}.json"])
def test_what_is_in_the_place_of_a_model_is_told_before_the_run_is_made(tmp_path, saved, name):
    settings, made = saved
    place = tmp_path / name.format(made["run_id"])
    (place / "mine").mkdir(parents=True) if place.suffix else place.touch()
    with pytest.raises(UserError, match="--save .*: it is in the way of a run's model: move it"):
        compare(replace(settings, out=str(tmp_path / "runs"), save=str(tmp_path)))
    assert place.exists() and not list((tmp_path / "runs").glob("*.json"))


class Collects:
    """An executor that finds the runs of an earlier command ended."""

    remark = None

    def __init__(self, made):
        self.made = made

    def call_all(self, calls):
        return ((call, Outcome("ok", value=self.made)) for call in list(calls))


def collect(settings, made, models: Models):
    """What a command is told of a run that was made meanwhile, and that run's checkpoint."""
    (run,), folder = prepare(settings), Folder(models.path / "runs")
    checkpoint = folder.checkpoint(run.run_id)
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    with suppress(UserError), create_display([run], 1, quiet=True) as display:
        list(Workplace(folder, models, 0, Collects(made)).make([run], display))
    return record.load_folder(folder.path), checkpoint


def test_a_model_that_was_saved_while_nobody_waited_for_it_is_kept(tmp_path, saved):
    settings, made = saved
    models, task = Models(tmp_path, tmp_path), cb()
    save(task.build_model(), task, models.draft(made["run_id"]))
    found, checkpoint = collect(settings, made, models)
    assert models.has(made["run_id"]) and found and not checkpoint.exists()


def test_a_run_that_was_begun_without_save_has_a_record_and_no_model(tmp_path, saved):
    settings, made = saved
    found, _ = collect(settings, made, Models(tmp_path, tmp_path))
    assert [one["run_id"] for one in found] == [made["run_id"]]
    assert not Models(tmp_path, tmp_path).has(made["run_id"])


def test_the_record_of_a_run_whose_model_can_not_be_kept_is_and_so_is_what_to_make_it_from(
    tmp_path, saved, monkeypatch
):
    settings, made = saved
    models = Models(tmp_path, tmp_path)
    models.draft(made["run_id"]).mkdir(parents=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder_module, "card", full)
    found, checkpoint = collect(settings, made, models)
    assert [one["run_id"] for one in found] == [made["run_id"]] and checkpoint.exists()


def test_a_path_that_can_not_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--save .*file is a file, not a folder"):
        resolve({**TINY, "save": str(tmp_path / "file" / "models")})


def test_a_language_model_is_saved_with_its_tokenizer_and_scores_what_its_record_says(tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f'{{"text": "The number after {i} is {i + 1}, and so on."}}\n' for i in range(200)))
    given = {**TINY, "task": "c4", "data": str(data), "sequence_length": 16, "optimizers": "badam"}
    settings = resolve({**given, "out": str(tmp_path / "runs"), "save": str(tmp_path / "runs")})
    assert compare(settings) == 0
    (made,) = record.load_folder(tmp_path / "runs")
    folder = str(tmp_path / "runs" / made["run_id"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    # the saved folder is a model like any other: nothing but it and the data is needed to score it again
    task = tasks.create("c4", model=folder, data=str(data), batch_size=4, sequence_length=16)
    metrics = {name: value for name, value in made["metrics"].items() if name != "loss_change_standard_error"}
    assert task.evaluate(model) == pytest.approx(metrics, rel=1e-6)  # the other is of this run's losses before training


class Unsavable(transformers.PreTrainedModel):
    """A model for whose weights there is no room."""

    def __init__(self, error: Exception):
        super().__init__(transformers.PretrainedConfig())
        self.error = error

    def save_pretrained(self, folder, **given):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_a_full_disk_is_told_with_the_folder(tmp_path, error):
    with pytest.raises(
        UserError, match=r"^--save .*: the model can't be written \(.*No space left.*\): make room there"
    ):
        save(Unsavable(error), None, tmp_path / "draft")


@pytest.mark.parametrize("odd", [{"temperature": 0.9, "top_p": 0.6}, {"pad_token_id": -1}], ids=["Vicuna's", "LLaMA's"])
def test_generation_settings_that_transformers_refuses_to_write_do_not_lose_a_trained_model(tmp_path, odd):
    path = Path(model_folder(tmp_path / "base", ARCHITECTURES["llama"].build(), letters()))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 5], **odd}))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.eos_token_id = [2, 5, 7]
    save(model, None, tmp_path / "saved")
    written = transformers.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (written.bos_token_id, written.eos_token_id) == (1, [2, 5, 7])
    assert not any(value == getattr(written, name) for name, value in odd.items())
