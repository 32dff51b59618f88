"""Pictures of a `KAN`: every edge with its function, after figure 2.4 of https://arxiv.org/abs/2404.19756."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# From Okabe and Ito's colours, which the colour-blind tell apart. Formulas are named besides, and have a heavier frame.
INK, FORMULA, SHADE, PAPER = "#1f2329", "#c44f00", "#dbe9f5", "#ffffff"

# In inches. A picture is laid out in these, and shrinks as a whole where its axes are smaller.
SLOT, NARROW = 0.66, 0.32  # distance of neighbouring boxes: where there is room, and at least
WIDEST = 15.0  # a picture whose boxes still shrink
BOX = 0.8  # of the slot
DOT, MARK = 0.055, 0.105  # radii of a node and of the mark of a sum or product
FAN = 0.3  # height of the lines between nodes and boxes, at least, and per inch that they spread
STEP = 0.42  # height between subnodes and products
LABEL = 0.15  # height of a formula's name above its box
MARGIN = 0.14

POINTS = 161  # of a curve
FONT, LEAST_FONT = 10.0, 5.0  # points


@dataclass(frozen=True)
class _Edge:
    """What is drawn of an edge."""

    subnode: int
    input: int
    formula: str | None
    """Its name; None for a spline."""
    alpha: float
    curve: tuple[Tensor, Tensor]
    """In units of the box, from 0 to 1."""
    seen: tuple[float, float]
    """Where the samples lie, in units of the box."""


def plot_kan(
    model: Any,
    x: Tensor,
    ax: Any = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    beta: float = 3.0,
    scale: float = 1.0,
    title: str | None = None,
) -> Any:
    """Draws a `KAN` from its inputs, below, to its outputs. Writes no file.

    Each edge is a box with its function: over its grid and over the samples' range, which is shaded; in orange, with
    its name, if it is a formula. Its visibility is tanh(beta score), the score that of `KAN.attribute`. Pruned edges
    are left out. A circle with + is a sum, one with × a product.

    Args:
        model: The `KAN`.
        x: (*, inputs), samples.
        ax: Where to draw, a `matplotlib.axes.Axes`, which loses its frame; None for a new figure that fits.
        input_names: Of all inputs, pruned ones too, as `["mass", r"$\\theta$"]`.
        output_names: Of the outputs.
        beta: How soon edges become visible as their score grows.
        scale: Size of the new figure, fonts included, against its usual one.
        title: Above the picture.

    Returns:
        The axes.

    Raises:
        ValueError: If an argument is out of range, or a name is missing.
    """
    if not (0 < beta < math.inf and 0 < scale < math.inf):
        raise ValueError(f"beta={beta}, scale={scale}: must be positive and finite")
    inputs, outputs = model.in_features, sum(model.width[-1])
    labels = [_names("input_names", input_names, inputs, "x"), _names("output_names", output_names, outputs, "y")]
    labels[0] = [labels[0][i] for i in model.input_index]
    layout = _Layout(model, _edges(model, x, beta), labels, title)
    if ax is None:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(layout.width * scale, layout.height * scale))
        ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    size = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
    ax.set(xlim=(0, layout.width), ylim=(0, layout.height), aspect="equal")
    ax.axis("off")
    _draw(ax, layout, min(size.width / layout.width, size.height / layout.height))
    return ax


def _names(argument: str, names: Sequence[str] | None, count: int, letter: str) -> list[str]:
    if names is None:
        return [f"${letter}$"] if count == 1 else [f"${letter}_{{{i}}}$" for i in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"{argument}={names!r}: must be {count} names")
    return list(map(str, names))


@torch.no_grad()
def _edges(model: Any, x: Tensor, beta: float) -> list[list[_Edge]]:
    """The edges of every block that are not pruned, by input, then by subnode."""
    scores, levels = model.attribute(x).edges, model.activations(x)
    blocks = []
    for block, score, values in zip(model.blocks, scores, levels, strict=False):
        values = values.reshape(-1, values.shape[-1])
        knots = block.edges.grid[:, block.edges.spline_order :][:, : block.edges.grid_size + 1]
        symbolic = block.symbolic_mask()
        edges = []
        for i, o in (symbolic | block.numeric_mask()).t().nonzero().tolist():
            low, high = map(float, values[:, i].aminmax())
            name = block.symbolic.edge_name(o, i) if symbolic[o, i] else None
            more = (high - low) * (0.1 if name else 0.75)  # beyond the samples; less where there may be a pole
            first, last = low - more, high + more
            if name is None:
                first, last = max(first, min(low, float(knots[i, 0]))), min(last, max(high, float(knots[i, -1])))
            if first == last:
                first, last = first - 1, last + 1
            at = torch.linspace(first, last, POINTS, dtype=torch.float64)
            y = block.edge_function(o, i, at.to(values)).double().cpu()
            alpha = math.tanh(beta * float(score[o, i]))
            seen = (low - first) / (last - first), (high - first) / (last - first)
            edges.append(_Edge(o, i, name, alpha, (torch.linspace(0, 1, POINTS), _fitted(y, at, low, high)), seen))
        blocks.append(edges)
    return blocks


def _fitted(y: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """A curve in units of its box: all of what the samples see of it, and as much beyond as keeps that large."""
    inside = y[(x >= low) & (x <= high) & y.isfinite()]
    if not len(inside):
        inside = y[y.isfinite()]
    least, most = (float(v) for v in inside.aminmax()) if len(inside) else (0.0, 0.0)
    if most - least <= 1e-9 * max(abs(least), abs(most)):
        least, most = least - 1, most + 1
    return (0.12 + 0.76 * (y - least) / (most - least)).where(y.isfinite(), math.nan)


@dataclass(frozen=True)
class _Level:
    """Where the parts of one block are, in inches: its boxes, and what is above them."""

    edges: list[_Edge]
    box: float
    """Size of a box."""
    boxes: list[float]
    """x of each edge's box."""
    bottom: float
    subnodes: list[float]
    subnodes_y: float
    nodes: list[float]
    nodes_y: float
    arity: list[int]


class _Layout:
    """Positions in inches; y grows from the inputs to the outputs."""

    def __init__(self, model: Any, edges: list[list[_Edge]], labels: list[list[str]], title: str | None):
        self.labels, self.title = labels, title
        crowd = max(max(map(len, edges)), *(block.arity.numel() for block in model.blocks), len(labels[0]))
        slot = min(SLOT, max(NARROW, WIDEST / crowd))
        usual = max(2.4, crowd * slot)
        needed = [len(names) * (max(_text_width(name, FONT) for name in names) + 0.12) for names in labels]
        inner = max(usual, *(need for need in needed if need <= max(1.5 * usual, 6.0)), 0.0)
        self.width = inner + 2 * MARGIN
        rotated = [need > inner for need in needed]
        self.rotation = [90.0 if turned else 0.0 for turned in rotated]
        heights = [
            max(_text_width(name, FONT) for name in names) if turned else FONT / 72 * 1.3
            for names, turned in zip(labels, rotated, strict=True)
        ]
        y = MARGIN + heights[0] + 1.5 * DOT + 0.04
        self.inputs, self.inputs_y = self._spread(len(labels[0])), y
        self.levels: list[_Level] = []
        below = self.inputs
        for block, drawn in zip(model.blocks, edges, strict=True):
            arity = block.arity.tolist()
            boxes, subnodes = self._spread(len(drawn)), self._spread(sum(arity))
            ends = list(itertools.accumulate(arity))
            nodes = [sum(subnodes[end - n : end]) / n for n, end in zip(arity, ends, strict=True)]
            box = BOX * min(SLOT, self.width / max(1, len(drawn)))
            bottom = y + _fan(below, boxes, [edge.input for edge in drawn])
            top = bottom + box + LABEL * any(edge.formula for edge in drawn)
            subnodes_y = top + _fan(subnodes, boxes, [edge.subnode for edge in drawn]) + MARK
            y = subnodes_y + (STEP if max(arity) > 1 else 0.0)
            self.levels.append(_Level(drawn, box, boxes, bottom, subnodes, subnodes_y, nodes, y, arity))
            below = nodes
        self.height = y + MARK + 0.08 + heights[1] + MARGIN
        if title is not None:
            self.height += 1.3 * FONT / 72 + MARGIN

    def _spread(self, count: int) -> list[float]:
        inner = self.width - 2 * MARGIN
        return [MARGIN + inner * (k + 0.5) / count for k in range(count)]


def _fan(nodes: list[float], boxes: list[float], ends: list[int]) -> float:
    """Height of a bundle of lines: more where they lean."""
    lean = max((abs(nodes[end] - at) for end, at in zip(ends, boxes, strict=True)), default=0.0)
    return FAN + min(0.1 * lean, 0.9)


def _draw(ax: Any, layout: _Layout, scale: float) -> None:
    from matplotlib.collections import LineCollection

    lines: list[tuple[tuple[float, float], tuple[float, float]]] = []
    colours: list[tuple[str, float]] = []
    below, below_y = layout.inputs, layout.inputs_y
    for level in layout.levels:
        for edge, at in zip(level.edges, level.boxes, strict=True):
            colour = (FORMULA if edge.formula else INK, edge.alpha)
            lines.append(((below[edge.input], below_y), (at, level.bottom)))
            top = level.bottom + level.box + (LABEL if edge.formula else 0.0)
            lines.append(((at, top), (level.subnodes[edge.subnode], level.subnodes_y)))
            colours += [colour, colour]
            _draw_edge(ax, edge, at, level, scale)
        subnode = 0
        for node, arity in enumerate(level.arity):
            for _ in range(arity):
                if level.nodes_y > level.subnodes_y:
                    lines.append(((level.subnodes[subnode], level.subnodes_y), (level.nodes[node], level.nodes_y)))
                    colours.append((INK, 1.0))
                _draw_mark(ax, level.subnodes[subnode], level.subnodes_y, "+", scale)
                subnode += 1
            if arity > 1:
                _draw_mark(ax, level.nodes[node], level.nodes_y, "×", scale)
            elif level.nodes_y > level.subnodes_y:
                _draw_dot(ax, level.nodes[node], level.nodes_y, scale)
        below, below_y = level.nodes, level.nodes_y
    for at in layout.inputs:
        _draw_dot(ax, at, layout.inputs_y, scale)
    ax.add_collection(LineCollection(lines, colors=colours, linewidths=1.1 * scale, zorder=1, capstyle="round"))
    ends = [(layout.inputs, layout.inputs_y - 1.5 * DOT - 0.04, "top"), (below, below_y + MARK + 0.06, "bottom")]
    for (xs, y, va), names, rotation in zip(ends, layout.labels, layout.rotation, strict=True):
        for at, name in zip(xs, names, strict=True):
            ax.text(at, y, name, ha="center", va=va, fontsize=FONT * scale, color=INK, rotation=rotation)
    if layout.title is not None:
        y = layout.height - MARGIN
        ax.text(layout.width / 2, y, layout.title, ha="center", va="top", fontsize=1.1 * FONT * scale, color=INK)


def _draw_edge(ax: Any, edge: _Edge, at: float, level: _Level, scale: float) -> None:
    from matplotlib.patches import Rectangle

    colour, size, left = FORMULA if edge.formula else INK, level.box, at - level.box / 2

    def rectangle(x: float, width: float, **style: Any) -> None:
        ax.add_patch(Rectangle((x, level.bottom), width, size, **style))

    rectangle(left, size, facecolor=PAPER, edgecolor="none", zorder=2)
    first, last = edge.seen
    rectangle(left + first * size, (last - first) * size, facecolor=SHADE, edgecolor="none", alpha=edge.alpha, zorder=3)
    frame = (1.3 if edge.formula else 0.8) * scale
    rectangle(left, size, facecolor="none", edgecolor=(colour, edge.alpha), linewidth=frame, zorder=5)
    clip = Rectangle((left, level.bottom), size, size, transform=ax.transData)
    x, y = (values.double().numpy() for values in edge.curve)
    width = min(1.5, 0.4 + 2 * size) * scale
    (line,) = ax.plot(
        left + x * size, level.bottom + y * size, color=colour, alpha=edge.alpha, linewidth=width, zorder=4
    )
    line.set_clip_path(clip)
    if edge.formula:
        name = _pretty(edge.formula)
        font = min(0.8 * FONT, max(LEAST_FONT, FONT * 1.2 * size / _text_width(name, FONT))) * scale
        style = {"ha": "center", "va": "center", "fontsize": font, "color": colour, "alpha": edge.alpha}
        ax.text(at, level.bottom + size + LABEL / 2, name, **style, zorder=6)


def _draw_mark(ax: Any, x: float, y: float, sign: str, scale: float) -> None:
    """A circle with the sign of a sum or product."""
    from matplotlib.patches import Circle

    ax.add_patch(Circle((x, y), MARK, facecolor=PAPER, edgecolor=INK, linewidth=1.0 * scale, zorder=7))
    arm = 0.55 * MARK
    turn = arm * math.sqrt(0.5)
    strokes = [(arm, 0.0), (0.0, arm)] if sign == "+" else [(turn, turn), (turn, -turn)]
    for dx, dy in strokes:
        ax.plot([x - dx, x + dx], [y - dy, y + dy], color=INK, linewidth=1.0 * scale, zorder=8, solid_capstyle="butt")


def _draw_dot(ax: Any, x: float, y: float, scale: float) -> None:
    from matplotlib.patches import Circle

    ax.add_patch(Circle((x, y), DOT, facecolor=INK, edgecolor="none", zorder=7))


def _pretty(name: str) -> str:
    """A function's name with raised exponents, as `x^2`."""
    return re.sub(r"\^(-?[\d.]+)", r"$^{\1}$", name).replace("-", "−") if "$" not in name else name


def _text_width(text: str, size: float) -> float:
    """In inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    measured = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath="$" in text)
    return float(measured[0]) / 72
