# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernel of the bases of KAN layers; definitions and names as in the files of the bases.

One elementwise kernel makes the functions of x, in the dtype and layout of the product that eats them, and, backward,
pulls its gradient back to x. The products are cuBLAS's and cuDNN's: they are most of the time, so functions made inside
a product would win little. A program has POSITIONS numbers of x, and walks their K functions FUNCTIONS at a time. What
the functions of a number share, as its cell, tanh or sine, is computed once, over (POSITIONS,); the rest over
(POSITIONS, FUNCTIONS), where an element costs 10 (Gaussians) to 50 instructions (harmonics), and twice that backward.
The layout (rows, I·K), functions innermost, is that of the weight (O, I, K), of which no copy is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from archzoo.kernels import _rational_triton
from archzoo.kernels._block_sizes import Blocks, BlockSizes
from archzoo.kernels._triton import accumulator, cdiv, helper, launch, sigmoid, tanh
from archzoo.kernels.activation import Activation
from archzoo.kernels.basis_linear import Basis, widen
from archzoo.kernels.chebyshev import Chebyshev
from archzoo.kernels.fourier import Fourier
from archzoo.kernels.kan_spline import BSpline
from archzoo.kernels.rational import Rational
from archzoo.kernels.rbf import RBF
from archzoo.kernels.sine import Sine

# --- What the functions of a number share, (POSITIONS,) ---------------------------------------------------------------


@helper
def _activation(x, NAME: tl.constexpr):
    """An activation, and its slope."""
    if NAME == "silu":
        s = sigmoid(x)
        y = x * s
        slope = s + y * (1.0 - s)
    elif NAME == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        y = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == "relu":
        y = tl.where(x < 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0).to(x.dtype)
    elif NAME == "tanh":
        y = tanh(x, False)
        slope = 1.0 - y * y
    else:
        y = x
        slope = tl.where(x == x, 1.0, 1.0).to(x.dtype)
    return y, slope


@helper
def _sine_and_cosine(x):
    """20 instructions for both in float32, and an error of 1e-7 up to |x| = 1e6, where float32 has steps of 1/16.

    Beyond, numbers from -1 to 1. The library's `sin` knows exact digits there, but needs six times the instructions,
    and a stack.
    """
    if x.dtype == tl.float32:
        turn = tl.floor(x * 0.6366197723675814 + 0.5)  # quarters; each part of pi / 2 but the last has few digits
        r = tl.fma(-turn, 1.5703125, x)
        r = tl.fma(-turn, 0.0004837512969970703, r)
        r = _clamped(tl.fma(-turn, 7.549789954891882e-08, r), -1.0, 1.0)
        z = r * r
        s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
        c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
        quarter = turn.to(tl.int32)
        sine = tl.where(quarter & 1 == 0, s, c)
        cosine = tl.where(quarter & 1 == 0, c, s)
        sine = tl.where(quarter & 2 == 0, sine, -sine)
        cosine = tl.where((quarter + 1) & 2 == 0, cosine, -cosine)
    else:
        sine, cosine = tl.sin(x), tl.cos(x)
    return sine, cosine


@helper
def _clamped(x, low, high):
    """x between two bounds; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@helper
def _tuple(x):
    """(x,), of a type that may grow longer as loops are unrolled."""
    return (x,)


@helper
def _spline(x, knots, K: tl.constexpr, ORDER: tl.constexpr, BITS: tl.constexpr, OUTSIDE: tl.constexpr):
    """The first of ORDER + 1 functions that are not 0 at x; them; their slopes; how far x is outside the inner grid.

    By de Boor's triangle over the knots around x's cell. Of functions that do not exist, left and right of the K, it
    makes up numbers, which do not touch the others' and are thrown away.
    """
    ACC: tl.constexpr = x.dtype
    inner = x
    closed = x != x
    if OUTSIDE != "zero":
        last = tl.load(knots + K).to(ACC)
        inner = _clamped(x, tl.load(knots + ORDER).to(ACC), last)
        closed = inner == last  # cells are open on the right, but the last one of the inner grid counts as closed here
    # How many knots lie at or below x, by bisection: in bits from the highest on.
    count = tl.full(x.shape, 0, tl.int32)
    for bit in tl.static_range(BITS - 1, -1, -1):
        probe = count + (1 << bit)
        exists = probe <= K + ORDER + 1
        knot = tl.load(knots + probe - 1, mask=exists, other=0.0).to(ACC)
        count = tl.where(exists & ((knot < inner) | ((knot == inner) & (closed == 0))), probe, count)
    cell = count - 1
    known = (count > 0) & (count <= K + ORDER)
    value = tl.where(known, 1.0, 0.0).to(ACC)
    b = _tuple(value)
    slopes = _tuple(0.0 * value)
    if ORDER > 0:
        at = cell + 1 - ORDER
        t = _tuple(tl.load(knots + at, mask=known & (at >= 0), other=0.0).to(ACC))
        for i in tl.static_range(1, 2 * ORDER):
            there = known & (at + i >= 0) & (at + i <= K + ORDER)
            t = t + (tl.load(knots + at + i, mask=there, other=0.0).to(ACC),)
        for d in tl.static_range(1, ORDER + 1):
            part = b[0] / (t[ORDER] - t[ORDER - d])
            new = _tuple((t[ORDER] - inner) * part)
            slopes = _tuple(-ORDER * part)
            for r in tl.static_range(1, d):
                before = part
                part = b[r] / (t[r + ORDER] - t[ORDER - d + r])
                new = new + ((inner - t[ORDER - d + r - 1]) * before + (t[r + ORDER] - inner) * part,)
                slopes = slopes + (ORDER * (before - part),)
            b = new + ((inner - t[ORDER - 1]) * part,)
            slopes = slopes + (ORDER * part,)
    return tl.where(known, cell - ORDER, K + ORDER + 1), b, slopes, x - inner


@helper
def _shared(
    x, feature, p_ptr, p_stride, KIND: tl.constexpr, K: tl.constexpr, ORDER: tl.constexpr, BITS: tl.constexpr,
    OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Of each number what its functions need, by the kind of basis."""
    if KIND == "spline":
        shared = _spline(x, p_ptr + feature * p_stride, K, ORDER, BITS, OUTSIDE)
    elif KIND == "chebyshev":
        shared = (tanh(x, False),)
    elif KIND == "fourier":
        shared = _sine_and_cosine(x)
    else:
        shared = (x,)
    return shared


# --- The functions, (POSITIONS, FUNCTIONS) ----------------------------------------------------------------------------


@helper
def _functions(
    x, shared, j, feature, p_ptr, q_ptr, KIND: tl.constexpr, K: tl.constexpr, ORDER: tl.constexpr, BITS: tl.constexpr,
    SHIFT: tl.constexpr, SCALE: tl.constexpr, OUTSIDE: tl.constexpr,
):  # fmt: skip
    """Functions j, their slopes, and what times x is their derivative by the basis's first tensor, if it learns that.

    For j of K or more numbers, but no NaN that is not due to x.
    """
    ACC: tl.constexpr = x.dtype
    j = j[None, :]
    past = shared[0]
    if KIND == "cubic":  # B = q^3 / 4 - p^3: q, p and u are scaled by CUBE, (2/3)^(1/3), and SCALE is CUBE / step
        CUBE: tl.constexpr = 0.8735804647362989
        u = (x - SHIFT) * SCALE
        low = tl.full(u.shape, 0.0, ACC)
        inner = _clamped(u, low, low + (K - 3) * CUBE) if OUTSIDE != "zero" else u
        past = (u - inner) * (1.0 / SCALE)
        u = inner[:, None] - (j - 1).to(ACC) * CUBE
        d = tl.abs(u)
        q = tl.maximum(2 * CUBE - d, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p = tl.maximum(CUBE - d, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p2 = p * p
        q2 = q * q
        value = 0.25 * q2 * q - p2 * p
        slope = (3.0 * SCALE) * (p2 - 0.25 * q2)
        slope = tl.where(u < 0, -slope, slope)
    elif KIND == "spline":
        first, b, slopes, past = shared
        value = tl.where(x == x, 0.0, x)[:, None] + 0.0 * j.to(ACC)
        slope = value
        first = tl.where(j < K, j, K + ORDER) - first[:, None]  # which of them j is; none beyond the last
        for r in tl.static_range(ORDER + 1):
            here = first == r
            value = tl.where(here, b[r][:, None], value)
            slope = tl.where(here, slopes[r][:, None], slope)
    elif KIND == "rbf":
        ROOT: tl.constexpr = 1.2011224087864498  # 1 / sqrt(ln 2): exp is an exp2
        d = (x[:, None] - tl.load(p_ptr + j, mask=j < K, other=0.0).to(ACC)) * (SCALE * ROOT)
        value = tl.exp2(-(d * d))
        slope = d * value * (-2.0 * SCALE / ROOT)
    elif KIND == "chebyshev":  # T_d, and T'_d = d U_{d-1}
        t = shared[0][:, None]
        twice = 2.0 * t
        before = tl.where(t == t, 1.0, t).to(ACC)
        now = t
        u_before = 0.0 * t
        u_now = before
        value = before + 0.0 * j.to(ACC)
        slope = 0.0 * value
        for d in range(1, K):
            value = tl.where(j == d, now, value)
            slope = tl.where(j == d, d * u_now, slope)
            now, before = twice * now - before, now
            u_now, u_before = twice * u_now - u_before, u_now
        slope *= 1.0 - t * t
    elif KIND == "fourier":  # e^{inx} from e^{ix}, e^{2ix}, e^{4ix}, ...: those that n has a bit for
        s, c = shared[0][:, None], shared[1][:, None]
        n = j % ORDER + 1
        cos = tl.where(c == c, 1.0, c).to(ACC) + 0.0 * n.to(ACC)
        sin = 0.0 * cos
        for bit in tl.static_range(BITS):
            taken = (n >> bit) % 2 == 1
            turned = cos * s + sin * c
            cos = tl.where(taken, cos * c - sin * s, cos)
            sin = tl.where(taken, turned, sin)
            c, s = 1.0 - 2.0 * s * s, 2.0 * s * c
        value = tl.where(j < ORDER, cos, sin)
        slope = tl.where(j < ORDER, -sin, cos) * n.to(ACC)
    else:  # sine
        frequency = tl.load(p_ptr + j, mask=j < K, other=0.0).to(ACC)
        phase = tl.load(q_ptr + feature[:, None] * K + j, mask=j < K, other=0.0).to(ACC)
        value, learned = _sine_and_cosine(x[:, None] * frequency + phase)
        slope = learned * frequency
    if KIND == "cubic" or KIND == "spline":
        if OUTSIDE == "linear":
            value += slope * past[:, None]
        elif OUTSIDE == "clamp":
            slope = tl.where(past[:, None] == 0, slope, 0.0)
    if KIND != "sine":
        learned = slope
    return value, slope, learned


@triton.jit(do_not_specialize=["total"])
def _basis_kernel(
    x_ptr, p_ptr, q_ptr, values_ptr, grad_ptr, act_ptr, act_grad_ptr, dx_ptr, partial_ptr, total, features, p_stride,
    KIND: tl.constexpr, K: tl.constexpr, ORDER: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr,
    SCALE: tl.constexpr, OUTSIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    POSITIONS: tl.constexpr, FUNCTIONS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Offsets within a program are int32; only where it begins may be farther.
    begin = tl.program_id(0).to(tl.int64) * POSITIONS
    at = tl.arange(0, POSITIONS)
    inside = at < total - begin
    x = tl.load(x_ptr + begin + at, mask=inside, other=0.0).to(ACC)
    dx = tl.full((POSITIONS,), 0.0, ACC)
    if ACTIVATION != "":
        y, rise = _activation(x, ACTIVATION)
        if act_ptr is not None:
            tl.store(act_ptr + begin + at, y.to(act_ptr.dtype.element_ty), mask=inside)
        if act_grad_ptr is not None:
            dx += rise * tl.load(act_grad_ptr + begin + at, mask=inside, other=0.0).to(ACC)
    if KIND != "activation":
        feature = ((begin % features).to(tl.int32) + at) % features
        shared = _shared(x, feature, p_ptr, p_stride, KIND, K, ORDER, BITS, OUTSIDE)
        for start in range(0, K, FUNCTIONS):
            j = start + tl.arange(0, FUNCTIONS)
            value, slope, learned = _functions(
                x, shared, j, feature, p_ptr, q_ptr, KIND, K, ORDER, BITS, SHIFT, SCALE, OUTSIDE
            )
            there = at[:, None] * K + j[None, :]
            mask = inside[:, None]
            if K % FUNCTIONS != 0:
                mask = mask & (j < K)[None, :]
            if values_ptr is not None:
                tl.store(values_ptr + begin * K + there, value.to(values_ptr.dtype.element_ty), mask=mask)
            if grad_ptr is not None:
                grad = tl.load(grad_ptr + begin * K + there, mask=mask, other=0.0).to(ACC)
                if dx_ptr is not None:
                    dx += tl.sum(grad * slope, 1)
                if partial_ptr is not None:
                    parts = tl.sum(grad * learned * x[:, None], 0)
                    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * K + j, parts, mask=j < K)
    if dx_ptr is not None:
        tl.store(dx_ptr + begin + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# --- The pass ---------------------------------------------------------------------------------------------------------


@dataclass
class Term:
    """A term of a map: what is asked of it, and what `evaluate` then puts here.

    Args:
        basis: Its functions.
        tensors: Of the basis.
        grad: Gradient of its functions (R, I·K), contiguous, to be pulled back; None if nobody needs that.
        wanted: Whether the functions are.
        learns: Whether the gradients of `tensors` are.
        values: Its functions (R, I·K), or None.
        pulled: Gradients of the first of `tensors`, wide; of none if the basis does not learn them.
    """

    basis: Basis
    tensors: Sequence[Tensor]
    grad: Tensor | None = None
    wanted: bool = True
    learns: bool = False
    values: Tensor | None = None
    pulled: Sequence[Tensor] = ()


def evaluate(x: Tensor, terms: Sequence[Term], dtype: torch.dtype, needs_x: bool = False) -> Tensor | None:
    """All functions of x (R, I), contiguous, in `dtype`, and their gradients pulled back, to x if that needs them.

    Returns:
        The gradient of x (R, I), in its dtype or wider; None if not needed.
    """
    dx: Tensor | None = None
    passes = _passes(terms)
    for one in passes:
        first = one[0]
        if first.basis.kernel is None:
            part = _by_torch(x, first, dtype)
        elif isinstance(first.basis, Rational):
            part = _rational(x, first.basis, first, dtype, needs_x)
        else:
            part = _launch(x, one, dtype, widen(x.dtype) if len(passes) > 1 else x.dtype, needs_x)
        if part is not None and needs_x:
            dx = part if dx is None else dx.to(widen(x.dtype)).add_(part)
    return dx


def _passes(terms: Sequence[Term]) -> list[list[Term]]:
    """The terms of each launch: an activation goes with the functions before it, as both read x."""
    passes: list[list[Term]] = []
    for term in terms:
        if passes and isinstance(term.basis, Activation) and len(passes[-1]) == 1:
            before = passes[-1][0].basis
            if before.kernel is not None and not isinstance(before, Activation | Rational):
                passes[-1].append(term)
                continue
        passes.append([term])
    return [one for one in passes if any(term.wanted or term.grad is not None for term in one)]


def _launch(x: Tensor, terms: Sequence[Term], dtype: torch.dtype, dx_dtype: torch.dtype, needs_x: bool) -> Any:
    """Functions, an activation, or both."""
    form, wide = terms[0].basis.kernel, widen(x.dtype)
    assert form is not None
    main = terms[0] if form.kind != "activation" else None
    activation = terms[-1] if isinstance(terms[-1].basis, Activation) else None
    for term in terms:
        if term.wanted:
            term.values = x.new_empty(len(x), x.shape[1] * term.basis.size, dtype=dtype)
    dx, partial = None, None
    if needs_x and any(term.grad is not None for term in terms):
        dx = torch.empty_like(x, dtype=dx_dtype)
    learns = main is not None and main.learns and form.kind == "sine"
    sizes = FORWARD if dx is None and not learns else BACKWARD
    blocks = sizes[form.kind].of(x, x.numel(), terms[0].basis.size)
    programs = cdiv(x.numel(), blocks["POSITIONS"])
    if learns:
        partial = torch.empty(programs, terms[0].basis.size, dtype=wide, device=x.device)
    tables = [] if main is None else [t.contiguous() for t in main.tensors]
    if isinstance(terms[0].basis, BSpline) and form.kind == "spline":
        tables = [terms[0].basis.knots(x.new_empty(0, dtype=wide), *tables)]
    p, q, *_ = *tables, None, None
    launch(
        _basis_kernel, (programs,),
        x, p, q, main and main.values, main and main.grad, activation and activation.values,
        activation and activation.grad, dx, partial,
        x.numel(), x.shape[1], 0 if p is None or len(p) == 1 else p.shape[-1],
        KIND=form.kind, K=terms[0].basis.size, ORDER=form.order, BITS=form.bits, SHIFT=form.shift, SCALE=form.scale,
        OUTSIDE=form.outside,
        ACTIVATION=activation.basis.name if activation and isinstance(activation.basis, Activation) else "",
        ACC=accumulator(wide), **blocks,
    )  # fmt: skip
    if main is not None and partial is not None:
        main.pulled = [partial.sum(0)]
    return dx


def _rational(x: Tensor, basis: Rational, term: Term, dtype: torch.dtype, needs_x: bool) -> Tensor | None:
    """By the kernels of the op `rational`."""
    rows, abs_terms = x.view(len(x), basis.groups, x.shape[1] // basis.groups), basis.denominator == "abs_terms"
    a, b = term.tensors
    if term.grad is None:
        term.values = _rational_triton.forward(rows, a, b, abs_terms, dtype).view(x.shape)
        return None
    dx, *pulled, values = _rational_triton.backward(
        term.grad.view(rows.shape), rows, a, b, abs_terms, needs_x, term.learns, term.wanted
    )
    term.pulled = [t for t in pulled if t is not None]
    term.values = None if values is None else values.view(x.shape)
    return None if dx is None else dx.view(x.shape)


def _by_torch(x: Tensor, term: Term, dtype: torch.dtype) -> Tensor | None:
    """By the basis's own methods."""
    columns, dx = x.t().to(widen(x.dtype)).contiguous(), None
    if term.grad is None:
        values = term.basis.values(columns, *term.tensors)
    else:
        below = term.grad.view(*x.shape, -1).permute(1, 2, 0).to(columns.dtype).contiguous()
        values, dx, *term.pulled = term.basis.pullback(columns, below, *term.tensors)
    term.values = values.permute(2, 0, 1).reshape(len(x), -1).to(dtype)
    return None if dx is None else dx.t()


# --- Block sizes ------------------------------------------------------------------------------------------------------

_EXAMPLES: dict[str, Any] = {
    "cubic": lambda k: (BSpline(3, k - 3, -1.0, 2 / (k - 3)), Activation("silu")),
    "spline": lambda k: (BSpline(3, k - 3, None, None), Activation("gelu")),
    "rbf": lambda k: (RBF(k, 0.5),),
    "chebyshev": lambda k: (Chebyshev(k - 1),),
    "fourier": lambda k: (Fourier(k // 2),),
    "sine": lambda k: (Sine(k),),
    "activation": lambda k: (Activation("silu"),),
}
_FEATURES = 768


def _rule(dtype: torch.dtype, positions: int, functions: int) -> Blocks:
    """16 elements a thread."""
    at_once = min(functions, 32)
    return {"POSITIONS": (1024 if functions == 1 else 2048) // at_once, "FUNCTIONS": at_once, "num_warps": 4}


def _backward_rule(dtype: torch.dtype, positions: int, functions: int) -> Blocks:
    """8 elements a thread: slopes and gradients take registers, too."""
    at_once = min(functions, 32)
    return {"POSITIONS": 1024 // at_once, "FUNCTIONS": at_once, "num_warps": 4}


def _candidates(dtype: torch.dtype, positions: int, functions: int) -> list[Blocks]:
    return [
        {"POSITIONS": size // at_once, "FUNCTIONS": at_once, "num_warps": warps}
        for at_once in (8, 16, 32, 64)
        for size in (512, 1024, 2048, 4096)
        for warps in (4, 8)
        if at_once <= max(8, functions) and size // at_once >= 16
    ]


def _problem(kind: str, backward: bool) -> Any:
    def problem(dtype: torch.dtype, device: Any, positions: int, functions: int) -> Any:
        bases = _EXAMPLES[kind](functions)
        x = torch.randn(positions // _FEATURES, _FEATURES, dtype=dtype, device=device)
        own = {
            "spline": [torch.linspace(-2, 2, functions + 4, device=device).expand(_FEATURES, -1)],
            "rbf": [torch.linspace(-2, 2, functions, device=device)],
            "sine": [torch.ones(functions, device=device), torch.zeros(_FEATURES, functions, device=device)],
        }.get(kind, [])
        grads = [torch.randn(len(x), _FEATURES * b.size, dtype=dtype, device=device) for b in bases]

        def run() -> None:
            terms = [Term(b, own if b.num_tensors else [], learns=bool(own)) for b in bases]
            for term, grad in zip(terms, grads, strict=True):
                term.grad = grad if backward else None
            evaluate(x, terms, dtype, backward)

        return run

    return problem


def _sizes(kind: str) -> list[tuple[int, int]]:
    """The MLP of a ViT-B with each layer's usual functions; and more than are walked at a time."""
    functions = {"chebyshev": 5, "fourier": 10, "activation": 1}.get(kind, 8)
    return [(8192 * _FEATURES, functions), *([(1024 * _FEATURES, 128)] if kind == "fourier" else [])]


FORWARD, BACKWARD = (
    {
        kind: BlockSizes(f"basis_{kind}{suffix}", rule, _candidates, _problem(kind, bool(suffix)), _sizes(kind))
        for kind in _EXAMPLES
    }
    for suffix, rule in (("", _rule), ("_backward", _backward_rule))
)
TUNED = (*FORWARD.values(), *BACKWARD.values())
