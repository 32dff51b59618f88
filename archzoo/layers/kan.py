"""KAN: a layer whose every edge carries a learned function, a B-spline plus a base (https://arxiv.org/abs/2404.19756)."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.layers._check import typed
from archzoo.layers._kan import _as_index, _check_whole
from archzoo.layers._splines import _double, _Splines
from archzoo.layers._start_kan import _FromLinear
from archzoo.registry import Card, register_layer


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
        "Poisson equation: MSE 1.2e-6 with 281 parameters, 6e-7 with 1,093, against 4.9e-6 and 3.6e-6 of equal MLPs "
        "(experiment kan_pde). Error against parameters: experiment kan_functions, exponents of 0.3 to 2",
    ),
)
class KANLinear(_Splines, _FromLinear):
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

    Start: `from_linear` has `extrapolation="linear"` unless given, and is then exact: the coefficients of x are known,
    `base_weight` is 0 and `spline_scaler` 1, and all are trained. With another extrapolation the function holds on the
    grid only, and the error is what that loses: 0.65 for "zero" on (-1, 1), 0.01 on (-3, 3). `spline_order=0`, in
    steps, comes near to x, together with the base. With the base "identity" that is all, and exact everywhere.

    Shape: (*, I) -> (*, O).

    Raises:
        ValueError: If an argument is out of range.
    """

    @typed
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
        super().__init__(in_features, out_features, bias, device, dtype)
        self._build(
            grid_size=grid_size,
            spline_order=spline_order,
            grid_range=grid_range,
            grid_eps=grid_eps,
            base_activation=base_activation,
            standalone_scale=standalone_scale,
            scale_noise=scale_noise,
            scale_base=scale_base,
            scale_spline=scale_spline,
            extrapolation=extrapolation,
            regularize_activation=regularize_activation,
            regularize_entropy=regularize_entropy,
        )

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
        x = self._rows(x)
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

    def subset(self, in_index: Sequence[int] | Tensor, out_index: Sequence[int] | Tensor) -> "KANLinear":
        """A new layer with these inputs and outputs of this one, in this order; indices or masks of bools."""
        device = self.spline_weight.device
        inputs = _as_index("in_index", in_index, self.in_features, device)
        outputs = _as_index("out_index", out_index, self.out_features, device)
        layer = copy.deepcopy(self)
        layer.keep_outputs_(outputs)
        layer.in_features, layer.grid = len(inputs), layer.grid[inputs]
        if layer.mask is not None:
            layer.mask = layer.mask[:, inputs]
        for name in ("base_weight", "spline_weight", "spline_scaler"):
            old = getattr(layer, name)
            if old is not None:
                setattr(layer, name, nn.Parameter(old.detach()[:, inputs], old.requires_grad))
        return layer

    # --- The way to and from pykan ---------------------------------------------------------------------------------

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

    def _check_edge(self, o: int, i: int) -> None:
        for name, index, size in (("o", o, self.out_features), ("i", i, self.in_features)):
            if not 0 <= index < size:
                raise ValueError(f"{name}={index}: must lie from 0 to {size - 1}")


def _safe_sqrt(x: Tensor) -> Tensor:
    """The root, with gradient 0 at 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)
