"""One run: its folder, its record, and what happens when it is asked for again, cut off, or goes wrong.

A run's folder, `output_dir/<run id>/`, holds `config.yaml`, `run.json` (status and summary), `metrics.jsonl` (one line
a log step), `checkpoints/`, `model.safetensors` (the best weights by validation score) and `log.txt`; where a callback
has texts for people to read, as `sample_text`, also `samples.jsonl`; where the task or the model has something to show
(`archzoo.pictures`), also `pictures/NAME.png`. `load_model` gives the trained model.
"""

import contextlib
import copy
import datetime
import fcntl
import json
import logging
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from archzoo._version import __version__
from archzoo.budget import Match
from archzoo.tasks.task import DatasetError
from archzoo.training.build import build_model, build_task
from archzoo.training.callbacks import Callback
from archzoo.training.callbacks import callbacks as callback_registry
from archzoo.training.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    pack_tensors,
    replace_file,
    save_checkpoint,
    sweep_partial,
)
from archzoo.training.config import ConfigError, TrainConfig, asdict_plain, contestant, from_plain, run_id
from archzoo.training.cost import batch_size, cost_record
from archzoo.training.loop import Diverged, Interrupted, Trainer
from archzoo.training.pictures import draw_pictures
from archzoo.training.progress import Progress
from archzoo.training.trackers import Trackers

log = logging.getLogger("archzoo")
FORMAT = 1
FINISHED = ("done", "failed", "diverged")


class Locked(RuntimeError):
    """Another process is writing this run."""


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
        except OSError:
            holder = os.read(self._lock, 32).decode(errors="replace").strip()
            os.close(self._lock)
            self._lock = None
            raise Locked(f"{self.path}: process {holder} is writing this run") from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)  # the kernel drops the lock, also of a process that was killed
            self._lock = None

    def record(self) -> dict[str, Any] | None:
        """The last run.json, None where there is none."""
        return read_record(self.path)

    def write_record(self, record: dict[str, Any]) -> None:
        """Replaces run.json."""
        replace_file(self.path / "run.json", (json.dumps(_finite(record), indent=1) + "\n").encode())

    def retell(self, record: dict[str, Any]) -> None:
        """Tells a run that is not trained again what the report goes by now, and the run does not."""
        asked = {key: self.config["sweep"][key] for key in ("tune", "baseline")}
        sweep = record["config"].setdefault("sweep", {})
        if any((sweep.get(key) or None) != (value or None) for key, value in asked.items()):
            sweep |= asked
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


def _finite(value: Any) -> Any:
    """JSON has no nan and inf: null stands for them."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def execute(
    config: TrainConfig,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains a run, or takes it up where it was cut off, or returns its record if it is done.

    Never raises for what goes wrong inside the run: that is its record's `status` and `error`, and the other runs of a
    sweep go on.

    Returns:
        The record, as in run.json.
    """
    progress = progress or Progress()
    folder = RunFolder(Path(config.output_dir), config)
    try:
        with folder:
            before = folder.record()
            again = config.sweep.retry_failed and before and before["status"] in ("failed", "diverged")
            if before and before["status"] in FINISHED and not again:
                folder.retell(before)
                progress.skip_run(before)
                return before
            if again:
                folder.clear()
            return _execute(config, folder, progress, should_stop)
    except Locked as error:
        record = {"run_id": folder.id, "name": run_name(config), "status": "locked", "error": str(error)}
        progress.skip_run(record)
        return record


def run_name(config: TrainConfig) -> str:
    """A name for people; the id is the one that counts."""
    return f"{contestant(config)}-seed{config.seed}"


def _execute(
    config: TrainConfig, folder: RunFolder, progress: Progress, should_stop: Callable[[], bool]
) -> dict[str, Any]:
    record = _new_record(config, folder)
    handler = logging.FileHandler(folder.path / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    trackers: Trackers | None = None
    progress.start_run(record)
    try:
        _write_config(folder)
        folder.write_record(record)
        with _reproducible(config):
            task = build_task(config)
            made = make_callbacks(config)
            model, match = build_model(config, task, made)
            if match is not None:
                record["budget"] = _budget_record(config, match)
            record |= cost_record(config, task, model)
            trainer = Trainer(config, task, model, made, should_stop=should_stop, progress=progress.update_run)
            _resume(trainer, folder)
            record["device"] = str(trainer.device)
            folder.write_record(record)
            trackers = Trackers(config.tracker, folder.path, record, folder.history(), folder.texts())
            with _metrics_writer(folder, trackers) as write:
                trainer.record = write
                trainer.record_text = _text_writer(folder, trackers)
                trainer.save = lambda t: _save(t, folder, config.trainer.keep_checkpoints)
                anomaly = torch.autograd.set_detect_anomaly(config.trainer.detect_anomaly)
                with _profiler(config, folder, trainer), anomaly:
                    trainer.fit()
            _finish(trainer, folder, record, trackers)
    except Interrupted:
        record["status"] = "interrupted"
    except Diverged as error:
        record |= {"status": "diverged", "error": str(error), "diverged": error.divergence.record()}
        log.error("diverged: %s", error)
    except Exception as error:  # whatever a run does wrong is its own affair: the sweep goes on
        first = f"{type(error).__name__}: {error}" if not isinstance(error, ConfigError | DatasetError) else str(error)
        record |= {"status": "failed", "error": first}
        log.error("failed: %s\n%s", first, traceback.format_exc())
    finally:
        record["ended"] = _now()
        if record["status"] == "running":  # a second signal: leave things as a kill would
            record["status"] = "interrupted"
        folder.write_record(record)
        if trackers is not None:
            trackers.finish(record)
        log.removeHandler(handler)
        handler.close()
        progress.end_run(record)
    return record


def load_model(folder: str | Path) -> nn.Module:
    """The model of a run that is done, with the weights that were scored, in evaluation mode, on the CPU.

    Also where its structure changed in training, as by `grid_refine`: then a model that is only built from the
    configuration has other shapes than `model.safetensors`. The task is built too, for the shapes of its data.

    Args:
        folder: The run's folder, `output_dir/<run id>`.

    Raises:
        CheckpointError: If there is no such run, if it is not done, or if its files do not fit together.
        ConfigError, DatasetError: If the task or the model cannot be built here.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None or record["status"] != "done":
        status = "no run.json" if record is None else f"status {record['status']}"
        raise CheckpointError(f"{folder}: {status}; only a run that is done has a model")
    config = from_plain(record["config"])
    made = make_callbacks(config)
    model, _ = build_model(config, build_task(config), made)
    model = model.to(torch.float64 if config.trainer.precision == "float64" else torch.float32)
    states = (record.get("structure") or {}).get("callbacks", {})
    for name, callback in zip(config.callbacks, made, strict=True):
        if name in states:
            callback.restore(model, states[name])
    try:
        model.load_state_dict(load_safetensors((folder / "model.safetensors").read_bytes()))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / 'model.safetensors'}: cannot be loaded ({error})") from error
    return model.eval()


def make_callbacks(config: TrainConfig) -> list[Callback]:
    """The callbacks in the configuration's order; a ConfigError if one is wrong."""
    made = []
    for name, options in config.callbacks.items():
        try:
            made.append(callback_registry.create(name, **(options or {})))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"callbacks.{name}={options}: {error}") from error
    return made


def _resume(trainer: Trainer, folder: RunFolder) -> None:
    """Takes up the newest checkpoint that is sound, and drops the metrics that were logged after it."""
    sweep_partial(folder.checkpoints)
    for path in list_checkpoints(folder.checkpoints):
        try:
            tensors, state = load_checkpoint(path)
        except CheckpointError as error:
            log.warning("this checkpoint is not used: %s", error)
            continue
        trainer.load_state(tensors, state)
        os.truncate(folder.metrics, state["metrics_bytes"])
        _drop_texts(folder, trainer.step)
        log.info("resumed from %s", path.name)
        return
    folder.metrics.unlink(missing_ok=True)
    folder.samples.unlink(missing_ok=True)


def _drop_texts(folder: RunFolder, step: int) -> None:
    """Drops the texts that were written after a step: they are written again."""
    if folder.samples.exists():
        kept = [line for line in folder.texts() if line["step"] <= step]
        replace_file(folder.samples, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _text_writer(folder: RunFolder, trackers: Trackers) -> Callable[[dict[str, Any]], None]:
    def write(line: dict[str, Any]) -> None:
        with folder.samples.open("a") as file:  # few lines, and a run without a text has no such file
            file.write(json.dumps(line) + "\n")
        trackers.log_text(line)

    return write


@contextlib.contextmanager
def _metrics_writer(folder: RunFolder, trackers: Trackers) -> Iterator[Callable[[dict[str, float]], None]]:
    with folder.metrics.open("a") as file:

        def write(line: dict[str, float]) -> None:
            line = _finite(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            trackers.log({k: v for k, v in line.items() if v is not None})

        yield write


def _save(trainer: Trainer, folder: RunFolder, keep: int) -> None:
    with folder.metrics.open("rb") as file:
        os.fsync(file.fileno())  # the lines that the checkpoint counts on
        size = file.seek(0, os.SEEK_END)
    tensors, state = trainer.state()
    versions = {"archzoo": __version__, "torch": torch.__version__, "python": platform.python_version()}
    state |= {"metrics_bytes": size, "versions": versions, "threads": torch.get_num_threads(), "run_id": folder.id}
    try:
        save_checkpoint(folder.checkpoints, trainer.step, tensors, state, keep)
    except OSError as error:
        free = shutil.disk_usage(folder.path).free
        log.warning("no checkpoint at step %d: %s (%d bytes free); training goes on", trainer.step, error, free)


def _finish(trainer: Trainer, folder: RunFolder, record: dict[str, Any], trackers: Trackers) -> None:
    """Evaluates the best weights on the test split, and writes them, the summary, and pictures.

    Where the model's structure has changed, they are the best since, and the record tells what that model costs.
    """
    task, config, final = trainer.task, trainer.config, copy.deepcopy(trainer.eval_model)
    if trainer.best is not None:
        final.load_state_dict(trainer.best_weights)
    test = trainer.evaluate("test", final)
    replace_file(folder.path / "model.safetensors", pack_tensors(final.state_dict()))
    best = trainer.best or {}
    record["summary"] = {
        "best": best,
        "last": trainer.last or {},
        "test": {key.removeprefix("test/"): value for key, value in test.items()},
        "task": dict(task.summarize(trainer.evaluations, trainer.eval_model)),
    }
    if callable(of_model := getattr(final, "summarize", None)):
        record["summary"]["task"] |= of_model()
    for callback in trainer.callbacks:
        record["summary"]["task"] |= callback.summarize(trainer, final)
    record["score"] = {
        "metric": task.score,
        "mode": task.mode,
        "split": "train" if config.trainer.overfit_batches else "test",
        "value": test[f"test/{task.score}"],
        "step": int(best.get("step", trainer.step)),
    }
    if trainer.changed_at is not None:
        record["structure"] = {
            "changed_at": trainer.changed_at,
            "callbacks": {n: c.state_dict() for n, c in zip(config.callbacks, trainer.callbacks, strict=True)},
            "initial": {key: record[key] for key in ("parameters", "flops", "bytes_per_step")},
        }
        record |= cost_record(config, task, copy.deepcopy(final).float().cpu())
    times = trainer.step_times
    if times:
        examples = batch_size(config, task) * config.trainer.accumulate
        record["timing"] |= {
            "step_time_p50_s": statistics.median(times),
            "samples_per_s": examples * len(times) / sum(times),
        }
    record["timing"]["wall_s"] = trainer.elapsed()
    record["memory"]["peak_rss_bytes"] = _peak_rss()
    if trainer.device.type == "cuda":
        record["memory"]["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
    record["steps"] = trainer.step
    if config.tracker.pictures:  # last: what it takes is not the contestant's
        drawn, failed = draw_pictures(folder.path, task, final)
        record["pictures"] = {"drawn": [{"name": p.name, "caption": p.caption} for p in drawn], "failed": failed}
        trackers.log_pictures(trainer.step, drawn)
    record["status"] = "done"


# ---- what a record says


def _new_record(config: TrainConfig, folder: RunFolder) -> dict[str, Any]:
    _reset_peak_rss()
    return {
        "format": FORMAT,
        "run_id": folder.id,
        "name": run_name(config),
        "experiment": config.name,
        "status": "running",
        "error": None,
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
        "started": _now(),
        "ended": None,
    }


def _budget_record(config: TrainConfig, match: Match) -> dict[str, Any]:
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


def _write_config(folder: RunFolder) -> None:
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


def _reset_peak_rss() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux only, and not in every container
        Path("/proc/self/clear_refs").write_text("5")


def _peak_rss() -> int | None:
    """Largest resident set of this process since the run began, in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ---- the process around a run


@contextlib.contextmanager
def _reproducible(config: TrainConfig) -> Iterator[None]:
    """Seeds and settings of a run; the process is left as it was, for it may train another run next."""
    t = config.trainer
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    torch.set_num_threads(t.threads)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if t.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.backends.cudnn.benchmark = before[2]


@contextlib.contextmanager
def _profiler(config: TrainConfig, folder: RunFolder, trainer: Trainer) -> Iterator[None]:
    """With `trainer.profile`, traces steps 11 to 30 and writes them beside the log."""
    if not config.trainer.profile:
        yield
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])
    trace = folder.path / "trace.json"
    report = trainer.progress

    def done(profiler: profile) -> None:
        profiler.export_chrome_trace(str(trace))
        log.info(
            "profile, by CPU time:\n%s", profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        )
        print(f"wrote {trace}; open it at chrome://tracing or ui.perfetto.dev", file=sys.stderr)

    steps = schedule(wait=9, warmup=1, active=20, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=done) as profiler:

        def step(*args: Any) -> None:
            profiler.step()
            report(*args)

        trainer.progress = step
        yield
