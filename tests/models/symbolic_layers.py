"""Layers of symbolic edges for their tests."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from archzoo.models.symbolic import FUNCTIONS, SymbolicLinear

NAMES = list(FUNCTIONS)
OF_EACH_KIND = ["x", "x^2", "1/x", "sqrt", "exp", "sin", "tan", "sgn", "arcsin"]
"""A line, a power, a pole, a half-line, growth, waves, many poles, a step, an interval."""


def sampled(names: Iterable[str]) -> list[Any]:
    """Parameters: all but `OF_EACH_KIND` are left to the slow tests."""
    return [name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.slow) for name in names]


def full(dtype=torch.float64, names=NAMES, rows=2):
    """A layer that has every function on one edge at least, and edges without; inputs in (0.1, 0.9) suit all."""
    layer = SymbolicLinear(len(names), rows, dtype=dtype)
    for i, name in enumerate(names):
        layer.set_edge(i % rows, i, name, a=0.9, b=0.05, c=-1.5, d=0.25)
    return layer


def inputs(layer, *leading):
    return 0.1 + 0.8 * torch.rand(*leading, layer.in_features, dtype=torch.float64).to(layer.affine.dtype)


def by_loop(layer, x):
    """The definition: edge by edge."""
    phi = torch.zeros(*x.shape[:-1], layer.out_features, layer.in_features, dtype=x.dtype)
    for o in range(layer.out_features):
        for i in range(layer.in_features):
            if layer.edge_name(o, i) is not None:
                a, b, c, d = layer.affine[o, i]
                phi[..., o, i] = c * FUNCTIONS[layer.edge_name(o, i)].torch(a * x[..., i] + b) + d
    return phi


def layer_of(held):
    layer = SymbolicLinear(4, 3, dtype=torch.float64)
    for (o, i), (name, a, b) in held.items():
        layer.set_edge(o, i, name, a=a, b=b)
    return layer
