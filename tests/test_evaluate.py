"""membench evaluate: saved models on benchmarks of lm-evaluation-harness, here on tiny tasks of our own."""

import importlib.machinery
import importlib.util
import json
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from reports_factory import make_record
from safetensors.torch import load_file, save_file
from tokenizers import decoders, pre_tokenizers, trainers

from membench.cli import main
from membench.commands import harness
from membench.config.errors import UserError
from membench.config.options import EvaluationOptions
from reports import record

# These run the harness itself, which takes seconds to import and more to index its tasks: `make test-slow` installs it.
with_harness = pytest.mark.slow

VERSIONS = {"version": "1", "harness": "0.4.13"}
QUESTIONS = [
    {"question": f"The number after {i} is", "choices": [f"{i + 1}", f"{i + 7}"], "label": i % 2} for i in range(12)
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.5
"""
ANSWER = """
task: tiny_answer
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs:
  max_gen_toks: 3
  until: ["."]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
filter_list:
  - name: first-number
    filter:
      - function: regex
        regex_pattern: "(\\\\d+)"
      - function: take_first
metadata:
  version: 1
"""
GROUP = """
group: tiny
task: [tiny_choice, tiny_answer]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its record, and a folder of benchmarks."""
    where = tmp_path_factory.mktemp("evaluate")
    made = make_record(method="lora")
    model = where / "models" / made["run_id"]
    tokenizer().save_pretrained(model)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, vocab_size=300, eos_token_id=0, bos_token_id=0, initializer_range=0.5)
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    record.write(made, where / "models")
    benchmarks = where / "benchmarks"
    benchmarks.mkdir()
    data = benchmarks / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("group", GROUP)):
        (benchmarks / f"{name}.yaml").write_text(text.format(data=data) if "{data}" in text else text)
    return where


def tokenizer():
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([row["question"] for row in QUESTIONS], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def model_of(folder: Path) -> Path:
    return harness.find_models(folder / "models")[0]


def manager(folder: Path):
    """An index of our own tasks alone: that of all takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder / "benchmarks"), include_defaults=False)


def evaluate(folder: Path, *names: str, **given):
    request = EvaluationOptions(names, device="cpu", **given)
    return harness.evaluate(model_of(folder), names, request, manager(folder))


@torch.no_grad()
def likelihood(model, tokenizer, question: str, answer: str) -> float:
    """Of the answer's tokens after the question, in one pass."""
    start = len(tokenizer(question).input_ids)
    ids = torch.tensor([tokenizer(f"{question} {answer}").input_ids])
    scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(scores[start - 1 :].sum())


@with_harness
def test_a_choice_is_scored_by_the_likelihood_of_the_answers(folder):
    path = model_of(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    words = transformers.AutoTokenizer.from_pretrained(path)
    right = [
        likelihood(model, words, row["question"], row["choices"][row["label"]])
        > likelihood(model, words, row["question"], row["choices"][1 - row["label"]])
        for row in QUESTIONS
    ]
    assert 0 < sum(right) < len(right)
    entry = evaluate(folder, "tiny_choice")["tiny_choice"]
    assert entry["scores"] == {"acc": pytest.approx(sum(right) / len(right))}
    assert entry["standard_errors"]["acc"] > 0
    assert (entry["fewshot"], entry["limit"], entry["version"]) == (0, None, "2.5")


@with_harness
def test_a_limit_takes_the_first_documents_and_few_shots_are_counted(folder):
    entry = evaluate(folder, "tiny_choice", limit=1)["tiny_choice"]
    assert entry["scores"]["acc"] in (0.0, 1.0) and entry["limit"] == 1
    assert evaluate(folder, "tiny_choice", limit=3, fewshot=2)["tiny_choice"]["fewshot"] == 2


@with_harness
def test_of_a_group_without_a_score_its_members_are_kept_with_the_filter_of_their_answers(folder):
    found = evaluate(folder, "tiny", limit=4)
    assert set(found) == {"tiny_choice", "tiny_answer"}
    assert list(found["tiny_answer"]["scores"]) == ["exact_match,first-number"]


@with_harness
def test_the_command_adds_scores_to_the_record_which_stays_valid(folder, capsys, monkeypatch):
    monkeypatch.setattr(harness, "index", lambda request: manager(folder))
    path = model_of(folder)
    before = record.load(path.with_name(f"{path.name}.json"))
    call = ["membench", "evaluate", str(folder / "models"), "--device", "cpu", "--limit", "4", "--tasks"]
    for tasks in ("tiny_choice", "tiny_answer"):
        monkeypatch.setattr(sys, "argv", [*call, tasks])
        with pytest.raises(SystemExit) as exit:
            main()
        assert not exit.value.code
    made = record.load(path.with_name(f"{path.name}.json"))
    benchmarks = made.pop("benchmarks")
    assert made == before and set(benchmarks) == {"tiny_choice", "tiny_answer"}
    shown = capsys.readouterr().out
    score = benchmarks["tiny_choice"]["scores"]["acc"]
    assert path.name in shown and f"{score:.4f}" in shown and "exact_match,first-number" in shown


@with_harness
def test_every_short_name_is_a_task_or_group_of_the_harness():
    known = harness.index(EvaluationOptions(())).all_tasks
    assert set(harness.resolve(tuple(harness.BENCHMARKS), known)) <= set(known)
    with pytest.raises(UserError, match="--tasks hellaswagg: there is no such benchmark. Did you mean 'hellaswag'"):
        harness.resolve(("hellaswagg",), known)


@with_harness
def test_data_that_can_not_be_loaded_are_said_in_a_sentence(folder):
    (folder / "benchmarks" / "gone.yaml").write_text(
        CHOICE.format(data=folder / "nowhere.jsonl").replace("tiny_choice", "gone")
    )
    with pytest.raises(UserError, match=r" on gone: .*nowhere\.jsonl"):
        evaluate(folder, "gone")


# ---- with a stand-in for the harness, whose results have its form


RESULTS = {
    "results": {
        "one": {"alias": "one", "acc,none": 0.75, "acc_stderr,none": 0.05, "acc_norm,none": 0.5, "note": "text"},
        "member": {"alias": " - member", "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
        "silent": {"alias": "silent"},
    },
    "group_subtasks": {"group": ["silent", "member"], "one": []},
    "versions": {"one": 2.5, "member": 1},
    "n-shot": {"one": 5, "member": 0},
}


@pytest.fixture
def stand_in(monkeypatch):
    """A module `lm_eval` with what we use of it; gives the calls of `simple_evaluate`."""
    calls = []

    def simple_evaluate(**given):
        calls.append(given)
        if "broken" in given["tasks"]:
            raise OSError("no such data\nand a long story")
        return RESULTS

    package, of_tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    package.simple_evaluate = simple_evaluate
    of_tasks.TaskManager = lambda include_path: SimpleNamespace(
        all_tasks=["one", "group", "broken", "gsm8k", "arc_easy", "arc_challenge"], include_path=include_path
    )
    package.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", of_tasks)
    monkeypatch.setattr(harness.metadata, "version", lambda name: "0.4.13")
    return calls


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["membench", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code


def test_a_record_gets_the_scores_and_their_errors_of_tasks_and_of_the_members_of_groups(
    folder, stand_in, monkeypatch, capsys
):
    path = model_of(folder)
    options = ["--device", "cpu", "--limit", "4", "--fewshot", "5", "--batch-size", "3", "--chat-template"]
    assert not run_command(monkeypatch, folder / "models", "--tasks", "one,group", *options, "--include", folder)
    (call,) = stand_in
    assert call["model_args"] == {"pretrained": str(path)} and call["tasks"] == ["one", "group"]
    assert (call["num_fewshot"], call["limit"], call["batch_size"], call["device"]) == (5, 4, 3, "cpu")
    assert call["apply_chat_template"] is True and call["confirm_run_unsafe_code"] is False
    assert call["task_manager"].include_path == str(folder)
    benchmarks = record.load(path.with_name(f"{path.name}.json"))["benchmarks"]
    shared = {"limit": 4, "chat_template": True, "harness": "0.4.13"}
    assert benchmarks["one"] == {
        "scores": {"acc": 0.75, "acc_norm": 0.5},
        "standard_errors": {"acc": 0.05},
        "fewshot": 5,
        "version": "2.5",
        **shared,
    }
    assert benchmarks["member"] == {
        "scores": {"exact_match,strict": 0.25},
        "standard_errors": {},
        "fewshot": 0,
        "version": "1",
        **shared,
    }
    shown = capsys.readouterr().out
    assert "0.7500" in shown and "± 0.0500" in shown and "exact_match,strict" in shown


def test_what_the_harness_can_not_load_or_does_not_know_is_said_in_a_sentence(folder, stand_in, monkeypatch, capsys):
    assert run_command(monkeypatch, folder / "models", "--tasks", "broken", "--device", "cpu") == 2
    said = capsys.readouterr().err
    assert "on broken: no such data" in said and "long story" not in said and "Traceback" not in said
    assert run_command(monkeypatch, folder / "models", "--tasks", "gsm8kk", "--device", "cpu") == 2
    assert "--tasks gsm8kk: there is no such benchmark. Did you mean 'gsm8k'" in capsys.readouterr().err
    assert harness.resolve(("arc", "one", "arc_easy"), ["one", "arc_easy", "arc_challenge"]) == [
        "arc_easy",
        "arc_challenge",
        "one",
    ]


@pytest.mark.parametrize(
    "error", [KeyError("tst"), StopIteration(), AssertionError("Invalid configuration: 3000 tokens")]
)
def test_whatever_goes_wrong_in_the_harness_is_no_fault_of_ours(folder, stand_in, monkeypatch, capsys, error):
    def simple_evaluate(**given):
        raise error

    sys.modules["lm_eval"].simple_evaluate = simple_evaluate
    assert run_command(monkeypatch, folder / "models", "--tasks", "one", "--device", "cpu") == 2
    said = capsys.readouterr().err
    assert f"{model_of(folder).name} on one: " in said and "Traceback" not in said and "fault of membench" not in said


def test_a_task_without_any_score_is_told(folder, stand_in, monkeypatch, capsys):
    """The harness passes over a metric that it doesn't know."""
    monkeypatch.setitem(RESULTS["group_subtasks"], "group", ["silent"])
    assert run_command(monkeypatch, folder / "models", "--tasks", "one,group", "--device", "cpu") == 2
    told = capsys.readouterr()
    assert "--tasks group: the harness gives no score" in told.err and "0.7500" in told.out


def test_what_was_scored_is_told_if_the_next_model_does_not_fit(folder, stand_in, monkeypatch, capsys, tmp_path):
    """And the record of the first has its scores."""
    for name in ("a", "b"):
        shutil.copytree(model_of(folder), tmp_path / name)
    scored = sys.modules["lm_eval"].simple_evaluate

    def simple_evaluate(**given):
        if given["model_args"]["pretrained"].endswith("/b"):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return scored(**given)

    sys.modules["lm_eval"].simple_evaluate = simple_evaluate
    options = ["--tasks", "one", "--device", "cpu", "--batch-size", "64"]
    assert run_command(monkeypatch, tmp_path, *options) == 2
    told = capsys.readouterr()
    assert "0.7500" in told.out and "b on one: out of memory with --batch-size 64: give a smaller one" in told.err


def test_a_trial_on_few_documents_replaces_no_score_on_all(folder, stand_in, monkeypatch, capsys, tmp_path):
    path = tmp_path / model_of(folder).name
    shutil.copytree(model_of(folder), path)
    record.write(make_record(method="lora"), tmp_path)

    def limit_after(*options):
        assert not run_command(monkeypatch, tmp_path, "--tasks", "one", "--device", "cpu", *options)
        return record.load(path.with_name(f"{path.name}.json"))["benchmarks"]["one"]["limit"]

    assert limit_after("--limit", "8") == 8
    assert limit_after("--limit", "4") == 8
    assert "keeps its scores of one on more documents" in capsys.readouterr().err
    assert limit_after() is None
    assert limit_after("--limit", "8") is None


def test_two_commands_at_once_both_add_their_scores(monkeypatch, tmp_path):
    made = make_record(method="lora")
    record.write(made, tmp_path)
    both_read, load = threading.Barrier(2), record.load

    def slow(path):
        found = load(path)
        with suppress(threading.BrokenBarrierError):
            both_read.wait(0.2)  # as long as a record takes to be written
        return found

    monkeypatch.setattr(record, "load", slow)
    entry = {"scores": {"acc": 0.5}, "standard_errors": {}, "fewshot": 0, "limit": None, "chat_template": False}
    commands = [
        threading.Thread(target=harness.add_to_record, args=(tmp_path / made["run_id"], {name: entry | VERSIONS}))
        for name in ("one", "two")
    ]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert set(load(tmp_path / f"{made['run_id']}.json")["benchmarks"]) == {"one", "two"}


# ---- what is refused, also without the harness


def test_without_the_harness_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"isn't installed: pip install 'membench\[eval\]'"):
        harness.check_request([model_of(folder)], EvaluationOptions(("gsm8k",)))


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "mbpp_plus"])
def test_code_that_a_model_wrote_is_only_run_with_leave(folder, stand_in, name):
    with pytest.raises(UserError, match=f"--tasks {name}: it runs code written by the model.*--run-code"):
        harness.check_request([model_of(folder)], EvaluationOptions((name,)))
    harness.check_request([model_of(folder)], EvaluationOptions((name,), run_code=True))


def test_only_causal_language_models_are_evaluated(tmp_path, stand_in):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a BertForSequenceClassification can't be evaluated.*causal language models"):
        harness.check_request([tmp_path], EvaluationOptions(("gsm8k",)))


def of_weights(change):
    """Damage: put `change(weights)` in the place of a model's weights."""

    def damage(model: Path):
        changed = change(load_file(model / "model.safetensors"))
        save_file(changed, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def of_settings(**values):
    """Damage: other values in a model's configuration."""

    def damage(model: Path):
        config = model / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))

    return damage


def without(part: str):
    return of_weights(lambda weights: {name: value for name, value in weights.items() if part not in name})


def cut(name: str):
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-20])


def with_larger_tokenizer(model: Path):
    words = tokenizer()
    words.add_tokens([f"word{number}" for number in range(40)])
    words.save_pretrained(model)


def without_tokenizer(model: Path):
    shutil.rmtree(model)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(model)  # for which transformers makes an empty one


DAMAGES = {
    "a layer is missing": (without("layers.1"), r"9 of 21 tensors are missing .*layers\.1.*, and would be random"),
    "the head is missing": (without("lm_head"), r"1 of 21 tensors are missing .*lm_head.weight.*would be random"),
    "other names": (of_weights(lambda weights: {f"x.{name}": weights[name] for name in weights}), "21 of 21 tensors"),
    "a smaller vocabulary": (of_settings(vocab_size=200), r"is \(300, 32\) there and \(200, 32\) in config.json"),
    "fewer layers": (of_settings(num_hidden_layers=1), r"9 tensors of layers aren't in it .*would be left out"),
    "half of the weights": (cut("model.safetensors"), "model.safetensors isn't a complete safetensors file"),
    "half of the configuration": (cut("config.json"), "config.json isn't valid JSON"),
    "half of the generation's": (cut("generation_config.json"), "generation_config.json isn't valid JSON"),
    "an adapter": (lambda model: (model / "adapter_config.json").write_text("{}"), "the folder has an adapter"),
    "no tokenizer": (without_tokenizer, "can't load the tokenizer 'model': its files are missing"),
    "a larger tokenizer": (with_larger_tokenizer, "its tokenizer has .* entries, but the model only 300 embeddings"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_is_not_the_model_which_was_saved_is_refused_before_anything_is_scored(
    folder, stand_in, tmp_path, name
):
    """transformers would fill in random weights, or leave out what it can't read, and the harness score that."""
    model, (damage, sentence) = tmp_path / "model", DAMAGES[name]
    shutil.copytree(model_of(folder), model)
    harness.check_request([model], EvaluationOptions(("one",)))
    damage(model)
    with pytest.raises(UserError, match=sentence):
        harness.check_request([model], EvaluationOptions(("one",)))


def test_what_is_no_record_is_told_before_anything_is_scored(folder, stand_in, monkeypatch, capsys, tmp_path):
    shutil.copytree(model_of(folder), tmp_path / "model")
    (tmp_path / "model.json").write_text('{"schema": 1')
    assert run_command(monkeypatch, tmp_path, "--tasks", "one", "--device", "cpu") == 2
    assert "model.json: malformed JSON" in capsys.readouterr().err and not stand_in


def test_scores_go_into_the_record_beside_the_model_whatever_its_name(tmp_path):
    made, entry = make_record(method="lora"), {"scores": {"acc": 0.5}, "standard_errors": {}}
    entry |= {"fewshot": 0, "limit": None, "chat_template": False, **VERSIONS}
    original = record.write(made, tmp_path)
    shutil.copy(original, tmp_path / "copy.json")
    assert harness.add_to_record(tmp_path / "copy", {"one": entry}) == []
    assert record.load(tmp_path / "copy.json")["benchmarks"] == {"one": entry}
    assert record.load(original) == made


def test_a_folder_is_a_model_or_holds_models(folder, tmp_path):
    path = model_of(folder)
    assert harness.find_models(path) == [path] == harness.find_models(folder / "models")
    with pytest.raises(UserError, match=r"neither a transformers model \(with a config.json\) nor a folder of them"):
        harness.find_models(tmp_path)


def test_a_model_without_a_record_is_left_without_one(tmp_path):
    assert harness.add_to_record(tmp_path / "model", {}) is None and not list(tmp_path.iterdir())
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.json: schema version"):
        harness.add_to_record(tmp_path / "model", {})
