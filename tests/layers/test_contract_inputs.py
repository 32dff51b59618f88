"""What inputs a layer takes: shapes, strides, dtypes, batches."""

import re

import pytest
import torch

from tests.helpers import (
    assert_all_close,
    layer_value_and_grads,
    rms_error,
)
from tests.layers.contract import every_layer


@every_layer()
def test_leading_dimensions_are_free(case):
    layer = case.generic(dtype=torch.float64)
    for leading in case.sizes.leading:
        x = case.x(*leading, dtype=torch.float64)
        y = layer(x)
        assert y.shape == (*leading, *case.sizes.y)
        rows = x.reshape(-1, *case.sizes.x)
        if len(rows):
            one_by_one = torch.cat([layer(row[None]) for row in rows]).view_as(y)
            assert rms_error(y, one_by_one) < 1e-13, leading


@every_layer()
def test_empty_batch_has_gradients_of_zero(case):
    layer = case.generic()
    x = case.x(0).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@every_layer(
    exempt={
        "linear": "torch.nn.Linear raises a RuntimeError about matrix shapes",
        "conv2d": "torch.nn.Conv2d raises a RuntimeError about the channels, and takes an image without a batch axis",
    }
)
def test_wrong_input_shape_is_refused_with_both_sizes(case):
    layer = case.build()
    right = case.sizes.x[case.sizes.feature_axis]
    for shape in case.sizes.refused:
        with pytest.raises(ValueError, match=rf"\b{right}\b") as caught:
            layer(torch.zeros(shape))
        if len(shape) > 1:
            assert re.search(rf"\b{shape[case.sizes.feature_axis]}\b", str(caught.value)), caught.value


@every_layer(
    exempt={
        "linear": "torch.nn.Linear raises a RuntimeError about matrix dtypes",
        "conv2d": "torch.nn.Conv2d raises a RuntimeError about types",
    }
)
def test_an_input_of_another_dtype_is_refused_or_computed_but_never_garbage(case):
    layer, x = case.generic(), case.x(4)
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
            layer(x.to(dtype))
    for dtype in (torch.float64, torch.bfloat16):
        try:
            y = layer(x.to(dtype))
        except ValueError as error:
            assert str(dtype).removeprefix("torch.") in str(error)
        else:
            assert rms_error(y, layer(x)) < 5e-2, f"{dtype} into float32"


@every_layer()
def test_strides_do_not_matter_and_the_input_is_left_alone(case):
    layer = case.generic(dtype=torch.float64)
    x, dy = case.x(4, dtype=torch.float64), case.dy(4, dtype=torch.float64)
    truth = layer_value_and_grads(layer, x, dy)
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    padded[..., 1::2] = x
    backwards = x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    views = {"strided": padded[..., 1::2], "transposed": backwards}
    if case.entry.kind == "conv2d":
        views["channels_last"] = x.to(memory_format=torch.channels_last)
    for what, view in views.items():
        before = view.clone()
        assert_all_close(layer_value_and_grads(layer, view, dy), truth, f"{what} input")
        assert torch.equal(view, before), "the layer wrote into its input"
    strided_dy = torch.stack([dy, dy], -1)[..., 0]
    assert_all_close(layer_value_and_grads(layer, x, strided_dy), truth, "strided gradient")

    expanded = x[:1].expand(x.shape)
    want = layer_value_and_grads(layer, expanded.contiguous(), torch.ones_like(dy))
    assert_all_close(layer_value_and_grads(layer, expanded, torch.ones_like(dy)), want, "expanded input")
    leaf = x[:1].clone().requires_grad_()
    layer(leaf.expand(x.shape)).sum().backward()  # the gradient of sum() is an expanded tensor
    assert rms_error(leaf.grad, want["x"].sum(0, keepdim=True)) < 1e-11


@every_layer()
def test_rows_do_not_mix_and_a_batch_is_the_sum_of_its_parts(case):
    """5003 rows: more than any block that a chunked implementation walks at once, and no multiple of one."""
    count = 5003 if case.entry.kind == "linear" else 67
    layer = case.generic(dtype=torch.float64)
    x, dy = case.x(count, dtype=torch.float64), case.dy(count, dtype=torch.float64)
    whole = layer_value_and_grads(layer, x, dy)
    cut = count // 3
    first = layer_value_and_grads(layer, x[:cut], dy[:cut])
    second = layer_value_and_grads(layer, x[cut:], dy[cut:])
    parts = {name: first[name] + second[name] for name in first if name not in ("x", "y")}
    parts |= {name: torch.cat([first[name], second[name]]) for name in ("x", "y")}
    assert_all_close(whole, parts, "a batch against its two parts")
