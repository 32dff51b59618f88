"""Pairs of overlapping digits: how they are drawn and placed, splits, scoring, and the pictures of each digit alone."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from archzoo.tasks import multi_mnist
from archzoo.tasks.multi_mnist import BLOCK, MultiMNIST, draw_pairs, overlay, place_digits
from archzoo.tasks.stream import STREAM_LENGTH
from archzoo.tasks.task import TensorSplit

DATA = os.environ.get("ARCHZOO_DATA")


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    """Random images stand in for MNIST."""

    def splits(source, data_dir, *, val_size, train_size, mean, std):
        assert (mean, std) == (0.0, 1.0)
        parts = []
        for seed, count in enumerate((train_size or 300, val_size, 200)):
            generator = torch.Generator().manual_seed(seed)
            labels = torch.randint(10, (count,), generator=generator)
            images = torch.randint(256, (count, 1, 28, 28), generator=generator) / 255
            parts.append(TensorSplit(images, labels))
        return tuple(parts)

    monkeypatch.setattr(multi_mnist, "idx_splits", splits)


def task(**options):
    return MultiMNIST(**{"val_size": 100, "eval_size": 50, **options})


def pairs_of(count=4000, labels=None, shift=4, seed=0):
    labels = np.random.RandomState(1).randint(10, size=100) if labels is None else labels
    return draw_pairs(np.random.RandomState(seed), labels, count, shift), labels


def test_pairs_are_of_different_classes_and_each_partner_is_as_likely():
    pairs, labels = pairs_of()
    assert pairs.dtype == torch.int64
    assert np.array_equal(pairs[..., 0].numpy(), labels[pairs[..., 1].numpy()])
    assert (pairs[:, 0, 0] != pairs[:, 1, 0]).all()
    assert pairs[..., 2:].unique().tolist() == list(range(-4, 5))
    partners, _ = pairs_of(20000, np.array([0, 1, 0, 2, 1, 0]))
    for first, others in ((0, (1, 3, 4)), (1, (0, 2, 3, 5)), (3, (0, 1, 2, 4, 5))):
        second = partners[partners[:, 0, 1] == first][:, 1, 1]
        counts = torch.bincount(second, minlength=6)
        assert set(counts.nonzero().flatten().tolist()) == set(others)
        assert counts[list(others)].min() > 0.8 * len(second) / len(others)


def test_digits_are_placed_where_the_pair_says_and_what_leaves_is_cut_off():
    images = torch.randint(1, 256, (3, 28, 28), dtype=torch.uint8)
    pairs = torch.tensor([[[7, 2, 0, 0], [1, 0, -4, 4]], [[3, 1, 8, -8], [2, 2, 1, 0]]])
    placed = place_digits(images, pairs)
    assert placed.shape == (2, 2, 1, 36, 36)
    want = torch.zeros(2, 2, 36, 36)
    pixels = images / 255
    want[0, 0, 4:32, 4:32] = pixels[2]
    want[0, 1, 0:28, 8:36] = pixels[0]
    want[1, 0, 12:36, 0:24] = pixels[1, :24, 4:]
    want[1, 1, 5:33, 4:32] = pixels[2]
    assert torch.equal(placed.squeeze(2), want)
    assert torch.equal(overlay(placed.clone()), want.sum(1, keepdim=True).clamp(max=1))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_objects_are_the_digits_that_the_image_is_made_of(split):
    made = task()
    inputs, targets = getattr(made, split).__getitems__(list(range(20)))
    assert (inputs.shape, targets.shape) == ((20, 1, 36, 36), (20, 2, 4))
    assert 0 <= inputs.min() <= inputs.max() <= 1
    labels, pictures = made.objects(inputs, targets)
    assert torch.equal(labels, targets[..., 0])
    assert torch.equal(overlay(pictures.clone()), inputs)
    assert pictures.double().dtype == made.objects(inputs.double(), targets)[1].dtype
    single = getattr(made, split)[7]
    assert torch.equal(single[0], inputs[7])
    assert torch.equal(single[1], targets[7])


def test_splits_use_images_of_their_own_and_the_stream_follows_the_seed():
    made, again, other = task(), task(), task(seed=1)
    numbers = [s.__getitems__(list(range(50)))[1][..., 1] for s in (made.train, made.val, made.test)]
    bounds = [(n.min().item(), n.max().item()) for n in numbers]
    assert bounds[0][0] >= 0
    assert bounds[0][1] < 300 <= bounds[1][0] <= bounds[1][1] < 400 <= bounds[2][0] <= bounds[2][1] < 600
    assert (len(made.train), len(made.val), len(made.test)) == (STREAM_LENGTH, 50, 50)
    for split in ("train", "val", "test"):
        first, second, third = (
            getattr(t, split).__getitems__([3, BLOCK + 3 if split == "train" else 4]) for t in (made, again, other)
        )
        assert torch.equal(first[1], second[1])
        assert torch.equal(first[1], third[1]) == (split != "train")
        assert not torch.equal(first[1][0], first[1][1])


def test_an_answer_is_right_only_if_both_digits_are():
    made = task()
    _, targets = made.test.__getitems__(list(range(3)))
    one, two = targets[..., 0].unbind(1)
    output = torch.zeros(3, 10)
    rows = torch.arange(3)
    output[rows, one] = 0.9
    output[rows, two] = 0.8
    output[1, two[1]] = -1.0  # the second digit of the second image is missed
    output[2] = -output[2]  # both of the third are
    metrics = made.metrics()
    metrics.update(output[:1], targets[:1])
    metrics.update(output[1:], targets[1:])
    values = metrics.compute()
    assert values["accuracy"].item() == pytest.approx(1 / 3)
    assert values["digit_accuracy"].item() == pytest.approx(1 / 2)
    assert values["loss"].item() == pytest.approx(made.loss(output, targets).item(), rel=1e-6)


def test_losses_are_of_both_classes():
    made = task()
    _, targets = made.test.__getitems__(list(range(3)))
    output = torch.rand(3, 10)
    there = torch.zeros(3, 10).scatter_(1, targets[..., 0], 1.0)
    margin = there * (0.9 - output).relu() ** 2 + 0.5 * (1 - there) * (output - 0.1).relu() ** 2
    torch.testing.assert_close(made.loss(output, targets), margin.sum(1).mean())
    nats = -output.log_softmax(1).gather(1, targets[..., 0]).mean()
    torch.testing.assert_close(task(loss="cross_entropy").loss(output, targets), nats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 9}, "shift=9: must be a whole number from 0 to 8"),
        ({"eval_size": 0}, "eval_size=0"),
        ({"loss": "hinge"}, "loss='hinge': there is no such loss"),
        ({"train_size": 1}, "train_size=1: these digits are all of one class"),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        task(**options)


@pytest.mark.skipif(not DATA, reason="ARCHZOO_DATA names no data folder")
def test_real_digits(monkeypatch):
    monkeypatch.undo()
    made = MultiMNIST(eval_size=20, data_dir=Path(DATA))
    inputs, targets = made.test.__getitems__(list(range(20)))
    labels, pictures = made.objects(inputs, targets)
    assert targets[..., 1].min() >= 60000
    assert torch.equal(overlay(pictures.clone()), inputs)
    assert (pictures.flatten(2).sum(2) > 10).all()
    assert (labels[:, 0] != labels[:, 1]).all()
