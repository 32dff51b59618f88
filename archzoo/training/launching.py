"""Runs of a sweep in other processes and on other hosts: what Hydra's launchers are told, and what they leave out.

joblib and submitit (SLURM) come with launcher plugins, which are used as they are but for two things: a job of submitit
that is lost must not end the sweep, and a run is saved before submitit requeues it. Ray has a launcher here: the
published one, hydra-ray-launcher 1.2.2, fails with hydra 1.4 (it sets a key of a struct), asks for cloudpickle 2 and
boto3, and lets one lost run end the sweep.

Nothing slow is imported before it is needed.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hydra.plugins.launcher import Launcher
from typing_extensions import override

from archzoo.training.config import ConfigError
from archzoo.training.progress import SweepProgress, outcome

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

# Of each engine, the module that it needs and the extra of ours that installs it.
_ENGINES = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "launch"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    "ray": ("ray", "ray"),
}
WATCH_EVERY = 2.0  # seconds between looks at the records of runs whose output is not seen here


def check_installed(choice: str) -> None:
    """Checks that the engine of `hydra/launcher=CHOICE` is here.

    Raises:
        ConfigError: With the command that installs it.
    """
    module, extra = _ENGINES.get(choice, ("sys", ""))
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    if not found:
        raise ConfigError(f"hydra/launcher={choice}: is not installed; pip install 'archzoo[{extra}]'")


def job_environment(values: dict[str, str]) -> list[str]:
    """Arguments that have hydra set environment variables in every job, wherever it runs."""

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    return [f"++hydra.job.env_set.{name}={quoted(value)}" for name, value in values.items()]


def lost(error: BaseException) -> "JobReturn":
    """What a launcher returns for a run whose process ended without a word: the others go on."""
    from hydra.core.utils import JobReturn, JobStatus

    first = str(error).strip().partition("\n")[0]
    print(f"error: a run was lost, and the others go on: {type(error).__name__}: {first}", file=sys.stderr)
    returned = JobReturn()
    returned.status, returned.return_value = JobStatus.COMPLETED, {"status": "lost"}
    return returned


# ---- submitit


@contextlib.contextmanager
def settled_jobs(launcher: str) -> Iterator[None]:
    """Inside, the results of a lost job of submitit are those of `lost`: its plugin would give up all others too.

    Args:
        launcher: The launcher's class, dotted; nothing happens where it is not submitit's.
    """
    if "submitit" not in launcher:
        yield
        return
    import submitit

    original = submitit.AutoExecutor.map_array

    def map_array(self: Any, *args: Any) -> list[Any]:
        return [_Settled(job) for job in original(self, *args)]

    submitit.AutoExecutor.map_array = map_array  # type: ignore[assignment]  # the plugin has no hook for it
    try:
        yield
    finally:
        submitit.AutoExecutor.map_array = original  # type: ignore[method-assign]


class _Settled:
    """A job whose results never raise."""

    def __init__(self, job: Any):
        self.job = job

    def results(self) -> list[Any]:
        try:
            return list(self.job.results())
        except Exception as error:  # submitit's own, or those of a cluster's commands
            return [lost(error)]


class _Stop(Protocol):
    def __call__(self, number: int, frame: Any) -> None: ...


@contextlib.contextmanager
def saved_before_requeue(stop: _Stop) -> Iterator[None]:
    """In a job of submitit, its signal asks the run to stop; when the run has been saved, submitit requeues the job.

    submitit sends it some time before the time limit, and SLURM when the job is preempted. submitit alone would leave
    at once, and what was trained since the last checkpoint would be lost.
    """
    number = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"), None)
    requeue = signal.getsignal(number) if number is not None and "SUBMITIT_FOLDER" in os.environ else None
    if number is None or not callable(requeue):
        yield
        return
    came: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if not came:
            came.append(number)
            stop(number, frame)

    signal.signal(number, ask)
    try:
        yield
    finally:
        signal.signal(number, requeue)
    if came:
        requeue(number, None)  # leaves the process


# ---- Ray


@dataclass
class RayLauncherConfig:
    """`hydra/launcher=ray`: each run is a task of Ray's."""

    _target_: str = "archzoo.training.launching.RayLauncher"
    address: str | None = None
    """Of a running cluster, `auto` or `HOST:6379`; None: one is started on this machine, and stopped at the end."""
    num_cpus: float = 1.0
    """Cores that a run takes."""
    num_gpus: float = 0.0
    """GPUs that a run takes; 0.5 for two runs on one."""
    init: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `ray.init`."""
    remote: dict[str, Any] = field(default_factory=dict)
    """Further options of the task, as `resources` or `max_retries` (of a run whose process or host is lost; Ray's own
    default, 3: it goes on from its last checkpoint)."""


class RayLauncher(Launcher):
    """A launcher for Ray. Its options are those of `RayLauncherConfig`."""

    def __init__(
        self,
        address: str | None,
        num_cpus: float,
        num_gpus: float,
        init: dict[str, Any],
        remote: dict[str, Any],
    ):
        self.address, self.init = address, dict(init)
        self.options = {"num_cpus": num_cpus, "num_gpus": num_gpus, **remote}

    @override
    def setup(self, *, hydra_context: "HydraContext", task_function: "TaskFunction", config: "DictConfig") -> None:
        self.context, self.function, self.config = hydra_context, task_function, config

    @override
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence["JobReturn"]:
        import ray
        from hydra.core.singleton import Singleton

        before = signal.getsignal(signal.SIGTERM)
        own = {"include_dashboard": False} if self.address is None else {}  # one more process, and nothing to see
        ray.init(address=self.address, **{"ignore_reinit_error": True, "log_to_driver": False, **own, **self.init})
        signal.signal(signal.SIGTERM, before)  # Ray's own would leave at once
        run = ray.remote(**self.options)(_run_on_ray)
        shared = ray.put((str(Path.cwd()), self.context, self.function, self.config, Singleton.get_state()))
        tasks = [run.remote(shared, list(line), initial_job_idx + i) for i, line in enumerate(job_overrides)]
        waiting = list(tasks)
        while waiting:  # in short waits, so that signals are seen
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1.0)
        try:
            return [self._result(task) for task in tasks]
        finally:
            if self.address is None:
                ray.shutdown()

    def _result(self, task: Any) -> "JobReturn":
        import ray

        try:
            returned: JobReturn = ray.get(task)
        except Exception as error:  # of Ray: the process or its host is gone
            return lost(error)
        return returned


def _run_on_ray(shared: tuple[Any, ...], overrides: list[str], number: int) -> "JobReturn":
    """One run, in a process of Ray's."""
    from hydra.core.singleton import Singleton
    from hydra.core.utils import run_job, setup_globals
    from omegaconf import open_dict

    folder, context, function, config, singletons = shared
    os.chdir(folder)  # the folder of the runs may be named from here
    setup_globals()
    Singleton.set_state(singletons)
    composed = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = f"{composed.hydra.job.name}_{number}", number
    return run_job(
        hydra_context=context,
        task_function=function,
        config=composed,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def register_ray() -> None:
    """Makes `hydra/launcher=ray` known to hydra, in the place of the published plugin's where that is installed."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance().register(RayLauncher)
    store = ConfigStore.instance()
    store.repo.get("hydra", {}).get("launcher", {}).pop("ray.yaml", None)  # hydra 1.4 warns where one is replaced
    store.store(group="hydra/launcher", name="ray", node=RayLauncherConfig, provider="archzoo")


# ---- what is seen of runs elsewhere


class Watcher:
    """Tells what runs elsewhere are doing, from their records. Use as a context manager.

    Args:
        folders: The runs' folders, in their order.
        progress: Prints the lines.
    """

    def __init__(self, folders: Sequence[Path], progress: SweepProgress):
        self.folders, self.progress = list(folders), progress
        self.seen: dict[Path, tuple[str, str]] = {}
        self.times: dict[Path, int] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watcher":
        for number, record in self._changed():
            if record["status"] == "done":
                self.progress.say(number, record["name"], f"not trained again ({outcome(record)})")
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._tell()

    def _watch(self) -> None:
        while not self.ended.wait(WATCH_EVERY):
            self._tell()

    def _tell(self) -> None:
        for number, record in self._changed():
            started = f"started on {record['machine']['host']}"
            self.progress.say(number, record["name"], started if record["status"] == "running" else outcome(record))

    def _changed(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The runs whose status is another than at the last look, each with its number from 1."""
        from archzoo.training.run_folder import read_record

        for number, folder in enumerate(self.folders, 1):
            try:
                written = (folder / "run.json").stat().st_mtime_ns
            except OSError:
                continue
            if self.times.get(folder) == written or (record := read_record(folder)) is None:
                continue
            self.times[folder] = written
            state = (record["status"], record["started"])
            if self.seen.get(folder) != state:
                self.seen[folder] = state
                yield number, record
