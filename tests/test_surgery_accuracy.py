"""What a swap into a trained model keeps of its accuracy."""

import pytest
import timm
import torch
from torch.nn import functional as F

import archzoo
from archzoo.tasks.digits import Digits

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2}
STARTS = {"class_token": False, "global_pool": "avg", "weight_init": "jax"}


def train(model, data, epochs, lr):
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for _ in range(epochs):
        for index in torch.randperm(len(data)).split(32):
            x, y = data[index]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model, data):
    x, y = data[:]
    return 100 * float((model.eval()(x).argmax(-1) == y).float().mean())


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    task = Digits()
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE, **STARTS)
    train(model, task.train, 10, 4e-3)
    return model, task


@pytest.mark.parametrize("rule", ["blocks.*.mlp", pytest.param("blocks.*.mlp.fc*", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", ["kan", "aptx", "paon"])
def test_accuracy_is_kept_before_any_training(trained, layer, rule):
    model, task = trained
    before = accuracy(model, task.test)
    assert before > 80
    batch = task.train[:64][0]
    report = archzoo.swap(model, {rule: layer}, init="from_original", calibration=batch)
    after = accuracy(model, task.test)
    archzoo.unswap(report)
    assert {row.start for row in report.swaps} == {"exact"}
    assert abs(after - before) <= 0.5
    assert accuracy(model, task.test) == before


def test_what_phm_loses_is_recovered_in_an_epoch(trained):
    """`python -m benchmarks swap_accuracy` says how much, on MNIST."""
    model, task = trained
    before = accuracy(model, task.test)
    report = archzoo.swap(model, {"blocks.*.mlp": "phm"}, init="from_original", phm={"n": 2})
    assert {row.start for row in report.swaps} == {"approximate"}
    lost = accuracy(model, task.test)
    train(model.train(), task.train, 1, 1e-3)
    recovered = accuracy(model, task.test)
    archzoo.unswap(report)
    assert lost < before
    assert recovered > lost
