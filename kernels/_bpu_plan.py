"""Which neurons and edges of a recurrence can matter at which step: what `bpu_recurrence` computes, and no more.

States are 0 before the drive and f(0) = 0, so that at step t a neuron matters only if the drive can have reached it,
and if what it says can still reach what is read. Both are found once, by walking the edges forwards and backwards, and
hold for any weights.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels._numpy import np

_HEAD, _PER_STATE, _PER_LINK = 4, 4, 2


@dataclass(frozen=True, eq=False)
class RecurrencePlan:
    """Sets of neurons and sparse patterns of all steps, as an op takes them.

    Attributes:
        index: All indices, one behind the other, int32.
        layout: The sizes by which they are told apart.
    """

    index: Tensor
    layout: tuple[int, ...]

    @functools.cached_property
    def unpacked(self) -> Unpacked:
        """The same told apart, once for all calls: it takes as long as the arithmetic of a short recurrence."""
        return Unpacked(self.index, self.layout)

    @functools.cached_property
    def _arranged(self) -> list[tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]]:
        return []

    def arranged(self, weight: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Weights of each link, in the order of its matrix and of its transpose.

        The last ones are kept, as weights that do not learn are the same at each call. Whether they are is asked of the
        numbers, which takes a tenth of the time of gathering them: a version counter misses what `.data` does.
        """
        kept = self._arranged
        if not kept or kept[0][0].dtype != weight.dtype or not np.array_equal(kept[0][0].numpy(), weight.numpy()):
            sets, own = self.unpacked, weight.detach().clone()
            orders = (own.index_select(0, e).split(sets.link_edges) for e in (sets.target_edges, sets.source_edges))
            kept[:] = [(own, *orders)]
        return kept[0][1:]

    def to(self, device: torch.device) -> RecurrencePlan:
        """The plan with its index on a device."""
        return RecurrencePlan(self.index.to(device), self.layout)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecurrencePlan, (self.index, self.layout)  # copies and pickles without the views


@dataclass(frozen=True)
class Link:
    """The edges between the neurons of one step and those of the next, as two sparse matrices of the same edges."""

    sources: int
    targets: int
    edges: int
    target_rows: Tensor
    """CSR row pointers of (targets, sources)."""
    target_columns: Tensor
    source_rows: Tensor
    """The same of the transpose, (sources, targets)."""
    source_columns: Tensor
    kept_source: Tensor
    """Neurons of both steps, by their place in the first; of use with `residual`."""
    kept_target: Tensor


@dataclass(frozen=True)
class State:
    """The neurons that are held at one step, in ascending order: sensory ones first, output ones last.

    Where the drive enters these are all sensory neurons, and where states are read all output neurons, so that both are
    blocks; those of them that cannot matter have no edges.
    """

    neurons: int
    driven: int
    """How many the drive enters: the first ones."""
    read: int
    """How many are read: the last ones."""


class Unpacked:
    """A plan's sets and patterns, as views of its index."""

    def __init__(self, index: Tensor, layout: Sequence[int]):
        self.steps, self.num_sensory, self.num_output, residual = layout[:_HEAD]
        self.residual = bool(residual)
        ends = _HEAD + _PER_STATE * self.steps
        self.states = [State(layout[at], *layout[at + 2 : at + 4]) for at in range(_HEAD, ends, _PER_STATE)]
        self.neurons, self.link_edges = held_sizes(layout), link_sizes(layout)
        parts = iter(index.split(_segments(layout)))
        self.links = [
            Link(before.neurons, after.neurons, edges, *(next(parts) for _ in range(6)))
            for before, after, edges in zip(self.states, self.states[1:], self.link_edges, strict=False)
        ]
        # Number of each edge in the connectome, link by link in the order of its matrix, and of its transpose.
        self.target_edges, self.source_edges = parts


def rows_of(pointers: Tensor, edges: int) -> Tensor:
    """The row of every entry of a CSR matrix."""
    counts = pointers.diff()
    return torch.arange(len(counts), device=pointers.device).repeat_interleave(counts, output_size=edges)


def held_sizes(layout: Sequence[int]) -> list[int]:
    """Neurons that are held at each step."""
    return [int(n) for n in layout[_HEAD : _HEAD + _PER_STATE * layout[0] : _PER_STATE]]


def state_sizes(layout: Sequence[int]) -> list[int]:
    """Neurons that matter at each step."""
    return [int(n) for n in layout[_HEAD + 1 : _HEAD + _PER_STATE * layout[0] : _PER_STATE]]


def link_sizes(layout: Sequence[int]) -> list[int]:
    """Edges between each step and the next."""
    return [int(n) for n in layout[_HEAD + _PER_STATE * layout[0] :: _PER_LINK]]


def _segments(layout: Sequence[int]) -> list[int]:
    """Lengths of the pieces of the index."""
    at = _HEAD + _PER_STATE * layout[0]
    sizes, neurons, total = list[int](), held_sizes(layout), sum(link_sizes(layout))
    for t in range(layout[0] - 1):
        edges, kept = layout[at + _PER_LINK * t : at + _PER_LINK * (t + 1)]
        sizes += [neurons[t + 1] + 1, edges, neurons[t] + 1, edges, kept, kept]
    return [*sizes, total, total]


def plan_recurrence(
    pre: Tensor,
    post: Tensor,
    pool_sizes: tuple[int, int, int],
    steps: int,
    *,
    inject: str = "first",
    residual: bool = False,
    readout: str = "last",
) -> RecurrencePlan:
    """Finds what matters at each step of `bpu_recurrence`, whose docstring explains the arguments.

    Args:
        pre: Presynaptic neuron of each edge (E,). Edges are sorted by (post, pre), and none occurs twice.
        post: Postsynaptic neurons (E,).
        pool_sizes: Numbers of sensory, internal and output neurons, in whose order neurons are numbered.
        steps: Number T of updates.
        inject: `"first"` or `"every"`: at which steps the drive enters.
        residual: Whether a state is added to the next one.
        readout: `"last"` or `"sum"`: which states are read.

    Raises:
        ValueError: If no output neuron is reached.
    """
    num_sensory, _, num_output = pool_sizes
    total, every, sums = sum(pool_sizes), inject == "every", readout == "sum"
    source, target = pre.numpy(), post.numpy()
    sensory, output = np.zeros(total, bool), np.zeros(total, bool)
    sensory[:num_sensory], output[total - num_output :] = True, True
    alive = _reach(sensory, source, target, steps, keep=residual, also=sensory if every else None)
    useful = _reach(output, target, source, steps, keep=residual, also=output if sums else None)[::-1]
    if not any((a & output).any() for a in (alive if sums else alive[-1:])):
        raise ValueError(
            f"steps={steps}: reach no output neuron; {_shortest(sensory, output, source, target)}, of "
            "which the drive enters at the first"
        )
    active = [a & u for a, u in zip(alive, useful, strict=True)]
    head = [steps, num_sensory, num_output, int(residual)]
    per_state, per_link, parts, by_target, by_source = list[int](), list[int](), *(list[np.ndarray]() for _ in range(3))
    numbers = list[np.ndarray]()
    for t, a in enumerate(active):
        driven = bool((every or t == 0) and (a & sensory).any())
        read = bool((sums or t == steps - 1) and (a & output).any())
        held = a | (sensory & driven) | (output & read)
        numbers.append(np.flatnonzero(held))
        per_state += [len(numbers[t]), int(a.sum()), num_sensory * driven, num_output * read]
    for t in range(steps - 1):
        found, kept, edges = _link(source, target, active[t : t + 2], numbers[t : t + 2], residual)
        per_link += [len(edges[0]), len(kept[0])]
        parts += found + kept
        by_target.append(edges[0])
        by_source.append(edges[1])
    index = torch.from_numpy(np.concatenate(parts + by_target + by_source).astype(np.int32))
    return RecurrencePlan(index, (*head, *per_state, *per_link))


def _reach(
    start: np.ndarray, source: np.ndarray, target: np.ndarray, steps: int, *, keep: bool, also: np.ndarray | None
) -> list[np.ndarray]:
    """What is reached after 0, 1, … steps along the edges; `also` is at every step, and with `keep` nothing is lost."""
    found = [start]
    for _ in range(steps - 1):
        after = np.zeros_like(start)
        after[target[found[-1][source]]] = True
        if keep:
            after |= found[-1]
        if also is not None:
            after |= also
        found.append(after)
    return found


def _shortest(sensory: np.ndarray, output: np.ndarray, source: np.ndarray, target: np.ndarray) -> str:
    """How many steps would do."""
    reached = sensory.copy()
    for steps in range(1, len(sensory) + 1):
        if (reached & output).any():
            return f"must be {steps} or more for this wiring"
        before = reached.sum()
        reached[target[reached[source]]] = True
        if reached.sum() == before:
            break
    return "no path leads from a sensory to an output neuron of this wiring"


def _link(
    source: np.ndarray, target: np.ndarray, active: list[np.ndarray], numbers: list[np.ndarray], residual: bool
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The pieces of a `Link`, and its edges' numbers in both orders."""
    (before, after), places = numbers, [np.full(len(a), -1) for a in active]
    for place, ids in zip(places, numbers, strict=True):
        place[ids] = np.arange(len(ids))
    edges = np.flatnonzero(active[0][source] & active[1][target])
    columns, rows = places[0][source[edges]], places[1][target[edges]]  # rows ascend, as edges are sorted by post
    by_source = np.argsort(columns, kind="stable")
    kept = np.flatnonzero(active[0] & active[1]) if residual else before[:0]
    matrices = [_pointers(rows, len(after)), columns, _pointers(columns[by_source], len(before)), rows[by_source]]
    return matrices, [place[kept] for place in places], [edges, edges[by_source]]


def _pointers(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
