"""The passes of `capsule_routing` over the lower capsules, forward and backward, in the two ways that it makes them.

Letters are those of that file: N samples, I lower capsules of K numbers, J upper ones of D.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_FEW = 2**20  # votes up to which they are held: 4 MB in float32
_BLOCK = 2**17  # elements of (J, N, K, chunk) on a CPU, where a handful of such blocks stay in L2
_DEVICE_BLOCK = 2**25  # elsewhere, where launches cost more than memory
_ROWS = 64  # samples of a tile on a CPU: more would leave chunks too short for a GEMM


def couple(logits: Tensor, leaky: bool, dim: int) -> Tensor:
    """Softmax of the logits along an axis; leaky: with one logit of 0 more, whose share is dropped."""
    if not leaky:
        return logits.softmax(dim)
    most = logits.amax(dim, keepdim=True).clamp_min(0)
    shares = (logits - most).exp()
    return shares / (shares.sum(dim, keepdim=True) + most.neg().exp())


def passes(
    u: Tensor, weight: Tensor, wide: torch.dtype, need_u: bool = False, need_weight: bool = False
) -> "Votes | Chunks":
    """The way that suits the sizes. u (N, I, K), weight (I, J, D, K); arithmetic is in the dtype `wide`.

    Both have `first` and `round`, for s; `first_backward` and `round_backward`, which go from the last round to the
    first and gather the gradients that are needed; and `gradients`, which returns them.
    """
    way = Votes if u.shape[0] * weight.shape[:3].numel() <= _FEW else Chunks
    return way(u.to(wide), weight.to(wide), need_u, need_weight)


def _dlogits(shares: Tensor, dshares: Tensor, dim: int) -> Tensor:
    """Gradient of the logits by that of their softmax, leaky or not; overwrites the latter."""
    dshares.mul_(shares)
    return dshares.addcmul_(shares, dshares.sum(dim, keepdim=True), value=-1)


class Votes:
    """With all votes held, (I, J, D, N): for so few samples that they are no more than the weights."""

    def __init__(self, u: Tensor, weight: Tensor, need_u: bool, need_weight: bool):
        self.u, self.weight, self.need_u, self.need_weight = u.permute(1, 2, 0), weight, need_u, need_weight
        self.votes = torch.bmm(weight.flatten(1, 2), self.u).unflatten(1, weight.shape[1:3])
        self.dvotes: Tensor | None = None

    def first(self, leaky: bool) -> Tensor:
        """s (N, J, D) of the first round, without bias."""
        return self.votes.sum(0).div_(self.weight.shape[1] + leaky).permute(2, 0, 1)

    def _agreement(self, vectors: Tensor) -> Tensor:
        """Scalar products (I, J, N) of the votes with vectors (J, D, N)."""
        return (self.votes * vectors).sum(2)

    def _mean(self, shares: Tensor) -> Tensor:
        """The sum (N, J, D) of the votes, with weights (I, J, N)."""
        return (self.votes * shares.unsqueeze(2)).sum(0).permute(2, 0, 1)

    def round(self, total: Tensor, leaky: bool) -> Tensor:
        """s (N, J, D) of a later round, without bias; `total` (N, J, D) is V."""
        return self._mean(couple(self._agreement(total.permute(1, 2, 0)), leaky, 1))

    def _add(self, part: Tensor) -> None:
        self.dvotes = part if self.dvotes is None else self.dvotes.add_(part)

    def first_backward(self, ds: Tensor, leaky: bool) -> None:
        """Adds the first round's part to the gradients; ds (N, J, D)."""
        self._add((ds / (self.weight.shape[1] + leaky)).permute(1, 2, 0).expand_as(self.votes).clone())

    def round_backward(self, ds: Tensor, total: Tensor, leaky: bool, through: bool) -> Tensor | None:
        """Adds a later round's part to the gradients; with `through`, returns that of V too. See `Chunks`."""
        ds, total = ds.permute(1, 2, 0), total.permute(1, 2, 0)
        shares = couple(self._agreement(total), leaky, 1)
        self._add(shares.unsqueeze(2) * ds)
        if not through:
            return None
        dlogits = _dlogits(shares, self._agreement(ds), 1)
        self._add(dlogits.unsqueeze(2) * total)
        return self._mean(dlogits)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of u and the weight, None where not needed."""
        assert self.dvotes is not None
        dvotes = self.dvotes.flatten(1, 2)
        du = torch.bmm(self.weight.flatten(1, 2).mT, dvotes).permute(2, 0, 1) if self.need_u else None
        dw = torch.bmm(dvotes, self.u.mT).view_as(self.weight) if self.need_weight else None
        return du, dw


class Chunks:
    """With votes never made, in tiles of samples and chunks of lower capsules.

    In a chunk of C lower capsules the weight is (J, D, K C) and u (N, K C), contiguous, with the capsules last: sums
    over K and over J, neither of them long, then run along C.
    """

    def __init__(self, u: Tensor, weight: Tensor, need_u: bool, need_weight: bool):
        self.samples, self.lower, self.k = u.shape
        self.upper, self.d = weight.shape[1:3]
        on_cpu = u.device.type == "cpu"
        rows = min(self.samples, _ROWS) if on_cpu else self.samples
        block = _BLOCK if on_cpu else _DEVICE_BLOCK
        length = min(self.lower, max(16, block // (self.upper * rows * self.k)))
        self.rows = [slice(n, n + rows) for n in range(0, self.samples, rows)]
        slices = [slice(i, min(i + length, self.lower)) for i in range(0, self.lower, length)]
        self.u = [u[:, i].transpose(1, 2).contiguous().flatten(1) for i in slices]
        self.weight = [weight[i].permute(1, 2, 3, 0).contiguous().flatten(2) for i in slices]
        self.du = [torch.zeros_like(part) for part in self.u] if need_u else None
        self.dw = [torch.zeros_like(part) for part in self.weight] if need_weight else None

    def first(self, leaky: bool) -> Tensor:
        """s (N, J, D) of the first round, without bias."""
        s = self.u[0].new_zeros(self.samples, self.upper * self.d)
        for u, weight in zip(self.u, self.weight, strict=True):
            s.addmm_(u, weight.flatten(0, 1).t(), alpha=1 / (self.upper + leaky))
        return s.view(-1, self.upper, self.d)

    def first_backward(self, ds: Tensor, leaky: bool) -> None:
        """Adds the first round's part to the gradients; ds (N, J, D)."""
        flat, share = ds.flatten(1), 1 / (self.upper + leaky)
        for n, (u, weight) in enumerate(zip(self.u, self.weight, strict=True)):
            if self.du is not None:
                self.du[n].addmm_(flat, weight.flatten(0, 1), alpha=share)
            if self.dw is not None:
                self.dw[n].flatten(0, 1).addmm_(flat.t(), u, alpha=share)

    def _tiles(self) -> Iterator[tuple[slice, int]]:
        """Samples, and the number of a chunk; all chunks of some samples come first."""
        return ((rows, n) for rows in self.rows for n in range(len(self.u)))

    def _agreement(self, pulled: Tensor, u: Tensor) -> Tensor:
        """<u_i, p_ij>, (..., J, N, C), of p (..., J, N, K C) and u (N, K C)."""
        p, u = pulled.unflatten(-1, (self.k, -1)), u.unflatten(-1, (self.k, -1))
        total = p[..., 0, :] * u[:, 0]
        for k in range(1, self.k):
            total.addcmul_(p[..., k, :], u[:, k])
        return total

    def _spread(self, shares: Tensor, u: Tensor) -> Tensor:
        """c_ij u_i, (..., J, N, K C), of shares (..., J, N, C) and u (N, K C)."""
        return (shares.unsqueeze(-2) * u.unflatten(-1, (self.k, -1))).flatten(-2)

    def round(self, total: Tensor, leaky: bool) -> Tensor:
        """s (N, J, D) of a later round, without bias; `total` (N, J, D) is V."""
        s = total.new_zeros(self.upper, self.samples, self.d)
        by_upper = total.transpose(0, 1).contiguous()
        for rows, n in self._tiles():
            u, weight = self.u[n][rows], self.weight[n]
            shares = couple(self._agreement(by_upper[:, rows] @ weight, u), leaky, 0)
            s[:, rows] += self._spread(shares, u) @ weight.mT
        return s.transpose(0, 1)

    def round_backward(self, ds: Tensor, total: Tensor, leaky: bool, through: bool) -> Tensor | None:
        """Adds a later round's part to the gradients; with `through`, returns that of V too.

        Args:
            ds: Gradient of the round's s (N, J, D).
            total: V before the round (N, J, D).
            leaky: Whether the couplings are.
            through: Whether the couplings are functions of V, u and the weight, and not constants.
        """
        both = torch.stack([ds, total]).transpose(1, 2).contiguous()  # (2, J, N, D)
        dtotal = torch.zeros_like(both[0]) if through else None
        for rows, n in self._tiles():
            u, weight, own = self.u[n][rows], self.weight[n], both[:, :, rows]
            pulled = own @ weight  # (2, J, N, K C): q and p
            if through:
                dshares, logits = self._agreement(pulled, u)
                shares = couple(logits, leaky, 0)
                factors = torch.stack([shares, _dlogits(shares, dshares, 0)])
            else:
                factors = couple(self._agreement(pulled[1], u), leaky, 0).unsqueeze(0)
                pulled, own = pulled[:1], own[:1]
            if self.dw is not None or dtotal is not None:
                spread = self._spread(factors, u)
                if dtotal is not None:
                    dtotal[:, rows] += spread[1] @ weight.mT
                if self.dw is not None:
                    for left, right in zip(own, spread, strict=True):
                        self.dw[n].baddbmm_(left.mT, right)
            if self.du is not None:
                parts = pulled.unflatten(-1, (self.k, -1)).mul_(factors.unsqueeze(-2))
                self.du[n][rows] += parts.sum((0, 1)).flatten(-2)
        return None if dtotal is None else dtotal.transpose(0, 1)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of u and the weight, None where not needed."""

        def whole(parts: list[Tensor] | None) -> Tensor | None:
            return None if parts is None else torch.cat([part.unflatten(-1, (self.k, -1)) for part in parts], -1)

        du, dw = whole(self.du), whole(self.dw)
        return None if du is None else du.transpose(1, 2), None if dw is None else dw.permute(3, 0, 1, 2)
