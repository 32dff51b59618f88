# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `bpu_recurrence`: one step along the edges of a connectome, forwards or backwards.

A program sums one neuron's row, for a tile of the batch: it gathers the states of some edges at once, weighs and adds
them, then does to the sum all that the step owes it: the neuron's own state (`residual`), what enters or is read there,
and the ReLU or its gradient. So a step reads states and writes them, and nothing else. Floor: the gathers, 4 B bytes an
edge from L2; above a batch of about 64 the dense blocks of `bpu_recurrence`, on tensor cores, take less.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._bpu_plan import Link, rows_of
from archzoo.kernels._triton import accumulator, cdiv, launch, span


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["pointers_ptr", "columns_ptr"])
def _step_kernel(
    pointers_ptr, columns_ptr, weights_ptr, h_ptr, own_ptr, added_ptr, kept_ptr, y_ptr, batch, tiles, first, count,
    BACKWARD: tl.constexpr, EDGES: tl.constexpr, BATCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    samples = span(tl.program_id(0) % tiles, BATCH)
    inside = samples < batch
    start = tl.load(pointers_ptr + row)
    end = tl.load(pointers_ptr + row + 1)
    total = tl.full((BATCH,), 0.0, ACC)
    for edge in range(start, end, EDGES):
        edges = edge + tl.arange(0, EDGES)
        columns = tl.load(columns_ptr + edges, mask=edges < end, other=0).to(tl.int64)
        weights = tl.load(weights_ptr + edges, mask=edges < end, other=0.0)
        mask = (edges < end)[:, None] & inside[None, :]
        h = tl.load(h_ptr + columns[:, None] * batch + samples[None, :], mask=mask, other=0.0)
        total += tl.sum(weights[:, None] * h, 0)
    if own_ptr is not None:
        own = tl.load(own_ptr + row).to(tl.int64)
        total += tl.load(h_ptr + own * batch + samples, mask=inside & (own >= 0), other=0.0)
    if added_ptr is not None:
        there = (row >= first) & (row < first + count)
        total += tl.load(added_ptr + (row - first) * batch + samples, mask=inside & there, other=0.0)
    at = row * batch + samples
    if BACKWARD:
        total = tl.where(tl.load(kept_ptr + at, mask=inside, other=0) != 0, total, 0.0)
    else:
        total = tl.where(total < 0, 0.0, total)
        if kept_ptr is not None:
            tl.store(kept_ptr + at, total != 0, mask=inside)
    tl.store(y_ptr + at, total, mask=inside)


@triton.jit
def _weight_gradient_kernel(
    rows_ptr, columns_ptr, h_ptr, g_ptr, dw_ptr, edges, batch,
    EDGES: tl.constexpr, BATCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    own = span(tl.program_id(0), EDGES)
    rows = tl.load(rows_ptr + own, mask=own < edges, other=0).to(tl.int64)
    columns = tl.load(columns_ptr + own, mask=own < edges, other=0).to(tl.int64)
    products = tl.full((EDGES, BATCH), 0.0, ACC)
    for start in range(0, batch, BATCH):
        samples = start + tl.arange(0, BATCH)
        mask = (own < edges)[:, None] & (samples < batch)[None, :]
        h = tl.load(h_ptr + columns[:, None] * batch + samples[None, :], mask=mask, other=0.0)
        products += h * tl.load(g_ptr + rows[:, None] * batch + samples[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + own, tl.sum(products, 1), mask=own < edges)


def forward_step(
    link: Link, weights: Tensor, h: Tensor, entering: Tensor | None, residual: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """relu(W h + own state + what enters the first neurons), (targets, B), and with `keep` where it is not 0.

    Args:
        link: The edges.
        weights: Of them, by target, in the dtype of h.
        h: States before (sources, B), float32 or float64, contiguous, as all that follows.
        entering: (S, B), or None.
        residual: Whether a neuron's own state is added.
        keep: Whether to return the second.
    """
    own = _origin(link.kept_target, link.kept_source, link.targets) if residual else None
    kept = h.new_empty(link.targets, h.shape[1], dtype=torch.bool) if keep else None
    matrix = link.target_rows, link.target_columns, weights
    return _step(matrix, link.targets, h, own, entering, 0, kept, False), kept


def backward_step(link: Link, weights: Tensor, g: Tensor, kept: Tensor, added: Tensor | None, residual: bool) -> Tensor:
    """The gradient in front of the ReLU of the step before (sources, B), from that of this one (targets, B).

    Args:
        link: The edges.
        weights: Of them, by source, in the dtype of g.
        g: (targets, B).
        kept: Of the step before (sources, B): its states, or where they are not 0.
        added: What else comes to the last neurons (O, B), or None.
        residual: Whether a neuron's own state was added.
    """
    own = _origin(link.kept_source, link.kept_target, link.sources) if residual else None
    first = 0 if added is None else link.sources - len(added)
    matrix = link.source_rows, link.source_columns, weights
    return _step(matrix, link.sources, g, own, added, first, kept, True)


def weight_gradient(link: Link, h: Tensor, g: Tensor) -> Tensor:
    """sum_b h[pre_e, b] g[post_e, b] of each edge e, by target, for h (sources, B) and g (targets, B)."""
    dw = h.new_empty(link.edges)
    blocks = WEIGHT.of(h, link.edges, h.shape[1])
    launch(
        _weight_gradient_kernel, (cdiv(link.edges, blocks["EDGES"]),),
        rows_of(link.target_rows, link.edges), link.target_columns, h, g, dw, link.edges, h.shape[1],
        ACC=accumulator(h.dtype), **blocks,
    )  # fmt: skip
    return dw


def _origin(places: Tensor, neurons: Tensor, count: int) -> Tensor:
    """Of `count` neurons the place of each in the other step's, -1 where it is not there."""
    return torch.full((count,), -1, dtype=torch.int32, device=places.device).index_put_((places,), neurons)


def _step(
    matrix: tuple[Tensor, Tensor, Tensor],
    rows: int,
    h: Tensor,
    own: Tensor | None,
    added: Tensor | None,
    first: int,
    kept: Tensor | None,
    backward: bool,
) -> Tensor:
    batch = h.shape[1]
    y = h.new_empty(rows, batch)
    blocks = (BACKWARD if backward else FORWARD).of(h, rows, batch)
    tiles = cdiv(batch, blocks["BATCH"])
    launch(
        _step_kernel, (rows * tiles,),
        *matrix, h, own, added, kept, y, batch, tiles, first, 0 if added is None else len(added),
        BACKWARD=backward, ACC=accumulator(h.dtype), **blocks,
    )  # fmt: skip
    return y


def _rule(dtype: torch.dtype, rows: int, batch: int) -> Blocks:
    """1024 gathers at once, in rows of 128 bytes or more where the batch has them."""
    width = min(batch, 64)
    return {"EDGES": min(64, 1024 // width), "BATCH": width, "num_warps": 1 if batch <= 4 else 4}


def _candidates(dtype: torch.dtype, rows: int, batch: int) -> list[Blocks]:
    return [
        {"EDGES": edges, "BATCH": width, "num_warps": warps}
        for width in (32, 64, 128, 256)
        for edges in (8, 16, 32)
        for warps in (1, 2, 4)
        if width <= max(32, batch) and edges * width <= 2048
    ]


def _weight_rule(dtype: torch.dtype, edges: int, batch: int) -> Blocks:
    return {"EDGES": max(1, 1024 // min(batch, 64)), "BATCH": min(batch, 64), "num_warps": 4}


def _random_link(device: Any, rows: int) -> Link:
    """As many neurons on both sides, each with 20 edges, of its neighbours."""
    pointers = torch.arange(rows + 1, dtype=torch.int32, device=device) * 20
    columns = (torch.arange(20 * rows, device=device) * 7919 % rows).int()
    kept = torch.arange(rows, dtype=torch.int32, device=device)
    return Link(rows, rows, 20 * rows, pointers, columns, pointers, columns, kept, kept)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """States are float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _forward_problem(dtype: torch.dtype, device: Any, rows: int, batch: int) -> Any:
    link, h = _random_link(device, rows), torch.rand(rows, batch, dtype=_wide(dtype), device=device)
    weights = torch.randn(link.edges, dtype=h.dtype, device=device)
    return lambda: forward_step(link, weights, h, h[: rows // 4], True, True)


def _backward_problem(dtype: torch.dtype, device: Any, rows: int, batch: int) -> Any:
    link, g = _random_link(device, rows), torch.rand(rows, batch, dtype=_wide(dtype), device=device)
    weights = torch.randn(link.edges, dtype=g.dtype, device=device)
    kept = torch.ones(rows, batch, dtype=torch.bool, device=device)
    return lambda: (
        backward_step(link, weights, g, g, g[: rows // 8], True),
        backward_step(link, weights, g, kept, None, False),
    )


def _weight_problem(dtype: torch.dtype, device: Any, edges: int, batch: int) -> Any:
    link, h = _random_link(device, edges // 20), torch.rand(edges // 20, batch, dtype=_wide(dtype), device=device)
    return lambda: weight_gradient(link, h, h)


_SIZES = [(2240, 1), (2240, 64)]  # neurons of the larva that a late step computes

FORWARD = BlockSizes("bpu_recurrence", _rule, _candidates, _forward_problem, _SIZES)
BACKWARD = BlockSizes("bpu_recurrence_backward", _rule, _candidates, _backward_problem, _SIZES)
WEIGHT = BlockSizes("bpu_recurrence_weight", _weight_rule, _candidates, _weight_problem, [(44800, 1), (44800, 64)])
TUNED = (FORWARD, BACKWARD, WEIGHT)
