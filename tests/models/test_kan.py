import copy
import itertools
import math
import pickle
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from archzoo.budget import count_flops, count_parameters, match_widths
from archzoo.layers.kan import KANLinear
from archzoo.models.kan import KAN
from archzoo.models.model import LayerFactory, models
from archzoo.models.symbolic import FUNCTIONS, Fit, add_function
from tests.helpers import rms_error, run_python

DOUBLE = {"dtype": torch.float64}
MIXED = {"width": [3, (1, 2), (0, 1), (2, 1)], "mult_arity": [[], [2, 3], [2], [2]]}


def samples(*shape, scale=1.0):
    return (2 * torch.rand(*shape, **DOUBLE) - 1) * scale


def generic(width=(3, 4, 2), **options):
    """A KAN in no special state: noisy splines, scales and biases away from 1 and 0."""
    model = KAN(width, **{"scale_noise": 2.0, "affine": True, **DOUBLE, **options})
    with torch.no_grad():
        for block in model.blocks:
            for parameter in (block.subnode_scale, block.subnode_bias, block.node_scale, block.node_bias):
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def with_formulas(model, every=2):
    """Makes each second edge a formula without a pole or an end."""
    names = itertools.cycle(["sin", "exp", "x^2", "tanh", "x"])
    for edge in model.numeric_edges()[::every]:
        model.fix_symbolic(*edge, next(names), affine=(0.7, 0.2, -0.5, 0.1))
    return model


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


def train(model, x, y, iterations, **options):
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=iterations, tolerance_change=0, line_search_fn="strong_wolfe", **options
    )

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (model(x) - y).square().mean().sqrt().item()


def lowest(scores, part):
    """A threshold that this part of the scores is below, and no whole level or block."""
    scores = [s.flatten() for s in scores]
    return min(float(torch.cat(scores).quantile(part)), *(float(s.max()) for s in scores))


STATES = {
    "fresh": lambda model, x: None,
    "refined and moved": lambda model, x: (model.update_grid(x), model.refine(7)),
    "edges pruned": lambda model, x: model.prune_edges(x, lowest(model.attribute(x).edges, 0.4)),
    "nodes pruned": lambda model, x: model.prune_nodes(x, lowest(model.attribute(x).nodes[1:-1], 0.4)),
    "inputs pruned": lambda model, x: model.prune_inputs(x, lowest(model.attribute(x).nodes[:1], 0.4)),
    "formulas": lambda model, x: with_formulas(model),
    "formulas alone": lambda model, x: with_formulas(model, 1),
}


@pytest.fixture(autouse=True)
def _compile_anew():
    torch._dynamo.reset()  # its limit of recompilations counts those of all tests


@pytest.fixture(params=STATES)
def any_state(request):
    torch.manual_seed(3)
    model = generic(**MIXED)
    STATES[request.param](model, samples(60, 3))
    return model


# --- What it computes -------------------------------------------------------------------------------------------------


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
    x = samples(20, 3)
    exported = torch.export.export(any_state, (x,)).module()
    assert rms_error(exported(x), any_state(x)) < 1e-12


@pytest.mark.slow
def test_compiled_model_without_a_graph_break_follows_pruning_and_formulas():
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


# --- Training ---------------------------------------------------------------------------------------------------------


def test_regularization_is_the_sum_over_blocks_of_their_inputs():
    model, x = generic(**MIXED), samples(5, 8, 3)
    levels = model.activations(x)
    want = sum(b.edges.activation_regularization(h, 0.5, 3.0) for b, h in zip(model.blocks, levels, strict=False))
    assert torch.equal(model.regularization_loss(x, l1=0.5, entropy=3.0), want)
    assert want.requires_grad


def test_regularization_without_samples_is_that_of_the_last_training_pass_once():
    torch.manual_seed(0)
    model, x = KAN([3, 4, 2], regularize=0.1, **DOUBLE), samples(40, 3)
    assert model.regularization_loss() == 0
    model(x)
    first = model.regularization_loss()
    torch.testing.assert_close(first, 0.1 * model.regularization_loss(x), rtol=1e-13, atol=0)
    assert all(p.grad is None for p in model.parameters())
    first.backward()
    assert model.blocks[0].edges.spline_weight.grad.any()
    assert model.regularization_loss() == 0
    model(samples(40, 3))
    model.eval()(x)
    assert model.train().regularization_loss() > 0
    model.eval()(x)
    assert model.regularization_loss() == 0
    silent = KAN([3, 4, 2], **DOUBLE)
    silent(x)
    assert silent.regularization_loss() == 0
    assert not silent._seen


def test_a_model_between_forward_and_regularization_can_be_copied_and_compiled():
    model, x = generic(regularize=0.1), samples(40, 3)
    model(x)
    assert copy.deepcopy(model).regularization_loss() == 0
    assert pickle.loads(pickle.dumps(model)).regularization_loss() == 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        loss = compiled(x).square().mean() + model.regularization_loss()
        want = model(x).square().mean() + 0.1 * model.regularization_loss(x)
        assert torch.allclose(loss, want, rtol=1e-12)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        wants = torch.autograd.grad(want, list(model.parameters()))
        assert all(torch.allclose(g, w, rtol=1e-9, atol=1e-12) for g, w in zip(grads, wants, strict=True))


def test_formulas_are_not_regularized():
    model, x = with_formulas(generic(), 1), samples(40, 3)
    assert model.regularization_loss(x) == 0


def test_update_grid_covers_what_each_block_gets_after_the_blocks_below_moved():
    model, x = generic(scale_noise=5.0, grid_eps=1.0), samples(10, 20, 3, scale=3.0)
    parameters = list(model.parameters())
    model.update_grid(x, margin=0.0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for block, inputs in zip(model.blocks, model.activations(x), strict=False):
        inner = block.edges.grid[:, 3:-3]
        low, high = inputs.reshape(-1, inputs.shape[-1]).aminmax(dim=0)
        assert torch.allclose(inner[:, 0], low)
        assert torch.allclose(inner[:, -1], high)


def test_update_grid_keeps_what_the_grid_can_hold():
    model, x = generic([2, (2, 1), 1]), samples(200, 2)
    with torch.no_grad():
        for block in model.blocks:  # one cubic on all of the grid: coefficients that are a cubic polynomial of j
            j = torch.linspace(-1, 1, 6, **DOUBLE)
            powers = torch.stack([j**n for n in range(4)])
            block.edges.spline_weight.copy_(torch.randn(*block.edges.spline_weight.shape[:2], 4, **DOUBLE) @ powers / 8)
    y = model(x)
    assert model.activations(x)[1].abs().max() < 1
    model.update_grid(x)
    assert rms_error(model(x), y) < 1e-9


def test_refine_to_a_multiple_changes_nothing():
    model, x = generic(**MIXED, grid_range=(-9, 9)), samples(50, 3)
    y = model(x)
    model.refine(12)
    assert rms_error(model(x), y) < 1e-9
    assert model.grid_size == 12
    with pytest.raises(ValueError, match="grid_size=6: must be a whole number, at least 12"):
        model.refine(6)


def test_refine_refuses_before_it_changes_any_block():
    model = KAN([2, 2, 1])
    model.blocks[1].edges.refine(8)
    with pytest.raises(ValueError, match="grid_size=5: must be a whole number, at least 8"):
        model.refine(5)
    assert model.grid_size == 3


@pytest.mark.parametrize("x", [torch.rand(0, 3), torch.full((4, 3), math.nan)], ids=["no samples", "NaN"])
def test_methods_refuse_samples_that_say_nothing_and_change_nothing(x):
    model = generic()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for method in ("update_grid", "attribute", "prune_nodes", "prune_edges", "prune_inputs", "auto_symbolic"):
        with pytest.raises(ValueError, match="^x: "):
            getattr(model, method)(x.double())
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


def test_fits_the_paper_s_example_and_lbfgs_goes_on_after_refine():
    x, fresh = samples(1000, 2), samples(1000, 2)
    truth = lambda x: torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:].square())  # noqa: E731
    model = KAN([2, 5, 1], grid_size=5, **DOUBLE)
    for _ in range(5):
        model.update_grid(x)
        coarse = train(model, x, truth(x), 60)
    error = (model(fresh) - truth(fresh)).square().mean().sqrt().item()
    assert error < 6e-3
    model.refine(10)
    assert all(p.is_contiguous() for p in model.parameters())
    assert train(model, x, truth(x), 60) < coarse / 2


# --- Attribution and pruning ------------------------------------------------------------------------------------------


@torch.no_grad()
def brute_scores(model, x):
    """The definition in section 4 of KAN 2.0, for each output by itself, then their mean."""
    levels = model.activations(x)
    nodes, edges = [], []
    for output in range(levels[-1].shape[1]):
        score = [float(n == output) for n in range(levels[-1].shape[1])]
        node_scores, edge_scores = [score], []
        for block, inputs in zip(reversed(list(model.blocks)), reversed(levels[:-1]), strict=True):
            above = [score[n] for n, arity in enumerate([1] * block.n_sum + list(block.arities)) for _ in range(arity)]
            sums = [
                [block.edge_function(o, i, inputs[:, i]) for i in range(inputs.shape[1])] for o in range(len(above))
            ]
            found = [
                [float(phi.std() * s / (sum(row).std() + 1e-4)) for phi in row]
                for row, s in zip(sums, above, strict=True)
            ]
            score = [sum(column) for column in zip(*found, strict=True)]
            node_scores.append(score)
            edge_scores.append(found)
        nodes.append(node_scores[::-1])
        edges.append(edge_scores[::-1])

    def mean(parts):
        return [torch.tensor(level, **DOUBLE).mean(0) for level in zip(*parts, strict=True)]

    return mean(nodes), mean(edges)


def test_attribution_is_the_definition(any_state):
    x = samples(50, 3)
    scores, (nodes, edges) = any_state.attribute(x), brute_scores(any_state, x)
    assert len(scores.nodes) == len(nodes)
    for got, want in zip((*scores.nodes, *scores.edges), (*nodes, *edges), strict=True):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    reshaped = any_state.attribute(x.reshape(5, 10, 3))
    assert all(torch.allclose(a, b) for a, b in zip(reshaped.edges, scores.edges, strict=True))


@pytest.mark.filterwarnings("ignore")  # pykan's own
def test_attribution_agrees_with_pykan_itself(tmp_path):
    kan = pytest.importorskip("kan", reason="pykan 0.2.8 is an optional extra, for this check alone")
    theirs = kan.KAN([2, [2, 1], 1], grid=3, k=3, seed=1, auto_save=False, ckpt_path=str(tmp_path))
    ours, x = KAN([2, (2, 1), 1]), samples(100, 2).float()
    for block, layer in zip(ours.blocks, theirs.act_fun, strict=True):
        block.edges = KANLinear.from_pykan(layer)
    assert rms_error(ours(x), theirs(x)) < 1e-5
    theirs.attribute(plot=False)
    scores = ours.attribute(x)
    for got, want in zip((*scores.nodes, *scores.edges), (*theirs.node_scores, *theirs.edge_scores), strict=True):
        assert rms_error(got, want.detach()) < 1e-4


def dead(model, level, nodes):
    """Takes what nodes of a level vary out of the model; constants stay."""
    block, above = model.blocks[level - 1], model.blocks[level]
    with torch.no_grad():
        for node in nodes:
            for edges in (above.edges.spline_weight, above.edges.base_weight):
                edges[:, node] = 0.7 if edges.ndim == 3 else 0.0  # splines sum to 1 inside the grid: a constant
            assert block.node_scale[node] != 0


def test_prune_nodes_removes_what_does_not_matter_with_its_subnodes_and_keeps_constants():
    model, x = generic([3, (3, 3), 2], mult_arity=[[], [2, 3, 4], []], grid_range=(-40, 40)), samples(100, 3)
    dead(model, 1, [1, 4])  # a sum, and the product of three
    y = model(x)
    old = list(model.parameters())
    scores = model.prune_nodes(x, 1e-4)
    assert [len(s) for s in scores] == [3, 6, 2]
    assert scores[1][[1, 4]].max() < 1e-6 < 1e-4 <= scores[1][[0, 2, 3, 5]].min()
    assert model.width == [(3, 0), (2, 2), (2, 0)]
    assert model.mult_arity == [[], [2, 4], []]
    assert model.blocks[0].edges.spline_weight.shape[:2] == (8, 3)
    assert model.blocks[1].edges.spline_weight.shape[:2] == (2, 4)
    assert rms_error(model(x), y) < 1e-10
    assert all(block.edges.mask is None for block in model.blocks)
    assert not {id(p) for p in model.parameters()} & set(map(id, old))
    assert all(p.requires_grad for p in model.parameters())
    assert train(model, x, y.detach() + 1, 5) < 1


def test_prune_nodes_leaves_a_model_alone_of_which_every_node_matters():
    model, x = generic(), samples(60, 3)
    before = dict(model.named_parameters())
    scores = model.prune_nodes(x, 1e-9)
    assert all(torch.equal(a, b) for a, b in zip(scores, model.attribute(x).nodes, strict=True))
    assert all(before[name] is p for name, p in model.named_parameters())


def test_prune_edges_masks_and_keeps_the_mean():
    model, x = with_formulas(generic()), samples(200, 3)
    scores = model.attribute(x).edges
    threshold = float(torch.cat([s.flatten() for s in scores]).quantile(0.4))
    levels = model.activations(x)
    means = [block.sums(h).mean(0) for block, h in zip(model.blocks, levels, strict=False)]
    before = [block.symbolic_mask() for block in model.blocks]
    returned = model.prune_edges(x, threshold)
    for number, block in enumerate(model.blocks):
        keep = scores[number] >= threshold
        assert torch.equal(returned[number], scores[number])
        assert 0 < keep.sum() < keep.numel()
        assert torch.equal(block.symbolic_mask(), before[number] & keep)
        assert torch.equal(block.numeric_mask(), ~before[number] & keep)
    first = model.blocks[0]
    fresh = generic().blocks[0].subnode_bias.detach()
    assert fresh.shape == first.subnode_bias.shape
    shifted = first.subnode_scale * first.sums(levels[0]) + first.subnode_bias
    assert torch.allclose(levels[1].mean(0), (first.node_scale * shifted + first.node_bias).mean(0))
    assert not torch.allclose(first.sums(levels[0]).mean(0), means[0])


def test_prune_edges_of_score_zero_change_nothing():
    model, x = generic([3, (2, 1), 2], grid_range=(-40, 40)), samples(100, 3)
    with torch.no_grad():
        edges = model.blocks[0].edges
        edges.spline_weight[1, 2], edges.base_weight[1, 2] = 3.0, 0.0  # a constant
    y = model(x)
    model.prune_edges(x, 1e-6)
    assert model.blocks[0].edges.mask[1, 2] == 0
    assert int(model.blocks[0].edges.mask.sum()) == 11
    assert rms_error(model(x), y) < 1e-10


def test_pruned_inputs_are_still_given_but_not_looked_at():
    model, x = generic([5, 3, 2], grid_range=(-40, 40)), samples(100, 5)
    with torch.no_grad():
        for edges in (model.blocks[0].edges.spline_weight, model.blocks[0].edges.base_weight):
            edges[:, [0, 3]] = 0.5 if edges.ndim == 3 else 0.0
    y = model(x)
    scores = model.prune_inputs(x)
    assert scores.shape == (5,)
    assert scores[[0, 3]].max() < 1e-6
    assert model.input_index == [1, 2, 4]
    assert model.width[0] == (3, 0)
    assert model.in_features == 5
    assert rms_error(model(x), y) < 1e-10
    x[:, [0, 3]] = math.nan
    assert rms_error(model(x), y) < 1e-10
    with torch.no_grad():
        model.blocks[0].edges.spline_weight[:, 1] = 0
        model.blocks[0].edges.base_weight[:, 1] = 0
    assert len(model.prune_inputs(x)) == 3
    assert model.input_index == [1, 4]
    assert model(x).shape == (100, 2)
    model.update_grid(x)
    with pytest.raises(ValueError, match="must be that of all inputs, 5"):
        model(x[:, :2])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("prune_nodes", "threshold=100.0: no node of level 1 would be left; the largest score is "),
        ("prune_edges", "threshold=100.0: no edge of block 0 would be left; the largest score is "),
        ("prune_inputs", "threshold=100.0: no input would be left; the largest score is "),
    ],
)
def test_pruning_everything_is_refused_and_changes_nothing(method, message):
    model, x = generic(), samples(60, 3)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(model, method)(x, 100.0)
    with pytest.raises(ValueError, match="threshold=-1.0: must be finite, 0 or more"):
        getattr(model, method)(x, -1.0)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


def test_a_pole_in_the_samples_is_no_silent_score():
    model, x = generic([1, 1]), torch.tensor([[0.0], [0.5], [1.0]], **DOUBLE)
    model.fix_symbolic(0, 0, 0, "1/x")
    with pytest.raises(ValueError, match="^x: values on level 1 of the network are not all finite"):
        model.attribute(x)


# --- Formulas ---------------------------------------------------------------------------------------------------------


def test_a_formula_takes_the_place_of_its_spline_and_gives_it_back():
    model, x = generic(**MIXED), samples(60, 3)
    y, keys = model(x), model.state_dict().keys()
    fit = model.fix_symbolic(0, 2, 1, "sin", x)
    assert isinstance(fit, Fit)
    got = model.blocks[0].edge_function(2, 1, x[:, 1])
    assert rms_error(got, fit(x[:, 1])) < 1e-12
    assert (0, 2, 1) not in model.numeric_edges()
    assert model.blocks[0].symbolic.affine.requires_grad
    model.unfix_symbolic(0, 2, 1)
    assert torch.equal(model(x), y)
    assert model.state_dict().keys() == keys
    with pytest.raises(ValueError, match="l=0, o=2, i=1: this edge is not a formula"):
        model.unfix_symbolic(0, 2, 1)


def test_a_formula_with_numbers_of_its_own():
    model, x = generic([2, 1]), samples(20, 2)
    fit = model.fix_symbolic(0, 0, 1, "exp", affine=(2.0, 0.5, -1.0, 3.0))
    assert (fit.a, fit.b, fit.c, fit.d) == (2.0, 0.5, -1.0, 3.0)
    assert math.isnan(fit.r2)
    assert rms_error(model.blocks[0].edge_function(0, 1, x[:, 1]), 3 - torch.exp(2 * x[:, 1] + 0.5)) < 1e-12
    model.fix_symbolic(0, 0, 1, "x")
    assert rms_error(model.blocks[0].edge_function(0, 1, x[:, 1]), x[:, 1]) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0, 0, "sin"), "l=2: must be a block, from 0 to 1"),
        ((0, 4, 0, "sin"), "o=4: must lie from 0 to 3"),
        ((0, 0, 3, "sin"), "i=3: must lie from 0 to 2"),
        ((0, 0, 0, "sine"), "'sine' is not in the library; did you mean"),
        ((0, 0, 0, "sin", samples(9, 3), (1, 0, 1, 0)), "affine=(1, 0, 1, 0): is fitted where x is given"),
        ((0, 1, 1, "sin", samples(9, 3)), "l=0, o=1, i=1: this edge is pruned"),
    ],
    ids=["l", "o", "i", "name", "affine", "pruned"],  # no random numbers in names: parallel workers must agree on them
)
def test_edges_that_cannot_be_formulas_are_refused(arguments, message):
    model = generic()
    scores = torch.ones(4, 3)
    scores[1, 1] = 0
    model.blocks[0].edges.prune_edges_(0.5, scores)
    keys = model.state_dict().keys()
    with pytest.raises(ValueError, match=re.escape(message)):
        model.fix_symbolic(*arguments)
    assert model.state_dict().keys() == keys
    assert len(model.numeric_edges()) == 19


def test_suggestions_are_of_the_samples_given_whatever_was_forwarded_last_as_in_pykan_508():
    model, x = generic([2, 2, 1]), samples(100, 2)
    options = {"names": ["x", "sin", "x^2"], "top": 2}
    want = model.suggest_symbolic(1, 0, 1, x, **options)
    model(samples(7, 2, scale=50.0))
    assert model.suggest_symbolic(1, 0, 1, x, **options) == want
    assert model.suggest_symbolic(1, 0, 1, 0.1 * x, **options) != want
    assert len(want) == 2
    assert want[0].score <= want[1].score


def known_model():
    """A [2, 1, 1] whose splines hold sin(pi x0) + x1^2 below and exp above, nearly; the other way round is exact."""
    model = KAN([2, 1, 1], grid_size=30, grid_range=(-1, 2), base_activation=None, **DOUBLE)
    for block, functions in zip(
        model.blocks, ([lambda x: torch.sin(torch.pi * x), torch.square], [torch.exp]), strict=True
    ):
        at = torch.linspace(-1, 2, 400, **DOUBLE)
        basis = block.edges.basis(at.unsqueeze(-1).expand(-1, len(functions)))[:, 0]
        with torch.no_grad():
            for i, function in enumerate(functions):
                block.edges.spline_weight[0, i] = torch.linalg.lstsq(basis, function(at).unsqueeze(-1)).solution[:, 0]
    return model


NAMES = ["0", "x", "x^2", "sin", "exp"]


def test_auto_symbolic_names_known_functions_and_the_rest_of_training_finds_their_numbers():
    import sympy

    model, x = known_model(), samples(300, 2, scale=0.9)
    x0, x1 = sympy.symbols("x0 x1")
    truth = sympy.exp(sympy.sin(sympy.pi * x0) + x1**2)
    fixed = model.auto_symbolic(x, names=NAMES)
    assert [(e.block, e.output, e.input, e.fit.name) for e in fixed] == [
        (0, 0, 0, "sin"),
        (0, 0, 1, "x^2"),
        (1, 0, 0, "exp"),
    ]
    assert min(edge.fit.r2 for edge in fixed) > 0.9999
    assert model.numeric_edges() == []
    with torch.no_grad():
        for block in model.blocks:
            block.symbolic.affine.mul_(1.05)
    y = torch.exp(torch.sin(torch.pi * x[:, :1]) + x[:, 1:].square())
    assert train(model, x, y, 300) < 1e-6
    assert model.formula(tolerance=1e-4) == truth
    exact = model.lambdify(x, tolerance=1e-4)
    assert exact.rmse < 1e-5
    assert rms_error(exact(x), y) < 1e-14


def test_products_are_found_in_formulas():
    import sympy

    model, x = KAN([2, (0, 1), 1], **DOUBLE), samples(200, 2)
    for edge in model.numeric_edges():
        model.fix_symbolic(*edge, "x", affine=(1.0, 0.0, float(torch.randn(())), 0.1))
    assert train(model, x, x.prod(-1, keepdim=True), 300) < 1e-7
    x0, x1 = sympy.symbols("x0 x1")
    assert sympy.expand(model.formula(tolerance=1e-5)).equals(x0 * x1) or (
        sympy.lambdify((x0, x1), model.formula() - x0 * x1)(0.3, -0.7) < 1e-6
    )


def test_edges_below_the_threshold_stay_splines_and_have_no_formula():
    model, x = known_model(), samples(300, 2, scale=0.9)
    fixed = model.auto_symbolic(x, r2_threshold=0.999, names=["x^2", "x"])
    assert [(e.block, e.output, e.input) for e in fixed] == [(0, 0, 1)]
    assert model.numeric_edges() == [(0, 0, 0), (1, 0, 0)]
    with pytest.raises(
        ValueError, match=re.escape("edges (0, 0, 0), (1, 0, 0) as (l, o, i) are splines, which have no")
    ):
        model.formula()
    with pytest.raises(ValueError, match="are splines"):
        model.lambdify(x)
    with pytest.raises(ValueError, match="r2_threshold=1.5: must be 1 at most"):
        model.auto_symbolic(x, 1.5)


def test_later_edges_are_fitted_to_what_earlier_formulas_give():
    model, x = known_model(), samples(300, 2, scale=0.9)
    with torch.no_grad():
        model.blocks[0].edges.spline_weight[0, 1] += 0.02 * torch.randn(33, **DOUBLE)
    splines = copy.deepcopy(model)
    (*_, last) = model.auto_symbolic(x, names=NAMES)
    model.unfix_symbolic(1, 0, 0)
    assert last.fit == model.fix_symbolic(1, 0, 0, "exp", x)
    assert last.fit != splines.fix_symbolic(1, 0, 0, "exp", x)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_formula_predicts_what_the_network_does_as_not_in_pykan_206_and_276(name):
    model, x = generic([3, (1, 1), 2], bias=True), samples(50, 3)
    model.prune_inputs(x, float(model.attribute(x).nodes[0].sort().values[1]))
    for edge in model.numeric_edges():
        # Arguments from 0.2 to 0.8, in every function's domain.
        model.fix_symbolic(*edge, "tanh" if edge[0] else name, affine=(0.3, 0.5, 0.2, 0.1))
    formula = model.lambdify(x)
    y = model(x)
    assert y.isfinite().all()
    assert rms_error(formula(x), y) < 1e-12
    assert formula.rmse < 1e-12
    assert formula.max_error >= formula.rmse
    assert rms_error(torch.from_numpy(formula(x.numpy())), y) < 1e-12
    assert formula(x.reshape(5, 10, 3)).shape == (5, 10, 2)
    assert len(formula.inputs) == 3
    assert len(model.formula()) == 2
    assert model.lambdify().rmse is None


def test_formula_of_a_deep_network_takes_no_hours():
    # sympy asks of nested functions whether they are real, and finds no end where inputs are not known to be.
    model, x = generic([3, (1, 2), (0, 1), 2], mult_arity=[[], [2, 3], [2], []]), samples(50, 3)
    for edge in model.numeric_edges():
        model.fix_symbolic(*edge, "tanh" if edge[0] else "1/x", affine=(0.3, 0.5, 0.2, 0.1))
    formula = model.lambdify(x)
    assert formula.max_error < 1e-12
    assert not any(symbol.is_real for symbol in formula.inputs)  # as sympy.Symbol("x0") is not
    assert formula.expressions[0].free_symbols == set(formula.inputs)


def test_formula_in_float32_matches_to_float32():
    model, x = with_formulas(KAN([2, (2, 1), 1]), 1), samples(50, 2).float()
    formula = model.lambdify(x)
    assert formula(x).dtype == torch.float32
    assert formula.max_error < 1e-5


def test_formula_tells_what_rounding_costs_and_is_differentiable():
    model, x = with_formulas(generic([2, 2, 1]), 1), samples(50, 2).requires_grad_()
    errors = [model.lambdify(x, digits=digits).rmse for digits in (1, 3, 6)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    rough = model.lambdify(x, digits=3)
    assert rough.rmse == pytest.approx((rough(x) - model(x)).square().mean().sqrt().item())
    (ours,) = torch.autograd.grad(model.lambdify()(x).sum(), x)
    (theirs,) = torch.autograd.grad(model(x).sum(), x)
    assert rms_error(ours, theirs) < 1e-12
    assert torch.allclose(model.lambdify(simplify=True)(x), model(x))


def test_formula_takes_names_and_symbols():
    import sympy

    model = KAN([2, 1], **DOUBLE)
    model.fix_symbolic(0, 0, 0, "x^2")
    model.fix_symbolic(0, 0, 1, "sin", affine=(2.0, 0.0, 0.25, 0.0))
    assert str(model.formula()) == "x0**2 + 0.25*sin(2*x1)"
    assert str(model.formula(["mass", "t"])) == "mass**2 + 0.25*sin(2*t)"
    t = sympy.Symbol("t", positive=True)
    assert model.formula(["x", t]).has(t)
    for wrong in (["x"], ["x", "x"], ["x", 3]):
        with pytest.raises(ValueError, match="must be 2 different names or sympy symbols"):
            model.formula(wrong)
    with pytest.raises(ValueError, match="digits=0: must be"):
        model.formula(digits=0)
    with pytest.raises(ValueError, match="its last dimension must be 2"):
        model.lambdify()(torch.rand(4, 3))


def test_functions_added_by_users_are_in_formulas(monkeypatch):
    import sympy

    monkeypatch.setattr("archzoo.models.symbolic.FUNCTIONS", FUNCTIONS)
    known = dict(FUNCTIONS)
    try:
        add_function("test_sinc", torch.sinc, sympy.Function("test_sinc"), 3)
        add_function("test_relu", torch.relu, lambda u: sympy.Max(u, 0), 3)
        add_function("test_zeta", torch.exp, sympy.zeta, 3)
        model, x = generic([2, 2, 1]), samples(50, 2)
        for number, edge in enumerate(model.numeric_edges()):
            model.fix_symbolic(*edge, ("test_sinc", "test_relu")[number % 2], affine=(0.7, 0.2, -0.5, 0.1))
        assert model.lambdify(x).max_error < 1e-12
        model.fix_symbolic(0, 0, 0, "test_zeta")
        assert "zeta" in str(model.formula())
        with pytest.raises(ValueError, match="expressions: there is zeta, of which no torch function is known"):
            model.lambdify(x)
    finally:
        for name in FUNCTIONS.keys() - known.keys():
            del FUNCTIONS[name]


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_network_of_formulas_takes_no_call_per_edge_as_in_pykan_432():
    counts = []
    for width in ([2, 2, 1], [6, 8, 4]):
        model = KAN(width)
        for number, edge in enumerate(model.numeric_edges()):
            model.fix_symbolic(*edge, ("sin", "exp")[number % 2])
        with CountOps() as ops, torch.no_grad():
            model(torch.rand(5, width[0]))
        counts.append(ops.count)
    assert counts[0] == counts[1]


def test_symbolic_branch_is_absent_while_it_is_empty():
    model = KAN([2, 2, 1])
    assert count_parameters(model) == 6 * 7 + 2 * 2 * 3
    assert not any("symbolic" in name for name in model.state_dict())


# --- The trainer's model ----------------------------------------------------------------------------------------------


def build(input_shape=(3,), output_size=2, layer="kan", options=None, **model):
    return models.create("kan", LayerFactory(layer, options), input_shape, output_size, **model)


def test_trainer_s_model_has_the_layer_s_options_and_flattens():
    model = build(options={"grid_size": 8, "bias": False}, width=4, depth=2, mult=1, mult_arity=3, affine=True)
    assert model.width == [(3, 0), (4, 1), (4, 1), (2, 0)]
    assert model.mult_arity == [[], [3], [3], []]
    assert model.grid_size == 8
    assert model.blocks[0].edges.bias is None
    assert build().blocks[0].edges.bias is not None
    assert build().grid_size == 5
    assert build(regularize=0.5).regularize == 0.5
    assert build(widths=(3, 6)).width == [(3, 0), (3, 0), (6, 0), (2, 0)]
    assert build((1, 2, 3))(torch.rand(5, 1, 2, 3)).shape == (5, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "linear"}, "layer='linear': model 'kan' is made of layer 'kan' alone; choose layer=kan"),
        ({"width": 0}, "width=0: must be a whole number, at least 1"),
        ({"depth": -1}, "depth=-1: must be"),
        ({"mult": -1}, "mult=-1: must be"),
        ({"mult_arity": 1}, "mult_arity=1: must be"),
    ],
    ids=str,
)
def test_trainer_s_model_refuses_by_name(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**arguments)


def test_widths_can_be_matched_on_meta():
    def count(widths):
        with torch.device("meta"):
            return count_parameters(build(widths=widths))

    match = match_widths(count, 2, 5000, 0.02)
    assert abs(match.deviation) <= 0.02
    with torch.device("meta"):
        assert count_flops(build(widths=match.widths), torch.zeros(1, 3)) > 2 * 4000
