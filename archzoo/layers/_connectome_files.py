"""Connectome files: what they must hold, and what is made of them. Each fault is said before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from archzoo.kernels._numpy import np
from archzoo.names import suggest

EDGES = ("ad", "aa", "da", "dd")
MODALITIES = (
    "visual",
    "olfactory",
    "gut",
    "respiratory",
    "gustatory-external",
    "gustatory-pharyngeal",
    "thermo-warm",
    "thermo-cold",
)


Edges: TypeAlias = "tuple[np.ndarray, np.ndarray, np.ndarray]"
"""Presynaptic and postsynaptic neurons, and weights or numbers of synapses."""


def joined(parts: Sequence[Edges]) -> Edges:
    """Several lists of edges, one behind the other."""
    pre, post, weight = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return pre, post, weight


def check_choice(**values: tuple[str, Sequence[str]]) -> None:
    """A ValueError that names the first value that is not among its choices."""
    for name, (value, choices) in values.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r}: {suggest(str(value), choices)}")


def check_names(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    """A ValueError that names the first of several names that is unknown."""
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}={list(names)}: there is no {name!r}; {suggest(str(name), list(known))}")


def check(
    pre: Tensor, post: Tensor, weight: Tensor, pool: Tensor, neuron_id: Tensor, cell_type: tuple[str, ...]
) -> None:
    """A ValueError unless these are a connectome's; see `Connectome`."""
    total = len(pool) if pool.dim() else 0
    for name, tensor, dtype, length in (
        ("pre", pre, torch.int64, None),
        ("post", post, torch.int64, None),
        ("weight", weight, torch.float64, None),
        ("pool", pool, torch.int64, total),
        ("neuron_id", neuron_id, torch.int64, total),
    ):
        size = len(pre) if length is None and pre.dim() else length
        if tensor.dim() != 1 or tensor.dtype != dtype or len(tensor) != size or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: must be ({size},), {dtype} "
                "on the CPU"
            )
    if len(cell_type) != total:
        raise ValueError(f"cell_type of {len(cell_type)} texts: must be {total}, one a neuron")
    pools, sources, targets = pool.numpy(), pre.numpy(), post.numpy()
    if not np.isin(pools, (0, 1, 2)).all() or (np.diff(pools) < 0).any():
        raise ValueError(
            "pool: must be 0 (sensory), 1 (internal) or 2 (output), and not decrease from neuron to neuron"
        )
    for number, name in ((0, "sensory"), (2, "output")):
        if not (pools == number).any():
            raise ValueError(f"pool: the {name} pool is empty; must have a neuron or more")
    for name, array in (("pre", sources), ("post", targets)):
        if len(array) and not (array.min() >= 0 and array.max() < total):
            raise ValueError(f"{name}: from {array.min()} to {array.max()}, must be numbers of the {total} neurons")
    if (np.diff(targets * total + sources) <= 0).any():
        raise ValueError("pre, post: edges must be sorted by (post, pre), and none may occur twice")
    values = weight.numpy()
    if not np.isfinite(values).all() or (values == 0).any():
        raise ValueError("weight: must be finite, and not 0")


def tensors(
    pre: np.ndarray, post: np.ndarray, weight: np.ndarray, pool: np.ndarray, neuron_id: np.ndarray
) -> dict[str, Tensor]:
    """The tensors of a connectome, its edges put in order."""
    order = np.lexsort((pre, post))
    arrays = {"pre": pre[order], "post": post[order], "pool": pool, "neuron_id": neuron_id}
    found = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    return found | {"weight": torch.from_numpy(weight[order].astype(np.float64))}


def _read(path: str | PathLike[str], keys: Sequence[str], argument: str) -> dict[str, np.ndarray]:
    """Arrays of an npz file; a ValueError that says what is wrong with it."""
    where = f"{argument}={str(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: there is no such file")
    try:
        with Path(path).open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a single array")
            names = list(archive.files)
            arrays = {key: archive[key] for key in keys if key in names}
            archive.close()
    except Exception as error:  # of whatever kind: each fault of a zip archive has another one
        raise ValueError(f"{where}: is cut short, corrupted or no npz file ({error})") from error
    missing = [key for key in keys if key not in names]
    if missing:
        raise ValueError(
            f"{where}: holds no {', '.join(missing)}; must be an npz file with {', '.join(keys)}, and has "
            f"{', '.join(names)[:200] or 'nothing'}"
        )
    return arrays


def _whole(where: str, key: str, array: np.ndarray, length: int) -> np.ndarray:
    """The array as int64; a ValueError unless it is a vector of so many whole numbers."""
    if array.shape != (length,):
        raise ValueError(f"{where}: {key} has shape {array.shape}, must be ({length},)")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{where}: {key} is of {array.dtype}, must be whole numbers")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        raise ValueError(f"{where}: {key} holds NaN, infinity or fractions, must be whole numbers")
    return array.astype(np.int64)


def _flags(where: str, key: str, array: np.ndarray, length: int) -> np.ndarray:
    if array.shape != (length,) or array.dtype != np.bool_:
        raise ValueError(f"{where}: {key} has shape {array.shape} and {array.dtype}, must be ({length},) and bool")
    return array


def _texts(where: str, key: str, array: np.ndarray, length: int) -> np.ndarray:
    if array.shape != (length,) or array.dtype.kind != "U":
        raise ValueError(f"{where}: {key} has shape {array.shape} and {array.dtype}, must be ({length},) texts")
    return array


def _edges(where: str, data: dict[str, np.ndarray], kind: str, total: int) -> Edges:
    """Presynaptic and postsynaptic neurons of one kind of edges, and their numbers of synapses."""
    length = len(data[f"{kind}_pre"]) if data[f"{kind}_pre"].ndim else 0
    pre, post, count = (
        _whole(where, f"{kind}_{part}", data[f"{kind}_{part}"], length) for part in ("pre", "post", "count")
    )
    for part, array in (("pre", pre), ("post", post)):
        if length and not (array.min() >= 0 and array.max() < total):
            raise ValueError(
                f"{where}: {kind}_{part} goes from {array.min()} to {array.max()}, must be numbers of {total} neurons"
            )
    if length and count.min() < 1:
        raise ValueError(f"{where}: {kind}_count goes down to {count.min()}, must be 1 or more")
    if len(np.unique(pre * total + post)) != length:
        raise ValueError(f"{where}: an edge of {kind} occurs twice")
    return pre, post, count


def _merged(parts: list[Edges], total: int) -> Edges:
    """The sum of several kinds of edges."""
    pre, post, count = joined(parts)
    keys, inverse = np.unique(post * total + pre, return_inverse=True)
    return keys % total, keys // total, np.bincount(inverse, weights=count, minlength=len(keys))


def _in_pools(
    pool: np.ndarray, ids: np.ndarray, cell_type: np.ndarray, pre: np.ndarray, post: np.ndarray, weight: np.ndarray
) -> dict[str, Any]:
    """A connectome's arguments, its neurons in the order of pools, ids ascending in each."""
    order = np.lexsort((ids, pool))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    found = tensors(place[pre], place[post], weight, pool[order], ids[order])
    return {**found, "cell_type": tuple(cell_type[order].tolist())}


def load_larva(
    path: str | PathLike[str],
    *,
    edges: str,
    signs: str | PathLike[str] | None,
    modality: str | Sequence[str],
    output: Sequence[str],
) -> dict[str, Any]:
    """A connectome's arguments from the larval file; see `Connectome.load`."""
    check_choice(edges=(edges, (*EDGES, "all")))
    chosen = [] if modality == "all" else [modality] if isinstance(modality, str) else list(modality)
    check_names("modality", chosen, MODALITIES)
    if modality != "all" and not chosen:
        raise ValueError(f"modality={modality!r}: leaves the sensory pool empty; must name one or more, or be 'all'")
    kinds = EDGES if edges == "all" else (edges,)
    where = f"path={str(path)!r}"
    keys = [f"{kind}_{part}" for kind in kinds for part in ("pre", "post", "count")]
    data = _read(path, ["neuron_id", "cell_type", "annotation", *keys], "path")
    total = data["neuron_id"].size
    ids = _whole(where, "neuron_id", data["neuron_id"], total)
    if len(np.unique(ids)) != total:
        raise ValueError(f"{where}: a neuron_id occurs twice")
    cell_type = _texts(where, "cell_type", data["cell_type"], total)
    pre, post, count = _merged([_edges(where, data, kind, total) for kind in kinds], total)
    sign = np.ones(total) if signs is None else _signs(signs, ids)
    types = [output] if isinstance(output, str) else list(output)
    check_names("output", types, sorted({*cell_type.tolist()} - {"sensory"}))
    pool = np.ones(total, np.int64)
    pool[np.isin(cell_type, types)] = 2
    sensory = cell_type == "sensory"
    if chosen:
        sensory &= np.isin(_texts(where, "annotation", data["annotation"], total), chosen)
    pool[sensory] = 0
    for number, name in ((0, f"sensory pool is empty with modality={modality!r}"), (2, f"output={types}")):
        if not (pool == number).any():
            raise ValueError(f"{name}: this pool of {where} is empty; must have a neuron or more")
    notes = [f"larval Drosophila brain (Winding et al. 2023), {edges} edges"]
    notes += ["all signs positive" if signs is None else "predicted signs"]
    notes += [f"sensory: {', '.join(chosen)}"] if chosen else []
    notes += [f"output: {', '.join(types)}"] if set(types) != {"DN-SEZ", "RGN"} else []
    return {**_in_pools(pool, ids, cell_type, pre, post, sign[pre] * count), "source": ", ".join(notes)}


def _signs(path: str | PathLike[str], ids: np.ndarray) -> np.ndarray:
    """1 or -1 for each of the neurons."""
    where = f"signs={str(path)!r}"
    data = _read(path, ["neuron_id", "sign"], "signs")
    own = _whole(where, "neuron_id", data["neuron_id"], data["neuron_id"].size)
    sign = _whole(where, "sign", data["sign"], len(own))
    if not np.isin(sign, (-1, 1)).all():
        raise ValueError(f"{where}: sign holds other numbers than 1 and -1")
    if len(np.unique(own)) != len(own):
        raise ValueError(f"{where}: a neuron_id occurs twice")
    missing = np.setdiff1d(ids, own)
    if len(missing):
        raise ValueError(f"{where}: {len(missing)} of {len(ids)} neurons have no sign, as neuron_id {missing[0]}")
    order = np.argsort(own)
    return sign[order][np.searchsorted(own, ids, sorter=order)].astype(np.float64)


def load_celegans(path: str | PathLike[str]) -> dict[str, Any]:
    """A connectome's arguments from the worm's file; see `Connectome.load_celegans`."""
    where = f"path={str(path)!r}"
    keys = ["transmitter", "is_sensory", "is_motor", "chem_pre", "chem_post", "chem_count"]
    data = _read(path, keys, "path")
    total = data["transmitter"].size
    transmitter = _texts(where, "transmitter", data["transmitter"], total)
    sensory, motor = (_flags(where, key, data[key], total) for key in ("is_sensory", "is_motor"))
    pre, post, count = _edges(where, data, "chem", total)
    pool = np.where(sensory, 0, np.where(motor, 2, 1))
    for number, name in ((0, "is_sensory"), (2, "is_motor")):
        if not (pool == number).any():
            raise ValueError(f"{where}: {name} leaves its pool empty; must have a neuron or more")
    cell_type = np.array(["sensory", "interneuron", "motor"])[pool]
    sign = np.where(np.char.startswith(transmitter, "GABA"), -1.0, 1.0)
    source = "C. elegans (Varshney et al. 2011), chemical synapses, GABA negative"
    return {**_in_pools(pool, np.arange(total), cell_type, pre, post, sign[pre] * count), "source": source}
