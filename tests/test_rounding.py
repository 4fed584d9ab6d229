"""Stochastic rounding: the mean is right, one of the two neighbours comes out, and what it can't do is refused."""

import pytest
import torch

from optimizers import SGD, AdamW, BAdam
from optimizers.contract import build_model
from optimizers.shared.rounding import generator, write


def rounded(values, draws):
    result = torch.empty(draws, len(values), dtype=torch.bfloat16)
    for draw in range(draws):
        write(result[draw], values.clone(), generator((0, draw), values.device))
    return result.float()


def test_a_number_becomes_one_of_its_neighbours_with_the_probability_of_its_share():
    low = torch.tensor([1.0, -1.0, 3.0e-5, 256.0]).bfloat16().float()
    unit = torch.ldexp(torch.ones(4), torch.frexp(low).exponent - 8) * low.sign()
    for share in (0.0, 0.125, 0.5, 0.875):
        found = rounded(low + share * unit, 4000)
        assert set(torch.unique((found - low) / unit).tolist()) <= {0.0, 1.0}
        mean = ((found - low) / unit).mean(0)
        assert (mean - share).abs().max() <= 5 * (share * (1 - share) / 4000) ** 0.5


def test_what_is_not_finite_stays_so():
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    found = rounded(values, 50)
    assert torch.equal(found[:, :2], values[:2].expand(50, 2))
    assert found[:, 2].isnan().all() and (found[:, 3] == 0.0).all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], ids=hex)
def test_any_nan_stays_one_also_that_of_a_gpu_whose_bits_are_all_ones(bits):
    assert rounded(torch.full((4,), bits, dtype=torch.int32).view(torch.float32), 20).isnan().all()


def test_the_random_numbers_are_a_function_of_the_key():
    torch.manual_seed(0)
    values = torch.rand(1000)
    one, same, other = (torch.empty(1000, dtype=torch.bfloat16) for _ in range(3))
    write(one, values.clone(), generator((0, 1, 2), values.device))
    write(same, values.clone(), generator((0, 1, 2), values.device))
    write(other, values.clone(), generator((0, 1, 3), values.device))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_without_a_source_it_rounds_to_the_nearest():
    torch.manual_seed(0)
    values, target = torch.randn(1000), torch.empty(1000, dtype=torch.bfloat16)
    write(target, values)
    assert torch.equal(target, values.bfloat16())


def test_weights_in_fp32_are_updated_as_ever():
    model, other = build_model(), build_model()
    for one, rounds in ((model, True), (other, False)):
        optimizer = SGD(one, stochastic_rounding=rounds)
        for p in one.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_it_takes_the_place_of_masters_and_is_of_bfloat16():
    for method in (AdamW, BAdam):
        with pytest.raises(ValueError, match="replaces fp32 masters: also set master_weights=False"):
            method(build_model(torch.bfloat16), stochastic_rounding=True)
        with pytest.raises(ValueError, match="this model has float16 ones"):
            method(build_model(torch.float16), master_weights=False, stochastic_rounding=True)


def test_a_second_moment_in_bfloat16_falls_as_in_fp32_once_gradients_are_small():
    def moment(dtype):
        model = torch.nn.Linear(64, 8, bias=False).to(dtype)
        optimizer = AdamW(model, lr=1e-4, master_weights=False, stochastic_rounding=True)
        for step in range(220):
            model.weight.grad = torch.full_like(model.weight, 1.0 if step < 20 else 1e-3)
            optimizer.step()
        return optimizer.state[model.weight]["exp_avg_sq"]

    low, full = moment(torch.bfloat16), moment(torch.float32)
    assert low.dtype is torch.bfloat16 and full.mean() < 0.017  # from .0198
    assert low.float().mean().item() == pytest.approx(full.mean().item(), rel=0.02)
