"""The plain GPT and the one with normalised queries and keys, nGPT's baselines."""

import math

import pytest
import torch
from torch.nn import functional as F

from archzoo.layers.attention import NORM_EPS, GatedMLP, RotaryAttention
from archzoo.models.gpt import GPT
from tests.helpers import rms_error

V, DIM, DEPTH, HEADS = 17, 24, 2, 3
D = torch.float64
both = pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])


def model(**options):
    torch.manual_seed(0)
    return GPT(V, DIM, DEPTH, **{"num_heads": HEADS, "dtype": D, **options})


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight


def plain_forward(net, ids):
    """The same as equations: one matrix of scores, one rotation by complex numbers."""
    state, size = dict(net.named_parameters()), DIM // HEADS
    angles = torch.arange(ids.shape[1], dtype=D)[:, None] * 10000.0 ** (-torch.arange(0, size, 2, dtype=D) / size)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    past = torch.ones(ids.shape[1], ids.shape[1]).tril() == 1
    x = state["embed.weight"][ids]
    for i in range(DEPTH):
        p = {name.removeprefix(f"blocks.{i}."): t for name, t in state.items() if name.startswith(f"blocks.{i}.")}
        h = rms_norm(x, p["norm1.weight"])
        q, k, v = ((h @ p[f"mixer.{name}_proj.weight"].T).unflatten(-1, (HEADS, size)) for name in "qkv")
        if "mixer.q_norm.weight" in p:
            q, k = rms_norm(q, p["mixer.q_norm.weight"]), rms_norm(k, p["mixer.k_norm.weight"])
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for t in (q, k)
        )
        weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(size)).masked_fill(~past, -math.inf).softmax(-1)
        x = x + torch.einsum("bhlm,bmhd->blhd", weights, v).flatten(-2) @ p["mixer.out_proj.weight"].T
        h = rms_norm(x, p["norm2.weight"])
        u, gate = h @ p["mlp.up_proj.weight"].T, h @ p["mlp.gate_proj.weight"].T
        x = x + (u * gate * torch.sigmoid(gate)) @ p["mlp.down_proj.weight"].T
    return rms_norm(x, state["norm.weight"]) @ state["head.weight"].T


@both
def test_it_is_the_pre_norm_transformer(qk_norm):
    net = model(qk_norm=qk_norm)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.randint(V, (2, 9))
    assert rms_error(net(ids), plain_forward(net, ids)) < 1e-13
    assert not [name for name, _ in net.named_parameters() if "bias" in name]


@both
def test_first_weights_and_logits(qk_norm):
    torch.manual_seed(1)
    net = GPT(300, 128, 4, qk_norm=qk_norm)
    for name, parameter in net.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            writes = name.endswith(("out_proj.weight", "down_proj.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(8) if writes else 0.02, rel=0.05), name
    loss = F.cross_entropy(net(torch.randint(300, (8, 32))).flatten(0, 1), torch.randint(300, (256,)))
    assert loss.item() == pytest.approx(math.log(300), abs=0.1)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    torch.manual_seed(2)
    net.reset_parameters()
    assert not torch.equal(net.head.weight, before["head.weight"])


def test_qk_norm_frees_the_scores_of_the_inputs_scale():
    x = torch.randn(2, 7, DIM, dtype=D)
    for qk_norm in (True, False):
        layer = RotaryAttention(DIM, num_heads=HEADS, qk_norm=qk_norm, dtype=D)
        assert (rms_error(layer(1e3 * x), 1e3 * layer(x)) < 1e-4) == qk_norm


@both
def test_it_learns(qk_norm):
    net = model(qk_norm=qk_norm, dtype=torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, betas=(0.9, 0.95))
    losses = []
    for _ in range(40):
        ids = (torch.randint(V, (16, 1)) + torch.arange(9)) % V
        loss = F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_every_parameter_trains_also_compiled():
    net, ids = GPT(V, DIM, 1, num_heads=HEADS, qk_norm=True, dtype=D), torch.randint(V, (2, 9))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for function in (net, compiled):
        logits = function(ids)
        results.append((logits, *torch.autograd.grad(logits.sin().sum(), list(net.parameters()))))
    for got, want in zip(*results, strict=True):
        assert rms_error(got, want) < 1e-11
        assert want.abs().max() > 0
    torch._dynamo.reset()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_and_autocast(qk_norm, dtype):
    net, ids = model(qk_norm=qk_norm, dtype=torch.float32), torch.randint(V, (2, 9))
    want = net(ids)
    with torch.autocast("cpu", dtype):
        mixed = net(ids)
    stored = model(qk_norm=qk_norm, dtype=torch.float32).to(dtype)(ids)
    for logits in (mixed, stored):
        assert logits.dtype == dtype
        assert rms_error(logits, want) < 3e-2


def test_tied_embeddings_and_decay():
    import timm.optim

    net = model(tie_embeddings=True)
    assert net.head.weight is net.embed.weight
    optimizer = timm.optim.create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.1)
    for group in optimizer.param_groups:
        assert all((p.dim() == 1) == (group["weight_decay"] == 0) for p in group["params"])
    assert net.no_weight_decay() == {name for name, p in net.named_parameters() if p.dim() == 1}


def test_masks_and_positions():
    net, ids = model(), torch.randint(V, (2, 9))
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[1, :3] = False
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    logits = net(ids, attn_mask=seen[:, None, None], position_ids=positions)
    assert rms_error(logits[0], net(ids[:1])[0]) < 1e-13
    assert rms_error(logits[1, 3:], net(ids[1:, 3:])[0]) < 1e-13
    assert logits.isfinite().all()


def test_dropout_acts_in_training_only():
    net, ids = model(dropout=0.5), torch.randint(V, (2, 9))
    assert rms_error(net(ids), net(ids)) > 0.1
    net.eval()
    assert torch.equal(net(ids), net(ids))
    assert rms_error(net(ids), model()(ids)) < 1e-15


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GPT(V, DIM, 0), "depth=0"),
        (lambda: GPT(V, 30, 1, num_heads=2), "head_dim=15: must be even"),
        (lambda: GPT(V, DIM, 1, num_heads=5), "num_heads=5 does not divide dim=24"),
        (lambda: GPT(V, DIM, 1, dropout=2.0), r"dropout=2\.0"),
        (lambda: GatedMLP(DIM, 0), "hidden_dim=0"),
    ],
    ids=["depth", "head_dim", "num_heads", "dropout", "hidden_dim"],
)
def test_bad_options_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_unknown_options_and_bad_inputs_are_refused():
    with pytest.raises(TypeError, match="no_such_option"):
        GPT(V, DIM, 1, no_such_option=1)
    with pytest.raises(ValueError, match=r"ids of shape \(3,\)"):
        model()(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"input of shape \(2, 3, 5\): .* dim=24"):
        RotaryAttention(DIM, num_heads=HEADS)(torch.zeros(2, 3, 5))
