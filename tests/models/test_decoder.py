"""Language models of any mixer and feed-forward net: caches, starts, and what the trainer's `decoder` builds."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.layers._cache import InputCache, KeyValueCache, StateCache
from archzoo.layers.attention import GatedMLP
from archzoo.layers.mamba import Mamba
from archzoo.layers.ngpt import NormalizedMLP
from archzoo.models.decoder import Decoder
from archzoo.models.language_model import decoder, language_model
from archzoo.models.model import LayerFactory
from archzoo.models.ngpt import NGPT
from archzoo.models.vit import LayerMLP
from tests.helpers import rms_error

V, DIM = 19, 24
D = torch.float64
MIXERS = {
    "attention": ({"num_heads": 3}, KeyValueCache),
    "ngpt": ({"num_heads": 3}, KeyValueCache),
    "mamba": ({"d_state": 4}, StateCache),
    "mamba2": ({"d_state": 4, "headdim": 8}, StateCache),
    "mamba3": ({"d_state": 4, "headdim": 8}, StateCache),
    "selective_ssm": ({"d_state": 4}, StateCache),
    "phm_attention": ({"num_heads": 3, "n": 2}, InputCache),
}
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def model(mixer="attention", depth=2, **options):
    torch.manual_seed(0)
    return language_model(V, DIM, depth, mixer=mixer, mixer_options=MIXERS[mixer][0], dtype=D, **options)


def ids(batch=2, length=9, seed=1):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


@every_mixer
def test_no_token_sees_a_later_one(mixer):
    net, text = model(mixer), ids()
    logits = net(text)
    changed = text.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    assert logits.shape == (2, 9, V)
    assert rms_error(net(changed)[:, :5], logits[:, :5]) < 1e-13
    assert rms_error(net(changed)[:, 5], logits[:, 5]) > 1e-3


@every_mixer
def test_piece_by_piece_it_says_the_same(mixer):
    net, text = model(mixer).eval(), ids()
    whole, cache = net(text), net.new_cache()
    assert {type(own) for own in cache} == {MIXERS[mixer][1]}
    with torch.no_grad():
        for begin, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
            assert rms_error(net.next_logits(text[:, begin:end], cache), whole[:, end - 1]) < 1e-12


@every_mixer
def test_caches_are_copied_and_reordered(mixer):
    net, text = model(mixer).eval(), ids(3)
    cache, rows = net.new_cache(), torch.tensor([2, 0, 0])
    with torch.no_grad():
        net.next_logits(text[:, :5], cache)
        other = copy.deepcopy(cache)
        for own in other:
            own.reorder(rows)
        continued = net.next_logits(text[:, 5:6], other)
        want = net(torch.cat([text[rows, :5], text[:, 5:6]], 1))[:, -1]
        assert rms_error(continued, want) < 1e-12
        assert rms_error(net.next_logits(text[:, 5:6], cache), net(text[:, :6])[:, -1]) < 1e-12


@every_mixer
def test_the_likeliest_tokens_are_those_of_the_whole_text(mixer):
    net = model(mixer)
    prompt = ids(2, 3)
    written = torch.stack(list(net.generate(prompt, 5, temperature=0)), 1)
    text = prompt
    for _ in range(5):
        text = torch.cat([text, net.eval()(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, text[:, 3:])
    same = [torch.stack(list(net.generate(prompt, 5, top_k=7, seed=3)), 1) for _ in range(2)]
    assert torch.equal(*same)


def test_a_state_does_not_grow():
    net, cache = model("mamba").eval(), model("mamba").new_cache()
    sizes = []
    with torch.no_grad():
        for token in ids(1, 30).T:
            net.next_logits(token[:, None], cache)
            sizes.append(sum(part.numel() for own in cache for part in own.state))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("mixer", ["attention", "ngpt", "mamba"])
def test_it_learns_with_every_parameter(mixer):
    torch.manual_seed(0)
    net = language_model(V, DIM, 1, mixer=mixer, mlp="kan" if mixer != "mamba" else "auto")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        text = (torch.randint(V, (16, 1)) + torch.arange(9)) % V
        loss = F.cross_entropy(net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_a_mixer_may_want_wide_heads():
    assert language_model(V, 512, 1, mixer="mamba2", mixer_options={"headdim": 512}, device="meta").dim == 512


def test_first_weights():
    torch.manual_seed(1)
    net = Decoder(300, 128, 4, mixer="mamba", mlp="gated")
    assert net.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    block = net.blocks[1]
    uniform = 1 / math.sqrt(3 * 256)
    assert block.mixer.out_proj.weight.std().item() == pytest.approx(uniform / 2, rel=0.05)
    assert block.mixer.in_proj.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 128), rel=0.05)
    assert torch.equal(block.mixer.A_log[0].exp().round(), torch.arange(1.0, 17.0))
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    torch.manual_seed(1)
    net.reset_parameters()
    torch.manual_seed(1)
    again = Decoder(300, 128, 4, mixer="mamba", mlp="gated").state_dict()
    assert not torch.equal(net.head.weight, before["head.weight"]), "the first start drew twice, this one once"
    assert torch.equal(again["head.weight"], before["head.weight"])


def test_packed_texts_do_not_see_each_other():
    net, text = model("mamba"), ids(1, 9)
    borders = torch.tensor([[0] * 4 + [1] * 5])
    packed = net(text, seq_idx=borders)
    assert rms_error(packed[:, 4:], net(text[:, 4:])) < 1e-12
    cache = net.new_cache()
    with torch.no_grad(), pytest.raises(ValueError, match="seq_idx.* with a cache: Mamba"):
        net(text, seq_idx=borders, cache=cache)


def test_weight_decay_leaves_vectors_and_states_alone():
    import timm.optim

    net = model("mamba")
    optimizer = timm.optim.create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.1)
    names = {p: name for name, p in net.named_parameters()}
    spared = {names[p] for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {"norm.weight", "blocks.0.norm1.weight", "blocks.0.mixer.A_log", "blocks.0.mixer.D"} <= spared
    assert not {"embed.weight", "blocks.0.mixer.in_proj.weight"} & spared


# ---- what is built for whom


def test_two_blocks_of_mamba_stand_for_one_of_a_transformer():
    net = language_model(V, 32, 3, mixer="mamba")
    assert len(net.blocks) == 6
    assert all(isinstance(block.mixer, Mamba) and block.mlp is None for block in net.blocks)
    with_mlp = language_model(V, 32, 3, mixer="mamba", mlp="gated")
    assert len(with_mlp.blocks) == 3
    assert all(isinstance(block.mlp, GatedMLP) for block in with_mlp.blocks)


def test_ngpt_is_the_whole_model():
    torch.manual_seed(0)
    net = language_model(V, DIM, 2, mixer="ngpt", mixer_options={"num_heads": 3})
    torch.manual_seed(0)
    want = NGPT(V, DIM, 2, num_heads=3, alpha_init=0.5)
    assert torch.equal(net(ids()), want(ids()))
    swapped = language_model(V, DIM, 2, mixer="ngpt", mlp="phm", hidden_dim=[32, 48], mlp_options={"n": 2})
    assert isinstance(swapped.blocks[0].mlp, LayerMLP)
    assert swapped.blocks[1].mlp.fc1.out_features == 48
    assert (swapped(ids()).norm() > 0).item()


def test_the_contestant_takes_its_place():
    shapes = ((16,), V)
    as_mixer = decoder(LayerFactory("mamba", {"d_state": 4}), *shapes, width=96, depth=2)
    assert [block.mixer.d_state for block in as_mixer.blocks] == [4] * 4
    assert as_mixer.dim == 24
    as_mlp = decoder(LayerFactory("phm", {"n": 2}), *shapes, widths=(64, 96), mixer="mamba")
    assert [block.mlp.fc1.out_features for block in as_mlp.blocks] == [64, 96]
    assert isinstance(as_mlp.blocks[0].mixer, Mamba)
    assert isinstance(as_mlp.blocks[0].mlp.act, nn.GELU)
    bent = decoder(LayerFactory("kan"), *shapes, width=32, dim=24, depth=1)
    assert isinstance(bent.blocks[0].mlp.act, nn.Identity)
    normal = decoder(LayerFactory("ngpt"), *shapes, width=96, depth=2, mlp="gated")
    assert isinstance(normal.blocks[0].mlp, NormalizedMLP)
    assert normal.blocks[0].alpha_init == 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Decoder(V, DIM, 1, mixer="linear"), "'linear' is of kind 'linear'"),
        (lambda: Decoder(V, DIM, 1, mixer="ngpt"), "mixer='ngpt': .*NGPT"),
        (lambda: Decoder(V, DIM, 1, mixer="mamba", mixer_options={"bidirectional": "shared"}), "is not causal"),
        (lambda: Decoder(V, DIM, 1, mixer_options={"causal": False}), "causal=False"),
        (lambda: Decoder(V, DIM, 1, mlp="mamba"), "mlp='mamba': is of kind 'mixer'"),
        (lambda: Decoder(V, DIM, 1, mlp="cann"), "mlp='cann': .*did you mean"),
        (lambda: Decoder(V, DIM, 1, mixer="mambo"), "mixer='mambo': .*did you mean"),
        (lambda: decoder(LayerFactory("ngpt_block"), (16,), V), "layer='ngpt_block': .*choose layer=ngpt"),
        (lambda: Decoder(V, DIM, 1, mlp_options={"n": 2}), "mlp_options=.*'gated'"),
        (lambda: Decoder(V, DIM, 2, hidden_dim=[8]), r"hidden_dim=\[8\]: must be one number, or depth=2"),
        (lambda: Decoder(V, DIM, 2, dropout=1.0), r"dropout=1\.0"),
        (lambda: language_model(V, DIM, 2, mixer="ngpt", mlp=None), "mlp=None: a block of nGPT"),
        (lambda: language_model(V, DIM, 2, mixer="ngpt", dropout=0.1), r"dropout=0\.1: nGPT"),
        (lambda: language_model(V, DIM, 2, alpha_init=0.1), r"alpha_init=0\.1: only nGPT"),
        (lambda: decoder(LayerFactory("mamba"), (16,), V, mixer="attention"), "mixer='attention': layer mamba is"),
        (lambda: decoder(LayerFactory("kan"), (16,), V, mlp="gated"), "mlp='gated': layer kan makes"),
        (lambda: decoder(LayerFactory("conv2d"), (16,), V), "'conv2d' is of kind 'conv2d'"),
        (lambda: decoder(LayerFactory("kan"), (1, 8, 8), V), "takes tokens"),
        (lambda: decoder(LayerFactory("kan"), (16,), V, width=30), "width=30: must be a multiple of 4"),
        (lambda: decoder(LayerFactory("kan"), (16,), V, depth=0), "depth=0"),
    ],
    ids=range(20),
)
def test_bad_options_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
