"""MambaLM: the language model of Mamba and Mamba-2 (https://arxiv.org/abs/2312.00752, https://arxiv.org/abs/2405.21060).

Parameters have the names of the authors' `MambaLMHeadModel`, so that their checkpoints load as they are.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from archzoo.layers._cache import StateCache, one_each
from archzoo.layers._check import check_positive, check_whole
from archzoo.layers.mamba import MambaBlock
from archzoo.layers.normalized_linear import check_ids
from archzoo.models.generation import CausalLM
from archzoo.models.mamba_config import arguments_of
from archzoo.models.model import LayerFactory, register_model, token_sizes

LAYERS = ("mamba", "mamba2")
_EMBEDDING, _HEAD, _THEIR_EMBEDDING = "backbone.embedding.weight", "lm_head.weight", "backbone.embeddings.weight"


class MambaBackbone(nn.Module):
    r"""All of a `MambaLM` but its head: $h \leftarrow h + \mathrm{mixer}(N(h))$ block by block, and N of the last h.

    Args:
        embedding: Of the tokens, (V, dim).
        layers: The blocks.
        norm_f: The last RMSNorm.

    Shape: ids (batch, length) -> (batch, length, dim).
    """

    def __init__(self, embedding: nn.Embedding, layers: Sequence[MambaBlock], norm_f: nn.RMSNorm):
        super().__init__()
        self.embedding, self.layers, self.norm_f = embedding, nn.ModuleList(layers), norm_f

    def forward(
        self, ids: Tensor, *, seq_idx: Tensor | None = None, cache: Sequence[StateCache] | None = None
    ) -> Tensor:
        """As `MambaLM.forward`, to what its head maps."""
        check_ids(ids, 2)
        if cache is not None and seq_idx is not None:
            raise ValueError("seq_idx with a cache: a cache goes on with one sequence a row; leave one of them out")
        h: Tensor = self.embedding(ids)
        for block, own in zip(self.layers, one_each(cache, len(self.layers)), strict=True):
            h = block(h, seq_idx=seq_idx) if own is None else own.mix(block, h)
        y: Tensor = self.norm_f(h.to(self.norm_f.weight.dtype))
        return y


class MambaLM(CausalLM):
    r"""Mamba's language model: embedding, blocks $h \leftarrow h + \mathrm{mixer}(N(h))$, N, head; N being RMSNorms.

    A block is a mixer alone, which stands for attention and for the feed-forward net: two blocks cost about what one of
    a transformer does. There are no positions, for the mixers read in order. Texts may have any length; in generating,
    a token costs the same time and the model keeps a state of the same size wherever in a text it stands.

    >>> model = MambaLM(250, 32, 2, d_state=8)
    >>> model(torch.zeros(1, 5, dtype=torch.int64)).shape
    torch.Size([1, 5, 256])
    >>> tokens = list(model.generate(torch.zeros(1, 5, dtype=torch.int64), 3, top_k=40, seed=0))

    The embedding starts as N(0, 0.02²), each `out_proj` as alone but divided by sqrt(depth), biases of linear layers at
    0 but those of step sizes, and everything else as it does alone. Keep parameters in float32 and use autocast:
    training with parameters stored in bfloat16 is known to diverge.

    Parameters: `backbone.embedding.weight` (V, dim), `backbone.layers.{i}.norm.weight` (dim,), `backbone.layers.{i}.
    mixer.*` as in `Mamba` and `Mamba2`, `backbone.norm_f.weight` (dim,), and `lm_head.weight` (V, dim), which is in the
    state dict where it is tied too. In loading, `backbone.embeddings.weight`, transformers' name, does as well, and
    one of a tied pair is enough.

    Args:
        vocab_size: Number of tokens.
        dim: Size of a token's vector.
        depth: Number of blocks.
        layer: The mixer of all blocks, `"mamba"` or `"mamba2"`.
        pad_vocab_size_multiple: V, the number of rows of embedding and head, is vocab_size rounded up to a multiple of
            this. Logits of the rows that are added mean nothing, and `generate` does not draw them.
        tie_embeddings: Whether the head's weight is the embedding.
        norm_eps: Epsilon of the norms.
        residual_in_fp32: Whether h is float32 at least, whatever the dtype.
        device: Of the parameters.
        dtype: Of all parameters but A_log, D and Mamba2's dt_bias, which are float32 at least.
        mixer_arguments: Further options of `Mamba` or `Mamba2`, as d_state.

    Attributes:
        backbone: `MambaBackbone` of embedding, layers (`MambaBlock`s) and norm_f.
        lm_head: Linear layer without a bias.

    Shape: ids (batch, length) -> logits (batch, length, V).

    Raises:
        ValueError: If a size is no whole number, 1 or more, there is no such layer, it is to be bidirectional, or it
            refuses an option; in `forward`, if the input is not (batch, length) of whole numbers.
        TypeError: If the mixer has no such option.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        layer: str = "mamba",
        pad_vocab_size_multiple: int = 8,
        tie_embeddings: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer_arguments: Any,
    ):
        super().__init__()
        check_whole(vocab_size=vocab_size, dim=dim, depth=depth, pad_vocab_size_multiple=pad_vocab_size_multiple)
        check_positive(norm_eps=norm_eps)
        if layer not in LAYERS:
            raise ValueError(f"layer={layer!r}: must be one of {', '.join(map(repr, LAYERS))}")
        if (both := mixer_arguments.get("bidirectional")) is not None:
            raise ValueError(f"bidirectional={both!r}: a language model predicts the next token; leave it out")
        self.vocab_size, self.dim, self.layer, self.tie_embeddings = vocab_size, dim, layer, tie_embeddings
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {**mixer_arguments, **factory, "norm_eps": norm_eps, "residual_in_fp32": residual_in_fp32}
        padded = math.ceil(vocab_size / pad_vocab_size_multiple) * pad_vocab_size_multiple
        self.backbone = MambaBackbone(
            nn.Embedding(padded, dim, **factory),
            [MambaBlock(dim, mixer=layer, **options) for _ in range(depth)],
            nn.RMSNorm(dim, eps=norm_eps, **factory),
        )
        self.lm_head = nn.Linear(dim, padded, bias=False, **factory)
        self._tie()
        self._start()
        self.register_load_state_dict_pre_hook(_take_other_names)
        self.register_load_state_dict_post_hook(_tie_again)

    def reset_parameters(self) -> None:
        """Draws everything anew, from torch's global generator."""
        for block in self._blocks:
            block.reset_parameters()
        self.backbone.norm_f.reset_parameters()
        self.lm_head.reset_parameters()
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Changes parameters that have just been drawn as in layers by themselves to what they are in this model."""
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for block in self._blocks:
            block.mixer.out_proj.weight /= math.sqrt(len(self._blocks))
            for linear in (block.mixer.in_proj, block.mixer.out_proj):
                if linear.bias is not None:
                    linear.bias.zero_()

    @property
    def _blocks(self) -> list[MambaBlock]:
        return cast("list[MambaBlock]", list(self.backbone.layers))

    def _tie(self) -> None:
        if self.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._tie()  # `to_empty` makes two parameters of one
        return self

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A model, not trained, as a `config.json` describes it: the authors' (state-spaces/mamba-*, mamba2-*), or
        transformers' of Mamba (-hf).

        >>> config = {"d_model": 32, "n_layer": 2, "vocab_size": 50, "ssm_cfg": {"layer": "Mamba1", "d_state": 8}}
        >>> MambaLM.from_config(config).lm_head
        Linear(in_features=32, out_features=56, bias=False)

        Args:
            config: What the file says, as a dict. `fused_add_norm` and `use_fast_path`, which choose between kernels,
                change nothing here.
            device: Of the parameters.
            dtype: As in `MambaLM`.

        Raises:
            ValueError: If a size is missing, or a key is unknown or asks for what `MambaLM` has not, as layers of
                attention or feed-forward nets.
        """
        return cls(**arguments_of(config), device=device, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A trained model, from a folder on this machine. Nothing is downloaded, and no code in it is run.

        Args:
            folder: With `config.json`, and `model.safetensors` or `pytorch_model.bin`; the former is taken if both are
                there.
            device: Of the parameters.
            dtype: As in `MambaLM`, whatever the file holds; by default torch's, float32.

        Raises:
            ValueError: If a file is missing, or as `from_config`.
            RuntimeError: If the weights are not those of a model of this config; it names them.
        """
        place = Path(folder)
        weights = next((p for p in (place / "model.safetensors", place / "pytorch_model.bin") if p.is_file()), None)
        if weights is None or not (place / "config.json").is_file():
            found = sorted(p.name for p in place.iterdir()) if place.is_dir() else "no such folder"
            raise ValueError(
                f"folder={str(folder)!r}: must be a folder with config.json, and model.safetensors or "
                f"pytorch_model.bin; there is {found}"
            )
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        model = cls.from_config(config, device="meta", dtype=dtype)
        model = model.to_empty(device=device or torch.get_default_device())
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
        return model

    def forward(
        self, ids: Tensor, *, seq_idx: Tensor | None = None, cache: Sequence[StateCache] | None = None
    ) -> Tensor:
        """Logits (batch, length, V) of ids (batch, length).

        Args:
            ids: Tokens; with a cache, those behind the ones it has seen.
            seq_idx: (batch, length), integers: packed texts, none of which sees another. See `seq_idx_from_cu_seqlens`
                and `seq_idx_from_position_ids` in `archzoo.layers.mamba`.
            cache: One for each block, of `new_cache`.
        """
        logits: Tensor = self.lm_head(self.backbone(ids, seq_idx=seq_idx, cache=cache))
        return logits

    def new_cache(self) -> list[StateCache]:
        """An empty cache for each block: once it has seen a token, a state, whose size does not grow."""
        return [StateCache() for _ in self._blocks]

    def next_logits(self, ids: Tensor, cache: Sequence[StateCache]) -> Tensor:
        """Logits (B, vocab_size) of the token behind ids (B, L), which follow those that the cache has seen.

        Those of rows that only pad the vocabulary are left out.
        """
        logits: Tensor = self.lm_head(self.backbone(ids, cache=cache)[:, -1])[:, : self.vocab_size]
        return logits

    def no_weight_decay(self) -> set[str]:
        """Names of what weight decay leaves alone, for timm's `create_optimizer_v2`: vectors, and what mixers name."""
        vectors = {name for name, parameter in self.named_parameters() if parameter.dim() <= 1}
        named = (
            f"backbone.layers.{i}.{name}" for i, block in enumerate(self._blocks) for name in block.no_weight_decay()
        )
        return vectors.union(named)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        rows = f"{self.vocab_size} of {self.lm_head.out_features} rows, {self.dim}, depth={len(self._blocks)}"
        return f"{rows}, layer={self.layer!r}, tie_embeddings={self.tie_embeddings}"


def _take_other_names(
    model: MambaLM,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Gives what is to be loaded this model's names, and completes a pair that is tied."""
    ours, head, theirs = prefix + _EMBEDDING, prefix + _HEAD, prefix + _THEIR_EMBEDDING
    if theirs in state_dict and ours not in state_dict:
        state_dict[ours] = state_dict.pop(theirs)
    if not model.tie_embeddings:
        return
    one, other = state_dict.get(ours), state_dict.get(head)
    if one is None and other is not None:
        state_dict[ours] = other
    elif other is None and one is not None:
        state_dict[head] = one
    elif one is not None and other is not None and not _equal(one, other):
        errors.append(f"{ours} and {head} differ: load them into a model with tie_embeddings=False, this one's is True")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are, NaN included: a model that has diverged can be looked at too."""
    if a.is_meta or b.is_meta or a.data_ptr() == b.data_ptr():
        return a.shape == b.shape
    return a.shape == b.shape and torch.allclose(a, b.to(a), rtol=0, atol=0, equal_nan=True)


def _tie_again(model: MambaLM, incompatible_keys: Any) -> None:
    """After `load_state_dict(assign=True)`, which makes two parameters of one."""
    model._tie()


# --- For the trainer --------------------------------------------------------------------------------------------------


def mamba_lm(
    layer: LayerFactory,
    input_shape: tuple[int, ...],
    output_size: int,
    *,
    width: int = 512,
    depth: int = 8,
    widths: tuple[int, ...] | None = None,
    dim: int | None = None,
    tie_embeddings: bool = True,
) -> MambaLM:
    """A `MambaLM` for a task with tokens, of `mamba` or `mamba2` and with their options; nothing is padded.

    Args:
        layer: The mixer.
        input_shape: (context,); the model takes texts of any length.
        output_size: Number of different tokens.
        width: Four times the size of a token, as the hidden width of a transformer is.
        depth: Number of blocks; two stand for one of a transformer.
        widths: The width for each block, instead of `width` and `depth`; all are the same.
        dim: Size of a token, instead of a quarter of the width.
        tie_embeddings: As in `MambaLM`.

    Shape: (batch, length), integers below output_size, -> (batch, length, output_size).

    Raises:
        ValueError: If an option is out of range, or the layer is another.
    """
    name = layer.entry.name
    if name not in LAYERS:
        raise ValueError(
            f"model 'mamba_lm' is made of 'mamba' or 'mamba2', not of {name!r}; model 'decoder' takes other mixers"
        )
    if len(input_shape) != 1:
        raise ValueError(f"model 'mamba_lm' takes tokens (length,), not inputs of shape {input_shape}")
    chosen, dim = token_sizes(width, depth, widths, dim)
    if len(set(chosen)) > 1:
        raise ValueError(f"widths={chosen}: must all be the same, for tokens have one size in all blocks")
    return MambaLM(
        output_size,
        dim,
        len(chosen),
        layer=name,
        pad_vocab_size_multiple=1,
        tie_embeddings=tie_embeddings,
        **layer.options,
    )


mamba_lm.takes_tokens = True  # type: ignore[attr-defined]  # the trainer refuses a task that does not go with it
register_model("mamba_lm")(mamba_lm)
