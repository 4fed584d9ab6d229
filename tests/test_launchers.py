"""The examples of docs/distributed.md on two processes: weights equal to the bit, those of one process on the joined
batch, or one sentence. In fp64, where Adam doesn't make steps of rounding errors."""

import contextlib
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import gloo
import letters
import pytest
import sharding_cpu
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import optimizers
from optimizers.shared.sharded import gathered

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "distributed.md"
STEPS, PAUSE = 6, 4
REPLICAS, SHARDS = {}, {"fsdp": True}
LAUNCHED = {  # what `accelerate launch` makes of the page's fsdp2.yaml
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the page's examples, a tiny model, tokenized data."""
    for name in (
        "peft",
        "datasets",
        "torch._dynamo",
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
    ):
        importlib.import_module(name)  # here, or each process would import it
    folder = tmp_path_factory.mktemp("desk")
    for name, code in re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (folder / name).write_text(code)
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).double().save_pretrained(folder / "model")
    letters.letters().save_pretrained(folder / "model")
    tokens = torch.randint(5, 50, (48, 12), generator=torch.Generator().manual_seed(1)).tolist()
    for name, masked in (("even", 0), ("data", 5)):  # of `data`, other shares of a sequence count
        labels = [[-100] * (i % 5 if masked else 0) + row[i % 5 if masked else 0 :] for i, row in enumerate(tokens)]
        rows = [json.dumps({"input_ids": row, "labels": label}) for row, label in zip(tokens, labels, strict=True)]
        (folder / f"{name}.json").write_text("\n".join(rows))
    return folder


def settings(desk, out, method, count=2, **more):
    """The file that train.py reads; the batch is the same for any number of processes."""
    size = 8 // count // more.get("gradient_accumulation_steps", 1)
    given = {
        "model": str(desk / "model"), "data": str(desk / "data.json"), "method": method, "output_dir": str(desk / out),
        "use_cpu": True, "max_steps": STEPS, "save_steps": PAUSE, "learning_rate": 1e-3, "report_to": "none",
        "disable_tqdm": True, "max_grad_norm": 0.0, "per_device_train_batch_size": size, **more,
    }  # fmt: skip
    path = desk / f"{out}.{os.environ.get('RANK')}.json"
    path.write_text(json.dumps(given))
    return str(path)


def on_rank(rank, desk, jobs, size, pretend=True):
    """The weights after each job, or what it was refused with; a job is (out, method, settings, environment)."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ["HF_DATASETS_CACHE"] = str(desk / "cache")
    return [attempt(desk, size, pretend, *job) for job in jobs]


def attempt(desk, size, pretend, out, method, more, environment):
    sharding_cpu.forget()
    before = dict(os.environ)
    os.environ |= environment
    script = "stock.py" if out.startswith("stock") else "train.py"
    sys.argv = [script, settings(desk, out, method, size, **more)]
    shards = pretend and (more.get("fsdp") or environment)
    try:
        with sharding_cpu.accelerate_shards_on_cpu() if shards else contextlib.nullcontext():
            trainer = runpy.run_path(str(desk / script), run_name="__main__")["trainer"]
        return {name: gathered(p.detach()) for name, p in trainer.model.named_parameters()}
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.environ.clear()  # accelerate passes FSDP's settings on in it
        os.environ |= before


def check(desk, jobs):
    """Both processes have the same weights, those of one process; so has the saved model, which isn't the first one."""
    one, other = gloo.run(on_rank, desk, jobs, 2)
    alone = [
        (f"{out}-alone", method, {k: v for k, v in more.items() if k != "fsdp"}, {}) for out, method, more, _ in jobs
    ]
    (joined,) = gloo.run(on_rank, desk, alone, 1, size=1)
    start = saved(desk / "model")
    for job, here, there, wanted in zip(jobs, one, other, joined, strict=True):
        assert not isinstance(here, str), (job, here)
        assert all(torch.equal(p, there[name]) for name, p in here.items()), job
        assert distance(here, wanted) < 1e-6, job
        assert (
            distance(saved(desk / job[0]), saved(desk / f"{job[0]}-alone"))
            < 1e-6
            < distance(saved(desk / job[0]), start)
        )


def saved(folder):
    return load_file(folder / "model.safetensors")


def distance(one, other):
    assert one.keys() == other.keys()
    return max((p - other[name]).abs().max().item() for name, p in one.items())


BADAM = {"method_kwargs": {"switch_every": 2}}


def test_the_trainers_example_is_right_on_two_processes(desk):
    check(desk, [("shards", "badam", {**BADAM, **SHARDS, "max_grad_norm": 0.05}, {})])


FORMS = {
    "badam": ("badam", BADAM),
    "badam in backward": ("badam", {"method_kwargs": {"switch_every": 2, "in_backward": True}}),
    "lora": ("lora", {}),
    "lora clipped": ("lora", {"max_grad_norm": 0.05}),
    "adamw accumulated and clipped": ("adamw", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}),
    "adamw in backward": ("adamw", {"method_kwargs": {"in_backward": True}}),
    "blockllm": ("blockllm", {"method_kwargs": {"sparsity": 0.7, "patience": 2}}),
    "galore": ("galore", {"method_kwargs": {"rank": 4}}),
    "hft": ("hft", BADAM),
    "lomo clipped": ("lomo", {"method_kwargs": {"clip_norm": 0.1}}),
    "muon": ("muon", {}),
    "sgd": ("sgd", {}),
    "welore": ("welore", {}),
}
WAYS = {"torchrun replicas": (REPLICAS, {}), "torchrun fsdp2": (SHARDS, {}), "accelerate launch fsdp2": ({}, LAUNCHED)}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_form_is_right_in_the_trainer_on_two_processes(desk, way):
    settings, environment = WAYS[way]
    where = way.replace(" ", "-")
    check(desk, [(f"{where}-{n}", m, {**more, **settings}, environment) for n, (m, more) in enumerate(FORMS.values())])


RESUMED = {"badam": BADAM, "lora": {}, "lomo": {}, "sgd": {}}  # with a state of one block, adapters, nothing


@pytest.mark.slow
@pytest.mark.parametrize("way", [REPLICAS, SHARDS], ids=["replicas", "fsdp2"])
def test_a_checkpoint_of_two_processes_resumes_to_the_last_bit(desk, way):
    there = {name: f"{'shards' if way else 'copies'}-{name}" for name in RESUMED}
    jobs = [(there[name], name, {**more, **way}, {}) for name, more in RESUMED.items()]
    for name, more in RESUMED.items():
        checkpoint = {"resume_from_checkpoint": str(desk / there[name] / f"checkpoint-{PAUSE}")}
        jobs.append((f"{there[name]}-again", name, {**more, **way, **checkpoint}, {}))
    for found in gloo.run(on_rank, desk, jobs, 2):
        for straight, resumed, name in zip(found, found[len(RESUMED) :], RESUMED, strict=False):
            assert distance(straight, resumed) == 0, name


STOCK = """
import optimizers
from transformers import Trainer

def MethodTrainer(model, args, train_dataset, method, method_kwargs):
    made = optimizers.get(method)(model, lr=args.learning_rate, **method_kwargs)
    return Trainer(model, args, train_dataset=train_dataset, optimizers=(made, None))
"""
REFUSED = {  # a job, and what it is refused with
    ("stock-badam", "badam", ""): r"changes what it trains, .* membench\.MethodTrainer does so",
    ("stock-lomo", "lomo", ""): r"updates inside the backward pass, .* membench\.MethodTrainer does so",
    ("stock-blockllm", "blockllm", ""): r"must see the loss",
    ("stock-shards", "badam", "fsdp"): r"Passing `optimizers` is not allowed if .*FSDP",
    ("mezo-shards", "mezo", "fsdp"): r"train replicas, by .* without fully_shard\(\)",
    ("vain", "badam", "ignored"): r"FSDP was asked for, but accelerate doesn't shard with MULTI_CPU: leave it out",
}


@pytest.mark.slow
def test_what_cant_be_right_is_refused_and_a_stock_trainer_is_right_with_what_it_can_train(desk):
    example = (desk / "train.py").read_text()
    (desk / "stock.py").write_text(example.replace("from membench import MethodTrainer", STOCK))
    jobs = [(out, method, SHARDS if how else REPLICAS, {}) for out, method, how in REFUSED]
    for found in zip(
        *(gloo.run(on_rank, desk, some, 2, shards) for some, shards in ((jobs[:-1], True), (jobs[-1:], False))),
        strict=True,
    ):
        for said, sentence in zip(sum(found, []), REFUSED.values(), strict=True):
            assert isinstance(said, str) and re.search(sentence, said), (said, sentence)
    check(desk, [(f"stock-{name}", name, REPLICAS, {}) for name in ("adamw", "galore")])


def launch(desk, launcher, *script, shards=False):
    """A script under a launcher, as the page shows it; `shards` on CPUs, where accelerate must be told."""
    way = {
        "torchrun": ("torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        "accelerate": ("accelerate.commands.launch", "--config_file", "fsdp2.yaml", "--main_process_port", "0"),
    }
    first = [str(TESTS / "sharding_cpu.py")] if shards else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        "ACCELERATE_USE_CPU": "true",
        "HF_DATASETS_CACHE": str(desk / "cache"),
    }
    command = [sys.executable, "-m", *way[launcher], *first, *script]
    done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "more"), [("torchrun", REPLICAS), ("torchrun", SHARDS), ("accelerate", {})], ids=str
)
def test_launched_as_the_page_shows_the_trainer_saves_what_one_process_does(desk, launcher, more):
    out = f"launched-{launcher}-{len(more)}"
    launch(
        desk, launcher, "train.py", settings(desk, out, "badam", **BADAM, **more), shards=more or launcher != "torchrun"
    )
    alone = [(f"{out}-alone", "badam", BADAM, {})]
    gloo.run(on_rank, desk, alone, 1, size=1)
    assert (
        distance(saved(desk / out), saved(desk / f"{out}-alone"))
        < 1e-6
        < distance(saved(desk / out), saved(desk / "model"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_loop_with_accelerate_trains_the_same_on_shards_and_replicas_and_in_one_process(desk, launcher):
    data = str(desk / "even.json")
    launch(desk, launcher, "loop.py", "model", data, f"loop-{launcher}", shards=launcher == "accelerate")
    alone = (desk / "loop.py").read_text().replace("batch_size=4", "batch_size=8")
    (desk / "alone.py").write_text(alone.replace("    optimizer.data_parallel()\n", ""))
    given = [sys.executable, "alone.py", "model", data, "loop-alone"]
    subprocess.run(given, cwd=desk, check=True, timeout=600, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert distance(saved(desk / f"loop-{launcher}"), saved(desk / "loop-alone")) < 1e-6


PREPARED = """
import json, sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, default_data_collator

import optimizers

data, out, methods = sys.argv[1:]
accelerator, found = Accelerator(), {}
for name, given in json.loads(methods):
    model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
    examples = load_dataset("json", data_files=data, split="train")
    loader = DataLoader(examples, batch_size=8 // accelerator.num_processes, collate_fn=default_data_collator)
    try:
        optimizer = optimizers.create(name, model, **given)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        weights = torch.cat([p.flatten() for p in accelerator.get_state_dict(model).values()])
        found[name, "in_backward" in given] = accelerator.gather(weights[None])
    except (ValueError, RuntimeError) as error:
        found[name, "in_backward" in given] = str(error)
if accelerator.is_main_process:
    torch.save(found, out)
"""


@pytest.mark.slow
def test_a_loop_that_prepares_model_and_method_for_ddp_is_right_or_told_in_one_sentence_what_to_do(desk):
    """With `accelerator.backward` and no word of ours, as their users write it."""
    plain = [(name, dict(optimizers.get(name).example)) for name in optimizers.available()]
    inside = [(name, {**given, "in_backward": True}) for name, given in plain if name in ("adamw", "badam", "galore")]
    (desk / "prepared.py").write_text(PREPARED)
    given = "prepared.py", str(desk / "even.json")
    launch(desk, "torchrun", *given, "by-two.pt", json.dumps(plain + inside))
    way = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(TESTS.parent)}
    one_by_one = [sys.executable, *given, "by-one.pt", json.dumps(plain + inside)]
    subprocess.run(one_by_one, cwd=desk, check=True, timeout=600, env=way)
    found, alone = (torch.load(desk / name) for name in ("by-two.pt", "by-one.pt"))
    right = {key for key, weights in found.items() if torch.is_tensor(weights)}
    for key in right:
        assert torch.equal(*found[key]) and (found[key] - alone[key]).abs().max() < 1e-6, key
    for key in found.keys() - right:
        assert re.fullmatch(
            r"[^\n.]+, which DistributedDataParallel can't follow: build it on the plain model, without a wrapper, "
            r"and call optimizer\.data_parallel\(\); membench\.MethodTrainer does so",
            found[key],
        ), (key, found[key])
    changing = {"adalomo", "badam", "blockllm", "hft", "lisa", "lomo", "mezo"}
    assert right == {(name, False) for name in set(optimizers.available()) - changing}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_trls_trainer_is_right_on_two_processes(desk, launcher):
    pytest.importorskip("trl")
    given = {
        "use_cpu": True, "max_steps": STEPS, "learning_rate": 1e-3, "report_to": "none", "max_grad_norm": 0.0,
        "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
    }  # fmt: skip
    for size, out in ((4, f"sft-{launcher}"), (8, "sft-alone")):
        how = {**given, "per_device_train_batch_size": size, "output_dir": str(desk / out)}
        (desk / f"{out}.json").write_text(json.dumps(how))
    script = ("sft.py", "model", str(desk / "data.json"), "badam")
    launch(desk, launcher, *script, f"sft-{launcher}.json", shards=launcher == "accelerate")
    subprocess.run([sys.executable, *script, "sft-alone.json"], cwd=desk, check=True, timeout=600)
    assert distance(saved(desk / f"sft-{launcher}"), saved(desk / "sft-alone")) < 1e-6
