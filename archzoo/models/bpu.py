"""A connectome as a classifier (arXiv 2507.10951), and the perceptron of equal parameters beside it."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers._check import check_dropout
from archzoo.layers._connectome_nulls import KINDS
from archzoo.layers.bpu import BPU, Connectome
from archzoo.models.model import LayerFactory, register_model
from archzoo.names import suggest
from archzoo.tasks.files import data_root
from archzoo.tasks.task import DatasetError

if TYPE_CHECKING:
    from archzoo.pictures import Picture
    from archzoo.tasks.task import Task

LARVA, SIGNS, WORM = "larva_connectome.npz", "larva_signs.npz", "celegans_connectome.npz"
WIRINGS = ("measured", *KINDS)
LARGEST = 10
"""Times that a wiring may be grown: a budget that searched on would draw millions of edges each time."""


class FrozenMiddleMLP(nn.Module):
    r"""The paper's control: a perceptron whose middle matrix is random and never learns.

    $y = L_2(\mathrm{ReLU}(\mathrm{ReLU}(\mathrm{dropout}(L_1(x))) R))$ with Gaussian R (S, O), of variance 1 / S. L1
    and L2 are all that learns, and have a BPU's shapes, so that both have exactly as many parameters.

    Args:
        layer: Builds L1 and L2 from their two sizes: the contestant.
        in_features: Size D of an input.
        out_features: Size E of an output.
        hidden: S and O: sizes of the two hidden layers, as of a BPU's sensory and output pools.
        dropout: Probability that a value behind L1 is dropped in training.

    Shape: (*, D) -> (*, E).
    """

    middle: Tensor

    def __init__(
        self, layer: LayerFactory, in_features: int, out_features: int, hidden: tuple[int, int], dropout: float = 0.2
    ):
        super().__init__()
        check_dropout(dropout)
        self.input_proj, self.output_proj = layer(in_features, hidden[0]), layer(hidden[1], out_features)
        self.dropout = dropout
        self.register_buffer("middle", torch.randn(hidden) / math.sqrt(hidden[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (*, D) to (*, E)."""
        first = F.relu(F.dropout(self.input_proj(x), self.dropout, self.training))
        y: Tensor = self.output_proj(F.relu(first @ self.middle))
        return y

    def summary(self) -> dict[str, Any]:
        """What a record should say of it."""
        return {"source": "no wiring: a frozen Gaussian matrix", "hidden": list(self.middle.shape)}

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"middle={tuple(self.middle.shape)}, dropout={self.dropout}"


class ConnectomeClassifier(nn.Module):
    """Flattens or encodes an input and hands it to a BPU, or to what is compared with one.

    Args:
        core: Maps (batch, features) to (batch, classes).
        connectome: The wiring from which the core has its sizes, as measured.
        flip: Whether training images are mirrored left to right at random.
        encoder: Maps (batch, *input_shape) to (batch, features). None: flattens.

    Shape: (batch, *input_shape) -> (batch, output_size).
    """

    def __init__(
        self,
        core: BPU | FrozenMiddleMLP,
        connectome: Connectome,
        flip: bool = False,
        encoder: nn.Module | None = None,
    ):
        super().__init__()
        self.encoder = nn.Flatten() if encoder is None else encoder
        self.core, self.connectome, self.flip = core, connectome, flip

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, *input_shape) to (batch, output_size)."""
        if self.flip and self.training:
            mirrored = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < 0.5
            x = torch.where(mirrored, x.flip(-1), x)
        y: Tensor = self.core(self.encoder(x))
        return y

    def summarize(self) -> dict[str, Any]:
        """What the run's record says of the wiring, beside the task's figures: above all, where it is from."""
        found = self.core.summary()
        return {f"wiring_{key}" if key != "source" else "wiring": value for key, value in found.items()}

    def pictures(self, task: "Task") -> "Mapping[str, Picture]":
        """The wiring, and what of it acts at each step."""
        if not isinstance(self.core, BPU):
            return {}
        from archzoo.models.bpu_plot import plot_wiring
        from archzoo.pictures import Picture

        caption = (
            "Synapses between neurons, excitatory in orange, inhibitory in blue; edges between pools; and how many "
            f"neurons can matter at each step. Wiring: {self.core.connectome.source}."
        )
        return {"wiring": Picture(plot_wiring(self.core.connectome, self.core), caption)}


def bpu(
    layer: LayerFactory,
    input_shape: tuple[int, ...],
    output_size: int,
    *,
    width: int = 1,
    depth: int = 1,
    widths: tuple[int, ...] | None = None,
    connectome: str = "larva",
    signs: str = "auto",
    edges: str = "ad",
    modality: str | Sequence[str] = "all",
    output: Sequence[str] = ("DN-SEZ", "RGN"),
    preserve: str = "strength",
    dropout: float = 0.2,
    flip: bool = False,
    data_dir: Path | None = None,
) -> ConnectomeClassifier:
    """The trainer's model `bpu`: a connectome between two learned linear maps, or the equal perceptron.

    Args:
        layer: `bpu`, with its options, and `wiring`, `"measured"` or a null model, and `wiring_seed`, by default drawn
            from torch's generator, as weights are. Or a layer of kind `linear`: a `FrozenMiddleMLP` of two of it.
        input_shape: Shape of one input; it is flattened.
        output_size: Length of the output vector.
        width: Times that the wiring is grown, by `Connectome.expand`: 1 to 10.
        depth: 1.
        widths: `(width,)`, instead of it.
        connectome: `"larva"`, `"celegans"` (files of the data folder), `"generated"` (made up; needs no file), or the
            path of an npz file like the larva's.
        signs: `"auto"`: the file `larva_signs.npz` beside the connectome. `"none"`: all edges are positive. Or a path.
        edges: See `Connectome.load`; as are the next two.
        modality: Which sensory neurons are driven.
        output: Cell types that are read.
        preserve: What growing keeps, `"strength"` or `"density"`.
        dropout: Probability that a driven value is dropped in training.
        flip: Whether training images are mirrored left to right at random.
        data_dir: The data folder; None: $ARCHZOO_DATA, else `archzoo` in the user's cache.

    Raises:
        ValueError: If an option is out of range, a file is absent or not what it should be, or the layer is neither
            `bpu` nor of kind `linear`.
    """
    if widths is not None:
        width, depth = widths[0], len(widths)
    if depth != 1:
        raise ValueError(f"depth={depth}: must be 1; the depth of a BPU is layer.steps")
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= LARGEST:
        raise ValueError(f"width={width!r}: must be a whole number from 1 to {LARGEST}: times that the wiring is grown")
    modalities = modality if isinstance(modality, str) else tuple(modality)
    wiring = find_connectome(connectome, signs, edges, modalities, tuple(output), data_dir)
    wiring = _grown(wiring, width, preserve)
    sizes = math.prod(input_shape), output_size
    if layer.entry.name == "bpu":
        options = dict(layer.options)
        wired = _rewired(wiring, options.pop("wiring", "measured"), options.pop("wiring_seed", None))
        core = LayerFactory("bpu", options)(wired, *sizes, dropout=dropout)
    elif layer.entry.kind == "linear":
        sensory, _, outputs = wiring.pool_sizes
        core = FrozenMiddleMLP(layer, *sizes, (sensory, outputs), dropout)
    else:
        raise ValueError(
            f"layer={layer.entry.name!r}: must be 'bpu', or, for the perceptron beside it, of kind 'linear', as "
            "'linear' itself"
        )
    assert isinstance(core, BPU | FrozenMiddleMLP)
    return ConnectomeClassifier(core, wiring, flip)


def find_connectome(
    connectome: str,
    signs: str = "auto",
    edges: str = "ad",
    modality: str | tuple[str, ...] = "all",
    output: tuple[str, ...] = ("DN-SEZ", "RGN"),
    data_dir: Path | None = None,
) -> Connectome:
    """The wiring that a configuration names; see `bpu`. Read once a process.

    Raises:
        ValueError: If a file is absent or not what it should be, or an option is wrong or has no use.
    """
    folder = None
    if connectome in ("larva", "celegans"):
        try:
            folder = data_root(data_dir)
        except DatasetError as error:
            raise ValueError(f"connectome={connectome!r}: {error}") from error
    elif connectome != "generated" and not connectome.endswith(".npz"):
        raise ValueError(
            f"connectome={connectome!r}: must be the path of an npz file, or 'larva', 'celegans' or 'generated'; "
            + suggest(connectome, ["larva", "celegans", "generated"])
        )
    if connectome in ("celegans", "generated"):
        usual: dict[str, tuple[Any, Any]] = {
            "signs": (signs, "auto"),
            "edges": (edges, "ad"),
            "modality": (modality, "all"),
            "output": (output, ("DN-SEZ", "RGN")),
        }
        for key, (value, default) in usual.items():
            if value != default:
                raise ValueError(f"{key}={value!r}: has no use with connectome={connectome!r}; leave it out")
        return Connectome.generate() if folder is None else _read(_worm, folder / WORM, connectome)
    path = Path(connectome).expanduser() if folder is None else folder / LARVA
    marks = {"auto": path.with_name(SIGNS), "none": None}.get(signs, Path(signs).expanduser())
    return _read(_larva, path, connectome, marks, edges, modality, output)


def _read(load: Any, path: Path, connectome: str, *options: Any) -> Connectome:
    try:
        found: Connectome = load(path, path.stat().st_mtime_ns, *options)
    except FileNotFoundError as error:
        missing = error.filename or path if not error.args or len(error.args) > 1 else error.args[0]
        raise ValueError(
            f"connectome={connectome!r}: {missing} is not there; set ARCHZOO_DATA to the folder that holds it, give "
            "the path of an npz file, or take connectome=generated, a made-up wiring with the larva's statistics"
        ) from error
    return found


@functools.lru_cache(maxsize=8)
def _larva(path: Path, changed: int, signs: Path | None, edges: str, modality: Any, output: Any) -> Connectome:
    return Connectome.load(path, edges=edges, signs=signs, modality=modality, output=output)


@functools.lru_cache(maxsize=2)
def _worm(path: Path, changed: int) -> Connectome:
    return Connectome.load_celegans(path)


@functools.lru_cache(maxsize=4)
def _grown(wiring: Connectome, factor: int, preserve: str) -> Connectome:
    return wiring.expand(factor, preserve=preserve)


def _rewired(wiring: Connectome, kind: str, seed: int | None) -> Connectome:
    """The wiring as it is, or a null model of it."""
    if kind not in WIRINGS:
        raise ValueError(f"wiring={kind!r}: {suggest(str(kind), WIRINGS)}")
    if kind == "measured":
        if seed is not None:
            raise ValueError(f"wiring_seed={seed}: has no use with wiring='measured'; leave it out")
        return wiring
    if seed is None:
        seed = int(torch.randint(2**31, (), device="cpu"))
    elif isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"wiring_seed={seed!r}: must be a whole number, 0 or more, or null")
    return wiring.shuffle(kind, seed=seed)


register_model("bpu")(bpu)
