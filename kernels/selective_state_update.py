r"""One step of the selective scan, for decoding: $h \leftarrow e^{\Delta A} h + \Delta B x$, $y = C h + D x$, in place.

In plain torch a step is a dozen small operators, bound by their calls; the Triton kernel is one, bound by memory: the
state is read and written once. Where a gradient is asked for, Triton takes `selective_scan` at length 1, which the step
equals. The same function serves Mamba (state (batch, d, N)) and Mamba-2 (state (batch, heads, P, N)).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._backend import refuse_triton, takes_triton, wants_triton
from archzoo.kernels._op import cast, plain_eager, under_transform, without_autocast
from archzoo.kernels._scan import check_shape
from archzoo.kernels.selective_scan import selective_scan

_NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    r"""Advances the state by a step, in place, and returns the output.

    Delta = dt + dt_bias, then softplus if asked for; state = exp(Delta A) state + Delta B x;
    out = (C state + D x) silu(z). Differentiable: where a gradient is asked for, the old state is copied first, so that
    many steps can be trained through. Arithmetic is float32 at least.

    Args:
        state: (batch, d, N), or with heads (batch, H, P, N); updated in place.
        x: (batch, d), or (batch, H, P).
        dt: As x.
        A: (d, N), or (H, P, N), real.
        B: (batch, N), or (batch, G, N) where channel c has group c // (d / G), and head h has group h // (H / G).
        C: As B.
        D: (d,), or (H, P).
        z: As x.
        dt_bias: As D.
        dt_softplus: Whether a softplus makes Delta positive.

    Returns:
        out, of the shape and dtype of x.

    Raises:
        ValueError: If a shape or dtype does not fit the state; the message names the argument; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    if state.dim() not in (3, 4) or not state.is_floating_point():
        raise ValueError(
            f"state of shape {tuple(state.shape)} and {state.dtype}: must be (batch, d, N) or (batch, H, P, N), "
            "and real floating point"
        )
    if A.is_complex():
        raise ValueError(f"A of {A.dtype}: must be real; no released model has a complex one")
    shape = state.shape
    each, channels, (batch, d, N) = shape[:-1], shape[1:-1], (shape[0], shape[1], shape[-1])
    check_shape("x", x, each)
    check_shape("dt", dt, each)
    check_shape("A", A, shape[1:])
    check_shape("D", D, channels)
    check_shape("z", z, each)
    check_shape("dt_bias", dt_bias, channels)
    for name, t in (("B", B), ("C", C)):
        G = t.shape[1] if t.dim() == 3 else 1
        if t.shape not in ((batch, N), (batch, G, N)) or G < 1 or d % G or not t.is_floating_point():
            raise ValueError(
                f"{name} of shape {tuple(t.shape)} and {t.dtype}: must be (batch, N) = {(batch, N)} or (batch, G, N) "
                f"with G a divisor of {d}, and real floating point"
            )
    return state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    from archzoo.kernels import _selective_state_update_triton

    return _selective_state_update_triton.update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


_update_op = torch.library.custom_op("archzoo::selective_state_update", _update, mutates_args=("state",))


@_update_op.register_fake
def _(state: Tensor, x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


def _by_scan(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """A scan of one step, from a copy of the state, with heads as groups of channels."""
    batch, *channels, N = state.shape
    d = math.prod(channels)

    def steps(t: Tensor) -> Tensor:
        return t.expand(batch, *channels).reshape(batch, d, 1)

    def vector(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(channels).reshape(d)

    y, last = selective_scan(
        steps(x.double() if state.dtype == torch.float64 else x),
        steps(dt),
        A.expand(*channels, N).reshape(d, N),
        B.unsqueeze(-1),
        C.unsqueeze(-1),
        vector(D),
        None if z is None else steps(z),
        vector(dt_bias),
        dt_softplus,
        return_last_state=True,
        initial_state=state.reshape(batch, d, N).clone(),
    )
    state.copy_(last.view(state.shape))
    return y.view(x.shape).to(x.dtype)


@without_autocast
def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """`selective_state_update` of arguments that fit, or broadcast: checks take a tenth of a step's time."""
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if under_transform():
        refuse_triton("selective_state_update", "a torch.func transform")
    elif wants_triton(state) and takes_triton("selective_state_update", **dict(zip(_NAMES, tensors, strict=True))):
        if trains:
            return _by_scan(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        update = _update if plain_eager(x) else torch.ops.archzoo.selective_state_update
        out: Tensor = update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        return out
    wide = torch.promote_types(torch.promote_types(x.dtype, state.dtype), torch.float32)
    x_wide, delta = cast(x, wide), cast(dt, wide)
    if dt_bias is not None:
        delta = delta + dt_bias
    if dt_softplus:
        delta = F.softplus(delta)
    a = (delta.unsqueeze(-1) * cast(A, wide)).exp_()
    scaled, by_group = (delta * x_wide).unsqueeze(-1), _by_group(cast(B, wide), state)
    if trains:
        new = torch.addcmul(a * state.clone(), scaled, by_group)  # the copy is what the backward pass reads
        state.copy_(new)
    elif state.dtype == wide:
        new = state.mul_(a).addcmul_(scaled, by_group)
    else:
        new = torch.addcmul(a * state, scaled, by_group)
        state.copy_(new)
    y = _sum_over_states(new, cast(C, wide))
    if D is not None:
        y = torch.addcmul(y, x_wide, cast(D, wide))
    if z is not None:
        y = y * F.silu(cast(z, wide))
    return cast(y, x.dtype)


def _by_group(t: Tensor, state: Tensor) -> Tensor:
    """B or C (batch, N) or (batch, G, N), in a shape that broadcasts to the state's."""
    if t.dim() == 3 and t.shape[1] > 1:
        t = t.repeat_interleave(state.shape[1] // t.shape[1], 1)
    elif t.dim() == 2:
        t = t.unsqueeze(1)
    return t if state.dim() == 3 else t.unsqueeze(2)


def _sum_over_states(state: Tensor, C: Tensor) -> Tensor:
    if state.dim() == 3 and (C.dim() == 2 or C.shape[1] == 1):
        return torch.bmm(state, C.unsqueeze(-1) if C.dim() == 2 else C.mT).squeeze(-1)
    return (state * _by_group(C, state)).sum(-1)
