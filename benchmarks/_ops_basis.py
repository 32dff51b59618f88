"""Cases of functions of single inputs and their linear maps: KAN and its kin. Work and floors: docs/kernels.md.

Textbook forms are those of `kan_speed`, with a bias where they have none. Sizes: `rows` x `inputs` -> `outputs`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.kernels.activation import Activation
from archzoo.kernels.basis_linear import Basis, basis_linear, basis_linear_reference
from archzoo.kernels.chebyshev import Chebyshev
from archzoo.kernels.fourier import Fourier
from archzoo.kernels.kan_spline import BSpline
from archzoo.kernels.rbf import RBF
from archzoo.kernels.sine import Sine
from benchmarks import kan_speed
from benchmarks._cases import (
    Goal,
    Inputs,
    Make,
    Op,
    Peer,
    Size,
    Work,
    module_peer,
)

MAIN = {"rows": 8192, "inputs": 768, "outputs": 3072}
MIDDLE = {"rows": 4096, "inputs": 768, "outputs": 768}
FITS = {"rows": 1024, "inputs": 256, "outputs": 256}
SMALL = {"rows": 256, "inputs": 128, "outputs": 128}
SILU = Activation("silu")  # made beforehand, as layers do: dynamo cannot trace how a basis is made
TINY = {"rows": 5, "inputs": 8, "outputs": 6}


def rows_of(s: Size) -> tuple[int, int, int]:
    return s["rows"], s["inputs"], s["outputs"]


def edges(s: Size) -> int:
    return s["rows"] * s["inputs"] * s["outputs"]


def edge_tensors(count: float) -> Callable[[Size, int], float]:
    """Memory of what keeps so many (rows, outputs, inputs) tensors."""
    return lambda s, itemsize: count * edges(s) * itemsize


# --- Functions of single inputs -------------------------------------------------------------------------------------


def basis_op(
    name: str,
    basis: Callable[[Size], Basis],
    special: Callable[[Basis], float],
    peers: Sequence[Peer],
    goals: Sequence[Goal],
    own: Callable[[Size, Make], Inputs] = lambda s, make: {},
    constant: Sequence[str] = (),
    base: bool = False,
    **options: Any,
) -> Op:
    """An op on `basis_linear`: a basis with its own tensors, beside it silu with weights of its own if `base`."""

    def inputs(s: Size, make: Make) -> Inputs:
        _, i, o = rows_of(s)
        x = make.uniform(s["rows"], i, low=-0.99, high=0.99)
        found = {"x": x, "weight": make.randn(o, i, basis(s).size, scale=(i * basis(s).size) ** -0.5)}
        if base:
            found["base"] = make.randn(o, i, scale=i**-0.5)
        return found | {"bias": make.randn(o, scale=0.1)} | own(s, make) | {"basis": basis(s)}

    def terms(weight: Tensor, base: Tensor | None, basis: Basis, tensors: dict[str, Tensor]) -> Any:
        first = [(basis, weight, *tensors.values())]
        return first if base is None else [*first, (SILU, base.unsqueeze(2))]

    def ours(
        x: Tensor, weight: Tensor, bias: Tensor, basis: Basis, base: Tensor | None = None, **own: Tensor
    ) -> Tensor:
        return basis_linear(x, terms(weight, base, basis, own), bias)

    def definition(
        x: Tensor, weight: Tensor, bias: Tensor, basis: Basis, base: Tensor | None = None, **own: Tensor
    ) -> Tensor:
        return basis_linear_reference(x, terms(weight, base, basis, own), bias)

    def work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
        functions = basis(s)
        points = s["rows"] * s["inputs"]
        product = 2.0 * edges(s) * (functions.size + base)
        values, both = functions.flops
        calls = special(functions) + 2 * base
        return (
            Work(product, 0.5 * values * points, calls * points),
            Work(2 * product, 0.5 * both * points, calls * points),
        )

    def memory(s: Size, itemsize: int) -> float:
        return 8.0 * s["rows"] * s["inputs"] * (basis(s).size + 1) * 4 + 3.0 * s["rows"] * s["outputs"] * itemsize

    few = "few rows: the weights are several times those of a linear map, and reading them is what takes long"
    defaults: dict[str, Any] = {
        "loses": few,
        "gpu": (MAIN, MIDDLE, SMALL),
        "cpu": ({"rows": 512, "inputs": 784, "outputs": 64},),
    }
    return Op(
        name,
        "basis_linear",
        inputs,
        ours,
        definition,
        work,
        tiny=TINY,
        memory=memory,
        peers=peers,
        goals=goals,
        constant=constant,
        **(defaults | options),
    )


def shape(inputs: Inputs) -> tuple[int, int]:
    """in and out of the weight."""
    o, i = inputs["weight"].shape[:2]
    return i, o


def with_bias(layer: nn.Module, outputs: int) -> nn.Module:
    """The layer, and a bias that its public code has not: so that all compute one function."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bias = layer, nn.Parameter(torch.zeros(outputs))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.bias

    return Biased()


def pykan(inputs: Inputs) -> nn.Module:
    i, o = shape(inputs)
    from kan import KANLayer

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = KANLayer(i, o, num=inputs["basis"].intervals, k=3, grid_eps=1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    return with_bias(First(), o)


def fast_kan(inputs: Inputs) -> nn.Module:
    layer = kan_speed.FastKAN(*shape(inputs), grid_size=inputs["basis"].size)
    layer.layernorm = nn.Identity()
    return layer


def sine_kan(inputs: Inputs) -> nn.Module:
    layer = kan_speed.SineKAN(*shape(inputs), grid_size=inputs["basis"].size)
    layer.phase = inputs["phase"].detach()
    return layer


OPS = (
    basis_op(
        "basis_linear:spline",
        lambda s: BSpline(3, s.get("grid", 8), -1.0, 2.0 / s.get("grid", 8)),
        lambda basis: 0.0,
        peers=(
            module_peer(
                "efficient-kan",
                lambda x: with_bias(kan_speed.EfficientKAN(*shape(x), x["basis"].intervals), shape(x)[1]),
                {"layer.base_weight": "base", "layer.spline_weight": "weight", "bias": "bias"},
                memory=lambda s, itemsize: 40.0 * s["rows"] * s["inputs"] * 14 * itemsize,
            ),
            module_peer(
                "pykan",
                pykan,
                {
                    "layer.layer.coef": lambda x: x["weight"].transpose(0, 1).contiguous(),
                    "layer.layer.scale_base": lambda x: x["base"].mT.contiguous(),
                    "layer.layer.scale_sp": lambda x: torch.ones_like(x["base"].mT),
                    "bias": "bias",
                },
                needs={"kan": "pykan"},
                memory=edge_tensors(12),
            ),
        ),
        goals=(
            Goal("gpu", "fb", 4.0, "efficient-kan"),
            Goal("gpu", "fb", 50.0, "pykan"),
            Goal("gpu", "floor f", 0.75),
            Goal("gpu", "floor fb", 0.65),
            Goal("gpu", "peak", 0.35, "efficient-kan"),
            Goal("cpu", "fb", 3.0, "efficient-kan"),
        ),
        base=True,
        gpu=(MAIN, FITS, MIDDLE, SMALL),
        cpu=({"rows": 512, "inputs": 784, "outputs": 64, "grid": 5}, {"rows": 1024, "inputs": 64, "outputs": 64}),
        compiles_on_cpu=True,
    ),
    basis_op(
        "basis_linear:rbf",
        lambda s: RBF(8, 4 / 7),
        lambda basis: basis.size,
        own=lambda s, make: {"centres": torch.linspace(-2, 2, 8, device=make.device, dtype=make.dtype)},
        constant=("centres",),
        base=True,
        peers=(
            module_peer(
                "fast-kan",
                fast_kan,
                {"spline.weight": lambda x: x["weight"].flatten(1), "base.weight": "base", "base.bias": "bias"},
            ),
        ),
        goals=(Goal("gpu", "fb", 1.5, "fast-kan"), Goal("gpu", "floor f", 0.70)),
    ),
    basis_op(
        "basis_linear:chebyshev",
        lambda s: Chebyshev(4),
        lambda basis: 2.0,
        peers=(
            module_peer(
                "ChebyKAN",
                lambda x: with_bias(kan_speed.ChebyshevKAN(*shape(x)), shape(x)[1]),
                {"layer.weight": "weight", "bias": "bias"},
            ),
        ),
        goals=(Goal("gpu", "fb", 1.2, "ChebyKAN"), Goal("gpu", "floor f", 0.70)),
    ),
    basis_op(
        "basis_linear:fourier",
        lambda s: Fourier(5),
        lambda basis: 2.0,
        peers=(
            module_peer("FourierKAN", lambda x: kan_speed.FourierKAN(*shape(x)), {"weight": "weight", "bias": "bias"}),
        ),
        goals=(
            Goal("gpu", "fb", 5.0, "FourierKAN"),
            Goal("gpu", "floor f", 0.70),
            Goal("gpu", "peak", 0.1, "FourierKAN"),
        ),
    ),
    basis_op(
        "basis_linear:sine",
        lambda s: Sine(8),
        lambda basis: basis.size,
        own=lambda s, make: {"freq": make.uniform(8, low=0.1, high=0.9), "phase": make.uniform(s["inputs"], 8)},
        constant=("phase",),
        peers=(module_peer("SineKAN", sine_kan, {"freq": "freq", "weight": "weight", "bias": "bias"}),),
        goals=(Goal("gpu", "floor f", 0.70),),
    ),
)
