"""Samples of a distribution from noise: shapes in the plane, or small images. A task for one-step generators."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from archzoo.names import suggest
from archzoo.pictures import Picture, outputs, tiles
from archzoo.tasks.autoencoding import Autoencoding
from archzoo.tasks.options import whole_number
from archzoo.tasks.shapes import SHAPES
from archzoo.tasks.split import SPLIT_SEED
from archzoo.tasks.stream import BlockStream, block_generator, stream_key
from archzoo.tasks.task import Task, TensorSplit, register_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torchmetrics import MetricCollection

IMAGES = ("mnist", "fashion_mnist", "digits")
BLOCK = 256
PURPOSE = 4_251_008  # of the stream's key
SHOWN = 10
COMPARED = 200
"""Samples of the figures that `summarize` takes from a flow."""

Draw = Callable[[np.random.RandomState, int], np.ndarray]


class Pairs(BlockStream):
    """Endless pairs of noise and data, drawn independently.

    Args:
        draw: Draws data, (count, *shape).
        shape: Of one point.
        seed: Of the stream.
    """

    def __init__(self, draw: Draw, shape: tuple[int, ...], seed: int):
        super().__init__(BLOCK)
        self.draw, self.shape, self.key = draw, shape, stream_key(seed, PURPOSE)

    def draw_block(self, number: int) -> tuple[Tensor, Tensor]:
        """Noise (BLOCK, *shape) and data (BLOCK, size)."""
        return pairs(block_generator(self.key, number), self.draw, self.shape, BLOCK)


def pairs(rng: np.random.RandomState, draw: Draw, shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """Noise (count, *shape) and data (count, size), float32."""
    noise = rng.standard_normal((count, *shape)).astype(np.float32)
    return torch.from_numpy(noise), torch.from_numpy(draw(rng, count).astype(np.float32)).flatten(1)


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of points (n, size), (m, size): 0 for the same distribution.

    Pairs of different points only, so that it is unbiased, and may fall below 0; of one point, with itself.
    """

    # By matrix products where there are many coordinates: many times faster, at differences of 1e-4 of the distances.
    mode = "use_mm_for_euclid_dist" if a.shape[1] > 32 else "donot_use_mm_for_euclid_dist"

    def within(x: Tensor) -> Tensor:
        same = torch.eye(len(x), dtype=torch.bool, device=x.device)
        return torch.cdist(x, x, compute_mode=mode).masked_fill(same, 0).sum() / max(1, len(x) * (len(x) - 1))

    across = torch.cdist(a, b, compute_mode=mode).mean()
    return 2 * across - within(a) - within(b)


@register_task("flow_matching")
class FlowMatching(Task):
    """Turn normal noise into samples of a distribution, in one pass through the model.

    A model that brings a loss of its own, as `linear_flow`, is trained by that; any other one by the energy distance
    between what it makes of a batch's noise and the batch's data. The score is the energy distance between samples and
    held-out data, as a fraction of that between normal noise and the data: 0 is perfect, 1 as bad as noise.

    Of a model with a `LinearFlow` as `flow`, `summarize` tells how far its one step is the many, and how well data
    comes back from the noise that the pseudo-inverse encodes it into, both as PSNR in decibels.

    Args:
        dataset: A shape in the plane: `"two_moons"`, `"eight_gaussians"`, `"checkerboard"`, `"circles"`; or images with
            pixels from 0 to 1: `"mnist"` and `"fashion_mnist"`, with a frame to 32 x 32 pixels, or `"digits"`, 8 x 8.
        eval_size: Samples to validate on, and others to test on.
        data_dir: As in the task `mnist`; not needed for shapes and digits.
        seed: Seed of the training stream.

    Raises:
        DatasetError: If images are not to be had.
        ValueError: If an option is wrong.
    """

    stream = True
    score = "energy_ratio"
    mode: Literal["max", "min"] = "min"
    train: Pairs
    test: TensorSplit

    def __init__(
        self, *, dataset: str = "two_moons", eval_size: int = 1000, data_dir: Path | None = None, seed: int = 0
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        if dataset not in (*SHAPES, *IMAGES):
            raise ValueError(
                f"dataset={dataset!r}: there is no such data set; {suggest(str(dataset), [*SHAPES, *IMAGES])}"
            )
        held_out: tuple[Draw, Draw]
        if dataset in SHAPES:
            whole_number("eval_size", eval_size, 2, 10**5)
            self.input_shape, draw = (2,), SHAPES[dataset]
            held_out = draw, draw
        else:
            parts = Autoencoding(dataset=dataset, data_dir=data_dir)
            frame = 0 if dataset == "digits" else 2
            splits: tuple[Any, ...] = parts.train, parts.val, parts.test
            images = [_framed(part.images, frame) for part in splits]
            whole_number("eval_size", eval_size, 2, min(len(images[1]), len(images[2])))
            self.input_shape, self.pixel_range = images[0].shape[1:], (0.0, 1.0)
            white = parts.train.white
            draw = _picker(images[0], white)
            held_out = _firsts(images[1], white), _firsts(images[2], white)
        self.output_size = int(np.prod(self.input_shape))
        self.train = Pairs(draw, self.input_shape, seed)
        self.val, self.test = (
            TensorSplit(*pairs(np.random.RandomState([SPLIT_SEED, part]), draw, self.input_shape, eval_size))
            for part, draw in enumerate(held_out)
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Energy distance between samples and data, both (batch, output_size)."""
        return energy_distance(output, target)

    def metrics(self) -> "MetricCollection":
        """The energy distance of all samples to all data, and as a fraction of that of normal noise."""
        from torchmetrics import Metric, MetricCollection
        from torchmetrics.utilities import dim_zero_cat

        class Energy(Metric):
            full_state_update = False
            outputs: list[Tensor]
            targets: list[Tensor]

            def __init__(self, relative: bool):
                super().__init__()
                self.relative = relative
                self.add_state("outputs", default=[], dist_reduce_fx="cat")
                self.add_state("targets", default=[], dist_reduce_fx="cat")

            def update(self, output: Tensor, target: Tensor) -> None:
                self.outputs.append(output.detach())
                self.targets.append(target)

            def compute(self) -> Tensor:
                made, data = dim_zero_cat(self.outputs), dim_zero_cat(self.targets)
                distance = energy_distance(made, data)
                if not self.relative:
                    return distance
                generator = torch.Generator().manual_seed(SPLIT_SEED)
                noise = torch.randn(data.shape, generator=generator, dtype=torch.float32).to(data)
                return distance / energy_distance(noise, data)

        return MetricCollection({"energy_ratio": Energy(True), "loss": Energy(False)}, compute_groups=False)

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, Any]:
        """Of a model with a `LinearFlow`: `one_step_psnr_euler` and `_rk4`, and `inversion_psnr`, in decibels.

        The first two compare a collapsed step with 100 on noise; the last a picture, or a point, with what comes back
        from its noise, by a flow that stops a step short of the data, without which the operator's rank is lost.
        """
        from archzoo.layers.linear_flow import METHODS, LinearFlow

        flow = getattr(model, "flow", None)
        if not isinstance(flow, LinearFlow):
            return {}
        noise, data = (t[:COMPARED] for t in (self.test.inputs, self.test.targets))
        weight = next(flow.parameters())
        was_training = flow.training
        flow.eval()
        with torch.no_grad():
            noise, data = noise.to(weight), data.view_as(noise).to(weight)
            figures = {
                f"one_step_psnr_{method}": psnr(flow(noise, 100, method), flow.sample(noise, 100, method))
                for method in METHODS
            }
            there = flow.collapse(100, denoise_last=False)
            try:
                figures["inversion_psnr"] = psnr(there(there.pinv()(data)), data)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch's types lack it; weights have overflowed
                figures["inversion_psnr"] = math.nan
        flow.train(was_training)
        return figures

    def pictures(self, model: nn.Module) -> dict[str, Picture]:
        """Samples beside data."""
        made = outputs(model, self.test.inputs[:2000])
        data = self.test.targets[: len(made)].double()
        if len(self.input_shape) == 1:
            told = "Samples that the model makes of noise in one step, beside the noise and held-out data."
            panels = {"noise": self.test.inputs[: len(made)], "samples": made, "data": data}
            return {"samples": Picture(scatter(panels), told)}
        shape = (-1, *self.input_shape)
        rows = [rows.view(shape)[k : k + SHOWN] for rows in (made, data) for k in (0, SHOWN)]
        told = "Two rows of samples, made of noise in one step, and below them two rows of test images."
        return {"samples": Picture(tiles(rows, zoom=max(1, 64 // self.input_shape[-1])), told)}


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal to noise ratio in decibels, the peak being the target's range; at most that of float32's rounding."""
    span = (target.max() - target.min()).double()
    error = (output.double() - target.double()).square().mean().sqrt()
    floor = span * torch.finfo(torch.float32).eps / 4
    return float(20 * torch.log10(span / error.clamp_min(floor)))


def scatter(panels: Mapping[str, Tensor]) -> "Figure":
    """Sets of points (n, 2) side by side, on the scale of the last one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(panels), 3.3), layout="constrained")
    last = list(panels.values())[-1].double().cpu()
    low, high = last.amin(0), last.amax(0)
    middle, half = (low + high) / 2, float((high - low).max()) * 0.75
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.scatter(*points.double().cpu().numpy().T, s=2, alpha=0.5, linewidths=0)
        axes.set_title(title)
        axes.set_aspect("equal")
        axes.set_xlim(float(middle[0]) - half, float(middle[0]) + half)
        axes.set_ylim(float(middle[1]) - half, float(middle[1]) + half)
    return figure


def _framed(images: Tensor, frame: int) -> Tensor:
    return nn.functional.pad(images, (frame,) * 4)


def _picker(images: Tensor, white: int) -> Draw:
    return lambda rng, count: images[rng.randint(0, len(images), count)].numpy() / white


def _firsts(images: Tensor, white: int) -> Draw:
    return lambda rng, count: images[:count].numpy() / white
