"""What ops written as `torch.library.custom_op` have in common: dtypes, autocast, higher derivatives, FLOP formulas."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from archzoo.kernels._backend import refuse_triton
from archzoo.kernels._tracing import has_autocast, is_exporting

Function = TypeVar("Function", bound=Callable[..., Any])


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among the tensors, float32 at least: that of an op's arithmetic and of its sums."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None), torch.float32)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in a dtype: `t.to(dtype)`, which takes as long as a small operator where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's type of device."""
    device = x.device.type
    return has_autocast(device) and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast gives an input of a GEMM-like op: float64 is left alone, as `nn.Linear` leaves it."""
    return torch.get_autocast_dtype(x.device.type) if x.dtype != torch.float64 and under_autocast(x) else x.dtype


def without_autocast(implementation: Function) -> Function:
    """Decorator of an op's implementation: inside, dtypes are the op's own choice, also in a region under autocast."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        x = next(t for t in args if isinstance(t, Tensor))
        if under_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return implementation(*args)
        return implementation(*args)

    return run  # type: ignore[return-value]


_definitions = [False]


@contextmanager
def definitions() -> Iterator[None]:
    """Lets every op take its definition in plain torch, as under a transform: for who cannot have custom ops."""
    before, _definitions[0] = _definitions[0], True
    try:
        yield
    finally:
        _definitions[0] = before


def under_transform() -> bool:
    """Whether a `torch.func` transform is at work, which custom ops do not support and plain torch does.

    Or `definitions`.
    """
    return _definitions[0] or torch._C._are_functorch_transforms_active()


def plain_eager(x: Tensor) -> bool:
    """Whether nothing needs to see an op as one: no compiler, export, meta or fake tensor, no counter of FLOPs.

    Then its implementation may be called without the dispatcher, which costs 50 to 100 us an op and its backward.
    """
    return type(x) is Tensor and not x.is_meta and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()


def compiled_for_cpu(x: Tensor) -> bool:
    """Whether torch.compile is at work for a CPU: it fuses a definition by elements and rows, where it leaves an op be.

    Not in an export, whose graph is to hold the op.
    """
    return torch.compiler.is_compiling() and not is_exporting() and x.device.type == "cpu"


def running_sum(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`x.cumsum(dim)`, which a GPU refuses where torch is to be deterministic: there in log2 of the size steps."""
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(dim, dtype=dtype)
    return _doubling(x if dtype is None else cast(x, dtype), dim)


def _doubling(x: Tensor, dim: int) -> Tensor:
    size, step = x.shape[dim], 1
    while step < size:
        more = x.narrow(dim, step, size - step) + x.narrow(dim, 0, size - step)
        x, step = torch.cat((x.narrow(dim, 0, step), more), dim), 2 * step
    return x


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


def check_floating(**tensors: Tensor | None) -> None:
    """Raises a ValueError if a tensor, by the name that the caller knows, is not real floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} of {tensor.dtype}: must be real floating point")


def empty_if(needed: bool, tensor: Tensor | None, dy: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh, contiguous memory for a tensor's gradient, in its dtype by default; with no elements if not needed.

    `dy`, any tensor beside it, gives device and dtype where there is no tensor.
    """
    if tensor is None or not needed:
        return (dy if tensor is None else tensor).new_empty(0)
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)


class DifferentiableOp:
    """A custom op whose backward is a custom op as well, for plain torch and Triton alike.

    Calling it calls the op; without the dispatcher where nothing needs to see one. Gradients of gradients go by the
    definition, in plain torch.

    Args:
        name: `"rational"` makes `archzoo::rational` and `archzoo::rational_backward`.
        forward: `(*tensors, *options, triton=False)`, annotated as `torch.library.custom_op` wants it -> the outputs,
            then what is kept for the backward pass, which has no gradient: a tensor, or a tuple.
        backward: `(*dys, *tensors, *kept, *options, needed: list[bool], triton=False)` -> `list[Tensor]`, a gradient of
            each of the tensors, with no elements where it is not needed. `dys` has one gradient for each output; the
            annotation says whether it may be None, as one of several may.
        fake: As `forward`, for tensors without data: gives shapes and dtypes.
        definition: `(*tensors, *options)` -> the outputs, in differentiable torch.
        tensors: Number of tensors, of which some may be None. Options are all arguments behind them but `triton`.
        kept: Number of outputs that are kept.

    Attributes:
        op: `archzoo::<name>`.
        backward_op: `archzoo::<name>_backward`.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., list[Tensor]],
        *,
        fake: Callable[..., Any],
        definition: Callable[..., Any],
        tensors: int,
        kept: int = 0,
    ):
        self.name, self._kept = name, kept
        self.op = op = torch.library.custom_op(f"archzoo::{name}", forward, mutates_args=())
        self.backward_op = backward_op = torch.library.custom_op(f"archzoo::{name}_backward", backward, mutates_args=())

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.options = inputs[tensors:]
            ctx.set_materialize_grads(False)
            outputs = (output,) if isinstance(output, Tensor) else tuple(output)
            hidden = outputs[len(outputs) - kept :]
            ctx.mark_non_differentiable(*hidden)
            ctx.save_for_backward(*inputs[:tensors], *hidden)

        def gradients(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
            saved, without = ctx.saved_tensors, (None,) * len(ctx.options)
            dys, needed = dys[: len(dys) - kept], list(ctx.needs_input_grad[:tensors])
            dy = next((d for d in dys if d is not None), None)
            if dy is None:
                return (None,) * tensors + without
            *options, triton = ctx.options
            if torch.is_grad_enabled():  # create_graph=True
                refuse_triton(name, "a gradient of a gradient")

                def by_tensors(*own: Tensor | None) -> Any:
                    return definition(*own, *options)

                several = dys if len(dys) > 1 else dy
                return *differentiable_gradients(by_tensors, several, saved[:tensors], needed), *without
            run = backward if plain_eager(dy) else backward_op
            found = run(*dys, *saved, *options, needed, triton)
            return *(g if need else None for g, need in zip(found, needed, strict=True)), *without

        def fake_backward(*args: Any) -> list[Tensor]:
            # A graph leaves out arguments that are at their default: `triton` may be missing.
            dy, own, needed = next(t for t in args if t is not None), args[first : first + tensors], args[last]
            return [empty_if(need, t, dy) for t, need in zip(own, needed, strict=True)]

        options = len(inspect.signature(forward).parameters) - tensors  # with triton
        last = len(inspect.signature(backward).parameters) - 2
        first = last + 1 - options - kept - tensors
        op.register_fake(fake)
        backward_op.register_fake(fake_backward)
        op.register_autograd(gradients, setup_context=setup)

        class Eager(torch.autograd.Function):
            """The op without the dispatcher."""

            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = forward(*inputs)
                setup(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *dys: Any) -> Any:
                return gradients(ctx, *dys)

        Eager.__name__ = Eager.__qualname__ = name
        self._eager = Eager

    def __call__(self, *inputs: Any) -> Any:
        """The outputs, without what is kept; all inputs by position, `triton` among them."""
        output = self._eager.apply(*inputs) if plain_eager(inputs[0]) else self.op(*inputs)
        if not self._kept:
            return output
        outputs = output[: len(output) - self._kept]
        return outputs if len(outputs) > 1 else outputs[0]


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
