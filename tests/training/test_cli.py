import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from torch import nn

from archzoo import Card, registry
from archzoo.training import cli, composing
from archzoo.training.config import ConfigError
from tests.helpers import REPOSITORY
from tests.training.support import lines_without_time

FAST = ["trainer.steps=4", "trainer.epochs=null", "trainer.log_every=2", "trainer.eval_every=2", "tracker=none"]
TRAIN = [sys.executable, str(REPOSITORY / "train.py")]


def train(*arguments, expect=0):
    code = cli.main(list(arguments))
    assert code == expect
    return code


def records(folder):
    return {r["name"]: r for r in (json.loads(p.read_text()) for p in Path(folder).glob("*/run.json"))}


# ---- what is refused


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("layer=kna", "layer=kna: there is no such layer; did you mean 'kan'"),
        ("task=mnits", "task=mnits: there is no such task; did you mean 'mnist'"),
        ("experiment=digit", "experiment=digit: there is no such experiment; did you mean 'digits'?"),
        ("optimizer.lr=-1", "optimizer.lr=-1: must be a positive number"),
        ("optimizer.lr=fast", "optimizer.lr=fast: Value 'fast' of type 'str' could not be converted to Float"),
        ("optimizer.name=adamv", "optimizer.name=adamv: no such optimizer, did you mean"),
        ("optimizer.name=" + "x" * 300, ": no such optimizer"),
        ("layer.grid_size=0", "layer.grid_size=0: there is no such key"),  # the default layer has no grid
        ("layer.bais=false", "layer.bais=false: there is no such key; did you mean 'bias'?"),
        ("trainr.steps=3", "trainr.steps=3: there is no such key; did you mean 'trainer'"),
        ("trainer.step=3", "trainer.step=3: there is no such key; did you mean 'steps'"),
        ("trainer.steps=3", "exactly one must be set, got trainer.steps=3, trainer.epochs=20; add trainer.epochs=null"),
        ("trainer.batch_size=1.5", "trainer.batch_size=1.5: must be 1 or more, as trainer.batch_size=64, or auto"),
        ("budget.to=7", "budget.to=7: 7 parameters cannot be reached with layer linear; the smallest reachable count"),
        ("sweep.baseline=lineer", "sweep.baseline=lineer: no such layer, did you mean 'linear'"),
        ("budget.to=liner", "budget.to=liner: no such layer, did you mean 'linear' or 'linearizer'?"),
        ("model.norm=batch", "model.norm='batch': must be 'layer' or 'none'"),
        ("model.activation=rellu", "activation='rellu': did you mean 'relu'"),
        ("data_dir=/no/such/folder", "data_dir=/no/such/folder: there is no such folder"),
        ("output_dir=/dev/null/x", "output_dir=/dev/null/x: cannot be written (Not a directory)"),
        (
            "+callbacks.grid_updat={every: 3}",
            "callbacks.grid_updat={'every': 3}: callback 'grid_updat' is not registered",
        ),
        ("+callbacks.grid_update={evry: 3}", "has no argument evry=3; did you mean 'every'"),
        ("+callbacks.sample_text={top_k: 1}", "callbacks.sample_text: task digits has no text; choose task=char_lm"),
        ("+callbacks.symbolic_regression={}", "callbacks.symbolic_regression: needs a KAN"),
        ("trainer.checkpoint_activations=true", "trainer.checkpoint_activations=true: MLP has no list of blocks"),
        ("seed=one", "seed=one: "),
        ("steps", "steps: not a setting; write KEY=VALUE"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_would_be_right(argument, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(argument, expect=2) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("error: ")
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == [], "nothing may be left behind"


def test_a_wrong_option_of_the_chosen_layer_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train("layer=kan", "layer.grid_size=0", expect=2)
    assert "error: layer.grid_size=0: must be a whole number, at least 1 (layer kan)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_grid_that_cannot_become_finer_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train("layer=kan", "+callbacks.grid_refine={sizes: [3], at: [0.5]}", expect=2)
    assert "error: callbacks.grid_refine.sizes=[3]: KANLinear has grid_size=5 already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["linear", "conv2d", "mixer"])
def test_a_layer_of_any_kind_without_a_yaml_is_known_and_suggested(kind, monkeypatch):
    class Own(nn.Identity):
        def __init__(self, dim, *, gain=(1, 2), device=None, dtype=None):
            super().__init__()

    own = "zorn_" + kind
    card = Card("t", "a", 2026, "", "e", "h", "r")
    monkeypatch.setitem(registry._entries, own, registry.LayerEntry(own, Own, kind, card, nonlinear=True))
    monkeypatch.setattr(ConfigStore.instance(), "repo", copy.deepcopy(ConfigStore.instance().repo))
    plan = composing.make_plan([f"layer={own}"])
    assert [config.layer for config in plan.configs] == [{"name": own, "gain": [1, 2]}]
    with pytest.raises(ConfigError, match=f"^layer=zron_{kind}: there is no such layer; did you mean '{own}'"):
        composing.make_plan([f"layer=zron_{kind}"])


def test_all_wrong_values_are_told_at_once(capsys):
    train("optimizer.lr=-1", "trainer.batch_size=0", expect=2)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_wrong_setting_in_one_run_of_a_sweep_stops_all(tmp_path, capsys):
    train("layer=linear,kan", "model.width=64,-1", f"output_dir={tmp_path}/out", *FAST, expect=2)
    assert "width=-1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_data_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    (data / "mnist").mkdir(parents=True)
    (data / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"cut")
    train("task=mnist", f"data_dir={data}", f"output_dir={tmp_path}/out", *FAST, expect=3)
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- what is run


def test_one_run(tmp_path, capsys):
    train("seed=3", f"output_dir={tmp_path}", *FAST)
    assert records(tmp_path)["linear-seed3"]["status"] == "done"
    out = capsys.readouterr().out
    assert "1 done in" in out
    assert f"run folder:  {tmp_path}" in out


def test_a_sweep_is_compared_and_not_trained_twice(tmp_path, capsys):
    command = ["layer=linear,kan", "seed=0,1", f"output_dir={tmp_path}", *FAST]
    train(*command)
    captured = capsys.readouterr()
    assert "4 done in" in captured.out
    assert "report.html" in captured.out
    assert "run 4 of 4  kan-seed1" in captured.err
    assert (tmp_path / "report.html").exists()
    assert sorted(records(tmp_path)) == ["kan-seed0", "kan-seed1", "linear-seed0", "linear-seed1"]
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/model.safetensors")}
    train(*command)
    assert capsys.readouterr().err.count("not trained again") == 4
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/model.safetensors")} == times


@pytest.mark.slow
def test_flops_can_be_the_budget(tmp_path):
    train("layer=linear,kan,phm", "budget.match=flops", f"output_dir={tmp_path}", *FAST)
    found = records(tmp_path)
    target = found["linear-seed0"]["flops"]
    for name in ("kan-seed0", "phm-seed0"):
        assert abs(found[name]["flops"] / target - 1) <= 0.01
        assert found[name]["parameters"] != found["linear-seed0"]["parameters"]


def test_an_experiments_sweep_can_be_narrowed_on_the_command_line(tmp_path):
    train("experiment=digits", "layer=linear", "seed=0,5", f"output_dir={tmp_path}", *FAST)
    assert sorted(records(tmp_path)) == ["linear-seed0", "linear-seed5"]


def test_one_run_that_diverges_and_one_that_fails_leave_the_others_alone(tmp_path, capsys):
    settings = [f"output_dir={tmp_path}", *FAST, "optimizer=sgd", "model.norm=none"]
    train("optimizer.lr=1e-2,1e30", "model.depth=1,2", *settings, expect=5)
    statuses = sorted(json.loads(p.read_text())["status"] for p in tmp_path.glob("*/run.json"))
    assert statuses == ["diverged", "diverged", "done", "done"]
    captured = capsys.readouterr()
    assert "diverged: the loss became" in captured.err
    assert "2 done, 2 diverged" in captured.out or "2 diverged, 2 done" in captured.out


def test_a_failing_run_is_told_by_the_exit_code_and_the_table(tmp_path, capsys, monkeypatch):
    from archzoo.training.loop import Trainer

    original = Trainer._train_step

    def broken(self, batches):
        if self.config.seed == 1:
            raise RuntimeError("deliberately broken")
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", broken)
    train("seed=0,1,2", f"output_dir={tmp_path}", *FAST, expect=1)
    captured = capsys.readouterr()
    assert {r["name"]: r["status"] for r in records(tmp_path).values()} == {
        "linear-seed0": "done",
        "linear-seed1": "failed",
        "linear-seed2": "done",
    }
    assert "deliberately broken" in captured.err
    assert "sweep.retry_failed=true" in captured.out
    assert "deliberately broken" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_two_runs_side_by_side(tmp_path):
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [*TRAIN, "layer=linear,aptx", "seed=0,1", f"output_dir={tmp_path}/two", *FAST, *parallel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 done in" in done.stdout
    assert "run 4 of 4" in done.stderr
    train("layer=linear,aptx", "seed=0,1", f"output_dir={tmp_path}/one", *FAST)
    alone = sorted((tmp_path / "one").glob("*/metrics.jsonl"))
    assert len(alone) == 4
    for ours in alone:
        assert lines_without_time(ours) == lines_without_time(tmp_path / "two" / ours.parent.name / ours.name)


@pytest.mark.slow
def test_a_layer_of_the_users_own_is_swept_like_any_other(tmp_path):
    (tmp_path / "my_layers.py").write_text(
        "from torch import nn\n"
        "from archzoo import Card, register_layer\n"
        "@register_layer('my_own', kind='linear', card=Card('t', 'a', 2026, '', 'e', 'h', 'r'))\n"
        "class MyOwn(nn.Linear):\n"
        "    def __init__(self, in_features, out_features, bias=True, *, gain=2.0, device=None, dtype=None):\n"
        "        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)\n"
        "        self.gain = gain\n"
        "    def forward(self, x):\n"
        "        return self.gain * super().forward(x)\n"
    )
    settings = ["layer=linear,my_own", "output_dir=out", *FAST]
    command = [*TRAIN, "--import", "my_layers", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "out")["my_own-seed0"]["config"]["layer"] == {"name": "my_own", "bias": True, "gain": 2.0}


@pytest.mark.slow
def test_a_signal_stops_runs_side_by_side_too(tmp_path):
    settings = ["seed=0,1,2", "trainer.steps=20000", "trainer.epochs=null", "tracker=none", f"output_dir={tmp_path}"]
    command = [*TRAIN, *settings, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # to this process alone, as `kill` and SLURM do
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert [r["status"] for r in records(tmp_path).values()] == ["interrupted", "interrupted"], "the third never starts"
    # a run may have come to an evaluation before the signal: it then holds that checkpoint beside its last one
    assert {p.parts[-3] for p in tmp_path.glob("*/checkpoints/step_*")} == {
        p.parent.name for p in tmp_path.glob("*/run.json")
    }
    assert "the same command goes on" in out


@pytest.mark.slow  # tests/faults/test_signals.py sends some at every moment; here it is the whole command
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number):
    settings = ["seed=0,1", "trainer.steps=4000", "trainer.epochs=null", "tracker=none"]
    command = [*TRAIN, *settings, f"output_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert "stopping after this step" in err
    (record,) = records(tmp_path).values()
    assert record["status"] == "interrupted"
    assert list(tmp_path.glob("*/checkpoints/step_*"))
    assert "the same command goes on" in out


# ---- what is only shown


def test_help_and_config_are_shown_without_importing_torch(tmp_path):
    for arguments in (["--help"], ["--cfg", "job"], ["experiment=digits", "--cfg", "job"]):
        code = f"import sys; sys.argv = ['train.py', *{arguments!r}]\n"
        code += "from archzoo.training.cli import main\nmain()\nassert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "optimizer" in done.stdout
        assert list(tmp_path.iterdir()) == []


def test_layers_and_their_cards_are_listed(capsys):
    train("--info", "layers")
    listed = capsys.readouterr().out
    assert "kan (linear): KAN" in listed
    assert "arXiv:2404.19756" in listed


def test_the_folder_kernels_is_not_taken_for_the_package_of_that_name():
    code = (
        "import runpy, sys, importlib.util\n"
        f"sys.argv = ['train.py', '--cfg', 'job']; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"try: runpy.run_path({str(REPOSITORY / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert importlib.util.find_spec('kernels') is None\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
