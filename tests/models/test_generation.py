"""Sampling token by token, whatever the model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archzoo.models.generation import CausalLM, next_tokens
from archzoo.models.gpt import GPT


def logits(rows=3, seed=0):
    return torch.randn(rows, 11, generator=torch.Generator().manual_seed(seed))


def test_the_colder_the_surer_without_overflow():
    likeliest = logits().argmax(-1)
    for temperature in (0, 1e-300, 1e-40, 1e-3):
        assert torch.equal(next_tokens(logits(), temperature=temperature), likeliest)


@given(st.integers(1, 15), st.floats(0.05, 1.0), st.integers(0, 10_000))
def test_only_likely_tokens_are_drawn(top_k, top_p, seed):
    scores = logits(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = next_tokens(scores, top_k=top_k, top_p=top_p, generator=generator)
    order = scores.argsort(-1, descending=True)
    for row, token in enumerate(drawn):
        kept = order[row][:top_k]
        p = scores[row, kept].softmax(-1)
        place = (kept == token).nonzero().item()
        assert place == 0 or p[:place].sum() < top_p + 1e-6


def test_frequencies_are_the_probabilities():
    scores = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, -1)
    for options in ({}, {"top_k": 3}, {"top_p": 1.0}):
        drawn = next_tokens(scores, generator=torch.Generator().manual_seed(0), **options)
        found = torch.bincount(drawn, minlength=3) / 20_000
        torch.testing.assert_close(found, scores[0].softmax(-1), atol=0.015, rtol=0)


def test_a_model_that_is_evaluated_writes_itself_and_one_in_training_is_left_in_it():
    torch.manual_seed(0)
    net = GPT(11, 16, 1, dropout=0.5)
    written = [torch.stack(list(net.generate(torch.zeros(1, 2, dtype=torch.int64), 4, temperature=0)))]
    assert net.training
    assert net.for_inference() is not net
    assert net.eval().for_inference() is net
    written.append(torch.stack(list(net.generate(torch.zeros(1, 2, dtype=torch.int64), 4, temperature=0))))
    assert torch.equal(*written)


def test_what_cannot_be_written_is_refused_at_once():
    net = GPT(11, 16, 1)
    with pytest.raises(ValueError, match=r"torch.float32: must be a prompt"):
        net.generate(torch.zeros(1, 3), 2)
    with pytest.raises(ValueError, match=r"a cache is for inference"):
        net.next_logits(torch.zeros(1, 3, dtype=torch.int64), net.new_cache())
    with pytest.raises(TypeError, match="abstract"):
        CausalLM()
