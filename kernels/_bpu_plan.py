"""Which neurons and edges of a recurrence can matter at which step: what `bpu_recurrence` computes, and no more.

States are 0 before the drive and f(0) = 0, so that at step t a neuron matters only if the drive can have reached it,
and if what it says can still reach what is read. Both are found once, by walking the edges forwards and backwards, and
hold for any weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from archzoo.kernels._numpy import np

_HEAD, _PER_STATE, _PER_LINK = 7, 3, 2


@dataclass(frozen=True, eq=False)
class RecurrencePlan:
    """Sets of neurons and sparse patterns of all steps, as an op takes them.

    Attributes:
        index: All indices, one behind the other, int32.
        layout: The sizes by which they are told apart.
    """

    index: Tensor
    layout: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """The edges between the neurons of one step and those of the next, as two sparse matrices of the same edges."""

    sources: int
    targets: int
    target_rows: Tensor
    """CSR row pointers of (targets, sources)."""
    target_columns: Tensor
    target_edges: Tensor
    """Number of each edge in the connectome, in the order of this matrix."""
    source_rows: Tensor
    """The same of the transpose, (sources, targets)."""
    source_columns: Tensor
    source_edges: Tensor
    kept_source: Tensor
    """Neurons of both steps, by their place in the first; of use with `residual`."""
    kept_target: Tensor

    @property
    def edges(self) -> int:
        """Number of edges."""
        return self.target_edges.numel()


@dataclass(frozen=True)
class State:
    """The neurons that are computed at one step, in ascending order: sensory ones first, output ones last."""

    neurons: int
    driven: Tensor
    """Places in the sensory pool of those that the drive enters at this step, which are the first ones."""
    read: Tensor
    """Places in the output pool of those that are read at this step, which are the last ones."""


class Unpacked:
    """A plan's sets and patterns, as views of its index."""

    def __init__(self, index: Tensor, layout: list[int] | tuple[int, ...]):
        self.steps, self.num_sensory, self.num_output, every, residual, sums, _ = layout[:_HEAD]
        self.every, self.residual, self.sums = bool(every), bool(residual), bool(sums)
        ends = _HEAD + _PER_STATE * self.steps
        sizes = _segments(layout)
        parts = iter(index.split(sizes))
        self.states = [State(layout[at], next(parts), next(parts)) for at in range(_HEAD, ends, _PER_STATE)]
        self.links = [
            Link(before.neurons, after.neurons, *(next(parts) for _ in range(8)))
            for before, after in zip(self.states, self.states[1:], strict=False)
        ]

    @property
    def widest(self) -> int:
        """The largest number of neurons of a step."""
        return max(state.neurons for state in self.states)


def state_sizes(layout: list[int] | tuple[int, ...]) -> list[int]:
    """Neurons of each step."""
    return [int(n) for n in layout[_HEAD : _HEAD + _PER_STATE * layout[0] : _PER_STATE]]


def link_sizes(layout: list[int] | tuple[int, ...]) -> list[int]:
    """Edges between each step and the next."""
    return [int(n) for n in layout[_HEAD + _PER_STATE * layout[0] :: _PER_LINK]]


def _segments(layout: list[int] | tuple[int, ...]) -> list[int]:
    """Lengths of the pieces of the index."""
    steps = layout[0]
    at = _HEAD + _PER_STATE * steps
    sizes = list[int]()
    for t in range(steps):
        sizes += layout[_HEAD + _PER_STATE * t + 1 : _HEAD + _PER_STATE * (t + 1)]
    neurons = state_sizes(layout)
    for t in range(steps - 1):
        edges, kept = layout[at + _PER_LINK * t : at + _PER_LINK * (t + 1)]
        sizes += [neurons[t + 1] + 1, edges, edges, neurons[t] + 1, edges, edges, kept, kept]
    return sizes


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
    numbers = [np.flatnonzero(a) for a in active]
    head = [steps, num_sensory, num_output, int(every), int(residual), int(sums), total]
    per_state, per_link, parts = list[int](), list[int](), list[np.ndarray]()
    for t, ids in enumerate(numbers):
        driven = ids[ids < num_sensory] if every or t == 0 else ids[:0]
        read = ids[ids >= total - num_output] - (total - num_output) if sums or t == steps - 1 else ids[:0]
        per_state += [len(ids), len(driven), len(read)]
        parts += [driven, read]
    for t in range(steps - 1):
        found = _link(source, target, numbers[t], numbers[t + 1], total, residual)
        per_link += [len(found[1]), len(found[6])]
        parts += found
    index = torch.from_numpy(np.concatenate(parts).astype(np.int32))
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
    source: np.ndarray, target: np.ndarray, before: np.ndarray, after: np.ndarray, total: int, residual: bool
) -> list[np.ndarray]:
    """The pieces of a `Link`."""
    place_before, place_after = np.full(total, -1), np.full(total, -1)
    place_before[before], place_after[after] = np.arange(len(before)), np.arange(len(after))
    edges = np.flatnonzero((place_before[source] >= 0) & (place_after[target] >= 0))
    columns, rows = place_before[source[edges]], place_after[target[edges]]  # rows ascend, as edges are sorted by post
    by_source = np.argsort(columns, kind="stable")
    kept = np.intersect1d(before, after) if residual else before[:0]
    return [
        _pointers(rows, len(after)),
        columns,
        edges,
        _pointers(columns[by_source], len(before)),
        rows[by_source],
        edges[by_source],
        place_before[kept],
        place_after[kept],
    ]


def _pointers(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
