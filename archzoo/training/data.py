"""Batches in an order that is a pure function of (seed, epoch, rank), and that can be entered at any step."""

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import multiprocessing.connection
import random
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, cast

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import Dataset

from archzoo.tasks.task import DatasetError, SampleError, Task, TensorSplit


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
        rank, world_size: Which interleaved part of every batch is this process's. The batches are the same at any
            world size, so that a run can go on at another; a part is empty where a batch has fewer examples than ranks.
        batches_per_epoch: End an epoch early, after so many batches.

    Raises:
        ValueError: If there is no such rank.
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
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: must be from 0 to world_size - 1, and world_size is {world_size}")
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
    """Batches of a split in the given order, without end.

    Raises:
        SampleError: From `next`, where a batch cannot be read, or a loader process dies. The global generators are as
            before it, so that a run can be saved then, and go on with this batch; a split that reads whole batches, by
            `__getitems__`, has to leave them alone.
    """
    if workers == 0:
        return _direct(task, split, order.tensors())
    return LoaderProcesses(task, split, order, workers, pin)


def _direct(task: Task, split: Dataset[Any], order: Iterable[Tensor]) -> Iterator[Any]:
    if hasattr(split, "__getitems__"):
        yield from (_read(task, split, indices) for indices in order)
        return
    for indices in order:
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        try:
            batch = _read(task, split, indices)
        except SampleError:
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
            raise
        yield batch


def _read(task: Task, split: Dataset[Any], indices: Tensor, worker: int | None = None) -> Any:
    try:
        if isinstance(split, TensorSplit):
            return split.__getitems__(indices)
        fetch, numbers = getattr(split, "__getitems__", None), indices.tolist()
        return task.collate(fetch(numbers) if fetch else [split[i] for i in numbers])
    except Exception as error:  # a split is anyone's code and files; what it raises is kept as the cause
        index, cause = _culprit(split, indices.tolist(), error)
        reason = str(cause) if isinstance(cause, DatasetError) else f"{type(cause).__name__}: {cause}"
        if index is None:
            reason = f"{_listed(indices)}: {reason}"
        raise SampleError(_named(task, split), index, worker, reason) from cause


def _culprit(split: Dataset[Any], numbers: list[int], error: Exception) -> tuple[int | None, Exception]:
    """The first example that cannot be read by itself either, and its error; None where each of them can."""
    for number in numbers:
        try:
            split[number]
        except Exception as found:  # as above
            return number, found
    return None, error


def _named(task: Task, split: Dataset[Any]) -> str:
    names = (name for name in ("train", "val", "test") if getattr(task, name, None) is split)
    return f"{type(task).__name__}, split {next(names, type(split).__name__)}"


def _listed(indices: Tensor) -> str:
    return f"examples {', '.join(map(str, indices[:10].tolist()))}{', …' if len(indices) > 10 else ''}"


class LoaderProcesses(Iterator[Any]):
    """Batches that several processes read ahead, in their order.

    Beside torch's DataLoader: a process that dies is found by the end of its own pipe, at once, in `next` and nowhere
    else. DataLoader raises in whatever the main process is doing, as halfway through the optimizer's step or a
    checkpoint, and shares locks with its workers, for which it waits in vain after a kill. And what a split draws at
    random depends on the batch alone, not on which process has read how many batches before: it is the same in a run
    that was resumed.

    Args:
        task: The task, which collates.
        split: What is read.
        order: The batches.
        workers: Number of processes, each of which reads `AHEAD` batches ahead.
        pin: Whether to put batches into page-locked memory.
    """

    AHEAD = 2

    def __init__(self, task: Task, split: Dataset[Any], order: BatchOrder, workers: int, pin: bool):
        self.dataset, self.pin = _named(task, split), pin
        context = torch.multiprocessing.get_context()
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for worker in range(workers):
            ours, theirs = context.Pipe()
            seed = (order.seed, order.rank)
            process = context.Process(target=_serve, args=(theirs, task, split, seed, worker), daemon=True)
            process.start()
            theirs.close()  # its process has the only one, whose end is then the end of the pipe
            self._pipes.append(ours)
            self._processes.append(process)
        # Registered after multiprocessing's own, and so called before it, which would wait for them at exit.
        atexit.register(stop := functools.partial(_stop, self._processes))
        self._stop = weakref.finalize(self, stop)
        turns = itertools.cycle(range(workers))
        self._batches = zip(itertools.count(order.start), order.tensors(), turns, strict=False)
        self._asked: deque[tuple[int, Tensor]] = deque()
        for _ in range(self.AHEAD * workers):
            self._ask()

    def __next__(self) -> Any:
        if not self._asked:
            raise StopIteration
        worker, indices = self._asked.popleft()
        try:
            batch = self._pipes[worker].recv()
        except Exception as error:  # of several kinds: its tensors go with a process, too
            batch = self._death(worker, indices, error)
        if isinstance(batch, SampleError):
            self._asked.clear()
            self._stop()
            raise batch
        self._ask()
        return tuple(part.pin_memory() for part in batch) if self.pin else batch

    def _ask(self) -> None:
        number, indices, worker = next(self._batches)
        self._asked.append((worker, indices))
        # Not as a tensor, which would go by shared memory and a thread of ours that serves it.
        with contextlib.suppress(OSError):  # it is dead, which its batch will tell
            self._pipes[worker].send((number, indices.numpy()))

    def _death(self, worker: int, indices: Tensor, error: Exception) -> SampleError:
        self._processes[worker].join(timeout=5.0)
        code = self._processes[worker].exitcode
        if code is None:
            reason = f"its batch did not arrive ({type(error).__name__}: {error})"
        elif code < 0:
            reason = f"it was killed by {signal.Signals(-code).name}"
            reason += ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
        else:
            reason = f"it ended, with exit code {code}"
        return SampleError(self.dataset, None, worker, f"{reason}; its next were {_listed(indices)}")


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()  # it has nothing to finish, and ignores what else could end it
    while processes:
        processes.pop().join()


def _serve(pipe: Connection, task: Task, split: Dataset[Any], seed: tuple[int, int], worker: int) -> None:
    """A loader process: answers numbered lists of indices with batches, or with what was wrong."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # of the whole group: the main process ends us
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = cast(BaseProcess, multiprocessing.parent_process())
    while pipe in multiprocessing.connection.wait([pipe, parent.sentinel]):
        try:
            number, array = pipe.recv()
        except EOFError:
            return
        indices = torch.from_numpy(array)
        words = np.random.SeedSequence((*seed, number)).generate_state(3)
        torch.manual_seed(int(words[0]))
        np.random.seed(words[1])
        random.seed(int(words[2]))
        try:
            answer = _read(task, split, indices, worker)
        except SampleError as error:
            answer = error
            answer.add_note("".join(traceback.format_exception(error.__cause__)))
        try:
            pipe.send(answer)
        except OSError:
            return
        except Exception as error:  # what cannot be pickled says so in many ways
            reason = f"{_listed(indices)}: the batch cannot be sent ({type(error).__name__}: {error})"
            pipe.send(SampleError(_named(task, split), None, worker, reason))


def eval_batches(
    task: Task, split: Dataset[Any], batch_size: int, limit: int | None, *, rank: int = 0, world_size: int = 1
) -> Iterator[Any]:
    """Batches of a split from first to last, the last one shorter.

    Every rank gets its part of every batch, and no batch where that part is empty: ranks may differ in the number of
    batches by one, or, where a batch is smaller than the world, have none at all.

    Args:
        task: The task, which collates.
        split: What is evaluated.
        batch_size: Examples a batch over all ranks.
        limit: Number of batches to end after; None: all.
        rank, world_size: Which part of the split is this process's; each example is one rank's.
    """
    examples = len(cast(Sized, split))
    count = -(-examples // batch_size)
    order = BatchOrder(examples, batch_size, seed=0, shuffle=False, rank=rank, world_size=world_size)
    order.batches_per_epoch = min(count, limit) if limit else count
    parts = (indices for indices in itertools.islice(order.tensors(), order.batches_per_epoch) if len(indices))
    return _direct(task, split, parts)
