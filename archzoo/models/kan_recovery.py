"""From data to a closed formula: a search over sparse structures of a `KAN`, and over functions for its edges."""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from archzoo.layers._kan import _check_finite, _check_whole
from archzoo.models.kan import KAN
from archzoo.models.kan_block import KANBlock
from archzoo.models.kan_fit import checked_samples, fit_least_squares
from archzoo.models.kan_symbolic import FixedEdge
from archzoo.models.symbolic import FUNCTIONS, Fit, suggest_functions
from archzoo.models.symbolic_functions import _function

NAMES = (
    "x",
    "x^2",
    "x^3",
    "1/x",
    "1/x^2",
    "sqrt",
    "1/sqrt",
    "exp",
    "log",
    "sin",
    "tanh",
    "arcsin",
    "arctan",
    "arctanh",
)
"""Functions that `recover_formula` tries. A cosine is a shifted sine, and rounding shows it as a cosine."""

_SAMPLES = 250  # of an edge's function, that functions are fitted to
_GOOD = 1e-2  # error of splines, in standard deviations, at which a structure may be the right one
_STRUCTURES = 2**17  # sets of edges that are looked through
_LEAST_R2 = 0.8  # of a function that is tried
_PRICE = 0.1  # what a unit of complexity, a free number or a spline costs: decades of the error
_TRIED = 2  # structures in which functions are searched

Masks = tuple[tuple[tuple[int, ...], ...], ...]
"""Which edges there are: of each block, of each subnode, of each input 0 or 1."""


class Recovery(NamedTuple):
    """What `recover_formula` found."""

    edges: list[FixedEdge]
    """Which functions are on which edges, with the numbers that they began with; those trained are in the model. All
    other edges are pruned, but for `model.numeric_edges()`."""
    rmse: float
    """Root mean square error on the samples."""
    spline_rmse: float
    """That of the splines of the same structure, before any formula."""
    structures: int
    """How many structures were trained."""
    trials: int
    """How many functions were tried on an edge, each with all else trained anew."""


class _State(NamedTuple):
    model: KAN
    error: float
    fixed: tuple[FixedEdge, ...]

    def score(self) -> float:
        """Decades of the error, and the price of the formula: the lower the better."""
        functions = [FUNCTIONS[edge.fit.name] for edge in self.fixed]
        price = sum(f.complexity + f.freedom for f in functions) + len(self.model.numeric_edges())
        return math.log10(max(self.error, 1e-7)) + _PRICE * price


def check_options(
    names: Sequence[str],
    structures: int,
    starts: int,
    candidates: int,
    beams: Sequence[int],
    trials: int,
    tolerance: float,
) -> None:
    """A ValueError if an option of `recover_formula` is out of range."""
    for name, count in (("structures", structures), ("starts", starts), ("candidates", candidates), ("trials", trials)):
        _check_whole(1, **{name: count})
    if not beams:
        raise ValueError("beams=(): must be numbers of models, as (1, 4)")
    for beam in beams:
        _check_whole(1, beams=beam)
    _check_finite(tolerance=tolerance)
    for name in names:
        _function(name, "names")
    if not names:
        raise ValueError("names=(): there must be a function to try")


@torch.no_grad()
def recover_formula(
    model: KAN,
    x: Tensor,
    y: Tensor,
    names: Sequence[str] = NAMES,
    *,
    structures: int = 24,
    starts: int = 6,
    candidates: int = 4,
    beams: Sequence[int] = (1, 4),
    trials: int = 200,
    tolerance: float = 1e-5,
) -> Recovery:
    """Looks for a closed formula of the data that fits into a KAN's nodes. Changes the model in place into it.

    `auto_symbolic` asks of each edge alone which function it looks like. Where several functions look alike, or where
    one edge can be wrong and another make up for it, that goes astray (pykan#89, #480). Here the splines only propose:

    1. Structures: sets of edges so that each subnode has one and each node is used, those with the fewest edges first.
       In each, splines are trained by `fit_least_squares` from several random starts.
    2. Functions: on the edge that is clearest, each of the likeliest functions is tried, and all else is trained
       anew, splines and formulas; the best models are kept, and go on to the next edge.

    Models are compared by the error that is left, and by the complexity of their functions. It ends when the error is
    below the tolerance, or when nothing is left to be tried. For some inputs, a dozen edges and data with little noise;
    random numbers are those of torch's global generator. It works in float64.

    Args:
        model: Its nodes are kept, its splines are trained anew, its pruned edges stay pruned, its formulas go.
        x: (N, inputs).
        y: (N, outputs).
        names: Of the functions to try, of `archzoo.models.symbolic.FUNCTIONS`.
        structures: How many structures are trained at most.
        starts: How often each of them, until one is good.
        candidates: How many functions are tried on an edge, besides "x", which always is.
        beams: How many models are kept at a time: a first, quick search, and others if that has failed.
        trials: After how many trials no further level of edges is begun; the edges that are left stay splines.
        tolerance: Root mean square error, in standard deviations of the targets, at which a formula is found.

    Returns:
        What was found; also if it is not good: judge it by its `rmse`, and by `model.numeric_edges()`.

    Raises:
        ValueError: If an argument is out of range, or no structure could be trained. Nothing is changed then.
    """
    check_options(names, structures, starts, candidates, beams, trials, tolerance)
    checked_samples(x, y)
    x, y = x.double(), y.double()
    unit = float(y.var(0).mean().sqrt())
    if not 0 < unit < math.inf:
        raise ValueError("y: the targets must be finite, and not all the same")
    plain = copy.deepcopy(model).double()
    for l, block in enumerate(plain.blocks):  # noqa: E741
        for o, i in block.symbolic_mask().nonzero().tolist():
            plain.unfix_symbolic(l, o, i)
    found, trained = _best_structures(plain, x, y, unit, structures, starts)
    if not found:
        raise ValueError("x, y: no structure could be trained on these samples; are they finite?")
    search = _Search(x, y, unit, list(names), candidates, trials, tolerance)
    ends: list[tuple[_State, float]] = []
    for beam, start in itertools.product(beams, found[:_TRIED]):
        ends.append((search.run(start, beam), start.error))
        if search.is_solved(ends[-1][0]) or search.is_over():
            break
    best, splines = min(ends, key=lambda end: (len(end[0].model.numeric_edges()), end[0].score()))
    model.load_state_dict(best.model.state_dict())
    return Recovery(list(best.fixed), best.error * unit, splines * unit, trained, search.trials)


# --- Structures -------------------------------------------------------------------------------------------------------


def _best_structures(model: KAN, x: Tensor, y: Tensor, unit: float, most: int, starts: int) -> tuple[list[_State], int]:
    """Models of splines, best first: of the fewest edges that fit well, else of all that were tried."""
    found: list[_State] = []
    tried, edges = 0, 0
    for masks in _structures(model, most):
        count = _edges(masks)
        if count > edges and any(state.error < _GOOD for state in found):
            break
        edges, tried = count, tried + 1
        trained = list(_trained(model, masks, x, y, unit, starts))
        if trained:
            found.append(min(trained, key=_State.score))
    return sorted(found, key=_State.score), tried


def _trained(model: KAN, masks: Masks, x: Tensor, y: Tensor, unit: float, starts: int) -> Iterator[_State]:
    for _ in range(starts):
        trial = copy.deepcopy(model)
        trial.reset_parameters()
        _start_straight(trial, x)
        for block, mask in zip(trial.blocks, masks, strict=True):
            block.edges.prune_edges_(0.5, torch.tensor(mask).to(block.edges.spline_weight))
        try:
            fit_least_squares(trial, x, y, 20, grid_every=4)
            error = fit_least_squares(trial, x, y, 20, tolerance=1e-3) / unit
        except ValueError:  # not finite
            continue
        yield _State(trial, error, ())
        if error < _GOOD:
            break


def _start_straight(model: KAN, x: Tensor) -> None:
    """Makes every spline nearly a straight line, a random one, over the range of its inputs.

    Where a node can be bent and what follows can be bent back, as at a product of positive factors, training stays near
    where it began; and of formulas, the straight ones are the easiest to see.
    """
    for block in model.blocks:
        edges = block.edges
        edges.update_grid(x)
        order = edges.spline_order
        # A spline whose coefficients are a line in the means of `order` knots is that line.
        places = edges.grid[:, 1:-1].unfold(1, order, 1).mean(-1) if order else edges.grid.unfold(1, 2, 1).mean(-1)
        low, high = x.aminmax(dim=0)
        t = (2 * places - (low + high)[:, None]) / (high - low).clamp(min=1e-6)[:, None]
        weight = edges.spline_weight
        slope, offset = torch.rand_like(weight[..., :1]) + 0.5, torch.randn_like(weight[..., :1]) / 2
        sign = 2 * torch.randint_like(slope, 2) - 1
        weight.copy_(sign * slope * t + offset + 0.05 * torch.randn_like(weight))
        if edges.spline_scaler is not None:
            edges.spline_scaler.fill_(1.0)
        if edges.base_weight is not None:
            edges.base_weight.zero_()
        x = block(x)


def _structures(model: KAN, most: int) -> list[Masks]:
    """The `most` structures of fewest edges, in random order where they have equally many."""
    possible = [edges for block in model.blocks for edges in block.numeric_mask().sum(1).tolist()]
    count = math.prod(2**edges - 1 for edges in possible)
    if count > _STRUCTURES:
        raise ValueError(
            f"model: has {sum(possible)} edges, of which {count:.1g} sets could be chosen, more than {_STRUCTURES}; "
            "take fewer nodes, or prune edges first"
        )
    every = list(itertools.product(*(_block_structures(block) for block in model.blocks)))
    order = torch.randperm(len(every)).tolist()
    return sorted((every[at] for at in order), key=_edges)[:most]


def _edges(masks: Masks) -> int:
    return sum(map(sum, itertools.chain(*masks)))


def _block_structures(block: KANBlock) -> list[tuple[tuple[int, ...], ...]]:
    """Masks of a block's edges; of those that differ by the order of a product's factors, one."""
    rows = [
        [row for row in itertools.product(*((0, 1) if may else (0,) for may in mask)) if any(row)]
        for mask in block.numeric_mask().tolist()
    ]
    used = block.numeric_mask().any(0).tolist()
    found: dict[object, tuple[tuple[int, ...], ...]] = {}
    for masks in itertools.product(*rows):
        if [any(column) for column in zip(*masks, strict=True)] == used:
            row = iter(masks)
            same = tuple(tuple(sorted(itertools.islice(row, arity))) for arity in block.arity.tolist())
            found.setdefault(same, masks)
    return list(found.values())


# --- Functions --------------------------------------------------------------------------------------------------------


class _Search:
    """The search for functions, in structures that are given, and how many trials it has taken."""

    def __init__(
        self, x: Tensor, y: Tensor, unit: float, names: list[str], candidates: int, most: int, tolerance: float
    ):
        self.x, self.y, self.unit, self.names = x, y, unit, names
        self.candidates, self.most, self.tolerance, self.trials = candidates, most, tolerance, 0

    def is_solved(self, state: _State) -> bool:
        return not state.model.numeric_edges() and state.error < self.tolerance

    def is_over(self) -> bool:
        return self.trials >= self.most

    def run(self, start: _State, beam: int) -> _State:
        """The best model with formulas on all edges, or on as many as could be."""
        states = [start]
        while states[0].model.numeric_edges() and not self.is_over():
            following = [trial for state in states for trial in self._tried(state, 1 if beam == 1 else 2)]
            if not following:
                break
            states = []
            for state in sorted(following, key=_State.score):
                # The same by another way has the same error.
                if len(states) < beam and all(abs(state.error / other.error - 1) > 1e-3 for other in states):
                    states.append(state)
        ends = []
        for state in states:
            ends.append(state._replace(error=fit_least_squares(state.model, self.x, self.y, 100) / self.unit))
            if self.is_solved(ends[-1]):
                break
        return min(ends, key=_State.score)

    def _tried(self, state: _State, edges: int) -> Iterator[_State]:
        """Models with one formula more."""
        for l, o, i, fit in self._proposals(state.model, edges):  # noqa: E741
            trial = copy.deepcopy(state.model)
            trial.blocks[l].fix_edge(o, i, fit)
            self.trials += 1
            try:
                error = fit_least_squares(trial, self.x, self.y, 25, tolerance=1e-2) / self.unit
            except ValueError:  # not finite
                continue
            yield _State(trial, error, (*state.fixed, FixedEdge(l, o, i, fit)))

    def _proposals(self, model: KAN, edges: int) -> Iterator[tuple[int, int, int, Fit]]:
        """Functions for the edges that are clearest."""
        levels = model.activations(self.x)
        found: list[tuple[float, tuple[int, int, int], list[Fit]]] = []
        for l, o, i in model.numeric_edges():  # noqa: E741
            z = levels[l][:, i].sort().values
            z = z[:: max(1, len(z) // _SAMPLES)]
            fits = suggest_functions(z, model.blocks[l].edge_function(o, i, z), names=self.names, grid=41, zooms=1)
            found.append((fits[0].score, (l, o, i), fits))
        found.sort(key=lambda entry: entry[:2])
        for _, edge, fits in found[:edges]:
            for place, fit in enumerate(fits):
                if fit.r2 > _LEAST_R2 and (place < self.candidates or fit.name == "x"):
                    yield (*edge, fit)
