"""Plans of a rank: what two processes meter, what torch's own tracker of FSDP2 sees, and how many GPUs are needed."""

from dataclasses import replace
from functools import partial

import gloo
import plan_models
import pytest
import torch
from plan_models import at_peak, blueprint, maxima
from test_plan_metered import BOUNDED, BY_VALUES
from torch import nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import optimizers
from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.memory.meter import MemoryMeter
from membench.planning import planner
from membench.planning.blueprint import Blueprint
from membench.planning.budget import Limits
from membench.planning.fake import QuickFakeTensorMode
from membench.planning.gpus import needed
from membench.planning.method import plan_method
from membench.planning.planner import method_values, plan
from membench.planning.pretended import pretended
from membench.planning.simulate import simulate
from membench.planning.workload import Workload, loss_function
from membench.training import parallel
from membench.training.metering import train_selection
from optimizers import welore
from optimizers.shared.sharded import has_values, is_sharded
from reports import plans

AGREEMENT = 512  # bytes: numbers by which real ranks see that they train the same
REFUSED = {("mezo", "fsdp2")}


def seen(rank, blueprints, methods):
    """For each method, of two ranks: bytes of everything and of the parts, at the peak and at their own maximum."""
    found = {}
    for b in blueprints:
        for method in methods:
            if (method, b.workload.strategy) not in REFUSED:
                values = method_values(b, method, {})
                one = simulate(b, method, values, b.depth, device="cpu" if rank is not None else None)
                found[method, b.workload.strategy] = [*at_peak(one), *maxima(one)]
    return found


def expect_plans_to_equal_what_the_first_of_two_ranks_meters(folder, methods, strategies):
    blueprints = [blueprint(folder, "llama", 2, gpus=2, strategy=strategy) for strategy in strategies]
    metered, planned = gloo.run(seen, blueprints, methods)[0], seen(None, blueprints, methods)
    assert len(planned) == len(methods) * len(strategies) - len(
        REFUSED & {(method, strategy) for method in methods for strategy in strategies}
    )
    for key, plan_of in planned.items():
        peak, real = plan_of[0], metered[key][0]
        if key[0] in BOUNDED:
            assert peak >= real
            continue
        slack = 0.005 * real if key[0] in BY_VALUES else AGREEMENT
        assert plan_of == pytest.approx(metered[key], rel=0.005, abs=slack), key


def test_planned_equals_metered_on_two_ranks(tmp_path):
    expect_plans_to_equal_what_the_first_of_two_ranks_meters(tmp_path, ["badam"], ["fsdp2"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "replicate"])
def test_planned_equals_metered_on_two_ranks_for_every_method(strategy, tmp_path):
    expect_plans_to_equal_what_the_first_of_two_ranks_meters(tmp_path, optimizers.available(), [strategy])


def seen_with_ranks(rank, blueprints):
    """What `seen` says of WeLore if a third of each matrix's rank is kept, whatever its singular values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(welore, "kept_ranks", lambda weights, reduction: [min(weight.shape) // 3 for weight in weights])
        return seen(rank, blueprints, ["welore"])


@pytest.mark.slow
def test_planned_equals_metered_on_two_ranks_once_the_ranks_of_factors_are_known(tmp_path):
    blueprints = [blueprint(tmp_path, "llama", 2, gpus=2, strategy=strategy) for strategy in ("fsdp2", "replicate")]
    metered, planned = gloo.run(seen_with_ranks, blueprints)[0], seen_with_ranks(None, blueprints)
    assert len(planned) == 2
    for key, plan_of in planned.items():
        assert plan_of == pytest.approx(metered[key], rel=0.005, abs=AGREEMENT), key


def sharded_adamw(b):
    torch.manual_seed(0)
    model = b.build(b.depth)
    return model, parallel.place(model, "adamw", "fsdp2", partial(optimizers.create, "adamw", lr=1e-3))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_meter_agrees_with_torchs_tracker_of_sharded_models(checkpointing, tmp_path):
    """To the byte in sum, within 1 % in each part.

    The tracker counts unsharded gradients, and what a checkpointed layer makes again, as temporaries until the layer's
    backward ends, so these are compared together.
    """
    b = blueprint(tmp_path, "llama", 3, checkpointing=checkpointing)
    loss, batch = loss_function(b.workload), b.batch("cpu")
    with pretended(2):
        model, optimizer = sharded_adamw(b)
        with MemoryMeter(model, optimizer) as meter:
            train_selection(meter, loss, lambda step: [batch], 0)
        model, optimizer = sharded_adamw(b)
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((batch,))
        with tracker:
            for _ in range(2):
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    report, theirs = meter.report(), tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert report["peak_allocated_bytes"] == theirs["Total"]
    ours, kind = report["at_peak"], _FSDPRefType
    parts = [
        (("weights",), (kind.SHARDED_PARAM, kind.BUFFER)),
        (("unsharded_weights",), (kind.UNSHARDED_PARAM,)),
        (("optimizer_state",), (kind.OPT,)),
    ]
    rest = [("gradients", "temporaries"), (kind.SHARDED_GRAD, kind.UNSHARDED_GRAD, kind.TEMP)]
    if not checkpointing:
        parts += [
            (("communication",), (kind.ALL_GATHER, kind.REDUCE_SCATTER)),
            (("activations",), (kind.ACT, kind.INP)),
        ]
        parts.append((rest[0], rest[1]))
    for names, kinds in parts:
        found, wanted = sum(ours[f"{name}_bytes"] for name in names), sum(theirs[one] for one in kinds)
        assert wanted > 0 and found == pytest.approx(wanted, rel=0.01), names


def test_shards_are_a_share_of_the_weights_and_one_layer_at_a_time_is_gathered(tmp_path):
    """Llama without biases: whole matrices and norms divide by 4, so a rank's weights are a quarter."""
    b = blueprint(tmp_path, "llama", 3, gpus=4)
    row = plan_method(b, "adamw", method_values(b, "adamw", {})).row
    buffers = sum(buffer.nbytes for buffer in b.skeleton.buffers())
    assert row["maximum"]["weights_bytes"] == b.parameters * 4 / 4 + buffers
    outside = sum(p.numel() for name, p in b.skeleton.named_parameters() if ".layers." not in name) * 4
    layer = (b.parameters * 4 - outside) / 3
    assert row["maximum"]["unsharded_weights_bytes"] == outside + layer  # with what is outside of layers


def test_the_number_of_gpus_needed_fits_and_half_of_it_does_not(tmp_path):
    b = blueprint(tmp_path, "large-vocabulary", 1, gpus=4)
    values = method_values(b, "adamw", {})
    made, half, alone = (plan_method(b.with_workload(gpus=count), "adamw", values) for count in (4, 2, 1))
    budget, more, without_buffers = (one.row["estimated_total_bytes"] for one in (made, half, alone))
    assert budget < more
    fewest = 1 if without_buffers <= more else 2
    assert [needed(made, b, values, size) for size in (budget, more, CUDA_CONTEXT_BYTES)] == [4, fewest, None]


def test_weights_that_are_not_sharded_do_not_count_once_for_each_gpu():
    """QLoRA's base stays whole in 4 bits: alone, a GPU needs no more of it."""
    b = Blueprint(Workload("llama-350m", 1, 64, gpus=8))
    values = method_values(b, "qlora", {})
    made, alone = (plan_method(b.with_workload(gpus=count), "qlora", values) for count in (8, 1))
    assert needed(made, b, values, max(one.total_bytes for one in (made, alone))) == 1


def test_a_plan_of_several_gpus_says_what_each_method_needs_and_the_formula_of_zero_3(tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "find_limits", lambda *given: Limits(1, 16, None))
    workload = Workload(plan_models.folder(tmp_path, "llama", 2), 2, 16, gpus=4)
    document = plan(workload, ["badam", "mezo"], {}, budget_bytes=600 << 20)
    row = document["rows"][0]
    assert (row["formula"], row["gpus_needed"]) == ("(2M + 16M/D)/N", 1)
    assert row["formula_bytes"] == round((2 + 16 / 2) * document["parameters"] / 4)
    assert "replaces" in document["refused"]["mezo"]
    text = plans.render(document, "table")
    assert "on each of 4 GPUs (fsdp2)" in text and "GPUs of 600 MiB that each needs: badam 1." in text


def test_gradients_in_fp32_of_shards_in_low_precision_cannot_be_planned_those_of_replicas_can(tmp_path):
    workload = Workload(plan_models.folder(tmp_path, "llama", 2), 2, 16, gpus=2)
    given = {"*": {"fp32_gradients": True}}
    for method in ("adamw", "lora"):
        with pytest.raises(ValueError, match=r"has fp32_gradients, but FSDP2 .* or with --strategy replicate$"):
            plan(workload, [method], given)
    assert not plan(replace(workload, strategy="replicate"), ["adamw", "lora"], given)["refused"]


def test_shards_of_fake_tensors_have_no_values():
    with pretended(2):
        mesh = init_device_mesh("cpu", (2,))
        with QuickFakeTensorMode():
            weight = fully_shard(nn.Linear(4, 4), mesh=mesh).weight
            assert is_sharded(weight)
            assert not has_values(weight)
