"""CIFAR-10: 60,000 photographs of ten classes, 32 x 32 pixels (Krizhevsky 2009; no licence is stated)."""

import functools
import io
import tarfile
from pathlib import Path

import numpy as np
import torch

from archzoo.tasks.files import Source, data_root, get_command, read_file, read_verified
from archzoo.tasks.options import whole_number
from archzoo.tasks.task import ClassificationTask, TensorSplit, register_task

ARCHIVE = "cifar-10-binary.tar.gz"
PACKED = "cifar10.npz"
SOURCE = Source(
    title="CIFAR-10",
    folder="cifar10",
    mirrors=(
        "https://www.cs.toronto.edu/~kriz/",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
    ),
    sha256={
        ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        PACKED: "58167e1176f93b8452b17a1f452113608536bccb42a4dedd3347634c686310c6",
    },
)
TRAIN = 50_000
"""Number of training images; the test images are behind them."""


@functools.lru_cache(maxsize=1)  # decoding takes seconds, and the runs of a sweep share it
def cifar10_arrays(data_dir: Path | str | None) -> tuple[np.ndarray, np.ndarray]:
    """Images (60,000, 3, 32, 32) and classes (60,000,), both uint8 and not to be written to; the test set is the end.

    They come from the official archive, or, where the data folder holds it instead, from a packed copy in which 121
    images are not exact (JPEG-decoded, mean error 5 of 255).

    Raises:
        DatasetError: If no file is there nor to be downloaded, or it is not the right one.
    """
    folder = data_root(data_dir) / SOURCE.folder
    instead = get_command(SOURCE, ARCHIVE, folder / ARCHIVE)
    remedy = f"delete it, and the next run downloads the official archive, or: {instead}"
    packed = read_verified(SOURCE.title, folder / PACKED, SOURCE.sha256[PACKED], remedy)
    arrays = _official(read_file(SOURCE, ARCHIVE, data_dir)) if packed is None else _unpack(packed)
    for array in arrays:
        array.flags.writeable = False
    return arrays


def _official(archive: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Six files of records: one byte of class, then three planes of 32 x 32 bytes. Nothing is written to the disk."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        members = sorted((m for m in tar.getmembers() if m.name.endswith(".bin")), key=lambda m: m.name)
        files = [tar.extractfile(member) for member in members]  # data_batch_1 to 5, test_batch
        records = np.frombuffer(b"".join(file.read() for file in files if file), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _unpack(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Lossless WebP pictures, each a sheet of 10 x 10 images."""
    from PIL import Image

    with np.load(io.BytesIO(data), allow_pickle=False) as packed:
        sheets, offsets, labels = packed["sheets"], packed["offsets"], packed["labels"]
    images = np.empty((len(labels), 3, 32, 32), np.uint8)
    for number, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        with Image.open(io.BytesIO(sheets[begin:end].tobytes())) as picture:
            sheet = np.asarray(picture.convert("RGB")).reshape(10, 32, 10, 32, 3)
        images[100 * number : 100 * number + 100] = sheet.transpose(0, 2, 4, 1, 3).reshape(100, 3, 32, 32)
    return images, labels.astype(np.uint8)


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@register_task("cifar10")
class CIFAR10(ClassificationTask):
    """Pixels standardised colour by colour; splits of 45,000, 5,000 and 10,000 images.

    Args:
        val_size: Images held out for validation: the last of the 50,000 training images.
        train_size: Images to train on: the first ones, for a quick run. None: all that validation leaves.
        data_dir: Folder that holds `cifar10/`; an absent archive is downloaded there. None: the folder that the
            environment variable ARCHZOO_DATA names, else `archzoo` in the user's cache.
        seed: Not needed: the split is the same in every run.

    Raises:
        DatasetError: If no file is there nor to be downloaded, or it is not the right one.
        ValueError: If a size is out of range.
    """

    input_shape = (3, 32, 32)
    output_size = 10

    def __init__(
        self, *, val_size: int = 5000, train_size: int | None = None, data_dir: Path | None = None, seed: int = 0
    ):
        super().__init__(data_dir=data_dir, seed=seed)
        left = TRAIN - whole_number("val_size", val_size, 1, TRAIN - 1)
        end = left if train_size is None else whole_number("train_size", train_size, 1, left)
        images, labels = cifar10_arrays(data_dir)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

        def split(part: slice) -> TensorSplit:
            inputs = torch.tensor(images[part]).float().div_(255).sub_(mean).div_(std)
            return TensorSplit(inputs, torch.tensor(labels[part], dtype=torch.int64))

        self.train, self.val, self.test = split(slice(end)), split(slice(left, TRAIN)), split(slice(TRAIN, None))
