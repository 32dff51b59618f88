import math

import pytest
import torch
from torch.nn import functional as F

from archzoo.layers._collapse import rk4_step
from archzoo.layers._operators import LowRankOperator
from archzoo.layers.invertible import Conditioned
from archzoo.layers.invertible_nets import InvertibleConvNet, InvertibleMLP
from archzoo.layers.linear_flow import METHODS, LinearFlow
from archzoo.layers.linear_operators import DenseOperator, TimeLowRankOperator
from tests.layers.test_invertible import moderate, randn

D = torch.float64


def flow(dim=6, rank=2, dtype=D, **options):
    torch.manual_seed(0)
    net = moderate(InvertibleMLP(dim, depth=2, hidden=8, dtype=dtype), size=0.1)
    net(randn(32, dim, dtype=dtype))
    operator = TimeLowRankOperator(dim, rank, 8, dtype=dtype)
    with torch.no_grad():  # of the size that training gives it
        for perceptron in (operator.left, operator.right):
            perceptron[4].weight.mul_(3)
            perceptron[4].bias.mul_(3)
    return LinearFlow(operator, net, **options)


def psnr(a, b):
    span = b.max() - b.min()
    return 20 * math.log10(span / (a - b).square().mean().sqrt().clamp_min(1e-30))


@pytest.mark.parametrize("denoise_last", [True, False], ids=["to the end", "one step short"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_one_step_is_all_steps(steps, method, denoise_last):
    made, x0 = flow(), randn(50, 6, dtype=D)
    collapsed = made.collapse(steps, method, denoise_last)
    expected = made.sample(x0, steps, method, denoise_last)
    torch.testing.assert_close(collapsed(x0), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made(x0, steps, method, denoise_last), collapsed(x0))


@pytest.mark.parametrize("method", METHODS)
def test_one_step_is_a_hundred_to_sixty_decibels_in_float32(method):
    made, x0 = flow(16, 4, torch.float32), randn(200, 16)
    for denoise_last in (True, False):
        with torch.no_grad():
            assert psnr(made(x0, 100, method, denoise_last), made.sample(x0, 100, method, denoise_last)) > 60


@pytest.mark.parametrize("method", METHODS)
def test_the_matrix_is_the_product_of_the_papers_step_matrices(method):
    made, steps = flow(), 7
    A, h, eye = made.operator.matrix, 1 / 7, torch.eye(6, dtype=D)

    def velocity(t):
        return (A(t) - eye) / (1 - t)

    B = eye
    for i in range(steps - 1):
        t = i * h
        K1 = velocity(t)
        M = eye + h * K1
        if method == "rk4":
            K2 = velocity(t + h / 2) @ (eye + h / 2 * K1)
            K3 = velocity(t + h / 2) @ (eye + h / 2 * K2)
            K4 = velocity(t + h) @ (eye + h * K3)
            M = eye + h / 6 * (K1 + 2 * K2 + 2 * K3 + K4)
        B = M @ B
    torch.testing.assert_close(made.collapse(steps, method, False).matrix(), B)
    torch.testing.assert_close(made.collapse(steps, method).matrix(), A(1 - h) @ B)


def test_rk4_is_of_fourth_order():
    made = flow()

    def at_half(n):  # the matrix from 0 to 1/2
        B, h = torch.eye(6, dtype=D), 0.5 / n
        for i in range(n):
            c, P, Q = rk4_step(
                *made.operator.factors(torch.tensor([i * h, (i + 0.5) * h, (i + 1) * h], dtype=D)), i * h, h
            )
            B = c * B + P @ (Q.mT @ B)
        return B.detach()

    truth = at_half(256)
    errors = [(at_half(n) - truth).abs().max().item() for n in (4, 8)]
    assert errors[0] / errors[1] > 12


def test_rank_stays_low_and_is_never_formed_where_it_need_not_be():
    made = flow(64, 2)
    assert isinstance(made.collapse(100).A, LowRankOperator)
    assert made.collapse(100).A.left.shape == (64, 2)
    assert made.collapse(100, "rk4").A.left.shape == (64, 2)
    assert made.collapse(11, "euler", False).A.left.shape == (64, 20)
    assert made.collapse(11, "rk4", False).A.left.shape == (64, 60)
    assert not isinstance(made.collapse(12, "rk4", False).A, LowRankOperator)  # 66 columns would be more than 64


def test_any_square_operator_collapses():
    torch.manual_seed(0)
    net = InvertibleMLP(4, depth=1, dtype=D).eval()
    made, x0 = LinearFlow(DenseOperator(4, dtype=D), net), randn(9, 4, dtype=D)
    for method in METHODS:
        torch.testing.assert_close(made.collapse(5, method)(x0), made.sample(x0, 5, method))


def test_pictures_go_to_noise_and_back():
    torch.manual_seed(0)
    net = moderate(InvertibleConvNet(1, depth=2, hidden=4, context_dim=1, dtype=D))
    x = randn(3, 1, 4, 4, dtype=D)
    net(randn(16, 1, 4, 4, dtype=D), 1.0)
    made = LinearFlow(
        TimeLowRankOperator(16, 2, 8, dtype=D), Conditioned(net, 0.0), Conditioned(net, 1.0), shape=(1, 4, 4)
    )
    f = made.collapse(10, denoise_last=False)
    torch.testing.assert_close(f(f.pinv()(x)), x, rtol=1e-6, atol=1e-6)
    assert made.sample(x).shape == made(x).shape == x.shape


def test_the_loss_is_that_of_the_specification():
    made = flow()
    made.train()
    net = made.g_noise
    x1, x0, t = randn(5, 6, dtype=D), randn(5, 6, seed=1, dtype=D), torch.linspace(0, 0.9, 5, dtype=D)
    e0, e1 = randn(5, 6, seed=2, dtype=D), randn(5, 6, seed=3, dtype=D)
    z0, z1 = net(x0), net(x1)
    p = torch.stack([made.operator((1 - s) * a + s * b, s) for a, b, s in zip(z0, z1, t, strict=True)])
    expected = (
        F.mse_loss(p, z1)
        + F.mse_loss(x0, net.inverse(z0 + 0.2 * e0))
        + F.mse_loss(x1, net.inverse(z1 + 0.2 * e1))
        + F.mse_loss(x1, net.inverse(p))
    )
    torch.testing.assert_close(made.loss(x1, x0, t, noise_level=0.2, noise=(e0, e1)), expected)
    calls = []
    made.loss(x1, metric=lambda a, b: calls.append((a.shape, b.shape)) or (a - b).abs().mean()).backward()
    assert calls == [((5, 6), (5, 6))] * 2
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_autocast_leaves_sampling_and_collapse_as_they_are():
    made, x0 = flow(8, 2, torch.float32), randn(20, 8)
    with torch.no_grad():
        expected = made.collapse(20).matrix()
        with torch.autocast("cpu", torch.bfloat16):
            collapsed = made.collapse(20)
            assert psnr(made.sample(x0, 20), made(x0, 20)) > 60
            assert made(x0.bfloat16(), 20).dtype == made.sample(x0.bfloat16(), 20).dtype == torch.float32
        assert torch.equal(collapsed.matrix(), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearFlow(DenseOperator(4, 3), InvertibleMLP(4)), ValueError, "3 x 4"),
        (lambda: LinearFlow(torch.eye(4), InvertibleMLP(4)), TypeError, "operator="),
        (lambda: LinearFlow(DenseOperator(4), torch.nn.Linear(4, 4)), TypeError, "g_noise"),
        (lambda: LinearFlow(DenseOperator(4), InvertibleMLP(4), shape=(5,)), ValueError, "x_shape"),
        (lambda: flow().sample(randn(1, 6), steps=0), ValueError, "steps=0"),
        (lambda: flow().collapse(method="rk"), ValueError, "method='rk'"),
        (lambda: TimeLowRankOperator(4, time_dim=5), ValueError, "time_dim=5"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
