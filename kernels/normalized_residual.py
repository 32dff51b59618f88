r"""The residual step of nGPT, $y = N(N(h) + \alpha \circ (N(f) - N(h)))$, N(x) = x / |x| by rows (arXiv 2410.01131).

From the unit vector of h the state moves towards that of a block's output f, by a share alpha of the way that is
learned for each feature, and goes back onto the sphere. With a = h n_a, b = f n_b, r = a + alpha (b - a), y = r n_r,
where each n is one over a norm, and g the gradient of y:

    dr = n_r (g - y <y, g>),  dalpha = sum over rows of dr (b - a),  db = alpha dr,  da = dr - db,
    df = n_b (db - b <b, db>),  dh = n_a (da - a <a, da>).

Kept for backward: h, f, alpha and three numbers a row; autograd through the definition keeps two more tensors of h's
size, four of float32 where h has 16 bits. Norms are clamped at 1e-12, where the projections fall away; a row of zeros
gives zeros, and gets no gradient. Arithmetic is in float32 at least. On a CPU rows are walked in blocks that stay in
L2; inside torch.compile the definition takes the op's place there, which the compiler fuses better still.
FLOPs: 12 N D forward, 25 N D backward.

Under `torch.func` transforms, and for gradients of gradients, plain differentiable torch takes the op's place; inside
`use_backend("triton")` they raise.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._op import (
    DifferentiableOp,
    check_floating,
    compiled_for_cpu,
    compute_dtype,
    empty_if,
    flop_formula,
    under_transform,
    without_autocast,
)

EPS = 1e-12
"""The norm below which a vector is not made longer."""

_BLOCK = 2**16  # elements of a block on a CPU: the handful of blocks alive at once stay in L2


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x / max(|x|, 1e-12), the norm along one axis, in float32 at least; can be differentiated any number of times.

    Args:
        x: Any shape, real floating point.
        dim: The axis along which vectors lie.

    Returns:
        The unit vectors, in the dtype of x. A vector of zeros stays one, and its gradient is zero.
    """
    wide = x.to(compute_dtype(x))
    return (wide * _inverse_norm(wide, dim)).to(x.dtype)


def _inverse_norm(x: Tensor, dim: int = -1) -> Tensor:
    """One over the clamped norm; 0 for a vector of zeros, so that it gets no gradient instead of 1e12 times it."""
    square = x.square().sum(dim, keepdim=True)
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().clamp_min(EPS).reciprocal().masked_fill(zero, 0.0)


def normalized_residual_reference(h: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    """The definition. h, branch (*, D), alpha (D,) -> y (*, D)."""
    a, b = unit(h), unit(branch)
    return unit(a + alpha * (b - a))


def _definition(h: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    wide = compute_dtype(h, branch, alpha)
    return normalized_residual_reference(h.to(wide), branch.to(wide), alpha.to(wide)).to(h.dtype)


def _blocks(h: Tensor) -> Iterator[slice]:
    """Slices of the rows: all at once but on a CPU."""
    rows, features = h.shape
    size = max(1, _BLOCK // max(1, features)) if h.device.type == "cpu" else max(1, rows)
    return (slice(start, start + size) for start in range(0, rows, size))


def _invert_norms(out: Tensor, *xs: Tensor) -> None:
    """`_inverse_norm` of each of xs (N, D), in one pass over it, into out (len(xs), N, 1)."""
    for x, norm in zip(xs, out.unbind(), strict=True):
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, out=norm)
    zero = out == 0
    out.clamp_min_(EPS).reciprocal_().masked_fill_(zero, 0.0)


@without_autocast
def _forward(h: Tensor, branch: Tensor, alpha: Tensor, triton: bool = False) -> tuple[Tensor, Tensor]:
    """y (N, D) in h's dtype, and one over the norms of h, of branch and of what is between them (3, N, 1)."""
    if triton:
        from archzoo.kernels import _normalized_residual_triton

        return _normalized_residual_triton.forward(h, branch, alpha)
    wide = compute_dtype(h, branch, alpha)
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    inverse = torch.empty(3, h.shape[0], 1, dtype=wide, device=h.device)
    alpha = alpha.to(wide)
    for rows in _blocks(h):
        a, b = h[rows].to(wide), branch[rows].to(wide)
        n_a, n_b, n_r = inverse[:, rows].unbind()
        _invert_norms(inverse[:2, rows], a, b)
        r = torch.lerp(a * n_a, b * n_b, alpha)
        _invert_norms(inverse[2:, rows], r)
        torch.mul(r, n_r, out=y[rows])
    return y, inverse


@without_autocast
def _backward(
    dy: Tensor,
    h: Tensor,
    branch: Tensor,
    alpha: Tensor,
    inverse: Tensor,
    needed: list[bool],
    triton: bool = False,
) -> list[Tensor]:
    """Gradients of h, branch and alpha. What is not needed is not computed, and comes back with no elements."""
    if triton:
        from archzoo.kernels import _normalized_residual_triton

        return list(_normalized_residual_triton.backward(dy, h, branch, alpha, inverse, *needed))
    wide = compute_dtype(h, branch, alpha)
    need_h, need_branch, need_alpha = needed
    dh, dbranch = empty_if(need_h, h, dy), empty_if(need_branch, branch, dy)
    dalpha = empty_if(need_alpha, alpha, dy, wide).zero_()
    narrow, alpha = alpha.dtype, alpha.to(wide)
    for rows in _blocks(h):
        n_a, n_b, n_r = inverse[:, rows].unbind()
        a, b = h[rows].to(wide) * n_a, branch[rows].to(wide) * n_b
        dr = _pull_back(dy[rows].to(wide), torch.lerp(a, b, alpha).mul_(n_r), n_r)
        if need_alpha:
            dalpha += (b - a).mul_(dr).sum(0)
        db = alpha * dr
        if need_h:
            _pull_back(dr.sub_(db), a, n_a, dh[rows])
        if need_branch:
            _pull_back(db, b, n_b, dbranch[rows])
    return [dh, dbranch, dalpha.to(narrow)]


def _pull_back(gradient: Tensor, unit: Tensor, inverse: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of x, from that of its unit vector x n: what is along it falls away, unless n is clamped."""
    along = (unit * gradient).sum(-1, keepdim=True)
    along.masked_fill_(inverse >= 1 / EPS, 0.0)
    return torch.mul(gradient.addcmul(unit, along, value=-1), inverse, out=out)


def _fake(h: Tensor, branch: Tensor, alpha: Tensor, triton: bool = False) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(3, h.shape[0], 1, dtype=compute_dtype(h, branch, alpha))


normalized_residual_op = DifferentiableOp(
    "normalized_residual", _forward, _backward, fake=_fake, definition=_definition, tensors=3, kept=1
)


@flop_formula(torch.ops.archzoo.normalized_residual)
def _flops(h: Any, *args: Any, **kwargs: Any) -> int:
    return int(12 * h[0] * h[1])


@flop_formula(torch.ops.archzoo.normalized_residual_backward)
def _backward_flops(
    dy: Any, h: Any, branch: Any, alpha: Any, inverse: Any, needed: list[bool], *args: Any, **kwargs: Any
) -> int:
    need_h, need_branch, need_alpha = needed
    return int((12 + 6 * need_h + 5 * need_branch + 2 * need_alpha) * h[0] * h[1])


def normalized_residual(h: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    """N(N(h) + alpha (N(branch) - N(h))), N the unit vector of each row.

    Args:
        h: The residual stream (*, D), real floating point; need not be of unit norm.
        branch: The output of attention or MLP (*, D), likewise.
        alpha: Shares of the way (D,), as used: of any sign here, though nGPT's are not negative.

    Returns:
        y (*, D) of unit norm, in the dtype of h, also under autocast. A gradient has its input's dtype.

    Raises:
        ValueError: If the shapes do not fit, or a tensor is not floating point; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    features = h.shape[-1] if h.dim() else 0
    if h.dim() == 0 or branch.shape != h.shape or alpha.shape != (features,):
        raise ValueError(
            f"h, branch, alpha of shapes {tuple(h.shape)}, {tuple(branch.shape)}, {tuple(alpha.shape)}: "
            "must be (*, D), the same, and (D,)"
        )
    check_floating(h=h, branch=branch, alpha=alpha)
    if under_transform():
        refuse_triton("normalized_residual", "a torch.func transform")
        return _definition(h, branch, alpha)
    triton = takes_triton("normalized_residual", h=h, branch=branch, alpha=alpha)
    if compiled_for_cpu(h) and not triton:
        return _definition(h, branch, alpha)
    rows = h.reshape(-1, features), branch.reshape(-1, features)
    y: Tensor = normalized_residual_op(*rows, alpha, triton)
    return y.view(h.shape)
