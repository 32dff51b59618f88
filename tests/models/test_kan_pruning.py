"""The KAN model's scores, and what pruning by them leaves."""

import math
import re

import pytest
import torch

from archzoo.layers.kan import KANLinear
from archzoo.models.kan import KAN
from tests.helpers import rms_error
from tests.models.kan_networks import DOUBLE, generic, samples, train, with_formulas


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
