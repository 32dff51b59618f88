r"""Brings the vectors of a matrix to unit norm in place, $w \leftarrow w / |w|$: nGPT's after each step.

The norm is clamped at 1e-12, so that zeros stay; what is unit already, as near as rounding its elements and summing
their squares allows, stays bit for bit. Norms are in float32 at least. Nothing here is differentiated.

Triton: one kernel a matrix, in place; it moves 2 numbers for each of the matrix, 3 where vectors do not fit into a
program. A few launches for a layer: 8 matrices of 4096 x 4096 in bfloat16 take 0.13 ms at an H200's 4.3 TB/s.
"""

import torch
from torch import Tensor, nn

from archzoo.kernels._backend import takes_triton
from archzoo.kernels._op import compute_dtype
from archzoo.kernels.normalized_residual import EPS


def norm(weight: Tensor, dim: int) -> Tensor:
    """Norms in the weight's dtype; `sum` adds in pairs, `vector_norm` along axis 0 one by one and ten times worse."""
    return weight.square().sum(dim, keepdim=True).sqrt()


def tolerance(stored: torch.dtype, wide: torch.dtype) -> float:
    """How far from 1 the norm of a unit vector may be, stored in one dtype and measured in another."""
    return torch.finfo(stored).eps / 2 + 16 * torch.finfo(wide).eps


def _normalize(weight: Tensor, dim: int, triton: bool) -> None:
    wide = compute_dtype(weight)
    if triton:
        from archzoo.kernels import _normalize_triton

        contiguous = weight.contiguous()
        _normalize_triton.normalize_(contiguous, dim, tolerance(weight.dtype, wide), EPS)
        if contiguous is not weight:
            weight.copy_(contiguous)
        return
    numbers = weight.to(wide)
    size = norm(numbers, dim)
    unit = (size - 1).abs() <= tolerance(weight.dtype, wide)
    weight.copy_(numbers * size.clamp_min(EPS).reciprocal().masked_fill(unit, 1.0))


@torch.library.custom_op("archzoo::normalize", mutates_args=("weight",))
def _normalize_op(weight: Tensor, dim: int) -> None:
    _normalize(weight, dim, True)


@_normalize_op.register_fake
def _(weight: Tensor, dim: int) -> None:
    return None


@torch.no_grad()
def normalize_(weight: Tensor, dim: int) -> None:
    """x / max(|x|, 1e-12) in place, norms in float32 at least. What is unit already stays, bit for bit.

    Plain torch takes what is no plain tensor, as a `DTensor`, on any device.

    Args:
        weight: A matrix, real floating point; a parameter is changed as under `torch.no_grad()`.
        dim: The axis along which vectors lie, 0 or 1.

    Raises:
        ValueError: If `weight` is no matrix, or `dim` neither axis.
    """
    if weight.dim() != 2 or dim not in (0, 1):
        raise ValueError(f"weight of shape {tuple(weight.shape)}, dim={dim}: must be a matrix, and 0 or 1")
    if type(weight) in (Tensor, nn.Parameter) and takes_triton("normalize", weight=weight):
        _normalize_op(weight, dim)
    else:
        _normalize(weight, dim, False)
