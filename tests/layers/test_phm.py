"""Facts of the PHM layer: the algebra, the equation on every path, init, sharing, and two cheap results."""

import copy
import io

import pytest
import torch
from torch import nn

from archzoo import create_layer
from archzoo.layers.phm import ALGEBRAS, PHMLinear, hypercomplex_rule, share_rule_
from tests.helpers import RecordOps, rms_error

QUATERNION = [
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]],
    [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]],
    [[0, 0, 0, -1], [0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
]
EVERY_KIND = [
    {"n": 1},
    {"n": 2},
    {"n": 4},
    {"n": 8},
    {"n": 1, "rule": "real"},
    {"n": 2, "rule": "complex"},
    {"n": 4, "rule": "quaternion"},
    {"n": 8, "rule": "octonion"},
    {"n": 16, "rule": "sedenion"},
    {"n": 4, "rule": "quaternion", "learn_rule": True},
    {"n": 4, "rank": 1},
    {"n": 4, "rank": 30},
    {"n": 4, "rule": "mixing"},
    {"n": 4, "rule": "mixing", "rank": 2},
]


def product(rule, a, b):
    """a b in the algebra of a rule."""
    return torch.einsum("...i,ipq,...q->...p", a, rule, b)


# --- The algebra ------------------------------------------------------------------------------------------------------


def test_rules_are_the_tables_of_the_paper():
    assert hypercomplex_rule(1).tolist() == [[[1]]]
    assert hypercomplex_rule(2).tolist() == [[[1, 0], [0, 1]], [[0, -1], [1, 0]]]
    assert hypercomplex_rule(4).tolist() == QUATERNION


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_norms_are_kept_up_to_the_octonions(n):
    rule = hypercomplex_rule(n, dtype=torch.float64)
    x, y = torch.randn(50, n, dtype=torch.float64), torch.randn(50, n, dtype=torch.float64)
    kept = torch.allclose(product(rule, x, y).norm(dim=-1), x.norm(dim=-1) * y.norm(dim=-1), rtol=1e-12)
    assert kept == (n <= 8)
    unit = torch.eye(n, dtype=torch.float64)[0]
    assert torch.equal(product(rule, unit.expand(50, n), y), y)
    assert torch.equal(product(rule, x, unit.expand(50, n)), x)
    assert torch.equal(rule.square().sum(0), torch.ones(n, n, dtype=torch.float64))  # the learned rule's norm too


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_rule_is_cayley_dickson_doubling(n):
    """(a, b)(c, d) = (a c - d* b, d a + b c*), from the rule of half the size."""
    half = n // 2
    rule, smaller = hypercomplex_rule(n, dtype=torch.float64), hypercomplex_rule(half, dtype=torch.float64)
    conjugate = torch.tensor([1.0] + [-1.0] * (half - 1), dtype=torch.float64)
    (a, b), (c, d) = torch.randn(2, half, dtype=torch.float64), torch.randn(2, half, dtype=torch.float64)
    first = product(smaller, a, c) - product(smaller, d * conjugate, b)
    second = product(smaller, d, a) + product(smaller, b, c * conjugate)
    got = product(rule, torch.cat([a, b]), torch.cat([c, d]))
    assert torch.allclose(got, torch.cat([first, second]), rtol=1e-13)


def test_rule_follows_dtype_and_device():
    assert hypercomplex_rule(4).dtype == torch.float32
    assert hypercomplex_rule(4, dtype=torch.float64).dtype == torch.float64
    assert hypercomplex_rule(4, device="meta").device.type == "meta"
    for n in (0, 3, 6, -4, 2.0, "4"):
        with pytest.raises(ValueError, match=rf"^n={n!r}: must be a power of two"):
            hypercomplex_rule(n)


def test_a_complex_layer_multiplies_complex_numbers():
    layer = PHMLinear(6, 4, bias=False, n=2, rule="complex", dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    want = torch.complex(x[:, :3], x[:, 3:]) @ torch.complex(layer.S[0], layer.S[1]).T
    assert torch.allclose(layer(x), torch.cat([want.real, want.imag], 1), rtol=1e-12)


def test_a_quaternion_layer_multiplies_by_quaternions_from_the_left():
    layer = PHMLinear(8, 12, bias=False, n=4, rule="quaternion", dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    want = product(
        torch.tensor(QUATERNION, dtype=torch.float64), layer.S.permute(1, 2, 0), x.view(5, 1, 4, 2).transpose(2, 3)
    ).sum(2)  # over the input quaternions: (row, output quaternion, component)
    assert torch.allclose(layer(x), want.transpose(1, 2).reshape(5, 12), rtol=1e-12)


# --- The equation -----------------------------------------------------------------------------------------------------


def written_out(layer, x):
    """The equation, by loops over blocks."""
    n, k, d = layer.n, layer.out_features // layer.n, layer.in_features // layer.n
    S = (
        layer.S
        if layer.S is not None
        else torch.stack([a @ b for a, b in zip(layer.S_left, layer.S_right, strict=True)])
    )
    H = torch.zeros(layer.out_features, layer.in_features, dtype=x.dtype)
    for p in range(n):
        for q in range(n):
            block = layer.A[p, q] * S[q] if layer.rule == "mixing" else sum(layer.A[i, p, q] * S[i] for i in range(n))
            H[p * k : (p + 1) * k, q * d : (q + 1) * d] = block
    return H, x @ H.T + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_output_weight_and_gradients_are_those_of_the_equation(options, rows):
    layer = PHMLinear(32, 48, dtype=torch.float64, **options)
    x, dy = torch.randn(rows, 32, dtype=torch.float64).requires_grad_(), torch.randn(rows, 48, dtype=torch.float64)
    H, y = written_out(layer, x)
    assert rms_error(layer.weight, H) < 1e-13
    assert rms_error(layer(x), y) < 1e-13
    leaves = [x, *layer.parameters()]
    for got, want in zip(torch.autograd.grad(layer(x), leaves, dy), torch.autograd.grad(y, leaves, dy), strict=True):
        assert rms_error(got, want) < 1e-12
    if layer.A.requires_grad:
        (got,) = torch.autograd.grad(layer.weight.square().sum(), layer.A)
        (want,) = torch.autograd.grad(written_out(layer, x)[0].square().sum(), layer.A)
        assert rms_error(got, want) < 1e-12


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_gradcheck(options):
    n = options["n"]
    layer = PHMLinear(2 * n, n, dtype=torch.float64, **options)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = [torch.randn(3, 2 * n, dtype=torch.float64), *(p.detach() for p in parameters)]
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs], fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_path_depends_on_shapes_only():
    def ops(layer):
        with RecordOps() as recorded:
            layer(torch.randn(4, 64))
        return {str(op) for op in recorded.ops}

    assert "archzoo.kron_linear" in ops(PHMLinear(64, 64))
    assert "archzoo.kron_linear" not in ops(PHMLinear(64, 64, rule="mixing"))
    assert "archzoo.kron_linear" not in ops(PHMLinear(64, 64, rank=1))  # 4 (64 + 64) + 64 < 64 * 64
    assert "archzoo.kron_linear" in ops(PHMLinear(64, 64, rank=8))  # 32 (64 + 64) + 512 > 64 * 64


def test_mixing_keeps_only_the_row_sums_of_a_rule():
    """The authors' code tiles over the axis that A contracts: blocks are (sum_b A[i,a,b]) S."""
    layer = PHMLinear(12, 8, bias=False, n=4, rule="mixing", dtype=torch.float64)
    A = torch.randn(4, 4, 4, dtype=torch.float64)
    layer.A.data = A.sum(2)
    blocks = layer.weight.view(4, 2, 4, 3)
    for p in range(4):
        for q in range(4):
            assert torch.allclose(blocks[p, :, q], A[p, q].sum() * layer.S[q])


# --- Init -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_weight_has_glorots_variance_for_any_n_and_rule(options):
    variances = [PHMLinear(160, 96, bias=False, **options).weight.var().item() for _ in range(60)]
    mean, error = torch.tensor(variances).mean().item(), torch.tensor(variances).std().item() / 60**0.5
    want = 2 / (160 + 96)
    assert abs(mean - want) < max(4 * error, 0.02 * want), f"{mean:.5f} +- {error:.5f}, Glorot: {want:.5f}"


def test_init_of_each_parameter():
    torch.manual_seed(1)
    layer = PHMLinear(400, 200, n=4)
    assert torch.allclose(layer.A.square().sum(0), torch.ones(4, 4), atol=1e-6)
    bound = (6 / 600) ** 0.5
    assert layer.S.abs().max() <= bound
    assert abs(layer.S.std().item() / (bound / 3**0.5) - 1) < 0.02
    assert layer.bias.abs().max() <= 400**-0.5
    assert layer.bias.abs().max() > 0.9 * 400**-0.5
    low = PHMLinear(400, 200, n=4, rank=5)
    for factor in (low.S_left, low.S_right):
        assert abs(factor.std().item() / (2 / (600 * 5)) ** 0.25 - 1) < 0.06
    assert abs(PHMLinear(64, 64, n=64, rule="mixing").A.std().item() - 1) < 0.05


# --- Parameters, buffers, sharing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_names_and_shapes_of_parameters(options):
    layer = PHMLinear(32, 48, **options)
    n, rank = options["n"], options.get("rank")
    shapes = {"A": (n, n) if layer.rule == "mixing" else (n, n, n), "bias": (48,)}
    if rank:
        shapes |= {"S_left": (n, 48 // n, rank), "S_right": (n, rank, 32 // n)}
    else:
        shapes["S"] = (n, 48 // n, 32 // n)
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == shapes
    learned = options.get("learn_rule", layer.rule not in ALGEBRAS)
    assert dict(layer.named_parameters()).keys() == shapes.keys() - (set() if learned else {"A"})


def test_one_nth_of_the_parameters():
    count = sum(p.numel() for p in PHMLinear(512, 512, bias=False, n=8).parameters())
    assert count == 512 * 512 // 8 + 8**3


def test_a_parameter_given_as_rule_is_shared_and_left_alone():
    rule = nn.Parameter(torch.randn(2, 2, 2))
    before = rule.detach().clone()
    first, second = PHMLinear(4, 4, n=2, rule=rule), PHMLinear(4, 6, n=2, rule=rule)
    model = nn.Sequential(first, second)
    assert first.A is rule
    assert second.A is rule
    assert len(list(model.parameters())) == 5
    model(torch.randn(3, 4)).sum().backward()
    assert rule.grad is not None
    first.reset_parameters()
    assert torch.equal(rule, before)

    twin = copy.deepcopy(model)
    assert twin[0].A is twin[1].A
    assert twin[0].A is not rule
    twin.load_state_dict(model.state_dict())
    assert twin[0].A is twin[1].A
    program = torch.export.export(model, (torch.randn(3, 4),)).module()
    x = torch.randn(3, 4)
    assert torch.allclose(program(x), model(x))


def test_a_tensor_given_as_rule_becomes_a_buffer_of_its_own():
    rule = torch.randn(2, 2, 2, dtype=torch.float64)
    layer = PHMLinear(4, 4, n=2, rule=rule)
    assert "A" in dict(layer.named_buffers())
    assert "A" in layer.state_dict()
    assert layer.A.dtype == torch.float32
    kept = layer.A.clone()
    rule.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.A, kept)
    assert PHMLinear(4, 4, n=2, rule=hypercomplex_rule(2).long()).A.dtype == torch.float32
    learned = PHMLinear(4, 4, n=2, rule=torch.ones(2, 2, 2), learn_rule=True)
    assert torch.equal(learned.A, torch.ones(2, 2, 2))
    assert isinstance(learned.A, nn.Parameter)


def test_a_learned_algebra_starts_there_and_returns_there():
    layer = PHMLinear(8, 8, rule="quaternion", learn_rule=True)
    assert isinstance(layer.A, nn.Parameter)
    assert layer.A.tolist() == QUATERNION
    layer.A.data.zero_()
    layer.reset_parameters()
    assert layer.A.tolist() == QUATERNION
    fixed = PHMLinear(8, 8, learn_rule=False)
    assert not fixed.A.requires_grad
    assert torch.allclose(fixed.A.square().sum(0), torch.ones(4, 4), atol=1e-6)


def test_share_rule_gives_layers_of_the_same_n_one_rule():
    model = nn.ModuleDict(
        {
            "a": PHMLinear(8, 8, n=4),
            "b": PHMLinear(8, 16, n=4, rank=1),
            "c": PHMLinear(8, 8, n=2),
            "fixed": PHMLinear(8, 8, n=4, rule="quaternion"),
            "mixing": PHMLinear(8, 8, n=4, rule="mixing"),
            "dense": nn.Linear(8, 8),
        }
    )
    only_two = copy.deepcopy(model)
    assert share_rule_(only_two, n=2) == 1
    assert only_two["a"].A is not only_two["b"].A
    a, fixed = model["a"].A, model["fixed"].A
    assert share_rule_(model) == 4
    assert model["a"].A is a
    assert model["b"].A is a
    assert model["fixed"].A is fixed
    assert model["c"].A.shape == (2, 2, 2)
    assert model["mixing"].A.shape == (4, 4)
    assert share_rule_(model) == 4
    assert share_rule_(nn.Linear(2, 2)) == 0


def test_weight_is_built_anew_and_read_only():
    layer = PHMLinear(8, 8)
    assert layer.weight is not layer.weight
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(8, 8)
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.zeros(8, 8))
    assert not any("weight" in name for name in layer.state_dict())
    layer(torch.randn(3, 8)).sum().backward()
    copy.deepcopy(layer).weight  # noqa: B018
    torch.save(layer.state_dict(), io.BytesIO())


def test_repr_names_the_rule():
    text = repr(create_layer("phm", 8, 12, n=2, rule="complex", learn_rule=True, rank=3, bias=False))
    assert text == "PHMLinear(8, 12, bias=False, n=2, rule='complex', learn_rule=True, rank=3)"
    assert "rule='given'" in repr(PHMLinear(8, 8, rule=torch.ones(4, 4, 4)))


# --- From nn.Linear ---------------------------------------------------------------------------------------------------


# Learned, and of low rank: what the turns find is a local minimum. Given the rule, or with mixing, it is the nearest.
EXACT = [o for o in EVERY_KIND if o != {"n": 4, "rank": 1}] + [{"n": 4, "rule": "quaternion", "rank": 1}]


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_a_start_is_exact_on_weights_that_are_such_sums(options):
    source = PHMLinear(32, 48, **options, dtype=torch.float64)
    linear = nn.Linear(32, 48, dtype=torch.float64).eval()
    linear.weight.data, linear.bias.data = source.weight.detach(), source.bias.detach()
    layer, error = PHMLinear.from_linear(linear, **options)
    assert error < 1e-12
    assert not layer.training
    x = torch.randn(5, 32, dtype=torch.float64)
    assert rms_error(layer(x), linear(x)) < 1e-12
    with torch.no_grad():
        layer.bias += 1
        if layer.S is not None:
            layer.S += 1
    assert torch.equal(linear.bias, source.bias), "the start shares memory with the original"


@pytest.mark.parametrize("rule", ["learned", "real", "mixing"])
def test_a_start_of_n_1_has_no_error(rule):
    linear = nn.Linear(7, 5)
    layer, error = PHMLinear.from_linear(linear, n=1, rule=rule)
    assert error == 0.0
    x = torch.randn(50, 7)
    assert rms_error(layer(x), linear(x)) < 1e-6


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_error_of_a_start_is_what_standard_normal_inputs_show(options):
    linear = nn.Linear(32, 48, bias=False, dtype=torch.float64)
    layer, error = PHMLinear.from_linear(linear, **options)
    x = torch.randn(20_000, 32, dtype=torch.float64)
    assert rms_error(layer(x), linear(x)) == pytest.approx(error, rel=0.02, abs=1e-14)
    assert rms_error(layer.weight, linear.weight) == pytest.approx(error, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_gradient_descent_does_not_lower_the_error_of_a_start(options):
    """It begins where the gradient of the error is 0 (nearly so with a rank), for all that is the layer's to choose."""
    linear = nn.Linear(32, 48, dtype=torch.float64)
    layer, error = PHMLinear.from_linear(linear, **options)
    chosen = [
        p for name, p in layer.named_parameters() if name != "bias" and not (name == "A" and "learn_rule" in options)
    ]
    optimizer = torch.optim.Adam(chosen, lr=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        (layer.weight - linear.weight).square().sum().backward()
        optimizer.step()
    after = rms_error(layer.weight, linear.weight)
    assert after > error * (1 - (0.01 if "rank" in options and layer.rank < 8 else 1e-9)) - 1e-12


@pytest.mark.parametrize("options", [{"n": 2}, {"n": 4}, {"n": 4, "rule": "mixing"}, {"n": 4, "rank": 2}], ids=str)
def test_no_random_restart_beats_a_start(options):
    linear = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    _, error = PHMLinear.from_linear(linear, **options)
    errors = []
    for seed in range(2):
        torch.manual_seed(seed)
        layer = PHMLinear(16, 16, bias=False, dtype=torch.float64, **options)
        optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for _ in range(300):
            optimizer.zero_grad()
            (layer.weight - linear.weight).square().sum().backward()
            optimizer.step()
            schedule.step()
        errors.append(rms_error(layer.weight, linear.weight))
    assert min(errors) > error * (0.98 if "rank" in options else 1 - 1e-6)
    assert min(errors) < error * 1.05, "the restarts are no test: they come nowhere near"


def test_a_chosen_rule_keeps_the_size_it_has_at_init():
    linear = nn.Linear(32, 48)
    assert PHMLinear.from_linear(linear).layer.A.square().sum(0).mean().item() == pytest.approx(1, rel=1e-5)
    low = PHMLinear.from_linear(linear, rank=2).layer
    assert low.A.square().sum(0).mean().item() == pytest.approx(1, rel=1e-5)
    mixing = PHMLinear.from_linear(linear, rule="mixing").layer
    assert mixing.A.square().mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
@pytest.mark.parametrize("zeros", ["one block", "all"])
def test_nothing_of_a_start_is_stuck_at_zero(options, zeros):
    """Even where the original holds zeros, in two steps every element of every parameter has moved."""
    linear = nn.Linear(32, 48, dtype=torch.float64)
    with torch.no_grad():
        linear.weight[: 48 if zeros == "all" else 3].zero_()
    layer, _ = PHMLinear.from_linear(linear, **options)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.randn(64, 32, dtype=torch.float64)
        (layer(x) - torch.randn(64, 48, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    for name, p in layer.named_parameters():
        moved = (p.detach() != before[name]).double().mean()
        assert moved > 0.99, f"{name}: {moved:.0%} moved"


def test_a_given_rule_of_a_start_is_left_alone():
    rule = nn.Parameter(torch.randn(4, 4, 4))
    before, linear = rule.detach().clone(), nn.Linear(16, 16)
    layer, error = PHMLinear.from_linear(linear, rule=rule)
    assert layer.A is rule
    assert torch.equal(rule, before)
    assert PHMLinear.from_linear(linear).error < error < 1
    poor, error = PHMLinear.from_linear(linear, rule=torch.zeros(4, 4, 4))
    assert error == 1.0
    assert torch.equal(poor.A, torch.zeros(4, 4, 4))
    started, _ = PHMLinear.from_linear(linear, rule="quaternion", learn_rule=True)
    assert started.A.tolist() == QUATERNION


def test_a_start_has_the_originals_dtype_and_refuses_what_it_cannot_use():
    half = nn.Linear(8, 8, dtype=torch.bfloat16)
    layer, error = PHMLinear.from_linear(half, n=1)
    assert layer.S.dtype == torch.bfloat16
    assert error == 0.0
    with pytest.raises(TypeError, match=r"Conv2d is not an nn\.Linear"):
        PHMLinear.from_linear(nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match=r"in_features=10: must be a multiple of n=4; .* 1, 2, 5, 10"):
        PHMLinear.from_linear(nn.Linear(10, 20))
    with pytest.raises(TypeError, match="no argument runk=2; did you mean 'rank'"):
        PHMLinear.from_linear(nn.Linear(8, 8), runk=2)
    with torch.no_grad():
        half.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="holds inf or NaN"):
        PHMLinear.from_linear(half)


# --- Precision and autocast -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_autocast_gives_bfloat16_on_every_path(options, rows):
    layer = PHMLinear(32, 48, **options)
    x = torch.randn(rows, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert rms_error(y, layer(x)) < 1e-2
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options", "text"),
    [
        ((10, 20), {"n": 4}, r"^in_features=10: must be a multiple of n=4; .*n = 1, 2, 5, 10$"),
        ((20, 10), {"n": 4}, r"^out_features=10: must be a multiple of n=4"),
        ((8, 8), {"n": 0}, r"^n=0: "),
        ((8, 8), {"n": 2.0}, r"^n=2.0: "),
        ((8, 8), {"rank": 0}, r"^rank=0: "),
        ((8, 8), {"rule": "quarternion"}, r"^rule='quarternion': must be one of .*'quaternion'"),
        ((8, 8), {"rule": None}, r"^rule=None: "),
        ((8, 8), {"n": 2, "rule": "quaternion"}, r"^n=2: rule='quaternion' needs n=4"),
        ((8, 8), {"rule": torch.ones(4, 4)}, r"^rule of shape \(4, 4\): must be \(n, n, n\) = \(4, 4, 4\)"),
        ((8, 8), {"rule": torch.ones(2, 2, 2)}, r"^rule of shape \(2, 2, 2\): "),
        ((8, 8), {"rule": torch.ones(4, 4, 4, dtype=torch.complex64)}, r"^rule of shape .*complex64"),
        ((8, 8), {"rule": nn.Parameter(torch.ones(4, 4, 4)), "learn_rule": False}, r"^learn_rule=False: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_refused_by_name(args, options, text):
    with pytest.raises(ValueError, match=text):
        PHMLinear(*args, **options)


def test_bad_inputs_are_refused():
    for layer in (PHMLinear(8, 8), PHMLinear(8, 8, rank=1), PHMLinear(8, 8, rule="mixing")):
        with pytest.raises(ValueError, match=r"\(3, 9\).*in_features=8"):
            layer(torch.randn(3, 9))
        with pytest.raises(ValueError, match="float64"):
            layer(torch.randn(3, 8, dtype=torch.float64))
        with pytest.raises(ValueError, match="int64"):
            layer(torch.ones(3, 8, dtype=torch.int64))


# --- Results that are cheap to redo -----------------------------------------------------------------------------------


def fit(layer, teacher, steps, lr):
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.randn(64, 16)
        optimizer.zero_grad()
        (layer(x) - teacher(x)).square().mean().backward()
        optimizer.step()
        schedule.step()


def test_the_quaternion_rule_is_found_from_data():
    teacher = PHMLinear(16, 16, bias=False, rule="quaternion")
    layer = PHMLinear(16, 16, bias=False)
    layer.S = nn.Parameter(teacher.S.detach().clone(), requires_grad=False)
    fit(layer, teacher, steps=500, lr=5e-2)
    assert (layer.A - hypercomplex_rule(4)).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("rule", "low", "high"), [("learned", 0, 1e-4), pytest.param("mixing", 0.6, 0.8, marks=pytest.mark.slow)]
)
def test_a_learned_rule_can_express_a_quaternion_map_and_mixing_cannot(rule, low, high):
    teacher = PHMLinear(16, 16, bias=False, rule="quaternion")
    layer = PHMLinear(16, 16, bias=False, rule=rule)
    fit(layer, teacher, steps=1500, lr=2e-2)
    assert low <= rms_error(layer.weight, teacher.weight) < high
