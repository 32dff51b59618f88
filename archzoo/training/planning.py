"""`archzoo plan`: what a sweep will take in time, memory and money, from step times that were measured.

A configuration whose runs are done somewhere is expected to take what they took. Of any other, a few steps are trained
here (`probe`), in two short runs by the trainer itself: the first tells how long a step is about, the second trains for
`SECONDS` of them. With its evaluations, checkpoints and start-up, which are measured too, that gives the whole run.

What was expected of each run is kept in `plan.json` of the output folder, and the next plan says how far off it was.
"""

import argparse
import copy
import heapq
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from archzoo.training.checkpoint import replace_file
from archzoo.training.cli import prepare
from archzoo.training.composing import Plan
from archzoo.training.config import TrackerConfig, TrainConfig, asdict_plain, contestant, identity, run_id
from archzoo.training.run import execute
from archzoo.training.run_folder import FINISHED, read_record

FILE = "plan.json"
SECONDS = 3.0  # of steps, of each configuration that is measured
FEWEST = 4  # steps of the second of the two runs
OWN_PROCESS = ("submitit", "RayLauncher")  # launchers that start Python again for each run


@dataclass
class Estimate:
    """What a run of a configuration takes."""

    source: str
    """Where it is from: `measured`, or `history (N runs)`."""
    step_s: float
    """Seconds a step."""
    steps: int
    """Steps of the run."""
    wall_s: float
    """Seconds of the run: steps, evaluations and checkpoints, as `timing.wall_s` of its record."""
    start_s: float
    """Seconds around that: data and model are built, and the mirrors closed."""
    memory: int | None
    """Peak bytes, of the GPU where there is one."""


@dataclass
class Row:
    """The runs that differ in the seed alone."""

    label: str
    configs: list[TrainConfig]
    estimate: Estimate | None = None
    error: str = ""


# ---- estimates


def key(config: dict[str, Any]) -> str:
    """The same for runs that differ in the seed alone, and so take as long."""
    return json.dumps({k: v for k, v in identity(config).items() if k != "seed"}, sort_keys=True, default=str)


def from_history(records: Sequence[dict[str, Any]]) -> Estimate:
    """What runs that are done took; those in the middle, where they differ."""

    def middle(values: Iterable[Any]) -> float:
        return statistics.median(float(value) for value in values if value is not None)

    memory = [m for m in map(_memory, records) if m is not None]
    return Estimate(
        source=f"history ({len(records)} run{'s' * (len(records) > 1)})",
        step_s=middle(r["timing"]["step_time_p50_s"] for r in records),
        steps=round(middle(r["steps"] for r in records)),
        wall_s=middle(r["timing"]["wall_s"] for r in records),
        start_s=middle(_around(r) for r in records),
        memory=max(memory, default=None),
    )


def _memory(record: dict[str, Any]) -> int | None:
    memory = record["memory"]
    peak: int | None = memory.get("peak_cuda_bytes") or memory.get("peak_rss_bytes")
    return peak


def _around(record: dict[str, Any]) -> float:
    """Seconds of a run outside its wall time; 0 for one that was taken up again, whose record does not tell."""
    began, ended = (datetime.fromisoformat(record[name]) for name in ("started", "ended"))
    return max(0.0, (ended - began).total_seconds() - record["timing"]["wall_s"])


def probe(config: TrainConfig, seconds: float = SECONDS) -> Estimate:
    """Trains a few steps of a run, in a folder that is removed again.

    Args:
        config: The run.
        seconds: Of steps. The least that is measured are 2 steps, 2 evaluations, and one on the test split.

    Raises:
        RuntimeError: If the run fails; with its error.
    """
    second = first = _short_run(config, steps=2, eval_every=1)
    total = _total_steps(config, first)
    if FEWEST * first.step_s + 2 * first.evaluation_s < seconds:
        steps = max(FEWEST, round(seconds / first.step_s))
        steps = min(steps, max(2, total)) if total is not None else steps
        second = _short_run(config, steps=steps, eval_every=max(1, steps // 2))
    if total is None:  # its length is seconds, of which evaluations are part
        total = max(1, round((config.trainer.seconds or 0.0) / second.step_s))
        wall = (config.trainer.seconds or 0.0) + second.evaluation_s + second.end_s
    else:
        t = config.trainer
        eval_every = t.eval_every or max(1, total // 20)
        wall = second.warm_up_s + total * second.step_s + second.end_s
        wall += math.ceil(total / eval_every) * second.evaluation_s
        wall += (math.ceil(total / (t.checkpoint_every or eval_every)) - 1) * second.checkpoint_s
    return Estimate("measured", second.step_s, total, wall, second.start_s, second.memory)


@dataclass
class _Short:
    """A few steps of a run. `end_s` is what follows the last evaluation: a checkpoint, and the test split."""

    step_s: float
    warm_up_s: float
    evaluation_s: float
    checkpoint_s: float
    end_s: float
    start_s: float
    steps_per_epoch: float
    memory: int | None


def _short_run(config: TrainConfig, steps: int, eval_every: int) -> _Short:
    config = copy.deepcopy(config)
    t = config.trainer
    config.trainer = replace(
        t, steps=steps, epochs=None, seconds=None, eval_every=eval_every, checkpoint_every=eval_every, profile=False
    )
    config.tracker = TrackerConfig(wandb="disabled", pictures=False)
    with tempfile.TemporaryDirectory(prefix="archzoo-plan-") as folder:
        config.output_dir = folder
        began = time.perf_counter()
        record = execute(config)
        took = time.perf_counter() - began
        if record["status"] != "done":
            raise RuntimeError(str(record.get("error") or record["status"]).partition("\n")[0])
        written = (Path(folder) / record["run_id"] / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, written) if f"val/{record['score']['metric']}" in line]
    start, last = lines[0], lines[-1]
    asides = [line["time_s"] - line["train_s"] for line in lines]  # evaluations, and checkpoints before this one
    # The steps after the first evaluation, which are warm, logging included.
    step_s = (last["train_s"] - start["train_s"]) / (last["step"] - start["step"])
    cycle_s = (asides[-1] - asides[0]) / (len(lines) - 1)
    return _Short(
        step_s=step_s,
        warm_up_s=max(0.0, start["train_s"] - start["step"] * step_s),
        evaluation_s=asides[0],
        checkpoint_s=max(0.0, cycle_s - asides[0]),
        end_s=record["timing"]["wall_s"] - last["time_s"],
        start_s=took - record["timing"]["wall_s"],
        steps_per_epoch=last["step"] / last["epoch"],
        memory=_memory(record),
    )


def _total_steps(config: TrainConfig, short: _Short) -> int | None:
    """Steps of the whole run; None if its length is in seconds."""
    if config.trainer.epochs is None:
        return config.trainer.steps
    return max(1, round(config.trainer.epochs * short.steps_per_epoch))


# ---- the plan


def estimate_rows(plan: Plan, history: Sequence[Path], seconds: float = SECONDS) -> list[Row]:
    """The runs of a sweep, those that differ in the seed alone in one row, with what one of them takes.

    Args:
        plan: The sweep.
        history: Folders of comparisons, whose finished runs are looked at first.
        seconds: Of steps, of each configuration that no run is done of.
    """
    from archzoo.training.build import resolve_device

    done: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in _records(history):
        if record["status"] == "done":
            done.setdefault((key(record["config"]), str(record["device"]).partition(":")[0]), []).append(record)
    rows: dict[str, Row] = {}
    for config in plan.configs:
        rows.setdefault(key(asdict_plain(config)), Row(contestant(config), [])).configs.append(config)
    for number, (name, row) in enumerate(rows.items(), 1):
        config = row.configs[0]
        if known := done.get((name, resolve_device(config.trainer.device).type)):
            row.estimate = from_history(known)
            continue
        print(f"measuring {number} of {len(rows)}: {row.label}", file=sys.stderr)
        try:
            row.estimate = probe(config, seconds)
        except RuntimeError as error:
            row.error = str(error)
    return list(rows.values())


def _records(folders: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for folder in dict.fromkeys(path.resolve() for path in folders):
        for path in sorted(folder.glob("*/run.json")):
            if (record := read_record(path.parent)) is not None:
                yield record


def schedule(seconds: Iterable[float], devices: int, longest_first: bool = True) -> float:
    """Seconds until the last of several runs ends, each on the device that is free first.

    >>> schedule([1, 2, 3], devices=2), schedule([1, 2, 3], devices=2, longest_first=False)
    (3, 4)
    """
    free: list[float] = [0] * devices
    for duration in sorted(seconds, reverse=True) if longest_first else seconds:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def past_errors(folder: Path) -> list[float]:
    """What finished runs took, as multiples of what a plan before them had expected."""
    expected = _read(folder / FILE).get("wall_s", {})
    taken = {r["run_id"]: r["timing"]["wall_s"] for r in _records([folder]) if r["status"] == "done"}
    return sorted(taken[run] / expected[run] for run in expected.keys() & taken.keys() if expected[run] > 0)


def keep(folder: Path, rows: Sequence[Row]) -> None:
    """Keeps what is expected of each run that is still to come, beside what was expected of those that are done."""
    expected = _read(folder / FILE).get("wall_s", {})
    for row in rows:
        if row.estimate is not None:
            expected |= {_id(config): row.estimate.wall_s for config in row.configs if not _finished(config)}
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / FILE, (json.dumps({"format": 1, "wall_s": expected}, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _id(config: TrainConfig) -> str:
    return run_id(asdict_plain(config))


def _finished(config: TrainConfig) -> bool:
    record = read_record(Path(config.output_dir) / _id(config))
    return record is not None and record["status"] in FINISHED


# ---- the command


def main(argv: Sequence[str]) -> int:
    """Plans the sweep of a command line of `archzoo train`.

    Returns:
        The exit code: 0, those of `archzoo train`, or 1 where a configuration could not be measured.
    """
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="archzoo plan",
        allow_abbrev=False,
        description="Estimates time, memory and cost of a sweep from measured step times. Other arguments are those of "
        "archzoo train: experiment=digits layer=linear,kan",
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices that train at a time, GPUs or not")
    parser.add_argument("--price-per-hour", type=float, metavar="P", help="of a device")
    parser.add_argument(
        "--history",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a comparison with finished runs to look at, as outputs/digits; may be given several times",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of steps, of each configuration (%(default)g)")
    args, rest = parser.parse_known_args(list(argv))
    if args.gpus < 1:
        parser.error(f"--gpus {args.gpus}: must be 1 or more")
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds:g}: must be positive")
    for folder in args.history:
        if not folder.is_dir():
            parser.error(f"--history {folder}: there is no such folder; give one as outputs/digits")
    plan = prepare(rest)
    if isinstance(plan, int):
        return plan
    process_s = time.monotonic() - began  # a process of `archzoo train` takes as long before its first run
    folder = Path(plan.configs[0].output_dir)
    errors = past_errors(folder)
    rows = estimate_rows(plan, [folder, *args.history], args.seconds)
    keep(folder, rows)
    _print(plan, rows, errors, process_s, args.gpus, args.price_per_hour)
    return 1 if any(row.error for row in rows) else 0


def _print(
    plan: Plan, rows: Sequence[Row], errors: list[float], process_s: float, devices: int, price: float | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    each = process_s if any(word in plan.launcher for word in OWN_PROCESS) else 0.0
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = ("contestant", "runs", "done", "steps", "s/step", "from", "s/run", "device-h", "peak memory", "cost")
    for column in columns[: len(columns) - (price is None)]:
        table.add_column(column, justify="left" if column in ("contestant", "from") else "right")
    for row in rows:
        done = sum(map(_finished, row.configs))
        if (e := row.estimate) is None:
            table.add_row(row.label, str(len(row.configs)), str(done), "", "", f"not measured: {row.error}")
            continue
        hours = (len(row.configs) - done) * (e.wall_s + e.start_s + each) / 3600
        memory = "?" if e.memory is None else f"{e.memory / 2**30:.3g} GiB"
        cost = [] if price is None else [f"{hours * price:.2f}"]
        shown = (str(e.steps), f"{e.step_s:.3g}", e.source, f"{e.wall_s + e.start_s:.3g}", f"{hours:.3g}", memory)
        table.add_row(row.label, str(len(row.configs)), str(done), *shown, *cost)
    left = [
        row.estimate.wall_s + row.estimate.start_s + each
        for config, row in _in_order(plan, rows)
        if row.estimate is not None and not _finished(config)
    ]
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    once = 0.0 if each else process_s
    total, longest = (once + schedule(left, devices, first) if left else 0.0 for first in (False, True))
    print(f"\n{len(left)} of {len(plan.configs)} runs to go, {sum(left) / 3600:.3g} device-hours on {devices} devices")
    print(f"wall time:   {_clock(total)} in the order of the sweep, {_clock(longest)} if the longest went first")
    if price is not None:
        print(f"cost:        {total / 3600 * devices * price:.2f} for {devices} devices until the last run ends")
    if errors:
        print(
            f"past plans:  {len(errors)} runs took {statistics.median(errors):.2f} x what was expected (median; "
            f"{errors[0]:.2f} to {errors[-1]:.2f})"
        )
    print(f"kept in:     {Path(plan.configs[0].output_dir) / FILE}; the next plan says how far off it was")


def _in_order(plan: Plan, rows: Sequence[Row]) -> Iterator[tuple[TrainConfig, Row]]:
    of = {id(config): row for row in rows for config in row.configs}
    for config in plan.configs:
        yield config, of[id(config)]


def _clock(seconds: float) -> str:
    minutes, hours = int(seconds) // 60 % 60, int(seconds) // 3600
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"
