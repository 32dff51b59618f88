"""Rotary position embedding: adjacent pairs of features turn by an angle that grows with the position (2104.09864)."""

import torch
from torch import Tensor


def rotary_table(
    positions: Tensor, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cosine and sine of position · theta^(-2 i / head_dim), for each pair i of features.

    Args:
        positions: Whole numbers (L,), or (B, L) where sequences differ.
        head_dim: Size of a head; even.
        theta: The longest wave has about 2 pi theta positions.
        dtype: Of the angles: float32 or float64. In 16 bits neighbouring positions would be one.

    Returns:
        (L, 1, head_dim / 2, 2) or (B, L, 1, head_dim / 2, 2); the axis of size 1 is that of the heads.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=positions.device) / -head_dim
    angles = positions.to(dtype)[..., None] * theta**exponents
    return torch.stack((angles.cos(), angles.sin()), -1).unsqueeze(-3)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair (a, b) of adjacent features into (a cos - b sin, a sin + b cos).

    Args:
        x: (B, L, heads, head_dim), float32 or float64.
        table: Of `rotary_table`, in that dtype.

    Returns:
        As x. Norms stay, and a scalar product of two turned vectors depends on the difference of their positions only.
    """
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # a compiler fuses this form, and leaves complex numbers alone
        a, b = pairs.unbind(-1)
        cos, sin = table.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table)  # a quarter of the time
    return torch.view_as_real(turned).flatten(-2)
