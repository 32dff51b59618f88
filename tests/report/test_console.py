import io

import pytest
from rich.console import Console

from archzoo.report import console_table, load_comparison


def printed(folder, width=100, **kwargs):
    console = Console(file=io.StringIO(), width=width)
    console.print(console_table(load_comparison(folder), **kwargs))
    return console.file.getvalue()


def test_it_fits_a_hundred_columns_and_says_all(build, write):
    folder = build({"linear": [0.90, 0.91, 0.92], "kan": [0.93, 0.95, 0.94], "phm": [None, 0.7, 0.8]})
    write(
        folder / "d", layer="kan", seed=7, status="diverged", score=None, diverged={"step": 120, "module": "layers.1"}
    )
    text = printed(folder)
    assert max(map(len, text.splitlines())) <= 100
    for words in (
        "94.00 ±2.48",
        "+3.00 ±",
        "0.50 tie",
        "baseline",
        "8.96 k",
        "1.20 ms",
        "3 done, 1 diverged",
        "not separable",
    ):
        assert words in " ".join(text.split()), words
    assert "kan: diverged at step 120 in layers.1." in text
    assert "phm: failed: ValueError: no." in text


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_numbers_stay_whole_beside_long_labels(build, write, columns):
    folder = build(
        {f"a_contestant_with_a_very_long_name_{i}": [0.9 - 0.01 * i, 0.8] for i in range(12)} | {"linear": [0.5]}
    )
    write(folder / "g", layer="linear", seed=1, status="interrupted", score=None)
    text = printed(folder, columns, columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "85.00" in text
    assert "8.96" in text


def test_success_has_a_column(build):
    folder = build({"linear": [0.1], "nmu": [0.2]}, task_summary={"nmu": {"success": 1.0}, "linear": {"success": 0.0}})
    text = printed(folder)
    assert "solved" in text
    assert "1/1" in text


def test_brackets_in_labels_are_not_markup(build):
    assert "[bold]x" in printed(build({"linear": [0.9]}, change={"layer": "[bold]x"}))


def test_tasks_share_one_table(build, write):
    folder = build({"linear": [0.9], "kan": [0.8]})
    write(folder / "w", layer="kan", task="wine")
    text = printed(folder)
    assert "digits: kan" in text
    assert "wine: kan" in text


def test_it_is_plain_where_there_is_no_terminal(build):
    assert "\x1b" not in printed(build({"linear": [0.9]}))


def test_nobody_has_a_score(build):
    assert "No winner" in printed(build({"linear": [None]}))


def test_sizes_are_ranked_one_by_one(build_sizes):
    text = printed(build_sizes({"kan": lambda n, s: 1e5 / n**3, "linear": lambda n, s: 10 / n}))
    rows = [line.split() for line in text.splitlines() if line.split()[1:2] in (["1"], ["2"])]
    assert [row[:3] for row in rows[:4]] == [
        ["100", "1", "kan"],
        ["100", "2", "linear"],
        ["200", "1", "kan"],
        ["200", "2", "linear"],
    ]
    assert "kan 3.00 ± 0.00 and linear 1.00 ± 0.00" in " ".join(text.split())


@pytest.mark.parametrize("columns", [80, 100])
def test_of_many_contestants_there_is_a_summary(build_sizes, columns):
    folder = build_sizes(
        {"kan": lambda n, s: 3e5 / n**3 + s / 1e9, "linear": lambda n, s: None if n == 400 else 10 / n},
        functions=[f"function{i}" for i in range(7)],
        seeds=1,
    )
    text = printed(folder, columns, columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    words = " ".join(text.split())
    assert "at 100 at 200 at 400" in words
    assert "function6 linear 0.1000 kan 0.0375" in words
    assert "Mean rank over tasks and sizes: kan 1.33, first in 14 of 21" in words
    assert "function0: kan 3.00 ± 0.00 and linear 1.00." in words
    assert "function3: linear (to=400): failed: ValueError: no." in words
    assert "42 contestants: every ranking is in report.html and report.md." in words


def test_a_summary_without_sizes_has_every_score(build, write):
    folder = build({})
    for task in ("digits", "wine", "iris"):
        for i in range(14):
            write(folder / f"{task}{i}", layer=f"layer{i:02}", task=task, score=0.5 + 0.01 * i)
    text = printed(folder)
    assert "63.00" in text
    assert "1.00 3 of 3" in " ".join(text.split())
