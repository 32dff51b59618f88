"""Row "version skew" of the reliability table: old formats load, unknown ones are refused with what would read them."""

import json
import shutil

import pytest
import torch

from archzoo._version import __version__
from archzoo.training.build import build_model, build_task
from archzoo.training.checkpoint import list_checkpoints, load_checkpoint
from archzoo.training.config import ConfigError, asdict_plain, run_id
from archzoo.training.loop import Trainer
from archzoo.training.run import execute, load_model
from archzoo.training.saving import take_up
from tests.faults.damage import sign
from tests.faults.versions import GOLDEN, config_of


@pytest.fixture(params=sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def golden(request, tmp_path):
    """A copy of a run that an archzoo of this format has left behind, and its configuration."""
    shutil.copytree(request.param, tmp_path / "out")
    (run,) = (tmp_path / "out").iterdir()
    return run, config_of(run, tmp_path / "out")


def test_a_run_of_an_older_archzoo_goes_on(golden):
    run, config = golden
    assert run_id(asdict_plain(config)) == run.name, "settings that are new are not part of the identity of old runs"
    (path,) = list_checkpoints(run / "checkpoints")
    tensors, state = load_checkpoint(path)
    trainer = Trainer(config, task := build_task(config), build_model(config, task)[0])
    take_up(trainer, path, tensors, state, run.name)
    again, _ = trainer.state()
    assert again.keys() == tensors.keys()
    for file, named in tensors.items():
        assert named.keys() == again[file].keys()
        assert all(torch.equal(t, again[file][name]) for name, t in named.items())
    assert trainer.step == 4
    assert execute(config)["status"] == "done"
    assert f"resumed from {path.name}" in (run / "log.txt").read_text()
    load_model(run)


def test_what_a_checkpoint_was_written_with_is_in_it(golden):
    run, config = golden
    assert execute(config)["status"] == "done"
    path = list_checkpoints(run / "checkpoints")[0]
    _, state = load_checkpoint(path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["archzoo"] == state["versions"]["archzoo"] == __version__
    assert state["versions"]["torch"] == torch.__version__
    assert state["config"] == json.loads((run / "run.json").read_text())["config"]
    assert {"python", "torch"} < state["versions"].keys()
    assert {"git", "threads", "device", "run_id"} < state.keys()


def test_a_format_of_the_future_is_refused_and_left(golden):
    run, config = golden
    (path,) = list_checkpoints(run / "checkpoints")
    older = path.with_name("step_00000002")
    shutil.copytree(path, older)
    manifest = json.loads((path / "manifest.json").read_text()) | {"format": 99, "archzoo": "9.1"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    record = execute(config)
    assert record["status"] == "failed"
    assert record["error"] == (
        f"{path}: format 99, written by archzoo 9.1; archzoo {__version__} reads format 1: go on with the version that "
        "wrote it"
    )
    assert list_checkpoints(run / "checkpoints") == [path, older]


def test_another_torch_is_said(golden):
    run, config = golden
    (path,) = list_checkpoints(run / "checkpoints")
    state = json.loads((path / "state.json").read_text())
    state["versions"]["torch"], state["threads"] = "1.0", 7
    (path / "state.json").write_text(json.dumps(state))
    sign(path)
    assert execute(config)["status"] == "done"
    log = (run / "log.txt").read_text()
    assert f"torch was 1.0 and is {torch.__version__}: the run may end with other bits" in log
    assert "threads was 7 and is 1" in log


def test_a_run_with_settings_of_the_future_is_not_guessed_at(golden):
    run, config = golden
    execute(config)
    record = json.loads((run / "run.json").read_text())
    record["config"]["trainer"]["warp"] = 9
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"trainer.warp: there is no such key"):
        load_model(run)
