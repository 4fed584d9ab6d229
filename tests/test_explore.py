"""The page to explore plans: it shows what a plan says, at any size; it works by keyboard and keeps a choice."""

import json
import os
import random
import re
import tempfile
import time
from base64 import b64encode
from dataclasses import replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import browser
import numpy as np
import plan_models
import pytest

import optimizers
from membench.commands.explore import ExploreOptions, write
from membench.config.errors import UserError
from membench.memory.allocator import CUDA_CONTEXT_BYTES, has_room, reserved_bytes
from membench.memory.trace import Trace
from membench.planning.align import aligned
from membench.planning.blueprint import Blueprint
from membench.planning.cards import smallest
from membench.planning.explore import explore
from membench.planning.extrapolate import NotAlikeError
from membench.planning.method import plan_method
from membench.planning.planner import method_values
from membench.planning.spread import Point, Spread
from membench.planning.summits import _above
from membench.planning.table import Setting, peak_parts, plan_setting
from membench.planning.traces import Traces, Unpacked
from membench.planning.workload import Workload
from reports.page import fit
from reports.parts import shown as shown_parts
from tasks.models.source import CONFIGURATIONS

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent / "docs" / "fit.html"
METHODS = ("adamw", "badam", "galore", "lora")
needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs a Chromium on the path")


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """Of a tiny model of so many layers that a few shallower ones tell of it."""
    model = plan_models.folder(tmp_path_factory.mktemp("models"), "large-vocabulary", 6)
    return explore([Setting(model, "float32", False)], METHODS, {})


@pytest.fixture(scope="module")
def page(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("page") / "fit.html"
    path.write_text(fit.render(document))
    return path


def planned(setting, name, batch, sequence):
    """What a plan says of a row of the page."""
    return plan_once(setting["model"], setting["dtype"], setting["checkpointing"], name, batch, sequence).row


@cache
def plan_once(model, dtype, checkpointing, name, batch, sequence):
    workload = Workload(model, batch_size=batch, sequence_length=sequence, dtype=dtype, checkpointing=checkpointing)
    blueprint = Blueprint(workload)
    method, *options = name.split()
    given = {option.partition("=")[0]: option.endswith("true") for option in options}
    return plan_method(blueprint, method, {**method_values(blueprint, method, {}), **given})


def settled(tab):
    """Wait until all is computed."""
    while tab.ask("document.getElementById('table').getAttribute('aria-busy')") != "false":
        time.sleep(0.02)


def shown(tab, name):
    """The total, peak and parts that the page shows of a method, in bytes, and the smallest card."""
    settled(tab)
    row = f"document.querySelector('#table tr[data-method={json.dumps(name)}]')"
    sizes = tab.ask(f"[...{row}.querySelectorAll('[data-bytes]')].map(cell => +cell.dataset.bytes)")
    return sizes[0], sizes[1], sizes[2:], tab.ask(f"[...{row}.cells].at(-1).textContent")


def cell(tab, name, head):
    """The text under a head of the table."""
    settled(tab)
    place = f"[...document.querySelector('#table thead tr').cells].findIndex(one => one.textContent === {head!r})"
    return tab.ask(f"document.querySelector('#table tr[data-method={json.dumps(name)}]').cells[{place}].textContent")


CHOOSE = """(values => { for (const [id, value] of Object.entries(values)) {
  const control = document.getElementById(id);
  control.type === 'checkbox' ? control.checked = value : control.value = value;
  control.dispatchEvent(new Event('change', {bubbles: true})) } })"""


def choose(tab, **values):
    tab.ask(f"{CHOOSE}({json.dumps(values)})")


def holds(tab, setting, name, batch, sequence):
    """Does the page show what a plan says?"""
    row = planned(setting, name, batch, sequence)
    total = row["estimated_total_bytes"]
    assert shown(tab, name) == (
        total,
        row["peak_allocated_bytes"],
        [part.of(row["at_peak"]) for part in shown_parts([row["at_peak"]])],
        smallest(total, setting["dtype"]) or "none",
    )


@needs_chromium
def test_what_the_page_shows_at_twenty_sizes_is_what_a_plan_says_to_the_byte(tab, page, document):
    (setting,), draw = document["settings"], random.Random(3)
    tab.open(page, 1400, "light")
    sizes = [(1, 512), (16, 512), *((draw.randint(1, 64), draw.randint(16, 512)) for _ in range(16)), (1, 77), (1, 391)]
    for batch, sequence in sizes:
        choose(tab, batch=batch, sequence=sequence)
        holds(tab, setting, draw.choice(METHODS), batch, sequence)
    assert "to the byte" in tab.ask("document.getElementById('sure').textContent")
    assert tab.trouble == []


@needs_chromium
def test_the_largest_batch_fits_and_one_more_does_not(tab, page, document):
    (setting,) = document["settings"]
    budget = planned(setting, "adamw", 13, 203)["estimated_total_bytes"]
    tab.open(page, 1400, "light")
    tab.ask("document.querySelectorAll('#choice fieldset [type=checkbox]').forEach(box => box.checked = false)")
    choose(tab, sequence=203, own=budget / 2**30)
    key = setting["model"], setting["dtype"], setting["checkpointing"]
    own = f"{budget / 2**30} GiB"
    for name in METHODS:
        largest = cell(tab, name, f"largest batch on {own}")
        if largest == "64 or more":
            assert plan_once(*key, name, 64, 203).fits_in(budget)
            continue
        assert name != "adamw" or int(largest) >= 13
        assert largest == "0" or plan_once(*key, name, int(largest), 203).fits_in(budget)
        assert not plan_once(*key, name, int(largest) + 1, 203).fits_in(budget)


@needs_chromium
def test_a_card_fits_tightly_where_a_plan_says_so(tab, page, document):
    """Between the peak and the total; the page asks the allocator, as a plan does."""
    (setting,) = document["settings"]
    tab.open(page, 1400, "light")
    tab.ask("document.querySelectorAll('#choice fieldset [type=checkbox]').forEach(box => box.checked = false)")
    said = set()
    for batch, sequence in ((3, 203), (13, 391)):
        made = plan_once(setting["model"], "float32", False, "galore", batch, sequence)
        least = made.row["peak_allocated_bytes"] + CUDA_CONTEXT_BYTES
        for share in (0.02, 0.4, 0.98):
            budget = round(least + share * (made.total_bytes - least))
            choose(tab, batch=batch, sequence=sequence, own=budget / 2**30)
            text = cell(tab, "galore", f"{budget / 2**30} GiB")
            assert text == "yes, tightly" if made.fits_in(budget) else text.startswith("no, ")
            said.add(text[:3])
    assert said == {"yes", "no,"}


@needs_chromium
def test_a_browser_that_cannot_unpack_shows_the_peak_and_no_total(tab, page, document):
    (setting,) = document["settings"]
    lacking = tab("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")["identifier"]
    tab.open(page, 1400, "light")
    choose(tab, batch=7, sequence=213)
    row = planned(setting, "badam", 7, 213)
    assert "lacks DecompressionStream" in tab.ask("document.getElementById('sure').textContent")
    assert shown(tab, "badam")[0] == row["peak_allocated_bytes"]  # the first that is known
    assert cell(tab, "badam", "total").startswith("more than ") and cell(tab, "badam", "smallest card") == ""
    tab("Page.removeScriptToEvaluateOnNewDocument", identifier=lacking)


def random_trace(draw, kinds):
    """Of 300 allocations in waves, in whose ebbs most are freed; the kind of each."""
    found, left, of_kind = Trace(), [], []
    for number in range(300):
        of_kind.append(draw.randrange(kinds))
        left.append(found.allocate(0, 3, "forward", ""))
        while left and draw.random() < (0.8 if number % 40 > 25 else 0.2):
            found.free(left.pop(draw.randrange(len(left))))
    return found, of_kind


@needs_chromium
def test_the_pages_allocator_is_the_plans(tab, page):
    draw = random.Random(5)
    tab.open(page, 1400, "light")
    tight = 0
    for _ in range(60):
        made, of_kind = random_trace(draw, 12)
        sizes = [round(2 ** draw.uniform(0, draw.choice((18, 27, 37)))) for _ in range(12)]
        given, events = [sizes[kind] for kind in of_kind], list(made.events)
        expected = reserved_bytes(events, given)
        room = round(expected * draw.uniform(0.6, 1))
        trace, passes = json.dumps({"events": events, "kinds": of_kind}), has_room(events, given, room)
        assert tab.ask(f"serve({trace}, {sizes})") == expected
        assert (tab.ask(f"serve({trace}, {sizes}, {room})") is not None) == passes
        tight += passes and room < expected
    assert tight  # segments were given back


def test_packed_traces_are_those_that_were_added():
    draw, traces, added = random.Random(8), Traces(), []
    for again in range(6):
        made, of_kind = random_trace(draw, 9)
        sizes = [[draw.randrange(1 << 16) for _ in range(6)] for _ in range(9)]

        def spread(batches, terms, *, made, of_kind, dropped=(), sizes=sizes):
            points = [(b, s) for b in batches for s in (10, 20, 31)]
            values = [
                sum(c * x for c, x in zip(given, terms(b, s), strict=False)) for given in sizes for b, s in points
            ]
            by_kind = [tuple(values[i : i + len(points)]) for i in range(0, len(values), len(points))]
            return Spread(batches, (10, 20, 31), made, [by_kind[kind] for kind in of_kind], set(dropped))

        several = spread((2, 3), lambda b, s: (1, s, s * s, b, b * s, b * s * s), made=made, of_kind=of_kind)
        if again == 4:  # a batch of one has a plan of its own
            made, of_kind = random_trace(draw, 9)
        single = spread((1,), lambda b, s: (s, 1, s * s), made=made, of_kind=of_kind, dropped=[3, 5, 250][: 3 * again])
        added.append((single, several, traces.add(single, several)))
    unpacked = Unpacked(traces.packed())
    for single, several, places in added:
        for point in (Point(1, 17), Point(1, 23), Point(5, 44), Point(64, 9)):
            of = single if point.batch == 1 else several
            events = [event for event in of.trace.events if max(event, ~event) not in of.dropped]
            assert unpacked.reserved_bytes(places, point) == reserved_bytes(events, of.at(point))


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_the_page_fits_its_window_and_needs_no_network(tab, page, width, scheme):
    tab.requests.clear()
    tab.open(page, width, scheme)
    choose(tab, own=0.6)
    wide = """[...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + e.className)"""
    assert tab.ask("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    assert tab.ask(wide) == []
    assert {url for url in tab.requests if not url.startswith("data:")} == {page.resolve().as_uri()}
    assert tab.trouble == []


@needs_chromium
def test_a_link_keeps_the_choice_and_the_keyboard_makes_it(tab, page, document):
    tab.open(page, 1400, "light")
    tab.ask("document.getElementById('batch').select()")
    tab("Input.insertText", text="5")
    tab("Input.dispatchKeyEvent", type="rawKeyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert tab.ask("document.activeElement.id") == "sequence"
    tab.ask("document.activeElement.select()")
    tab("Input.insertText", text="3e2")
    tab("Input.dispatchKeyEvent", type="rawKeyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
    tab("Input.dispatchKeyEvent", type="keyDown", key=" ", code="Space", windowsVirtualKeyCode=32, text=" ")
    tab("Input.dispatchKeyEvent", type="keyUp", key=" ", code="Space", windowsVirtualKeyCode=32)
    said, link = tab.ask("[document.getElementById('said').textContent, document.getElementById('link').href]")
    assert "5 x 300 tokens" in said
    tab.open(page, 390, "dark")
    tab.ask(f"location.hash = {json.dumps('#' + link.partition('#')[2])}")
    tab.ask("new Promise(done => setTimeout(done, 50))")
    assert tab.ask("document.getElementById('said').textContent") == said
    tab.ask("location.hash = '#model=llama9-1t&batch=5&sequence=300&dtype=bfloat16'")
    tab.ask("new Promise(done => setTimeout(done, 50))")
    said = tab.ask("document.getElementById('said').textContent")
    assert said.startswith("llama9-1t isn't on this page: another model is shown. ") and "5 x 300 tokens" in said
    model, beyond = document["models"][0], document["largest_batch"] + 1
    tab.ask(f"location.hash = '#model={model['name']}&batch={beyond}&sequence=300&dtype=float8'")
    tab.ask("new Promise(done => setTimeout(done, 50))")
    said = tab.ask("document.getElementById('said').textContent")
    shown = document["settings"][0]["dtype"]
    assert f"doesn't have dtype float8: {shown} is shown" in said
    assert f"doesn't have batch {beyond}: {beyond - 1} is shown" in said and "sequence 300:" not in said


@needs_chromium
def test_what_does_not_fit_says_why_and_what_helps(tab, page, document):
    (setting,) = document["settings"]
    totals = [planned(setting, "badam", batch, 512)["estimated_total_bytes"] for batch in (1, 16)]
    tab.open(page, 1400, "light")
    between = sum(totals) / 2 / 2**30
    tab.ask("document.querySelectorAll('#choice fieldset [type=checkbox]').forEach(box => box.checked = false)")
    choose(tab, batch=16, sequence=512, own=between)
    row = cell(tab, "badam", f"{between} GiB"), cell(tab, "badam", f"why not on {between} GiB")
    sizes = planned(setting, "badam", 16, 512)["at_peak"]
    largest = max(shown_parts([sizes]), key=lambda part: part.of(sizes))
    assert row[0].startswith("no, ") and row[1].startswith(f"{largest.word} take most")
    helps = int(re.search(r"fits with batch (\d+)$", row[1])[1])
    plans = [plan_once(setting["model"], "float32", False, "badam", batch, 512) for batch in (helps, 2 * helps)]
    assert [one.fits_in(round(between * 2**30)) for one in plans] == [True, False]


def test_without_a_script_the_page_shows_its_first_choice(page, document):
    (setting,) = document["settings"]
    row = planned(setting, "badam", 1, 512)
    sizes = [
        row["estimated_total_bytes"],
        row["peak_allocated_bytes"],
        *(part.of(row["at_peak"]) for part in shown_parts([row["at_peak"]])),
    ]
    cells = re.search(r"<bdi>badam</bdi></th>(.*)</tr>", page.read_text())[1]
    assert [f"{size / 2**20:,.2f}" for size in sizes] == re.findall(r"<td>([^<]*)</td>", cells)


def trace(*events):
    """One of letters that are allocated, and freed where they come again; their size is their place in the alphabet."""
    made, found = {}, Trace()
    for letter in "".join(events):
        if letter in made:
            found.free(made.pop(letter))
        else:
            made[letter] = found.allocate(ord(letter), 3, "forward", "")
    return found


def test_traces_are_aligned_where_one_lacks_some_allocations_and_by_nothing_else():
    assert aligned(trace("abcbac"), trace("abcbac")) == [0, 1, 2]
    assert aligned(trace("abcbac"), trace("acac")) == [0, None, 1]  # not b for c, which lives longer
    assert aligned(trace("abcacb"), trace("abba")) == [None, 0, 1]
    for other in ("aabb", "abcabc", "abcdabcd"):
        with pytest.raises(NotAlikeError):
            aligned(trace("abcbac"), trace(other))


def test_a_moment_that_is_the_peak_at_a_few_lengths_alone_is_found(tmp_path):
    """Of this model's moments one is the peak from 33 to 40 tokens, between two others."""
    setting = Setting(plan_models.folder(tmp_path, "mistral", 5), "float32", False)
    (row,) = plan_setting(setting, ["adamw"], {})["rows"]
    for tokens in (35, 38):
        made = plan_once(setting.model, "float32", False, "adamw", 1, tokens).row
        assert sum(peak_parts(row, Point(1, tokens))) == made["peak_allocated_bytes"]


def test_no_size_is_left_where_another_curve_is_above_those_that_are_known():
    """Held to all sizes, one after another."""
    draw = np.random.default_rng(4)
    first, last = Point(2, 16), Point(9, 90)
    b, s = (grid.ravel() for grid in np.meshgrid(np.arange(2, 10), np.arange(16, 91), indexing="ij"))
    terms = np.stack([b**0, s, s * s, b, b * s, b * s * s])
    counts = set()
    for _ in range(40):
        curves = draw.integers(0, [10**6, 10**4, 150, 10**5, 2000, 20], (60, 6))
        known = curves[:1]
        while point := _above(curves.astype(float), known.astype(float), first, last):
            there = terms[:, (b == point.batch) & (s == point.sequence)]
            best = int((curves @ there).argmax())
            assert (curves[best] @ there).item() > (known @ there).max()
            known = np.concatenate([known, curves[best : best + 1]])
        assert ((known @ terms).max(0) == (curves @ terms).max(0)).all()
        counts.add(len(known))
    assert max(counts) > 3


def test_mistakes_are_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is a folder: give the page's name"):
        write(ExploreOptions(out=str(tmp_path)))
    with pytest.raises(UserError, match="lr must be a finite number of at least 0"):  # of all, so that nothing is there
        of_none = ExploreOptions(("roberta-tiny",), ("sgd",), hyperparameters={"*": {"lr": -1.0}})
        write(replace(of_none, out=str(tmp_path / "fit.html")))
    with pytest.raises(UserError, match=r"llama3-8b"):
        write(ExploreOptions(models=("llama3-8x",), out=str(tmp_path / "fit.html")))
    with pytest.raises(UserError, match="badam"):
        write(ExploreOptions(models=("llama-tiny",), optimizers=("badom",), out=str(tmp_path / "fit.html")))
    assert not list(tmp_path.iterdir())


def test_a_file_that_can_not_be_read_is_named_and_not_the_page(tmp_path, monkeypatch):
    def gone(*_, **__):
        raise FileNotFoundError(2, "No such file or directory", "model/config.json")

    monkeypatch.setattr("membench.planning.explore.explore", gone)
    with pytest.raises(OSError, match="model/config.json"):
        write(ExploreOptions(models=("roberta-tiny",), out=str(tmp_path / "fit.html")))


def test_a_page_that_finds_no_room_is_kept_elsewhere(tmp_path, document, monkeypatch):
    elsewhere, sync, settings = tmp_path / "elsewhere", os.fsync, ExploreOptions(("roberta-tiny",), ("sgd",))
    elsewhere.mkdir()

    def full(file):
        if not list(elsewhere.iterdir()):
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("membench.planning.explore.explore", lambda *_, **__: document)
    with pytest.raises(UserError, match=rf"^--out .*No space left.*; make room.*; the page is kept in {elsewhere}"):
        write(replace(settings, out=str(tmp_path / "fit.html")))
    (kept,) = elsewhere.glob("*/fit.html")
    assert kept.read_text() == fit.render(document) and not (tmp_path / "fit.html").exists()


def test_a_place_that_takes_no_page_is_told_before_anything_is_planned(tmp_path, monkeypatch):
    monkeypatch.setattr("membench.planning.explore.explore", lambda *_, **__: pytest.fail("it has begun to plan"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file is a file, not a folder"):
        write(ExploreOptions(("roberta-tiny",), ("sgd",), out=str(tmp_path / "file" / "fit.html")))


# ---- the page in the repository


@pytest.fixture(scope="module")
def shipped():
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', SHIPPED.read_text(encoding="utf-8"))
    return json.loads(found[1])


def test_the_shipped_page_is_small_and_not_stale(shipped):
    assert SHIPPED.stat().st_size < 3_000_000
    assert {model["name"] for model in shipped["models"]} <= set(CONFIGURATIONS)
    setting = next(one for one in shipped["settings"] if one["model"] == shipped["models"][0]["planned_as"])
    named = {row["method"].split()[0] for row in setting["rows"]} | set(setting["refused"])
    assert named == set(optimizers.available())  # else: make explore
    if any(version(name) != shipped["versions"][name] for name in ("torch", "transformers", "peft")):
        pytest.skip("the page was made with other versions")
    row = next(row for row in setting["rows"] if row["method"] == "adamw")
    needed = planned(setting, "adamw", 1, setting["first"])
    assert row["reserved"] == needed["peak_reserved_bytes"]
    choice = fit.Choice(shipped["models"][0], setting, 1, setting["first"], shipped["cards"][0])
    assert fit.need(shipped, choice, row).peak == needed["peak_allocated_bytes"]


def test_the_shipped_pages_script_is_the_one_that_its_policy_lets_run():
    html = SHIPPED.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in html
    assert (HERE.parent / "reports" / "page" / "fit.js").read_text(encoding="utf-8").strip() in script


@needs_chromium
@pytest.mark.slow
def test_forty_choices_of_the_shipped_page_are_what_a_plan_says_to_the_byte(tab, shipped):
    draw = random.Random(13)
    tab.open(SHIPPED, 1400, "light")
    for number in range(20 + 20):
        model = draw.choice(shipped["models"])
        setting = draw.choice([one for one in shipped["settings"] if one["model"] == model["planned_as"]])
        batch = draw.choice(shipped["batches"])
        sequence = draw.choice([one for one in setting["sequences"] if one <= model["longest"]])
        if number >= 20:  # what it doesn't offer
            batch = draw.choice((1, draw.randint(2, 64)))
            sequence = round(16 * (model["longest"] / 16) ** draw.random())
        name = draw.choice(setting["rows"])["method"]
        choose(tab, model=model["name"], dtype=setting["dtype"])
        choose(tab, checkpointing=setting["checkpointing"], batch=batch, sequence=sequence)
        holds(tab, {**setting, "model": model["name"]}, name, batch, sequence)
        print(f"{model['name']}, {name}, {batch} x {sequence}: equal")
    assert tab.trouble == []
