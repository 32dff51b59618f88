"""A decoder-only transformer over tokens, of any layer of kind `linear`, or with any causal mixer in it."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from archzoo.kernels.attention import self_attention
from archzoo.layers.phm_sequence import PHMEmbedding
from archzoo.models.model import LayerFactory, check_kind, register_model, token_sizes
from archzoo.models.vit import LayerMLP
from archzoo.registry import layer_options

_SOME_DIM = 64 * 720720  # a multiple of all small numbers, to see whether a mixer is causal


class LayerAttention(nn.Module):
    """Causal self-attention of any layer of kind `linear`: one dim -> 3 dim, the heads, one dim -> dim.

    Args:
        layer: Builds a layer from its two sizes.
        dim: Size of a token.
        heads: Number of heads; divides dim.
        dropout: Probability that a weight of attention is dropped in training.

    Shape: (batch, length, dim) -> (batch, length, dim).
    """

    def __init__(self, layer: LayerFactory, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.proj = layer(dim, 3 * dim), layer(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, length, dim) to the same."""
        dropout = self.dropout if self.training else 0.0
        return self.proj(self_attention(self.qkv(x), self.heads, causal=True, dropout=dropout))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        mixer: What tokens see of each other.
        mlp: What each is mapped by.
        dim: Size of a token.
        dropout: Probability that a value behind the mixer is dropped in training.

    Shape: (batch, length, dim) -> (batch, length, dim).
    """

    def __init__(self, mixer: nn.Module, mlp: nn.Module, dim: int, dropout: float):
        super().__init__()
        self.norm1, self.mixer, self.drop = nn.LayerNorm(dim), mixer, nn.Dropout(dropout)
        self.norm2, self.mlp = nn.LayerNorm(dim), mlp

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, length, dim) to the same."""
        x = x + self.drop(self.mixer(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Embedding of tokens and of places, blocks of causal attention and a feed-forward net, a norm, a linear head.

    The contestant makes all maps of a block: queries, keys and values, the output projection, and both feed-forward
    layers, with a GELU between those of a layer that is linear by itself. Embeddings and head are the same for all. A
    layer of kind `mixer` stands in the place of the whole attention instead, with `causal=True`; then the feed-forward
    layers are linear ones.

    Args:
        layer: Builds a layer from its two sizes, or a mixer from the size of a token.
        input_shape: (context,), the largest number of tokens.
        output_size: Number of different tokens.
        width: Hidden width of every feed-forward net.
        depth: Number of blocks.
        widths: Hidden width of each block's net, instead of `width` and `depth`.
        dim: Size of a token. None: a quarter of the last hidden width, as is usual, so that a budget that chooses the
            widths scales the whole model.
        heads: Number of attention heads, where the layer is of kind `linear`; divides the size of a token.
        dropout: Probability that a value is dropped in training: of a token, a weight of attention, and behind
            attention and the feed-forward net.
        embedding: `"usual"`: `nn.Embedding`. `"phm"`: `PHMEmbedding`, its number of tokens rounded up.
        embedding_n: n of the latter. None: the layer's own option n, else 4.

    Shape: (batch, length), integers below output_size, -> (batch, length, output_size); length is context at most.

    Raises:
        ValueError: If an option is out of range, the layer is of neither kind or is a mixer that cannot be made causal;
            in `forward`, if the input is no batch of at most `context` tokens.
    """

    takes_tokens: ClassVar[bool] = True
    """Whether inputs are integers, so that the trainer refuses a task that does not go with the model."""

    def __init__(
        self,
        layer: LayerFactory,
        input_shape: tuple[int, ...],
        output_size: int,
        *,
        width: int = 256,
        depth: int = 2,
        widths: tuple[int, ...] | None = None,
        dim: int | None = None,
        heads: int = 4,
        dropout: float = 0.0,
        embedding: Literal["usual", "phm"] = "usual",
        embedding_n: int | None = None,
    ):
        super().__init__()
        mixes = layer.entry.kind == "mixer"
        if not mixes:
            check_kind(layer, "transformer", "linear")
        else:
            layer = causal_mixer(layer, "transformer")
        if len(input_shape) != 1:
            raise ValueError(f"model 'transformer' takes tokens (length,), not inputs of shape {input_shape}")
        chosen, dim = token_sizes(width, depth, widths, dim)
        if heads < 1 or dim < heads or dim % heads:
            raise ValueError(f"heads={heads}: must divide dim={dim}, a positive number")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: must be at least 0 and below 1")
        (self.context,) = input_shape
        self.tokens = _embedding(layer, output_size, dim, embedding, embedding_n)
        self.places = nn.Embedding(self.context, dim)
        self.drop = nn.Dropout(dropout)
        linear = LayerFactory("linear") if mixes else layer
        self.blocks = nn.ModuleList(
            Block(
                layer(dim) if mixes else LayerAttention(layer, dim, heads, dropout),
                LayerMLP(linear, linear, not linear.entry.nonlinear, dim, hidden, drop=dropout),
                dim,
                dropout,
            )
            for hidden in chosen
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, output_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (batch, length) to logits of each next token, (batch, length, output_size)."""
        if tokens.dim() != 2 or tokens.shape[1] > self.context:
            raise ValueError(
                f"input of shape {tuple(tokens.shape)}: must be (batch, length), length {self.context} or less"
            )
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.drop(self.tokens(tokens) + places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def causal_mixer(mixer: LayerFactory, model: str) -> LayerFactory:
    """The mixer, causal. One that saw the tokens to be predicted would learn nothing, at no loss.

    Raises:
        ValueError: If the layer is of another kind, sees later tokens, or is told to by its options.
    """
    check_kind(mixer, model, "mixer")
    name, options = mixer.entry.name, mixer.options
    if "causal" in layer_options(name):
        if not options.get("causal", True):
            raise ValueError(f"causal={options['causal']}: model {model!r} predicts the next token; leave it out")
        return LayerFactory(name, {**options, "causal": True})
    with torch.device("meta"):
        if getattr(mixer(_SOME_DIM), "causal", False) is True:
            return mixer
    raise ValueError(
        f"layer={name!r}: model {model!r} predicts the next token and needs mixers that do not see it, and this "
        "one is not causal and has no option for it; use attention or mamba"
    )


def _embedding(layer: LayerFactory, count: int, dim: int, kind: str, n: int | None) -> nn.Module:
    if kind not in ("usual", "phm"):
        raise ValueError(f"embedding={kind!r}: must be 'usual' or 'phm'")
    if kind == "usual":
        if n is not None:
            raise ValueError(
                f"embedding_n={n}: has no use with embedding='usual'; leave it out, or set embedding='phm'"
            )
        return nn.Embedding(count, dim)
    options: dict[str, Any] = layer_options(layer.entry.name) | layer.options
    chosen = n if n is not None else options.get("n", 4)
    if not isinstance(chosen, int) or chosen < 1 or dim % chosen:
        raise ValueError(f"embedding_n={chosen}: must be a whole number that divides dim={dim}")
    return PHMEmbedding(-(-count // chosen) * chosen, dim, n=chosen)


register_model("transformer")(Transformer)
