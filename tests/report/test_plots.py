import itertools
import json
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archzoo.report import load_comparison, write_report
from archzoo.report.canvas import PALETTE
from archzoo.report.looks import short_labels, styles
from archzoo.report.placing import place_labels, spread
from archzoo.report.plots import _unit
from archzoo.report.trade_offs import pareto

SVG = "{http://www.w3.org/2000/svg}"


def draw(folder):
    write_report(folder)
    return {path.stem: ET.parse(path).getroot() for path in (folder / "figures").iterdir()}


def texts(root):
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_nothing_beats(points):
    front = pareto(points, "max")
    assert front
    for i, (cost, score) in enumerate(points):
        beaten = any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
        assert (i in front) is not beaten
    assert pareto([(cost, -score) for cost, score in points], "min") == front


@given(st.lists(st.floats(0, 100), max_size=12), st.floats(0, 12))
def test_spread_labels_keep_their_order_and_distance(positions, gap):
    out = spread(positions, gap, 0, 100)
    real = min(gap, 100 / max(1, len(positions) - 1))
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in out)
    placed = sorted(zip(positions, out, strict=True))
    ordered = sorted(out)
    assert [place for _, place in placed] == pytest.approx(ordered)
    assert all(b - a >= real - 1e-6 for a, b in pairwise(ordered))


def test_positions_that_are_far_enough_apart_stay():
    assert spread([10.0, 90.0, 50.0], 5, 0, 100) == [10.0, 90.0, 50.0]


@given(st.lists(st.tuples(st.floats(20, 400), st.floats(20, 250)), min_size=1, max_size=10))
def test_placed_labels_cover_neither_each_other_nor_a_point(points):
    size = (60.0, 12.0)
    spots = place_labels(points, [size] * len(points), [], [], (0, 0, 500, 300))
    if spots is None:
        return
    boxes = [(x, y, x + size[0], y + size[1]) for x, y in spots]
    for i, box in enumerate(boxes):
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= 500
        assert box[3] <= 300
        for x, y in points:
            assert not (box[0] < x < box[2] and box[1] < y < box[3])
        for other in boxes[:i]:
            assert not (box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3])


def test_labels_far_apart_are_placed_and_crowded_ones_are_not():
    assert place_labels([(50, 50), (200, 150)], [(40, 12)] * 2, [], [], (0, 0, 300, 200)) is not None
    assert place_labels([(50, 50)] * 30, [(90, 12)] * 30, [], [], (0, 0, 300, 200)) is None


def test_short_labels_differ_and_are_short(build, write):
    folder = build({"linear": [0.9], "a_layer_with_a_very_long_name_indeed": [0.9]})
    for grid in (3, 5):
        write(folder / f"g{grid}", layer="selectable_kan", options={"grid_size": grid, "kind": "x" * (40 + grid)})
    labels = short_labels(load_comparison(folder).groups)
    assert len(set(labels.values())) == 4
    assert all(len(text) <= 26 for text in labels.values())
    assert labels["linear"] == "linear"


def test_a_contestant_keeps_its_colour_and_the_baseline_is_grey(build):
    comparison = load_comparison(build({f"layer{i:02}": [0.5] for i in range(12)} | {"linear": [0.5]}))
    looks = styles(comparison, ["linear"])
    assert looks["linear"].colour == PALETTE[0][0]
    assert len({(look.colour, look.marker, str(look.dash)) for look in looks.values()}) == 13
    assert looks == styles(comparison, ["linear"])


def test_every_contestant_is_named_in_every_picture(build):
    for name, root in draw(build({"linear": [0.9, 0.8], "kan": [0.95, 0.9], "phm": [0.7, 0.75]})).items():
        for label in ("linear", "kan", "phm"):
            assert label in texts(root), (name, label)


def inside(root, name):
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter(f"{SVG}text"):
        place = element.attrib.get("transform", "")
        x, y = (element.attrib.get("x"), element.attrib.get("y"))
        if x is None and place.startswith("translate("):
            x, y = place.removeprefix("translate(").split(")")[0].replace(",", " ").split()[:2]
        if x is not None and y is not None:
            assert -1 <= float(x) <= width, (name, "".join(element.itertext()))
            assert -1 <= float(y) <= height, (name, "".join(element.itertext()))


def test_text_is_inside_the_picture(build):
    for name, root in draw(build({"linear": [0.9, 0.8], "a_layer_with_a_rather_long_name": [0.95, 0.9]})).items():
        inside(root, name)


def test_costs_that_no_run_tells_have_no_picture(build):
    pictures = draw(build({"linear": [0.9], "kan": [0.95]}, change={"flops": None, "memory": None}))
    assert not {"score-flops", "score-memory"} & set(pictures)
    assert "score-parameters" in pictures


def test_without_metrics_there_are_no_curves(build):
    assert not {"curves-score", "curves-loss"} & set(draw(build({"linear": [0.9]}, metrics=False)))


@pytest.mark.parametrize(
    ("scale", "mode"),
    [
        (1e-7, "min"),
        (1e6, "max"),
        *(
            pytest.param(scale, mode, marks=pytest.mark.slow)
            for scale, mode in itertools.product([1e-7, 1e-3, 1.0, 1e6], ["min", "max"])
            if (scale, mode) not in ((1e-7, "min"), (1e6, "max"))
        ),
    ],
)
def test_scores_of_any_size_can_be_drawn(build, scale, mode):
    scores = {"linear": [scale, 2 * scale], "kan": [100 * scale, 90 * scale], "phm": [-scale, scale]}
    assert "ranking" in draw(build(scores, metric="mse", mode=mode))


def test_nan_in_the_metrics_is_left_out(build):
    folder = build({"linear": [0.9, 0.8]})
    lines = [json.dumps({"step": step, "train/loss": float("nan"), "val/accuracy": float("nan")}) for step in range(3)]
    (folder / "linear-0" / "metrics.jsonl").write_text("\n".join(lines))
    assert "curves-score" in draw(folder)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (3e6, "B", "MiB"),
        (512, "B", "B"),
        (0.0012, "s", "ms"),
        (70, "s", "s"),
        (2e-6, "s", "µs"),
        (9e3, "", "thousand"),
        (5, "", ""),
    ],
)
def test_axes_have_units_that_suit(value, unit, expected):
    assert _unit(value, unit)[1] == expected


def sized(build_sizes, functions=("xy",), **common):
    laws = {"kan": lambda n, s: 3e5 / n**3 * (1 + s), "linear": lambda n, s: 10 / n * (1 + s)}
    return build_sizes(laws, functions=functions, **common)


def test_a_series_is_a_line_with_its_exponent(build_sizes):
    pictures = draw(sized(build_sizes))
    assert {"kan", "linear", "α = 3.00 ± 0.00", "α = 1.00 ± 0.00"} <= set(texts(pictures["score-parameters"]))
    assert {"kan", "linear"} <= set(texts(pictures["score-flops"]))
    assert not any("α" in text for text in texts(pictures["score-flops"]))
    assert "scaling" not in pictures


@pytest.mark.parametrize("count", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 8))])
def test_small_multiples_have_a_panel_for_each_task(build_sizes, count):
    names = [f"function_{i}" for i in range(count)]
    root = draw(sized(build_sizes, names))["scaling"]
    told = texts(root)
    assert [text for text in told if text.startswith("function_")] == names
    assert (told.count("3.0"), told.count("1.0")) == (count, count)
    assert (told.count("kan"), told.count("linear")) == (1, 1)
    assert told.count("Parameters") == min(count, 4 if count not in (5, 6, 9) else 3)
    inside(root, "scaling")


def test_tasks_with_different_scores_have_axes_of_their_own(build_sizes):
    folder = sized(build_sizes, ["xy"])
    sized(build_sizes, ["j0"], metric="accuracy", mode="max")
    root = draw(folder)["scaling"]
    told = texts(root)
    assert "j0: test accuracy (%)" in told
    assert "xy: test rmse, lower is better" in told
    assert told.count("3.0") == 1
    inside(root, "scaling")


@pytest.mark.parametrize("mode", ["min", pytest.param("max", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "scores",
    [(0.0, 0.0), (1e-30, 1e30), *(pytest.param(s, marks=pytest.mark.slow) for s in ((-1.0, 1.0), (0.5, 0.5)))],
    ids=str,
)
def test_any_scores_of_any_sizes_can_be_drawn(build_sizes, mode, scores):
    law = {"kan": lambda n, s: scores[0], "linear": lambda n, s: scores[1]}
    assert "scaling" in draw(build_sizes(law, functions=("xy", "j0"), sizes=(100, 101), mode=mode))


def test_a_series_keeps_its_look_at_all_sizes_and_a_layer_its_colour(build_sizes, write):
    folder = sized(build_sizes, model={"depth": 1})
    for size in (100, 200):
        options = {"metric": "rmse", "mode": "min", "task": "functions", "task_options": {"function": "xy"}}
        options |= {"budget": {"to": size}, "parameters": size, "model": {"depth": 2}, "score": 1 / size}
        write(folder / f"deep{size}", layer="linear", **options)
    comparison = load_comparison(folder)
    looks = styles(comparison, ["linear (depth=2, to=100)"])
    by_series = {}
    for group in comparison.groups:
        by_series.setdefault(group.series, set()).add(looks[group.label])
    assert {len(same) for same in by_series.values()} == {1}
    shallow, deep = (next(iter(by_series[f"linear (depth={d})"])) for d in (1, 2))
    assert shallow.colour == deep.colour == PALETTE[0][0]
    assert (shallow.marker, shallow.dash) != (deep.marker, deep.dash)
    assert next(iter(by_series["kan"])).colour == PALETTE[1][0]
