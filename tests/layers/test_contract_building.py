"""How layers are built, cast, filled and reset."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch

from tests.helpers import (
    assert_same_bits,
    layer_value_and_grads,
    rms_error,
)
from tests.layers.contract import every_layer, snapshot, tensors_of


@every_layer()
def test_dtype_is_that_of_all_parameters_and_of_the_output(case):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = case.build(dtype=dtype)
        # What a layer says must not be rounded, as the decays of a recurrence, is float32 at least.
        wide = dict.fromkeys(getattr(layer, "float32_parameters", ()), torch.promote_types(dtype, torch.float32))
        for name, parameter in layer.named_parameters():
            assert parameter.dtype == wide.get(name, dtype), name
        for name, tensor in layer_value_and_grads(layer, case.x(5, dtype=dtype)).items():
            assert tensor.dtype == wide.get(name, dtype), name
            assert tensor.isfinite().all(), name


@every_layer()
def test_default_dtype_and_later_casts_are_followed(case):
    x = case.x(5, dtype=torch.float64)
    layer = case.build()
    truth = layer(x.float())
    assert truth.dtype == torch.float32
    assert rms_error(copy.deepcopy(layer).double()(x), truth) < 1e-5
    for dtype, bound in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        y = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        assert rms_error(y, truth) < bound
    torch.set_default_dtype(torch.float64)
    try:
        assert {p.dtype for p in case.build().parameters()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


@every_layer()
def test_meta_device_gives_shapes_without_memory(case):
    layer = case.build(device="meta")
    with torch.device("meta"):
        in_context = case.build()
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(case.build()).items()}
    for built in (layer, in_context):
        assert {tensor.device.type for tensor in tensors_of(built).values()} == {"meta"}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(built).items()} == shapes
    x = case.x(5).to("meta").requires_grad_()
    y = layer(x)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.float32, (5, *case.sizes.y))
    y.sum().backward()
    for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        assert tensor.grad is not None, name
        assert (tensor.grad.device.type, tensor.grad.shape, tensor.grad.dtype) == ("meta", tensor.shape, tensor.dtype)


@every_layer()
def test_a_layer_built_on_meta_can_be_filled_later(case):
    built = snapshot(case.build(seed=3))
    layer = case.build(device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    assert_same_bits(snapshot(layer), built, "to_empty() and reset_parameters() against building")

    loaded = case.build(device="meta")
    loaded.load_state_dict(case.build(seed=3).state_dict(), strict=True, assign=True)
    assert_same_bits(snapshot(loaded), built, "load_state_dict(assign=True) against building")


@every_layer()
def test_reset_parameters_restores_all_state(case):
    layer = case.build(seed=7)
    built = snapshot(layer)
    with torch.no_grad():
        for tensor in tensors_of(layer).values():
            tensor.fill_(True if tensor.dtype == torch.bool else 77)
    torch.manual_seed(7)
    assert layer.reset_parameters() is None
    assert_same_bits(snapshot(layer), built, "after reset_parameters()")
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())


@every_layer()
def test_init_follows_the_global_seed_and_no_other_randomness(case):
    random.seed(1)
    np.random.seed(1)
    others = random.getstate(), pickle.dumps(np.random.get_state())
    first, again, other = (snapshot(case.build(seed)) for seed in (1, 1, 2))
    assert_same_bits(first, again, "two layers of one seed")
    assert any(not torch.equal(first[name], other[name]) for name in first), "another seed changes nothing"
    assert others == (random.getstate(), pickle.dumps(np.random.get_state()))
    assert all(tensor.isfinite().all() for tensor in first.values())


@every_layer(kind="linear")
def test_bias_is_a_vector_that_can_be_left_out(case):
    with_bias, without = case.build(bias=True), case.build(bias=False)
    assert with_bias.bias.shape == (12,)
    assert without.bias is None
    assert "bias" not in without.state_dict()
    x = case.x(5)
    y = with_bias(x)
    with torch.no_grad():
        before = y.clone()
        with_bias.bias += 1
    assert not torch.equal(with_bias(x), before), "bias does nothing"
    assert without(x).shape == (5, 12)


@every_layer(
    exempt={
        "linear": "torch.nn.Linear takes 0 outputs or inputs, and refuses -1 and 2.5 by errors of its own",
        "conv2d": "torch.nn.Conv2d takes 0 channels, and refuses others by errors that name no argument",
    }
)
def test_bad_sizes_are_refused_by_name(case):
    for name in case.sizes.args:
        for value in (-1, 2.5) if name == "padding" else (0, -1, 2.5, "8", None):
            with pytest.raises(ValueError, match=name) as caught:
                case.build(**{name: value})
            assert str(value) in str(caught.value), f"the message hides the value {value!r}: {caught.value}"
