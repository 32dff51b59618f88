"""KAN: a layer whose every edge carries a learned function, a B-spline plus a base (https://arxiv.org/abs/2404.19756)."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.activation import Activation, as_activation
from archzoo.kernels.basis_linear import basis_linear
from archzoo.kernels.kan_spline import OUTSIDE, BSpline
from archzoo.layers._kan import _as_index, _check_finite, _check_whole, _checked_range
from archzoo.registry import Card, register_layer

_REFIT_BLOCK = 2**20  # elements of a block's bases, while a spline is fitted anew


@register_layer(
    "kan",
    kind="linear",
    nonlinear=True,
    card=Card(
        title="KAN: Kolmogorov-Arnold Networks",
        authors="Ziming Liu, Yixuan Wang, Sachin Vaidya, Fabian Ruehle, James Halverson, Marin Soljačić, "
        "Thomas Y. Hou, Max Tegmark",
        year=2024,
        arxiv="2404.19756",
        equation=r"y_o = b_o + \sum_i \phi_{oi}(x_i),"
        r"\quad \phi_{oi}(x) = v_{oi}\, \mathrm{silu}(x) + s_{oi} \sum_j w_{oij} B_j(x)",
        headline="Poisson equation: MSE ~1e-7 with ~1e2 parameters, against ~1e-5 with ~1e4 of an MLP; "
        "RMSE of smooth functions falls as (parameters)^-4 for cubic splines",
        reproduced="exp(sin(pi x) + y^2) by [2, 5, 1], 1000 points, float64, 500 L-BFGS iterations a grid, 3 seeds: "
        "test RMSE 0.9-1.1e-2, 5-9e-4, 2.5-6.2e-4 at G = 3, 10, 20 (pykan 0.2.8: 5.0e-3, 4.2e-4, 1.3e-4). "
        "Digits, [64, 32, LayerNorm, 10], 15 epochs, 3 seeds: 96.2-97.5 %; an equal MLP: 97.2-98.5 %. "
        "The Poisson equation was not run",
    ),
)
class KANLinear(nn.Module):
    r"""Layer with a learned function on each edge: $y_o = b_o + \sum_i \phi_{oi}(x_i)$.

    $\phi_{oi}(x) = m_{oi} ( v_{oi}\, b(x) + s_{oi} \sum_{j<K} w_{oij} B_j(x; t_i) )$, with K = grid_size + spline_order
    B-splines B_j on the knots t_i of feature i. Splines live on `grid_range`: inputs should lie there, or use
    `update_grid`, or `extrapolation="linear"`. They are evaluated in float32 at least; for the backward pass the layer
    keeps x and its parameters, and evaluates them again. Differentiable any number of times.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        bias: Whether to add `bias`.
        grid_size: Cells G of each feature's inner grid.
        spline_order: Degree k of the pieces, from 0.
        grid_range: Ends of the initial inner grid, in units of x.
        grid_eps: What `update_grid` mixes: 1 gives uniform knots, 0 the samples' quantiles.
        base_activation: b: `"silu"`, `"gelu"`, `"relu"`, `"tanh"`, `"identity"`, `"zero"` or None, or a callable.
        standalone_scale: Whether each edge has its own spline scale s, `spline_scaler`; else s = 1.
        scale_noise: Size of the initial splines: they pass through uniform noise in +-scale_noise / (2 G).
        scale_base: `base_weight` starts uniform in +-scale_base / sqrt(I).
        scale_spline: `spline_scaler` starts uniform in +-scale_spline / sqrt(I); without it, `spline_weight` is
            multiplied by this.
        extrapolation: The spline outside its inner grid: `"zero"` fades out within k cells, `"clamp"` keeps its value
            at the end, `"linear"` its tangent. The base branch always sees x.
        regularize_activation: Weight of the L1 term of `regularization_loss`.
        regularize_entropy: Weight of its entropy term.
        device: Where the parameters are.
        dtype: Of the parameters.

    State: `base_weight` (O, I) or None, `spline_weight` (O, I, K), `spline_scaler` (O, I) or None, `bias` (O,) or None;
    buffers `grid` (I, G + 2 k + 1), the knots, and `mask` (O, I), which is None until edges are pruned. On a uniform
    grid the exact knots are those of the attribute `spline`, and `grid` a copy for the state dict: change it by
    `update_grid`, `refine` or `load_state_dict`, not by hand.

    Shape: (*, I) -> (*, O).

    Raises:
        ValueError: If an argument is out of range.
    """

    base_weight: nn.Parameter | None
    spline_weight: nn.Parameter
    spline_scaler: nn.Parameter | None
    bias: nn.Parameter | None
    grid: Tensor
    mask: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        grid_size: int = 5,
        spline_order: int = 3,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        grid_eps: float = 0.02,
        base_activation: str | Callable[[Tensor], Tensor] | None = "silu",
        standalone_scale: bool = False,
        scale_noise: float = 0.1,
        scale_base: float = 1.0,
        scale_spline: float = 1.0,
        extrapolation: str = "zero",
        regularize_activation: float = 0.0,
        regularize_entropy: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_whole(1, in_features=in_features, out_features=out_features, grid_size=grid_size)
        _check_whole(0, spline_order=spline_order)
        _check_finite(scale_noise=scale_noise, scale_base=scale_base, scale_spline=scale_spline)
        _check_finite(regularize_activation=regularize_activation, regularize_entropy=regularize_entropy)
        if not 0 <= grid_eps <= 1:
            raise ValueError(f"grid_eps={grid_eps}: must lie from 0 (quantiles) to 1 (uniform)")
        if extrapolation not in OUTSIDE:
            raise ValueError(f"extrapolation={extrapolation!r}: must be one of {', '.join(map(repr, OUTSIDE))}")
        self.in_features, self.out_features = in_features, out_features
        self.grid_size, self.spline_order = grid_size, spline_order
        self.grid_range, self.grid_eps = _checked_range(grid_range), float(grid_eps)
        self.standalone_scale, self.scale_noise = standalone_scale, scale_noise
        self.scale_base, self.scale_spline = scale_base, scale_spline
        self.extrapolation = extrapolation
        self.regularize_activation, self.regularize_entropy = regularize_activation, regularize_entropy
        self.base_activation = base_activation
        self._base = as_activation(base_activation)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        edges = (out_features, in_features)
        self.base_weight = None if self._base is None else parameter(*edges)
        self.spline_weight = parameter(*edges, grid_size + spline_order)
        self.spline_scaler = parameter(*edges) if standalone_scale else None
        self.bias = parameter(out_features) if bias else None
        knots = grid_size + 2 * spline_order + 1
        self.register_buffer("grid", torch.empty(in_features, knots, device=device, dtype=dtype))
        self.register_buffer("mask", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to a uniform grid over `grid_range`, no pruned edge, and new random weights."""
        low, high = self.grid_range
        self.mask = None
        self.spline = self._basis(low, (high - low) / self.grid_size)
        self.grid.copy_(self.spline.knots(self.grid.new_empty(0, dtype=torch.float64)))
        bound = self.in_features**-0.5
        if self.base_weight is not None:
            nn.init.uniform_(self.base_weight, -self.scale_base * bound, self.scale_base * bound)
        if self.spline_scaler is not None:
            nn.init.uniform_(self.spline_scaler, -self.scale_spline * bound, self.scale_spline * bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.spline_weight.is_meta:
            return
        # All edges share the grid, so one pseudo-inverse takes any noise at the inner knots to its coefficients.
        ends = torch.linspace(low, high, self.grid_size + 1, dtype=torch.float64)
        at_ends = self.spline.values(ends.unsqueeze(0)).squeeze(0).t()  # (G + 1, K)
        weight = self.spline_weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        noise = torch.rand(*weight.shape[:2], self.grid_size + 1, dtype=wide, device=weight.device) - 0.5
        scale = self.scale_noise / self.grid_size * (1.0 if self.standalone_scale else self.scale_spline)
        weight.copy_(noise @ (torch.linalg.pinv(at_ends).t() * scale).to(noise))

    def forward(self, x: Tensor) -> Tensor:
        """(*, I) -> (*, O). A ValueError if the last dimension is not I."""
        base, spline = self._weights()
        terms: list[Any] = [(self.spline, spline, *self._knots())]
        if base is not None and isinstance(self._base, Activation):
            terms.append((self._base, base.unsqueeze(-1)))
        y = basis_linear(x, terms, self.bias)
        if base is not None and not isinstance(self._base, Activation):
            y = y + F.linear(self._base_values(x), base)
        return y

    # --- The functions on the edges -----------------------------------------------------------------------------------

    def basis(self, x: Tensor, derivative: int = 0) -> Tensor:
        """The B-splines at x, or a derivative of theirs by x.

        Args:
            x: (*, I).
            derivative: Which one, from 0.

        Returns:
            (*, I, K), in float32 at least.
        """
        _check_whole(0, derivative=derivative)
        x = self._checked(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.spline.derivative(x.unsqueeze(-1), derivative, *self._knots()).squeeze(-1)

    def edge_functions(self, x: Tensor) -> Tensor:
        """Every edge's function at its input: (*, I) -> (*, O, I), which sums over I to y without the bias."""
        base, spline = self._weights()
        basis = self.basis(x)
        phi = torch.einsum("...ik,oik->...oi", basis, spline.to(basis.dtype))
        if base is not None:
            phi = phi + self._base_values(x).unsqueeze(-2) * base.to(basis.dtype)
        return phi

    def edge_scale(self, x: Tensor, normalize: bool = True) -> Tensor:
        """How much each edge's function varies over samples: its standard deviation, (O, I).

        Never makes the (N, O, I) values: with the features beta_i = (B_0 .. B_{K-1}, b) of an input, Var phi_oi =
        w_oi^T Cov(beta_i) w_oi, in N I (K+1)^2 + O I (K+1)^2 multiply-adds. Summed in float64. Differentiable in
        the weights and in x.

        Args:
            x: (*, I), N samples in all; the deviation of one sample is 0.
            normalize: Whether to divide by the inputs' own standard deviation + 0.1, as pykan does.
        """
        x = self._checked(x).reshape(-1, self.in_features)
        wide = _double(x).t()  # (I, N)
        base, spline = self._weights()
        features, weights = self.spline.values(wide, *self._knots()), _double(spline).transpose(0, 1)  # (I, O, K)
        if base is not None:
            features = torch.cat([features, _double(self._base_values(x)).t().unsqueeze(1)], 1)
            weights = torch.cat([weights, _double(base).t().unsqueeze(-1)], -1)
        divisor = max(x.shape[0] - 1, 1)
        features = features - features.mean(-1, keepdim=True)
        covariance = features @ features.mT / divisor  # (I, K + 1, K + 1)
        scale = _safe_sqrt(((weights @ covariance) * weights).sum(-1)).t()
        if normalize:
            scale = scale / (_safe_sqrt((wide - wide.mean(-1, keepdim=True)).square().sum(-1) / divisor) + 0.1)
        return scale.to(self.spline_weight)

    def to_scipy(self, o: int, i: int) -> tuple[Any, Any, int]:
        """Spline branch of edge (o, i) as (t, c, k) for `scipy.interpolate.BSpline(t, c, k, extrapolate=False)`.

        Scale and mask are in c; the base branch and the bias are not.
        """
        self._check_edge(o, i)
        knots = self.spline.knots(self.grid.new_empty(0, dtype=torch.float64).cpu(), *(g.cpu() for g in self._knots()))
        t = knots[i if len(knots) > 1 else 0]
        return t.numpy(), _double(self._weights()[1][o, i].detach()).cpu().numpy(), self.spline_order

    def plot_edge(self, o: int, i: int, ax: Any = None) -> Any:
        """Draws the function of edge (o, i) over its inner grid, knots as ticks below. Needs matplotlib.

        Args:
            o: Which output.
            i: Which input.
            ax: Where to draw, a `matplotlib.axes.Axes`; None for a new figure.

        Returns:
            The axes.
        """
        self._check_edge(o, i)
        if ax is None:
            from matplotlib import pyplot  # here: nobody pays for matplotlib who does not plot

            ax = pyplot.subplots()[1]
        t = torch.from_numpy(self.to_scipy(o, i)[0])[self.spline_order : self.spline_order + self.grid_size + 1]
        x = torch.linspace(float(t[0]), float(t[-1]), 201, dtype=self.grid.dtype, device=self.grid.device)
        with torch.no_grad():
            phi = self.subset([i], [o]).edge_functions(x.unsqueeze(-1)).flatten()
        ax.plot(x.double().cpu().numpy(), phi.double().cpu().numpy())
        ax.plot(t.numpy(), [0.02] * len(t), "|", color="0.5", transform=ax.get_xaxis_transform())
        ax.set(xlabel=f"x[{i}]", ylabel=f"phi[{o}, {i}]")
        return ax

    # --- Regularisation and pruning -----------------------------------------------------------------------------------

    def regularization_loss(self) -> Tensor:
        """Sparsity of the spline weights, as efficient-kan has it; the training loop adds it to the loss.

        With a_oi = mean_j |spline_weight_oij| of the edges that are left, S their sum and p = a / S:
        regularize_activation S - regularize_entropy sum p ln p. Exactly 0 where both factors are, as by default. The
        paper's regulariser, of the functions rather than the weights, is `activation_regularization`.
        """
        if not (self.regularize_activation or self.regularize_entropy):
            return self.spline_weight.new_zeros(())
        size = self.spline_weight.to(torch.promote_types(self.spline_weight.dtype, torch.float32)).abs().mean(-1)
        if self.mask is not None:
            size = size * self.mask
        total = size.sum()
        p = size / total.clamp(min=1e-12)
        entropy = -(p * (p + 1e-30).log()).sum()
        return (self.regularize_activation * total + self.regularize_entropy * entropy).to(self.spline_weight.dtype)

    def activation_regularization(self, x: Tensor, l1: float = 1.0, entropy: float = 2.0) -> Tensor:
        """The paper's regulariser (eqs. 2.17 to 2.20) of the edges' functions on samples, as pykan computes it.

        With v = `edge_scale(x)`, r = v / (its sum over inputs + 1) and c = v / (its sum over outputs + 1):
        l1 sum v - entropy (mean_o sum_i r log2(r + 1e-4) + mean_i sum_o c log2(c + 1e-4)).

        Args:
            x: (*, I).
            l1: Factor of the L1 norm.
            entropy: Factor of the two entropies, in bits.
        """
        v = self.edge_scale(x)
        r, c = v / (v.sum(1, keepdim=True) + 1), v / (v.sum(0, keepdim=True) + 1)
        by_output, by_input = (r * (r + 1e-4).log2()).sum(1).mean(), (c * (c + 1e-4).log2()).sum(0).mean()
        return l1 * v.sum() - entropy * (by_output + by_input)

    @torch.no_grad()
    def prune_edges_(self, threshold: float, scores: Tensor | None = None) -> None:
        """Masks the edges whose score is below a threshold; what is masked stays so.

        Args:
            threshold: In units of the scores.
            scores: (O, I), as `edge_scale(x)` gives; None for mean_j |spline_weight_oij|.
        """
        if scores is None:
            scores = self.spline_weight.abs().mean(-1)
        if tuple(scores.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"scores has shape {tuple(scores.shape)}; it must be (out_features, in_features) = "
                f"({self.out_features}, {self.in_features})"
            )
        keep = (scores >= threshold).to(self.spline_weight)
        self.mask = keep if self.mask is None else self.mask * keep

    def subset(self, in_index: Sequence[int] | Tensor, out_index: Sequence[int] | Tensor) -> "KANLinear":
        """A new layer with these inputs and outputs of this one, in this order; indices or masks of bools."""
        device = self.spline_weight.device
        inputs = _as_index("in_index", in_index, self.in_features, device)
        outputs = _as_index("out_index", out_index, self.out_features, device)
        layer = copy.deepcopy(self)
        layer._select(inputs, outputs)
        return layer

    def keep_outputs_(self, index: Sequence[int] | Tensor) -> None:
        """Keeps only these outputs, in this order. Parameters become new objects: build the optimizer again."""
        self._select(None, _as_index("index", index, self.out_features, self.spline_weight.device))

    @torch.no_grad()
    def _select(self, inputs: Tensor | None, outputs: Tensor) -> None:
        for name in ("base_weight", "spline_weight", "spline_scaler", "bias"):
            parameter = getattr(self, name)
            if parameter is not None:
                kept = parameter[outputs] if inputs is None or parameter.ndim == 1 else parameter[outputs][:, inputs]
                setattr(self, name, nn.Parameter(kept, parameter.requires_grad))
        self.out_features = len(outputs)
        if self.mask is not None:
            self.mask = self.mask[outputs] if inputs is None else self.mask[outputs][:, inputs]
        if inputs is not None:
            self.grid = self.grid[inputs]
            self.in_features = len(inputs)

    # --- The grid -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Moves the knots to where samples are, and refits each spline so that it is the same function there.

        Knots are `grid_eps` uniform + (1 - grid_eps) quantiles of each feature's samples; all else of the layer is
        untouched. `spline_weight` changes in place and now means something else: reset its optimizer state. Under DDP
        call it on every rank with the same x.

        Args:
            x: (*, I), one sample at least.
            margin: How far the uniform knots reach beyond the samples, in units of x.
        """
        x = self._samples(x)
        _check_finite(margin=margin)
        n, cells, order = x.shape[1], self.grid_size, self.spline_order
        x = x.sort(1).values
        j = torch.arange(cells + 1, device=x.device)
        step = (x[:, -1:] - x[:, :1] + 2 * margin) / cells
        inner = self.grid_eps * (x[:, :1] - margin + j * step) + (1 - self.grid_eps) * x[:, j * (n - 1) // cells]
        old, old_knots = self.spline, [g.clone() for g in self._knots()]
        self.grid.copy_(_extend(inner, order, step))
        self.spline = self._basis(None, None)
        self.spline_weight.copy_(self._refitted(x, old, old_knots))

    @torch.no_grad()
    def refine(self, grid_size: int, x: Tensor | None = None) -> None:
        """A finer grid: more cells, the same functions. Exact inside the grid if the new size is a multiple of the old.

        New inner knots divide the old ones evenly in their index. `spline_weight` becomes a new Parameter: build the
        optimizer again.

        Args:
            grid_size: New number of cells, at least the present one.
            x: (*, I), samples to refit on; None for points spread over every new cell.
        """
        _check_whole(self.grid_size, grid_size=grid_size)  # a coarser grid could not hold the function
        order, cells = self.spline_order, self.grid_size
        old, old_knots = self.spline, self._knots()
        wide = _double(self.grid)
        knots = old.knots(wide, *old_knots).expand(self.in_features, -1)[:, order : order + cells + 1]
        at = torch.arange(grid_size + 1, device=knots.device, dtype=knots.dtype) * cells / grid_size
        left = at.long().clamp(max=cells - 1)
        inner = torch.lerp(knots[:, left], knots[:, left + 1], at - left)
        self.grid_size = grid_size
        self.spline = self._basis(None, None)
        if old.start is not None and old.step is not None:
            self.spline = self._basis(old.start, old.step * cells / grid_size)
        grid = _extend(inner, order, (inner[:, -1:] - inner[:, :1]) / grid_size)
        self.grid = grid.to(self.grid)
        if x is None:
            per_cell = 2 * (order + 1)
            inside = (torch.arange(per_cell, device=grid.device, dtype=grid.dtype) + 0.5) / per_cell
            points = torch.lerp(inner[:, :-1, None], inner[:, 1:, None], inside).flatten(1)
        else:
            points = self._samples(x)
        weight = self._refitted(points, old, old_knots).to(self.spline_weight)
        self.spline_weight = nn.Parameter(weight.contiguous(), self.spline_weight.requires_grad)

    def _refitted(self, points: Tensor, old: BSpline, old_knots: Sequence[Tensor]) -> Tensor:
        """Coefficients (O, I, K) on the new grid of the old spline, by least squares at points (I, N), in float64.

        All edges of an input share one linear map from old to new coefficients: (A^T A + lambda) C = (A^T A0) C0. The
        small lambda leaves it solvable where samples do not reach a basis function, which lstsq on CUDA does not.
        """
        knots = self._knots()
        gram = points.new_zeros(len(points), self.spline.size, self.spline.size)
        cross = points.new_zeros(len(points), self.spline.size, old.size)
        step = max(1, _REFIT_BLOCK // (len(points) * self.spline.size))
        for block in points.split(step, 1):
            new_basis = self.spline.values(block, *knots)
            gram += new_basis @ new_basis.mT
            cross += new_basis @ old.values(block, *old_knots).mT
        diagonal = gram.diagonal(dim1=1, dim2=2)
        ridge = (1e-12 * diagonal.mean(1, keepdim=True)).clamp(min=torch.finfo(gram.dtype).tiny ** 0.5)
        change = torch.linalg.solve(gram + torch.diag_embed(ridge.expand_as(diagonal)), cross)  # (I, K, K old)
        return torch.einsum("ijk,oik->oij", change, _double(self.spline_weight)).to(self.spline_weight.device)

    def _basis(self, start: float | None, step: float | None) -> BSpline:
        return BSpline(self.spline_order, self.grid_size, start, step, self.extrapolation)

    def _basis_of(self, grid: Tensor) -> BSpline:
        """The basis of a grid that came from outside: uniform if all its rows are evenly spaced, and the same."""
        order, cells = self.spline_order, self.grid_size
        t = _double(grid).cpu()
        present = self.spline.knots(t) if self.spline.step is not None else t.new_full((1, 1), math.nan)
        if torch.equal(present.to(grid.dtype).expand_as(t), grid.cpu()):
            return self.spline  # keeps the exact numbers through a round trip in a coarser dtype
        start, end = float(t[0, order]), float(t[0, order + cells])
        uniform = self._basis(start, (end - start) / cells)
        # Rounding moves a knot by half a unit in the last place, and those that start and step are read from too.
        tolerance = 2 * torch.finfo(grid.dtype).eps * float(t.abs().max())
        even = start < end and bool(((t - uniform.knots(t)).abs() <= tolerance).all())
        return uniform if even else self._basis(None, None)

    # --- State --------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved, grid = prefix + "mask" in state_dict, state_dict.get(prefix + "grid")
        if saved and self.mask is None:
            self.mask = torch.ones_like(self.spline_weight[..., 0], requires_grad=False)
        elif not saved and prefix + "spline_weight" in state_dict:
            self.mask = None  # saved before anything was pruned
        super()._load_from_state_dict(state_dict, prefix, *args)
        if grid is not None and grid.shape == self.grid.shape and not grid.is_meta:
            self.spline = self._basis_of(grid)

    @classmethod
    @torch.no_grad()
    def from_pykan(cls, layer: Any) -> "KANLinear":
        """The same functions as a `kan.KANLayer` (pykan 0.2.8), with `standalone_scale` and a bias of 0.

        Args:
            layer: Anything with pykan's `coef` (I, O, K), `grid` (I, T), `scale_base`, `scale_sp`, `mask` (I, O), `k`,
                `base_fun` and `grid_eps`.
        """
        coef, grid, order = layer.coef.detach(), layer.grid.detach(), int(layer.k)
        cells = grid.shape[1] - 2 * order - 1
        if coef.ndim != 3 or coef.shape[2] != cells + order:
            raise ValueError(
                f"layer: coef {tuple(coef.shape)}, grid {tuple(grid.shape)} and k={order} do not belong together; "
                "coef must be (I, O, G + k) and grid (I, G + 2 k + 1)"
            )
        inner = grid[:, order : order + cells + 1]
        new = cls(
            *coef.shape[:2],
            grid_size=cells,
            spline_order=order,
            grid_range=(float(inner.min()), float(inner.max())),
            grid_eps=float(layer.grid_eps),
            base_activation=layer.base_fun,
            standalone_scale=True,
            device="meta",
            dtype=coef.dtype,
        ).to_empty(device=coef.device)
        state = {
            "base_weight": layer.scale_base.t(),
            "spline_weight": coef.permute(1, 0, 2),
            "spline_scaler": layer.scale_sp.t(),
            "bias": coef.new_zeros(coef.shape[1]),
            "grid": grid,
            "mask": layer.mask.t(),
        }
        if bool((layer.mask == 1).all()):
            del state["mask"]
        if new.base_weight is None:
            del state["base_weight"]
        new.load_state_dict(state)
        return new

    def to_pykan_state_dict(self) -> dict[str, Tensor]:
        """What `kan.KANLayer.load_state_dict` takes. pykan has no bias: this layer's is left out."""
        ones = torch.ones_like(self.spline_weight[..., 0])
        parts = {
            "scale_base": torch.zeros_like(ones) if self.base_weight is None else self.base_weight,
            "scale_sp": ones if self.spline_scaler is None else self.spline_scaler,
            "mask": ones if self.mask is None else self.mask,
        }
        state = {name: part.detach().t().clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
        coef = self.spline_weight.detach().permute(1, 0, 2)
        return {"grid": self.grid.clone(), "coef": coef.clone(memory_format=torch.contiguous_format), **state}

    def extra_repr(self) -> str:
        """Sizes and options."""
        pruned = "" if self.mask is None else f", pruned={int((self.mask == 0).sum())}"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, grid_size={self.grid_size}, "
            f"spline_order={self.spline_order}, grid_range={self.grid_range}, "
            f"base_activation={self.base_activation!r}, standalone_scale={self.standalone_scale}, "
            f"extrapolation={self.extrapolation!r}{pruned}"
        )

    # --- Small helpers ------------------------------------------------------------------------------------------------

    def _knots(self) -> tuple[Tensor, ...]:
        """The tensors that `self.spline` takes: none on a uniform grid."""
        return () if self.spline.step is not None else (self.grid,)

    def _weights(self) -> tuple[Tensor | None, Tensor]:
        """Weights of base and spline branch, with scale and mask in them."""
        base: Tensor | None = self.base_weight
        gain: Tensor | None = self.spline_scaler
        if self.mask is not None:
            base = None if base is None else base * self.mask
            gain = self.mask if gain is None else gain * self.mask
        return base, self.spline_weight if gain is None else self.spline_weight * gain.unsqueeze(-1)

    def _base_values(self, x: Tensor) -> Tensor:
        assert self._base is not None
        return self._base(x)

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but its last dimension must be in_features={self.in_features}"
            )
        return x

    def _samples(self, x: Tensor) -> Tensor:
        """Samples (*, I) as (I, N) in float64; refuses none, and what is not finite."""
        x = _double(self._checked(x)).reshape(-1, self.in_features).t()
        if x.shape[1] == 0 or not bool(x.isfinite().all()):
            raise ValueError(f"x: {x.shape[1]} samples; the grid needs at least one, and all finite")
        return x

    def _check_edge(self, o: int, i: int) -> None:
        for name, index, size in (("o", o, self.out_features), ("i", i, self.in_features)):
            if not 0 <= index < size:
                raise ValueError(f"{name}={index}: must lie from 0 to {size - 1}")


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _safe_sqrt(x: Tensor) -> Tensor:
    """The root, with gradient 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def _extend(inner: Tensor, order: int, step: Tensor) -> Tensor:
    """Adds `order` knots at a distance `step` on each side of inner knots (I, G + 1)."""
    j = torch.arange(1, order + 1, device=inner.device)
    return torch.cat([inner[:, :1] - step * j.flip(0), inner, inner[:, -1:] + step * j], 1)
