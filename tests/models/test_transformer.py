import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.budget import count_flops, count_parameters
from archzoo.layers.phm import PHMLinear
from archzoo.layers.phm_attention import PHMAttention
from archzoo.layers.phm_sequence import PHMEmbedding
from archzoo.models.model import LayerFactory, models
from tests.helpers import rms_error


def build(layer="linear", input_shape=(6,), output_size=11, **options):
    kwargs = options.pop("layer_options", {})
    return models.create(
        "transformer", LayerFactory(layer, kwargs), input_shape, output_size, **{"width": 32, **options}
    )


def tokens(batch=2, length=6):
    return torch.randint(11, (batch, length))


@pytest.mark.parametrize("layer", ["linear", "phm", "kan", "phm_attention"])
def test_every_token_is_predicted_from_itself_and_those_before_only(layer):
    model = build(layer)
    first, later = tokens(), None
    later = first.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 11
    y = model(first)
    assert y.shape == (2, 6, 11)
    assert torch.equal(y[:, :4], model(later)[:, :4])
    assert not torch.equal(y[:, 4:], model(later)[:, 4:])
    assert rms_error(model(first[:, :3]), y[:, :3]) < 1e-5


def test_it_is_torchs_own_encoder_with_a_causal_mask():
    model = build(depth=1, heads=2).double()
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True, dtype=torch.float64)
    block = model.blocks[0]
    names = {
        "self_attn.in_proj_weight": block.mixer.qkv.weight,
        "self_attn.in_proj_bias": block.mixer.qkv.bias,
        "self_attn.out_proj.weight": block.mixer.proj.weight,
        "self_attn.out_proj.bias": block.mixer.proj.bias,
        "linear1.weight": block.mlp.fc1.weight,
        "linear1.bias": block.mlp.fc1.bias,
        "linear2.weight": block.mlp.fc2.weight,
        "linear2.bias": block.mlp.fc2.bias,
        **{f"norm{i}.{p}": getattr(getattr(block, f"norm{i}"), p) for i in (1, 2) for p in ("weight", "bias")},
    }
    theirs.load_state_dict({name: p.detach() for name, p in names.items()})
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    assert rms_error(block(x), theirs(x, src_mask=mask)) < 1e-13
    t = tokens()
    u = block(model.tokens(t) + model.places.weight)
    assert torch.equal(model(t), model.head(model.norm(u)))


def test_all_maps_of_a_block_are_the_contestants_and_no_others():
    model = build("phm", depth=3, layer_options={"rule": "quaternion"})
    layers = [name for name, m in model.named_modules() if isinstance(m, PHMLinear)]
    assert layers == [f"blocks.{i}.{m}" for i in range(3) for m in ("mixer.qkv", "mixer.proj", "mlp.fc1", "mlp.fc2")]
    assert [type(b.mlp.act) for b in model.blocks] == [nn.GELU] * 3
    assert type(build("fast_kan").blocks[0].mlp.act) is nn.Identity
    assert [name for name, m in model.named_modules() if isinstance(m, nn.Linear)] == ["head"]
    assert model.blocks[0].mlp.fc1.rule == "quaternion"


def test_a_mixer_takes_the_place_of_attention():
    model = build("phm_attention", layer_options={"num_heads": 2, "n": 2})
    assert isinstance(model.blocks[1].mixer, PHMAttention)
    assert model.blocks[1].mixer.causal
    assert model.blocks[1].mixer.num_heads == 2
    assert type(model.blocks[1].mlp.fc1) is nn.Linear
    assert build("phm_attention", layer_options={"causal": True}).blocks[0].mixer.causal
    with pytest.raises(ValueError, match="^causal=False: model 'transformer' predicts the next token"):
        build("phm_attention", layer_options={"causal": False})


def test_widths_scale_the_whole_model_unless_the_size_of_a_token_is_given():
    model = build(width=48, depth=2)
    assert (model.norm.normalized_shape, model.blocks[0].mlp.fc1.out_features) == ((12,), 48)
    model = build(widths=(40, 48))
    assert [b.mlp.fc1.out_features for b in model.blocks] == [40, 48]
    assert model.head.in_features == 12
    assert build(widths=(5, 7), dim=8).head.in_features == 8
    with torch.device("meta"):
        counts = [count_parameters(build(widths=(w, w), dim=8)) for w in (10, 11, 12)]
    assert counts[1] - counts[0] == counts[2] - counts[1] == 2 * (8 + 1 + 8)
    with torch.device("meta"):
        assert count_flops(build().eval(), torch.zeros(1, 6, dtype=torch.int64)) > 0


def test_embedding_may_be_phm_its_tokens_rounded_up():
    model = build("phm", embedding="phm", layer_options={"n": 2})
    assert isinstance(model.tokens, PHMEmbedding)
    assert (model.tokens.n, model.tokens.num_embeddings) == (2, 12)
    assert build(embedding="phm").tokens.n == 4
    assert build("phm", embedding="phm").tokens.n == 4
    other = build(embedding="phm", embedding_n=8)
    assert (other.tokens.n, other.tokens.num_embeddings) == (8, 16)
    assert other(tokens()).shape == (2, 6, 11)
    assert type(build().tokens) is nn.Embedding


def test_it_learns_to_repeat_and_compiles_as_a_whole():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = build("phm", input_shape=(8,), output_size=4, width=64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        half = torch.randint(4, (32, 4))
        x = torch.cat([half, half], 1)
        loss = F.cross_entropy(model(x)[:, 3:-1].flatten(0, 1), x[:, 4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 < torch.log(torch.tensor(4.0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_dropout_is_everywhere_and_for_training_only():
    model = build(dropout=0.3)
    assert (model.drop.p, model.blocks[0].drop.p, model.blocks[0].mlp.drop1.p, model.blocks[0].mixer.dropout) == (
        0.3,
    ) * 4
    t = tokens()
    assert not torch.equal(model(t), model(t))
    model.eval()
    assert torch.equal(model(t), model(t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "conv2d"}, "model 'transformer' is made of layers of kind 'linear'"),
        ({"input_shape": (1, 8, 8)}, "takes tokens (length,), not inputs of shape (1, 8, 8)"),
        ({"width": 0}, "width=0, depth=2: both must be 1 or more"),
        ({"depth": 0}, "depth=0"),
        ({"width": 30}, "width=30: must be a multiple of 4, for dim=None is a quarter of it"),
        ({"width": 20}, "heads=4: must divide dim=5"),
        ({"heads": 0}, "heads=0"),
        ({"dim": 9}, "heads=4: must divide dim=9"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"embedding": "hashed"}, "embedding='hashed': must be 'usual' or 'phm'"),
        ({"embedding_n": 2}, "embedding_n=2: has no use with embedding='usual'"),
        ({"embedding": "phm", "embedding_n": 3}, "embedding_n=3: must be a whole number that divides dim=8"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


def test_a_mixer_that_is_not_known_to_be_causal_is_refused(monkeypatch):
    import archzoo.registry
    from archzoo.registry import Card, LayerEntry

    class Mean(nn.Module):
        def __init__(self, dim, *, device=None, dtype=None):
            super().__init__()

    entry = LayerEntry("mean", Mean, "mixer", Card("-", "-", 2000, "", "y = x", "-", "-"), False)
    monkeypatch.setitem(archzoo.registry._entries, "mean", entry)
    with pytest.raises(ValueError, match="layer='mean': model 'transformer' .* is not causal and has no option for it"):
        build("mean")


def test_an_input_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"input of shape \(2, 7\): must be \(batch, length\), length 6 or less"):
        build()(tokens(length=7))
