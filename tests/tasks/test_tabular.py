"""The tables: standardised by what is trained on, split fairly, scored in the right unit."""

import pytest
import sklearn.datasets
import torch

from archzoo.tasks.tabular import Tabular

SIZES = {"wine": (106, 36, 36), "breast_cancer": (341, 114, 114), "diabetes": (266, 88, 88)}


@pytest.mark.parametrize("dataset", SIZES)
def test_only_the_training_part_sets_mean_and_deviation(dataset):
    task = Tabular(dataset=dataset)
    assert tuple(map(len, (task.train, task.val, task.test))) == SIZES[dataset]
    torch.testing.assert_close(task.train.inputs.mean(0), torch.zeros(task.input_shape), atol=1e-5, rtol=0)
    torch.testing.assert_close(task.train.inputs.std(0), torch.ones(task.input_shape), atol=1e-5, rtol=0)
    for split in (task.val, task.test):
        assert split.inputs.mean(0).abs().max() > 1e-3
        assert (split.inputs.std(0) - 1).abs().max() > 1e-3


@pytest.mark.parametrize("dataset", ["wine", "breast_cancer"])
def test_classes_are_stratified(dataset):
    task = Tabular(dataset=dataset)
    counts = [split.targets.bincount() for split in (task.train, task.val, task.test)]
    share = sum(counts) / sum(SIZES[dataset])
    assert task.output_size == len(share)
    for count in counts:
        assert (count - share * count.sum()).abs().max() < 2


def test_rmse_of_diabetes_is_in_the_progressions_own_unit():
    task = Tabular(dataset="diabetes")
    assert (task.score, task.mode, task.output_size) == ("rmse", "min", 1)
    whole = torch.tensor(sklearn.datasets.load_diabetes().target).sort().values
    parts = torch.cat([split.targets for split in (task.train, task.val, task.test)]).squeeze(1).double()
    torch.testing.assert_close((parts * task.target_std + task.target_mean).sort().values, whole, rtol=1e-5, atol=1e-4)
    output = torch.randn(88, 1)
    metrics = task.metrics()
    metrics.update(output[:50], task.test.targets[:50])
    metrics.update(output[50:], task.test.targets[50:])
    expected = ((output - task.test.targets) * task.target_std).square().mean().sqrt()
    torch.testing.assert_close(metrics.compute()["rmse"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics.compute()["loss"], task.loss(output, task.test.targets), rtol=1e-5, atol=0)


def test_least_squares_reaches_the_known_error_of_diabetes():
    task = Tabular(dataset="diabetes")
    design = torch.cat([task.train.inputs, torch.ones(266, 1)], 1)
    weights = torch.linalg.lstsq(design, task.train.targets).solution
    metrics = task.metrics()
    metrics.update(torch.cat([task.test.inputs, torch.ones(88, 1)], 1) @ weights, task.test.targets)
    assert 45 < metrics.compute()["rmse"] < 65  # about 54 by any split


def test_misspelt_dataset_is_named():
    with pytest.raises(ValueError, match=r"dataset='whine'.*did you mean 'wine'"):
        Tabular(dataset="whine")
