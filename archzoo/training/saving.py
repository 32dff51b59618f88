"""A run's checkpoints: when one cannot be written, and which one a run goes on from."""

import json
import logging
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo._version import __version__
from archzoo.training import distributed
from archzoo.training.checkpoint import (
    SEPARATOR,
    CheckpointError,
    FormatError,
    SaveError,
    list_checkpoints,
    load_checkpoint,
    replace_file,
    save_checkpoint,
    sweep_partial,
)
from archzoo.training.config import ELEMENTWISE
from archzoo.training.loop import Trainer
from archzoo.training.writing import Lines

log = logging.getLogger("archzoo")
FAILURES = 3
"""So many checkpoints in a row that cannot be written stop a run."""


class Saver:
    """Writes the checkpoints of a run.

    Args:
        folder: The run's.
        about: What a checkpoint says of the run beside its state: `run_id`, `config`, `git`.
        on_error: What a checkpoint that cannot be written does: `warn` or `stop`, as `trainer.on_save_error`.
        keep: How many of the newest stay.

    Attributes:
        error: What went wrong with the last checkpoint that could not be written, None if all could.
    """

    def __init__(self, folder: Path, about: dict[str, Any], on_error: str, keep: int):
        self.folder, self.about, self.keep = folder, about, keep
        self.allowed = 1 if on_error == "stop" else FAILURES
        self.in_a_row = 0
        self.error: str | None = None

    def save(self, trainer: Trainer, metrics: Lines) -> None:
        """Writes a checkpoint that counts on the lines of metrics so far.

        Raises:
            SaveError: If it cannot be written, and the run shall not go on without. The older ones are left.
        """
        tensors, state = trainer.state()
        try:
            state |= {"metrics_bytes": metrics.sync(), **_circumstances(trainer), **self.about}
            save_checkpoint(self.folder / "checkpoints", trainer.step, tensors, state, self.keep)
        except OSError as error:
            self.in_a_row += 1
            needed = len(json.dumps(state)) + sum(t.nbytes for named in tensors.values() for t in named.values())
            self.error = (
                f"{self.folder / 'checkpoints'}: no checkpoint at step {trainer.step} ({error.strerror}; it needs "
                f"{needed} bytes, {_free(self.folder)} are free)"
            )
            if self.in_a_row >= self.allowed:
                raise SaveError(f"{self.error}; with room there, the same command goes on") from error
            log.warning("%s; training goes on", self.error)
        else:
            self.in_a_row = 0


def _circumstances(trainer: Trainer) -> dict[str, Any]:
    """What must be the same for a run to go on bit for bit."""
    return {
        "versions": {"archzoo": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": trainer.device.type,
    }


def _free(folder: Path) -> int | str:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return "an unknown number"


def resume(trainer: Trainer, folder: Path, run_id: str) -> None:
    """Takes up a run's newest checkpoint that can be used, and drops what was logged after it.

    Sweeps away what a writer that was killed left half done. Without any checkpoint, the run begins with empty files.

    Raises:
        FormatError: If the newest is of a format that is not read.
        CheckpointError: If there are checkpoints, and none can be used; or if one is whole, and not of this run.
    """
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    for place in (folder, folder / "pictures", checkpoints):
        sweep_partial(place)
    refused: list[CheckpointError] = []
    for path in list_checkpoints(checkpoints):
        try:
            tensors, state = load_checkpoint(path)
            size = _check_metrics(path, state, metrics)
        except FormatError:
            raise
        except CheckpointError as error:
            refused.append(error)
            continue
        for why in refused:
            log.warning("this checkpoint is not used: %s; going on from %s", why, path.name)
        take_up(trainer, path, tensors, state, run_id)
        if metrics.exists():  # else none of its lines was due yet
            os.truncate(metrics, size)
        _drop_texts(folder / "samples.jsonl", trainer.step)
        log.info("resumed from %s", path.name)
        _tell_changes(_circumstances(trainer), state)
        return
    if refused:
        raise CheckpointError(
            f"{'; '.join(map(str, refused))}; {checkpoints} holds no other; sweep.retry_failed=true trains the run "
            "again from its start"
        )
    distributed.agree(None)
    metrics.unlink(missing_ok=True)
    (folder / "samples.jsonl").unlink(missing_ok=True)


def follow(trainer: Trainer) -> None:
    """Takes up, in the other processes of a group, what `resume` takes up in rank 0."""
    if (state := distributed.agree(None, trainer.should_stop)) is not None:
        trainer.load_state({}, state)


def take_up(
    trainer: Trainer, path: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], run_id: str
) -> None:
    """Loads what was read from a checkpoint.

    Raises:
        CheckpointError: If it is of another run, model or optimizer. Then the trainer is of no more use.
    """
    if state.get("run_id") != run_id:
        raise CheckpointError(f"{path}: of run {state.get('run_id')!r}, and this is run {run_id!r}")
    try:
        _check_model(trainer, tensors["training"], tensors["best"], tensors.get("ema", {}))
        if trainer.config.optimizer.name in ELEMENTWISE:
            _check_moments(tensors["training"], state["optimizer"])
        distributed.agree(state)
        trainer.load_state(tensors, state)
    except Exception as error:  # what is missing, or of another type, fails in many ways
        told = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: does not fit this run ({told})") from error


def _check_metrics(path: Path, state: dict[str, Any], metrics: Path) -> int:
    """The size that metrics.jsonl had, which no later line may have made smaller."""
    size = state.get("metrics_bytes")
    present = metrics.stat().st_size if metrics.exists() else 0
    if type(size) is not int or not 0 <= size <= present:
        raise CheckpointError(f"{path}: counts on {size!r} bytes of {metrics}, which has {present}")
    return size


def _check_model(trainer: Trainer, training: dict[str, Tensor], *others: dict[str, Tensor]) -> None:
    """Refuses what torch would load in silence, a tensor of another dtype, and other weights that do not fit it."""
    model = {key.removeprefix("model."): value for key, value in training.items() if key.startswith("model.")}
    present = {key.removeprefix("module."): value for key, value in trainer.model.state_dict().items()}
    for name, found in model.items():
        if (own := present.get(name)) is not None and own.dtype != found.dtype:
            raise CheckpointError(f"{name} is {found.dtype}, and the model's is {own.dtype}")
    for other in others:  # of the same model at another step
        for name, found in other.items():
            of_model = model.get(name)
            if of_model is None or (of_model.dtype, of_model.shape) != (found.dtype, found.shape):
                raise CheckpointError(f"{name} is {found.dtype} {tuple(found.shape)} in one file, and not in another")


def _check_moments(training: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Refuses what torch would load in silence: moments that are not a parameter's, or not those of the others."""
    grouped = {name for group in numbers["param_groups"] for name in group["params"]}
    if not grouped:
        raise CheckpointError("the optimizer has no parameters")
    kinds: dict[str, set[str]] = {}
    for key in [name for name in training if name.startswith("optim.")] + [
        f"optim.{name}" for name in numbers["state"]
    ]:
        name, kind = key.removeprefix("optim.").split(SEPARATOR)
        kinds.setdefault(name, set()).add(kind)
        parameter, moment = training.get(f"model.{name}"), training.get(key)
        if parameter is None or name not in grouped:
            raise CheckpointError(f"{key} belongs to no parameter")
        if moment is not None and moment.ndim and moment.shape != parameter.shape:
            raise CheckpointError(f"{key} has shape {tuple(moment.shape)}, and its parameter {tuple(parameter.shape)}")
        if moment is not None and moment.ndim and moment.dtype.is_floating_point != parameter.dtype.is_floating_point:
            raise CheckpointError(f"{key} is {moment.dtype}, and its parameter {parameter.dtype}")
    if any(kind != next(iter(kinds.values())) for kind in kinds.values()):
        raise CheckpointError("the optimizer's moments are not of the same kinds for all parameters")


def _tell_changes(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Says what is not as it was: the run goes on, and not with the bits that it would have had."""
    versions = then.get("versions")
    before = then | (versions if isinstance(versions, dict) else {})
    for key, value in (now | now["versions"]).items():
        if key in before and key != "versions" and before[key] != value:
            log.warning("%s was %s and is %s: the run may end with other bits", key, before[key], value)


def _drop_texts(samples: Path, step: int) -> None:
    """Drops the texts that were written after a step: they are written again."""
    if samples.exists():
        lines = samples.read_text().split("\n")[:-1]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        replace_file(samples, "".join(f"{line}\n" for line in kept).encode())
