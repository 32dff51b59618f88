r"""The recurrence of a connectome, $h_{t+1} = \mathrm{relu}(h_t W + [E_t, 0, 0])$, on the few neurons that can matter.

W is sparse and made of E weights; what is computed at each step is `archzoo.kernels._bpu_plan`'s to say. States are
held as (neurons, batch), so that a neuron's row is contiguous, and each step is a sparse matrix of the edges between
two sets of neurons times the state. Kept for the backward pass is one byte a neuron and sample, for whether it is above
0; the states with a gradient of the weights, and on a CPU while they are few. Arithmetic is float32 at least. 2 B FLOPs
an edge and step forward, the same backward, and as many again for the weights.

On a GPU a small batch takes a Triton kernel a step along the edges, of which ReLU and drive are a part; a large one, of
which the gathers would take longer than the products by zeros, takes dense blocks of W, plain products of matrices.
Under `torch.func` transforms, and for gradients of gradients, plain torch takes the op's place; inside
`use_backend("triton")` they raise.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._bpu_plan import (
    Link,
    RecurrencePlan,
    Unpacked,
    held_sizes,
    link_sizes,
    plan_recurrence,
    rows_of,
)
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
_DENSE_NEURONS = 4096  # up to so many neurons a step, dense blocks fit a GPU well
_DENSE_BATCH = 64  # above it a GPU multiplies them faster than it gathers rows; by rooflines, not measured
_FORMS = ("sparse", "dense", "triton", "by batch")
"""How a step is computed: sums of rows by torch, products of dense blocks, the Triton kernel, or one of these two: the
op itself then looks at the batch, so that a graph with a dynamic one holds no guard on it."""

_CHUNK = 2**18  # elements of a block of edges x samples, for the gradient of the weights
_FEW_STATES = 2**20  # up to so many a CPU keeps them rather than their signs, which it reads slowly; 4 MiB
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


def _sums(rows: Tensor, columns: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """A CSR matrix times x, as sums of weighted rows: torch's sparse matrices take half as long again on a CPU."""
    if not columns.numel() or not x.numel():
        return x.new_zeros(rows.numel() - 1, x.shape[1])
    return torch.embedding_bag(x, columns, rows, False, 0, False, weights, True, None)[0]


def _places(link: Link) -> Tensor:
    """Of a link's edges in the dense matrix (targets, sources), flattened."""
    return rows_of(link.target_rows, link.edges) * link.sources + link.target_columns


def _block(link: Link, weights: Tensor) -> Tensor:
    """The dense matrix (targets, sources)."""
    block = weights.new_zeros(link.targets * link.sources)
    return block.index_put_((_places(link),), weights).view(link.targets, link.sources)


def _settled(form: str, batch: int) -> str:
    return form if form != "by batch" else "dense" if batch > _DENSE_BATCH else "triton"


def _kernels() -> Any:
    """The Triton kernels, imported late as they import triton."""
    from archzoo.kernels import _bpu_recurrence_triton

    return _bpu_recurrence_triton


def _weight_gradient(link: Link, h: Tensor, g: Tensor, form: str) -> Tensor:
    """sum_b h[pre_e, b] g[post_e, b] of each edge e, for h (sources, B) and g (targets, B)."""
    if form == "triton":
        return _kernels().weight_gradient(link, h, g)
    if form == "dense":
        return (g @ h.t()).flatten()[_places(link)]
    found = g.new_empty(link.edges)
    rows, size = rows_of(link.target_rows, link.edges), max(1, _CHUNK // max(1, h.shape[1]))
    for start in range(0, link.edges, size):
        part = slice(start, start + size)
        torch.sum(h[link.target_columns[part]].mul_(g[rows[part]]), 1, out=found[part])
    return found


@without_autocast
def _forward(
    drive: Tensor, weight: Tensor, plan: Unpacked, keep: int, form: str, weights: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """y (B, O) in the drive's dtype, and of each step what the backward pass needs: states, or if they are above 0.

    `weights` are those of the links, by target, where somebody has them in the widest dtype.
    """
    wide, form = compute_dtype(drive, weight), _settled(form, len(drive))
    entering = drive.t().to(wide).contiguous()
    if weights is None:
        weights = weight.to(wide).index_select(0, plan.target_edges).split(plan.link_edges)
    kept = list[Tensor]()
    h = y = entering[:0]
    for t, state in enumerate(plan.states):
        signs = None
        if t == 0:
            h = torch.relu(entering[: state.driven])  # not in place: it may be the caller's memory
        elif form == "triton":
            added = entering if state.driven else None
            h, signs = _kernels().forward_step(
                plan.links[t - 1], weights[t - 1], h, added, plan.residual, keep == _SIGNS
            )
        else:
            link, before = plan.links[t - 1], h
            if form == "dense":
                h = _block(link, weights[t - 1]) @ before
            else:
                h = _sums(link.target_rows, link.target_columns, weights[t - 1], before)
            if plan.residual:
                h.index_add_(0, link.kept_target, before.index_select(0, link.kept_source))
            if state.driven:
                h[: state.driven] += entering
            h.relu_()
        if keep:
            kept.append(h if keep == _STATES else h != 0 if signs is None else signs)
        if state.read:
            read = h[state.neurons - state.read :]
            y = y + read if len(y) else read
    # A copy, for y may be a part of the last state, and is its owner's to overwrite.
    return y.t().to(drive.dtype, copy=keep == _STATES), kept


@without_autocast
def _backward(
    dy: Tensor,
    weight: Tensor,
    kept: Sequence[Tensor],
    plan: Unpacked,
    form: str,
    need_drive: bool,
    need_weight: bool,
    weights: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of drive and weight. What is not needed is not computed, and comes back with no elements."""
    wide, form = compute_dtype(dy, weight), _settled(form, len(dy))
    w, dread = weight.to(wide), dy.t().to(wide).contiguous()
    if weights is None:
        weights = w.index_select(0, plan.target_edges if form == "dense" else plan.source_edges).split(plan.link_edges)
    dx, dw = dread[:0], [w[:0]]
    g = _through_relu(dread[: plan.neurons[-1]], kept[-1])  # at the last step only outputs matter, if any
    for t in reversed(range(plan.steps)):
        if plan.states[t].driven and need_drive:
            entered = g[: plan.states[t].driven]
            dx = dx + entered if len(dx) else entered
        if t == 0:
            break
        link, after, before = plan.links[t - 1], g, plan.states[t - 1]
        if need_weight:
            dw.append(_weight_gradient(link, kept[t - 1], after, form))
        if form == "triton":
            added = dread if before.read else None
            g = _kernels().backward_step(link, weights[t - 1], after, kept[t - 1], added, plan.residual)
            continue
        if form == "dense":
            g = _block(link, weights[t - 1]).t() @ after
        else:
            g = _sums(link.source_rows, link.source_columns, weights[t - 1], after)
        if plan.residual:
            g.index_add_(0, link.kept_source, after.index_select(0, link.kept_target))
        if before.read:
            g[before.neurons - before.read :] += dread
        g = _through_relu(g, kept[t - 1])
    dweight = w.new_zeros(w.shape if need_weight else (0,))
    if need_weight:
        dweight.index_add_(0, plan.target_edges, torch.cat(dw[::-1]))
    return dx.t().to(dy.dtype), dweight.to(weight.dtype)


def _through_relu(g: Tensor, kept: Tensor) -> Tensor:
    """The gradient in front of a ReLU. Products with bool tensors take torch three times as long as this detour."""
    if kept.dtype == torch.bool:
        return kept.to(g.dtype).mul_(g)
    return torch.ops.aten.threshold_backward(g, kept, 0)


def _kept(drive: Tensor, weight: Tensor, neurons: list[int], keep: int) -> Tensor:
    """Memory for what is kept (neurons, B), of all steps one behind the other."""
    count = 0 if keep == _NOTHING else sum(neurons)
    dtype = compute_dtype(drive, weight) if keep == _STATES else torch.bool
    return drive.new_empty(count, drive.shape[0], dtype=dtype)


@torch.library.custom_op("archzoo::bpu_recurrence", mutates_args=())
def bpu_recurrence_op(
    drive: Tensor, weight: Tensor, index: Tensor, layout: Sequence[int], keep: int, form: str
) -> tuple[Tensor, Tensor]:
    """The recurrence, as an op that compilers and counters see."""
    sets = Unpacked(index, layout)
    y, kept = _forward(drive, weight, sets, keep, form)
    return y, torch.cat(kept) if kept else _kept(drive, weight, sets.neurons, keep)


@torch.library.custom_op("archzoo::bpu_recurrence_backward", mutates_args=())
def bpu_recurrence_backward_op(
    dy: Tensor,
    weight: Tensor,
    saved: Tensor,
    index: Tensor,
    layout: Sequence[int],
    form: str,
    need_drive: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Its gradients."""
    sets = Unpacked(index, layout)
    dx, dweight = _backward(dy, weight, saved.split(sets.neurons), sets, form, need_drive, need_weight)
    return dx.clone(memory_format=torch.contiguous_format), dweight


@bpu_recurrence_op.register_fake
def _(
    drive: Tensor, weight: Tensor, index: Tensor, layout: Sequence[int], keep: int, form: str
) -> tuple[Tensor, Tensor]:
    return drive.new_empty(layout[2], drive.shape[0]).t(), _kept(drive, weight, held_sizes(layout), keep)


@bpu_recurrence_backward_op.register_fake
def _(
    dy: Tensor,
    weight: Tensor,
    saved: Tensor,
    index: Tensor,
    layout: Sequence[int],
    form: str,
    need_drive: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    sensory = layout[1] if need_drive else 0
    return dy.new_empty(dy.shape[0], sensory), weight.new_empty(weight.shape if need_weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    drive, weight, index, ctx.layout, _, ctx.form = inputs
    ctx.save_for_backward(drive, weight, output[1], index)
    ctx.mark_non_differentiable(output[1])


def _op_gradients(ctx: Any, dy: Tensor, dsaved: Tensor | None) -> tuple[Tensor | None, ...]:
    found: Sequence[Tensor | None]
    drive, weight, saved, index = ctx.saved_tensors
    plan, needed = RecurrencePlan(index, tuple(ctx.layout)), tuple(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():  # create_graph=True
        refuse_triton("bpu_recurrence", "a gradient of a gradient")
        found = _gradients_again(dy, drive, weight, plan, needed)
    else:
        found = bpu_recurrence_backward_op(dy, weight, saved, index, ctx.layout, ctx.form, *needed)
    return *(g if need else None for g, need in zip(found, needed, strict=True)), None, None, None, None


def _gradients_again(
    dy: Tensor, drive: Tensor, weight: Tensor, plan: RecurrencePlan, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    return differentiable_gradients(functools.partial(_plain, plan=plan), dy, (drive, weight), needed)


bpu_recurrence_op.register_autograd(_op_gradients, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The op without the dispatcher, which costs as much as a short recurrence's arithmetic."""

    @staticmethod
    def forward(ctx: Any, drive: Tensor, weight: Tensor, plan: RecurrencePlan, keep: int, form: str) -> Tensor:
        by_target, ctx.weights = None, None
        if not (weight.requires_grad or form != "sparse" or drive.is_cuda) and weight.dtype == compute_dtype(
            drive, weight
        ):
            by_target, ctx.weights = plan.arranged(weight)
        y, kept = _forward(drive, weight, plan.unpacked, keep, form, by_target)
        ctx.plan, ctx.form = plan, form
        ctx.save_for_backward(drive, weight, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        drive, weight, *kept = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():  # create_graph=True
            refuse_triton("bpu_recurrence", "a gradient of a gradient")
            found: Sequence[Tensor | None] = _gradients_again(dy, drive, weight, ctx.plan, needed)
        else:
            found = _backward(dy, weight, kept, ctx.plan.unpacked, ctx.form, needed[0], needed[1], ctx.weights)
        return *(g if need else None for g, need in zip(found, needed, strict=True)), None, None, None


def _plain(drive: Tensor, weight: Tensor, plan: RecurrencePlan) -> Tensor:
    """The same on the same sets, in operations that torch can differentiate again and again."""
    sets, wide = Unpacked(plan.index, plan.layout), compute_dtype(drive, weight)
    entering = drive.t().to(wide)
    weights = weight.to(wide).index_select(0, sets.target_edges).split(sets.link_edges)
    y = entering.new_zeros(sets.num_output, drive.shape[0])
    h = entering[:0]
    for t, state in enumerate(sets.states):
        total = entering.new_zeros(state.neurons, drive.shape[0])
        if t:
            link = sets.links[t - 1]
            terms = weights[t - 1].unsqueeze(1) * h.index_select(0, link.target_columns)
            total = total.index_add(0, rows_of(link.target_rows, link.edges), terms)
            if sets.residual:
                total = total.index_add(0, link.kept_target, h.index_select(0, link.kept_source))
        if state.driven:
            total = total + F.pad(entering, (0, 0, 0, state.neurons - state.driven))
        h = torch.relu(total)
        if state.read:
            y = y + h[state.neurons - state.read :]
    return y.t().to(drive.dtype)


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
    form: str,
    need_drive: bool,
    need_weight: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    return (1 + need_weight) * _flops(dy, weight, index, layout)


def _form(rows: Tensor, weight: Tensor, layout: Sequence[int], backend: str) -> str:
    """One of `_FORMS`."""
    if backend == "dense":
        return "dense"
    triton = takes_triton("bpu_recurrence", drive=rows, weight=weight)
    if backend == "sparse" or not rows.is_cuda or max(held_sizes(layout)) > _DENSE_NEURONS:
        return "triton" if triton else "sparse"
    return "by batch" if triton else "dense"


def bpu_recurrence(drive: Tensor, weight: Tensor, plan: RecurrencePlan, *, backend: str = "auto") -> Tensor:
    """The states of the output neurons after T updates h <- relu(h W + [E, 0, 0]) from h = 0.

    Args:
        drive: E (*, S), real floating point.
        weight: Of the edges (E,), in the order in which the plan was made.
        plan: From `plan_recurrence`, which also says at which steps the drive enters and states are read; its index on
            the drive's device.
        backend: `"sparse"`: sums along edges. `"dense"`: blocks of W, by torch. `"auto"`: sparse, but on a GPU dense
            for a batch above 64 and up to 4,096 neurons a step.

    Returns:
        (*, O) in the drive's dtype, also under autocast.

    Raises:
        ValueError: If a shape, a dtype or the backend does not fit; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
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
        refuse_triton("bpu_recurrence", "a torch.func transform")
        y = _plain(rows, weight, plan)
    else:
        form = _form(rows, weight, layout, backend)
        keep = _NOTHING
        if torch.is_grad_enabled() and (weight.requires_grad or drive.requires_grad):
            keep = _STATES if weight.requires_grad else _SIGNS
        if plain_eager(drive):
            if keep == _SIGNS and drive.is_cpu and len(rows) * sum(held_sizes(layout)) <= _FEW_STATES:
                keep = _STATES
            y = _Eager.apply(rows, weight, plan, keep, form)
        else:
            y, _ = bpu_recurrence_op(rows, weight, plan.index, list(layout), keep, form)
    return y.reshape(*drive.shape[:-1], layout[2])
