"""The tables: figures worked by hand, nothing mixed that doesn't compare, nothing dropped that ran."""

import csv
import io
import json

import pytest
from reports_factory import MIB, make_failure, make_record

from reports import tables
from reports.setups import group, heading

PARTS = ("weights", "gradients", "optimizer_state", "activations", "temporaries")


def with_peak(mib, **changes):
    """A run with a peak of so many MiB, all of it weights but 4 x 1 MiB."""
    parts = dict(zip([f"{part}_bytes" for part in PARTS], [(mib - 4) * MIB, MIB, MIB, MIB, MIB], strict=True))
    return make_record(memory__peak_allocated_bytes=mib * MIB, memory__at_peak=parts, **changes)


def scored(score, **changes):
    return make_record(metrics={"accuracy": score}, **changes)


def scores(method, task, values):
    return [scored(value, method=method, task=task, seed=seed) for seed, value in enumerate(values)]


def document(records, *only):
    (setup,) = json.loads(tables.render(records, "json", only or tables.TABLES))["setups"]
    return setup


def by_method(rows):
    return {row["method"]: row for row in rows}


def lines(text, title):
    """The table under a title in plain text, as rows of cells."""
    table = text.split(f"{title}")[1].split("\n\n")[0].split("\n")[1:]
    columns = [len(dashes) for dashes in table[1].split("  ")]
    starts = [sum(columns[:i]) + 2 * i for i in range(len(columns))]
    cut = [[line[a : a + n].strip() for a, n in zip(starts, columns, strict=True)] for line in table]
    return cut[:1] + cut[2:]


# Memory


def test_memory_is_of_the_hungriest_run_and_compares_with_the_reference_on_that_task_and_seed():
    runs = [
        with_peak(100, task="superglue/cb"),
        with_peak(200, task="superglue/wic"),
        with_peak(60, method="badam", task="superglue/cb"),
        with_peak(50, method="badam", task="superglue/wic"),
    ]
    rows = by_method(document(runs)["memory"])
    assert (rows["adamw"]["task"], rows["adamw"]["peak_allocated_bytes"]) == ("superglue/wic", 200 * MIB)
    assert (rows["badam"]["task"], rows["badam"]["peak_allocated_bytes"]) == ("superglue/cb", 60 * MIB)
    assert rows["badam"]["peak_ratio"] == 0.6  # 60 / 100 on cb, not 60 / 200
    assert sum(rows["badam"][f"{part}_bytes"] for part in PARTS) == 60 * MIB


def test_a_peak_without_the_hungriest_task_is_said_to_compare_with_no_others():
    cb, wic = "superglue/cb", "superglue/wic"
    runs = [with_peak(100, task=cb), with_peak(200, task=wic), with_peak(60, method="badam", task=cb)]
    failed = make_failure("diverged", "It diverged.", method="badam", task=wic)
    whole = with_peak(150, method="badam", task=wic)
    for table in ("summary", "memory"):
        said = "compare with no others: badam (wic)."
        assert said in " ".join(tables.render([*runs, failed], "plain", [table]).split())
        assert "compare with no others" not in tables.render([*runs, whole], "plain", [table])


def test_printed_parts_add_up_to_the_printed_peak():
    third = MIB // 30  # of a tenth of a MiB: each part alone would round down to .0, their sum is .2
    parts = [third * 1.5, third * 1.25, third, third, third]
    sizes = {f"{part}_bytes": int(size) for part, size in zip(PARTS, parts, strict=True)}
    run = make_record(memory__at_peak=sizes, memory__peak_allocated_bytes=sum(sizes.values()))
    header, row = lines(tables.render([run]), "Memory at the peak, MiB")
    figures = dict(zip(header, row, strict=True))
    assert figures["peak"] == "0.2"
    shown = [figures[name] for name in ("weights", "gradients", "states", "activations", "temporaries")]
    assert shown == ["0.1", "0.1", "0.0", "0.0", "0.0"]


def test_rows_are_the_reference_then_the_others_by_peak_in_every_table():
    runs = [with_peak(mib, method=name) for name, mib in [("z", 30), ("a", 50), ("adamw", 90), ("m", 40)]]
    text = tables.render([*runs, make_failure(method="b")])
    for title in ("Summary", "Memory at the peak, MiB", "Throughput", "Quality, seed 0"):
        assert [row[0] for row in lines(text, title)[1:]] == ["adamw", "z", "m", "a", "b"]


def test_columns_that_say_nothing_are_left_out():
    header = lines(tables.render([with_peak(90), with_peak(30, method="badam")]), "Memory at the peak, MiB")[0]
    assert header == ["method", "peak", "/ adamw", "weights", "gradients", "states", "activations", "temporaries"]
    known = {"memory__peak_reserved_bytes": 96 * MIB, "memory__peak_phase": "update"}
    header = lines(tables.render([with_peak(90, **known)]), "Memory at the peak, MiB")[0]
    assert header[-2:] == ["reserved", "phase"]


def test_without_the_reference_there_are_no_ratios_and_a_remark_says_so():
    text = tables.render([make_record(method="badam"), make_record(method="lisa")])
    assert "/ " not in lines(text, "Summary")[0]
    assert "No run of adamw to compare with: no ratios." in text
    assert document([make_record(method="badam")])["reference"] is None


def test_runs_of_several_versions_are_said_below_the_tables():
    old = {"membench": "0.1", "commit": "f" * 40, "packages": {"torch": "2.9", "peft": "1"}}
    new = {"membench": "0.2", "commit": "e" * 40, "packages": {"torch": "2.10", "peft": "1"}}
    runs = [make_record(method=method, seed=s, environment=old) for s in range(2) for method in ("adamw", "badam")]
    text = " ".join(tables.render([*runs, make_record(method="lisa", environment=new)]).split())
    assert "Runs were made by 2 versions of membench: 0.1 (adamw, badam), 0.2 (lisa)." in text
    assert "Runs were made by 2 commits: ffffffffff (adamw, badam), eeeeeeeeee (lisa)." in text
    assert "Runs used different versions of packages: torch 2.10, torch 2.9." in text
    assert "Runs were made by" not in tables.render(runs)


# Throughput


def timed(tokens_per_second, seconds, **changes):
    return make_record(time__tokens_per_second=tokens_per_second, time__train_seconds=seconds, **changes)


def test_tokens_per_second_are_all_tokens_over_all_seconds():
    runs = [timed(1000.0, 10.0, task="superglue/cb"), timed(4000.0, 40.0, task="superglue/wic")]
    assert document(runs)["throughput"][0]["tokens_per_second"] == 3400.0  # (10,000 + 160,000) / 50


def test_the_ratio_is_the_geometric_mean_over_pairs_of_task_and_seed():
    runs = [
        *(timed(speed, 1.0, seed=seed) for seed, speed in [(0, 1000.0), (1, 100.0), (2, 7.0)]),
        *(timed(speed, 1.0, method="badam", seed=seed) for seed, speed in [(0, 2000.0), (1, 800.0)]),
    ]
    ratio = by_method(document(runs)["throughput"])["badam"]["tokens_per_second_ratio"]
    assert ratio == pytest.approx(4.0)  # sqrt(2 * 8); seed 2 has no pair


def test_speeds_on_different_machines_are_not_compared():
    here, there = {"device": "cpu", "device_name": "this"}, {"device": "cpu", "device_name": "that"}
    runs = [
        timed(1000.0, 1.0, environment=here),
        timed(1000.0, 1.0, environment=here, seed=1),
        timed(9000.0, 1.0, environment=there, method="badam"),
        timed(1500.0, 1.0, environment=here, method="badam", seed=1),
    ]
    assert by_method(document(runs)["throughput"])["badam"]["tokens_per_second_ratio"] == pytest.approx(1.5)
    assert "Runs are from 2 machines (that; this): speeds compare on one only." in tables.render(runs)


def test_speeds_of_runs_that_shared_a_device_are_left_out():
    shared = {"device": "cpu", "jobs": 2}
    runs = [timed(1000.0, 1.0), timed(500.0, 1.0, environment=shared, seed=1)]
    assert document(runs)["throughput"][0]["tokens_per_second"] == 1000.0
    assert "tokens/s:" in tables.render(runs) and "shared a device" in tables.render(runs)
    alone = tables.render(runs[1:])
    assert "Throughput" not in alone and "shared a device" in alone


def test_speeds_of_runs_that_other_processes_have_begun_are_left_out():
    by_two = {"processes": 2, "strategy": "fsdp2", "steps": 4, "tokens": 400, "train_seconds": 1.0}
    begun = timed(500.0, 1.0, made_by=[by_two, {**by_two, "processes": 1}], seed=1)
    runs = [timed(1000.0, 1.0), begun]
    assert document(runs)["throughput"][0]["tokens_per_second"] == 1000.0
    alone = tables.render([begun])
    assert "Throughput" not in alone and "Speeds of runs that went on on other processes" in alone
    assert "shared a device" not in alone


def test_tables_name_the_methods_whose_runs_waited_for_processors():
    def waited(method, seed, seconds, **changes):
        return make_record(method=method, seed=seed, time__train_seconds=10.0, time__waited_seconds=seconds, **changes)

    runs = [waited("adamw", 0, 0.2), waited("adamw", 1, None), waited("badam", 0, 3.5), waited("badam", 1, 0.9)]
    text = " ".join(tables.render(runs).split())
    assert "Slowed by waiting for processors: badam (1 of 2 runs) for up to 35% of its time." in text
    assert "Slowed" not in tables.render([waited("adamw", 0, 1.0)])
    assert "Slowed" not in tables.render([waited("adamw", 0, 9.0, environment__jobs=2)])  # no times are shown


def test_times_are_printed_in_milliseconds():
    runs = [make_record(time__update_seconds=0.0123), make_record(time__update_seconds=0.0143, seed=1)]
    header, row = lines(tables.render(runs), "Throughput")
    assert dict(zip(header, row, strict=True))["update ms"] == "13.3"


# Quality


def test_a_score_is_mean_and_sample_deviation_over_seeds():
    runs = scores("adamw", "superglue/rte", [0.80, 0.82, 0.84])
    (row,) = document(runs)["quality"]
    assert (row["mean"], row["standard_deviation"], row["n"]) == (pytest.approx(0.82), pytest.approx(0.02), 3)
    assert lines(tables.render(runs), "Quality, mean ± std (n) over 3 seeds")[1] == ["adamw", "0.820 ± 0.020 (3)*"]


def test_one_seed_has_no_deviation_and_marks_nothing():
    runs = [scored(0.9), scored(0.2, method="badam")]
    text = tables.render(runs)
    assert "±" not in text
    assert "*" not in text
    assert lines(text, "Quality, seed 0")[1:] == [["adamw", "0.900"], ["badam", "0.200"]]
    assert not any(row["tied_with_best"] for row in document(runs)["quality"])


def test_the_average_is_over_tasks_within_each_seed_then_over_seeds():
    runs = scores("adamw", "superglue/cb", [0.5, 0.7]) + scores("adamw", "superglue/wic", [0.7, 0.9])
    average = document(runs)["quality"][-1]
    assert (average["task"], average["tasks"], average["n"]) == ("average", 2, 2)
    assert average["mean"] == pytest.approx(0.7)  # of .6 and .8
    assert average["standard_deviation"] == pytest.approx(0.1414, abs=1e-4)


def test_a_seed_without_all_tasks_is_left_out_of_the_average():
    runs = scores("adamw", "superglue/cb", [0.5, 0.7]) + scores("adamw", "superglue/wic", [0.7, 0.9])
    lost = make_failure("diverged", "Loss is nan.", task="superglue/cb", seed=2)
    average = document([*runs, lost, scored(0.0, task="superglue/wic", seed=2)])["quality"][-1]
    assert (average["mean"], average["n"]) == (pytest.approx(0.7), 2)


def test_an_average_over_fewer_tasks_is_marked_and_ranks_nowhere():
    runs = [run for task in ("a", "b") for run in scores("adamw", f"x/{task}", [0.5, 0.51])]
    runs += scores("badam", "x/a", [0.9, 0.91])  # the best there is, but b ran out of memory
    runs += [make_failure(method="badam", task="x/b", seed=seed) for seed in (0, 1)]
    text = tables.render(runs)
    rows = {row[0]: row for row in lines(text, "Summary")[1:]}
    assert rows["adamw"][5] == "0.505 ± 0.007 (2)*"
    assert rows["badam"][5] == "0.905 ± 0.007 (2) [1/2]"
    assert rows["badam"][7] == "2 ok, 2 out of memory"
    assert "[a/b] averaged over a of b tasks only: not to be compared with a complete average." in text


def test_a_task_that_was_never_run_counts_as_missing():
    runs = [scored(0.5, task="x/a"), scored(0.5, task="x/b"), scored(0.9, task="x/a", method="badam")]
    row = {row[0]: row for row in lines(tables.render(runs), "Summary")[1:]}["badam"]
    assert row[5] == "0.900 [1/2]"
    assert row[7] == "1 ok, 1 not run"


def test_where_less_is_better_the_least_is_best_and_there_is_no_average_with_the_others():
    loss = {"headline": "perplexity", "higher_is_better": False}
    runs = [
        make_record(method=method, seed=seed, task=f"c4/{task}", metrics={"perplexity": base + seed}, **loss)
        for method, base in [("adamw", 30.0), ("badam", 80.0)]
        for seed in (0, 1)
        for task in ("a", "b")
    ]
    rows = document(runs)["quality"]
    assert [row["task"] for row in rows] == ["c4/a", "c4/a", "c4/b", "c4/b"]
    assert {row["method"] for row in rows if row["tied_with_best"]} == {"adamw"}
    text = tables.render(runs)
    assert "30.50 ± 0.71 (2)*" in text
    assert "perplexity, less is better" in text
    assert "average" not in lines(text, "Summary")[0]


def test_the_score_before_training_is_told_once_for_all_methods():
    values = {"task": "c4", "headline": "perplexity", "higher_is_better": False}
    befores = {"perplexity": 1010.0}, {"perplexity": 1020.0}, None
    runs = [
        make_record(method=method, seed=seed, metrics={"perplexity": 90.0}, **values) | {"initial_metrics": before}
        for method, seed, before in zip(("adamw", "badam", "sgd"), (0, 1, 0), befores, strict=True)
    ]
    assert "Before training: c4 perplexity 1,015.00." in tables.render(runs)
    assert {row["before_training"] for row in document(runs)["quality"]} == {1015.0}
    assert "Before training" not in tables.render(runs[2:])


def test_the_score_before_training_is_that_of_the_model_as_it_was_given_also_where_four_bits_score_better():
    values = {"task": "c4", "headline": "perplexity", "higher_is_better": False, "metrics": {"perplexity": 90.0}}
    befores = {"adamw": 1900.3, "badam": 1900.3, "qlora": 1884.9, "welore": 1950.0}
    runs = [
        make_record(method=name, **values) | {"initial_metrics": {"perplexity": one}} for name, one in befores.items()
    ]
    assert {row["before_training"] for row in document(runs)["quality"]} == {1900.3}


def test_more_tasks_than_methods_go_down_the_page_and_many_methods_stay_within_120_columns():
    tasks = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]

    def suite(methods):
        return [run for m in methods for task in tasks for run in scores(m, f"superglue/{task}", [0.71, 0.72, 0.73])]

    few, many = suite(["adamw", "badam", "blockllm"]), suite(["adamw", *map("method{}".format, range(9))])
    table = lines(tables.render(few), "Quality, mean ± std (n) over 3 seeds")
    assert table[0] == ["task", "metric", "adamw", "badam", "blockllm"]
    assert table[1] == ["boolq", "accuracy", *["0.720 ± 0.010 (3)*"] * 3]
    assert table[-1][0] == "average"
    assert max(map(len, tables.render(few).split("\n"))) <= 110
    table = lines(tables.render(many), "Quality, mean ± std over 3 seeds")
    assert table[0] == ["method", *tasks, "average"]
    assert table[1][1] == ".720±.010*"
    assert max(map(len, tables.render(many).split("\n"))) <= 120


# Runs that went wrong


def test_a_method_without_a_finished_run_has_a_row_that_says_why_in_every_table():
    text = tables.render([make_record(), make_failure(method="lora", error="CUDA out of memory.\nTried 2 GiB.")])
    for title in ("Summary", "Memory at the peak, MiB", "Throughput", "Quality, seed 0"):
        assert "out of memory" in lines(text, title)[2]
    bad = lines(text, "Runs that are not ok")
    assert bad == [
        ["method", "task", "seeds", "ended", "error"],
        ["lora", "rte", "0", "out of memory", "CUDA out of memory."],
    ]


@pytest.mark.parametrize("format", tables.FORMATS)
@pytest.mark.parametrize("status", ["failed", "out_of_memory", "diverged"])
def test_no_format_drops_a_failed_run(format, status):
    text = tables.render([make_record(), make_failure(status, "It broke.", method="lora")], format, ["memory"])
    assert "It broke." in text
    assert "lora" in text


def test_runs_that_ended_alike_share_a_row_and_others_do_not():
    runs = [make_failure("failed", "Same.", task=f"x/{task}", seed=seed) for task in "abc" for seed in (0, 1)]
    runs += [
        make_failure("failed", "Same.", task="x/a", method="z"),
        make_failure("failed", "Other.", task="x/b", method="z"),
    ]
    assert lines(tables.render(runs), "Runs that are not ok")[1:] == [
        ["adamw", "all 3", "0, 1", "failed", "Same."],
        ["z", "a", "0", "failed", "Same."],
        ["z", "b", "0", "failed", "Other."],
    ]


def test_of_a_traceback_the_line_that_says_something_is_shown():
    error = 'Traceback (most recent call last):\n  File "x.py", line 1\nRuntimeError: boom\n'
    (row,) = document([make_failure("failed", error)])["unfinished"]
    assert row["error"] == "RuntimeError: boom"


def test_a_long_error_is_cut_in_a_terminal_only():
    runs = [make_failure("failed", "x" * 300)]
    assert max(map(len, tables.render(runs).split("\n"))) <= 120
    assert "x" * 300 in tables.render(runs, "markdown")


# What may share a table


@pytest.mark.parametrize(
    "change",
    [
        {"model": "config:roberta-base"},
        {"training__data": "/data"},
        {"training__steps": 7},
        {"training__batch_size": 2},
        {"training__sequence_length": 8},
        {"training__dtype": "bfloat16"},
        {"training__autocast": "bfloat16"},
        {"training__gradient_checkpointing": True},
        {"training__weights": "pretrained"},
        {"training__max_grad_norm": 1.0},
        {"training__final_fraction": 0.1},
        {"training__gradient_checkpointing": True, "training__checkpointing_every": 2},
        {"training__loss_chunks": 8},
        {"training__offload_activations": True},
        {"training__options": {"packing": True}},
        {"environment": {"device": "cuda", "threads": 2}},
        {"environment": {"device": "cpu", "threads": 1}},
        {"task": "c4/en"},
    ],
    ids=str,
)
def test_runs_of_different_setups_never_share_a_mean(change):
    setups = group([make_record(), make_record(seed=1, **change)])
    assert [len(setup.rows["adamw"]) for setup in setups] == [1, 1]
    assert heading(setups[0]) != heading(setups[1])


def test_a_heading_tells_the_conditions_and_random_weights():
    text = tables.render([make_record(environment={"device": "cpu", "device_name": "Epyc", "threads": 2})])
    what, how = text.split("\n\n")[0].split("\n", 1)
    assert what == "superglue/rte - config:roberta-tiny, random weights - data: demo"
    assert " ".join(how.split()) == (
        "100 steps of 16 x 64 tokens, float32, linear schedule, warm-up 10%, profile demo, cpu (Epyc), 2 threads"
    )
    assert "pretrained weights" in tables.render([make_record(training__weights="pretrained")])


def test_a_heading_says_that_a_batch_of_preferences_is_of_pairs_of_sequences():
    how = [heading(group([make_record(task=task)])[0])[1] for task in ("instruct", "dpo")]
    assert "of 16 x 64 tokens" in how[0] and "of 16 x 2 x 64 tokens" in how[1]


def test_a_long_path_is_no_heading():
    path = "/home/somebody/" + "deep/" * 20 + "my-model"
    text = tables.render([make_record(model=path, training__data=path)], "markdown").split("\n")[0]
    assert len(text) < 150 and text.count("…") == 2 and "deep/my-model, random weights" in text


def test_tasks_may_differ_in_steps_as_epochs_make_them():
    runs = [
        make_record(task="superglue/cb", training__steps=20),
        make_record(task="superglue/rte", training__steps=300),
    ]
    (setup,) = group(runs)
    assert setup.conditions["steps"] == "20 to 300"
    runs.append(make_record(task="superglue/cb", training__steps=40))
    assert sorted(setup.conditions["steps"] for setup in group(runs)) == [20, 40, 300]


def test_a_run_that_failed_before_it_knew_its_steps_or_machine_stays_with_the_others():
    lost = make_failure(method="badam", training__steps=None, environment={})
    (setup,) = group([lost, make_record()])
    assert list(setup.rows) == ["adamw", "badam"]


def test_values_of_a_hyperparameter_have_rows_of_their_own_and_the_methods_seed_has_not():
    runs = [
        scored(0.5, method="badam", hyperparameters={"lr": 1, "switch_every": k, "seed": seed}, seed=seed)
        for k in (50, 100)
        for seed in (0, 1)
    ]
    (setup,) = group([make_record(), *runs])
    assert {label: sorted(seeds for _, seeds in row) for label, row in setup.rows.items()} == {
        "adamw": [0],
        "badam switch_every=50": [0, 1],
        "badam switch_every=100": [0, 1],
    }


def test_hyperparameters_that_follow_the_task_are_no_variants():
    runs = [make_record(task=f"x/{task}", hyperparameters={"lr": lr}) for task, lr in [("a", 1), ("b", 2)]]
    assert list(group(runs)[0].rows) == ["adamw"]


def test_of_a_run_done_twice_the_newer_counts_and_a_remark_says_so():
    runs = [
        scored(0.9, environment={"created": "2026-01-02T00:00:00Z"}, run_id="b"),
        scored(0.1, environment={"created": "2026-01-01T00:00:00Z"}, run_id="a"),
    ]
    assert document(runs)["quality"][0]["mean"] == 0.9
    assert "Older runs of the same method, task and seed are left out: 1." in tables.render(runs)


# Formats


def test_json_is_one_document_of_raw_figures():
    setup = document([make_record()], "memory")
    assert "summary" not in setup
    assert setup["memory"][0]["peak_allocated_bytes"] == 100 * MIB
    assert setup["conditions"]["weights"] == "random"


def test_json_rows_have_the_same_fields_whatever_became_of_the_runs():
    setup = document([make_record(), make_failure(method="lora")])
    for table in tables.TABLES:
        assert len({tuple(row) for row in setup[table]}) == 1


def test_csv_of_one_table_is_one_table_whatever_is_in_its_cells():
    runs = [make_record(model='a "b", c'), make_record(method="badam", model="config:x")]
    rows = list(csv.DictReader(io.StringIO(tables.render(runs, "csv", ["memory"]))))
    assert [row["model"] for row in rows] == ['a "b", c', "config:x"]
    assert rows[0]["peak_allocated_bytes"] == str(100 * MIB)
    assert rows[0]["table"] == "memory"


def test_csv_is_one_table_that_names_the_table_of_each_row():
    text = tables.render([make_record(), make_failure(method="lora")], "csv", tables.TABLES)
    rows = list(csv.reader(io.StringIO(text)))
    assert {len(row) for row in rows} == {len(rows[0])} and len(set(rows[0])) == len(rows[0])
    assert list(dict.fromkeys(row[0] for row in rows[1:])) == [*tables.TABLES, "unfinished"]


def test_markdown_escapes_what_would_break_a_cell():
    text = tables.render([make_failure("failed", "a|b_c <x>", method="my_pkg:M")], "markdown")
    assert "a\\|b\\_c \\<x\\>" in text
    assert "my\\_pkg:M" in text
    row = next(line for line in text.split("\n") if "a\\|b" in line)
    assert row.replace("\\|", "").count("|") == 6  # five cells


def test_markdown_of_anybodys_names_has_no_links_or_pictures():
    text = tables.render([make_record(method="![a](https://a.b/c.png)", model="&lt;b&gt;")], "markdown")
    assert "!\\[a](https" in text and "![" not in text
    assert "&amp;lt;b&amp;gt;" in text


@pytest.mark.parametrize("format", ["plain", "markdown", "latex", "html"])
def test_a_name_that_was_not_read_from_a_record_ends_no_line_and_controls_no_terminal(format):
    text = tables.render([make_record(model="a\x1b[31m\nb", method="c\r\u202ed")], format)
    assert all(sign.isprintable() or sign == "\n" for sign in text)
    assert len(text.splitlines()) == len(tables.render([make_record(model="a", method="c")], format).splitlines())


def test_latex_shows_a_name_that_a_rows_end_would_take_for_its_own():
    text = tables.render([make_record(method="[1cm]a"), make_record(method="*b")], "latex")
    assert "\n {[}1cm]a " in text and "\n {*}b " in text


def test_latex_escapes_and_is_complete():
    text = tables.render(
        [make_failure("failed", "50% of a_b & {c}", method="m_1"), *scores("adamw", "superglue/rte", [0.1, 0.2])],
        "latex",
    )
    assert "50\\% of a\\_b \\& \\{c\\}" in text
    assert "m\\_1" in text
    assert "0.150 $\\pm$ 0.071 (2)*" in text
    assert text.count("\\begin{table}") == text.count("\\end{table}") == text.count("\\bottomrule") == 5
    assert text.isascii()


@pytest.mark.parametrize("format", tables.FORMATS)
def test_the_same_records_in_any_order_give_the_same_text(format):
    runs = [with_peak(mib, method=m, seed=s) for m, mib in [("adamw", 90), ("badam", 30)] for s in (0, 1, 2)]
    assert tables.render(runs, format) == tables.render(runs[::-1], format)


def test_what_there_is_not_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="There is no format 'markdwn'. Did you mean 'markdown'"):
        tables.render([make_record()], "markdwn")
    with pytest.raises(ValueError, match="There is no table 'speed'. Available: summary, memory"):
        tables.render([make_record()], tables=["speed"])
    with pytest.raises(ValueError, match="no records"):
        tables.render([])


def evaluated(score, **changes):
    entry = {"scores": {"acc": score}, "standard_errors": {}, "fewshot": 5, "limit": 100, "chat_template": False}
    return make_record(**changes) | {"benchmarks": {"mmlu": {**entry, "version": "1", "harness": "0.4.13"}}}


def test_scores_on_benchmarks_have_a_table_of_their_own_over_the_seeds():
    records = [evaluated(score, seed=seed) for seed, score in enumerate((0.2, 0.3))]
    records += [evaluated(0.5, method="lora"), make_record(method="badam")]
    by_row = {row["method"]: row for row in document(records, "summary")["benchmarks"]}
    assert set(by_row) == {"adamw", "lora"} and by_row["lora"]["standard_deviation"] is None
    assert by_row["adamw"]["mean"] == pytest.approx(0.25) and by_row["adamw"]["n"] == 2
    shown = tables.render(records, "plain")
    table = shown[shown.index("Benchmarks after training") :]
    assert "0.250 ± 0.071 (2)" in table and "0.500" in table and "mmlu" in table
    assert "Benchmarks" not in tables.render([make_record()], "plain")


def test_answers_in_a_chat_and_bare_ones_share_no_mean():
    bare, chat = evaluated(0.2), evaluated(0.6, seed=1)
    chat["benchmarks"]["mmlu"]["chat_template"] = True
    made = document([bare, chat], "summary")["benchmarks"]
    assert [(row["mean"], row["n"], row["chat_template"]) for row in made] == [(0.2, 1, False), (0.6, 1, True)]
    shown = tables.render([bare, chat], "plain")
    assert shown.count("as in a chat") == 1 and "as in a chat" not in tables.render([bare], "plain")


def test_runs_with_and_without_a_keyword_that_was_added_later_are_two_rows():
    old = make_record(method="badam", hyperparameters={"lr": 0.1})
    new = make_record(method="badam", hyperparameters={"lr": 0.1, "states": "8bit"})
    (setup,) = group([old, new])
    assert set(setup.rows) == {"badam", "badam states=8bit"}
    assert set(group([old, old | {"seed": 1}])[0].rows) == {"badam"}
