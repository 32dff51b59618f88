"""Fake comparison folders: what the trainer would have written, without training."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

Build = Callable[..., Path]


def write_run(
    folder: Path,
    *,
    layer: str = "linear",
    seed: int | None = 0,
    score: float | None = 0.9,
    status: str = "done",
    metric: str = "accuracy",
    mode: str = "max",
    task: str = "digits",
    options: dict[str, Any] | None = None,
    task_options: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    budget: dict[str, Any] | None = None,
    error: str | None = None,
    diverged: dict[str, Any] | None = None,
    task_summary: dict[str, Any] | None = None,
    parameters: int = 8957,
    flops: int = 17600,
    deviation: float = -0.0014,
    step_time: float = 0.0012,
    memory: int = 250_000,
    steps: int = 400,
    metrics: bool = True,
    change: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    tune: Sequence[str] = (),
    validation: float | None = None,
    curve: Sequence[tuple[int, float | None, float | None]] | None = None,
) -> Path:
    """One run folder; `budget` is of the config; `change` replaces keys of run.json, and drops those that are `...`.

    `validation` is the best evaluation's score, by default the test score; `curve` is of (step, seconds, score).
    """
    folder.mkdir(parents=True)
    ended = status in ("done", "failed", "diverged")
    record: dict[str, Any] = {
        "format": 1,
        "run_id": folder.name,
        "name": f"{layer}-seed{seed}",
        "experiment": task,
        "status": status,
        "error": error,
        "diverged": diverged,
        "config": {
            "task": {"name": task, **(task_options or {})},
            "model": {"name": "mlp", "width": 64, "depth": 2, **(model or {})},
            "layer": {"name": layer, "bias": True, **(options or {})},
            "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0} | (optimizer or {}),
            "trainer": {"steps": steps, "epochs": None, "batch_size": 64},
            "budget": {"match": "params", "to": "linear", "tolerance": 0.01} | (budget or {}),
            "seed": seed,
            "sweep": {"retry_failed": False, "tune": list(tune)},
        },
        "layer": layer,
        "task": task,
        "model": "mlp",
        "seed": seed,
        "budget": {
            "match": "params",
            "to": "linear",
            "target": 8970,
            "reached": parameters,
            "deviation": deviation,
            "within_tolerance": abs(deviation) <= 0.01,
            "tolerance": 0.01,
            "widths": [12, 17],
        },
        "parameters": parameters,
        "flops": flops,
        "bytes_per_step": None,
        "score": {"metric": metric, "mode": mode, "split": "test", "value": score, "step": steps} if ended else None,
        "summary": {
            "best": {"step": steps, f"val/{metric}": score if validation is None else validation},
            "last": {"step": steps, f"val/{metric}": score},
            "test": {metric: score},
            "task": task_summary or {},
        },
        "timing": {"step_time_p50_s": step_time, "samples_per_s": 64 / step_time, "wall_s": steps * step_time * 1.3},
        "memory": {"saved_for_backward_bytes": memory, "peak_rss_bytes": 410_000_000, "peak_cuda_bytes": None},
        "versions": {"python": "3.11.9", "torch": "2.14.1", "archzoo": "0.1.0"},
        "git": {"commit": "1f3a9c0b2d7e", "dirty": False},
        "machine": {"host": "box", "cpu": "AMD EPYC 7B13", "cores": 2},
        "device": "cpu",
        "threads": 1,
        "started": "2026-05-01T10:00:00+00:00",
        "ended": "2026-05-01T10:05:00+00:00" if ended else None,
    }
    for key, value in (change or {}).items():
        if value is ...:
            del record[key]
        else:
            record[key] = value
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text("seed: not read\n")
    if curve is not None:
        lines = [
            {"step": step, "time_s": 2 * step, "train_s": seconds, f"val/{metric}": value}
            for step, seconds, value in curve
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif metrics:
        write_metrics(folder, score if score is not None else 0.5, steps, metric, mode, seed or 0, status)
    return folder


def write_metrics(folder: Path, score: float, steps: int, metric: str, mode: str, seed: int, status: str) -> None:
    """A curve towards the score; a run that is not done gets two thirds of the way, and its last line is cut off."""
    rng = random.Random(f"{folder.name}{seed}")
    last = steps if status == "done" else 2 * steps // 3
    start = 0.1 if mode == "max" else 3 * score + 0.1
    lines = []
    for step in range(0, last + 1, max(1, steps // 40)):
        left = math.exp(-6 * step / steps)
        seconds = {"time_s": step / 900, "train_s": step / 1000}
        loss: float = 2.3 * left + 0.05 + 0.03 * rng.random()
        if status == "diverged" and step > 0.9 * last:
            loss = math.nan
        lines.append(json.dumps({"step": step, "epoch": step / 20, **seconds, "train/loss": loss, "lr": 1e-3}))
        if step % (steps // 20) == 0:
            value = score + (start - score) * left + 0.004 * score * rng.gauss(0, 1) * left
            line = {"step": step, "epoch": step / 20, **seconds, f"val/{metric}": value, "val/loss": loss}
            lines.append(json.dumps(line))
    text = "\n".join(lines) + "\n"
    if status != "done":
        text += '{"step": 999, "val/'
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """`build(layer=[scores by seed], …, name="digits", **of every run)` makes a comparison folder."""
    return lambda *args, **kwargs: build_comparison(tmp_path, *args, **kwargs)


@pytest.fixture
def write() -> Build:
    """`write(folder, **what)` makes one run's folder."""
    return write_run


@pytest.fixture
def build_sizes(tmp_path: Path) -> Build:
    """`build_sizes({"kan": law, …}, …)` makes a comparison whose contestants compete at several parameter counts."""
    return lambda *args, **kwargs: build_sized(tmp_path, *args, **kwargs)


def build_sized(
    root: Path,
    laws: dict[str, Callable[[int, int], float | None]],
    *,
    sizes: Sequence[int] = (100, 200, 400),
    functions: Sequence[str] = ("exp_sin",),
    seeds: int = 2,
    name: str = "functions",
    **common: Any,
) -> Path:
    """`laws`: layer -> score at a parameter count, and by how many seeds and functions it comes later; None: failed."""
    folder = root / name
    for place, function in enumerate(functions):
        for layer, law in laws.items():
            for size in sizes:
                for seed in range(seeds):
                    score = law(size, seed + place)
                    what: dict[str, Any] = {"metric": "rmse", "mode": "min", "task": "functions", "score": score}
                    what |= {"status": "failed", "error": "ValueError: no"} if score is None else {}
                    what |= {"task_options": {"function": function}, "budget": {"to": size}, "parameters": size}
                    write_run(
                        folder / f"{function}-{layer}-{size}-{seed}", layer=layer, seed=seed, **{**what, **common}
                    )
    return folder


def build_comparison(
    root: Path, scores: dict[str, Sequence[float | None]], name: str = "digits", **common: Any
) -> Path:
    """One run per score, a failed one for None. `common` goes to every run; a dict of layers goes to each its own."""
    folder = root / name
    for layer, values in scores.items():
        for seed, score in enumerate(values):
            options = {
                key: value[layer] if isinstance(value, dict) and layer in value else value
                for key, value in common.items()
            }
            if score is None:
                options |= {"status": "failed", "error": "ValueError: no\n  more of it"}
            write_run(folder / f"{layer}-{seed}", layer=layer, seed=seed, score=score, **options)
    return folder
