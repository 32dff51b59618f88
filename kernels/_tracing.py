"""Questions whose answers are constants of a graph: dynamo asks them while it traces, and does not trace into them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Decorator of such a question, as `torch.compiler.assume_constant_result`, without importing dynamo: a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function takes any attribute
    return function


@constant
def has_autocast(device: str) -> bool:
    """Whether there is autocast for a type of device; for one without, as `meta`, asking whether it is on raises.

    Dynamo of torch 2.11 cannot trace torch's own.
    """
    return torch.amp.is_autocast_available(device)


@constant
def is_exporting() -> bool:
    """Whether an export is at work. To dynamo of torch 2.11 torch's own is always true."""
    return torch.compiler.is_exporting()
