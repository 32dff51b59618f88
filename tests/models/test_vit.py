"""ViT: timm's own with other layers in its MLPs, in timm's registry and in ours."""

import re

import pytest
import timm
import torch
from torch import nn

import archzoo.models
from archzoo.budget import count_flops, count_parameters
from archzoo.layers.fast_kan import FastKANLinear
from archzoo.layers.kan import KANLinear
from archzoo.models.model import LayerFactory
from archzoo.models.vit import ViT, build_vit
from archzoo.registry import Card, LayerEntry
from tests.helpers import run_python

SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 3, "embed_dim": 8, "depth": 2, "num_heads": 2}


def small(seed=0, **options):
    torch.manual_seed(seed)
    return ViT(**{**SMALL, **options}).eval()


def own(seed=0, **options):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(**{**SMALL, **options}).eval()


class Nested(nn.Module):
    """A layer that has an `nn.Linear` inside, with a start of its own."""

    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None):
        super().__init__()
        self.inner = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.inner.weight, 3.0)

    def forward(self, x):
        return self.inner(x)


# --- It is timm's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_init": "jax"},
        {"qkv_bias": False, "proj_bias": False, "init_values": 0.1, "mlp_ratio": 2.5, "global_pool": "avg"},
        {"scale_mlp_norm": True, "act_layer": "silu", "reg_tokens": 2, "drop_path_rate": 0.1, "proj_drop_rate": 0.1},
    ],
    ids=str,
)
def test_with_linear_layers_it_is_timms_own_bit_for_bit(options):
    ours, theirs = small(mlp_layer="linear", **options), own(**options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(ours(x), theirs(x))
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.train()
        model(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_registered_models_have_the_sizes_of_timms(size):
    with torch.device("meta"):
        ours = timm.create_model(f"archzoo_vit_{size}", num_classes=10)
        theirs = timm.create_model(f"vit_{size}_patch16_224", num_classes=10)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_the_design_documents_call_works():
    model = timm.create_model("archzoo_vit_tiny", mlp_layer="kan", num_classes=10)
    assert isinstance(model.blocks[11].mlp.fc2, KANLinear)
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)


@pytest.mark.slow
def test_importing_the_models_registers_them_and_importing_archzoo_stays_light():
    out = run_python(
        "import sys, archzoo\n"
        "assert 'timm' not in sys.modules\n"
        "import archzoo.models, timm\n"
        "print(timm.list_models('archzoo_vi[kt]*'))"
    )
    assert out.strip() == str(
        ["archzoo_vikanformer_mnist", "archzoo_vit_base", "archzoo_vit_small", "archzoo_vit_tiny"]
    )


def test_vikanformer_for_mnist():
    model = timm.create_model("archzoo_vikanformer_mnist")
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert [type(m) for b in model.blocks for m in (b.mlp.fc1, b.mlp.act, b.mlp.fc2)] == [
        KANLinear,
        nn.Identity,
        KANLinear,
    ] * 2
    assert (model.blocks[0].mlp.fc1.in_features, model.blocks[0].mlp.fc1.out_features) == (64, 128)
    assert model.blocks[0].attn.num_heads == 4
    assert model.patch_embed.num_patches == 16
    assert model.default_cfg["input_size"] == (1, 28, 28)
    other = timm.create_model("archzoo_vikanformer_mnist", mlp_layer="fast_kan", mlp_kwargs={"grid_size": 4}, depth=1)
    assert [b.mlp.fc1.grid_size for b in other.blocks] == [4]
    features = timm.create_model("archzoo_vikanformer_mnist", features_only=True)
    assert [f.shape for f in features(torch.randn(2, 1, 28, 28))] == [(2, 64, 4, 4)] * 2


def test_weights_that_do_not_exist_are_refused_and_a_file_is_read(tmp_path):
    with pytest.raises(ValueError, match="pretrained=True: archzoo_vikanformer_mnist has no published weights"):
        timm.create_model("archzoo_vikanformer_mnist", pretrained=True)
    trained = timm.create_model("archzoo_vikanformer_mnist")
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    loaded = timm.create_model(
        "archzoo_vikanformer_mnist", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pt")}
    )
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), loaded.parameters(), strict=True))


# --- The exchanged layers ----------------------------------------------------------------------------------------


def test_only_layers_that_are_linear_by_themselves_get_an_activation():
    assert type(small(mlp_layer="phm", mlp_kwargs={"n": 2}).blocks[0].mlp.act) is nn.GELU
    assert type(small(mlp_layer="fast_kan").blocks[0].mlp.act) is nn.Identity
    assert type(small(mlp_layer="fast_kan", act_layer="relu").blocks[0].mlp.act) is nn.ReLU


def test_mlp_is_the_two_layers_after_each_other():
    mlp = small(mlp_layer="kan").blocks[1].mlp
    x = torch.randn(2, 5, 8)
    assert torch.equal(mlp(x), mlp.fc2(mlp.fc1(x)))


def test_options_go_to_both_layers_and_those_of_fc2_to_the_second():
    """KAT's MLP is made this way, of `rational_kan`."""
    mlp = (
        small(mlp_layer="fast_kan", mlp_kwargs={"grid_size": 4, "bias": False}, fc2_kwargs={"grid_size": 6})
        .blocks[0]
        .mlp
    )
    assert (mlp.fc1.grid_size, mlp.fc2.grid_size) == (4, 6)
    assert mlp.fc1.bias is None
    assert mlp.fc2.bias is None
    assert small(mlp_layer="kan", proj_bias=False).blocks[0].mlp.fc2.bias is None
    assert small(mlp_layer="nac").blocks[0].mlp.fc1.bias is None  # its own default


def test_widths_may_differ_between_blocks():
    model = small(mlp_layer="kan", mlp_widths=(5, 7))
    assert [(b.mlp.fc1.out_features, b.mlp.fc2.in_features) for b in model.blocks] == [(5, 5), (7, 7)]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_layers_keep_their_own_start_and_get_it_again(monkeypatch):
    entry = LayerEntry("nested", Nested, "linear", Card("-", "-", 2000, "", "y = x", "-", "-"), nonlinear=False)
    monkeypatch.setitem(archzoo.registry._entries, "nested", entry)
    model = small(mlp_layer="nested")
    inner = model.blocks[0].mlp.fc1.inner.weight
    assert (inner == 3).all(), "timm's initialisation reached into the layer"
    with torch.no_grad():
        inner.zero_()
    model.init_weights()
    assert (inner == 3).all()
    scales = [
        p.std().item() for p in (small(mlp_layer="kan").blocks[0].mlp.fc1.base_weight, KANLinear(8, 32).base_weight)
    ]
    assert scales[0] == pytest.approx(scales[1], rel=0.2)


def test_it_compiles_as_a_whole_and_works_under_autocast():
    model, x = small(mlp_layer="fast_kan"), torch.randn(2, 1, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mlp_layer": "knn"}, ValueError, "layer 'knn' is not registered; did you mean 'kan'?"),
        ({"mlp_layer": nn.Linear}, ValueError, "must be the name of a layer, as 'kan'"),
        (
            {"mlp_layer": "conv2d"},
            ValueError,
            "'conv2d' is of kind 'conv2d', and model 'vit' is made of layers of kind 'linear'",
        ),
        ({"mlp_layer": "kan", "mlp_kwargs": {"grid_sise": 3}}, TypeError, "no argument grid_sise=3; did you mean"),
        ({"mlp_layer": "kan", "mlp_kwargs": {"grid_size": 0}}, ValueError, "grid_size"),
        ({"mlp_kwargs": {"bias": True}, "proj_bias": False}, ValueError, "bias=True: the model sets it to False"),
        ({"mlp_widths": (3,)}, ValueError, "mlp_widths=(3,): must have one width for each of depth=2 blocks"),
    ],
)
def test_a_wrong_argument_is_named(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        small(**options)


# --- In our own registry, for the trainer --------------------------------------------------------------------------


def build(layer="kan", input_shape=(1, 8, 8), output_size=3, **options):
    return build_vit(LayerFactory(layer), input_shape, output_size, **options)


def test_it_is_registered():
    from archzoo.models.model import models

    assert models.get("vit") is build_vit


def test_widths_are_those_of_the_mlps():
    model = build(width=12, depth=3, dim=8, heads=2)
    assert [b.mlp.fc1.out_features for b in model.blocks] == [12, 12, 12]
    assert [b.mlp.fc1.out_features for b in build(widths=(5, 6)).blocks] == [5, 6]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    wide = build(input_shape=(3, 8, 16), patch=4)
    assert wide(torch.randn(2, 3, 8, 16)).shape == (2, 3)
    assert wide.patch_embed.num_patches == 8


def test_options_are_followed():
    model = build(
        layer="fast_kan", depth=3, patch=2, dim=16, heads=8, drop_path=0.2, dropout=0.1, fc2_kwargs={"grid_size": 3}
    )
    assert model.patch_embed.num_patches == 16
    assert (model.embed_dim, model.blocks[0].attn.num_heads) == (16, 8)
    assert model.blocks[2].drop_path1.drop_prob == pytest.approx(0.2)
    assert (model.pos_drop.p, model.blocks[0].mlp.drop1.p, model.blocks[0].attn.proj_drop.p) == (0.1, 0.1, 0.1)
    assert isinstance(model.blocks[0].mlp.fc1, FastKANLinear)
    assert [model.blocks[0].mlp.fc1.grid_size, model.blocks[0].mlp.fc2.grid_size] == [8, 3]


def test_only_the_mlps_depend_on_the_width_and_it_is_counted_on_meta():
    with torch.device("meta"):
        counts = [count_parameters(build("linear", widths=(w, w))) for w in (10, 11, 12)]
        assert counts[1] - counts[0] == counts[2] - counts[1] == 2 * (64 + 1 + 64)
        assert count_flops(build().eval(), torch.zeros(1, 1, 8, 8)) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "patch=3: must divide both sides of an image of 8 x 8 pixels"),
        ({"patch": 0}, "patch=0"),
        ({"heads": 3}, "heads=3: must divide dim=64"),
        ({"heads": 0}, "heads=0"),
        ({"dim": 0}, "dim=0"),
        ({"width": 0}, "width=0, depth=2: both must be 1 or more"),
        ({"depth": 0}, "depth=0"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"input_shape": (64,)}, "takes images (channels, height, width), not inputs of shape (64,)"),
        ({"layer": "conv2d"}, "model 'vit' is made of layers of kind 'linear'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)
