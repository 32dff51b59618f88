"""Widths at a budget: what is told where they cannot be had, and that a sweep searches once."""

import re
from types import SimpleNamespace

import pytest
import torch

from archzoo.budget import match_widths
from archzoo.training import build
from archzoo.training.build import choose_widths
from archzoo.training.config import ConfigError
from tests.training.support import make_config

TOKENS = SimpleNamespace(input_shape=(8,), output_size=11, input_dtype=torch.int64)
TRANSFORMER = {"name": "transformer", "width": 64, "depth": 1}


def refusal(task, layer, model, **budget):
    config = make_config(layer={"name": layer}, model=model, budget={"match": "params", **budget})
    with pytest.raises(ConfigError) as caught:
        choose_widths(config, task)
    return str(caught.value)


@pytest.mark.parametrize("match", ["params", "none"])
@pytest.mark.parametrize("layer", ["linear", "aptx"])
def test_the_models_own_words_are_kept(layer, match):
    told = refusal(TOKENS, layer, TRANSFORMER | {"heads": 7}, match=match, to="linear")
    assert told == "model.heads=7: must divide dim=16, a positive number (model transformer)"


@pytest.mark.parametrize("width", [240, 720720])
def test_an_error_at_no_width_is_that_at_the_configured_one(width):
    told = refusal(TOKENS, "linear", TRANSFORMER | {"width": width + 4, "heads": 0}, to=1e6)
    assert told == f"model.heads=0: must divide dim={width // 4 + 1}, a positive number (model transformer)"


def test_a_width_that_the_layer_refuses_is_told_with_the_reason():
    numbers = SimpleNamespace(input_shape=(4,), output_size=8, input_dtype=torch.float32)
    told = refusal(numbers, "phm", {"name": "mlp", "width": 6, "depth": 1}, to="phm")
    assert re.match(r"model\.width=6: layer phm refuses this width, .*6.*\bn=4\b", told), told


def test_where_widths_are_chosen_the_configured_one_need_not_fit():
    config = make_config(
        layer={"name": "linear"}, model=TRANSFORMER | {"heads": 7}, budget={"match": "params", "to": 6300}
    )
    match = choose_widths(config, TOKENS)
    assert match is not None
    assert match.widths[0] % 28 == 0


def test_a_search_is_made_once_and_leaves_random_numbers_alone(monkeypatch):
    searches = []

    def search(*arguments):
        searches.append(torch.rand(3))
        return match_widths(*arguments)

    monkeypatch.setattr(build, "match_widths", search)
    monkeypatch.setattr(build, "_chosen", {})
    state = torch.get_rng_state()
    found = []
    for seed, to in ((0, 6300), (1, 6300), (0, 8000)):
        config = make_config(
            layer={"name": "linear"}, model=TRANSFORMER, budget={"match": "params", "to": to}, seed=seed
        )
        config.budget.tolerance = 0.1
        found.append(choose_widths(config, TOKENS))
        assert torch.equal(torch.get_rng_state(), state)
    assert len(searches) == 2
    assert found[0] == found[1] != found[2]
