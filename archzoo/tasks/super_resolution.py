"""Super-resolution: draw an image at 2, 3 or 4 times its resolution, as the papers of the field measure it."""

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from archzoo.names import suggest
from archzoo.pictures import Picture, outputs, tiles
from archzoo.tasks.files import data_root, open_file, read_file
from archzoo.tasks.metrics import mean_loss
from archzoo.tasks.options import whole_number
from archzoo.tasks.task import DatasetError, Task, register_task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

FOLDER = "super_resolution"
SOURCES = {
    **dict.fromkeys(
        ("Set5", "Set14", "B100", "BSD100", "Urban100"),
        "EDSR's authors offer it (B100 is BSD100): https://cv.snu.ac.kr/research/EDSR/benchmark.tar, from which the "
        "folder may be copied as it is",
    ),
    "Manga109": "its authors give it on request: http://www.manga109.org/en/",
    **dict.fromkeys(("DIV2K", "DIV2K_train_HR"), "its authors offer it: https://data.vision.ee.ethz.ch/cvl/DIV2K/"),
}
"""Where the standard sets are to be had. None of these addresses gives a checksum, so that none is downloaded."""
REGIONS = {"train": (0, 396), "val": (420, 504), "test": (528, 636)}
"""Columns of a photograph. The 24 between two regions are nobody's: more than the 16 that a block of JPEG spans."""
FASHION_HELD_OUT = 2000
"""Images of Fashion-MNIST to validate on, the last of the training set, and to test on, the first of the test set."""
SHOWN, SIDE = 4, 96
"""Test images in the picture, and the side of what is shown of each, in pixels of the high resolution."""
WINDOW = 11
"""Side of SSIM's window, in pixels."""


# ---- images


def _mirrored(images: Tensor, pixels: int) -> Tensor:
    """Images with so many pixels more on each side, mirrored at the border so that the last one comes twice."""
    for axis in (-2, -1):
        size = images.shape[axis]
        places = torch.arange(-pixels, size + pixels, device=images.device).remainder(2 * size)
        images = images.index_select(axis, torch.minimum(places, 2 * size - 1 - places))
    return images


def shrink(images: Tensor, scale: int) -> Tensor:
    """Low resolution as the field makes it: MATLAB's `imresize(images, 1/scale)`, before its rounding.

    Bicubic with a = -0.5, the kernel widened by the scale against aliasing, and images mirrored at their borders.

    Args:
        images: (…, channels, height, width), floating point; the scale divides the sides.
        scale: Factor.
    """
    return _resize(images, 2 * scale, 1 / scale)


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement, the field's baseline: MATLAB's `imresize(images, scale)`, before its rounding.

    Args:
        images: (batch, channels, height, width), floating point.
        scale: Factor.
    """
    return _resize(images, 2, scale)


def _resize(images: Tensor, margin: int, factor: float) -> Tensor:
    height, width = (round(factor * (side + 2 * margin)) for side in images.shape[-2:])
    # With `antialias`, torch takes a = -0.5, as MATLAB and Pillow do; without, a = -0.75. Its kernels are cut off at
    # the border, and the margin is as wide as they reach.
    resized = F.interpolate(_mirrored(images, margin), size=(height, width), mode="bicubic", antialias=True)
    cut = round(factor * margin)
    return resized[..., cut:-cut, cut:-cut]


def luma(images: Tensor) -> Tensor:
    """Y of YCbCr by BT.601, as MATLAB's `rgb2ycbcr`: (…, 3, H, W) in [0, 1] to (…, 1, H, W) in [16, 235] / 255."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=images.dtype, device=images.device)
    return ((images * weights[:, None, None]).sum(-3, keepdim=True) + 16) / 255


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB, for a peak of 1: (batch, …) twice to (batch,)."""
    return -10 * (output - target).square().flatten(1).mean(1).log10()


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): (batch, channels, H, W) twice to (batch,).

    A Gaussian window of 11 x 11 pixels and deviation 1.5, K1 = 0.01, K2 = 0.03, a range of 1, biased variances, and the
    mean over the places where the window is inside the image: as the authors' `ssim.m`, BasicSR and scikit-image. The
    function of torchmetrics makes the same map, and takes 10 times as long in float64.
    """
    terms = torch.stack([output, target, output * output, target * target, output * target])
    x, y, xx, yy, xy = _windowed(terms)
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * (xy - x * y) + c2) / (xx - x * x + yy - y * y + c2)
    return ((2 * x * y + c1) / (x * x + y * y + c1) * structure).flatten(1).mean(1)


def _windowed(images: Tensor) -> Tensor:
    """SSIM's weighted mean around every pixel that is far enough from the border, one axis after the other."""
    weights = [math.exp(-((k - WINDOW // 2) ** 2) / (2 * 1.5**2)) for k in range(WINDOW)]
    for axis in (-2, -1):
        length = images.shape[axis] - WINDOW + 1
        parts = (weight * images.narrow(axis, k, length) for k, weight in enumerate(weights))
        images = functools.reduce(torch.add, parts) / sum(weights)
    return images


# ---- splits


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Images at low and at high resolution, whole or in patches, with values in [0, 1].

    Patches overlap by half. The index alone decides which patch comes in which orientation: nothing is drawn.

    Args:
        stacks: Images of one size each, (low, high): (n, channels, h, w) and (n, channels, scale · h, scale · w).
            Integers are of 255; floats are as they are.
        scale: Factor between the two.
        patch: Side of a patch, in pixels of the low resolution; None: whole images.
        augment: Whether each comes in its eight orientations.

    Raises:
        ValueError: If a patch does not fit into an image, or the examples would not have one shape to be batched by
            (patch None, with images of several sizes, or with oblong ones to be turned).
    """

    def __init__(
        self, stacks: Sequence[tuple[Tensor, Tensor]], scale: int, patch: int | None = None, augment: bool = False
    ):
        self.stacks, self.scale, self.augment = list(stacks), scale, augment
        self.places: list[list[tuple[int, int]]] = []
        self.sides: list[tuple[int, int]] = []
        self.ends: list[int] = []
        end = 0
        for low, _ in self.stacks:
            height, width = low.shape[-2:]
            if patch is not None and patch > min(height, width):
                raise ValueError(
                    f"patch={patch}: an image of {height} x {width} pixels at low resolution is smaller; take a "
                    f"smaller patch, or null for whole images"
                )
            if patch is None and augment and height != width:
                raise ValueError(f"augment=True: an image of {height} x {width} pixels cannot be turned; give a patch")
            self.sides.append((height, width) if patch is None else (patch, patch))
            tops, lefts = map(_starts, (height, width), self.sides[-1])
            self.places.append(list(itertools.product(tops, lefts)))
            end += len(low) * len(self.places[-1]) * (8 if augment else 1)
            self.ends.append(end)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return _values(self._low(index)), _values(self._high(index))

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        low = [self._low(index) for index in indices]
        if len(sizes := {tuple(image.shape[-2:]) for image in low}) > 1:
            some = " and ".join(f"{height} x {width}" for height, width in sorted(sizes)[:2])
            raise ValueError(
                f"images of several sizes, as {some}, do not make a batch: set trainer.eval_batch_size=1 (for the "
                "training images: task.patch=24)"
            )
        return _values(torch.stack(low)), _values(torch.stack([self._high(index) for index in indices]))

    def _low(self, index: int) -> Tensor:
        return self._cut(index, 0, 1)

    def _high(self, index: int) -> Tensor:
        return self._cut(index, 1, self.scale)

    def _cut(self, index: int, resolution: int, scale: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: must be from 0 to {len(self) - 1}")
        number = bisect_right(self.ends, index)
        rest, turn = divmod(index - (self.ends[number - 1] if number else 0), 8 if self.augment else 1)
        image, place = divmod(rest, len(self.places[number]))
        (top, left), (height, width) = self.places[number][place], self.sides[number]
        part = self.stacks[number][resolution][
            image, :, scale * top : scale * (top + height), scale * left : scale * (left + width)
        ]
        if turn % 4:
            part = torch.rot90(part, turn % 4, (-2, -1))
        return part.flip(-1) if turn >= 4 else part


def _starts(length: int, side: int) -> list[int]:
    """Where patches begin: at every half of a side, and one that ends at the border."""
    return sorted({*range(0, length - side + 1, max(1, side // 2)), length - side})


def _values(images: Tensor) -> Tensor:
    return images if images.is_floating_point() else images.float() / 255


def _photograph(image: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """(low, high), uint8, of images (n, 3, height, width), uint8, whose rest by the scale is cut off."""
    height, width = (side // scale * scale for side in image.shape[-2:])
    high = image[..., :height, :width].contiguous()
    return shrink(high.float(), scale).clamp(0, 255).round().byte(), high


def _count(train_size: int | None, available: int) -> int:
    return available if train_size is None else whole_number("train_size", train_size, 1, available)


def _photos(scale: int, train_size: int | None) -> dict[str, list[tuple[Tensor, Tensor]]]:
    from sklearn.datasets import load_sample_image

    photos = torch.stack([torch.tensor(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")])
    photos = photos.permute(0, 3, 1, 2)
    # Each region is cut out first and shrunk by itself, so that no pixel of another has a part in it.
    parts = {name: photos[..., begin:end] for name, (begin, end) in REGIONS.items()}
    parts["train"] = parts["train"][: _count(train_size, len(photos))]
    return {name: [_photograph(images, scale)] for name, images in parts.items()}


def _fashion_mnist(scale: int, train_size: int | None, data_dir: Path | None) -> dict[str, list[tuple[Tensor, Tensor]]]:
    from archzoo.tasks.fashion_mnist import SOURCE
    from archzoo.tasks.idx import FILES, parse_idx

    train, test = (torch.tensor(parse_idx(read_file(SOURCE, FILES[i], data_dir)))[:, None] for i in (0, 2))
    count = _count(train_size, len(train) - FASHION_HELD_OUT)
    parts = {"train": train[:count], "val": train[-FASHION_HELD_OUT:], "test": test[:FASHION_HELD_OUT]}
    side = 28 // scale

    def pair(images: Tensor) -> tuple[Tensor, Tensor]:
        high = images[..., : scale * side, : scale * side].contiguous()
        low = F.interpolate(high.float() / 255, size=(side, side), mode="bicubic", antialias=True)
        return low.clamp(0, 1), high

    return {name: [pair(images)] for name, images in parts.items()}


def _pictures(option: str, name: str, data_dir: Path | None) -> list[Path]:
    """The PNG files of a folder, by name.

    Raises:
        DatasetError: If there are none.
    """
    root = data_root(data_dir) / FOLDER
    folder = root / name / "HR" if (root / name / "HR").is_dir() else root / name
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".png") if folder.is_dir() else []
    if Path(name).name != name or name == ".." or not files:
        known = [*SOURCES, *(p.name for p in root.iterdir())] if root.is_dir() else [*SOURCES]
        hint = SOURCES.get(name) or suggest(name, [*BUILT_IN, *known] if option == "dataset" else known)
        raise DatasetError(
            f"{option}={name!r}: there is no folder {root / name} with PNG pictures; put those of high resolution "
            f"there (the low resolution is made from them); {hint}"
        )
    return files


def _read(files: Sequence[Path], scale: int) -> list[tuple[Tensor, Tensor]]:
    import numpy as np
    from PIL import Image

    pairs = []
    for path in files:
        try:
            with open_file(path) as file, Image.open(file) as picture:
                picture.verify()  # its checksums, which decoding leaves out
            with open_file(path) as file, Image.open(file) as picture:
                pixels = torch.tensor(np.asarray(picture.convert("RGB")))
        except Exception as error:  # of whatever kind: Pillow has many for a broken file
            raise DatasetError(f"cannot read the picture {path}: {error}; get it again, or delete it") from error
        if min(pixels.shape[:2]) < (least := WINDOW + 3 * scale):
            raise DatasetError(f"{path}: {pixels.shape[0]} x {pixels.shape[1]} pixels are less than {least} each way")
        pairs.append(_photograph(pixels.permute(2, 0, 1)[None], scale))
    return pairs


BUILT_IN = ("photos", "fashion_mnist")


@register_task("super_resolution")
class SuperResolution(Task):
    """Images at `scale` times their resolution; the score is the mean of the images' PSNR, in dB. The loss is L1.

    Photographs are handled and measured as the field does it. High resolution is cut to a multiple of the scale. Low
    resolution is MATLAB's bicubic, in 8 bits. An output is clamped and rounded to 8 bits, as if it were written to a
    file; of it and of the truth the Y channel (BT.601, 16 to 235, not rounded) is compared, without `scale` pixels at
    the border, at a peak of 255. PSNR and SSIM are means over the images, which are enlarged whole.

    `"photos"` are scikit-learn's two sample images, each cut into three regions side by side for training, validation
    and test, with 24 columns between them that nobody sees. A region is cut out before it is shrunk: neither a pixel of
    the test regions, nor one that a test pixel has a part in, is ever trained on. No download.

    `"fashion_mnist"` is our reference protocol for grey images. Low resolution is torch's bicubic (antialiased),
    clamped and not rounded; PSNR and SSIM are of clamped values, without a crop; the bicubic baseline is torch's, with
    a = -0.75, and has 19.31 dB at scale 2. Tested on the first 2,000 test images, validated on the last
    2,000 training images.

    Any other name is a folder `super_resolution/NAME` of the data folder with PNG pictures of high resolution, in it or
    in its folder `HR`. They are held in memory, 3 bytes a pixel (DIV2K: 7 GB). To validate on, the last tenth by name
    is held out, ten at most. Sets whose images differ in size are evaluated with `trainer.eval_batch_size=1`.

    Args:
        dataset: What to train on: `"photos"`, `"fashion_mnist"` or a folder's name, as `"DIV2K"`.
        test_set: A folder's name, as `"Set5"`, to test on instead of the data set's own test images; folders have none.
        scale: 2, 3 or 4.
        patch: Side of the patches to train on, in pixels of the low resolution; they overlap by half. None: whole
            images, which must have one size.
        augment: Whether an epoch has every patch in its eight orientations.
        train_size: Images to train on: the first ones. None: all that validation leaves.
        data_dir: Folder that holds `super_resolution/` and `fashion_mnist/`; only the latter is downloaded. None: the
            folder that the environment variable ARCHZOO_DATA names, else `archzoo` in the user's cache.
        seed: Not needed: the splits are the same in every run.

    Raises:
        DatasetError: If images are not to be had.
        ValueError: If an option is wrong.
    """

    score = "psnr"
    mode: Literal["max", "min"] = "max"
    train: Pairs
    val: Pairs
    test: Pairs

    def __init__(
        self,
        *,
        dataset: str = "photos",
        test_set: str | None = None,
        scale: int = 2,
        patch: int | None = 24,
        augment: bool = False,
        train_size: int | None = None,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        self.scale = whole_number("scale", scale, 2, 4)
        if patch is not None:
            whole_number("patch", patch, 1, 10**6)
        self.grey = dataset == "fashion_mnist"
        if self.grey and test_set is not None:
            raise ValueError(f"test_set={test_set!r}: dataset 'fashion_mnist' is grey and tests on its own images only")
        if dataset not in BUILT_IN and test_set is None:
            raise ValueError(
                f"test_set=None: dataset {dataset!r} has no test images of its own; name a folder, as test_set='Set5'"
            )
        if dataset == test_set:
            raise ValueError(f"test_set={test_set!r}: these images are trained on; name another folder")

        if dataset in BUILT_IN:
            parts = _fashion_mnist(scale, train_size, data_dir) if self.grey else _photos(scale, train_size)
        else:
            files = _pictures("dataset", dataset, data_dir)
            left = len(files) - max(1, min(10, len(files) // 10))
            if left < 1:
                raise DatasetError(f"dataset={dataset!r}: {files[0]} is the only picture; add one to validate on")
            parts = {"train": _read(files[: _count(train_size, left)], scale), "val": _read(files[left:], scale)}
        if test_set is not None:
            parts["test"] = _read(_pictures("test_set", test_set, data_dir), scale)

        self.train = Pairs(parts["train"], scale, patch, augment)
        if len(sides := set(self.train.sides)) > 1:
            raise ValueError(f"patch=None: the training images have {len(sides)} sizes; give a patch, as patch=24")
        self.val, self.test = Pairs(parts["val"], scale), Pairs(parts["test"], scale)
        low, high = self.train[0]
        self.input_shape, self.output_size = tuple(low.shape), high.numel()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean absolute error of a value; output is (batch, channels, height, width) as the target, or flattened."""
        return nn.functional.l1_loss(output.reshape(target.shape), target)

    def metrics(self) -> "MetricCollection":
        """PSNR in dB, SSIM, and the mean loss."""
        from torchmetrics import MetricCollection

        measures = {"psnr": mean_loss(self._mean(psnr)), "ssim": mean_loss(self._mean(ssim))}
        # No groups: these metrics share nothing, and torchmetrics would join those that are equal in the first batch.
        return MetricCollection({**measures, "loss": mean_loss(self.loss)}, compute_groups=False)

    def comparable(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What of an output and of the truth is compared, float64, by the protocol of the data set.

        Args:
            output: (batch, channels, height, width), or flattened; unbounded.
            target: (batch, channels, height, width), in [0, 1].
        """
        output, target = output.reshape(target.shape).double().clamp(0, 1), target.double()
        if self.grey:
            return output, target
        cut = self.scale
        output, target = (luma((image * 255).round() / 255) for image in (output, target))
        return output[..., cut:-cut, cut:-cut], target[..., cut:-cut, cut:-cut]

    def _mean(self, measure: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda output, target: measure(*self.comparable(output, target)).mean()

    def bicubic(self, low: Tensor) -> Tensor:
        """The baseline's enlargement of images (batch, channels, height, width)."""
        if self.grey:
            return F.interpolate(low, scale_factor=float(self.scale), mode="bicubic")
        return enlarge(low, self.scale)

    @functools.cached_property
    def baseline(self) -> dict[str, float]:
        """PSNR and SSIM of the bicubic enlargement, as `SPLIT/METRIC`; takes a second, once a task."""
        figures: dict[str, float] = {}
        for name, split in (("val", self.val), ("test", self.test)):
            metrics = self.metrics()
            for low, high in split.stacks:
                for begin in range(0, len(low), 256):
                    part = slice(begin, begin + 256)
                    metrics.update(self.bicubic(_values(low[part])), _values(high[part]))
            figures |= {f"{name}/{key}": float(value) for key, value in metrics.compute().items()}
        return figures

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, float]:
        """PSNR (dB) and SSIM of the bicubic enlargement on the test split, beside which the run's own scores stand.

        `val_gain`: by how much the best PSNR in validation is above bicubic's there, in dB.
        """
        figures = {f"bicubic_{key}": self.baseline[f"test/{key}"] for key in ("psnr", "ssim")}
        values = [line["val/psnr"] for line in evaluations]
        best = max((value for value in values if not math.isnan(value)), default=math.nan)
        return figures | {"val_gain": best - self.baseline["val/psnr"]}

    def pictures(self, model: nn.Module) -> dict[str, Picture]:
        """A part of the first test images: at low resolution, enlarged by bicubic and by the model, and the truth.

        Each image is given to the model whole, as it is when it is tested.
        """
        pairs = [self.test[index] for index in range(min(SHOWN, len(self.test)))]
        side = min(SIDE, *(length for _, high in pairs for length in high.shape[-2:])) // self.scale * self.scale
        rows = []
        for low, high in pairs:
            nearest = low.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)
            bicubic = self.bicubic(low[None])[0]
            drawn = outputs(model, low[None]).reshape(high.shape)
            top, left = _hardest((bicubic - high).abs(), side, self.scale)
            whole = torch.stack([nearest.double(), bicubic.double(), drawn, high.double()])
            rows.append(whole[..., top : top + side, left : left + side])
        parts = side < max(length for _, high in pairs for length in high.shape[-2:])
        what = "the parts of test images that bicubic has most trouble with" if parts else "test images"
        told = f"from the left: {what}, at low resolution, enlarged by bicubic, by the model, and as they are."
        return {"enlarged": Picture(tiles(rows, zoom=max(1, 192 // side)), told)}


def _hardest(error: Tensor, side: int, step: int) -> tuple[int, int]:
    """Where a square of an image (channels, H, W) begins whose mean is largest, of those at multiples of a step."""
    means = F.avg_pool2d(error.mean(0)[None, None], side, stride=step)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return top * step, left * step
