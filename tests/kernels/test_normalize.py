"""`normalize_` on both backends: unit vectors, in place, and bit for bit what is unit already."""

import pytest
import torch
from torch import nn
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.normalize import _normalize_op, normalize_
from archzoo.layers.ngpt import NormalizedLinear, constrain_
from tests.helpers import rms_error
from tests.kernels.triton_support import DTYPES, needs_triton, on_device, tolerance

both_axes = pytest.mark.parametrize("dim", [0, 1])


@pytest.fixture(params=["whole", "by parts"])
def blocks(request):
    """Several programs, whose vectors fit into a block, or are walked."""
    with on_device(), use_backend("triton"):
        from archzoo.kernels._normalize_triton import NORMALIZE

        size = 64 if request.param == "whole" else 8
        with NORMALIZE.forced(ROWS=size, COLS=size):
            yield


def definition(weight, dim):
    wide = weight.double()
    return wide / wide.norm(dim=dim, keepdim=True).clamp_min(1e-12)


@both_axes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 20), (1, 7), (7, 1), (0, 3), (3, 0)], ids=str)
def test_vectors_become_unit(backend, shape, dtype, dim):
    weight = (3 * torch.randn(shape)).to(dtype)
    want, memory = definition(weight, dim), weight.data_ptr()
    normalize_(weight, dim)
    assert weight.data_ptr() == memory
    assert rms_error(weight, want) <= tolerance(dtype, 0)


@both_axes
@needs_triton
@pytest.mark.usefixtures("blocks")
def test_programs_and_parts(dim):
    weight = torch.randn(20, 19, dtype=torch.float64)
    weight[:, 3] = weight[4] = 0
    weight[5, 6] = torch.nan
    want = definition(weight, dim)
    normalize_(weight, dim)
    torch.testing.assert_close(weight, want, rtol=1e-12, atol=1e-14, equal_nan=True)
    assert torch.equal(weight[4, :3], torch.zeros(3, dtype=weight.dtype))


@both_axes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_once_is_enough_bit_for_bit(backend, dtype, dim):
    weight = torch.randn(40, 30).to(dtype)
    normalize_(weight, dim)
    once = weight.clone()
    normalize_(weight, dim)
    assert torch.equal(weight, once)


@both_axes
def test_tiny_vectors_stay_as_short_as_the_clamp_says(backend, dim):
    weight = torch.full((4, 4), 1e-14, dtype=torch.float64)
    normalize_(weight, dim)
    assert rms_error(weight, torch.full((4, 4), 1e-2, dtype=torch.float64)) < 1e-12


def test_strides_do_not_matter(backend):
    weight = torch.randn(6, 10, dtype=torch.float64).t()
    want = definition(weight, 0)
    normalize_(weight, 0)
    assert rms_error(weight, want) < 1e-14
    assert weight.stride() == (1, 10)


def test_layers_are_constrained_in_place(backend):
    layers = nn.Sequential(NormalizedLinear(5, 7), NormalizedLinear(7, 4, normalize="out"))
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(2)
    version = layers[0].weight._version
    constrain_(layers)
    assert layers[0].weight._version > version, "autograd would not see the change"
    torch.testing.assert_close(layers[0].weight.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(layers[1].weight.norm(dim=0), torch.ones(7))
    assert all(layer.weight.requires_grad and layer.weight.is_leaf for layer in layers)


@needs_triton
def test_opcheck_and_compile(backend):
    weight = torch.randn(4, 6)
    if backend == "triton":
        opcheck(_normalize_op, (weight.clone(), 1))
    want = weight.clone()
    normalize_(want, 1)
    torch._dynamo.reset()
    torch.compile(normalize_, fullgraph=True, backend="aot_eager")(weight, 1)
    torch._dynamo.reset()
    assert torch.equal(weight, want)


def test_bad_arguments_are_refused():
    for shape, dim in (((2, 3, 4), 1), ((2, 3), 2), ((3,), 0)):
        with pytest.raises(ValueError, match=r"weight of shape .*, dim=.: must be a matrix, and 0 or 1"):
            normalize_(torch.ones(shape), dim)
