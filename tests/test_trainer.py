"""Every method in the Hugging Face Trainer: it trains, and resumes to the last bit."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.models.auto.configuration_auto import AutoConfig

import optimizers
from membench.training.hf_trainer import MethodTrainer

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


def build_trainer(cls, name, folder, dtype=torch.float32, **more):
    model = build_model(dtype)
    arguments = {
        "output_dir": str(folder), "max_steps": STEPS, "save_steps": PAUSE, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
        "max_grad_norm": 0.0, "save_only_model": False,
    }  # fmt: skip
    args = TrainingArguments(**{**arguments, **more})
    return cls(model=model, args=args, train_dataset=Sentences(), optimizers=(build_method(name, model), None))


def in_backward(name):
    method = build_method(name, build_model())
    return method.in_backward or method.needs_loss


def resume_matches(cls, name, tmp_path, dtype, **more):
    straight = build_trainer(cls, name, tmp_path / "straight", dtype, **more)
    straight.train()
    build_trainer(cls, name, tmp_path / "stopped", dtype, **more).train()
    resumed = build_trainer(cls, name, tmp_path / "resumed", dtype, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{PAUSE}"))
    assert resumed.state.global_step == STEPS
    there = dict(resumed.model.named_parameters())
    for parameter, p in straight.model.named_parameters():
        assert torch.equal(p, there[parameter]), parameter
    start = dict(build_model(dtype).named_parameters())
    assert any(key in start and not torch.equal(start[key], p) for key, p in there.items()) or "lora" in name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", optimizers.available())
def test_a_method_resumes_in_the_trainer_to_the_last_bit(name, dtype, tmp_path):
    cls = MethodTrainer if in_backward(name) else Trainer
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
    ],
)
def test_what_a_method_that_updates_in_backward_cannot_honour_is_refused(given, words, tmp_path):
    model = build_model()
    method = optimizers.AdamW(model, in_backward=True)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **{"max_grad_norm": 0.0, **given})
    with pytest.raises(ValueError, match=words):
        MethodTrainer(model=model, args=args, train_dataset=Sentences(), optimizers=(method, None))


def test_a_stock_optimizer_is_refused_with_the_way_out(tmp_path):
    model = build_model()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"not SGD; for a stock optimizer use transformers\.Trainer"):
        MethodTrainer(model=model, args=args, train_dataset=Sentences(), optimizers=(optimizer, None))
