"""`selective_state_update` on Triton against plain torch, in place and trained through."""

import pytest
import torch
from torch.library import opcheck

from archzoo.kernels import use_backend
from archzoo.kernels.selective_state_update import selective_state_update, state_update
from tests.helpers import rms_error
from tests.kernels.triton_support import DTYPES, check_autocast, needs_triton, on_device, tolerance

pytestmark = needs_triton


@pytest.fixture
def triton():
    with on_device(), use_backend("triton"):
        yield


@pytest.fixture
def blocks(triton):
    """Several programs, and several turns over the states."""
    from archzoo.kernels._selective_state_update_triton import UPDATE

    with UPDATE.forced(CHANNELS=4, STATES=2):
        yield


def step(heads=None, groups=None, N=3, dtype=torch.float64, batch=2):
    """Arguments for 6 channels, or for heads of 3."""
    channels = (6,) if heads is None else (heads, 3)
    weights = (batch, N) if groups is None else (batch, groups, N)
    randn = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype)  # noqa: E731
    return {
        "state": randn(batch, *channels, N),
        "x": randn(batch, *channels),
        "dt": randn(batch, *channels),
        "A": -randn(*channels, N).exp(),
        "B": randn(*weights),
        "C": randn(*weights),
        "D": randn(*channels),
        "z": randn(batch, *channels),
        "dt_bias": randn(*channels),
    }


def both(arguments, softplus=True):
    """(out, state) of Triton, and of plain torch in float64."""
    results = []
    for backend, dtype in (("triton", None), ("torch", torch.float64)):
        own = {n: None if t is None else t.detach().clone().to(dtype or t.dtype) for n, t in arguments.items()}
        with use_backend(backend):
            results.append((selective_state_update(**own, dt_softplus=softplus), own["state"]))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(None, None), (None, 3), (2, None), (4, 2)], ids=str)
@pytest.mark.usefixtures("blocks")
def test_outputs_and_states(heads, groups, dtype):
    got, want = both(step(heads, groups, dtype=dtype))
    for out, truth in zip(got, want, strict=True):
        assert out.dtype == dtype
        assert rms_error(out, truth) <= tolerance(dtype, 0)


@pytest.mark.usefixtures("triton")
def test_options_sizes_and_mixed_dtypes():
    for N, batch in ((1, 1), (130, 2), (3, 0)):
        got, want = both({**step(N=N, batch=batch), "D": None, "z": None, "dt_bias": None}, softplus=False)
        assert all(rms_error(out, truth) < 1e-13 for out, truth in zip(got, want, strict=True))
    arguments = {n: t.bfloat16() for n, t in step(2, 1).items()}
    arguments = {**arguments, **{n: arguments[n].float() for n in ("state", "A", "D", "dt_bias")}}
    got, want = both(arguments)
    assert rms_error(got[0], want[0]) < 6e-3
    assert rms_error(got[1], want[1]) < 2e-6


@pytest.mark.usefixtures("blocks")
def test_strides_and_what_is_broadcast():
    """Mamba-2 has one step size and one decay for all channels and states of a head."""
    arguments = step(2, 1)
    state = torch.randn(2, 3, 3, 2, dtype=torch.float64).permute(0, 3, 2, 1)
    arguments = {**arguments, "state": state, "A": arguments["A"][:, :1, :1], "dt": arguments["dt"][:, :, :1]}
    arguments = {**arguments, "D": arguments["D"][:, :1], "dt_bias": None}
    full = {n: None if t is None else t.clone() for n, t in arguments.items()}
    full["A"], full["dt"] = full["A"].expand(2, 3, 3), full["dt"].expand(2, 2, 3)
    full["D"] = full["D"].expand(2, 3)
    (_, _), (want, last) = both(full)
    out = state_update(*arguments.values(), True)
    assert rms_error(out, want) < 1e-13
    assert rms_error(state, last) < 1e-13
    with pytest.raises(ValueError, match=r"state of strides \(0, 9, 3, 1\): must be memory of its own"):
        state_update(*{**arguments, "state": state.contiguous()[:1].expand(2, 2, 3, 3)}.values(), True)


@pytest.mark.usefixtures("blocks")
def test_nan_stays_in_its_channel():
    arguments = step()
    arguments["x"][1, 2] = torch.nan
    (out, state), _ = both(arguments)
    assert out.isnan().sum() == 1
    assert state.isnan().sum() == 3


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.usefixtures("triton")
def test_steps_can_be_trained_through(heads):
    gradients = []
    arguments = step(heads, N=2)
    for backend in ("triton", "torch"):
        leaves = {n: t.clone().requires_grad_() for n, t in arguments.items()}
        state = leaves["state"].clone()
        given = {**leaves, "state": state}
        with use_backend(backend):
            total = sum(selective_state_update(**given, dt_softplus=True).sin().sum() for _ in range(2))
        gradients.append(torch.autograd.grad(total + state.square().sum(), list(leaves.values())))
    for name, got, want in zip(arguments, *gradients, strict=True):
        assert rms_error(got, want) < 1e-12, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
@pytest.mark.usefixtures("triton")
def test_opcheck():
    opcheck(torch.ops.archzoo.selective_state_update, (*step(dtype=torch.float32).values(), True))


@pytest.mark.usefixtures("triton")
def test_compile_export_and_autocast():
    """One op in the graph, that writes into the state; training takes the scan."""
    arguments = {n: t for n, t in step(dtype=torch.float32).items() if n not in ("D", "z", "dt_bias")}
    inputs, graphs = tuple(arguments.values()), []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    state, other = inputs[0].clone(), inputs[0].clone()
    got = torch.compile(selective_state_update, fullgraph=True, backend=backend)(state, *inputs[1:])
    torch._dynamo.reset()
    assert torch.equal(got, selective_state_update(other, *inputs[1:]))
    assert torch.equal(state, other)
    ops = [str(n.target) for n in graphs[0].graph.nodes if "archzoo" in str(n.target)]
    assert [op.split(".")[1] for op in ops] == ["selective_state_update"]

    class Step(torch.nn.Module):
        def forward(self, *tensors):
            return selective_state_update(*tensors)

    program = torch.export.export(Step(), inputs).module()
    state = inputs[0].clone()
    with use_backend("torch"):  # the graph holds the choice
        assert torch.equal(program(state, *inputs[1:]), got)
    assert torch.equal(state, other)
    check_autocast(lambda state, *rest: selective_state_update(state.clone(), *rest), inputs, torch.randn_like(got))


@pytest.mark.usefixtures("triton")
def test_what_triton_cannot_do_is_refused():
    arguments = step()
    with pytest.raises(RuntimeError, match=r"selective_state_update: a torch\.func transform has no Triton kernel"):
        torch.func.grad(lambda x: selective_state_update(**{**arguments, "x": x}).sum())(arguments["x"])
    with pytest.raises(ValueError, match=r"B of torch\.float8_e4m3fn: must be float16"):
        selective_state_update(**{**arguments, "B": arguments["B"].to(torch.float8_e4m3fn)})
