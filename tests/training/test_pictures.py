"""Pictures: drawn with the scored weights, the same bytes each time, and never at the cost of a run."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from archzoo.pictures import Picture, outputs, tiles
from archzoo.report.pictures import LARGEST, MOST
from archzoo.tasks.autoencoding import Autoencoding
from archzoo.tasks.digits import Digits
from archzoo.tasks.functions import Functions
from archzoo.tasks.poisson import Poisson
from archzoo.tasks.super_resolution import Pairs, SuperResolution, enlarge
from archzoo.training import pictures
from archzoo.training.build import build_task
from archzoo.training.config import asdict_plain, run_id
from archzoo.training.pictures import draw_pictures, encode
from archzoo.training.run import execute, load_model
from tests.training.support import Blobs, lines_without_time, make_config
from tests.training.test_run import inspect

CAPTION = "<b>what</b> & why"


def run_folder(c):
    return Path(c.output_dir) / run_id(asdict_plain(c))


def pixels(path):
    with Image.open(path) as image:
        return torch.tensor(np.asarray(image))


def weights_picture(task, model):
    """An image of the model's first weights."""
    return {"weights": Picture(next(model.parameters()).sigmoid(), CAPTION)}


class Drawn(Blobs):
    """A task with the pictures that it is given."""

    def __init__(self, hook):
        super().__init__()
        self.hook = hook

    def pictures(self, model):
        return self.hook(model)


class Drawing(nn.Linear):
    """A model with pictures of its own."""

    def __init__(self, hook):
        super().__init__(2, 3)
        self.hook = hook

    def pictures(self, task):
        return self.hook(task)


# ---- what a run does


@pytest.fixture
def digits(monkeypatch):
    """The task digits draws the model's weights."""
    monkeypatch.setattr(Digits, "pictures", weights_picture)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_run_draws_the_weights_that_are_scored(tmp_path, digits, ema_decay):
    c = make_config(tmp_path, trainer={"ema_decay": ema_decay})
    record = execute(c)
    assert record["status"] == "done", record["error"]
    assert record["pictures"] == {"drawn": [{"name": "weights", "caption": CAPTION}], "failed": []}
    assert json.loads((run_folder(c) / "run.json").read_text())["pictures"] == record["pictures"]
    (file,) = (run_folder(c) / "pictures").iterdir()
    assert file.name == "weights.png"
    weights = next(load_model(run_folder(c)).parameters())
    assert torch.equal(pixels(file), (weights.sigmoid() * 255).round().byte())
    draw_pictures(tmp_path, build_task(c), load_model(run_folder(c)))
    assert (tmp_path / "pictures/weights.png").read_bytes() == file.read_bytes()


def test_a_run_that_was_stopped_draws_the_same(tmp_path, digits):
    whole, parts = make_config(tmp_path / "whole"), make_config(tmp_path / "parts")
    first = execute(whole)
    looks = iter(range(1000))
    stopped = execute(parts, should_stop=lambda: next(looks) == 6)
    assert (stopped["status"], stopped["pictures"]) == ("interrupted", None)
    assert not (run_folder(parts) / "pictures").exists()
    assert execute(parts)["pictures"] == first["pictures"]
    files = [run_folder(c) / "pictures/weights.png" for c in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_is_the_same_with_and_without(tmp_path, monkeypatch):
    with_ = make_config(tmp_path / "with")
    without = make_config(tmp_path / "without", tracker={"pictures": False})
    assert run_id(asdict_plain(with_)) == run_id(asdict_plain(without))

    def hook(task, model):
        torch.rand(3), np.random.rand(3), random.random()
        model.train()
        return weights_picture(task, model)

    monkeypatch.setattr(Digits, "pictures", hook)
    records = [execute(c) for c in (with_, without)]
    assert records[0]["pictures"]["drawn"]
    assert records[1]["pictures"] is None
    assert not (run_folder(without) / "pictures").exists()
    assert records[0]["summary"] == records[1]["summary"]
    lines, models = zip(
        *(
            (lines_without_time(f / "metrics.jsonl"), load_file(f / "model.safetensors"))
            for f in map(run_folder, (with_, without))
        ),
        strict=True,
    )
    assert lines[0] == lines[1]
    assert all(torch.equal(models[0][key], value) for key, value in models[1].items())


def test_a_failure_is_named_and_costs_nothing(tmp_path, monkeypatch):
    def hook(task, model):
        raise RuntimeError("no ink")

    monkeypatch.setattr(Digits, "pictures", hook)
    c = make_config(tmp_path)
    record = execute(c)
    assert (record["status"], record["error"]) == ("done", None)
    assert record["score"]["value"] > 0
    assert record["pictures"] == {"drawn": [], "failed": ["task Digits: RuntimeError: no ink"]}
    assert (run_folder(c) / "log.txt").read_text().count("no ink") == 1
    assert not (run_folder(c) / "pictures").exists()


def test_a_task_without_pictures_has_none(tmp_path):
    c = make_config(tmp_path)
    assert execute(c)["pictures"] == {"drawn": [], "failed": []}
    assert not (run_folder(c) / "pictures").exists()
    assert "drawn" not in (run_folder(c) / "log.txt").read_text()


def test_wandb_gets_the_pictures_with_their_captions(tmp_path, digits):
    c = make_config(tmp_path, tracker={"wandb": "offline"})
    execute(c)
    records = [json.loads(line) for line in inspect(run_folder(c)).splitlines()]
    items = [r["history"]["item"] for r in records if r.get("type") == "history"]
    (item,) = [item for item in items if "pictures/weights.path" in item]
    assert item["step"] == 12
    assert item["pictures/weights._type"] == "image-file"
    assert item["pictures/weights.caption"] == CAPTION
    (file,) = (run_folder(c) / "wandb").glob(f"offline-run-*/files/{item['pictures/weights.path']}")
    assert file.read_bytes() == (run_folder(c) / "pictures/weights.png").read_bytes()
    assert "stopped recording" not in (run_folder(c) / "log.txt").read_text()


def test_tensorboard_gets_the_pictures_with_their_captions(tmp_path, digits):
    import io

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    c = make_config(tmp_path, tracker={"tensorboard": True})
    execute(c)
    events = EventAccumulator(str(run_folder(c) / "tensorboard"))
    events.Reload()
    (image,) = events.Images("pictures/weights")
    assert image.step == 12
    with Image.open(io.BytesIO(image.encoded_image_string)) as shown:
        grey = torch.tensor(np.asarray(shown))
    assert torch.equal(grey, pixels(run_folder(c) / "pictures/weights.png").unsqueeze(-1).expand(-1, -1, 3))
    (text,) = events.Tensors("pictures/weights/text_summary")
    assert text.tensor_proto.string_val[0].decode() == f"    {CAPTION}"


# ---- drawing


def test_task_and_model_are_asked_in_evaluation_mode_without_gradients(tmp_path):
    asked = []

    def of_task(model):
        asked.append((model.training, torch.is_grad_enabled()))
        return {"a": Picture(torch.zeros(2, 3), "first")}

    def of_model(task):
        asked.append((model.training, torch.is_grad_enabled()))
        return {"b": Picture(torch.ones(3, 2, 3), "second")}

    model = Drawing(of_model).train()
    drawn, failed = draw_pictures(tmp_path, Drawn(of_task), model)
    assert not failed
    assert [(d.name, d.caption, d.path) for d in drawn] == [
        ("a", "first", tmp_path / "pictures/a.png"),
        ("b", "second", tmp_path / "pictures/b.png"),
    ]
    assert asked == [(False, False), (False, False)]
    assert pixels(drawn[0].path).eq(0).all()
    assert pixels(drawn[1].path).eq(255).all()


@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_are_the_same_each_time_and_those_of_others_are_left_alone(tmp_path, fails):
    def hook(model):
        image = torch.rand(4, 4) + float(np.random.rand()) + random.random()
        assert not fails
        return {"a": Picture(image / 3, "")}

    def draws():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    files, model = [], nn.Linear(2, 3)
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        expected = draws()
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        _, failed = draw_pictures(tmp_path, Drawn(hook), model)
        assert bool(failed) == fails
        assert draws() == expected
        if not fails:
            files.append((tmp_path / "pictures/a.png").read_bytes())
    assert len(set(files)) == (0 if fails else 1)


GOOD = Picture(torch.zeros(2, 2), "good")


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ({"../a": GOOD}, "picture '../a': ValueError: name='../a': must be of small letters"),
        ({"A": GOOD}, "name='A': must be of small letters"),
        ({3: GOOD}, "name=3: must be of small letters"),
        ({"a": "text"}, "picture 'a': TypeError: 'text': must be an archzoo.pictures.Picture"),
        ({"a": Picture("text", "")}, "image='text': must be a tensor, or a Figure of matplotlib"),
        (
            {"a": Picture(torch.zeros(2, 3, 3), "")},
            "an image of shape (2, 3, 3): must be (height, width), (1, …) or (3",
        ),
        ({"a": Picture(torch.zeros(3), "")}, "an image of shape (3,): must be (height, width)"),
        ({"a": Picture(torch.zeros(0, 3), "")}, "an image of shape (0, 3): must be (height, width)"),
        ({"a": Picture(torch.zeros(2, 2), 5)}, "caption=5: must be a text of 600 characters at most"),
        ({"a": Picture(torch.zeros(2, 2), "x" * 601)}, "must be a text of 600 characters at most"),
        ({"a": Picture(torch.rand(3, 700, 700), "")}, f"{LARGEST:,} at most; draw fewer pixels"),
    ],
    ids=["path", "capital", "number", "text", "no-image", "channels", "axes", "empty", "caption", "long", "large"],
)
def test_a_wrong_picture_is_left_out_and_the_others_are_drawn(tmp_path, logs, pictures, message):
    torch.manual_seed(0)
    hook = {"first": GOOD, **pictures, "last": GOOD}
    drawn, failed = draw_pictures(tmp_path, Drawn(lambda model: hook), nn.Linear(2, 3))
    assert [d.name for d in drawn] == ["first", "last"]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["first.png", "last.png"]
    (line,) = failed
    assert line.startswith("task Drawn, picture ")
    assert message in line
    assert [r.getMessage() for r in logs.records] == [f"not drawn: {line}"]


def test_a_hook_that_returns_no_mapping_is_named(tmp_path):
    drawn, failed = draw_pictures(tmp_path, Drawn(lambda model: None), Drawing(lambda task: {"a": GOOD}))
    assert [d.name for d in drawn] == ["a"]
    assert failed[0].startswith("task Drawn: AttributeError: ")


def test_a_name_is_taken_once_and_pictures_are_not_without_number(tmp_path):
    many = {f"p{i}": GOOD for i in range(MOST)}
    model = Drawing(lambda task: {"p0": GOOD, "more": GOOD})
    drawn, failed = draw_pictures(tmp_path, Drawn(lambda model: many), model)
    assert len(drawn) == len(list((tmp_path / "pictures").iterdir())) == MOST
    assert failed == [
        "model Drawing, picture 'p0': ValueError: name='p0': the task has a picture of this name; take another one",
        f"model Drawing, picture 'more': ValueError: a run has {MOST} pictures at most",
    ]


def test_pictures_from_before_are_removed(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/old.png").write_bytes(b"old")
    draw_pictures(tmp_path, Drawn(lambda model: {"new": GOOD}), nn.Linear(2, 3))
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["new.png"]
    draw_pictures(tmp_path, Blobs(), nn.Linear(2, 3))
    assert not (tmp_path / "pictures").exists()


def test_without_matplotlib_images_are_drawn_and_it_is_said_once(tmp_path, monkeypatch, logs):
    def hook(model):
        from matplotlib.figure import Figure

        return {"figure": Picture(Figure(), "")}

    pictures._say_once.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for _ in range(2):
        drawn, failed = draw_pictures(tmp_path, Drawn(hook), Drawing(lambda task: {"image": GOOD}))
        assert [d.name for d in drawn] == ["image"]
        assert failed == ["task Drawn: matplotlib is not installed; `pip install 'archzoo[train]'` installs it"]
    assert len(logs.records) == 1
    assert logs.records[0].getMessage().startswith("pictures are left out: matplotlib is not installed")


# ---- files


def decoded(image):
    import io

    with Image.open(io.BytesIO(encode(image))) as picture:
        return picture.mode, torch.tensor(np.asarray(picture)).tolist()


def test_an_image_is_written_as_it_is():
    grey = torch.tensor([[0.0, 1.0, 0.5], [-3.0, 7.0, 0.2]])
    rows = [[0, 255, 128], [0, 255, 51]]
    assert decoded(grey) == decoded(grey[None]) == decoded(grey.double().requires_grad_()) == ("L", rows)
    assert decoded(torch.tensor([[True, False], [False, True]])) == ("L", [[255, 0], [0, 255]])
    assert decoded(torch.tensor([[[0.0]], [[1.0]], [[0.2]]], dtype=torch.float64)) == ("RGB", [[[0, 255, 51]]])


def test_what_is_not_a_number_is_magenta():
    bad = [float("nan"), float("inf"), -float("inf")]
    assert decoded(torch.tensor([[0.2, *bad]])) == ("RGB", [[[51, 51, 51], *[[255, 0, 255]] * 3]])
    colour = torch.tensor([[[0.2, 0.2]], [[float("nan"), 0.4]], [[0.6, 0.6]]])
    assert decoded(colour) == ("RGB", [[[255, 0, 255], [51, 102, 153]]])


def test_a_figure_has_the_same_bytes_each_time_whatever_the_users_settings_and_none_is_left_open(tmp_path, monkeypatch):
    from matplotlib import pyplot, rcParams

    def hook(model):
        figure, axes = pyplot.subplots(figsize=(2, 1))
        axes.plot([0, 1], [1, 3])
        axes.set_title("$x_0$")
        return {"figure": Picture(figure, "")}

    files = []
    for size in (5.0, 20.0):
        monkeypatch.setitem(rcParams, "font.size", size)
        draw_pictures(tmp_path, Drawn(hook), nn.Linear(2, 3))
        assert rcParams["font.size"] == size
        files.append((tmp_path / "pictures/figure.png").read_bytes())
    assert files[0] == files[1]
    assert b"tEXt" not in files[0]
    assert pixels(tmp_path / "pictures/figure.png").shape[:2] == (144, 288)
    assert not pyplot.get_fignums()


# ---- helpers


def test_tiles_lays_out_rows_and_columns_with_white_between():
    rows = torch.arange(6.0).view(2, 3, 1, 1, 1) / 10
    w = 1.0
    expected = [[0, 0, w, 0.1, 0.1, w, 0.2, 0.2]] * 2 + [[w] * 8] + [[0.3, 0.3, w, 0.4, 0.4, w, 0.5, 0.5]] * 2
    assert torch.equal(tiles(list(rows), zoom=2, gap=1), torch.tensor([expected]))
    colour = torch.arange(12.0).view(1, 2, 3, 1, 2)
    assert torch.equal(tiles(list(colour), gap=0), torch.cat([colour[0, 0], colour[0, 1]], -1))


@pytest.mark.parametrize("rows", [[], [torch.zeros(1, 1, 2, 2), torch.zeros(2, 1, 2, 2)], [torch.zeros(1, 2, 2)]])
def test_tiles_of_different_shapes_are_refused(rows):
    with pytest.raises(ValueError, match=r"^rows of shapes .*: must be of one shape, \(columns, channels, height"):
        tiles(rows)


def test_outputs_go_through_the_model_in_its_dtype():
    seen = []

    class Model(nn.Linear):
        def forward(self, x):
            seen.append((x.dtype, torch.is_grad_enabled()))
            return super().forward(x.to(self.weight))

    model = Model(2, 3, dtype=torch.float64)
    x = torch.tensor([[1, 2]])
    out = outputs(model, x.float())
    assert torch.equal(out, model(x.double()).detach())
    outputs(model, x)
    outputs(nn.Flatten(), x.float())  # a model without parameters
    assert seen[0] == (torch.float64, False)
    assert seen[2] == (torch.int64, False)
    assert outputs(Model(2, 3), x.double()).dtype == torch.float64


# ---- the tasks that have some


class Fixed(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def panels(picture):
    """Titles, and values with the limits of their colours, of a figure of maps."""
    axes = [a for a in picture.image.axes if a.images]
    return {a.get_title(): (torch.tensor(np.asarray(a.images[0].get_array())), a.images[0].get_clim()) for a in axes}


def test_functions_of_two_inputs_are_drawn_over_their_box():
    task = Functions(function="feynman_i_13_12", train_size=10, test_size=10)  # x0 (1/x1 - 1), x0 in -1..1, x1 in .5..2
    (picture,) = task.pictures(Fixed(lambda x: task.truth(x) + x[:, :1] / 4)).values()
    found = panels(picture)
    assert list(found) == ["target", "output", "output − target"]
    x = (torch.arange(80.0, dtype=torch.float64) + 0.5) / 40 - 1
    y = 0.5 + 1.5 * (torch.arange(80.0, dtype=torch.float64) + 0.5) / 80
    target, limits = found["target"]
    torch.testing.assert_close(target, x * (1 / y[:, None] - 1))
    assert found["output"][1] == limits == (float(target.min()), float(target.max()))
    error, (low, high) = found["output − target"]
    torch.testing.assert_close(error, (x / 4).expand(80, 80))
    torch.testing.assert_close(found["output"][0], target + error)
    assert -low == high == float(error.max())
    for axes in picture.image.axes:
        if axes.images:
            assert axes.images[0].get_extent() == [-1, 1, 0.5, 2]
            assert axes.images[0].origin == "lower"


def test_functions_of_other_numbers_of_inputs_are_not():
    assert Functions(function="j0", train_size=10, test_size=10).pictures(nn.Linear(1, 1)) == {}
    assert Functions(function="exp_sin_4d", train_size=10, test_size=10).pictures(nn.Linear(4, 1)) == {}


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_output_without_error_or_without_value_can_be_drawn(tmp_path, value):
    task = Functions(train_size=10, test_size=10)
    _, failed = draw_pictures(tmp_path, task, Fixed(lambda x: task.truth(x) + value))
    assert not failed


def test_the_solution_of_poissons_equation_is_drawn_with_x_to_the_right():
    task = Poisson(n_interior=8, n_boundary=8, eval_side=2)
    (picture,) = task.pictures(Fixed(lambda x: 0 * x[:, :1])).values()
    at = (torch.arange(80.0, dtype=torch.float64) + 0.5) / 40 - 1
    target = torch.sin(torch.pi * at) * torch.sin(torch.pi * at[:, None] ** 2)
    torch.testing.assert_close(panels(picture)["target"][0], target)
    torch.testing.assert_close(panels(picture)["output − target"][0], -target)


def test_images_and_their_reconstructions_are_drawn_below_each_other():
    task = Autoencoding(dataset="digits", train_size=20, voters=20)
    (picture,) = task.pictures(Fixed(lambda x: 1 - x.flatten(1))).values()
    images = task.test.images[:10, 0] / 16
    assert picture.image.shape == (1, 2 * 64 + 2, 10 * 66 - 2)
    for place, image in enumerate(images):
        shown = picture.image[0, :, 66 * place :][:, :64]
        assert torch.equal(shown[0:64:8, ::8], image.double())
        assert torch.equal(shown[66:130:8, ::8], 1 - image.double())


def test_low_resolution_bicubic_output_and_truth_are_drawn_side_by_side():
    task = SuperResolution(patch=8)
    (picture,) = task.pictures(Fixed(lambda low: 1 - enlarge(low, 2))).values()
    side, zoom = 96, 2
    assert picture.image.shape == (3, 2 * zoom * side + 2, 4 * zoom * side + 6)
    for place in range(2):
        top = place * (zoom * side + 2)
        row = picture.image[:, top : top + zoom * side : zoom, ::1]
        low, bicubic, output, truth = (row[..., k * (zoom * side + 2) :][..., : zoom * side : zoom] for k in range(4))
        whole = task.test[place][1]
        places = [
            (y, x)
            for y in range(0, whole.shape[1] - side + 1, 2)
            for x in range(0, whole.shape[2] - side + 1, 2)
            if torch.equal(whole[:, y : y + side, x : x + side].double(), truth)
        ]
        ((y, x),) = places
        small, large = task.test[place][0], enlarge(task.test[place][0][None], 2)[0]
        expected = small[:, y // 2 : (y + side) // 2, x // 2 : (x + side) // 2].double()
        assert torch.equal(low[:, ::2, ::2], expected)
        assert torch.equal(low[:, 1::2, 1::2], expected)
        assert torch.equal(bicubic, large[:, y : y + side, x : x + side].double())
        assert torch.equal(output, (1 - large)[:, y : y + side, x : x + side].double())
        error = (large - whole).abs().mean(0)
        means = nn.functional.avg_pool2d(error[None], side, stride=2)
        torch.testing.assert_close(error[y : y + side, x : x + side].mean(), means.max())


def test_small_images_are_drawn_whole_and_of_others_a_part_of_their_size():
    task = SuperResolution(patch=8)
    torch.manual_seed(0)
    task.test = Pairs([(torch.rand(2, 3, h, w), torch.rand(2, 3, 2 * h, 2 * w)) for h, w in ((7, 9), (6, 6))], 2)
    (picture,) = task.pictures(Fixed(lambda low: enlarge(low, 2).flatten(1))).values()
    assert picture.image.shape == (3, 4 * 194 - 2, 4 * 194 - 2)
    for place in (2, 3):
        shown = picture.image[:, 194 * place :, 3 * 194 :][:, :192:16, :192:16]
        assert torch.equal(shown, task.test[place][1].double())
