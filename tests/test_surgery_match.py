"""`match`: which widths are free, and that the whole model's count is kept."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archzoo
from archzoo._surgery_links import find_links
from archzoo._surgery_sites import find_sites, parse_rules
from archzoo.budget import count_flops, count_parameters


class Functional(nn.Module):
    def __init__(self, dim=16, hidden=64):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.dropout(torch.relu(self.fc1(x)).tanh(), 0.1, self.training))


class Residual(Functional):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(h.relu() + h)


class Softmax(Functional):
    def forward(self, x):
        return self.fc2(self.fc1(x).softmax(-1))


class Twice(Functional):
    def __init__(self):
        super().__init__(16, 16)

    def forward(self, x):
        return self.fc2(self.fc1(self.fc1(x).relu()).relu())


class Gated(nn.Module):
    """As in LLaMA: three layers of one hidden width, of which two meet in a product."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        return self.proj(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 16)])

    def forward(self, x):
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x


class Untraceable(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.fc1, self.between, self.fc2 = nn.Linear(16, 64), between, nn.Linear(64, 16)

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x))) if x.dim() > 1 else x


def linear(*between, hidden=64):
    return nn.Sequential(nn.Linear(16, hidden), *between, nn.Linear(hidden, 16))


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (linear(nn.GELU(), nn.Dropout(), nn.Identity()), [("0", "4")]),
        (linear(nn.PReLU()), [("0", "2")]),
        (linear(nn.PReLU(64)), []),
        (linear(nn.LayerNorm(64)), []),
        (linear(nn.Softmax(-1)), []),
        (nn.Sequential(nn.Linear(16, 64), nn.GLU(), nn.Linear(32, 16)), []),
        (Functional(), [("fc1", "fc2")]),
        (Residual(), []),
        (Softmax(), []),
        (Twice(), []),
        (Gated(), []),
        (Attention(), []),
        (Listed(), [("layers.0", "layers.1"), ("layers.1", "layers.2")]),
        (Untraceable(nn.GELU()), [("fc1", "fc2")]),
        (Untraceable(nn.LayerNorm(64)), []),
        (nn.TransformerEncoderLayer(16, 2, 64), [("linear1", "linear2")]),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), [("0", "2")]),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)), []),
    ],
    ids=[
        *(
            "sequence",
            "prelu",
            "prelu_per_feature",
            "norm",
            "softmax_module",
            "glu",
            "functional",
            "residual",
            "softmax",
        ),
        *("called_twice", "gated", "attention", "list", "untraceable", "untraceable_norm", "torch_layer"),
        *("convolutions", "groups"),
    ],
)
def test_a_width_is_free_between_layers_with_elementwise_functions_between_them(model, pairs):
    sites, _ = find_sites(model, parse_rules({nn.Linear: "linear", nn.Conv2d: "conv2d"}, {}))
    for site in sites:
        site.prepare()
    assert [(link.source.name, link.target.name) for link in find_links(sites)] == pairs


def vit():
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=3, embed_dim=32, num_heads=2, num_classes=10
    )


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        *((layer, "params") for layer in ("kan", "phm", "paon", "wavelet_kan", "nalu")),
        *((layer, "flops") for layer in ("phm", "paon")),
        *(pytest.param(layer, "flops", marks=pytest.mark.slow) for layer in ("kan", "wavelet_kan", "nalu")),
    ],
)
def test_the_whole_model_keeps_its_count(layer, match):
    model, x = vit(), torch.randn(2, 3, 16, 16)
    count = count_parameters if match == "params" else lambda model: count_flops(model.eval(), x)
    before = count(model)
    report = archzoo.swap(model, {"blocks.*.mlp.fc*": layer}, match=match, calibration=x)
    after = count(model)
    assert abs(after - before) <= 0.01 * before
    assert (report.parameters if match == "params" else report.flops) == (before, after)
    assert len(report.swaps) == 6
    hidden = [block.mlp.fc1.out_features for block in model.blocks]
    assert hidden == [block.mlp.fc2.in_features for block in model.blocks]
    assert max(hidden) - min(hidden) <= (4 if layer == "phm" else 1)
    model.train()(x).sum().backward()


def test_functions_between_layers_count_with_their_width():
    model, x = nn.Sequential(*(Functional(8, 128) for _ in range(3))).eval(), torch.randn(4, 8)
    report = archzoo.swap(model, {"*.fc*": "kan"}, match="flops", calibration=x)
    assert abs(count_flops(model, x) - report.flops[0]) <= 0.01 * report.flops[0]
    assert model[0].fc1.out_features < 64


def test_widths_keep_their_proportions_and_multiples():
    model = nn.Sequential(linear(nn.GELU(), hidden=64), linear(nn.GELU(), hidden=128), linear(nn.GELU(), hidden=256))
    archzoo.swap(model, {nn.Linear: "phm"}, match="params", phm={"n": 4})
    widths = [block[0].out_features for block in model]
    assert all(width % 4 == 0 for width in widths)
    assert [round(width / widths[0]) for width in widths] == [1, 2, 4]


def test_what_needs_no_change_is_not_changed():
    model = linear(nn.GELU())
    report = archzoo.swap(model, {nn.Linear: "nau"}, match="params")
    assert report.matched == ""
    assert model[0].out_features == 64


def test_an_option_is_chosen_where_no_width_is_free():
    model = nn.Sequential(nn.Linear(32, 32))
    report = archzoo.swap(model, {"0": "phm"}, match="params")
    assert report.matched == "n=1 of phm"
    assert report.swaps[0].options == {"n": 1}
    assert model[0].n == 1


def test_options_that_were_given_stay():
    model = nn.Sequential(nn.Linear(32, 32))
    before = model[0]
    with pytest.raises(ValueError, match=r"the nearest reachable count is 352 \(-66.7%, as the layers are\)"):
        archzoo.swap(model, {"0": ("phm", {"n": 4, "rank": None})}, match="params")
    assert model[0] is before


def test_what_cannot_be_reached_is_refused_with_the_nearest_count():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    before = list(model)
    smallest = nn.Sequential(archzoo.KANConv2d(4, 8, 3, spline_order=0), archzoo.KANConv2d(8, 4, 3, spline_order=0))
    with pytest.raises(
        ValueError, match=r"match='params': .* its 604 parameters within 1%; the nearest .* [\d,]+ \(\+"
    ):
        archzoo.swap(model, {nn.Conv2d: "kan_conv2d"}, match="params")
    assert list(model) == before
    assert count_parameters(smallest) > 604


def test_trained_weights_are_kept_where_an_option_reaches_the_count():
    model = linear(nn.GELU())
    report = archzoo.swap(model, {nn.Linear: "phm"}, match="params", init="from_original")
    assert report.matched == "n=1 of phm"
    assert [row.start for row in report.swaps] == ["exact", "exact"]
    archzoo.unswap(report)
    report = archzoo.swap(model, {nn.Linear: "aptx"}, match="params", init="from_original")
    assert {row.reason for row in report.swaps} == {"has other sizes than the original"}


def test_a_width_that_was_not_allowed_may_be_changed():
    model = linear(nn.GELU(), hidden=66)
    with pytest.raises(ValueError, match="out_features=66"):
        archzoo.swap(model, {nn.Linear: "phm"}, phm={"n": 4})
    archzoo.swap(model, {nn.Linear: "phm"}, match="params", phm={"n": 4})
    assert model[0].out_features % 4 == 0


def test_functions_that_make_modules_count_as_they_are():
    model = nn.Sequential(linear(nn.GELU()), nn.Linear(16, 16))
    rules = {"1": lambda module: nn.Sequential(module, nn.Linear(16, 16)), nn.Linear: "kan"}
    for match in ("params", "flops"):
        report = archzoo.swap(model, rules, match=match, calibration=torch.randn(5, 16))
        before, after = report.parameters if match == "params" else report.flops
        assert abs(after - before) <= 0.01 * before
        archzoo.unswap(report)
