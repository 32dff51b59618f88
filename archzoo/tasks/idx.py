"""Data sets in the files of MNIST: images and labels of a training and a test set, as four gzipped idx files."""

import gzip
import math
from pathlib import Path

import numpy as np
import torch

from archzoo.tasks.files import Source, read_file
from archzoo.tasks.options import whole_number
from archzoo.tasks.task import TensorSplit

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def parse_idx(data: bytes) -> np.ndarray:
    """Array of uint8 from a gzipped idx file: bytes 0, 0, 8, number of axes; the shape, big-endian; the items."""
    raw = gzip.decompress(data)
    header = 4 + 4 * raw[3]
    shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, math.prod(map(int, shape)), header).reshape(shape)


def idx_splits(
    source: Source, data_dir: Path | None, *, val_size: int, train_size: int | None, mean: float, std: float
) -> tuple[TensorSplit, TensorSplit, TensorSplit]:
    """Training, validation and test split: images (1, height, width) float32, standardised, and classes int64.

    Args:
        source: The data set.
        data_dir: Folder that holds the data set's folder, or into which it is downloaded.
        val_size: Images held out for validation: the last of the training set.
        train_size: Images to train on: the first of the training set. None: all the others.
        mean: Mean of the training pixels, as a fraction of white.
        std: Their standard deviation.

    Raises:
        DatasetError: If a file is not to be had, or is not the official one.
        ValueError: If a size is out of range.
    """
    images, labels, test_images, test_labels = (parse_idx(read_file(source, name, data_dir)) for name in FILES)
    left = len(images) - whole_number("val_size", val_size, 1, len(images) - 1)
    end = left if train_size is None else whole_number("train_size", train_size, 1, left)

    def split(images: np.ndarray, labels: np.ndarray) -> TensorSplit:
        inputs = torch.tensor(images).unsqueeze(1).float().div_(255).sub_(mean).div_(std)
        return TensorSplit(inputs, torch.tensor(labels, dtype=torch.int64))

    return split(images[:end], labels[:end]), split(images[left:], labels[left:]), split(test_images, test_labels)
