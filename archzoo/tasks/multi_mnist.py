"""MultiMNIST: two handwritten digits, one on top of the other (arXiv 1710.09829, section 6.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from archzoo.tasks.idx import idx_splits
from archzoo.tasks.mnist import SOURCE
from archzoo.tasks.options import choice, whole_number
from archzoo.tasks.stream import BlockStream, block_generator, stream_key
from archzoo.tasks.task import CRITERIA, ClassificationTask, register_task

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

SIDE, DIGIT = 36, 28
"""Pixels of an image, and of a digit's."""
BLOCK = 512
"""Samples that the training stream draws at once."""
PURPOSE = {"train": 0x6D756C7469, "val": 0x6D756C7476, "test": 0x6D756C7474}
"""Of the generators of pairs: any numbers will do, as long as they differ."""


def draw_pairs(rng: np.random.RandomState, labels: np.ndarray, count: int, shift: int) -> Tensor:
    """Pairs (count, 2, 4) of digits of different classes: class, number of the image, pixels down and right.

    Args:
        rng: Where the numbers come from.
        labels: (images,) classes of the images to draw from, at least two different ones.
        count: Pairs.
        shift: Largest shift in each direction.
    """
    order = np.argsort(labels, kind="stable")
    start = np.searchsorted(labels[order], labels, side="left")  # where an image's class begins in that order
    size = np.searchsorted(labels[order], labels, side="right") - start
    first = rng.randint(len(labels), size=count)
    # One of the images that are not of the first one's class: those before it in the order, or those behind.
    place = (rng.random_sample(count) * (len(labels) - size[first])).astype(np.int64)
    second = order[np.where(place < start[first], place, place + size[first])]
    which = np.stack([first, second], 1)
    shifts = rng.randint(-shift, shift + 1, size=(count, 2, 2))
    return torch.from_numpy(np.concatenate([labels[which][..., None], which[..., None], shifts], 2))


def place_digits(images: Tensor, pairs: Tensor) -> Tensor:
    """Each digit of pairs (n, 2, 4) alone, on black: (n, 2, 1, 36, 36), pixels from 0 to 1.

    Args:
        images: (images, 28, 28), bytes.
        pairs: As `draw_pairs` makes them, on the same device.
    """
    margin, across = (SIDE - DIGIT) // 2, torch.arange(SIDE, device=pairs.device)
    _, number, down, right = pairs.flatten(0, 1).unbind(1)
    # A black frame of a pixel stands for all that is outside of the digit.
    rows, columns = ((across - margin - by[:, None]).clamp(-1, DIGIT) + 1 for by in (down, right))
    framed = F.pad(images[number], (1, 1, 1, 1))
    which = torch.arange(len(framed), device=pairs.device)
    placed = framed[which[:, None, None], rows[:, :, None], columns[:, None]]
    return placed.float().div_(255).view(-1, 2, 1, SIDE, SIDE)


def overlay(placed: Tensor) -> Tensor:
    """Digits (n, 2, 1, 36, 36) on top of each other: the sum, cut off at white."""
    return placed.sum(1).clamp_max_(1)


class PairStream(BlockStream):
    """An endless stream of pairs, see `BlockStream`.

    Args:
        images: (images, 28, 28), bytes.
        labels: (images,) classes.
        offset: What is added to an image's number in the targets.
        shift: Largest shift in each direction.
        seed: Of the stream.
    """

    def __init__(self, images: Tensor, labels: Tensor, offset: int, shift: int, seed: int):
        super().__init__(BLOCK)
        self.images, self.labels, self.offset, self.shift = images, labels.numpy(), offset, shift
        self.key = stream_key(seed, PURPOSE["train"])

    def draw_block(self, number: int) -> tuple[Tensor, Tensor]:
        """Images (512, 1, 36, 36), and their pairs."""
        return _sample(
            self.images, draw_pairs(block_generator(self.key, number), self.labels, BLOCK, self.shift), self.offset
        )


class FixedPairs(Dataset[tuple[Tensor, Tensor]]):
    """A fixed list of pairs; their images are made when they are asked for."""

    def __init__(self, images: Tensor, pairs: Tensor, offset: int):
        self.images, self.pairs, self.offset = images, pairs, offset

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([range(len(self))[index]])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int] | slice | Tensor) -> tuple[Tensor, Tensor]:
        return _sample(self.images, self.pairs[indices], self.offset)


def _sample(images: Tensor, pairs: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of pairs; their numbers count from the first image of a split, those of targets of all."""
    targets = pairs.clone()
    targets[..., 1] += offset
    return overlay(place_digits(images, pairs)), targets


@register_task("multi_mnist")
class MultiMNIST(ClassificationTask):
    """Two digits of different classes, each shifted at random, one on top of the other: which two?

    Images are 36 x 36, pixels from 0 to 1, the sum of both digits cut off at 1. An answer is right only if the two
    highest scores are those of both digits, as the paper counts. Training pairs are drawn anew from the training
    images, a stream without end; those of validation and test are fixed, and of images that training never sees.

    Targets are (batch, 2, 4): for each digit its class, the number of its image, and its shift; `objects` makes the
    pictures of the digits of them.

    Args:
        shift: Pixels by which each digit is shifted at most, in each direction. 4 as in the paper, with which it stays
            inside; the authors' code has 6.
        val_size: Digits held out for validation: the last of the 60,000 training images.
        train_size: Digits to train on: the first ones. None: all that validation leaves.
        eval_size: Pairs of the validation split, and of the test split.
        loss: `margin` of scores from 0 to 1, or `cross_entropy`, of logits against both classes, each by a half.
        data_dir: Folder that holds `mnist/`, as for the task `mnist`.
        seed: Seed of the training pairs.

    Raises:
        DatasetError: If a file is neither there nor to be downloaded, or is not the official one.
        ValueError: If an option is out of range, or all digits of a split are of one class.
    """

    input_shape = (1, SIDE, SIDE)
    output_size = 10
    stream = True
    pixel_range = (0.0, 1.0)

    def __init__(
        self,
        *,
        shift: int = 4,
        val_size: int = 5000,
        train_size: int | None = None,
        eval_size: int = 10000,
        loss: str = "margin",
        data_dir: Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        self.criterion = choice("loss", loss, CRITERIA)
        whole_number("shift", shift, 0, SIDE - DIGIT)
        whole_number("eval_size", eval_size, 1, 10**6)
        splits = idx_splits(SOURCE, data_dir, val_size=val_size, train_size=train_size, mean=0.0, std=1.0)
        images = [split.inputs.squeeze(1).mul(255).round_().to(torch.uint8) for split in splits]
        labels = [split.targets for split in splits]
        for size, found in (("train_size", labels[0]), ("val_size", labels[1])):
            if len(found.unique()) < 2:
                raise ValueError(f"{size}={len(found)}: these digits are all of one class; take more of them")
        self._images = torch.cat(images)
        offsets = [0, len(images[0]), len(images[0]) + len(images[1])]
        self.train = PairStream(images[0], labels[0], offsets[0], shift, seed)
        self.val, self.test = (
            FixedPairs(
                images[n],
                draw_pairs(block_generator(stream_key(0, PURPOSE[name]), 0), labels[n].numpy(), eval_size, shift),
                offsets[n],
            )
            for n, name in ((1, "val"), (2, "test"))
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """The batch's mean loss of scores (batch, 10) against targets (batch, 2, 4)."""
        both = F.one_hot(target[..., 0], self.output_size).sum(1)
        if self.criterion == "margin":
            return super().loss(output, both)
        return F.cross_entropy(output, both.to(output.dtype) / 2)

    def objects(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The classes of both digits (batch, 2), and each digit alone (batch, 2, 1, 36, 36)."""
        if self._images.device != targets.device:  # 55 MB, once
            self._images = self._images.to(targets.device)
        return targets[..., 0], place_digits(self._images, targets).to(inputs.dtype)

    def metrics(self) -> "MetricCollection":
        """`accuracy`: both digits found, as a fraction; `digit_accuracy`: of all digits, how many; the mean loss."""
        from torchmetrics import MetricCollection

        from archzoo.tasks.metrics import mean_loss

        return MetricCollection([_pair_accuracy(), MetricCollection({"loss": mean_loss(self.loss)})])


def _pair_accuracy() -> "Metric":
    from torchmetrics import Metric

    class PairAccuracy(Metric):
        full_state_update = False
        pairs: Tensor
        digits: Tensor
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            for name in ("pairs", "digits", "count"):
                self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

        def update(self, output: Tensor, target: Tensor) -> None:
            chosen = output.topk(2, 1).indices
            found = (target[..., :1] == chosen.unsqueeze(1)).any(2)  # (batch, 2)
            self.pairs += found.all(1).sum()
            self.digits += found.sum()
            self.count += len(found)

        def compute(self) -> dict[str, Tensor]:
            count = self.count.double()
            return {"accuracy": self.pairs / count, "digit_accuracy": self.digits / (2 * count)}

    return PairAccuracy()
