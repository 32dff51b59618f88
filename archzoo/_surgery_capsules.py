"""A classifier's last layer, and capsules in its place."""

from typing import Any

import torch
from torch import Tensor, nn

from archzoo._surgery_adapters import Adapter, Make, layer_adapter
from archzoo.kernels.capsule_routing import squash


class _Head(Adapter):
    """Class capsules for the linear layer that a classifier ends with; `in_capsules` is free for `match`."""

    kind = "module"
    names = ("capsules",)
    original = nn.Module
    what = "the linear layer that a classifier ends with"
    inputs, outputs, inner = "in_features", "out_capsules", "in_capsules"

    def fits(self, module: nn.Module) -> bool:
        return layer_adapter("linear", module) is not None

    def refusal(self, module: nn.Module) -> str:
        return ""

    def arguments(self, layer: type[nn.Module], module: nn.Module) -> dict[str, Any]:
        adapter = layer_adapter("linear", module)
        assert adapter is not None
        given = adapter.arguments(layer, module)
        return {"in_features": given["in_features"], "out_capsules": given["out_features"]}

    def build(self, make: Make, module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
        options = {"in_capsules": 32, "in_dim": 8, "out_dim": 16, **arguments}
        return CapsuleLogits(options.pop("in_features"), make(**options))

    def resizable(self, module: nn.Module) -> bool:
        return False

    def inner_width(self, module: nn.Module) -> int:
        return 32


CAPSULE_HEAD = _Head()


class CapsuleLogits(nn.Module):
    r"""Logits of classes from features, by capsules: the length of a class's vector is the probability of the class.

    $u = \mathrm{squash}(W x + b)$, $v$ = routing of $u$, and the logit is $\log(|v| / (1 - |v|))$; `.sigmoid()` of
    it is the length, which `archzoo.layers.capsules.margin_loss` takes.

    Args:
        features: Size of the input.
        routing: A `DynamicRouting`.

    Shape: (*, features) -> (*, classes).
    """

    def __init__(self, features: int, routing: nn.Module):
        super().__init__()
        weight: Any = routing.weight
        self.capsules, self.capsule_dim = weight.shape[0], weight.shape[-1]
        size = self.capsules * self.capsule_dim
        self.primary = nn.Linear(features, size, device=weight.device, dtype=weight.dtype)
        self.routing = routing

    def forward(self, x: Tensor) -> Tensor:
        """Maps features to logits, in float32 at least from the lengths on."""
        v = self.routing(squash(self.primary(x).unflatten(-1, (self.capsules, self.capsule_dim))))
        length = v.to(torch.promote_types(v.dtype, torch.float32)).norm(dim=-1)
        return torch.logit(length, eps=1e-6).to(v.dtype)
