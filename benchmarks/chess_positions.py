"""Makes the embedded positions of `chess_moves`, archzoo/tasks/data/chess_positions.npz: plays games and labels them.

Games start from the initial position with a few random moves; then a move is one of the best three, or now and then
any. Each new position is labelled by `archzoo.tasks.chess_search`: value, best move, and how far behind the second is.
Of each ten games the eighth is for validation, the last two for test. Test positions with one clearly best move are
puzzles, where a deeper search agrees. Minutes on one CPU thread; the same seed makes the same arrays, whatever the
number of processes.
"""

import argparse
import functools
import json
import multiprocessing
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from archzoo.tasks.chess_board import encode, pack, require_chess
from archzoo.tasks.chess_search import Line, best_lines

if TYPE_CHECKING:
    import chess

OUTPUT = Path(__file__).parents[1] / "archzoo" / "tasks" / "data" / "chess_positions.npz"
RANDOM_PLIES = (2, 12)  # half-moves at random that a game begins with: from, to
PLIES = 50  # half-moves of a game at most
BLUNDER = 0.2  # share of random moves after these
NEAR = 60  # centipawns by which a played move may be worse than the best
DECIDED = 1000  # centipawns from which on a game may end
END = 0.25  # how likely it then ends, at each half-move
CLEAR = 150  # centipawns by which a puzzle's move is better than the second best
PUZZLE_DEPTH = 3


def move_code(move: "chess.Move") -> int:
    return move.from_square | move.to_square << 6 | (move.promotion or 0) << 12


def play(number: int, *, seed: int, depth: int, puzzle_depth: int) -> list[tuple[bytes, list[Line], bool]]:
    """Positions of a game, packed, each with its best lines, and whether it is a puzzle.

    White is always to move: the board is turned after each move.
    """
    rng = np.random.RandomState([seed, number])
    board, found = require_chess().Board(), []
    opening = rng.randint(RANDOM_PLIES[0], RANDOM_PLIES[1] + 1)
    for ply in range(PLIES):
        moves = list(board.legal_moves)
        if not moves or board.is_insufficient_material():
            break
        move = moves[rng.randint(len(moves))]
        if ply >= opening:
            lines = best_lines(board, depth, 3)
            puzzle = number % 10 >= 8 and is_puzzle(board, lines, puzzle_depth)
            found.append((pack(encode(board)[None]).tobytes(), lines, puzzle))
            best = lines[0].value
            if abs(best) >= DECIDED and rng.random_sample() < END:
                break
            near = [line.move for line in lines if best - line.value <= NEAR]
            if rng.random_sample() >= BLUNDER:
                move = near[rng.randint(len(near))]
        board.push(move)
        board = board.mirror()
    return found


def is_puzzle(board: "chess.Board", lines: list[Line], depth: int) -> bool:
    """Whether one move is clearly best, at both depths."""
    if len(lines) < 2 or lines[0].value - lines[1].value < CLEAR:
        return False
    best, second = best_lines(board, depth, 2)
    return best.move == lines[0].move and best.value - second.value >= CLEAR


def make(games: int, depth: int, puzzle_depth: int, seed: int, processes: int) -> dict[str, np.ndarray]:
    """The file's arrays."""
    chess = require_chess()
    seen = {pack(encode(chess.Board())[None]).tobytes()}  # the initial position is nobody's
    packed, value, move, margin, game, puzzles = [], [], [], [], [], []
    start = time.perf_counter()
    one = functools.partial(play, seed=seed, depth=depth, puzzle_depth=puzzle_depth)
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for number, positions in enumerate(pool.imap(one, range(games))):
            for key, lines, puzzle in positions:
                if key in seen:
                    continue
                seen.add(key)
                if puzzle:
                    puzzles.append(len(packed))
                packed.append(np.frombuffer(key, dtype=np.uint8))
                value.append(lines[0].value)
                move.append(move_code(lines[0].move))
                margin.append(lines[0].value - lines[1].value if len(lines) > 1 else 0)
                game.append(number)
            if number % 20 == 19:
                done = f"{number + 1} games, {len(packed)} positions, {len(puzzles)} puzzles"
                print(f"{done}, {time.perf_counter() - start:.0f} s", flush=True)
    settings = {
        "command": f"python -m benchmarks chess_positions --games {games} --depth {depth} "
        f"--puzzle-depth {puzzle_depth} --seed {seed}",
        "search": f"archzoo.tasks.chess_search, depth {depth} and quiescence; puzzles: depth {puzzle_depth} agrees, "
        f"{CLEAR} centipawns ahead",
        "python-chess": chess.__version__,
        "licence": "CC0",
    }
    return {
        "packed": np.array(packed),
        "centipawns": np.array(value, dtype=np.int32),
        "move": np.array(move, dtype=np.uint16),
        "margin": np.array(margin, dtype=np.int32),
        "game": np.array(game, dtype=np.uint16),
        "puzzle": np.array(puzzles, dtype=np.uint16),
        "settings": np.array(json.dumps(settings)),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks chess_positions", description=__doc__)
    parser.add_argument("--games", type=int, default=400)
    parser.add_argument("--depth", type=int, default=1, help="of the search that labels")
    parser.add_argument("--puzzle-depth", type=int, default=PUZZLE_DEPTH, help="of the search that checks puzzles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(arguments)
    np.savez_compressed(args.output, **make(args.games, args.depth, args.puzzle_depth, args.seed, args.processes))
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB")
