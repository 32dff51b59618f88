"""Autoencoding: targets, splits, k-NN accuracy of the latents; and CIFAR-10, which only this task reads."""

import dataclasses
import hashlib
import io
import math
import os
import re
import tarfile

import numpy as np
import pytest
import torch
from torch import nn

from archzoo.models.autoencoder import Autoencoder
from archzoo.models.model import LayerFactory
from archzoo.tasks import cifar10
from archzoo.tasks.autoencoding import Autoencoding
from archzoo.tasks.cifar10 import cifar10_arrays
from archzoo.tasks.digits import Digits
from archzoo.tasks.task import DatasetError

needs_data = pytest.mark.skipif(not os.environ.get("ARCHZOO_DATA"), reason="ARCHZOO_DATA names no data folder")
LAST = {"step": 1.0, "val/mse": 0.1}


@pytest.fixture(scope="module")
def digits():
    return Autoencoding(dataset="digits")


def rows(split, step=1):
    return split.__getitems__(slice(None, None, step))


class Coder(nn.Module):
    """A model whose latent is a function of the image, and which must be evaluated as in evaluation."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def encode(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert x.dtype == torch.float64
        return self.function(x)


def test_target_is_the_image_with_pixels_from_0_to_1(digits):
    inputs, targets = digits.train.__getitems__([3, 5, 8])
    assert inputs.shape == (3, 1, 8, 8)
    assert torch.equal(targets, inputs.flatten(1))
    assert torch.equal(digits.train[5][0], inputs[1])
    assert torch.equal(digits.train[5][1], targets[1])
    everything, _ = rows(digits.train)
    assert (everything.min(), everything.max()) == (0, 1)
    assert (digits.input_shape, digits.output_size) == ((1, 8, 8), 64)


def test_splits_are_those_of_the_task_of_the_same_name(digits):
    original = Digits()
    for name in ("train", "val", "test"):
        ours, theirs = getattr(digits, name), getattr(original, name)
        assert torch.equal(rows(ours)[0] * 2 - 1, theirs.inputs)
        assert torch.equal(ours.labels, theirs.targets)
    few = Autoencoding(dataset="digits", train_size=7)
    assert torch.equal(few.train.images, digits.train.images[:7])
    assert len(few.val) == len(few.test) == 300


def test_score_is_the_mean_squared_error_of_a_pixel(digits):
    metrics = digits.metrics()
    _, targets = rows(digits.test)
    output = targets + torch.tensor([0.1, -0.1]).repeat(32)
    metrics.update(output[:200], targets[:200])
    metrics.update(output[200:], targets[200:])
    assert metrics.compute()[digits.score].item() == pytest.approx(0.01, rel=1e-4)
    assert digits.loss(output, targets).item() == pytest.approx(0.01, rel=1e-4)
    assert digits.mode == "min"


def test_accuracy_is_that_of_a_vote_of_the_nearest_neighbours(digits):
    task = Autoencoding(dataset="digits", neighbors=3, voters=100)
    known, asked = (s.images.flatten(1).double() for s in (task.train, task.test))
    nearest = torch.cdist(asked, known[:100]).topk(3, largest=False).indices
    votes = nn.functional.one_hot(task.train.labels[nearest], 10).sum(1)
    right = votes.gather(1, task.test.labels[:, None])[:, 0]
    clear = votes.max(1).values > 1  # no tie
    accuracy = task.knn_accuracy(lambda images: images)
    least, most = (
        ((right > 1) | extra).double().mean().item() for extra in (torch.tensor(False), ~clear & (right == 1))
    )
    assert least <= accuracy <= most
    assert most - least < 0.1
    assert 0.7 < accuracy < digits.pixel_accuracy
    assert digits.knn_accuracy(lambda images: images, batch_size=77) == digits.pixel_accuracy > 0.97


def test_summary_judges_the_latents_beside_the_pixels(digits):
    same = Coder(lambda x: x.flatten(1)).train()
    figures = digits.summarize([LAST], same)
    assert figures == {"knn_accuracy_pixels": digits.pixel_accuracy, "knn_accuracy": digits.pixel_accuracy}
    assert same.training
    blind = digits.summarize([LAST], Coder(lambda x: torch.zeros(len(x), 2)))
    assert blind["knn_accuracy"] < 0.2
    broken = digits.summarize([LAST], Coder(lambda x: x.flatten(1) / 0))
    assert math.isnan(broken["knn_accuracy"])
    assert digits.summarize([LAST], nn.Linear(64, 64)) == {"knn_accuracy_pixels": digits.pixel_accuracy}


def test_latents_of_a_trained_autoencoder_tell_the_digits_apart(digits):
    model = Autoencoder(LayerFactory("kan"), digits.input_shape, digits.output_size, width=32, latent=8)
    untrained = digits.summarize([LAST], model)["knn_accuracy"]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    inputs, targets = rows(digits.train)
    for _ in range(150):
        loss = digits.loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = digits.summarize([LAST], model)["knn_accuracy"]
    inputs, targets = rows(digits.test)
    mean_image = (targets - rows(digits.train)[1].mean(0)).square().mean()
    assert digits.loss(model(inputs), targets) < 0.5 * mean_image
    assert trained > max(untrained, 0.85)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "minst"}, "dataset='minst': there is no such data set; did you mean 'mnist'"),
        ({"dataset": "svhn"}, "dataset='svhn'"),
        ({"train_size": 0}, "train_size=0: must be a whole number from 1 to 1197"),
        ({"train_size": 1198}, "train_size=1198"),
        ({"neighbors": 0}, "neighbors=0"),
        ({"neighbors": 6, "voters": 5}, "neighbors=6: must be a whole number from 1 to 5"),
        ({"neighbors": 6, "train_size": 5}, "neighbors=6: must be a whole number from 1 to 5"),
        ({"voters": 0}, "voters=0"),
        ({"voters": 2.5}, "voters=2.5"),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Autoencoding(**{"dataset": "digits", **options})


@needs_data
@pytest.mark.parametrize(
    ("dataset", "shape"), [("mnist", (1, 28, 28)), pytest.param("fashion_mnist", (1, 28, 28), marks=pytest.mark.slow)]
)
def test_real_images_are_those_of_their_own_task(dataset, shape):
    from archzoo.tasks.task import tasks

    task, original = Autoencoding(dataset=dataset), tasks.create(dataset)
    assert task.input_shape == shape
    mean, std = (0.1307, 0.3081) if dataset == "mnist" else (0.2860, 0.3530)
    for name in ("train", "val", "test"):
        ours, theirs = getattr(task, name), getattr(original, name)
        assert torch.equal(ours.labels, theirs.targets)
        torch.testing.assert_close((rows(ours, 500)[0] - mean) / std, theirs.inputs[::500], rtol=1e-5, atol=1e-5)


# --- CIFAR-10 ----------------------------------------------------------------------------------------------------

IMAGES = np.random.RandomState(0).randint(0, 256, (600, 3, 32, 32)).astype(np.uint8)
LABELS = (np.arange(600) % 10).astype(np.uint8)


def archive():
    """The official archive with 100 images a file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        names = ["test_batch", *(f"data_batch_{i}" for i in (5, 1, 2, 3, 4))]  # in any order
        parts = dict(zip(sorted(names), range(0, 600, 100), strict=True))
        for name in names:
            part = slice(parts[name], parts[name] + 100)
            data = np.concatenate([LABELS[part, None], IMAGES[part].reshape(100, -1)], 1).tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("cifar-10-batches-bin/readme.html"))
    return stream.getvalue()


def packed():
    """The packed copy: six sheets of 10 x 10 images."""
    from PIL import Image

    sheets = []
    for number in range(6):
        grid = IMAGES[100 * number : 100 * number + 100].transpose(0, 2, 3, 1).reshape(10, 10, 32, 32, 3)
        stream = io.BytesIO()
        Image.fromarray(grid.transpose(0, 2, 1, 3, 4).reshape(320, 320, 3)).save(stream, "WEBP", lossless=True)
        sheets.append(np.frombuffer(stream.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, sheets)])
    stream = io.BytesIO()
    np.savez(stream, sheets=np.concatenate(sheets), offsets=offsets, labels=LABELS)
    return stream.getvalue()


@pytest.fixture
def small_cifar(monkeypatch, tmp_path):
    """Six hundred images stand in for CIFAR-10, and no mirror answers."""
    contents = {cifar10.ARCHIVE: archive(), cifar10.PACKED: packed()}
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    source = dataclasses.replace(cifar10.SOURCE, sha256=sha256, mirrors=("http://127.0.0.1:9/",))
    monkeypatch.setattr(cifar10, "SOURCE", source)
    monkeypatch.setattr(cifar10, "TRAIN", 500)
    monkeypatch.setattr("archzoo.tasks.autoencoding.VAL_SIZE", 100)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "cifar10").mkdir()
    cifar10_arrays.cache_clear()
    yield tmp_path, contents
    cifar10_arrays.cache_clear()


@pytest.mark.parametrize("file", [cifar10.ARCHIVE, cifar10.PACKED])
def test_cifar10_is_read_from_the_archive_and_from_the_packed_copy(small_cifar, file):
    folder, contents = small_cifar
    (folder / "cifar10" / file).write_bytes(contents[file])
    images, labels = cifar10_arrays(folder)
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(labels, LABELS)
    task = Autoencoding(dataset="cifar10", data_dir=folder)
    assert (len(task.train), len(task.val), len(task.test)) == (400, 100, 100)
    assert (task.input_shape, task.output_size) == ((3, 32, 32), 3072)
    assert torch.equal(rows(task.val)[0], torch.tensor(IMAGES[400:500]) / 255)
    assert task.test.labels.tolist() == LABELS[500:].tolist()


def test_cifar10_that_is_damaged_or_absent_is_said_so(small_cifar):
    folder, contents = small_cifar
    with pytest.raises(DatasetError, match=r"CIFAR-10: there is no .*cifar-10-binary\.tar\.gz"):
        Autoencoding(dataset="cifar10", data_dir=folder)
    path = folder / "cifar10" / cifar10.PACKED
    path.write_bytes(contents[cifar10.PACKED][:-1])
    with pytest.raises(DatasetError, match=rf"{re.escape(str(path))} is cut short, corrupted"):
        Autoencoding(dataset="cifar10", data_dir=folder)


@pytest.mark.slow
@needs_data
def test_real_cifar10_is_the_known_one():
    images, labels = cifar10_arrays(None)
    assert hashlib.sha256(images.tobytes()).hexdigest() == (
        "80a27bb702a74381271abc1679c0e2efa7d3c2a1e907ec3bd97e71eed9ac7a3b"
    )
    assert np.bincount(labels[:50_000]).tolist() == [5000] * 10
    assert np.bincount(labels[50_000:]).tolist() == [1000] * 10
