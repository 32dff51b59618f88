"""A connectome that judges chess positions (arXiv 2507.10951): CNN-BPU and GNN-BPU, and the equal perceptron."""

from collections.abc import Sequence
from pathlib import Path

from archzoo.models.bpu import ConnectomeClassifier, bpu
from archzoo.models.chess_encoders import ENCODERS
from archzoo.models.model import LayerFactory, register_model
from archzoo.names import suggest
from archzoo.tasks.chess_board import PLANES

OUTPUT = ("DN-SEZ", "DN-VNC", "RGN")


def chess_bpu(
    layer: LayerFactory,
    input_shape: tuple[int, ...],
    output_size: int,
    *,
    encoder: str = "convolutions",
    width: int = 1,
    depth: int = 1,
    widths: tuple[int, ...] | None = None,
    connectome: str = "larva",
    signs: str = "auto",
    edges: str = "ad",
    modality: str | Sequence[str] = "all",
    output: Sequence[str] | None = None,
    preserve: str = "strength",
    dropout: float = 0.0,
    data_dir: Path | None = None,
) -> ConnectomeClassifier:
    """The trainer's model `chess_bpu`: model `bpu` behind an encoder of positions.

    Upstream's settings of the layer for chess are `steps` 8 to 10, `inject="every"`, `residual=True` and
    `readout="sum"`. With them a state grows up to 1 + rho times a step, rho the spectral radius. At the 1.893 of
    upstream's scale of 0.04 the first loss on positions of random games is 11 nats with convolutions and `steps=8`, 92
    with `steps=10`, 56 with the graph network; at `spectral_radius=0.5` it is 0.66, 0.67 and 1.8, and training is
    faster. A coin's is 0.69.

    Args:
        layer: As of `bpu`.
        input_shape: (8, 8, 8): see `archzoo.models.chess_encoders`.
        output_size: Length of the output vector; task `chess_moves` has 2.
        encoder: `"vector"`, `"convolutions"` (upstream's), `"residual"` (the paper's CNN) or `"graph"` (its GNN).
        width: As of `bpu`; as are all that follow, but for
        depth: 1.
        widths: `(width,)`, instead of it.
        connectome: See `bpu`.
        signs: See `bpu`.
        edges: See `bpu`.
        modality: See `bpu`.
        output: Cell types that are read. None: `DN-SEZ`, `DN-VNC` and `RGN`, 400 neurons, or the output pool that the
            worm's wiring and the generated one have.
        preserve: See `bpu`.
        dropout: See `bpu`.
        data_dir: See `bpu`.

    Raises:
        ValueError: If an option is out of range or unknown, the inputs are no positions, or as of `bpu`.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder={encoder!r}: {suggest(str(encoder), list(ENCODERS))}")
    if tuple(input_shape) != (PLANES, 8, 8):
        raise ValueError(
            f"model 'chess_bpu' takes chess positions {(PLANES, 8, 8)}, as of task chess_moves, not inputs of shape "
            f"{tuple(input_shape)}"
        )
    front = ENCODERS[encoder]()
    if output is None:  # the output pools of the worm's wiring and the generated one are none of the larva's types
        output = ("DN-SEZ", "RGN") if connectome in ("celegans", "generated") else OUTPUT
    net = bpu(
        layer,
        (front.out_features,),
        output_size,
        width=width,
        depth=depth,
        widths=widths,
        connectome=connectome,
        signs=signs,
        edges=edges,
        modality=modality,
        output=output,
        preserve=preserve,
        dropout=dropout,
        data_dir=data_dir,
    )
    return ConnectomeClassifier(net.core, net.connectome, encoder=front)


register_model("chess_bpu")(chess_bpu)
