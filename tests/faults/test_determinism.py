"""Row "nondeterminism" of the reliability table: equal bits of two runs, and of a run and its resumed twin."""

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import archzoo
from archzoo.training.build import build_task, choose_widths
from archzoo.training.config import asdict_plain, run_id
from archzoo.training.run import execute, load_model
from tests.fuzz.layers import Subject, subjects
from tests.training.support import lines_without_time, make_config

SUBJECTS = [subject for subject in subjects() if subject.choices]  # the activation has no parameters by default
STEPS = 20


@pytest.fixture(autouse=True)
def _deterministic(nan_filled_memory: None) -> None:
    """Deterministic algorithms, and fresh memory that is never what the last run left there."""


def digest(*states: Any) -> str:
    """SHA-256 of all numbers in nested states, with their names, dtypes and shapes."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in value:
                found.update(f"{key}:".encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        else:
            found.update(f"{value!r};".encode())

    add(states)
    return found.hexdigest()


class Training:
    """A layer that is trained on random numbers, drawn in training as dropout draws them; its state is all there is."""

    def __init__(self, subject: Subject, seed: int = 0):
        torch.manual_seed(seed)
        self.args = {name: values[0] for name, values in subject.choices.items()}
        self.layer = subject.build(self.args).train()
        defaults = {n: p.default for n, p in subject.parameters.items()}
        self.shape = (*[4] * subject.leading[-1], *subject.item({**defaults, **self.args}))
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=1e-2)

    def step(self) -> None:
        self.optimizer.zero_grad()
        y = self.layer(torch.randn(self.shape))
        loss = (nn.functional.dropout(y, 0.1) - 1).square().mean()
        if hasattr(self.layer, "regularization_loss"):
            loss = loss + self.layer.regularization_loss()
        loss.backward()
        self.optimizer.step()
        if hasattr(self.layer, "constrain_"):
            self.layer.constrain_()

    def state(self) -> tuple[Any, ...]:
        return self.layer.state_dict(), self.optimizer.state_dict(), torch.get_rng_state()

    def resume(self, state: tuple[Any, ...]) -> None:
        self.layer.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
        torch.set_rng_state(state[2])


def trained(subject: Subject, steps: int, interrupted_at: int | None = None) -> str:
    """The digest behind so many steps; of two processes' work, if it was interrupted."""
    training = Training(subject)
    for step in range(steps):
        if step == interrupted_at:
            file = io.BytesIO()
            torch.save(training.state(), file)
            file.seek(0)
            training = Training(subject, seed=1 + step)
            training.resume(torch.load(file, weights_only=True))
        training.step()
    return digest(*training.state())


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@pytest.mark.parametrize(
    ("steps", "stops"), [(3, [2]), pytest.param(STEPS, range(STEPS), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_layer_ends_with_equal_bits_trained_twice_or_interrupted(subject, steps, stops):
    whole = trained(subject, steps)
    assert trained(subject, steps) == whole, "a second run"
    for stop in stops:
        assert trained(subject, steps, stop) == whole, f"interrupted at step {stop}"


def test_a_digest_tells_states_apart():
    subject = SUBJECTS[0]
    assert trained(subject, 3) != trained(subject, 4)
    ones = torch.ones(2, 3)
    assert len({digest(ones), digest(ones.T), digest(ones.double()), digest({"a": ones}), digest({"b": ones})}) == 5
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))


class _Draws(nn.Linear):
    """Looks the same each time, and is not: it counts its calls outside its state."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x) * (1 + 1e-6 * self.calls)


def test_a_layer_that_does_not_repeat_is_noticed():
    linear = next(subject for subject in SUBJECTS if subject.name == "linear")
    careless = Subject("draws", _Draws, linear.choices, linear.item, linear.result, linear.leading)
    assert trained(careless, 3) != trained(careless, 3)


# --- The trainer, one layer of each kind ------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "kan": {"model": {"name": "mlp", "width": 8, "depth": 2, "dropout": 0.2}},
    "kan_conv2d": {"model": {"name": "cnn", "width": 4, "depth": 1, "dropout": 0.2}},
    "mamba2": {
        "task": {"name": "selective_copying", "length": 8, "data": 2, "symbols": 4, "eval_size": 20},
        "model": {"name": "decoder", "width": 16, "depth": 1, "dropout": 0.1},
    },
    "bpu": {"model": {"name": "bpu", "connectome": "generated", "dropout": 0.2}},
}


def folder_of(config: Any) -> Path:
    return Path(config.output_dir) / run_id(asdict_plain(config))


@pytest.mark.slow
@pytest.mark.parametrize("layer", RUNS)
def test_a_run_interrupted_at_any_step_ends_with_equal_bits(tmp_path, layer):
    def config(name: str) -> Any:
        trainer = {"steps": STEPS + 1, "batch_size": 8, "eval_every": 10, "deterministic": True, "ema_decay": 0.9}
        return make_config(tmp_path / name, layer={"name": layer}, trainer=trainer, **RUNS[layer])

    def end_of(parts: Any) -> tuple[Any, Any]:
        folder = folder_of(parts)
        return digest(load_file(folder / "model.safetensors")), lines_without_time(folder / "metrics.jsonl")

    whole = config("whole")
    assert execute(whole)["status"] == "done"
    for stop in range(STEPS):
        parts, looks = config(f"parts{stop}"), iter(range(1000))
        assert execute(parts, should_stop=lambda looks=looks, stop=stop: next(looks) == stop)["status"] == "interrupted"
        assert execute(parts)["status"] == "done"
        assert end_of(parts) == end_of(whole), f"interrupted behind step {stop + 1}"


# --- What draws no numbers --------------------------------------------------------------------------------------------


@pytest.fixture
def generator() -> Iterator[None]:
    """Fails if the test moved torch's global generator."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "random numbers were drawn from the global generator"


@pytest.mark.usefixtures("generator")
def test_a_dry_run_of_a_swap_draws_no_numbers():
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 16))
    report = archzoo.swap(model, {nn.Linear: "kan"}, match="params", dry_run=True)
    assert len(report.swaps) == 2


@pytest.mark.usefixtures("generator")
def test_a_search_for_widths_draws_no_numbers():
    config = make_config(
        layer={"name": "kan"}, model={"name": "mlp", "width": 9, "depth": 2}, budget={"match": "params"}
    )
    assert choose_widths(config, build_task(config)) is not None


def test_loading_a_model_draws_no_numbers(tmp_path):
    config = make_config(tmp_path, layer={"name": "kan"}, trainer={"steps": 2})
    execute(config)
    folder = folder_of(config)
    before = torch.get_rng_state()
    first, second = load_model(folder), load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert digest(first.state_dict()) == digest(second.state_dict())
