"""Draws the README's pictures of a KAN: from data to a formula, and a fit over training. Writes docs/kan_*.png.

The network [2, 5, 1] is trained on exp(sin(pi x) + y^2), 1000 points, float64, by L-BFGS: for sparsity, then pruned,
then with formulas in the place of its splines. Half a minute on one CPU thread.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from archzoo.models.kan import KAN

DOCS = Path(__file__).parents[1] / "docs"
SPARSITY = 0.01  # factor of the paper's regulariser
STEPS = (0, 5, 10, 20, 50, 100)  # iterations of L-BFGS that the strip shows


def target(x: Tensor) -> Tensor:
    return torch.exp(torch.sin(torch.pi * x[..., :1]) + x[..., 1:2] ** 2)


def train(model: KAN, x: Tensor, steps: int, sparsity: float = 0.0) -> float:
    """RMSE after that many iterations of L-BFGS."""
    y = target(x)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, history_size=50, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = (model(x) - y).square().mean()
        if sparsity:
            error = error + sparsity * model.regularization_loss(x)
        error.backward()
        return error.detach()

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        return float((model(x) - y).square().mean().sqrt())


def story(path: Path, seed: int) -> None:
    """The network when trained, pruned, and read as a formula."""
    from matplotlib import pyplot

    torch.manual_seed(seed)
    x = 2 * torch.rand(1000, 2, dtype=torch.float64) - 1
    model = KAN([2, 5, 1], grid_size=5, dtype=torch.float64)
    figure = pyplot.figure(figsize=(9.6, 3.5))
    parts = figure.subfigures(1, 3, width_ratios=(2.5, 1, 1))
    axes = [part.add_axes((0.02, 0.0, 0.96, 0.88)) for part in parts]
    names = {"input_names": ["$x$", "$y$"], "output_names": ["$f$"]}
    rmse = train(model, x, 15, SPARSITY)
    model.plot(x, axes[0], **names)
    titles = [f"15 iterations: RMSE {rmse:.2f}"]
    train(model, x, 185, SPARSITY)
    model.prune_edges(x)
    model.prune_nodes(x)
    rmse = train(model, x, 100)
    model.plot(x, axes[1], **names)
    titles.append(f"sparse, pruned: {rmse:.3f}")
    model.auto_symbolic(x, names=["x", "x^2", "sin", "exp", "log", "sqrt", "tanh"])
    rmse = train(model, x, 200)
    model.plot(x, axes[2], **names)
    formula = model.formula(["x", "y"], tolerance=1e-3)
    titles.append(as_text(formula))
    print(f"formula {formula}: rmse {rmse:.1e}")
    for part, title in zip(parts, titles, strict=True):
        part.text(0.5, 0.94, title, ha="center", va="center", fontsize=11)
    figure.savefig(path, dpi=160)


def as_text(formula: object) -> str:
    import sympy

    return f"${sympy.latex(formula)}$"


def strip(path: Path, seed: int) -> None:
    """What the network computes after some iterations, on one colour scale, with the error of each."""
    from matplotlib import pyplot

    torch.manual_seed(seed)
    x = 2 * torch.rand(1000, 2, dtype=torch.float64) - 1
    side = torch.linspace(-1, 1, 81, dtype=torch.float64)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    model = KAN([2, 5, 1], grid_size=5, dtype=torch.float64)
    figure, axes = pyplot.subplots(1, len(STEPS) + 1, figsize=(10.5, 1.95), layout="constrained", sharey=True)
    truth = target(plane)[..., 0]
    levels = torch.linspace(0, float(truth.max()), 13).tolist()
    for ax, (before, step) in zip(axes, zip((0, *STEPS), STEPS, strict=False), strict=False):
        if step:
            train(model, x, step - before)
        with torch.no_grad():
            values = model(plane)[..., 0]
            rmse = float((values - truth).square().mean().sqrt())
        mesh = ax.contourf(side, side, values.numpy(), levels=levels, extend="both", cmap="viridis")
        ax.set_title(f"{step} iterations\nRMSE {rmse:.2g}", fontsize=8)
    axes[-1].contourf(side, side, truth.numpy(), levels=levels, extend="both", cmap="viridis")
    axes[-1].set_title("target\n$\\exp(\\sin\\,\\pi x + y^2)$", fontsize=8)
    for ax in axes:
        ax.set(aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1), xlabel="$x$")
        ax.tick_params(labelsize=7)
    axes[0].set_ylabel("$y$")
    bar = figure.colorbar(mesh, ax=axes, shrink=0.85, pad=0.01, ticks=[0, 2, 4, 6])
    bar.ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=160)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kan_pictures", description=__doc__)
    parser.add_argument("--folder", type=Path, default=DOCS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    for name, draw in (("kan_story", story), ("kan_fit", strip)):
        draw(args.folder / f"{name}.png", args.seed)
        print(f"wrote {args.folder / name}.png")
