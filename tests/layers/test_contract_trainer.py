"""What a training run asks of a layer: its cost, and the hooks that the loop calls."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tests.helpers import (
    RecordOps,
    assert_same_bits,
)
from tests.layers.contract import every_layer, snapshot


def counted_flops(layer: nn.Module, x: Tensor, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@every_layer()
def test_flops_are_counted(case):
    """By shapes alone: the same on meta as on the CPU; more rows cost more, and training costs more than inference."""
    layer, meta = case.build(), case.build(device="meta")
    counts = {
        (batch, backward): counted_flops(layer, case.x(batch).requires_grad_(), backward)
        for batch in (16, 32)
        for backward in (False, True)
    }
    assert 0 < counts[16, False] < counts[32, False]
    assert counts[16, False] < counts[16, True] < counts[32, True]
    for (batch, backward), count in counts.items():
        assert counted_flops(meta, case.x(batch).to("meta").requires_grad_(), backward) == count, "meta against CPU"


@every_layer()
def test_every_op_of_ours_has_a_flop_formula(case):
    layer = case.build()
    with RecordOps() as recorded:
        layer(case.x(16).requires_grad_()).sum().backward()
    ours = {op for op in recorded.ops if str(op).startswith("archzoo.")}
    missing = sorted(str(op) for op in ours if op not in flop_registry)
    assert not missing, f"no FLOP formula for {missing}: a budget would count them as free"


@every_layer()
def test_regularization_loss_is_a_differentiable_scalar(case):
    layer = case.generic(dtype=torch.float64)
    if not hasattr(layer, "regularization_loss"):
        return
    for when in ("before the first forward", "after one"):
        loss = layer.regularization_loss()
        assert isinstance(loss, Tensor), when
        assert loss.shape == (), when
        assert loss.dtype == torch.float64, when
        assert loss.isfinite(), when
        layer.zero_grad()
        (layer(case.x(5, dtype=torch.float64)).sum() + loss).backward()
    if hasattr(layer, "constrain_"):
        layer.constrain_()
    assert layer.regularization_loss().isfinite()


@every_layer()
def test_constrain_works_in_place_and_once_is_enough(case):
    layer = case.generic()
    if not hasattr(layer, "constrain_"):
        return
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(10)
    layer(case.x(5)).sum().backward()
    parameters = dict(layer.named_parameters())
    assert layer.constrain_() is None
    once = snapshot(layer)
    layer.constrain_()
    assert_same_bits(snapshot(layer), once, "constrain_() twice")
    for name, parameter in layer.named_parameters():
        assert parameter is parameters[name], f"{name} was replaced: the optimizer would train the old one"
        assert parameter.requires_grad
        assert parameter.is_leaf
    assert layer(case.x(5)).isfinite().all()
