"""Facts of Mamba-2 alone: names, starts, the textbook forward, the gated norm, states, packing, padding, its block."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.kernels.ssd import ssd_reference
from archzoo.layers._cache import StateCache, cache_for
from archzoo.layers.mamba import MambaBlock, seq_idx_from_cu_seqlens
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


def test_nothing_looks_ahead():
    layer, x = mamba2(), tokens()
    assert layer.causal
    later = x.clone()
    later[:, 5:] += 1
    assert rms_error(layer(later)[:, :5], layer(x)[:, :5]) < 1e-14
    assert rms_error(layer(later)[:, 5:], layer(x)[:, 5:]) > 1e-2


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


# --- States -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_steps_equal_one_forward_and_leave_the_same_state(length, options):
    layer, x = mamba2(**options), tokens(length=length)
    want, want_states = layer(x, return_state=True)
    states = layer.allocate_inference_cache(2, max_seqlen=100)
    assert [s.shape for s in states] == [s.shape for s in want_states]
    with torch.no_grad():
        for t in range(length):
            y, *returned = layer.step(x[:, t : t + 1], *states)
            assert all(a is b for a, b in zip(returned, states, strict=True)), "in place"
            assert rms_error(y, want[:, t : t + 1]) < 1e-12
    for got, state in zip(states, want_states, strict=True):
        assert rms_error(got, state) < 1e-12
        assert state.is_contiguous()


class InChunks(nn.Module):
    def __init__(self, layer, chunks):
        super().__init__()
        self.layer, self.chunks = layer, chunks

    def forward(self, x):
        ys, state = [], None
        for part in x.split(self.chunks, 1):
            y, state = self.layer(part, state=state, return_state=True)
            ys.append(y)
        return torch.cat(ys, 1)


class BySteps(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        states = self.layer.allocate_inference_cache(2)
        return torch.cat([self.layer.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)


@pytest.mark.parametrize("chunks", [[4, 5], [1, 1, 7], [2, 3, 4]], ids=str)
def test_chunks_equal_the_whole_gradients_included(chunks):
    layer, x = mamba2(), tokens()
    got = {n.removeprefix("layer."): t for n, t in layer_value_and_grads(InChunks(layer, chunks), x).items()}
    assert_all_close(got, layer_value_and_grads(layer, x), "in chunks")


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_steps_can_be_trained_through(options):
    layer, x = mamba2(**options), tokens(length=5)
    got = {name.removeprefix("layer."): t for name, t in layer_value_and_grads(BySteps(layer), x).items()}
    assert_all_close(got, layer_value_and_grads(layer, x), "by steps")


def test_a_prompt_in_one_go_then_steps_in_a_cache():
    layer, x = mamba2(), tokens()
    want, cache = layer(x), cache_for(layer)
    assert isinstance(cache, StateCache)
    with torch.no_grad():
        parts = [cache.mix(layer, part) for part in x.split([5, 1, 1, 2], 1)]
    assert rms_error(torch.cat(parts, 1), want) < 1e-12


def test_states_survive_a_copy_and_a_new_order_of_the_batch():
    layer, x = mamba2(), tokens(batch=3)
    want = layer(x)
    with torch.no_grad():
        _, states = layer(x[:, :4], return_state=True)
        kept = copy.deepcopy(states)
        layer.step(x[:, 4:5], *states)
        rows = torch.tensor([2, 0, 0])
        y, *_ = layer.step(x[rows, 4:5], *(state[rows] for state in kept))
    assert rms_error(y, want[rows, 4:5]) < 1e-12


def test_a_step_can_be_exported():
    layer, x = mamba2().eval(), tokens(length=1)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, conv_state, ssm_state):
            return self.layer.step(x, conv_state, ssm_state)

    with torch.no_grad():
        states = layer(tokens(seed=3), return_state=True)[1]
        program = torch.export.export(Step(), (x, *copy.deepcopy(states))).module()
        got = program(x, *copy.deepcopy(states))
        want = layer.step(x, *states)
    assert all(rms_error(a, b) < 1e-13 for a, b in zip(got, want, strict=True))


# --- Packing and padding ----------------------------------------------------------------------------------------------


def test_packed_sequences_equal_each_by_itself():
    layer, x = mamba2(), tokens(batch=1, length=12)
    seq_idx = seq_idx_from_cu_seqlens(torch.tensor([0, 2, 3, 12]), 12)
    alone = torch.cat([layer(part) for part in x.split([2, 1, 9], 1)], 1)
    assert rms_error(layer(x, seq_idx=seq_idx), alone) < 1e-12
    assert rms_error(layer(x), alone) > 1e-3


@pytest.mark.parametrize("last", [1, 2, 5])
def test_a_packed_row_can_be_gone_on_from(last):
    """The state knows nothing of the sequences before the last one, however short that is."""
    layer, x = mamba2(), tokens(batch=1, length=12)
    seq_idx = torch.tensor([[0] * (8 - last) + [1] * last])
    _, state = layer(x[:, :8], seq_idx=seq_idx, return_state=True)
    assert rms_error(layer(x[:, 8:], state=state), layer(x[:, 8 - last :])[:, last:]) < 1e-12


def test_padding_on_the_left_leaves_no_trace():
    layer, x = mamba2(bias=True), tokens()
    padded = torch.cat([torch.randn(2, 3, 6, dtype=torch.float64), x], 1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, :3] = False
    want, want_states = layer(x, return_state=True)
    y, states = layer(padded, mask=mask, return_state=True)
    assert rms_error(y[:, 3:], want) < 1e-12
    assert all(rms_error(a, b) < 1e-12 for a, b in zip(states, want_states, strict=True))
    assert rms_error(layer(padded)[:, 3:], want) > 1e-3


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
