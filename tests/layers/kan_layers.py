"""Layers of B-splines and samples for their tests, and the equation edge by edge."""

import torch
from torch import Tensor, nn

from archzoo.kernels.kan_spline import cox_de_boor
from archzoo.layers.kan import KANLinear

DOUBLE = {"dtype": torch.float64}


def generic(*sizes: int, adaptive: bool = True, **options) -> KANLinear:
    """A layer in float64 with visible splines, and with a grid fitted to samples."""
    layer = KANLinear(*sizes, scale_noise=5.0, **{**DOUBLE, **options})
    if adaptive:
        layer.update_grid(samples(200, sizes[0]))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.rand_like(parameter) * 0.2
    return layer


def samples(n: int, features: int, scale: float = 1.0) -> Tensor:
    return (torch.rand(n, features, **DOUBLE) * 2 - 1) * scale


def by_definition(layer: KANLinear, x: Tensor) -> Tensor:
    """phi_oi(x_i) from the equation, one edge at a time: (N, O, I)."""
    base = {"silu": nn.functional.silu, "tanh": torch.tanh}[layer.base_activation]
    phi = x.new_zeros(x.shape[0], layer.out_features, layer.in_features)
    for i in range(layer.in_features):
        basis = cox_de_boor(x[:, i].unsqueeze(0), layer.grid[i : i + 1], layer.spline_order)[0]  # (K, N)
        for o in range(layer.out_features):
            spline = layer.spline_weight[o, i] @ basis
            if layer.spline_scaler is not None:
                spline = spline * layer.spline_scaler[o, i]
            phi[:, o, i] = layer.base_weight[o, i] * base(x[:, i]) + spline
            if layer.mask is not None:
                phi[:, o, i] *= layer.mask[o, i]
    return phi
