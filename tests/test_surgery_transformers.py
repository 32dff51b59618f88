"""Swaps into GPT-2-, Llama- and BERT-like models of transformers, built from a config: nothing is downloaded."""

import sys

import pytest
import torch
from torch import nn

import archzoo
from tests.helpers import sampled

if "kernels" not in sys.modules:  # transformers looks for a package of that name, and would find this folder's
    sys.modules["kernels"] = None
transformers = pytest.importorskip("transformers", reason="needs the extra archzoo[transformers]")

SIZES = {"vocab_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 16}
IDS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(0))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, **SIZES
    )
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(hidden_size=16, intermediate_size=64, num_attention_heads=2, num_labels=3, **SIZES)
    return transformers.BertForSequenceClassification(config)


def perceptrons(layer):
    return {
        gpt2: {"transformer.h.*.mlp": layer},
        llama: {"model.layers.*.mlp": layer},
        bert: {"*.attention.*": None, "*.intermediate": layer, "*.output": layer},  # its two halves
    }


ATTENTION = {gpt2: "transformer.h.*.attn", llama: "model.layers.*.self_attn", bert: "*.attention.self"}
MODELS = pytest.mark.parametrize("make", [gpt2, llama, bert])


@torch.no_grad()
def logits(model, **inputs):
    return model(**({"input_ids": IDS} | inputs)).logits


@pytest.mark.parametrize("make", sampled([gpt2, llama, bert], [gpt2, llama]))
def test_perceptrons_are_swapped_and_come_back(make):
    model = make().eval()
    before, calibration = logits(model), {"input_ids": IDS}
    report = archzoo.swap(model, perceptrons("kan")[make], init="from_original", calibration=calibration)
    assert {row.start for row in report.swaps} == {"exact"}
    assert len(report.swaps) == (4 if make is bert else 2)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    archzoo.unswap(report)
    report = archzoo.swap(model, perceptrons("aptx")[make], match="params")
    assert abs(report.parameters[1] - report.parameters[0]) <= 0.01 * report.parameters[0]
    assert "hidden widths" in report.matched
    model.train()(input_ids=IDS).logits.square().sum().backward()
    assert all(p.grad is not None for row in report.swaps for p in model.get_submodule(row.name).parameters())
    twin = make().eval()
    archzoo.swap(twin, perceptrons("aptx")[make], match="params")
    twin.load_state_dict(model.eval().state_dict())
    assert torch.equal(logits(twin), logits(model))
    archzoo.unswap(report)
    assert torch.equal(logits(model), before)


def test_perceptrons_keep_their_flops():
    model = bert().eval()
    report = archzoo.swap(model, perceptrons("kan")[bert], match="flops", calibration={"input_ids": IDS})
    assert abs(report.flops[1] - report.flops[0]) <= 0.01 * report.flops[0]


def test_the_transposed_linear_layer():
    """Also where its class is the rule."""
    model = gpt2().eval()
    before = logits(model)
    conv1d = transformers.pytorch_utils.Conv1D
    report = archzoo.swap(model, {conv1d: "paon"}, init="from_original", calibration={"input_ids": IDS})
    assert len(report.swaps) == 8
    assert {row.start for row in report.swaps} == {"exact"}
    assert not any(isinstance(m, conv1d) for m in model.modules())
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    archzoo.unswap(report)
    archzoo.swap(model, {conv1d: "linear"}, init="from_original")
    assert sum(type(m) is nn.Linear for m in model.modules()) == 9
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


@MODELS
@pytest.mark.parametrize("mixer", ["mamba", "ngpt", "attention", "mamba2"])
def test_attention_by_a_mixer(make, mixer):
    """No token of a decoder sees a later one, all of an encoder do; padding on either side changes nothing."""
    model = make().eval()
    before, config = logits(model), model.config.use_cache
    options = {"mamba2": {"d_state": 8}} if mixer == "mamba2" else {}
    report = archzoo.swap(model, {ATTENTION[make]: mixer}, **options)
    tokens = torch.randn(1, 6, 16, requires_grad=True)
    output = model(inputs_embeds=tokens, output_hidden_states=True).hidden_states[-1][0]
    sees = [torch.autograd.grad(output[i, 0], tokens, retain_graph=True)[0][0] for i in range(6)]
    sees = torch.stack([grad.abs().sum(-1) > 0 for grad in sees])
    assert torch.equal(sees, torch.ones(6, 6, dtype=torch.bool) if make is bert else torch.ones(6, 6).tril().bool())
    for side in ("left", "right"):
        if make is not llama and side == "left":  # positions are learned, and counted from the first token
            continue
        rest = slice(2, None) if side == "left" else slice(None, 5)
        mask = torch.zeros_like(IDS)
        mask[:, rest] = 1
        padded, bare = logits(model, attention_mask=mask), logits(model, input_ids=IDS[:, rest])
        torch.testing.assert_close(padded if make is bert else padded[:, rest], bare, atol=1e-5, rtol=1e-4)
    archzoo.unswap(report)
    assert model.config.use_cache is config
    assert torch.equal(logits(model), before)


def test_a_cache_is_refused_and_text_is_written_without_one():
    model = llama().eval()
    report = archzoo.swap(model, {ATTENTION[llama]: "mamba"})
    assert model.config.use_cache is model.generation_config.use_cache is False
    written = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert written.shape == (2, 10)
    with pytest.raises(ValueError, match="keeps no cache; call the model with use_cache=False"):
        model(IDS, use_cache=True)
    archzoo.unswap(report)
    assert model.config.use_cache is model.generation_config.use_cache is True


def test_tied_embeddings_and_the_head_of_a_classifier():
    with pytest.raises(ValueError, match="lm_head: its weight is tied with transformer.wte.weight"):
        archzoo.swap(gpt2(), {"lm_head": "kan"})
    model = bert()
    archzoo.swap(model, {"classifier": "capsules"})
    assert logits(model).shape == (2, 3)
