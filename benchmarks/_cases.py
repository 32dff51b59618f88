"""What a case of `gpu` and `cpu` is: an op at a size, its inputs, its contestants, its floor, its goals.

The ops are listed in `_ops_*.py`. Contestants of a case compute one function of the same
inputs: ours, the definition (`<op>_reference`), that compiled, peers (public packages, or their code written out
plainly). A yardstick is something else, as a dense linear map, whose time says what ours costs beside it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Size = Mapping[str, int]
Inputs = dict[str, Any]
"""By name, in order: tensors, of which the floating ones are differentiated, and whatever else the op takes."""


class Make:
    """Makes tensors of a case: its dtype unless said otherwise, one seed. `device="meta"` gives shapes alone."""

    def __init__(self, device: str | torch.device, dtype: torch.dtype):
        self.device, self.dtype = torch.device(device), dtype
        torch.manual_seed(0)

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype or self.dtype)

    def uniform(self, *shape: int, low: float = -1.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.rand(shape, device=self.device) * (high - low) + low).to(dtype or self.dtype)

    def place(self, t: Tensor) -> Tensor:
        """A tensor that was made on the CPU."""
        return t.to(self.device)


@dataclass(frozen=True)
class Work:
    """What a pass must do at least, beyond reading its inputs and writing its results once."""

    tensor: float = 0.0
    """FLOPs on tensor cores."""
    pipe: float = 0.0
    """Instructions of the fp32 pipe; a fused multiply-add is one."""
    special: float = 0.0
    """Special functions: exp, tanh, reciprocals."""
    extra_bytes: float = 0.0

    def __mul__(self, factor: float) -> "Work":
        return Work(self.tensor * factor, self.pipe * factor, self.special * factor, self.extra_bytes * factor)


@dataclass(frozen=True)
class Ceilings:
    """Rates of a device, a second."""

    copy: float
    bf16: float
    tf32: float
    pipe: float
    special: float

    def floor(self, work: Work, moved: float, dtype: torch.dtype) -> tuple[float, str]:
        """Least time in ms, and what binds: bytes, tensor cores, the fp32 pipe or special functions."""
        products = self.tf32 if dtype == torch.float32 else self.bf16
        times = {
            "memory": (moved + work.extra_bytes) / self.copy,
            "tensor cores": work.tensor / products,
            "fp32 pipe": work.pipe / self.pipe,
            "special functions": work.special / self.special,
        }
        what = max(times, key=lambda name: times[name])
        return 1e3 * times[what], what


H200 = Ceilings(copy=4.3e12, bf16=790e12, tf32=495e12, pipe=33.5e12, special=3.9e12)
"""Copy and bf16 measured, the others of the data sheet (see docs/kernels.md)."""


@dataclass
class Contestant:
    """A function to time, and the leaves that its gradients are asked for; equal names mean equal tensors."""

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    yardstick: bool = False
    """Whether it is another function."""


def on_copies(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Tensor]:
    own = {name: t.clone() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    return lambda: function(**own)


def leaves_of(inputs: Inputs, constant: Sequence[str] = ()) -> dict[str, Tensor]:
    return {
        name: t
        for name, t in inputs.items()
        if isinstance(t, Tensor) and t.is_floating_point() and name not in constant
    }


@dataclass(frozen=True)
class Peer:
    """Something to be measured beside ours.

    Args:
        name: As reports have it.
        build: From the inputs (leaves already require gradients) a contestant.
        needs: Modules that must be importable, with the packages that have them; none for what is written out here.
        where: `"gpu"`, `"cpu"`.
        memory: For (size, itemsize) the bytes that forward and backward need beyond the inputs, or None if few.
        refuse: For a size why it is left out there, if it is.
    """

    name: str
    build: Callable[[Inputs], Contestant]
    needs: Mapping[str, str] = field(default_factory=dict)
    where: Sequence[str] = ("gpu", "cpu")
    memory: Callable[[Size, int], float] | None = None
    refuse: Callable[[Size], str | None] = lambda size: None

    def missing(self) -> str | None:
        """What is not at hand, in words, or None."""
        gone = [f"{module} (of {package})" for module, package in self.needs.items() if not importable(module)]
        return f"not importable: {', '.join(gone)}" if gone else None


@dataclass(frozen=True)
class Goal:
    """A limit from the tables of goals.

    Args:
        where: `"gpu"` or `"cpu"`.
        what: `"fb"` or `"f"`: time of `against` over ours, at least. `"floor fb"`, `"floor f"`: floor over our time, at
            least. `"peak"`: our peak memory over that of `against`, or else over inputs and results, at most.
        limit: The number.
        against: A contestant.
    """

    where: str
    what: str
    limit: float
    against: str = ""

    def text(self) -> str:
        if self.what == "peak":
            return f"peak <= {self.limit:g} x {self.against or 'inputs and results'}"
        what = {"fb": "forward + backward", "f": "forward"}[self.what.removeprefix("floor ")]
        if self.what.startswith("floor"):
            return f"{what} >= {self.limit:g} of the floor"
        return f"{what} >= {self.limit:g} x {self.against}"


@dataclass(frozen=True)
class Op:
    """An op and all that is measured of it. `ours` and `definition` take the inputs by name.

    Args:
        name: The public function, and behind a colon what of it.
        module: Where in `archzoo.kernels` the public function is.
        inputs: For (size, make).
        work: For (size, dtype, make) what forward and backward must do at least.
        gpu: Sizes on a GPU, the one of the goals first.
        cpu: Sizes on a CPU, likewise.
        tiny: A size for tests.
        memory: For (size, itemsize) bytes that forward and backward of the definition need beyond the inputs.
        dtype: On a GPU; float32 on a CPU.
        constant: Inputs that take no gradient.
        backward: Whether there is one.
        compiles: Whether to compile the definition on a GPU: never a loop over thousands of steps, which takes minutes.
        compiles_on_cpu: Likewise on a CPU, where it takes half a minute.
        loses: Where it is weakest by reasoning, for the docs; what was measured is beside it.
    """

    name: str
    module: str
    inputs: Callable[[Size, Make], Inputs]
    ours: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    work: Callable[[Size, torch.dtype], tuple[Work, Work]]
    gpu: Sequence[Size]
    cpu: Sequence[Size]
    tiny: Size
    memory: Callable[[Size, int], float]
    loses: str
    peers: Sequence[Peer] = ()
    goals: Sequence[Goal] = ()
    dtype: torch.dtype = torch.bfloat16
    constant: Sequence[str] = ()
    backward: bool = True
    compiles: bool = True
    compiles_on_cpu: bool = False

    def build(self, size: Size, device: str | torch.device, dtype: torch.dtype) -> Inputs:
        """Inputs, with leaves that require gradients if there is a backward pass."""
        inputs = self.inputs(size, Make(device, dtype))
        for name in leaves_of(inputs, self.constant) if self.backward else ():
            inputs[name] = inputs[name].detach().requires_grad_()
        return inputs

    def contestant(self, function: Callable[..., Tensor], inputs: Inputs) -> Contestant:
        """Ours, or the definition. What has no backward pass may work in place, and gets copies."""
        if self.backward:
            return Contestant(lambda: function(**inputs), leaves_of(inputs, self.constant))
        return Contestant(on_copies(function, inputs), {})


def label(size: Size) -> str:
    return " ".join(f"{name}={value}" for name, value in size.items())


def importable(module: str) -> bool:
    """Whether a module is there, without running its packages' own start (see `submodule`)."""
    try:
        return _spec(module) is not None
    except (ImportError, ValueError):
        return False


def _spec(module: str) -> Any:
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for name in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        top = f"{top}.{name}"
        spec = importlib.machinery.PathFinder.find_spec(top, spec.submodule_search_locations)
    return spec


def submodule(module: str) -> ModuleType:
    """Imports a module without running the `__init__` of the packages around it.

    mamba-ssm's imports transformers, FlashKAT's all its variants: what a kernel does not need and a bare machine has
    not. Each package becomes one with a path and nothing in it.
    """
    *parents, _ = module.split(".")
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        if name not in sys.modules:
            spec = _spec(name)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"no package {name}", name=name)
            package = ModuleType(name)
            package.__path__ = list(spec.submodule_search_locations)
            package.__spec__ = spec
            sys.modules[name] = package
    return importlib.import_module(module)


def add_peers(folder: Path | None) -> None:
    """Puts a folder of `python -m benchmarks peers` last on the path: what is installed wins."""
    for entry in () if folder is None else (folder, folder / "site"):
        if entry.is_dir() and str(entry.resolve()) not in sys.path:
            sys.path.append(str(entry.resolve()))


def function_peer(name: str, function: Callable[..., Tensor], constant: Sequence[str] = (), **options: Any) -> Peer:
    """A peer that takes our inputs by name."""
    return Peer(name, lambda inputs: Contestant(lambda: function(**inputs), leaves_of(inputs, constant)), **options)


def module_peer(
    name: str,
    make: Callable[[Inputs], torch.nn.Module],
    parameters: Mapping[str, str | Callable[[Inputs], Tensor]],
    x: str = "x",
    **options: Any,
) -> Peer:
    """A peer that is a layer: it gets the values of our inputs as its parameters.

    Args:
        make: From the inputs the layer.
        parameters: For each of the layer's parameters the input that it is; or a function that makes it of them where
            its layout is another, so that its gradient is not compared.
        x: The input that the layer is called with.
    """

    def build(inputs: Inputs) -> Contestant:
        layer = make(inputs).to(inputs[x].device, inputs[x].dtype)
        own = dict(layer.named_parameters())
        leaves = {x: inputs[x]}
        for parameter, source in parameters.items():
            value = inputs[source] if isinstance(source, str) else source(inputs)
            with torch.no_grad():
                own[parameter].copy_(value.reshape(own[parameter].shape))
            same = isinstance(source, str) and own[parameter].shape == value.shape
            leaves[str(source) if same else f"{parameter} of {name}"] = own[parameter]
        return Contestant(lambda: layer(inputs[x]), leaves)

    return Peer(name, build, **options)
