"""Problems of `selective_scan`, and what is checked of a solution; for the tests of plain torch and of Triton."""

import torch

from tests.helpers import rms_error

OPTIONS = ("D", "z", "delta_bias", "delta_softplus", "initial_state", "seq_idx")


def problem(
    batch=2, d=6, N=3, L=20, options=OPTIONS, B="varying", C="varying", seed=0, channel_last=True, decay=(-4.0, -0.1)
):
    """Arguments in float64. With `delta_softplus` or without, step sizes are positive: from 0.2 to 1.8."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def sequence():
        return randn(batch, L, d).mT if channel_last else randn(batch, d, L)

    def weights(how):
        if how == "constant":
            return randn(d, N)
        return randn(batch, N, L) if how == "varying" else randn(batch, how, N, L)

    softplus = "delta_softplus" in options
    low, high = decay
    magnitude = torch.exp(uniform(d, N) * torch.tensor(high / low).log() + torch.tensor(-low).log())
    delta = 0.2 + 1.6 * uniform(batch, L, d).mT
    arguments = {
        "u": sequence(),
        "delta": torch.log(torch.expm1(delta)) if softplus else delta,
        "A": -magnitude,
        "B": weights(B),
        "C": weights(C),
    }
    optional = {
        "D": randn(d),
        "z": sequence(),
        "delta_bias": 0.1 * uniform(d),
        "delta_softplus": True,
        "initial_state": randn(batch, d, N),
        "seq_idx": (uniform(batch, L) < 0.1).cumsum(1),
    }
    return {**arguments, **{name: optional[name] for name in options}}


def to(arguments, dtype):
    return {
        n: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()
    }


def value_and_grads(function, arguments, seed=9, through=(True, True)):
    """Output, last state, and the gradient of every argument, by name."""
    leaves = {
        name: t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for name, t in arguments.items()
    }
    out, last = function(**leaves, return_last_state=True)
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, last)]
    pairs = [(t, dt) for t, dt, used in zip((out, last), cotangents, through, strict=True) if used]
    wanted = {n: t for n, t in leaves.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    grads = torch.autograd.grad(
        [t for t, _ in pairs], list(wanted.values()), [dt for _, dt in pairs], allow_unused=True, materialize_grads=True
    )
    return {"out": out.detach(), "last": last.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_close(got, truth, bound):
    assert got.keys() == truth.keys()
    errors = {name: rms_error(got[name], truth[name]) for name in truth if truth[name].abs().sum() > 0}
    assert all(error <= bound for error in errors.values()), errors
    assert all((got[name] == 0).all() for name in truth.keys() - errors.keys())


def in_op_layout(arguments):
    B, C = (
        t if t.dim() == 2 else (t[:, None] if t.dim() == 3 else t).permute(0, 3, 1, 2)
        for t in (arguments["B"], arguments["C"])
    )
    z = arguments.get("z")
    return (
        arguments["u"].mT,
        arguments["delta"].mT,
        arguments["A"],
        B,
        C,
        arguments.get("D"),
        None if z is None else z.mT,
        arguments.get("delta_bias"),
        arguments.get("initial_state"),
        arguments.get("seq_idx"),
    )
