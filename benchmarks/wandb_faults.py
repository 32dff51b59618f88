"""What a W&B server that fails costs a run, and whether anything is lost: one JSON line a fault.

    python -m benchmarks wandb_faults --record

Each trial trains two runs, with `tracker.wandb=online`, in a process of its own, against a loopback server that
misbehaves. Overhead is the time that the trainer waits in calls of its trackers, and that the process takes longer to
exit than without W&B. A metric is lost if metrics.jsonl lacks it; and W&B must have every line, on the server or in an
offline run. Goal: an overhead below 20 s, 0 failed runs, 0 lost metrics; and no secret on disk or on the server.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._checkout import make_importable
from benchmarks._record import environment, version_of
from benchmarks._wandb_server import KEY, WandbServer

GOAL = 20.0  # seconds
SEEDS = (0, 1)
STEPS = 500  # some 1 s, so that there is a middle to die in
ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).parent / "results" / "wandb_faults.json"
CODE = "import sys; sys.path.append(sys.argv[1]); from benchmarks.wandb_faults import train; train(*sys.argv[2:4])"
SECRETS = (b"canary-of-the-command-line", b"canary-of-the-environment")
"""That, and the API key, neither the run's folder nor the server may hold."""

SERVERS: dict[str, dict[str, Any]] = {
    "answers": {},
    "refuses": {"manner": "good"},  # and is stopped before the run
    "never answers": {"manner": "hole"},
    "slow": {"delay": 3.0},
    "bad key": {"manner": "bad key"},
    "HTTP 500": {"manner": "error"},
    "stops in mid-run": {},
    "never answers from mid-run on": {},
    "wandb's own process is killed": {},
    "wandb's own process hangs": {},
}
"""Fault -> what the server begins as."""


def train(folder: str, mode: str) -> None:
    """The child: trains the runs, and prints how that went."""
    make_importable()
    from archzoo.training import run as running
    from archzoo.training.config import BudgetConfig, TrackerConfig, TrainConfig, TrainerConfig
    from archzoo.training.trackers import Trackers

    class Timed(Trackers):
        """Knows how long each call took."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return _timed(value, calls.setdefault(name, [])) if name in ("log", "log_text", "finish") else value

    calls: dict[str, list[float]] = {"open": [], "log": []}
    running.Trackers = _timed(Timed, calls["open"])  # type: ignore[assignment, misc]  # as the trainer calls it
    statuses = []
    for seed in SEEDS:
        config = TrainConfig(
            name="faults",
            output_dir=folder,
            seed=seed,
            task={"name": "digits"},
            model={"name": "mlp", "width": 8, "depth": 2},
            layer={"name": "linear"},
            budget=BudgetConfig(match="none"),
            trainer=TrainerConfig(steps=STEPS, batch_size=16, log_every=2, eval_every=100),
            tracker=TrackerConfig(wandb=mode, pictures=False),
        )
        statuses.append(running.execute(config)["status"])
    waited, slowest = sum(map(sum, calls.values())), max(calls["log"])
    print(json.dumps({"statuses": statuses, "waited_s": waited, "slowest_log_s": slowest, "ended": time.time()}))


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds.append(time.perf_counter() - began)

    return timed


def trial(fault: str, reference: Path, exit_s: float) -> dict[str, Any]:
    """Figures of one fault; `reference` holds the runs of `undisturbed`, whose process took `exit_s` to exit."""
    with tempfile.TemporaryDirectory() as folder, WandbServer(**SERVERS[fault]) as server:
        if fault == "refuses":
            server.stop()
        child = _start(Path(folder), "online", server.environment)
        server.on_run = _later(fault, server, child)
        told = _wait(child)
        lost, untold = 0, 0
        for run in sorted(reference.iterdir()):
            expected = _lines(run)
            lost += _missing(expected, _lines(Path(folder) / run.name))
            has = server.lines.get(run.name, []) if fault == "answers" else offline_lines(Path(folder) / run.name)
            untold += len({line["step"] for line in expected} - {int(line["_step"]) for line in has})
        files = [path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()]
        logs = "".join(path.read_text() for path in Path(folder).glob("*/log.txt"))
        sent = [body if isinstance(body, bytes) else json.dumps(body).encode() for _, body in server.requests]
    return {
        "fault": fault,
        "overhead_s": round(told["waited_s"] + max(told["exit_s"] - exit_s, 0.0), 2),
        "slowest_log_ms": round(1e3 * told["slowest_log_s"], 2),
        "runs": len(SEEDS),
        "failed_runs": len(SEEDS) - told["statuses"].count("done"),
        "metrics": sum(len(line) - 1 for run in reference.iterdir() for line in _lines(run)),
        "lost_metrics": lost,
        "steps_that_wandb_lacks": untold,
        "warnings": logs.count("W&B is not used"),
        "secrets_found": sum(secret in text for secret in (*SECRETS, KEY.encode()) for text in files + sent),
    }


def undisturbed(folder: Path) -> float:
    """Trains the runs without W&B; seconds that the process took to exit."""
    told = _wait(_start(folder, "disabled", {}))
    assert told["statuses"] == ["done"] * len(SEEDS), told
    return float(told["exit_s"])


def offline_lines(run: Path) -> list[dict[str, Any]]:
    """The history lines of a run's only offline run, by W&B's own reader."""
    (offline,) = run.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    records = [json.loads(line) for line in out.splitlines()]
    return [record["history"]["item"] for record in records if record.get("type") == "history"]


def _start(folder: Path, mode: str, variables: dict[str, str]) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(ROOT), str(folder), mode, f"--password={SECRETS[0].decode()}"],
        cwd=folder,
        env=clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "A_SECRET": SECRETS[1].decode()} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What the child told, with the seconds that it took to exit after that."""
    try:
        out, errors = child.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    now = time.time()
    if child.returncode:
        raise RuntimeError(f"the process ended with {child.returncode}:\n{errors}")
    told = json.loads(out.splitlines()[-1])
    return told | {"exit_s": now - told["ended"]}


def _later(fault: str, server: WandbServer, child: subprocess.Popen[str]) -> Callable[[], None]:
    """What strikes shortly after a run has begun."""

    def strike() -> None:
        if fault == "stops in mid-run":
            server.stop()
        elif fault == "never answers from mid-run on":
            server.manner = "hole"
        elif fault.startswith("wandb's own process"):
            for pid in _children(child.pid, "wandb-core"):
                os.kill(pid, signal.SIGKILL if "killed" in fault else signal.SIGSTOP)

    return lambda: threading.Timer(0.3, strike).start()


def _children(parent: int, name: str) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = status.read_text().split(" (", 1)
        except (OSError, ValueError):  # it ended meanwhile
            continue
        command, fields = rest.rsplit(") ", 1)
        if command == name and int(fields.split()[1]) == parent:
            found.append(int(pid))
    return found


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time_s", "train_s")} for line in lines]


def _missing(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> int:
    rest = {(line["step"], key, value) for line in found for key, value in line.items()}
    return sum((line["step"], key, value) not in rest for line in expected for key, value in line.items())


def main(argv: list[str]) -> None:
    """Tries every fault, and prints a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", action="append", choices=SERVERS, help="only this one; may be repeated")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as reference:
        exit_s = undisturbed(Path(reference))
        trials = []
        for fault in arguments.fault or SERVERS:
            trials.append(trial(fault, Path(reference), exit_s))
            print(json.dumps(trials[-1]), flush=True)
    if arguments.record:
        command = " ".join(["python -m benchmarks wandb_faults", *argv])
        record = {"benchmark": "wandb_faults", "command": command, "goal_s": GOAL}
        record |= {"trials": trials, **version_of("wandb"), **environment()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
