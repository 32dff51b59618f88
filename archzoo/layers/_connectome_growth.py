"""Growth of a connectome, and one out of nothing: the directed, signed, degree-corrected block model.

Blocks are the pools. With strengths a_i (output) and b_j (input synapses), a pair of neurons has Poisson(a_i b_j w_gh)
synapses, w_gh = m_gh / (sum of a in g x sum of b in h) for m_gh synapses from pool g to pool h. Pairs are never walked:
a block's total is drawn, and then the ends of each synapse, which is the same law.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from archzoo.kernels._numpy import np
from archzoo.layers._connectome_files import Edges, joined, tensors

if TYPE_CHECKING:
    from archzoo.layers._connectome import Connectome

PRESERVE = ("strength", "density")
WEIGHTS = ("poisson", "empirical")

# Of the larval brain (Winding et al. 2023), axon to dendrite with predicted signs, by pools: sensory, internal, output.
_NEURONS = (430, 2304, 218)
_EDGES = ((0, 2970, 853), (0, 55574, 2841), (0, 998, 309))
_SYNAPSES = ((0, 23230, 3169), (0, 196197, 8468), (0, 3114, 780))
_EXCITATORY = (0.99, 0.60, 0.64)  # share of neurons
_SPREAD = 1.0  # standard deviation of the logarithm of a neuron's propensity to give or take synapses


def block_tables(wiring: Connectome) -> dict[str, np.ndarray]:
    """Edges, synapses and the share of positive edges, from pool to pool."""
    weight, pool = wiring.weight.numpy(), wiring.pool.numpy()
    block = 3 * pool[wiring.pre.numpy()] + pool[wiring.post.numpy()]
    edges, synapses, positive = (
        np.bincount(block, weights=values, minlength=9).reshape(3, 3)
        for values in (np.ones(len(weight)), np.abs(weight), (weight > 0).astype(np.float64))
    )
    return {"edges": edges, "synapses": synapses, "positive": positive / np.maximum(edges, 1)}


def _draw(random: np.random.Generator, neurons: np.ndarray, strength: np.ndarray, count: int) -> np.ndarray:
    """So many of the neurons, each as often as its strength says."""
    bounds = np.cumsum(strength[neurons])
    at = np.searchsorted(bounds, np.sort(random.random(count)) * bounds[-1], side="right")
    drawn: np.ndarray = neurons[np.minimum(at, len(neurons) - 1)]
    return random.permutation(drawn)


def expand(core: Connectome, factor: int, seed: int, preserve: str, weights: str, dale: bool) -> dict[str, Any]:
    """The arguments of the grown connectome; see `Connectome.expand`."""
    random = np.random.default_rng(seed)
    pre, post, weight = (t.numpy() for t in (core.pre, core.post, core.weight))
    total, pool = core.num_neurons, core.pool.numpy()
    source = np.concatenate([_copies(random, pool, which, factor) for which in range(3)])
    new = np.concatenate([np.arange(factor * n) >= n for n in core.pool_sizes])
    grown_pool = np.repeat(np.arange(3), [factor * n for n in core.pool_sizes])
    a = np.bincount(pre, weights=np.abs(weight), minlength=total)
    b = np.bincount(post, weights=np.abs(weight), minlength=total)
    tables = block_tables(core)
    sums_a, sums_b = (np.bincount(pool, weights=strength, minlength=3) for strength in (a, b))
    sign = np.where(np.bincount(pre, weights=weight, minlength=total) < 0, -1.0, 1.0)[source]
    a, b = a[source], b[source]
    if b.sum():
        b = b * (a.sum() / b.sum())
    place = np.flatnonzero(~new)
    parts = [(place[pre], place[post], weight)]
    for g in range(3):
        for h in range(3):
            if not tables["synapses"][g, h]:
                continue
            rate = tables["synapses"][g, h] / (sums_a[g] * sums_b[h]) / (factor if preserve == "strength" else 1)
            givers, takers = np.flatnonzero(grown_pool == g), np.flatnonzero(grown_pool == h)
            mean = a[givers].sum() * b[takers].sum() * rate
            block = (pool[pre] == g) & (pool[post] == h)
            sizes = np.abs(weight[block]) if weights == "empirical" else np.ones(1)
            count = int(random.poisson(mean / sizes.mean()))
            u, v = _draw(random, givers, a, count), _draw(random, takers, b, count)
            synapses = random.choice(sizes, count) if weights == "empirical" else np.ones(count)
            fresh = new[u] | new[v]  # the core is as it was measured
            u, v, size = _merge(u[fresh], v[fresh], synapses[fresh], len(source))
            polarity = sign[u] if dale else np.where(random.random(len(u)) < tables["positive"][g, h], 1.0, -1.0)
            parts.append((u, v, polarity * size))
    ids = np.where(new, -1, core.neuron_id.numpy()[source])
    names = np.array(core.cell_type, dtype=object)[source]
    options = f"preserve={preserve}, weights={weights}" + (", dale" if dale else "")
    return {
        **tensors(*joined(parts), grown_pool, ids),
        "cell_type": tuple(names.tolist()),
        "source": f"{core.source}; grown {factor} times ({options}, seed {seed})",
    }


def _copies(random: np.random.Generator, pool: np.ndarray, which: int, factor: int) -> np.ndarray:
    """The neurons of a pool, and those that the new ones behind them resemble."""
    own = np.flatnonzero(pool == which)
    return np.concatenate([own, random.choice(own, (factor - 1) * len(own))]) if len(own) else own


def _merge(u: np.ndarray, v: np.ndarray, size: np.ndarray, total: int) -> Edges:
    """Synapses of one pair as one edge."""
    keys = v * total + u
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    sums = np.add.reduceat(size[order], first) if len(first) else size[:0]
    return keys[first] % total, keys[first] // total, sums


def generate(seed: int) -> dict[str, Any]:
    """The arguments of a made-up larval brain; see `Connectome.generate`."""
    random = np.random.default_rng(seed)
    total, pool = sum(_NEURONS), np.repeat(np.arange(3), _NEURONS)
    gives, takes = (np.exp(_SPREAD * random.standard_normal(total)) for _ in range(2))
    positive = np.concatenate(
        [random.permutation(n) < round(share * n) for n, share in zip(_NEURONS, _EXCITATORY, strict=True)]
    )
    parts = list[Edges]()
    for g in range(3):
        for h in range(3):
            edges = _EDGES[g][h]
            if edges:
                u, v = _pairs(random, np.flatnonzero(pool == g), np.flatnonzero(pool == h), gives, takes, edges)
                extra = random.multinomial(_SYNAPSES[g][h] - edges, random.dirichlet(np.ones(edges)))
                parts.append((u, v, np.where(positive[u], 1.0, -1.0) * (1 + extra)))
    return {
        **tensors(*joined(parts), pool, np.full(total, -1)),
        "cell_type": tuple(np.array(["sensory", "internal", "output"])[pool].tolist()),
        "source": f"generated from the published statistics of the larval Drosophila brain, seed {seed}; not measured",
    }


def _pairs(
    random: np.random.Generator,
    givers: np.ndarray,
    takers: np.ndarray,
    gives: np.ndarray,
    takes: np.ndarray,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """So many distinct pairs, drawn one after the other by propensity."""
    total, keys = len(gives), np.empty(0, np.int64)
    while len(keys) < count:
        u, v = _draw(random, givers, gives, 2 * count), _draw(random, takers, takes, 2 * count)
        drawn = np.concatenate([keys, v * total + u])
        first = np.sort(np.unique(drawn, return_index=True)[1])
        keys = drawn[first]
    keys = keys[:count]
    return keys % total, keys // total
