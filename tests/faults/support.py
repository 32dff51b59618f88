"""Runs in processes of their own, which cost little: they are forked off this one, which has imported all."""

import functools
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from archzoo.training import checkpoint, cli, composing
from archzoo.training.config import asdict_plain, run_id
from archzoo.training.run import execute
from tests.training.support import lines_without_time, make_config

STEPS = 60
COMMAND = ["trainer.steps=60", "trainer.epochs=null", "trainer.checkpoint_every=5", "trainer.eval_every=20"]
COMMAND += ["trainer.log_every=1", "tracker=none", "model.width=8", "model.dropout=0.2", "trainer.batch_size=16"]
COMMAND += ["trainer.device=cpu", "trainer.ema_decay=0.9"]
# Where there is a GPU, autograd has threads, and a fork of this process could not train.
processes: Any = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")


@dataclass
class Surroundings:
    """What a process finds. `slow_save`: seconds between the parts of a file; `largest_file`: bytes, the rest fails."""

    folder: Path
    slow_save: float = 0.0
    largest_file: int | None = None
    open_files: int | None = None
    user: int | None = None
    umask: int | None = None
    environment: dict[str, str | None] = field(default_factory=dict)
    stdout: str | None = None
    """A path; None: `stdout` in the folder. "": closed."""
    stderr: str | None = None


def start(work: Callable[..., Any], *arguments: Any, **surroundings: Any) -> Any:
    """Begins a function in a process of its own, whose output goes to files in the folder."""
    _warm()
    process = processes.Process(target=_child, args=(work, arguments, Surroundings(**surroundings)), daemon=True)
    with warnings.catch_warnings():  # Python 3.12 warns of threads, of which torch has some that wait
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


@functools.cache
def _warm() -> None:
    """Imports here what every run would import there."""
    with tempfile.TemporaryDirectory() as folder:
        execute(small_config(Path(folder), steps=2))
    composing.store_schema()
    composing.make_plan([])


def finish(process: Any, timeout: float = 60.0) -> int:
    """The exit code; minus a signal's number; -1000 for a process that hung and was killed."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        return -1000
    return process.exitcode


def _child(work: Callable[..., Any], arguments: tuple[Any, ...], at: Surroundings) -> None:
    os.chdir(at.folder)
    for number, name, path in ((1, "stdout", at.stdout), (2, "stderr", at.stderr)):
        if path == "":
            os.close(number)
            setattr(sys, name, None)
            continue
        handle = os.open(at.folder / name if path is None else path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, number)
        os.close(handle)
        stream = open(number, "w", buffering=1 if number == 2 else -1, encoding="utf-8", closefd=False)  # noqa: SIM115 - the process's own
        setattr(sys, name, stream)
    for key, value in at.environment.items():
        os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
    torch.set_num_threads(1)
    if at.umask is not None:
        os.umask(at.umask)
    if at.slow_save:
        checkpoint.write_file = lambda path, *parts: _write_slowly(path, b"".join(parts), at.slow_save)
    if at.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (at.largest_file, resource.RLIM_INFINITY))
    if at.open_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (at.open_files, at.open_files))
    if at.user is not None:
        os.setgroups([])
        os.setgid(at.user)
        os.setuid(at.user)
    sys.exit(work(*arguments))


def _write_slowly(path: Path, data: bytes, seconds: float) -> None:
    part = len(data) // 4 + 1
    with path.open("wb") as file:
        for start in range(0, len(data), part):
            file.write(data[start : start + part])
            file.flush()
            time.sleep(seconds)
        os.fsync(file.fileno())


def small_config(output_dir: Path, seed: int = 0, **trainer: Any) -> Any:
    """60 steps of a small network with dropout and a moving average; a checkpoint every five."""
    settings = {"steps": STEPS, "eval_every": 20, "checkpoint_every": 5, "ema_decay": 0.9, "device": "cpu", **trainer}
    return make_config(output_dir, seed=seed, trainer=settings)


def train(output_dir: Path, seed: int = 0, **trainer: Any) -> int:
    """One run; 0 if it is done."""
    return 0 if execute(small_config(output_dir, seed, **trainer))["status"] == "done" else 1


def command(*arguments: str) -> int:
    """The command train.py."""
    return cli.main(list(arguments))


def run_folder(output_dir: Path, seed: int = 0, **trainer: Any) -> Path:
    return output_dir / run_id(asdict_plain(small_config(output_dir, seed, **trainer)))


def outcome(folder: Path) -> tuple[str, Any, Any]:
    """What of a finished run must be the same however often it was cut off: weights, lines, scores."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    record = json.loads((folder / "run.json").read_text())
    return weights, lines_without_time(folder / "metrics.jsonl"), (record["score"], record["summary"])


def wait_for(condition: Callable[[], bool], process: Any, seconds: float = 60.0) -> bool:
    """Waits until something holds; False if the process ends before, or time does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.exitcode is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def kill(process: Any, number: int = signal.SIGKILL) -> None:
    """Sends a signal, if the process is still there."""
    if process.exitcode is None:
        os.kill(process.pid, number)
