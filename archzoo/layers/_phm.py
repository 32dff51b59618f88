r"""What hypercomplex layers have in common: the rule A, checked, made, drawn and shared, and the sum it takes part in.

Every such layer has a matrix $H = \sum_i A_i \otimes S_i$, with A (n, n, n) and S (n, K, D), or for `rule="mixing"`
blocks H_pq = A[p,q] S_q with A (n, n). Here is also how to come as near as that form can to a matrix that is given.
"""

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.kernels.kron_sum import kron_sum

ALGEBRAS = {"real": 1, "complex": 2, "quaternion": 4, "octonion": 8, "sedenion": 16}
"""Names of the fixed rules, and the n of each."""

_OWN = ("learned", "mixing")  # rules whose A is the layer's own to draw and to choose
_SWEEPS = 20  # alternations between A and factors of low rank; they gain little after the first few


def _sign(i: int, q: int, n: int) -> int:
    """The sign of e_i e_q = +-e_(i xor q), by Cayley-Dickson doubling: (a, b)(c, d) = (a c - d* b, d a + b c*)."""
    if n == 1:
        return 1
    half = n // 2
    if i < half:
        return _sign(i, q, half) if q < half else _sign(q - half, i, half)
    conjugate = 1 if q % half == 0 else -1
    if q < half:
        return conjugate * _sign(i - half, q, half)
    return -conjugate * _sign(q - half, i - half, half)


def hypercomplex_rule(n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """Multiplication table of the n-dimensional Cayley-Dickson algebra: A[i,p,q] is the coefficient of e_p in e_i e_q.

    The weight stands on the left, W x. n = 2, 4, 8 are the complex numbers, the quaternions and the octonions, which
    keep norms, |x y| = |x| |y|; n = 16 are the sedenions, which do not.

    Args:
        n: Dimension, a power of two.
        dtype: Of the result; torch's default if None.
        device: Of the result.

    Returns:
        A (n, n, n), entries -1, 0 and 1.

    Raises:
        ValueError: If n is not a power of two.

    >>> hypercomplex_rule(2).tolist()
    [[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]]]
    """
    if not isinstance(n, Integral) or n < 1 or n & (n - 1):
        raise ValueError(f"n={n!r}: must be a power of two, as 1, 2, 4, 8 or 16")
    signs = [[[_sign(i, q, n) if i ^ q == p else 0 for q in range(n)] for p in range(n)] for i in range(n)]
    return torch.tensor(signs, dtype=dtype or torch.get_default_dtype(), device=device)


class _Hypercomplex(nn.Module):
    """A layer with a rule A. A subclass calls `_make_rule` where it is built, `_reset_rule` where it is reset."""

    A: Tensor
    n: int
    rule: str

    def _make_rule(self, n: int, rule: str | Tensor, learn_rule: bool | None, factory: dict[str, Any]) -> None:
        """Sets n, the rule's name, and A: a parameter, or a buffer; but for a given rule it is not filled yet."""
        _check_rule(rule, learn_rule, n)
        self.n, self.rule = n, rule if isinstance(rule, str) else "given"
        if isinstance(rule, nn.Parameter):
            self.A = rule
            return
        if isinstance(rule, Tensor):
            A = torch.empty(n, n, n, **factory).copy_(rule.detach())
        else:
            A = torch.empty((n, n) if rule == "mixing" else (n, n, n), **factory)
        if learn_rule or (learn_rule is None and self.rule in _OWN):
            self.A = nn.Parameter(A)
        else:
            self.register_buffer("A", A)

    @torch.no_grad()
    def _reset_rule(self) -> None:
        """Fills A anew, but for a given rule."""
        if self.rule in ALGEBRAS:
            self.A.copy_(hypercomplex_rule(self.n, dtype=self.A.dtype, device=self.A.device))
        elif self.rule == "mixing":
            self.A.normal_()
        elif self.rule == "learned":
            wide = torch.promote_types(self.A.dtype, torch.float32)
            normal = torch.randn(self.A.shape, dtype=wide, device=self.A.device)
            self.A.copy_(normal / torch.linalg.vector_norm(normal, dim=0))

    def _sum(self, S: Tensor) -> Tensor:
        """H (n K, n D) of S (n, K, D), differentiable; under autocast in its dtype."""
        if self.rule == "mixing":
            n, K, D = S.shape
            return (self.A[:, :, None, None] * S).transpose(1, 2).reshape(n * K, n * D)  # (p, q, k, d)
        return kron_sum(self.A, S)

    def _rule_repr(self) -> str:
        text = f"n={self.n}, rule={self.rule!r}"
        return f"{text}, learn_rule=True" if isinstance(self.A, nn.Parameter) and self.rule in ALGEBRAS else text

    @torch.no_grad()
    def _fit(self, H: Tensor, rank: int | None = None) -> Tensor:
        """Sets A, where it is the layer's own, and returns S (n, K, D), in float64: the sum is as near to H as it can.

        With a rank, the S_i are of that rank at most, and the sum is as near as alternating steps bring it.
        """
        if not H.isfinite().all():
            raise ValueError(f"weight of shape {tuple(H.shape)}: holds inf or NaN, to which nothing is near")
        n, own = self.n, self.rule in _OWN
        blocks = H.double().view(n, H.shape[0] // n, n, H.shape[1] // n).transpose(1, 2)  # (p, q, k, d)
        A = None if own else self.A.double().view(n, n * n)
        if self.rule == "mixing":  # a problem of its own for each block of inputs
            columns = [_nearest(blocks[:, q], None, 1, rank, self.A.dtype) for q in range(n)]
            self.A.copy_(torch.cat([a for a, _ in columns]).t())
            return torch.cat([s for _, s in columns])
        A, S = _nearest(blocks.flatten(0, 1), A, n, rank, self.A.dtype)
        if own:
            self.A.copy_(A.view(n, n, n))
        return S


def share_rule_(module: nn.Module, n: int | None = None) -> int:
    """Gives all hypercomplex layers in `module` with a learned rule and the same n one `A`, the first one's.

    Linear maps, convolutions and embeddings alike; Compacter (https://arxiv.org/abs/2106.04647) does so for its
    adapters. Call it before the optimizer is made. Rules of another shape (`"mixing"`), dtype or device are shared
    apart.

    Args:
        module: Changed in place; it may be a hypercomplex layer itself.
        n: Only layers of this n; None: of each n.

    Returns:
        How many layers now share a rule, the first of each n included.
    """
    first: dict[Any, nn.Parameter] = {}
    count = 0
    for layer in module.modules():
        if isinstance(layer, _Hypercomplex) and isinstance(layer.A, nn.Parameter) and n in (None, layer.n):
            layer.A = first.setdefault((layer.A.shape, layer.A.dtype, layer.A.device), layer.A)
            count += 1
    return count


# --- The nearest sum --------------------------------------------------------------------------------------------------


def _nearest(
    blocks: Tensor, A: Tensor | None, terms: int, rank: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A (terms, M) and S (terms, K, D) that make sum_im (A[i,m] S_i - blocks_m)^2 small, for blocks (M, K, D).

    Laid out as M rows of K D numbers this is a matrix approximated by one of rank `terms`: its singular vectors are the
    nearest (Van Loan and Pitsianis 1993), and given A it is a problem of least squares. The rows of an A that is chosen
    have equal norms, with mean 1 of sum_i A[i,m]^2, and none is zero: what S has to be zero for can still be learned.

    Args:
        blocks: In float64.
        A: Given, or None: chosen here.
        terms: Number of terms.
        rank: Largest rank of an S_i; None: any. Then A, if it is to be chosen, and S are improved in turns.
        dtype: What a chosen A is rounded to; S allows for that.
    """
    M, K, D = blocks.shape
    R, choose, size = blocks.reshape(M, K * D), A is None, math.sqrt(M / terms)
    if A is None:
        A = torch.linalg.svd(R, full_matrices=terms > K * D)[0][:, :terms].t() * size
        A = A.to(dtype).double()
    S = torch.linalg.pinv(A.t()) @ R
    if rank is None or rank >= min(K, D):
        return A, S.view(terms, K, D)
    last = math.inf
    for _ in range(_SWEEPS):
        for i, a in enumerate(A):
            if norm := float(a @ a):
                target = S[i] + a @ (R - A.t() @ S) / norm
                S[i] = _of_rank(target.view(K, D), rank).flatten()
        error = float((R - A.t() @ S).norm())
        if not choose or error >= last * (1 - 1e-4):
            break
        last = error
        better = (R @ torch.linalg.pinv(S)).t()
        norms = better.norm(dim=1, keepdim=True) / size
        A = torch.where(norms > 0, better / norms, A).to(dtype).double()
        S = S * norms
    return A, S.view(terms, K, D)


def _of_rank(matrix: Tensor, rank: int) -> Tensor:
    U, s, V = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * s[:rank] @ V[:rank]


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_multiples(n: int, **sizes: int) -> None:
    """A ValueError unless every size is a multiple of n; it lists the n that all would be multiples of."""
    for name, value in sizes.items():
        if value % n:
            common = math.gcd(*sizes.values())
            fitting = ", ".join(str(d) for d in range(1, min(common, 64) + 1) if common % d == 0)
            told = " and ".join(f"{key}={size}" for key, size in sizes.items())
            are = f"both {told} are multiples" if len(sizes) > 1 else f"{told} is a multiple"
            raise ValueError(f"{name}={value}: must be a multiple of n={n}; {are} of n = {fitting}")


def _check_rule(rule: Any, learn_rule: bool | None, n: int) -> None:
    if isinstance(rule, Tensor):
        if rule.shape != (n, n, n):
            raise ValueError(f"rule of shape {tuple(rule.shape)}: must be (n, n, n) = {(n, n, n)}")
        if rule.is_complex() or (isinstance(rule, nn.Parameter) and not rule.is_floating_point()):
            raise ValueError(f"rule of shape {tuple(rule.shape)} and {rule.dtype}: must be real floating point")
        if isinstance(rule, nn.Parameter) and learn_rule is False:
            raise ValueError(
                "learn_rule=False: a rule that is an nn.Parameter is learned; pass rule=parameter.detach()"
            )
    elif not isinstance(rule, str) or rule not in (*_OWN, *ALGEBRAS):
        known = ", ".join(map(repr, ("learned", *ALGEBRAS, "mixing")))
        raise ValueError(f"rule={rule!r}: must be one of {known}, or a tensor of shape (n, n, n)")
    elif ALGEBRAS.get(rule, n) != n:
        raise ValueError(f"n={n}: rule={rule!r} needs n={ALGEBRAS[rule]}")
