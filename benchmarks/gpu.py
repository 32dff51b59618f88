"""Every op on a GPU beside its definition, that compiled, and public kernels; needs torch and triton alone.

    python -m benchmarks gpu --out DIR [--peers FOLDER] [--only OP …] [--minutes 9] [--dry-run]

Measures the device's ceilings, runs the kernels' tests, then every op at one size, how few numbers it leaves to plain
torch, that size compiled, and further sizes, until the time is over. Each case is a line of DIR/cases.jsonl as it
comes. The same command goes on where it was; so does it by itself after a fault that ends CUDA in its process.
DIR/gpu_speed.json has all of it, with what was missing or not reached, DIR/thresholds.json the table of small sizes,
and DIR/gpu_speed.png a picture. `python -m benchmarks peers --out FOLDER` makes the peers' folder. The record, copied
to benchmarks/results, and the table, copied to kernels, are what `python -m benchmarks readme` puts into
docs/kernels.md.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from archzoo.kernels import _thresholds
from benchmarks._cases import H200, Ceilings, Op, Size, add_peers, label
from benchmarks._checkout import ROOT
from benchmarks._measure import (
    COMPILED,
    Call,
    Device,
    Row,
    Times,
    fatal,
    first_line,
    measure,
    planned_floors,
    quantiles,
)
from benchmarks._record import environment, version_of
from benchmarks._speed import case_name, merged, progress_line, summary

DEADLINE = "ARCHZOO_GPU_DEADLINE"
"""Environment variable: when to end, for a process that takes over from one without CUDA. Seconds since the epoch."""
LONG_MS = 150.0
PACKAGES = ("triton", "mamba-ssm", "causal-conv1d", "flash-linear-attention", "fla-core", "liger-kernel", "mambapy")


@dataclass(frozen=True)
class Task:
    """A case, or the part of it that compiles the definition."""

    op: Op
    size: Size
    part: str
    first: bool

    @property
    def key(self) -> str:
        dtype = str(self.op.dtype).removeprefix("torch.")
        return f"{self.part} {self.op.name} {label(self.size)} {dtype}"

    def measured(self, device: Device) -> dict[str, Any]:
        """A line of the log."""
        began = time.perf_counter()
        row = measure(self.op, self.size, self.op.dtype, device, self.part, breaks=self.first)
        return {"row": row | {"seconds": round(time.perf_counter() - began, 1)}}

    def failed(self, why: str) -> dict[str, Any]:
        """The line instead. Where only the compiled part failed, the case stands."""
        row: Row = {"op": self.op.name, "size": dict(self.size), "contestants": {}}
        row["dtype"] = str(self.op.dtype).removeprefix("torch.")
        if self.part == "compiled":
            return {"row": row | {"contestants": {COMPILED: {"error": why}}}}
        return {"row": row | {"error": why}}


@dataclass(frozen=True)
class Threshold:
    """How few numbers an op leaves to plain torch, as `tune_thresholds` measures it."""

    op: str

    @property
    def key(self) -> str:
        return f"threshold {self.op}"

    def measured(self, device: Device) -> dict[str, Any]:
        """A line of the log."""
        below, tried = _thresholds.measure(self.op, torch.device(device.place, torch.cuda.current_device()))
        ms = {n: {backend: round(1e3 * t, 4) for backend, t in times.items()} for n, times in sorted(tried.items())}
        return {"threshold": {"op": self.op, "below": below, "ms": ms}}

    def failed(self, why: str) -> dict[str, Any]:
        """The line instead."""
        return {"threshold": {"op": self.op, "error": why}}


def plan(ops: Sequence[Op], thresholds: Sequence[str] = ()) -> list[Task | Threshold]:
    """All ops' first size before any second one; and compiling, which takes longest, after that size of all.

    Thresholds come in between, each with its op, so that what matters most has all of it when the time is over.
    """
    tasks: list[Task | Threshold] = []
    left = list(thresholds)
    for index in range(max(len(op.gpu) for op in ops)):
        chosen = [op for op in ops if index < len(op.gpu)]
        tasks += [Task(op, op.gpu[index], "eager", index == 0) for op in chosen]
        for op in chosen:
            own = [name for name in left if _called(name) & _called(op.name)]
            tasks += map(Threshold, own)
            left = [name for name in left if name not in own]
            tasks += [Task(op, op.gpu[index], "compiled", index == 0)] if op.compiles else []
        tasks += map(Threshold, left)
        left = []
    return tasks


class OutOfTime(BaseException):
    """The deadline has come. No Exception, or a contestant's failure is what it would be taken for."""


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Raises `OutOfTime` inside when the deadline comes, and again each second, as some callbacks swallow it."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    left = min(max(1e-3, deadline - time.time()), 1e6)  # seconds; the timer takes no more than it can count
    signal.setitimer(signal.ITIMER_REAL, left, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


# --- The device -------------------------------------------------------------------------------------------------------


def milliseconds(call: Call) -> dict[str, float]:
    """Quantiles by Triton's `do_bench`, which empties the L2 cache between calls; one call of what is slow."""
    from triton.testing import do_bench

    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    once = start.elapsed_time(end)
    if once > LONG_MS:
        return quantiles([once])
    least, p20, p50, p80 = do_bench(call, warmup=20, rep=80, quantiles=[0.0, 0.2, 0.5, 0.8])
    return {"least": least, "p20": p20, "p50": p50, "p80": p80}


def race(calls: Mapping[str, Call]) -> Times:
    return {name: milliseconds(call) for name, call in calls.items()}


def peak(call: Call) -> int:
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free() -> float:
    """Bytes that can be had, those that torch keeps for later included."""
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


def gpu_device(ceilings: Ceilings) -> Device:
    return Device("gpu", "cuda", race, peak, free, "p50", ceilings)


# --- The tests --------------------------------------------------------------------------------------------------------


def run_tests(minutes: float, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the kernels' tests on the device, in a process of its own, for so long at most."""
    if minutes <= 0:
        return {"ran": False, "why": "--test-minutes 0"}
    if command is None:
        if importlib.util.find_spec("pytest") is None:
            return {"ran": False, "why": "pytest is not installed"}
        command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(8, os.cpu_count() or 1))]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=60 * minutes)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the workers that it started
        out, _ = process.communicate()
        code = None
    seconds = round(time.perf_counter() - began, 1)
    why = {} if code is not None else {"why": f"not finished in {minutes:g} minutes"}
    return {"ran": True, "returncode": code, "seconds": seconds, "tail": out.splitlines()[-25:], **why}


# --- Records ----------------------------------------------------------------------------------------------------------


class Log:
    """The lines of `cases.jsonl`: which tasks were begun, and what they came to."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:  # the last one, cut off
                    continue

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()

    def find(self, what: str) -> Any:
        """What was measured once: the ceilings, the tests."""
        return next((line[what] for line in reversed(self.lines) if what in line), None)

    def rows(self) -> list[dict[str, Any]]:
        return [line["row"] for line in self.lines if "row" in line]

    def thresholds(self) -> list[dict[str, Any]]:
        return [line["threshold"] for line in self.lines if "threshold" in line]

    def open(self, key: str) -> bool:
        """Whether a task is still to be done."""
        return not any(line.get("done") == key for line in self.lines)

    def stopped(self, key: str) -> bool:
        """Whether it was begun and never came back."""
        return sum((line.get("began") == key) - (line.get("put off") == key) for line in self.lines) > 0


def work_off(
    tasks: Sequence[Task | Threshold],
    log: Log,
    device: Device,
    deadline: float,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Does what is open of the tasks until the deadline; returns what was not reached.

    Raises:
        RuntimeError: If CUDA is lost in this process; the task is noted, so that the next process leaves it out.
    """
    missed, lost = [], None
    for task in tasks:
        if not log.open(task.key):
            continue
        if time.time() > deadline:
            missed.append(task.key)
            continue
        if log.stopped(task.key):
            found = task.failed("stopped the process when it was tried")
        else:
            log.add({"began": task.key})
            try:
                with until(deadline):
                    found = task.measured(device)
            except (OutOfTime, KeyboardInterrupt) as reason:  # no fault of the task's
                log.add({"put off": task.key})
                if isinstance(reason, KeyboardInterrupt):
                    raise
                missed.append(task.key)
                deadline = 0.0
                continue
            except Exception as problem:  # ours failed: the record says how, and the other ops go on
                found = task.failed(first_line(problem))
                lost = problem if fatal(problem) else None
        log.add({"done": task.key} | found)
        say(threshold_line(found["threshold"]) if "threshold" in found else progress_line(found["row"]))
        if lost is not None:
            raise RuntimeError(f"CUDA is lost after {task.key}") from lost
    return missed


def threshold_line(found: Mapping[str, Any]) -> str:
    """What a threshold came to, for a terminal."""
    if "error" in found:
        return f"threshold of {found['op']}: {found['error']}"
    times = ", ".join(f"{n}: {t['torch']:.3g} and {t['triton']:.3g}" for n, t in found["ms"].items())
    return f"threshold of {found['op']}: {found['below']}; ms by torch and Triton of numbers {times}"


def record_of(log: Log, ops: Sequence[Op], missed: Sequence[str], command: str, wall: float) -> dict[str, Any]:
    rows = merged(log.rows())
    return {
        "benchmark": "gpu",
        "command": command,
        "wall_s": round(wall, 1),
        "environment": environment() | {"versions": version_of(*PACKAGES)},
        "float32_matmul_precision": "high",
        "ceilings": log.find("ceilings"),
        "tests": log.find("tests"),
        "thresholds": log.thresholds(),
        "not_reached": list(missed),
        "missing_peers": missing_peers(ops),
        "summary": summary(ops, rows, "gpu"),
        "rows": rows,
    }


def missing_peers(ops: Sequence[Op]) -> dict[str, str]:
    peers = ((op, peer) for op in ops for peer in op.peers if "gpu" in peer.where)
    return {f"{op.name}, {peer.name}": why for op, peer in peers if (why := peer.missing()) is not None}


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """A picture: times of others in units of ours, and the part of our time that the floor is. Says what it did."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no picture: matplotlib is not installed"
    from benchmarks._speed_picture import draw_speed

    return draw_speed(rows, path)


# --- The command ------------------------------------------------------------------------------------------------------


def dry_run(ops: Sequence[Op], thresholds: Sequence[str]) -> Iterator[str]:
    """What would be measured, in order, with floors by the ceilings of an H200, and which peers are at hand."""
    for task in plan(ops, thresholds):
        if isinstance(task, Threshold):
            yield f"{task.op}: how few numbers it leaves to plain torch"
            continue
        if task.part == "compiled":
            yield f"{case_name(_names(task))}: the definition compiled"
            continue
        floor = planned_floors(task.op, task.size, H200)
        text = f"floor forward {floor['f_ms']:.3g} ms ({floor['f_binds']})"
        if task.op.backward:
            text += f", with backward {floor['fb_ms']:.3g} ms ({floor['b_binds']})"
        others = [peer.name for peer in task.op.peers if "gpu" in peer.where and peer.missing() is None]
        yield f"{case_name(_names(task))}: {text}; beside the definition {', '.join(others) or 'nothing'}"
    for name, why in missing_peers(ops).items():
        yield f"missing peer of {name}: {why}"


def _names(task: Task) -> dict[str, Any]:
    return {"op": task.op.name, "size": task.size, "dtype": str(task.op.dtype).removeprefix("torch.")}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for records; needed unless --dry-run")
    parser.add_argument("--peers", type=Path, help="folder of `python -m benchmarks peers`, or of modules of your own")
    parser.add_argument("--only", nargs="+", metavar="OP", help="ops by name, or the part before the colon")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it")
    parser.add_argument("--test-minutes", type=float, default=2.0, help="for the tests, of that; 0 leaves them out")
    parser.add_argument("--dry-run", action="store_true", help="list cases, floors and peers; needs no GPU")
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("argument --out is needed: a folder for the records")
    if args.peers is not None and not args.peers.is_dir():
        parser.error(
            f"argument --peers: {args.peers} is no folder; python -m benchmarks peers --out {args.peers} makes it"
        )
    if not args.minutes > 0:
        parser.error(f"argument --minutes: {args.minutes:g}: must be above 0")
    return args


def choose(only: Sequence[str] | None) -> list[Op]:
    """The ops of these names.

    Raises:
        SystemExit: If there is none of a name.
    """
    from benchmarks._ops import OPS

    names = {name for op in OPS for name in _called(op.name)}
    unknown = [name for name in only or () if name not in names]
    if unknown:
        sys.exit(f"--only {' '.join(unknown)}: no such op; there are {', '.join(op.name for op in OPS)}")
    return [op for op in OPS if only is None or _called(op.name) & set(only)]


def choose_thresholds(only: Sequence[str] | None) -> list[str]:
    """The keys of the table of thresholds of these names."""
    from archzoo.kernels._threshold_problems import PROBLEMS

    return [op for op in PROBLEMS if only is None or _called(op) & set(only)]


def _called(op: str) -> set[str]:
    return {op, op.partition(":")[0]}


def main(argv: list[str]) -> None:
    args = parse(argv)
    add_peers(args.peers)
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("python -m benchmarks gpu: there is no CUDA device here; --dry-run lists what would be measured")
    ops, thresholds = choose(args.only), choose_thresholds(args.only)
    if args.dry_run:
        for line in dry_run(ops, thresholds):
            print(line)
        return
    began = time.time()
    deadline = float(os.environ.setdefault(DEADLINE, str(began + 60 * args.minutes - 15)))  # 15 s for what comes last
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "cases.jsonl")
    torch.set_float32_matmul_precision("high")
    if log.find("ceilings") is None:
        from benchmarks._ceilings import measured

        log.add({"ceilings": dataclasses.asdict(measured(lambda call: milliseconds(call)["p50"]))})
        torch.cuda.empty_cache()
    print(json.dumps({"ceilings": log.find("ceilings")}), flush=True)
    if log.find("tests") is None:
        log.add({"tests": run_tests(min(args.test_minutes, (deadline - time.time()) / 60))})
    print(json.dumps({"tests": log.find("tests")}), flush=True)
    device = gpu_device(Ceilings(**log.find("ceilings")))
    command = f"python -m benchmarks gpu {' '.join(argv)}"
    tasks = plan(ops, thresholds)
    try:
        missed = work_off(tasks, log, device, deadline, lambda line: print(line, flush=True))
    except RuntimeError as lost:
        print(f"{lost}: going on in a new process", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", "gpu", *argv])
    wall = time.time() - (deadline + 15 - 60 * args.minutes)
    record = record_of(log, ops, missed, command, wall)
    record["picture"] = draw(record["rows"], args.out / "gpu_speed.png")
    (args.out / "gpu_speed.json").write_text(json.dumps(record, indent=1) + "\n")
    if below := {found["op"]: found["below"] for found in record["thresholds"] if "below" in found}:
        place = torch.device(device.place, torch.cuda.current_device())
        _thresholds.write(below, place, args.out / _thresholds.TABLE.name)
    shown = {key: record[key] for key in ("summary", "missing_peers", "not_reached", "picture")}
    print(json.dumps(shown, indent=1))
    print(f"wrote {args.out / 'gpu_speed.json'}")
