"""Wav-KAN: KAN layers whose edges are wavelets (https://arxiv.org/abs/2405.12832), linear and convolutional."""

import math

import torch
from torch import Tensor, nn

from archzoo.kernels.wavelet import Wavelet, check_wavelet, wavelet_linear, wavelet_reference
from archzoo.kernels.wavelet_conv2d import wavelet_conv2d
from archzoo.layers._check import typed
from archzoo.layers._kan import _KANConv2d, _KANLinear
from archzoo.layers._start_kan import _FromLinear, _nearest, _normal, _on_edges
from archzoo.registry import Card, register_layer

# Of every edge in a start, in units of x. Twice as wide has half to a quarter of the error, and half of the slope, by
# which scale and translation learn.
_START_SCALES = {"dog": 4.0, "mexican_hat": 8.0, "morlet": 16.0}


class _Wavelets(_KANLinear):
    """What the two forms share: a weight, a scale and a translation for every edge."""

    def _build(self, wavelet: str) -> None:
        self.wavelet = check_wavelet(wavelet)
        self.weight, self.scale, self.translation = self._weight(), self._weight(), self._weight()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws `weight` and `bias` as `nn.Linear` does; every scale is 1, and every translation 0."""
        bound = self._fan_in**-0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.translation)

    @torch.no_grad()
    def _become(self, weight: Tensor) -> Tensor:
        # Inputs see the middle of a flank of a wide wavelet. N(0, 1) turns a wavelet into one of its kind that is
        # wider, s^2 + 1 for s^2, and whose zero is at 0 for these translations: so outputs have no offset.
        scale = _START_SCALES[self.wavelet]
        wider = scale**2 + 1
        translation = {"dog": 0.0, "mexican_hat": -math.sqrt(wider), "morlet": math.pi / 10 * wider / scale}
        nn.init.constant_(self.scale, scale)
        nn.init.constant_(self.translation, translation[self.wavelet])
        u = (_normal()[0] - self.translation.flatten()[0].cpu().double()) / scale  # as the dtype rounds it
        c, deviation = _nearest([wavelet_reference(u, self.wavelet).expand(1, 1, -1)], "")
        self.weight.copy_(_on_edges(weight, c).squeeze(2))
        return deviation

    @property
    def _per_output(self) -> tuple[str, ...]:
        return "weight", "scale", "translation", "bias"

    def _options(self) -> str:
        return f", wavelet={self.wavelet!r}"


@register_layer(
    "wavelet_kan",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="Wav-KAN: Wavelet Kolmogorov-Arnold Networks",
        authors="Zavareh Bozorgasl, Hao Chen",
        year=2024,
        arxiv="2405.12832",
        equation=r"y_o = b_o + \sum_i w_{oi}\, \psi\!\left(\frac{x_i - t_{oi}}{s_{oi}}\right)",
        headline="MNIST: faster training and a better test accuracy than spline KANs; Mexican hat and DOG are the best",
        reproduced="Digits, [64, 32, LayerNorm, 10], 15 epochs, 3 seeds: mexican_hat 97.0-98.5 %, dog 96.5-97.5 %, "
        "morlet 96.0-96.5 % of pixels in [0, 1]; 96.2-96.7 %, 97.0-97.7 % and 46-62 % of the same in [-1, 1]. "
        "MNIST was not run",
    ),
)
class WaveletKANLinear(_Wavelets, _FromLinear):
    r"""KAN layer on wavelets: $y_o = b_o + \sum_i w_{oi}\, \psi((x_i - t_{oi}) / s_{oi})$.

    Each edge has one wavelet of its own, with three parameters:

    - `"mexican_hat"`: $\psi(u) = 2 / (\sqrt 3\, \pi^{1/4})\, (u^2 - 1)\, e^{-u^2/2}$, the sign being Wav-KAN's code's;
    - `"morlet"`: $\psi(u) = \cos(5 u)\, e^{-u^2/2}$;
    - `"dog"`, the derivative of a Gaussian: $\psi(u) = -u\, e^{-u^2/2}$.

    They vanish a few scales away from t, and so do all gradients: keep the inputs near 0, by a norm between layers.
    Wav-KAN's code has a BatchNorm1d inside the layer and no bias; here the norm is the model's. `"morlet"` turns by 5
    radians a scale, and learns inputs of unit variance by heart: 72-76 % of the digits, where the others get 94 % and
    more. Weight decay pulls a scale towards 0, where the equation divides by it: exempt `scale`.

    A wavelet is evaluated for every input of every output: 30 to 60 times the time of `nn.Linear` on a CPU, `"morlet"`
    100 times (forward + backward, one thread, 1024 rows). Kept for the backward pass: x and the parameters.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        bias: Whether to add `bias`.
        wavelet: `"mexican_hat"`, `"morlet"` or `"dog"`.
        device: Where the parameters are.
        dtype: Of the parameters; wavelets are evaluated in float32 at least.

    State: `weight` (O, I) and `bias` (O,) or None, drawn as in `nn.Linear`; `scale` (O, I), 1 at first, and
    `translation` (O, I), 0 at first, in units of x.

    Start: `from_linear` gives all edges a wide wavelet, whose flank is nearly straight where the inputs are: `scale` 8,
    4 or 16, and error 0.09, 0.07 or 0.05 for "mexican_hat", "dog" and "morlet".

    Shape: (*, I) -> (*, O).

    Raises:
        ValueError: If a size is no positive integer, or the wavelet is unknown.
    """

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        wavelet: Wavelet = "mexican_hat",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._build(wavelet)

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O). A ValueError if the last dimension is not I."""
        self._check(x, self.weight)
        return wavelet_linear(x, self.weight, self.scale, self.translation, self.bias, wavelet=self.wavelet)


@register_layer(
    "wavelet_kan_conv2d",
    kind="conv2d",
    nonlinear=True,
    card=Card(
        title="Convolutional Kolmogorov-Arnold networks, on wavelets",
        authors="Ivan Drokin",
        year=2024,
        arxiv="2407.01092",
        equation=r"y_{op} = b_o + \sum_{c,j} w_{ocj}\, \psi\!\left(\frac{x_{c,p+j} - t_{ocj}}{s_{ocj}}\right)",
        headline="CIFAR-10, 8 layers (torch-conv-kan): plain convolution 83.05 %, wavelets 85.4 %",
        reproduced="nothing yet",
    ),
)
class WaveletKANConv2d(_Wavelets, _KANConv2d):
    r"""Convolution by wavelets: $y_{op} = b_o + \sum_{c,j} w_{ocj}\, \psi((x_{c,p+j} - t_{ocj}) / s_{ocj})$.

    `WaveletKANLinear` on every patch, j being its taps: scale and translation are those of a tap of an output, so each
    output evaluates a wavelet for every pixel of every patch. torch-conv-kan shares them among the taps, and adds a
    second convolution, a branch on silu(x) and a norm; none is inside this layer.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.
        kernel_size: Taps down and across, or one number for both, as in `nn.Conv2d`.
        stride: Pixels from one output to the next.
        padding: Pixels added on each side, "same" or "valid".
        dilation: Pixels between taps.
        groups: Into how many groups channels and outputs are divided.
        bias: Whether to add `bias`.
        wavelet: `"mexican_hat"`, `"morlet"` or `"dog"`, as in `WaveletKANLinear`.
        pad_value: None: padding adds nothing; a number: the pixels that padding adds have this value.
        device: Where the parameters are.
        dtype: Of the parameters; wavelets are evaluated in float32 at least.

    State: `weight`, `scale` and `translation` (O, C/groups, kh, kw), `bias` (O,) or None; at first as in
    `WaveletKANLinear` of C/groups kh kw inputs.

    Start: `from_conv2d` is as `WaveletKANLinear.from_linear`.

    Shape: (N, C, H, W) -> (N, O, H', W'), or without N.

    Raises:
        ValueError: If an argument is out of range, or the wavelet is unknown.
    """

    @typed
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        wavelet: Wavelet = "mexican_hat",
        pad_value: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        _KANConv2d.__init__(self, *shape, bias, pad_value, device, dtype)
        self._build(wavelet)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W'), as `nn.Conv2d`. A ValueError if x has not C channels."""
        self._check(x, self.weight)
        return wavelet_conv2d(
            x,
            self.weight,
            self.scale,
            self.translation,
            self.bias,
            wavelet=self.wavelet,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            pad_value=self.pad_value,
        )
