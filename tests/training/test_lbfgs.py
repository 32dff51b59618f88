"""L-BFGS in the training loop: one batch a step, evaluated as often as the line search asks for."""

import math
import re

import pytest
import torch
from torch import nn

import archzoo
from archzoo.tasks.functions import Functions
from archzoo.training import cli
from archzoo.training.callbacks import Callback, GridUpdate
from archzoo.training.checkpoint import load_checkpoint, save_checkpoint
from archzoo.training.config import ConfigError
from archzoo.training.loop import Diverged, Interrupted, Trainer
from archzoo.training.optimizing import build_optimizer
from tests.training.support import Blobs, make_config

OPTIONS = {"max_iter": 4, "history_size": 3}


def config(**changes):
    optimizer = {"name": "lbfgs", "lr": 1.0, "options": OPTIONS} | changes.pop("optimizer", {})
    trainer = {"steps": 6, "batch_size": 1000} | changes.pop("trainer", {})
    return make_config(optimizer=optimizer, scheduler={"name": "none"}, trainer=trainer, **changes)


class Decayed(nn.Linear):
    def regularization_loss(self):
        return 0.01 * self.weight.square().sum()


def small_model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(Decayed(2, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_its_steps_are_those_of_a_plain_loop_on_the_whole_objective():
    task, model, other = Blobs(), small_model(), small_model()
    lines = []
    Trainer(config(), task, model, record=lines.append).fit()
    optimizer = torch.optim.LBFGS(other.parameters(), lr=1.0, line_search_fn="strong_wolfe", **OPTIONS)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(other(task.train.inputs), task.train.targets)
        loss = loss + other[0].regularization_loss()
        loss.backward()
        return loss

    for _ in range(6):
        losses.append(optimizer.step(closure).item())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert [line["train/loss"] for line in lines if "train/loss" in line] == losses
    assert losses == sorted(losses, reverse=True)


def test_the_batch_and_the_dropout_masks_are_the_same_within_a_step_and_others_in_the_next():
    model, seen = small_model(0.5), []
    model[2].register_forward_hook(lambda module, args, output: seen.append((step[0], output == 0)))
    step = [0]

    class Count(Callback):
        def before_step(self, trainer):
            step[0] = trainer.step

    Trainer(config(trainer={"steps": 3, "batch_size": 32, "eval_every": 100}), Blobs(), model, [Count()]).fit()
    masks = [[mask for s, mask in seen if s == k and len(mask) == 32] for k in range(3)]
    assert all(len(of_a_step) > 1 for of_a_step in masks)
    assert all(torch.equal(mask, of_a_step[0]) for of_a_step in masks for mask in of_a_step)
    assert not torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[1][0], masks[2][0])


@pytest.mark.parametrize(
    "trainer",
    [{}, {"ema_decay": 0.9}, {"batch_size": 16}, {"precision": "float64"}, {"precision": "bfloat16"}],
    ids=str,
)
@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, trainer, stop_at):
    settings = config(trainer=trainer)
    whole = Trainer(settings, Blobs(), small_model(0.3))
    whole.fit()
    first = Trainer(
        settings, Blobs(), small_model(0.3), save=lambda t: save_checkpoint(tmp_path, t.step, *t.state(), keep=9)
    )
    first.should_stop = lambda: first.step == stop_at
    with pytest.raises(Interrupted):
        first.fit()
    torch.manual_seed(12345)
    second = Trainer(settings, Blobs(), small_model(0.3))
    second.load_state(*load_checkpoint(tmp_path / f"step_{stop_at:08d}"))
    second.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert second.evaluations == whole.evaluations


def test_a_kan_is_fitted_better_than_by_as_many_evaluations_of_adam():
    def fitted(**changes):
        torch.manual_seed(0)
        model = nn.Sequential(archzoo.create_layer("kan", 2, 3), archzoo.create_layer("kan", 3, 1))
        trainer = Trainer(config(**changes), Functions(function="xy", train_size=200, test_size=100), model)
        trainer.fit()
        return trainer.best["val/rmse"]

    searched = fitted(trainer={"steps": 5, "precision": "float64"}, optimizer={"options": {"max_iter": 20}})
    stepped = fitted(
        trainer={"steps": 125, "precision": "float64"}, optimizer={"name": "adam", "lr": 1e-2, "options": {}}
    )
    assert searched < stepped


def test_a_loss_that_is_not_finite_stops_the_run_where_it_began():
    task = Blobs()
    task.train.inputs[3] = math.nan
    model = small_model()
    before = weights(model)
    with pytest.raises(Diverged, match="at step 1, batch 1; first not finite: the input"):
        Trainer(config(trainer={"steps": 6, "max_bad_steps": 1}), task, model).fit()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_grid_update_drops_its_whole_memory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), archzoo.create_layer("kan", 4, 3))
    trainer = Trainer(config(), Blobs(), model)
    batches = trainer._batches()
    trainer._train_step(batches)
    assert trainer.optimizer.state
    GridUpdate(every=1, until=1.0).after_step(trainer)
    assert not trainer.optimizer.state
    trainer._train_step(batches)
    memory = trainer.optimizer.state[model[0].weight]
    assert memory["n_iter"] <= 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"weight_decay": 0.1}}, "optimizer.weight_decay=0.1"),
        ({"trainer": {"clip_grad": 0.5}}, "trainer.clip_grad=0.5"),
        ({"trainer": {"accumulate": 2}}, "trainer.accumulate=2"),
        ({"trainer": {"precision": "float16"}}, "trainer.precision=float16"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_trained(changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        Trainer(config(**changes), Blobs(), small_model())


def test_the_command_line_refuses_it_too(tmp_path, capsys):
    assert cli.main(["optimizer=lbfgs", "trainer.clip_grad=1", f"output_dir={tmp_path}/out"]) == 2
    assert "set trainer.clip_grad=null" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_iter": 0}, "optimizer.options.max_iter=0: must be a whole number, 1 or more"),
        ({"history_size": 2.5}, "optimizer.options.history_size=2.5"),
        ({"max_eval": "many"}, "optimizer.options.max_eval=many"),
        ({"tolerance_grad": -1.0}, "optimizer.options.tolerance_grad=-1.0: must be 0 or more"),
        ({"tolerance_change": math.nan}, "optimizer.options.tolerance_change=nan"),
        ({"line_search_fn": "wolfe"}, "optimizer.options.line_search_fn=wolfe: must be strong_wolfe, or null"),
        ({"betas": [0.9, 0.99]}, "betas"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        build_optimizer(config(optimizer={"options": options}).optimizer, small_model())


def test_the_line_search_can_be_left_out():
    options = {"line_search_fn": None, "max_eval": None, "max_iter": 2}
    optimizer = build_optimizer(config(optimizer={"options": options, "lr": 0.1}).optimizer, small_model())
    assert (optimizer.defaults["line_search_fn"], optimizer.defaults["lr"]) == (None, 0.1)
