"""A plain pre-norm GPT, and one with normalised queries and keys: what nGPT is compared with, of the same parts."""

from typing import Any

import torch

from archzoo.models.decoder import Decoder


class GPT(Decoder):
    """A decoder-only transformer: RMSNorm before each sub-block, rotary positions, SwiGLU, no biases.

    Matrices start as N(0, 0.02²), those that write to the residual stream divided by sqrt(2 depth), as in GPT-2.

    Args:
        vocab_size: Number V of tokens.
        dim: Size d of a token's vector.
        depth: Number of blocks.
        num_heads: As in `RotaryAttention`.
        hidden_dim: As in `GatedMLP`.
        qk_norm: As in `RotaryAttention`: the second baseline.
        dropout: Probability that a weight of attention, or a value behind attention or MLP, is dropped in training.
        tie_embeddings: Whether the head's weight is the embedding.
        device: Of the parameters.
        dtype: As `device`.
        attention_arguments: Further options of `RotaryAttention`.

    Attributes:
        embed: Embedding (V, d).
        blocks: `nn.ModuleList` of `DecoderBlock`s: norm1, mixer (`RotaryAttention`), norm2, mlp (`GatedMLP`).
        norm: The last RMSNorm.
        head: Linear layer with a weight (V, d).

    Shape: ids (batch, length) -> logits (batch, length, vocab_size); `attn_mask`, `position_ids` and `cache` as in
    `NGPT`.

    Raises:
        ValueError: If a size is no whole number, 1 or more, or as `RotaryAttention`; in `forward`, if the input is not
            (batch, length) of whole numbers.
        TypeError: If `RotaryAttention` has no such option.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        *,
        num_heads: int | None = None,
        hidden_dim: int | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention_arguments: Any,
    ):
        options = {"num_heads": num_heads, "qk_norm": qk_norm, "dropout": dropout, **attention_arguments}
        super().__init__(
            vocab_size,
            dim,
            depth,
            hidden_dim=hidden_dim,
            mixer_options=options,
            dropout=dropout,
            tie_embeddings=tie_embeddings,
            device=device,
            dtype=dtype,
        )
