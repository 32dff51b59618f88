"""Every example in a docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import archzoo
import archzoo.kernels

MODULES = sorted(
    {"archzoo", "archzoo.kernels"}
    | {m.name for m in pkgutil.walk_packages(archzoo.__path__, "archzoo.")}
    | {m.name for m in pkgutil.walk_packages(archzoo.kernels.__path__, "archzoo.kernels.")}
)


def examples(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    failed = []
    for test in examples(name):
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=failed.append)
    assert not failed, "".join(failed)


def test_there_are_examples():
    assert sum(len(examples(name)) for name in MODULES) >= 5
