"""An endless stream of fresh samples: sample i depends on the seed and on i alone, and a run goes on at any place."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

STREAM_LENGTH = 2**48
"""Samples that a stream says it has."""


def stream_key(seed: int, purpose: int) -> int:
    """Key of a generator: streams of other seeds, or of another purpose, have nothing in common."""
    return purpose << 64 | seed % 2**64


def block_generator(key: int, block: int) -> np.random.RandomState:
    """Random numbers of a numbered block.

    Philox makes any place of its sequence at the same cost; RandomState, for NumPy promises never to change it.
    """
    return np.random.RandomState(np.random.Philox(key=key, counter=block << 64))


class BlockStream(Dataset[tuple[Tensor, Tensor]]):
    """Endless fresh samples, drawn in numbered blocks. Whoever asks for one, and in whatever batch, gets the same.

    Meant to be read in order, as the block that was read last is kept. A subclass gives `draw_block`.

    Args:
        block: Samples of a block.
    """

    def __init__(self, block: int):
        self.block = block
        self._number = -1
        self._samples = torch.empty(0), torch.empty(0)

    @abstractmethod
    def draw_block(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a block, each (`block`, ...); a function of the number alone."""

    def __len__(self) -> int:
        return STREAM_LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        if not len(indices):
            inputs, targets = self._get(max(self._number, 0))
            return inputs[:0], targets[:0]
        order = np.asarray(indices, dtype=np.int64)
        if order.min() < 0 or order.max() >= STREAM_LENGTH:
            raise IndexError(f"samples are numbered from 0 to {STREAM_LENGTH - 1}")
        blocks, places = np.divmod(order, self.block)
        starts = np.flatnonzero(np.diff(blocks, prepend=-1))
        parts = []
        for block, rows in zip(blocks[starts], np.split(places, starts[1:]), strict=True):
            first, last = int(rows[0]), int(rows[-1]) + 1
            inputs, targets = self._get(int(block))
            if np.array_equal(rows, np.arange(first, last)):  # in order: a memcpy is faster than a gather
                parts.append((inputs[first:last].clone(), targets[first:last].clone()))
            else:
                parts.append((inputs[rows], targets[rows]))
        return parts[0] if len(parts) == 1 else (torch.cat([x for x, _ in parts]), torch.cat([t for _, t in parts]))

    def _get(self, number: int) -> tuple[Tensor, Tensor]:
        if number != self._number:
            self._samples, self._number = self.draw_block(number), number
        return self._samples
