"""Every example in a docstring runs."""

import doctest
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import archzoo
import archzoo.kernels
from archzoo import _surgery_adapters, registry

NAMES = sorted(
    {"archzoo", "archzoo.kernels"}
    | {m.name for m in pkgutil.walk_packages(archzoo.__path__, "archzoo.")}
    | {m.name for m in pkgutil.walk_packages(archzoo.kernels.__path__, "archzoo.kernels.")}
)
MODULES = [name for name in NAMES if ">>>" in Path(importlib.util.find_spec(name).origin).read_text()]


def examples(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(importlib.import_module(name)) if test.examples]


@pytest.fixture
def registered_for_a_while(monkeypatch):
    """What an example registers, other tests do not see."""
    registry.import_layers()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(_surgery_adapters, "_adapters", list(_surgery_adapters._adapters))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("registered_for_a_while")
def test_examples_run(name):
    failed = []
    for test in examples(name):
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=failed.append)
    assert not failed, "".join(failed)


def test_there_are_examples():
    assert sum(len(examples(name)) for name in MODULES) >= 5
