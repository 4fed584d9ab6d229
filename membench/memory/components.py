"""The component of a transformer to which a module belongs, by the classes and tree of its modules."""

from __future__ import annotations

from torch import nn

COMPONENTS = ("embeddings", "attention", "mlp", "norms", "head", "other")

# What the class name of a module implies for it and everything within; the first match counts.
_WORDS = {"norm": "norms", "embed": "embeddings", "attention": "attention", "attn": "attention", "mlp": "mlp"}


def classify(model: nn.Module) -> dict[str, str]:
    """The component of each module of `model`, by the module's name.

    Norms, embeddings, attention and MLPs are recognised by their classes. Of the rest, whatever is in a block (an
    element of a `ModuleList`) counts as MLP, what precedes the blocks as embeddings, and what follows them as head,
    together with what the module that holds it computes: the logits and the loss. What blocks and the modules that
    contain them compute themselves (residual sums) is "other", and so is the rest of a model without blocks.
    """
    found: dict[str, str] = {}
    if _has_blocks(model):
        _visit(model, "", "embeddings", found)
        found[""] = "head"
    else:
        _paint(model, "", "other", found)
    return found


def _visit(module: nn.Module, name: str, rest: str, found: dict[str, str]) -> str:
    """Classify a module outside blocks, where unrecognised ones are `rest`; returns what they are after it."""
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
    """Classify a block, or a part of one that contains attention."""
    found[name] = "other"
    for child_name, child in block.named_children():
        path = _join(name, child_name)
        if _by_class(child) is None and any(_by_class(module) == "attention" for module in child.modules()):
            _visit_block(child, path, found)
        else:
            _paint(child, path, "mlp", found)


def _paint(module: nn.Module, name: str, component: str, found: dict[str, str]) -> None:
    """Assign a module and everything in it to its class's component, or else to this one; norms always stay norms."""
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
