import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from archzoo.training.build import build_model, build_task
from archzoo.training.checkpoint import list_checkpoints
from archzoo.training.config import asdict_plain, run_id
from archzoo.training.loop import Trainer
from archzoo.training.run import execute
from archzoo.training.run_folder import RunFolder, read_record
from archzoo.training.trackers import flat_summary
from tests.helpers import sampled
from tests.training.support import lines_without_time, make_config


def folder_of(config):
    return Path(config.output_dir) / run_id(asdict_plain(config))


def test_a_run_leaves_a_whole_record(tmp_path):
    config = make_config(tmp_path, budget={"match": "params", "to": 700, "tolerance": 0.05})
    record = execute(config)
    folder = folder_of(config)
    assert record == read_record(folder)
    assert record["status"] == "done"
    assert record["score"]["value"] == record["summary"]["test"]["accuracy"]
    assert record["budget"]["within_tolerance"]
    assert record["budget"]["reached"] == record["parameters"]
    assert record["flops"] > 2 * 64 * record["budget"]["widths"][0]
    assert record["memory"]["saved_for_backward_bytes"] > 16 * 64 * 4
    assert record["timing"]["step_time_p50_s"] > 0
    lines = lines_without_time(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "val/accuracy" in line] == [4, 8, 12]
    assert {p.name for p in folder.iterdir()} == {
        *("config.yaml", "run.json", "metrics.jsonl", "checkpoints", "model.safetensors", "log.txt", "lock")
    }


def test_the_saved_weights_are_those_that_were_scored(tmp_path):
    config = make_config(tmp_path)
    record = execute(config)
    task = build_task(config)
    model, _ = build_model(config, task)
    model.load_state_dict(load_file(folder_of(config) / "model.safetensors"))
    assert Trainer(config, task, model).evaluate("test")["test/accuracy"] == record["score"]["value"]


def test_a_run_that_is_done_is_not_trained_again(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    first = execute(config)
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trained again"))
    assert execute(config) == first


def test_a_run_that_is_done_is_told_what_is_tuned_now(tmp_path, monkeypatch):
    first = execute(make_config(tmp_path))
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trained again"))
    config = make_config(tmp_path, sweep={"tune": ["optimizer.lr"], "baseline": "kan"})
    record = execute(config)
    assert record == read_record(folder_of(config))
    assert [record["config"]["sweep"].pop(key) for key in ("tune", "baseline")] == [["optimizer.lr"], "kan"]
    assert [first["config"]["sweep"].pop(key) for key in ("tune", "baseline")] == [[], None]
    assert record == first


@pytest.mark.parametrize("stop_at", [0, 3, 10])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(tmp_path, stop_at):
    whole = make_config(tmp_path / "whole", trainer={"ema_decay": 0.9})
    execute(whole)
    parts = make_config(tmp_path / "parts", trainer={"ema_decay": 0.9})
    looks = iter(range(1000))
    assert execute(parts, should_stop=lambda: next(looks) == stop_at)["status"] == "interrupted"
    assert execute(parts)["status"] == "done"
    for name in ("metrics.jsonl",):
        assert lines_without_time(folder_of(parts) / name) == lines_without_time(folder_of(whole) / name)
    a, b = (load_file(folder_of(config) / "model.safetensors") for config in (parts, whole))
    assert all(torch.equal(a[key], b[key]) for key in b)
    assert "resumed from step" in (folder_of(parts) / "log.txt").read_text()


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path):
    whole, parts = make_config(tmp_path / "whole"), make_config(tmp_path / "parts")
    execute(whole)
    looks = iter(range(1000))
    execute(parts, should_stop=lambda: next(looks) == 9)
    newest = list_checkpoints(folder_of(parts) / "checkpoints")[0]
    (newest / "training.safetensors").write_bytes(b"x")
    execute(parts)
    log = (folder_of(parts) / "log.txt").read_text()
    assert "this checkpoint is not used" in log
    assert "resumed from step_00000008" in log
    assert lines_without_time(folder_of(parts) / "metrics.jsonl") == lines_without_time(
        folder_of(whole) / "metrics.jsonl"
    )


def test_a_run_that_diverges_says_where(tmp_path):
    config = make_config(tmp_path, optimizer={"lr": 1e30, "name": "sgd"}, model={"name": "mlp", "norm": "none"})
    record = execute(config)
    assert record["status"] == "diverged"
    assert record["diverged"]["step"] >= 2
    assert record["diverged"]["module"].startswith(("hidden.", "head"))
    assert record["error"].startswith("the loss became")
    assert execute(config) == record, "it is not trained again"
    assert not (folder_of(config) / "model.safetensors").exists()


def test_a_run_that_fails_is_recorded_and_retried_only_on_request(tmp_path, monkeypatch):
    def broken(self, batches):
        raise RuntimeError("the roof fell in\nand the walls")

    config = make_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", broken)
        record = execute(config)
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: the roof fell in\nand the walls")
    assert "Traceback" in (folder_of(config) / "log.txt").read_text()
    assert execute(config)["status"] == "failed"
    config.sweep.retry_failed = True
    assert execute(config)["status"] == "done"


def test_two_processes_do_not_write_one_run(tmp_path):
    config = make_config(tmp_path)
    with RunFolder(tmp_path, config):
        record = execute(config)
    assert record["status"] == "locked"
    assert str(os.getpid()) in record["error"]
    assert execute(config)["status"] == "done"


def test_training_leaves_the_process_as_it_was(tmp_path):
    threads = torch.get_num_threads()
    execute(make_config(tmp_path, trainer={"threads": threads + 1, "deterministic": True}))
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_runs_have_the_same_bits(tmp_path):
    a, b = (make_config(tmp_path / name, trainer={"deterministic": True}) for name in "ab")
    execute(a), execute(b)
    first, second = (load_file(folder_of(config) / "model.safetensors") for config in (a, b))
    assert all(torch.equal(first[key], second[key]) for key in first)


def inspect(run_folder, *options):
    """What W&B's own reader finds in an offline run."""
    (offline,) = (run_folder / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(offline)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("interrupted", sampled([False, True], [True]))
def test_the_wandb_mirror_equals_the_record(tmp_path, interrupted):
    config = make_config(tmp_path, tracker={"wandb": "offline"})
    if interrupted:
        looks = iter(range(1000))
        assert execute(config, should_stop=lambda: next(looks) == 6)["status"] == "interrupted"
    record = execute(config)
    folder = folder_of(config)
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    history = [without_wandbs_own(r["history"]["item"]) for r in records if r.get("type") == "history"]
    merged: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        merged.setdefault(line["step"], {}).update(line)
    assert history == [merged[step] for step in sorted(merged)]
    run = json.loads(inspect(folder, "--summary"))
    latest: dict[str, float] = {}
    for line in history:
        latest.update(line)
    assert without_wandbs_own(run["summary"]) == latest | flat_summary(record)
    assert (run["run_id"], run["name"], run["exit_code"]) == (record["run_id"], record["name"], 0)
    for key in ("seed", "task", "layer", "model", "trainer"):
        assert run["config"][key] == record["config"][key]


def without_wandbs_own(item):
    return {k: v for k, v in item.items() if not k.startswith("_")}


def test_the_tensorboard_mirror_equals_the_record(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tmp_path, tracker={"tensorboard": True})
    execute(config)
    events = EventAccumulator(str(folder_of(config) / "tensorboard"))
    events.Reload()
    lines = lines_without_time(folder_of(config) / "metrics.jsonl")
    for key in ("train/loss", "val/accuracy"):
        expected = [(line["step"], line[key]) for line in lines if key in line]
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
