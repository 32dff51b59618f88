r"""Capsules with dynamic routing (Sabour, Frosst, Hinton 2017, https://arxiv.org/abs/1710.09829).

A capsule is a vector: its length says how sure the network is that a thing is there, its direction describes the thing.
A lower capsule votes for the vectors of all upper ones, and votes that agree get a larger share. The whole network is
`archzoo.models.capsnet.CapsNet`; `archzoo.models.capsule_head` puts capsules on top of any backbone of timm.

Where paper and authors' code differ, this follows the code: there is a bias in every round, the gradient runs through
all rounds, and primary capsules are divided by their number of types.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import compute_dtype
from archzoo.kernels.capsule_routing import capsule_routing, squash
from archzoo.layers._check import check_dtype, check_whole, typed
from archzoo.registry import Card, register_layer

__all__ = ["DynamicRouting", "PrimaryCapsules", "dynamic_routing", "margin_loss", "squash"]

INIT_STD = 0.1
"""Of weights, a normal distribution that is cut at twice as much; larger ones let lengths saturate."""
INIT_BIAS = 0.1


def dynamic_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
    return_coupling: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Upper capsules from lower ones, by routing: the functional form of `DynamicRouting`.

    With votes $\hat u_{ij} = W_{ij} u_i$ and $b_{ij} = 0$, `iterations` times: $c_{ij} = \mathrm{softmax}_j(b_{ij})$,
    $s_j = \sum_i c_{ij} \hat u_{ij} + \mathrm{bias}_j$, $v_j = \mathrm{squash}(s_j)$, and $\hat u_{ij} \cdot v_j$ is
    added to $b_{ij}$.

    Args:
        u: Lower capsules (*, in_capsules, in_dim).
        weight: (in_capsules, out_capsules, out_dim, in_dim).
        bias: (out_capsules, out_dim).
        iterations: Rounds; in one round every upper capsule gets the same share of a vote.
        leaky: Whether one more logit, fixed at 0, joins the softmax: its share goes nowhere.
        detach: Whether only the last round's weighted sum is differentiated, its couplings being constants.
        return_coupling: Whether to return the couplings of the last round too.

    Returns:
        v (*, out_capsules, out_dim); if asked for, also c (*, in_capsules, out_capsules), detached.

    Raises:
        ValueError: If a shape or dtype does not fit, or `iterations` is below 1.
    """
    return capsule_routing(u, weight, bias, iterations, leaky, detach, return_coupling)


@register_layer(
    "capsules",
    kind="module",
    nonlinear=True,
    card=Card(
        title="Dynamic Routing Between Capsules",
        authors="Sara Sabour, Nicholas Frosst, Geoffrey E. Hinton",
        year=2017,
        arxiv="1710.09829",
        equation=r"v_j = \mathrm{squash}\Big(\sum_i c_{ij} W_{ij} u_i\Big), \quad "
        r"c_{ij} = \mathrm{softmax}_j \sum_{\text{earlier rounds}} v_j^\top W_{ij} u_i",
        headline="MNIST test error 0.25 % with 3 rounds and reconstruction (0.29 % with 1 round, CNN 0.39 %); "
        "MultiMNIST 5.2 % (CNN 8.1 %)",
        reproduced="parameter counts 8,215,728 (MNIST) and 11,361,968 (36 x 36 pixels). A quarter of the channels, 2 "
        "epochs of MNIST, 2 seeds (experiment capsules_mnist): three rounds 98.9 %, one round 98.5, class capsules by "
        "a linear map 98.9. The paper's full training was not run",
    ),
)
class DynamicRouting(nn.Module):
    r"""Upper capsules from lower ones: $v_j = \mathrm{squash}(\sum_i c_{ij} W_{ij} u_i + \mathrm{bias}_j)$.

    The couplings c start equal, and in every further round move towards the upper capsules whose vector a vote agrees
    with: see `dynamic_routing`. A sample's output never depends on the other samples of the batch. Votes are never
    held: kept for backward are the sums of every round, `iterations * out_capsules * out_dim` numbers a sample.

    Args:
        in_capsules: Lower capsules I.
        out_capsules: Upper capsules J.
        in_dim: Size K of a lower capsule.
        out_dim: Size D of an upper capsule.
        bias: Whether each upper capsule has a bias, which is added in every round.
        iterations: Rounds. May be changed later: `layer.iterations = 5` evaluates with more than were trained.
        leaky: Whether a vote may go nowhere, for images with much that is none of the classes.
        detach: Whether the gradient runs through the last round only, as in most ports; about half the cost.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        weight: (I, J, D, K).
        bias: (J, D), or None.

    Shape: (*, I, K) -> (*, J, D), of lengths below 1.

    Raises:
        ValueError: If a size or the number of rounds is below 1.
    """

    @typed
    def __init__(
        self,
        in_capsules: int,
        out_capsules: int,
        in_dim: int,
        out_dim: int,
        bias: bool = True,
        *,
        iterations: int = 3,
        leaky: bool = False,
        detach: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(
            in_capsules=in_capsules, out_capsules=out_capsules, in_dim=in_dim, out_dim=out_dim, iterations=iterations
        )
        self.in_capsules, self.out_capsules, self.in_dim, self.out_dim = in_capsules, out_capsules, in_dim, out_dim
        self.iterations, self.leaky, self.detach = iterations, leaky, detach
        self.weight = nn.Parameter(torch.empty(in_capsules, out_capsules, out_dim, in_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_capsules, out_dim, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from a normal distribution, std 0.1 cut at 0.2; biases 0.1."""
        nn.init.trunc_normal_(self.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
        if self.bias is not None:
            nn.init.constant_(self.bias, INIT_BIAS)

    def forward(self, u: Tensor, return_coupling: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Maps (*, I, K) to (*, J, D); with `return_coupling`, also returns the last round's couplings (*, I, J)."""
        check_capsules(u, self.in_capsules, self.in_dim, self.weight)
        options = self.iterations, self.leaky, self.detach, return_coupling
        return dynamic_routing(u, self.weight, self.bias, *options)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.in_capsules}, {self.out_capsules}, {self.in_dim}, {self.out_dim}, bias={self.bias is not None}, "
            f"iterations={self.iterations}, leaky={self.leaky}, detach={self.detach}"
        )


def check_capsules(u: Tensor, capsules: int, dim: int, weight: Tensor) -> None:
    """A ValueError unless u is (*, capsules, dim), in a dtype that goes with the weight's."""
    check_dtype(u, weight)
    if u.dim() < 2 or u.shape[-2:] != (capsules, dim):
        raise ValueError(
            f"input of shape {tuple(u.shape)}: must be (*, in_capsules, in_dim), with in_capsules={capsules} and "
            f"in_dim={dim}"
        )


class PrimaryCapsules(nn.Module):
    r"""The first capsules of a network: a convolution whose channels, in groups, are vectors that are squashed.

    $u = \mathrm{squash}(q \cdot (W * x) + \mathrm{bias})$ by groups of `capsule_dim` channels at one place. The factor
    q = 1 / `capsule_types` is not in the paper: in the authors' code this layer is one of routing too, with one input
    capsule and one round, whose equal shares it is. With their wide init it keeps squash out of saturation.

    Args:
        in_channels: Channels of the image.
        capsule_types: Capsules at each place of the map.
        capsule_dim: Size of a capsule.
        kernel_size: Side of the kernels, in pixels.
        stride: In pixels.
        padding: Pixels of zeros around the image.
        bias: Whether the convolution has a bias.
        shared_coupling: Whether the convolution is multiplied by q. Without it q = 1, as the paper's text has it, and
            weights start smaller by `capsule_types`.
        leaky: Whether q is 1 / (`capsule_types` + 1).
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        conv: The `nn.Conv2d`; channel `type * capsule_dim + atom`.

    Shape: (batch, in_channels, height, width) -> (batch, capsule_types * h * w, capsule_dim), h and w the map's sides.
    Capsule `(type * h + row) * w + column`.

    Raises:
        ValueError: If a size is below 1, or the padding negative.
    """

    @typed
    def __init__(
        self,
        in_channels: int,
        capsule_types: int = 32,
        capsule_dim: int = 8,
        kernel_size: int = 9,
        stride: int = 2,
        padding: int = 0,
        bias: bool = True,
        *,
        shared_coupling: bool = True,
        leaky: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole(in_channels=in_channels, capsule_types=capsule_types, capsule_dim=capsule_dim)
        check_whole(kernel_size=kernel_size, stride=stride)
        if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
            raise ValueError(f"padding={padding!r}: must be a whole number of pixels, 0 or more")
        self.capsule_types, self.capsule_dim = capsule_types, capsule_dim
        self.shared_coupling, self.leaky = shared_coupling, leaky
        self.conv = nn.Conv2d(
            in_channels,
            capsule_types * capsule_dim,
            kernel_size,
            stride,
            padding,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @property
    def share(self) -> float:
        """The factor q of the convolution."""
        return 1 / (self.capsule_types + self.leaky) if self.shared_coupling else 1.0

    def reset_parameters(self) -> None:
        """Weights from a normal distribution, std 0.1 cut at 0.2, where q = 1 less by `capsule_types`; biases 0.1."""
        std = INIT_STD if self.shared_coupling else INIT_STD / self.capsule_types
        nn.init.trunc_normal_(self.conv.weight, std=std, a=-2 * std, b=2 * std)
        if self.conv.bias is not None:
            nn.init.constant_(self.conv.bias, INIT_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_channels, height, width) to (batch, capsules, capsule_dim)."""
        conv = self.conv
        check_dtype(x, conv.weight)
        if x.dim() != 4 or x.shape[1] != conv.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: must be (batch, in_channels, height, width) with "
                f"in_channels={conv.in_channels}"
            )
        s = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        if conv.bias is not None:
            s = torch.add(conv.bias[:, None, None], s, alpha=self.share)
        elif self.shared_coupling:
            s = s * self.share
        u = squash(s.unflatten(1, (self.capsule_types, self.capsule_dim)), 2)
        return u.permute(0, 1, 3, 4, 2).flatten(1, 3)

    def extra_repr(self) -> str:
        """Sizes and options; those of the convolution are in its own line."""
        return (
            f"capsule_types={self.capsule_types}, capsule_dim={self.capsule_dim}, "
            f"shared_coupling={self.shared_coupling}, leaky={self.leaky}"
        )


def margin_loss(
    lengths: Tensor,
    target: Tensor,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    down_weight: float = 0.5,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""$\sum_k T_k \max(0, m^+ - |v_k|)^2 + \lambda (1 - T_k) \max(0, |v_k| - m^-)^2$, a sum over the classes.

    Args:
        lengths: Lengths of the class capsules (batch, classes), as they are: no softmax.
        target: Class indices (batch,), or T, a matrix (batch, classes) of 0 and 1, with any number of ones in a row.
        m_plus: Length above which a class that is there costs nothing.
        m_minus: Length below which a class that is not there costs nothing.
        down_weight: Of the classes that are not there.
        reduction: `"mean"` or `"sum"` over the batch, or `"none"`.

    Returns:
        A scalar, or (batch,), in float32 at least.

    Raises:
        ValueError: If the shapes do not fit, indices are not integers, or there is no such reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
    if lengths.dim() != 2:
        raise ValueError(f"lengths of shape {tuple(lengths.shape)}: must be (batch, classes)")
    there = one_hot(target, *lengths.shape)
    lengths = lengths.to(compute_dtype(lengths))
    there = there.to(lengths.dtype)
    missing, superfluous = F.relu(m_plus - lengths).square(), F.relu(lengths - m_minus).square()
    losses = (there * missing + down_weight * (1 - there) * superfluous).sum(1)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def one_hot(target: Tensor, batch: int, classes: int) -> Tensor:
    """A matrix (batch, classes) of 0 and 1, from class indices (batch,) or from itself.

    Raises:
        ValueError: If the target is neither.
    """
    if target.shape == (batch, classes):
        return target
    if target.shape != (batch,) or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(
            f"target of shape {tuple(target.shape)} and {target.dtype}: must be whole numbers (batch,) = ({batch},), "
            f"or 0 and 1 (batch, classes) = ({batch}, {classes})"
        )
    return F.one_hot(target.long(), classes)
