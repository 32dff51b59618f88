"""S-KAN: every output chooses what kind of functions its edges carry (https://arxiv.org/abs/2408.08338)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from archzoo.layers._check import typed
from archzoo.layers._conv import as_pair, check_channels, check_padding
from archzoo.layers._kan import _check_whole, _is_finite
from archzoo.layers._start_kan import _become_all, _FromConv2d, _FromLinear, _start_kwargs
from archzoo.names import suggest
from archzoo.registry import Card, Kind, create_layer, get_layer, layer_options, list_layers, register_layer

Granularity = Literal["node", "layer"]
Stage = Literal["full", "selective", "pruned"]


def _card(equation: str, headline: str, reproduced: str) -> Card:
    return Card(
        title="Activation Space Selectable Kolmogorov-Arnold Networks",
        authors="Zhuoqin Yang, Jiansong Zhang, Xiaoling Luo, Zheng Lu, Linlin Shen",
        year=2024,
        arxiv="2408.08338",
        equation=equation,
        headline=headline,
        reproduced=f"{reproduced} The paper's code of the selection is not public, and the rule here is ours",
    )


class _SelectableKAN(nn.Module):
    """What the two forms share: all but how a candidate is built."""

    _kind: ClassVar[Kind]
    _usual_options: ClassVar[dict[str, dict[str, Any]]] = {}
    """What candidates get in a pool unless `pool_kwargs` says else."""

    bias: nn.Parameter | None
    selected: Tensor
    _order: Tensor | None

    def _build(
        self,
        inputs: int,
        outputs: int,
        shape: tuple[Any, ...],
        bias: bool,
        pool: Sequence[str],
        pool_kwargs: Mapping[str, Mapping[str, Any]] | None,
        granularity: Granularity,
        temperature: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if granularity not in get_args(Granularity):
            raise ValueError(f"granularity={granularity!r}: must be 'node' (each output chooses) or 'layer'")
        if not (_is_finite(temperature) and temperature > 0):
            raise ValueError(f"temperature={temperature!r}: must be positive and finite; 1.0 is the plain softmax")
        self._inputs, self._outputs, self._shape = inputs, outputs, shape
        self.pool = self._checked_pool(pool)
        self.pool_kwargs = self._checked_kwargs(pool_kwargs)
        self.granularity, self.temperature = granularity, float(temperature)
        self.stage: Stage = "full"
        self.candidates = nn.ModuleList(self._candidate(name, outputs, device, dtype) for name in self.pool)
        nodes = outputs if granularity == "node" else 1
        self.selection_logits = nn.Parameter(torch.empty(nodes, len(self.pool), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
        self.register_buffer("selected", torch.empty(nodes, device=device, dtype=torch.int64))
        self.register_buffer("_order", None, persistent=False)
        self._arrange("full", [])
        self._reset_selection()

    def _candidate(
        self, name: str, outputs: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Module:
        """A layer of the pool with so many outputs, and without a bias."""
        sizes = (self._inputs, outputs, *self._shape)
        return create_layer(name, *sizes, bias=False, device=device, dtype=dtype, **self.pool_kwargs[name])

    def reset_parameters(self) -> None:
        """Back to stage "full": new random candidates, equal logits. What was pruned is there again, as new objects."""
        if self.stage == "pruned":
            like = self.selection_logits
            fresh = [self._candidate(name, self._outputs, like.device, like.dtype) for name in self.pool]
            self.candidates = nn.ModuleList(fresh).train(self.training)
        else:
            for candidate in self.candidates:
                candidate.reset_parameters()  # type: ignore[operator]  # every layer of the zoo has it
        self._arrange("full", [])
        self._reset_selection()

    @torch.no_grad()
    def _reset_selection(self) -> None:
        self.selection_logits.zero_()
        self.selected.fill_(-1)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def _become(self, weight: Tensor) -> Tensor:
        """Every candidate starts for itself."""
        like, classes = self.selection_logits, {name: get_layer(name).cls for name in self.pool}
        self.pool_kwargs = _start_kwargs(classes, self.pool_kwargs)
        made = [self._candidate(name, self._outputs, like.device, like.dtype) for name in self.pool]
        self.candidates = nn.ModuleList(made).train(self.training)
        return _become_all(made, weight)

    # --- The three stages ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the class's docstring. A ValueError if x has another size or dtype."""
        outputs: list[Tensor] = [self.candidates[i](x) for i in self._active]
        dtype = outputs[0].dtype
        if self.stage == "full":
            weights = self._wide_weights().t().unflatten(1, (-1, *self._after))  # (P, O or 1, 1 for each of `_after`)
            y = outputs[0] * weights[0]
            for output, weight in zip(outputs[1:], weights[1:], strict=True):
                y = y + output * weight
        else:
            y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, self._axis)
            if self._order is not None:
                y = y.index_select(self._axis, self._order)
        if self.bias is not None:
            y = y + self.bias.view(-1, *self._after)
        return y.to(dtype)

    def selection_weights(self) -> Tensor:
        """Weight of each candidate at each node, as they stand in `pool`: (O, P), or (1, P) for the whole layer.

        The softmax of the logits, differentiable; once selected, 1 for the winner and 0 for the others.
        """
        return self._wide_weights().to(self.selection_logits.dtype)

    def _wide_weights(self) -> Tensor:
        logits: Tensor = self.selection_logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.stage == "full":
            return (logits / self.temperature).softmax(-1)
        return (self.selected.unsqueeze(-1) == torch.arange(len(self.pool), device=logits.device)).to(logits)

    @torch.no_grad()
    def select_(self) -> None:
        """From stage "full" to "selective": each node keeps to the candidate of its largest logit, the first of equals.

        The logits are frozen. Candidates that won nowhere are frozen too, and not evaluated any more. Of the others the
        rows that lost get gradients of 0. Build the optimizer again, and wrap in `DistributedDataParallel` again.

        Raises:
            ValueError: If the stage is another one, or a logit is not finite.
        """
        if self.stage != "full":
            raise ValueError(f"stage={self.stage!r}: select_() was called before; reset_parameters() starts again")
        logits = self.selection_logits
        bad = logits.numel() if logits.is_meta else int((~logits.isfinite()).sum())
        if bad:
            raise ValueError(f"selection_logits: {bad} of {logits.numel()} are not finite numbers; there is no largest")
        self.selected.copy_(logits.argmax(-1))
        self._arrange("selective", self.selected.tolist())

    @torch.no_grad()
    def prune_(self) -> None:
        """From stage "selective" to "pruned": drops what lost, and leaves the output as it was, but for rounding.

        Each candidate keeps the outputs that it won; one that won none leaves `candidates`. Parameters become new
        objects: build the optimizer again.

        Raises:
            ValueError: If the stage is another one.
        """
        if self.stage != "selective":
            raise ValueError(f"stage={self.stage!r}: prune_() follows select_(), and comes once")
        selected = self.selected.tolist()
        whole = range(self._outputs)
        rows = {i: [o for o in whole if self.granularity == "layer" or selected[o] == i] for i in self._active}
        self.candidates = nn.ModuleList(self._cut(i, won) for i, won in rows.items())
        self._arrange("pruned", selected)

    def _arrange(self, stage: Stage, selected: list[int]) -> None:
        """Sets what follows from the stage and the winners, but for the structure: what is evaluated, and trained.

        `_active` are the indices of the candidates that are evaluated; `_order` is where each output is in their
        concatenated outputs, None if they are in order.
        """
        if (stage == "full") != (self.stage == "full"):
            self.selection_logits.requires_grad_(stage == "full")
        if self.stage == "selective":
            self._freeze_idle(False)
        self.stage = stage
        winners = sorted(set(selected))
        self._active = tuple(winners if stage == "selective" else range(len(self.candidates)))
        if stage == "selective":
            self._freeze_idle(True)
        order = None
        if len(winners) > 1 and stage == "selective":
            order = [winners.index(winner) * self._outputs + row for row, winner in enumerate(selected)]
        elif len(winners) > 1:
            rows = sorted(range(len(selected)), key=lambda row: (selected[row], row))  # as they are concatenated
            order = sorted(range(len(rows)), key=rows.__getitem__)
        self._order = None if order is None else torch.tensor(order, device=self.selected.device)
        self._won = self._sizes("pruned", selected) if selected else {}

    def _freeze_idle(self, frozen: bool) -> None:
        """Freezes the candidates that are not evaluated, or trains them again."""
        for index, candidate in enumerate(self.candidates):
            if index not in self._active:
                candidate.requires_grad_(not frozen)

    # --- State --------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        selected = state_dict.get(prefix + "selected")
        if selected is None or selected.shape != self.selected.shape or selected.is_meta:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        winners = [int(winner) for winner in selected.tolist()]
        if any(winner != -1 for winner in winners) and not all(0 <= w < len(self.pool) for w in winners):
            error_msgs.append(
                f"{prefix}selected={winners}: must be -1 everywhere, or everywhere an index of pool={self.pool}"
            )
            return
        self._restructure(
            winners, {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        # Again, since a layer on meta may have got its device only now, by load_state_dict(assign=True).
        self._arrange(self.stage, winners if self.stage != "full" else [])

    @torch.no_grad()
    def _restructure(self, winners: list[int], state: Mapping[str, Any]) -> None:
        """Gives the candidates the shapes of a state dict about to be loaded, if they have others."""
        stage, like = self._stage_of(winners, state), self.selection_logits
        present = self._won if self.stage == "pruned" else self._sizes("full", [])
        sizes = self._sizes(stage, winners)
        if sizes != present:
            if self.stage == "pruned" or like.is_meta:
                # Built on the CPU, and the random numbers given back: loading draws none.
                device = "meta" if like.is_meta else "cpu"
                with torch.random.fork_rng(devices=[]):
                    made = [self._candidate(self.pool[i], size, device, like.dtype) for i, size in sizes.items()]
            else:  # cut rather than built, since what has been done to them, as refined grids, stays
                made = [self._cut(i, range(size)) for i, size in sizes.items()]
            self.candidates = nn.ModuleList(made).to(like.device).train(self.training)
        self._arrange(stage, winners if stage != "full" else [])

    def _cut(self, index: int, rows: Sequence[int]) -> nn.Module:
        """A candidate with only these outputs."""
        candidate = self.candidates[index]
        if len(rows) < self._outputs:
            candidate.keep_outputs_(rows)  # type: ignore[operator]  # _checked_pool made sure of it
        return candidate

    def _stage_of(self, winners: list[int], state: Mapping[str, Any]) -> Stage:
        """The stage of a saved layer. Where pruning drops nothing, as from a pool of one, that is "selective"."""
        if winners[0] == -1:
            return "full"
        if not any(name.startswith(f"candidates.{len(self.pool) - 1}.") for name in state):
            return "pruned"
        # All candidates are there: the first has either all its outputs, or those that it won.
        whole = self._candidate(self.pool[0], self._outputs, "meta", self.selection_logits.dtype).state_dict()
        saved = {name: state.get(f"candidates.0.{name}") for name in whole}
        cut = any(t is not None and t.shape[:1] != whole[name].shape[:1] for name, t in saved.items())
        return "pruned" if cut else "selective"

    def _sizes(self, stage: Stage, winners: list[int]) -> dict[int, int]:
        """Which candidates a layer has in a stage, by index in the pool, and how many outputs each."""
        if stage != "pruned":
            return dict.fromkeys(range(len(self.pool)), self._outputs)
        if self.granularity == "layer":
            return {winners[0]: self._outputs}
        return dict(sorted(Counter(winners).items()))

    # --- Small helpers ------------------------------------------------------------------------------------------------

    def _checked_pool(self, pool: Sequence[str]) -> tuple[str, ...]:
        if not isinstance(pool, Sequence) or isinstance(pool, str) or not pool:
            raise ValueError(f"pool={pool!r}: must be a list of one or more layers' names, as ('kan', 'fast_kan')")
        known = list_layers()
        for name in pool:
            if name not in known:
                raise ValueError(f"pool={pool!r}: layer {name!r} is not registered; {suggest(str(name), known)}")
            entry = get_layer(name)
            if entry.kind != self._kind:
                raise ValueError(
                    f"pool={pool!r}: layer {name!r} is of kind {entry.kind!r}, and the pool is made of layers of kind "
                    f"{self._kind!r}: {', '.join(self._possible())}"
                )
            if name not in self._possible():
                raise ValueError(
                    f"pool={pool!r}: layer {name!r} has no method keep_outputs_, without which it cannot be pruned; "
                    f"choose from {', '.join(self._possible())}"
                )
        if len(set(pool)) < len(pool):
            raise ValueError(f"pool={pool!r}: each name may occur once")
        return tuple(pool)

    def _possible(self) -> list[str]:
        """Names of the layers that a pool can hold."""
        return [name for name in list_layers(self._kind) if hasattr(get_layer(name).cls, "keep_outputs_")]

    def _checked_kwargs(self, pool_kwargs: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
        """Every candidate's options."""
        own = {} if pool_kwargs is None else pool_kwargs
        if not isinstance(own, Mapping) or not all(isinstance(options, Mapping) for options in own.values()):
            raise ValueError(f"pool_kwargs={own!r}: must be None or options by name, as {{'kan': {{'grid_size': 8}}}}")
        for name, options in own.items():
            if name not in self.pool:
                raise ValueError(f"pool_kwargs={own!r}: {name!r} is not in the pool; {suggest(str(name), self.pool)}")
            known = list(layer_options(name))
            for key in options:
                if key not in known:
                    raise ValueError(
                        f"pool_kwargs={own!r}: layer {name!r} has no option {key!r}; {suggest(str(key), known)}"
                    )
        return {name: {**self._usual_options.get(name, {}), **own.get(name, {})} for name in self.pool}

    @property
    def _axis(self) -> int:
        """The outputs' dimension."""
        return -1 - len(self._after)

    @property
    def _after(self) -> tuple[int, ...]:
        """A 1 for every dimension behind the outputs'."""
        return (1, 1) if self._kind == "conv2d" else ()

    def _options(self) -> str:
        won = "".join(f", {self.pool[index]}={count}" for index, count in self._won.items())
        return (
            f"bias={self.bias is not None}, granularity={self.granularity!r}, temperature={self.temperature:g}, "
            f"stage={self.stage!r}{won}"
        )


@register_layer(
    "selectable_kan",
    kind="linear",
    nonlinear=True,
    card=_card(
        r"y_o = b_o + \sum_p w_{op}\, z^{(p)}_o(x), \quad w_o = \mathrm{softmax}(l_o / \tau)",
        "best of its KAN peers and of MLPs on seven function-fitting tasks (abstract)",
        "exp(sin(pi x) + y^2) by [2, w, 1], 2000 steps of Adam, 3 seeds, test RMSE: 0.0062 with 4000 parameters, 1360 "
        "once pruned; with 1000: kan 0.0066, fast_kan 0.0085, wavelet_kan 0.0110, chebyshev_kan 0.0147, an MLP 0.072. "
        "No better than the best single candidate.",
    ),
)
class SelectableKANLinear(_SelectableKAN, _FromLinear):
    r"""KAN layer whose every output picks its kind of functions: $y_o = b_o + \sum_p w_{op} z^{(p)}_o(x)$.

    $z^{(p)}$ are the layers of a pool, $w_o = \mathrm{softmax}(l_o / \tau)$. Training has three stages. "full": all
    candidates are trained, weighted by w. `select_()` begins "selective": each output keeps to the candidate of its
    largest logit. `prune_()` ends in "pruned": what lost is gone, and the layer is as small and as fast as its winners.
    The trainer's callback `selection_stages` calls both. Until pruned, the layer has as many parameters as all
    candidates together: compare it at equal parameters with that in mind.

    Args:
        in_features: Size I of each input.
        out_features: Size O of each output.
        bias: Whether to add `bias`; the candidates have none.
        pool: Registry names of the P candidates, linear KAN layers.
        pool_kwargs: Options of candidates by name, as `{"kan": {"grid_size": 8}}`. `fast_kan` has `layernorm=False`
            unless this says else: candidates see the same input.
        granularity: Who chooses: each output, `"node"`, or the whole layer, `"layer"`.
        temperature: $\tau$. Below 1 the weights favour the largest logit more.
        device: Where the parameters are.
        dtype: Of the parameters.

    State: `candidates`, a `ModuleList` of the pool's layers in its order; `selection_logits` (O, P), or (1, P) for
    "layer", 0 at first; `bias` (O,) or None, 0 at first; the buffer `selected` (O,) or (1,), int64, which layer of the
    pool was chosen, -1 before. Pruned, `candidates` holds those that won something, still in the pool's order, each
    with the outputs that it won, in their order. The attribute `stage` tells which stage it is. A state dict of any
    stage loads into a layer of any stage, and takes it to its own; where the structures differ, parameters become new
    objects: build the optimizer afterwards.

    Start: `from_linear` starts every candidate for itself, with the options that this takes in `pool_kwargs`, so that
    each can win; the error of their sum is 0.05 by default, and 0.0 with a pool of exact ones, as "kan".

    Shape: (*, I) -> (*, O).

    Raises:
        ValueError: If an argument is out of range, or the pool names a layer that cannot be in it.

    >>> layer = SelectableKANLinear(2, 3, pool=("kan", "chebyshev_kan"))
    >>> layer.select_()
    >>> layer.prune_()
    >>> layer(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    _kind = "linear"
    _usual_options: ClassVar[dict[str, dict[str, Any]]] = {"fast_kan": {"layernorm": False}}

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pool: Sequence[str] = ("kan", "fast_kan", "chebyshev_kan", "wavelet_kan"),
        pool_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        granularity: Granularity = "node",
        temperature: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_whole(1, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self._build(in_features, out_features, (), bias, pool, pool_kwargs, granularity, temperature, device, dtype)

    def extra_repr(self) -> str:
        """Sizes, options, stage, and how many outputs each candidate won."""
        return f"{self.in_features}, {self.out_features}, {self._options()}"


@register_layer(
    "selectable_kan_conv2d",
    kind="conv2d",
    nonlinear=True,
    card=_card(
        r"y_{oq} = b_o + \sum_p w_{op}\, z^{(p)}_{oq}(x), \quad w_o = \mathrm{softmax}(l_o / \tau)",
        "S-ConvKAN leads on four image classification data sets (abstract)",
        "MNIST, 5000 images, 6 epochs, 3 blocks, one seed: 93.0 % with 20,100 parameters, 6500 once pruned; with 5000: "
        "kan 88.7, fast_kan 89.9, chebyshev_kan 91.3, wavelet_kan 93.5, nn.Conv2d 96.6 %. It does not lead.",
    ),
)
class SelectableKANConv2d(_SelectableKAN, _FromConv2d):
    r"""KAN convolution whose every output channel picks its functions: $y_o = b_o + \sum_p w_{op} z^{(p)}_o(x)$.

    `SelectableKANLinear` with convolutions for candidates and output channels for nodes: stages, methods, weights and
    state are the same.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels O of the output.
        kernel_size: Taps down and across, or one number for both, as in `nn.Conv2d`.
        stride: Pixels from one output to the next.
        padding: Pixels added on each side, "same" or "valid".
        dilation: Pixels between taps.
        groups: Into how many groups channels and outputs are divided; more than one only if granularity="layer".
        bias: Whether to add `bias`; the candidates have none.
        pool: Registry names of the P candidates, convolutional KAN layers.
        pool_kwargs: Options of candidates by name, as `{"kan_conv2d": {"pad_value": 0.0}}`.
        granularity: Who chooses: each output channel, `"node"`, or the whole layer, `"layer"`.
        temperature: $\tau$. Below 1 the weights favour the largest logit more.
        device: Where the parameters are.
        dtype: Of the parameters.

    State, and start by `from_conv2d`: As of `SelectableKANLinear`.

    Shape: (N, C, H, W) -> (N, O, H', W'), or without N.

    Raises:
        ValueError: If an argument is out of range, or the pool names a layer that cannot be in it.
    """

    _kind = "conv2d"

    @typed
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        pool: Sequence[str] = ("kan_conv2d", "fast_kan_conv2d", "chebyshev_kan_conv2d", "wavelet_kan_conv2d"),
        pool_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        granularity: Granularity = "node",
        temperature: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        if groups > 1 and granularity == "node":
            raise ValueError(
                f"groups={groups}: channels that choose for themselves would not fill groups evenly once pruned; "
                "use groups=1 or granularity='layer'"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = as_pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = as_pair("stride", stride, 1), as_pair("dilation", dilation, 1)
        self.padding = check_padding(padding, self.stride)
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, groups)
        self._build(in_channels, out_channels, shape, bias, pool, pool_kwargs, granularity, temperature, device, dtype)

    def extra_repr(self) -> str:
        """Sizes, options, stage, and how many output channels each candidate won."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, usual in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            value = getattr(self, name)
            text += f", {name}={value!r}" if value != usual else ""
        return f"{text}, {self._options()}"
