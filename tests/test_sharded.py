"""Models sharded by FSDP2, and wrong ways to train on several processes: right, or one sentence at the first step."""

import functools
import importlib
import re

import gloo
import pytest
import torch
from test_replicas import STEPS, SUBJECTS, loss_of, model_without_dead_ends, subject, train_part
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import optimizers
from optimizers.contract import build_model, weights_of
from optimizers.shared.sharded import gathered

REFUSED = {
    "mezo": "MeZO moves each module's weights as it runs, which a sharded model replaces",
    "galore in 8 bits": "GaLore has weights in 8 bits, which FSDP2 can't shard",
}


def shard(model):
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train_on(model, optimizer, part, steps=STEPS):
    for step in range(steps):
        optimizer.ask(functools.partial(loss_of, model, part, step))
        optimizer.step()
        optimizer.zero_grad()
    return {key: gathered(p) for key, p in weights_of(model).items()}


def sharded(name, part):
    model, tested = model_without_dead_ends(), subject(name)
    if tested.method.adds_parameters:  # adapters are sharded with the rest
        optimizer = tested.build(model)
        shard(model)
    else:
        optimizer = tested.build(shard(model))
    return train_on(model, optimizer, part)


def sharded_stock(path, part):
    model = shard(model_without_dead_ends())
    return train_on(model, optimizers.get(path)(model), part)


def sharded_afterwards(name, part):
    model = model_without_dead_ends()
    optimizer = subject(name).build(model)
    shard(model)
    return train_on(model, optimizer, part)


def sharded_unseen(name, part):
    """Without a call of the method before gradients are there."""
    model = model_without_dead_ends()
    optimizer = subject(name).build(model)
    shard(model)
    loss_of(model, part, 0).backward()
    optimizer.step()


def swapped(name, part):
    """As accelerate's `prepare` does under FSDP2: it puts the shards into the groups itself."""
    model = model_without_dead_ends()
    optimizer = subject(name).build(model)
    shard(model)
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [named[one] for one in group["param_names"]]
    return train_on(model, optimizer, part)


def evaluated_first(name, part):
    """Which leaves the outermost weights unsharded."""
    model = shard(model_without_dead_ends())
    with torch.no_grad():
        loss_of(model, part, 0)
    return train_on(model, subject(name).build(model), part)


def kept_whole(name, part):
    """As a loop has it that gathers weights once for several backward passes."""
    model = shard(model_without_dead_ends())
    model.set_reshard_after_backward(False)
    return train_on(model, subject(name).build(model), part)


def sharded_in_bf16(name, part, **given):
    """With weights in low precision, and the adapters of a method that has some."""
    model, tested = model_without_dead_ends().bfloat16(), subject(name)
    if tested.method.adds_parameters:
        optimizer = tested.build(model, **given)
        shard(model)
    else:
        optimizer = tested.build(shard(model), **given)
    return train_on(model, optimizer, part)


class OwnWrapper(DistributedDataParallel):
    pass


def wrapped(name, part, on="wrapper", wrap=DistributedDataParallel, **given):
    model = model_without_dead_ends()
    model.unused.requires_grad_(False)  # without find_unused_parameters torch would wait for it
    before = subject(name).build(model, **given) if on == "before" else None
    wrapper = wrap(model)
    optimizer = before or subject(name).build(wrapper if on == "wrapper" else model, **given)
    weights = train_on(wrapper, optimizer, part, steps=2)
    return {key.removeprefix("module."): p for key, p in weights.items()}


def flattened(name, part):
    model = FullyShardedDataParallel(model_without_dead_ends(), use_orig_params=True, device_id=torch.device("cpu"))
    return train_on(model, subject(name).build(model), part)


def nothing_averaged(name, part):
    model = model_without_dead_ends()
    return train_on(model, subject(name).build(model), part)


def unfrozen_after_wrapping(name, part):
    model = model_without_dead_ends()
    model.unused.requires_grad_(False)
    optimizer = subject(name).build(model)
    trained = [p for p in model.layers[0].parameters() if p.requires_grad]
    model.layers[0].requires_grad_(False)
    wrapper = DistributedDataParallel(model)
    train_on(wrapper, optimizer, part, steps=1)
    for p in trained:
        p.requires_grad_(True)
    return train_on(wrapper, optimizer, part, steps=1)


def adapted_after(name, part, make, **more):
    model = make(build_model())
    return train_on(model, subject(name).build(model, **more), part)


def other_seeds(name, part):
    model = model_without_dead_ends()
    optimizer = subject(name).build(model, seed=distributed.get_rank())
    optimizer.data_parallel()
    return train_on(model, optimizer, part)


def other_rates(name, part):
    model = model_without_dead_ends()
    optimizer = subject(name).build(model, lr=0.01 * (1 + distributed.get_rank()))
    optimizer.data_parallel()
    return train_on(model, optimizer, part)


def loaded_on_one(name, part):
    groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    before = model_without_dead_ends()
    saved = subject(name).build(before)
    saved.data_parallel(groups[distributed.get_rank()])
    train_on(before, saved, part)
    model = model_without_dead_ends()
    optimizer = subject(name).build(model)
    if distributed.get_rank() == 0:
        optimizer.load_state_dict(saved.state_dict())
    optimizer.data_parallel()
    return train_on(model, optimizer, part)


def outside(name, part):
    """Each process gives the group of the other."""
    groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    subject(name).build(model_without_dead_ends()).data_parallel(groups[1 - distributed.get_rank()])


def skipped(name, part):
    """After averaging, a loop may skip a step, and then one rank have nothing to learn from."""
    model = model_without_dead_ends()
    optimizer = subject(name).build(model)
    optimizer.data_parallel()
    for step in range(STEPS):
        if step == 0 or distributed.get_rank() == 0:
            optimizer.backward(loss_of(model, part, step))
        optimizer.average_gradients()
        if step > 0:
            optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


def clipped_too_soon(name, part):
    model = model_without_dead_ends()
    optimizer = subject(name).build(model)
    optimizer.data_parallel()
    optimizer.backward(loss_of(model, part, 0))
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def alone(name, part):
    """Each process trains a model of its own."""
    groups = [distributed.new_group([rank]) for rank in range(distributed.get_world_size())]
    model = model_without_dead_ends()
    optimizer = subject(name).build(model)
    optimizer.data_parallel(groups[distributed.get_rank()])
    train_on(model, optimizer, part)
    return {}


RIGHT = [  # what works although it could be asked for in a better order
    (evaluated_first, "lomo"),
    (kept_whole, "hft"),
    *(
        (sharded_afterwards, name)
        for name in ("badam in backward", "badam", "galore", "blockllm", "hft", "lomo clipped")
    ),
    *((swapped, name) for name in ("lisa", "muon", "lomo")),
    *((way, name) for way in (evaluated_first, kept_whole) for name in ("galore", "badam in backward")),
]
WRONG = {  # what is refused, and the way out
    (sharded_unseen, "lomo"): r"build it after fully_shard\(model\), or call optimizer.backward\(loss\)",
    (sharded_unseen, "badam in backward"): r"build it after fully_shard\(model\), or call optimizer.backward\(loss\)",
    (sharded_stock, "torch.optim:Rprop"): r"Rprop can't update the shards of a tensor \(.*\): train replicas",
    **{
        (functools.partial(sharded_in_bf16, fp32_gradients=True), name): "has fp32_gradients, but FSDP2 gives shards .*"
        "in the dtype of the weights: train replicas, .* or with --strategy replicate"
        for name in ("adamw", "lora")
    },
    (wrapped, "badam"): r"changes what it trains, .* call optimizer.data_parallel\(\)",
    (
        functools.partial(wrapped, wrap=OwnWrapper),
        "badam",
    ): r"changes what it trains, .* call optimizer.data_parallel\(\)",
    (wrapped, "lomo"): r"updates inside the backward pass, .* call optimizer.data_parallel\(\)",
    (wrapped, "blockllm"): r"must see the loss of all ranks, .* call optimizer.data_parallel\(\)",
    (functools.partial(wrapped, on="before"), "lisa"): r"changes what it trains, .* call optimizer.data_parallel\(\)",
    (functools.partial(wrapped, on="inside"), "adamw in backward"): "updates inside the backward pass, which",
    (flattened, "adamw"): r"can't train the flattened parameters of FSDP1: use fully_shard\(model\)",
    (nothing_averaged, "adamw"): r"nothing has averaged them: call optimizer.data_parallel\(\)",
    (nothing_averaged, "lomo"): r"nothing has averaged them: call optimizer.data_parallel\(\)",
    (unfrozen_after_wrapping, "adamw"): r"nothing has averaged them: call optimizer.data_parallel\(\)",
    (functools.partial(adapted_after, make=shard), "lora"): "build it before fully_shard",
    (functools.partial(adapted_after, make=DistributedDataParallel), "lora"): "build it first, then wrap the model",
    **{
        (functools.partial(adapted_after, make=make, weights="8bit"), "galore"): words
        for make, words in (
            (shard, "has weights in 8 bits, which FSDP2 can't shard: train replicas"),
            (DistributedDataParallel, r"made before doesn't follow: use optimizer.data_parallel\(\) instead"),
        )
    },
    (other_seeds, "badam"): r"doesn't have the same seed on all ranks \(0 and 1\)",
    (other_seeds, "apollo"): r"doesn't have the same seed on all ranks \(0 and 1\)",
    (other_rates, "adamw"): r"doesn't have the same lr on all ranks \(\[0.01, 0.01\] and \[0.02, 0.02\]\)",
    (loaded_on_one, "adamw"): r"doesn't have the same steps made on all ranks \(4 and 0\): .* load the same state",
    (outside, "adamw"): "this process isn't in the group, so it would train alone",
    (clipped_too_soon, "adamw"): r"call optimizer.average_gradients\(\) before clipping",
}
FINE = [(wrapped, "adamw"), (functools.partial(wrapped, on="before"), "galore"), (skipped, "adamw")]


def attempt(way, name, part):
    try:
        return way(name, part)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def half(rank, ways):
    part = slice(8 * rank, 8 * rank + 8)
    return [attempt(way, name, part) for way, name in ways]


FAST = [(sharded, "galore"), *RIGHT[:4], *WRONG, *FINE, (alone, "adamw")]
SLOW = [(sharded, name) for name in SUBJECTS if name != "galore"] + RIGHT[4:]


def named(ways):
    return [f"{_told(way)} {name}" for way, name in ways]


def _told(way):
    """A way and what it is given, the same in every process."""
    if not isinstance(way, functools.partial):
        return way.__name__
    given = [f"{key}={getattr(value, '__name__', value)}" for key, value in way.keywords.items()]
    return f"{way.func.__name__} {', '.join(given)}"


@pytest.fixture(scope="module")
def fast_halves():
    importlib.import_module("peft")  # here, or each process would import it
    return gloo.run(half, FAST)


@pytest.fixture(scope="module")
def slow_halves():
    importlib.import_module("peft")
    return gloo.run(half, SLOW)


@pytest.mark.parametrize("number", range(len(FAST)), ids=named(FAST))
def test_two_processes_are_right_or_say_what_to_do(fast_halves, number):
    check(*FAST[number], *(found[number] for found in fast_halves))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SLOW)), ids=named(SLOW))
def test_a_sharded_model_is_trained_as_by_one_process(slow_halves, number):
    check(*SLOW[number], *(found[number] for found in slow_halves))


def reduced(rank):
    """Has each block that BAdam trains gradients in fp32, in which bf16 ones of two ranks were summed?"""
    model, tested = build_model(torch.float32), subject("badam")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (*model.layers, model):
        fully_shard(part, mp_policy=policy)
    optimizer = tested.build(model)
    found = {}
    for step in range(2 * len(optimizer.blocks) * tested.hyperparameters["switch_every"]):
        optimizer.backward(loss_of(model, slice(8 * rank, 8 * rank + 8), step))
        grads = [p.grad.to_local() for p in model.layers.parameters() if p.grad is not None]
        found[optimizer.selection] = any((grad != grad.bfloat16()).any() for grad in grads)
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_under_mixed_precision_blocks_that_were_frozen_at_first_have_gradients_reduced_in_fp32():
    for found in gloo.run(reduced):
        assert len(found) == len(build_model().layers) and all(found.values())


def check(way, name, one, other):
    sentence = WRONG.get((way, name)) or (REFUSED.get(name) if way is sharded else None)
    if sentence is not None:
        for found in (one, other):
            assert isinstance(found, str) and re.search(sentence, found) and "\n" not in found
        return
    assert not isinstance(one, str), one
    assert all(torch.equal(p, other[key]) for key, p in one.items())
    if way is not alone and (way, name) not in FINE:
        joined = train_part(name, slice(None), replicate=False, finish=False)
        assert max(((one[key] - p).abs().max().item(), key) for key, p in joined.items()) < (1e-6, "")
