"""A figure as SVG: with a title on what a pointer may rest on, alternative text, and colours that follow the page's."""

import io
import re
from dataclasses import dataclass, field
from xml.etree import ElementTree

from matplotlib.figure import Figure

from reports.figures.style import PAPER, VARIABLES, look, printable

_SVG, _LINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _LINK[1:].partition("}")[0])


@dataclass
class Plot:
    """A figure with what is said of it. `hints` holds, by the gid of an artist, the text (or one for each marker) to
    show when a pointer rests on it; artists whose gid starts with `row-N-` belong to the row of that number."""

    name: str  # of a file, without suffix
    title: str
    alt: str
    figure: Figure
    hints: dict[str, list[str]] = field(default_factory=dict)

    def hint(self, gid: str, *texts: str) -> str:
        """Note what to show at an artist; gives the gid to draw it with."""
        self.hints[gid] = list(texts)
        return gid


def standalone(plot: Plot) -> str:
    """The SVG as a file of its own, in the colours and on the paper of the light page."""
    root = _tree(plot, PAPER)
    title, description = ElementTree.Element(f"{{{_SVG}}}title"), ElementTree.Element(f"{{{_SVG}}}desc")
    title.text, description.text = printable(plot.title), printable(plot.alt)
    root[:0] = [title, description]
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def inline(plot: Plot, prefix: str) -> str:
    """The SVG to stand inside an HTML page: ids that are unique under `prefix`, colours as CSS variables."""
    root = _tree(plot)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", printable(plot.alt))
    for defs in root.iter(f"{{{_SVG}}}defs"):
        for style in defs.findall(f"{{{_SVG}}}style"):
            defs.remove(style)  # a style inside a page holds for the whole of it
    _keep_own_ids(root, prefix)
    for element in root.iter():
        if colours := element.get("style"):
            element.set("style", re.sub(r"#[0-9a-f]{6}\b", _variable, colours))
    return ElementTree.tostring(root, encoding="unicode")


def _variable(match: re.Match[str]) -> str:
    name = VARIABLES.get(match[0])
    return f"var(--{name})" if name else match[0]


def png(plot: Plot) -> bytes:
    """Twice as many pixels as on the page."""
    with look():
        file = io.BytesIO()
        plot.figure.savefig(file, format="png", dpi=144, facecolor=PAPER, metadata={"Software": None})
    return file.getvalue()


def _tree(plot: Plot, ground: str = "none") -> ElementTree.Element:
    with look():
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        plot.figure.savefig(file, format="svg", facecolor=ground, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for group in list(root.iter(f"{{{_SVG}}}g")):
        _say(group, plot.hints.get(group.get("id", "")))
    return root


def _say(group: ElementTree.Element, texts: list[str] | None) -> None:
    if row := re.match(r"(?:row|bar|trained|blocks)-(\d+)", group.get("id", "")):
        group.set("class", f"row-{row[1]}")  # by which the page dims and hides rows
    if texts is None:
        return
    marks = [group] if len(texts) == 1 else list(group.iter(f"{{{_SVG}}}use"))
    for mark, text in zip(marks, texts, strict=True):
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = printable(text)
        mark.insert(0, title)


def _keep_own_ids(root: ElementTree.Element, prefix: str) -> None:
    """Ids that something refers to, made unique; matplotlib's others are the same in every figure."""
    used = {link[1:] for element in root.iter() if (link := element.get(_LINK))}
    used |= {
        name for element in root.iter() for name in re.findall(r"url\(#([^)]+)\)", " ".join(element.attrib.values()))
    }
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{prefix}-{name}")
        if link := element.get(_LINK):
            element.set(_LINK, f"#{prefix}-{link[1:]}")
        for key, value in element.attrib.items():
            if "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
