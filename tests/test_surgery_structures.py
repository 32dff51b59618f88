"""Swaps that know what they replace: timm's convolutions, whole perceptrons, attention, a classifier's head."""

import pytest
import timm
import torch
from timm import layers as timm_layers
from torch import nn
from torch.nn import functional as F

import archzoo
from archzoo.budget import count_parameters
from archzoo.layers.capsules import margin_loss

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
X = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def vit():
    return timm.create_model("vit_tiny_patch16_224", **VIT).eval()


# --- Convolutions of timm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conv",
    [
        lambda: timm_layers.Conv2dSame(4, 8, 3, stride=2),
        lambda: timm_layers.Conv2dSame(4, 8, (5, 2), stride=(3, 1), dilation=(1, 2), bias=False),
        lambda: timm_layers.StdConv2d(4, 8, 3, stride=2, groups=2),
        lambda: timm_layers.StdConv2dSame(4, 8, 3, stride=2, bias=True),
        lambda: timm_layers.ScaledStdConv2d(4, 8, 3, gamma=1.7),
        lambda: timm_layers.ScaledStdConv2dSame(4, 8, 3, stride=2),
        lambda: timm_layers.linear.Linear(9, 8),
    ],
    ids=["same", "same_uneven", "std", "std_same", "scaled", "scaled_same", "linear"],
)
def test_layers_of_timm_start_as_what_they_compute(conv):
    model = nn.Sequential(conv()).train()
    if hasattr(model[0], "gain"):
        nn.init.uniform_(model[0].gain, 0.5, 2)
    x = torch.randn(2, 4, 8, 9)
    before = model(x)
    for layer in ("kan_conv2d", "conv2d") if isinstance(model[0], nn.Conv2d) else ("kan", "linear"):
        report = archzoo.swap(model, {"0": layer}, init="from_original")
        assert report.swaps[0].start == "exact", report.swaps[0].reason
        assert not any(isinstance(m, type(report._operation.pairs[0][0].module)) for m in model.modules())
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
        archzoo.unswap(report)


def test_convolutions_in_a_dict_and_norms_that_act():
    model = nn.Sequential(timm_layers.MixedConv2d(8, 8, [3, 5]), timm_layers.BatchNormAct2d(8))
    x = torch.randn(2, 8, 6, 6)
    archzoo.swap(model, {"0.*": "kan_conv2d"})
    assert [type(m).__name__ for m in model[0].values()] == ["KANConv2d"] * 2
    assert model(x).shape == (2, 8, 6, 6)
    assert (model(x) >= 0).all()


# --- Weights that are read past a layer's forward ---------------------------------------------------------------------


class Reads(nn.Module):
    """As attention of timm's EVA and BEiT, and torchvision's of Swin: the weight goes into a function."""

    def __init__(self, calls=False):
        super().__init__()
        self.qkv, self.out, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), calls

    def project(self, x):
        return self.qkv(x) if self.calls else F.linear(x, self.qkv.weight)

    def forward(self, x):
        return self.out(self.project(x).to(self.out.weight.dtype))


def test_a_weight_that_is_read_by_others_is_refused():
    with pytest.raises(ValueError, match=r"0.qkv: Reads reads its weight, perhaps .* give a batch as calibration"):
        archzoo.swap(nn.Sequential(Reads()), {"0.qkv": "normalized_linear"})
    with pytest.raises(ValueError, match=r"0.qkv: Reads reads its weight and does not call it"):
        archzoo.swap(nn.Sequential(Reads()), {"0.qkv": "normalized_linear"}, calibration=torch.randn(2, 4))
    archzoo.swap(nn.Sequential(Reads(calls=True)), {"0.qkv": "kan"}, calibration=torch.randn(2, 4))
    archzoo.swap(nn.Sequential(Reads()), {"0.out": "normalized_linear"})  # whose dtype alone is read


# --- Perceptrons ------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down(self.act_fn(self.gate(x)) * self.up(x))


PERCEPTRONS = {
    "timm": lambda: timm_layers.Mlp(8, 32, drop=0.1),
    "packed": lambda: timm_layers.GluMlp(8, 32, act_layer=nn.SiLU, gate_last=False),
    "swiglu": lambda: timm_layers.SwiGLU(8, 24),
    "gated": Gated,
    "sequence": lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 8)),
    "half": lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU()),
}


@pytest.mark.parametrize("make", PERCEPTRONS.values(), ids=PERCEPTRONS)
def test_whole_perceptrons(make):
    model, x = nn.Sequential(nn.LayerNorm(8), make()).eval(), torch.randn(5, 8)
    mlp, before = model[1], model(x)
    report = archzoo.swap(model, {"1": "kan"})
    assert type(model[1]) is type(mlp)
    assert not any(isinstance(m, nn.Linear | nn.SiLU | nn.GELU | nn.ReLU) for m in model[1].modules())
    assert not {id(p) for p in model[1].parameters()} & {id(p) for p in mlp.parameters()}
    assert model(x).shape == before.shape
    assert report.swaps[0].original == f"{type(mlp).__name__}({report.swaps[0].sizes})"
    archzoo.unswap(report)
    assert model[1] is mlp
    for layer in ("aptx", "linear"):  # exact, for the activation stays
        report = archzoo.swap(model, {"1": layer}, init="from_original", calibration=x)
        assert report.swaps[0].start == "exact"
        assert report.swaps[0].error < 1e-5
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
        archzoo.unswap(report)
    assert torch.equal(model(x), before)


def test_layers_that_do_not_bend_keep_the_activation():
    model = nn.Sequential(timm_layers.Mlp(8, 32))
    archzoo.swap(model, {"0": "phm"}, phm={"n": 2})
    assert isinstance(model[0].act, nn.GELU)
    assert model[0].fc1.n == model[0].fc2.n == 2


def test_perceptrons_of_convolutions():
    model, x = nn.Sequential(timm_layers.Mlp(8, 32, use_conv=True)), torch.randn(2, 8, 4, 4)
    with pytest.raises(ValueError, match="not of Mlp; a layer of kind conv2d would"):
        archzoo.swap(model, {"0": "kan"})
    archzoo.swap(model, {"0": "kan_conv2d"}, match="flops", calibration=x)
    assert model(x).shape == x.shape
    assert model[0].fc1.out_channels < 32
    gate = nn.Sequential(timm_layers.SqueezeExcite(16))
    archzoo.swap(gate, {"0": "kan_conv2d"})
    assert "Sigmoid" in type(gate[0].gate).__name__  # behind the last layer, so no activation between them
    assert isinstance(gate[0].act, nn.Identity)


@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize("layer", ["kan", "phm"])
def test_hidden_width_of_a_whole_perceptron_is_free(match, layer):
    model = timm.create_model("vit_tiny_patch16_224", **VIT | {"embed_dim": 32}).eval()
    options = {"phm": {"n": 4}} if layer == "phm" else {}
    report = archzoo.swap(model, {"blocks.*.mlp": layer}, match=match, calibration=X, **options)
    before, after = report.parameters if match == "params" else report.flops
    assert abs(after - before) <= 0.01 * before
    assert "hidden widths 128 -> " in report.matched
    assert model.blocks[0].mlp.fc1.out_features == model.blocks[0].mlp.fc2.in_features != 128


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (timm_layers.Attention(8, 2), "it is attention, whose place a mixer takes"),
        (nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(8, 8)), "it holds layers of 8 -> 4, 8 -> 8"),
        (nn.Sequential(nn.Linear(8, 8), nn.Bilinear(8, 8, 8)), "it holds other weights beside its layers"),
        (nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)]), "it holds layers of 8 -> 8, 8 -> 8"),
    ],
    ids=["attention", "widths", "weights", "many"],
)
def test_what_is_no_perceptron(module, message):
    with pytest.raises(ValueError, match=f"0: .* is no perceptron that could be one of other layers: {message}"):
        archzoo.swap(nn.ModuleList([module]), {"0": "kan"})


def test_hooks_and_frozen_parameters_of_a_perceptron():
    model, seen = vit(), []
    mlp = model.blocks[0].mlp
    mlp.register_forward_hook(lambda module, args, output: seen.append(type(module.fc1).__name__))
    mlp.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    archzoo.swap(model, {"blocks.*.mlp": "kan"}, optimizer=optimizer)
    model(X)
    assert seen == ["KANLinear"]
    assert not any(p.requires_grad for p in model.blocks[0].mlp.parameters())
    grouped = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


# --- Attention --------------------------------------------------------------------------------------------------------

STATE = {"mamba2": {"d_state": 8}, "mamba3": {"d_state": 8}}


@pytest.mark.parametrize("mixer", archzoo.list_layers(kind="mixer"))
def test_attention_by_every_mixer(mixer):
    """Every token still sees every other one."""
    model = vit()
    before = model(X)
    report = archzoo.swap(model, {"blocks.*.attn": (mixer, STATE.get(mixer, {}))})
    tokens = torch.randn(1, 5, 16, requires_grad=True)
    for token in (0, 4):
        (grad,) = torch.autograd.grad(model.blocks[0].attn(tokens)[0, token, 0], tokens)
        assert (grad.abs().sum(-1) > 0).all(), f"token {token}"
    assert model(X).shape == before.shape
    archzoo.unswap(report)
    assert torch.equal(model(X), before)


def test_heads_are_the_attentions_unless_given():
    model = vit()
    archzoo.swap(model, {"blocks.0.attn": "ngpt", "blocks.1.attn": ("ngpt", {"num_heads": 4, "causal": True})})
    first, second = (block.attn.mixer for block in model.blocks)
    assert (first.num_heads, first.causal, second.num_heads, second.causal) == (2, False, 4, True)


def test_rotary_attention_of_eva():
    model = timm.create_model("eva02_tiny_patch14_224", **VIT).eval()
    archzoo.swap(model, {"blocks.*.attn": "mamba", "blocks.*.mlp": "kan"}, calibration=X)
    model(X).sum().backward()


def test_masks_of_windows_are_refused():
    windows = {"patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=16, num_classes=4, **windows)
    with pytest.raises(ValueError, match=r"calibration: .* mask of shape .* windows of an image are not mixed"):
        archzoo.swap(model, {"*.attn": "mamba"}, calibration=X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}, "SelectiveSSM takes no mask"),
        ({"is_causal": True}, "is_causal: .* built to look both ways"),
    ],
    ids=["mask", "causal"],
)
def test_what_a_mixer_cannot_do_is_refused(arguments, message):
    model = vit()
    archzoo.swap(model, {"blocks.*.attn": "selective_ssm"})
    with pytest.raises(ValueError, match=message):
        model.blocks[0].attn(torch.randn(1, 5, 16), **arguments)


@pytest.mark.parametrize("causal", [True, False])
def test_a_scan_takes_padding_and_no_other_mask(causal):
    from archzoo._surgery_attention import MixedAttention

    mixer = MixedAttention(archzoo.create_layer("mamba", 16), ("x", "mask"), causal=causal, both=not causal, pair=False)
    x, real = torch.randn(2, 5, 16), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    padding = real[:, None, None, :].expand(2, 1, 5, 5)
    usual = padding.tril() if causal else padding
    torch.testing.assert_close(mixer(x, usual)[:1, 2:], mixer(x[:1, 2:]))
    torch.testing.assert_close(mixer(x, torch.where(usual, 0.0, -1e9)), mixer(x, usual))
    window = usual & ~torch.ones(5, 5).bool().tril(-2)  # two tokens back and no further
    packed = usual & (torch.arange(5) // 2)[:, None].eq(torch.arange(5) // 2)
    for mask in (window, packed):
        with pytest.raises(ValueError, match="takes padding alone, and this mask has a window"):
            mixer(x, mask)


def test_attention_that_changes_the_width_is_refused():
    model = nn.ModuleList([timm_layers.Attention(8, 2, dim_out=12)])
    with pytest.raises(ValueError, match=r"0: it maps 8 features to \[12\]; a mixer keeps them"):
        archzoo.swap(model, {"0": "mamba"})
    with pytest.raises(ValueError, match="takes the place of self-attention, .*not of MultiheadAttention"):
        archzoo.swap(nn.ModuleList([nn.MultiheadAttention(8, 2)]), {"0": "mamba"})


# --- Capsules ---------------------------------------------------------------------------------------------------------


def test_a_classifiers_head_by_capsules():
    model = vit()
    archzoo.swap(model, {"head": ("capsules", {"iterations": 2, "in_capsules": 6})})
    assert (model.head.routing.iterations, model.head.capsules) == (2, 6)
    labels = torch.tensor([1, 3])
    first = F.cross_entropy(model(X), labels)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(X), labels).backward()
        optimizer.step()
    assert F.cross_entropy(model(X), labels) < 0.5 * first
    lengths = model.head.routing(torch.zeros(2, 6, 8)).norm(dim=-1)
    assert lengths.shape == (2, 4)
    assert margin_loss(model(X).sigmoid(), labels).isfinite()


def test_capsules_are_matched_by_their_number():
    model = timm.create_model("resnet18", num_classes=4)
    before = count_parameters(model)
    archzoo.swap(model, {"fc": "capsules"}, match="params")
    assert abs(count_parameters(model) - before) <= 0.01 * before
    with pytest.raises(ValueError, match="kind module and takes the place of no module"):
        archzoo.swap(model, {"conv1": "linearizer"})


# --- Layers that are split to save ------------------------------------------------------------------------------------


def test_a_layer_with_no_free_width_is_split_in_two_to_keep_the_count():
    model = nn.Sequential(nn.Conv2d(16, 64, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(64), nn.Linear(4, 4))
    x = torch.randn(2, 16, 8, 8)
    before, shape = count_parameters(model), model(x).shape
    report = archzoo.swap(model, {"0": "kan_conv2d"}, match="params")
    assert "layers of two, through" in report.matched
    assert [type(m).__name__ for m in model[0]] == ["KANConv2d", "KANConv2d"]
    assert report.swaps[0].sizes == f"16 -> {model[0][0].out_channels} -> 64, 5x5"
    assert abs(count_parameters(model) - before) <= 0.01 * before
    assert model(x).shape == shape


def test_a_residual_network_keeps_its_flops():
    model = timm.create_model("resnet18", num_classes=4, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_width=16)
    report = archzoo.swap(model, {nn.Conv2d: "wavelet_kan_conv2d"}, match="flops", calibration=X)
    before, after = report.flops
    assert abs(after - before) <= 0.01 * before
