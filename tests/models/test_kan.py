"""The KAN model: what it computes, from which arguments, and what its state holds."""

import copy
import math
import re

import pytest
import torch

from archzoo.models.kan import KAN
from tests.helpers import rms_error, run_python
from tests.models.kan_networks import DOUBLE, MIXED, STATES, generic, samples, with_formulas


def test_states_are_what_their_names_say():
    torch.manual_seed(3)
    x, found = samples(60, 3), {}
    for name, change in STATES.items():
        torch.manual_seed(3)
        found[name] = generic(**MIXED)
        change(found[name], x)
    assert found["refined and moved"].grid_size == 7
    assert any(block.edges.mask is not None for block in found["edges pruned"].blocks)
    assert sum(map(sum, found["nodes pruned"].width)) < sum(map(sum, found["fresh"].width))
    assert len(found["inputs pruned"].input_index) < 3
    assert found["formulas"].numeric_edges()
    assert not found["formulas alone"].numeric_edges()


def definition(model, x):
    """The network as the papers write it, edge by edge and node by node."""
    for block in model.blocks:
        subnodes = []
        for o in range(block.edges.out_features):
            total = sum(block.edge_function(o, i, x[:, i]) for i in range(block.edges.in_features))
            if block.edges.bias is not None:
                total = total + block.edges.bias[o]
            subnodes.append(block.subnode_scale[o] * total + block.subnode_bias[o])
        nodes, rest = subnodes[: block.n_sum], subnodes[block.n_sum :]
        for arity in block.arities:
            product, rest = math.prod(rest[:arity]), rest[arity:]
            nodes.append(product)
        x = torch.stack([block.node_scale[n] * node + block.node_bias[n] for n, node in enumerate(nodes)], -1)
    return x


def test_forward_is_the_definition(any_state):
    x = samples(20, 3)
    remaining = x[:, any_state.input_index]
    assert rms_error(any_state(x), definition(any_state, remaining)) < 1e-12
    levels = any_state.activations(x)
    assert [level.shape[-1] for level in levels] == [sum(pair) for pair in any_state.width]
    assert torch.equal(levels[-1], any_state(x))


def test_bias_is_one_more_term():
    model, x = generic(bias=True), samples(20, 3)
    with torch.no_grad():
        model.blocks[0].edges.bias.normal_()
    assert rms_error(model(x), definition(model, x)) < 1e-12
    assert KAN([2, 2]).blocks[0].edges.bias is None


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 4), (2, 3, 4, 5)], ids=str)
def test_any_number_of_dimensions_as_in_pykan_204(any_state, shape):
    x = samples(*shape, 3)
    y = any_state(x)
    assert y.shape == (*shape, 3)
    assert torch.allclose(y.reshape(-1, 3), any_state(x.reshape(-1, 3)), rtol=1e-12, atol=1e-12)


def test_width_is_read_as_pairs_and_subnodes_follow():
    model = KAN([3, (1, 2), 2], mult_arity=3)
    assert model.width == [(3, 0), (1, 2), (2, 0)]
    assert model.mult_arity == [[], [3, 3], []]
    assert model.blocks[0].edges.spline_weight.shape == (7, 3, 6)
    assert model.blocks[1].edges.spline_weight.shape == (2, 3, 6)
    assert model.blocks[0].arity.tolist() == [1, 3, 3]
    assert KAN([(3, 0), [1, 2], 2], mult_arity=[[], [3, 3], []]).width == model.width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": [3]}, "width=[3]: must have two entries"),
        ({"width": 3}, "width=3: must have two entries"),
        ({"width": [3, 0, 1]}, "width=[3, 0, 1]: each level needs a node"),
        ({"width": [3, 2.5, 1]}, "width[1]=2.5: must be a whole number"),
        ({"width": [3, (2, -1), 1]}, "width[1]=-1: must be"),
        ({"width": [3, (1, 1, 1), 1]}, "(1, 1, 1) must be a number of nodes, or a pair"),
        ({"width": [(1, 1), 1]}, "the inputs cannot be products"),
        ({"mult_arity": 1}, "mult_arity=1: must be a whole number, at least 2"),
        (
            {"mult_arity": [[], [2], []]},
            "mult_arity=[[], [2], []]: must be a whole number, or a list for each of the 3",
        ),
        ({"mult_arity": [[2, 2]]}, "mult_arity=[[2, 2]]: must be"),
        ({"mult_arity": [2, 2, 2]}, "mult_arity=[2, 2, 2]: must be"),
        ({"mult_arity": [[], [1, 2], []]}, "mult_arity[1]=1: must be a whole number, at least 2"),
        ({"regularize": -1.0}, "regularize=-1.0: must be finite"),
        ({"grid_size": 0}, "grid_size=0: must be"),
        ({"extrapolation": "cubic"}, "extrapolation='cubic': must be"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KAN(**{"width": [3, (2, 2), 1], **arguments})


def test_wrong_inputs_are_refused():
    for x in (torch.rand(5, 2), torch.tensor(1.0)):
        with pytest.raises(
            ValueError, match=re.escape(f"x has shape {tuple(x.shape)}, but its last dimension must be")
        ):
            KAN([3, 1])(x)


def test_affine_says_what_is_learned():
    names = {"subnode_scale", "subnode_bias", "node_scale", "node_bias"}
    for affine in (False, True):
        model = KAN([2, (1, 1), 1], affine=affine)
        learned = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
        assert learned & names == (names if affine else set())
        assert all(p.eq(1).all() for n, p in model.named_parameters() if n.endswith("_scale"))
        assert all(p.eq(0).all() for n, p in model.named_parameters() if n.endswith("node_bias"))


@pytest.mark.parametrize("formulas", [False, True], ids=["splines", "formulas"])
def test_gradients_are_those_of_finite_differences(formulas):
    model, x = generic([2, (1, 2), 1], mult_arity=[[], [2, 3], []]), samples(3, 2).requires_grad_()
    if formulas:
        with_formulas(model)
    assert torch.autograd.gradcheck(lambda *_: model(x), (x, *model.parameters()))
    assert torch.autograd.gradgradcheck(model, x)


def test_product_with_a_factor_of_zero_has_the_others_as_gradient():
    model = KAN([2, (0, 1)], base_activation="identity", **DOUBLE)
    edges = model.blocks[0].edges
    with torch.no_grad():
        edges.spline_weight.zero_()
        edges.base_weight.copy_(torch.eye(2))
    x = torch.tensor([[0.0, 0.7], [0.0, 0.0]], **DOUBLE, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(grad, x.detach().flip(-1))


def test_state_dict_round_trips_in_any_state(any_state):
    levels, x = any_state.width, samples(20, 3)
    state = {name: t.clone() for name, t in any_state.state_dict().items()}
    twin = generic(levels, mult_arity=any_state.mult_arity, grid_size=any_state.grid_size)
    for other in (twin, with_formulas(copy.deepcopy(twin))):
        if other is not twin:
            other.prune_edges(samples(20, levels[0][0]), 0.05)
        other.load_state_dict(state)
        assert torch.equal(other(x), any_state(x))
        assert other.input_index == any_state.input_index
        assert other.numeric_edges() == any_state.numeric_edges()
        assert other.state_dict().keys() == state.keys()
    with torch.device("meta"):
        empty = KAN(levels, mult_arity=any_state.mult_arity, grid_size=any_state.grid_size, affine=True)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), any_state(x))


def test_a_state_of_other_sizes_is_refused_with_the_call_that_has_them():
    model = generic(**MIXED)
    before = copy.deepcopy(model)
    model.refine(4)
    with pytest.raises(
        ValueError, match=re.escape("of KAN([3, (1, 2), (0, 1), (2, 1)], grid_size=4, spline_order=3, mul")
    ):
        before.load_state_dict(model.state_dict())
    shallow = KAN([3, 1])
    state = {name: t.clone() for name, t in shallow.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape("it is of KAN([3, (1, 2), (0, 1), (2, 1)], grid_size=3")):
        shallow.load_state_dict(before.state_dict())
    assert all(torch.equal(state[name], t) for name, t in shallow.state_dict().items())
    # Six subnodes of three nodes, all shapes alike.
    one, other = KAN([2, (1, 2)], mult_arity=[[], [2, 3]]), KAN([2, (1, 2)], mult_arity=[[], [3, 2]])
    with pytest.raises(ValueError, match=re.escape("mult_arity=[[], [2, 3]]")):
        other.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        one.load_state_dict({})


def test_copies_in_any_state(any_state):
    x = samples(20, 3)
    assert torch.equal(copy.deepcopy(any_state)(x), any_state(x))
    meta = copy.deepcopy(any_state).to("meta")
    assert meta(x.to("meta")).shape == (20, 3)
    assert meta.extra_repr().startswith("[")
    assert (f"input_index={any_state.input_index}" in repr(any_state)) == (any_state.input_mask is not None)


@pytest.mark.parametrize("any_state", ["inputs pruned", "formulas"], indirect=True)
def test_exports(any_state):
    torch._dynamo.reset()  # its limit of recompilations counts those of all tests
    x = samples(20, 3)
    exported = torch.export.export(any_state, (x,)).module()
    assert rms_error(exported(x), any_state(x)) < 1e-12


@pytest.mark.slow
def test_compiled_model_without_a_graph_break_follows_pruning_and_formulas():
    torch._dynamo.reset()  # its limit of recompilations counts those of all tests
    model, x = generic(), samples(60, 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    for change in ("inputs pruned", "refined and moved", "formulas"):
        STATES[change](model, x)
        assert rms_error(compiled(x), model(x)) < 1e-12


def test_autocast_and_narrow_dtypes():
    model = KAN([3, (2, 1), 2])
    x = torch.rand(20, 3)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_error(model(x), y) < 0.02
    assert rms_error(model.bfloat16()(x.bfloat16()), y) < 0.05


def test_reset_starts_anew_with_the_sizes_there_are():
    model, x = generic(), samples(60, 3)
    model.prune_nodes(x, 0.3)
    model.prune_edges(x, 0.1)
    with_formulas(model)
    width = model.width
    model.reset_parameters()
    fresh = KAN(width)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert model.width == width
    assert not any(t.sub(1).any() for n, t in model.state_dict().items() if n.endswith("node_scale"))


@pytest.mark.slow
def test_nothing_is_written_and_no_plotting_is_imported_until_asked_for(tmp_path):
    run_python(
        """
import sys, torch
loaded = set(sys.modules)
from archzoo.models.kan import KAN
x = torch.rand(50, 2)
model = KAN([2, (2, 1), 1])
optimizer = torch.optim.LBFGS(model.parameters())
optimizer.step(lambda: model(x).square().mean())
model.update_grid(x); model.refine(5); model.prune_edges(x, 1e-3); model.prune_nodes(x, 1e-3)
model.fix_symbolic(0, 0, 0, "x"); model.regularization_loss(x)
assert not {"matplotlib", "scipy", "kan"} & (set(sys.modules) - loaded)
""",
        cwd=tmp_path,
    )
    assert not list(tmp_path.iterdir())  # pykan makes ./model
