"""A connectome between two linear maps as a model of timm (https://arxiv.org/abs/2507.10951).

>>> import timm
>>> import archzoo.models
>>> model = timm.create_model("archzoo_bpu", num_classes=10)
>>> model.head
Linear(in_features=218, out_features=10, bias=True)
"""

from typing import Any

from timm.models import generate_default_cfgs
from timm.models import register_model as register_with_timm
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.layers.bpu import BPU
from archzoo.models.bpu import find_connectome
from archzoo.models.capsule_network import check_classes, of_pixels, sides
from archzoo.models.registration import build

__all__ = ["BPUNet"]


class BPUNet(nn.Module):
    """Pixels drive the sensory neurons of a wiring that never learns, and classes are read from its output neurons.

    Args:
        num_classes: Classes; 0: the output neurons are the output.
        in_chans: Channels of an image.
        img_size: Side of an image in pixels, or (height, width).
        drop_rate: Probability that an output neuron is dropped before the classes in training.
        connectome: As of `archzoo.models.bpu.find_connectome`: `"generated"` is made up, with the larva's statistics,
            and needs no file; `"larva"` and `"celegans"` are files of the data folder $ARCHZOO_DATA.
        options: Of `BPU`, as `steps=4`.

    Shape: (batch, in_chans, height, width) -> (batch, num_classes).

    Raises:
        ValueError: If an option is out of range, or there is no such wiring.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        *,
        drop_rate: float = 0.0,
        connectome: str = "generated",
        **options: Any,
    ):
        super().__init__()
        check_classes(num_classes)
        height, width = sides(img_size)
        wiring = find_connectome(connectome)
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.core = BPU(wiring, in_chans * height * width, 1, **options)
        self.core.add_module("output_proj", nn.Identity())  # the head, by timm's name, is what reads
        self.num_features = self.head_hidden_size = wiring.pool_sizes[2]
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for another number of classes; a ValueError if `global_pool`, of which there is none, is given."""
        check_classes(num_classes)
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: neurons are read, not pooled; leave it out")
        self.num_classes, like = num_classes, self.core.input_proj.weight
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else None
        self.head = (head or nn.Identity()).train(self.training)

    def get_classifier(self) -> nn.Module:
        """The linear map from output neurons to classes."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Is there because timm's training script calls it; a ValueError if it is to be enabled."""
        if enable:
            raise ValueError("enable=True: a BPU has no blocks to compute again; leave it out")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions of timm by which parameters are put into groups."""
        return {"stem": r"^core\.input_proj", "blocks": [(r"^core", (0,))]}

    def forward_features(self, x: Tensor) -> Tensor:
        """What the output neurons (batch, num_features) do for images."""
        y: Tensor = self.core(x.flatten(1))
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classes of output neurons; with `pre_logits` these themselves."""
        x = F.dropout(x, self.drop_rate, self.training)
        y: Tensor = x if pre_logits else self.head(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_chans, height, width) to (batch, num_classes)."""
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs({"archzoo_bpu": of_pixels(first_conv=None, classifier="head")})


@register_with_timm
def archzoo_bpu(pretrained: bool = False, **kwargs: Any) -> BPUNet:
    """A BPU for 28 x 28 grey pixels, 10 classes, of a made-up wiring by default. Options are those of `BPUNet`."""
    return build(BPUNet, "archzoo_bpu", pretrained, kwargs)
