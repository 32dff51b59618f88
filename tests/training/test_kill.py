"""kill -9 of a sweep at any moment, then the same command: as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.training.support import lines_without_time
from tests.training.test_cli import TRAIN, records

COMMAND = [*TRAIN, "layer=linear,phm", "seed=0,1", "trainer.steps=900", "trainer.epochs=null", "tracker=none"]
COMMAND += ["model.dropout=0.1", "trainer.ema_decay=0.95", "trainer.eval_every=50", "trainer.checkpoint_every=25"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run([*COMMAND, f"output_dir={folder}"], check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.slow
def test_a_sweep_that_is_killed_at_five_random_moments_ends_with_the_same_bits(tmp_path, undisturbed):
    rng = random.Random(20240430)
    first_run = None
    for _ in range(5):
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                [*COMMAND, f"output_dir={tmp_path}/out"], stdout=log, stderr=log, start_new_session=True
            )
        # The first seconds are imports; the moments are to lie in training.
        lines = count_lines(tmp_path)
        while process.poll() is None and count_lines(tmp_path) <= lines:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.6))
        assert process.poll() is None, "the sweep ended before it could be killed five times"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        saved = (tmp_path / "out").glob("*/model.safetensors")
        done = [p for p in saved if json.loads((p.parent / "run.json").read_text())["status"] == "done"]
        first_run = first_run or (done and (done[0], done[0].stat().st_mtime_ns))
    finished = subprocess.run([*COMMAND, f"output_dir={tmp_path}/out"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    if first_run:
        path, written = first_run
        assert path.stat().st_mtime_ns == written, "a finished run was trained again"
        assert "not trained again" in finished.stderr
    assert all(r["status"] == "done" for r in records(tmp_path / "out").values())
    whole_runs = [path.parent for path in undisturbed.glob("*/run.json")]
    assert len(whole_runs) == 4
    for whole in whole_runs:
        killed = tmp_path / "out" / whole.name
        assert lines_without_time(killed / "metrics.jsonl") == lines_without_time(whole / "metrics.jsonl")
        ours, theirs = load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        a, b = (json.loads((folder / "run.json").read_text()) for folder in (killed, whole))
        assert (a["score"], a["summary"]) == (b["score"], b["summary"])
    assert not list((tmp_path / "out").rglob("*.tmp-*")), "what a killed writer left is swept"


def count_lines(folder):
    return sum(p.read_bytes().count(b"\n") for p in folder.glob("out/*/metrics.jsonl"))
