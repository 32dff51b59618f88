"""APTx: an activation (https://arxiv.org/abs/2209.06119), and the neuron made of it (https://arxiv.org/abs/2507.14270)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from archzoo.kernels.aptx_linear import aptx_linear
from archzoo.layers._check import check_features, check_whole, typed
from archzoo.layers.start import Start, check_original, copy_bias, fresh
from archzoo.registry import Card, register_layer

# E[(alpha + tanh(beta x))^2 x^2] for standard normal alpha, beta, x; the same for alpha = 1.
_SECOND_MOMENT = 1.5217


class APTx(nn.Module):
    r"""The activation $(\alpha + \tanh(\beta x)) \gamma x$, with three scalars for all elements.

    With alpha = 1 and gamma = 1/2 it is Swish, $x \sigma(2 \beta x)$, exactly: the default is Swish(x, 2), and
    beta = 1/2 is SiLU. A large beta gives ReLU. Mish is approximated, by beta = 1/2 for x < 0 and 1 for x > 0.

    Args:
        alpha: Initial value.
        beta: Initial value, in units of 1 / x.
        gamma: Initial value.
        trainable: Whether the scalars are parameters; otherwise they are buffers. Either way of these names, in the
            state dict.

    Shape: any, to itself, in the dtype of x; half precision is computed in float32.

    Raises:
        ValueError: If a scalar is not a finite number; in forward, if x is not of a floating-point dtype.
    """

    alpha: Tensor
    beta: Tensor
    gamma: Tensor

    @typed
    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.5,
        trainable: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.trainable, self.initial = trainable, {"alpha": alpha, "beta": beta, "gamma": gamma}
        for name, value in self.initial.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r}: must be a finite number")
            scalar = torch.empty((), device=device, dtype=dtype)
            if trainable:
                self.register_parameter(name, nn.Parameter(scalar))
            else:
                self.register_buffer(name, scalar)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Puts the scalars back to the values given."""
        for name, value in self.initial.items():
            getattr(self, name).fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        """The activation of every element of x."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x of type {type(x).__name__}: must be a tensor")
        if not x.is_floating_point():
            raise ValueError(f"x has dtype {x.dtype}: must be a floating-point one")
        wide = torch.promote_types(x.dtype, torch.float32)
        z, alpha, beta, gamma = (t.to(wide) for t in (x, self.alpha, self.beta, self.gamma))
        return ((alpha + torch.tanh(beta * z)) * (gamma * z)).to(x.dtype)

    def extra_repr(self) -> str:
        """Initial values, for `repr`."""
        return ", ".join(f"{name}={value:g}" for name, value in self.initial.items()) + f", trainable={self.trainable}"


def _check_init(init: str) -> None:
    if init not in ("scaled", "paper"):
        raise ValueError(f"init={init!r}: must be 'scaled' or 'paper'")


def _reset_neurons(
    alpha: Tensor | None, beta: Tensor, gamma: Tensor, bias: Tensor | None, init: str, fan_in: int
) -> None:
    """Initial values of APTx neurons of any kind; see `APTxLinear`."""
    if alpha is not None:
        nn.init.normal_(alpha)
    nn.init.normal_(beta)
    nn.init.normal_(gamma, std=1.0 if init == "paper" else 1 / math.sqrt(_SECOND_MOMENT * fan_in))
    if bias is not None:
        nn.init.zeros_(bias)


@torch.no_grad()
def _copy_map(layer: nn.Module, original: nn.Linear | nn.Conv2d) -> None:
    """alpha = 1, beta = 0, gamma = W: the linear map of the original. beta has a gradient there, for tanh'(0) is 1."""
    for name, parameter in layer.named_parameters():
        if name == "gamma":
            parameter.copy_(original.weight)
        elif name != "bias":
            parameter.fill_(1.0 if name == "alpha" else 0.0)
    copy_bias(layer, original)


@register_layer(
    "aptx",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="APTx Neuron: A Unified Trainable Neuron Architecture Integrating Activation and Computation",
        authors="Ravin Kumar",
        year=2025,
        arxiv="2507.14270",
        equation=r"y_o = \delta_o + \sum_i (\alpha_{oi} + \tanh(\beta_{oi} x_i)) \gamma_{oi} x_i",
        headline="MNIST: 96.69 % test accuracy at epoch 11, by 784-128-64-32 APTx and nn.Linear, 332 330 parameters",
        reproduced=(
            "MNIST, 5,000 of the training images held out, one seed (experiments aptx_mnist, aptx_mnist_scaled): the"
            " paper's network and settings 96.91 %; init='scaled', Adam 1e-3: 98.20 %, and 98.27 % with beta_groups=8."
            " ReLU perceptrons at 1e-3: 98.00 % at these widths, 98.49 % with as many parameters"
        ),
    ),
)
class APTxLinear(nn.Module):
    r"""A layer of APTx neurons: each weight is a small activation function with three parameters of its own.

    $y_o = \delta_o + \sum_i (\alpha_{oi} + \tanh(\beta_{oi} x_i)) \gamma_{oi} x_i$.

    Stands in for `nn.Linear` and needs no activation behind it. Parameters: out (3 in + 1), or out (2 in + 1) without
    alpha. It evaluates a tanh for every input of every output of every example: about 70 times the time of `nn.Linear`
    at 256 x 784 -> 128 on a CPU thread (forward + backward, `python -m benchmarks neuron_speed`), and 100 times on a
    GPU at the roofline (computed). `beta_groups=G` shares beta among out / G outputs each; G = 8 takes about 11 times
    the time of `nn.Linear` on that CPU, and is the practical choice.

    alpha and beta start as N(0, 1), the bias at 0, gamma as N(0, 1 / (1.5217 in)) (a variance), which keeps the
    variance of a standard normal input. The paper's N(0, 1) for gamma lets 784 inputs give a standard deviation of
    about 35.

    Weight decay is meant for gamma: on alpha and beta it changes the shape of the non-linearity. Where |beta x| is
    large, from about 10 on in float32, tanh is saturated and beta gets no gradient.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add delta.
        train_alpha: Whether alpha is learned; otherwise it is 1, and not stored.
        init: "scaled", as above, or "paper", which has N(0, 1) for gamma too.
        beta_groups: G, a divisor of `out_features`: row g of beta serves outputs g out / G ... (g + 1) out / G - 1.
            None is the paper's layer, with one row for every output; sharing beta is ours.

    Attributes:
        alpha: (out, in), or None.
        beta: (out, in), or (G, in).
        gamma: (out, in).
        bias: delta (out,), or None.

    Shape: (*, in) -> (*, out), in the dtype of the input, or in autocast's; tanh and sums are float32 at least.

    Raises:
        ValueError: If a size is not a positive integer, `init` is unknown, or `beta_groups` does not divide
            `out_features`; in forward, if the last dimension of the input is not `in_features`.
    """

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        train_alpha: bool = True,
        init: Literal["scaled", "paper"] = "scaled",
        beta_groups: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        _check_init(init)
        groups = out_features if beta_groups is None else beta_groups
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or out_features % groups:
            raise ValueError(f"beta_groups={beta_groups!r}: must be None or a divisor of out_features={out_features}")
        self.in_features, self.out_features, self.beta_groups = in_features, out_features, beta_groups
        self.train_alpha, self.init = train_alpha, init

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.alpha = parameter(out_features, in_features) if train_alpha else None
        self.beta = parameter(groups, in_features)
        self.gamma = parameter(out_features, in_features)
        self.bias = parameter(out_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values again."""
        _reset_neurons(self.alpha, self.beta, self.gamma, self.bias, self.init, self.in_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Start["APTxLinear"]:
        """A layer that computes, to rounding, what an `nn.Linear` does: alpha = 1, beta = 0, gamma = W and its bias.

        Args:
            linear: The layer to start from; it is left alone.
            options: Of this layer. `init` matters to `reset_parameters` only.

        Returns:
            The layer and its error, 0.0.

        Raises:
            TypeError: If `linear` is no `nn.Linear`, or an option is none of this layer's.
            ValueError: If an option is out of range, or is one that `linear` decides.
        """
        check_original(linear, nn.Linear)
        layer = fresh(cls, linear, **options)
        _copy_map(layer, linear)
        return Start(layer, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """APTx neurons of x (*, in) -> (*, out)."""
        check_features(x, self.in_features, self.gamma)
        return aptx_linear(x, self.alpha, self.beta, self.gamma, self.bias)

    def extra_repr(self) -> str:
        """Sizes and options, for `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"train_alpha={self.train_alpha}, init={self.init!r}, beta_groups={self.beta_groups}"
        )
