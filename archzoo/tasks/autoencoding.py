"""Autoencoding of images: compress each to a few numbers, and draw it again (https://arxiv.org/abs/2410.02077)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from archzoo.names import suggest
from archzoo.pictures import Picture, outputs, tiles
from archzoo.tasks.files import Source, read_file
from archzoo.tasks.options import whole_number
from archzoo.tasks.task import Task, register_task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

DATASETS = ("mnist", "fashion_mnist", "cifar10", "digits")
SHOWN = 10
"""Test images in the picture: the first ones."""
VAL_SIZE = 5000
"""Images held out for validation, as in the tasks `mnist` and `fashion_mnist`: the last of the training set."""


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images, each with itself, flattened, as its target. A whole batch is read by one indexing.

    Args:
        images: (examples, channels, height, width), uint8.
        labels: (examples,), the classes, int64.
        white: The largest value of a pixel, which becomes 1.
    """

    def __init__(self, images: Tensor, labels: Tensor, white: int):
        self.images, self.labels, self.white = images, labels, white

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index].float() / self.white
        return image, image.flatten()

    def __getitems__(self, indices: list[int] | Tensor | slice) -> tuple[Tensor, Tensor]:
        images = self.images[indices].float() / self.white
        return images, images.flatten(1)


@register_task("autoencoding")
class Autoencoding(Task):
    """Reconstruction of images with pixels in [0, 1]; the score is the mean squared error of a pixel.

    The splits are those of the tasks of the same names; of CIFAR-10, the last 5,000 training images are for validation.
    The model's `encode`, if it has one, is judged too: each test image gets the class that its nearest training images
    vote for, by the Euclidean distance of the latents at the end of training. The same by the pixels is the baseline.

    Args:
        dataset: `"mnist"`, `"fashion_mnist"`, `"cifar10"` or `"digits"` (8 x 8 pixels, no download).
        train_size: Images to train on: the first ones. None: all that validation leaves.
        neighbors: Number of nearest images that vote.
        voters: Number of training images whose classes are known: the first ones, or all if there are fewer.
        data_dir: Folder that holds the data set's folder, or into which it is downloaded. None: the folder that the
            environment variable ARCHZOO_DATA names, else `archzoo` in the user's cache.
        seed: Not needed: the split is the same in every run.

    Raises:
        DatasetError: If a file is neither there nor to be downloaded, or is not the official one.
        ValueError: If an option is wrong.
    """

    score = "mse"
    mode: Literal["max", "min"] = "min"
    train: Images
    test: Images

    def __init__(
        self,
        *,
        dataset: str = "mnist",
        train_size: int | None = None,
        neighbors: int = 5,
        voters: int = 10_000,
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        if dataset not in DATASETS:
            raise ValueError(f"dataset={dataset!r}: there is no such data set; {suggest(str(dataset), DATASETS)}")
        whole_number("voters", voters, 1, 10**9)
        train, self.val, self.test = _digits() if dataset == "digits" else _files(dataset, data_dir)
        end = len(train) if train_size is None else whole_number("train_size", train_size, 1, len(train))
        self.train = Images(train.images[:end], train.labels[:end], train.white)
        self.voters = min(voters, end)
        self.neighbors = whole_number("neighbors", neighbors, 1, self.voters)
        _, *shape = self.test.images.shape
        self.input_shape, self.output_size = tuple(shape), self.test.images[0].numel()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of a pixel, both (batch, pixels)."""
        return nn.functional.mse_loss(output, target)

    def metrics(self) -> "MetricCollection":
        """Mean squared error of a pixel, which is also the loss."""
        from torchmetrics import MeanSquaredError, MetricCollection

        return MetricCollection({"mse": MeanSquaredError(), "loss": MeanSquaredError()})

    def summarize(self, evaluations: Sequence[Mapping[str, float]], model: nn.Module) -> dict[str, float]:
        """Accuracy, a fraction, of nearest neighbours on the test split: by pixels, and by the model's latents.

        `knn_accuracy` is absent if the model has no method `encode`, and NaN if a latent is not finite.
        """
        figures = {"knn_accuracy_pixels": self.pixel_accuracy}
        encode = getattr(model, "encode", None)
        if encode is not None:
            weight = next(model.parameters())
            was_training = model.training
            model.eval()
            figures["knn_accuracy"] = self.knn_accuracy(lambda images: encode(images.to(weight)))
            model.train(was_training)
        return figures

    def pictures(self, model: nn.Module) -> dict[str, Picture]:
        """The first test images, and the model's below them."""
        images, _ = self.test.__getitems__(slice(0, SHOWN))
        drawn = outputs(model, images).reshape(images.shape)
        sheet = tiles([images.double(), drawn], zoom=max(1, 64 // max(images.shape[-2:])))
        told = f"the first {len(images)} test images, and below each what the model makes of it."
        return {"reconstructions": Picture(sheet, told)}

    @functools.cached_property
    def pixel_accuracy(self) -> float:
        """`knn_accuracy` by the pixels themselves; takes seconds, once a task."""
        return self.knn_accuracy(lambda images: images)

    @torch.no_grad()
    def knn_accuracy(self, encode: Callable[[Tensor], Tensor], batch_size: int = 1000) -> float:
        """Fraction of the test images that the nearest training images give their class; NaN if a code is not finite.

        Args:
            encode: Maps images (batch, *input_shape), float32 on the CPU, to codes (batch, …).
            batch_size: Images encoded at once.
        """
        from sklearn.neighbors import KNeighborsClassifier
        from threadpoolctl import threadpool_limits

        def codes(split: Images, count: int) -> np.ndarray:
            starts = range(0, count, batch_size)
            batches = (split.__getitems__(slice(start, min(start + batch_size, count)))[0] for start in starts)
            return torch.cat([encode(batch).flatten(1).float().cpu() for batch in batches]).numpy()

        known, asked = codes(self.train, self.voters), codes(self.test, len(self.test))
        if not (np.isfinite(known).all() and np.isfinite(asked).all()):
            return float("nan")
        classifier = KNeighborsClassifier(self.neighbors, algorithm="brute")
        with threadpool_limits(torch.get_num_threads()):
            classifier.fit(known, self.train.labels[: self.voters].numpy())
            return float(classifier.score(asked, self.test.labels.numpy()))


def _digits() -> tuple[Images, Images, Images]:
    from sklearn.datasets import load_digits

    from archzoo.tasks.split import stratified_split

    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 8, 8), torch.tensor(classes, dtype=torch.int64)
    train, val, test = (Images(images[i], labels[i], 16) for i in stratified_split(labels, val=300, test=300))
    return train, val, test


def _files(dataset: str, data_dir: Path | None) -> tuple[Images, Images, Images]:
    from archzoo.tasks import fashion_mnist, mnist
    from archzoo.tasks.cifar10 import TRAIN, cifar10_arrays

    if dataset == "cifar10":
        images, labels = cifar10_arrays(data_dir)
        parts = images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]
    else:
        parts = _idx({"mnist": mnist.SOURCE, "fashion_mnist": fashion_mnist.SOURCE}[dataset], data_dir)
    train, val = slice(None, len(parts[0]) - VAL_SIZE), slice(len(parts[0]) - VAL_SIZE, None)

    def split(images: np.ndarray, labels: np.ndarray) -> Images:
        return Images(torch.tensor(images), torch.tensor(labels, dtype=torch.int64), 255)

    return (
        split(parts[0][train], parts[1][train]),
        split(parts[0][val], parts[1][val]),
        split(parts[2], parts[3]),
    )


def _idx(source: Source, data_dir: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from archzoo.tasks.idx import FILES, parse_idx

    images, labels, test_images, test_labels = (parse_idx(read_file(source, name, data_dir)) for name in FILES)
    return images[:, None], labels, test_images[:, None], test_labels
