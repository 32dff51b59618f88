"""Time and memory of every KAN layer beside the textbook form of itself, on one CPU thread.

A textbook form is what the layer's public code does, written out plainly here: the whole basis of the batch as one
tensor, then one einsum or linear map, and autograd. Forms, sizes and repeats alternate in one process, and the ratio of
the minima is printed: how many times the time of ours the other takes, forward and backward. Kept: what autograd holds
for the backward pass besides x and the parameters, in units of N·I floats.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import archzoo
from benchmarks._record import environment

RESULTS = Path(__file__).parent / "results" / "kan_speed.json"
SIZES = [(1024, 64, 64), (1024, 784, 64), (64, 784, 64)]
GOALS = {"kan against textbook": 2.5, "kan against pykan": 10.0, "any other against textbook": 1.0}


class EfficientKAN(nn.Module):
    """B-splines by the recursion on a grid a feature (efficient-kan), without its second scale."""

    def __init__(self, i: int, o: int, grid_size: int = 5, order: int = 3):
        super().__init__()
        self.order = order
        step = 2 / grid_size
        knots = torch.arange(-order, grid_size + order + 1) * step - 1
        self.register_buffer("grid", knots.expand(i, -1).contiguous())
        self.base_weight = nn.Parameter(torch.randn(o, i) / i**0.5)
        self.spline_weight = nn.Parameter(torch.randn(o, i, grid_size + order) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        grid, x_ = self.grid, x.unsqueeze(-1)
        b = ((x_ >= grid[:, :-1]) & (x_ < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            b = (x_ - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)]) * b[:, :, :-1] + (
                grid[:, k + 1 :] - x_
            ) / (grid[:, k + 1 :] - grid[:, 1:-k]) * b[:, :, 1:]
        return F.linear(F.silu(x), self.base_weight) + F.linear(b.flatten(1), self.spline_weight.flatten(1))


class FastKAN(nn.Module):
    """Gaussians of the normalised input (fast-kan)."""

    def __init__(self, i: int, o: int, grid_size: int = 8):
        super().__init__()
        self.layernorm = nn.LayerNorm(i)
        self.register_buffer("grid", torch.linspace(-2, 2, grid_size))
        self.h = 4 / (grid_size - 1)
        self.spline = nn.Linear(i * grid_size, o, bias=False)
        self.base = nn.Linear(i, o)

    def forward(self, x: Tensor) -> Tensor:
        r = torch.exp(-(((self.layernorm(x).unsqueeze(-1) - self.grid) / self.h) ** 2))
        return self.spline(r.flatten(1)) + self.base(F.silu(x))


class ChebyshevKAN(nn.Module):
    """cos(d acos(tanh x)), as ChebyKAN has it, and one einsum."""

    def __init__(self, i: int, o: int, degree: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i, degree + 1) / (i * (degree + 1)))
        self.register_buffer("d", torch.arange(degree + 1.0))

    def forward(self, x: Tensor) -> Tensor:
        t = torch.cos(torch.acos(torch.tanh(x)).unsqueeze(-1) * self.d)
        return torch.einsum("nid,oid->no", t, self.weight)


class FourierKAN(nn.Module):
    """cos(jx) and sin(jx), and one einsum each (FusedFourierKAN's plain form)."""

    def __init__(self, i: int, o: int, grid_size: int = 5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i, 2, grid_size) / (i * grid_size) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(o))
        self.register_buffer("j", torch.arange(1.0, grid_size + 1))

    def forward(self, x: Tensor) -> Tensor:
        angle = x.unsqueeze(-1) * self.j
        y = torch.einsum("nig,oig->no", angle.cos(), self.weight[:, :, 0])
        return y + torch.einsum("nig,oig->no", angle.sin(), self.weight[:, :, 1]) + self.bias


class SineKAN(nn.Module):
    """sin(freq x + phase), and one einsum (SineKAN)."""

    def __init__(self, i: int, o: int, grid_size: int = 8):
        super().__init__()
        self.freq = nn.Parameter(torch.arange(1, grid_size + 1) / (grid_size + 1))
        self.register_buffer("phase", torch.rand(i, grid_size))
        self.weight = nn.Parameter(torch.randn(o, i, grid_size) / o)
        self.bias = nn.Parameter(torch.full((o,), 1 / o))

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sin(x.unsqueeze(-1) * self.freq + self.phase)
        return torch.einsum("nig,oig->no", s, self.weight) + self.bias


class WaveletKAN(nn.Module):
    """A wavelet a row, output and input (Wav-KAN), without its batch norm."""

    def __init__(self, i: int, o: int, wavelet: str = "mexican_hat"):
        super().__init__()
        self.wavelet = wavelet
        self.weight = nn.Parameter(torch.randn(o, i) / i**0.5)
        self.scale, self.translation = nn.Parameter(torch.ones(o, i)), nn.Parameter(torch.zeros(o, i))

    def forward(self, x: Tensor) -> Tensor:
        u = (x.unsqueeze(1).expand(-1, len(self.weight), -1) - self.translation) / self.scale
        envelope = torch.exp(-0.5 * u**2)
        if self.wavelet == "mexican_hat":
            psi = 2 / (math.sqrt(3) * math.pi**0.25) * (u**2 - 1) * envelope
        else:
            psi = torch.cos(5 * u) * envelope if self.wavelet == "morlet" else -u * envelope
        return (psi * self.weight).sum(2)


class RationalKAN(nn.Module):
    """P / Q with powers of |x|, a group of channels at a time (KAT's plain form), and a linear map."""

    def __init__(self, i: int, o: int, groups: int = 8):
        super().__init__()
        self.groups = groups
        self.numerator = nn.Parameter(torch.tensor([[3e-7, 0.5, 0.25, 0.053, 0.0058, 0.00028]]))
        self.denominator = nn.Parameter(torch.tensor([[4e-6, 0.107, 1e-6, 0.00055]]).repeat(groups, 1))
        self.linear = nn.Linear(i, o)

    def forward(self, x: Tensor) -> Tensor:
        z = x.view(len(x), self.groups, -1)
        p = sum(self.numerator[:, d].view(1, -1, 1) * z**d for d in range(6))
        q = 1 + sum(self.denominator[:, d].abs().view(1, -1, 1) * z.abs() ** (d + 1) for d in range(4))
        return self.linear((p / q).view_as(x))


def pykan_layer(i: int, o: int) -> nn.Module:
    from kan import KANLayer

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = KANLayer(i, o, num=5, k=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    return First()


TEXTBOOK: dict[str, Callable[[int, int], nn.Module]] = {
    "kan": EfficientKAN,
    "fast_kan": FastKAN,
    "chebyshev_kan": ChebyshevKAN,
    "fourier_kan": FourierKAN,
    "sine_kan": SineKAN,
    "wavelet_kan": WaveletKAN,
    "wavelet_kan:morlet": lambda i, o: WaveletKAN(i, o, "morlet"),
    "wavelet_kan:dog": lambda i, o: WaveletKAN(i, o, "dog"),
    "rational_kan": RationalKAN,
}


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Forward and backward."""
    x.grad = None
    layer.zero_grad()
    layer(x).backward(dy)


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd holds for the backward pass, besides x and the parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [x, *layer.parameters(), *layer.buffers()]}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    del y
    return sum(held.values())


def compare(layers: dict[str, nn.Module], n: int, i: int, o: int, seconds: float) -> dict[str, float]:
    """Least time of a step of each, in ms; they take turns until the time is up."""
    x, dy = (torch.rand(n, i) * 2 - 1).requires_grad_(), torch.randn(n, o)
    for layer in layers.values():
        step(layer, x, dy)
    best = dict.fromkeys(layers, math.inf)
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 5:
        for name, layer in layers.items():
            for _ in range(3):
                began = time.perf_counter()
                step(layer, x, dy)
                best[name] = min(best[name], time.perf_counter() - began)
        rounds += 1
    return {name: value * 1e3 for name, value in best.items()}


def measure(name: str, n: int, i: int, o: int, seconds: float) -> dict[str, object]:
    torch.manual_seed(0)
    layer, _, wavelet = name.partition(":")
    ours = archzoo.create_layer(layer, i, o, **({"wavelet": wavelet} if wavelet else {}))
    layers = {"ours": ours, "textbook": TEXTBOOK[name](i, o), "linear": nn.Linear(i, o)}
    if name == "kan":
        layers["gemm"] = nn.Linear(9 * i, o)  # what its weights alone cost: as many, on rows as wide
        layers["pykan"] = pykan_layer(i, o)
    x = (torch.rand(n, i) * 2 - 1).requires_grad_()
    gemm = layers.pop("gemm", None)
    times = compare(layers, n, i, o, seconds)
    row: dict[str, object] = {
        "layer": name,
        "rows": n,
        "in": i,
        "out": o,
        **{
            f"{other}/ours": round(times[other] / times["ours"], 2)
            for other in layers
            if other not in ("ours", "linear")
        },
        "ours/linear": round(times["ours"] / times["linear"], 1),
        **{f"kept_{which}": round(kept(layers[which], x) / (4 * n * i), 2) for which in layers if which != "linear"},
    }
    if gemm is not None:
        wide = compare({"gemm": gemm}, n, 9 * i, o, seconds / 4)
        row["ours/gemm"] = round(times["ours"] / wide["gemm"], 2)
    return row


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kan_speed", description=__doc__)
    parser.add_argument("--layers", default=",".join(TEXTBOOK), help="names, separated by commas")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each layer and size")
    parser.add_argument("--record", action="store_true", help=f"write results/{RESULTS.name}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for name in args.layers.split(","):
        for size in SIZES:
            rows.append(measure(name, *size, args.seconds))
            print(json.dumps(rows[-1]), flush=True)
    if args.record:
        command = f"python -m benchmarks kan_speed --seconds {args.seconds:g}"
        record = {"benchmark": "kan_speed", "command": command, "goals": GOALS, "rows": rows, **environment()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RESULTS}")
