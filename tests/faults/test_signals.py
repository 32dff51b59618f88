"""Row "SIGTERM / SIGINT / SLURM USR1" of the reliability table: the step is finished and saved, none is lost."""

import signal

import pytest

from archzoo.training import cli
from archzoo.training.loop import Trainer
from tests.faults.signals import CODES, stop_runs
from tests.faults.support import COMMAND, command, finish, kill, start, wait_for


@pytest.mark.parametrize("signals", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_signal_loses_no_step(tmp_path, signals):
    counts = stop_runs(tmp_path, signals)
    assert counts["signals"] == signals
    assert {key: counts[key] for key in ("lost", "wrong_code", "late", "tracebacks")} == dict.fromkeys(
        ("lost", "wrong_code", "late", "tracebacks"), 0
    )


def endless(*arguments):
    """A run whose steps take a minute."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    Trainer._train_step = lambda self, batches: signal.pause() or signal.pause() or 0.0
    return command(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_second_signal_exits_at_once(tmp_path, number):
    process = start(endless, *COMMAND, f"output_dir={tmp_path}/out", folder=tmp_path)
    told = tmp_path / "stderr"
    assert wait_for(lambda: told.exists() and "started" in told.read_text(), process)
    kill(process, number)
    assert wait_for(lambda: "stopping after this step" in told.read_text(), process)
    kill(process, number)
    assert finish(process, 5) == -number


def test_an_engines_own_handlers_stay(monkeypatch):
    mine = lambda number, frame: None  # noqa: E731 - compared by identity
    before = {number: signal.getsignal(number) for number in CODES}
    try:
        signal.signal(signal.SIGUSR1, mine)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with cli._signals():
            assert signal.getsignal(signal.SIGUSR1) is mine
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is cli._on_signal
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_before_training_is_no_traceback(monkeypatch, capfd):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_main", interrupted)
    assert cli.main(["seed=0"]) == 130
    assert "Traceback" not in capfd.readouterr().err
