"""The project's own engine: its evaluation, and that cutting off changes nothing."""

import pytest

from archzoo.tasks.chess_search import MATE, best_lines, evaluate
from tests.tasks.test_chess_board import games

chess = pytest.importorskip("chess", reason="python-chess is not installed: pip install 'archzoo[chess]'")


def some(count, seed=1):
    boards = [board for board in games(6, 70, seed) if any(board.legal_moves)]
    return boards[:: len(boards) // count][:count]


def quiesced(board):
    """Centipawns after captures and promotions to a queen, by trying all."""
    if board.is_check():
        if not any(board.legal_moves):
            return -MATE + board.ply()
        return max(after(board, move, quiesced) for move in board.legal_moves)
    loud = [move for move in board.legal_moves if board.is_capture(move) or move.promotion == chess.QUEEN]
    return max([evaluate(board)] + [after(board, move, quiesced) for move in loud])


def after(board, move, value):
    board.push(move)
    try:
        return -value(board)
    finally:
        board.pop()


def plain(board, depth):
    """Minimax without any cutting off."""
    if board.is_insufficient_material():
        return 0
    if depth == 0:
        return quiesced(board)
    if not any(board.legal_moves):
        return -MATE + board.ply() if board.is_check() else 0
    return max(after(board, move, lambda child: plain(child, depth - 1)) for move in board.legal_moves)


FENS = [
    "4k3/8/8/3p4/4P3/8/8/4K3 w - - 0 1",
    "8/5k2/8/2r5/8/1P4R1/8/4K3 w - - 0 1",
    "8/P3k3/8/8/8/8/5r2/6K1 w - - 0 1",
    "r3k3/1pn5/8/3N4/8/8/5PPP/4R1K1 w q - 0 1",
    "6k1/5ppp/8/8/8/8/5PPP/3R2K1 w - - 0 1",
]


@pytest.mark.parametrize("fen", FENS)
@pytest.mark.parametrize("depth", [1, 2])
def test_all_values_are_those_of_plain_minimax(fen, depth):
    board = chess.Board(fen)
    lines = {line.move: line.value for line in best_lines(board, depth, 1000)}
    assert lines == {move: after(board, move, lambda child: plain(child, depth - 1)) for move in board.legal_moves}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_best_lines_are_the_best_of_all(depth):
    for board in some(6 if depth < 3 else 2):
        every = [line.value for line in best_lines(board, depth, 1000)]
        assert every == sorted(every, reverse=True)
        assert len(every) == board.legal_moves.count()
        for count in (1, 2):
            assert [line.value for line in best_lines(board, depth, count)] == every[:count]


def test_evaluation_is_the_same_for_both_sides():
    boards = some(40) + [chess.Board(fen) for fen in FENS]
    for board in boards:
        assert evaluate(board) == evaluate(board.mirror())
        twin = board.copy(stack=False)
        twin.turn = not board.turn
        assert evaluate(twin) == -evaluate(board)
    assert evaluate(chess.Board()) == 0
    assert evaluate(chess.Board("4k3/8/8/8/8/8/8/Q3K3 w - - 0 1")) == 900 - 20  # a queen in the corner, kings alike


def test_the_board_is_left_as_it_was():
    board = chess.Board()
    board.push_san("e4")
    before, stack = board.fen(), list(board.move_stack)
    best_lines(board, 2, 2)
    assert (board.fen(), board.move_stack) == (before, stack)


@pytest.mark.parametrize(
    ("fen", "depth", "move", "value"),
    [
        ("6k1/5ppp/8/8/8/8/5PPP/3R2K1 w - - 0 1", 1, "d1d8", MATE - 1),
        ("3r2k1/5ppp/8/8/8/8/5PPP/6K1 b - - 0 1", 1, "d8d1", MATE - 1),
        ("7k/8/8/8/8/8/1R6/R5K1 w - - 0 1", 3, None, MATE - 3),  # two rooks, two moves
        ("7k/5Q2/8/8/8/8/8/6K1 b - - 0 1", 1, None, None),  # stalemate: no line
    ],
    ids=["white", "black", "two_moves", "stalemate"],
)
def test_mates(fen, depth, move, value):
    lines = best_lines(chess.Board(fen), depth)
    assert [line.value for line in lines] == ([] if value is None else [value])
    if move:
        assert lines[0].move.uci() == move


@pytest.mark.parametrize(
    "fen",
    ["8/8/8/8/8/5k2/5n2/6K1 w - - 0 1", "4k3/8/8/8/8/8/8/Q3K3 w - - 99 80"],
    ids=["too_few_pieces", "fifty_moves"],
)
def test_draws_are_worth_nothing(fen):
    lines = best_lines(chess.Board(fen), 1, 1000)
    assert {line.value for line in lines} == {0}


def test_a_hanging_queen_is_taken_and_a_guarded_one_of_a_pawn_too():
    assert best_lines(chess.Board("4k3/8/8/3q4/4P3/8/8/4K3 w - - 0 1"), 1)[0].move.uci() == "e4d5"
    # The pawn on d5 is guarded: the queen leaves it.
    assert best_lines(chess.Board("4k3/8/4p3/3p4/8/8/8/3QK3 w - - 0 1"), 1)[0].move.uci() != "d1d5"


@pytest.mark.parametrize(("name", "value"), [("depth", 0), ("depth", 9), ("count", 0)])
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        best_lines(chess.Board(), **{name: value})
