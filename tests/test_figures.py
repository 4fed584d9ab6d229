"""The plots: what is drawn is what was measured, nothing that ran is missing, and colours can be told apart."""

import itertools
import random
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from reports_factory import MIB, make_failure, make_record

from reports import figures
from reports.figures import bars, curves, pareto, style, svg
from reports.figures.pareto import Point, front
from reports.parts import PARTS
from reports.setups import group

SVG = "{http://www.w3.org/2000/svg}"
MEMORY = [style.NAMED[part.colour] for part in PARTS]
HOSTILE = '"><script>alert(1)</script>'


def setup_of(*records):
    (setup,) = group(list(records))
    return setup


def tree(plot):
    return ElementTree.fromstring(svg.standalone(plot))


def words(plot):
    """All the letters that are drawn."""
    return [element.text for element in tree(plot).iter(f"{SVG}text")]


def hovers(plot):
    """Title of each group or marker, with the element that it is of."""
    return {
        t.text: parent
        for parent in tree(plot).iter()
        for t in parent.findall(f"{SVG}title")
        if parent.tag != f"{SVG}svg"
    }


def width(group):
    xs = [float(x) for x, _ in re.findall(r"(-?[\d.]+) (-?[\d.]+)", group.find(f"{SVG}path").get("d"))]
    return max(xs) - min(xs)


def history(losses, seconds=0.02):
    names = ("step", "tokens", "seconds", "loss", "learning_rate", "metrics")
    return [
        dict(zip(names, (i, 9 * i, seconds * i, loss, 1e-3, None), strict=True)) for i, loss in enumerate(losses, 1)
    ]


# Bars


def test_a_bars_segments_are_as_long_as_the_bytes_of_the_components():
    found = hovers(bars.memory(setup_of(make_record(), make_record(method="badam"))))
    weights = width(found["badam, weights: 20.0 (20%)"])
    assert width(found["badam, optimizer state: 40.0 (40%)"]) == pytest.approx(2 * weights, rel=0.01)
    assert width(found["badam, temporaries: 5.0 (5%)"]) == pytest.approx(weights / 4, rel=0.01)


def test_segments_of_memory_are_printed_as_in_the_table_and_add_up():
    sizes = dict.fromkeys(("gradients_bytes", "optimizer_state_bytes", "activations_bytes", "temporaries_bytes"), 0)
    thirds = {**sizes, "weights_bytes": 10 * MIB + 47_000, "gradients_bytes": 10 * MIB + 47_000}  # 10.045 MiB each
    plot = bars.memory(setup_of(make_record(memory__at_peak=thirds, memory__peak_allocated_bytes=20 * MIB + 94_000)))
    assert "20.1 MiB, 1.00 × adamw" in words(plot)
    assert {"10.1", "10.0"} <= set(words(plot))


def test_a_bar_without_times_says_which_of_the_reasons_it_is():
    made_by = [{"processes": count, "steps": 50, "tokens": 9, "train_seconds": 5.0} for count in (2, 1)]
    beside = make_record(method="beside", environment={"device": "cpu", "threads": 2, "jobs": 2})
    plot = bars.step_time(setup_of(make_record(), make_record(method="elsewhere", made_by=made_by), beside))
    assert plot and "elsewhere: continued" in plot.alt and "beside: beside other runs" in plot.alt


@pytest.mark.parametrize("draw", [bars.memory, bars.step_time, bars.coverage])
def test_a_method_that_never_finished_is_a_row_that_says_why(draw):
    plot = draw(
        setup_of(make_record(), make_failure("out_of_memory", method="lomo"), make_failure("diverged", method="x"))
    )
    assert {"lomo", "out of memory", "x", "diverged"} <= set(words(plot))
    assert "lomo" in plot.alt and "out of memory" in plot.alt


def test_no_bar_where_every_run_failed_is_no_error():
    gallery = figures.draw(setup_of(make_failure(method="lomo"), make_failure("diverged", method="sgd")))
    assert gallery["pareto"] == gallery["loss_by_step"] == []
    assert "out of memory" in words(gallery["memory"][0])


def test_coverage_tells_blocks_from_weights_and_has_no_diamond_for_a_method_without_blocks():
    setup = setup_of(make_record(), make_record(method="badam", trained_fraction=0.25, block_coverage=0.5))
    found = hovers(bars.coverage(setup))
    assert {"badam: 25.0% of the weights changed", "badam: 50.0% of the blocks visited"} <= set(found)
    assert not any(text.startswith("adamw") and "blocks" in text for text in found)


# Memory against quality


def beaten(point, other, sign):
    no_worse = other.memory <= point.memory and sign * other.score >= sign * point.score
    return no_worse and (other.memory, other.score) != (point.memory, point.score)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_front_is_what_no_other_point_beats(sign):
    rng = random.Random(0)
    for _ in range(200):
        points = [Point(str(i), rng.randrange(8), rng.randrange(8), None, 1) for i in range(rng.randrange(1, 12))]
        expected = {p.label for p in points if not any(beaten(p, other, sign) for other in points)}
        assert {p.label for p in front(points, higher_is_better=sign > 0)} == expected


def perplexities(**scores):
    return [
        make_record(method=m, metrics={"ppl": s}, headline="ppl", higher_is_better=False) for m, s in scores.items()
    ]


def test_where_less_is_better_the_least_is_on_the_front_and_the_axis_says_so():
    plot = pareto.overall(setup_of(*perplexities(adamw=20.0, badam=10.0)))
    assert "The front: badam" in hovers(plot)
    assert any("less is better" in text and "ppl" in text for text in words(plot))


def test_a_score_that_would_hide_all_others_is_told_instead_of_drawn():
    usual = {"adamw": 5.1, "badam": 5.3, "lora": 5.0, "galore": 5.7}
    plot = pareto.overall(setup_of(*perplexities(**usual, lomo=2797.5)))
    low, high = plot.figure.axes[0].get_ylim()
    assert 4 < low < 5.0 and 5.7 < high < 7
    assert "Beyond: lomo, 100.0 MiB, 2797.50" in words(plot) and "lomo 100.0 MiB, 2797.50" in plot.alt
    drawn = pareto.overall(setup_of(*perplexities(**usual, lomo=20.0)))
    assert not any("Beyond" in text for text in words(drawn)) and "lomo" in words(drawn)


def test_error_bars_are_deviations_over_seeds_and_one_seed_has_none():
    runs = [make_record(seed=seed, metrics={"accuracy": score}) for seed, score in enumerate((0.5, 0.6, 0.7))]
    plot = pareto.overall(setup_of(*runs, make_record(method="badam", metrics={"accuracy": 0.6})))
    texts = set(hovers(plot))
    assert "adamw: 100.0 MiB, 0.600 ± 0.100 (3)" in texts and "badam: 100.0 MiB, 0.600" in texts
    assert len([line for line in plot.figure.axes[0].lines if "error" in (line.get_gid() or "")]) == 1


def test_an_average_over_fewer_tasks_is_no_point_and_is_named():
    tasks = [make_record(task=f"s/{t}", method=m, metrics={"accuracy": 0.5}) for t in "ab" for m in ("adamw", "badam")]
    setup = setup_of(*tasks[:3])
    assert not any("badam" in text for text in hovers(pareto.overall(setup)))
    assert pareto.left_out(setup, "average") == ["badam"]


def test_the_seeds_of_error_bars_are_those_of_a_row_that_lacks_none():
    runs = [make_record(seed=seed) for seed in range(3)]
    runs += [make_record(method=method, seed=seed) for method in ("badam", "lora") for seed in range(2)]
    assert pareto.spread_words(setup_of(*runs)).endswith("(3 where none is missing).")


def test_no_average_is_drawn_of_tasks_of_which_less_is_better():
    runs = [run | {"task": f"lm/{task}"} for task in "ab" for run in perplexities(adamw=20.0)]
    gallery = figures.draw(setup_of(*runs))
    assert gallery["pareto"] == [] and len(gallery["pareto_by_task"]) == 2


# Curves


def test_a_curve_is_the_mean_over_seeds_and_a_stretch_of_steps():
    losses = [[float(i) for i in range(1, 41)], [float(i) + 2 for i in range(1, 41)]]
    runs = [make_record(seed=seed, history=history(values)) for seed, values in enumerate(losses)]
    (curve,) = curves.curves_of(setup_of(*runs), "adamw", "superglue/rte")
    assert len(curve.losses) == 20  # stretches of two steps
    assert curve.losses[0] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert curve.seconds[-1] == pytest.approx(0.02 * 39.5)


@pytest.mark.parametrize("steps", [20, 101, 121, 161, 990])
def test_a_curve_ends_with_the_mean_of_the_last_twentieth_of_the_steps(steps):
    (curve,) = curves.curves_of(
        setup_of(make_record(history=history([float(i) for i in range(steps)]))), "adamw", "superglue/rte"
    )
    assert len(curve.losses) == 20
    assert curve.losses[-1] == pytest.approx(np.mean(np.arange(steps)[-(steps // 20) :]), abs=0.5)


def test_a_run_that_diverged_has_a_line_of_its_own_that_says_where_it_ended():
    good, bad = history([3.0, 2.0, 1.0]), history([3.0, 50.0, 1e9])
    bad.append({**bad[-1], "step": 4, "loss": None})
    setup = setup_of(make_record(history=good), make_failure("diverged", method="lomo", history=bad))
    plot = curves.panel(setup, "superglue/rte", "step", "x")
    assert "lomo: diverged after step 3" in hovers(plot)
    assert plot.figure.axes[0].get_ylim()[1] < 4  # and doesn't flatten the others


def test_a_finished_run_that_exploded_does_not_flatten_the_others():
    runs = [make_record(method=m, history=history([2.0, 1.5, loss])) for m, loss in (("adamw", 1.4), ("badam", 1.2))]
    exploded = make_record(method="lomo", history=history([2.0, 30.0, 8.0]))
    plot = curves.panel(setup_of(*runs, exploded), "superglue/rte", "step", "x")
    assert plot.figure.axes[0].get_ylim()[1] < 2.2
    higher = make_record(method="lomo", history=history([2.0, 5.5, 4.0]))
    assert curves.panel(setup_of(*runs, higher), "superglue/rte", "step", "x").figure.axes[0].get_ylim()[1] > 5.5


def test_a_failed_run_never_bends_the_mean_of_the_finished_ones():
    bad = make_failure("failed", seed=1, history=history([9.0, 9.0]))
    ok, other = curves.curves_of(setup_of(make_record(history=history([1.0, 1.0])), bad), "adamw", "superglue/rte")
    assert (ok.losses, other.losses) == ([1.0, 1.0], [9.0, 9.0])


# As SVG


def plots_with(name, tasks="ab"):
    runs = [make_record(method=m, task=f"t/{name}{i}", history=history([2, 1])) for m in ("adamw", name) for i in tasks]
    return [plot for plots in figures.draw(setup_of(*runs)).values() for plot in plots]


@pytest.mark.parametrize(
    "name", [HOSTILE, "$\\frac{a", "nul\x00esc\x1b", "half\ud800", "\u202ertl", "&amp;'\"", "x" * 500]
)
def test_any_name_is_drawn_as_text(name):
    plots = plots_with(name, tasks="a")
    for plot in plots:
        root = tree(plot)
        assert not [e for e in root.iter() if e.tag.endswith("script") or any(key.startswith("on") for key in e.attrib)]
        svg.inline(plot, "x").encode()
    shown = [text for plot in plots for text in words(plot)]
    assert style.shortened(name) in shown or any(text[:9] == style.printable(name)[:9] for text in shown)


def test_ids_are_unique_over_all_plots_of_a_page_and_every_reference_is_met():
    text = "".join(svg.inline(plot, plot.name) for plot in plots_with("badam"))
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text)) == set(ids)


def test_on_a_page_every_colour_follows_the_page():
    for plot in plots_with("badam"):
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?!-)", re.sub(r'(href="|url\()#[^")]*', "", svg.inline(plot, "x")))


def test_files_are_written_in_both_formats_and_several_setups_apart(tmp_path):
    paths = figures.write([make_record(), make_record(training__batch_size=32)], tmp_path)
    assert {path.parent.name for path in paths} == {"setup-1", "setup-2"}
    for path in paths:
        start = path.read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else ElementTree.parse(path)


def test_tasks_whose_names_make_the_same_file_name_have_files_of_their_own(tmp_path):
    paths = figures.write(
        [make_record(task="t/a b", history=history([1])), make_record(task="t/a_b"), make_record(task="t/a-b")],
        tmp_path,
    )
    assert len(paths) == len(set(paths))


# Colours, as the colour-blind see them: Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB

BLIND = {
    "none": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear sRGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    f = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", BLIND)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_that_touch_can_be_told_apart_by_the_colour_blind(sight, scheme, palette):
    """A difference of 2.3 is just noticeable; neighbours in a stacked bar get more than six times that."""
    for colours in (MEMORY, list(bars._PHASES.values())):
        seen = [lab(BLIND[sight] @ linear(palette[scheme][style.VARIABLES[colour]])) for colour in colours]
        for one, other in itertools.pairwise(seen):
            assert np.linalg.norm(one - other) > 15


@pytest.fixture(scope="module")
def palette():
    """The variables of the page's style sheet, by scheme."""
    sheet = (figures.Path(figures.__file__).parent.parent / "page" / "report.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in sheet.split("@media")[:2])
    return {"light": light, "dark": {**light, **dark}}


def test_the_light_page_has_the_colours_that_files_are_drawn_in(palette):
    drawn = {name: colour for colour, name in style.VARIABLES.items() if not name.startswith("on-")}
    assert {name: palette["light"][name] for name in drawn} == drawn


def contrast(one, other):
    """WCAG 2.1."""
    bright, dim = sorted((float(np.array([0.2126, 0.7152, 0.0722]) @ linear(c)) for c in (one, other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_can_be_read_on_what_they_stand_on(scheme, palette):
    colours = palette[scheme]
    for ground in ("paper", "ground", "notice", "bad", "best"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5
    assert contrast(colours["muted"], colours["paper"]) >= 4.5
    for colour in {*MEMORY, *bars._PHASES.values()}:
        letters = "on-dark" if colour == style.BLUE else "on-light"
        assert contrast(colours[letters], colours[style.VARIABLES[colour]]) >= 4.5
    for colour in (*style._HUES, style.INK):
        assert contrast(colours[style.VARIABLES[colour]], colours["paper"]) >= 2  # of lines, told apart by marks too


def test_no_two_rows_look_alike():
    styles = style.row_styles(["adamw", *map(str, range(curves.MOST_ROWS))], "adamw")
    assert len({(s.colour, str(s.dashes), s.marker) for s in styles.values()}) == len(styles)
