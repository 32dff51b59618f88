"""A picture of a connectome: who speaks to whom, pool by pool, and what of it a BPU uses."""

from typing import TYPE_CHECKING

import numpy as np

from archzoo.layers._connectome import POOLS, Connectome
from archzoo.layers.bpu import BPU

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 120  # along a side of the map of synapses
INK, FAINT = "#1f2329", "#9aa1ab"


def plot_wiring(connectome: Connectome, bpu: BPU | None = None) -> "Figure":
    """Draws a wiring: its matrix, its blocks, and, with a BPU, the neurons of each step. Writes no file.

    Left, the synapses from neurons (rows) to neurons (columns), summed over cells of neighbours, in a logarithmic
    scale: orange is excitatory, blue inhibitory. In the middle, the numbers of edges from pool to pool, with the share
    of excitatory ones. Right, how many neurons can matter at each step.

    Args:
        connectome: The wiring.
        bpu: A layer on it.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure

    panels = 2 if bpu is None else 3
    figure = Figure(figsize=(4.2 * panels, 4.0), layout="constrained")
    axes = figure.subplots(1, panels)
    _draw_matrix(axes[0], connectome)
    _draw_blocks(axes[1], connectome)
    if bpu is not None:
        _draw_steps(axes[2], bpu)
    return figure


def _draw_matrix(axes: "Axes", wiring: Connectome) -> None:
    total = wiring.num_neurons
    cells = min(CELLS, total)
    rows, columns = (edge.numpy() * cells // total for edge in (wiring.pre, wiring.post))
    sums = np.bincount(rows * cells + columns, weights=wiring.weight.numpy(), minlength=cells * cells)
    shown = np.sign(sums) * np.log10(1 + np.abs(sums))
    most = float(np.abs(shown).max()) or 1.0
    axes.imshow(
        shown.reshape(cells, cells), cmap="PuOr_r", vmin=-most, vmax=most, extent=(0, total, total, 0), aspect="equal"
    )
    borders = np.cumsum(wiring.pool_sizes)[:2]
    for border in borders:
        axes.axhline(border, color=FAINT, linewidth=0.6)
        axes.axvline(border, color=FAINT, linewidth=0.6)
    axes.set_xlabel("to neuron")
    axes.set_ylabel("from neuron")
    axes.set_title(f"{total:,} neurons, {wiring.num_edges:,} edges")


def _draw_blocks(axes: "Axes", wiring: Connectome) -> None:
    stats = wiring.block_stats()
    edges, positive = stats["edges"].numpy(), stats["positive"].numpy()
    shown = np.log10(1 + edges)
    axes.imshow(shown, cmap="Greys", vmin=0, vmax=1.6 * float(shown.max()) or 1.0)
    for g in range(3):
        for h in range(3):
            share = f"\n{positive[g, h]:.0%} excitatory" if edges[g, h] else ""
            axes.text(h, g, f"{edges[g, h]:,.0f}{share}", ha="center", va="center", color=INK, fontsize=8)
    names = [f"{name}\n{size:,}" for name, size in zip(POOLS, wiring.pool_sizes, strict=True)]
    axes.set_xticks(range(3), names)
    axes.set_yticks(range(3), names)
    axes.set_title("Edges from (rows) to (columns)")


def _draw_steps(axes: "Axes", bpu: BPU) -> None:
    sizes = bpu.step_sizes
    bars = axes.bar(range(1, len(sizes) + 1), sizes, color="#b35806")
    axes.bar_label(bars, [f"{size:,}" for size in sizes], fontsize=8)
    axes.axhline(bpu.connectome.num_neurons, color=FAINT, linewidth=0.8)
    axes.set_xticks(range(1, len(sizes) + 1))
    axes.set_xlabel("step")
    axes.set_title("Neurons that can matter")
