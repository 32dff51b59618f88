"""The task: its embedded positions, ChessBench's files, metrics, and what it says of a model's play."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from archzoo.tasks import chess_moves
from archzoo.tasks.chess_board import decode, pack, unpack, win_probability
from archzoo.tasks.chess_moves import ChessMoves, embedded_positions, move_of
from archzoo.tasks.chess_play import best_move, material_value
from archzoo.tasks.chess_search import best_lines
from archzoo.tasks.task import DatasetError
from tests.tasks.test_chess_bench import action, cloning, positions, state, write_bag, write_puzzles

chess = pytest.importorskip("chess", reason="python-chess is not installed: pip install 'archzoo[chess]'")

FEW = {"eval_size": 200, "puzzles": 12, "search_puzzles": 2}


@pytest.fixture(scope="module")
def embedded():
    return embedded_positions()


def settings(data):
    return json.loads(str(data["settings"]))


def test_the_embedded_positions_are_many_distinct_and_small(embedded):
    count = len(embedded["packed"])
    assert count >= 10_000
    assert len(np.unique(embedded["packed"], axis=0)) == count
    assert chess_moves.EMBEDDED.stat().st_size < 10**6
    assert all(len(embedded[name]) == count for name in ("centipawns", "move", "margin", "game"))


def test_the_embedded_labels_are_those_of_the_search(embedded):
    assert "--depth 1 " in settings(embedded)["command"]
    rows = np.linspace(0, len(embedded["packed"]) - 1, 40).astype(int)
    for row, planes in zip(rows, unpack(embedded["packed"][rows]), strict=True):
        best, *rest = best_lines(decode(planes), 1, 2)
        assert (best.value, best.move) == (embedded["centipawns"][row], move_of(int(embedded["move"][row])))
        assert embedded["margin"][row] == (best.value - rest[0].value if rest else 0)


def test_embedded_puzzles_are_of_test_games_and_one_move_is_clearly_best(embedded):
    rows = embedded["puzzle"]
    assert len(rows) >= 100
    assert set(embedded["game"][rows] % 10) == {8, 9}
    assert embedded["margin"][rows].min() >= 150
    best, second = best_lines(decode(unpack(embedded["packed"][rows[:1]])[0]), 3, 2)
    assert best.move == move_of(int(embedded["move"][rows[0]]))
    assert best.value - second.value >= 150


def test_the_same_command_makes_the_same_positions(embedded):
    from benchmarks.chess_positions import make

    made = make(1, 1, 3, 0, processes=1)
    for name in ("packed", "centipawns", "move", "margin", "game"):
        np.testing.assert_array_equal(made[name], embedded[name][: len(made[name])], err_msg=name)
    assert len(made["packed"]) > 20


def test_no_position_is_in_two_splits_and_the_values_are_soft():
    task = ChessMoves(**FEW | {"eval_size": 10**6})
    keys = [
        {row.tobytes() for row in pack(s.inputs.numpy().astype(np.int8))} for s in (task.train, task.val, task.test)
    ]
    assert [len(k) for k in keys] == [len(task.train), len(task.val), len(task.test)]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    assert len(task.train) > 5 * len(task.val) > len(task.test)
    targets = task.train.targets
    torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
    assert 0.15 < targets[:, 0].std() < 0.35
    assert 0.4 < targets[:, 0].mean() < 0.6


def test_sizes_are_the_first_positions():
    whole, some = ChessMoves(**FEW), ChessMoves(**FEW | {"train_size": 64})
    assert (len(some.train), len(some.val), len(some.test), len(some.puzzles)) == (64, 200, 200, 12)
    assert torch.equal(some.train.inputs, whole.train.inputs[:64])
    assert torch.equal(some.val.targets, whole.val.targets)


class Material(nn.Module):
    """Logits of the win probability that counting pieces gives."""

    def forward(self, x):
        pieces = x[:, :5].sum((2, 3)) @ torch.tensor([100.0, 320.0, 330.0, 500.0, 900.0]).to(x)
        return torch.stack([pieces * 0.00368208, torch.zeros_like(pieces)], 1)


def test_metrics_are_the_error_of_the_win_probability_and_the_loss():
    task = ChessMoves(**FEW)
    metrics = task.metrics()
    output, target = torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    metrics.update(output, target)
    found = metrics.compute()
    win = output.softmax(1)[:, 0]
    assert found["value_error"] == pytest.approx((win - target[:, 0]).square().mean().sqrt().item(), rel=1e-5)
    logs = torch.stack([win.log(), (1 - win).log()], 1)
    assert found["loss"] == pytest.approx(-(target * logs).sum(1).mean().item(), rel=1e-5)
    assert task.score in found


def test_the_summary_tells_how_a_model_plays_beside_chance_and_material():
    task = ChessMoves(**FEW)
    found = task.summarize([], Material())
    assert found["move_accuracy"] == found["move_accuracy_material"]
    assert found["search_accuracy"] == found["search_accuracy_material"]
    assert 0 < found["move_accuracy_chance"] < 0.2 < found["move_accuracy"]
    assert (found["puzzles"], found["search_puzzles"], found["search_depth"]) == (12, 2, 2)
    assert found["puzzles_of"] == "embedded"
    wins, counted = task.val.targets[:, 0], Material()(task.val.inputs).softmax(1)[:, 0]
    assert found["value_error_material"] == pytest.approx((counted - wins).square().mean().sqrt().item(), rel=1e-4)
    assert found["value_error_half"] == pytest.approx((0.5 - wins).square().mean().sqrt().item(), rel=1e-4)
    assert "search_accuracy" not in ChessMoves(**FEW | {"search_depth": 1, "puzzles": 2}).summarize([], Material())


def test_a_picture_shows_the_right_move_and_where_it_is_another_the_models():
    task = ChessMoves(**FEW)
    picture = task.pictures(Material())["puzzles"]
    boards = picture.image.axes
    assert len(boards) == 8
    for axes, puzzle in zip(boards, task.puzzles, strict=False):
        glyphs = [text for text in axes.texts if text.get_text()]
        solved = best_move(material_value, puzzle.board) == puzzle.moves[0]
        assert len(glyphs) == len(puzzle.board.piece_map())
        assert len(axes.texts) - len(glyphs) == 2 - solved


def bench(folder, train=60, test=20):
    """Writes a small ChessBench; returns its win probabilities, of training and test."""
    fens = positions(train + test)
    wins = np.random.RandomState(1).random_sample(train + test)
    records = [state(fen, win) for fen, win in zip(fens, wins, strict=True)]
    write_bag(folder / "train" / "state_value_data.bag", records[:train])
    write_bag(folder / "test" / "state_value_data.bag", records[train:])
    return wins


def test_a_folder_of_chessbench(tmp_path):
    wins = bench(tmp_path)
    task = ChessMoves(path=str(tmp_path), eval_size=15, puzzles=2, search_depth=1)
    assert (len(task.train), len(task.val), len(task.test)) == (45, 15, 15)
    _, targets = task.val.__getitems__(range(15))
    np.testing.assert_allclose(targets[:, 0], wins[45:60], rtol=1e-6)
    assert task.puzzles_of == "embedded"
    assert len(ChessMoves(path=str(tmp_path), eval_size=15, train_size=7).train) == 7
    write_bag(tmp_path / "test" / "behavioral_cloning_data.bag", [cloning(chess.STARTING_FEN, "e2e4")])
    assert ChessMoves(path=str(tmp_path), eval_size=15).puzzles_of == "behavioral_cloning_data.bag"
    write_puzzles(tmp_path / "puzzles.csv", [{"Rating": "600", "PGN": "1. f3 e5", "Moves": "g2g4 d8h4"}])
    task = ChessMoves(path=str(tmp_path), eval_size=15, search_depth=1)
    found = task.summarize([], Material())
    assert (found["puzzles_of"], found["puzzle_rating"], found["move_accuracy"]) == ("puzzles.csv", 600, 1.0)


def test_one_file_of_chessbench_gives_all_splits(tmp_path):
    bench(tmp_path)
    task = ChessMoves(path=str(tmp_path / "train" / "state_value_data.bag"), eval_size=10)
    splits = [task.train, task.test, task.val]
    assert [(s.start, s.stop) for s in splits] == [(0, 40), (40, 50), (50, 60)]
    with pytest.raises(ValueError, match="eval_size=30: leaves nothing of 60 positions"):
        ChessMoves(path=str(tmp_path / "train" / "state_value_data.bag"), eval_size=30)


def test_the_worth_of_an_action_trains_too(tmp_path):
    records = [action(fen, next(iter(chess.Board(fen).legal_moves)).uci(), 0.3) for fen in positions(9)]
    path = write_bag(tmp_path / "action_value_data.bag", records)
    task = ChessMoves(path=str(path), eval_size=3)
    torch.testing.assert_close(task.train[0][1], torch.tensor([0.7, 0.3]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", ""),
        ("path", 3),
        ("train_size", 0),
        ("eval_size", 0),
        ("eval_size", True),
        ("puzzles", 0),
        ("search_depth", 0),
        ("search_depth", 99),
        ("search_puzzles", 0),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: must be"):
        ChessMoves(**{name: value})


def test_an_absent_path_is_named(tmp_path):
    with pytest.raises(DatasetError, match="nowhere"):
        ChessMoves(path=str(tmp_path / "nowhere"))


def test_without_python_chess_the_task_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "chess", None)
    with pytest.raises(DatasetError, match=r"chess_moves: .*pip install 'archzoo\[chess\]'"):
        ChessMoves()


def test_a_corrupted_embedded_file_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "chess_positions.npz"
    broken.write_bytes(chess_moves.EMBEDDED.read_bytes()[:5000])
    monkeypatch.setattr(chess_moves, "EMBEDDED", broken)
    with pytest.raises(DatasetError, match=r"chess_positions\.npz is cut short, .*install archzoo again"):
        ChessMoves()


def test_win_probabilities_of_the_file_include_mates(embedded):
    wins = win_probability(embedded["centipawns"])
    assert (wins == 1).any()
    assert wins.min() < 0.05
