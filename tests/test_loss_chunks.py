"""A loss in pieces of the sequence is the model's own, and the logits of the whole sequence never exist."""

import pytest
import torch
import transformers
from architectures import ARCHITECTURES

from membench.memory.meter import MemoryMeter
from tasks.models.loss_chunks import compute_loss_in_chunks

CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.is_causal]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# those that change their logits, one whose decoder lies deeper than its base model, one with biases in its head
OTHERS = {
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 4},
}


def build(kind, **more):
    config = transformers.AutoConfig.for_model(kind, **SHAPE, **more)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def batch():
    """Three sequences of 11 tokens: pieces of unequal size, one sequence padded, labels missing in front."""
    tokens = torch.randint(3, 40, (3, 11), generator=torch.Generator().manual_seed(0))
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    labels[0, 6:], mask[0, 6:], labels[1, :4] = -100, 0, -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, given):
    torch.manual_seed(1)
    loss = model(**given, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def expect_equal(model, chunks, given):
    expected, gradients = loss_and_gradients(model, given)
    compute_loss_in_chunks(model, chunks)
    loss, ours = loss_and_gradients(model, given)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", CAUSAL)
def test_loss_and_gradients_are_those_of_the_whole_sequence(name):
    architecture = ARCHITECTURES[name]
    expect_equal(architecture.build(), 4, architecture.batch())


@pytest.mark.parametrize("kind", OTHERS)
def test_whatever_a_model_does_to_its_logits_is_done(kind):
    expect_equal(build(kind, **OTHERS[kind]), 3, batch())


def test_a_trainers_number_of_items_divides_the_loss_as_in_the_model_itself():
    expect_equal(build("llama"), 3, {**batch(), "num_items_in_batch": torch.tensor(70)})


@pytest.mark.parametrize("chunks", [2, 11, 99])
def test_any_number_of_pieces_will_do(chunks):
    expect_equal(build("llama"), chunks, batch())


def test_dropout_has_the_same_masks():
    expect_equal(build("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.0), 4, batch())


def test_packed_texts_keep_their_own_mask():
    given = batch()
    mask = torch.zeros(3, 1, 11, 11).masked_fill(~torch.ones(11, 11, dtype=torch.bool).tril(), torch.finfo().min)
    mask[:, :, 5:, :5] = torch.finfo().min
    expect_equal(build("llama"), 4, {**given, "attention_mask": mask})


def test_without_labels_the_logits_are_there_as_ever():
    model, given = build("llama"), batch()
    del given["labels"]
    expected = model(**given).logits
    compute_loss_in_chunks(model, 4)
    assert torch.equal(model(**given).logits, expected)


def test_each_tokens_loss_is_given():
    model, given = build("llama"), batch()
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), given["labels"][:, 1:], reduction="none")
    compute_loss_in_chunks(model, 4)
    output = model(**given)
    found = output.token_losses.view(expected.shape[0], -1)
    torch.testing.assert_close(found[:, :-1], expected)
    assert not found[:, -1].any() and "logits" not in output
    assert not any(value._is_view() for value in output.values())  # FSDP warns of outputs that are


def test_in_low_precision_the_loss_agrees_as_far_as_it_goes():
    model, given = build("llama").bfloat16(), batch()
    expected, _ = loss_and_gradients(model, given)
    compute_loss_in_chunks(model, 4)
    torch.testing.assert_close(loss_and_gradients(model, given)[0], expected, rtol=1e-2, atol=0)


def test_global_randomness_and_the_mode_are_left_alone():
    model = build("llama")
    before = torch.get_rng_state()
    compute_loss_in_chunks(model, 4)
    assert torch.equal(torch.get_rng_state(), before) and model.training


def test_the_logits_of_the_whole_sequence_never_exist():
    tokens, whole = torch.randint(0, 5000, (2, 64)), 2 * 64 * 5000 * 4
    as_large = {}
    for chunks in (1, 8):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, "vocab_size": 5000})).train()
        if chunks > 1:
            compute_loss_in_chunks(model, chunks)
        with MemoryMeter(model) as meter:
            with meter.phase("forward"):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            with meter.phase("backward"):
                loss.backward()
        as_large[chunks] = sum(size >= whole for size in meter.trace.sizes)
    assert as_large[1] and not as_large[8]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: ARCHITECTURES["roberta"].build(), "RobertaForSequenceClassification isn't a causal language model"),
        (lambda: torch.nn.Linear(2, 2), "Linear isn't a causal language model"),
        (lambda: build("mixtral", output_router_logits=True), "MixtralForCausalLM has a loss of its own"),
        (lambda: build("bart", decoder_layers=2, d_model=32), "BartForCausalLM has a loss of its own: "),
    ],
)
def test_what_has_another_loss_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        compute_loss_in_chunks(model(), 4)
