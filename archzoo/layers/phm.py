r"""PHM: a weight matrix as a sum of Kronecker products, $H = \sum_i A_i \otimes S_i$ (https://arxiv.org/abs/2102.08597).

n small matrices A_i say how n blocks of features mix; for n = 4 and fixed signs they are the Hamilton product, and the
layer is a quaternion layer (https://arxiv.org/abs/1806.04418). S_i (out/n, in/n) hold the rest: out in / n + n^3
parameters in place of out in. With S_i of low rank and one A for all layers it is Compacter
(https://arxiv.org/abs/2106.04647).

It saves parameters, not arithmetic: a learned rule of full rank costs what `nn.Linear` costs, and a little more. Faster
are few rows (1/n of the bytes are read), `rank`, and `rule="mixing"`.

Where paper and code differ, the paper is followed: in the authors' TensorFlow code only the row sums of each A_i act,
which is `rule="mixing"`.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.kron_sum import kron_linear, kron_sum
from archzoo.registry import Card, register_layer

ALGEBRAS = {"real": 1, "complex": 2, "quaternion": 4, "octonion": 8, "sedenion": 16}
"""Names of the fixed rules, and the n of each."""


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


@register_layer(
    "phm",
    kind="linear",
    nonlinear=False,
    card=Card(
        title="Beyond Fully-Connected Layers with Quaternions: "
        "Parameterization of Hypercomplex Multiplications with 1/n Parameters",
        authors="Aston Zhang, Yi Tay, Shuai Zhang, Alvin Chan, Anh Tuan Luu, Siu Cheung Hui, Jie Fu",
        year=2021,
        arxiv="2102.08597",
        equation=r"y = \Big(\sum_{i=1}^n A_i \otimes S_i\Big) x + b",
        headline="Transformer, En-Vi: BLEU 28.43; with 1/n of the parameters, "
        "n = 2 / 4 / 8 / 16: 29.25 / 29.13 / 29.34 / 29.04",
        reproduced="none of the paper's tasks. On random quaternion maps, 16 -> 16: with S known, A is found to 1e-6 "
        "by 8 of 10 seeds (one more to 2e-6, one to 2e-4); with both learned, the relative error is 1e-7 for the "
        "learned rule, 0.65 to 0.79 for 'mixing' (5 seeds)",
    ),
)
class PHMLinear(nn.Module):
    r"""Linear layer whose weight is a sum of n Kronecker products: $y = H x + b$, $H = \sum_i A_i \otimes S_i$.

    Stands in for `nn.Linear` with about 1/n of its parameters. H[p out/n + k, q in/n + d] = sum_i A[i,p,q] S[i,k,d].
    At init Var(H) = 2 / (in + out) (Glorot) for every rule but a given one, for any n.

    Parameters: `A` (n, n, n), or (n, n) for `"mixing"`, a buffer where the rule is fixed; `S` (n, out/n, in/n), or with
    `rank` `S_left` (n, out/n, rank) and `S_right` (n, rank, in/n); `bias` (out,).

    Args:
        in_features: Size of each input, a multiple of n.
        out_features: Size of each output, a multiple of n.
        bias: Whether to add b.
        n: Number of Kronecker products, and of the blocks that inputs and outputs are cut into.
        rule: How blocks mix, A. `"learned"`: from N(0, 1), scaled so that sum_i A[i,p,q]^2 = 1. `"real"` (n = 1),
            `"complex"` (2), `"quaternion"` (4), `"octonion"` (8), `"sedenion"` (16): the algebra's signs, see
            `hypercomplex_rule`. A tensor (n, n, n): an `nn.Parameter` is used as it is, so that many layers can share
            one; any other is copied; `reset_parameters` leaves both alone. `"mixing"`: y_p = sum_q A[p,q] S_q x_q with
            A (n, n) from N(0, 1), n times fewer FLOPs than `nn.Linear` and far less expressive.
        learn_rule: Whether A is a parameter. None: yes, unless the rule is an algebra's or a given tensor that is no
            `nn.Parameter`.
        rank: Makes S_i = S_left_i S_right_i, of this rank. None: full rank.
        device: Of parameters and buffers; also a given tensor is moved there, but not a given `nn.Parameter`.
        dtype: As `device`.

    Shape: (*, in_features) -> (*, out_features). Under autocast the output has autocast's dtype, as with `nn.Linear`.

    Raises:
        ValueError: If a size is not a multiple of n, n or rank is below 1, the rule is unknown or does not fit n, or
            `learn_rule=False` meets an `nn.Parameter`; in `forward`, if the input's last size or dtype is wrong.
    """

    A: Tensor
    S: nn.Parameter | None
    S_left: nn.Parameter | None
    S_right: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        n: int = 4,
        rule: str | Tensor = "learned",
        learn_rule: bool | None = None,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features, out_features, n, rank)
        _check_rule(rule, learn_rule, n)
        self.in_features, self.out_features, self.n, self.rank = in_features, out_features, n, rank
        self.rule = rule if isinstance(rule, str) else "given"
        k, d = out_features // n, in_features // n
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        if isinstance(rule, nn.Parameter):
            self.A = rule
        else:
            if isinstance(rule, Tensor):
                A = torch.empty(n, n, n, **factory).copy_(rule.detach())
            else:
                A = torch.empty((n, n) if rule == "mixing" else (n, n, n), **factory)
            if learn_rule or (learn_rule is None and self.rule in ("learned", "mixing")):
                self.A = nn.Parameter(A)
            else:
                self.register_buffer("A", A)
        self.S = nn.Parameter(torch.empty(n, k, d, **factory)) if rank is None else None
        self.S_left = None if rank is None else nn.Parameter(torch.empty(n, k, rank, **factory))
        self.S_right = None if rank is None else nn.Parameter(torch.empty(n, rank, d, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws everything anew, from torch's global generator, but for a given rule."""
        fans = self.in_features + self.out_features
        if self.rule in ALGEBRAS:
            self.A.copy_(hypercomplex_rule(self.n, dtype=self.A.dtype, device=self.A.device))
        elif self.rule == "mixing":
            self.A.normal_()
        elif self.rule == "learned":
            normal = torch.randn(
                self.A.shape, dtype=torch.promote_types(self.A.dtype, torch.float32), device=self.A.device
            )
            self.A.copy_(normal / torch.linalg.vector_norm(normal, dim=0))
        if self.S is not None:
            bound = math.sqrt(6 / fans)
            self.S.uniform_(-bound, bound)
        for factor in (self.S_left, self.S_right):
            if factor is not None and self.rank is not None:
                factor.normal_(std=(2 / (fans * self.rank)) ** 0.25)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            self.bias.uniform_(-bound, bound)

    @property
    def weight(self) -> Tensor:
        """H (out, in), built anew at each access and differentiable, for code that looks at `.weight`. Read-only."""
        S = self._full_rank()
        if self.rule == "mixing":
            blocks = self.A[:, :, None, None] * S  # (p, q, k, d)
            return blocks.transpose(1, 2).reshape(self.out_features, self.in_features)
        return kron_sum(self.A, S)

    def _full_rank(self) -> Tensor:
        if self.S is not None:
            return self.S
        assert self.S_left is not None
        assert self.S_right is not None
        return torch.bmm(self.S_left, self.S_right)

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        _check_input(x, self.in_features, self.S if self.S is not None else self.S_left)
        n = self.n
        if self.rule == "mixing":
            y = self._mixing(x.unflatten(-1, (n, -1)))
        elif self.rank is not None and self._chain_is_cheaper(self.rank):
            y = self._chain(x.unflatten(-1, (n, -1)))
        else:
            y = kron_linear(x, self.A, self._full_rank())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _mixing(self, x: Tensor) -> Tensor:
        """y_p = sum_q A[p,q] S_q x_q."""
        if self.S is not None:
            z = torch.einsum("...qd,qkd->...qk", x, self.S)
        else:
            z = torch.einsum("...qr,qkr->...qk", torch.einsum("...qd,qrd->...qr", x, self.S_right), self.S_left)
        return torch.einsum("pq,...qk->...pk", self.A, z).flatten(-2)

    def _chain_is_cheaper(self, rank: int) -> bool:
        """Whether the factors one after the other need fewer multiply-adds a row than the full matrix."""
        n, i, o = self.n, self.in_features, self.out_features
        return n * rank * (i + o) + n**3 * rank < o * i

    def _chain(self, x: Tensor) -> Tensor:
        """y_p = sum_i S_left_i sum_q A[i,p,q] (S_right_i x_q)."""
        assert self.S_left is not None
        assert self.S_right is not None
        inner = F.linear(x, self.S_right.flatten(0, 1)).unflatten(-1, (self.n, -1))  # (*, q, i, r)
        mixed = torch.einsum("...qir,ipq->...pir", inner, self.A.to(inner.dtype)).flatten(-2)
        return (mixed @ self.S_left.transpose(1, 2).flatten(0, 1)).flatten(-2)

    def extra_repr(self) -> str:
        """Sizes, bias, n, rule and rank."""
        text = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, n={self.n}, rule={self.rule!r}"
        if isinstance(self.A, nn.Parameter) and self.rule in ALGEBRAS:
            text += ", learn_rule=True"
        return text if self.rank is None else f"{text}, rank={self.rank}"


def share_rule_(module: nn.Module, n: int | None = None) -> int:
    """Gives all PHM layers in `module` with a learned rule and the same n one `A`, the first one's, as Compacter does.

    Call it before the optimizer is made. Rules of another shape (`"mixing"`), dtype or device are shared apart.

    Args:
        module: Changed in place; it may be a PHM layer itself.
        n: Only layers of this n; None: of each n.

    Returns:
        How many layers now share a rule, the first of each n included.
    """
    first: dict[Any, nn.Parameter] = {}
    count = 0
    for layer in module.modules():
        if isinstance(layer, PHMLinear) and isinstance(layer.A, nn.Parameter) and n in (None, layer.n):
            layer.A = first.setdefault((layer.A.shape, layer.A.dtype, layer.A.device), layer.A)
            count += 1
    return count


def _check_sizes(in_features: Any, out_features: Any, n: Any, rank: Any) -> None:
    sizes = {
        "in_features": in_features,
        "out_features": out_features,
        "n": n,
        **({} if rank is None else {"rank": rank}),
    }
    for name, value in sizes.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value}: must be a whole number, 1 or more, got {value!r}")
    common = math.gcd(in_features, out_features)
    fitting = [str(d) for d in range(1, min(common, 64) + 1) if common % d == 0]
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if value % n:
            raise ValueError(
                f"{name}={value}: must be a multiple of n={n}; both in_features={in_features} and "
                f"out_features={out_features} are multiples of n = {', '.join(fitting)}"
            )


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
    elif not isinstance(rule, str) or rule not in ("learned", "mixing", *ALGEBRAS):
        known = ", ".join(map(repr, ("learned", *ALGEBRAS, "mixing")))
        raise ValueError(f"rule={rule!r}: must be one of {known}, or a tensor of shape (n, n, n)")
    elif ALGEBRAS.get(rule, n) != n:
        raise ValueError(f"n={n}: rule={rule!r} needs n={ALGEBRAS[rule]}")


def _check_input(x: Tensor, in_features: int, weight: Tensor | None) -> None:
    shape: Sequence[int] = x.shape
    if len(shape) == 0 or shape[-1] != in_features:
        raise ValueError(f"input of shape {tuple(shape)}: its last size must be in_features={in_features}")
    if weight is not None and x.dtype != weight.dtype:
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if not (autocast and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)):
            raise ValueError(f"input of {x.dtype}: must be {weight.dtype}, as the layer's parameters are")
