"""Moves by a value: one look ahead, minimax, exact ends of games, and puzzles."""

import numpy as np
import pytest
import torch
from torch import nn

from archzoo.tasks.chess_board import encode, win_probability
from archzoo.tasks.chess_play import (
    Puzzle,
    best_move,
    chance_share,
    material_value,
    model_value,
    search,
    solved_share,
    solves,
)
from tests.tasks.test_chess_board import games

chess = pytest.importorskip("chess", reason="python-chess is not installed: pip install 'archzoo[chess]'")

WEIGHTS = np.random.RandomState(3).standard_normal((8, 8, 8))
MATE_IN_ONE = "6k1/5ppp/8/8/8/8/5PPP/3R2K1 w - - 0 1"
MATE_IN_TWO = "7k/8/8/8/8/8/1R6/R5K1 w - - 0 1"


def value(planes):
    """Any fixed function of positions."""
    return 0.5 + 0.5 * np.tanh(0.3 * (planes * WEIGHTS).sum((1, 2, 3)))


def flat(planes):
    return np.full(len(planes), 0.5)


def plain(board, depth, ply=0):
    """Score of plain minimax, one position at a time."""
    if not any(board.legal_moves):
        return -1 - 1 / (ply + 1) if board.is_check() else 0.0
    if ply and (board.is_insufficient_material() or board.is_fifty_moves() or board.is_repetition(3)):
        return 0.0
    if depth == 0:
        return value(encode(board)[None])[0] - 0.5
    return max(after(board, move, depth, ply) for move in board.legal_moves)


def after(board, move, depth, ply=0):
    board.push(move)
    score = -plain(board, depth - 1, ply + 1)
    board.pop()
    return score


FENS = [
    "4k3/8/8/3p4/4P3/8/8/4K3 w - - 0 1",
    "8/P3k3/8/8/8/8/5r2/6K1 w - - 0 1",
    "6k1/5ppp/8/8/8/8/5PPP/3R2K1 b - - 0 1",
    "8/8/8/3k4/8/3p4/8/3K4 w - - 98 80",
    MATE_IN_TWO,
]


@pytest.mark.parametrize("fen", FENS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_alpha_beta_finds_what_plain_minimax_finds(fen, depth):
    board = chess.Board(fen)
    move, score = search(value, board, depth)
    scores = {move: after(board, move, depth) for move in board.legal_moves}
    assert score == pytest.approx(max(scores.values()), abs=1e-12)
    assert scores[move] == pytest.approx(score, abs=1e-12)


def test_positions_of_games_too():
    for board in [board for board in games(3, 50, seed=4) if any(board.legal_moves)][::50]:
        scores = {move: after(board, move, 1) for move in board.legal_moves}
        assert best_move(value, board) == max(scores, key=scores.__getitem__)
        assert search(value, board, 2)[1] == pytest.approx(plain(board, 2), abs=1e-12)


def test_the_move_is_the_one_whose_position_is_worst_for_the_opponent():
    board = chess.Board("4k3/8/8/3q4/4P3/8/8/4K3 w - - 0 1")
    assert best_move(material_value, board).uci() == "e4d5"
    assert best_move(lambda planes: 1 - material_value(planes), board).uci() != "e4d5"
    assert best_move(material_value, board.mirror()).uci() == "e5d4"


def test_mates_are_found_whatever_the_value_says():
    assert best_move(flat, chess.Board(MATE_IN_ONE)).uci() == "d1d8"
    assert best_move(lambda planes: np.zeros(len(planes)), chess.Board(MATE_IN_ONE), 2).uci() == "d1d8"
    assert search(flat, chess.Board(MATE_IN_TWO), 3)[1] == 1 + 1 / 4  # in three half-moves
    assert search(flat, chess.Board(MATE_IN_ONE), 3)[1] == 1 + 1 / 2  # the sooner one


def test_a_win_is_not_given_away_by_stalemate_or_repetition():
    winning = chess.Board("7k/8/8/6K1/8/8/8/5Q2 w - - 0 1")
    stalemates = [move for move in winning.legal_moves if after(winning, move, 1) == 0.0]
    assert [move.uci() for move in stalemates] == ["f1f7"]
    # Even if the value took it for the best of all: for black, the queen on f7 is white's on its second rank.
    assert best_move(lambda planes: 0.4 + 0.4 * planes[:, 4, 1, 5], winning) != stalemates[0]
    board = chess.Board("6k1/8/8/8/8/8/8/R5K1 w - - 0 1")
    for name in ("a1a2", "g8g7", "a2a1", "g7g8", "a1a2", "g8g7", "a2a1"):
        board.push_uci(name)
    # To go back to g8 is the third time of this position: a draw, which is all that black can hope for.
    assert search(material_value, board)[0].uci() == "g7g8"
    assert search(material_value, board)[1] == 0.0
    assert search(material_value, board.copy(stack=False))[1] < 0


def test_no_move_and_a_wrong_depth_are_refused():
    with pytest.raises(ValueError, match="has no legal move"):
        best_move(value, chess.Board("7k/5Q2/6K1/8/8/8/8/8 b - - 0 1"))
    with pytest.raises(ValueError, match="depth=0: must be a whole number from 1"):
        best_move(value, chess.Board(), 0)


def test_one_batch_a_node_and_the_board_stays():
    sizes = []

    def counted(planes):
        sizes.append(len(planes))
        return value(planes)

    board = chess.Board()
    board.push_san("e4")
    before = board.fen()
    best_move(counted, board)
    assert sizes == [20]
    best_move(counted, board, 2)
    assert len(sizes) == 1 + 1 + 20
    assert (board.fen(), len(board.move_stack)) == (before, 1)


def test_alpha_beta_asks_for_less_than_everything():
    asked = []
    board = chess.Board(FENS[1])
    search(lambda planes: asked.append(len(planes)) or value(planes), board, 3)
    leaves = sum(1 for _ in three_moves(board))
    assert 0 < sum(asked) < leaves / 2


def three_moves(board, depth=3):
    for move in board.legal_moves:
        board.push(move)
        yield from three_moves(board, depth - 1) if depth > 1 else [move]
        board.pop()


def test_a_models_value_is_the_share_of_its_first_logit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(512, 2))
    planes = np.stack([encode(board) for board in games(1, 20)])
    found = model_value(model)(planes)
    assert model.training  # as it was, though dropout was off
    expected = model.eval()(torch.from_numpy(planes).float()).softmax(1)[:, 0]
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"two logits a position, \(20, 2\), not \(20, 512\)"):
        model_value(nn.Flatten())(planes)


def test_material_counts_pieces():
    board = chess.Board("4k3/8/8/3q4/4P3/8/8/4K3 w - - 0 1")
    assert material_value(encode(board)[None])[0] == win_probability(100 - 900)


def test_a_puzzle_needs_all_moves_or_a_mate():
    board = chess.Board("6k1/5ppp/8/8/8/8/5PPP/3RR1K1 w - - 0 1")
    mates = [chess.Move.from_uci(name) for name in ("d1d8", "e1e8")]
    other = chess.Move.from_uci("d1d2")
    puzzle = Puzzle(board, (mates[0],))
    assert solves(lambda board: mates[0], puzzle)
    assert solves(lambda board: mates[1], puzzle)  # another mate
    assert not solves(lambda board: other, puzzle)
    line = [chess.Move.from_uci(name) for name in ("a1a2", "g8g7", "a2a3")]
    longer = Puzzle(chess.Board("6k1/8/8/8/8/8/8/R5K1 w - - 0 1"), tuple(line))
    answers = {0: line[0], 1: line[2]}
    assert solves(lambda board: answers[len(board.move_stack) // 2], longer)
    answers[1] = chess.Move.from_uci("a2a4")
    assert not solves(lambda board: answers[len(board.move_stack) // 2], longer)
    assert not longer.board.move_stack  # nothing is played on the puzzle's own board


def test_shares_of_puzzles():
    easy = Puzzle(chess.Board(MATE_IN_ONE), (chess.Move.from_uci("d1d8"),))
    hard = Puzzle(chess.Board(MATE_IN_ONE), (chess.Move.from_uci("g1f1"),))
    quiet = Puzzle(chess.Board(), (chess.Move.from_uci("a2a3"),))
    assert solved_share(flat, [easy, hard]) == 1.0  # a mate solves any puzzle
    # For black white's pawn on a3 is on a6, and -1: the worse for black, the more white likes it.
    assert solved_share(lambda planes: 0.5 + 0.1 * planes[:, 0, 5, 0], [easy, quiet]) == 1.0
    assert solved_share(lambda planes: 0.5 + 0.1 * planes[:, 0, 5, 1], [easy, quiet]) == 0.5
    assert chance_share([quiet]) == 1 / 20
    two = Puzzle(chess.Board(), tuple(chess.Move.from_uci(name) for name in ("a2a3", "a7a6", "b2b3")))
    assert chance_share([quiet, two]) == pytest.approx((1 / 20 + 1 / 20 / 19) / 2)
