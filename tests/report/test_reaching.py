"""Steps and seconds to equal score: where a validation curve first has the baseline's best, and what is said of it."""

import csv
import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from archzoo.report import console_table, load_comparison, rank, write_report
from archzoo.report.reaching import Evaluation, best, curve, reach
from archzoo.report.stats import mean_interval
from benchmarks import readme
from benchmarks.record import comparison_record

scores = st.floats(-1e6, 1e6)
curves = st.lists(st.tuples(st.integers(1, 50), scores | st.none()), min_size=1, max_size=12).map(
    lambda parts: tuple(
        Evaluation(step, step / 4, score)
        for step, (_, score) in zip(itertools.accumulate(gap for gap, _ in parts), parts, strict=True)
    )
)


def points(*told):
    return tuple(Evaluation(*point) for point in told)


def running(points):
    """The best score so far, at every evaluation from the first finite one on."""
    kept, height = [], None
    for point in points:
        if point.score is not None:
            height = point.score if height is None else max(height, point.score)
        if height is not None:
            kept.append((point.step, height))
    return kept


def test_it_is_linear_between_evaluations():
    reached = reach(points((10, 1.0, 0.2), (20, 5.0, 0.6)), 0.5, "max")
    assert reached is not None
    assert (reached.step, reached.seconds) == (pytest.approx(17.5), pytest.approx(4.0))
    assert not reached.at_first


def test_the_first_evaluation_is_the_soonest_that_can_be_told():
    reached = reach(points((10, 1.0, 0.7), (20, 5.0, 0.8)), 0.5, "max")
    assert reached is not None
    assert (reached.step, reached.at_first) == (10, True)


def test_a_worse_evaluation_does_not_take_the_best_away():
    reached = reach(points((10, 1.0, 0.4), (20, 2.0, 0.1), (30, 3.0, None), (40, 4.0, 0.8)), 0.6, "max")
    assert reached is not None
    assert reached.step == pytest.approx(35)  # from 0.4 at step 30, not from 0.1


def test_without_times_there_are_steps_only():
    reached = reach(points((10, None, 0.2), (20, 5.0, 0.6)), 0.4, "max")
    assert reached is not None
    assert (reached.step, reached.seconds) == (pytest.approx(15), None)


@given(curves, scores)
def test_it_is_where_the_running_best_is_the_target(points, target):
    reached = reach(points, target, "max")
    best_so_far = running(points)
    if not best_so_far or best_so_far[-1][1] < target:
        assert reached is None
        return
    assert reached is not None
    place = next(i for i, (_, height) in enumerate(best_so_far) if height >= target)
    step, height = best_so_far[place]
    assert reached.at_first == (place == 0)
    if place == 0:
        assert reached.step == step
        return
    before, low = best_so_far[place - 1]
    assert before <= reached.step <= step
    assert reached.seconds == pytest.approx(reached.step / 4)
    drawn = low + (height - low) * (reached.step - before) / (step - before)
    assert drawn == pytest.approx(target, abs=1e-9 * (abs(low) + abs(height)))


@given(curves, scores, scores)
def test_a_higher_target_is_never_reached_sooner(points, one, other):
    low, high = sorted((one, other))
    first, second = reach(points, low, "max"), reach(points, high, "max")
    if second is not None:
        assert first is not None
        assert first.step <= second.step


@given(curves, scores)
def test_smaller_is_better_is_the_same_upside_down(points, target):
    flipped = tuple(Evaluation(p.step, p.seconds, None if p.score is None else -p.score) for p in points)
    assert reach(points, target, "max") == reach(flipped, -target, "min")


@given(curves)
def test_a_curve_reaches_its_own_best_at_the_evaluation_that_has_it(points):
    target = best(points, "max")
    if target is None:
        assert reach(points, 0.0, "max") is None
        return
    reached = reach(points, target, "max")
    assert reached is not None
    assert reached.step == next(point.step for point in points if point.score == target)


def test_a_curve_is_of_the_lines_that_have_the_score():
    lines = [
        {"step": 20, "val/a": 0.2, "time_s": 3, "train_s": 2},
        {"step": 5, "train/loss": 1},
        {"step": 10, "val/a": "x"},
    ]
    assert curve(lines, "a") == points((10.0, None, None), (20.0, 2.0, 0.2))


BASE = [(10, 1.0, 0.2), (20, 2.0, 0.6), (30, 3.0, 0.5)]


def build(write, folder, curves, **change):
    """Layer -> curves by seed."""
    for layer, by_seed in curves.items():
        for seed, told in enumerate(by_seed):
            write(folder / f"{layer}-{seed}", layer=layer, seed=seed, score=0.5 + 0.01 * seed, curve=told, **change)
    return folder


@pytest.fixture
def compared(write, tmp_path):
    fast = [(5, 2.0, 0.2), (15, 4.0, 1.0)]  # 0.6 at step 10, after 3 s
    slower = [(10, 2.0, 0.2), (20, 6.0, 1.0)]  # 0.6 at step 15, after 4 s
    never = [(10, 1.0, 0.1), (20, 2.0, 0.5)]
    curves = {"linear": [BASE, BASE], "kan": [fast, slower], "phm": [fast, never]}
    return build(write, tmp_path / "digits", curves)


def by_label(folder):
    return {row.label: row for row in rank(load_comparison(folder))}


def test_ratios_are_paired_by_seed_and_have_the_reports_interval(compared):
    equal = by_label(compared)["kan"].equal
    assert equal is not None
    assert equal.step_ratios == pytest.approx((0.5, 0.75))
    assert equal.second_ratios == pytest.approx((1.5, 2.0))
    expected = mean_interval(equal.step_ratios)
    assert equal.steps == expected
    assert equal.steps.mean == pytest.approx(0.625)
    assert equal.seconds.mean == pytest.approx(1.75)


def test_where_one_seed_does_not_get_there_no_mean_is_given(compared):
    equal = by_label(compared)["phm"].equal
    assert equal is not None
    assert (equal.reached, len(equal.seeds)) == (1, 2)
    assert equal.steps is None
    assert equal.seconds is None
    assert equal.step_ratios == (pytest.approx(0.5), None)


def test_the_baseline_is_measured_by_itself(compared):
    equal = by_label(compared)["linear"].equal
    assert equal is not None
    assert equal.step_ratios == (1.0, 1.0)
    assert (equal.base_steps, equal.base_seconds) == (20.0, 2.0)


def test_a_run_that_diverged_does_not_get_there(write, compared):
    folder = compared
    write(folder / "d", layer="nau", seed=0, status="diverged", score=None, curve=[(5, 1.0, 0.9)])
    write(folder / "e", layer="nau", seed=1, score=0.4, curve=[(5, 1.0, 0.9)])
    equal = by_label(folder)["nau"].equal
    assert equal is not None
    assert equal.own[0] is None
    assert equal.reached == 1
    assert equal.steps is None
    assert equal.at_most


def test_a_seed_without_a_curve_is_said_and_takes_the_mean(write, compared):
    (compared / "kan-1" / "metrics.jsonl").unlink()
    equal = by_label(compared)["kan"].equal
    assert equal is not None
    assert (equal.seeds, equal.without_curve, equal.steps) == ((0,), 1, None)
    write_report(compared)
    assert "reached in 1 of 1 seed, 1 more without a curve" in (compared / "report.md").read_text()


def test_every_format_has_the_ratios(compared):
    page = write_report(compared).read_text()
    assert "Steps to equal score" in page
    assert "evaluations and checkpoints left out" in page
    markdown = (compared / "report.md").read_text()
    cost = markdown.split("## Cost\n\n")[1].split("\n\n")[0].splitlines()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in cost}
    assert "| Steps to equal score | Seconds to equal score |" in cost[0]
    assert lines["kan"].endswith("| 0.62 x [-0.96, 2.21] | 1.75 x [-1.43, 4.93] |")
    assert lines["phm"].endswith("| reached in 1 of 2 seeds | reached in 1 of 2 seeds |")
    assert lines["linear"].endswith("| 1 x (20 steps) | 1 x (2.00 s) |")
    rows = {row["label"]: row for row in csv.DictReader(io.StringIO((compared / "report.csv").read_text()))}
    assert float(rows["kan"]["equal_steps_mean"]) == pytest.approx(0.625)
    assert float(rows["kan"]["equal_seconds_mean"]) == pytest.approx(1.75)
    assert (rows["phm"]["equal_seeds"], rows["phm"]["equal_reached"], rows["phm"]["equal_steps_mean"]) == ("2", "1", "")
    tex = (compared / "report.tex").read_text()
    table = tex.split(r"\label{tab:digits-digits-equal}")[1]
    assert r"{kan} & 0.62 x {\scriptsize [-0.96, 2.21]}" in table
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(console_table(load_comparison(compared)))
    text = " ".join(console.export_text().split())
    assert "To linear's best validation accuracy: " in text
    assert "phm got there in 1 of 2 seeds" in text
    assert "kan 0.62 ±1.59 x its steps and 1.75 ±3.18 x its seconds" in text


def test_an_upper_bound_is_marked_as_one(write, tmp_path):
    folder = build(write, tmp_path / "digits", {"linear": [BASE], "kan": [[(5, 0.5, 0.9)]]})
    write_report(folder)
    assert "| ≤ 0.25 x (no CI (1 seed)) | ≤ 0.25 x (no CI (1 seed)) |" in (folder / "report.md").read_text()
    assert r"$\leq$ 0.25 x" in (folder / "report.tex").read_text()


def test_without_curves_or_a_baseline_there_are_no_columns(write, tmp_path):
    bare = build(write, tmp_path / "bare", {"linear": [None], "kan": [None]}, metrics=False)
    alone = build(write, tmp_path / "alone", {"kan": [BASE], "phm": [BASE]}, budget={"to": "nau"})
    for folder in (bare, alone):
        write_report(folder)
        assert "equal score" not in (folder / "report.md").read_text()
        assert "equal" not in (folder / "report.tex").read_text()


def test_a_loss_is_reached_from_above(write, tmp_path):
    base, fast = [(10, 1.0, 4.0), (20, 2.0, 2.0)], [(5, 1.0, 4.0), (15, 2.0, 1.0)]
    folder = build(write, tmp_path / "t", {"linear": [base], "kan": [fast]}, metric="loss", mode="min")
    equal = by_label(folder)["kan"].equal
    assert equal is not None
    assert equal.step_ratios == (pytest.approx((5 + 10 * 2 / 3) / 20),)


def test_recorded_results_have_the_ratios_and_their_table_shows_them(compared):
    record = comparison_record(compared, "x")
    kan = next(row for row in record["rows"] if row["label"] == "kan")["equal_score"]
    assert kan["steps"]["ratios"] == pytest.approx([0.5, 0.75])
    assert (kan["reached"], kan["base_steps"]) == (2, 20.0)
    lines = readme.comparison_table(record).splitlines()
    assert lines[0].endswith("| step time | steps to equal score | seconds to equal score |")
    assert any("`kan`" in line and line.endswith("| 0.62× ± 1.59 | 1.75× ± 3.18 |") for line in lines)
    assert any(
        "`phm`" in line and line.endswith("| reached in 1 of 2 seeds | reached in 1 of 2 seeds |") for line in lines
    )
    assert any("`linear`" in line and line.endswith("| – | – |") for line in lines)
