"""Every method in the Hugging Face Trainer: it trains, and resumes to the last bit."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, MixtralConfig, Trainer, TrainingArguments
from transformers.models.auto.configuration_auto import AutoConfig

import optimizers
from membench.training.hf_trainer import UNMERGED, MethodTrainer, check_arguments

STEPS, PAUSE = 6, 4


class Sentences(Dataset):
    """24 sequences of 6 tokens; the label is the first token's parity."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        tokens = torch.randint(5, 50, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens[0] % 2}


def build_model(dtype=torch.float32, family="roberta"):
    values = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(family, vocab_size=50, pad_token_id=1, **values)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).to(dtype)


def build_method(name, model, **more):
    cls = optimizers.get(name)
    head = {"always_train": ("classifier",)} if "always_train" in optimizers.resolve(name) else {}
    return cls(model, **{**cls.example, **head, **more})


def arguments(folder, **more):
    usual = {
        "output_dir": str(folder), "max_steps": STEPS, "save_steps": PAUSE, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
        "max_grad_norm": 0.0, "save_only_model": False,
    }  # fmt: skip
    return TrainingArguments(**{**usual, **more})


def build_trainer(cls, name, folder, dtype=torch.float32, **more):
    model = build_model(dtype)
    given = {"train_dataset": Sentences(), "optimizers": (build_method(name, model), None)}
    args = arguments(folder, learning_rate=TrainingArguments.learning_rate, **more)  # the method has its own
    return cls(model=model, args=args, **given)


def check_defaults(method, args, expected):
    trainer = MethodTrainer(model=build_model(), args=args, train_dataset=Sentences(), method=method)
    trainer.create_optimizer()
    assert {name: trainer.method.defaults[name] for name in expected} == expected


def needs_the_method_trainer(name):
    method = build_method(name, build_model())
    return method.in_backward or method.needs_loss or method.asks_losses


def resume_matches(cls, name, tmp_path, dtype, **more):
    straight = build_trainer(cls, name, tmp_path / "straight", dtype, **more)
    straight.train()
    resumed = build_trainer(cls, name, tmp_path / "resumed", dtype, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{PAUSE}"))
    assert resumed.state.global_step == STEPS
    there = dict(resumed.model.named_parameters())
    for parameter, p in straight.model.named_parameters():
        assert torch.equal(p, there[parameter]), parameter
    start = dict(build_model(dtype).named_parameters())
    assert any(key in start and not torch.equal(start[key], p) for key, p in there.items()) or "lora" in name


IN_BF16 = ("adamw", "badam", "lomo", "blockllm")  # of masters, of none, of few entries; the others' are slow tests
DTYPES = [pytest.param(name, torch.float32, id=f"{name}-fp32") for name in optimizers.available()] + [
    pytest.param(name, torch.bfloat16, id=f"{name}-bf16", marks=[] if name in IN_BF16 else pytest.mark.slow)
    for name in optimizers.available()
]


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_a_method_resumes_in_the_trainer_to_the_last_bit(name, dtype, tmp_path):
    cls = MethodTrainer if needs_the_method_trainer(name) else Trainer
    resume_matches(cls, name, tmp_path, dtype)


@pytest.mark.parametrize("name", ["adamw", "badam"])
def test_the_method_trainer_gives_what_the_stock_trainer_gives(name, tmp_path):
    stock = build_trainer(Trainer, name, tmp_path / "stock")
    stock.train()
    ours = build_trainer(MethodTrainer, name, tmp_path / "ours")
    ours.train()
    for p, q in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_under_gradient_checkpointing_the_backward_pass_still_stops_at_badams_active_block(tmp_path):
    model = build_model()
    method = build_method("badam", model, order="descending")
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Sentences(), optimizers=(method, None))
    reached = set()
    for i, layer in enumerate(model.roberta.encoder.layer):
        layer.attention.self.query.register_full_backward_hook(lambda *_, i=i: reached.add(i))
    trainer.train()
    assert reached == {2}


def test_blockllm_in_a_stock_trainer_says_that_it_must_see_the_loss(tmp_path):
    with pytest.raises(RuntimeError, match="must see the loss"):
        build_trainer(Trainer, "blockllm", tmp_path).train()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1, not 2"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 can't reach"),
        ({"fp16": True}, "fp16 loss scaling"),
        ({"auto_find_batch_size": True}, "a step that runs out of memory is half done, and auto_find_batch_size"),
    ],
)
def test_what_a_method_that_updates_in_backward_cannot_honour_is_refused(given, words, tmp_path):
    model = build_model()
    method = optimizers.AdamW(model, in_backward=True)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **{"max_grad_norm": 0.0, **given})
    with pytest.raises(ValueError, match=words):
        MethodTrainer(model=model, args=args, train_dataset=Sentences(), optimizers=(method, None))


def test_fp16_of_accelerates_configuration_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as `accelerate launch --mixed_precision fp16` does
    args = arguments(tmp_path)
    assert not args.fp16
    with pytest.raises(ValueError, match="AdamW computes its own gradients, which fp16 loss scaling can't reach"):
        check_arguments(optimizers.AdamW(build_model()), args)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optim": "adafactor"}, "so optim=adafactor would do nothing"),
        ({"optim": "adamw_torch_8bit"}, "so optim=adamw_torch_8bit would do nothing"),
        ({"optim_args": "rank=64"}, "so optim=adamw_torch_fused, optim_args=rank=64 would do nothing"),
    ],
)
def test_an_optimizer_that_the_method_replaces_is_refused(given, words, tmp_path):
    args = arguments(tmp_path, **{"optim": "adamw_torch_fused", **given})
    with pytest.raises(ValueError, match=words):
        MethodTrainer(model=build_model(), args=args, train_dataset=Sentences(), method="badam").create_optimizer()


@pytest.mark.parametrize("name", optimizers.available())
def test_a_saved_model_and_a_checkpoint_load_as_what_was_trained(name, tmp_path):
    trainer = build_trainer(MethodTrainer, name, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    batch = {"input_ids": torch.stack([Sentences()[i]["input_ids"] for i in range(4)])}
    trainer.model.eval()
    expected = trainer.model(**batch).logits
    last = tmp_path / f"checkpoint-{STEPS}"
    for folder in (tmp_path / "saved", last):
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)
    finished = trainer.method.finish()
    torch.testing.assert_close(finished(**batch).logits, expected, rtol=0, atol=1e-6)


def trainer_of_experts(folder, dtype, **more):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = MixtralConfig(vocab_size=50, pad_token_id=1, num_local_experts=3, num_key_value_heads=2, **shape)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).to(dtype)
    model.model.norm.float(), model.score.float()  # as some keep them
    data = {"train_dataset": Sentences(), "eval_dataset": Sentences()}
    return MethodTrainer(model=model, args=arguments(folder, **more), **data, method="adamw")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_transformers_saves_one_by_one_resume_to_the_last_bit(dtype, tmp_path):
    straight = trainer_of_experts(tmp_path / "a", dtype)
    straight.train()
    resumed = trainer_of_experts(tmp_path / "b", dtype)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{PAUSE}"))
    there = dict(resumed.model.named_parameters())
    for name, p in straight.model.named_parameters():
        assert torch.equal(p, there[name]), name


def test_the_best_model_that_is_loaded_at_the_end_has_its_own_experts(tmp_path):
    how = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = trainer_of_experts(tmp_path, torch.float32, **how, greater_is_better=True)  # so the first is the best
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    expected = AutoModelForSequenceClassification.from_pretrained(best).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_what_is_pushed_to_the_hub_is_the_merged_model_alone(tmp_path):
    trainer = build_trainer(MethodTrainer, "lora", tmp_path, max_steps=1, save_steps=1)
    trainer.train()
    trainer.save_model(_internal_call=True)  # as `push_to_hub` does
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / UNMERGED).exists()
    assert (tmp_path / "checkpoint-1" / UNMERGED).exists()


@pytest.mark.parametrize("name", ["badam", "lora", "blockllm", "lomo"])
def test_a_method_by_its_name_is_built_on_the_trainers_model_and_resumes_to_the_last_bit(name, tmp_path):
    cls = optimizers.get(name)
    given = {key: value for key, value in cls.example.items() if key != "lr"}
    if "always_train" in optimizers.resolve(name):
        given["always_train"] = ("classifier",)

    def trainer(folder, **how):
        args = arguments(folder, learning_rate=1e-3)
        return MethodTrainer(model=build_model(), args=args, train_dataset=Sentences(), **how)

    straight = trainer(tmp_path / "a", method=name, method_kwargs=given)
    straight.train()
    assert straight.method.defaults["lr"] == 1e-3
    resumed = trainer(tmp_path / "b", optimizer_cls_and_kwargs=(cls, given))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{PAUSE}"))
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("method", "arguments_given", "expected"),
    [
        ("badam", {"learning_rate": 1, "weight_decay": 0}, {"lr": 1, "weight_decay": 0}),  # whole numbers
        ("torch.optim:Adam", {"weight_decay": 0.25}, {"lr": 1e-3, "weight_decay": 0.25}),  # whose own default is 0
        ("badam", {"adam_beta1": 0.5, "adam_epsilon": 1e-5}, {"betas": (0.5, 0.999), "eps": 1e-5}),
        ("badam:lr=0.5:weight_decay=0.25", {"weight_decay": 0.125}, {"lr": 0.5, "weight_decay": 0.25}),
    ],
)
def test_the_arguments_are_the_methods_defaults_unless_its_name_says_others(
    method, arguments_given, expected, tmp_path
):
    check_defaults(method, arguments(tmp_path, **arguments_given), expected)


@pytest.mark.parametrize(
    ("method", "arguments_given", "expected"),
    [
        ("apollo", {}, {"betas": (0.9, 0.999), "eps": 1e-6}),
        ("apollo", {"adam_beta2": 0.5}, {"betas": (0.9, 0.5), "eps": 1e-6}),
        ("apollo", {"adam_epsilon": 1e-5}, {"eps": 1e-5}),
        ("badam:betas=(0.5, 0.6)", {"adam_beta1": 0.7}, {"betas": (0.5, 0.6)}),
        ("bitsandbytes.optim:Lion8bit", {"adam_beta1": 0.95}, {"betas": (0.95, 0.99)}),  # its own second is 0.99
    ],
)
def test_betas_and_eps_that_nobody_set_are_the_methods_own(method, arguments_given, expected, tmp_path):
    check_defaults(method, arguments(tmp_path, **arguments_given), expected)


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("sgd", {"adam_beta1": 0.5}, "SGD doesn't have Adam's betas, so adam_beta1=0.5 would do nothing: leave it out"),
        ("mezo", {"adam_epsilon": 1e-4}, "MeZO doesn't have Adam's eps, so adam_epsilon=0.0001 would do nothing"),
        (
            "torch.optim:Rprop",
            {"weight_decay": 0.1},
            "Rprop doesn't have weight_decay, so weight_decay=0.1 would do nothing",
        ),
    ],
)
def test_an_argument_for_what_the_method_does_not_have_is_refused(method, given, words, tmp_path):
    args = arguments(tmp_path, **given)
    trainer = MethodTrainer(model=build_model(), args=args, train_dataset=Sentences(), method=method)
    with pytest.raises(ValueError, match=words):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rate": 1e-3}, "SGD is built with lr=0.25, so learning_rate=0.001 would do nothing: leave it out"),
        ({"learning_rate": 0.25, "weight_decay": 0.5}, "built with weight_decay=0.0, so weight_decay=0.5"),
        ({"learning_rate": 0.25, "adam_beta1": 0.5}, "SGD is built without Adam's betas, so adam_beta1=0.5"),
        ({"learning_rate": 0.25}, None),
    ],
)
def test_an_argument_other_than_what_a_built_method_has_is_refused(given, words, tmp_path):
    model = build_model()

    def build():
        method = optimizers.get("sgd")(model, lr=0.25)
        args = arguments(tmp_path, **given)
        return MethodTrainer(model=model, args=args, train_dataset=Sentences(), optimizers=(method, None))

    if words is None:
        assert build().method.defaults["lr"] == 0.25
    else:
        with pytest.raises(ValueError, match=words):
            build()


@pytest.mark.parametrize(("name", "logged"), [("adamw", True), ("lomo", False), ("mezo", False)])
def test_a_norm_of_gradients_is_logged_only_where_there_are_gradients(name, logged, tmp_path):
    trainer = build_trainer(MethodTrainer, name, tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert (norms and norms[0] > 0) if logged else not norms


def test_what_a_checkpoint_lacks_to_go_on_from_it_is_said(tmp_path):
    build_trainer(MethodTrainer, "badam", tmp_path, save_only_model=True).train()
    again = build_trainer(MethodTrainer, "badam", tmp_path)
    with pytest.raises(ValueError, match=r"has no optimizer\.pt, so training can't go on from it: .* save_only_model"):
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{PAUSE}"))


def test_of_a_step_that_ran_out_of_memory_nothing_is_left_when_the_trainer_tries_fewer_rows(tmp_path):
    more = {"auto_find_batch_size": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    trainer = build_trainer(MethodTrainer, "mezo", tmp_path, max_steps=1, save_strategy="no", **more)
    slopes, ask = [], trainer.method.ask

    def ask_until_full(closure):
        slopes.append(len(trainer.method._slopes))
        if len(slopes) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return ask(closure)

    trainer.method.ask = ask_until_full
    trainer.train()
    assert slopes == [0, 1, 0, 1]  # the second micro-batch failed; then both anew


def test_the_arguments_seed_is_that_of_the_methods_own_choices(tmp_path):
    def first_values(seed):
        args = arguments(tmp_path, seed=seed)
        trainer = MethodTrainer(model=build_model(), args=args, train_dataset=Sentences(), method="lora")
        trainer.create_optimizer()
        return next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_values(1), first_values(1)) and not torch.equal(first_values(1), first_values(2))


def test_adams_epsilon_is_not_how_far_mezo_moves_the_weights(tmp_path):
    args = arguments(tmp_path, adam_epsilon=1e-8)
    trainer = MethodTrainer(model=build_model(), args=args, train_dataset=Sentences(), method="mezo")
    trainer.create_optimizer()
    assert trainer.method.eps == 1e-3


def test_a_rate_that_a_file_gave_as_a_text_is_refused_in_a_sentence(tmp_path):
    args = arguments(tmp_path, learning_rate="1e-4")
    trainer = MethodTrainer(model=build_model(), args=args, train_dataset=Sentences(), method="badam")
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0, not '1e-4'"):
        trainer.create_optimizer()


def test_every_loss_that_a_method_asks_for_is_that_of_the_labels(tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    args = arguments(tmp_path, max_steps=2)
    given = {"method": "mezo", "compute_loss_func": loss}
    MethodTrainer(model=build_model(), args=args, train_dataset=Sentences(), **given).train()
    assert len(seen) == 4 and all(torch.is_tensor(labels) for labels in seen)


def test_a_trainer_that_makes_its_model_anew_resumes_with_adapters_in_the_new_one(tmp_path):
    given = {"train_dataset": Sentences(), "method": "lora", "method_kwargs": {"always_train": ("classifier",)}}
    trainer = MethodTrainer(model_init=lambda: build_model(), args=arguments(tmp_path), **given)
    trainer.train()
    expected = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{PAUSE}"))
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, expected[name]), name


class TrainerOfItsOwnModel(Trainer):
    """As TRL's trainers, which take the path of a model."""

    def __init__(self, model, **given):
        super().__init__(model=AutoModelForSequenceClassification.from_pretrained(model), **given)


class Mixed(MethodTrainer, TrainerOfItsOwnModel):
    pass


def test_the_method_trainer_is_a_mix_in_for_a_trainer_that_builds_its_model(tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    given = {"switch_every": 2, "always_train": ("classifier",)}
    trainer = Mixed(
        str(tmp_path / "model"),
        args=arguments(tmp_path),
        train_dataset=Sentences(),
        method="badam",
        method_kwargs=given,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("encoder.layer" in name for name in moved) and not any("embeddings" in name for name in moved)


@pytest.mark.parametrize("family", ["roberta", "llama"])
@pytest.mark.parametrize("name", ["sgd", "mezo"])
def test_accumulated_losses_are_those_of_the_whole_batch(family, name, tmp_path):
    """A stock Trainer adds up those of micro-batches: a classifier's loss was twice as large."""
    trained = []
    for parts in (1, 2):
        args = arguments(tmp_path, gradient_accumulation_steps=parts, per_device_train_batch_size=4 // parts)
        model = build_model(family=family).eval()
        model.train = lambda mode=True, model=model: model  # without dropout, whose masks differ
        trainer = MethodTrainer(model=model, args=args, train_dataset=Sentences(), method=name)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained.append((losses, torch.cat([p.flatten() for p in trainer.model.parameters()])))
    (whole, weights), (accumulated, others) = trained
    assert accumulated == pytest.approx(whole, rel=1e-4)
    torch.testing.assert_close(others, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_a_stock_trainer_that_clips_learns_that_there_is_nothing_to_clip(name, tmp_path):
    with pytest.raises(ValueError, match="leaves no gradients to clip: .* max_grad_norm=0"):
        build_trainer(Trainer, name, tmp_path, max_grad_norm=1.0).train()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "needs a membench method"),
        ({"method_kwargs": {"lr": 1.0}}, "needs the name of a method"),
        ({"method": "badam", "optimizer_cls_and_kwargs": (optimizers.AdamW, {})}, "not both"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}, "not SGD"),
    ],
)
def test_how_the_method_is_given_is_clear(how, words, tmp_path):
    with pytest.raises(TypeError, match=words):
        MethodTrainer(model=build_model(), args=arguments(tmp_path), train_dataset=Sentences(), **how)


def test_a_mistyped_method_or_keyword_is_refused_before_the_model_is_built(tmp_path):
    for how in ({"method": "badma"}, {"method": "badam", "method_kwargs": {"switch": 3}}):
        with pytest.raises(ValueError, match="Did you mean"):
            MethodTrainer(model=None, args=arguments(tmp_path), **how)


def test_torchs_habit_of_giving_parameters_is_answered_in_a_stock_trainer(tmp_path):
    given = {"optimizer_cls_and_kwargs": (optimizers.BAdam, {"lr": 1e-3})}
    trainer = Trainer(model=build_model(), args=arguments(tmp_path), train_dataset=Sentences(), **given)
    with pytest.raises(TypeError, match=r"give the model, .*MethodTrainer\(method="):
        trainer.train()


def test_a_stock_optimizer_is_refused_with_the_way_out(tmp_path):
    model = build_model()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"not SGD; for a stock optimizer use transformers\.Trainer"):
        MethodTrainer(model=model, args=args, train_dataset=Sentences(), optimizers=(optimizer, None))
