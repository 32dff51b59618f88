"""Linear layer and embedding whose vectors have unit norm, the bricks of nGPT (https://arxiv.org/abs/2410.01131).

Every vector that lies in the model's embedding space is a point on the sphere: a row of a matrix that reads from that
space or of an embedding (`normalize="in"`), a column of a matrix that writes to it (`normalize="out"`).

Call `constrain_()` of every such layer after each optimizer step: behind unscaling, clipping and the step, before an
average of the weights is updated (an average leaves the sphere, and wants `constrain_` too, as quantised weights do).
archzoo's training loop does; for a loop of one's own there are `constrain_(model)` and `register_constraint`. Or build
with `reparametrize=True`, which needs no help. Under DDP all ranks do the same; where a vector is cut into shards its
norm is wrong, so keep vectors whole on a rank.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from archzoo.kernels._op import compute_dtype
from archzoo.kernels.normalize import norm, normalize_, tolerance
from archzoo.kernels.normalized_residual import unit
from archzoo.layers._check import check_features, check_whole, typed
from archzoo.layers.start import Start, check_original, copy_bias, fresh
from archzoo.registry import Card, register_layer

Normalize = Literal["in", "out"]

NGPT_CARD: dict[str, Any] = {
    "title": "nGPT: Normalized Transformer with Representation Learning on the Hypersphere",
    "authors": "Ilya Loshchilov, Cheng-Ping Hsieh, Simeng Sun, Boris Ginsburg",
    "year": 2024,
    "arxiv": "2410.01131",
    "headline": "GPT's loss in 4 / 10 / 20 times fewer steps at a context of 1k / 4k / 8k tokens (0.5B and 1B "
    "parameters, OpenWebText); an independent run with float32 weights finds 1.5 to 2 / 4 times",
}


@register_layer(
    "normalized_linear",
    kind="linear",
    card=Card(
        equation=r"y = \hat{W} x + b, \quad \hat{W}_i = W_i / \|W_i\|",
        reproduced="nothing of the layer alone; see `ngpt`",
        **NGPT_CARD,
    ),
)
class NormalizedLinear(nn.Module):
    r"""Linear layer with a weight of unit vectors: $y = W x + b$, $\|W_i\| = 1$, or $y = (s \circ W) x + b$.

    The weight starts uniform on the sphere, the bias at zero. A vector of zeros stays zero. With 16-bit storage norms
    are 1 to the storage's rounding: 4e-3 for bfloat16.

    Args:
        in_features: Size of each input.
        out_features: Size of each output.
        bias: Whether to add b.
        normalize: Which vectors have unit norm: `"in"`, the rows, one for each output, as vectors of the input's space;
            `"out"`, the columns, one for each input, as vectors of the output's space.
        scaled: Whether each vector has a learned length s, which starts at 1; in nGPT it has none.
        reparametrize: Whether `forward` divides by the norms itself, instead of `constrain_()` after each step. Costs
            two more passes over the weight, and its gradient is tangential to the sphere.

    Attributes:
        weight: W (out, in).
        bias: b (out,), or None.
        scale: s, (out,) for `"in"` and (in,) for `"out"`; or None.

    Shape: (*, in) -> (*, out).

    Raises:
        ValueError: If a size is not a whole number, 1 or more, or `normalize` neither of its two; in `forward`, if the
            last size of the input is not `in_features`, or its dtype not the weight's.
    """

    @typed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        normalize: Normalize = "in",
        scaled: bool = False,
        reparametrize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        if normalize not in ("in", "out"):
            raise ValueError(f"normalize={normalize!r}: must be 'in' (unit rows) or 'out' (unit columns)")
        self.in_features, self.out_features = in_features, out_features
        self.normalize, self.reparametrize = normalize, reparametrize

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(out_features, in_features)
        self.bias = parameter(out_features) if bias else None
        self.scale = parameter(out_features if normalize == "in" else in_features) if scaled else None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Start["NormalizedLinear"]:
        """A layer that computes what an `nn.Linear` does, exactly: unit vectors of its weight, and their norms as s.

        Needs `scaled=True`, which is the default here. A vector of zeros gets a random direction and length 0, so that
        it can learn.

        Raises:
            TypeError: If `linear` is no `nn.Linear`.
            ValueError: If `scaled=False` and its vectors have other norms than 1 (or 0), which would be lost.
        """
        check_original(linear, nn.Linear)
        layer = fresh(cls, linear, **{"scaled": True, **options})
        with torch.no_grad():
            weight = linear.weight.to(compute_dtype(linear.weight))
            size = norm(weight, layer._dim)
            if layer.scale is not None:
                layer.weight.copy_(torch.where(size == 0, layer.weight, unit(weight, layer._dim)))
                layer.scale.copy_(size.flatten())
            elif (((size - 1).abs() <= tolerance(linear.weight.dtype, size.dtype)) | (size == 0)).all():
                layer.weight.copy_(linear.weight)
            else:
                raise ValueError(
                    f"{cls.__name__} with scaled=False loses the norms of the weight's vectors, here "
                    f"{float(size.min()):.3g} to {float(size.max()):.3g}; use scaled=True"
                )
            copy_bias(layer, linear)
        return Start(layer, 0.0)

    def reset_parameters(self) -> None:
        """Draws a weight uniform on the sphere; bias 0, lengths 1."""
        _draw_directions_(self.weight, self._dim)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def constrain_(self) -> None:
        """Brings the weight's vectors back to unit norm, in place. The training loop calls it after each step."""
        normalize_(self.weight, self._dim)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Maps x (*, in) to (*, out).

        Args:
            x: The input.
            scale: Multiplies W x, (out,); by way of the weight, which costs a pass over that instead of over the output
                and keeps nothing of the output's size for backward.
        """
        check_features(x, self.in_features, self.weight)
        return F.linear(x, self._effective_weight(scale), self.bias)

    def fold(self) -> nn.Linear:
        """A plain `nn.Linear` that computes the same, for inference; shares no memory with this layer."""
        return self._fold()

    @torch.no_grad()
    def _fold(self, scale: Tensor | None = None) -> nn.Linear:
        weight, bias = self._effective_weight(scale).clone(), self.bias
        sizes = self.in_features, self.out_features, bias is not None
        linear = nn.utils.skip_init(nn.Linear, *sizes, device=weight.device, dtype=weight.dtype)
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
        return linear.train(self.training).requires_grad_(False)

    @property
    def _dim(self) -> int:
        """The axis along which vectors lie."""
        return 1 if self.normalize == "in" else 0

    def _effective_weight(self, scale: Tensor | None = None) -> Tensor:
        weight: Tensor = unit(self.weight, self._dim) if self.reparametrize else self.weight
        if self.scale is not None:
            weight = weight * self.scale.unsqueeze(self._dim)
        return weight if scale is None else weight * scale.unsqueeze(1)

    def extra_repr(self) -> str:
        """Sizes and options, for `repr`."""
        text = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, normalize={self.normalize!r}"
        text += ", scaled=True" if self.scale is not None else ""
        return f"{text}, reparametrize=True" if self.reparametrize else text


class NormalizedEmbedding(nn.Module):
    """Embedding whose rows have unit norm. Rows that are never looked up keep their random direction.

    Args:
        num_embeddings: Number of tokens.
        embedding_dim: Size of a row.
        reparametrize: As in `NormalizedLinear`.
        device: Of the weight.
        dtype: As `device`.

    Attributes:
        weight: (num_embeddings, embedding_dim).

    Shape: (*) of whole numbers below num_embeddings -> (*, embedding_dim).

    Raises:
        ValueError: If a size is not a whole number, 1 or more; in `forward`, if the ids are not int64 or int32.
    """

    @typed
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        reparametrize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self.num_embeddings, self.embedding_dim, self.reparametrize = num_embeddings, embedding_dim, reparametrize
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws rows uniform on the sphere."""
        _draw_directions_(self.weight, 1)

    def constrain_(self) -> None:
        """Brings the rows back to unit norm, in place. The training loop calls it after each step."""
        normalize_(self.weight, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of ids (*) -> (*, embedding_dim)."""
        check_ids(ids)
        rows = F.embedding(ids, self.weight)
        return unit(rows) if self.reparametrize else rows

    @torch.no_grad()
    def fold(self) -> nn.Embedding:
        """A plain `nn.Embedding` of the same rows, for inference; shares no memory with this layer."""
        weight = unit(self.weight) if self.reparametrize else self.weight.clone()
        return nn.Embedding.from_pretrained(weight).train(self.training)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{text}, reparametrize=True" if self.reparametrize else text


def constrain_(model: nn.Module) -> None:
    """Calls `constrain_()` of every layer of a model that has one. For loops of one's own, after `optimizer.step()`.

    Raises:
        ValueError: If there is no such layer.
    """
    methods = [getattr(module, "constrain_", None) for module in model.modules()]
    found = [method for method in methods if callable(method)]
    if not found:
        raise ValueError(f"no layer of the {type(model).__name__} has a constrain_(), so there is nothing to constrain")
    for method in found:
        method()


def register_constraint(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Constrains a model now, and from now on after each step of an optimizer.

    Args:
        optimizer: Whose `step()` is followed; a hook does not travel with its state dict, or a copy of it.
        model: As for `constrain_`.

    Returns:
        A handle whose `remove()` ends it.

    Raises:
        ValueError: As `constrain_`.
    """
    constrain_(model)
    return optimizer.register_step_post_hook(lambda *_: constrain_(model))


def check_ids(ids: Tensor, dims: int | None = None) -> None:
    """A ValueError unless ids are of int64 or int32, and (batch, length) if `dims` is 2."""
    if ids.dtype not in (torch.int64, torch.int32) or dims not in (None, ids.dim()):
        shape = "(batch, length)" if dims == 2 else "of any shape"
        raise ValueError(f"ids of shape {tuple(ids.shape)} and {ids.dtype}: must be int64 or int32, {shape}")


def _draw_directions_(weight: Tensor, dim: int) -> None:
    nn.init.normal_(weight)
    normalize_(weight, dim)
