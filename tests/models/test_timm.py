"""Our models in timm's registry do what timm's own do: features, other heads, files, and its training script."""

import re

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

import archzoo.models
from archzoo.models.registration import build

# Every family, small. What is not here is one of them at another size.
SMALL = {
    "archzoo_vit_tiny": {"img_size": 32, "embed_dim": 24, "depth": 2, "mlp_layer": "kan"},
    "archzoo_mixer_s16": {"img_size": 32, "embed_dim": 16, "num_blocks": 2, "mlp_layer": "fast_kan"},
    "archzoo_resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "conv_layer": "phm_conv2d"},
    "archzoo_padenet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
    "archzoo_convnext_atto": {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "mlp_layer": "aptx"},
    "archzoo_vision_mamba_tiny": {"img_size": 32, "embed_dim": 16, "depth": 2},
    "archzoo_capsnet_small": {"img_size": 32, "capsule_types": 1, "channels": 4},
    "archzoo_efficient_capsnet": {"img_size": 32, "decoder": False},
    "archzoo_capsule_classifier": {"img_size": 32, "backbone": "test_resnet", "capsule_types": 2},
    "archzoo_bpu": {"img_size": 32},
}
MAPS = ("vit", "mixer", "resnet", "padenet", "convnext", "mamba")  # what has feature maps


def create(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL[name], "num_classes": 3, "in_chans": 2, **options})


def images(count=2):
    return torch.rand(count, 2, 32, 32)


def test_every_family_is_here():
    import sys

    homes = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models("archzoo_*")}
    assert {homes[name] for name in SMALL} == set(homes.values())
    assert all(sys.modules[home].default_cfgs for home in homes.values())


@pytest.mark.parametrize("name", SMALL)
def test_features_heads_and_classes(name):
    model, x = create(name).eval(), images()
    assert (model.num_classes, model.default_cfg["architecture"]) == (3, name)
    assert model(x).shape == (2, 3)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.get_classifier() is not None

    without = create(name, num_classes=0).eval()
    assert without(x).shape == (2, without.num_features)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.num_classes == 5


@pytest.mark.parametrize("name", SMALL)
def test_feature_maps_where_there_are_any(name):
    if not any(word in name for word in MAPS):
        with pytest.raises(ValueError, match="features_only=True: .*has no"):
            create(name, features_only=True)
        return
    last = 4 if "net18" in name else 1
    model = create(name, features_only=True, out_indices=(0, last))
    maps = model(images())
    assert [m.shape[:2] for m in maps] == [(2, channels) for channels in model.feature_info.channels()]
    assert [32 // m.shape[-1] for m in maps] == model.feature_info.reduction()


@pytest.mark.parametrize("name", SMALL)
def test_weights_that_do_not_exist_are_refused(name):
    if name == "archzoo_capsule_classifier":  # has its backbone's
        return
    with pytest.raises(ValueError, match=f"pretrained=True: {name} has no published weights"):
        create(name, pretrained=True)


@pytest.mark.parametrize("name", SMALL)
def test_what_timm_has_saved_comes_back_to_the_bit(name, tmp_path):
    model = create(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    timm.models.save_for_hf(model, tmp_path, model_args=SMALL[name], safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(loaded) is type(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    x = images()
    assert torch.equal(model(x), loaded(x))


@pytest.mark.parametrize("name", SMALL)
def test_timms_training_script_finds_what_it_asks_for(name):
    """What `train.py` of timm does, of which the package has no copy: its arguments, its optimizer, a step."""
    model = create(name, drop_rate=0.0, drop_path_rate=None, global_pool=None, bn_momentum=None, scriptable=False)
    size = resolve_data_config({}, model=model)
    assert {"input_size", "mean", "std", "crop_pct", "interpolation"} <= size.keys()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    for prefix, module in model.named_modules():
        for key in getattr(module, "no_weight_decay", set)():
            parameter = dict(module.named_parameters()).get(key)
            assert parameter is None or id(parameter) not in decayed, f"{prefix}.{key} is decayed"
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [p for p in model.parameters() if p.requires_grad]
    )
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 1, "all layers are in one group"
    try:
        model.set_grad_checkpointing(True)
    except ValueError as error:
        assert "leave it out" in str(error)
    before = [p.detach().clone() for p in model.parameters()]
    model.train()
    loss = F.cross_entropy(model(images(4)), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("archzoo_mixer_s16", "mixer_s16_224"),
        ("archzoo_resnet18", "resnet18"),
        ("archzoo_convnext_tiny", "convnext_tiny"),
    ],
)
def test_with_usual_layers_they_are_timms_own(ours, theirs):
    with torch.device("meta"):
        one, two = (timm.create_model(name, num_classes=7).state_dict() for name in (ours, theirs))
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in two.items()}


def test_activations_go_with_layers_that_are_linear_by_themselves():
    def acts(name, **options):
        model = create(name, **options)
        return {type(m) for n, m in model.named_modules() if re.search(r"\.act\d?$", n)}

    assert acts("archzoo_resnet18") == {nn.ReLU}
    assert acts("archzoo_padenet18") == {nn.Identity}
    assert acts("archzoo_padenet18", act_layer="silu") == {nn.SiLU}
    assert acts("archzoo_mixer_s16") == {nn.Identity}
    assert acts("archzoo_mixer_s16", mlp_layer="phm") == {nn.GELU}
    assert acts("archzoo_mixer_s16", act_layer=nn.ReLU) == {nn.ReLU}


def test_the_vision_mamba_reads_both_ways_and_starts_as_its_mixer_does():
    model = create("archzoo_vision_mamba_tiny").eval()
    x = images(1).requires_grad_()
    model.forward_features(x)[0, 0].sum().backward()  # the first patch
    assert x.grad[..., 16:, 16:].abs().sum() > 0, "it does not see the last one"
    assert model.blocks[0].mixer.dt_proj.bias.std() > 0, "timm's initialisation reached into the mixer"
    assert type(create("archzoo_vision_mamba_tiny", mixer="attention").blocks[0].mixer).__name__ == "RotaryAttention"
    with pytest.raises(
        ValueError, match="is of kind 'linear', and model 'vision_mamba' is made of layers of kind 'mixer'"
    ):
        create("archzoo_vision_mamba_tiny", mixer="kan")


def test_a_wrong_argument_is_named():
    with pytest.raises(ValueError, match="layer 'knn' is not registered"):
        create("archzoo_mixer_s16", mlp_layer="knn")
    with pytest.raises(ValueError, match="drop_rate=0.1: capsules are not dropped"):
        create("archzoo_capsnet_small", drop_rate=0.1)
    for name in ("archzoo_capsnet_small", "archzoo_bpu"):
        with pytest.raises(ValueError, match="num_classes=-1: must be a whole number"):
            create(name, num_classes=-1)
        with pytest.raises(ValueError, match="global_pool='avg': .* leave it out"):
            create(name).reset_classifier(3, "avg")
    with pytest.raises(ValueError, match="features_only=True: x has no feature maps"):
        build(nn.Linear, "x", False, {"features_only": True})
    assert archzoo.models.__doc__
