"""Facts of the Padé neurons' convolutions and of their shifts; what every layer owes is in `test_contract_*.py`."""

import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from archzoo.kernels._conv import windows
from archzoo.layers import PaonConv2d, PaonConvTranspose2d, PaonLinear
from archzoo.layers import _shift as shift_module
from archzoo.layers._shift import (
    SHIFT_PADDINGS,
    shift_images,
    shift_images_backward_op,
    shift_images_op,
    shift_images_reference,
)
from tests.helpers import layer_value_and_grads, rms, rms_error, value_and_grads

every_variant = pytest.mark.parametrize("variant", ["smooth", "absolute"])
every_shift_padding = pytest.mark.parametrize("padding", SHIFT_PADDINGS)


def standard_normal(*shape, dtype=torch.float32, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomized(layer, size=0.3):
    """The layer, no parameter of which is zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-size, size)
    return layer


def moved(layer, names, x, steps=3, rate=1e-2):
    """How far parameters have moved in a few steps of Adam, by root mean square and in units of the rate."""
    before = copy.deepcopy(layer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
    target = standard_normal(*layer(x).shape, dtype=x.dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
    return {n: rms(layer.get_parameter(n) - before.get_parameter(n)) / rate for n in names}


# --- Parameters and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shift", ["none", "learned", "predicted"])
@pytest.mark.parametrize("degrees", [(1, 1), (3, 2), (2, 0)], ids=str)
def test_absent_tensors_are_not_registered(degrees, shift, bias):
    M, N = degrees
    layer = PaonConv2d(4, 6, (3, 2), groups=2, bias=bias, degrees=degrees, shift=shift)
    want = {"numerator": (M, 6, 2, 3, 2)} | ({"denominator": (N, 6, 2, 3, 2)} if N else {})
    want |= {"bias": (6,)} if bias else {}
    want |= {"shift": (4, 2)} if shift == "learned" else {}
    want |= {"shift_weight": (8, 4), "shift_bias": (8,), "shift_slope": (8,)} if shift == "predicted" else {}
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == want
    for name in ("denominator", "bias", "shift", "shift_weight", "shift_bias", "shift_slope"):
        assert (getattr(layer, name) is None) == (name not in want)


def test_transposed_state_dict():
    layer = PaonConvTranspose2d(4, 6, (3, 2), groups=2, degrees=(3, 2))
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {"numerator": (3, 4, 3, 3, 2), "denominator": (2, 4, 3, 3, 2), "bias": (6,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degrees": (0, 0)}, "degrees=(0, 0)"),
        ({"degrees": (0, 1), "bias": False}, "bias=False"),
        ({"variant": "rough"}, "variant='rough': must be 'smooth'"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"denominator_init": -0.1}, "denominator_init=-0.1"),
        ({"groups": 2}, "groups=2"),
        ({"kernel_size": (3, 0)}, "kernel_size=(3, 0)"),
        ({"padding": "full"}, "padding='full'"),
        ({"padding": "same", "stride": 2}, "padding='same' with stride=(2, 2)"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror': must be one of 'zeros', 'reflect'"),
        ({"shift": "fixed"}, "shift='fixed': must be one of 'none', 'learned', 'predicted'"),
        ({"max_shift": 0}, "max_shift=0: must be positive"),
        ({"max_shift": -1.0}, "max_shift=-1.0"),
        ({"shift_padding": "wrap"}, "shift_padding='wrap': must be one of 'border', 'zeros', 'reflection'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PaonConv2d(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_padding": 1}, "output_padding=1: must be less than stride=(1, 1) or dilation=(1, 1)"),
        ({"padding": "same"}, "padding='same'"),
        ({"degrees": (0, 0)}, "degrees=(0, 0)"),
        ({"denominator_init": -1}, "denominator_init=-1"),
    ],
)
def test_transposed_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PaonConvTranspose2d(3, 4, 3, **options)


def test_repr_tells_all_options():
    layer = PaonConv2d(4, 6, 3, 2, "valid", groups=2, bias=False, degrees=(2, 2), variant="a", shift="learned")
    assert repr(layer) == (
        "PaonConv2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding='valid', groups=2, bias=False, degrees=(2, 2), "
        "variant='absolute', eps=1e-06, shift='learned', shift_padding='border', max_shift=1)"
    )
    assert repr(PaonConvTranspose2d(4, 6, 3, 2, 1, 1)) == (
        "PaonConvTranspose2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), output_padding=(1, 1), "
        "bias=True, degrees=(1, 1), variant='smooth', eps=1e-06)"
    )


# --- The equation and its special cases -------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("degrees", [(1, 1), (2, 2), (3, 1), (0, 2), (4, 0)], ids=str)
def test_every_patch_goes_through_the_same_neurons(degrees, variant):
    options = {"degrees": degrees, "variant": variant, "eps": 0.01, "dtype": torch.float64}
    layer, neurons = randomized(PaonConv2d(3, 5, (3, 2), (2, 1), 1, **options)), PaonLinear(18, 5, **options)
    neurons.load_state_dict({n: v.flatten(2) if v.dim() == 5 else v for n, v in layer.state_dict().items()})
    x = standard_normal(2, 3, 6, 5, dtype=torch.float64)
    patches = windows(F.pad(x, (1, 1, 1, 1)), (3, 2), (2, 1), (1, 1)).permute(0, 2, 3, 1, 4, 5).flatten(3)
    assert rms_error(layer(x).permute(0, 2, 3, 1), neurons(patches)) < 1e-13


@every_variant
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), "same", "valid"], ids=str)
def test_1_0_is_the_convolution_exactly(padding, padding_mode, variant):
    options = {"padding": padding, "padding_mode": padding_mode, "dilation": (1, 2), "groups": 2}
    layer, conv = (
        PaonConv2d(4, 6, (3, 2), degrees=(1, 0), variant=variant, **options),
        nn.Conv2d(4, 6, (3, 2), **options),
    )
    with torch.no_grad():
        conv.weight.copy_(layer.numerator[0])
        conv.bias.copy_(layer.bias)
    x = standard_normal(3, 4, 6, 5)
    got, want = layer_value_and_grads(layer, x), layer_value_and_grads(conv, x)
    assert rms_error(got["y"], want["y"]) < 1e-7
    if padding != "same":  # an even kernel there: torch pads by another path, and may sum in another order
        assert torch.equal(got["y"], want["y"])
        assert torch.equal(got["x"], want["x"])
        assert torch.equal(got["numerator"][0], want["weight"])
        assert torch.equal(got["bias"], want["bias"])


def test_2_0_is_the_quadratic_neuron():
    layer = randomized(PaonConv2d(3, 5, 3, padding=1, degrees=(2, 0), dtype=torch.float64))
    x = standard_normal(2, 3, 6, 5, dtype=torch.float64)
    want = F.conv2d(x, layer.numerator[0], layer.bias, 1, 1) + F.conv2d(x * x, layer.numerator[1], None, 1, 1)
    assert rms_error(layer(x), want) < 1e-14


@pytest.mark.parametrize("shift", ["none", "learned"], ids=["generative", "super"])
@pytest.mark.parametrize("Q", [3, 5])
def test_Q_0_is_the_generative_neuron_and_with_shifts_the_super_neuron(Q, shift):  # noqa: N802
    """Self-ONN: one convolution of the stacked powers, here of channels that `grid_sample` has moved."""
    layer = PaonConv2d(3, 5, 3, padding=1, degrees=(Q, 0), shift=shift, max_shift=2.5, dtype=torch.float64)
    with torch.no_grad():
        layer.numerator.uniform_(-0.3, 0.3)
    x = standard_normal(2, 3, 6, 5, dtype=torch.float64)
    moved = x if shift == "none" else sampled(x, layer.shift, "border")
    stacked = torch.cat([moved**k for k in range(1, Q + 1)], 1)
    want = F.conv2d(stacked, torch.cat(list(layer.numerator), 1), layer.bias, 1, 1)
    assert rms_error(layer(x), want) < 1e-13


@every_variant
@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_modes_pad_the_image_before_the_powers(padding_mode, variant):
    options = {"degrees": (2, 2), "variant": variant}
    layer = randomized(PaonConv2d(3, 5, 3, padding=(2, 1), padding_mode=padding_mode, **options))
    inner = PaonConv2d(3, 5, 3, **options)
    inner.load_state_dict(layer.state_dict())
    x = standard_normal(2, 3, 6, 5)
    assert torch.equal(layer(x), inner(F.pad(x, (1, 1, 2, 2), mode=padding_mode)))


@every_variant
def test_transposed_1_0_is_the_transposed_convolution_exactly(variant):
    arguments = (4, 6, (3, 2), (2, 3), 1, (1, 0), 2, True, (1, 2))
    layer = PaonConvTranspose2d(*arguments, degrees=(1, 0), variant=variant)
    usual = nn.ConvTranspose2d(*arguments)
    with torch.no_grad():
        usual.weight.copy_(layer.numerator[0])
        usual.bias.copy_(layer.bias)
    x = standard_normal(3, 4, 6, 5)
    got, want = layer_value_and_grads(layer, x), layer_value_and_grads(usual, x)
    for name, other in (("y", "y"), ("x", "x"), ("bias", "bias")):
        assert torch.equal(got[name], want[other]), name
    assert torch.equal(got["numerator"][0], want["weight"])


@pytest.mark.parametrize(
    ("degrees", "variant", "factor"),
    [((2, 2), "smooth", 1.0), ((0, 1), "smooth", 0.5), ((1, 1), "absolute", 1.0), ((0, 2), "absolute", 1.0)],
    ids=str,
)
def test_transposed_pixels_that_no_tap_reaches_are_the_bias(degrees, variant, factor):
    layer = randomized(PaonConvTranspose2d(2, 3, 1, stride=2, degrees=degrees, variant=variant, eps=0.0))
    y = layer(standard_normal(1, 2, 3, 3))
    assert torch.allclose(y[0, :, 1::2], factor * layer.bias.detach()[:, None, None].expand(3, 2, 5))


# --- Initialisation ---------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("degrees", [(1, 0), (1, 1), (2, 1), (2, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_output_has_about_the_inputs_variance(transposed, degrees, variant):
    """0.7 to 1.3 is the goal; the third power of a normal x is large, and takes the absolute variant below it."""
    torch.manual_seed(1)
    options = {"degrees": degrees, "variant": variant}
    layer = PaonConvTranspose2d(32, 64, 4, 2, **options) if transposed else PaonConv2d(32, 64, 3, **options)
    y = layer(standard_normal(8, 32, 12, 12))[..., 4:-4, 4:-4]
    assert (0.65 if variant == "absolute" and degrees[1] == 3 else 0.7) < y.std() < 1.3


def test_fan_in_is_the_number_of_inputs_of_a_pixel():
    assert math.isclose(PaonConv2d(32, 400, 3, groups=4).bias.abs().max().item(), 72**-0.5, rel_tol=2e-2)
    transposed = PaonConvTranspose2d(32, 400, (4, 1), (2, 3), groups=4)
    assert math.isclose(transposed.bias.abs().max().item(), 16**-0.5, rel_tol=2e-2)


def test_shifts_start_within_their_bound_and_predicted_ones_at_the_identity():
    learned = PaonConv2d(500, 1, 1, shift="learned", max_shift=2.5).shift.detach()
    assert 2.4 < learned.max() <= 2.5
    assert -2.5 <= learned.min() < -2.4
    layer = PaonConv2d(4, 6, 3, shift="predicted")
    assert torch.equal(layer.shift_slope, torch.full((8,), 0.25))
    plain = PaonConv2d(4, 6, 3)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = standard_normal(2, 4, 6, 5)
    assert torch.equal(layer(x), plain(x))


EVERY_DENOMINATOR = [(M, N, bias) for M in range(3) for N in (1, 2) for bias in (True, False) if M or bias]


@every_variant
@pytest.mark.parametrize(("M", "N", "bias"), EVERY_DENOMINATOR)
@pytest.mark.parametrize("cls", [PaonConv2d, PaonConvTranspose2d])
def test_every_denominator_trains_from_the_default_start(cls, M, N, bias, variant):
    layer = cls(3, 4, 3, bias=bias, degrees=(M, N), variant=variant)
    assert moved(layer, ["denominator"], standard_normal(4, 3, 6, 6))["denominator"] > 0.5


@pytest.mark.parametrize("shift", ["learned", "predicted"])
def test_shifts_train(shift):
    """The slopes do where a shift is negative."""
    layer, x = PaonConv2d(3, 4, 3, degrees=(2, 0), shift=shift), standard_normal(4, 3, 6, 6)
    found = moved(layer, ["shift"] if shift == "learned" else ["shift_weight", "shift_bias"], x)
    if shift == "predicted":
        nn.init.constant_(layer.shift_bias, -1.0)
        found |= moved(layer, ["shift_slope"], x)
    assert all(distance > 0.5 for distance in found.values()), found


# --- Function-preserving start ----------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("degrees", [(2, 0), (1, 1), (1, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("shift", ["none", "learned", "predicted"])
def test_start_computes_the_convolution_to_rounding_and_trains(shift, degrees, dtype, variant):
    conv = nn.Conv2d(4, 6, (3, 2), 2, 1, groups=2, padding_mode="reflect", dtype=dtype).eval()
    layer, error = PaonConv2d.from_conv2d(conv, degrees=degrees, variant=variant, shift=shift)
    assert error == 0.0
    assert (layer.padding_mode, layer.stride, layer.groups, layer.training) == ("reflect", (2, 2), 2, False)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = standard_normal(4, 4, 7, 6, dtype=dtype)
    bound = {torch.float64: 4e-16, torch.float32: 2e-7, torch.bfloat16: 4e-3}[dtype]
    assert rms_error(layer(x), copy.deepcopy(conv).double()(x.double())) < bound
    names = ["numerator"] + (["denominator"] if degrees[1] else []) + (["shift"] if shift == "learned" else [])
    names += ["shift_weight", "shift_bias"] if shift == "predicted" else []
    found = moved(layer, names, x)
    assert all(distance > 0.5 for distance in found.values()), found


def test_starts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=re.escape("degrees=(0, 1): neurons without numerator")):
        PaonConv2d.from_conv2d(nn.Conv2d(3, 4, 3), degrees=(0, 1))
    with pytest.raises(ValueError, match=re.escape("use degrees=(2, 1)")):
        PaonConv2d.from_conv2d(nn.Conv2d(3, 4, 3, bias=False))
    with pytest.raises(TypeError, match=r"Linear is not an nn\.Conv2d"):
        PaonConv2d.from_conv2d(nn.Linear(3, 4))


# --- Shifts -----------------------------------------------------------------------------------------------------------


def sampled(x, shift, padding):
    """The shift as `grid_sample` computes it, from a grid of coordinates for each channel of each image."""
    B, C, H, W = x.shape
    dx, dy = shift.expand(B, C, 2)[..., None, None].unbind(2)
    i = torch.arange(H, dtype=x.dtype)[:, None] + dy
    j = torch.arange(W, dtype=x.dtype) + dx
    i, j = torch.broadcast_tensors(i, j)
    grid = torch.stack([2 * j / max(W - 1, 1) - 1, 2 * i / max(H - 1, 1) - 1], -1).flatten(0, 1)
    out = F.grid_sample(x.reshape(B * C, 1, H, W), grid, padding_mode=padding, align_corners=True)
    return out.view_as(x)


@every_shift_padding
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    batch=st.integers(1, 3),
    each=st.booleans(),
    scale=st.sampled_from([0.5, 3.0, 40.0]),
    block=st.sampled_from([1, 2**20]),
    seed=st.integers(0, 99),
)
def test_shifts_and_their_gradients_are_those_of_grid_sample(padding, size, batch, each, scale, block, seed):
    """Everywhere but where a pixel meets another, which random shifts do not."""
    x, dy = (standard_normal(batch, 3, *size, dtype=torch.float64, seed=seed + i) for i in (0, 1000))
    shift = scale * standard_normal(*((batch, 3, 2) if each else (3, 2)), dtype=torch.float64, seed=seed + 2000)
    want = value_and_grads(lambda x, s: sampled(x, s, padding), (x, shift), dy)
    before, shift_module._BLOCK = shift_module._BLOCK, block
    try:
        found = value_and_grads(lambda x, s: shift_images(x, s, padding), (x, shift), dy)
    finally:
        shift_module._BLOCK = before
    by_definition = value_and_grads(
        lambda x, s: shift_images_reference(x, s if each else s[None], padding), (x, shift), dy
    )
    for truth, *outs in zip(want, found, by_definition, strict=True):
        for out in outs:
            assert (out - truth).abs().max() <= 1e-11 * (1 + truth.abs().max())


@every_shift_padding
@pytest.mark.parametrize("shift", [(0, 0), (2, 0), (-1, 1), (0, -9)], ids=str)
def test_whole_shifts_move_pixels_exactly(shift, padding):
    x = standard_normal(2, 1, 4, 5)
    index = {
        "border": lambda i, n: min(max(i, 0), n - 1),
        "zeros": lambda i, n: i if 0 <= i < n else None,
        "reflection": lambda i, n: min(i % (2 * n - 2), -i % (2 * n - 2)),
    }[padding]
    want = torch.zeros_like(x)
    for i in range(4):
        for j in range(5):
            row, column = index(i + shift[1], 4), index(j + shift[0], 5)
            if row is not None and column is not None:
                want[..., i, j] = x[..., row, column]
    assert torch.equal(shift_images(x, torch.tensor([shift]).float(), padding), want)


@every_shift_padding
@pytest.mark.parametrize("size", [(1, 4), (3, 1), (1, 1)], ids=str)
def test_sides_of_one_pixel_are_shifted(size, padding):
    x = standard_normal(2, 3, *size).double()
    shift = standard_normal(3, 2).double()
    y, dx, d_shift = value_and_grads(lambda x, s: shift_images(x, s, padding), (x, shift))
    assert all(t.isfinite().all() for t in (y, dx, d_shift))
    if padding != "zeros":
        across = [0 if side == 1 else d for side, d in zip(size[::-1], (1, 1), strict=True)]
        kept = shift * torch.tensor(across, dtype=torch.float64)
        assert rms_error(y, shift_images(x, kept, padding)) < 1e-14


@every_shift_padding
def test_far_and_undefined_shifts(padding):
    x = standard_normal(1, 4, 3, 3)
    shift = torch.tensor([[1e30, 0.0], [-1e30, 0.0], [torch.nan, 0.0], [0.0, torch.nan]])
    y = shift_images(x, shift, padding)
    assert y[:, :2].isfinite().all()
    assert y[:, 2:].isnan().all()
    if padding == "border":
        assert torch.equal(y[0, 0], x[0, 0, :, -1:].expand(3, 3))
    if padding == "zeros":
        assert not y[:, :2].any()


@pytest.mark.slow
@every_shift_padding
@pytest.mark.parametrize("each", [False, True], ids=["alike", "each"])
def test_shifts_pass_gradcheck_twice(each, padding):
    inputs = [standard_normal(2, 2, 3, 4).double(), standard_normal(*((2,) if each else ()), 2, 2, seed=7).double()]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda x, s: shift_images(x, s, padding), inputs)
    assert torch.autograd.gradgradcheck(lambda x, s: shift_images(x, s, padding), inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shift_ops_pass_opcheck(dtype):
    x, shift = standard_normal(2, 3, 4, 5, dtype=dtype), standard_normal(1, 3, 2, dtype=dtype)
    opcheck(shift_images_backward_op, (torch.ones_like(x), x, shift, "border", [True, False]))
    opcheck(shift_images_backward_op, (torch.ones_like(x), x, shift, "zeros", [False, True]))
    opcheck(shift_images_op, (x.requires_grad_(), shift.requires_grad_(), "reflection"))


def test_shift_keeps_x_and_the_shifts_only():
    x, shift = standard_normal(4, 3, 8, 8).requires_grad_(), standard_normal(3, 2).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        shift_images(x, shift, "border")
    assert {t.untyped_storage().data_ptr() for t in kept} == {t.untyped_storage().data_ptr() for t in (x, shift)}


def test_shift_costs_a_few_operations_a_pixel():
    x = standard_normal(4, 3, 8, 8).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = shift_images(x, standard_normal(3, 2), "border")
        assert counter.get_total_flops() == 6 * x.numel()
        y.sum().backward()
    assert counter.get_total_flops() == 14 * x.numel()


def test_learned_shifts_are_clamped_and_have_no_gradient_outside():
    layer = PaonConv2d(2, 3, 1, shift="learned", max_shift=1.5, dtype=torch.float64)
    with torch.no_grad():
        layer.shift.copy_(torch.tensor([[0.3, -0.4], [2.0, 0.7]]))
    x = standard_normal(2, 2, 5, 5, dtype=torch.float64)
    found = layer_value_and_grads(layer, x, standard_normal(2, 3, 5, 5, dtype=torch.float64, seed=8))
    assert (found["shift"] != 0).tolist() == [[True, True], [False, True]]
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.shift[1, 0] = 1.5
    assert torch.equal(twin(x), found["y"])


def test_predicted_shifts_are_those_of_the_equation_and_of_the_image_alone():
    layer = randomized(PaonConv2d(3, 4, 3, shift="predicted", dtype=torch.float64))
    x = standard_normal(5, 3, 6, 6, dtype=torch.float64)
    z = F.linear(x.mean((2, 3)), layer.shift_weight, layer.shift_bias)
    want = torch.where(z > 0, z, layer.shift_slope * z).view(5, 3, 2)
    assert torch.equal(layer.shifts(x), want)
    assert rms_error(layer(x), torch.cat([layer(image[None]) for image in x])) < 1e-14
    inner = PaonConv2d(3, 4, 3, dtype=torch.float64)
    inner.load_state_dict({n: v for n, v in layer.state_dict().items() if not n.startswith("shift")})
    assert rms_error(layer(x), inner(sampled(x, want, "border"))) < 1e-12
    assert rms(layer_value_and_grads(layer, x)["shift_slope"]) > 0


@pytest.mark.parametrize("shift", ["learned", "predicted"])
def test_shifted_layer_works_with_the_tools_of_torch(shift):
    options = {"degrees": (1, 1), "shift": shift, "padding": 1}
    layer = randomized(PaonConv2d(3, 4, 3, dtype=torch.float64, **options))
    x, dy = standard_normal(2, 3, 6, 5, dtype=torch.float64), standard_normal(2, 4, 6, 5, dtype=torch.float64)
    want = layer_value_and_grads(layer, x, dy)
    assert rms_error(layer(x[0]), want["y"][0]) < 1e-14
    assert layer(x[:0]).shape == (0, 4, 6, 5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
    names = ["x", *dict(layer.named_parameters())]
    for name, out in zip(["y", *names], [y, *gradients], strict=True):
        assert rms_error(out, want[name]) < 1e-12, name
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    longer = standard_normal(5, 3, 6, 5, dtype=torch.float64)
    assert rms_error(exported(longer), layer(longer)) < 1e-13
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    functional = torch.func.grad(lambda p: (torch.func.functional_call(layer, p, (x,)) * dy).sum())(parameters)
    for name, out in functional.items():
        assert rms_error(out, want[name]) < 1e-12, name
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = single(x.float())
    assert half.dtype == torch.bfloat16
    assert rms_error(half, want["y"]) < 3e-2
    assert PaonConv2d(3, 4, 3, device="meta", **options)(x.float().to("meta")).shape == (2, 4, 6, 5)


# --- The transposed layer, which the contract suite does not know -----------------------------------------------------


@every_variant
def test_transposed_layer_works_with_the_tools_of_torch(variant):
    layer = PaonConvTranspose2d(2, 3, 3, 2, 1, 1, degrees=(2, 2), variant=variant, dtype=torch.float64)
    layer = randomized(layer, 0.2)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = standard_normal(2, 2, 3, 2, dtype=torch.float64)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x.clone().requires_grad_(), *(p.detach().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(call, inputs)
    y = layer(x)
    assert y.shape == (2, 3, 6, 4)
    assert layer(x[:0]).shape == (0, 3, 6, 4)
    assert rms_error(layer(x[0]), y[0]) < 1e-14
    torch._dynamo.reset()
    assert rms_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y) < 1e-13
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    assert rms_error(exported(x), y) < 1e-13
    twin = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert twin(x.float()).dtype == torch.bfloat16
    meta = PaonConvTranspose2d(2, 3, 3, 2, 1, 1, device="meta")
    assert meta(x.float().to("meta")).shape == (2, 3, 6, 4)
    filled = meta.to_empty(device="cpu")
    torch.manual_seed(3)
    filled.reset_parameters()
    torch.manual_seed(3)
    built = PaonConvTranspose2d(2, 3, 3, 2, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(filled.parameters(), built.parameters(), strict=True))
    for shape in ((2, 3, 5, 5), (2, 5)):
        with pytest.raises(ValueError, match="2 channels|2, height"):
            layer(torch.zeros(shape, dtype=torch.float64))
