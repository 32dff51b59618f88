"""Memory of a training step: what is said when it does not suffice, and the largest batch for which it does."""

import copy
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from archzoo.tasks.task import Task
from archzoo.training import distributed
from archzoo.training.config import AUTO, ConfigError, TrainConfig
from archzoo.training.data import BatchOrder, train_batches
from archzoo.training.optimizing import build_optimizer

log = logging.getLogger("archzoo")
PART = 0.8  # of the memory that is free: evaluations, loaders and other processes want some too
ENOUGH = 64 * 2**20  # bytes by which batches must differ for the difference to tell what an example takes
GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def out_of_memory(config: TrainConfig, batch_size: int, device: torch.device) -> str:
    """What a run that has run out of memory says: at which batch size, with what peak, and what may help."""
    t = config.trainer
    peak, of = _peak_and_limit(device)
    told = "" if peak is None else f", with a peak of {peak / GIB:.2f} GiB"
    told += "" if of is None else f" of {of / GIB:.2f}"
    smaller = max(1, batch_size // 2)
    helps = [f"trainer.batch_size={smaller} trainer.accumulate={t.accumulate * 2} makes the same step in less memory"]
    if not t.checkpoint_activations:
        helps.append("trainer.checkpoint_activations=true computes blocks again instead of keeping them")
    if t.batch_size != AUTO:
        helps.append("trainer.batch_size=auto takes the largest batch that fits")
    return f"out of memory at trainer.batch_size={batch_size} on {device}{told}; {'; '.join(helps)}"


def _peak_and_limit(device: torch.device) -> tuple[int | None, int | None]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return resident("VmHWM"), _meminfo("MemTotal")


def resident(field: str = "VmRSS") -> int | None:
    """Bytes that this process holds in memory; with `VmHWM`, the most since `reset_peak`. None where it is not told."""
    return _field(Path("/proc/self/status"), field)


def _meminfo(field: str) -> int | None:
    return _field(Path("/proc/meminfo"), field)


def _field(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        return None


def free_memory() -> int | None:
    """Bytes that this process may still take on the CPU, of the machine's or its control group's; None if unknown."""
    free = [value for value in (_meminfo("MemAvailable"), _left_in_group()) if value is not None]
    return min(free, default=None)


def _left_in_group() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        most = (folder / "memory.max").read_text().strip()
        return None if most == "max" else int(most) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None


# ---- the largest batch


def resolve_batch_size(
    config: TrainConfig, task: Task, model: nn.Module, device: torch.device, known: int | None = None
) -> None:
    """Puts a number in the place of `trainer.batch_size=auto`: the largest power of two that fits, or all examples.

    Every process of a group takes the same part, of which the one with the least memory decides.

    Args:
        config: Is changed.
        task: The task.
        model: As it is built; it stays as it is.
        device: Where it is to be trained.
        known: What an interrupted try of this run has found, which is taken again.

    Raises:
        ConfigError: If not even one example fits, or if the system does not tell how much memory is free.
    """
    if config.trainer.batch_size != AUTO:
        return
    if known is None:
        processes = distributed.world_size()
        examples = len(task.train)  # type: ignore[arg-type]  # every split has a length
        with torch.random.fork_rng():
            own = _largest(config, task, model, device, max(1, examples // processes))
        known = -int(distributed.exchange(-own)[0]) * processes
        log.info("trainer.batch_size=auto: %d", known)
    config.trainer.batch_size = known


def _largest(config: TrainConfig, task: Task, model: nn.Module, device: torch.device, examples: int) -> int:
    def step(size: int) -> int | None:
        try:
            return step_memory(config, task, model, device, size)
        except Exception as error:  # of many kinds, of which one is an answer
            if not is_out_of_memory(error):
                raise
            return None

    if device.type == "cuda":
        found = _largest_that_runs(step, examples)
    else:
        free, held = free_memory(), resident()
        if free is None or held is None:
            raise ConfigError(
                "trainer.batch_size=auto: this system does not tell how much memory is free; give a number, as "
                "trainer.batch_size=64"
            )
        found = largest_that_should_fit(step, examples, held + int(PART * free))
    if found == 0:
        raise ConfigError(
            "trainer.batch_size=auto: not even one example fits into memory; choose a smaller model, or "
            "trainer.checkpoint_activations=true"
        )
    return found


def _largest_that_runs(step: Callable[[int], int | None], examples: int) -> int:
    """By trying, on a GPU, which refuses what does not fit."""
    found, size = 0, 1
    while found < examples:
        size = min(size, examples)
        if step(size) is None:
            break
        found, size = size, 2 * size
    return found


def largest_that_should_fit(step: Callable[[int], int | None], examples: int, limit: int) -> int:
    """By measuring small batches, on a CPU, where a process that takes too much is not refused but killed.

    Args:
        step: Size of a batch -> peak bytes of a step; None if it was refused.
        examples: The largest size.
        limit: The most bytes.
    """
    found, size, before, measured = 0, 1, 0, 0
    while found < examples:
        size = min(size, examples)
        peak = step(size)
        if peak is None or peak > limit:
            return found
        each = (peak - before) / (size - measured) if measured else 0.0
        if measured and peak - before >= ENOUGH:
            most = size + (limit - peak) / each
            return examples if most >= examples else 2 ** math.floor(math.log2(most))
        found, before, measured, size = size, peak, size, 2 * size
    return found


def step_memory(config: TrainConfig, task: Task, model: nn.Module, device: torch.device, size: int) -> int:
    """Peak bytes of a training step of so many examples, on a copy of the model.

    On a CPU all that the process holds is counted, so that only differences between sizes tell of the step.
    """
    t = config.trainer
    dtype = torch.float64 if t.precision == "float64" else torch.float32
    autocast = t.precision in ("bfloat16", "float16")
    _reset_peak(device)
    own = copy.deepcopy(model).to(device, dtype).train()
    optimizer = build_optimizer(config.optimizer, own)
    inputs, targets = (
        part.to(device, dtype if part.is_floating_point() else None)
        for part in next(train_batches(task, task.train, BatchOrder(size, size, seed=0), workers=0))
    )
    with torch.autocast(device.type, getattr(torch, t.precision)) if autocast else nullcontext():
        loss = task.training_loss(own, inputs, targets)
    loss.backward()
    if config.optimizer.name == "lbfgs":
        optimizer.step(lambda: loss.item())
    else:
        optimizer.step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
    if peak is None:
        raise ConfigError(
            "trainer.batch_size=auto: this system does not tell a process's peak of memory; give a number, as "
            "trainer.batch_size=64"
        )
    return peak


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()


def reset_peak() -> None:
    """The most that this process has held, `VmHWM`, begins anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # Linux only, and not in every container: the peak is then that of the process
        return
