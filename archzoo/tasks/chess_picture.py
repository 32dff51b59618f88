"""Boards with the moves that a player chooses, as a figure."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from archzoo.tasks.chess_play import Puzzle

if TYPE_CHECKING:
    import chess
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT, DARK, RIGHT, WRONG = "#f0e4d0", "#c3a582", "#1b7f3b", "#c0392b"


def board_figure(puzzles: Sequence[Puzzle], choose: "Callable[[chess.Board], chess.Move]") -> "Figure":
    """Puzzles beside each other: the solution's first move in green, and where the player's is another one, in red."""
    from matplotlib.figure import Figure

    columns = min(4, len(puzzles))
    rows = -(-len(puzzles) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.3 * rows), layout="constrained")
    for number, puzzle in enumerate(puzzles):
        axes = figure.add_subplot(rows, columns, number + 1)
        _draw_board(axes, puzzle.board)
        chosen = choose(puzzle.board)
        if chosen != puzzle.moves[0]:
            _draw_move(axes, puzzle.board, chosen, WRONG)
        _draw_move(axes, puzzle.board, puzzle.moves[0], RIGHT)
    return figure


def _place(board: "chess.Board", square: int) -> tuple[int, int]:
    """Column and row of a square; the mover sits at the bottom."""
    column, row = square & 7, square >> 3
    return (column, row) if board.turn else (7 - column, 7 - row)


def _draw_board(axes: "Axes", board: "chess.Board") -> None:
    from matplotlib.colors import ListedColormap

    axes.imshow([[(row + column) % 2 for column in range(8)] for row in range(8)], cmap=ListedColormap([DARK, LIGHT]))
    axes.set(xlim=(-0.5, 7.5), ylim=(-0.5, 7.5), xticks=[], yticks=[])
    for square, piece in board.piece_map().items():
        # The filled glyphs for both sides: the hollow ones are hard to see on a dark square.
        glyph, colour = piece.unicode_symbol(invert_color=piece.color), "white" if piece.color else "black"
        text = axes.text(*_place(board, square), glyph, size=15, ha="center", va="center", color=colour)
        text.set(fontfamily="DejaVu Sans", path_effects=_outline())


def _outline() -> list[object]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.2, foreground="black")]


def _draw_move(axes: "Axes", board: "chess.Board", move: "chess.Move", colour: str) -> None:
    source, target = _place(board, move.from_square), _place(board, move.to_square)
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.5, "shrinkA": 0, "shrinkB": 0, "alpha": 0.85}
    axes.annotate("", target, source, arrowprops=arrow)
