"""A run's folder and its record: who writes there, and what `run.json` says."""

import contextlib
import datetime
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from archzoo._version import __version__
from archzoo.budget import Match
from archzoo.training.checkpoint import replace_file
from archzoo.training.config import TrainConfig, asdict_plain, contestant, run_id
from archzoo.training.memory import reset_peak

FORMAT = 1
FINISHED = ("done", "failed", "diverged")


class Locked(RuntimeError):
    """Another process is writing this run."""


_locks: set[int] = set()


def _leave_locks() -> None:
    """A loader's worker that outlives a killed run by some seconds must not keep its lock."""
    for handle in _locks:
        os.close(handle)


os.register_at_fork(after_in_child=_leave_locks)


class RunFolder:
    """The files of one run. Use as a context manager: a lock keeps a second writer out.

    Args:
        root: The comparison's folder.
        config: The run's configuration.
    """

    def __init__(self, root: Path, config: TrainConfig):
        self.config = asdict_plain(config)
        self.id = run_id(self.config)
        self.path = root / self.id
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self._lock: int | None = None

    def __enter__(self) -> "RunFolder":
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip() or "of another machine"
            os.close(self._lock)
            self._lock = None
            raise Locked(f"{self.path}: process {holder} is writing this run") from None
        except OSError as error:
            os.close(self._lock)
            self._lock = None
            raise Locked(f"{self.path / 'lock'}: cannot be locked ({error.strerror})") from error
        _locks.add(self._lock)
        os.ftruncate(self._lock, 0)
        with contextlib.suppress(OSError):  # on a full disk; it is only told
            os.write(self._lock, str(os.getpid()).encode())
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            _locks.discard(self._lock)
            os.close(self._lock)  # the kernel drops the lock, also of a process that was killed
            self._lock = None

    def record(self) -> dict[str, Any] | None:
        """The last run.json, None where there is none."""
        return read_record(self.path)

    def write_record(self, record: dict[str, Any]) -> None:
        """Replaces run.json."""
        replace_file(self.path / "run.json", (json.dumps(finite(record), indent=1) + "\n").encode())

    def retell(self, record: dict[str, Any]) -> None:
        """Tells a run that is not trained again what the report goes by now, and the run does not."""
        asked = {key: self.config["sweep"][key] for key in ("tune", "baseline")}
        sweep = record["config"].setdefault("sweep", {})
        changed = any((sweep.get(key) or None) != (value or None) for key, value in asked.items())
        if changed or (record["status"] == "done" and record.get("checkpoint_error")):
            sweep |= asked
            if record["status"] == "done":  # what it could not save on its way has been told, and is of no use now
                record["checkpoint_error"] = None
            self.write_record(record)

    def clear(self) -> None:
        """Removes everything but the lock: the run starts afresh."""
        for path in self.path.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []

    def texts(self) -> list[dict[str, Any]]:
        """The lines of samples.jsonl that are whole."""
        lines = self.samples.read_text().split("\n")[:-1] if self.samples.exists() else []
        return [json.loads(line) for line in lines]


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json of a run folder, None where there is none that can be read."""
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def finite(value: Any) -> Any:
    """JSON has no nan and inf: null stands for them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_name(config: TrainConfig) -> str:
    """A name for people; the id is the one that counts."""
    return f"{contestant(config)}-seed{config.seed}"


# ---- what a record says


def new_record(config: TrainConfig, folder: RunFolder) -> dict[str, Any]:
    """A record as a run begins; the peaks of memory begin anew with it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reset_peak()
    return {
        "format": FORMAT,
        "run_id": folder.id,
        "name": run_name(config),
        "experiment": config.name,
        "status": "running",
        "error": None,
        "resumable": False,
        "batch_size": config.trainer.batch_size,
        "processes": 1,
        "bad_steps": 0,
        "checkpoint_error": None,
        "diverged": None,
        "config": folder.config,
        "layer": contestant(config),
        "task": config.task["name"],
        "model": config.model["name"],
        "seed": config.seed,
        "budget": None,
        "parameters": None,
        "flops": None,
        "bytes_per_step": None,
        "structure": None,
        "score": None,
        "summary": {},
        "pictures": None,
        "timing": {"step_time_p50_s": None, "samples_per_s": None, "wall_s": None},
        "memory": {"saved_for_backward_bytes": None, "peak_rss_bytes": None, "peak_cuda_bytes": None},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "archzoo": __version__},
        "git": git_state(),
        "machine": {"host": platform.node(), "cpu": cpu_name(), "cores": os.cpu_count()},
        "device": None,
        "threads": config.trainer.threads,
        "started": now(),
        "ended": None,
    }


def budget_record(config: TrainConfig, match: Match) -> dict[str, Any]:
    """What a record says of the budget."""
    b = config.budget
    return {
        "match": b.match,
        "to": b.to,
        "target": match.target,
        "reached": match.count,
        "deviation": match.deviation,
        "tolerance": b.tolerance,
        "within_tolerance": abs(match.deviation) <= b.tolerance,
        "widths": list(match.widths),
        "option": match.option,
        "value": match.value,
    }


def write_config(folder: RunFolder) -> None:
    """Writes config.yaml."""
    from omegaconf import OmegaConf

    replace_file(folder.path / "config.yaml", OmegaConf.to_yaml(folder.config).encode())


def git_state() -> dict[str, Any] | None:
    """Commit of the source that runs, and whether it has uncommitted changes; None outside a repository."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=5).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain", "-uno").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """The processor, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def now() -> str:
    """The time, in UTC and whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
