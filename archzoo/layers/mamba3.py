r"""Mamba-3: a scan by the trapezoidal rule, with states that turn (https://arxiv.org/abs/2603.15569).

What it adds to Mamba-2: each step weighs the inputs at both ends of its interval of time, which takes the place of the
short filter; the decay depends on the token, as the step size does; and B and C turn by angles that depend on the token
too. A real state with turned B and C is a complex one that rotates as it decays, and so can count modulo a number, as
parity needs, which states that only decay cannot. B and C are normed, and have a bias for each head.

This is the form with a single input and output a head, SISO. Names and shapes are those of `mamba_ssm.Mamba3` with
`is_mimo=False`: its state dict loads as it is.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import running_sum
from archzoo.kernels._scan import check_seq_idx, check_shape
from archzoo.kernels._ssd import sum_dtype
from archzoo.kernels.trapezoidal_ssd import trapezoidal_ssd, trapezoidal_state_update
from archzoo.layers._check import check_positive, check_token, check_tokens, check_whole, typed
from archzoo.layers._mamba import check_mask, check_step_sizes, float32_at_least, masked, scan_heads, step_bias_like
from archzoo.layers._rotary import rotate
from archzoo.layers.mamba2 import NORM_EPS, GatedRMSNorm
from archzoo.registry import Card, register_layer

ROPE_FRACTIONS = (0.5, 1)
State = tuple[Tensor, Tensor, Tensor, Tensor]


@register_layer(
    "mamba3",
    kind="mixer",
    nonlinear=True,
    card=Card(
        title="Mamba-3: Improved Sequence Modeling using State Space Principles",
        authors="Aakash Lahoti, Kevin Y. Li, Berlin Chen, Caitlin Wang, Aviv Bick, J. Zico Kolter, Tri Dao, Albert Gu",
        year=2026,
        arxiv="2603.15569",
        equation=r"h_t = \alpha_t h_{t-1} + \beta_t x_{t-1} B_{t-1}^T + \gamma_t x_t B_t^T, \; "
        r"y_t = W_{out} ((h_t C_t + D x_t) \odot \phi(z_t))",
        headline="1.5B parameters: 0.6 points of downstream accuracy above the next best model; the perplexity of "
        "Mamba-2 with half its states; solves parity, which Mamba-2 does not",
        reproduced="not yet",
    ),
)
class Mamba3(nn.Module):
    r"""Mamba-3's mixer: $h_t = \alpha_t h_{t-1} + \beta_t x_{t-1} B_{t-1}^T + \gamma_t x_t B_t^T$ in every head.

    With z, x, B, C, dt, A, trap, angle = u the projected token, of which B and C are shared by the heads of a group,
    dt, A and trap are a number a head, and angle is shared by all heads:
    Delta = softplus(dt + dt_bias); a = min(-f(A), -A_floor), with f(v) = 1 + v for v >= 0 and 1 / (1 - v) below;
    lambda = sigmoid(trap); theta_t = theta_{t-1} + pi tanh(angle) Delta, modulo 2 pi;
    B = R(theta) (norm(B) + B_bias), C likewise, with R turning each pair (2 i, 2 i + 1) for which there is an angle;
    alpha = exp(a Delta), beta = (1 - lambda) Delta alpha, gamma = lambda Delta;
    y_t = h_t C_t + D x_t; out = W_out (y SiLU(z)).
    Stands in for self-attention and the MLP behind it; about 3 expand dim^2 parameters.

    Parameters, with d = expand dim, H = d / headdim, G = ngroups, N = d_state and S the number of angles, as in
    `mamba_ssm.Mamba3`: `in_proj.weight` (2 d + 2 G N + 3 H + S, dim), rows of z, x, B, C, dt, A, trap and angle;
    `dt_bias` (H,); `B_norm.weight` and `C_norm.weight` (N,); `B_bias` and `C_bias` (H, 1, N), the axis of size 1 being
    the rank of the form with many inputs; `D` (H,); `norm.weight` (d,) if is_outproj_norm; `out_proj.weight` (dim, d).

    D, dt_bias, B_bias and C_bias are float32 at least, whatever the dtype, and so is all arithmetic between the two
    projections. `module.to(torch.bfloat16)` casts them too: keep float32 parameters, and use autocast.

    Args:
        dim: Size of a token.
        d_state: Number N of states a channel.
        expand: Number d of channels, as a multiple of dim; expand dim is rounded down.
        headdim: Channels of a head; by default 64 if it divides d, else a quarter of the largest power of 2 that does.
        ngroups: Number G of groups of heads that share B and C, but for their biases and angles.
        rope_fraction: The part of B and C that turns: 0.5 or 1. There are S = floor(rope_fraction N / 2) pairs.
        is_outproj_norm: Whether out_proj sees norm(y) SiLU(z), each head having an RMS norm of its own.
        A_floor: Least decay -a ever.
        dt_min: Least step size at the start.
        dt_max: Largest step size at the start; they are drawn evenly on a logarithmic scale.
        dt_init_floor: A bound of initial step sizes from below.
        chunk_size: Steps of the scan that are done as one product; changes time and memory, not the result.
        device: Of the parameters.
        dtype: Of all parameters but D, dt_bias, B_bias and C_bias.

    Attributes:
        causal: True: no token sees a later one.

    Shape: (batch, length, dim) -> (batch, length, dim), causal. Under autocast the output has autocast's dtype, while
    the state and its parameters stay float32.

    Raises:
        ValueError: If a size is no whole number, 1 or more, headdim does not divide d or ngroups the number of heads,
            no pair is left to turn, or an option is out of range; in `forward`, if the input is not (batch, length,
            dim) in the layer's dtype.
    """

    float32_parameters: ClassVar[tuple[str, ...]] = ("D", "dt_bias", "B_bias", "C_bias")
    """Those that are float32 at least, whatever the dtype, as in `mamba_ssm`."""

    @typed
    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 128,
        expand: float = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        is_outproj_norm: bool = False,
        A_floor: float = 1e-4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        chunk_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(dim=dim, d_state=d_state, ngroups=ngroups, chunk_size=chunk_size)
        check_positive(A_floor=A_floor)
        check_step_sizes(dt_min, dt_max, dt_init_floor)
        if rope_fraction not in ROPE_FRACTIONS:
            raise ValueError(f"rope_fraction={rope_fraction!r}: must be 0.5 or 1")
        angles = int(rope_fraction * d_state) // 2
        if angles < 1:
            raise ValueError(f"d_state={d_state}: no pair turns; must be {round(2 / rope_fraction)} or more")
        d, headdim, heads = scan_heads(dim, expand, headdim, ngroups)
        self.dim, self.d_inner, self.d_state, self.expand, self.chunk_size = dim, d, d_state, expand, chunk_size
        self.headdim, self.nheads, self.ngroups, self.num_angles = headdim, heads, ngroups, angles
        self.rope_fraction, self.is_outproj_norm, self.A_floor = rope_fraction, is_outproj_norm, A_floor
        self.dt_min, self.dt_max, self.dt_init_floor, self.causal = dt_min, dt_max, dt_init_floor, True
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        float32 = float32_at_least(factory)
        self._parts = [d, d, ngroups * d_state, ngroups * d_state, heads, heads, heads, angles]
        self.in_proj = nn.Linear(dim, sum(self._parts), bias=False, **factory)
        self.dt_bias = nn.Parameter(torch.empty(heads, **float32))
        self.B_bias = nn.Parameter(torch.empty(heads, 1, d_state, **float32))
        self.C_bias = nn.Parameter(torch.empty(heads, 1, d_state, **float32))
        self.B_norm = nn.RMSNorm(d_state, eps=NORM_EPS, **factory)
        self.C_norm = nn.RMSNorm(d_state, eps=NORM_EPS, **factory)
        self.D = nn.Parameter(torch.empty(heads, **float32))
        self.norm = GatedRMSNorm(d, groups=heads, norm_before_gate=True, **factory) if is_outproj_norm else None
        self.out_proj = nn.Linear(d, dim, bias=False, **factory)
        self._fill()

    def reset_parameters(self) -> None:
        """Draws everything anew, from torch's global generator."""
        self.in_proj.reset_parameters()
        self.B_norm.reset_parameters()
        self.C_norm.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        self.out_proj.reset_parameters()
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        self.dt_bias.copy_(step_bias_like(self.dt_bias, self.dt_min, self.dt_max, self.dt_init_floor))
        for parameter in (self.B_bias, self.C_bias, self.D):
            parameter.fill_(1)

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
            seq_idx: (batch, length), integers: packed sequences, whose borders nothing crosses; each starts at angle 0.
                See `seq_idx_from_cu_seqlens` and `seq_idx_from_position_ids`.
            mask: (batch, length), False or 0 at tokens that pad a sequence on its left: they then leave no trace in
                the state. Padding on the right needs none, for nothing looks ahead.
            state: Four tensors as `return_state` gives, to go on from, gradients included: chunks of a long sequence,
                one after the other, equal the whole. It belongs to the sequence of the first token.
            return_state: Whether to return (output, (theta, h, B, x)): the last angles (batch, H, S), the last state
                of the scan (batch, H, headdim, N), and of the last token B, turned, (batch, H, N) and x (batch, H,
                headdim).
        """
        check_tokens(x, self.dim, self.in_proj.weight)
        batch, length, _ = x.shape
        check_seq_idx(seq_idx, batch, length)
        check_mask(mask, batch, length)
        if state is not None:
            for i, (part, shape) in enumerate(zip(state, self._state_shapes(batch), strict=True)):
                check_shape(f"state[{i}]", part, shape)
        z, u, B, C, delta, A, trap, turn = self._selected(self.in_proj(x), mask)
        theta, theta_last = _angles(turn, None if state is None else state[0], seq_idx)
        y, (h, B_last, x_last) = trapezoidal_ssd(
            u,
            delta,
            A,
            trap,
            *self._turned(B, C, theta),
            chunk_size=self.chunk_size,
            D=self.D,
            initial_state=None if state is None else state[1:],
            return_final_state=True,
            seq_idx=seq_idx,
        )
        out: Tensor = self.out_proj(self._gated(y.flatten(2), z))
        return (out, (theta_last, h, B_last, x_last)) if return_state else out

    def _selected(self, projected: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """z (*, d), x (*, H, headdim), B and C (*, H, N) before they turn, Delta, A and lambda (*, H), turns (*, H, S).

        Of tokens that the mask leaves out x and Delta are 0, so that they change neither state nor angle.
        """
        wide = torch.promote_types(projected.dtype, torch.float32)
        z, x, B, C, dt, A, trap, angle = projected.split(self._parts, -1)
        delta = masked(F.softplus(dt.to(wide) + self.dt_bias.to(wide)), mask)
        A = A.to(wide)
        # f, with its slope of 1 at 0 too, where that of clamp is not the same in all versions of torch.
        decay = torch.where(A >= 0, 1 + A, (1 + A.abs()).reciprocal())
        turn = (math.pi * torch.tanh(angle.to(wide))).unsqueeze(-2) * delta.unsqueeze(-1)
        return (
            z,
            masked(x, mask).unflatten(-1, (self.nheads, self.headdim)),
            self._of_heads(B.to(wide), self.B_norm.weight, self.B_bias),
            self._of_heads(C.to(wide), self.C_norm.weight, self.C_bias),
            delta,
            -decay.clamp(min=self.A_floor),
            torch.sigmoid(trap.to(wide)),
            turn,
        )

    def _of_heads(self, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """B or C (*, G N), normed, with the bias of each head: (*, H, N)."""
        normed = F.rms_norm(
            t.unflatten(-1, (self.ngroups, self.d_state)), (self.d_state,), weight.to(t.dtype), NORM_EPS
        )
        by_group = bias.to(t.dtype).view(self.ngroups, -1, self.d_state)
        return (normed.unsqueeze(-2) + by_group).flatten(-3, -2)

    def _turned(self, B: Tensor, C: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """B and C (*, H, N), the first 2 S states turned by angles (*, H, S)."""
        table = torch.stack((theta.cos(), theta.sin()), -1)
        turning = 2 * self.num_angles
        if turning == self.d_state:
            return rotate(B, table), rotate(C, table)
        return (
            torch.cat([rotate(B[..., :turning], table), B[..., turning:]], -1),
            torch.cat([rotate(C[..., :turning], table), C[..., turning:]], -1),
        )

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        """What out_proj sees, of y and z (*, d)."""
        if self.norm is not None:
            gated: Tensor = self.norm(y, z)
            return gated
        wide = torch.promote_types(y.dtype, torch.float32)
        return (y.to(wide) * F.silu(z.to(wide))).to(y.dtype)

    def _state_shapes(self, batch: int) -> tuple[tuple[int, ...], ...]:
        """Of theta, h, B and x."""
        H, P, N = self.nheads, self.headdim, self.d_state
        return (batch, H, self.num_angles), (batch, H, P, N), (batch, H, N), (batch, H, P)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """A state of zeros for `step`: theta (batch, H, S), h (batch, H, headdim, N), B (batch, H, N), x (batch, H,
        headdim).

        Args:
            batch_size: Number of sequences.
            max_seqlen: Without effect, for the state does not grow; callers of `mamba_ssm` pass it.
            dtype: Of all four; by default the layer's for x, and float32 at least for the others.
        """
        theta, h, B, x = self._state_shapes(batch_size)
        return (
            self.D.new_zeros(theta, dtype=dtype),
            self.D.new_zeros(h, dtype=dtype),
            self.D.new_zeros(B, dtype=dtype),
            self.in_proj.weight.new_zeros(x, dtype=dtype),
        )

    def step(
        self, x: Tensor, theta: Tensor, h: Tensor, B_before: Tensor, x_before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One token x (batch, 1, dim) after the state, whose four tensors are updated in place and returned behind y.

        As many steps equal one `forward`. Under `torch.no_grad()` a token costs the same at any place; with gradients
        the state carries the graph of all steps so far.
        """
        check_token(x, self.in_proj.weight, self.dim)
        state = (theta, h, B_before, x_before)
        names = ("theta", "h", "B_before", "x_before")
        for name, part, shape in zip(names, state, self._state_shapes(x.shape[0]), strict=True):
            check_shape(name, part, shape)
        z, u, B, C, delta, A, trap, turn = self._selected(self.in_proj(x.squeeze(1)))
        angles = torch.remainder(theta.to(turn.dtype) + turn, 2 * math.pi)
        theta.copy_(angles)
        y = trapezoidal_state_update((h, B_before, x_before), u, delta, A, trap, *self._turned(B, C, angles), self.D)
        return self.out_proj(self._gated(y.flatten(1), z)).unsqueeze(1), *state

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: D by its meaning, and biases, none of which starts at 0."""
        return {"D", "dt_bias", "B_bias", "C_bias"}

    def extra_repr(self) -> str:
        """Sizes, and what differs from the defaults."""
        text = f"{self.dim}, d_state={self.d_state}, expand={self.expand}, headdim={self.headdim}"
        usual = {"ngroups": 1, "rope_fraction": 0.5, "A_floor": 1e-4}
        return text + "".join(f", {k}={getattr(self, k)!r}" for k, v in usual.items() if getattr(self, k) != v)


def _angles(turn: Tensor, before: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of turns (batch, L, H, S) modulo 2 pi, and the last of them (batch, H, S), from each sequence's start on.

    Args:
        turn: What each token adds.
        before: (batch, H, S), the angles before the first token; None: 0.
        seq_idx: (batch, L), of packed sequences.
    """
    batch, length, heads, angles = turn.shape
    first = turn.new_zeros(batch, 1, heads, angles) if before is None else before.to(turn.dtype).unsqueeze(1)
    total = running_sum(torch.cat([first, turn], 1), 1, sum_dtype(turn))  # (batch, L + 1, H, S)
    if seq_idx is not None:
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (2, 0))[:, : length + 1]
        place = torch.arange(length + 1, device=turn.device)
        start = torch.where(begins, place, 0).cummax(1).values  # of the token's own sequence; 0 in the first one
        earlier = total.gather(1, (start - 1).clamp(min=0)[..., None, None].expand(total.shape))
        total = total - earlier.masked_fill((start == 0)[..., None, None], 0)
    theta = torch.remainder(total, 2 * math.pi).to(turn.dtype)
    return theta[:, 1:], theta[:, -1].clone()
