"""Positions as planes: the mover's view, castling, en passant, packing, and win probabilities."""

import math
import sys

import numpy as np
import pytest

from archzoo.tasks.chess_board import (
    MATE,
    PLANES,
    decode,
    encode,
    encode_many,
    pack,
    parse_board,
    require_chess,
    unpack,
    value_targets,
    win_probability,
)

chess = pytest.importorskip("chess", reason="python-chess is not installed: pip install 'archzoo[chess]'")


def games(count=6, plies=60, seed=0):
    """Positions of games played at random."""
    rng = np.random.RandomState(seed)
    boards = []
    for _ in range(count):
        board = chess.Board()
        for _ in range(plies):
            moves = list(board.legal_moves)
            if not moves:
                break
            board.push(moves[rng.randint(len(moves))])
            boards.append(board.copy(stack=False))
    return boards


def test_every_piece_is_on_its_plane_and_square():
    for board in games(2):
        planes = encode(board)
        assert (planes.shape, planes.dtype) == ((PLANES, 8, 8), np.int8)
        for square in chess.SQUARES:
            seen = square if board.turn else chess.square_mirror(square)
            column = planes[:6, chess.square_rank(seen), chess.square_file(seen)]
            piece = board.piece_at(square)
            expected = np.zeros(6)
            if piece:
                expected[piece.piece_type - 1] = 1 if piece.color == board.turn else -1
            np.testing.assert_array_equal(column, expected)


def test_a_position_and_its_twin_of_swapped_colours_are_the_same():
    boards = games()
    assert len({board.turn for board in boards}) == 2
    np.testing.assert_array_equal(encode_many(boards), encode_many(board.mirror() for board in boards))


@pytest.mark.parametrize(
    ("fen", "own", "their"),
    [
        ("r3k2r/8/8/8/8/8/8/R3K2R w KQkq - 0 1", ["a1", "h1"], ["a8", "h8"]),
        ("r3k2r/8/8/8/8/8/8/R3K2R w Kq - 0 1", ["h1"], ["a8"]),
        ("r3k2r/8/8/8/8/8/8/R3K2R b Kq - 0 1", ["a1"], ["h8"]),  # files stay, ranks are mirrored
        ("4k2r/8/8/8/8/8/8/R3K3 w KQkq - 0 1", ["a1"], ["h8"]),  # rights without a rook are none
        ("r3k2r/8/8/8/8/8/8/R3K2R w - - 0 1", [], []),
    ],
    ids=["all", "some", "black", "no_rook", "none"],
)
def test_castling_is_on_the_rooks(fen, own, their):
    plane = encode(chess.Board(fen))[6]
    for sign, squares in ((1, own), (-1, their)):
        found = [chess.square_name(8 * rank + file) for rank, file in np.argwhere(plane == sign).tolist()]
        assert found == squares


@pytest.mark.parametrize(
    ("fen", "target"),
    [
        ("4k3/8/8/3pP3/8/8/8/4K3 w - d6 0 2", "d6"),
        ("4k3/8/8/8/3pP3/8/8/4K3 b - e3 0 1", "e6"),  # e3 in the mirror
        ("4k3/8/8/3p4/8/8/8/4K3 w - d6 0 2", None),  # nobody can take
        ("4r1k1/8/8/3pP3/8/8/8/4K3 w - d6 0 2", None),  # who could is pinned
    ],
    ids=["white", "black", "nobody", "pinned"],
)
def test_en_passant_is_seen_only_where_it_is_legal(fen, target):
    found = np.argwhere(encode(chess.Board(fen))[7] == 1).tolist()
    assert [chess.square_name(8 * rank + file) for rank, file in found] == ([target] if target else [])


def test_packing_and_decoding_lose_nothing():
    boards = games()
    planes = encode_many(boards)
    assert planes[:, 7].any()
    assert (planes[:, 6] < 0).any()
    packed = pack(planes)
    assert (packed.shape, packed.dtype) == ((len(boards), 32), np.uint8)
    np.testing.assert_array_equal(unpack(packed), planes)
    for board, plane in zip(boards, planes, strict=True):
        twin = decode(plane)
        assert twin.is_valid()
        moves = board.legal_moves if board.turn else board.mirror().legal_moves
        assert {move.uci() for move in twin.legal_moves} == {move.uci() for move in moves}


def test_no_positions():
    assert encode_many([]).shape == (0, PLANES, 8, 8)
    assert unpack(pack(encode_many([]))).shape == (0, PLANES, 8, 8)


def test_win_probability_is_that_of_chessbench():
    for centipawns in (-800, -1, 0, 35, 1200):
        percent = 50 + 50 * (2 / (1 + math.exp(-0.00368208 * centipawns)) - 1)
        assert win_probability(centipawns) == pytest.approx(percent / 100, rel=1e-12)
    np.testing.assert_array_equal(win_probability([MATE - 5, 5 - MATE]), [1, 0])
    assert 0 < win_probability(-5000) < win_probability(5000) < 1


def test_targets_are_win_and_the_rest():
    targets = value_targets([0.25, 1.0])
    np.testing.assert_array_equal(targets, np.array([[0.25, 0.75], [1, 0]], dtype=np.float32))
    assert targets.dtype == np.float32


@pytest.mark.parametrize("fen", ["", "nonsense", "8/8/8/8/8/8/8/K7 w - - 0 1", "kk6/8/8/8/8/8/8/K7 w - - 0 1"])
def test_what_is_no_position_is_refused(fen):
    with pytest.raises(ValueError, match=r"fen|expected"):  # python-chess words most of them
        parse_board(fen)


def test_without_python_chess_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "chess", None)
    with pytest.raises(ImportError, match=r"pip install 'archzoo\[chess\]'"):
        require_chess()
