"""A loader process that is killed, and an example that cannot be read: named, saved before, and gone on from."""

import multiprocessing
import os
import pickle
import random
import signal
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from archzoo.tasks.task import DatasetError, SampleError
from archzoo.training import run
from archzoo.training.data import BatchOrder, eval_batches, train_batches
from benchmarks._broken_data import (
    STEPS,
    Fault,
    Noisy,
    bad_example,
    config_of,
    disturbed,
    folder_of,
    kill_a_worker_at,
    noisy_data,
    same_run,
    saved_steps,
    whole,
)
from tests.training.support import Blobs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same run without a fault, by number of workers."""
    runs = {}

    def get(workers):
        if workers not in runs:
            runs[workers] = whole(config_of(tmp_path_factory.mktemp("undisturbed"), workers))
        return runs[workers]

    return get


# ---- runs


def kill_trial(folder, step, rng, undisturbed):
    outcome = disturbed(config_of(folder, 2), undisturbed(2), should_stop=kill_a_worker_at(step, rng))
    assert "Digits, split train: a batch could not be read by loader process" in outcome.error
    assert "it was killed by SIGKILL, as the system does where memory runs out; its next were exam" in outcome.error
    assert step <= outcome.saved <= step + 4, "as many batches as were read ahead"
    assert outcome.same
    assert outcome.seconds < 60


def test_a_killed_loader_process_costs_no_step(tmp_path, undisturbed):
    kill_trial(tmp_path, 13, random.Random(0), undisturbed)


@pytest.mark.slow
def test_loader_processes_killed_at_twenty_batches_cost_no_step(tmp_path, undisturbed):
    rng = random.Random(20240430)
    for trial, step in enumerate(rng.sample(range(1, STEPS - 10), 20)):
        kill_trial(tmp_path / str(trial), step, rng, undisturbed)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_example_is_named_and_costs_no_step(tmp_path, undisturbed, workers):
    fault, config = Fault(bad_example(20)), config_of(tmp_path, workers)
    outcome = disturbed(config, undisturbed(workers), fault)
    by = " by loader process 0" if workers else ""
    assert outcome.error == (
        f"Digits, split train: example {fault.index} could not be read{by}: ValueError: not a picture"
    )
    assert 'raise ValueError("not a picture")' in (folder_of(config) / "log.txt").read_text()
    assert outcome.saved == 20
    assert outcome.same
    assert outcome.seconds < 60


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_examples_in_any_batch_cost_no_step(tmp_path, undisturbed, workers):
    for batch in range(1, STEPS):
        outcome = disturbed(config_of(tmp_path / str(batch), workers), undisturbed(workers), Fault(bad_example(batch)))
        assert (outcome.saved, outcome.same) == (batch, True)


@pytest.mark.parametrize(
    ("split", "trainer", "saved"),
    [("val", {"checkpoint_every": 5}, 5), ("train", {"accumulate": 2, "checkpoint_every": 3}, 9)],
    ids=["evaluation", "half a step"],
)
def test_where_a_step_or_an_evaluation_is_half_done_the_checkpoint_before_it_counts(tmp_path, split, trainer, saved):
    """Else its evaluation would be left out, or half of it done twice."""
    fault = Fault(30 if split == "val" else bad_example(21))
    expected = whole(config_of(tmp_path / "whole", 0, **trainer), split)
    outcome = disturbed(config_of(tmp_path / "broken", 0, **trainer), expected, fault, split)
    assert f"Digits, split {split}: example {fault.index} could not be read" in outcome.error
    assert (outcome.saved, outcome.same) == (saved, True)


def test_a_run_whose_data_was_away_goes_on_where_it_was(tmp_path, undisturbed, monkeypatch):
    config = config_of(tmp_path, 0)
    looks = iter(range(STEPS))
    with noisy_data():
        assert run.execute(config, should_stop=lambda: next(looks) == 10)["status"] == "interrupted"

    def away(config):
        raise DatasetError("the folder is not there")

    with monkeypatch.context() as patch:
        patch.setattr(run, "build_task", away)
        assert run.execute(config)["error"] == "the folder is not there"
    assert saved_steps(config) == [11]
    config.sweep.retry_failed = True
    with noisy_data():
        assert run.execute(config)["status"] == "done"
    assert same_run(config, undisturbed(0))


# ---- batches


class Ragged(torch.utils.data.Dataset):
    """Examples of one size each, that do not make a batch."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.zeros(index), 0


@pytest.mark.parametrize("workers", [0, 1])
def test_examples_that_make_no_batch_are_listed(workers):
    task = Blobs()
    task.train = Ragged()
    with pytest.raises(SampleError, match=r"Blobs, split train: a batch .*examples 0, 1, 2, 3: RuntimeError: .*size"):
        next(train_batches(task, task.train, BatchOrder(8, 4, seed=0, shuffle=False), workers))
    with pytest.raises(SampleError, match="Ragged: a batch"):
        next(eval_batches(task, Ragged(), 4, None))


def test_an_error_survives_the_way_out_of_a_process():
    error = pickle.loads(pickle.dumps(SampleError("Digits, split train", 7, 1, "ValueError: no")))
    assert (error.dataset, error.index, error.worker, error.reason) == (
        "Digits, split train",
        7,
        1,
        "ValueError: no",
    )
    assert str(error) == "Digits, split train: example 7 could not be read by loader process 1: ValueError: no"


def started(workers=2):
    """Batches that loader processes read, and the processes."""
    task = Blobs()
    task.train = Noisy(task.train, lambda index: None)
    before = multiprocessing.active_children()
    batches = train_batches(task, task.train, BatchOrder(96, 4, seed=0), workers)
    return batches, [process for process in multiprocessing.active_children() if process not in before]


def test_loader_processes_leave_signals_of_the_group_to_the_main_process():
    batches, processes = started()
    next(batches)
    for process in processes:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(process.pid, number)
    assert len(list(islice(batches, 20))) == 20


def test_loader_processes_end_with_their_batches():
    batches, processes = started()
    next(batches)
    pids = [process.pid for process in processes]
    del batches
    assert all(process not in multiprocessing.active_children() for process in processes)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _start_and_wait(pipe):
    batches, processes = started()
    pipe.send([process.pid for process in processes])
    time.sleep(60)
    next(batches)


def test_loader_processes_end_with_a_main_process_that_is_killed():
    ours, theirs = multiprocessing.Pipe()
    main = multiprocessing.get_context("fork").Process(target=_start_and_wait, args=(theirs,))
    main.start()
    pids = ours.recv()
    main.kill()
    main.join()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "they wait for a main process that is no more"
        time.sleep(0.01)


def alive(pid):
    """Whether a process, not of ours, does something yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
        return state.rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
