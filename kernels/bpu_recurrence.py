r"""The recurrence of a connectome, $h_{t+1} = \mathrm{relu}(h_t W + [E_t, 0, 0])$, on the few neurons that can matter.

W is sparse and made of E weights; what is computed at each step is `archzoo.kernels._bpu_plan`'s to say. States are
held as (neurons, batch), so that a neuron's row is contiguous, and each step is a sparse matrix of the edges between
two sets of neurons times the state. Kept for the backward pass is one byte a neuron and sample, for whether it is above
0; with a gradient of the weights, the states. Arithmetic is float32 at least. 2 B FLOPs an edge and step forward, the
same backward, and as many again for the weights. There is no Triton kernel yet: a GPU takes dense blocks.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._bpu_plan import Link, RecurrencePlan, Unpacked, link_sizes, plan_recurrence, state_sizes
from archzoo.kernels._op import (
    compute_dtype,
    differentiable_gradients,
    flop_formula,
    plain_eager,
    under_transform,
    without_autocast,
)

__all__ = ["BACKENDS", "RecurrencePlan", "bpu_recurrence", "bpu_recurrence_reference", "plan_recurrence"]

BACKENDS = ("auto", "sparse", "dense")
_DENSE_NEURONS = 4096  # up to so many neurons a step, a GPU multiplies dense blocks as fast as it gathers rows
_CHUNK = 2**18  # elements of a block of edges x samples, for the gradient of the weights
_NOTHING, _SIGNS, _STATES = range(3)  # what is kept for the backward pass


def bpu_recurrence_reference(
    drive: Tensor,
    weight: Tensor,
    pre: Tensor,
    post: Tensor,
    pool_sizes: tuple[int, int, int],
    steps: int,
    *,
    inject: str = "first",
    residual: bool = False,
    readout: str = "last",
) -> Tensor:
    """The definition, in plain torch: every neuron at every step.

    Args:
        drive: (B, S), what enters the sensory neurons.
        weight: (E,), of the edges.
        pre: (E,), int64: the edge's presynaptic neuron.
        post: (E,), int64: its postsynaptic one.
        pool_sizes: Numbers of sensory, internal and output neurons, in whose order neurons are numbered.
        steps: Number T of updates from a state of zeros.
        inject: `"first"`: the drive enters at the first update only. `"every"`.
        residual: h <- f(h + h W + E) instead of f(h W + E).
        readout: `"last"`: the output neurons' state after the last update. `"sum"`: the sum over all updates.

    Returns:
        (B, O) in the dtype of the drive.
    """
    wide = compute_dtype(drive, weight)
    num_sensory, _, num_output = pool_sizes
    w = weight.to(wide)
    entering = F.pad(drive.to(wide), (0, sum(pool_sizes) - num_sensory))
    h = torch.zeros_like(entering)
    read = h[:, h.shape[1] - num_output :]
    for t in range(steps):
        total = torch.zeros_like(h).index_add(1, post, h[:, pre] * w)
        if residual:
            total = total + h
        if t == 0 or inject == "every":
            total = total + entering
        h = torch.relu(total)
        state = h[:, h.shape[1] - num_output :]
        read = read + state if readout == "sum" else state
    return read.to(drive.dtype)


def _rows(pointers: Tensor, edges: int) -> Tensor:
    """The row of every entry of a CSR matrix."""
    counts = pointers.diff()
    return torch.arange(len(counts), device=pointers.device).repeat_interleave(counts, output_size=edges)


class _Matrix:
    """The edges of a link as a matrix (targets, sources), which is multiplied from the left, it or its transpose."""

    def __init__(self, link: Link, weight: Tensor, dense: bool):
        self.link, self.weight, self.dense = link, weight, dense
        self.block: Tensor | None = None

    def places(self) -> Tensor:
        """Of the edges in the dense matrix, flattened."""
        link = self.link
        return _rows(link.target_rows, link.edges) * link.sources + link.target_columns

    def forward(self, h: Tensor) -> Tensor:
        """(targets, B) of h (sources, B)."""
        link = self.link
        if self.dense:
            return self._dense() @ h
        return self._sparse(link.target_rows, link.target_columns, link.target_edges, h)

    def backward(self, g: Tensor) -> Tensor:
        """(sources, B) of g (targets, B)."""
        link = self.link
        if self.dense:
            return self._dense().t() @ g
        return self._sparse(link.source_rows, link.source_columns, link.source_edges, g)

    def _dense(self) -> Tensor:
        if self.block is None:
            link = self.link
            block = self.weight.new_zeros(link.targets * link.sources)
            self.block = block.index_put_((self.places(),), self.weight[link.target_edges]).view(
                link.targets, link.sources
            )
        return self.block

    def _sparse(self, rows: Tensor, columns: Tensor, edges: Tensor, x: Tensor) -> Tensor:
        """Sums of weighted rows of x: torch's sparse matrices take two to three times as long for it on a CPU."""
        if not edges.numel() or not x.numel():
            return x.new_zeros(rows.numel() - 1, x.shape[1])
        weights = self.weight.index_select(0, edges)
        return F.embedding_bag(columns, x, rows, mode="sum", per_sample_weights=weights, include_last_offset=True)

    def add_weight_gradient(self, dw: Tensor, h: Tensor, g: Tensor) -> None:
        """dw_e += sum_b h[pre_e, b] g[post_e, b], for h (sources, B) and g (targets, B)."""
        link = self.link
        edges = link.target_edges.long()
        if self.dense:
            dw.index_add_(0, edges, (g @ h.t()).flatten()[self.places()])
            return
        rows, size = _rows(link.target_rows, link.edges), max(1, _CHUNK // max(1, h.shape[1]))
        for start in range(0, link.edges, size):
            part = slice(start, start + size)
            pairs = h[link.target_columns[part]].mul_(g[rows[part]])
            dw.index_add_(0, edges[part], pairs.sum(1))


@without_autocast
def _forward(
    drive: Tensor, weight: Tensor, index: Tensor, layout: Sequence[int], keep: int, dense: bool
) -> tuple[Tensor, Tensor]:
    """y (B, O) in the drive's dtype, and what the backward pass needs: states, or whether they are above 0."""
    plan, wide, batch = Unpacked(index, tuple(layout)), compute_dtype(drive, weight), drive.shape[0]
    w = weight.to(wide)
    saved = _kept(drive, weight, layout, keep)
    entering = drive.t().to(wide)
    y = torch.zeros(plan.num_output, batch, dtype=wide, device=drive.device)
    h, at = entering[:0], 0
    for t, state in enumerate(plan.states):
        if t == 0:
            h = entering.index_select(0, state.driven).contiguous()
        else:
            link = plan.links[t - 1]
            before, h = h, _Matrix(link, w, dense).forward(h)
            if plan.residual:
                h.index_add_(0, link.kept_target, before.index_select(0, link.kept_source))
            if plan.every:
                h[: state.driven.numel()] += entering.index_select(0, state.driven)
        h = h.relu_()
        if keep != _NOTHING:
            saved[at : at + h.numel()].view(h.shape).copy_(h)  # as a truth value where only signs are kept
            at += h.numel()
        if state.read.numel():
            y.index_add_(0, state.read, h[state.neurons - state.read.numel() :])
    return y.t().to(drive.dtype, memory_format=torch.contiguous_format, copy=True), saved


@without_autocast
def _backward(
    dy: Tensor,
    weight: Tensor,
    saved: Tensor,
    index: Tensor,
    layout: Sequence[int],
    dense: bool,
    need_drive: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of drive and weight. What is not needed is not computed, and comes back with no elements."""
    plan, wide, batch = Unpacked(index, tuple(layout)), compute_dtype(dy, weight), dy.shape[0]
    w = weight.to(wide)
    dread = dy.t().to(wide).contiguous()
    dx = torch.zeros(plan.num_sensory if need_drive else 0, batch, dtype=wide, device=dy.device)
    dw = torch.zeros(w.shape if need_weight else (0,), dtype=wide, device=dy.device)
    g = torch.zeros(plan.states[-1].neurons, batch, dtype=wide, device=dy.device)
    at = saved.numel()
    for t in reversed(range(plan.steps)):
        state = plan.states[t]
        if state.read.numel():
            g[state.neurons - state.read.numel() :] += dread.index_select(0, state.read)
        at -= g.numel()
        here = saved[at : at + g.numel()].view(g.shape)
        g = _through_relu(g, here)
        if need_drive and state.driven.numel():
            dx.index_add_(0, state.driven, g[: state.driven.numel()])
        if t:
            link, neurons = plan.links[t - 1], plan.states[t - 1].neurons
            matrix = _Matrix(link, w, dense)
            if need_weight:
                matrix.add_weight_gradient(dw, saved[at - neurons * batch : at].view(neurons, batch), g)
            after, g = g, matrix.backward(g)
            if plan.residual:
                g.index_add_(0, link.kept_source, after.index_select(0, link.kept_target))
    return dx.t().to(dy.dtype, memory_format=torch.contiguous_format, copy=True), dw.to(weight.dtype, copy=True)


def _through_relu(g: Tensor, kept: Tensor) -> Tensor:
    """The gradient in front of a ReLU. Products with bool tensors take torch seven times as long as this detour."""
    if kept.dtype == torch.bool:
        return g.mul_(kept.view(torch.uint8).to(g.dtype))
    return torch.ops.aten.threshold_backward(g, kept, 0)


def _kept(drive: Tensor, weight: Tensor, layout: Sequence[int], keep: int) -> Tensor:
    """Memory for what is kept, of all steps one behind the other."""
    count = 0 if keep == _NOTHING else sum(state_sizes(tuple(layout))) * drive.shape[0]
    return drive.new_empty(count, dtype=compute_dtype(drive, weight) if keep == _STATES else torch.bool)


bpu_recurrence_op = torch.library.custom_op("archzoo::bpu_recurrence", mutates_args=())(_forward)
bpu_recurrence_backward_op = torch.library.custom_op("archzoo::bpu_recurrence_backward", mutates_args=())(_backward)


@bpu_recurrence_op.register_fake
def _(
    drive: Tensor, weight: Tensor, index: Tensor, layout: Sequence[int], keep: int, dense: bool
) -> tuple[Tensor, Tensor]:
    return drive.new_empty(drive.shape[0], layout[2]), _kept(drive, weight, layout, keep)


@bpu_recurrence_backward_op.register_fake
def _(
    dy: Tensor,
    weight: Tensor,
    saved: Tensor,
    index: Tensor,
    layout: Sequence[int],
    dense: bool,
    need_drive: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    sensory = layout[1] if need_drive else 0
    return dy.new_empty(dy.shape[0], sensory), weight.new_empty(weight.shape if need_weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    drive, weight, index, ctx.layout, _, ctx.dense = inputs
    ctx.save_for_backward(drive, weight, index, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, dsaved: Tensor | None) -> tuple[Tensor | None, ...]:
    drive, weight, index, saved = ctx.saved_tensors
    needed = tuple(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():  # create_graph=True
        definition = functools.partial(_plain, index=index, layout=ctx.layout)
        return *differentiable_gradients(definition, dy, (drive, weight), needed), None, None, None, None
    backward: Callable[..., Any] = _backward if plain_eager(dy) else bpu_recurrence_backward_op
    found = backward(dy, weight, saved, index, ctx.layout, ctx.dense, *needed)
    return *(g if need else None for g, need in zip(found, needed, strict=True)), None, None, None, None


bpu_recurrence_op.register_autograd(_gradients, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs as much as a short recurrence's arithmetic."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dsaved: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, dsaved)


def _plain(drive: Tensor, weight: Tensor, index: Tensor, layout: Sequence[int]) -> Tensor:
    """The same on the same sets, in operations that torch can differentiate again and again."""
    plan, wide = Unpacked(index, tuple(layout)), compute_dtype(drive, weight)
    entering, w = drive.t().to(wide), weight.to(wide)
    y = entering.new_zeros(plan.num_output, drive.shape[0])
    h = entering[:0]
    for state, entries in zip(plan.states, _entries(plan), strict=True):
        if entries is None:
            total = entering.index_select(0, state.driven)
        else:
            link, rows = entries
            terms = w.index_select(0, link.target_edges).unsqueeze(1) * h.index_select(0, link.target_columns)
            total = entering.new_zeros(state.neurons, drive.shape[0]).index_add(0, rows, terms)
            if plan.residual:
                total = total.index_add(0, link.kept_target, h.index_select(0, link.kept_source))
            if plan.every:
                first = torch.arange(state.driven.numel(), device=index.device)
                total = total.index_add(0, first, entering.index_select(0, state.driven))
        h = torch.relu(total)
        if state.read.numel():
            y = y.index_add(0, state.read, h[state.neurons - state.read.numel() :])
    return y.t().to(drive.dtype)


def _entries(plan: Unpacked) -> Iterator[tuple[Link, Tensor] | None]:
    yield None
    for link in plan.links:
        yield link, _rows(link.target_rows, link.edges)


@flop_formula(torch.ops.archzoo.bpu_recurrence)
def _flops(drive: Any, weight: Any, index: Any, layout: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * drive[0] * sum(link_sizes(tuple(layout))))


@flop_formula(torch.ops.archzoo.bpu_recurrence_backward)
def _backward_flops(
    dy: Any,
    weight: Any,
    saved: Any,
    index: Any,
    layout: Any,
    dense: bool,
    need_drive: bool,
    need_weight: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    return (1 + need_weight) * _flops(dy, weight, index, layout)


def bpu_recurrence(drive: Tensor, weight: Tensor, plan: RecurrencePlan, *, backend: str = "auto") -> Tensor:
    """The states of the output neurons after T updates h <- relu(h W + [E, 0, 0]) from h = 0.

    Args:
        drive: E (*, S), real floating point.
        weight: Of the edges (E,), in the order in which the plan was made.
        plan: From `plan_recurrence`, which also says at which steps the drive enters and states are read; its index on
            the drive's device.
        backend: `"sparse"`: sums along edges. `"dense"`: blocks of W. `"auto"`: sparse, but on a GPU dense up to 4,096
            neurons a step.

    Returns:
        (*, O) in the drive's dtype, also under autocast.

    Raises:
        ValueError: If a shape, a dtype or the backend does not fit.
    """
    layout = plan.layout
    if drive.dim() == 0 or drive.shape[-1] != layout[1] or not drive.is_floating_point():
        raise ValueError(
            f"drive of shape {tuple(drive.shape)} and {drive.dtype}: must be (*, {layout[1]}) and floating point"
        )
    if weight.dim() != 1 or not weight.is_floating_point():
        raise ValueError(f"weight of shape {tuple(weight.shape)} and {weight.dtype}: must be (E,) and floating point")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(map(repr, BACKENDS))}")
    rows = drive.reshape(-1, layout[1])
    if under_transform():
        y = _plain(rows, weight, plan.index, layout)
    else:
        dense = backend == "dense" or (
            backend == "auto" and drive.is_cuda and max(state_sizes(layout)) <= _DENSE_NEURONS
        )
        keep = _NOTHING
        if torch.is_grad_enabled():
            keep = _STATES if weight.requires_grad else _SIGNS if drive.requires_grad else _NOTHING
        op = _Eager.apply if plain_eager(drive) else bpu_recurrence_op
        y, _ = op(rows, weight, plan.index, list(layout), keep, dense)
    return y.view(*drive.shape[:-1], layout[2])
