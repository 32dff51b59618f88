"""Biological Processing Unit: an insect's wiring as a recurrent layer that never learns (arXiv 2507.10951).

A reservoir. One linear map drives the sensory neurons, one reads the output neurons, and only these two learn.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._bpu_plan import RecurrencePlan, link_sizes, plan_recurrence, state_sizes
from archzoo.kernels.bpu_recurrence import BACKENDS, bpu_recurrence
from archzoo.layers._check import check_dropout, check_features, check_positive, check_whole, typed
from archzoo.layers._connectome import Connectome
from archzoo.layers._connectome_files import check_choice
from archzoo.registry import Card, register_layer

__all__ = ["BPU", "Connectome"]


class _ToColumns(nn.Linear):
    """`nn.Linear` whose output lies in memory as (S, B), as the recurrence takes it: on a CPU faster, and no copy."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.device.type != "cpu":
            return super().forward(x)
        if self.bias is None:
            return (self.weight @ x.t()).t()
        return torch.addmm(self.bias.unsqueeze(1), self.weight, x.t()).t()


INJECT, READOUT = ("first", "every"), ("last", "sum")
MAX_STEPS = 1000
_EDGES = ("edge_pre", "edge_post")


@register_layer(
    "bpu",
    kind="module",
    nonlinear=True,
    card=Card(
        title="Biological Processing Units: Leveraging an Insect Connectome to Pioneer Biofidelic Neural Architectures",
        authors="Siyu Yu, Zihan Qin, Tingshan Liu, Beiya Xu, R. Jacob Vogelstein, Jason Brown, Joshua T. Vogelstein",
        year=2025,
        arxiv="2507.10951",
        equation=r"h_{t+1} = \mathrm{ReLU}(h_t W + [E_t, 0, 0]),\quad E_0 = W_{in} x + b_{in},\quad "
        r"y = W_{out} o_T + b_{out}",
        headline="MNIST 98 % (an equal perceptron 97), CIFAR-10 58 % (52), with the wiring of a fruit fly larva, fixed",
        reproduced="MNIST, the paper's settings, 3 seeds (experiment bpu_mnist): 97.8 %, an equal perceptron 97.4, "
        "null models 97.6 to 98.0, so that it is not the wiring that helps. CIFAR-10, 12 epochs, 3 seeds (experiment "
        "bpu_cifar10): 55.5 %, not 58, and no lead over null models or the equal perceptron (55.9 at its better "
        "settings). The chess puzzles were not run",
    ),
)
class BPU(nn.Module):
    r"""A measured wiring between two linear maps: $h \leftarrow \mathrm{ReLU}(h W + [E(t), 0, 0])$, T times from h = 0.

    $E(0) = \mathrm{dropout}(x W_{in}^T + b_{in})$ enters the sensory neurons, and after T updates the output neurons
    are read: $y = o_T W_{out}^T + b_{out}$. W holds the signed synapse counts times `scale`. It is no parameter: no
    optimizer, weight decay, moving average or `reset_parameters` changes it. Only the neurons that the drive can have
    reached, and that can still reach the outputs, are computed: exact, and far fewer than there are.

    >>> import torch
    >>> wiring = Connectome.from_dense([[0, 2, 0], [0, 0, -1], [0, 0, 0]], num_sensory=1, num_output=1)
    >>> BPU(wiring, 8, 4, steps=3)(torch.zeros(2, 8)).shape
    torch.Size([2, 4])

    Args:
        connectome: The wiring.
        in_features: Size D of each input.
        out_features: Size E of each output.
        bias: Whether the two linear maps have one.
        steps: Number T of updates. With 2 only direct edges from sensory to output neurons act.
        scale: Weight of one synapse.
        spectral_radius: That of W, which sets the scale; None: as `scale` says.
        inject: `"first"`: the drive enters at the first update. `"every"`: at each.
        residual: h <- ReLU(h + h W + E) instead.
        readout: `"last"`: the outputs' last state is read. `"sum"`: the sum of all their states.
        dropout: Probability that a sensory neuron's drive is dropped in training.
        trainable: Whether the edges' weights learn. Edges neither come nor go.
        backend: `"sparse"`, `"dense"`, or `"auto"`: sparse, but on a GPU dense for a batch above 64.

    Attributes:
        connectome: The wiring as it was given; it is shared, not copied.
        scale: Weight of one synapse, as used.
        input_proj: `nn.Linear` to the sensory neurons, weight (S, D).
        output_proj: `nn.Linear` from the output neurons, weight (E, O).
        edge_weight: Weight of each edge, a buffer; a parameter if `trainable`.
        edge_pre, edge_post: Its ends, int64, in the connectome's order; the state dict has them too.
        step_sizes: Numbers of neurons that are computed at each step.
        step_edges: Numbers of edges between each step and the next.

    Shape: (*, D) -> (*, E).

    Raises:
        ValueError: If an option is out of range or unknown, so few steps reach no output neuron, or a spectral radius
            is asked of a wiring that has no cycle; in `forward`, if the input's size or dtype does not fit; in
            `load_state_dict`, if the edges are another wiring's.
        TypeError: If `connectome` is none.
    """

    edge_weight: Tensor
    _placed: RecurrencePlan

    @typed
    def __init__(
        self,
        connectome: Connectome,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        steps: int = 2,
        scale: float = 0.04,
        spectral_radius: float | None = None,
        inject: str = "first",
        residual: bool = False,
        readout: str = "last",
        dropout: float = 0.2,
        trainable: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(connectome, Connectome):
            raise TypeError(f"connectome of {type(connectome).__name__}: must be an archzoo.Connectome")
        check_whole(in_features=in_features, out_features=out_features, steps=steps)
        if steps > MAX_STEPS:
            raise ValueError(f"steps={steps}: must be at most {MAX_STEPS}, for each step has its own list of edges")
        check_positive(scale=scale)
        check_dropout(dropout)
        check_choice(inject=(inject, INJECT), readout=(readout, READOUT), backend=(backend, BACKENDS))
        if spectral_radius is not None:
            check_positive(spectral_radius=spectral_radius)
            own = connectome.spectral_radius()
            if not own:
                raise ValueError(
                    f"spectral_radius={spectral_radius}: that of this wiring is 0, whatever its scale; use scale"
                )
            scale = spectral_radius / own
        self.connectome, self.in_features, self.out_features = connectome, in_features, out_features
        self.steps, self.scale, self.spectral_radius = steps, scale, spectral_radius
        self.inject, self.residual, self.readout = inject, residual, readout
        self.dropout, self.trainable, self.backend = dropout, trainable, backend
        pools = connectome.pool_sizes
        self._plan = plan_recurrence(
            connectome.pre, connectome.post, pools, steps, inject=inject, residual=residual, readout=readout
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_proj = _ToColumns(in_features, pools[0], bias, **factory)
        self.output_proj = nn.Linear(pools[2], out_features, bias, **factory)
        weight = torch.empty(connectome.num_edges, **factory)
        if trainable:
            self.edge_weight = nn.Parameter(weight)
        else:
            self.register_buffer("edge_weight", weight)
        self._filled = False  # whether the core's numbers are there; not so on `meta`
        self._fill()
        self._follow()

    @property
    def edge_pre(self) -> Tensor:
        """Presynaptic neuron of each edge (E,)."""
        return self.connectome.pre.to(self.edge_weight.device)

    @property
    def edge_post(self) -> Tensor:
        """Postsynaptic neuron of each edge (E,)."""
        return self.connectome.post.to(self.edge_weight.device)

    def reset_parameters(self) -> None:
        """Draws the two linear maps anew. The core stays; one that was built on `meta` is filled."""
        self.input_proj.reset_parameters()
        self.output_proj.reset_parameters()
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        if not self._filled and not self.edge_weight.is_meta:
            self.edge_weight.copy_(self.scale * self.connectome.weight)
            self._filled = True

    def _follow(self) -> None:
        """Brings the sets of neurons to where the weights are.

        They are no buffer: what averages all buffers, as `AveragedModel(use_buffers=True)`, rounds whole numbers down.
        """
        self._placed = self._plan.to(self.edge_weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._follow()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _EDGES:
            destination[prefix + name] = getattr(self, name).clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuses another wiring's edges, for which the sets of neurons were not made."""
        keys = {prefix + name: getattr(self.connectome, name.removeprefix("edge_")) for name in _EDGES}
        for key, own in keys.items():
            loaded = state_dict.get(key)
            if isinstance(loaded, Tensor) and not loaded.is_meta and not torch.equal(loaded.cpu(), own):
                raise ValueError(
                    f"{key}: the state dict is of another wiring than {self.connectome!r}, with which this layer was "
                    "built; build it with that one"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        unexpected_keys[:] = [key for key in unexpected_keys if key not in keys]
        if strict:
            missing_keys.extend(key for key in keys if key not in state_dict)
        if prefix + "edge_weight" in state_dict and not self.edge_weight.is_meta:
            self._filled = True
        self._follow()

    @property
    def step_sizes(self) -> tuple[int, ...]:
        """Numbers of neurons that are computed at each step, first to last."""
        return tuple(state_sizes(self._plan.layout))

    @property
    def step_edges(self) -> tuple[int, ...]:
        """Numbers of edges that are used between each step and the next."""
        return tuple(link_sizes(self._plan.layout))

    def dense_weight(self) -> Tensor:
        """W (N, N), rows presynaptic, in the layer's dtype."""
        total = self.connectome.num_neurons
        matrix = self.edge_weight.new_zeros(total, total)
        return matrix.index_put((self.edge_pre, self.edge_post), self.edge_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (*, in_features) to (*, out_features)."""
        check_features(x, self.in_features, self.input_proj.weight)
        read = bpu_recurrence(self._drop(self.input_proj(x)), self.edge_weight, self._placed, backend=self.backend)
        y: Tensor = self.output_proj(read)
        return y

    def _drop(self, drive: Tensor) -> Tensor:
        """`F.dropout`, whose Bernoulli numbers take a CPU four times as long as these, a tenth of a training step."""
        if drive.device.type != "cpu" or not self.training or not self.dropout or self.dropout == 1:
            return F.dropout(drive, self.dropout, self.training)
        halves = torch.empty((drive.numel() + 1) // 2, dtype=torch.int64).random_(-(2**63), None).view(torch.int32)
        threshold = round(self.dropout * 2**32) - 2**31  # of all 32-bit numbers, from -2^31 on, this share is below
        columns = drive.dim() == 2 and drive.mT.is_contiguous()
        kept = torch.empty_like(drive.mT if columns else drive, memory_format=torch.contiguous_format)
        flat = kept.view(-1)
        torch.ge(halves[: drive.numel()], threshold, out=flat).mul_(1 / (1 - self.dropout))
        return drive * (kept.mT if columns else kept)

    def summary(self) -> dict[str, Any]:
        """What a record should say of the wiring and of what of it acts; plain numbers and texts."""
        return {
            **self.connectome.summary(),
            "scale": self.scale,
            "core_spectral_radius": self.scale * self.connectome.spectral_radius(),
            "steps": self.steps,
            "neurons_per_step": list(self.step_sizes),
            "edges_per_step": list(self.step_edges),
        }

    def extra_repr(self) -> str:
        """Sizes and options, for `repr`."""
        sizes = " + ".join(map(str, self.connectome.pool_sizes))
        options = {
            "steps": (self.steps, None),
            "scale": (self.scale, None),
            "inject": (self.inject, "first"),
            "residual": (self.residual, False),
            "readout": (self.readout, "last"),
            "dropout": (self.dropout, None),
            "trainable": (self.trainable, False),
            "backend": (self.backend, "auto"),
        }
        shown = ", ".join(
            f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
            for key, (value, usual) in options.items()
            if value != usual
        )
        return (
            f"{self.in_features}, {self.out_features}, bias={self.input_proj.bias is not None}, neurons={sizes}, "
            f"edges={self.connectome.num_edges}, {shown}"
        )
