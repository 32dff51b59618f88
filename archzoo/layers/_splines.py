"""What the B-spline KAN layers share, linear or convolutional: a grid for each input, and splines on it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from archzoo.kernels.activation import Activation, as_activation
from archzoo.kernels.kan_spline import OUTSIDE, BSpline
from archzoo.layers._kan import _check_finite, _check_whole, _checked_range, _is_finite, _KANLinear
from archzoo.layers._start_kan import _is_identity, _no_deviation, _normal, _on_edges, _start_branches

_REFIT_BLOCK = 2**20  # elements of a block's bases, while a spline is fitted anew


class _Splines(_KANLinear):
    """State and methods of both forms. A parameter is one number an edge, (O, I), or K of them, (O, I, K).

    A convolution has edges for each tap too: (O, C/groups, kh, kw) and (O, C/groups, K, kh, kw).

    `spline` is the basis. Whether its knots are uniform is its attribute, set whenever the grid is, and never read off
    the values of `grid`: compilation and export allow no look at them.
    """

    base_weight: nn.Parameter | None
    spline_weight: nn.Parameter
    spline_scaler: nn.Parameter | None
    grid: Tensor
    mask: Tensor | None

    _start_options: ClassVar[dict[str, Any]] = {"extrapolation": "linear"}
    _nearer = "spline_order=1 or more holds x on the grid, and base_activation='identity' everywhere"

    def _build(
        self,
        *,
        grid_size: int,
        spline_order: int,
        grid_range: Sequence[float],
        grid_eps: float,
        base_activation: str | Callable[[Tensor], Tensor] | None,
        standalone_scale: bool,
        scale_noise: float,
        scale_base: float,
        scale_spline: float,
        extrapolation: str,
        regularize_activation: float,
        regularize_entropy: float,
    ) -> None:
        _check_whole(1, grid_size=grid_size)
        _check_whole(0, spline_order=spline_order)
        _check_finite(scale_noise=scale_noise, scale_base=scale_base, scale_spline=scale_spline)
        _check_finite(regularize_activation=regularize_activation, regularize_entropy=regularize_entropy)
        if not (_is_finite(grid_eps) and 0 <= grid_eps <= 1):
            raise ValueError(f"grid_eps={grid_eps!r}: must lie from 0 (quantiles) to 1 (uniform)")
        if extrapolation not in OUTSIDE:
            raise ValueError(f"extrapolation={extrapolation!r}: must be one of {', '.join(map(repr, OUTSIDE))}")
        self.grid_size, self.spline_order = grid_size, spline_order
        self.grid_range, self.grid_eps = _checked_range(grid_range), float(grid_eps)
        self.standalone_scale, self.scale_noise = standalone_scale, scale_noise
        self.scale_base, self.scale_spline = scale_base, scale_spline
        self.extrapolation = extrapolation
        self.regularize_activation, self.regularize_entropy = regularize_activation, regularize_entropy
        self.base_activation = base_activation
        self._base = as_activation(base_activation)
        self.base_weight = None if self._base is None else self._weight()
        self.spline_weight = self._weight(grid_size + spline_order)
        self.spline_scaler = self._weight() if standalone_scale else None
        knots = grid_size + 2 * spline_order + 1
        self.register_buffer("grid", torch.empty(self._features, knots, **self._factory))
        self.register_buffer("mask", None)
        self.reset_parameters()

    @property
    def _per_output(self) -> tuple[str, ...]:
        return "base_weight", "spline_weight", "spline_scaler", "bias", "mask"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to a uniform grid over `grid_range`, no pruned edge, and new random weights."""
        low, high = self.grid_range
        self.mask = None
        self.spline = self._basis(low, (high - low) / self.grid_size)
        self.grid.copy_(self.spline.knots(self.grid.new_empty(0, dtype=torch.float64)))
        bound = self._fan_in**-0.5
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
        before, after = self._edges
        noise = torch.rand(*before, *after, self.grid_size + 1, dtype=wide, device=weight.device) - 0.5
        scale = self.scale_noise / self.grid_size * (1.0 if self.standalone_scale else self.scale_spline)
        weight.copy_((noise @ (torch.linalg.pinv(at_ends).t() * scale).to(noise)).movedim(-1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """As the usual layer. A ValueError if x has another number of features."""
        base, spline = self._weights()
        terms: list[Any] = [(self.spline, spline, *self._knots())]
        if base is not None and isinstance(self._base, Activation):
            terms.append((self._base, base.unsqueeze(2)))
        y = self._sum(x, terms)
        if base is not None and not isinstance(self._base, Activation):
            y = y + self._map(self._base_values, x, base)
        return y

    @torch.no_grad()
    def _become(self, weight: Tensor) -> Tensor:
        if self.spline_scaler is not None:
            nn.init.ones_(self.spline_scaler)
        if self.spline_order == 0 or _is_identity(self._base):
            return _start_branches(self, weight, self.spline.values, self._nearer)
        # A spline whose coefficients are the Greville abscissae, means of k knots, is x on the inner grid.
        points = _normal()[0].unsqueeze(0)
        c = self.spline.knots(points)[:, 1:-1].unfold(1, self.spline_order, 1).mean(-1)
        self.spline_weight.copy_(_on_edges(weight, c))
        if self.base_weight is not None:
            nn.init.zeros_(self.base_weight)
        if self.extrapolation == "linear":
            return _no_deviation()
        return (c.unsqueeze(1) @ self.spline.values(points)).squeeze(1) - points

    # --- Regularisation and pruning -----------------------------------------------------------------------------------

    def regularization_loss(self) -> Tensor:
        """Sparsity of the spline weights, as efficient-kan has it; the training loop adds it to the loss.

        With a_oi = mean_j |spline_weight_oij| of the edges that are left, S their sum and p = a / S:
        regularize_activation S - regularize_entropy sum p ln p. Exactly 0 where both factors are, as by default. The
        paper's regulariser, of the functions rather than the weights, is `activation_regularization`.
        """
        if not (self.regularize_activation or self.regularize_entropy):
            return self.spline_weight.new_zeros(())
        size = self.spline_weight.to(torch.promote_types(self.spline_weight.dtype, torch.float32)).abs().mean(2)
        if self.mask is not None:
            size = size * self.mask
        total = size.sum()
        p = size / total.clamp(min=1e-12)
        entropy = -(p * (p + 1e-30).log()).sum()
        return (self.regularize_activation * total + self.regularize_entropy * entropy).to(self.spline_weight.dtype)

    @torch.no_grad()
    def prune_edges_(self, threshold: float, scores: Tensor | None = None) -> None:
        """Masks the edges whose score is below a threshold; what is masked stays so.

        Args:
            threshold: In units of the scores.
            scores: One an edge, (O, I) as `KANLinear.edge_scale(x)` gives; None for mean_j |spline_weight_oij|.
        """
        if scores is None:
            scores = self.spline_weight.abs().mean(2)
        before, after = self._edges
        if tuple(scores.shape) != (*before, *after):
            raise ValueError(
                f"scores has shape {tuple(scores.shape)}; it must be one number an edge, {(*before, *after)}"
            )
        keep = (scores >= threshold).to(self.spline_weight)
        self.mask = keep if self.mask is None else self.mask * keep

    # --- The grid -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01) -> None:
        """Moves the knots to where samples are, and refits each spline so that it is the same function there.

        Knots are `grid_eps` uniform + (1 - grid_eps) quantiles of each feature's samples; all else of the layer is
        untouched. `spline_weight` changes in place and now means something else: reset its optimizer state. Under DDP
        call it on every rank with the same x.

        Args:
            x: A batch of inputs, one sample at least.
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
        self.spline = self._basis_of(self.grid)  # as whoever loads it will see it
        self.spline_weight.copy_(self._refitted(x, old, old_knots))

    @torch.no_grad()
    def refine(self, grid_size: int, x: Tensor | None = None) -> None:
        """A finer grid: more cells, the same functions. Exact inside the grid if the new size is a multiple of the old.

        New inner knots divide the old ones evenly in their index. `spline_weight` becomes a new Parameter: build the
        optimizer again.

        Args:
            grid_size: New number of cells, at least the present one.
            x: A batch of inputs to refit on; None for points spread over every new cell.
        """
        _check_whole(self.grid_size, grid_size=grid_size)  # a coarser grid could not hold the function
        order, cells = self.spline_order, self.grid_size
        old, old_knots = self.spline, self._knots()
        wide = _double(self.grid)
        knots = old.knots(wide, *old_knots).expand(self._features, -1)[:, order : order + cells + 1]
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
        """The weight on the new grid of the old spline, by least squares at points (I, N), in float64.

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
        # A convolution's groups have channels of their own: (groups, I/groups, ...).
        old_weight = (
            _double(self.spline_weight).flatten(3) if self.spline_weight.ndim > 3 else self.spline_weight[..., None]
        )
        per_group = old_weight.shape[1]
        groups = len(points) // per_group
        change, old_weight = change.unflatten(0, (groups, per_group)), _double(old_weight).unflatten(0, (groups, -1))
        new_weight = torch.einsum("gijk,goikt->goijt", change, old_weight).flatten(0, 1)
        before, after = self._edges
        return new_weight.reshape(*before, -1, *after).to(self.spline_weight.device)

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
            self.mask = torch.ones_like(self.spline_weight[:, :, 0], requires_grad=False)
        elif not saved and prefix + "spline_weight" in state_dict:
            self.mask = None  # saved before anything was pruned
        super()._load_from_state_dict(state_dict, prefix, *args)
        if grid is not None and grid.shape == self.grid.shape and not grid.is_meta:
            self.spline = self._basis_of(grid)

    def _options(self) -> str:
        pruned = ""
        if self.mask is not None and not self.mask.is_meta:
            pruned = f", pruned={int((self.mask == 0).sum())}"
        return (
            f", grid_size={self.grid_size}, spline_order={self.spline_order}, grid_range={self.grid_range}, "
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
        return base, self.spline_weight if gain is None else self.spline_weight * gain.unsqueeze(2)

    def _base_values(self, x: Tensor) -> Tensor:
        assert self._base is not None
        return self._base(x)

    def _samples(self, x: Tensor) -> Tensor:
        """Samples as (I, N) in float64; refuses none, and what is not finite."""
        x = _double(self._rows(x)).t()
        if x.shape[1] == 0 or not bool(x.isfinite().all()):
            raise ValueError(f"x: {x.shape[1]} samples; the grid needs at least one, and all finite")
        return x


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _extend(inner: Tensor, order: int, step: Tensor) -> Tensor:
    """Adds `order` knots at a distance `step` on each side of inner knots (I, G + 1)."""
    j = torch.arange(1, order + 1, device=inner.device)
    return torch.cat([inner[:, :1] - step * j.flip(0), inner, inner[:, -1:] + step * j], 1)
