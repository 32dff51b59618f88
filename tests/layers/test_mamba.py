"""Facts of Mamba's layers alone: names, starts, the textbook forward, states, packing, padding, both directions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.kernels.selective_scan import selective_scan_reference
from archzoo.kernels.selective_state_update import selective_state_update
from archzoo.layers.mamba import Mamba, MambaBlock, SelectiveSSM, seq_idx_from_cu_seqlens, seq_idx_from_position_ids
from tests.helpers import assert_all_close, layer_value_and_grads, rms_error

OFFICIAL = {  # of mamba_ssm.Mamba(24, d_state=16, d_conv=4, expand=2), dt_rank = ceil(24 / 16) = 2
    "A_log": (48, 16),
    "D": (48,),
    "in_proj.weight": (96, 24),
    "conv1d.weight": (48, 1, 4),
    "conv1d.bias": (48,),
    "x_proj.weight": (2 + 32, 48),
    "dt_proj.weight": (48, 2),
    "dt_proj.bias": (48,),
    "out_proj.weight": (24, 48),
}


def mamba(dim=6, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = Mamba(dim, d_state=4, dt_rank=2, dtype=dtype, **options)
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
    assert shapes(Mamba(24)) == OFFICIAL
    with_biases = {**OFFICIAL, "in_proj.bias": (96,), "out_proj.bias": (24,)}
    assert shapes(Mamba(24, bias=True)) == with_biases
    assert shapes(Mamba(24, conv_bias=False)) == {n: s for n, s in OFFICIAL.items() if n != "conv1d.bias"}
    ssm = {"A_log": (24, 16), "D": (24,), "x_proj.weight": (34, 24), "dt_proj.weight": (24, 2), "dt_proj.bias": (24,)}
    assert shapes(SelectiveSSM(24)) == ssm
    assert shapes(MambaBlock(24)) == {"norm.weight": (24,), **{f"mixer.{n}": s for n, s in OFFICIAL.items()}}
    vision = {"A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight"}
    assert shapes(Mamba(24, bidirectional="separate")).keys() == OFFICIAL.keys() | vision | {"dt_proj_b.bias"}
    assert shapes(Mamba(24, bidirectional="shared")) == OFFICIAL


def test_parameter_count_is_about_three_expand_dim_squared():
    assert sum(p.numel() for p in Mamba(256).parameters()) / (3 * 2 * 256**2) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("cls", [Mamba, SelectiveSSM])
def test_start(cls):
    layer = cls(512)
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 17.0).expand(layer.d_inner, 16))
    assert torch.equal(layer.D, torch.ones_like(layer.D))
    dt = F.softplus(layer.dt_proj.bias)
    assert 0.001 * 0.999 < dt.min() < 0.0012
    assert 0.09 < dt.max() < 0.1 * 1.001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.2), "even on a logarithmic scale"
    spread = 32**-0.5
    assert layer.dt_proj.weight.abs().max() <= spread
    assert layer.dt_proj.weight.std().item() == pytest.approx(spread / 3**0.5, rel=0.05)
    bound = layer.d_inner**-0.5  # nn.Linear's
    assert 0.95 * bound < layer.x_proj.weight.abs().max() <= bound

    constant = cls(64, dt_init="constant", dt_scale=0.5, dt_min=0.2, dt_max=0.2)
    assert torch.equal(constant.dt_proj.weight, torch.full_like(constant.dt_proj.weight, 0.5 * 4**-0.5))
    assert torch.allclose(F.softplus(constant.dt_proj.bias), torch.tensor(0.2))
    assert torch.allclose(F.softplus(cls(64, dt_init_floor=0.05).dt_proj.bias).min(), torch.tensor(0.05))


def test_decay_and_skip_are_float32_at_least():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        layer = Mamba(8, dtype=dtype)
        assert layer.A_log.dtype == layer.D.dtype == expected
        assert {p.dtype for n, p in layer.named_parameters() if n not in ("A_log", "D")} == {dtype}
        assert layer(torch.ones(1, 3, 8, dtype=dtype)).dtype == dtype
        assert [state.dtype for state in layer.allocate_inference_cache(1)] == [dtype, expected]


def test_what_weight_decay_leaves_alone():
    assert Mamba(8).no_weight_decay() == {"A_log", "D", "dt_proj.bias"}
    assert SelectiveSSM(8).no_weight_decay() == {"A_log", "D", "dt_proj.bias"}
    assert MambaBlock(8).no_weight_decay() == {"mixer.A_log", "mixer.D", "mixer.dt_proj.bias"}
    both = Mamba(8, bidirectional="separate")
    assert both.no_weight_decay() == {"A_log", "D", "dt_proj.bias", "A_b_log", "D_b", "dt_proj_b.bias"}
    assert both.no_weight_decay() <= {name for name, _ in both.named_parameters()}


# --- The forward ------------------------------------------------------------------------------------------------------


def textbook(layer, x):
    """Mamba's forward, with torch's own convolution and the definition of the scan."""
    u, z = layer.in_proj(x).chunk(2, -1)
    u = F.silu(layer.conv1d(u.mT)[..., : x.shape[1]])
    R, N = layer.dt_rank, layer.d_state
    dt, B, C = layer.x_proj(u.mT).split([R, N, N], -1)
    y = selective_scan_reference(
        u,
        layer.dt_proj.weight @ dt.mT,
        -layer.A_log.exp(),
        B.mT,
        C.mT,
        layer.D,
        z.mT,
        layer.dt_proj.bias,
        delta_softplus=True,
    )
    return layer.out_proj(y.mT)


@pytest.mark.parametrize("options", [{}, {"bias": True, "conv_bias": False, "d_conv": 2, "expand": 1.5}], ids=str)
def test_forward_and_gradients_are_the_textbooks(options):
    layer, x = mamba(**options), tokens()

    class Textbook(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return textbook(self.layer, x)

    truth = {name.removeprefix("layer."): t for name, t in layer_value_and_grads(Textbook(), x).items()}
    assert_all_close(layer_value_and_grads(layer, x), truth, "Mamba")


def test_nothing_looks_ahead():
    assert Mamba(8).causal
    assert SelectiveSSM(8).causal
    assert not Mamba(8, bidirectional="shared").causal
    layer, x = mamba(), tokens()
    later = x.clone()
    later[:, 5:] += 1
    assert torch.equal(layer(later)[:, :5], layer(x)[:, :5])
    assert not torch.equal(layer(later)[:, 5:], layer(x)[:, 5:])


def test_block_is_residual_and_may_sum_in_float32():
    torch.manual_seed(0)
    block, x = MambaBlock(6, dtype=torch.float64), tokens()
    assert rms_error(block(x), x + block.mixer(F.rms_norm(x, (6,), block.norm.weight, 1e-5))) < 1e-14
    half = MambaBlock(6, residual_in_fp32=True, dtype=torch.bfloat16)
    y = half(x.bfloat16())
    assert y.dtype == torch.float32
    assert half(y).dtype == torch.float32, "what one block gives, the next takes"
    y, state = block(x, return_state=True)
    states = block.allocate_inference_cache(2)
    steps = torch.cat([block.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)
    assert rms_error(steps, y) < 1e-12
    assert all(rms_error(a, b) < 1e-12 for a, b in zip(states, state, strict=True))


def test_autocast_keeps_the_state_in_float32():
    layer, x = mamba(dtype=torch.float32), tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, (conv_state, ssm_state) = layer(x, return_state=True)
        states = layer.allocate_inference_cache(2)
        steps = torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(x.shape[1])], 1)
    assert (y.dtype, conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert states[1].dtype == torch.float32
    assert rms_error(y, layer(x)) < 2e-2
    assert rms_error(steps, y) < 1e-2


# --- States -----------------------------------------------------------------------------------------------------------


def test_bare_scan_has_states_too():
    torch.manual_seed(0)
    layer, x = SelectiveSSM(6, dtype=torch.float64), tokens()
    want, last = layer(x, return_state=True)
    first, state = layer(x[:, :4], return_state=True)
    assert rms_error(torch.cat([first, layer(x[:, 4:], state=state)], 1), want) < 1e-12
    state = layer.allocate_inference_cache(2)
    with torch.no_grad():
        steps = torch.cat([layer.step(x[:, t : t + 1], state)[0] for t in range(9)], 1)
    assert rms_error(steps, want) < 1e-12
    assert rms_error(state, last) < 1e-12


# --- Packing and padding ----------------------------------------------------------------------------------------------


def test_where_sequences_begin():
    assert seq_idx_from_cu_seqlens(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 7).tolist() == [[0, 0, 2, 2, 2, 3, 3]]
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [5, 6, 7, 8, 9, 10]])
    assert seq_idx_from_position_ids(positions).tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0]]
    assert seq_idx_from_position_ids(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
    with pytest.raises(ValueError, match="cu_seqlens of shape"):
        seq_idx_from_cu_seqlens(torch.zeros(1, 2), 3)
    with pytest.raises(ValueError, match="position_ids of shape"):
        seq_idx_from_position_ids(torch.zeros(3))


# --- Both directions --------------------------------------------------------------------------------------------------


def test_shared_directions_commute_with_reversal():
    layer, x = mamba(bidirectional="shared"), tokens()
    assert rms_error(layer(x.flip(1)).flip(1), layer(x)) < 1e-13
    causal = mamba()
    causal.load_state_dict(layer.state_dict())
    assert rms_error(layer(x), (causal(x) + causal(x.flip(1)).flip(1)) / 2) < 1e-13, "a mean, not a sum"


def test_separate_directions_have_parameters_of_their_own():
    layer, x = mamba(bidirectional="separate"), tokens()
    forward, backward = mamba(), mamba()
    own = layer.state_dict()
    forward.load_state_dict({name: own[name] for name in forward.state_dict()})
    renamed = {"A_log": "A_b_log", "D": "D_b"}
    names = {
        n: renamed.get(n, n.replace("1d.", "1d_b.").replace("x_proj.", "x_proj_b.").replace("dt_proj.", "dt_proj_b."))
        for n in backward.state_dict()
    }
    backward.load_state_dict({name: own[other] for name, other in names.items()})
    assert rms_error(layer(x), (forward(x) + backward(x.flip(1)).flip(1)) / 2) < 1e-13
    gradients = layer_value_and_grads(layer, x)
    assert all(gradients[name].abs().max() > 0 for name in own)


def test_both_directions_respect_packing_and_padding():
    for bidirectional in ("shared", "separate"):
        layer, x = mamba(bidirectional=bidirectional), tokens(batch=1, length=9)
        seq_idx = torch.tensor([[0] * 4 + [1] * 5])
        alone = torch.cat([layer(part) for part in x.split([4, 5], 1)], 1)
        assert rms_error(layer(x, seq_idx=seq_idx), alone) < 1e-12
        mask = torch.tensor([[True] * 4 + [False] * 5])
        assert rms_error(layer(x, mask=mask)[:, :4], layer(x[:, :4])) < 1e-12


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_state": 0}, "d_state=0"),
        ({"d_conv": 0}, "d_conv=0"),
        ({"expand": 0}, "expand=0"),
        ({"expand": 0.01}, "expand=0.01.*no channel"),
        ({"dt_rank": 0}, "dt_rank=0"),
        ({"dt_rank": "full"}, "dt_rank=full"),
        ({"dt_min": 0.2}, "dt_min=0.2, dt_max=0.1"),
        ({"dt_min": 0.0}, "dt_min=0.0"),
        ({"dt_init": "zeros"}, "dt_init='zeros'.*'random', 'constant'"),
        ({"dt_scale": 0}, "dt_scale=0"),
        ({"dt_init_floor": -1.0}, "dt_init_floor=-1.0"),
        ({"bidirectional": True}, "bidirectional=True"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Mamba(8, **options)


def test_arguments_that_do_not_fit_are_refused():
    layer, x = mamba(), tokens()
    states = layer.allocate_inference_cache(2)
    for arguments, words in (
        ({"seq_idx": torch.zeros(2, 8, dtype=torch.int64)}, "seq_idx of shape"),
        ({"mask": torch.ones(9)}, "mask of shape"),
        ({"state": (states[0][:1], states[1])}, r"state\[0\] of shape"),
        ({"state": (states[0], states[1][:1])}, "initial_state of shape"),
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
    both = mamba(bidirectional="shared")
    for call in (
        lambda: both(x, return_state=True),
        lambda: both(x, state=states),
        lambda: both.step(x[:, :1], *states),
        lambda: both.allocate_inference_cache(2),
    ):
        with pytest.raises(ValueError, match="bidirectional='shared'"):
            call()


def test_repr_shows_what_differs():
    text = repr(Mamba(8, layer_idx=3, bidirectional="shared"))
    assert "8, d_state=16, d_conv=4, expand=2, dt_rank=1, layer_idx=3, bidirectional='shared'" in text
    assert "bidirectional" not in repr(Mamba(8))
    assert "residual_in_fp32=True" in repr(MambaBlock(8, residual_in_fp32=True))


def test_a_state_is_not_rounded_by_autocast():
    torch.manual_seed(0)
    state, other = (torch.linspace(-1, 1, 96).reshape(2, 6, 8) for _ in range(2))
    x, dt, D, bias = torch.randn(2, 6), torch.randn(2, 6), torch.randn(6), torch.randn(6)
    A, B, C = -torch.rand(6, 8), torch.randn(2, 8), torch.randn(2, 8)
    want = selective_state_update(state, x, dt, A, B, C, D, None, bias, True)
    with torch.autocast("cpu", torch.bfloat16):
        got = selective_state_update(other, x, dt, A, B, C, D, None, bias, True)
    assert torch.equal(got, want)
    assert torch.equal(other, state)
