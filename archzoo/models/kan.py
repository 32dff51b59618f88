"""KAN: a network of learned one-dimensional functions that can be read as a formula (https://arxiv.org/abs/2404.19756).

Sums and products of nodes as in KAN 2.0 (https://arxiv.org/abs/2408.10205).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from archzoo.layers._kan import _check_finite, _check_whole
from archzoo.models.kan_block import KANBlock, Level, Structure, as_call, checked_levels, saved_structure
from archzoo.models.kan_symbolic import SymbolicMethods
from archzoo.models.model import LayerFactory, register_model
from archzoo.registry import layer_options


class Attribution(NamedTuple):
    """Which part of the outputs' variation passes each node and edge; see `KAN.attribute`."""

    nodes: list[Tensor]
    """Scores (n,) of the nodes of every level: inputs first, outputs last."""
    edges: list[Tensor]
    """Scores (S, I) of the edges of every block."""


class KAN(SymbolicMethods):
    r"""Network whose edges carry learned functions: it can be pruned, and read as a formula.

    Level 0 are the inputs. Between level l and the next, block l has a B-spline on each edge, sums edges into
    subnodes, and makes nodes of these: one that sums passes its subnode on, one that multiplies takes the product of
    several. Edge (l, o, i) leads from node i of level l to subnode o of block l. Nothing is written to disk, and
    methods that need data take it as an argument.

    `refine`, `prune_*`, `fix_symbolic`, `unfix_symbolic` and `auto_symbolic` change the model in place and make new
    Parameters: build the optimizer again after them.

    Args:
        width: Nodes of each level, inputs and outputs included: a number of sums, or a pair (sums, products).
        grid_size: Cells of the splines' grids.
        spline_order: Degree of the splines.
        mult_arity: Subnodes of each product, 2 or more; or a list for each level with one number for each of its
            products, as `[[], [2, 3], []]`.
        affine: Whether scales and biases of subnodes and nodes are learned. Else they stay 1 and 0, but for what
            pruning adds to `subnode_bias`.
        bias: Whether each subnode has a learned bias beside these.
        regularize: Factor of `regularization_loss()` on what the model was trained on last. 0: none.
        device: Where the parameters are.
        dtype: Of the parameters.
        options: Of every `KANLinear`: `base_activation`, `grid_range`, `grid_eps`, `extrapolation`, `scale_noise`, …

    State: `blocks.{l}`, a `KANBlock` each, which says what it holds; buffer `input_mask`, which of the inputs remain,
    None until `prune_inputs`. What was saved after pruning or refining loads into a model of those sizes: the error
    says which. Masks, formulas and `input_mask` come with the state dict.

    Shape: (*, inputs) -> (*, outputs), with all inputs, also where some are pruned.

    Raises:
        ValueError: If an argument is out of range.

    From data to a formula: train for sparsity, prune, put formulas in the place of splines, train their numbers.

    >>> import torch
    >>> from archzoo.models.kan import KAN
    >>> _ = torch.manual_seed(0)
    >>> x = 2 * torch.rand(200, 3, dtype=torch.float64) - 1
    >>> y = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:2] ** 2)  # x2 does not matter
    >>> def train(model, steps, sparsity=0.0):
    ...     optimizer = torch.optim.LBFGS(
    ...         model.parameters(), max_iter=steps, tolerance_change=0, line_search_fn="strong_wolfe"
    ...     )
    ...     def loss():
    ...         optimizer.zero_grad()
    ...         loss = (model(x) - y).square().mean() + sparsity * model.regularization_loss(x)
    ...         loss.backward()
    ...         return loss
    ...     optimizer.step(loss)
    >>> model = KAN([3, 1, 1], grid_size=5, dtype=torch.float64)
    >>> train(model, 50, sparsity=0.01)
    >>> _ = model.prune_edges(x)
    >>> _ = model.prune_inputs(x)
    >>> model.input_index
    [0, 1]
    >>> train(model, 50)
    >>> [edge.fit.name for edge in model.auto_symbolic(x, names=["x", "x^2", "sin", "exp"])]
    ['sin', 'x^2', 'exp']
    >>> train(model, 100)
    >>> model.formula(tolerance=1e-3)
    exp(x1**2 + sin(pi*x0))
    >>> model.lambdify(x, tolerance=1e-3).rmse < 1e-3  # how far it is from the model
    True
    """

    input_mask: Tensor | None
    _input_index: Tensor | None

    def __init__(
        self,
        width: Sequence[int | Sequence[int]],
        grid_size: int = 3,
        spline_order: int = 3,
        mult_arity: int | Sequence[Sequence[int]] = 2,
        affine: bool = False,
        *,
        bias: bool = False,
        regularize: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__()
        levels = checked_levels(width, mult_arity)
        _check_finite(regularize=regularize)
        self.in_features, self.regularize = levels[0][0], regularize
        options |= {"bias": bias, "grid_size": grid_size, "spline_order": spline_order}
        blocks = nn.ModuleList()
        for (inputs, products), (sums, arities) in zip(levels, levels[1:], strict=False):
            size = inputs + len(products)
            blocks.append(KANBlock(size, sums, arities, affine=affine, device=device, dtype=dtype, **options))
        self.blocks = blocks  # type: ignore[assignment]  # a sequence of blocks, as it is annotated
        self.register_buffer("input_mask", None)
        self.register_buffer("_input_index", None, persistent=False)
        self._seen: list[Tensor] = []

    def reset_parameters(self) -> None:
        """New splines, scales 1, biases 0, no formulas. Sizes stay as they are, and so do pruned inputs."""
        for block in self.blocks:
            block.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(*, inputs) -> (*, outputs). A ValueError if the last dimension is not that of all inputs."""
        x = self._remaining(x)
        seen = []
        for block in self.blocks:
            seen.append(x)
            x = block(x)
        if self.training and self.regularize:
            self._seen = seen
        return x

    def extra_repr(self) -> str:
        """Sizes as they are now."""
        known = self._input_index is not None and not self._input_index.is_meta
        pruned = f", input_index={self.input_index}" if known else ""
        return f"{as_call(self._structure())[4:-1]}, regularize={self.regularize}{pruned}"

    @property
    def width(self) -> list[tuple[int, int]]:
        """(sums, products) of each level as they are now: pruning makes them fewer."""
        return [(sums, len(arities)) for sums, arities in self._levels()]

    @property
    def mult_arity(self) -> list[list[int]]:
        """Subnodes of each product, level by level."""
        return [list(arities) for _, arities in self._levels()]

    @property
    def grid_size(self) -> int:
        """Cells of the splines' grids."""
        return self.blocks[0].edges.grid_size

    @property
    def input_index(self) -> list[int]:
        """Which of the original inputs remain, in order."""
        return list(range(self.in_features)) if self._input_index is None else self._input_index.tolist()

    def activations(self, x: Tensor) -> list[Tensor]:
        """The nodes' values (*, n) on every level: the inputs that remain first, the outputs last."""
        levels = [self._remaining(x)]
        for block in self.blocks:
            levels.append(block(levels[-1]))
        return levels

    # --- Training -----------------------------------------------------------------------------------------------------

    def regularization_loss(self, x: Tensor | None = None, l1: float = 1.0, entropy: float = 2.0) -> Tensor:
        """The paper's regulariser of the splines, `KANLinear.activation_regularization`, summed over the blocks.

        Edges that are formulas do not take part. The training loop adds this to the loss, with x = None.

        Args:
            x: (*, inputs), samples; the factor is then 1. None: those of the last forward pass in training mode, which
                are used once, with the factor `regularize`; exactly 0 if that is 0, or if there was no such pass.
            l1: Factor of the L1 norm of the edges.
            entropy: Factor of their entropies, in bits.
        """
        factor = 1.0
        if x is None:
            inputs, factor = self._seen, self.regularize
            self._seen = []
        else:
            inputs = self.activations(x)[:-1]
        total = self.blocks[0].subnode_scale.new_zeros(())
        for block, seen in zip(self.blocks, inputs, strict=False):
            total = total + factor * block.edges.activation_regularization(seen, l1, entropy)
        return total

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Moves every block's knots to where its inputs are; each function stays as it is there.

        Block by block, each from what those before it give after their own knots moved. Splines' weights change in
        place and mean something else then: reset their optimizer state.

        Args:
            x: (*, inputs), one sample at least.
            margin: How far uniform knots reach beyond the samples, in units of each block's inputs.
        """
        _check_finite(margin=margin)
        x = self._samples(x, 1)[0]
        for block in self.blocks:
            block.edges.update_grid(x, margin)
            x = block(x)

    def refine(self, grid_size: int) -> None:
        """Finer grids, the same functions, exactly so inside the grid if the size is a multiple of the present one.

        `spline_weight` of every block becomes a new Parameter: build the optimizer again.

        Args:
            grid_size: New number of cells, at least the present one.
        """
        _check_whole(max(block.edges.grid_size for block in self.blocks), grid_size=grid_size)
        for block in self.blocks:
            block.edges.refine(grid_size)

    # --- Pruning ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def attribute(self, x: Tensor) -> Attribution:
        """Scores of nodes and edges: how much of the outputs' variation over samples passes through each.

        Each output starts with 1. An edge gets (its standard deviation) / (its subnode's + 1e-4) of the score of the
        node above, a node the sum of the edges that leave it; then the mean over outputs is taken (KAN 2.0, section 4).

        Args:
            x: (*, inputs), two samples at least.
        """
        levels = self._samples(x, 2)
        node = torch.full_like(levels[-1][0], 1 / levels[-1].shape[1], dtype=torch.float64)
        nodes, edges = [node], []
        for block, inputs in zip(self.blocks[::-1], levels[-2::-1], strict=True):
            subnode = node.repeat_interleave(block.arity) / (block.sums(inputs).double().std(0) + 1e-4)
            edges.append(block.edge_std(inputs) * subnode.unsqueeze(1))
            node = edges[-1].sum(0)
            nodes.append(node)
        if not all(bool(scores.isfinite().all()) for scores in (*nodes, *edges)):
            raise ValueError("x: an edge's function is not finite on these samples, so that nothing can be compared")
        dtype = self.blocks[0].subnode_scale.dtype
        return Attribution([n.to(dtype) for n in reversed(nodes)], [e.to(dtype) for e in reversed(edges)])

    def prune_nodes(self, x: Tensor, threshold: float = 1e-2) -> list[Tensor]:
        """Removes hidden nodes whose score is below a threshold, a product's subnodes with it.

        What they add to the next subnodes on average goes to `subnode_bias`. Layers get smaller.

        Args:
            x: (*, inputs), samples that scores and averages are taken of.
            threshold: Least score that stays, as a fraction of the outputs' variation.

        Returns:
            The scores before, (n,) of every level.

        Raises:
            ValueError: If a level would be left without a node. Nothing is changed then.
        """
        _check_finite(threshold=threshold)
        scores = self.attribute(x).nodes
        keep = [score >= threshold for score in scores]
        for level in range(1, len(keep) - 1):
            self._refuse_nothing(f"node of level {level}", scores[level], keep[level], threshold)
        keep[0], keep[-1] = torch.ones_like(keep[0]), torch.ones_like(keep[-1])
        self._keep_nodes(x, keep)
        return scores

    def prune_inputs(self, x: Tensor, threshold: float = 1e-2) -> Tensor:
        """Removes inputs whose score is below a threshold; `input_index` says which remain.

        The model goes on taking all inputs, and looks at those only. What the others add on average is kept.

        Args:
            x: (*, inputs), samples that scores and averages are taken of.
            threshold: Least score that stays, as a fraction of the outputs' variation.

        Returns:
            The scores before, (n,) of the inputs that were there.

        Raises:
            ValueError: If no input would be left. Nothing is changed then.
        """
        _check_finite(threshold=threshold)
        scores = self.attribute(x).nodes
        keep = [torch.ones_like(score, dtype=torch.bool) for score in scores]
        keep[0] = scores[0] >= threshold
        self._refuse_nothing("input", scores[0], keep[0], threshold)
        self._keep_nodes(x, keep)
        return scores[0]

    @torch.no_grad()
    def prune_edges(self, x: Tensor, threshold: float = 3e-2) -> list[Tensor]:
        """Removes edges whose score is below a threshold, splines and formulas alike.

        What they add on average goes to `subnode_bias`. Layers keep their sizes, with a mask.

        Args:
            x: (*, inputs), samples that scores and averages are taken of.
            threshold: Least score that stays, as a fraction of the outputs' variation.

        Returns:
            The scores before, (S, I) of every block.

        Raises:
            ValueError: If a block would be left without an edge. Nothing is changed then.
        """
        _check_finite(threshold=threshold)
        scores = self.attribute(x).edges
        keep = [score >= threshold for score in scores]
        for number, (score, kept) in enumerate(zip(scores, keep, strict=True)):
            self._refuse_nothing(f"edge of block {number}", score, kept, threshold)
        for block, inputs, kept in zip(self.blocks, self._samples(x, 2), keep, strict=False):
            block.drop_edges(inputs, ~kept)
        return scores

    @staticmethod
    def _refuse_nothing(what: str, scores: Tensor, keep: Tensor, threshold: float) -> None:
        if not bool(keep.any()):
            raise ValueError(
                f"threshold={threshold}: no {what} would be left; the largest score is {float(scores.max()):.3g}"
            )

    @torch.no_grad()
    def _keep_nodes(self, x: Tensor, keep: list[Tensor]) -> None:
        """Removes nodes of every level where the mask `keep` is False."""
        for block, inputs, kept in zip(self.blocks, self._samples(x, 2), keep, strict=False):
            block.drop_edges(inputs, (~kept).expand(len(block.subnode_bias), -1))
        for block, below, above in zip(self.blocks, keep, keep[1:], strict=False):
            if not bool(below.all() and above.all()):
                block.select(below, above)
        if not bool(keep[0].all()):
            mask = torch.zeros(self.in_features, dtype=torch.bool, device=keep[0].device)
            mask[torch.tensor(self.input_index, device=mask.device)[keep[0]]] = True
            self._set_input_mask(mask)

    # --- Pictures and state -------------------------------------------------------------------------------------------

    def plot(self, x: Tensor, ax: Any = None, **options: Any) -> Any:
        """Draws the network with the function of every edge. Needs matplotlib; writes no file.

        Args:
            x: (*, inputs), samples: each function is drawn where they are, and as visible as its score.
            ax: Where to draw, a `matplotlib.axes.Axes`; None for a new figure of a size that suits.
            options: Of `archzoo.models.kan_plot.plot_kan`: `input_names`, `output_names`, `beta`, …

        Returns:
            The axes; its picture is saved by `axes.figure.savefig("kan.pdf")`.
        """
        from archzoo.models.kan_plot import plot_kan

        return plot_kan(self, x, ax, **options)

    # --- State --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seen": []}  # part of a graph, which cannot be copied

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own, saved = self._structure(), saved_structure(state_dict, prefix)
        if saved and own != saved:
            raise ValueError(
                f"state_dict: it is of {as_call(saved)}, this model is {as_call(own)}; pruning and refining change "
                "sizes: build the model that was saved, then load"
            )
        if saved:
            self._set_input_mask(state_dict.get(prefix + "input_mask"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _set_input_mask(self, mask: Tensor | None) -> None:
        """Which of the original inputs remain; None for all."""
        first = self.blocks[0]
        if mask is not None and not first.arity.is_meta:
            mask = mask.to(first.arity.device, copy=True)
        self.in_features = first.edges.in_features if mask is None else len(mask)
        self.input_mask, self._input_index = mask, None if mask is None else mask.nonzero().flatten()

    # --- Small helpers ------------------------------------------------------------------------------------------------

    def _levels(self) -> list[Level]:
        return [(self.blocks[0].edges.in_features, ()), *((block.n_sum, block.arities) for block in self.blocks)]

    def _structure(self) -> Structure:
        return [block.structure() for block in self.blocks]

    def _remaining(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but its last dimension must be that of all inputs, {self.in_features}"
            )
        return x if self._input_index is None else x.index_select(-1, self._input_index)

    def _samples(self, x: Tensor, least: int) -> list[Tensor]:
        """The activations, (N, n) on each level. A ValueError if there are too few or some are not finite."""
        levels = [level.flatten(0, -2) if level.ndim > 1 else level[None] for level in self.activations(x)]
        if len(levels[0]) < least:
            raise ValueError(f"x: {len(levels[0])} samples; at least {least} are needed")
        for number, level in enumerate(levels):
            if not bool(level.isfinite().all()):
                raise ValueError(f"x: values on level {number} of the network are not all finite")
        return levels


# --- For the trainer --------------------------------------------------------------------------------------------------


@register_model("kan")
def build_kan(
    layer: LayerFactory,
    input_shape: tuple[int, ...],
    output_size: int,
    *,
    width: int = 5,
    depth: int = 1,
    widths: tuple[int, ...] | None = None,
    hidden: Sequence[int | Sequence[int]] | None = None,
    mult: int = 0,
    mult_arity: int = 2,
    affine: bool = False,
    regularize: float = 0.0,
) -> nn.Module:
    """A `KAN` for a task: inputs are flattened, hidden levels alike or one by one.

    Args:
        layer: The layer `kan`, whose options are those of every edge.
        input_shape: Shape of one input.
        output_size: Length of the output vector.
        width: Nodes that sum on every hidden level.
        depth: Number of hidden levels.
        widths: Nodes that sum on each hidden level, instead of `width` and `depth`.
        hidden: The hidden levels one by one, as `KAN` takes them, instead of `width`, `depth`, `widths` and `mult`.
        mult: Nodes that multiply on every hidden level, besides.
        mult_arity: Subnodes of each of these.
        affine: Whether scales and biases of subnodes and nodes are learned.
        regularize: Factor of the paper's regulariser of the edges.

    Returns:
        A `KAN` where inputs are vectors, else `nn.Sequential` of `nn.Flatten` and a `KAN`.

    Raises:
        ValueError: If the layer is another one, or an option is out of range.
    """
    if layer.entry.name != "kan":
        raise ValueError(
            f"layer={layer.entry.name!r}: model 'kan' is made of layer 'kan' alone; choose layer=kan, "
            "and budget.to=kan or a number"
        )
    _check_whole(1, width=width)
    _check_whole(0, depth=depth, mult=mult)
    sums = widths if widths is not None else (width,) * depth
    levels = hidden if hidden is not None else [(size, mult) for size in sums]
    options = {"bias": True, **layer_options("kan"), **layer.options}
    model = KAN(
        [math.prod(input_shape), *levels, output_size],
        mult_arity=mult_arity,
        affine=affine,
        regularize=regularize,
        **options,
    )
    return model if len(input_shape) == 1 else nn.Sequential(nn.Flatten(), model)
