"""SymbolicLinear: edges that hold functions."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archzoo.models.symbolic import (
    FUNCTIONS,
    Fit,
    SymbolicLinear,
    add_function,
)
from tests.models.symbolic_layers import NAMES, OF_EACH_KIND, by_loop, full, inputs, layer_of

SMOOTH = [name for name in NAMES if name not in ("0", "abs", "sgn")]


def test_an_empty_layer_gives_zeros():
    layer = SymbolicLinear(3, 2)
    assert layer.is_empty
    assert layer(torch.full((4, 5, 3), math.nan)).equal(torch.zeros(4, 5, 2))
    assert layer.edge_functions(torch.randn(4, 3)).equal(torch.zeros(4, 2, 3))
    assert layer.mask().equal(torch.zeros(2, 3))
    assert layer.edge_name(1, 2) is None


@pytest.mark.parametrize("leading", [(), (1,), (0,), (7,), (2, 3)], ids=str)
def test_the_output_is_the_sum_over_symbolic_edges(leading):
    layer = full()
    x = inputs(layer, *leading)
    expected = by_loop(layer, x)
    torch.testing.assert_close(layer.edge_functions(x), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(layer(x), expected.sum(-1), rtol=1e-13, atol=1e-13)
    assert layer(x).shape == (*leading, 2)


def test_each_function_is_evaluated_once_however_many_edges_hold_it(monkeypatch):
    """pykan#432: no Python loop over edges."""
    layer, calls = SymbolicLinear(20, 30), []
    for o in range(30):
        for i in range(0, 20, 3):
            layer.set_edge(o, i, "sin" if (o + i) % 2 else "x^2", a=0.1 * o)
    for name in ("sin", "x^2"):
        counted = lambda u, f=FUNCTIONS[name].torch: (calls.append(u.shape), f(u))[1]  # noqa: E731
        monkeypatch.setitem(FUNCTIONS, name, replace(FUNCTIONS[name], torch=counted))
    x = torch.randn(8, 20)
    y = layer(x)
    assert sorted(calls) == [(8, 105), (8, 105)]
    torch.testing.assert_close(y, by_loop(layer, x).sum(-1), rtol=1e-5, atol=1e-5)


def test_setting_and_unsetting_an_edge():
    layer = SymbolicLinear(3, 2)
    parameter = layer.affine
    layer.set_edge(1, 2, Fit("exp", 0.5, 0.25, -2.0, 1.0, 0.999, 2, -3.0))
    layer.set_edge(0, 1, "sin", a=2)
    layer.set_edge(0, 1, "cos", b=0.5)  # in place of the sine
    assert not layer.is_empty
    assert layer.edge_name(1, 2) == "exp"
    assert layer.edge_name(0, 1) == "cos"
    assert layer.affine[1, 2].tolist() == [0.5, 0.25, -2.0, 1.0]
    assert layer.affine[0, 1].tolist() == [1.0, 0.5, 1.0, 0.0]
    assert layer.mask().tolist() == [[0, 1, 0], [0, 0, 1]]
    assert layer.function[1, 2] == NAMES.index("exp")
    assert layer.function.tolist().count([-1, -1, -1]) == 0
    assert repr(layer) == "SymbolicLinear(3, 2, 'exp': 1, 'cos': 1)"
    layer.unset_edge(1, 2)
    layer.unset_edge(0, 1)
    assert layer.is_empty
    assert layer.affine is parameter  # the optimizer keeps its hold
    assert layer.affine.equal(torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(2, 3, 4))
    assert layer.function.eq(-1).all()
    layer.set_edge(0, 0, "0", d=2.5)
    assert layer(torch.randn(4, 3)).tolist() == [[2.5, 0.0]] * 4
    layer.reset_parameters()
    assert layer.is_empty


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: layer.set_edge(2, 0, "sin"), "o=2: must lie from 0 to 1"),
        (lambda layer: layer.set_edge(0, -1, "sin"), "i=-1"),
        (lambda layer: layer.set_edge(0, 0, "sine"), "fit='sine'.*did you mean 'sin'"),
        (lambda layer: layer.set_edge(0, 0, "sin", a=math.nan), "must be finite"),
        (lambda layer: layer.set_edge(0, 0, "sin", c=1e300), "must be finite in torch.float32"),
        (lambda layer: layer.set_edge(0, 0, Fit("sin", 1, 0, 1, 0, 1, 2, 0), a=2.0), "a fit has its own numbers"),
        (lambda layer: layer.unset_edge(0, 0), "o=0, i=0: this edge holds no function"),
        (lambda layer: layer.edge_name(0, 3), "i=3"),
        (lambda layer: layer(torch.zeros(4, 2)), r"\(4, 2\).*in_features=3"),
        (lambda layer: layer(torch.tensor(1.0)), "in_features=3"),
        (lambda layer: layer.edge_functions(torch.zeros(2)), "in_features=3"),
        (lambda layer: layer.formula(2, [0, 0, 0]), "o=2"),
        (lambda layer: layer.formula(0, [0, 0]), "inputs: 2"),
        (lambda layer: layer.formula(0, [0, 0, 0], round_to=0), "round_to=0"),
        (lambda layer: layer.subset([3], [0]), "in_index"),
        (lambda layer: layer.subset([0], []), "out_index"),
        (lambda layer: SymbolicLinear(0, 1), "in_features=0"),
    ],
)
def test_bad_arguments_of_the_layer_are_refused(call, message):
    layer = SymbolicLinear(3, 2)
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        call(layer)
    assert all(value.equal(state[key]) for key, value in layer.state_dict().items())
    assert layer.is_empty


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_evaluated_in_float32(dtype):
    layer = full(dtype)
    x = inputs(layer, 16)
    y, phi = layer(x), layer.edge_functions(x)
    assert y.dtype == phi.dtype == dtype
    exact = full().to(torch.float64)
    exact.load_state_dict({**layer.state_dict(), "affine": layer.affine.detach().double()})
    torch.testing.assert_close(y, exact(x.double()).to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "0"])
def test_nan_is_not_hidden(name):
    layer = SymbolicLinear(1, 1)
    layer.set_edge(0, 0, name)
    assert layer(torch.tensor([[math.nan]])).isnan().all()


def test_gradients_are_right():
    layer = full(names=SMOOTH)
    x = inputs(layer, 1).requires_grad_()

    def call(x, affine):
        return torch.func.functional_call(layer, {"affine": affine}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.affine))
    assert torch.autograd.gradgradcheck(call, (x, layer.affine), atol=1e-4, fast_mode=True)
    layer(x).sum().backward()
    assert layer.affine.grad[layer.function < 0].eq(0).all()


@pytest.mark.parametrize(
    "names", [OF_EACH_KIND, pytest.param(NAMES, marks=pytest.mark.slow)], ids=["of each kind", "all"]
)
def test_it_compiles_into_one_graph_and_exports(names):
    layer = full(torch.float32, names)
    x = inputs(layer, 5)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    empty = SymbolicLinear(3, 2)
    assert torch.compile(empty, fullgraph=True, backend="aot_eager")(torch.zeros(1, 3)).equal(torch.zeros(1, 2))


def test_copies_are_whole():
    layer = full()
    x = inputs(layer, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other(x).equal(layer(x))
        other.unset_edge(0, 0)
        assert layer.edge_name(0, 0) == NAMES[0]


def test_meta_needs_no_values():
    layer = full().to("meta")
    assert layer(torch.empty(4, len(NAMES), device="meta", dtype=torch.float64)).shape == (4, 2)
    bare = SymbolicLinear(3, 2, device="meta")
    bare.set_edge(0, 1, "sin")
    assert bare.edge_name(0, 1) == "sin"
    assert bare(torch.empty(5, 3, device="meta")).is_meta
    source = SymbolicLinear(3, 2)
    source.set_edge(1, 1, "exp", a=0.5)
    for assign in (False, True):
        loaded = SymbolicLinear(3, 2, device="meta")
        if not assign:
            loaded = loaded.to_empty(device="cpu")
        loaded.load_state_dict(source.state_dict(), assign=assign)
        x = torch.randn(4, 3)
        assert loaded(x).equal(source(x))


edges = st.dictionaries(
    st.tuples(st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.sampled_from(["0", "x", "sin", "exp", "x^2", "tanh"]), st.floats(-2, 2), st.floats(-2, 2)),
)


@settings(max_examples=30, deadline=None)
@given(held=edges, before=edges, assign=st.booleans())
def test_a_state_dict_says_which_edge_holds_which_function(held, before, assign):
    layer, other = layer_of(held), layer_of(before)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
    expected = layer(x)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
    assert other(x).equal(expected)
    assert other.is_empty == layer.is_empty == (not held)
    assert {(o, i): other.edge_name(o, i) for o in range(3) for i in range(4) if other.edge_name(o, i)} == {
        edge: name for edge, (name, _, _) in held.items()
    }
    assert set(layer.state_dict()) == {"affine", "function"}


@settings(max_examples=30, deadline=None)
@given(
    held=edges,
    rows=st.lists(st.integers(0, 2), min_size=1, unique=True),
    columns=st.lists(st.integers(0, 3), min_size=1, unique=True),
)
def test_a_subset_has_the_same_edges(held, rows, columns):
    layer = layer_of(held)
    layer.affine.requires_grad_(False)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
    part = layer.subset(columns, rows)
    assert part.edge_functions(x[:, columns]).equal(layer.edge_functions(x)[:, rows][:, :, columns])
    assert part.function.equal(layer.function[rows][:, columns])
    assert not part.affine.requires_grad
    assert part.affine.data_ptr() != layer.affine.data_ptr()


def test_a_subset_takes_masks():
    layer = layer_of({(1, 2): ("sin", 1.0, 0.0)})
    part = layer.subset(torch.tensor([False, False, True, True]), torch.tensor([False, True, False]))
    assert (part.in_features, part.out_features, part.edge_name(0, 0)) == (2, 1, "sin")


def test_added_functions_are_found_by_name_in_a_state_dict(own_functions):
    add_function("first", torch.sin, lambda u: u, 1)
    add_function("second", torch.exp, lambda u: u, 1)
    layer = torch.nn.Sequential(SymbolicLinear(2, 1))
    layer[0].set_edge(0, 1, "second")
    layer[0].set_edge(0, 0, "tanh")
    state = layer.state_dict()
    assert set(state) == {"0.affine", "0.function", "0.added_functions"}
    before = copy.deepcopy(state)
    x = torch.randn(4, 2)
    expected = layer(x)
    del FUNCTIONS["first"], FUNCTIONS["second"]
    other = torch.nn.Sequential(SymbolicLinear(2, 1))
    with pytest.raises(RuntimeError, match="holds function 'second'.*add_function"):
        other.load_state_dict(state)
    assert other[0].is_empty
    add_function("second", torch.exp, lambda u: u, 1)  # now in the first place
    other.load_state_dict(state)
    assert other(x).equal(expected)
    assert other[0].function.tolist() == [[NAMES.index("tanh"), len(NAMES)]]
    assert all(value.equal(before[key]) for key, value in state.items())


def test_a_state_dict_with_an_unknown_function_is_refused():
    layer = layer_of({(0, 0): ("sin", 1.0, 0.0)})
    state = {**layer.state_dict(), "function": torch.full((3, 4), len(NAMES))}
    with pytest.raises(RuntimeError, match=f"function number {len(NAMES)}, which has to be added"):
        layer.load_state_dict(state)
    assert layer.edge_name(0, 0) == "sin"
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**layer.state_dict(), "function": torch.full((3, 3), 2)})
    assert layer.edge_name(0, 0) == "sin"
