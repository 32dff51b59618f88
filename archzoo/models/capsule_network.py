"""What networks with class capsules have in common: lengths as scores, a decoder that draws, and their losses.

The trainer's side of it is here too: such a network brings its own training loss (`Task.training_loss` asks for it) and
draws, for the report, what it reconstructs and what a capsule's dimensions mean.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels._op import compute_dtype
from archzoo.layers._check import check_whole
from archzoo.layers.capsules import INIT_BIAS, INIT_STD, margin_loss, one_hot, squash
from archzoo.models.registration import default_cfg
from archzoo.pictures import Picture, tiles
from archzoo.tasks.task import ClassificationTask, Task

Network = TypeVar("Network", bound="CapsuleNetwork")
BuildRouting = Callable[[int, int, int, int], nn.Module]
"""Builds a layer of upper capsules from (in_capsules, out_capsules, in_dim, out_dim)."""
RECON_WEIGHT = 0.0005
PERTURBATIONS = tuple(round(0.05 * step, 2) for step in range(-5, 6))
"""What is added to one number of a capsule, as in the paper's figure 4."""
SHOWN = 10
"""Test images in a picture: the first ones."""


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image; a ValueError unless they are whole numbers."""
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2:
        raise ValueError(f"image_size={image_size!r}: must be a side in pixels, or (height, width)")
    for side in pair:
        check_whole(image_size=side)
    return pair


def map_side(side: int, kernel_size: int, stride: int, padding: int) -> int:
    """Side of a convolution's output; not positive where the image is too small."""
    return (side + 2 * padding - kernel_size) // stride + 1


def check_classes(num_classes: int) -> None:
    """A ValueError unless it is a whole number, 0 or more."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(f"num_classes={num_classes!r}: must be a whole number, 1 or more, or 0 for features alone")


class CapsuleNetwork(nn.Module, ABC):
    """A network whose last layer is one capsule a class; a subclass gives `lower_capsules` and calls `_classify`.

    Args:
        num_classes: Classes. 0: no class capsules and no decoder; the output are the lower capsules, flattened.
        class_dim: Size of a class capsule.
        image_shape: (channels, height, width) of an image.
        decoder: Widths of the decoder's hidden layers. None: no decoder, and no reconstruction.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        num_features: Numbers of all lower capsules, as timm calls what comes before the classes.
        decoder: Linear, ReLU, Linear, ReLU, ..., Linear, Sigmoid; None if there is none.
        recon_weight: Of the reconstruction in `training_loss`.
        shift: Pixels by which `training_loss` shifts images at most, at random and with black behind them.

    Shape: (batch, *image_shape) -> (batch, num_classes), lengths in [0, 1): scores as they stand, no softmax.
    """

    recon_weight: float = RECON_WEIGHT
    shift: int = 0
    classifier: ClassVar[str] = "routing"
    """Name of the part that makes the class capsules."""

    def __init__(
        self,
        num_classes: int,
        class_dim: int,
        image_shape: tuple[int, int, int],
        decoder: Sequence[int] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        check_whole(class_dim=class_dim, in_channels=image_shape[0])
        check_classes(num_classes)
        for size in decoder or ():
            check_whole(decoder=size)
        self.num_classes, self.class_dim, self.image_shape = num_classes, class_dim, image_shape
        self.in_chans = image_shape[0]
        self._decoder_widths = None if decoder is None else tuple(decoder)
        self.decoder = self._make_decoder({"device": device, "dtype": dtype})

    def _make_decoder(self, factory: dict[str, Any]) -> nn.Sequential | None:
        if self._decoder_widths is None or not self.num_classes:
            return None
        sizes = [self.num_classes * self.class_dim, *self._decoder_widths, math.prod(self.image_shape)]
        decoder = nn.Sequential()
        for before, after in zip(sizes, sizes[1:], strict=False):
            decoder.extend([nn.Linear(before, after, **factory), nn.ReLU()])
        decoder[-1] = nn.Sigmoid()
        return decoder

    def _classify(self, make: Callable[..., nn.Module], lower: tuple[int, int]) -> None:
        """Puts in what makes the class capsules.

        Args:
            make: Builds it from the number of classes, and device and dtype where they are not the network's first.
            lower: Number and size of the lower capsules.
        """
        self._make_classifier = make
        self.num_features = self.head_hidden_size = lower[0] * lower[1]
        setattr(self, self.classifier, make(self.num_classes) if self.num_classes else nn.Identity())

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Class capsules and a decoder, drawn anew, for another number of classes, as models of timm have it.

        Raises:
            ValueError: If the number is below 0, or `global_pool`, of which capsules have none, is given.
        """
        check_classes(num_classes)
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: capsules are routed, not pooled; leave it out")
        self.num_classes, like = num_classes, next(self.parameters())
        made = self._make_classifier(num_classes) if num_classes else nn.Identity()
        self.decoder = self._make_decoder({"device": like.device, "dtype": like.dtype})
        self.reset_decoder()
        setattr(self, self.classifier, made.to(like.device, like.dtype))
        self.train(self.training)

    def get_classifier(self) -> nn.Module:
        """The layer of class capsules."""
        return self.get_submodule(self.classifier)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Is there because timm's training script calls it.

        Raises:
            ValueError: If it is to be enabled.
        """
        if enable:
            raise ValueError("enable=True: networks of capsules have no blocks to compute again; leave it out")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions of timm by which parameters are put into groups, from the image to the classes."""
        return {"stem": r"^conv|^features|^backbone", "blocks": [(r"^primary", (0,)), (r"^routing|^head", (1,))]}

    def reset_decoder(self) -> None:
        """Weights from a normal distribution, std 0.1 cut at 0.2; biases 0.1."""
        for module in self.decoder or ():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
                nn.init.constant_(module.bias, INIT_BIAS)

    def check_image(self, x: Tensor) -> None:
        """A ValueError unless x is a batch of images of the size that the network was built for."""
        if x.shape[1:] != self.image_shape or x.dim() != 4:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: must be (batch, channels, height, width) = "
                f"{('batch', *self.image_shape)}; build the network with the image_size and in_channels of your images"
            )

    @abstractmethod
    def lower_capsules(self, x: Tensor) -> Tensor:
        """The lower capsules (batch, in_capsules, in_dim) of images (batch, *image_shape)."""

    def forward_features(self, x: Tensor) -> Tensor:
        """The class capsules (batch, num_classes, class_dim) of images; without classes, the lower ones."""
        self.check_image(x)
        capsules: Tensor = self.get_classifier()(self.lower_capsules(x))
        return capsules

    def forward_head(self, capsules: Tensor, pre_logits: bool = False) -> Tensor:
        """Lengths (batch, num_classes) of class capsules (batch, num_classes, class_dim).

        Without classes, or with `pre_logits`, the capsules themselves, flattened.
        """
        if pre_logits or not self.num_classes:
            return capsules.flatten(1)
        wide = capsules.to(compute_dtype(capsules))
        tiny = torch.finfo(wide.dtype).tiny  # the gradient of a root at 0 is infinite
        return wide.square().sum(-1).clamp_min(tiny).sqrt().to(capsules.dtype)

    def forward(self, x: Tensor, return_capsules: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Lengths (batch, num_classes) of images (batch, *image_shape); if asked for, the class capsules too."""
        capsules = self.forward_features(x)
        lengths = self.forward_head(capsules)
        return (lengths, capsules) if return_capsules else lengths

    def reconstruct(self, capsules: Tensor, target: Tensor | None = None) -> Tensor:
        """Images (batch, *image_shape), pixels from 0 to 1, drawn from class capsules.

        Args:
            capsules: (batch, num_classes, class_dim).
            target: The class whose capsule is drawn, all others being set to 0: indices (batch,), or 0 and 1
                (batch, num_classes), where several may be 1. None: the longest capsule.

        Raises:
            ValueError: If there is no decoder, or a shape does not fit.
        """
        if self.decoder is None:
            raise ValueError("decoder=None: this network cannot draw; build it with decoder=(512, 1024)")
        if capsules.dim() != 3 or capsules.shape[1:] != (self.num_classes, self.class_dim):
            raise ValueError(
                f"capsules of shape {tuple(capsules.shape)}: must be (batch, num_classes, class_dim) = "
                f"(batch, {self.num_classes}, {self.class_dim})"
            )
        if target is None:
            target = self.forward_head(capsules).argmax(1)
        mask = one_hot(target, len(capsules), self.num_classes)
        masked = capsules * mask.to(capsules.dtype).unsqueeze(-1)
        return self.decoder(masked.flatten(1)).unflatten(1, self.image_shape)

    def reconstruction_loss(self, capsules: Tensor, labels: Tensor, pictures: Tensor) -> Tensor:
        """Squared errors of all pixels, summed over what each image shows, their mean over the batch.

        Args:
            capsules: Class capsules (batch, num_classes, class_dim).
            labels: The true classes of what is shown (batch, objects): each is drawn for itself.
            pictures: What each of them looks like, alone (batch, objects, *image_shape), pixels from 0 to 1.
        """
        objects = labels.shape[1]
        drawn = self.reconstruct(capsules.repeat_interleave(objects, 0), labels.flatten())
        errors = (drawn.to(compute_dtype(drawn)) - pictures.flatten(0, 1)).square().flatten(1).sum(1)
        return errors.view(-1, objects).sum(1).mean()

    def loss(self, x: Tensor, target: Tensor, recon_weight: float = RECON_WEIGHT) -> Tensor:
        """The margin loss, plus `recon_weight` times the squared error of the image drawn from the true class.

        The error is a sum over pixels and a mean over the batch. 0.0005 is the paper's; 0.01 has the balance of the
        authors' code, whose margin loss is smaller. Images that show several things are for `reconstruction_loss`.

        Args:
            x: Images (batch, *image_shape), pixels from 0 to 1.
            target: Class indices (batch,).
            recon_weight: Not needed where there is no decoder.
        """
        capsules = self.forward_features(x)
        total = margin_loss(self.forward_head(capsules), target)
        if self.decoder is not None and recon_weight:
            total = total + recon_weight * self.reconstruction_loss(capsules, target.unsqueeze(1), x.unsqueeze(1))
        return total

    # ---- in the trainer

    @staticmethod
    def check_task(task: Task) -> None:
        """A ValueError unless a task has what `training_loss` needs."""
        if not isinstance(task, ClassificationTask) or task.pixel_range is None:
            raise ValueError(
                "capsules draw the image they see, and need a task of images whose black and white it knows: "
                "choose task=mnist, fashion_mnist or multi_mnist"
            )
        if task.criterion != "margin":
            raise ValueError(
                f"scores are lengths of capsules, from 0 to 1, which task.loss={task.criterion} takes for logits; "
                "set task.loss=margin"
            )

    def training_loss(self, task: Task, inputs: Tensor, targets: Tensor) -> Tensor:
        """The task's loss, plus `recon_weight` times the reconstruction's, on images shifted at random.

        The trainer calls it through `Task.training_loss`. Shifts come from torch's global generator.
        """
        assert isinstance(task, ClassificationTask)
        assert task.pixel_range is not None
        low, high = task.pixel_range
        labels, pictures = task.objects(inputs, targets)
        if self.shift:
            together = torch.cat([inputs.unsqueeze(1), pictures], 1)
            inputs, pictures = shift_at_random(together, self.shift, low).split([1, pictures.shape[1]], 1)
            inputs = inputs.squeeze(1)
        lengths, capsules = self(inputs, return_capsules=True)
        loss = task.loss(lengths, targets)
        if self.decoder is not None and self.recon_weight:
            pictures = (pictures - low) / (high - low)
            loss = loss + self.recon_weight * self.reconstruction_loss(capsules, labels, pictures)
        return loss

    @torch.no_grad()
    def perturb(self, capsules: Tensor, target: Tensor, values: Sequence[float] = PERTURBATIONS) -> Tensor:
        """Images drawn with one number of a capsule changed at a time: what that dimension means.

        Args:
            capsules: Class capsules (batch, num_classes, class_dim).
            target: The class whose capsule is changed and drawn (batch,).
            values: What is added to the number.

        Returns:
            (batch, class_dim, values, *image_shape), pixels from 0 to 1.
        """
        batch, count = len(capsules), len(values)
        steps = torch.eye(self.class_dim, dtype=capsules.dtype, device=capsules.device)[:, None] * capsules.new_tensor(
            values
        ).unsqueeze(-1)  # (class_dim, values, class_dim)
        changed = capsules[:, None, None] + steps[:, :, None]
        flat_target = target.repeat_interleave(self.class_dim * count)
        drawn = self.reconstruct(changed.flatten(0, 2), flat_target)
        return drawn.unflatten(0, (batch, self.class_dim, count))

    @torch.no_grad()
    def pictures(self, task: Task) -> dict[str, Picture]:
        """Reconstructions of the first test images, and one of them with each number of its capsule changed."""
        if self.decoder is None or not isinstance(task, ClassificationTask) or task.pixel_range is None:
            return {}
        low, high = task.pixel_range
        parameter = next(self.parameters())
        first = list(range(min(SHOWN, len(task.test))))  # type: ignore[arg-type]  # every split has a length
        images, targets = task.test.__getitems__(first)  # type: ignore[attr-defined]
        images, targets = images.to(parameter), targets.to(parameter.device)
        labels, alone = task.objects(images, targets)
        capsules = self.forward_features(images)
        rows = [(images - low) / (high - low)]
        for number in range(labels.shape[1]):
            if labels.shape[1] > 1:
                rows.append((alone[:, number] - low) / (high - low))
            rows.append(self.reconstruct(capsules, labels[:, number]))
        zoom = max(1, 56 // max(self.image_shape[1:]))
        told = "The first test images, and below each what its true class's capsule draws."
        if labels.shape[1] > 1:
            told = "The first test images; below each, in turn, each of the things it shows, and what is drawn of it."
        sheet = self.perturb(capsules[:1], labels[:1, 0])[0]
        return {
            "reconstructions": Picture(tiles(rows, zoom), told),
            "perturbations": Picture(
                tiles(list(sheet), zoom),
                f"The first test image, drawn with one of the {self.class_dim} numbers of its capsule changed: a row "
                f"for each, from {PERTURBATIONS[0]} to {PERTURBATIONS[-1]}; the middle column is unchanged.",
            ),
        }


def shift_at_random(images: Tensor, most: int, black: float) -> Tensor:
    """Shifts (batch, ..., height, width) each by its own whole number of pixels, up to `most` in each direction."""
    batch, height, width = images.shape[0], *images.shape[-2:]
    padded = F.pad(images, (most,) * 4, value=black)
    down, right = (torch.randint(0, 2 * most + 1, (batch, 1), device=images.device) for _ in range(2))
    rows = (down + torch.arange(height, device=images.device))[:, :, None]
    columns = (right + torch.arange(width, device=images.device))[:, None]
    which = torch.arange(batch, device=images.device)[:, None, None]
    return padded.flatten(1, -3)[which, :, rows, columns].permute(0, 3, 1, 2).reshape(images.shape)


def linear_capsules(build: Callable[..., nn.Module]) -> BuildRouting:
    """From a layer of kind `linear`, upper capsules without routing: one map of all lower capsules, then squash."""

    def make(in_capsules: int, out_capsules: int, in_dim: int, out_dim: int) -> nn.Module:
        return LinearCapsules(build(in_capsules * in_dim, out_capsules * out_dim), out_capsules)

    return make


class LinearCapsules(nn.Module):
    """Upper capsules by one map of all lower ones, and squash: routing of one round is this, divided by their number.

    Args:
        layer: Maps (batch, in_capsules * in_dim) to (batch, out_capsules * out_dim).
        out_capsules: Upper capsules.

    Shape: (batch, in_capsules, in_dim) -> (batch, out_capsules, out_dim).
    """

    def __init__(self, layer: nn.Module, out_capsules: int):
        super().__init__()
        self.layer, self.out_capsules = layer, out_capsules

    def forward(self, u: Tensor) -> Tensor:
        """Maps (batch, in_capsules, in_dim) to (batch, out_capsules, out_dim)."""
        s: Any = self.layer(u.flatten(1))
        return squash(s.unflatten(1, (self.out_capsules, -1)))


# ---- in timm


def of_pixels(**changes: Any) -> dict[str, Any]:
    """timm's description of a network for 28 x 28 grey pixels from 0 to 1, 10 classes."""
    pixels: dict[str, Any] = {"num_classes": 10, "input_size": (1, 28, 28), "mean": (0.0,), "std": (1.0,)}
    return default_cfg(**pixels, crop_pct=1.0, interpolation="bilinear", **changes)


def in_timms_words(network: Callable[..., Network], **fixed: Any) -> Callable[..., Network]:
    """A network that is built by timm's names of its sizes, and takes the dropout that timm's script gives it: none.

    No decoder is `decoder=False`, for timm takes away arguments that are None.
    """

    def make(
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        drop_rate: float = 0.0,
        **options: Any,
    ) -> Network:
        if drop_rate:
            raise ValueError(f"drop_rate={drop_rate}: capsules are not dropped; leave it out")
        if options.get("decoder") is False:
            options["decoder"] = None
        sizes: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_chans, "image_size": img_size}
        return network(**sizes, **fixed, **options)

    return make
