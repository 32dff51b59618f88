"""What of a `KAN` has to do with formulas: splines become functions that have a name."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from archzoo.models.kan_block import KANBlock
from archzoo.models.kan_formula import Formula, build_formula
from archzoo.models.symbolic import FUNCTIONS, Fit, fit_function, suggest_functions


class FixedEdge(NamedTuple):
    """An edge that was made a formula, and how well it fits."""

    block: int
    output: int
    input: int
    fit: Fit


class SymbolicMethods(nn.Module):
    """The part of `KAN` that makes edges formulas, and reads the formula of the whole."""

    # Of `KAN` itself:
    blocks: Sequence[KANBlock]
    _samples: Callable[[Tensor, int], list[Tensor]]

    @torch.no_grad()
    def suggest_symbolic(
        self,
        l: int,  # noqa: E741  # the paper's letter
        o: int,
        i: int,
        x: Tensor,
        names: Sequence[str] | None = None,
        weight: float = 0.2,
        top: int | None = 5,
    ) -> list[Fit]:
        """Functions c f(a x + b) + d for an edge, the best one first.

        Args:
            l: Which block.
            o: Which of its subnodes.
            i: Which of its inputs.
            x: (*, inputs), samples of the model's inputs on which the edge is looked at.
            names: Of `archzoo.models.symbolic.FUNCTIONS`; None for all.
            weight: Of simplicity, from 0 to 1, against closeness.
            top: How many; None for all.

        Raises:
            ValueError: If there is no such edge, it is pruned, or an argument is out of range.
        """
        return suggest_functions(*self._edge_data(l, o, i, x), names=names, weight=weight, top=top)

    @torch.no_grad()
    def fix_symbolic(
        self,
        l: int,  # noqa: E741
        o: int,
        i: int,
        name: str,
        x: Tensor | None = None,
        affine: tuple[float, float, float, float] | None = None,
    ) -> Fit:
        """Makes an edge c f(a x + b) + d in place of its spline; a, b, c, d are learned on.

        Args:
            l: Which block.
            o: Which of its subnodes.
            i: Which of its inputs.
            name: Of f, in `archzoo.models.symbolic.FUNCTIONS`.
            x: (*, inputs), samples of the model's inputs on which a, b, c, d are fitted to the edge as it is; or None.
            affine: Without x: (a, b, c, d); None for (1, 0, 1, 0).

        Returns:
            The fit, with its R^2; that is NaN without x.

        Raises:
            ValueError: If there is no such edge or function, or the edge that x is for is pruned.
        """
        self._check_edge(l, o, i)
        if x is not None:
            if affine is not None:
                raise ValueError(f"affine={affine}: is fitted where x is given; leave one of them out")
            fit = fit_function(name, *self._edge_data(l, o, i, x))
        else:
            a, b, c, d = affine or (1.0, 0.0, 1.0, 0.0)
            complexity = FUNCTIONS[name].complexity if name in FUNCTIONS else 0  # fix_edge refuses an unknown name
            fit = Fit(name, a, b, c, d, math.nan, complexity, math.nan)
        self.blocks[l].fix_edge(o, i, fit)
        return fit

    def unfix_symbolic(self, l: int, o: int, i: int) -> None:  # noqa: E741
        """Makes an edge that is a formula the spline again that it was. A ValueError if it is none."""
        self._check_edge(l, o, i)
        if not bool(self.blocks[l].symbolic_mask()[o, i]):
            raise ValueError(f"l={l}, o={o}, i={i}: this edge is not a formula; nothing to undo")
        self.blocks[l].unfix_edge(o, i)

    @torch.no_grad()
    def auto_symbolic(
        self, x: Tensor, r2_threshold: float = 0.99, names: Sequence[str] | None = None, weight: float = 0.2
    ) -> list[FixedEdge]:
        """Makes every edge the best formula for it, where one fits well enough; the others stay splines.

        Block by block, so that later edges are fitted to what earlier formulas give.

        Args:
            x: (*, inputs), samples of the model's inputs on which edges are fitted.
            r2_threshold: Least R^2 of a formula; see `numeric_edges` for what is left.
            names: Of `archzoo.models.symbolic.FUNCTIONS`; None for all.
            weight: Of simplicity, from 0 to 1, against closeness.

        Returns:
            What was fixed, in the order of blocks, outputs, inputs.

        Raises:
            ValueError: If an argument is out of range.
        """
        if not (isinstance(r2_threshold, int | float) and r2_threshold <= 1):
            raise ValueError(f"r2_threshold={r2_threshold!r}: must be 1 at most, an R^2 such as 0.99")
        fixed = []
        inputs = self._samples(x, 5)[0]
        for l, block in enumerate(self.blocks):  # noqa: E741
            for o, i in block.numeric_mask().nonzero().tolist():
                data = inputs[:, i], block.edge_function(o, i, inputs[:, i])
                fits = suggest_functions(*data, names=names, weight=weight)
                good = [fit for fit in fits if fit.r2 >= r2_threshold]
                if good:
                    block.fix_edge(o, i, good[0])
                    fixed.append(FixedEdge(l, o, i, good[0]))
            inputs = block(inputs)
        return fixed

    def numeric_edges(self) -> list[tuple[int, int, int]]:
        """(l, o, i) of the edges that are splines: neither pruned nor formulas."""
        masks = [block.numeric_mask() for block in self.blocks]
        return [(l, o, i) for l, mask in enumerate(masks) for o, i in mask.nonzero().tolist()]  # noqa: E741

    def formula(
        self,
        inputs: Sequence[Any] | None = None,
        simplify: bool = False,
        digits: int | None = None,
        tolerance: float | None = None,
    ) -> Any:
        """The model as expressions of sympy.

        Args:
            inputs: Names or sympy symbols of all inputs, pruned ones too; None for x0, x1, …
            simplify: Whether sympy simplifies them, which may take long.
            digits: Significant digits that numbers are rounded to; None for all.
            tolerance: Numbers become simple ones, as 1/2 or pi, where they are so near to one: see
                `archzoo.models.symbolic.round_formula`. None for no such change.

        Returns:
            The expression of the output; a list of them if there are several.

        Raises:
            ValueError: If an edge is a spline, which has no formula; the message names them.
        """
        found = build_formula(self, inputs, simplify, digits, tolerance).expressions
        return found[0] if len(found) == 1 else list(found)

    def lambdify(
        self,
        x: Tensor | None = None,
        inputs: Sequence[Any] | None = None,
        simplify: bool = False,
        digits: int | None = None,
        tolerance: float | None = None,
    ) -> Formula:
        """The formula as a function of tensors or numpy arrays, and how far it is from the model.

        Args:
            x: (*, inputs), samples on which `Formula.rmse` and `Formula.max_error` are measured; None: they are None.
            inputs: As of `formula`.
            simplify: As of `formula`.
            digits: As of `formula`.
            tolerance: As of `formula`.

        Raises:
            ValueError: If an edge is a spline.
        """
        found = build_formula(self, inputs, simplify, digits, tolerance)
        return found if x is None else found.compared(self, x)

    def _edge_data(self, l: int, o: int, i: int, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        """Samples of an edge's input, and its function there."""
        self._check_edge(l, o, i)
        block = self.blocks[l]
        if not bool((block.numeric_mask() | block.symbolic_mask())[o, i]):
            raise ValueError(f"l={l}, o={o}, i={i}: this edge is pruned, so that there is no function to be fitted")
        inputs = self._samples(x, 5)[l][:, i]
        return inputs, block.edge_function(o, i, inputs)

    def _check_edge(self, l: int, o: int, i: int) -> None:  # noqa: E741
        if not 0 <= l < len(self.blocks):
            raise ValueError(f"l={l}: must be a block, from 0 to {len(self.blocks) - 1}")
        self.blocks[l].edges._check_edge(o, i)
