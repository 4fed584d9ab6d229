"""`membench plan`: what it prints, its JSON, and its refusals in one sentence."""

import gc
import json
import re
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import plan_models
import pytest
from typer.testing import CliRunner

import optimizers
from membench.cli import app, main
from membench.memory.breakdown import find_peaks
from membench.planning import budget, verify
from membench.planning.blueprint import Blueprint
from membench.planning.formulas import facts, formula
from membench.planning.planner import method_values, plan
from membench.planning.simulate import simulate
from membench.planning.workload import Workload
from reports import plans
from reports.parts import FIELDS


def tiny(tmp_path, name="llama", **given):
    return Workload(plan_models.folder(tmp_path, name, 2, **given), 2, 16)


def run(*arguments):
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    return result.output


def refused(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["membench", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_json_has_a_row_a_method_with_the_promised_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "built_in_models", lambda causal: {})  # to plan them takes long
    workload = tiny(tmp_path)
    size = ["--batch-size", "2", "--sequence-length", "16", "--budget", "600MiB"]
    document = json.loads(run("--model", workload.model, *size, "--optimizers", "sgd,lomo", "--format", "json"))
    assert [row["method"] for row in document["rows"]] == ["sgd", "lomo"]
    for row in document["rows"]:
        assert row["peak_allocated_bytes"] == sum(row["at_peak"].values())
        assert set(row["at_peak"]) == set(row["maximum"]) == set(FIELDS)
        assert row["estimated_total_bytes"] == row["peak_reserved_bytes"] + document["context_bytes"]
        assert row["peak_reserved_bytes"] >= row["peak_allocated_bytes"]
        assert row["fits"] is True and row["left_bytes"] == 600 * 2**20 - row["estimated_total_bytes"]
        assert row["peak_phase"] in {"forward", "backward", "update", "switch"}


def test_what_is_left_or_missing_is_in_the_unit_of_its_table_and_a_budget_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "built_in_models", lambda causal: {})
    made = plan(tiny(tmp_path), ["sgd"], {}, budget_bytes=600 * 2**20)
    (row,) = made["rows"]
    assert f"yes, {row['left_bytes'] / 2**20:,.2f} left" in plans.render(made, "table")  # MiB, as the other columns
    assert "budget 600 MiB" in plans.render(made, "table")
    assert "those that run at all, perhaps only tightly" in plans.render(made, "table")
    row |= {"fits": False, "left_bytes": -28 * 2**20, "advice": None}
    assert "no, 28.00 missing" in plans.render(made, "table")


@pytest.mark.parametrize(("missing", "said"), [(3 << 20, "3.00 MiB"), (5000, "5,000 bytes")])
def test_what_would_be_0_00_of_a_unit_is_said_in_a_smaller_one(missing, said):
    def row(method, fits, left):
        return {"method": method, "fits": fits, "left_bytes": left, "limits": None, "advice": None}

    close = {"estimated_total_bytes": (24 << 30) + missing, "at_peak": {"weights_bytes": 15 << 30}}
    lost, held = row("adamw", False, -missing) | close, row("lora", True, missing)
    assert [plans._fits(one, 2**30) for one in (lost, held)] == [f"no, {said} missing", f"yes, {said} left"]
    document = {"budget_bytes": 24 << 30, "context_bytes": 2**29, "setup": {"gpus": 1, "strategy": "fsdp2"}}
    use, _, no_option = plans.advice({**document, "rows": [lost, held]})
    assert f"lora ({said} left)" in use and no_option.endswith(f"adamw ({said} missing).")
    assert plans.verdict({**document, "rows": [lost]})[0].endswith(f"with 24.00 GiB; {said} are missing.")
    small = {**document, "budget_bytes": 540 << 20, "rows": [lost | {"left_bytes": -(210 << 20)}]}
    assert "210.00 MiB are missing" in plans.verdict(small)[0] and "(210.00 MiB missing)" in plans.advice(small)[-1]
    helped = row("adamw", False, -missing) | {"advice": {"options": ["--x"], "without": [], "left_bytes": missing}}
    assert plans.advice({**document, "rows": [helped]}) == [f"adamw would fit with --x ({said} left)."]


def test_the_tree_of_a_small_model_is_in_mib(tmp_path):
    said = run("--model", tiny(tmp_path).model, "--why", "sgd", "--sequence-length", "16")
    assert re.search(r"sgd: 0\.[1-9]\d MiB at the peak", said) and re.search(r" MiB +share ", said)
    assert not re.search(r"\d GiB", said)


def test_with_why_the_budget_is_answered_too(tmp_path):
    given = ("--model", tiny(tmp_path).model, "--why", "sgd", "--sequence-length", "16")
    assert "On 2.00 GiB use sgd (" in run(*given, "--budget", "2GiB") and "use sgd" not in run(*given)
    assert "Nothing fits into 100 MiB: sgd comes nearest" in run(*given, "--budget", "100MiB")


def test_a_config_json_names_a_model_as_its_folder_does(tmp_path):
    workload = tiny(tmp_path)
    from_file = Workload(f"{workload.model}/config.json", 2, 16)
    assert plan(from_file, ["sgd"], {})["rows"] == plan(workload, ["sgd"], {})["rows"]


def test_all_registered_methods_are_planned(tmp_path):
    document = plan(tiny(tmp_path), optimizers.available(), {})
    assert [row["method"] for row in document["rows"]] == optimizers.available()
    assert not document["refused"]


def test_a_users_own_method_is_planned_without_further_code(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text(
        "from optimizers import MemoryEfficientOptimizer\n"
        "class SignDescent(MemoryEfficientOptimizer):\n"
        "    def __init__(self, model, lr=1e-3):\n"
        "        super().__init__(model, {'lr': lr, 'weight_decay': 0.0})\n"
        "    def update(self, params, grads, group):\n"
        "        for p, g in zip(params, grads):\n"
        "            p.add_(g.sign(), alpha=-group['lr'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    document = plan(tiny(tmp_path), ["half:SignDescent", "sgd"], {})
    own, sgd = document["rows"]
    assert own["maximum"]["optimizer_state_bytes"] == 0
    assert own["maximum"]["gradients_bytes"] == sgd["maximum"]["gradients_bytes"]


def test_hyper_parameters_reach_the_method(tmp_path):
    text = run("--model", tiny(tmp_path).model, "--optimizers", "lora", "--format", "json", "--set", "lora.rank=2")
    small = json.loads(text)["rows"][0]
    large = plan(Workload(tiny(tmp_path).model, 1, 512), ["lora"], {"lora": {"rank": 4}})["rows"][0]
    assert large["trained_weights"] == 2 * small["trained_weights"]


def test_preferences_are_planned_with_their_own_rates(tmp_path):
    pairs = replace(tiny(tmp_path), task="dpo")
    rates = [plan(one, ["lora"], {})["rows"][0]["hyperparameters"]["lr"] for one in (tiny(tmp_path), pairs)]
    assert rates == [6e-4, 3e-5]  # a twentieth, as `compare --task dpo` has


def test_a_new_classifier_is_always_trained(tmp_path):
    rows = {row["method"]: row for row in plan(tiny(tmp_path, "roberta"), ["badam", "lora"], {})["rows"]}
    for row in rows.values():
        assert row["hyperparameters"]["always_train"] == ("classifier",)
        assert row["components"]["head"]["optimizer_state_bytes"]


def test_why_is_a_tree_that_adds_up_to_the_peak(tmp_path):
    workload = tiny(tmp_path)
    document = plan(workload, ["lisa"], {})
    row = document["rows"][0]
    for part in FIELDS:
        assert sum(parts[part] for parts in row["components"].values()) == row["at_peak"][part]
        for component, modules in row["modules"].items():
            assert sum(parts[part] for parts in modules.values()) == row["components"][component][part]
    text = plans.why(document, "lisa")
    assert "model.layers.*.mlp.down_proj" in text and "lm_head" in text
    assert "training model.layers" in text
    document["setup"]["model"] = "a\x1b[31m\nb\u202ec"  # a folder can be called so
    for shown in (plans.why(document, "lisa"), *(plans.render(document, format) for format in plans.FORMATS)):
        assert all(sign.isprintable() or sign == "\n" for sign in shown) and "a\\" in shown


@pytest.mark.slow
def test_lisas_states_are_mostly_those_of_embeddings_and_head(tmp_path):
    """At 8B, 70.7 % of what LISA trains."""
    row = plan(Workload("llama3-8b", checkpointing=True), ["lisa"], {})["rows"][0]
    states = {name: parts["optimizer_state_bytes"] for name, parts in row["components"].items()}
    assert (states["embeddings"] + states["head"]) / sum(states.values()) == pytest.approx(0.707, abs=0.001)


@pytest.mark.slow
def test_lomo_holds_about_one_gradient_and_galore_works_on_copies(tmp_path):
    document = plan(Workload("llama3-8b", 1, 64, checkpointing=True), ["lomo", "galore", "sgd"], {})
    lomo, galore, sgd = document["rows"]
    assert lomo["maximum"]["gradients_bytes"] == 2 * 128_256 * 4096
    matrix_in_fp32 = 4 * 4096 * 14_336
    assert sgd["maximum"]["gradients_bytes"] == 2 * document["parameters"]
    assert galore["peak_phase"] == "update" and galore["maximum"]["temporaries_bytes"] >= matrix_in_fp32


@pytest.mark.slow
def test_badams_first_block_peaks_higher_than_its_last_by_what_frozen_layers_keep_and_the_plan_names_it():
    workload = Workload("roberta-large", 8, 256, "float32")
    blueprint = Blueprint(workload)
    trace = simulate(blueprint, "badam", method_values(blueprint, "badam", {}), blueprint.depth).trace
    peaks = [peak for peak, _ in find_peaks(trace)[0]]
    by_name = {name: peak for (_, name), peak in zip(trace.selections, peaks, strict=True)}
    first, last = by_name["roberta.encoder.layer.0"], by_name["roberta.encoder.layer.23"]
    # q, k, v and the output of fused attention, the inputs of two norms, GELU's input of four times the width, and two
    # masks of dropout, a byte each; of each layer behind the first
    states = 4 * 8 * 256 * 1024
    assert first - last == pytest.approx(23 * (3 + 1 + 2 + 4 + 2 / 4) * states, rel=0.05)
    row = plan(workload, ["badam"], {})["rows"][0]
    assert row["peak_selection"] == "roberta.encoder.layer.0" and row["peak_allocated_bytes"] == first


def test_formulas_are_those_of_the_papers():
    m, blueprint = 6_738_415_616, Blueprint(Workload("llama2-7b"))
    known = facts(blueprint, m)
    expected = {"adamw": 18 * m, "lomo": 2 * m * 33 / 32, "badam": 2.5 * m, "lora": 2 * m + 36 * 8 * m / 4096}
    for method, size in expected.items():
        assert formula(method, known, {"rank": 8})[1] == round(size)
    assert formula("sgd", known, {}) is None
    others = {"lora": {"variant": "vera"}, "badam": {"inner": "sgd"}, "galore": {"states": "8bit"}}
    assert [formula(method, known, {"rank": 8, **given}) for method, given in others.items()] == [None] * 3
    states = 0.164e9 + 2 * 58_073_600  # GaLore's 60M: what its formula gives, and the weights
    assert formula("galore", facts(Blueprint(Workload("llama-60m")), 58_073_600), {"rank": 128})[1] == pytest.approx(
        states, rel=0.01
    )


@pytest.mark.slow
def test_a_budget_that_nothing_fits_says_what_is_missing(tmp_path):
    text = run("--model", "llama3-8b", "--optimizers", "lomo,lora", "--checkpointing", "--budget", "12GiB")
    said = re.sub(r"\s+", " ", text)
    assert "Nothing fits into 12.00 GiB: lora comes nearest, with 1" in said and "GiB are missing" in said
    assert "The weights alone take 14.96 GiB at least (lomo)." in said


def test_the_least_weights_are_named_with_the_method_whose_they_are():
    """QLoRA's are in 4 bits, so they aren't what the model takes in its dtype."""
    gib = 2**30
    rows = [
        {"method": name, "fits": False, "estimated_total_bytes": total * gib, "left_bytes": (3 - total) * gib}
        | {"at_peak": {"weights_bytes": weights * gib}}
        for name, total, weights in (("lora", 17, 15), ("qlora", 9, 6))
    ]
    document = {"rows": rows, "budget_bytes": 3 * gib, "context_bytes": gib // 2}
    (said,) = plans.verdict(document)
    assert said.startswith("Nothing fits into 3.00 GiB: qlora comes nearest, with 9.00 GiB; 6.00 GiB are missing.")
    assert said.endswith("The weights alone take 6.00 GiB at least (qlora).")


def test_it_says_that_activations_are_those_of_a_gpu(tmp_path):
    said = run("--model", tiny(tmp_path, "gpt2").model, "--optimizers", "sgd", "--sequence-length", "16")
    assert "Activations are what a GPU's kernels keep" in said and "metered on a CPU" not in said


def test_it_says_which_plans_are_of_the_worst_case_and_of_what(tmp_path):
    setup = ("--model", tiny(tmp_path, "llama").model, "--sequence-length", "16", "--optimizers")
    said = re.sub(r"\s+", " ", run(*setup, "welore,sgd,lisa,lisa:layers=1"))
    assert "Planned at the worst, below which a run may stay far: welore (by the ranks of its matrices); " in said
    assert "; lisa, lisa:layers=1 (by the layers that are drawn)." in said
    assert "Planned at the worst" not in run(*setup, "sgd")


def test_it_says_how_many_weights_are_in_fused_experts_which_adapters_and_4_bits_leave_out(tmp_path):
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    model = plan_models.folder(tmp_path, "llama", 2, **experts)
    said = re.sub(r"\s+", " ", run("--model", model, "--optimizers", "qlora,sgd", "--sequence-length", "16"))
    fused = 2 * 4 * 3 * 64 * 128  # layers, experts, matrices
    assert f"qlora: {fused:,} weights are in fused experts, no linear modules" in said
    assert "fused experts" not in run("--model", model, "--optimizers", "sgd", "--sequence-length", "16")
    llama = plan_models.folder(tmp_path, "llama", 2)
    assert "fused experts" not in run("--model", llama, "--optimizers", "qlora", "--sequence-length", "16")


def test_markdown_is_a_table(tmp_path):
    text = run("--model", tiny(tmp_path).model, "--optimizers", "sgd", "--format", "markdown")
    assert "| sgd " in text and "### Memory at the peak, MiB" in text  # of a small model


REFUSALS = [
    (["--model", "llama3-8b", "--budget", "24GX"], "--budget 24GX: give a number and a unit, such as 24GiB"),
    (["--model", "llama3-8b", "--format", "xml"], "--format must be one of table, json, markdown, not 'xml'"),
    (["--model", "llama3-8b", "--dtype", "int4"], "--dtype must be one of bfloat16, float32, float16, not 'int4'"),
    (["--model", "llama3-8b", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
    (["--model", "llama3-8b", "--optimizers", "bdam"], "unknown method 'bdam'. Did you mean 'badam'?"),
    (["--model", "llama3-8b", "--set", "badam.lr"], "write METHOD.KEY=VALUE"),
    (["--model", "llama3-8b", "--set", ".lr=3"], "write METHOD.KEY=VALUE"),
    (["--model", "lama3-8b"], "Did you mean 'config:llama3-8b'?"),
    (["--model", "config:lama3-8b"], "Did you mean 'config:llama3-8b'?"),
    (["--against", "badam-table-3x"], "there is no published table 'badam-table-3x'. Did you mean"),
    (["--against", "hft-sft"], "can't be planned"),
    (["--model", "llama3-8b", "--optimizers", "sgd", "--why", "lora"], "--why lora isn't among --optimizers sgd"),
    ([], "give --model"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSALS)
def test_mistakes_are_refused_in_one_sentence(arguments, sentence, capsys, monkeypatch):
    error = refused(capsys, monkeypatch, *arguments)
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_without_a_gpu_verify_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify.torch.cuda, "is_available", lambda: False)
    error = refused(capsys, monkeypatch, "--model", tiny(tmp_path).model, "--optimizers", "sgd", "--verify")
    assert "--verify runs real steps on a GPU, and this machine has none" in error


def test_verify_prints_planned_beside_measured(tmp_path):
    workload = replace(tiny(tmp_path, vocab_size=5_000, hidden_size=256), device="cpu")
    methods = ["sgd", "badam"]
    document = plan(workload, methods, {})
    lines = verify.report(workload, methods, {}, document, device="cpu").splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()[:1] in (["sgd"], ["badam"])}
    for name in methods:
        planned, _, allocated, reserved = rows[name]
        assert planned == allocated and reserved == "-"


def test_verify_leaves_what_was_measured_before_out_of_a_methods_peaks(monkeypatch):
    class Method:
        def __init__(self):
            self.model = self  # as a method and its model refer to each other

    left, alive = [], []
    monkeypatch.setattr(verify, "simulate", lambda *_, **__: left.append(weakref.ref(Method())))
    monkeypatch.setattr(verify.torch.cuda, "empty_cache", lambda: alive.append(sum(m() is not None for m in left)))
    monkeypatch.setattr(verify.torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(verify.torch.cuda, name, lambda device: 1)
    gc.disable()
    try:
        for _ in range(3):
            verify.measure(SimpleNamespace(depth=1), "badam", {}, "cuda")
    finally:
        gc.enable()
    assert alive == [0, 0, 0]


def test_verify_tells_a_lack_of_memory_however_a_library_says_it(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(verify, "simulate", fail)
    assert verify.measured(SimpleNamespace(depth=1), "badam", {}, "cpu") == ["out of memory", "-"]


def test_all_may_be_named_beside_others_and_what_nothing_can_plan_is_refused(tmp_path, capsys, monkeypatch):
    model = plan_models.folder(tmp_path, "llama", 2)
    rows = json.loads(run("--model", model, "--optimizers", "all,badam", "--format", "json"))["rows"]
    assert [row["method"] for row in rows] == optimizers.available()
    told = refused(capsys, monkeypatch, "--model", model, "--optimizers", "lisa,lisa:lr=1", "--set", "lisa.layers=7")
    assert "layers" in told
