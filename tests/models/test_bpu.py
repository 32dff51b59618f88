"""The trainer's model `bpu`: a connectome, its null models and the equal perceptron; and its picture."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from archzoo.budget import count_parameters
from archzoo.layers.bpu import BPU, Connectome
from archzoo.models.bpu import FrozenMiddleMLP, bpu, find_connectome
from archzoo.models.bpu_plot import plot_wiring
from archzoo.models.model import LayerFactory
from archzoo.training import cli

LARVA = Path(os.environ.get("ARCHZOO_DATA", ""), "larva_connectome.npz")
GENERATED = {"connectome": "generated"}


def build(layer="bpu", seed=0, shape=(1, 28, 28), layer_options=None, **options):
    torch.manual_seed(seed)
    return bpu(LayerFactory(layer, layer_options), shape, 10, **GENERATED | options)


def test_contestants_have_equal_parameters_and_their_middles_never_learn():
    nets = [build(), build("linear"), build(layer_options={"wiring": "degree"})]
    assert {count_parameters(net) for net in nets} == {339_740}
    assert [type(net.core) for net in nets] == [BPU, FrozenMiddleMLP, BPU]
    for net in nets:
        frozen = {name: buffer.clone() for name, buffer in net.named_buffers()}
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
        net(torch.rand(8, 1, 28, 28)).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(frozen[name], buffer) for name, buffer in net.named_buffers())


def test_perceptron_is_two_learned_maps_around_a_random_one():
    net = build("linear", dropout=0.0)
    x = torch.rand(3, 1, 28, 28)
    core = net.core
    assert core.middle.std() * 430**0.5 == pytest.approx(1, rel=0.02)
    expected = core.output_proj(torch.relu(torch.relu(core.input_proj(x.flatten(1))) @ core.middle))
    torch.testing.assert_close(net(x), expected)
    assert type(build("kan", layer_options={"grid_size": 3}).core.input_proj).__name__ == "KANLinear"


def test_null_models_follow_the_runs_seed_or_their_own():
    of = lambda seed, **options: build(seed=seed, layer_options={"wiring": "degree", **options}).core.connectome  # noqa: E731
    assert torch.equal(of(0).pre, of(0).pre)
    assert not torch.equal(of(0).pre, of(1).pre)
    assert torch.equal(of(0, wiring_seed=5).pre, of(1, wiring_seed=5).pre)
    radii = {build(layer_options={"wiring": w, "spectral_radius": 1.9}).summarize()["wiring_core_spectral_radius"]
             for w in ("measured", "weights", "signs", "degree", "erdos_renyi")}  # fmt: skip
    assert max(radii) == pytest.approx(min(radii)) == pytest.approx(1.9)


def test_growth_is_the_width():
    net = build(width=2)
    assert net.core.connectome.pool_sizes == (860, 4608, 436)
    assert count_parameters(build("linear", width=2)) == count_parameters(net)
    assert build(widths=(2,)).core.connectome.num_neurons == 5904


def test_records_say_where_the_wiring_is_from():
    assert "not measured" in build().summarize()["wiring"]
    assert "null model signs" in build(layer_options={"wiring": "signs"}).summarize()["wiring"]
    assert "no wiring" in build("linear").summarize()["wiring"]


def test_flips_are_of_training_images_only():
    net = build(shape=(1, 2, 2), flip=True, dropout=0.0)
    net.core = nn.Identity()
    x = torch.arange(4.0).view(1, 1, 2, 2).expand(64, 1, 2, 2)
    assert torch.equal(net.eval()(x), x.flatten(1))
    rows = {tuple(row) for row in net.train()(x).tolist()}
    assert rows == {(0, 1, 2, 3), (1, 0, 3, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "conv2d"}, "layer='conv2d'"),
        ({"width": 0}, "width=0"),
        ({"width": 720720}, "width=720720"),
        ({"depth": 2}, "depth=2: must be 1"),
        ({"connectome": "larvae"}, "did you mean 'larva'"),
        ({"connectome": "/nowhere/x.npz"}, "is not there; set ARCHZOO_DATA"),
        ({"signs": "none"}, "signs='none': has no use with connectome='generated'"),
        ({"modality": "visual"}, "modality='visual': has no use"),
        ({"preserve": "size", "width": 2}, "preserve='size'"),
        ({"layer_options": {"wiring": "real"}}, "wiring='real'"),
        ({"layer_options": {"wiring_seed": 1}}, "wiring_seed=1: has no use"),
        ({"layer_options": {"wiring": "signs", "wiring_seed": -1}}, "wiring_seed=-1"),
        ({"layer_options": {"steps": 1}}, "steps=1: reach no output neuron"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, next(iter(value.items())))).replace("/", "."),
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.skipif(not LARVA.is_file(), reason="needs larva_connectome.npz in ARCHZOO_DATA")
def test_the_larva_is_found_in_the_data_folder_or_by_its_path():
    wiring = find_connectome("larva", data_dir=LARVA.parent)
    assert wiring.spectral_radius() == pytest.approx(47.3318, rel=1e-5)
    assert find_connectome(str(LARVA)).source == wiring.source
    assert (find_connectome(str(LARVA), signs="none").weight > 0).all()
    assert find_connectome("larva", modality=("visual",), data_dir=LARVA.parent).pool_sizes[0] == 29
    assert find_connectome("celegans", data_dir=LARVA.parent).num_neurons == 299


def test_an_absent_larva_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ARCHZOO_DATA", str(tmp_path))
    (tmp_path / "larva_connectome.npz").write_bytes(b"PK\x03\x04 no more")
    (tmp_path / "larva_signs.npz").write_bytes(b"")
    run = [
        "model=bpu",
        "layer=bpu",
        "budget.match=none",
        "task=digits",
        f"output_dir={tmp_path / 'out'}",
        "tracker=none",
    ]
    for message in ("is cut short, corrupted or no npz file", "is not there"):
        assert cli.main(run) != 0
        text = "".join(capsys.readouterr())
        assert message in text
        assert "Traceback" not in text
        assert not list(tmp_path.glob("out/*/*.safetensors"))
        (tmp_path / "larva_connectome.npz").unlink(missing_ok=True)


def test_the_picture_shows_matrix_blocks_and_steps():
    net = build(layer_options={"steps": 4})
    figure = net.pictures(None)["wiring"].image
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["2,952 neurons, 63,545 edges", "Edges from (rows) to (columns)", "Neurons that can matter"]
    assert "55,574" in "".join(text.get_text() for text in figure.axes[1].texts)
    assert [round(bar.get_height()) for bar in figure.axes[2].patches] == list(net.core.step_sizes)
    assert build("linear").pictures(None) == {}
    alone = plot_wiring(Connectome.from_dense([[0, 1], [0, 0]], 1, 1))
    assert len(alone.axes) == 2
    alone.canvas.draw()
