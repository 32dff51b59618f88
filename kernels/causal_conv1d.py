r"""Depthwise causal convolution, $y_t = \phi(b + \sum_{i<W} w_i x_{t-W+1+i})$: Mamba's short filter over time.

Channel-last storage, which `F.conv1d` would copy, is walked in blocks of time: W products a block, each along channels.
Inputs before the first step are zeros or come from a state; across a border of packed sequences nothing is read. Kept
for the backward pass are the inputs; the activation's argument is made again. With E = batch L d: 2 W E FLOPs forward,
6 W E backward. Arithmetic and sums are float32 at least. The Triton kernel is bound by memory: 2 E numbers are moved
forward, 3 E backward.

Under `torch.func` transforms, and for gradients of gradients, the definition takes the op's place; inside
`use_backend("triton")` they raise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._op import DifferentiableOp, empty_if, flop_formula, under_transform, without_autocast
from archzoo.kernels._scan import check_seq_idx, check_shape, state_dtype

_BLOCK = 2**17  # elements: half of one core's L2 cache for a block of the inputs, half for one of the outputs
_ACTIVATIONS = (None, "silu")
MOST_TAPS = 8  # that Triton's kernels, which unroll them all, take seconds to compile for


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    """The definition, in plain torch, with the arguments of `causal_conv1d`."""
    (batch, d, length), W, wide = x.shape, weight.shape[1], state_dtype(x)
    before = x.new_zeros(batch, d, W - 1) if initial_state is None else _last_columns(initial_state, W)
    padded = torch.cat([before.to(wide), x.to(wide)], -1)
    y = torch.zeros(batch, d, length, dtype=wide, device=x.device)
    for i in range(W):
        tap = padded[..., i : i + length]
        if seq_idx is not None:
            tap = tap.masked_fill(~_same_sequence(seq_idx, W - 1 - i).unsqueeze(1), 0)
        y = y + weight[:, i, None].to(wide) * tap
    if bias is not None:
        y = y + bias[:, None].to(wide)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _last_columns(state: Tensor, W: int) -> Tensor:
    return state[..., state.shape[-1] - W + 1 :]


def _same_sequence(seq_idx: Tensor, lag: int) -> Tensor:
    """(batch, L): whether the step `lag` before lies in the same sequence; what is before the first is in its own."""
    first = seq_idx[:, :1].expand(-1, min(lag, seq_idx.shape[1]))
    return torch.cat([first, seq_idx[:, : max(0, seq_idx.shape[1] - lag)]], 1) == seq_idx


class _Blocks:
    """The inputs by blocks of time, with what lies before them. x (batch, L, d), state (batch, W - 1, d)."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None):
        self.x, self.dtype, self.W = x, state_dtype(x), weight.shape[1]
        self.batch, self.length, self.d = x.shape
        self.weights = weight.to(self.dtype).t().contiguous()
        self.bias = None if bias is None else bias.to(self.dtype)
        self.state = x.new_zeros(self.batch, self.W - 1, self.d) if state is None else state
        self.same = None
        if seq_idx is not None:
            self.same = [_same_sequence(seq_idx, self.W - 1 - i).unsqueeze(-1) for i in range(self.W)]

    def __iter__(self) -> Any:
        steps = max(self.W, _BLOCK // max(1, self.batch * self.d))
        return (slice(t, min(t + steps, self.length)) for t in range(0, self.length, steps))

    def taps(self, time: slice) -> list[Tensor]:
        """What each of the W weights sees in a block, (batch, steps, d) each."""
        start = time.start - self.W + 1
        if start < 0:
            window = torch.cat([self.state[:, start:].to(self.dtype), self.x[:, : time.stop].to(self.dtype)], 1)
        else:
            window = self.x[:, start : time.stop].to(self.dtype)
        if window.stride(-1) != 1:
            window = window.contiguous()
        taps = [window[:, i : i + time.stop - time.start] for i in range(self.W)]
        return taps if self.same is None else [self.mask(tap, i, time) for i, tap in enumerate(taps)]

    def mask(self, tap: Tensor, i: int, time: slice) -> Tensor:
        """Zero where tap i reaches into another sequence."""
        if self.same is None or i == self.W - 1:
            return tap
        return tap.masked_fill(~self.same[i][:, time], 0)

    def sum(self, taps: Sequence[Tensor]) -> Tensor:
        """The activation's argument."""
        y = taps[0] * self.weights[0]
        for tap, weight in zip(taps[1:], self.weights[1:], strict=True):
            y.addcmul_(tap, weight)
        return y if self.bias is None else y.add_(self.bias)


@without_autocast
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    triton: bool = False,
) -> Tensor:
    """y (batch, L, d), contiguous, of x (batch, L, d) and initial_state (batch, W - 1, d), in x's dtype."""
    if triton:
        from archzoo.kernels import _causal_conv1d_triton

        return _causal_conv1d_triton.forward(x, weight, bias, initial_state, seq_idx, silu)
    y = x.new_empty(x.shape)
    blocks = _Blocks(x, weight, bias, initial_state, seq_idx)
    for time in blocks:
        part = blocks.sum(blocks.taps(time))
        y[:, time] = F.silu(part, inplace=True) if silu else part
    return y


@without_autocast
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    needed: list[bool],
    triton: bool = False,
) -> list[Tensor]:
    """Gradients of all tensors, in their order; those not needed, or of what is None, come back empty."""
    inputs = (x, weight, bias, initial_state, seq_idx)
    if triton:
        from archzoo.kernels import _causal_conv1d_triton

        found: tuple[Tensor | None, ...] = _causal_conv1d_triton.backward(dy, *inputs, silu, needed)
    else:
        found = _plain_backward(dy, x, weight, bias, initial_state, seq_idx, silu, needed)
    return [
        gradient.to(t.dtype).contiguous() if need and t is not None and gradient is not None else empty_if(False, t, dy)
        for gradient, t, need in zip((*found, None), inputs, needed, strict=True)
    ]


def _plain_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and initial_state, in the dtype of sums."""
    blocks = _Blocks(x, weight, bias, initial_state, seq_idx)
    W, wide = blocks.W, blocks.dtype
    dx = torch.zeros(x.shape, dtype=wide, device=x.device)
    dstate = torch.zeros(blocks.state.shape, dtype=wide, device=x.device)
    dweights, dbias = torch.zeros_like(blocks.weights), torch.zeros(blocks.d, dtype=wide, device=x.device)
    for time in blocks:
        taps, g = blocks.taps(time), dy[:, time].to(wide)
        if silu:
            g = torch.ops.aten.silu_backward(g, blocks.sum(taps))
        if needed[1]:
            for i, tap in enumerate(taps):
                dweights[i] += (g * tap).sum((0, 1))
        if needed[2]:
            dbias += g.sum((0, 1))
        for i in range(W) if needed[0] or needed[3] else ():
            part = blocks.mask(g, i, time)
            start = time.start - (W - 1 - i)
            old = min(max(0, -start), g.shape[1])  # steps whose tap is in the state
            if old:
                dstate[:, W - 1 + start :][:, :old].addcmul_(part[:, :old], blocks.weights[i])
            dx[:, start + old : start + g.shape[1]].addcmul_(part[:, old:], blocks.weights[i])
    return dx, dweights.t(), dbias, dstate


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> Tensor:
    """The definition, with the op's layout."""
    state = None if initial_state is None else initial_state.mT
    activation = "silu" if silu else None
    return causal_conv1d_reference(x.mT, weight, bias, activation, seq_idx=seq_idx, initial_state=state).mT


def _fake(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


causal_conv1d_op = DifferentiableOp("causal_conv1d", _forward, _backward, fake=_fake, definition=_plain, tensors=5)


@flop_formula(torch.ops.archzoo.causal_conv1d)
def _flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x[0] * x[1] * weight[0] * weight[1])


@flop_formula(torch.ops.archzoo.causal_conv1d_backward)
def _backward_flops(dy: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 3 * _flops(x, weight)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:
    r"""Each channel filtered over time by its own W weights: y_t = act(bias + sum_{i<W} weight[:, i] x_{t-W+1+i}).

    Args:
        x: (batch, d, L), real floating point, of any strides; channel-last storage is the fastest.
        weight: (d, W); with more than 8 taps plain torch's, also on a GPU.
        bias: (d,).
        activation: None or `"silu"`.
        seq_idx: (batch, L), integers: a tap that reaches into another sequence adds nothing. What is in the initial
            state belongs to the first step's sequence.
        initial_state: (batch, d, W - 1 or more), the inputs before the first step, newest last; None: zeros.

    Returns:
        y (batch, d, L) in x's dtype and in channel-last storage. Autocast rounds nothing here.

    Raises:
        ValueError: If a shape or dtype does not fit x, or the activation is unknown; the message names the argument;
            as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform or with more than 8 taps.
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)} and {x.dtype}: must be (batch, d, L) and real floating point")
    batch, d, length = x.shape
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] < 1 or not weight.is_floating_point():
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} and {weight.dtype}: must be (d, W) with d = {d}, W at least 1, and "
            "real floating point"
        )
    W = weight.shape[1]
    check_shape("bias", bias, (d,))
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: must be None or 'silu'")
    check_seq_idx(seq_idx, batch, length)
    if initial_state is not None:
        columns = initial_state.shape[2] if initial_state.dim() == 3 else 0
        if columns < W - 1:
            raise ValueError(
                f"initial_state of shape {tuple(initial_state.shape)}: must be (batch, d, {W - 1} or more), "
                f"for weight of shape {tuple(weight.shape)}"
            )
        check_shape("initial_state", initial_state, (batch, d, columns))
        initial_state = _last_columns(initial_state, W).mT
    arguments = (x.mT, weight, bias, initial_state, seq_idx, activation == "silu")
    if under_transform():
        refuse_triton("causal_conv1d", "a torch.func transform")
        return _plain(*arguments).mT
    if W > MOST_TAPS:
        refuse_triton("causal_conv1d", f"a weight of {W} taps, more than {MOST_TAPS},")
    triton = W <= MOST_TAPS and takes_triton(
        "causal_conv1d", x=x, weight=weight, bias=bias, initial_state=initial_state
    )
    y: Tensor = causal_conv1d_op(*arguments, triton)
    return y.mT
