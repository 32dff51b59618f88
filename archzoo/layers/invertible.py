"""Invertible nets: the protocol, and the bricks that others are made of (after https://arxiv.org/abs/1807.03039).

An invertible net is an `nn.Module` with `forward(x, context=None) -> z` and `inverse(z, context=None) -> x` of the same
shape. A `context` (a number or a tensor) is handed unchanged to every conditioner. Nothing here drops values or looks
at the batch, so that `inverse(forward(x)) == x` in training mode too; log-determinants are not kept.

`archzoo.layers.invertible_nets` has the couplings and whole nets, `archzoo.layers.linearizer` what they are for.
Another library's flow becomes one in a few lines, here a transform of zuko:

    class Zuko(nn.Module):
        def __init__(self, flow):
            super().__init__()
            self.flow = flow

        def forward(self, x, context=None):
            return self.flow(context).transform(x)

        def inverse(self, z, context=None):
            return self.flow(context).transform.inv(z)
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from archzoo.kernels._op import compute_dtype, under_autocast
from archzoo.kernels._tracing import has_autocast
from archzoo.layers._check import check_positive, check_whole, typed

__all__ = [
    "ActNorm",
    "Conditioned",
    "Inverse",
    "Invertible",
    "InvertibleLinear",
    "InvertibleSequential",
    "Squeeze2x2",
    "same_net",
]

Context = float | Tensor | None


@runtime_checkable
class Invertible(Protocol):
    """What an invertible net can do."""

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """z of the same shape."""
        ...

    def inverse(self, z: Tensor, context: Any = None) -> Tensor:
        """The x whose z this is."""
        ...


class ActNorm(nn.Module):
    r"""Shift and scale of each channel, which start from data: $y = (x + b) e^s$.

    The first call in training mode sets b and s such that every channel of its output has mean 0 and standard deviation
    1 (unbiased); later calls do not. In eval mode and in `inverse` one that has not started is the identity, and a
    batch with less than two values a channel does not start it. Whether it has started is part of the state dict. Under
    DDP, run a batch through the net before wrapping it, or every rank starts from its own.

    Args:
        num_features: Number of channels.
        channel_dim: Their axis.
        eps: Added to the standard deviation.

    Attributes:
        shift: b (num_features,).
        log_scale: s (num_features,).
        initialized: Whether they have started from data.

    Shape: any with `num_features` channels -> the same.

    Raises:
        ValueError: If a size is wrong; in `forward` and `inverse`, if the input has not so many channels.
    """

    initialized: Tensor

    @typed
    def __init__(
        self,
        num_features: int,
        *,
        channel_dim: int = 1,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(num_features=num_features)
        check_positive(eps=eps)
        self.num_features, self.channel_dim, self.eps = num_features, channel_dim, eps
        self.shift = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.empty((), device=device, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes it the identity, which the next batch in training mode starts from data."""
        nn.init.zeros_(self.shift)
        nn.init.zeros_(self.log_scale)
        with torch.no_grad():
            self.initialized.fill_(False)
        self._started = False  # mirrors the buffer, so that a compiled graph need not branch on a tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._started = not self.initialized.is_meta and bool(self.initialized)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """y; the first call in training mode starts shift and scale from x."""
        check_axis(x, self.num_features, self.channel_dim)
        if self.training and not self._started and not x.is_meta:
            self._start(x)
        return (x + self._along(self.shift, x)) * self._along(self.log_scale, x).exp()

    def inverse(self, z: Tensor, context: Context = None) -> Tensor:
        """The x of y."""
        check_axis(z, self.num_features, self.channel_dim)
        return z * (-self._along(self.log_scale, z)).exp() - self._along(self.shift, z)

    def _along(self, vector: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.channel_dim] = self.num_features
        return vector.view(shape)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        # Other code may have copied the state in without `load_state_dict`, as moving averages do.
        if not torch.compiler.is_compiling() and bool(self.initialized):
            self._started = True
            return
        values = x.detach().movedim(self.channel_dim, -1).reshape(-1, self.num_features).mT
        values = values.to(compute_dtype(x, self.shift))
        if values.shape[1] < 2:  # which have no deviation
            return
        self.shift.copy_(-values.mean(1))
        self.log_scale.copy_(-(values.std(1) + self.eps).log())
        self.initialized.fill_(True)
        self._started = True

    def extra_repr(self) -> str:
        """Sizes and options, for `repr`."""
        return f"{self.num_features}, channel_dim={self.channel_dim}, eps={self.eps:g}"


class InvertibleLinear(nn.Module):
    r"""A square matrix along the channels, $y = W x$: a 1 x 1 convolution for images. It starts as a random rotation.

    The inverse solves $W x = y$, in float32 at least. Autocast is off inside.

    Args:
        num_features: Number of channels.
        channel_dim: Their axis.

    Attributes:
        weight: W (num_features, num_features).

    Shape: any with `num_features` channels -> the same.
    """

    @typed
    def __init__(
        self,
        num_features: int,
        *,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(num_features=num_features)
        self.num_features, self.channel_dim = num_features, channel_dim
        self.weight = nn.Parameter(torch.empty(num_features, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws a rotation, uniformly."""
        with torch.no_grad():
            rotation = torch.empty_like(self.weight, dtype=compute_dtype(self.weight))
            nn.init.orthogonal_(rotation)
            if not rotation.is_meta and torch.linalg.det(rotation) < 0:
                rotation[0].neg_()  # was a reflection
            self.weight.copy_(rotation)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """W x along the channels."""
        check_axis(x, self.num_features, self.channel_dim)
        x = widened(x)
        with without_autocast(x):
            if self.channel_dim == 1 and x.dim() > 2:
                return (self.weight @ x.flatten(2)).view(x.shape)
            return nn.functional.linear(x.movedim(self.channel_dim, -1), self.weight).movedim(-1, self.channel_dim)

    def inverse(self, z: Tensor, context: Context = None) -> Tensor:
        """The x of W x."""
        check_axis(z, self.num_features, self.channel_dim)
        z = widened(z)
        with without_autocast(z):
            wide = compute_dtype(z, self.weight)
            columns = z.movedim(self.channel_dim, 0)
            rows = columns.reshape(self.num_features, math.prod(columns.shape[1:]))
            x = torch.linalg.solve(self.weight.to(wide), rows.to(wide))
            return x.view(columns.shape).movedim(0, self.channel_dim).to(z.dtype)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.num_features}, channel_dim={self.channel_dim}"


class Squeeze2x2(nn.Module):
    """Every 2 x 2 pixels become four channels of one.

    Shape: (batch, C, H, W) -> (batch, 4 C, H/2, W/2).

    Raises:
        ValueError: In `forward`, if a height or width is odd; in `inverse`, if channels are no multiple of 4.
    """

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """Pixels to channels."""
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"input of shape {tuple(x.shape)}: must be (batch, channels, height, width), both even")
        batch, channels, height, width = x.shape
        if not batch:  # which torch's own refuses
            return x.reshape(0, 4 * channels, height // 2, width // 2)
        return nn.functional.pixel_unshuffle(x, 2)

    def inverse(self, z: Tensor, context: Context = None) -> Tensor:
        """Channels to pixels."""
        if z.dim() != 4 or z.shape[1] % 4:
            raise ValueError(f"input of shape {tuple(z.shape)}: must be (batch, channels, height, width), 4 C channels")
        batch, channels, height, width = z.shape
        if not batch:
            return z.reshape(0, channels // 4, 2 * height, 2 * width)
        return nn.functional.pixel_shuffle(z, 2)


class Inverse(nn.Module):
    """A net the other way round.

    Args:
        net: Any invertible net.

    Shape: as that of the net's inverse.
    """

    def __init__(self, net: Invertible):
        super().__init__()
        self.net = checked("net", net)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """The net's inverse."""
        return self.net.inverse(x, context)

    def inverse(self, z: Tensor, context: Context = None) -> Tensor:
        """The net's forward."""
        return call(self.net, z, context)


class Conditioned(nn.Module):
    """A net with its context fixed. Several of these may share one net, as one for noise and one for data.

    Args:
        net: Any invertible net that takes a context.
        context: A number, or a tensor, which becomes a buffer that moves with the module and is not in the state dict.

    Shape: as the net's.
    """

    def __init__(self, net: Invertible, context: float | Tensor):
        super().__init__()
        self.net = checked("net", net)
        if isinstance(context, Tensor):
            self.register_buffer("context", context, persistent=False)
        else:
            self.context = context

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """The net's forward, with the fixed context.

        Raises:
            ValueError: If another context is given.
        """
        self._refuse(context)
        return call(self.net, x, self.context)

    def inverse(self, z: Tensor, context: Context = None) -> Tensor:
        """The net's inverse, with the fixed context; refuses another as `forward` does."""
        self._refuse(context)
        return self.net.inverse(z, self.context)

    def _refuse(self, context: Context) -> None:
        if context is not None:
            raise ValueError(f"context={context!r}: this net's is fixed to {self.context!r}; leave it out")

    def extra_repr(self) -> str:
        """The context, for `repr`."""
        return f"context={self.context}"


class InvertibleSequential(nn.Module):
    """Nets one behind the other; the inverse goes through them backwards.

    Args:
        nets: Any invertible nets that fit.

    Shape: from the first one's to the last one's.
    """

    def __init__(self, *nets: Invertible):
        super().__init__()
        for index, net in enumerate(nets):
            checked(f"nets[{index}]", net)
            if not isinstance(net, nn.Module):
                raise TypeError(f"nets[{index}]={net!r}: must be an nn.Module")
            self.add_module(str(index), net)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __getitem__(self, index: int) -> Any:
        return list(self._modules.values())[index]

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        """Through the nets in order, each with the same context."""
        for net in self:
            x = net(x, context)
        return x

    def inverse(self, z: Tensor, context: Context = None) -> Tensor:
        """Through their inverses in reversed order."""
        for net in reversed(list(self)):
            z = net.inverse(z, context)
        return z


def same_net(a: Any, b: Any) -> bool:
    """Whether two nets are one: the same object, or the same net in `Conditioned` with an equal context."""
    if a is b:
        return True
    if not (isinstance(a, Conditioned) and isinstance(b, Conditioned) and same_net(a.net, b.net)):
        return False
    first, second = (torch.as_tensor(c.context) for c in (a, b))
    return first.shape == second.shape and bool((first.to(second.device) == second).all())


def checked(name: str, net: Any) -> Any:
    """The net, if it can be inverted; else a TypeError."""
    if isinstance(net, Invertible):
        return net
    raise TypeError(f"{name}={net!r}: must be an invertible net, with forward(x) and inverse(z)")


def call(net: Invertible, x: Tensor, *context: Context) -> Tensor:
    """The net's forward; by way of its hooks where it is a module."""
    return net(x, *context) if callable(net) else net.forward(x, *context)


def check_axis(x: Tensor, channels: int, channel_dim: int) -> None:
    """A ValueError unless x has so many channels on that axis."""
    if not -x.dim() <= channel_dim < x.dim() or x.shape[channel_dim] != channels:
        raise ValueError(f"input of shape {tuple(x.shape)}: must have {channels} channels on axis {channel_dim}")


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A region without autocast: rounded to bfloat16, an inverse is good to 1e-2 only."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def widened(x: Tensor) -> Tensor:
    """x, in float32 where autocast may have made it a half."""
    return x.float() if under_autocast(x) and x.dtype in (torch.bfloat16, torch.float16) else x
