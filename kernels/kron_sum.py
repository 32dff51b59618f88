r"""Sum of Kronecker products, $H = \sum_i A_i \otimes S_i$, and the linear map $y = x H^T$ that never keeps H.

A (n, P, Q) and S (n, K, D) give H (P K, Q D) in the order of `torch.kron`:
H[p K + k, q D + d] = sum_i A[i,p,q] S[i,k,d].

With R rows, o = P K, i = Q D and P = Q = n, in multiply-adds:

| | forward | backward | temporaries, elements |
|---|---|---|---|
| `kron_sum` | n o i | 2 n o i | o i / n |
| `kron_linear`, built | R o i + n o i | 2 R o i + 3 n o i | 2 o i / n |
| `kron_linear`, factored | R o i + R n^2 o | 2 R o i + R n^2 (o + 2 i) | 2 R (o + i) |

Built: a block of rows (backward: of columns) of H is made, used and dropped; it is one GEMM A^T S and at most one
transposing copy, and no (n, o, i) intermediate exists. Factored: U_iq = S_i x_q, then y_p = sum_iq A[i,p,q] U_iq; it
reads 1/n of the bytes. Small problems take several blocks at once, as many as fill 1 MiB. Only x, A and S are saved.

Factored is taken while R n <= i, where the multiply-adds of the two cross. Measured (CPU, one thread, float32, d x d,
d = 64 to 2048, n = 2 to 16, R = 1 to 1024), that is also where their times cross. The choice is made inside the op,
from shapes alone: a graph compiled or exported with a dynamic batch holds one node and no guard on the batch.

Under `torch.func` transforms, and for gradients of gradients, plain differentiable torch takes the ops' place; inside
`use_backend("triton")` they raise.

Triton: H is built by one kernel that reads S and writes H once, and one other takes dH to dA and dS; GEMMs are torch's,
so that `kron_linear` costs what a linear layer does, and two passes over H: 0.35 + 0.02 ms forward for n = 4, R = 8192,
4096 -> 4096, bfloat16, H200. The factored path is GEMMs alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

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

_CPU_BLOCK = 2**20  # bytes; about one core's L2 cache
_GPU_BLOCK = 2**26  # bytes; smaller GEMMs would leave most of a GPU idle


def kron_sum_reference(A: Tensor, S: Tensor) -> Tensor:
    """The definition. A (n, P, Q), S (n, K, D) -> H (P K, Q D)."""
    return torch.stack([torch.kron(a, s) for a, s in zip(A, S, strict=True)]).sum(0)


def kron_linear_reference(x: Tensor, A: Tensor, S: Tensor) -> Tensor:
    """The definition. x (*, Q D), A (n, P, Q), S (n, K, D) -> x H^T (*, P K)."""
    return x @ kron_sum_reference(A, S).t()


# --- Pieces -----------------------------------------------------------------------------------------------------------


def _build(A: Tensor, S: Tensor, dtype: torch.dtype, triton: bool = False) -> Tensor:
    """H, summed in float32 at least and rounded once. With P = 1 or Q = 1 there is no transposing copy."""
    (n, P, Q), (_, K, D) = A.shape, S.shape
    if triton:
        from archzoo.kernels import _kron_sum_triton

        return _kron_sum_triton.forward(A, S, dtype)
    wide = compute_dtype(A, S)
    if P == 1 and Q > 1 and K > 1:  # row by row: (Q, n) (n, D) for each k, which lands where it belongs
        by_row = A.reshape(n, Q).to(wide).t().expand(K, Q, n)
        return torch.bmm(by_row, S.to(wide).transpose(0, 1)).to(dtype).view(K, Q * D)
    H = A.reshape(n, P * Q).to(wide).t() @ S.reshape(n, K * D).to(wide)
    return H.to(dtype).view(P, Q, K, D).transpose(1, 2).reshape(P * K, Q * D)


def _split(G: Tensor, P: int, Q: int) -> Tensor:
    """Undoes the layout of `_build`: G (P K, Q D) -> (P Q, K D)."""
    K, D = G.shape[0] // P, G.shape[1] // Q
    return G.view(P, K, Q, D).transpose(1, 2).reshape(P * Q, K * D)


def _blocks_first(x: Tensor, blocks: int) -> Tensor:
    """(R, blocks width) -> (1, blocks R, width), contiguous: in this layout every factored step is one plain GEMM."""
    rows, width = x.shape[0], x.shape[1] // blocks
    return x.reshape(rows, blocks, width).transpose(0, 1).reshape(1, blocks * rows, width)


def _blocks_last(x: Tensor, rows: int, width: int) -> Tensor:
    """(blocks, R width) -> (R, blocks width)."""
    return x.view(x.shape[0], rows, width).transpose(0, 1).reshape(rows, x.shape[0] * width)


def _groups(count: int, elements: int, like: Tensor, least: int = 1) -> Iterator[slice]:
    """Cuts `count` items of so many elements each into slices that fill a block, with so many items at least."""
    block = _GPU_BLOCK if like.is_cuda else _CPU_BLOCK
    step = max(least, block // (like.element_size() * max(elements, 1)))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _plain(x: Tensor, A: Tensor, S: Tensor) -> Tensor:
    """x H^T by torch's own differentiable operators."""
    return x @ _build(A, S, x.dtype).t()


def _is_factored(rows: int, A: Sequence[int], S: Sequence[int]) -> bool:
    """Whether the factored path is cheaper, from the number of rows and the shapes of A and S."""
    return rows * A[0] <= A[2] * S[2]


# --- kron_sum ---------------------------------------------------------------------------------------------------------


@without_autocast
@torch.no_grad()
def _sum(A: Tensor, S: Tensor, dtype: torch.dtype, triton: bool = False) -> Tensor:
    """H (P K, Q D) in the given dtype, in one pass over its rows."""
    if triton:
        return _build(A, S, dtype, triton)
    (_, P, Q), (_, K, D) = A.shape, S.shape
    H, S = torch.empty(P * K, Q * D, dtype=dtype, device=S.device), S.to(compute_dtype(A, S))
    for p in _groups(P, K * Q * D, S):
        H[p.start * K : p.stop * K] = _build(A[:, p], S, dtype)
    return H


@without_autocast
@torch.no_grad()
def _sum_backward(
    dH: Tensor, A: Tensor, S: Tensor, dtype: torch.dtype, needed: list[bool], triton: bool = False
) -> list[Tensor]:
    """dA (n, P, Q) and dS (n, K, D) in one pass over the columns of dH (P K, Q D)."""
    if triton:
        from archzoo.kernels import _kron_sum_triton

        found = _kron_sum_triton.backward(dH, A, S, *needed)
        return [empty_if(False, t, dH) if g is None else g.to(t.dtype) for g, t in zip(found, (A, S), strict=True)]
    (n, P, Q), (_, K, D) = A.shape, S.shape
    wide = compute_dtype(A, S)
    A_wide, S_wide = A.to(wide), S.reshape(n, K * D).to(wide)
    dA = empty_if(needed[0], A, dH)
    dS = torch.zeros(n, K * D, dtype=wide, device=S.device)
    for q in _groups(Q, P * K * D, S_wide):
        width = q.stop - q.start
        part = _split(dH[:, q.start * D : q.stop * D].to(wide).contiguous(), P, width)
        if needed[0]:
            dA[:, :, q] = (S_wide @ part.t()).view(n, P, width)
        if needed[1]:
            dS.addmm_(A_wide[:, :, q].reshape(n, P * width), part)
    return [dA, dS.view(n, K, D).to(S.dtype) if needed[1] else empty_if(False, S, dH)]


def _sum_fake(A: Tensor, S: Tensor, dtype: torch.dtype, triton: bool = False) -> Tensor:
    return S.new_empty(A.shape[1] * S.shape[1], A.shape[2] * S.shape[2], dtype=dtype)


kron_sum_op = DifferentiableOp("kron_sum", _sum, _sum_backward, fake=_sum_fake, definition=_build, tensors=2)


# --- kron_linear ------------------------------------------------------------------------------------------------------


@without_autocast
@torch.no_grad()
def _linear(x: Tensor, A: Tensor, S: Tensor, triton: bool = False) -> Tensor:
    """y (R, P K) of x (R, Q D), in the dtype of x."""
    if _is_factored(x.shape[0], A.shape, S.shape):
        return _factored(x, A, S)
    return _built(x, A, S, triton)


@without_autocast
@torch.no_grad()
def _linear_backward(
    dy: Tensor, x: Tensor, A: Tensor, S: Tensor, needed: list[bool], triton: bool = False
) -> list[Tensor]:
    """dx, dA and dS. What is not needed is not computed, and comes back with no elements."""
    if _is_factored(x.shape[0], A.shape, S.shape):
        return _factored_backward(dy, x, A, S, needed)
    return _built_backward(dy, x, A, S, needed, triton)


def _built(x: Tensor, A: Tensor, S: Tensor, triton: bool) -> Tensor:
    (_, P, Q), (_, K, D) = A.shape, S.shape
    S = S if triton else S.to(compute_dtype(A, S))
    y = torch.empty(x.shape[0], P * K, dtype=x.dtype, device=x.device)
    for p in _groups(P, K * Q * D, x):
        torch.mm(x, _build(A[:, p], S, x.dtype, triton).t(), out=y[:, p.start * K : p.stop * K])
    return y


def _built_backward(dy: Tensor, x: Tensor, A: Tensor, S: Tensor, needed: list[bool], triton: bool) -> list[Tensor]:
    """By columns of H: dx_q = dy H_q and dH_q = dy^T x_q are whole, with no sum over blocks."""
    need_x, need_A, need_S = needed
    (n, P, Q), (_, K, D) = A.shape, S.shape
    wide = compute_dtype(A, S)
    A_wide, S_wide = (A, S) if triton else (A.to(wide), S.to(wide))
    dx, dA = empty_if(need_x, x, x), empty_if(need_A, A, x)
    dS = empty_if(need_S, S, x, wide).zero_()
    for q in _groups(Q, P * K * D, x):
        columns, width = slice(q.start * D, q.stop * D), q.stop - q.start
        if need_x:
            torch.mm(dy, _build(A_wide[:, :, q], S_wide, x.dtype, triton), out=dx[:, columns])
        if (need_A or need_S) and triton:
            from archzoo.kernels import _kron_sum_triton

            of_A, of_S = _kron_sum_triton.backward(dy.t() @ x[:, columns], A[:, :, q], S, need_A, need_S)
            if of_A is not None:
                dA[:, :, q] = of_A
            if of_S is not None:
                dS += of_S
        elif need_A or need_S:
            dH = _split(dy.t() @ x[:, columns], P, width).to(wide)
            if need_A:
                dA[:, :, q] = (S_wide.reshape(n, K * D) @ dH.t()).view(n, P, width)
            if need_S:
                dS.view(n, K * D).addmm_(A_wide[:, :, q].reshape(n, P * width), dH)
    return [dx, dA, dS.to(S.dtype)]


def _factored(x: Tensor, A: Tensor, S: Tensor) -> Tensor:
    (n, P, Q), K = A.shape, S.shape[1]
    rows = x.shape[0]
    A, S, x_blocks = A.to(x.dtype), S.to(x.dtype), _blocks_first(x, Q)
    total = torch.zeros(P, rows * K, dtype=compute_dtype(x), device=x.device)
    for i in _groups(n, rows * Q * K, x, least=2):  # a GEMM that mixes two terms saves a pass over the sum
        terms = i.stop - i.start
        U = torch.bmm(x_blocks.expand(terms, -1, -1), S[i].transpose(1, 2)).view(terms * Q, rows * K)
        total += A[i].transpose(0, 1).reshape(P, terms * Q) @ U
    return _blocks_last(total.to(x.dtype), rows, K)


def _factored_backward(dy: Tensor, x: Tensor, A: Tensor, S: Tensor, needed: list[bool]) -> list[Tensor]:
    """With V_ip = S_i^T dy_p: dx_q = sum_ip A[i,p,q] V_ip, dA[i,p,q] = <V_ip, x_q>;
    dS_i = sum_q (sum_p A[i,p,q] dy_p) x_q^T.
    """
    need_x, need_A, need_S = needed
    (n, P, Q), (_, K, D) = A.shape, S.shape
    rows = x.shape[0]
    A_like, S_like = A.to(x.dtype), S.to(x.dtype)
    x_blocks, dy_blocks = _blocks_first(x, Q), _blocks_first(dy, P)
    total = empty_if(need_x, x, x, compute_dtype(x)).zero_()
    dA, dS = empty_if(need_A, A, x), empty_if(need_S, S, x)
    for i in _groups(n, rows * max(P * D, Q * K), x, least=2):
        terms = i.stop - i.start
        if need_x or need_A:
            V = torch.bmm(dy_blocks.expand(terms, -1, -1), S_like[i]).view(terms * P, rows * D)
            if need_x:
                total.view(Q, rows * D).add_(A_like[i].reshape(terms * P, Q).t() @ V)
            if need_A:
                dA[i] = (V @ x_blocks.view(Q, rows * D).t()).view(terms, P, Q)
            del V  # so that V and dU are never held together
        if need_S:
            dU = A_like[i].transpose(1, 2).reshape(terms * Q, P) @ dy_blocks.view(P, rows * K)
            dS[i] = torch.bmm(dU.view(terms, Q * rows, K).transpose(1, 2), x_blocks.expand(terms, -1, -1))
            del dU
    dx = total.to(x.dtype)
    return [_blocks_last(dx.view(Q, rows * D), rows, D) if need_x else dx, dA, dS]


def _linear_fake(x: Tensor, A: Tensor, S: Tensor, triton: bool = False) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[1] * S.shape[1])


kron_linear_op = DifferentiableOp(
    "kron_linear", _linear, _linear_backward, fake=_linear_fake, definition=_plain, tensors=3
)


# --- What it costs ----------------------------------------------------------------------------------------------------


@flop_formula(torch.ops.archzoo.kron_sum)
def _build_flops(A: Any, S: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * A[0] * A[1] * A[2] * S[1] * S[2])


@flop_formula(torch.ops.archzoo.kron_sum_backward)
def _build_backward_flops(dH: Any, A: Any, S: Any, dtype: Any, needed: list[bool], *args: Any, **kwargs: Any) -> int:
    return sum(needed) * _build_flops(A, S)


@flop_formula(torch.ops.archzoo.kron_linear)
def _linear_flops(x: Any, A: Any, S: Any, *args: Any, **kwargs: Any) -> int:
    rows, n, out = x[0], A[0], A[1] * S[1]
    rest = 2 * rows * n * A[2] * out if _is_factored(rows, A, S) else _build_flops(A, S)
    return int(2 * rows * out * x[1] + rest)


@flop_formula(torch.ops.archzoo.kron_linear_backward)
def _linear_backward_flops(dy: Any, x: Any, A: Any, S: Any, needed: list[bool], *args: Any, **kwargs: Any) -> int:
    need_x, need_A, need_S = needed
    rows, n, out = x[0], A[0], A[1] * S[1]
    gemm, build = 2 * rows * out * x[1], _build_flops(A, S)
    if _is_factored(rows, A, S):
        mix_V, mix_dy = 2 * rows * n * A[1] * x[1], 2 * rows * n * A[2] * out
        return int((need_x or need_A) * gemm + (need_x + need_A) * mix_V + need_S * (gemm + mix_dy))
    return int(need_x * (gemm + build) + (need_A or need_S) * gemm + (need_A + need_S) * build)


# --- Public -----------------------------------------------------------------------------------------------------------


def _check(A: Tensor, S: Tensor) -> None:
    if A.dim() != 3 or S.dim() != 3 or A.shape[0] != S.shape[0]:
        raise ValueError(
            f"A of shape {tuple(A.shape)}, S of shape {tuple(S.shape)}: must be (n, P, Q) and (n, K, D) with the same n"
        )


def _products(A: Tensor, S: Tensor) -> int:
    """How many H is the sum of."""
    return S.numel() * A.shape[1] * A.shape[2]


def kron_sum(A: Tensor, S: Tensor) -> Tensor:
    """H = sum_i A_i (x) S_i, differentiable.

    Args:
        A: (n, P, Q), real floating point.
        S: (n, K, D), real floating point.

    Returns:
        H (P K, Q D) in the wider dtype of the two; under autocast in autocast's. Summed in float32 at least.

    Raises:
        ValueError: If the shapes do not fit; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    _check(A, S)
    dtype = autocast_dtype(S)
    if dtype == S.dtype:
        dtype = torch.promote_types(A.dtype, S.dtype)
    if under_transform():
        refuse_triton("kron_sum", "a torch.func transform")
        return _build(A, S, dtype)
    H: Tensor = kron_sum_op(A, S, dtype, takes_triton("kron_sum", _products(A, S), S=S, A=A))
    return H


def kron_linear(x: Tensor, A: Tensor, S: Tensor) -> Tensor:
    """y = x H^T with H = sum_i A_i (x) S_i, without keeping H.

    Args:
        x: (*, Q D), real floating point.
        A: (n, P, Q), real floating point.
        S: (n, K, D), real floating point.

    Returns:
        y (*, P K) in the dtype of x; under autocast in autocast's, as `nn.Linear` gives.

    Raises:
        ValueError: If the shapes do not fit, or x is not floating point; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    _check(A, S)
    features = A.shape[2] * S.shape[2]
    if x.dim() == 0 or x.shape[-1] != features or not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and {x.dtype}: must be (*, {features}) and floating point, "
            f"for A of shape {tuple(A.shape)} and S of shape {tuple(S.shape)}"
        )
    x = x.to(autocast_dtype(x))
    if under_transform():
        refuse_triton("kron_linear", "a torch.func transform")
        return _plain(x, A, S)
    triton = takes_triton("kron_linear", _products(A, S), x=x, A=A, S=S)
    y: Tensor = kron_linear_op(x.reshape(-1, features), A, S, triton)
    return y.view(*x.shape[:-1], A.shape[1] * S.shape[1])
