"""Invertible nets of affine couplings, after RealNVP (https://arxiv.org/abs/1605.08803) and Glow (1807.03039).

A block splits the channels in two. Each half in turn is shifted and scaled by what a conditioner, any network, makes of
the other half, which is known on the way back. Small nets for vectors and images; a user's own conditioner, as a U-Net,
goes into `InvertibleBlock`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.layers._check import check_positive, check_whole, typed
from archzoo.layers.invertible import (
    ActNorm,
    Context,
    Inverse,
    InvertibleLinear,
    InvertibleSequential,
    Squeeze2x2,
    check_axis,
    widened,
    without_autocast,
)

MakeConditioner = Callable[[int, int], nn.Module]
"""Called with the channels that a conditioner reads and writes; its forward takes (h, context)."""


class AffineCoupling(nn.Module):
    r"""Shift and scale that a network reads from elsewhere: $y_1 = (x_1 + b(x_2)) e^{s(x_2)}$, |s| at most `clamp`.

    Autocast is off inside, in the conditioner too, or the way back would not be exact.

    Args:
        conditioner: Maps (x2, context) to b and s, one behind the other along the channels.
        clamp: Bound of |s|, above 0: a channel is scaled by at most e^clamp.
        channel_dim: Axis of the channels.

    Shape: x1, x2 -> y1 of x1's shape.
    """

    def __init__(self, conditioner: nn.Module, *, clamp: float = 5.0, channel_dim: int = 1):
        super().__init__()
        check_positive(clamp=clamp)
        self.conditioner, self.clamp, self.channel_dim = conditioner, clamp, channel_dim

    def forward(self, x1: Tensor, x2: Tensor, context: Context = None) -> Tensor:
        """y1 (x1 | x2)."""
        shift, log_scale = self._affine(x1, x2, context)
        return (widened(x1) + shift) * log_scale.exp()

    def inverse(self, y1: Tensor, x2: Tensor, context: Context = None) -> Tensor:
        """x1 (y1 | x2)."""
        shift, log_scale = self._affine(y1, x2, context)
        return widened(y1) * (-log_scale).exp() - shift

    def _affine(self, x1: Tensor, x2: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        channels = x1.shape[self.channel_dim]
        x2 = widened(x2)
        with without_autocast(x2):
            both = self.conditioner(x2, context)
        check_axis(both, 2 * channels, self.channel_dim)
        shift, log_scale = both.split(channels, self.channel_dim)
        return shift, log_scale.clamp(-self.clamp, self.clamp)

    def extra_repr(self) -> str:
        """Options, for `repr`."""
        return f"clamp={self.clamp:g}, channel_dim={self.channel_dim}"


class InvertibleBlock(nn.Module):
    """ActNorm, a coupling of each half of the channels, and a matrix that mixes them all.

    x = actnorm(x), split into x1 (the first c - c//2 channels) and x2; y1 = coupling1(x1 | x2);
    y2 = coupling2(x2 | y1); mix(cat[y1, y2]).

    Args:
        channels: Number c of channels, 2 or more.
        conditioner: Makes the couplings' networks; called with (c//2, 2 (c - c//2)), then (c - c//2, 2 (c//2)).
        actnorm: Whether to begin with an `ActNorm`.
        clamp: As in `AffineCoupling`.
        channel_dim: Axis of the channels.

    Shape: any with c channels -> the same.

    Raises:
        ValueError: If a size is wrong; in `forward`, if the input has not c channels.
    """

    @typed
    def __init__(
        self,
        channels: int,
        conditioner: MakeConditioner,
        *,
        actnorm: bool = True,
        clamp: float = 5.0,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(channels=channels)
        if channels < 2:
            raise ValueError(f"channels={channels}: must be 2 or more, for a coupling splits them in two")
        self.channels, self.channel_dim = channels, channel_dim
        options: dict[str, Any] = {"channel_dim": channel_dim, "device": device, "dtype": dtype}
        second = channels // 2
        first = channels - second
        self.actnorm = ActNorm(channels, **options) if actnorm else None
        self.coupling1 = AffineCoupling(conditioner(second, 2 * first), clamp=clamp, channel_dim=channel_dim)
        self.coupling2 = AffineCoupling(conditioner(first, 2 * second), clamp=clamp, channel_dim=channel_dim)
        self.mix = InvertibleLinear(channels, **options)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """One way."""
        check_axis(x, self.channels, self.channel_dim)
        x1, x2 = self._split(x if self.actnorm is None else self.actnorm(x))
        y1 = self.coupling1(x1, x2, context)
        y2 = self.coupling2(x2, y1, context)
        return self.mix(torch.cat([y1, y2], self.channel_dim))

    def inverse(self, z: Tensor, context: Context = None) -> Tensor:
        """The other way."""
        check_axis(z, self.channels, self.channel_dim)
        y1, y2 = self._split(self.mix.inverse(z))
        x2 = self.coupling2.inverse(y2, y1, context)
        x = torch.cat([self.coupling1.inverse(y1, x2, context), x2], self.channel_dim)
        return x if self.actnorm is None else self.actnorm.inverse(x)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        second = self.channels // 2
        return x.split([self.channels - second, second], self.channel_dim)


class MLPConditioner(nn.Module):
    """Two hidden layers and a linear one of zeros, so that a coupling starts as the identity. The context is an input.

    Args:
        in_features: Numbers read.
        out_features: Numbers written.
        hidden: Width of the hidden layers.
        context_dim: Numbers of context; 0: none is taken.
        layer: Makes a hidden layer from its two sizes.
        activation: Makes what is behind each hidden layer.

    Shape: (*, in_features) -> (*, out_features).
    """

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 64,
        *,
        context_dim: int = 0,
        layer: Callable[[int, int], nn.Module] | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()

        def linear(before: int, after: int) -> nn.Module:
            return nn.Linear(before, after, device=device, dtype=dtype)

        make = layer or linear
        self.context_dim = context_dim
        last = linear(hidden, out_features)
        self.layers = nn.Sequential(
            make(in_features + context_dim, hidden), activation(), make(hidden, hidden), activation(), last
        )
        _zero_(last)

    def forward(self, h: Tensor, context: Context = None) -> Tensor:
        """What a coupling shifts and scales by."""
        columns = _columns(context, self.context_dim, h)
        if columns is not None:
            h = torch.cat([h, columns.expand(*h.shape[:-1], self.context_dim)], -1)
        return self.layers(h)


class ConvConditioner(nn.Module):
    """Two hidden 3 x 3 convolutions and one of zeros. The context is added, by way of a linear map, to the first.

    Args:
        in_channels: Channels read.
        out_channels: Channels written.
        hidden: Channels of the hidden layers.
        context_dim: Numbers of context; 0: none is taken.
        layer: Makes a hidden convolution from its channels, its kernel size and its padding.
        activation: Makes what is behind each hidden layer.

    Shape: (batch, in_channels, H, W) -> (batch, out_channels, H, W).
    """

    @typed
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 32,
        *,
        context_dim: int = 0,
        layer: Callable[..., nn.Module] | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()

        def conv(before: int, after: int, size: int, *, padding: int) -> nn.Module:
            return nn.Conv2d(before, after, size, padding=padding, device=device, dtype=dtype)

        make = layer or conv
        self.context_dim = context_dim
        self.first = make(in_channels, hidden, 3, padding=1)
        self.context = nn.Linear(context_dim, hidden, device=device, dtype=dtype) if context_dim else None
        last = conv(hidden, out_channels, 3, padding=1)
        self.rest = nn.Sequential(activation(), make(hidden, hidden, 3, padding=1), activation(), last)
        _zero_(last)

    def forward(self, h: Tensor, context: Context = None) -> Tensor:
        """What a coupling shifts and scales by."""
        columns = _columns(context, self.context_dim, h)
        h = self.first(h)
        if columns is not None and self.context is not None:
            h = h + self.context(columns)[..., None, None]
        return self.rest(h)


class InvertibleMLP(InvertibleSequential):
    """Invertible net for vectors: `depth` blocks with small perceptrons.

    Args:
        dim: Length of a vector, 2 or more.
        depth: Number of blocks.
        hidden: Width of the conditioners.
        context_dim: Numbers of context; 0: none is taken. A context is a number, or a tensor that broadcasts to
            (*, context_dim).
        actnorm: Whether every block begins with an `ActNorm`.
        clamp: As in `AffineCoupling`. The deeper and wilder a net, the worse its condition: lower this, or use float64.

    Shape: (*, dim) -> (*, dim).

    Raises:
        ValueError: If a size is wrong; in `forward`, if the input or the context does not fit.
    """

    @typed
    def __init__(
        self,
        dim: int,
        *,
        depth: int = 4,
        hidden: int = 64,
        context_dim: int = 0,
        actnorm: bool = True,
        clamp: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_whole(dim=dim, depth=depth, hidden=hidden)
        _check_context_dim(context_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def conditioner(reads: int, writes: int) -> nn.Module:
            return MLPConditioner(reads, writes, hidden, context_dim=context_dim, **factory)

        options = {"actnorm": actnorm, "clamp": clamp, "channel_dim": -1, **factory}
        super().__init__(*(InvertibleBlock(dim, conditioner, **options) for _ in range(depth)))


class InvertibleConvNet(InvertibleSequential):
    """Invertible net for images: `depth` blocks with small convolutional nets.

    Args:
        channels: Of the images.
        depth: Number of blocks.
        hidden: Channels of the conditioners.
        context_dim: As in `InvertibleMLP`; a context broadcasts to (batch, context_dim).
        squeeze: Whether the blocks see every 2 x 2 pixels as four channels of one; None: if the channels are odd, for
            which couplings have no halves.
        actnorm: As in `InvertibleMLP`.
        clamp: As in `InvertibleMLP`.

    Shape: (batch, channels, H, W) -> the same.

    Raises:
        ValueError: If a size is wrong; in `forward`, if the input or the context does not fit, as an odd height or
            width where pixels are squeezed.
    """

    @typed
    def __init__(
        self,
        channels: int,
        *,
        depth: int = 4,
        hidden: int = 32,
        context_dim: int = 0,
        squeeze: bool | None = None,
        actnorm: bool = True,
        clamp: float = 5.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_whole(channels=channels, depth=depth, hidden=hidden)
        _check_context_dim(context_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def conditioner(reads: int, writes: int) -> nn.Module:
            return ConvConditioner(reads, writes, hidden, context_dim=context_dim, **factory)

        squeezes = channels % 2 == 1 if squeeze is None else squeeze
        inner = 4 * channels if squeezes else channels
        options = {"actnorm": actnorm, "clamp": clamp, **factory}
        blocks: list[Any] = [InvertibleBlock(inner, conditioner, **options) for _ in range(depth)]
        super().__init__(*([Squeeze2x2(), *blocks, Inverse(Squeeze2x2())] if squeezes else blocks))


def _zero_(last: nn.Module) -> None:
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


def _check_context_dim(context_dim: Any) -> None:
    if context_dim != 0:
        check_whole(context_dim=context_dim)


def _columns(context: Context, context_dim: int, h: Tensor) -> Tensor | None:
    """The context as (…, context_dim), in the dtype of h; None if there is none."""
    if context is None and not context_dim:
        return None
    if context is None or not context_dim:
        raise ValueError(f"context={context!r}: this net was built with context_dim={context_dim}")
    columns = torch.as_tensor(context, dtype=h.dtype, device=h.device)
    if columns.dim() and columns.shape[-1] not in (1, context_dim):
        raise ValueError(
            f"context of shape {tuple(columns.shape)}: must be a number, or end with context_dim={context_dim} (or 1)"
        )
    return columns.expand(*columns.shape[:-1], context_dim)
