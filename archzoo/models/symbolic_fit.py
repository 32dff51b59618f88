"""Fits c f(a x + b) + d to samples of an edge's function (section 2.5 of https://arxiv.org/abs/2404.19756)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.layers._kan import _check_whole
from archzoo.models.symbolic_functions import FUNCTIONS, Affine, Function, _function

_SAMPLES = 128  # that a scan looks at
_STARTS = 8  # peaks of a scan that Gauss-Newton climbs
_MARGIN = 3e-7  # of the argument, to the ends of the domain: rounding a, b and x to float32 must not leave it
_FLAT = 1e-8  # var f / mean f^2 below which c f + d loses more than 4 digits to cancellation: no fit
_HUGE = 1e8  # most that f may be larger or smaller than y, in a canonical form


@dataclass(frozen=True)
class Fit:
    """The best c f(a x + b) + d that was found for samples."""

    name: str
    a: float
    b: float
    c: float
    d: float
    r2: float
    """R^2: the part of the variance of y that it explains; -inf if f was finite nowhere."""
    complexity: int
    score: float
    """weight complexity + (1 - weight) log2(1 + 1e-5 - R^2): the lower the better."""

    def __call__(self, x: Tensor) -> Tensor:
        """The fitted function of x, of any shape."""
        return self.c * FUNCTIONS[self.name].torch(self.a * x + self.b) + self.d


def fit_function(
    name: str,
    x: Tensor,
    y: Tensor,
    *,
    a_range: tuple[float, float] = (-10.0, 10.0),
    b_range: tuple[float, float] = (-10.0, 10.0),
    grid: int = 101,
    zooms: int = 3,
    weight: float = 0.2,
) -> Fit:
    """The best fit c f(a x + b) + d of one function to samples, in float64.

    R^2 is scanned over a grid of (a, b), with the best c and d for each; then on finer grids about the best; from
    there, and from the other peaks of the scan, Gauss-Newton steps with Levenberg-Marquardt damping move all four
    (asked for in pykan#513). The scans look at 128 of the samples at most, the last steps at all.

    A fit has no pole between the samples, and is finite on each, with a margin of 3e-7 of the argument: it stays so in
    float32. Numbers that say the same function twice are
    brought to one form: a = 1 or -1 in powers, b = 0 in exp, a > 0 and |b| <= pi / 2 in sin and cos.

    Args:
        name: Of the function, a key of `FUNCTIONS`.
        x: (N,), N at least 5, finite.
        y: (N,). If it is constant, c = 0, d is the constant, and R^2 = 1.
        a_range: Slopes that the first scan covers. Samples narrower than 2 are stretched to this width for the scan;
            fast sines of samples that span more than 40 need a finer `grid`, or a range that is near.
        b_range: Offsets that it covers, where x is in the middle of the samples' range.
        grid: Points along each of the two.
        zooms: How many finer grids follow.
        weight: Of the complexity, from 0 to 1, in the score.

    Raises:
        ValueError: If the name is not known, x and y do not belong together, or an option is out of range.
    """
    function = _function(name)
    x, y = _checked_samples(x, y)
    _check_whole(3, grid=grid)
    _check_whole(0, zooms=zooms)
    for argument, (low, high) in (("a_range", a_range), ("b_range", b_range)):
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"{argument}={(low, high)}: must be finite and increasing, as (-10.0, 10.0)")
    _check_weight(weight)
    with torch.inference_mode(False), torch.no_grad():
        numbers, r2 = _fit(function, x.clone(), y.clone(), a_range, b_range, grid, zooms)
    return Fit(name, *numbers, r2, function.complexity, _score(function.complexity, r2, weight))


def suggest_functions(
    x: Tensor,
    y: Tensor,
    names: Sequence[str] | None = None,
    weight: float = 0.2,
    top: int | None = None,
    **options: Any,
) -> list[Fit]:
    """The library's fits to samples, best first: ranked by weight complexity + (1 - weight) log2(1 + 1e-5 - R^2).

    Scores that agree to 1e-3 are ordered by what else makes a function simple: fewer free numbers, then smaller b and
    d (so a sine is "sin" rather than a shifted "cos"). And a good fit (R^2 > 0.99) by a function that is no more
    complex and has fewer free numbers goes before another that does not halve 1 - R^2 with each additional one: on
    samples of a spline, not of the function it learned, a cosine always fits a parabola a little better than x^2.

    Args:
        x: (N,), N at least 5, finite.
        y: (N,).
        names: Which functions to try; None for the whole library.
        weight: Of the complexity, from 0 to 1. With pykan's 0.8 a clear sine is ranked below "0" (pykan#415).
        top: How many to return; None for all.
        options: Of `fit_function`.

    Raises:
        ValueError: As `fit_function`.
    """
    names = list(FUNCTIONS) if names is None else list(names)
    for name in names:
        _function(name, "names")
    if top is not None:
        _check_whole(1, top=top)
    pool = [fit_function(name, x, y, weight=weight, **options) for name in names]
    pool.sort(key=lambda fit: (round(fit.score, 3), FUNCTIONS[fit.name].freedom, round(abs(fit.b) + abs(fit.d), 6)))
    ranked: list[Fit] = []
    while pool:
        best = pool[0]
        for fit in pool[1:]:
            if _simpler(fit, best):
                best = fit
        ranked.append(best)
        pool.remove(best)
    return ranked[:top]


def _simpler(fit: Fit, best: Fit) -> bool:
    spared = FUNCTIONS[best.name].freedom - FUNCTIONS[fit.name].freedom
    bound = min(2.0**spared * (1 - best.r2), 1e-2)
    return spared > 0 and fit.complexity <= best.complexity and 1 - fit.r2 <= bound


def _score(complexity: int, r2: float, weight: float) -> float:
    return weight * complexity + (1 - weight) * math.log2(1 + 1e-5 - r2) if r2 > -math.inf else math.inf


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight}: must lie from 0 (R^2 alone counts) to 1 (complexity alone)")


def _checked_samples(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """In float64 on the CPU; a constant y exactly so."""
    if x.ndim != 1 or x.shape != y.shape or len(x) < 5:
        raise ValueError(
            f"x, y: shapes {tuple(x.shape)} and {tuple(y.shape)}; they must be (N,) alike, N at least 5 for 4 numbers"
        )
    rounding = 4 * torch.finfo(y.dtype).eps if y.is_floating_point() else 0.0
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    for name, values in (("x", x), ("y", y)):
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{name}: {int((~values.isfinite()).sum())} of {len(x)} samples are not finite; all must be"
            )
    if float((y - y.mean()).abs().max()) <= rounding * float(y.abs().max()):
        y = torch.full_like(y, float(y.mean()))
    return x, y


def _fit(
    function: Function,
    x: Tensor,
    y: Tensor,
    a_range: tuple[float, float],
    b_range: tuple[float, float],
    grid: int,
    zooms: int,
) -> tuple[Affine, float]:
    low, high = x.aminmax()
    half, constant = float(high - low) / 2, bool(y.min() == y.max())
    if constant or half == 0:
        inside = _inside(function.domain)
        finite = bool(function.torch(torch.full((1,), inside, dtype=x.dtype)).isfinite())
        return (0.0, inside, 0.0, float(y.mean())), float(constant) if finite else -math.inf
    if function.solve is not None:
        a, b = function.solve(x, y)
    else:
        middle, unit = float(low + high) / 2, min(half, 1.0)
        t = (x - middle) / unit
        ab = _search(function, t, y, a_range, b_range, grid, zooms)
        if ab is None:
            return (1.0, 0.0, 0.0, float(y.mean())), -math.inf
        a = float(ab[0]) / unit
        b = float(ab[1]) - a * middle
    best = _solved(function, x, y, a, b)
    if function.canonical is None or a == 0:
        return best
    (a, b, c, d), r2 = best
    try:
        form = function.canonical(a, b, c, d)
    except OverflowError:  # of exp
        return best
    same = _solved(function, x, y, *form[:2])
    # A form that is harder to compute with, as e^1000 exp(-10 x) near x = 100, is no gain.
    size = float(y.std())
    easy = c == 0 or 1 / _HUGE <= abs(same[0][2]) / size <= _HUGE
    return same if easy and same[1] >= r2 - 1e-12 else best


def _inside(domain: tuple[float, float]) -> float:
    low, high = domain
    if math.isfinite(high - low):
        return (low + high) / 2
    return low + 1 if math.isfinite(low) else high - 1 if math.isfinite(high) else 0.0


def _solved(function: Function, x: Tensor, y: Tensor, a: float, b: float) -> tuple[Affine, float]:
    """With the best c and d for a and b, and its R^2."""
    everywhere = replace(function, domain=(-math.inf, math.inf))  # rounding may have eaten the margin
    point = _Point(everywhere, x, y, torch.tensor([[a, b]], dtype=x.dtype), flat=0.0)
    c = float(point.c[0])
    total = float((y - y.mean()).square().sum())
    return (a, b, c, float(y.mean() - c * point.mean[0])), 1 - float(point.error[0]) / total


def _search(
    function: Function,
    t: Tensor,
    y: Tensor,
    a_range: tuple[float, float],
    b_range: tuple[float, float],
    grid: int,
    zooms: int,
) -> Tensor | None:
    """Best (a, b) for samples of which t spans [-T, T]; None if no pair that was scanned gave a finite function."""
    t_few, y_few = t, y
    if len(t) > _SAMPLES:
        few = t.argsort()[torch.linspace(0, len(t) - 1, _SAMPLES).round().long()]  # with both ends
        t_few, y_few = t[few], y[few]
    width, (low, high) = float(t.abs().max()), function.domain
    if math.isfinite(high - low):
        a_range = _overlap(a_range, (low - high) / (2 * width), (high - low) / (2 * width))
        b_range = _overlap(b_range, low, high)
    around = torch.linspace(-1, 1, grid, dtype=t.dtype)
    a, b = (torch.linspace(*ends, grid, dtype=t.dtype) for ends in (a_range, b_range))
    r2 = _scan(function, t_few, y_few, a, b)
    peaks = torch.where(F.max_pool2d(r2[None], 3, 1, 1)[0] == r2, r2, -math.inf).flatten()
    top = peaks.topk(min(_STARTS, len(peaks))).indices
    top = top[peaks[top] > -math.inf]
    if len(top) == 0:
        return None
    starts = [torch.stack([a[top // grid], b[top % grid]], 1)]
    for _ in range(zooms):
        row, column = divmod(int(r2.argmax()), grid)
        a, b = a[row] + (a[1] - a[0]) * around, b[column] + (b[1] - b[0]) * around
        r2 = _scan(function, t_few, y_few, a, b)
    row, column = divmod(int(r2.argmax()), grid)
    starts.append(torch.stack([a[row], b[column]])[None])
    # What often is the truth, and no scan hits: the domain begins, or ends, with the samples.
    if math.isfinite(high - low):
        slope = (1 - 4 * _MARGIN) * (high - low) / (2 * width)
        starts.append(torch.tensor([[slope, (low + high) / 2], [-slope, (low + high) / 2]], dtype=t.dtype))
    elif math.isfinite(low) or math.isfinite(high):
        reach = (1 + 4 * _MARGIN) * width
        edge = low + reach if math.isfinite(low) else high - reach
        starts.append(torch.tensor([[1.0, edge], [-1.0, edge]], dtype=t.dtype))
    point = _descend(_Point(function, t_few, y_few, torch.cat(starts)))
    if len(t) > _SAMPLES:
        order = point.error.argsort()[:3]
        point = _descend(_Point(function, t, y, point.ab[order]))
    best = int(point.error.argmin())
    return point.ab[best] if math.isfinite(float(point.error[best])) else None


def _overlap(ends: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    both = max(ends[0], low), min(ends[1], high)
    return both if both[0] < both[1] else ends


def _allowed(function: Function, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Whether a t + b stays in the domain, with a margin, from the least to the greatest t."""
    first, last = (a * end + b for end in t.aminmax())
    margin = _MARGIN * torch.maximum(first.abs(), last.abs())
    low, high = function.domain
    return (torch.minimum(first, last) - margin >= low) & (torch.maximum(first, last) + margin <= high)


def _scan(function: Function, t: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """R^2 (A, B) of c f(a t + b) + d with the best c and d; -inf where f is not finite on all t, or may not be."""
    y = y - y.mean()
    total = y.square().mean()
    pairs = torch.cartesian_prod(a, b)
    r2 = pairs.new_full((len(pairs),), -math.inf)
    chosen = _allowed(function, pairs[:, 0], pairs[:, 1], t).nonzero().flatten()
    for index in chosen.split(2**16 // len(t)):  # tensors of 512 KiB stay in cache
        slope, offset = pairs[index].unbind(1)
        f = function.torch(torch.addcmul(offset[:, None], slope[:, None], t))
        mean, square, cross = f.mean(1), torch.linalg.vecdot(f, f) / len(t), f @ y / len(t)
        variance = square - mean.square()
        explained = torch.where(variance > _FLAT * square, cross.square() / (variance * total), 0)
        r2[index] = torch.where(square.isfinite(), explained, -math.inf)
    return r2.view(len(a), len(b))


class _Point:
    """Where a descent is, for S pairs (a, b) at once: f, its derivative, the best c, and the squared error."""

    def __init__(self, function: Function, t: Tensor, y: Tensor, ab: Tensor, flat: float = _FLAT):
        self.function, self.t, self.y, self.ab = function, t, y, ab
        with torch.enable_grad():
            u = torch.addcmul(ab[:, 1:], ab[:, :1], t).requires_grad_()
            f = function.torch(u)
            slope = torch.zeros_like(u)
            if f.requires_grad:
                (slope,) = torch.autograd.grad(f.sum(), u, materialize_grads=True)
        f = f.detach()
        self.mean, square = f.mean(1), f.square().sum(1)
        self.f = f - self.mean[:, None]
        self.variance = self.f.square().sum(1)
        good = self.variance > flat * square
        target = y - y.mean()
        self.c = torch.where(good, self.f @ target / self.variance, 0)
        self.residual = target - self.c[:, None] * self.f
        error = self.residual.square().sum(1)
        fits = error.isfinite() & _allowed(function, ab[:, 0], ab[:, 1], t)
        self.error = torch.where(good, error, target.square().sum()).where(fits, math.inf)
        self.slope = slope.where(slope.isfinite() & fits[:, None], 0)

    def step(self, damping: Tensor) -> Tensor:
        """Damped Gauss-Newton step (S, 2) of a and b: that of all four numbers, c and d eliminated."""
        gradient = (self.c[:, None] * self.slope)[:, None]
        jacobian = torch.cat([gradient * self.t, gradient], 1)  # (S, 2, N)
        jacobian = jacobian - jacobian.mean(2, keepdim=True)
        along = jacobian @ self.f[:, :, None] / self.variance.clamp(min=1e-300)[:, None, None]
        jacobian = jacobian - along * self.f[:, None]
        (aa, ab), (_, bb) = (row.unbind(1) for row in (jacobian @ jacobian.mT).unbind(1))
        ra, rb = (jacobian @ self.residual[:, :, None]).squeeze(2).unbind(1)
        aa, bb = aa * (1 + damping), bb * (1 + damping)
        determinant = aa * bb - ab * ab
        step = torch.stack([bb * ra - ab * rb, aa * rb - ab * ra], 1) / determinant[:, None]
        return step.where(step.isfinite(), 0)

    def choose(self, other: "_Point", better: Tensor) -> None:
        for name in ("ab", "mean", "f", "variance", "c", "residual", "error", "slope"):
            old = getattr(self, name)
            setattr(self, name, torch.where(better.view(-1, *[1] * (old.ndim - 1)), getattr(other, name), old))


def _descend(point: _Point, steps: int = 60) -> _Point:
    damping = torch.full_like(point.error, 1e-3)
    floor = 1e-28 * (point.y - point.y.mean()).square().sum()
    for _ in range(steps):
        trial = _Point(point.function, point.t, point.y, point.ab + point.step(damping))
        better = trial.error < point.error
        gain = torch.where(better, point.error - trial.error, 0)
        done = (point.error <= floor) | (better & (gain <= 1e-9 * point.error)) | (damping > 1e10)
        point.choose(trial, better)
        damping = torch.where(better, damping / 10, damping * 5).clamp(min=1e-12)
        if bool(done.all()):
            break
    return point
