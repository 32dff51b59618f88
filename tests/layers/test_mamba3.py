"""Facts of Mamba-3 alone: names, starts, the textbook forward, angles, states, packing, padding."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.layers.mamba3 import Mamba3
from tests.helpers import assert_all_close, layer_value_and_grads, rms_error

OFFICIAL = {  # of mamba_ssm.Mamba3(64, d_state=16, headdim=32, ngroups=2): d = 128, H = 4, S = 4
    "dt_bias": (4,),
    "B_bias": (4, 1, 16),
    "C_bias": (4, 1, 16),
    "D": (4,),
    "in_proj.weight": (2 * 128 + 2 * 2 * 16 + 3 * 4 + 4, 64),
    "B_norm.weight": (16,),
    "C_norm.weight": (16,),
    "out_proj.weight": (64, 128),
}
VARIANTS = [
    {},
    {"ngroups": 2, "is_outproj_norm": True, "A_floor": 0.9},
    {"rope_fraction": 1, "d_state": 5, "expand": 1.5},
]
D = torch.float64


def mamba3(dim=6, dtype=D, **options):
    torch.manual_seed(0)
    layer = Mamba3(dim, **{"d_state": 7, "headdim": 3, "chunk_size": 4, "dtype": dtype, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        layer.in_proj.weight *= 2  # decays, ends of intervals and angles that differ
        layer.dt_bias += 2
    return layer


def tokens(batch=2, length=9, dim=6, seed=1):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed), dtype=D)


def shapes(layer):
    return {name: tuple(t.shape) for name, t in layer.state_dict().items()}


def zeros(layer, batch=2):
    return layer.allocate_inference_cache(batch)


# --- Names and starts -------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_the_official_ones():
    official = {"d_state": 16, "headdim": 32, "ngroups": 2}
    assert shapes(Mamba3(64, **official)) == OFFICIAL
    assert shapes(Mamba3(64, is_outproj_norm=True, **official)) == {**OFFICIAL, "norm.weight": (128,)}
    all_turn = Mamba3(64, rope_fraction=1.0, **official)
    assert shapes(all_turn)["in_proj.weight"] == (OFFICIAL["in_proj.weight"][0] + 4, 64)
    odd = Mamba3(64, d_state=7)
    assert odd.num_angles == 1, "half of 7 is 3, the even part of which is one pair"


def test_default_sizes_are_those_of_the_authors():
    layer = Mamba3(768, device="meta")
    assert (layer.nheads, layer.headdim, layer.d_state, layer.ngroups, layer.chunk_size) == (24, 64, 128, 1, 64)
    assert shapes(layer)["in_proj.weight"] == (2 * 1536 + 2 * 128 + 3 * 24 + 32, 768)


def test_start():
    torch.manual_seed(0)
    layer = Mamba3(512, headdim=1)
    for parameter in (layer.D, layer.B_bias, layer.C_bias, layer.B_norm.weight, layer.C_norm.weight):
        assert torch.equal(parameter, torch.ones_like(parameter))
    dt = F.softplus(layer.dt_bias)
    assert 0.001 * 0.999 < dt.min() < 0.0012
    assert 0.09 < dt.max() < 0.1 * 1.001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.2), "even on a logarithmic scale"
    bound = 512**-0.5  # nn.Linear's
    assert 0.95 * bound < layer.in_proj.weight.abs().max() <= bound


def test_what_the_scan_reads_is_float32_at_least():
    wide = {"D", "dt_bias", "B_bias", "C_bias"}
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (D, D)):
        layer = Mamba3(8, dtype=dtype)
        assert {p.dtype for n, p in layer.named_parameters() if n in wide} == {expected}
        assert {p.dtype for n, p in layer.named_parameters() if n not in wide} == {dtype}
        assert layer(torch.ones(1, 3, 8, dtype=dtype)).dtype == dtype
        assert [state.dtype for state in zeros(layer)] == [expected] * 3 + [dtype]
    assert layer.no_weight_decay() == wide
    assert {state.dtype for state in layer.allocate_inference_cache(2, dtype=torch.float16)} == {torch.float16}


# --- The forward ------------------------------------------------------------------------------------------------------


class Textbook(nn.Module):
    """Mamba-3's forward as the paper writes it: token by token, in complex numbers where B and C turn."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, u):
        layer, (batch, length, _) = self.layer, u.shape
        d, H, P, G, N, S = (
            getattr(layer, n) for n in ("d_inner", "nheads", "headdim", "ngroups", "d_state", "num_angles")
        )
        z, x, B, C, dt, A, trap, angle = layer.in_proj(u).split([d, d, G * N, G * N, H, H, H, S], -1)
        x = x.reshape(batch, length, H, P)

        def of_heads(t, norm, bias):
            t = t.reshape(batch, length, G, N)
            t = t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
            return t.repeat_interleave(H // G, 2) + bias.squeeze(1)

        B, C = of_heads(B, layer.B_norm, layer.B_bias), of_heads(C, layer.C_norm, layer.C_bias)
        delta = F.softplus(dt + layer.dt_bias)
        A = -torch.where(A >= 0, 1 + A, 1 / (1 + A.abs())).clamp(min=layer.A_floor)
        theta = u.new_zeros(batch, H, S)
        h, B_before, x_before, ys = u.new_zeros(batch, H, P, N), u.new_zeros(batch, H, N), u.new_zeros(batch, H, P), []
        for t in range(length):
            theta = theta + math.pi * angle[:, t].tanh().unsqueeze(1) * delta[:, t].unsqueeze(-1)
            turn = torch.polar(torch.ones_like(theta), theta)

            def turned(v, turn=turn):
                pairs = torch.view_as_complex(v[..., : 2 * S].unflatten(-1, (S, 2)).contiguous()) * turn
                return torch.cat([torch.view_as_real(pairs).flatten(-2), v[..., 2 * S :]], -1)

            B_t, C_t = turned(B[:, t]), turned(C[:, t])
            alpha, share = (A[:, t] * delta[:, t]).exp(), trap[:, t].sigmoid()
            beta, gamma = (1 - share) * delta[:, t] * alpha, share * delta[:, t]
            h = torch.einsum("bh,bhpn->bhpn", alpha, h) + torch.einsum("bh,bhp,bhn->bhpn", beta, x_before, B_before)
            h = h + torch.einsum("bh,bhp,bhn->bhpn", gamma, x[:, t], B_t)
            ys.append(torch.einsum("bhpn,bhn->bhp", h, C_t) + layer.D[:, None] * x[:, t])
            B_before, x_before = B_t, x[:, t]
        y = torch.stack(ys, 1)
        if layer.norm is not None:
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight.view(H, P)
        return layer.out_proj(y.flatten(2) * F.silu(z))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_forward_and_gradients_are_the_textbooks(options):
    layer, x = mamba3(**options), tokens()
    truth = {name.removeprefix("layer."): t for name, t in layer_value_and_grads(Textbook(layer), x).items()}
    assert_all_close(layer_value_and_grads(layer, x), truth, "Mamba3")


def test_the_decay_has_a_slope_of_one_at_its_kink():
    """Two clamps, as in the authors' code, pass the gradient on twice where what they map is 0, or not at all."""
    layer, x = mamba3(), tokens()
    end = layer.nheads + layer.num_angles  # behind those of A come the rows of trap and of the angles
    rows = slice(-layer.nheads - end, -end)

    def gradient(weight):
        with torch.no_grad():
            layer.in_proj.weight[rows] = weight
        return layer_value_and_grads(layer, x)["in_proj.weight"][rows]

    assert rms_error(gradient(0), gradient(1e-9)) < 1e-6
    assert gradient(0).abs().min() > 1e-6


def test_chunk_size_changes_nothing():
    x, want = tokens(), mamba3()(tokens())
    for chunk_size in (1, 5, 256):
        assert rms_error(mamba3(chunk_size=chunk_size)(x), want) < 1e-13


def test_a_state_that_turns_counts_ones_modulo_two():
    """Parity by hand: a one turns the state by pi, and it hardly decays; the sign of the output is the answer."""
    layer = Mamba3(3, d_state=4, expand=1, headdim=1, A_floor=1e-6, dtype=D)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        z, x, _, _, _, A, trap, angle = layer.in_proj.weight.split([3, 3, 4, 4, 3, 3, 3, 1])
        angle[0, 0], x[0, 1] = 20, 1  # features: the bit, whether the sequence begins, and 1
        z[:, 2], A[:, 2], trap[:, 2] = 10, -1e7, 40
        layer.dt_bias.fill_(math.log(math.e - 1))  # steps of 1
        layer.B_bias[:, :, 0], layer.C_bias[:, :, 0] = 1, 1
        layer.out_proj.weight.fill_(1)
    bits = torch.randint(2, (4, 100), generator=torch.Generator().manual_seed(0))
    begins = F.one_hot(torch.zeros(4, dtype=torch.int64), 100)
    y = layer(torch.stack([bits, begins, torch.ones_like(bits)], -1).to(D))
    odd = (bits[:, 1:].cumsum(1) % 2).bool()  # of the ones behind the first token, whose B has turned as far as its C
    assert torch.equal(y[:, 1:, 0] < 0, odd)
    assert y.abs().min() > 1


def test_autocast_keeps_the_state_in_float32():
    layer, x = mamba3(dtype=torch.float32), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, return_state=True)
        states = zeros(layer)
        steps = torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)
    assert y.dtype == torch.bfloat16
    assert [part.dtype for part in state] == [torch.float32] * 3 + [torch.bfloat16]
    assert rms_error(y, layer(x)) < 3e-2
    assert rms_error(steps, y) < 1e-2


def test_angles_stay_in_one_turn():
    angles = mamba3()(tokens(), return_state=True)[1][0]
    assert angles.min() >= 0
    assert angles.max() < 2 * math.pi


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_state": 0}, "d_state=0"),
        ({"d_state": 3}, "d_state=3.*4 or more"),
        ({"d_state": 1, "rope_fraction": 1}, "d_state=1.*2 or more"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"expand": 0}, "expand=0"),
        ({"expand": 0.01}, "expand=0.01.*no channel"),
        ({"headdim": 5}, "headdim=5.*divisor of.*16"),
        ({"ngroups": 0}, "ngroups=0"),
        ({"ngroups": 3, "headdim": 4}, "ngroups=3.*4 heads"),
        ({"rope_fraction": 0.25}, "rope_fraction=0.25"),
        ({"A_floor": 0}, "A_floor=0"),
        ({"dt_min": 0.2}, "dt_min=0.2, dt_max=0.1"),
        ({"dt_init_floor": -1.0}, "dt_init_floor=-1.0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba3(8, **options)


def test_arguments_that_do_not_fit_are_refused():
    layer, x = mamba3(), tokens()
    states = zeros(layer)
    for arguments, words in (
        ({"seq_idx": torch.zeros(2, 8, dtype=torch.int64)}, "seq_idx of shape"),
        ({"mask": torch.ones(9)}, "mask of shape"),
        *(({"state": (*states[:i], states[i][:1], *states[i + 1 :])}, rf"state\[{i}\] of shape") for i in range(4)),
    ):
        with pytest.raises(ValueError, match=words):
            layer(x, **arguments)
    with pytest.raises(ValueError, match="token of shape.*dim=6"):
        layer.step(x, *states)
    for i, name in enumerate(("theta", "h", "B_before", "x_before")):
        with pytest.raises(ValueError, match=f"{name} of shape"):
            layer.step(x[:, :1], *states[:i], states[i][:1], *states[i + 1 :])
    with pytest.raises(ValueError, match="float32"):
        layer.step(x[:, :1].float(), *states)


def test_repr_shows_what_differs():
    text = repr(Mamba3(64, headdim=16, ngroups=2, rope_fraction=1))
    assert "64, d_state=128, expand=2, headdim=16, ngroups=2, rope_fraction=1" in text
    assert "ngroups" not in repr(Mamba3(64))
