"""Several processes that train one model: who they are, what they agree on, and how the model is spread over them.

`torchrun --nproc-per-node=4 train.py …` starts them, on one machine or on many. Each takes its part of every batch
(`archzoo.training.data.BatchOrder`); torch's DistributedDataParallel averages the gradients, or `fully_shard` (FSDP2)
keeps a part of every parameter in each. Only rank 0 writes. Outside a process group everything here is of one process
and costs nothing.

Messages about a run, which may be long in coming, go through the store that torchrun's agents keep, which outlives any
process; figures of a step go through collectives, which end with an error `trainer.rank_timeout` seconds after a
process has died or hangs. CPU tensors go by gloo, CUDA tensors by nccl.
"""

import datetime
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # documented there, and not listed
from torch.distributed.rendezvous import rendezvous

Number = TypeVar("Number", float, Tensor, Tensor | float)
ERRORS_WAIT = 5.0  # seconds in which the other processes may come to the same error
STOP_WAIT = 10.0  # seconds that a process which is asked to stop waits for rank 0 to say how
CONNECTION_SIGNS = ("gloo", "NCCL", "Connection", "pair closure", "Timed out", "timed out", "timeout")
"""In what gloo and nccl say, by RuntimeErrors of no class of their own, of processes that do not answer."""
END = "end"  # the status that rank 0 tells when no run follows


class RankLost(SystemExit):
    """Training cannot go on, for another process has died, or this one has failed alone; ends this process.

    Attributes:
        reason: In words, with the error of the process that was the first to fail, where it told one.
        of_another: Whether another process was the first to fail.
        told: Whether it told an error.
    """

    def __init__(self, reason: str, of_another: bool = False, told: bool = False):
        super().__init__(1)
        self.reason, self.of_another, self.told = reason, of_another, told


class OtherRankError(RuntimeError):
    """What another process told."""


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def initialized() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process; 0 outside a group."""
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    """Number of processes; 1 outside a group."""
    return dist.get_world_size() if initialized() else 1


class _Board:
    """What the processes of a group tell one another through the store."""

    def __init__(self, store: Any):
        self.store = store
        self.messages = 0
        self.runs = 0
        self.lost = False  # rank 0 may have kept the store, and taken it along


_board: list[_Board] = []


@contextmanager
def group(device: torch.device, timeout: float) -> Iterator[None]:
    """Joins the group that torchrun has started, and leaves it.

    Args:
        device: Of this process.
        timeout: Seconds that a collective waits for the other processes.
    """
    seconds = datetime.timedelta(seconds=timeout)
    store, own, count = next(rendezvous("env://", timeout=seconds))
    store = PrefixStore(_session(store, own, count, timeout), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=seconds)
    _board.append(_Board(PrefixStore("archzoo", store)))
    try:
        yield
    finally:
        _board.clear()
    dist.destroy_process_group()  # not after an error: it waits for processes that may not be there any more


def _session(store: Any, own: int, count: int, timeout: float) -> str:
    """A name for this try of the group: torchrun may keep one store over restarts, with the addresses of the dead.

    Rank 0 makes it up. Of a store that another try has used, a process may read that one's first; so each asks the rank
    0 that made the name for an answer to a word of its own, and reads again where there is none.
    """
    if own == 0:
        name = uuid.uuid4().hex
        store.set("archzoo/session", name)
        for other in range(1, count):
            store.wait([f"{name}/word/{other}"])
            store.set(f"{name}/answer/{other}", store.get(f"{name}/word/{other}"))
        return name
    word, until = uuid.uuid4().hex, time.monotonic() + timeout
    while time.monotonic() < until:
        name = store.get("archzoo/session").decode()
        store.set(f"{name}/word/{own}", word)
        again = time.monotonic() + 1.0
        while time.monotonic() < again:
            answer = f"{name}/answer/{own}"
            if store.check([answer]) and store.get(answer).decode() == word:
                return name
            time.sleep(0.02)
    raise RankLost(f"rank 0 did not answer within trainer.rank_timeout={timeout:g} s", of_another=True)


# ---- what the processes tell one another


def agree(value: Any, should_stop: Callable[[], bool] = lambda: False) -> Any:
    """What rank 0 says, plain JSON; it may take its time to say it.

    Args:
        value: Of rank 0; the others' does not count.
        should_stop: Whether this process is asked to stop; then rank 0 has seconds left to say something.

    Raises:
        RankLost: If these seconds pass, or rank 0 has died.
        OtherRankError: If another process tells of an error first.
    """
    if not _board:
        return value
    board = _board[0]
    board.messages += 1
    key = f"message/{board.runs}/{board.messages}"
    if rank() == 0:
        board.store.set(key, json.dumps(value))
        return value
    asked: float | None = None
    while not board.lost:
        with _asking(board):
            if board.store.check([key]):
                return json.loads(board.store.get(key))
        if told := told_error():
            raise OtherRankError(told)
        asked = asked or (time.monotonic() if should_stop() else None)
        if asked is not None and time.monotonic() - asked > STOP_WAIT:
            raise RankLost("stopped while waiting for rank 0")
        time.sleep(0.05)
    raise RankLost("rank 0 has died", of_another=True)


@contextmanager
def _asking(board: _Board) -> Iterator[None]:
    try:
        yield
    except dist.DistError:
        board.lost = True


def begin_run() -> None:
    """All processes begin the next run of a sweep: errors that are told from here on are of it."""
    if _board:
        _board[0].runs += 1
        _board[0].messages = 0  # whoever failed in the last run has missed some


def tell_error(error: str) -> bool:
    """Tells the other processes that this one cannot go on with the run, and whether they all cannot.

    Where all come to an error by themselves, as to one of the configuration, they go on with the next run together.
    Where one does not, it waits in a collective, and this process must end for it to notice.
    """
    if not _board:
        return True
    board = _board[0]
    keys = [f"error/{board.runs}/{i}" for i in range(world_size())]
    with _asking(board):
        board.store.set(keys[rank()], error)
        until = time.monotonic() + ERRORS_WAIT
        while time.monotonic() < until:
            if board.store.check(keys):
                return True
            time.sleep(0.05)
    return False


def end_together(error: Exception) -> None:
    """Ends a run in which this process has come to an error: returns if all have, so that the next run can begin.

    Raises:
        RankLost: If another process has died, or failed alone, or if this one has.
    """
    if not _board or world_size() == 1:
        return
    if isinstance(error, OtherRankError) or not _of_the_connection(error):
        own = f"{type(error).__name__}: {error}"
        if not tell_error(own):
            raise RankLost(f"rank {rank()}: {own}")
        return
    until = time.monotonic() + ERRORS_WAIT
    while (told := told_error()) is None and not _board[0].lost and time.monotonic() < until:
        time.sleep(0.05)
    if told is None:
        first = str(error).partition("\n")[0]
        raise RankLost(f"another process has died or hangs ({first}); the same command goes on", of_another=True)
    raise RankLost(told, of_another=True, told=True)


def _of_the_connection(error: Exception) -> bool:
    """Whether an error is of a collective whose other processes are not there any more."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in CONNECTION_SIGNS)


def told_error() -> str | None:
    """The error of the first other process that told of one in this run, with its rank; None if none did."""
    if not _board:
        return None
    board = _board[0]
    with _asking(board):
        for other in range(world_size()):
            if not board.lost and other != rank() and board.store.check([key := f"error/{board.runs}/{other}"]):
                return f"rank {other}: {board.store.get(key).decode()}"
    return None


def exchange(*figures: float) -> list[float]:
    """The largest of each figure over all processes."""
    if world_size() == 1:
        return list(figures)
    both = torch.tensor(figures, dtype=torch.float64)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return cast(list[float], both.tolist())


def mean(value: Number) -> Number:
    """The mean of a tensor or a number over all processes; the value itself where there is one."""
    if world_size() == 1:
        return value
    total = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    total /= world_size()
    return total if isinstance(value, Tensor) else total.item()


def own_seed(seed: int, step: int) -> int:
    """A seed for what this process alone draws from a step on."""
    return int(np.random.SeedSequence((seed, step, rank())).generate_state(1, np.uint64)[0] >> 1)


def collect(value: Any) -> list[Any]:
    """Everybody's plain value, by rank, for rank 0; the others get an empty list."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, values if rank() == 0 else None)
    return values


def whole_batch(part: Tensor) -> Tensor:
    """The batch of which every process has the part `batch[rank::world_size]`, put together again."""
    count = world_size()
    if count == 1:
        return part
    lengths = torch.zeros(count, dtype=torch.int64)
    lengths[rank()] = len(part)
    dist.all_reduce(lengths)
    padded = part.new_zeros(int(lengths.max()), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    # Every part is the last one's length or one longer: by turns, without the padding at the end.
    return torch.stack(parts, 1).flatten(0, 1)[: int(lengths.sum())]


def share_tensors(tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Rank 0's tensors by file and name, on the CPU, for all processes."""
    if world_size() == 1:
        return tensors
    shapes = {f: {n: (tuple(t.shape), t.dtype) for n, t in named.items()} for f, named in tensors.items()}
    told = [shapes]
    dist.broadcast_object_list(told, src=0)
    if rank() > 0:
        tensors = {f: {n: torch.empty(s, dtype=d) for n, (s, d) in named.items()} for f, named in told[0].items()}
    copy_from_rank_0(t for named in tensors.values() for t in named.values())
    return tensors


def copy_from_rank_0(tensors: Iterable[Tensor]) -> None:
    """Makes tensors in place what they are in rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def end_process(lost: RankLost) -> NoReturn:
    """Ends this process at once, with exit code 1 and the reason on stderr; torchrun shows it too, and ends the others.

    No handler of Python's or of torch's runs, for they may wait for processes that are not there any more.
    """
    print(f"error: {lost.reason}", file=sys.stderr)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(RuntimeError(lost.reason))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
