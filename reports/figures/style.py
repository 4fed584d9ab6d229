"""What all figures look like: sizes, colours that the colour-blind can tell apart, a style for each row."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator

WIDE, SMALL = 384, 360  # pixels: of a figure that stands alone, and of one in a grid of its like
LONGEST_LABEL = 38  # letters
FONT_SIZE = 11  # pixels

# Figures are drawn in the colours of the light page, each of which the page knows as a CSS variable.
INK, MUTED, LINE, PAPER = "#1f2328", "#59636e", "#d5dbe1", "#ffffff"
BLUE, SKY, GREEN, ORANGE, VERMILION, PINK = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"
YELLOW = "#f0e442"  # for areas alone: white paper swallows a line of it
ON_DARK, ON_LIGHT = "#fffffe", "#000001"  # letters on a patch of colour
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PAPER: "paper",
    BLUE: "blue",
    SKY: "sky",
    GREEN: "green",
    ORANGE: "orange",
    VERMILION: "vermilion",
    PINK: "pink",
    YELLOW: "yellow",
    ON_DARK: "on-dark",
    ON_LIGHT: "on-light",
}

NAMED = {name: colour for colour, name in VARIABLES.items()}

_HUES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)  # Okabe & Ito, without the yellow
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_MARKERS = "osD^vPX<>p*h"


class RowStyle(NamedTuple):
    """How a row (a method) is drawn: colour, dashes and marker, each of which tells it from its neighbours."""

    number: int
    colour: str
    dashes: str | tuple[float, tuple[float, ...]]
    marker: str


def row_styles(labels: Iterable[str], reference: str | None = None) -> dict[str, RowStyle]:
    """A style for each label, in the order given; the reference is drawn in ink."""
    styles: dict[str, RowStyle] = {}
    for label in dict.fromkeys(labels):
        coloured = sum(style.colour != INK for style in styles.values())
        hue = INK if label == reference else _HUES[coloured % len(_HUES)]
        dashes = "-" if label == reference else _DASHES[coloured // len(_HUES) % len(_DASHES)]
        styles[label] = RowStyle(len(styles), hue, dashes, _MARKERS[len(styles) % len(_MARKERS)])
    return styles


def look() -> AbstractContextManager[None]:
    """The settings that figures are drawn and written under."""
    return matplotlib.rc_context(
        {
            "text.parse_math": False,  # a name may hold a dollar
            "svg.fonttype": "none",
            "svg.hashsalt": "membench",
            "font.size": FONT_SIZE,
            "font.family": "DejaVu Sans",
            "axes.edgecolor": LINE,
            "axes.labelcolor": MUTED,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlecolor": INK,
            "axes.titlelocation": "left",
            "grid.color": LINE,
            "grid.linewidth": 0.8,
            "text.color": INK,
            "xtick.color": LINE,
            "ytick.color": LINE,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "legend.frameon": False,
            "legend.fontsize": 10,
            "figure.facecolor": PAPER,
            "axes.facecolor": "none",
        }
    )


def printable(text: str) -> str:
    """A text without control signs, which XML can't hold, nor half a surrogate, which UTF-8 can't."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def shortened(text: str, longest: int = LONGEST_LABEL) -> str:
    """Printable, and cut in the middle, since names differ in their ends as often as in their beginnings."""
    text = printable(text)
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def width(text: str, weight: str = "normal") -> float:
    """Pixels that a label of the usual size takes in DejaVu Sans, which is wider than the other fonts of a page."""
    font = FontProperties(family="DejaVu Sans", size=FONT_SIZE, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, False)[0]


def fitted(text: str, room: float, weight: str = "normal") -> str:
    """A text shortened to so many pixels."""
    longest = LONGEST_LABEL
    while longest > 3 and width(shortened(text, longest), weight) > room:
        longest -= 1
    return shortened(text, longest)


def along_a_training(axes: Axes, task: str, unit: str, marks: int) -> None:
    """Title and axes of what happened to a task from the start of its runs, with at most so many marks in `unit`s."""
    axes.set_xlim(left=0)
    axes.set_title(shortened(task), pad=8)
    axes.set_xlabel(unit)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(marks))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
