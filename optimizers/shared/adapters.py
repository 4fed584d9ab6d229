"""Where LoRA's adapters go, and how `peft` inserts them without side effects elsewhere."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from optimizers.shared.blocks import find_layers, warn_of_layers_elsewhere
from optimizers.shared.model_checks import is_quantized
from optimizers.shared.names import suggestion
from optimizers.shared.sharded import gathered, has_values
from optimizers.shared.stand_ins import StandIn, restore_linears

if TYPE_CHECKING:  # peft imports transformers, which takes seconds
    from peft import LoraModel, VeraModel

ALL_LINEAR = "all-linear"
MODEL = "model"  # the model's name in the wrapper that peft gets
READ_BY_MAMBA = (".x_proj", ".dt_proj", ".out_proj")  # only in_proj is always called


def find_targets(model: nn.Module, targets: str | tuple[str, ...], leave_out: Collection[nn.Parameter]) -> list[str]:
    """Names of the linear modules that match one of `targets` and hold nothing frozen and nothing of `leave_out`.

    Warns about modules that can't be adapted and are left out.

    Raises:
        ValueError: a pattern matches no linear module, none that can be adapted, or one whose weight is shared with
            another module; or none is left.
    """
    linear = linear_modules(model)
    patterns = [part.strip() for part in targets.split(",")] if isinstance(targets, str) else targets
    unfit = unadaptable(model, linear)
    chosen: dict[str, None] = {}
    refused: dict[str, list[str]] = {}  # by the reason
    for pattern in patterns:
        matched = _in_layers(model, linear) if pattern == ALL_LINEAR else _named(pattern, linear)
        if not matched:
            raise ValueError(f"targets: {pattern!r} matches no linear module. {_hint(pattern, linear)}")
        if all(name in unfit for name in matched):
            raise ValueError(f"targets: {pattern!r} can't be adapted: {unfit[matched[0]]}")
        chosen |= dict.fromkeys(name for name in matched if name not in unfit)
        for name in matched:
            if name in unfit:
                refused.setdefault(unfit[name], []).append(name)
    for reason, some in refused.items():
        warnings.warn(f"LoRA leaves out {len(set(some))} modules, the first being {some[0]}: {reason}", stacklevel=2)
    names = _without(chosen, linear, leave_out)
    if not names:
        raise ValueError(f"targets {', '.join(patterns)}: all of these modules are frozen or always trained")
    return names


def frozen_linears(model: nn.Module, adapted: Collection[str], leave_out: Collection[nn.Parameter]) -> list[str]:
    """Names of the linear modules that a method with adapters freezes: `adapted`, and all others in the layers.

    Leaves out those that the user froze before, those in `leave_out`, and those that compute something else than
    x W^T + b, which what takes their place wouldn't.
    """
    linear = linear_modules(model)
    unfit = unadaptable(model, linear)
    linear = {name: module for name, module in linear.items() if name not in unfit and _is_product(module)}
    try:
        in_layers = _in_layers(model, linear)
    except ValueError:  # a model without lists of layers
        in_layers = []
    names = [name for name in dict.fromkeys([*adapted, *in_layers]) if name in linear]
    return _without(names, linear, leave_out)


def _without(names: Iterable[str], linear: dict[str, nn.Module], leave_out: Collection[nn.Parameter]) -> list[str]:
    """`names` without modules that are frozen or hold a parameter of `leave_out`."""
    left_out = set(leave_out)
    return [n for n in names if linear[n].weight.requires_grad and not left_out & set(linear[n].parameters())]


def unadaptable(model: nn.Module, linear: Mapping[str, nn.Module]) -> dict[str, str]:
    """The modules in `linear` whose adapter would be ignored or couldn't be merged, each with the reason."""
    reasons: dict[str, str] = {}
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    last = {p: path for path, module in model.named_modules() for p in module.parameters(recurse=False)}
    first = {p: name.rpartition(".")[0] for name, p in model.named_parameters()}
    for name, module in linear.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        weight = module._parameters.get("weight")
        if weight is None:
            reasons[name] = "its weight is computed (weight_norm, spectral_norm, a parametrization): remove that first"
        elif is_quantized(weight):
            reasons[name] = f"it is quantized ({weight.dtype}): load the model in bfloat16; qlora quantizes it"
        elif places[id(module)] > 1:
            reasons[name] = "it has two places in the model, of which one would keep the module without its adapter"
        elif last[weight] != first[weight]:
            reasons[name] = "its weight is tied to another module's, so an adapter merged into it would change both"
        elif isinstance(parent, nn.MultiheadAttention):
            reasons[name] = "nn.MultiheadAttention reads its weight without calling it"
        elif {"A_log", "D"} <= parent._parameters.keys() and name.endswith(READ_BY_MAMBA):
            reasons[name] = "a Mamba layer's kernels read its weight without calling it"
        elif not _is_linear(module):
            reasons[name] = f"{type(module).__name__} returns something else than a linear module"
    return reasons


def _is_linear(module: Any) -> bool:
    """Does it map (1, n) to (1, m)? A subclass with its own `forward`, such as some routers of experts, may not."""
    from peft.tuners.lora.layer import Conv1D

    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    inputs, outputs = module.in_features, module.out_features
    try:
        with torch.no_grad(), _seeded(0, module.weight):
            result = type(module).forward(module, module.weight.new_ones(1, inputs))
    except Exception:  # it takes other inputs
        return False
    return torch.is_tensor(result) and result.shape == (1, outputs)


def _is_product(module: Any) -> bool:
    """Is what it computes x W^T + b? A class, or a module, may have a `forward` of its own that is the same (Falcon's),
    so it is tried on a few numbers: of the module's own there may be none, in a plan."""
    from peft.tuners.lora.layer import Conv1D

    forward = getattr(module, "_old_forward", module.forward)  # without accelerate's hooks, which move inputs
    if getattr(forward, "__func__", None) in (nn.Linear.forward, Conv1D.forward):
        return True
    small = copy.copy(module)
    try:
        with torch.no_grad(), unset_fake_temporarily(), torch.device("cpu"):
            x = torch.tensor([[[0.5, -2.0], [-8.0, 1.0]]])
            weight = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [7.0, -1.0]])
            bias = None if module.bias is None else torch.tensor([1.0, -2.0, 3.0])
            vars(small)["_parameters"] = {"weight": weight, "bias": bias}
            return torch.equal(small.forward(x), F.linear(x, weight, bias))
    except Exception:  # it needs its own sizes
        return False


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that can be adapted, by name.

    Raises:
        ValueError: some are adapted already.
    """
    from peft.tuners.lora.layer import Conv1D
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has adapters already: first finish() the method that made them")
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _named(pattern: str, names: Collection[str]) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]


def _in_layers(model: nn.Module, names: Collection[str]) -> list[str]:
    try:
        warn_of_layers_elsewhere(model)
        layers = tuple(f"{layer}." for layer in find_layers(model))
    except ValueError as error:
        raise ValueError(f"targets: {ALL_LINEAR!r}: {error}, or name the modules to adapt") from error
    return [name for name in names if f"{name}.".startswith(layers)]


def _hint(pattern: str, linear: Collection[str]) -> str:
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    if pattern == ALL_LINEAR:
        elsewhere = f", or name modules elsewhere: {', '.join(known)}" if known else ""
        return f"The layers have modules of other kinds: use a method without adapters{elsewhere}"
    return suggestion(pattern, known, unlisted=(ALL_LINEAR,))


def inject(model: nn.Module, names: list[str], settings: dict[str, Any], seed: int) -> LoraModel:
    """Adapt exactly the modules `names` of `model` in place, by LoRA; everything else is frozen.

    Raises:
        ValueError: peft adapted different ones.
    """
    from peft import LoraConfig, LoraModel

    return _adapted(LoraModel, LoraConfig(target_modules=_exactly(names), **settings), model, names, seed)


def inject_vera(model: nn.Module, names: list[str], settings: dict[str, Any], seed: int) -> VeraModel:
    """As `inject`, by VeRA: the frozen pair that all modules share is a function of `seed`."""
    from peft import VeraConfig, VeraModel

    config = VeraConfig(target_modules=_exactly(names), projection_prng_key=seed, **settings)
    return _adapted(VeraModel, config, model, names, seed)


def _exactly(names: Iterable[str]) -> str:
    """A regular expression, since peft treats a name as a suffix, which may match other modules too."""
    return "|".join(re.escape(f"{MODEL}.{name}") for name in names)


def _adapted(tuner: Any, config: Any, model: nn.Module, names: list[str], seed: int) -> Any:
    from peft.tuners.lora.layer import Conv1D

    # peft would find out itself, with a warning
    config.fan_in_fan_out = isinstance(model.get_submodule(names[0]), Conv1D)
    like = next(model.parameters())
    # in a wrapper that hides the model's type from peft, which replaces our targets for some types
    shell = nn.ModuleDict({MODEL: model})
    with _seeded(seed, like), _conversion_of_fake_tensors(like):
        adapters = tuner(shell, config, "default")
    adapted = {name.removeprefix(f"{MODEL}.") for name in adapted_modules(shell)}
    if adapted != set(names):
        strangers = ", ".join(sorted(adapted ^ set(names)))
        raise ValueError(f"peft adapted other modules than it was told to; the difference is {strangers}")
    return adapters


def freeze_a(model: nn.Module) -> dict[nn.Parameter, tuple[nn.Parameter, float]]:
    """Freeze each adapter's A (r, n); returns for its B (m, r) this A and the scale s."""
    frozen = {}
    for module in adapted_modules(model).values():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        frozen[b] = (a.requires_grad_(False), module.scaling["default"])
    return frozen


def corrected_gradients(
    frozen: Mapping[Any, tuple[Tensor, float]], params: list[Tensor], grads: list[Tensor]
) -> list[Tensor]:
    """LoRA-FA's gradients: B's g (m, r) becomes g (A A^T)^-1 / s^2; those of other parameters stay as they are.

    Args:
        frozen: what `freeze_a` returned.
        params, grads: pairs of equal shapes.
    """
    of_b: dict[torch.device, list[int]] = {}
    for i, p in enumerate(params) if frozen else ():
        if p in frozen:
            of_b.setdefault(p.device, []).append(i)
    if not of_b:
        return grads
    corrected = list(grads)
    for places in of_b.values():
        inverses = torch.linalg.pinv(torch.stack([_gram(*frozen[params[i]]) for i in places]), hermitian=True)
        for i, inverse in zip(places, inverses, strict=True):
            corrected[i] = (grads[i].float() @ inverse).to(grads[i].dtype)
    return corrected


def _gram(a: Tensor, scale: float) -> Tensor:
    """s^2 A A^T (r, r) in fp32, kept away from 0 as in peft."""
    a = gathered(a)
    return scale**2 * (a.float() @ a.float().t() + 1e-8 * torch.eye(len(a), device=a.device))


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """The modules with an adapter, by the names they had without one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


class CallsOfAdapters:
    """Lets torch's transformer encoders call their adapted modules in evaluation as in training, until `remove()`.

    In evaluation an `nn.TransformerEncoderLayer` hands the weights of its modules, which are without the adapters, to
    one kernel; but not where there is a hook. An `nn.TransformerEncoder` makes nested tensors for that kernel, of which
    not all adapters can make anything.
    """

    def __init__(self, model: nn.Module):
        encoders: list[Any] = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
        self._nesting = [encoder for encoder in encoders if encoder.use_nested_tensor and adapted_modules(encoder)]
        for encoder in self._nesting:
            encoder.use_nested_tensor = False
        layers = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
        self._hooks = [layer.register_forward_pre_hook(_change_nothing) for layer in layers if adapted_modules(layer)]

    def remove(self) -> None:
        """Leave torch's choice to torch again."""
        for encoder in self._nesting:
            encoder.use_nested_tensor = True
        for hook in self._hooks:
            hook.remove()


def _change_nothing(*_: Any) -> None:
    pass


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What `model.state_dict()` will be once adapters are merged and weights dense; the model isn't changed."""
    adapted = adapted_modules(model)
    replaced = {n: m for n, m in model.named_modules() if n in adapted or isinstance(m, StandIn)}
    state = dict(model.state_dict())
    for name, module in replaced.items():
        if name.rpartition(".")[0] in replaced:  # the base of an adapted module
            continue
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": value for key, value in _plain(module).state_dict().items()}
    return state


@torch.no_grad()
def _plain(module: nn.Module) -> Any:
    """A separate dense module with the adapter merged into it."""
    shell: Any = nn.ModuleDict({MODEL: copy.deepcopy(module)})
    restore_linears(shell)
    if adapted_modules(shell):
        shell[MODEL].merge()
        return shell[MODEL].get_base_layer()
    return shell[MODEL]


@contextmanager
def _seeded(seed: int, like: Tensor) -> Iterator[None]:
    """Seed the generators of the CPU and of `like`'s device, and restore them at the end."""
    devices = [like.device.index] if like.is_cuda and has_values(like) else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(int(seed))  # not a number of numpy
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(int(seed))
        yield


@contextmanager
def _conversion_of_fake_tensors(like: Tensor) -> Iterator[None]:
    """Let `module.to()`, which peft calls, work on fake tensors: torch swaps them, which a weak reference prevents."""
    original = nn.Module._apply
    if not has_values(like):
        nn.Module._apply = _apply_to_parameters  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


def _apply_to_parameters(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, with new parameters instead of swapped ones."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(fn(p.detach()), p.requires_grad))
    return module
