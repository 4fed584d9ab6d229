"""The page to explore plans: what it shows is what a plan says, anywhere; it works by keyboard and keeps a choice."""

import json
import random
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

import browser
import plan_models
import pytest

import optimizers
from membench.commands.explore import ExploreOptions, write
from membench.config.errors import UserError
from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.memory.trace import Trace
from membench.planning.align import aligned
from membench.planning.blueprint import Blueprint
from membench.planning.explore import explore
from membench.planning.extrapolate import NotAlikeError
from membench.planning.method import plan_method
from membench.planning.planner import method_values
from membench.planning.surplus import around
from membench.planning.table import Setting
from membench.planning.workload import Workload
from reports.page import fit
from reports.parts import shown as shown_parts
from tasks.models.source import CONFIGURATIONS

SHIPPED = Path(__file__).resolve().parent.parent / "docs" / "fit.html"
needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs a Chromium on the path")


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """Of a tiny model of so many layers that a few shallower ones tell of it."""
    model = plan_models.folder(tmp_path_factory.mktemp("models"), "large-vocabulary", 6)
    return explore([Setting(model, "float32", False)], ("badam",), {})


@pytest.fixture(scope="module")
def page(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("page") / "fit.html"
    path.write_text(fit.render(document))
    return path


def planned(setting, name, batch, sequence):
    """What a plan says of a row of the page."""
    return plan_once(setting["model"], setting["dtype"], setting["checkpointing"], name, batch, sequence)


@cache
def plan_once(model, dtype, checkpointing, name, batch, sequence):
    workload = Workload(model, batch_size=batch, sequence_length=sequence, dtype=dtype, checkpointing=checkpointing)
    blueprint = Blueprint(workload)
    method, *options = name.split()
    given = {option.partition("=")[0]: option.endswith("true") for option in options}
    return plan_method(blueprint, method, {**method_values(blueprint, method, {}), **given}).row


def shown(tab, name):
    """The total, peak and parts that the page shows of a method, in bytes, and how sure it is of the total."""
    row = f"document.querySelector('#table tr[data-method={json.dumps(name)}]')"
    sizes = tab.ask(f"[...{row}.querySelectorAll('[data-bytes]')].map(cell => +cell.dataset.bytes)")
    return sizes[0], sizes[1], sizes[2:], tab.ask(f"{row}.dataset.sure")


CHOOSE = """(values => { for (const [id, value] of Object.entries(values)) {
  const control = document.getElementById(id);
  control.type === 'checkbox' ? control.checked = value : control.value = value;
  control.dispatchEvent(new Event('change', {bubbles: true})) } })"""


def choose(tab, **values):
    tab.ask(f"{CHOOSE}({json.dumps(values)})")


def holds(tab, setting, name, batch, sequence):
    """Does the page show what a plan says? The share by which its total differs."""
    total, peak, parts, sure = shown(tab, name)
    row = planned(setting, name, batch, sequence)
    assert (peak, parts) == (
        row["peak_allocated_bytes"],
        [part.of(row["at_peak"]) for part in shown_parts([row["at_peak"]])],
    )
    difference = abs(total - row["estimated_total_bytes"]) / row["estimated_total_bytes"]
    assert sure != "planned" or difference == 0
    return difference


@needs_chromium
def test_what_the_page_shows_is_what_a_plan_says_to_the_byte(tab, page, document):
    (setting,) = document["settings"]
    tab.open(page, 1400, "light")
    for batch, sequence, sure in ((1, 512, "planned"), (16, 512, "planned"), (7, 213, "about")):
        choose(tab, batch=batch, sequence=sequence)
        holds(tab, setting, "badam", batch, sequence)
        assert shown(tab, "badam")[3] == sure
    assert tab.trouble == []


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
def test_a_link_keeps_the_choice_and_the_keyboard_makes_it(tab, page):
    tab.open(page, 1400, "light")
    tab.ask("document.getElementById('batch').select()")
    tab("Input.insertText", text="5")
    tab("Input.dispatchKeyEvent", type="rawKeyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert tab.ask("document.activeElement.id") == "sequence"
    tab.ask("document.activeElement.select()")
    tab("Input.insertText", text="300")
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


@needs_chromium
def test_what_does_not_fit_says_why_and_what_helps(tab, page, document):
    (setting,) = document["settings"]
    totals = [planned(setting, "badam", batch, 512)["estimated_total_bytes"] for batch in (1, 16)]
    tab.open(page, 1400, "light")
    between = sum(totals) / 2 / 2**30
    tab.ask("document.querySelectorAll('#choice fieldset [type=checkbox]').forEach(box => box.checked = false)")
    choose(tab, batch=16, sequence=512, own=between)
    row = tab.ask(
        "[...document.querySelector('#table tr[data-method=badam]').cells].slice(1, 3).map(c => c.textContent)"
    )
    sizes = planned(setting, "badam", 16, 512)["at_peak"]
    largest = max(shown_parts([sizes]), key=lambda part: part.of(sizes))
    assert row[0].startswith("no, ") and row[1].startswith(f"{largest.word} take most")
    choose(tab, batch=int(re.search(r"fits with batch (\d+)$", row[1])[1]))
    assert shown(tab, "badam")[0] <= between * 2**30 and shown(tab, "badam")[3] == "planned"


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


def test_a_size_lies_between_the_planned_ones_around_it_by_its_logarithm():
    assert around((1, 2, 4), 2) == [(2, 1.0)] and around((1, 2, 4), 9) == [(4, 1.0)]
    (low, of_low), (high, of_high) = around((1, 2, 8), 4)
    assert (low, high) == (2, 8) and of_low == pytest.approx(1 / 2) and of_low + of_high == 1


def test_mistakes_are_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is a folder: give the page's name"):
        write(ExploreOptions(out=str(tmp_path)))
    with pytest.raises(UserError, match=r"llama3-8b"):
        write(ExploreOptions(models=("llama3-8x",), out=str(tmp_path / "fit.html")))
    with pytest.raises(UserError, match="badam"):
        write(ExploreOptions(models=("llama-tiny",), optimizers=("badom",), out=str(tmp_path / "fit.html")))
    assert not list(tmp_path.iterdir())


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
    sequence = setting["sequences"][0]
    needed = planned(setting, "adamw", 1, sequence)
    assert needed["estimated_total_bytes"] == needed["peak_allocated_bytes"] + row["surplus"][0][0] + CUDA_CONTEXT_BYTES
    choice = fit.Choice(shipped["models"][0], setting, 1, sequence, shipped["cards"][0])
    assert fit.need(shipped, choice, row).peak == needed["peak_allocated_bytes"]


@needs_chromium
@pytest.mark.slow
def test_twenty_choices_that_the_shipped_page_offers_are_what_a_plan_says_to_the_byte(tab, shipped):
    draw = random.Random(13)
    tab.open(SHIPPED, 1400, "light")
    for number in range(20 + 5):
        model = draw.choice(shipped["models"])
        setting = draw.choice([one for one in shipped["settings"] if one["model"] == model["planned_as"]])
        batch = draw.choice(shipped["batches"])
        sequence = draw.choice([one for one in setting["sequences"] if one <= model["longest"]])
        if number >= 20:  # what it doesn't offer
            batch, sequence = draw.randint(1, 40), draw.randint(16, model["longest"])
        name = draw.choice(setting["rows"])["method"]
        choose(tab, model=model["name"], dtype=setting["dtype"])
        choose(tab, checkpointing=setting["checkpointing"], batch=batch, sequence=sequence)
        difference, sure = holds(tab, {**setting, "model": model["name"]}, name, batch, sequence), shown(tab, name)[3]
        print(
            f"{model['name']}, {name}, {batch} x {sequence}: peak and parts equal, total {sure}, {difference:.2%} off"
        )
        assert sure in ("about", "least") or number < 20  # "least": beyond all cards; `holds` checks planned totals
    assert tab.trouble == []
