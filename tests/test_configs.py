"""Every config composes and trains a step."""

import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from archzoo.registry import get_layer, layer_options, list_layers
from archzoo.training import cli
from tests.helpers import REPOSITORY, sampled

CONFIGS = REPOSITORY / "configs"
DATA = os.environ.get("ARCHZOO_DATA")
STEP = [
    "trainer.steps=1",
    "trainer.epochs=null",
    "trainer.seconds=null",
    "tracker=none",
    "trainer.limit_batches=1",
    "trainer.eval_batch_size=8",  # which all scores can do with
]
NEEDS_DATA = {"mnist", "mnist_arithmetic", "multi_mnist", "fashion_mnist", "cifar10", "text", "chess_bpu"}
# What a model or a task must be run with, where the default layer, model or budget do not go with it.
OF_KIND = {
    "linear": [],
    "conv2d": ["model=cnn", "model.stem=8", "budget.to=conv2d"],
    "mixer": ["model=transformer", "task=text", "budget.match=none"],
}
CAPSULES = ["task=mnist", "task.loss=margin", "task.standardize=false", "budget.match=none", "model.decoder=null"]
CAPSULES += ["model.width=8", "model.capsule_types=2"]
FEW_PUZZLES = ["task.puzzles=8", "task.search_depth=1"]
TINY_GPT2 = "{n_embd: 16, n_layer: 1, n_head: 2, tie_word_embeddings: false}"
FITTING = {
    "layer=bpu": ["model=bpu", "model.connectome=generated", "budget.match=none"],
    "model=bpu": ["layer=bpu", "model.connectome=generated", "budget.match=none"],
    "model=chess_bpu": [
        "task=chess_moves",
        *FEW_PUZZLES,
        "layer=bpu",
        "model.connectome=generated",
        "budget.match=none",
    ],
    "layer=capsules": ["model=capsnet", *CAPSULES],
    "layer=self_attention_routing": ["model=capsnet", *CAPSULES],
    "model=capsnet": ["layer=capsules", *CAPSULES],
    "model=autoencoder": ["task=autoencoding", "task.dataset=digits"],
    "model=linear_flow": ["task=flow_matching"],
    "model=timm": ["model.name=test_vit", "swap={blocks.*.mlp.fc?: kan}"],
    "model=transformers": ["task=char_lm", "model.config=" + TINY_GPT2, "budget.match=none", "swap={lm_head: kan}"],
    "model=projector": ["task=idempotent", "layer=conv2d", "budget.to=conv2d"],
    "model=stylizer": ["task=style_transfer", "layer=conv2d", "budget.to=conv2d"],
    "model=transformer": ["task=text"],
    "model=decoder": ["task=text", "model.width=64"],
    "model=mamba_lm": ["task=text", "layer=mamba", "budget.match=none", "model.width=64", "model.depth=1"],
    "model=sequence_arithmetic": ["task=mnist_arithmetic", "budget.match=none", "task.test_lengths=[10]"],
    "task=mnist_arithmetic": ["model=sequence_arithmetic", "budget.match=none", "task.test_lengths=[10]"],
    "model=cnn": ["layer=conv2d", "budget.to=conv2d"],
    "model=kan": ["layer=kan", "budget.match=none"],
    "model=padenet": ["task=super_resolution", "layer=conv2d", "budget.to=conv2d"],
    "task=autoencoding": ["model=autoencoder", "task.dataset=digits"],
    "task=chess_moves": FEW_PUZZLES,
    "task=idempotent": ["model=projector", "layer=conv2d", "budget.to=conv2d"],
    "task=style_transfer": ["model=stylizer", "layer=conv2d", "budget.to=conv2d"],
    "task=poisson": ["layer=kan", "budget.match=none"],
    "task=text": ["model=transformer"],
    "task=selective_copying": ["model=decoder", "model.width=64"],
    "task=induction_heads": ["model=decoder", "model.width=64"],
    "task=associative_recall": ["model=decoder", "model.width=64"],
    "task=char_lm": ["model=transformer"],
    "task=super_resolution": ["model=padenet", "layer=conv2d", "budget.to=conv2d"],
}


def options(group):
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def skip_without_data(words):
    if "chess_moves" in words:
        pytest.importorskip("chess", reason="python-chess is not installed: pip install 'archzoo[chess]'")
    needed = NEEDS_DATA & set(words)
    if needed and not DATA:
        pytest.skip(f"{', '.join(needed)} needs ARCHZOO_DATA, the folder of the data sets")


def trains(*arguments):
    assert cli.main(list(arguments)) == 0


@pytest.mark.parametrize(
    "name",
    sampled(
        options("layer"), {"linear", "selectable_kan", "phm", "kan_conv2d", "mamba3", "ngpt_block", "capsules", "bpu"}
    ),
)
def test_every_layer_trains_a_step_at_the_budget(name, tmp_path):
    fitting = FITTING.get(f"layer={name}") or OF_KIND[get_layer(name).kind]
    skip_without_data(re.findall(r"\w+", " ".join(fitting)))
    trains(f"layer={name}", f"output_dir={tmp_path}", *fitting, *STEP)


@pytest.mark.parametrize("name", list_layers("linear") + list_layers("conv2d") + list_layers("mixer"))
def test_every_layer_has_a_config_with_all_its_options(name):
    settings = yaml.safe_load((CONFIGS / "layer" / f"{name}.yaml").read_text())
    assert settings.pop("name") == name
    if (bias := inspect.signature(get_layer(name).cls).parameters.get("bias")) and "bias" not in layer_options(name):
        assert settings.pop("bias") is bias.default
    expected = {k: list(v) if isinstance(v, tuple) else v for k, v in layer_options(name).items()}
    if expected.get("causal") is False:
        del expected["causal"]  # which models of tokens set, and refuse to be told
    assert settings == expected


@pytest.mark.parametrize(
    "name",
    sampled(
        options("task"),
        {"arithmetic", "tabular", "multi_mnist", "autoencoding", "flow_matching", "idempotent", "super_resolution"}
        | {"mnist_arithmetic", "induction_heads", "char_lm", "chess_moves"},
    ),
)
def test_every_task_trains_a_step(name, tmp_path):
    skip_without_data([name])
    trains(f"task={name}", f"output_dir={tmp_path}", *FITTING.get(f"task={name}", []), *STEP)


@pytest.mark.parametrize(
    "group", ["optimizer", "scheduler", "tracker", "trainer", pytest.param("model", marks=pytest.mark.slow)]
)
def test_every_option_of_the_other_groups_trains_a_step(group, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)  # which transformers looks for, and would find our folder
    for name in options(group):
        if name == "transformers" and not importlib.util.find_spec("transformers"):
            continue
        if NEEDS_DATA & set(re.findall(r"\w+", " ".join(FITTING.get(f"{group}={name}", [])))) and not DATA:
            continue
        trains(f"{group}={name}", f"output_dir={tmp_path / name}", *FITTING.get(f"{group}={name}", []), *STEP)


@pytest.mark.parametrize("name", options("debug"))
def test_every_debug_preset_runs(name, tmp_path):
    short = ["trainer.steps=12", "trainer.epochs=null"] if name != "fast" else []
    trains(f"debug={name}", f"output_dir={tmp_path}", *short)
    assert (name == "profiler") == bool(list(Path(tmp_path).glob("*/trace.json")))


def first_of_each(sweep):
    """Overrides that leave one value of all that is swept, but for the contestants."""
    top_level = re.compile(r",(?![^{\[(]*[}\])])")
    return [f"{key}={top_level.split(str(values))[0]}" for key, values in sweep.items() if key not in ("layer", "seed")]


# Those that take more than some seconds; GPU has those of the papers' sizes. The rest of the suite has their tasks,
# models and layers.
LARGER = [name for name in options("experiment") if name.endswith(("_paper", "_large"))]
GPU = {name: ["seed=0", "trainer.batch_size=1"] for name in LARGER}
GPU["induction_heads_paper"].append("task.test_lengths=[64]")
for name in ("ngpt_vs_gpt_large", "mamba_vs_attention_large"):
    GPU[name] += ["callbacks.sample_text.length=20", "trainer.eval_batch_size=1", "task.context=256", "model.depth=2"]
LARGE = {
    "digits",
    "aptx_mnist",
    "aptx_mnist_scaled",
    "bpu_cifar10",
    "capsules_multi_mnist",
    "vikanformer_mnist",
    "selectable_kan_images",
    "super_resolution_params",
    "kan_autoencoder_mnist",
    *GPU,
    "style_transfer",
    "flow_mnist",
    "idempotent_digits",
    "flow_two_moons",
    "capsules_mnist",
    "bpu_mnist",
    "chess_bpu",
    "mamba_vs_attention",
    "ngpt_vs_gpt",
    "induction_heads",
    "fashion_mnist",
    "mnist_arithmetic",
    "kan_pde",
    "super_resolution",
    "phm_text",
    "selectable_kan_functions",
    "functions",
    "tabular",
    "arithmetic_function10",
    "arithmetic_mul",
    "associative_recall",
    "selective_copying",
    "arithmetic",
    "arithmetic_single",
    "kan_symbolic",
}


def marks(name):
    if name in GPU:
        return [pytest.mark.slow, pytest.mark.large]
    return [pytest.mark.slow] if name in LARGE else []


@pytest.mark.parametrize("name", sampled(sorted(LARGE), {"aptx_mnist_scaled", "chess_bpu", "style_transfer"}))
def test_every_large_experiment_composes(name, capsys):
    trains(f"experiment={name}", "--cfg", "job")
    job = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text())
    assert job["name"] == written["name"]  # not the file's: aptx_mnist_scaled joins the folder of aptx_mnist
    assert job["trainer"].items() >= written.get("trainer", {}).items()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks(name)) for name in options("experiment")],
)
def test_every_experiment_trains_a_step_of_each_contestant(name, tmp_path):
    text = (CONFIGS / "experiment" / f"{name}.yaml").read_text()
    skip_without_data(re.findall(r"\w+", re.sub(r"(^|\s)#.*", "", text)))
    fewer = first_of_each(yaml.safe_load(text)["hydra"]["sweeper"]["params"])
    smaller = GPU.get(name, ["seed=0"])
    trains(f"experiment={name}", f"output_dir={tmp_path}", *fewer, *STEP, *smaller)
    assert (tmp_path / "report.html").exists()
