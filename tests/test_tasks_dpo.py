"""Preference tuning: pairs in the formats people have, the paper's loss, and a reference that stays what it was."""

import json
import math

import chat_templates
import datasets
import pytest
import torch
import transformers
from torch import nn

import optimizers
import tasks
from membench.config.defaults import hyperparameters
from membench.config.run import Training
from membench.planning.workload import Workload, make_batch, tokens_shape
from membench.training import parallel
from membench.training.loop import Loop, shares
from tasks.data.rows import Row
from tasks.data.tally import Tally
from tasks.dpo.formats import APART, NO_PROMPT, SAME, pair
from tasks.dpo.pairs import name_of
from tasks.instruct.formats import Message
from tasks.models.loss_chunks import compute_loss_in_chunks
from tasks.models.preference import Preference, log_probabilities

HI, HELLO, BYE = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello!"), ("assistant", "Bye."))
)
SHARED_HI, SHARED_HELLO, SHARED_BYE = (
    {"from": who, "value": text} for who, text in (("human", "Hi"), ("gpt", "Hello!"), ("gpt", "Bye."))
)
ASKED, KIND = (Message("user", "Hi"),), Message("system", "Be kind.")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# ---- formats


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "Bye."}, ASKED),
        ({"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]}, ASKED),
        ({"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, BYE], "score_chosen": 1.0}, ASKED),
        ({"chosen": [HI, HELLO], "rejected": [HI, BYE]}, ASKED),
        ({"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "Bye."}, ASKED),
        ({"conversations": [SHARED_HI], "chosen": SHARED_HELLO, "rejected": SHARED_BYE}, ASKED),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Bye."}, ASKED),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " Bye."}, ASKED),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",
          "rejected": "\n\nHuman: Hi\n\nAssistant: Bye."}, ASKED),
        ({"chosen": "Hi Hello!", "rejected": "Hi Bye."}, ASKED),
        ({"system": "Be kind.", "prompt": "Hi", "chosen": "Hello!", "rejected": "Bye."}, (KIND, *ASKED)),
    ],
)  # fmt: skip
def test_a_format_is_recognised_by_its_fields(row, asked):
    found = pair(Row("here", row), Tally())
    assert tuple(found.prompt) == asked
    assert (found.chosen.messages, found.rejected.messages) == (
        (*asked, Message("assistant", found.chosen.answer)),
        (*asked, Message("assistant", found.rejected.answer)),
    )
    assert [one.answer.strip() for one in (found.chosen, found.rejected)] == ["Hello!", "Bye."]


def test_alpacas_input_belongs_to_both_answers():
    row = {"instruction": "Greet", "input": "Ann", "chosen": "Hello!", "rejected": "Bye."}
    found = pair(Row("here", row), Tally())
    assert found.chosen.context == found.rejected.context == "Ann"


def test_of_a_dialogue_only_the_answers_that_differ_are_learned():
    said = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why: tell me\n\nAssistant:"
    found = pair(Row("here", {"chosen": f"{said} Because.", "rejected": f"{said} No.\n\nOr yes."}), Tally())
    assert [one.learned for one in found.chosen.messages] == [True, False, True, True]
    assert [one.content for one in found.rejected.messages] == ["Hi", "Yes?", "Why: tell me", "No.\n\nOr yes."]


DIALOGUES = [f"Human: Hi\n\nAssistant: {answer}" for answer in ("Hello!", "Bye.")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Write a dialogue.", "chosen": DIALOGUES[0], "rejected": DIALOGUES[1]},
        {"prompt": "Write a dialogue.", "chosen": DIALOGUES[0], "rejected": "No."},
        {
            name: [{"role": "user", "content": "Write a dialogue."}, {"role": "assistant", "content": dialogue}]
            for name, dialogue in zip(("chosen", "rejected"), DIALOGUES, strict=True)
        },
        {"prompt": f"{DIALOGUES[0]}\n\nWho is polite?", "chosen": "Both.", "rejected": "Nobody."},
        {"chosen": [{"role": "user", "content": f"{DIALOGUES[0]}\n\nHuman: Ho"}, HELLO],
         "rejected": [{"role": "user", "content": f"{DIALOGUES[0]}\n\nHuman: Ho"}, BYE]},
    ],
)  # fmt: skip
def test_what_is_said_in_a_turn_is_text_though_it_looks_like_a_transcript(row):
    found = pair(Row("here", row), Tally())
    whole = isinstance(row["chosen"], list)
    asked, *answers = (
        [row["chosen"][0]["content"], row["chosen"][1]["content"], row["rejected"][1]["content"]]
        if whole
        else [row["prompt"], row["chosen"], row["rejected"]]
    )
    for side, answer in zip((found.chosen, found.rejected), answers, strict=True):
        assert side.messages == (Message("user", asked), Message("assistant", answer))


WRITTEN_OUT = "holds turns written as a text: give a list of them"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "Same.", "rejected": "Same."}, SAME),
        ({"chosen": str([HI, HELLO]), "rejected": str([HI, BYE])}, f"'chosen' {WRITTEN_OUT}"),
        ({"prompt": json.dumps([HI]), "chosen": "a", "rejected": "b"}, f"'prompt' {WRITTEN_OUT}"),
        ({"chosen": [HI, HELLO, HI], "rejected": [HI, HELLO]}, APART),
        ({"chosen": [HI, HELLO], "rejected": [HELLO, BYE]}, APART),
        ({"chosen": [HI, HELLO], "rejected": [{**HI, "content": "Ho"}, BYE]}, APART),
        ({"chosen": "Hello!", "rejected": "Bye."}, NO_PROMPT),
        ({"prompt": "Hi", "chosen": "Hello!"}, "the field 'rejected' is missing"),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": " "}, "no answer to learn"),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": 3}, "'rejected' must be text"),
    ],
)  # fmt: skip
def test_a_row_without_two_answers_to_one_prompt_is_refused_with_the_reason(row, reason):
    with pytest.raises(ValueError, match="^here") as error:
        pair(Row("here", row), Tally())
    assert error.value.reason == reason


def test_all_pairs_of_a_prompt_are_on_one_side():
    rows = [{"prompt": "Hi", "chosen": f"Hello {n}!", "rejected": "Bye."} for n in range(3)]
    names = [name_of(pair(Row("here", row), Tally())) for row in rows]
    assert len({name[:8] for name in names}) == 1 and len(set(names)) == 3


# ---- the task


def rows(count=90):
    for n in range(count):
        yield {
            "prompt": f"Is {n} even? " + "So? " * (n % 5),
            "chosen": ("Yes", "No")[n % 2] + ".",
            "rejected": "It depends, I would say.",
        }


def write(path, some):
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


def create(data, **given):
    return tasks.create(
        "dpo", **{"model": "config:llama-tiny", "data": data, "batch_size": 3, "sequence_length": 64, **given}
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("data") / "pairs.jsonl", [*rows(), {"prompt": "x", "chosen": "y", "rejected": "y"}]
    )


@pytest.fixture(scope="module")
def task(data):
    return create(data)


def tiny(seed=0, kind="llama", **given):
    """A model for the task's tokens."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, vocab_size=1024, initializer_range=0.3, **shape, **ids, **given)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).train()


@pytest.fixture(scope="module")
def remembered(task):
    """The task, after a look at the tiny model number 0."""
    task.remember_training(tiny(), 100)
    task.remember_held_out(tiny())
    return task


def flat(batch):
    """With the answers of all pairs in one dimension."""
    return {key: value.flatten(0, 1) for key, value in batch.items()}


def test_a_row_of_a_batch_is_a_pair_the_chosen_answer_first_and_learns_answers_with_their_end(remembered):
    batch, end = remembered.batch(0), remembered.tokenizer.eos_token_id
    assert batch["input_ids"].shape == (3, 2, 64) and batch["reference"].shape == (3, 2) and "labels" not in batch
    answers = [[remembered.tokenizer.decode(row[row != -100]) for row in pair] for pair in batch["targets"]]
    assert {chosen.removesuffix("<|endoftext|>") for chosen, _ in answers} <= {"Yes.", "No."}
    assert [rejected for _, rejected in answers] == ["It depends, I would say.<|endoftext|>"] * 3
    for ids, mask, targets in zip(
        *(flat(batch)[name] for name in ("input_ids", "attention_mask", "targets")), strict=True
    ):
        last = int(mask.sum()) - 1
        assert targets[last] == ids[last] == end and (ids[targets != -100] == targets[targets != -100]).all()


def test_what_is_metered_is_what_is_trained_on_and_what_is_planned(remembered):
    workload = Workload("", batch_size=3, sequence_length=64, task="dpo")
    planned = make_batch(workload, torch.zeros(tokens_shape(workload), dtype=torch.long), None)
    batches = (remembered.batch(0), remembered.largest_batch(), planned)
    shapes = [{name: (one.numel(), one.dtype) for name, one in batch.items()} for batch in batches]
    assert shapes[0] == shapes[1] == shapes[2] and not remembered.largest_batch()["attention_mask"].all()


def test_processes_divide_a_batch_between_pairs_and_their_mean_loss_is_the_whole_batchs(data, monkeypatch):
    task, model = create(data, batch_size=4), tiny(1)
    task.remember_training(tiny(0), 1)
    whole = task.batch(0)
    expected = task.loss(model, whole)
    monkeypatch.setattr(parallel, "ranks", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(parallel.share_of(whole))
    assert shares(parts[:1], [whole]) == [1.0]
    torch.testing.assert_close(torch.stack([task.loss(model, part) for part in parts]).mean(), expected)
    with pytest.raises(ValueError, match="can't be divided among 2 processes"):
        parallel.share_of({name: one[:3] for name, one in whole.items()})


def test_micro_batches_have_equal_weight_whatever_their_answers_lengths(remembered):
    assert shares([remembered.batch(step) for step in range(4)]) == [0.25] * 4


def test_log_probabilities_are_those_of_the_answers_tokens(remembered):
    model, batch = tiny(), flat(remembered.batch(1))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.zeros(6)
    for row, targets in enumerate(batch["targets"]):
        for place in (targets != -100).nonzero().flatten().tolist():
            expected[row] += logits[row, place - 1].log_softmax(0)[targets[place]]
    torch.testing.assert_close(log_probabilities(model, batch), expected)
    torch.testing.assert_close(batch["reference"], expected)  # that was the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_are_those_of_torchs_cross_entropy(remembered, dtype, monkeypatch):
    monkeypatch.setattr("tasks.models.token_losses.PIECES", 5)  # of 384 tokens: the last one is smaller
    model, batch = tiny().to(dtype), flat(remembered.batch(0))
    log_probabilities(model, batch).square().sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["targets"][:, 1:], reduction="none")
    losses.sum(1).square().sum().backward()
    for name, p in model.named_parameters():
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours[name], p.grad, rtol=tolerance, atol=tolerance * float(p.grad.abs().max()))


def test_the_loss_in_pieces_of_the_sequence_is_the_same(remembered):
    model, batch = tiny(1), remembered.batch(0)
    expected = remembered.loss(model, batch)
    compute_loss_in_chunks(model, 5)
    torch.testing.assert_close(remembered.loss(model, batch), expected)


PAIRED = torch.tensor([[1.0, 0.5], [-2.0, 3.0]])  # log-ratios of a chosen and a rejected answer, of two pairs
TOKENS = torch.tensor([[2, 5], [4, 10]])


def test_the_loss_is_the_papers():
    margins = [1.0 - 0.5, -2.0 - 3.0]
    expected = [-math.log(1 / (1 + math.exp(-0.2 * margin))) for margin in margins]
    assert Preference(0.2).losses(PAIRED, TOKENS).tolist() == pytest.approx(expected)


def test_label_smoothing_is_the_expected_loss_of_pairs_some_of_which_are_the_wrong_way_round():
    right, wrong = (Preference(0.2).losses(log_ratios, TOKENS) for log_ratios in (PAIRED, PAIRED.flip(1)))
    torch.testing.assert_close(Preference(0.2, 0.1).losses(PAIRED, TOKENS), 0.9 * right + 0.1 * wrong)


def test_ipo_wants_a_margin_per_token():
    margins = [1.0 / 2 - 0.5 / 5, -2.0 / 4 - 3.0 / 10]
    expected = [(margin - 1 / (2 * 0.2)) ** 2 for margin in margins]
    assert Preference(0.2, form="ipo").losses(PAIRED, TOKENS).tolist() == pytest.approx(expected)


def test_the_reference_itself_scores_at_chance_and_a_model_that_learned_the_pairs_does_not(remembered):
    model = tiny()
    chance = {"accuracy": 0.5, "loss": math.log(2), "reward_margin": 0.0}
    assert remembered.evaluate(model) == pytest.approx(chance) and remembered.constant_score == 0.5
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(4):
        remembered.loss(model, remembered.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = remembered.evaluate(model)
    assert scores["accuracy"] == 1 and scores["loss"] < 0.5 and scores["reward_margin"] > 1


def test_neither_pass_has_dropout(data, tmp_path):
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    create(data).tokenizer.save_pretrained(tmp_path / "gpt2")
    task = create(data, model=str(tmp_path / "gpt2"))
    model = task.build_model().train()
    task.remember_training(model, 1)
    assert task.loss(model, task.batch(0)).item() == pytest.approx(math.log(2), abs=1e-6)
    notes = task.provenance["notes"]
    assert "no dropout (resid_pdrop, embd_pdrop, attn_pdrop" in notes and "), nor in a model that is saved" in notes


@pytest.mark.parametrize(
    ("some", "message"),
    [
        ([{"prompt": "Hi", "chosen": "A", "rejected": "A"}] * 50, f"line 1: {SAME} .50 of the 50 rows"),
        ([{"prompt": f"Hi {n}", "chosen": "A " * 90 + "A", "rejected": "A " * 90 + "B"} for n in range(90)],
         "none of the .* pairs differs within sequence_length 64; .* training answers cut"),
    ],
)  # fmt: skip
def test_data_without_pairs_are_refused_with_the_reason(tmp_path, some, message):
    with pytest.raises(ValueError, match=message):
        create(write(tmp_path / "a.jsonl", some))


def test_what_is_left_out_is_counted_with_its_place(remembered):
    assert f"1 row left out: {SAME} (first: " in remembered.provenance["notes"]
    assert "pairs.jsonl, line 91)" in remembered.provenance["notes"]


@pytest.mark.parametrize(
    ("template", "chosen", "rejected"),
    [
        ("qwen3", [HI, HELLO, HI, HELLO], [HI, BYE, HI, BYE]),  # drops what was said before the last question
        ("r1", [HI, {**HELLO, "content": "<think>\nA greeting.\n</think>\n\nHello!"}], [HI, BYE]),
    ],
)
def test_a_pair_of_which_a_chat_template_keeps_two_prompts_is_left_out(data, tmp_path, template, chosen, rejected):
    markup, names = chat_templates.MARKUP[template]
    tokenizer = create(data).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    tokenizer.chat_template = markup
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    mixed = [{"chosen": chosen, "rejected": rejected}, *rows()] * 2
    task = create(write(tmp_path / "a.jsonl", mixed), model=str(tmp_path / "model"), sequence_length=128)
    for side in (task.train, task.validation):
        for one, other in side.places:
            prompts = [
                tokens[: is_answer.tolist().index(True)]
                for tokens, is_answer in (side.answers[one], side.answers[other])
            ]
            assert prompts[0].tolist() == prompts[1].tolist()
    assert (
        "pairs left out, since the chat template doesn't put what is learned of both after the same prompt"
        in (task.provenance["notes"])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta must be more than 0, not 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0, below .5, not 0.5"),
        ({"loss": "hinge"}, "loss must be sigmoid or ipo, not 'hinge'"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect on the loss ipo"),
        ({"loss": 3}, "the option loss must be a text, not 3"),
        ({"beta": "much"}, "the option beta must be a number, not 'much'"),
    ],
)
def test_an_option_that_cant_be_is_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        create(data, options=options)


def test_rates_for_pretrained_weights_are_a_twentieth_of_fine_tunings_as_in_trl():
    def rate(kind, *, from_scratch=False):
        given = {"learning_rate": None, "seed": 0, "from_scratch": from_scratch, "kind": kind}
        return [hyperparameters(method, {}, **given)["lr"] for method in ("adamw", "lora")]

    assert (rate("language"), rate("preference")) == ([2e-5, 2e-4], [1e-6, 1e-5])
    assert rate("preference", from_scratch=True) == rate("language", from_scratch=True)


# ---- in a run


class OnTiny:
    """The task, with a tiny model in place of its own."""

    def __init__(self, data):
        self.task = create(data)
        # protocols don't see what comes by __getattr__, from Python 3.12 on
        self.remember_training, self.remember_held_out = self.task.remember_training, self.task.remember_held_out
        self.state_dict, self.load_state_dict = self.task.state_dict, self.task.load_state_dict

    def __getattr__(self, name):
        return getattr(self.task, name)


def loop(data, method, *, kind="llama", **given):
    model = tiny(kind=kind)
    training = Training(steps=4, batch_size=3, sequence_length=64, model="", data=data, evaluate_every=2, **given)
    optimizer = optimizers.create(method, model, **{"lr": 3e-3} | METHODS[method])
    return Loop(model, optimizer, OnTiny(data), training, seed=0, device=torch.device("cpu"))


METHODS = {
    "badam": {"switch_every": 1},
    "lora": {"rank": 2, "dropout": 0.2},
    "mezo": {},
    "qlora": {"rank": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_model_that_a_run_starts_from_as_its_method_holds_it(data, method):
    run = loop(data, method)
    run.ask_reference(run.task)
    with torch.no_grad():
        run.model.eval()
        batch = run.task.batch(0)
        torch.testing.assert_close(log_probabilities(run.model, batch), batch["reference"].flatten())
    run.run()
    assert all(math.isfinite(entry["loss"]) for entry in run.progress.history)
    assert run.progress.history[0]["loss"] == pytest.approx(math.log(2), abs=0.1)  # adapters have dropout in training


@pytest.mark.parametrize("method", ["badam", "lora"])
def test_a_run_that_goes_on_has_the_reference_of_the_undisturbed_run(data, method, tmp_path):
    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 3:
            raise Stop

    whole = loop(data, method)
    whole.run()
    with pytest.raises(Stop):
        loop(data, method).run(report=stop, checkpoint_path=tmp_path / "run.pt", checkpoint_every=2)
    continued = loop(data, method)
    continued.run(checkpoint_path=tmp_path / "run.pt", checkpoint_every=2)
    for ours, other in ((one.task.train.reference, two.task.train.reference) for one, two in [(whole, continued)]):
        assert torch.equal(ours, other)
    entries = [[{**one, "seconds": 0} for one in run.progress.history] for run in (whole, continued)]
    assert entries[0] == entries[1]
    for p, q in zip(whole.model.parameters(), continued.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_only_pairs_that_a_run_uses_are_looked_at(data):
    task = create(data)
    task.remember_training(tiny(), 2)
    assert task.batch(1)["reference"].isfinite().all()
    with pytest.raises(RuntimeError, match="the reference hasn't seen these training pairs"):
        task.batch(4)
    with pytest.raises(RuntimeError, match="the reference hasn't seen these held-out pairs"):
        task.evaluate(tiny())


# ---- trl


@pytest.mark.slow
def test_the_loss_is_trls(remembered, tmp_path):
    trl = pytest.importorskip("trl")
    policy, reference, batch = tiny(1), tiny(0), remembered.batch(2)
    some = datasets.Dataset.from_list(list(rows(4)))
    args = trl.DPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False)
    trainer = trl.DPOTrainer(policy, reference, args, train_dataset=some, processing_class=remembered.tokenizer)
    trainer.beta = 0.3

    def theirs(pairs, kind, smoothing=0.0):
        trainer.loss_types, trainer.label_smoothing = [kind], smoothing
        chosen_first = {name: one[pairs].transpose(0, 1).flatten(0, 1) for name, one in batch.items()}
        mask = (chosen_first["targets"] != -100).long()
        given = {name: chosen_first[name] for name in ("input_ids", "attention_mask")}
        return trainer.compute_loss(policy, {**given, "completion_mask": mask}).item()

    def ours(*how):
        return Preference(0.3, *how).loss(policy, batch).item()

    everything = [0, 1, 2]
    assert ours() == pytest.approx(theirs(everything, "sigmoid"), abs=1e-5)
    assert ours(0.0, "ipo") == pytest.approx(theirs(everything, "ipo"), abs=1e-5)
    # trl smooths the labels of "aot", which on a single pair is the sigmoid loss
    single = [theirs([pair], "aot", 0.1) for pair in range(3)]
    assert ours(0.1) == pytest.approx(sum(single) / 3, abs=1e-5)
