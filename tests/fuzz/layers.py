"""Random constructions and calls of every layer of the zoo, wrong ones among them, and what each may end in.

A trial is right (built, and called with the right shape and dtype), or refused by a ValueError or TypeError that says
what was wrong. All else is a finding: an error from inside torch, a wrong value that is taken, a hang. What is wrong is
told here by annotations and by torch's own layers on `meta`, never by the checks that are tested.

`nn.Linear` and `nn.Conv2d` are in the zoo as they are: of them only what is right is asked, their errors are torch's.
"""

import inspect
import json
import math
import random
import signal
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor, nn

import archzoo
from archzoo.layers.invertible_nets import InvertibleMLP
from archzoo.layers.linear_operators import DenseOperator
from archzoo.registry import get_layer

Shape = tuple[int, ...]
HANG = 10
"""Seconds of CPU that a trial may take: it takes milliseconds, but the first on `meta`, which imports much, a few s."""

# --- Layers, and what they are right with -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A layer, arguments that it is right with, and what it maps."""

    name: str
    cls: type[nn.Module]
    choices: Mapping[str, Sequence[Any]]
    """Values of the arguments that have no default, and of some that have; any of them go together."""
    item: Callable[[Mapping[str, Any]], Shape]
    """Shape of one input, by the arguments."""
    result: Callable[[Mapping[str, Any], Shape], Shape]
    """Shape of the output, by the arguments and the input's whole shape; an error where there is none."""
    leading: tuple[int, ...]
    """Numbers of dimensions that may come before an item."""

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.cls).parameters)

    @property
    def is_torchs(self) -> bool:
        return self.cls.__module__.startswith("torch.")

    def build(self, args: Mapping[str, Any]) -> nn.Module:
        return self.cls(**args)


class _Linearizer(archzoo.Linearizer):
    """A Linearizer by sizes, as the other layers are: its nets and its matrix are given otherwise."""

    def __init__(self, dim: int, *, x_shape: Sequence[int] | None = None, device: Any = None, dtype: Any = None):
        factory = {"device": device, "dtype": dtype}
        super().__init__(InvertibleMLP(dim, hidden=8, **factory), DenseOperator(dim, **factory), x_shape=x_shape)


class _BPU(archzoo.BPU):
    """A BPU of one small wiring."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any):
        super().__init__(_WIRING, in_features, out_features, bias, **options)

    __signature__ = inspect.Signature(
        [p for name, p in inspect.signature(archzoo.BPU).parameters.items() if name != "connectome"]
    )


_WIRING = archzoo.Connectome.from_dense([[0, 2, 1], [1, 0, -1], [0, 1, 0]], num_sensory=1, num_output=1)


def _convolved(usual: type[nn.Module]) -> Callable[[Mapping[str, Any], Shape], Shape]:
    def result(args: Mapping[str, Any], x: Shape) -> Shape:
        known = {name: args[name] for name in inspect.signature(usual).parameters if name in args}
        known |= {"padding_mode": "zeros", "bias": False, "dtype": None, "device": "meta"}
        return tuple(usual(**known)(torch.empty(x, device="meta")).shape)

    return result


def subjects() -> list[Subject]:
    """Every registered layer, and the activation."""
    linear = {"in_features": (4, 8, 12), "out_features": (4, 8)}
    image = {"in_channels": (4, 8), "out_channels": (4, 8), "kernel_size": (1, 2, 3, (3, 2))}
    capsules = {"in_capsules": (1, 5), "out_capsules": (1, 3), "in_dim": (2, 4), "out_dim": (1, 4)}

    def of_linear(name: str, cls: type[nn.Module]) -> Subject:
        result = lambda args, x: (*x[:-1], args["out_features"])  # noqa: E731 - five of a kind
        return Subject(name, cls, linear, lambda args: (args["in_features"],), result, (0, 1, 2, 3))

    def of_image(name: str, cls: type[nn.Module], usual: type[nn.Module]) -> Subject:
        return Subject(name, cls, image, lambda args: (args["in_channels"], 6, 5), _convolved(usual), (0, 1))

    def of_capsules(name: str, cls: type[nn.Module]) -> Subject:
        result = lambda args, x: (*x[:-2], args["out_capsules"], args["out_dim"])  # noqa: E731
        return Subject(name, cls, capsules, lambda args: (args["in_capsules"], args["in_dim"]), result, (0, 1, 2))

    same = lambda args, x: x  # noqa: E731
    found = [Subject("APTx", archzoo.APTx, {}, lambda args: (3,), same, (0, 1, 2))]
    for name in archzoo.list_layers():
        entry = get_layer(name)
        if entry.cls.__module__.partition(".")[0] not in ("archzoo", "torch"):
            continue  # another package's, or a test's
        if entry.kind == "linear":
            found.append(of_linear(name, entry.cls))
        elif entry.kind == "conv2d":
            found.append(of_image(name, entry.cls, nn.Conv2d))
        elif entry.kind == "mixer":
            found.append(Subject(name, entry.cls, {"dim": (8, 16)}, lambda args: (5, args["dim"]), same, (1,)))
        elif name == "bpu":
            found.append(of_linear(name, _BPU))
        elif name == "linearizer":
            found.append(Subject(name, _Linearizer, {"dim": (2, 4)}, lambda args: (args["dim"],), same, (0, 1, 2)))
        elif name == "paon_conv_transpose2d":
            found.append(of_image(name, entry.cls, nn.ConvTranspose2d))
        else:
            found.append(of_capsules(name, entry.cls))  # one of another shape fails at once
    return found


# --- Values -----------------------------------------------------------------------------------------------------------

HUGE = (10**9, 10**30)
FLOATS = (2.5, math.nan, math.inf, -math.inf, 1e300)
WRONG = ("nonsense", "", b"x", -1, 0, *FLOATS, *HUGE, 1j, True, None, [], [1, 2, 3], {})
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WRONG_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", 3, 2.5, [])
WRONG_DEVICES = ("nonsense", "cpu:nonsense", 2.5, [], "")


def plausible(value: Any, annotation: Any) -> bool:
    """Whether an argument so annotated may have that value at all; ranges are the layer's own."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(plausible(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:
        return isinstance(value, tuple | list) and len(value) == len(parts) and all(map(plausible, value, parts))
    if origin is Sequence:
        return isinstance(value, tuple | list) and all(plausible(v, parts[0]) for v in value)
    if origin is Mapping:
        return isinstance(value, dict)
    if origin is Callable:
        return callable(value)
    if annotation in (int, float):
        kind = Integral if annotation is int else Real
        return isinstance(value, kind) and not isinstance(value, bool) and value == value
    if annotation is str:  # what no layer knows
        return isinstance(value, str) and value not in ("nonsense", "")
    return value is None if annotation in (None, type(None)) else isinstance(value, annotation)


def fitting(parameter: inspect.Parameter) -> list[Any]:
    """Values that an option may be right with, the default first."""
    kinds = {parameter.annotation, *get_args(parameter.annotation)}
    literals = [v for kind in kinds if get_origin(kind) is Literal for v in get_args(kind)]
    values = [parameter.default, *literals, *get_args(parameter.annotation)]
    values = [v for v in values if v is None or isinstance(v, str | int | float | tuple)]
    values += [True, False] if bool in kinds else []
    values += [1, 2, 4] if int in kinds else []
    values += [0.25, 0.5] if float in kinds else []
    return sorted(set(values), key=lambda value: (value != parameter.default, repr(value)))


@dataclass(frozen=True)
class Trial:
    """One construction, and the call of what is built."""

    args: Mapping[str, Any]
    changed: tuple[str, ...]
    """Arguments that may be wrong."""
    call: str = "batch"
    """A name of `RIGHT` or `WRONG_CALLS`."""
    seed: int = 0

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.args.items())
        return f"({shown}), called with {self.call!r}, seed {self.seed}"


RIGHT = ("batch", "leading", "empty", "strided", "expanded", "gradient", "meta", "float64", "bfloat16", "float16")
WRONG_CALLS = (
    *("last size", "0-d", "too few dimensions", "int64", "bool", "complex64", "other float64", "other bfloat16"),
    *("meta into cpu", "list", "None", "text", "number", "small image"),
)


def trials(subject: Subject, count: int, seed: int = 0) -> Iterator[Trial]:
    """Half of them may be wrong in the arguments, half in the call; the same ones for the same seed."""
    rng = random.Random(f"{subject.name} {seed}")
    parameters = subject.parameters
    for number in range(count):
        args: dict[str, Any] = {name: rng.choice(values) for name, values in subject.choices.items()}
        options = [name for name in parameters if name not in (*subject.choices, "device", "dtype")]
        if number % 2:
            for name in rng.sample(options, min(len(options), rng.choice((0, 1, 2)))):
                args[name] = rng.choice(fitting(parameters[name]))
            pool = RIGHT if subject.is_torchs or rng.random() < 0.4 else WRONG_CALLS
            yield Trial(args, tuple(name for name in options if name in args), rng.choice(pool), rng.randrange(10**6))
            continue
        changed = rng.sample(list(parameters), min(len(parameters), rng.choice((1, 1, 1, 2))))
        for name in changed:
            if name == "device":
                args[name] = rng.choice((*WRONG_DEVICES, "cpu", "meta", "cuda"))
            elif name == "dtype":
                args[name] = rng.choice((*WRONG_DTYPES, *DTYPES))
            elif rng.random() < 0.2 and name not in subject.choices:
                args[name] = rng.choice(fitting(parameters[name]))
            else:
                args[name] = rng.choice(WRONG)
        yield Trial(args, tuple(changed), "batch", rng.randrange(10**6))


# --- Trying -----------------------------------------------------------------------------------------------------------


class Finding(AssertionError):
    """What a trial may not end in."""


def run(subject: Subject, trial: Trial) -> Literal["right", "refused", "torch's own"]:
    """How the trial ended.

    Raises:
        Finding: If it ended as none may.
    """

    def hang(*_: Any) -> None:
        raise Finding(f"took more than {HANG} s of CPU")

    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, HANG)
    try:
        return _run(subject, trial)
    except Finding as finding:
        raise Finding(f"{subject.name}{trial}: {finding}") from finding.__cause__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _run(subject: Subject, trial: Trial) -> Literal["right", "refused", "torch's own"]:
    args = dict(trial.args)
    huge = any(value in HUGE for value in args.values() if isinstance(value, int))
    if huge and args.get("device") in (None, "cpu", "cuda"):
        args["device"] = "meta"  # a size that no machine holds costs nothing there
    elif trial.call == "meta":
        args["device"] = "meta"
    if trial.call in ("float64", "bfloat16", "float16"):
        args["dtype"] = getattr(torch, trial.call)
    torch.manual_seed(trial.seed)
    try:
        layer = subject.build(args)
    except Exception as error:  # any: what is no ValueError or TypeError is what is looked for
        if subject.is_torchs or (args.get("device") == "cuda" and not torch.cuda.is_available()):
            return "torch's own"  # FakeTensorMode has devices that are not there, so that a layer must not refuse them
        _must_name(error, [(name, trial.args[name]) for name in trial.changed])
        return "refused"
    if not subject.is_torchs:
        for name in trial.changed:
            _must_be_plausible(name, trial.args[name], subject.parameters[name].annotation)
    if huge:
        return "right"
    try:
        return _call(subject, trial, {**_defaults(subject), **args}, layer)
    except Finding:
        if subject.is_torchs:
            return "torch's own"
        raise


def _defaults(subject: Subject) -> dict[str, Any]:
    return {name: p.default for name, p in subject.parameters.items() if p.default is not p.empty}


def _must_be_plausible(name: str, value: Any, annotation: Any) -> None:
    if name == "dtype":
        fine = value is None or value in DTYPES
    elif name == "device":
        fine = value in (None, "cpu", "meta", "cuda")
    else:
        fine = plausible(value, annotation)
    if not fine:
        raise Finding(f"{name}={value!r} was taken")


def _must_name(error: Exception, wrong: Sequence[tuple[str, Any]]) -> None:
    if not isinstance(error, ValueError | TypeError):
        raise Finding(f"{type(error).__name__}: {error}") from error
    text = str(error)
    if not any(name in text and any(shown in text for shown in _shown(value)) for name, value in wrong):
        raise Finding(f"the error names no argument with its value: {type(error).__name__}: {error}") from error


def _shown(value: Any) -> list[str]:
    return [repr(value), str(value), *([repr(tuple(value))] if isinstance(value, list) else [])]


def _call(subject: Subject, trial: Trial, args: Mapping[str, Any], layer: nn.Module) -> Literal["right", "refused"]:
    rng = random.Random(trial.seed)
    item = subject.item(args)
    leading = rng.choice(subject.leading) if trial.call in ("leading", "empty", "gradient") else subject.leading[-1]
    sizes = [rng.randint(1, 4) for _ in range(leading)]
    if trial.call == "empty" and sizes:
        sizes[rng.randrange(len(sizes))] = 0
    shape = (*sizes, *item)
    dtype, device = args.get("dtype") or torch.float32, args.get("device") or "cpu"
    x = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    if trial.call in WRONG_CALLS:
        return _call_wrongly(trial.call, x, layer, len(item))
    try:
        wanted = subject.result(args, shape)
    except Exception:  # torch has its own of many kinds
        wanted = None  # such a layer, or image, has no output
    if trial.call == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    elif trial.call == "expanded":
        x = x[:1].expand(shape)
    elif trial.call == "gradient":
        x = x.requires_grad_()
    try:
        y = layer(x)
    except Exception as error:  # any, likewise
        if wanted is None and isinstance(error, ValueError) and str(shape) in str(error):
            return "refused"
        raise Finding(f"x of {shape}: {type(error).__name__}: {error}") from error
    if wanted is None:
        raise Finding(f"x of {shape} gives {tuple(y.shape)}, and the usual layer refuses it")
    if (tuple(y.shape), y.dtype, y.device.type) != (wanted, dtype, device):
        raise Finding(f"x of {shape}, {dtype}, {device} gives {tuple(y.shape)}, {y.dtype}, {y.device}: not {wanted}")
    if trial.call == "gradient":
        y.sum().backward()
        if x.grad is None or x.grad.shape != x.shape:
            raise Finding(f"x of {shape} has no gradient")
    return "right"


def _call_wrongly(call: str, x: Tensor, layer: nn.Module, axes: int) -> Literal["right", "refused"]:
    own, any_shape = str(x.dtype).removeprefix("torch."), isinstance(layer, archzoo.APTx)
    given: Any = x
    if call in ("int64", "bool", "complex64"):
        given, named = x.to(getattr(torch, call)), [call]
    elif any_shape and call in ("other float64", "other bfloat16", "meta into cpu"):
        return "refused"  # it takes every floating-point dtype too, and its scalars go with every device
    elif call in ("other float64", "other bfloat16"):
        other = call.removeprefix("other ")
        other = "float32" if other == own else other
        given, named = x.to(getattr(torch, other)), [other, own]
    elif call == "meta into cpu":
        given, named = x.to("meta"), ["meta", "cpu"]
    elif call in ("list", "None", "text", "number"):
        given = {"list": [1.0], "None": None, "text": "x", "number": 2.0}[call]
        named = [type(given).__name__]
    elif any_shape:
        return "refused"  # it takes every shape
    else:
        shapes = {
            "last size": (*x.shape[:-axes], x.shape[-axes] + 1, *x.shape[x.dim() - axes + 1 :]),
            "0-d": (),
            "too few dimensions": tuple(x.shape[-axes:])[1:],
            "small image": (*x.shape[:-2], 1, 0) if axes == 3 else (3,),
        }
        if axes == 2 and call == "last size":
            shapes[call] = (*x.shape[:-1], x.shape[-1] + 1)
        given, named = x.new_zeros(shapes[call]), [str(shapes[call])]
    if call == "meta into cpu" and x.is_meta:
        return "refused"
    try:
        y = layer(given)
    except (ValueError, TypeError) as error:
        missing = [name for name in named if name not in str(error)]
        if missing:
            raise Finding(f"the error does not say {missing}: {type(error).__name__}: {error}") from error
        return "refused"
    except Exception as error:  # any, likewise
        raise Finding(f"{type(error).__name__}: {error}") from error
    raise Finding(f"it gave {tuple(y.shape)}, {y.dtype}")


# --- NaN --------------------------------------------------------------------------------------------------------------


def nan_in(subject: Subject, seed: int) -> None:
    """A layer of some options, in training mode, on a batch of which one sample holds NaN in one channel.

    Raises:
        Finding: If what comes out of that sample is all numbers. An error is right too.
    """
    rng = random.Random(f"{subject.name} NaN {seed}")
    parameters = subject.parameters
    args: dict[str, Any] = {name: rng.choice(values) for name, values in subject.choices.items()}
    options = [name for name in parameters if name not in (*subject.choices, "device", "dtype", "stride", "dilation")]
    torch.manual_seed(seed)
    for name in rng.sample(options, min(len(options), 2)):
        changed = {**args, name: rng.choice(fitting(parameters[name]))}
        try:
            subject.build(changed)
        except (ValueError, TypeError):
            continue
        args = changed
    item = subject.item({**_defaults(subject), **args})
    x = torch.randn(3, *item)
    x[(1, rng.randrange(item[0]), *[slice(None)] * (len(item) - 1))] = math.nan
    try:
        y = subject.build(args)(x)
    except ValueError:
        return
    if not y[1].isnan().any():
        raise Finding(f"{subject.name}({args}): NaN came out as numbers")


# --- All of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    """For `python -m benchmarks fuzz_layers`: a JSON line of counts, and its findings, for each of the layers named."""
    count, seed, *names = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for subject in subjects():
        if subject.name not in names:
            continue
        ended: Counter[str] = Counter()
        findings = []
        for trial in trials(subject, int(count), int(seed)):
            try:
                ended[run(subject, trial)] += 1
            except Finding as finding:
                findings.append(str(finding))
        for number in range(int(count) // 10):
            try:
                nan_in(subject, number)
                ended["NaN"] += 1
            except Finding as finding:
                findings.append(str(finding))
        print(json.dumps({"layer": subject.name, "ended": ended, "findings": findings}), flush=True)
