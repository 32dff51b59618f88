import dataclasses
import json
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from archzoo.training import cli, composing, launching
from archzoo.training.config import ConfigError
from archzoo.training.progress import SweepProgress
from tests.training.support import lines_without_time
from tests.training.sweeps import TRAIN, cut_off, plan_of, records, table, tiny, train

ENGINES = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray", "+hydra.launcher.init.num_cpus=2"],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The comparison, trained in this process, one run after the other."""
    folder = tmp_path_factory.mktemp("reference")
    chosen = tiny(folder / "configs")
    assert cli.main([*chosen, f"output_dir={folder / 'out'}"]) == 0
    return SimpleNamespace(chosen=chosen, out=folder / "out")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_takes_up_a_comparison_and_reports_the_same(engine, reference, tmp_path):
    arguments = [*reference.chosen, f"output_dir={tmp_path / 'out'}"]
    plan = plan_of(*arguments)
    cut_off(plan, run=1)
    done = train(*arguments, *ENGINES[engine], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 done in" in done.stdout
    for number, run in enumerate(("linear-seed0", "linear-seed1", "aptx-seed0", "aptx-seed1"), 1):
        assert any(line.startswith(f"run {number} of 4  {run}") for line in done.stderr.splitlines()), done.stderr
    resumed = [p.parent.name for p in (tmp_path / "out").glob("*/log.txt") if "resumed from step" in p.read_text()]
    assert resumed == [plan.folders()[1].name], "only the run that was cut off had a checkpoint"
    for ours in plan.folders():
        theirs = reference.out / ours.name
        assert lines_without_time(ours / "metrics.jsonl") == lines_without_time(theirs / "metrics.jsonl")
    assert table(tmp_path / "out") == table(reference.out)
    assert not list((tmp_path / "out").glob(".stop-*"))
    # all are done: started again in this process, nothing is trained
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/model.safetensors")}
    assert len(written) == 4
    assert cli.main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in written} == written


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_whose_process_is_killed_does_not_take_the_others_with_it(engine, reference, tmp_path):
    (tmp_path / "fatal.py").write_text(
        "import os, pathlib, signal\n"
        "from archzoo.training.loop import Trainer\n"
        "step = Trainer._train_step\n"
        "def fatal(self, batches):\n"
        "    if self.config.seed == 1 and self.config.layer['name'] == 'linear' and self.step == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, batches)\n"
        "Trainer._train_step = fatal\n"
    )
    extra = ["+hydra.launcher.remote.max_retries=0"] if engine == "ray" else []
    arguments = [*reference.chosen, "output_dir=out"]
    done = train("--import", "fatal", *arguments, *ENGINES[engine], *extra, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    statuses = {name: record["status"] for name, record in records(tmp_path / "out").items()}
    assert statuses.pop("linear-seed1") == "running", "as a killed process leaves it"
    assert statuses == dict.fromkeys(("linear-seed0", "aptx-seed0", "aptx-seed1"), "done"), done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    # the same command, without what killed it
    assert train(*arguments, folder=tmp_path).returncode == 0
    assert table(tmp_path / "out") == table(reference.out)


@pytest.mark.slow
def test_a_job_that_submitit_requeues_has_saved_its_last_step(reference, tmp_path):
    arguments = [*reference.chosen, f"output_dir={tmp_path / 'out'}", "layer=linear", "seed=0"]
    arguments += ["trainer.steps=1500", "trainer.eval_every=1000", "tracker=none"]
    (run,) = plan_of(*arguments).folders()
    command = [*TRAIN, *arguments, *ENGINES["submitit"]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int((run / "lock").read_text()), signal.SIGUSR2)  # as SLURM does before the time limit
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    log = (run / "log.txt").read_text()
    assert "resumed from step_" in log
    assert "resumed from step_1000" not in log, "the signal's own checkpoint, not that of an evaluation"
    alone = [a for a in arguments if not a.startswith("output_dir=")]
    assert cli.main([*alone, f"output_dir={tmp_path / 'alone'}"]) == 0
    assert lines_without_time(run / "metrics.jsonl") == lines_without_time(
        tmp_path / "alone" / run.name / "metrics.jsonl"
    )


# ---- what the engines are made of


def test_an_engine_that_is_not_installed_is_told_with_its_command(monkeypatch, capsys):
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    assert cli.main(["hydra/launcher=ray", "seed=0,1"]) == 2
    assert capsys.readouterr().err == "error: hydra/launcher=ray: is not installed; pip install 'archzoo[ray]'\n"
    for choice, extra in (("joblib", "launch"), ("submitit_local", "submitit"), ("submitit_slurm", "submitit")):
        error = SimpleNamespace(missing_cfg_file=f"hydra/launcher/{choice}", options=["basic"])
        with pytest.raises(ConfigError, match=rf"^hydra/launcher={choice}: is not installed; .*'archzoo\[{extra}\]'$"):
            composing._missing_group(error, composing.config_folder())


def test_what_jobs_find_in_their_environment_survives_hydras_grammar():
    composing.store_schema()
    values = {"A": "/a b/it's, [x]=1/\\", "B": "", "C": "7"}
    with initialize_config_dir(str(composing.config_folder()), **composing.version_base()):
        composed = compose("train", overrides=launching.job_environment(values), return_hydra_config=True)
    assert dict(composed.hydra.job.env_set) == values


def test_a_lost_job_of_submitit_leaves_the_results_of_the_others(monkeypatch, capsys):
    submitit = pytest.importorskip("submitit", reason="an extra of its own, archzoo[submitit]")

    class Job:
        def __init__(self, number):
            self.number = number

        def results(self):
            if self.number == 1:
                raise RuntimeError("killed\nin many words")
            return [self.number]

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", lambda self, *args: [Job(i) for i in range(3)])
    unpatched = submitit.AutoExecutor.map_array
    with launching.settled_jobs("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"):
        first, second, third = (job.results()[0] for job in submitit.AutoExecutor.map_array(None))
    assert (first, second.return_value, third) == (0, {"status": "lost"}, 2)
    assert capsys.readouterr().err == "error: a run was lost, and the others go on: RuntimeError: killed\n"
    assert submitit.AutoExecutor.map_array is unpatched


def test_runs_that_a_launcher_gave_up_are_trained_one_by_one_at_the_end(tmp_path, monkeypatch, capsys):
    """As joblib does it: two at a time, and where one is killed, it ends the other and goes no further."""
    composing.store_schema()
    plan = composing.make_plan([*tiny(tmp_path / "configs"), f"output_dir={tmp_path / 'out'}", "seed=range(3)"])
    names = [folder.name for folder in plan.folders()]
    tries = []

    def joblib(argv):
        (told,) = (word for word in argv if word.startswith(f"++hydra.job.env_set.{cli.LEFT_OUT}="))
        runs = [name for name in names if name not in told]
        tries.append([names.index(run) for run in runs])
        for pair in zip(runs[::2], [*runs[1::2], None], strict=False):
            killed = names[2] in pair
            for run in filter(None, pair):
                (tmp_path / "out" / run).mkdir(parents=True, exist_ok=True)
                record = {"run_id": run, "status": "running" if killed else "done"}
                (tmp_path / "out" / run / "run.json").write_text(json.dumps(record))
            if killed:
                raise RuntimeError("a worker was killed\nin many words")

    monkeypatch.setattr(cli, "_hydra_main", joblib)
    plan = dataclasses.replace(plan, launcher="hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher")
    cli._launch(plan, SweepProgress(6, bars=False))
    alone = sorted((2, 3), key=names.__getitem__)
    assert tries == [[0, 1, 2, 3, 4, 5], [0, 1, 4, 5], *([n] for n in alone)]
    statuses = [json.loads((folder / "run.json").read_text())["status"] for folder in plan.folders()]
    assert statuses == ["done", "done", "running", "done", "done", "done"]
    assert capsys.readouterr().err.count("error: the launcher gave up: RuntimeError: a worker was killed\n") == 2


def test_a_job_is_requeued_after_its_run_was_saved(monkeypatch):
    monkeypatch.setenv("SUBMITIT_FOLDER", "/jobs")
    told = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: told.append("requeue"))
    try:
        with launching.saved_before_requeue(lambda number, frame: told.append("stop")):
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGUSR2)
            told.append("saved")
        assert told == ["stop", "saved", "requeue"]
        with launching.saved_before_requeue(lambda number, frame: told.append("stop")):
            pass
        assert len(told) == 3, "a job that ended by itself is not requeued"
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_stop_is_seen_where_the_runs_are(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_looked", [0.0, False])
    monkeypatch.setattr(cli, "LOOK_EVERY", 0.0)
    monkeypatch.setenv(cli.STOP, str(tmp_path / "out" / ".stop"))
    assert not cli.should_stop()
    monkeypatch.setattr(cli, "_stop_files", [tmp_path / "out" / ".stop"])
    monkeypatch.setattr(cli, "_stop_signal", [])
    cli._on_signal(signal.SIGTERM, None)
    monkeypatch.setattr(cli, "_stop_signal", [])  # the job's process has got no signal
    assert cli.should_stop()


def test_runs_elsewhere_are_told_from_their_records(tmp_path, monkeypatch, capsys):
    def write(number, status, started):
        (tmp_path / str(number)).mkdir(exist_ok=True)
        record = {
            "name": f"run{number}",
            "status": status,
            "started": started,
            "machine": {"host": "far"},
            "error": "x",
        }
        record |= {"score": {"metric": "loss", "split": "test", "value": 0.5}, "timing": {"wall_s": 3.0}}
        (tmp_path / str(number) / "run.json").write_text(json.dumps(record))

    monkeypatch.setattr(launching, "WATCH_EVERY", 0.001)
    write(1, "done", "today")
    write(2, "interrupted", "today")
    with launching.Watcher([tmp_path / str(n) for n in (1, 2, 3)], SweepProgress(3, bars=False)) as watcher:
        write(3, "running", "now")
        while len(watcher.seen) < 3:
            time.sleep(0.001)
        write(2, "failed", "later")
        write(3, "done", "now")
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert lines[:2] == ["run 1 of 3 run1 not trained again (test loss 0.5, 3.0 s)", "run 3 of 3 run3 started on far"]
    assert sorted(lines[2:]) == ["run 2 of 3 run2 failed: x", "run 3 of 3 run3 test loss 0.5, 3.0 s"]
