"""Train/validation/test splits that are the same in every run, whatever its seed."""

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 20240430


def random_split(count: int, *, val: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of a random split of `count` examples: (train, val, test), each int64.

    Raises:
        ValueError: If nothing would be left to train on.
    """
    if val + test >= count:
        raise ValueError(f"val={val} and test={test} leave nothing of {count} examples to train on")
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(count))
    return order[val + test :], order[:val], order[val : val + test]


def stratified_split(labels: Tensor, *, val: int, test: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `random_split`, with every class as frequent in each part as in the whole (to within one example).

    Args:
        labels: (count,) class of every example.
    """
    count = len(labels)
    random_split(count, val=val, test=test)  # for its check
    rng = np.random.default_rng(SPLIT_SEED)
    # Every example gets the place in its class, as a fraction; sorting by it interleaves the classes evenly.
    place = np.empty(count)
    values = labels.numpy()
    for label in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == label))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = torch.from_numpy(np.argsort(place, kind="stable"))
    return order[val + test :], order[:val], order[val : val + test]
