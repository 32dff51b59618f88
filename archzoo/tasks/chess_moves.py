"""Chess: the win probability of a position, and from it the best move (ChessBench, arXiv 2402.04494)."""

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.pictures import Picture
from archzoo.tasks.chess_bench import CLONING, BagPositions, cloning_puzzles, read_puzzles, value_bags
from archzoo.tasks.chess_board import PLANES, decode, require_chess, unpack, value_targets, win_probability
from archzoo.tasks.chess_picture import board_figure
from archzoo.tasks.chess_play import Puzzle, best_move, chance_share, material_value, model_value, solved_share
from archzoo.tasks.chess_search import MAX_DEPTH
from archzoo.tasks.files import read_verified
from archzoo.tasks.options import whole_number
from archzoo.tasks.task import DatasetError, Task, TensorSplit, register_task

if TYPE_CHECKING:
    import chess
    from torchmetrics import MetricCollection

EMBEDDED = Path(__file__).parent / "data" / "chess_positions.npz"
EMBEDDED_SHA256 = "f25239ec423fdad0330a073c98819df8026de460a5ba51528cdb19501573d3fc"
INSTALL = "install archzoo again: pip install --force-reinstall archzoo"
MANY = 10**9
JUDGED = 2000
"""Validation positions that the yardsticks are measured on."""
SHOWN = 8
"""Puzzles of the picture."""


def embedded_positions() -> dict[str, NDArray[Any]]:
    """Arrays of the embedded file: 32 bytes a position, its value in centipawns, best move, margin, game, puzzles.

    Raises:
        DatasetError: If the file is absent or corrupted.
    """
    data = read_verified("chess positions", EMBEDDED, EMBEDDED_SHA256, INSTALL)
    if data is None:
        raise DatasetError(f"chess positions: there is no {EMBEDDED}; {INSTALL}")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def move_of(code: int) -> "chess.Move":
    """The move that a number stands for: from, to and promotion, in 6, 6 and 3 bits."""
    return require_chess().Move(code & 63, code >> 6 & 63, code >> 12 or None)


@register_task("chess_moves")
class ChessMoves(Task):
    """Positions to value, and moves to find: does a model that values positions play well?

    Inputs are planes (8, 8, 8) from -1 to 1, see `archzoo.tasks.chess_board.encode`: pieces, castling, en passant, seen
    from the side to move. A model gives two logits, that the mover wins and that it does not, and learns by cross
    entropy against the win probability. Its move is the one whose position is worst for the opponent.

    The embedded positions, some 15,000, are of semi-random games, labelled by this project's own small search
    (`archzoo.tasks.chess_search`, depth 1 and quiescence; `python -m benchmarks chess_positions` makes them): a toy
    beside ChessBench, whose files, labelled by Stockfish 16, are read where `path` names them. Splits of the embedded
    ones are by game: 70 % train, 10 % validation, 20 % test.

    Needs python-chess, `pip install 'archzoo[chess]'`, which is under the GPL-3.0.

    An embedded puzzle is a test position whose best move is 150 centipawns ahead of the second, at depth 3 too.

    Args:
        path: A folder with ChessBench's `train`, `test` and `puzzles.csv`, or one `state_value*.bag` or
            `action_value*.bag` of it. None: the embedded positions. Puzzles are `puzzles.csv`, else
            `test/behavioral_cloning_data.bag`, else the embedded ones.
        train_size: Positions to train on: the first ones. None: all; of ChessBench's 530 million the order of an epoch
            alone takes 4 GB.
        eval_size: Positions of the validation split, and of the test split, at most. Of ChessBench's files validation
            takes the last ones of `train`; where there is one file only, test takes as many before these.
        puzzles: Puzzles that the model plays at the end, at most: the first ones.
        search_depth: Half-moves of the deeper search that it plays some again with. 1: none.
        search_puzzles: Puzzles that it plays so, at most.
        data_dir: Not needed.
        seed: Not needed: the splits are the same in every run.

    Raises:
        DatasetError: If a file is absent, cut short or corrupted, or python-chess is not installed.
        ValueError: If an option is out of range.
    """

    input_shape = (PLANES, 8, 8)
    output_size = 2
    score = "value_error"
    mode: Literal["max", "min"] = "min"
    train: TensorSplit | BagPositions
    val: TensorSplit | BagPositions
    test: TensorSplit | BagPositions

    def __init__(
        self,
        *,
        path: str | None = None,
        train_size: int | None = None,
        eval_size: int = 10000,
        puzzles: int = 500,
        search_depth: int = 2,
        search_puzzles: int = 50,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        try:
            require_chess()
        except ImportError as error:  # the trainer prints a DatasetError as a line
            raise DatasetError(f"task=chess_moves: {error}") from error
        if path is not None and not (isinstance(path, str) and path):
            raise ValueError(f"path={path!r}: must be the name of a file or folder, or null")
        if train_size is not None:
            whole_number("train_size", train_size, 1, MANY)
        whole_number("eval_size", eval_size, 1, MANY)
        whole_number("puzzles", puzzles, 1, MANY)
        self.search_depth = whole_number("search_depth", search_depth, 1, MAX_DEPTH)
        self.search_puzzles = whole_number("search_puzzles", search_puzzles, 1, MANY)
        source = None if path is None else Path(path).expanduser()
        make = _embedded_splits if source is None else partial(_bench_splits, source)
        self.train, self.val, self.test = make(train_size, eval_size)
        self.puzzles_of, self.puzzles = _puzzles(source, puzzles)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy in nats of logits (batch, 2) against soft targets (batch, 2)."""
        return F.cross_entropy(output, target.to(output.dtype))

    def metrics(self) -> "MetricCollection":
        """`value_error`: root mean square error of the win probability, which is from 0 to 1; and the mean loss."""
        from torchmetrics import MeanSquaredError, MetricCollection

        from archzoo.tasks.metrics import mean_loss

        class ErrorOfValue(MeanSquaredError):
            def update(self, preds: Tensor, target: Tensor) -> None:
                super().update(preds.softmax(1)[:, 0], target[:, 0])

        return MetricCollection({"value_error": ErrorOfValue(squared=False), "loss": mean_loss(self.loss)})

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, Any]:
        """Shares of puzzles solved: `move_accuracy` with one half-move of look ahead, `search_accuracy` with more.

        Beside them what moves at random solve (`_chance`), and the same player that counts pieces (`_material`). Also
        the error of that player's values, and of a half everywhere, on the first validation positions.
        """
        value = model_value(model)
        inputs, targets = self.val.__getitems__(list(range(min(len(self.val), JUDGED))))
        wins, counted = targets[:, 0].double().numpy(), material_value(inputs.numpy().astype(np.int8))
        found: dict[str, Any] = {
            "value_error_half": float(np.sqrt(np.mean((0.5 - wins) ** 2))),
            "value_error_material": float(np.sqrt(np.mean((counted - wins) ** 2))),
            "puzzles": len(self.puzzles),
            "puzzles_of": self.puzzles_of,
            "move_accuracy": solved_share(value, self.puzzles),
            "move_accuracy_chance": chance_share(self.puzzles),
            "move_accuracy_material": solved_share(material_value, self.puzzles),
        }
        if ratings := [puzzle.rating for puzzle in self.puzzles if puzzle.rating is not None]:
            found["puzzle_rating"] = sum(ratings) / len(ratings)
        if self.search_depth > 1:
            some = self.puzzles[: self.search_puzzles]
            found |= {
                "search_puzzles": len(some),
                "search_depth": self.search_depth,
                "search_accuracy": solved_share(value, some, self.search_depth),
                "search_accuracy_material": solved_share(material_value, some, self.search_depth),
            }
        return found

    def pictures(self, model: nn.Module) -> dict[str, Picture]:
        """The first puzzles, and what the model plays."""
        value = model_value(model)
        figure = board_figure(self.puzzles[:SHOWN], lambda board: best_move(value, board))
        return {"puzzles": Picture(figure, "Puzzles: the right move in green, the model's in red where it is another.")}


def _embedded_splits(train_size: int | None, eval_size: int) -> tuple[TensorSplit, ...]:
    """By game: seven of ten are for training, the eighth for validation, the others for test."""
    data = embedded_positions()
    part = np.searchsorted([7, 8], data["game"] % 10, side="right")
    splits = []
    for number, size in enumerate((train_size, eval_size, eval_size)):
        rows = np.flatnonzero(part == number)[:size]
        wins = win_probability(data["centipawns"][rows])
        planes = torch.from_numpy(unpack(data["packed"][rows])).float()
        splits.append(TensorSplit(planes, torch.from_numpy(value_targets(wins))))
    return tuple(splits)


def _bench_splits(path: Path, train_size: int | None, eval_size: int) -> tuple[BagPositions, ...]:
    """Validation is the end of the training file; of a single file, test is what is before that."""
    kind, bags = value_bags(path, "train")
    count = sum(map(len, bags))
    if path.is_file():
        test = BagPositions(kind, bags, max(count - 2 * eval_size, 0), count - eval_size)
        rest = test.start
    else:
        test_kind, test_bags = value_bags(path, "test")
        test = BagPositions(test_kind, test_bags, 0, min(eval_size, sum(map(len, test_bags))))
        rest = count - eval_size
    if rest < 1:
        raise ValueError(f"eval_size={eval_size}: leaves nothing of {count} positions to train on; take fewer")
    train = BagPositions(kind, bags, 0, rest if train_size is None else min(train_size, rest))
    return train, BagPositions(kind, bags, count - eval_size, count), test


def _puzzles(path: Path | None, count: int) -> tuple[str, list[Puzzle]]:
    """Puzzles, and where they are from."""
    if path is not None and path.is_dir():
        if (file := path / "puzzles.csv").is_file():
            return file.name, read_puzzles(file, count)
        if (file := path / "test" / f"{CLONING}_data.bag").is_file():
            return file.name, cloning_puzzles(file, count)
    data = embedded_positions()
    rows = data["puzzle"][:count]
    boards = map(decode, unpack(data["packed"][rows]))
    moves = map(move_of, data["move"][rows].tolist())
    return "embedded", [Puzzle(board, (move,)) for board, move in zip(boards, moves, strict=True)]
