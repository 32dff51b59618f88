"""Measured wiring of a nervous system as data: `Connectome`, its statistics, growth and null models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from archzoo.kernels._numpy import np
from archzoo.layers import _connectome_files as files
from archzoo.layers import _connectome_growth as growth
from archzoo.layers import _connectome_nulls as nulls
from archzoo.layers._check import check_whole
from archzoo.layers._spectrum import spectral_radius

POOLS = ("sensory", "internal", "output")


@dataclass(frozen=True, eq=False)
class Connectome:
    """Neurons in three pools and signed synapse counts between them; rows of the matrix W are presynaptic.

    Frozen CPU tensors, which nothing here writes to. Neurons are numbered sensory first, then internal, then output.
    Made by `load`, `load_celegans`, `generate` and `from_dense`; the other methods return new ones.

    >>> wiring = Connectome.from_dense([[0, 2, 0], [0, 0, -1], [0, 0, 0]], num_sensory=1, num_output=1)
    >>> wiring.num_neurons, wiring.num_edges, wiring.pool_sizes
    (3, 2, (1, 1, 1))

    Attributes:
        pre: Presynaptic neuron of each edge (E,), int64. Edges are unique and sorted by (post, pre).
        post: Postsynaptic neuron of each edge (E,), int64.
        weight: Signed numbers of synapses (E,), float64, finite, none of them 0.
        pool: 0 sensory, 1 internal, 2 output (N,), int64, not decreasing; no pool is empty.
        neuron_id: Of the neuron in the published data (N,), int64; -1 for one that `expand` added.
        cell_type: Of each neuron, N texts.
        source: Where the wiring comes from and what was done to it, in words; for records.

    Raises:
        ValueError: If any of this does not hold; names the attribute.
    """

    pre: Tensor
    post: Tensor
    weight: Tensor
    pool: Tensor
    neuron_id: Tensor
    cell_type: tuple[str, ...]
    source: str = field(default="given")

    def __post_init__(self) -> None:
        files.check(self.pre, self.post, self.weight, self.pool, self.neuron_id, self.cell_type)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        edges: str = "ad",
        signs: str | PathLike[str] | None = None,
        modality: str | Sequence[str] = "all",
        output: Sequence[str] = ("DN-SEZ", "RGN"),
    ) -> Connectome:
        """The brain of a Drosophila larva (Winding et al., Science 379, eadd9330) from `larva_connectome.npz`.

        Args:
            path: The npz file, with `neuron_id`, `cell_type`, `annotation` and, for each kind of edge, `ad_pre`,
                `ad_post`, `ad_count`, ….
            edges: Kind of synapses: `"ad"` (axon to dendrite), `"aa"`, `"da"`, `"dd"`, or `"all"`: the sum of them.
            signs: npz file with `neuron_id` and `sign` (1 or -1) of every neuron: its edges' sign. None: all positive.
            modality: Which sensory neurons are the sensory pool: `"all"`, or one or several of visual, olfactory, gut,
                respiratory, gustatory-external, gustatory-pharyngeal, thermo-warm, thermo-cold. The others join the
                internal pool, where they stay silent.
            output: Cell types that are the output pool.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a file is cut short, corrupted or of other contents, an option is unknown, or a pool is
                empty.
        """
        return cls(**files.load_larva(path, edges=edges, signs=signs, modality=modality, output=output))

    @classmethod
    def load_celegans(cls, path: str | PathLike[str]) -> Connectome:
        """The chemical synapses of the worm C. elegans from `celegans_connectome.npz` (Varshney et al. 2011).

        Neurons with GABA are inhibitory. Sensory: 86 neurons; output: the 113 motor neurons that are not sensory.

        Args:
            path: The npz file, with `transmitter`, `is_sensory`, `is_motor`, `chem_pre`, `chem_post`, `chem_count`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is cut short, corrupted or of other contents.
        """
        return cls(**files.load_celegans(path))

    @classmethod
    def generate(cls, *, seed: int = 0) -> Connectome:
        """A made-up brain with the published statistics of the larva's, where that file is not at hand.

        Numbers of neurons, edges, synapses and excitatory edges by pools are those of the larval brain; who is
        connected is drawn from a block model whose neurons have log-normal propensities. `source` says so.

        Args:
            seed: Of all random numbers.
        """
        return cls(**growth.generate(seed))

    @classmethod
    def from_dense(cls, weight: Any, num_sensory: int, num_output: int) -> Connectome:
        """A wiring of one's own.

        Args:
            weight: W (N, N), array or tensor, rows presynaptic; neurons in the order sensory, internal, output.
            num_sensory: The first neurons.
            num_output: The last ones.

        Raises:
            ValueError: If W is not square, holds NaN or infinity, or the pools are empty or do not fit.
        """
        check_whole(num_sensory=num_sensory, num_output=num_output)
        array = weight.detach().cpu().numpy() if isinstance(weight, Tensor) else np.asarray(weight)
        if array.ndim != 2 or array.shape[0] != array.shape[1]:
            raise ValueError(f"weight of shape {array.shape}: must be (N, N), rows presynaptic")
        total = len(array)
        if num_sensory + num_output > total:
            raise ValueError(
                f"num_sensory={num_sensory}, num_output={num_output}: must leave 0 or more internal neurons of {total}"
            )
        post, pre = np.nonzero(array.T)
        pool = np.ones(total, np.int64)
        pool[:num_sensory], pool[total - num_output :] = 0, 2
        return cls(
            **files.tensors(pre, post, array[pre, post].astype(np.float64), pool, np.arange(total)),
            cell_type=tuple(POOLS[p] for p in pool),
            source="a given matrix",
        )

    @property
    def num_neurons(self) -> int:
        """N."""
        return len(self.pool)

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self.pre)

    @property
    def pool_sizes(self) -> tuple[int, int, int]:
        """Numbers of sensory, internal and output neurons."""
        sensory, internal, output = np.bincount(self.pool.numpy(), minlength=3).tolist()
        return sensory, internal, output

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """W (N, N), rows presynaptic."""
        matrix = torch.zeros(self.num_neurons, self.num_neurons, dtype=dtype, device="cpu")
        matrix[self.pre, self.post] = self.weight.to(dtype)
        return matrix

    def block_stats(self) -> dict[str, Tensor]:
        """Sums by pools, from (rows) to (columns), (3, 3) float64 each.

        Returns:
            `edges`; `synapses`, the sum of |weight|; `positive`, the share of positive edges, 0 where there are none.
        """
        return {key: torch.from_numpy(table) for key, table in growth.block_tables(self).items()}

    def spectral_radius(self) -> float:
        """The largest magnitude of an eigenvalue of W, by Arnoldi's method; the same on every call.

        Relative error 1e-3 or less, and nearly always 1e-6. Remembered.
        """
        return self._spectral_radius

    @functools.cached_property
    def _spectral_radius(self) -> float:
        return spectral_radius(self.pre.numpy(), self.post.numpy(), self.weight.numpy(), self.num_neurons)

    def expand(
        self,
        factor: int,
        *,
        seed: int = 0,
        preserve: str = "strength",
        weights: str = "poisson",
        dale: bool = False,
    ) -> Connectome:
        """Grows every pool by the degree-corrected block model that fits this wiring, which stays as it is inside.

        New neurons take the strengths of a random neuron of their pool and follow the old ones of it.

        Args:
            factor: F, a whole number; the result has F times the neurons. 1: a copy.
            seed: Of all random numbers.
            preserve: `"strength"`: a neuron keeps its number of synapses, and the spectral radius about stays.
                `"density"`: a pair keeps its rate, as in the paper, so that strengths grow by F and synapses by F².
            weights: `"poisson"`: single synapses are drawn and merged, so that many edges have one.
                `"empirical"`: edges are drawn, with as many synapses as a random edge of their block.
            dale: Whether the edges of a neuron have one sign, its source's; else each edge draws its own, as its block.

        Raises:
            ValueError: If an option is unknown or the factor is no whole number, 1 or more.
        """
        check_whole(factor=factor)
        files.check_choice(preserve=(preserve, growth.PRESERVE), weights=(weights, growth.WEIGHTS))
        if factor == 1:
            return self._changed((self.pre.numpy(), self.post.numpy(), self.weight.numpy()), self.source)
        return Connectome(**growth.expand(self, factor, seed, preserve, weights, dale))

    def shuffle(self, kind: str, *, seed: int = 0) -> Connectome:
        """A null model: pools, the number of edges and their magnitudes stay.

        Args:
            kind: `"weights"`: magnitudes are permuted over edges. `"signs"`: signs are permuted among the neurons that
                have output. `"degree"`: edges exchange targets until they are mixed, so that each neuron keeps its
                numbers of inputs and outputs. `"erdos_renyi"`: random pairs, with the signed weights of the old edges.
            seed: Of all random numbers.

        Raises:
            ValueError: If there is no such kind.
        """
        files.check_choice(kind=(kind, nulls.KINDS))
        source = f"{self.source}; null model {kind}, seed {seed}"
        return self._changed(nulls.shuffled(self, kind, seed), source)

    def ablate(self, pools: Sequence[str] = (), cell_types: Sequence[str] = ()) -> Connectome:
        """The wiring without the edges of some neurons, which stay, in their places, as silent ones.

        Args:
            pools: Pools that lose all their edges, among sensory, internal and output.
            cell_types: Cell types that do.

        Raises:
            ValueError: If a name is unknown.
        """
        known = sorted(set(self.cell_type))
        files.check_names("pools", pools, POOLS)
        files.check_names("cell_types", cell_types, known)
        out = np.isin(np.array(self.cell_type), list(cell_types))
        out |= np.isin(self.pool.numpy(), [POOLS.index(name) for name in pools])
        stay = ~(out[self.pre.numpy()] | out[self.post.numpy()])
        names = ", ".join([*pools, *cell_types]) or "nothing"
        pre, post, weight = (tensor.numpy()[stay] for tensor in (self.pre, self.post, self.weight))
        return self._changed((pre, post, weight), f"{self.source}; without the edges of {names}")

    def summary(self) -> dict[str, Any]:
        """What a record should say of it: plain numbers and texts."""
        weight = self.weight
        sensory, internal, output = self.pool_sizes
        return {
            "source": self.source,
            "neurons": self.num_neurons,
            "sensory": sensory,
            "internal": internal,
            "output": output,
            "edges": self.num_edges,
            "synapses": float(weight.abs().sum()),
            "positive_edges": int((weight > 0).sum()),
            "density": self.num_edges / self.num_neurons**2,
            "spectral_radius": self.spectral_radius(),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Connectome:
        """Itself: nothing in it changes."""
        return self

    def __repr__(self) -> str:
        sizes = " + ".join(map(str, self.pool_sizes))
        return f"Connectome({sizes} neurons, {self.num_edges} edges, source={self.source!r})"

    def _changed(self, edges: files.Edges, source: str) -> Connectome:
        """The same neurons with other edges."""
        parts = files.tensors(*edges, self.pool.numpy(), self.neuron_id.numpy())
        return Connectome(**parts, cell_type=self.cell_type, source=source)
