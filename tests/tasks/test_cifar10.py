"""CIFAR-10 as a classification task, on made-up arrays of its shape."""

import numpy as np
import pytest
import torch

from archzoo.tasks import cifar10
from archzoo.tasks.cifar10 import CIFAR10, MEAN, STD


@pytest.fixture
def arrays(monkeypatch):
    """60,000 images of one colour each, which is their number's; read without a file."""
    values = (np.arange(60_000) % 251).astype(np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (60_000, 3, 32, 32))
    labels = (np.arange(60_000) % 10).astype(np.uint8)
    monkeypatch.setattr(cifar10, "cifar10_arrays", lambda data_dir: (images, labels))
    return values, labels


def test_splits_are_the_first_the_last_of_training_and_the_test_images(arrays):
    values, labels = arrays
    task = CIFAR10(train_size=7, val_size=5)
    for split, start, size in ((task.train, 0, 7), (task.val, 49_995, 5), (task.test, 50_000, 10_000)):
        assert split.inputs.shape == (size, 3, 32, 32)
        assert (split.inputs.dtype, split.targets.dtype) == (torch.float32, torch.int64)
        assert split.targets.tolist() == labels[start : start + size].tolist()
        for channel in range(3):
            pixel = split.inputs[:, channel, 3, 5] * STD[channel] + MEAN[channel]
            expected = torch.from_numpy(values[start : start + size].copy()).float() / 255
            torch.testing.assert_close(pixel, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"val_size": 0}, "val_size=0"), ({"train_size": 45_001}, "train_size=45001"), ({"val_size": 5e4}, "val_size")],
    ids=["val", "train", "fraction"],
)
def test_sizes_out_of_range_are_refused(arrays, options, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10(**options)
