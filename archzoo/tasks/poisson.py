"""Solving Poisson's equation from its residual: section 3.4 of the KAN paper (Liu et al. 2024, arXiv 2404.19756)."""

from collections.abc import Callable, Mapping, Sequence
from math import pi
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from archzoo.pictures import Picture, compared, outputs
from archzoo.tasks.options import choice, number, whole_number
from archzoo.tasks.split import SPLIT_SEED
from archzoo.tasks.task import RegressionTask, TensorSplit, register_task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

U, F, ON_BOUNDARY = 0, 1, 2
"""Columns of the targets."""

CELLS = 80
"""Cells of the picture, along each side."""
CHUNK = 4096  # points at once where the errors of a whole split are computed


def _sine_y2(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """u = sin(pi x) sin(pi y^2) and its Laplacian."""
    u = torch.sin(pi * x) * torch.sin(pi * y**2)
    return u, -(pi**2) * (1 + 4 * y**2) * u + 2 * pi * torch.sin(pi * x) * torch.cos(pi * y**2)


def _sine_y(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """u = sin(pi x) sin(pi y) and its Laplacian."""
    u = torch.sin(pi * x) * torch.sin(pi * y)
    return u, -2 * pi**2 * u


SOLUTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {"sine_y2": _sine_y2, "sine_y": _sine_y}


@register_task("poisson")
class Poisson(RegressionTask):
    r"""u_xx + u_yy = f on [-1, 1]^2, u = 0 on the boundary, from f alone: a physics-informed network.

    | solution | u |
    |---|---|
    | `sine_y2` | sin(pi x) sin(pi y^2), the paper's |
    | `sine_y` | sin(pi x) sin(pi y), that of pykan's example; then f = -2 pi^2 u |

    Training points are uniform in the square and, a quarter on each side, on its boundary; the loss is
    alpha mean (u_xx + u_yy - f)^2 over those inside, plus mean u^2 over those on the boundary. A batch is any part of
    them, its loss an unbiased estimate of that: to have it exactly, as L-BFGS needs, let trainer.batch_size be their
    number, or larger. The model is differentiated twice by its inputs, so that it cannot be compiled, and its outputs
    must each depend on their own input alone (no batch norm).

    Validation and test points are two grids of cells' midpoints, with `eval_side - 1` and `eval_side` cells a side. The
    score is the root mean squared error of u there; the metric `loss` is its square. `summarize` gives the errors of
    the paper's figure 3.3, on the test grid and for the weights at the end of training.

    Targets of every split are (n, 3): u, f, and 1 on the boundary, else 0. They are float64, so that a float64 model
    gets them exact. In training u is used on the boundary only.

    Args:
        solution: Which one.
        n_interior: Number of training points inside.
        n_boundary: Number of those on the boundary.
        alpha: Weight of the equation against the boundary.
        eval_side: Points a side of the test grid.
        data_dir: Not needed.
        seed: Not needed: the points are the same in every run.

    Raises:
        ValueError: If there is no such solution, or another option is out of range.
    """

    train: TensorSplit
    val: TensorSplit
    test: TensorSplit
    input_shape = (2,)
    compilable: ClassVar[bool] = False

    def __init__(
        self,
        *,
        solution: str = "sine_y2",
        n_interior: int = 10_000,
        n_boundary: int = 800,
        alpha: float = 0.01,
        eval_side: int = 100,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        self.solution = SOLUTIONS[choice("solution", solution, SOLUTIONS)]
        whole_number("n_interior", n_interior, 1, 2**24)
        whole_number("n_boundary", n_boundary, 1, 2**24)
        whole_number("eval_side", eval_side, 2, 2**12)
        if number("alpha", alpha, 0.0, 1e6) == 0:
            raise ValueError(f"alpha={alpha}: must be above 0, or the equation would have no part in the loss")
        inside = np.random.RandomState([SPLIT_SEED, 0]).uniform(-1, 1, (n_interior, 2))
        along = np.random.RandomState([SPLIT_SEED, 1]).uniform(-1, 1, n_boundary)
        end = np.where(np.arange(n_boundary) % 4 < 2, -1.0, 1.0)
        vertical = np.arange(n_boundary) % 2 == 0
        border = np.stack([np.where(vertical, end, along), np.where(vertical, along, end)], axis=1)
        self.train = self._split(np.concatenate([inside, border]), on_boundary=n_boundary)
        self.val, self.test = (self._split(_midpoints(side)) for side in (eval_side - 1, eval_side))
        # Of each point in the mean over a batch, whose expectation is then the loss.
        self.weights = alpha * len(self.train) / n_interior, len(self.train) / n_boundary

    def _split(self, points: np.ndarray, on_boundary: int = 0) -> TensorSplit:
        """Points, the last `on_boundary` of which lie there."""
        inputs = torch.from_numpy(points.astype(np.float32))
        u, f = self.solution(*inputs.double().unbind(1))  # of the very inputs that the model gets
        flag = torch.zeros(len(points), dtype=torch.float64)
        if on_boundary:
            flag[-on_boundary:] = 1
            u[-on_boundary:] = 0  # and not 1e-16, what the sine of pi is
        return TensorSplit(inputs, torch.stack([u, f, flag], dim=1))

    def training_loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Weighted residuals: of the equation inside, of u on the boundary."""
        u, f, flag = targets.unbind(1)
        output, _, laplacian = derivatives(model, inputs)
        inside, border = self.weights
        return torch.where(flag > 0, border * (output - u).square(), inside * (laplacian - f).square()).mean()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of outputs (batch, 1) as u. Training minimises `training_loss`, which does not know u."""
        return nn.functional.mse_loss(output, target[:, U : U + 1].to(output.dtype))

    def metrics(self) -> "MetricCollection":
        """Root of the mean squared error of u, and the loss, its square."""
        from torchmetrics import MeanSquaredError, MetricCollection

        from archzoo.tasks.metrics import mean_loss

        class ErrorOfU(MeanSquaredError):
            def update(self, output: Tensor, target: Tensor) -> None:
                super().update(output, target[:, U : U + 1].to(output.dtype).contiguous())

        return MetricCollection({"rmse": ErrorOfU(squared=False), "loss": mean_loss(self.loss)})

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, float]:
        """Squared errors of the model at the end of training, as means over the test grid.

        `l2_squared`: of u. `h1_squared`: of u and of its gradient, |e|^2 + |grad e|^2. `residual`: of the equation.
        """
        parameter = next(model.parameters())
        was_training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for points in self.test.inputs.split(CHUNK):
            x = points.to(parameter)
            exact = derivatives(lambda x: self.solution(*x.unbind(1))[0].unsqueeze(1), x.double())
            u, gradient, laplacian = (
                a.detach() - b.detach() for a, b in zip(derivatives(model, x), exact, strict=True)
            )
            l2 = u.square().sum()
            sums += torch.stack([l2, l2 + gradient.square().sum(), laplacian.square().sum()]).cpu()
        model.train(was_training)
        return dict(zip(("l2_squared", "h1_squared", "residual"), (sums / len(self.test)).tolist(), strict=True))

    def pictures(self, model: nn.Module) -> dict[str, Picture]:
        """The solution, and the model's, over the square."""
        points = torch.from_numpy(_midpoints(CELLS))
        exact, _ = self.solution(*points.unbind(1))
        target, output = (u.reshape(CELLS, CELLS).T for u in (exact, outputs(model, points)))
        return {"solution": Picture(compared(target, output, (-1, 1, -1, 1)), "u over the square, x to the right.")}


def derivatives(model: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A scalar function of the plane at points x (n, 2): its value (n,), gradient (n, 2) and Laplacian (n,).

    Each can be differentiated by the model's parameters, also where gradients are otherwise disabled.

    Args:
        model: Maps (n, 2) to (n, 1), each row by itself.
        x: The points; they may require gradients or not.

    Raises:
        ValueError: If the model normalises over the batch.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        with _DifferentiableNorms():
            u = model(x).squeeze(1)
        (gradient,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        laplacian = torch.zeros_like(u)
        for axis in range(x.shape[1]):
            # What is linear has no second derivative in the graph: it is 0.
            (second,) = torch.autograd.grad(gradient[:, axis].sum(), x, create_graph=True, materialize_grads=True)
            laplacian = laplacian + second[:, axis]
    return u, gradient, laplacian


class _DifferentiableNorms(TorchFunctionMode):
    """Layer norm in plain operations: of torch's own, third derivatives are wrong, silently (pytorch#175754)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.functional.layer_norm, torch.layer_norm):
            return _layer_norm(*args, **kwargs)
        if func is nn.functional.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            raise ValueError(
                "model: batch normalisation mixes the points, and leaves no function whose "
                "derivatives could be taken; use model.norm=layer or model.norm=none"
            )
        return func(*args, **kwargs)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """`torch.layer_norm`, at least in float32."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    y = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _midpoints(side: int) -> np.ndarray:
    """Midpoints of side x side equal cells of the square, (side^2, 2). Odd and even sides share none."""
    middle = (2 * np.arange(side) + 1) / side - 1
    return np.stack(np.meshgrid(middle, middle, indexing="ij"), axis=-1).reshape(-1, 2)
