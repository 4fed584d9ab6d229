"""`membench reproduce`: what a table needs, the runs of it, ours beside the paper's, and refusals in one sentence."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from reports_factory import make_failure, make_record

from membench.cli import main
from membench.config.errors import UserError
from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.planning.blueprint import Blueprint
from membench.reproduce import carry_out, comparison, measured, needs, steps
from membench.reproduce.cards import CARDS, smallest
from membench.reproduce.carry_out import Machine
from membench.reproduce.comparison import FIGURES, Result
from membench.reproduce.recipes import RECIPES, find
from membench.runs import processes
from reports import published
from reports.record import load_folder
from reports.table import GIB

PHASE_FIELDS = ("forward_seconds", "backward_seconds", "update_seconds")


@pytest.fixture(scope="module", autouse=True)
def server():
    processes.start_server()


def call(capsys, *arguments):
    """The command in this process: exit code, stdout, stderr."""
    path, argv = list(sys.path), sys.argv
    sys.argv = ["membench", *arguments]
    try:
        with pytest.raises(SystemExit) as exit:
            main()
    finally:
        sys.path[:], sys.argv = path, argv
    return exit.value.code or 0, *capsys.readouterr()


# ---- the recipes


@pytest.mark.parametrize("name", RECIPES)
def test_each_figure_has_its_place_in_a_published_table(name):
    recipe = find(name, "paper")
    labels = {label for part in recipe.parts for label in part.rows.values()}
    assert recipe.targets[0].table == name
    for target in recipe.targets:
        table = published.load(target.table)
        theirs = {row["label"] for row in table["rows"]}
        assert {column.name for column in target.columns} <= set(table["columns"])
        assert {column.figure for column in target.columns} <= set(FIGURES)
        assert {column.part for column in target.columns} <= {part.name for part in recipe.parts}
        assert set(target.labels.values()) <= theirs and set(target.labels) <= labels
        assert target.over is None or target.over in labels
    assert labels <= {row["label"] for row in published.load(name)["rows"]}


def test_a_planned_table_is_made_with_the_settings_of_its_plan():
    (badam,) = [part for part in find("badam-table-2", "paper").parts if "badam" in part.rows]
    shape = {"model": "config:llama3-8b", "batch_size": 2, "sequence_length": 728, "checkpointing": True}
    assert shape.items() <= badam.given.items()
    own = badam.given["hyperparameters"]["badam"]
    assert own["fp32_gradients"] is True  # from the published file
    assert badam.given["steps"] == 32 * own["switch_every"]  # each layer of Llama 3-8B in its turn


def test_the_examples_that_epochs_are_counted_in_are_those_of_the_official_files(shared_data):
    for part in find("badam-table-11", "paper").parts:
        file = shared_data / "superglue" / part.name / "train.jsonl"
        if file.exists():
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            if part.name == "MultiRC":
                lines = [
                    answer for line in lines for asked in line["passage"]["questions"] for answer in asked["answers"]
                ]
            assert part.examples == len(lines), part.name


# ---- what it needs


def planned_as(monkeypatch, total_bytes):
    """Instead of planning, which takes a minute: every run takes as much."""
    row = {"estimated_total_bytes": total_bytes, "maximum": {"weights_bytes": total_bytes}}

    def carry_out(jobs):
        return [SimpleNamespace(plan=SimpleNamespace(row=row), job=job, refused=None) for job in jobs]

    monkeypatch.setattr(needs, "carry_out", carry_out)


@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_names_card_hours_and_downloads_and_runs_nothing(capsys, monkeypatch, tmp_path, name):
    planned_as(monkeypatch, 30 * GIB)
    code, stdout, _ = call(capsys, "reproduce", name, "--dry-run", "--out", str(tmp_path / "out"))
    assert code == 0 and not (tmp_path / "out").exists()
    assert stdout.count("a100-40g") > len(find(name, "paper").parts)  # in each row, and once for all
    assert "of training steps there" in stdout and "Downloads: " in stdout
    assert ("none, the weights are random" in stdout) is (not find(name, "paper").learns)


def test_the_hours_of_galores_smallest_model_follow_from_its_weights_and_tokens(monkeypatch):
    """58.07 million weights, of which the embedding of 32,000 x 512 is only looked up; 10,000 steps of 512 x 256."""
    planned_as(monkeypatch, GIB)
    recipe = find("galore-table-2", "paper")
    recipe = replace(recipe, parts=recipe.parts[:1])
    (full, *_) = needs.planned(recipe, needs.of(recipe, {}))
    layer = 4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512
    weights = 8 * layer + 512 + 32_000 * 512
    assert full.flops == 6 * weights * 10_000 * 512 * 256


def test_a_row_needs_the_smallest_card_that_holds_it():
    assert [smallest(size * GIB) for size in (1, 23, 24, 70, 100)] == [CARDS[0], CARDS[0], CARDS[1], CARDS[3], CARDS[4]]
    assert smallest(1000 * GIB) is None


@pytest.mark.slow
def test_badams_rows_fit_the_papers_card_and_adam_does_not(capsys):
    _, stdout, _ = call(capsys, "reproduce", "badam-table-2", "--dry-run")
    rows = {line[:14].strip(): line for line in stdout.splitlines()}
    for label in ("LOMO", "LoRA, rank 8", "BAdam"):
        assert "rtx3090" in rows[label]
    assert "h200" in rows["Adam"]


# ---- what this machine can't do


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["badam-table-3"], "there is no reproduction 'badam-table-3'. Did you mean 'badam-table-2'? Available: "),
        (["badam-table-2", "--device", "cpu"], "badam-table-2 needs a GPU, and --device cpu is none: --dry-run"),
        (["badam-table-2", "--scale", "big"], "--scale must be one of paper, tiny, not 'big'"),
        (
            ["badam-table-2", "--jobs", "2"],
            "--jobs 2: a table's times are measured, so its runs are made one at a time",
        ),
    ],
)
def test_what_can_not_work_is_refused_in_a_sentence(capsys, tmp_path, arguments, message):
    code, stdout, stderr = call(capsys, "reproduce", *arguments, "--out", str(tmp_path / "out"))
    assert code == 2 and stdout == ""
    assert message in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_card_that_holds_no_row_is_refused_with_what_is_needed(monkeypatch):
    planned_as(monkeypatch, 20 * GIB)
    recipe = find("lomo-table-1", "paper")
    wanted = needs.planned(recipe, needs.of(recipe, {}))
    with pytest.raises(UserError, match=r"20.00 GiB, and cuda:0 has 16.00 GiB \(4.00 GiB missing\): --dry-run"):
        carry_out.results("lomo-table-1", recipe, wanted, Machine("cuda:0", 16 * GIB))


def test_a_hub_out_of_reach_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = find("badam-table-11", "paper")
    wanted = needs.of(recipe, {"out": str(tmp_path / "out"), "threads": 1, "quiet": True, "device": "cpu"})
    with pytest.raises(UserError, match="super_glue.*from the hub.*--scale tiny tries it on a CPU, without downloads"):
        carry_out.results("badam-table-11", recipe, wanted, Machine("cpu", None))


# ---- ours beside the paper's


def result(label, record, part="", recipe="badam-table-2", plan=None):
    wanted = [one for one in needs.of(find(recipe, "paper"), {}) if (one.label, one.part.name) == (label, part)]
    return Result(replace(wanted[0], plan=plan), record)


def test_sizes_are_compared_in_percent_and_times_as_ratios_to_one_row():
    sizes = {"memory__maximum": {**make_record()["memory"]["maximum"], "weights_bytes": 17_710_000_000}}
    total = 24_675_000_000
    badam = make_record(memory__peak_reserved_bytes=total - CUDA_CONTEXT_BYTES, time__backward_seconds=0.6, **sizes)
    lora = make_record(time__backward_seconds=1.2)
    recipe = find("badam-table-2", "paper")
    plan = {"estimated_total_bytes": total, "maximum": badam["memory"]["maximum"]}
    rows = comparison.figures(recipe, [result("LoRA, rank 8", lora), result("BAdam", badam, plan=plan)])
    found = {(row["label"], row["column"]): row for row in rows}
    assert found["BAdam", "parameters"]["difference"] == pytest.approx(17.71 / 16.1 - 1)
    assert found["BAdam", "total"]["difference"] == pytest.approx(24.675 / 23.5 - 1)  # with the process's context
    assert found["BAdam", "total"]["planned"] == pytest.approx(24.675)
    backward = found["BAdam", "8B backward, h"]
    assert (backward["ours"], backward["published"]) == pytest.approx((0.5, 1.74 / 3.20))
    assert ("LoRA, rank 8", "8B backward, h") not in found  # its ratio to itself says nothing


def test_no_ratio_is_taken_between_runs_of_different_cards():
    """A folder begun on a small card, and ended on one that holds all rows."""
    small, large = ({**make_record()["environment"], "device_name": name} for name in ("RTX 3090", "H200"))
    recipe = find("badam-table-2", "paper")
    results = [
        result("LoRA, rank 8", make_record(environment=small, time__backward_seconds=1.2)),
        result("BAdam", make_record(environment=small, time__backward_seconds=0.6)),
        result("LOMO", make_record(environment=large, time__backward_seconds=0.3)),
    ]
    found = {(row["label"], row["column"]): row["ours"] for row in comparison.figures(recipe, results)}
    assert found["BAdam", "8B backward, h"] == pytest.approx(0.5)
    assert found["LOMO", "8B backward, h"] is None and found["LOMO", "parameters"] is not None
    assert "several devices: no ratio between them" in comparison.render("badam-table-2", recipe, results, [])
    assert "several devices" not in comparison.render("badam-table-2", recipe, results[:2], [])


def test_tokens_a_second_are_those_of_a_median_step():
    """256 tokens in 10 + 20 + 20 ms, as a ratio to AdamW's in 10 + 10 + 5; whatever the first steps took."""
    times = {"AdamW": (0.010, 0.010, 0.005), "8-bit GaLore": (0.010, 0.020, 0.020)}
    history = [{**make_record()["history"][0], "step": 10, "tokens": 2560}]
    results = [
        result(
            label,
            make_record(
                history=history,
                training__steps=10,
                time={**make_record()["time"], **dict(zip(PHASE_FIELDS, seconds, strict=True))},
            ),
            recipe="galore-table-11",
        )
        for label, seconds in times.items()
    ]
    rows = comparison.figures(find("galore-table-11", "paper"), results)
    (speed,) = [row for row in rows if row["column"] == "tokens/s"]
    assert (speed["ours"], speed["published"]) == pytest.approx((0.5, 1109 / 1257))


def test_scores_are_compared_in_points():
    record = make_record(metrics={"accuracy": 0.88}, headline="accuracy")
    (row,) = comparison.figures(find("badam-table-11", "paper"), [result("BAdam", record, "BoolQ", "badam-table-11")])
    assert (row["published"], row["ours"]) == (0.85, 0.88)
    assert row["difference"] == pytest.approx(3.0) and row["points"]


def test_a_run_that_does_not_fit_or_failed_has_no_figure_and_says_why():
    recipe = find("badam-table-2", "paper")
    plan = {"estimated_total_bytes": 147_400_000_000, "maximum": make_record()["memory"]["maximum"]}
    results = [result("Adam", None, plan=plan), result("LOMO", make_failure(error="Out of memory.", method="lomo"))]
    assert all(row["ours"] is row["difference"] is None for row in comparison.figures(recipe, results))
    text = comparison.render("badam-table-2", recipe, results, [])
    assert "Adam: not run, it needs 147.4 GB by plan" in text and "LOMO: out of memory: Out of memory." in text


# ---- the runs


QUICK = ("lomo-table-1",)  # the others take longer


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_at_scale_tiny_a_table_is_made_on_a_cpu_by_the_same_code(capsys, tmp_path, name):
    arguments = ["reproduce", name, "--scale", "tiny", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    code, stdout, _ = call(capsys, *arguments, "--quiet")
    assert code == 0
    recipe = find(name, "tiny")
    records = load_folder(tmp_path / f"{name}-tiny")
    assert len(records) == sum(len(part.rows) for part in recipe.parts)
    assert {record["status"] for record in records} == {"ok"}
    assert f"({name}) and ours" in stdout and "no figure of ours can be compared" in stdout
    for part in recipe.parts:
        assert all(f"\n{label}" in stdout for label in part.rows.values())
    if name == "lomo-table-1":  # what is there isn't made again
        _, again, _ = call(capsys, *arguments)
        assert "6 of 6 runs are already in" in again
        assert again.partition("Published")[2] == stdout.partition("Published")[2]


def test_steps_count_the_weights_of_the_model_and_every_token():
    recipe = find("lomo-table-1", "tiny")
    lomo = next(one for one in needs.of(recipe, {"device": "cpu", "threads": 1}) if one.method == "lomo")
    (run,) = steps.prepare([lomo.settings], lambda kind, value: None)
    seen = steps.measure(run, None, 0, None, lambda kind, value: None)
    weights = sum(p.numel() for p in Blueprint(steps.workload_of(lomo.settings)).skeleton.parameters())
    assert seen["parameters"] == seen["trainable_parameters"] == weights
    assert seen["history"][-1]["tokens"] == 2 * (2 * 16 - 1)  # a mask of ones alone would be dropped
    assert seen["memory"]["maximum"]["optimizer_state_bytes"] == 0  # LOMO keeps nothing
    (planned,) = needs.planned(recipe, [lomo])
    assert planned.plan["maximum"] == seen["memory"]["maximum"]  # the meter's, on tensors without values
    assert planned.plan["peak_allocated_bytes"] == seen["memory"]["peak_allocated_bytes"]


def test_the_time_of_all_runs_is_estimated_from_a_few_steps_of_each_model(tmp_path):
    recipe = find("badam-table-11", "tiny")
    wanted = needs.of(recipe, {"device": "cpu", "threads": 1, "quiet": True, "out": str(tmp_path)})
    said = measured.time_said(recipe, [replace(need, settings=replace(need.settings, steps=10**6)) for need in wanted])
    with pytest.MonkeyPatch.context() as patch:  # another card's steps are its own
        patch.setattr(measured.steps, "make", lambda settings: places.extend(one.out for one in settings) or [stopped])
        places, stopped = [], {"status": "failed", "error": "not made"}
        measured.time_said(recipe, wanted, "NVIDIA H200/2")
    assert places == [str(tmp_path / "steps" / "NVIDIA-H200-2")]
    (record,) = load_folder(tmp_path / "steps")
    seconds = sum(record["time"][name] for name in PHASE_FIELDS)
    assert record["training"]["steps"] == 8 and record["method"] == "adamw"
    assert f"about {needs.duration(3 * 10**6 * seconds / 3600)} of training steps for all of it" in said


def test_the_command_and_the_list_name_every_table(capsys):
    _, help, _ = call(capsys, "reproduce", "--help")
    _, listed, _ = call(capsys, "list", "reproductions")
    assert all(name in help for name in RECIPES)
    assert [line.split()[0] for line in listed.splitlines()] == list(RECIPES)
    assert {name for name in published.names() if published.load(name).get("reproduced")} == set(RECIPES)  # the docs
