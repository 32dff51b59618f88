"""Row "disk full, read-only folder, quota" of the reliability table: said, survived, and nothing before is lost."""

import errno
import json
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

import pytest

from archzoo.report import write
from archzoo.training import checkpoint, cli, saving
from archzoo.training.checkpoint import list_checkpoints
from archzoo.training.config import ConfigError, validate
from archzoo.training.run import execute
from archzoo.training.writing import Lines
from tests.faults.full_disks import fill_disks
from tests.faults.signals import only_run
from tests.faults.support import COMMAND, command, finish, outcome, run_folder, small_config, start


@pytest.fixture
def open_folder():
    """A folder that any user can come to."""
    folder = Path(tempfile.mkdtemp(prefix="archzoo-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_no_checkpoint_is_lost_by_a_full_disk(open_folder):
    counts = fill_disks(open_folder, 12)
    assert counts["trials"] == 12
    assert (counts["lost"], counts["silent"], counts["tracebacks"]) == (0, 0, 0)


def full_between(monkeypatch, first, last):
    """Lets the writes of these checkpoints fail, by their number."""
    count = iter(range(1, 1000))
    write = saving.save_checkpoint

    def save(*arguments):
        if first <= next(count) <= last:
            monkeypatch.setattr(checkpoint, "write_file", lambda *a: _raise(errno.ENOSPC))
        try:
            return write(*arguments)
        finally:
            monkeypatch.setattr(checkpoint, "write_file", write_file)

    write_file = checkpoint.write_file
    monkeypatch.setattr(saving, "save_checkpoint", save)


def _raise(number):
    raise OSError(number, os.strerror(number))


def test_two_checkpoints_that_a_full_disk_takes_do_not_stop_a_run_and_are_told_at_its_end(
    tmp_path, monkeypatch, capsys
):
    full_between(monkeypatch, 2, 3)
    arguments = [*COMMAND, f"output_dir={tmp_path}", "trainer.steps=10", "trainer.checkpoint_every=2"]
    assert command(*arguments) == 4
    captured = capsys.readouterr()
    run = only_run(tmp_path)
    assert "1 done" in captured.out
    assert captured.err.count("training goes on") == 2
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: linear-seed0: {run}/checkpoints: no checkpoint at step 6 (No space left on device")
    needed, free = map(int, re.search(r"it needs (\d+) bytes, (\d+) are free", error).groups())
    assert 5000 < needed < free
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step_00000010", "step_00000008"]
    assert command(*arguments) == 0, "the run is done, and has been told of"


@pytest.mark.parametrize(("on_error", "last"), [("warn", 12), ("stop", 8)])
def test_a_disk_that_stays_full_stops_the_run_which_goes_on_when_there_is_room(tmp_path, monkeypatch, on_error, last):
    whole = small_config(tmp_path / "whole", steps=16, checkpoint_every=2)
    execute(whole)
    config = small_config(tmp_path / "out", steps=16, checkpoint_every=2, on_save_error=on_error)
    with monkeypatch.context() as patch:
        full_between(patch, 4, 1000)
        record = execute(config)
    run = run_folder(tmp_path / "out", steps=16, checkpoint_every=2)
    assert record["status"] == "interrupted"
    assert f"no checkpoint at step {last} (No space left" in record["error"]
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step_00000006", "step_00000004"]
    assert execute(config)["status"] == "done"
    assert outcome(run) == outcome(run_folder(tmp_path / "whole", steps=16, checkpoint_every=2))


def test_what_is_read_back_otherwise_than_written_is_no_checkpoint(tmp_path, monkeypatch):
    kept = checkpoint.save_checkpoint(tmp_path, 1, {}, {}, keep=1)
    write = checkpoint.write_file
    monkeypatch.setattr(checkpoint, "write_file", lambda path, *parts: write(path, b"".join(parts)[:-1] + b"!"))
    with pytest.raises(OSError, match="what was written is not what is read"):
        checkpoint.save_checkpoint(tmp_path, 2, {}, {}, keep=1)
    assert list(tmp_path.iterdir()) == [kept]


def test_lines_that_a_full_disk_refuses_wait_and_none_is_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"n": 0}\n{"torn')
    lines = Lines(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (32, hard))
        for n in range(1, 6):
            lines.write({"n": n})
        with pytest.raises(OSError, match="File too large"):
            lines.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b'{"n": 0}\n{"n": 1}\n{"n": 2}\n'
    assert lines.sync() == 6 * 9
    lines.close()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == list(range(6))


def test_a_report_that_a_full_disk_refuses_is_told_with_the_command_that_writes_it(tmp_path, monkeypatch, capsys):
    fast = ["task=digits", "trainer.steps=1", "trainer.epochs=null", "tracker=none"]
    arguments = ["layer=linear", "seed=0,1", f"output_dir={tmp_path}", *fast]
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_atomically", lambda *a: _raise(errno.ENOSPC))
        assert cli.main(arguments) == cli.EXIT_FAILED
    said = capsys.readouterr()
    assert (
        f"the report cannot be written (No space left on device); with room there: archzoo report {tmp_path}"
        in said.err
    )
    assert "Traceback" not in said.err
    assert "2 done" in said.out
    assert cli.main(arguments) == 0
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_log_on_a_full_disk_is_left_out_and_said_once(tmp_path, capfd):
    config = small_config(tmp_path, steps=4, checkpoint_every=2)
    run = run_folder(tmp_path, steps=4, checkpoint_every=2)
    run.mkdir()
    (run / "log.txt").symlink_to("/dev/full")
    assert execute(config, should_stop=iter([False, False, True]).__next__)["status"] == "interrupted"
    assert execute(config)["status"] == "done"  # which logs that it resumes
    error = capfd.readouterr().err
    assert error.count("log.txt: cannot be written ([Errno 28] No space left on device)") == 1
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_built(open_folder):
    (open_folder / "closed").mkdir(mode=0o555)
    open_folder.chmod(0o777)
    user = {"user": 65534} if os.geteuid() == 0 else {}
    process = start(command, *COMMAND, f"output_dir={open_folder}/closed/out", folder=open_folder, **user)
    assert finish(process) == 2
    assert (open_folder / "stderr").read_text() == (
        f"error: output_dir={open_folder}/closed/out: cannot be written (Permission denied); give a folder that can, "
        "as output_dir=outputs/mine\n"
    )


def test_an_unknown_choice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer.on_save_error=ignore: must be one of warn, stop"):
        validate(small_config(tmp_path, on_save_error="ignore"))
