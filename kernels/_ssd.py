"""How the plain-torch state space dual walks its problem: slabs of chunks, each chunk a few small matrix products.

Two layouts of a slab. By tokens: (b, k, g, q, r, *), for batch, chunks, groups of B and C, steps of a chunk, heads of a
group; there the products with B, C and states serve all heads of a group at once. By heads: (b, k, g, r, q, *), for the
products with a chunk's own q x q decays. A slab's chunks are all of one length: the last, shorter one is its own slab.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels._op import running_sum
from archzoo.kernels._scan import check_seq_idx, check_shape, state_dtype

ELEMENTS = 2**17  # of one buffer of a slab, a CPU thread: with fewer, calls take the time; more leave the cache
GPU_ELEMENTS = 2**26  # launches take the time


@dataclass(frozen=True)
class Options:
    """The op's arguments that are no tensors."""

    chunk_size: int
    dt_softplus: bool
    dt_min: float
    dt_max: float


class Problem:
    """The op's arguments, x and z (batch, L, H, P), dt (batch, L, H), B and C (batch, L, G, N); all step sizes."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        seq_idx: Tensor | None,
        options: Options,
    ):
        self.x, self.B, self.C, self.z, self.options = x, B, C, z, options
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.states = B.shape[2:]
        self.dtype = state_dtype(x)
        self.raw_dt = dt.to(self.dtype) if dt_bias is None else dt.to(self.dtype) + dt_bias.to(self.dtype)
        self.positive_dt = F.softplus(self.raw_dt) if options.dt_softplus else self.raw_dt
        self.delta = self.positive_dt.clamp(options.dt_min, options.dt_max)
        self.A = A.to(self.dtype)
        self.log_decay = self.delta * self.A
        self.D = None if D is None else _by_group(D.to(self.dtype), self.groups)
        self.resets: Tensor | None = None
        if seq_idx is not None and self.length > 0:
            self.resets = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))

    def rows(self) -> list[slice]:
        """Slices of the batch, as large as one chunk of them fits."""
        rows = max(1, self._room() // self._chunk())
        return [slice(i, min(i + rows, self.batch)) for i in range(0, self.batch, rows)]

    def spans(self, rows: slice) -> list[tuple[slice, int]]:
        """Slices of chunks, and their number of steps, in order of time."""
        Q = self.options.chunk_size
        whole, rest = divmod(self.length, Q)
        count = max(1, self._room() // (self._chunk() * (rows.stop - rows.start)))
        spans = [(slice(k, min(k + count, whole)), Q) for k in range(0, whole, count)]
        return [*spans, (slice(whole, whole + 1), rest)] if rest else spans

    def states_of(self, t: Tensor, rows: slice) -> Tensor:
        """A view (b, g, N, r, P) of some sequences' states (batch, H, P, N)."""
        return t[rows].unflatten(1, (self.groups, -1)).permute(0, 1, 4, 2, 3)

    def flat_state(self, t: Tensor | None, rows: slice) -> Tensor:
        """States, or their gradients, as (b, g, N, r P); zeros for None."""
        if t is None:
            shape = (rows.stop - rows.start, self.groups, self.states, self.heads // self.groups * self.width)
            return self.x.new_zeros(shape, dtype=self.dtype)
        return self.states_of(t, rows).to(self.dtype).flatten(3)

    def raw_gradient(self, ddelta: Tensor) -> Tensor:
        """Gradient of dt plus its bias, from that of the step sizes."""
        limits = (self.positive_dt >= self.options.dt_min) & (self.positive_dt <= self.options.dt_max)
        ddelta = ddelta.masked_fill(~limits, 0)
        return torch.ops.aten.softplus_backward(ddelta, self.raw_dt, 1, 20) if self.options.dt_softplus else ddelta

    def _room(self) -> int:
        return ELEMENTS * torch.get_num_threads() if self.x.device.type == "cpu" else GPU_ELEMENTS

    def _chunk(self) -> int:
        """Elements of the largest buffer of one chunk of one sequence."""
        steps = min(self.options.chunk_size, self.length)
        return max(1, self.heads * max(steps * steps, steps * self.width, self.states * self.width))


class Slab:
    """Some chunks of some sequences: what they read, in the dtype of the states, and their decays.

    Attributes:
        delta: Step sizes, by tokens (b, k, g, q, r, 1).
        within: exp(cs_t - cs_s), by heads (b, k, g, r, q, q); 0 above the diagonal and across a border of sequences.
        enter: exp(cs_t), what is left at a token of the state before its chunk, by tokens like `delta`.
        leave: exp(cs_end - cs_s), what is left of a token behind its chunk, by tokens.
        through: exp(cs_end), what is left of a state behind a chunk (b, k, g, 1, r, 1).
        scores: C_t . B_s (b, k, g, 1, q, q).
    """

    def __init__(self, problem: Problem, rows: slice, span: slice, steps: int):
        self.problem, self._rows, self._shape = problem, rows, (span.stop - span.start, steps)
        start = span.start * problem.options.chunk_size
        self._time = slice(start, start + self._shape[0] * steps)
        self.x = self.tokens(problem.x)
        self.delta = self.tokens(problem.delta).unsqueeze(-1)
        self.B, self.C = (self.weights(t).to(problem.dtype).contiguous() for t in (problem.B, problem.C))
        cs = running_sum(self.tokens(problem.log_decay).mT, -1, sum_dtype(problem.x))  # (b, k, g, r, q)
        enter, leave, through = (t.to(problem.dtype) for t in (cs, cs[..., -1:] - cs, cs[..., -1]))
        exponents = (cs.unsqueeze(-1) - cs.unsqueeze(-2)).to(problem.dtype)
        mask = exponents.new_full((steps, steps), -torch.inf).triu_(1)  # added: masked_fill_ takes twice as long as exp
        if problem.resets is not None:
            passed = problem.resets[rows, self._time].unflatten(1, self._shape).cumsum(-1)[:, :, None, None]
            mask = mask.masked_fill(passed.unsqueeze(-1) != passed.unsqueeze(-2), -torch.inf)
            enter = enter.masked_fill(passed != 0, -torch.inf)
            leave = leave.masked_fill(passed != passed[..., -1:], -torch.inf)
            through = through.masked_fill(passed[..., -1] != 0, -torch.inf)
        self.within = exponents.add_(mask).exp_()  # masked before the exp, which overflows above the diagonal
        self.enter, self.leave = (t.exp().mT.unsqueeze(-1) for t in (enter, leave))
        self.through = through.exp()[:, :, :, None, :, None]
        self.scores = (self.C @ self.B.mT).unsqueeze(3)

    def tokens(self, t: Tensor) -> Tensor:
        """A view (b, k, g, q, r, *) of (batch, L, H, *)."""
        cut = t[self._rows, self._time].unflatten(1, self._shape)
        return cut.unflatten(3, (self.problem.groups, -1)).movedim(3, 2)

    def weights(self, t: Tensor) -> Tensor:
        """A view (b, k, g, q, N) of (batch, L, G, N)."""
        return t[self._rows, self._time].unflatten(1, self._shape).transpose(2, 3)

    def scaled(self, coefficient: Tensor) -> Tensor:
        """x times a coefficient a token and head, as rows of one matrix for all heads: (b, k, g, q, r P)."""
        return (self.x * coefficient).flatten(4)

    def states(self, before: Tensor, borders: Tensor) -> Tensor:
        """Fills `borders` (b, k, g, N, r P) with the states before each chunk; returns the one behind the last."""
        own = self.B.mT @ self.scaled(self.delta * self.leave)
        for k in range(self._shape[0]):
            borders[:, k] = before
            before = torch.addcmul(self.apart(own[:, k]), self.through[:, k], self.apart(before)).flatten(3)
        return before

    def outputs(self, borders: Tensor) -> Tensor:
        """y before the gate, by tokens."""
        y = self.apart(self.C @ borders).mul_(self.enter)
        y.add_(by_heads(self.scores * self.within @ by_heads(self.x * self.delta)))
        return y if self.problem.D is None else y.addcmul_(self.x, self.problem.D)

    def behind(self, after: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states behind each chunk (b, k, g, N, r P), and of the one before the first."""
        own = self.C.mT @ (dy * self.enter).flatten(4)
        gradients = torch.empty_like(own)
        for k in reversed(range(self._shape[0])):
            gradients[:, k] = after
            after = torch.addcmul(self.apart(own[:, k]), self.through[:, k], self.apart(after)).flatten(3)
        return gradients, after

    def apart(self, t: Tensor) -> Tensor:
        """(*, r P) -> (*, r, P), a view."""
        return t.unflatten(-1, (-1, self.problem.width))


def product_dtype(x: Tensor, B: Tensor, C: Tensor) -> torch.dtype:
    """That in which Triton's kernels multiply matrices, and keep states for them."""
    return torch.bfloat16 if x.dtype == B.dtype == C.dtype == torch.bfloat16 else state_dtype(x)


def triton_steps(x: Tensor, chunk_size: int) -> int:
    """Steps of a chunk in Triton's kernels: a power of two, of which the q x q decays stay in registers."""
    most = 32 if x.dtype == torch.float64 else 64
    return max(16, min(most, 1 << chunk_size.bit_length() - 1))


def sum_dtype(x: Tensor) -> torch.dtype:
    """Of sums over time: at 1e3, float32 leaves an error of 6e-5 in a difference. Apple's GPUs have nothing wider."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _by_group(D: Tensor, groups: int) -> Tensor:
    """(H,) or (H, P) in a shape that broadcasts by tokens, (g, 1, r, 1 or P)."""
    return D.reshape(groups, 1, D.shape[0] // groups, -1)


def by_heads(t: Tensor) -> Tensor:
    """(b, k, g, q, r, P) -> (b, k, g, r, q, P), and back."""
    return t.transpose(3, 4)


@dataclass
class SlabGradients:
    """What one slab adds to the gradients, by tokens; each is made only where it is asked for."""

    input: Tensor
    """Of Delta x, (b, k, g, q, r, P)."""
    log_decay: Tensor | None
    """Of Delta A, (b, k, g, q, r)."""
    B: Tensor | None
    C: Tensor | None


def slab_gradients(
    slab: Slab, dy: Tensor, borders: Tensor, behind: Tensor, need_decay: bool, need_B: bool, need_C: bool
) -> SlabGradients:
    """Gradients of one slab, from those of its outputs (by tokens) and of the states behind its chunks."""
    dy_heads = by_heads(dy)
    mixing = slab.scores * slab.within
    from_behind = slab.apart(slab.B @ behind)
    dinput = torch.addcmul(by_heads(mixing.mT @ dy_heads), from_behind, slab.leave)
    found = SlabGradients(dinput, None, None, None)
    if not (need_decay or need_B or need_C):
        return found
    dmixing = dy_heads @ by_heads(slab.x * slab.delta).mT
    entering = dy * slab.enter
    if need_decay:
        found.log_decay = _decay_gradient(slab, mixing.mul_(dmixing), entering, borders, from_behind, behind)
    dscores = dmixing.mul_(slab.within).sum(3)
    if need_B:
        found.B = torch.baddbmm(
            _flat(dscores.mT @ slab.C), _flat(slab.scaled(slab.delta * slab.leave)), _flat(behind).mT
        ).view_as(slab.B)
    if need_C:
        found.C = torch.baddbmm(_flat(dscores @ slab.B), _flat(entering.flatten(4)), _flat(borders).mT).view_as(slab.C)
    return found


def _flat(t: Tensor) -> Tensor:
    return t.flatten(0, 2)


def _decay_gradient(
    slab: Slab, pairs: Tensor, entering: Tensor, borders: Tensor, from_behind: Tensor, behind: Tensor
) -> Tensor:
    """Gradient of Delta A, by tokens: step i decays all that goes from before it, s < i, to it and behind it, t >= i.

    `pairs` (by heads) is what each pair s <= t of a chunk adds to the loss's derivative by the logarithm of its decay.
    Summed by pairs, for sums by t less those by s would drown what is small in rounding: steps that decay a lot.
    """
    before = running_sum(pairs, -1).tril_(-1).sum(-2)  # over s <= i and t > i: that of the step behind i
    entered = (entering * slab.apart(slab.C @ borders)).sum(-1).mT
    leaving = (slab.x * from_behind).sum(-1).mul_((slab.delta * slab.leave).squeeze(-1)).mT
    through = slab.apart(behind * borders).sum((-1, -3)).unsqueeze(-1) * slab.through.flatten(3).unsqueeze(-1)
    earlier = F.pad(before + running_sum(leaving, -1), (1, -1))
    return (running_sum(entered.flip(-1), -1).flip(-1) + earlier + through).mT


# --- Gradients of the op's arguments ----------------------------------------------------------------------------------


class Gradients:
    """Memory for the gradients that are needed; sums over all tokens wait until the last slab has been added."""

    def __init__(self, problem: Problem, inputs: Sequence[Tensor | None], needed: Sequence[bool]):
        self.problem, self.inputs = problem, inputs
        self.needed = [t is not None and need for t, need in zip(inputs, needed, strict=True)]

        def memory(which: int) -> Tensor | None:
            t = inputs[which]
            if t is None or not self.needed[which]:
                return None
            return torch.empty(t.shape, dtype=t.dtype, device=t.device)

        self.x, self.B, self.C, self.z, self.initial_state = (memory(which) for which in (0, 3, 4, 6, 8))
        self.log_decay = self.delta = self.D = None
        if self.needed[1] or self.needed[2] or self.needed[7]:
            self.log_decay, self.delta = torch.zeros_like(problem.delta), torch.zeros_like(problem.delta)
        if self.needed[5]:
            self.D = problem.delta.new_zeros(problem.heads, problem.width)

    def add(self, slab: Slab, dout: Tensor | None, borders: Tensor, after: Tensor) -> Tensor:
        """Adds a slab's part. Takes and returns the gradient of the state behind, and before, it."""
        z, D, dtype = self.problem.z, self.problem.D, self.problem.dtype
        dy = torch.zeros_like(slab.x, dtype=dtype) if dout is None else slab.tokens(dout).to(dtype)
        if z is not None:
            gate = slab.tokens(z).to(dtype)
            if self.z is not None:
                dgate = torch.ops.aten.silu_backward(slab.outputs(borders).mul_(dy), gate)
                slab.tokens(self.z).copy_(dgate)
            dy = dy * F.silu(gate)
        behind, before = slab.behind(after, dy)
        part = slab_gradients(
            slab, dy, borders, behind, self.log_decay is not None, self.B is not None, self.C is not None
        )
        if self.D is not None:
            self.D += (dy * slab.x).sum((0, 1, 3)).flatten(0, 1)
        if self.log_decay is not None and self.delta is not None and part.log_decay is not None:
            slab.tokens(self.log_decay).copy_(part.log_decay)
            slab.tokens(self.delta).copy_((slab.x * part.input).sum(-1))
        if self.x is not None:
            dx = part.input.mul_(slab.delta)
            slab.tokens(self.x).copy_(dx if D is None else dx.addcmul_(dy, D))
        for memory, gradient in ((self.B, part.B), (self.C, part.C)):
            if memory is not None and gradient is not None:
                slab.weights(memory).copy_(gradient)
        return before

    def results(self) -> list[Tensor]:
        """In the shapes and dtypes of the op's arguments."""
        A = dt = D = None
        if self.log_decay is not None and self.delta is not None:
            A = self.log_decay * self.problem.delta
            A = A.sum((0, 1)) if self.problem.A.dim() == 1 else A
            dt = self.problem.raw_gradient(self.delta.addcmul_(self.log_decay, self.problem.A))
        if self.D is not None and self.inputs[5] is not None:
            D = self.D if self.inputs[5].dim() == 2 else self.D.sum(1)
        bias = dt.sum((0, 1)) if dt is not None and self.needed[7] else None
        found = (self.x, dt, A, self.B, self.C, D, self.z, bias, self.initial_state)
        return [
            gradient.to(t.dtype) if need and gradient is not None and t is not None else self.problem.x.new_empty(0)
            for gradient, t, need in zip(found, self.inputs, self.needed, strict=True)
        ]


# --- What is refused --------------------------------------------------------------------------------------------------


def check_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """A ValueError that names the argument, unless all of them fit x."""
    if x.dim() != 4 or 0 in x.shape[2:] or not x.is_floating_point():
        raise ValueError(
            f"x of shape {tuple(x.shape)} and {x.dtype}: must be (batch, L, H, P), H and P at least 1, and real "
            "floating point"
        )
    batch, length, heads, width = x.shape
    if A.is_complex():
        raise ValueError(f"A of {A.dtype}: must be real; no released model has a complex one")
    if B.dim() != 4 or B.shape[:2] != (batch, length) or B.shape[3] < 1 or not B.is_floating_point():
        raise ValueError(
            f"B of shape {tuple(B.shape)} and {B.dtype}: must be (batch, L, G, N) = ({batch}, {length}, G, N), N at "
            "least 1, and real floating point"
        )
    if B.shape[2] < 1 or heads % B.shape[2]:
        raise ValueError(f"B has {B.shape[2]} groups: must be a divisor of H = {heads}")
    for name, t, shape in (
        ("C", C, tuple(B.shape)),
        ("dt", dt, (batch, length, heads)),
        ("A", A, (batch, length, heads) if A.dim() == 3 else (heads,)),
        ("D", D, (heads, width) if D is not None and D.dim() == 2 else (heads,)),
        ("z", z, tuple(x.shape)),
        ("dt_bias", dt_bias, (heads,)),
        ("initial_state", initial_state, (batch, heads, width, B.shape[3])),
    ):
        check_shape(name, t, shape)
    if not isinstance(chunk_size, Integral) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r}: must be a whole number, 1 or more")
    check_range(dt_limit=dt_limit)
    check_seq_idx(seq_idx, batch, length)


def check_range(**ranges: Any) -> None:
    """A ValueError that names the first that is not two numbers, the first at most the second."""
    for name, pair in ranges.items():
        numbers = isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(t, Real) for t in pair)
        if not numbers or not pair[0] <= pair[1]:
            raise ValueError(f"{name}={pair!r}: must be two numbers, the first at most the second")
