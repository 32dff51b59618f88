"""The command line of the trainer: checks everything first, hands the runs to Hydra, and reports who won.

Nothing that is slow to import is imported before it is needed: `--help` and `--cfg` compose YAML, and no more.
"""

import contextlib
import importlib
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archzoo.names import visible
from archzoo.training.composing import (
    Plan,
    check,
    config_folder,
    first_line,
    make_plan,
    store_schema,
    to_config,
    version_base,
    without_sweeps,
)
from archzoo.training.config import ConfigError, TrainConfig, asdict_plain, run_id, validate
from archzoo.training.writing import guarded_streams, say

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from archzoo.training.progress import Progress, SweepProgress

EXIT_FAILED, EXIT_CONFIG, EXIT_DATA, EXIT_CHECKPOINT, EXIT_DIVERGED = 1, 2, 3, 4, 5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
UNFINISHED = ("failed", "missing", "interrupted", "running")
# What a job of a launcher, in another process or on another host, finds in its environment.
IMPORTS = "ARCHZOO_IMPORT"  # modules named by --import
RUNS = "ARCHZOO_RUNS"  # number of runs of the sweep
STOP = "ARCHZOO_STOP"  # a file that appears when the sweep is to stop
LEFT_OUT = "ARCHZOO_LEFT_OUT"  # runs that are not to be trained now
LOOK_EVERY = 1.0  # seconds between looks for that file, which may be on a network


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `train.py`; returns the exit code.

    0: all runs are done. 1: some failed. 2: the configuration is wrong. 3: data is missing. 4: checkpoints could not be
    written or read. 5: some diverged. 130: stopped by SIGINT. 143: by SIGTERM, SIGUSR1 or SIGHUP.
    """
    with guarded_streams():
        try:
            return _main(argv)
        except KeyboardInterrupt:  # where nothing is trained yet, or any more
            return 128 + signal.SIGINT


def _main(argv: Sequence[str] | None) -> int:
    began = time.monotonic()
    plan = prepare(list(sys.argv[1:] if argv is None else argv))
    if isinstance(plan, int):
        return plan
    from archzoo.training import distributed

    if distributed.launched():
        return _train_together(plan, began)
    with _signals():  # one that comes while the report is written is told by the exit code too
        _run_all(plan)
        return _report(plan, began)


def _say(line: str) -> None:
    """A line on stderr, once where several processes on this machine would say the same."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(visible(line), file=sys.stderr)


def prepare(argv: list[str]) -> "Plan | int":
    """The runs of a command line, checked; an exit code where what is wrong with it, or what it asks for, was shown."""
    try:
        _check_text(argv)
        argv = _import_modules(argv)
        if (argv[:1] == ["--info"] and argv[1:2] == ["layers"]) or argv == ["--info=layers"]:
            return _print_layers()
        store_schema()
        plan = make_plan(argv)
        if plan is None:  # --help, --cfg and the like
            _hydra_main(without_sweeps(argv))
            return 0
        if len(plan.configs) > 1:
            _say(f"checking {len(plan.configs)} runs, to be in {plan.configs[0].output_dir}")
        check(plan)
    except ConfigError as error:
        for line in str(error).splitlines():
            _say(f"error: {line}")
        return EXIT_CONFIG
    except _data_error() as error:
        _say(f"error: {error}")
        return EXIT_DATA
    return plan


def _check_text(argv: list[str]) -> None:
    for argument in argv:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            encoding = sys.getfilesystemencoding()
            raise ConfigError(f"{argument!a}: not text in this locale's encoding, {encoding}; set PYTHONUTF8=1")


def _data_error() -> type[Exception]:
    if "archzoo.tasks.task" in sys.modules:
        from archzoo.tasks.task import DatasetError

        return DatasetError
    return ConfigError  # no task has been built, so that there can be no other error


# ---- running it

_stop_signal: list[int] = []
_stop_files: list[Path] = []  # of the sweep that this process has started
_progress: "list[Progress]" = []
_looked = [0.0, False]  # when the file was last looked for, and whether it was there


def should_stop() -> bool:
    """Whether a signal has asked this process, or the one that started the sweep, to stop."""
    if not _stop_signal and STOP in os.environ and time.monotonic() - _looked[0] > LOOK_EVERY:
        _looked[:] = time.monotonic(), Path(os.environ[STOP]).exists()
    return bool(_stop_signal or _looked[1])


def _on_signal(number: int, frame: Any) -> None:
    if _stop_signal:  # the second one: at once
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _stop_signal.append(number)
    for path in _stop_files:  # a launcher's jobs get no signal that was sent to this process
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    say("stopping after this step; the same command goes on from here (again to stop at once)")


def run_job(composed: "DictConfig") -> dict[str, Any]:
    """One run of a sweep, in this process or in one of a launcher's. Returns its record."""
    from archzoo.training.launching import saved_before_requeue

    for name in filter(None, os.environ.get(IMPORTS, "").split(",")):
        sys.path.insert(0, str(Path.cwd())) if _beside(name) else None
        importlib.import_module(name)
    config = to_config(composed)
    validate(config)
    if _progress:  # in the main process
        return _run(config, _progress[0])
    from hydra.core.hydra_config import HydraConfig

    from archzoo.training.progress import SweepProgress

    if (run := run_id(asdict_plain(config))) in os.environ.get(LEFT_OUT, "").split(","):
        return {"run_id": run, "status": "left out"}
    _looked[:] = 0.0, False
    number = int(getattr(HydraConfig.get().job, "num", 0)) + 1
    progress = SweepProgress(int(os.environ.get(RUNS, number)), bars=False, number=number)
    with _signals(), saved_before_requeue(_on_signal):
        return _run(config, progress)


def _run(config: TrainConfig, progress: "Progress") -> dict[str, Any]:
    from archzoo.training.run import execute
    from archzoo.training.run_folder import run_name

    if should_stop():
        return {"run_id": run_id(asdict_plain(config)), "name": run_name(config), "status": "interrupted"}
    return execute(config, progress=progress, should_stop=should_stop)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Inside, the first signal asks the runs to stop; SLURM warns of its time limit by SIGUSR1, a terminal by SIGHUP.

    These two are left to whom has a use for them, as a launcher or nohup.
    """
    ours = [n for n in SIGNALS if n in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(n) is signal.SIG_DFL]
    before = {number: signal.signal(number, _on_signal) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hydra_main(argv: list[str]) -> None:
    import hydra

    before, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        hydra.main(config_path=str(config_folder()), config_name="train", **version_base())(run_job)()
    finally:
        sys.argv = before


def _train_together(plan: Plan, began: float) -> int:
    """Trains as one of the processes that torchrun has started; rank 0 leads them from run to run, and reports."""
    from archzoo.training import distributed
    from archzoo.training.build import resolve_device
    from archzoo.training.run import execute

    trainer, statuses = plan.configs[0].trainer, []
    try:
        with distributed.group(resolve_device(trainer.device), trainer.rank_timeout):
            leads = distributed.rank() == 0
            if leads:
                _run_all(plan)
                distributed.begin_run()
                distributed.agree({"status": distributed.END, "error": None})
            else:
                with _signals():
                    for config in plan.configs:
                        statuses.append(execute(config, should_stop=should_stop)["status"])
                        if statuses[-1] == distributed.END:
                            break
    except distributed.RankLost as lost:
        distributed.end_process(lost)
    if leads:
        return _report(plan, began)
    if _stop_signal:
        return _stopped()
    return EXIT_FAILED if "failed" in statuses else EXIT_DIVERGED if "diverged" in statuses else 0


def _run_all(plan: Plan) -> None:
    from archzoo.training.progress import SweepProgress

    progress = SweepProgress(len(plan.configs), bars=False if plan.parallel else None)
    try:
        with _signals():
            if plan.parallel:
                _launch(plan, progress)
            else:
                _progress.append(progress)
                _hydra_main(plan.argv)
    finally:
        progress.close()
        _progress.clear()


def _launch(plan: Plan, progress: "SweepProgress") -> None:
    """Hands the runs to a launcher's processes; those that it loses do not take the others with them."""
    from archzoo.training.launching import Watcher, job_environment, settled_jobs

    # Beside the runs, for jobs on other hosts see that folder, and need not see another of this one.
    stop = Path(plan.configs[0].output_dir).absolute() / f".stop-{platform.node()}-{os.getpid()}"
    stop.unlink(missing_ok=True)
    _stop_files.append(stop)
    told = {IMPORTS: os.environ.get(IMPORTS, ""), RUNS: str(len(plan.configs)), STOP: str(stop)}
    seen = contextlib.nullcontext() if "joblib" in plan.launcher else Watcher(plan.folders(), progress)
    before, os.environ["HYDRA_FULL_ERROR"] = os.environ.get("HYDRA_FULL_ERROR", "0"), "1"  # hydra shall raise, not exit

    def attempt(left_out: set[str]) -> set[str]:
        """Trains the runs but these; returns those that were going on if the launcher gave up."""
        try:
            _hydra_main([*plan.argv, *job_environment(told | {LEFT_OUT: ",".join(sorted(left_out))})])
        except Exception as error:  # as joblib's, which ends all processes where one is killed
            print(f"error: the launcher gave up: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
            return set() if _stop_signal else _going_on(plan) - left_out
        return set()

    try:
        with settled_jobs(plan.launcher), seen:
            suspects: set[str] = set()
            while found := attempt(suspects):
                suspects |= found
                print(f"going on without the {len(suspects)} runs that it was training", file=sys.stderr)
            for suspect in sorted(suspects):  # each by itself: one of them ends its process
                if not _stop_signal:
                    attempt({folder.name for folder in plan.folders()} - {suspect})
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before
        _stop_files.clear()
        stop.unlink(missing_ok=True)


def _going_on(plan: Plan) -> set[str]:
    from archzoo.training.run_folder import read_record

    records = {folder.name: read_record(folder) for folder in plan.folders()}
    return {run for run, record in records.items() if record and record["status"] == "running"}


def _report(plan: Plan, began: float) -> int:
    from archzoo.training.run_folder import read_record

    root, folders = Path(plan.configs[0].output_dir), plan.folders()
    records = [read_record(folder) for folder in folders]
    statuses = [record["status"] if record else "missing" for record in records]
    unwritten = _print_comparison(root) if plan.multirun else None
    _print_places(root, folders, plan, statuses, time.monotonic() - began)
    troubles = [record.get("checkpoint_error") if record else None for record in records]
    for record, trouble in zip(records, troubles, strict=True):
        if record and trouble:
            print(f"error: {record['name']}: {trouble}", file=sys.stderr)
    if unwritten is not None:
        print(f"error: {unwritten}; with room there: archzoo report {root}", file=sys.stderr)
    if _stop_signal:
        return _stopped()
    ended = [
        (trouble, record)
        for trouble, record, status in zip(troubles, records, statuses, strict=True)
        if status in UNFINISHED
    ]
    if any(not trouble and not (record and record.get("resumable")) for trouble, record in ended):
        return EXIT_FAILED
    if any(troubles):
        return EXIT_CHECKPOINT
    if ended:
        return EXIT_DATA
    if unwritten is not None:
        return EXIT_FAILED
    return EXIT_DIVERGED if "diverged" in statuses else 0


def _stopped() -> int:
    return 128 + (signal.SIGINT if _stop_signal[0] == signal.SIGINT else signal.SIGTERM)


def _print_comparison(root: Path) -> str | None:
    """The table, and the report's files; why they cannot be written, if so. The runs are safe, and have all of it."""
    from archzoo.__main__ import print_table
    from archzoo.report import write_report

    print()
    print_table(root, None)
    try:
        write_report(root)
    except OSError as error:
        return f"{error.filename or root}: the report cannot be written ({error.strerror})"
    return None


def _print_places(root: Path, folders: list[Path], plan: Plan, statuses: list[str], seconds: float) -> None:
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    print(f"\n{', '.join(f'{n} {status}' for status, n in counts.items())} in {seconds:.0f} s")
    if plan.multirun:
        print(f"report:      {root / 'report.html'}")
    else:
        print(f"run folder:  {folders[0]}")
    tracker = plan.configs[0].tracker
    if tracker.wandb == "offline":
        where = root / ("*" if plan.multirun else folders[0].name)
        print(f"in W&B:      wandb login, then: wandb sync {where}/wandb/offline-run-*")
    elif tracker.wandb == "online":
        print(f"in W&B:      project {tracker.project}, group {plan.configs[0].name}, at wandb.ai")
    else:
        print("in W&B:      not mirrored (tracker.wandb=disabled)")
    if tracker.tensorboard:
        print(f"TensorBoard: tensorboard --logdir {root}")
    if set(counts) != {"done"}:
        goes_on = _stop_signal or set(counts) <= {"done", "interrupted"}
        again = "the same command goes on" if goes_on else "sweep.retry_failed=true trains the others again"
        print(f"not all runs are done: {again}")


# ---- the rest


def _import_modules(argv: list[str]) -> list[str]:
    """Takes `--import MODULE` off the command line and imports it: the way for a user's own layers to be found."""
    rest: list[str] = []
    names: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--import":
            names.append(next(arguments, ""))
        elif argument.startswith("--import="):
            names.append(argument.removeprefix("--import="))
        else:
            rest.append(argument)
    for name in names:
        sys.path.insert(0, str(Path.cwd())) if _beside(name) else None
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"--import {name}: cannot be imported ({error})") from error
    if names:
        os.environ[IMPORTS] = ",".join(names)
    return rest


def _beside(name: str) -> bool:
    return name not in sys.modules and Path(f"{name.partition('.')[0]}.py").exists()


def _print_layers() -> int:
    from archzoo.__main__ import main as archzoo

    return archzoo(["layers"])
