"""Where labels go in a picture, so that none covers another or a point. All lengths are in px."""

from collections.abc import Sequence
from itertools import combinations


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least `gap` apart in [low, high], in the same order, as near as can be to the given ones.

    Isotonic regression of `position - i * gap`. If they cannot all fit, they are spaced evenly.
    """
    count = len(positions)
    if count > 1 and gap * (count - 1) > high - low:
        gap = (high - low) / (count - 1)
    order = sorted(range(count), key=lambda i: positions[i])
    blocks: list[list[float]] = []  # [mean, members]
    for place, i in enumerate(order):
        blocks.append([positions[i] - place * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, members = blocks.pop()
            before = blocks[-1]
            before[0] = (before[0] * before[1] + mean * members) / (before[1] + members)
            before[1] += members
    flat = [min(max(mean, low), high - (count - 1) * gap) for mean, members in blocks for _ in range(int(members))]
    out = [0.0] * count
    for place, i in enumerate(order):
        out[i] = flat[place] + place * gap
    return out


Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in px."""
Segment = tuple[float, float, float, float]
"""From x, y to x, y, in px."""


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bars: Sequence[Box],
    walls: Sequence[Box],
    bounds: Sequence[float],
) -> list[tuple[float, float]] | None:
    """Lower left corners of labels beside their points.

    No label covers another, a point, or a wall or (if that can be had) a bar. None if there is no such placement.
    """
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for avoid_bars in (True, False):
        for order in (
            sorted(range(len(points)), key=lambda i: -points[i][1]),
            sorted(range(len(points)), key=lambda i: points[i][0]),
            sorted(range(len(points)), key=lambda i: -sizes[i][0]),
        ):
            obstacles = [*marks, *walls, *(bars if avoid_bars else ())]
            placed: list[Box] = []
            leaders: list[Segment] = []
            spots: dict[int, tuple[float, float]] = {}
            for i in order:
                spot = _spot(points[i], sizes[i], obstacles, placed, leaders, bounds)
                if spot is None:
                    break
                spots[i] = spot
                x, y = spot
                placed.append((x - 2, y, x + sizes[i][0] + 2, y + sizes[i][1]))
                leaders.append(leader_line(points[i], spot, sizes[i]))
            if len(spots) == len(points):
                return [spots[i] for i in range(len(points))]
    return None


# To the right and up in units of the radius, and the part of the label that lies left of there.
_DIRECTIONS = (
    *((1.0, 0.0, 0.0), (-1.0, 0.0, 1.0), (0.0, 1.0, 0.5), (0.0, -1.0, 0.5)),
    *((0.7, 0.7, 0.0), (0.7, -0.7, 0.0), (-0.7, 0.7, 1.0), (-0.7, -0.7, 1.0)),
    *((0.0, 1.0, 0.1), (0.0, 1.0, 0.9), (0.0, -1.0, 0.1), (0.0, -1.0, 0.9)),
)


def _spot(
    point: tuple[float, float],
    size: tuple[float, float],
    obstacles: Sequence[Box],
    placed: Sequence[Box],
    leaders: Sequence[Segment],
    bounds: Sequence[float],
) -> tuple[float, float] | None:
    """The nearest free place of a label; no label that is placed, nor its leader, crosses it or its own leader."""
    (x, y), (width, height) = point, size
    for radius in (7.0, 12.0, 18.0, 26.0, 36.0):
        for right, up, anchor in _DIRECTIONS:
            left, low = x + right * radius - anchor * width, y + up * radius - height * (1 - up) / 2
            box = (left, low, left + width, low + height)
            inside = box[0] >= bounds[0] + 2 and box[1] >= bounds[1] + 2 and box[2] <= bounds[2] - 2
            if not inside or box[3] > bounds[3] - 2 or any(_overlap(box, other) for other in (*obstacles, *placed)):
                continue
            leader = leader_line(point, (left, low), size)
            if not any(_crosses(leader, other) for other in placed) and not any(
                _crosses(other, box) for other in leaders
            ):
                return left, low
    return None


def leader_line(point: tuple[float, float], spot: tuple[float, float], size: tuple[float, float]) -> Segment:
    """The line from a point to the nearest place of its label."""
    (x, y), (left, low), (width, height) = point, spot, size
    return (x, y, min(max(x, left), left + width), min(max(y, low), low + height))


def _crosses(segment: Segment, box: Box) -> bool:
    """Whether a line meets a box (Liang and Barsky)."""
    x0, y0, x1, y1 = segment
    enter, leave = 0.0, 1.0
    for start, change, low, high in ((x0, x1 - x0, box[0], box[2]), (y0, y1 - y0, box[1], box[3])):
        if not change:
            if not low < start < high:
                return False
            continue
        first, second = sorted(((low - start) / change, (high - start) / change))
        enter, leave = max(enter, first), min(leave, second)
    return enter < leave


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def around(a: Sequence[float], b: Sequence[float]) -> Box:
    """A box about an upright or level line, in px."""
    return (
        float(min(a[0], b[0])) - 2,
        float(min(a[1], b[1])) - 2,
        float(max(a[0], b[0])) + 2,
        float(max(a[1], b[1])) + 2,
    )


def side_by_side(
    points: Sequence[tuple[float, float]], heights: Sequence[tuple[float, ...]], bounds: Sequence[float]
) -> list[tuple[float, float]]:
    """Points moved sideways, a little, if the bars of any two (from, to, in px) would cover each other."""
    gap = min(8.0, 24.0 / max(1, len(points) - 1))  # so little that it does not look like a difference in cost
    spans = [(x, min(y, *ends) - 5, max(y, *ends) + 5) for (x, y), ends in zip(points, heights, strict=True)]
    if not any(abs(a[0] - b[0]) < 2 and a[1] < b[2] and b[1] < a[2] for a, b in combinations(spans, 2)):
        return list(points)
    xs = spread([x for x, _ in points], gap, bounds[0] + 8, bounds[2] - 8)
    return [(x, y) for x, (_, y) in zip(xs, points, strict=True)]
