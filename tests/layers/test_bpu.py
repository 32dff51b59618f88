"""The BPU layer: what it computes, what of it may change, and what it owes as every layer does."""

import copy
import io
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archzoo
from archzoo.layers.bpu import BPU, Connectome
from tests.helpers import assert_same_bits, rms_error

LARVA = Path(os.environ.get("ARCHZOO_DATA", ""), "larva_connectome.npz")
CORE = ("edge_weight", "edge_pre", "edge_post")
TABLE = {  # of the larva: neurons per step, and edges in all
    2: ((252, 126), 853),
    3: ((330, 196, 173), 2735),
    4: ((353, 359, 819, 207), 10925),
    5: ((353, 365, 1666, 1086, 207), 39622),
    8: ((353, 365, 1691, 2245, 2283, 2261, 1109, 207), 200321),
}


@pytest.fixture(scope="module")
def larva():
    if not LARVA.is_file():
        pytest.skip("needs larva_connectome.npz in ARCHZOO_DATA")
    return Connectome.load(LARVA, signs=LARVA.with_name("larva_signs.npz"))


@pytest.fixture(scope="module")
def wiring():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(14, 14, generator=generator, dtype=torch.float64)
    return Connectome.from_dense(matrix * (torch.rand(14, 14, generator=generator) < 0.4), 5, 3)


def build(wiring, seed=0, **options):
    torch.manual_seed(seed)
    return BPU(wiring, 6, 4, **{"steps": 3, "scale": 0.3, "dropout": 0.0} | options)


def x(*leading, dtype=torch.float32):
    return torch.randn(*leading, 6, generator=torch.Generator().manual_seed(5)).to(dtype)


def textbook(layer, inputs):
    """The three pools of the paper's equation, one by one, from the dense matrix."""
    pools = layer.connectome.pool_sizes
    blocks = [row.split(pools, 1) for row in layer.dense_weight().split(pools)]
    states = [inputs.new_zeros(len(inputs), n) for n in pools]
    drive, total = layer.input_proj(inputs), 0
    for t in range(layer.steps):
        after = [sum(states[g] @ blocks[g][h] for g in range(3)) for h in range(3)]
        if layer.residual:
            after = [a + s for a, s in zip(after, states, strict=True)]
        if t == 0 or layer.inject == "every":
            after[0] = after[0] + drive
        states = [F.relu(a) for a in after]
        total = total + states[2]
    return layer.output_proj(total if layer.readout == "sum" else states[2])


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize(
    "options",
    [{}, {"inject": "every"}, {"residual": True}, {"readout": "sum"}, {"steps": 7}, {"bias": False}],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_output_is_the_textbooks(wiring, options, backend):
    layer = build(wiring, **options, backend=backend, dtype=torch.float64)
    assert rms_error(layer(x(9, dtype=torch.float64)), textbook(layer, x(9, dtype=torch.float64))) < 1e-12


@pytest.mark.parametrize("steps", TABLE)
def test_larva_computes_what_can_matter(larva, steps):
    layer = BPU(larva, 784, 10, steps=steps)
    assert (layer.step_sizes, sum(layer.step_edges)) == TABLE[steps]


def test_larva_has_the_papers_parameters_and_a_small_core(larva):
    layer = BPU(larva, 784, 10)
    assert sum(p.numel() for p in layer.parameters()) == 339_740
    assert sum(p.numel() for p in BPU(larva, 3072, 10).parameters()) == 1_323_580
    assert sum(layer.state_dict()[name].nbytes for name in CORE) < 1.5e6
    assert layer.edge_weight.dtype == torch.float32
    assert torch.equal(layer.edge_weight, (0.04 * larva.weight).float())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert len(file.getvalue()) < 339_740 * 4 + 1.5e6
    assert rms_error(layer.eval()(torch.ones(3, 784)), textbook(layer, torch.ones(3, 784))) < 1e-5


def test_larva_of_one_sense_needs_more_steps():
    if not LARVA.is_file():
        pytest.skip("needs larva_connectome.npz in ARCHZOO_DATA")
    visual = Connectome.load(LARVA, modality="visual")
    with pytest.raises(ValueError, match="steps=2: reach no output neuron; must be 3 or more"):
        BPU(visual, 784, 10, steps=2)
    few, more = BPU(visual, 784, 10, steps=3).step_sizes, BPU(visual, 784, 10, steps=4).step_sizes
    assert few[0] <= more[0] <= 29
    assert few[-1] < more[-1]


# --- What may change --------------------------------------------------------------------------------------------------


def core_of(layer):
    return {name: getattr(layer, name).detach().clone() for name in CORE}


def test_nothing_that_trains_changes_the_core(wiring):
    layer = build(wiring)
    before = core_of(layer)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {f"{proj}.{part}" for proj in ("input_proj", "output_proj") for part in ("weight", "bias")}
    average = torch.optim.swa_utils.AveragedModel(
        layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for optimizer in (
        torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5),
        torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            layer(x(5)).square().sum().backward()
            optimizer.step()
            average.update_parameters(layer)
    layer.reset_parameters()
    layer.apply(lambda m: [nn.init.normal_(p) for p in m.parameters(recurse=False)])
    layer.requires_grad_(True)
    assert not layer.edge_weight.requires_grad
    assert_same_bits(core_of(layer), before, "the core after training")
    assert_same_bits(core_of(average.module), before, "the core of the moving average")


def test_a_trainable_core_learns_its_edges_and_no_others(wiring):
    layer = build(wiring, trainable=True)
    before = layer.dense_weight().detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x(5)).square().sum().backward()
    assert layer.edge_weight.grad.abs().sum() > 0
    optimizer.step()
    after = layer.dense_weight().detach()
    assert not torch.equal(before, after)
    assert torch.equal(before != 0, after != 0)
    layer.reset_parameters()
    assert torch.equal(layer.dense_weight(), after)


def test_state_dict_goes_round_and_another_wirings_is_refused(wiring):
    layer, other = build(wiring), build(wiring, seed=1, scale=0.5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x(4)), layer(x(4)))
    assert set(layer.state_dict()) == {*CORE, *dict(layer.named_parameters())}
    shuffled = build(wiring.shuffle("degree"))
    with pytest.raises(ValueError, match=r"edge_pre: the state dict is of another wiring|edge_post"):
        shuffled.load_state_dict(layer.state_dict())


def test_meta_layers_are_filled_later(wiring):
    built = build(wiring, seed=3)
    layer = build(wiring, device="meta")
    assert layer(x(4).to("meta")).shape == (4, 4)
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    loaded = build(wiring, device="meta")
    loaded.load_state_dict(built.state_dict(), assign=True)
    for other in (layer, loaded):
        assert_same_bits(core_of(other), core_of(built), "a layer from meta")
        assert torch.equal(other(x(4)), built(x(4)))
    with torch.device("meta"):
        assert build(wiring).edge_weight.is_meta


# --- Options ----------------------------------------------------------------------------------------------------------


def test_spectral_radius_sets_the_scale(wiring):
    layer = build(wiring, spectral_radius=1.5, dtype=torch.float64)
    assert torch.linalg.eigvals(layer.dense_weight()).abs().max() == pytest.approx(1.5, rel=1e-6)
    assert layer.summary()["core_spectral_radius"] == pytest.approx(1.5)


def test_dropout_is_on_the_drive_before_the_relu_and_in_training_only(wiring):
    layer = build(wiring, dropout=0.5, dtype=torch.float64)
    inputs = x(1, dtype=torch.float64)
    assert torch.equal(layer.eval()(inputs), build(wiring, dtype=torch.float64)(inputs))
    torch.manual_seed(1)
    found = layer.train()(inputs)
    torch.manual_seed(1)
    drive = layer._drop(layer.input_proj(inputs))
    plain = build(wiring, dtype=torch.float64)
    plain.input_proj = nn.Identity()
    plain.in_features = 5
    plain.input_proj.weight = layer.input_proj.weight
    assert torch.equal(plain(drive), found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps=1: reach no output neuron; must be 2 or more"),
        ({"steps": 0}, "steps=0"),
        ({"inject": "last"}, "inject='last'"),
        ({"readout": "mean"}, "readout='mean'"),
        ({"backend": "triton"}, "backend='triton'"),
        ({"scale": 0}, "scale=0"),
        ({"spectral_radius": -1.0}, "spectral_radius=-1.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, *value.items())),
)
def test_wrong_options_are_refused(wiring, options, message):
    with pytest.raises(ValueError, match=message):
        build(wiring, **options)


def test_wrong_inputs_and_wirings_are_refused(wiring):
    with pytest.raises(ValueError, match=r"input of shape \(2, 7\)"):
        build(wiring)(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="float64"):
        build(wiring)(torch.zeros(2, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match="connectome of Tensor"):
        BPU(torch.eye(4), 6, 4)
    chain = Connectome.from_dense([[0, 1, 0], [0, 0, 1], [0, 0, 0]], 1, 1)
    with pytest.raises(ValueError, match="that of this wiring is 0"):
        BPU(chain, 6, 4, steps=3, spectral_radius=1.0)


# --- What every layer owes --------------------------------------------------------------------------------------------


def test_it_is_registered_and_shows_what_it_is(wiring):
    layer = archzoo.create_layer("bpu", wiring, 6, 4, steps=3)
    assert isinstance(layer, archzoo.BPU)
    assert archzoo.Connectome is Connectome
    for part in ("6, 4", "steps=3", "5 + 6 + 3", f"edges={wiring.num_edges}"):
        assert part in layer.extra_repr()


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_any_leading_dimensions(wiring, leading, trainable):
    layer = build(wiring, trainable=trainable)
    inputs = x(*leading).requires_grad_()
    y = layer(inputs)
    assert y.shape == (*leading, 4)
    y.sum().backward()
    assert inputs.grad.shape == inputs.shape
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_followed(wiring, dtype):
    layer = build(wiring, dtype=dtype, trainable=True)
    y = layer(x(5, dtype=dtype))
    assert y.dtype == layer.edge_weight.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters())
    truth = build(wiring)(x(5))
    assert rms_error(copy.deepcopy(build(wiring)).to(dtype)(x(5, dtype=dtype)), truth) < 0.05


def test_autocast_compile_and_export_give_the_same(wiring):
    layer = build(wiring).eval()
    y = layer(x(5))
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x(5))
    assert low.dtype == torch.bfloat16
    assert rms_error(low, y) < 0.05
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x(5)), y)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(layer, (x(5),), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x(5)), y)
    torch.testing.assert_close(exported(x(9)), layer(x(9)))


def test_gradients_are_those_of_finite_differences(wiring):
    layer = build(wiring, trainable=True, dtype=torch.float64)
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(inputs, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), inputs)

    inputs = (x(3, dtype=torch.float64).requires_grad_(), *(v.detach().clone().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_two_runs_agree_bit_for_bit_and_copies_are_independent(wiring):
    layer = build(wiring, trainable=True)
    found = []
    for _ in range(2):
        layer.zero_grad()
        layer(x(33)).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    assert_same_bits(*found, "two backward passes")
    other = copy.deepcopy(layer)
    assert other.connectome is layer.connectome
    with torch.no_grad():
        other.edge_weight.zero_()
    assert layer.edge_weight.abs().sum() > 0
