"""Linear operators that depend on a style, one for each, and mixtures of them (https://arxiv.org/abs/2510.08570).

A style is its number, or weights that mix all: the operators are mixed, a A_1 + (1 - a) A_2, and not the numbers.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import compute_dtype
from archzoo.layers._check import check_whole, typed
from archzoo.layers.linear_operators import LinearOperator

__all__ = [
    "KernelOperator",
    "StyleOperator",
]


class StyleOperator(LinearOperator):
    """A square matrix for each style. All start as one and the same rotation.

    Args:
        features: Size of the matrices.
        num_styles: Number of styles.

    Attributes:
        weight: (num_styles, features, features).

    Raises:
        ValueError: If a size is wrong; in `forward`, if the style does not fit.
    """

    @typed
    def __init__(
        self,
        features: int,
        num_styles: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(features, features)
        check_whole(num_styles=num_styles)
        self.num_styles = num_styles
        self.weight = nn.Parameter(torch.empty(num_styles, features, features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the matrix that all styles start as."""
        with torch.no_grad():
            start = torch.empty_like(self.weight[0], dtype=compute_dtype(self.weight))
            self.weight.copy_(nn.init.orthogonal_(start))

    def matrix(self, t: Any = None) -> Tensor:
        """A of one style: an index, or weights (num_styles,); or (batch, features, features) of several."""
        return chosen(self.weight, t)

    def forward(self, z: Tensor, t: Any = None) -> Tensor:
        """Latents in another style.

        Args:
            z: (*, features).
            t: The style: an index or weights (num_styles,) for all, or one for each z[i] of (batch, features):
                (batch,) or (batch, num_styles).
        """
        self._check(z)
        matrix = self.matrix(t)
        if matrix.dim() == 2:
            return F.linear(z, matrix)
        if matrix.shape[:-2] != z.shape[:-1]:
            raise _unlike(matrix.shape[:-2], z)
        return (matrix @ z[..., None]).squeeze(-1)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.in_features}, num_styles={self.num_styles}"


class KernelOperator(LinearOperator):
    """A small kernel for each channel of an image's latent, one set for each style: depthwise correlation.

    Padding keeps the size; of an even kernel, the extra row and column go below and to the right. All styles start as
    the identity.

    Args:
        shape: (channels, height, width) of the latent, which is flattened.
        kernel_size: Side of the kernels, in pixels.
        num_styles: Number of styles.

    Attributes:
        weight: (num_styles, channels, kernel_size, kernel_size).

    Raises:
        ValueError: If a size is wrong; in `forward`, if the style does not fit.
    """

    @typed
    def __init__(
        self,
        shape: tuple[int, int, int],
        kernel_size: int,
        num_styles: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if len(shape) != 3:
            raise ValueError(f"shape={shape}: must be (channels, height, width)")
        channels, height, width = shape
        check_whole(channels=channels, height=height, width=width, kernel_size=kernel_size, num_styles=num_styles)
        super().__init__(math.prod(shape), math.prod(shape))
        self.shape, self.kernel_size, self.num_styles = (channels, height, width), kernel_size, num_styles
        size = (num_styles, channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes every style the identity."""
        nn.init.zeros_(self.weight)
        middle = (self.kernel_size - 1) // 2
        with torch.no_grad():
            self.weight[:, :, middle, middle] = 1.0

    def matrix(self, t: Any = None) -> Tensor:
        """A of one style: an index, or weights (num_styles,)."""
        basis = torch.eye(self.in_features, device=self.weight.device, dtype=self.weight.dtype)
        return self.forward(basis, t).mT

    def forward(self, z: Tensor, t: Any = None) -> Tensor:
        """Latents (*, channels height width) in another style; t as in `StyleOperator`."""
        self._check(z)
        kernels, k, (channels, height, width) = chosen(self.weight, t), self.kernel_size, self.shape
        before, after = (k - 1) // 2, k // 2
        images = z.reshape(math.prod(z.shape[:-1]), channels, height, width)
        images = F.pad(images, (before, after, before, after))
        if kernels.dim() == 3:
            return F.conv2d(images, kernels[:, None], groups=channels).view(z.shape)
        if kernels.shape[:-3] != z.shape[:-1]:
            raise _unlike(kernels.shape[:-3], z)
        if not z.numel():
            return z
        # Every sample's channels are groups of one picture.
        merged, grouped = images.reshape(1, -1, *images.shape[2:]), kernels.reshape(-1, 1, k, k)
        return F.conv2d(merged, grouped, groups=len(grouped)).view(z.shape)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.shape}, kernel_size={self.kernel_size}, num_styles={self.num_styles}"


def chosen(weights: Tensor, style: Any) -> Tensor:
    """What each style has, (num_styles, ...), of indices (*) or mixed by weights (*, num_styles).

    Raises:
        ValueError: If there is no such style.
    """
    count = len(weights)
    if style is None:
        raise ValueError(f"style=None: give an index from 0 to {count - 1}, or {count} weights")
    asked = torch.as_tensor(style, device=weights.device)
    if asked.is_floating_point():
        if not asked.dim() or asked.shape[-1] != count:
            raise ValueError(f"style of shape {tuple(asked.shape)}: weights must be (*, {count})")
        return torch.tensordot(asked.to(weights.dtype), weights, 1)
    # Of a tensor's indices the look-up itself complains, without waiting for a GPU.
    if asked.dtype == torch.bool or (
        not isinstance(style, Tensor) and not all(0 <= i < count for i in asked.flatten())
    ):
        raise ValueError(f"style={style!r}: indices must be whole numbers from 0 to {count - 1}")
    return weights[asked]


def _unlike(styles: torch.Size, z: Tensor) -> ValueError:
    return ValueError(f"style for {tuple(styles)}: must be one for all, or one for each of an input {tuple(z.shape)}")
