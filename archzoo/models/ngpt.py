"""NGPT, a language model on the hypersphere (https://arxiv.org/abs/2410.01131). Its parts: `archzoo/layers/ngpt.py`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.layers._cache import KeyValueCache, one_each
from archzoo.layers._check import check_positive, check_whole
from archzoo.layers.ngpt import NormalizedBlock
from archzoo.layers.normalized_linear import NormalizedEmbedding, NormalizedLinear, check_ids
from archzoo.models.decoder import hidden_widths
from archzoo.models.generation import CausalLM

_REFERENCE = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "att_c_proj": "out_proj"}


class NGPT(CausalLM):
    r"""nGPT: embedding of unit rows, `NormalizedBlock`s, and logits $z = s_z \circ W x$ with W of unit rows.

    At first each logit is a cosine, so that the loss is about log V. Train with Adam, without weight decay and warm-up,
    and call `archzoo.layers.ngpt.constrain_(model)` after each step; archzoo's training loop does. The best learning
    rate is several times that of a GPT of the same size, and does not transfer across sizes.

    Args:
        vocab_size: Number V of tokens.
        dim: Size d of a token's vector.
        depth: Number of blocks.
        num_heads: As in `NormalizedAttention`.
        hidden_dim: As in `NormalizedMLP`; or that of each block.
        logit_scale_init: Where s_z starts.
        logit_scale_scale: Where what is stored of s_z starts; by default 1 / sqrt(dim).
        tie_embeddings: Whether W is the embedding. The paper's are two.
        reparametrize: As in `NormalizedLinear`.
        device: Of the parameters.
        dtype: As `device`.
        block_arguments: Further options of `NormalizedBlock`, as alpha_init: with few blocks, 1 / depth.

    Attributes:
        embed: `NormalizedEmbedding` (V, d).
        blocks: `nn.ModuleList` of `NormalizedBlock`s.
        head: `NormalizedLinear` with W (V, d).
        logit_scale: What is stored of s_z, (V,).

    Shape: ids (batch, length) -> logits (batch, length, vocab_size).

    Raises:
        ValueError: If a size is no whole number, 1 or more, or as `NormalizedBlock`; in `forward`, if the input is not
            (batch, length) of whole numbers.
        TypeError: If `NormalizedBlock` has no such option.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        num_heads: int | None = None,
        hidden_dim: int | Sequence[int] | None = None,
        logit_scale_init: float = 1.0,
        logit_scale_scale: float | None = None,
        tie_embeddings: bool = False,
        reparametrize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_arguments: Any,
    ):
        super().__init__()
        check_whole(vocab_size=vocab_size, dim=dim, depth=depth)
        self.vocab_size, self.dim, self.tie_embeddings = vocab_size, dim, tie_embeddings
        self.logit_scale_init = logit_scale_init
        self.logit_scale_scale = dim**-0.5 if logit_scale_scale is None else logit_scale_scale
        check_positive(logit_scale_init=logit_scale_init, logit_scale_scale=self.logit_scale_scale)
        options: dict[str, Any] = {"reparametrize": reparametrize, "device": device, "dtype": dtype}
        self.embed = NormalizedEmbedding(vocab_size, dim, **options)
        self.blocks = nn.ModuleList(
            NormalizedBlock(dim, num_heads=num_heads, hidden_dim=hidden, **options, **block_arguments)
            for hidden in hidden_widths(hidden_dim, dim, depth)
        )
        self.head = NormalizedLinear(dim, vocab_size, bias=False, **options)
        if tie_embeddings:
            self.head.weight = self.embed.weight
        self.logit_scale: nn.Parameter | None = nn.Parameter(torch.empty(vocab_size, device=device, dtype=dtype))
        self._reset_scale()

    def reset_parameters(self) -> None:
        """Draws all matrices anew; s_z and the blocks' vectors as they start."""
        for module in (self.embed, *self.blocks, self.head):
            module.reset_parameters()
        self._reset_scale()

    def _reset_scale(self) -> None:
        if self.logit_scale is not None:
            nn.init.constant_(self.logit_scale, self.logit_scale_scale)

    def forward(
        self,
        ids: Tensor,
        *,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits (batch, length, vocab_size) of ids (batch, length).

        Args:
            ids: Tokens; with a cache, those behind the ones it has.
            attn_mask: As in `NormalizedAttention`, the same for all blocks.
            position_ids: As there.
            cache: One for each block, of `new_cache`.
        """
        return self._logits(self._states(ids, attn_mask, position_ids, cache))

    def _logits(self, h: Tensor) -> Tensor:
        logits: Tensor = self.head(h) if self.logit_scale is None else self.head(h, self._used_logit_scale())
        return logits

    def _states(
        self,
        ids: Tensor,
        attn_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        check_ids(ids, 2)
        h: Tensor = self.embed(ids)
        for block, own in zip(self.blocks, one_each(cache, len(self.blocks)), strict=True):
            h = block(h, attn_mask=attn_mask, position_ids=position_ids, cache=own)
        return h

    def _used_logit_scale(self) -> Tensor:
        assert self.logit_scale is not None
        return self.logit_scale * (self.logit_scale_init / self.logit_scale_scale)

    def new_cache(self) -> list[KeyValueCache]:
        """An empty cache for each block, to be given to `forward` with every piece of a sequence."""
        return [KeyValueCache() for _ in self.blocks]

    def next_logits(self, ids: Tensor, cache: Sequence[KeyValueCache]) -> Tensor:
        """Logits (B, V) of the token behind ids (B, L), which follow those that the cache has seen."""
        return self._logits(self._states(ids, cache=cache)[:, -1])

    def for_inference(self) -> "NGPT":
        """A folded copy."""
        return self.fold()

    @torch.no_grad()
    def fold(self) -> "NGPT":
        """A copy for inference that computes the same: plain layers, and s_u, s_ν and s_z in the rows of matrices.

        Its embeddings are no longer tied. What has been folded is not normalised any more: do not train it.
        """
        memo: dict[int, Any] = {}
        if self.logit_scale is not None:  # not folded yet
            memo[id(self.embed)] = self.embed.fold()
            memo[id(self.head)] = self.head._fold(self._used_logit_scale())
        memo |= {id(block): block.fold() for block in self.blocks}  # type: ignore[operator]
        folded = copy.deepcopy(self, memo).eval().requires_grad_(False)
        folded.logit_scale, folded.tie_embeddings = None, False
        return folded

    def no_weight_decay(self) -> set[str]:
        """Names of what weight decay must leave alone, for timm's `create_optimizer_v2`: all but matrices.

        These are normalised again after each step, so that decay does nothing for them, and no harm.
        """
        return {name for name, _ in self.named_parameters() if name.endswith(("_alpha", "_scale"))}

    def load_reference_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Loads a state dict of the authors' code (github.com/NVIDIA/ngpt, `use_nGPT=1`).

        Its values are taken as they are, cast to this model's dtype. They mean the same where the initial values and
        scales do: the authors' are this model's defaults, with scales of 1 / sqrt(n_embd). Outputs differ, though, for
        the authors' rotary embedding is no rotation (their issue 10): a checkpoint is a start for further training.

        Args:
            state_dict: As saved; prefixes of `torch.compile` and of DDP may be there.

        Raises:
            ValueError: If a tensor is missing, unknown, or of another shape.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            found.update(_ours(name.removeprefix("_orig_mod.").removeprefix("module."), tensor))
        wanted = self.state_dict()
        missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        if missing or unknown:
            raise ValueError(f"state_dict does not fit: missing {missing}, unknown {unknown}, by this model's names")
        for name, tensor in found.items():
            if tensor.shape != wanted[name].shape:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)}: must be {tuple(wanted[name].shape)}")
        self.load_state_dict(found)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.vocab_size}, {self.dim}, depth={len(self.blocks)}"


def _ours(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the authors' code under our names; one that has none there keeps its own."""
    whole = {"transformer.wte.weight": "embed.weight", "lm_head.weight": "head.weight", "sz": "logit_scale"}
    if name in whole:
        return {whole[name]: tensor}
    if not name.startswith("transformer.h."):
        return {name: tensor}
    index, _, own = name.removeprefix("transformer.h.").partition(".")
    block, part = f"blocks.{index}", own.removesuffix(".weight")
    if part in _REFERENCE:
        return {f"{block}.attn.{_REFERENCE[part]}.weight": tensor}
    if part in ("c_fc", "suv"):
        up, gate = tensor.chunk(2)
        kind = "proj.weight" if part == "c_fc" else "scale"
        return {f"{block}.mlp.up_{kind}": up, f"{block}.mlp.gate_{kind}": gate}
    others = {"mlp_c_proj": "mlp.down_proj.weight", "sqk": "attn.qk_scale"}
    return {f"{block}.{others.get(part, part)}": tensor}
