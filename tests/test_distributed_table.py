"""The table of docs/distributed.md: every method, in every form, is right on several processes or refused."""

import functools
import importlib
from pathlib import Path

import gloo
import pytest
import torch
from test_replicas import loss_of
from test_sharded import shard
from torch import distributed, nn

import optimizers
from optimizers.contract import Subject, build_model, weights_of
from optimizers.shared.sharded import gathered

PAGE = Path(__file__).resolve().parent.parent / "docs" / "distributed.md"
START, END = "<!-- table: generated -->\n", "\n<!-- end of table -->"
STEPS = 4
# Of the last loss, relative, and of any weight, where rounding doesn't decide how large a step is.
LOSS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 0.02}
WEIGHTS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: None}
# In fp32, the last bit of a gradient turns the sign of a singular vector; Muon iterates in bf16, whatever the weights.
ROUNDED = {"galore": {torch.float32: 5e-6}, "fira": {torch.float32: 5e-6}, "muon": {torch.float32: 1e-4}}
FORMS = {"plain": "plain", "in_backward": "in backward", "clipped": "clipped", "accumulated": "accumulated"}
CASES = [(size, dtype) for size in (2, 4) for dtype in LOSS]
NONE = "-"  # the method has no such form, on one process neither
ROWS = [(name, strategy) for name in sorted(optimizers.available()) for strategy in ("fsdp2", "replicate")]


def train(name, strategy, form, dtype, rank=0, count=1):
    """The weights, and the last loss of all ranks; None if the method has no such form."""
    cls = optimizers.get(name)
    tested = Subject(cls, cls.example)
    always = cls in (optimizers.get("lomo"), optimizers.get("adalomo"))
    if form == "in_backward" and "in_backward" not in tested.keywords and not always:
        return None
    if form in ("clipped", "accumulated") and always or form == "clipped" and cls.asks_losses:
        return None
    model = build_model(dtype)
    for layer in model.layers:  # its true gradient is zero: Adam would make a step of its last bits
        layer.self_attn.k_proj.bias.requires_grad_(False)
    late = count > 1 and strategy == "fsdp2"
    if late and not cls.adds_parameters:
        shard(model)
    optimizer = tested.build(model, **({"in_backward": True} if form == "in_backward" and not always else {}))
    if late and cls.adds_parameters:
        shard(model)
    if count > 1 and strategy == "replicate":
        optimizer.data_parallel()
    parts = 2 if form == "accumulated" else 1
    size = 16 // count // parts
    total = 0.0
    for step in range(STEPS):
        total = 0.0
        for part in range(parts):
            start = rank * 16 // count + part * size
            rows = slice(start, start + size)
            loss = optimizer.ask(lambda rows=rows, step=step: loss_of(model, rows, step) / parts)
            total += loss.item()
        if form == "clipped":
            optimizer.average_gradients()
            nn.utils.clip_grad_norm_(optimizer.trainable, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return {key: gathered(p) for key, p in weights_of(model).items()}, total


def attempt(rank, cell):
    try:
        return train(*cell, rank=rank, count=distributed.get_world_size())
    except (ValueError, RuntimeError) as error:
        return str(error)


def attempts(rank, cells):
    return [attempt(rank, cell) for cell in cells]


@functools.cache
def alone(cell):
    return train(*cell)


def judged(cell, found):
    """What the table says of a cell, given what each rank found; an assertion fails if it is silently wrong."""
    one, *others = found
    if one is None:
        return NONE
    if isinstance(one, str):
        assert all(other == one for other in others) and "\n" not in one, (cell, found)
        return one
    for weights, _ in others:
        assert all(torch.equal(p, weights[key]) for key, p in one[0].items()), cell
    wanted, loss = alone(cell)
    name, *_, dtype = cell
    mean = sum(last for _, last in found) / len(found)
    assert abs(mean - loss) <= ROUNDED.get(name, {}).get(dtype, LOSS[dtype]) * loss, (cell, mean, loss)
    furthest = max((p - wanted[key]).abs().max().item() for key, p in one[0].items())
    if WEIGHTS[dtype] and dtype not in ROUNDED.get(name, {}):
        assert furthest < WEIGHTS[dtype], (cell, furthest)
    return "right"


def said(form, size, dtype):
    """What the table says of each row in one form."""
    importlib.import_module("peft")  # here, or each process would import it
    cells = [(*row, form, dtype) for row in ROWS]
    found = zip(*gloo.run(attempts, cells, size=size, seconds=3600), strict=True)
    return {cell[:2]: judged(cell, one) for cell, one in zip(cells, found, strict=True)}


def table(words):
    """The page's table of what is said in each form, and under it the sentences of those that refuse."""
    sentences = [words[form][row] for row in ROWS for form in FORMS]
    sentences = list(dict.fromkeys(word for word in sentences if word not in ("right", NONE)))
    lines = [f"| method | strategy | {' | '.join(FORMS.values())} |", f"|{'---|' * (2 + len(FORMS))}"]
    for row in ROWS:
        cells = [words[form][row] for form in FORMS]
        shown = [f"refused ({sentences.index(word) + 1})" if word in sentences else word for word in cells]
        lines.append(f"| {' | '.join([*row, *shown])} |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for number, text in enumerate(sentences, 1))])


def refresh():
    """Write the table into the page."""
    before, after = PAGE.read_text().split(START)[0], PAGE.read_text().split(END)[1]
    PAGE.write_text(before + START + table({form: said(form, 2, torch.float64) for form in FORMS}) + END + after)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
def test_the_pages_table_is_what_several_processes_do(size, dtype):
    assert PAGE.read_text().split(START)[1].split(END)[0] == table({form: said(form, size, dtype) for form in FORMS}), (
        "docs/distributed.md is stale; refresh it with: "
        "cd tests && python -c 'from test_distributed_table import refresh; refresh()'"
    )
