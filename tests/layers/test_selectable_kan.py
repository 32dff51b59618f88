"""SelectableKANLinear and its convolution: what their spec alone says. The rest is tested in test_contract_*.py."""

import copy
import itertools
import pickle
import re
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import archzoo
from archzoo.layers.selectable_kan import SelectableKANConv2d, SelectableKANLinear
from archzoo.registry import get_layer
from archzoo.training.callbacks import GridUpdate
from tests.helpers import assert_same_bits, rms, rms_error, sampled

double = {"dtype": torch.float64}
POOL = ("kan", "fast_kan", "chebyshev_kan")
STAGES = ("full", "selective", "pruned")
FORMS = ["linear", "conv2d"]


def make(form="linear", outputs=7, pool=POOL, **options):
    """A layer of 4 inputs in float64."""
    options = {**double, **options}
    if form == "linear":
        return SelectableKANLinear(4, outputs, pool=pool, **options)
    return SelectableKANConv2d(4, outputs, 3, padding=1, pool=[f"{name}_conv2d" for name in pool], **options)


def inputs(form="linear", rows=5, seed=0, **options):
    shape = (rows, 4) if form == "linear" else (rows, 4, 5, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **{**double, **options})


def at_stage(stage, form="linear", winners=None, seed=0, **options):
    """A layer brought to a stage; by default each output's winner is random."""
    torch.manual_seed(seed)
    layer = make(form, **options)
    with torch.no_grad():
        layer.selection_logits.normal_()
        if winners is not None:
            layer.selection_logits.zero_()
            layer.selection_logits[range(len(winners)), list(winners)] = 1.0
        if layer.bias is not None:
            layer.bias.normal_()
    for name, step in (("selective", layer.select_), ("pruned", layer.prune_)):
        if STAGES.index(stage) >= STAGES.index(name):
            step()
    assert layer.stage == stage
    return layer


def along_outputs(vector, form):
    return vector.view(-1, 1, 1) if form == "conv2d" else vector


# --- The three stages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("granularity", ["node", "layer"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_full_output_is_the_weighted_sum_of_the_candidates(form, granularity, temperature):
    layer, x = at_stage("full", form, granularity=granularity, temperature=temperature), inputs(form)
    weights = torch.softmax(layer.selection_logits / temperature, -1)
    assert weights.shape == ((7, 3) if granularity == "node" else (1, 3))
    assert torch.equal(layer.selection_weights(), weights)
    want = along_outputs(layer.bias, form)
    for p, candidate in enumerate(layer.candidates):
        want = want + along_outputs(weights[:, p], form) * candidate(x)
    assert rms_error(layer(x), want) < 1e-14


def test_state_has_the_names_and_shapes_of_the_spec():
    layer = SelectableKANLinear(4, 7, pool=POOL)
    names = {name: tuple(t.shape) for name, t in layer.state_dict().items() if not name.startswith("candidates.")}
    assert names == {"selection_logits": (7, 3), "bias": (7,), "selected": (7,)}
    assert isinstance(layer.candidates, nn.ModuleList)
    assert [type(c) for c in layer.candidates] == [get_layer(name).cls for name in POOL]
    assert all(c.bias is None for c in layer.candidates)
    assert layer.selected.dtype == torch.int64
    assert torch.equal(layer.selected, torch.full((7,), -1))
    assert not layer.selection_logits.any()
    assert not layer.bias.any()
    assert layer.candidates[1].layernorm is None
    whole = SelectableKANLinear(4, 7, pool=POOL, granularity="layer")
    assert whole.selection_logits.shape == (1, 3)
    assert whole.selected.shape == (1,)


def test_options_reach_their_candidate():
    options = {"kan": {"grid_size": 9}, "fast_kan": {"layernorm": True}}
    layer = SelectableKANLinear(4, 7, pool=POOL, pool_kwargs=options)
    assert layer.candidates[0].grid_size == 9
    assert layer.candidates[1].layernorm is not None
    assert options == {"kan": {"grid_size": 9}, "fast_kan": {"layernorm": True}}
    padded = SelectableKANConv2d(4, 7, 3, pool=("kan_conv2d",), pool_kwargs={"kan_conv2d": {"pad_value": 0.0}})
    assert padded.candidates[0].pad_value == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_selected_is_each_outputs_own_candidate(form):
    layer, x, winners = at_stage("full", form), inputs(form), torch.tensor([2, 0, 0, 1, 2, 0, 2])
    with torch.no_grad():
        layer.selection_logits.copy_(nn.functional.one_hot(winners, 3) * 0.01)
    axis = 1
    outputs = torch.stack([c(x) for c in layer.candidates])
    assert layer.select_() is None
    assert torch.equal(layer.selected, winners)
    assert torch.equal(layer.selection_weights(), nn.functional.one_hot(winners, 3).double())
    assert not layer.selection_logits.requires_grad
    want = torch.stack([outputs[w].select(axis, o) for o, w in enumerate(winners)], axis)
    assert rms_error(layer(x), want + along_outputs(layer.bias, form)) < 1e-15


def test_the_first_of_equal_logits_wins():
    layer = make()
    layer.select_()
    assert torch.equal(layer.selected, torch.zeros(7, dtype=torch.int64))


def test_layer_granularity_selects_one_candidate_for_all_outputs():
    layer, x = at_stage("full", winners=[2], granularity="layer"), inputs()
    want = layer.candidates[2](x) + layer.bias
    layer.select_()
    assert torch.equal(layer.selected, torch.tensor([2]))
    assert torch.equal(layer.selection_weights(), torch.tensor([[0.0, 0.0, 1.0]], **double))
    assert torch.equal(layer(x), want)
    layer.prune_()
    assert torch.equal(layer(x), want)
    assert [type(c).__name__ for c in layer.candidates] == ["ChebyshevKANLinear"]


@pytest.mark.parametrize("form", FORMS)
def test_losers_get_no_gradient_and_cannot_spoil_the_output(form):
    layer, x = at_stage("selective", form, winners=[0, 2, 2, 0, 0, 2, 2]), inputs(form).requires_grad_()
    layer(x).square().sum().backward()
    for name, parameter in layer.candidates[1].named_parameters():
        assert parameter.grad is None, name
    for index in (0, 2):
        for name, parameter in layer.candidates[index].named_parameters():
            won = layer.selected == index
            assert rms(parameter.grad[won]) > 0, name
            assert not parameter.grad[~won].any(), name
    assert layer.selection_logits.grad is None
    y = layer(x)
    with torch.no_grad():
        for parameter in layer.candidates[1].parameters():
            parameter.fill_(torch.nan)
        layer.candidates[2].weight[layer.selected != 2] = torch.nan
    assert torch.equal(layer(x), y)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    winners=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    form=st.sampled_from(FORMS),
    bias=st.booleans(),
)
def test_pruning_keeps_the_output_and_only_the_winning_rows(winners, form, bias):
    layer, x = at_stage("selective", form, winners, outputs=len(winners), bias=bias), inputs(form, rows=2)
    before, whole = layer(x), copy.deepcopy(layer)
    layer.prune_()
    assert layer.stage == "pruned"
    assert rms_error(layer(x), before) < 1e-14
    assert torch.equal(layer.selected, torch.tensor(winners))
    assert torch.equal(layer.selection_weights(), nn.functional.one_hot(torch.tensor(winners), 3).double())
    assert len(layer.candidates) == len(set(winners))
    for index, kept in zip(sorted(set(winners)), layer.candidates, strict=True):
        rows = [row for row, winner in enumerate(winners) if winner == index]
        for name, parameter in kept.named_parameters():
            assert torch.equal(parameter, whole.candidates[index].get_parameter(name)[rows])
            assert parameter.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_that_can_be_pruned_can_be_in_a_pool(form):
    possible = [n for n in archzoo.list_layers(form) if hasattr(get_layer(n).cls, "keep_outputs_")]
    assert len(possible) >= 3
    for name in possible:
        winners = [0, 1, 0, 0, 1, 1, 0]
        other = possible[0] if name != possible[0] else possible[1]
        layer = at_stage("selective", form, winners, pool=[n.removesuffix("_conv2d") for n in (other, name)])
        x = inputs(form)
        y, state = layer(x), copy.deepcopy(layer.state_dict())
        layer.prune_()
        assert rms_error(layer(x), y) < 1e-13, name
        pruned = copy.deepcopy(layer.state_dict())
        for saved, stage in ((pruned, "pruned"), (state, "selective"), (pruned, "pruned")):
            layer.load_state_dict(saved)
            assert layer.stage == stage
            assert rms_error(layer(x), y) < 1e-13, name


def test_stages_come_in_their_order_and_once():
    layer = make()
    with pytest.raises(ValueError, match=re.escape("stage='full': prune_() follows select_()")):
        layer.prune_()
    layer.select_()
    with pytest.raises(ValueError, match=re.escape("stage='selective': select_() was called before")):
        layer.select_()
    layer.prune_()
    for again in (layer.select_, layer.prune_):
        with pytest.raises(ValueError, match="stage='pruned'"):
            again()


def test_logits_that_are_no_numbers_are_not_selected_from():
    layer = make()
    with torch.no_grad():
        layer.selection_logits[1, 2] = torch.nan
    with pytest.raises(ValueError, match="selection_logits: 1 of 21 are not finite"):
        layer.select_()
    assert layer.stage == "full"
    assert layer.selection_logits.requires_grad
    with pytest.raises(ValueError, match="selection_logits: 21 of 21"):
        make(device="meta").select_()


@pytest.mark.parametrize("form", FORMS)
def test_training_through_all_stages_lowers_the_loss(form):
    torch.manual_seed(0)
    layer, x = make(form, dtype=torch.float32), inputs(form, rows=32, dtype=torch.float32)
    target, losses = torch.sin(2 * x.sum(1, keepdim=True)), []
    for step in (None, layer.select_, layer.prune_):
        if step:
            step()
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(30):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[29] < 0.9 * losses[0]
    assert losses[89] < 0.9 * losses[30]
    assert losses[60] < 1.5 * losses[59], "pruning changed the function"


# --- State ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("granularity", ["node", "layer"])
def test_a_state_dict_of_any_stage_loads_into_a_layer_of_any_stage(form, granularity):
    x = inputs(form)
    saved = {s: nn.ModuleDict({"a": at_stage(s, form, seed=1, granularity=granularity)}) for s in STAGES}
    for there, here in itertools.product(STAGES, STAGES):
        other = nn.ModuleDict({"a": at_stage(here, form, seed=2, granularity=granularity)})
        before = torch.get_rng_state()
        other.load_state_dict(saved[there].state_dict(), strict=True)
        assert torch.equal(torch.get_rng_state(), before), "loading drew random numbers"
        layer, like = other["a"], saved[there]["a"]
        assert layer.stage == there
        assert torch.equal(layer(x), like(x)), (there, here)
        assert_same_bits(other.state_dict(), saved[there].state_dict(), f"{there} into {here}")
        assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
            n: p.requires_grad for n, p in like.named_parameters()
        }
        if there == "full":
            layer.select_()
        if there != "pruned":
            layer.prune_()
        assert rms_error(layer(x), saved["pruned"]["a"](x)) < 1e-14, "the next stages"


def test_a_candidate_each_of_which_won_is_told_from_the_whole_one():
    for winners in itertools.product(range(3), repeat=3):
        pruned = at_stage("pruned", winners=winners, outputs=3)
        for stage in ("selective", "pruned"):
            layer = make(outputs=3)
            layer.load_state_dict(at_stage(stage, winners=winners, outputs=3).state_dict())
            assert layer.stage == stage
            assert rms_error(layer(inputs()), pruned(inputs())) < 1e-14


def test_parameters_stay_the_same_objects_where_the_structure_does():
    for here, there in (("full", "full"), ("full", "selective"), ("selective", "full"), ("pruned", "pruned")):
        layer = at_stage(here, winners=[0, 1, 1, 2, 2, 2, 0])
        mine = dict(layer.named_parameters())
        layer.load_state_dict(at_stage(there, winners=[1, 1, 2, 2, 0, 2, 0], seed=1).state_dict())
        assert all(p is mine[n] for n, p in layer.named_parameters())
    layer = at_stage("full")
    layer.load_state_dict(at_stage("pruned").state_dict())
    mine = dict(layer.named_parameters())
    assert mine["bias"] is layer.bias


def test_frozen_weights_stay_frozen_when_a_state_of_the_same_stage_is_loaded():
    layer = at_stage("full").requires_grad_(False)
    layer.load_state_dict(at_stage("full", seed=1).state_dict())
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_a_saved_stage_fills_a_layer_on_meta(stage):
    saved = at_stage(stage)
    layer = make(device="meta")
    layer.load_state_dict(saved.state_dict(), assign=True)
    assert layer.stage == stage
    assert torch.equal(layer(inputs()), saved(inputs()))


def test_refined_grids_survive_the_stages_and_a_round_trip():
    layer, other, x = at_stage("full"), at_stage("full", seed=2), inputs()
    for refined in (layer, other):
        refined.candidates[0].refine(10)
    layer.select_()
    layer.prune_()
    other.load_state_dict(layer.state_dict())
    assert other.stage == "pruned"
    assert torch.equal(other(x), layer(x))


def test_a_state_dict_without_the_layer_changes_nothing():
    layer = at_stage("pruned")
    y = layer(inputs())
    outcome = layer.load_state_dict({}, strict=False)
    assert "selected" in outcome.missing_keys
    assert torch.equal(layer(inputs()), y)


@pytest.mark.parametrize("selected", [[0, 1, -1, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0, 0]])
def test_a_selection_that_cannot_be_is_refused_and_leaves_the_structure(selected):
    layer = at_stage("selective")
    state = {**layer.state_dict(), "selected": torch.tensor(selected)}
    with pytest.raises(RuntimeError, match=re.escape(f"selected={selected}: must be -1 everywhere")):
        layer.load_state_dict(state)
    assert layer.stage == "selective"
    with pytest.raises(RuntimeError, match="size mismatch for selected"):
        layer.load_state_dict({**state, "selected": torch.zeros(2, dtype=torch.int64)})


def test_a_pool_of_one_goes_through_the_stages():
    layer = at_stage("pruned", pool=("kan",))
    other = make(pool=("kan",))
    other.load_state_dict(layer.state_dict())
    assert other.stage == "selective", "pruning dropped nothing: the two look the same"
    assert torch.equal(other(inputs()), layer(inputs()))


@pytest.mark.parametrize("stage", STAGES)
def test_reset_returns_to_the_first_stage(stage):
    layer = at_stage(stage)
    torch.manual_seed(3)
    fresh = make()
    torch.manual_seed(3)
    layer.reset_parameters()
    assert layer.stage == "full"
    assert_same_bits(dict(layer.state_dict()), dict(fresh.state_dict()), f"reset from {stage}")
    assert torch.equal(layer(inputs()), fresh(inputs()))
    assert all(p.requires_grad for p in layer.parameters())
    layer.select_()
    layer.prune_()


@pytest.mark.parametrize("stage", STAGES)
def test_copies_keep_the_stage(stage):
    layer, x = at_stage(stage), inputs()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).float().double()):
        assert twin.stage == stage
        assert rms_error(twin(x), layer(x)) < 1e-6
        if stage != "pruned":
            (twin.select_ if stage == "full" else twin.prune_)()
    assert layer.stage == stage


def test_a_layer_that_is_not_trained_stays_so():
    layer = at_stage("pruned").eval()
    layer.load_state_dict(at_stage("full").state_dict())
    assert not any(module.training for module in layer.modules())


# --- Tools of torch, in the later stages ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", sampled(FORMS, ["linear"]))
def test_a_compiled_layer_follows_the_stages(form):
    torch._dynamo.reset()
    layer, x = at_stage("full", form), inputs(form)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in (lambda: None, layer.select_, layer.prune_):
        step()
        assert rms_error(compiled(x), layer(x)) < 1e-14


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", STAGES[1:])
def test_an_exported_layer_equals_eager(form, stage):
    layer = at_stage(stage, form).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (inputs(form),), dynamic_shapes=({0: batch},)).module()
    assert rms_error(program(inputs(form, rows=9)), layer(inputs(form, rows=9))) < 1e-14


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", FORMS)
def test_dtypes_in_every_stage(form, stage):
    exact = at_stage(stage, form)
    want, x = exact(inputs(form)), inputs(form)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        y = copy.deepcopy(exact).to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        assert rms_error(y, want) < bound
    with torch.autocast("cpu", torch.bfloat16):
        y = exact.float()(x.float())
    assert y.dtype == torch.bfloat16
    assert rms_error(y, want) < 3e-2


@pytest.mark.parametrize("stage", STAGES[1:])
def test_gradients_pass_gradcheck_in_the_later_stages(stage):
    layer = at_stage(stage, outputs=4)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(trained, values, strict=True)), (x,))

    values = (inputs(rows=2), *(p.detach() for p in trained.values()))
    assert torch.autograd.gradcheck(call, tuple(v.clone().requires_grad_() for v in values))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_distributed_training_finds_every_parameter_used(stage):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer, x = at_stage(stage, winners=[0, 2, 2, 0, 0, 2, 2]), inputs()
        wrapped = DistributedDataParallel(copy.deepcopy(layer))
        layer(x).sum().backward()
        for _ in range(2):  # the second pass raises if a parameter got no gradient in the first
            wrapped.zero_grad()
            wrapped(x).sum().backward()
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                assert rms_error(wrapped.module.get_parameter(name).grad, parameter.grad) < 1e-14
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("stage", STAGES)
def test_the_grid_callback_moves_the_grids_of_candidates(stage):
    model = nn.Sequential(at_stage(stage, winners=[0, 2, 2, 0, 0, 2, 2], outputs=7))
    forgotten: list[nn.Parameter] = []
    trainer = Mock(model=model, inputs=3 * inputs(rows=50), step=10, reset_optimizer_state=forgotten.extend)
    trainer.spent.return_value = 0.1
    before = model[0].candidates[0].grid.clone()
    GridUpdate(every=10, until=0.5).after_step(trainer)
    assert model[0].candidates[0].grid.max() > before.max() + 1
    assert any(p is model[0].candidates[0].spline_weight for p in forgotten)


# --- Arguments --------------------------------------------------------------------------------------------------------


def test_images_without_a_batch():
    for stage in STAGES:
        layer, x = at_stage(stage, "conv2d"), inputs("conv2d", rows=1)
        assert rms_error(layer(x[0]), layer(x)[0]) < 1e-14


def test_groups_with_one_choice_for_all():
    layer, x = at_stage("full", "conv2d", outputs=6, groups=2, granularity="layer", winners=[1]), inputs("conv2d")
    layer.select_()
    y = layer(x)
    layer.prune_()
    assert torch.equal(layer(x), y)
    assert layer.candidates[0].groups == 2


def test_sizes_stage_and_winners_are_shown():
    text = repr(at_stage("pruned", winners=[0, 2, 2, 0, 0, 2, 2]))
    assert "4, 7, bias=True, granularity='node', temperature=1, stage='pruned', kan=3, chebyshev_kan=4" in text
    assert "stage='selective', kan_conv2d=7" in repr(at_stage("selective", "conv2d", [0], granularity="layer"))
    assert "stage='full'" in repr(make("conv2d"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": ("kna",)}, "layer 'kna' is not registered; did you mean 'kan'?"),
        ({"pool": (3,)}, "layer 3 is not registered"),
        ({"pool": ()}, "pool=(): must be a list of one or more"),
        ({"pool": "kan"}, "pool='kan': must be a list"),
        ({"pool": ("kan", "kan_conv2d")}, "layer 'kan_conv2d' is of kind 'conv2d', and the pool is made of"),
        ({"pool": ("kan", "linear")}, "layer 'linear' has no method keep_outputs_"),
        ({"pool": ("selectable_kan",)}, "layer 'selectable_kan' has no method keep_outputs_"),
        ({"pool": ("kan", "fast_kan", "kan")}, "each name may occur once"),
        ({"pool_kwargs": {"kna": {}}}, "'kna' is not in the pool; did you mean 'kan'?"),
        ({"pool_kwargs": {"kan": {"gridsize": 3}}}, "layer 'kan' has no option 'gridsize'; did you mean 'grid_size'"),
        ({"pool_kwargs": {"kan": {"bias": True}}}, "layer 'kan' has no option 'bias'"),
        ({"pool_kwargs": {"kan": 3}}, "pool_kwargs={'kan': 3}: must be None or options by name"),
        ({"pool_kwargs": ["kan"]}, "pool_kwargs=['kan']: must be None or options by name"),
        ({"pool_kwargs": {"kan": {"grid_size": 0}}}, "grid_size=0: must be"),
        ({"granularity": "edge"}, "granularity='edge': must be 'node'"),
        ({"temperature": "hot"}, "temperature='hot': must be positive"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0: must be positive"),
        ({"temperature": float("inf")}, "temperature=inf: must be positive"),
        ({"in_features": 0}, "in_features=0: must be a whole number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SelectableKANLinear(**{"in_features": 2, "out_features": 3, "pool": POOL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": ("kan",)}, "layer 'kan' is of kind 'linear'"),
        ({"groups": 2}, "groups=2: channels that choose for themselves"),
        ({"groups": 3}, "groups=3: must divide"),
        ({"kernel_size": 0}, "kernel_size=0: must be"),
        ({"padding": "sane"}, "padding='sane': must be"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_convolution_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SelectableKANConv2d(
            **{"in_channels": 4, "out_channels": 6, "kernel_size": 3, "pool": ["kan_conv2d"], **options}
        )
