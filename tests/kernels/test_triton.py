"""What Triton kernels share: helpers, launches, the choice of the backend, and block sizes."""

import json

import pytest
import torch

from archzoo.kernels import _block_sizes, tune, use_backend
from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._block_sizes import BlockSizes, power_of_two
from tests.helpers import rms_error
from tests.kernels.triton_support import DTYPES, needs_triton, on_device, tolerance


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-5, 1.0, 30.0])
def test_helpers(dtype, scale):
    from tests.kernels import helpers_kernel

    with on_device():
        x = (torch.randn(32, 32) * scale).to(dtype)
        got = helpers_kernel.run(x, approximate=False)
    wide = x.double()
    for out, want in zip(got, (torch.sigmoid(wide), torch.tanh(wide), wide @ wide), strict=True):
        assert rms_error(out, want) <= tolerance(out.dtype, 0)


@needs_triton
def test_helpers_far_out_and_near_zero():
    from tests.kernels import helpers_kernel

    with on_device():
        x = torch.zeros(32, 32, dtype=torch.float32)
        x[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-30, -100.0, 0.0625])
        sigmoid, tanh, _ = helpers_kernel.run(x, approximate=False)
    torch.testing.assert_close(sigmoid, torch.sigmoid(x), equal_nan=True)
    torch.testing.assert_close(tanh, torch.tanh(x), equal_nan=True, rtol=5e-7, atol=0)


@needs_triton
def test_products_are_by_tf32_only_where_torch_says_so():
    from archzoo.kernels._triton import dot_precision

    before = torch.get_float32_matmul_precision()
    try:
        for precision, want in (("highest", "tf32x3"), ("high", "tf32")):
            torch.set_float32_matmul_precision(precision)
            assert dot_precision(torch.float32) == want
            assert dot_precision(torch.float64) == dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@needs_triton
def test_an_empty_grid_starts_nothing():
    from archzoo.kernels._triton import launch

    launch(None, (0,), torch.zeros(0))


@needs_triton
def test_triton_is_refused_for_tensors_that_no_kernel_takes():
    x = torch.zeros(2)
    assert not takes_triton("op", x=x, y=None)
    assert not takes_triton("op", x=x.to(torch.float8_e4m3fn))
    with use_backend("triton"), on_device():
        x = torch.zeros(2)
        assert takes_triton("op", x=x, y=None, z=x)
        with pytest.raises(ValueError, match=r"y of torch\.float8_e4m3fn: must be float16, .* kernel of op"):
            takes_triton("op", x=x, y=x.to(torch.float8_e4m3fn))
        with pytest.raises(ValueError, match="y on meta: must be on one CUDA device with all others"):
            takes_triton("op", x=x, y=x.to("meta"))
        with pytest.raises(RuntimeError, match="op: a thing has no Triton kernel"):
            refuse_triton("op", "a thing")
    refuse_triton("op", "a thing")


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_powers_of_two(n, power):
    assert power_of_two(n) == power


def block_sizes(name="op"):
    return BlockSizes(
        name,
        rule=lambda dtype, N: {"ROWS": N},
        candidates=lambda dtype, N: [{"ROWS": 2}, {"ROWS": 3}],
        problem=lambda dtype, device, N: lambda: _block_sizes._forced[name]["ROWS"],
        sizes=[(5,)],
    )


def test_block_sizes_are_the_tables_or_else_the_rules(monkeypatch):
    x, sizes = torch.zeros(1), block_sizes()
    monkeypatch.setattr(_block_sizes, "_capability", lambda device: 90)
    monkeypatch.setattr(_block_sizes, "_table", lambda: {"op": {"sm90 float32 8": {"ROWS": 7}}})
    assert sizes.of(x, 5) == sizes.of(x, 8) == {"ROWS": 7}
    assert sizes.of(x, 9) == {"ROWS": 16}
    assert sizes.of(x.double(), 5) == {"ROWS": 8}
    with sizes.forced(ROWS=1):
        assert sizes.of(x, 5) == {"ROWS": 1}
    assert sizes.of(x, 5) == {"ROWS": 7}


def test_the_committed_table_names_passes_that_there_are():
    table = json.loads(_block_sizes.TABLE.read_text())
    assert set(table) <= set(_block_sizes.all_tuned()) if table else table == {}


def test_tune_writes_the_fastest_of_the_candidates(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_block_sizes, "_capability", lambda device: 90)
    monkeypatch.setattr(_block_sizes, "all_tuned", lambda: {name: block_sizes(name) for name in ("op", "other")})
    monkeypatch.setattr(_block_sizes, "_milliseconds", lambda run: abs(run() - 3))
    path = tmp_path / "table.json"
    path.write_text('{"op": {"sm80 float32 8": {"ROWS": 1}}}')
    table = tune("op", path=path)
    best = {"sm90 bfloat16 8": {"ROWS": 3}, "sm90 float32 8": {"ROWS": 3}}
    assert table == json.loads(path.read_text()) == {"op": {"sm80 float32 8": {"ROWS": 1}, **best}}
    with pytest.raises(ValueError, match=r"ops=\['relu'\]: must be among op, other"):
        tune("relu", path=path)


def test_tune_says_that_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="measures on a CUDA device, and there is none"):
        tune()
