"""Chess positions as arrays, seen from the side to move; the rules are python-chess's, an optional extra.

python-chess (`pip install 'archzoo[chess]'`) is under the GPL-3.0, hence it is imported only where a board is needed.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import chess

PLANES = 8
"""Pawn, knight, bishop, rook, queen, king, rooks that may castle, en passant target."""
CASTLING, EN_PASSANT = 6, 7
WIN_PER_CENTIPAWN = 0.00368208
MATE = 100_000
"""Centipawns of a mate on the board; one in n moves is n half-moves less. No evaluation without mate comes near."""
MATE_BOUND = MATE - 1000

# Codes of a square in a packed position: 0 empty, 1-6 the mover's piece, 7-12 the opponent's, then these.
_OWN_CASTLING, _THEIR_CASTLING, _TARGET = 13, 14, 15
_ROOK = 3


def require_chess() -> Any:
    """The module `chess`.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import chess
    except ImportError as error:
        raise ImportError("rules of chess need python-chess: pip install 'archzoo[chess]'") from error
    return chess


def encode(board: "chess.Board") -> NDArray[np.int8]:
    """A position as planes (8, 8, 8): [plane, rank, file], seen from the side to move.

    With black to move, ranks are mirrored and colours swapped, so that a position and its twin with colours swapped are
    the same array; files are never mirrored. Rank 0 is the mover's first.

    Planes 0 to 5 are pawn, knight, bishop, rook, queen and king: +1 the mover's, -1 the opponent's. Plane 6: +1 and -1
    on the rooks with which mover and opponent may still castle. Plane 7: +1 on the square that an en passant capture
    goes to, if one is legal. What these leave out is the number of the move, and how often a position occurred.
    """
    return encode_many([board])[0]


def encode_many(boards: "Iterable[chess.Board]") -> NDArray[np.int8]:
    """Positions as planes (n, 8, 8, 8), see `encode`."""
    masks: list[int] = []
    for board in boards:
        ours, theirs = board.occupied_co[board.turn], board.occupied_co[not board.turn]
        kinds = (board.pawns, board.knights, board.bishops, board.rooks, board.queens, board.kings)
        rights = board.clean_castling_rights()
        square = board.ep_square
        target = 1 << square if square is not None and board.has_legal_en_passant() else 0
        planes = [kind & ours for kind in kinds] + [rights & ours, target]
        planes += [kind & theirs for kind in kinds] + [rights & theirs, 0]
        # A rank is a byte: to swap bytes is to mirror the ranks.
        masks += planes if board.turn else [int.from_bytes(plane.to_bytes(8, "little"), "big") for plane in planes]
    bits = np.unpackbits(np.array(masks, dtype="<u8").view(np.uint8), bitorder="little").view(np.int8)
    both = bits.reshape(-1, 2, PLANES, 8, 8)
    return both[:, 0] - both[:, 1]


def decode(planes: NDArray[np.int8]) -> "chess.Board":
    """The board of planes (8, 8, 8), with white to move: the mover is white, whichever colour was encoded."""
    chess = require_chess()
    board = chess.Board(None)
    for kind, rank, file in np.argwhere(planes[:CASTLING]).tolist():
        board.set_piece_at(8 * rank + file, chess.Piece(kind + 1, bool(planes[kind, rank, file] > 0)))
    for rank, file in np.argwhere(planes[CASTLING]).tolist():
        board.castling_rights |= chess.BB_SQUARES[8 * rank + file]
    for rank, file in np.argwhere(planes[EN_PASSANT]).tolist():
        board.ep_square = 8 * rank + file
    return board


def pack(planes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Planes (n, 8, 8, 8) in 32 bytes a position, (n, 32): half a byte a square."""
    number = np.arange(1, CASTLING + 1, dtype=np.int8)[:, None, None]
    pieces = planes[:, :CASTLING]
    code = ((pieces > 0) * number + (pieces < 0) * (number + CASTLING)).sum(1, dtype=np.uint8)
    code[planes[:, CASTLING] > 0] = _OWN_CASTLING
    code[planes[:, CASTLING] < 0] = _THEIR_CASTLING
    code[planes[:, EN_PASSANT] > 0] = _TARGET
    squares = code.reshape(-1, 32, 2)
    return squares[..., 0] | squares[..., 1] << 4


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Planes (n, 8, 8, 8) of packed positions (n, 32)."""
    table = np.zeros((16, PLANES), dtype=np.int8)
    table[np.arange(1, 7), np.arange(6)] = 1
    table[np.arange(7, 13), np.arange(6)] = -1
    table[_OWN_CASTLING, [_ROOK, CASTLING]] = 1
    table[_THEIR_CASTLING, [_ROOK, CASTLING]] = -1
    table[_TARGET, EN_PASSANT] = 1
    squares = np.stack([packed & 15, packed >> 4], 2).reshape(-1, 8, 8)
    return np.ascontiguousarray(table[squares].transpose(0, 3, 1, 2))


def win_probability(centipawns: ArrayLike) -> NDArray[np.float64]:
    """Win probability of an evaluation in centipawns, from 0 to 1, as ChessBench has it (arXiv 2402.04494).

    $50 + 50 (2 / (1 + e^{-0.00368208 c}) - 1)$ percent; a mate is 1, or 0 for the side that is mated.
    """
    value = np.asarray(centipawns, dtype=np.float64)
    # tanh, for exp overflows where a side is far behind
    smooth = 0.5 + 0.5 * np.tanh(value * (WIN_PER_CENTIPAWN / 2))
    return np.where(np.abs(value) >= MATE_BOUND, (value > 0).astype(np.float64), smooth)


def value_targets(win: ArrayLike) -> NDArray[np.float32]:
    """Soft targets (n, 2) of win probabilities (n,) of the mover: how likely it wins, and how likely it does not."""
    chance = np.asarray(win, dtype=np.float32)
    return np.stack([chance, 1 - chance], -1)


def parse_board(fen: str) -> "chess.Board":
    """The board of a FEN.

    Raises:
        ValueError: If it is no FEN, or a side has not exactly one king.
    """
    board = require_chess().Board(fen)
    if any(bin(board.kings & board.occupied_co[side]).count("1") != 1 for side in (True, False)):
        raise ValueError(f"fen={fen!r}: each side must have one king")
    return board
