"""The op `basis_conv2d` by Triton's kernels, against its definition; on plain torch: `test_basis_conv2d.py`."""

from collections.abc import Iterator

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.activation import Activation
from archzoo.kernels.basis_conv2d import basis_conv2d, basis_conv2d_backward_op, basis_conv2d_op
from archzoo.kernels.kan_spline import BSpline
from archzoo.kernels.sine import Sine
from tests.helpers import rms_error, value_and_grads
from tests.kernels.test_basis_conv2d import EVERYTHING, GEOMETRIES, Case, Geometry
from tests.kernels.test_basis_linear_triton import OwnSine
from tests.kernels.triton_support import (
    DTYPES,
    check_compiles,
    check_refusals,
    check_repeats,
    check_values,
    needs_triton,
    on_device,
)

pytestmark = [needs_triton, pytest.mark.usefixtures("triton")]


@pytest.fixture
def triton() -> Iterator[None]:
    with on_device(), use_backend("triton"):
        yield


def waves(channels: int) -> tuple[torch.Tensor, ...]:
    phases = torch.linspace(0, 1, 3 * channels, dtype=torch.float64).view(channels, 3)
    return torch.linspace(0.5, 2, 3, dtype=torch.float64), phases


KAN = Case((BSpline(3, 5, -1.0, 0.4), Activation("silu")))
SINE = Case((Sine(3), Activation("gelu")), waves, 1)


def problem(case: Case, *shape: int, geometry: Geometry = EVERYTHING, dtype: torch.dtype = torch.float64):
    inputs = case.inputs(*shape, geometry=geometry, dtype=dtype)
    with torch.no_grad():
        dy = torch.randn_like(case.definition(geometry)(*inputs))
    return inputs, dy, list(range(1, len(inputs)))


def check(case: Case, *shape: int, geometry: Geometry = EVERYTHING, dtype: torch.dtype = torch.float64) -> None:
    inputs, dy, summed = problem(case, *shape, geometry=geometry, dtype=dtype)
    check_values(case.ours(geometry), case.definition(geometry), inputs, dy, summed)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(geometry):
    check(KAN, 2, 4, 7, 6, geometry=geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_learned_tensors(dtype):
    check(SINE, 2, 4, 5, 6, dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 4, 2, 3), (4, 5, 6), (0, 4, 5, 6)], ids=str)
def test_shapes(shape):
    check(KAN, *shape)


def test_channels_last_and_strided_inputs():
    (x, *rest), dy, summed = problem(KAN, 2, 4, 5, 6)
    forms = KAN.ours(EVERYTHING), KAN.definition(EVERYTHING)
    check_values(*forms, [x.contiguous(memory_format=torch.channels_last), *rest], dy, summed)
    check_values(*forms, [x.transpose(2, 3).contiguous().transpose(2, 3), *rest], dy[:, :1].expand_as(dy), summed)


def test_blocks_of_images_add_up(monkeypatch):
    from archzoo.kernels import _basis_conv2d_triton

    monkeypatch.setattr(_basis_conv2d_triton, "_BLOCK", 1)
    for dtype in (torch.float32, torch.bfloat16):
        check(SINE, 3, 4, 4, 4, dtype=dtype)


def test_gradients_that_nobody_needs_are_left_out():
    inputs, dy, _ = problem(SINE, 1, 4, 4, 4)
    everything = value_and_grads(SINE.ours(EVERYTHING), inputs, dy)[1:]
    for alone, want in enumerate(everything):
        leaves = [t.detach().requires_grad_(i == alone) for i, t in enumerate(inputs)]
        SINE.ours(EVERYTHING)(*leaves).backward(dy)
        assert rms_error(leaves[alone].grad, want) < 1e-14
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != alone)


def test_nan_reaches_what_sees_it():
    inputs, dy, _ = problem(KAN, 1, 4, 5, 6, geometry=GEOMETRIES["plain"])
    inputs[0][0, 2, 2, 3] = torch.nan
    y, dx, *_ = value_and_grads(KAN.ours(GEOMETRIES["plain"]), inputs, dy)
    want = KAN.definition(GEOMETRIES["plain"])(*inputs).isnan()
    assert torch.equal(y.isnan(), want)
    assert dx.isnan().sum() == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_opcheck():
    (x, u, v, bias, frequency), dy, _ = problem(SINE, 2, 4, 5, 6, dtype=torch.float32)
    terms = "[" + ", ".join(b.spec for b in SINE.bases) + "]"
    geometry = [2, 1], [1, 1, 1, 1], [1, 2], 2
    tensors = [frequency, waves(4)[1].float()]
    leaves = [t.clone().requires_grad_() for t in (x, u, v, bias, frequency)]
    inputs = leaves[0], leaves[1:3], leaves[3], [leaves[4], tensors[1]], terms, *geometry
    opcheck(basis_conv2d_op, (*inputs, True))
    for needs in ([True, True, True, True, False], [False, True, False, False, False]):
        opcheck(basis_conv2d_backward_op, (dy, x, [u, v], tensors, terms, *geometry, needs, True))


def test_compile_and_export():
    inputs, dy, _ = problem(KAN, 2, 4, 5, 6, dtype=torch.float32)
    check_compiles(KAN.ours(EVERYTHING), inputs, dy, "basis_conv2d")


def test_two_runs_agree_bit_for_bit():
    inputs, dy, _ = problem(SINE, 2, 4, 5, 6, dtype=torch.float32)
    check_repeats(SINE.ours(EVERYTHING), inputs, dy)


def test_what_triton_cannot_do_is_refused():
    check_refusals(KAN.ours(EVERYTHING), problem(KAN, 1, 4, 3, 4)[0])
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 3, 1, 1)
    with pytest.raises(RuntimeError, match="the basis OwnSine has no Triton kernel"):
        basis_conv2d(x, [(OwnSine(3), weight, torch.randn(3), torch.randn(2, 3))])


def test_a_basis_without_a_kernel_goes_by_its_own_methods_in_the_same_op():
    x, weight = torch.randn(1, 2, 4, 3, dtype=torch.float64), torch.randn(3, 2, 3, 2, 2, dtype=torch.float64)
    terms, geometry = "[" + OwnSine(3).spec + "]", ([1, 1], [0, 1, 0, 0], [1, 1], 1)

    def through(triton: bool) -> tuple[torch.Tensor, ...]:
        frequency, phase = waves(2)
        return value_and_grads(
            lambda x, w, f: basis_conv2d_op(x, [w], None, [f, phase], terms, *geometry, triton), [x, weight, frequency]
        )

    for got, want in zip(through(True), through(False), strict=True):
        assert rms_error(got, want) < 1e-13
