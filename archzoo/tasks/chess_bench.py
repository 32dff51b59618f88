"""Files of ChessBench (Ruoss et al. 2024, arXiv 2402.04494; github.com/google-deepmind/searchless_chess).

A `.bag` file is its records, one after the other, then for each the place where it ends, as 8 bytes, little-endian. A
record is what Apache Beam's TupleCoder makes of its fields: a text is its UTF-8 bytes behind their number, a varint,
which the last field does without; a number is 8 bytes, big-endian. State values are (FEN, win probability), action
values (FEN, move, win probability), behavioural cloning has (FEN, move). Both probabilities are the mover's.
"""

import bisect
import csv
import io
import itertools
import math
import mmap
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from archzoo.tasks.chess_board import encode_many, parse_board, require_chess, value_targets
from archzoo.tasks.chess_play import Puzzle
from archzoo.tasks.files import open_file
from archzoo.tasks.task import DatasetError

if TYPE_CHECKING:
    import chess

STATE_VALUE, ACTION_VALUE, CLONING = "state_value", "action_value", "behavioral_cloning"
REMEDY = "data/download.sh of github.com/google-deepmind/searchless_chess gets the files"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


class Bag:
    """Records of a `.bag` file, read where they lie: the file may be larger than the memory. Can be pickled.

    Args:
        path: The file.

    Raises:
        DatasetError: If it cannot be read, or is cut short or corrupted; a record's place is checked as it is read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open_file(path) as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # mmap refuses an empty file with a ValueError
            raise DatasetError(f"ChessBench: cannot read {path}: {error}; {REMEDY}") from error
        size = len(self._data)
        self._start = struct.unpack("<Q", self._data[-8:])[0] if size >= 8 else size + 1
        if not self._start < size or (size - self._start) % 8:
            raise DatasetError(
                f"ChessBench: {path} is cut short, or no bag file: its last 8 bytes should say where its records end; "
                f"{REMEDY}"
            )
        self._count = (size - self._start) // 8
        for index in (0, self._count - 1):
            self._range(index)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        start, end = self._range(range(self._count)[index])
        return self._data[start:end]

    def __reduce__(self) -> tuple[type["Bag"], tuple[Path]]:
        return Bag, (self.path,)

    def _range(self, index: int) -> tuple[int, int]:
        place = self._start + 8 * index
        start = self._limit(place - 8) if index else 0
        end = self._limit(place)
        if not start <= end <= self._start:
            raise DatasetError(f"ChessBench: {self.path} is cut short or corrupted: record {index} has no place in it")
        return start, end

    def _limit(self, place: int) -> int:
        return int(struct.unpack("<Q", self._data[place : place + 8])[0])


def decode_record(kind: str, record: bytes) -> tuple[str, str, float]:
    """FEN, move and win probability of a record; the move of a state value is empty, cloning's probability NaN.

    Raises:
        ValueError: If it is no record of that kind.
    """
    if kind == CLONING:
        fen, move = _text(record)
        return fen, move.decode(), math.nan
    if len(record) < 8:
        raise ValueError(f"{len(record)} bytes are too few")
    (win,) = struct.unpack(">d", record[-8:])
    if not 0 <= win <= 1:
        raise ValueError(f"win probability {win} is not from 0 to 1")
    fen, rest = _text(record[:-8])
    name, rest = _text(rest) if kind == ACTION_VALUE else ("", rest)
    if rest:
        raise ValueError(f"{len(rest)} bytes are too many")
    return fen, name, win


def _text(data: bytes) -> tuple[str, bytes]:
    """The text at the beginning, and what is behind it."""
    length = 0
    for place, byte in enumerate(data[:5]):
        length |= (byte & 127) << 7 * place
        if byte < 128:
            end = place + 1 + length
            if end > len(data):
                break
            return data[place + 1 : end].decode(), data[end:]
    raise ValueError("a text is cut short")


class BagPositions(Dataset[tuple[Tensor, Tensor]]):
    """Positions and soft values of `.bag` files of one kind; each is read, parsed and encoded as it is asked for.

    Of an action value, the position is that after the move, and its value the opponent's.

    Args:
        kind: `state_value` or `action_value`.
        bags: The files.
        start: Number of the first record.
        stop: Number behind the last one.
    """

    def __init__(self, kind: str, bags: Sequence[Bag], start: int, stop: int):
        self.kind, self.bags, self.start, self.stop = kind, tuple(bags), start, stop
        self._ends = list(itertools.accumulate(map(len, self.bags)))

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        boards, wins = [], []
        for index in np.asarray(indices, dtype=np.int64).tolist():
            number = range(self.start, self.stop)[index]
            which = bisect.bisect_right(self._ends, number)
            bag = self.bags[which]
            record = number - (self._ends[which] - len(bag))
            board, move, win = _read(self.kind, bag, record)
            if move is not None:
                board.push(move)
                win = 1 - win
            boards.append(board)
            wins.append(win)
        return torch.from_numpy(encode_many(boards)).float(), torch.from_numpy(value_targets(wins))


def _read(kind: str, bag: Bag, record: int) -> "tuple[chess.Board, chess.Move | None, float]":
    """Board, legal move and win probability of a record."""
    try:
        fen, name, win = decode_record(kind, bag[record])
        board = parse_board(fen)
        return board, board.parse_uci(name) if kind != STATE_VALUE else None, win
    except ValueError as error:
        raise DatasetError(f"ChessBench: {bag.path}: record {record} is corrupted: {error}") from error


def value_bags(path: Path, split: str) -> tuple[str, list[Bag]]:
    """Kind and files of the values at a path: a `.bag` file, or a folder in which `train` and `test` are.

    State values are preferred to action values, which are many files, as `action_value-00000-of-02148_data.bag`.

    Raises:
        DatasetError: If there are none, some shards are missing, or a file is not what it should be.
    """
    folder = path / split
    for kind in (STATE_VALUE, ACTION_VALUE):
        if path.is_file():
            files = [path] if path.name.startswith(kind) and path.suffix == ".bag" else []
        else:
            files = sorted(folder.glob(f"{kind}*_data.bag"))
        shards = [_SHARD.search(file.name) for file in files]
        if path.is_dir() and shards and shards[0] and len(files) != int(shards[0][2]):
            raise DatasetError(
                f"ChessBench: {folder} has {len(files)} of the {int(shards[0][2])} files {kind}-*_data.bag"
            )
        if files:
            return kind, [Bag(file) for file in files]
    wanted = f"{STATE_VALUE}_data.bag or {ACTION_VALUE}-*_data.bag"
    if path.is_file():
        raise DatasetError(f"ChessBench: {path}: its name should be as {wanted}, which says what it holds")
    raise DatasetError(f"ChessBench: there is no {folder / wanted}; {REMEDY}")


def read_puzzles(path: Path, count: int) -> list[Puzzle]:
    """The first puzzles of a `puzzles.csv`, in the order of the file.

    Columns: `Moves`, the opponent's first; the game before as `PGN` (ChessBench), or the position as `FEN` (Lichess);
    perhaps `Rating`.

    Raises:
        DatasetError: If it cannot be read, or holds what it should not.
    """
    puzzles: list[Puzzle] = []
    try:
        with open_file(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            for row in itertools.islice(csv.DictReader(text), count):
                try:
                    puzzles.append(_puzzle(row))
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    raise DatasetError(f"{path}: puzzle {len(puzzles)} is not as it should be: {error!r}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"cannot read {path}: {error}; {REMEDY}") from error
    if not puzzles:
        raise DatasetError(f"{path}: has no puzzles")
    return puzzles


def _puzzle(row: dict[str, str]) -> Puzzle:
    if row.get("PGN"):
        require_chess()
        import chess.pgn

        game = chess.pgn.read_game(io.StringIO(row["PGN"]))
        if game is None or game.errors:
            raise ValueError(f"PGN {row['PGN']!r}")
        board = game.end().board()
    else:
        board = parse_board(row["FEN"])
    names = row["Moves"].split()
    if len(names) < 2:
        raise ValueError(f"Moves {row['Moves']!r}: must be the opponent's and at least one more")
    board.push_uci(names[0])
    line = board.copy()
    moves = tuple(line.push_uci(name) for name in names[1:])
    return Puzzle(board, moves, int(row["Rating"]) if row.get("Rating") else None)


def cloning_puzzles(path: Path, count: int) -> list[Puzzle]:
    """The first positions of a `behavioral_cloning_data.bag` as puzzles of one move: the expert's.

    Raises:
        DatasetError: If the file, or a record, is not what it should be.
    """
    bag = Bag(path)
    found = (_read(CLONING, bag, record) for record in range(min(count, len(bag))))
    return [Puzzle(board, (move,)) for board, move, _ in found if move is not None]
