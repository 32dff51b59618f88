"""nGPT's layers: the equations, the sphere, masks, positions, the cache, and folding."""

import copy
import math

import pytest
import torch
from torch import nn

from archzoo.kernels.normalized_residual import unit
from archzoo.layers import ngpt
from archzoo.layers._cache import KeyValueCache
from archzoo.layers._rotary import rotary_table, rotate
from archzoo.layers.ngpt import (
    NormalizedAttention,
    NormalizedBlock,
    NormalizedEmbedding,
    NormalizedLinear,
    NormalizedMLP,
    register_constraint,
)
from tests.helpers import rms, rms_error

DIM, HEADS, LENGTH = 24, 3, 7
D = torch.float64


def tokens(batch=2, length=LENGTH, dim=DIM, dtype=D):
    return torch.randn(batch, length, dim, dtype=D).to(dtype)


def off_start(layer):
    """The layer with vectors that are not all one value."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("_scale", "_alpha", "scale")):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return layer


def norms(layer):
    """Norms of a layer's vectors, in float64."""
    dim = 0 if getattr(layer, "normalize", "in") == "out" else 1
    return layer.weight.detach().double().norm(dim=dim)


# --- Equations --------------------------------------------------------------------------------------------------------


def turned(vector, position, theta):
    """One head's vector, pair by pair, as plain numbers."""
    out = vector.clone()
    for i in range(0, len(vector), 2):
        angle = position * theta ** (-i / len(vector))
        a, b = vector[i], vector[i + 1]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def plain_attention(layer, x, s, scale, theta=10000.0):
    """The paper's equations 15 and 16, token by token and head by head."""
    size, out = layer.head_dim, []
    for sequence in x:
        heads = []
        for head in range(layer.num_heads):
            rows = slice(head * size, (head + 1) * size)
            q, k, v = ((sequence @ p.weight[rows].T) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
            place = lambda t, s=s[rows]: torch.stack(  # noqa: E731
                [s * turned(row, i, theta) / row.norm() for i, row in enumerate(t)]
            )
            q, k = place(q), place(k)
            mixed = [torch.softmax(scale * (k[: i + 1] @ q[i]), 0) @ v[: i + 1] for i in range(len(sequence))]
            heads.append(torch.stack(mixed))
        out.append(torch.cat(heads, -1) @ layer.out_proj.weight.T)
    return torch.stack(out)


def plain_mlp(layer, x, s_u, s_v):
    u = s_u * (x @ layer.up_proj.weight.T)
    v = s_v * (x @ layer.gate_proj.weight.T) * math.sqrt(layer.dim)
    return (u * v * torch.sigmoid(v)) @ layer.down_proj.weight.T


def test_attention_is_the_papers():
    layer = off_start(NormalizedAttention(DIM, num_heads=HEADS, rope_theta=50.0, dtype=D))
    x = tokens()
    s = layer.qk_scale * math.sqrt(DIM)  # 1 / (1 / sqrt(d))
    want = plain_attention(layer, x, s, math.sqrt(DIM / HEADS), theta=50.0)
    assert rms_error(layer(x), want) < 1e-13
    gradients = [torch.autograd.grad(y.square().sum(), layer.qk_scale)[0] for y in (layer(x), want)]
    assert rms_error(*gradients) < 1e-11


def test_attention_with_other_heads_scales_and_softmax():
    layer = off_start(
        NormalizedAttention(
            DIM, num_heads=2, head_dim=10, qk_scale_init=3.0, qk_scale_scale=0.5, softmax_scale=0.7, dtype=D
        )
    )
    x = tokens()
    assert layer.q_proj.weight.shape == (20, DIM)
    assert rms_error(layer(x), plain_attention(layer, x, layer.qk_scale * 6, 0.7)) < 1e-13


def test_mlp_is_the_papers():
    layer = off_start(NormalizedMLP(DIM, 40, scale_init=2.0, scale_scale=0.5, dtype=D))
    x = tokens()
    assert rms_error(layer(x), plain_mlp(layer, x, layer.up_scale * 4, layer.gate_scale * 4)) < 1e-13


def test_block_moves_along_the_sphere_first_for_attention_then_for_the_mlp():
    layer = off_start(NormalizedBlock(DIM, num_heads=HEADS, hidden_dim=40, alpha_init=0.3, dtype=D))
    with torch.no_grad():
        layer.attn_alpha[::2] *= -1  # used is the absolute value
    h = start = tokens()
    for f, alpha in ((layer.attn, layer.attn_alpha), (layer.mlp, layer.mlp_alpha)):
        a, b = nn.functional.normalize(h, dim=-1), nn.functional.normalize(f(h), dim=-1)
        h = nn.functional.normalize(a + (0.3 * math.sqrt(DIM) * alpha).abs() * (b - a), dim=-1)
    y = layer(start)
    assert rms_error(y, h) < 1e-13
    assert torch.allclose(y.norm(dim=-1), torch.ones(2, LENGTH, dtype=D))


def test_names_shapes_and_starts_are_the_specs():
    block = NormalizedBlock(128, hidden_dim=40)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes == {
        "attn_alpha": (128,),
        "mlp_alpha": (128,),
        **{f"attn.{name}_proj.weight": (128, 128) for name in ("q", "k", "v", "out")},
        "attn.qk_scale": (128,),
        "mlp.up_proj.weight": (40, 128),
        "mlp.gate_proj.weight": (40, 128),
        "mlp.down_proj.weight": (128, 40),
        "mlp.up_scale": (40,),
        "mlp.gate_scale": (40,),
    }
    assert (block.attn.num_heads, block.attn.head_dim, block.attn.causal) == (2, 64, True)
    assert NormalizedMLP(8).hidden_dim == 32
    starts = {name: p.unique().tolist() for name, p in block.named_parameters() if p.dim() == 1}
    small = pytest.approx([128**-0.5])
    assert starts == {
        "attn_alpha": small,
        "mlp_alpha": small,
        "attn.qk_scale": small,
        "mlp.up_scale": [1.0],
        "mlp.gate_scale": [1.0],
    }
    assert block._used(block.mlp_alpha).detach().tolist() == pytest.approx([0.05] * 128)


def test_scale_sets_the_step_that_adam_takes():
    for scale in (0.01, 1.0):
        block = NormalizedBlock(16, alpha_init=0.2, alpha_scale=scale, dtype=D)
        optimizer = torch.optim.Adam(block.parameters(), lr=1e-3)
        before = block._used(block.mlp_alpha).detach()
        (block(tokens(dim=16)) * tokens(dim=16)).sum().backward()
        optimizer.step()
        moved = (block._used(block.mlp_alpha).detach() - before).abs()
        assert torch.allclose(moved, torch.tensor(1e-3 * 0.2 / scale, dtype=D), rtol=1e-3)


# --- The sphere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["in", "out"])
@pytest.mark.parametrize(
    ("dtype", "slack"), [(D, 4e-15), (torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str
)
def test_vectors_are_unit_at_first_and_after_constrain(dtype, slack, normalize):
    layer = NormalizedLinear(3000, 70, normalize=normalize, dtype=dtype)
    assert (norms(layer) - 1).abs().max() < slack
    with torch.no_grad():
        layer.weight.mul_(7).add_(torch.randn_like(layer.weight))
        layer.weight[3] = 0
    layer.constrain_()
    kept = layer.weight.detach().clone()
    expected = norms(layer)
    if normalize == "in":
        assert expected[3] == 0, "a vector of zeros stays one"
        expected[3] = 1
    assert (expected - 1).abs().max() < slack
    layer.constrain_()
    assert torch.equal(layer.weight, kept)


def test_first_directions_are_uniform():
    rows = NormalizedLinear(3, 4000).weight.detach()
    assert rows.mean(0).abs().max() < 0.04
    assert (rows.T @ rows / 4000 - torch.eye(3) / 3).abs().max() < 0.03


def model_with_a_hook():
    torch.manual_seed(0)
    model = nn.Sequential(NormalizedEmbedding(11, 16), NormalizedBlock(16), nn.LayerNorm(16))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def unit_layers(model):
    return [m for m in model.modules() if isinstance(m, NormalizedLinear | NormalizedEmbedding)]


def test_a_hook_keeps_a_model_on_the_sphere_until_it_is_removed():
    model, optimizer = model_with_a_hook()
    with torch.no_grad():
        model[0].weight.mul_(3)
    handle = register_constraint(optimizer, model)
    layers = unit_layers(model)
    assert len(layers) == 8
    assert all(torch.allclose(norms(layer), torch.ones((), dtype=D)) for layer in layers), "at once"
    for hooked in (True, False):
        model(torch.arange(11)[None]).square().sum().backward()
        optimizer.step()
        assert all(torch.allclose(norms(layer), torch.ones((), dtype=D)) for layer in layers) == hooked
        handle.remove()
    ngpt.constrain_(model)
    assert all(torch.allclose(norms(layer), torch.ones((), dtype=D)) for layer in layers)


def test_a_model_without_such_layers_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no layer of the Sequential has a constrain_\(\)"):
        ngpt.constrain_(model)
    with pytest.raises(ValueError, match="nothing to constrain"):
        register_constraint(torch.optim.SGD(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize("normalize", ["in", "out"])
def test_reparametrized_weights_need_no_constraint(normalize):
    layer = NormalizedLinear(6, 5, normalize=normalize, reparametrize=True, dtype=D)
    plain = NormalizedLinear(6, 5, normalize=normalize, dtype=D)
    plain.load_state_dict(layer.state_dict())
    x = tokens(dim=6)
    assert rms_error(layer(x), plain(x)) < 1e-15
    with torch.no_grad():
        layer.weight.mul_(torch.rand(5, 1, dtype=D) + 1 if normalize == "in" else torch.rand(1, 6, dtype=D) + 1)
    assert rms_error(layer(x), plain(x)) < 1e-15
    (gradient,) = torch.autograd.grad(layer(x).sin().sum(), layer.weight)
    along = (gradient * layer.weight).sum(1 if normalize == "in" else 0)
    assert along.abs().max() < 1e-13 < rms(gradient), "the gradient is tangential"


def test_reparametrize_reaches_every_matrix_of_a_block():
    block = NormalizedBlock(16, reparametrize=True, dtype=D)
    x = tokens(dim=16)
    want = block(x)
    with torch.no_grad():
        for layer in unit_layers(block):
            layer.weight.mul_(3)
    assert rms_error(block(x), want) < 1e-14


def test_embedding():
    embed = NormalizedEmbedding(10, 6, dtype=D)
    assert embed(torch.tensor([[1, 3], [9, 1]])).shape == (2, 2, 6)
    assert torch.equal(embed(torch.tensor(3)), embed.weight[3])
    assert torch.allclose(norms(embed), torch.ones((), dtype=D))
    stretched = NormalizedEmbedding(10, 6, reparametrize=True, dtype=D)
    with torch.no_grad():
        stretched.weight.copy_(embed.weight * 5)
    ids = torch.arange(10)
    for layer in (embed, stretched):
        assert rms_error(layer(ids), embed.weight) < 1e-15
        folded = layer.fold()
        assert type(folded) is nn.Embedding
        assert torch.equal(folded(ids), layer(ids))
    with pytest.raises(ValueError, match=r"ids of shape \(2,\) and torch\.float32"):
        embed(torch.zeros(2))
    with pytest.raises(ValueError, match="embedding_dim=0"):
        NormalizedEmbedding(10, 0)


def test_start_from_a_linear_layer():
    linear = nn.Linear(6, 5, dtype=D)
    with torch.no_grad():
        linear.weight[2] = 0
    for normalize in ("in", "out"):
        layer, error = NormalizedLinear.from_linear(linear, normalize=normalize)
        assert error == 0.0
        assert rms_error(layer(tokens(dim=6)), linear(tokens(dim=6))) > 0.1, "the inputs should differ"
        x = tokens(dim=6)
        assert rms_error(layer(x), linear(x)) < 1e-15
        assert torch.allclose(norms(layer), torch.ones((), dtype=D))
    with pytest.raises(ValueError, match=r"^NormalizedLinear with scaled=False loses the norms .* use scaled=True"):
        NormalizedLinear.from_linear(linear, scaled=False)
    with torch.no_grad():
        linear.weight.copy_(unit(linear.weight))
    layer, error = NormalizedLinear.from_linear(linear, scaled=False)
    assert torch.equal(layer.weight, linear.weight)
    assert layer.scale is None


# --- Positions --------------------------------------------------------------------------------------------------------


def test_rotary_is_a_rotation_by_relative_position():
    x, y = torch.randn(2, 1, 9, 2, 8, dtype=D).unbind()
    positions = torch.tensor([0, 1, 2, 3, 5, 8, 100, 1000, 5000])
    table = rotary_table(positions, 8, dtype=D)
    turned_x, turned_y = rotate(x, table), rotate(y, table)
    assert torch.allclose(turned_x.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned_x[:, 0], x[:, 0]), "position 0"
    for i in range(9):
        assert torch.allclose(turned_x[0, i, 1], turned(x[0, i, 1], int(positions[i]), 10000.0), atol=1e-11)
    far = rotary_table(positions + 321, 8, dtype=D)
    scores = lambda a, b: torch.einsum("blhd,bmhd->bhlm", a, b)  # noqa: E731
    assert torch.allclose(scores(rotate(x, far), rotate(y, far)), scores(turned_x, turned_y), atol=1e-11)
    assert not torch.allclose(scores(turned_x, turned_y), scores(x, y), atol=0.1)


def test_both_forms_of_the_rotation_agree(monkeypatch):
    x = torch.randn(2, 5, 3, 8, dtype=D, requires_grad=True)
    table = rotary_table(torch.arange(5), 8, dtype=D)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        y = rotate(x, table)
        results.append((y, torch.autograd.grad(y.sin().sum(), x)[0]))
    for a, b in zip(*results, strict=True):
        assert rms_error(a, b) < 1e-15


def test_outputs_depend_on_relative_positions_only():
    layer = NormalizedAttention(DIM, num_heads=HEADS, dtype=D)
    x = tokens()
    want = layer(x)
    assert rms_error(layer(x, position_ids=torch.arange(LENGTH)), want) == 0
    assert rms_error(layer(x, position_ids=torch.arange(LENGTH) + 77), want) < 1e-12
    each = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) * 3])
    y = layer(x, position_ids=each)
    assert rms_error(y[0], want[0]) < 1e-13
    assert rms_error(y[1], layer(x[1:], position_ids=each[1])[0]) < 1e-13
    assert rms_error(y[1], want[1]) > 1e-3
    for bad in (torch.arange(LENGTH - 1), torch.arange(LENGTH).double(), torch.zeros(3, LENGTH, dtype=torch.long)):
        with pytest.raises(ValueError, match="position_ids of shape"):
            layer(x, position_ids=bad)
    without = NormalizedAttention(DIM, num_heads=HEADS, rotary=False, causal=False, dtype=D)
    order = torch.randperm(LENGTH)
    assert rms_error(without(x[:, order]), without(x)[:, order]) < 1e-13


# --- Masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_masks_leave_tokens_out(causal):
    layer = NormalizedAttention(DIM, num_heads=HEADS, causal=causal, dtype=D)
    x = tokens()
    kept = torch.tensor([0, 1, 3, 6])
    seen = torch.zeros(LENGTH, dtype=torch.bool).index_fill(0, kept, True)
    want = layer(x[:, kept], position_ids=kept)
    added = torch.zeros(LENGTH, dtype=D).masked_fill(~seen, -math.inf)
    for mask in (seen, seen.expand(LENGTH, -1), seen.expand(2, HEADS, LENGTH, -1), added):
        assert rms_error(layer(x, attn_mask=mask)[:, kept], want) < 1e-13
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    assert rms_error(layer(x, attn_mask=everything), layer(x)) < 1e-13
    bias = torch.randn(2, HEADS, LENGTH, LENGTH, dtype=D)
    assert rms_error(layer(x, attn_mask=bias), layer(x)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_token_with_nothing_to_see_gets_zeros_and_no_nan(kind, dtype):
    layer = NormalizedAttention(DIM, num_heads=HEADS, dtype=dtype)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    mask[2] = False
    mask[:, 0] = False  # of a causal layer's first token nothing is left
    if kind == "float":
        mask = torch.zeros(LENGTH, LENGTH).masked_fill(~mask, -math.inf)
    x = tokens(dtype=dtype).requires_grad_()
    y = layer(x, attn_mask=mask)
    assert (y[:, [0, 2]] == 0).all()
    assert y.isfinite().all()
    assert all(rms(y[:, i]) > 0 for i in (1, 3, 4, 5, 6))
    gradients = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][:, 0] == 0).all(), "a token that neither sees nor is seen"


def test_bad_masks_are_refused():
    layer = NormalizedAttention(DIM, num_heads=HEADS)
    x = tokens(dtype=torch.float32)
    for bad in (torch.ones(LENGTH, 5, dtype=torch.bool), torch.ones(3, 1, 1, LENGTH), torch.ones(LENGTH).long()):
        with pytest.raises(ValueError, match=r"attn_mask of shape .* \(2, 3, 7, 7\)"):
            layer(x, attn_mask=bad)


def test_rows_of_zeros_stay_zeros():
    block = NormalizedBlock(DIM, num_heads=HEADS)
    x = tokens(dtype=torch.float32)
    x[0, 0] = 0
    x[1] = 0
    x.requires_grad_()
    y = block(x)
    assert (y[0, 0] == 0).all()
    assert (y[1] == 0).all()
    gradients = torch.autograd.grad(y.sum(), [x, *block.parameters()])
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][1] == 0).all()


def test_nan_in_a_query_is_not_hidden():
    layer = NormalizedAttention(DIM, num_heads=HEADS)
    x = tokens(dtype=torch.float32)
    with torch.no_grad():
        layer.qk_scale[-1] = math.nan
    assert layer(x).isnan().all()
    assert layer(x, attn_mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool)).isnan().all()


# --- The cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [4, 3], [3, 1, 1, 2], [LENGTH]], ids=str)
@pytest.mark.parametrize("cls", [NormalizedAttention, NormalizedBlock], ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_decoding_by_pieces_equals_the_parallel_form(cls, pieces):
    layer = off_start(cls(DIM, num_heads=HEADS, dtype=D))
    x, cache = tokens(), KeyValueCache()
    y = torch.cat([layer(piece, cache=cache) for piece in x.split(pieces, 1)], 1)
    assert rms_error(y, layer(x)) < 1e-13
    assert cache.length == LENGTH


@torch.no_grad()
def test_a_cache_with_masks_and_positions():
    """Prompts of two lengths, padded on the left."""
    layer = NormalizedAttention(DIM, num_heads=HEADS, dtype=D)
    x = tokens()
    seen = torch.ones(2, LENGTH, dtype=torch.bool)
    seen[1, :3] = False
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    cache, out = KeyValueCache(), []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        mask = seen[:, None, None, :stop]
        piece = layer(x[:, start:stop], cache=cache, attn_mask=mask, position_ids=positions[:, start:stop])
        out.append(piece)
    y = torch.cat(out, 1)
    assert rms_error(y[0], layer(x[:1])[0]) < 1e-13
    assert rms_error(y[1, 3:], layer(x[1:, 3:])[0]) < 1e-13
    assert (y[1, :3] == 0).all()


@torch.no_grad()
def test_caches_are_copied_and_reordered():
    layer = NormalizedAttention(DIM, num_heads=HEADS, dtype=D)
    x, other = tokens(3), tokens(3, 2)
    cache = KeyValueCache()
    layer(x, cache=cache)
    twin = copy.deepcopy(cache)
    rows = torch.tensor([2, 2, 0])
    twin.reorder(rows)
    y, again = layer(other, cache=twin), layer(other, cache=cache)
    assert rms_error(y, layer(torch.cat([x[rows], other], 1))[:, LENGTH:]) < 1e-13
    assert rms_error(again, layer(torch.cat([x, other], 1))[:, LENGTH:]) < 1e-13
    KeyValueCache().reorder(rows)  # an empty one has nothing to reorder


def test_a_cache_refuses_what_does_not_go_with_it():
    layer = NormalizedAttention(DIM, num_heads=HEADS)
    x, cache = tokens(dtype=torch.float32), KeyValueCache()
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\)"):
        layer(x, cache=cache)
    with torch.no_grad():
        layer(x, cache=cache)
        with pytest.raises(
            ValueError, match=r"tokens of shape \(1, 7, 3, 8\).*the cache holds 7 of shape \(2, 7, 3, 8\)"
        ):
            layer(x[:1], cache=cache)
        with pytest.raises(ValueError, match=r"torch\.float64.*torch\.float32"):
            layer.double()(x.double(), cache=cache)


def test_the_cache_grows_by_doubling():
    cache, sizes = KeyValueCache(), set()
    for _ in range(100):
        keys, _ = cache.append(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4))
        sizes.add(keys.untyped_storage().nbytes() // 32)
    assert sizes == {1, 2, 4, 8, 16, 32, 64, 128}


# --- Folding ----------------------------------------------------------------------------------------------------------

FOLDED = [
    NormalizedLinear(DIM, 10, normalize="out", scaled=True, dtype=D),
    NormalizedLinear(DIM, 10, False, reparametrize=True, dtype=D),
    NormalizedMLP(DIM, 40, dtype=D),
    NormalizedMLP(DIM, 40, reparametrize=True, dtype=D),
    NormalizedAttention(DIM, num_heads=HEADS, dropout=0.3, dtype=D),
    NormalizedAttention(DIM, num_heads=HEADS, qk_norm=False, rotary=False, causal=False, dtype=D),
    NormalizedBlock(DIM, num_heads=HEADS, dtype=D),
]


@pytest.mark.parametrize("layer", FOLDED, ids=lambda layer: type(layer).__name__)
def test_folding_is_exact_and_leaves_the_layer_alone(layer):
    layer = off_start(copy.deepcopy(layer)).eval()
    x = tokens()
    want, before = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    folded = layer.train().fold()
    assert rms_error(folded(x), want) < 1e-14
    assert rms_error(folded.fold()(x) if hasattr(folded, "fold") else folded(x), want) < 1e-14, "once more"
    assert not unit_layers(folded)
    assert not any(p.requires_grad for p in folded.parameters())
    with torch.no_grad():
        for tensor in folded.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


@torch.no_grad()
def test_a_folded_layer_decodes_with_a_cache_of_its_own():
    layer = off_start(NormalizedBlock(DIM, num_heads=HEADS, dtype=D))
    x, cache, folded = tokens(), KeyValueCache(), layer.fold()
    y = torch.cat([folded(piece, cache=cache) for piece in x.split(2, 1)], 1)
    assert rms_error(y, layer(x)) < 1e-13


# --- Options ----------------------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only():
    layer = NormalizedAttention(DIM, num_heads=HEADS, dropout=0.5, dtype=D)
    x = tokens()
    assert rms_error(layer(x), layer(x)) > 0.1
    layer.eval()
    without = NormalizedAttention(DIM, num_heads=HEADS, dtype=D)
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), without(x))


def test_without_qk_norm_the_scores_follow_the_input():
    layer = NormalizedAttention(DIM, num_heads=HEADS, qk_norm=False, dtype=D)
    x = tokens()
    assert rms_error(layer(2 * x), 2 * layer(x)) > 1e-2
    layer.qk_norm = True
    assert rms_error(layer(2 * x), 2 * layer(x)) < 1e-13


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NormalizedAttention(200), r"num_heads=3, the default, does not divide dim=200"),
        (lambda: NormalizedAttention(16, num_heads=3), r"num_heads=3 does not divide dim=16"),
        (lambda: NormalizedAttention(15), r"head_dim=15: must be even, for rotary=True"),
        (lambda: NormalizedAttention(16, head_dim=0), r"head_dim=0"),
        (lambda: NormalizedAttention(16, dropout=1.0), r"dropout=1\.0: must be at least 0 and below 1"),
        (lambda: NormalizedAttention(16, softmax_scale=0.0), r"softmax_scale=0\.0: must be a finite number above 0"),
        (lambda: NormalizedAttention(16, qk_scale_scale=-1.0), r"qk_scale_scale=-1\.0"),
        (lambda: NormalizedAttention(16, rope_theta=math.inf), r"rope_theta=inf"),
        (lambda: NormalizedBlock(16, alpha_init=0.0), r"alpha_init=0\.0"),
        (lambda: NormalizedMLP(16, 0), r"hidden_dim=0"),
        (lambda: NormalizedMLP(16, scale_init=0), r"scale_init=0"),
        (lambda: NormalizedLinear(4, 4, normalize="rows"), r"normalize='rows': must be 'in' .* or 'out'"),
    ],
)
def test_bad_options_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_sizes_that_do_not_divide_are_fine_with_a_head_dim_or_without_rotary():
    assert NormalizedAttention(200, head_dim=64)(tokens(1, 2, 200, torch.float32)).shape == (1, 2, 200)
    assert NormalizedAttention(15, rotary=False)(tokens(1, 2, 15, torch.float32)).shape == (1, 2, 15)
