"""Null models: wirings that share some statistics with a measured one, and are random otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archzoo.kernels._numpy import np
from archzoo.layers._connectome_files import Edges

if TYPE_CHECKING:
    from archzoo.layers._connectome import Connectome

KINDS = ("weights", "signs", "degree", "erdos_renyi")
_ROUNDS = 10  # in which every edge is offered another's target


def shuffled(wiring: Connectome, kind: str, seed: int) -> Edges:
    """Presynaptic and postsynaptic neurons and weights of a null model; see `Connectome.shuffle`."""
    random = np.random.default_rng(seed)
    pre, post, weight = (t.numpy() for t in (wiring.pre, wiring.post, wiring.weight))
    total = wiring.num_neurons
    if kind == "weights":
        return pre, post, np.sign(weight) * random.permutation(np.abs(weight))
    if kind == "signs":
        return pre, post, weight * _flips(random, pre, weight, total)[pre]
    if kind == "degree":
        return pre, _exchanged(random, pre, post, total), weight
    keys = random.choice(total * total, len(pre), replace=False)
    return keys // total, keys % total, random.permutation(weight)


def _flips(random: np.random.Generator, pre: np.ndarray, weight: np.ndarray, total: int) -> np.ndarray:
    """-1 for each neuron whose sign changes. A neuron with edges of both signs has that of their sum."""
    sign = np.where(np.bincount(pre, weights=weight, minlength=total) < 0, -1.0, 1.0)
    speaks = np.unique(pre)
    after = sign.copy()
    after[speaks] = random.permutation(sign[speaks])
    return after * sign


def _exchanged(random: np.random.Generator, pre: np.ndarray, post: np.ndarray, total: int) -> np.ndarray:
    """Targets of the edges after pairs of edges have exchanged theirs, where that made no edge that there is already.

    All degrees stay, and so many rounds leave next to no edge where it was, unless the graph is dense.
    """
    post, half = post.copy(), len(pre) // 2
    for _ in range(_ROUNDS):
        order = random.permutation(len(pre))
        one, other = order[:half], order[half : 2 * half]
        proposed = np.concatenate([pre[one] * total + post[other], pre[other] * total + post[one]])
        _, inverse, count = np.unique(proposed, return_inverse=True, return_counts=True)
        good = (count[inverse] == 1) & ~np.isin(proposed, pre * total + post)
        accepted = good[:half] & good[half:]
        one, other = one[accepted], other[accepted]
        post[one], post[other] = post[other], post[one]
    return post
