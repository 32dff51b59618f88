"""Row "corrupted checkpoint" of the reliability table: refused by name, never loaded in silence, an older one used."""

import shutil

import pytest

from archzoo.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from archzoo.training.run import execute
from archzoo.training.run_folder import read_record
from tests.faults.damage import damage, sign
from tests.faults.signals import only_run
from tests.faults.support import COMMAND, command, outcome, run_folder, small_config


@pytest.mark.parametrize("trials", [84, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_corrupted_checkpoint_is_never_loaded_in_silence(tmp_path, trials):
    counts, wrong = damage(tmp_path, trials)
    assert wrong == []
    assert counts["refused"] > 0.9 * trials


@pytest.fixture
def stopped(tmp_path):
    """A run that was stopped after its twelfth step, with checkpoints of steps 10 and 12."""
    looks = iter(range(100))
    config = small_config(tmp_path / "out", steps=14)
    execute(config, should_stop=lambda: next(looks) == 11)
    run = run_folder(tmp_path / "out", steps=14)
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step_00000012", "step_00000010"]
    return config, run


def test_a_corrupted_newest_checkpoint_is_passed_over_and_that_is_said(stopped, tmp_path):
    config, run = stopped
    assert execute(small_config(tmp_path / "whole", steps=14))["status"] == "done"
    damaged = list_checkpoints(run / "checkpoints")[0]
    with (damaged / "training.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"x")
    said = []
    progress = type("Heard", (), {"__getattr__": lambda self, name: lambda *args: said.append((name, *args))})()
    assert execute(config, progress=progress)["status"] == "done"
    (line,) = [args[0] for name, *args in said if name == "warn"]
    assert line == (
        f"this checkpoint is not used: {damaged}/training.safetensors: its SHA-256 is not the manifest's; the file is "
        "damaged; going on from step_00000010"
    )
    assert line in (run / "log.txt").read_text()
    assert outcome(run) == outcome(run_folder(tmp_path / "whole", steps=14))


def test_a_run_whose_checkpoints_are_all_corrupted_is_not_begun_again_in_silence(stopped):
    config, run = stopped
    for path in list_checkpoints(run / "checkpoints"):
        (path / "state.json").write_bytes(b"{}")
    record = execute(config)
    assert record["status"] == "failed"
    assert f"{run}/checkpoints/step_00000012/state.json: 2 bytes, and " in record["error"]
    assert "sweep.retry_failed=true trains the run again from its start" in record["checkpoint_error"]
    assert len(list_checkpoints(run / "checkpoints")) == 2, "they are left to be looked at"
    config.sweep.retry_failed = True
    assert execute(config)["status"] == "done"


def test_a_damaged_checkpoint_of_a_later_step_does_not_crowd_out_a_sound_one(stopped):
    config, run = stopped
    (run / "checkpoints" / "step_00000012" / "state.json").unlink()
    config.trainer.keep_checkpoints, config.trainer.checkpoint_every = 1, 1
    looks = iter(range(100))
    assert execute(config, should_stop=lambda: next(looks) == 0)["status"] == "interrupted"
    (left,) = list_checkpoints(run / "checkpoints")
    assert left.name == "step_00000011"
    load_checkpoint(left)


def test_metrics_that_a_checkpoint_counts_on_and_are_gone_are_missed(stopped):
    config, run = stopped
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:11]))
    assert execute(config)["status"] == "done"
    log = (run / "log.txt").read_text()
    assert "step_00000012: counts on" in log
    assert "resumed from step_00000010" in log


def test_the_exit_code_tells_of_checkpoints(tmp_path, capsys):
    arguments = [*COMMAND, f"output_dir={tmp_path}", "trainer.steps=6", "trainer.checkpoint_every=2"]
    assert command(*arguments) == 0
    run = only_run(tmp_path)
    (run / "run.json").write_text((run / "run.json").read_text().replace('"status": "done"', '"status": "running"'))
    for path in list_checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
        path.mkdir()
    capsys.readouterr()
    assert command(*arguments) == 4
    error = capsys.readouterr().err
    assert f"error: linear-seed0: {run}/checkpoints/step_00000006/manifest.json: cannot be read (No such file" in error
    assert "Traceback" not in error
    assert read_record(run)["status"] == "failed"


def test_a_manifest_that_a_stranger_made_is_bounded(tmp_path, stopped):
    _, run = stopped
    path = list_checkpoints(run / "checkpoints")[0]
    (path / "state.json").write_bytes(b"[" * 200_000)
    sign(path)
    with pytest.raises(CheckpointError, match="cannot be parsed"):
        load_checkpoint(path)
    (path / "manifest.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(CheckpointError, match="at most 1048576 were written"):
        load_checkpoint(path)
