"""The cases of `python -m benchmarks gpu` and `cpu`: contestants agree, floors are right, failures are told."""

import dataclasses
import functools
import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from archzoo.kernels.causal_conv1d import causal_conv1d_reference
from archzoo.kernels.rational import rational_reference
from archzoo.kernels.selective_scan import selective_scan_reference
from archzoo.kernels.ssd import ssd_reference
from benchmarks import _cases, _measure
from benchmarks._cases import H200, Contestant, Peer
from benchmarks._measure import DEFINITION, OURS, Device, disagreement, measure, planned_floors, values
from benchmarks._ops import OPS
from tests.helpers import sampled

BY_NAME = {op.name: op for op in OPS}
PLACE = "cuda" if torch.cuda.is_available() else "cpu"


def timer(calls):
    """Runs everything once, and says that each took 1 ms but ours 2."""
    for call in calls.values():
        call()
    return {name: dict.fromkeys(("least", "p20", "p50", "p80"), 2.0 if name == OURS else 1.0) for name in calls}


def device(where="cpu", free=1e12):
    return Device(where, PLACE, timer, lambda call: (call(), 1000)[1], lambda: free)


@pytest.mark.parametrize("op", sampled(OPS, OPS[::2]), ids=lambda op: op.name)
def test_all_contestants_run_and_compute_one_function(op):
    row = measure(op, op.tiny, torch.float32, device())
    contestants = row["contestants"]
    passes = ["f_ms", "fb_ms"] if op.backward else ["f_ms"]
    assert {OURS, DEFINITION} <= contestants.keys()
    assert contestants.keys() >= {peer.name for peer in op.peers if "cpu" in peer.where}
    for name, found in contestants.items():
        if name == OURS or "yardstick" in found:
            assert all(key in found for key in passes)
        elif "missing" in found:  # a package of the extra `bench`
            assert "not importable" in found["missing"]
        else:
            assert found["difference"] < 1e-5, (name, found)
            assert all(key in found for key in passes)
    assert row["graph_breaks"] == 0, row["graph_break"]
    assert row["peak_bytes"] == 1000
    assert row["floor"]["f_ms"] > 0
    if op.backward:
        assert row["repeatable"]
        assert contestants[DEFINITION]["fb_ratio"] == 0.5


def test_floors_are_those_of_the_roofline_table():
    """To two digits; the sizes are the first ones, those of the goals."""
    known = {
        "selective_scan": (0.28, 0.39, "special functions", "fp32 pipe"),
        "basis_linear:spline": (0.59, 1.17, "tensor cores", "tensor cores"),
        "aptx_linear": (5.0, 5.8, "special functions", "fp32 pipe"),
        "nmu_product": (1.15, 3.5, "fp32 pipe", "fp32 pipe"),
        "paon_linear": (0.147, 0.294, "tensor cores", "tensor cores"),
        "rational": (0.018, 0.035, "memory", "fp32 pipe"),
        "capsule_routing": (0.133, 0.267, "memory", "memory"),
        "kron_linear": (0.35, 0.70, "tensor cores", "tensor cores"),
        "normalized_residual": (0.094, 0.156, "memory", "memory"),
    }
    for name, (forward, backward, binds_forward, binds_backward) in known.items():
        found = planned_floors(BY_NAME[name], BY_NAME[name].gpu[0], H200)
        assert found["f_ms"] == pytest.approx(forward, rel=0.03), name
        assert found["fb_ms"] - found["f_ms"] == pytest.approx(backward, rel=0.03), name
        assert (found["f_binds"], found["b_binds"]) == (binds_forward, binds_backward), name


def test_what_fails_differs_or_does_not_fit_is_told_and_not_timed():
    op = BY_NAME["rational"]

    def fails(inputs):
        raise OSError("no such kernel")

    peers = (
        _cases.function_peer("wrong", lambda x, a, b: rational_reference(x, a, b) * 1.1),
        Peer("broken", fails),
        Peer("large", fails, memory=lambda size, itemsize: 9e12),
        Peer("absent", fails, needs={"no_such_module.of_theirs": "a package"}),
        _cases.function_peer("nan", lambda x, a, b: rational_reference(x, a, b) / (x - x)),
    )
    row = measure(dataclasses.replace(op, peers=peers), op.tiny, torch.float32, device(), breaks=False)
    found = row["contestants"]
    assert "differs from ours: y by 1.0e-01" in found["wrong"]["error"]
    assert found["broken"] == {"error": "OSError: no such kernel"}
    assert found["large"]["skipped"].startswith("needs about 9e+03 GB")
    assert found["absent"]["missing"] == "not importable: no_such_module.of_theirs (of a package)"
    assert "differs" in found["nan"]["error"]
    assert not any("f_ms" in found[peer.name] for peer in peers)
    small = measure(op, op.tiny, torch.float32, device(free=10.0), breaks=False)["contestants"]
    assert small[DEFINITION].keys() == {"skipped"}
    assert "f_ms" in small[OURS]


def test_the_compiled_part_has_ours_and_the_definition_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # 15 s sooner
    op = BY_NAME["rational"]
    row = measure(op, op.tiny, torch.float32, device(), "compiled")
    assert row["contestants"].keys() == {OURS, "definition, compiled", "ours, compiled"}
    assert row["contestants"]["definition, compiled"]["fb_ratio"] == 0.5
    assert "peak_bytes" not in row


def test_graph_breaks_and_unrepeatable_gradients_are_seen():
    op = BY_NAME["rational"]
    shift = iter(range(1000))

    def breaks(x, a, b):
        torch._dynamo.graph_break()
        return rational_reference(x, a, b)

    inputs = op.build(op.tiny, PLACE, torch.float32)
    count, why = _measure.graph_breaks(dataclasses.replace(op, ours=breaks), inputs)
    assert count == 1
    assert "graph_break" in why or "Unsupported" in why
    assert not _measure.repeatable(op.contestant(lambda x, a, b: rational_reference(x, a, b) + next(shift), inputs))


def module(name, **contents):
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def cuda_scan(u, delta, A, B, C, D, z, bias, softplus):
    """As `selective_scan_cuda.fwd`: B and C (batch, 1, N, L); y before the gate, states, y behind it."""
    y = selective_scan_reference(u, delta, A, B, C, D, None, bias, softplus)
    return y, torch.zeros(()), y * F.silu(z)


def cuda_scan_backward(u, delta, A, B, C, D, z, bias, dout, x, out, dz, softplus, recompute):
    assert all(t.is_contiguous() for t in (u, delta, B, C, z, dout))
    leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, z, bias)]
    with torch.enable_grad():
        found = torch.autograd.grad(cuda_scan(*leaves, softplus)[2], leaves, dout)
    order = (0, 1, 2, 3, 4, 5, 7, 6)  # dz comes last
    return [found[i] for i in order]


def simple_gla(q, k, v, g, scale):
    """As fla's chunk_simple_gla: h_t = e^{g_t} h_{t-1} + k_t v_t^T, o_t = scale h_t^T q_t, (B, T, H, .)."""
    h, out = 0.0, []
    for t in range(q.shape[1]):
        h = g[:, t].exp()[..., None, None] * h + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out.append(torch.einsum("bhkv,bhk->bhv", h, q[:, t]) * scale)
    return torch.stack(out, 1), None


def mamba_ssd(x, dt, A, B, C, chunk_size, D, dt_bias, dt_softplus):
    return ssd_reference(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)


class RMSNorm:
    """As liger's LigerRMSNormFunction."""

    @staticmethod
    def apply(x, weight, eps, offset, casting_mode, in_place):
        assert x.is_contiguous()
        assert not in_place
        return F.rms_norm(x, x.shape[-1:], weight, eps)


class Rational:
    """As FlashKAT's and KAT's functions: x (batch, length, features)."""

    @staticmethod
    def apply(x, a, b, group=None):
        assert x.dim() == 3
        assert group in (None, len(b))
        return rational_reference(x, a, b)


FAKES = {
    ("selective_scan", "mamba-ssm"): {
        "selective_scan_cuda": module("selective_scan_cuda", fwd=cuda_scan, bwd=cuda_scan_backward)
    },
    ("causal_conv1d", "causal-conv1d"): {
        "causal_conv1d": module("causal_conv1d", causal_conv1d_fn=causal_conv1d_reference)
    },
    ("causal_conv1d", "flash-linear-attention"): {
        name: module(
            name,
            causal_conv1d=lambda x, weight, bias, activation: (
                causal_conv1d_reference(x.mT, weight, bias, activation).mT,
                None,
            ),
        )
        for name in ("fla", "fla.modules", "fla.modules.causal_conv1d", "fla.modules.causal_conv1d.ops")
    },
    ("ssd", "flash-linear-attention"): {
        name: module(name, chunk_simple_gla=simple_gla) for name in ("fla", "fla.ops", "fla.ops.simple_gla")
    },
    ("ssd", "mamba-ssm"): {
        name: module(name, mamba_chunk_scan_combined=mamba_ssd)
        for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined")
    },
    ("normalized_residual", "Liger"): {
        name: module(name, LigerRMSNormFunction=RMSNorm)
        for name in ("liger_kernel", "liger_kernel.ops", "liger_kernel.ops.rms_norm")
    },
    ("rational", "FlashKAT"): {
        name: module(name, FlashRationalTriton1DGroup=Rational)
        for name in ("rational_kat", "rational_kat.kernels", "rational_kat.kernels.flash_rational_triton")
    },
    ("rational", "rational_kat_cu"): {
        name: module(name, RationalTriton1DGroup=Rational)
        for name in ("rational_kat", "rational_kat.kernels", "rational_kat.kernels.rational_triton")
    },
}
"""Stand-ins for packages that run on a GPU alone, with their interfaces: what is tested is how we call them."""


@pytest.mark.parametrize(("name", "peer"), FAKES, ids=" ".join)
def test_packages_for_gpus_are_called_as_they_ask(name, peer, monkeypatch):
    op = BY_NAME[name]
    for path, fake in FAKES[name, peer].items():
        monkeypatch.setitem(sys.modules, path, fake)
    (chosen,) = (p for p in op.peers if p.name == peer)
    assert chosen.where == ("gpu",)
    inputs = op.build(op.tiny, "cpu", torch.float32)
    contestant = chosen.build(inputs)
    wanted = values(op.contestant(op.definition, inputs))
    assert contestant.leaves.keys() == wanted.keys() - {"y"}
    worst, wrong = disagreement(values(contestant), wanted)
    assert wrong is None
    assert worst < 1e-5


def test_submodules_are_imported_without_their_packages_start(tmp_path, monkeypatch):
    folder = tmp_path / "site" / "heavy_package" / "ops"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('needs the world')")
    (folder / "__init__.py").write_text("")
    (folder / "kernel.py").write_text("answer = 42")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert not _cases.importable("heavy_package.ops.kernel")
    _cases.add_peers(tmp_path)
    assert _cases.importable("heavy_package.ops.kernel")
    assert not _cases.importable("heavy_package.ops.nothing")
    assert _cases.submodule("heavy_package.ops.kernel").answer == 42
    for name in [name for name in sys.modules if name.startswith("heavy_package")]:
        del sys.modules[name]


def test_a_yardstick_is_timed_and_not_compared():
    op = BY_NAME["nmu_product"]
    other = Peer("sum", lambda x: Contestant(lambda: x["x"].sum(1), {"x": x["x"]}, yardstick=True))
    found = measure(dataclasses.replace(op, peers=(other,)), op.tiny, torch.float32, device(), breaks=False)
    assert found["contestants"]["sum"].keys() == {"yardstick", "f_ms", "f_ratio", "fb_ms", "fb_ratio"}
