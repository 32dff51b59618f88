"""Projection onto the manifold of images: f(x) = x on images, and f(f(x)) = f(x) on whatever else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.pictures import Picture, outputs, tiles
from archzoo.tasks.autoencoding import SHOWN, Autoencoding
from archzoo.tasks.flow_matching import psnr
from archzoo.tasks.options import number
from archzoo.tasks.task import register_task

ASKED = 500
"""Test images of the figures that `summarize` takes."""


@register_task("idempotent")
class Idempotent(Autoencoding):
    """Autoencoding that is asked whether a second pass changes anything, and what it makes of disturbed images.

    Training, score and splits are those of the task `autoencoding`: clean images, by the mean squared error of a pixel.
    Any model that maps an image to as many numbers will do; `projector` is idempotent by construction.

    Args:
        dataset: As in `autoencoding`.
        train_size: As in `autoencoding`.
        noise: Standard deviation of the noise on disturbed test images.
        data_dir: As in `autoencoding`.
        seed: Not needed.

    Raises:
        DatasetError: If a file is neither there nor to be downloaded, or is not the official one.
        ValueError: If an option is wrong.
    """

    def __init__(
        self,
        *,
        dataset: str = "digits",
        train_size: int | None = None,
        noise: float = 0.3,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(dataset=dataset, train_size=train_size, data_dir=data_dir, seed=seed)
        self.noise = number("noise", noise, 0.0, 10.0)
        self.pixel_range = (0.0, 1.0)

    def disturbed(self, count: int) -> dict[str, Tensor]:
        """The first test images, the same with noise, and noise alone: uniform pixels. The same in every run."""
        images = self.test.__getitems__(slice(0, count))[0]
        generator = torch.Generator().manual_seed(0)
        noisy = images + self.noise * torch.randn(images.shape, generator=generator)
        return {"clean": images, "noisy": noisy, "noise": torch.rand(images.shape, generator=generator)}

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, Any]:
        """How much a second pass changes, and how well noise is removed.

        `idempotency_KIND`: root mean square of f(f(x)) - f(x), as a fraction of that of f(x), for clean images, noisy
        ones, and noise. `denoised_psnr` and `noisy_psnr`, in decibels: of f(noisy) and of noisy images, against clean
        ones. `rank`: of a model that has a projector, how many of its gates are open.
        """
        was_training = model.training
        model.eval()
        inputs = self.disturbed(ASKED)
        once = {kind: outputs(model, x).view(x.shape) for kind, x in inputs.items()}
        figures: dict[str, Any] = {}
        for kind, y in once.items():
            change = outputs(model, y).view(y.shape) - y
            figures[f"idempotency_{kind}"] = float(change.square().mean().sqrt() / y.square().mean().sqrt())
        figures["denoised_psnr"] = psnr(once["noisy"], inputs["clean"].double())
        figures["noisy_psnr"] = psnr(inputs["noisy"].double(), inputs["clean"].double())
        rank = getattr(getattr(getattr(model, "linearizer", None), "A", None), "rank", None)
        if rank is not None:
            figures["rank"] = rank
        model.train(was_training)
        return figures

    def pictures(self, model: nn.Module) -> dict[str, Picture]:
        """Each kind of input, what the model makes of it, and what it makes of that."""
        rows = []
        for x in self.disturbed(SHOWN).values():
            once = outputs(model, x).view(x.shape)
            rows += [x.double(), once, outputs(model, once).view(x.shape)]
        told = "Test images, the same with noise, and noise; below each row one pass of the model, and two."
        return {"projections": Picture(tiles(rows, zoom=max(1, 48 // self.input_shape[-1])), told)}
