"""A zoo of alternative neural architectures: swap a layer in, train it beside the usual one, see which won.

>>> import archzoo
>>> archzoo.create_layer("linear", 64, 32)
Linear(in_features=64, out_features=32, bias=True)

Nothing here is imported before it is used: `import archzoo` alone does not even import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from archzoo._version import __version__

if TYPE_CHECKING:
    from archzoo import budget, kernels, layers, registry, surgery
    from archzoo.registry import Card, card, create_layer, list_layers, register_layer
    from archzoo.surgery import SwapReport, swap, unswap

_HOMES = {
    "Card": "registry",
    "SwapReport": "surgery",
    "card": "registry",
    "create_layer": "registry",
    "list_layers": "registry",
    "register_layer": "registry",
    "swap": "surgery",
    "unswap": "surgery",
}
_MODULES = ("budget", "kernels", "layers", "registry", "surgery")

__all__ = [
    "Card",
    "SwapReport",
    "__version__",
    "budget",
    "card",
    "create_layer",
    "kernels",
    "layers",
    "list_layers",
    "register_layer",
    "registry",
    "surgery",
    "swap",
    "unswap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"archzoo.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"archzoo.{name}")
    if not name.startswith("_"):
        try:
            return getattr(importlib.import_module("archzoo.layers"), name)  # archzoo.KANLinear
        except AttributeError:
            pass
    raise AttributeError(f"module 'archzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(importlib.import_module("archzoo.layers"))})
