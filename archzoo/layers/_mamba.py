"""What selective state space layers share: the parameters of a scan, their start and their run; the short filter."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import without_autocast
from archzoo.kernels.selective_scan import selective_scan
from archzoo.kernels.selective_state_update import state_update
from archzoo.layers._check import check_positive, check_whole

DT_INITS = ("random", "constant")


class _Selective(nn.Module):
    """Parameters of a scan over d channels; a second set of them, for a scan backwards, ends in `_b`."""

    x_proj: nn.Linear
    dt_proj: nn.Linear
    D: nn.Parameter
    A_log: nn.Parameter

    float32_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "A_b_log", "D_b")
    """Those that are float32 at least, whatever the dtype: a decay a little below 1 is none in bfloat16."""

    def __init__(
        self,
        channels: int,
        d_state: int,
        dt: tuple[float, float, str, float, float],
        factory: dict[str, Any],
    ):
        super().__init__()
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor = dt
        check_whole(d_state=d_state)
        check_step_sizes(dt_min, dt_max, dt_init_floor)
        if dt_init not in DT_INITS:
            raise ValueError(f"dt_init={dt_init!r}: must be one of {', '.join(map(repr, DT_INITS))}")
        if not dt_scale > 0:
            raise ValueError(f"dt_scale={dt_scale}: must be positive")
        self.d_inner, self.d_state = channels, d_state
        self.dt_min, self.dt_max, self.dt_init, self.dt_scale, self.dt_init_floor = dt
        self._factory = factory
        self._float32 = float32_at_least(factory)

    def _make_scan(self, dt_rank: int, suffix: str = "") -> None:
        """Adds the parameters of one scan, drawn as `_reset_scan` draws them."""
        d, N = self.d_inner, self.d_state
        self.add_module(f"x_proj{suffix}", nn.Linear(d, dt_rank + 2 * N, bias=False, **self._factory))
        self.add_module(f"dt_proj{suffix}", nn.Linear(dt_rank, d, **self._factory))
        self.register_parameter(_a_log(suffix), nn.Parameter(torch.empty(d, N, **self._float32)))
        self.register_parameter(f"D{suffix}", nn.Parameter(torch.empty(d, **self._float32)))
        dt_proj = getattr(self, f"dt_proj{suffix}")
        dt_proj.bias._no_reinit = True  # what loops that set all biases to zero ask for
        self._fill_scan(suffix)

    def _reset_scan(self, suffix: str = "") -> None:
        getattr(self, f"x_proj{suffix}").reset_parameters()
        getattr(self, f"dt_proj{suffix}").reset_parameters()
        self._fill_scan(suffix)

    @torch.no_grad()
    def _fill_scan(self, suffix: str) -> None:
        """Step sizes exp(U(ln dt_min, ln dt_max)), states that decay by 1 to N a unit of time, and D = 1."""
        dt_proj: nn.Linear = getattr(self, f"dt_proj{suffix}")
        spread = self.dt_scale * dt_proj.in_features**-0.5
        if self.dt_init == "constant":
            dt_proj.weight.fill_(spread)
        else:
            dt_proj.weight.uniform_(-spread, spread)
        D: Tensor = getattr(self, f"D{suffix}")
        dt_proj.bias.copy_(step_bias_like(D, self.dt_min, self.dt_max, self.dt_init_floor))
        A_log: Tensor = getattr(self, _a_log(suffix))
        A_log.copy_(torch.arange(1, self.d_state + 1, dtype=A_log.dtype, device=A_log.device).log())
        D.fill_(1)

    def _selected(self, x: Tensor, suffix: str = "") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step sizes without their bias (*, d), B and C (*, N), and A (d, N), of x (*, d)."""
        dt_proj: nn.Linear = getattr(self, f"dt_proj{suffix}")
        dt_low, B, C = getattr(self, f"x_proj{suffix}")(x).split([dt_proj.in_features, self.d_state, self.d_state], -1)
        A_log: Tensor = getattr(self, _a_log(suffix))
        A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
        return F.linear(dt_low, dt_proj.weight), B, C, A

    def _scan(
        self, x: Tensor, z: Tensor | None, seq_idx: Tensor | None, state: Tensor | None, suffix: str = ""
    ) -> tuple[Tensor, Tensor]:
        """y (batch, length, d) and the last state (batch, d, N)."""
        delta, B, C, A = self._selected(x, suffix)
        y, last = selective_scan(
            x.mT,
            delta.mT,
            A,
            B.mT,
            C.mT,
            getattr(self, f"D{suffix}"),
            None if z is None else z.mT,
            getattr(self, f"dt_proj{suffix}").bias,
            delta_softplus=True,
            return_last_state=True,
            initial_state=state,
            seq_idx=seq_idx,
        )
        return y.mT, last

    def _scan_step(self, x: Tensor, z: Tensor | None, state: Tensor) -> Tensor:
        """y (batch, d), the state (batch, d, N) updated in place."""
        dt, B, C, A = self._selected(x)
        return state_update(state, x, dt, A, B, C, self.D, z, self.dt_proj.bias, True)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: A and D by their meaning, the step sizes' bias by its."""
        kept = ("A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias")
        return {name for name, _ in self.named_parameters() if name in kept}


def _a_log(suffix: str) -> str:
    return f"A{suffix}_log"  # A_b_log, as in Vision Mamba


def float32_at_least(factory: dict[str, Any]) -> dict[str, Any]:
    """Device and dtype of parameters that must not be rounded."""
    return {**factory, "dtype": torch.promote_types(factory["dtype"] or torch.get_default_dtype(), torch.float32)}


def check_step_sizes(dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """A ValueError unless step sizes can be drawn between them."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min={dt_min}, dt_max={dt_max}: must be positive, and dt_min at most dt_max")
    if not dt_init_floor > 0:
        raise ValueError(f"dt_init_floor={dt_init_floor}: must be positive")


def step_bias_like(t: Tensor, dt_min: float, dt_max: float, dt_init_floor: float) -> Tensor:
    """Biases from which a softplus makes step sizes that are drawn evenly on a logarithmic scale."""
    dt = torch.empty_like(t).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))


def resolve_dt_rank(dt_rank: int | str, dim: int) -> int:
    """`"auto"`: a sixteenth of the width, rounded up."""
    if dt_rank == "auto":
        return math.ceil(dim / 16)
    check_whole(dt_rank=dt_rank)
    return int(dt_rank)


def check_inner_channels(d: int, expand: float, dim: int) -> None:
    """A ValueError unless d, expand times dim, is a number of channels."""
    if not 1 <= d < 2**31:
        raise ValueError(f"expand={expand}: makes {d or 'no'} channels of dim={dim}; must make 1 to 2^31 - 1")


def scan_heads(dim: int, expand: float, headdim: int | None, ngroups: int) -> tuple[int, int, int]:
    """Channels d, those of a head, and the number of heads, of a layer whose states are those of heads.

    Args:
        dim: Size of a token.
        expand: d as a multiple of dim.
        headdim: Channels of a head; None: 64 if it divides d, else a quarter of the largest power of 2 that does.
        ngroups: Groups of heads.

    Raises:
        ValueError: If headdim does not divide d, or ngroups the number of heads.
    """
    check_positive(expand=expand)
    d = int(expand * dim)
    check_inner_channels(d, expand, dim)
    if headdim is None:  # a narrow layer has several heads too: the norm takes away the scale of a single one
        headdim = 64 if d % 64 == 0 else max(1, math.gcd(d, 64) // 4)
    check_whole(headdim=headdim)
    if d % headdim:
        raise ValueError(f"headdim={headdim}: must be a divisor of expand * dim = {d}")
    heads = d // headdim
    if heads % ngroups:
        raise ValueError(f"ngroups={ngroups}: must be a divisor of the {heads} heads, expand * dim / headdim")
    return d, headdim, heads


# --- The short filter -------------------------------------------------------------------------------------------------


def check_mask(mask: Tensor | None, batch: int, length: int) -> None:
    """A ValueError unless mask is None or (batch, length)."""
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"mask of shape {tuple(mask.shape)}: must be (batch, length) = {(batch, length)}")


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (batch, length, d), zero where the mask (batch, length) is."""
    return x if mask is None else x * mask.unsqueeze(-1).to(x.dtype)


def last_inputs(u: Tensor, width: int, before: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """The last `width` inputs of the filter (batch, d, width), of the last sequence alone.

    Args:
        u: (batch, length, d).
        width: Of the filter.
        before: Such a state, from the tokens before; None: zeros.
        seq_idx: (batch, length), of packed sequences.
    """
    if before is None:
        before = u.new_zeros(u.shape[0], u.shape[2], width)
    last = torch.cat([before, u.mT[..., -width:]], -1)[..., -width:]
    if seq_idx is not None and seq_idx.shape[1] > 0:
        owner = torch.cat([seq_idx[:, :1].expand(-1, width), seq_idx[:, -width:]], 1)[:, -width:]
        last = last.masked_fill((owner != seq_idx[:, -1:]).unsqueeze(1), 0)
    return last.contiguous()


@without_autocast
def filter_step(u: Tensor, state: Tensor, conv: nn.Conv1d) -> Tensor:
    """The filter's output with its SiLU for one input u (batch, d); the state (batch, d, W) is updated in place."""
    window = torch.cat([state[..., 1:], u.unsqueeze(-1).to(state.dtype)], -1)
    state.copy_(window)
    weight = conv.weight.squeeze(1)
    wide = torch.promote_types(torch.promote_types(weight.dtype, window.dtype), torch.float32)
    v = torch.linalg.vecdot(window.to(wide), weight.to(wide))
    if conv.bias is not None:
        v = v + conv.bias
    return F.silu(v).to(u.dtype)
