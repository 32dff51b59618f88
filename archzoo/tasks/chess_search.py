"""A small chess engine: what labels positions, and what learned values are compared with.

Alpha-beta with quiescence on material and piece-square tables: the simplified evaluation function of T. Michniewski
(https://www.chessprogramming.org/Simplified_Evaluation_Function), of which the king's table is that of the endgame as
soon as there are no queens. It sees mates, draws by insufficient material and by fifty moves, and stalemates but for
those of the last half-move; repetitions it does not look for.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from archzoo.tasks.chess_board import MATE
from archzoo.tasks.options import whole_number

if TYPE_CHECKING:
    import chess

PIECES = (0, 100, 320, 330, 500, 900, 0)
"""Centipawns of nothing, pawn, knight, bishop, rook, queen, king."""
MAX_DEPTH = 8
_MARGIN = 100
"""Centipawns that kings may gain as the last queen goes."""
_PAWN, _ROOK, _QUEEN, _KING = 1, 4, 5, 6

# White's tables as they are printed, from the eighth rank down.
_TABLES = """
  0   0   0   0   0   0   0   0  50  50  50  50  50  50  50  50  10  10  20  30  30  20  10  10   5   5  10  25  25  10
  5   5   0   0   0  20  20   0   0   0   5  -5 -10   0   0 -10  -5   5   5  10  10 -20 -20  10  10   5   0   0   0   0
  0   0   0   0

-50 -40 -30 -30 -30 -30 -40 -50 -40 -20   0   0   0   0 -20 -40 -30   0  10  15  15  10   0 -30 -30   5  15  20  20  15
  5 -30 -30   0  15  20  20  15   0 -30 -30   5  10  15  15  10   5 -30 -40 -20   0   5   5   0 -20 -40 -50 -40 -30 -30
-30 -30 -40 -50

-20 -10 -10 -10 -10 -10 -10 -20 -10   0   0   0   0   0   0 -10 -10   0   5  10  10   5   0 -10 -10   5   5  10  10   5
  5 -10 -10   0  10  10  10  10   0 -10 -10  10  10  10  10  10  10 -10 -10   5   0   0   0   0   5 -10 -20 -10 -10 -10
-10 -10 -10 -20

  0   0   0   0   0   0   0   0   5  10  10  10  10  10  10   5  -5   0   0   0   0   0   0  -5  -5   0   0   0   0   0
  0  -5  -5   0   0   0   0   0   0  -5  -5   0   0   0   0   0   0  -5  -5   0   0   0   0   0   0  -5   0   0   0   5
  5   0   0   0

-20 -10 -10  -5  -5 -10 -10 -20 -10   0   0   0   0   0   0 -10 -10   0   5   5   5   5   0 -10  -5   0   5   5   5   5
  0  -5   0   0   5   5   5   5   0  -5 -10   5   5   5   5   5   0 -10 -10   0   5   0   0   0   0 -10 -20 -10 -10  -5
 -5 -10 -10 -20

-30 -40 -40 -50 -50 -40 -40 -30 -30 -40 -40 -50 -50 -40 -40 -30 -30 -40 -40 -50 -50 -40 -40 -30 -30 -40 -40 -50 -50 -40
-40 -30 -20 -30 -30 -40 -40 -30 -30 -20 -10 -20 -20 -20 -20 -20 -20 -10  20  20   0   0   0   0  20  20  20  30  10   0
  0  10  30  20

-50 -40 -30 -20 -20 -30 -40 -50 -30 -20 -10   0   0 -10 -20 -30 -30 -10  20  30  30  20 -10 -30 -30 -10  30  40  40  30
-10 -30 -30 -10  30  40  40  30 -10 -30 -30 -10  20  30  30  20 -10 -30 -30 -30   0   0   0   0 -30 -30 -50 -30 -30 -30
-30 -30 -30 -50
"""
_SQUARES = [[int(word) for word in table.split()] for table in _TABLES.strip().split("\n\n")]


def _values(white: bool, kind: int) -> list[int]:
    """Centipawns of a piece on each square, for its own side."""
    return [PIECES[kind] + _SQUARES[kind - 1][square ^ 56 if white else square] for square in range(64)]


_VALUE = [[[0] * 64] + [_values(white, kind) for kind in range(1, 7)] for white in (False, True)]
_ENDGAME = [[_SQUARES[6][s ^ 56 if w else s] - _VALUE[w][_KING][s] for s in range(64)] for w in (False, True)]
"""What the endgame's table gives a king beyond the other one."""


@dataclass(frozen=True)
class Line:
    """A move, and what it is worth.

    Attributes:
        move: Of the side to move.
        value: Centipawns, for that side; a mate in n half-moves is `MATE - n`.
    """

    move: "chess.Move"
    value: int


def evaluate(board: "chess.Board") -> int:
    """Centipawns of a position for the side to move, without any search: material and squares."""
    return _static(board, _score(board))


def _score(board: "chess.Board") -> int:
    """Sum of the pieces' values, for the side to move."""
    white = sum(
        sign * _VALUE[side][kind][square]
        for side, sign in ((True, 1), (False, -1))
        for kind in range(1, 7)
        for square in board.pieces(kind, side)
    )
    return white if board.turn else -white


def _static(board: "chess.Board", score: int) -> int:
    """The evaluation, of the sum of the pieces' values with the kings' of the middle game."""
    if board.queens:
        return score
    turn = board.turn
    own, their = (board.kings & board.occupied_co[side] for side in (turn, not turn))
    return score + _ENDGAME[turn][own.bit_length() - 1] - _ENDGAME[not turn][their.bit_length() - 1]


def _gain(board: "chess.Board", move: "chess.Move", kind: int, victim: int) -> int:
    """Centipawns that a move brings the mover: its piece moves, the victim goes, a castling rook or promotion comes."""
    turn = board.turn
    table, source, target = _VALUE[turn], move.from_square, move.to_square
    gain = table[move.promotion or kind][target] - table[kind][source]
    if victim:
        gain += _VALUE[not turn][victim][target]
    elif kind == _PAWN and (source ^ target) & 7:  # en passant: the victim is behind the target
        gain += _VALUE[not turn][_PAWN][target - 8 if turn else target + 8]
    elif kind == _KING and abs(source - target) == 2:
        rook = table[_ROOK]
        gain += rook[target - 1] - rook[target + 1] if target > source else rook[target + 1] - rook[target - 2]
    return gain


def _ordered(board: "chess.Board", moves: "Iterable[chess.Move]") -> "list[tuple[int, chess.Move]]":
    """Moves, the most promising first, each behind what it brings the mover in centipawns."""
    kind_at = board.piece_type_at
    found = []
    for number, move in enumerate(moves):
        kind, victim = kind_at(move.from_square) or 0, kind_at(move.to_square) or 0
        gain = _gain(board, move, kind, victim)
        # The most valuable victim first, by the least valuable attacker; quiet moves by their squares.
        rank = 10 * PIECES[victim] - PIECES[kind] + 10_000 if victim or move.promotion else gain
        found.append((-rank, number, gain, move))
    found.sort()
    return [(gain, move) for _, _, gain, move in found]


class _Search:
    """Fail-soft alpha-beta on one board. A score is the sum of the pieces' values, for the side to move."""

    def __init__(self, board: "chess.Board"):
        self.board = board

    def value(self, score: int, depth: int, ply: int, alpha: int, beta: int) -> int:
        """Value of the position, exact if between alpha and beta; else a bound."""
        board = self.board
        if board.halfmove_clock >= 100 or (board.occupied.bit_count() <= 4 and board.is_insufficient_material()):
            return -(MATE - ply) if board.is_checkmate() else 0
        if depth <= 0:
            return self.quiesce(score, ply, alpha, beta)
        moves = list(board.generate_legal_moves())
        if not moves:
            return -(MATE - ply) if board.is_check() else 0
        best = -MATE
        for gain, move in _ordered(board, moves):
            board.push(move)
            value = -self.value(-(score + gain), depth - 1, ply + 1, -beta, -max(alpha, best))
            board.pop()
            if value > best:
                best = value
                if best >= beta:
                    break
        return best

    def quiesce(self, score: int, ply: int, alpha: int, beta: int) -> int:
        """Value after captures and promotions; in check, after any move."""
        board = self.board
        check = board.is_check()
        if check:
            moves = list(board.generate_legal_moves())
            if not moves:
                return -(MATE - ply)
            best = floor = -MATE
        else:
            best = floor = _static(board, score)
            if best >= beta:
                return best
            turn = board.turn
            last = 0xFF << 56 if turn else 0xFF
            moves = list(board.generate_legal_captures())
            pawns = board.pawns & board.occupied_co[turn] & (last >> 8 if turn else last << 8)
            if pawns:
                moves += [m for m in board.generate_legal_moves(pawns, last & ~board.occupied) if m.promotion == _QUEEN]
        for gain, move in _ordered(board, moves):
            # The opponent may leave it at that, unless it is in check: such a move is not worth more.
            if not check and floor + gain + _MARGIN <= max(alpha, best) and not board.gives_check(move):
                continue
            board.push(move)
            value = -self.quiesce(-(score + gain), ply + 1, -beta, -max(alpha, best))
            board.pop()
            if value > best:
                best = value
                if best >= beta:
                    break
        return best


def best_lines(board: "chess.Board", depth: int = 2, count: int = 1) -> list[Line]:
    """The best moves of a position, the best one first, each with its exact value at that depth.

    Args:
        board: A position. It is left as it is.
        depth: Half-moves, the first one included, before captures only.
        count: Moves that are asked for; where there are fewer, all. More take longer, as fewer can be cut off.

    Raises:
        ValueError: If `depth` or `count` is out of range.
    """
    whole_number("depth", depth, 1, MAX_DEPTH)
    whole_number("count", count, 1, 1000)
    board = board.copy(stack=False)
    search = _Search(board)
    score = _score(board)
    lines: list[Line] = []
    # A shallower search finds the order: the sooner the best ones are known, the more is cut off.
    gains = {move: gain for gain, move in _ordered(board, board.generate_legal_moves())}
    order = [line.move for line in best_lines(board, depth - 2, count)] if depth > 2 else []
    for move in dict.fromkeys(order + list(gains)):
        floor = lines[-1].value if len(lines) == count else -MATE
        board.push(move)
        value = -search.value(-(score + gains[move]), depth - 1, 1, -MATE, -floor)
        board.pop()
        if len(lines) < count or value > floor:
            lines = sorted(lines[: count - 1] + [Line(move, value)], key=lambda line: -line.value)
    return lines
