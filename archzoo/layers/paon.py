"""PAON, neurons that are Padé approximants of their inputs (https://arxiv.org/abs/2403.11791, 2601.04005)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from archzoo.kernels.paon_linear import paon_linear
from archzoo.layers._check import check_features, check_whole, typed
from archzoo.layers.start import Start, check_original, fresh
from archzoo.registry import Card, register_layer

Variant = Literal["smooth", "absolute", "s", "a"]
_VARIANTS: dict[str, Literal["smooth", "absolute"]] = {
    "smooth": "smooth",
    "s": "smooth",
    "absolute": "absolute",
    "a": "absolute",
}


def _check_degrees(degrees: Sequence[int], bias: bool) -> tuple[int, int]:
    """[M/N] as a tuple; a ValueError for anything but two non-negative integers that leave something to learn."""
    found = tuple(degrees) if isinstance(degrees, Sequence) else ()
    if len(found) != 2 or any(not isinstance(k, int) or isinstance(k, bool) or k < 0 for k in found):
        raise ValueError(f"degrees={degrees!r}: must be two non-negative integers (M, N), as (1, 1)")
    if found == (0, 0):
        raise ValueError(f"degrees={degrees!r}: a neuron of degrees [0/0] ignores its input; use M >= 1 or N >= 1")
    if found[0] == 0 and not bias:
        raise ValueError(f"degrees={degrees!r} with bias=False: the output would always be 0; use M >= 1 or bias=True")
    return found[0], found[1]


def _check_variant(variant: str) -> Literal["smooth", "absolute"]:
    if variant not in _VARIANTS:
        raise ValueError(f"variant={variant!r}: must be 'smooth' (or 's') or 'absolute' (or 'a')")
    return _VARIANTS[variant]


def _check_non_negative(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r}: must be a finite number, 0 or more")
    return float(value)


def _a_weight(numerator: Tensor | None, denominator: Tensor | None) -> Tensor:
    """One of them that is there."""
    weight = denominator if numerator is None else numerator
    assert weight is not None
    return weight


@torch.no_grad()
def _reset_pade_parameters(
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    fan_in: float,
    variant: Literal["smooth", "absolute"],
    denominator_init: float | None,
) -> None:
    """Initial values of a Padé neuron of any kind; see `PaonLinear`. Degree k is at index k - 1 of the first axis."""
    M, N = (0 if t is None else len(t) for t in (numerator, denominator))
    bound = math.sqrt(3 / fan_in)  # that of a uniform distribution of variance 1 / fan_in
    if numerator is not None:
        gain = 2.0 if variant == "smooth" and M == 1 and N >= 1 else 1.0
        numerator.zero_()
        nn.init.uniform_(numerator[0], -gain * bound, gain * bound)
    if denominator is not None:
        if denominator_init is None:
            leaves_zero = variant == "smooth" and (M >= 2 or (M == 1 and bias is not None))
            denominator_init = 0.0 if leaves_zero else 0.1
        nn.init.uniform_(denominator, -denominator_init * bound, denominator_init * bound)
    if bias is not None:
        nn.init.uniform_(bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


@torch.no_grad()
def _become_affine_(
    layer: nn.Module,
    original: nn.Linear | nn.Conv2d,
    degrees: tuple[int, int],
    variant: Literal["smooth", "absolute"],
    eps: float,
    denominator_init: float | None,
) -> None:
    """Gives Padé neurons of any kind the outputs of an affine layer; see `PaonLinear.from_linear`."""
    (M, N), dtype = degrees, original.weight.dtype
    if M == 0:
        raise ValueError(f"degrees={degrees}: neurons without numerator compute no affine function; use M >= 1")
    if denominator_init is not None:
        raise ValueError(f"denominator_init={denominator_init!r}: the start decides on the denominators; leave it out")
    if variant == "smooth" and M == 1 and N >= 1 and original.bias is None:
        raise ValueError(
            f"degrees={degrees} without a bias: denominators would start, and stay, at a gradient of 0; use"
            f" degrees=(2, {N}), variant='absolute', or give the original a bias"
        )
    if variant == "absolute" and N >= 1 and dtype == torch.float16:
        raise ValueError(
            f"dtype={dtype}: absolute denominators start at numbers too small for it; start from a layer in float32 or"
            " bfloat16, or use variant='smooth'"
        )
    weight_scale = bias_scale = 1.0
    if variant == "smooth" and N >= 1:  # every Q is 1, so that y = (P_M + P_{M-1}) / (2 + e), and P_0 = w_0
        bias_scale = 1 + (eps / 2 if N >= 2 else 0.0)
        weight_scale = 2 * bias_scale if M == 1 else bias_scale
    numerator = layer.get_parameter("numerator").zero_()
    numerator[0] = original.weight * weight_scale
    if original.bias is not None:
        layer.get_parameter("bias").copy_(original.bias * bias_scale)
    if N >= 1:
        # |q| has no gradient at 0, and one of size 1 however near: 1 + |q| is 1 at any |x^k| < 1e15, in any dtype.
        bound = 0.0 if variant == "smooth" else 1e-25 * math.sqrt(3 / original.weight[0].numel())
        nn.init.uniform_(layer.get_parameter("denominator"), -bound, bound)


_CARD = Card(
    title="PAON: A New Neuron Model using Padé Approximants",
    authors="Onur Keleş, A. Murat Tekalp",
    year=2024,
    arxiv="2403.11791",
    equation=(
        r"y = \frac{Q_N P_M + Q_{N-1} P_{M-1}}{Q_N^2 + Q_{N-1}^2}"
        r" \text{ (smooth) or } \frac{P_M}{1 + \sum_k |V_k x^k|} \text{ (absolute)},"
        r" \quad P_m = w_0 + \sum_{k=1}^m W_k x^k,\ Q_n = 1 + \sum_{k=1}^n V_k x^k"
    ),
    headline=(
        "super-resolution: equal or better PSNR than ResNet-type networks with fewer layers and no activations"
        " (Set5 29.96 dB, Manga109 28.28 dB in arXiv 2601.04005)"
    ),
    reproduced=(
        "images: see `paon_conv2d`. One neuron fitted to x / (1 + x^2) on [-3, 3]: [4/0] stays at a"
        " mean squared error of 0.012, [2/2] with as many weights goes below 0.0003 in both variants"
    ),
)


@register_layer("paon", kind="linear", nonlinear=True, card=_CARD)
class PaonLinear(nn.Module):
    r"""Padé neurons of degrees [M/N]: each output is a rational function of the inputs, with M + N weights per input.

    With $P_m = w_0 + \sum_{k \le m} W_k x^k$, $Q_n = 1 + \sum_{k \le n} V_k x^k$ (element-wise powers, $P_{-1} = 0$):

    - `"smooth"` (Paon-S): $y = (Q_N P_M + Q_{N-1} P_{M-1}) / (Q_N^2 + Q_{N-1}^2 + e)$, e = `eps` if N >= 2, else 0;
    - `"absolute"` (Paon-A): $y = P_M / (1 + \sum_k |V_k x^k|)$;
    - N = 0, both variants: $y = P_M$. [1/0] is `nn.Linear`, [2/0] the quadratic, [Q/0] the generative neuron.

    Stands in for `nn.Linear` and needs no activation behind it. Costs M + N times as much.

    `numerator[0]` starts as U(±g sqrt(3 / in)), the higher degrees at 0; g = 2 for smooth [1/N >= 1], which halves its
    linear part while the denominators are 0, else 1. So the output has about the input's variance. `bias` starts as
    U(±1 / sqrt(in)), `denominator` as U(±d sqrt(3 / in)), d being `denominator_init`.

    High powers want normalised inputs: with float16 parameters and inputs the output overflows where
    |x|^k > 65504 (|x| > 40 for k = 3). The absolute variant has no derivative where a term $V_k x^k$ is 0, and uses 0.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add w_0.
        degrees: (M, N), the degrees of numerator and denominator.
        variant: "smooth" or "absolute"; "s" and "a" for short.
        eps: Keeps the smooth denominator from 0 where Q_N = Q_{N-1} = 0, which N >= 2 allows; N = 1 does not use it.
        denominator_init: d above. None is 0 for smooth with M >= 2, or with M = 1 and a bias, and 0.1 for the others,
            whose denominators would get no gradient at 0 and never train (the published code's never do).

    Attributes:
        numerator: W (M, out, in), degree k at index k - 1; None if M = 0.
        denominator: V (N, out, in); None if N = 0.
        bias: w_0 (out,), or None.

    Shape: (*, in) -> (*, out), in the dtype of the input, or in autocast's; powers and sums are float32 at least.

    Raises:
        ValueError: If the degrees are not two non-negative integers or both 0; if M = 0 without bias (the output would
            be 0); if the variant is unknown; if a size is not a positive integer; if `eps` or `denominator_init` is
            negative; in forward, if the last dimension of the input is not `in_features`.
    """

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        degrees: Sequence[int] = (1, 1),
        variant: Variant = "smooth",
        eps: float = 1e-6,
        denominator_init: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.degrees = M, N = _check_degrees(degrees, bias)
        self.variant = _check_variant(variant)
        self.eps = _check_non_negative("eps", eps)
        if denominator_init is not None:
            denominator_init = _check_non_negative("denominator_init", denominator_init)
        self.denominator_init = denominator_init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.numerator = parameter(M, out_features, in_features) if M else None
        self.denominator = parameter(N, out_features, in_features) if N else None
        self.bias = parameter(out_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values again."""
        _reset_pade_parameters(
            self.numerator, self.denominator, self.bias, self.in_features, self.variant, self.denominator_init
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Start["PaonLinear"]:
        """Neurons that compute, at first, what a trained linear layer computes; exact, with an error of 0.0.

        Sets `numerator[0]` to the weight, times 2 for smooth [1/N >= 1], and `bias` to the bias, both times 1 + eps / 2
        for smooth N >= 2; higher degrees to 0. Smooth denominators start at 0, which they leave by the first step, or
        by the second if M = 1 and the bias is 0 everywhere. Absolute ones start within
        1e-25 of 0, where they change no output and have the gradient that they have anywhere; float16, and so autocast
        to it, rounds them to 0, where they have none: train the first step without it.

        Args:
            linear: The original.
            options: `degrees`, `variant`, `eps`.

        Raises:
            TypeError: If the original is no `nn.Linear`.
            ValueError: If M = 0; for smooth [1/N >= 1] without a bias, whose denominators would never train; for
                absolute denominators in float16; if `denominator_init` is given.

        >>> import torch
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer, error = PaonLinear.from_linear(linear, degrees=(2, 2), variant="absolute")
        >>> x = torch.randn(8, 64)
        >>> torch.allclose(layer(x), linear(x), atol=1e-5)
        True
        """
        check_original(linear, nn.Linear)
        layer = fresh(cls, linear, **options)
        _become_affine_(layer, linear, layer.degrees, layer.variant, layer.eps, layer.denominator_init)
        return Start(layer, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Padé neurons of x (*, in) -> (*, out)."""
        check_features(x, self.in_features, _a_weight(self.numerator, self.denominator))
        return paon_linear(x, self.numerator, self.denominator, self.bias, variant=self.variant, eps=self.eps)

    def extra_repr(self) -> str:
        """Sizes and options, for `repr`."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"degrees={self.degrees}, variant={self.variant!r}, eps={self.eps:g}"
        )
        return text if self.denominator_init is None else f"{text}, denominator_init={self.denominator_init:g}"
