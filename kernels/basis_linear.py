r"""Linear maps of functions of each input, $y_o = b_o + \sum_{i,j} w_{oij}\, B_j(x_i)$: what every KAN layer shares.

A *basis* says which functions $B_j$ are meant: `values`, `values_and_slopes`, and what they cost. It is written once,
as a short dataclass; this file turns it into a differentiable, compilable, autocast-aware operator. A map may sum
several *terms*, each a basis with its weight: a KAN adds its spline term and its base term in one pass over x.

Cost for N rows, I inputs, O outputs and K functions: 2·N·O·I·K FLOPs forward, 4·N·O·I·K backward, and the basis once
forward and once backward. The basis of the whole batch is K times as large as x, so it is never made: both passes walk
blocks of rows whose basis stays in cache. Kept for the backward pass: x and the parameters.

On a GPU one elementwise Triton kernel makes the functions in the weight's dtype, and pulls their gradient back; cuBLAS
does the products. The floor is theirs, 2·N·O·I·K FLOPs and twice that backward; the functions, written and read once,
add 2·N·I·K numbers moved each way, 11 % at O = 3072 in bfloat16.

On a CPU the layout inside a block is (I, K, R), R rows innermost: elementwise work runs over long contiguous rows
whatever I and K, and as (I·K, R) it meets the weight (O, I·K) in a GEMM without a copy of either.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._backend import refuse_triton, takes_triton, wants_triton
from archzoo.kernels._op import autocast_dtype, flop_formula, plain_eager, under_transform, without_autocast

# A block's basis: on a CPU what L2 holds a few of, and malloc keeps for the next block; elsewhere what keeps it busy.
_CPU_BLOCK, _GPU_BLOCK = 2**20, 2**26  # bytes
_MIN_ROWS = 64  # a GEMM of fewer rows rereads the weight too often; wide layers then exceed the block a little


class KernelForm(NamedTuple):
    """A basis in the words of the Triton kernel: its branch `kind`, and the constants there."""

    kind: str
    order: int = 0
    bits: int = 0
    shift: float = 0.0
    scale: float = 1.0
    outside: str = "zero"


@dataclass(frozen=True)
class Basis(ABC):
    """What the functions of one input are. A subclass is a frozen dataclass of plain numbers and strings.

    On a GPU a basis that has a `kernel` is evaluated by it; any other by its methods, between the same products, which
    inside `use_backend("triton")` is refused.

    Methods take x (*, I, R), float32 or float64, I features by R positions, and the basis's tensors (as knots, one row
    a feature), and give one function a slice along a new axis: (*, I, K, R). With gradients enabled they must be
    differentiable, once more than is asked of the layer; without, they may work in place.
    """

    kinds: ClassVar[dict[str, type["Basis"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Basis.kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        # An operator's arguments are tensors, numbers and strings: a basis travels as text, which export can store.
        object.__setattr__(self, "spec", json.dumps({"basis": type(self).__name__, **asdict(self)}))

    spec: ClassVar[str]
    """The basis as JSON; set on each instance."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of functions K."""

    @property
    def num_tensors(self) -> int:
        """How many tensors the functions depend on, besides x."""
        return 0

    @property
    def kernel(self) -> KernelForm | None:
        """What `_basis_triton.py` calls it, or None."""
        return None

    @property
    @abstractmethod
    def flops(self) -> tuple[int, int]:
        """FLOPs an input of `values`, and of `values_and_slopes`."""

    @abstractmethod
    def values(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The K functions at x."""

    @abstractmethod
    def values_and_slopes(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The K functions at x and their derivatives by x, which share most of their work."""

    def pullback(self, x: Tensor, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Values at x; then grad (*, I, K, R) pulled back to x, and to the first tensors if the basis learns them.

        With gradients off it may overwrite grad.
        """
        values, slopes = self.values_and_slopes(x, *tensors)
        weighted = slopes * grad if torch.is_grad_enabled() else slopes.mul_(grad)
        return values, weighted.sum(-2)


@lru_cache(maxsize=256)
def parse(terms: str) -> tuple[Basis, ...]:
    """The bases of a JSON list of them."""
    return tuple(Basis.kinds[fields.pop("basis")](**fields) for fields in json.loads(terms))


def split(bases: Sequence[Basis], tensors: Sequence[Any]) -> list[Sequence[Any]]:
    """Deals out the flat list of tensors to the terms."""
    ends = [sum(b.num_tensors for b in bases[: i + 1]) for i in range(len(bases))]
    return [tensors[end - b.num_tensors : end] for b, end in zip(bases, ends, strict=True)]


def widen(dtype: torch.dtype) -> torch.dtype:
    """The dtype functions are evaluated and sums are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a GEMM's operands. CPUs multiply float32 about as fast as bf16; elsewhere the weight decides."""
    return widen(weight.dtype) if weight.device.type == "cpu" else weight.dtype


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where a and b may be narrower than total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _blocks(x: Tensor, functions: int) -> Iterator[slice]:
    """Row slices whose basis fits the block, as even as can be: a last block of a few rows costs as many calls."""
    rows, features = x.shape
    budget = _CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    most = max(_MIN_ROWS, budget // max(1, widen(x.dtype).itemsize * features * functions))
    step = -(-rows // -(-rows // most)) if rows else 1
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _columns(x: Tensor, single: bool) -> Tensor:
    """Rows (R, I) as (I, R). With one function an input a view serves as well, and nothing is transposed."""
    block = x.t().to(widen(x.dtype))
    return block if single else block.contiguous()


def basis_linear_reference(
    x: Tensor, terms: Sequence[tuple[Basis, Tensor, *tuple[Tensor, ...]]], bias: Tensor | None = None
) -> Tensor:
    """The definition, in plain torch: the whole basis, (N, I·K), then one linear map a term."""
    y: Tensor | float = 0.0 if bias is None else bias
    for basis, weight, *tensors in terms:
        values = basis.values(x.to(widen(x.dtype)).unsqueeze(-1), *tensors).squeeze(-1)  # (*, I, K)
        y = y + F.linear(values.flatten(-2), weight.flatten(1).to(values.dtype))
    assert isinstance(y, Tensor), "no terms"
    return y.to(x.dtype)


@without_autocast
@torch.no_grad()
def _forward(
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    tensors: list[Tensor],
    terms: str,
    triton: bool,  # no default: with lists of tensors, torch 2.11 miscounts the gradients of what a graph leaves out
) -> Tensor:
    """x (N, I), one weight (O, I, K) a term -> (N, O) in the weights' dtype. `terms` is a JSON list of bases."""
    bases, product = parse(terms), product_dtype(weights[0])
    if triton:
        from archzoo.kernels import _basis_linear_triton

        return _basis_linear_triton.forward(x, weights, bias, tensors, bases)
    outputs = weights[0].shape[0]
    y = x.new_empty(x.shape[0], outputs, dtype=weights[0].dtype)
    matrices = [w.reshape(outputs, -1).to(product) for w in weights]
    functions = max(b.size for b in bases)
    for rows in _blocks(x, functions):
        block = _columns(x[rows], functions == 1)  # (I, R)
        # (O, R), not (R, O): a product by few columns is up to 20 times slower than one by few rows.
        total = torch.zeros(outputs, block.shape[1], dtype=widen(product), device=y.device)
        if bias is not None:
            total += bias.unsqueeze(1)
        for basis, matrix, own in zip(bases, matrices, split(bases, tensors), strict=True):
            values = basis.values(block, *own).flatten(0, 1).to(product)  # (I·K, R)
            _accumulate(total, matrix, values)
        y[rows] = total.t()
    return y


@without_autocast
@torch.no_grad()
def _gradients(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    tensors: list[Tensor],
    terms: str,
    needs: list[bool],
    triton: bool,
) -> list[Tensor]:
    """Gradients by x, each weight and each tensor, in this order; only those that `needs` asks for."""
    bases, product = parse(terms), product_dtype(weights[0])
    if triton:
        from archzoo.kernels import _basis_linear_triton

        return _basis_linear_triton.backward(grad, x, weights, tensors, bases, needs)
    needs_x, needs_weights, needs_tensors = needs[0], needs[1 : 1 + len(bases)], split(bases, needs[1 + len(bases) :])
    x_grad = torch.empty(x.shape if needs_x else 0, dtype=x.dtype, device=x.device)
    weight_grads = [
        torch.zeros(w.shape if need else (0, 0, 0), dtype=widen(product), device=w.device).flatten(1)
        for w, need in zip(weights, needs_weights, strict=True)
    ]
    tensor_grads = [torch.zeros_like(t, dtype=widen(t.dtype)) for t in tensors]
    matrices = [w.reshape(w.shape[0], -1).to(product) for w in weights]
    functions = max(b.size for b in bases)
    for rows in _blocks(x, functions):
        block = _columns(x[rows], functions == 1)  # (I, R)
        above = grad[rows].t().to(product)  # (O, R)
        below: Tensor | None = None
        for term, (basis, matrix, own, own_grads) in enumerate(
            zip(bases, matrices, split(bases, tensors), split(bases, tensor_grads), strict=True)
        ):
            if needs_x or any(needs_tensors[term]):
                if functions == 1:
                    values_grad = (above.t() @ matrix).t().to(block.dtype).unsqueeze(1)
                else:
                    values_grad = (matrix.t() @ above).to(block.dtype).view(-1, basis.size, block.shape[1])
                values, own_below, *pulled = basis.pullback(block, values_grad, *own)
                below = own_below if below is None else below.add_(own_below)
                for total, part in zip(own_grads, pulled, strict=False):
                    total += part
            else:
                values = basis.values(block, *own)
            if needs_weights[term]:
                _accumulate(weight_grads[term], above, values.flatten(0, 1).to(product).t())
        if needs_x and below is not None:
            x_grad[rows] = below.t()
    inputs, grads = [x, *weights, *tensors], [x_grad, *weight_grads, *tensor_grads]
    return [g.view(t.shape).to(t.dtype) for g, t, need in zip(grads, inputs, needs, strict=True) if need]


basis_linear_op = torch.library.custom_op("archzoo::basis_linear", mutates_args=())(_forward)
basis_linear_backward_op = torch.library.custom_op("archzoo::basis_linear_backward", mutates_args=())(_gradients)


@basis_linear_op.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    tensors: list[Tensor],
    terms: str,
    triton: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], weights[0].shape[0], dtype=weights[0].dtype)


@basis_linear_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    tensors: list[Tensor],
    terms: str,
    needs: list[bool],
    triton: bool,
) -> list[Tensor]:
    inputs = [x, *weights, *tensors]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, need in zip(inputs, needs, strict=True)
        if need
    ]


@without_autocast
def _differentiable_backward(
    grad: Tensor, x: Tensor, weights: list[Tensor], tensors: list[Tensor], terms: str, needs: list[bool]
) -> list[Tensor]:
    """What `basis_linear_backward_op` computes, in torch that can be differentiated again."""
    bases = parse(terms)
    block, above = x.t().to(widen(x.dtype)), grad.t().to(widen(weights[0].dtype))
    x_grad, weight_grads, tensor_grads = torch.zeros_like(block), [], []
    for basis, weight, own in zip(bases, weights, split(bases, tensors), strict=True):
        values_grad = (weight.flatten(1).to(above.dtype).t() @ above).to(block.dtype)
        values, below, *pulled = basis.pullback(block, values_grad.view(-1, basis.size, block.shape[1]), *own)
        x_grad = x_grad + below
        weight_grads.append((above @ values.flatten(0, 1).to(above.dtype).t()).view(weight.shape))
        tensor_grads += [*pulled, *own][: basis.num_tensors]
    grads, inputs = [x_grad.t(), *weight_grads, *tensor_grads], [x, *weights, *tensors]
    return [g.to(t.dtype) for g, t, need in zip(grads, inputs, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, _, tensors, ctx.terms, ctx.triton = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(x, *weights, *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    count = ctx.count
    x_need, weight_needs, bias_need, tensor_needs, *_ = ctx.needs_input_grad
    needs = [x_need, *weight_needs, *tensor_needs]
    x_grad, *grads = _any_gradients(ctx, grad, x, rest, needs, basis_linear_backward_op)
    return x_grad, grads[:count], grad.sum(0) if bias_need else None, grads[count:], None, None


def _any_gradients(
    ctx: Any, grad: Tensor, x: Tensor, rest: list[Tensor], needs: list[bool], opaque: Any
) -> list[Tensor | None]:
    """Gradients by x and the rest, None where not needed."""
    args = grad, x, rest[: ctx.count], rest[ctx.count :], ctx.terms, needs
    # With create_graph=True the gradients are themselves differentiated, which an opaque operator cannot be.
    if torch.is_grad_enabled():
        refuse_triton("basis_linear", "a gradient of a gradient")
        found = iter(_differentiable_backward(*args))
    else:
        found = iter(opaque(*args, ctx.triton))
    return [next(found) if need else None for need in needs]


basis_linear_op.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The operator without the dispatcher, whose price a small layer feels."""

    @staticmethod
    def forward(
        ctx: Any, terms: str, triton: bool, count: int, bias: Tensor | None, x: Tensor, *rest: Tensor
    ) -> Tensor:
        ctx.terms, ctx.triton, ctx.count = terms, triton, count
        ctx.save_for_backward(x, *rest)
        return _forward(x, list(rest[:count]), bias, list(rest[count:]), terms, triton)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        _, _, _, bias_need, *needs = ctx.needs_input_grad
        grads = _any_gradients(ctx, grad, x, rest, needs, _gradients)
        return None, None, None, grad.sum(0) if bias_need else None, *grads


@flop_formula(torch.ops.archzoo.basis_linear)
def _flops(
    x: Sequence[int], weights: Sequence[Sequence[int]], bias: Any, tensors: Any, terms: str, *args: Any, **kwargs: Any
) -> int:
    rows, features = x
    return sum(
        rows * features * (basis.flops[0] + 2 * weight[0] * weight[2])
        for basis, weight in zip(parse(terms), weights, strict=True)
    )


@flop_formula(torch.ops.archzoo.basis_linear_backward)
def _backward_flops(
    grad: Any,
    x: Sequence[int],
    weights: Sequence[Sequence[int]],
    tensors: Any,
    terms: str,
    needs: list[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    rows, features = x
    bases, total = parse(terms), 0
    learned = split(bases, needs[1 + len(bases) :])
    for basis, weight, need, own_needs in zip(bases, weights, needs[1:], learned, strict=False):
        gemm, pulled = 2 * weight[0] * weight[2], needs[0] or any(own_needs)
        total += gemm * need + (basis.flops[1] + 2 * weight[2] + gemm if pulled else basis.flops[0])
    return rows * features * total


def takes_kernels(
    op: str, x: Tensor, terms: Sequence[tuple[Basis, Tensor, *tuple[Tensor, ...]]], bias: Tensor | None
) -> bool:
    """As `takes_triton`, of an op on terms; insisting on Triton, a RuntimeError of a basis that has no kernel."""
    if not wants_triton(x):
        return False
    named = {f"tensor {m} of term {n}": t for n, (_, *all_of_it) in enumerate(terms) for m, t in enumerate(all_of_it)}
    for basis, *_ in terms:
        if basis.kernel is None:
            refuse_triton(op, f"the basis {type(basis).__name__}")
    kernel = terms[0][0].kernel
    return takes_triton(op if kernel is None else f"{op}:{kernel.kind}", x=x, bias=bias, **named)


def basis_linear(
    x: Tensor, terms: Sequence[tuple[Basis, Tensor, *tuple[Tensor, ...]]], bias: Tensor | None = None
) -> Tensor:
    r"""Sum of terms $\sum_{i,j} w_{oij} B_j(x_i)$ plus a bias.

    The functions are evaluated in at least float32; only their product with the weights may be narrower, and it is
    summed in float32. Under autocast the result has autocast's dtype, as that of `nn.Linear`; otherwise x's.
    Differentiable any number of times; the second time on, in plain torch that keeps what it computes.

    Args:
        x: (*, I), any floating dtype.
        terms: For each term its basis, its weight (O, I, K), and the basis's tensors, if it has any.
        bias: (O,) or None.

    Returns:
        (*, O).

    Raises:
        ValueError: If shapes or dtypes do not fit; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform, or of a basis without a kernel.
    """
    outputs, features = terms[0][1].shape[:2]
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(f"x has shape {tuple(x.shape)}, but its last dimension must be in_features={features}")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; it must be floating point, as the weight ({terms[0][1].dtype})")
    for basis, weight, *own in terms:
        if tuple(weight.shape) != (outputs, features, basis.size) or len(own) != basis.num_tensors:
            raise ValueError(
                f"the term of {basis} has weight {tuple(weight.shape)} and {len(own)} tensors; "
                f"it needs ({outputs}, {features}, {basis.size}) and {basis.num_tensors}"
            )
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({outputs},)")
    if under_transform():
        refuse_triton("basis_linear", "a torch.func transform")
        return basis_linear_reference(x, terms, bias)
    triton = takes_kernels("basis_linear", x, terms, bias)
    # Under autocast the weights are narrowed, as nn.Linear's are; x is not, since the functions need its digits.
    narrow, dtype = autocast_dtype(x), terms[0][1].dtype
    dtype = narrow if narrow.itemsize < dtype.itemsize else torch.promote_types(narrow, dtype)
    rows, weights = x.reshape(-1, features), [term[1].to(dtype) for term in terms]
    tensors = [tensor for term in terms for tensor in term[2:]]
    text = "[" + ", ".join(term[0].spec for term in terms) + "]"
    bias = None if bias is None else bias.to(dtype)
    if plain_eager(x):
        y = _Eager.apply(text, triton, len(weights), bias, rows, *weights, *tensors)
    else:
        y = basis_linear_op(rows, weights, bias, tensors, text, triton)
    return y.to(narrow).reshape(*x.shape[:-1], outputs)
