"""Simple numbers in place of fitted ones, in a formula."""

import math
from itertools import product
from typing import Any

from archzoo.models.symbolic_functions import _sympy

_TERMS = 200  # that a power may expand to
_LARGEST = 0.1  # that a number may be moved by
_DENOMINATOR = 12


def round_formula(expr: Any, tolerance: float = 1e-3) -> Any:
    """A formula with simple numbers in place of fitted ones, where they differ by no more than a tolerance.

    First, what is only a matter of notation is settled: factors move out of a sum's logarithm, power or absolute value,
    constants out of an exponent, powers of sums are multiplied out or not, whatever leaves the fewest numbers that are
    not simple. Then a number v becomes a fraction, or one of pi, 1/pi, sqrt(2), sqrt(3), if it lies within tolerance
    max(1, |v|), at most 0.1, of one: smaller denominators first, none above sqrt(0.1 / tolerance) or 12, so that
    a number without meaning is seldom near one.

    Args:
        expr: A sympy expression.
        tolerance: How far a number may be moved, as said above; positive, at most 0.1.

    Returns:
        A sympy expression. Numbers with no simple one nearby stay floats: `expr.atoms(sympy.Float)` lists them.

    Raises:
        ImportError: Without sympy.
        ValueError: If the tolerance is out of range.
    """
    sympy = _sympy()
    if not 0 < tolerance <= _LARGEST:
        raise ValueError(f"tolerance={tolerance}: must be positive, at most {_LARGEST}")
    expr = sympy.sympify(expr)

    def length(candidate: Any) -> tuple[int, int]:
        floats = sum(isinstance(part, sympy.Float) for part in sympy.preorder_traversal(candidate))
        return floats, int(candidate.count_ops())

    ways = product((False, True), repeat=2)
    return min((_Rounding(sympy, tolerance, *way).rounded(expr) for way in ways), key=length)


class _Rounding:
    """One way to write a formula: whether powers of sums are multiplied out, and factors moved out of functions."""

    def __init__(self, sympy: Any, tolerance: float, expand: bool, scale: bool):
        self.sympy, self.tolerance, self.expand, self.scale = sympy, tolerance, expand, scale
        self.held: dict[Any, Any] = {}  # a symbol for every function that has been dealt with

    def rounded(self, expr: Any) -> Any:
        return self._shown(self._round(self._polynomial(expr)))

    def _shown(self, expr: Any) -> Any:
        return expr.xreplace(self.held)

    def _hold(self, function: Any) -> Any:
        """A symbol in the function's place, so that multiplying out leaves it alone; the same for the same."""
        function = self._shown(function)
        for symbol, other in self.held.items():
            if other == function:
                return symbol
        if not function.free_symbols:
            return function
        symbol = self.sympy.Dummy()
        self.held[symbol] = function
        return symbol

    def _polynomial(self, expr: Any) -> Any:
        """Multiplied out in symbols: those of the formula, and those that hold its functions, rounded already."""
        return self.sympy.expand(self._tree(expr), log=False, power_base=False, power_exp=False)

    def _tree(self, expr: Any) -> Any:
        sympy = self.sympy
        if expr.is_Atom:
            return expr
        if expr.is_Add or expr.is_Mul:
            return expr.func(*map(self._tree, expr.args))
        if expr.is_Pow and expr.exp.is_number and expr.base != sympy.E:
            base, power = self._polynomial(expr.base), self._number(expr.exp)
            if power.is_Integer and power > 0:
                terms = len(sympy.Add.make_args(base))
                if terms == 1 or (self.expand and math.comb(terms + int(power) - 1, int(power)) <= _TERMS):
                    return base**power
            factor, rest = self._scaled(base)
            return factor**power * self._hold(rest**power)
        if isinstance(expr, sympy.exp):
            argument = self._polynomial(expr.args[0])
            constant, rest = argument.as_independent(*argument.free_symbols, as_Add=True)
            if self.scale and constant.has(sympy.Float):
                return sympy.exp(constant) * self._hold(sympy.exp(self._round(rest)))
            return self._hold(sympy.exp(self._round(argument)))
        if isinstance(expr, (sympy.log, sympy.Abs, sympy.sign)):
            factor, rest = self._scaled(self._polynomial(expr.args[0]))
            function = self._hold(expr.func(rest))
            if isinstance(expr, sympy.log):
                return sympy.log(factor) + function
            return factor * function if isinstance(expr, sympy.Abs) else function
        # An argument that is no expression, as the conditions of Piecewise, is left as it is.
        args = (self._round(self._polynomial(arg)) if isinstance(arg, sympy.Expr) else arg for arg in expr.args)
        return self._hold(expr.func(*args))

    def _scaled(self, expr: Any) -> tuple[Any, Any]:
        """(k, expr / k rounded): k > 0 makes some term's factor 1 or -1, and all simple if it can; or k = 1."""
        sympy = self.sympy
        found = {abs(self._factor(term)[0]) for term in sympy.Add.make_args(expr) if term.free_symbols}
        factors = sorted(found, reverse=True)
        if not expr.has(sympy.Float) or not factors:
            return sympy.Integer(1), self._round(expr)
        # Small factors would be rounded to 0, but such a function has no natural unit to call them small in.
        if not self.scale and factors[0] > 0.1:
            return sympy.Integer(1), self._round(expr)
        forms = [(factor, self._round(sympy.expand(expr / factor))) for factor in factors[:4]]
        return next((form for form in forms if not form[1].has(sympy.Float)), forms[0])

    def _factor(self, term: Any) -> tuple[Any, Any]:
        if not term.free_symbols:
            return term, self.sympy.Integer(1)
        return term.as_independent(*term.free_symbols, as_Add=False)

    def _round(self, expr: Any) -> Any:
        """The factor of each term rounded."""
        terms = map(self._factor, self.sympy.Add.make_args(expr))
        return self.sympy.Add(*(self._number(factor) * rest for factor, rest in terms))

    def _number(self, value: Any) -> Any:
        sympy = self.sympy
        if not value.has(sympy.Float) or not value.is_real:
            return value
        v = float(value)
        allowed = min(self.tolerance * max(1.0, abs(v)), _LARGEST)
        if abs(v) <= allowed:
            return sympy.Integer(0)
        most = max(1, min(_DENOMINATOR, int(math.sqrt(0.1 / allowed))))
        # The rarer a unit is in formulas, the simpler the fraction has to be. The least total goes first.
        units = [(0.0, most, sympy.Integer(1)), (1.5, most, sympy.pi)]
        units += [(3.5, min(2, most), unit) for unit in (1 / sympy.pi, sympy.sqrt(2), sympy.sqrt(3))]
        simple = [(q + cost, q, cost > 2, unit) for cost, largest, unit in units for q in range(1, largest + 1)]
        for _, denominator, rare, unit in sorted(simple, key=lambda choice: choice[0]):
            numerator = round(v / float(unit) * denominator)
            near = abs(numerator * float(unit) / denominator - v) <= allowed
            if near and numerator and not (rare and abs(numerator) > 3):
                return unit * sympy.Rational(numerator, denominator)
        return sympy.Float(v)
