"""Batches in an order that is a pure function of (seed, epoch, rank), and that can be entered at any step."""

from collections.abc import Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from archzoo.tasks.task import Task, TensorSplit


class BatchOrder:
    """Index batches without end, epoch after epoch, from a given batch on.

    A shuffled epoch leaves out what does not fill a last batch: another part each epoch, for the order differs. A batch
    size of all examples or more gives the full batch, always in the examples' own order: the loss of every step is one
    and the same sum, to the last bit.

    Args:
        examples: Number of examples in the split.
        batch_size: Examples a batch over all ranks.
        seed: Seed of the order.
        shuffle: Whether each epoch has an order of its own; else examples come as they are.
        start: Number of batches to leave out at the beginning.
        rank, world_size: Which interleaved part of every batch is this process's.
        batches_per_epoch: End an epoch early, after so many batches.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batches_per_epoch: int | None = None,
    ):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.shuffle = shuffle and batch_size < examples
        self.start, self.rank, self.world_size = start, rank, world_size
        full = max(1, examples // batch_size)
        self.batches_per_epoch = min(full, batches_per_epoch) if batches_per_epoch else full

    def __iter__(self) -> Iterator[list[int]]:
        return (indices.tolist() for indices in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """The same batches as int64 tensors, which index a tensor faster than lists do."""
        epoch, batch = divmod(self.start, self.batches_per_epoch)
        while True:
            order = self._order(epoch) if self.shuffle else None
            for k in range(batch, self.batches_per_epoch):
                begin, end = k * self.batch_size, min((k + 1) * self.batch_size, self.examples)
                indices = order[begin:end] if order is not None else torch.arange(begin, end)
                yield indices[self.rank :: self.world_size] if self.world_size > 1 else indices
            epoch, batch = epoch + 1, 0

    def _order(self, epoch: int) -> Tensor:
        # SeedSequence mixes the two numbers; seed + epoch would give run 1 the order that run 0 has an epoch later.
        mixed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0] >> 1)
        return torch.randperm(self.examples, generator=torch.Generator().manual_seed(mixed))


def train_batches(task: Task, split: Dataset[Any], order: BatchOrder, workers: int, pin: bool = False) -> Iterator[Any]:
    """Batches of a split in the given order, without end."""
    if workers == 0:
        if isinstance(split, TensorSplit):
            return (split.__getitems__(indices) for indices in order.tensors())
        return _direct(task, split, order)
    # A loader of its own generator: its __iter__ otherwise draws from the global one, and a resumed run would differ.
    generator = torch.Generator().manual_seed(order.seed)
    loader = DataLoader(
        split,
        batch_sampler=cast(Any, order),
        num_workers=workers,
        collate_fn=task.collate,
        generator=generator,
        pin_memory=pin,
    )
    return iter(loader)


def _direct(task: Task, split: Dataset[Any], order: BatchOrder) -> Iterator[Any]:
    fetch = getattr(split, "__getitems__", None)
    for indices in order:
        yield task.collate(fetch(indices) if fetch else [split[i] for i in indices])


def eval_batches(task: Task, split: Dataset[Any], batch_size: int, limit: int | None) -> Iterator[Any]:
    """Batches of a split from first to last, the last one shorter."""
    examples = len(cast(Sized, split))
    count = -(-examples // batch_size)
    order = BatchOrder(examples, batch_size, seed=0, shuffle=False)
    order.batches_per_epoch = min(count, limit) if limit else count
    batches = train_batches(task, split, order, workers=0)
    return (next(batches) for _ in range(order.batches_per_epoch))
