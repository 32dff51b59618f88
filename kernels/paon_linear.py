r"""Padé neurons on a linear layer's inputs (https://arxiv.org/abs/2403.11791).

With x^k the element-wise power, p_k = x^k W_k^T for k = 1 ... M, q_k = x^k V_k^T for k = 1 ... N, and the partial sums
P_m = w_0 + p_1 + ... + p_m, Q_n = 1 + q_1 + ... + q_n (P_{-1} = 0),

    N = 0        y = P_M
    smooth       y = (Q_N P_M + Q_{N-1} P_{M-1}) / (Q_N^2 + Q_{N-1}^2 + e),   e = eps if N >= 2, else 0
    absolute     y = P_M / (1 + |q_1| + ... + |q_N|)

Cost, for x (B, I) and y (B, O): M + N times a linear layer's, 2 (M + N) B I O FLOPs forward and twice that backward.
Each degree of each side is one GEMM that adds into one of at most four accumulators P_M, P_{M-1}, Q_N, Q_{N-1}
(absolute: P_M and N terms); the weights are used where they lie and the powers one at a time. So neither is ever
stacked or copied, and no per-degree output is kept (but the q_k of the absolute variant). Fewer, larger GEMMs on
stacked operands take longer on one CPU thread: by 1 - 7 % at 256 x 784 -> 128 and, from [2/2] on, by 12 - 22 % at 64 x
64 -> 30, where [1/1] would gain 5 %. Saved for the backward: x and the accumulators, none of them if N = 0.

Sums, powers and the rational function are float32 for half precision inputs, under autocast too. `torch.func`
transforms and higher derivatives go through the definition in plain torch; inside `use_backend("triton")` they raise.

Triton: one kernel makes the powers of a tile of x in registers, has all GEMMs of the smooth variant or the polynomial
share it, and applies the rational function to their float32 sums; with no gradient in sight only y is written. Its
floor are the M + N GEMMs by tensor cores: 0.147 ms for [2/1], 8192 x 768 -> 3072, bfloat16, H200. The q_k of the
absolute variant are GEMMs of their own, then one pass over them; backward one pass over the accumulators and 2 (M + N)
GEMMs. Products are of x^k in the inputs' dtype, which in float16 overflows beyond |x|^k = 65504, and what is kept has
that dtype. A smooth denominator comes near 0 from degree 3 on, and enlarges roundings: there each power's that goes
into it is one GEMM more, [3/3] takes 8 and not 6. Error of [3/3], x normal, bfloat16, of y, dx, dV: 0.002, 0.006,
0.004; without, and with 16-bit GEMMs in plain torch, 0.02, 0.05, 0.05. The other neurons do not need it.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels import _pade
from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._op import (
    DifferentiableOp,
    autocast_dtype,
    compute_dtype,
    empty_if,
    flop_formula,
    under_transform,
    without_autocast,
)


def paon_linear_reference(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None = None,
    absolute: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """The definition, in plain torch. x (*, I), numerator (M, O, I), denominator (N, O, I), bias (O,) -> (*, O)."""
    return _pade.definition(x, numerator, denominator, bias, F.linear, absolute, eps)


def _degree(weight: Any) -> int:
    """M or N, of a stack of weights or of its shape."""
    return 0 if weight is None else int(weight.shape[0] if isinstance(weight, Tensor) else weight[0])


def _accumulators(M: int, N: int, absolute: bool) -> tuple[int, int]:
    """How many sums of numerator and of denominator terms the rational function needs: saved for the backward."""
    if N == 0:
        return 0, 0
    return (min(M, 1), N) if absolute else (min(M, 2), min(N, 2))


def _powers(x: Tensor, degree: int) -> Iterator[tuple[int, Tensor]]:
    """(1, x), (2, x^2), ..., in one buffer: a power is gone when the next is asked for."""
    power = x
    for k in range(1, degree + 1):
        if k == 2:
            power = x * x
        elif k > 2:
            power.mul_(x)
        yield k, power


def _unpack(
    saved: Tensor, M: int, N: int, bias: Tensor | None
) -> tuple[Tensor, Tensor | float, Tensor, Tensor | float]:
    """P, P_low, Q, Q_low of the smooth variant; those that are constant over the batch are not among the saved."""
    p, q = saved[: min(M, 2)], saved[min(M, 2) :]
    w0 = saved.new_zeros(1) if bias is None else bias.to(saved.dtype)
    P = p[-1] if M else w0
    P_low = p[0] if M >= 2 else w0 if M == 1 else 0.0
    return P, P_low, q[-1], q[0] if N >= 2 else 1.0


def rounding_matters(dtype: torch.dtype, N: int, absolute: bool) -> bool:
    """Whether powers rounded to this dtype would spoil y, as they do where a denominator comes near 0."""
    return dtype.itemsize == 2 and N >= 3 and not absolute


def _wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for one of any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@without_autocast
@torch.no_grad()
def _forward(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    absolute: bool,
    eps: float,
    keep: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (B, O) of x (B, I), in x's dtype, and with `keep` the accumulators (S, B, O), in that of `_work_dtype`."""
    if triton:
        from archzoo.kernels import _paon_linear_triton

        return _paon_linear_triton.forward(x, numerator, denominator, bias, absolute, eps, keep)
    M, N = _degree(numerator), _degree(denominator)
    weights = [w for w in (numerator, denominator) if w is not None]
    wide, rows, columns = compute_dtype(x, *weights), x.shape[0], weights[0].shape[1]
    n_p, n_q = _accumulators(M, N, absolute)
    saved = torch.empty(n_p + n_q, rows, columns, dtype=wide, device=x.device)
    p, q = saved[:n_p].unbind(), saved[n_p:].unbind()
    if N == 0:  # y itself is the accumulator
        p = (torch.empty(rows, columns, dtype=wide, device=x.device),)
    P = torch.zeros(1, dtype=wide, device=x.device) if bias is None else bias.to(wide)
    Q = torch.ones(1, dtype=wide, device=x.device)
    for k, power in _powers(x.to(wide), max(M, N)):
        if numerator is not None and k <= M:
            P = torch.addmm(P, power, numerator[k - 1].to(wide).t(), out=p[-1] if k == M else p[0])
        if denominator is not None and k <= N:
            V = denominator[k - 1].to(wide).t()
            if absolute:
                torch.mm(power, V, out=q[k - 1])
            else:
                Q = torch.addmm(Q, power, V, out=q[-1] if k == N else q[0])
    if N == 0:
        y = P
    elif absolute:
        y = _pade.absolute(P, saved[n_p:])
    else:
        y = _pade.smooth(*_unpack(saved, M, N, bias), eps if N > 1 else 0.0)
    return y.to(x.dtype), saved if keep else saved.new_empty(0, rows, columns)


@without_autocast
@torch.no_grad()
def _backward(
    dy: Tensor,
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    absolute: bool,
    eps: float,
    keep: bool,
    needed: list[bool],
    triton: bool = False,
) -> list[Tensor]:
    """Gradients of x, numerator, denominator and bias; one that is not needed comes back without elements."""
    M, N = _degree(numerator), _degree(denominator)
    if N and not keep:  # a graph of the op without gradients, differentiated after all
        saved = _forward(x, numerator, denominator, bias, absolute, eps, True, triton)[1]
    work = _work_dtype(triton, x, numerator, denominator)
    of_bias: Tensor | None = None
    if N == 0:
        dy = dy.to(work)
        d = _pade.TermGradients(dy, dy, dy, dy)
    elif triton:
        from archzoo.kernels import _pade_triton

        kept = dy.view(*dy.shape, 1), saved.unsqueeze(-1), bias, M, N
        d, of_bias = _pade_triton.backward(*kept, absolute, eps if N > 1 else 0.0, work, needed[3])
        d = _pade.TermGradients(*(t.squeeze(-1) for t in d))
    elif absolute:
        P = saved[0] if M else saved.new_zeros(1) if bias is None else bias.to(work)
        d = _pade.absolute_backward(dy.to(work), P, saved[min(M, 1) :])
    else:
        d = _pade.smooth_backward(dy.to(work), *_unpack(saved, M, N, bias), eps if N > 1 else 0.0)
    if needed[3] and of_bias is None:
        of_bias = (d.p_low if M else d.p).sum(0, dtype=compute_dtype(dy))
    d_bias = empty_if(False, bias, x) if of_bias is None or bias is None else of_bias.to(bias.dtype)
    z = x.to(work)
    sides: list[tuple[Tensor, list[Tensor], Tensor]] = []  # weights, gradient of each term, room for the weights'
    d_numerator, d_denominator = empty_if(needed[1], numerator, x), empty_if(needed[2], denominator, x)
    if numerator is not None:
        sides.append((numerator, [d.p_low] * (M - 1) + [d.p], d_numerator))
    if denominator is not None:
        d_q = list(d.q.unbind()) if absolute else [d.q_low] * (N - 1) + [d.q]
        sides.append((denominator, d_q, d_denominator))
    if needed[1] or needed[2]:
        for k, power in _powers(z, max(M, N)):
            for _, d_terms, d_weight in sides:
                if k <= len(d_terms) and d_weight.numel():
                    if d_weight.dtype == work:
                        torch.mm(d_terms[k - 1].t(), power, out=d_weight[k - 1])
                    else:
                        d_weight[k - 1] = d_terms[k - 1].t() @ power
        del power
    dx = empty_if(needed[0], x, x, work)
    if needed[0]:  # Horner's rule: dx = R_1 + x (2 R_2 + x (3 R_3 + ...)), R_k = dp_k W_k + dq_k V_k
        dx.zero_()
        for k in range(max(M, N), 0, -1):
            for weight, d_terms, _ in sides:
                if k <= len(d_terms):
                    dx.addmm_(d_terms[k - 1], weight[k - 1].to(work), alpha=k)
            if k > 1:
                dx.mul_(z)
    return [dx.to(x.dtype), d_numerator, d_denominator, d_bias]


def _work_dtype(triton: bool, *tensors: Tensor | None) -> torch.dtype:
    """In which powers are multiplied by weights: that of the inputs for tensor cores, or in which they are summed."""
    if not triton:
        return compute_dtype(*tensors)
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


def _fake(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Any,
    absolute: bool,
    eps: float,
    keep: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    weights = [w for w in (numerator, denominator) if w is not None]
    shape = x.shape[0], weights[0].shape[1]
    kept = sum(_accumulators(_degree(numerator), _degree(denominator), absolute)) if keep else 0
    return x.new_empty(shape), x.new_empty((kept, *shape), dtype=_work_dtype(triton, x, *weights))


def _definition(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    absolute: bool,
    eps: float,
    keep: bool,
) -> Tensor:
    return paon_linear_reference(x, numerator, denominator, bias, absolute, eps)


paon_linear_op = DifferentiableOp(
    "paon_linear", _forward, _backward, fake=_fake, definition=_definition, tensors=4, kept=1
)


@flop_formula(torch.ops.archzoo.paon_linear)
def _flops(
    x: Any, numerator: Any, denominator: Any, bias: Any, absolute: bool, eps: float, *args: Any, **kwargs: Any
) -> int:
    M, N = _degree(numerator), _degree(denominator)
    B, I, O = x[0], x[1], (numerator or denominator)[1]  # noqa: E741
    # Adding w_0, 1 and the degrees are the GEMMs' own. Left: |q|, sums and a division, or what `_pade.smooth` does.
    rational = 0 if N == 0 else 2 * N + 1 if absolute else 5 if N == 1 else 8
    return 2 * (M + N) * B * I * O + (max(M, N) - 1) * B * I + rational * B * O


@flop_formula(torch.ops.archzoo.paon_linear_backward)
def _backward_flops(
    dy: Any,
    x: Any,
    numerator: Any,
    denominator: Any,
    bias: Any,
    saved: Any,
    absolute: bool,
    eps: float,
    keep: bool,
    needed: list[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    M, N, K = _degree(numerator), _degree(denominator), max(_degree(numerator), _degree(denominator))
    B, I, O = x[0], x[1], dy[1]  # noqa: E741
    gemms = needed[0] * (M + N) + needed[1] * M + needed[2] * N
    powers = (needed[0] + (needed[1] or needed[2])) * (K - 1)
    rational = 0 if N == 0 else 4 * N + 4 if absolute else 13 if N == 1 else 21
    return 2 * gemms * B * I * O + powers * B * I + (rational + 1) * B * O


def paon_linear(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None = None,
    *,
    variant: Literal["smooth", "absolute"] = "smooth",
    eps: float = 1e-6,
) -> Tensor:
    """Padé neurons of degrees [M/N] on the last axis of x.

    Args:
        x: (*, I).
        numerator: W (M, O, I), degree k at index k - 1; None for M = 0.
        denominator: V (N, O, I); None for N = 0.
        bias: w_0 (O,), or None for 0.
        variant: "smooth" or "absolute".
        eps: Added to the smooth variant's denominator if N >= 2.

    Returns:
        (*, O) in the dtype of x, or in autocast's. [1/0] is `F.linear`, bit for bit.

    Raises:
        ValueError: If there is neither numerator nor denominator, the variant is unknown, shapes do not fit, or x is
            not of a floating-point dtype; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    weights = [(name, w) for name, w in (("numerator", numerator), ("denominator", denominator)) if w is not None]
    if not weights:
        raise ValueError("numerator=None, denominator=None: one of them must be given")
    if variant not in ("smooth", "absolute"):
        raise ValueError(f"variant={variant!r}: must be 'smooth' or 'absolute'")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: must be a floating-point one")
    size = x.shape[-1] if x.dim() else "none"
    for name, w in weights:
        if w.dim() != 3 or w.shape[0] == 0 or w.shape[1:] != weights[0][1].shape[1:]:
            raise ValueError(
                f"{name} has shape {tuple(w.shape)}: must be (degree, out, in), degree >= 1, alike on both sides"
            )
        if w.shape[2] != size:
            raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must be {w.shape[2]}, got {size}")
    columns = weights[0][1].shape[1]
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: must be ({columns},)")

    dtype = autocast_dtype(x)
    if dtype != x.dtype:
        x = x.to(dtype)
        numerator, denominator, bias = (None if t is None else t.to(dtype) for t in (numerator, denominator, bias))
    if denominator is None and numerator is not None and len(numerator) == 1:
        return F.linear(x, numerator[0], bias)
    if under_transform():
        refuse_triton("paon_linear", "a torch.func transform")
        return paon_linear_reference(x, numerator, denominator, bias, variant == "absolute", eps)
    tensors = {"x": x, "numerator": numerator, "denominator": denominator, "bias": bias}
    rows, keep = x.reshape(-1, x.shape[-1]), _wants_gradient(*tensors.values())
    triton = takes_triton("paon_linear", rows.shape[0] * columns, **tensors)
    y: Tensor = paon_linear_op(rows, numerator, denominator, bias, variant == "absolute", eps, keep, triton)
    return y.view(*x.shape[:-1], columns)
