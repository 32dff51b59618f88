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

_LEAST_SAMPLES = 5
_SAMPLES = 250  # of an edge's function, that functions are fitted to
_GOOD = 1e-2  # error of splines, in standard deviations, at which a structure may be the right one
_STRUCTURES = 2**17  # sets of edges that are looked through
_PRICE = 0.1  # what a unit of complexity, a free number or a spline costs: decades of the error
_TRIED = 3  # models of splines in which functions are searched

Masks = tuple[tuple[tuple[int, ...], ...], ...]
"""What the edges are: of each block, of each subnode, of each input, 0 for none, or one of the following."""
_SPLINE, _LINE = 1, 2


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


Edge = tuple[int, int, int]


class _State(NamedTuple):
    model: KAN
    error: float  # in standard deviations of the targets
    fixed: tuple[FixedEdge, ...]
    clear: dict[Edge, float]  # score of the best function on each spline, as it was when it was last looked at

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

    1. Structures: sets of edges so that each subnode has one and each node is used, those with the fewest splines
       first. Two functions in a row, with nothing added between, are first tried as a straight line and one function.
       In each structure, splines are trained by `fit_least_squares` from several random starts.
    2. Functions: on the edge that is clearest, each of the likeliest functions is tried, and all else is trained
       anew, splines and formulas; the best models are kept, and go on to the next edge.

    Models are compared by the error that is left, and by the complexity of their functions. It ends when the error is
    below the tolerance, or when nothing is left to be tried. For some inputs and a dozen edges; seconds to minutes.
    Noise is allowed for, but it takes the most time, as nothing says then that the formula is found. Random numbers are
    those of torch's global generator. It works in float64, whatever the model is in.

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
    if len(x) < _LEAST_SAMPLES:
        raise ValueError(f"x: {len(x)} samples; at least {_LEAST_SAMPLES} are needed")
    x, y = x.double(), y.double()
    unit = float(y.var(0).mean().sqrt())
    if not 0 < unit < math.inf:
        raise ValueError("y: the targets must be finite, and not all the same")
    plain = copy.deepcopy(model).double()
    for level, block in enumerate(plain.blocks):
        for o, i in block.symbolic_mask().nonzero().tolist():
            plain.unfix_symbolic(level, o, i)
    search = _Search(x, y, unit, list(names), candidates, trials, tolerance)
    splines = _SplineModels(plain, x, y, unit, starts, _structures(plain, structures))
    ends: list[tuple[_State, float]] = []
    for beam in beams:
        for start in splines:
            ends.append((search.run(start, beam), start.error))
            if search.is_over():
                break
        if search.is_over():
            break
    if not ends:
        raise ValueError("x, y: no structure could be trained on these samples; are they finite?")
    best, spline_error = min(ends, key=lambda end: (len(end[0].model.numeric_edges()), end[0].score()))
    model.load_state_dict(best.model.state_dict())
    return Recovery(list(best.fixed), best.error * unit, spline_error * unit, splines.trained, search.trials)


# --- Structures -------------------------------------------------------------------------------------------------------


class _SplineModels:
    """Models of splines that may be made formulas: iterates over the best, of the fewest splines first; trains lazily.

    In each group of structures that have equally many splines: of the best structure the model with the straightest
    splines and the one with the least error, for the same function can be spread over its edges in several ways; and
    one of another structure. Models that are not good are left out; if all are, the best come at the end.
    """

    def __init__(self, model: KAN, x: Tensor, y: Tensor, unit: float, starts: int, structures: list[Masks]):
        self.model, self.x, self.y, self.unit, self.starts = model, x, y, unit, starts
        self.trained = 0
        self._left = [list(group) for _, group in itertools.groupby(structures, key=_splines_in)]
        self._done: list[_State] = []

    def __iter__(self) -> Iterator[_State]:
        yield from self._done
        bad: list[_State] = []
        while self._left:
            best = self._best(self._left.pop(0))
            good = [state for state in best if state.error < _GOOD]
            bad += best
            self._done += good
            yield from good
        if not self._done:
            self._done = sorted(bad, key=_State.score)[:_TRIED]
            yield from self._done

    def _best(self, group: list[Masks]) -> list[_State]:
        self.trained += len(group)
        found: dict[Masks, list[_State]] = {masks: [] for masks in group}
        for _ in range(self.starts):  # each once, then each again: mostly there is one that fits, and some start does
            for masks in group:
                found[masks] += self._start(masks)
            if any(state.error < _GOOD for states in found.values() for state in states):
                break
        ranked = sorted(
            ((min(s, key=_State.score), masks) for masks, s in found.items() if s), key=lambda r: r[0].score()
        )
        if not ranked:
            return []
        masks = ranked[0][1]
        for _ in range(self.starts):
            found[masks] += self._start(masks)
        closest = min(found[masks], key=_State.score)
        near = [state for state in found[masks] if state.error < max(_GOOD, closest.error)]
        plainest = min(near or [closest], key=self._bend)
        chosen = [plainest] if plainest is closest else [plainest, closest]
        return [*chosen, *(state for state, _ in ranked[1:2])]

    def _bend(self, state: _State) -> float:
        """How much of the splines' variance is no straight line, summed over them."""
        levels, total = state.model.activations(self.x), 0.0
        for level, o, i in state.model.numeric_edges():
            z = levels[level][:, i]
            both = torch.stack([z, state.model.blocks[level].edge_function(o, i, z)])
            total += 1 - float(both.corrcoef()[0, 1].square().nan_to_num(1.0))  # a constant is a line
        return total

    def _start(self, masks: Masks) -> list[_State]:
        """Splines on some of the edges, trained from a random start; empty if they are not finite."""
        trial = copy.deepcopy(self.model)
        trial.reset_parameters()
        _start_straight(trial, self.x)
        fixed = []
        for level, (block, mask) in enumerate(zip(trial.blocks, masks, strict=True)):
            for o, i in (torch.tensor(mask) == _LINE).nonzero().tolist():
                fixed.append(FixedEdge(level, o, i, trial.fix_symbolic(level, o, i, "x")))
            block.edges.prune_edges_(0.5, (torch.tensor(mask) == _SPLINE).to(block.edges.spline_weight))
        try:
            fit_least_squares(trial, self.x, self.y, 20, grid_every=4)
            error = fit_least_squares(trial, self.x, self.y, 20, tolerance=1e-3) / self.unit
        except ValueError:
            return []
        return [_State(trial, error, tuple(fixed), {})]


def _start_straight(model: KAN, x: Tensor) -> None:
    """Makes every spline nearly a straight line, a random one, over the range of its inputs.

    Where a node can be bent and what follows can be bent back, as at a product of positive factors, training stays near
    where it began; and of formulas, the straight ones are the easiest to see.
    """
    x = model.activations(x)[0]
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
    """The `most` structures of fewest splines, in random order where they have equally many."""
    possible = [edges for block in model.blocks for edges in block.numeric_mask().sum(1).tolist()]
    count = math.prod(2**edges - 1 for edges in possible)
    if count > _STRUCTURES:
        raise ValueError(
            f"model: has {sum(possible)} edges, of which {count:.1g} sets could be chosen, more than {_STRUCTURES}; "
            "take fewer nodes, or prune edges first"
        )
    every = list(itertools.product(*(_block_structures(block) for block in model.blocks)))
    every = [every[at] for at in torch.randperm(len(every)).tolist()]
    chains = {masks: _chains(model, masks) for masks in every}
    fewest = sorted(every, key=lambda masks: _splines_in(masks) - len(chains[masks]))[:most]
    return sorted((lines for masks in fewest for lines in _with_lines(masks, chains[masks])), key=_splines_in)[:most]


def _splines_in(masks: Masks) -> int:
    """How many edges are splines."""
    return sum(entry == _SPLINE for block in masks for row in block for entry in row)


def _chains(model: KAN, masks: Masks) -> list[Edge]:
    """Edges that are the only one into a sum with but one edge out of it: two functions in a row, where one may do."""
    found = []
    for level, (block, above) in enumerate(itertools.pairwise(masks)):
        for node in range(model.blocks[level].n_sum):
            inputs = [i for i, entry in enumerate(block[node]) if entry]
            if len(inputs) == 1 and sum(row[node] for row in above) == 1:
                found.append((level, node, inputs[0]))
    return found


def _with_lines(masks: Masks, chains: list[Edge]) -> Iterator[Masks]:
    """The same structure with straight lines in place of splines on some of the edges in `chains`, or none."""
    for kinds in itertools.product((_LINE, _SPLINE), repeat=len(chains)):
        entries = [[list(row) for row in block] for block in masks]
        for (level, o, i), kind in zip(chains, kinds, strict=True):
            entries[level][o][i] = kind
        yield tuple(tuple(map(tuple, block)) for block in entries)


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
        self.solved = False

    def is_over(self) -> bool:
        """Whether the formula is found, or there have been enough trials."""
        return self.solved or self.trials >= self.most

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
            model = copy.deepcopy(state.model)
            error = fit_least_squares(model, self.x, self.y, 100) / self.unit
            ends.append(state._replace(model=model, error=error))
            if not model.numeric_edges() and error < self.tolerance:
                self.solved = True
                break
        return min(ends, key=_State.score)

    def _tried(self, state: _State, edges: int) -> Iterator[_State]:
        """Models with one formula more, on one of the clearest edges."""
        numeric, clear = state.model.numeric_edges(), dict(state.clear)
        fits = {edge: self._fits(state.model, edge) for edge in numeric if edge not in clear}
        clear |= {edge: ranked[0].score for edge, ranked in fits.items()}
        for edge in sorted(numeric, key=lambda edge: (clear[edge], edge))[:edges]:
            level, o, i = edge
            for place, fit in enumerate(fits.get(edge) or self._fits(state.model, edge)):
                if fit.r2 == -math.inf or not (place < self.candidates or fit.name == "x"):
                    continue
                trial = copy.deepcopy(state.model)
                trial.blocks[level].fix_edge(o, i, fit)
                self.trials += 1
                try:
                    error = fit_least_squares(trial, self.x, self.y, 25, tolerance=1e-2) / self.unit
                except ValueError:  # not finite
                    continue
                yield _State(trial, error, (*state.fixed, FixedEdge(level, o, i, fit)), clear)

    def _fits(self, model: KAN, edge: Edge) -> list[Fit]:
        level, o, i = edge
        z = model.activations(self.x)[level][:, i].sort().values
        z = z[:: max(1, len(z) // _SAMPLES)]
        return suggest_functions(z, model.blocks[level].edge_function(o, i, z), names=self.names, grid=41, zooms=1)
