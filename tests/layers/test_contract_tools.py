"""Layers under the tools of torch: compile, autocast, export, copies, DistributedDataParallel, CUDA."""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import (
    assert_all_close,
    assert_same_bits,
    layer_value_and_grads,
    rms_error,
)
from tests.layers.contract import every_layer, tensors_of


def graphs_of_a_compiled(case, batches, dynamic):
    """How many graphs the layer compiles to, each of it whole, for batches of these sizes; all results are eager's."""
    torch._dynamo.reset()
    layer = case.generic(dtype=torch.float64)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for batch in batches:
        x, dy = case.x(batch, dtype=torch.float64), case.dy(batch, dtype=torch.float64)
        want = layer_value_and_grads(layer, x, dy)
        leaf = x.clone().requires_grad_()
        if dynamic:
            torch._dynamo.mark_dynamic(leaf, 0)  # raises where a graph is for this size alone
        y = compiled(leaf)
        gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], dy)
        got = dict(zip(["y", "x", *dict(layer.named_parameters())], [y.detach(), *gradients], strict=True))
        assert_all_close(got, want, f"compiled, batch {batch}")
    return len(graphs)


@every_layer(sampled=True)
def test_compiled_equals_eager(case):
    assert graphs_of_a_compiled(case, (5, 9), dynamic=True) == 1


@pytest.mark.slow
@every_layer()
def test_compiled_as_batches_come_equals_eager(case):
    """A second batch size may recompile with a symbolic one, which a third must then share."""
    assert 1 <= graphs_of_a_compiled(case, (5, 7, 9), dynamic=False) <= 2


def under_autocast(module: nn.Module, layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
    gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], dy.to(y.dtype))
    return dict(zip(["y", "x", *dict(layer.named_parameters())], [y.detach(), *gradients], strict=True))


@every_layer(sampled=True)
def test_autocast_follows_the_usual_layer(case):
    layer, usual = case.generic(), case.sizes.usual()
    x, dy = case.x(64), case.dy(64)
    truth = layer_value_and_grads(layer, x, dy)
    rounded = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    # What rounding the inputs, the weights and dy to bfloat16 costs, all arithmetic being exact: the yardstick.
    yardstick = layer_value_and_grads(rounded, x.bfloat16().float(), dy.bfloat16().float())

    got = under_autocast(layer, layer, x, dy)
    with torch.autocast("cpu", torch.bfloat16):
        # A mixer may hold its residual stream, and then keeps x's dtype, as x + f(x) does.
        assert got["y"].dtype in {usual(x).dtype, *([x.dtype] if case.entry.kind == "mixer" else [])}
        assert layer(x[:0]).dtype == got["y"].dtype
    for name, tensor in got.items():
        if name != "y":
            assert tensor.dtype == torch.float32, f"gradient of {name}"
        assert tensor.isfinite().all(), name
        floor = 6e-3 if name == "y" else 1e-2
        error, allowed = rms_error(tensor, truth[name]), 2 * rms_error(yardstick[name], truth[name]) + floor
        assert error <= allowed, f"{name} under autocast: error {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.slow
@every_layer(sampled=True)
def test_autocast_is_compiled_as_it_runs(case):
    layer, x, dy = case.generic(), case.x(64), case.dy(64)
    torch._dynamo.reset()
    eager, compiled = (
        under_autocast(module, layer, x, dy)
        for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    )
    assert compiled["y"].dtype == eager["y"].dtype
    assert_all_close(compiled, eager, "compiled under autocast", bound=1e-2)


@every_layer(sampled=True)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["non_strict", "strict"])
def test_exported_program_equals_eager_at_any_batch_size(case, strict):
    torch._dynamo.reset()
    layer = case.generic(dtype=torch.float64).eval()
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(
        layer, (case.x(5, dtype=torch.float64),), dynamic_shapes=({0: batch},), strict=strict
    ).module()
    for size in (5, 9):
        x = case.x(size, dtype=torch.float64)
        assert rms_error(program(x), layer(x)) < 1e-13


@every_layer()
def test_copies_are_equal_and_independent_before_and_after_use(case):
    layer = case.generic()
    if hasattr(layer, "constrain_"):  # the training loop has called it by the time anybody copies
        layer.constrain_()
    x, dy = case.x(5), case.dy(5)
    before = copy.deepcopy(layer)
    layer(x).backward(dy)
    if hasattr(layer, "constrain_"):  # and drops what a forward pass left behind
        layer.constrain_()
    after = copy.deepcopy(layer)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = {"deepcopy before": before, "deepcopy after": after, "pickle": pickle.loads(pickle.dumps(layer))}
    copies["torch.save"] = torch.load(stream, weights_only=False)  # whole modules, our own
    truth = layer_value_and_grads(layer, x, dy)
    for what, twin in copies.items():
        assert_same_bits(layer_value_and_grads(twin, x, dy), truth, what)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.fill_(0.123)
        assert_same_bits(layer_value_and_grads(layer, x, dy), truth, f"the layer, when its {what} changed")


@every_layer()
def test_state_dict_round_trip(case):
    layer, fresh = case.generic(seed=1), case.build(seed=2)
    x, dy = case.x(5), case.dy(5)
    missing = fresh.load_state_dict(layer.state_dict(), strict=True)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert_same_bits(layer_value_and_grads(fresh, x, dy), layer_value_and_grads(layer, x, dy), "the loaded layer")
    assert_same_bits(dict(fresh.state_dict()), dict(layer.state_dict()), "its state dict")
    assert {name for name, _ in layer.named_parameters()} <= layer.state_dict().keys()
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream, weights_only=True))


@pytest.fixture(scope="module")
def one_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_layer()
@pytest.mark.usefixtures("one_process_group")
def test_distributed_data_parallel_gives_the_same_gradients(case):
    layer = case.generic()
    x, dy = case.x(5), case.dy(5)
    want = layer_value_and_grads(layer, x, dy)
    wrapped = DistributedDataParallel(copy.deepcopy(layer))
    for _ in range(2):  # the second pass raises if a parameter got no gradient in the first
        wrapped.zero_grad()
        wrapped(x).backward(dy)
    for name, parameter in wrapped.module.named_parameters():
        assert rms_error(parameter.grad, want[name]) < 1e-6, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_layer()
def test_cuda_equals_cpu_and_repeats_bit_for_bit(case):
    layer, twin = case.generic(dtype=torch.float64), case.generic(dtype=torch.float64).cuda()
    x, dy = case.x(33, dtype=torch.float64), case.dy(33, dtype=torch.float64)
    first, second = (layer_value_and_grads(twin, x.cuda(), dy.cuda()) for _ in range(2))
    assert {tensor.device.type for tensor in first.values()} == {"cuda"}
    assert_same_bits(first, second, "the second run on CUDA")
    on_cpu = {name: tensor.cpu() for name, tensor in first.items()}
    assert_all_close(on_cpu, layer_value_and_grads(layer, x, dy), "CUDA against CPU")
    assert {tensor.device.type for tensor in tensors_of(case.build(device="cuda")).values()} == {"cuda"}
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype):
            y = twin.float()(x.float().cuda())
        assert y.dtype == dtype
        assert rms_error(y.cpu(), on_cpu["y"]) < 5e-2
