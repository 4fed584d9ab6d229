"""The session on a GPU, rehearsed on a CPU: what it needs, that no part ends it, and what its numbers are made of."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import optimizers
from benchmarks.on_gpu import command, methods, page, plans, promises
from benchmarks.on_gpu.card import Card
from benchmarks.on_gpu.journal import Broken, Journal, Part
from benchmarks.on_gpu.workloads import GIB, PROGRAMS, TINY
from membench.planning import budget
from membench.planning.planner import plan

ROOT = Path(__file__).resolve().parent.parent
CPU = Card("cpu")
# What the environment of a GPU need not have; None in sys.modules makes an import fail as if it weren't installed.
ABSENT = ("datasets", "evaluate", "rich", "typer", "sklearn", "scipy", "tabulate", "matplotlib", "jinja2", "peft")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The JSON of the script itself, run with torch, transformers and what belongs to them alone."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    options = ["--device", "cpu", "--model", "tiny", "--methods", "adamw,badam", "--steps", "2", "--workers", "1"]
    arguments = ["gpu.py", "--out", str(out), *options, "--only", "methods,meter,largest,race,again"]
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.argv = {arguments!r}
runpy.run_path({str(ROOT / "benchmarks" / "gpu.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=out.parent, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_it_runs_with_torch_and_transformers_alone(rehearsal):
    absent = {name for name, part in rehearsal["parts"].items() if part["status"] != "ok"}
    assert absent <= {"race/badam"}  # whose peer may not be installed
    assert {"conditions", "methods/badam/adamw", "methods/galore/badam", "meter/adamw", "race/adamw"} <= set(
        rehearsal["parts"]
    )


def test_a_methods_part_has_its_plan_and_its_times_block_by_block(rehearsal):
    part = rehearsal["parts"]["methods/badam/badam"]
    row = plan(PROGRAMS["tiny"].workloads["badam"], ["badam"], {})["rows"][0]
    assert part["planned"]["peak_allocated_bytes"] == row["peak_allocated_bytes"]
    assert [visit["selection"] for visit in part["visits"]] == [f"model.layers.{n}" for n in range(4)]
    assert part["update_seconds"] > 0.0
    mean = sum(visit["backward_seconds"] for visit in part["visits"]) / 4
    assert part["backward_seconds"] == pytest.approx(mean)


def test_the_meter_sees_what_was_planned(rehearsal):
    for method in ("adamw", "badam"):
        planned = rehearsal["parts"][f"methods/galore/{method}"]["planned"]["peak_allocated_bytes"]
        assert rehearsal["parts"][f"meter/{method}"]["metered_bytes"] == planned


@pytest.mark.slow
def test_the_largest_batch_is_the_one_that_plan_budget_says(rehearsal, monkeypatch):
    (asked,) = PROGRAMS["tiny"].budgets
    monkeypatch.setattr(budget, "_largest_model", lambda *_: None)  # it takes long, and isn't asked for
    workload = PROGRAMS["tiny"].workloads[asked.workload]
    rows = plan(workload, [asked.method], {}, budget_bytes=asked.total_bytes)["rows"]
    assert rehearsal["parts"]["largest/galore/badam/1 GiB"]["planned_batch"] == rows[0]["limits"]["batch"]


# ---- the journal


def journal(tmp_path, minutes=1.0, resume=False):
    return Journal(tmp_path / "gpu.json", minutes, resume)


def saved(tmp_path):
    return json.loads((tmp_path / "gpu.json").read_text())["parts"]


def raises(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
    ],
)
def test_a_part_that_fails_leaves_its_traceback_and_the_next_one_is_done(tmp_path, error, status):
    ours = journal(tmp_path)
    ours.do(Part("one", raises(error)))
    ours.do(Part("two", lambda: {"value": 1}))
    assert saved(tmp_path)["one"]["status"] == status
    assert str(error) in saved(tmp_path)["one"]["error"]
    assert "raise error" in saved(tmp_path)["one"]["traceback"]
    assert (saved(tmp_path)["two"]["status"], saved(tmp_path)["two"]["value"]) == ("ok", 1)


def test_a_part_for_which_the_time_does_not_suffice_is_left_out_with_the_reason(tmp_path):
    ours = journal(tmp_path, minutes=0.5)
    ours.do(Part("long", raises(AssertionError("begun")), expected_seconds=31.0))
    assert saved(tmp_path)["long"]["status"] == "skipped"
    assert "it takes about 31 s" in saved(tmp_path)["long"]["reason"]


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    ours = journal(tmp_path)
    ours.do(Part("slow", lambda: time.sleep(60) or {}, limit_seconds=0.05))
    assert saved(tmp_path)["slow"]["status"] == "out_of_time"


@pytest.mark.parametrize(
    ("sign", "status"),
    [("CUDA error: device-side assert triggered", "failed"), ("CUDA out of memory.", "out_of_memory")],
)
def test_what_the_card_fails_is_no_broken_promise(tmp_path, monkeypatch, sign, status):
    def fails(subject):
        raise RuntimeError(sign)

    monkeypatch.setattr(promises.contract, "CHECKS", [fails])
    with contextlib.suppress(Broken):
        journal(tmp_path).do(Part("promises/adamw", lambda: promises.check(CPU, "adamw")))
    assert saved(tmp_path)["promises/adamw"]["status"] == status


def test_the_end_of_the_time_is_no_broken_promise(tmp_path, monkeypatch):
    monkeypatch.setattr(promises.contract, "CHECKS", [lambda subject: time.sleep(60)])
    part = Part("promises/adamw", lambda: promises.check(CPU, "adamw"), limit_seconds=0.05)
    assert journal(tmp_path).do(part)["status"] == "out_of_time"


def test_the_file_is_complete_while_a_part_runs(tmp_path):
    ours = journal(tmp_path)
    ours.do(Part("one", lambda: {"seen": saved(tmp_path)["one"]["status"]}))
    assert saved(tmp_path)["one"]["seen"] == "running"


def test_another_process_goes_on_where_one_was_spoilt_or_died(tmp_path):
    first = journal(tmp_path)
    first.do(Part("done", lambda: {"value": 1}))
    with pytest.raises(Broken):
        first.do(Part("spoils", raises(RuntimeError("CUDA error: an illegal memory access was encountered"))))
    first.parts["dies"] = {"status": "running"}
    first.save()
    second = journal(tmp_path, resume=True)
    for name in ("done", "spoils", "dies"):
        second.do(Part(name, raises(AssertionError("done again"))))
    second.do(Part("next", dict))
    statuses = {name: part["status"] for name, part in saved(tmp_path).items()}
    assert statuses == {"done": "ok", "spoils": "failed", "dies": "failed", "next": "ok"}
    assert second.seconds_left < 60.0  # counted from the first process's start


# ---- what is visited and planned


def visited(method, **values):
    model = methods.Bench(CPU, TINY, method, values)
    return list(methods.turns(model.optimizer, CPU)), model.optimizer


def test_every_block_of_a_short_cycle_is_visited_and_an_even_part_of_a_long_one(monkeypatch):
    assert len(visited("badam")[0]) == 4
    monkeypatch.setattr(methods, "MOST_VISITS", 2)
    turns, optimizer = visited("badam")
    assert len(turns) == 2
    assert optimizer.selection == "model.layers.3"  # first and last


def test_a_method_without_a_choice_is_visited_once_and_one_that_renews_twice():
    assert visited("adamw")[0] == [{"worst": False, "switch_seconds": None}]
    once, again = visited("galore")[0]
    assert once["switch_seconds"] is None
    assert again["switch_seconds"] > 0.0


def test_a_switch_takes_until_the_card_has_done_its_work():
    """A card that takes 50 ms for whatever was started on it since it was waited for."""

    class Slow(Card):
        started = False

        def wait(self):
            time.sleep(0.05 * self.started)
            self.started = False

    card, bench = Slow("cpu"), methods.Bench(CPU, TINY, "badam", {})
    advance = bench.optimizer.advance

    def start():
        advance()
        card.started = True

    bench.optimizer.advance = start
    _, switched, *_ = methods.turns(bench.optimizer, card)
    assert 0.05 <= switched["switch_seconds"] < 0.5


def test_the_worst_case_counts_for_memory_and_not_for_the_time_of_a_cycle():
    def seen(worst, peak, seconds):
        times = {f"{phase}_seconds": seconds for phase in ("forward", "backward", "update")}
        names = ("requested", "allocated", "reserved")
        return {"worst": worst, **{f"peak_{name}_bytes": peak for name in names}, **times}

    both = methods.summary([seen(True, 100, 9.0), seen(False, 70, 1.0), seen(False, 60, 2.0)], 8)
    assert (both["peak_requested_bytes"], both["backward_seconds"]) == (100, 1.5)
    assert methods.summary([seen(True, 100, 9.0)], 8)["backward_seconds"] == 9.0


def test_what_does_not_fit_is_planned_with_less(monkeypatch):
    sizes = {(): 18, ("master_weights",): 8, ("master_weights", "in_backward"): 6}

    def planned(workload, methods, given):
        row = dict.fromkeys(("peak_allocated_bytes", "peak_reserved_bytes", "peak_phase", "peak_selection"))
        size = sizes[tuple(given[methods[0]])]
        return {"rows": [{**row, "at_peak": {}, "trained_weights": 1, "estimated_total_bytes": size}]}

    monkeypatch.setattr(plans, "plan", planned)
    for card, fits in ((18, [True]), (10, [False, True]), (5, [False, False, False])):
        assert [row["fits"] for row in plans.fitting(TINY, "adamw", card)] == fits
    assert plans.fitting(TINY, "adamw", 10)[-1]["given"] == {"master_weights": False}
    assert plans.variants("lomo") == [{}]  # it has neither


def test_every_method_is_measured_on_every_workload(tmp_path):
    options = command.parse(["--out", str(tmp_path / "gpu.json"), "--device", "cpu", "--model", "tiny"])
    session = command.Session.__new__(command.Session)
    session.options, session.program = options, PROGRAMS["full"]
    pairs = list(session._methods())
    assert len(pairs) == len(set(pairs)) == 2 * len(optimizers.available())
    assert pairs[0] == ("badam", "adamw")


def session_of(monkeypatch, path, total_gib, *more, begin=lambda *_: None):
    """A session on a card of that size, without processes that plan."""
    monkeypatch.setattr(command.plans, "Plans", lambda workers: SimpleNamespace(begin=begin))
    line = ["--out", str(path), "--card-gib", str(total_gib), *more]
    options = command.parse(line)
    return command.Session(options, Journal(options.out, options.minutes, options.resume))


def test_the_reference_that_is_measured_again_has_its_plan_even_alone(tmp_path, monkeypatch):
    begun = []
    session = session_of(
        monkeypatch, tmp_path / "gpu.json", 80, "--only", "again", begin=lambda name, *_: begun.append(name)
    )
    assert [part.name for part in session.parts()] == ["conditions", "again/badam/adamw"]
    assert "methods/badam/adamw" in begun and "methods/badam/badam" not in begun


def row_of(gib, fits):
    return {"estimated_total_bytes": int(gib * GIB), "fits": fits}


def test_plans_made_before_are_taken_if_today_they_would_be_the_same(tmp_path, monkeypatch, capsys):
    """On a smaller card a plan doesn't fit any more, on a larger one an earlier one does."""
    made, path = session_of(monkeypatch, tmp_path / "made.json", 40).journal, tmp_path / "plans.json"
    kept = {"methods/badam/lora": [row_of(20, True)], "largest/badam/badam/24 GiB": 3}
    of_the_card = {
        "methods/badam/adamw": [row_of(70, False), row_of(30, True)],
        "methods/badam/hft": [row_of(50, False), row_of(39, True)],
        "largest/galore/adamw/the card": 74,
    }
    path.write_text(json.dumps({**made.document, "plans": kept | of_the_card}))
    for gib, taken in ((40, kept | of_the_card), (24, kept), (80, kept)):
        session = session_of(monkeypatch, tmp_path / f"{gib}.json", gib, "--plans", str(path))
        assert session.journal.document["plans"] == taken
    assert "is of another card: 3 of 5 are planned again" in capsys.readouterr().err
    for change, why in (
        ({"planned_with": {"torch": "2", "transformers": "5"}}, "was made with torch 2, this is "),
        ({"workloads": {}}, "is of other models: all is planned again"),
    ):
        path.write_text(json.dumps({**made.document, "plans": kept, **change}))
        session = session_of(monkeypatch, tmp_path / "again.json", 40, "--plans", str(path))
        assert session.journal.document["plans"] == {} and why in capsys.readouterr().err


def test_what_another_card_measured_is_not_resumed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu.json"
    session_of(monkeypatch, path, 80).journal.save()
    assert session_of(monkeypatch, path, 80, "--resume").total_bytes == 80 * GIB
    with pytest.raises(ValueError, match=r"of another card or of other models: give another --out"):
        session_of(monkeypatch, path, 24, "--resume")
    assert command.main(["--out", str(path), "--card-gib", "24", "--resume"]) == 2
    monkeypatch.setattr(command.card, "nvidia_smi", dict)
    options = command.parse(["--out", str(path), "--resume"])
    assert command.Session(options, Journal(path, 9.0, resume=True)).total_bytes == 80 * GIB
    assert "--resume" in capsys.readouterr().err


def test_no_larger_card_is_tried_on_a_smaller_one(tmp_path, monkeypatch):
    """An RTX 4090 has less than 24 GiB: a batch for these may not run on it, through no fault of the plan."""
    session = session_of(monkeypatch, tmp_path / "gpu.json", 23.6)
    parts = {part.name: part for part in session.parts() if part.name.startswith("largest/")}
    assert parts["largest/badam/badam/24 GiB"].work() == {"status": "skipped", "reason": "this card has less"}
    planned = [name for name, *_ in session._plans() if name.startswith("largest/")]
    assert planned == ["largest/galore/galore/16 GiB", "largest/galore/adamw/the card"]


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--methods", "adam"], ["--model", "huge"]])
def test_what_the_command_does_not_know_ends_it(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.parse(["--out", "gpu.json", *arguments])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


# ---- the page


def on_gpu(rehearsal):
    """The rehearsal's document with sizes as a GPU gives them: 10 % above the plan, and a workspace."""
    document = json.loads(json.dumps(rehearsal))
    for name, part in document["parts"].items():
        if name.startswith("methods/"):
            planned = part["planned"]
            part |= {
                "workspace_bytes": 1000,
                "peak_requested_bytes": round(planned["peak_allocated_bytes"] / 0.9) + 1000,
            }
            part |= {"peak_allocated_bytes": 7 << 30, "peak_reserved_bytes": 2 * planned["peak_reserved_bytes"]}
    document["parts"]["methods/galore/badam"] |= {
        "planned": None,
        "too_large": [{"given": {}, "fits": False, "estimated_total_bytes": 123 << 30}],
    }
    document["parts"]["race/galore"] = {"status": "failed", "error": "RuntimeError: no | such thing"}
    document["parts"]["promises/adamw"] = {"status": "ok", "checks": 16, "broken": {"the_loss_falls": "it rises"}}
    return document


def row(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_puts_plans_beside_what_was_measured(rehearsal):
    document = on_gpu(rehearsal)
    text = page.render({"h100": document})
    memory, times = text.split("### Time of a step, ms")[:2]
    cells = row(memory, "adamw")
    assert cells[4] == "-10.0%" and cells[5] == "7.00" and cells[8] == "-50.0%"
    part = document["parts"]["methods/badam/adamw"]
    step = part["forward_seconds"] + part["backward_seconds"] + part["update_seconds"]
    cells = row(times.split("###")[0], "adamw")
    assert float(cells[4]) == pytest.approx(1000 * step, abs=0.06)
    assert cells[5:] == ["1.00", f"{32 / step:,.0f}"]
    assert "123.00 at least: not tried" in text


def test_the_page_says_what_failed_and_which_promise_is_broken(rehearsal):
    text = page.render({"h100": on_gpu(rehearsal)})
    assert "race/galore" in text and "no \\| such thing" in text
    assert "the\\_loss\\_falls" in text and "it rises" in text


def test_the_page_is_not_stale():
    made = page.render(page.documents(page.RESULTS))
    assert page.PAGE.read_text(encoding="utf-8") == made, "make it again: python -m benchmarks.on_gpu.page"


def test_the_manual_tells_the_errors_of_plans_that_the_session_has():
    """Of allocated bytes of each workload, and of reserved ones of all plans that were made again."""
    session = page.documents(page.RESULTS)["h100"]
    again, requested, reserved = session["replanned"]["plans"], {}, []
    for name, part in session["parts"].items():
        kind, _, row = name.partition("/")
        if kind == "methods" and part["status"] == "ok" and part["planned"]:
            planned, workspace = part["planned"] | again.get(row, {}), part["workspace_bytes"] or 0
            error = planned["peak_allocated_bytes"] / (part["peak_requested_bytes"] - workspace) - 1
            requested.setdefault(row.split("/")[0], []).append(abs(100 * error))
            if row in again:
                reserved.append(
                    abs(100 * (planned["peak_reserved_bytes"] / (part["peak_reserved_bytes"] - workspace) - 1))
                )
    large, small = (f"{max(requested[workload]):.1f}".lstrip("0") for workload in ("badam", "galore"))
    close = sum(error <= 0.1 for error in reserved)
    text = " ".join((ROOT / "docs" / "measuring.md").read_text(encoding="utf-8").split())
    assert f"differ by at most {large} % for Llama 3-8B, and by at most {small} % for a 1B model" in text
    assert f"Of {len(reserved)} plans of methods on an H100, {close} are within .1 % of what was reserved" in text
    assert f"the others within {max(reserved):.1f} %" in text


def test_before_any_session_the_page_says_that_none_was_made():
    assert "No session on a GPU has been recorded yet" in page.render({})
