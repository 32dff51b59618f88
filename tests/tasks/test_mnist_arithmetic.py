"""Sums and products of digit sequences: targets, splits, streams, metrics, and the network that is trained on them."""

import os
import pickle
import re

import pytest
import torch
from torch import nn

from archzoo.models.model import LayerFactory, models
from archzoo.tasks import mnist_arithmetic
from archzoo.tasks.mnist_arithmetic import STREAM_LENGTH, DigitSequences, MNISTArithmetic
from archzoo.tasks.task import TensorSplit

DATA = os.environ.get("ARCHZOO_DATA")


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    """Images whose pixels are all the digit's number of tenths, so that a test can read them."""

    def splits(source, data_dir, *, val_size, train_size, mean, std):
        assert (mean, std) == (0.1307, 0.3081)
        parts = []
        for seed, count in enumerate((train_size or 300, val_size, 200)):
            labels = torch.randint(10, (count,), generator=torch.Generator().manual_seed(seed))
            parts.append(TensorSplit((labels / 10).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous(), labels))
        return tuple(parts)

    monkeypatch.setattr(mnist_arithmetic, "idx_splits", splits)


def task(**options):
    return MNISTArithmetic(**{"val_size": 100, "test_lengths": [1, 3, 20], **options})


def shown(images):
    return (images[..., 0, 0, 0] * 10).round().double()


@pytest.mark.parametrize("operation", ["sum", "product"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_targets_are_the_result_after_each_digit(operation, split):
    inputs, targets = getattr(task(operation=operation), split).__getitems__(range(4))
    digits = shown(inputs)
    length = {"train": {"sum": 10, "product": 2}[operation], "val": {"sum": 10, "product": 2}[operation], "test": 20}
    assert inputs.shape == (4, length[split], 1, 28, 28)
    assert targets.dtype == torch.float32
    expected = digits.cumsum(1) if operation == "sum" else digits.cumprod(1)
    assert torch.equal(targets, expected.float())
    assert (digits == 0).any() == (operation == "sum")


def test_fixed_sequences_use_an_image_once_and_the_stream_is_fresh():
    made = task()
    assert (len(made.val), len(made.test), len(made.train)) == (10, 10, STREAM_LENGTH)
    for split in (made.val, made.test):
        rows = [index for i in range(len(split)) for index in split._row(i)]
        assert len(set(rows)) == len(rows)
    rows = [tuple(made.train._row(i)) for i in range(50)]
    assert len(set(rows)) == 50
    assert rows[:3] == [tuple(task().train._row(i)) for i in range(3)]
    assert rows[0] != tuple(task(seed=1).train._row(0))
    assert tuple(task(seed=1).test._row(0)) == tuple(made.test._row(0))
    for split, beyond in ((made.val, 10), (made.train, STREAM_LENGTH)):
        for index in (-1, beyond):
            with pytest.raises(IndexError, match="numbered from 0"):
                split[index]


def test_samples_are_pinned_and_do_not_depend_on_the_batch():
    """A resumed run must go on with the same sequences, also after an upgrade of NumPy or torch."""
    stream = pickle.loads(pickle.dumps(task().train))
    assert stream._row(12345).tolist() == [236, 191, 166, 65, 209, 290, 291, 264, 111, 260]
    inputs, targets = stream.__getitems__([7, 12345])
    assert torch.equal(inputs[1], stream[12345][0])
    assert torch.equal(targets[1], stream[12345][1])
    assert [t.shape[0] for t in stream.__getitems__([])] == [0, 0]


def test_metric_tells_each_length_and_all_positions():
    made = task()
    metrics = made.metrics()
    output, target = torch.zeros(5, 20), torch.arange(1.0, 21).expand(5, -1)
    metrics.update(output[:2], target[:2])
    metrics.update(output[2:], target[2:])
    found = {key: value.item() for key, value in metrics.compute().items()}
    assert found == {"mse": sum(n * n for n in range(1, 21)) / 20, "mse_at_1": 1, "mse_at_3": 9, "mse_at_20": 400}
    metrics.reset()
    metrics.update(output[:, :10], target[:, :10])
    assert metrics.compute().keys() == {"mse", "mse_at_1", "mse_at_3"}
    assert metrics.compute()["mse"].item() == made.loss(output[:, :10], target[:, :10]).item()
    huge = torch.full((1, 20), 1e30)
    metrics.update(huge, -huge)
    assert metrics.compute()["mse"].isfinite()  # not so in float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operation": "mean"}, "operation='mean': there is no such operation"),
        ({"length": 0}, "length=0: must be a whole number"),
        ({"length": 101}, "length: a sequence of 101 digits is longer than the 100 val images"),
        ({"test_lengths": []}, "test_lengths=[]: must be a list"),
        ({"test_lengths": 5}, "test_lengths=5: must be a list"),
        ({"test_lengths": [1, 0.5]}, "test_lengths=0.5: must be a whole number"),
        ({"test_lengths": [201]}, "test_lengths: a sequence of 201 digits is longer than the 200 test images"),
    ],
)
def test_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        task(**options)


class Reader(nn.Module):
    """Reads the digit off the pixels of `digits`."""

    def forward(self, x):
        return 10 * x[:, 0, 0, :1]


def build(layer="nau", options=None, **model):
    return models.create(
        "sequence_arithmetic", LayerFactory(layer, options), (10, 1, 28, 28), 10, **{"channels": [2, 3], **model}
    )


@pytest.mark.parametrize(
    ("layer", "operation"), [("nau", "sum"), ("nmu", "product"), ("linear", "sum"), ("real_npu", "product")]
)
def test_right_digits_and_a_right_unit_give_the_right_results_at_any_length(layer, operation):
    made, model = task(operation=operation), build(layer)
    model.digits = Reader()
    model.unit.weight.data.fill_(1.0)
    if model.unit.bias is not None:
        model.unit.bias.data.zero_()
    if layer == "real_npu":
        model.unit.gate.data.fill_(1.0)
    inputs, targets = made.test.__getitems__(range(3))
    torch.testing.assert_close(model(inputs), targets, rtol=1e-4, atol=1e-4)
    exact = build("linear", accumulator=operation)
    exact.digits = Reader()
    torch.testing.assert_close(exact(inputs), targets, rtol=1e-4, atol=1e-4)
    assert exact.unit is None


@pytest.mark.parametrize(
    ("layer", "options", "start"), [("nac", {}, 0), ("nac", {"mode": "multiply"}, 1), ("nalu", {}, 0), ("npu", {}, 1)]
)
def test_state_starts_at_what_the_unit_leaves_unchanged(layer, options, start):
    assert build(layer, options=options).start == start


def test_network_is_the_papers_and_trains():
    model = build("nau", channels=[20, 50], width=500, options={"input_weight": 1.0})
    shapes = [tuple(p.shape) for p in model.digits.parameters() if p.dim() > 1]
    assert shapes == [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (1, 500)]
    inputs, targets = task().train.__getitems__(range(2))
    (task().loss(model(inputs), targets) + model.unit.regularization_loss()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model(inputs[:, :0]).shape == (2, 0)
    assert model(inputs[:0]).shape == (0, 10)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"accumulator": "mean"}, "accumulator='mean': must be 'layer', 'sum' or 'product'"),
        ({"channels": [4]}, "channels=[4]: must be two whole numbers"),
        ({"width": 0}, "width=0, depth=1"),
    ],
)
def test_wrong_option_of_the_model_is_named(model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**model)
    with pytest.raises(ValueError, match=re.escape("must be (length, channels, height, width)")):
        models.create("sequence_arithmetic", LayerFactory("nau"), (784,), 10)
    with pytest.raises(ValueError, match="16 x 16 or larger"):
        models.create("sequence_arithmetic", LayerFactory("nau"), (10, 1, 8, 8), 10)


@pytest.mark.skipif(not DATA, reason="ARCHZOO_DATA names no data folder")
def test_real_digits(monkeypatch):
    monkeypatch.undo()
    made = MNISTArithmetic(train_size=100, data_dir=DATA)
    inputs, targets = made.test[3]
    assert inputs.shape == (1000, 1, 28, 28)
    assert len(made.test) == 10
    assert 4000 < targets[-1] < 5000
    assert isinstance(made.test, DigitSequences)
