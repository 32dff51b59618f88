r"""Mamba: a selective state space layer in the place of self-attention (https://arxiv.org/abs/2312.00752).

A linear recurrence h_t = a_t h_{t-1} + Delta_t B_t x_t, y_t = C_t h_t + D x_t, whose step size Delta and whose B and C
are functions of the token: it chooses what to keep. Time and memory are linear in the length, and a token costs the
same at any place of a text.

Paper and code differ: the paper discretises B by (a - 1) / A B, the code of its authors by Delta B. The code is
followed, and its names: a state dict of `mamba_ssm.Mamba` loads as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import autocast_dtype
from archzoo.kernels._scan import check_seq_idx, check_shape
from archzoo.kernels.causal_conv1d import causal_conv1d
from archzoo.layers._check import check_positive, check_token, check_tokens, check_whole, typed
from archzoo.layers._mamba import (
    _Selective,
    check_inner_channels,
    check_mask,
    filter_step,
    last_inputs,
    masked,
    resolve_dt_rank,
)
from archzoo.layers.mamba2 import Mamba2
from archzoo.registry import Card, register_layer

State = tuple[Tensor, Tensor]

_PAPER: dict[str, Any] = {
    "title": "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    "authors": "Albert Gu, Tri Dao",
    "year": 2023,
    "arxiv": "2312.00752",
    "headline": "Pile, 300 B tokens, mean of six zero-shot tasks: 130M 44.7 % (Pythia-160M 40.6 %), 2.8B 63.3 %; "
    "selective copying, length 4096: 99.8 %",
}


@register_layer(
    "selective_ssm",
    kind="mixer",
    nonlinear=True,
    card=Card(
        equation=r"h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t, \quad y_t = C_t h_t + D x_t",
        reproduced="none of the paper's tasks with the bare scan",
        **_PAPER,
    ),
)
class SelectiveSSM(_Selective):
    r"""The selective scan alone, S6: $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t x_t$, $y_t = C_t h_t + D x_t$.

    No projections, no convolution and no gate around it. Delta = softplus(W_dt W_low x + b), B and C are linear in x.

    Parameters: `x_proj.weight` (R + 2 N, dim), rows of Delta, B and C; `dt_proj.weight` (dim, R) and `dt_proj.bias`
    (dim,); `A_log` (dim, N) with A = -exp(A_log); `D` (dim,). A_log and D are float32 at least, whatever the dtype.

    Args:
        dim: Size of a token, and number of channels.
        d_state: Number N of states a channel.
        dt_rank: Rank R of the step sizes; `"auto"`: dim / 16, rounded up.
        dt_min: Least step size at the start.
        dt_max: Largest step size at the start; they are drawn evenly on a logarithmic scale.
        dt_init: `"random"` or `"constant"`: how the rows of dt_proj start, U(-s, s) or s with s = dt_scale / sqrt(R).
        dt_scale: As above.
        dt_init_floor: A bound of initial step sizes from below.
        device: Of the parameters.
        dtype: Of all parameters but A_log and D.

    Attributes:
        causal: True: no token sees a later one.

    Shape: (batch, length, dim) -> (batch, length, dim), causal. Under autocast the output has autocast's dtype, while
    the state and its parameters stay float32.

    Raises:
        ValueError: If a size is no whole number, 1 or more, or an option is out of range; in `forward`, if the input is
            not (batch, length, dim) in the layer's dtype.
    """

    @typed
    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_whole(dim=dim)
        dt = (dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        super().__init__(dim, d_state, dt, {"device": device, "dtype": dtype})
        self.dim, self.dt_rank, self.causal = dim, resolve_dt_rank(dt_rank, dim), True
        self._make_scan(self.dt_rank)

    def reset_parameters(self) -> None:
        """Draws everything anew, from torch's global generator."""
        self._reset_scan()

    def forward(
        self, x: Tensor, *, seq_idx: Tensor | None = None, state: Tensor | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mixes the tokens of each sequence.

        Args:
            x: (batch, length, dim).
            seq_idx: (batch, length), integers: packed sequences; where they change, the state starts from zero.
            state: (batch, dim, N) to go on from; it belongs to the sequence of the first token.
            return_state: Whether to return the last state too.
        """
        check_tokens(x, self.dim, self.x_proj.weight)
        y, last = self._scan(x, None, seq_idx, state)
        y = y.to(autocast_dtype(y))
        return (y, last) if return_state else y

    def allocate_inference_cache(self, batch_size: int, dtype: torch.dtype | None = None) -> Tensor:
        """A state (batch, dim, N) of zeros for `step`; by default in the dtype of D."""
        return self.D.new_zeros(batch_size, self.dim, self.d_state, dtype=dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token x (batch, 1, dim), after a state (batch, dim, N), which is updated in place and returned."""
        check_token(x, self.x_proj.weight, self.dim)
        check_shape("state", state, (x.shape[0], self.dim, self.d_state))
        y = self._scan_step(x.squeeze(1), None, state)
        return y.to(autocast_dtype(y)).unsqueeze(1), state

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.dim}, d_state={self.d_state}, dt_rank={self.dt_rank}"


@register_layer(
    "mamba",
    kind="mixer",
    nonlinear=True,
    card=Card(
        equation=r"y = W_{out} (\mathrm{SSM}(\phi(\mathrm{conv}(W_x h))) \odot \phi(W_z h)), \; \phi(v) = v \sigma(v)",
        reproduced="small versions, two blocks of width 32, 3 seeds: selective copying (3 tokens among 16 positions) "
        "99.8 %, solved by all (experiment selective_copying); induction heads, trained at length 32: 100 %, and 98 to "
        "100 % up to eight times that length (experiment induction_heads). Four pairs of associative recall: not "
        "learned in 900 steps, where attention has them (experiment associative_recall). Bytes of Python sources at "
        "equal parameters: 1.9 bits a byte against 2.8 of attention, after 400 steps (experiment mamba_vs_attention)",
        **_PAPER,
    ),
)
class Mamba(_Selective):
    r"""Mamba's mixer: $y = W_{out} (\mathrm{SSM}(\phi(\mathrm{conv}(W_x h))) \odot \phi(W_z h))$, with $\phi$ the SiLU.

    Stands in for self-attention and the MLP behind it; about 3 expand dim^2 parameters.

    Parameters, with d = expand dim, as in `mamba_ssm.Mamba`: `in_proj.weight` (2 d, dim), rows of x and of z, `in_proj.
    bias` if bias; `conv1d.weight` (d, 1, d_conv), `conv1d.bias` if conv_bias; `x_proj.weight` (R + 2 N, d); `dt_proj.
    weight` (d, R), `dt_proj.bias` (d,); `A_log` (d, N) with A = -exp(A_log); `D` (d,); `out_proj.weight` (dim, d),
    `out_proj.bias` if bias. With `bidirectional="separate"` also `conv1d_b`, `x_proj_b`, `dt_proj_b`, `A_b_log` and
    `D_b`, as in Vision Mamba.

    A_log and D are float32 at least, whatever the dtype, and so is all arithmetic of the scan. `module.to(torch.
    bfloat16)` casts them too, and is known to diverge in training: keep float32 parameters, and use autocast.

    Args:
        dim: Size of a token.
        d_state: Number N of states a channel.
        d_conv: Number of tokens that the convolution sees.
        expand: Number of channels, as a multiple of dim; expand dim is rounded down.
        dt_rank: Rank R of the step sizes; `"auto"`: dim / 16, rounded up.
        dt_min: Least step size at the start.
        dt_max: Largest step size at the start; they are drawn evenly on a logarithmic scale.
        dt_init: `"random"` or `"constant"`: how the rows of dt_proj start, U(-s, s) or s with s = dt_scale / sqrt(R).
        dt_scale: As above.
        dt_init_floor: A bound of initial step sizes from below.
        conv_bias: Whether the convolution has a bias.
        bias: Whether in_proj and out_proj have one.
        layer_idx: Place of the layer in a model, for those who keep states by it; shown, and otherwise without effect.
        bidirectional: None: causal. `"shared"`: the mean of this and of the same scan over the reversed sequence, with
            the same parameters; `"separate"`: with a second set of them. Then there is no state to go on from.
        device: Of the parameters.
        dtype: Of all parameters but A_log and D.

    Attributes:
        causal: Whether no token sees a later one: unless the layer is bidirectional.

    Shape: (batch, length, dim) -> (batch, length, dim). Under autocast the output has autocast's dtype, while the state
    and its parameters stay float32.

    Raises:
        ValueError: If a size is no whole number, 1 or more, or an option is out of range; in `forward`, if the input is
            not (batch, length, dim) in the layer's dtype, or a state is given to a layer that is bidirectional.
    """

    in_proj: nn.Linear
    out_proj: nn.Linear
    conv1d: nn.Conv1d

    @typed
    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        layer_idx: int | None = None,
        bidirectional: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_whole(dim=dim, d_conv=d_conv)
        check_positive(expand=expand)
        if bidirectional not in (None, "shared", "separate"):
            raise ValueError(f"bidirectional={bidirectional!r}: must be None, 'shared' or 'separate'")
        d = int(expand * dim)
        check_inner_channels(d, expand, dim)
        dt = (dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        super().__init__(d, d_state, dt, {"device": device, "dtype": dtype})
        self.dim, self.d_conv, self.expand, self.layer_idx = dim, d_conv, expand, layer_idx
        self.dt_rank, self.bidirectional = resolve_dt_rank(dt_rank, dim), bidirectional
        self.causal = bidirectional is None
        self.in_proj = nn.Linear(dim, 2 * d, bias=bias, **self._factory)
        for suffix in self._suffixes:
            conv = nn.Conv1d(d, d, d_conv, groups=d, padding=d_conv - 1, bias=conv_bias, **self._factory)
            self.add_module(f"conv1d{suffix}", conv)
            self._make_scan(self.dt_rank, suffix)
        self.out_proj = nn.Linear(d, dim, bias=bias, **self._factory)

    @property
    def _suffixes(self) -> tuple[str, ...]:
        """Of the sets of parameters."""
        return ("", "_b") if self.bidirectional == "separate" else ("",)

    def reset_parameters(self) -> None:
        """Draws everything anew, from torch's global generator."""
        self.in_proj.reset_parameters()
        for suffix in self._suffixes:
            getattr(self, f"conv1d{suffix}").reset_parameters()
            self._reset_scan(suffix)
        self.out_proj.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        seq_idx: Tensor | None = None,
        mask: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """Mixes the tokens of each sequence.

        Args:
            x: (batch, length, dim).
            seq_idx: (batch, length), integers: packed sequences, whose borders neither the convolution nor the scan
                crosses. See `seq_idx_from_cu_seqlens` and `seq_idx_from_position_ids`.
            mask: (batch, length), False or 0 at tokens that pad a sequence on its left: they then leave no trace in
                the state. Padding on the right needs none, for nothing looks ahead.
            state: A pair as `return_state` gives, to go on from, gradients included: chunks of a long sequence, one
                after the other, equal the whole. It belongs to the sequence of the first token.
            return_state: Whether to return (output, (conv_state, ssm_state)): the last d_conv inputs of the convolution
                (batch, d, d_conv), and the last state of the scan (batch, d, N).
        """
        check_tokens(x, self.dim, self.in_proj.weight)
        batch, length, _ = x.shape
        check_seq_idx(seq_idx, batch, length)
        check_mask(mask, batch, length)
        if state is not None or return_state:
            self._check_causal()
        if state is not None:
            check_shape("state[0]", state[0], (batch, self.d_inner, self.d_conv))
        u, z = self.in_proj(x).chunk(2, -1)
        y, last = self._branch(u, z, seq_idx, mask, state)
        if not self.causal:
            seq_idx, mask = (None if t is None else t.flip(1) for t in (seq_idx, mask))
            back, _ = self._branch(u.flip(1), z.flip(1), seq_idx, mask, None, self._suffixes[-1])
            y = (y + back.flip(1)) / 2  # a sum is known to overflow in float16
        y = self.out_proj(y)
        if not return_state:
            return y
        return y, (last_inputs(masked(u, mask), self.d_conv, None if state is None else state[0], seq_idx), last)

    def _branch(
        self,
        u: Tensor,
        z: Tensor,
        seq_idx: Tensor | None,
        mask: Tensor | None,
        state: State | None,
        suffix: str = "",
    ) -> tuple[Tensor, Tensor]:
        """Convolution, scan and gate in one direction."""
        conv: nn.Conv1d = getattr(self, f"conv1d{suffix}")
        conv_state, ssm_state = (None, None) if state is None else state
        v = causal_conv1d(
            masked(u, mask).mT, conv.weight.squeeze(1), conv.bias, "silu", seq_idx=seq_idx, initial_state=conv_state
        ).mT
        return self._scan(masked(v, mask), z, seq_idx, ssm_state, suffix)  # the bias has made values of zeros

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """States of zeros for `step`: conv_state (batch, d, d_conv) and ssm_state (batch, d, N).

        Args:
            batch_size: Number of sequences.
            max_seqlen: Without effect, for the states do not grow; callers of `mamba_ssm` pass it.
            dtype: Of both; by default the layer's, and for ssm_state float32 at least.
        """
        self._check_causal()
        conv_state = self.conv1d.weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        return conv_state, self.D.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token x (batch, 1, dim) after the states, which are updated in place and returned with the output.

        As many steps equal one `forward`. Under `torch.no_grad()` a token costs the same at any place; with gradients
        the states carry the graph of all steps so far.
        """
        self._check_causal()
        check_token(x, self.in_proj.weight, self.dim)
        check_shape("conv_state", conv_state, (x.shape[0], self.d_inner, self.d_conv))
        check_shape("ssm_state", ssm_state, (x.shape[0], self.d_inner, self.d_state))
        u, z = self.in_proj(x.squeeze(1)).chunk(2, -1)
        y = self._scan_step(filter_step(u, conv_state, self.conv1d), z, ssm_state)
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def _check_causal(self) -> None:
        if not self.causal:
            raise ValueError(f"bidirectional={self.bidirectional!r}: such a layer has no state; None has one")

    def extra_repr(self) -> str:
        """Sizes, and what differs from the defaults."""
        text = f"{self.dim}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}, dt_rank={self.dt_rank}"
        usual = {"layer_idx": None, "bidirectional": None}
        return text + "".join(f", {k}={getattr(self, k)!r}" for k, v in usual.items() if getattr(self, k) != v)


class MambaBlock(nn.Module):
    r"""A layer of a Mamba model: $x + \mathrm{mixer}(\mathrm{norm}(x))$, with RMS norm.

    Modules: `norm` and `mixer`, as in the official state dicts.

    Args:
        dim: Size of a token.
        mixer: `"mamba"` or `"mamba2"`.
        norm_eps: Epsilon of the norm.
        residual_in_fp32: Whether the sum, and so what flows from block to block, is float32 at least.
        device: Of the parameters.
        dtype: As in the mixer.
        mixer_arguments: Everything else that `Mamba` or `Mamba2` takes.

    Shape: (batch, length, dim) -> (batch, length, dim).

    Raises:
        ValueError: If there is no such mixer; and as the mixer.
    """

    mixer: Mamba | Mamba2

    @typed
    def __init__(
        self,
        dim: int,
        *,
        mixer: str = "mamba",
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer_arguments: Any,
    ):
        super().__init__()
        mixers: dict[str, type[Mamba | Mamba2]] = {"mamba": Mamba, "mamba2": Mamba2}
        check_whole(dim=dim)
        check_positive(norm_eps=norm_eps)
        if mixer not in mixers:
            raise ValueError(f"mixer={mixer!r}: must be one of {', '.join(map(repr, mixers))}")
        self.residual_in_fp32 = residual_in_fp32
        self.norm = nn.RMSNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.mixer = mixers[mixer](dim, device=device, dtype=dtype, **mixer_arguments)

    def reset_parameters(self) -> None:
        """Draws both modules anew."""
        self.norm.reset_parameters()
        self.mixer.reset_parameters()

    def forward(self, x: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, State]:
        """As the mixer's `forward`, with all its arguments."""
        y = self.mixer(self._normed(x), **arguments)
        if isinstance(y, tuple):
            return self._sum(x, y[0]), y[1]
        return self._sum(x, y)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the mixer's `step`."""
        y, conv_state, ssm_state = self.mixer.step(self._normed(x), conv_state, ssm_state)
        return self._sum(x, y), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """As the mixer's `allocate_inference_cache`."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm."""
        return {f"mixer.{name}" for name in self.mixer.no_weight_decay()}

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm(x.to(self.norm.weight.dtype))

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.to(torch.promote_types(x.dtype, torch.float32)) if self.residual_in_fp32 else x) + y

    def extra_repr(self) -> str:
        """Where the sum is float32."""
        return f"residual_in_fp32={self.residual_in_fp32}" if self.residual_in_fp32 else ""


def seq_idx_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """The index of its sequence for every token of a packed row, from where sequences begin and end.

    Args:
        cu_seqlens: (sequences + 1,), integers from 0 on, as flash attention takes them. Tokens behind the last one,
            padding, make a sequence of their own.
        length: Of the row.

    Returns:
        seq_idx (1, length), int32.

    Raises:
        ValueError: If cu_seqlens is not one row of integers.

    >>> seq_idx_from_cu_seqlens(torch.tensor([0, 2, 5]), 6).tolist()
    [[0, 0, 1, 1, 1, 2]]
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens of shape {tuple(cu_seqlens.shape)} and {cu_seqlens.dtype}: must be integers (n,)")
    steps = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True, out_int32=True).unsqueeze(0)


def seq_idx_from_position_ids(position_ids: Tensor) -> Tensor:
    """The index of its sequence for every token: one begins wherever a position is not the one before plus 1.

    Args:
        position_ids: (batch, length), integers.

    Returns:
        seq_idx (batch, length), int32.

    Raises:
        ValueError: If position_ids is not of that shape, or not integer.

    >>> seq_idx_from_position_ids(torch.tensor([[0, 1, 0, 1, 2]])).tolist()
    [[0, 0, 1, 1, 1]]
    """
    if position_ids.dim() != 2 or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} and {position_ids.dtype}: must be (batch, length) and "
            "integers"
        )
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return F.pad(starts.cumsum(1, dtype=torch.int32), (position_ids.shape[1] - starts.shape[1], 0))
