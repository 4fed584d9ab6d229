"""The memory meter agrees with counts by hand, to the byte. Tensors are fp32 (4 bytes) unless a test says otherwise."""

import gc
from typing import Any

import pytest
import torch
from meter_models import input_loss, meter, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import optimizers
from membench.memory.breakdown import alive_at, find_peaks
from membench.memory.meter import MemoryMeter
from membench.training.metering import meter_cycle
from optimizers import MemoryEfficientOptimizer
from reports.parts import FIELDS, PARTS

SCALAR = 4  # the loss, and the gradient of the loss


def two_layers() -> nn.Module:
    """Weights of 16 x 8 and 4 x 16: 512 and 256 bytes."""
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))


X = torch.randn(32, 8)  # 1024 bytes
W1, W2, HIDDEN, OUTPUT = 512, 256, 32 * 16 * 4, 32 * 4 * 4


def parts(*sizes: int) -> dict[str, int]:
    """Of a single process: the parts of several came later."""
    early = [part.field for part in PARTS if not part.later]
    return dict.fromkeys(FIELDS, 0) | dict(zip(early, sizes, strict=True))


def test_two_layers_with_adamw_agree_with_a_count_by_hand():
    model = two_layers()
    report = meter(model, optimizers.create("adamw", model), X)
    # The peak is in the second layer's backward: its input is still there, and both its gradients are new.
    state = 2 * (W1 + W2) + 2 * 4  # two moments, and a step count for each of the two tensors
    at_peak = parts(W1 + W2, W2, state, X.nbytes + HIDDEN + SCALAR, SCALAR + HIDDEN)
    assert report["at_peak"] == at_peak
    assert report["peak_allocated_bytes"] == sum(at_peak.values()) == 7696
    assert report["peak_phase"] == "backward"
    assert report["peak_module"] == "0"  # its weight, state and output; at this moment its gradient isn't there yet
    # For itself each part is largest: gradients and state in the update, activations at the end of the forward pass,
    # temporaries in the second layer's backward.
    assert report["maximum"] == parts(W1 + W2, W1 + W2, state, X.nbytes + HIDDEN + SCALAR, SCALAR + HIDDEN)


def test_stock_adamw_takes_the_same_bytes_as_ours():
    ours, theirs = two_layers(), two_layers()
    report = meter(theirs, torch.optim.AdamW(theirs.parameters(), fused=True), X)
    assert report == meter(ours, optimizers.create("adamw", ours), X)


def test_sgd_keeps_no_state():
    model = two_layers()
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), X)
    assert report["at_peak"] == parts(W1 + W2, W2, 0, X.nbytes + HIDDEN + SCALAR, SCALAR + HIDDEN)
    assert report["maximum"]["optimizer_state_bytes"] == 0


def test_two_runs_take_identical_bytes():
    def run() -> dict[str, Any]:
        model = two_layers()
        return meter(model, optimizers.create("adamw", model), X)

    assert run() == run()


def test_a_frozen_first_layer_has_no_gradient_and_needs_no_input():
    model = two_layers()
    model[0].requires_grad_(False)
    report = meter(model, optimizers.create("sgd", model), X)
    # Nothing flows into the first layer: the output, which the sum doesn't keep, makes the peak in the forward pass.
    assert report["at_peak"] == parts(W1 + W2, 0, 0, X.nbytes + HIDDEN + SCALAR, OUTPUT)
    assert report["peak_phase"] == "forward"
    assert report["maximum"]["gradients_bytes"] == W2


def test_tied_weights_and_their_gradient_count_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    report = meter(model, optimizers.create("adamw", model), X)
    assert report["maximum"]["weights_bytes"] == 8 * 8 * 4
    assert report["maximum"]["gradients_bytes"] == 8 * 8 * 4
    assert report["maximum"]["optimizer_state_bytes"] == 2 * 8 * 8 * 4 + 4


def test_buffers_are_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), X)
    assert report["maximum"]["weights_bytes"] == sum(t.nbytes for t in model.state_dict().values())


def test_a_view_keeps_its_whole_base_alive_and_adds_nothing():
    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            corner = torch.exp(x)[:1, :1].view(-1)  # 4 bytes of 1024
            return corner * self.weight

    model = Corner()
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), X)
    # The product keeps the corner for its gradient, and so all of exp(x).
    assert report["maximum"]["activations_bytes"] == 2 * X.nbytes + SCALAR


def test_a_tensor_that_grows_in_place_counts_at_its_new_size():
    class Grow(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.empty(1).resize_(5000)
            return super().forward(x)

    model = Grow(8, 1)
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), X)
    assert report["maximum"]["temporaries_bytes"] == 5000 * 4


class Resizing(nn.Linear):
    """Makes a tensor of `sizes[0]` values, resizes it to each of the others in turn and lets it go."""

    def __init__(self, *sizes: int):
        super().__init__(8, 1)
        self.sizes = sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):  # what isn't noted as freed would add up
            tensor = torch.empty(self.sizes[0])
            for size in self.sizes[1:]:
                tensor.resize_(size)
            del tensor
        return super().forward(x)


@pytest.mark.parametrize("sizes", [(5000,), (1, 5000), (5000, 1), (1, 200, 5000), (1, 5000, 300)])
def test_a_resized_tensor_is_there_once_at_its_size_and_gone_when_it_is_freed(sizes):
    model = Resizing(*sizes)
    optimizer = optimizers.create("sgd", model)
    with MemoryMeter(model, optimizer) as metered:
        train_metered(metered, model, optimizer)
    assert metered.report()["maximum"]["temporaries_bytes"] == 5000 * 4
    left = sum(metered.trace.sizes[i] for i in alive_at(metered.trace, len(metered.trace.events) - 1))
    assert left == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("op", [torch.add, torch.mul, torch.exp])
def test_an_operation_into_a_tensor_that_grows_counts_its_new_size(op):
    class Out(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                into = torch.empty(0)
                op(x, out=into) if op is torch.exp else op(x, x, out=into)
                del into
            return super().forward(x)

    model = Out(8, 1, bias=False)
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), X)
    assert report["maximum"]["temporaries_bytes"] == X.nbytes


class Statistics(torch.optim.Optimizer):
    """Keeps, as state, gradient or weight, what the model's forward pass made."""

    def __init__(self, model: nn.Module, part: str):
        super().__init__(model.parameters(), {})
        self.model, self.part = model, part

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        p, kept = self.model.weight, self.model.kept
        if self.part == "optimizer_state":
            self.state[p]["kept"] = kept
        elif self.part == "gradients":
            p.grad = kept
        else:
            p.data = kept

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.model.kept = None
        if self.part != "gradients":
            super().zero_grad()


@pytest.mark.parametrize("part", ["optimizer_state", "gradients", "weights"])
def test_what_a_forward_pass_made_counts_for_what_becomes_of_it(part):
    class Keeping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = self.weight.detach() + 1  # an activation, at the end of the forward pass
            return super().forward(x)

    model = Keeping(8, 50, bias=False)
    report = meter(model, Statistics(model, part), X)
    size = 8 * 50 * 4
    # of the input and the scalar loss alone; twice the size where the step before left one, too
    assert report["maximum"]["activations_bytes"] == X.nbytes + SCALAR
    usual = {"optimizer_state": 0, "gradients": size, "weights": size}[part]
    assert report["maximum"][f"{part}_bytes"] >= usual + size


def test_views_and_work_in_place_take_nothing():
    class InPlace(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                tensor = torch.empty(100, 10)
                views = tensor.t(), tensor[3:], tensor.view(-1), tensor.expand(2, 100, 10), tensor.detach()
                tensor.add_(1).mul_(2).zero_().transpose_(0, 1).unsqueeze_(0).squeeze_(0).clamp_(min=0)
                del tensor, views
            return super().forward(x)

    model = InPlace(8, 1, bias=False)
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), X)
    assert report["maximum"]["temporaries_bytes"] == 100 * 10 * 4


def test_a_view_that_is_kept_as_state_holds_its_whole_base_and_counts_it_once():
    class Views(SvdOptimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                if not self.state[p]:
                    base = torch.zeros(1000)
                    self.state[p] |= {"one": base[:3], "other": base[500:]}

    model = nn.Linear(8, 4, bias=False)
    report = meter(model, Views(model.parameters()), X)
    assert report["maximum"]["optimizer_state_bytes"] == 1000 * 4


def test_accumulated_gradients_are_there_once():
    model = two_layers()
    report = meter(model, optimizers.create("sgd", model), X, X)
    assert report["maximum"]["gradients_bytes"] == W1 + W2
    # Both micro-batches are there all the time, and with the second one the first one's loss.
    assert report["maximum"]["activations_bytes"] == 2 * X.nbytes + HIDDEN + 2 * SCALAR


def test_updating_inside_the_backward_pass_holds_one_gradient():
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))
    report = meter(model, optimizers.create("adamw", model, in_backward=True), torch.randn(32, 16))
    assert report["maximum"]["gradients_bytes"] == 16 * 16 * 4
    assert report["maximum"]["optimizer_state_bytes"] == 6 * (2 * 16 * 16 * 4 + 4)


def test_a_gradient_is_one_from_birth_though_a_later_hook_frees_it():
    """Both of a layer's gradients are made together, before either is accumulated."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    report = meter(model, optimizers.create("sgd", model, in_backward=True), torch.randn(32, 16))
    assert report["maximum"]["gradients_bytes"] == (16 * 16 + 16) * 4


def test_hooks_on_a_parameter_make_temporaries_and_not_gradients():
    model = two_layers()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: (p.grad * 2).sum() and None)
    model[0].weight.register_hook(lambda gradient: gradient.norm() and None)
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), X)
    assert report["maximum"]["gradients_bytes"] == W1 + W2


def test_low_precision_weights_get_fp32_gradients_masters_and_moments():
    model = two_layers().bfloat16()
    report = meter(model, optimizers.create("adamw", model, fp32_gradients=True), X.bfloat16())
    weights = 16 * 8 + 4 * 16
    assert report["maximum"]["weights_bytes"] == 2 * weights
    assert report["maximum"]["gradients_bytes"] == 4 * weights
    assert report["maximum"]["optimizer_state_bytes"] == 12 * weights + 2 * 4


class Checkpointed(nn.Module):
    """Blocks of 16 -> 64 -> 16 features: a block keeps its input and, four times as large, what lies between."""

    def __init__(self, depth: int, reentrant: bool | None):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 16, bias=False)) for _ in range(depth)
        )
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.requires_grad_(self.reentrant is True)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant, kept_per_block, recomputed", [(None, 5, 0), (False, 1, 4), (True, 1, 5)])
def test_checkpointing_keeps_inputs_and_one_recomputed_block(reentrant, kept_per_block, recomputed):
    x = torch.randn(32, 16)
    model = Checkpointed(3, reentrant)
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), x)
    # Each block keeps its input; the last one's output is not kept by the sum. Of a block that is computed again, what
    # lies between its layers, and if re-entrant its output, are there beside all three inputs.
    assert report["maximum"]["activations_bytes"] == (3 * kept_per_block + recomputed) * x.nbytes + SCALAR


class Unrecorded(nn.Linear):
    """Makes a tensor for a while, within which something is computed without autograd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scratch = x.repeat(4, 1)
        with torch.no_grad():
            scratch.sum()
        del scratch
        return super().forward(x)


class CheckpointedUnrecorded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Unrecorded(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layers, x, use_reentrant=False)


def test_computing_without_autograd_does_not_end_a_recomputed_segment():
    model = CheckpointedUnrecorded()
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), X)
    # The input, and computed again what the second linear layer and the ReLU keep; never what lives for a while.
    assert report["maximum"]["activations_bytes"] == 2 * X.nbytes + SCALAR


def test_cycles_of_references_are_gone_in_the_next_step():
    class Cyclic(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            cycle: list[Any] = [x.detach().repeat(4, 1)]
            cycle.append(cycle)
            return super().forward(x)

    model = Cyclic(8, 8, bias=False)
    report = meter(model, torch.optim.SGD(model.parameters(), foreach=False), X, selections=3)
    assert report["maximum"]["activations_bytes"] == 5 * X.nbytes + SCALAR


class SvdOptimizer(torch.optim.Optimizer):
    """Projects each gradient on its first singular vector, which it keeps."""

    def __init__(self, params: Any):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            left, _, _ = torch.linalg.svd(p.grad, full_matrices=False)
            self.state[p]["basis"] = left[:, :1].clone()


def test_an_svd_shows_its_outputs_as_temporaries_and_what_is_kept_as_state():
    model = nn.Linear(20, 12, bias=False)
    report = meter(model, SvdOptimizer(model.parameters()), torch.randn(1, 20))
    outputs = (12 * 12 + 12 + 12 * 20) * 4
    # In the second update the old basis is still there when the new one, which replaces it, is made.
    assert report["maximum"]["optimizer_state_bytes"] == 2 * 12 * 4
    assert report["peak_phase"] == "update"
    assert report["at_peak"]["temporaries_bytes"] == report["modules"]["(optimizer)"]["temporaries_bytes"] == outputs


class Switching(MemoryEfficientOptimizer):
    """Takes turns in training the model's two halves, and makes a large tensor when it switches."""

    turn = 0
    cycle_length = 2

    def __init__(self, model: nn.Module):
        super().__init__(model, {"lr": 0.1})

    @property
    def selection(self) -> str:
        return f"half {self.turn}"

    def update(self, params: Any, grads: Any, group: Any) -> None:
        for p in params:
            self.state[p].setdefault("copy", torch.zeros_like(p))

    def advance(self) -> None:
        torch.empty(10_000).add_(1)
        self.state.clear()
        self.turn = 1


def test_a_switch_is_a_phase_of_its_own_and_each_selection_has_its_peak():
    model = two_layers()
    report = meter(model, Switching(model), X)
    assert report["peak_phase"] == "switch"
    assert report["peak_selection"] == "half 0"
    assert [turn["selection"] for turn in report["selections"]] == ["half 0", "half 1"]
    assert report["selections"][0]["peak_allocated_bytes"] == report["peak_allocated_bytes"]
    # The copies were state up to the switch that drops them.
    assert report["at_peak"]["optimizer_state_bytes"] == W1 + W2
    assert report["at_peak"]["temporaries_bytes"] == 10_000 * 4


class EveryStep(Switching):
    """Switches after each step, so that what an update keeps is gone before the update is over."""

    def after_step(self) -> None:
        self.state.clear()


def test_state_that_a_switch_drops_at_once_was_state():
    model = two_layers()
    report = meter(model, EveryStep(model), X, selections=1)
    assert report["maximum"]["optimizer_state_bytes"] == W1 + W2


def test_a_gradient_that_is_kept_as_state_stays_a_gradient():
    class Keep(SvdOptimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["last"] = p.grad

    model = two_layers()
    report = meter(model, Keep(model.parameters()), X)
    # In the second backward pass the first one's gradients are still there.
    assert report["maximum"]["gradients_bytes"] == 2 * (W1 + W2)
    assert report["maximum"]["optimizer_state_bytes"] == 0


def test_each_selection_begins_with_what_the_one_before_left():
    model = two_layers()
    optimizer = Switching(model)
    with MemoryMeter(model, optimizer) as metered:
        optimizer.advance()
    report = metered.report()
    assert report["selections"][-1] == {"selection": "half 1", "peak_allocated_bytes": W1 + W2}


def test_a_block_method_peaks_in_its_first_block():
    """Backward stops below the active block: the first one keeps all four hidden layers, the last one only its own."""
    model = Checkpointed(4, None)
    x = torch.randn(256, 16)
    report = meter(model, optimizers.create("badam", model, order="ascending"), x)
    peaks = [turn["peak_allocated_bytes"] for turn in report["selections"]]
    assert [turn["selection"] for turn in report["selections"]] == [f"blocks.{i}" for i in range(4)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 1.5 * peaks[-1]
    assert report["peak_selection"] == "blocks.0"


def test_what_is_allocated_outside_of_the_phases_is_not_counted():
    model = two_layers()
    with MemoryMeter(model) as metered:
        torch.empty(10_000).add_(1)
    assert metered.report()["peak_allocated_bytes"] == W1 + W2


def test_inputs_count_while_they_are_held_and_only_once():
    model = two_layers()
    with MemoryMeter(model) as metered:
        for _ in range(2):
            with metered.hold([{"input": X, "again": X}]):
                pass
    report = metered.report()
    assert report["peak_allocated_bytes"] == W1 + W2 + X.nbytes
    assert report["modules"]["(inputs)"]["activations_bytes"] == X.nbytes


def test_metering_changes_no_result_and_leaves_nothing_behind():
    def run(metered: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        optimizer = optimizers.create("adamw", model)
        batches = [{"input": X.clone()} for _ in range(2)]
        if metered:
            meter_cycle(model, optimizer, input_loss, lambda step: [batches[step]])
        else:
            train(model, optimizer, batches, input_loss)
        assert "after_step" not in vars(optimizer) and "advance" not in vars(optimizer)
        return model

    for ours, plain in zip(run(True).parameters(), run(False).parameters(), strict=True):
        assert torch.equal(ours, plain)
    module = torch.nn.modules.module
    assert gc.isenabled()
    assert not module._global_forward_hooks and not module._global_forward_pre_hooks


def test_it_cleans_up_after_an_error():
    model = two_layers()
    optimizer = optimizers.create("adamw", model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        meter(model, optimizer, torch.randn(3, 5))
    assert gc.isenabled() and "after_step" not in vars(optimizer)
    assert not torch.nn.modules.module._global_forward_hooks


def test_the_parts_add_up_at_every_moment():
    model = two_layers()
    optimizer = optimizers.create("adamw", model)
    with MemoryMeter(model, optimizer) as metered:
        train_metered(metered, model, optimizer)
    report = metered.report()
    peaks, _ = find_peaks(metered.trace)
    assert sum(report["at_peak"].values()) == report["peak_allocated_bytes"] == max(peak for peak, _ in peaks)
    for split in ("components", "modules"):
        for part in FIELDS:
            assert sum(group[part] for group in report[split].values()) == report["at_peak"][part]


def train_metered(metered: MemoryMeter, model: nn.Module, optimizer: Any) -> None:
    with metered.phase("forward"):
        loss = input_loss(model, {"input": X})
    with metered.phase("backward"):
        optimizer.backward(loss)
    with metered.phase("update"):
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        MemoryMeter(nn.ReLU())


def temporaries(method, dtype, layers):
    """Bytes of the most temporaries in the second update of so many matrices."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(layers))
    exact = {"master_weights": False} if "master_weights" in optimizers.resolve(method) else {}
    optimizer = optimizers.create(method, model.to(dtype), weight_decay=0.1, **exact)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        with MemoryMeter(model, optimizer) as meter, meter.phase("update"):
            optimizer.step()
    return meter.report()["maximum"]["temporaries_bytes"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["adafactor", "adam-mini", "apollo", "fira", "galore", "muon", "scale", "sinkgd"])
def test_what_an_update_holds_for_one_matrix_is_gone_at_the_next(method, dtype):
    assert temporaries(method, dtype, 3) == temporaries(method, dtype, 1)
