"""Several processes: the same training as in one, resumed at any number of them, and the same model in all."""

import hashlib
import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import archzoo
from archzoo.training import distributed
from archzoo.training.build import build_model, build_task, check_model
from archzoo.training.config import ConfigError, process_errors
from archzoo.training.loop import Trainer
from archzoo.training.run import execute, load_model, make_callbacks
from tests.training.processes import together
from tests.training.support import Blobs, lines_without_time, make_config

COUNTS = [2, pytest.param(4, marks=pytest.mark.slow)]
NO_DROPOUT = {"model": {"name": "mlp", "width": 8, "depth": 2}}


def trained(config):
    """Trains in this process's group; returns what was logged, every rank's hash of its model, and its best weights."""
    torch.manual_seed(config.seed)
    task, made = build_task(config), make_callbacks(config)
    lines = []
    trainer = Trainer(config, task, build_model(config, task, made)[0], made, record=lines.append)
    trainer.fit()
    test, _, weights = trainer.test()
    own = trainer.model.state_dict().values()
    held = b"".join(t.numpy().tobytes() for t in own) if not trainer.sharded else b""
    timeless = [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]
    return {"lines": timeless, "test": test, "hash": hashlib.sha256(held).hexdigest(), "weights": weights}


def largest_difference(ours, theirs):
    """Of everything that was logged and of the test metrics, relative to its size."""
    assert len(ours["lines"]) == len(theirs["lines"])
    pairs = [*zip(ours["lines"], theirs["lines"], strict=True), (ours["test"], theirs["test"])]
    values = [(a[key], b[key]) for a, b in pairs for key in a]
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in values)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_loss_is_that_of_one_process_at_the_same_global_batch(count, strategy):
    # 18 examples in 4 parts are 5, 5, 4 and 4: their means do not count the same.
    trainer = {"steps": 6, "batch_size": 18, "accumulate": 2, "clip_grad": 0.5, "eval_every": 2, "eval_batch_size": 50}
    config = make_config(trainer=trainer | {"strategy": strategy}, **NO_DROPOUT)
    alone = trained(make_config(trainer=trainer, **NO_DROPOUT))
    ranks = together(count, trained, config)
    assert largest_difference(ranks[0], alone) <= 1e-6
    assert [line["step"] for line in ranks[0]["lines"]] == [line["step"] for line in alone["lines"]]
    for rank in ranks[1:]:
        assert rank["lines"] == ranks[0]["lines"]
        assert rank["test"] == ranks[0]["test"]
        assert rank["hash"] == ranks[0]["hash"]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-5, atol=1e-6)


CHANGING = {
    "grid_update": ({"name": "kan", "grid_size": 3}, {"grid_update": {"every": 2, "until": 0.9}}),
    "grid_refine": ({"name": "kan", "grid_size": 3}, {"grid_refine": {"sizes": [5], "at": [0.5]}}),
    "selection": ({"name": "selectable_kan"}, {"selection_stages": {"select": 0.3, "prune": 0.6}}),
    "constraint": ({"name": "nau"}, {}),
    "average": ({"name": "linear"}, {}),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("change", CHANGING)
def test_what_changes_in_training_stays_the_same_in_all_processes(change, count):
    layer, callbacks = CHANGING[change]
    config = make_config(
        layer=layer,
        callbacks=callbacks,
        trainer={
            "steps": 6,
            "precision": "float64",  # least-squares fits of grids would make much of the last bit
            "ema_decay": 0.9 if change == "average" else None,
        },
        **NO_DROPOUT,
    )
    ranks = together(count, trained, config)
    assert len({rank["hash"] for rank in ranks}) == 1
    assert largest_difference(ranks[0], trained(config)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "task"),
    [
        ({"name": "linear_flow", "width": 8, "depth": 2, "time_dim": 8}, {"name": "flow_matching", "eval_size": 50}),
        ({"name": "projector", "width": 8, "depth": 2}, {"name": "idempotent"}),
        ({"name": "kan", "hidden": [3]}, {"name": "poisson"}),
    ],
    ids=lambda part: part["name"],
)
def test_what_asks_more_of_a_model_than_its_output_is_trained_by_several(model, task, tmp_path):
    layer = {"name": {"kan": "kan", "projector": "conv2d"}.get(model["name"], "linear")}
    config = make_config(model=model, task=task, layer=layer, trainer={"steps": 2})
    ranks = together(2, trained, config)
    assert ranks[1]["lines"] == ranks[0]["lines"]
    sharded = make_config(model=model, task=task, layer=layer, trainer={"steps": 2, "strategy": "fsdp"})
    with pytest.raises(ConfigError, match="trainer.strategy=fsdp"):  # before anything is written
        check_model(sharded, build_task(sharded), None, [])
    for record in together(2, execute, replace(sharded, output_dir=str(tmp_path))):
        assert record["status"] == "failed"
        assert "trainer.strategy=fsdp" in record["error"]


def test_a_layer_that_is_constrained_is_so_where_it_is_sharded():
    config = make_config(layer={"name": "nau"}, trainer={"steps": 3, "strategy": "fsdp"}, optimizer={"lr": 2.0})
    weights = together(2, trained, config)[0]["weights"]
    matrices = [w for name, w in weights.items() if name.startswith("hidden.") and w.ndim == 2]
    assert max(w.abs().max() for w in matrices) == 1.0  # NAU clamps to [-1, 1], and steps of 2 went beyond


# ---- interruption


def run_until(config, step):
    """Executes a run, which is asked to stop once it is at a step."""
    count = itertools.count(1)
    return execute(config, should_stop=lambda: step is not None and next(count) >= step)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", COUNTS)
def test_a_run_resumed_by_as_many_processes_ends_with_the_same_bits(tmp_path, count, strategy):
    trainer = {"strategy": strategy, "steps": 8}
    whole, cut = (make_config(tmp_path / name, trainer=trainer) for name in ("whole", "cut"))
    assert together(count, execute, whole)[0]["status"] == "done"
    stopped = together(count, run_until, cut, 3)
    assert [record["status"] for record in stopped] == ["interrupted"] * count
    record = together(count, execute, cut)[0]
    assert record["status"] == "done"
    assert record["processes"] == count
    folders = [tmp_path / name / record["run_id"] for name in ("whole", "cut")]
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
    lines = [lines_without_time(folder / "metrics.jsonl") for folder in folders]
    assert lines[0] == lines[1]
    assert len({line["step"] for line in lines[0]}) == 8


@pytest.mark.parametrize(
    ("before", "after", "strategy"),
    [
        (2, 1, "ddp"),
        (1, 2, "ddp"),
        pytest.param(2, 4, "ddp", marks=pytest.mark.slow),
        pytest.param(4, 2, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after, strategy):
    whole, cut = (
        make_config(tmp_path / name, trainer={"strategy": own, "steps": 8}, **NO_DROPOUT)
        for name, own in (("whole", "ddp"), ("cut", strategy))
    )
    execute(whole)
    for count, step in ((before, 3), (after, None)):
        record = run_until(cut, step) if count == 1 else together(count, run_until, cut, step)[0]
    folders = [tmp_path / name / record["run_id"] for name in ("whole", "cut")]
    lines = [lines_without_time(folder / "metrics.jsonl") for folder in folders]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for ours, theirs in zip(*lines, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert f"trained by {before} and is by {after} now" in (folders[1] / "log.txt").read_text()
    load_model(folders[1])


# ---- errors


class Failing(Blobs):
    """Rank 1 fails at its third batch."""

    def training_loss(self, model, inputs, targets):
        self.seen = getattr(self, "seen", 0) + 1
        if distributed.rank() == 1 and self.seen == 3:
            raise OverflowError("the disk is on fire")
        return super().training_loss(model, inputs, targets)


def execute_failing(config):
    from archzoo.training import run

    run.build_task = lambda config: Failing()
    return execute(config)


def test_the_error_of_one_process_is_that_of_the_run_and_ends_all(tmp_path):
    config = make_config(tmp_path, task={"name": "digits"})
    reasons = together(2, execute_failing, config)
    assert "the disk is on fire" in reasons[0]
    assert "the disk is on fire" in reasons[1]
    record = json.loads(next(tmp_path.glob("*/run.json")).read_text())
    assert record["status"] == "failed"
    assert "rank 1" in record["error"]
    assert "the disk is on fire" in record["error"]


def execute_two(first, second):
    return [execute(first)["status"], execute(second)["status"]]


def test_an_error_of_all_processes_is_of_that_run_alone(tmp_path):
    broken = make_config(tmp_path, optimizer={"name": "adamw", "options": {"betas": 3}})
    sound = make_config(tmp_path, trainer={"steps": 2})
    for statuses in together(2, execute_two, broken, sound):
        assert statuses == ["failed", "done"]


def die_after_a_checkpoint(config):
    def look():
        saved = list(Path(config.output_dir).glob("*/checkpoints/step_00000004"))
        return bool(saved) and distributed.rank() == 1 and os.kill(os.getpid(), signal.SIGKILL)

    return execute(config, should_stop=look)


def test_a_run_of_which_a_process_was_killed_goes_on_from_its_checkpoint(tmp_path):
    config = make_config(tmp_path / "cut")
    reasons = together(2, die_after_a_checkpoint, config)
    assert "has died" in reasons[0]
    folder = next((tmp_path / "cut").glob("*"))
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000004"]
    together(2, execute, config)
    together(2, execute, whole := make_config(tmp_path / "whole"))
    ours, theirs = (lines_without_time(tmp_path / p / folder.name / "metrics.jsonl") for p in ("cut", "whole"))
    assert ours == theirs
    assert whole.trainer.steps == ours[-1]["step"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trainer": {"batch_size": 3}}, "trainer.batch_size=3"),
        ({"trainer": {"strategy": "fsdp", "ema_decay": 0.9}}, "trainer.ema_decay=0.9"),
        ({"trainer": {"strategy": "fsdp", "precision": "float16"}}, "trainer.precision=float16"),
        ({"trainer": {"strategy": "fsdp"}, "optimizer": {"name": "lbfgs"}}, "optimizer.name=lbfgs"),
        ({"trainer": {"strategy": "fsdp"}, "callbacks": {"grid_update": {}}}, "callbacks.grid_update"),
        ({"trainer": {"strategy": "fsdp"}, "task": {"name": "arithmetic", "seeds": 2}}, "task.seeds=2"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_by_name(changes, named):
    (error,) = process_errors(make_config(**changes), 4)
    assert error.startswith(named)


def test_a_model_cannot_be_sharded_over_a_single_process():
    (error,) = process_errors(make_config(trainer={"strategy": "fsdp"}), 0)
    assert error.startswith("trainer.strategy=fsdp")
    assert "torchrun --nproc-per-node=2" in error


# ---- parts


def put_together(sizes):
    batch = torch.arange(sum(sizes) * 2.0).reshape(-1, 2)
    part = batch[distributed.rank() :: distributed.world_size()]
    return torch.equal(distributed.whole_batch(part), batch)


@pytest.mark.parametrize("examples", [2, 3, 8])
def test_parts_of_a_batch_are_put_together_in_its_order(examples):
    assert together(2, put_together, [examples]) == [True, True]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.regularized = archzoo.create_layer("kan", 4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.regularized(self.blocks[1](self.blocks[0](x))))


def shards():
    model = Blocks()
    distributed.shard(model, torch.device("cpu"))
    own = {name: p.to_local().numel() / p.numel() for name, p in model.named_parameters()}
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    with distributed.whole_parameters([model.head]):
        model.head.weight.data.mul_(2)
    doubled = torch.equal(model.head.weight.full_tensor(), 2 * before["head.weight"])
    same = torch.equal(model.blocks[0].weight.full_tensor(), before["blocks.0.weight"])
    return own, [type(block).__name__ for block in model.blocks], doubled, same


def test_a_sharded_model_has_a_part_of_every_parameter_in_each_process():
    for own, blocks, doubled, same in together(2, shards):
        assert set(own.values()) == {0.5}
        assert blocks == ["FSDPLinear", "FSDPLinear"]
        assert doubled
        assert same
