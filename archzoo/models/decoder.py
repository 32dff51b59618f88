"""A decoder-only language model whose mixer and feed-forward net are chosen by name, as Mamba and a KAN."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers._cache import Cache, KeyValueCache, cache_for, one_each
from archzoo.layers._check import check_dropout, check_whole
from archzoo.layers.attention import NORM_EPS, GatedMLP, RotaryAttention
from archzoo.layers.normalized_linear import check_ids
from archzoo.models.generation import CausalLM
from archzoo.models.model import LayerFactory
from archzoo.models.transformer import causal_mixer
from archzoo.models.vit import LayerMLP


class DecoderBlock(nn.Module):
    r"""$u = x + \mathrm{mixer}(N_1(x))$, $y = u + \mathrm{MLP}(N_2(u))$, N being RMSNorms; or the first half alone.

    Args:
        mixer: What tokens see of each other: (batch, length, dim) -> the same.
        mlp: What each is mapped by; None: the block is the mixer alone.
        dim: Size of a token.
        dropout: Probability that a value behind mixer or MLP is dropped in training.
        device: Of the norms.
        dtype: As `device`.

    Shape: (batch, length, dim) -> (batch, length, dim).
    """

    def __init__(
        self,
        mixer: nn.Module,
        mlp: nn.Module | None,
        dim: int,
        *,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.norm1, self.mixer = nn.RMSNorm(dim, eps=NORM_EPS, device=device, dtype=dtype), mixer
        self.norm2 = None if mlp is None else nn.RMSNorm(dim, eps=NORM_EPS, device=device, dtype=dtype)
        self.mlp, self.dropout = mlp, dropout

    def forward(self, x: Tensor, *, cache: Cache | None = None, **arguments: Any) -> Tensor:
        """Maps (batch, length, dim) to the same.

        Args:
            x: The tokens; with a cache, those behind the ones it has.
            cache: Of this block's mixer, from `archzoo.layers._cache.cache_for`.
            arguments: What the mixer takes besides, as the `attn_mask` of attention or the `seq_idx` of Mamba.
        """
        branch = self._mix(self.norm1(x), cache, arguments)
        x = x + F.dropout(branch, self.dropout, self.training)
        if self.mlp is None or self.norm2 is None:
            return x
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)

    def _mix(self, x: Tensor, cache: Cache | None, arguments: dict[str, Any]) -> Tensor:
        if cache is None:
            y: Tensor = self.mixer(x, **arguments)
        elif isinstance(cache, KeyValueCache):
            y = self.mixer(x, cache=cache, **arguments)
        elif arguments:
            raise ValueError(f"{sorted(arguments)} with a cache: {type(self.mixer).__name__} goes on without them")
        else:
            y = cache.mix(self.mixer, x)
        return y


class Decoder(CausalLM):
    """A decoder-only language model: embedding, blocks of a mixer and a feed-forward net, RMSNorm, head. No biases.

    >>> model = Decoder(256, 32, 2, mixer="mamba", mlp=None)
    >>> model(torch.zeros(1, 5, dtype=torch.int64)).shape
    torch.Size([1, 5, 256])
    >>> model = Decoder(256, 32, 2, mixer="attention", mlp="kan", mlp_options={"grid_size": 4})
    >>> tokens = list(model.generate(torch.zeros(1, 5, dtype=torch.int64), 3, top_k=40, seed=0))

    Positions are the mixer's affair: attention turns queries and keys by them, and recurrent mixers read in order.

    Embedding and head start as N(0, 0.02²), and so do attention and the gated net, whose matrices that write to the
    residual stream are divided by sqrt(2 depth), as in GPT-2. Other mixers and nets start as they do alone, an
    `out_proj` divided by sqrt(depth), as in Mamba.

    Args:
        vocab_size: Number V of tokens.
        dim: Size d of a token's vector.
        depth: Number of blocks.
        mixer: Registry name of a layer of kind `mixer` that is causal, or can be made so.
        mlp: `"gated"`: SwiGLU, `GatedMLP`. Registry name of a layer of kind `linear`: two of them, with a GELU between
            those that are linear by themselves. None: blocks of the mixer alone, as Mamba's.
        hidden_dim: Hidden width of the feed-forward nets, or of each block's; by default 4 dim.
        mixer_options: Options of the mixer, as `{"num_heads": 4}`.
        mlp_options: Options of the layers of the feed-forward net.
        dropout: Probability that a value behind a mixer or a feed-forward net is dropped in training.
        tie_embeddings: Whether the head's weight is the embedding.
        device: Of the parameters.
        dtype: As `device`.

    Attributes:
        embed: Embedding (V, d).
        blocks: `nn.ModuleList` of `DecoderBlock`s.
        norm: The last RMSNorm.
        head: Linear layer with a weight (V, d).

    Shape: ids (batch, length) -> logits (batch, length, vocab_size).

    Raises:
        ValueError: If a size is no whole number, 1 or more, there is no such layer, it is of another kind, or sees
            later tokens; in `forward`, if the input is not (batch, length) of whole numbers.
        TypeError: If a layer has no such option.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        mixer: str = "attention",
        mlp: str | None = "gated",
        hidden_dim: int | Sequence[int] | None = None,
        mixer_options: dict[str, Any] | None = None,
        mlp_options: dict[str, Any] | None = None,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(vocab_size=vocab_size, dim=dim, depth=depth)
        check_dropout(dropout)
        self.vocab_size, self.dim = vocab_size, dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if mixer in ("ngpt", "ngpt_block"):
            raise ValueError(
                f"mixer={mixer!r}: is made for a state on the sphere, and this one is not; use "
                "`archzoo.models.ngpt.NGPT`, or `archzoo.models.language_model.language_model(mixer='ngpt')`"
            )
        make = causal_mixer(_layer("mixer", mixer, mixer_options), "decoder")
        self.embed = nn.Embedding(vocab_size, dim, **factory)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                make(dim, **factory),
                make_mlp(mlp, mlp_options, dim, hidden, **factory),
                dim,
                dropout=dropout,
                **factory,
            )
            for hidden in hidden_widths(hidden_dim, dim, depth)
        )
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS, **factory)
        self.head = nn.Linear(dim, vocab_size, bias=False, **factory)
        if tie_embeddings:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws everything anew."""
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        self.norm.reset_parameters()
        for block in self.blocks:
            for part in block.children():
                self._reset(part)

    @torch.no_grad()
    def _reset(self, part: nn.Module) -> None:
        depth = len(self.blocks)
        _redraw(part)
        if isinstance(part, RotaryAttention | GatedMLP):
            for name, weight in part.named_parameters():
                if weight.dim() > 1:
                    writes = name in ("out_proj.weight", "down_proj.weight")
                    nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth) if writes else 0.02)
        elif isinstance(out := getattr(part, "out_proj", None), nn.Linear):
            out.weight /= math.sqrt(depth)

    def forward(self, ids: Tensor, *, cache: Sequence[Cache] | None = None, **arguments: Any) -> Tensor:
        """Logits (batch, length, vocab_size) of ids (batch, length).

        Args:
            ids: Tokens; with a cache, those behind the ones it has.
            cache: One for each block, of `new_cache`.
            arguments: What all mixers take besides: `attn_mask` and `position_ids` of attention, `seq_idx` of Mamba.
        """
        logits: Tensor = self.head(self._states(ids, cache, **arguments))
        return logits

    def _states(self, ids: Tensor, cache: Sequence[Cache] | None = None, **arguments: Any) -> Tensor:
        check_ids(ids, 2)
        given = {key: value for key, value in arguments.items() if value is not None}
        x: Tensor = self.embed(ids)
        for block, own in zip(self.blocks, one_each(cache, len(self.blocks)), strict=True):
            x = block(x, cache=own, **given)
        return self.norm(x)

    def new_cache(self) -> list[Cache]:
        """An empty cache for each block: keys and values, a state, or, of mixers that have neither, all inputs."""
        return [cache_for(block.mixer) for block in self.blocks]  # type: ignore[arg-type]

    def next_logits(self, ids: Tensor, cache: Sequence[Cache]) -> Tensor:
        """Logits (B, V) of the token behind ids (B, L), which follow those that the cache has seen."""
        logits: Tensor = self.head(self._states(ids, cache)[:, -1])
        return logits

    def no_weight_decay(self) -> set[str]:
        """Names of what weight decay leaves alone, for timm's `create_optimizer_v2`: vectors, and what layers name."""
        vectors = {name for name, parameter in self.named_parameters() if parameter.dim() <= 1}
        return vectors | {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if prefix and callable(method := getattr(module, "no_weight_decay", None))
            for name in method()
        }

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.vocab_size}, {self.dim}, depth={len(self.blocks)}"


def make_mlp(
    name: str | None, options: dict[str, Any] | None, dim: int, hidden_dim: int, **factory: Any
) -> nn.Module | None:
    """The feed-forward net of a block; see `Decoder`.

    Raises:
        ValueError: If the layer is unknown or of another kind, or has options that have no use.
    """
    if name in (None, "gated"):
        if options:
            raise ValueError(f"mlp_options={options}: have no use with mlp={name!r}; leave them out")
        return None if name is None else GatedMLP(dim, hidden_dim, **factory)
    assert name is not None
    layer = _layer("mlp", name, options)
    if layer.entry.kind != "linear":
        raise ValueError(
            f"mlp={name!r}: is of kind {layer.entry.kind!r}; must be 'gated' or a layer of kind 'linear', which "
            "`archzoo.list_layers(kind='linear')` lists"
        )
    return LayerMLP(layer, layer, not layer.entry.nonlinear, dim, hidden_dim, **factory)


def _layer(argument: str, name: str, options: dict[str, Any] | None) -> LayerFactory:
    try:
        return LayerFactory(name, options)
    except ValueError as error:
        raise ValueError(f"{argument}={name!r}: {error}") from error


def hidden_widths(hidden_dim: int | Sequence[int] | None, dim: int, depth: int) -> list[int]:
    """The hidden width of each block: 4 dim, the given one, or those given one by one.

    Raises:
        ValueError: If one is no whole number, 1 or more, or there are more or fewer than blocks.
    """
    if hidden_dim is None:
        return [4 * dim] * depth
    widths = list(hidden_dim) if isinstance(hidden_dim, Sequence) else [hidden_dim] * depth
    for width in widths:
        check_whole(hidden_dim=width)
    if len(widths) != depth:
        raise ValueError(f"hidden_dim={widths}: must be one number, or depth={depth} of them")
    return widths


def _redraw(module: nn.Module) -> None:
    """Calls `reset_parameters` of the module, or of the outermost ones in it that have the method."""
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
    else:
        for child in module.children():
            _redraw(child)
