"""What convolutional layers have in common: their arguments, checked, and padding as `nn.Conv2d` pads."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def as_pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """(vertical, horizontal); a ValueError unless the value is an integer, or two, of `least` or more."""
    pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < least for v in pair):
        raise ValueError(f"{name}={value!r}: must be an integer, {least} or more, or two of them")
    return pair[0], pair[1]


def check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """A ValueError unless all are positive integers and the groups divide the channels."""
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a positive integer")
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"groups={groups}: must divide in_channels={in_channels} and out_channels={out_channels}")


def check_padding(padding: int | Sequence[int] | str, stride: tuple[int, int]) -> tuple[int, int] | str:
    """(vertical, horizontal), "same" or "valid"; a ValueError for anything else."""
    if not isinstance(padding, str):
        return as_pair("padding", padding, 0)
    if padding not in ("same", "valid"):
        raise ValueError(f"padding={padding!r}: must be 'same', 'valid', an integer, 0 or more, or two of them")
    if padding == "same" and stride != (1, 1):
        raise ValueError(f"padding='same' with stride={stride}: the output keeps the input's size only at stride 1")
    return padding


def pad(
    x: Tensor, padding: tuple[int, int] | str, kernel: tuple[int, int], dilation: tuple[int, int], mode: str = "zeros"
) -> tuple[Tensor, tuple[int, int]]:
    """x with what a convolution cannot pad itself, and how many zeros are left for it to pad on both sides."""
    before, after = [0, 0], [0, 0]
    for i in (0, 1):
        if padding == "same":  # an odd pixel goes to the end
            total = dilation[i] * (kernel[i] - 1)
            before[i], after[i] = total // 2, total - total // 2
        elif not isinstance(padding, str):
            before[i] = after[i] = padding[i]
    if mode == "zeros" and before == after:
        return x, (before[0], before[1])
    for i, side in enumerate(("height", "width")):
        size, most = x.shape[i - 2], max(before[i], after[i])
        least = {"reflect": most + 1, "circular": most, "replicate": min(most, 1)}.get(mode, 0)
        if size < least:
            raise ValueError(f"x has shape {tuple(x.shape)}: padding_mode={mode!r} needs a {side} of {least} or more")
    amounts = (before[1], after[1], before[0], after[0])
    return F.pad(x, amounts, "constant" if mode == "zeros" else mode), (0, 0)
