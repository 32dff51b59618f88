"""What a layer says of itself."""

import inspect
import re

import pytest
import torch

import archzoo
from archzoo.registry import get_layer
from tests.helpers import (
    rms,
)
from tests.layers.contract import KINDS, REQUIRED, every_layer


@pytest.mark.parametrize("name", archzoo.list_layers())
def test_card_is_filled_in(name):
    card = archzoo.card(name)
    for part in ("title", "authors", "equation", "headline", "reproduced"):
        assert getattr(card, part).strip(), f"{part} is empty"
    assert "=" in card.equation
    assert "$" not in card.equation, "the equation is LaTeX without dollar signs"
    assert 1940 <= card.year <= 2100
    assert re.fullmatch(r"|\d{4}\.\d{4,5}|[a-z-]+/\d{7}", card.arxiv), f"{card.arxiv!r} is no arXiv id"
    assert card.title in str(card)
    assert card.equation in str(card)


@pytest.mark.parametrize("name", archzoo.list_layers())
def test_class_can_be_imported_from_archzoo(name):
    cls = get_layer(name).cls
    if not cls.__module__.startswith("archzoo."):
        return  # torch's own, or another package's
    assert getattr(archzoo, cls.__name__) is cls
    assert getattr(archzoo.layers, cls.__name__) is cls


@every_layer(
    exempt={
        "linear": "torch.nn.Linear takes device and dtype by position too",
        "conv2d": "torch.nn.Conv2d takes padding_mode, device and dtype by position too",
    }
)
def test_signature_is_the_kinds_then_keyword_only_options_then_device_and_dtype(case):
    parameters = inspect.signature(case.entry.cls).parameters
    standard = list(parameters.values())[: len(case.sizes.standard)]
    assert [p.name for p in standard] == list(case.sizes.standard)
    for parameter, default in zip(standard, case.sizes.standard.values(), strict=True):
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, parameter
        if default is bool:
            assert isinstance(parameter.default, bool), parameter
        else:
            assert parameter.default == default, parameter
    options = list(parameters.values())[len(standard) :]
    assert all(p.kind is p.KEYWORD_ONLY for p in options), options
    assert all(p.default is not REQUIRED for p in options), "a layer must build from its sizes alone"
    assert [(p.name, p.default) for p in options[-2:]] == [("device", None), ("dtype", None)]


@every_layer()
def test_docstring_explains_every_argument(case):
    doc = inspect.getdoc(case.entry.cls) or ""
    assert "Args:" in doc
    assert "Shape:" in doc
    explained = doc.partition("Args:")[2]
    for name in inspect.signature(case.entry.cls).parameters:
        if name not in ("device", "dtype"):
            assert re.search(rf"^\s+[\w`, ]*\b{name}\b[\w`, ]*(\(.*\))?:", explained, re.MULTILINE), name
    for method in ("regularization_loss", "constrain_"):
        if hasattr(case.entry.cls, method):
            assert inspect.getdoc(getattr(case.entry.cls, method)), f"{method} does not say what it does, and when"


@every_layer()
def test_repr_shows_the_sizes(case):
    text = case.build().extra_repr()
    for size in {size for size in case.sizes.args.values() if size > 1}:
        assert re.search(rf"\b{size}\b", text), text
    assert case.entry.cls.__name__ in repr(case.build())


@every_layer()
def test_nonlinear_flag_tells_whether_an_activation_may_be_left_out(case):
    layer = case.generic(dtype=torch.float64)
    x, other = case.x(5, dtype=torch.float64), case.x(5, seed=1, dtype=torch.float64)
    zero = layer(torch.zeros_like(x))
    bend = rms((layer(x + other) - zero) - (layer(x) - zero) - (layer(other) - zero)) / rms(layer(x))
    if case.entry.nonlinear:
        assert bend > 1e-3, "registered as nonlinear=True, but the layer is affine"
    else:
        assert bend < 1e-9, "registered as nonlinear=False, but the layer bends its input"


def test_every_kind_of_layer_is_tested_or_documents_its_own_shape():
    assert {get_layer(name).kind for name in archzoo.list_layers()} <= {*KINDS, "module"}
