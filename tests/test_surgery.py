"""`archzoo.swap` and `unswap`: what is chosen, what is kept, what is refused, and that all of it is undone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import archzoo
from archzoo import KANLinear, PaonLinear, PHMConv2d, PHMLinear
from archzoo.surgery import Adapter
from tests.helpers import assert_same_bits


class MLP(nn.Module):
    def __init__(self, dim=8, hidden=16):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Net(nn.Module):
    """Blocks in a list, a head in a dict, a convolution in a sequence."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding="same"), nn.ReLU())
        self.blocks = nn.ModuleList(MLP() for _ in range(2))
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 3)})

    def forward(self, x):
        x = self.stem(x).mean((-2, -1))
        for block in self.blocks:
            x = x + block(x)
        return self.heads["a"](x)


X = torch.linspace(-2, 2, 2 * 2 * 5 * 5).reshape(2, 2, 5, 5)


def snapshot(model):
    """The modules and tensors by identity, the numbers, and what else a swap may touch."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        {name: t.clone() for name, t in model.state_dict().items()},
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert_same_bits(after[2], before[2], "state dict")


def where(model, cls):
    return [name for name, module in model.named_modules() if isinstance(module, cls)]


# --- Rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("blocks.*.fc*", ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]),
        ("*.fc2", ["blocks.0.fc2", "blocks.1.fc2"]),
        ("heads.a", ["heads.a"]),
        (nn.Linear, ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2", "heads.a"]),
        (lambda name, module: getattr(module, "out_features", 0) == 3, ["heads.a"]),
    ],
    ids=["glob", "across_dots", "name", "type", "predicate"],
)
def test_rules_choose(rule, names):
    model = Net()
    report = archzoo.swap(model, {rule: "paon"})
    assert where(model, PaonLinear) == names == [row.name for row in report.swaps]
    assert model(X).shape == (2, 3)


def test_first_match_wins_and_none_leaves_as_it_is():
    model = Net()
    archzoo.swap(model, {"heads.*": None, "blocks.0.*fc1": "kan", nn.Linear: "paon"})
    assert where(model, KANLinear) == ["blocks.0.fc1"]
    assert where(model, PaonLinear) == ["blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]
    assert type(model.heads["a"]) is nn.Linear


def test_options_for_a_layer_and_for_a_rule():
    model = Net()
    archzoo.swap(model, {"blocks.0.fc*": ("phm", {"n": 8}), "blocks.1.fc*": "phm"}, phm={"n": 2, "rule": "mixing"})
    assert [(m.n, m.rule) for m in model.modules() if isinstance(m, PHMLinear)] == [(8, "mixing")] * 2 + [
        (2, "mixing")
    ] * 2


def test_a_convolution_keeps_its_shape_arguments():
    conv = nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False)
    model = nn.Sequential(conv)
    archzoo.swap(model, {nn.Conv2d: "phm_conv2d"}, phm_conv2d={"n": 2})
    new = model[0]
    assert isinstance(new, PHMConv2d)
    x = torch.randn(2, 4, 9, 14)
    assert new(x).shape == conv(x).shape
    assert new.bias is None
    assert new.groups == 2


def test_a_function_makes_the_new_module_and_may_keep_the_old_one():
    model = Net()
    old = model.heads["a"]
    report = archzoo.swap(model, {"heads.a": lambda module: nn.Sequential(module, nn.Tanh())})
    assert model.heads["a"][0] is old
    assert report.swaps[0].parameters == (27, 27)
    assert archzoo.unswap(report).heads["a"] is old


def test_the_model_itself():
    model = nn.Linear(3, 4)
    report = archzoo.swap(model, {nn.Linear: "kan"})
    assert isinstance(report.model, KANLinear)
    assert "(model)" in str(report)
    assert archzoo.unswap(report) is report.model is model
    assert isinstance(archzoo.swap(model, {"": "kan"}).model, KANLinear)
    with pytest.raises(ValueError, match="matches no module"):
        archzoo.swap(model, {"*": "kan"})


def test_a_shared_module_is_replaced_once_and_shared_again():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({"x": shared})["x"], nn.Sequential(shared))
    report = archzoo.swap(model, {"2": "kan"})
    assert model[0] is model[2] is model[3][0]
    assert isinstance(model[0], KANLinear)
    assert [row.names for row in report.swaps] == [("0", "2", "3.0")]
    assert archzoo.unswap(report)[3][0] is shared


def test_what_is_in_a_replaced_module_goes_with_it():
    model = Net()
    rules = {"blocks.0": lambda module: nn.Identity(), nn.Linear: "paon"}
    report = archzoo.swap(model, rules)
    assert [row.name for row in report.swaps] == ["blocks.0", "blocks.1.fc1", "blocks.1.fc2", "heads.a"]
    archzoo.unswap(report)
    assert type(model.blocks[0].fc1) is nn.Linear


# --- What is kept -----------------------------------------------------------------------------------------------------


def test_precision_training_mode_and_frozen_parameters_are_kept():
    model = Net().double().eval()
    model.blocks.requires_grad_(False)
    model.heads["a"].weight.requires_grad_(False)
    archzoo.swap(model, {nn.Linear: "paon"})
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.blocks.parameters())
    assert {name for name, p in model.heads.named_parameters() if p.requires_grad} == {"a.bias"}


def test_hooks_move_with_their_handles():
    model = Net()
    seen = []
    fc1 = model.blocks[0].fc1
    handles = [
        fc1.register_forward_pre_hook(lambda module, args: seen.append(("pre", type(module)))),
        fc1.register_forward_hook(lambda module, args, kwargs, out: seen.append("with_kwargs"), with_kwargs=True),
        fc1.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    report = archzoo.swap(model, {"blocks.0.fc1": "kan"})
    model(X).sum().backward()
    assert seen == [("pre", KANLinear), "with_kwargs", "backward"]
    for handle in handles[1:]:
        handle.remove()
    model(X).sum().backward()
    assert seen[3:] == [("pre", KANLinear)]
    archzoo.unswap(report)
    model(X).sum().backward()
    assert seen[4:] == [("pre", nn.Linear)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layer_name", ["kan", "normalized_linear"])  # without a weight, and with one to be misread
def test_inference_of_torchs_transformer_layer_takes_the_new_layers(layer_name):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        original = model(x, src_key_padding_mask=mask)
    report = archzoo.swap(model, {nn.Linear: layer_name})
    assert len(report.swaps) == 4
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(fast, model(x, src_key_padding_mask=mask))
    archzoo.unswap(report)
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask), original)


def test_where_meta_is_the_default_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        report = archzoo.swap(model, {nn.Linear: "kan"}, match="params")
    assert abs(report.parameters[1] / report.parameters[0] - 1) <= 0.01
    assert {p.device.type for p in report.model.parameters()} == {"meta"}


def test_on_meta():
    with torch.device("meta"):
        model = Net()
    report = archzoo.swap(model, {nn.Linear: "kan"}, init="from_original", calibration=X.to("meta"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert all(row.start == "fresh" and "meta" in row.reason for row in report.swaps)
    assert report.flops[1] > report.flops[0] > 0


# --- What is refused, with nothing changed ----------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def parametrized():
    return parametrizations.weight_norm(nn.Linear(8, 8))


def with_old_weight_norm():
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(8, 8))


def with_hook_on_a_parameter():
    layer = nn.Linear(8, 8)
    layer.weight.register_hook(lambda grad: grad)
    return layer


def with_another_forward():
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


def with_state_hook():
    layer = nn.Linear(8, 8)
    layer.register_state_dict_post_hook(lambda *args: None)
    return layer


def tied():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Embedding(8, 8)})
    model["b"].weight = model["a"].weight
    return model


@pytest.mark.parametrize(
    ("make", "rule", "message"),
    [
        (nn.GELU, "other", "'kan' is of kind linear .* torch Linear, .* or a perceptron of these, not of GELU"),
        (lambda: nn.Conv2d(2, 2, 1), "other", "not of Conv2d"),
        (lambda: Scaled(8, 8), "other", "Scaled is an nn.Linear with a forward of its own"),
        (lambda: nn.MultiheadAttention(8, 2), "other.out_proj", "never calls"),
        (parametrized, "other", "parametrized .weight., .*remove_parametrizations"),
        (with_old_weight_norm, "other", "hook WeightNorm"),
        (with_hook_on_a_parameter, "other", "weight has hooks"),
        (with_another_forward, "other", "the forward of it was exchanged"),
        (with_state_hook, "other", "state dict hooks"),
        (tied, "other.a", "weight is tied with other.b.weight"),
        (lambda: nn.LazyLinear(3), "other", "LazyLinear"),
        (lambda: torch.jit.script(MLP()), "other.fc1", "swap before wrapping"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else "",
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_refused(make, rule, message):
    model = nn.ModuleDict({"fine": nn.Linear(4, 4), "other": make()})
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=rf"{rule}: .*{message}"):
        archzoo.swap(model, {"fine": "kan", rule: "kan"})
    assert [(name, id(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize(
    ("rules", "options", "error", "message"),
    [
        ({"blocks.*.fc1": "kna"}, {}, ValueError, "did you mean 'kan'"),
        ({"blocks.*.fc9": "kan"}, {}, ValueError, "rule 'blocks.*.fc9' matches no module .* allow_unmatched"),
        ({nn.Module: "kan"}, {}, ValueError, "very type"),
        ({nn.Linear: "phm"}, {"phm": {"n": 3}}, ValueError, "blocks.0.fc1: .*n=3"),
        ({nn.Linear: "phm"}, {"phm": {"m": 3}}, TypeError, "no argument m=3"),
        ({nn.Linear: "phm"}, {"phm": {"bias": False}}, ValueError, "bias=False: this is taken from the original"),
        ({nn.Linear: "phm"}, {"kan": {"grid_size": 3}}, TypeError, "no argument kan="),
        ({nn.Linear: "phm"}, {"phm": 4}, TypeError, "must be a dict of options"),
        ({nn.Linear: KANLinear}, {}, TypeError, "must be a layer's name"),
        ({nn.Linear: 3}, {}, TypeError, "must be a layer's name"),
        ({3: "kan"}, {}, TypeError, "must be a glob, a type"),
        ({}, {}, TypeError, "one rule or more"),
        ({"heads.a": lambda module: None}, {}, TypeError, "heads.a: .* no nn.Module"),
        ({"heads.a": "kan"}, {"init": "original"}, ValueError, "init='original'"),
        ({"heads.a": "kan"}, {"match": "time"}, ValueError, "match='time'"),
        ({"heads.a": "kan"}, {"match": "flops"}, ValueError, "calibration"),
        ({"heads.a": "kan"}, {"calibration": X[0, 0, 0]}, ValueError, "calibration: the model does not run on it"),
        ({"heads.a": lambda m: nn.Linear(7, 3)}, {"calibration": X}, ValueError, "no longer runs on it"),
        ({"heads.a": "kan"}, {"optimizer": 0.1}, TypeError, "optimizer=float"),
    ],
    ids=[
        *("layer", "unmatched", "subclass", "value", "option", "taken", "unused", "no_dict", "class", "choice", "rule"),
        *("empty", "function", "init", "match", "flops", "calibration", "broken", "optimizer"),
    ],
)
def test_wrong_arguments(rules, options, error, message):
    model = Net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        archzoo.swap(model, rules, **options)
    assert_untouched(model, before)


def test_padding_that_a_layer_cannot_do_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="0: padding_mode='reflect': KANConv2d pads with zeros only"):
        archzoo.swap(model, {"0": "kan_conv2d"})
    archzoo.swap(model, {"0": "paon_conv2d"})
    assert model[0].padding_mode == "reflect"


def test_a_model_without_a_model():
    with pytest.raises(TypeError, match="model=str"):
        archzoo.swap("vit", {"*": "kan"})


def test_unmatched_rules_may_be_allowed():
    model = Net()
    report = archzoo.swap(model, {"nothing": "kan"}, allow_unmatched=True)
    assert report.swaps == ()
    assert report.unmatched == ("'nothing'",)
    assert "rules that matched nothing: 'nothing'" in str(report)


# --- Back -------------------------------------------------------------------------------------------------------------


def test_unswap_restores_everything():
    model = Net()
    before = snapshot(model)
    report = archzoo.swap(model, {nn.Linear: "kan", "stem.0": "paon_conv2d"}, calibration=X)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert archzoo.unswap(report) is model
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="nothing to take back"):
        archzoo.unswap(report)


def test_swaps_are_taken_back_in_order():
    model = Net()
    before = snapshot(model)
    first = archzoo.swap(model, {nn.Linear: "paon"})
    second = archzoo.swap(model, {"blocks.0.fc1": lambda module: nn.Linear(8, 16)})
    between = snapshot(model)
    with pytest.raises(ValueError, match="blocks.0.fc1 is no longer"):
        archzoo.unswap(first)
    assert_untouched(model, between)
    archzoo.unswap(second)
    archzoo.unswap(first)
    assert_untouched(model, before)


def test_the_training_mode_of_now_is_kept():
    model = Net()
    report = archzoo.swap(model, {nn.Linear: "kan"})
    model.eval()
    archzoo.unswap(report)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("init", ["fresh", "from_original"])
def test_a_dry_run_says_the_same_and_changes_nothing(init):
    model = Net()
    model.stem.append(nn.BatchNorm2d(8))
    optimizer = torch.optim.Adam(model.parameters())
    rules = {nn.Linear: ("kan", {"grid_size": 3})}
    before, random = snapshot(model), torch.get_rng_state()
    dry = archzoo.swap(model, rules, init=init, dry_run=True, calibration=X, optimizer=optimizer)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match="dry run"):
        archzoo.unswap(dry)
    report = archzoo.swap(model, rules, init=init, calibration=X)
    assert report.swaps == dry.swaps
    assert (report.parameters, report.flops) == (dry.parameters, dry.flops)
    assert str(dry) == f"{report}\ndry run: nothing was changed"


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_table_is_aligned_and_true():
    model = Net()
    report = archzoo.swap(model, {"blocks.*.fc1": "kan", "heads.a": "paon"}, calibration=X, kan={"grid_size": 3})
    lines = str(report).splitlines()
    assert lines[0].split() == ["name", "original", "layer", "parameters", "FLOPs", "start"]
    assert lines[1].startswith("blocks.0.fc1  Linear(8 -> 16)  kan(8 -> 16, grid_size=3)  144 -> ")
    assert len({line.index("->") for line in lines[1:3]}) == 1
    assert report.parameters[1] == archzoo.budget.count_parameters(model)
    assert report.flops[1] == archzoo.budget.count_flops(model, X)
    changes = [row.parameters[1] - row.parameters[0] for row in report.swaps]
    assert report.parameters[1] - report.parameters[0] == sum(changes)
    assert [row.flops[0] for row in report.swaps] == [2 * 2 * 8 * 16] * 2 + [2 * 2 * 8 * 3]


# --- Starts -----------------------------------------------------------------------------------------------------------


def test_starts_from_trained_weights():
    model = Net().eval()
    original = copy.deepcopy(model)
    rules = {
        "heads.a": "nmu",
        "blocks.0.fc1": "phm",
        "blocks.0.fc2": "linear",
        nn.Linear: "kan",
        "stem.0": "paon_conv2d",
    }
    report = archzoo.swap(model, rules, init="from_original", calibration=X, phm={"n": 2})
    starts = {row.name: row.start for row in report.swaps}
    assert starts == {
        "stem.0": "exact",
        "blocks.0.fc1": "approximate",
        "blocks.0.fc2": "exact",
        "blocks.1.fc1": "exact",
        "blocks.1.fc2": "exact",
        "heads.a": "fresh",
    }
    rows = {row.name: row for row in report.swaps}
    assert "NMU" in rows["heads.a"].reason
    assert rows["heads.a"].error is None
    assert all(row.error < 1e-5 for row in report.swaps if row.start == "exact")
    # the error of one layer on its own inputs
    with torch.no_grad():
        inputs = original.stem(X).mean((-2, -1))
        truth, found = original.blocks[0].fc1(inputs), model.blocks[0].fc1(inputs)
    assert rows["blocks.0.fc1"].error == pytest.approx(float((found - truth).norm() / truth.norm()), rel=1e-4)
    assert rows["blocks.0.fc1"].error_on == "calibration"


def test_without_a_batch_the_errors_are_those_of_the_starts():
    model = nn.Sequential(nn.Linear(8, 8))
    _, error = PHMLinear.from_linear(model[0], n=2)
    torch.manual_seed(0)
    row = archzoo.swap(model, {"0": "phm"}, init="from_original", phm={"n": 2}).swaps[0]
    assert (row.start, row.error_on) == ("approximate", "normal inputs")
    assert row.error == pytest.approx(error, rel=0.2)


def test_a_batch_by_position_or_by_name():
    model = MLP()
    x = torch.randn(3, 8)
    flops = {archzoo.swap(model, {"fc1": "kan"}, dry_run=True, calibration=c).flops for c in (x, (x,), {"x": x})}
    assert len(flops) == 1


# --- Adapters ---------------------------------------------------------------------------------------------------------


def test_a_further_sort_of_module(monkeypatch):
    from archzoo import _surgery_adapters
    from archzoo.surgery import register_adapter

    class WholeMLP(Adapter):
        """A whole perceptron by two layers with nothing between them."""

        kind, original = "linear", MLP

        def refusal(self, module):
            return ""

        def arguments(self, layer, module):
            return {"in_features": module.fc1.in_features, "out_features": module.fc2.out_features}

        def build(self, make, module, arguments):
            hidden = module.fc1.out_features
            return nn.Sequential(
                make(**arguments | {"out_features": hidden}), make(**arguments | {"in_features": hidden})
            )

    monkeypatch.setattr(_surgery_adapters, "_adapters", list(_surgery_adapters._adapters))
    register_adapter(WholeMLP())
    model = Net()
    archzoo.swap(model, {MLP: "kan"}, init="from_original")
    assert where(model, KANLinear) == ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1"]
    assert model(X).shape == (2, 3)
