"""MambaLM: the authors' names, sizes and configs, its states in generating, packed texts, and the trainer's model."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from archzoo.budget import count_parameters, match_widths
from archzoo.layers.mamba import seq_idx_from_cu_seqlens
from archzoo.models.mamba_lm import MambaLM
from archzoo.models.model import LayerFactory, models
from tests.helpers import assert_same_bits, rms_error, sampled

V, PADDED, DIM, DEPTH = 17, 24, 16, 2
D = torch.float64
SMALL = {"mamba": {"d_state": 4}, "mamba2": {"d_state": 8, "headdim": 8, "chunk_size": 4}}
both = pytest.mark.parametrize("layer", ["mamba", "mamba2"])


def model(layer="mamba", **options):
    torch.manual_seed(0)
    return MambaLM(V, DIM, DEPTH, layer=layer, **{**SMALL[layer], "dtype": D, **options})


def lively(net):
    """With vectors that are not all one value, and embeddings large enough for tokens to matter."""
    with torch.no_grad():
        net.backbone.embedding.weight.mul_(50)
        for name, parameter in net.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return net


def some_ids(batch=2, length=9):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def official_shapes(layer="mamba"):
    """Names and shapes of the authors' state dict."""
    d, conv = 2 * DIM, 2 * DIM
    mixer = {"in_proj.weight": (2 * d, DIM), "out_proj.weight": (DIM, d)}
    if layer == "mamba":
        mixer |= {"x_proj.weight": (1 + 2 * 4, d), "dt_proj.weight": (d, 1), "dt_proj.bias": (d,)}
        mixer |= {"A_log": (d, 4), "D": (d,)}
    else:
        heads, conv = d // 8, d + 2 * 8
        mixer |= {"in_proj.weight": (d + conv + heads, DIM), "norm.weight": (d,)}
        mixer |= {"dt_bias": (heads,), "A_log": (heads,), "D": (heads,)}
    mixer |= {"conv1d.weight": (conv, 1, 4), "conv1d.bias": (conv,)}
    shapes = {"backbone.embedding.weight": (PADDED, DIM), "backbone.norm_f.weight": (DIM,)}
    for i in range(DEPTH):
        shapes[f"backbone.layers.{i}.norm.weight"] = (DIM,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    return shapes | {"lm_head.weight": (PADDED, DIM)}


def official_state(layer="mamba", tied=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in official_shapes(layer).items()}
    if tied:
        state["lm_head.weight"] = state["backbone.embedding.weight"].clone()
    return state


# --- What it is -------------------------------------------------------------------------------------------------------


@both
def test_names_and_shapes_are_the_authors(layer):
    for tied in (True, False):
        state = model(layer, tie_embeddings=tied).state_dict()
        assert {name: tuple(t.shape) for name, t in state.items()} == official_shapes(layer)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"d_model": 768, "n_layer": 24, "ssm_cfg": {}}, 129_135_360),
        ({"d_model": 2560, "n_layer": 64, "ssm_cfg": {"layer": "Mamba1"}}, 2_768_345_600),
        ({"d_model": 768, "n_layer": 24, "pad_vocab_size_multiple": 16, "ssm_cfg": {"layer": "Mamba2"}}, 128_989_632),
    ],
    ids=["mamba-130m", "mamba-2.8b", "mamba2-130m"],
)
def test_released_models_have_their_number_of_parameters(config, parameters):
    net = MambaLM.from_config({"vocab_size": 50277, **config}, device="meta")
    assert count_parameters(net) == parameters
    assert (net.vocab_size, net.lm_head.out_features % 16) == (50277, 50280 % 16 if parameters != 128_989_632 else 0)


@both
def test_it_is_its_equations(layer):
    net, ids = lively(model(layer, norm_eps=1e-3)), some_ids()

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    h = net.backbone.embedding.weight[ids]
    for block in net.backbone.layers:
        h = h + block.mixer(norm(h, block.norm.weight))
    logits = net(ids)
    assert logits.shape == (2, 9, PADDED)
    assert rms_error(logits, norm(h, net.backbone.norm_f.weight) @ net.lm_head.weight.T) < 1e-13


@both
@pytest.mark.parametrize("start", ["built", "reset", "copied and reset"])
def test_where_it_starts(layer, start):
    torch.manual_seed(4)
    net = MambaLM(500, 64, 4, layer=layer, bias=True)
    if start != "built":
        net = copy.deepcopy(net) if "copied" in start else net
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(7)
        net.reset_parameters()
    assert net.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (net.backbone.norm_f.weight == 1).all()
    for block in net.backbone.layers:
        mixer = block.mixer
        assert (block.norm.weight == 1).all()
        assert (mixer.in_proj.bias == 0).all()
        assert (mixer.out_proj.bias == 0).all()
        assert mixer.out_proj.weight.abs().max().item() == pytest.approx(1 / math.sqrt(128 * 4), rel=0.01)
        assert mixer.in_proj.weight.abs().max().item() == pytest.approx(1 / math.sqrt(64), rel=0.01)
        steps = F.softplus(mixer.dt_proj.bias if layer == "mamba" else mixer.dt_bias)
        assert 1e-3 * 0.999 < steps.min() < steps.max() < 0.1 * 1.001
    ids, others = torch.randint(500, (2, 4, 32))
    assert F.cross_entropy(net(ids).flatten(0, 1), others.flatten()).item() == pytest.approx(math.log(504), abs=0.1)


def test_bad_arguments_are_refused():
    for options, message in (
        ({"depth": 0}, "depth=0"),
        ({"layer": "attention"}, "layer='attention': must be one of 'mamba', 'mamba2'"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple=0"),
        ({"bidirectional": "shared"}, "bidirectional='shared': a language model predicts the next token"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            MambaLM(**{"vocab_size": V, "dim": DIM, "depth": 1, **options})
    with pytest.raises(TypeError, match="no_such_option"):
        MambaLM(V, DIM, 1, no_such_option=1)
    net = model()
    for bad in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"ids of shape .*\(batch, length\)"):
            net(bad)
    with pytest.raises(ValueError, match=r"cache of 1: must be 2, one for each block"):
        net(some_ids(), cache=net.new_cache()[:1])
    with pytest.raises(ValueError, match="seq_idx with a cache"):
        net(some_ids(), cache=net.new_cache(), seq_idx=torch.zeros(2, 9, dtype=torch.long))


@both
def test_later_tokens_change_nothing_before(layer):
    net, ids = lively(model(layer)), some_ids()
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    assert rms_error(net(changed)[:, :5], net(ids)[:, :5]) < 1e-14
    assert rms_error(net(changed)[:, 5:], net(ids)[:, 5:]) > 1e-3
    assert net(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, PADDED)


@both
def test_packed_texts_do_not_see_each_other(layer):
    net, lengths = lively(model(layer)), [4, 1, 7]
    ids = some_ids(1, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    logits = net(ids, seq_idx=seq_idx_from_cu_seqlens(bounds, ids.shape[1]))
    alone = torch.cat([net(text) for text in ids.split(lengths, 1)], 1)
    assert rms_error(logits, alone) < 1e-12
    assert rms_error(net(ids), alone) > 1e-3


# --- Weights ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_authors_weights_come_back_bit_for_bit(layer, tied):
    net, state = model(layer, tie_embeddings=tied, dtype=torch.float32), official_state(layer, tied)
    net.load_state_dict(state)
    assert_same_bits(net.state_dict(), state, "loaded")
    assert (net.lm_head.weight is net.backbone.embedding.weight) == tied
    again = model(layer, tie_embeddings=tied, dtype=torch.float32)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(some_ids()), net(some_ids()))


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "in a module"])
@pytest.mark.parametrize("left_out", ["lm_head.weight", "backbone.embedding.weight", None])
def test_transformers_name_and_half_of_a_tied_pair_will_do(left_out, outer):
    net, state = model(dtype=torch.float32), official_state()
    given = {name: t for name, t in state.items() if name != left_out}
    if left_out != "backbone.embedding.weight":
        given["backbone.embeddings.weight"] = given.pop("backbone.embedding.weight")
    before = set(given)
    if outer:
        nn.ModuleDict({"net": net}).load_state_dict({f"net.{name}": t for name, t in given.items()})
    else:
        net.load_state_dict(given)
    assert set(given) == before, "the caller's dict was changed"
    assert_same_bits(net.state_dict(), state, "loaded")


def test_weights_that_do_not_fit_are_refused():
    net, state = model(dtype=torch.float32), official_state()
    head, embedding = "lm_head.weight", "backbone.embedding.weight"
    for wrong, message in (
        ({**state, "backbone.norm_f.bias": torch.zeros(DIM)}, r"Unexpected key\(s\).*backbone\.norm_f\.bias"),
        ({**state, "backbone.embeddings.weight": state[embedding]}, r"Unexpected key\(s\).*backbone\.embeddings"),
        ({name: t for name, t in state.items() if name not in (head, embedding)}, r"Missing key\(s\).*embedding"),
        ({**state, head: state[head] + 1}, "embedding.weight and lm_head.weight differ.*tie_embeddings=False"),
        ({**state, head: state[head][:-1]}, "embedding.weight and lm_head.weight differ.*tie_embeddings=False"),
        ({**state, "lm_head.weight": state[head][:8], embedding: state[embedding][:8]}, "size mismatch"),
    ):
        with pytest.raises(RuntimeError, match=message):
            net.load_state_dict(wrong)
    untied = model(tie_embeddings=False, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*lm_head"):
        untied.load_state_dict({name: t for name, t in state.items() if name != head})
    for name in (head, embedding):
        state[name][0, 0] = math.nan
    net.load_state_dict(state)
    assert net.lm_head.weight[0, 0].isnan()


@pytest.mark.parametrize("way", ["deepcopy", "to_empty", "assign", "double", "load"])
def test_tied_stays_tied(way):
    net = model(dtype=torch.float32)
    if way == "deepcopy":
        net = copy.deepcopy(net)
    elif way == "to_empty":
        net = nn.ModuleList([model(device="meta")]).to_empty(device="cpu")[0]
        net.reset_parameters()
    elif way == "assign":
        net.load_state_dict(official_state(), assign=True)
    elif way == "double":
        net = net.double()
    else:
        net.load_state_dict(official_state())
    assert net.lm_head.weight is net.backbone.embedding.weight
    assert len(list(net.parameters())) == len(official_shapes()) - 1
    net(some_ids()).square().sum().backward()
    assert net.backbone.embedding.weight.grad.abs().max() > 0


# --- Precision --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("in_fp32", [True, False], ids=["fp32 residual", "bf16 residual"])
def test_the_residual_is_float32_if_told_so(layer, in_fp32):
    net, seen = model(layer, dtype=torch.bfloat16, residual_in_fp32=in_fp32), []
    for block in net.backbone.layers:
        block.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    logits = net(some_ids())
    assert seen == [torch.float32 if in_fp32 else torch.bfloat16] * DEPTH
    assert logits.dtype == torch.bfloat16
    kept = {name.rpartition(".")[2] for name, p in net.named_parameters() if p.dtype == torch.float32}
    assert {"A_log", "D"} <= kept
    assert model(layer).backbone.layers[0](torch.zeros(1, 2, DIM, dtype=D)).dtype == D


@both
def test_under_autocast(layer):
    net, ids = lively(model(layer, dtype=torch.float32)), some_ids()
    want = net(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(ids)
    assert logits.dtype == torch.bfloat16
    assert rms_error(logits, want) < 2e-2
    logits.float().square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("layer", sampled(["mamba", "mamba2"], ["mamba2"]))
def test_compiled_and_exported_it_computes_the_same(layer):
    torch.manual_seed(0)
    net, ids = lively(MambaLM(V, DIM, 1, layer=layer, dtype=D, **SMALL[layer])), some_ids()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = []
    for function in (net, compiled):
        logits = function(ids)
        results.append((logits, *torch.autograd.grad(logits.sin().sum(), list(net.parameters()))))
    for got, want in zip(*results, strict=True):
        assert rms_error(got, want) < 1e-11
    torch._dynamo.reset()
    exported = torch.export.export(net, (ids,)).module()
    assert rms_error(exported(ids), net(ids)) < 1e-13


# --- Inference --------------------------------------------------------------------------------------------------------


@both
@torch.no_grad()
def test_pieces_equal_the_whole_and_caches_go_their_own_ways(layer):
    net, ids = lively(model(layer)), some_ids(3, 12)
    want, cache = net(ids), net.new_cache()
    pieces = [net(piece, cache=cache) for piece in ids.split([5, 1, 1, 3, 2], 1)]
    assert rms_error(torch.cat(pieces, 1), want) < 1e-12
    twin, rows = copy.deepcopy(cache), torch.tensor([1, 1, 0])
    for own in twin:
        own.reorder(rows)
    more, other = ids[:, 3:4], ids[:, 7:8]
    for _ in range(2):  # the first step after a copy must not write into the states of the other
        want = net(torch.cat([ids[rows], more], 1))[:, -1, :V]
        assert rms_error(net.next_logits(more, copy.deepcopy(twin)), want) < 1e-12
    want = net(torch.cat([ids, other], 1))[:, -1, :V]
    assert rms_error(net.next_logits(other, cache), want) < 1e-12


@both
@pytest.mark.parametrize("prompt", [1, 5])
def test_generated_tokens_are_the_likeliest_of_the_parallel_form(layer, prompt):
    net, ids = lively(model(layer)), some_ids(2, prompt)
    with torch.no_grad():
        net.backbone.embedding.weight[V:] *= 100  # what pads the vocabulary would win, or sink the rest
    new = torch.stack(list(net.generate(ids, 7, temperature=0)), 1)
    for _ in range(7):
        ids = torch.cat([ids, net(ids)[:, -1, :V].argmax(-1, keepdim=True)], 1)
    assert torch.equal(new, ids[:, prompt:])
    drawn = torch.stack(list(net.generate(ids, 200, temperature=50.0, seed=0)))
    assert drawn.max() == V - 1, "all tokens may be drawn, and nothing that pads"


class Work(TorchDispatchMode):
    """Counts ops and the elements that they write."""

    def __init__(self):
        super().__init__()
        self.ops = self.elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.ops += 1
        self.elements += sum(
            t.numel() for t in (out if isinstance(out, tuple | list) else (out,)) if torch.is_tensor(t)
        )
        return out


@both
@torch.no_grad()
def test_a_token_costs_the_same_everywhere_and_the_state_does_not_grow(layer):
    net = model(layer)
    costs = []
    for length in (3, 300):
        cache = net.new_cache()
        net.next_logits(some_ids(2, length), cache)
        for _ in range(2):
            with FlopCounterMode(display=False) as flops, Work() as work:
                net.next_logits(some_ids(2, 1), cache)
            memory = sum(part.untyped_storage().nbytes() for own in cache for part in own.state)
            costs.append((flops.get_total_flops(), work.ops, work.elements, memory))
    assert costs[0][0] > 0
    assert costs[1:] == costs[:-1]
    channels = 2 * DIM if layer == "mamba" else 2 * DIM + 2 * 8
    assert costs[0][-1] == 8 * 2 * DEPTH * (channels * 4 + 2 * DIM * SMALL[layer]["d_state"]), "just the two states"


# --- Configs and folders ----------------------------------------------------------------------------------------------

CONFIG = {"d_model": DIM, "n_layer": DEPTH, "vocab_size": V}
AUTHORS = CONFIG | {
    "ssm_cfg": {"layer": "Mamba1", "d_state": 4},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "attn_cfg": {},
}
TRANSFORMERS = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "vocab_size": PADDED,
    "state_size": 4,
    "conv_kernel": 4,
    "expand": 2,
    "time_step_rank": 1,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "torch_dtype": "float32",
    "transformers_version": "4.39.0.dev0",
}


def test_a_config_says_what_the_arguments_do():
    net = MambaLM.from_config(
        CONFIG
        | {
            "ssm_cfg": {"d_state": 5, "expand": 3, "use_fast_path": False},
            "residual_in_fp32": False,
            "fused_add_norm": False,
            "pad_vocab_size_multiple": 10,
            "tie_embeddings": False,
        }
    )
    options = {"residual_in_fp32": False, "pad_vocab_size_multiple": 10, "tie_embeddings": False}
    want = MambaLM(V, DIM, DEPTH, d_state=5, expand=3, **options)
    assert repr(net) == repr(want)
    assert net.backbone.layers[0].residual_in_fp32 is False
    assert repr(MambaLM.from_config(AUTHORS)) == repr(model())
    assert repr(MambaLM.from_config(CONFIG)) == repr(MambaLM(V, DIM, DEPTH))
    second = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "A_init_range": [2, 3], "dt_limit": [0.0, math.inf]}
    net = MambaLM.from_config(CONFIG | {"ssm_cfg": {**second, "conv_init": None}}, dtype=D)
    want = model("mamba2", A_init_range=(2, 3))
    assert repr(net.backbone.layers[0].mixer.in_proj) == repr(want.backbone.layers[0].mixer.in_proj)
    assert 2 <= net.backbone.layers[0].mixer.A_log.exp().min() <= net.backbone.layers[0].mixer.A_log.exp().max() <= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm": False}, "rms_norm=False: must be True"),
        ({"d_intermediate": 64}, "d_intermediate=64: must be 0; .* no feed-forward net"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx=\[1\]: must be \[\]; .* no attention"),
        ({"d_modle": 3}, "d_modle=3: is not known in a config of Mamba; did you mean 'd_model'"),
        ({"d_model": 0}, "d_model=0"),
        ({"n_layer": 1.5}, r"n_layer=1\.5"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, r"ssm_cfg\.layer='Mamba3': must be one of 'Mamba1', 'Mamba2'"),
        ({"ssm_cfg": {"d_stat": 3}}, r"ssm_cfg\.d_stat=3: Mamba1 has no such option; did you mean 'd_state'"),
        ({"ssm_cfg": {"layer": "Mamba2", "conv_init": 0.1}}, r"ssm_cfg\.conv_init=0\.1: Mamba2 has no such option"),
        ({"ssm_cfg": {"bidirectional": "shared"}}, r"ssm_cfg\.bidirectional='shared': Mamba1 has no such option"),
        ({"ssm_cfg": {"d_state": 0}}, "d_state=0"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "headdim=64: must be a divisor of expand . dim = 32"),
        ({"residual_in_fp32": "no"}, "residual_in_fp32='no': must be true or false"),
        ({"tie_embeddings": 0}, "tie_embeddings=0: must be true or false"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple=0"),
        ({"model_type": "mamba2"}, "model_type='mamba2': must be 'mamba', or absent"),
        ({**TRANSFORMERS, "hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(reversed(value)),
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MambaLM.from_config({**CONFIG, **change})


@pytest.mark.parametrize("key", ["d_model", "n_layer", "vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_size_that_is_missing_is_named(key):
    config = dict(CONFIG if key in CONFIG else TRANSFORMERS)
    del config[key]
    with pytest.raises(ValueError, match=f"^{key} is missing"):
        MambaLM.from_config(config)


def folder_of(path, config, state, file):
    from safetensors.torch import save_file

    (path / "config.json").write_text(json.dumps(config))
    if file == "pytorch_model.bin":
        torch.save(state, path / file)
    else:
        save_file(state, path / file)
    return path


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["authors", "transformers"])
def test_a_folder_is_read(kind, file, tmp_path):
    state = official_state()
    given = dict(state)
    if kind == "transformers":
        given["backbone.embeddings.weight"] = given.pop("backbone.embedding.weight")
        del given["lm_head.weight"]
    folder = folder_of(tmp_path, AUTHORS if kind == "authors" else TRANSFORMERS, given, file)
    net = MambaLM.from_pretrained(folder)
    assert_same_bits(net.state_dict(), state, "read")
    assert net.lm_head.weight is net.backbone.embedding.weight
    assert all(p.requires_grad for p in net.parameters())
    want = model(dtype=torch.float32)
    want.load_state_dict(state)
    assert torch.equal(net(some_ids()), want(some_ids()))
    half = MambaLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    mixer = half.backbone.layers[0].mixer
    assert (mixer.in_proj.weight.dtype, mixer.A_log.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(mixer.A_log, state["backbone.layers.0.mixer.A_log"])


def test_every_tensor_of_a_model_is_in_its_state_dict():
    """What is not would be left uninitialised by `from_pretrained`."""
    for layer in SMALL:
        net = model(layer, tie_embeddings=False)
        assert {*dict(net.named_parameters()), *dict(net.named_buffers())} == net.state_dict().keys()


def test_folders_that_will_not_do_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder='state-spaces/mamba-130m': must be a folder .* no such folder"):
        MambaLM.from_pretrained("state-spaces/mamba-130m")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be a folder with config\.json, .*\['config\.json'\]"):
        MambaLM.from_pretrained(tmp_path)
    state = official_state()
    del state["backbone.norm_f.weight"]
    folder_of(tmp_path, AUTHORS, state, "model.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*norm_f"):
        MambaLM.from_pretrained(tmp_path)


def test_code_in_weights_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    folder_of(tmp_path, AUTHORS, {**official_state(), "evil": Evil()}, "pytorch_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        MambaLM.from_pretrained(tmp_path)


# --- Training ---------------------------------------------------------------------------------------------------------


@both
def test_vectors_and_the_state_are_not_decayed(layer):
    import timm.optim

    net = model(layer)
    named = net.no_weight_decay()
    kept = (".A_log", ".D", ".bias", "norm.weight", "norm_f.weight", ".dt_bias")
    assert named == {name for name, _ in net.named_parameters() if name.endswith(kept)}
    optimizer = timm.optim.create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.1)
    spared = {id(p) for name, p in net.named_parameters() if name in named}
    for group in optimizer.param_groups:
        inside = [id(p) in spared for p in group["params"]]
        assert all(inside) if group["weight_decay"] == 0 else not any(inside)


@both
def test_it_learns(layer):
    """To go on with a sequence that counts up from anywhere in steps of one or two, which one token does not tell."""
    net = model(layer, dtype=torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        start, step = torch.randint(V, (16, 1)), torch.randint(1, 3, (16, 1))
        ids = (start + step * torch.arange(9)) % V
        loss = F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(PADDED), abs=0.1)
    assert sum(losses[-5:]) / 5 < 0.8


def build(layer="mamba", input_shape=(6,), output_size=11, **options):
    kwargs = options.pop("layer_options", {})
    return models.create("mamba_lm", LayerFactory(layer, kwargs), input_shape, output_size, **options)


def test_the_trainers_model_is_a_mamba_lm_of_the_contestant():
    assert models.get("mamba_lm").takes_tokens
    net = build(width=64, depth=3, layer_options={"d_state": 5, "layer_idx": None, "bidirectional": None})
    want = MambaLM(11, 16, 3, d_state=5, pad_vocab_size_multiple=1)
    assert repr(net) == repr(want)
    assert net(torch.zeros(2, 6, dtype=torch.long)).shape == (2, 6, 11)
    assert repr(build(widths=(64,) * 3, layer_options={"d_state": 5})) == repr(want)
    assert build(dim=24, depth=1, tie_embeddings=False).lm_head.in_features == 24
    second = build("mamba2", dim=32, depth=1, layer_options=SMALL["mamba2"])
    assert second.layer == "mamba2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "attention"}, "model 'mamba_lm' is made of 'mamba' or 'mamba2', not of 'attention'"),
        ({"layer": "linear"}, "model 'mamba_lm' is made of .*, not of 'linear'"),
        ({"input_shape": (3, 4)}, r"model 'mamba_lm' takes tokens \(length,\), not inputs of shape \(3, 4\)"),
        ({"width": 30}, "width=30: must be a multiple of 4"),
        ({"width": 0}, "width=0, depth=8"),
        ({"depth": 0}, "width=512, depth=0"),
        ({"widths": (32, 64)}, r"widths=\(32, 64\): must all be the same"),
        ({"layer_options": {"bidirectional": "shared"}}, "bidirectional='shared'"),
    ],
    ids=["attention", "linear", "image", "odd", "narrow", "shallow", "uneven", "bidirectional"],
)
def test_the_trainers_model_refuses_what_it_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build(**options)


@both
def test_a_budget_can_choose_the_width(layer):
    def count(widths):
        try:
            with torch.device("meta"):
                return count_parameters(build(layer, widths=widths, layer_options=SMALL[layer]))
        except ValueError:
            return None

    match = match_widths(count, 4, 200_000, 0.05)
    assert len(set(match.widths)) == 1
    assert abs(match.deviation) <= 0.05
