"""What every function-preserving start owes, whatever the layer: one suite over the registry.

A layer of kind `linear` has `from_linear`, one of kind `conv2d` has `from_conv2d`, and gives a `Start`, or says why it
never can. A new layer is tested here the moment its file exists, and fails if it has neither and is not listed below.
"""

import copy
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import archzoo
from archzoo.layers.start import Start
from archzoo.registry import get_layer
from tests.helpers import rms, rms_error

USUAL = {"linear": nn.Linear, "conv2d": nn.Conv2d}
METHOD = {"linear": "from_linear", "conv2d": "from_conv2d"}

WITHOUT: dict[str, str] = {}
"""Layers that have no such method, and why; nn.Linear and nn.Conv2d themselves need none."""

NEVER = {"inalu", "mcfc", "nalu", "nmu", "npu", "real_npu"}
"""Layers whose method always refuses, with a reason: no weighted sum is among their functions."""

NEAREST = {"fast_kan", "chebyshev_kan", "fourier_kan", "phm", "selectable_kan", "sine_kan", "wavelet_kan"}
"""Layers that come near only, with their default options, and so do their convolutions; all others are exact."""

MULTIPLE = {"phm": 4}
"""Of what the sizes must be multiples, where that is not 1."""

GROUPED = {"selectable_kan_conv2d": {"granularity": "layer"}}
"""Options that a convolution needs to have groups."""

UNBIASED = {"paon": {"degrees": (2, 1)}, "paon_conv2d": {"degrees": (2, 1)}}
"""Options with which an original without a bias is taken, where it is refused by default."""

OPTIONS = {
    "aptx": [{"train_alpha": False}, {"beta_groups": 2}],
    "paon": [{"degrees": (2, 2)}, {"degrees": (3, 1), "variant": "absolute"}, {"degrees": (2, 0)}],
    "paon_conv2d": [{"degrees": (2, 2)}],
    "phm": [{"n": 2}, {"rank": 2}, {"rule": "quaternion"}],
    "kan": [
        {"extrapolation": "zero"},
        {"extrapolation": "clamp", "grid_range": (-3.0, 3.0)},
        {"spline_order": 0},
        {"spline_order": 1, "standalone_scale": True},
        {"spline_order": 2, "base_activation": None, "grid_range": (0.0, 3.0)},
        {"extrapolation": "zero", "base_activation": "identity", "standalone_scale": True},
    ],
    "kan_conv2d": [{"extrapolation": "zero"}, {"pad_value": 0.0}],
    "fast_kan": [
        {"base_activation": None},
        {"base_activation": "identity"},
        {"base_activation": torch.sin},
        {"grid_size": 2, "grid_range": (0.0, 2.0)},
    ],
    "fast_kan_conv2d": [{"grid_range": (-2.0, 2.0), "base_activation": "gelu"}],
    "chebyshev_kan": [{"degree": 1}],
    "fourier_kan": [{"grid_size": 1}],
    "sine_kan": [{"grid_size": 4}],
    "wavelet_kan": [{"wavelet": "dog"}, {"wavelet": "morlet"}],
    "rational_kan": [{"denominator": "abs_sum", "share_numerator": False}],
    "selectable_kan": [
        {"pool": ("kan", "rational_kan")},
        {"pool": ("sine_kan", "wavelet_kan"), "granularity": "layer"},
    ],
    "selectable_kan_conv2d": [{"pool": ("kan_conv2d", "rational_kan_conv2d")}],
}
"""Further options to test starts with."""

EXACT_TOO = {
    "fast_kan": [{"base_activation": "identity"}],
    "selectable_kan": [{"pool": ("kan", "rational_kan")}],
    "selectable_kan_conv2d": [{"pool": ("kan_conv2d", "rational_kan_conv2d")}],
}
"""Which of those make a layer of `NEAREST` exact."""

NEAREST_TOO = {
    "kan": [{"extrapolation": "zero"}, {"extrapolation": "clamp", "grid_range": (-3.0, 3.0)}, {"spline_order": 0}],
    "kan_conv2d": [{"extrapolation": "zero"}],
}
"""Which of those leave another layer near only."""

REFUSED = {
    "chebyshev_kan": [({"degree": 0}, "a higher degree")],
    "fast_kan": [
        ({"layernorm": True}, "layernorm=False"),
        ({"layernorm": None}, "layernorm=False"),
        ({"grid_range": (5.0, 6.0), "base_activation": None}, "grid_range"),
        ({"base_activation": torch.log}, "not finite"),
    ],
    "fast_kan_conv2d": [({"layernorm": True}, "layernorm=False")],
    "kan": [({"spline_order": 0, "grid_size": 1, "extrapolation": "zero", "base_activation": None}, "spline_order=1")],
    "kan_conv2d": [({"pad_value": 1.0}, "pad_value=1.0")],
    "rational_kan": [({"init": "swish"}, "init='swish'")],
    "rational_kan_conv2d": [({"init": "gelu"}, "init='gelu'")],
    "selectable_kan": [({"pool_kwargs": {"fast_kan": {"layernorm": True}}}, "layernorm=False")],
    "selectable_kan_conv2d": [({"pool_kwargs": {"wavelet_kan_conv2d": {"pad_value": 2.0}}}, "pad_value=2.0")],
    "sine_kan": [({"is_first": True}, "is_first=False"), ({"grid_size": 1}, "larger grid_size")],
}
"""Options with which there is no start, and what the message says to do."""


@dataclass(frozen=True)
class Case:
    """One layer, with options, and layers of torch to start it from."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return get_layer(self.name).kind

    @property
    def exact(self) -> bool:
        if self.options in EXACT_TOO.get(self.name, []):
            return True
        return self.name.removesuffix("_conv2d") not in NEAREST and self.options not in NEAREST_TOO.get(self.name, [])

    def original(self, seed: int = 1, **changes: Any) -> nn.Linear | nn.Conv2d:
        """A trained layer, as far as anyone can tell: in float64 unless said otherwise."""
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"dtype": torch.float64}
        if self.kind == "linear":
            return nn.Linear(**{"in_features": 8, "out_features": 12, **sizes, **changes})
        return nn.Conv2d(**{"in_channels": 8, "out_channels": 12, "kernel_size": 3, **sizes, **changes})

    def start(self, original: nn.Module, **options: Any) -> Start:
        cls = get_layer(self.name).cls
        return getattr(cls, METHOD[self.kind])(original, **{**self.options, **options})

    def x(self, original: nn.Linear | nn.Conv2d, rows: int = 32, seed: int = 2) -> Tensor:
        """Inputs from N(0, 1), whose quantiles are those of N(0, 1) exactly: means over them hardly vary."""
        generator = torch.Generator().manual_seed(seed)
        if isinstance(original, nn.Linear):
            shape = (rows, original.in_features)
            order = torch.rand(shape, generator=generator).argsort(0)
            levels = (order + 0.5) / rows
        else:
            shape = (rows, original.in_channels, 9, 8)
            order = torch.rand(math.prod(shape), generator=generator).argsort()
            levels = ((order + 0.5) / len(order)).view(shape)
        return torch.special.ndtri(levels.double()).to(original.weight.dtype)

    def __str__(self) -> str:
        shown = [getattr(v, "__name__", v) if k == "base_activation" else v for k, v in self.options.items()]
        return "-".join([self.name, *(f"{k}={v}" for k, v in zip(self.options, shown, strict=True))])


def names(kind: str | None = None) -> list[str]:
    """Registered layers that stand in for a usual one, which they are not themselves."""
    kinds = [kind] if kind else list(USUAL)
    return [n for k in kinds for n in archzoo.list_layers(k) if get_layer(n).cls is not USUAL[k]]


def starting(kind: str | None = None, options: bool = False) -> list[Case]:
    """Layers that can start; with `options`, with every choice of options tested."""
    able = [n for n in names(kind) if n not in NEVER and hasattr(get_layer(n).cls, METHOD[get_layer(n).kind])]
    found = [Case(name) for name in able]
    return found + [Case(c.name, own) for c in found for own in OPTIONS.get(c.name, []) if options]


every_start = pytest.mark.parametrize("case", starting(), ids=str)
every_option = pytest.mark.parametrize("case", starting(options=True), ids=str)
every_conv = pytest.mark.parametrize("case", starting("conv2d"), ids=str)


def measured(original: nn.Module, layer: nn.Module, x: Tensor, weight: Tensor | None = None) -> float:
    """The error as `Start` defines it, on a batch, whose rows may have weights."""
    rows = torch.ones(len(x), 1) if weight is None else weight.unsqueeze(1).sqrt()
    with torch.no_grad():
        truth = original(x)
        bias = 0.0 if original.bias is None else original.bias.view(-1, *[1] * (x.ndim - 2))
        return rms(rows * (layer(x) - truth).flatten(1)) / rms(rows * (truth - bias).flatten(1))


def far_sample(original: nn.Linear | nn.Conv2d, rows: int = 10_000) -> tuple[Tensor, Tensor]:
    """Inputs and their weights in a mean over N(0, 1), of the size that gives one output.

    Half of an error may come from beyond four deviations, where one of 16,000 normal numbers is. So in every other row
    one number has three times the deviation; with the ratio of the densities as weight, means are those over N(0, 1).
    """
    generator = torch.Generator().manual_seed(3)
    linear = isinstance(original, nn.Linear)
    shape = (original.in_features,) if linear else (original.in_channels, *original.kernel_size)
    x = torch.randn(rows, math.prod(shape), generator=generator, dtype=torch.float64)
    which = torch.randint(x.shape[1], (rows // 2, 1), generator=generator)
    x[: rows // 2].scatter_(1, which, 3 * x[: rows // 2].gather(1, which))
    ratio = (4 * x.square() / 9).exp() / 3  # of the density of three times the deviation to that of N(0, 1)
    return x.view(rows, *shape), 2 / (1 + ratio.mean(1))


def assert_same_function(original: nn.Module, layer: nn.Module, x: Tensor) -> None:
    """Fails unless outputs are equal but for rounding, a few units in the last place of the dtype."""
    with torch.no_grad():
        error = rms_error(layer(x), original(x))
    bound = 16 * torch.finfo(x.dtype).eps
    assert error <= bound, f"relative error {error:.1e}, allowed {bound:.1e}"


def test_the_lists_are_of_layers_that_exist():
    known = set(archzoo.list_layers())
    listed = [WITHOUT, NEVER, NEAREST, MULTIPLE, GROUPED, UNBIASED, OPTIONS, EXACT_TOO, NEAREST_TOO, REFUSED]
    assert not {name for several in listed for name in several} - known
    for choices in (EXACT_TOO, NEAREST_TOO):
        assert all(own in OPTIONS[name] for name, several in choices.items() for own in several)


@pytest.mark.parametrize("name", names())
def test_every_layer_has_a_start_or_is_listed_without(name):
    entry = get_layer(name)
    has = callable(getattr(entry.cls, METHOD[entry.kind], None))
    assert has != (name in WITHOUT), f"{entry.cls.__name__}.{METHOD[entry.kind]}: there is {'one' if has else 'none'}"
    other = METHOD["conv2d" if entry.kind == "linear" else "linear"]
    assert not hasattr(entry.cls, other), f"{entry.cls.__name__}.{other} is of the other kind"


@pytest.mark.parametrize("name", sorted(NEVER))
def test_what_never_can_says_why(name):
    case = Case(name)
    with pytest.raises(ValueError, match=rf"^{get_layer(name).cls.__name__} .{{30,}}"):
        case.start(case.original())


# --- The function -----------------------------------------------------------------------------------------------------


@every_option
def test_error_is_zero_where_the_layer_claims_to_be_exact(case):
    original = case.original()
    start = case.start(original)
    assert isinstance(start, Start)
    assert type(start.layer) is get_layer(case.name).cls
    assert type(start.error) is float
    assert (start.error == 0.0) == case.exact, f"error {start.error}"
    if case.exact:
        x = case.x(original)
        assert_same_function(original, start.layer, x)
        assert_same_function(original, start.layer, 3 * x)


@every_option
def test_error_is_the_measured_one(case):
    original = case.original(**({"kernel_size": (1, 2)} if case.kind == "conv2d" else {}))
    with torch.no_grad():
        original.weight.mul_(3).add_(0.5)  # so that some layers' bounds are met, and offsets of inputs add up
    layer, error = case.start(original)
    if error == 0.0:
        assert_same_function(original, layer, case.x(original))
    else:
        assert measured(original, layer, *far_sample(original)) == pytest.approx(error, rel=0.04)


@pytest.mark.parametrize(
    ("case", "error"),
    [
        (Case("kan", {"extrapolation": "zero"}), 0.651),
        (Case("kan", {"extrapolation": "zero", "grid_range": (-3.0, 3.0)}), 0.010),
        (Case("fast_kan", {}), 0.009),
        (Case("chebyshev_kan", {}), 0.136),
        (Case("chebyshev_kan", {"degree": 1}), 0.264),
        (Case("chebyshev_kan", {"degree": 8}), 0.061),
        (Case("fourier_kan", {}), 0.228),
        (Case("sine_kan", {}), 0.011),
        (Case("wavelet_kan", {}), 0.089),
        (Case("wavelet_kan", {"wavelet": "dog"}), 0.072),
        (Case("wavelet_kan", {"wavelet": "morlet"}), 0.052),
        (Case("selectable_kan", {}), 0.044),
    ],
    ids=str,
)
def test_errors_of_the_kan_family_are_those_in_its_docstrings(case, error):
    original = case.original()
    nn.init.ones_(original.weight)  # what functions are off by on average adds up, and is next to nothing
    assert case.start(original).error == pytest.approx(error, abs=0.002)


@every_start
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_other_dtypes(case, dtype):
    original = case.original(dtype=dtype)
    layer, error = case.start(original)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    if case.exact:
        assert error == 0.0
        assert_same_function(original, layer, case.x(original))
    else:
        reference = case.start(copy.deepcopy(original).double()).error
        assert error == pytest.approx(reference, rel=0.03)
        assert measured(original, layer, case.x(original, 500 if case.kind == "linear" else 20)) < 1.2 * error + 0.01


@every_conv
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of torch's own layer
@pytest.mark.parametrize(
    "changes",
    [
        {"stride": 2},
        {"padding": (1, 2)},
        {"padding": "same", "kernel_size": (2, 4)},
        {"padding": "valid"},
        {"padding": 2, "dilation": 2},
        {"groups": 2, "padding": 1},
        {"kernel_size": 1, "stride": (1, 3)},
    ],
    ids=str,
)
def test_convolutions_of_every_geometry(case, changes):
    case = Case(case.name, GROUPED.get(case.name, {}) if "groups" in changes else {})
    original = case.original(**changes)
    layer, error = case.start(original)
    x = case.x(original, 8)
    with torch.no_grad():
        assert layer(x).shape == original(x).shape
        assert layer(x[0]).shape == original(x[0]).shape
    if case.exact:
        assert_same_function(original, layer, x)  # at the borders too
    else:
        assert measured(original, layer, x) < 1.2 * error


@every_conv
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_are_kept_or_refused(case, mode):
    original = case.original(padding=1, padding_mode=mode)
    if "padding_mode" in inspect.signature(get_layer(case.name).cls).parameters:
        layer, error = case.start(original)
        assert measured(original, layer, case.x(original, 8)) <= 1.2 * error + 1e-12
    else:
        with pytest.raises(ValueError, match=f"padding_mode='{mode}'"):
            case.start(original)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", [case.name for case in starting("linear")])
def test_any_sizes(name, data):
    times = MULTIPLE.get(name, 1)
    inputs, outputs = (data.draw(st.integers(1, 5)) * times for _ in range(2))
    bias = data.draw(st.booleans())
    case = Case(name, {} if bias else UNBIASED.get(name, {}))
    original = case.original(data.draw(st.integers(0, 99)), in_features=inputs, out_features=outputs, bias=bias)
    layer, error = case.start(original)
    x = case.x(original, 500)
    assert layer(x).shape == (500, outputs)
    if case.exact:
        assert error == 0.0
        assert_same_function(original, layer, x)
    else:
        assert 0 <= error < 1
        assert measured(original, layer, x) < 1.5 * error + 1e-12


@every_start
def test_a_weight_of_zeros_starts_as_zeros(case):
    original = case.original()
    nn.init.zeros_(original.weight)
    layer, error = case.start(original)
    assert error == 0.0
    assert_same_function(original, layer, case.x(original))


# --- What is taken from the original, and what is left ----------------------------------------------------------------


@every_start
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_original_stays_as_it_is(case, training):
    original = case.original().train(training)
    original.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    layer = case.start(original).layer
    assert {module.training for module in layer.modules()} == {training}
    assert all(parameter.requires_grad for parameter in layer.parameters())
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(3)
    assert original.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


@every_start
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_bias_is_the_original_s(case, bias):
    original = case.original(bias=bias)
    if not bias and case.name in UNBIASED:
        with pytest.raises(ValueError, match="without a bias"):
            case.start(original)
        case = Case(case.name, UNBIASED[case.name])
    layer = case.start(original).layer
    if bias:
        assert torch.equal(layer.bias, original.bias)
    else:
        assert getattr(layer, "bias", None) is None


@every_start
def test_what_the_original_decides_is_no_option(case):
    original = case.original()
    sizes = {"in_features": 8} if case.kind == "linear" else {"in_channels": 8, "kernel_size": 3, "stride": 1}
    for name, value in {**sizes, "bias": True, "device": "cpu", "dtype": torch.float64}.items():
        with pytest.raises(ValueError, match=f"^{name}="):
            case.start(original, **{name: value})
    with pytest.raises(TypeError, match="no_such_option"):
        case.start(original, no_such_option=1)


@every_start
def test_other_originals_are_refused(case):
    for other in (nn.Conv2d(8, 12, 3) if case.kind == "linear" else nn.Linear(8, 12), nn.ReLU(), None):
        with pytest.raises(TypeError, match=f"{type(other).__name__} is not an nn.{USUAL[case.kind].__name__}"):
            case.start(other)
    lazy = nn.LazyLinear(12) if case.kind == "linear" else nn.LazyConv2d(12, 3)
    with pytest.raises(ValueError, match="no sizes yet"):
        case.start(lazy)


@pytest.mark.parametrize("name", [name for name in names() if name not in NEVER])
def test_an_original_without_numbers_is_refused(name):
    case = Case(name)
    with pytest.raises(ValueError, match="^device='meta'"):
        case.start(case.original(device="meta"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        pytest.param(name, options, message, id=str(Case(name, options)))
        for name, several in REFUSED.items()
        for options, message in several
    ],
)
def test_options_that_come_near_to_nothing_are_refused(name, options, message):
    case = Case(name, options)
    with pytest.raises(ValueError, match=message):
        case.start(case.original())


# --- Afterwards -------------------------------------------------------------------------------------------------------


def train(layer: nn.Module, x: Tensor, target: Tensor, steps: int) -> list[float]:
    """The training loop in small; returns the losses. At 1e-2, sums of 576 functions of a patch overshoot at first."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        (loss + layer.regularization_loss() if hasattr(layer, "regularization_loss") else loss).backward()
        optimizer.step()
        if hasattr(layer, "constrain_"):
            layer.constrain_()
    return losses


@every_option
def test_it_learns_and_no_parameter_is_stuck(case):
    original, changed = case.original(), case.original(seed=5)
    layer = case.start(original).layer
    x = case.x(original, 64 if case.kind == "linear" else 4)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    with torch.no_grad():
        target = layer(x) + 0.5 * changed(x)  # of which a quaternion layer has a quarter within its reach
    losses = train(layer, x, target, 30)
    assert losses[-1] < 0.9 * losses[0], f"loss {losses[0]:.3g} -> {losses[-1]:.3g}"
    stuck = [name for name, parameter in layer.named_parameters() if torch.equal(parameter, before[name])]
    assert not stuck
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


@every_option
def test_state_dict_round_trip(case):
    original = case.original()
    layer = case.start(original).layer
    other = case.start(case.original(seed=6)).layer
    x = case.x(original, 4)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@every_start
def test_a_start_is_the_same_every_time(case):
    original = case.original()
    first = case.start(original).layer.state_dict()
    torch.manual_seed(99)
    second = case.start(original).layer.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
