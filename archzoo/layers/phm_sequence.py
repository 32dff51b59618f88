r"""PHM for sequences: an embedding and an LSTM of PHM layers (https://arxiv.org/abs/2102.08597).

Without `PHMEmbedding` a small transformer of PHM layers is not 1/n of its size: most of it is embeddings. The paper
prints the LSTM's output as h = o c, without the sigmoid and tanh; here it is the usual cell.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers._check import check_whole, typed
from archzoo.layers._phm import _Hypercomplex, check_multiples
from archzoo.layers.phm import PHMLinear

State = tuple[Tensor, Tensor]


class PHMEmbedding(_Hypercomplex):
    r"""Embedding whose table is a sum of n Kronecker products, $H = \sum_i A_i \otimes S_i$, and is never built.

    Stands in for `nn.Embedding` with 1/n of its parameters. With V = num_embeddings, row v = p V/n + k of H has the
    blocks q of sum_i A[i,p,q] S[i,k]; a token costs n embedding_dim multiply-adds. At init Var(H) = 1 for every rule
    but a given one, as in `nn.Embedding`.

    Parameters: `A` (n, n, n), or (n, n) for `"mixing"`, a buffer where the rule is fixed; `S` (n, V/n, dim/n), with
    dim = embedding_dim.

    Args:
        num_embeddings: Number V of tokens, a multiple of n. Rows that no token has do no harm: round up.
        embedding_dim: Length of a token's vector, a multiple of n.
        n: Number of Kronecker products.
        rule: How blocks mix, A, as in `PHMLinear`; `"mixing"`: the blocks are A[p,q] S[q,k].
        learn_rule: Whether A is a parameter, as in `PHMLinear`.
        device: Of parameters and buffers.
        dtype: As `device`.

    Shape: (*), integers from 0 to V - 1, -> (*, embedding_dim). Under autocast the output keeps the parameters' dtype,
    as with `nn.Embedding`.

    Raises:
        ValueError: If a size is not a multiple of n, or the rule is unknown or does not fit n; in `forward`, if the
            tokens are no integers.
        IndexError: In `forward`, if a token is out of range (on a CPU; on a GPU it is CUDA's assertion).
    """

    S: nn.Parameter

    @typed
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        n: int = 4,
        rule: str | Tensor = "learned",
        learn_rule: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(num_embeddings=num_embeddings, embedding_dim=embedding_dim, n=n)
        if num_embeddings % n:
            above = -(-num_embeddings // n) * n
            raise ValueError(f"num_embeddings={num_embeddings}: must be a multiple of n={n}; round up to {above}")
        check_multiples(n, embedding_dim=embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_rule(n, rule, learn_rule, factory)
        self.S = nn.Parameter(torch.empty(n, num_embeddings // n, embedding_dim // n, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws everything anew, from torch's global generator, but for a given rule."""
        self._reset_rule()
        self.S.normal_()

    @property
    def weight(self) -> Tensor:
        """H (num_embeddings, embedding_dim), built anew at each access and differentiable. Read-only."""
        return self._sum(self.S)

    def forward(self, tokens: Tensor) -> Tensor:
        """(*) -> (*, embedding_dim)."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens of {tokens.dtype}: must be torch.int64 or torch.int32")
        n, (_, K, _) = self.n, self.S.shape
        p, k = torch.div(tokens, K, rounding_mode="floor"), torch.remainder(tokens, K)
        each = torch.arange(n, device=tokens.device)
        # Rows of views, so that neither A nor S is copied; a token out of range is so for one of the n rows too.
        S = F.embedding(k.unsqueeze(-1) + each * K, self.S.flatten(0, 1))  # (*, i, d)
        if self.rule == "mixing":
            return (F.embedding(p, self.A).unsqueeze(-1) * S).flatten(-2)
        A = F.embedding(p.unsqueeze(-1) + each * n, self.A.flatten(0, 1))  # (*, i, q)
        with torch.autocast(tokens.device.type, enabled=False):
            return (A.transpose(-2, -1) @ S).flatten(-2)

    def extra_repr(self) -> str:
        """Sizes, n and rule."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._rule_repr()}"


class PHMLSTMCell(nn.Module):
    r"""LSTM cell of two PHM layers: $i, f, g, o = W_x x + W_h h$, $c' = \sigma(f) c + \sigma(i) \tanh(g)$,
    $h' = \sigma(o) \tanh(c')$.

    Stands in for `nn.LSTMCell`, whose gates have the same order; with `n=1, rule="real"` it is the same function.

    Modules: `ih`, a `PHMLinear` from input_size to 4 hidden_size, and `hh`, one from hidden_size. So `ih.S` of n = 1 is
    `weight_ih` of `nn.LSTMCell`, `ih.bias` its `bias_ih`.

    Args:
        input_size: Size of x, a multiple of n.
        hidden_size: Size of h and c, a multiple of n.
        bias: Whether both layers have a bias.
        n: Number of Kronecker products in each layer. With n = 4 the blocks of outputs are the four gates.
        rule: As in `PHMLinear`.
        learn_rule: As in `PHMLinear`.
        rank: As in `PHMLinear`.
        device: Of parameters and buffers.
        dtype: As `device`.

    Shape: (*, input_size), and None or (h, c), each (*, hidden_size), -> (h', c').

    Raises:
        ValueError: As `PHMLinear`.
    """

    @typed
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        n: int = 4,
        rule: str | Tensor = "learned",
        learn_rule: bool | None = None,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(input_size=input_size, hidden_size=hidden_size, n=n)
        check_multiples(n, input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size = input_size, hidden_size
        options: dict[str, Any] = {"n": n, "rule": rule, "learn_rule": learn_rule, "rank": rank}
        self.ih = PHMLinear(input_size, 4 * hidden_size, bias, **options, device=device, dtype=dtype)
        self.hh = PHMLinear(hidden_size, 4 * hidden_size, bias, **options, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws both layers anew."""
        self.ih.reset_parameters()
        self.hh.reset_parameters()

    def forward(self, x: Tensor, state: State | None = None) -> State:
        """One step."""
        gates = self.ih(x)
        h, c = self._zero_state(x.shape[:-1], gates) if state is None else state
        self._check_state(x.shape[:-1], h, c)
        return _step(gates + self.hh(h), c)

    def _zero_state(self, leading: tuple[int, ...], like: Tensor) -> State:
        zeros = like.new_zeros(*leading, self.hidden_size)
        return zeros, zeros

    def _check_state(self, leading: tuple[int, ...], h: Tensor, c: Tensor) -> None:
        for name, value in (("h", h), ("c", c)):
            if value.shape != (*leading, self.hidden_size):
                raise ValueError(f"{name} of shape {tuple(value.shape)}: must be {(*leading, self.hidden_size)}")

    def _run(self, x: Tensor, state: State | None, backwards: bool) -> tuple[Tensor, State]:
        """All steps of a sequence x (length, batch, input_size): the outputs in x's order, and the last state."""
        gates = self.ih(x)  # of the whole sequence at once
        h, c = self._zero_state(x.shape[1:-1], gates) if state is None else state
        self._check_state(x.shape[1:-1], h, c)
        hh: Callable[[Tensor], Tensor] = self.hh
        if self.hh.rank is None and self.hh.rule != "mixing":  # H is built once, not at every step
            hh = partial(F.linear, weight=self.hh.weight, bias=self.hh.bias)
        outputs = []
        for gate in reversed(gates.unbind(0)) if backwards else gates.unbind(0):
            h, c = _step(gate + hh(h), c)
            outputs.append(h)
        return torch.stack(outputs[::-1] if backwards else outputs), (h, c)

    def extra_repr(self) -> str:
        """Sizes; the rest is in its layers."""
        return f"{self.input_size}, {self.hidden_size}"


def _step(gates: Tensor, c: Tensor) -> State:
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class PHMLSTM(nn.Module):
    r"""LSTM of PHM layers, with the arguments and outputs of `nn.LSTM`.

    With `n=1, rule="real"` it is the same function as `nn.LSTM`. The steps are a Python loop.

    Modules: `cells`, a list of `PHMLSTMCell`: layer after layer, and in each the forward direction first. State names
    are so `cells.0.ih.A`, `cells.0.ih.S`, `cells.0.ih.bias`, `cells.0.hh.A`, ...; `cells.K.ih` holds what `nn.LSTM`
    calls `weight_ih_lL` and `bias_ih_lL`, with K = L, or K = 2 L and, for `_reverse`, 2 L + 1 if bidirectional.

    Args:
        input_size: Size of each input, a multiple of n.
        hidden_size: Size of h and c, a multiple of n.
        num_layers: Number of layers, each reading the one before.
        bias: Whether the PHM layers have a bias.
        batch_first: Whether input and output are (batch, length, ...); the state is (layers, batch, ...) always.
        dropout: Probability that an output is dropped in training, of every layer but the last.
        bidirectional: Whether each layer has a second cell that reads backwards; outputs are then twice as long.
        n: Number of Kronecker products in each PHM layer.
        rule: As in `PHMLinear`. An `nn.Parameter` is shared by all cells.
        learn_rule: As in `PHMLinear`.
        rank: As in `PHMLinear`.
        device: Of parameters and buffers.
        dtype: As `device`.

    Shape: x (length, batch, input_size) or (batch, length, input_size), or without the batch axis, and optionally
    (h_0, c_0), each (layers directions, batch, hidden_size) -> output (length, batch, directions hidden_size), or
    (batch, length, ...), and (h_n, c_n), as `nn.LSTM`.

    Raises:
        ValueError: As `PHMLinear`, or if num_layers is below 1 or dropout is out of range; in `forward`, if a shape
            does not fit, or the sequence has no steps.
    """

    @typed
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        n: int = 4,
        rule: str | Tensor = "learned",
        learn_rule: bool | None = None,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(num_layers=num_layers)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout}: must be a probability, from 0 to 1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        options: dict[str, Any] = {"n": n, "rule": rule, "learn_rule": learn_rule, "rank": rank}
        options |= {"device": device, "dtype": dtype}
        directions = 2 if bidirectional else 1
        self.cells = nn.ModuleList(
            PHMLSTMCell(input_size if layer == 0 else directions * hidden_size, hidden_size, bias, **options)
            for layer in range(num_layers)
            for _ in range(directions)
        )

    def reset_parameters(self) -> None:
        """Draws every cell anew."""
        for index in range(len(self.cells)):
            self._cell(index).reset_parameters()

    def _cell(self, index: int) -> PHMLSTMCell:
        cell = self.cells[index]
        assert isinstance(cell, PHMLSTMCell)
        return cell

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The last layer's outputs at every step, and every cell's last state."""
        if not isinstance(x, Tensor) or x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"input of shape {shape}: must be a tensor (length, batch, {self.input_size}), batch first if "
                f"batch_first=True, or (length, {self.input_size})"
            )
        batched = x.dim() == 3
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if not batched:
            x, state = x.unsqueeze(1), None if state is None else (state[0].unsqueeze(1), state[1].unsqueeze(1))
        if x.shape[0] == 0:
            raise ValueError(f"input of shape {tuple(x.shape)}: must have a step at least")
        self._check_state(x.shape[1], state)
        lasts, directions = [], 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                index = directions * layer + direction
                own = None if state is None else (state[0][index], state[1][index])
                output, last = self._cell(index)._run(x, own, backwards=direction == 1)
                outputs.append(output)
                lasts.append(last)
            x = torch.cat(outputs, -1)
            if self.dropout and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout, self.training)
        h, c = (torch.stack(each) for each in zip(*lasts, strict=True))
        if not batched:
            return x.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return x.transpose(0, 1) if self.batch_first else x, (h, c)

    def _check_state(self, batch: int, state: State | None) -> None:
        shape = (len(self.cells), batch, self.hidden_size)
        for name, value in zip(("h_0", "c_0"), state or (), strict=False):
            if value.shape != shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)}: must be (cells, batch, hidden_size) = {shape}")

    def extra_repr(self) -> str:
        """Sizes, and what differs from the defaults."""
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"
        usual = {"batch_first": False, "dropout": 0.0, "bidirectional": False}
        return text + "".join(f", {k}={getattr(self, k)}" for k, v in usual.items() if getattr(self, k) != v)
