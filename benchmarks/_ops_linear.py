"""Cases of layers with functions or factors on edges, products of several weights, and the rational function.

Textbook forms are those of `kan_speed` and `neuron_speed`. Work and floors: docs/kernels.md.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.aptx_linear import aptx_linear, aptx_linear_reference
from archzoo.kernels.kron_sum import kron_linear, kron_linear_reference
from archzoo.kernels.nmu_product import nmu_product, nmu_product_reference
from archzoo.kernels.paon_conv2d import paon_conv2d, paon_conv2d_reference
from archzoo.kernels.paon_linear import paon_linear, paon_linear_reference
from archzoo.kernels.rational import rational, rational_reference
from archzoo.kernels.wavelet import wavelet_linear, wavelet_linear_reference
from benchmarks import kan_speed, neuron_speed
from benchmarks._cases import (
    Contestant,
    Goal,
    Inputs,
    Make,
    Op,
    Peer,
    Size,
    Work,
    function_peer,
    module_peer,
    submodule,
)
from benchmarks._ops_basis import FITS, MAIN, MIDDLE, SMALL, TINY, edge_tensors, edges, rows_of, shape

# --- Functions of edges -----------------------------------------------------------------------------------------------


def wavelet_inputs(s: Size, make: Make) -> Inputs:
    r, i, o = rows_of(s)
    return {
        "x": make.randn(r, i),
        "weight": make.randn(o, i, scale=i**-0.5),
        "scale": make.uniform(o, i, low=0.7, high=1.4),
        "translation": make.uniform(o, i, low=-0.5, high=0.5),
    }


def aptx_inputs(s: Size, make: Make) -> Inputs:
    r, i, o = rows_of(s)
    weights = {"alpha": 1.0, "beta": 1.0, "gamma": i**-0.5}
    parameters = {name: make.randn(o, i, scale=scale) for name, scale in weights.items()}
    return {"x": make.randn(r, i), **parameters, "bias": make.randn(o, scale=0.1)}


def nmu_inputs(s: Size, make: Make) -> Inputs:
    r, i, o = rows_of(s)
    return {"x": make.uniform(r, i, low=0.9, high=1.1), "w": make.uniform(o, i, low=0.05, high=0.95)}


def aptx_peer(name: str, make: Callable[[Inputs], nn.Module], **options: Any) -> Peer:
    names = {"alpha": "alpha", "beta": "beta", "gamma": "gamma", "delta": "bias"}
    return module_peer(name, make, names, memory=edge_tensors(5), **options)


def aptx_package(inputs: Inputs) -> nn.Module:
    import aptx_neuron

    layer: nn.Module = aptx_neuron.aptx_layer(*inputs["gamma"].shape[::-1])
    return layer


def aptx_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    tanh = 1.0 if dtype.itemsize == 2 else 2.0  # tanh.approx, or exp and a reciprocal
    e = float(edges(s))
    return Work(2 * e, 3 * e, tanh * e), Work(4 * e, 10 * e, tanh * e)


EDGES = (
    Op(
        "aptx_linear",
        "aptx_linear",
        aptx_inputs,
        aptx_linear,
        aptx_linear_reference,
        aptx_work,
        gpu=(MAIN, FITS, MIDDLE),
        cpu=({"rows": 256, "inputs": 784, "outputs": 128}, {"rows": 256, "inputs": 128, "outputs": 128}),
        tiny=TINY,
        memory=edge_tensors(6),
        peers=(
            aptx_peer("aptx_neuron", aptx_package, needs={"aptx_neuron": "aptx-neuron"}),
            aptx_peer("textbook APTx", lambda x: neuron_speed.TextbookAPTx(*x["gamma"].shape[::-1])),
        ),
        goals=(
            Goal("gpu", "fb", 2.0, "definition, compiled"),
            Goal("gpu", "fb", 10.0, "textbook APTx"),
            Goal("gpu", "floor f", 0.60),
            Goal("cpu", "fb", 2.0, "textbook APTx"),
            Goal("cpu", "peak", 0.05, "textbook APTx"),
        ),
        loses="a dense linear map needs no tanh an edge, and is a hundred times as fast",
    ),
    Op(
        "nmu_product",
        "nmu_product",
        nmu_inputs,
        nmu_product,
        nmu_product_reference,
        lambda s, dtype: (Work(pipe=2.0 * edges(s)), Work(pipe=6.0 * edges(s))),
        gpu=(MAIN, FITS, MIDDLE),
        cpu=({"rows": 128, "inputs": 256, "outputs": 256}, {"rows": 128, "inputs": 100, "outputs": 2}),
        tiny=TINY,
        memory=edge_tensors(5),
        dtype=torch.float32,
        peers=(
            module_peer(
                "textbook NMU",
                lambda x: neuron_speed.TextbookNMU(*x["w"].shape[::-1]),
                {"weight": "w"},
                memory=edge_tensors(5),
            ),
        ),
        goals=(Goal("gpu", "fb", 5.0, "textbook NMU"), Goal("gpu", "floor f", 0.5)),
        loses="a handful of factors, where torch's own product is a single small kernel",
    ),
    Op(
        "wavelet_linear",
        "wavelet",
        wavelet_inputs,
        wavelet_linear,
        lambda x, weight, scale, translation: wavelet_linear_reference(
            x, weight, scale, translation, None, "mexican_hat"
        ),
        lambda s, dtype: (
            Work(pipe=5.0 * edges(s), special=edges(s)),
            Work(pipe=12.0 * edges(s), special=edges(s)),
        ),
        gpu=(MIDDLE, FITS, SMALL),
        cpu=({"rows": 256, "inputs": 256, "outputs": 64},),
        tiny=TINY,
        memory=lambda s, itemsize: 10.0 * edges(s) * 4,
        peers=(
            module_peer(
                "Wav-KAN",
                lambda x: kan_speed.WaveletKAN(*shape(x)),
                {"weight": "weight", "scale": "scale", "translation": "translation"},
                memory=edge_tensors(10),
            ),
        ),
        goals=(
            Goal("gpu", "fb", 10.0, "Wav-KAN"),
            Goal("gpu", "floor f", 0.70),
            Goal("gpu", "peak", 0.1, "Wav-KAN"),
        ),
        loses="a dense linear map needs no exp an edge, and is as much faster",
    ),
)


# --- Products of several weights --------------------------------------------------------------------------------------


def pade_inputs(x: Tensor, make: Make, outputs: int, taps: tuple[int, ...]) -> Inputs:
    fan = int(torch.tensor(taps).prod())
    return {
        "x": x,
        "numerator": make.randn(2, outputs, *taps, scale=fan**-0.5),
        "denominator": make.randn(1, outputs, *taps, scale=0.1 * fan**-0.5),
        "bias": make.randn(outputs, scale=0.1),
    }


def paon_peer(padding: int | None, memory: Callable[[Size, int], float]) -> Peer:
    def make(inputs: Inputs) -> nn.Module:
        names = ("numerator", "denominator", "bias")
        own = {name: nn.Parameter(inputs[name].detach().clone()) for name in names}
        options = {"variant": "smooth", "eps": 1e-6} | ({} if padding is None else {"padding": padding})
        layer: Any = SimpleNamespace(**own, **options)
        return neuron_speed.TextbookPaon(layer)

    names = {name: name for name in ("numerator", "denominator", "bias")}
    return module_peer("textbook PAON", make, names, memory=memory)


def products_of_paon(inputs: Inputs) -> Contestant:
    """The three linear maps that a [2/1] neuron cannot do without."""
    weight = torch.cat([inputs["numerator"].flatten(0, 1), inputs["denominator"].flatten(0, 1)]).detach()
    weight = weight.requires_grad_()
    return Contestant(lambda: F.linear(inputs["x"], weight), {"x": inputs["x"], "weights": weight}, yardstick=True)


def conv_inputs(s: Size, make: Make) -> Inputs:
    x = make.randn(s["batch"], s["channels"], s["side"], s["side"])
    return pade_inputs(x, make, s["channels"], (s["channels"], 3, 3))


def conv_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    product = Work(2.0 * 3 * s["batch"] * s["side"] ** 2 * s["channels"] ** 2 * 9)
    return product, product * 2


def paon_conv_definition(x: Tensor, numerator: Tensor, denominator: Tensor, bias: Tensor) -> Tensor:
    return paon_conv2d_reference(x, numerator, denominator, bias, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def kron_inputs(s: Size, make: Make) -> Inputs:
    r, i, o = rows_of(s)
    n = s["n"]
    return {
        "x": make.randn(r, i),
        "A": make.randn(n, n, n, scale=n**-0.5),
        "S": make.randn(n, o // n, i // n, scale=i**-0.5),
    }


def dense_linear(inputs: Inputs) -> Contestant:
    (_, p, q), (_, k, d) = inputs["A"].shape, inputs["S"].shape
    x = inputs["x"]
    weight = torch.randn(p * k, q * d, device=x.device).mul_((q * d) ** -0.5).to(x.dtype).requires_grad_()
    return Contestant(lambda: F.linear(x, weight), {"x": x, "weight": weight}, yardstick=True)


def rational_inputs(s: Size, make: Make) -> Inputs:
    start = kan_speed.RationalKAN(s["features"], 1, s["groups"])
    numerator, denominator = (t.detach().float() for t in (start.numerator, start.denominator))
    # FlashKAT wants a numerator for each group; a little apart, as after training.
    numerator = numerator.repeat(s["groups"], 1) * torch.linspace(0.9, 1.1, s["groups"]).unsqueeze(1)
    return {
        "x": make.randn(s["rows"], s["features"]),
        "a": make.place(numerator),
        "b": make.place(denominator),
    }


def plain_kat(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """KAT's plain form: powers, each a tensor."""
    z = x.unflatten(-1, (len(b), -1))
    p = sum(a[:, d].unsqueeze(-1) * z**d for d in range(6))
    q = 1 + sum(b[:, d].abs().unsqueeze(-1) * z.abs() ** (d + 1) for d in range(4))
    return (p / q).flatten(-2).to(x.dtype)


def flash_kat(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    kernel = submodule("rational_kat.kernels.flash_rational_triton").FlashRationalTriton1DGroup
    y: Tensor = kernel.apply(x.unsqueeze(0), a, b)[0]
    return y


def first_kat(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    kernel = submodule("rational_kat.kernels.rational_triton").RationalTriton1DGroup
    y: Tensor = kernel.apply(x.unsqueeze(0), a, b, len(b))[0]
    return y


def rational_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    n = float(s["rows"] * s["features"])
    return Work(pipe=14 * n, special=n), Work(pipe=60 * n, special=2 * n)


def linear_work(factor: float) -> Callable[[Size, torch.dtype], tuple[Work, Work]]:
    return lambda s, dtype: (Work(2 * factor * edges(s)), Work(4 * factor * edges(s)))


PRODUCTS = (
    Op(
        "rational",
        "rational",
        rational_inputs,
        rational,
        rational_reference,
        rational_work,
        gpu=(
            {"rows": 25216, "features": 768, "groups": 8},
            {"rows": 25216, "features": 3072, "groups": 8},
            {"rows": 256, "features": 768, "groups": 8},
        ),
        cpu=({"rows": 4096, "features": 768, "groups": 8},),
        tiny={"rows": 5, "features": 8, "groups": 2},
        memory=lambda s, itemsize: 30.0 * s["rows"] * s["features"] * 4,
        peers=(
            function_peer(
                "FlashKAT",
                flash_kat,
                needs={"rational_kat.kernels.flash_rational_triton": "OSU-STARLAB/FlashKAT, by --peers"},
                where=("gpu",),
            ),
            function_peer(
                "rational_kat_cu",
                first_kat,
                needs={"rational_kat.kernels.rational_triton": "OSU-STARLAB/FlashKAT, which has it too, by --peers"},
                where=("gpu",),
            ),
            function_peer("textbook KAT", plain_kat, memory=lambda s, itemsize: 80.0 * s["rows"] * s["features"] * 4),
        ),
        goals=(
            Goal("gpu", "fb", 1.3, "FlashKAT"),
            Goal("gpu", "fb", 50.0, "rational_kat_cu"),
            Goal("gpu", "floor f", 0.75),
            Goal("cpu", "fb", 3.0, "definition"),
        ),
        compiles_on_cpu=True,
        loses="a few thousand numbers, where starting a kernel takes longer than it runs",
    ),
    Op(
        "paon_linear",
        "paon_linear",
        lambda s, make: pade_inputs(make.randn(s["rows"], s["inputs"]), make, s["outputs"], (s["inputs"],)),
        paon_linear,
        paon_linear_reference,
        linear_work(3),
        gpu=(MAIN, MIDDLE, SMALL),
        cpu=({"rows": 256, "inputs": 784, "outputs": 128},),
        tiny=TINY,
        memory=lambda s, itemsize: (20.0 * s["outputs"] + 6.0 * s["inputs"]) * s["rows"] * 4,
        peers=(
            paon_peer(None, lambda s, itemsize: (20.0 * s["outputs"] + 6.0 * s["inputs"]) * s["rows"] * itemsize),
            Peer("3 GEMMs", products_of_paon),
        ),
        goals=(Goal("gpu", "f", 1 / 1.4, "3 GEMMs"),),
        loses="few rows and few features, where three products cost what their starts do",
    ),
    Op(
        "paon_conv2d",
        "paon_conv2d",
        conv_inputs,
        lambda **inputs: paon_conv2d(**inputs, padding=(1, 1)),
        paon_conv_definition,
        conv_work,
        gpu=({"batch": 64, "channels": 64, "side": 56}, {"batch": 16, "channels": 256, "side": 14}),
        cpu=({"batch": 4, "channels": 64, "side": 32},),
        tiny={"batch": 2, "channels": 4, "side": 5},
        memory=lambda s, itemsize: 26.0 * s["batch"] * s["channels"] * s["side"] ** 2 * 4,
        peers=(paon_peer(1, lambda s, itemsize: 26.0 * s["batch"] * s["channels"] * s["side"] ** 2 * itemsize),),
        loses="every degree is a convolution: one plain convolution is as many times as fast",
    ),
    Op(
        "kron_linear",
        "kron_sum",
        kron_inputs,
        kron_linear,
        kron_linear_reference,
        linear_work(1),
        gpu=(
            {"rows": 8192, "inputs": 4096, "outputs": 4096, "n": 4},
            {"rows": 256, "inputs": 4096, "outputs": 4096, "n": 4},
            {"rows": 8192, "inputs": 1024, "outputs": 1024, "n": 8},
        ),
        cpu=({"rows": 256, "inputs": 2048, "outputs": 2048, "n": 4},),
        tiny={"rows": 5, "inputs": 8, "outputs": 4, "n": 2},
        memory=lambda s, itemsize: 4.0 * (s["n"] + 2) * s["inputs"] * s["outputs"] * 4,
        peers=(Peer("nn.Linear", dense_linear),),
        goals=(Goal("gpu", "fb", 1 / 1.10, "nn.Linear"),),
        loses="few rows: the weight is made of its factors every time, where a dense layer has it",
    ),
)

OPS = (*EDGES, *PRODUCTS)
