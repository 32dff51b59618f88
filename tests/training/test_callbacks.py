import pytest
import torch
from torch import nn

import archzoo
from archzoo.training.callbacks import Callback, GridUpdate, RegularizationWarmup, SparsityScheduleCallback, callbacks
from archzoo.training.checkpoint import load_checkpoint, save_checkpoint
from archzoo.training.loop import Interrupted, Trainer
from tests.training.support import Blobs, make_config


def fit(model, callback, steps=10, **trainer):
    seen = []

    class Watch(Callback):
        def before_step(self, trainer):
            seen.append((trainer.regularization_factor, getattr(trainer.model[0], "sparsity_weight", None)))

    Trainer(make_config(trainer={"steps": steps, **trainer}), Blobs(), model, [callback, Watch()]).fit()
    return seen


def test_all_are_found_by_name():
    assert callbacks.names() == ["grid_update", "regularization_warmup", "sparsity_schedule"]


def test_the_regularization_is_warmed_up():
    seen = fit(nn.Sequential(nn.Linear(2, 3)), RegularizationWarmup(start=0.2, end=0.6))
    assert [factor for factor, _ in seen] == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_the_sparsity_weight_follows_its_schedule():
    model = nn.Sequential(archzoo.create_layer("nau", 2, 3))
    seen = fit(model, SparsityScheduleCallback(weight=8.0, start=2, end=6))
    assert [weight for _, weight in seen] == pytest.approx([0, 0, 0, 2, 4, 6, 8, 8, 8, 8])


def kan_model():
    torch.manual_seed(0)
    return nn.Sequential(
        archzoo.create_layer("kan", 2, 4, grid_range=(-1.0, 1.0)), nn.Dropout(0.1), archzoo.create_layer("kan", 4, 3)
    )


def test_grids_move_to_the_data_until_the_end_of_their_time():
    model = kan_model()
    before = [layer.grid.clone() for layer in (model[0], model[2])]
    fit(model, GridUpdate(every=4, until=0.5))
    after = [layer.grid for layer in (model[0], model[2])]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model[0].grid.max() > 2  # the blobs reach farther than the first grid


def test_a_grid_update_keeps_the_function_and_drops_the_moments():
    trainer = Trainer(make_config(trainer={"precision": "float64"}), Blobs(), kan_model(), [])
    callback = GridUpdate(every=1, until=1.0)
    batches = trainer._batches()
    trainer._train_step(batches)
    trainer.model.eval()
    inside = trainer.inputs.clamp(-0.9, 0.9)
    trainer.inputs = torch.cat([inside, -inside])
    before = trainer.model(trainer.inputs)
    layers = (trainer.model[0], trainer.model[2])
    assert all(p in trainer.optimizer.state for layer in layers for p in layer.parameters())
    callback.after_step(trainer)
    assert not any(p in trainer.optimizer.state for layer in layers for p in layer.parameters())
    error = (trainer.model(trainer.inputs) - before).norm() / before.norm()
    assert error < 0.05


@pytest.mark.parametrize("stop_at", [6, 7])  # right after an update, when some moments are gone, and a step later
def test_a_run_with_grid_updates_resumes_bit_for_bit(tmp_path, stop_at):
    config = make_config(trainer={"steps": 12})
    whole = Trainer(config, Blobs(), kan_model(), [GridUpdate(every=3, until=1.0)])
    whole.fit()

    def save(t):
        save_checkpoint(tmp_path, t.step, *t.state(), keep=9)

    first = Trainer(config, Blobs(), kan_model(), [GridUpdate(every=3, until=1.0)], save=save)
    first.should_stop = lambda: first.step == stop_at
    with pytest.raises(Interrupted):
        first.fit()
    second = Trainer(config, Blobs(), kan_model(), [GridUpdate(every=3, until=1.0)])
    second.load_state(*load_checkpoint(tmp_path / f"step_{stop_at:08d}"))
    second.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RegularizationWarmup(start=0.5, end=0.1), "start=0.5, end=0.1"),
        (lambda: GridUpdate(every=0), "every=0"),
        (lambda: GridUpdate(until=2.0), "until=2.0"),
        (lambda: SparsityScheduleCallback(weight=1.0, start=5, end=5), "end=5: must be after start=5"),
    ],
)
def test_a_wrong_option_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
