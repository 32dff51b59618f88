"""A model whose parameters are replaced while it is trained: optimizer, average, best weights, checkpoints, record."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import archzoo
from archzoo.budget import count_parameters
from archzoo.training.build import build_task
from archzoo.training.callbacks import Callback, GridRefine, GridUpdate, SelectionStages
from archzoo.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from archzoo.training.config import asdict_plain, run_id
from archzoo.training.loop import Interrupted, Trainer
from archzoo.training.run import execute, load_model
from tests.helpers import sampled
from tests.training.support import Blobs, lines_without_time, make_config


class Choosing(nn.Module):
    """Two candidates, of which one stays: the stages of a selectable layer, and how it loads what was saved in them."""

    def __init__(self):
        super().__init__()
        self.candidates = nn.ModuleDict({"plain": nn.Linear(2, 3), "kan": archzoo.create_layer("kan", 2, 3)})
        self.logits = nn.Parameter(torch.zeros(2))
        self.register_buffer("selected", torch.tensor(-1))

    def select_(self):
        self.selected.fill_(1)
        self.logits.requires_grad_(False)

    def prune_(self):
        if self.selected < 0:
            raise ValueError("stage: nothing is selected")
        del self.candidates["plain"]

    def forward(self, x):
        outputs = {name: layer(x) for name, layer in self.candidates.items()}
        if self.selected >= 0:
            return outputs["kan"]
        w = self.logits.softmax(0)
        return w[0] * outputs["plain"] + w[1] * outputs["kan"]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if state_dict[prefix + "selected"] >= 0:
            self.select_()
            if "plain" in self.candidates and not any(k.startswith(f"{prefix}candidates.plain.") for k in state_dict):
                self.prune_()
        super()._load_from_state_dict(state_dict, prefix, *args)


def kan_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        archzoo.create_layer("kan", 2, 4, grid_size=3),
        nn.Dropout(0.2),
        nn.Linear(4, 4),
        archzoo.create_layer("kan", 4, 3),
    )


def trained(callbacks, model=None, config=None, **changes):
    trainer = Trainer(config or make_config(**changes), Blobs(), model or kan_model(), callbacks)
    trainer.fit()
    return trainer


class RebuildAt(Callback):
    def __init__(self, step):
        self.step = step

    def before_step(self, trainer):
        if trainer.step == self.step:
            trainer.rebuild_optimizer()


# ---- the optimizer


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "adamw", "weight_decay": 0.1},
        {"name": "adamw"},
        {"name": "momentum", "lr": 0.05},
        {"name": "nadamw", "weight_decay": 0.1},
        {"name": "madgrad"},
        {"name": "adafactor"},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheduler", [{"name": "cosine"}, {"name": "none", "warmup": 0.9}], ids=str)
def test_rebuilt_for_the_same_parameters_it_goes_on_as_if_nothing_had_happened(optimizer, scheduler):
    rebuilt, left = (
        trained(callbacks, optimizer=optimizer, scheduler=scheduler).model.state_dict()
        for callbacks in ([RebuildAt(5)], [])
    )
    assert all(torch.equal(rebuilt[key], value) for key, value in left.items())


def test_new_parameters_begin_without_moments_and_the_others_keep_theirs():
    trainer = Trainer(make_config(optimizer={"weight_decay": 0.1}), Blobs(), kan_model())
    batches = trainer._batches()
    for _ in range(5):
        trainer._train_step(batches)
    first, linear, last = trainer.model[0], trainer.model[2], trainer.model[3]
    old, rate = first.spline_weight, trainer.optimizer.param_groups[0]["lr"]
    moments = trainer.optimizer.state[linear.weight]["exp_avg"].clone()
    first.refine(9)
    trainer.rebuild_optimizer()
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainer.model.parameters()}
    assert not any(p is old for p in held)
    assert trainer.optimizer.state.keys() == set(trainer.model.parameters()) - {first.spline_weight}
    assert torch.equal(trainer.optimizer.state[linear.weight]["exp_avg"], moments)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [rate, rate]
    before = first.spline_weight.clone(), last.spline_weight.clone()
    trainer._train_step(batches)
    assert not torch.equal(first.spline_weight, before[0]), "the new parameter is trained"
    assert not torch.equal(last.spline_weight, before[1])


def test_a_group_that_loses_its_last_parameter_is_no_obstacle():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
    trainer = Trainer(make_config(optimizer={"weight_decay": 0.1}, scheduler={"name": "none"}), Blobs(), model)
    batches = trainer._batches()
    trainer._train_step(batches)
    assert len(trainer.optimizer.param_groups) == 2
    model[0].bias = model[1].bias = None
    trainer.rebuild_optimizer()
    assert trainer.optimizer.state.keys() == {model[0].weight, model[1].weight}
    trainer._train_step(batches)
    assert all(group["lr"] == 0.01 for group in trainer.optimizer.param_groups)


def test_modules_that_came_or_went_are_regularized_and_constrained_or_not():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(2, 3)
            self.calls = 0

        def regularization_loss(self):
            self.calls += 1
            return 0.0 * self.weight.sum()

        def constrain_(self):
            self.calls += 1

    model = nn.Sequential(Counting())
    gone = model[0]

    class Swap(Callback):
        def before_step(self, trainer):
            if trainer.step == 3:
                trainer.model[0] = Counting()
                trainer.rebuild_optimizer()

    trained([Swap()], model, trainer={"steps": 8})
    assert (gone.calls, model[0].calls) == (6, 10)


def test_half_precision_trains_through_it():
    trainer = trained([GridRefine([5, 8], [0.3, 0.6])], trainer={"precision": "float16", "steps": 30})
    assert trainer.model[0].grid_size == 8
    assert trainer.best["val/accuracy"] > 0.5


# ---- average and best weights


def test_the_average_starts_again_as_a_copy_of_the_changed_model():
    seen = []

    class Look(Callback):
        def before_step(self, trainer):
            average, own = trainer.eval_model.state_dict(), trainer.model.state_dict()
            fits = all(average[k].shape == v.shape for k, v in own.items())
            seen.append((fits, all(torch.equal(average[k], v) for k, v in own.items())))

    trainer = trained([GridRefine([6], [0.5]), Look()], trainer={"ema_decay": 0.9})
    assert [s for s in seen if not s[0]] == []
    assert [step for step, (_, equal) in enumerate(seen) if equal] == [0, 1, 6]  # the first update is a copy
    assert trainer.eval_model[0].grid_size == 6


def test_an_average_of_a_model_with_moved_grids_is_that_models_function():
    trainer = trained([GridUpdate(every=4, until=1.0)], trainer={"ema_decay": 0.9, "steps": 8})
    x = trainer.task.val.inputs
    trainer.model.eval()
    assert torch.equal(trainer.eval_model(x), trainer.model(x)), "it has just started again"
    assert trainer.eval_model[0].spline.step is None, "its knots are the moved ones"


class Spoil(Callback):
    """Ruins the model where it changes it, so that no evaluation after is as good as those before."""

    def before_step(self, trainer):
        if trainer.step == 40:
            trainer.model[0].refine(6)
            with torch.no_grad():
                trainer.model[3].base_weight.fill_(0.0)
                trainer.model[3].spline_weight.fill_(0.0)
                trainer.model[3].bias.copy_(torch.tensor([-1e3, -1e3, 1e3]))
            trainer.rebuild_optimizer()

    def restore(self, model, state):
        model[0].refine(6)


def test_the_best_evaluation_is_one_of_the_model_that_is_there():
    trainer = trained([Spoil()], trainer={"steps": 48, "eval_every": 4}, optimizer={"lr": 1e-3})
    before, after = ([e for e in trainer.evaluations if (e["step"] > 40) == late] for late in (False, True))
    assert max(e["val/accuracy"] for e in before) > max(e["val/accuracy"] for e in after)
    assert trainer.best in after
    trainer.model.load_state_dict(trainer.best_weights)
    assert trainer.changed_at == 40
    assert len(trainer.evaluations) == 12, "what was evaluated before is not forgotten"


def test_a_change_at_the_very_end_leaves_no_best_and_the_last_weights_are_scored(tmp_path, monkeypatch):
    class AtTheEnd(GridRefine):
        def on_end(self, trainer):
            self._refine(trainer.model, 7)
            trainer.rebuild_optimizer()

        def restore(self, model, state):
            self._refine(model, 7)

    from archzoo.training.callbacks import callbacks

    monkeypatch.setitem(callbacks._items, "at_the_end", AtTheEnd)
    config = make_config(tmp_path, layer={"name": "kan"}, callbacks={"at_the_end": {"sizes": [6], "at": [0.99]}})
    record = execute(config)
    assert (record["status"], record["summary"]["best"]) == ("done", {})
    assert record["score"]["step"] == 12
    assert load_model(folder_of(config)).hidden[0].grid_size == 7


# ---- going on after an interruption


def resumed(folder, callbacks, make, config, stop_at):
    """The same training whole, and stopped and resumed: both trainers, fitted."""
    whole = Trainer(config, Blobs(), make(), callbacks())
    whole.fit()
    first = Trainer(
        config, Blobs(), make(), callbacks(), save=lambda t: save_checkpoint(folder, t.step, *t.state(), keep=99)
    )
    first.should_stop = lambda: first.step == stop_at
    with pytest.raises(Interrupted):
        first.fit()
    torch.manual_seed(987)
    second = Trainer(config, Blobs(), make(seed=5), callbacks())
    second.load_state(*load_checkpoint(folder / f"step_{stop_at:08d}"))
    second.fit()
    return whole, second


def assert_same_end(whole, second):
    for name in ("model", "eval_model"):
        a, b = getattr(whole, name).state_dict(), getattr(second, name).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert (whole.best, whole.evaluations, whole.changed_at) == (second.best, second.evaluations, second.changed_at)
    assert whole.best_weights.keys() == second.best_weights.keys()
    assert all(torch.equal(whole.best_weights[key], value) for key, value in second.best_weights.items())


@pytest.mark.parametrize(
    ("optimizer", "trainer"),
    [
        ({"name": "adamw", "weight_decay": 0.1}, {}),
        ({"name": "adamw"}, {"ema_decay": 0.9, "precision": "float64"}),
        ({"name": "momentum", "lr": 0.02}, {"accumulate": 2}),
        ({"name": "lbfgs", "lr": 1.0, "options": {"max_iter": 3, "history_size": 5}}, {"ema_decay": 0.9}),
    ],
    ids=["adamw", "ema", "momentum", "lbfgs"],
)
@pytest.mark.parametrize(
    "stop_at",  # before, between, right at and after the changes, at 4 and 8
    sampled([3, 4, 5, 6, 9], [4, 6]),
)
def test_a_run_that_refines_and_updates_grids_resumes_bit_for_bit(tmp_path, optimizer, trainer, stop_at):
    config = make_config(optimizer=optimizer, trainer=trainer)

    def callbacks():
        return [GridRefine([5, 9], [4 / 12, 8 / 12]), GridUpdate(every=3, until=0.8)]

    whole, second = resumed(tmp_path, callbacks, kan_model, config, stop_at)
    assert whole.model[0].grid_size == 9
    assert whole.changed_at == 8
    assert_same_end(whole, second)


@pytest.mark.parametrize("stop_at", sampled([2, 4, 6, 8, 10], [4, 6]))
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_run_through_the_stages_of_selection_resumes_bit_for_bit(tmp_path, stop_at, weight_decay, ema_decay):
    def make(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(Choosing(), nn.Linear(3, 3))

    def callbacks():
        return [SelectionStages(), GridRefine([7], [0.5])]

    config = make_config(optimizer={"weight_decay": weight_decay}, trainer={"ema_decay": ema_decay})
    whole, second = resumed(tmp_path, callbacks, make, config, stop_at)
    assert list(whole.model[0].candidates) == ["kan"]
    assert whole.changed_at == 8
    assert_same_end(whole, second)
    frozen = second.model[0].logits
    assert not frozen.requires_grad
    assert frozen not in second.optimizer.state or weight_decay == 0


@pytest.mark.parametrize(
    "stop_at", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "optimizer",
    [{"weight_decay": 0.1}, pytest.param({"name": "lbfgs", "lr": 1.0}, marks=pytest.mark.slow)],
    ids=["adamw", "lbfgs"],
)
def test_a_selectable_kan_with_refined_and_moved_grids_resumes_bit_for_bit(tmp_path, stop_at, optimizer):
    def make(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(
            archzoo.create_layer("selectable_kan", 2, 5, pool=("kan", "chebyshev_kan")),
            archzoo.create_layer("selectable_kan", 5, 3, pool=("kan", "chebyshev_kan")),
        )

    def callbacks():
        return [SelectionStages(), GridRefine([7], [0.5]), GridUpdate(every=2, until=0.8)]

    config = make_config(optimizer=optimizer, trainer={"ema_decay": 0.9})
    whole, second = resumed(tmp_path, callbacks, make, config, stop_at)
    assert [layer.stage for layer in whole.model] == ["pruned", "pruned"]
    assert whole.changed_at == 8
    assert_same_end(whole, second)


def test_a_checkpoint_of_other_callbacks_is_refused_before_anything_is_changed(tmp_path):
    first = trained([GridRefine([6], [0.5])])
    tensors, state = first.state()
    model = kan_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="other callbacks"):
        Trainer(make_config(), Blobs(), model).load_state(tensors, state | {"step": 12})
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_checkpoint_of_another_structure_is_refused():
    first = trained([GridRefine([6], [0.5])])
    tensors, state = first.state()
    with pytest.raises(CheckpointError, match="another model"):
        Trainer(make_config(), Blobs(), kan_model(), [Callback()]).load_state(tensors, state | {"step": 12})


# ---- the record of a run


def folder_of(config):
    return Path(config.output_dir) / run_id(asdict_plain(config))


def kan_config(folder, **changes):
    return make_config(
        folder, layer={"name": "kan", "grid_size": 3}, callbacks={"grid_refine": {"sizes": [5, 10], "at": [0.25, 0.5]}},
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("trainer", [{}, {"ema_decay": 0.9}, {"precision": "float64"}], ids=str)
def test_the_record_is_of_the_model_that_was_scored_and_that_model_can_be_loaded(tmp_path, trainer):
    config = kan_config(tmp_path, trainer=trainer)
    record = execute(config)
    assert record["status"] == "done", record["error"]
    model = load_model(folder_of(config))
    assert [layer.grid_size for layer in model.hidden if hasattr(layer, "grid_size")] == [10, 10]
    assert not model.training
    task = build_task(config)
    assert Trainer(config, task, model).evaluate("test")["test/accuracy"] == record["score"]["value"]
    assert record["parameters"] == count_parameters(model)
    structure = record["structure"]
    assert structure["changed_at"] == 6 < record["summary"]["best"]["step"]
    assert structure["callbacks"] == {"grid_refine": {"done": 2}}
    assert structure["initial"]["parameters"] < record["parameters"]
    assert structure["initial"]["flops"] < record["flops"]
    assert structure["initial"]["bytes_per_step"] < record["bytes_per_step"]


@pytest.mark.parametrize("stop_at", [2, 3, 7])
def test_a_refined_run_that_was_stopped_ends_the_same(tmp_path, stop_at):
    whole, parts = kan_config(tmp_path / "whole"), kan_config(tmp_path / "parts")
    execute(whole)
    looks = iter(range(1000))
    assert execute(parts, should_stop=lambda: next(looks) == stop_at)["status"] == "interrupted"
    assert execute(parts)["status"] == "done"
    assert "resumed from step" in (folder_of(parts) / "log.txt").read_text()
    a, b = (load_file(folder_of(config) / "model.safetensors") for config in (parts, whole))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in b)
    lines = [lines_without_time(folder_of(config) / "metrics.jsonl") for config in (parts, whole)]
    assert lines[0] == lines[1]
    records = [json.loads((folder_of(config) / "run.json").read_text()) for config in (parts, whole)]
    for key in ("score", "summary", "structure", "parameters", "flops", "bytes_per_step"):
        assert records[0][key] == records[1][key], key


def test_a_model_that_kept_its_structure_is_loaded_too(tmp_path):
    config = make_config(tmp_path, callbacks={"regularization_warmup": None})
    record = execute(config)
    assert record["structure"] is None
    model = load_model(folder_of(config))
    assert Trainer(config, build_task(config), model).evaluate("test")["test/accuracy"] == record["score"]["value"]


def test_a_run_that_is_not_done_has_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"no run\.json; only a run that is done has a model"):
        load_model(tmp_path)
    config = make_config(tmp_path)
    looks = iter(range(1000))
    execute(config, should_stop=lambda: next(looks) == 2)
    with pytest.raises(CheckpointError, match="status interrupted"):
        load_model(folder_of(config))
    execute(config)
    (folder_of(config) / "model.safetensors").write_bytes(b"x" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be parsed"):
        load_model(folder_of(config))
