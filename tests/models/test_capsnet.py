"""CapsNet, Efficient-CapsNet and capsules on a backbone: sizes, losses, drawing, timm, and the trainer's side."""

import math
import os
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import archzoo.models  # noqa: F401 - registers with timm
from archzoo.budget import count_flops, count_parameters
from archzoo.layers.capsules import DynamicRouting, margin_loss
from archzoo.layers.self_attention_routing import SelfAttentionRouting
from archzoo.models.capsnet import CapsNet, TrainedCapsNet
from archzoo.models.capsule_classifier import CapsuleClassifier
from archzoo.models.capsule_network import LinearCapsules, shift_at_random
from archzoo.models.efficient_capsnet import EfficientCapsNet
from archzoo.models.model import LayerFactory
from archzoo.tasks.task import ClassificationTask, TensorSplit
from archzoo.training.build import build_task
from archzoo.training.config import ConfigError
from tests.helpers import rms_error
from tests.training.support import make_config

DATA = os.environ.get("ARCHZOO_DATA")
TINY = {"channels": 4, "kernel_size": 3, "capsule_types": 2, "capsule_dim": 4, "class_dim": 5, "decoder": (6, 7)}


def tiny(**options):
    torch.manual_seed(0)
    return CapsNet(3, 2, (10, 9), **{**TINY, **options})


def images(count=4, seed=1):
    return torch.rand(count, 2, 10, 9, generator=torch.Generator().manual_seed(seed))


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        assert count_parameters(CapsNet()) == 8_215_728
        assert count_parameters(CapsNet(decoder=None)) == 6_804_384
        assert count_parameters(CapsNet(image_size=36)) == 11_361_968
        assert count_parameters(EfficientCapsNet(decoder=None)) == 161_824
        assert count_parameters(timm.create_model("archzoo_capsnet_small")) == 2_117_232


def test_flops_are_the_papers():
    with torch.device("meta"):
        flops = count_flops(CapsNet(decoder=None), torch.empty(1, 1, 28, 28))
    assert flops == pytest.approx(16.6e6 + 382e6 + 2.95e6 + 1.84e6, rel=1e-2)


def test_forward_is_features_then_lengths_and_head_is_safe_at_zero():
    model, x = tiny(), images()
    capsules = model.forward_features(x)
    assert capsules.shape == (4, 3, 5)
    lengths, same = model(x, return_capsules=True)
    assert torch.equal(same, capsules)
    assert torch.equal(model(x), lengths)
    torch.testing.assert_close(lengths, capsules.norm(dim=-1))
    assert ((lengths >= 0) & (lengths < 1)).all()
    zero = torch.zeros(1, 3, 5, requires_grad=True)
    model.forward_head(zero).sum().backward()
    assert zero.grad.isfinite().all()
    assert model(x[:0]).shape == (0, 3)


def test_reconstruction_masks_all_capsules_but_the_targets():
    model, capsules = tiny(), torch.rand(4, 3, 5) / 3
    target = torch.tensor([0, 1, 2, 1])
    masked = torch.zeros(4, 3, 5)
    masked[torch.arange(4), target] = capsules[torch.arange(4), target]
    want = model.decoder(masked.flatten(1)).view(4, 2, 10, 9)
    assert torch.equal(model.reconstruct(capsules, target), want)
    assert torch.equal(model.reconstruct(capsules, F.one_hot(target, 3)), want)
    longest = capsules.norm(dim=-1).argmax(1)
    assert torch.equal(model.reconstruct(capsules), model.reconstruct(capsules, longest))
    both = torch.tensor([[1, 1, 0]] * 4)
    changed = capsules.clone()
    changed[:, 2] = 0.1
    assert torch.equal(model.reconstruct(capsules, both), model.reconstruct(changed, both))
    assert 0 <= want.min() <= want.max() <= 1


def test_loss_is_margin_plus_weighted_squared_error_through_the_true_class():
    model, x, target = tiny(), images(), torch.tensor([0, 1, 2, 1])
    capsules = model.forward_features(x)
    drawn = model.reconstruct(capsules, target)
    error = (drawn - x).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(model.loss(x, target, 0.01), margin_loss(model(x), target) + 0.01 * error)
    torch.testing.assert_close(model.loss(x, target, 0.0), margin_loss(model(x), target))
    torch.testing.assert_close(tiny(decoder=None).loss(x, target), margin_loss(tiny(decoder=None)(x), target))
    model.loss(x, target, 0.01).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_two_objects_are_drawn_one_by_one_and_their_errors_added():
    model, x = tiny(), images()
    capsules, labels = model.forward_features(x), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])
    pictures = torch.rand(4, 2, 2, 10, 9)
    errors = [(model.reconstruct(capsules, labels[:, k]) - pictures[:, k]).square().flatten(1).sum(1) for k in (0, 1)]
    torch.testing.assert_close(model.reconstruction_loss(capsules, labels, pictures), (errors[0] + errors[1]).mean())


def test_perturbed_images_change_one_number_at_a_time():
    model, capsules, target = tiny(), torch.rand(2, 3, 5) / 3, torch.tensor([2, 0])
    drawn = model.perturb(capsules, target, (-0.2, 0.0, 0.2))
    assert drawn.shape == (2, 5, 3, 2, 10, 9)
    plain = model.reconstruct(capsules, target)
    changed = capsules.clone()
    changed[1, 0, 3] += 0.2
    for dimension in range(5):
        torch.testing.assert_close(drawn[:, dimension, 1], plain)
    torch.testing.assert_close(drawn[1, 3, 2], model.reconstruct(changed, target)[1])
    assert not torch.equal(drawn[1, 3, 2], drawn[1, 3, 0])


def test_options_reach_the_layers():
    model = tiny(iterations=2, leaky=True, detach=True, shared_coupling=False, padding=1)
    assert (model.routing.iterations, model.routing.leaky, model.routing.detach) == (2, True, True)
    assert model.primary.share == 1.0
    assert model.primary.conv.padding == (1, 1)
    assert model.routing.in_capsules == 2 * 5 * 5
    assert tiny().routing.in_capsules == 2 * 3 * 3
    assert tiny(dtype=torch.float64)(images().double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_error(tiny()(images()), tiny()(images()).detach()) == 0
        assert tiny()(images()).dtype == torch.float32


def test_reset_draws_all_weights_anew():
    model, other = tiny(), tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.reset_parameters()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.endswith("bias"), name
        assert parameter.std().item() == pytest.approx(before[name].std().item(), rel=0.5), name
    assert rms_error(other(images()), model(images())) > 0


@pytest.mark.parametrize("build", [CapsNet, EfficientCapsNet], ids=["capsnet", "efficient"])
def test_other_sizes_work_and_wrong_ones_are_named(build):
    torch.manual_seed(0)
    model = build(5, 3, (36, 30), decoder=(4,))
    capsules = model.forward_features(torch.rand(2, 3, 36, 30))
    assert model.reconstruct(capsules).shape == (2, 3, 36, 30)
    with pytest.raises(ValueError, match=r"input of shape \(2, 3, 28, 28\): must be .*\('batch', 3, 36, 30\)"):
        model(torch.rand(2, 3, 28, 28))
    for options, message in (
        ({"image_size": 12}, "image_size=12"),
        ({"image_size": (28, 0)}, "image_size=0"),
        ({"image_size": (28, 28, 1)}, r"image_size=\(28, 28, 1\)"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"decoder": (0,)}, "decoder=0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
    with pytest.raises(ValueError, match="decoder=None: this network cannot draw"):
        build(decoder=None).reconstruct(torch.rand(2, 10, 16))
    with pytest.raises(ValueError, match=r"capsules of shape \(2, 3, 16\)"):
        model.reconstruct(torch.rand(2, 3, 16))


def test_smallest_image_is_what_the_error_says():
    for padding, side in ((0, 17), (2, 9)):
        assert CapsNet(image_size=side, padding=padding, channels=2).routing.in_capsules == 32
        with pytest.raises(ValueError, match=f"must be {side} or more each way"):
            CapsNet(image_size=side - 1, padding=padding, channels=2)


def test_timm_builds_them_and_knows_their_inputs():
    names = ["archzoo_capsnet", "archzoo_capsnet_small", "archzoo_capsule_classifier", "archzoo_efficient_capsnet"]
    assert timm.list_models("archzoo_*caps*") == names
    model = timm.create_model("archzoo_capsnet_small", num_classes=7, iterations=1, in_chans=3, img_size=32)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert model.routing.iterations == 1
    assert timm.create_model("archzoo_efficient_capsnet", num_classes=4)(torch.rand(2, 1, 28, 28)).shape == (2, 4)
    assert timm.data.resolve_data_config({}, model=timm.create_model("archzoo_efficient_capsnet"))["mean"] == (0.0,)
    for name in ("archzoo_capsnet", "archzoo_efficient_capsnet"):
        with pytest.raises(ValueError, match=f"pretrained=True: {name} has no published weights"):
            timm.create_model(name, pretrained=True)


@pytest.mark.parametrize(
    ("backbone", "places", "options"),
    [
        ("test_resnet", 9, {}),
        ("test_vit", 37, {}),
        ("swin_tiny_patch4_window7_224", 9, {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}),
    ],
    ids=["map", "tokens", "channels_last"],
)
def test_any_backbone_gets_capsules_for_a_head(backbone, places, options):
    if backbone != "test_resnet":
        options = {**options, "img_size": 96}
    model = timm.create_model(
        "archzoo_capsule_classifier",
        backbone=backbone,
        num_classes=5,
        img_size=96,
        backbone_kwargs=options,
        capsule_types=3,
    )
    assert model.head.routing.in_capsules == 3 * places
    x = torch.rand(2, 3, 96, 96)
    model.eval()
    features = model.backbone.forward_features(x)
    tokens = (
        features
        if features.dim() == 3
        else features.flatten(2).mT
        if backbone == "test_resnet"
        else features.flatten(1, 2)
    )
    torch.testing.assert_close(model.forward_features(x), model.head(tokens))
    model.train()
    margin_loss(model(x), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None for p in model.head.parameters())
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 96, 96)


def test_a_backbone_may_be_built_already_and_building_leaves_its_statistics_alone():
    backbone = timm.create_model("test_resnet", num_classes=0)
    before = {name: b.clone() for name, b in backbone.named_buffers()}
    model = CapsuleClassifier(backbone, 4, image_size=(64, 96), decoder=None)
    assert model.backbone is backbone
    assert backbone.training
    assert all(torch.equal(b, before[name]) for name, b in backbone.named_buffers())
    assert model(torch.rand(2, 3, 64, 96)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"pretrained=True, .*test_resnet|pretrained=True, .*ResNet"):
        CapsuleClassifier(backbone, 4, pretrained=True)

    class Vector(nn.Linear):
        def forward_features(self, x):
            return self(x.flatten(1))

    with pytest.raises(ValueError, match=r"backbone=Vector: its features, \(1, 5\), are neither a map nor tokens"):
        CapsuleClassifier(Vector(12, 5), 4, image_size=2)


# --- The trainer's side -----------------------------------------------------------------------------------------------


class Bars(ClassificationTask):
    """Bright rows or columns, standardised; three classes."""

    input_shape, output_size = (1, 12, 12), 3
    pixel_range = (-0.5, 1.5)
    criterion = "margin"

    def __init__(self):
        super().__init__()

        def split(count, seed):
            generator = torch.Generator().manual_seed(seed)
            pictures = torch.zeros(count, 1, 12, 12)
            targets = torch.arange(count) % 3
            for picture, target in zip(pictures, targets.tolist(), strict=True):
                at = int(torch.randint(1, 10, (), generator=generator))
                if target != 1:
                    picture[:, at : at + 2] = 1
                if target != 0:
                    picture[:, :, at : at + 2] = 1
            return TensorSplit(pictures * 2 - 0.5, targets)

        self.train, self.val, self.test = split(60, 0), split(30, 1), split(30, 2)


def trained(layer="capsules", options=None, **model):
    torch.manual_seed(0)
    sizes = {"width": 6, "kernel_size": 3, "capsule_types": 3, "capsule_dim": 4, "class_dim": 6, "decoder": (16,)}
    return TrainedCapsNet(LayerFactory(layer, options), (1, 12, 12), 3, **{**sizes, **model})


@pytest.mark.parametrize(
    ("layer", "cls"),
    [
        ("capsules", DynamicRouting),
        ("self_attention_routing", SelfAttentionRouting),
        ("linear", LinearCapsules),
        ("phm", LinearCapsules),
    ],
)
def test_contestants_make_the_class_capsules(layer, cls):
    model = trained(layer, class_dim=8)
    assert isinstance(model.routing, cls)
    task = Bars()
    task.training_loss(model, *task.train.__getitems__(list(range(6)))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_loss_is_the_tasks_and_a_reconstruction_in_pixels():
    task = Bars()
    inputs, targets = task.train.__getitems__(list(range(6)))
    model = trained(recon_weight=0.01)
    drawn = model.reconstruct(model.forward_features(inputs), targets)
    error = (drawn - (inputs + 0.5) / 2).square().flatten(1).sum(1).mean()
    want = margin_loss(model(inputs), targets) + 0.01 * error
    torch.testing.assert_close(task.training_loss(model, inputs, targets), want)
    without = trained(recon_weight=0.0)
    torch.testing.assert_close(task.training_loss(without, inputs, targets), task.loss(without(inputs), targets))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    torch.testing.assert_close(task.training_loss(plain, inputs, targets), task.loss(plain(inputs), targets))


def test_shifted_images_move_whole_and_black_comes_in():
    x = 1 + torch.rand(200, 2, 1, 6, 5)
    got = shift_at_random(x, 2, -1.0)
    seen = set()
    for before, after in zip(x, got, strict=True):
        padded = F.pad(before, (2,) * 4, value=-1.0)
        fits = [(r, c) for r in range(5) for c in range(5) if torch.equal(after, padded[..., r : r + 6, c : c + 5])]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 25
    task = Bars()
    inputs, targets = task.train.__getitems__(list(range(6)))
    model = trained(shift=2)
    first, second = (task.training_loss(model, inputs, targets) for _ in range(2))
    assert first != second
    torch.manual_seed(5)
    third = task.training_loss(model, inputs, targets)
    torch.manual_seed(5)
    assert third == task.training_loss(model, inputs, targets)
    assert torch.equal(model(inputs), model(inputs))


def test_it_learns_classes_and_where_the_bar_is():
    task, model = Bars(), trained(recon_weight=0.05, decoder=(32,))
    inputs, targets = task.train.__getitems__(list(range(60)))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(250):
        loss = task.training_loss(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(inputs).argmax(1) == targets).float().mean() > 0.9
    pixels = (inputs + 0.5) / 2
    of_class = torch.stack([pixels[targets == k].mean(0) for k in range(3)])[targets]
    error = model.reconstruction_loss(model.forward_features(inputs), targets[:, None], pixels[:, None])
    assert error < 0.75 * (pixels - of_class).square().flatten(1).sum(1).mean()  # what the class alone would tell


def test_pictures_show_reconstructions_and_perturbations():
    task, model = Bars(), trained().eval()
    pictures = model.pictures(task)
    assert set(pictures) == {"reconstructions", "perturbations"}
    assert pictures["reconstructions"].image.shape == (1, 2 * (4 * 12 + 2) - 2, 10 * (4 * 12 + 2) - 2)
    assert pictures["perturbations"].image.shape == (1, 6 * (4 * 12 + 2) - 2, 11 * (4 * 12 + 2) - 2)
    for picture in pictures.values():
        assert 0 <= picture.image.min() <= picture.image.max() <= 1
        assert "first test image" in picture.caption
    assert trained(decoder=None).pictures(task) == {}
    task.objects = lambda x, t: (torch.stack([t, (t + 1) % 3], 1), torch.stack([x, x], 1))
    assert model.pictures(task)["reconstructions"].image.shape[1] == 5 * (4 * 12 + 2) - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "conv2d"}, "layer='conv2d': model 'capsnet' needs a layer of capsules"),
        ({"layer": "attention"}, "layer='attention'"),
        ({"depth": 2}, "depth=2"),
        ({"width": 0}, "width=0"),
        ({"recon_weight": -1}, "recon_weight=-1"),
        ({"shift": 12}, "shift=12"),
        ({"shift": 0.5}, "shift=0.5"),
    ],
    ids=lambda value: "-".join(f"{k}_{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_option_of_the_trainers_model_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(**options)
    with pytest.raises(ValueError, match=r"not inputs of shape \(5,\)"):
        TrainedCapsNet(LayerFactory("capsules"), (5,), 3)


def test_a_task_that_does_not_go_with_capsules_is_refused_before_training():
    with pytest.raises(ConfigError, match="model=capsnet, task=digits: capsules draw the image"):
        build_task(make_config(model={"name": "capsnet"}, layer={"name": "capsules"}))


@pytest.mark.skipif(not DATA, reason="ARCHZOO_DATA names no data folder")
def test_a_loss_of_logits_is_refused_before_training():
    config = make_config(model={"name": "capsnet"}, layer={"name": "capsules"}, task={"name": "mnist"})
    with pytest.raises(ConfigError, match=r"task\.loss=cross_entropy takes for logits; set task\.loss=margin"):
        build_task(config)
    task = build_task(make_config(task={"name": "mnist", "loss": "margin", "standardize": False}))
    assert task.pixel_range == (0.0, 1.0)
    assert task.train.inputs.min() == 0
    assert task.train.inputs.max() == 1
    assert math.isclose(build_task(make_config(task={"name": "mnist"})).pixel_range[1], (1 - 0.1307) / 0.3081)
