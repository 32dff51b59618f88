"""Count what a model costs, and choose widths so that two models cost the same."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameter elements; a shared parameter counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


# FlopCounterMode counts matrix products and convolutions only. These element-wise operations count one FLOP an output
# element, as in the formulas of our own ops (kernels/), so that no contestant's work is left out.
_POINTWISE = """
add mul sub div neg pow exp log sin cos tanh sigmoid silu gelu relu leaky_relu hardtanh elu softplus abs clamp clamp_min
clamp_max maximum minimum sqrt rsqrt reciprocal where add_ mul_ sub_ div_ addcmul addcdiv lerp square erf sign sgn
silu_backward gelu_backward threshold_backward tanh_backward sigmoid_backward
""".split()  # noqa: SIM905
# Statistics, normalisation, scale and shift, or the exponentials and their sum.
_PER_ELEMENT = {
    "native_layer_norm": 8,
    "native_layer_norm_backward": 12,
    "native_batch_norm": 8,
    "native_group_norm": 8,
    "_softmax": 4,
    "_log_softmax": 4,
}


def _elementwise_formulas() -> dict[Any, Callable[..., int]]:
    def output_size(out: Any) -> int:
        first = out[0] if isinstance(out, list | tuple) and out and isinstance(out[0], torch.Size | tuple) else out
        size = 1
        for length in first:
            size *= length
        return size

    formulas: dict[Any, Callable[..., int]] = {}
    for name in _POINTWISE:
        if hasattr(aten, name):
            formulas[getattr(aten, name)] = lambda *args, out_shape=None, **kwargs: output_size(out_shape)
    for name, each in _PER_ELEMENT.items():
        formulas[getattr(aten, name)] = lambda *args, out_shape=None, each=each, **kw: each * output_size(out_shape)
    # torch knows its attention kernels for GPUs only. Scores, their softmax, and the values' mean.
    formulas[aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
    return formulas


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, size = query
    return int(batch * heads * queries * key[2] * (2 * size + 2 * value[3]))


def count_flops(model: Callable[..., Any], *inputs: Tensor) -> int:
    """Floating-point operations of one forward pass of `model` on `inputs`, which may be on `meta`.

    A multiplication, an addition and a call of exp, tanh, … count one each, so that a matrix product (m, k) x (k, n) is
    2·m·k·n. Our own ops count by their registered formulas.
    """
    with torch.no_grad(), counted_flops() as counted:
        model(*inputs)
        return counted()


@contextmanager
def counted_flops() -> Iterator[Callable[[], int]]:
    """Counts floating-point operations, as `count_flops` does; what it yields says how many there were so far."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False, custom_mapping=_elementwise_formulas()) as counter:
        yield lambda: int(counter.get_total_flops())


@contextmanager
def _kept_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the storages that autograd keeps for backward inside the block, parameters and buffers excepted."""
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield lambda: sum(kept.values())


class _Traffic(TorchDispatchMode):
    """Adds the bytes that each operation reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name() and "detach" not in func.name():
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


@dataclass(frozen=True)
class Cost:
    """What one training step costs, apart from time."""

    parameters: int
    flops: int
    """Forward FLOPs of one example."""
    saved_bytes: int
    """Bytes kept for backward, for the batch; the batch itself is included where it is kept."""
    traffic_bytes: int
    """Bytes that the operations of forward and backward read and write, for the batch, nothing fused."""


def measure_cost(model: nn.Module, batch: Tensor, loss: Callable[[Tensor], Tensor] = lambda y: y.float().sum()) -> Cost:
    """Cost of one training step of `model` on `batch`, (batch, …). Gradients are left as they were.

    The model is run forward and backward once, in its present mode: give a copy if it has state that this would change.
    """
    flops = _flops_of_one(model, batch[:1])
    traffic = _Traffic()
    with torch.enable_grad(), _kept_bytes(model) as kept:
        with traffic:
            value = loss(model(batch))
        saved = kept()
        parameters = [p for p in model.parameters() if p.requires_grad]
        with traffic:
            torch.autograd.grad(value, parameters, allow_unused=True)
    return Cost(count_parameters(model), flops, saved, traffic.bytes)


def _flops_of_one(model: nn.Module, example: Tensor) -> int:
    try:
        return count_flops(model, example)
    except ValueError:  # in training, batch norm has no statistics of one example with a map of 1 x 1
        modes = {module: module.training for module in model.modules()}
        try:
            return count_flops(model.eval(), example)
        finally:
            for module, mode in modes.items():
                module.training = mode


LARGEST_VALUE = 2**20
"""Up to which an option's value is searched."""


@dataclass(frozen=True)
class Match:
    """The widths chosen for a contestant, or an option of its layer at given widths, and how near they come."""

    widths: tuple[int, ...]
    count: int
    target: float
    option: str | None = None
    """Name of the layer's option that was chosen instead of the widths."""
    value: int | None = None

    @property
    def deviation(self) -> float:
        """(count - target) / target."""
        return (self.count - self.target) / self.target


def _widths(depth: int, first: int | None, width: int) -> tuple[int, ...]:
    return (width if first is None else first, *(width,) * (depth - 1))


def match_widths(
    count: Callable[[tuple[int, ...]], int | None], depth: int, target: float, tolerance: float, *, name: str = "width"
) -> Match:
    """Widths of `depth` hidden layers whose count comes nearest to the target.

    All widths are equal if that comes within the tolerance. Where a layer has so many parameters an edge that one more
    unit everywhere is too coarse a step, the first width differs from the others, by as small a factor as it can.

    Args:
        count: Count of a model with these widths, growing with each; None where a width is not allowed.
        depth: Number of widths. At least 1.
        target: Count to reach.
        tolerance: Largest accepted deviation, as a fraction of the target.
        name: What a message calls a width.

    Raises:
        ValueError: If no width is allowed, or if the target is below the smallest count; the message names it.
    """
    cache: dict[tuple[int, ...], int | None] = {}

    def counted(widths: tuple[int, ...]) -> int | None:
        if widths not in cache:
            cache[widths] = count(widths) if min(widths) > 0 else None
        return cache[widths]

    def uniform(width: int) -> int | None:
        return counted((width,) * depth)

    allowed = next((w for w in range(1, 257) if uniform(w) is not None), None)
    if allowed is None:
        raise ValueError(f"no {name} up to 256 is allowed for this layer")
    smallest = uniform(allowed)
    assert smallest is not None
    step = next((w - allowed for w in range(allowed + 1, allowed + 257) if uniform(w) is not None), 1)
    if target < smallest * (1 - tolerance):
        raise ValueError(f"the smallest reachable count is {smallest:,} ({name} {allowed})")

    def bisect(widths_of: Callable[[int], tuple[int, ...]], near: int = 1) -> list[Match]:
        """The last width not above the target and the first one above it, of a family that grows with k.

        The search begins at k = `near`, 1 or more: every count is of a model that has to be built.
        """

        def reached(k: int) -> int | None:
            return counted(widths_of(allowed + k * step))

        def within(k: int) -> bool:
            return (at := reached(k)) is not None and at <= target

        low = high = near
        stride = 1
        if within(near):
            while within(high):
                low, high, stride = high, high + stride, 2 * stride
        else:
            while low and not within(low):
                low, high, stride = max(0, low - stride), low, 2 * stride
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        found = ((widths_of(allowed + k * step), reached(k)) for k in (low, high))
        return [Match(widths, at, target) for widths, at in found if at is not None]

    best = min(bisect(functools.partial(_widths, depth, None)), key=lambda m: abs(m.deviation))
    if depth == 1 or abs(best.deviation) <= tolerance:
        return best
    near = range(-8, 9)
    others = [best]
    for first in (best.widths[0] + k * step for k in near if best.widths[0] + k * step >= allowed):
        others += bisect(functools.partial(_widths, depth, first), max(1, (best.widths[0] - allowed) // step))
    close = [m for m in others if abs(m.deviation) <= tolerance]
    if close:
        return min(close, key=lambda m: (max(m.widths) / min(m.widths), abs(m.deviation)))
    return min(others, key=lambda m: abs(m.deviation))


def match_option(
    count: Callable[[int], int | None], option: str, target: float, tolerance: float, widths: tuple[int, ...]
) -> Match:
    """The whole number, from 1 up, of a layer's option at which the count comes nearest to the target.

    Args:
        count: Count of a model with this value, growing with it; None where a value is not allowed.
        option: Name of the option, as `"grid_size"`.
        target: Count to reach.
        tolerance: Largest accepted deviation, as a fraction of the target.
        widths: Widths that the model keeps; the match says them again.

    Raises:
        ValueError: If no value is allowed, if a larger value does not mean a larger count, or if the target is below
            the smallest count; the message names it.
    """
    allowed = ((value, counted) for value in range(1, 257) if (counted := count(value)) is not None)
    small = list(itertools.islice(allowed, 2))
    if len(small) == 2 and small[0][1] >= small[1][1]:
        told = " and ".join(f"{counted:,} at {option}={value}" for value, counted in small)
        raise ValueError(f"the count does not grow with {option}: it is {told}")

    def counted_up_to(values: tuple[int, ...]) -> int | None:
        return count(values[0]) if values[0] <= LARGEST_VALUE else None

    match = match_widths(counted_up_to, 1, target, tolerance, name=option)
    return Match(widths, match.count, target, option, match.widths[0])
