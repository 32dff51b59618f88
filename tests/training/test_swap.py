"""Other libraries' models in the trainer, with layers swapped in: `model=timm swap="{blocks.*.mlp.fc*: kan}"`."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from archzoo.layers.fast_kan import FastKANLinear
from archzoo.layers.kan import KANLinear
from archzoo.training import cli, composing
from archzoo.training.build import build_model, build_task
from archzoo.training.config import ConfigError, contestant, from_plain, run_id, validate
from archzoo.training.run import load_model
from tests.training.support import make_config

FAST = ["trainer.steps=2", "trainer.epochs=null", "trainer.batch_size=8", "trainer.limit_batches=1", "tracker=none"]
FAST += ["trainer.eval_batch_size=32"]
VIT = ["model=timm", "model.name=test_vit"]
MLPS = "blocks.*.mlp.fc?"
needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="pip install 'archzoo[transformers]'"
)


@pytest.fixture
def no_bare_kernels(monkeypatch):
    """transformers looks for the package `kernels` of the Hub, and would find our folder where tests are run from."""
    monkeypatch.setitem(sys.modules, "kernels", None)


def train(*arguments, expect=0):
    assert cli.main(list(arguments)) == expect


def records(folder):
    return {r["name"]: r for r in (json.loads(p.read_text()) for p in Path(folder).glob("*/run.json"))}


def config(swap=None, **changes):
    model = {"library": "timm", "name": "test_vit", **changes.pop("model", {})}
    return make_config(model=model, swap=swap, budget={"match": "none", **changes.pop("budget", {})}, **changes)


def built(swap=None, **changes):
    made = config(swap, **changes)
    validate(made)
    return build_model(made, build_task(made))


# ---- what is trained


def test_the_command_of_the_readme_trains_a_swapped_model_and_gives_it_back(tmp_path):
    train(*VIT, f"swap={{{MLPS}: kan}}", f"output_dir={tmp_path}", *FAST)
    (record,) = records(tmp_path).values()
    assert (record["name"], record["layer"], record["model"]) == ("kan-seed0", "kan", "test_vit")
    assert record["status"] == "done"
    assert record["config"]["swap"] == {MLPS: "kan"}
    assert abs(record["budget"]["deviation"]) <= 0.01
    assert record["budget"]["reached"] == record["parameters"]
    (folder,) = (path.parent for path in tmp_path.glob("*/run.json"))
    assert folder.name == record["run_id"] == run_id(record["config"])
    assert "blocks.0.mlp.fc1" in (folder / "log.txt").read_text(), "the log has the table of what was swapped"
    model = load_model(folder)
    assert {type(block.mlp.fc2) for block in model.body.blocks} == {KANLinear}
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
def test_a_comparison_has_the_untouched_model_for_its_baseline(tmp_path):
    train(*VIT, f"swap={{{MLPS}: layer}}", "layer=linear,fast_kan", f"output_dir={tmp_path}", *FAST)
    found = records(tmp_path)
    assert sorted(found) == ["fast_kan-seed0", "linear-seed0"]
    usual = timm.create_model("test_vit", in_chans=1, num_classes=10, img_size=32)
    assert found["linear-seed0"]["parameters"] == sum(p.numel() for p in usual.parameters())
    assert found["linear-seed0"]["budget"]["deviation"] == 0
    assert "fast_kan" in (tmp_path / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors")}
    train(*VIT, f"swap={{{MLPS}: layer}}", "layer=linear,fast_kan", f"output_dir={tmp_path}", *FAST)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a run that is done is not trained again"


def test_a_sweep_over_swaps_is_a_comparison_too():
    plan = composing.make_plan([*VIT, f"swap=null,{{{MLPS}: kan}},{{{MLPS}: {{name: aptx}}, head: phm}}"])
    assert [contestant(made) for made in plan.configs] == ["linear", "kan", "aptx+phm"]
    assert len({run_id(composing.asdict_plain(made)) for made in plan.configs}) == 3


def test_a_run_is_resumed_with_the_same_bits(tmp_path):
    from archzoo.training.run import execute

    def run(folder, stops):
        calls = iter(range(100))
        made = config({MLPS: "phm"}, trainer={"steps": 4, "eval_every": 2})
        made.output_dir = str(folder)
        return execute(made, should_stop=lambda: stops and next(calls) >= 2)

    assert run(tmp_path / "cut", True)["status"] == "interrupted"
    assert run(tmp_path / "cut", False)["status"] == run(tmp_path / "whole", False)["status"] == "done"
    one, two = (next(path.glob("*/model.safetensors")).read_bytes() for path in (tmp_path / "cut", tmp_path / "whole"))
    assert one == two


def test_without_a_swap_runs_keep_their_ids():
    made = make_config()
    assert not composing.asdict_plain(made).keys() & {"swap", "swap_init"}
    swapped = config({MLPS: "kan"}, swap_init="from_original")
    assert from_plain(composing.asdict_plain(swapped)) == swapped


# ---- what is built


def test_rules_lead_to_layers_the_contestant_or_nothing():
    swap = {"blocks.0.*fc?": {"name": "fast_kan", "grid_size": 4}, "blocks.1.*fc1": None, "blocks.*.mlp.fc?": "layer"}
    model, _ = built(swap, layer={"name": "kan", "bias": True, "grid_size": 3, "grid_range": [-1.0, 1.0]})
    blocks = model.body.blocks
    assert (type(blocks[0].mlp.fc2), blocks[0].mlp.fc2.grid_size) == (FastKANLinear, 4)
    assert [type(blocks[1].mlp.fc1), type(blocks[1].mlp.fc2)] == [nn.Linear, KANLinear]
    assert blocks[1].mlp.fc2.grid_size == 3


def test_swapped_layers_can_start_from_the_originals(tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model("test_vit", in_chans=1, num_classes=10, img_size=32)
    file = tmp_path / "trained.safetensors"
    save_file(trained.state_dict(), file)
    model, _ = built({MLPS: "paon"}, swap_init="from_original", model={"checkpoint": str(file)})
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(model.eval()(x), trained.eval()(x))


@pytest.mark.parametrize("match", ["params", "flops"])
def test_the_model_keeps_its_count(match):
    _, found = built({MLPS: "kan"}, budget={"match": match})
    assert abs(found.deviation) <= 0.01
    assert found.count != found.target


def test_images_are_enlarged_to_what_the_model_takes():
    model, _ = built()
    assert model.size == (32, 32)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert built(model={"image_size": 64, "options": {"drop_path_rate": 0.1}})[0].size == (64, 64)
    assert built(model={"name": "test_resnet"})[0](torch.zeros(2, 1, 8, 8)).shape == (2, 10)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"swap={{{MLPS}: kna}}"], "layer 'kna' is not registered; did you mean 'kan'"),
        (["swap={blocks.*.mlp.fx?: kan}"], "'blocks.*.mlp.fx?' matches no module of the model"),
        ([f"swap={{{MLPS}: {{name: kan, grid: 3}}}}"], "swap={'blocks.*.mlp.fc?': {'name': 'kan', 'grid': 3}}: "),
        ([f"swap={{{MLPS}: 3}}"], f"swap.{MLPS}=3: must be a layer's name"),
        (["swap=kan"], "swap=kan: must be globs over names of modules and layers"),
        (["layer=kan"], "layer=kan: model test_vit has no place for it; say where"),
        ([f"swap={{{MLPS}: layer}}", "layer=kan", "layer.bias=false"], "bias=False: this is taken from the original"),
        (["swap_init=fersh"], "swap_init=fersh: must be one of fresh, from_original"),
        (["budget.to=1000"], "budget.to=1000: model test_vit is matched to itself"),
        (["budget.unreachable=nearest"], "budget.unreachable=nearest: model test_vit is matched to itself"),
        (["model.name=test_vitt"], "model.name='test_vitt': timm has no such model; did you mean 'test_vit"),
        (["model.image_size=8"], "model.image_size=8: test_vit does not run on images of 8 x 8 pixels"),
        (["model.options={depht: 3}"], "does not run on images of 32 x 32 pixels with options={'depht': 3}"),
        (["model.checkpoint=nowhere.pt"], "model.checkpoint='nowhere.pt': there is no such file"),
        (["task=char_lm"], "model=timm: takes real numbers"),
        (["task=arithmetic", "task.seeds=2"], "task.seeds=2: model test_vit is trained with one seed at a time"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_named(arguments, words, capsys):
    train(*VIT, *arguments, expect=2)
    assert words in capsys.readouterr().err


def test_models_of_ours_are_made_of_the_contestant(capsys):
    train(f"swap={{{MLPS}: kan}}", expect=2)
    assert "model mlp is made of the contestant itself, layer=linear; leave it out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="swap_init=from_original: model mlp .* nothing is swapped"):
        validate(make_config(swap_init="from_original"))


# ---- transformers

TEXT = SimpleNamespace(input_shape=(8,), output_size=11)
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}


def test_without_transformers_it_is_told_how_to_get_it(monkeypatch):
    from archzoo.models.from_transformers import from_transformers
    from archzoo.models.model import LayerFactory

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"library='transformers': is not installed .*pip install 'archzoo\[transf"):
        from_transformers(LayerFactory("linear"), (8,), 11, name="gpt2")


@needs_transformers
@pytest.mark.usefixtures("no_bare_kernels")
def test_a_transformers_model_is_trained_with_a_swap(tmp_path):
    tiny = "{" + ", ".join(f"{key}: {value}" for key, value in TINY.items()) + "}"
    settings = ["task=char_lm", "task.context=16", "model=transformers", "model.name=llama", f"model.config={tiny}"]
    train(*settings, "swap={*.mlp.*_proj: kan}", f"output_dir={tmp_path}", *FAST)
    (record,) = records(tmp_path).values()
    assert (record["status"], record["layer"], record["model"]) == ("done", "kan", "llama")
    assert abs(record["budget"]["deviation"]) <= 0.01


@needs_transformers
@pytest.mark.usefixtures("no_bare_kernels")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gpt3"}, "name='gpt3': transformers has no such causal model; did you mean .*'gpt2'"),
        ({"name": "llama", "config": {**TINY, "num_attention_heads": 5}}, "llama refuses it"),
        ({"name": "gpt2", "config": {**TINY, "max_position_embeddings": 4}}, "has 4 positions, and a text of the task"),
        ({"name": "bert", "config": {**TINY, "is_decoder": False}}, "name='bert': sees later tokens"),
    ],
    ids=str,
)
def test_a_wrong_transformers_model_is_named(options, message):
    from archzoo.models.from_transformers import from_transformers
    from archzoo.models.model import LayerFactory

    with pytest.raises(ValueError, match=message):
        from_transformers(LayerFactory("linear"), TEXT.input_shape, TEXT.output_size, **options)
