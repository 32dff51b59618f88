"""Facts of Mamba-2 alone: names, starts, the textbook forward, the gated norm, states, packing, padding, its block."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.kernels.ssd import ssd_reference
from archzoo.layers.mamba import MambaBlock
from archzoo.layers.mamba2 import GatedRMSNorm, Mamba2
from tests.helpers import assert_all_close, layer_value_and_grads, rms_error

OFFICIAL = {  # of mamba_ssm.Mamba2(64, d_state=16, headdim=32, ngroups=2): d = 128, H = 4, 2 d + 2 G N + H = 324
    "dt_bias": (4,),
    "A_log": (4,),
    "D": (4,),
    "in_proj.weight": (324, 64),
    "conv1d.weight": (192, 1, 4),
    "conv1d.bias": (192,),
    "norm.weight": (128,),
    "out_proj.weight": (64, 128),
}
VARIANTS = [
    {},
    {"ngroups": 2, "headdim": 3, "norm_before_gate": True},
    {"rmsnorm": False, "D_has_hdim": True},
    {"bias": True, "conv_bias": False, "d_conv": 2, "expand": 1.5, "dt_limit": (0.01, 0.02)},
]


def mamba2(dim=6, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = Mamba2(dim, **{"d_state": 4, "headdim": 3, "chunk_size": 4, "dtype": dtype, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def tokens(batch=2, length=9, dim=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, dim, generator=generator, dtype=torch.float64)


def shapes(layer):
    return {name: tuple(t.shape) for name, t in layer.state_dict().items()}


# --- Names and starts -------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_the_official_ones():
    official = {"d_state": 16, "headdim": 32, "ngroups": 2}
    assert shapes(Mamba2(64, **official)) == OFFICIAL
    with_biases = {**OFFICIAL, "in_proj.bias": (324,), "out_proj.bias": (64,)}
    assert shapes(Mamba2(64, bias=True, **official)) == with_biases
    assert shapes(Mamba2(64, D_has_hdim=True, **official)) == {**OFFICIAL, "D": (128,)}
    for option, missing in (("conv_bias", "conv1d.bias"), ("rmsnorm", "norm.weight")):
        assert shapes(Mamba2(64, **{option: False}, **official)) == {n: s for n, s in OFFICIAL.items() if n != missing}


def test_default_sizes_are_those_of_the_released_models():
    """state-spaces/mamba2-130m: d_model 768, 24 layers; and its number of parameters, without head and norms."""
    layer = Mamba2(768, device="meta")
    assert (layer.nheads, layer.headdim, layer.d_state, layer.ngroups, layer.chunk_size) == (24, 64, 128, 1, 64)
    assert shapes(layer)["in_proj.weight"] == (2 * 1536 + 2 * 128 + 24, 768)
    assert 50288 * 768 + 24 * (sum(p.numel() for p in layer.parameters()) + 768) + 768 == 128_989_632


@pytest.mark.parametrize(("dim", "headdim"), [(32, 64), (96, 64), (16, 8), (48, 8), (5, 1)])
def test_a_layer_of_any_width_has_several_heads(dim, headdim):
    layer = Mamba2(dim)
    assert layer.headdim == headdim
    assert layer.nheads * headdim == 2 * dim
    assert layer.nheads > 1 or dim == 32


def test_start():
    torch.manual_seed(0)
    layer = Mamba2(512, headdim=1)
    A = layer.A_log.exp()
    assert 1 <= A.min() < 1.2
    assert 15.8 < A.max() <= 16.001
    assert A.mean().item() == pytest.approx(8.5, abs=0.4), "even"
    assert torch.equal(layer.D, torch.ones_like(layer.D))
    assert torch.equal(layer.norm.weight, torch.ones_like(layer.norm.weight))
    dt = F.softplus(layer.dt_bias)
    assert 0.001 * 0.999 < dt.min() < 0.0012
    assert 0.09 < dt.max() < 0.1 * 1.001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.2), "even on a logarithmic scale"
    bound = 512**-0.5  # nn.Linear's
    assert 0.95 * bound < layer.in_proj.weight.abs().max() <= bound
    own = Mamba2(64, headdim=8, A_init_range=(2, 2), dt_min=0.2, dt_max=0.2)
    assert torch.allclose(own.A_log, torch.tensor(2.0).log())
    assert torch.allclose(F.softplus(own.dt_bias), torch.tensor(0.2))
    assert torch.allclose(F.softplus(Mamba2(64, headdim=8, dt_init_floor=0.3).dt_bias), torch.tensor(0.3))


def test_decay_skip_and_step_sizes_are_float32_at_least():
    wide = {"A_log", "D", "dt_bias"}
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        layer = Mamba2(8, dtype=dtype)
        assert {layer.A_log.dtype, layer.D.dtype, layer.dt_bias.dtype} == {expected}
        assert {p.dtype for n, p in layer.named_parameters() if n not in wide} == {dtype}
        assert layer(torch.ones(1, 3, 8, dtype=dtype)).dtype == dtype
        assert [state.dtype for state in layer.allocate_inference_cache(1)] == [dtype, expected]
    assert layer.no_weight_decay() == wide


# --- The forward ------------------------------------------------------------------------------------------------------


class Textbook(nn.Module):
    """Mamba-2's forward, with torch's own convolution and the definition of the scan."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, h):
        layer, (batch, length, _) = self.layer, h.shape
        d, H, P, GN = layer.d_inner, layer.nheads, layer.headdim, layer.ngroups * layer.d_state
        z, xBC, dt = layer.in_proj(h).split([d, d + 2 * GN, H], -1)
        xBC = F.silu(layer.conv1d(xBC.mT)[..., :length]).mT
        x, B, C = xBC.split([d, GN, GN], -1)
        y = ssd_reference(
            x.reshape(batch, length, H, P),
            F.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit),
            -layer.A_log.exp(),
            B.reshape(batch, length, layer.ngroups, -1),
            C.reshape(batch, length, layer.ngroups, -1),
            D=layer.D.reshape(H, -1).expand(H, P),
        ).flatten(2)
        if layer.norm is None:
            return layer.out_proj(y * F.silu(z))
        if not layer.norm.norm_before_gate:
            y = y * F.silu(z)
        groups = y.reshape(batch, length, layer.ngroups, -1)
        y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * layer.norm.weight
        return layer.out_proj(y * F.silu(z) if layer.norm.norm_before_gate else y)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_forward_and_gradients_are_the_textbooks(options):
    layer, x = mamba2(**options), tokens()
    truth = {name.removeprefix("layer."): t for name, t in layer_value_and_grads(Textbook(layer), x).items()}
    assert_all_close(layer_value_and_grads(layer, x), truth, "Mamba2")


def test_chunk_size_changes_nothing():
    x, want = tokens(), mamba2()(tokens())
    for chunk_size in (1, 5, 256):
        assert rms_error(mamba2(chunk_size=chunk_size)(x), want) < 1e-13


def test_gated_norm_has_a_scale_a_group():
    norm = GatedRMSNorm(6, groups=2, dtype=torch.float64)
    y, z = tokens(), tokens(seed=2)
    out = norm(100 * y, z).unflatten(-1, (2, 3))
    assert torch.allclose(out.square().mean(-1), torch.ones((), dtype=torch.float64), atol=1e-3)
    scaled = torch.cat([y[..., :3] * 1000, y[..., 3:]], -1)
    assert rms_error(norm(scaled, z)[..., 3:], norm(y, z)[..., 3:]) == 0
    with pytest.raises(ValueError, match="groups=4.*dim=6"):
        GatedRMSNorm(6, groups=4)


def test_autocast_keeps_the_state_in_float32():
    layer, x = mamba2(dtype=torch.float32), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, (conv_state, ssm_state) = layer(x, return_state=True)
        states = layer.allocate_inference_cache(2)
        steps = torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)
    assert (y.dtype, conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert states[1].dtype == torch.float32
    assert rms_error(y, layer(x)) < 2e-2
    assert rms_error(steps, y) < 1e-2


# --- The block --------------------------------------------------------------------------------------------------------


def test_block_holds_either_mixer():
    torch.manual_seed(0)
    block, x = MambaBlock(6, mixer="mamba2", d_state=4, dtype=torch.float64), tokens()
    assert isinstance(block.mixer, Mamba2)
    assert block.no_weight_decay() == {"mixer.A_log", "mixer.D", "mixer.dt_bias"}
    y, state = block(x, return_state=True)
    assert rms_error(y, x + block.mixer(F.rms_norm(x, (6,), block.norm.weight, 1e-5))) < 1e-14
    states = block.allocate_inference_cache(2)
    steps = torch.cat([block.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)
    assert rms_error(steps, y) < 1e-12
    assert all(rms_error(a, b) < 1e-12 for a, b in zip(states, state, strict=True))
    with pytest.raises(ValueError, match="mixer='mamba3'.*'mamba', 'mamba2'"):
        MambaBlock(6, mixer="mamba3")


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_state": 0}, "d_state=0"),
        ({"d_conv": 0}, "d_conv=0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"expand": 0}, "expand=0"),
        ({"expand": 0.01}, "expand=0.01.*no channel"),
        ({"headdim": 0}, "headdim=0"),
        ({"headdim": 5}, "headdim=5.*divisor of.*16"),
        ({"ngroups": 0}, "ngroups=0"),
        ({"ngroups": 3, "headdim": 4}, "ngroups=3.*4 heads"),
        ({"A_init_range": (0, 1)}, r"A_init_range=\(0, 1\)"),
        ({"A_init_range": (2, 1)}, r"A_init_range=\(2, 1\)"),
        ({"A_init_range": (1, 2, 3)}, r"A_init_range=\(1, 2, 3\)"),
        ({"A_init_range": 16}, "A_init_range=16"),
        ({"dt_min": 0.2}, "dt_min=0.2, dt_max=0.1"),
        ({"dt_init_floor": -1.0}, "dt_init_floor=-1.0"),
        ({"dt_limit": (1, 0)}, r"dt_limit=\(1, 0\)"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba2(8, **options)


def test_arguments_that_do_not_fit_are_refused():
    layer, x = mamba2(), tokens()
    states = layer.allocate_inference_cache(2)
    for arguments, words in (
        ({"seq_idx": torch.zeros(2, 8, dtype=torch.int64)}, "seq_idx of shape"),
        ({"mask": torch.ones(9)}, "mask of shape"),
        ({"state": (states[0][:1], states[1])}, r"state\[0\] of shape"),
        ({"state": (states[0], states[1][:1])}, r"state\[1\] of shape"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(x, **arguments)
    with pytest.raises(ValueError, match="token of shape.*dim=6"):
        layer.step(x, *states)
    with pytest.raises(ValueError, match="conv_state of shape"):
        layer.step(x[:, :1], states[0][:1], states[1])
    with pytest.raises(ValueError, match="ssm_state of shape"):
        layer.step(x[:, :1], states[0], states[1][:1])
    with pytest.raises(ValueError, match="float32"):
        layer.step(x[:, :1].float(), *states)


def test_repr_shows_what_differs():
    text = repr(Mamba2(64, headdim=16, ngroups=2, dt_limit=[0.0, 1.0]))
    assert "64, d_state=128, d_conv=4, expand=2, headdim=16, ngroups=2, dt_limit=(0.0, 1.0)" in text
    assert "ngroups" not in repr(Mamba2(64, rmsnorm=False))
    assert "groups=2, norm_before_gate=True" in repr(GatedRMSNorm(8, groups=2, norm_before_gate=True))
