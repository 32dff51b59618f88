r"""The selective scan of Mamba: $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t$, $y_t = C_t h_t + D u_t$.

Source: arXiv 2312.00752. E = batch d L inputs and N states a channel make E N states. Neither they nor the decays ever
exist at once: tiles of batch and channels are walked one by one, and in a tile blocks of 16 steps. In a block the
decays are one product and one exp, the inputs one product, each step one `addcmul_`, and sums over states or channels
`bmm` (`_scan.py`). Kept for the backward pass are the inputs and the state before each block, E N / 16 numbers;
backward walks the blocks from the last to the first, makes a block's states again, and runs the adjoint recurrence
G_t = C_t g_t + a_{t+1} G_{t+1}.

No decay is ever divided by, and no product of decays is formed: sums of Delta A reach -1e5. Recurrence, softplus, exp
and sums are float32, or float64 where u is. Sums have one order, so equal runs give equal bits (with an equal number of
threads, which sets the size of a tile).

FLOPs: 9 E N forward, as commonly counted (an exp is one); 20 E N backward, with the states made again.
Time and memory beside others: `benchmarks/mamba_speed.py`.

The Triton kernel walks time too, with the states of a block of channels in registers, and makes the states again from
the same borders; where batch and channels are few it also cuts time into segments. It is bound by exp2: E N of them
forward, at 16 a clock and multiprocessor, and by E N times 12 products and sums backward.

Under `torch.func` transforms, and for gradients of gradients, the definition takes the op's place; inside
`use_backend("triton")` they raise.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._op import DifferentiableOp, empty_if, flop_formula, under_transform, without_autocast
from archzoo.kernels._scan import (
    Block,
    Problem,
    Tile,
    check_scan,
    common_groups,
    spread,
    state_dtype,
    steps_of,
    sum_over_channels,
    sum_over_states,
)


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, step by step, with the arguments of `selective_scan`. Autograd keeps every state."""
    batch, d, length = u.shape
    wide = state_dtype(u)
    steps, decay = u.to(wide), A.to(wide)
    width = delta.to(wide)
    if delta_bias is not None:
        width = width + delta_bias.to(wide).unsqueeze(-1)
    if delta_softplus:
        width = F.softplus(width)
    weights = [_weights_of_steps(t, d, length, wide) for t in (B, C)]
    h = u.new_zeros(batch, d, A.shape[1], dtype=wide) if initial_state is None else initial_state.to(wide)
    ys = []
    for t, (u_t, width_t) in enumerate(zip(steps.unbind(-1), width.unbind(-1), strict=True)):
        a = torch.exp(width_t.unsqueeze(-1) * decay)
        if seq_idx is not None and t > 0:
            a = a.masked_fill((seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None], 0)
        h = a * h + (width_t * u_t).unsqueeze(-1) * weights[0][t]
        ys.append((weights[1][t] * h).sum(-1))
    y = torch.stack(ys, -1) if ys else steps * 0
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * steps
    if z is not None:
        y = y * F.silu(z.to(wide))
    out = y.to(u.dtype)
    return (out, h) if return_last_state else out


def _weights_of_steps(t: Tensor, d: int, length: int, dtype: torch.dtype) -> Sequence[Tensor]:
    """B or C as one tensor a step, each of which broadcasts to (batch, d, N)."""
    t = t.to(dtype)
    if t.dim() == 2:
        return [t] * length
    if t.dim() == 3:
        t = t.unsqueeze(1)
    return t.repeat_interleave(d // t.shape[1], 1).unbind(-1)


# --- The op -----------------------------------------------------------------------------------------------------------


@without_autocast
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (batch, L, d) in u's dtype, the last state (batch, d, N), and the states before blocks, all contiguous."""
    if triton:
        from archzoo.kernels import _selective_scan_triton

        return _selective_scan_triton.forward(
            u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus
        )
    problem = Problem(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus)
    out, last, borders = _outputs(u, A, B, C)
    for where in problem.tiles():
        tile = Tile(problem, where, buffers=2)
        y_tile = tile.sequence(out)
        stops = [*tile.border(borders).unbind(0), tile.state(last)]
        if initial_state is None:
            stops[0].zero_()
        else:
            stops[0].copy_(tile.state(initial_state))
        for k, time in enumerate(problem.blocks()):
            block = Block(tile, time, stops[k])
            stops[k + 1].copy_(block.last)
            y = sum_over_states(block.h, block.C, scratch=block.a)
            if tile.D is not None:
                y.addcmul_(block.u, tile.D)
            if tile.z is not None:
                y.mul_(F.silu(block.load(tile.z)))
            y_tile[time] = y
    return out, last, borders


def _outputs(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what the op returns."""
    (batch, length, d), N = u.shape, A.shape[1]
    groups = common_groups(B, C)
    wide = state_dtype(u)
    borders = u.new_empty(-(-length // steps_of(wide)), batch, groups, N, d // groups, dtype=wide)
    return u.new_empty(batch, length, d), u.new_empty(batch, d, N, dtype=wide), borders


class _Gradients:
    """Memory for the gradients that are needed; those summed over blocks are in the dtype of the states."""

    def __init__(self, problem: Problem, needed: Sequence[bool]):
        x, wide = problem, problem.dtype

        def memory(which: int, t: Tensor | None, dtype: torch.dtype, zeros: bool = True) -> Tensor | None:
            if t is None or not needed[which]:
                return None
            return (torch.zeros if zeros else torch.empty)(t.shape, dtype=dtype, device=t.device)

        self.u, self.delta = memory(0, x.u, x.u.dtype, False), memory(1, x.delta, x.delta.dtype, False)
        self.A, self.B, self.C = memory(2, x.A, wide), memory(3, x.B, wide), memory(4, x.C, wide)
        self.D, self.delta_bias = memory(5, x.D, wide), memory(7, x.delta_bias, wide)
        self.z = None if x.z is None else memory(6, x.z, x.z.dtype, False)
        self.initial_state = memory(8, x.initial_state, wide, False)

    def results(self) -> list[Tensor | None]:
        """In the order of the op's arguments."""
        return [self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.initial_state]


def _fit(gradient: Tensor | None, t: Tensor | None, dy: Tensor) -> Tensor:
    if gradient is None or t is None:
        return empty_if(False, t, dy)
    if gradient.dim() == 4 and gradient.shape != t.shape:  # B or C, spread to more groups
        gradient = gradient.unflatten(2, (t.shape[2], -1)).sum(3)
    return gradient.to(t.dtype).contiguous()


def _accumulate(total: Tensor, tile: Tile, time: slice, part: Tensor) -> None:
    """Adds a block's part of the gradient of B or C: (g, N, c) where constant, else (steps, b, g, N)."""
    if total.dim() == 2:
        tile.matrix(total).add_(part)
    else:
        total[tile.where[0], time, tile.where[1]].add_(part.transpose(0, 1))


def _block_backward(block: Block, dout: Tensor | None, carry: Tensor, found: _Gradients) -> Tensor:
    """Adds a block's part to the gradients. Takes and returns the gradient of the state behind, and before, it.

    Three buffers: decays a, states h, adjoints G; a and h are overwritten once nobody reads them any more.
    """
    tile, time, a, h = block.tile, block.time, block.a, block.h
    steps = len(a)
    G = tile.memory[2][:steps]
    dy = torch.zeros_like(block.u) if dout is None else block.load(dout)
    if tile.z is not None:
        z = block.load(tile.z)
        if found.z is not None:
            y = sum_over_states(h, block.C, scratch=G)
            if tile.D is not None:
                y.addcmul_(block.u, tile.D)
            tile.sequence(found.z)[time] = torch.ops.aten.silu_backward(y.mul_(dy), z)
        dy = dy * F.silu(z)
    if found.D is not None:
        tile.vector(found.D).add_((dy * block.u).sum((0, 1)))
    if found.C is not None:
        _accumulate(found.C, tile, time, sum_over_channels(h, dy, tile.C.dim() == 3, scratch=G))

    spread(dy, block.C, out=G)
    a_rows, G_rows = tile.rows[0], tile.rows[2]
    G_rows[steps - 1].add_(carry)
    for t in range(steps - 1, 0, -1):
        G_rows[t - 1].addcmul_(a_rows[t], G_rows[t])
    before = a_rows[0] * G_rows[0]

    if found.A is not None or found.delta is not None or found.delta_bias is not None:
        a.mul_(G)  # then times the state before each step: the gradient of log a
        a[1:].mul_(h[:-1])
        a[0].mul_(block.before)
    if found.A is not None:
        tile.matrix(found.A).add_(torch.mul(a, block.delta.unsqueeze(3), out=h).sum((0, 1)))
    if found.B is not None:
        _accumulate(found.B, tile, time, sum_over_channels(G, block.input, tile.B.dim() == 3, scratch=h))
    dinput = sum_over_states(G, block.B, scratch=h)
    if found.u is not None:
        du = block.delta * dinput
        if tile.D is not None:
            du.addcmul_(dy, tile.D)
        tile.sequence(found.u)[time] = du
    if found.delta is not None or found.delta_bias is not None:
        ddelta = a.mul_(tile.A).sum(3).addcmul_(block.u, dinput)
        if tile.problem.delta_softplus:
            ddelta = torch.ops.aten.softplus_backward(ddelta, block.raw_delta, 1, 20)
        if found.delta is not None:
            tile.sequence(found.delta)[time] = ddelta
        if found.delta_bias is not None:
            tile.vector(found.delta_bias).add_(ddelta.sum((0, 1)))
    return before


@without_autocast
def _backward(
    dout: Tensor | None,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    borders: Tensor,
    delta_softplus: bool,
    needed: list[bool],
    triton: bool = False,
) -> list[Tensor]:
    """Gradients of all tensors, in their order; those not needed, or of what is None, come back empty."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    if triton:
        from archzoo.kernels import _selective_scan_backward_triton

        found = _selective_scan_backward_triton.backward(dout, dlast, *tensors, borders, delta_softplus, needed[:9])
    else:
        found = _plain_backward(dout, dlast, Problem(*tensors, delta_softplus), borders, needed)
    dy = next(t for t in (dout, dlast) if t is not None)
    return [_fit(gradient, t, dy) for gradient, t in zip((*found, None), tensors, strict=True)]


def _plain_backward(
    dout: Tensor | None, dlast: Tensor | None, problem: Problem, borders: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of u to initial_state; B and C spread to the groups of both."""
    found = _Gradients(problem, needed)
    blocks = problem.blocks()
    for where in problem.tiles():
        tile = Tile(problem, where, buffers=3)
        border = tile.border(borders).unbind(0)
        dout_tile = None if dout is None else tile.sequence(dout)
        carry = tile.A.new_zeros(tile.memory[0].shape[1:]) if dlast is None else tile.state(dlast).contiguous()
        for k in reversed(range(len(blocks))):
            carry = _block_backward(Block(tile, blocks[k], border[k]), dout_tile, carry, found)
        if found.initial_state is not None:
            tile.state(found.initial_state).copy_(carry)
    return found.results()


def _plain(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, with the op's layout."""
    B, C = (t if t.dim() == 2 else t.permute(0, 2, 3, 1) for t in (B, C))
    y, last = selective_scan_reference(
        u.mT,
        delta.mT,
        A,
        B,
        C,
        D,
        None if z is None else z.mT,
        delta_bias,
        delta_softplus,
        True,
        initial_state=initial_state,
        seq_idx=seq_idx,
    )
    return y.mT, last


def _fake(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(u, A, B, C)


selective_scan_op = DifferentiableOp(
    "selective_scan", _forward, _backward, fake=_fake, definition=_plain, tensors=10, kept=1
)


# --- What it costs ----------------------------------------------------------------------------------------------------


@flop_formula(torch.ops.archzoo.selective_scan)
def _flops(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *args: Any, **kwargs: Any) -> int:
    batch, length, d = u
    return int(batch * length * d * (9 * A[1] + (D is not None) + (z is not None)))


@flop_formula(torch.ops.archzoo.selective_scan_backward)
def _backward_flops(dout: Any, dlast: Any, u: Any, delta: Any, A: Any, *args: Any, **kwargs: Any) -> int:
    batch, length, d = u
    return int(20 * batch * length * d * A[1])


# --- Public -----------------------------------------------------------------------------------------------------------


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: Literal[False] = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    return_last_state: Literal[True],
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The scan of a selective state space model, for each batch, channel c and state n.

    Delta_t = delta_t + delta_bias, then softplus if asked for; a_t = exp(Delta_t A[c,n]);
    h_t = a_t h_{t-1} + Delta_t B_t[n] u_t; y_t = sum_n C_t[n] h_t[n] + D[c] u_t; out_t = y_t silu(z_t).
    Every gradient is there, also through the last state and into the initial one. Under autocast nothing is rounded:
    tensors are taken as they come.

    Args:
        u: (batch, d, L), real floating point, of any strides, as all that follows. Nothing is copied as a whole,
            except by Triton in float64; channel-last storage, a (batch, L, d) transposed, is the fastest.
        delta: (batch, d, L), step sizes before bias and softplus.
        A: (d, N), real; negative, or states grow without bound.
        B: (d, N) for all steps, (batch, N, L), or (batch, G, N, L), where channel c has group c // (d / G).
        C: As B, and independent of it.
        D: (d,), weight of u itself.
        z: (batch, d, L), gate.
        delta_bias: (d,), added to delta in the dtype of the states.
        delta_softplus: Whether a softplus makes delta positive.
        return_last_state: Whether to return the last state too.
        initial_state: (batch, d, N), the state before the first step; None: zeros.
        seq_idx: (batch, L), integers: where they change, the state is reset to zero. The first step never resets.

    Returns:
        out (batch, d, L) in the dtype of u and in channel-last storage, and if asked for the last state (batch, d, N),
        which is float32, or float64 where u is.

    Raises:
        ValueError: If a shape or dtype does not fit u; the message names the argument; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)
    B, C = (t if t.dim() == 2 else (t.unsqueeze(1) if t.dim() == 3 else t).permute(0, 3, 1, 2) for t in (B, C))
    arguments = (u.mT, delta.mT, A, B, C, D, None if z is None else z.mT, delta_bias, initial_state, seq_idx)
    if under_transform():
        refuse_triton("selective_scan", "a torch.func transform")
        out, last = _plain(*arguments, delta_softplus)
    else:
        floating = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z}
        floating |= {"delta_bias": delta_bias, "initial_state": initial_state}
        triton = takes_triton("selective_scan", u.numel() * A.shape[1], **floating)
        out, last = selective_scan_op(*arguments, delta_softplus, triton)
    return (out.mT, last) if return_last_state else out.mT
