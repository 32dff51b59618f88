"""KANs in every state that a test wants to see one in."""

import itertools

import torch

from archzoo.models.kan import KAN

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
