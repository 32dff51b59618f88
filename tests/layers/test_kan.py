"""KANLinear: what its spec alone says. What every layer owes is in test_contract.py, the basis in tests/kernels."""

import copy
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from archzoo.kernels.kan_spline import cox_de_boor
from archzoo.layers.kan import KANLinear
from tests.helpers import rms_error

double = {"dtype": torch.float64}


def generic(*sizes: int, adaptive: bool = True, **options) -> KANLinear:
    """A layer in float64 with visible splines, and with a grid fitted to samples."""
    layer = KANLinear(*sizes, scale_noise=5.0, **{**double, **options})
    if adaptive:
        layer.update_grid(samples(200, sizes[0]))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.rand_like(parameter) * 0.2
    return layer


def samples(n: int, features: int, scale: float = 1.0) -> Tensor:
    return (torch.rand(n, features, **double) * 2 - 1) * scale


def by_definition(layer: KANLinear, x: Tensor) -> Tensor:
    """phi_oi(x_i) from the equation, one edge at a time: (N, O, I)."""
    base = {"silu": nn.functional.silu, "tanh": torch.tanh}[layer.base_activation]
    phi = x.new_zeros(x.shape[0], layer.out_features, layer.in_features)
    for i in range(layer.in_features):
        basis = cox_de_boor(x[:, i].unsqueeze(0), layer.grid[i : i + 1], layer.spline_order)[0]  # (K, N)
        for o in range(layer.out_features):
            spline = layer.spline_weight[o, i] @ basis
            if layer.spline_scaler is not None:
                spline = spline * layer.spline_scaler[o, i]
            phi[:, o, i] = layer.base_weight[o, i] * base(x[:, i]) + spline
            if layer.mask is not None:
                phi[:, o, i] *= layer.mask[o, i]
    return phi


# --- The equation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    "options", [{}, {"standalone_scale": True, "base_activation": "tanh"}], ids=["plain", "scaled"]
)
def test_output_is_the_equation(order, adaptive, options):
    layer = generic(3, 4, spline_order=order, adaptive=adaptive, **options)
    layer.prune_edges_(0.5, torch.rand(4, 3))
    x = samples(50, 3, 2.0)
    with torch.no_grad():
        phi = by_definition(layer, x)
        assert rms_error(layer.edge_functions(x), phi) < 1e-12
        assert rms_error(layer(x), phi.sum(-1) + layer.bias) < 1e-12
        assert layer.basis(x).shape == (50, 3, layer.grid_size + order)


@pytest.mark.parametrize("base", ["silu", "gelu", "relu", "tanh", "identity"])
def test_named_and_callable_bases_agree(base):
    layer = generic(3, 4, base_activation=base, adaptive=False)
    functions = {**vars(nn.functional), "tanh": torch.tanh, "identity": lambda x: x}
    function = functions[base]
    other = KANLinear(3, 4, base_activation=lambda x: function(x), **double)
    other.load_state_dict(layer.state_dict())
    x = samples(20, 3, 2.0)
    assert rms_error(layer(x), other(x)) < 1e-13
    assert rms_error(layer.edge_functions(x), other.edge_functions(x)) < 1e-13
    assert rms_error(layer.edge_scale(x), other.edge_scale(x)) < 1e-12


@pytest.mark.parametrize("base", ["zero", None])
def test_no_base_means_no_base_weight(base):
    layer = KANLinear(3, 4, base_activation=base)
    assert layer.base_weight is None
    assert set(layer.state_dict()) == {"spline_weight", "bias", "grid"}
    x = torch.rand(9, 3)
    assert rms_error(layer(x), layer.edge_functions(x).sum(-1)) < 1e-6


def test_state_has_the_names_and_shapes_of_the_spec():
    layer = KANLinear(3, 4, grid_size=6, spline_order=2, standalone_scale=True)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "base_weight": (4, 3),
        "spline_weight": (4, 3, 8),
        "spline_scaler": (4, 3),
        "bias": (4,),
        "grid": (3, 11),
    }
    assert layer.mask is None
    assert KANLinear(3, 4, False).bias is None
    assert KANLinear(3, 4).spline_scaler is None


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_initial_splines_pass_through_small_noise_at_the_inner_knots(order):
    layer = KANLinear(40, 50, spline_order=order, grid_size=4, scale_noise=0.3, scale_spline=2.0, **double)
    knots = layer.grid[:, order : order + 5].t().clone()
    knots[-1] -= 1e-12  # the last cell is open on the right
    at_knots = torch.einsum("nik,oik->noi", layer.basis(knots), layer.spline_weight.detach())
    limit = 0.5 * 0.3 / 4 * 2.0
    assert 0.95 * limit < at_knots.abs().max() <= limit * (1 + 1e-9)
    assert abs(at_knots.std() / (limit / 3**0.5) - 1) < 0.05
    # of minimum norm: in the row space of the basis at the knots
    basis = layer.basis(knots)[:, 0]
    projector = torch.linalg.pinv(basis) @ basis
    assert rms_error(layer.spline_weight @ projector, layer.spline_weight) < 1e-8


def test_initial_scales_grow_with_their_arguments():
    """efficient-kan's shrink: it multiplies the a of kaiming_uniform."""
    layer = KANLinear(64, 200, scale_base=3.0, scale_spline=0.5, standalone_scale=True)
    for weight, bound in ((layer.base_weight, 3 / 8), (layer.spline_scaler, 0.5 / 8)):
        assert 0.98 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.03
    assert not layer.bias.any()
    torch.testing.assert_close(layer.grid[0], (torch.arange(12) - 3) * 0.4 - 1)


def test_extrapolation_is_of_the_spline_alone():
    x = torch.tensor([[1.7], [-2.0]], **double)
    end, inward = x.clamp(-1, 1), x.clamp(-1, 1) * (1 - 1e-6)
    for extrapolation in ("zero", "clamp", "linear"):
        torch.manual_seed(0)
        layer = generic(1, 3, adaptive=False, extrapolation=extrapolation)
        base = layer.base_weight * nn.functional.silu(x).unsqueeze(1)
        spline = (layer.edge_functions(x) - base).squeeze(-1)
        at_end = (layer.edge_functions(end) - layer.base_weight * nn.functional.silu(end).unsqueeze(1)).squeeze(-1)
        near = (layer.edge_functions(inward) - layer.base_weight * nn.functional.silu(inward).unsqueeze(1)).squeeze(-1)
        tangent = (at_end - near) / (end - inward)
        if extrapolation == "clamp":
            torch.testing.assert_close(spline, at_end, rtol=0, atol=1e-9)
        elif extrapolation == "linear":
            torch.testing.assert_close(spline, at_end + tangent * (x - end), rtol=0, atol=1e-4)
        else:
            far = torch.tensor([[2.3], [-2.3]], **double)  # beyond the outermost knots at 2.2
            torch.testing.assert_close(layer(far), layer.bias + nn.functional.silu(far) @ layer.base_weight.t())


def test_basis_derivatives_and_second_order_training():
    """A PINN's loss: the second derivative of a two-layer net by its input, then the gradient by the weights."""
    net = nn.Sequential(generic(1, 4, adaptive=False), generic(4, 1, adaptive=False))
    x = torch.linspace(-0.9, 0.9, 7, **double).unsqueeze(1).requires_grad_()

    def second(points: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
        return torch.autograd.grad(slope.sum(), points, create_graph=True)[0]

    h = 1e-4
    by_differences = (net(x + h) - 2 * net(x) + net(x - h)) / h**2
    torch.testing.assert_close(second(x), by_differences, rtol=1e-3, atol=1e-2)  # the third derivative jumps at knots
    loss = second(x).square().mean()
    gradients = torch.autograd.grad(loss, [net[0].spline_weight, net[1].spline_weight])
    for layer, gradient in zip(net, gradients, strict=True):
        direction = torch.randn_like(layer.spline_weight)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                layer.spline_weight += sign * h * direction
            losses.append(second(x).square().mean())
            with torch.no_grad():
                layer.spline_weight -= sign * h * direction
        torch.testing.assert_close(
            (gradient * direction).sum(), (losses[0] - losses[1]) / (2 * h), rtol=1e-5, atol=1e-6
        )
    basis = net[0].basis(x, derivative=1)
    torch.testing.assert_close(basis, (net[0].basis(x + h) - net[0].basis(x - h)) / (2 * h), rtol=0, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
def test_bf16_modules_and_autocast_find_the_cell_in_float32(adaptive):
    """On a fine grid a bf16 position would be several cells off."""
    layer = generic(4, 3, grid_size=200, grid_range=(-0.5, 1.5), adaptive=adaptive).float()
    x = samples(500, 4).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert rms_error(y, layer(x)) < 6e-3
    assert layer.basis(x.bfloat16()).dtype == torch.float32


def test_what_is_kept_for_the_backward_is_within_four_inputs():
    layer, x = KANLinear(64, 64), torch.rand(1024, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(size for at, size in storages.items() if at not in own) <= x.nbytes  # x itself


# --- Grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("on_samples", [False, True])
def test_refining_to_a_multiple_changes_nothing_inside_the_grid(order, adaptive, on_samples):
    layer = generic(3, 4, spline_order=order, grid_size=4, adaptive=adaptive, standalone_scale=True)
    inner = layer.grid[:, order : order + 5]
    x = inner[:, :1].t() + torch.rand(2000, 3, **double) * (inner[:, -1:] - inner[:, :1]).t() * (1 - 1e-9)
    before, old = layer(x).detach(), layer.spline_weight
    layer.refine(12, x if on_samples else None)
    assert layer.grid_size == 12
    assert layer.grid.shape == (3, 13 + 2 * order)
    assert layer.spline_weight.shape == (4, 3, 12 + order)
    assert layer.spline_weight is not old
    assert layer.spline_weight.is_contiguous()
    assert (layer(x) - before).abs().max() < 1e-9
    assert (layer.spline.step is None) == adaptive


def test_refined_knots_divide_the_old_ones_by_index():
    layer = generic(2, 2, grid_size=3)
    old = layer.grid[:, 3:7].clone()
    layer.refine(5)
    at = [0, 0.6, 1.2, 1.8, 2.4, 3]
    want = torch.stack([old[:, math.floor(a)] * (1 - a % 1) + old[:, math.ceil(a)] * (a % 1) for a in at], 1)
    torch.testing.assert_close(layer.grid[:, 3:9], want)
    step = (want[:, -1] - want[:, 0]) / 5
    torch.testing.assert_close(layer.grid[:, :3], want[:, :1] - step[:, None] * torch.tensor([3, 2, 1]))
    torch.testing.assert_close(layer.grid[:, 9:], want[:, -1:] + step[:, None] * torch.tensor([1, 2, 3]))


def test_updated_knots_mix_quantiles_and_even_steps():
    layer, x = KANLinear(2, 3, grid_size=4, grid_eps=0.3, **double), samples(103, 2, 3.0)
    layer.update_grid(x, margin=0.05)
    ordered = x.sort(0).values.t()
    adaptive = ordered[:, [0, 25, 51, 76, 102]]  # trunc(linspace(0, 102, 5))
    step = (ordered[:, -1:] - ordered[:, :1] + 0.1) / 4
    uniform = ordered[:, :1] - 0.05 + torch.arange(5) * step
    inner = 0.3 * uniform + 0.7 * adaptive
    torch.testing.assert_close(layer.grid[:, 3:8], inner)
    torch.testing.assert_close(layer.grid[:, :3], inner[:, :1] - step * torch.tensor([3, 2, 1]))
    torch.testing.assert_close(layer.grid[:, 8:], inner[:, -1:] + step * torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("extrapolation", ["zero", "linear"])
def test_updating_the_grid_keeps_a_cubic(scaled, extrapolation):
    """With a scaler too: efficient-kan applies it twice, and moves outputs by several standard deviations."""
    layer = generic(2, 3, adaptive=False, standalone_scale=scaled, extrapolation=extrapolation)
    points = torch.linspace(-1, 1 - 1e-9, 100, **double).unsqueeze(1).expand(-1, 2)
    cubics = torch.stack([points[:, 0] ** p for p in range(4)], 1) @ torch.randn(4, 6, **double)
    coefficients = torch.linalg.lstsq(layer.basis(points)[:, 0], cubics).solution  # exact: splines hold every cubic
    with torch.no_grad():
        layer.spline_weight.copy_(coefficients.t().view(3, 2, 8))
        if scaled:
            layer.spline_scaler.uniform_(0.1, 3.0)
    parameter, x = layer.spline_weight, samples(400, 2, 0.9)
    untouched = {n: p.clone() for n, p in layer.named_parameters() if n != "spline_weight"}
    before = layer(x).detach()
    layer.update_grid(x)
    assert layer.spline_weight is parameter
    assert layer.spline.step is None
    assert (layer(x) - before).abs().max() < 1e-8
    assert all(torch.equal(p, layer.get_parameter(n)) for n, p in untouched.items())


DEGENERATE = {
    "constant": torch.full((50, 1), 0.3),
    "zeros": torch.zeros(50, 1),
    "binary": torch.tensor([0.0, 1.0]).repeat(25).unsqueeze(1),
    "two samples": torch.tensor([[0.1], [0.7]]),
    "one sample": torch.tensor([[0.4]]),
    "far away": torch.linspace(1e4, 1e4 + 1, 50).unsqueeze(1),
}


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("x", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("margin", [0.01, 0.0])
def test_degenerate_samples_give_finite_splines(x, order, margin):
    """lstsq on CUDA assumes full rank: the source of pykan's NaN reports."""
    layer = KANLinear(1, 3, spline_order=order, scale_noise=1.0)
    before = layer(x).detach()
    layer.update_grid(x, margin=margin)
    assert layer(x).isfinite().all()
    assert layer.spline_weight.isfinite().all()
    if margin and x.abs().max() <= 1 and order:
        torch.testing.assert_close(layer(x).detach(), before, rtol=0, atol=1e-4)
    layer.refine(7, x)
    assert layer(x).isfinite().all()
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


def test_refitting_in_blocks_is_the_same(monkeypatch):
    first, x = generic(3, 2), samples(1000, 3)
    second = copy.deepcopy(first)
    first.update_grid(x)
    monkeypatch.setattr("archzoo.layers._splines._REFIT_BLOCK", 2000)
    second.update_grid(x)
    assert rms_error(second.spline_weight, first.spline_weight) < 1e-7


def test_lbfgs_goes_on_after_refining_and_reaches_the_papers_example():
    """exp(sin(pi x) + y^2) by [2, 5, 1], 300 iterations; 2.1e-3 to 3.0e-3 from five seeds without refining."""
    x = samples(2000, 2)
    y = torch.exp(torch.sin(math.pi * x[:, :1]) + x[:, 1:] ** 2)
    net = nn.Sequential(KANLinear(2, 5, **double), KANLinear(5, 1, **double))

    def train(steps: int) -> float:
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (net(x[:1000]) - y[:1000]).square().mean()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        with torch.no_grad():
            return (net(x[1000:]) - y[1000:]).square().mean().sqrt().item()

    assert train(15) < 6e-3
    for layer in net:
        layer.refine(10)
    refined = train(3)
    assert refined < 6e-3


def test_update_grid_and_refine_refuse_what_they_cannot_do():
    layer = KANLinear(2, 3)
    with pytest.raises(ValueError, match="grid_size=4: must be a whole number, at least 5"):
        layer.refine(4)
    with pytest.raises(ValueError, match="at least one"):
        layer.update_grid(torch.rand(0, 2))
    with pytest.raises(ValueError, match="all finite"):
        layer.update_grid(torch.tensor([[0.0, math.nan]]))
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\).*in_features=2"):
        layer.update_grid(torch.rand(4, 3))
    with pytest.raises(ValueError, match="margin=-1"):
        layer.update_grid(torch.rand(4, 2), margin=-1)


# --- Regularisation, pruning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_edge_scale_is_the_deviation_of_the_edge_functions(normalize):
    layer, x = generic(3, 4, standalone_scale=True), samples(60, 3)
    layer.prune_edges_(0.5, torch.rand(4, 3))
    want = layer.edge_functions(x).std(0)
    if normalize:
        want = want / (x.std(0) + 0.1)
    assert rms_error(layer.edge_scale(x, normalize), want) < 1e-12
    assert rms_error(layer.edge_scale(x.view(6, 10, 3), normalize), want) < 1e-12


def test_edge_scale_is_differentiable_also_where_an_edge_is_constant():
    layer = generic(2, 3, adaptive=False)
    x = samples(30, 2).requires_grad_()
    weights = [layer.base_weight, layer.spline_weight]

    def scale(x: Tensor, base: Tensor, spline: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"base_weight": base, "spline_weight": spline}, (x,), strict=False)

    layer.forward = layer.edge_scale
    assert torch.autograd.gradcheck(scale, [x, *weights], fast_mode=True)
    layer.prune_edges_(1.0, torch.zeros(3, 2))
    assert not layer.edge_scale(x).any()
    layer.activation_regularization(x).backward()
    assert all(t.grad.isfinite().all() for t in (x, *weights))
    assert not layer.edge_scale(x[:1]).any()


def test_activation_regularization_is_pykans():
    layer, x = generic(3, 4), samples(60, 3)
    v = layer.edge_functions(x).std(0) / (x.std(0) + 0.1)
    r, c = v / (v.sum(1, keepdim=True) + 1), v / (v.sum(0, keepdim=True) + 1)
    entropy = -(r * torch.log2(r + 1e-4)).sum(1).mean() - (c * torch.log2(c + 1e-4)).sum(0).mean()
    torch.testing.assert_close(layer.activation_regularization(x), v.sum() + 2 * entropy)
    torch.testing.assert_close(layer.activation_regularization(x, 0.5, 3.0), 0.5 * v.sum() + 3 * entropy)


def test_regularization_loss():
    assert KANLinear(3, 4).regularization_loss().item() == 0.0
    layer = generic(3, 4, adaptive=False, regularize_activation=0.7, regularize_entropy=0.2)
    a = layer.spline_weight.abs().mean(-1)
    p = a / a.sum()
    torch.testing.assert_close(layer.regularization_loss(), 0.7 * a.sum() - 0.2 * (p * p.log()).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pruned", ["some", "all"])
def test_regularization_loss_is_finite_with_pruned_edges(pruned, dtype):
    """Upstream gives NaN."""
    layer = KANLinear(3, 4, regularize_activation=1.0, regularize_entropy=1.0, dtype=dtype)
    scores = torch.zeros(4, 3)
    scores[1] = 0.0 if pruned == "all" else 1.0
    layer.prune_edges_(0.5, scores)
    loss = layer.regularization_loss()
    loss.backward()
    assert loss.isfinite()
    assert layer.spline_weight.grad.isfinite().all()
    assert not layer.spline_weight.grad[0].any()


def test_pruned_edges_are_gone_and_stay_gone():
    layer, x = generic(3, 4), samples(20, 3)
    scores = torch.arange(12.0).view(4, 3)
    layer.prune_edges_(5, scores)
    assert torch.equal(layer.mask, (scores >= 5).double())
    assert not layer.edge_functions(x)[:, 0].any()
    layer.prune_edges_(5, 11 - scores)
    assert layer.mask.sum() == 2
    layer(x).sum().backward()
    assert not layer.base_weight.grad[0].any()
    by_weight = generic(3, 4)
    by_weight.prune_edges_(by_weight.spline_weight.abs().mean(-1).median().item())
    assert by_weight.mask.sum() == 7  # the median of twelve is the sixth
    with pytest.raises(ValueError, match=re.escape("scores has shape (3, 4); it must be one number an edge, (4, 3)")):
        layer.prune_edges_(0.0, torch.zeros(3, 4))


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
def test_subset_and_kept_outputs(adaptive):
    layer, x = generic(4, 5, adaptive=adaptive, standalone_scale=True), samples(20, 4)
    layer.prune_edges_(0.3, torch.rand(5, 4))
    phi = layer.edge_functions(x)
    small = layer.subset([2, 0], torch.tensor([True, False, False, True, True]))
    assert (small.in_features, small.out_features) == (2, 3)
    assert rms_error(small.edge_functions(x[:, [2, 0]]), phi[:, [0, 3, 4]][:, :, [2, 0]]) < 1e-14
    assert rms_error(small(x[:, [2, 0]]), phi[:, [0, 3, 4]][:, :, [2, 0]].sum(-1) + layer.bias[[0, 3, 4]]) < 1e-13
    small(x[:, [2, 0]]).sum().backward()
    assert layer.spline_weight.grad is None
    y = layer(x)
    layer.keep_outputs_([4, 1])
    assert rms_error(layer(x), y[:, [4, 1]]) < 1e-14
    assert layer.out_features == 2
    assert {n: len(p) for n, p in layer.named_parameters()} == dict.fromkeys(
        ("base_weight", "spline_weight", "spline_scaler", "bias"), 2
    )
    for index in ([], [5], [-1], [0.5], [True]):
        with pytest.raises(ValueError, match="index="):
            layer.keep_outputs_(index)
    with pytest.raises(ValueError, match="in_index="):
        layer.subset([4], [0])


# --- State ------------------------------------------------------------------------------------------------------------


def test_loading_a_mask_creates_it_and_loading_none_drops_it():
    pruned, fresh, x = generic(3, 4, adaptive=False), generic(3, 4, adaptive=False), samples(9, 3)
    whole = fresh.state_dict()
    pruned.prune_edges_(0.5, torch.rand(4, 3))
    assert "mask" in pruned.state_dict()
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(x), pruned(x))
    assert not fresh.mask.requires_grad
    pruned.load_state_dict({**whole})
    assert pruned.mask is None
    net = nn.Sequential(KANLinear(3, 4, **double))
    net.load_state_dict({f"0.{name}": t for name, t in fresh.state_dict().items()}, assign=True)
    assert torch.equal(net(x), fresh(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid_range", [(-1.0, 1.0), (0.1, 0.77), (-300.0, 5.0)], ids=str)
def test_a_uniform_grid_is_known_after_loading(dtype, grid_range):
    layer = KANLinear(3, 4, grid_range=grid_range, dtype=dtype)
    other = KANLinear(3, 4, grid_range=(-7, 8), dtype=dtype)
    other.load_state_dict(layer.state_dict())
    assert other.spline.step is not None
    low, high = grid_range
    assert abs(other.spline.start - low) <= torch.finfo(dtype).eps * max(abs(low), abs(high))
    same = KANLinear(3, 4, grid_range=grid_range, dtype=dtype)
    same.load_state_dict(layer.state_dict())
    assert same.spline == layer.spline  # the exact numbers, whatever the dtype they went through


def test_an_adaptive_grid_is_known_after_loading():
    layer, x = generic(3, 4).float(), samples(30, 3).float()
    other = KANLinear(3, 4)
    other.load_state_dict(layer.state_dict())
    assert other.spline.step is None
    assert torch.equal(other(x), layer(x))
    back = KANLinear(3, 4)
    other.load_state_dict(back.state_dict())
    assert torch.equal(other(x), back(x))
    one_uneven_row = back.state_dict()
    one_uneven_row["grid"] = one_uneven_row["grid"].clone()
    one_uneven_row["grid"][1] *= 2
    other.load_state_dict(one_uneven_row)
    assert other.spline.step is None
    other.reset_parameters()
    assert other.spline == back.spline


def test_extras_survive_copies_and_export():
    layer, x = generic(3, 4), samples(9, 3)
    layer.refine(8)
    layer.prune_edges_(0.5, torch.rand(4, 3))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "pruned=" in repr(layer)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    layer.update_grid(x)  # the grid is Python state too: it must not be frozen into the graph
    assert torch.equal(compiled(x), layer(x))
    layer.reset_parameters()
    assert torch.equal(compiled(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (9, 4)


@pytest.mark.parametrize("adaptive", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["uniform", "adaptive"])
def test_what_else_a_loss_is_made_of_compiles(adaptive):
    layer = generic(3, 4, adaptive=adaptive, regularize_entropy=1.0, extrapolation="linear")

    def loss(x: Tensor) -> Tensor:
        return layer.regularization_loss() + layer.activation_regularization(x) + layer.basis(x, 1).square().sum()

    x = samples(20, 3, 1.5).requires_grad_()
    eager = torch.autograd.grad(loss(x), [x, layer.spline_weight, layer.base_weight])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(x), [x, layer.spline_weight, layer.base_weight]), eager, strict=True
    ):
        assert rms_error(got, want) < 1e-10


# --- pykan, scipy, matplotlib -----------------------------------------------------------------------------------------


class FakePykanLayer:
    """What `from_pykan` reads of a kan.KANLayer, without pykan."""

    def __init__(self, base_fun=None, masked: bool = True):
        self.k, self.grid_eps, self.base_fun = 2, 0.1, base_fun or nn.SiLU()
        self.coef = torch.randn(3, 4, 6, **double)
        self.grid = torch.linspace(-2, 2, 9, **double).expand(3, -1)
        self.scale_base, self.scale_sp = torch.randn(2, 3, 4, **double)
        self.mask = (torch.rand(3, 4) > 0.4).double() if masked else torch.ones(3, 4, **double)


@pytest.mark.parametrize("base_fun", [nn.SiLU(), nn.Identity(), lambda x: x * 0.0], ids=["silu", "identity", "zero"])
def test_from_pykan_reads_every_field(base_fun):
    theirs = FakePykanLayer(base_fun)
    layer, x = KANLinear.from_pykan(theirs), samples(20, 3)
    basis = torch.stack([cox_de_boor(x[:, i][None], theirs.grid[i : i + 1], 2)[0] for i in range(3)])  # (I, K, N)
    spline = torch.einsum("ikn,iok->nio", basis, theirs.coef) * theirs.scale_sp
    want = (theirs.mask * (theirs.scale_base * base_fun(x).unsqueeze(-1) + spline)).sum(1)
    assert rms_error(layer(x), want) < 1e-12
    assert layer.grid_eps == 0.1
    assert layer.spline_weight.is_contiguous()
    assert not layer.bias.any()
    assert torch.equal(layer.mask, theirs.mask.t())
    assert KANLinear.from_pykan(FakePykanLayer(masked=False)).mask is None
    assert KANLinear.from_pykan(FakePykanLayer()).base_activation is not None
    theirs.k = 1
    with pytest.raises(ValueError, match="do not belong together"):
        KANLinear.from_pykan(theirs)


@pytest.mark.filterwarnings("ignore")  # pykan's own, at import and in use
def test_to_and_from_pykan_itself():
    kan = pytest.importorskip("kan", reason="pykan 0.2.8 is an optional extra, for this check alone")
    torch.manual_seed(0)
    theirs = kan.KANLayer(in_dim=3, out_dim=4, num=5, k=3)
    x = torch.rand(50, 3) * 2 - 1
    theirs.update_grid_from_samples(x)
    theirs.mask.data = (torch.rand(3, 4) > 0.3).float()
    layer = KANLinear.from_pykan(theirs)
    assert rms_error(layer(x), theirs(x)[0]) < 2e-6
    assert rms_error(layer.edge_functions(x), theirs(x)[2]) < 2e-6
    other = kan.KANLayer(in_dim=3, out_dim=4, num=5, k=3)
    other.load_state_dict(layer.to_pykan_state_dict())
    assert rms_error(other(x)[0], theirs(x)[0]) < 1e-6
    ours = KANLinear(3, 4, False, scale_noise=1.0)
    other.load_state_dict(ours.to_pykan_state_dict())
    assert rms_error(other(x)[0], ours(x)) < 2e-6
    bare = KANLinear(3, 4, False, scale_noise=1.0, base_activation=None)
    other.load_state_dict(bare.to_pykan_state_dict())
    assert rms_error(other(x)[0], bare(x)) < 2e-6


@pytest.mark.filterwarnings("ignore")  # pykan's own
def test_activation_regularization_agrees_with_pykan_itself(tmp_path):
    kan = pytest.importorskip("kan", reason="pykan 0.2.8 is an optional extra, for this check alone")
    model = kan.KAN(width=[3, 4], grid=5, k=3, seed=0, auto_save=False, ckpt_path=str(tmp_path), symbolic_enabled=False)
    x = torch.rand(50, 3) * 2 - 1
    model(x)
    theirs = model.get_reg("edge_forward_spline_n", 1.0, 2.0, 0.0, 0.0)
    ours = KANLinear.from_pykan(model.act_fun[0]).activation_regularization(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
def test_to_scipy_is_the_spline_branch(adaptive):
    interpolate = pytest.importorskip("scipy.interpolate", reason="scipy is optional")
    layer = generic(3, 4, adaptive=adaptive, standalone_scale=True, base_activation=None)
    spline = interpolate.BSpline(*layer.to_scipy(2, 1), extrapolate=False)
    x = samples(50, 3, 0.9)
    phi = layer.edge_functions(x)[:, 2, 1]
    assert rms_error(torch.from_numpy(spline(x[:, 1].numpy())), phi) < 1e-13
    layer.prune_edges_(0.5, torch.zeros(4, 3))
    assert not layer.to_scipy(2, 1)[1].any()
    with pytest.raises(ValueError, match="o=4: must lie from 0 to 3"):
        layer.to_scipy(4, 0)


def test_plot_edge_draws_the_function():
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is optional")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layer = generic(3, 4)
    axes = layer.plot_edge(2, 1)
    x, phi = (torch.from_numpy(values) for values in axes.lines[0].get_data())
    points = torch.zeros(len(x), 3, **double)
    points[:, 1] = x
    torch.testing.assert_close(layer.edge_functions(points)[:, 2, 1].detach(), phi)
    assert (x[0], x[-1]) == (layer.grid[1, 3], layer.grid[1, 8])
    assert layer.plot_edge(0, 0, axes) is axes
    pyplot.close("all")
    with pytest.raises(ValueError, match="i=3: must lie from 0 to 2"):
        layer.plot_edge(0, 3)


def test_matplotlib_is_imported_for_plots_alone():
    code = "import sys, archzoo.layers.kan; assert not {'matplotlib', 'scipy', 'kan'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "in_features=0: must be a whole number, at least 1"),
        ({"out_features": 2.5}, "out_features=2.5: must be"),
        ({"grid_size": 0}, "grid_size=0: must be"),
        ({"spline_order": -1}, "spline_order=-1: must be a whole number, at least 0"),
        ({"grid_range": (1, 1)}, "grid_range=(1, 1): must be finite and increasing"),
        ({"grid_range": (0, math.inf)}, "grid_range=(0, inf): must be"),
        ({"grid_range": (0, 1, 2)}, "grid_range=(0, 1, 2): must be"),
        ({"grid_range": None}, "grid_range=None: must be"),
        ({"grid_eps": 1.5}, "grid_eps=1.5: must lie from 0"),
        ({"grid_eps": "uniform"}, "grid_eps='uniform': must lie from 0"),
        ({"scale_base": "1"}, "scale_base='1': must be finite"),
        ({"base_activation": "sulu"}, "base_activation='sulu': must be one of 'silu'"),
        ({"extrapolation": "cubic"}, "extrapolation='cubic': must be one of 'zero', 'clamp', 'linear'"),
        ({"scale_noise": math.nan}, "scale_noise=nan: must be finite"),
        ({"regularize_entropy": -1.0}, "regularize_entropy=-1.0: must be finite, 0 or more"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KANLinear(**{"in_features": 2, "out_features": 3, **options})


def test_bad_derivatives_are_refused():
    with pytest.raises(ValueError, match="derivative=-1: must be a whole number, at least 0"):
        KANLinear(2, 3).basis(torch.rand(1, 2), -1)


def test_a_pruned_layer_has_a_repr_on_meta_too():
    layer = generic(3, 4)
    layer.prune_edges_(layer.spline_weight.abs().mean(-1).median().item())
    assert "pruned=5" in repr(layer)
    assert "pruned" not in repr(layer.to("meta"))


@pytest.mark.parametrize("grid_eps", [0.02, 1.0])
@pytest.mark.parametrize("inputs", [1, 3])
def test_a_moved_grid_loads_bit_for_bit(grid_eps, inputs):
    """Even knots on one input are a uniform grid again, to the layer that moved them and to one that loads them."""
    layer = KANLinear(inputs, 4, grid_eps=grid_eps)
    layer.update_grid(samples(50, inputs).float())
    again = KANLinear(inputs, 4, grid_eps=grid_eps)
    again.load_state_dict(layer.state_dict())
    x = samples(200, inputs).float()
    assert torch.equal(again(x), layer(x))
