"""Two processes that train together, of which one is killed or stopped in the middle of a run."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from archzoo.training import distributed
from archzoo.training.config import TrainConfig
from archzoo.training.run import execute
from tests.training.processes import together
from tests.training.support import lines_without_time, make_config

TRAIN = Path(__file__).parents[2] / "train.py"
SETTINGS = ["task=digits", "model.dropout=0.1", "trainer.epochs=null", "trainer.eval_every=100", "tracker=none"]
SETTINGS += ["trainer.checkpoint_every=20", "trainer.rank_timeout=8", "trainer.steps=1000"]


def torchrun(count: int, *arguments: str, restarts: int = 0) -> list[str]:
    """A command that trains in several processes."""
    options = [f"--nproc-per-node={count}", f"--max-restarts={restarts}", "--rdzv-backend=c10d"]
    return [
        *(sys.executable, "-m", "torch.distributed.run", *options, "--rdzv-endpoint=127.0.0.1:0"),
        *(str(TRAIN), *SETTINGS, *arguments),
    ]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts it in a session of its own, so that all its processes can be killed together."""
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def workers(parent: int) -> list[int]:
    """The processes of training that torchrun has started, by rank."""
    ranks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
                if int(status["PPid"]) == parent:
                    variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if v)
                    ranks[int(variables[b"RANK"])] = int(folder.name)
            except (OSError, KeyError, ValueError):
                continue  # it has ended, or is no worker
    return [ranks[rank] for rank in sorted(ranks)]


def newest_checkpoint(output: Path) -> int:
    """The step of the newest checkpoint of the only run; 0 before the first."""
    steps = [int(p.name[5:]) for p in output.glob("*/checkpoints/step_*") if p.name[5:].isdigit()]
    return max(steps, default=0)


def waiting(seconds: float) -> Iterator[None]:
    """Turns of a loop that waits; it must end in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield
        time.sleep(0.02)
    raise TimeoutError(f"nothing happened in {seconds} s")


def disturbed(folder: Path, seed: int, *arguments: str) -> dict[str, float | str]:
    """Runs to the end, with one of two processes killed, or stopped for good, after a random checkpoint.

    Returns:
        What was done and to whom, the exit code, and the seconds until the processes of the first try had ended.
    """
    random_ = random.Random(seed)
    rank, stops = random_.randrange(2), random_.random() < 0.5
    command = torchrun(2, f"output_dir={folder}", f"seed={seed % 3}", *arguments, restarts=1)
    process = start(command, folder.with_suffix(".log"))
    try:
        after = random_.randrange(1, 40) * 20
        for _ in waiting(150):
            assert process.poll() is None, folder.with_suffix(".log").read_text()
            if newest_checkpoint(folder) >= after:
                break
        time.sleep(random_.uniform(0, 0.2))
        first = workers(process.pid)
        began = time.monotonic()
        os.kill(first[rank], signal.SIGSTOP if stops else signal.SIGKILL)
        for _ in waiting(180):
            if not set(first) & set(workers(process.pid)):
                break
        ended = time.monotonic() - began
        code = process.wait(150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    record = json.loads(next(folder.glob("*/run.json")).read_text())
    return {
        "rank": rank,
        "signal": "SIGSTOP" if stops else "SIGKILL",
        "exit_code": code,
        "status": record["status"],
        "ended_s": ended,
    }


# ---- the same without torchrun, by forks, which start in no time: for many trials

RANK_TIMEOUT = 3.0


def small(folder: Path) -> TrainConfig:
    """A run of a fraction of a second."""
    return make_config(folder, trainer={"steps": 60, "eval_every": 20, "checkpoint_every": 5})


def lose_itself(config: TrainConfig, rank: int, number: int, step: int, delay: float) -> str:
    """Trains; one of the processes gets a signal so many seconds after a step."""
    steps = iter(range(1, 10**6))

    def look() -> bool:
        if next(steps) == step:
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        return False

    status: str = execute(config, should_stop=look if distributed.rank() == rank else lambda: False)["status"]
    return status


def trial(folder: Path, whole: Path, rank: int, number: int, random_: random.Random) -> dict[str, float | bool]:
    """Loses a process of a run at a random moment, and has two others take the run up.

    Args:
        folder: For the run.
        whole: The run's folder where nothing happened to it.
        rank, number: The process, and the signal that it gets.
        random_: Of the moment.

    Returns:
        The seconds until the other process had ended, whether the end has the bits of the undisturbed run, and whether
        a partial checkpoint was left.
    """
    config = small(folder)
    moment = random_.randrange(1, 59), random_.uniform(0, 0.003)
    began = time.monotonic()
    together(2, lose_itself, config, rank, number, *moment, timeout=RANK_TIMEOUT, lost=rank)
    ended = time.monotonic() - began
    told = folder / whole.name / "run.json"  # not there yet, if it was lost before it began
    before = json.loads(told.read_text())["status"] if told.exists() else "running"
    statuses = {record["status"] for record in together(2, execute, config)}
    cut = folder / whole.name
    same = (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    same &= lines_without_time(cut / "metrics.jsonl") == lines_without_time(whole / "metrics.jsonl")
    return {
        "ended_s": ended,
        "resumable": before in ("running", "interrupted", "done"),
        "same_bits": same and statuses == {"done"},
        "partial_left": bool(list(cut.glob("checkpoints/*.tmp-*"))),
    }
