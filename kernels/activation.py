"""Named activations as a basis of one function, so that a layer's base branch runs in the same pass as its splines."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.basis_linear import Basis, KernelForm


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    y = x * s
    return y, s + y * (1 - s)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(x * 0.5**0.5))
    return x * cdf, cdf + x * torch.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)


def _tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(x)
    return y, 1 - y * y


# name: (function; function and derivative; FLOPs of the one and of both; what else people write for it)
_ACTIVATIONS: dict[
    str,
    tuple[
        Callable[[Tensor], Tensor],
        Callable[[Tensor], tuple[Tensor, Tensor]],
        tuple[int, int],
        tuple[Callable[[Tensor], Tensor], type[nn.Module]],
    ],
] = {
    "silu": (F.silu, _silu, (5, 8), (F.silu, nn.SiLU)),
    "gelu": (F.gelu, _gelu, (5, 11), (F.gelu, nn.GELU)),
    "relu": (torch.relu, lambda x: (torch.relu(x), (x > 0).to(x.dtype)), (1, 2), (F.relu, nn.ReLU)),
    "tanh": (torch.tanh, _tanh, (1, 3), (torch.tanh, nn.Tanh)),
    "identity": (lambda x: x, lambda x: (x, torch.ones_like(x)), (0, 0), (nn.Identity(), nn.Identity)),
}


@dataclass(frozen=True)
class Activation(Basis):
    """One activation by name: `"silu"`, `"gelu"` (exact), `"relu"`, `"tanh"` or `"identity"`."""

    name: str

    @property
    def size(self) -> int:
        """One function."""
        return 1

    @property
    def kernel(self) -> KernelForm:
        """For Triton."""
        return KernelForm("activation")

    @property
    def flops(self) -> tuple[int, int]:
        """FLOPs an input, an exp, erf or tanh counted as 1."""
        return _ACTIVATIONS[self.name][2]

    def __call__(self, x: Tensor) -> Tensor:
        """The activation itself, any shape."""
        return _ACTIVATIONS[self.name][0](x)

    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """(*, I, R) -> (*, I, 1, R)."""
        return self(x).unsqueeze(-2)

    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Activation and derivative, (*, I, 1, R) each."""
        value, slope = _ACTIVATIONS[self.name][1](x)
        return value.unsqueeze(-2), slope.unsqueeze(-2)


def as_activation(
    base_activation: str | Callable[[Tensor], Tensor] | None,
) -> Activation | Callable[[Tensor], Tensor] | None:
    """The base function of a KAN layer: an `Activation` where it is a known one, else the callable itself.

    Args:
        base_activation: A name of `Activation`, `"zero"` or None for none, or any elementwise callable; `F.silu` and
            `nn.SiLU()` are understood as `"silu"`, and so on.

    Raises:
        ValueError: If it is neither a known name nor callable.
    """
    if base_activation is None or base_activation == "zero":
        return None
    if isinstance(base_activation, str):
        if base_activation in _ACTIVATIONS:
            return Activation(base_activation)
    elif callable(base_activation):
        for name, (*_, (function, module)) in _ACTIVATIONS.items():
            if base_activation is function or type(base_activation) is module:
                if getattr(base_activation, "approximate", "none") != "none":
                    break  # GELU by tanh is another function
                return Activation(name)
        return base_activation
    names = ", ".join(map(repr, [*_ACTIVATIONS, "zero"]))
    raise ValueError(f"base_activation={base_activation!r}: must be one of {names}, None, or a callable on tensors")
