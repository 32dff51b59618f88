"""Splits: disjoint, complete, fair to every class, the same for ever."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archzoo.tasks.split import random_split, stratified_split
from archzoo.tasks.task import tasks


def assert_partition(parts, count, val, test):
    assert [len(part) for part in parts] == [count - val - test, val, test]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(count))


@given(st.lists(st.integers(0, 6), min_size=3, max_size=300), st.data())
def test_stratified_split_gives_every_class_its_share(labels, data):
    labels = torch.tensor(labels)
    count = len(labels)
    val = data.draw(st.integers(0, count - 2))
    test = data.draw(st.integers(0, count - 1 - val))
    parts = stratified_split(labels, val=val, test=test)
    assert_partition(parts, count, val, test)
    for part, within in zip(parts, (2, 2, 1), strict=True):
        share = torch.bincount(labels, minlength=7) * len(part) / count
        assert (torch.bincount(labels[part], minlength=7) - share).abs().max() < within


def test_random_split_is_a_partition_and_is_pinned():
    parts = random_split(442, val=88, test=88)
    assert_partition(parts, 442, 88, 88)
    assert parts[1][:5].tolist() == random_split(442, val=88, test=88)[1][:5].tolist()
    # Results of different years must be about the same examples.
    assert parts[1][:5].tolist() == [164, 433, 112, 440, 183]
    labels = torch.arange(100) % 3
    assert stratified_split(labels, val=10, test=10)[2][:5].tolist() == [80, 13, 63, 1, 65]


def test_parts_are_in_random_order():
    labels = torch.arange(1000) // 100
    for part in stratified_split(labels, val=200, test=200):
        assert len(labels[part][:50].unique()) == 10  # the first batches hold every class


@pytest.mark.parametrize(
    ("val", "test", "message"), [(5, 5, "nothing of 10"), (-1, 3, "negative"), (3, -1, "negative")]
)
def test_impossible_sizes_are_refused(val, test, message):
    for split in (lambda **k: random_split(10, **k), lambda **k: stratified_split(torch.zeros(10), **k)):
        with pytest.raises(ValueError, match=message):
            split(val=val, test=test)


def test_digits_are_stratified():
    task = tasks.create("digits")
    assert (len(task.train), len(task.val), len(task.test)) == (1197, 300, 300)
    whole = torch.cat([split.targets for split in (task.train, task.val, task.test)]).bincount() / 1797
    for split in (task.train, task.val, task.test):
        assert (split.targets.bincount() - whole * len(split)).abs().max() < 2
    assert task.train.inputs.min() == -1
    assert task.train.inputs.max() == 1
