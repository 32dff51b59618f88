"""The library of functions that an edge of a KAN may carry as a formula."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from archzoo.layers._kan import _check_whole
from archzoo.names import suggest

Affine = tuple[float, float, float, float]  # a, b, c, d of c f(a x + b) + d


@dataclass(frozen=True)
class Function:
    """A function that an edge may carry, as c f(a x + b) + d."""

    name: str
    torch: Callable[[Tensor], Tensor]
    """Elementwise, differentiable."""
    sympy: Callable[[Any], Any]
    """The same of a sympy expression."""
    complexity: int
    """What it costs in a ranking, from 0."""
    domain: tuple[float, float] = (-math.inf, math.inf)
    """Where the argument a x + b of a fit must stay, on the whole range of its samples."""
    freedom: int = 4
    """How many of a, b, c, d are free; the others only say the same function in another way."""
    canonical: Callable[[float, float, float, float], Affine] | None = None
    """Among the (a, b, c, d) of the same function, the one to report."""
    solve: Callable[[Tensor, Tensor], tuple[float, float]] | None = None
    """Best (a, b) for samples x, y (N,), if it needs no search."""


def _sympy() -> Any:
    try:
        import sympy
    except ImportError as error:
        raise ImportError("formulas need sympy: pip install 'archzoo[interpret]'") from error
    return sympy


def _named(name: str) -> Callable[[Any], Any]:
    return lambda u: getattr(_sympy(), name)(u)


def _raised(numerator: int, denominator: int = 1) -> Callable[[Any], Any]:
    return lambda u: u ** _sympy().Rational(numerator, denominator)


def _homogeneous(power: float, parity: int = 0) -> Callable[[float, float, float, float], Affine]:
    """For f(k u) = k^power f(u), k > 0, and f(-u) = parity f(u): a = 1, or +-1 where there is no parity."""

    def canonical(a: float, b: float, c: float, d: float) -> Affine:
        scale, sign = abs(a), math.copysign(1.0, a)
        b, c = b / scale, c * scale**power
        return (1.0, sign * b, c * parity if sign < 0 else c, d) if parity else (sign, b, c, d)

    return canonical


def _positive_slope(parity: int, period: float = math.inf) -> Callable[[float, float, float, float], Affine]:
    """For f(-u) = parity f(u) and f(u + period) = -f(u): a > 0 and |b| <= period / 2."""

    def canonical(a: float, b: float, c: float, d: float) -> Affine:
        if a < 0:
            a, b, c = -a, -b, parity * c
        turns = round(b / period)
        return a, b - turns * period if turns else b, -c if turns % 2 else c, d

    return canonical


def _canonical_log(a: float, b: float, c: float, d: float) -> Affine:
    return math.copysign(1.0, a), b / abs(a), c, d + c * math.log(abs(a))


def _canonical_arccos(a: float, b: float, c: float, d: float) -> Affine:
    return (-a, -b, -c, d + math.pi * c) if a < 0 else (a, b, c, d)


def _sign(u: Tensor) -> Tensor:
    return torch.where(u.isnan(), u, u.sign())  # torch.sign hides NaN as 0


def _best_step(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Where a step through samples must lie: of all gaps between them, the one that leaves least variance."""
    x, order = x.sort()
    y = y[order] - y.mean()
    left = torch.arange(1, len(x), dtype=x.dtype)
    explained = y.cumsum(0)[:-1].square() * (1 / left + 1 / left.flip(0))
    at = int(explained.where(x[1:] > x[:-1], -1.0).argmax())
    return 1.0, -float(x[at] + x[at + 1]) / 2


def _library() -> Iterable[Function]:
    real, positive, unit = (-math.inf, math.inf), (0.0, math.inf), (-1.0, 1.0)

    def power(
        name: str, torch_fn: Callable[[Tensor], Tensor], n: float, complexity: int, sympy_fn: Callable[[Any], Any]
    ) -> Function:
        whole = n == int(n)
        # 1 / u^n is odd or even: the half u > 0 holds all its fits that have no pole among the samples.
        domain = real if whole and n > 0 else positive
        return Function(
            name, torch_fn, sympy_fn, complexity, domain, 3, _homogeneous(n, (-1) ** int(n) if whole else 0)
        )

    def linear(a: float, b: float, c: float, d: float) -> Affine:
        return 1.0, 0.0, c * a, d + c * b

    def constant(a: float, b: float, c: float, d: float) -> Affine:
        return 1.0, 0.0, 0.0, d

    def exponential(a: float, b: float, c: float, d: float) -> Affine:
        return a, 0.0, c * math.exp(b), d

    def of_itself(x: Tensor, y: Tensor) -> tuple[float, float]:
        return 1.0, 0.0

    odd, even = _positive_slope(-1), _positive_slope(1)
    half_pi = math.pi / 2
    yield Function("0", torch.zeros_like, lambda u: _sympy().Integer(0), 0, real, 1, constant, of_itself)
    yield Function("x", lambda u: u, lambda u: u, 1, real, 2, linear, of_itself)
    yield power("x^2", lambda u: u * u, 2, 2, _raised(2))
    yield power("x^3", lambda u: u * u * u, 3, 3, _raised(3))
    yield power("x^4", lambda u: (u * u).square(), 4, 3, _raised(4))
    yield power("x^5", lambda u: (u * u).square() * u, 5, 3, _raised(5))
    yield power("1/x", lambda u: 1 / u, -1, 2, _raised(-1))
    yield power("1/x^2", lambda u: 1 / (u * u), -2, 2, _raised(-2))
    yield power("1/x^3", lambda u: 1 / (u * u * u), -3, 3, _raised(-3))
    yield power("1/x^4", lambda u: 1 / (u * u).square(), -4, 4, _raised(-4))
    yield power("1/x^5", lambda u: 1 / ((u * u).square() * u), -5, 5, _raised(-5))
    yield power("sqrt", torch.sqrt, 0.5, 2, _raised(1, 2))
    yield power("x^1.5", lambda u: u * u.sqrt(), 1.5, 4, _raised(3, 2))
    yield power("1/sqrt", torch.rsqrt, -0.5, 2, _raised(-1, 2))
    yield Function("exp", torch.exp, _named("exp"), 2, real, 3, exponential)
    yield Function("log", torch.log, _named("log"), 2, positive, 3, _canonical_log)
    yield Function("abs", torch.abs, _named("Abs"), 3, real, 3, _homogeneous(1, 1))
    yield Function("sin", torch.sin, _named("sin"), 2, real, 4, _positive_slope(-1, math.pi))
    yield Function("cos", torch.cos, _named("cos"), 2, real, 4, _positive_slope(1, math.pi))
    yield Function("tan", torch.tan, _named("tan"), 3, (-half_pi, half_pi), 4, odd)
    yield Function("tanh", torch.tanh, _named("tanh"), 3, real, 4, odd)
    yield Function("sgn", _sign, _named("sign"), 3, real, 3, _homogeneous(0, -1), _best_step)
    yield Function("arcsin", torch.asin, _named("asin"), 4, unit, 4, odd)
    yield Function("arccos", torch.acos, _named("acos"), 4, unit, 4, _canonical_arccos)
    yield Function("arctan", torch.atan, _named("atan"), 4, real, 4, odd)
    yield Function("arctanh", torch.atanh, _named("atanh"), 4, unit, 4, odd)
    yield Function("exp(-x^2)", lambda u: torch.exp(-u * u), lambda u: _sympy().exp(-(u**2)), 3, real, 4, even)


FUNCTIONS: dict[str, Function] = {function.name: function for function in _library()}
"""The library, by name. The order is part of the format of saved layers; `add_function` appends."""

_BUILTIN = len(FUNCTIONS)


def add_function(
    name: str,
    torch_fn: Callable[[Tensor], Tensor],
    sympy_fn: Callable[[Any], Any],
    complexity: int,
    *,
    domain: tuple[float, float] = (-math.inf, math.inf),
) -> None:
    """Adds a function to the library. A layer that holds it loads only where it has been added under the same name.

    Args:
        name: A new name, without spaces.
        torch_fn: Elementwise, differentiable; NaN or infinite where it is not defined.
        sympy_fn: The same of a sympy expression.
        complexity: What it costs in a ranking, from 0; the library's run from 0 to 5.
        domain: Ends of an interval that the argument of a fit must not leave between two samples either.

    Raises:
        ValueError: If the name is taken or malformed, a function cannot be called, or `torch_fn` changes the shape.
    """
    if not isinstance(name, str) or not name or not name.isprintable() or " " in name:
        raise ValueError(f"name={name!r}: must be a string of printable characters without spaces")
    if name in FUNCTIONS:
        raise ValueError(f"name={name!r} is taken; choose another")
    for argument, value in (("torch_fn", torch_fn), ("sympy_fn", sympy_fn)):
        if not callable(value):
            raise ValueError(f"{argument}={value!r}: must be a function of one argument")
    _check_whole(0, complexity=complexity)
    low, high = domain
    if not low < high:
        raise ValueError(f"domain={domain}: must be the two ends of an interval, the lower one first")
    probe = torch.tensor([0.25, 0.75], dtype=torch.float64)
    result = torch_fn(probe)
    if not isinstance(result, Tensor) or result.shape != probe.shape:
        raise ValueError(f"torch_fn={torch_fn!r}: must be elementwise, a tensor of the same shape for any tensor")
    FUNCTIONS[name] = Function(name, torch_fn, sympy_fn, complexity, (float(low), float(high)))


def _function(name: str, argument: str = "name") -> Function:
    if name not in FUNCTIONS:
        raise ValueError(f"{argument}={name!r} is not in the library; {suggest(str(name), list(FUNCTIONS))}")
    return FUNCTIONS[name]
