"""What else of the scans' kernels is compiled: options that make another kernel, with each dtype, most in pairs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels import _causal_conv1d_triton as conv
from archzoo.kernels import _selective_scan_backward_triton as scan_backward
from archzoo.kernels import _selective_scan_triton as scan
from archzoo.kernels import _selective_state_update_triton as state_update
from archzoo.kernels._scan import common_groups, state_dtype, steps_of
from archzoo.kernels._triton import cdiv

Variants = Iterator[tuple[str, Callable[[], Any]]]

SCANS = (
    "float64 z D bias softplus",
    "float64 groups_B groups_C int64 z D bias softplus length_last last_state",
    "float64 constant_B constant_C int32 z odd",
    "float64 constant_C D bias odd",
    "float32 groups_B groups_C int64 z D bias softplus length_last last_state",
    "float32 constant_B int32 z D bias softplus odd",
    "float32 constant_C z softplus",
    "float32 constant_B constant_C int64 D bias length_last",
    "float32 groups_C last_state_alone D z softplus",
    "bfloat16 groups_B groups_C int64 z D bias softplus length_last last_state",
    "bfloat16 constant_C int32 z D bias softplus odd",
    "bfloat16 constant_B bias odd",
    "bfloat16 constant_B constant_C z D softplus",
    "bfloat16 inputs_alone z D bias softplus",
    "float16 groups_B int32 z D bias softplus",
    "float16 many groups_B groups_C int64 z D bias softplus odd",
    "bfloat16 many constant_C int32 z D bias softplus",
)
CONVOLUTIONS = (
    "float64 4 int64 state bias silu",
    "float32 4 int64 state bias silu",
    "bfloat16 4 int32 state bias silu",
    "float16 3 int32 bias",
    "float32 2 state length_last",
)
UPDATES = ("float64 z D bias softplus", "float16 heads groups z D bias softplus", "float32 heads D", "bfloat16 groups")


def _tensor(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _scan(words: list[str]) -> tuple[Any, ...]:
    """Arguments of `forward`: of 512 states a sequence that fills no block where odd; Mamba's else."""
    dtype, odd = getattr(torch, words[0]), "odd" in words
    batch, length, d, N, groups = (3, 2047, 1001, 5, 7) if odd else (8, 2048, 1536, 16, 4)
    batch *= 24 if "many" in words else 1

    def sequence() -> Tensor:
        return _tensor(dtype, batch, d, length).mT if "length_last" in words else _tensor(dtype, batch, length, d)

    def weights(name: str) -> Tensor:
        if f"constant_{name}" in words:
            return _tensor(dtype, d, N)
        return _tensor(dtype, batch, length, groups if f"groups_{name}" in words else 1, N)

    numbers = next((getattr(torch, word) for word in words if word.startswith("int")), None)
    return (
        sequence(),
        sequence(),
        _tensor(state_dtype(torch.empty(0, dtype=dtype)), d, N),
        weights("B"),
        weights("C"),
        _tensor(torch.float32, d) if "D" in words else None,
        sequence() if "z" in words else None,
        _tensor(dtype, d) if "bias" in words else None,
        None,
        None if numbers is None else _tensor(numbers, batch, length),
        "softplus" in words,
    )


def _scans() -> Variants:
    for name in SCANS:
        yield name, partial(scan.forward, *_scan(name.split()))


def _scans_backward() -> Variants:
    for name in SCANS:
        words, arguments = name.split(), _scan(name.split())
        (batch, length, d), N, groups = arguments[0].shape, arguments[2].shape[1], common_groups(*arguments[3:5])
        wide = arguments[2].dtype
        borders = _tensor(wide, cdiv(length, steps_of(wide)), batch, groups, N, d // groups)
        dout = None if "last_state_alone" in words else arguments[0]
        dlast = _tensor(wide, batch, d, N) if "last_state" in name else None
        needed = [i in (0, 1) or "inputs_alone" not in words for i in range(9)]
        given = (dout, dlast, *arguments[:10], borders, arguments[10], needed)
        yield name, partial(scan_backward.backward, *given)


def _convolution(words: list[str]) -> tuple[Any, ...]:
    dtype, width = getattr(torch, words[0]), int(words[1])
    batch, length, d = 8, 2048, 1536
    x = _tensor(dtype, batch, d, length).mT if "length_last" in words else _tensor(dtype, batch, length, d)
    numbers = next((getattr(torch, word) for word in words if word.startswith("int")), None)
    return (
        x,
        _tensor(dtype, d, width),
        _tensor(dtype, d) if "bias" in words else None,
        _tensor(dtype, batch, width - 1, d) if "state" in words else None,
        None if numbers is None else _tensor(numbers, batch, length),
        "silu" in words,
    )


def _convolutions() -> Variants:
    for name in CONVOLUTIONS:
        yield name, partial(conv.forward, *_convolution(name.split()))


def _convolutions_backward() -> Variants:
    for name in CONVOLUTIONS:
        arguments = _convolution(name.split())
        yield name, partial(conv.backward, arguments[0], *arguments, [True] * 4)


def _updates() -> Variants:
    for name in UPDATES:
        words = name.split()
        dtype, groups = getattr(torch, words[0]), (4,) if "groups" in words else ()
        batch, N, heads = 64, 64, (24, 64) if "heads" in words else (1536,)
        wide = state_dtype(torch.empty(0, dtype=dtype))
        x, weights = _tensor(dtype, batch, *heads), _tensor(dtype, batch, *groups, N)
        D, z, bias = (x if word in words else None for word in ("D", "z", "bias"))
        D, bias = (None if t is None else t[0] for t in (D, bias))
        given = (_tensor(wide, batch, *heads, N), x, x, _tensor(wide, *heads, N), weights, weights, D, z, bias)
        yield name, partial(state_update.update, *given, "softplus" in words)


VARIANTS = {
    "selective_scan": _scans,
    "selective_scan_backward": _scans_backward,
    "causal_conv1d": _convolutions,
    "causal_conv1d_backward": _convolutions_backward,
    "selective_state_update": _updates,
}
"""By the pass's name, what to call for each of its variants, and how that is named."""
