"""One set of rules for values of any type, and what of it depends on where they come from."""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from torch import nn

from archzoo.arguments import INFINITE, LARGEST, LONGEST, YAML, check_types, described, fits
from archzoo.layers._check import PYTHON, check_dropout, check_positive, typed

BOTH, NEITHER, ONLY_PYTHON, ONLY_YAML = (True, True), (False, False), (False, True), (True, False)


@pytest.mark.parametrize(
    ("annotation", "value", "yaml_and_python"),
    [
        (int, 3, BOTH),
        (int, True, NEITHER),
        (int, 3.0, NEITHER),
        (int, np.int64(3), ONLY_PYTHON),
        (int, LARGEST + 1, ONLY_PYTHON),
        (int, 2**63, NEITHER),
        (float, 3, BOTH),
        (float, True, NEITHER),
        (float, math.nan, NEITHER),
        (float, "3", NEITHER),
        (float, np.float64(0.5), BOTH),  # a float
        (float, np.float32(0.5), ONLY_PYTHON),
        (float, Fraction(1, 2), ONLY_PYTHON),
        (float, math.inf, ONLY_PYTHON),
        (float, 1e39, ONLY_YAML),
        (float, 2**63, NEITHER),
        (bool, False, BOTH),
        (bool, 0, NEITHER),
        (bool, "no", NEITHER),
        (str, "x", BOTH),
        (int | None, None, BOTH),
        (int | None, True, NEITHER),
        (Literal["a", 1], "a", BOTH),
        (Literal["a", 1], "b", NEITHER),
        (Literal["a", 1], True, NEITHER),
        (tuple[int, int], [1, 2], BOTH),
        (tuple[int, int], (1, 2, 3), NEITHER),
        (tuple[int, int], "12", NEITHER),
        (tuple[int, int], range(2), NEITHER),
        (tuple[int, ...], (1, 2, 3), BOTH),
        (tuple[int, ...], (1, 2.5), NEITHER),
        (list[int], (1, 2), BOTH),
        (Sequence[int], [], BOTH),
        (Sequence[int], range(3), ONLY_PYTHON),
        (Sequence[int], [0] * (LONGEST + 1), ONLY_PYTHON),
        (Sequence[str], "abc", NEITHER),
        (Mapping[str, int], {"a": 1}, BOTH),
        (Mapping[str, int], {1: 1}, NEITHER),
        (Callable[[int], int], abs, BOTH),
        (Callable[[int], int], "abs", NEITHER),
        (Path, "a/b", ONLY_YAML),
        (Path, Path("a/b"), BOTH),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_fits_an_annotation(annotation, value, yaml_and_python):
    assert (fits(value, annotation), fits(value, annotation, PYTHON)) == yaml_and_python


def test_infinite_numbers_may_be_left_to_the_function():
    assert [fits(value, float, INFINITE) for value in (math.inf, 1e308, math.nan, True)] == [True, True, False, False]


def test_what_is_asked_for_is_said_in_the_words_of_where_it_comes_from():
    annotation = str | tuple[int, float] | Sequence[bool] | Callable[[int], int] | None
    assert described(annotation, YAML) == (
        f"a text or [a whole number up to {LARGEST}, a finite number] or a list, each true or false or null"
    )
    assert described(annotation, PYTHON) == (
        "a text or (a whole number below 2^63, a number that float32 can hold) or a sequence, each True or False "
        "or a function or None"
    )
    assert (described(Path, YAML), described(Path, PYTHON)) == ("a value", "a Path")


def test_a_function_s_options_and_a_layer_s_arguments_are_refused_by_name():
    class Layer(nn.Module):
        @typed
        def __init__(self, size: int, rate: float = 0.5):
            super().__init__()

    for options, yaml, python in (
        ({"size": True}, "size=True: must be a whole number up to", "size=True: must be a whole number below"),
        ({"size": 2**31}, "size=2147483648: must be a whole number up to", None),
        ({"size": 1, "rate": math.inf}, "rate=inf: must be a finite number", None),
    ):
        with pytest.raises(ValueError, match=yaml):
            check_types(Layer, options)
        if python is None:
            Layer(**options)
        else:
            with pytest.raises(ValueError, match=python):
                Layer(**options)


def test_numpy_s_numbers_are_numbers_to_a_layer_s_own_checks_too():
    check_positive(rate=np.float32(0.5))
    check_dropout(np.float32(0.5))
    for wrong in (np.float32(0), np.bool_(True), True, "1", math.nan, math.inf):
        with pytest.raises(ValueError, match="rate="):
            check_positive(rate=wrong)
