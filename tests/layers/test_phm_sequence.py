"""Embedding, LSTM, attention and block of PHM layers: equal to the usual ones where they must be."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.layers.phm import PHMLinear, hypercomplex_rule, share_rule_
from archzoo.layers.phm_attention import PHMAttention, PHMTransformerBlock
from archzoo.layers.phm_sequence import PHMLSTM, PHMEmbedding, PHMLSTMCell
from tests.helpers import RecordOps, rms_error

REAL = {"n": 1, "rule": "real", "dtype": torch.float64}
RULES = [{"n": 1}, {"n": 2}, {"n": 4}, {"n": 4, "rule": "quaternion"}, {"n": 4, "rule": "mixing"}]
DOUBLE = {"dtype": torch.float64}


# --- Embedding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", RULES, ids=str)
def test_embedding_gives_the_rows_of_the_table_and_its_gradients(options):
    layer = PHMEmbedding(12, 8, **options, **DOUBLE)
    tokens = torch.randint(12, (3, 5))
    table = layer.weight
    if layer.rule != "mixing":
        table = sum(torch.kron(a, s) for a, s in zip(layer.A, layer.S, strict=True))
    y, want = layer(tokens), F.embedding(tokens, table)
    assert rms_error(y, want) < 1e-14
    assert rms_error(layer.weight, table) < 1e-14
    leaves, dy = list(layer.parameters()), torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        assert rms_error(a, b) < 1e-13
    assert layer(tokens.int()).shape == (3, 5, 8)
    assert layer(tokens[:0]).shape == (0, 5, 8)
    assert layer(torch.tensor(7)).shape == (8,)


def test_embedding_never_builds_the_table():
    layer = PHMEmbedding(4096, 64)
    sizes = []
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        layer(torch.arange(3)).sum().backward()
    for event in profile.function_events:
        sizes += [torch.Size(shape).numel() for shape in event.input_shapes if shape]
    assert max(sizes) <= layer.S.numel() == 4096 * 64 // 4
    with RecordOps() as recorded:
        layer(torch.arange(3))
    assert not any("kron" in str(op) for op in recorded.ops)


@pytest.mark.parametrize("options", RULES, ids=str)
def test_embedding_has_unit_variance(options):
    variances = torch.tensor([PHMEmbedding(64, 32, **options).weight.var().item() for _ in range(60)])
    assert abs(variances.mean() - 1) < max(4 * variances.std() / 60**0.5, 0.02)


def test_embedding_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"^num_embeddings=65: must be a multiple of n=4; round up to 68"):
        PHMEmbedding(65, 8)
    with pytest.raises(ValueError, match=r"^embedding_dim=6: must be a multiple of n=4"):
        PHMEmbedding(64, 6)
    layer = PHMEmbedding(12, 8)
    for token in (12, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([token]))
    with pytest.raises(ValueError, match="float32"):
        layer(torch.zeros(3))


def test_embedding_keeps_its_dtype_under_autocast_compiles_and_copies():
    torch._dynamo.reset()
    layer, tokens = PHMEmbedding(12, 8), torch.randint(12, (3, 5))
    want = layer(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(tokens), want)
        assert rms_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(tokens), want) < 1e-6
    assert torch.equal(copy.deepcopy(layer)(tokens), want)
    program = torch.export.export(layer, (tokens,)).module()
    assert rms_error(program(tokens), want) < 1e-6


# --- LSTM -------------------------------------------------------------------------------------------------------------


def copied(lstm, **options):
    """A PHM LSTM of n = 1 with the weights of an `nn.LSTM`."""
    directions = 2 if lstm.bidirectional else 1
    ours = PHMLSTM(
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        lstm.bias,
        lstm.batch_first,
        lstm.dropout,
        lstm.bidirectional,
        **REAL,
        **options,
    )
    for index, cell in enumerate(ours.cells):
        suffix = f"l{index // directions}" + ("_reverse" if index % directions else "")
        for name in ("ih", "hh"):
            layer = getattr(cell, name)
            layer.S.data = getattr(lstm, f"weight_{name}_{suffix}").detach().clone()[None]
            if lstm.bias:
                layer.bias.data = getattr(lstm, f"bias_{name}_{suffix}").detach().clone()
    return ours


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bias": False}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}],
    ids=str,
)
@pytest.mark.parametrize("given", [False, True], ids=["no state", "state"])
def test_with_n_1_it_is_torchs_lstm(options, given):
    theirs = nn.LSTM(6, 5, **options, **DOUBLE)
    ours = copied(theirs)
    x = torch.randn(7, 3, 6, dtype=torch.float64)
    cells, batch = len(ours.cells), 7 if theirs.batch_first else 3
    state = tuple(torch.randn(2, cells, batch, 5, dtype=torch.float64)) if given else None
    results = []
    for lstm in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y, (h, c) = lstm(leaf, state)
        (y.sin().sum() + h.cos().sum() + c.sin().sum()).backward()
        results.append([y, h, c, leaf.grad])
    for a, b in zip(*results, strict=True):
        assert rms_error(b, a) < 1e-13
    assert rms_error(ours.cells[0].hh.S.grad[0], theirs.weight_hh_l0.grad) < 1e-12
    single = None if state is None else tuple(s[:, 0] for s in state)
    one = x[0] if theirs.batch_first else x[:, 0]
    for a, b in zip(theirs(one, single)[1], ours(one, single)[1], strict=True):
        assert rms_error(b, a) < 1e-13


def test_a_cell_of_n_1_is_torchs_cell():
    theirs, ours = nn.LSTMCell(6, 5, **DOUBLE), PHMLSTMCell(6, 5, **REAL)
    for name in ("ih", "hh"):
        getattr(ours, name).S.data = getattr(theirs, f"weight_{name}").detach().clone()[None]
        getattr(ours, name).bias.data = getattr(theirs, f"bias_{name}").detach().clone()
    x, h, c = (torch.randn(3, size, dtype=torch.float64) for size in (6, 5, 5))
    for state in (None, (h, c)):
        for a, b in zip(theirs(x, state), ours(x, state), strict=True):
            assert rms_error(b, a) < 1e-14


@pytest.mark.parametrize("options", [*RULES, {"n": 2, "rank": 1}], ids=str)
def test_the_sequence_is_the_cell_step_by_step(options):
    lstm = PHMLSTM(8, 4, **options, **DOUBLE)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    y, (h, c) = lstm(x)
    state = None
    for t in range(5):
        state = lstm.cells[0](x[t], state)
        assert rms_error(y[t], state[0]) < 1e-13
    assert rms_error(h[0], state[0]) < 1e-13
    assert rms_error(c[0], state[1]) < 1e-13
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in lstm.parameters())


def test_arguments_come_in_the_order_of_torchs():
    def names(cls):
        return list(inspect.signature(cls).parameters)

    order = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    assert names(PHMLSTM)[:7] == order
    assert names(PHMLSTMCell)[:3] == list(inspect.signature(nn.LSTMCell).parameters)[:3]


def test_dropout_is_between_layers_and_in_training_only():
    lstm = PHMLSTM(4, 4, 2, dropout=0.5, **DOUBLE)
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    lstm.eval()
    assert torch.equal(lstm(x)[0], lstm(x)[0])
    one = PHMLSTM(4, 4, 1, dropout=0.5, **DOUBLE)
    assert torch.equal(one(x)[0], one(x)[0])


def test_state_names_parameters_and_autocast():
    lstm = PHMLSTM(8, 8, 2)
    assert list(lstm.state_dict())[:6] == [
        f"cells.0.{name}" for name in ["ih.A", "ih.S", "ih.bias", "hh.A", "hh.S", "hh.bias"]
    ]
    assert share_rule_(lstm) == 4
    assert sum(p.numel() for p in lstm.parameters()) == 64 + 4 * (8 * 32 // 4 + 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = lstm(torch.randn(5, 2, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lstm.parameters())
    assert lstm(torch.randn(5, 0, 8))[0].shape == (5, 0, 8)


def test_lstm_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^input_size=6: must be a multiple of n=4"):
        PHMLSTM(6, 8)
    with pytest.raises(ValueError, match=r"^num_layers=0: "):
        PHMLSTM(8, 8, 0)
    with pytest.raises(ValueError, match=r"^dropout=1.5: "):
        PHMLSTM(8, 8, dropout=1.5)
    lstm = PHMLSTM(8, 4)
    with pytest.raises(ValueError, match=r"input of shape \(5, 2, 7\)"):
        lstm(torch.randn(5, 2, 7))
    with pytest.raises(ValueError, match="must have a step at least"):
        lstm(torch.randn(0, 2, 8))
    with pytest.raises(ValueError, match="PackedSequence"):
        lstm(nn.utils.rnn.pack_sequence([torch.randn(3, 8)]))
    with pytest.raises(ValueError, match=r"^c_0 of shape \(1, 3, 4\): must be .* \(1, 2, 4\)"):
        lstm(torch.randn(5, 2, 8), (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)))
    with pytest.raises(ValueError, match=r"^h of shape \(3, 5\): must be \(3, 4\)"):
        PHMLSTMCell(8, 4)(torch.randn(3, 8), (torch.zeros(3, 5), torch.zeros(3, 4)))


# --- Attention and block ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_with_n_1_is_torchs(causal):
    theirs, ours = (
        nn.MultiheadAttention(8, 2, batch_first=True, **DOUBLE),
        PHMAttention(8, num_heads=2, causal=causal, **REAL),
    )
    with torch.no_grad():
        ours.qkv.S.copy_(theirs.in_proj_weight[None])
        ours.qkv.bias.copy_(theirs.in_proj_bias.normal_())
        ours.proj.S.copy_(theirs.out_proj.weight[None])
        ours.proj.bias.copy_(theirs.out_proj.bias.normal_())
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else None
    assert rms_error(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0]) < 1e-13


@pytest.mark.parametrize("cls", [PHMAttention, PHMTransformerBlock])
def test_a_causal_one_does_not_see_the_future(cls):
    layer = cls(8, causal=True, **DOUBLE)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    later = x.clone()
    later[:, 4:] += 1
    assert torch.equal(layer(x)[:, :4], layer(later)[:, :4])
    assert not torch.equal(layer(x)[:, 4:], layer(later)[:, 4:])
    assert not torch.equal(cls(8, **DOUBLE)(x)[:, :4], cls(8, **DOUBLE)(later)[:, :4])


def test_block_is_what_its_equation_says():
    block = PHMTransformerBlock(8, num_heads=2, mlp_ratio=2, rank=1, **DOUBLE)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    u = x + block.attention(block.norm1(x))
    assert torch.equal(block(x), u + block.fc2(F.gelu(block.fc1(block.norm2(u)))))
    assert (block.fc1.out_features, block.fc1.rank) == (16, 1)
    assert PHMTransformerBlock(8, n=8, mlp_ratio=1.3).fc1.out_features == 8


def test_layers_of_a_block_can_share_a_rule():
    block = PHMTransformerBlock(8, share_rule=True)
    layers = [m for m in block.modules() if isinstance(m, PHMLinear)]
    assert len({id(layer.A) for layer in layers}) == 1
    assert len(layers) == 4
    assert len({id(m.A) for m in PHMTransformerBlock(8).modules() if isinstance(m, PHMLinear)}) == 4
    rule = nn.Parameter(hypercomplex_rule(4))
    assert PHMTransformerBlock(8, rule=rule).fc2.A is rule
    with pytest.raises(ValueError, match="share_rule=True: rule='quaternion' is not learned"):
        PHMTransformerBlock(8, rule="quaternion", share_rule=True)


@pytest.mark.parametrize("cls", [PHMAttention, PHMTransformerBlock])
def test_dropout_is_for_training_only(cls):
    layer, x = cls(8, dropout=0.5), torch.randn(2, 5, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("cls", [PHMAttention, PHMTransformerBlock])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 3}, r"num_heads=3: must divide dim=8"),
        ({"n": 3}, r"dim=8: must be a multiple of n=3"),
        ({"dropout": 1.0}, r"dropout=1.0"),
        ({"rule": "octonion"}, r"n=4: rule='octonion' needs n=8"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(cls, options, text):
    with pytest.raises(ValueError, match=text):
        cls(8, **options)
    with pytest.raises(ValueError, match=r"mlp_ratio=0.1: "):
        PHMTransformerBlock(8, mlp_ratio=0.1)


def test_a_block_keeps_the_residual_streams_dtype_under_autocast():
    torch._dynamo.reset()
    block, x = PHMTransformerBlock(16), torch.randn(3, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == compiled.dtype == torch.float32
    assert rms_error(y, block(x)) < 1e-2
    assert rms_error(compiled, y) < 1e-2
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())
