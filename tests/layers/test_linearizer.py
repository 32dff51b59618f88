"""The algebra of Linearizers, in float64 to 1e-6; nothing of it is approximate but for rounding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import archzoo
from archzoo.layers._operators import LowRankOperator
from archzoo.layers.invertible import Conditioned, Inverse
from archzoo.layers.invertible_nets import InvertibleConvNet, InvertibleMLP
from archzoo.layers.linear_operators import (
    ConstantOperator,
    DenseOperator,
    ProjectorOperator,
    TimeLowRankOperator,
)
from archzoo.layers.linearizer import Linearizer
from archzoo.layers.style_operators import KernelOperator, StyleOperator
from tests.layers.test_invertible import moderate

D = torch.float64
seeds = st.integers(0, 2**31 - 1)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100), dtype=D)


def net(dim, seed=0, **options):
    torch.manual_seed(seed)
    made = moderate(InvertibleMLP(dim, depth=2, hidden=8, dtype=D, **options), seed, 0.1)
    made(randn(32, dim, seed=seed), *([0.0] if options.get("context_dim") else []))  # starts the ActNorms
    return made.eval()


def matrix(out, into, seed, rank=None):
    made = randn(out, into, seed=seed) / into**0.5
    return made if rank is None else randn(out, rank, seed=seed) @ randn(rank, into, seed=seed + 1) / into**0.5


def build(out, into, seed=0, rank=None):
    return Linearizer(net(into, seed), matrix(out, into, seed, rank), net(out, seed + 1))


def close(a, b, atol=1e-6):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= atol * (1 + b.abs().max())


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 5), st.integers(2, 5), st.floats(-2, 2), st.floats(-2, 2))
def test_f_is_linear_between_the_induced_spaces(seed, into, out, a, b):
    f = build(out, into, seed)
    x, other = randn(3, into, seed=seed), randn(3, into, seed=seed + 1)
    close(f(f.combine([a, b], [x, other])), f.combine([a, b], [f(x), f(other)], "y"))
    close(f(f.add(x, other)), f.add(f(x), f(other), space="y"))
    close(f(f.scale(a, x)), f.scale(a, f(x), space="y"))
    close(f(f.zero()), f.zero("y"))


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(-2, 2), st.floats(-2, 2))
def test_the_induced_space_is_a_vector_space_with_an_inner_product(seed, a, b):
    f = build(3, 4, seed)
    x, y, z = (randn(5, 4, seed=seed + k) for k in range(3))
    close(f.add(x, y), f.add(y, x))
    close(f.add(f.add(x, y), z), f.add(x, f.add(y, z)))
    close(f.add(x, f.zero()), x)
    close(f.add(x, f.scale(-1, x)), f.zero().expand(5, 4))
    close(f.scale(a, f.scale(b, x)), f.scale(a * b, x))
    close(f.scale(a, f.add(x, y)), f.add(f.scale(a, x), f.scale(a, y)))
    close(f.scale(a + b, x), f.add(f.scale(a, x), f.scale(b, x)))
    close(f.inner(f.combine([a, b], [x, y]), z), a * f.inner(x, z) + b * f.inner(y, z))
    close(f.inner(x, x), f.norm(x).square())
    numbers = torch.linspace(-1, 1, 5, dtype=D)
    close(f.scale(numbers, x)[1], f.scale(-0.5, x[1]))


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(2, 5), st.integers(2, 5), st.integers(1, 2))
def test_the_pseudo_inverse_meets_penrose_s_rules(seed, into, out, rank):
    f = build(out, into, seed, rank)
    p = f.pinv()
    x, y = randn(4, into, seed=seed), randn(4, out, seed=seed + 1)
    close(f(p(f(x))), f(x))
    close(p(f(p(y))), p(y))
    for product, space in ((f @ p, "y"), (p @ f, "x")):
        a, b = (y, y.flip(0)) if space == "y" else (x, x.flip(0))
        close(f.inner(product(a), b, space), f.inner(a, product(b), space))


@settings(max_examples=10, deadline=None)
@given(seeds, st.integers(2, 6))
def test_f_of_f_is_f_with_a_projector(seed, dim):
    torch.manual_seed(seed)
    f = Linearizer(net(dim, seed), ProjectorOperator(dim, dtype=D))
    x = randn(4, dim, seed=seed)
    close(f(f(x)), f(x))
    assert int(torch.linalg.matrix_rank(f.matrix())) == f.A.rank


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4, 4)], ids=str)
def test_the_transpose_is_the_adjoint(sizes):
    f = build(*sizes)
    x, y = randn(6, sizes[1]), randn(6, sizes[0], seed=1)
    close(f.inner(f(x), y, "y"), f.inner(x, f.T(y), "x"))
    close(f.T.T(x), f(x))
    close(f.transpose()(y), f.T(y))


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4, 4)], ids=str)
def test_singular_points_are_orthonormal_and_f_scales_them(sizes):
    f = build(*sizes)
    u, s, v = f.svd()
    k = min(sizes)
    assert (u.shape, s.shape, v.shape) == ((k, sizes[0]), (k,), (k, sizes[1]))
    close(f(v), f.scale(s, u, "y"))
    for points, space in ((u, "y"), (v, "x")):
        close(f.inner(points[:, None], points[None], space), torch.eye(k, dtype=D))
    assert (s.diff() <= 0).all()


def test_projection_is_onto_the_range_and_the_nearest_point_of_it():
    f = build(5, 4, rank=2)
    y = randn(6, 5, seed=3)
    p = f.project(y)
    close(f.project(p), p)
    close(f.project(f(randn(6, 4))), f(randn(6, 4)))
    rest = f.combine([1.0, -1.0], [y, p], "y")
    close(f.inner(rest, f(randn(6, 4, seed=5)), "y"), torch.zeros(6, dtype=D))
    u = f.svd()[0]
    close(f.project(y, rank=1), f.scale(f.inner(y, u[0], "y"), u[0], "y"))
    with pytest.raises(ValueError, match="rank=3.*from 0 to 2"):
        f.project(y, rank=3)


def test_the_inverse_is_one_and_is_refused_where_there_is_none():
    f, x = build(4, 4), randn(2, 3, 4)
    close(f.inverse(f(x)), x)
    close(f(f.inverse(x)), x)
    with pytest.raises(ValueError, match=r"3 x 4.*pinv"):
        build(3, 4).inverse(randn(2, 3))
    with pytest.raises(ValueError, match="singular.*pinv"):
        Linearizer(net(3), torch.zeros(3, 3, dtype=D)).inverse(randn(2, 3))


def test_composition_cancels_the_nets_in_the_middle():
    g_x, g_m, g_y = net(4, 0), net(3, 1), net(5, 2)
    inner, outer = Linearizer(g_x, matrix(3, 4, 0), g_m), Linearizer(g_m, matrix(5, 3, 1), g_y)
    x = randn(6, 4)
    both = outer @ inner
    close(both(x), outer(inner(x)))
    close(both.matrix(), outer.matrix() @ inner.matrix())
    close(both.T(outer(inner(x))), inner.T(outer.T(outer(inner(x)))))
    calls = []
    g_m.register_forward_hook(lambda *_: calls.append(1))
    both(x)
    assert not calls
    with pytest.raises(ValueError, match="cancel"):
        inner @ outer
    with pytest.raises(TypeError, match="Linearizer"):
        inner.compose(nn.Identity())


def test_nets_with_equal_contexts_cancel_and_others_do_not():
    shared = net(3, context_dim=1)
    ends = [Conditioned(shared, c) for c in (0.0, 1.0, torch.tensor(1.0))]
    first = Linearizer(ends[0], matrix(3, 3, 0), ends[1])
    close(
        (Linearizer(ends[2], matrix(3, 3, 1), ends[0]) @ first)(randn(4, 3)).isfinite().double(),
        torch.ones(4, 3, dtype=D),
    )
    with pytest.raises(ValueError, match="cancel"):
        first @ first
    with pytest.raises(ValueError, match="power: f must map a space to itself"):
        first.power(2)


def test_powers_and_the_exponential():
    f, x = Linearizer(net(3), matrix(3, 3, 4)), randn(5, 3)
    close(f.power(3)(x), f(f(f(x))))
    close(f.power(0)(x), x)
    close(f.power(-1)(x), f.inverse(x))
    close(f.exp()(x), f.combine([1.0] * 3, [f.exp(0.5)(f.exp(0.5)(x)), x, f.scale(-1, x)]))
    steps, h = x, 1 / 4096
    euler = Linearizer(f.g_x, torch.eye(3, dtype=D) + h * f.matrix()).power(4096)
    assert (f.exp()(x) - euler(steps)).abs().max() < 1e-2
    with pytest.raises(ValueError, match="n=0.5"):
        f.power(0.5)


def test_derived_maps_share_parameters_and_follow_them_or_do_not_as_documented():
    f = Linearizer(net(3), DenseOperator(3, dtype=D))
    transposed, product, inverted = f.T, f @ f, f.pinv()
    assert {id(p) for p in transposed.parameters()} == {id(p) for p in f.parameters()}
    before = inverted.matrix().clone()
    with torch.no_grad():
        f.A.weight.mul_(2)
    close(transposed.matrix(), f.matrix().T)
    close(product.matrix(), f.matrix() @ f.matrix())
    close(inverted.matrix(), before)
    product(randn(2, 3)).sum().backward()
    assert f.A.weight.grad.abs().sum() > 0


def test_images_are_points_too_whatever_stands_before_their_axes():
    torch.manual_seed(0)
    g = moderate(InvertibleConvNet(1, depth=1, hidden=4, dtype=D))
    g(randn(8, 1, 4, 4))
    f = Linearizer(g, matrix(16, 16, 0), x_shape=(1, 4, 4))
    x = randn(2, 3, 1, 4, 4)
    close(f(x)[1, 2], f(x[1, 2]))
    close(f.inverse(f(x)), x)
    assert f.zero().shape == (1, 1, 4, 4)
    assert f.norm(x).shape == (2, 3)
    assert f(x[:0]).shape == (0, 3, 1, 4, 4)
    vectors = Linearizer(g, matrix(5, 16, 0), net(5), x_shape=(1, 4, 4), y_shape=(5,))
    assert vectors(x).shape == (2, 3, 5)
    assert vectors.T(vectors(x)).shape == x.shape


def test_a_library_s_flow_is_a_net_too_and_any_object_with_both_ways():
    class Cube:
        def forward(self, x, context=None):
            return x**3

        def inverse(self, z, context=None):
            return z.sign() * z.abs() ** (1 / 3)

    f, x = Linearizer(Cube(), matrix(3, 3, 0)), randn(4, 3)
    close(f.power(2)(x), f(f(x)))
    assert f.zero().shape == (1, 3)


def test_it_is_registered_and_its_gradients_are_right():
    f = archzoo.create_layer("linearizer", net(3), DenseOperator(3, 2, dtype=D), net(2, 1))
    assert isinstance(f, Linearizer)
    inputs = (randn(2, 3).requires_grad_(), f.A.weight)
    assert torch.autograd.gradcheck(lambda x, _: f(x), inputs)
    twin = copy.deepcopy(f)
    close(twin(inputs[0]), f(inputs[0]))
    other = Linearizer(net(3, 5), DenseOperator(3, 2, dtype=D), net(2, 6))
    other.load_state_dict(f.state_dict())
    close(other(inputs[0]), f(inputs[0]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linearizer(nn.Linear(2, 2), torch.eye(2)), TypeError, "g_x"),
        (lambda: Linearizer(net(2), nn.Linear(2, 2)), TypeError, "A="),
        (lambda: Linearizer(net(2), torch.eye(2, requires_grad=True)), ValueError, "DenseOperator"),
        (lambda: Linearizer(net(2), torch.ones(3)), ValueError, r"\(3,\)"),
        (lambda: Linearizer(net(2), torch.eye(2), x_shape=(3,)), ValueError, "x_shape"),
        (lambda: Linearizer(net(2), torch.eye(2, dtype=D)).add(randn(1, 2), randn(1, 2), "z"), ValueError, "space='z'"),
        (lambda: Linearizer(net(2), torch.eye(2, dtype=D)).combine([1.0], []), ValueError, "coeffs"),
        (lambda: Linearizer(net(3), matrix(2, 2, 0))(randn(1, 3)), ValueError, "in_features=2"),
        (lambda: Linearizer(net(4), torch.eye(4, dtype=D), x_shape=(4,))(randn(2, 5)), ValueError, "end with"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- Operators --------------------------------------------------------------------------------------------------------


def operators():
    torch.manual_seed(0)
    kernel = KernelOperator((2, 4, 3), 4, 3, dtype=D)
    with torch.no_grad():
        kernel.weight += 0.3 * torch.randn_like(kernel.weight)
    return {
        "constant": (ConstantOperator(matrix(3, 5, 0)), ()),
        "dense": (DenseOperator(5, 3, dtype=D), ()),
        "low rank in time": (TimeLowRankOperator(5, 2, 4, dtype=D), (0.3,)),
        "projector": (ProjectorOperator(5, dtype=D), ()),
        "kernel": (kernel, (1,)),
        "mixed kernels": (kernel, (torch.tensor([0.5, 0.2, 0.3], dtype=D),)),
        "styles": (StyleOperator(5, 3, dtype=D), (2,)),
        "mixed styles": (StyleOperator(5, 3, dtype=D), (torch.tensor([0.5, 0.2, 0.3], dtype=D),)),
        "low rank": (LowRankOperator(randn(5, 2), randn(5, 2, seed=1), 0.5), ()),
        "thin": (LowRankOperator(randn(5, 2), randn(4, 2, seed=1)), ()),
    }


@pytest.mark.parametrize("name", operators())
def test_an_operator_is_its_matrix(name):
    A, args = operators()[name]
    z, full = randn(2, 3, A.in_features), A.matrix(*args)
    assert full.shape == (A.out_features, A.in_features)
    close(A(z, *args), z @ full.mT)
    close(A.transposed().matrix(*args), full.mT)
    close(A.transposed()(randn(3, A.out_features), *args), randn(3, A.out_features) @ full)
    close(A.pinv(t=args[0]).matrix() if args else A.pinv().matrix(), torch.linalg.pinv(full))
    u, s, v = A.svd(*args)
    close(u * s @ v.mT, full)
    close(u.mT @ u, torch.eye(len(s), dtype=D))
    with pytest.raises(ValueError, match="in_features"):
        A(randn(2, A.in_features + 1), *args)


def test_the_operator_in_time_is_that_of_the_specification():
    torch.manual_seed(0)
    A, t = TimeLowRankOperator(5, 2, 8, dtype=D), torch.tensor([0.2, 0.9], dtype=D)
    w = torch.tensor([10000 ** (-k / 3) for k in range(4)], dtype=D)
    embedding = torch.cat([torch.sin(0.9 * w), torch.cos(0.9 * w)])
    left, right = A.left(embedding).view(5, 2), A.right(embedding).view(5, 2)
    close(A.matrix(0.9), left @ right.T)
    z = randn(2, 3, 5)
    close(A(z, t)[1], A(z[1], 0.9))
    close(A.matrix(t)[1], A.matrix(0.9))
    assert [tuple(A.left[i].weight.shape) for i in (0, 2, 4)] == [(32, 8), (32, 32), (10, 32)]
    for wrong in (None, torch.zeros(3, dtype=D), torch.zeros(2, 3, dtype=D)):
        with pytest.raises(ValueError, match="^t"):
            A(z, wrong)


def test_a_gate_gets_the_gradient_of_its_sigmoid():
    A = ProjectorOperator(3, rank_weight=0.5, dtype=D)
    with torch.no_grad():
        A.gates.copy_(torch.tensor([1.0, -1.0, 2.0]))
    assert A.matrix().tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    A(torch.ones(1, 3, dtype=D)).sum().backward()
    sigmoid = A.gates.detach().sigmoid()
    close(A.gates.grad, sigmoid * (1 - sigmoid))
    close(A.regularization_loss(), 0.5 * sigmoid.sum())


@pytest.mark.parametrize("kind", ["kernels", "matrices"])
def test_styles_mix_as_operators_do(kind):
    A = operators()["kernel"][0] if kind == "kernels" else StyleOperator(24, 3, dtype=D)
    if kind == "matrices":
        with torch.no_grad():
            A.weight += 0.1 * randn(3, 24, 24)
    z = randn(3, 24)
    close(A(z, torch.arange(3)), torch.stack([A(z[i], i) for i in range(3)]))
    weights = torch.tensor([0.25, 0.75, 0.0], dtype=D)
    close(A(z, weights), 0.25 * A(z, 0) + 0.75 * A(z, 1))
    close(A(z, weights.expand(3, 3)), A(z, weights))
    close(A.matrix(weights), 0.25 * A.matrix(0) + 0.75 * A.matrix(1))
    assert A(z[:0], torch.arange(0)).shape == (0, 24)
    for wrong in (None, 3, -1, torch.ones(2), True, torch.arange(2)):
        with pytest.raises(ValueError, match="style"):
            A(z, wrong)


def test_a_style_is_a_kernel_for_each_channel():
    A, _ = operators()["kernel"]
    # One style's kernel at one place: an even kernel reaches further to the right and below.
    image = torch.zeros(2, 4, 3, dtype=D)
    image[0, 1, 1] = 1.0
    expected = torch.zeros(2, 4, 3, dtype=D)
    for row in range(4):
        for column in range(3):
            i, j = 1 - row + 1, 1 - column + 1
            if 0 <= i < 4 and 0 <= j < 4:
                expected[0, row, column] = A.weight[2, 0, i, j]
    close(A(image.flatten(), 2), expected.flatten())
    fresh = KernelOperator((2, 4, 3), 3, 2, dtype=D)
    close(fresh.matrix(1), torch.eye(24, dtype=D))


def test_a_style_or_a_time_can_be_fixed():
    A, _ = operators()["kernel"]
    torch.manual_seed(0)
    g = moderate(InvertibleConvNet(2, depth=1, hidden=4, dtype=D))
    f = Linearizer(g, A, x_shape=(2, 4, 3))
    x = randn(3, 2, 4, 3)
    first, second = f.at(0), f.at(1)
    close(first(x), f(x, 0))
    close((second @ first.pinv())(f(x, 0)), f(x, 1))  # from one style to the other
    with pytest.raises(ValueError, match="leave it out"):
        first(x, 1)


def test_the_adapter_of_the_documentation_s_shape_works_turned_round():
    f = Linearizer(Inverse(net(3)), matrix(3, 3, 0))
    x = randn(4, 3)
    close(f.inverse(f(x)), x, 1e-5)
