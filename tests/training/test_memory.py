"""Memory that does not suffice, batches as large as it allows, and blocks that are computed again."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from archzoo.training import memory, run
from archzoo.training.blocks import recompute, repeated_blocks
from archzoo.training.build import build_model, build_task
from archzoo.training.checkpoint import list_checkpoints
from archzoo.training.config import ConfigError, validate
from archzoo.training.loop import Trainer
from archzoo.training.run import execute
from tests.training.processes import together
from tests.training.support import Blobs, lines_without_time, make_config


class Greedy(Blobs):
    """Wants more memory than there is."""

    def training_loss(self, model, inputs, targets):
        if len(inputs) > 8:
            raise self.error
        return super().training_loss(model, inputs, targets)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_run_without_enough_memory_says_what_may_help_and_the_next_goes_on(tmp_path, monkeypatch, error):
    monkeypatch.setattr(Greedy, "error", error, raising=False)
    monkeypatch.setattr(run, "build_task", lambda config: Greedy())
    config = make_config(tmp_path, trainer={"batch_size": 16, "steps": 2})
    monkeypatch.setattr(run, "cost_record", lambda *_: {"parameters": 0, "flops": 0, "bytes_per_step": 0})
    record = execute(config)
    assert record["status"] == "failed"
    assert record["error"].startswith("out of memory at trainer.batch_size=16 on cpu, with a peak of ")
    assert "trainer.batch_size=8 trainer.accumulate=2" in record["error"]
    assert "trainer.checkpoint_activations=true" in record["error"]
    assert json.loads((tmp_path / record["run_id"] / "run.json").read_text())["error"] == record["error"]
    assert execute(make_config(tmp_path, trainer={"batch_size": 8, "steps": 2}))["status"] == "done"


def test_a_real_allocation_that_is_too_large_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**62, dtype=torch.uint8)
    assert memory.is_out_of_memory(error.value)
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    ("each", "limit", "examples", "expected"),
    [
        (2**20, 2**30, 10**6, 512),  # 1 GiB less 100 MiB, at a MiB an example
        (2**30, 2**32, 10**6, 2),
        (2**31, 2**31, 10**6, 0),
        (1000, 2**30, 500, 500),
        (2**20, 2**40, 700, 700),
    ],
)
def test_the_batch_is_the_largest_power_of_two_that_should_fit(each, limit, examples, expected):
    sizes = []

    def step(size):
        sizes.append(size)
        return 100 * 2**20 + each * size

    assert memory.largest_that_should_fit(step, examples, limit) == expected
    assert max(sizes) * each <= max(2 * each, 256 * 2**20)


def test_a_gpu_is_asked_until_it_refuses():
    assert memory._largest_that_runs(lambda size: None if size > 37 else size, 1000) == 32
    assert memory._largest_that_runs(lambda size: size, 100) == 100
    assert memory._largest_that_runs(lambda size: None, 100) == 0


def test_a_batch_size_that_is_found_out_is_recorded_and_kept_by_a_run_that_goes_on(tmp_path, monkeypatch):
    config = make_config(tmp_path, trainer={"batch_size": "auto", "steps": 6, "eval_every": 2})
    validate(config)
    steps = iter(range(100))
    assert execute(config, should_stop=lambda: next(steps) == 2)["batch_size"] == 1197  # all of digits
    monkeypatch.setattr(memory, "free_memory", lambda: 0)  # with so little, it would be another
    record = execute(config)
    assert (record["status"], record["batch_size"]) == ("done", 1197)
    assert record["config"]["trainer"]["batch_size"] == "auto"
    assert list_checkpoints(tmp_path / record["run_id"] / "checkpoints")
    assert [line["step"] for line in lines_without_time(tmp_path / record["run_id"] / "metrics.jsonl")][-1] == 6


def test_a_system_that_has_no_memory_for_one_example_is_told(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: -(2**40))
    config = make_config(trainer={"batch_size": "auto"})
    task = build_task(config)
    model, _ = build_model(config, task)
    with pytest.raises(ConfigError, match="not even one example"):
        memory.resolve_batch_size(config, task, model, torch.device("cpu"))


def test_measuring_a_step_leaves_model_and_random_numbers_as_they_were():
    config = make_config(trainer={"batch_size": "auto", "precision": "bfloat16"})
    task = build_task(config)
    model, _ = build_model(config, task)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    memory.resolve_batch_size(config, task, model, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [True, 1.5, "large", None, 0])
def test_a_batch_size_is_a_number_or_auto(value):
    with pytest.raises(ConfigError, match="trainer.batch_size="):
        validate(make_config(trainer={"batch_size": value}))


class Deep(nn.Module):
    """Counts how often a block is computed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()) for _ in range(3)])
        self.last = nn.Linear(4, 3)
        self.count = 0
        self.blocks[1].register_forward_hook(lambda *_: setattr(self, "count", self.count + 1))
        self.blocks[1][0].register_forward_hook(lambda *_: setattr(self, "count", self.count + 1))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def trained(again):
    torch.manual_seed(0)
    model = Deep()
    config = make_config(trainer={"steps": 3, "checkpoint_activations": again, "ema_decay": 0.9})
    trainer = Trainer(config, Blobs(), model)
    trainer.fit()
    return model, trainer.eval_model.state_dict()


def test_blocks_that_are_computed_again_change_no_bit():
    plain, plain_average = trained(False)
    again, average = trained(True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in plain.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in plain_average.items())
    assert again.count > plain.count


def test_the_copy_of_a_model_computes_its_own_blocks_again():
    model = Deep()
    recompute(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0][0].weight.fill_(math.nan)
    assert torch.isnan(other(torch.ones(1, 2))).all()
    assert torch.isfinite(model(torch.ones(1, 2))).all()
    assert len(list(repeated_blocks(model))) == 3


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"trainer.checkpoint_activations=true: Linear has no list of blocks"):
        Trainer(make_config(trainer={"checkpoint_activations": True}), Blobs(), nn.Linear(2, 3))


def test_processes_find_out_one_batch_size_for_all(tmp_path):
    config = make_config(tmp_path, trainer={"batch_size": "auto", "steps": 2, "eval_every": 1})
    records = together(2, execute, config)
    assert [record["status"] for record in records] == ["done", "done"]
    assert records[0]["batch_size"] == 1196  # two parts of 598, of the 1197 digits
    assert records[0]["processes"] == 2
