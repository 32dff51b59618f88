"""Files of ChessBench: written here as their format says, read back, cut short, corrupted."""

import csv
import pickle
import struct

import numpy as np
import pytest

from archzoo.tasks.chess_bench import (
    ACTION_VALUE,
    CLONING,
    STATE_VALUE,
    Bag,
    BagPositions,
    cloning_puzzles,
    decode_record,
    read_puzzles,
    value_bags,
)
from archzoo.tasks.chess_board import encode
from archzoo.tasks.task import DatasetError

chess = pytest.importorskip("chess", reason="python-chess is not installed: pip install 'archzoo[chess]'")

START = chess.STARTING_FEN
AFTER = "rnbqkbnr/pppp1ppp/8/4p3/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 2"


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def text(value):
    return varint(len(value.encode())) + value.encode()


def state(fen, win):
    return text(fen) + struct.pack(">d", win)


def action(fen, move, win):
    return text(fen) + text(move) + struct.pack(">d", win)


def cloning(fen, move):
    return text(fen) + move.encode()


def write_bag(path, records):
    """As bagz.py of searchless_chess: records, then where each ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([len(record) for record in records]).tolist()
    path.write_bytes(b"".join(records) + b"".join(struct.pack("<q", end) for end in ends))
    return path


def positions(count):
    """FENs, all different, of both colours to move."""
    board, found = chess.Board(), []
    rng = np.random.RandomState(count)
    while len(found) < count:
        moves = list(board.legal_moves)
        if not moves or len(found) % 40 == 39:
            board = chess.Board()
            moves = list(board.legal_moves)
        board.push(moves[rng.randint(len(moves))])
        if any(board.legal_moves):
            found.append(board.fen())
    return found


def test_a_bag_gives_back_its_records(tmp_path):
    records = [b"a", b"", b"longer" * 50, bytes(range(256))]
    bag = Bag(write_bag(tmp_path / "x.bag", records))
    assert list(bag) == records
    assert bag[-1] == records[-1]
    with pytest.raises(IndexError):
        bag[4]
    assert list(pickle.loads(pickle.dumps(bag))) == records  # as loader processes get it


def test_records_of_all_kinds():
    assert decode_record(STATE_VALUE, state(START, 0.25)) == (START, "", 0.25)
    assert decode_record(ACTION_VALUE, action(AFTER, "g1f3", 1.0)) == (AFTER, "g1f3", 1.0)
    assert decode_record(CLONING, cloning(AFTER, "e1e2"))[:2] == (AFTER, "e1e2")
    long = "x" * 300  # whose length takes two bytes
    assert decode_record(STATE_VALUE, state(long, 0.0))[0] == long


def test_the_bytes_are_those_of_the_published_format():
    record = b"\x38" + START.encode() + bytes.fromhex("3fe0000000000000")
    assert decode_record(STATE_VALUE, record) == (START, "", 0.5)


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        (STATE_VALUE, b"", "too few"),
        (STATE_VALUE, state(START, 0.5)[1:], "cut short"),
        (STATE_VALUE, state(START, 0.5)[:-1], "win probability|cut short"),
        (STATE_VALUE, state(START, 1.5), "win probability 1.5"),
        (STATE_VALUE, state(START, float("nan")), "win probability nan"),
        (STATE_VALUE, action(START, "e2e4", 0.5), "5 bytes are too many"),
        (ACTION_VALUE, state(START, 0.5), "cut short"),
        (CLONING, b"\xff\xff\xff\xff\xff\xff", "cut short"),
        (STATE_VALUE, text("\x00")[:1] + b"\xff" + struct.pack(">d", 0.5), "utf-8"),
    ],
    ids=["empty", "no_length", "short", "above_one", "nan", "action", "state", "length", "utf8"],
)
def test_a_corrupted_record_is_refused(kind, record, message):
    with pytest.raises(ValueError, match=message):
        decode_record(kind, record)


@pytest.mark.parametrize("cut", [1, 8, 9, 16, 100])
def test_a_bag_cut_short_is_refused(tmp_path, cut):
    whole = write_bag(tmp_path / "x.bag", [state(fen, 0.5) for fen in positions(3)])
    data = whole.read_bytes()
    whole.write_bytes(data[:-cut])
    with pytest.raises(DatasetError, match=r"x\.bag is cut short"):
        Bag(whole)


@pytest.mark.parametrize("data", [b"", b"abc", b"no bag file at all, whatever its name"], ids=["empty", "tiny", "text"])
def test_what_is_no_bag_is_refused(tmp_path, data):
    path = tmp_path / "x.bag"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"x\.bag"):
        Bag(path)


def test_a_corrupted_place_of_a_record_is_found_as_it_is_read(tmp_path):
    path = write_bag(tmp_path / "x.bag", [b"one", b"two", b"three", b"four"])
    data = bytearray(path.read_bytes())
    data[-23] = 200  # of the second record's end
    path.write_bytes(data)
    bag = Bag(path)
    assert bag[0] == b"one"
    for broken in (1, 2):
        with pytest.raises(DatasetError, match=f"record {broken} has no place"):
            bag[broken]


def test_states_become_planes_and_soft_values(tmp_path):
    fens = positions(30)
    wins = np.random.RandomState(0).random_sample(30)
    path = write_bag(tmp_path / "state_value_data.bag", [state(f, w) for f, w in zip(fens, wins, strict=True)])
    kind, bags = value_bags(path, "train")
    split = BagPositions(kind, bags, 10, 25)
    assert len(split) == 15
    inputs, targets = split.__getitems__([14, 0, 3])
    for row, number in enumerate((24, 10, 13)):
        np.testing.assert_array_equal(inputs[row], encode(chess.Board(fens[number])))
        np.testing.assert_allclose(targets[row], [wins[number], 1 - wins[number]], rtol=1e-6)
    np.testing.assert_array_equal(split[3][0], inputs[2])
    with pytest.raises(IndexError):
        split[15]


def test_an_action_is_worth_to_the_opponent_what_it_leaves(tmp_path):
    files = [tmp_path / "train" / f"action_value-{n:05}-of-00002_data.bag" for n in range(2)]
    write_bag(files[0], [action(START, "e2e4", 0.6), action(START, "a2a3", 0.4)])
    write_bag(files[1], [action(AFTER, "g1f3", 0.75)])
    kind, bags = value_bags(tmp_path, "train")
    split = BagPositions(kind, bags, 0, 3)
    inputs, targets = split.__getitems__([2, 1])
    board = chess.Board(AFTER)
    board.push_san("Nf3")
    np.testing.assert_array_equal(inputs[0], encode(board))
    np.testing.assert_allclose(targets, [[0.25, 0.75], [0.6, 0.4]], rtol=1e-6)
    files[1].unlink()
    with pytest.raises(DatasetError, match="has 1 of the 2 files action_value"):
        value_bags(tmp_path, "train")


@pytest.mark.parametrize(
    "record", [state("no position", 0.5), b"x", state("8/8/8/8/8/8/8/K7 w - - 0 1", 0.5)], ids=["fen", "bytes", "kings"]
)
def test_a_corrupted_record_is_named(tmp_path, record):
    path = write_bag(tmp_path / "state_value_data.bag", [state(START, 0.5), record])
    split = BagPositions(STATE_VALUE, [Bag(path)], 0, 2)
    split[0]
    with pytest.raises(DatasetError, match=r"state_value_data\.bag: record 1 is corrupted"):
        split[1]


def test_an_illegal_move_is_named(tmp_path):
    path = write_bag(tmp_path / "behavioral_cloning_data.bag", [cloning(START, "e2e5")])
    with pytest.raises(DatasetError, match="record 0 is corrupted: illegal uci: 'e2e5'"):
        cloning_puzzles(path, 5)


def test_cloned_moves_are_puzzles(tmp_path):
    path = write_bag(tmp_path / "b.bag", [cloning(START, "e2e4"), cloning(AFTER, "f1c4"), cloning(START, "d2d4")])
    puzzles = cloning_puzzles(path, 2)
    assert [(p.board.fen(), [m.uci() for m in p.moves]) for p in puzzles] == [(START, ["e2e4"]), (AFTER, ["f1c4"])]


@pytest.mark.parametrize("name", ["games.bag", "behavioral_cloning_data.bag", "state_value_data.bagz"])
def test_a_file_whose_name_does_not_say_what_it_holds_is_refused(tmp_path, name):
    path = write_bag(tmp_path / name, [state(START, 0.5)])
    with pytest.raises(DatasetError, match=r"its name should be as state_value_data\.bag"):
        value_bags(path, "train")


def test_an_absent_folder_says_how_to_get_the_files(tmp_path):
    with pytest.raises(DatasetError, match="searchless_chess"):
        value_bags(tmp_path / "nowhere", "train")


def write_puzzles(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_puzzles_after_a_game_or_a_position(tmp_path):
    rows = [
        {"PuzzleId": "a", "Rating": "1500", "PGN": "1. f3 e5", "Moves": "g2g4 d8h4"},
        {"PuzzleId": "b", "Rating": "900", "PGN": "1. e4 e5 2. Bc4 Nc6 3. Qh5", "Moves": "g8f6 h5f7"},
    ]
    first, second = read_puzzles(write_puzzles(tmp_path / "puzzles.csv", rows), 10)
    assert ([move.uci() for move in first.moves], first.rating, first.board.turn) == (["d8h4"], 1500, chess.BLACK)
    assert second.board.piece_at(chess.F6) == chess.Piece.from_symbol("n")
    assert len(read_puzzles(tmp_path / "puzzles.csv", 1)) == 1
    lichess = [{"FEN": START, "Moves": "e2e4 e7e5 g1f3 b8c6"}]
    (puzzle,) = read_puzzles(write_puzzles(tmp_path / "l.csv", lichess), 10)
    assert ([move.uci() for move in puzzle.moves], puzzle.rating) == (["e7e5", "g1f3", "b8c6"], None)
    assert puzzle.board.fullmove_number == 1


@pytest.mark.parametrize(
    "row",
    [
        {"PGN": "1. e4 e5", "Moves": "e4e5 g1f3"},
        {"PGN": "1. e4 e5", "Moves": "g1f3"},
        {"PGN": "1. e4 Ke5", "Moves": "g1f3 g8f6"},
        {"FEN": "nonsense", "Moves": "g1f3 g8f6"},
        {"FEN": START, "Solution": "g1f3 g8f6"},
        {"Rating": "hard", "FEN": START, "Moves": "g1f3 g8f6"},
    ],
    ids=["illegal", "one_move", "pgn", "fen", "no_moves", "rating"],
)
def test_a_wrong_puzzle_is_named(tmp_path, row):
    with pytest.raises(DatasetError, match=r"puzzles\.csv: puzzle 0 is not as it should be"):
        read_puzzles(write_puzzles(tmp_path / "puzzles.csv", [row]), 10)


def test_no_puzzles_at_all(tmp_path):
    (tmp_path / "puzzles.csv").write_text("PGN,Moves\n")
    with pytest.raises(DatasetError, match="has no puzzles"):
        read_puzzles(tmp_path / "puzzles.csv", 10)
    with pytest.raises(DatasetError, match="cannot read"):
        read_puzzles(tmp_path / "absent.csv", 10)
