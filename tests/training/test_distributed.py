"""Several processes: the same training as in one, resumed at any number of them, and the same model in all."""

import copy
import hashlib
import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import archzoo
from archzoo.training import distributed, spreading
from archzoo.training.build import build_model, build_task
from archzoo.training.callbacks import Callback
from archzoo.training.config import process_errors
from archzoo.training.loop import Diverged, Trainer
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
    trainer["ema_decay"] = 0.9
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


# Least-squares fits of grids would make much of the last bit of a float32.
EXACT = {"steps": 6, "eval_every": 2, "precision": "float64", "ema_decay": 0.9}
KAN = {"name": "kan", "grid_size": 3}
CHANGING = {
    "grid_update": {"layer": {"name": "kan", "grid_size": 3}, "callbacks": {"grid_update": {"every": 2, "until": 0.9}}},
    "grid_refine": {
        "layer": {"name": "kan", "grid_size": 3},
        "callbacks": {"grid_refine": {"sizes": [5], "at": [0.5]}},
    },
    "selection": {
        "layer": {"name": "selectable_kan"},
        "callbacks": {"selection_stages": {"select": 0.3, "prune": 0.6}},
    },
    "constraint": {"layer": {"name": "nau"}},
}
FLOW = {
    "model": {"name": "linear_flow", "width": 8, "depth": 2, "time_dim": 8},
    "task": {"name": "flow_matching", "eval_size": 50},
}
PROJECTOR = {
    "model": {"name": "projector", "width": 8, "depth": 2},
    "task": {"name": "idempotent"},
    "layer": {"name": "conv2d"},
}
POISSON = {
    "model": {"name": "kan", "hidden": [3]},
    "task": {"name": "poisson", "n_interior": 96, "n_boundary": 32, "eval_side": 12},
    "layer": {"name": "kan"},
    "callbacks": {"grid_update": {"every": 2, "until": 0.9}},
}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("change", CHANGING)
def test_what_changes_in_training_stays_the_same_in_all_processes(change, count, strategy):
    changes = NO_DROPOUT | CHANGING[change]
    ranks = together(count, trained, make_config(trainer=EXACT | {"strategy": strategy}, **changes))
    assert len({rank["hash"] for rank in ranks}) == 1
    alone = trained(make_config(trainer=EXACT, **changes))
    assert largest_difference(ranks[0], alone) <= 1e-6
    for name, value in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [FLOW, PROJECTOR, POISSON], ids=lambda part: part["model"]["name"])
def test_what_asks_more_of_a_model_than_its_output_is_trained_by_several(changes):
    trainer = {"steps": 4, "eval_every": 2, "ema_decay": 0.9, "clip_grad": 1.0, "accumulate": 2}
    ranks = together(2, trained, make_config(trainer=trainer, **changes))
    assert ranks[1]["lines"] == ranks[0]["lines"]
    assert ranks[1]["hash"] == ranks[0]["hash"]
    sharded = together(2, trained, make_config(trainer=trainer | {"strategy": "fsdp"}, **changes))
    assert largest_difference(sharded[0], ranks[0]) <= 1e-6
    if changes is not FLOW:  # of which each process draws its own part's noise
        assert largest_difference(sharded[0], trained(make_config(trainer=trainer, **changes))) <= 1e-6


@pytest.mark.slow
def test_float16_is_trained_by_shards_as_by_copies():
    trainer = {"steps": 8, "precision": "float16", "ema_decay": 0.9}
    copies, shards = (
        together(2, trained, make_config(trainer=trainer | {"strategy": strategy}, **NO_DROPOUT))
        for strategy in ("ddp", "fsdp")
    )
    assert largest_difference(shards[0], copies[0]) <= 1e-6
    assert shards[0]["lines"] == shards[1]["lines"]


def overflow_in_a_part():
    model, scaler = nn.Linear(2, 4), torch.amp.GradScaler("cpu", init_scale=4.0)
    spreading.shard(model, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.to_local().clone()
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    if distributed.rank() == 1:
        model.weight.grad.to_local().fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(model.weight.to_local(), before), scaler.get_scale()


@pytest.mark.slow
def test_a_gradient_that_overflows_in_one_process_leaves_out_the_step_in_all():
    assert together(2, overflow_in_a_part) == [(True, 2.0)] * 2


def test_a_layer_that_is_constrained_is_so_where_it_is_sharded():
    config = make_config(layer={"name": "nau"}, trainer={"steps": 3, "strategy": "fsdp"}, optimizer={"lr": 2.0})
    weights = together(2, trained, config)[0]["weights"]
    matrices = [w for name, w in weights.items() if name.startswith("hidden.") and w.ndim == 2]
    assert max(w.abs().max() for w in matrices) == 1.0  # NAU clamps to [-1, 1], and steps of 2 went beyond


class Poisoning(Callback):
    """Rank 1's part of a weight is not finite from the third step on."""

    def before_step(self, trainer):
        if trainer.step == 2 and trainer.rank == 1:
            trainer.model.hidden[0].weight.data.to_local().fill_(torch.nan)


def poisoned(config):
    task = build_task(config)
    with pytest.raises(Diverged) as raised:
        Trainer(config, task, build_model(config, task)[0], [Poisoning()]).fit()
    return str(raised.value)


@pytest.mark.slow
def test_all_processes_blame_the_module_of_which_one_has_a_part_that_is_not_finite():
    config = make_config(trainer={"steps": 8, "strategy": "fsdp", "max_bad_steps": 2}, **NO_DROPOUT)
    first, second = together(2, poisoned, config)
    assert first == second
    assert first.endswith("step 3, batch 3; first not finite: the weight of hidden.0")


# ---- interruption


def run_until(config, step):
    """Executes a run, which rank 0 is asked to stop once it is at a step: the others look while they wait, too."""
    count = itertools.count(1)
    return execute(config, should_stop=lambda: step is not None and distributed.rank() == 0 and next(count) >= step)


def run_whole_and_cut(whole, cut, step):
    return [execute(whole)["status"], run_until(cut, step)["status"], execute(cut)]


RESUMED = {
    "ddp": {},
    "fsdp": {"trainer": {"strategy": "fsdp", "steps": 8, "ema_decay": 0.9}},
    "float16": {"trainer": {"strategy": "fsdp", "steps": 8, "precision": "float16"}},
    **{change: {"trainer": EXACT | {"strategy": "fsdp"}, **CHANGING[change]} for change in CHANGING},
    **{c["task"]["name"]: {"trainer": EXACT | {"strategy": "fsdp"}, **c} for c in (FLOW, PROJECTOR, POISSON)},
}


@pytest.mark.parametrize(
    "kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in RESUMED if kind != "ddp")]
)
@pytest.mark.parametrize("count", COUNTS)
def test_a_run_resumed_by_as_many_processes_ends_with_the_same_bits(tmp_path, count, kind):
    changes = {"trainer": {"steps": 8}, "tracker": {"pictures": False}} | RESUMED[kind]
    whole, cut = (make_config(tmp_path / name, **copy.deepcopy(changes)) for name in ("whole", "cut"))
    ranks = together(count, run_whole_and_cut, whole, cut, step := 5 if kind in CHANGING else 3)
    assert [rank[:2] for rank in ranks] == [["done", "interrupted"]] * count
    record = ranks[0][2]
    assert record["status"] == "done", record["error"]
    assert record["processes"] == count
    folders = [tmp_path / name / record["run_id"] for name in ("whole", "cut")]
    assert f"resumed from step_{step:08d}" in (folders[1] / "log.txt").read_text()
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
    lines = [lines_without_time(folder / "metrics.jsonl") for folder in folders]
    assert lines[0] == lines[1]
    assert len({line["step"] for line in lines[0]}) == whole.trainer.steps
    load_model(folders[1])


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
        make_config(tmp_path / name, trainer={"strategy": own, "steps": 8, "ema_decay": 0.9}, **NO_DROPOUT)
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
        ({"trainer": {"strategy": "fsdp"}, "optimizer": {"name": "lbfgs"}}, "optimizer.name=lbfgs"),
        ({"trainer": {"strategy": "fsdp"}, "callbacks": {"symbolic_regression": {}}}, "callbacks.symbolic"),
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
    spreading.shard(model, torch.device("cpu"))
    own = {name: p.to_local().numel() / p.numel() for name, p in model.named_parameters()}
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    with spreading.whole_parameters([model.head]):
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
