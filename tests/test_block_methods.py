"""What holds of every method that trains a part at a time: nothing is computed for what it doesn't train."""

import pytest
import torch
import transformers

import optimizers

LAYERS = 4
# with what freezes the embeddings, and no more than that
METHODS = {"badam": {}, "blockllm": {"sparsity": 0.0}, "lisa": {"layers": 3, "train_embeddings": False}, "hft": {}}
HEAD = {"always_train": ("classifier",)}
BATCH = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.tensor([0, 1])}


def build(method):
    """RoBERTa whose embeddings and first layer somebody froze."""
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**shape, num_hidden_layers=LAYERS))
    model.roberta.embeddings.requires_grad_(False)
    model.roberta.encoder.layer[0].requires_grad_(False)
    return model.train(), optimizers.create(method, model, **HEAD, **METHODS[method])


def expect_no_work_below_what_is_trained(model, optimizer):
    reached = set()
    for number, layer in enumerate(model.roberta.encoder.layer):
        layer.output.dense.register_full_backward_hook(lambda *_, number=number: reached.add(number))
    for _ in range(optimizer.cycle_length):
        reached.clear()
        optimizer.backward(model(**BATCH).loss)
        trained = {
            number
            for number, layer in enumerate(model.roberta.encoder.layer)
            if any(p.requires_grad for p in layer.parameters())
        }
        assert trained and reached == set(range(min(trained), LAYERS))
        optimizer.step()
        optimizer.zero_grad()
        optimizer.advance()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_backward_pass_ends_at_what_is_trained_though_a_trainer_turns_input_gradients_on(method, checkpointing):
    model, optimizer = build(method)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    expect_no_work_below_what_is_trained(model, optimizer)


@pytest.mark.parametrize("method", METHODS)
def test_re_entrant_checkpointing_which_would_lose_gradients_is_refused_with_the_way_out(method):
    model, _ = build(method)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match='"use_reentrant": False'):
        model(**BATCH)


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_model_takes_input_gradients_again(method):
    model, optimizer = build(method)
    plain = optimizer.finish()
    plain.enable_input_require_grads()
    assert plain.roberta.embeddings(BATCH["input_ids"]).requires_grad or plain(**BATCH).logits.requires_grad
    assert not plain._forward_pre_hooks
