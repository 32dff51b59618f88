"""NGPT: names, initial logits, the authors' state dicts, training on the sphere, folding, and sampling."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.layers.ngpt import NormalizedEmbedding, NormalizedLinear, constrain_, register_constraint
from archzoo.models.generation import next_tokens, stream
from archzoo.models.gpt import GPT
from archzoo.models.ngpt import NGPT
from tests.helpers import rms_error

V, DIM, DEPTH = 17, 24, 2
D = torch.float64


def model(**options):
    torch.manual_seed(0)
    return NGPT(V, DIM, DEPTH, **{"num_heads": 3, "alpha_init": 0.5, "dtype": D, **options})


def trained(net):
    """As if it had been trained: vectors that are not all one value."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return net


def some_ids(batch=2, length=9):
    return torch.randint(V, (batch, length))


# --- What it is -------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_the_specs():
    net = model()
    shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
    own = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.")}
    assert own == {"embed.weight": (V, DIM), "head.weight": (V, DIM), "logit_scale": (V,)}
    assert {name.split(".")[1] for name in shapes.keys() - own.keys()} == {"0", "1"}
    assert net(some_ids()).shape == (2, 9, V)


@pytest.mark.parametrize(("cls", "millions"), [(NGPT, 468.4), (GPT, 468.2)], ids=["ngpt", "gpt"])
def test_the_papers_half_billion_has_its_number_of_parameters(cls, millions):
    net = cls(32000, 1024, 24, device="meta")
    count = sum(p.numel() for p in net.parameters())
    assert count // 100_000 / 10 == millions
    block = net.blocks[0]
    assert (block.attn if hasattr(block, "attn") else block.mixer).num_heads == 16


def test_first_logits_are_cosines():
    torch.manual_seed(1)
    net = NGPT(300, 64, 3)
    ids = torch.randint(300, (8, 32))
    logits = net(ids)
    assert logits.abs().max() <= 1 + 1e-6
    assert logits.std().item() == pytest.approx(64**-0.5, rel=0.1)
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(300, (256,)))
    assert loss.item() == pytest.approx(math.log(300), abs=0.05)


def test_logits_are_scaled_cosines_of_the_last_state():
    net = trained(model(logit_scale_init=3.0, logit_scale_scale=0.25))
    h = net.embed(ids := some_ids())
    for block in net.blocks:
        h = block(h)
    want = (h @ net.head.weight.T) * net.logit_scale * 12
    assert rms_error(net(ids), want) < 1e-14


def test_later_tokens_change_nothing_before():
    net, ids = model(), some_ids()
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    assert torch.equal(net(ids)[:, :5], net(changed)[:, :5])
    assert not torch.allclose(net(ids)[:, 5:], net(changed)[:, 5:])


def test_tied_embeddings_are_one_parameter():
    net = model(tie_embeddings=True)
    assert net.head.weight is net.embed.weight
    assert copy.deepcopy(net).head.weight.shape == (V, DIM)
    assert len(list(net.parameters())) == len(list(model().parameters())) - 1
    ids = some_ids()
    net(ids).square().sum().backward()
    assert net.embed.weight.grad is not None


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="depth=0"):
        NGPT(V, DIM, 0)
    with pytest.raises(ValueError, match="logit_scale_init=0"):
        NGPT(V, DIM, 1, logit_scale_init=0.0)
    with pytest.raises(TypeError, match="no_such_option"):
        NGPT(V, DIM, 1, no_such_option=1)
    for bad in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"ids of shape .*\(batch, length\)"):
            model()(bad)
    with pytest.raises(ValueError, match=r"cache of 1: must be 2, one for each block"):
        model()(some_ids(), cache=model().new_cache()[:1])


# --- The authors' code ------------------------------------------------------------------------------------------------


def reference_state(prefix=""):
    """A state dict as github.com/NVIDIA/ngpt writes it."""
    torch.manual_seed(3)
    m, state = 40, {}

    def directions(*shape, dim=1):
        return F.normalize(torch.randn(*shape, dtype=D), dim=dim)

    def vector(size, start):
        return (torch.rand(size, dtype=D) + 0.5) * start

    state["transformer.wte.weight"] = directions(V, DIM)
    for i in range(DEPTH):
        block = f"transformer.h.{i}."
        for name in ("key", "query", "value"):
            state[f"{block}{name}.weight"] = directions(DIM, DIM)
        state[f"{block}att_c_proj.weight"] = directions(DIM, DIM, dim=0)
        state[f"{block}c_fc.weight"] = directions(2 * m, DIM)
        state[f"{block}mlp_c_proj.weight"] = directions(DIM, m, dim=0)
        for name, size, start in (
            ("attn_alpha", DIM, DIM**-0.5),
            ("mlp_alpha", DIM, DIM**-0.5),
            ("sqk", DIM, DIM**-0.5),
            ("suv", 2 * m, 1.0),
        ):
            state[f"{block}{name}"] = vector(size, start)
    state["lm_head.weight"] = directions(V, DIM)
    state["sz"] = vector(V, DIM**-0.5)
    return {prefix + name: tensor for name, tensor in state.items()}


def reference_forward(state, ids, heads=3):
    """The authors' forward pass as equations, but for a rotary embedding that rotates."""
    norm = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    base, size = DIM**-0.5, DIM // heads
    angles = torch.arange(ids.shape[1], dtype=D)[:, None] * 10000.0 ** (-torch.arange(0, size, 2, dtype=D) / size)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotary(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    h = state["transformer.wte.weight"][ids]
    past = torch.ones(ids.shape[1], ids.shape[1]).tril() == 1
    for i in range(DEPTH):
        p = {name.removeprefix(f"transformer.h.{i}."): t for name, t in state.items() if f"h.{i}." in name}
        q, k, v = ((h @ p[f"{name}.weight"].T).unflatten(-1, (heads, size)) for name in ("query", "key", "value"))
        sqk = (p["sqk"] / base).view(heads, size)
        q, k = sqk * norm(rotary(q)), sqk * norm(rotary(k))
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) * size**0.5
        y = torch.einsum("bhlm,bmhd->blhd", scores.masked_fill(~past, -math.inf).softmax(-1), v).flatten(-2)
        y = y @ p["att_c_proj.weight"].T
        h = norm(norm(h) + (p["attn_alpha"] * 0.05 / base).abs() * (norm(y) - norm(h)))
        u, gate = (p["suv"] * DIM**0.5 * (h @ p["c_fc.weight"].T)).chunk(2, -1)
        y = (u * F.silu(gate)) @ p["mlp_c_proj.weight"].T
        h = norm(norm(h) + (p["mlp_alpha"] * 0.05 / base).abs() * (norm(y) - norm(h)))
    return state["sz"] / base * (h @ state["lm_head.weight"].T)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "_orig_mod.module."])
def test_the_authors_state_dict_loads_and_computes_the_same(prefix):
    net = model(alpha_init=0.05, hidden_dim=40)
    net.load_reference_state_dict(reference_state(prefix))
    ids = some_ids()
    assert rms_error(net(ids), reference_forward(reference_state(), ids)) < 1e-13


def test_reference_values_come_back_bit_for_bit():
    state = {name: t.float() for name, t in reference_state().items()}
    net = model(hidden_dim=40, dtype=torch.float32)
    net.load_reference_state_dict(state)
    ours = net.state_dict()
    assert torch.equal(ours["embed.weight"], state["transformer.wte.weight"])
    assert torch.equal(ours["head.weight"], state["lm_head.weight"])
    assert torch.equal(ours["logit_scale"], state["sz"])
    for i in range(DEPTH):
        theirs, own = f"transformer.h.{i}.", f"blocks.{i}."
        for name, part in (("query", "q"), ("key", "k"), ("value", "v"), ("att_c_proj", "out")):
            assert torch.equal(ours[f"{own}attn.{part}_proj.weight"], state[f"{theirs}{name}.weight"])
        fused = [ours[f"{own}mlp.{part}_proj.weight"] for part in ("up", "gate")]
        assert torch.equal(torch.cat(fused), state[f"{theirs}c_fc.weight"])
        fused = [ours[f"{own}mlp.{part}_scale"] for part in ("up", "gate")]
        assert torch.equal(torch.cat(fused), state[f"{theirs}suv"])
        assert torch.equal(ours[f"{own}mlp.down_proj.weight"], state[f"{theirs}mlp_c_proj.weight"])
        assert torch.equal(ours[f"{own}attn.qk_scale"], state[f"{theirs}sqk"])
        assert torch.equal(ours[f"{own}attn_alpha"], state[f"{theirs}attn_alpha"])
        assert torch.equal(ours[f"{own}mlp_alpha"], state[f"{theirs}mlp_alpha"])


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    net, state = model(hidden_dim=40), reference_state()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    for change, message in (
        ({"transformer.h.0.rmsnorm_att.weight": torch.ones(DIM)}, r"unknown \['blocks\.0\.rmsnorm_att"),
        ({"extra": torch.ones(2)}, r"unknown \['extra'\]"),
        ({"sz": torch.ones(3)}, r"logit_scale of shape \(3,\): must be \(17,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            net.load_reference_state_dict({**state, **change})
    del state["transformer.h.1.sqk"]
    with pytest.raises(ValueError, match=r"missing \['blocks\.1\.attn\.qk_scale'\]"):
        net.load_reference_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items()), "a part was loaded"


# --- Training ---------------------------------------------------------------------------------------------------------


def counting(batch, length):
    """Sequences that count up from anywhere, modulo V, in steps of one or two."""
    start, step = torch.randint(V, (batch, 1)), torch.randint(1, 3, (batch, 1))
    return (start + step * torch.arange(length + 1)) % V


@pytest.mark.parametrize("reparametrize", [False, True], ids=["constrained", "reparametrized"])
def test_it_learns_on_the_sphere(reparametrize):
    net = model(dtype=torch.float32, reparametrize=reparametrize)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2, betas=(0.9, 0.95))
    if not reparametrize:
        register_constraint(optimizer, net)
    losses = []
    for _ in range(40):
        ids = counting(16, 8)
        loss = F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(V), abs=0.1)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    if not reparametrize:
        for module in net.modules():
            if isinstance(module, NormalizedLinear | NormalizedEmbedding):
                norm = module.weight.norm(dim=0 if getattr(module, "normalize", "in") == "out" else 1)
                assert (norm - 1).abs().max() < 3e-6


def test_every_parameter_trains_also_compiled():
    torch.manual_seed(0)
    net, ids = trained(NGPT(V, DIM, 1, num_heads=3, dtype=D)), some_ids()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for function in (net, compiled):
        logits = function(ids)
        results.append((logits, *torch.autograd.grad(logits.sin().sum(), list(net.parameters()))))
    for got, want in zip(*results, strict=True):
        assert rms_error(got, want) < 1e-11
        assert want.abs().max() > 0
    torch._dynamo.reset()


def test_vectors_are_not_decayed():
    import timm.optim

    net = model()
    named = net.no_weight_decay()
    assert named == {name for name, p in net.named_parameters() if p.dim() == 1}
    optimizer = timm.optim.create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.1)
    vectors = {id(p) for name, p in net.named_parameters() if name in named}
    for group in optimizer.param_groups:
        inside = [id(p) in vectors for p in group["params"]]
        assert all(inside) if group["weight_decay"] == 0 else not any(inside)


def test_under_autocast():
    net, ids = trained(model(dtype=torch.float32)), some_ids()
    want = net(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(ids)
    assert logits.dtype == torch.bfloat16
    assert rms_error(logits, want) < 2e-2
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


# --- Inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"reparametrize": True}], ids=str)
def test_folding_is_exact(options):
    net, ids = trained(model(**options)), some_ids()
    want = net(ids)
    folded = net.fold()
    assert rms_error(folded(ids), want) < 1e-14
    assert rms_error(folded.fold()(ids), want) < 1e-14
    assert type(folded.head) is nn.Linear
    with pytest.raises(ValueError, match="nothing to constrain"):
        constrain_(folded)
    with torch.no_grad():
        for tensor in folded.state_dict().values():
            tensor.zero_()
    assert torch.equal(net(ids), want)


@pytest.mark.parametrize("cls", [NGPT, GPT], ids=["ngpt", "gpt"])
@torch.no_grad()
def test_decoding_equals_the_parallel_form(cls):
    torch.manual_seed(0)
    net = trained(cls(V, DIM, DEPTH, num_heads=3, dtype=D))
    ids = some_ids(3, 12)
    want = net(ids)
    cache = net.new_cache()
    pieces = [net(piece, cache=cache) for piece in ids.split([5, 1, 1, 3, 2], 1)]
    assert rms_error(torch.cat(pieces, 1), want) < 1e-12
    twin = copy.deepcopy(cache)
    for own in twin:
        own.reorder(torch.tensor([1, 1, 0]))
    more = some_ids(3, 1)
    want = net(torch.cat([ids[[1, 1, 0]], more], 1))[:, -1:]
    assert rms_error(net(more, cache=twin), want) < 1e-12


@pytest.mark.parametrize("cls", [NGPT, GPT], ids=["ngpt", "gpt"])
def test_generated_tokens_are_those_of_the_parallel_form(cls):
    torch.manual_seed(0)
    net = cls(V, DIM, DEPTH, num_heads=3, dropout=0.5, dtype=D)
    with torch.no_grad():
        net.head.weight.mul_(10)
    prompt = some_ids(2, 4)
    new = torch.stack(list(net.generate(prompt, 6, temperature=0)), 1)
    assert net.training
    net.eval()
    ids = prompt
    for _ in range(6):
        ids = torch.cat([ids, net(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(new, ids[:, 4:])
    drawn = [torch.stack(list(net.generate(prompt, 8, seed=seed)), 1) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert list(net.generate(prompt, 0)) == []


def test_tokens_are_drawn_by_their_probability():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0]).log_softmax(-1).expand(20000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        return torch.bincount(next_tokens(logits, generator=generator, **options), minlength=4) / 20000

    p = logits[0].exp()
    assert (frequencies() - p).abs().max() < 0.015
    assert (frequencies(temperature=2.0) - (logits[0] / 2).softmax(0)).abs().max() < 0.015
    assert (frequencies(top_k=2) - torch.tensor([p[0], 0, p[2], 0]) / (p[0] + p[2])).abs().max() < 0.015
    assert (frequencies(top_p=0.7) - torch.tensor([p[0], 0, p[2], 0]) / (p[0] + p[2])).abs().max() < 0.015
    for options in ({"top_p": 0.1}, {"top_k": 1}, {"temperature": 0}, {"temperature": 1e-4}):
        assert frequencies(**options).tolist() == [1, 0, 0, 0]
    assert (frequencies(top_k=100, top_p=1.0) - p).abs().max() < 0.015


def test_a_stream_gives_each_token_at_once_and_leaves_the_caller_alone():
    seen = []

    def step(new):
        assert not torch.is_grad_enabled()
        seen.append(tuple(new.shape))
        return F.one_hot((new[:, -1] + 1) % V, V) * 100.0

    tokens = stream(step, torch.tensor([[3, 4]]), 3)
    assert seen == []
    assert next(tokens).tolist() == [5]
    assert torch.is_grad_enabled()
    assert seen == [(1, 2)]
    assert [t.item() for t in tokens] == [6, 7]
    assert seen == [(1, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, r"ids of shape \(1, 0\)"),
    ],
    ids=["temperature", "top_k", "top_p zero", "top_p large", "max_new_tokens", "ids"],
)
def test_bad_ways_to_draw_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        model().generate(**{"ids": some_ids(), "max_new_tokens": 1, **options})
