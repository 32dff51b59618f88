"""The language model of a mixer and a feed-forward net by name: a `Decoder`, or for nGPT's attention an `NGPT`."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from archzoo.models.decoder import Decoder, hidden_widths, make_mlp
from archzoo.models.generation import CausalLM
from archzoo.models.model import LayerFactory, register_model, token_sizes
from archzoo.models.ngpt import NGPT

ALONE = ("mamba", "mamba2", "mamba3")
"""Mixers that stand for attention and for the feed-forward net behind it: two of them make a block."""


def language_model(
    vocab_size: int,
    dim: int,
    depth: int,
    *,
    mixer: str = "attention",
    mlp: str | None = "auto",
    hidden_dim: int | Sequence[int] | None = None,
    mixer_options: dict[str, Any] | None = None,
    mlp_options: dict[str, Any] | None = None,
    dropout: float = 0.0,
    alpha_init: float | None = None,
    tie_embeddings: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CausalLM:
    """A language model of any mixer and feed-forward net: ids (batch, length) -> logits (batch, length, vocab_size).

    >>> model = language_model(256, 64, 4, mixer="mamba")
    >>> type(model).__name__, len(model.blocks)
    ('Decoder', 8)
    >>> type(language_model(256, 64, 4, mixer="ngpt", mlp="phm")).__name__
    'NGPT'

    Args:
        vocab_size: Number of tokens.
        dim: Size of a token's vector.
        depth: Number of blocks of a transformer.
        mixer: As in `Decoder`; `"ngpt"` makes the whole model an `NGPT`.
        mlp: As in `Decoder`. `"auto"`: the gated one, `NormalizedMLP` in an `NGPT`; but two blocks of the mixer alone
            for each of a transformer where it stands for attention and feed-forward net, as Mamba does in its paper.
        hidden_dim: As in `Decoder`.
        mixer_options: As in `Decoder`.
        mlp_options: As in `Decoder`.
        dropout: As in `Decoder`. An `NGPT` has none but that of its attention, `mixer_options={"dropout": 0.1}`.
        alpha_init: Where the residual steps of an `NGPT` start, as in `NormalizedBlock`; by default 1 / depth.
        tie_embeddings: Whether the head's weight is the embedding.
        device: Of the parameters.
        dtype: As `device`.

    Raises:
        ValueError: As `Decoder` and `NGPT`; if an option has no use with the mixer.
        TypeError: If a layer has no such option.
    """
    common: dict[str, Any] = {"tie_embeddings": tie_embeddings, "device": device, "dtype": dtype}
    if mixer == "ngpt":
        if dropout:
            raise ValueError(f"dropout={dropout}: nGPT has none but its attention's; leave it out, or set the mixer's")
        if mlp is None:
            raise ValueError("mlp=None: a block of nGPT has a feed-forward net; leave it out, or name a layer")
        alpha = 1 / depth if alpha_init is None else alpha_init
        hidden = hidden_widths(hidden_dim, dim, depth)
        model = NGPT(vocab_size, dim, depth, hidden_dim=hidden, alpha_init=alpha, **(mixer_options or {}), **common)
        if mlp not in ("auto", "gated"):
            for block, width in zip(model.blocks, hidden, strict=True):
                block.mlp = cast(nn.Module, make_mlp(mlp, mlp_options, dim, width, device=device, dtype=dtype))
        elif mlp_options:
            raise ValueError(f"mlp_options={mlp_options}: have no use with mlp={mlp!r}; leave them out")
        return model
    if alpha_init is not None:
        raise ValueError(f"alpha_init={alpha_init}: only nGPT has one, and the mixer is {mixer!r}; leave it out")
    if mlp == "auto" and mixer in ALONE:
        hidden_dim, depth, mlp = None, 2 * depth, None
    return Decoder(
        vocab_size,
        dim,
        depth,
        mixer=mixer,
        mlp="gated" if mlp == "auto" else mlp,
        hidden_dim=hidden_dim,
        mixer_options=mixer_options,
        mlp_options=mlp_options,
        dropout=dropout,
        **common,
    )


def decoder(
    layer: LayerFactory,
    input_shape: tuple[int, ...],
    output_size: int,
    *,
    width: int = 512,
    depth: int = 4,
    widths: tuple[int, ...] | None = None,
    dim: int | None = None,
    mixer: str | None = None,
    mlp: str | None = None,
    mixer_options: dict[str, Any] | None = None,
    mlp_options: dict[str, Any] | None = None,
    dropout: float = 0.0,
    alpha_init: float | None = None,
    tie_embeddings: bool = False,
) -> CausalLM:
    """A language model around the contestant: it is the mixer, or the layer that feed-forward nets are made of.

    Args:
        layer: A causal mixer, which takes the place of attention; or a layer of kind `linear`, of which there are two
            in every feed-forward net, with a GELU between those that are linear by themselves.
        input_shape: (context,); the model takes texts of any length.
        output_size: Number of different tokens.
        width: Hidden width of every feed-forward net.
        depth: Number of blocks of a transformer; two blocks of Mamba stand for one.
        widths: Hidden width of each block's net, instead of `width` and `depth`.
        dim: Size of a token. None: a quarter of the last hidden width, as is usual, so that a budget that chooses the
            widths scales the whole model.
        mixer: Registry name of the mixer, where the contestant is of kind `linear`; None: attention.
        mlp: The feed-forward nets, where the contestant is a mixer: `"gated"`, `"none"`, or the registry name of a
            layer of kind `linear`; None: as `"auto"` in `language_model`.
        mixer_options: Options of that mixer.
        mlp_options: Options of the layers of those feed-forward nets.
        dropout: As in `language_model`.
        alpha_init: As there, of nGPT; other mixers have none.
        tie_embeddings: As there.

    Shape: (batch, length), integers below output_size, -> (batch, length, output_size).

    Raises:
        ValueError: If an option is out of range, contradicts the contestant, or has no use.
    """
    if len(input_shape) != 1:
        raise ValueError(f"model 'decoder' takes tokens (length,), not inputs of shape {input_shape}")
    chosen, dim = token_sizes(width, depth, widths, dim)
    name, kind, options = layer.entry.name, layer.entry.kind, layer.options
    if name == "ngpt_block":
        raise ValueError(
            "layer='ngpt_block': has a feed-forward net of its own; choose layer=ngpt, which makes an NGPT"
        )
    if kind == "mixer":
        if mixer is not None or mixer_options:
            given = f"mixer={mixer!r}" if mixer is not None else f"mixer_options={mixer_options}"
            raise ValueError(f"{given}: layer {name} is the mixer; leave it out, or choose a layer of kind 'linear'")
        mixer, mixer_options = name, options
        mlp = {None: "auto", "none": None}.get(mlp, mlp)
    elif kind == "linear":
        if mlp is not None or mlp_options:
            given = f"mlp={mlp!r}" if mlp is not None else f"mlp_options={mlp_options}"
            raise ValueError(f"{given}: layer {name} makes the feed-forward nets; leave it out, or choose a mixer")
        mixer, mlp, mlp_options = mixer or "attention", name, options
    else:
        raise ValueError(f"layer={name!r} is of kind {kind!r}, and model 'decoder' takes kinds 'mixer' and 'linear'")
    return language_model(
        output_size,
        dim,
        len(chosen),
        mixer=mixer,
        mlp=mlp,
        hidden_dim=chosen,
        mixer_options=mixer_options,
        mlp_options=mlp_options,
        dropout=dropout,
        alpha_init=alpha_init if mixer == "ngpt" else None,
        tie_embeddings=tie_embeddings,
    )


decoder.takes_tokens = True  # type: ignore[attr-defined]  # the trainer refuses a task that does not go with it
register_model("decoder")(decoder)
