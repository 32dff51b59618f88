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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.kron_sum import kron_linear
from archzoo.layers._check import check_features, check_whole, typed
from archzoo.layers._phm import ALGEBRAS, _Hypercomplex, check_multiples, hypercomplex_rule, share_rule_
from archzoo.layers.start import Start, check_original, copy_bias, fresh, relative_error
from archzoo.registry import Card, register_layer

__all__ = ["ALGEBRAS", "PHMLinear", "hypercomplex_rule", "share_rule_"]


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
        reproduced="none of the paper's tasks. Characters of Tiny Shakespeare by a small transformer (experiment "
        "phm_text), 2 seeds, bits a character at equal width: nn.Linear 2.92, n = 2 3.05, n = 4 3.22, n = 8 3.27, "
        "mixing 3.13; at equal parameters 3.27 against 3.13 to 3.26. On random quaternion maps, 16 -> 16 (benchmark "
        "phm_recovery): with S known, A is found to 7e-7 (median of 10 seeds; the worst 2e-4); with both learned, the "
        "relative error is 1e-7 for the learned rule, 0.65 to 0.79 for 'mixing' (5 seeds)",
    ),
)
class PHMLinear(_Hypercomplex):
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

    S: nn.Parameter | None
    S_left: nn.Parameter | None
    S_right: nn.Parameter | None
    bias: nn.Parameter | None

    @typed
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
        check_whole(in_features=in_features, out_features=out_features, n=n, **({} if rank is None else {"rank": rank}))
        check_multiples(n, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        k, d = out_features // n, in_features // n
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_rule(n, rule, learn_rule, factory)
        self.S = nn.Parameter(torch.empty(n, k, d, **factory)) if rank is None else None
        self.S_left = None if rank is None else nn.Parameter(torch.empty(n, k, rank, **factory))
        self.S_right = None if rank is None else nn.Parameter(torch.empty(n, rank, d, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws everything anew, from torch's global generator, but for a given rule."""
        fans = self.in_features + self.out_features
        self._reset_rule()
        if self.S is not None:
            bound = math.sqrt(6 / fans)
            self.S.uniform_(-bound, bound)
        for factor in (self.S_left, self.S_right):
            if factor is not None and self.rank is not None:
                factor.normal_(std=(2 / (fans * self.rank)) ** 0.25)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            self.bias.uniform_(-bound, bound)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Start["PHMLinear"]:
        """The layer whose H is nearest to the weight of an `nn.Linear`; the bias is copied.

        | options | A | S | |
        |---|---|---|---|
        | `rule="learned"` | singular vectors of the weight, its blocks laid out as rows | least squares | the nearest |
        | an algebra's or a given rule | as it is, also if it is learned from there | least squares | the nearest |
        | `rule="mixing"` | as `"learned"`, for each block of inputs | least squares | the nearest |
        | `rank` | as above, then in turns with S | truncated, balanced between the factors | a local minimum |

        It is exact with n = 1, and where the weight is such a sum of Kronecker products. A generic weight is far from
        all sums of n: of random square weights, n = 4 leaves 0.86 of the norm, n = 2 0.70. So the layer is a start for
        training or distillation, not a replacement. A chosen A keeps the size it has at initialisation, the mean of
        sum_i A[i,p,q]^2 is 1, and no zero keeps a parameter from training.

        Args:
            linear: The original.
            options: n, rule, learn_rule, rank.

        Returns:
            The layer, and its error, |H - weight| / |weight| in the Frobenius norm.

        Raises:
            TypeError: If the original is no `nn.Linear`, or there is no such option.
            ValueError: If a size is not a multiple of n, an option is wrong, or the weight is not finite.
        """
        check_original(linear, nn.Linear)
        layer = fresh(cls, linear, **options)
        S = layer._fit(linear.weight, layer.rank)
        if layer.S is not None:
            layer.S.copy_(S)
        else:
            layer._factor(S)
        copy_bias(layer, linear)
        return Start(layer, relative_error(layer.weight, linear.weight))

    def _factor(self, S: Tensor) -> None:
        """Makes S_left_i S_right_i the nearest to S_i, with factors of equal size; what is left over of S_left stays.

        Where a singular value is 0, so are the right factors alone: with both, neither would ever get a gradient.
        """
        assert self.S_left is not None
        assert self.S_right is not None
        U, s, V = torch.linalg.svd(S, full_matrices=False)
        kept = min(s.shape[-1], self.S_left.shape[-1])
        U, s, V = U[..., :kept], s[:, None, :kept], V[:, :kept]
        least = self.S_left.double().square().mean().sqrt() * 0.1 * S.shape[1] ** 0.5  # a tenth of a column's norm
        left = s.sqrt().clamp(min=float(least))
        self.S_left[..., :kept] = U * left
        self.S_right.zero_()
        self.S_right[:, :kept] = V * (s / left).transpose(1, 2)

    @property
    def weight(self) -> Tensor:
        """H (out, in), built anew at each access and differentiable, for code that looks at `.weight`. Read-only."""
        return self._sum(self._full_rank())

    def _full_rank(self) -> Tensor:
        if self.S is not None:
            return self.S
        assert self.S_left is not None
        assert self.S_right is not None
        return torch.bmm(self.S_left, self.S_right)

    @property
    def _a_weight(self) -> Tensor:
        """S, or a factor of it."""
        weight = self.S_left if self.S is None else self.S
        assert weight is not None
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features)."""
        check_features(x, self.in_features, self._a_weight)
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
        text = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._rule_repr()}"
        return text if self.rank is None else f"{text}, rank={self.rank}"
