import math

import pytest
import torch
from torch import nn

from archzoo.models.linear_flow import LinearFlowModel
from archzoo.models.model import LayerFactory
from archzoo.models.projector import Projector
from archzoo.models.stylizer import Stylizer
from archzoo.pictures import Picture
from archzoo.tasks.flow_matching import FlowMatching, energy_distance, psnr
from archzoo.tasks.idempotent import Idempotent
from archzoo.tasks.shapes import SHAPES
from archzoo.tasks.style_transfer import STYLES, StyleTransfer
from archzoo.training.pictures import encode


class Made(nn.Module):
    """Gives what it was told to, whatever the input."""

    def __init__(self, made):
        super().__init__()
        self.made = nn.Parameter(made)

    def forward(self, x):
        return self.made[: len(x)]


def test_energy_distance_is_that_of_its_definition():
    a, b = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    across = (0 + 2 + 5 + math.sqrt(9 + 4)) / 4
    torch.testing.assert_close(energy_distance(a, b), torch.tensor(2 * across - 5.0 - 2.0))


@pytest.mark.parametrize("size", [3, 64])
def test_any_model_can_be_trained_by_the_energy_distance(size):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 6, size, generator=generator)
    leaf = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy_distance(leaf, b), leaf)
    twin = a.double().requires_grad_()
    (expected,) = torch.autograd.grad(
        2 * (twin[:, None] - b.double()[None]).norm(dim=-1).mean() - torch.pdist(twin).sum() * 2 / 30, twin
    )
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-3, atol=1e-4)
    close = energy_distance(a, b), energy_distance(a.double(), b.double()).float()
    torch.testing.assert_close(*close, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dataset", SHAPES)
def test_data_scores_near_0_and_noise_near_1(dataset):
    task = FlowMatching(dataset=dataset, eval_size=2000)
    fresh = task.train.__getitems__(list(range(2000)))
    for output, expected in ((fresh[1], 0.0), (fresh[0], 1.0)):
        metrics = task.metrics()
        for part in range(0, 2000, 500):  # in batches, whose distances do not simply add up
            metrics.update(output[part : part + 500], task.test.targets[part : part + 500])
        scores = metrics.compute()
        assert abs(scores["energy_ratio"] - expected) < 0.15
        torch.testing.assert_close(scores["loss"], energy_distance(output, task.test.targets))


def test_pairs_depend_on_the_seed_and_the_place_alone():
    task, again, other = FlowMatching(seed=1), FlowMatching(seed=1), FlowMatching(seed=2)
    for a, b, c in zip(task.train[300], again.train[300], other.train[300], strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert torch.equal(task.test.targets, other.test.targets)
    assert not torch.equal(task.test.targets, task.val.targets)


def test_images_are_those_of_the_split_with_pixels_from_0_to_1():
    task = FlowMatching(dataset="digits", eval_size=300)
    assert task.input_shape == (1, 8, 8)
    assert task.pixel_range == (0.0, 1.0)
    for data in (task.train.__getitems__([0, 1])[1], task.test.targets):
        assert data.min() == 0
        assert data.max() == 1
    with pytest.raises(ValueError, match="eval_size=301"):
        FlowMatching(dataset="digits", eval_size=301)


@pytest.mark.parametrize("dataset", ["two_moons", "digits"])
def test_a_flow_is_asked_whether_one_step_is_many_and_data_come_back(dataset):
    torch.manual_seed(0)
    task = FlowMatching(dataset=dataset, eval_size=20)
    layer = LayerFactory("conv2d" if dataset == "digits" else "linear")
    model = LinearFlowModel(layer, task.input_shape, task.output_size, width=4, depth=1, rank=2, time_dim=4)
    model.train()
    task.training_loss(model, *task.train.__getitems__(list(range(64))))
    figures = task.summarize([], model)
    assert set(figures) == {"one_step_psnr_euler", "one_step_psnr_rk4", "inversion_psnr"}
    assert all(value > 60 for value in figures.values()), figures
    assert model.training
    assert task.summarize([], nn.Linear(2, 2)) == {}


def test_a_flow_that_has_overflowed_has_no_inverse():
    task = FlowMatching(dataset="two_moons", eval_size=20)
    model = LinearFlowModel(LayerFactory("linear"), task.input_shape, task.output_size, width=4, depth=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e30)
    assert math.isnan(task.summarize([], model)["inversion_psnr"])


def drawn(pictures):
    """Names of the pictures; each can be written."""
    for picture in pictures.values():
        assert isinstance(picture, Picture)
        assert encode(picture.image).startswith(b"\x89PNG")
    return set(pictures)


@pytest.mark.parametrize("dataset", ["two_moons", "digits"])
def test_samples_are_drawn_beside_data(dataset):
    pytest.importorskip("matplotlib")
    task = FlowMatching(dataset=dataset, eval_size=30)
    assert drawn(task.pictures(Made(task.val.targets))) == {"samples"}


def test_psnr_is_in_decibels_of_the_target_s_range():
    target = torch.tensor([0.0, 2.0])
    assert psnr(target + 0.02, target) == pytest.approx(40)
    assert psnr(target, target) > 140


def test_a_projection_is_told_from_what_is_none():
    task = Idempotent()

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return (self.scale * x).flatten(1)

    assert task.summarize([], Half())["idempotency_noise"] == pytest.approx(0.5)
    figures = task.summarize([], nn.Flatten())
    assert figures["idempotency_noise"] == 0
    assert figures["denoised_psnr"] == pytest.approx(figures["noisy_psnr"])
    assert figures["noisy_psnr"] == pytest.approx(-20 * math.log10(0.3), abs=0.2)
    torch.manual_seed(0)
    model = Projector(LayerFactory("conv2d"), task.input_shape, 64, width=4, depth=1)
    figures = task.summarize([], model)
    assert figures["idempotency_noise"] < 1e-5
    assert figures["rank"] == model.linearizer.A.rank
    assert drawn(task.pictures(model)) == {"projections"}


def test_styles_are_what_they_say():
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 1.0
    styled = {name: style(x)[0, 0] for name, style in STYLES.items()}
    assert torch.equal(styled["negative"], 1 - x[0, 0])
    assert styled["bold"].sum() == 9
    assert styled["thin"].sum() == 0
    torch.testing.assert_close(styled["blur"][1:4, 1:4], torch.full((3, 3), 1 / 9))
    torch.testing.assert_close(styled["edges"][1, 1:4], torch.tensor([2**0.5 / 4, 0.5, 2**0.5 / 4]))
    assert styled["edges"][2, 2] == 0
    assert (styled["emboss"][2, 2], styled["emboss"][1, 1], styled["emboss"][0, 0]) == (1.0, 0.0, 0.5)
    for image in styled.values():
        assert 0 <= image.min() <= image.max() <= 1


def test_targets_are_all_styles_in_order():
    task = StyleTransfer(styles=["bold", "negative"])
    images, targets = task.train.__getitems__([3, 4])
    assert (task.input_shape, task.output_size) == ((1, 8, 8), 128)
    assert torch.equal(targets.view(2, 2, 1, 8, 8)[:, 1], 1 - images)
    assert torch.equal(task.train[4][1], targets[1])


@pytest.mark.parametrize("kernel_size", [None, 3])
def test_composition_takes_the_model_s_own_pictures_from_style_to_style(kernel_size):
    torch.manual_seed(0)
    task = StyleTransfer(styles=["negative", "blur"])
    model = Stylizer(
        LayerFactory("conv2d"), task.input_shape, task.output_size, width=4, depth=1, kernel_size=kernel_size
    )
    model(task.train.__getitems__(list(range(50)))[0])
    figures = task.summarize([], model)
    assert set(figures) == {"psnr_negative", "psnr_blur", "composed_psnr", "restyled_psnr"}
    assert figures["composed_psnr"] > 80
    assert set(task.summarize([], Made(torch.rand(200, 128)))) == {"psnr_negative", "psnr_blur"}
    with torch.no_grad():
        assert drawn(task.pictures(model.eval())) == {"styles"}
        assert drawn(model.pictures(task)) == {"mixtures"}
        for parameter in model.parameters():
            parameter.mul_(1e30)
    figures = task.summarize([], model)
    assert math.isnan(figures["composed_psnr"])
    assert math.isnan(figures["restyled_psnr"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_moons_in_a_minute(seed):
    torch.manual_seed(seed)
    task = FlowMatching(eval_size=2000, seed=seed)
    model = LinearFlowModel(LayerFactory("linear"), (2,), 2, rank=2, time_dim=16)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    steps = 300
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        batch = task.train.__getitems__(list(range(256 * step, 256 * (step + 1))))
        optimizer.zero_grad()
        task.training_loss(model, *batch).backward()
        optimizer.step()
    metrics = task.metrics()
    with torch.no_grad():
        metrics.update(model.eval()(task.test.inputs), task.test.targets)
        figures = task.summarize([], model)
    assert metrics.compute()["energy_ratio"] <= 0.5
    assert min(figures.values()) > 60
