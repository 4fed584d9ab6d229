"""Which component of a transformer a module belongs to, by the classes and the tree of its modules."""

from __future__ import annotations

from torch import nn

COMPONENTS = ("embeddings", "attention", "mlp", "norms", "head", "other")

# What the name of a module's class says about it and all within: the first that fits.
_WORDS = {"norm": "norms", "embed": "embeddings", "attention": "attention", "attn": "attention", "mlp": "mlp"}


def classify(model: nn.Module) -> dict[str, str]:
    """The component of each module of `model`, by the module's name.

    Norms, embeddings, attention and MLPs are known by their classes. Of the rest, what lies within a block (an element
    of a `ModuleList`) is MLP, what comes before the blocks is embeddings, and what comes after them is the head,
    with the work of the module that holds it: the logits and the loss. The own work of blocks (residual sums) and
    of what contains them is "other", and so is all that is left in a model without blocks.
    """
    found: dict[str, str] = {}
    if _has_blocks(model):
        _visit(model, "", "embeddings", found)
        found[""] = "head"
    else:
        _paint(model, "", "other", found)
    return found


def _visit(module: nn.Module, name: str, rest: str, found: dict[str, str]) -> str:
    """Classifies a module outside of blocks, where the unnamed are `rest`; returns what they are after it."""
    if isinstance(module, nn.ModuleList):
        found[name] = "other"
        for index, block in module.named_children():
            _visit_block(block, f"{name}.{index}", found)
        return "head"
    if not _has_blocks(module):
        _paint(module, name, rest, found)
        return rest
    found[name] = "other"
    for child_name, child in module.named_children():
        path = _join(name, child_name)
        rest = _visit(child, path, rest, found)
        if found[path] == "head":
            found[name] = "head"
    return rest


def _visit_block(block: nn.Module, name: str, found: dict[str, str]) -> None:
    """Classifies a block, or a part of one that has attention somewhere within."""
    found[name] = "other"
    for child_name, child in block.named_children():
        path = _join(name, child_name)
        if _by_class(child) is None and any(_by_class(module) == "attention" for module in child.modules()):
            _visit_block(child, path, found)
        else:
            _paint(child, path, "mlp", found)


def _paint(module: nn.Module, name: str, component: str, found: dict[str, str]) -> None:
    """Gives a module and all within its class's component, or else this one; norms are norms wherever they are."""
    own = _by_class(module)
    found[name] = own or component
    within = component if own in (None, "norms") else own
    for child_name, child in module.named_children():
        _paint(child, _join(name, child_name), within, found)


def _by_class(module: nn.Module) -> str | None:
    words = type(module).__name__.lower()
    return next((component for word, component in _WORDS.items() if word in words), None)


def _has_blocks(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.ModuleList) for inner in module.modules())


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
