"""Layers of capsules. They are of kind `module`: what the contract suite asks of other layers is asked here."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archzoo
from archzoo.layers.capsules import DynamicRouting, PrimaryCapsules, dynamic_routing, margin_loss, squash
from archzoo.layers.self_attention_routing import SelfAttentionRouting, squash_exp
from tests.helpers import assert_all_close, assert_same_bits, layer_value_and_grads, rms_error

SIZES = {"in_capsules": 6, "out_capsules": 3, "in_dim": 4, "out_dim": 5}
LAYERS = {
    "capsules": (lambda **o: DynamicRouting(**{**SIZES, **o}), (6, 4)),
    "detached": (lambda **o: DynamicRouting(**{**SIZES, "detach": True, "leaky": True, **o}), (6, 4)),
    "one_round": (lambda **o: DynamicRouting(**{**SIZES, "iterations": 1, **o}), (6, 4)),
    "self_attention": (lambda **o: SelfAttentionRouting(**{**SIZES, **o}), (6, 4)),
    "primary": (lambda **o: PrimaryCapsules(2, 3, 4, 3, **o), (2, 7, 6)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
routing_layers = pytest.mark.parametrize("name", [n for n in LAYERS if n != "primary"])


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return LAYERS[name][0](**options)


def inputs(name, *leading, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, *LAYERS[name][1], generator=generator, dtype=torch.float64).to(dtype)


# --- The equations ----------------------------------------------------------------------------------------------------


def test_layer_is_the_function_of_its_parameters():
    layer = build("capsules", leaky=True, iterations=2, dtype=torch.float64)
    u = inputs("capsules", 2, dtype=torch.float64)
    want, coupling = dynamic_routing(u, layer.weight, layer.bias, 2, True, return_coupling=True)
    got, of_layer = layer(u, return_coupling=True)
    assert torch.equal(got, want)
    assert torch.equal(of_layer, coupling)
    assert of_layer.shape == (2, 6, 3)
    assert not of_layer.requires_grad


def test_registry_builds_the_routing_layers():
    assert isinstance(archzoo.create_layer("capsules", 6, 3, 4, 5, iterations=2), DynamicRouting)
    assert isinstance(archzoo.create_layer("self_attention_routing", 6, 3, 4, 5), SelfAttentionRouting)


def test_more_rounds_may_be_evaluated_than_were_trained():
    layer = build("capsules")
    u = inputs("capsules", 2)
    layer.iterations = 5
    assert torch.equal(layer(u), build("capsules", iterations=5)(u))
    assert "iterations=5" in layer.extra_repr()


def test_one_round_shares_votes_equally_and_later_rounds_by_agreement():
    u = inputs("capsules", 4)
    _, even = build("capsules", iterations=1)(u, return_coupling=True)
    assert torch.allclose(even, torch.full_like(even, 1 / 3))
    _, leaky = build("capsules", iterations=1, leaky=True)(u, return_coupling=True)
    assert torch.allclose(leaky, torch.full_like(leaky, 1 / 4))
    layer = build("capsules", bias=False)
    _, coupling = layer(5 * u, return_coupling=True)
    votes = torch.einsum("ijdk,nik->nijd", layer.weight, 5 * u)
    agreement = torch.einsum("nijd,njd->nij", votes, layer(5 * u))
    assert (coupling.argmax(-1) == agreement.argmax(-1)).float().mean() > 0.9


def test_self_attention_is_the_papers_matrix_form():
    layer = build("self_attention", dtype=torch.float64)
    nn.init.normal_(layer.bias)
    u = inputs("self_attention", 2, dtype=torch.float64)
    votes = torch.einsum("ijdk,nik->njid", layer.weight, u)
    matrix = votes @ votes.mT / math.sqrt(5)  # (n, j, i, i)
    coupling = matrix.sum(-1).softmax(1) + layer.bias
    s = (coupling.unsqueeze(-1) * votes).sum(2)
    n = s.norm(dim=-1, keepdim=True)
    assert rms_error(layer(u), (1 - (-n).exp()) * s / n) < 1e-14


def test_squash_exp_is_safe_at_zero():
    zero = torch.zeros(2, 3, requires_grad=True)
    y = squash_exp(zero)
    y.sum().backward()
    assert torch.equal(y, zero)
    assert torch.allclose(zero.grad, torch.ones(2, 3))
    assert torch.autograd.gradcheck(squash_exp, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 1 / 3), ({"leaky": True}, 1 / 4), ({"shared_coupling": False}, 1.0), ({"bias": False}, 1 / 3)],
    ids=["shared", "leaky", "not_shared", "no_bias"],
)
def test_a_primary_capsule_is_channels_at_one_place(options, share):
    layer = build("primary", stride=1, padding=1, dtype=torch.float64, **options)
    x = inputs("primary", 2, dtype=torch.float64)
    conv = share * F.conv2d(x, layer.conv.weight, padding=1)
    if layer.conv.bias is not None:
        conv = conv + layer.conv.bias[:, None, None]
    u = layer(x)
    assert u.shape == (2, 3 * 7 * 6, 4)
    for kind, row, column in ((0, 0, 0), (1, 6, 2), (2, 3, 5)):
        want = squash(conv[:, 4 * kind : 4 * kind + 4, row, column])
        assert rms_error(u[:, (kind * 7 + row) * 6 + column], want) < 1e-14


def test_initial_values_are_those_of_the_authors_code():
    torch.manual_seed(0)
    layer = DynamicRouting(64, 10, 8, 16)
    assert layer.weight.abs().max() <= 0.2
    assert layer.weight.std().item() == pytest.approx(0.088, rel=0.01)  # normal, std 0.1, cut at twice that
    assert torch.equal(layer.bias, torch.full((10, 16), 0.1))
    for shared, factor in ((True, 1), (False, 32)):
        primary = PrimaryCapsules(16, shared_coupling=shared)
        assert primary.conv.weight.std().item() * factor == pytest.approx(0.088, rel=0.01)
        assert torch.equal(primary.conv.bias, torch.full((256,), 0.1))
    attention = SelfAttentionRouting(16, 10, 8, 16)
    assert attention.weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 10 * 8)), rel=0.02)
    assert not attention.bias.any()


def test_margin_loss_is_the_papers():
    lengths = torch.tensor([[0.95, 0.3, 0.05], [0.5, 0.9, 0.0]], dtype=torch.float64)
    want = torch.tensor([0.5 * 0.2**2, 0.4**2 + 0.5 * 0.8**2], dtype=torch.float64)
    target = torch.tensor([0, 0])
    torch.testing.assert_close(margin_loss(lengths, target, reduction="none"), want)
    torch.testing.assert_close(margin_loss(lengths, target), want.mean())
    torch.testing.assert_close(margin_loss(lengths, target, reduction="sum"), want.sum())
    torch.testing.assert_close(margin_loss(lengths, F.one_hot(target, 3)), want.mean())
    both = torch.tensor([[1, 1, 0], [1, 1, 0]])
    torch.testing.assert_close(margin_loss(lengths, both, reduction="none"), torch.tensor([0.36, 0.16]).double())
    assert margin_loss(lengths.bfloat16(), target).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda x: margin_loss(x, target), lengths.requires_grad_())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"target of shape \(3,\)"),
        (torch.zeros(2), "target of shape .* and torch.float32"),
        (torch.zeros(2, 4), r"must be .*\(batch, classes\) = \(2, 3\)"),
    ],
    ids=["length", "floats", "classes"],
)
def test_wrong_target_is_named(target, message):
    with pytest.raises(ValueError, match=message):
        margin_loss(torch.rand(2, 3), target)
    with pytest.raises(ValueError, match="reduction='median'"):
        margin_loss(torch.rand(2, 3), torch.zeros(2, dtype=torch.int64), reduction="median")
    with pytest.raises(ValueError, match=r"lengths of shape \(3,\)"):
        margin_loss(torch.rand(3), torch.zeros(2, dtype=torch.int64))


# --- What every layer owes --------------------------------------------------------------------------------------------


@every_layer
def test_leading_dimensions_and_empty_batches(name):
    layer = build(name, dtype=torch.float64)
    shapes = [(1,), (3,), (0,)] + [(), (2, 3), (2, 0)] * (name != "primary")
    for leading in shapes:
        x = inputs(name, *leading, dtype=torch.float64).requires_grad_()
        y = layer(x)
        assert y.shape[: len(leading)] == leading
        rows = x.reshape(-1, *LAYERS[name][1])
        if len(rows):
            assert rms_error(y.reshape(len(rows), *y.shape[-2:]), torch.cat([layer(row[None]) for row in rows])) < 1e-13
        y.sum().backward()
        assert x.grad.shape == x.shape


@every_layer
def test_gradients_pass_gradcheck_also_of_gradients(name):
    few = {} if name == "primary" else {"in_capsules": 3, "out_capsules": 2, "in_dim": 2, "out_dim": 3}
    layer = build(name, dtype=torch.float64, **few)
    x = torch.randn(2, 3, 2, dtype=torch.float64) if few else inputs(name, 2, dtype=torch.float64)
    leaves = [x.requires_grad_(), *layer.parameters()]
    names = [n for n, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    if name != "detached":  # whose gradient is not that of its value
        assert torch.autograd.gradcheck(run, leaves)
    if name in ("capsules", "self_attention"):
        assert torch.autograd.gradgradcheck(run, leaves, atol=1e-4)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_that_of_the_parameters(name, dtype):
    layer = build(name, dtype=dtype)
    found = layer_value_and_grads(layer, inputs(name, 3, dtype=dtype))
    assert {t.dtype for t in found.values()} == {dtype}
    truth = copy.deepcopy(layer).double()(inputs(name, 3, dtype=dtype).double())
    assert rms_error(found["y"], truth) < {torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@every_layer
def test_autocast_keeps_capsules_in_float32(name):
    layer, x = build(name), inputs(name, 3)
    truth = layer_value_and_grads(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer_value_and_grads(layer, x)
        from_bfloat16 = layer(x.bfloat16())
    assert {t.dtype for t in got.values()} | {from_bfloat16.dtype} == {torch.float32}
    for key, tensor in got.items():
        assert rms_error(tensor, truth[key]) < 2e-2, key


@every_layer
def test_compiled_and_exported_equal_eager(name):
    torch._dynamo.reset()
    layer, x = build(name, dtype=torch.float64), inputs(name, 5, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = layer_value_and_grads(layer, x)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    gradients = torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y))
    got = dict(zip(want, [y.detach(), *gradients], strict=True))
    assert_all_close(got, want, "compiled")
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: batch},)).module()
    other = inputs(name, 9, dtype=torch.float64)
    assert rms_error(program(other), layer(other)) < 1e-13


@every_layer
def test_copies_meta_and_state(name):
    layer, x = build(name), inputs(name, 3)
    truth = layer_value_and_grads(layer, x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(stream, weights_only=False)):
        assert_same_bits(layer_value_and_grads(twin, x), truth, "a copy")
    fresh = build(name, seed=5)
    fresh.load_state_dict(layer.state_dict())
    assert_same_bits(layer_value_and_grads(fresh, x), truth, "the loaded layer")
    meta = build(name, device="meta")
    y = meta(x.to("meta").requires_grad_())
    y.sum().backward()
    assert (y.device.type, y.shape) == ("meta", truth["y"].shape)
    torch.manual_seed(0)
    filled = meta.to_empty(device="cpu")
    filled.reset_parameters()
    other = build(name)
    torch.manual_seed(0)
    other.reset_parameters()
    assert_same_bits(dict(filled.named_parameters()), dict(other.named_parameters()), "reset_parameters()")


@every_layer
def test_a_nan_stays_in_its_own_sample(name):
    layer, x = build(name), inputs(name, 3)
    truth = layer(x)
    x[1].view(-1)[0] = torch.nan
    y = layer(x)
    assert y[1].isnan().any()
    assert torch.equal(y[[0, 2]], truth[[0, 2]])


@routing_layers
@pytest.mark.parametrize("size", SIZES)
def test_bad_sizes_are_refused_by_name(name, size):
    for value in (0, -1, 2.5, "8", None):
        with pytest.raises(ValueError, match=f"{size}={value}"):
            build(name, **{size: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("capsules", iterations=0), "iterations=0"),
        (lambda: build("capsules")(torch.zeros(2, 6, 5)), r"input of shape \(2, 6, 5\): .*in_capsules=6 and in_dim=4"),
        (lambda: build("capsules")(torch.zeros(4)), r"input of shape \(4,\)"),
        (lambda: build("capsules")(torch.zeros(2, 6, 4, dtype=torch.float64)), "input of torch.float64"),
        (lambda: build("self_attention")(torch.zeros(2, 5, 4)), r"input of shape \(2, 5, 4\)"),
        (lambda: build("primary")(torch.zeros(2, 3, 7, 7)), r"input of shape \(2, 3, 7, 7\): .*in_channels=2"),
        (lambda: build("primary")(torch.zeros(2, 7, 7)), r"input of shape \(2, 7, 7\)"),
        (lambda: PrimaryCapsules(2, 0), "capsule_types=0"),
        (lambda: PrimaryCapsules(2, stride=0), "stride=0"),
        (lambda: PrimaryCapsules(2, padding=-1), "padding=-1"),
    ],
    ids=["rounds", "size", "vector", "dtype", "attention", "channels", "image", "types", "stride", "padding"],
)
def test_wrong_argument_or_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@every_layer
def test_training_lowers_the_loss_and_repeats_bit_for_bit(name):
    def train():
        layer, x = build(name), inputs(name, 16)
        target = squash(torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(3)))
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            loss = (layer(x) - target).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    losses = train()
    assert losses[-1] < 0.9 * losses[0]
    assert losses == train()
