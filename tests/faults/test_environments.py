"""Row "clock, locale, full stdout, closed terminal, no HOME, …" of the reliability table: works, or one clear error."""

import errno
import fcntl
import os
import signal
import sys
import time

import pytest

from archzoo.training import cli
from archzoo.training.run import execute
from archzoo.training.run_folder import RunFolder, _locks
from archzoo.training.writing import guarded_streams
from tests.faults.signals import only_run
from tests.faults.support import COMMAND, command, finish, outcome, run_folder, small_config, start, train, wait_for
from tests.faults.surroundings import PLACES, trouble


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder that holds the weights of an undisturbed run."""
    folder = tmp_path_factory.mktemp("places")
    assert trouble("plain", folder) == ""
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLACES if name != "plain"])
def test_a_run_works_in_any_surroundings_or_says_why_not(name, root):
    assert trouble(name, root) == ""


SHORT = [*COMMAND, "trainer.steps=4"]


def test_a_full_stdout_and_a_folder_with_spaces_accents_and_signs(tmp_path):
    folder = tmp_path / "a é=b, {c} [d]"
    folder.mkdir()
    process = start(command, *SHORT, f"output_dir='{folder}/out'", folder=folder, stdout="/dev/full", umask=0o077)
    assert finish(process) == 0
    error = (folder / "stderr").read_text()
    assert error.count("cannot be written ([Errno 28] No space left on device); the run folder has it all") == 1
    assert "Traceback" not in error
    assert (only_run(folder / "out") / "model.safetensors").stat().st_mode & 0o077 == 0


def test_no_standard_stream_at_all(tmp_path):
    assert finish(start(command, *SHORT, f"output_dir={tmp_path}/out", folder=tmp_path, stdout="", stderr="")) == 0
    run = only_run(tmp_path / "out")
    assert (run / "lock").read_bytes() == b"", "what is printed does not end up in the file that was opened next"
    assert (run / "metrics.jsonl").read_text().startswith('{"step": 1, ')


@pytest.mark.slow
def test_a_second_command_in_the_same_folder_is_told_who_has_it_and_harms_nothing(tmp_path):
    arguments = [*COMMAND, f"output_dir={tmp_path}/out"]
    (tmp_path / "second").mkdir()
    first = start(command, *arguments, "trainer.steps=2000", folder=tmp_path)
    assert wait_for(lambda: any((tmp_path / "out").glob("*/metrics.jsonl")), first)
    second = start(command, *arguments, "trainer.steps=2000", folder=tmp_path / "second")
    assert finish(second) == 1
    assert f"process {first.pid} is writing this run" in (tmp_path / "second" / "stderr").read_text()
    os.kill(first.pid, signal.SIGTERM)
    assert finish(first) == 143


def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    train(tmp_path / "whole", steps=12)
    looks = iter(range(100))
    config = small_config(tmp_path / "out", steps=12)
    execute(config, should_stop=lambda: next(looks) == 6)
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() - 10_000_000.0)
        patch.setenv("TZ", "ABC-14:45")
        assert execute(config)["status"] == "done"
    assert outcome(run_folder(tmp_path / "out", steps=12)) == outcome(run_folder(tmp_path / "whole", steps=12))


def test_a_file_system_without_locks_is_said_and_not_taken_for_another_writer(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    config = small_config(tmp_path, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        record = execute(config)
    lock = run_folder(tmp_path, steps=2) / "lock"
    assert (record["status"], record["error"]) == ("locked", f"{lock}: cannot be locked (No locks available)")
    assert execute(config)["status"] == "done"


def test_a_process_that_a_killed_run_leaves_behind_does_not_keep_its_lock(tmp_path):
    config, folder = small_config(tmp_path), RunFolder(tmp_path, small_config(tmp_path))
    with folder:
        left = start(signal.pause, folder=tmp_path)  # as a loader's worker
        assert wait_for(lambda: (tmp_path / "stderr").exists(), left)
        lock = folder._lock
        os.close(lock)  # as the end of a process that is killed does, and no more
        _locks.discard(lock)
        folder._lock = None
    with RunFolder(tmp_path, config):
        assert left.exitcode is None
    left.kill()
    finish(left)


def test_streams_are_as_they_were_afterwards():
    before = sys.stdout, sys.stderr
    with guarded_streams():
        with guarded_streams():
            print("once")
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


def test_an_argument_that_is_no_text_is_refused(capsys):
    assert cli.main(["output_dir=a\udce9b"]) == 2
    assert "error: 'output_dir=a\\udce9b': not text in this locale's encoding" in capsys.readouterr().err
