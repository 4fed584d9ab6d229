"""BAdam equals the authors' package `badam` to the last bit in fp32, with torch's fused AdamW inside both."""

import contextlib
import io
import warnings

import badam
import pytest
import torch

from optimizers import BAdam
from optimizers.contract import build_model, loss_of, weights_of

EVERY = 4  # K
BLOCKS = [f"layers.{number}" for number in range(len(build_model().layers))]
STEPS = 2 * len(BLOCKS) * EVERY + 1  # two cycles, and into a third


def package(model, switch_mode="ascending", **settings):
    """The authors' optimizer, as their README builds it; it prints its blocks and warns of weights in fp32."""
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        return badam.BlockOptimizer(
            base_optimizer=torch.optim.AdamW(model.parameters(), fused=True, **settings),
            named_parameters_list=list(model.named_parameters()),
            block_prefix_list=[[f"{name}."] for name in BLOCKS],
            switch_block_every=EVERY,
            switch_mode=switch_mode,
        )


def ours(model, **settings):
    """Ours, one step into its first block: the package counts from 1, so there the first block gets K - 1 steps."""
    optimizer = BAdam(model, switch_every=EVERY, **settings)
    state = optimizer.state_dict()
    state["extra"]["steps"] = 1
    optimizer.load_state_dict(state)
    return optimizer


def steps_of(model, optimizer, rate=None):
    """Train, and give the names of what is trained and all weights after each step."""
    for step in range(STEPS):
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        loss_of(model, step).backward()
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer.step()
        optimizer.zero_grad()
        yield trained, weights_of(model)


def expect_equal(one, other):
    for step, ((trained, weights), (their_trained, their_weights)) in enumerate(zip(one, other, strict=True)):
        assert trained == their_trained, f"step {step}"
        for name, weight in weights.items():
            assert torch.equal(weight, their_weights[name]), f"step {step}: {name}"


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_every_step_of_two_cycles_is_the_packages(order):
    model, other = build_model(), build_model()
    optimizer = ours(model, lr=1e-2, weight_decay=0.0, order=order)
    reference = package(other, order, lr=1e-2, weight_decay=0.0)
    expect_equal(steps_of(model, optimizer), steps_of(other, reference))
    start = weights_of(build_model())
    assert {name for name, weight in weights_of(model).items() if not torch.equal(weight, start[name])} == {
        name for name, _ in model.named_parameters() if name.startswith(tuple(BLOCKS))
    }


def test_so_it_is_with_decay_betas_eps_and_a_schedule():
    model, other = build_model(), build_model()
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizer, reference = ours(model, order="ascending", **settings), package(other, **settings)
    for group in optimizer.param_groups:  # the package overwrites the groups, so that norms and biases decay too
        group["weight_decay"] = 0.1

    def rate(step):
        return 1e-2 * (1 - step / STEPS)

    expect_equal(steps_of(model, optimizer, rate), steps_of(other, reference, rate))


def test_the_packages_first_block_gets_one_step_too_few():
    model = build_model()
    blocks = [min(trained) for trained, _ in steps_of(model, package(model, lr=1e-2))]
    visits = [next(name for name in BLOCKS if block.startswith(f"{name}.")) for block in blocks]
    assert visits[: 2 * EVERY] == [BLOCKS[0]] * (EVERY - 1) + [BLOCKS[1]] * EVERY + [BLOCKS[2 % len(BLOCKS)]]
