r"""Mamba-3's scan, by the trapezoidal rule: $h_t = \alpha_t h_{t-1} + \beta_t x_{t-1} B_{t-1}^T + \gamma_t x_t B_t^T$.

Source: arXiv 2603.15569. With alpha = e^(Delta A), beta = (1 - lambda) Delta alpha and gamma = lambda Delta, an
interval of time weighs what stands at both of its ends; lambda = 1 is the rule of Mamba-2, `ssd`.

It is one `ssd` and not two: token s adds to h_t by its own gamma and by the beta of token s + 1, and from there on both
decay as one. With k_t = h_t - gamma_t x_t B_t^T, all of h_t but what token t itself adds,
k_t = alpha_t (k_{t-1} + (gamma_{t-1} + (1 - lambda_t) Delta_t) x_{t-1} B_{t-1}^T),
y_t = k_t C_t + (gamma_t B_t . C_t + D) x_t: a scan of inputs that come one token late. Nothing is subtracted, and no
token reads of a later one, whose rounding errors a scan of inputs that know the next step size would hand back.
Where a sequence begins in a packed row, its first token takes no input from the one before.

So it has the kernels of `ssd`, in Triton too. They get inputs in the dtype of the states: nothing is rounded twice.
"""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._scan import check_seq_idx, check_shape, state_dtype
from archzoo.kernels.ssd import ssd

State = tuple[Tensor, Tensor, Tensor]
"""h (batch, H, P, N), and B (batch, H, N) and x (batch, H, P) of the last token."""


def trapezoidal_ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, State]:
    """The definition, step by step, with the arguments of `trapezoidal_ssd`; chunks play no part."""
    wide = state_dtype(x)
    u, dt, A, trap, B, C = (t.to(wide) for t in (x, dt, A, trap, B, C))
    h, B_before, x_before = (t.to(wide) for t in (_no_state(x, B) if initial_state is None else initial_state))
    ys = []
    for t in range(x.shape[1]):
        alpha = torch.exp(dt[:, t] * A[:, t])
        beta, gamma = (1 - trap[:, t]) * dt[:, t] * alpha, trap[:, t] * dt[:, t]
        h = _by(alpha) * h + _by(beta) * _outer(x_before, B_before)
        if seq_idx is not None and t > 0:
            h = h.masked_fill((seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None, None], 0)
        h = h + _by(gamma) * _outer(u[:, t], B[:, t])
        ys.append((h * C[:, t].unsqueeze(2)).sum(-1))
        B_before, x_before = B[:, t], u[:, t]
    y = torch.stack(ys, 1) if ys else u * 0
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * u
    out = y.to(x.dtype)
    return (out, (h, B_before, x_before)) if return_final_state else out


def _no_state(x: Tensor, B: Tensor) -> State:
    (batch, _, heads, width), states = x.shape, B.shape[3]
    zeros = x.new_zeros(batch, heads, width, states, dtype=state_dtype(x))
    return zeros, B.new_zeros(batch, heads, states), x.new_zeros(batch, heads, width)


def _outer(x: Tensor, B: Tensor) -> Tensor:
    return x.unsqueeze(-1) * B.unsqueeze(-2)


def _by(coefficient: Tensor) -> Tensor:
    """(batch, H) in a shape that broadcasts to states."""
    return coefficient[..., None, None]


@overload
def trapezoidal_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    initial_state: State | None = None,
    return_final_state: Literal[False] = False,
    seq_idx: Tensor | None = None,
) -> Tensor: ...


@overload
def trapezoidal_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    initial_state: State | None = None,
    return_final_state: Literal[True],
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, State]: ...


def trapezoidal_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = 64,
    D: Tensor | None = None,
    initial_state: State | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, State]:
    r"""The scan of Mamba-3: for each batch and head a state (P, N) with one decay.

    With alpha_t = exp(dt_t A_t), beta_t = (1 - trap_t) dt_t alpha_t and gamma_t = trap_t dt_t:
    h_t = alpha_t h_{t-1} + beta_t x_{t-1} B_{t-1}^T + gamma_t x_t B_t^T; y_t = h_t C_t + D x_t.
    Every gradient is there, also through the final state and into the initial one. Under autocast nothing is rounded:
    tensors are taken as they come.

    Args:
        x: (batch, L, H, P), real floating point, of any strides, as all that follows.
        dt: (batch, L, H), step sizes Delta, positive.
        A: (batch, L, H); negative, or states grow without bound.
        trap: (batch, L, H), the weight lambda, from 0 to 1, of the later end of an interval.
        B: (batch, L, H, N).
        C: As B.
        chunk_size: Number of steps in a chunk; the result depends on it by rounding alone, and L may be any.
        D: (H,), weight of x itself.
        initial_state: h (batch, H, P, N), B (batch, H, N) and x (batch, H, P) of the token before the first; None:
            zeros.
        return_final_state: Whether to return such a state of the last token too.
        seq_idx: (batch, L), integers: where they change, a sequence begins, which nothing of those before reaches. The
            initial state belongs to the first.

    Returns:
        out (batch, L, H, P) in the dtype of x, and if asked for the last state: h in float32, or float64 where x is,
        with B and x in their own dtypes.

    Raises:
        ValueError: If a shape or dtype does not fit x, or chunk_size is no whole number, 1 or more; the message names
            the argument. As `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    _check(x, dt, A, trap, B, C, D, initial_state, seq_idx)
    length, wide = x.shape[1], state_dtype(x)
    h_before, B_before, x_before = _no_state(x, B) if initial_state is None else initial_state
    dt, trap = dt.to(wide), trap.to(wide)
    log_alpha, gamma = dt * A.to(wide), trap * dt
    # One token more than there are, the one before the first: h_0 has its gamma.
    gammas = F.pad(gamma, (0, 0, 1, 0))
    xs = torch.cat([x_before.to(x.dtype).unsqueeze(1), x], 1)
    Bs = torch.cat([B_before.to(B.dtype).unsqueeze(1), B], 1)
    late = torch.exp(log_alpha) * (gammas[:, :length] + (1 - trap) * dt)
    if seq_idx is not None:
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[:, :length]
        late = late.masked_fill(begins.unsqueeze(-1), 0)
    y, k = ssd(
        late.unsqueeze(-1) * xs[:, :length],
        torch.ones_like(log_alpha),  # late and log_alpha hold the step sizes
        log_alpha,
        Bs[:, :length],
        C,
        chunk_size=chunk_size,
        initial_state=None if initial_state is None else h_before,
        return_final_state=True,
        seq_idx=seq_idx,
    )
    own = gamma * (B.to(wide) * C.to(wide)).sum(-1)
    if D is not None:
        own = own + D.to(wide)
    out = torch.addcmul(y, own.unsqueeze(-1), x.to(wide)).to(x.dtype)
    if not return_final_state:
        return out
    x_last, B_last = xs[:, -1].clone(), Bs[:, -1].clone()  # views would keep those of all tokens
    return out, (torch.addcmul(k, _by(gammas[:, -1]), _outer(x_last.to(wide), B_last.to(wide))), B_last, x_last)


def trapezoidal_state_update(
    state: State, x: Tensor, dt: Tensor, A: Tensor, trap: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """One step of `trapezoidal_ssd`, for decoding: advances the three tensors of the state in place.

    Differentiable: where gradients are on, the old state is copied first, so that many steps can be trained through.
    Arithmetic is float32 at least. Arguments are not checked, which would take a tenth of a step's time.

    Args:
        state: As `initial_state` of `trapezoidal_ssd`; updated in place.
        x: (batch, H, P).
        dt: (batch, H), and so are A and trap.
        A: As `dt`.
        trap: As `dt`.
        B: (batch, H, N).
        C: As B.
        D: (H,).

    Returns:
        y (batch, H, P), of the dtype of x.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, state[0].dtype), torch.float32)
    u, dt, A, trap, B_wide, C = (t.to(wide) for t in (x, dt, A, trap, B, C))
    h, B_before, x_before = (t.to(wide, copy=torch.is_grad_enabled()) for t in state)
    alpha, gamma = torch.exp(dt * A), trap * dt
    beta = (1 - trap) * dt * alpha
    late = (beta.unsqueeze(-1) * x_before).unsqueeze(-1), B_before.unsqueeze(-2)
    own = (gamma.unsqueeze(-1) * u).unsqueeze(-1), B_wide.unsqueeze(-2)
    if torch.is_grad_enabled():
        new = torch.addcmul(torch.addcmul(_by(alpha) * h, *late), *own)
    else:
        new = h.mul_(_by(alpha)).addcmul_(*late).addcmul_(*own)
    for old, value in zip(state, (new, B, x), strict=True):
        old.copy_(value)
    y = (new * C.unsqueeze(-2)).sum(-1)  # no product of matrices: autocast would round it
    return torch.addcmul(y, D.to(wide).unsqueeze(-1), u).to(x.dtype)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    trap: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: State | None,
    seq_idx: Tensor | None,
) -> None:
    """A ValueError that names the argument, unless all fit x; what else `ssd` refuses it refuses itself."""
    if x.dim() != 4 or 0 in x.shape[2:] or not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and {x.dtype}: must be (batch, L, H, P), H and P at least 1, and real "
            "floating point"
        )
    batch, length, heads, width = x.shape
    if B.dim() != 4 or B.shape[:3] != (batch, length, heads) or B.shape[3] < 1 or not B.is_floating_point():
        raise ValueError(
            f"B of shape {tuple(B.shape)} and {B.dtype}: must be (batch, L, H, N) = ({batch}, {length}, {heads}, N), N "
            "at least 1, and real floating point"
        )
    h, B_before, x_before = (None, None, None) if initial_state is None else initial_state
    token = (batch, length, heads)
    for name, t, shape in (
        ("dt", dt, token),
        ("A", A, token),
        ("trap", trap, token),
        ("C", C, tuple(B.shape)),
        ("D", D, (heads,)),
        ("initial_state[0]", h, (batch, heads, width, B.shape[3])),
        ("initial_state[1]", B_before, (batch, heads, B.shape[3])),
        ("initial_state[2]", x_before, (batch, heads, width)),
    ):
        check_shape(name, t, shape)
    check_seq_idx(seq_idx, batch, length)
