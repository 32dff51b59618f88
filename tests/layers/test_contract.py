"""What every layer of the zoo owes its users, whatever its idea: one suite over `archzoo.list_layers()`.

A new layer is tested here the moment its file exists. Facts of one layer alone are in `test_<layer>.py`.

Where torch's own `nn.Linear` promises less than the zoo does, `exempt` says so beside the test; an exemption that is
not needed fails. The last tests hand deliberately broken layers to the suite and expect it to notice.
"""

import copy
import inspect
import io
import pickle
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import archzoo
from archzoo.registry import Card, LayerEntry, get_layer
from tests.helpers import (
    RecordOps,
    assert_all_close,
    assert_same_bits,
    layer_value_and_grads,
    rms,
    rms_error,
)

# --- What is tested: each layer at its kind's sizes -------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How to build and feed a layer of one kind. 8 and 12 suit layers whose sizes must be multiples of 1, 2 or 4."""

    standard: dict[str, Any]
    """The arguments that every layer of the kind takes first, in order; those without a default here have none."""
    args: dict[str, int]
    small: dict[str, int]
    """Smaller ones, for tests that try each element in turn."""
    x: tuple[int, ...]
    """Shape of an input without its leading dimensions, with `args`."""
    small_x: tuple[int, ...]
    y: tuple[int, ...]
    leading: tuple[tuple[int, ...], ...]
    refused: tuple[tuple[int, ...], ...]
    """Shapes of inputs that must be refused."""
    feature_axis: int
    usual: Callable[[], nn.Module]
    """The layer that it stands in for, at the same sizes."""


REQUIRED = inspect.Parameter.empty
CONV_STANDARD = {
    "in_channels": REQUIRED,
    "out_channels": REQUIRED,
    "kernel_size": REQUIRED,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "bias": bool,
}
KINDS = {
    "linear": Sizes(
        standard={"in_features": REQUIRED, "out_features": REQUIRED, "bias": bool},
        args={"in_features": 8, "out_features": 12},
        small={"in_features": 4, "out_features": 8},
        x=(8,),
        small_x=(4,),
        y=(12,),
        leading=((), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)),
        refused=((2, 7), (2, 12), (9,), (2, 1), (2, 0), ()),
        feature_axis=-1,
        usual=lambda: nn.Linear(8, 12),
    ),
    "conv2d": Sizes(
        standard=CONV_STANDARD,
        args={"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1},
        small={"in_channels": 4, "out_channels": 4, "kernel_size": 2},
        x=(8, 5, 4),
        small_x=(4, 3, 2),
        y=(12, 5, 4),
        leading=((1,), (3,), (0,)),
        refused=((2, 7, 5, 4), (2, 12, 5, 4), (8,), ()),
        feature_axis=-3,
        usual=lambda: nn.Conv2d(8, 12, 3, padding=1),
    ),
    "mixer": Sizes(
        standard={"dim": REQUIRED},
        args={"dim": 16},
        small={"dim": 4},
        x=(6, 16),
        small_x=(3, 4),
        y=(6, 16),
        leading=((1,), (3,), (0,)),
        refused=((2, 6, 15), (2, 6, 32), (16,), ()),
        feature_axis=-1,
        usual=lambda: nn.Linear(16, 16),
    ),
}


@dataclass(frozen=True)
class Case:
    """One layer, with what the tests need to build and feed it."""

    entry: LayerEntry
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", KINDS[self.entry.kind])

    def build(self, seed: int = 0, small: bool = False, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        takes = inspect.signature(self.entry.cls).parameters
        few = {"d_state": 4} if small and "d_state" in takes else {}  # states make parameters
        return self.entry.cls(**{**(self.sizes.small if small else self.sizes.args), **few, **options})

    def generic(self, seed: int = 0, small: bool = False, **options: Any) -> nn.Module:
        """A layer a little off its initial state, where nothing is zero, tied or on a kink by construction."""
        layer = self.build(seed, small, **options)
        generator = torch.Generator().manual_seed(seed + 1000)
        with torch.no_grad():
            for parameter in layer.parameters():
                noise = torch.empty(parameter.shape, dtype=torch.float64).uniform_(-0.1, 0.1, generator=generator)
                parameter += noise.to(parameter)
        return layer

    def x(self, *leading: int, seed: int = 0, small: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal inputs; the same values in every dtype, but for rounding."""
        shape = (*leading, *(self.sizes.small_x if small else self.sizes.x))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2000), dtype=torch.float64).to(dtype)

    def dy(self, *leading: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 3000)
        return torch.randn((*leading, *self.sizes.y), generator=generator, dtype=torch.float64).to(dtype)


COMPOSED = {"ngpt_block", "phm_block", "phm_attention", "mamba3", "real_npu", "inalu"}
"""Made of layers, or variants of them, that the zoo has by themselves."""


def every_layer(
    kind: str | None = None, exempt: dict[str, str] | None = None, sampled: bool = False
) -> pytest.MarkDecorator:
    """Parametrizes a test over the zoo.

    `exempt` gives, for a layer that need not pass, the reason. With `sampled` those are left to the slow tests whose
    parts others have: convolutions of layers that are there as linear ones too, by the same code, and `COMPOSED`.
    """
    exempt = exempt or {}
    cases = []
    for name in archzoo.list_layers():
        entry = get_layer(name)
        if entry.kind in KINDS and kind in (None, entry.kind) and entry.cls.__module__ != __name__:
            marks = [pytest.mark.xfail(reason=exempt[name], strict=True)] if name in exempt else []
            if sampled and (name.removesuffix("_conv2d") != name or name in COMPOSED):
                marks.append(pytest.mark.slow)
            cases.append(pytest.param(Case(entry), id=name, marks=marks))
    return pytest.mark.parametrize("case", cases)


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Everything that a layer holds, non-persistent buffers included."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(layer).items()}


def train(layer: nn.Module, x: Tensor, target: Tensor, steps: int) -> list[float]:
    """The training loop in small: every hook that a layer may have is called. Returns the losses."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        if hasattr(layer, "regularization_loss"):
            loss = loss + layer.regularization_loss()
        loss.backward()
        optimizer.step()
        if hasattr(layer, "constrain_"):
            layer.constrain_()
    return losses


# --- What it says of itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", archzoo.list_layers())
def test_card_is_filled_in(name):
    card = archzoo.card(name)
    for part in ("title", "authors", "equation", "headline", "reproduced"):
        assert getattr(card, part).strip(), f"{part} is empty"
    assert "=" in card.equation
    assert "$" not in card.equation, "the equation is LaTeX without dollar signs"
    assert 1940 <= card.year <= 2100
    assert re.fullmatch(r"|\d{4}\.\d{4,5}|[a-z-]+/\d{7}", card.arxiv), f"{card.arxiv!r} is no arXiv id"
    assert card.title in str(card)
    assert card.equation in str(card)


@pytest.mark.parametrize("name", archzoo.list_layers())
def test_class_can_be_imported_from_archzoo(name):
    cls = get_layer(name).cls
    if not cls.__module__.startswith("archzoo."):
        return  # torch's own, or another package's
    assert getattr(archzoo, cls.__name__) is cls
    assert getattr(archzoo.layers, cls.__name__) is cls


@every_layer(
    exempt={
        "linear": "torch.nn.Linear takes device and dtype by position too",
        "conv2d": "torch.nn.Conv2d takes padding_mode, device and dtype by position too",
    }
)
def test_signature_is_the_kinds_then_keyword_only_options_then_device_and_dtype(case):
    parameters = inspect.signature(case.entry.cls).parameters
    standard = list(parameters.values())[: len(case.sizes.standard)]
    assert [p.name for p in standard] == list(case.sizes.standard)
    for parameter, default in zip(standard, case.sizes.standard.values(), strict=True):
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter
        if default is bool:
            assert isinstance(parameter.default, bool), parameter
        else:
            assert parameter.default == default, parameter
    options = list(parameters.values())[len(standard) :]
    assert all(p.kind is p.KEYWORD_ONLY for p in options), options
    assert all(p.default is not REQUIRED for p in options), "a layer must build from its sizes alone"
    assert [(p.name, p.default) for p in options[-2:]] == [("device", None), ("dtype", None)]


@every_layer()
def test_docstring_explains_every_argument(case):
    doc = inspect.getdoc(case.entry.cls) or ""
    assert "Args:" in doc
    assert "Shape:" in doc
    explained = doc.partition("Args:")[2]
    for name in inspect.signature(case.entry.cls).parameters:
        if name not in ("device", "dtype"):
            assert re.search(rf"^\s+[\w`, ]*\b{name}\b[\w`, ]*(\(.*\))?:", explained, re.MULTILINE), name
    for method in ("regularization_loss", "constrain_"):
        if hasattr(case.entry.cls, method):
            assert inspect.getdoc(getattr(case.entry.cls, method)), f"{method} does not say what it does, and when"


@every_layer()
def test_repr_shows_the_sizes(case):
    text = case.build().extra_repr()
    for size in {size for size in case.sizes.args.values() if size > 1}:
        assert re.search(rf"\b{size}\b", text), text
    assert case.entry.cls.__name__ in repr(case.build())


@every_layer()
def test_nonlinear_flag_tells_whether_an_activation_may_be_left_out(case):
    layer = case.generic(dtype=torch.float64)
    x, other = case.x(5, dtype=torch.float64), case.x(5, seed=1, dtype=torch.float64)
    zero = layer(torch.zeros_like(x))
    bend = rms((layer(x + other) - zero) - (layer(x) - zero) - (layer(other) - zero)) / rms(layer(x))
    if case.entry.nonlinear:
        assert bend > 1e-3, "registered as nonlinear=True, but the layer is affine"
    else:
        assert bend < 1e-9, "registered as nonlinear=False, but the layer bends its input"


# --- Building and resetting -------------------------------------------------------------------------------------------


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


# --- Shapes and strides -----------------------------------------------------------------------------------------------


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


# --- Values and gradients ---------------------------------------------------------------------------------------------


@every_layer(sampled=True)
def test_gradients_pass_gradcheck(case):
    layer = case.generic(small=True, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (case.x(2, small=True, dtype=torch.float64), *(p.detach() for p in parameters))
    large = sum(t.numel() for t in inputs) > 300  # then along random directions, not number by number
    assert torch.autograd.gradcheck(call, tuple(t.requires_grad_() for t in inputs), fast_mode=large)


@every_layer(sampled=True)
def test_double_backward_passes_gradgradcheck(case):
    layer = case.generic(small=True, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (case.x(2, small=True, dtype=torch.float64), *(p.detach() for p in parameters))
    assert torch.autograd.gradgradcheck(call, tuple(t.requires_grad_() for t in inputs), fast_mode=True)


@every_layer()
def test_gradient_penalty_trains_every_parameter_it_depends_on(case):
    """The gradient of the input, made with create_graph=True, is the one made without."""
    layer = case.generic(dtype=torch.float64)
    x, dy = case.x(5, dtype=torch.float64).requires_grad_(), case.dy(5, dtype=torch.float64)
    (plain,) = torch.autograd.grad(layer(x), x, dy)
    (with_graph,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    assert rms_error(with_graph, plain) < 1e-11
    penalty = with_graph.square().sum()
    gradients = torch.autograd.grad(penalty, list(layer.parameters()), allow_unused=True)
    assert any(gradient is not None and rms(gradient) > 0 for gradient in gradients)


@every_layer()
def test_every_parameter_trains(case):
    gradients = layer_value_and_grads(case.generic(), case.x(16), case.dy(16))
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert rms(gradient) > 0, f"the gradient of {name} is zero everywhere"


@every_layer()
def test_gradients_are_the_same_whichever_are_asked_for(case):
    layer = case.generic()
    x, dy = case.x(5), case.dy(5)
    truth = layer_value_and_grads(layer, x, dy)
    for name in dict(layer.named_parameters()):
        alone = copy.deepcopy(layer).requires_grad_(False)
        alone.get_parameter(name).requires_grad_()
        alone(x).backward(dy)
        assert rms_error(alone.get_parameter(name).grad, truth[name]) < 1e-6, name
        assert all(p.grad is None for n, p in alone.named_parameters() if n != name)
    frozen, leaf = copy.deepcopy(layer).requires_grad_(False), x.clone().requires_grad_()
    frozen(leaf).backward(dy)
    assert rms_error(leaf.grad, truth["x"]) < 1e-6
    with torch.no_grad():
        assert torch.equal(layer(x), truth["y"])
    with torch.inference_mode():
        assert torch.equal(layer(x), truth["y"])


@every_layer()
def test_functional_gradients_equal_autograds(case):
    layer = case.generic(dtype=torch.float64)
    x = case.x(5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sin().sum())(parameters)
    layer(x).sin().sum().backward()
    assert_all_close(gradients, {name: p.grad for name, p in layer.named_parameters()}, "torch.func.grad")


@every_layer()
def test_two_runs_agree_bit_for_bit(case):
    x, dy = case.x(300), case.dy(300)
    layer, twin = case.generic(), case.generic()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = layer_value_and_grads(layer, x, dy)
    assert torch.equal(torch.get_rng_state(), state), "forward and backward drew random numbers"
    assert_same_bits(first, layer_value_and_grads(layer, x, dy), "the second run")
    assert_same_bits(first, layer_value_and_grads(twin, x, dy), "another layer of the same seed")


@every_layer(sampled=True)
def test_training_lowers_the_loss_and_repeats_bit_for_bit(case):
    x = case.x(64)
    torch.manual_seed(1)
    target = case.sizes.usual()(x).detach()
    runs = []
    for _ in range(2):
        layer = case.build(seed=0)
        losses = train(layer, x, target, steps=25)
        runs.append(snapshot(layer))
    assert_same_bits(*runs, "25 steps, twice")
    assert losses[-1] < 0.95 * losses[0], f"from {losses[0]:.3g} to {losses[-1]:.3g}"


@every_layer()
def test_nan_in_gives_nan_out_in_its_own_row(case):
    layer = case.generic()
    clean = case.x(4)
    x = clean.clone()
    x[1].view(-1)[x[1].numel() // 2] = torch.nan
    y, want = layer(x), layer(clean)
    assert y[1].isnan().all() if case.entry.kind == "linear" else y[1].isnan().any(), "NaN came out as a number"
    others = [0, 2, 3]
    assert rms_error(y[others], want[others]) < 1e-5, "a NaN in one row reached another"
    gradients = layer_value_and_grads(layer, x, case.dy(4))
    names = dict(layer.named_parameters()).keys()
    assert any(gradients[name].isnan().any() for name in names), "all gradients of NaN are numbers"
    for name in names:
        broken = copy.deepcopy(layer)
        with torch.no_grad():
            broken.get_parameter(name).view(-1)[-1] = torch.nan
        assert broken(clean).isnan().any(), f"NaN in {name} came out as a number"


# --- Tools of torch ---------------------------------------------------------------------------------------------------


@every_layer(sampled=True)
def test_compiled_equals_eager(case):
    """Whole graph; a second batch size may recompile with a symbolic one, which a third must then share."""
    torch._dynamo.reset()
    layer = case.generic(dtype=torch.float64)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for batch in (5, 7, 9):
        x, dy = case.x(batch, dtype=torch.float64), case.dy(batch, dtype=torch.float64)
        want = layer_value_and_grads(layer, x, dy)
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
        got = dict(zip(["y", "x", *dict(layer.named_parameters())], [y.detach(), *gradients], strict=True))
        assert_all_close(got, want, f"compiled, batch {batch}")
    assert 1 <= len(graphs) <= 2, f"{len(graphs)} graphs for three batch sizes"


def under_autocast(module: nn.Module, layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
    gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], dy.to(y.dtype))
    return dict(zip(["y", "x", *dict(layer.named_parameters())], [y.detach(), *gradients], strict=True))


@every_layer(sampled=True)
def test_autocast_follows_the_usual_layer(case):
    layer, usual = case.generic(), case.sizes.usual()
    x, dy = case.x(64), case.dy(64)
    truth = layer_value_and_grads(layer, x, dy)
    rounded = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    # What rounding the inputs, the weights and dy to bfloat16 costs, all arithmetic being exact: the yardstick.
    yardstick = layer_value_and_grads(rounded, x.bfloat16().float(), dy.bfloat16().float())

    got = under_autocast(layer, layer, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        # A mixer may hold its residual stream, and then keeps x's dtype, as x + f(x) does.
        assert got["y"].dtype in {usual(x).dtype, *([x.dtype] if case.entry.kind == "mixer" else [])}
        assert layer(x[:0]).dtype == got["y"].dtype
    for name, tensor in got.items():
        if name != "y":
            assert tensor.dtype == torch.float32, f"gradient of {name}"
        assert tensor.isfinite().all(), name
        floor = 6e-3 if name == "y" else 1e-2
        error, allowed = rms_error(tensor, truth[name]), 2 * rms_error(yardstick[name], truth[name]) + floor
        assert error <= allowed, f"{name} under autocast: error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.slow
@every_layer(sampled=True)
def test_autocast_is_compiled_as_it_runs(case):
    layer, x, dy = case.generic(), case.x(64), case.dy(64)
    torch._dynamo.reset()
    eager, compiled = (
        under_autocast(module, layer, x, dy)
        for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    )
    assert compiled["y"].dtype == eager["y"].dtype
    assert_all_close(compiled, eager, "compiled under autocast", bound=1e-2)


@every_layer()
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["non_strict", "strict"])
def test_exported_program_equals_eager_at_any_batch_size(case, strict):
    torch._dynamo.reset()
    layer = case.generic(dtype=torch.float64).eval()
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(
        layer, (case.x(5, dtype=torch.float64),), dynamic_shapes=({0: batch},), strict=strict
    ).module()
    for size in (5, 9):
        x = case.x(size, dtype=torch.float64)
        assert rms_error(program(x), layer(x)) < 1e-13


@every_layer()
def test_copies_are_equal_and_independent_before_and_after_use(case):
    layer = case.generic()
    if hasattr(layer, "constrain_"):  # the training loop has called it by the time anybody copies
        layer.constrain_()
    x, dy = case.x(5), case.dy(5)
    before = copy.deepcopy(layer)
    layer(x).backward(dy)
    if hasattr(layer, "constrain_"):  # and drops what a forward pass left behind
        layer.constrain_()
    after = copy.deepcopy(layer)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = {"deepcopy before": before, "deepcopy after": after, "pickle": pickle.loads(pickle.dumps(layer))}
    copies["torch.save"] = torch.load(stream, weights_only=False)
    truth = layer_value_and_grads(layer, x, dy)
    for what, twin in copies.items():
        assert_same_bits(layer_value_and_grads(twin, x, dy), truth, what)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.fill_(0.123)
        assert_same_bits(layer_value_and_grads(layer, x, dy), truth, f"the layer, when its {what} changed")


@every_layer()
def test_state_dict_round_trip(case):
    layer, fresh = case.generic(seed=1), case.build(seed=2)
    x, dy = case.x(5), case.dy(5)
    missing = fresh.load_state_dict(layer.state_dict(), strict=True)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert_same_bits(layer_value_and_grads(fresh, x, dy), layer_value_and_grads(layer, x, dy), "the loaded layer")
    assert_same_bits(dict(fresh.state_dict()), dict(layer.state_dict()), "its state dict")
    assert {name for name, _ in layer.named_parameters()} <= layer.state_dict().keys()
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream, weights_only=True))


@pytest.fixture(scope="module")
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_layer()
@pytest.mark.usefixtures("one_process_group")
def test_distributed_data_parallel_gives_the_same_gradients(case):
    layer = case.generic()
    x, dy = case.x(5), case.dy(5)
    want = layer_value_and_grads(layer, x, dy)
    wrapped = DistributedDataParallel(copy.deepcopy(layer))
    for _ in range(2):  # the second pass raises if a parameter got no gradient in the first
        wrapped.zero_grad()
        wrapped(x).backward(dy)
    for name, parameter in wrapped.module.named_parameters():
        assert rms_error(parameter.grad, want[name]) < 1e-6, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_layer()
def test_cuda_equals_cpu_and_repeats_bit_for_bit(case):
    layer, twin = case.generic(dtype=torch.float64), case.generic(dtype=torch.float64).cuda()
    x, dy = case.x(33, dtype=torch.float64), case.dy(33, dtype=torch.float64)
    first, second = (layer_value_and_grads(twin, x.cuda(), dy.cuda()) for _ in range(2))
    assert {tensor.device.type for tensor in first.values()} == {"cuda"}
    assert_same_bits(first, second, "the second run on CUDA")
    on_cpu = {name: tensor.cpu() for name, tensor in first.items()}
    assert_all_close(on_cpu, layer_value_and_grads(layer, x, dy), "CUDA against CPU")
    assert {tensor.device.type for tensor in tensors_of(case.build(device="cuda")).values()} == {"cuda"}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            y = twin.float()(x.float().cuda())
        assert y.dtype == dtype
        assert rms_error(y.cpu(), on_cpu["y"]) < 5e-2


# --- Cost -------------------------------------------------------------------------------------------------------------


def counted_flops(layer: nn.Module, x: Tensor, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@every_layer()
def test_flops_are_counted(case):
    """By shapes alone: the same on meta as on the CPU; more rows cost more, and training costs more than inference."""
    layer, meta = case.build(), case.build(device="meta")
    counts = {
        (batch, backward): counted_flops(layer, case.x(batch).requires_grad_(), backward)
        for batch in (16, 32)
        for backward in (False, True)
    }
    assert 0 < counts[16, False] < counts[32, False]
    assert counts[16, False] < counts[16, True] < counts[32, True]
    for (batch, backward), count in counts.items():
        assert counted_flops(meta, case.x(batch).to("meta").requires_grad_(), backward) == count, "meta against CPU"


@every_layer()
def test_every_op_of_ours_has_a_flop_formula(case):
    layer = case.build()
    with RecordOps() as recorded:
        layer(case.x(16).requires_grad_()).sum().backward()
    ours = {op for op in recorded.ops if str(op).startswith("archzoo.")}
    missing = sorted(str(op) for op in ours if op not in flop_registry)
    assert not missing, f"no FLOP formula for {missing}: a budget would count them as free"


# --- Hooks of the training loop ---------------------------------------------------------------------------------------


@every_layer()
def test_regularization_loss_is_a_differentiable_scalar(case):
    layer = case.generic(dtype=torch.float64)
    if not hasattr(layer, "regularization_loss"):
        return
    for when in ("before the first forward", "after one"):
        loss = layer.regularization_loss()
        assert isinstance(loss, Tensor), when
        assert loss.shape == (), when
        assert loss.dtype == torch.float64, when
        assert loss.isfinite(), when
        layer.zero_grad()
        (layer(case.x(5, dtype=torch.float64)).sum() + loss).backward()
    if hasattr(layer, "constrain_"):
        layer.constrain_()
    assert layer.regularization_loss().isfinite()


@every_layer()
def test_constrain_works_in_place_and_once_is_enough(case):
    layer = case.generic()
    if not hasattr(layer, "constrain_"):
        return
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(10)
    layer(case.x(5)).sum().backward()
    parameters = dict(layer.named_parameters())
    assert layer.constrain_() is None
    once = snapshot(layer)
    layer.constrain_()
    assert_same_bits(snapshot(layer), once, "constrain_() twice")
    for name, parameter in layer.named_parameters():
        assert parameter is parameters[name], f"{name} was replaced: the optimizer would train the old one"
        assert parameter.requires_grad
        assert parameter.is_leaf
    assert layer(case.x(5)).isfinite().all()


# --- The suite can fail -----------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    """A mixer with nothing wrong."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.qkv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"input of shape {tuple(x.shape)}: must be (batch, length, {self.dim})")
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT / self.dim).softmax(-1) @ v

    def extra_repr(self) -> str:
        return str(self.dim)


class _SwallowsNaN(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num())


class _MixesRows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - (x.mean(0, keepdim=True) if x.ndim > 1 else 0))


class _WrongGradient(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.detach().square().sum(-1, keepdim=True)


class _ForgetsAnElement(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        y[..., 1:] = super().forward(x)[..., 1:]
        return y


class _ForgetsToReset(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("grid", torch.linspace(0, 1, 5))


class _WritesIntoItsInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.detach().mul_(2)
        return y


class _DrawsNumbers(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * torch.rand(self.out_features, dtype=x.dtype)


class _CountsForNothing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (x[..., None, :] * self.weight).sum(-1) + self.bias


class _HasAnIdleParameter(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.idle = nn.Parameter(torch.zeros(3))


class _IgnoresAutocast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def _case_of(cls: type[nn.Module], kind: Any = "linear", nonlinear: bool = False) -> Case:
    return Case(LayerEntry("toy", cls, kind, Card("-", "-", 2000, "", "y = x", "-", "-"), nonlinear))


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (_SwallowsNaN, test_nan_in_gives_nan_out_in_its_own_row),
        (_MixesRows, test_leading_dimensions_are_free),
        (_MixesRows, test_rows_do_not_mix_and_a_batch_is_the_sum_of_its_parts),
        (_WrongGradient, test_gradients_pass_gradcheck),
        (_WrongGradient, test_nonlinear_flag_tells_whether_an_activation_may_be_left_out),
        (_ForgetsAnElement, test_dtype_is_that_of_all_parameters_and_of_the_output),
        (_ForgetsToReset, test_a_layer_built_on_meta_can_be_filled_later),
        (_ForgetsToReset, test_reset_parameters_restores_all_state),
        (_ForgetsToReset, test_meta_device_gives_shapes_without_memory),
        (_WritesIntoItsInput, test_strides_do_not_matter_and_the_input_is_left_alone),
        (_DrawsNumbers, test_two_runs_agree_bit_for_bit),
        (_CountsForNothing, test_flops_are_counted),
        (_HasAnIdleParameter, test_every_parameter_trains),
        (_IgnoresAutocast, test_autocast_follows_the_usual_layer),
        (nn.Linear, test_bad_sizes_are_refused_by_name),
        (nn.Linear, test_signature_is_the_kinds_then_keyword_only_options_then_device_and_dtype),
    ],
    ids=lambda value: value.__name__.strip("_"),
)
def test_a_broken_layer_is_noticed(broken, test):
    with pytest.raises((AssertionError, RuntimeError, UserWarning, pytest.fail.Exception)):
        test(_case_of(broken))


@pytest.mark.parametrize(
    "sound",
    [_case_of(nn.Linear), _case_of(nn.Conv2d, "conv2d"), _case_of(_Attention, "mixer", nonlinear=True)],
    ids=["linear", "conv2d", "mixer"],
)
@pytest.mark.parametrize(
    "test",
    [
        test_nonlinear_flag_tells_whether_an_activation_may_be_left_out,
        test_dtype_is_that_of_all_parameters_and_of_the_output,
        test_meta_device_gives_shapes_without_memory,
        test_a_layer_built_on_meta_can_be_filled_later,
        test_reset_parameters_restores_all_state,
        test_leading_dimensions_are_free,
        test_empty_batch_has_gradients_of_zero,
        test_strides_do_not_matter_and_the_input_is_left_alone,
        test_rows_do_not_mix_and_a_batch_is_the_sum_of_its_parts,
        test_gradients_pass_gradcheck,
        test_double_backward_passes_gradgradcheck,
        test_every_parameter_trains,
        test_two_runs_agree_bit_for_bit,
        test_training_lowers_the_loss_and_repeats_bit_for_bit,
        test_nan_in_gives_nan_out_in_its_own_row,
        test_compiled_equals_eager,
        test_autocast_follows_the_usual_layer,
        test_copies_are_equal_and_independent_before_and_after_use,
        test_flops_are_counted,
    ],
    ids=lambda test: test.__name__,
)
def test_a_sound_layer_of_any_kind_is_not_accused(test, sound):
    test(sound)


def test_every_kind_of_layer_is_tested_or_documents_its_own_shape():
    assert {get_layer(name).kind for name in archzoo.list_layers()} <= {*KINDS, "module"}
