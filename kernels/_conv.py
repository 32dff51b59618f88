"""What the ops of convolutional layers have in common: checks of their arguments, sizes, windows of their input."""

import math
from collections.abc import Sequence

from torch import Tensor


def check_input(x: Tensor, channels: int) -> None:
    """A ValueError unless x is (B, C, H, W) or (C, H, W), of so many channels, with a pixel and of a float dtype."""
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: must be a floating-point one")
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        size = x.shape[-3] if x.dim() >= 3 else "none"
        raise ValueError(
            f"x has shape {tuple(x.shape)}: must be (batch, {channels}, height, width) or ({channels}, height, width); "
            f"it has {size} channels where {channels} are needed"
        )
    if x.numel() == 0 and 0 in x.shape[-2:]:
        raise ValueError(f"x has shape {tuple(x.shape)}: must have a pixel")


def output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, transposed: bool = False, output_padding: int = 0
) -> int:
    """Height or width of the output of a convolution, as in `nn.Conv2d` and `nn.ConvTranspose2d`."""
    span = dilation * (kernel - 1) + 1
    if transposed:
        return (size - 1) * stride - 2 * padding + span + output_padding
    return (size + 2 * padding - span) // stride + 1


def check_output(x: Tensor, size: Sequence[int]) -> None:
    """A ValueError unless the output has a pixel."""
    for axis, side, pixels in zip((-2, -1), ("height", "width"), size, strict=True):
        if pixels < 1:
            raise ValueError(f"x has shape {tuple(x.shape)}: its {side} {x.shape[axis]} is less than the kernel spans")


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """A view (B, C, H', W', kh, kw) of x (B, C, H, W): what the kernel covers at each output pixel."""
    for axis in (0, 1):
        x = x.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
    return x[..., :: dilation[0], :: dilation[1]]


def blocks(rows: int, size: Sequence[int], room: int) -> list[tuple[slice, slice, slice]]:
    """Cuts (rows, H, W) into blocks of `room` pixels at most, and one at least: of images, of lines, or of a line."""
    height, width = size
    w = min(width, max(1, room))
    h = min(height, max(1, room // max(1, width)))
    b = min(rows, max(1, room // max(1, math.prod(size))))

    def cut(length: int, step: int) -> list[slice]:
        return [slice(i, min(i + step, length)) for i in range(0, length, max(1, step))]

    return [(i, j, k) for i in cut(rows, b) for j in cut(height, h) for k in cut(width, w)]
