"""What every layer of the zoo owes its users, whatever its idea: tests over `archzoo.list_layers()`.

They are in `test_contract_*.py`, and a new layer is tested there the moment its file exists. Facts of one layer alone
are in `test_<layer>.py`.

Where torch's own `nn.Linear` promises less than the zoo does, `exempt` says so beside the test; an exemption that is
not needed fails. `test_contract_itself.py` hands deliberately broken layers to the tests and expects them to notice.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import archzoo
from archzoo.registry import LayerEntry, get_layer


@dataclass(frozen=True)
class Sizes:
    """How to build and feed a layer of one kind. 8 and 12 suit layers whose sizes must be multiples of 1, 2 or 4."""

    standard: dict[str, Any]
    """The arguments that every layer of the kind takes first, in order; those without a default here have none."""
    args: dict[str, int]
    small: dict[str, int]
    """Smaller ones, for tests that try each element in turn."""
    x: tuple[int, ...]
    """Shape of an input without its leading dimensions, with `args`."""
    small_x: tuple[int, ...]
    y: tuple[int, ...]
    leading: tuple[tuple[int, ...], ...]
    refused: tuple[tuple[int, ...], ...]
    """Shapes of inputs that must be refused."""
    feature_axis: int
    usual: Callable[[], nn.Module]
    """The layer that it stands in for, at the same sizes."""


REQUIRED = inspect.Parameter.empty
CONV_STANDARD = {
    "in_channels": REQUIRED,
    "out_channels": REQUIRED,
    "kernel_size": REQUIRED,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "bias": bool,
}
KINDS = {
    "linear": Sizes(
        standard={"in_features": REQUIRED, "out_features": REQUIRED, "bias": bool},
        args={"in_features": 8, "out_features": 12},
        small={"in_features": 4, "out_features": 8},
        x=(8,),
        small_x=(4,),
        y=(12,),
        leading=((), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)),
        refused=((2, 7), (2, 12), (9,), (2, 1), (2, 0), ()),
        feature_axis=-1,
        usual=lambda: nn.Linear(8, 12),
    ),
    "conv2d": Sizes(
        standard=CONV_STANDARD,
        args={"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1},
        small={"in_channels": 4, "out_channels": 4, "kernel_size": 2},
        x=(8, 5, 4),
        small_x=(4, 3, 2),
        y=(12, 5, 4),
        leading=((1,), (3,), (0,)),
        refused=((2, 7, 5, 4), (2, 12, 5, 4), (8,), ()),
        feature_axis=-3,
        usual=lambda: nn.Conv2d(8, 12, 3, padding=1),
    ),
    "mixer": Sizes(
        standard={"dim": REQUIRED},
        args={"dim": 16},
        small={"dim": 4},
        x=(6, 16),
        small_x=(3, 4),
        y=(6, 16),
        leading=((1,), (3,), (0,)),
        refused=((2, 6, 15), (2, 6, 32), (16,), ()),
        feature_axis=-1,
        usual=lambda: nn.Linear(16, 16),
    ),
}


@dataclass(frozen=True)
class Case:
    """One layer, with what the tests need to build and feed it."""

    entry: LayerEntry
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", KINDS[self.entry.kind])

    def build(self, seed: int = 0, small: bool = False, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        takes = inspect.signature(self.entry.cls).parameters
        few = {"d_state": 4} if small and "d_state" in takes else {}  # states make parameters
        return self.entry.cls(**{**(self.sizes.small if small else self.sizes.args), **few, **options})

    def generic(self, seed: int = 0, small: bool = False, **options: Any) -> nn.Module:
        """A layer a little off its initial state, where nothing is zero, tied or on a kink by construction."""
        layer = self.build(seed, small, **options)
        generator = torch.Generator().manual_seed(seed + 1000)
        with torch.no_grad():
            for parameter in layer.parameters():
                noise = torch.empty(parameter.shape, dtype=torch.float64).uniform_(-0.1, 0.1, generator=generator)
                parameter += noise.to(parameter)
        return layer

    def x(self, *leading: int, seed: int = 0, small: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal inputs; the same values in every dtype, but for rounding."""
        shape = (*leading, *(self.sizes.small_x if small else self.sizes.x))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 2000), dtype=torch.float64).to(dtype)

    def dy(self, *leading: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 3000)
        return torch.randn((*leading, *self.sizes.y), generator=generator, dtype=torch.float64).to(dtype)


COMPOSED = {"ngpt_block", "phm_block", "phm_attention", "mamba3", "real_npu", "inalu"}
"""Made of layers, or variants of them, that the zoo has by themselves."""


def every_layer(
    kind: str | None = None, exempt: dict[str, str] | None = None, sampled: bool = False
) -> pytest.MarkDecorator:
    """Parametrizes a test over the zoo.

    `exempt` gives, for a layer that need not pass, the reason. With `sampled` those are left to the slow tests whose
    parts others have: convolutions of layers that are there as linear ones too, by the same code, and `COMPOSED`.
    """
    exempt = exempt or {}
    cases = []
    for name in archzoo.list_layers():
        entry = get_layer(name)
        if entry.kind in KINDS and kind in (None, entry.kind):
            marks = [pytest.mark.xfail(reason=exempt[name], strict=True)] if name in exempt else []
            if sampled and (name.removesuffix("_conv2d") != name or name in COMPOSED):
                marks.append(pytest.mark.slow)
            cases.append(pytest.param(Case(entry), id=name, marks=marks))
    return pytest.mark.parametrize("case", cases)


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Everything that a layer holds, non-persistent buffers included."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(layer).items()}


def train(layer: nn.Module, x: Tensor, target: Tensor, steps: int) -> list[float]:
    """The training loop in small: every hook that a layer may have is called. Returns the losses."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        if hasattr(layer, "regularization_loss"):
            loss = loss + layer.regularization_loss()
        loss.backward()
        optimizer.step()
        if hasattr(layer, "constrain_"):
            layer.constrain_()
    return losses
