"""How few numbers an op on a GPU leaves to plain torch: the choice, what a graph holds of it, and how it is measured.

A CPU stands in for the GPU: with `gpu`, what no context chooses goes to Triton, as a CUDA tensor does.
"""

import json

import pytest
import torch
from torch import nn

from archzoo.kernels import _backend, _threshold_problems, _thresholds, basis_linear, tune_thresholds, use_backend
from archzoo.kernels import selective_state_update as update
from archzoo.kernels._threshold_problems import PROBLEMS, WITHOUT_BACKWARD, Draw
from archzoo.kernels.nmu_product import nmu_product
from archzoo.kernels.normalized_residual import normalized_residual
from tests.kernels.triton_support import needs_triton, on_device

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """Gives a function that sets the table."""
    for module in (_backend, basis_linear, update):
        monkeypatch.setattr(module, "wants_triton", lambda x: _backend._chosen[0] != "torch")
    monkeypatch.setattr(_thresholds, "_capability", lambda device: 90)
    with on_device():
        yield lambda **table: monkeypatch.setattr(_thresholds, "_table", table)


@pytest.fixture
def passes(monkeypatch):
    """The passes of `normalized_residual` that Triton's kernels did."""
    kernels, done = pytest.importorskip("archzoo.kernels._normalized_residual_triton"), []
    for name in ("forward", "backward"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    return done


# --- The choice -------------------------------------------------------------------------------------------------------


@needs_triton
def test_below_its_threshold_an_op_takes_torch_both_ways_unless_somebody_insists(gpu, passes):
    def run(rows):
        passes.clear()
        h = torch.randn(rows, 8, requires_grad=True)
        normalized_residual(h, torch.randn(rows, 8), torch.rand(8)).sum().backward()
        return list(passes)

    kernels = ["forward", "backward"]
    gpu()
    assert run(1) == kernels
    gpu(normalized_residual={"sm80": 1000}, rational={"sm90": 1000})
    assert run(1) == kernels
    gpu(normalized_residual={"sm90": 0})
    assert run(1) == kernels
    gpu(normalized_residual={"sm90": 24})
    assert run(2) == []
    assert run(3) == kernels
    assert run(2) == []
    with use_backend("triton"):
        assert run(2) == kernels
    with use_backend("torch"):
        assert run(3) == []


@needs_triton
def test_a_backward_goes_where_its_forward_went(gpu, passes):
    gpu(normalized_residual={"sm90": 24})
    h = torch.randn(2, 8, requires_grad=True)
    y = normalized_residual(h, torch.randn(2, 8), torch.rand(8))
    gpu()
    y.sum().backward()
    assert passes == []


def test_what_no_kernel_takes_is_refused_at_every_size(gpu):
    gpu(normalized_residual={"sm90": 1000})
    h = torch.randn(2, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8_e4m3fn: must be float16"):
        normalized_residual(h, h, torch.rand(8))


def test_a_device_that_is_not_there_has_no_threshold(monkeypatch):
    monkeypatch.setattr(_thresholds, "_table", {"op": {"sm90": 1000}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from archzoo.kernels import _block_sizes

    _block_sizes._capability_of_gpu.cache_clear()
    with torch._subclasses.FakeTensorMode():
        assert not _thresholds.is_below("op", None, torch.empty(1, device="cuda:0"))
    _block_sizes._capability_of_gpu.cache_clear()


def test_every_op_counts_what_its_problem_says(gpu, monkeypatch):
    seen = set()
    monkeypatch.setattr(
        _backend, "is_below", lambda op, numbers, x: seen.add((op, x.numel() if numbers is None else numbers)) or True
    )
    for op, make in PROBLEMS.items():
        seen.clear()
        function, tensors = make(Draw(torch.empty(0).device), 2**12)
        _thresholds._passes(function, tensors, op not in WITHOUT_BACKWARD)()
        ((name, numbers),) = seen
        assert name == op
        assert 7 / 8 * 2**12 <= numbers <= 2**12, op
    assert {op.partition(":")[0] for op in PROBLEMS} == set(_thresholds.COUNTED)


def test_the_committed_table_is_of_ops_that_there_are():
    table = json.loads(_thresholds.TABLE.read_text())
    assert set(table) <= set(PROBLEMS)
    assert all(key.startswith("sm") and below >= 0 for entries in table.values() for key, below in entries.items())


# --- Graphs -----------------------------------------------------------------------------------------------------------


def graphs(sizes, dynamic, function=nmu_product):
    """Of each graph made for x of so many rows whether it holds Triton, and its guards on sizes."""
    found, w = [], torch.rand(6, 5)

    def backend(graph, examples):
        (node,) = (node for node in graph.graph.nodes if "archzoo" in str(node.target))
        shapes = torch._guards.detect_fake_mode(examples).shape_env
        found.append((node.args[-1], {str(guard.expr) for guard in shapes.guards}))
        return lambda *inputs: (w,)  # nothing need run

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in sizes:
        compiled(torch.rand(rows, 5), w)
    torch._dynamo.reset()
    return found


@needs_triton
def test_a_compiled_graph_has_one_guard_for_it_and_none_without_an_entry(gpu):
    gpu()
    ((triton, others),) = graphs([2, 9, 2], True)
    assert triton is True
    for table in ({"sm80": 90}, {"sm90": 0}):
        gpu(nmu_product=table)
        assert graphs([2, 9, 2], True) == [(True, others)]
    gpu(nmu_product={"sm90": 90})
    (small, below), (large, above) = graphs([2, 9, 2, 3], True)
    assert (small, large) == (False, True)
    assert len(below - others) == len(above - others) == 1
    assert graphs([2, 3], False) == [(False, set()), (True, set())]


@needs_triton
def test_sizes_that_only_the_data_tell_take_triton(gpu):
    gpu(nmu_product={"sm90": 90})
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        ((triton, _),) = graphs([4], True, lambda x, w: nmu_product(x[x[:, 0] > 0.5], w))
    assert triton is True


@needs_triton
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_graph_takes_torch_only_if_all_its_sizes_are_below(gpu, strict):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.rand(6, 5))

        def forward(self, x):
            return nmu_product(x, self.w)

    def holds_triton(rows, dimension):
        shapes = None if dimension is None else {"x": {0: dimension}}
        exported = torch.export.export(Module(), (torch.rand(rows, 5),), dynamic_shapes=shapes, strict=strict)
        (node,) = (node for node in exported.graph.nodes if "archzoo" in str(node.target))
        return node.args[-1] is True  # False is the default, and left out

    gpu(nmu_product={"sm90": 90})
    assert [holds_triton(rows, None) for rows in (2, 3)] == [False, True]
    assert [holds_triton(rows, torch.export.Dim("rows")) for rows in (2, 3)] == [True, True]
    assert not holds_triton(2, torch.export.Dim("rows", max=2))


# --- Measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins_from", "threshold"), [(0, 0), (12, 0), (13, 2**13), (17, 2**17), (24, 2**24), (25, 2**25), (30, 2**25)]
)
def test_the_crossing_is_found_by_bisection(wins_from, threshold):
    tried = []
    assert _thresholds.crossing(lambda n: (tried.append(n), n < wins_from)[1]) == threshold
    assert len(tried) == len(set(tried)) <= 5
    assert all(12 <= n <= 24 for n in tried)


@pytest.fixture
def clock(monkeypatch):
    """A device on which torch takes a second a number, and Triton as long at any size: 2^14 s, for another op none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_backend, "HAS_TRITON", True)
    monkeypatch.setattr(_thresholds, "_capability", lambda device: 90)
    monkeypatch.setattr(_thresholds, "_seconds", lambda call: call())
    monkeypatch.setattr(_threshold_problems, "Draw", lambda device: None)
    times = {"op": 2**14, "other": 0}

    def maker(op):
        return lambda draw, n: (lambda: times[op] if _backend._chosen[0] == "triton" else n, ())

    monkeypatch.setattr(_threshold_problems, "PROBLEMS", {op: maker(op) for op in times})
    monkeypatch.setattr(_threshold_problems, "WITHOUT_BACKWARD", tuple(times))


@pytest.mark.usefixtures("clock")
def test_tune_thresholds_writes_the_crossings(tmp_path):
    path = tmp_path / "table.json"
    path.write_text('{"op": {"sm80": 7, "sm90": 8}}')
    assert tune_thresholds("other", path=path) == {"op": {"sm80": 7, "sm90": 8}, "other": {"sm90": 0}}
    table = tune_thresholds(path=path)
    assert table == json.loads(path.read_text()) == {"op": {"sm80": 7, "sm90": 2**14}, "other": {"sm90": 0}}
    assert tune_thresholds("op", path=tmp_path / "new.json").items() >= {"op": {"sm90": 2**14}}.items()
    threshold, tried = _thresholds.measure("op", CPU)
    assert threshold == 2**14
    assert tried[2**13] == {"torch": 2**13, "triton": 2**14}
    with pytest.raises(ValueError, match=r"ops=\['relu'\]: must be among op, other"):
        tune_thresholds("relu", path=path)


def test_tune_thresholds_says_that_it_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="measures on a CUDA device, and there is none"):
        tune_thresholds()


@pytest.mark.parametrize(("seconds", "calls"), [(1e-4, 2 + 1 + 5 * 20), (1e-3, 2 + 1 + 5 * 5), (1.0, 2 + 1 + 5)])
def test_a_call_is_timed_in_a_row_of_calls_and_the_least_of_some_rounds_counts(monkeypatch, seconds, calls):
    now, made, waits = [0.0], [], []

    def call():
        made.append(1)
        now[0] += seconds * (1 + (len(made) < 4))  # slow at first

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(_thresholds.time, "perf_counter", lambda: now[0])
    assert _thresholds._seconds(call, enough=10.001e-3) == pytest.approx(seconds)
    assert len(made) == calls
    assert len(waits) == 2 * (1 + 1 + 5)


def test_passes_are_forward_and_backward():
    x = torch.rand(3)
    (gradient,) = _thresholds._passes(lambda x: x * x, (x,), True)()
    assert torch.equal(gradient, 2 * x)
    assert torch.equal(_thresholds._passes(lambda x: x * x, (x.detach(),), False)(), x * x)
