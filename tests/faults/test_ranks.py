"""One process of several dies or hangs: the others end, torchrun starts all again, and not a bit is lost."""

import random
import signal
import subprocess

import pytest

from archzoo.training.run import execute
from tests.faults.ranks import disturbed, small, torchrun, trial
from tests.training.processes import together
from tests.training.support import lines_without_time

EACH = [(rank, number) for rank in (0, 1) for number in (signal.SIGKILL, signal.SIGSTOP)]


@pytest.mark.parametrize(
    ("rank", "number", "count"),
    [
        (1, signal.SIGKILL, 1),
        *(pytest.param(*each, 3, marks=pytest.mark.slow) for each in EACH),
    ],
)
def test_the_run_of_a_lost_process_is_taken_up_and_ends_with_the_same_bits(tmp_path, rank, number, count):
    together(2, execute, small(tmp_path / "whole"))
    (whole,) = (tmp_path / "whole").iterdir()
    random_ = random.Random(count)
    for i in range(count):
        outcome = trial(tmp_path / str(i), whole, rank, number, random_)
        assert outcome["resumable"]
        assert outcome["same_bits"]
        assert not outcome["partial_left"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_process_is_killed_or_stopped_ends_with_the_same_bits(tmp_path):
    seeds = (0, 6)
    command = torchrun(2, f"output_dir={tmp_path}/whole", "seed=0")
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    (whole,) = (tmp_path / "whole").glob("*")
    outcomes = [disturbed(tmp_path / f"cut{seed}", seed) for seed in seeds]
    assert {outcome["signal"] for outcome in outcomes} == {"SIGKILL", "SIGSTOP"}
    for seed, outcome in zip(seeds, outcomes, strict=True):
        assert (outcome["exit_code"], outcome["status"]) == (0, "done")
        assert outcome["ended_s"] < (30 if outcome["signal"] == "SIGKILL" else 180)
        cut = tmp_path / f"cut{seed}" / whole.name
        assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert lines_without_time(cut / "metrics.jsonl") == lines_without_time(whole / "metrics.jsonl")
        assert not list(cut.glob("checkpoints/*.tmp-*"))
