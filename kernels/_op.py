"""What ops written as `torch.library.custom_op` have in common: dtypes, autocast, higher derivatives, FLOP formulas."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Function = TypeVar("Function", bound=Callable[..., Any])


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among the tensors, float32 at least: that of an op's arithmetic and of its sums."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None), torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives an input of a GEMM-like op: float64 is left alone, as `nn.Linear` leaves it."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(implementation: Function) -> Function:
    """Decorator of an op's implementation: inside, dtypes are the op's own choice, also in a region under autocast."""

    @functools.wraps(implementation)
    def run(x: Tensor, *args: Any) -> Any:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return implementation(x, *args)
        return implementation(x, *args)

    return run  # type: ignore[return-value]


def under_transform() -> bool:
    """Whether a `torch.func` transform is at work, which custom ops do not support and plain torch does."""
    return torch._C._are_functorch_transforms_active()


def plain_eager(x: Tensor) -> bool:
    """Whether nothing needs to see an op as one: no compiler, export, meta or fake tensor, no counter of FLOPs.

    Then its implementation may be called without the dispatcher, which costs 50 to 100 us an op and its backward.
    """
    return type(x) is Tensor and not x.is_meta and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()


def differentiable_gradients(
    definition: Callable[..., Any],
    dy: Tensor | Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the inputs that can be differentiated again, through the definition: for `create_graph=True`.

    Args:
        definition: Of the op, with the inputs as its arguments; gives a tensor, or a tuple.
        dy: The output's gradient; for a tuple that of each, None for one that was not used.
        inputs: The op's.
        needed: Which of them want a gradient; the others get None.
    """
    several = not isinstance(dy, Tensor)
    with torch.enable_grad():
        # Of views: where one input was made of another, autograd would go on from it into that one, and count it twice.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, need in zip(inputs, needed, strict=True) if t is not None and need]
        found = definition(*inputs)
        pairs = zip(found, dy, strict=True) if several else [(found, dy)]
        ys, dys = zip(*((y, d) for y, d in pairs if d is not None), strict=True)
        # Of several outputs some may be made of other inputs alone.
        options = {"create_graph": True, "allow_unused": several, "materialize_grads": several}
        gradients = iter(torch.autograd.grad(ys, wanted, dys, **options))
    return [next(gradients) if t is not None and need else None for t, need in zip(inputs, needed, strict=True)]


_COUNTER = "torch.utils.flop_counter"
_formulas: list[tuple[Any, Callable[..., int]]] = []


def flop_formula(op: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """`torch.utils.flop_counter.register_flop_formula`, put off until somebody imports that module.

    Importing it imports Triton, where installed: 60 ms that nobody pays for who only looks at the layers.
    """

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        if _COUNTER in sys.modules:
            sys.modules[_COUNTER].register_flop_formula(op)(formula)
        else:
            if not _formulas:
                sys.meta_path.insert(0, _AfterImport())
            _formulas.append((op, formula))
        return formula

    return register


class _AfterImport(MetaPathFinder):
    """Hands the formulas over when the counter is imported, then gets out of the way."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec: ModuleSpec | None = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_register(module: ModuleType) -> None:
                execute(module)
                while _formulas:
                    op, formula = _formulas.pop()
                    module.register_flop_formula(op)(formula)

            spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec
