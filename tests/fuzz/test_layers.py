"""Row "wrong shape, dtype, device, dims of a layer" of the reliability table, and NaN in, over the whole zoo.

`python -m benchmarks fuzz_layers --record` makes 200 trials a layer.
"""

import random

import pytest
import torch
from torch import nn

import archzoo
from archzoo.layers._check import typed
from tests.fuzz.layers import WRONG_CALLS, Finding, Subject, Trial, nan_in, plausible, run, subjects, trials

SUBJECTS = subjects()


def findings(subject: Subject, count: int, seed: int) -> list[str]:
    found = []
    for trial in trials(subject, count, seed):
        try:
            run(subject, trial)
        except Finding as finding:
            found.append(str(finding))
    return found


def test_every_layer_is_tried():
    assert {"APTx", *archzoo.list_layers()} == {subject.name for subject in SUBJECTS}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_few_constructions_and_calls_are_right_or_refused_by_name(subject):
    assert findings(subject, 6, seed=0) == []


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_many_constructions_and_calls_are_right_or_refused_by_name(subject):
    assert findings(subject, 200, seed=1) == []


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 30), marks=pytest.mark.slow)], ids=["few", "many"])
def test_nan_in_gives_nan_or_an_error_whatever_the_options(subject, seeds):
    for seed in seeds:
        nan_in(subject, seed)


def test_trials_follow_their_seed_and_no_other_randomness():
    subject = SUBJECTS[1]
    random.seed(1)
    before = random.getstate()
    first, again, other = ([*map(str, trials(subject, 40, seed))] for seed in (3, 3, 4))
    assert first == again != other
    assert random.getstate() == before


# --- The fuzzer can fail ----------------------------------------------------------------------------------------------


class _Careless(nn.Module):
    """Everything that a layer may do wrong, each at a size of its own."""

    def __init__(self, in_features: int, *, kind: str = "sound", flag: bool = False, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(in_features, in_features, device=device, dtype=dtype))
        self.kind = kind
        if kind == "unnamed":
            raise ValueError("something is wrong")

    def forward(self, x):
        if self.kind == "dtype":
            return (x @ self.weight).double()
        return x @ self.weight


CARELESS = Subject("careless", _Careless, {"in_features": (4,)}, lambda a: (4,), lambda a, x: x, (1,))


@pytest.mark.parametrize(
    ("args", "changed", "call"),
    [
        ({"flag": "no"}, "flag", "batch"),
        ({"kind": "unnamed"}, "kind", "batch"),
        ({"kind": "dtype"}, "kind", "batch"),
        ({"in_features": 2.5}, "in_features", "batch"),
        ({"in_features": 0}, "in_features", "batch"),
        *[({}, "kind", call) for call in WRONG_CALLS if call not in ("list", "None", "text", "number")],  # Python's
    ],
    ids=str,
)
def test_a_careless_layer_is_noticed(args, changed, call):
    with pytest.raises(Finding):
        run(CARELESS, Trial({"in_features": 4, "kind": "sound", **args}, (changed,), call))


def test_a_layer_that_swallows_nan_is_noticed(monkeypatch):
    monkeypatch.setattr(_Careless, "forward", lambda self, x: x.nan_to_num() @ self.weight)
    with pytest.raises(Finding, match="NaN"):
        nan_in(CARELESS, 0)


# --- What the layers check with ---------------------------------------------------------------------------------------


class _Typed(nn.Module):
    @typed
    def __init__(self, size: int, flag: bool = True, *, pair: tuple[float, float] | None = None, device=None):
        super().__init__()
        if size == 7:
            raise ValueError("size=7: the layer's own words")
        self.weight = torch.empty(size)


def test_types_are_checked_after_the_layers_own_words():
    assert len(_Typed(3, False, pair=[1, 2.5]).weight) == 3
    for args, kwargs, said in (
        ((7,), {"flag": "no"}, "size=7: the layer's own words"),
        (("3",), {}, "size='3': must be a whole number"),
        ((True,), {}, "size=True: must be a whole number"),
        ((3, 1), {}, "flag=1: must be True or False"),
        ((3,), {"pair": (1.0, float("nan"))}, r"pair=\(1.0, nan\): must be \(a number .*, a number .*\) or None"),
        ((3,), {"pair": (1.0,)}, "pair"),
        ((3,), {"device": "nowhere"}, "device='nowhere': must be a device that torch knows"),
    ):
        with pytest.raises(ValueError, match=said):
            _Typed(*args, **kwargs)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sizes'"):
        _Typed(3, sizes=4)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        _Typed()


def test_an_oracle_of_its_own_tells_what_may_be_right():
    assert plausible([1, 2.0], tuple[float, float])
    assert not plausible(True, int | None)
    assert not plausible(float("nan"), float)
