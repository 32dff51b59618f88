"""Cases of attention, the residual step, capsules and the connectome's recurrence. Work and floors: docs/kernels.md."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._bpu_plan import plan_recurrence
from archzoo.kernels.attention import attention, attention_reference
from archzoo.kernels.bpu_recurrence import bpu_recurrence, bpu_recurrence_reference
from archzoo.kernels.capsule_routing import capsule_routing, capsule_routing_reference
from archzoo.kernels.normalized_residual import normalized_residual, normalized_residual_reference
from archzoo.layers.bpu import Connectome
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
)

# --- Attention and residuals ------------------------------------------------------------------------------------------


def attention_inputs(s: Size, make: Make) -> Inputs:
    return {name: make.randn(s["batch"], s["heads"], s["length"], s["width"]) for name in "qkv"}


def attention_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    scores = s["batch"] * s["heads"] * s["length"] ** 2 / 2.0  # causal
    return Work(4 * scores * s["width"], special=scores), Work(10 * scores * s["width"], special=scores)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


ATTENTION = Op(
    "attention",
    "attention",
    attention_inputs,
    functools.partial(attention, causal=True),
    functools.partial(attention_reference, causal=True),
    attention_work,
    gpu=(
        {"batch": 4, "heads": 16, "length": 2048, "width": 128},
        {"batch": 1, "heads": 16, "length": 8192, "width": 64},
        {"batch": 16, "heads": 8, "length": 256, "width": 64},
    ),
    cpu=({"batch": 2, "heads": 4, "length": 256, "width": 64},),
    tiny={"batch": 2, "heads": 2, "length": 9, "width": 8},
    memory=lambda s, itemsize: 24.0 * s["batch"] * s["heads"] * s["length"] ** 2,
    peers=(function_peer("torch SDPA", torch_attention),),
    loses="few and short rows: it is torch's own attention behind checks of its arguments",
)


def residual_inputs(s: Size, make: Make) -> Inputs:
    shape = (s["rows"], s["features"])
    return {
        "h": make.randn(*shape),
        "branch": make.randn(*shape),
        "alpha": make.uniform(s["features"], low=0.02, high=0.2, dtype=torch.float32),
    }


def residual_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    n = float(s["rows"] * s["features"])
    return Work(pipe=8 * n), Work(pipe=16 * n)


def liger(h: Tensor, branch: Tensor, alpha: Tensor) -> Tensor:
    """Liger has no such step: its RMSNorm three times, and torch between."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    weight = torch.full_like(h[0], h.shape[-1] ** -0.5)

    def unit(x: Tensor) -> Tensor:
        y: Tensor = LigerRMSNormFunction.apply(x, weight, 1e-12, 0.0, "llama", False)
        return y

    a, b = unit(h), unit(branch)
    return unit((a + alpha.to(a.dtype) * (b - a)).contiguous())


RESIDUAL = Op(
    "normalized_residual",
    "normalized_residual",
    residual_inputs,
    normalized_residual,
    normalized_residual_reference,
    residual_work,
    gpu=(
        {"rows": 16384, "features": 4096},
        {"rows": 8192, "features": 1024},
        {"rows": 256, "features": 768},
    ),
    cpu=({"rows": 4096, "features": 512},),
    tiny={"rows": 5, "features": 8},
    memory=lambda s, itemsize: 40.0 * s["rows"] * s["features"],
    peers=(function_peer("Liger", liger, needs={"liger_kernel.ops.rms_norm": "liger-kernel"}, where=("gpu",)),),
    goals=(
        Goal("gpu", "fb", 3.0, "definition"),
        Goal("gpu", "fb", 1.15, "definition, compiled"),
        Goal("gpu", "floor f", 0.85),
    ),
    compiles_on_cpu=True,
    loses="a few hundred rows, where starting a kernel takes longer than it runs",
)


# --- Capsules ---------------------------------------------------------------------------------------------------------


def capsule_inputs(s: Size, make: Make) -> Inputs:
    return {
        "u": make.uniform(s["batch"], s["lower"], 8, low=0.0, high=0.3),
        "weight": make.randn(s["lower"], s["upper"], 16, 8, scale=0.1),
    }


def capsule_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """With the votes kept in bfloat16, which the goal is set by: written once, and read twice a round but once."""
    votes = float(s["batch"] * s["lower"] * s["upper"] * 16)
    forward = Work(2 * 8 * votes, 12 * votes, votes / 4, 6 * 2 * votes)
    return forward, forward * 2


def textbook_routing(inputs: Inputs) -> torch.nn.Module:
    from benchmarks.capsule_speed import TextbookRouting

    i, j, d, k = inputs["weight"].shape
    return TextbookRouting(i, j, k, d, 3, detach=False)


CAPSULES = Op(
    "capsule_routing",
    "capsule_routing",
    capsule_inputs,
    capsule_routing,
    lambda u, weight: capsule_routing_reference(u, weight)[0],
    capsule_work,
    gpu=(
        {"batch": 256, "lower": 1152, "upper": 10},
        {"batch": 32, "lower": 1152, "upper": 10},
        {"batch": 128, "lower": 32, "upper": 10},
    ),
    cpu=({"batch": 32, "lower": 1152, "upper": 10},),
    tiny={"batch": 2, "lower": 5, "upper": 3},
    memory=lambda s, itemsize: 10.0 * s["batch"] * s["lower"] * s["upper"] * 16 * 4,
    peers=(
        module_peer(
            "textbook routing",
            textbook_routing,
            {"weight": lambda x: x["weight"].transpose(0, 1).contiguous()},
            x="u",
            needs={"timm": "timm"},
            where=("cpu",),
        ),
    ),
    goals=(
        Goal("gpu", "fb", 5.0, "definition"),
        Goal("gpu", "fb", 2.0, "definition, compiled"),
        Goal("gpu", "floor f", 0.5),
        Goal("cpu", "fb", 2.5, "textbook routing"),
    ),
    loses="a few dozen lower capsules, where all votes fit into a cache",
)


# --- A connectome -----------------------------------------------------------------------------------------------------


@functools.cache
def radius(small: bool) -> float:
    return float(wiring(small).spectral_radius())


@functools.cache
def wiring(small: bool) -> Any:
    if not small:
        return Connectome.generate()
    torch.manual_seed(0)
    matrix = (torch.rand(12, 12) < 0.4) * torch.randn(12, 12)
    return Connectome.from_dense(matrix, num_sensory=3, num_output=3)


def bpu_inputs(s: Size, make: Make) -> Inputs:
    """Weights are the synapse counts, scaled to a spectral radius of about 1, and constants, as in a BPU."""
    brain = wiring(bool(s.get("small")))
    pools = brain.pool_sizes
    plan = plan_recurrence(brain.pre, brain.post, pools, s["steps"])
    return {
        "drive": make.randn(s["batch"], pools[0]),
        "weight": make.place(brain.weight.float() / radius(bool(s.get("small")))).to(make.dtype),
        "plan": plan.to(make.device),
        "pre": make.place(brain.pre),
        "post": make.place(brain.post),
        "pools": pools,
        "steps": s["steps"],
    }


def bpu_work(s: Size, dtype: torch.dtype) -> tuple[Work, Work]:
    """As dense products of all neurons: on a GPU, and in a batch, cheaper than the sparse ones."""
    neurons = 12 if s.get("small") else sum(wiring(False).pool_sizes)
    product = Work(2.0 * s["batch"] * neurons**2 * s["steps"])
    return product, product


def bpu_definition(
    drive: Tensor, weight: Tensor, pre: Tensor, post: Tensor, pools: Any, steps: int, plan: Any
) -> Tensor:
    return bpu_recurrence_reference(drive, weight, pre, post, pools, steps)


def _loop(inputs: Inputs, step: Callable[[Tensor], Tensor]) -> Contestant:
    drive, pools = inputs["drive"], inputs["pools"]

    def call() -> Tensor:
        h = torch.relu(F.pad(drive, (0, sum(pools) - pools[0])))
        for _ in range(inputs["steps"] - 1):
            h = torch.relu(step(h))
        return h[:, -pools[2] :]

    return Contestant(call, {"drive": drive})


def dense_loop(inputs: Inputs) -> Contestant:
    neurons = sum(inputs["pools"])
    W = inputs["weight"].new_zeros(neurons, neurons)
    W[inputs["pre"], inputs["post"]] = inputs["weight"]
    return _loop(inputs, lambda h: h @ W)


def sparse_loop(inputs: Inputs) -> Contestant:
    """In float32: torch has no sparse product in bfloat16 on every device."""
    neurons, index = sum(inputs["pools"]), torch.stack([inputs["post"], inputs["pre"]])
    W = torch.sparse_coo_tensor(index, inputs["weight"].float(), (neurons, neurons), check_invariants=False).coalesce()
    return _loop(inputs, lambda h: torch.sparse.mm(W, h.mT.float()).mT.to(h.dtype))


BPU = Op(
    "bpu_recurrence",
    "bpu_recurrence",
    bpu_inputs,
    lambda drive, weight, plan, **rest: bpu_recurrence(drive, weight, plan),
    bpu_definition,
    bpu_work,
    gpu=({"batch": 1024, "steps": 10}, {"batch": 64, "steps": 5}),
    cpu=({"batch": 64, "steps": 5}, {"batch": 64, "steps": 10}),
    tiny={"batch": 4, "steps": 3, "small": 1},
    memory=lambda s, itemsize: 12.0 * s["batch"] * s["steps"] * 100_000,  # edges
    constant=("weight",),
    compiles=False,
    peers=(Peer("torch.sparse.mm loop", sparse_loop), Peer("dense loop", dense_loop)),
    goals=(
        Goal("gpu", "fb", 3.0, "torch.sparse.mm loop"),
        Goal("gpu", "fb", 1.5, "dense loop"),
        Goal("gpu", "floor f", 0.5),
        Goal("cpu", "fb", 3.0, "dense loop"),
    ),
    loses="many steps on a GPU: once every neuron matters, it is the dense loop",
)

OPS = (ATTENTION, RESIDUAL, CAPSULES, BPU)
