"""Train/validation/test splits that are the same in every run, whatever its seed."""

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 20240430
# RandomState throughout, not default_rng: NumPy promises that its numbers never change.


def random_split(count: int, *, val: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a random split of `count` examples: (train, val, test), each int64.

    Raises:
        ValueError: If a size is negative, or nothing would be left to train on.
    """
    _check(count, val, test)
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(count))
    return order[val + test :], order[:val], order[val : val + test]


def stratified_split(labels: Tensor, *, val: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `random_split`, with every class about as frequent in each part as in the whole.

    A class's count in the test part is within one of its share, in the others within two.

    Args:
        labels: (count,) class of every example.
    """
    count = len(labels)
    _check(count, val, test)
    rng = np.random.RandomState(SPLIT_SEED)
    order = rng.permutation(count)
    rest = order[np.argsort(labels.numpy()[order], kind="stable")]

    def take(size: int) -> Tensor:
        """Takes examples out of the rest at equal distances; as it is sorted by class, each class gives its share."""
        nonlocal rest
        taken = np.diff(np.arange(len(rest) + 1) * size // len(rest)) > 0
        part, rest = rest[taken], rest[~taken]
        return torch.from_numpy(rng.permutation(part))

    test_part, val_part = take(test), take(val)
    return take(len(rest)), val_part, test_part


def _check(count: int, val: int, test: int) -> None:
    if val < 0 or test < 0:
        raise ValueError(f"val={val} and test={test} must not be negative")
    if val + test >= count:
        raise ValueError(f"val={val} and test={test} leave nothing of {count} examples to train on")
