r"""Mamba-2: the state space dual, a scan with one decay a head (https://arxiv.org/abs/2405.21060).

What Mamba does, with states that are larger and cheaper: all channels of a head decay together, and so a chunk of the
sequence is a few matrix products, those of a linear attention with C as queries, B as keys and x as values. B, C and
the step sizes come straight from the token, not from the filtered x as in Mamba: B and C pass through the short filter
beside x. Before the last projection stands a gated norm.

Names and shapes are those of `mamba_ssm.Mamba2`: its state dict loads as it is. Its fused filter wants d / headdim to
be a multiple of 8; here any number of heads will do.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._scan import check_seq_idx, check_shape
from archzoo.kernels._ssd import check_range
from archzoo.kernels.causal_conv1d import causal_conv1d
from archzoo.kernels.selective_state_update import state_update
from archzoo.kernels.ssd import ssd
from archzoo.layers._check import check_token, check_tokens, check_whole, typed
from archzoo.layers._mamba import (
    check_mask,
    check_step_sizes,
    filter_step,
    float32_at_least,
    last_inputs,
    masked,
    scan_heads,
    step_bias_like,
)
from archzoo.registry import Card, register_layer

NORM_EPS = 1e-5
State = tuple[Tensor, Tensor]


class GatedRMSNorm(nn.Module):
    r"""RMS norm of gated groups of channels, $\mathrm{norm}(y \odot \phi(z)) \odot w$, with $\phi$ the SiLU.

    Args:
        dim: Number of channels.
        groups: Number of groups, each with a norm of its own.
        norm_before_gate: Whether it is $\mathrm{norm}(y) \odot w \odot \phi(z)$ instead.
        device: Of the parameters.
        dtype: As `device`.

    Attributes:
        weight: (dim,), starts as 1.

    Shape: y and z (*, dim) -> (*, dim), in the dtype of y; arithmetic is float32 at least.

    Raises:
        ValueError: If a size is no whole number, 1 or more, or groups does not divide dim.
    """

    @typed
    def __init__(
        self,
        dim: int,
        *,
        groups: int = 1,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(dim=dim, groups=groups)
        if dim % groups:
            raise ValueError(f"groups={groups}: must be a divisor of dim={dim}")
        self.dim, self.groups, self.norm_before_gate = dim, groups, norm_before_gate
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every weight is 1."""
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Norms and gates y by z."""
        wide = torch.promote_types(torch.promote_types(y.dtype, self.weight.dtype), torch.float32)
        gate = F.silu(z.to(wide))
        out = y.to(wide) if self.norm_before_gate else y.to(wide) * gate
        grouped = out.unflatten(-1, (self.groups, -1))
        out = F.rms_norm(grouped, grouped.shape[-1:], eps=NORM_EPS).flatten(-2) * self.weight.to(wide)
        return (out * gate if self.norm_before_gate else out).to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes and order."""
        return f"{self.dim}, groups={self.groups}, norm_before_gate={self.norm_before_gate}"


@register_layer(
    "mamba2",
    kind="mixer",
    nonlinear=True,
    card=Card(
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
        "Duality",
        authors="Tri Dao, Albert Gu",
        year=2024,
        arxiv="2405.21060",
        equation=r"h_t = e^{\Delta_t a} h_{t-1} + \Delta_t x_t B_t^T, \; "
        r"y_t = W_{out} \mathrm{norm}((h_t C_t + D x_t) \odot \phi(z_t))",
        headline="core layer 2-8 times as fast as Mamba's, and competitive with Transformers in language modelling",
        reproduced="bytes of Python sources at equal parameters: 2.0 bits a byte against 2.8 of attention, after 400 "
        "steps (experiment mamba_vs_attention). None of the paper's sizes",
    ),
)
class Mamba2(nn.Module):
    r"""Mamba-2's mixer: $h_t = e^{\Delta_t a} h_{t-1} + \Delta_t x_t B_t^T$ in every head, then norm, gate, projection.

    With u the projected token: z, (x, B, C), dt = u; x, B, C = SiLU(conv(x, B, C)); Delta = softplus(dt + dt_bias);
    y_t = h_t C_t + D x_t; out = W_out norm(y SiLU(z)). Stands in for self-attention and the MLP behind it; about 3
    expand dim^2 parameters. B and C are no functions of the filtered x, as they are in Mamba: they pass through the
    filter beside it.

    Parameters, with d = expand dim, H = d / headdim, G = ngroups, N = d_state, as in `mamba_ssm.Mamba2`: `in_proj.
    weight` (2 d + 2 G N + H, dim), rows of z, x, B, C and dt, `in_proj.bias` if bias; `conv1d.weight` (d + 2 G N, 1,
    d_conv), `conv1d.bias` if conv_bias; `dt_bias` (H,); `A_log` (H,) with a = -exp(A_log); `D` (H,), or (d,) if
    D_has_hdim; `norm.weight` (d,) if rmsnorm; `out_proj.weight` (dim, d), `out_proj.bias` if bias.

    A_log, D and dt_bias are float32 at least, whatever the dtype, and so is all arithmetic of the scan. `module.to(
    torch.bfloat16)` casts them too, and is known to diverge in training: keep float32 parameters, and use autocast.

    Args:
        dim: Size of a token.
        d_state: Number N of states a channel.
        d_conv: Number of tokens that the filter sees.
        expand: Number d of channels, as a multiple of dim; expand dim is rounded down.
        headdim: Channels of a head; by default 64 if it divides d, else a quarter of the largest power of 2 that does.
        ngroups: Number G of groups of heads that share B and C.
        A_init_range: Least and largest decay -a at the start; they are drawn evenly.
        D_has_hdim: Whether each channel has its own D, rather than each head.
        rmsnorm: Whether there is a norm; without one the gate is all that stands before out_proj.
        norm_before_gate: Whether the gate comes behind the norm, norm(y) SiLU(z).
        dt_min: Least step size at the start.
        dt_max: Largest step size at the start; they are drawn evenly on a logarithmic scale.
        dt_init_floor: A bound of initial step sizes from below.
        dt_limit: Least and largest step size ever.
        bias: Whether in_proj and out_proj have one.
        conv_bias: Whether the filter has one.
        chunk_size: Steps of the scan that are done as one product; changes time and memory, not the result.
        device: Of the parameters.
        dtype: Of all parameters but A_log, D and dt_bias.

    Attributes:
        causal: True: no token sees a later one.

    Shape: (batch, length, dim) -> (batch, length, dim), causal. Under autocast the output has autocast's dtype, while
    the state and its parameters stay float32.

    Raises:
        ValueError: If a size is no whole number, 1 or more, headdim does not divide d or ngroups the number of heads,
            or an option is out of range; in `forward`, if the input is not (batch, length, dim) in the layer's dtype.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")
    """Those that are float32 at least, whatever the dtype: a decay a little below 1 is none in bfloat16."""

    @typed
    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(dim=dim, d_state=d_state, d_conv=d_conv, ngroups=ngroups, chunk_size=chunk_size)
        check_step_sizes(dt_min, dt_max, dt_init_floor)
        check_range(dt_limit=dt_limit)
        check_range(A_init_range=A_init_range)
        if not A_init_range[0] > 0:
            raise ValueError(f"A_init_range={A_init_range!r}: must be positive, for A is its negative")
        d, headdim, heads = scan_heads(dim, expand, headdim, ngroups)
        self.dim, self.d_inner, self.d_state, self.d_conv, self.expand = dim, d, d_state, d_conv, expand
        self.headdim, self.nheads, self.ngroups, self.chunk_size = headdim, heads, ngroups, chunk_size
        self.A_init_range, self.D_has_hdim = tuple(A_init_range), D_has_hdim
        self.dt_limit = (dt_limit[0], dt_limit[1])  # a config gives a list
        self.dt_min, self.dt_max, self.dt_init_floor, self.causal = dt_min, dt_max, dt_init_floor, True
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        filtered = d + 2 * ngroups * d_state
        self.in_proj = nn.Linear(dim, d + filtered + heads, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            filtered, filtered, d_conv, groups=filtered, padding=d_conv - 1, bias=conv_bias, **factory
        )
        self.dt_bias = nn.Parameter(torch.empty(heads, **float32_at_least(factory)))
        self.A_log = nn.Parameter(torch.empty(heads, **float32_at_least(factory)))
        self.D = nn.Parameter(torch.empty(d if D_has_hdim else heads, **float32_at_least(factory)))
        self.norm = GatedRMSNorm(d, groups=ngroups, norm_before_gate=norm_before_gate, **factory) if rmsnorm else None
        self.out_proj = nn.Linear(d, dim, bias=bias, **factory)
        self._fill()

    def reset_parameters(self) -> None:
        """Draws everything anew, from torch's global generator."""
        self.in_proj.reset_parameters()
        self.conv1d.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        self.out_proj.reset_parameters()
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        self.dt_bias.copy_(step_bias_like(self.dt_bias, self.dt_min, self.dt_max, self.dt_init_floor))
        self.A_log.uniform_(*self.A_init_range).log_()
        self.D.fill_(1)

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
            seq_idx: (batch, length), integers: packed sequences, whose borders neither the filter nor the scan crosses.
                See `seq_idx_from_cu_seqlens` and `seq_idx_from_position_ids`.
            mask: (batch, length), False or 0 at tokens that pad a sequence on its left: they then leave no trace in
                the state. Padding on the right needs none, for nothing looks ahead.
            state: A pair as `return_state` gives, to go on from, gradients included: chunks of a long sequence, one
                after the other, equal the whole. It belongs to the sequence of the first token.
            return_state: Whether to return (output, (conv_state, ssm_state)): the last d_conv inputs of the filter
                (batch, d + 2 G N, d_conv), and the last state of the scan (batch, H, headdim, N).
        """
        check_tokens(x, self.dim, self.in_proj.weight)
        batch, length, _ = x.shape
        check_seq_idx(seq_idx, batch, length)
        check_mask(mask, batch, length)
        conv_state, ssm_state = (None, None) if state is None else state
        check_shape("state[0]", conv_state, self._conv_shape(batch))
        check_shape("state[1]", ssm_state, self._ssm_shape(batch))
        z, u, dt = self._split(self.in_proj(x))
        u = masked(u, mask)
        weight = self.conv1d.weight.squeeze(1)
        v = causal_conv1d(u.mT, weight, self.conv1d.bias, "silu", seq_idx=seq_idx, initial_state=conv_state).mT
        inner, B, C = self._filtered(masked(v, mask))  # the bias has made values of zeros
        y, last = ssd(
            inner,
            dt,
            self._decay(),
            B,
            C,
            chunk_size=self.chunk_size,
            D=self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D,
            z=z.unflatten(-1, (self.nheads, self.headdim)) if self.norm is None else None,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=ssm_state,
            return_final_state=True,
            seq_idx=seq_idx,
        )
        out: Tensor = self.out_proj(self._normed(y.flatten(2), z))
        return (out, (last_inputs(u, self.d_conv, conv_state, seq_idx), last)) if return_state else out

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, what passes through the filter, and dt."""
        z, u, dt = projected.split([self.d_inner, self.conv1d.in_channels, self.nheads], -1)
        return z, u, dt

    def _filtered(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (*, H, headdim), B and C (*, G, N)."""
        states = self.ngroups * self.d_state
        x, B, C = v.split([self.d_inner, states, states], -1)
        B, C = (t.unflatten(-1, (self.ngroups, self.d_state)) for t in (B, C))
        return x.unflatten(-1, (self.nheads, self.headdim)), B, C

    def _decay(self) -> Tensor:
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _normed(self, y: Tensor, z: Tensor) -> Tensor:
        return y if self.norm is None else self.norm(y, z)

    def _conv_shape(self, batch: int) -> tuple[int, int, int]:
        return batch, self.conv1d.in_channels, self.d_conv

    def _ssm_shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.nheads, self.headdim, self.d_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """States of zeros for `step`: conv_state (batch, d + 2 G N, d_conv) and ssm_state (batch, H, headdim, N).

        Args:
            batch_size: Number of sequences.
            max_seqlen: Without effect, for the states do not grow; callers of `mamba_ssm` pass it.
            dtype: Of both; by default the layer's, and for ssm_state float32 at least.
        """
        conv_state = self.conv1d.weight.new_zeros(self._conv_shape(batch_size), dtype=dtype)
        return conv_state, self.D.new_zeros(self._ssm_shape(batch_size), dtype=dtype)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token x (batch, 1, dim) after the states, which are updated in place and returned with the output.

        As many steps equal one `forward`. Under `torch.no_grad()` a token costs the same at any place; with gradients
        the states carry the graph of all steps so far.
        """
        check_token(x, self.in_proj.weight, self.dim)
        check_shape("conv_state", conv_state, self._conv_shape(x.shape[0]))
        check_shape("ssm_state", ssm_state, self._ssm_shape(x.shape[0]))
        z, u, dt = self._split(self.in_proj(x.squeeze(1)))
        inner, B, C = self._filtered(filter_step(u, conv_state, self.conv1d))
        delta = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias).clamp(*self.dt_limit)
        gate = None if self.norm is not None else z.unflatten(-1, (self.nheads, self.headdim))
        # All channels and states of a head have one step size and one decay: axes of size 1 save all but one exp.
        D, A = self.D.view(self.nheads, -1), self._decay()[:, None, None]
        y = state_update(ssm_state, inner, delta.unsqueeze(-1), A, B, C, D, gate, None, False)
        return self.out_proj(self._normed(y.flatten(1), z)).unsqueeze(1), conv_state, ssm_state

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: decays and D by their meaning, the step sizes' bias."""
        return {"A_log", "D", "dt_bias"}

    def extra_repr(self) -> str:
        """Sizes, and what differs from the defaults."""
        text = f"{self.dim}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}, headdim={self.headdim}"
        usual = {"ngroups": 1, "D_has_hdim": False, "dt_limit": (0.0, math.inf)}
        return text + "".join(f", {k}={getattr(self, k)!r}" for k, v in usual.items() if getattr(self, k) != v)
