"""The README says what is true: its code runs, its commands exist, its tables are those of the cards and results."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from archzoo.training import cli
from tests.helpers import REPOSITORY, sampled

README = (REPOSITORY / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_blocks_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {})


def test_the_two_commands_are_there():
    install_and_run, install_and_test = (block.strip() for block in blocks("sh")[:2])
    assert install_and_run.endswith("train.py experiment=digits")
    assert install_and_test.endswith("pytest -n 2")
    assert all(command.startswith("python3 -m venv .venv && ") for command in (install_and_run, install_and_test))


TRAINER = [
    line.partition("#")[0].strip() for block in blocks("sh")[2:] for line in block.splitlines() if "train.py" in line
]


@pytest.mark.parametrize("command", sampled(TRAINER, TRAINER[::3]))
def test_trainer_commands_compose(command, tmp_path, monkeypatch, capsys):
    """Runs every command of the README up to its configuration; a wrong key or group fails."""
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command.split("train.py ")[1])
    shown = [] if arguments[0].startswith("--") else ["--cfg", "job"]
    try:
        code = cli.main([*arguments, *shown])
    except SystemExit as stop:  # as Hydra does after --help
        code = stop.code
    assert not code
    captured = capsys.readouterr()
    assert captured.out, captured.err
    assert list(tmp_path.iterdir()) == []


def test_the_script_is_the_trainers_command_line(tmp_path):
    command = [sys.executable, str(REPOSITORY / "train.py"), "experiment=digits", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_tables_are_fresh():
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-m", "benchmarks", "readme", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_pictures_and_links_exist(page):
    path = REPOSITORY / page
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
    assert targets
    for target in targets:
        assert (path.parent / target).exists(), target
