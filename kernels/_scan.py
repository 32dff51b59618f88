"""How the plain-torch selective scan walks its problem: tiles of batch and channels, and in a tile blocks of steps.

In a block the axes are (steps, b, g, N, c): batch, groups of B and C, states, channels of a group. Every operator so
runs along channels, contiguous in memory, and the sum over states or channels is a `bmm`.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._conv import blocks as cut

STEPS = 16  # of a block in float32; the three buffers of the backward pass then fill 1.5 MiB of one core's L2 cache
STATES = 2**13  # of one step of a tile, a CPU thread: with fewer, calls take the time; more leave the cache
GPU_STATES = 2**24  # launches take the time


def state_dtype(u: Tensor) -> torch.dtype:
    """float64 where u is, else float32: that of the states and of all sums."""
    return torch.promote_types(u.dtype, torch.float32)


def steps_of(dtype: torch.dtype) -> int:
    """Of a block of states of that dtype: float64 fills a cache, or the registers of a GPU, with half as many."""
    return STEPS // 2 if dtype == torch.float64 else STEPS


def common_groups(B: Tensor, C: Tensor) -> int:
    """Into how many groups channels are cut so that each lies in one group of B and one of C."""
    return math.lcm(*(t.shape[2] for t in (B, C) if t.dim() == 4))


class Problem:
    """The op's arguments: u, delta, z (batch, L, d); B, C (batch, L, groups, N), or (d, N) if constant."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        delta_softplus: bool,
    ):
        self.u, self.delta, self.A, self.D, self.z = u, delta, A, D, z
        self.delta_bias, self.initial_state, self.delta_softplus = delta_bias, initial_state, delta_softplus
        self.batch, self.length, self.d = u.shape
        self.states, self.dtype = A.shape[1], state_dtype(u)
        self.steps, self.groups = steps_of(self.dtype), common_groups(B, C)
        self.B, self.C = self._spread_groups(B), self._spread_groups(C)
        self.resets: Tensor | None = None
        if seq_idx is not None and self.length > 0:
            self.resets = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).t()  # (L, batch)

    def _spread_groups(self, t: Tensor) -> Tensor:
        return t if t.dim() == 2 or t.shape[2] == self.groups else t.repeat_interleave(self.groups // t.shape[2], 2)

    def tiles(self) -> list[tuple[slice, slice, slice]]:
        """Slices of batch, groups, and channels of a group."""
        room = STATES * torch.get_num_threads() if self.u.device.type == "cpu" else GPU_STATES
        return cut(self.batch, (self.groups, self.d // self.groups), max(1, room // self.states))

    def blocks(self) -> list[slice]:
        """Slices of time."""
        return [slice(t, min(t + self.steps, self.length)) for t in range(0, self.length, self.steps)]

    def by_group(self, t: Tensor) -> Tensor:
        """(*, d) -> (*, groups, channels), a view."""
        return t.unflatten(-1, (self.groups, self.d // self.groups))


class Tile:
    """A tile's part of the arguments, and the memory of one block. Axes: time, b, g, N, c, some of them left out."""

    def __init__(self, problem: Problem, where: tuple[slice, slice, slice], buffers: int):
        self.problem, self.where, self.dtype = problem, where, problem.dtype
        self.u, self.delta = self.sequence(problem.u), self.sequence(problem.delta)
        self.z = None if problem.z is None else self.sequence(problem.z)
        self.D = None if problem.D is None else self.vector(problem.D).to(self.dtype)
        self.delta_bias = None if problem.delta_bias is None else self.vector(problem.delta_bias).to(self.dtype)
        self.A = self.matrix(problem.A).to(self.dtype).contiguous()
        self.B, self.C = self.weights(problem.B), self.weights(problem.C)
        self.resets = None if problem.resets is None else problem.resets[:, where[0]]
        shape = (min(problem.steps, problem.length), where[0].stop - where[0].start, *self.A.shape)
        self.memory = [problem.u.new_empty(shape, dtype=self.dtype) for _ in range(buffers)]
        self.rows = [memory.unbind(0) for memory in self.memory]  # once for all blocks: a view costs as much as a step

    def sequence(self, t: Tensor) -> Tensor:
        """A view (L, b, g, c) of (batch, L, d)."""
        batch, group, channel = self.where
        return self.problem.by_group(t)[batch, :, group, channel].transpose(0, 1)

    def vector(self, t: Tensor) -> Tensor:
        """A view (g, c) of (d,)."""
        return self.problem.by_group(t)[self.where[1:]]

    def matrix(self, t: Tensor) -> Tensor:
        """A view (g, N, c) of (d, N)."""
        return self.problem.by_group(t.t())[:, *self.where[1:]].transpose(0, 1)

    def state(self, t: Tensor) -> Tensor:
        """A view (b, g, N, c) of (batch, d, N)."""
        batch, group, channel = self.where
        return self.problem.by_group(t.mT)[batch, :, group, channel].transpose(1, 2)

    def border(self, t: Tensor) -> Tensor:
        """A view (K, b, g, N, c) of (K, batch, groups, N, channels)."""
        batch, group, channel = self.where
        return t[:, batch, group, :, channel]

    def weights(self, t: Tensor) -> Tensor:
        """B or C: (g, N, c) if constant, else a view (L, b, g, N)."""
        if t.dim() == 2:
            return self.matrix(t).to(self.dtype).contiguous()
        return t[self.where[0], :, self.where[1]].transpose(0, 1)


class Block:
    """A block of a tile: what it reads, in the dtype of the states, and the states of its steps."""

    def __init__(self, tile: Tile, time: slice, before: Tensor):
        """Runs the recurrence from the state `before` the block; its memory holds decays and states from then on."""
        self.tile, self.time, steps = tile, time, time.stop - time.start
        self.u, self.raw_delta = self.load(tile.u), self.load(tile.delta)
        if tile.delta_bias is not None:
            self.raw_delta = self.raw_delta + tile.delta_bias
        self.delta = F.softplus(self.raw_delta) if tile.problem.delta_softplus else self.raw_delta
        self.input = self.delta * self.u
        self.B, self.C = (t if t.dim() == 3 else self.load(t) for t in (tile.B, tile.C))
        self.before = before
        self.a, self.h = tile.memory[0][:steps], tile.memory[1][:steps]
        torch.mul(self.delta.unsqueeze(3), tile.A, out=self.a).exp_()
        if tile.resets is not None and tile.resets[time].any():
            self.a.masked_fill_(tile.resets[time][..., None, None, None], 0)
        spread(self.input, self.B, out=self.h)
        for a, h in zip(tile.rows[0][:steps], tile.rows[1], strict=False):
            before = h.addcmul_(a, before)
        self.last = before

    def load(self, t: Tensor) -> Tensor:
        """The block's steps of a tile's sequence; a view if channels already lie side by side in that dtype."""
        t = t[self.time].to(self.tile.dtype)
        return t if t.stride(-1) == 1 else t.contiguous()


def spread(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """out[..., n, c] = x[..., c] w[..., n], or w[n, c] where constant."""
    return torch.mul(x.unsqueeze(3), w if w.dim() == 3 else w.unsqueeze(4), out=out)


def sum_over_states(s: Tensor, w: Tensor, scratch: Tensor) -> Tensor:
    """(steps, b, g, c): the states, or their adjoints, weighted by w."""
    if w.dim() == 3:
        return torch.mul(s, w, out=scratch).sum(3)
    *leading, N, c = s.shape
    return torch.bmm(w.reshape(-1, 1, N), s.view(-1, N, c)).view(*leading, c)


def sum_over_channels(s: Tensor, x: Tensor, constant: bool, scratch: Tensor) -> Tensor:
    """Gradient of w where x w is summed into s, or s w into x: (steps, b, g, N), or (g, N, c) where constant."""
    if constant:
        return torch.mul(s, x.unsqueeze(3), out=scratch).sum((0, 1))
    *leading, N, c = s.shape
    return torch.bmm(x.reshape(-1, 1, c), s.view(-1, N, c).mT).view(
        *leading, N
    )  # (c, 1) on the right takes 3 times as long


# --- What is refused --------------------------------------------------------------------------------------------------


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """A ValueError that names the argument, unless all of them fit u."""
    if u.dim() != 3 or not u.is_floating_point():
        raise ValueError(f"u of shape {tuple(u.shape)} and {u.dtype}: must be (batch, d, L) and real floating point")
    batch, d, length = u.shape
    check_matrix("A", A, d)
    N = A.shape[1]
    for name, t in (("B", B), ("C", C)):
        check_weights(name, t, d, N, batch, length)
    for name, given, shape in (
        ("delta", delta, (batch, d, length)),
        ("z", z, (batch, d, length)),
        ("D", D, (d,)),
        ("delta_bias", delta_bias, (d,)),
        ("initial_state", initial_state, (batch, d, N)),
    ):
        check_shape(name, given, shape)
    check_seq_idx(seq_idx, batch, length)


def check_seq_idx(seq_idx: Tensor | None, batch: int, length: int) -> None:
    """A ValueError unless seq_idx is None, or integers (batch, L)."""
    if seq_idx is None:
        return
    wrong_dtype = seq_idx.is_floating_point() or seq_idx.is_complex() or seq_idx.dtype == torch.bool
    if seq_idx.shape != (batch, length) or wrong_dtype:
        raise ValueError(
            f"seq_idx of shape {tuple(seq_idx.shape)} and {seq_idx.dtype}: must be (batch, L) = {(batch, length)} "
            "and integers"
        )


def check_shape(name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    """A ValueError unless t is None, or of that shape and real floating point."""
    if t is not None and (t.shape != shape or not t.is_floating_point()):
        raise ValueError(f"{name} of shape {tuple(t.shape)} and {t.dtype}: must be {shape} and real floating point")


def check_matrix(name: str, A: Tensor, d: int) -> None:
    """A ValueError unless A is (d, N), N at least 1, and real floating point."""
    if A.is_complex():
        raise ValueError(f"{name} of {A.dtype}: must be real; no released model has a complex one")
    if A.dim() != 2 or A.shape[0] != d or A.shape[1] < 1 or not A.is_floating_point():
        raise ValueError(
            f"{name} of shape {tuple(A.shape)} and {A.dtype}: must be (d, N) with d = {d}, N at least 1, and real "
            "floating point"
        )


def check_weights(name: str, t: Tensor, d: int, N: int, batch: int, length: int) -> None:
    """A ValueError unless t is (d, N), (batch, N, L) or (batch, G, N, L) with d a multiple of G."""
    fits = {2: (d, N), 3: (batch, N, length), 4: (batch, t.shape[1], N, length) if t.dim() == 4 else ()}
    if t.dim() not in fits or t.shape != fits[t.dim()] or not t.is_floating_point():
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} and {t.dtype}: must be (d, N) = {(d, N)}, (batch, N, L) = "
            f"{(batch, N, length)} or (batch, G, N, L), and real floating point"
        )
    if t.dim() == 4 and (t.shape[1] < 1 or d % t.shape[1]):
        raise ValueError(f"{name} has {t.shape[1]} groups: must be a divisor of d = {d}")
