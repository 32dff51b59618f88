"""The Linearizer's three uses as models of the trainer."""

import pytest
import torch

from archzoo.layers.linear_flow import LinearFlow
from archzoo.models.linear_flow import LinearFlowModel
from archzoo.models.model import LayerFactory
from archzoo.models.projector import Projector
from archzoo.models.stylizer import Stylizer
from archzoo.tasks.flow_matching import FlowMatching
from archzoo.tasks.idempotent import Idempotent
from archzoo.tasks.style_transfer import StyleTransfer
from tests.layers.test_invertible import moderate, randn

LINEAR, CONV = LayerFactory("linear"), LayerFactory("conv2d")
SMALL = {"width": 4, "depth": 1}


def test_the_flow_is_trained_by_its_own_loss_on_noise_and_data():
    torch.manual_seed(0)
    model = LinearFlowModel(LINEAR, (2,), 2, rank=2, time_dim=4, noise_level=0.2, **SMALL)
    noise, data = randn(8, 2), randn(8, 2, seed=1)
    model(noise)
    torch.manual_seed(1)
    loss = FlowMatching(eval_size=2).training_loss(model, noise, data)
    torch.manual_seed(1)
    assert torch.equal(loss, model.flow.loss(data, noise, noise_level=0.2))
    torch.testing.assert_close(model.eval()(noise), model.flow.sample(noise, 100), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioned", [False, True], ids=["one map", "two faces"])
def test_images_are_made_by_convolutions(conditioned):
    torch.manual_seed(0)
    model = LinearFlowModel(CONV, (1, 4, 4), 16, time_dim=4, steps=3, conditioned=conditioned, **SMALL)
    moderate(model)
    x = randn(5, 1, 4, 4)
    loss = model.training_loss(None, x, x.flatten(1))
    loss.backward()
    assert model(x).shape == (5, 16)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    z = [space.encode(x) for space in (model.flow.noise_space, model.flow.data_space)]
    assert torch.equal(*z) != conditioned


@pytest.mark.parametrize("name", ["linear", "fast_kan", "aptx"])
def test_conditioners_are_made_of_any_layer(name):
    torch.manual_seed(0)
    model = LinearFlowModel(LayerFactory(name), (2,), 2, time_dim=4, widths=(4, 6))
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(type(LayerFactory(name)(2, 2))) >= 8
    assert len(model.flow.g_noise) == 2
    assert not isinstance(model.flow, torch.nn.Sequential)
    assert isinstance(model.flow, LinearFlow)


def test_the_projector_is_one_on_whatever_input():
    torch.manual_seed(0)
    model = moderate(Projector(CONV, (1, 4, 4), 16, **SMALL).double())
    task, x = Idempotent(), randn(6, 1, 4, 4, dtype=torch.float64)
    model.training_loss(task, x, x.flatten(1))  # starts from data
    for inputs in (x, 3 * randn(6, 1, 4, 4, seed=1, dtype=torch.float64)):
        once = model(inputs).view_as(inputs)
        torch.testing.assert_close(model(once).view_as(once), once, rtol=1e-6, atol=1e-6)


def test_the_projector_s_loss_is_the_task_s_and_the_isometry_s():
    torch.manual_seed(0)
    model = moderate(Projector(CONV, (1, 4, 4), 16, isometry_weight=0.5, rank_weight=0.2, **SMALL))
    task, x = Idempotent(), randn(6, 1, 4, 4)
    model(x)
    z, origin = (model.linearizer.g_x(v).flatten(1) for v in (x, torch.zeros(1, 1, 4, 4)))
    gap = ((z - origin).square().mean(1) - x.flatten(1).square().mean(1)).abs().mean()
    expected = task.loss(model(x), x.flatten(1)) + 0.5 * gap
    torch.testing.assert_close(task.training_loss(model, x, x.flatten(1)), expected)
    gates = model.linearizer.A
    torch.testing.assert_close(gates.regularization_loss(), 0.2 * gates.gates.sigmoid().mean())
    shut = model.encode(x)[:, gates.gates <= 0]
    assert shut.numel()
    assert not shut.any()


@pytest.mark.parametrize("kernel_size", [None, 3])
def test_the_stylizer_draws_each_style_and_mixes_operators(kernel_size):
    torch.manual_seed(0)
    model = moderate(Stylizer(CONV, (1, 4, 4), 48, kernel_size=kernel_size, **SMALL))
    with torch.no_grad():
        model.linearizer.A.weight.add_(0.1 * randn(*model.linearizer.A.weight.shape))
    x = randn(5, 1, 4, 4)
    model(x)
    drawn = model.eval()(x).view(5, 3, 1, 4, 4)
    for style in range(3):
        torch.testing.assert_close(drawn[:, style], model.linearizer(x, style))
    f = model.linearizer
    mixed = f.combine([0.25, 0.75], [f(x, 0), f(x, 2)], "y")
    torch.testing.assert_close(f(x, torch.tensor([0.25, 0.0, 0.75])), mixed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearFlowModel(LINEAR, (2,), 10), "task=flow_matching"),
        (lambda: LinearFlowModel(CONV, (2,), 2), "conv2d"),
        (lambda: LinearFlowModel(LINEAR, (1, 4, 4), 16), "linear"),
        (lambda: LinearFlowModel(CONV, (1, 3, 4), 12), "even height and width"),
        (lambda: LinearFlowModel(LINEAR, (2, 2), 4), "vectors and images"),
        (lambda: LinearFlowModel(LINEAR, (2,), 2, depth=0), "depth=0"),
        (lambda: LinearFlowModel(LINEAR, (2,), 2, method="rk"), "method='rk'"),
        (lambda: LinearFlowModel(LINEAR, (2,), 2, steps=0), "steps=0"),
        (lambda: LinearFlowModel(LINEAR, (2,), 2, noise_level=-1.0), "noise_level=-1.0"),
        (lambda: Projector(CONV, (1, 4, 4), 10), "task=idempotent"),
        (lambda: Projector(CONV, (1, 4, 4), 16, rank_weight=-1.0), "rank_weight=-1.0"),
        (lambda: Stylizer(LINEAR, (1, 4, 4), 16), "linear"),
        (lambda: Stylizer(CONV, (1, 4, 4), 17), "task=style_transfer"),
        (lambda: Stylizer(CONV, (1, 4, 4), 32, kernel_size=0), "kernel_size=0"),
        (lambda: StyleTransfer(styles=["negatif"]), "negative"),
        (lambda: StyleTransfer(styles=["edges", "edges"]), "different names"),
        (lambda: FlowMatching(dataset="two_moon"), "two_moons"),
        (lambda: FlowMatching(eval_size=1), "eval_size=1"),
        (lambda: Idempotent(noise=-1.0), "noise=-1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
