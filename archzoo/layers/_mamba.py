"""What selective state space layers share: the parameters of a scan, their start and their run."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels.selective_scan import selective_scan
from archzoo.kernels.selective_state_update import state_update
from archzoo.layers._check import check_whole

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
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min={dt_min}, dt_max={dt_max}: must be positive, and dt_min at most dt_max")
        if dt_init not in DT_INITS:
            raise ValueError(f"dt_init={dt_init!r}: must be one of {', '.join(map(repr, DT_INITS))}")
        if not dt_scale > 0 or not dt_init_floor > 0:
            raise ValueError(f"dt_scale={dt_scale}, dt_init_floor={dt_init_floor}: must be positive")
        self.d_inner, self.d_state = channels, d_state
        self.dt_min, self.dt_max, self.dt_init, self.dt_scale, self.dt_init_floor = dt
        self._factory = factory
        self._float32 = {**factory, "dtype": torch.promote_types(factory["dtype"] or _default(), torch.float32)}

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
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.empty_like(D).uniform_(low, high).exp_().clamp_(min=self.dt_init_floor)
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
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


def _default() -> torch.dtype:
    return torch.get_default_dtype()


def resolve_dt_rank(dt_rank: int | str, dim: int) -> int:
    """`"auto"`: a sixteenth of the width, rounded up."""
    if dt_rank == "auto":
        return math.ceil(dim / 16)
    check_whole(dt_rank=dt_rank)
    return int(dt_rank)
