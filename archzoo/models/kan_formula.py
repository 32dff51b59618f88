"""The formula of a `KAN` whose edges are all symbolic, and that formula as a function of tensors and arrays."""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.layers._kan import _check_whole
from archzoo.models.symbolic import FUNCTIONS, round_formula

_TORCH: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp", "log", "sign")},
    **{name: getattr(torch, name) for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh", "erf", "erfc")},
    "Abs": torch.abs,
    "Max": lambda *args: functools.reduce(torch.maximum, map(torch.as_tensor, args)),
    "Min": lambda *args: functools.reduce(torch.minimum, map(torch.as_tensor, args)),
}
"""sympy's functions in torch."""


@dataclass(frozen=True)
class Formula:
    """Expressions of a model's outputs, to be called as the model is: (*, inputs) -> (*, outputs).

    Takes a tensor, and is differentiable then, or a numpy array, which it evaluates in float64.
    """

    expressions: tuple[Any, ...]
    """One for each output, of sympy."""
    inputs: tuple[Any, ...]
    """Symbols of all inputs of the model, also of those that the expressions do not use."""
    rmse: float | None = None
    """Root mean square of formula - model over samples and outputs, where they were compared."""
    max_error: float | None = None
    """The largest |formula - model|."""

    def __call__(self, x: Any) -> Any:
        """Values (*, outputs) at x (*, inputs)."""
        if not isinstance(x, Tensor):
            return self(torch.as_tensor(x, dtype=torch.float64)).numpy()
        if x.ndim == 0 or x.shape[-1] != len(self.inputs):
            raise ValueError(f"x has shape {tuple(x.shape)}, but its last dimension must be {len(self.inputs)}")
        known = dict(zip(self.inputs, x.unbind(-1), strict=True))
        return torch.stack([torch.zeros_like(x[..., 0]) + _value(e, known) for e in self.expressions], -1)

    @torch.no_grad()
    def compared(self, model: nn.Module, x: Tensor) -> "Formula":
        """The same, with `rmse` and `max_error` against a model's outputs at x (*, inputs)."""
        error = (self(x) - model(x)).double()
        return replace(self, rmse=float(error.square().mean().sqrt()), max_error=float(error.abs().max()))


def _value(e: Any, known: dict[Any, Any]) -> Any:
    """Value of an expression, a tensor or a number; `known` has those of its parts, and takes more."""
    if e in known:
        return known[e]
    if not e.free_symbols:
        value: Any
        try:
            value = int(e) if e.is_Integer else float(e)
        except TypeError:  # complex or infinite: the model is NaN there
            value = math.nan
    else:
        parts = [_value(part, known) for part in e.args]
        if e.is_Add:
            value = functools.reduce(operator.add, parts)
        elif e.is_Mul:
            value = functools.reduce(operator.mul, parts)
        elif e.is_Pow:
            value = parts[0] ** parts[1]
        else:
            value = _torch_function(type(e).__name__)(*parts)
    known[e] = value
    return value


def _torch_function(name: str) -> Callable[..., Tensor]:
    if name in _TORCH:
        return _TORCH[name]
    if name in FUNCTIONS:  # added with `sympy.Function(name)`
        return FUNCTIONS[name].torch
    raise ValueError(
        f"expressions: there is {name}, of which no torch function is known here; known are {', '.join(_TORCH)}, and "
        "functions added by `add_function(name, torch_fn, sympy.Function(name), complexity)`"
    )


def build_formula(
    model: Any, inputs: Sequence[Any] | None, simplify: bool, digits: int | None, tolerance: float | None
) -> Formula:
    """The formula of a `KAN`; see `KAN.formula` for the arguments, and for the ValueError."""
    import sympy

    numeric = model.numeric_edges()
    if numeric:
        raise ValueError(
            f"edges {', '.join(map(str, numeric))} as (l, o, i) are splines, which have no formula: make them formulas "
            "by auto_symbolic (with a lower r2_threshold) or fix_symbolic, or prune them"
        )
    if digits is not None:
        _check_whole(1, digits=digits)
    symbols = _symbols(inputs, model.in_features)
    # As numbers that are known to be real: of others, sympy may ask for hours whether a nested function is.
    real = [s if s.is_real else sympy.Symbol(s.name, real=True) for s in symbols]
    values: list[Any] = [real[i] for i in model.input_index]
    for block in model.blocks:
        sums = [block.symbolic.formula(o, values) if block.symbolic else 0 for o in range(len(block.subnode_bias))]
        if block.edges.bias is not None:
            sums = [total + _number(b) for total, b in zip(sums, block.edges.bias.tolist(), strict=True)]
        subnodes = iter(_affine(sums, block.subnode_scale, block.subnode_bias))
        products = [math.prod(itertools.islice(subnodes, arity)) for arity in block.arity.tolist()]
        values = _affine(products, block.node_scale, block.node_bias)
    values = list(map(sympy.sympify, values))
    if tolerance is not None:
        values = [round_formula(value, tolerance) for value in values]
    if simplify:
        values = [sympy.simplify(value) for value in values]
    if digits is not None:
        values = [e.xreplace({v: _number(float(f"{v:.{digits}g}")) for v in e.atoms(sympy.Float)}) for e in values]
    named = dict(zip(real, symbols, strict=True))
    with sympy.evaluate(False):  # or it would ask now
        return Formula(tuple(e.xreplace(named) for e in values), symbols)


def _symbols(inputs: Sequence[Any] | None, count: int) -> tuple[Any, ...]:
    import sympy

    names = [f"x{i}" for i in range(count)] if inputs is None else list(inputs)
    symbols = tuple(sympy.Symbol(name) if isinstance(name, str) else name for name in names)
    if len(symbols) != count or len(set(symbols)) != count or not all(isinstance(s, sympy.Symbol) for s in symbols):
        raise ValueError(f"inputs={inputs!r}: must be {count} different names or sympy symbols, one for each input")
    return symbols


def _affine(values: Sequence[Any], scale: Tensor, bias: Tensor) -> list[Any]:
    return [_number(s) * v + _number(b) for v, s, b in zip(values, scale.tolist(), bias.tolist(), strict=True)]


def _number(value: float) -> Any:
    """As sympy's; whole numbers as such, of which 0 and 1 leave no trace."""
    import sympy

    return sympy.Integer(int(value)) if value == int(value) and abs(value) < 2**53 else sympy.Float(value)
