"""Encoders of chess positions (arXiv 2507.10951): from planes seen from the mover to a vector.

Positions are (batch, 8, 8, 8), [plane, rank, file], as `archzoo.tasks.chess_board.encode` makes them. Each encoder says
by `out_features` how long its vectors are.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.models.chess_graph import GraphEncoder
from archzoo.models.chess_planes import POSITION, castling_rights, expand_planes
from archzoo.tasks.chess_board import CASTLING, EN_PASSANT, PLANES

__all__ = ["ENCODERS", "ConvolutionEncoder", "GraphEncoder", "ResidualEncoder", "VectorEncoder"]


class VectorEncoder(nn.Module):
    """404 numbers, nothing learned: 384 of the six planes of pieces, 4 of castling, 16 of en passant.

    Castling is 1 or 0: the mover's on its king's side, on its queen's side, the opponent's. En passant are the squares
    of the third rank, then the sixth: those that such a capture goes to.

    Attributes:
        out_features: 404.

    Shape: (batch, 8, 8, 8) -> (batch, 404).
    """

    out_features = 404

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, 8, 8, 8) to (batch, 404)."""
        targets = x[:, EN_PASSANT, [2, 5]]
        return torch.cat([x[:, :CASTLING].flatten(1), castling_rights(x), targets.flatten(1)], 1)


class ConvolutionEncoder(nn.Module):
    """Convolutions of kernel 1 to 8, one filter each, side by side, and a ReLU: the encoder of upstream's code.

    Attributes:
        out_features: 204, the sum of the squares from 1 to 64.

    Shape: (batch, 8, 8, 8) -> (batch, 204).
    """

    out_features = 204

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Conv2d(PLANES, 1, size) for size in range(1, 9))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, 8, 8, 8) to (batch, 204)."""
        return F.relu(torch.cat([convolve(x).flatten(1) for convolve in self.filters], 1))


class SqueezeExcitation(nn.Module):
    r"""Scales channels by what the whole board shows: $x \sigma(W_2 \mathrm{ReLU}(W_1 \bar x))$ (arXiv 1709.01507).

    Args:
        width: Number C of channels.
        reduction: C over the hidden size.

    Shape: (batch, C, height, width) -> the same.
    """

    def __init__(self, width: int, reduction: int):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(width, width // reduction), nn.Linear(width // reduction, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, C, height, width) to the same."""
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, each with a batch norm, squeeze and excitation, the input added, a ReLU.

    Args:
        width: Number C of channels.
        reduction: See `SqueezeExcitation`.

    Shape: (batch, C, height, width) -> the same.
    """

    def __init__(self, width: int, reduction: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            SqueezeExcitation(width, reduction),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, C, height, width) to the same."""
        return F.relu(x + self.branch(x))


class ResidualEncoder(nn.Module):
    """The paper's CNN: a 3 x 3 stem and 6 residual blocks with squeeze and excitation, on 24 planes, to 256 numbers.

    What the paper does not say is chosen here: the planes are `expand_planes`'s, and the 256 numbers are mean and
    maximum of 128 channels over the board, as in the paper's graph network. A CNN-BPU so made (output pool of 400) has
    1,961,872 learned parameters; the paper says 2 M. It is for a GPU.

    Args:
        width: Number C of channels.
        depth: Number of blocks.
        reduction: Of squeeze and excitation: C over the hidden size.

    Attributes:
        out_features: 2 C.

    Shape: (batch, 8, 8, 8) -> (batch, 2 C).
    """

    def __init__(self, width: int = 128, depth: int = 6, reduction: int = 4):
        super().__init__()
        self.out_features = 2 * width
        self.stem = nn.Sequential(
            nn.Conv2d(POSITION, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(*[ResidualBlock(width, reduction) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, 8, 8, 8) to (batch, 2 C)."""
        channels = self.blocks(self.stem(expand_planes(x)))
        return torch.cat([channels.mean((2, 3)), channels.amax((2, 3))], 1)


ENCODERS: dict[str, type[VectorEncoder | ConvolutionEncoder | ResidualEncoder | GraphEncoder]] = {
    "vector": VectorEncoder,
    "convolutions": ConvolutionEncoder,
    "residual": ResidualEncoder,
    "graph": GraphEncoder,
}
