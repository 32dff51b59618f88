"""Cases of Mamba and Mamba-2: scans, the decoding step, the short convolution. Work and floors: docs/kernels.md.

Sizes: `channels` d, `states` N a channel, `length` L.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference
from archzoo.kernels.selective_scan import selective_scan, selective_scan_reference
from archzoo.kernels.selective_state_update import selective_state_update
from archzoo.kernels.ssd import ssd, ssd_reference
from benchmarks import mamba_speed
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
    on_copies,
    submodule,
)

# --- Mamba's scan: u, delta, z (B, d, L) stored channel-last, as the projection before it leaves them -----------------


def scan_inputs(s: Size, make: Make) -> Inputs:
    b, d, n, length = s["batch"], s["channels"], s["states"], s["length"]
    wide = torch.float32
    return {
        "u": make.randn(b, length, d).mT,
        "delta": make.randn(b, length, d, scale=0.5).mT,
        "A": -make.uniform(d, n, low=0.5, high=float(n), dtype=wide),
        "B": make.randn(b, length, n).mT,
        "C": make.randn(b, length, n).mT,
        "D": make.uniform(d, low=0.5, high=1.5, dtype=wide),
        "z": make.randn(b, length, d).mT,
        "delta_bias": make.uniform(d, low=-5.0, high=-2.0, dtype=wide),
    }


def scan_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    states = float(s["batch"] * s["channels"] * s["states"] * s["length"])
    return Work(pipe=4 * states, special=states), Work(pipe=12 * states, special=states)


def channel_last(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A contestant of `mamba_speed`, which has no gate, and one dtype: that of A, in which states are."""

    def call(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
    ) -> Tensor:
        first, second, third, fourth = (t.mT.to(A.dtype) for t in (u, delta, B, C))
        y = scan(first, second, A, third, fourth, D, delta_bias)
        return (y * F.silu(z.mT.to(A.dtype))).mT.to(u.dtype)

    return call


class MambaScan(torch.autograd.Function):
    """mamba-ssm's CUDA kernels, as its `SelectiveScanFn` calls them; what else that imports is not needed."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
    ) -> Tensor:
        import selective_scan_cuda

        B, C = B.unsqueeze(1), C.unsqueeze(1)
        out, x, gated = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, x, out)
        return gated

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        import selective_scan_cuda

        u, delta, A, B, C, D, z, bias, x, out = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dbias, dz = selective_scan_cuda.bwd(
            u, delta, A, B, C, D, z, bias, dout.contiguous(), x, out, None, True, False
        )
        return du, ddelta, dA, dB.squeeze(1), dC.squeeze(1), dD, dz, dbias


def mamba_scan(inputs: Inputs) -> Contestant:
    """It wants time to be contiguous, so it gets tensors of its own."""
    own = {name: t.detach().contiguous().requires_grad_() for name, t in inputs.items()}
    return Contestant(lambda: MambaScan.apply(*own.values()), own)


def scan_memory(factor: float) -> Callable[[Size, int], float]:
    """Of what keeps so many (B, L, d, N) tensors in float32."""
    return lambda s, itemsize: factor * 4.0 * s["batch"] * s["channels"] * s["states"] * s["length"]


SCAN = Op(
    "selective_scan",
    "selective_scan",
    scan_inputs,
    functools.partial(selective_scan, delta_softplus=True),
    functools.partial(selective_scan_reference, delta_softplus=True),
    scan_work,
    gpu=(
        {"batch": 8, "channels": 4096, "states": 16, "length": 2048},
        {"batch": 1, "channels": 1536, "states": 16, "length": 16384},
        {"batch": 2, "channels": 1536, "states": 16, "length": 512},
        {"batch": 1, "channels": 256, "states": 16, "length": 256},
    ),
    cpu=(
        {"batch": 2, "channels": 256, "states": 16, "length": 1024},
        {"batch": 2, "channels": 256, "states": 16, "length": 256},
    ),
    tiny={"batch": 2, "channels": 6, "states": 4, "length": 9},
    memory=scan_memory(5),
    compiles=False,
    peers=(
        Peer("mamba-ssm", mamba_scan, {"selective_scan_cuda": "mamba-ssm, by python -m benchmarks peers"}, ("gpu",)),
        function_peer(
            "mambapy", channel_last(mamba_speed.mambapy), needs={"mambapy": "mambapy"}, memory=scan_memory(10)
        ),
        function_peer(
            "textbook loop",
            channel_last(mamba_speed.textbook),
            where=("cpu",),
            memory=scan_memory(6),
            refuse=lambda s: "its time grows as the square of the length, to minutes" if s["length"] > 256 else None,
        ),
    ),
    goals=(
        Goal("gpu", "fb", 1.0, "mamba-ssm"),
        Goal("gpu", "fb", 20.0, "definition"),
        Goal("gpu", "fb", 5.0, "mambapy"),
        Goal("gpu", "floor f", 0.50),
        Goal("gpu", "floor fb", 0.40),
        Goal("gpu", "peak", 1.2),
        Goal("cpu", "fb", 1.5, "mambapy"),
        Goal("cpu", "fb", 20.0, "textbook loop"),
    ),
    loses="few channels and a short text: time is sequential, and only batch x channels fill the device",
)


# --- One step of it ---------------------------------------------------------------------------------------------------


def update_inputs(s: Size, make: Make) -> Inputs:
    b, d, n = s["batch"], s["channels"], s["states"]
    wide = torch.float32
    return {
        "state": make.randn(b, d, n, dtype=wide),
        "x": make.randn(b, d),
        "dt": make.randn(b, d, scale=0.5),
        "A": -make.uniform(d, n, low=0.5, high=float(n), dtype=wide),
        "B": make.randn(b, n),
        "C": make.randn(b, n),
        "D": make.uniform(d, low=0.5, high=1.5, dtype=wide),
        "z": make.randn(b, d),
        "dt_bias": make.uniform(d, low=-5.0, high=-2.0, dtype=wide),
    }


def update_definition(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """The equations, one operator after the other; the state changes in place."""
    delta = F.softplus(dt.float() + dt_bias).unsqueeze(-1)
    state.copy_(torch.exp(delta * A) * state + delta * B.float().unsqueeze(1) * x.float().unsqueeze(-1))
    y = (state * C.float().unsqueeze(1)).sum(-1) + D * x.float()
    return (y * F.silu(z.float())).to(x.dtype)


def mamba_update(**inputs: Any) -> Tensor:
    module = submodule("mamba_ssm.ops.triton.selective_state_update")
    y: Tensor = module.selective_state_update(**inputs, dt_softplus=True)
    return y


UPDATE = Op(
    "selective_state_update",
    "selective_state_update",
    update_inputs,
    functools.partial(selective_state_update, dt_softplus=True),
    update_definition,
    lambda s, dtype: (
        Work(
            pipe=4.0 * s["batch"] * s["channels"] * s["states"],
            special=float(s["batch"] * s["channels"] * s["states"]),
            extra_bytes=4.0 * s["batch"] * s["channels"] * s["states"],  # the state is written too
        ),
        Work(),
    ),
    gpu=(
        {"batch": 128, "channels": 5120, "states": 16},
        {"batch": 1, "channels": 5120, "states": 16},
        {"batch": 16, "channels": 1536, "states": 16},
    ),
    cpu=({"batch": 1, "channels": 256, "states": 16}, {"batch": 16, "channels": 1536, "states": 16}),
    tiny={"batch": 2, "channels": 6, "states": 4},
    memory=lambda s, itemsize: 16.0 * s["batch"] * s["channels"] * s["states"],
    backward=False,
    peers=(
        Peer(
            "mamba-ssm",
            lambda inputs: Contestant(on_copies(mamba_update, inputs), {}),
            {"mamba_ssm.ops.triton.selective_state_update": "mamba-ssm", "einops": "einops"},
            ("gpu",),
        ),
    ),
    loses="a batch of one on a GPU, where starting kernels takes longer than they run, for all contestants",
)


# --- The short convolution before it ----------------------------------------------------------------------------------


def conv_inputs(s: Size, make: Make) -> Inputs:
    return {
        "x": make.randn(s["batch"], s["length"], s["channels"]).mT,
        "weight": make.randn(s["channels"], 4, scale=0.5),
        "bias": make.randn(s["channels"], scale=0.1),
    }


def conv_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    e = float(s["batch"] * s["length"] * s["channels"])
    return Work(pipe=8 * e, special=2 * e), Work(pipe=18 * e, special=2 * e)


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=3, groups=len(weight))
    return F.silu(y[..., : x.shape[-1]])


def fla_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from fla.modules.causal_conv1d.ops import causal_conv1d

    y: Tensor = causal_conv1d(x.mT, weight, bias, activation="silu")[0]
    return y.mT


def dao_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    y: Tensor = causal_conv1d_fn(x, weight, bias, activation="silu")
    return y


CONV = Op(
    "causal_conv1d",
    "causal_conv1d",
    conv_inputs,
    functools.partial(causal_conv1d, activation="silu"),
    functools.partial(causal_conv1d_reference, activation="silu"),
    conv_work,
    gpu=(
        {"batch": 8, "channels": 4096, "length": 2048},
        {"batch": 1, "channels": 1536, "length": 16384},
        {"batch": 2, "channels": 512, "length": 256},
    ),
    cpu=({"batch": 2, "channels": 256, "length": 1024},),
    tiny={"batch": 2, "channels": 8, "length": 9},
    memory=lambda s, itemsize: 80.0 * s["batch"] * s["length"] * s["channels"],
    peers=(
        function_peer("torch conv1d", torch_conv),
        function_peer(
            "causal-conv1d",
            dao_conv,
            needs={"causal_conv1d_cuda": "causal-conv1d, by python -m benchmarks peers"},
            where=("gpu",),
        ),
        function_peer(
            "flash-linear-attention",
            fla_conv,
            needs={"fla.modules.causal_conv1d.ops": "flash-linear-attention", "einops": "einops"},
            where=("gpu",),
        ),
    ),
    loses="inputs stored with time contiguous, which it copies; more than 8 taps, which plain torch takes",
)


# --- Mamba-2 ----------------------------------------------------------------------------------------------------------


def ssd_inputs(s: Size, make: Make) -> Inputs:
    b, length, h, p, n = s["batch"], s["length"], s["heads"], s["width"], s["states"]
    wide = torch.float32
    return {
        "x": make.randn(b, length, h, p),
        "dt": make.randn(b, length, h, scale=0.5),
        "A": -make.uniform(h, low=1.0, high=16.0, dtype=wide),
        "B": make.randn(b, length, 1, n, scale=n**-0.5),
        "C": make.randn(b, length, 1, n),
        "D": make.uniform(h, low=0.5, high=1.5, dtype=wide),
        "dt_bias": make.uniform(h, low=-5.0, high=-2.0, dtype=wide),
    }


def ssd_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """Chunks of 64: scores of a chunk's steps, their product with x, states of chunks, and what is read of them."""
    q, h, p, n = 64, s["heads"], s["width"], s["states"]
    forward = Work(2.0 * s["batch"] * s["length"] * (q * n + q * p * h + 2 * n * p * h))
    return forward, forward * 2


def mamba_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    module = submodule("mamba_ssm.ops.triton.ssd_combined")
    y: Tensor = module.mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True)
    return y


def fla_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    delta = F.softplus(dt.float() + dt_bias)
    q, k = (t.expand(-1, -1, x.shape[2], -1).contiguous() for t in (C, B))
    v = (x * delta.unsqueeze(-1)).to(x.dtype)
    y: Tensor = chunk_simple_gla(q, k, v, delta * A, scale=1.0)[0]
    return (y + D.unsqueeze(-1) * x).to(x.dtype)


SSD = Op(
    "ssd",
    "ssd",
    ssd_inputs,
    functools.partial(ssd, dt_softplus=True),
    functools.partial(ssd_reference, dt_softplus=True),
    ssd_work,
    gpu=(
        {"batch": 8, "length": 2048, "heads": 64, "width": 64, "states": 128},
        {"batch": 1, "length": 16384, "heads": 24, "width": 64, "states": 128},
        {"batch": 2, "length": 512, "heads": 8, "width": 64, "states": 64},
    ),
    cpu=({"batch": 2, "length": 512, "heads": 4, "width": 64, "states": 64},),
    tiny={"batch": 2, "length": 9, "heads": 4, "width": 4, "states": 4},
    memory=lambda s, itemsize: 16.0 * s["batch"] * s["length"] * s["heads"] * s["width"] * s["states"],
    compiles=False,
    peers=(
        function_peer(
            "mamba-ssm",
            mamba_ssd,
            needs={"mamba_ssm.ops.triton.ssd_combined": "mamba-ssm", "einops": "einops"},
            where=("gpu",),
        ),
        function_peer(
            "flash-linear-attention",
            fla_ssd,
            needs={"fla.ops.simple_gla": "flash-linear-attention", "einops": "einops"},
            where=("gpu",),
        ),
    ),
    loses="texts of less than a chunk",
)


OPS = (SCAN, UPDATE, CONV, SSD)
