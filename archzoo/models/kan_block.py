"""One layer of the `KAN` model: functions on edges, sums, products (https://arxiv.org/abs/2408.10205, section 2)."""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.layers._kan import _check_whole
from archzoo.layers.kan import KANLinear
from archzoo.models.symbolic import Fit, SymbolicLinear

Level = tuple[int, tuple[int, ...]]
"""Nodes that sum, and the arities of those that multiply."""
Structure = list[tuple[int, tuple[int, ...], int, int]]
"""Of each block: inputs, subnodes of each node, cells of the grid, order of the splines."""


class KANBlock(nn.Module):
    r"""A learned function on each edge; subnodes sum them; nodes pass a subnode on, or multiply several.

    Subnode s is $p_s = u_s \sum_i \phi_{si}(x_i) + c_s$, and node n is $v_n \prod_{s \in n} p_s + d_n$: u is
    `subnode_scale`, c `subnode_bias`, v `node_scale`, d `node_bias`. The first `n_sum` nodes have one subnode each,
    the first ones; then come the products, each of the next subnodes. The function of an edge is a spline of `edges`,
    or a formula of `symbolic`, or 0 where it is pruned.

    Args:
        in_features: Number of inputs I.
        n_sum: Number of nodes that only sum.
        arities: Number of subnodes of each node that multiplies; 2 or more each.
        affine: Whether scales and biases of subnodes and nodes are learned; else they stay 1 and 0.
        device: Where the parameters are.
        dtype: Of the parameters.
        options: Of `KANLinear`.

    State: `edges`, a `KANLinear` of S = n_sum + sum(arities) outputs; `symbolic`, a `SymbolicLinear` while any edge
    is a formula, else absent; `subnode_scale`, `subnode_bias` (S,), `node_scale`, `node_bias` (n,); the buffer `arity`
    (n,), subnodes of each node.

    Shape: (*, I) -> (*, n), n = n_sum + len(arities).

    Raises:
        ValueError: If an option of `KANLinear` is out of range; `KAN` checks the others.
    """

    symbolic: SymbolicLinear | None
    subnode_scale: nn.Parameter
    subnode_bias: nn.Parameter
    node_scale: nn.Parameter
    node_bias: nn.Parameter
    arity: Tensor

    def __init__(
        self,
        in_features: int,
        n_sum: int,
        arities: Sequence[int] = (),
        *,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        self.n_sum, self.arities = n_sum, tuple(arities)
        subnodes, nodes = n_sum + sum(self.arities), n_sum + len(self.arities)
        self.edges = KANLinear(in_features, subnodes, device=device, dtype=dtype, **options)
        self.register_module("symbolic", None)

        def parameter(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype), requires_grad=affine)

        self.subnode_scale, self.subnode_bias = parameter(subnodes), parameter(subnodes)
        self.node_scale, self.node_bias = parameter(nodes), parameter(nodes)
        self.register_buffer("arity", torch.tensor(self._all_arities(), device=device))
        self.reset_parameters(edges=False)

    def reset_parameters(self, edges: bool = True) -> None:
        """Scales to 1, biases to 0, no formulas; and new splines, if `edges`."""
        self.symbolic = None
        for scale, bias in ((self.subnode_scale, self.subnode_bias), (self.node_scale, self.node_bias)):
            nn.init.ones_(scale)
            nn.init.zeros_(bias)
        if edges:
            self.edges.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, n)."""
        subnodes = self.subnode_scale * self.sums(x) + self.subnode_bias
        parts, start = [], 0
        for arity, run in itertools.groupby(self._all_arities()):
            count = len(list(run))
            factors = subnodes.narrow(-1, start, arity * count).unflatten(-1, (count, arity))
            # Not prod: its gradient looks at the values, which breaks the graph of a compiled model.
            parts.append(functools.reduce(operator.mul, factors.unbind(-1)))
            start += arity * count
        nodes = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return self.node_scale * nodes + self.node_bias

    def sums(self, x: Tensor) -> Tensor:
        """What the edges sum to at each subnode, before its affine map: (*, I) -> (*, S)."""
        y = self.edges(x)
        return y if self.symbolic is None else y + self.symbolic(x)

    def extra_repr(self) -> str:
        """Kinds of nodes."""
        return f"n_sum={self.n_sum}, arities={self.arities}"

    # --- Edges --------------------------------------------------------------------------------------------------------

    def edge_function(self, o: int, i: int, x: Tensor) -> Tensor:
        """The function of edge (o, i) at x, any shape. Has a gradient by x, not by parameters."""
        self.edges._check_edge(o, i)
        x = x.unsqueeze(-1)
        phi = self.edges.subset([i], [o]).edge_functions(x)
        if self.symbolic is not None:
            phi = phi + self.symbolic.subset([i], [o]).edge_functions(x)
        return phi[..., 0, 0]

    def edge_std(self, x: Tensor) -> Tensor:
        """Standard deviation of every edge's function over samples x (N, I): (S, I), in float64."""
        std = self.edges.edge_scale(x, normalize=False).double()
        if self.symbolic is None:
            return std
        return torch.where(self.symbolic_mask(), self.symbolic.edge_functions(x).double().std(0), std)

    def symbolic_mask(self) -> Tensor:
        """Which edges are formulas: (S, I) of bools."""
        if self.symbolic is None:
            return torch.zeros_like(self.edges.spline_weight[..., 0], dtype=torch.bool)
        return self.symbolic.mask().bool()

    def numeric_mask(self) -> Tensor:
        """Which edges are splines: (S, I) of bools. The others are formulas, or pruned."""
        mask = self.edges.mask
        return torch.ones_like(self.edges.spline_weight[..., 0]).bool() if mask is None else mask.bool()

    @torch.no_grad()
    def fix_edge(self, o: int, i: int, fit: Fit) -> None:
        """Makes edge (o, i) a formula, in place of its spline."""
        symbolic = self._no_formulas() if self.symbolic is None else self.symbolic
        symbolic.set_edge(o, i, fit)  # which refuses a wrong name, before anything is changed
        self.symbolic = symbolic
        keep = torch.ones_like(self.edges.spline_weight[..., 0])
        keep[o, i] = 0
        self.edges.prune_edges_(0.5, keep)

    @torch.no_grad()
    def unfix_edge(self, o: int, i: int) -> None:
        """Makes the formula of edge (o, i) the spline again that it was."""
        assert self.symbolic is not None
        assert self.edges.mask is not None
        self._forget_formulas([(o, i)])
        mask = self.edges.mask.clone()
        mask[o, i] = 1
        self.edges.mask = _unless_all_ones(mask)

    @torch.no_grad()
    def drop_edges(self, x: Tensor, drop: Tensor) -> None:
        """Removes edges, spline or formula; their means over x (N, I) go to `subnode_bias`.

        Scores know how much an edge varies, not how large it is: without this a constant would be lost with it.
        """
        drop = drop & (self.numeric_mask() | self.symbolic_mask())
        if not bool(drop.any()):
            return
        before = self.sums(x).double().mean(0)
        self._forget_formulas((drop & self.symbolic_mask()).nonzero().tolist())
        self.edges.prune_edges_(0.5, (~drop).to(self.edges.spline_weight))
        lost = before - self.sums(x).double().mean(0)
        self.subnode_bias.add_((self.subnode_scale.double() * lost).to(self.subnode_bias))

    def _no_formulas(self) -> SymbolicLinear:
        weight = self.edges.spline_weight
        return SymbolicLinear(
            self.edges.in_features, self.edges.out_features, device=weight.device, dtype=weight.dtype
        ).train(self.training)

    def _forget_formulas(self, edges: Sequence[Sequence[int]]) -> None:
        for o, i in edges:
            assert self.symbolic is not None
            self.symbolic.unset_edge(o, i)
        if self.symbolic is not None and not bool(self.symbolic_mask().any()):
            self.symbolic = None

    @torch.no_grad()
    def select(self, inputs: Tensor, nodes: Tensor) -> None:
        """Keeps only these inputs and nodes, given as masks of bools. Parameters become new objects."""
        subnodes = nodes.repeat_interleave(self.arity)
        self.edges = self.edges.subset(inputs, subnodes)
        if self.edges.mask is not None:
            self.edges.mask = _unless_all_ones(self.edges.mask)
        if self.symbolic is not None:
            self.symbolic = self.symbolic.subset(inputs, subnodes)
            self._forget_formulas([])
        for name, kept in (("subnode", subnodes), ("node", nodes)):
            for part in ("scale", "bias"):
                old = getattr(self, f"{name}_{part}")
                setattr(self, f"{name}_{part}", nn.Parameter(old[kept], old.requires_grad))
        keep = nodes.tolist()
        self.arities = tuple(itertools.compress(self.arities, keep[self.n_sum :]))
        self.n_sum = sum(keep[: self.n_sum])
        self.arity = self.arity[nodes]

    def structure(self) -> tuple[int, tuple[int, ...], int, int]:
        """What sizes follow from."""
        return self.edges.in_features, self._all_arities(), self.edges.grid_size, self.edges.spline_order

    # --- State --------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = prefix + "symbolic.affine" in state_dict
        if saved and self.symbolic is None:
            self.symbolic = self._no_formulas()
        elif not saved and prefix + "subnode_scale" in state_dict:
            self.symbolic = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _all_arities(self) -> tuple[int, ...]:
        """Subnodes of each node."""
        return (1,) * self.n_sum + self.arities


def _unless_all_ones(mask: Tensor) -> Tensor | None:
    return None if bool((mask == 1).all()) else mask


# --- Structure --------------------------------------------------------------------------------------------------------


def checked_levels(width: Sequence[int | Sequence[int]], mult_arity: int | Sequence[Sequence[int]]) -> list[Level]:
    """Sums and arities of each level; a ValueError if an argument is out of range."""
    if not isinstance(width, Sequence) or len(width) < 2:
        raise ValueError(f"width={width!r}: must have two entries or more, from inputs to outputs, as [2, 5, 1]")
    if not isinstance(mult_arity, Sequence):
        _check_whole(2, mult_arity=mult_arity)
    levels: list[Level] = []
    for number, entry in enumerate(width):
        pair = tuple(entry) if isinstance(entry, Sequence) else (entry, 0)
        if len(pair) != 2:
            raise ValueError(f"width={width!r}: {entry!r} must be a number of nodes, or a pair (sums, products)")
        for size in pair:
            _check_whole(0, **{f"width[{number}]": size})
        sums, products = pair
        if sums + products == 0 or (number == 0 and products):
            raise ValueError(f"width={width!r}: each level needs a node, and the inputs cannot be products")
        arities: Any = (mult_arity,) * products
        if isinstance(mult_arity, Sequence):
            arities = mult_arity[number] if len(mult_arity) == len(width) else None
            if not isinstance(arities, Sequence) or len(arities) != products:
                raise ValueError(
                    f"mult_arity={mult_arity!r}: must be a whole number, or a list for each of the {len(width)} levels "
                    f"of width={width!r}, with a number for each of its products, as [[], [2, 3], []]"
                )
            for arity in arities:
                _check_whole(2, **{f"mult_arity[{number}]": arity})
        levels.append((sums, tuple(arities)))
    return levels


def saved_structure(state_dict: Any, prefix: str) -> Structure:
    """Of a state dict of a `KAN`; [] if it does not say."""
    found: Structure = []
    while True:
        names = [f"{prefix}blocks.{len(found)}.{name}" for name in ("arity", "edges.spline_weight", "edges.grid")]
        if any(name not in state_dict or state_dict[name].is_meta for name in names):
            return found
        arity, weight, grid = (state_dict[name] for name in names)
        order = grid.shape[1] - weight.shape[2] - 1
        found.append((weight.shape[1], tuple(arity.tolist()), weight.shape[2] - order, order))


def as_call(structure: Structure) -> str:
    """The call that builds a `KAN` of this structure."""
    width: list[Any] = [structure[0][0]]
    arities: list[list[int]] = [[]]
    for _, arity, _, _ in structure:
        products = [size for size in arity if size > 1]
        width.append((len(arity) - len(products), len(products)) if products else len(arity))
        arities.append(products)
    text = f"KAN({width}, grid_size={structure[0][2]}, spline_order={structure[0][3]}"
    return text + (f", mult_arity={arities})" if any(arities) else ")")
