import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import archzoo
from archzoo.training.callbacks import (
    Callback,
    GridRefine,
    GridUpdate,
    RegularizationWarmup,
    SelectionStages,
    SparsityScheduleCallback,
    callbacks,
    outermost,
)
from archzoo.training.checkpoint import load_checkpoint, save_checkpoint
from archzoo.training.config import ConfigError
from archzoo.training.loop import Interrupted, Trainer
from tests.helpers import assert_same_bits
from tests.training.support import Blobs, make_config


def fit(model, callback, steps=10, **trainer):
    seen = []

    class Watch(Callback):
        def before_step(self, trainer):
            seen.append((trainer.regularization_factor, getattr(trainer.model[0], "sparsity_weight", None)))

    Trainer(make_config(trainer={"steps": steps, **trainer}), Blobs(), model, [callback, Watch()]).fit()
    return seen


def test_all_are_found_by_name():
    assert callbacks.names() == [
        *("grid_refine", "grid_update", "regularization_warmup", "sample_text", "selection_stages"),
        *("sparsity_schedule", "symbolic_regression"),
    ]


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


def test_grids_of_a_model_whose_other_layers_keep_their_moments_resume_bit_for_bit(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(archzoo.create_layer("kan", 2, 4), nn.Linear(4, 3))

    config, make = make_config(trainer={"steps": 9}), lambda: [GridUpdate(every=3, until=0.7)]
    whole = Trainer(config, Blobs(), model(), make())
    whole.fit()
    first = Trainer(config, Blobs(), model(), make(), save=lambda t: save_checkpoint(tmp_path, 6, *t.state(), keep=1))
    first.should_stop = lambda: first.step == 6
    with pytest.raises(Interrupted):
        first.fit()
    second = Trainer(config, Blobs(), model(), make())
    second.load_state(*load_checkpoint(tmp_path / "step_00000006"))
    second.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


class Whole(nn.Module):
    """A model that moves and refines the grids of its layers itself."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.inner = kan_model()
        for name in ("update_grid", "refine"):
            for layer in (self.inner[0], self.inner[2]):
                setattr(layer, name, lambda *args, name=name: self.calls.append(f"inner {name}"))

    def forward(self, x):
        return self.inner(x)

    def update_grid(self, x):
        self.calls.append(("update_grid", x.shape))

    def refine(self, grid_size):
        self.calls.append(("refine", grid_size))


def test_a_module_inside_one_that_has_the_method_is_left_to_that_one():
    model = nn.Sequential(Whole())
    fit(model, GridUpdate(every=4, until=1.0), steps=8)
    assert model[0].calls == [("update_grid", (16, 2))] * 2
    model[0].calls.clear()
    fit(model, GridRefine([7, 9], [0.0, 0.5]), steps=4)
    assert model[0].calls == [("refine", 7), ("refine", 9)]


def test_a_module_that_stands_in_two_places_is_found_once():
    shared = archzoo.create_layer("kan", 3, 3)
    assert list(outermost(nn.Sequential(shared, nn.Sequential(nn.Linear(3, 3), shared)), "refine")) == [shared]


def test_grids_are_refined_at_their_time_and_keep_the_function():
    model, seen, values = kan_model(), [], []
    inside = torch.rand(50, 2) * 1.8 - 0.9

    class Look(Callback):
        def before_step(self, trainer):
            seen.append(trainer.model[0].grid_size)
            trainer.model.eval()
            values.append(trainer.model(inside).detach())
            trainer.model.train()

    before = [Look(), GridRefine([10, 20], [0.2, 0.6]), Look()]
    trainer = Trainer(make_config(trainer={"steps": 10, "precision": "float64"}), Blobs(), model, before)
    inside = inside.double()
    trainer.fit()
    assert seen == [5, 5, 5, 5, 5, 10, *[10] * 7, 20, *[20] * 6]
    assert [layer.grid_size for layer in (model[0], model[2])] == [20, 20]
    for k in (4, 12):  # before and after: exact, for the sizes are multiples, but for what leaves the second grid
        assert (values[k] - values[k + 1]).abs().max() < 1e-9


def test_a_grid_is_refined_before_the_first_step_on_request():
    model = kan_model()
    fit(model, GridRefine([8], [0]), steps=1)
    assert model[0].grid_size == 8


def test_layers_without_grids_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 3))
    trainer = Trainer(make_config(), Blobs(), model, [GridRefine([5], [0.5]), SelectionStages(), GridUpdate()])
    trainer.fit()
    assert trainer.changed_at is None


def test_a_first_size_below_the_layers_own_is_refused_before_training():
    trainer = Trainer(make_config(), Blobs(), kan_model(), [GridRefine([4, 8], [0.2, 0.4])])
    with pytest.raises(ConfigError, match=r"callbacks\.grid_refine\.sizes=\[4, 8\]: KANLinear has grid_size=5 already"):
        trainer.fit()
    assert trainer.step == 0


class Selectable(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)
        self.calls = []

    def select_(self):
        self.calls.append("select")
        self.bias.requires_grad_(False)

    def prune_(self):
        assert self.calls == ["select"]
        self.calls.append("prune")
        self.weight = nn.Parameter(self.weight.detach().clone())


def test_selectable_layers_go_through_their_stages():
    model, seen = nn.Sequential(Selectable()), []

    class Look(Callback):
        def before_step(self, trainer):
            held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
            assert any(p is trainer.model[0].weight for p in held)
            seen.append(len(trainer.model[0].calls))

    trainer = Trainer(make_config(trainer={"steps": 9}), Blobs(), model, [SelectionStages(), Look()])
    trainer.fit()
    assert model[0].calls == ["select", "prune"]
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert trainer.changed_at == 6


def test_both_stages_may_begin_at_once():
    model = nn.Sequential(Selectable())
    fit_plain = Trainer(make_config(), Blobs(), model, [SelectionStages(select=0.5, prune=0.5)])
    fit_plain.fit()
    assert model[0].calls == ["select", "prune"]


def train_in_ddp(rank, folder):
    """One of two processes with different data; writes what its model became."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    task = Blobs()
    task.train.inputs[:] = task.train.inputs * (1 + rank) + rank
    model, lines = kan_model(), []
    start = model[0].grid.clone()
    config = make_config(trainer={"steps": 20, "eval_every": 100}, optimizer={"lr": 0.02})
    ddp = nn.parallel.DistributedDataParallel(model)
    trainer = Trainer(config, task, ddp, [GridUpdate(every=4, until=0.5)], record=lines.append)
    trainer.fit()
    assert not torch.equal(model[0].grid, start)
    losses = torch.tensor([line["train/loss"] for line in lines if "train/loss" in line])
    own = nn.functional.cross_entropy(model(task.train.inputs), task.train.targets).detach()
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file({**state, "losses": losses, "own": own}, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_under_ddp_grids_are_updated_alike_on_every_rank_and_training_goes_on(tmp_path):
    torch.multiprocessing.start_processes(train_in_ddp, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (load_file(tmp_path / str(rank)) for rank in range(2))
    own = [state.pop("own") for state in (first, second)]
    assert not torch.equal(*own), "the ranks have data of their own"
    assert_same_bits(first, second, "the two ranks, their models and the recorded losses, which are means over them")
    assert first["losses"][-5:].mean() < 0.7 * first["losses"][:5].mean()


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
        (lambda: GridRefine(sizes=[5, 5], at=[0.1, 0.2]), r"sizes=\[5, 5\]: must be whole numbers, each larger"),
        (lambda: GridRefine(sizes=[0], at=[0.1]), r"sizes=\[0\]"),
        (lambda: GridRefine(sizes=[2.5], at=[0.1]), r"sizes=\[2.5\]"),
        (lambda: GridRefine(sizes=[], at=[]), r"sizes=\[\]"),
        (lambda: GridRefine(sizes=5, at=[0.1]), "sizes=5"),
        (lambda: GridRefine(sizes=[5, 8], at=[0.4]), r"at=\[0.4\]: must have one fraction for each of sizes"),
        (lambda: GridRefine(sizes=[5, 8], at=[0.4, 0.2]), r"at=\[0.4, 0.2\]: must be fractions of the budget"),
        (lambda: GridRefine(sizes=[5], at=[1.0]), r"at=\[1.0\]"),
        (lambda: GridRefine(sizes=[5], at=["half"]), r"at=\['half'\]"),
        (lambda: SelectionStages(select=0.7, prune=0.3), "select=0.7, prune=0.3: must be fractions of the budget"),
        (lambda: SelectionStages(prune=1.0), "prune=1.0"),
        (lambda: SelectionStages(select=-0.1), "select=-0.1"),
        (lambda: SelectionStages(select="half"), "select=half"),
        (lambda: SparsityScheduleCallback(weight=1.0, start=5, end=5), "end=5: must be after start=5"),
    ],
)
def test_a_wrong_option_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
