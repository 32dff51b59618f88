"""Contestants at several sizes: who competes with whom, and the power law of each series."""

import csv
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archzoo.report import load_comparison, rank, write_report
from archzoo.report.formatting import Scale
from archzoo.report.ranking import standings
from archzoo.report.scaling import all_series, power_law
from archzoo.report.verdict import verdict


def steep(size, seed):
    return 3.0 * (size / 100) ** -3 * (1 + 0.1 * seed)


def flat(size, seed):
    return 1.0 * (size / 100) ** -1 * (1 + 0.1 * seed)


def judge(folder):
    comparison = load_comparison(folder)
    rows = rank(comparison)
    return comparison, rows, verdict(comparison, rows, Scale.of("rmse", [v for row in rows for v in row.values]))


def test_contestants_compete_at_equal_size_only(build_sizes):
    comparison, rows, _ = judge(build_sizes({"kan": steep, "linear": flat}))
    assert comparison.sizes == ("100 parameters", "200 parameters", "400 parameters")
    assert [(row.size, row.rank, row.label) for row in rows] == [
        ("100 parameters", 1, "linear (to=100)"),
        ("100 parameters", 2, "kan (to=100)"),
        ("200 parameters", 1, "kan (to=200)"),
        ("200 parameters", 2, "linear (to=200)"),
        ("400 parameters", 1, "kan (to=400)"),
        ("400 parameters", 2, "linear (to=400)"),
    ]
    for row in rows:
        assert row.baseline == (row.layer == "linear")
        if row.difference is not None:  # to the baseline of its own size
            own, base = steep(row.parameters, 0.5), flat(row.parameters, 0.5)
            assert row.difference.mean == pytest.approx(own - base)


def test_the_verdict_says_who_leads_at_which_size(build_sizes):
    _, _, said = judge(build_sizes({"kan": steep, "linear": flat}))
    assert said.sentence == (
        "kan leads at 200 and 400 parameters; linear leads at 100 parameters; no lead is separable from all others."
    )
    assert said.details[0].startswith("At 100 parameters: linear (the baseline) leads by 2.10")
    assert "kan 3.00 ± 0.00 and linear 1.00 ± 0.00" in said.details[-1]


def test_a_lead_that_seeds_separate_is_a_win(build_sizes):
    _, _, said = judge(build_sizes({"kan": steep, "linear": flat}, seeds=8, sizes=(200, 400)))
    assert said.sentence == "kan wins at all 2 sizes."


def test_a_sweep_of_the_width_is_one_of_sizes(build, write):
    folder = build({})
    for layer, score in (("kan", 0.9), ("linear", 0.8)):
        for width in (16, 64):
            options = {"score": score, "parameters": 100 * width, "model": {"width": width}}
            write(folder / f"{layer}{width}", layer=layer, **options)
    rows = rank(load_comparison(folder))
    assert [(row.size, row.series) for row in rows] == [
        ("width 16", "kan"),
        ("width 16", "linear"),
        ("width 64", "kan"),
        ("width 64", "linear"),
    ]


def test_sizes_of_one_layer_alone_compete_with_each_other(build_sizes):
    comparison, rows, _ = judge(build_sizes({"kan": steep}))
    assert comparison.sizes == ("",)
    assert [row.rank for row in rows] == [1, 2, 3]
    assert {row.series for row in rows} == {"kan"}


def test_other_options_make_other_series(build_sizes, write):
    folder = build_sizes({"linear": flat}, model={"depth": 1})
    for size in (100, 200, 400):
        options = {"metric": "rmse", "mode": "min", "task": "functions", "task_options": {"function": "exp_sin"}}
        options |= {"budget": {"to": size}, "parameters": size, "model": {"depth": 2}, "score": flat(size, 0) / 2}
        write(folder / f"deep{size}", layer="linear", **options)
    comparison = load_comparison(folder)
    assert [series.label for series in all_series(comparison, rank(comparison))] == [
        "linear (depth=1)",
        "linear (depth=2)",
    ]


def test_without_a_budget_a_growing_option_of_the_layer_makes_a_series(build, write):
    folder = build({})
    for grid in (3, 6, 12):
        for order in (2, 3):
            options = {"layer": "kan", "metric": "mse", "mode": "min", "budget": {"match": "none"}}
            options |= {"parameters": 10 * (grid + order), "score": 1.0 / grid}
            write(folder / f"{grid}-{order}", options={"grid_size": grid, "spline_order": order}, **options)
    comparison = load_comparison(folder)
    assert [s.label for s in all_series(comparison, rank(comparison))] == [
        "kan (spline_order=2)",
        "kan (spline_order=3)",
    ]


def test_options_at_one_matched_count_are_no_sizes(build, write):
    folder = build({"linear": [0.8]})
    for grid in (3, 6):
        write(folder / f"g{grid}", layer="kan", options={"grid_size": grid}, parameters=9000 + grid)
    assert {(group.size, group.series) for group in load_comparison(folder).groups} == {("", "")}


def test_one_size_whose_count_differs_between_tasks_makes_no_series(build_sizes, write):
    folder = build_sizes({"kan": steep, "linear": flat}, sizes=(100,), functions=("xy",))
    for layer in ("kan", "linear"):
        options = {"metric": "rmse", "mode": "min", "task": "functions", "task_options": {"function": "j0"}}
        write(folder / f"{layer}-j0", layer=layer, score=0.1, parameters=90, budget={"to": 100}, **options)
    assert {(group.size, group.series) for group in load_comparison(folder).groups} == {("", "")}


@given(
    alpha=st.floats(-3, 6),
    factor=st.floats(1e-3, 1e3),
    counts=st.lists(st.integers(10, 10**6), min_size=2, max_size=8, unique=True),
)
def test_a_power_law_is_found_again(alpha, factor, counts):
    law = power_law([(n, factor * n**-alpha) for n in counts])
    assert law is not None
    assert law.exponent == pytest.approx(alpha, abs=1e-6)
    assert (law.error is None) == (len(counts) == 2)
    if law.error is not None:
        assert law.error < 1e-6
    assert law(counts[0]) == pytest.approx(factor * counts[0] ** -alpha, rel=1e-5)


def test_the_error_of_the_exponent_is_that_of_a_regression():
    from scipy.stats import linregress

    points = [(100, 3e-2), (210, 4e-3), (390, 1e-3), (800, 9e-4)]
    law = power_law(points)
    expected = linregress([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
    assert law is not None
    assert (law.exponent, law.error) == pytest.approx((-expected.slope, expected.stderr))


@pytest.mark.parametrize("points", [[], [(100, 1.0)], [(100, 1.0), (100, 2.0)], [(100, 1.0), (200, 0.0)]], ids=str)
def test_where_there_is_no_power_law_none_is_given(points):
    assert power_law(points) is None


def test_medians_over_seeds_are_fitted(build_sizes):
    def outlier(size, seed):
        return 1e3 if seed == 2 else flat(size, 0)

    comparison = load_comparison(build_sizes({"linear": flat, "kan": outlier}, seeds=3))
    kan = all_series(comparison, rank(comparison))[0]
    assert kan.law is not None
    assert kan.law.exponent == pytest.approx(1.0)
    assert (kan.points[0].low, kan.points[0].high) == (flat(100, 0), 1e3)


def test_of_scores_that_rise_no_exponent_is_given(build_sizes):
    comparison = load_comparison(build_sizes({"kan": flat, "linear": flat}, metric="accuracy", mode="max"))
    series = all_series(comparison, rank(comparison))
    assert [line.law for line in series] == [None, None]
    assert all(len(line.points) == 3 for line in series)


def test_failures_are_no_points_and_take_the_last_place(build_sizes):
    def breaks(size, seed):
        return None if size == 400 else steep(size, seed)

    comparison, rows, said = judge(build_sizes({"kan": breaks, "linear": flat}))
    kan = all_series(comparison, rows)[0]
    assert [point.parameters for point in kan.points] == [100, 200]
    assert kan.law is not None
    assert kan.law.error is None
    assert "Without a score: kan (to=400) (2 failed)." in said.caveats
    assert standings(rows, lambda row: row.series)["kan"].mean_rank == pytest.approx((2 + 1 + 2) / 3)


def test_standings_are_over_tasks_and_sizes(build_sizes):
    rows = rank(load_comparison(build_sizes({"kan": steep, "linear": flat}, functions=("xy", "j0"))))
    kan, linear = (standings(rows, lambda row: row.series)[label] for label in ("kan", "linear"))
    assert (kan.mean_rank, kan.firsts, kan.wins, kan.contests) == (pytest.approx(4 / 3), 4, 0, 6)
    assert (linear.mean_rank, linear.firsts, linear.contests) == (pytest.approx(5 / 3), 2, 6)


def test_equal_scores_share_a_place_and_a_contestant_alone_has_none(build, write):
    folder = build({"linear": [0.9], "kan": [0.9], "phm": [0.5], "nau": [None], "nac": [None]})
    write(folder / "w", layer="kan", task="wine", score=0.1)
    places = standings(rank(load_comparison(folder)), lambda row: row.label)
    assert {label: place.mean_rank for label, place in places.items()} == {
        "kan": 1.5,
        "linear": 1.5,
        "phm": 3,
        "nau": 4.5,
        "nac": 4.5,
    }
    assert (places["kan"].firsts, places["linear"].firsts, places["kan"].contests) == (1, 1, 1)


def test_every_format_tells_points_and_exponents(build_sizes):
    folder = build_sizes({"kan": steep, "linear": flat}, functions=("xy", "j0"))
    write_report(folder)
    html, markdown = ((folder / name).read_text() for name in ("report.html", "report.md"))
    for text in (html, markdown):
        assert "Over all sizes" in text
        assert "3.00 ± 0.00" in text
        assert "(3 a series, from 100 to 400 parameters)" in text
        assert "100: 3.150, 200: 0.394" in text
    assert r"Exponent\\$\alpha$" in (folder / "report.tex").read_text()
    lines = list(csv.DictReader(io.StringIO((folder / "scaling.csv").read_text())))
    assert len(lines) == 2 * 2 * 3
    first = lines[0]
    assert (first["task"], first["series"], first["parameters"], first["points"]) == ("j0", "kan", "100", "3")
    assert float(first["exponent"]) == pytest.approx(3.0)
    rows = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert {(row["size"], row["series"]) for row in rows if row["layer"] == "kan"} == {
        (f"{n} parameters", "kan") for n in (100, 200, 400)
    }


def test_the_option_that_the_budget_varied_is_shown(build_sizes):
    folder = build_sizes(
        {"kan": steep, "linear": flat},
        change={
            "budget": {"match": "params", "to": 100, "target": 100, "deviation": 0, "option": "grid_size", "value": 7}
        },
    )
    write_report(folder)
    assert "(grid_size 7)" in (folder / "report.md").read_text()
    assert "grid_size=7" in (folder / "report.csv").read_text()
