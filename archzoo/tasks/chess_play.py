"""Chess by a learned value: one look ahead, or minimax, on the win probabilities that a model gives of positions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from archzoo.pictures import outputs
from archzoo.tasks.chess_board import CASTLING, encode_many, win_probability
from archzoo.tasks.chess_search import MAX_DEPTH, PIECES
from archzoo.tasks.options import whole_number

if TYPE_CHECKING:
    import chess

Value = Callable[[NDArray[np.int8]], NDArray[np.float64]]
"""Win probabilities (n,) of the side to move, of positions (n, 8, 8, 8) as `encode` makes them."""


@dataclass(frozen=True)
class Puzzle:
    """A position and how to play it.

    Attributes:
        board: The position, the solver to move.
        moves: The solution: the solver's move, the reply, the solver's move, and so on.
        rating: How hard it is, in Elo; None where nobody knows.
    """

    board: "chess.Board"
    moves: "tuple[chess.Move, ...]"
    rating: int | None = None


def model_value(model: nn.Module) -> Value:
    """The value that a model with two logits gives: how likely the mover wins, and how likely it does not.

    The model is in evaluation mode while it is asked, and gradients are off.
    """

    def value(planes: NDArray[np.int8]) -> NDArray[np.float64]:
        training = model.training
        model.eval()
        try:
            logits = outputs(model, torch.from_numpy(planes).float())
        finally:
            model.train(training)
        if logits.shape != (len(planes), 2):
            raise ValueError(f"model: must give two logits a position, ({len(planes)}, 2), not {tuple(logits.shape)}")
        return logits.softmax(1)[:, 0].numpy()

    return value


def material_value(planes: NDArray[np.int8]) -> NDArray[np.float64]:
    """The value that counts pieces and nothing else: what any learned value should beat."""
    return win_probability(planes[:, :CASTLING].sum((2, 3), dtype=np.int64) @ np.array(PIECES[1:]))


def best_move(value: Value, board: "chess.Board", depth: int = 1) -> "chess.Move":
    """The legal move whose position is worst for the opponent; of equally good ones, one that is looked at first.

    Mate, stalemate, insufficient material, a position that occurred three times, and fifty moves without capture or
    pawn move count as what they are, whatever `value` says, and a mate that comes sooner is better.

    Args:
        value: Gives the positions at the end of the look ahead their win probabilities.
        board: A position, with its history if repetitions are to count. It is left as it is.
        depth: Half-moves to look ahead. Beyond 1: minimax with alpha-beta, which finds what plain minimax does.

    Raises:
        ValueError: If `depth` is out of range, or no move is legal.
    """
    return search(value, board, depth)[0]


def search(value: Value, board: "chess.Board", depth: int = 1) -> "tuple[chess.Move, float]":
    """The best move, as `best_move`, and its score: win probability - 1/2; a mate in n half-moves is 1 + 1 / (n + 1).

    Raises:
        ValueError: If `depth` is out of range, or no move is legal.
    """
    whole_number("depth", depth, 1, MAX_DEPTH)
    best, score = _best(value, board.copy(), depth, 0, -2.0, 2.0)
    if best is None:
        raise ValueError(f"board={board.fen()!r}: has no legal move")
    return best, score


def _best(
    value: Value, board: "chess.Board", depth: int, ply: int, alpha: float, beta: float
) -> "tuple[chess.Move | None, float]":
    """The best move and its score, for the side to move; exact if between alpha and beta, else a bound."""
    moves, scores, final = _children(value, board, ply)
    if depth == 1:
        top = max(range(len(moves)), key=scores.__getitem__, default=None)
        return (None, alpha) if top is None else (moves[top], scores[top])
    best, highest = None, -2.0
    for n in sorted(range(len(moves)), key=lambda n: -scores[n]):  # what looks best is first: more is cut off
        score = scores[n]
        if not final[n]:
            board.push(moves[n])
            score = -_best(value, board, depth - 1, ply + 1, -beta, -max(alpha, highest))[1]
            board.pop()
        if score > highest:
            best, highest = moves[n], score
            if highest >= beta:
                break
    return best, highest


def _children(value: Value, board: "chess.Board", ply: int) -> "tuple[list[chess.Move], list[float], list[bool]]":
    """Legal moves, the score of each, and whether the game is over with it. One batch of positions for `value`."""
    moves = list(board.legal_moves)
    ends: list[float | None] = []

    def positions() -> "Iterator[chess.Board]":
        for move in moves:
            board.push(move)
            ends.append(_end(board, ply + 1))
            if ends[-1] is None:
                yield board
            board.pop()

    planes = encode_many(positions())
    chances = iter(value(planes).tolist() if len(planes) else ())
    return moves, [0.5 - next(chances) if end is None else -end for end in ends], [end is not None for end in ends]


def _end(board: "chess.Board", ply: int) -> float | None:
    """Score of the side to move where the game is over; else None."""
    if not any(True for _ in board.generate_legal_moves()):
        return -1 - 1 / (ply + 1) if board.is_check() else 0.0
    drawn = board.halfmove_clock >= 100 or board.is_insufficient_material() or board.is_repetition(3)
    return 0.0 if drawn else None


def solves(choose: "Callable[[chess.Board], chess.Move]", puzzle: Puzzle) -> bool:
    """Whether a player finds all the solver's moves, or at one of them another move that mates (as Lichess counts)."""
    board = puzzle.board.copy()
    for number, move in enumerate(puzzle.moves):
        if number % 2 == 0 and (chosen := choose(board)) != move:
            board.push(chosen)
            return board.is_checkmate()
        board.push(move)
    return True


def solved_share(value: Value, puzzles: Sequence[Puzzle], depth: int = 1) -> float:
    """Share of puzzles that a value solves with `best_move`."""
    return sum(solves(lambda board: best_move(value, board, depth), puzzle) for puzzle in puzzles) / len(puzzles)


def chance_share(puzzles: Sequence[Puzzle]) -> float:
    """Share of puzzles that moves at random solve, on average; other mates than the solution's are not counted."""
    shares = []
    for puzzle in puzzles:
        board, share = puzzle.board.copy(), 1.0
        for number, move in enumerate(puzzle.moves):
            if number % 2 == 0:
                share /= board.legal_moves.count()
            board.push(move)
        shares.append(share)
    return sum(shares) / len(shares)
