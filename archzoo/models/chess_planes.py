"""What encoders of chess positions derive from the eight planes of `archzoo.tasks.chess_board.encode`."""

import torch
from torch import Tensor

from archzoo.tasks.chess_board import CASTLING, EN_PASSANT

POSITION = 24
"""Planes of `expand_planes`."""
_CORNERS = ((0, 7, 1), (0, 0, 1), (7, 7, -1), (7, 0, -1))
"""Rank, file and sign of the rooks that may castle: the mover's on the king's and queen's side, the opponent's."""


def castling_rights(x: Tensor) -> Tensor:
    """Who may castle, 1 or 0: the mover on its king's and queen's side, the opponent. (B, 8, 8, 8) -> (B, 4)."""
    return torch.stack([sign * x[:, CASTLING, rank, file] for rank, file, sign in _CORNERS], 1)


def expand_planes(x: Tensor) -> Tensor:
    """24 planes, the paper's number; which ones it does not say. (B, 8, 8, 8) -> (B, 24, 8, 8).

    Six of the mover's pieces and six of the opponent's (pawn, knight, bishop, rook, queen, king), 1 or 0; four that are
    1 or 0 all over, as `castling_rights`; the en passant target; squares of the mover, of the opponent, and empty ones;
    rank and file from -1 to 1; the dark squares; and ones, by which a convolution with padding sees the board's edge.
    """
    pieces = x[:, :CASTLING]
    mover, opponent = pieces.clamp(min=0), -pieces.clamp(max=0)
    ours, theirs = mover.sum(1, keepdim=True), opponent.sum(1, keepdim=True)
    line = torch.linspace(-1, 1, 8, device=x.device, dtype=x.dtype)
    parity = torch.arange(8, device=x.device)
    dark = ((parity[:, None] + parity) % 2 == 0).to(x.dtype)
    fixed = torch.stack([line[:, None].expand(8, 8), line.expand(8, 8), dark, torch.ones_like(dark)])
    rights = castling_rights(x)[:, :, None, None].expand(-1, -1, 8, 8)
    target = x[:, EN_PASSANT : EN_PASSANT + 1]
    return torch.cat(
        [mover, opponent, rights, target, ours, theirs, 1 - ours - theirs, fixed.expand(x.shape[0], -1, -1, -1)], 1
    )
