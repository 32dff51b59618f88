r"""The state space dual of Mamba-2: $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t x_t B_t^T$, $y_t = h_t C_t + D x_t$.

Source: arXiv 2405.21060. One decay a head, where `selective_scan` has one a channel and state: so a chunk of Q steps is
matrix products (`_ssd.py`). With cs the sums of Delta A in a chunk and H the state before it,
Y = (C B^T o L) (Delta x) + e^cs C H, where L_ts = e^(cs_t - cs_s) for t >= s and 0 above, masked before the exp;
behind the chunk the state is e^cs_end H + sum_s e^(cs_end - cs_s) Delta_s x_s B_s^T. No exponent is above 0.

Kept for the backward pass are the inputs and the state before each chunk, E N / Q numbers, for E = batch L H P inputs
and N states. Backward makes a chunk's decays again. It adds in one order: equal runs give equal bits (with an equal
number of threads, which sets how many chunks go together). Arithmetic is float32, or float64 where x is.

FLOPs of the products: forward 2 E (Q + 2 N), and 2 batch L G Q N for the scores C B^T of G groups; backward 2 E (2 Q +
5 N) and three times the scores, and where there is a gate 2 E (Q + N) more. Linear in L.

Under `torch.func` transforms, and for gradients of gradients, the definition takes the op's place; inside
`use_backend("triton")` they raise.

Triton's kernels (`_ssd_triton.py`) keep states before chunks in the dtype of their products: bfloat16 where x, B and C
are, or else that of the states. They are bound by memory: of each of E inputs, forward moves x twice and out, and
writes and reads N / Q numbers of states. In bfloat16 with N = 2 Q, as in Mamba-2, that is 14 E bytes, of which 4 E are
the least that any algorithm moves; backward 32 E.
"""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._op import DifferentiableOp, empty_if, flop_formula, under_transform, without_autocast
from archzoo.kernels._scan import state_dtype
from archzoo.kernels._ssd import Gradients, Options, Problem, Slab, check_ssd, product_dtype, triton_steps

_NO_LIMIT = (0.0, math.inf)


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, step by step, with the arguments of `ssd`; chunks play no part. Autograd keeps every state."""
    (batch, length, heads, width), wide = x.shape, state_dtype(x)
    steps, delta = x.to(wide), dt.to(wide)
    if dt_bias is not None:
        delta = delta + dt_bias.to(wide)
    if dt_softplus:
        delta = F.softplus(delta)
    delta = delta.clamp(*dt_limit)
    decay = torch.exp(delta * A.to(wide))
    inputs = delta.unsqueeze(-1) * steps
    B, C = (t.to(wide).repeat_interleave(heads // t.shape[2], 2).unsqueeze(3) for t in (B, C))  # (batch, L, H, 1, N)
    h = x.new_zeros(batch, heads, width, B.shape[-1], dtype=wide) if initial_state is None else initial_state.to(wide)
    ys = []
    for t in range(length):
        a = decay[:, t, :, None, None]
        if seq_idx is not None and t > 0:
            a = a.masked_fill((seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None, None], 0)
        h = a * h + inputs[:, t].unsqueeze(-1) * B[:, t]
        ys.append((h * C[:, t]).sum(-1))
    y = torch.stack(ys, 1) if ys else steps * 0
    if D is not None:
        y = y + (D if D.dim() == 2 else D.unsqueeze(-1)).to(wide) * steps
    if z is not None:
        y = y * F.silu(z.to(wide))
    out = y.to(x.dtype)
    return (out, h) if return_final_state else out


# --- The op -----------------------------------------------------------------------------------------------------------


def _outputs(x: Tensor, B: Tensor, C: Tensor, chunk_size: int, triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what the op returns."""
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    chunks = -(-length // chunk_size)
    kept = product_dtype(x, B, C) if triton else state_dtype(x)
    borders = x.new_empty(batch, chunks, groups, states, heads // groups * width, dtype=kept)
    return x.new_empty(x.shape), x.new_empty(batch, heads, width, states, dtype=state_dtype(x)), borders


@without_autocast
@torch.no_grad()
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """out in x's dtype, the final state (batch, H, P, N), and the states before chunks, all contiguous."""
    options = Options(chunk_size, dt_softplus, dt_min, dt_max)
    out, final, borders = _outputs(x, B, C, chunk_size, triton)
    if triton:
        from archzoo.kernels import _ssd_triton

        _ssd_triton.forward(
            _ssd_triton.Problem(x, dt, A, B, C, D, dt_bias, seq_idx, options), z, initial_state, out, final, borders
        )
        return out, final, borders
    problem = Problem(x, dt, A, B, C, D, z, dt_bias, seq_idx, options)
    for rows in problem.rows():
        state = problem.flat_state(initial_state, rows)
        for span, steps in problem.spans(rows):
            slab, border = Slab(problem, rows, span, steps), borders[rows, span]
            state = slab.states(state, border)
            y = slab.outputs(border)
            if z is not None:
                y.mul_(F.silu(slab.tokens(z).to(y.dtype)))
            slab.tokens(out).copy_(y)
        problem.states_of(final, rows).copy_(state.view(problem.states_of(final, rows).shape))
    return out, final, borders


@without_autocast
@torch.no_grad()
def _backward(
    dout: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    borders: Tensor,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    needed: list[bool],
    triton: bool = False,
) -> list[Tensor]:
    """Gradients of x to seq_idx, in that order; those not needed, or of what is None, come back empty."""
    options = Options(chunk_size, dt_softplus, dt_min, dt_max)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    if triton:
        from archzoo.kernels import _ssd_backward_triton, _ssd_triton

        call = _ssd_triton.Problem(x, dt, A, B, C, D, dt_bias, seq_idx, options)
        found = _ssd_backward_triton.backward(call, dout, dfinal, inputs, borders, needed)
    else:
        problem = Problem(x, dt, A, B, C, D, z, dt_bias, seq_idx, options)
        gradients = Gradients(problem, inputs, needed[:-1])
        for rows in problem.rows():
            after = problem.flat_state(dfinal, rows)
            for span, steps in reversed(problem.spans(rows)):
                slab = Slab(problem, rows, span, steps)
                after = gradients.add(slab, dout, borders[rows, span], after)
            if gradients.initial_state is not None:
                start = problem.states_of(gradients.initial_state, rows)
                start.copy_(after.view(start.shape))
        found = gradients.results()
    return [*found, empty_if(False, seq_idx, x)]


def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, B, C, chunk_size, triton)


def _definition(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """The definition, with the op's arguments."""
    y, final = ssd_reference(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=(dt_min, dt_max),
        initial_state=initial_state,
        return_final_state=True,
        seq_idx=seq_idx,
    )
    return y, final


ssd_op = DifferentiableOp("ssd", _forward, _backward, fake=_fake, definition=_definition, tensors=10, kept=1)


# --- What it costs ----------------------------------------------------------------------------------------------------


def _products(x: Any, B: Any, chunk_size: int) -> tuple[int, int, int]:
    """FLOPs of one product with the chunks' own decays, of one with their states, and of one q x q a group."""
    batch, length, heads, width = x
    whole, rest = divmod(length, chunk_size)
    pairs = batch * (whole * chunk_size**2 + rest**2)
    return 2 * pairs * heads * width, 2 * batch * length * heads * width * B[3], 2 * pairs * B[2] * B[3]


@flop_formula(torch.ops.archzoo.ssd)
def _flops(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    dt_bias: Any,
    initial_state: Any,
    seq_idx: Any,
    chunk_size: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    within, states, scores = _products(x, B, chunk_size)
    return int(within + 2 * states + scores)


@flop_formula(torch.ops.archzoo.ssd_backward)
def _backward_flops(
    dout: Any,
    dfinal: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    dt_bias: Any,
    initial_state: Any,
    seq_idx: Any,
    borders: Any,
    chunk_size: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    within, states, scores = _products(x, B, chunk_size)
    return int(2 * within + 5 * states + 3 * scores + (0 if z is None else within + states))


# --- Public -----------------------------------------------------------------------------------------------------------


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    initial_state: Tensor | None = None,
    return_final_state: Literal[False] = False,
    seq_idx: Tensor | None = None,
) -> Tensor: ...


@overload
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    initial_state: Tensor | None = None,
    return_final_state: Literal[True],
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The scan of Mamba-2: for each batch and head a state (P, N) with one decay.

    Delta_t = dt_t + dt_bias, then softplus if asked for, then clamped;
    h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T; y_t = h_t C_t + D x_t; out_t = y_t silu(z_t).
    Every gradient is there, also through the final state and into the initial one. Under autocast nothing is rounded:
    tensors are taken as they come.

    Args:
        x: (batch, L, H, P), real floating point, of any strides, as all that follows.
        dt: (batch, L, H), step sizes before bias and softplus.
        A: (H,), or (batch, L, H) where it differs between tokens; negative, or states grow without bound.
        B: (batch, L, G, N), where head h has group h // (H / G).
        C: As B.
        chunk_size: Number Q of steps in a chunk; the result depends on it by rounding alone, and L may be any. Triton's
            kernels take the next power of two below, from 16 to 64, or 32 in float64.
        D: (H,) or (H, P), weight of x itself.
        z: As x, gate.
        dt_bias: (H,), added to dt in the dtype of the states.
        dt_softplus: Whether a softplus makes Delta positive.
        dt_limit: Least and largest Delta; also without softplus none is below 0, unless the first is.
        initial_state: (batch, H, P, N), the state before the first step; None: zeros.
        return_final_state: Whether to return the last state too.
        seq_idx: (batch, L), integers: where they change, the state is reset to zero. The first step never resets.

    Returns:
        out (batch, L, H, P) in the dtype of x, and if asked for the last state (batch, H, P, N), which is float32, or
        float64 where x is.

    Raises:
        ValueError: If a shape or dtype does not fit x, chunk_size is no whole number, 1 or more, or dt_limit no two
            numbers in order; the message names the argument. As `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    check_ssd(x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_limit, initial_state, seq_idx)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    numbers = (dt_softplus, float(dt_limit[0]), float(dt_limit[1]))
    if under_transform():
        refuse_triton("ssd", "a torch.func transform")
        out, final = _definition(*tensors, int(chunk_size), *numbers)
    else:
        floating = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
        triton = takes_triton("ssd", x.numel() * B.shape[-1], **floating, initial_state=initial_state)
        steps = triton_steps(x, int(chunk_size)) if triton else int(chunk_size)
        out, final = ssd_op(*tensors, steps, *numbers, triton)
    return (out, final) if return_final_state else out
