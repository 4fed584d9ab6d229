"""The page in a real browser: nothing overflows, nothing complains, labels can be read. Skipped without Chromium."""

import math

import browser
import pytest
from reports_factory import MIB, make_failure, make_record

from reports import page

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


def run(number, method, task, seed):
    """Methods that differ in everything."""
    sizes = [(20, 20, 40, 15, 5)[part] * MIB // (1 + number * (part == 2)) for part in range(5)]
    parts = dict(zip(("weights", "gradients", "optimizer_state", "activations", "temporaries"), sizes, strict=True))
    names = ("step", "tokens", "seconds", "loss", "learning_rate", "metrics")
    points = [(i, 9 * i, i * (1 + number / 9), math.exp(-i / 40) + 0.1 * number, 1e-3, None) for i in range(1, 61)]
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


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    tab = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


# what a page may be shown in, from narrow to wide; where one is missing, the system's stands for it
FONTS = ("Liberation Sans", "Noto Sans", "DejaVu Sans", "DejaVu Sans Mono")
IN_FONT = """(font => { const style = document.createElement('style'); document.head.append(style);
  style.textContent = `html body, html body *, html body svg text { font-family: "${font}" !important }` })"""


@pytest.mark.parametrize(
    ("width", "scheme", "font"),
    [(1400, "light", None), (1400, "dark", None), (390, "light", None), (390, "dark", None)]
    + [(width, "light", font) for width in (1400, 390) for font in FONTS],
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


def test_untrusted_names_run_nothing(tab, tmp_path):
    path = tmp_path / "report.html"
    name = '"><script>document.title="run"</script><svg onload=document.title="run">'
    path.write_text(page.render([make_record(task=name, model=name, method=name)]))
    tab.open(path, 1400, "light")
    assert tab.ask("document.title") != "run"
    assert tab.ask("document.querySelectorAll('script, [onload]').length") == 0
    assert tab.trouble == []
