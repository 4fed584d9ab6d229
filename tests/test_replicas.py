"""Replicas without a wrapper: two processes have the weights of one process with both batches, for every method."""

import functools
import importlib

import gloo
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import optimizers
from optimizers.contract import Subject, batch, build_model, weights_of

STEPS = 4
# variants that use gradients or losses elsewhere than in `step()`
VARIANTS = {
    "adamw in backward": ("adamw", {"in_backward": True}),
    "badam in backward": ("badam", {"in_backward": True}),
    "galore in backward": ("galore", {"in_backward": True}),
    "galore in 8 bits": ("galore", {"weights": "8bit"}),
    "lomo clipped": ("lomo", {"clip_norm": 0.1}),
    "lora-fa": ("lora", {"variant": "lora-fa"}),
    "blockllm rows": ("blockllm", {"rows": 3}),
}
SUBJECTS = {name: (name, {}) for name in optimizers.available()} | VARIANTS


def subject(name):
    method, more = SUBJECTS[name]
    cls = optimizers.get(method)
    return Subject(cls, {**cls.example, **more})


def loss_of(model, part, step):
    """The mean loss of one half of the batch, or all of it."""
    tokens, labels = batch(step)
    return F.cross_entropy(model(tokens[part]), labels[part])


def model_without_dead_ends():
    """In fp64, without training what has a true gradient of zero: Adam would make a step of its last bits."""
    model = build_model(torch.float64)
    for layer in model.layers:
        layer.self_attn.k_proj.bias.requires_grad_(False)
    return model


def train_part(name, part, replicate, clip=None, finish=True):
    model = model_without_dead_ends()
    optimizer = subject(name).build(model)
    if replicate:
        with torch.no_grad():  # they needn't start equal
            model.classifier.weight.add_(torch.distributed.get_rank())
        optimizer.data_parallel()
    for step in range(STEPS):
        optimizer.ask(functools.partial(loss_of, model, part, step))
        if clip is not None:
            optimizer.average_gradients()
            nn.utils.clip_grad_norm_(optimizer.trainable, clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(optimizer.finish() if finish else model)  # in few bits they are no parameters


def half(rank, names):
    part = slice(8 * rank, 8 * rank + 8)
    trained = {name: train_part(name, part, replicate=True) for name in names}
    return {**trained, "clipped": train_part("adamw", part, replicate=True, clip=0.1)}


@pytest.fixture(scope="module")
def halves():
    importlib.import_module("peft")  # here, or each process would import it
    return gloo.run(half, list(SUBJECTS))


@pytest.mark.parametrize("name", [*SUBJECTS, "clipped"])
def test_two_replicas_are_equal_to_the_bit_and_are_one_process_on_the_joined_batch(halves, name):
    one, other = (trained[name] for trained in halves)
    assert all(torch.equal(p, other[key]) for key, p in one.items())
    method, clip = ("adamw", 0.1) if name == "clipped" else (name, None)
    alone = train_part(method, slice(None), replicate=False, clip=clip)
    assert max(((one[key] - p).abs().max().item(), key) for key, p in alone.items()) < (1e-6, "")


class Experts(nn.Module):
    """Each row of a batch goes to one expert; a replica's rows may leave some without any."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(6, 6) for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(6, 1)

    def forward(self, x, experts):
        for layer in self.layers:
            rows = [(experts == number).nonzero()[:, 0] for number in range(3)]
            mixed = [x[some] + expert(x[some]).tanh() for some, expert in zip(rows, layer, strict=True) if len(some)]
            x = torch.cat(mixed)[torch.cat(rows).argsort()]
        return self.head(x)


TOKENS_OF_EXPERTS = [[0, 0, 1, 1], [0, 1, 2, 2], [1, 1, 1, 0], [2, 2, 2, 2]]  # two rows for each replica
CHOOSING = ("badam", "blockllm", "hft", "lisa")
# those that update in the backward pass, or decide by what they see in a step
UNEVEN = {name: given for name, given in VARIANTS.items() if "backward" in name or "clipped" in name}
UNEVEN |= {name: SUBJECTS[name] for name in ("adamw", "adalomo", "galore", "mezo", "blockllm rows", *CHOOSING)}
UNEVEN |= {"lisa in backward": ("lisa", {"in_backward": True})}


def loss_of_experts(model, x, experts):
    return (model(x, experts).squeeze(1) - x.sum(1)).square().mean()


def train_experts(name, part, replicate):
    method, more = UNEVEN[name]
    model = Experts().double()
    head = {"always_train": ("head",)} if "always_train" in optimizers.resolve(method) else {}
    optimizer = optimizers.create(method, model, **optimizers.get(method).example | more | head)
    if replicate:
        optimizer.data_parallel()
    for step, experts in enumerate(TOKENS_OF_EXPERTS):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.ask(functools.partial(loss_of_experts, model, x[part], torch.tensor(experts)[part]))
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(optimizer.finish())


def expect_as_by_one_process(train, names):
    """Two replicas, each with two of four rows, are equal to the bit, and as one process with all of them."""
    parts = (slice(2), slice(2, 4))
    halves = gloo.run(lambda rank: {name: train(name, parts[rank], replicate=True) for name in names})
    for name in names:
        one, other = (trained[name] for trained in halves)
        assert all(torch.equal(p, other[key]) for key, p in one.items()), name
        alone = train(name, slice(None), replicate=False)
        assert max(((one[key] - p).abs().max().item(), key) for key, p in alone.items()) < (1e-9, ""), name


def test_an_expert_that_has_tokens_on_one_replica_only_is_trained_as_by_one_process_in_the_backward_pass_too():
    expect_as_by_one_process(train_experts, UNEVEN)


class Towers(nn.Module):
    """A tower for the rows with an image, which doesn't run if there are none, below that for all rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision, self.layers = (nn.ModuleList(nn.Linear(6, 6) for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(6, 1)

    def forward(self, x, has_image):
        seen, unseen = x[has_image], x[~has_image]
        for layer in self.vision if len(seen) else ():
            seen = seen + layer(seen).tanh()
        x = torch.cat([seen, unseen])
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def train_towers(name, part, replicate):
    model = Towers().double()
    head = {"always_train": ("head",)}  # a loss depends on something that is trained, without an image too
    optimizer = optimizers.create(name, model, **optimizers.get(name).example | head)
    if replicate:
        optimizer.data_parallel()
    for step in range(STEPS):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.backward(model(x[part], torch.tensor([True, True, False, False])[part]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(optimizer.finish())


def test_a_tower_that_the_first_batch_of_one_replica_reaches_is_trained_as_by_one_process():
    expect_as_by_one_process(train_towers, CHOOSING)
