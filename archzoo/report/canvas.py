"""What all pictures share: colours, axes, legends, and the SVG text that they become."""

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from archzoo.report.placing import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = "figures"
"""Folder of a report's pictures."""
WIDTH, HEIGHT = 520.0, 340.0
FONT_SIZE = 12.0
SMALL = 11.0
LABEL_LENGTH = 26
"""Characters of a label in a picture; the tables have it in full."""
POINTS = 160
"""Points of a training-loss curve: the mean of each of so many stretches of the run."""

PAPER, INK, MUTED, GRID = "#fefefe", "#1f2329", "#69717d", "#e4e7eb"

# Okabe and Ito's colours, without yellow, and Tol's darker ones: safe for the colour-blind; marker and dash differ too.
# The first is the baseline's. In an HTML page each becomes a CSS variable, with the second colour on a dark ground.
PALETTE = (
    ("#5b6470", "#a9b2bd"),
    ("#0072b2", "#57aee3"),
    ("#d55e00", "#f08a43"),
    ("#009e73", "#35c79b"),
    ("#cc79a7", "#e29ac3"),
    ("#de9a00", "#f2b733"),
    ("#332288", "#9a90f0"),
    ("#882255", "#d16a9d"),
    ("#56b4e9", "#a5daf9"),
    ("#999933", "#c9c962"),
    ("#7a4b2a", "#c48f66"),
    ("#117733", "#63bf7c"),
)
# Each with the size, in px, at which it looks as large as the others.
MARKERS = tuple(zip("osD^vPX<>ph*", (7.5, 7.0, 6.6, 8.4, 8.4, 8.6, 8.2, 8.4, 8.4, 8.6, 8.4, 11.0), strict=True))
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
_FONT = "'DejaVu Sans', Verdana, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, slots=True)
class Style:
    """How a contestant looks in every picture."""

    index: int
    colour: str
    marker: str
    size: float
    """Of the marker, in px."""
    dash: Any


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG file and what to say below it."""

    name: str
    """File name without `.svg`."""
    title: str
    caption: str
    svg: str
    wide: bool = False
    """Whether it is as wide as the page."""

    @property
    def file(self) -> str:
        """Where it lies in the comparison's folder."""
        return f"{FIGURES}/{self.name}.svg"


def inline(picture: Picture) -> str:
    """The picture as an element of an HTML page: colours are the page's, and no id is on the page twice."""
    svg = picture.svg[picture.svg.index("<svg") :]
    for colour, variable in (
        (PAPER, "var(--paper)"),
        (INK, "var(--ink)"),
        (MUTED, "var(--muted)"),
        (GRID, "var(--grid)"),
    ):
        svg = svg.replace(colour, variable)
    for index, (light, _) in enumerate(PALETTE):
        svg = svg.replace(light, f"var(--s{index})")
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{picture.name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{picture.name}-", svg)
    svg = re.sub(r"\n? <title>.*?</title>", "", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape_xml(picture.title)}" ', 1)


@contextmanager
def plain_matplotlib() -> Iterator[None]:
    """matplotlib as it comes, whatever the user's matplotlibrc says, with our few settings."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A label in a script that DejaVu Sans lacks is measured a little wrong, but the viewer's own font draws it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "archzoo",
                "text.parse_math": False,
                "axes.unicode_minus": False,
                "axes.formatter.useoffset": False,
                "font.size": FONT_SIZE,
                "axes.labelsize": FONT_SIZE,
                "xtick.labelsize": SMALL,
                "ytick.labelsize": SMALL,
                "axes.edgecolor": MUTED,
                "axes.labelcolor": INK,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "axes.linewidth": 0.8,
                "axes.facecolor": "none",
                "figure.facecolor": PAPER,
                "lines.solid_capstyle": "butt",
            }
        )
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size, in px."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def new_axes(
    width: float, height: float, left: float, right: float, top: float, bottom: float
) -> tuple["Figure", "Axes"]:
    """A figure with axes that leave so much room around them, in px."""
    figure = new_figure(width, height)
    axes = figure.add_axes(
        (left / width, bottom / height, max(80.0, width - left - right) / width, (height - top - bottom) / height)
    )
    return figure, axes


def draw_frame(axes: "Axes") -> None:
    """Grid, and no line above and at the right."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# Mantissas of the labels of a logarithmic axis, from few to many.
_MANTISSAS: tuple[tuple[float, ...], ...] = (
    (1,),
    (1, 3),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
)


def log_axis(axes: "Axes", which: str) -> None:
    """Makes the x or y axis logarithmic, with as many labels as there is room for."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    limits = axes.get_xlim() if which == "x" else axes.get_ylim()
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(limits)
    axis = axes.xaxis if which == "x" else axes.yaxis
    room = float(axes.bbox.width) / 55 if which == "x" else float(axes.bbox.height) / 25  # for so many labels
    decades = range(math.floor(math.log10(limits[0])), math.ceil(math.log10(limits[1])))
    choices = [
        [tick for n in decades for m in mantissas if limits[0] <= (tick := m * 10.0**n) <= limits[1]]
        for mantissas in _MANTISSAS
    ]
    fitting = [ticks for ticks in choices if len(ticks) <= room]
    whole = not fitting or len(fitting[-1]) < 2  # of so many decades not each can have a label, or it is a tiny range
    axis.set_major_locator(LogLocator(subs=(1.0,), numticks=9) if whole else FixedLocator(fitting[-1]))
    axis.set_major_formatter(FuncFormatter(thousands_tick))
    axis.set_minor_formatter(NullFormatter())
    if len(fitting) > 1:  # labels enough to see the scale by; ticks take more time to draw than anything else
        axis.set_minor_locator(NullLocator())


def few_ticks() -> Any:
    """At most six ticks, at round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])


def plain_tick(value: float, _: object = None) -> str:
    """0.125."""
    return f"{value:.6g}"


def thousands_tick(value: float, _: object = None) -> str:
    """12,500; 1e-4."""
    if value and not 9.99e-4 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def ticks(axes: "Axes", log_x: bool, log_y: bool) -> None:
    """Frame and ticks of a cost at the x axis and a score at the y axis, whose limits are set."""
    if log_x:
        log_axis(axes, "x")
    else:
        axes.xaxis.set_major_formatter(thousands_tick)
        axes.xaxis.set_major_locator(few_ticks())
    if log_y:
        log_axis(axes, "y")
    else:
        axes.yaxis.set_major_formatter(plain_tick)
    draw_frame(axes)


def against(cost: str) -> str:
    """What a picture of the score against a cost is called."""
    return f"Score against {cost if cost.startswith('FLOP') else cost[0].lower() + cost[1:]}"


def end_labels(
    figure: "Figure",
    axes: "Axes",
    ends: Mapping[str, tuple[float, float]],
    looks: Mapping[str, Style],
    short: Mapping[str, str],
    label_width: float,
    leaders: bool = True,
) -> None:
    """The legend, at the right and in the order of the lines' ends, each joined to its line."""
    _, bottom, right, top = (float(edge) for edge in axes.bbox.extents)
    labels = list(ends)
    where = axes.transData.transform([ends[label] for label in labels])
    clipped = [min(max(float(y), bottom), top) for _, y in where]
    height = SMALL + 4
    places = spread(clipped, height, bottom + height / 2, top - height / 2)
    for label, (x, _), y, place in zip(labels, where, clipped, places, strict=True):
        look = looks[label]
        if leaders:
            draw_line(figure, (float(x) + 2, right + 4, right + 14), (y, y, place), look.colour, 0.7)
        draw_line(
            figure, (right + 15, right + 33), (place, place), look.colour, 1.7, look.dash if leaders else "None", look
        )
        figure.text(
            *fraction(figure, right + 37, place), short[label], ha="left", va="center", color=INK, fontsize=SMALL
        )


def draw_line(
    figure: "Figure",
    xs: Sequence[float],
    ys: Sequence[float],
    colour: str,
    width: float,
    dash: Any = "-",
    look: Style | None = None,
) -> None:
    """A line in px over the whole figure, with a marker in its middle if a look is given."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import IdentityTransform

    line = Line2D(list(xs), list(ys), color=colour, linewidth=width, linestyle=dash, transform=IdentityTransform())
    figure.add_artist(line)
    if look is not None and dash == "None":
        x, y = [sum(xs) / len(xs) + 3], [sum(ys) / len(ys)]
        marker = Line2D(x, y, color=colour, marker=look.marker, markersize=look.size, transform=IdentityTransform())
        figure.add_artist(marker)


def fraction(figure: "Figure", x: float, y: float) -> tuple[float, float]:
    """Pixels -> fractions of the figure."""
    return x / float(figure.bbox.width), y / float(figure.bbox.height)


def text_width(text: str, size: float = FONT_SIZE) -> float:
    """Width of a text in px, in DejaVu Sans, which is wider than what a viewer takes in its stead."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width = float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return width + 0.5 * size * wide


def to_svg(figure: "Figure", title: str) -> str:
    """The figure as SVG text; the same bytes for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[: svg.index("<!DOCTYPE")] + svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="([\d.]+)pt" height="([\d.]+)pt"', r'\1width="\2" height="\3"', svg, count=1)
    svg = svg.replace("'DejaVu Sans'", _FONT)
    return re.sub(r"<svg [^>]*>", lambda m: f"{m[0]}\n <title>{escape_xml(title)}</title>", svg, count=1)


def escape_xml(text: str) -> str:
    """Text for an XML element or attribute."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
