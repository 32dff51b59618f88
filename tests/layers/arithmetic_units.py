"""What the tests of the arithmetic units share."""

import torch
from torch import nn

from archzoo.layers.arithmetic import NAU, NMU

UNITS = ["inalu", "mcfc", "nac", "nalu", "nau", "nmu", "npu", "real_npu"]
BOXED = [NAU, NMU]


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def with_weight(cls, rows, **options):
    weight = torch.tensor(rows, dtype=torch.float64)
    unit = cls(weight.shape[1], weight.shape[0], dtype=torch.float64, **options)
    unit.weight.data.copy_(weight)
    return unit


def linear(rows, bias=True, dtype=torch.float64):
    weight = torch.tensor(rows, dtype=dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=dtype)
    layer.weight.data.copy_(weight)
    return layer
