import math
from collections import Counter

import pytest
import torch
from torch import nn

from archzoo.training.callbacks import Callback
from archzoo.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from archzoo.training.config import ConfigError
from archzoo.training.loop import Diverged, Interrupted, Trainer
from archzoo.training.optimizing import build_optimizer
from tests.training.support import Blobs, make_config


def small_model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], v) for k, v in b.items())


def train(config, model=None, callbacks=(), task=None, **hooks):
    trainer = Trainer(config, task or Blobs(), model or small_model(), callbacks, **hooks)
    trainer.fit()
    return trainer


def test_it_learns():
    trainer = train(make_config(trainer={"steps": 150, "eval_every": 30}))
    assert trainer.best["val/accuracy"] > 0.9
    assert trainer.evaluate("test")["test/accuracy"] > 0.9


def test_lines_are_recorded_at_the_steps_asked_for():
    lines = []
    train(make_config(trainer={"steps": 10, "log_every": 5, "eval_every": 4}), record=lines.append)
    assert [line["step"] for line in lines if "train/loss" in line] == [5, 10]
    assert [line["step"] for line in lines if "val/loss" in line] == [4, 8, 10]
    assert lines[0]["epoch"] == pytest.approx(4 / 6)


def test_the_first_steps_are_those_of_a_plain_loop():
    task, model, other = Blobs(), small_model(), small_model()
    config = make_config(optimizer={"name": "momentum", "lr": 0.1, "momentum": 0.0}, scheduler={"name": "none"})
    trainer = Trainer(config, task, model)
    batches = trainer._batches()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _, (x, y) in zip(range(5), batches, strict=False):
        nn.functional.cross_entropy(other(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer.total_steps = 5
    trainer.fit()
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_accumulated_batches_are_one_big_batch():
    big = make_config(trainer={"batch_size": 32, "steps": 3}, optimizer={"name": "momentum", "lr": 0.1})
    halves = make_config(
        trainer={"batch_size": 16, "steps": 3, "accumulate": 2}, optimizer={"name": "momentum", "lr": 0.1}
    )
    a, b = train(big).model, train(halves).model
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class Counting(nn.Linear):
    """Counts what the loop calls, and lets its loss and constraint be seen in the weights."""

    def __init__(self):
        super().__init__(2, 3)
        self.calls = Counter()

    def regularization_loss(self):
        self.calls["regularization"] += 1
        return 100.0 * self.weight.square().sum()

    def constrain_(self):
        self.calls["constrain"] += 1
        with torch.no_grad():
            self.bias.fill_(0.25)


def test_layers_regularize_each_forward_and_are_constrained_after_each_step():
    model = Counting()
    before = model.weight.norm().item()
    train(make_config(trainer={"steps": 6, "accumulate": 2}), model)
    assert model.calls == {"regularization": 12, "constrain": 6}
    assert model.weight.norm() < before
    assert torch.equal(model.bias, torch.full((3,), 0.25))


def test_callbacks_can_weigh_the_regularization():
    class Off(Callback):
        def before_step(self, trainer):
            trainer.regularization_factor = 0.0

    class NoLoss(Counting):
        def regularization_loss(self):
            return 0.0 * super().regularization_loss()

    torch.manual_seed(0)
    off = train(make_config(), Counting(), [Off()]).model
    torch.manual_seed(0)
    none = train(make_config(), NoLoss()).model
    assert torch.equal(off.weight, none.weight)


def test_callbacks_are_called_at_every_turn():
    calls = Counter()

    class Watch(Callback):
        def on_start(self, trainer):
            calls["start"] += 1

        def before_step(self, trainer):
            calls["before"] += 1

        def after_step(self, trainer):
            calls["after"] += 1

        def on_evaluate(self, trainer, metrics):
            metrics["val/extra"] = 1.0

        def on_end(self, trainer):
            calls["end"] += 1

    lines = []
    train(make_config(trainer={"steps": 4, "eval_every": 2}), callbacks=[Watch()], record=lines.append)
    assert calls == {"start": 1, "before": 4, "after": 4, "end": 1}
    assert [line["val/extra"] for line in lines if "val/loss" in line] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"name": "none"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"name": "cosine"}, [(1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]),
        ({"name": "step", "decay_every": 0.5, "decay_rate": 0.1}, [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]),
        ({"name": "multistep", "milestones": [0.25, 0.5], "decay_rate": 0.1}, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01]),
        ({"name": "poly", "decay_rate": 1.0}, [1 - t / 8 for t in range(8)]),
        ({"name": "none", "warmup": 0.5}, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else "",
)
def test_learning_rates_follow_the_schedule(scheduler, expected):
    lines = []
    config = make_config(trainer={"steps": 8}, scheduler=scheduler, optimizer={"lr": 0.01})
    train(config, record=lines.append)
    assert [line["lr"] / 0.01 for line in lines if "lr" in line] == pytest.approx(expected)


def test_gradients_are_clipped():
    config = make_config(optimizer={"name": "momentum", "lr": 1.0, "momentum": 0.0}, scheduler={"name": "none"})
    config.trainer.clip_grad, config.trainer.steps = 1e-3, 1
    model = small_model()
    before = weights(model)
    train(config, model)
    moved = sum((before[k] - v).square().sum() for k, v in model.state_dict().items()).sqrt()
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_the_average_of_the_weights_is_what_is_evaluated():
    trainer = train(make_config(trainer={"ema_decay": 0.9}))
    assert trainer.eval_model is not trainer.model
    first, averaged = next(trainer.model.parameters()), next(trainer.eval_model.parameters())
    assert not torch.equal(first, averaged)
    last = train(make_config(trainer={"ema_decay": 0.9, "eval_every": 12}))  # one evaluation, at the end
    assert same(last.best_weights, weights(last.eval_model))
    assert not same(last.best_weights, weights(last.model))


def test_the_best_weights_are_those_of_the_best_evaluation():
    config = make_config(trainer={"steps": 40, "eval_every": 10}, optimizer={"lr": 0.3})
    trainer = train(config)
    best = max(trainer.evaluations, key=lambda e: e["val/accuracy"])
    assert trainer.best == best
    model = small_model()
    model.load_state_dict(trainer.best_weights)
    assert trainer.evaluate("val", model) == {k: v for k, v in best.items() if k != "step"}


@pytest.mark.parametrize("precision", ["float64", "bfloat16", "float16"])
def test_other_precisions_train(precision):
    trainer = train(make_config(trainer={"precision": precision, "steps": 60, "eval_every": 20}))
    assert next(trainer.model.parameters()).dtype == (torch.float64 if precision == "float64" else torch.float32)
    assert trainer.best["val/accuracy"] > 0.8


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_loss():
    losses = []
    for compiled in (False, True):
        lines = []
        train(make_config(trainer={"compile": compiled, "steps": 20}), record=lines.append)
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_budget_in_seconds_ends_in_time():
    trainer = train(make_config(trainer={"steps": None, "seconds": 0.3, "eval_every": 10_000}))
    assert trainer.step > 10
    assert 0.3 <= trainer.elapsed() < 2.0


def test_overfitting_a_batch_evaluates_on_it():
    trainer = train(make_config(trainer={"steps": 200, "overfit_batches": 1, "eval_every": 100}))
    assert trainer.evaluate("val") == {k.replace("test", "val"): v for k, v in trainer.evaluate("test").items()}
    assert trainer.best["val/accuracy"] == 1.0


# ---- divergence


def diverges(model, **changes):
    with pytest.raises(Diverged) as error:
        train(make_config(**changes), model)
    return error.value.divergence


def test_a_bad_output_is_traced_to_the_first_module():
    class Bad(nn.Module):
        def forward(self, x):
            return x / 0.0

    found = diverges(nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.ReLU(), Bad()), nn.Linear(4, 3)))
    assert (found.step, found.module, found.what) == (1, "1.1", "output")


def test_a_bad_gradient_is_traced_to_the_first_module_it_reached():
    class Root(nn.Module):
        """0 forward, and a gradient of 0 * inf: NaN."""

        def forward(self, x):
            return x + (0.0 * x).abs().sqrt()

    model = nn.Sequential(nn.Linear(2, 4), Root(), nn.Linear(4, 4), nn.Linear(4, 3))
    before = weights(model)
    found = diverges(model, trainer={"steps": 6, "accumulate": 2, "max_bad_steps": 3})
    assert (found.step, found.batch, found.module, found.what) == (1, 2, "0", "gradient")
    assert same(weights(model), before)


def test_a_parameter_that_is_not_finite_is_said_to_be_one():
    model = small_model(0.0)
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    found = diverges(model)
    assert (found.step, found.module, found.what) == (1, "0", "weight")


class Injecting(Callback):
    """Makes a loss, a gradient, an input or a parameter NaN at some steps."""

    def __init__(self, where, steps):
        self.where, self.steps = where, steps

    def on_start(self, trainer):
        parameter = next(trainer.model.parameters())
        whole = trainer.task.training_loss

        def training_loss(model, inputs, targets):
            if trainer.step not in self.steps:
                return whole(model, inputs, targets)
            if self.where == "input":
                inputs = inputs * math.nan
                trainer.inputs = inputs
            if self.where == "parameter":
                with torch.no_grad():
                    parameter.fill_(math.nan)
            loss = whole(model, inputs, targets)
            return loss * math.nan if self.where == "loss" else loss

        trainer.task.training_loss = training_loss
        parameter.register_hook(
            lambda grad: grad * math.nan if self.where == "gradient" and trainer.step in self.steps else grad
        )


@pytest.mark.parametrize("where", ["loss", "gradient", "input"])
@pytest.mark.parametrize("trainer", [{}, {"clip_grad": 1.0}, {"precision": "float64", "ema_decay": 0.9}], ids=str)
def test_a_step_that_is_not_finite_is_left_out_and_counted(where, trainer):
    config = make_config(trainer={"steps": 30, **trainer})
    bad = [0, 3, 4, 5, 17, 29]
    with_bad = train(config, small_model(0.0), [Injecting(where, bad)])
    assert with_bad.bad.count == len(bad)
    assert with_bad.step == 30
    assert all(torch.isfinite(w).all() for w in weights(with_bad.model).values())
    assert all(torch.isfinite(s["exp_avg"]).all() for s in with_bad.optimizer.state.values())
    steps = {int(s["step"]) for s in with_bad.optimizer.state.values()}
    assert steps == {30 - len(bad)}


@pytest.mark.parametrize("where", ["loss", "gradient", "input", "parameter"])
def test_so_many_of_them_in_a_row_end_the_run_and_none_is_saved(where):
    saved, trainers = [], []
    config = make_config(trainer={"steps": 30, "max_bad_steps": 4, "checkpoint_every": 1, "eval_every": 30})
    trainer = Trainer(config, Blobs(), small_model(0.0), [Injecting(where, range(7, 40))], save=trainers.append)
    trainer.save = lambda t: saved.append((t.step, all(torch.isfinite(p).all() for p in t.model.parameters())))
    with pytest.raises(Diverged) as error:
        trainer.fit()
    assert trainer.step == 11
    assert error.value.divergence.step == 8
    assert saved == [(step, True) for step in range(1, 8)]


def test_the_gradients_are_not_looked_at_where_that_is_asked():
    config = make_config(trainer={"steps": 6, "max_bad_steps": 0, "log_every": 1})
    with pytest.raises(Diverged) as error:
        train(config, small_model(0.0), [Injecting("gradient", [1])])
    assert (error.value.divergence.step, error.value.divergence.what) == (3, "weight")


def test_the_best_evaluation_is_never_one_of_a_metric_that_is_not_finite():
    trainer = Trainer(make_config(), Blobs(), small_model(0.0))
    values = iter([math.nan, 0.5, math.inf, 0.7, math.nan])
    trainer.evaluate = lambda split: {f"{split}/accuracy": next(values)}
    found = []
    for _ in range(5):
        trainer._evaluate()
        found.append(trainer.best and trainer.best["val/accuracy"])
    assert found == [None, 0.5, 0.5, 0.7, 0.7]


def test_a_bad_input_is_said_to_be_one():
    task = Blobs()
    task.train.inputs[:] = math.nan
    with pytest.raises(Diverged, match="input"):
        train(make_config(), task=task)


# ---- going on after an interruption


class Remembering(Callback):
    """A callback with a state that changes the weights."""

    def __init__(self):
        self.seen = 0

    def after_step(self, trainer):
        self.seen += 1
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(1 - 1e-3 * self.seen)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize(
    "trainer",
    [{}, {"ema_decay": 0.9}, {"accumulate": 2}, {"workers": 1}, {"precision": "bfloat16"}, {"clip_grad": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, trainer, stop_at):
    config = make_config(trainer=trainer)
    lines = []
    whole = train(config, small_model(0.3), [Remembering()], record=lines.append)

    def save(t):
        save_checkpoint(tmp_path, t.step, *t.state(), keep=9)

    first_lines = []
    first = Trainer(config, Blobs(), small_model(0.3), [Remembering()], record=first_lines.append, save=save)
    first.should_stop = lambda: first.step == stop_at
    with pytest.raises(Interrupted):
        first.fit()
    torch.manual_seed(12345)
    rest = []
    second = Trainer(config, Blobs(), small_model(0.3), [Remembering()], record=rest.append)
    tensors, state = load_checkpoint(tmp_path / f"step_{stop_at:08d}")
    second.load_state(tensors, state)
    second.fit()
    assert same(weights(second.model), weights(whole.model))
    assert same(second.best_weights, whole.best_weights)
    assert second.evaluations == whole.evaluations

    def untimed(recorded):
        return [{k: v for k, v in line.items() if k not in ("time_s", "train_s")} for line in recorded]

    assert untimed(first_lines + rest) == untimed(lines)


class Slow(Callback):
    """A step takes a second and an evaluation ten more, by a clock of its own."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def after_step(self, trainer):
        self.now += 1

    def on_evaluate(self, trainer, metrics):
        self.now += 10


def test_seconds_of_training_leave_out_evaluations_and_checkpoints_also_after_a_resume(tmp_path, monkeypatch):
    slow = Slow()
    monkeypatch.setattr("archzoo.training.loop.time", slow)
    config = make_config(tmp_path)

    def save(trainer):
        save_checkpoint(tmp_path, trainer.step, *trainer.state(), keep=9)
        slow.now += 100

    lines = []
    first = Trainer(config, Blobs(), small_model(), [slow], record=lines.append, save=save)
    first.should_stop = lambda: first.step == 6
    with pytest.raises(Interrupted):
        first.fit()
    second = Trainer(config, Blobs(), small_model(), [slow], record=lines.append, save=save)
    second.load_state(*load_checkpoint(tmp_path / "step_00000006"))
    second.fit()
    assert {line["step"] for line in lines} == set(range(1, 13))
    assert all(line["train_s"] == line["step"] for line in lines)
    assert lines[-1]["time_s"] == 12 + 3 * 10 + 2 * 100  # the save at the stop and at the end come after what is told


def test_a_checkpoint_of_another_setting_is_refused(tmp_path):
    first = Trainer(make_config(), Blobs(), small_model())
    tensors, state = first.state()
    state["step"] = 0
    with pytest.raises(CheckpointError, match="moving average"):
        Trainer(make_config(trainer={"ema_decay": 0.9}), Blobs(), small_model()).load_state(tensors, state)
    with pytest.raises(CheckpointError, match="callbacks"):
        Trainer(make_config(), Blobs(), small_model(), [Callback()]).load_state(tensors, state)


def test_an_unknown_optimizer_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="optimizer.name=adamwx: .* did you mean .*'adamw'"):
        Trainer(make_config(optimizer={"name": "adamwx"}), Blobs(), small_model())


def test_an_optimizers_unknown_option_is_named():
    with pytest.raises(ConfigError, match="bettas"):
        Trainer(make_config(optimizer={"options": {"bettas": [0.9, 0.9]}}), Blobs(), small_model())


def test_a_stream_has_no_epochs():
    class Stream(Blobs):
        stream = True

    with pytest.raises(ValueError, match="has no epochs; set trainer.epochs=null trainer.steps="):
        Trainer(make_config(trainer={"steps": None, "epochs": 3}), Stream(), small_model())


def test_what_a_layer_exempts_is_not_decayed():
    class Exempt(nn.Module):
        def __init__(self):
            super().__init__()
            self.rates, self.weight, self.bias = (nn.Parameter(torch.ones(size)) for size in [(2, 2), (2, 2), (2,)])

        def no_weight_decay(self):
            return {"rates"}

    model = nn.Sequential(nn.Linear(2, 2), Exempt())
    config = make_config(optimizer={"name": "adamw", "weight_decay": 0.1}).optimizer
    decays = {
        id(p): group["weight_decay"] for group in build_optimizer(config, model).param_groups for p in group["params"]
    }
    found = {name: decays[id(p)] for name, p in model.named_parameters()}
    assert found == {"0.weight": 0.1, "0.bias": 0.0, "1.rates": 0.0, "1.weight": 0.1, "1.bias": 0.0}
    assert not hasattr(model, "no_weight_decay")
