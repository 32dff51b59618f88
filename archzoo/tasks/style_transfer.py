"""Images in several styles, which are known functions here, so that what a model makes can be scored."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from archzoo.names import suggest
from archzoo.pictures import Picture, outputs, tiles
from archzoo.tasks.autoencoding import Autoencoding, Images
from archzoo.tasks.flow_matching import psnr
from archzoo.tasks.task import Task, register_task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

    from archzoo.layers.linearizer import Linearizer

SHOWN = 6
ASKED = 200
"""Test images of the figures that `summarize` takes."""
LARGEST = 1024
"""Pixels of an image up to which `summarize` inverts operators, whose matrices are the square of it."""


def _edges(x: Tensor) -> Tensor:
    """Magnitude of Sobel's gradient, a quarter of it."""
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).to(x)
    kernels = torch.stack([across, across.T]).unsqueeze(1)
    flat = F.pad(x, (1, 1, 1, 1), mode="replicate").flatten(0, 1).unsqueeze(1)
    return (F.conv2d(flat, kernels).square().sum(1).sqrt() / 4).clamp(max=1).view(x.shape)


def _emboss(x: Tensor) -> Tensor:
    """Grey, lighter where the image falls off below and to the right."""
    padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return (1 + x - padded[..., 1:, 1:]) / 2


STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda x: 1 - x,
    "edges": _edges,
    "bold": lambda x: F.max_pool2d(x, 3, 1, 1),
    "emboss": _emboss,
    "thin": lambda x: -F.max_pool2d(-x, 3, 1, 1),
    "blur": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1),
}
"""Name -> a function of images (batch, channels, height, width) with pixels from 0 to 1."""


class Styled(Dataset[tuple[Tensor, Tensor]]):
    """Images, each with itself in all styles, flattened and one behind the other, as its target.

    Args:
        images: The images.
        styles: Names.
    """

    def __init__(self, images: Images, styles: Sequence[str]):
        self.images, self.styles = images, [STYLES[name] for name in styles]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, targets = self.__getitems__([index])
        return images[0], targets[0]

    def __getitems__(self, indices: list[int] | Tensor | slice) -> tuple[Tensor, Tensor]:
        images, _ = self.images.__getitems__(indices)
        return images, torch.stack([style(images) for style in self.styles], 1).flatten(1)


@register_task("style_transfer")
class StyleTransfer(Task):
    """Draw an image in each of several styles; the score is the mean squared error of a pixel.

    Styles: `negative`, `edges` (Sobel's), `bold` (largest of 3 x 3 pixels), `thin` (the smallest), `emboss`, `blur`.
    The paper learns one image and its four stylised versions, 256 x 256; here a model must do with images it has not
    seen. A model with a `Linearizer` as `linearizer`, as `stylizer`, is asked too to go from one style to another by
    composition: f_b after the pseudo-inverse of f_a.

    Args:
        dataset: `"mnist"`, `"fashion_mnist"`, `"cifar10"`, or `"digits"` (8 x 8 pixels, no download).
        styles: Names of the styles, in order.
        train_size: Images to train on: the first ones. None: all that validation leaves.
        data_dir: As in `autoencoding`.
        seed: Not needed.

    Raises:
        DatasetError: If a file is neither there nor to be downloaded, or is not the official one.
        ValueError: If an option is wrong.
    """

    score = "mse"
    mode: Literal["max", "min"] = "min"
    train: Styled
    test: Styled

    def __init__(
        self,
        *,
        dataset: str = "digits",
        styles: Sequence[str] = ("negative", "edges", "bold", "emboss"),
        train_size: int | None = None,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        if isinstance(styles, str) or not styles or len(set(styles)) != len(styles):
            raise ValueError(
                f"styles={styles!r}: must be a list of different names, one at least, as [negative, edges]"
            )
        for name in styles:
            if name not in STYLES:
                raise ValueError(
                    f"styles={list(styles)}: there is no style {name!r}; {suggest(str(name), list(STYLES))}"
                )
        self.styles = tuple(styles)
        images = Autoencoding(dataset=dataset, train_size=train_size, data_dir=data_dir)
        self.train, self.val, self.test = (
            Styled(part, self.styles)  # type: ignore[arg-type]  # all three are Images
            for part in (images.train, images.val, images.test)
        )
        self.input_shape, self.output_size = images.input_shape, len(self.styles) * images.output_size
        self.pixel_range = (0.0, 1.0)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of a pixel, both (batch, styles · pixels)."""
        return F.mse_loss(output, target)

    def metrics(self) -> "MetricCollection":
        """Mean squared error of a pixel, which is also the loss."""
        from torchmetrics import MeanSquaredError, MetricCollection

        return MetricCollection({"mse": MeanSquaredError(), "loss": MeanSquaredError()})

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, Any]:
        """PSNR in decibels, of pixels cut to 0..1: `psnr_STYLE`; of a model with a `Linearizer` two more.

        Both are medians over all ordered pairs of styles of what f_b f_a^+ makes of an image in style a, by the
        singular values of A_a above a thousandth of the largest. `composed_psnr`: of the model's own image f_a(x),
        against f_b(x), which is what composition promises. `restyled_psnr`: of the true one, against the true one in
        style b; some styles, as edges, do not tell the image. Absent where an image has more than 1024 pixels, for the
        operators have the square of it.
        """
        from archzoo.layers.linearizer import Linearizer

        was_training = model.training
        model.eval()
        images, targets = self.test.__getitems__(slice(0, ASKED))
        apart = (len(images), len(self.styles), *self.input_shape)
        targets = targets.view(apart)
        made = outputs(model, images).view(apart)
        figures = {f"psnr_{name}": _psnr(made[:, k], targets[:, k]) for k, name in enumerate(self.styles)}
        f = getattr(model, "linearizer", None)
        if isinstance(f, Linearizer) and images[0].numel() <= LARGEST and len(self.styles) > 1:
            try:
                figures |= _composed(f, made, targets)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch's types lack it; weights have overflowed
                figures |= {"composed_psnr": math.nan, "restyled_psnr": math.nan}
        model.train(was_training)
        return figures

    def pictures(self, model: nn.Module) -> dict[str, Picture]:
        """The first test images, and each style of them: the target, and the model's."""
        images, targets = self.test.__getitems__(slice(0, SHOWN))
        apart = (len(images), len(self.styles), *self.input_shape)
        wanted, made = targets.view(apart).double(), outputs(model, images).view(apart)
        rows = [images.double(), *(rows[:, k] for k in range(len(self.styles)) for rows in (wanted, made))]
        told = "Test images; below, for each style (" + ", ".join(self.styles) + "), the target and the model's."
        return {"styles": Picture(tiles(rows, zoom=max(1, 48 // self.input_shape[-1])), told)}


@torch.no_grad()
def _composed(f: "Linearizer", made: Tensor, targets: Tensor) -> dict[str, float]:
    """The figures of f_b f_a^+; images are (batch, styles, channels, height, width)."""
    weight = next(f.parameters())
    made, targets = made.to(weight), targets.to(weight)
    own, true = [], []
    for a in range(targets.shape[1]):
        back = f.at(a).pinv(rtol=1e-3)
        for b in range(targets.shape[1]):
            if a != b:
                across = f.at(b) @ back
                own.append(_psnr(across(made[:, a]), made[:, b]))
                true.append(_psnr(across(targets[:, a]), targets[:, b]))
    return {"composed_psnr": statistics.median(own), "restyled_psnr": statistics.median(true)}


def _psnr(output: Tensor, target: Tensor) -> float:
    return psnr(output.clamp(0, 1), target.clamp(0, 1))
