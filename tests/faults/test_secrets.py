"""Secrets in the environment, on the command line and in a borrowed config end up in no file that a run writes."""

import os
import subprocess
import sys

import pytest

from archzoo.training import cli
from tests.helpers import REPOSITORY

ENVIRONMENT, ARGUMENT, CONFIG = "canary-env-5e1f0c", "canary-argv-77ab21", "canary-yaml-90cc3d"
FAST = ["trainer.steps=2", "trainer.epochs=null", "trainer.limit_batches=1", "trainer.checkpoint_every=1"]


def hits(folder, *words):
    """Files that hold one of the words, or are called so."""
    found = []
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        found += [
            f"{path.relative_to(folder)}: {w}"
            for w in words
            if w.encode() in data or w in str(path.relative_to(folder))
        ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [False, True])
def test_a_run_with_wandb_offline_records_none(tmp_path, parallel):
    """With keys in the environment. W&B's own files would tell the whole command line too."""
    environment = {**os.environ, "WANDB_API_KEY": ENVIRONMENT * 2, "MY_TOKEN": ENVIRONMENT, "HOME": str(tmp_path)}
    arguments = ["tracker=wandb", "tracker.tensorboard=true"]
    arguments += ["hydra/launcher=joblib", "seed=0,1"] if parallel else []
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), f"output_dir={out}", *FAST, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(out.rglob("run-*.wandb")), "the test must see W&B's files"
    assert list(out.rglob("checkpoints/step_*/state.json"))
    assert list(out.rglob("events.out.tfevents*"))
    assert hits(tmp_path, ENVIRONMENT) == []
    assert ENVIRONMENT not in done.stdout + done.stderr
    for folder in out.glob("*/wandb"):
        assert hits(folder, f"output_dir={out}") == [], "an argument as it was typed"


@pytest.mark.parametrize(
    "text",
    [
        f"task: {{api_key: {CONFIG}}}",
        f"optimizer: {{options: {{hf_token: {CONFIG}}}}}",
        f"callbacks: {{sample_text: {{password: {CONFIG}}}}}",
        f"recipes: {{kan: {{layer: {{client_secret: {CONFIG}}}}}}}",
        f"swap: {{'*': {{name: kan, accessKey: {CONFIG}}}}}",
        "name: ${oc.env:MY_TOKEN}",
        "tracker: {tags: ['${oc.env:MY_TOKEN,none}']}",
        "task: {path: '${oc.decode:${oc.env:MY_TOKEN}}'}",
    ],
)
def test_a_config_with_one_is_refused_without_telling_it(text, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_TOKEN", ENVIRONMENT)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more" / "experiment").mkdir(parents=True)
    (tmp_path / "more" / "experiment" / "x.yaml").write_text(f"# @package _global_\n{text}\n")
    assert cli.main(["--config-dir", "more", "experiment=x", *FAST]) == cli.EXIT_CONFIG
    told = capfd.readouterr()
    assert CONFIG not in told.err + told.out
    assert ENVIRONMENT not in told.err + told.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more"]


@pytest.mark.parametrize(
    "argument",
    [
        f"+task.api_key={ARGUMENT}",
        f"trainer.password={ARGUMENT}",
        f"+hydra.job.env_set.SERVICE_PASSWORD={ARGUMENT}",
        f"wandb_token={ARGUMENT}",
    ],
)
def test_one_on_the_command_line_is_refused_without_telling_it(argument, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main([argument]) == cli.EXIT_CONFIG
    told = capfd.readouterr()
    assert f"{argument.lstrip('+').partition('=')[0]}=…" in told.err
    assert ARGUMENT not in told.err + told.out
    assert list(tmp_path.iterdir()) == []
