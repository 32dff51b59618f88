"""W&B's server does not answer, answers late, refuses, or dies: no run is held up or fails, and no line is lost."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from archzoo.training import trackers
from archzoo.training.config import TrackerConfig
from archzoo.training.run import execute
from archzoo.training.trackers import LiveWandb, Trackers
from benchmarks import wandb_faults
from tests.training.support import make_config

CANARIES = ("canary-of-argv", "canary-of-env", "k" * 40)


@pytest.fixture(autouse=True)
def _not_given_up(monkeypatch):
    monkeypatch.setattr(trackers, "_given_up", None)


class FakeWandb:
    """In the place of `WandbTracker`: notes what it is told; online, it misbehaves in one call."""

    def __init__(self, misbehave, told):
        self.misbehave, self.told = misbehave, told

    def __call__(self, config, folder, record, history, texts, *, offline):
        self.offline = offline
        self._call("init")
        for line in history:
            self.log(line)
        return self

    def _call(self, name, line=None):
        if not self.offline:
            self.misbehave(name)
        elif line:
            self.told.append(line)

    def log(self, line):
        self._call("log", line)

    def log_pictures(self, step, pictures):
        self._call("pictures", {"pictures": [p.name for p in pictures]})

    def finish(self, record):
        self._call("finish", {"finished": record["status"]})


def hang(_):
    time.sleep(2)


def leave(_):
    raise SystemExit(255)  # as wandb's teardown does


def fail(_):
    raise ConnectionError("gone")


@pytest.mark.parametrize("how", [hang, leave, fail])
@pytest.mark.parametrize("where", ["init", "log", "pictures", "finish"])
def test_whatever_wandb_does_no_call_blocks_or_raises_and_the_run_is_told_offline(
    tmp_path, monkeypatch, logs, where, how
):
    told: list[dict[str, object]] = []
    monkeypatch.setattr(trackers, "WandbTracker", FakeWandb(lambda name: how(name) if name == where else None, told))
    monkeypatch.setattr(trackers, "log_in", lambda: None)
    monkeypatch.setattr(trackers, "end_service", lambda: None)
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    monkeypatch.setattr(trackers, "LEAST_FOR_THE_END", 0.1)
    record = {"status": "done", "steps": 3, "pictures": {"drawn": [{"name": "weights", "caption": ""}]}}
    lines = [{"step": step, "train/loss": 0.5} for step in range(3)]
    picture = tmp_path / "pictures" / "weights.png"
    picture.parent.mkdir()
    picture.write_bytes(b"png")
    began = time.monotonic()
    mirrors = Trackers(TrackerConfig(wandb="online"), tmp_path, record, [], [])
    opened = time.monotonic()
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")
            mirrors.log(line)
    mirrors.log_pictures(3, [trackers.Drawn("weights", "", picture)])
    logged = time.monotonic()
    mirrors.finish(record)
    assert told == [*lines, {"pictures": ["weights"]}, {"finished": "done"}]
    assert (opened - began < 1, logged - opened < 1, time.monotonic() - logged < 1) == (True, True, True)
    assert logs.text.count("W&B is not used") == 1


def test_a_backlog_that_wandb_does_not_take_is_given_up(tmp_path, monkeypatch, logs):
    told: list[dict[str, object]] = []
    slow = FakeWandb(lambda name: time.sleep(0.5) if name == "log" else None, told)
    for name, value in {"WandbTracker": slow, "log_in": lambda: None, "end_service": lambda: None}.items():
        monkeypatch.setattr(trackers, name, value)
    monkeypatch.setattr(trackers, "BACKLOG", 3)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(9)))
    live = LiveWandb(TrackerConfig(wandb="online"), tmp_path, {"status": "done"}, [], [])
    for step in range(9):
        live.log({"step": step})
    live.finish({"status": "done"})
    assert told == [*({"step": step} for step in range(9)), {"finished": "done"}]
    assert "3 calls are waiting" in logs.text


def test_a_refusing_server_costs_a_warning_and_nothing_else(tmp_path, monkeypatch, logs):
    """Two runs in one process, of which the second does not try; argv, the environment and the key are not on disk."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", CANARIES[2])
    monkeypatch.setenv("A_SECRET", CANARIES[1])
    monkeypatch.setattr(sys, "argv", ["train.py", f"--password={CANARIES[0]}"])
    for seed in (0, 1):
        config = make_config(tmp_path, seed=seed, trainer={"steps": 4}, tracker={"wandb": "online"})
        assert execute(config)["status"] == "done"
    runs = sorted(path.parent for path in tmp_path.glob("*/run.json"))
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines} == {1, 2, 3, 4}
        (offline,) = run.glob("wandb/offline-run-*")
        assert list(offline.glob("*.wandb"))
    assert logs.text.count("W&B is not used: ") == logs.text.count("W&B is not tried again: ") == 1
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(held) > 10_000
    assert [canary for canary in CANARIES if canary.encode() in held] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, wandb_faults.undisturbed(folder)


@pytest.mark.slow
@pytest.mark.parametrize("fault", wandb_faults.SERVERS)
def test_no_fault_of_the_server_fails_a_run_or_loses_a_line(undisturbed, fault):
    """As `python -m benchmarks wandb_faults` records it."""
    told = wandb_faults.trial(fault, *undisturbed)
    zero = ("failed_runs", "lost_metrics", "steps_that_wandb_lacks", "secrets_found")
    assert {key: told[key] for key in zero} == dict.fromkeys(zero, 0)
    assert told["overhead_s"] < wandb_faults.GOAL
    assert told["warnings"] == (fault != "answers")
    assert told["metrics"] > 1000


@pytest.mark.slow
def test_wandb_sync_reads_what_was_told_offline(tmp_path):
    """W&B's own reader finds the lines of a run that had no W&B run, once it is told."""
    config = make_config(tmp_path, tracker={"wandb": "disabled"})
    record = execute(config)
    (run,) = (path.parent for path in Path(tmp_path).glob("*/run.json"))
    trackers.tell_offline(run, TrackerConfig(wandb="offline"), record)
    (offline,) = run.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(offline)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "1 run" in done.stdout + done.stderr
    assert [line["_step"] for line in wandb_faults.offline_lines(run)] == list(range(1, 13))
