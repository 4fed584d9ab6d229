"""A plan, and what a record's meter goes through, hold what renewals and switches take on top of what there is by then."""

from typing import Any

import pytest
import torch
from plan_models import blueprint

import optimizers
from membench.memory.breakdown import find_peaks
from membench.memory.meter import MemoryMeter
from membench.memory.trace import PARTS
from membench.planning.method import plan_method
from membench.planning.planner import method_values
from membench.planning.workload import model_loss
from membench.training.metering import meter_cycle
from membench.training.loop import training_step

def short(method: str) -> dict[str, Any]:
    """Hyper-parameters with which a method switches or renews every other step."""
    given = {"switch_every": 2, "update_every": 2, "patience": 1}
    return {key: given[key] for key in optimizers.resolve(method) if key in given}


@pytest.mark.parametrize("method", optimizers.available())
def test_dbg(method, tmp_path):
    b = blueprint(tmp_path, "llama", 4)
    values = {**method_values(b, method, {}), **short(method)}
    plan = plan_method(b, method, values)
    torch.manual_seed(0)
    model = b.build(4)
    opt = optimizers.create(method, model, **values)
    with MemoryMeter(model, opt) as meter:
        for _ in range(4 * max(2, opt.cycle_length)):
            batch = [b.batch("cpu")]
            with meter.hold(batch):
                training_step(model, opt, model_loss, batch, phase=meter.phase)
    rep = meter.report()
    m2 = b.build(4)
    cyc = meter_cycle(m2, optimizers.create(method, m2, **values), model_loss, lambda step: [b.batch("cpu")])
    print("XX", method, "plan", plan.row["peak_allocated_bytes"], "real", rep["peak_allocated_bytes"], "cycle", cyc["peak_allocated_bytes"], opt.cycle_length)
    print("XX", plan.row["peak_phase"], plan.row["at_peak"], rep["peak_phase"], rep["at_peak"], rep["selections"], cyc["selections"])
    print("XX", {p: (plan.row["maximum"][p], rep["maximum"][p], cyc["maximum"][p]) for p in PARTS})
