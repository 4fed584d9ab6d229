"""The page in a real browser: nothing overflows, nothing complains, labels can be read. Skipped without Chromium."""

import math

import browser
import pytest
from reports_factory import MIB, make_failure, make_record

from reports import page, rows
from reports.setups import group

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs a Chromium on the path")

METHODS = ("adamw", "badam", "blockllm", "lisa", "galore", "lora", "lomo", "adalomo", "hft", "sgd")
LONG = "package.of.somebody:" + "AVeryLongName" * 6

MEASURE = """(() => {
  const wide = [...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + ' ' + e.textContent.slice(0, 60));
  const svgs = [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width);
  const letters = svgs.flatMap(svg => { const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(t => ({text: t.textContent, box: t.getBoundingClientRect(),
      size: parseFloat(getComputedStyle(t).fontSize) * box.width / svg.viewBox.baseVal.width}));
    return texts.map(t => ({text: t.text, size: t.size,
      outside: t.box.left < box.left - 2 || t.box.right > box.right + 2
        || t.box.top < box.top - 2 || t.box.bottom > box.bottom + 2,
      covered: texts.filter(o => o !== t && o.box.left < t.box.right - 2 && t.box.left < o.box.right - 2
        && o.box.top < t.box.bottom - 4 && t.box.top < o.box.bottom - 4).map(o => o.text)})) });
  return {page: document.documentElement.scrollWidth, window: innerWidth, wide, letters,
    ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    fills: [...document.querySelectorAll('svg text')].filter(t => t.getAttribute('style').match(/--(ink|muted)/))
      .map(t => getComputedStyle(t).fill),
    titles: document.querySelectorAll('svg title').length}
})()"""


def _score(step):
    return {"accuracy": 0.5 + step / 200} if step % 20 == 0 else None


def run(number, method, task, seed):
    """Methods that differ in everything."""
    sizes = [(20, 20, 40, 15, 5)[part] * MIB // (1 + number * (part == 2)) for part in range(5)]
    parts = dict(zip(("weights", "gradients", "optimizer_state", "activations", "temporaries"), sizes, strict=True))
    names = ("step", "tokens", "seconds", "loss", "learning_rate", "metrics")
    points = [(i, 9 * i, i * (1 + number / 9), math.exp(-i / 40) + 0.1 * number, 1e-3, _score(i)) for i in range(1, 61)]
    return make_record(
        method=method,
        task=f"superglue/{task}",
        seed=seed,
        metrics={"accuracy": 0.8 - 0.03 * (number % 4) + 0.01 * seed},
        trained_fraction=1 - number / 12,
        block_coverage=number / 10 or None,
        hyperparameters={"lr": 10.0**-number, "always_train": ["layer"] * 40},
        history=[dict(zip(names, point, strict=True)) for point in points],
        memory__peak_allocated_bytes=sum(sizes),
        memory__at_peak={f"{part}_bytes": size for part, size in parts.items()},
    )


def records():
    tasks, seeds = ("boolq", "cb", "record"), (0, 1, 2)
    good = [run(k, m, t, s) for k, m in enumerate((*METHODS, LONG)) for t in tasks for s in seeds]
    bad = [make_failure(method="big", task=f"superglue/{t}", error="CUDA out of memory. " * 20) for t in tasks]
    return [*good, *bad, make_record(training__batch_size=32, training__data="x" * 90)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.render(records(), ["runs/broken-" + "x" * 90 + ".json: malformed JSON."]))
    return path


# what a page may be shown in, from narrow to wide; where one is missing, the system's stands for it
FONTS = ("Liberation Sans", "Noto Sans", "DejaVu Sans", "DejaVu Sans Mono")
IN_FONT = """(font => { const style = document.createElement('style'); document.head.append(style);
  style.textContent = `html body, html body *, html body svg text { font-family: "${font}" !important }` })"""


@pytest.mark.parametrize(
    ("width", "scheme", "font"),
    [(1400, "light", None), (390, "dark", None)] + [(width, "light", font) for width in (1400, 390) for font in FONTS],
)
def test_the_page_fits_its_window_and_its_labels_can_be_read(tab, report, width, scheme, font):
    tab.open(report, width, scheme)
    tab.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    if font:
        tab.ask(f"{IN_FONT}({font!r})")
    seen = tab.ask(MEASURE)
    assert seen["page"] == seen["window"] == width
    assert seen["wide"] == []
    assert [letters for letters in seen["letters"] if letters["outside"]] == []
    assert [letters for letters in seen["letters"] if letters["covered"]] == []
    assert min(letters["size"] for letters in seen["letters"]) >= 8
    assert seen["titles"] > 100
    assert tab.trouble == []
    assert {url for url in tab.requests if not url.startswith("data:")} <= {"about:blank", report.resolve().as_uri()}


def brightness(colour):
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(",")))


def test_dark_is_dark_in_the_plots_too_and_light_is_light(tab, report):
    for scheme, sign in (("light", 1), ("dark", -1)):
        tab.open(report, 1400, scheme)
        seen = tab.ask(MEASURE)
        assert sign * brightness(seen["ground"]) > sign * brightness(seen["ink"])
        assert all(sign * brightness(fill) < sign * brightness(seen["ground"]) for fill in seen["fills"])


def test_it_prints_with_what_is_folded_on_a_screen(tab, report, tmp_path):
    tab.open(report, 1400, "dark")
    tab("Emulation.setEmulatedMedia", media="print")
    assert brightness(tab.ask("getComputedStyle(document.body).color")) < 200  # ink, though the screen is dark
    assert tab.ask("document.querySelector('details svg').getBoundingClientRect().height") > 50
    tab("Emulation.setEmulatedMedia", media="")
    tab.print(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


CELLS = "[...document.querySelectorAll('#setup-1 table')[0].tBodies[0].rows].map(r => r.cells[%d].textContent.trim())"
CHANGE = "(e => { %s; e.dispatchEvent(new Event('change')) })(document.querySelectorAll('#setup-1 .explore %s')[%d])"
DOTS = (
    "[...document.querySelectorAll('#setup-1 .explore svg')[%d].querySelectorAll('circle')].map(c => ({...c.dataset}))"
)


def test_tables_sort_by_a_click_on_a_header(tab, report):
    tab.open(report, 1400, "light")
    assert tab.ask(CELLS % 0)[0] == "adamw"
    for wanted in (sorted, lambda peaks: sorted(peaks, reverse=True)):
        tab.ask("document.querySelectorAll('#setup-1 table')[0].tHead.rows[0].cells[1].firstChild.click()")
        peaks = [float(cell.split()[0]) for cell in tab.ask(CELLS % 1) if cell[0].isdigit()]
        assert peaks == wanted(peaks) and len(set(peaks)) > 3
    assert tab.trouble == []


def test_large_numbers_sort_by_their_size_and_names_by_their_letters(tab, tmp_path):
    scores = {"adamw": 5.0, "sgd": 1.23e10, "adamw8bit": 40.0, "lomo": 2e9, "mezo": 1.2e-5}
    shared = {"headline": "perplexity", "higher_is_better": False}
    made = [make_record(method=name, metrics={"perplexity": score}, **shared) for name, score in scores.items()]
    path = tmp_path / "report.html"
    path.write_text(page.render(made))
    tab.open(path, 1400, "light")
    click = "(t => [...t.tHead.rows[0].cells].find(c => c.textContent === %r).firstChild.click())"
    for head, wanted in (("rte perplexity", sorted(scores, key=scores.__getitem__)), ("method", sorted(scores))):
        tab.ask(f"{click % head}(document.querySelector('#setup-1 table'))")
        assert tab.ask(CELLS % 0) == wanted


def test_a_reader_chooses_both_axes_logs_and_methods(tab, report):
    tab.open(report, 1400, "light")
    (setup, *_) = group(records())
    held = {row["method"]: row for row in rows.summary(setup) if row["runs_ok"]}
    assert {d["name"]: float(d["x"]) for d in tab.ask(DOTS % 0)} == {
        name: pytest.approx(row["peak_allocated_bytes"] / MIB) for name, row in held.items()
    }
    tab.ask(CHANGE % ("e.value = 'weights trained, %'", "select", 0))
    assert {d["name"]: float(d["x"]) for d in tab.ask(DOTS % 0)} == {
        name: pytest.approx(100 * row["trained_fraction"]) for name, row in held.items()
    }
    place = "document.querySelectorAll('#setup-1 .explore circle')[5].getAttribute('cx')"
    before = tab.ask(place)
    tab.ask(CHANGE % ("e.checked = true", "[type=checkbox]", len(setup.rows)))  # after the methods: log across
    assert tab.ask(place) != before
    tab.ask(CHANGE % ("e.checked = false", "[type=checkbox]", 1))
    gone = list(setup.rows)[1]
    assert gone not in {d["name"] for number in (0, 1) for d in tab.ask(DOTS % number)}
    assert tab.ask("[...document.querySelectorAll('#setup-1 svg .row-1')].every(e => e.style.visibility === 'hidden')")
    hidden = (
        "[...document.querySelectorAll('#setup-1 tbody tr')].filter(r => r.hidden).map(r => r.cells[0].textContent)"
    )
    assert set(map(str.strip, tab.ask(hidden))) == {gone}
    tab.ask(CHANGE % ("e.value = 'score'", "select", 3))
    tab.ask(CHANGE % ("e.value = 'tokens'", "select", 4))
    assert {float(d["x"]) for d in tab.ask(DOTS % 1)} == {180, 360, 540} and tab.trouble == []


def test_a_method_hidden_in_one_section_is_shown_in_the_others(tab, report):
    tab.open(report, 1400, "light")
    tab.ask(CHANGE % ("e.checked = false", "[type=checkbox]", 0))
    names = "[...document.querySelectorAll('#setup-%d .explore circle')].map(c => c.dataset.name)"
    assert "adamw" not in tab.ask(names % 1) and "adamw" in tab.ask(names % 2)


def test_untrusted_names_run_nothing(tab, tmp_path):
    path = tmp_path / "report.html"
    name = '"><script>document.title="run"</script><svg onload=document.title="run">'
    path.write_text(page.render([make_record(task=name, model=name, method=name)]))
    tab.open(path, 1400, "light")
    assert tab.ask("document.title") != "run"
    assert tab.ask("document.querySelectorAll('script').length") == 1  # the page's own
    assert tab.ask("document.querySelectorAll('[onload]').length") == 0
    assert name in tab.ask("document.querySelector('.explore circle').dataset.name")
    assert tab.trouble == []
