"""One run: its folder, its record, and what happens when it is asked for again, cut off, or goes wrong.

A run's folder, `output_dir/<run id>/`, holds `config.yaml`, `run.json` (status and summary), `metrics.jsonl` (one line
a log step), `checkpoints/`, `model.safetensors` (the best weights by validation score) and `log.txt`; where a callback
has texts for people to read, as `sample_text`, also `samples.jsonl`; where the task or the model has something to show
(`archzoo.pictures`), also `pictures/NAME.png`. `load_model` gives the trained model.
"""

import contextlib
import copy
import logging
import os
import random
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from archzoo.arguments import check_types
from archzoo.budget import Match
from archzoo.tasks.task import DatasetError, SampleError, Task
from archzoo.training import distributed
from archzoo.training.build import build_model, build_task, resolve_device
from archzoo.training.callbacks import Callback
from archzoo.training.callbacks import callbacks as callback_registry
from archzoo.training.checkpoint import (
    CheckpointError,
    SaveError,
    list_checkpoints,
    load_tensors,
    pack_tensors,
    replace_file,
)
from archzoo.training.config import ConfigError, TrainConfig, asdict_plain, from_plain, run_id, validate
from archzoo.training.cost import batch_size, cost_record
from archzoo.training.loop import Diverged, Interrupted, Trainer
from archzoo.training.memory import is_out_of_memory, out_of_memory, resident, resolve_batch_size
from archzoo.training.pictures import draw_pictures
from archzoo.training.progress import Progress
from archzoo.training.run_folder import (
    FINISHED,
    Locked,
    RunFolder,
    budget_record,
    finite,
    new_record,
    now,
    read_record,
    run_name,
    write_config,
)
from archzoo.training.saving import Saver, follow, resume
from archzoo.training.trackers import Trackers
from archzoo.training.untrusted import check_values
from archzoo.training.writing import NO_ROOM, Lines, LogFile, Told

log = logging.getLogger("archzoo")


def execute(
    config: TrainConfig,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains a run, or takes it up where it was cut off, or returns its record if it is done.

    Never raises for what goes wrong inside the run: that is its record's `status` and `error`, and the other runs of a
    sweep go on. In a process group that `distributed.group` has joined, every process calls this, with the same
    configuration; rank 0 alone writes.

    Returns:
        The record, as in run.json; its `status` and `error` only, in the other processes of a group.

    Raises:
        RankLost: If another process of the group has died, or this one has failed alone.
    """
    distributed.begin_run()
    if distributed.rank() > 0:
        return _follow(config, should_stop)
    progress = progress or Progress()
    folder = RunFolder(Path(config.output_dir), config)
    try:
        with folder:
            before = folder.record()
            again = config.sweep.retry_failed and before and before["status"] in ("failed", "diverged")
            if before and before["status"] in FINISHED and not again:
                folder.retell(before)
                return _skip(before, progress)
            if before and again and not before.get("resumable"):
                folder.clear()
            return _execute(copy.deepcopy(config), folder, before, progress, should_stop)
    except Locked as error:
        return _skip(_brief(config, "locked", str(error)), progress)
    except OSError as error:  # of the folder itself: of all else the record tells
        told = f"{error.filename or folder.path}: cannot be written ({error.strerror})"
        return _skip(_brief(config, "failed", told), progress)


def _skip(record: dict[str, Any], progress: Progress) -> dict[str, Any]:
    distributed.agree({"status": record["status"], "error": record.get("error")})
    progress.skip_run(record)
    return record


def _brief(config: TrainConfig, status: str, error: str | None) -> dict[str, Any]:
    return {"run_id": run_id(asdict_plain(config)), "name": run_name(config), "status": status, "error": error}


def _follow(config: TrainConfig, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """The part in a run of a process other than rank 0, which writes nothing."""
    if (skipped := distributed.agree(None, should_stop)) is not None:
        return _brief(config, skipped["status"], skipped["error"])
    record, config = _brief(config, "done", None), copy.deepcopy(config)
    try:
        with _reproducible(config):
            task, made, (model, _) = _build(config)
            known = distributed.agree(None, should_stop)
            resolve_batch_size(config, task, model, resolve_device(config.trainer.device), known)
            distributed.agree(None, should_stop)
            trainer = Trainer(config, task, model, made, should_stop=should_stop, save=_give_state)
            follow(trainer)
            trainer.fit()
            trainer.test()
    except Interrupted:
        record["status"] = "interrupted"
    except Diverged as error:
        record |= {"status": "diverged", "error": str(error)}
    except Exception as error:  # of any kind, as in rank 0
        record |= {"status": "failed", "error": distributed.told_error() or str(error)}
        distributed.end_together(error)
    return record


def _give_state(trainer: Trainer) -> None:
    """Takes part in a checkpoint, which rank 0 writes."""
    trainer.state()


def _build(config: TrainConfig) -> tuple[Task, list[Callback], tuple[nn.Module, Match | None]]:
    task, made = build_task(config), make_callbacks(config)
    return task, made, build_model(config, task, made)


def _execute(
    config: TrainConfig,
    folder: RunFolder,
    before: dict[str, Any] | None,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    record = new_record(config, folder)
    handlers = [LogFile(folder.path / "log.txt"), Told(progress.warn)]
    for handler in handlers:
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    about = {"run_id": folder.id, "config": folder.config, "git": record["git"]}
    saver = Saver(folder.path, about, config.trainer.on_save_error, config.trainer.keep_checkpoints)
    trackers: Trackers | None = None
    lost: distributed.RankLost | None = None
    progress.start_run(record)
    try:
        distributed.agree(None)
        write_config(folder)
        folder.write_record(record)
        with _reproducible(config):
            task, made, (model, match) = _build(config)
            known = (before or {}).get("batch_size") if list_checkpoints(folder.checkpoints) else None
            distributed.agree(known)
            resolve_batch_size(config, task, model, resolve_device(config.trainer.device), known)
            record["batch_size"] = config.trainer.batch_size
            if match is not None:
                record["budget"] = budget_record(config, match)
            record |= cost_record(config, task, model)
            record["processes"] = distributed.world_size()
            distributed.agree(None)  # the others wait for what may have taken long
            trainer = Trainer(config, task, model, made, should_stop=should_stop, progress=progress.update_run)
            resume(trainer, folder.path, folder.id)
            record["device"] = str(trainer.device)
            folder.write_record(record)
            trackers = Trackers(config.tracker, folder.path, record, folder.history(), folder.texts())
            with _recording(trainer, folder, trackers) as metrics:
                trainer.save = lambda t: saver.save(t, metrics)
                anomaly = torch.autograd.set_detect_anomaly(config.trainer.detect_anomaly)
                with _profiler(config, folder, trainer), anomaly:
                    _fit(trainer, folder)
            _finish(trainer, folder, record, trackers)
    except Interrupted:
        record["status"] = "interrupted"
    except Diverged as error:
        record |= {"status": "diverged", "error": str(error), "diverged": error.divergence.record()}
        log.error("diverged: %s", error)
    except SaveError as error:
        record |= {"status": "interrupted", "error": str(error), "checkpoint_error": str(error)}
        log.error("stopped: %s", error)
        lost = _lost(error)
    except Exception as error:  # whatever a run does wrong is its own affair: the sweep goes on
        first = f"{type(error).__name__}: {error}" if not isinstance(error, ConfigError | DatasetError) else str(error)
        record |= {"status": "failed", "error": first, "resumable": isinstance(error, DatasetError)}
        if isinstance(error, CheckpointError):
            record |= {"error": str(error), "checkpoint_error": str(error)}
        elif isinstance(error, OSError) and error.errno in NO_ROOM:
            told = f"{error.filename or folder.path}: cannot be written ({error.strerror}); the same command goes on"
            record |= {"status": "interrupted", "error": told, "checkpoint_error": told}
        elif is_out_of_memory(error):
            device = resolve_device(config.trainer.device)
            record["error"] = first = out_of_memory(config, record["batch_size"], device)
        log.error("failed: %s\n%s", first, traceback.format_exc())
        lost = _lost(error)
        if lost is not None and lost.of_another:  # the error here comes of the other's end; without one, this can go on
            record |= {"status": "failed" if lost.told else "interrupted", "error": lost.reason}
    finally:
        record["ended"] = now()
        record["checkpoint_error"] = record["checkpoint_error"] or saver.error
        if record["status"] == "running":  # a second signal: leave things as a kill would
            record["status"] = "interrupted"
        try:
            folder.write_record(record)
        except OSError as error:
            log.warning("%s: cannot be written (%s)", folder.path / "run.json", error.strerror)
        if trackers is not None:
            trackers.finish(record)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        progress.end_run(record)
    if lost is not None:
        raise lost
    return record


def _lost(error: Exception) -> distributed.RankLost | None:
    """What ends this process beside the run, if the other processes of its group do not come to an error too."""
    try:
        distributed.end_together(error)
    except distributed.RankLost as lost:
        return lost
    return None


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
    if record is None or record.get("status") != "done":
        status = "no run.json" if record is None else f"status {record.get('status')}"
        raise CheckpointError(f"{folder}: {status}; only a run that is done has a model")
    tensors = load_tensors(folder / "model.safetensors")
    check_values(record.get("config") or {})  # it may be a stranger's
    config = from_plain(record.get("config") or {})
    validate(config)
    made = make_callbacks(config)
    with torch.random.fork_rng(devices=[]):  # weights are drawn, only to be replaced
        model, _ = build_model(config, build_task(config), made)
    model = model.to(torch.float64 if config.trainer.precision == "float64" else torch.float32)
    states = (record.get("structure") or {}).get("callbacks", {})
    try:
        for name, callback in zip(config.callbacks, made, strict=True):
            if name in states:
                callback.restore(model, states[name])
        model.load_state_dict(tensors)
    except Exception as error:  # a structure or weights that no run of this configuration has
        raise CheckpointError(f"{folder / 'model.safetensors'}: cannot be loaded ({error})") from error
    return model.eval()


def make_callbacks(config: TrainConfig) -> list[Callback]:
    """The callbacks in the configuration's order; a ConfigError if one is wrong."""
    made = []
    for name, options in config.callbacks.items():
        try:
            check_types(callback_registry.get(name), options or {})
            made.append(callback_registry.create(name, **(options or {})))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"callbacks.{name}={options}: {error}") from error
    return made


@contextlib.contextmanager
def _recording(trainer: Trainer, folder: RunFolder, trackers: Trackers) -> Iterator[Lines]:
    """Inside, what the trainer records goes to files and mirrors. Gives the file of metrics."""
    with contextlib.closing(Lines(folder.metrics)) as metrics, contextlib.closing(Lines(folder.samples)) as texts:

        def write(line: dict[str, float]) -> None:
            line = finite(line)
            metrics.write(line)
            trackers.log({k: v for k, v in line.items() if v is not None})

        def write_text(line: dict[str, Any]) -> None:
            texts.write(line)
            trackers.log_text(line)

        trainer.record, trainer.record_text = write, write_text
        yield metrics


def _fit(trainer: Trainer, folder: RunFolder) -> None:
    """Trains; where a batch cannot be read, the steps before it are saved first."""
    try:
        trainer.fit()
    except SampleError:
        if _between_steps(trainer) and not (folder.checkpoints / f"step_{trainer.step:08d}").exists():
            trainer.save(trainer)
        raise


def _between_steps(trainer: Trainer) -> bool:
    """Whether a batch was asked for, and nothing was done that the run, resumed, would do again or leave out."""
    evaluated = trainer.step % trainer.eval_every != 0 or (trainer.last or {}).get("step") == trainer.step
    # The other batches of an accumulated step have drawn random numbers; other ranks would have to save with us.
    whole = trainer.config.trainer.accumulate == 1 and trainer.processes == 1
    return trainer.step > 0 and trainer.spent() < 1 and evaluated and whole and trainer.bad.is_sound()


def _finish(trainer: Trainer, folder: RunFolder, record: dict[str, Any], trackers: Trackers) -> None:
    """Evaluates the best weights on the test split, and writes them, the summary, and pictures.

    Where the model's structure has changed, they are the best since, and the record tells what that model costs.
    """
    task, config = trainer.task, trainer.config
    test, final, weights = trainer.test()
    last = trainer.eval_model
    if trainer.sharded:  # what follows is done by one process alone
        last, _ = build_model(config, task, trainer.callbacks)
        for callback in trainer.callbacks:
            callback.restore(last, callback.state_dict())
        last.to(trainer.dtype).load_state_dict(weights)
        final = last
    replace_file(folder.path / "model.safetensors", pack_tensors(weights))
    best = trainer.best or {}
    record["summary"] = {
        "best": best,
        "last": trainer.last or {},
        "test": {key.removeprefix("test/"): value for key, value in test.items()},
        "task": dict(task.summarize(trainer.evaluations, last)),
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
    record["memory"]["peak_rss_bytes"] = resident("VmHWM")
    if trainer.device.type == "cuda":
        record["memory"]["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
    record["steps"] = trainer.step
    record["bad_steps"] = trainer.bad.count
    if config.tracker.pictures:  # last: what it takes is not the contestant's
        drawn, failed = draw_pictures(folder.path, task, final)
        record["pictures"] = {"drawn": [{"name": p.name, "caption": p.caption} for p in drawn], "failed": failed}
        trackers.log_pictures(trainer.step, drawn)
    record["status"] = "done"


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
