"""A configuration from a stranger runs no code, reads no environment, and writes nothing outside: 50 known gadgets.

Each is a folder of YAML files that is given as `--config-dir`, with the command line that would spring it. If it did,
a file `canary` would be there.
"""

import os
import re
import sys

import pytest
import yaml

from archzoo.training import cli, composing
from archzoo.training.config import ConfigError
from archzoo.training.untrusted import check_values
from tests.helpers import REPOSITORY

FAST = ["trainer.steps=1", "trainer.epochs=null", "tracker=none", "trainer.limit_batches=1"]
CALL = "{_target_: evil.spring}"
LOGGING = "{version: 1, handlers: {h: {(): evil.spring}}, root: {handlers: [h]}}"
OPEN = "{_target_: builtins.open, file: @FILE@, mode: w}"
WRITE = "{_target_: pathlib.Path.write_text, _args_: [{_target_: pathlib.Path, _args_: [@FILE@]}, x]}"

# What an experiment's YAML holds -> what the refusal must name.
IN_AN_EXPERIMENT = {
    "target in task": (f"task: {CALL}", "task._target_"),
    "target in model": (f"model: {CALL}", "model._target_"),
    "target in layer": (f"layer: {CALL}", "layer._target_"),
    "target deep in model": (f"model: {{options: {{act: [1, {CALL}]}}}}", "model.options.act.1._target_"),
    "target in optimizer.options": (f"optimizer: {{options: {{fused: {CALL}}}}}", "optimizer.options.fused._target_"),
    "target in callbacks": (f"callbacks: {{sample_text: {CALL}}}", "callbacks.sample_text._target_"),
    "target in swap": (f"swap: {{'blocks.*': {CALL}}}", "swap.blocks.*._target_"),
    "target in recipes": (f"recipes: {{kan: {{layer: {CALL}}}}}", "recipes.kan.layer._target_"),
    "target in budget.vary": (f"budget: {{vary: {{kan: {CALL}}}}}", "budget.vary.kan._target_"),
    "target in budget.to": (f"budget: {{to: {CALL}}}", "budget.to._target_"),
    "torch.load of a pickle": (
        "model: {x: {_target_: torch.load, f: evil.pt, weights_only: false}}",
        "model.x._target_",
    ),
    "numpy.load of a pickle": (
        "model: {x: {_target_: numpy.load, file: evil.npy, allow_pickle: true}}",
        "model.x._target_",
    ),
    "builtins.open": (f"task: {{x: {OPEN}}}", "task.x._target_"),
    "Path.write_text": (f"task: {{x: {WRITE}}}", "task.x._target_"),
    "os.system": ("task: {x: {_target_: os.system, _args_: [touch @FILE@]}}", "task.x._target_"),
    "subprocess": ("task: {x: {_target_: subprocess.run, args: [touch, @FILE@]}}", "task.x._target_"),
    "builtins.exec": ("task: {x: {_target_: builtins.exec, _args_: ['import evil']}}", "task.x._target_"),
    "get_method": ("task: {x: {_target_: hydra.utils.get_method, path: evil.spring}}", "task.x._target_"),
    "partial": (f"layer: {{_partial_: true, x: {CALL}}}", "layer._partial_"),
    "args alone": ("layer: {_args_: [1]}", "layer._args_"),
    "environment": ("tracker: {tags: ['${oc.env:CANARY_KEY}']}", "tracker.tags.0=${oc.env:CANARY_KEY}"),
    "environment in a text": ("tracker: {project: 'x-${oc.env:CANARY_KEY}'}", "tracker.project=x-"),
    "environment, decoded": ("model: {width: '${oc.decode:${oc.env:CANARY_KEY}}'}", "model.width="),
    "environment by a computed name": ("name: '${${swap_init}:CANARY_KEY}'\nswap_init: oc.env", "name="),
    "a resolver that does not exist": ("model: {width: '${eval:1+1}'}", "model.width=${eval:1+1}"),
    "oc.create": ("model: {width: '${oc.create:{_target_: evil.spring}}'}", "model.width="),
    "what hydra was told": ("tracker: {project: '${hydra.job.env_set.CANARY_KEY}'}", "tracker.project="),
    "all of hydra": ("tracker: {project: '${hydra}'}", "tracker.project=${hydra}"),
    "a pickled YAML object": ("task: {x: !!python/object/apply:evil.spring []}", "cannot be composed"),
    "a YAML module": ("task: {x: !!python/name:evil.spring }", "cannot be composed"),
    "bytes": ("task: {x: !!binary aGVsbG8=}", "task.x=b'hello'"),
    "job_logging": (f"hydra: {{job_logging: {LOGGING}}}", "hydra.job_logging"),
    "hydra_logging": (f"hydra: {{hydra_logging: {LOGGING}}}", "hydra.hydra_logging"),
    "launcher": (f"hydra: {{launcher: {CALL}}}", "hydra.launcher"),
    "sweeper": (f"hydra: {{sweeper: {CALL}}}", "hydra.sweeper"),
    "callbacks of hydra": (f"hydra: {{callbacks: {{c: {CALL}}}}}", "hydra.callbacks.c._target_"),
    "environment of the job": ("hydra: {job: {env_set: {WANDB_BASE_URL: 'http://evil'}}}", "hydra.job.env_set"),
    "working folder": ("hydra: {run: {dir: ../outside}, job: {chdir: true}}", "hydra."),
    "output of hydra": ("hydra: {output_subdir: ../../outside}", "hydra.output_subdir"),
    "searchpath": ("hydra: {searchpath: ['pkg://evil']}", "hydra.searchpath"),
    "searchpath swept": ("hydra: {sweeper: {params: {hydra.searchpath: '[pkg://evil]'}}}", "params.hydra.searchpath"),
    "launcher swept": ("hydra: {sweeper: {params: {+hydra.launcher._target_: evil.spring}}}", "params.+hydra.launcher"),
    "target swept": ("hydra: {mode: MULTIRUN, sweeper: {params: {+task._target_: evil.spring}}}", "task._target_"),
    "folder swept": ("hydra: {mode: MULTIRUN, sweeper: {params: {output_dir: ../outside}}}", "output_dir=../outside"),
    "output_dir above": ("output_dir: ../outside", "output_dir=../outside"),
    "output_dir absolute": ("output_dir: /outside/archzoo", "output_dir=/outside/archzoo"),
    "output_dir by a name": ("name: ../outside", "outside"),
    "data_dir above": ("data_dir: ..", "data_dir=.."),
    "a secret": ("tracker: {tags: []}\noptimizer: {options: {api_key: hunter2}}", "optimizer.options.api_key=…"),
    "weights that are a pickle": (
        "defaults: [{override /model: timm}]\nmodel: {name: test_vit, checkpoint: evil.pt}",
        "model.checkpoint=",
    ),
    "weights by an option": (
        "defaults: [{override /model: timm}]\nmodel: {name: test_vit, options: {checkpoint_path: evil.pt}}",
        "model.options=",
    ),
    "weights from elsewhere": (
        "defaults: [{override /model: timm}]\n"
        "model: {name: test_vit, options: {pretrained: true, pretrained_cfg_overlay: {file: evil.pt}}}",
        "model.options=",
    ),
    "code from the hub": (
        "defaults: [{override /model: transformers}, {override /task: char_lm}]\n"
        "model: {name: gpt2, config: {auto_map: {AutoModelForCausalLM: evil.spring}, trust_remote_code: true}}",
        "model.config=",
    ),
    "a kernel from the hub": (
        "defaults: [{override /model: transformers}, {override /task: char_lm}]\n"
        "model: {name: gpt2, config: {attn_implementation: someone/evil-kernel}}",
        "model.config=",
    ),
}
# Files of the folder -> command line, and what the refusal must name.
FOLDERS = {
    "a launcher's file of the known name": (
        {"hydra/launcher/joblib.yaml": CALL},
        ["hydra/launcher=joblib"],
        "hydra.launcher",
    ),
    "a launcher's file": ({"hydra/launcher/mine.yaml": CALL}, ["hydra/launcher=mine"], "hydra/launcher=mine"),
    "a launcher's file by an override": (
        {
            "experiment/x.yaml": "# @package _global_\ndefaults: [{override /hydra/launcher: evil}]",
            "hydra/launcher/evil.yaml": CALL,
        },
        ["experiment=x"],
        "hydra.launcher._target_",
    ),
    "logging by a package": (
        {"experiment/x.yaml": "# @package hydra.job_logging\nhandlers: {h: {(): evil.spring}}"},
        ["experiment=x"],
        "hydra.job_logging",
    ),
    "searchpath in the primary": (
        {"mine.yaml": "defaults: [train, _self_]\nhydra: {searchpath: ['pkg://evil']}"},
        ["--config-name", "mine"],
        "hydra.searchpath",
    ),
    "aliases in the primary": (
        {"mine.yaml": "defaults: [train, _self_]\nhydra: {aliases: {w: hydra.searchpath}}"},
        ["--config-name", "mine", "w=[pkg://evil]"],
        "hydra.aliases",
    ),
    "logging in the help": (
        {"mine.yaml": f"defaults: [train, _self_]\nhydra: {{hydra_logging: {LOGGING}}}"},
        ["--config-name", "mine", "--help"],
        "hydra.hydra_logging",
    ),
    "logging in the configuration that is shown": (
        {"experiment/x.yaml": f"# @package _global_\nhydra: {{job_logging: {LOGGING}}}"},
        ["experiment=x", "--cfg", "job"],
        "hydra.job_logging",
    ),
}
EVERY = {
    **{
        name: ({"experiment/x.yaml": f"# @package _global_\n{text}\n"}, ["experiment=x"], words)
        for name, (text, words) in IN_AN_EXPERIMENT.items()
    },
    **FOLDERS,
}


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A working folder, beside which lies what a gadget would call."""
    monkeypatch.setenv("CANARY_KEY", "hunter2")
    (tmp_path / "library").mkdir()
    canary = tmp_path / "canary"
    (tmp_path / "library" / "evil.py").write_text(
        f"import pathlib\ndef spring(*args, **kwargs): pathlib.Path({str(canary)!r}).touch()\nspring()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    # A pickle that makes the canary when it is loaded.
    (work / "evil.pt").write_bytes(b"cposix\nsystem\n(S'touch " + os.fsencode(canary) + b"'\ntR.")
    monkeypatch.chdir(work)
    return work


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "__pycache__")


# One of each way to be refused, composed by hydra; the values of the others are looked at as they are, which is faster.
KINDS = {
    "target in layer",
    "target deep in model",
    "environment by a computed name",
    "a pickled YAML object",
    "job_logging",
    "searchpath swept",
    "target swept",
    "output_dir by a name",
    "data_dir above",
    "a launcher's file of the known name",
    "searchpath in the primary",
    "logging in the help",
    "logging in the configuration that is shown",
}


def value_gadgets():
    for name, (text, words) in IN_AN_EXPERIMENT.items():
        if "hydra:" not in text and "defaults:" not in text and "!!" not in text:
            yield name, yaml.safe_load(text.replace("@FILE@", "canary")), words


def test_a_gadget_among_the_values_is_refused_by_name():
    refused = 0
    for _name, config, words in value_gadgets():
        if words.startswith(("output_dir", "data_dir", "outside")):
            continue
        with pytest.raises(ConfigError, match=re.escape(words)):
            check_values(config)
        refused += 1
    assert refused >= 25


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in EVERY])
def test_a_gadget_in_a_borrowed_config_is_refused_by_name(name, inside, capfd):
    given, command, words = EVERY[name]
    for path, text in given.items():
        file = inside.parent / "borrowed" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("@FILE@", str(inside.parent / "canary")))
    before = files(inside.parent)
    short = [] if {"--help", "--cfg"} & set(command) else FAST
    code = cli.main(["--config-dir", str(inside.parent / "borrowed"), *command, *short])
    told = capfd.readouterr()
    assert code == cli.EXIT_CONFIG, told
    assert words in told.err
    assert "hunter2" not in told.err + told.out
    assert "Traceback" not in told.err
    assert "evil" not in sys.modules
    assert files(inside.parent) == before, "nothing may be written"


def test_there_are_fifty_gadgets_and_more():
    assert len(EVERY) >= 50
    assert set(EVERY) >= KINDS


@pytest.fixture
def borrowed(inside):
    """A folder with a harmless experiment."""
    folder = inside.parent / "borrowed" / "experiment"
    folder.mkdir(parents=True)
    (folder / "x.yaml").write_text(
        "# @package _global_\nname: mine\nmodel: {width: 8}\ntracker: {tags: ['${task.name}']}\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {layer: 'linear,aptx'}}}\n"
    )
    return folder.parent


def test_what_the_command_line_says_goes_on_to_work(borrowed, inside):
    """A borrowed experiment, its sweep, and the user's own folders and launcher's options beside it."""
    composing.store_schema()  # as `main` does
    out = inside.parent / "elsewhere"
    own = [f"output_dir={out}", f"data_dir={inside.parent}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    plan = composing.make_plan(["--config-dir", str(borrowed), "experiment=x", *own])
    assert [config.layer["name"] for config in plan.configs] == ["linear", "aptx"]
    assert {config.output_dir for config in plan.configs} == {str(out)}
    assert plan.configs[0].tracker.tags == ["digits"]
    assert plan.parallel


@pytest.mark.slow
def test_a_borrowed_experiment_is_trained(borrowed, inside):
    out = inside.parent / "elsewhere"
    assert cli.main(["--config-dir", str(borrowed), "experiment=x", f"output_dir={out}", *FAST]) == 0
    assert len(list(out.glob("*/run.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-path", "/tmp"], "--config-path /tmp: would run what has not been checked"),
        (["--experimental-rerun", "/tmp"], "--experimental-rerun /tmp: would run"),
        (["hydra.launcher._target_=evil.spring"], "hydra.launcher._target_=evil.spring: no launcher"),
        (["hydra.sweeper._target_=evil.spring"], "hydra.sweeper._target_=evil.spring: no sweeper"),
        (["+task._target_=evil.spring"], "task._target_: a configuration cannot name code"),
        (["name=${oc.env:CANARY_KEY}"], "name=${oc.env:CANARY_KEY}: only the value of another key"),
        (["+task.api_key=hunter2"], "task.api_key=…: looks like a secret"),
        (["trainer.api_key=hunter2"], "trainer.api_key=…: there is no such key"),
        (["trainer.steps=???"], "trainer.steps=???: "),
    ],
)
def test_the_command_line_cannot_do_so_by_mistake_either(arguments, words, inside, capfd):
    assert cli.main(arguments) == cli.EXIT_CONFIG
    told = capfd.readouterr()
    assert words in told.err
    assert "hunter2" not in told.err
    assert files(inside) == ["evil.pt"]
    assert "evil" not in sys.modules


def test_modules_may_be_called_as_secrets_are():
    check_values({"swap": {"*.attention.key": "kan"}, "model": {"bos_token_id": 1}})
    with pytest.raises(ConfigError, match="swap.x.api_key=…: looks like a secret"):
        check_values({"swap": {"x": {"name": "kan", "api_key": "hunter2"}}})


def test_no_key_of_our_own_is_taken_for_a_secret():
    for path in (REPOSITORY / "configs").rglob("*.yaml"):
        config = yaml.safe_load(path.read_text()) or {}
        config.pop("hydra", None)
        check_values({key: value for key, value in config.items() if key != "defaults"})
