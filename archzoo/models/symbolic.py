"""Closed formulas on the edges of a KAN: the layer that evaluates them (https://arxiv.org/abs/2404.19756, section 2.5).

The functions are in `symbolic_functions`, their fit to samples in `symbolic_fit`, the rounding of a formula's numbers
in `symbolic_rounding`; all that is public is here too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.layers._kan import _as_index, _check_whole
from archzoo.models.symbolic_fit import Fit, fit_function, suggest_functions
from archzoo.models.symbolic_functions import _BUILTIN, FUNCTIONS, Function, _function, _sympy, add_function
from archzoo.models.symbolic_rounding import round_formula

__all__ = [
    "FUNCTIONS",
    "Fit",
    "Function",
    "SymbolicLinear",
    "add_function",
    "fit_function",
    "round_formula",
    "suggest_functions",
]


class SymbolicLinear(nn.Module):
    r"""Layer whose edges are closed formulas: $y_o = \sum_i c_{oi} f_{oi}(a_{oi} x_i + b_{oi}) + d_{oi}$.

    The sum runs over the edges that hold a function; at first none does. All edges with the same function are
    evaluated at once, in float32 at least (pykan loops over edges in Python, pykan#432). Where a formula is not
    defined, as log of a negative number, the output is NaN.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        device: Where the parameters are.
        dtype: Of the parameters.

    State: `affine` (O, I, 4), a, b, c, d of each edge, and the buffer `function` (O, I), int64: the function's place
    in `FUNCTIONS`, -1 at an edge without. If a function of `add_function` is in use, the state dict also has
    `added_functions`, their names, so that they are found whatever the order they were added in.

    Shape: (*, I) -> (*, O).
    """

    affine: nn.Parameter
    function: Tensor
    _edges: Tensor
    is_empty: bool
    """Whether no edge holds a function; the output is then 0."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_whole(1, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.affine = nn.Parameter(torch.empty(out_features, in_features, 4, device=device, dtype=dtype))
        self.register_buffer("function", torch.empty(out_features, in_features, dtype=torch.int64, device=device))
        self.register_buffer("_edges", torch.empty(0, dtype=torch.int64, device=device), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Takes the functions off all edges."""
        self.affine.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]))
        self.function.fill_(-1)
        self._hold({})

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O). A ValueError if the last dimension is not I."""
        x = self._checked(x)
        dtype = torch.promote_types(x.dtype, self.affine.dtype)
        if self.is_empty:
            return x.new_zeros(*x.shape[:-1], self.out_features, dtype=dtype)
        values = self._values(x)
        y = values.new_zeros(*x.shape[:-1], self.out_features)
        return y.index_add(-1, self._edges // self.in_features, values).to(dtype)

    def edge_functions(self, x: Tensor) -> Tensor:
        """Every edge's function at its input, 0 where there is none: (*, I) -> (*, O, I), which sums over I to y."""
        x = self._checked(x)
        dtype = torch.promote_types(x.dtype, self.affine.dtype)
        shape = *x.shape[:-1], self.out_features, self.in_features
        if self.is_empty:
            return x.new_zeros(shape, dtype=dtype)
        values = self._values(x)
        phi = values.new_zeros(*x.shape[:-1], self.out_features * self.in_features)
        return phi.index_copy(-1, self._edges, values).view(shape).to(dtype)

    def mask(self) -> Tensor:
        """(O, I) in the parameters' dtype: 1 where an edge holds a function, else 0."""
        return (self.function >= 0).to(self.affine.dtype)

    @torch.no_grad()
    def set_edge(
        self, o: int, i: int, fit: Fit | str, a: float = 1.0, b: float = 0.0, c: float = 1.0, d: float = 0.0
    ) -> None:
        """Puts c f(a x + b) + d on the edge from input i to output o, in place of what it held.

        Args:
            o: Which output.
            i: Which input.
            fit: A fit, with its own numbers, or the name of a function.
            a: Slope inside the function; this and the others only with a name.
            b: Offset inside it.
            c: Its factor.
            d: What is added to it.

        Raises:
            ValueError: If there is no such edge or function, a number is not finite, or comes beside a fit.
        """
        self._check_edge(o, i)
        numbers = (a, b, c, d)
        if isinstance(fit, Fit):
            if numbers != (1, 0, 1, 0):
                raise ValueError(f"a, b, c, d={numbers}: a fit has its own numbers; give them with a name")
            name, numbers = fit.name, (fit.a, fit.b, fit.c, fit.d)
        else:
            name = fit
        _function(name, "fit")
        largest = torch.finfo(self.affine.dtype).max
        if not all(abs(number) <= largest for number in numbers):
            raise ValueError(f"a, b, c, d={numbers}: must be finite in {self.affine.dtype}")
        self.affine[o, i] = torch.tensor(numbers, dtype=self.affine.dtype, device=self.affine.device)
        self.function[o, i] = list(FUNCTIONS).index(name)
        self._hold({**self._names, (o, i): name})

    @torch.no_grad()
    def unset_edge(self, o: int, i: int) -> None:
        """Takes the function off an edge; its numbers go back to 1, 0, 1, 0. A ValueError if it has none."""
        self._check_edge(o, i)
        if (o, i) not in self._names:
            raise ValueError(f"o={o}, i={i}: this edge holds no function; choose one where mask() is 1")
        self.affine[o, i] = self.affine.new_tensor([1.0, 0.0, 1.0, 0.0])
        self.function[o, i] = -1
        self._hold({edge: name for edge, name in self._names.items() if edge != (o, i)})

    def edge_name(self, o: int, i: int) -> str | None:
        """Name of the function on an edge; None if it has none."""
        self._check_edge(o, i)
        return self._names.get((o, i))

    def formula(self, o: int, inputs: Sequence[Any], round_to: int | None = None) -> Any:
        """Output o as a sympy expression: the sum over its edges.

        Args:
            o: Which output.
            inputs: An expression for each of the I inputs.
            round_to: Significant digits of the numbers; None for all.

        Raises:
            ImportError: Without sympy.
            ValueError: If there is no such output, or not I inputs.
        """
        sympy = _sympy()
        self._check_edge(o, 0)
        if len(inputs) != self.in_features:
            raise ValueError(f"inputs: {len(inputs)} expressions; there must be in_features={self.in_features}")
        if round_to is not None:
            _check_whole(1, round_to=round_to)

        def number(value: float) -> Any:
            value = value if round_to is None else float(f"{value:.{round_to}g}")
            return sympy.Integer(int(value)) if value == int(value) and abs(value) < 2**53 else sympy.Float(value)

        total = sympy.Integer(0)
        for i in range(self.in_features):
            name = self._names.get((o, i))
            if name is not None:
                a, b, c, d = map(number, self.affine[o, i].tolist())
                total += c * FUNCTIONS[name].sympy(a * sympy.sympify(inputs[i]) + b) + d
        return total

    @torch.no_grad()
    def subset(self, in_index: Sequence[int] | Tensor, out_index: Sequence[int] | Tensor) -> "SymbolicLinear":
        """A new layer with these inputs and outputs, in this order: indices, or masks of bools."""
        inputs = _as_index("in_index", in_index, self.in_features, self.function.device)
        outputs = _as_index("out_index", out_index, self.out_features, self.function.device)
        factory: dict[str, Any] = {"device": self.affine.device, "dtype": self.affine.dtype}
        layer = SymbolicLinear(len(inputs), len(outputs), **factory)
        layer.affine.copy_(self.affine[outputs][:, inputs]).requires_grad_(self.affine.requires_grad)
        layer.function.copy_(self.function[outputs][:, inputs])
        names = {}
        for o, old_o in enumerate(outputs.tolist()):
            for i, old_i in enumerate(inputs.tolist()):
                if (old_o, old_i) in self._names:
                    names[o, i] = self._names[old_o, old_i]
        layer._hold(names)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, and how many edges hold which function."""
        held = "".join(f", {name!r}: {count}" for name, count in self._groups)
        return f"{self.in_features}, {self.out_features}{held}"

    # --- Tables in Python, so that no tensor is looked at in forward --------------------------------------------------

    def _hold(self, names: dict[tuple[int, int], str]) -> None:
        """Takes over which edge holds which function: edges in groups of one function each."""
        place = {name: at for at, name in enumerate(FUNCTIONS)}
        order = sorted(names, key=lambda edge: (place[names[edge]], edge))
        counts: dict[str, int] = {}
        for edge in order:
            counts[names[edge]] = counts.get(names[edge], 0) + 1
        self._names, self._groups, self.is_empty = names, tuple(counts.items()), not names
        flat = [o * self.in_features + i for o, i in order]
        self._edges = torch.tensor(flat, dtype=torch.int64, device=self.function.device)

    def _values(self, x: Tensor) -> Tensor:
        """Values (*, E) of the edges that hold a function, in the order of `_edges`."""
        affine = self.affine.flatten(0, 1)[self._edges]
        wide = torch.promote_types(torch.promote_types(x.dtype, affine.dtype), torch.float32)
        a, b, c, d = affine.to(wide).unbind(-1)
        u = a * x.to(wide)[..., self._edges % self.in_features] + b
        parts = u.split([count for _, count in self._groups], -1)
        f = torch.cat([FUNCTIONS[name].torch(part) for (name, _), part in zip(self._groups, parts, strict=True)], -1)
        return c * f + d

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own = list(FUNCTIONS)[_BUILTIN:]
        if any(name in own for name, _ in self._groups):
            text = " ".join(own).encode()
            destination[prefix + "added_functions"] = torch.tensor(list(text), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        state, key, names = dict(state_dict), prefix + "function", None
        saved, own = state.get(key), state.pop(prefix + "added_functions", None)
        if saved is not None and saved.shape == self.function.shape and not saved.is_meta:
            place = {name: at for at, name in enumerate(FUNCTIONS)}
            table = list(FUNCTIONS)
            if own is not None:
                table[_BUILTIN:] = bytes(own.tolist()).decode().split(" ")
            held = {(o, i): at for o, row in enumerate(saved.tolist()) for i, at in enumerate(row) if at >= 0}
            for at in held.values():
                if at >= len(table) or table[at] not in place:
                    which = repr(table[at]) if at < len(table) else f"number {at}"
                    errors.append(f"{key}: an edge holds function {which}, which has to be added by add_function first")
                    return
            names = {edge: table[at] for edge, at in held.items()}
            state[key] = torch.full_like(saved, -1)
            for edge, name in names.items():
                state[key][edge] = place[name]
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing, unexpected, errors)
        if names is not None:
            self._hold(names)

    # --- Small helpers ------------------------------------------------------------------------------------------------

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but its last dimension must be in_features={self.in_features}"
            )
        return x

    def _check_edge(self, o: int, i: int) -> None:
        for name, index, size in (("o", o, self.out_features), ("i", i, self.in_features)):
            if not 0 <= index < size:
                raise ValueError(f"{name}={index}: must lie from 0 to {size - 1}")
