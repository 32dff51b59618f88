import itertools
import math

import pytest
import torch

from archzoo.models.kan import KAN
from archzoo.models.kan_plot import FORMULA, POINTS
from tests.helpers import sampled

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is optional")
matplotlib.use("Agg")
from matplotlib import colors, pyplot  # noqa: E402
from matplotlib.patches import Circle, Rectangle  # noqa: E402

DOUBLE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def samples(*shape):
    return 2 * torch.rand(*shape, **DOUBLE) - 1


def build(width=(2, 3, 1), **options):
    return KAN(width, scale_noise=2.0, **DOUBLE, **options)


def curves(ax):
    return [line for line in ax.lines if len(line.get_xdata()) == POINTS]


def rectangles(ax):
    """Of each edge: paper, shade, frame."""
    found = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    return [found[k : k + 3] for k in range(0, len(found), 3)]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_every_edge_is_drawn_by_input_then_subnode_and_pruned_ones_are_not():
    model, x = build(), samples(100, 2)
    assert len(curves(model.plot(x))) == 9
    scores = torch.ones(3, 2)
    scores[1, 0] = 0
    model.blocks[0].edges.prune_edges_(0.5, scores)
    ax = model.plot(x)
    assert len(curves(ax)) == len(rectangles(ax)) == 8
    lefts = [frame.get_x() for _, _, frame in rectangles(ax)[:5]]
    assert lefts == sorted(lefts)


def test_a_curve_is_the_edge_s_function_and_the_samples_range_is_shaded():
    model, x = build([2, 1], grid_range=(-2, 2)), samples(300, 2) * torch.tensor([0.5, 1.5])
    ax = model.plot(x)
    for i, (line, (_, shade, frame)) in enumerate(zip(curves(ax), rectangles(ax), strict=True)):
        low, high = x[:, i].aminmax()
        first = max(-2.0, float(low - 0.75 * (high - low)))
        last = min(2.0, float(high + 0.75 * (high - low)))
        phi = model.blocks[0].edge_function(0, i, torch.linspace(first, last, POINTS, **DOUBLE)).detach()
        drawn = torch.from_numpy(line.get_ydata())
        assert torch.corrcoef(torch.stack([phi, drawn]))[0, 1] > 1 - 1e-9
        inside = drawn[(torch.linspace(first, last, POINTS) >= low) & (torch.linspace(first, last, POINTS) <= high)]
        assert inside.min() > frame.get_y()
        assert inside.max() < frame.get_y() + frame.get_height()
        scale = frame.get_width() / (last - first)
        assert shade.get_x() - frame.get_x() == pytest.approx(float(low - first) * scale)
        assert shade.get_width() == pytest.approx(float(high - low) * scale)


def test_visibility_is_tanh_of_the_score():
    model, x = build(), samples(100, 2)
    scores = torch.cat([s.t().flatten() for s in model.attribute(x).edges])
    for beta in (3.0, 0.5):
        ax = model.plot(x, beta=beta)
        assert torch.tensor([line.get_alpha() for line in curves(ax)]).allclose(torch.tanh(beta * scores).float())
        frames = [frame.get_edgecolor()[3] for _, _, frame in rectangles(ax)]
        assert torch.tensor(frames).allclose(torch.tanh(beta * scores).float())
        lines = ax.collections[0].get_colors()
        assert torch.tensor(lines[:, 3]).allclose(torch.tanh(beta * scores).repeat_interleave(2))


def test_formulas_have_their_colour_and_name():
    model, x = build(), samples(100, 2)
    model.fix_symbolic(0, 1, 0, "exp(-x^2)", x)
    model.fix_symbolic(1, 0, 2, "sin", x)
    ax = model.plot(x)
    formula = colors.to_rgb(FORMULA)
    assert [colors.to_rgb(line.get_color()) == formula for line in curves(ax)] == [k in (1, 8) for k in range(9)]
    assert texts(ax) == ["exp(−x$^{2}$)", "sin", "$x_{0}$", "$x_{1}$", "$y$"]


def test_sums_and_products_have_their_marks():
    ax = build([3, (1, 2), 2], mult_arity=[[], [2, 3], []]).plot(samples(100, 3))
    circles = [patch for patch in ax.patches if isinstance(patch, Circle)]
    # 3 inputs; 6 sums below, of which one goes on as a dot and five to 2 products; 2 sums above
    assert len(circles) == 3 + 6 + 1 + 2 + 2
    strokes = [line for line in ax.lines if len(line.get_xdata()) == 2]
    leaning = [
        line
        for line in strokes
        if abs(line.get_ydata()[1] - line.get_ydata()[0]) > 1e-9 < abs(line.get_xdata()[1] - line.get_xdata()[0])
    ]
    assert len(strokes) == 2 * (6 + 2 + 2)
    assert len(leaning) == 2 * 2
    edges = 3 * 6 + 3 * 2
    assert len(ax.collections[0].get_segments()) == 2 * edges + 6


def test_names_and_those_of_pruned_inputs():
    model, x = build([3, 2, 2], grid_range=(-40, 40)), samples(100, 3)
    assert texts(model.plot(x)) == ["$x_{0}$", "$x_{1}$", "$x_{2}$", "$y_{0}$", "$y_{1}$"]
    with torch.no_grad():
        model.blocks[0].edges.spline_weight[:, 1] = 0
        model.blocks[0].edges.base_weight[:, 1] = 0
    model.prune_inputs(x)
    assert texts(model.plot(x)) == ["$x_{0}$", "$x_{2}$", "$y_{0}$", "$y_{1}$"]
    ax = model.plot(x, input_names=["mass", "time", r"$\theta$"], output_names=["u", "v"], title="Energy")
    assert texts(ax) == ["mass", r"$\theta$", "u", "v", "Energy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": ["a"]}, r"input_names=\['a'\]: must be 2 names"),
        ({"input_names": "ab"}, "input_names='ab': must be 2 names"),
        ({"output_names": ["a", "b"]}, r"output_names=\['a', 'b'\]: must be 1 names"),
        ({"beta": 0.0}, "beta=0.0, scale=1.0: must be positive"),
        ({"scale": math.inf}, "beta=3.0, scale=inf: must be positive"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_a_figure_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        build().plot(samples(20, 2), **options)
    assert not pyplot.get_fignums()


def boxes_of(ax):
    """Bounding boxes, in px, of what must not overlap: texts and the edges' boxes."""
    ax.figure.canvas.draw()
    found = [text.get_window_extent() for text in ax.texts]
    return found + [frame.get_window_extent() for _, _, frame in rectangles(ax)]


LONG = [f"a rather long name of input {i}" for i in range(8)]


@pytest.mark.parametrize(
    ("width", "options"),
    [
        ([1, 1], {}),
        ([2, 5, 1], {"title": "A title"}),
        ([8, 6, 3, 1], {}),
        ([8, 6, 3, 1], {"input_names": LONG}),
        ([8, 2, 2], {"input_names": LONG, "output_names": ["the longest name of all of these by far", "b"]}),
        ([3, (2, 2), (1, 1), 2], {}),
        ([2, 1, 1], {"output_names": ["the longest name of all of these by far"]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("formulas", sampled([False, True], [True]), ids=["splines", "formulas"])
def test_nothing_overlaps_or_leaves_the_picture(width, options, formulas):
    model, x = build(width), samples(50, width[0])
    if formulas:
        names = itertools.cycle(["sin", "exp(-x^2)", "x", "tanh", "abs"])
        for edge in model.numeric_edges():
            model.fix_symbolic(*edge, next(names))
    ax = model.plot(x, **options)
    boxes, figure = boxes_of(ax), ax.figure.bbox
    for box in boxes:
        assert figure.x0 <= box.x0 <= box.x1 <= figure.x1
        assert figure.y0 <= box.y0 <= box.y1 <= figure.y1
    for one, other in itertools.combinations(boxes, 2):
        overlap_x = min(one.x1, other.x1) - max(one.x0, other.x0)
        overlap_y = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert min(overlap_x, overlap_y) < 1.0, (one, other)


def test_it_draws_in_axes_of_the_user_s_and_shrinks_with_them():
    model, x = build([2, 5, 1]), samples(50, 2)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(6, 2.5))
    assert model.plot(x, left) is left
    assert model.plot(x, right, input_names=["a", "b"]) is right
    usual = model.plot(x)
    assert usual.figure is not figure
    assert left.texts[0].get_fontsize() < 0.6 * usual.texts[0].get_fontsize()
    doubled = model.plot(x, scale=2.0)
    assert doubled.texts[0].get_fontsize() == pytest.approx(2 * usual.texts[0].get_fontsize())
    assert doubled.figure.get_size_inches() == pytest.approx(2 * usual.figure.get_size_inches())


def test_constants_poles_and_float32_are_drawn_without_a_warning(tmp_path):
    model, x = build([2, 2, 1]).float(), samples(50, 2).float()
    with torch.no_grad():
        model.blocks[0].edges.spline_weight[0, 0] = 0
        model.blocks[0].edges.base_weight[0, 0] = 0
    model.fix_symbolic(0, 1, 0, "1/x", affine=(1.0, 1.02, 0.1, 0.0))
    model.fix_symbolic(0, 1, 1, "log", affine=(1.0, 1.02, 0.1, 0.0))
    model.plot(x).figure.savefig(tmp_path / "kan.png")
    x[:, 1] = 0.5
    model.plot(x)


def test_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build().plot(samples(20, 2))
    assert not list(tmp_path.iterdir())


def test_gradients_and_mode_are_left_as_they_were():
    model, x = build(regularize=1.0), samples(20, 2)
    model.plot(x)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert model.regularization_loss() == 0
