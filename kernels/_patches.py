"""Convolutions by the Triton kernels of linear layers: on patches, gathered for a block of pixels at a time."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from archzoo.kernels._conv import blocks, windows

_ELEMENTS = 2**22  # of the patches of a block, at least; with fewer, launches would take longer than their work

Block = tuple[slice, slice, slice]
"""Pixels of the output: images, lines and columns."""

Sums = list[Tensor | None]


class Patches:
    """The patches of a convolution's input as rows, and the way back of what is made of them.

    Args:
        x: (B, C, H, W), padded.
        kernel: Height and width.
        stride: Down and across.
        dilation: Down and across.
        groups: Of channels.
    """

    def __init__(self, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int):
        self.x, self.kernel, self.stride, self.dilation, self.groups = x, tuple(kernel), stride, dilation, groups
        self.view = windows(x, kernel, stride, dilation)  # (B, C, H', W', kh, kw)

    def map(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """y (B, O, H', W') of a function of rows, (groups, pixels, I) -> (groups, pixels, O / groups)."""
        y = None
        for block in self._blocks():
            made = forward(self._rows(block))
            if y is None:
                images, _, *size = self.view.shape[:4]
                y = made.new_empty(images, self.groups * made.shape[2], *size)
            place = self._outputs(y, block)
            place.copy_(made.view(place.shape))
        assert y is not None, "there is a block, if an empty one"
        return y

    def gradients(
        self,
        dy: Tensor,
        of_input: Callable[[Tensor, Tensor], Tensor] | None,
        of_parameters: Callable[[Tensor, Tensor], Sums] | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Sums | None]:
        """Sums of the gradients of a function of rows.

        Args:
            dy: (B, O, H', W').
            of_input: (rows of dy, rows of x) -> the gradient of these; None if it is not needed.
            of_parameters: The same -> what is summed over rows; None if it is not needed.
            dtype: Of the sums.

        Returns:
            Gradient of x, padded, and of the parameters.
        """
        dx = torch.zeros(self.x.shape, dtype=dtype, device=dy.device) if of_input else None
        sums: Sums | None = None
        for block in self._blocks():
            rows, above = self._rows(block), self._outputs(dy, block).flatten(1, 3).contiguous()
            if of_input is not None and dx is not None:
                self._add(dx, of_input(above, rows), block)
            if of_parameters is not None:
                own = of_parameters(above, rows)
                both = zip(sums or own, own, strict=True)
                sums = own if sums is None else [None if a is None or b is None else a + b for a, b in both]
        return dx, sums

    def _blocks(self) -> Iterator[Block]:
        """All pixels; an empty block for an empty batch."""
        images, channels, *size = self.view.shape[:4]
        room = max(_ELEMENTS, self.x.numel()) // (channels * self.kernel[0] * self.kernel[1])
        whole = slice(0, size[0]), slice(0, size[1])
        return iter(blocks(images, size, room) or [(slice(0, 0), *whole)])

    def _rows(self, block: Block) -> Tensor:
        """The patches of a block (groups, pixels, C / groups · kh · kw), contiguous."""
        b, h, w = block
        patches = self.view[b, :, h, w].unflatten(1, (self.groups, -1)).permute(1, 0, 3, 4, 2, 5, 6)
        return patches.flatten(4).flatten(1, 3).contiguous()

    def _outputs(self, y: Tensor, block: Block) -> Tensor:
        """A view (groups, b, h, w, O / groups) of y (B, O, H', W')."""
        b, h, w = block
        return y[b, :, h, w].unflatten(1, (self.groups, -1)).permute(1, 0, 3, 4, 2)

    def _add(self, dx: Tensor, rows: Tensor, block: Block) -> None:
        """Adds what rows have to dx: one tap after the other, as they overlap."""
        b, h, w = block
        size = [s.stop - s.start for s in block]
        channels = self.x.shape[1] // self.groups
        taps = rows.view(self.groups, *size, channels, *self.kernel).permute(1, 0, 4, 2, 3, 5, 6).flatten(1, 2)
        for i, j in product(*map(range, self.kernel)):
            down, across = (
                slice(tap * d + s.start * step, tap * d + (s.stop - 1) * step + 1, step)
                for tap, s, step, d in zip((i, j), (h, w), self.stride, self.dilation, strict=True)
            )
            dx[b, :, down, across] += taps[..., i, j]


def unpad(x: Tensor, padding: Sequence[int], size: Sequence[int]) -> Tensor:
    """What of a padded x (B, C, H, W) is x, of that height and width."""
    return x[:, :, padding[0] : padding[0] + size[0], padding[2] : padding[2] + size[1]]
