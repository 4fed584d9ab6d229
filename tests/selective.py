"""Plain AdamW on what is selected at each step: the reference for methods that train a part at a time."""

import torch

from optimizers.contract import loss_of


def train_selected(model, selected, steps, *, lr, weight_decay, forgets):
    """Train for `steps` steps what `selected(step)` names, one fresh `torch.optim.AdamW` a parameter.

    `forgets(name, step)`: is the optimizer of a parameter thrown away before that step?
    """
    named = dict(model.named_parameters())
    adams = {}
    for step in range(steps):
        names = selected(step)
        for name, p in named.items():
            p.requires_grad_(name in names)
            if forgets(name, step):
                adams.pop(name, None)
        loss_of(model, step).backward()
        for name in names:
            p = named[name]
            if name not in adams:
                decay = weight_decay if p.dim() >= 2 else 0.0
                adams[name] = torch.optim.AdamW([p], lr=lr, weight_decay=decay, fused=True)
            adams[name].step()
            p.grad = None
