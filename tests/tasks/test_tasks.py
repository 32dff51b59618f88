"""What every task owes: options that its config lists, splits that do not overlap, sound batches, metrics, purity."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

from archzoo.tasks.task import Task, tasks

CONFIGS = Path(__file__).parents[2] / "configs" / "task"
DATA = os.environ.get("ARCHZOO_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="ARCHZOO_DATA names no data folder")
BUILDS: list[Any] = [
    ("digits", {}),
    ("tabular", {"dataset": "wine"}),
    ("tabular", {"dataset": "breast_cancer"}),
    ("tabular", {"dataset": "diabetes"}),
    ("functions", {"train_size": 100, "test_size": 50, "noise": 0.1}),
    ("arithmetic", {"eval_size": 200}),
    ("autoencoding", {"dataset": "digits"}),
    ("poisson", {"n_interior": 100, "n_boundary": 20, "eval_side": 10}),
    pytest.param("mnist", {"train_size": 100}, marks=needs_data),
    pytest.param("super_resolution", {"dataset": "fashion_mnist", "patch": None, "train_size": 100}, marks=needs_data),
    pytest.param("fashion_mnist", {"train_size": 100}, marks=[needs_data, pytest.mark.slow]),
]
every_build = pytest.mark.parametrize(("name", "options"), BUILDS)


def rows(split: Any, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    return split.__getitems__(list(range(min(count, len(split)))))


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(rows(a), rows(b), strict=True))


def test_registry_holds_the_tasks_and_config_group_the_same():
    assert tasks.names() == [
        "arithmetic",
        "associative_recall",
        "autoencoding",
        "char_lm",
        "chess_moves",
        "cifar10",
        "digits",
        "fashion_mnist",
        "flow_matching",
        "functions",
        "idempotent",
        "induction_heads",
        "mnist",
        "mnist_arithmetic",
        "multi_mnist",
        "poisson",
        "selective_copying",
        "style_transfer",
        "super_resolution",
        "tabular",
        "text",
    ]
    assert tasks.names() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", tasks.names())
def test_config_lists_every_option_with_its_default_and_a_comment(name):
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    options = {
        key: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for key, parameter in inspect.signature(tasks.get(name)).parameters.items()
        if key not in ("data_dir", "seed")
    }
    assert config == {"name": name} | options
    assert {key: type(value) for key, value in config.items() if key != "name"} == {
        k: type(v) for k, v in options.items()
    }
    assert all(
        "  # " in line for line in text.splitlines() if ":" in line.split("#")[0] and not line.startswith("name")
    )


@every_build
def test_model_of_the_tasks_shape_trains_and_is_scored(name, options):
    task: Task = tasks.create(name, **options)
    inputs, targets = rows(task.train, 32)
    assert inputs.dtype == torch.float32
    assert inputs.shape == (len(targets), *task.input_shape)
    assert torch.isfinite(inputs).all()
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), task.output_size))
    loss = task.loss(model(inputs), targets)
    assert loss.shape == ()
    loss.backward()
    assert task.mode in ("max", "min")
    for split in task.watched:
        metrics = task.metrics()
        inputs, targets = rows(getattr(task, split))
        metrics.update(model(inputs[:20]), targets[:20])
        metrics.update(model(inputs[20:]), targets[20:])
        values = metrics.compute()
        assert torch.isfinite(torch.stack([value.float() for value in values.values()])).all()
        key = "mse" if name == "arithmetic" else "loss"
        torch.testing.assert_close(values[key].float(), task.loss(model(inputs), targets), rtol=1e-5, atol=1e-6)
        assert task.score in values


@every_build
def test_splits_do_not_overlap(name, options):
    task = tasks.create(name, **options)
    train = task.train if not task.stream else tasks.create("functions").train  # a stream has no end
    parts = [{row.tobytes() for row in rows(split, 10**5)[0].numpy()} for split in (task.val, task.test, train)]
    for i, first in enumerate(parts):
        for second in parts[i + 1 :]:
            # Two images of MNIST may be alike by themselves; not so in the small sets.
            assert len(first & second) <= (5 if "mnist" in name else 0)


@every_build
def test_seed_of_the_run_changes_no_split(name, options):
    first, again, other = (tasks.create(name, seed=seed, **options) for seed in (0, 0, 1))
    assert same(first.train, again.train)
    for split in ("train", "val", "test"):
        assert same(getattr(first, split), getattr(again, split))
    if not first.stream:
        assert all(same(getattr(first, split), getattr(other, split)) for split in ("train", "val", "test"))


@every_build
def test_building_leaves_the_global_generators_alone(name, options):
    import numpy as np

    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1]
    rows(tasks.create(name, **options).train)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize(("name", "options"), [("digits", {}), ("functions", {}), ("arithmetic", {"eval_size": 10})])
def test_loader_with_workers_gives_what_the_split_gives(name, options):
    task = tasks.create(name, **options)
    batches = [list(range(start, start + 300)) for start in range(0, 900, 300)]
    loader = DataLoader(task.train, batch_sampler=batches, num_workers=2, collate_fn=task.collate)
    for indices, (inputs, targets) in zip(batches, loader, strict=True):
        expected = task.train.__getitems__(indices)
        assert torch.equal(inputs, expected[0])
        assert torch.equal(targets, expected[1])
        single = task.train[indices[7]]
        assert torch.equal(single[0], inputs[7])
        assert torch.equal(single[1], targets[7])


def test_looking_a_task_up_imports_nothing_heavy():
    code = (
        "import sys, archzoo.tasks.task as t; t.tasks.names(); "
        "print([m for m in ('sklearn', 'scipy', 'torchmetrics', 'torchvision', 'PIL', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_misspelt_task_or_option_is_named():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        tasks.create("digit")
    with pytest.raises(TypeError, match=r"val_sise=3.*'val_size'"):
        tasks.create("mnist", val_sise=3)
