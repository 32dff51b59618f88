import json
import re
import time

import pytest

from archzoo.__main__ import main as archzoo
from archzoo.training import planning, saving
from archzoo.training.loop import Trainer
from archzoo.training.run import execute
from tests.training.support import make_config
from tests.training.sweeps import plan_of, records, tiny


@pytest.fixture
def clock(monkeypatch):
    """Time that only work spends: 20 ms a step, 100 ms an evaluation, 50 ms a checkpoint, and 400 ms the first step."""
    now = [100.0]

    def spends(owner, name, seconds, first=0.0):
        function = getattr(owner, name)

        def spend(self, *args, **kwargs):
            now[0] += seconds + (first if first and self.step == 0 else 0.0)
            return function(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, spend)

    spends(Trainer, "_train_step", 0.02, first=0.4)
    spends(Trainer, "evaluate", 0.1)
    spends(saving, "save_checkpoint", 0.05)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def test_a_plan_before_the_runs_is_held_to_what_they_took(tmp_path, clock, capsys):
    out = tmp_path / "out"
    arguments = [*tiny(tmp_path / "configs"), f"output_dir={out}", "layer=linear", "seed=0,1", "trainer.steps=24"]
    command = ["plan", *arguments, "--gpus", "2", "--price-per-hour", "3600", "--seconds", "0.3"]
    assert archzoo(command) == 0
    first = capsys.readouterr()
    assert "measuring 1 of 1: linear" in first.err
    assert re.search(r"^linear +2 +0 +24 +0\.0\d+ +measured ", first.out, re.M)
    assert "past plans" not in first.out
    assert [path.name for path in out.iterdir()] == [planning.FILE], "what was measured leaves nothing else"
    expected = json.loads((out / planning.FILE).read_text())["wall_s"]
    cost = float(re.search(r"^cost: +([\d.]+) for 2 devices", first.out, re.M)[1])
    assert cost > 2 * max(expected.values()), "a price of 1 a second"

    for config in plan_of(*arguments).configs:
        execute(config)
    taken = {r["run_id"]: r["timing"]["wall_s"] for r in records(out).values()}
    assert expected.keys() == taken.keys()
    for run_id, seconds in taken.items():
        assert seconds == pytest.approx(0.4 + 24 * 0.02 + 6 * (0.1 + 0.05) + 0.1)
        assert expected[run_id] == pytest.approx(seconds, rel=1e-6)
    # as if the machine had been slower than it was
    (out / planning.FILE).write_text(json.dumps({"wall_s": {name: s / 2 for name, s in expected.items()}}))

    capsys.readouterr()
    assert archzoo([*command, "seed=0,1,2"]) == 0  # one more seed: expected to take what the others took
    second = capsys.readouterr()
    assert "measuring" not in second.err
    assert re.search(r"^linear +3 +2 +24 +\S+ +history \(2 runs\)", second.out, re.M)
    assert "1 of 3 runs to go" in second.out
    assert "2 runs took 2.00 x what was expected (median; 2.00 to 2.00)" in second.out
    kept = json.loads((out / planning.FILE).read_text())["wall_s"]
    assert len(kept) == 3
    assert {name: kept[name] for name in expected} == pytest.approx({name: s / 2 for name, s in expected.items()}), (
        "an estimate is not corrected with hindsight"
    )


@pytest.mark.slow
@pytest.mark.large  # a figure of an idle machine
def test_an_estimate_is_within_a_factor_of_two_of_a_short_run(tmp_path):
    """On a machine with nothing else to do. Longer runs come nearer, for a start is most of the error."""
    arguments = [*tiny(tmp_path / "configs"), f"output_dir={tmp_path / 'out'}", "seed=0", "trainer.steps=1000"]
    arguments += ["trainer.eval_every=100", "model.width=64"]
    plan = plan_of(*arguments)
    for config, row in zip(plan.configs, planning.estimate_rows(plan, []), strict=True):
        assert 0.5 < execute(config)["timing"]["wall_s"] / row.estimate.wall_s < 2


@pytest.mark.slow
def test_runs_elsewhere_count_if_all_but_the_seed_is_the_same(tmp_path):
    arguments = [*tiny(tmp_path / "configs"), "layer=linear"]
    execute(plan_of(*arguments, f"output_dir={tmp_path / 'other'}", "seed=5", "name=other").configs[0])
    for changed, source in (("seed=9", "history (1 run)"), ("optimizer.lr=0.5", "measured")):
        plan = plan_of(*arguments, "seed=0", changed)
        (row,) = planning.estimate_rows(plan, [tmp_path / "other"], seconds=0.01)
        assert row.estimate.source == source


def test_a_run_that_fails_is_not_estimated(tmp_path, monkeypatch, capsys):
    def broken(self, batches):
        raise RuntimeError("deliberately broken")

    monkeypatch.setattr(Trainer, "_train_step", broken)
    arguments = [*tiny(tmp_path / "configs"), f"output_dir={tmp_path / 'out'}", "layer=linear", "seed=0"]
    assert archzoo(["plan", *arguments]) == 1
    assert "not measured: RuntimeError: deliberately broken" in " ".join(capsys.readouterr().out.split())


def test_a_length_in_seconds_or_epochs_is_understood(tmp_path):
    short = planning._Short(0.5, 1.0, 2.0, 0.25, 3.0, 0.125, 10.0, 7)
    assert planning._total_steps(make_config(trainer={"steps": 40}), short) == 40
    assert planning._total_steps(make_config(trainer={"steps": None, "epochs": 2.5}), short) == 25
    assert planning._total_steps(make_config(trainer={"steps": None, "seconds": 9.0}), short) is None


@pytest.mark.parametrize(
    ("config", "steps", "wall"),
    [
        ({"steps": 40, "eval_every": 10}, 40, 1.0 + 40 * 0.5 + 4 * 2.0 + 3 * 0.25 + 3.0),
        ({"steps": 40, "eval_every": 20, "checkpoint_every": 5}, 40, 1.0 + 40 * 0.5 + 2 * 2.0 + 7 * 0.25 + 3.0),
        ({"steps": 40, "eval_every": None}, 40, 1.0 + 40 * 0.5 + 20 * 2.0 + 19 * 0.25 + 3.0),
        ({"steps": None, "epochs": 4.0, "eval_every": 40}, 40, 1.0 + 40 * 0.5 + 2.0 + 3.0),
        ({"steps": None, "seconds": 9.0}, 18, 9.0 + 2.0 + 3.0),
    ],
)
def test_an_estimate_is_made_of_its_parts(config, steps, wall, monkeypatch):
    short = planning._Short(0.5, 1.0, 2.0, 0.25, 3.0, 0.125, 10.0, 7)
    asked = []
    monkeypatch.setattr(planning, "_short_run", lambda config, **options: asked.append(options) or short)
    estimate = planning.probe(make_config(trainer=config), seconds=30.0)
    assert (estimate.steps, estimate.wall_s, estimate.start_s) == (steps, wall, 0.125)
    most = 60 if "seconds" in config else 40  # 30 s of steps of 0.5 s, or the whole run
    assert asked == [{"steps": 2, "eval_every": 1}, {"steps": most, "eval_every": most // 2}]
    asked.clear()
    planning.probe(make_config(trainer=config), seconds=6.0)
    assert len(asked) == 1, "four steps and two evaluations would take longer than that"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0"], "--gpus 0: must be 1 or more"),
        (["--seconds", "0"], "--seconds 0: must be positive"),
        (["--history", "/no/such"], "--history /no/such: there is no such folder"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        archzoo(["plan", *arguments])
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_a_wrong_setting_is_refused_as_by_train(capsys):
    assert archzoo(["plan", "layer=kna"]) == 2
    assert "layer=kna: there is no such layer; did you mean 'kan'" in capsys.readouterr().err
