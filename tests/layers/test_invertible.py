import copy

import pytest
import torch
from torch import nn

from archzoo.layers.invertible import (
    ActNorm,
    Conditioned,
    Inverse,
    InvertibleLinear,
    InvertibleSequential,
    Squeeze2x2,
    same_net,
)
from archzoo.layers.invertible_nets import (
    AffineCoupling,
    ConvConditioner,
    InvertibleBlock,
    InvertibleConvNet,
    InvertibleMLP,
    MLPConditioner,
)

BOUND = {torch.float32: 1e-4, torch.float64: 1e-9}


def moderate(net, seed=0, size=0.05):
    """A net whose couplings are at work: they start as the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "conditioner" in name:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return net


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64).to(dtype)


def build(name, dtype):
    torch.manual_seed(0)
    nets = {
        "mlp": (lambda: InvertibleMLP(5, hidden=16, dtype=dtype), (6, 5)),
        "mlp, leading axes": (lambda: InvertibleMLP(4, hidden=16, dtype=dtype), (2, 3, 4)),
        "images, squeezed": (lambda: InvertibleConvNet(1, depth=3, hidden=8, dtype=dtype), (3, 1, 6, 8)),
        "images, odd channels": (
            lambda: InvertibleConvNet(3, depth=2, squeeze=False, hidden=8, dtype=dtype),
            (3, 3, 5, 4),
        ),
        "images": (lambda: InvertibleConvNet(4, depth=2, hidden=8, dtype=dtype), (3, 4, 5, 7)),
        "linear, axis 1": (lambda: InvertibleLinear(4, dtype=dtype), (3, 4, 2, 2)),
        "linear, axis 1 of 2": (lambda: InvertibleLinear(4, dtype=dtype), (3, 4)),
        "linear, axis 0": (lambda: InvertibleLinear(3, channel_dim=0, dtype=dtype), (3, 4)),
        "squeeze": (Squeeze2x2, (2, 3, 4, 6)),
        "turned": (lambda: Inverse(InvertibleMLP(4, hidden=8, dtype=dtype)), (5, 4)),
    }
    make, shape = nets[name]
    return moderate(make()), shape


NETS = ["mlp", "mlp, leading axes", "images, squeezed", "images, odd channels", "images", "linear, axis 1"]
NETS += ["linear, axis 1 of 2", "linear, axis 0", "squeeze", "turned"]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_the_inverse_undoes_the_net_in_training_mode_and_in_eval_mode(name, dtype):
    net, shape = build(name, dtype)
    x = randn(*shape, dtype=dtype)
    if name == "turned":  # its ActNorms start from data on the way back
        net.inverse(x)
    for mode in (True, False):
        net.train(mode)
        z = net(x)
        assert z.dtype == dtype
        assert name == "squeeze" or z.shape == x.shape
        torch.testing.assert_close(net.inverse(z), x, rtol=0, atol=BOUND[dtype])
        torch.testing.assert_close(net(net.inverse(z)), z, rtol=0, atol=BOUND[dtype] * 10)


@pytest.mark.parametrize("name", NETS)
def test_an_empty_batch_passes_both_ways_and_starts_nothing(name):
    net, shape = build(name, torch.float32)
    shape = (3, 0) if name == "linear, axis 0" else (0, *shape[1:])
    assert net.inverse(net(torch.empty(shape))).shape == shape
    assert not any(m.initialized for m in net.modules() if isinstance(m, ActNorm))


@pytest.mark.parametrize("name", ["mlp", "images, squeezed", "linear, axis 1"])
def test_gradients_flow_both_ways(name):
    net, shape = build(name, torch.float64)
    x = randn(2, *shape[1:], dtype=torch.float64)
    net(randn(9, *shape[1:], dtype=torch.float64))
    parameters = tuple(net.parameters())
    for way in (net, net.inverse):
        assert torch.autograd.gradcheck(lambda x, *_: way(x), (x.requires_grad_(), *parameters[:4]), fast_mode=True)  # noqa: B023
    for gradient in torch.autograd.grad(net.inverse(x).square().sum(), parameters):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_autocast_leaves_the_round_trip_as_good_as_it_was():
    net, shape = build("images, squeezed", torch.float32)
    x = randn(*shape)
    with torch.autocast("cpu", torch.bfloat16):
        z = net(x)
        back = net.inverse(z)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, net(x), rtol=0, atol=0)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x.bfloat16()).dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_net_is_whole_from_its_first_batch_on():
    net, shape = build("mlp", torch.float32)
    twin, x = copy.deepcopy(net), randn(*shape)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), twin(x), rtol=0, atol=1e-6)
    assert net[0].actnorm.initialized


def test_no_memory_is_needed_on_meta():
    for net, shape in ((InvertibleMLP(4, device="meta"), (3, 4)), (InvertibleConvNet(1, device="meta"), (2, 1, 4, 4))):
        assert net(torch.empty(shape, device="meta")).shape == shape


def test_the_block_is_that_of_the_specification():
    torch.manual_seed(0)
    block = moderate(InvertibleBlock(5, lambda i, o: MLPConditioner(i, o, 8), channel_dim=-1), size=0.3)
    x = randn(7, 5)
    block(x)
    h = (x + block.actnorm.shift) * block.actnorm.log_scale.exp()
    x1, x2 = h[:, :3], h[:, 3:]
    both = block.coupling1.conditioner(x2, None)
    y1 = (x1 + both[:, :3]) * both[:, 3:].clamp(-5, 5).exp()
    both = block.coupling2.conditioner(y1, None)
    y2 = (x2 + both[:, :2]) * both[:, 2:].clamp(-5, 5).exp()
    torch.testing.assert_close(block(x), torch.cat([y1, y2], 1) @ block.mix.weight.T)


def test_a_coupling_is_bounded_by_its_clamp():
    class Large(nn.Module):
        def forward(self, h, context):
            return torch.cat([torch.zeros_like(h), 100 * h.sign()], -1)

    coupling = AffineCoupling(Large(), clamp=2.0, channel_dim=-1)
    x, h = torch.ones(2, 1), torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(coupling(x, h), torch.tensor([[2.0], [-2.0]]).exp())


# --- ActNorm ----------------------------------------------------------------------------------------------------------


def test_the_first_batch_in_training_mode_sets_mean_and_deviation_once():
    norm, x = ActNorm(3), 4 * randn(5, 3, 2, 2) + 1
    y = norm(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        y.transpose(0, 1).flatten(1).std(1),
        torch.ones(3),
        rtol=0,
        atol=1e-5,
    )
    shift = norm.shift.clone()
    norm(9 * x)
    assert torch.equal(norm.shift, shift)


def test_before_that_it_is_the_identity_in_eval_mode_and_backwards():
    norm, x = ActNorm(3), randn(5, 3)
    assert torch.equal(norm.inverse(x), x)
    assert torch.equal(norm.eval()(x), x)
    assert not norm.initialized


@pytest.mark.parametrize("how", ["state dict", "assigned", "deepcopy", "copied buffers"])
def test_a_reloaded_one_does_not_start_again(how):
    norm, x = ActNorm(3), randn(5, 3)
    norm(x)
    other = copy.deepcopy(norm) if how == "deepcopy" else ActNorm(3, device="meta" if how == "assigned" else None)
    if how == "copied buffers":  # as a moving average of weights does
        with torch.no_grad():
            for mine, theirs in zip(other.state_dict().values(), norm.state_dict().values(), strict=True):
                mine.copy_(theirs)
    elif how != "deepcopy":
        other.load_state_dict(norm.state_dict(), assign=how == "assigned")
    assert torch.equal(other.train()(7 * x), norm(7 * x))


def test_a_state_dict_of_one_that_has_not_started_starts_it_anew():
    norm, x = ActNorm(3), randn(5, 3)
    norm(x)
    norm.load_state_dict(ActNorm(3).state_dict())
    assert not norm.initialized
    torch.testing.assert_close(norm(5 * x).mean(0), torch.zeros(3), rtol=0, atol=1e-6)


def test_one_value_a_channel_starts_nothing():
    norm, x = ActNorm(3), randn(1, 3)
    assert torch.equal(norm(x), x)
    assert not norm.initialized


# --- Contexts, wrappers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_a_context_reaches_every_conditioner(kind):
    torch.manual_seed(0)
    image = kind == "images"
    net = InvertibleConvNet(2, hidden=4, context_dim=2) if image else InvertibleMLP(4, hidden=8, context_dim=2)
    moderate(net, size=0.2)
    x = randn(3, 2, 4, 4) if image else randn(3, 4)
    net(x, 0.0)
    contexts = [0.5, torch.tensor(0.5), torch.tensor([0.5, 0.5]), torch.full((3, 2), 0.5)]
    results = [net(x, context) for context in contexts]
    for context, z in zip(contexts, results, strict=True):
        torch.testing.assert_close(z, results[0])
        torch.testing.assert_close(net.inverse(z, context), x, rtol=0, atol=1e-4)
    assert (net(x, 1.0) - results[0]).abs().max() > 1e-2
    fixed = Conditioned(net, 0.5)
    assert torch.equal(fixed(x), results[0])
    assert torch.equal(fixed.inverse(results[0]), net.inverse(results[0], 0.5))


def test_wrappers_of_one_net_share_it_and_are_told_apart_by_their_context():
    net = InvertibleMLP(4, context_dim=1)
    zero, one = Conditioned(net, 0.0), Conditioned(net, torch.tensor(1.0))
    assert same_net(net, net)
    assert same_net(zero, Conditioned(net, torch.tensor(0.0)))
    assert not same_net(zero, one)
    assert not same_net(zero, net)
    assert not same_net(zero, Conditioned(copy.deepcopy(net), 0.0))
    assert "context" not in "".join(one.state_dict())
    with pytest.raises(ValueError, match="leave it out"):
        one(randn(2, 4), 1.0)


def test_a_sequence_goes_backwards_through_the_inverses():
    torch.manual_seed(0)
    nets = [InvertibleLinear(4, channel_dim=-1), ActNorm(4, channel_dim=-1)]
    both, x = InvertibleSequential(*nets), randn(5, 4)
    assert torch.equal(both(x), nets[1](nets[0](x)))
    assert len(both) == 2
    assert list(both) == nets
    assert both[-1] is nets[1]
    assert set(both.state_dict()) == {"0.weight", "1.shift", "1.log_scale", "1.initialized"}


def test_a_matrix_starts_as_a_rotation():
    for seed in range(6):
        torch.manual_seed(seed)
        weight = InvertibleLinear(5, dtype=torch.float64).weight
        torch.testing.assert_close(weight @ weight.T, torch.eye(5, dtype=torch.float64))
        assert torch.linalg.det(weight) > 0
    assert InvertibleLinear(5, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InvertibleMLP(1), "channels=1"),
        (lambda: InvertibleMLP(4, depth=0), "depth=0"),
        (lambda: InvertibleMLP(4, context_dim=-1), "context_dim=-1"),
        (lambda: InvertibleMLP(4, clamp=0.0), "clamp=0.0"),
        (lambda: InvertibleConvNet(1, squeeze=False), "channels=1"),
        (lambda: InvertibleMLP(4)(randn(2, 5)), "4 channels on axis -1"),
        (lambda: InvertibleMLP(4)(randn(2, 4), 1.0), "context_dim=0"),
        (lambda: InvertibleMLP(4, context_dim=1)(randn(2, 4)), "context=None"),
        (lambda: InvertibleMLP(4, context_dim=2)(randn(2, 4), torch.zeros(3)), r"context of shape \(3,\)"),
        (lambda: InvertibleConvNet(1)(randn(2, 1, 5, 4)), r"\(2, 1, 5, 4\).*both even"),
        (lambda: Squeeze2x2().inverse(randn(2, 3, 4, 4)), "4 C channels"),
        (lambda: ConvConditioner(2, 2)(randn(2, 2, 4, 4), 1.0), "context_dim=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_inverted_is_refused():
    for wrap in (Inverse, InvertibleSequential, lambda net: Conditioned(net, 0.0)):
        with pytest.raises(TypeError, match="invertible net"):
            wrap(nn.Linear(2, 2))
